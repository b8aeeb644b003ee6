"""Connections of clients that do not speak SMTP: the server replies or closes, logs one line, and serves the next client."""

import os
import socket
import ssl
import time

from harness import LOOPBACK, MIB, PATIENCE, Customer, Provider, Smtp, check, scenario, wait_until

HTTP = b"GET / HTTP/1.1\r\nHost: relay.example.net\r\nUser-Agent: curl/8\r\n\r\n"


def client_hello():
    """A real one, as a browser sends it to a wrong port."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="relay.example.net")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def visit(port, octets, wait_greeting, may_stay):
    """Sends, and returns the octets that came, and whether the server has closed the connection. `may_stay`: whether it may leave
    the connection open after these octets."""
    end = time.monotonic() + PATIENCE
    with socket.create_connection((LOOPBACK, port), timeout=15) as sock:
        got = b""
        try:
            if wait_greeting:
                got += sock.recv(4096)
            sock.sendall(octets)
        except (ConnectionError, TimeoutError):
            pass  # the server may close the connection before all is sent; its reply is still read
        sock.settimeout(0.5)  # a listener may leave the connection open after a 5xx
        while True:
            try:
                while some := sock.recv(65536):
                    got += some
                return got, True
            except ConnectionError:
                return got, True
            except TimeoutError:
                if may_stay(got) or time.monotonic() > end:
                    return got, False


def is_rejected(got):
    """Whether a reply after the greeting is negative."""
    return any(reply[:1] in (b"4", b"5") for reply in got.split(b"\r\n")[1:-1])


@scenario("not-smtp")
def not_smtp(box):
    """HTTP, a TLS hello on a clear port, 10 MB without a line end, NULs and noise, on both listeners: serve closes the connection and goes on"""
    provider = Provider(box, require_tls=False).start()
    visits = {
        "http": HTTP,
        "tls": client_hello(),
        "endless": b"A" * (10 * MIB),
        "nul": b"\0" * 5000 + b"\r\n",
        "nul-line": b"NOOP\0\0\r\n",
        "noise": os.urandom(20000).replace(b"\n", b"") + b"\r\n",
        "lf": b"EHLO x\nMAIL FROM:<a@b.example>\n",
        "silent": b"",
    }
    must_close = {"http", "tls"}
    facts = []
    for where, port in (("inbound", provider.inbound), ("odmr", provider.odmr)):
        for name, octets in visits.items():
            for wait_greeting in (True, False):
                before = len(provider.log())
                begin = time.monotonic()
                may_stay = lambda got: name not in must_close and (name in ("silent", "lf") or is_rejected(got))
                got, closed = visit(port, octets, wait_greeting, may_stay)
                what = f"{name} on {where}"
                replies = got.split(b"\r\n")[1:-1]  # after the greeting
                check(provider.process.poll() is None, f"{what}: the provider died")
                check(closed or name not in must_close, f"{what}: not closed, replied {got[:200]!r}")
                check(closed or is_rejected(got) or name in ("silent", "lf"), f"{what}: neither closed nor answered: {got[:200]!r}")
                if name == "lf":
                    check(not any(reply[:1] == b"2" for reply in replies), f"{what}: a bare LF ended a command: {got!r}")
                check(len(got) < 20000, f"{what}: {len(got)} octets of answer")
                wait_until(lambda: len(provider.log()) > before, f"{what}: a log line")
                if name == "endless" and wait_greeting:
                    answer = (replies or [b"close"])[-1][:9].decode()
                    facts.append(f"10 MB on {where}: {answer} in {time.monotonic() - begin:.1f} s")
        # The same, but the client closes the connection before the reply.
        for octets in (b"EHLO", b"EHLO x\r\nMAIL FROM:<", HTTP[:7], client_hello()[:50], b"EHLO x\r\nAUTH CRAM-MD5\r\n"):
            with socket.create_connection((LOOPBACK, port), timeout=5) as sock:
                sock.sendall(octets)
    with Smtp(provider.inbound) as sender:
        sender.hello()
        check(sender.send("a@sender.example", ["eva@example.org"], b"Subject: x\r\n\r\nx\r\n")[:3] == "250", "sent")
    customer = Customer(box, provider.odmr, tls="none")
    check(customer.pull() == 0 and len(customer.files()) == 1, "the server does not work any more")
    with open(f"/proc/{provider.process.pid}/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    check(peak < 32 * 1024, f"peak of resident memory {peak} KiB")
    log = provider.log()
    check(max(map(len, log.splitlines())) < 4000, "an untrusted client can write very long log lines")
    clean = all(character.isprintable() or character == "\n" for character in log)
    check(clean, "an untrusted client can write control characters into the log")
    return f"{len(visits) * 4} visits; {'; '.join(facts)}; peak {peak / 1024:.1f} MiB"
