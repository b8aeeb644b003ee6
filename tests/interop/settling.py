"""The settlement of a message with several recipients, of which one is accepted, one deferred and one rejected, in each queue:
interrupted by SIGKILL, and with a failing disk, at each of its system calls.

What must hold: no message is lost or left, and the sender gets a DSN about the rejection. A killed program may send messages
again that it had not settled; a program whose disk fails continues with the next message, and sends again only messages that it
could not settle.
"""

import collections
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import threading
import time

from handover import due, left_over, receive
from harness import ODMR, Customer, Failed, Provider, Smtp, check, events, free_port, lets_in, scenario, wait_until
from hop import Hop, Session
from moments import ERRORS, Tracer, calls, changes, injected, moments, strace
from turning import SENDER
from world import RELAYS, House, Names, outgoing_table, queued, sendmail

OURS = "adam@example.org"
CALLS_AT_MOST = 8  # a message that ended sessions may be skipped in some calls


def numbered(name):
    return f"Subject: {name}\r\n\r\n{name}\r\n".encode()


def name_in(octets):
    found = re.search(rb"(?m)^Subject: (\w+-\d+-\w+)\r?$", octets)
    return found and found.group(1).decode()


class Choosy(Hop):
    """A mail server that rejects `no@…`, and while it is `moody` defers `later@…` (after the content if so configured)."""

    def __init__(self, path=None, *, lmtp=True, after=False):
        super().__init__(path, lmtp=lmtp)
        self.moody, self.after = True, after
        self.greedy = True  # if `after`: accepts `first@…` only
        self.at = {}  # called at a "recipient", at the beginning of a "content", and when that is "taken"

    def meet(self, event):
        self.at.get(event, lambda: None)()

    def content_begins(self, session):
        self.meet("content")

    def take(self, sender, recipients, content):
        super().take(sender, recipients, content)
        self.meet("taken")

    def next(self, replies, recipient):
        if replies is self.at_recipient:
            self.meet("recipient")
        local = recipient.split("@")[0]
        if replies is not (self.after_content if self.after else self.at_recipient):
            return None
        if self.after and self.greedy and local != "first":
            return "452 4.2.2 not now"
        if self.moody and local == "later":
            return "450 4.2.0 not now"
        return "550 5.1.1 never" if local == "no" else None

    def counts(self):
        with self.lock:
            return collections.Counter((name_in(content), recipient.split("@")[0]) for _, recipient, content in self.messages)


class ProvidesSession(Session):
    """A provider that holds no mail and accepts mail."""

    def until(self, mark):
        while (line := super().until(mark)) is not None and mark == b"\r\n":
            verb = line[:4].upper()
            if verb == b"AUTH":
                lets_in(self, verb)
            elif verb == b"ATRN":
                self.say("453 4.3.2 you have no mail")
            else:
                return line
        return line


class Provides(Choosy):
    speaks = ProvidesSession

    def __init__(self):
        super().__init__(lmtp=False)
        self.keywords += ("AUTH CRAM-MD5", "ATRN")


def is_dying(process):
    """Whether it has a SIGKILL, and is not reaped."""
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    pending = re.findall(r"(?m)^(?:SigPnd|ShdPnd):\s*(\w+)", status)
    return bool(re.search(r"(?m)^State:\s*[ZX]", status)) or any(int(one, 16) >> signal.SIGKILL - 1 & 1 for one in pending)


def turned_call(provider, hop, turned=lambda: None):
    """One call of a customer that the scenario plays, until it ends. `turned` is called after the 250 to ATRN."""
    before = len(provider.log())
    with Smtp(provider.odmr) as line:
        line.hello()
        line.log_in("acme")
        reply = line.say("ATRN")
        if not reply.startswith("250"):
            return check(reply.startswith("453"), reply)
        turned()
        session = Session(line.socket, hop)
        session.received = line.received
        session.serve()
    ended = lambda: provider.process.poll() is not None or events(provider.log()[before:], "turn-ended")
    wait_until(ended, "the end of the turn")


class Place:
    """A place where mail waits. `directories`: those to watch, of which `queues` are only ours; `messages`: those that
    `prepare` puts there,
    by the ends of their names."""

    doubles = 2  # after SIGKILL: one that was not settled yet, and the one whose content was under way
    messages = ("one", "two")
    reported = ("one", "two")  # those whose sender can get a DSN

    def alive(self):
        return True

    def ended(self):
        """Waits until a provider that was killed has ended."""
        process = self.provider.process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        wait_until(lambda: process.poll() is not None or not is_dying(process), "the end of the killed provider")

    def wait_for_end(self, process):
        code = process.wait(30)
        self.box.children.remove(process)
        return code

    def traced_call(self, inject):
        """`pull` under strace."""
        due(self.customer)
        for file in queued(self.customer):
            os.utime(file)
        words = strace(self.output, inject)
        code = self.wait_for_end(self.box.start(self.customer.log_name, *words, ODMR, "pull", "-c", self.customer.config))
        # Each thread has an n-th call: that of the main thread may be in the summary, after all mail is settled.
        silent = code == 74 and "standard output: " in self.customer.log()
        check(code in (0, 75) or silent or code == -signal.SIGKILL and "SIGKILL" in inject, f"{inject}: pull: exit {code}")
        return code < 0 or "(INJECTED)" in self.output.read_text()

    def again(self):
        """One more attempt, without any fault. Returns whether no mail waits."""
        due(self.customer)
        for file in queued(self.customer):
            os.utime(file)
        check((code := self.customer.pull()) in (0, 75), f"pull: exit {code}")
        return not self.waiting()

    def recover(self):
        self.hop.moody = False
        for _ in range(CALLS_AT_MOST):
            if self.again():
                return
        raise Failed(f"still there after {CALLS_AT_MOST} calls: {self.waiting()}")


class Turned(Place):
    """Held mail, from us, from another agent, and without a sender, for a customer that the scenario plays."""

    title, about = "turn", "held mail, ours, another agent's and without a sender"
    doubles = 4  # the session continues while so many messages are being settled
    messages = ("ours", "other", "null", "last")
    reported = ("ours", "other")

    def __init__(self, box):
        self.box, self.output = box, box.path / "strace.output"
        self.provider = Provider(box, require_tls=False).start()
        self.hop = Choosy(lmtp=False)
        self.directories = self.queues = [self.provider.spool]
        self.held = self.provider.spool / "domains/example.org"

    def prepare(self, name):
        self.hop.moody = True
        three = ["yes@example.org", "later@example.org", "no@example.org"]
        receive(self.provider, [(three, numbered(f"{name}-ours"))])
        text = f"Return-Path: <{SENDER}>\n" + "".join(f"Delivered-To: {one}\n" for one in three)
        now = time.time_ns() // 1000
        draft = self.held / f"tmp/{now // 1_000_000}.M{now % 1_000_000:06}P1.other"
        draft.write_text(text + numbered(f"{name}-other").decode().replace("\r", ""))
        draft.rename(self.held / "new" / draft.name)
        with Smtp(self.provider.inbound) as line:
            line.hello()
            for sender, end in (("", "null"), (SENDER, "last")):
                recipients = three if end == "null" else three[:1]
                check((reply := line.send(sender, recipients, numbered(f"{name}-{end}"))).startswith("250"), reply)

    def act(self, inject):
        with contextlib.ExitStack() as stack:
            attach = lambda: stack.enter_context(Tracer(self.box, self.provider.process.pid, inject, follow=False))
            try:
                turned_call(self.provider, self.hop, attach)
            except (OSError, Failed):  # the provider was killed, or did not continue: the messages that arrived show it
                pass
            if "SIGKILL" in (inject or ""):
                self.ended()
        return not self.alive() or "(INJECTED)" in self.output.read_text()

    def alive(self):
        return self.provider.process.poll() is None

    def again(self):
        if not self.alive():
            self.box.children.remove(self.provider.process)
            self.provider.start()
        turned_call(self.provider, self.hop)
        return not self.waiting()

    def waiting(self):
        return self.provider.held()

    def reports(self):
        """The files of DSNs."""
        return contents(lambda: self.provider.spool.glob("outgoing/*/[nc]*/*"))

    def kept(self):
        """Rejected mail whose sender cannot get a DSN."""
        return contents(lambda: self.provider.spool.glob("domains/*/.refused/[nc]*/*"))


def contents(listed):
    """The contents of the files of a list. The list is read again if a file is renamed or removed during this."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return [file.read_bytes() for file in listed()]


class HandedOver(Place):
    """The customer's mail for a next hop, over LMTP."""

    title, about = "hand-over", "what waits for a next hop"

    def __init__(self, box):
        self.box, self.output = box, box.path / "strace.output"
        self.provider = Provider(box, require_tls=False, accounts=RELAYS, name="away").start()
        self.hop = Choosy(box.path / "hop.sock", after=True).start(box)
        more = f'deliver = "{self.hop.address}"\n' + outgoing_table(box, "hand")
        self.customer = Customer(box, self.provider.odmr, tls="none", file="hand", more=more)
        self.directories = self.queues = [self.customer.root, box.path / "hand-queue"]

    def prepare(self, name):
        self.hop.moody = self.hop.greedy = True
        four = [f"{one}@example.org" for one in ("first", "yes", "later", "no")]
        receive(self.provider, [(four, numbered(f"{name}-{end}")) for end in self.messages])
        check((code := self.customer.pull()) == 0, f"pull: exit {code}")
        check(len(left_over(self.customer)) == len(self.messages), f"wait: {left_over(self.customer)}")
        self.hop.greedy = False

    act = Place.traced_call

    def waiting(self):
        return self.provider.held() + left_over(self.customer)

    def reports(self):
        return contents(lambda: queued(self.customer) + list(self.provider.spool.glob("outgoing/*/[nc]*/*")))


class Submitted(Place):
    """The customer's outgoing mail, for a provider that the scenario plays."""

    title, about = "submission", "the customer's outgoing mail"

    def __init__(self, box):
        self.box, self.output = box, box.path / "strace.output"
        self.hop = Provides().start(box)
        self.customer = Customer(box, self.hop.port, tls="none", file="out", more=outgoing_table(box, "out"))
        self.queues = [box.path / "out-queue"]
        self.directories = [self.customer.root, *self.queues]

    def prepare(self, name):
        self.hop.moody = True
        for end in self.messages:
            three = [f"{one}@dest.example" for one in ("yes", "later", "no")]
            done = sendmail(self.box, self.customer, "-f", OURS, *three, text=f"Subject: {name}-{end}\n\n{name}\n")
            check(done.returncode == 0, f"sendmail: {done.stderr}")

    act = Place.traced_call

    def waiting(self):
        return queued(self.customer)

    def reports(self):
        return contents(self.customer.files)


class ChoosyHouse(House):
    """A remote host that replies as Choosy, and waits at MAIL until the test permits it to continue."""

    def __init__(self, box, **more):
        self.moody, self.told, self.at = True, threading.Event(), {}
        super().__init__(box, **more)

    meet = Choosy.meet

    def take(self, session, sender, recipients, content):
        super().take(session, sender, recipients, content)
        self.meet("taken")

    def rejection(self, verb, line):
        if verb == "MAIL":
            self.told.wait(20)
        self.meet({"RCPT": "recipient", "DATA": "content"}.get(verb))
        if verb == "RCPT" and self.moody and b"<later" in line:
            return "450 4.2.0 not now"
        return "550 5.1.1 never" if verb == "RCPT" and b"<no@" in line else None

    def counts(self):
        with self.lock:
            found = [(name_in(message.content), one) for message in self.messages for one in message.recipients]
        return collections.Counter((name, one.split("@")[0]) for name, one in found)


class Relayed(Place):
    """A customer's mail to the world."""

    title, about = "relay", "a customer's mail to the world"

    def __init__(self, box):
        self.box, self.output = box, box.path / "strace.output"
        self.hop = ChoosyHouse(box, address="127.0.0.3", port=free_port())
        names = Names(box, mx={"dest.example": [(10, "mx.dest.example")]}, hosts={"mx.dest.example": "127.0.0.3"})
        more = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {self.hop.port}\nconnections-per-host = 1\n'
        self.provider = Provider(box, require_tls=False, accounts=RELAYS, name="relay", more=more).start()
        self.directories = self.queues = [self.provider.spool]

    def prepare(self, name):
        self.hop.moody = True
        self.hop.told.clear()
        with Smtp(self.provider.odmr) as line:
            line.hello()
            line.log_in("acme")
            for end in self.messages:
                three = [f"{one}@dest.example" for one in ("yes", "later", "no")]
                check((reply := line.send(OURS, three, numbered(f"{name}-{end}"))).startswith("250"), reply)
        self.restart(hold=True)  # or the relay needs some time
        wait_until(lambda: self.hop.open, "the relay to begin")

    def restart(self, hold):
        """Makes all waiting mail due. `hold`: the host waits at MAIL until the test permits it to continue."""
        if self.alive():
            check((code := self.provider.stop()) == 0, f"serve: exit {code}")
        self.box.children.remove(self.provider.process)
        self.hop.told.set()
        wait_until(lambda: not self.hop.open, "the connections of the last relay to end")
        if hold:
            self.hop.told.clear()
        for file in self.waiting():
            os.utime(file)
        self.provider.start()

    def act(self, inject):
        before, process = self.decided(), self.provider.process
        with Tracer(self.box, process.pid, inject, follow=False):
            self.hop.told.set()
            wait_until(lambda: not self.alive() or self.decided() - before >= 3 * len(self.messages) or self.rests(), "the relay")
            if "SIGKILL" in (inject or ""):
                self.ended()
            wait_until(lambda: not self.alive() or self.rests(), "the relay to end")
        return not self.alive() or "(INJECTED)" in self.output.read_text()

    def rests(self):
        """No connection for a while: a relay that has lost one may connect again."""
        if self.hop.open:
            return False
        time.sleep(0.05)
        return not self.hop.open

    def decided(self):
        return len(events(self.provider.log(), "delivery", via="mx"))

    def alive(self):
        return self.provider.process.poll() is None

    def again(self):
        self.restart(hold=False)
        try:
            wait_until(lambda: not self.waiting(), "the relay", seconds=2)
        except Failed:
            return False
        return True

    def waiting(self):
        return [file for part in ("new", "cur") for file in self.provider.spool.glob(f"outgoing/*/{part}/*")]

    def reports(self):
        return contents(self.provider.held)


def swept(place):
    """No file stays in the tmp of a queue for ever: after 36 hours the next session removes it (maildir(5))."""
    drafts = lambda: [file for top in place.queues for file in top.rglob("tmp/*")]
    for file in drafts():
        os.utime(file, times=(time.time() - 40 * 3600,) * 2)
    place.prepare(f"{place.title.replace('-', '')}-9999")
    place.act(None)
    place.recover()
    if isinstance(place, Relayed):  # the DSNs for its senders are held
        customer = Customer(place.box, place.provider.odmr, tls="none", file="told")
        check((code := customer.pull()) == 0, f"pull: exit {code}")
    if isinstance(place, Turned):  # the DSNs wait for the relay
        for file in place.provider.spool.glob("outgoing/*/new/*"):
            with contextlib.suppress(FileNotFoundError):  # the relay has just tried it, and recorded that in its name
                os.utime(file)
        place.provider.restart_by_force()
    wait_until(lambda: not drafts(), f"{place.title}: tmp to be swept: {drafts()[:2]}")


def all_moments(place):
    """A rehearsal. It is done twice: the first time makes directories that exist the second time."""
    name = place.title.replace("-", "")
    for number in (9000, 9001):
        place.prepare(f"{name}-{number}")
        place.act(None)
        found = moments(place.output, *place.directories)
        place.recover()
    check(len(found) >= 4, f"{place.title}: hardly any moments: {found}")
    return name, found


def told(place, subject):
    return sum(subject.encode() in report for report in place.reports())


def check_step(place, name, step, doubles):
    """Checks that no message is lost. Returns the messages that a recipient has twice; none has one more often, or one
    that it rejects."""
    counts = place.hop.counts()
    twice = set()
    for end in place.messages:
        subject = f"{name}-{end}"
        for local in ("yes", "later"):
            times = counts[subject, local]
            check(times or (end, local) == ("last", "later"), f"{step}: {subject} is lost for {local}")
            check(times <= 2, f"{step}: {local} has {subject} {times} times")
            twice |= {end} if times == 2 else set()
        check(not counts[subject, "no"], f"{step}: {subject} for one that was rejected")
        if end in place.reported:
            times = told(place, subject)
            check(1 <= times <= 2, f"{step}: the sender of {subject} got {times} DSNs")
        elif end == "null":
            check(any(subject.encode() in file for file in place.kept()), f"{step}: {subject} is not kept")
    check(len(twice) <= doubles, f"{step}: twice: {twice}")
    return twice


def recorded_messages(place):
    """The names of waiting messages whose settlement is recorded, as strace shows: two marks (one octet each of the file,
    overwritten: one recipient was sent the message, one rejected it), or a new file that replaces the old one."""
    marks = collections.Counter()
    for call, _, rest in calls(place.output):
        if written := call == "pwrite64" and re.search(r"/([^/>]+)>, .* = 1$", rest):
            marks[unique(written.group(1))] += 1
        elif moved := re.search(r'/tmp/([^/"]+)", .* = 0$', rest):
            marks[unique(moved.group(1))] += 2 * (call.startswith(("rename", "link")) and "/.refused/" not in rest)
    return [name_in(octets) for octets in contents(lambda: [one for one in place.waiting() if marks[unique(one.name)] >= 2])]


def unique(file_name):
    return re.split("[,:]", file_name)[0]


def kill_at_each(place):
    name, found = all_moments(place)
    hits, recorded, twice = 0, 0, 0
    for number, (call, which, rest) in enumerate(found):
        step = f"{place.title}: SIGKILL at {call} {which} ({rest.strip()[-90:]})"
        place.prepare(f"{name}-{number}")
        hits += place.act(f"{call}:signal=SIGKILL:when={which}")
        settled = [one for one in recorded_messages(place) if one]
        recorded += len(settled)
        place.recover()
        twice += len(check_step(place, f"{name}-{number}", step, place.doubles))
        again = [one for one in settled if place.hop.counts()[one, "yes"] > 1]
        check(not again, f"{step}: sent again though it was on record: {again}")
    check(hits >= len(found) // 2, f"{place.title}: only {hits} of {len(found)} moments came again")
    check(recorded, f"{place.title}: no moment after a record")
    swept(place)
    return f"{hits} moments, {recorded} on record, {twice} twice"


def not_offered(place, name):
    """The messages that the session did not offer."""
    counts = place.hop.counts()
    return [end for end in place.messages if not counts[f"{name}-{end}", "yes"]]


def fail_at_each(place):
    name, found = all_moments(place)
    hits, faults = 0, []
    for number, (call, which, rest) in enumerate(found):
        error = ERRORS[number % len(ERRORS)]
        step = f"{place.title}: {error} of {call} {which} ({rest.strip()[-90:]})"
        place.prepare(f"{name}-{number}")
        hits += place.act(f"{call}:error={error}:when={which}")
        try:
            missed = not_offered(place, f"{name}-{number}")
            hit = injected(place.output)
            unread = sum(one.call == "openat" and "O_CREAT" not in one.rest for one in hit)  # cannot be opened
            others = any(not changes(one, place.directories) for one in hit)  # a session does not begin without its lock
            check(place.alive(), f"{step}: serve ended")
            place.recover()
            check(len(missed) <= unread or others, f"{step}: the session did not go on to {missed}; what failed: {hit}")
            check_step(place, f"{name}-{number}", step, 1)
        except Failed as error:
            faults.append(str(error))
            place.recover()
    check(not faults, f"{len(faults)} of {len(found)}: " + "; ".join(faults))
    check(hits >= len(found) // 2, f"{place.title}: only {hits} of {len(found)} moments came again")
    swept(place)
    return f"{hits} faults"


PLACES = (Turned, HandedOver, Submitted, Relayed)


def register(kind, function, about):
    for place in PLACES:

        def play(box, place=place):
            return function(place(box))

        play.__doc__ = f"{about}; {place.about}"
        needs = ["strace"] + ["dnsmasq"] * (place is Relayed)
        scenario(f"{place.title}-{kind}", needs=needs, root=True)(play)


register("killed", kill_at_each, "SIGKILL at each call of a settlement: nothing lost, sent again only before the record")
register("disk-fails", fail_at_each, "each call of a settlement fails: the session goes on, at most that message is sent again")
