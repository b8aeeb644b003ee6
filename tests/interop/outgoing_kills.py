"""SIGKILL at random moments while mail is sent up and on: no message is lost that sendmail has accepted, and waiting
mail stays.

A killed process is not a power cut: this tests the order of steps, not the fsyncs.
"""

import collections
import os
import queue
import random
import re
import subprocess
import threading
import time

from harness import ODMR, Certificates, Customer, Provider, check, events, free_port, scenario, wait_until
from kills import Puller
from world import RELAYS, House, Names, outgoing_table, queued, sendmail

MESSAGES = 500
KILLS = 40
DOMAINS = 5
FEEDERS = 4
SINK = "127.0.0.3"


def recipients(number):
    """The recipients of that message: for some, several in one domain, one of which the sink defers now and then, and
    two domains."""
    home, neighbour = f"d{number % DOMAINS}.example", f"d{(number + 1) % DOMAINS}.example"
    return [f"u@{home}", f"v@{home}", f"w@{home}", f"u@{neighbour}"][: (1, 1, 3, 4)[number % 4]]


class Feeder(threading.Thread):
    """Types messages into sendmail; some of these processes are killed. A message counts if the exit code was 0."""

    def __init__(self, box, customer, numbers, dice):
        super().__init__(daemon=True)
        self.box, self.customer, self.numbers, self.dice = box, customer, numbers, dice
        self.counted, self.codes = set(), collections.Counter()
        self.start()

    def run(self):
        environment = os.environ | {"ODMR_CONFIG": str(self.customer.config)}
        while True:
            try:
                number = self.numbers.get_nowait()
            except queue.Empty:
                return
            text = f"Subject: {number}\n\n" + (".%s\n" % ("z" * 70)) * self.dice.choice((0, 1, 10, 100, 1500))
            text += f"end of {number}\n"
            command = [ODMR, "send", "-i", "-f", "adam@example.org", *recipients(number)]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
            if self.dice.random() < 0.05:
                threading.Timer(self.dice.uniform(0, 0.01), child.kill).start()
            try:
                child.communicate(text.encode())
            except BrokenPipeError:
                child.wait()
            self.codes[child.returncode] += 1
            if child.returncode == 0:
                self.counted.update((number, one) for one in recipients(number))
            time.sleep(self.dice.uniform(0, 0.1))


class MoodySink(House):
    """Defers now and then, and now and then closes the connection after the content."""

    def __init__(self, box, dice, **more):
        self.dice = dice
        super().__init__(box, **more)

    def rejection(self, verb, _line):
        with self.lock:
            return "450 4.2.0 not now" if verb == "RCPT" and self.dice.random() < 0.05 else None

    def take(self, session, sender, recipients, content):
        super().take(session, sender, recipients, content)
        if self.dice.random() < 0.01:
            raise ConnectionError("hung up after the content")


@scenario("outgoing-kills", needs=["dnsmasq"])
def outgoing_kills(box):
    """SIGKILL of provider, customer and sendmail at 40 random moments: all 500 messages that sendmail has accepted are sent"""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(1_000_000)))
    print(f"   outgoing-kills: seed {seed} (SEED={seed} repeats the dice)", flush=True)
    dice = random.Random(seed)
    port = free_port()
    sink = MoodySink(box, random.Random(seed + 1), address=SINK, port=port)
    domains = [f"d{number}.example" for number in range(DOMAINS)]
    names = Names(box, mx={name: [(10, "mx.dest.example")] for name in domains}, hosts={"mx.dest.example": SINK})
    certificates = Certificates(box)
    provider = Provider(
        box, certificates=certificates, accounts=RELAYS, ports=(free_port(), free_port(), free_port()),
        more=f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {port}\nretry-first = "1s"\nretry-max = "2s"\n',
    ).start()
    customer = Customer(box, provider.odmr, authority=certificates.authority, more=outgoing_table(box))
    numbers = queue.Queue()
    for number in range(MESSAGES):
        numbers.put(number)
    feeders = [Feeder(box, customer, numbers, random.Random(seed + 10 + number)) for number in range(FEEDERS)]
    stop_pulling = threading.Event()
    puller = Puller(customer, stop_pulling)
    killed = collections.Counter()
    begin = time.monotonic()
    while sum(killed.values()) < KILLS or any(feeder.is_alive() for feeder in feeders):
        time.sleep(dice.uniform(0.02, 0.4))
        check(provider.process.poll() is None, f"the provider ended by itself: {provider.process.returncode}")
        if dice.random() < 0.5:
            provider.restart_by_force()
            killed["provider"] += 1
        else:
            for _ in range(100):  # a call is short
                if puller.process and puller.process.poll() is None:
                    time.sleep(dice.uniform(0, 0.005))
                    puller.process.kill()
                    killed["customer"] += 1
                    break
                time.sleep(0.001)
    under_fire = time.monotonic() - begin
    stop_pulling.set()
    puller.join(60)
    check(not puller.is_alive(), "a pull hangs")
    counted = set().union(*(feeder.counted for feeder in feeders))
    codes = sum((feeder.codes for feeder in feeders), collections.Counter())
    check(set(codes) <= {0, -9}, f"exits of sendmail: {dict(codes)}")

    delayed = len(queued(customer))

    def dust_settled():
        # A message that a broken call has left waits for its next attempt; here it is made due.
        for file in queued(customer):
            try:
                os.utime(file)
            except FileNotFoundError:
                pass
        return customer.pull() == 0 and not queued(customer)

    wait_until(dust_settled, "all mail to leave the customer", seconds=60, pause=0.1)
    out = lambda: [file for part in ("new", "cur") for file in provider.spool.glob(f"outgoing/*/{part}/*")]
    wait_until(lambda: not out(), "all mail to leave the provider", seconds=100, pause=0.1)
    arrived = collections.Counter()
    for message in list(sink.messages):
        number = int(re.search(rb"(?m)^Subject: (\d+)\r$", message.content).group(1))
        check(message.content.endswith(b"\r\nend of %d\r\n" % number), f"{number} came cut: {message.content[-100:]!r}")
        check(set(message.recipients) <= set(recipients(number)), f"{number} for {message.recipients}")
        arrived.update((number, one) for one in message.recipients)
    lost = sorted(counted - set(arrived))
    twice = sum(count - 1 for count in arrived.values())
    rejected = [path for path in provider.spool.glob("*/*/.refused/*/*")]
    facts = (
        f"seed {seed}: {killed['provider']} provider, {killed['customer']} customer, {codes[-9]} sendmail kills in"
        f" {under_fire:.0f} s; {len(counted)} recipients counted, {len(lost)} lost, {twice} duplicates,"
        f" {len(set(arrived) - counted)} of killed sendmails; {delayed} waited at the customer in the end"
    )
    check(not lost, f"{facts}; lost: {lost[:10]}")
    check(not rejected, f"{facts}; rejected: {rejected[:3]}")
    check(len({number for number, _ in counted}) >= 0.9 * MESSAGES, f"hardly any mail: {facts}")
    return facts


@scenario("retry-times", needs=["dnsmasq"])
def retry_times(box):
    """A restart, SIGTERM or SIGKILL does not cause an early attempt at a deferred message; it is sent when it is due"""
    first = 4.0
    port = free_port()
    house = House(box, address=SINK, port=port, rejections={"RCPT": ["450 4.2.0 not now", "452 4.3.1 no room"]})
    names = Names(box, mx={"dest.example": [(10, "mx.dest.example")]}, hosts={"mx.dest.example": SINK})
    more = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {port}\nretry-first = "{first:.0f}s"\nretry-max = "{first:.0f}s"\n'
    provider = Provider(box, require_tls=False, accounts=RELAYS, ports=(free_port(), free_port(), 0), more=more).start()
    customer = Customer(box, provider.odmr, tls="none", more=outgoing_table(box))
    done = sendmail(box, customer, "-f", "adam@example.org", "u@dest.example", text="Subject: slow\n\nx\n")
    check(done.returncode == 0, f"sendmail: {done.stderr}")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    deferrals = lambda: len(events(provider.log(), "delivery", via="mx", status="deferred"))
    wait_until(deferrals, "the first attempt")
    check((result := provider.stop()) == 0, f"serve: exit {result}")
    provider.start()
    time.sleep(1)
    check(len(house.times("RCPT")) == 1, "SIGTERM and start, and it was tried at once")
    provider.restart_by_force()
    wait_until(lambda: len(house.times("RCPT")) >= 2, "the second attempt", seconds=2 * first)
    # The message is not due earlier because of this, nor because of another message for the same host.
    wait_until(lambda: deferrals() == 2, "the second deferral")
    sendmail(box, customer, "-f", "adam@example.org", "v@dest.example", text="Subject: fast\n\nx\n")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wait_until(lambda: len(house.messages) == 1, "the message that came later")
    check(house.messages[0].recipients == ["v@dest.example"], f"{house.messages}")
    wait_until(lambda: len(house.messages) == 2, "the third attempt", seconds=2 * first)
    one, two, fast, three = house.times("RCPT")
    check(fast < three, "the order of attempts")
    for pause in (two - one, three - two):
        check(0.8 * first - 0.1 <= pause <= 1.2 * first + 0.6, f"a pause of {pause:.1f} s instead of {first:.0f}")
    return f"pauses of {two - one:.1f} and {three - two:.1f} s for {first:.0f} s, over a SIGTERM and a SIGKILL"
