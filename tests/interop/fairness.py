"""Customers that are served at the same time: a fast one with much mail does not delay the others."""

import base64
import json
import os
import re
import socket
import statistics
import time

from harness import MIB, ODMR, Provider, Smtp, check, events, scenario, wait_until

MANY = 100_000
LARGE = 800
RUNS = 3  # of each measurement
CALLS = 15  # of the third customer in one run
ROUND_TRIP = 0.02
RATE = 20_000  # octets a second over the slow connection
SLOW = 3
SLOW_SIZE = 2000
LINE = b"x" * 76 + b"\n"
END = b"\r\n.\r\n"

LIMITS = "[limits]\nconnections = 100\nconnections-per-address = 100\n"


def put(provider, domain, count, size, first=0):
    """Puts messages into a queue as another delivery agent does."""
    new = provider.spool / "domains" / domain / "new"
    new.mkdir(parents=True, exist_ok=True)
    (new.parent / "cur").mkdir(exist_ok=True)
    head = f"Return-Path: <a@b.example>\nDelivered-To: eva@{domain}\n\nSubject: x\n\n".encode()
    text = head + LINE * max(1, size // len(LINE))
    now = int(time.time())
    for number in range(first, first + count):
        with open(new / f"{now}.Q{number}.agent", "wb") as file:
            file.write(text)


def receive(line, *, pause=0.0, rate=None):
    """The customer's half of a turned session; it discards the content. Over a slow connection it reads `rate` octets a
    second, and its
    replies need a round trip. Returns the number of messages."""
    sock, received = line.socket, bytearray(line.received)
    messages, in_content = 0, False

    def say(text):
        if pause:
            time.sleep(pause)
        sock.sendall(text)

    say(b"220 mail.example ready\r\n")
    while True:
        replies = []
        while (at := received.find(END if in_content else b"\r\n")) >= 0:
            command = b"." if in_content else bytes(received[:4]).upper()
            del received[: at + (len(END) if in_content else 2)]
            if in_content:
                in_content = False
                messages += 1
                replies.append(b"250 2.6.0 ok\r\n")
            elif command == b"EHLO":
                replies.append(b"250-mail.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n")
            elif command == b"DATA":
                in_content = True
                replies.append(b"354 go ahead\r\n")
            elif command == b"QUIT":
                say(b"".join(replies) + b"221 2.0.0 bye\r\n")
                return messages
            else:
                replies.append(b"250 2.0.0 ok\r\n")
        if replies:
            say(b"".join(replies))
        if in_content and len(received) > len(END):
            del received[: -len(END)]
        some = sock.recv(256 if rate else MIB)
        check(some, "the provider has closed")
        if rate:
            time.sleep(len(some) / rate)
        received += some


def call(provider, name, **how):
    """One call. Returns its duration in seconds, and the messages."""
    begun = time.monotonic()
    with Smtp(provider.odmr, receive_buffer=4096 if how else None, seconds=120) as line:
        line.turn(name)
        messages = receive(line, **how)
        # The lock is released before the connection ends.
        line.socket.recv(1)
    return time.monotonic() - begun, messages


def in_process(work):
    """Runs work in another process, so that it does not delay this one. Returns its id, and a function that waits for its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)

    def wait():
        check(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a customer has failed")

    return pid, wait


def is_running(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def measure(provider, busy=lambda: True):
    """The times of three messages over a slow connection, and of calls of a third customer during that; medians."""
    slow, third = [], []
    for run in range(RUNS):
        put(provider, "slow.example", SLOW, SLOW_SIZE, first=run * SLOW)
        begun = time.monotonic()
        _, wait = in_process(lambda: call(provider, "slow", pause=ROUND_TRIP, rate=RATE))
        for number in range(CALLS):
            put(provider, "third.example", 1, 1000, first=run * CALLS + number)
            seconds, messages = call(provider, "third")
            check(messages == 1, f"{messages} messages of the third customer")
            third.append(seconds)
            if not busy():
                break
        wait()
        if not busy():
            break
        slow.append(time.monotonic() - begun)
    check(slow, "the fast customer was done before the slow one")
    return statistics.median(slow), statistics.median(third), max(third)


def beside(box, count, size, about):
    customers = {name: [f"{name}.example"] for name in ("fast", "slow", "third")}
    provider = Provider(box, require_tls=False, customers=customers, more=LIMITS).start()
    alone = measure(provider)
    put(provider, "fast.example", count, size)
    begun = time.monotonic()

    def fetch():
        messages = call(provider, "fast")[1]
        check(messages == count, f"{messages} of {count}")

    pid, wait = in_process(fetch)
    wait_until(lambda: events(provider.log(), "turned", account="fast"), "the fast customer's turn", seconds=30)
    both = measure(provider, lambda: is_running(pid))
    rest = time.monotonic() - begun
    wait()
    fast = time.monotonic() - begun
    facts = (
        f"{about} in {fast:.1f} s; {SLOW} messages on a slow line {alone[0]:.2f} s alone, {both[0]:.2f} s with the fast one; "
        f"a third customer's call {alone[1] * 1000:.1f} ms alone, {both[1] * 1000:.1f} ms with the fast one (at most "
        f"{both[2] * 1000:.0f}), measured for {rest:.1f} s"
    )
    check(both[0] < alone[0] * 1.2 + 0.2, f"the slow line is delayed: {facts}")
    check(both[1] < alone[1] + 0.1, f"the third customer is delayed: {facts}")
    return facts


@scenario("fair-small")
def fair_small(box):
    """One customer gets 100,000 small messages over a fast connection: three messages over a slow one and a third customer's calls are not delayed"""
    return beside(box, MANY, 500, f"{MANY} small messages")


@scenario("fair-large")
def fair_large(box):
    """One customer gets messages of 1 MiB over a fast connection: three messages over a slow one and a third customer's calls are not delayed"""
    return beside(box, LARGE, MIB, f"{LARGE} messages of 1 MiB")


@scenario("min-interval")
def min_interval(box):
    """A call before min-interval is over gets the same reply from serve, from inetd and after a restart; the record and the status are checked"""
    customers = {"acme": ["example.org", "example.com"], "beta": ["example.edu"]}
    accounts = {"acme": 'min-interval = "10m"'}
    provider = Provider(box, require_tls=False, customers=customers, accounts=accounts).start()
    record = provider.spool / ".odmr/call-acme"

    def atrn(line, name="acme", domains=""):
        line.hello()
        line.log_in(name)
        return line.say(f"ATRN {domains}".strip())

    def over_inetd():
        near, far = socket.socketpair()
        box.start("inetd.log", ODMR, "serve", "-c", provider.config, "--inetd", "odmr", stdin=far, stdout=far)
        far.close()
        line = Smtp.__new__(Smtp)
        line.socket, line.received = box.keep(near), bytearray()
        near.settimeout(30)
        return line

    def seconds(reply):
        check(reply.startswith("450 4.7.0 "), reply)
        left = int(reply.rsplit(maxsplit=2)[1])
        check(590 <= left <= 600, reply)
        return left

    check((reply := atrn(Smtp(provider.odmr))).startswith("453"), reply)
    before = record.read_text()
    first = seconds(atrn(Smtp(provider.odmr)))
    # It does not count as the last call, and does not extend the time.
    put(provider, "example.org", 1, 1000)
    check(seconds(atrn(over_inetd())) <= first, "inetd has prolonged the time")
    line = Smtp(provider.odmr)
    line.hello()
    line.want("334", "AUTH CRAM-MD5")
    line.want("535", base64.b64encode(b"acme " + b"0" * 32).decode())
    provider.restart_by_force()
    seconds(atrn(Smtp(provider.odmr), domains="example.org"))
    check(record.read_text() == before, f"the record was {before}, and is {record.read_text()}")
    check((reply := atrn(Smtp(provider.odmr), "beta")).startswith("453"), reply)
    check((reply := atrn(Smtp(provider.odmr), "beta")).startswith("453"), reply)

    status = box.run(ODMR, "status", "-c", provider.config)
    check("no-mail; next call permitted in " in status.stdout, status.stdout)
    status = json.loads(box.run(ODMR, "status", "-c", provider.config, "--format", "json").stdout)
    permitted = {account["account"]: account["next_call_permitted"] for account in status["accounts"]}
    check(permitted["acme"] and permitted["beta"] is None, f"{permitted}")
    warned = box.run(ODMR, "status", "-c", provider.config, "--warn", "1h")
    check((warned.returncode, warned.stdout) == (0, ""), f"{warned}")

    # After the interval: first by a clock that has advanced, then by a clock that was set back.
    for at in ("2026-01-02T03:04:05Z", "2099-01-02T03:04:05Z"):
        record.write_text(re.sub("(?m)^no-mail=.*$", f"no-mail={at}", before))
        messages = call(provider, "acme")[1]
        check(messages == 1, f"{messages} messages")
        # The record is written after the connection has ended.
        after = wait_until(lambda: "result=done" in (text := record.read_text()) and text, "the record of the call")
        check(f"no-mail={at}" in after, f"a call with mail has changed the time of the one without: {after}")
        put(provider, "example.org", 1, 1000, first=1)
