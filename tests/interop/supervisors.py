"""inetd-style supervisors: one process for each connection, on descriptors of the supervisor."""

import socket
import time

from harness import LOOPBACK, ODMR, Certificates, Customer, Provider, Smtp, check, context, field, free_port, scenario, wait_until


def works(box, provider, certificates, inbound, odmr):
    """A message comes in and is fetched under STARTTLS through the two ports; the connection carries only SMTP."""
    for port in (inbound, odmr):
        wait_until(lambda: listens(port), f"port {port}")
    transcript = b""
    for port in (inbound, odmr):
        with socket.create_connection((LOOPBACK, port), timeout=10) as sock:
            sock.sendall(b"EHLO x.example\r\nNONSENSE\r\nNOOP\r\nQUIT\r\n")
            heard = b""
            while some := sock.recv(4096):
                heard += some
        check(heard.startswith(b"220 "), f"the connection begins with {heard[:80]!r}")
        for line in heard.splitlines(keepends=True):
            check(line[:3].isdigit() and line[3:4] in b" -" and line.endswith(b"\r\n"), f"not a reply: {line!r}")
        check(b"\r\n221 " in heard, f"no end in {heard!r}")
        transcript += heard
    with Smtp(inbound) as sender:
        sender.hello()
        sender.start_tls(context(certificates.authority))
        check(sender.send("a@sender.example", ["eva@example.org"], b"Subject: x\r\n\r\nthrough\r\n")[:3] == "250", "sent")
        ours = sender.socket.getsockname()
        sender.want("221", "QUIT")
    check(len(provider.held()) == 1, f"{len(provider.held())} files held")
    trace = field(provider.held()[0].read_bytes(), "Received")
    check(f"[{ours[0]}]" in trace, f"the peer's address is not in {trace!r}")
    customer = Customer(box, odmr, authority=certificates.authority)
    begin = time.monotonic()
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    seconds = time.monotonic() - begin
    check(len(customer.files()) == 1 and not provider.held(), "the message did not come")
    check(b"\n\nthrough\n" in customer.files()[0].read_bytes(), "not the message")
    check((result := customer.pull()) == 0, f"pull without mail: exit {result}")
    return f"pull {seconds * 1000:.0f} ms"


def listens(port):
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
        return True
    except OSError:
        return False


@scenario("tcpserver", needs=["tcpserver"])
def tcpserver(box):
    """tcpserver (ucspi-tcp): mail comes in by --inetd inbound, and is fetched by --inetd odmr under STARTTLS"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates)
    ports = {"inbound": free_port(), "odmr": free_port()}
    for listener, port in ports.items():
        serve = [ODMR, "serve", "-c", provider.config, "--inetd", listener]
        box.start(f"{listener}.log", "tcpserver", "-H", "-R", "-l", "relay.example.net", LOOPBACK, port, *serve)
    facts = works(box, provider, certificates, ports["inbound"], ports["odmr"])
    for listener in ports:
        check(LOOPBACK in box.log(f"{listener}.log"), f"no log on standard error of {listener}")
    return facts


@scenario("inetd", needs=["inetd"], root=True)
def inetd(box):
    """openbsd-inetd: mail comes in and is fetched under STARTTLS, where descriptor 2 is the connection too"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates)
    ports = {"inbound": free_port(), "odmr": free_port()}
    lines = [
        f"{LOOPBACK}:{port} stream tcp nowait root {ODMR} odmr serve -c {provider.config} --inetd {listener}\n"
        for listener, port in ports.items()
    ]
    box.start("inetd.log", "inetd", "-i", box.write("inetd.conf", "".join(lines)))
    return works(box, provider, certificates, ports["inbound"], ports["odmr"])
