"""The cost of many connections to the provider: memory and descriptors of each, idle or in the middle of a message."""

import os
import resource
import time

from harness import ODMR, Certificates, Customer, Provider, Smtp, at_rest, check, context, field, scenario, stuffed, wait_until
from world import outgoing_table

IDLE = 200
TURNED = 100
WARM = 20  # connections before those that are measured, so that buffers that are made only once are not counted
# KiB of resident memory for each connection: the measured value, and a half more
IDLE_CLEAR = 26
IDLE_TLS = 60
TURNED_CLEAR = 10
TURNED_TLS = 20
LIMITS = "[limits]\nconnections = 2000\nconnections-per-address = 2000\n"

HELD = 10  # queues of held mail that one message goes to
DOMAINS = HELD + 2
BEGUN = 40
BEGUN_MEMORY = 128
BEGUN_DESCRIPTORS = 3


def resident(provider):
    with open(f"/proc/{provider.process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def directory_size(provider, name):
    return len(os.listdir(f"/proc/{provider.process.pid}/{name}"))


class Costs:
    """Memory in KiB, descriptors and threads of each of the connections that are opened within the block."""

    def __init__(self, provider, count):
        self.provider, self.count = provider, count

    def measure(self):
        # The provider releases the resources of a connection shortly after its last reply.
        time.sleep(0.5)
        # A pass over the spool has some descriptors and threads for a moment: the least of several looks are those of the
        # connections.
        looks = []
        for _ in range(5):
            looks.append((directory_size(self.provider, "fd"), directory_size(self.provider, "task")))
            time.sleep(0.02)
        return resident(self.provider), *map(min, zip(*looks))

    def __enter__(self):
        self.before = self.measure()
        return self

    def __exit__(self, *_):
        costs = [(after - before) / self.count for before, after in zip(self.before, self.measure())]
        self.memory, self.descriptors, self.threads = costs


def many_files():
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    check(limit >= 1000, f"needs 1000 descriptors, and may have {limit}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


@scenario("idle")
def idle(box):
    """The cost of hundreds of idle connections, in clear and under TLS, before and after the turn: memory, descriptors and threads of each"""
    many_files()
    certificates, tls = Certificates(box), context()
    customers = {f"c{number}": [f"d{number}.example"] for number in range(2 * (WARM + TURNED))}
    provider = Provider(box, certificates=certificates, require_tls=False, customers=customers, more=LIMITS).start()
    with open(f"/proc/{provider.process.pid}/limits") as limits:
        _, soft, hard = next(line for line in limits if line.startswith("Max open files")).rsplit(maxsplit=3)[:3]
    check(soft == hard, f"{soft} descriptors of {hard} are used")

    def greeted(port, *, secure=None):
        line = Smtp(port, tls=secure)
        box.keep(line.socket)
        line.hello()
        return line

    def with_starttls(port):
        line = greeted(port)
        line.start_tls(tls)
        box.keep(line.socket)

    def turned(number, secure):
        sender = Smtp(provider.inbound)
        sender.hello()
        reply = sender.send("a@b.example", [f"eva@d{number}.example"], b"Subject: x\r\n\r\n")
        check(reply.startswith("250"), reply)
        sender.close()
        line = Smtp(provider.odmr_tls if secure else provider.odmr, tls=secure and tls)
        box.keep(line.socket)
        line.turn(f"c{number}")

    kinds = [
        ("inbound", IDLE_CLEAR, lambda: greeted(provider.inbound)),
        ("odmr", IDLE_CLEAR, lambda: greeted(provider.odmr)),
        ("inbound STARTTLS", IDLE_TLS, lambda: with_starttls(provider.inbound)),
        ("odmr STARTTLS", IDLE_TLS, lambda: with_starttls(provider.odmr)),
        ("odmr-tls", IDLE_TLS, lambda: greeted(provider.odmr_tls, secure=tls)),
    ]
    facts, wrong = [], []
    for what, most, connect in kinds:
        [connect() for _ in range(WARM)]
        with Costs(provider, IDLE) as each:
            [connect() for _ in range(IDLE)]
        facts.append(f"{what} {each.memory:.0f}")
        wrong += [facts[-1]] if each.memory > most or each.descriptors > 1 else []
    for secure, most in ((False, TURNED_CLEAR), (True, TURNED_TLS)):
        first = secure * (WARM + TURNED)
        [turned(first + number, secure) for number in range(WARM)]
        with Costs(provider, TURNED) as each:
            [turned(first + WARM + number, secure) for number in range(TURNED)]
        facts.append(f"turned {'TLS' if secure else 'clear'} {each.memory:.0f}")
        wrong += [facts[-1]] if each.memory > most or each.threads > 0.2 else []
    check(not wrong, f"too much: {', '.join(wrong)} KiB each, of {', '.join(facts)}")
    return f"KiB each: {', '.join(facts)}"


@scenario("copies")
def copies(box):
    """Messages to ten held domains: one file while the content arrives, all copies before the 250 or none, and 452 for an eleventh domain"""
    domains = [f"d{number}.example" for number in range(DOMAINS)]
    customers = {"acme": ["example.org"], "many": domains}
    accounts = {"acme": "relay = true"}
    provider = Provider(box, require_tls=False, customers=customers, accounts=accounts, more=LIMITS).start()
    content = b"Subject: many\r\n\r\n" + (b"." + b"z" * 75 + b"\r\n") * 20_000
    wire = stuffed(content)

    def begin(some, expected):
        line = Smtp(provider.inbound)
        box.keep(line.socket)
        line.hello()
        group = ["MAIL FROM:<a@b.example>", *(f"RCPT TO:<eva@{domain}>" for domain in some), "DATA"]
        line.socket.sendall("".join(f"{command}\r\n" for command in group).encode())
        replies = [line.reply() for _ in group]
        check(all(map(str.startswith, replies, ["250 2.1.0", *expected, "354"])), f"{replies}")
        line.socket.sendall(wire[:100_000])
        return line

    def files(*directories):
        return [file for directory in directories for file in provider.spool.glob(f"domains/*/{directory}/*")]

    expected = ["250 2.1.5"] * HELD + ["452 4.5.3"] * (DOMAINS - HELD)
    [begin(domains, expected) for _ in range(WARM)]
    with Costs(provider, BEGUN) as each:
        lines = [begin(domains, expected) for _ in range(BEGUN)]
    facts = f"{each.memory:.0f} KiB and {each.descriptors:.1f} descriptors for each message under way"
    check(each.descriptors <= BEGUN_DESCRIPTORS and each.memory <= BEGUN_MEMORY, facts)
    begun = WARM + BEGUN
    wait_until(lambda: len(files("tmp")) >= begun, "a file of each message")
    check(len(files("tmp")) == begun and not files("new"), f"{len(files('tmp'))} files of {begun} messages, {files('new')}")
    for line in lines[2:]:
        line.close()
    for line, killed in ((lines[0], False), (lines[1], True)):
        if killed:
            provider.restart_by_force()
            [file.unlink() for file in files("tmp")]  # the killed process has left it for 36 hours
            line = begin(domains[HELD:], expected[: DOMAINS - HELD])
        line.socket.sendall(wire[100_000:])
        reply = line.reply()
        check(reply.startswith("250"), reply)
    held = {file.parent.parent.name: file.read_bytes() for file in files("new")}
    check(sorted(held) == sorted(domains) and not files("tmp"), f"held for {sorted(held)}, in tmp: {files('tmp')}")
    for domain, file in held.items():
        check(field(file, "Delivered-To") == f"eva@{domain}", f"{domain}: {file[:300]}")
        check(file.endswith(b"\n" + at_rest(content)), f"{domain}: other content, {len(file)} octets")
    size = sum(map(len, held.values()))
    check(size < (DOMAINS + 0.1) * len(content), f"{size} octets on the disk for {len(content)} in {DOMAINS} domains")
    # Our own client sends the rest at once, in another transaction.
    customer = Customer(box, provider.odmr, tls="none", more=outgoing_table(box))
    environment = os.environ | {"ODMR_CONFIG": str(customer.config)}
    words = [ODMR, "send", "-f", "alice@example.org", *(f"bert@{domain}" for domain in domains)]
    done = box.run(*words, input="Subject: more\n\nx\n", env=environment)
    check(done.returncode == 0, f"send: {done.stderr}")
    check((code := customer.pull()) == 0, f"pull: exit {code}")
    more = [file for file in files("new") if field(file.read_bytes(), "Subject") == "more"]
    check(len(more) == DOMAINS, f"{len(more)} of {DOMAINS} domains have it")
    return facts
