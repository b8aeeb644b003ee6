"""A Dovecot of the scenario: as the next hop over LMTP, and as the reader of Maildirs that odmr has written."""

import grp
import os
import pathlib
import pwd
import re
import signal
import subprocess

from harness import LOOPBACK, Customer, Provider, Smtp, at_rest, check, events, field, free_port, scenario, wait_until
from postfix import UID
from turning import SENDER
from world import House, Names

ALICE, BOB, NOBODY = "alice@example.org", "bob@example.com", "zed@example.org"
ELSEWHERE = "127.0.0.9"  # the address of the sending client
TRACE = re.compile(rb"(?:(?:Return-Path|Delivered-To|Received): [^\n]*\n(?:[ \t][^\n]*\n)*)*")

# Contents that a hop or a count of octets may treat wrongly.
MESSAGES = [
    b"Subject: plain\r\n\r\nplain\r\n",
    b"Subject: dots\r\n\r\n.\r\n..\r\n.dot\r\n\r\n.\r\n",
    b"Subject: only a header\r\n\r\n",
    b"Subject: 8 bits\r\n\r\n\xe4\xf6\xfc \xc3\xa4 \xff\r\n",
    b"Subject: long\r\n folded\r\n\r\n" + b"x" * 998 + b"\r\n" + b"\t \r\n" * 3,
    b"Subject: from\r\n\r\nFrom here on a mbox would quote.\r\n>From\r\n",
    b"Subject: big\r\n\r\n" + b"".join(b"%06d %s\r\n" % (number, b"y" * 60) for number in range(5000)),
]


class Dovecot:
    """An instance with its own configuration, directories and log. It serves LMTP on the unix socket `socket` and on
    `port`, where it
    believes XCLIENT.

    `users`: address -> home; their mail, below `location`, belongs to `owner` (user id, group id).
    """

    def __init__(self, box, users, *, location="maildir:~/Maildir", owner=(UID, UID)):
        self.box, self.users = box, users
        self.directory = box.path / "dovecot"
        self.config = self.directory / "dovecot.conf"
        self.socket = self.directory / "run/lmtp"
        self.port, self.process = free_port(), None
        lines = "".join(f"{user}:{{PLAIN}}x:{owner[0]}:{owner[1]}::{home}::\n" for user, home in users.items())
        box.write("dovecot/users", lines, mode=0o644)
        self.directory.chmod(0o755)
        box.write(
            "dovecot/dovecot.conf",
            f"""base_dir = {self.directory}/run
state_dir = {self.directory}/state
log_path = {box.path}/dovecot.log
protocols = lmtp
listen = {LOOPBACK}
ssl = no
mail_location = {location}
first_valid_uid = 1
recipient_delimiter = +
lda_mailbox_autocreate = no
postmaster_address = postmaster@example.org
passdb {{
  driver = passwd-file
  args = {self.directory}/users
}}
userdb {{
  driver = passwd-file
  args = {self.directory}/users
}}
login_trusted_networks = {LOOPBACK}
service lmtp {{
  unix_listener lmtp {{
    mode = 0666
  }}
  inet_listener lmtp {{
    address = {LOOPBACK}
    port = {self.port}
  }}
}}
""",
            mode=0o644,
        )

    def start(self):
        before = self.log().count("starting up for lmtp")
        self.process = self.box.start("dovecot-out.log", "dovecot", "-F", "-c", self.config)

        def ready():
            check(self.process.poll() is None, f"dovecot ended: {self.box.log('dovecot-out.log')}{self.log()[-500:]}")
            return self.log().count("starting up for lmtp") > before and self.socket.exists()

        wait_until(ready, "Dovecot to start")
        return self

    def kill(self):
        """Kills all its processes at once.

        Dovecot waits two minutes for the dotlock of a process that was killed before it wrote its process id there, and
        for one whose process id is in use: as no process of this instance runs, its dotlocks are removed.
        """
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.box.children.remove(self.process)
        wait_until(lambda: not alive(self.process.pid), "all processes of Dovecot to end")
        for home in self.users.values():
            for lock in home.rglob("dovecot*.lock"):
                lock.unlink()

    def log(self):
        return self.box.log("dovecot.log")

    def complaints(self):
        """The warnings and errors in its log."""
        return [line for line in self.log().splitlines() if re.search(r"Warning|Error|Fatal|Panic", line)]

    def fetch(self, user, *fields, mailbox="INBOX"):
        """The messages of a mailbox, each a list of these fields as octets; a text has LF line ends."""
        fields = ("uid", *fields)  # doveadm writes no separator between messages of one field
        words = ["doveadm", "-c", self.config, "-f", "pager", "fetch", "-u", user, " ".join(fields), "mailbox", mailbox, "all"]
        done = subprocess.run(words, capture_output=True, timeout=30)  # octets, not text
        check(done.returncode == 0, f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.decode()}")
        heads = [rb"%s:[ \n](.*)" % re.escape(name.encode()) for name in fields]
        form = re.compile(rb"\n".join(heads), re.DOTALL)
        return [list(form.fullmatch(one).groups()[1:]) for one in done.stdout.split(b"\f\n") if one]


def alive(group):
    """The running processes of a process group. A zombie, which perhaps no process reaps in a container, does not count."""
    found = []
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, its_group = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # the process has ended
        if int(its_group) == group and state not in "ZX":
            found.append(int(status.parent.name))
    return found


def same_after_trace(got, content):
    """Whether a file at rest is that content after header fields that hops add."""
    content = at_rest(content)
    return got.endswith(content) and TRACE.fullmatch(got[: len(got) - len(content)]) is not None


def homes(box, *users, owner=UID):
    """A home directory for each user, with that owner."""
    base = box.path / "homes"
    base.mkdir()
    os.chown(base, owner, owner)
    return {user: base / user for user in users}


@scenario("dovecot-lmtp", needs=["dovecot", "doveadm", "dnsmasq"], root=True)
def dovecot_lmtp(box):
    """Dovecot as the next hop over LMTP, at a socket and at a port: all octets arrive; for a user that it does not know the provider gets 550"""
    house = House(box)
    names = Names(box, mx={"sender.example": [(10, "mx.dest.example")]}, hosts={"mx.dest.example": LOOPBACK})
    relay = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {house.port}\n'
    provider = Provider(box, require_tls=False, more=relay).start()
    dovecot = Dovecot(box, homes(box, ALICE, BOB)).start()
    with Smtp(provider.inbound, source=ELSEWHERE) as line:
        line.hello()
        for content in MESSAGES:
            check((reply := line.send(SENDER, [ALICE, BOB, NOBODY], content)).startswith("250"), reply)
    deliver = f'"*" = "lmtp:{dovecot.socket}"\n"example.com" = "lmtp:{LOOPBACK}:{dovecot.port}"\n'
    customer = Customer(box, provider.odmr, tls="none", more=f"[mailboxes.deliver]\n{deliver}")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not provider.held(), f"{len(provider.held())} files are left with the provider")
    for user in (ALICE, BOB):
        texts = [text for (text,) in dovecot.fetch(user, "text")]
        check(len(texts) == len(MESSAGES), f"{user} has {len(texts)} messages")
        for content in MESSAGES:
            check(sum(same_after_trace(text, content) for text in texts) == 1, f"{user}: not once: {content[:60]!r} in {texts!r:.500}")
        # XCLIENT is offered at the port only.
        told = sum(f"([{ELSEWHERE}])" in field(text, "Received") for text in texts)
        check(told == (len(texts) if user == BOB else 0), f"{user}: {field(texts[0], 'Received')}")
    rejected = events(provider.log(), "delivery", via="atrn", status="rejected")
    check({line["to"] for line in rejected} == {f"<{NOBODY}>"}, f"{rejected}")
    check(len(rejected) == len(MESSAGES) and all(line["reply"].startswith("550 5.1.1 ") for line in rejected), f"{rejected}")
    wait_until(lambda: len(house.messages) == len(MESSAGES), "a DSN for each message to the unknown user")
    for dsn in house.messages:
        check(dsn.sender == "" and dsn.recipients == [SENDER], f"{dsn}")
        check(NOBODY.encode() in dsn.content and b"550" in dsn.content, f"{dsn.content!r}")
    check(not (customer.root / "example.org").exists(), "the customer kept something for itself")
    check(not dovecot.complaints(), f"{dovecot.complaints()}")
    return f"{len(MESSAGES)} messages each, octet for octet; unknown: 550 at RCPT, {len(house.messages)} DSNs"


@scenario("dovecot-maildir", needs=["dovecot", "doveadm"], root=True)
def dovecot_maildir(box):
    """Dovecot reads Maildirs that odmr has written: owner, umask, S= and W=, a detail in the mailbox of its user, a quota"""
    provider = Provider(box, require_tls=False).start()
    owner = pwd.getpwnam("nobody")
    group = grp.getgrgid(owner.pw_gid).gr_name
    head = f'user = "nobody"\ngroup = "{group}"\n'
    customer = Customer(box, provider.odmr, tls="none", head=head, more='separator = "+"\numask = "027"\n')
    customer.root.mkdir()
    os.chown(customer.root, owner.pw_uid, owner.pw_gid)
    users = {user: customer.root / user.split("@")[1] / user.split("@")[0] for user in (ALICE, BOB)}
    dovecot = Dovecot(box, users, location="maildir:~", owner=(owner.pw_uid, owner.pw_gid)).start()
    for user in users:  # Dovecot makes the INBOX and its own files.
        done = box.run("doveadm", "-c", dovecot.config, "mailbox", "create", "-u", user, "lists")
        check(done.returncode == 0, f"doveadm mailbox create: {done.stderr}")
    # Courier's manual: the first line has the limits, the others the usage.
    (users[BOB] / "maildirsize").write_text("3000S,100C\n0 0\n")
    os.chown(users[BOB] / "maildirsize", owner.pw_uid, owner.pw_gid)
    fits, too_large = b"Subject: fits\r\n\r\n" + b"z" * 990 + b"\r\n", b"Subject: too large\r\n\r\n" + (b"z" * 70 + b"\r\n") * 60
    with Smtp(provider.inbound) as line:
        line.hello()
        for number, content in enumerate(MESSAGES):
            line.send(SENDER, [ALICE if number % 2 else "alice+unknown@example.org"], content)
            line.send(SENDER, ["alice+lists@example.org"], content)
        for content in (fits, too_large, MESSAGES[0]):
            check((reply := line.send(SENDER, [BOB], content)).startswith("250"), reply)
    # One message is over the quota.
    check((result := customer.pull()) == 75, f"pull: exit {result}: {customer.log()}")

    for mailbox in ("INBOX", "lists"):
        texts = [text for (text,) in dovecot.fetch(ALICE, "text", mailbox=mailbox)]
        check(len(texts) == len(MESSAGES), f"{mailbox}: {len(texts)} messages: {customer.log()}")
        for content in MESSAGES:
            check(sum(same_after_trace(text, content) for text in texts) == 1, f"{mailbox}: not once: {content[:60]!r}")
    texts = [text for (text,) in dovecot.fetch(BOB, "text")]
    check(len(texts) == 2 and all(any(same_after_trace(text, one) for text in texts) for one in (fits, MESSAGES[0])), f"{texts}")
    (left,) = provider.held()
    check(b"Subject: too large" in left.read_bytes(), "another message than the one over the quota stayed")
    deferred = events(provider.log(), "delivery", via="atrn", status="deferred")
    check(len(deferred) == 1 and deferred[0]["to"] == f"<{BOB}>" and deferred[0]["reply"].startswith("452 4.2.2 "), f"{deferred}")

    files = [file for file in customer.root.rglob("*") if file.parent.name in ("new", "cur") and file.is_file()]
    check(len(files) == 2 * len(MESSAGES) + 2, f"{files}")
    for file in files:
        status = file.stat()
        check((status.st_uid, status.st_gid) == (owner.pw_uid, owner.pw_gid), f"{file} belongs to {status.st_uid}:{status.st_gid}")
        check(status.st_mode & 0o777 == 0o640, f"{file} has mode {status.st_mode:o}")
    sizes(dovecot, users, files)
    check(not dovecot.complaints(), f"{dovecot.complaints()}")
    return f"{len(files)} messages with right S= and W=; in the mailbox of a sub-address; 452 4.2.2 over the quota"


def sizes(dovecot, users, files):
    """The sizes in the names of odmr's files are those that Dovecot counts without such names."""
    fields = ("size.physical", "size.virtual", "hdr.subject")
    places = [(ALICE, "INBOX"), (ALICE, "lists"), (BOB, "INBOX")]
    named = [sorted(dovecot.fetch(user, *fields, mailbox=mailbox)) for user, mailbox in places]
    ours = sorted(re.search(r",S=(\d+),W=(\d+)", file.name).groups() for file in files)
    check(ours == sorted((one[0].decode(), one[1].decode()) for place in named for one in place), f"{ours} {named}")
    for user, home in users.items():
        for file in list(home.rglob("dovecot*")):
            file.unlink()
        for file in [file for file in home.rglob("*") if ",S=" in file.name]:
            file.rename(file.with_name(re.sub(r",[SW]=\d+", "", file.name)))
    counted = [sorted(dovecot.fetch(user, *fields, mailbox=mailbox)) for user, mailbox in places]
    check(counted == named, f"our names say {named}, Dovecot counts {counted}")
