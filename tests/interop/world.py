"""The Internet for outgoing mail: names by dnsmasq, and mail hosts with scripted replies."""

import base64
import collections
import hmac
import os
import socket
import ssl
import threading
import time

from harness import LOOPBACK, ODMR, Failed, Message, Server, angle, check, connections, free_port, hang_up, wait_until

RELAYS = {"acme": "relay = true\n"}  # for a Provider's `accounts`
Attempt = collections.namedtuple("Attempt", "time verb line reply")


class Names:
    """A dnsmasq with these names only. `mx`: domain -> [(preference, host)]; `hosts`: name -> address, or addresses in order;
    `null`: domains with a null MX (RFC 7505); `aliases`: name -> canonical name; `more`: lines of its configuration."""

    def __init__(self, box, *, mx=None, hosts=None, null=(), aliases=None, more=()):
        self.port = free_port()
        lines = ["no-resolv", "no-hosts", "no-daemon", "bind-interfaces", f"listen-address={LOOPBACK}"]
        lines += [f"port={self.port}", "local=/example/", "local=/invalid/", "log-queries", "no-round-robin", "log-facility=-", "user=root", "cache-size=0"]
        for domain, hops in (mx or {}).items():
            lines += [f"mx-host={domain},{host},{preference}" for preference, host in hops]
        for name, found in (hosts or {}).items():
            lines += [f"host-record={name},{address}" for address in ([found] if isinstance(found, str) else found)]
        lines += [f"cname={alias},{name}" for alias, name in (aliases or {}).items()]
        lines += [f"dns-rr={domain},15,000000" for domain in null]
        box.write("dnsmasq.conf", "\n".join([*lines, *more]) + "\n")
        box.start("dnsmasq.log", "dnsmasq", f"--conf-file={box.path}/dnsmasq.conf", "--pid-file=")
        wait_until(lambda: "started, version" in box.log("dnsmasq.log"), "dnsmasq to start")
        self.resolver = f"{LOOPBACK}:{self.port}"


class Host(Server):
    """One connection to a mail host: STARTTLS, AUTH, BDAT, and scripted rejections as long as there are any."""

    def __init__(self, sock, house):
        self.house = house
        super().__init__(sock, keywords=house.keywords)
        self.messages = house.messages
        self.secure = self.account = None
        self.present = True

    def serve(self):
        house = self.house
        self.say(f"220 {house.name} ESMTP")
        sender, recipients, chunks = None, [], b""
        while (line := self.until(b"\r\n")) is not None:
            verb = line[:4].upper().decode("ascii", "replace")
            reply = house.rejection(verb, line)
            if verb == "DATA" and not reply:
                self.say("354 go ahead")
                reply = self.take(sender, recipients, self.data())
            elif verb == "BDAT":
                words = line.split()
                chunks += self.octets(int(words[1]))
                if not reply and len(words) > 2:
                    reply, chunks = self.take(sender, recipients, chunks), b""
            elif reply:
                pass
            elif verb == "EHLO":
                self.ehlo()
                continue
            elif verb == "STAR" and house.tls and not self.secure:
                self.say("220 2.0.0 go ahead")
                self.socket = house.tls.wrap_socket(self.socket, server_side=True)
                self.secure = self.socket.version()
                self.received.clear()
                continue
            elif verb == "AUTH" and house.accounts:
                reply = self.log_in(line)
            elif verb == "MAIL":
                needs = house.accounts and not self.account
                sender, recipients = angle(line), []
                reply = "530 5.7.0 authenticate first" if needs else "250 2.1.0 ok"
            elif verb == "RCPT":
                recipients.append(angle(line))
                reply = "250 2.1.5 ok"
            elif verb in ("RSET", "NOOP", "HELO"):
                sender, recipients, chunks = None, [], b""
                reply = "250 2.0.0 ok"
            elif verb == "QUIT":
                house.leave(self)  # before the peer can know it, and connect again
                self.say("221 2.0.0 bye")
                return True
            house.note(verb, line, reply or "250 2.0.0 ok")
            self.say(reply or "250 2.0.0 ok")
        return False

    def take(self, sender, recipients, content):
        if not recipients:
            return "554 5.5.1 no valid recipients"
        self.house.take(self, sender, recipients, content)
        return "250 2.6.0 taken"

    def octets(self, count):
        while len(self.received) < count:
            some = self.more()
            check(some, "closed in the middle of a chunk")
            self.received += some
        octets = bytes(self.received[:count])
        del self.received[:count]
        return octets

    def ehlo(self):
        keywords = list(self.house.keywords)
        if self.house.tls and not self.secure:
            keywords.append("STARTTLS")
        elif self.house.accounts:
            keywords.append(f"AUTH {' '.join(self.house.mechanisms)}")
        lines = [self.house.name, *keywords]
        self.say(*(f"250-{text}" for text in lines[:-1]), f"250 {lines[-1]}")

    def log_in(self, line):
        words = line.decode().split()
        if words[1].upper() == "CRAM-MD5":
            challenge = b"<1.2@host>"
            self.say("334 " + base64.b64encode(challenge).decode())
            name, digest = base64.b64decode(self.until(b"\r\n")).decode().rsplit(" ", 1)
            good = hmac.new(self.house.accounts.get(name, "").encode(), challenge, "md5").hexdigest() == digest
        else:
            if len(words) == 2:
                self.say("334 ")
                words.append(self.until(b"\r\n").decode())
            _, name, password = base64.b64decode(words[2]).decode().split("\0")
            good = self.house.accounts.get(name) == password
        if not good:
            return "535 5.7.8 no"
        self.account = name
        self.house.logins.append((words[1].upper(), name, bool(self.secure)))
        return "235 2.7.0 welcome"


class House:
    """A mail host on an address of loopback. `rejections`: verb -> the replies to its next uses; None: accepted. `tls`:
    (certificate,
    key); `accounts`: name -> secret, AUTH is then required."""

    def __init__(self, box, *, address=LOOPBACK, port=0, name="mx.dest.example", tls=None, accounts=None, **more):
        self.keywords = more.get("keywords", ("PIPELINING", "8BITMIME", "SIZE 100000000", "SMTPUTF8", "ENHANCEDSTATUSCODES"))
        self.mechanisms = more.get("mechanisms", ("PLAIN",))
        self.rejections = {verb: list(replies) for verb, replies in more.get("rejections", {}).items()}
        self.name, self.accounts, self.tls = name, accounts or {}, None
        if tls:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(*map(str, tls))
        self.messages, self.secured, self.attempts, self.logins, self.errors = [], [], [], [], []
        self.connections = self.open = self.most = 0  # in all; now; at once
        self.lock = threading.Lock()
        self.socket = box.keep(socket.create_server((address, port)))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def rejection(self, verb, _line):
        with self.lock:
            waiting = self.rejections.get(verb)
            return waiting.pop(0) if waiting else None

    def note(self, verb, line, reply):
        with self.lock:
            self.attempts.append(Attempt(time.monotonic(), verb, line.decode("utf-8", "replace"), reply))

    def times(self, verb):
        with self.lock:
            return [attempt.time for attempt in self.attempts if attempt.verb == verb]

    def take(self, session, sender, recipients, content):
        with self.lock:
            self.messages.append(Message(sender, recipients, content))
            self.secured.append(session.secure)

    def accept(self):
        for sock in connections(self.socket):
            with self.lock:
                self.connections += 1
                self.open += 1
                self.most = max(self.most, self.open)
            threading.Thread(target=self.session, args=(sock,), daemon=True).start()

    def close(self):
        hang_up(self.socket)

    def session(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host = Host(sock, self)
        try:
            host.serve()
        except (OSError, Failed, ValueError) as error:
            self.errors.append(str(error))
        finally:
            host.socket.close()
            self.leave(host)

    def leave(self, host):
        with self.lock:
            self.open -= host.present
            host.present = False


def self_signed(box, name, label="mx"):
    """A self-signed certificate and its key."""
    certificate, key = box.path / f"{label}.pem", box.path / f"{label}.key"
    done = box.run(
        *["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"],
        *["-keyout", key, "-out", certificate, "-days", "2", "-subj", f"/CN={name}"],
        *["-addext", f"subjectAltName=DNS:{name},DNS:localhost,IP:{LOOPBACK}"],
    )
    check(done.returncode == 0, f"openssl: {done.stderr}")
    return certificate, key


def sendmail(box, customer, *arguments, text="", by="sendmail", seconds=20, **options):
    """The odmr binary under the name that programs call, with the customer's file."""
    program = box.path / by
    if not program.exists():
        program.symlink_to(ODMR)
    environment = os.environ | {"ODMR_CONFIG": str(customer.config)}
    return box.run(program, *arguments, input=text, env=environment, seconds=seconds, **options)


def queued(customer):
    """The files of outgoing mail."""
    queue = customer.box.path / f"{customer.log_name[:-4]}-queue"
    return [file for part in ("new", "cur") for file in queue.glob(f"{part}/*")]


def outgoing_table(box, file="pull", more=""):
    """`[outgoing]` for a Customer of that name."""
    return f'\n[outgoing]\nqueue = "{box.path}/{file}-queue"\n{more}\n'
