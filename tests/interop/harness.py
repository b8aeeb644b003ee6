"""Shared by all scenarios: a temporary directory, the two parties, a small SMTP client and a small SMTP server.

Contract: every process that a scenario starts through its Box is ended, by its id, when the scenario ends, whether it passes or
fails. Contents are octets with CRLF line ends, as on the wire; files at rest have LF.
"""

import base64
import collections
import hmac
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
ODMR = str(pathlib.Path(os.environ.get("ODMR", TARGET / "release/odmr")).absolute())
LOOPBACK = "127.0.0.1"
LIMIT = 300  # seconds a scenario may take
PATIENCE = 30.0  # seconds that an event may take that should be immediate: other work may keep this machine busy
MIB = 1024 * 1024

SCENARIOS = []
Scenario = collections.namedtuple("Scenario", "name about needs root waits play")
Message = collections.namedtuple("Message", "sender recipients content")


class Failed(Exception):
    """An expectation of the scenario did not hold."""


def scenario(name, *, needs=(), root=False, waits=False):
    """Registers a function of one Box; it returns the facts to print. `needs`: names of programs; `root`: only root can
    play it.
    `waits`: it mostly waits, so it is played at the same time as the others."""

    def register(function):
        SCENARIOS.append(Scenario(name, function.__doc__.strip().splitlines()[0], needs, root, waits, function))
        return function

    return register


def check(condition, text):
    if not condition:
        raise Failed(text)


def wait_until(condition, text, seconds=PATIENCE, pause=0.01):
    """Waits for `condition()` to be true and returns its value."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        check(time.monotonic() < end, f"not within {seconds} s: {text}")
        time.sleep(pause)


def play(one):
    """Plays one scenario and prints its line. Returns whether it passed."""
    begin = time.monotonic()
    box = Box()

    def too_long(*_):
        raise Failed(f"took more than {LIMIT} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        missing = [program for program in one.needs if not program_path(program)]
        check(not missing, f"needs {', '.join(missing)}: see .ci/run for the packages")
        check(not one.root or os.geteuid() == 0, "needs root")
        facts = one.play(box) or ""
        signal.alarm(0)
        print(f"ok {one.name} ({time.monotonic() - begin:.1f} s) {facts}".rstrip(), flush=True)
        return True
    except Exception as error:  # after any error: the next scenario must be played
        signal.alarm(0)
        print(f"FAILED {one.name} ({time.monotonic() - begin:.1f} s) {error or type(error).__name__}", flush=True)
        if not isinstance(error, (Failed, OSError, subprocess.TimeoutExpired)):
            traceback.print_exc()
        box.print_logs()
        return False
    finally:
        signal.alarm(0)
        box.close()


EVENT = re.compile(r"(?m)^(?:\w+: |\[[^]]*\] )?event=(\S+)(?: (.*))?$")
FIELD = re.compile(r'([\w-]+)=("(?:[^"\\]|\\.)*"|\S*)')


def events(log, name, **wanted):
    """The lines of one event in a log (doc/log.md), each a dict of its keys; only those with the values in `wanted`."""
    found = [dict(FIELD.findall(fields)) for event, fields in EVENT.findall(log) if event == name]
    for fields in found:
        for key, value in fields.items():
            if value.startswith('"'):
                fields[key] = re.sub(r'\\(["\\])', r"\1", value[1:-1])
    return [fields for fields in found if all(fields.get(key) == value for key, value in wanted.items())]


def program_path(name):
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin")


def thread_statuses(pid):
    """Yields (TID, text of its file `status`) of each thread of a process, except threads that end during this."""
    try:
        tasks = list(pathlib.Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for task in tasks:
        try:
            yield task.name, (task / "status").read_text()
        except OSError:
            pass


def await_log_writer(child):
    """Waits until the thread of odmr that writes its log has nothing to write, or for a second. No other process has that thread."""
    end = time.monotonic() + 1
    asleep = 0
    while asleep < 2 and child.poll() is None and time.monotonic() < end:
        child.log_writer = child.log_writer or next((tid for tid, text in thread_statuses(child.pid) if "Name:\tlog\n" in text), None)
        if not child.log_writer:
            return
        try:
            state = pathlib.Path(f"/proc/{child.pid}/task/{child.log_writer}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return  # the process has ended
        # Two looks: it may have waited for another thread that adds a line.
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.0005)


def connections(listener):
    """The connections that come, until the listener is closed with its box."""
    while True:
        try:
            yield listener.accept()[0]
        except OSError:
            return


PORTS = itertools.count(int(os.environ.get("FIRST_PORT", random.randrange(10_000, 20_000))))


def free_port():
    """A port that was free a moment ago, below those that the system gives to clients, so that none of them gets it."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port := next(PORTS)))
                return port
            except OSError:
                continue


def context(authority=None):
    """For a TLS client: trusts `authority`, or (as most of the sending world does) anyone."""
    if authority:
        return ssl.create_default_context(cafile=str(authority))
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    return anyone


class Box:
    """A temporary directory and the processes that work in it."""

    def __init__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="odmr-interop-"))
        os.chmod(self.path, 0o755)  # so that Postfix's unprivileged daemons can enter it
        self.children = []
        self.sockets = []
        self.closing = []

    def write(self, name, text, mode=0o600):
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=mode)
        os.chmod(file, mode)
        file.write_text(text)
        return file

    def start(self, log, *command, **options):
        """Starts a process in its own group. Its errors, and its output unless `stdout` is given, go to the file `log`."""
        with open(self.path / log, "ab") as file:
            options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file} | options
            child = subprocess.Popen([str(word) for word in command], start_new_session=True, **options)
        child.log, child.log_writer = log, None
        self.children.append(child)
        return child

    def run(self, *command, seconds=60, **options):
        """Runs a command until it ends. Returns the finished process with text stdout and stderr."""
        if "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        words = [str(word) for word in command]
        return subprocess.run(
            words, capture_output=True, text=True, errors="backslashreplace", timeout=seconds, **options
        )

    def keep(self, sock):
        """A socket that is closed with the box."""
        self.sockets.append(sock)
        return sock

    def at_end(self, function):
        self.closing.append(function)

    def log(self, name):
        """The text of a log, with all that a running odmr has logged by now."""
        for child in list(self.children):
            if child.log == name:
                await_log_writer(child)
        file = self.path / name
        return file.read_text(errors="backslashreplace") if file.exists() else ""

    def print_logs(self, lines=int(os.environ.get("LOG_LINES", "15"))):
        for file in sorted(self.path.glob("*.log")):
            tail = file.read_text(errors="backslashreplace").splitlines()[-lines:]
            if tail:
                print(f"    -- the end of {file.name} --")
                print("\n".join("    " + line[:300] for line in tail), flush=True)

    def close(self):
        for function in self.closing:
            function()
        for sock in self.sockets:
            hang_up(sock)
        for child in self.children:
            end(child, signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                pass
            end_group(child)
            child.wait()
        shutil.rmtree(self.path, ignore_errors=True)


def hang_up(sock):
    """Closes a socket even while a thread waits on it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()


def end(child, number):
    if child.poll() is None:
        child.send_signal(number)


def end_group(child):
    """Kills the remaining processes of the group of a child (the sessions of an inetd)."""
    # The child has been reaped, and its id is that of another process now: then its group had no members left.
    if child.returncode is not None and os.path.exists(f"/proc/{child.pid}"):
        return
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Certificates:
    """An authority and a certificate of it for localhost and 127.0.0.1, made by openssl."""

    def __init__(self, box):
        self.authority = box.path / "ca.pem"
        self.certificate = box.path / "relay.pem"
        self.key = box.path / "relay.key"
        authority_key = box.path / "ca.key"
        request = box.path / "relay.csr"
        names = box.write("relay.ext", "subjectAltName=DNS:localhost,DNS:relay.example.net,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        for command in (
            ["req", "-x509", *new_key, "-keyout", authority_key, "-out", self.authority, "-days", "2"]
            + ["-subj", "/CN=interop authority"],
            ["req", *new_key, "-keyout", self.key, "-out", request, "-subj", "/CN=localhost"],
            ["x509", "-req", "-in", request, "-CA", self.authority, "-CAkey", authority_key, "-CAcreateserial"]
            + ["-days", "2", "-extfile", names, "-out", self.certificate],
        ):
            done = box.run("openssl", *command)
            check(done.returncode == 0, f"openssl: {done.stderr}")
        os.chmod(self.key, 0o600)


class Provider:
    """A provider's files and, when started, its process. Ports are known once it runs.

    `more`: lines of the configuration, each section's after its head; `accounts`: the same of customers' files, by name.
    """

    def __init__(self, box, *, certificates=None, require_tls=True, customers=None, ports=None, name="serve", more="", accounts=None):
        self.box = box
        self.spool = box.path / f"{name}-spool"
        self.log_name = f"{name}.log"
        self.process = None
        self.environment = None  # that of the scenarios
        self.inbound, self.odmr, self.odmr_tls = ports or (0, 0, 0)
        self.customers = customers or {"acme": ["example.org", "example.com"]}
        tls = certificates and f'[tls]\ncertificate = "{certificates.certificate}"\nkey = "{certificates.key}"\n'
        listen_tls = f'"{LOOPBACK}:{self.odmr_tls}"' if certificates else ""
        sections = {"inbound": "", "odmr": ""}
        head = ""
        for section, lines in re.findall(r"(?ms)^\[(\w+)\]\n(.*?)(?=^\[|\Z)", more):
            if section in sections:
                sections[section] += lines
            else:
                head += f"[{section}]\n{lines}\n"
        self.config = box.write(
            f"{name}.toml",
            f"""hostname = "relay.example.net"
spool = "{self.spool}"
customers = "{name}-customers.d"

{tls or ""}
[inbound]
listen = ["{LOOPBACK}:{self.inbound}"]
{sections["inbound"]}
[odmr]
listen = ["{LOOPBACK}:{self.odmr}"]
listen-tls = [{listen_tls}]
require-tls = {str(require_tls).lower()}
{sections["odmr"]}
{head}""",
        )
        if "[relay]" not in head:
            # No name of these scenarios is looked up at public name servers.
            self.config.write_text(self.config.read_text() + '[relay]\nresolver = "127.0.0.1:1"\n')
        for customer, domains in self.customers.items():
            quoted = ", ".join(f'"{domain}"' for domain in domains)
            lines = f'domains = [{quoted}]\nsecret = "{secret(customer)}"\n{(accounts or {}).get(customer, "")}\n'
            box.write(f"{name}-customers.d/{customer}.toml", lines)

    def restart_by_force(self):
        """SIGKILL, and a new process on the same ports."""
        self.process.kill()
        self.process.wait()
        self.box.children.remove(self.process)
        self.start()

    def start(self, **options):
        """`options`: those of the process."""
        before = len(self.log())
        options = {"env": self.environment} | options
        self.process = self.box.start(self.log_name, ODMR, "serve", "-c", self.config, **options)
        wanted = 3 if "listen-tls = [\"" in self.config.read_text() else 2

        def ports():
            check(self.process.poll() is None, f"serve ended with {self.process.returncode}: {self.log()[before:]}")
            found = re.findall(r"listening (inbound|odmr-tls|odmr) \S+:(\d+)", self.log()[before:])
            return dict(found) if len(found) >= wanted else None

        found = wait_until(ports, "`listening …` lines in the log")
        self.inbound = int(found["inbound"])
        self.odmr = int(found["odmr"])
        self.odmr_tls = int(found.get("odmr-tls", 0))
        return self

    def log(self):
        return self.box.log(self.log_name)

    def held(self):
        """The files of all held messages."""
        return [file for part in ("new", "cur") for file in self.spool.glob(f"domains/*/{part}/*")]

    def stop(self):
        """Sends SIGTERM, as an init system does. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def secret(customer):
    return f"the secret of {customer}"


class Customer:
    """A customer's file and its mailboxes.

    `head`: lines before the first table; `more`: lines of `[mailboxes]`, and of further tables; `accept`: the addresses
    or domains
    in `accept`; for a domain a mailbox is made for each name.
    """

    def __init__(self, box, port, *, tls="starttls", authority=None, name="acme", password=None, file="pull", **lines):
        self.box = box
        self.root = box.path / f"{file}-mail"
        self.log_name = f"{file}.log"
        trust = f'ca = "{authority}"\n' if authority and tls != "none" else ""
        accept = ", ".join(f'"{one}"' for one in lines.get("accept", ["@example.org", "@example.com"]))
        self.config = box.write(
            f"{file}.toml",
            f"""hostname = "mail.example.org"
{lines.get("head", "")}
[provider]
address = "{LOOPBACK}:{port}"
tls = "{tls}"
{trust}name = "{name}"
secret = "{password or secret(name)}"

[mailboxes]
root = "{self.root}"
accept = [{accept}]
catch-all = "create"
{lines.get("more", "")}""",
        )

    def start(self):
        return self.box.start(self.log_name, ODMR, "pull", "-c", self.config)

    def pull(self, seconds=60):
        """One call. Returns the exit code."""
        process = self.start()
        return process.wait(seconds)

    def log(self):
        return self.box.log(self.log_name)

    def files(self):
        return list(self.root.glob("*/*/new/*"))


def at_rest(content):
    return content.replace(b"\r\n", b"\n")


def field(file_content, name):
    """The first header field of that name in a file at rest, unfolded, or None."""
    head = file_content.split(b"\n\n", 1)[0]
    found = re.search(rb"(?mi)^" + re.escape(name.encode()) + rb":[ \t]*(.*(?:\n[ \t].*)*)", head)
    return found and re.sub(r"\n[ \t]+", " ", found.group(1).decode("utf-8", "backslashreplace"))


class Smtp:
    """A client that sends exactly the given lines."""

    def __init__(self, port, *, host=LOOPBACK, source=None, seconds=30, tls=None, receive_buffer=None):
        self.socket = socket.socket()
        self.socket.settimeout(seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source:
            self.socket.bind((source, 0))
        self.socket.connect((host, port))
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self.received = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def line(self):
        while True:
            at = self.received.find(b"\n")
            if at >= 0:
                line = bytes(self.received[: at + 1])
                del self.received[: at + 1]
                return line
            some = self.socket.recv(65536)
            if not some:
                raise ConnectionError(f"closed after {bytes(self.received)!r}")
            self.received += some

    def reply(self):
        """One whole reply as text; its lines are joined by LF."""
        lines = []
        while True:
            line = self.line().decode("utf-8", "backslashreplace").rstrip("\r\n")
            lines.append(line)
            if line[3:4] != "-":
                return "\n".join(lines)

    def say(self, line):
        self.socket.sendall(line.encode() + b"\r\n")
        return self.reply()

    def want(self, code, line=None):
        """Sends the line, if there is one, and checks that the reply begins with `code`."""
        reply = self.reply() if line is None else self.say(line)
        check(reply.startswith(code), f"to {line or 'the connection'!r}: wanted {code}, got {reply!r}")
        return reply

    def hello(self):
        self.want("220")
        return self.want("250", "EHLO sender.example")

    def start_tls(self, tls):
        self.want("220", "STARTTLS")
        self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        return self.want("250", "EHLO sender.example")

    def send(self, sender, recipients, content, parameters=""):
        """One transaction by PIPELINING. Returns the last reply: 250 means that the message was accepted."""
        group = [f"MAIL FROM:<{sender}>{parameters}", *(f"RCPT TO:<{one}>" for one in recipients), "DATA"]
        self.socket.sendall("".join(line + "\r\n" for line in group).encode())
        replies = [self.reply() for _ in group]
        if not replies[-1].startswith("354"):
            return next(reply for reply in replies if reply[0] in "45")
        self.socket.sendall(stuffed(content))
        return self.reply()

    def log_in(self, name):
        challenge = self.want("334", "AUTH CRAM-MD5")
        digest = hmac.new(secret(name).encode(), base64.b64decode(challenge[4:]), "md5").hexdigest()
        self.want("235", base64.b64encode(f"{name} {digest}".encode()).decode())

    def turn(self, name):
        """From the greeting to the 250 of ATRN."""
        self.hello()
        self.log_in(name)
        self.want("250", "ATRN")


def stuffed(content):
    """Content as DATA carries it, with its end."""
    if content.startswith(b"."):
        content = b"." + content
    return content.replace(b"\r\n.", b"\r\n..") + (b"" if not content or content.endswith(b"\r\n") else b"\r\n") + b".\r\n"


class Server:
    """The SMTP server role on one socket: stores the messages that it receives."""

    def __init__(self, sock, keywords=("PIPELINING", "8BITMIME", "SIZE 100000000", "SMTPUTF8"), received=b""):
        self.socket = sock
        self.keywords = keywords
        self.received = bytearray(received)
        self.messages = []

    def until(self, mark):
        """The octets up to `mark`, which is removed. None: the peer closed before it sent anything."""
        begin = 0
        while True:
            at = self.received.find(mark, begin)
            if at >= 0:
                octets = bytes(self.received[:at])
                del self.received[: at + len(mark)]
                return octets
            begin = max(0, len(self.received) - len(mark))
            some = self.more()
            if not some:
                if not self.received:
                    return None
                raise ConnectionError(f"closed in the middle of {bytes(self.received[:80])!r}")
            self.received += some

    def more(self):
        some = self.socket.recv(262144)
        # fetchmail writes line by line and uses Nagle's algorithm: without this each message costs 40 ms.
        if hasattr(socket, "TCP_QUICKACK"):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return some

    def say(self, *lines):
        self.socket.sendall("".join(line + "\r\n" for line in lines).encode())

    def data(self):
        """The content after a 354, unstuffed."""
        while len(self.received) < 3:
            some = self.more()
            check(some, "closed before any content")
            self.received += some
        if self.received.startswith(b".\r\n"):
            del self.received[:3]
            return b""
        content = self.until(b"\r\n.\r\n") + b"\r\n"
        if content.startswith(b"."):
            content = content[1:]
        return content.replace(b"\r\n..", b"\r\n.")

    def serve(self):
        """Until QUIT (True) or the end of the connection (False)."""
        self.say("220 mail.example.org ready to receive email")
        sender, recipients = None, []
        while (line := self.until(b"\r\n")) is not None:
            verb = line[:4].upper()
            if verb == b"EHLO":
                lines = ["mail.example.org", *self.keywords]
                self.say(*(f"250-{text}" for text in lines[:-1]), f"250 {lines[-1]}")
            elif verb == b"MAIL":
                sender, recipients = angle(line), []
                self.say("250 2.1.0 ok")
            elif verb == b"RCPT":
                recipients.append(angle(line))
                self.say("250 2.1.5 ok")
            elif verb == b"DATA":
                self.say("354 go ahead")
                self.messages.append(Message(sender, recipients, self.data()))
                self.say("250 2.6.0 kept")
            elif verb in (b"RSET", b"NOOP", b"HELO"):
                self.say("250 2.0.0 ok")
            elif verb == b"QUIT":
                self.say("221 2.0.0 mail.example.org closing connection")
                return True
            else:
                self.say("502 5.5.1 no such command")
        return False


def angle(line):
    found = re.search(rb"<(.*?)>", line)
    check(found, f"no path in {line!r}")
    return found.group(1).decode("utf-8", "backslashreplace")


def lets_in(server, verb):
    """Replies to EHLO and AUTH as a provider does, for any login; False: it was another command."""
    if verb == b"EHLO":
        server.say("250-relay.example.net", "250-PIPELINING", "250-AUTH CRAM-MD5", "250 ATRN")
    elif verb == b"AUTH":
        server.say("334 PDEuMkByZWxheT4=")
        server.until(b"\r\n")
        server.say("235 2.7.0 ok")
    return verb in (b"EHLO", b"AUTH")


def serve_each(box, serve):
    """Listens on a free port and runs `serve` in a thread for each connection. Returns the socket and its port."""
    listener = box.keep(socket.create_server((LOOPBACK, 0)))

    def accept():
        for sock in connections(listener):
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener, listener.getsockname()[1]


class Listener:
    """A local mail server: each connection gets a thread and a Server; one list has all their messages."""

    def __init__(self, box, **options):
        self.messages = []
        self.quits = 0
        self.errors = []
        self.options = options
        self.socket, self.port = serve_each(box, self.session)

    def close(self):
        hang_up(self.socket)

    def session(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = Server(sock, **self.options)
        server.messages = self.messages
        with sock:
            try:
                self.quits += server.serve()
            except (OSError, Failed) as error:
                self.errors.append(str(error))


RECEIVED = re.compile(rb"Received: [^\r\n]*(?:\r\n[ \t][^\r\n]*)*\r\n")


def same_but_trace(got, sent):
    """Whether `got` is `sent` after one Received field."""
    first = RECEIVED.match(got)
    return bool(first) and got[first.end() :] == sent
