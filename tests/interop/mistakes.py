"""The mistakes of users, each provoked as a user makes it: the text that the program must print, and its exit code.

A row of a table is one mistake: its cause, the command, the exit code, and the expected output, in which `…` is any
text within a
line. The name of the scenario's directory is left out. All rows are tried before a scenario fails.
"""

import os
import re
import socket
import threading
from collections import namedtuple

from clock import YEAR, Clock
from harness import LOOPBACK, ODMR, Smtp, check, connections, events, free_port, scenario, wait_until
from world import self_signed

CUSTOMER = {
    "": {"hostname": '"mail.example.org"'},
    "provider": {"address": '"localhost:366"', "ca": '"relay.pem"', "name": '"acme"', "secret": '"the secret of acme"'},
    "mailboxes": {"root": '"mail"', "accept": '["@example.org"]'},
}
PROVIDER = {
    "": {"hostname": '"relay.example.net"', "spool": '"spool"', "customers": '"customers.d"'},
    "tls": {"certificate": '"relay.pem"', "key": '"relay.key"'},
    "inbound": {"listen": '["127.0.0.1:0"]'},
    "odmr": {"listen": '["127.0.0.1:0"]'},
    "relay": {"resolver": '"127.0.0.1:1"'},
}
ACCOUNT = {"": {"domains": '["example.org"]', "secret": '"the secret of acme"'}}
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
BAD = {"check": 1, "pull": 78, "serve": 78}  # the exit code of each command if the configuration is wrong
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
# In a mount namespace: a command with a directory read-only, or on a file system of 200 KiB.
READ_ONLY = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
SMALL_DISK = 'mount -t tmpfs -o size=200k none "$1"; shift; exec "$@"'
PROGRAMMERS = re.compile(r"Some\(|Err\(|panicked|IpAddress\(|DnsName\(|\bOs \{|\(\)$")

Row = namedtuple("Row", "what before command code says")


def mistake(what, before, command, code, *says):
    return Row(what, before, command, code, says)


def with_changes(file, changes):
    """The text of a file with each of these settings, such as `tls.key = "x"`; `-tls.key` leaves one out, `-tls` a table."""
    tables = {name: dict(table) for name, table in file.items()}
    for change in changes:
        place, _, value = change.partition(" = ")
        section, _, key = place.removeprefix("-").rpartition(".")
        if place.removeprefix("-") in tables:
            del tables[place.removeprefix("-")]
        elif place.startswith("-"):
            del tables[section][key]
        else:
            tables.setdefault(section, {})[key] = value
    head = lambda name: f"[{name}]\n" if name else ""
    return "".join(head(name) + "".join(f"{key} = {value}\n" for key, value in table.items()) for name, table in tables.items())


def says(output, text):
    """Whether a line of the output has the text, in which `…` is any text."""
    return re.search(".*".join(re.escape(part) for part in text.split("…")), output)


class Place:
    """A directory with a provider and a customer that work, and the changes of a row to their files."""

    def __init__(self, box):
        self.box, self.port, self.inbound = box, 366, 25
        self.failures, self.tried = [], 0
        self_signed(box, "relay.example.net", "relay")
        self_signed(box, "mail.example.net", "other")
        (box.path / "customers.d").mkdir()
        self.account()()
        self.provider()()
        self.customer()()

    def write(self, name, text="", mode=0o600):
        return lambda: self.box.write(name, text, mode)

    def customer(self, *changes):
        """Returns a function that writes the customer's file with these changes."""
        address = f'provider.address = "localhost:{self.port}"'
        return self.write("customer.toml", with_changes(CUSTOMER, [address, *changes]))

    def provider(self, *changes, mode=0o600, name="provider.toml"):
        return self.write(name, with_changes(PROVIDER, changes), mode)

    def account(self, *changes, name="acme.toml"):
        return self.write(f"customers.d/{name}", with_changes(ACCOUNT, changes))

    def remove(self, name):
        return lambda: (self.box.path / name).unlink()

    def mode(self, name, mode):
        return lambda: (self.box.path / name).chmod(mode)

    def start(self, *around, **options):
        """Starts the provider; `around`: the words before its command."""
        self.process = self.box.start("serve.log", *around, ODMR, "serve", "-c", "provider.toml", cwd=self.box.path, **options)
        ports = lambda: dict(re.findall(r"listening (inbound|odmr) \S+:(\d+)", self.log()))
        found = wait_until(lambda: len(ports()) == 2 and ports(), "the provider to listen")
        self.inbound, self.port = int(found["inbound"]), int(found["odmr"])
        self.customer()()
        return self

    def log(self):
        return self.box.log("serve.log")

    def send(self, recipient="alice@example.org", content=CONTENT):
        """Sends one message to the provider. Returns the last reply."""
        with Smtp(self.inbound) as client:
            client.hello()
            return client.send("lester@dot.example", [recipient], content)

    def odmr(self, command, around=(), **options):
        """Runs a command. Returns its exit code and its output."""
        done = self.box.run(*around, ODMR, *command.split(), cwd=self.box.path, **options)
        return done.returncode, (done.stdout + done.stderr).replace(f"{self.box.path}/", "")

    def try_each(self, *rows, **options):
        """`options`: see `odmr`. A row may have several commands; then `code` has the exit code of each."""
        for row in rows:
            for before in row.before if isinstance(row.before, list) else [row.before]:
                before and before()
            for command in row.command.split("; "):
                code = row.code if isinstance(row.code, int) else row.code[command.split()[0]]
                self.compare(row, command, code, self.odmr(command, **options))

    def compare(self, row, command, code, result):
        self.tried += 1
        wrong = [f"wanted {text}" for text in row.says if not says(result[1], text)]
        if result[0] != code:
            wrong.append(f"wanted the exit code {code}, got {result[0]}")
        if PROGRAMMERS.search(result[1]):
            wrong.append("wanted words that a user understands")
        if wrong:
            printed = [f"got    {line}" for line in result[1].splitlines()]
            self.failures.append("\n        ".join([f"\n    {row.what}: odmr {command}", *wrong, *printed]))

    def finish(self):
        check(not self.failures, f"{len(self.failures)} of {self.tried} were not as they should be{''.join(self.failures)}")
        return f"{self.tried} tried"


def service(box, greeting=b"", hangs_up=False):
    """A service that only sends its greeting. Returns its port."""
    listener = box.keep(socket.create_server((LOOPBACK, 0)))

    def accept():
        for sock in connections(listener):
            box.keep(sock).sendall(greeting)
            if hangs_up:
                sock.close()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


@scenario("mistakes-of-connection", needs=["openssl"])
def mistakes_of_connection(box):
    """A wrong secret, host, port or TLS mode: the customer's error has the cause and the remedy"""
    place = Place(box).start()
    customer, closed = place.customer, free_port()
    at = lambda port: f'provider.address = "localhost:{port}"'
    check_there = "Connection refused…is `odmr serve` running there…firewall…port 366"
    another = "another service? check the port"
    place.try_each(
        mistake("1 a wrong secret", customer('provider.secret = "no, this is not it"'), "pull -c customer.toml", 77,
                "odmr: the provider rejected AUTH: 535 5.7.8 …; check `name` and `secret`, or `certificate`"),
        mistake("1 a wrong name", customer('provider.name = "acne"'), "pull -c customer.toml", 77,
                "odmr: the provider rejected AUTH: 535 5.7.8 …; check `name` and `secret`, or `certificate`"),
        mistake("2, 25 a closed port", customer(at(closed)), "pull -c customer.toml", 69,
                f"odmr: no connection to localhost:{closed}: {LOOPBACK}:{closed}: {check_there}"),
        mistake("2, 25 a closed port", None, "check -c customer.toml --call", 1,
                f"customer.toml:3: no connection to localhost:{closed}: …{check_there}"),
        mistake("3 the port of the world", customer(at(place.inbound)), "pull -c customer.toml", 76,
                "odmr: the server does not offer ATRN, so it is not a provider of on-demand mail, and the secret was not sent "
                "to it; check host and port in `address`"),
        mistake("4 a service that hangs up", customer(at(service(box, hangs_up=True))), "pull -c customer.toml", 75,
                f"odmr: localhost:…: the peer closed the connection…{another}"),
        mistake("4 a service with another protocol", customer(at(service(box, b"SSH-2.0-OpenSSH_9.2p1\r\n"))),
                "pull -c customer.toml", 76, f"odmr: localhost:…{another}"),
        mistake("4 the port of another service", None, "check -c customer.toml --call", 1, f"customer.toml:3: …{another}"),
        mistake("5 TLS at once, where STARTTLS is", customer('provider.tls = "implicit"'), "pull -c customer.toml", 76,
                "what the peer sends is not TLS: does it use clear text or STARTTLS on this port? (see `tls`)"),
        mistake("6 no TLS, where it is demanded", customer("-provider.ca", 'provider.tls = "none"'), "pull -c customer.toml", 76,
                'the provider offers no authentication in clear, but STARTTLS: set `tls = "starttls"`'),
        mistake("22 a URL", customer('provider.address = "smtp://localhost:366"'), "check -c customer.toml; pull -c customer.toml", BAD,
                "customer.toml:3: …write HOST or HOST:PORT"),
        mistake("23 IPv6 without brackets", customer('provider.address = "::1"'), "check -c customer.toml; pull -c customer.toml", BAD,
                'customer.toml:3: …needs brackets…write "[::1]:366"'),
        mistake("24 an unknown host", customer('provider.address = "nosuch.invalid"'), "pull -c customer.toml", 68,
                "odmr: nosuch.invalid:366 has no address: …; check `address` and the name server"),
    )
    check(events(place.log(), "auth-failed", account="acme") and events(place.log(), "auth-failed", account="acne"), "1 the provider does not log the account")
    return place.finish()


@scenario("mistakes-of-certificates", needs=["openssl", "faketime"])
def mistakes_of_certificates(box):
    """Certificates that are not trusted, expired, for another name, missing, or of another key: the error has the cause and the remedy"""
    place, clock = Place(box).start(), Clock(box)
    customer, provider = place.customer, place.provider
    whole, key = re.search(r"(sha256:\w{64}).*(spki-sha256:\w{64})", place.odmr("check -c provider.toml")[1]).groups()
    place.write("nothing.pem", "nothing\n")()
    both = "check -c customer.toml; pull -c customer.toml"
    of_provider = "check -c provider.toml; serve -c provider.toml"
    place.try_each(
        mistake("7 self-signed, and no `ca`", customer("-provider.ca"), "pull -c customer.toml", 76,
                "the peer's certificate is not signed by a trusted authority: set `ca` to a file with it or its authority, or set "
                f"`pin` (it is {whole}, and its key is {key}; compare that with what the peer's operator tells you)"),
        mistake("8 `ca` is missing", customer('provider.ca = "nofile.pem"'), both, BAD,
                "customer.toml:4: nofile.pem: No such file or directory…: put the certificates there, or name others in `ca`"),
        mistake("8 `ca` is not PEM", customer('provider.ca = "nothing.pem"'), both, BAD,
                "customer.toml:4: nothing.pem holds no certificate (a PEM block BEGIN CERTIFICATE)"),
        mistake("9 a wrong pin", customer("-provider.ca", f'provider.pin = "sha256:{"0" * 64}"'), "pull -c customer.toml", 76,
                f"the peer's certificate is not the one in `pin`: it is {whole}; change `pin` only if the peer's operator "
                f"confirms that this is the new one (a pin of the key, {key}, survives renewals)"),
        mistake("12 for another name", provider('tls.certificate = "other.pem"', 'tls.key = "other.key"'), "check -c provider.toml", 1,
                "provider.toml:5: other.pem is for mail.example.net, localhost, 127.0.0.1 and not for relay.example.net, so "
                "customers that check names reject it: get one for relay.example.net, or correct `hostname`"),
        mistake("13 the certificate is missing", provider('tls.certificate = "nofile.pem"'), of_provider, BAD,
                "provider.toml:5: nofile.pem: No such file or directory…; put the certificate there, or name another file in `certificate`"),
        mistake("13 the key is missing", provider('tls.key = "nokey"'), of_provider, BAD,
                "provider.toml:6: nokey: No such file or directory…; put the key there, or name another file in `key`"),
        mistake("14 the key of another certificate", provider('tls.key = "other.key"'), of_provider, BAD,
                "provider.toml:6: other.key does not belong to the first certificate in relay.pem: the own certificate must come "
                "first, its issuers after it"),
    )
    provider()()
    for years, text in [(-6, "the peer's certificate is not valid yet: this machine's clock is wrong, or the peer's was"),
                        (3, "the peer's certificate has expired: its operator must renew it, unless this machine's clock is wrong")]:
        clock.set(years * YEAR)
        place.try_each(mistake(f"11 a clock that is wrong by {years} years", customer(), "pull -c customer.toml", 76, text), env=clock.environment)
    place.try_each(mistake("12 it has expired", None, "check -c provider.toml", 1,
                           "provider.toml:5: relay.pem has expired on …: renew it, so that customers can call"), env=clock.environment)
    return place.finish()


@scenario("mistakes-of-names", needs=["openssl", "unshare"], root=True)
def mistakes_of_names(box):
    """A certificate without the name that the customer calls: the error lists the names of the certificate"""
    place = Place(box)
    place.write("hosts", "127.0.0.1 localhost vm\n", 0o644)()
    place.start()
    by_name = ["unshare", "--mount", "sh", "-c", 'mount --bind hosts /etc/hosts; exec "$@"', "sh"]
    place.try_each(mistake("10 a name that is not in the certificate", place.customer(f'provider.address = "vm:{place.port}"'), "pull -c customer.toml", 76,
                           "the peer's certificate is not for vm but for relay.example.net, localhost, 127.0.0.1: correct "
                           "the address, or set `pin`"), around=by_name)
    return place.finish()


@scenario("mistakes-of-configuration", needs=["openssl"])
def mistakes_of_configuration(box):
    """Misspelt keys, values out of range, files for the other side: the error has the file and the line"""
    place = Place(box)
    customer, provider, account, write = place.customer, place.provider, place.account, place.write
    both, of_provider = "check -c customer.toml; pull -c customer.toml", "check -c provider.toml; serve -c provider.toml"
    checked = "check -c provider.toml"
    unknown = "unknown key `{}`, expected one of …"
    no_size = "is not a valid size: write a whole number of octets, or of KiB"
    place.try_each(
        mistake("16 `spol`", provider('spol = "spool"'), of_provider, BAD, "provider.toml:4: " + unknown.format("spol")),
        mistake("16 `acept`", customer('mailboxes.acept = ["@example.org"]'), both, BAD, "customer.toml:10: " + unknown.format("acept")),
        mistake("16 `[mailbox]`", customer('mailbox.root = "mail"'), both, BAD, "customer.toml:10: " + unknown.format("mailbox")),
        mistake("16 `maxsize`", customer("mailboxes.maxsize = 1"), both, BAD, "customer.toml:10: " + unknown.format("maxsize")),
        mistake("19 no domains", [provider(), customer(), account("domains = []")], checked, 1, "customers.d/acme.toml:1: `domains` is missing or empty: name the customer's domains, such as domains = "),
        mistake("19 `domains` is missing", account("-domains"), checked, 1, "customers.d/acme.toml: `domains` is missing or empty: name the customer's domains"),
        mistake("19 a wildcard", account('domains = ["*.example.org"]'), checked, 1, 'customers.d/acme.toml:1: "*.example.org" is not a valid domain: write one such as "example.org"'),
        mistake("17 a rate below 0", account("rate = -5"), checked, 1, "customers.d/acme.toml:3: …-5 is too small: write 0 or more"),
        mistake("17 a size below 0", account('max-bytes = "-5MiB"'), checked, 1, f"customers.d/acme.toml:3: …{no_size}"),
        mistake("18 a domain of two accounts", [account(), account(name="zed.toml")], checked, 1,
                "customers.d/zed.toml:1: example.org is in customers.d/acme.toml too: a domain has one owner, remove it from one of them"),
        mistake("40 several errors in several files",
                [account("rate = -5", 'secret = ""', name="zed.toml"), account("domains = []", name="yak.toml"), provider('spol = "x"')], checked, 1,
                "provider.toml:4: " + unknown.format("spol"), "customers.d/yak.toml:1: ", "customers.d/zed.toml:2: the secret is empty", "customers.d/zed.toml:3: …-5 is too small"),
        mistake("20 a short secret, a strange name, files that are not read",
                [place.remove("customers.d/zed.toml"), place.remove("customers.d/yak.toml"), provider(),
                 account('domains = ["example.edu"]', 'secret = "x"', name="beta.toml"), write("customers.d/zed"), write("customers.d/zed.toml~"),
                 write("customers.d/zed.toml.bak"), account('domains = ["example.com"]', name="z ed.toml")], checked, 0,
                "customers.d/beta.toml:2: the secret has 1 octet", "customers.d/zed: is not read", "customers.d/zed.toml~: is not read",
                "customers.d/zed.toml.bak: is not read", "good: a provider with 3 customers, 3 domains"),
    )
    account("rate = -5", name="beta.toml")()
    place.start()
    check(events(place.log(), "customer-skipped"), "40 the account with a mistake is not named")
    check(place.send().startswith("250"), "40 a mistake in another account stops the mail of this one")
    for name in ("beta.toml", "zed", "zed.toml~", "zed.toml.bak", "z ed.toml"):
        place.remove(f"customers.d/{name}")()
    text = with_changes(CUSTOMER, [])
    place.try_each(
        mistake("21 CRLF and BOM", write("customer.toml", "\ufeff" + text.replace("\n", "\r\n")), "check -c customer.toml", 0, "customer.toml: good: a customer of localhost:366, as acme"),
        mistake("26 a domain that is not in `domains`", customer('provider.domains = ["example.com"]', 'mailboxes.accept = ["alice@example.org"]'), both, BAD,
                "customer.toml:10: alice@example.org can get no mail, as its domain is not in the `domains` of [provider]: add it there"),
        mistake("37 a provider's file", None, "pull -c provider.toml", 78,
                "provider.toml: is a provider's file (it has `spool` or `customers`), for `odmr serve`; a customer's has [provider]"),
        mistake("37 a customer's file", None, "serve -c customer.toml", 78,
                "customer.toml: is a customer's file (it has [provider]), for `odmr pull`; a provider's has `spool` and `customers`"),
        mistake("37 the file of an account", None, "serve -c customers.d/acme.toml; check -c customers.d/acme.toml", BAD, "customers.d/acme.toml: is the file of one customer at a provider (it has `domains`): name the provider's file, which has `spool` and `customers`"),
        mistake("37 a directory", None, "serve -c customers.d; check -c customers.d", BAD, "customers.d: cannot be read: Is a directory…; name a file in it"),
        mistake("37 a file that is not there", None, "serve -c nofile.toml; check -c nofile.toml", BAD, "nofile.toml: cannot be read: No such file or directory…; correct the name, or make that file"),
        mistake("38 a misspelt day", customer('schedule.at = ["mon-fry 08:00"]'), both, BAD,
                'customer.toml:11: "fry" is not a valid day: write mon, tue, wed'),
        mistake("38 a window without `every`", customer('schedule.at = ["mon-fri 08:00-18:00"]'), both, BAD,
                'customer.toml:11: "08:00-18:00" has no step: write "08:00-18:00 every 5m", or times such as "08:00"'),
        mistake("38 `every` without a unit", customer("schedule.every = 15"), both, BAD, 'customer.toml:11: …expected a time such as "5m"'),
        mistake("38 an unknown time zone", customer('schedule.zone = "Europe/Berln"', 'schedule.every = "15m"'), both, BAD,
                'customer.toml:11: "Europe/Berln" is not a time zone that this machine knows: write a name from /usr/share/zoneinfo'),
        mistake("39 secret and secret-file", customer('provider.secret-file = "sec"'), both, BAD, "customer.toml:7: `secret` and `secret-file` exclude each other: remove one of the two"),
        mistake("39 the secret-file is missing", customer("-provider.secret", 'provider.secret-file = "sec"'), both, BAD, "customer.toml:6: …sec cannot be read: No such file"),
        mistake("15 a secret that every user may read", [customer(), place.mode("customer.toml", 0o644)], both, BAD,
                "customer.toml:6: …every user may read it: chmod 640 customer.toml"),
        mistake("15 a key that every user may read", [provider(), place.mode("relay.key", 0o644)], of_provider, BAD,
                "provider.toml:6: …every user may read it: chmod 640 relay.key"),
    )
    return place.finish()


@scenario("mistakes-of-domains", needs=["openssl"])
def mistakes_of_domains(box):
    """Domains that only one of the two sides knows: `check --call` warns, and no mail bounces"""
    place = Place(box)
    place.account('domains = ["example.org", "example.com"]', 'soft-bounce = "2d"')()
    place.start()
    place.try_each(mistake("27 a domain that the customer does not accept, and one that the provider does not hold",
                           place.customer('mailboxes.accept = ["@example.org", "@example.edu"]'), "check -c customer.toml --call", 0,
                           "customer.toml:9: localhost:…holds mail for example.com, and no address in it is accepted, so that mail would be rejected: add \"@example.com\" or addresses to `accept`", "customer.toml:9: no provider holds mail for example.edu"))
    check(place.send("bob@example.com").startswith("250"), "the provider does not hold the message")
    place.try_each(mistake("27 mail for that domain", None, "pull -c customer.toml", 0, "rejected"))
    wait_until(lambda: events(place.log(), "turn-ended", deferred="1"), "the message to be deferred")
    check(events(place.log(), "delivery", to="<bob@example.com>", status="deferred"), place.log())
    check(len(list((box.path / "spool/domains/example.com").glob("[nc]*/*"))) == 1, "the message is not held any more")
    check(not list((box.path / "spool/outgoing").glob("*/[nc]*/*")), "a DSN is on its way")
    return place.finish()


@scenario("mistakes-of-files", needs=["openssl", "setpriv", "unshare"], root=True)
def mistakes_of_files(box):
    """Directories and files of another user, on a read-only or full disk, or missing: the error has the cause and the remedy"""
    place = Place(box)
    box.path.chmod(0o755)
    read_only = lambda directory: ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", directory]
    for directory in ("mail", "spool", "out"):
        (box.path / directory).mkdir(mode=0o755)
    place.start()
    check(place.send().startswith("250"), "the message was not accepted")
    own = [lambda: os.chown(box.path / "customer.toml", NOBODY, NOBODY), lambda: os.chown(box.path / "relay.pem", NOBODY, NOBODY)]
    place.try_each(mistake("28 `root` may not be written to", [place.customer(), *own], "pull -c customer.toml", 77, "mail…: Permission denied…; "),
                   mistake("28 `root` may not be written to", None, "check -c customer.toml", 1,
                           "customer.toml:8: …mail cannot be written to: Permission denied…; let the user that odmr runs as write there: chown or chmod mail"), around=AS_NOBODY)
    place.try_each(mistake("28 `root` is read-only", place.customer(), "pull -c customer.toml", 73, "mail…: Read-only file system…; mount …"),
                   mistake("28 `root` is read-only", None, "check -c customer.toml", 1, "customer.toml:8: …Read-only file system…; mount "),
                   around=read_only("mail"))
    queue = lambda: [(box.path / "out" / name).mkdir(parents=True, exist_ok=True) for name in ("new", "cur", "tmp")]
    waiting = [queue, place.write("out/new/1.1.a", "From: joe@example.org\n\nHello.\n")]
    place.try_each(mistake("28 `queue` is read-only", [place.customer('outgoing.queue = "out"'), *waiting], "pull -c customer.toml", 73,
                           "odmr: outgoing mail waits, and cannot be sent: …out/odmr.lock cannot be written to: Read-only file system…; mount …"),
                   around=read_only("out"))
    (box.path / "out/new/1.1.a").unlink()
    place.try_each(mistake("28 `root` is read-only, and was written to before", place.customer(), "pull -c customer.toml", 73,
                           "odmr: …mail/.odmr/call-… cannot be written to: Read-only file system…; mount …"), around=read_only("mail"))
    place.try_each(
        mistake("29 an unknown user", place.customer('user = "nosuch"'), "check -c customer.toml; pull -c customer.toml", BAD,
                'customer.toml:2: there is no user "nosuch" here: make one (as root type `useradd -r nosuch`), or change `user`'),
        mistake("29 mailboxes of another user", [place.customer(), lambda: os.chown(box.path / "mail", NOBODY, NOBODY)], "check -c customer.toml", 1,
                "customer.toml:8: mail belongs to another user: name that user in `user`, or be that user"),
        mistake("29 mailboxes of another user", None, "pull -c customer.toml", 78, "mail belongs to another user…`user`"),
    )
    os.chown(box.path / "mail", 0, 0)
    place.provider('spool = "held"', name="held.toml")()
    (box.path / "held").mkdir()
    place.try_each(mistake("32 the spool is read-only", None, "check -c held.toml", 1, "held.toml:2: held cannot be written to: Read-only file system…; mount "),
                   mistake("32 the spool is read-only", None, "serve -c held.toml", 73, "held…: Read-only file system…; mount "), around=read_only("held"))
    place.write("blocked", "")()
    place.try_each(
        mistake("33 the spool is below directories that are not there", place.provider('spool = "a/b/spool"', name="deep.toml"), "check -c deep.toml", 0, "deep.toml: good: "),
        mistake("33 the spool is below a file", place.provider('spool = "blocked/spool"', name="deep.toml"), "check -c deep.toml", 1, "deep.toml:2: blocked is not a directory: move it away"),
        mistake("33 the spool is below a file", None, "serve -c deep.toml", 73, "odmr: blocked/spool…; a file is where a directory must be: move it away"),
        mistake("28 `root` is below a file", place.customer('mailboxes.root = "blocked/mail"'), "pull -c customer.toml", 73, "odmr: blocked/mail…; a file is where a directory must be: move it away"),
        mistake("28 `queue` is below a file", place.customer('outgoing.queue = "blocked/queue"'), "check -c customer.toml", 1, "customer.toml:11: blocked is not a directory: move it away"),
    )
    return place.finish()


@scenario("mistakes-of-disks", needs=["openssl", "unshare", "strace"], root=True)
def mistakes_of_disks(box):
    """A full disk on either side: no message is lost, clients and users get an error, and the call fails"""
    place = Place(box)
    for directory in ("mail", "spool"):
        (box.path / directory).mkdir()
    small = lambda directory: ["unshare", "--mount", "sh", "-c", SMALL_DISK, "sh", directory]
    large = CONTENT + (b"y" * 78 + b"\r\n") * 4000
    place.provider('limits.min-free = 0')()
    place.start(*small("spool"))
    reply = place.send(content=large)
    check(reply.startswith("452 4.3.1 The disk is full, try again later"), f"30 the provider's disk is full: {reply}")
    wait_until(lambda: [one for one in events(place.log(), "storage-failed") if "No space left on device" in one["error"]], "the error in the provider's log")
    place.process.terminate()
    place.process.wait(30)
    (box.path / "serve.log").unlink()
    place.start()
    check(place.send(content=large).startswith("250"), "the provider does not hold the message")
    place.try_each(
        mistake("31 the customer's disk is full", None, "pull -c customer.toml; pull -c customer.toml -q", 75,
                "from <lester@dot.example> to <alice@example.org>: deferred by us: 452 4.3.1 The disk is full, try again later",
                "odmr: 1 recipient was deferred here, and the mail waits where it is: remove the cause that the replies name"),
        around=small("mail"))
    place.try_each(mistake("31 with room again", None, "pull -c customer.toml", 0, "1 message, "))
    # The file is complete, and only its directory fails.
    place.try_each(
        mistake("31 a new secret", None, "secret acme -c provider.toml", 71, "; the secret is changed, but a power cut may undo that"),
        mistake("31 a new customer", None, "customer -c provider.toml add beta beta.example", 73,
                "; beta is a customer from the next reload (SIGHUP) on, but a power cut may undo that"),
        around=["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(box.path / "customers.d"), "-e", "inject=fsync:error=EIO"])
    return place.finish()


@scenario("mistakes-of-two", needs=["openssl", "unshare", "setpriv"], root=True)
def mistakes_of_two(box):
    """A second daemon, call or server, and a port that is in use or not permitted: the second process reports the cause"""
    place = Place(box).start()
    box.path.chmod(0o755)
    pull = lambda log, *words: box.start(log, ODMR, "pull", "-c", *words, cwd=box.path)
    port = service(box, b"220 relay.example.net ESMTP\r\n")
    place.customer(f'provider.address = "localhost:{port}"')()
    pull("pull.log", "customer.toml")
    wait_until(lambda: list((box.path / "mail").glob(".odmr/call-*")), "the first call")
    place.write("daemon.toml", with_changes(CUSTOMER, [f'provider.address = "localhost:{place.port}"', 'mailboxes.root = "daemon"', 'schedule.every = "1h"']))()
    pull("daemon.log", "daemon.toml", "--daemon")
    wait_until(lambda: events(box.log("daemon.log"), "call"), "the daemon's first call")
    used = f'odmr.listen = ["127.0.0.1:{place.port}"]'
    low = ['spool = "own"', 'inbound.listen = ["0.0.0.0:25"]', "-tls", "odmr.require-tls = false"]
    (box.path / "own").mkdir()
    place.provider(*low, name="low.toml", mode=0o644)()
    for path in ("own", "customers.d", "customers.d/acme.toml"):
        os.chown(box.path / path, NOBODY, NOBODY)
    place.try_each(
        mistake("34 a second daemon", None, "pull -c daemon.toml --daemon", 75,
                "odmr: a daemon is calling for these mailboxes already; `odmr pull -c FILE --now` makes it call at once"),
        mistake("34 a second server on one spool", None, "serve -c provider.toml", 75, "spool"),
        mistake("35 a second call", None, "pull -c customer.toml", 75, f"odmr: another call to localhost:{port} as acme is under way"),
        mistake("36 a port that is in use", place.provider('spool = "other"', used, name="other.toml"), "serve -c other.toml", 71,
                f"odmr: cannot listen on 127.0.0.1:{place.port}: …: another program listens there; stop it or choose another address"),
    )
    place.try_each(mistake("36 port 25 without root", None, "serve -c low.toml", 77,
                           "odmr: cannot listen on 0.0.0.0:25: Permission denied…: ports below 1024 need root, the capability CAP_NET_BIND_SERVICE "
                           "(…), or a supervisor that passes them on (LISTEN_FDS)"), around=["unshare", "--net", *AS_NOBODY])
    return place.finish()
