"""A mail reader in the Maildir of held mail: it moves files from new to cur and changes their flags, during the turn.

What must hold: a file is known by the part of its name that a reader does not change, so no message is lost, sent twice or
left.
"""

import itertools
import os
import pty
import select
import subprocess
import threading
import time

from dovecot import Dovecot
from harness import Failed, Provider, check, scenario, wait_until
from postfix import UID
from settling import PLACES, SENDER, Choosy, check_step, not_offered, numbered, turned_call

MANY = 300
READER = "reader@example.org"
FLAGS = ("S", "FS", "", "RST", "DFPRST", "F")
CALLS_AT_MOST = 12
AT_MOST = 100  # how often a reader renames the files of a few messages in one session


def rename_all(files, flags):
    """The effect of a reader that opens a Maildir: each message is in cur, with other flags. Returns the number of messages."""
    count = 0
    for file in files:
        try:
            file.rename(file.parent.parent / "cur" / f"{file.name.split(':')[0]}:2,{flags}")
            count += 1
        except FileNotFoundError:
            pass  # sent since
    return count


@scenario("reader-renames", needs=["strace", "dnsmasq"], root=True)
def reader_renames(box):
    """A reader renames each waiting file at RCPT, at DATA and between content and 250, in all four queues: each message arrives once"""
    renamed, failures = 0, []
    for kind in PLACES:
        place, flags = kind(box), itertools.cycle(FLAGS)

        def rename():
            nonlocal renamed
            if renamed - before < AT_MOST:
                renamed += rename_all(place.waiting(), next(flags))

        for number, event in enumerate(("recipient", "content", "taken")):
            name = f"{place.title.replace('-', '')}-{number}"
            place.prepare(name)
            before, place.hop.at = renamed, {event: rename}  # also in the calls after the first
            step = f"{place.title}: renamed at {event}"
            place.act(None)
            missed = not_offered(place, name)
            check(renamed > before, f"{step}: nothing was there to be renamed")
            try:
                place.recover()
                check_step(place, name, "renamed", 0)
                check(not missed, f"not offered in the session: {missed}")
            except Failed as error:
                failures.append(f"{step}: {error}")
            place.hop.at = {}
            place.recover()
    check(not failures, "; ".join(failures))
    return f"{renamed} times renamed"


class Reader(threading.Thread):
    """Reads a Maildir again and again, by calling `read`."""

    def __init__(self, read):
        super().__init__(daemon=True)
        self.read, self.stop = read, threading.Event()
        self.times, self.error = 0, None
        self.start()

    def run(self):
        try:
            while not self.stop.is_set():
                self.read(self.times)
                self.times += 1
        except Exception as error:  # set by `end`
            self.error = error

    def end(self):
        self.stop.set()
        self.join(60)
        check(not self.error, f"the reader: {self.error!r}")
        check(not self.is_alive(), "the reader hangs")
        return self.times


class SlowChoosy(Choosy):
    """Gives the reader time: a little for each message, and now and then enough to read all."""

    def take(self, sender, recipients, content):
        super().take(sender, recipients, content)
        time.sleep(0.001)
        if len(self.messages) % 40 == 0:
            before = self.reader.times
            wait_until(lambda: self.reader.times > before or not self.reader.is_alive(), "the reader to read", seconds=20)


def hold(provider):
    """Some hundreds of messages in the held Maildir, a third of them for two recipients; the files belong to the reader."""
    held = provider.spool / "domains/example.org"
    for part in ("tmp", "new", "cur"):
        (held / part).mkdir(parents=True)
    for number in range(MANY):
        recipients = ["yes@example.org", "later@example.org"][: 1 + (number % 3 == 0)]
        text = f"Return-Path: <{SENDER}>\n" + "".join(f"Delivered-To: {one}\n" for one in recipients)
        text += numbered(f"held-{number}-x").decode().replace("\r", "")
        (held / f"new/{1767323045 + number}.M{number}P1.x").write_text(text)
    for path in (held, *held.rglob("*")):
        os.chown(path, UID, UID)
    return held


def read_during_turns(provider, read):
    """Calls until the provider holds no mail, while a reader reads. Returns the facts."""
    hop = SlowChoosy(lmtp=False)
    hop.reader, calls = Reader(read), 0
    while provider.held():
        check(calls < CALLS_AT_MOST, f"{len(provider.held())} messages are held after {calls} calls")
        turned_call(provider, hop)
        hop.moody = False
        calls += 1
    times = hop.reader.end()
    counts = hop.counts()
    wanted = {(f"held-{number}-x", "yes"): 1 for number in range(MANY)}
    wanted |= {(f"held-{number}-x", "later"): 1 for number in range(0, MANY, 3)}
    lost = sorted(set(wanted) - set(counts))
    twice = {one: times for one, times in counts.items() if times > 1}
    check(not lost, f"{len(lost)} lost: {lost[:5]}")
    check(not twice, f"{len(twice)} came twice: {list(twice.items())[:5]}")
    return f"{MANY} messages, {calls} calls, read {times} times"


@scenario("reader-dovecot", needs=["dovecot", "doveadm"], root=True)
def reader_dovecot(box):
    """Dovecot moves and flags the held mail all the time: each message is sent exactly once, and none is left"""
    provider = Provider(box, require_tls=False)
    held = hold(provider)
    dovecot = Dovecot(box, {READER: held}, location="maildir:~", owner=(UID, UID)).start()
    flags = [["\\Seen"], ["\\Flagged", "\\Seen"], ["\\Answered", "\\Deleted"], ["\\Draft"], []]

    def read(times):
        words = ["flags", "replace", "-u", READER, " ".join(flags[times % len(flags)]), "mailbox", "INBOX", "all"]
        done = subprocess.run(["doveadm", "-c", dovecot.config, *words], capture_output=True, text=True, timeout=30)
        check(done.returncode == 0, f"doveadm {words}: exit {done.returncode}: {done.stderr}")

    provider.start()
    return read_during_turns(provider, read)


@scenario("reader-mutt", needs=["mutt"], root=True)
def reader_mutt(box):
    """mutt opens the held Maildir, flags its messages and closes it, all the time: each message is sent exactly once, and none is left"""
    provider = Provider(box, require_tls=False)
    held = hold(provider)
    settings = "set sleep_time=0 mark_old=yes beep=no quit=yes delete=no move=no\n"
    muttrc = box.write("muttrc", settings)
    keys = ["<set-flag>!", "<clear-flag>!<tag-prefix><set-flag>r", "<clear-flag>r<tag-prefix><set-flag>*"]

    def read(times):
        screen, terminal = pty.openpty()
        push = f"<tag-pattern>~A<enter><tag-prefix>{keys[times % len(keys)]}<sync-mailbox><quit>"
        command = ["mutt", "-F", muttrc, "-f", held, "-e", f'push "{push}"']
        options = {"stdin": terminal, "stdout": terminal, "env": os.environ | {"TERM": "xterm", "HOME": str(box.path)}}
        child = box.start("mutt.log", *command, **options)
        os.close(terminal)
        begin = time.monotonic()
        while child.poll() is None:
            seconds = time.monotonic() - begin
            check(seconds < 20, f"mutt hangs at {push}")
            try:
                if select.select([screen], [], [], 0.05)[0]:
                    os.read(screen, 65536)
                elif seconds > 0.3:
                    os.write(screen, b"\aq")  # if there is no message, mutt discards the pending keys: abort, quit
            except OSError:
                pass  # it has closed its terminal
        os.close(screen)
        box.children.remove(child)
        check(child.returncode == 0, f"mutt: exit {child.returncode}")

    provider.start()
    return read_during_turns(provider, read)
