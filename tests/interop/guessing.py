"""Clients that guess secrets are delayed, across all processes, and cannot lock a customer out."""

import base64
import contextlib
import fcntl
import hashlib
import hmac
import itertools
import os
import signal
import threading
import time

from clock import YEAR, Clock
from harness import Certificates, Failed, Provider, Smtp, check, context, events, scenario, secret, wait_until
from openssl import made
from quotas import Inetd
from trust import account, pins

HOME = "127.9.9.9"  # the address of a customer that has logged in from there
CUSTOMERS = {"acme": ["example.org"], "beta": ["beta.example"]}


def b64(text):
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def cram_md5(line, name, password):
    challenge = line.want("334", "AUTH CRAM-MD5")
    digest = hmac.new(password.encode(), base64.b64decode(challenge[4:]), "md5").hexdigest()
    return line.say(b64(f"{name} {digest}"))


def scram(line, name, password):
    first = f"n={name},r=abcdef"
    challenge = line.say("AUTH SCRAM-SHA-256 " + b64("n,," + first))
    if not challenge.startswith("334"):
        return challenge
    server = base64.b64decode(challenge[4:]).decode()
    fields = dict(part.split("=", 1) for part in server.split(","))
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(fields["s"]), int(fields["i"]))
    key = hmac.digest(salted, b"Client Key", "sha256")
    final = f"c=biws,r={fields['r']}"
    signature = hmac.digest(hashlib.sha256(key).digest(), f"{first},{server},{final}".encode(), "sha256")
    reply = line.say(b64(f"{final},p=" + b64(bytes(a ^ b for a, b in zip(key, signature)))))
    return line.say("") if reply.startswith("334") else reply


def plain(line, name, password):
    return line.say("AUTH PLAIN " + b64(f"\0{name}\0{password}"))


def external(line, name, _):
    return line.say("AUTH EXTERNAL " + b64(name))


def attempt(port, source, name="acme", password=None, how=cram_md5, tls=None):
    """The reply to one AUTH over a new connection, and its time."""
    with Smtp(port, source=source, seconds=60) as line:
        line.hello()
        if tls:
            line.start_tls(tls)
        begin = time.monotonic()
        reply = how(line, name, password or secret(name))
        return reply[:3], time.monotonic() - begin


def home(provider, port=None):
    """The customer logs in from its known network. Returns milliseconds."""
    code, seconds = attempt(port or provider.odmr, HOME)
    check(code == "235", f"the known customer gets {code}")
    return seconds * 1000


def new_network(provider, source, limit):
    """A customer from an unknown network calls until it is authenticated. Returns seconds."""
    begin = time.monotonic()
    while True:
        try:
            code, _ = attempt(provider.odmr, source)
        except (OSError, Failed):
            code = "lost"
        if code == "235":
            return time.monotonic() - begin
        check(code in ("421", "lost"), f"the customer from a new network gets {code}")
        check(time.monotonic() - begin < limit, f"the customer from a new network is not in after {limit} s")
        time.sleep(0.3)


class Guessers:
    """Many clients that guess until they are stopped: `guess(number)` is the reply to one more guess, over a new connection."""

    def __init__(self, count, guess):
        self.times, self.codes, self.over, self.guess = [], [], threading.Event(), guess
        self.threads = [threading.Thread(target=self.run, args=(number,), daemon=True) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, number):
        while not self.over.is_set():
            try:
                code = self.guess(number)
            except (OSError, Failed, ValueError):
                code = "lost"
            self.codes.append(code)
            if code == "535":
                self.times.append(time.monotonic())
            else:
                time.sleep(0.05)

    def last(self, seconds):
        now = time.monotonic()
        return sum(now - seconds <= at <= now for at in self.times)

    def stop(self):
        self.over.set()


def threads(provider):
    return len(os.listdir(f"/proc/{provider.process.pid}/task"))


@scenario("guessing", needs=["openssl"], waits=True)
def guessing(box):
    """20 clients of one network guess at once, by each mechanism, at serve and at processes of inetd: at most one guess a second is decided"""
    certificates = Certificates(box)
    certificate = made(box, "p256", 3)
    provider = Provider(box, certificates=certificates, customers=CUSTOMERS, require_tls=False)
    account(provider, "own", [pins(box, certificate[0])[0]], with_secret=True)
    provider.start()
    inetd = Inetd(box, provider, "odmr")
    home(provider)
    tls = context(certificates.authority)
    tls.load_cert_chain(*certificate)
    numbers, hows = itertools.count(), [cram_md5, scram, plain]

    def guess(number):
        how = hows[number % 3]
        port = (provider.odmr, inetd.port)[number // 3 % 2]
        name = ("acme", "nobody", "beta", f"name{next(numbers)}")[number // 6 % 4]
        return attempt(port, f"127.0.0.{next(numbers) % 200 + 2}", name, "wrong", how, tls if how is plain else None)[0]

    guessers = Guessers(20, guess)
    known, most = [], 0
    for _ in range(12):
        time.sleep(1)
        known += [home(provider), home(provider, inetd.port)]
        most = max(most, threads(provider))
    # A certificate does not count as a guess, not even from that network.
    code, seconds = attempt(provider.odmr, "127.0.0.251", "own", how=external, tls=tls)
    check(code == "235" and seconds < 0.5, f"EXTERNAL: {code} after {seconds:.2f} s")
    # The guesses continue, and pipelining does not avoid the delays.
    with Smtp(provider.odmr, source="127.0.0.250", seconds=60) as line:
        line.hello()
        line.start_tls(tls)
        guess_line = ("AUTH PLAIN " + b64("\0acme\0wrong") + "\r\n").encode()
        line.socket.sendall(guess_line * 10)
        begin, pipelined = time.monotonic(), []
        while time.monotonic() - begin < 5:
            line.socket.settimeout(5)
            try:
                pipelined.append(line.reply()[:3])
            except OSError:
                break
    late = guessers.last(10)
    guessers.stop()
    check(pipelined.count("535") <= 1, f"pipelined: {pipelined}")
    check(late <= 10, f"{late} guesses in 10 s of {len(guessers.times)}")
    check(len(guessers.times) >= 6, f"only {len(guessers.times)} guesses: {guessers.codes[:40]}")
    served = known[::2]
    check(max(served) < 100, f"the known customer: {[round(ms) for ms in served]} ms")
    wait_until(lambda: events(provider.log(), "auth-slowed"), "auth-slowed in the log")
    slowed = len(events(provider.log(), "auth-slowed"))
    check(slowed <= 25, f"{slowed} lines auth-slowed")
    wait_until(lambda: events(provider.log(), "auth-failed"), "auth-failed in the log")
    text = (provider.spool / ".odmr/logins").read_text()
    check("acme" not in text and "nobody" not in text, text)
    return (
        f"{len(guessers.times)} guesses in 17 s, {late} in the last 10; known: {max(served):.0f} ms,"
        f" over inetd {max(known[1::2]):.0f} ms; {most} threads; {len(text.splitlines())} lines"
    )


@scenario("guessing-nat", waits=True)
def guessing_nat(box):
    """Two customers share an address (NAT), and one has a wrong secret: it gets 535s, the other is not delayed, and the corrected secret is accepted"""
    provider = Provider(box, customers=CUSTOMERS, require_tls=False).start()
    for name in CUSTOMERS:
        check(attempt(provider.odmr, HOME, name)[0] == "235", f"{name} is not let in")
    wrong = Guessers(1, lambda _: attempt(provider.odmr, HOME, "beta", "wrong")[0])
    known = []
    while len(wrong.codes) < 6:
        known.append(home(provider))
        time.sleep(0.3)
    wrong.stop()
    wrong.threads[0].join()
    code, seconds = attempt(provider.odmr, HOME, "beta")
    _, again = attempt(provider.odmr, HOME, "beta")
    check(set(wrong.codes) == {"535"}, f"the wrong secret gets {wrong.codes}")
    check(max(known) < 100, f"the other customer: {[round(ms) for ms in known]} ms")
    check(code == "235" and seconds < 31 and again < 0.5, f"the right secret: {code} after {seconds:.1f} s, then {again:.1f} s")
    return f"{len(wrong.codes)} times 535, the other {max(known):.0f} ms at most; mended: {seconds:.1f} s, then {again * 1000:.0f} ms"


@scenario("guessing-networks")
def guessing_networks(box):
    """100 networks guess at one account: a known customer logs in within 100 ms, one from a new network after one delay, also after kill -9"""
    provider = Provider(box, customers=CUSTOMERS, require_tls=False).start()
    home(provider)
    numbers = itertools.count()

    def guess(_):
        return attempt(provider.odmr, f"127.1.{next(numbers) % 100}.1", "acme", "wrong")[0]

    guessers = Guessers(100, guess)
    # These networks have failures by then.
    wait_until(lambda: len(guessers.codes) > 300, "300 attempts", seconds=60)
    known = [home(provider) for _ in range(10)]
    first = new_network(provider, "127.2.2.2", 45)
    again = attempt(provider.odmr, "127.2.2.2")[1] * 1000
    provider.restart_by_force()
    known += [home(provider) for _ in range(10)] + [attempt(provider.odmr, "127.2.2.2")[1] * 1000]
    second = new_network(provider, "127.3.3.3", 45)
    guessers.stop()
    check(max(known + [again]) < 100, f"the known customer: {[round(ms) for ms in known + [again]]} ms")
    check(first < 40 and second < 40, f"the new networks waited {first:.1f} and {second:.1f} s")
    check(second > 5, f"the account's failures are forgotten after a kill: {second:.1f} s")
    return (
        f"{len(guessers.times)} guesses, {guessers.codes.count('421')} times 421; known: {max(known):.0f} ms at most;"
        f" new: {first:.1f} s, after the kill another: {second:.1f} s"
    )


@scenario("guessing-inetd", waits=True)
def guessing_inetd(box):
    """One guess in each process of inetd, then at serve, with a kill and a restart: the delays grow; a right secret waits as long as a wrong one"""
    provider = Provider(box, customers=CUSTOMERS, require_tls=False)
    inetd = Inetd(box, provider, "odmr")
    guess = lambda port: attempt(port, "127.0.0.7", "acme", "wrong")
    delays = [guess(inetd.port)[1] for _ in range(5)]
    provider.start()
    delays.append(guess(provider.odmr)[1])
    provider.restart_by_force()
    code, seconds = attempt(provider.odmr, "127.0.0.8")
    check(code == "235", code)
    delays.append(seconds)
    # Now its network is known, so only the failures there count.
    check(attempt(inetd.port, "127.0.0.9")[1] < 1, "the known customer waits")
    for seconds, expected in zip(delays, [0, 0, 0, 1, 2, 4, 8]):
        check(expected <= seconds < expected + 1, f"{[round(one, 2) for one in delays]}")
    return f"delays of {', '.join(f'{seconds:.2f}' for seconds in delays)} s"


@scenario("guessing-stop", waits=True)
def guessing_stop(box):
    """32 attempts wait: SIGHUP reloads, clients that disconnect free their places, SIGTERM ends all at once"""
    provider = Provider(box, customers=CUSTOMERS, require_tls=False).start()
    waiting, answered = [], []

    def wait(number):
        line = Smtp(provider.odmr, source=f"127.4.{number % 100}.1", seconds=60)
        line.hello()
        digest = "0" * 32
        line.want("334", "AUTH CRAM-MD5")
        line.socket.sendall((b64(f"acme {digest}") + "\r\n").encode())
        return line

    lines = [wait(number) for number in range(60)]
    # The first attempts are decided after 0, 0, 0, 1, 2, 4 and 8 s, the others would be decided after 16 and 30 s.
    end = time.monotonic() + 9.5
    for line in lines:
        line.socket.settimeout(max(end - time.monotonic(), 0.01))
        try:
            answered.append(line.reply()[:3])
        except TimeoutError:
            waiting.append(line)
    rejected = answered.count("421")
    check(sorted(set(answered)) == ["421", "535"] and rejected >= 20 and 20 <= len(waiting) <= 32, f"{len(waiting)} wait, {answered}")
    provider.process.send_signal(signal.SIGHUP)
    wait_until(lambda: events(provider.log(), "reloaded"), "the reload", seconds=3)
    gone = waiting[:10]
    before = len(events(provider.log(), "closed"))
    for line in gone:
        line.close()
    wait_until(lambda: len(events(provider.log(), "closed")) >= before + 10, "the end of the sessions of closed clients", seconds=3)
    begin = time.monotonic()
    code = provider.stop()
    seconds = time.monotonic() - begin
    check(code == 0 and seconds < 2, f"exit {code} after {seconds:.1f} s")
    texts = []
    for line in waiting[10:]:
        line.socket.settimeout(5)
        texts.append(line.socket.recv(200)[:9])
    check(b"421 4.3.2" in texts, texts)
    return f"{len(waiting)} waited, {rejected} rejected; stopped after {seconds * 1000:.0f} ms"


@scenario("guessing-clock", waits=True)
def guessing_clock(box):
    """The clock is set forward and back by a year, while serve runs and before it starts: no delay gets longer, known networks stay known"""
    clock = Clock(box)
    provider = Provider(box, customers=CUSTOMERS, require_tls=False)
    provider.environment = clock.environment
    provider.start()
    home(provider)
    seen = []

    def both(expected):
        seen.append(attempt(provider.odmr, "127.0.0.7", "acme", "wrong")[1])
        check(expected[0] <= seen[-1] < expected[1], f"{[round(one, 1) for one in seen]}: wanted {expected}")
        check(home(provider) < 500, "the known customer waits")

    for delay in (0, 0, 0, 1, 2):
        both((delay, delay + 1))
    clock.set(-YEAR)
    both((4, 5))
    provider.process.kill()
    provider.process.wait()
    provider.start()
    both((8, 9))
    clock.set(YEAR)
    both((0, 1))
    clock.set(0)
    both((0, 1))
    both((0, 1))
    both((1, 2))
    return ", ".join(f"{seconds:.1f}" for seconds in seen) + " s"


@scenario("guessing-file")
def guessing_file(box):
    """The file of logins is damaged, empty, huge, a directory, a pipe, or locked by a program that hangs: logins go on, and the error is logged"""
    provider = Provider(box, customers=CUSTOMERS, require_tls=False).start()
    home(provider)
    file = provider.spool / ".odmr/logins"
    wait_until(file.exists, "the file")
    guess = lambda: attempt(provider.odmr, "127.0.0.7", "acme", "wrong")[1]
    check([guess() < 1 for _ in range(3)] == [True] * 3 and guess() >= 1, "guesses before")
    times = {}

    def put(octets):
        (box.path / "new").write_bytes(octets)
        os.replace(box.path / "new", file)

    def put_directory():
        # serve may write its file between the two calls.
        while not file.is_dir():
            file.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):
                file.mkdir()

    def put_pipe():
        file.rmdir()
        os.mkfifo(box.path / "pipe")
        os.replace(box.path / "pipe", file)

    def play(name, prepare):
        prepare()
        begin = time.monotonic()
        for source in (HOME, "127.5.5.5"):
            check(attempt(provider.odmr, source, "beta")[0] == "235", f"{name}: no login from {source}")
        times[name] = time.monotonic() - begin
        check(times[name] < 1.5, f"{name}: {times[name]:.2f} s")
        # Each process can read the file of the others.
        provider.restart_by_force()
        check(attempt(provider.odmr, HOME, "beta")[0] == "235", f"{name}: no login after a restart")

    play("damaged", lambda: put(b"failed 1\nwaits\0\xff\n" + file.read_bytes()[:-3]))
    wait_until(lambda: events(provider.log(), "logins-unusable"), "damage in the log")
    play("empty", lambda: put(b""))
    play("gone", lambda: file.unlink(missing_ok=True))
    huge = b"".join(b"failed 1795689600 20 network 10.%d.%d.0/24\n" % divmod(number, 256) for number in range(65536))
    play("huge", lambda: put(huge * 4))
    wait_until(lambda: file.stat().st_size < 1 << 20, "a small file again")
    play("directory", put_directory)
    play("pipe", put_pipe)
    file.unlink(missing_ok=True)
    provider.restart_by_force()
    home(provider)
    with open(provider.spool / ".odmr/logins.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        play("locked", lambda: None)
    return ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in times.items())
