"""The ledger: which messages were accepted, which have arrived, and the rules of the verdict.

A message has a number and a body that is made from the number, so that a file or content shows by itself whether it is
complete.
For each recipient of a message one of these must be true in the end, if the sender has got the 250: the message has
arrived, a DSN
about its failure has arrived, or it is still held. Such a DSN is wrong, unless the address does not exist.

If a receiving script cuts the connection before its reply to the content, the message has not arrived: it must be sent again.

The kill rule. A recipient may get a message twice only if one side of that delivery ended abruptly (`abrupt`: a process
killed, a
session broken off) within WINDOW of the arrival of an earlier copy, because the reply was on its way or not recorded
yet. One such
end explains at most IN_FLIGHT copies of each account, because no more messages of a session are under way or
unrecorded. A queue of
`odmr send` sends a message again if its upload ended so (`resends`): then the end may be at any time after the message
was queued.
"""

import collections
import re
import threading
import time

WINDOW = 15.0  # seconds, for a busy machine; a kill affects copies as long as sockets and slow readers have octets from before it
IN_FLIGHT = 24  # messages of one session that are sent and not recorded

LINE = 64
SOAK = re.compile(rb"(?m)^X-Soak: (\d+) (\d+)$")
OPEN = re.compile(rb"(?m)^Delivered-To: (\S+@\S+)$")  # a settled recipient has a control octet in place of its @


def body(number, size):
    """About `size` octets, with LF line ends, of which every fourth line begins with a dot."""
    lines = [(b"%s%d.%d " % (b"." * (row == 0), number, row)).ljust(LINE - 1, b"z") + b"\n" for row in range(4)]
    return b"".join(lines) * max(1, size // (4 * LINE))


def compose(number, size, sender, recipients):
    """A message as on the wire."""
    head = f"From: <{sender}>\nTo: {', '.join(f'<{one}>' for one in recipients)}\nSubject: soak {number}\n"
    head += f"Message-ID: <{number}@soak.example>\nDate: Fri, 2 Jan 2026 03:04:05 +0000\nX-Soak: {number} {size}\n\n"
    return (head.encode() + body(number, size)).replace(b"\n", b"\r\n")


class Ledger:
    """Thread-safe. Times are those of `time.time()`, as those of files."""

    def __init__(self):
        self.lock = threading.Lock()
        self.numbers = 0
        self.promised = {}  # (number, recipient) -> time of the 250
        self.arrivals = collections.defaultdict(list)
        self.returned = set()
        self.resends = set()
        self.ends = []  # (time, account; None: the provider, so all accounts)
        self.damaged = []

    def next_number(self):
        with self.lock:
            self.numbers += 1
            return self.numbers

    def promise(self, number, recipients, resends=False):
        with self.lock:
            self.promised.update(((number, one), time.time()) for one in recipients)
            if resends:
                self.resends.add(number)

    def abrupt(self, account=None):
        with self.lock:
            self.ends.append((time.time(), account))

    def arrive(self, octets, recipients, when=None):
        """Reads a file or content that a recipient has received: a DSN or a message."""
        found = self.read(octets)
        with self.lock:
            if found is None:
                self.damaged.append(repr(octets[-200:]))
                return
            number, failed = found
            if failed is not None:
                self.returned.update((number, one) for one in failed)
                return
            for one in recipients:
                self.arrivals[number, one].append(when or time.time())

    @staticmethod
    def read(octets):
        """(number, None) for a complete message, (number, failed recipients) for a DSN, None for anything else."""
        octets = octets.replace(b"\r\n", b"\n")
        head, _, content = octets.partition(b"\n\n")
        if about := SOAK.search(head):
            number, size = map(int, about.groups())
            return (number, None) if content == body(number, size) else None
        about = SOAK.search(content)
        if not about or b"multipart/report" not in head:
            return None
        groups = [group for group in content.split(b"\n\n") if b"\nAction: failed" in b"\n" + group]
        names = [re.search(rb"(?mi)^Final-Recipient: *[\w-]+; *(\S+)$", group) for group in groups]
        return int(about[1]), [name[1].decode() for name in names if name]

    def held_in(self, file):
        """The recipients for whom a file of a queue waits, and those in a waiting DSN."""
        try:
            octets = file.read_bytes()
        except OSError:
            return set()
        head, _, _ = octets.partition(b"\n\n")
        if about := SOAK.search(head):
            return {(int(about[1]), one.decode()) for one in OPEN.findall(head)}
        found = self.read(octets)
        return {(found[0], one) for one in found[1]} if found and found[1] else set()

    def missing(self, promised, held):
        """Accepted recipients whose message has neither arrived nor bounced, and is not held."""
        with self.lock:
            return [key for key in promised if key not in self.arrivals and key not in self.returned and key not in held]

    def bounced(self, may_return):
        """Accepted recipients whose message has bounced although they exist."""
        with self.lock:
            return [key for key in self.promised if key in self.returned and not may_return(key[1])]

    def duplicates(self, account_of):
        """(all duplicates, those that the kill rule permits, the keys of the others)."""
        extra, wrong, explained = 0, [], collections.Counter()
        with self.lock:
            for key, times in self.arrivals.items():
                extra += len(times) - 1
                account = account_of(key[1])
                for earlier in sorted(times)[:-1]:
                    begin = self.promised.get(key, 0) if key[0] in self.resends else earlier - WINDOW
                    ends = [end for end in self.ends if begin <= end[0] <= earlier + WINDOW]
                    # Mail that is sent again was interrupted on the way up: by a kill of the provider or of any customer.
                    ends = [end for end in ends if end[1] in (None, account) or key[0] in self.resends]
                    one = next((end for end in ends if explained[end, account] < IN_FLIGHT), None)
                    if one:
                        explained[one, account] += 1
                    else:
                        wrong.append(key)
        return extra, extra - len(wrong), wrong

    def counts(self):
        with self.lock:
            arrived = sum(key in self.arrivals for key in self.promised)
            copies = sum(len(times) - 1 for times in self.arrivals.values())
            return {
                "accepted": len(self.promised), "delivered": arrived, "returned": len(self.returned),
                "duplicated": copies, "abrupt ends": len(self.ends),
            }
