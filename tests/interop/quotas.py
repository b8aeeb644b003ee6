"""The mail that is held for a customer is limited, a disk has a reserve, and a customer may list its recipients.

The watcher sums the files as `odmr status` does, under the lock that each process has while it adds a file.
"""

import collections
import contextlib
import fcntl
import os
import random
import socket
import subprocess
import threading
import time

from harness import (
    LOOPBACK, MIB, ODMR, Customer, Failed, Listener, Provider, Smtp, check, connections, events, scenario, stuffed, wait_until,
)

SENDERS = 32
SMALLEST = 100  # octets of content
LIMIT = 3 * MIB
ADDRESSES = ("eva@example.org", "adam@example.com")


class Inetd:
    """A listener that starts a process of odmr for each connection."""

    def __init__(self, box, provider, listener="inbound"):
        self.box, self.processes = box, []
        self.command = [ODMR, "serve", "-c", str(provider.config), "--inetd", listener]
        self.socket = box.keep(socket.create_server((LOOPBACK, 0)))
        self.port = self.socket.getsockname()[1]
        self.lock = threading.Lock()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        for sock in connections(self.socket):
            with sock, self.lock:
                self.processes.append(self.box.start("inetd.log", *self.command, stdin=sock, stdout=sock))

    def kill_one(self, dice):
        with self.lock:
            alive = [process for process in self.processes if process.poll() is None]
        if alive:
            dice.choice(alive).kill()
        return bool(alive)


class Sender(threading.Thread):
    """Sends messages of random sizes to random recipients until it is stopped; some announce the size."""

    def __init__(self, number, port, dice, stop):
        super().__init__(daemon=True)
        self.number, self.port, self.dice, self.stop = number, port, dice, stop
        self.accepted, self.replies, self.tried = [], collections.Counter(), 0
        self.start()

    def run(self):
        while not self.stop.is_set():
            try:
                with Smtp(self.port(), seconds=20) as line:
                    line.hello()
                    for _ in range(20):
                        if self.stop.is_set():
                            break
                        self.one(line)
            except (OSError, Failed):
                time.sleep(0.02)

    def one(self, line):
        self.tried += 1
        name = f"{self.number}-{self.tried}-x"
        recipients = self.dice.choice((ADDRESSES[:1], ADDRESSES[1:], ADDRESSES))
        content = message(name, self.dice.choice((SMALLEST, 500, 3000, 20_000, 60_000)))
        size = self.dice.choice(("", f" SIZE={len(content)}"))
        group = [f"MAIL FROM:<a@sender.example>{size}", *(f"RCPT TO:<{one}>" for one in recipients), "DATA"]
        line.socket.sendall("".join(one + "\r\n" for one in group).encode())
        mail, *rcpt, data = [line.reply() for _ in group]
        check(mail.startswith("250"), mail)
        # One of two recipients may exceed the quota.
        taken = [to for to, reply in zip(recipients, rcpt) if reply.startswith("250")]
        for reply in rcpt:
            check(reply.startswith(("250", "452 4.2.2")), reply)
        self.replies["RCPT 452"] += len(recipients) - len(taken)
        if not taken:
            line.want("250", "RSET")
            return
        check(data.startswith("354"), data)
        line.socket.sendall(stuffed(content))
        reply = line.reply()
        check(reply.startswith(("250", "452 4.2.2")), reply)
        self.replies[f"end {reply[:3]}"] += 1
        if reply.startswith("250"):
            self.accepted.append((name, taken))


def message(name, octets):
    head = f"Subject: {name}\r\nMessage-ID: <{name}@sender.example>\r\n\r\n".encode()
    return head + b"z" * max(0, min(octets, 70) - len(head)) + b"\r\n" + (b"z" * 70 + b"\r\n") * (octets // 72)


def held(provider):
    """The octets of the held files; a file that is renamed during this counts once."""
    found = {}
    for file in provider.held():
        size = next((part[2:] for part in file.name.split(":")[0].split(",") if part.startswith("S=")), None)
        with contextlib.suppress(FileNotFoundError):
            found[file.parent.parent.name, file.name.split(",")[0]] = int(size or file.stat().st_size)
    return sum(found.values())


class Watcher(threading.Thread):
    """Sums the files all the time, while no process can add one."""

    def __init__(self, provider, limit):
        super().__init__(daemon=True)
        self.provider, self.limit, self.stop = provider, limit, threading.Event()
        self.looked, self.most, self.errors = 0, 0, []
        self.start()

    def run(self):
        path = self.provider.spool / ".odmr/usage-acme"
        while not self.stop.is_set():
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    octets = held(self.provider)
                    self.looked += 1
                    self.most = max(self.most, octets)
                    if octets > self.limit:
                        self.errors.append(octets)
            time.sleep(0.005)

    def end(self):
        self.stop.set()
        self.join(60)
        check(self.looked > 20, f"looked only {self.looked} times")
        check(not self.errors, f"{self.limit} octets, and there were {self.errors[:5]}")


def fill(provider, port):
    """Sends smaller and smaller messages until the smallest is rejected."""
    with Smtp(port) as line:
        line.hello()
        for size in (60_000, 3000, SMALLEST):
            while True:
                before = held(provider) if size == SMALLEST else 0
                reply = line.send("a@sender.example", ["eva@example.org"], message("last-x", size))
                if not reply.startswith("250"):
                    check(reply.startswith("452 4.2.2"), reply)
                    break
                if before:
                    fill.smallest = held(provider) - before
                    check(0 < fill.smallest < 1000, f"a file of {fill.smallest} octets")


fill.smallest = 600


def is_full(provider, ports):
    for port in ports:
        fill(provider, port)
    octets = held(provider)
    check(LIMIT - fill.smallest < octets <= LIMIT, f"{octets} octets of {LIMIT}, and {fill.smallest} have no room")
    return octets


@scenario("quota-two-processes")
def quota_two_processes(box):
    """32 senders at `serve` and at processes of inetd fill a quota: it is reached up to the smallest message, and never exceeded"""
    provider = Provider(box, require_tls=False, accounts={"acme": f"max-bytes = {LIMIT}"}).start()
    inetd, stop, dice = Inetd(box, provider), threading.Event(), random.SystemRandom()
    watcher = Watcher(provider, LIMIT)
    ports = [lambda: provider.inbound, lambda: inetd.port]
    senders = [Sender(number, ports[number % 2], dice, stop) for number in range(SENDERS)]
    rejected = lambda: sum(sender.replies["end 452"] + sender.replies["RCPT 452"] for sender in senders)
    wait_until(lambda: rejected() >= 500, "500 messages that are too much", 60)
    stop.set()
    for sender in senders:
        sender.join(60)
    octets = is_full(provider, [provider.inbound, inetd.port])
    watcher.end()
    accepted = sum(len(recipients) for sender in senders for _, recipients in sender.accepted)
    replies = sum((sender.replies for sender in senders), collections.Counter())
    line = wait_until(lambda: events(provider.log(), "over-quota", account="acme", reason="octets"), "a line of the log")
    check(len(line) <= 3, f"{len(line)} lines of the log")
    status = box.run(ODMR, "status", "-c", provider.config, "--warn", "1d")
    check(status.returncode == 1 and "% of its quota is used up" in status.stdout, f"{status.stdout}{status.stderr}")
    shown = box.run(ODMR, "status", "-c", provider.config).stdout
    check(str(octets) in shown, f"{octets} octets are not in {shown}")
    # The room of files that an administrator removes is usable, also in the other process, when the last count is no longer valid.
    largest = max(provider.held(), key=lambda file: file.stat().st_size)
    largest.unlink()
    wait_until(lambda: fill(provider, inetd.port) or LIMIT - fill.smallest < held(provider), "as full as before")
    is_full(provider, [inetd.port, provider.inbound])
    return f"{accepted} files, {octets} of {LIMIT} octets, {dict(replies)}, looked {watcher.looked} times"


@scenario("quota-kills")
def quota_kills(box):
    """All processes are killed (SIGKILL) while 32 senders fill a quota and a customer fetches: it is never exceeded, no message is lost, and it is full at the end"""
    provider = Provider(box, require_tls=False, accounts={"acme": f"max-bytes = {LIMIT}"}).start()
    provider.config.write_text(provider.config.read_text().replace(f"{LOOPBACK}:0", f"{LOOPBACK}:{provider.inbound}", 1))
    provider.config.write_text(provider.config.read_text().replace(f"{LOOPBACK}:0", f"{LOOPBACK}:{provider.odmr}", 1))
    customer = Customer(box, provider.odmr, tls="none")
    inetd, stop, dice = Inetd(box, provider), threading.Event(), random.SystemRandom()
    watcher = Watcher(provider, LIMIT)
    ports = [lambda: provider.inbound, lambda: inetd.port]
    senders = [Sender(number, ports[number % 2], dice, stop) for number in range(SENDERS)]
    calls, kills = collections.Counter(), collections.Counter()

    def fetch():
        while not stop.is_set():
            calls[customer.pull()] += 1
            time.sleep(dice.uniform(0, 0.5))

    fetcher = threading.Thread(target=fetch, daemon=True)
    fetcher.start()
    end = time.monotonic() + 25
    while time.monotonic() < end:
        time.sleep(dice.uniform(0.1, 0.8))
        if dice.random() < 0.4:
            provider.restart_by_force()
            kills["serve"] += 1
        else:
            kills["inetd"] += inetd.kill_one(dice)
    stop.set()
    for thread in [*senders, fetcher]:
        thread.join(60)
    octets = is_full(provider, [provider.inbound, inetd.port])
    watcher.end()
    wait_until(lambda: customer.pull() in (0, 75) and not provider.held(), "an empty spool", 60, 0.5)
    there = collections.Counter()
    for file in customer.files():
        with open(file, "rb") as content:
            head = content.read(2000).split(b"\n\n", 1)[0].decode()
        subject = next(line[9:] for line in head.split("\n") if line.startswith("Subject: "))
        there[subject, file.parent.parent.parent.name] += 1
    wanted = [(name, to.split("@")[1]) for sender in senders for name, tos in sender.accepted for to in tos]
    lost = [one for one in wanted if not there[one]]
    check(not lost, f"{len(lost)} of {len(wanted)} are lost: {lost[:3]}")
    return f"{len(wanted)} files, {octets} octets at the end, at most {watcher.most}, kills {dict(kills)}, calls {dict(calls)}"


def ballast(spool, free):
    """Leaves only so much of the disk free."""
    (spool / "ballast").unlink(missing_ok=True)
    disk = os.statvfs(spool)
    with open(spool / "ballast", "wb") as file:
        for _ in range((disk.f_bavail * disk.f_frsize - free) // 65536):
            file.write(bytes(65536))


@scenario("min-free", root=True)
def min_free(box):
    """The disk has less than `min-free`: both listeners accept no mail, held and outgoing mail is sent, and DSNs are stored"""
    elsewhere = Listener(box)
    more = f'[limits]\nmin-free = "6MiB"\n[relay]\nsmarthost = "{LOOPBACK}:{elsewhere.port}"\nsmarthost-tls = "none"\nretry-first = "1s"\n'
    provider = Provider(box, require_tls=False, more=more)
    provider.spool.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "none", provider.spool], capture_output=True)
    if mounted.returncode:
        return "cannot mount, skipped"
    box.at_end(lambda: subprocess.run(["umount", "-l", provider.spool], capture_output=True))
    other = box.path / "other"
    (provider.spool / "domains").mkdir()
    (provider.spool / "domains/example.com").symlink_to(other)
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=700", "none", other], check=True)
    box.at_end(lambda: subprocess.run(["umount", "-l", other], capture_output=True))
    provider.start()
    customer = Customer(box, provider.odmr, tls="none", more='except = ["nobody@example.org"]\n')
    with Smtp(provider.inbound) as line:
        line.hello()
        for number in range(20):
            sender = "adam@example.com" if number % 2 else "a@sender.example"
            recipients = ["eva@example.org", "nobody@example.org"] if number < 4 else ["eva@example.org"]
            reply = line.send(sender, recipients, message(f"m{number}", 3000))
            check(reply.startswith("250"), reply)
    with Smtp(provider.inbound) as line, Smtp(provider.odmr) as submission:
        line.hello()
        submission.hello()
        submission.log_in("acme")
        # A domain may be on another disk than the spool.
        ballast(other, 5 * MIB)
        for one in (line, submission):
            one.want("250", "MAIL FROM:<eva@example.org>")
            one.want("452 4.3.1", "RCPT TO:<adam@example.com>")
            one.want("250", "RCPT TO:<eva@example.org>")
            one.want("250", "RSET")
        (other / "ballast").unlink()
        # There is enough for MAIL, but too little while the content arrives, whose size is not announced.
        ballast(provider.spool, 8 * MIB)
        content = message("large", 3 * MIB)
        for one, to in ((line, "eva@example.org"), (submission, "b@elsewhere.example")):
            reply = one.send("eva@example.org", [to], content)
            check(reply.startswith("452 4.3.1"), f"a message that is too large: {reply}")
        ballast(provider.spool, 8 * MIB)
        for one in (line, submission):
            one.want("250", "MAIL FROM:<eva@example.org>")
            one.want("250", "RCPT TO:<eva@example.org>")
            one.want("354", "DATA")
        ballast(provider.spool, 5 * MIB)
        for one in (line, submission):
            one.want("452 4.3.1", "Subject: late\r\n\r\n.")
            one.want("452 4.3.1", "MAIL FROM:<eva@example.org>")
        check(len(provider.held()) == 20, f"{len(provider.held())} are held")
        ballast(provider.spool, 8 * MIB)
        reply = submission.send("eva@example.org", ["b@elsewhere.example"], message("out", 3000))
        check(reply.startswith("250"), reply)
        ballast(provider.spool, 1 * MIB)
    wait_until(lambda: [message for message in elsewhere.messages if message.recipients == ["b@elsewhere.example"]], "the relay")
    wait_until(lambda: customer.pull() == 0 and not provider.held(), "an empty spool", 30, 0.5)
    subjects = collections.Counter(file.parent.parent.parent.name for file in customer.files())
    # Two of those with an unknown recipient have a customer as their sender: a DSN is held for it.
    check(subjects["example.org"] == 20 and subjects["example.com"] == 2, f"the customer has {subjects}")
    wait_until(lambda: len(elsewhere.messages) == 3, "the DSNs for elsewhere")
    with Smtp(provider.inbound) as line:
        line.hello()
        line.want("452 4.3.1", "MAIL FROM:<>")
        (provider.spool / "ballast").unlink()
        line.want("250", "MAIL FROM:<>")
    return f"{len(customer.files())} files fetched, {len(elsewhere.messages)} relayed"


@scenario("recipients-file")
def recipients_file(box):
    """A file of recipients is replaced while mail arrives, by rename, in place, slowly, and by invalid data: it takes effect without a reload"""
    path = box.path / "lists/acme"
    path.parent.mkdir()
    many = "".join(f"user{number}@example.org\n" for number in range(100_000))

    def write(*names, whole=""):
        path.with_suffix(".new").write_text(f"# ours\n{whole}" + "".join(f"{name}@example.org\n" for name in names))
        os.utime(path.with_suffix(".new"), (1, 1))
        path.with_suffix(".new").rename(path)

    write("always", "before")
    provider = Provider(box, require_tls=False, accounts={"acme": f'recipients-file = "{path}"'}).start()
    inetd, stop = Inetd(box, provider), threading.Event()
    replies, longest = collections.Counter(), [0.0]

    def ask():
        while not stop.is_set():
            with contextlib.suppress(OSError, Failed), Smtp(provider.inbound) as line:
                line.hello()
                line.want("250", "MAIL FROM:<a@sender.example>")
                while not stop.is_set():
                    begin = time.monotonic()
                    replies["always", line.say("RCPT TO:<always@example.org>")[:3]] += 1
                    longest[0] = max(longest[0], time.monotonic() - begin)
                    line.want("250", "RSET")
                    line.want("250", "MAIL FROM:<a@sender.example>")
                    time.sleep(0.01)

    def reply(name, port=None):
        with Smtp(port or provider.inbound) as line:
            line.hello()
            line.want("250", "MAIL FROM:<a@sender.example>")
            return line.say(f"RCPT TO:<{name}@example.org>")[:9]

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in asking:
        thread.start()
    known = lambda name, wanted="250 2.1.5": wait_until(lambda: reply(name) == wanted, f"{wanted} for {name}", 8)
    known("before")
    known("after", "550 5.1.1")
    write("always", "after", whole=many)
    known("after")
    known("user99999")
    known("before", "550 5.1.1")
    for port in (provider.inbound, inetd.port):
        check(reply("postmaster", port) == "250 2.1.5", "postmaster is unknown")
        wait_until(lambda: reply("unknown", port) == "550 5.1.1", "550 for an unknown recipient", 8)
    # In place, with pauses: a part of it is a valid list, and no recipient is rejected because of that.
    seen = collections.Counter()
    with open(path, "w") as file:
        for name in ("slow", "other", "always"):
            file.write(f"{name}@example.org\n")
            file.flush()
            end = time.monotonic() + 1.2
            while time.monotonic() < end:
                seen[reply("after")] += 1
                time.sleep(0.1)
    known("slow")
    known("after", "550 5.1.1")
    # An invalid file changes nothing, and is logged once; or twice if it is read at the moment when it is truncated.
    said = lambda: {line["error"] for line in events(provider.log(), "recipients-unreadable")}
    for number, text in enumerate(("", "always@example.org\nalw", "always@example.edu\n", "\0\1\2\n"), 1):
        path.write_text(text)
        wait_until(lambda: len(said()) == number, f"a line about {text!r}", 8)
        check((reply("slow"), reply("after")) == ("250 2.1.5", "550 5.1.1"), f"after {text!r}")
    path.unlink()
    wait_until(lambda: len(said()) == 5, "a line about no file", 8)
    check((reply("slow"), reply("after")) == ("250 2.1.5", "550 5.1.1"), "without a file")
    write("always", "again")
    known("again")
    stop.set()
    for thread in asking:
        thread.join(60)
    check(set(replies) == {("always", "250")}, f"the one who is always there got {dict(replies)}")
    check(len(said()) == 5, f"more lines in the log: {said()}")
    return f"{sum(replies.values())} RCPT, {longest[0]:.3f} s at most; while it was written: {dict(seen)}"
