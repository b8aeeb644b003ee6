"""Held mail expires without a call, at the promised minute, and no clock that is set makes any mail older.

The programs get their time from libfaketime, by a file that says how far it is from the machine's.
"""

import os
import pathlib
import re
import time

from harness import ODMR, Customer, Provider, Smtp, check, events, scenario, wait_until
from world import outgoing_table, queued, sendmail

MINUTE, HOUR, DAY = 60, 3600, 24 * 3600
YEARS = 5 * 365 * DAY
LIBRARY = next(iter(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
ACCOUNT = 'expire-after = "14d"\ndelay-warning = "3d"\n'


class FakeClock:
    """The time of the programs that are started with its environment: the machine's, and so many seconds more."""

    def __init__(self, directory):
        directory.mkdir(mode=0o700, exist_ok=True)
        self.file = directory / "faketime"  # where the programs may read after they have been confined
        self.begun = time.time()
        self.offset = 0
        self.set(0)
        self.environment = os.environ | {
            "LD_PRELOAD": str(LIBRARY), "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
        }

    def set(self, seconds):
        """It is so long after the begin, from now on."""
        self.offset = seconds - (time.time() - self.begun)
        self.file.with_suffix(".new").write_text(f"{self.offset:+.3f}\n")
        os.replace(self.file.with_suffix(".new"), self.file)


def seen(root):
    """The text of the record of the clock."""
    file = root / ".odmr/clock"
    return file.read_text() if file.exists() else ""


class Held:
    """A provider by a fake clock, and what it holds."""

    def __init__(self, box, account=ACCOUNT, name="serve", more=""):
        self.box = box
        self.provider = Provider(box, require_tls=False, accounts={"acme": account}, name=name, more=more)
        self.clock = FakeClock(self.provider.spool)
        self.provider.start(env=self.clock.environment)
        self.running = True

    def receive(self, name="hello", to="alice@example.org"):
        with Smtp(self.provider.inbound) as smtp:
            smtp.hello()
            reply = smtp.send("eva@world.example", [to], f"Subject: {name}\r\n\r\n{name}\r\n".encode())
            check(reply.startswith("250"), reply)

    def submit(self):
        with Smtp(self.provider.odmr) as smtp:
            smtp.hello()
            smtp.log_in("acme")
            reply = smtp.send("adam@example.org", ["eva@world.example"], b"Subject: up\r\n\r\nup\r\n")
            check(reply.startswith("250"), reply)

    def stop(self):
        if self.running:
            check(self.provider.stop() == 0, "serve did not stop in good order")
        self.running = False

    def look(self, seconds):
        """`serve` runs for a moment at this time, which is enough for a pass."""
        self.stop()
        self.clock.set(seconds)
        before = seen(self.provider.spool)
        self.provider.start(env=self.clock.environment)
        wait_until(lambda: seen(self.provider.spool) != before, "a look at the clock")
        self.running = True
        self.stop()

    def expire(self, seconds):
        self.clock.set(seconds)
        done = self.box.run(ODMR, "expire", "-c", self.provider.config, env=self.clock.environment)
        check(done.stdout == "", f"odmr expire prints {done.stdout}")
        with open(self.box.path / "expire.log", "a") as log:
            log.write(done.stderr)
        return done.returncode

    def dsns(self):
        """The actions of the DSNs to the sender, in order."""
        files = sorted(self.provider.spool.glob("outgoing/@all/new/*"), key=lambda file: file.stat().st_mtime)
        texts = [file.read_text(errors="replace") for file in files]
        return [re.search("(?m)^Action: (.*)$", text).group(1) for text in texts if text.startswith("Return-Path: <>")]

    def state(self):
        """How many messages are held, and the actions of the DSNs."""
        return len(self.provider.held()), self.dsns()


def expect(found, wanted, when):
    check(found == wanted, f"{when}: {found}, wanted {wanted}")


@scenario("expiry", needs=("faketime",))
def expiry(box):
    """A customer never calls: the warning and the expiry come at their minute, by serve, also after downtime"""
    held = Held(box)
    held.receive()
    for seconds, wanted in [
        (3 * DAY - MINUTE, (1, [])),
        (3 * DAY + MINUTE, (1, ["delayed"])),
        (13 * DAY, (1, ["delayed"])),
        (14 * DAY - MINUTE, (1, ["delayed"])),
    ]:
        held.look(seconds)
        expect(held.state(), wanted, f"after {seconds} s")
    # A running serve sees that its time has come.
    held.clock.set(14 * DAY - 30)
    held.provider.start(env=held.clock.environment)
    held.running = True
    begun = time.monotonic()
    wait_until(lambda: held.state()[0] == 0, "expiry by a running serve", 100)
    took = time.monotonic() - begun
    check(took > 30, f"it has expired {30 - took:.0f} s too soon")
    expect(sorted(held.dsns()), ["delayed", "failed"], "at the end")
    wait_until(lambda: events(held.provider.log(), "delivery", status="expired", dsn="5.4.7"), "the line of the log")
    held.stop()
    # The provider was off for 20 days, and for 10.
    for days, wanted in [(20, 0), (10, 1)]:
        off = Held(box, name=f"off{days}")
        off.receive()
        off.look(days * DAY)
        expect(len(off.provider.held()), wanted, f"off for {days} days")
    return f"serve took {took - 30:.0f} s after the minute"


@scenario("expire-by-cron", needs=("faketime",))
def expire_by_cron(box):
    """odmr expire once a week, beside inetd mode: the same, and 75 while a session has the mail"""
    held = Held(box)
    held.receive()
    held.stop()
    for seconds, code, wanted in [
        (3 * DAY - MINUTE, 0, (1, [])),
        (7 * DAY, 0, (1, ["delayed"])),
        (14 * DAY - MINUTE, 0, (1, ["delayed"])),
        (14 * DAY + MINUTE, 0, (0, ["delayed", "failed"])),
    ]:
        expect(held.expire(seconds), code, f"the exit code after {seconds} s")
        found = held.state()
        expect((found[0], sorted(found[1])), wanted, f"after {seconds} s")
    log = box.log("expire.log")
    check(len(events(log, "delivery", status="expired")) == 1 and len(events(log, "dsn-sent")) == 2, log)
    # A session has the mail of the account.
    held.clock.set(14 * DAY)
    held.provider.start(env=held.clock.environment)
    held.running = True
    held.receive("second")
    with Smtp(held.provider.odmr) as smtp:
        smtp.turn("acme")
        expect(held.expire(29 * DAY), 75, "the exit code beside a session")
        expect(len(held.provider.held()), 1, "beside a session")
    held.stop()
    held.clock.set(29 * DAY)
    expect((held.expire(29 * DAY), len(held.provider.held())), (0, 0), "after the session")


@scenario("clock-set", needs=("faketime",))
def clock_set(box):
    """The clock is set by five years, forward and back: nothing bounces, held or outgoing, running or stopped"""
    # Its names cannot be resolved now, so that outgoing mail is tried again and again.
    relay = '[relay]\nresolver = "127.0.0.1:1"\nretry-first = "1s"\nretry-max = "1s"\n'
    held = Held(box, account='expire-after = "14d"\nrelay = true\n', more=relay)
    full = Provider(box, require_tls=False, name="full", more='[limits]\nmin-free = "1000TiB"\n').start()
    customer = Customer(box, full.odmr, tls="none", more=outgoing_table(box))
    root_clock = FakeClock(customer.root)

    def call(seconds):
        root_clock.set(seconds)
        process = box.start(customer.log_name, ODMR, "pull", "-c", customer.config, env=root_clock.environment)
        process.wait(60)

    held.receive("first")
    held.submit()
    done = sendmail(box, customer, "-f", "adam@example.org", "eva@world.example", text="Subject: up\n\nup\n")
    check(done.returncode == 0, f"odmr send: {done.stderr}")
    held.look(MINUTE)
    call(MINUTE)
    for seconds in (2 * MINUTE + YEARS, 3 * MINUTE, 4 * MINUTE - YEARS, 5 * MINUTE, DAY):
        held.look(seconds)
        call(seconds)
        expect(held.state(), (1, []), f"stopped, {seconds} s")
        expect(len(queued(customer)), 1, f"at the customer, {seconds} s")
    # The same under a running serve; mail comes while the clock is wrong.
    held.clock.set(DAY)
    held.provider.start(env=held.clock.environment)
    held.running = True
    for number, seconds in enumerate((DAY + YEARS, DAY + MINUTE)):
        before = len(events(held.provider.log(), "clock-set"))
        held.clock.set(seconds)
        wait_until(lambda: len(events(held.provider.log(), "clock-set")) > before, "serve sees the clock", 70)
        held.receive(f"later{number}")
    expect(held.state(), (3, []), "running")
    held.stop()
    # All of it expires two weeks later.
    held.look(DAY + HOUR)
    held.look(15 * DAY + 2 * HOUR)
    expect(held.state(), (0, ["failed"] * 3), "two weeks later")
    check(not events(customer.log(), "delivery", status="expired"), "outgoing mail of the customer has expired")
    # Five days after its arrival outgoing mail has expired.
    call(6 * DAY + HOUR)
    wait_until(lambda: events(customer.log(), "delivery", status="expired"), "expiry at the customer")
    return f"{len(events(customer.log(), 'delivery'))} attempts of the customer"


@scenario("expiry-kills", needs=("strace",))
def expiry_kills(box):
    """odmr expire is killed at each of its calls that change a file: the DSN at most twice, the message never lost"""
    provider = Provider(box, require_tls=False)
    moments = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,write,mkdir,fchmod,utimensat"
    twice, kills, moment = 0, 0, 0
    while True:
        moment += 1
        for file in [*provider.spool.glob("domains/*/*/*"), *provider.spool.glob("outgoing/*/*/*")]:
            if file.is_file():
                file.unlink()
        arrived = int(time.time()) - 20 * DAY
        box.write(f"{provider.spool.name}/domains/example.org/new/{arrived}.x.host",
                  "Return-Path: <eva@world.example>\nDelivered-To: alice@example.org\nReceived: by x\nSubject: x\n\nx\n")
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
