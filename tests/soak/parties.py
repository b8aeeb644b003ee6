"""The parties that send, fetch and receive mail the whole time: senders on port 25, a hundred customers, and a remote
mail host."""

import base64
import collections
import contextlib
import pathlib
import random
import socket
import threading
import time
import traceback

from harness import LOOPBACK, ODMR, Certificates, Customer, Failed, Provider, Server, Smtp, angle, check, context, free_port, secret, stuffed
from ledger import Ledger, compose
from world import House, Names, outgoing_table

ACCOUNTS = [f"c{number:02}" for number in range(100)]
# How customers fetch: daemons, single calls of `odmr pull`, a light client, a faulty client, and one that never calls.
DAEMONS, PULLS, LIGHT, RUDE, SLEEPER = ACCOUNTS[:6], ACCOUNTS[6:36], ACCOUNTS[36:90], ACCOUNTS[90:99], ACCOUNTS[99]
EXTRA = "extra"  # an account that is added and removed
KINDS = ("cram", "scram", "plain", "certificate", "default")
WORLD = [f"d{number}.world.example" for number in range(10)]
SINK = "127.0.0.3"
MANNERS = ("slow", "hangs up", "cuts content", "cuts reply", "defers", "full", "stalls")


def kind(account):
    return KINDS[int(account[1:]) % len(KINDS)] if account[1:].isdigit() else "default"


def domains(account):
    several = account[1:].isdigit() and int(account[1:]) % 4 == 0
    return [f"{account}.example"] + [f"{account}.more.example"] * several


def account_of(recipient):
    """None: a remote recipient."""
    domain = recipient.split("@")[1]
    return None if domain.endswith(".world.example") else domain.split(".")[0]


def may_return(recipient):
    """Whether its message may bounce: the address does not exist, its mail expires, or its account may be removed."""
    return recipient.startswith("nobody@") or account_of(recipient) in (SLEEPER, EXTRA)


class Soak:
    """The state that all share: the directory, the provider, the ledger, and the requests to pause or stop."""

    def __init__(self, box, seed, rate):
        self.box, self.seed, self.rate = box, seed, rate
        self.ledger = Ledger()
        self.stop, self.paused = threading.Event(), threading.Event()
        self.lock, self.working = threading.Lock(), 0
        self.counts = collections.Counter()  # kills, reloads, exit codes, …: for the report
        self.defects = []  # events that must not happen
        self.processes = {}  # account -> its `odmr pull` that may be killed
        self.sink = Sink(self)
        self.names = Names(box, mx={name: [(1, "mx.world.example")] for name in WORLD}, hosts={"mx.world.example": SINK})
        self.certificates = Certificates(box)
        self.tls = context(self.certificates.authority)
        self.provider = self.make_provider()
        self.customers = {account: make_customer(self, account) for account in DAEMONS + PULLS}

    def make_provider(self):
        accounts = {account: "relay = true\n" for account in ACCOUNTS}
        accounts[SLEEPER] = 'expire-after = "30m"\n'
        pin = own_certificate(self.box)
        for account in ACCOUNTS:
            if kind(account) == "certificate":
                accounts[account] += f'certificate = ["{pin}"]\n'
        relay = f'[relay]\nresolver = "{self.names.resolver}"\nallow-private = true\nport = {self.sink.port}\n'
        relay += 'connections = 4\nretry-first = "1s"\nretry-max = "5s"\n'
        return Provider(
            self.box, certificates=self.certificates, require_tls=False, accounts=accounts,
            customers={account: domains(account) for account in ACCOUNTS},
            ports=(free_port(), free_port(), free_port()), more=relay + '[timeouts]\ntakeover = "10s"\n',
        )

    @contextlib.contextmanager
    def work(self):
        with self.lock:
            self.working += 1
        try:
            yield
        finally:
            with self.lock:
                self.working -= 1

    def has_extra(self):
        """Whether the account that comes and goes exists. A login to a removed account would count as a guess."""
        return (self.provider.config.parent / f"serve-customers.d/{EXTRA}.toml").exists()

    def over_inetd(self, listener):
        """A connection that `odmr serve --inetd` serves, and its process."""
        with socket.create_server((LOOPBACK, 0)) as server:
            line = Smtp(server.getsockname()[1])
            far, _ = server.accept()
        with far:
            command = [ODMR, "serve", "-c", self.provider.config, "--inetd", listener]
            process = self.box.start("inetd.log", *command, stdin=far, stdout=far, env=self.provider.environment)
        self.counts["inetd"] += 1
        return line, process

    def reap(self, process):
        process.wait(30)
        forget_clock(process.pid)
        with self.lock:
            self.box.children.remove(process)

    def collect(self, account):
        """Counts and removes what has come into the mailboxes of a customer."""
        customer = self.customers[account]
        with customer.collecting:
            for file in customer.files():
                recipient = f"{file.parent.parent.name}@{file.parent.parent.parent.name}"
                self.ledger.arrive(file.read_bytes(), [recipient], file.stat().st_mtime)
                file.unlink()




def forget_clock(pid):
    """Removes the files that libfaketime leaves after a process was killed."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        pathlib.Path("/dev/shm", name).unlink(missing_ok=True)


def own_certificate(box):
    """A key for the customers that log in by certificate. Returns its pin."""
    done = box.run(
        *["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "9"],
        *["-subj", "/CN=customer", "-keyout", box.path / "me.key", "-out", box.path / "me.pem"],
    )
    check(done.returncode == 0, done.stderr)
    (box.path / "me.key").chmod(0o600)
    public = f"openssl x509 -in {box.path}/me.pem -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256 -r"
    return "spki-sha256:" + box.run("sh", "-c", public).stdout.split()[0]


def make_customer(soak, account):
    tls, login = {
        "cram": ("none", 'mechanisms = ["CRAM-MD5"]'),
        "scram": ("starttls", 'mechanisms = ["SCRAM-SHA-256"]'),
        "plain": ("implicit", 'mechanisms = ["PLAIN"]'),
        "certificate": ("starttls", f'certificate = "{soak.box.path}/me.pem"\nkey = "{soak.box.path}/me.key"'),
        "default": ("starttls", ""),
    }[kind(account)]
    port = soak.provider.odmr_tls if tls == "implicit" else soak.provider.odmr
    accept = [f"@{domain}" for domain in domains(account)]
    more = "except = [" + ", ".join(f'"nobody@{domain}"' for domain in domains(account)) + "]\n"
    more += outgoing_table(soak.box, file=account)
    if account in DAEMONS:
        more += '[schedule]\nevery = "3s"\nretry-first = "1s"\nretry-max = "4s"\njitter = "none"\n'
    customer = Customer(
        soak.box, port, tls=tls, authority=soak.certificates.authority, name=account, file=account, accept=accept, more=more
    )
    text = customer.config.read_text()
    if kind(account) == "certificate":
        text = text.replace(f'secret = "{secret(account)}"\n', "")
    customer.config.write_text(text.replace(f'name = "{account}"\n', f'name = "{account}"\n{login}\n'))
    customer.collecting = threading.Lock()
    return customer


class Actor(threading.Thread):
    """Calls `act` again and again, with a pause of so many seconds on average, until the soak stops."""

    def __init__(self, soak, name, pause):
        super().__init__(daemon=True, name=name)
        self.soak, self.pause = soak, pause
        self.dice = random.Random(f"{soak.seed} {name}")

    def run(self):
        soak = self.soak
        while not soak.stop.is_set():
            if not soak.paused.is_set():
                with soak.work():
                    self.once()
            soak.stop.wait(min(10 * self.pause, self.dice.expovariate(1 / self.pause)))

    def once(self):
        try:
            self.act()
        except (OSError, Failed):  # a provider or a process that was killed
            self.soak.counts[f"{type(self).__name__.lower()} broken"] += 1
        except Exception:
            self.soak.defects.append(f"the script: {traceback.format_exc()[-800:]}")

    def recipients(self):
        """One to ten recipients, or all hundred."""
        count = self.dice.choice((1, 1, 1, 1, 2, 2, 3, 5, 10))
        accounts = self.dice.sample(ACCOUNTS, count) + [EXTRA] * (self.dice.random() < 0.03)
        if SLEEPER in accounts and count > 1 and self.dice.random() < 0.5:
            accounts.remove(SLEEPER)
        users = ["eva", "eva", "adam"] * 15 + ["nobody"]
        return [f"{self.dice.choice(users)}@{self.dice.choice(domains(account))}" for account in accounts][:10]

    def size(self, count):
        chance = self.dice.random()
        most = 1024 * (8 if chance < 0.8 else 100 if chance < 0.98 or count > 2 else 2048)
        return self.dice.randrange(1024, most + 1)

    def transfer(self, line, sender, recipients):
        """One transaction; recipients with a 250 are recorded as accepted."""
        number = self.soak.ledger.next_number()
        content = compose(number, self.size(len(recipients)), sender, recipients)
        group = [f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{one}>" for one in recipients), "DATA"]
        line.socket.sendall("".join(f"{command}\r\n" for command in group).encode())
        replies = [line.reply() for _ in group]
        if not replies[-1].startswith("354"):
            self.soak.counts["deferred" if "4" in [reply[0] for reply in replies] else "rejected"] += 1
            return line.say("RSET")
        line.socket.sendall(stuffed(content))
        reply = line.reply()
        if reply.startswith("250"):
            self.soak.ledger.promise(number, [one for one, said in zip(recipients, replies[1:]) if said.startswith("250")])
        else:
            self.soak.counts["deferred"] += 1
        return reply


class Sender(Actor):
    """The Internet: some messages in a connection to port 25, one of four under TLS, one of twenty to an inetd process."""

    def act(self):
        soak, process = self.soak, None
        if self.dice.random() < 0.05:
            line, process = soak.over_inetd("inbound")
        else:
            source = f"127.10.{self.dice.randrange(200)}.{self.dice.randrange(1, 4)}"
            line = Smtp(soak.provider.inbound, source=source)
        try:
            with line:
                line.hello()
                if self.dice.random() < 0.25:
                    line.start_tls(soak.tls)
                for _ in range(self.dice.randrange(1, 8)):
                    if soak.paused.is_set():
                        break
                    if process and self.dice.random() < 0.1:
                        process.kill()  # no queue of ours sends it again, so no end is recorded
                        soak.counts["inetd kills"] += 1
                    self.transfer(line, f"s@{self.dice.choice(WORLD)}", self.recipients())
                    soak.stop.wait(self.dice.expovariate(soak.rate))
                line.want("221", "QUIT")
        finally:
            if process:
                soak.reap(process)


class Turned(Server):
    """The SMTP server after the turn, correct or faulty."""

    def __init__(self, line, soak, account, manner, dice):
        super().__init__(line.socket, received=line.received)
        self.soak, self.account, self.manner, self.dice = soak, account, manner, dice

    def more(self):
        if self.manner == "slow" and not self.soak.paused.is_set():
            time.sleep(0.02)
            return self.socket.recv(16384)
        return super().more()

    def serve(self):
        self.say("220 customer.example ready")
        recipients = []
        while (line := self.until(b"\r\n")) is not None:
            verb = line[:4].upper()
            rude = self.manner and not self.soak.paused.is_set() and self.dice.random() < 0.3
            if verb == b"EHLO":
                self.say("250-customer.example", "250-PIPELINING", "250-8BITMIME", "250 SIZE 100000000")
            elif verb == b"MAIL":
                recipients = []
                self.say("250 2.1.0 ok")
            elif verb == b"RCPT":
                if angle(line).startswith("nobody@"):
                    self.say("550 5.1.1 unknown")
                elif rude and self.manner == "defers":
                    self.say("451 4.2.0 not now")
                else:
                    recipients.append(angle(line))
                    self.say("250 2.1.5 ok")
            elif verb == b"DATA":
                self.take(recipients, rude)
            elif verb in (b"RSET", b"NOOP"):
                self.say("250 2.0.0 ok")
            elif verb == b"QUIT":
                self.say("221 2.0.0 bye")
                return
            else:
                self.say("502 5.5.1 no such command")
        raise ConnectionError("closed without QUIT")

    def take(self, recipients, rude):
        if not recipients:
            return self.say("554 5.5.1 no valid recipients")
        self.say("354 go ahead")
        if rude and self.manner == "cuts content":
            raise ConnectionError("cut in the content")
        content = self.data()
        if rude and self.manner == "full":
            return self.say("452 4.3.1 no room")
        if rude and self.manner == "stalls":
            time.sleep(self.dice.uniform(5, 14))  # longer than a takeover needs
        if rude and self.manner == "cuts reply":
            raise ConnectionError("cut before the reply")
        self.say("250 2.0.0 ok")
        self.soak.ledger.arrive(content, recipients)


class Light(Actor):
    """Customers as a small client: they log in as their kind does, now and then submit mail, turn, receive."""

    def __init__(self, soak, name, pause, accounts, manners=(None,)):
        super().__init__(soak, name, pause)
        self.accounts, self.manners = accounts, manners

    def act(self):
        account = self.dice.choice(self.accounts)
        if account != EXTRA or self.soak.has_extra():
            self.call(account, self.dice.choice(self.manners))

    def call(self, account, manner):
        soak, process, begun = self.soak, None, time.time()
        source = f"127.20.{int(account[1:]) if account[1:].isdigit() else 200}.1"
        if self.dice.random() < 0.03:
            line, process = soak.over_inetd("odmr")
        elif kind(account) == "plain":
            line = Smtp(soak.provider.odmr_tls, tls=soak.tls, source=source)
        else:
            line = Smtp(soak.provider.odmr, source=source)
        try:
            with line:
                self.dialogue(line, account, manner, process)
        except (OSError, Failed) as error:
            if manner or process:
                soak.ledger.abrupt(account)
            elif not any(when > begun - 5 and name in (None, account) for when, name in soak.ledger.ends[-100:]):
                soak.defects.append(f"the call of {account}, which has manners, broke off: {error!r}")
            raise
        finally:
            if process:
                soak.reap(process)

    def dialogue(self, line, account, manner, process):
        soak = self.soak
        line.hello()
        if kind(account) in ("scram", "certificate", "default"):
            line.start_tls(soak.tls)
        if kind(account) == "cram":
            line.log_in(account)
        else:
            if not hasattr(line.socket, "version"):
                line.start_tls(soak.tls)
            line.want("235", "AUTH PLAIN " + base64.b64encode(f"\0{account}\0{secret(account)}".encode()).decode())
        if self.dice.random() < 0.3 and account not in (SLEEPER, EXTRA):
            self.submit(line, account)
        reply = line.say("ATRN")
        if reply[:3] in ("453", "450", "451"):
            soak.counts[f"ATRN {reply[:3]}"] += 1
            line.want("221", "QUIT")
            return
        check(reply.startswith("250"), f"ATRN: {reply}")
        if manner == "hangs up":
            raise ConnectionError("hung up after the turn")
        if process and self.dice.random() < 0.3:
            threading.Timer(self.dice.uniform(0, 0.1), process.kill).start()
            soak.ledger.abrupt(account)
            soak.counts["inetd kills"] += 1
        Turned(line, soak, account, manner, self.dice).serve()
        soak.counts["turns"] += 1

    def submit(self, line, account):
        """Outgoing mail: to remote recipients, and to other customers."""
        users = ["u", "v", "w"] * 8 + ["nobody"]
        to = [f"{self.dice.choice(users)}@{self.dice.choice(WORLD)}" for _ in range(self.dice.randrange(1, 4))]
        self.transfer(line, f"eva@{account}.example", list(dict.fromkeys(to)) + self.recipients()[:1])


class Puller(Actor):
    """Customers for which `odmr pull` calls, one after the other; some have queued mail with `odmr send` before."""

    def __init__(self, soak, name, pause, accounts):
        super().__init__(soak, name, pause)
        self.accounts, self.next = accounts, 0

    def act(self):
        account = self.accounts[self.next % len(self.accounts)]
        self.next += 1
        if self.dice.random() < 0.15:
            queue_mail(self, account)
        self.pull(account)

    def pull(self, account):
        soak = self.soak
        with soak.lock:
            process = soak.customers[account].start()
            soak.processes[account] = process
        code = process.wait(300)
        soak.counts[f"pull exit {code}"] += 1
        if code not in (0, 69, 75, -9, -15):
            soak.defects.append(f"odmr pull of {account}: exit {code}: {soak.customers[account].log()[-400:]}")
        soak.reap(process)
        soak.collect(account)
        return code


def queue_mail(actor, account):
    """`odmr send` to remote recipients; the next call sends the queue, and again if it is interrupted."""
    soak = actor.soak
    number = soak.ledger.next_number()
    to = [f"u@{actor.dice.choice(WORLD)}"]
    text = compose(number, actor.size(9), f"eva@{account}.example", to).replace(b"\r\n", b"\n").decode()
    command = [ODMR, "send", "-C", soak.customers[account].config, "-i", "-f", f"eva@{account}.example", *to]
    if soak.box.run(*command, input=text).returncode == 0:
        soak.ledger.promise(number, to, resends=True)


class Watcher(Actor):
    """Restarts the daemons, gives them mail to send, and empties their mailboxes."""

    def act(self):
        self.keep()
        queue_mail(self, self.dice.choice(DAEMONS))

    def keep(self):
        soak = self.soak
        for account in DAEMONS:
            process = soak.processes.get(account)
            if process and process.poll() is not None:
                if process.returncode not in (0, -9, -15):
                    soak.defects.append(f"the daemon of {account}: exit {process.returncode}: {soak.customers[account].log()[-400:]}")
                soak.reap(process)
                process = None
            if not process:
                customer = soak.customers[account]
                with soak.lock:
                    soak.processes[account] = soak.box.start(customer.log_name, ODMR, "pull", "--daemon", "-c", customer.config)
            soak.collect(account)


class Sink(House):
    """The remote mail host: defers now and then, rejects unknown names, closes between content and reply."""

    def __init__(self, soak):
        self.soak, self.dice, self.moody = soak, random.Random(f"{soak.seed} sink"), True
        super().__init__(soak.box, address=SINK, port=free_port())

    def note(self, *_):
        self.errors.clear()

    def rejection(self, verb, line):
        if verb == "RCPT" and angle(line).startswith("nobody@"):
            return "550 5.1.1 unknown"
        with self.lock:
            return "450 4.2.0 not now" if verb == "RCPT" and self.moody and self.dice.random() < 0.03 else None

    def take(self, _session, _sender, recipients, content):
        with self.lock:
            cut = self.moody and self.dice.random() < 0.02
        if cut:
            self.soak.counts["cuts at the sink"] += 1
            raise ConnectionError("cut before the reply")
        self.soak.ledger.arrive(content, recipients)
