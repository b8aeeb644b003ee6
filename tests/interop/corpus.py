"""Real messages, from the test data of Debian's packages, on each route through the program, octet for octet.

    down      a client sends to port 25; after the turn the customer delivers into a mailbox, and to a next hop by LMTP
    relay     the customer's mail server sends to port 366, RET=FULL; the relay sends to a remote host; a DSN comes back
    send      programs call `odmr send`, RET=HDRS; the same route
    bs        programs speak SMTP to `odmr send -bs`; the mail goes to a remote host
"""

import base64
import quopri
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

from harness import ODMR, Customer, Provider, Smtp, at_rest, check, field, scenario, wait_until
from hop import Hop
from packages import unpacked
from turning import SENDER
from world import RELAYS, House, Names, outgoing_table, queued

# Package -> the files that are messages. Libraries that read mail are tested with mail that is hard to read.
SOURCES = {
    "golang-github-jhillyerd-enmime-dev": ["**/testdata/*/*.raw", "**/testdata/encode/*.golden"],
    "libpython3.11-testsuite": ["**/test/test_email/data/msg_*.txt"],
    "mailman3": ["**/tests/data/*.eml"],
    "python3-django-hyperkitty": ["**/tests/testdata/*.txt"],
    "python3-django-mailman3": ["**/tests/testdata/*.txt"],
    "python3-flufl.bounce": ["**/tests/data/*.txt"],
    "spamassassin": ["**/examples/sample-*.txt"],
}
LARGEST = 64 * 1024
LONGEST_LINE = 998  # octets (RFC 5322 section 2.1.1)
ADAM, HOME = "adam@example.org", b"@example.org"
DESTINATION, HOP = "dest.example", "hop.example"
MX = "127.0.0.3"

KINDS = {
    "8-bit": lambda content: any(octet > 127 for octet in content),
    "with NUL": lambda content: b"\0" in content,
    "with a bare CR": lambda content: bool(BARE_CR.search(content)),
    "with long lines": lambda content: any(len(line) > LONGEST_LINE for line in content.split(b"\r\n")),
    "signed": lambda content: bool(SIGNED.search(split(at_rest(content))[0])),
}
BARE_CR = re.compile(rb"\r(?!\n)")
SIGNED = re.compile(rb"(?im)^(?:DKIM-Signature:|Content-Type:[ \t]*(?:\n[ \t]+)*multipart/signed)")
FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:[^\n]*\n(?:[ \t][^\n]*\n)*")
SEPARATORS = re.compile(rb"(?:>?From [^\n]*\n)*")


def on_the_wire(octets):
    """A file as content: lines end in CRLF, the last one too."""
    content = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return content if content.endswith(b"\r\n") else content + b"\r\n"


def corpus(box):
    """The files, each content once; and a note about packages that are not available."""
    found, directories = {}, unpacked(box, *SOURCES)
    for package, directory in directories.items():
        for pattern in SOURCES[package]:
            for path in sorted(directory.glob(pattern)):
                octets = path.read_bytes()
                if 0 < len(octets) <= LARGEST:
                    found.setdefault(on_the_wire(octets), octets)
    files = list(found.values())
    if files:
        # Kinds of messages that the test data lacks, made from real messages.
        long = max(files, key=len)
        files.append(b"X-Long: " + b"long " * 300 + b"\n" + files[0])
        # An address in UTF-8 without SMTPUTF8 in MAIL: such a message is also relayed without SMTPUTF8.
        files.append(b"From: <j\xc3\xb6rg@sender.example>\nSubject: undeclared\n\nx\n")
        files += [long + b"NUL \0 here\n", long + b"a bare \r here\n", long + b"z" * 1500 + b"\n"]
    missing = sorted(set(SOURCES) - set(directories))
    return files, f"; not there: {', '.join(missing)}" * bool(missing)


def split(file):
    """The header of a file at rest, and the rest, which begins with the blank line if there is one."""
    at = SEPARATORS.match(file).end()
    while field := FIELD.match(file, at):
        at = field.end()
    return file[:at], file[at:]


def fields(header):
    """The fields of a header: (name in lower case, octets)."""
    return [(one.group(1).lower(), one.group(0)) for one in FIELD.finditer(header, SEPARATORS.match(header).end())]


def after_trace(got, *names):
    """The content after the fields that odmr adds in front, each of them as often as it is in `names`."""
    at, left = 0, [name.lower().encode() for name in names]
    while (field := FIELD.match(got, at)) and field.group(1).lower() in left:
        left.remove(field.group(1).lower())
        at = field.end()
    check(not left, f"no {left} in front of {got[:300]!r}")
    return got[at:]


def difference(got, wanted):
    """The first difference of two contents; None: they are equal."""
    if got == wanted:
        return None
    at = next((at for at, (one, other) in enumerate(zip(got, wanted)) if one != other), min(len(got), len(wanted)))
    begin, end = max(0, at - 60), at + 60
    return f"at octet {at} of {len(wanted)}: {got[begin:end]!r} in place of {wanted[begin:end]!r}"


def passed_on(file):
    """The content that arrives of a relayed message: all of it. If the first line begins with white space, a blank line
    separates it
    from our fields."""
    return b"\n" + file if file[:1] in (b" ", b"\t") else file


def relayed(file):
    """The same for mail that a customer's server relays: without the trace of an earlier delivery and our own fields."""
    header, rest = split(file)
    begin = SEPARATORS.match(header).group(0)
    return passed_on(begin + b"".join(raw for name, raw in fields(header) if not ours(name)) + rest)


def ours(name):
    return name == b"return-path" or name.startswith(b"x-odmr-")


def read_by_send(octets):
    """The content as `odmr send` reads it: lines end in LF, CRLF or CR; mbox separators at the beginning are dropped."""
    file = re.sub(rb"\r*\n", b"\n", octets).replace(b"\r", b"\n")
    file = file[SEPARATORS.match(file).end() :]
    return file if file.endswith(b"\n") else file + b"\n"


def submitted(got, file, *, by_smtp=False):
    """The error in `got`, if it is not `file` as `odmr send` completes it; None: it is. Over SMTP odmr adds no From and
    leaves Bcc."""
    (got_header, got_rest), (header, rest) = split(got), split(file)
    # A header that ends without a blank line, or that is missing, gets one.
    if not rest.startswith(b"\n"):
        rest = b"\n" + rest
    if wrong := difference(got_rest or b"\n", rest):
        return f"body: {wrong}"
    signed = bool(SIGNED.search(header))
    dropped = lambda name: ours(name) or (name == b"bcc" and not by_smtp) or (name == b"content-length" and not signed)
    left = fields(got_header)
    for name, raw in fields(header):
        if not dropped(name):
            if not left or not same_field(raw, left.pop(0)[1], signed):
                return f"field {raw!r} in {got_header!r}"
    names = {name for name, _ in fields(header)}
    added = {name for name, _ in left}
    wanted = {b"date", b"message-id"} | ({b"from"} if not by_smtp else set())
    wanted -= names
    return None if added == wanted and len(left) == len(wanted) else f"added {left} to {header!r}"


def same_field(before, after, signed):
    """Whether a field is unchanged, or was completed: addresses by our domain, text by encoded words."""
    if before == after:
        return True
    return not signed and after.isascii() and plain(before) == plain(after)


def plain(field):
    """A field without the parts that completion may change: our domain, the form of its text, space and folding."""
    decoded = {b"b": base64.b64decode, b"q": lambda text: quopri.decodestring(text, header=True)}
    word = re.compile(rb"=\?[!->@-~]+\?([bqBQ])\?([!->@-~]*)\?=")
    field = word.sub(lambda found: decoded[found.group(1).lower()](found.group(2)), field)
    return re.sub(rb'[\s"\\]', b"", field.replace(HOME, b""))


class Picky(House):
    """Has no users with names that begin with "bad"."""

    def rejection(self, verb, line):
        if verb == "RCPT" and b"<bad" in line:
            return "550 5.1.1 no such user"
        return super().rejection(verb, line)


class Piped(Smtp):
    """Speaks to a program at the other end of a socket pair."""

    def __init__(self, sock):
        self.socket, self.received = sock, bytearray()
        sock.settimeout(30)


class Ways:
    """The corpus on its routes: down to a mailbox and a next hop, up by port 366 and by `odmr send`, and back in DSNs."""

    def __init__(self, box, files):
        self.box, self.files, self.contents = box, files, [on_the_wire(file) for file in files]
        self.house = Picky(box, address=MX, name="mx.dest.example")
        names = Names(box, mx={DESTINATION: [(1, "mx.dest.example")]}, hosts={"mx.dest.example": MX})
        relay = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {self.house.port}\n'
        customers = {"acme": ["example.org"], "hop": [HOP]}
        self.provider = Provider(box, require_tls=False, customers=customers, accounts=RELAYS, more=relay).start()
        self.hop = Hop(box.path / "hop.sock").start(box)
        more = f'deliver = "{self.hop.address}"\n'
        accept, outgoing = ["@example.org"], outgoing_table(box)
        self.acme = Customer(box, self.provider.odmr, tls="none", accept=accept, more=outgoing)
        self.hop_customer = Customer(
            box, self.provider.odmr, tls="none", name="hop", file="hop", accept=[f"@{HOP}"], more=more
        )
        self.rejected, self.faults = {}, []

    def fault(self, way, number, text):
        if text:
            self.faults.append(f"{way} {number}: {text}")

    def smtp(self, way, numbers, line, sender, recipients, parameters=""):
        """Sends these messages in one session; records the rejected ones."""
        with line:
            line.hello()
            if way == "relay":
                line.log_in("acme")
            for number in numbers:
                content = self.contents[number]
                body = " BODY=8BITMIME" * KINDS["8-bit"](content)
                to = [one.format(number) for one in recipients]
                reply = line.send(sender, to, content, body + parameters)
                if not reply.startswith("250"):
                    self.rejected[way, number] = reply
            line.want("221", "QUIT")

    def world_sends(self, numbers):
        self.smtp("down", numbers, Smtp(self.provider.inbound), SENDER, ["m{}@example.org", f"m{{}}@{HOP}"])

    def server_relays(self, numbers):
        recipients = [f"relay{{}}@{DESTINATION}", f"badrelay{{}}@{DESTINATION}"]
        self.smtp("relay", numbers, Smtp(self.provider.odmr), ADAM, recipients, " RET=FULL")

    def programs_speak_smtp(self, numbers):
        ours, theirs = socket.socketpair()
        words = [ODMR, "send", "-C", self.acme.config, "-bs"]
        with theirs:
            program = self.box.start(f"bs-{numbers.start}.log", *words, stdin=theirs, stdout=theirs)
        self.smtp("bs", numbers, Piped(ours), ADAM, [f"bs{{}}@{DESTINATION}"])
        check((result := program.wait(10)) == 0, f"-bs: exit {result}")

    def programs_send(self, numbers):
        for number in numbers:
            recipients = [f"{bad}send{number}@{DESTINATION}" for bad in ("", "bad")]
            words = [ODMR, "send", "-C", self.acme.config, "-i", "-f", ADAM, "-R", "hdrs", *recipients]
            done = subprocess.run(words, input=self.files[number], capture_output=True, timeout=30)
            self.fault("send", number, done.returncode and f"exit {done.returncode}: {done.stderr.decode()}")

    def go(self):
        """All routes at the same time. Returns the seconds until all messages were submitted."""
        every = range(len(self.files))
        with ThreadPoolExecutor(8) as pool:
            parts = [every[first::3] for first in range(3)]
            work = (self.world_sends, self.server_relays, self.programs_send, self.programs_speak_smtp)
            for done in [pool.submit(one, part) for one in work for part in parts]:
                done.result()
            self.check_rejected()
            for customer, code in [(one, pool.submit(one.pull)) for one in (self.acme, self.hop_customer)]:
                check(code.result() == 0, f"pull: exit {code.result()}: {customer.log()[-500:]}")
        check(not queued(self.acme), f"{len(queued(self.acme))} files wait to go out")
        dsns = 2 * len(self.files) - self.rejected_on("relay")
        up = dsns + len(self.files) - self.rejected_on("bs")
        wait_until(lambda: len(self.house.messages) >= up, f"{up} messages at the host", seconds=100)
        inbox = lambda: len(list(self.acme.root.glob("example.org/adam/new/*")))
        wait_until(lambda: inbox() + len(self.provider.held()) >= dsns, f"{dsns} DSNs", seconds=60)
        check((result := self.acme.pull()) == 0, f"pull: exit {result}")

    def rejected_on(self, way):
        return sum(one == way for one, _ in self.rejected)

    def check_rejected(self):
        """A bare CR gets 554, and no other message is rejected (RFC 5321 section 2.3.8)."""
        wanted = {number for number, content in enumerate(self.contents) if KINDS["with a bare CR"](content)}
        for way in ("down", "relay", "bs"):
            got = {number for one, number in self.rejected if one == way}
            check(got == wanted, f"{way}: rejected {[(n, self.rejected[way, n]) for n in got ^ wanted if n in got]}")
        check(all(reply.startswith("554 5.6.0 ") for reply in self.rejected.values()), f"{self.rejected}")

    def check_down(self):
        """The mailbox and the next hop."""
        mailboxes = {path.parent.parent.name: path.read_bytes() for path in self.acme.files()}
        messages = {recipient.split("@")[0]: at_rest(content) for _, recipient, content in self.hop.messages}
        for number, content in enumerate(self.contents):
            if ("down", number) in self.rejected:
                continue
            if missing := [place for place, found in (("mailbox", mailboxes), ("next hop", messages)) if f"m{number}" not in found]:
                self.fault("down", number, f"not in the {' and the '.join(missing)}")
                continue
            wanted = passed_on(at_rest(content))
            got = after_trace(mailboxes[f"m{number}"], "Return-Path", "Delivered-To", "Received", "Received")
            self.fault("mailbox", number, difference(got, wanted))
            self.fault("next hop", number, difference(after_trace(messages[f"m{number}"], "Received", "Received"), wanted))

    def check_up(self):
        """The remote host. Returns the messages that it has received, by the name of the recipient."""
        got = {message.recipients[0].split("@")[0]: at_rest(message.content) for message in self.house.messages}
        for number, content in enumerate(self.contents):
            if ("relay", number) not in self.rejected:
                came = after_trace(got[f"relay{number}"], "Received")
                self.fault("relay", number, difference(came, relayed(at_rest(content))))
            came = after_trace(got[f"send{number}"], "Received", "Received")
            self.fault("send", number, submitted(came, read_by_send(self.files[number])))
            if ("bs", number) not in self.rejected:
                came = after_trace(got[f"bs{number}"], "Received", "Received")
                self.fault("bs", number, submitted(came, read_by_send(content), by_smtp=True))
        return got

    def check_back(self, got):
        """The DSNs. Returns the number of those with the whole message."""
        dsns = {}
        for path in self.acme.root.glob("example.org/adam/new/*"):
            dsn = path.read_bytes()
            recipient = re.search(rb"(?m)^Final-Recipient: rfc822; (\w+)@", dsn).group(1)
            dsns[recipient.decode()] = dsn
        whole = 0
        for name, message in got.items():
            way = name.rstrip("0123456789")
            if way == "bs":
                continue
            text = returned(dsns[f"bad{name}"])
            seven = message.isascii() and b"\0" not in message and max(map(len, message.split(b"\n"))) <= LONGEST_LINE
            full = way == "relay" and seven
            whole += full
            self.fault("DSN", name, None if dsns[f"bad{name}"].isascii() else "it has 8-bit octets")
            if full:
                self.fault("DSN", name, difference(text, b"message/rfc822\n" + message))
            else:
                self.fault("DSN", name, difference(squeezed(text), squeezed(b"text/rfc822-headers\n" + split(message)[0])))
        return whole


def returned(dsn):
    """The type and the content of the third part of a DSN."""
    boundary = re.search(rb'boundary="([^"]+)"', dsn).group(1)
    third = dsn.split(b"\n--" + boundary)[3]
    header, _, content = third[1:].partition(b"\n\n")
    return field(header + b"\n\n", "Content-Type").encode() + b"\n" + content


def squeezed(header):
    """A header as a DSN returns it: each octet that is not printable ASCII is ?, and lines are folded anew."""
    return re.sub(rb"[^!->@-~]+", b"?", re.sub(rb"\s+", b"", header))


@scenario("corpus", needs=["dnsmasq", "apt-get", "dpkg-deb"])
def corpus_on_all_ways(box):
    """Real messages from Debian's packages on each route, octet for octet: port 25, turn, next hop, port 366, odmr send, DSN"""
    files, missing = corpus(box)
    if not files:
        return f"skipped{missing}"
    ways = Ways(box, files)
    ways.go()
    ways.check_down()
    got = ways.check_up()
    whole = ways.check_back(got)
    check(not ways.faults, f"{len(ways.faults)} faults: " + "; ".join(ways.faults[:5]))
    kinds = {kind: sum(map(holds, ways.contents)) for kind, holds in KINDS.items()}
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{len(files)} messages, {counts}; {whole} came back whole in a DSN{missing}"
