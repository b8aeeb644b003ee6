"""Crowds that hold as many connections as they get: a customer still gets its mail, and a sender is served, at once."""

import collections
import heapq
import itertools
import os
import pathlib
import resource
import selectors
import socket
import ssl
import statistics
import sys
import time

from harness import LOOPBACK, Certificates, Customer, Provider, Smtp, check, context, events, scenario, thread_statuses, wait_until

DISPLACED = "it made room for other connections"
CROWD = 1500  # at each listener, which has room for 1000 by default
MANY, FEW = 100, 30  # addresses; each has at most 50 connections
PLACES = 1000 + 875 - 50  # about the number of untrusted clients at two listeners: an eighth of port 366 is reserved for customers
MOST_THREADS = 3100  # 1000 at each of three listeners, and those beyond the limit
ROUNDS = 5
SECONDS = 1.0  # within which each is served; the measured time is printed
PAUSE = 0.5  # before a client whose connection was closed connects again


def half_a_hello():
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = outgoing.read()
    return hello[: len(hello) // 2]


# For each kind of client: `first` is sent without waiting, each of `flights` after a reply, `again` every second after the
# connection. `returns`: it connects again after a close. `reads`: it reads replies.
Kind = collections.namedtuple("Kind", "first flights again returns reads", defaults=(b"", (), b"", False, True))
EHLO = b"EHLO untrusted.example\r\n"
LONG_HELP = b"HELP " + b"x" * 500 + b"\r\n"
KINDS = {
    "silent": Kind(),
    "trickle": Kind(again=b"x", returns=True),
    "ehlo": Kind(flights=(EHLO,)),
    "starttls": Kind(flights=(EHLO, b"STARTTLS\r\n"), returns=True),
    "half-a-hello": Kind(flights=(EHLO, b"STARTTLS\r\n", half_a_hello())),
    "tls-half-a-hello": Kind(first=half_a_hello(), returns=True),
    "noop": Kind(flights=(EHLO,), again=b"NOOP\r\n", returns=True),
    "unknown-recipients": Kind(flights=(EHLO, b"MAIL FROM:<a@b.example>\r\n"), again=b"RCPT TO:<eva@nowhere.example>\r\n", returns=True),
    "help": Kind(first=b"HELP\r\n" * 20_000),
    # The server ends its session after too many commands, and it does not read the replies.
    "deaf": Kind(first=LONG_HELP * 800, again=LONG_HELP * 10, reads=False),
}


class Client:
    """One client of a crowd."""

    def __init__(self, kind, port, source):
        self.kind, self.port, self.source = kind, port, source
        self.socket = None
        self.greeted = False  # or closed

    def connect(self, selector):
        self.flights = collections.deque(self.kind.flights)
        self.socket = socket.socket()
        if not self.kind.reads:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.bind((self.source, 0))
        self.socket.connect((LOOPBACK, self.port))
        self.socket.setblocking(False)
        if self.kind.reads:
            selector.register(self.socket, selectors.EVENT_READ, self)
        self.greeted |= bool(self.kind.first)
        self.send(self.kind.first)

    def hang_up(self, selector):
        if self.kind.reads:
            selector.unregister(self.socket)
        self.socket.close()
        self.socket, self.greeted = None, True

    def send(self, octets):
        """Returns whether the connection is still there."""
        try:
            self.socket.send(octets)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def receive(self):
        """Returns whether the connection is still there."""
        try:
            if not self.socket.recv(65536):
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.greeted = True
        return not self.flights or self.send(self.flights.popleft())


def crowd(port, addresses, counts):
    """Holds its connections until it is killed, or its parent has ended; `counts`: by kind. Reports when each client
    has got a reply or a
    close."""
    parent = os.getppid()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    kinds = [KINDS[kind] for kind, count in counts.items() for _ in range(count)]
    clients = [Client(kind, port, f"127.1.0.{1 + number % addresses}") for number, kind in enumerate(kinds)]
    selector, due, order, silent = selectors.DefaultSelector(), [], itertools.count(), True
    for number, client in enumerate(clients):
        client.connect(selector)
        heapq.heappush(due, (time.monotonic() + number / len(clients), next(order), client))
    while os.getppid() == parent:
        for key, _ in selector.select(0.01):
            if not key.data.receive():
                key.data.hang_up(selector)
        while due and due[0][0] < time.monotonic():
            client = heapq.heappop(due)[2]
            if client.socket is None and client.kind.returns:
                client.connect(selector)
            elif client.socket and client.kind.again and not client.send(client.kind.again):
                client.hang_up(selector)
            if client.socket or client.kind.returns:
                heapq.heappush(due, (time.monotonic() + (1.0 if client.socket else PAUSE), next(order), client))
        if silent and (not clients[0].kind.reads or all(client.greeted for client in clients)):
            silent = False
            print("all are there", flush=True)


def backlog(ports):
    """The number of connections that wait to be accepted."""
    sockets = (line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:])
    listening = (fields for fields in sockets if fields[3] == "0A" and int(fields[1].split(":")[1], 16) in ports)
    return sum(int(fields[4].split(":")[1], 16) for fields in listening)


class Siege:
    """A provider with default limits, and crowds at its listeners."""

    def __init__(self, box):
        self.box = box
        certificates = Certificates(box)
        customers = {"acme": ["example.org", "example.com"], "other": ["other.example"]}
        self.provider = Provider(box, certificates=certificates, customers=customers).start()
        self.customer = Customer(box, self.provider.odmr, authority=certificates.authority)
        self.number = 0

    def begin(self, port, addresses, **counts):
        name = f"crowd-{len(self.box.children)}.log"
        counts = [f"{kind.replace('_', '-')}={count}" for kind, count in counts.items()]
        process = self.box.start(name, sys.executable, __file__, port, addresses, *counts)
        wait_until(lambda: "all are there" in self.box.log(name), f"the crowd: {self.box.log(name)}", seconds=30)
        return process

    def end(self, crowds):
        for process in crowds:
            process.kill()
            process.wait()
            self.box.children.remove(process)
        wait_until(lambda: self.threads() < 50, "the threads of the crowd to end", seconds=20)

    def threads(self):
        return sum(1 for _ in thread_statuses(self.provider.process.pid))

    def await_calm(self):
        """Waits until the crowd has its connections, and their first commands have replies."""
        ports = (self.provider.inbound, self.provider.odmr, self.provider.odmr_tls)
        wait_until(lambda: self.threads() >= PLACES and not backlog(ports), "the connections to be accepted", seconds=30)
        ticks = lambda: sum(map(int, pathlib.Path(f"/proc/{self.provider.process.pid}/stat").read_text().split()[13:15]))

        def is_calm():
            before = ticks()
            time.sleep(0.2)
            return ticks() - before < 10

        wait_until(is_calm, "a moment in which the provider works for less than half of the time", seconds=30)

    def send(self):
        """Seconds until a message is accepted."""
        begin = time.monotonic()
        with Smtp(self.provider.inbound, source="127.0.0.2") as sender:
            sender.hello()
            self.number += 1
            reply = sender.send("a@b.example", ["eva@example.org"], f"Subject: {self.number}\r\n\r\n".encode())
            check(reply.startswith("250"), reply)
            return time.monotonic() - begin

    def fetch(self):
        """The seconds of a call that fetches all messages."""
        begin = time.monotonic()
        code = self.customer.start().wait()  # with a timeout it would poll every 50 ms
        seconds = time.monotonic() - begin
        fetched = len(self.customer.files())
        check(code == 0 and fetched == self.number, f"pull: exit {code}, {fetched} of {self.number} messages")
        return seconds

    def measure(self):
        """Milliseconds of a sender and of a customer's call: median, longest."""
        sent, fetched = zip(*((self.send(), self.fetch()) for _ in range(ROUNDS)))
        check(max(sent + fetched) < SECONDS, f"seconds to send {sent}, to fetch {fetched}")
        return " ".join(f"{1000 * statistics.median(times):.0f}/{1000 * max(times):.0f}" for times in (sent, fetched))

    def displaced(self, listener):
        return len(events(self.provider.log(), "closed", listener=listener, reason=DISPLACED))


@scenario("newcomers")
def newcomers(box):
    """1,000 silent and 500 slow clients at each listener, with default limits: a sender and a customer are served at once"""
    siege = Siege(box)
    facts = [f"alone {siege.measure()}"]
    # A client that sends its message slowly is not displaced.
    slow = Smtp(siege.provider.inbound, source="127.0.0.3")
    box.keep(slow.socket)
    slow.hello()
    for command in ("MAIL FROM:<slow@b.example>", "RCPT TO:<eva@other.example>"):
        slow.want("250", command)
    slow.want("354", "DATA")
    for addresses in (MANY, FEW):
        ports = (siege.provider.inbound, siege.provider.odmr)
        crowds = [siege.begin(port, addresses, silent=1000, trickle=500) for port in ports]
        slow.socket.sendall(b"X-Slow: line\r\n")
        siege.await_calm()
        facts.append(f"from {addresses} addresses {siege.measure()}")
        siege.end(crowds)
    slow.socket.sendall(b"\r\nx\r\n.\r\n")
    slow.want("250")
    counts = [siege.displaced(listener) for listener in ("inbound", "odmr")]
    check(min(counts) >= CROWD - 1000, f"displaced: {counts}")
    return f"ms median/longest to send, to fetch: {', '.join(facts)}; displaced {counts}"


def besiege(box, *crowds):
    """`crowds`: the kinds at the two listeners, and perhaps at the listener with implicit TLS."""
    siege = Siege(box)
    provider, facts = siege.provider, []
    for kinds in crowds:
        for addresses in (MANY, FEW):
            present = [siege.begin(port, addresses, **{kinds[0]: CROWD}) for port in (provider.inbound, provider.odmr)]
            if len(kinds) > 1:
                present.append(siege.begin(provider.odmr_tls, addresses, **{kinds[1]: CROWD}))
            kind = KINDS[kinds[0].replace("_", "-")]
            if kind.reads and not kind.returns:
                siege.await_calm()
            facts.append(f"{kinds[0]} from {addresses} {siege.measure()}")
            # The threads of displaced connections end, even if their clients do not read.
            wait_until(lambda: siege.send() and siege.threads() < MOST_THREADS, "threads to end", seconds=20, pause=1.0)
            siege.end(present)
    return f"ms median/longest to send, to fetch: {', '.join(facts)}"


@scenario("crowds-silent")
def crowds_silent(box):
    """Clients that are silent after EHLO, after STARTTLS or within a TLS handshake, from few addresses and from many, displace no sender or customer"""
    return besiege(box, ["ehlo"], ["starttls"], ["half_a_hello", "tls_half_a_hello"])


@scenario("crowds-busy")
def crowds_busy(box):
    """Clients that repeat NOOP, name unknown recipients only, or do not read, from few addresses and from many, displace no sender or customer"""
    return besiege(box, ["noop"], ["unknown_recipients"], ["deaf"])


@scenario("crowds-pipelined")
def crowds_pipelined(box):
    """3,000 clients send 20,000 HELP each in one write: a sender and a customer are served at the same time"""
    siege = Siege(box)
    ports = (siege.provider.inbound, siege.provider.odmr)
    begin = time.monotonic()
    for port in ports:
        siege.begin(port, FEW, help=CROWD)
    facts = siege.measure()
    closed = lambda: [len(events(siege.provider.log(), "closed", listener=name)) for name in ("inbound", "odmr")]
    wait_until(lambda: min(closed()) >= CROWD, "the ends of the crowd", seconds=30)
    return f"ms median/longest to send, to fetch: {facts}; closed {closed()} after {time.monotonic() - begin:.1f} s"


@scenario("crowds-descriptors")
def crowds_descriptors(box):
    """Silent clients use up all descriptors of the system limit: they are displaced for a sender and for a customer"""
    siege = Siege(box)
    before = siege.threads()
    limit = 250
    resource.prlimit(siege.provider.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    present = [siege.begin(siege.provider.inbound, MANY, silent=600)]
    facts = siege.measure()
    check(events(siege.provider.log(), "accept-failed"), "the descriptors were enough")
    siege.end(present)
    return f"ms median/longest to send, to fetch: {facts}; {before} threads before"


if __name__ == "__main__":
    wanted = dict(word.split("=") for word in sys.argv[3:])
    crowd(int(sys.argv[1]), int(sys.argv[2]), {kind: int(count) for kind, count in wanted.items()})
