"""Customers that stall must not delay others: there is one delivery thread, and it never waits for one peer."""

import os
import statistics
import time

from harness import MIB, Provider, Server, Smtp, check, scenario, wait_until

STALLED = 100
MESSAGES = 100
ROUNDS = 7


def drop(provider, domain, size, name="1767323045.stall.local"):
    """Puts a message into the held Maildir, as another delivery agent would."""
    directory = provider.spool / "domains" / domain
    for part in ("tmp", "new", "cur"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    body = b"Return-Path: <a@sender.example>\nDelivered-To: eva@%s\nSubject: x\n\n" % domain.encode()
    line = b"x" * 76 + b"\n"
    (directory / "tmp" / name).write_bytes(body + line * (size // len(line)))
    (directory / "tmp" / name).rename(directory / "new" / name)


def good_round(provider):
    """Puts a hundred messages into the queue. Returns the time in which a good customer fetches them."""
    content = b"Subject: x\r\n\r\n" + (b"y" * 70 + b"\r\n") * 57  # 4 KiB
    with Smtp(provider.inbound) as sender:
        sender.hello()
        for number in range(MESSAGES):
            reply = sender.send(f"n{number}@sender.example", ["eva@good.example"], content)
            check(reply.startswith("250"), reply)
    begin = time.monotonic()
    with Smtp(provider.odmr) as line:
        line.turn("good")
        server = Server(line.socket, received=line.received)
        check(server.serve(), "no QUIT")
    seconds = time.monotonic() - begin
    check(len({message.sender for message in server.messages}) == MESSAGES, f"{len(server.messages)} messages came")
    return seconds


def stall(provider, number):
    """Turns the connection and then stalls in one of three ways. Returns the open connection."""
    manner = number % 3
    line = Smtp(provider.odmr, receive_buffer=4096 if manner == 2 else None)
    line.turn(f"stalled{number}")
    server = Server(line.socket, received=line.received, keywords=("SIZE",))
    server.say("220 mail.example.org ready to receive email")
    if manner == 0:  # no reply to EHLO
        return line
    check(server.until(b"\r\n")[:4] == b"EHLO", "no EHLO")
    if manner == 1:  # within a reply
        line.socket.sendall(b"250-mail.example.org\r\n250-foo")
        return line
    server.say("250 SIZE")  # within a large message: after 354 it does not read
    check(server.until(b"\r\n")[:4] == b"MAIL", "no MAIL")
    server.say("250 ok")
    check(server.until(b"\r\n")[:4] == b"RCPT", "no RCPT")
    server.say("250 ok")
    check(server.until(b"\r\n")[:4] == b"DATA", "no DATA")
    server.say("354 go ahead")
    return line


@scenario("stalled")
def stalled(box):
    """100 customers stall: the 101st gets its 100 messages in at most twice the time"""
    customers = {f"stalled{number}": [f"d{number}.stalled.example"] for number in range(STALLED)}
    provider = Provider(box, require_tls=False, customers=customers | {"good": ["good.example"]})
    for number in range(STALLED):
        drop(provider, f"d{number}.stalled.example", 8 * MIB if number % 3 == 2 else 1000)
    os.sync()  # these files must not be written during the measurement
    provider.start()
    good_round(provider)  # a first round, not measured
    alone = [good_round(provider) for _ in range(ROUNDS)]
    lines = [stall(provider, number) for number in range(STALLED)]
    for line in lines:
        box.keep(line.socket)
    time.sleep(0.5)  # the large ones fill the sockets
    crowded = [good_round(provider) for _ in range(ROUNDS)]
    with open(f"/proc/{provider.process.pid}/stat") as stat:
        before = sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13]))
    time.sleep(1)
    with open(f"/proc/{provider.process.pid}/stat") as stat:
        ticks = sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13])) - before
    one, other = min(alone), min(crowded)  # other work of the machine only adds time
    ratio = other / one
    facts = (
        f"alone {one * 1000:.0f} ms, with {STALLED} stalled {other * 1000:.0f} ms, ratio {ratio:.2f};"
        f" medians {statistics.median(alone) * 1000:.0f} and {statistics.median(crowded) * 1000:.0f} ms; idle CPU {ticks} %"
    )
    check(ratio <= 2.0 or other <= 0.5, facts)
    check(ticks <= 20, f"the stalled ones keep the processor busy: {facts}")
    # They disconnect: their mail is still held, and can be fetched.
    for line in lines:
        line.close()
    check(len(provider.held()) == STALLED, f"{len(provider.held())} messages of the stalled ones are left")

    def again():
        with Smtp(provider.odmr) as line:
            line.hello()
            line.log_in("stalled1")
            if not line.say("ATRN").startswith("250"):
                return False
            server = Server(line.socket, received=line.received)
            return server.serve() and len(server.messages) == 1

    wait_until(again, "a stalled customer comes back and gets its message")
    return facts

