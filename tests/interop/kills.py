"""SIGKILL at random moments, of both parties, while mail is sent and fetched: no message is lost after its 250.

A killed process is not a power cut: this tests the order of steps, not the fsyncs.
"""

import collections
import os
import random
import re
import threading
import time

from handover import MoodyHop, due, left_over
from harness import Certificates, Customer, Failed, Provider, Smtp, at_rest, check, context, free_port, scenario, wait_until

KILLS = 50
SENDERS = 3
MOODY = "moody@example.org"  # at a next hop that defers this recipient now and then, so that the others are settled early


class Sender(threading.Thread):
    """Sends numbered messages without a pause; a message counts after its 250. Ignores broken connections."""

    def __init__(self, number, port, tls, dice, stop):
        super().__init__(daemon=True)
        self.number, self.port, self.tls, self.dice, self.stop = number, port, tls, dice, stop
        self.counted, self.tried, self.rejected = set(), 0, collections.Counter()
        self.start()

    def run(self):
        while not self.stop.is_set():
            try:
                with Smtp(self.port, seconds=10) as line:
                    line.hello()
                    if self.tls:
                        line.start_tls(self.tls)
                    while not self.stop.is_set():
                        self.one(line)
            except (OSError, Failed):
                time.sleep(0.02)

    def one(self, line):
        name = f"{self.number}-{self.tried}"
        self.tried += 1
        size = self.dice.choice((10, 100, 1000, 3000, 10_000, 300_000))
        content = f"Subject: {name}\r\n\r\n".encode() + b"z" * 70 * 1 + b"\r\n"
        content += (b".%s\r\n" % (b"z" * 70)) * (size // 73) + b"end of %s\r\n" % name.encode()
        recipients = [self.dice.choice(("eva@example.org", "adam@example.com"))]
        if self.dice.random() < 0.4:
            several = (["eva@example.org", "adam@example.com"], ["eva@example.org", "bert@example.org", MOODY])
            recipients = self.dice.choice(several)
        reply = line.send("a@sender.example", recipients, content)
        if reply.startswith("250"):
            self.counted.update((name, recipient) for recipient in recipients)
        else:
            self.rejected[reply[:9]] += 1
        time.sleep(self.dice.uniform(0, 0.03))


class Puller(threading.Thread):
    """Calls again and again; another thread may kill the process."""

    def __init__(self, customer, stop):
        super().__init__(daemon=True)
        self.customer, self.stop = customer, stop
        self.process, self.codes = None, collections.Counter()
        self.start()

    def run(self):
        while not self.stop.is_set():
            self.process = self.customer.start()
            self.codes[self.process.wait()] += 1
            self.customer.box.children.remove(self.process)
            time.sleep(0.01)


@scenario("kills")
def kills(box):
    """SIGKILL of provider and customer at 50 random moments, with some recipients settled early: no message is lost after its 250"""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(1_000_000)))
    print(f"   kills: seed {seed} (SEED={seed} repeats the dice)", flush=True)
    dice = random.Random(seed)
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates, ports=(free_port(), free_port(), free_port())).start()
    hop = MoodyHop(random.Random(seed + SENDERS), at_rcpt=0.5, after=0).start(box)
    more = f'[mailboxes.deliver]\n"{MOODY}" = "{hop.address}"\n'
    customer = Customer(box, provider.odmr, authority=certificates.authority, more=more)
    stop_sending, stop_pulling = threading.Event(), threading.Event()
    trusting = context(certificates.authority)
    senders = [
        Sender(number, provider.inbound, trusting if number == 0 else None, random.Random(seed + number), stop_sending)
        for number in range(SENDERS)
    ]
    puller = Puller(customer, stop_pulling)
    killed = collections.Counter()
    begin = time.monotonic()
    while sum(killed.values()) < KILLS:
        time.sleep(dice.uniform(0.02, 0.8))
        check(provider.process.poll() is None, f"the provider ended by itself: {provider.process.returncode}")
        if dice.random() < 0.5:
            provider.restart_by_force()
            killed["provider"] += 1
        elif puller.process and puller.process.poll() is None:
            puller.process.kill()
            killed["customer"] += 1
    under_fire = time.monotonic() - begin
    stop_sending.set()
    for sender in senders:
        sender.join(60)
        check(not sender.is_alive(), "a sender hangs")
    stop_pulling.set()
    puller.join(60)
    check(not puller.is_alive(), "a pull hangs")

    hop.moody = False

    def dust_settled():
        due(customer)
        return customer.pull() == 0 and not provider.held() and not left_over(customer)

    wait_until(dust_settled, "all held mail to be fetched", seconds=80, pause=0.1)
    counted = set().union(*(sender.counted for sender in senders))
    arrived = collections.Counter()
    came = [(f"{path.parent.parent.name}@{path.parent.parent.parent.name}", path.read_bytes()) for path in customer.files()]
    came += [(recipient, at_rest(content)) for _, recipient, content in hop.messages]
    for recipient, file in came:
        name = re.search(rb"(?m)^Subject: (\S+)$", file).group(1).decode()
        check(file.endswith(b"end of %s\n" % name.encode()), f"{name} came cut: {file[-100:]!r}")
        arrived[name, recipient] += 1
    lost = sorted(counted - set(arrived))
    twice = sum(count - 1 for count in arrived.values())
    more = len(set(arrived) - counted)
    codes = " ".join(f"{code}:{count}" for code, count in sorted(puller.codes.items()))
    facts = (
        f"seed {seed}: {killed['provider']} provider and {killed['customer']} customer kills in {under_fire:.0f} s;"
        f" {len(counted)} counted, {len(lost)} lost, {twice} duplicates, {more} arrived without a seen 250; pull exits {codes}"
    )
    check(not lost, f"{facts}; lost: {lost[:10]}")
    check(len(counted) >= 10 * KILLS, f"hardly any mail flowed: {facts}")
    return facts
