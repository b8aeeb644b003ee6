"""Messages a second, of odmr and of a Postfix on the same machine and disk. It prints figures and checks no speed."""

import os
import select
import socket
import threading
import time

from harness import LOOPBACK, Customer, Provider, Smtp, check, free_port, scenario, wait_until
from postfix import Postfix

COUNT = 2000
SIZE = 4096  # octets of content
SENDERS = 8  # connections of the client that fills a queue
MANY = 20  # connections of Postfix to one destination, its default


def fill(box, port, recipient):
    """Sends all messages over SENDERS connections. Returns the messages accepted a second."""
    begin = time.monotonic()
    done = box.run("smtp-source", "-s", SENDERS, "-m", COUNT, "-l", SIZE, "-f", "bob@sender.example", "-t", recipient, f"{LOOPBACK}:{port}", seconds=120)
    check(done.returncode == 0, f"smtp-source: {done.stdout}{done.stderr}")
    return COUNT / (time.monotonic() - begin)


def sink(box):
    """A server that replies 250 and discards: it costs both programs the same. Returns its port."""
    port = free_port()
    box.start("sink.log", "smtp-sink", "-u", "nobody", f"{LOOPBACK}:{port}", 1000)

    def listens():
        with socket.socket() as line:
            return line.connect_ex((LOOPBACK, port)) == 0

    wait_until(listens, "smtp-sink")
    return port


def pump(one, other):
    """Carries octets in both directions until one side closes, as fetchmail does after the turn."""
    ends = {one: other, other: one}
    while True:
        for ready in select.select(list(ends), [], [])[0]:
            octets = ready.recv(1 << 18)
            if not octets:
                return
            ends[ready].sendall(octets)


def over_a_turn(provider, port):
    """Messages a second from the reply to ATRN to the end, over one connection into the sink."""
    with Smtp(provider.odmr) as line, socket.create_connection((LOOPBACK, port)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.turn("acme")
        begin = time.monotonic()
        server.sendall(bytes(line.received))
        pump(line.socket, server)
    wait_until(lambda: not provider.held(), "the queue to be empty")
    return COUNT / (time.monotonic() - begin)


def of_postfix(box, port):
    """Messages a second that a Postfix accepts; and that it sends into the sink over one connection, then over MANY."""
    inbound = free_port()
    postfix = Postfix(
        box,
        f"""transport_maps = inline:{{ one.example=one:[{LOOPBACK}]:{port}, many.example=many:[{LOOPBACK}]:{port} }}
one_destination_concurrency_limit = 1
one_initial_destination_concurrency = 1
many_destination_concurrency_limit = {MANY}
many_initial_destination_concurrency = {MANY}
mynetworks = {LOOPBACK}/32
smtpd_recipient_restrictions = check_client_access static:hold, permit_mynetworks, reject
smtp_tls_security_level = none
queue_run_delay = 1h""",
        f"one unix - - n - - smtp\nmany unix - - n - - smtp\n{LOOPBACK}:{inbound} inet n - n - - smtpd\n",
    )
    files = lambda *names: sum(len(files) for name in names for _, _, files in os.walk(box.path / "queue" / name))
    figures = []
    for domain in ("one.example", "many.example"):
        figures.append(fill(box, inbound, f"eva@{domain}"))
        check(files("hold") == COUNT, f"{files('hold')} messages in Postfix's queue")
        done = box.run("postsuper", "-c", postfix.directory, "-H", "ALL")
        check(done.returncode == 0 and files("deferred") == COUNT, f"postsuper: {done.stderr}")
        begin = time.monotonic()
        done = box.run("postqueue", "-c", postfix.directory, "-f")
        check(done.returncode == 0, f"postqueue: {done.stderr}")
        wait_until(lambda: not files("deferred", "incoming", "active"), "Postfix's queue to be empty", seconds=120)
        figures.append(COUNT / (time.monotonic() - begin))
    accepted, one, _, many = figures
    return accepted, one, many


@scenario("speed", needs=["postfix", "smtp-sink", "smtp-source"], root=True)
def speed(box):
    """Measures 2,000 messages of 4 KiB a second: accepted, sent after a turn into smtp-sink, fetched by odmr pull; with the figures of a Postfix"""
    port = sink(box)
    provider = Provider(box, require_tls=False).start()
    accepted = fill(box, provider.inbound, "eva@example.org")
    check(len(provider.held()) == COUNT, f"{len(provider.held())} held")
    turned = over_a_turn(provider, port)
    fill(box, provider.inbound, "eva@example.org")
    customer = Customer(box, provider.odmr, tls="none")
    begin = time.monotonic()
    check((code := customer.pull(120)) == 0, f"pull: exit {code}")
    pulled = COUNT / (time.monotonic() - begin)
    check(len(customer.files()) == COUNT, f"{len(customer.files())} came")
    provider.stop()
    by_postfix = of_postfix(box, port)
    return (
        f"messages a second: odmr accepts {accepted:.0f}, Postfix {by_postfix[0]:.0f}; into a sink odmr sends {turned:.0f} over one "
        f"turned connection, Postfix {by_postfix[1]:.0f} over one, {by_postfix[2]:.0f} over {MANY}; odmr pull stores {pulled:.0f}"
    )
