"""`odmr serve` and processes of `odmr serve --inetd` at the same time: the rate of an account, and the datagram that
wakes the relay."""

import contextlib
import fcntl
import os
import pathlib
import pwd
import signal
import socket
import statistics
import threading
import time

from clock import HOUR, YEAR, Clock
from harness import LOOPBACK, ODMR, Customer, Failed, Listener, Provider, Server, Smtp, check, events, free_port, scenario, wait_until
from world import outgoing_table, sendmail

RATE = 40
MESSAGE = b"Subject: x\r\n\r\nx\r\n"
RELAY = '[relay]\nsmarthost = "127.0.0.1:{port}"\nsmarthost-tls = "none"\n'


def line_to(box, provider, listener, **options):
    """A connection to a new process."""
    near, far = socket.socketpair()
    command = [ODMR, "serve", "-c", provider.config, "--inetd", listener]
    options = {"env": provider.environment} | options
    child = box.start("inetd.log", *command, stdin=far, stdout=far, **options)
    far.close()
    line = Smtp.__new__(Smtp)
    line.socket, line.received, line.process = near, bytearray(), child
    near.settimeout(30)
    line.hello()
    if listener == "odmr":
        line.log_in("acme")
    return line


def line_to_serve(provider):
    line = Smtp(provider.odmr)
    line.hello()
    line.log_in("acme")
    return line


def submit(line, to="u@elsewhere.example"):
    """The reply to one message; if MAIL or DATA was rejected, the reply to that."""
    for command in ("MAIL FROM:<eva@example.org>", f"RCPT TO:<{to}>", "DATA"):
        reply = line.say(command)
        if reply[0] not in "23":
            line.want("250", "RSET")
            return reply
    line.socket.sendall(MESSAGE + b".\r\n")
    return line.reply()


def fill(line):
    """The number of messages that are accepted before the first rejection."""
    with line:
        for accepted in range(10 * RATE):
            reply = submit(line, "eva@example.org")
            if not reply.startswith("250"):
                check(reply.startswith("452 4.3.2"), reply)
                return accepted
    return accepted


def fill_all(lines):
    """The same over several connections at once."""
    counts = [0] * len(lines)

    def one(number):
        counts[number] = fill(lines[number])

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(lines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return sum(counts)


def with_rate(box, rate=RATE, **options):
    return Provider(box, require_tls=False, accounts={"acme": f"rate = {rate}"}, **options)


def new_hour(provider):
    (provider.spool / ".odmr/rate-acme").write_text("1000000000 9 .\n")


@scenario("rate-processes")
def rate_processes(box):
    """The rate of an account is exact for 1, 3 and 16 processes of inetd, also together with serve, after reloads and with a damaged file"""
    provider = with_rate(box, more="[limits]\nconnections-per-address = 100\n")
    facts = []
    for inetd, serve in ((1, 0), (3, 0), (16, 0), (1, 1), (16, 16)):
        if serve and not provider.process:
            provider.start()
        if (provider.spool / ".odmr/rate-acme").exists():
            # A restart: the new process has only the file.
            provider.process and provider.restart_by_force()
            new_hour(provider)
        lines = [line_to(box, provider, "odmr") for _ in range(inetd)] + [line_to_serve(provider) for _ in range(serve)]
        accepted = fill_all(lines)
        check(accepted == RATE, f"{inetd} processes of inetd, {serve} lines to serve: {accepted} messages of {RATE}")
        facts.append(f"{inetd}+{serve}")
    # A reload.
    file = box.path / "serve-customers.d/acme.toml"
    text = file.read_text()
    for number, (rate, more) in enumerate(((RATE + 7, 7), (5, 0), (RATE + 9, 2)), 1):
        file.write_text(text.replace(f"rate = {RATE}", f"rate = {rate}"))
        provider.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(events(provider.log(), "reloaded")) == number, "the reload")
        lines = [line_to(box, provider, "odmr") for _ in range(3)] + [line_to_serve(provider) for _ in range(3)]
        check((accepted := fill_all(lines)) == more, f"{accepted} more messages after the reload with {rate}")
    # The file is damaged: serve uses the last count that it has read, a new process begins a new hour, and both continue.
    (provider.spool / ".odmr/rate-acme").write_bytes(os.urandom(5000))
    check((accepted := fill(line_to_serve(provider))) == 0, f"{accepted} messages after damage")
    wait_until(lambda: events(provider.log(), "rate-not-recorded", account="acme"), "the damage in the log")
    return f"{RATE} messages each with {', '.join(facts)} lines to inetd and serve"


@scenario("rate-not-accepted")
def rate_not_accepted(box):
    """A message that is not accepted does not count for the rate: after MAIL and RSET, or a connection lost in the content; parallel sessions get no more"""
    provider = with_rate(box, 3).start()
    for make in (lambda: line_to_serve(provider), lambda: line_to(box, provider, "odmr")):
        with make() as line:
            for _ in range(20):
                line.want("250", "MAIL FROM:<eva@example.org>")
                line.want("250", "RSET")
        for _ in range(8):
            with make() as line:
                line.want("250", "MAIL FROM:<eva@example.org>")
                line.want("250", "RCPT TO:<eva@example.org>")
                line.want("354", "DATA")
            wait_until(lambda: (provider.spool / ".odmr/rate-acme").read_text().split()[1] == "0", "the content given up")
    # Five sessions have passed MAIL before any message is complete.
    lines = [line_to_serve(provider) for _ in range(3)] + [line_to(box, provider, "odmr") for _ in range(2)]
    for line in lines:
        line.want("250", "MAIL FROM:<eva@example.org>")
        line.want("250", "RCPT TO:<eva@example.org>")
    replies = [line.say("DATA")[:3] for line in lines]
    check(replies == ["354"] * 3 + ["452"] * 2, f"{replies}")
    for line in lines:
        line.socket.close()


@scenario("rate-clock", needs=["faketime"])
def rate_clock(box):
    """The clock is set by a year, an hour, minutes and a second, forward and back: the rate is never exceeded within an hour, and never blocks for more than two"""
    clock = Clock(box)
    provider = with_rate(box, 3)
    provider.environment = clock.environment
    provider.start()
    facts = []

    def both():
        line = line_to(box, provider, "odmr")
        accepted = fill(line_to_serve(provider)) + fill(line)
        # At its end serve tidies the spool. By a clock that is a year ahead, all files there are old.
        line.process.wait(20)
        return accepted

    # If the clock is set back a little, as by NTP, the hour goes on; if by an hour or more, the hour is over.
    steps = [(0, 3), (60, 0), (59, 0), (-1, 0), (-600, 0), (HOUR + 60, 3), (HOUR, 0), (600, 0), (-600, 3)]
    steps += [(YEAR, 3), (YEAR + 59 * 60, 0), (0, 3), (-YEAR, 3), (0, 3)]
    for offset, wanted in steps:
        clock.set(offset)
        check((accepted := both()) == wanted, f"at {offset:+} s: {accepted} messages, not {wanted}")
        facts.append(f"{offset / HOUR:+.1f} h {accepted}")
    provider.stop()
    check(not events(provider.log(), "rate-not-recorded"), "an error in the log")
    return ", ".join(facts)


@scenario("rate-stopped")
def rate_stopped(box):
    """A stopped process has the lock, or the file is a directory: sessions of the account continue and count in memory; other accounts are not affected"""
    provider = with_rate(box, 3).start()
    file = provider.spool / ".odmr/rate-acme"
    check(fill(line_to_serve(provider)) == 3, "the rate")
    new_hour(provider)
    with open(file, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun = time.monotonic()
        check((accepted := fill(line_to_serve(provider))) == 0, f"{accepted} messages of an hour that serve knows")
        first = time.monotonic() - begun
        begun = time.monotonic()
        check((accepted := fill(line_to(box, provider, "odmr"))) == 3, f"{accepted} messages of a process that knows nothing")
        second = time.monotonic() - begun
        with Smtp(provider.inbound) as line:
            line.hello()
            took = []
            for _ in range(5):  # other work of the machine only adds time
                begun = time.monotonic()
                check((reply := line.send("a@b.example", ["eva@example.org"], MESSAGE)).startswith("250"), reply)
                took.append(time.monotonic() - begun)
            check(min(took) < 0.2, f"mail from the world waits: {took}")
    check(0.2 < first < 1.5 and 0.2 < second < 3, f"{first:.2f} and {second:.2f} s")
    failures = lambda: events(provider.log(), "rate-not-recorded")
    check(len(wait_until(failures, "the failure in the log")) == 1, f"{failures()}")
    file.unlink()
    file.mkdir()
    check(fill(line_to(box, provider, "odmr")) == 3, "a directory in place of the file")
    return f"{first:.2f} s by serve, {second:.2f} s by inetd for 3 messages"


def wake_socket(provider):
    return provider.spool / ".wake"


def relayed(house, count):
    return wait_until(lambda: len(house.messages) >= count and time.monotonic(), f"{count} messages", pause=0.002)


@scenario("wake")
def wake(box):
    """100 times: serve sends the mail that a process of inetd has stored, or a call fetches it, within a second; with SIGKILL and restarts between"""
    house = Listener(box)
    provider = Provider(box, require_tls=False, more=RELAY.format(port=house.port)).start()
    took, sent = [], 0
    for number in range(100):
        if number == 60:
            provider.restart_by_force()
        if number in (70, 80):
            check(provider.stop() == 0, "the end")
            check(not wake_socket(provider).exists(), "the socket stays")
            provider.box.children.remove(provider.process)
            provider.start()
        with line_to(box, provider, "odmr") as line:
            check((reply := submit(line)).startswith("250"), reply)
            begun, sent = time.monotonic(), sent + 1
            took.append(relayed(house, sent) - begun)
        check(took[-1] < 1, f"message {number}: {took[-1]:.2f} s")
    check(wake_socket(provider).stat().st_mode & 0o777 == 0o600, "the mode of the socket")
    # Held mail: a call directly after the 250 fetches it.
    for number in range(20):
        with line_to(box, provider, "inbound") as line:
            check((reply := line.send("a@b.example", ["eva@example.org"], MESSAGE)).startswith("250"), reply)
        with Smtp(provider.odmr) as line:
            line.turn("acme")
            customer = Server(line.socket, received=bytes(line.received))
            check(customer.serve() and len(customer.messages) == 1, f"{customer.messages}")
        wait_until(lambda: not provider.held(), "the end of the call")
    # Under load: all at once.
    begun = time.monotonic()

    def many():
        with line_to(box, provider, "odmr") as line:
            for _ in range(20):
                submit(line)

    threads = [threading.Thread(target=many, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    last = relayed(house, sent + 320) - begun
    check(len(house.messages) == sent + 320, f"{len(house.messages)} messages")
    return f"{statistics.median(took) * 1000:.0f} ms, at most {max(took) * 1000:.0f} ms; 320 by 16 processes in {last:.1f} s"


@scenario("wake-words")
def wake_words(box):
    """A process writes one word to .wake for outgoing mail, as do odmr queue and odmr expire, and none for held mail. No process waits for a serve that does not read"""
    provider = Provider(box, require_tls=False, accounts={"acme": 'expire-after = "1s"'})
    provider.spool.mkdir()
    listener = box.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    listener.bind(str(wake_socket(provider)))
    listener.settimeout(10)
    heard = lambda: listener.recv(100).decode()
    with line_to(box, provider, "odmr") as line:
        check(submit(line).startswith("250"), "outgoing mail")
        check((word := heard()) == "outgoing", word)
    with line_to(box, provider, "inbound") as line:
        # No word is written: the next ATRN reads the queue.
        check(line.send("a@b.example", ["eva@example.org"], MESSAGE).startswith("250"), "held mail")
    for words, wanted in ((["queue", "retry", "elsewhere.example"], "retry"), (["expire"], "outgoing")):
        time.sleep(1.1 if wanted == "outgoing" else 0)
        done = box.run(ODMR, words[0], "-c", provider.config, *words[1:])
        check(done.returncode == 0, f"{words}: {done.stderr}")
        check((word := heard()) == wanted, f"{words}: {word}")
    # The socket is not read.
    begun = time.monotonic()
    with line_to(box, provider, "odmr") as line:
        for _ in range(100):
            check((reply := submit(line)).startswith("250"), reply)
    return f"100 messages in {time.monotonic() - begun:.1f} s while the socket is not read"


@scenario("wake-places")
def wake_places(box):
    """Spool path of 150 octets, a directory in place of the socket, a second serve (exit code 75), datagrams of other programs, a flood of datagrams"""
    house = Listener(box)
    long = "a-spool-with-a-long-name-" * 5
    provider = Provider(box, require_tls=False, name=f"{long}x", more=RELAY.format(port=house.port))
    check(len(os.fsencode(wake_socket(provider))) > 150, "not long enough")
    provider.start()
    facts = []

    def one(text, most=1.0):
        before = len(house.messages)
        with line_to(box, provider, "odmr") as line:
            check((reply := submit(line)).startswith("250"), reply)
            begun = time.monotonic()
            took = relayed(house, before + 1) - begun
        check(took < most, f"{text}: {took:.2f} s")
        facts.append(f"{text} {took * 1000:.0f} ms")

    one("a long path")
    second = box.run(ODMR, "serve", "-c", provider.config)
    check(second.returncode == 75 and wake_socket(provider).exists(), f"{second}")
    one("after a second serve")
    # A flood by the same user, with invalid datagrams.
    os.chdir(provider.spool)
    stop = threading.Event()

    def flood():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as program:
            program.setblocking(False)
            while not stop.is_set():
                for text in (b"outgoing", b"retry", b"held", b"", b"\0" * 60000):
                    with contextlib.suppress(BlockingIOError):
                        program.sendto(text, ".wake")
                time.sleep(0.0005)

    spent = lambda: sum(map(int, pathlib.Path(f"/proc/{provider.process.pid}/stat").read_text().split()[13:15]))
    thread = threading.Thread(target=flood, daemon=True)
    before = spent()
    thread.start()
    time.sleep(2)
    busy = (spent() - before) / os.sysconf("SC_CLK_TCK") / 2
    one("in a flood")
    stop.set()
    thread.join()
    check(busy < 0.1, f"a flood takes {busy:.0%} of a processor")
    # Another user, if this process may change its user.
    if os.geteuid() == 0:
        code = "import socket,sys; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'retry', '.wake')"
        uid = pwd.getpwnam("nobody").pw_uid
        os.chmod(provider.spool, 0o755)
        done = box.run("python3", "-c", code, user=uid, group=uid, extra_groups=[])
        check("PermissionError" in done.stderr, f"another user: {done}")
    os.chdir("/")
    # Without a socket serve works as before, and logs the failure once.
    provider.stop()
    provider.box.children.remove(provider.process)
    wake_socket(provider).mkdir()
    provider.start()
    failures = lambda: events(provider.log(), "wake-failed")
    check(len(wait_until(failures, "the failure in the log")) == 1, f"{failures()}")
    with line_to(box, provider, "odmr") as line:
        check((reply := submit(line)).startswith("250"), reply)
    return f"{', '.join(facts)}; a flood takes {busy:.1%} of a processor"


def daemon_before(box, hop):
    """A customer whose daemon has no provider to call, and delivers to a next hop."""
    customer = Customer(
        box, free_port(), tls="none", accept=["@example.org"],
        more=f'deliver = "smtp:{LOOPBACK}:{hop.port}"\n[schedule]\nevery = "1h"\n{outgoing_table(box)}',
    )
    daemon = box.start(customer.log_name, ODMR, "pull", "--daemon", "-c", customer.config)
    wait_until((customer.root / ".wake").exists, "the socket")
    return customer, daemon


@scenario("wake-customer")
def wake_customer(box):
    """The daemon delivers mail that `odmr send` stores for a next hop within a second, and so after `odmr queue retry`"""
    hop = Listener(box)
    customer, daemon = daemon_before(box, hop)
    took = []
    for number in range(20):
        done = sendmail(box, customer, "-f", "carol@example.org", "alice@example.org", text="Subject: x\n\nx\n")
        begun = time.monotonic()
        check(done.returncode == 0, f"sendmail: exit {done.returncode}: {done.stderr}")
        took.append(relayed(hop, number + 1) - begun)
        check(took[-1] < 1, f"message {number}: {took[-1]:.2f} s")
    port = hop.port
    hop.close()
    sendmail(box, customer, "-f", "carol@example.org", "alice@example.org", text="Subject: x\n\nx\n")
    wait_until(lambda: events(customer.log(), "delivery", status="deferred"), "the deferral")
    hop = Listener(box)
    customer.config.write_text(customer.config.read_text().replace(f":{port}", f":{hop.port}"))
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: events(customer.log(), "reloaded"), "the reload")
    done = box.run(ODMR, "queue", "-c", customer.config, "retry", "example.org")
    begun = time.monotonic()
    check("1 message is due" in done.stdout, f"{done}")
    check((retried := relayed(hop, 1) - begun) < 1, f"after queue retry: {retried:.2f} s")
    daemon.terminate()
    check(daemon.wait(20) == 0 and not (customer.root / ".wake").exists(), "the socket stays")
    return f"{statistics.median(took) * 1000:.0f} ms, at most {max(took) * 1000:.0f} ms; {retried * 1000:.0f} ms after queue retry"


@scenario("wake-crowd")
def wake_crowd(box):
    """The relay sends outgoing mail within a second, while processes of inetd store more held mail than the socket has room for datagrams"""
    house = Listener(box)
    provider = Provider(box, require_tls=False, more=RELAY.format(port=house.port)).start()
    stop = threading.Event()

    def world():
        with line_to(box, provider, "inbound") as line:
            while not stop.is_set():
                line.send("a@b.example", ["eva@example.org"], MESSAGE)

    crowd = [threading.Thread(target=world, daemon=True) for _ in range(8)]
    for thread in crowd:
        thread.start()
    try:
        took = []
        for number in range(20):
            with line_to(box, provider, "odmr") as line:
                check((reply := submit(line)).startswith("250"), reply)
                begun = time.monotonic()
                took.append(relayed(house, number + 1) - begun)
            check(took[-1] < 1, f"message {number}: {took[-1]:.2f} s")
    finally:
        stop.set()
        for thread in crowd:
            thread.join(60)
    return f"{statistics.median(took) * 1000:.0f} ms, at most {max(took) * 1000:.0f} ms, with {len(provider.held())} messages on port 25"


class SlowToEnd(Listener):
    """Replies to QUIT after a delay."""

    def session(self, sock):
        class Slow(Server):
            def say(self, *lines):
                if lines[0].startswith("221"):
                    time.sleep(0.7)
                super().say(*lines)

        with sock:
            server = Slow(sock, **self.options)
            server.messages = self.messages
            with contextlib.suppress(OSError, Failed):
                server.serve()


@scenario("wake-customer-busy")
def wake_customer_busy(box):
    """The daemon delivers mail that `odmr send` stores while a session with the next hop is ending, at once after that session"""
    hop = SlowToEnd(box)
    customer, daemon = daemon_before(box, hop)
    took = []
    for number in range(1, 9):
        done = sendmail(box, customer, "-f", "carol@example.org", "alice@example.org", text="Subject: x\n\nx\n")
        begun = time.monotonic()
        check(done.returncode == 0, f"sendmail: exit {done.returncode}: {done.stderr}")
        took.append(relayed(hop, number) - begun)
        check(took[-1] < 3, f"message {number}: {took[-1]:.2f} s")
        time.sleep(0.1)
    daemon.terminate()
    check(daemon.wait(20) == 0, "the end")
    return f"{statistics.median(took):.1f} s, at most {max(took):.1f} s"
