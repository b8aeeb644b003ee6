"""Held mail expires without a call, at the promised minute, and a clock that is set makes no mail older.

The programs get their time from libfaketime, by a file with the difference from the machine's time.
"""

import os
import pathlib
import time

from harness import ODMR, Customer, Provider, Smtp, check, events, scenario, wait_until
from world import outgoing_table, queued, sendmail

MINUTE, HOUR, DAY = 60, 3600, 24 * 3600
YEARS = 5 * 365 * DAY
LIBRARY = next(iter(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
ACCOUNT = 'expire-after = "14d"\ndelay-warning = "3d"\n'


class FakeClock:
    """The time of the programs that are started with its environment: the machine's time plus so many seconds."""

    def __init__(self, directory):
        directory.mkdir(mode=0o700, exist_ok=True)
        self.file = directory / "faketime"  # a directory that confined programs may read
        self.tidied = directory / ".odmr/tidy"
        self.begun = time.time()
        self.offset = 0
        self.set(0)
        self.environment = os.environ | {
            "LD_PRELOAD": str(LIBRARY), "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
        }

    def set(self, seconds):
        """From now on, the time is that long after the beginning."""
        self.offset = seconds - (time.time() - self.begun)
        self.file.with_suffix(".new").write_text(f"{self.offset:+.3f}\n")
        os.replace(self.file.with_suffix(".new"), self.file)
        # The times of files are the machine's, so a program that tidies would take each new file for an old one.
        self.tidied.parent.mkdir(mode=0o700, exist_ok=True)
        self.tidied.write_text("\n")
        now = time.time() + self.offset
        os.utime(self.tidied, (now, now))


def rfc3339(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Held:
    """A provider with a fake clock, and the mail that it holds."""

    def __init__(self, box, account=ACCOUNT, name="serve", more=""):
        self.box = box
        self.provider = Provider(box, require_tls=False, accounts={"acme": account}, name=name, more=more)
        self.clock = FakeClock(self.provider.spool)
        self.running = False
        self.start(0)

    def start(self, seconds):
        self.clock.set(seconds)
        self.provider.start(env=self.clock.environment)
        self.running = True

    def receive(self, name="hello", to="alice@example.org"):
        with Smtp(self.provider.inbound) as smtp:
            smtp.hello()
            reply = smtp.send("eva@world.example", [to], f"Subject: {name}\r\n\r\n{name}\r\n".encode())
            check(reply.startswith("250"), reply)

    def stop(self):
        if self.running:
            check(self.provider.stop() == 0, "serve did not stop in good order")
        self.running = False

    def look(self, seconds):
        """`serve` makes a pass at this time, and stops."""
        self.start_with_pass(seconds)
        self.stop()

    def start_with_pass(self, seconds):
        """Starts at this time, and waits for the first pass. The last domain has a message that is due: it is set aside,
        which shows the end of the pass."""
        self.stop()
        self.clock.set(seconds)
        arrived = int(self.clock.begun + seconds - 20 * DAY)
        last = self.box.write(
            f"{self.provider.spool.name}/domains/example.com/new/{arrived}.last.host",
            "Return-Path: <>\nDelivered-To: last@example.com\n"
            f"X-ODMR-Envelope: id=last; arrived={rfc3339(arrived)}\nReceived: by x\nSubject: x\n\nx\n",
        )
        self.start(seconds)
        wait_until(lambda: not last.exists(), "the end of the pass")

    def expire(self, seconds):
        self.clock.set(seconds)
        done = self.box.run(ODMR, "expire", "-c", self.provider.config, env=self.clock.environment)
        check(done.stdout == "", f"odmr expire prints {done.stdout}")
        with open(self.box.path / "expire.log", "a") as log:
            log.write(done.stderr)
        return done.returncode

    def logged(self, name, **wanted):
        return events(self.provider.log() + self.box.log("expire.log"), name, **wanted)

    def state(self):
        """The number of held messages, of expired recipients, and of stored DSNs."""
        held = [file for part in ("new", "cur") for file in self.provider.spool.glob(f"domains/example.org/{part}/*")]
        expired = self.logged("delivery", status="expired", to="<alice@example.org>")
        return len(held), len(expired), len(self.logged("dsn-sent"))


def submit(provider):
    with Smtp(provider.odmr) as smtp:
        smtp.hello()
        smtp.log_in("acme")
        reply = smtp.send("adam@example.org", ["eva@world.example"], b"Subject: up\r\n\r\nup\r\n")
        check(reply.startswith("250"), reply)


def expect(found, wanted, when):
    check(found == wanted, f"{when}: {found}, wanted {wanted}")


# A DSN about held mail would itself expire in the relay, which reaches no host here.
LONG = '[relay]\nresolver = "127.0.0.1:1"\ngive-up = "60d"\ndelay-warning = "59d"\n'


@scenario("expiry", needs=("faketime",), waits=True)
def expiry(box):
    """A customer never calls: serve sends the warning and lets its mail expire at the promised minute, also after downtime"""
    held = Held(box, more=LONG)
    held.receive()
    for seconds, wanted in [
        (3 * DAY - MINUTE, (1, 0, 0)),
        (3 * DAY + MINUTE, (1, 0, 1)),
        (13 * DAY, (1, 0, 1)),
        (14 * DAY - MINUTE, (1, 0, 1)),
    ]:
        held.look(seconds)
        expect(held.state(), wanted, f"after {seconds} s")
    # A running serve acts when the time has come.
    held.start(14 * DAY - 30)
    begun = time.monotonic()
    wait_until(lambda: held.state() == (0, 1, 2), "expiry by a running serve", 100)
    took = time.monotonic() - begun
    check(took > 29, f"it has expired {30 - took:.0f} s too soon")
    held.stop()
    # The provider was off for 20 days, and for 10.
    for days, wanted in [(20, (0, 1, 1)), (10, (1, 0, 1))]:
        off = Held(box, name=f"off{days}", more=LONG)
        off.receive()
        off.look(days * DAY)
        expect(off.state(), wanted, f"off for {days} days")
    return f"serve took {took - 30:.0f} s after the time"


@scenario("expire-by-cron", needs=("faketime",), waits=True)
def expire_by_cron(box):
    """odmr expire once a week, with inetd mode: mail expires as with serve; the exit code is 75 while a session has the mail"""
    held = Held(box, more=LONG)
    held.receive()
    held.stop()
    for seconds, wanted in [
        (3 * DAY - MINUTE, (1, 0, 0)),
        (7 * DAY, (1, 0, 1)),
        (14 * DAY - MINUTE, (1, 0, 1)),
        (14 * DAY + MINUTE, (0, 1, 2)),
    ]:
        expect(held.expire(seconds), 0, f"the exit code after {seconds} s")
        expect(held.state(), wanted, f"after {seconds} s")
    # A session has the mail of the account.
    held.start_with_pass(14 * DAY)
    # Another agent has stored it, so serve finds it at the next hourly listing.
    put(held.provider, 1, int(held.clock.begun - DAY))
    with Smtp(held.provider.odmr) as smtp:
        smtp.turn("acme")
        expect(held.expire(14 * DAY + MINUTE), 75, "the exit code beside a session")
        expect(held.state(), (1, 1, 2), "beside a session")
    held.stop()
    expect((held.expire(14 * DAY + MINUTE), held.state()), (0, (0, 2, 3)), "after the session")


@scenario("clock-set", needs=("faketime",), waits=True)
def clock_set(box):
    """The clock is set by five years, forward and back, while the programs run or are stopped: no message bounces, held or outgoing"""
    # The names cannot be resolved now, so that outgoing mail is tried again and again.
    relay = '[relay]\nresolver = "127.0.0.1:1"\nretry-first = "1s"\nretry-max = "1s"\ndelay-warning = "4d"\n'
    held = Held(box, account='expire-after = "14d"\n', more=relay)
    full = Provider(box, require_tls=False, name="full", accounts={"acme": "rate = 1\n"}).start()
    submit(full)
    customer = Customer(box, full.odmr, tls="none", more=outgoing_table(box, more='delay-warning = "4d"\n'))
    clock = FakeClock(customer.root)

    def call(seconds):
        """The provider defers the message."""
        clock.set(seconds)
        for file in queued(customer):
            os.utime(file, (0, 0))  # it is due
        box.start(customer.log_name, ODMR, "pull", "-c", customer.config, env=clock.environment).wait(60)

    def attempts(log):
        return len(events(log, "delivery", status="deferred"))

    held.receive("first")
    submit(held.provider)
    done = sendmail(box, customer, "-f", "adam@example.org", "eva@world.example", text="Subject: up\n\nup\n")
    check(done.returncode == 0, f"odmr send: {done.stderr}")
    for number, seconds in enumerate([MINUTE, 2 * MINUTE + YEARS, 3 * MINUTE, 4 * MINUTE - YEARS, 5 * MINUTE, DAY]):
        call(seconds)
        expect((len(queued(customer)), attempts(customer.log())), (1, number + 1), f"at the customer, {seconds} s")
        held.look(seconds)
        expect(held.state(), (1, 0, 0), f"stopped, {seconds} s")
    # The same with a running serve; mail arrives while the clock is wrong.
    held.start(DAY)
    for number, seconds in enumerate((DAY + YEARS, DAY + MINUTE + YEARS // 2, DAY + MINUTE)):
        before = len(held.logged("clock-set"))
        # While a client sends a message, left-over files are removed, by the new clock.
        slow = Smtp(held.provider.inbound, seconds=100)
        slow.hello()
        slow.want("250", "MAIL FROM:<eva@world.example>")
        slow.want("250", "RCPT TO:<alice@example.org>")
        slow.want("354", "DATA")
        left = box.write(f"{held.provider.spool.name}/domains/example.org/tmp/left{number}", "")
        os.utime(left, (held.clock.begun - 100 * DAY,) * 2)
        held.clock.set(seconds)
        held.clock.tidied.unlink()
        wait_until(lambda: len(held.logged("clock-set")) > before, "serve sees the clock", 100)
        wait_until(lambda: not left.exists(), "the end of tidying", 100)
        slow.want("250", f"Subject: later{number}\r\n\r\nlater{number}\r\n.")
        slow.close()
        expect(held.state(), (number + 2, 0, 0), f"running, {seconds} s")
    held.stop()
    tried = attempts(held.provider.log())
    check(tried >= 6, f"only {tried} attempts of the relay")
    # All of it expires in its time.
    held.look(3 * DAY)
    expect(held.state(), (4, 0, 0), "after 3 days")
    call(6 * DAY)
    wait_until(lambda: events(customer.log(), "delivery", status="expired"), "expiry at the customer")
    # The relay may take a DSN that is being written for a left-over file, because of its time.
    for hours in range(3):
        held.look(20 * DAY + hours * HOUR)
        if held.state()[1] == 4:
            break
    expect(held.state()[1], 4, "after 20 days")
    return f"{tried} attempts of the relay"


def put(provider, number, arrived, domain="example.org"):
    """A message with this time of arrival, stored as by the provider."""
    return provider.box.write(
        f"{provider.spool.name}/domains/{domain}/new/{arrived}.M{number}.host",
        f"Return-Path: <eva@world.example>\nDelivered-To: alice@{domain}\n"
        f"X-ODMR-Envelope: id=id{number}; arrived={rfc3339(arrived)}\nReceived: by x\nSubject: x\n\nx\n",
    )


@scenario("expiry-yields")
def expiry_yields(box):
    """While thousands of messages expire, a customer that calls gets its mail at once; DSNs beyond the limit wait"""
    provider = Provider(box, require_tls=False)
    now = int(time.time())
    for number in range(8000):
        put(provider, number, now - 20 * DAY)
    put(provider, 8000, now)
    box.start("expire.log", ODMR, "expire", "-c", provider.config)
    provider.start()
    slowest, calls = 0, 0
    while len(provider.held()) > 1000:
        calls += 1
        with Smtp(provider.odmr) as smtp:
            smtp.hello()
            smtp.log_in("acme")
            begun = time.monotonic()
            reply = smtp.say("ATRN")
            slowest = max(slowest, time.monotonic() - begun)
            check(reply.startswith("250"), f"call {calls}: {reply}, {len(provider.held())} held")
        wait_until(lambda: len(events(provider.log(), "turn-ended")) == calls, "the end of the call")
        time.sleep(0.1)  # the passes go on
        if calls % 10 == 0:
            done = box.run(ODMR, "expire", "-c", provider.config, seconds=200)  # thousands of DSNs, on a busy disk
            check(done.returncode in (0, 75), done.stderr)
    check(slowest < 1, f"ATRN was answered after {slowest:.1f} s")
    provider.stop()
    left = len(provider.held())
    dsns = len(list(provider.spool.glob("outgoing/@all/new/*")))
    check(left + dsns >= 8001, f"{left} messages, {dsns} DSNs")
    return f"{calls} calls, ATRN answered after {slowest * 1000:.0f} ms at most; {left} left, {dsns} DSNs"


@scenario("expiry-kills", needs=("strace",))
def expiry_kills(box):
    """odmr expire is killed at each of its system calls that change a file: the sender gets the DSN once or twice, and no message is lost"""
    provider = Provider(box, require_tls=False)
    moments = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,write,mkdir,fchmod,utimensat"
    twice, kills, moment = 0, 0, 0
    while True:
        moment += 1
        for file in [*provider.spool.glob("domains/*/*/*"), *provider.spool.glob("outgoing/*/*/*")]:
            if file.is_file():
                file.unlink()
        arrived = int(time.time()) - 20 * DAY
        put(provider, 0, arrived)
        kill = f"inject={moments}:signal=SIGKILL:when={moment}"
        done = box.run("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={moments}", "-e", kill, ODMR, "expire", "-c", provider.config)
        again = box.run(ODMR, "expire", "-c", provider.config)
        check(again.returncode == 0, f"moment {moment}: {again.stderr}")
        dsns = len(list(provider.spool.glob("outgoing/@all/new/*")))
        check(not provider.held() and dsns in (1, 2), f"moment {moment}: {len(provider.held())} held, {dsns} DSNs")
        twice += dsns == 2
        if done.returncode == 0:
            return f"{kills} kills, {twice} times two DSNs"
        kills += 1
