"""The faults: hostile peers, kills and reloads at random; disks, name server, clock and log at fixed times."""

import base64
import errno
import os
import re
import signal
import subprocess
import threading
import time

from clock import HOUR, Clock
from harness import Failed, Smtp, secret
from parties import ACCOUNTS, EXTRA, Actor, forget_clock

# A line of the level `error` is a defect, unless its event is one of these: an invalid file, a slow reader of the log and a full
# disk are faults of this script.
EXPECTED = {"reload-failed", "customer-skipped", "log-lost"}
EXPECTED_WHEN_FULL = {"storage-failed", "dsn-failed", "spool-failed", "settle-failed"}
LOG_SIZE = 20_000_000
BURSTS, BURST = 3, 240  # and so many connections
TMPFS = {"spool": 512, "customer": 64}  # MiB


class Hostile(Actor):
    """One of these clients at a time, from its own networks."""

    def act(self):
        kinds = [self.garbage, self.half_handshake, self.guess, self.flood, self.trickle, self.injection, self.many_recipients, self.begin]
        self.source = f"127.{self.dice.randrange(60, 70)}.{self.dice.randrange(250)}.{self.dice.randrange(1, 250)}"
        kind = self.dice.choice(kinds)
        self.soak.counts["hostile"] += 1
        try:
            kind()
        except (OSError, Failed):
            pass  # the server is expected to end these connections

    def connect(self, **options):
        provider = self.soak.provider
        port = self.dice.choice((provider.inbound, provider.odmr, provider.odmr_tls))
        return Smtp(options.pop("port", port), source=self.source, seconds=15, **options)

    def garbage(self):
        with self.connect() as line:
            for _ in range(self.dice.randrange(1, 30)):
                line.socket.sendall(self.dice.randbytes(self.dice.randrange(1, 3000)) + b"\r\n" * self.dice.randrange(2))

    def half_handshake(self):
        with self.connect(port=self.soak.provider.odmr_tls) as line:
            line.socket.sendall(bytes.fromhex("16030102000100") + self.dice.randbytes(self.dice.randrange(200)))
            self.soak.stop.wait(self.dice.uniform(0, 5))

    def guess(self):
        account = self.dice.choice([*ACCOUNTS, "root", "admin"])
        with self.connect(port=self.soak.provider.odmr) as line:
            line.hello()
            for _ in range(self.dice.randrange(1, 4)):
                line.say("AUTH CRAM-MD5")
                line.say(base64.b64encode(f"{account} {self.dice.randbytes(16).hex()}".encode()).decode())

    def flood(self):
        lines = []
        try:
            for _ in range(self.dice.randrange(20, 80)):
                lines.append(self.connect())
        finally:
            for line in lines:
                line.close()

    def trickle(self):
        with self.connect() as line:
            end = time.monotonic() + self.dice.uniform(1, 12)
            while time.monotonic() < end and not self.soak.paused.is_set():
                line.socket.sendall(self.dice.choice((b"E", b"\0", b"\r\n")))
                time.sleep(0.5)

    def injection(self):
        """Pipelining across STARTTLS (CVE-2011-0411), and after ATRN."""
        with self.connect(port=self.soak.provider.odmr) as line:
            line.hello()
            line.socket.sendall(b"STARTTLS\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<eva@c01.example>\r\n")
            line.reply()
            line.socket.recv(1000)

    def many_recipients(self):
        with self.connect(port=self.soak.provider.inbound) as line:
            line.hello()
            line.want("250", "MAIL FROM:<flood@d0.world.example>")
            for _ in range(20):
                line.socket.sendall(b"".join(b"RCPT TO:<x%d@c%02d.example>\r\n" % (number, number) for number in range(100)))
                [line.reply() for _ in range(100)]

    def begin(self):
        """A message that does not end."""
        with self.connect(port=self.soak.provider.inbound) as line:
            line.hello()
            for command in ("MAIL FROM:<a@d0.world.example>", "RCPT TO:<eva@c01.example>", "DATA"):
                line.say(command)
            line.socket.sendall(b"Subject: x\r\n\r\n" + b"x" * self.dice.randrange(100_000))


class Chaos(Actor):
    """Kills and reloads at random, one after the other, so that each finds the files of the last one restored."""

    def __init__(self, soak, pause):
        super().__init__(soak, "chaos", pause)
        self.serve_may_die, self.full = True, 0.0
        self.acting = threading.Lock()  # serve is started and stopped by one thread at a time
        self.reading, self.pumps = threading.Event(), []
        self.reading.set()
        self.accounts = soak.provider.config.parent / "serve-customers.d"
        self.has_mount = False
        try:
            self.clock = Clock(soak.box)
        except Failed:
            self.clock = None
        environment = self.clock.environment | {"FAKETIME_CACHE_DURATION": "1"} if self.clock else dict(os.environ)
        environment.pop("FAKETIME_NO_CACHE", None)
        # glibc gives each of many threads its own heap (eight for each processor), and each heap keeps its own peak: for hours that
        # grows ever more slowly, and hides leaks. Two heaps are full after minutes.
        environment.setdefault("MALLOC_ARENA_MAX", "2")
        soak.provider.environment = environment

    def act(self):
        kinds = [self.kill_customer] * 4 + [self.stop_customer] + [self.reload_account] * 2 + [self.bad_file, self.bad_account]
        with self.acting:
            self.dice.choice(kinds + [self.kill_serve, self.stop_serve] * 2 * self.serve_may_die)()

    # The provider.

    def start_serve(self):
        """Its log comes through a pipe, whose reader may be slow."""
        soak, provider = self.soak, self.soak.provider
        (soak.box.path / provider.log_name).unlink(missing_ok=True)
        source, sink = os.pipe()
        self.pumps.append(threading.Thread(target=self.pump, args=(source,), daemon=True))
        self.pumps[-1].start()
        try:
            provider.start(stderr=sink, stdout=sink)
        except Failed as error:
            soak.defects.append(f"serve does not start: {error}")
            raise
        finally:
            os.close(sink)

    def pump(self, source):
        log = self.soak.box.path / self.soak.provider.log_name
        with open(source, "rb") as pipe:
            while True:
                self.reading.wait()
                line = pipe.readline()
                if not line:
                    return
                self.judge(line.decode("utf-8", "backslashreplace"))
                with open(log, "ab") as file:
                    file.write(line)
                    size = file.tell()
                if size > LOG_SIZE:
                    log.replace(log.with_suffix(".old"))

    def judge(self, line):
        found = re.match(r"(error|warning): event=(\S+)", line)
        if "event=panic" in line or "panicked at" in line:
            return self.soak.defects.append(line.strip())
        if found:
            level, event = found.groups()
            self.soak.counts[f"{level} {event}"] += 1
            full = event in EXPECTED_WHEN_FULL and time.monotonic() < self.full
            if level == "error" and event not in EXPECTED and not full:
                self.soak.defects.append(line.strip()[:400])

    def check_alive(self):
        code = self.soak.provider.process.poll()
        if code is not None:
            self.soak.defects.append(f"serve has ended by itself: {code}")

    def end_serve(self, number):
        """SIGTERM must end it in time, with exit code 0."""
        soak, process = self.soak, self.soak.provider.process
        self.check_alive()
        soak.ledger.abrupt()
        process.send_signal(number)
        code = process.wait(40)
        soak.ledger.abrupt()
        if code != (0 if number == signal.SIGTERM else -number):
            soak.defects.append(f"serve: exit {code} by signal {number}")
        soak.box.children.remove(process)
        forget_clock(process.pid)

    def kill_serve(self):
        self.soak.counts["serve kills"] += 1
        self.end_serve(signal.SIGKILL)
        self.start_serve()

    def stop_serve(self):
        self.soak.counts["serve stops"] += 1
        self.end_serve(signal.SIGTERM)
        self.start_serve()

    # The customers.

    def kill_customer(self, number=signal.SIGKILL):
        with self.soak.lock:
            alive = [(account, process) for account, process in self.soak.processes.items() if process.poll() is None]
        if alive:
            account, process = self.dice.choice(alive)
            process.send_signal(number)
            self.soak.ledger.abrupt(account)
            self.soak.counts[f"customer {signal.Signals(number).name}"] += 1

    def stop_customer(self):
        self.kill_customer(signal.SIGTERM)

    # The configuration.

    def reload(self):
        """Sends SIGHUP and waits a moment, not for a line of the log, which may be stalled."""
        self.soak.provider.process.send_signal(signal.SIGHUP)
        self.soak.counts["reloads"] += 1
        self.soak.stop.wait(self.dice.uniform(0.2, 1))

    def reload_account(self):
        """Adds an account, or removes it with its mail."""
        file = self.accounts / f"{EXTRA}.toml"
        if file.exists():
            file.unlink()
        else:
            file.touch(mode=0o600)
            file.write_text(f'domains = ["{EXTRA}.example"]\nsecret = "{secret(EXTRA)}"\n')
        self.reload()

    def have_extra(self):
        if not self.soak.has_extra():
            self.reload_account()

    def bad_file(self):
        self.spoil(self.soak.provider.config)

    def bad_account(self):
        self.spoil(self.accounts / f"{self.dice.choice(ACCOUNTS)}.toml")

    def spoil(self, file):
        """Makes a typing error before a reload, and corrects it before the next one."""
        good = file.read_text()
        try:
            file.write_text(good.replace("=", "", 1))
            self.reload()
        finally:
            file.write_text(good)
        self.reload()

    # Faults at fixed times.

    def burst(self):
        """More connections at once than ever after, in clear and under TLS, with content, so that the heap has reached
        its peak."""
        provider, content = self.soak.provider, b"Subject: x\r\n\r\n" + b"x" * 72 * 1000
        for _ in range(BURSTS):
            lines = []
            try:
                for number in range(BURST):
                    source = f"127.30.{number}.1"
                    if number % 3 == 0:
                        lines.append(Smtp(provider.odmr_tls, source=source, tls=self.soak.tls))
                        lines[-1].hello()
                        continue
                    lines.append(Smtp(provider.inbound, source=source))
                    lines[-1].hello()
                    if number % 3 == 1:
                        lines[-1].start_tls(self.soak.tls)
                    for command in (f"MAIL FROM:<{number}@d0.world.example>", "RCPT TO:<eva@c01.example>", "DATA"):
                        lines[-1].say(command)
                    lines[-1].socket.sendall(content)
            except (OSError, Failed):
                self.soak.counts["bursts cut"] += 1
            finally:
                for line in lines:
                    line.close()
        return f"{BURSTS} of {BURST} connections"

    def mount(self, which, path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        size = f"size={TMPFS[which]}m,mode=700"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(path)], capture_output=True)
        self.has_mount = done.returncode == 0
        if self.has_mount:
            self.soak.box.at_end(lambda: subprocess.run(["umount", "-l", str(path)], capture_output=True))

    def fill(self, path, seconds):
        """Fills the disk for so many seconds."""
        if not self.has_mount:
            return "skipped: cannot mount"
        self.full = time.monotonic() + seconds + 30
        ballast, end = path / "ballast", time.monotonic() + seconds
        try:
            with open(ballast, "wb", buffering=0) as file:
                while time.monotonic() < end and not self.soak.stop.is_set():
                    try:
                        file.write(bytes(65536))
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        self.soak.stop.wait(0.2)
        finally:
            ballast.unlink(missing_ok=True)
        return f"{seconds:.0f} s"

    def kill_names(self, seconds):
        names = next(child for child in self.soak.box.children if child.args[0] == "dnsmasq")
        names.kill()
        names.wait()
        self.soak.stop.wait(seconds)
        self.soak.box.children.remove(names)
        self.soak.box.start("dnsmasq.log", *names.args)
        return f"{seconds:.0f} s"

    def stall_log(self, seconds):
        self.reading.clear()
        self.soak.stop.wait(seconds)
        self.reading.set()
        return f"{seconds:.0f} s"

    def set_clock(self, _):
        if not self.clock:
            return "skipped: no libfaketime"
        self.clock.set(HOUR)
        return "one hour forward"
