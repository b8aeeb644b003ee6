"""A Postfix of the scenario: as the MX that sends to us, and as the agent that fills the held Maildir."""

import os
import pwd
import signal

from harness import LOOPBACK, Certificates, Customer, Failed, Provider, check, field, scenario, wait_until

DAEMONS = "/usr/lib/postfix/sbin"
UID = 5000  # the owner of virtual mail

MASTER = """\
postlog   unix-dgram n  - n - 1 postlogd
pickup    unix n - n 1 1 pickup
cleanup   unix n - n - 0 cleanup
qmgr      unix n - n 300 1 qmgr
rewrite   unix - - n - - trivial-rewrite
bounce    unix - - n - 0 bounce
defer     unix - - n - 0 bounce
trace     unix - - n - 0 bounce
flush     unix n - n 1000? 0 flush
proxymap  unix - - n - - proxymap
smtp      unix - - n - - smtp
relay     unix - - n - - smtp
error     unix - - n - - error
retry     unix - - n - - error
virtual   unix - n n - - virtual
anvil     unix - - n - 1 anvil
scache    unix - - n - 1 scache
tlsmgr    unix - - n 1000? 1 tlsmgr
"""


class Postfix:
    """An instance with its own configuration, queue and log. `services`: more lines for master.cf."""

    def __init__(self, box, settings, services=""):
        self.box = box
        self.directory = box.path / "postfix"
        for name in ("queue", "data"):
            (box.path / name).mkdir()
        os.chown(box.path / "data", pwd.getpwnam("postfix").pw_uid, -1)
        box.write("postfix/master.cf", MASTER + services, mode=0o644)
        box.write(
            "postfix/main.cf",
            f"""compatibility_level = 3.6
queue_directory = {box.path}/queue
data_directory = {box.path}/data
command_directory = /usr/sbin
daemon_directory = {DAEMONS}
maillog_file = {box.path}/postfix.log
maillog_file_prefixes = {box.path}
myhostname = mx.sender.example
mydestination =
inet_interfaces = {LOOPBACK}
inet_protocols = ipv4
alias_maps =
local_transport = error:no local mail
minimal_backoff_time = 2s
queue_run_delay = 2s
{settings}
""",
            mode=0o644,
        )
        (box.path / "postfix").chmod(0o755)
        done = box.run("postfix", "-c", self.directory, "check")
        check(done.returncode == 0, f"postfix check: {done.stdout}{done.stderr}")
        self.master = box.start("master.log", "postfix", "-c", self.directory, "start-fg")
        box.at_end(self.stop)
        wait_until(lambda: "daemon started" in box.log("postfix.log"), "Postfix to start")

    def stop(self):
        """The master has left its process group, so it is ended by its process id."""
        file = self.box.path / "queue/pid/master.pid"
        if file.exists():
            master = int(file.read_text())
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.kill(master, number)
                    wait_until(lambda: not os.path.exists(f"/proc/{master}"), "the Postfix master to end", seconds=5)
                except (Failed, ProcessLookupError):
                    pass

    def send(self, sender, recipients, content):
        done = self.box.run("sendmail", "-C", self.directory, "-i", "-f", sender, *recipients, input=content)
        check(done.returncode == 0, f"sendmail: {done.stdout}{done.stderr}")


def message(number):
    return f"From: lester@sender.example\nSubject: message {number}\n\nmessage {number}\n.\n.dot\n" + "text\n" * number


@scenario("postfix-sends", needs=["postfix", "sendmail"], root=True)
def postfix_sends(box):
    """Postfix as the sending MX, with verified STARTTLS: all 50 messages are held"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    postfix = Postfix(
        box,
        f"""relayhost = [{LOOPBACK}]:{provider.inbound}
smtp_tls_security_level = secure
smtp_tls_secure_cert_match = localhost
smtp_tls_CAfile = {certificates.authority}
smtp_tls_loglevel = 1""",
    )
    count = 50
    for number in range(count):
        recipients = ["eva@example.org"] + ["adam@example.org", "eva@example.com"] * (number % 5 == 0)
        postfix.send("lester@sender.example", recipients, message(number))
    postfix.send("lester@sender.example", ["x@foreign.example"], message(99))
    wanted = count + count // 5
    wait_until(lambda: len(provider.held()) >= wanted, f"{wanted} held files", seconds=60, pause=0.1)
    wait_until(lambda: "550 5.7.1" in box.log("postfix.log"), "the rejection of a foreign domain")
    check(len(provider.held()) == wanted, f"{len(provider.held())} files, wanted {wanted}")
    seen = {}
    for path in provider.held():
        file = path.read_bytes()
        number = int(field(file, "Subject").split()[-1])
        domain = path.parent.parent.name
        check("with ESMTPS" in field(file, "Received"), field(file, "Received"))
        check("from mx.sender.example" in field(file, "Received"), field(file, "Received"))
        check(file.endswith(("\n\n" + message(number).split("\n\n", 1)[1]).encode()), f"message {number}: {file[-200:]!r}")
        check(seen.setdefault((number, domain), path) == path, f"message {number} for {domain} twice")
        two = number % 5 == 0 and domain == "example.org"
        check(file.count(b"\nDelivered-To: ") == 1 + two, f"recipients of message {number}: {file[:300]!r}")
    check("Verified TLS connection established" in box.log("postfix.log"), "Postfix did not verify the certificate")
    connections = box.log("postfix.log").count("Verified TLS connection established")
    return f"{count} messages, {wanted} files, {connections} TLS connections"


@scenario("postfix-domains", needs=["postfix", "sendmail"], root=True)
def postfix_domains(box):
    """Postfix sends a message for 25 held domains in one session: ten in each transaction; each domain gets it once, and none bounces"""
    domains = [f"d{number}.example" for number in range(25)]
    provider = Provider(box, require_tls=False, customers={"many": domains}).start()
    postfix = Postfix(box, f"relayhost = [{LOOPBACK}]:{provider.inbound}\nsmtp_tls_security_level = none")
    postfix.send("lester@sender.example", [f"eva@{domain}" for domain in domains], message(1))
    wait_until(lambda: len(provider.held()) >= 25, "25 held files", seconds=60, pause=0.1)
    wait_until(lambda: ": removed" in box.log("postfix.log"), "the end of the message")
    held = sorted(path.parent.parent.name for path in provider.held())
    check(held == sorted(domains), f"held for {held}")
    log = box.log("postfix.log")
    check("status=bounced" not in log, "a bounce")
    return f"{log.count('status=deferred')} recipients deferred on the way"


@scenario("postfix-virtual", needs=["postfix", "sendmail"], root=True)
def postfix_virtual(box):
    """Postfix's virtual(8) delivers into the held Maildir, and pull fetches the mail"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    for domain in ("example.org", "example.com"):
        directory = provider.spool / "domains" / domain
        directory.mkdir(parents=True, exist_ok=True)
        for path in (directory, *directory.iterdir()):
            os.chown(path, UID, UID)
    for path in (provider.spool, provider.spool / "domains"):
        path.chmod(path.stat().st_mode | 0o011)
    box.write("postfix/boxes", "@example.org example.org/\n@example.com example.com/\n", mode=0o644)
    postfix = Postfix(
        box,
        f"""virtual_mailbox_domains = example.org, example.com
virtual_mailbox_base = {provider.spool}/domains
virtual_mailbox_maps = texthash:{box.path}/postfix/boxes
virtual_uid_maps = static:{UID}
virtual_gid_maps = static:{UID}
virtual_minimum_uid = 100""",
    )
    count = 20
    for number in range(count):
        sender = "lester@sender.example" if number else ""
        postfix.send(sender, ["eva@example.org", "adam@example.com"][: 1 + number % 2], message(number))
    wanted = count + count // 2
    log = lambda: box.log("postfix.log")
    wait_until(lambda: log().count("delivered to maildir") >= wanted, f"{wanted} deliveries by virtual(8)", seconds=30)
    check(len(provider.held()) == wanted, f"{len(provider.held())} files in the spool, wanted {wanted}")
    customer = Customer(box, provider.odmr, authority=certificates.authority)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not provider.held(), f"{len(provider.held())} files are left in the spool")
    check(len(customer.files()) == wanted, f"{len(customer.files())} files came, wanted {wanted}")
    for path in customer.files():
        file = path.read_bytes()
        mailbox = f"{path.parent.parent.name}@{path.parent.parent.parent.name}"
        number = int(field(file, "Subject").split()[-1])
        check(mailbox in ("eva@example.org", "adam@example.com"), f"a mailbox {mailbox}")
        check(field(file, "Delivered-To") == mailbox, f"{mailbox}: {file[:300]!r}")
        check(field(file, "Return-Path") == ("<lester@sender.example>" if number else "<>"), f"{file[:300]!r}")
        check("with ESMTPS" in field(file, "Received"), field(file, "Received"))
        check(file.count(b"\nReturn-Path:") == 0, f"two return paths: {file[:600]!r}")
        check(file.count(b"Delivered-To:") == 1, f"the provider's envelope went with the message: {file[:600]!r}")
        check(file.endswith(("\n\n" + message(number).split("\n\n", 1)[1]).encode()), f"message {number}: {file[-200:]!r}")
    return f"{wanted} files by virtual(8), all fetched"
