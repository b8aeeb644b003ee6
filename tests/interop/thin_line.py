"""A slow line: messages need more time than a session may last, in both directions, and none is lost."""

import pathlib
import re
import signal
import socket
import threading
import time

from harness import LOOPBACK, MIB, ODMR, Certificates, Customer, Provider, Smtp, check, events, hang_up, scenario, serve_each, wait_until

RATE = 3 * MIB  # of each connection, octets a second in each direction
LARGE = 18 * MIB
INCOMING = LARGE // 2
SMALL = 3


def thin_line(box, target):
    """A proxy that reads at RATE only, so that the sender must wait. Returns its port."""

    def carry(source, sink):
        try:
            while data := source.recv(16384):
                sink.sendall(data)
                time.sleep(len(data) / RATE)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            hang_up(source)
            hang_up(sink)

    def serve(near):
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        far.connect((LOOPBACK, target))
        down = threading.Thread(target=carry, args=(far, near), daemon=True)
        down.start()
        carry(near, far)
        down.join()
        near.close()
        far.close()

    listener, port = serve_each(box, serve)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    return port


def message(name, size):
    return f"Subject: {name}\r\n\r\n".encode() + (b"x" * 76 + b"\r\n") * (size // 78)


def names(files):
    found = (re.search(rb"(?m)^Subject: (\S+)", file.read_bytes()[:2000]) for file in files)
    return sorted(name.group(1).decode() for name in found)


def outgoing_names(provider):
    """None while the relay renames a file after an attempt."""
    try:
        return names(file for part in ("new", "cur") for file in pathlib.Path(provider.spool).glob(f"outgoing/*/{part}/*"))
    except FileNotFoundError:
        return None


@scenario("thin-line")
def run(box):
    """Messages that need more time than `session` and `turn` are sent; incoming mail does not wait for a long upload"""
    certificates = Certificates(box)
    times = '[timeouts]\nsession = "2s"\nturn = "2s"\n'
    provider = Provider(box, certificates=certificates, more=times, accounts={"acme": "relay = true"}).start()
    queue = box.path / "outgoing"
    customer = Customer(
        box,
        thin_line(box, provider.odmr),
        authority=certificates.authority,
        more=f'[outgoing]\nqueue = "{queue}"\n[timeouts]\nturn = "2s"\noutgoing = "1s"\n',
    )
    wanted = sorted(["large", *(f"small-{number}" for number in range(SMALL))])
    for name in wanted:
        large = name == "large"
        with Smtp(provider.inbound) as sender:
            sender.hello()
            reply = sender.send("a@sender.example", ["eva@example.org"], message(name, INCOMING if large else 1000))
            check(reply.startswith("250"), reply)
        content = message(name, LARGE if large else 1000)
        sent = box.run(ODMR, "send", "-C", customer.config, "-i", "-f", "eva@example.org", "x@dest.example", input=content.decode())
        check(sent.returncode == 0, sent.stderr)
    begin = time.monotonic()
    code = customer.pull(60)
    seconds = time.monotonic() - begin
    check(code == 0, f"pull: {code}")
    check(seconds > 4, f"the line was not thin: {seconds:.1f} s")
    received = names(customer.files())
    check(received == wanted, f"the customer has {received}")
    wait_until(lambda: outgoing_names(provider) == wanted, "all of it to be at the provider")
    check(not provider.held(), "mail is still held")
    log = customer.log()
    accepted, uploads = list(events(log, "accepted")), list(events(log, "delivery", via="provider"))
    check(len(accepted) == SMALL + 1 and len(uploads) == SMALL + 1, log)
    check(log.index("event=accepted") < log.rindex("via=provider"), "incoming mail waited for the upload")
    return f"{LARGE // MIB} MiB up and {INCOMING // MIB} MiB down in {seconds:.1f} s, sessions of 2 s"


@scenario("thin-line-one-connection")
def one_connection(box):
    """The provider permits one connection: incoming mail is fetched after a long upload; a call with a stopped upload fails"""
    limits = "[limits]\nconnections-per-address = 1\n"
    provider = Provider(box, require_tls=False, more=limits, accounts={"acme": "relay = true"}).start()
    with Smtp(provider.inbound) as sender:
        sender.hello()
        reply = sender.send("a@sender.example", ["eva@example.org"], message("in", 1000))
        check(reply.startswith("250"), reply)
    queue = box.path / "outgoing"
    more = f'[outgoing]\nqueue = "{queue}"\n[timeouts]\noutgoing = "1s"\n'
    customer = Customer(box, thin_line(box, provider.odmr), tls="none", more=more)
    send = ["send", "-C", customer.config, "-i", "-f", "eva@example.org", "x@dest.example"]
    sent = box.run(ODMR, *send, input=message("out", LARGE).decode())
    check(sent.returncode == 0, sent.stderr)
    stopped = customer.start()
    wait_until(lambda: "event=upload-continues" in customer.log(), "an upload that goes on")
    stopped.send_signal(signal.SIGTERM)
    check((code := stopped.wait(20)) == 75, f"stopped: exit {code}")
    check(not events(customer.log(), "session-ended-by-message"), "the message has not ended its session")
    wait_until(lambda: not customer.files() and customer.pull() == 0, "a call", seconds=30)
    check(names(customer.files()) == ["in"] and not provider.held(), f"received: {names(customer.files())}")
    return "received after the upload"
