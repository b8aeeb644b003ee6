"""The disk fails at the worst moment: strace makes system calls of `odmr serve` fail, without a change of the program.

What must hold: the sender gets 451 or 452, no reader sees the message, no file of it is left, and the next one is accepted.
"""

import collections
import re
import subprocess

from harness import ODMR, Customer, Provider, Smtp, check, field, scenario, stuffed
from moments import Tracer, calls

SMALL = b"x" * 70 + b"\r\n"
LARGE = SMALL * 3000  # many writes

# Which of the system calls for a message fails (counted among calls of that name on that directory; -1: the last one), how,
# and the reply that the sender gets. There are two domains, so the second call of a name fails after the first copy is done.
FAULTS = [
    ("openat", "tmp", 0, "ENOSPC", "452"),
    ("openat", "tmp", 1, "EMFILE", "451"),
    ("write", "tmp", 0, "ENOSPC", "452"),
    ("write", "tmp", 1, "EIO", "451"),
    ("write", "tmp", -1, "EDQUOT", "452"),
    ("fsync", "tmp", 0, "EIO", "451"),
    ("fsync", "tmp", 1, "ENOSPC", "452"),
    ("fsync", "new", 0, "EIO", "451"),
    ("fsync", "new", 1, "EIO", "451"),
    ("renameat2", "tmp", 0, "EDQUOT", "452"),
    ("renameat2", "tmp", 1, "ENOSPC", "452"),
    ("renameat2", "tmp", 1, "EIO", "451"),
]


def numbers(output, spool):
    """For each call and directory: its numbers among the calls of that name in its thread, as strace counts them."""
    found = collections.defaultdict(list)
    for call, number, rest in calls(output):
        directory = re.search(re.escape(str(spool)) + r"/domains/[^/\"]+/(tmp|new)\b", rest)
        if directory:
            found[call, directory.group(1)].append(number)
    return found


class Sender(Smtp):
    """Sends one command at a time, so that the calls of each session come in the same order."""

    def __init__(self, provider):
        super().__init__(provider.inbound)
        self.hello()

    def message(self, name, content):
        self.want("250", "MAIL FROM:<a@sender.example>")
        self.want("250", "RCPT TO:<eva@example.org>")
        self.want("250", "RCPT TO:<adam@example.com>")
        reply = self.say("DATA")
        if not reply.startswith("354"):
            return reply
        self.socket.sendall(stuffed(f"Subject: {name}\r\n\r\n".encode() + content))
        return self.reply()


def names(files):
    return collections.Counter(field(file.read_bytes(), "Subject") for file in files)


def files(provider, *directories):
    return [file for directory in directories for file in provider.spool.glob(f"domains/*/{directory}/*")]


@scenario("faults", needs=("strace",), root=True)
def faults(box):
    """System calls of `serve` fail while it accepts a message: the client gets 451 or 452, no reader sees the message, and the next one is held"""
    provider = Provider(box, require_tls=False).start()
    with Sender(provider) as sender:
        check(sender.message("first", SMALL).startswith("250"), "a message before any fault")
    places = {}
    for size in (SMALL, LARGE):
        with Tracer(box, provider.process.pid) as tracer, Sender(provider) as sender:
            check(sender.message("rehearsal", size).startswith("250"), "the rehearsal")
        places[len(size)] = numbers(tracer.output, provider.spool)
    expected = collections.Counter({"first": 2, "rehearsal": 4})
    for count, (call, directory, which, error, code) in enumerate(FAULTS):
        content = LARGE if call == "write" else SMALL
        name = f"{call} {which} on {directory}: {error}"
        found = places[len(content)][call, directory]
        check(len(found) >= 2, f"{name}: the rehearsal had {len(found)} such calls")
        with Tracer(box, provider.process.pid, f"{call}:error={error}:when={found[which]}") as tracer, Sender(provider) as sender:
            reply = sender.message("rejected", content)
            check("(INJECTED)" in tracer.output.read_text(), f"{name}: no fault came to be; the reply was {reply!r}")
            check(reply.startswith(code), f"{name}: wanted {code}, got {reply!r}")
            check(names(files(provider, "new", "cur")) == expected, f"{name}: something is seen")
            check(not files(provider, "tmp"), f"{name}: something is left in tmp")
            reply = sender.message(f"after {count}", content)
            check(reply.startswith("250"), f"{name}: the next message got {reply!r}")
        expected[f"after {count}"] = 2
        check(names(files(provider, "new", "cur")) == expected, f"{name}: the next message is not held")
        check(provider.process.poll() is None, f"{name}: serve ended")
    customer = Customer(box, provider.odmr, tls="none")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(names(customer.files()) == expected, f"pulled: {names(customer.files())}")
    check(not provider.held(), "held after the pull")
    return f"{len(FAULTS)} faults"


@scenario("customer-full-disk", root=True)
def customer_full_disk(box):
    """The customer's disk is full: pull exits with 75 and names sender and recipient, also with -q; the mail arrives when there is room"""
    provider = Provider(box, require_tls=False).start()
    customer = Customer(box, provider.odmr, tls="none")
    customer.root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(customer.root)], capture_output=True)
    if mounted.returncode:
        return "cannot mount, skipped"
    box.at_end(lambda: subprocess.run(["umount", "-l", str(customer.root)], capture_output=True))
    with Smtp(provider.inbound) as line:
        line.hello()
        for number in range(2):
            reply = line.send("a@sender.example", ["eva@example.org"], f"Subject: {number}\r\n\r\n".encode() + LARGE)
            check(reply.startswith("250"), reply)
    ballast = customer.root / "ballast"
    # No octet is free, so not even a lock can be made; then the 4 MiB that the program reserves; then room for one message.
    for octets, held in ((8 << 20, 2), ((4 << 20) - 100_000, 2), ((4 << 20) - 400_000, 1)):
        subprocess.run(["sh", "-c", f"head -c {octets} /dev/zero > {ballast}"], capture_output=True)
        for quiet in ([], ["-q"]):
            done = subprocess.run([ODMR, "pull", "-c", customer.config, *quiet], capture_output=True, text=True)
            check(done.returncode == 75, f"{octets}: exit {done.returncode}: {done.stdout}{done.stderr}")
            lines = [line for line in done.stdout.splitlines() if line.startswith("from <a@sender.example> to ")]
            full = "odmr: " in done.stderr and "No space left" in done.stderr
            check(full or len(lines) == len(provider.held()), f"{octets}: {done.stdout}{done.stderr}")
            check(all(": deferred by us: 452 4.3.1 " in line for line in lines), f"{octets}: {done.stdout}")
        check(len(provider.held()) == held, f"{octets}: {len(provider.held())} are held")
        # From now on the lock can be made.
        ballast.unlink()
        (customer.root / ".odmr").mkdir(exist_ok=True)
    check((result := customer.pull()) == 0, f"pull with room: exit {result}: {customer.log()}")
    check(not provider.held() and len(customer.files()) == 2, f"{customer.files()}")
