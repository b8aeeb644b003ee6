"""Programs that send mail by /usr/sbin/sendmail, which is odmr here: cron, bsd-mailx, mutt, git send-email.

Each is run as it is installed and calls that path with the options it has always called it with. In the mount namespace of
the program alone, odmr stands there; the machine's own sendmail stays where it is.
"""

import email
import email.policy
import os
import pathlib
import re

from harness import ODMR, at_rest, check, field, program_path, scenario, secret, wait_until
from routes import MX, world
from world import House, queued

# mount --bind for each pair of paths, and then the program.
IN_PLACE = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 1; shift 2; done; shift; exec "$@"'
EVA, CARL, HIDDEN = "eva@dest.example", "carl@dest.example", "hidden@dest.example"
ADAM = "adam@example.org"
TEXT = "Gr\u00fc\u00dfe\n.\nFrom here\nthe end\n"
AUTHOR = '"\u00c4dam B. Example" <adam@example.org>'


class Programs:
    """A customer for whom they send, and the world with `house` in it."""

    def __init__(self, box):
        self.box, self.house = box, House(box, address=MX)
        _, self.customer = world(
            box, self.house, mx={"dest.example": [(1, "mx.dest.example")]}, hosts={"mx.dest.example": MX}
        )
        # Every user may read the configuration, but not the secret, and write into the queue: nobody has cron jobs too.
        key, config = box.write("own.secret", secret("acme") + "\n"), self.customer.config
        config.write_text(re.sub(r"(?m)^secret = .*$", f'secret-file = "{key}"', config.read_text(), count=1))
        config.chmod(0o644)
        queue = box.path / "pull-queue"
        for directory in (queue, *(queue / name for name in ("tmp", "new", "cur"))):
            directory.mkdir()
            directory.chmod(0o1777 if directory == queue else 0o777)
        self.home = box.path / "home"
        self.home.mkdir()
        self.environment = os.environ | {
            "ODMR_CONFIG": str(self.customer.config),
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
        }

    def command(self, *words, mounts=()):
        mounts = [(ODMR, os.path.realpath(program_path("sendmail"))), *mounts]
        pairs = [path for pair in mounts for path in pair]
        return ["unshare", "--mount", "sh", "-c", IN_PLACE, "sh", *pairs, "--", *words]

    def run(self, *words, text="", **options):
        done = self.box.run(*self.command(*words), input=text, env=self.environment, encoding="utf-8", **options)
        check(done.returncode == 0, f"{words[0]}: exit {done.returncode}: {done.stdout[-300:]}{done.stderr[-500:]}")

    def arrived(self, count):
        """What arrives of that many messages: the envelopes and the parsed messages at the world's host."""
        before = len(self.house.letters)
        check((result := self.customer.pull()) == 0, f"pull: exit {result}")
        check(not queued(self.customer), f"{len(queued(self.customer))} wait to go out")
        wait_until(lambda: len(self.house.letters) >= before + count, f"{count} messages at {MX}")
        check(len(self.house.letters) == before + count, f"{len(self.house.letters) - before} messages, wanted {count}")
        return [(letter, parsed(letter.content)) for letter in self.house.letters[before:]]

    def mailbox(self, user):
        return [parsed(path.read_bytes()) for path in self.customer.root.glob(f"example.org/{user}/new/*")]


def parsed(octets):
    octets = at_rest(octets)
    message = email.message_from_bytes(octets, policy=email.policy.default)
    for name in ("From", "Date", "Message-ID"):
        check(len(message.get_all(name, [])) == 1, f"{name}: {message.get_all(name)}")
    header = octets.split(b"\n\n", 1)[0]
    check(header.isascii() and not message["Bcc"] and not message["Return-Receipt-To"], f"header: {header!r}")
    check(message["Date"].datetime is not None, f"Date: {message['Date']}")
    message.source = field(octets, "From")  # with comments, which the parser leaves out
    return message


def wants(what, letter, message, *, sender=ADAM, recipients, author, subject, to=EVA, cc=None):
    """Checks the envelope and the header."""
    got = (letter.sender, sorted(letter.recipients), str(message["From"]), str(message["Subject"]))
    wanted = (sender, sorted(recipients), author, subject)
    check(got == wanted, f"{what}: {got}, wanted {wanted}")
    copies = (str(message["To"]), str(message["Cc"]) if message["Cc"] else None)
    check(copies == (to, cc), f"{what}: To and Cc {copies}")


@scenario("cron", needs=["cron", "sendmail", "unshare", "dnsmasq"], root=True)
def cron(box):
    """cron mails what its jobs print: to the user at home, and by MAILTO to the world; as root and as nobody"""
    programs = Programs(box)
    empty, tables = box.path / "empty", box.path / "crontabs"
    for directory in (empty, tables, box.path / "run"):
        directory.mkdir()
    none = box.write("crontab", "", mode=0o644)
    for user in ("root", "nobody"):
        head = f'ODMR_CONFIG={programs.customer.config}\nLC_ALL=C.UTF-8\nCONTENT_TYPE="text/plain; charset=UTF-8"\n'
        job = f"@reboot printf 'job of {user}: Gr\u00fc\u00dfe\\n.\\nthe end\\n'\n"
        box.write(f"crontabs/{user}", f"{head}{job}MAILTO={EVA}\n{job}")
    mounts = [(none, "/etc/crontab"), (empty, "/etc/cron.d"), (tables, "/var/spool/cron/crontabs"), (box.path / "run", "/run")]
    box.start("cron.log", *programs.command("cron", "-f", "-L", "15", mounts=mounts), env=programs.environment)
    root_at_home = lambda: programs.mailbox("root")
    wait_until(root_at_home, "root's mail at home", seconds=15)
    wait_until(lambda: len(queued(programs.customer)) >= 3, "three messages in the queue", seconds=15)

    for letter, message in programs.arrived(2):
        user = letter.sender.split("@")[0]
        wants(
            "cron", letter, message, sender=f"{user}@example.org", recipients=[EVA],
            author="root@example.org", subject=str(message["Subject"]),
        )
        of_cron(message, user)
    for user in ("root", "nobody"):
        (message,) = programs.mailbox(user)
        check(str(message["To"]) == f"{user}@example.org", f"To: {message['To']}")
        check(message["Return-Path"] == f"<{user}@example.org>", f"{message['Return-Path']}")
        of_cron(message, user)
    return "2 at home, 2 by MAILTO"


def of_cron(message, user):
    # cron writes "From: root (Cron Daemon)", whosever the job is.
    check(message.source == "root@example.org (Cron Daemon)", f"From: {message.source}")
    check(message["Subject"].startswith(f"Cron <{user}@"), f"Subject: {message['Subject']}")
    check(message.get_content() == f"job of {user}: Gr\u00fc\u00dfe\n.\nthe end\n", f"{message.get_content()!r}")


@scenario("sendmail-clients", needs=["bsd-mailx", "mutt", "git", "sendmail", "unshare", "dnsmasq"], root=True)
def sendmail_clients(box):
    """bsd-mailx, mutt and git send-email call sendmail: who it is from, to whom, Bcc, Date, what is in it"""
    programs = Programs(box)
    mailx(programs)
    mutt(programs)
    git(programs)
    return "bsd-mailx, mutt, git send-email"


def mailx(programs):
    words = ["bsd-mailx", "-s", "by mailx: Gr\u00fc\u00dfe", "-r", ADAM, "-c", CARL, "-b", HIDDEN, EVA, "root"]
    programs.run(*words, text=TEXT)
    ((letter, message),) = programs.arrived(1)
    wants(
        "mailx", letter, message, recipients=[EVA, CARL, HIDDEN], author=str(message["From"]),
        subject="by mailx: Gr\u00fc\u00dfe", to=f"{EVA}, root@example.org", cc=CARL,
    )
    check(message["From"].addresses[0].addr_spec == ADAM, f"mailx: From {message['From']}")
    (at_home,) = programs.mailbox("root")
    for one in (message, at_home):
        check(one.get_content() == TEXT, f"mailx: {one.get_content()!r}")


def mutt(programs):
    settings = f'set realname="\u00c4dam B. Example" from="{ADAM}" use_from use_envelope_from use_8bitmime charset=utf-8\n'
    settings += 'set dsn_notify="failure,delay" dsn_return=hdrs copy=no record="" send_charset="utf-8"\n'
    rc = programs.box.write("muttrc", settings)
    attached = programs.box.write("table.txt", "1;2\n")
    words = ["mutt", "-n", "-F", rc, "-s", "by mutt: Gr\u00fc\u00dfe", "-a", attached, "-c", CARL, "-b", HIDDEN, "--", EVA]
    programs.run(*words, text=TEXT)
    ((letter, message),) = programs.arrived(1)
    wants(
        "mutt", letter, message, recipients=[EVA, CARL, HIDDEN], author=AUTHOR,
        subject="by mutt: Gr\u00fc\u00dfe", cc=CARL,
    )
    text, table = message.iter_parts()
    check(text.get_content() == TEXT and table.get_content() == "1;2\n", f"mutt: {message}")


def git(programs):
    box, repository = programs.box, programs.box.path / "repository"
    repository.mkdir()
    who = {"GIT_AUTHOR_NAME": "\u00c4dam B. Example", "GIT_AUTHOR_EMAIL": ADAM}
    programs.environment |= who | {name.replace("AUTHOR", "COMMITTER"): value for name, value in who.items()}
    box.write("repository/greeting", "Gr\u00fc\u00dfe\n" + "long " * 300 + "\n")
    for words in (["init", "-q"], ["add", "greeting"], ["commit", "-q", "-m", "by git: Gr\u00fc\u00dfe"], ["format-patch", "-q", "--root"]):
        programs.run("git", *words, cwd=repository)
    (patch,) = pathlib.Path(repository).glob("*.patch")
    options = ["--to", EVA, "--cc", CARL, "--bcc", HIDDEN, "--envelope-sender=auto", "--suppress-cc=self", "--confirm=never", "--quiet"]
    programs.run("git", "send-email", *options, patch, cwd=repository)
    ((letter, message),) = programs.arrived(1)
    wants(
        "git", letter, message, recipients=[EVA, CARL, HIDDEN], author=AUTHOR,
        subject="[PATCH] by git: Gr\u00fc\u00dfe", cc=CARL,
    )
    (box.path / "arrived.eml").write_bytes(at_rest(letter.content))
    greeting = repository / "greeting"
    wanted = greeting.read_text()
    programs.run("git", "checkout", "-q", "--orphan", "other", cwd=repository)
    programs.run("git", "rm", "-q", "-f", "greeting", cwd=repository)
    programs.run("git", "am", "-q", box.path / "arrived.eml", cwd=repository)
    check(greeting.read_text() == wanted, "git am of what arrived makes another file")
