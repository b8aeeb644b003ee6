"""Programs that send mail by /usr/sbin/sendmail, which is odmr here: cron, bsd-mailx, mutt, git send-email.

They run as root, or as a user that may not write into the queue: then odmr submits to the daemon.
Each is run as installed, and calls that path with its usual options. Only in the mount namespace of the program that path is
odmr; the machine's own sendmail is not changed.
"""

import email
import email.policy
import os
import pathlib
import re
import signal
import shutil
import subprocess

from harness import LOOPBACK, MIB, ODMR, at_rest, check, events, field, free_port, program_path, scenario, secret, wait_until
from routes import MX, world
from world import House, queued

# mount --bind for each pair of paths, and then the program.
IN_PLACE = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 1; shift 2; done; shift; exec "$@"'
EVA, CARL, HIDDEN = "eva@dest.example", "carl@dest.example", "hidden@dest.example"
ADAM = "adam@example.org"
TEXT = "Gr\u00fc\u00dfe\n.\nFrom here\nthe end\n"
NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
AUTHOR = '"\u00c4dam B. Example" <adam@example.org>'


class Programs:
    """A customer for which the programs send, and the Internet with `house` in it.

    `daemon`: the user nobody runs the programs, only root may write into the queue, and a daemon listens.
    """

    def __init__(self, box, daemon=False):
        self.box, self.house, self.daemon = box, House(box, address=MX), None
        _, self.customer = world(
            box, self.house, mx={"dest.example": [(1, "mx.dest.example")]}, hosts={"mx.dest.example": MX}
        )
        # Every user may read the configuration, but not the secret, and may write into the queue: nobody has cron jobs too.
        key, config = box.write("own.secret", secret("acme") + "\n"), self.customer.config
        config.write_text(re.sub(r"(?m)^secret = .*$", f'secret-file = "{key}"', config.read_text(), count=1))
        config.chmod(0o644)
        queue = box.path / "pull-queue"
        for directory in (queue, *(queue / name for name in ("tmp", "new", "cur"))):
            directory.mkdir()
            directory.chmod(0o700 if daemon else 0o1777 if directory == queue else 0o777)
        self.home = box.path / "home"
        self.home.mkdir()
        self.environment = os.environ | {
            "ODMR_CONFIG": str(self.customer.config),
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        if daemon:
            box.path.chmod(0o755)
            os.chown(self.home, NOBODY, NOBODY)
            self.port = free_port()
            with open(config, "a") as file:
                file.write(f'listen = ["{LOOPBACK}:{self.port}"]\n')
            self.start_daemon()

    def start_daemon(self):
        begun = len(self.customer.log())
        self.daemon = self.box.start(self.customer.log_name, ODMR, "pull", "--daemon", "-c", self.customer.config)
        wait_until(lambda: f":{self.port}\n" in self.customer.log()[begun:], "the listener")
        wait_until(lambda: events(self.customer.log()[begun:], "call"), "its first call, which may send what is queued now")

    def stop_daemon(self):
        self.daemon.terminate()
        check((result := self.daemon.wait(20)) == 0, f"the daemon: exit {result}")

    def command(self, *words, mounts=()):
        mounts = [(ODMR, os.path.realpath(program_path("sendmail"))), *mounts]
        pairs = [path for pair in mounts for path in pair]
        words = [*AS_NOBODY, *words] if self.daemon and words[0] != "cron" else words
        return ["unshare", "--mount", "sh", "-c", IN_PLACE, "sh", *pairs, "--", *words]

    def run(self, *words, text="", code=0, **options):
        done = self.box.run(*self.command(*words), input=text, env=self.environment, encoding="utf-8", **options)
        check(done.returncode == code, f"{words[0]}: exit {done.returncode}: {done.stdout[-300:]}{done.stderr[-500:]}")
        return done

    def arrived(self, count):
        """The envelopes and the parsed messages at the remote host, after so many have arrived."""
        before = len(self.house.messages)
        if self.daemon:
            done = self.box.run(ODMR, "pull", "--now", "-c", self.customer.config)
            check(done.returncode == 0, f"pull --now: exit {done.returncode}: {done.stderr}")
            wait_until(lambda: not queued(self.customer), "an empty queue")
        else:
            check((result := self.customer.pull()) == 0, f"pull: exit {result}")
        check(not queued(self.customer), f"{len(queued(self.customer))} wait to go out")
        wait_until(lambda: len(self.house.messages) >= before + count, f"{count} messages at {MX}")
        check(len(self.house.messages) == before + count, f"{len(self.house.messages) - before} messages, wanted {count}")
        return [(message, parsed(message.content)) for message in self.house.messages[before:]]

    def mailbox(self, user):
        return [parsed(path.read_bytes()) for path in self.customer.root.glob(f"example.org/{user}/new/*")]


def parsed(octets):
    octets = at_rest(octets)
    parsed = email.message_from_bytes(octets, policy=email.policy.default)
    for name in ("From", "Date", "Message-ID"):
        check(len(parsed.get_all(name, [])) == 1, f"{name}: {parsed.get_all(name)}")
    header = octets.split(b"\n\n", 1)[0]
    check(header.isascii() and not parsed["Bcc"] and not parsed["Return-Receipt-To"], f"header: {header!r}")
    check(parsed["Date"].datetime is not None, f"Date: {parsed['Date']}")
    parsed.source = field(octets, "From")  # with comments, which the parser leaves out
    return parsed


def wants(what, message, parsed, *, sender=ADAM, recipients, author, subject, to=EVA, cc=None):
    """Checks the envelope and the header."""
    got = (message.sender, sorted(message.recipients), str(parsed["From"]), str(parsed["Subject"]))
    wanted = (sender, sorted(recipients), author, subject)
    check(got == wanted, f"{what}: {got}, wanted {wanted}")
    copies = (str(parsed["To"]), str(parsed["Cc"]) if parsed["Cc"] else None)
    check(copies == (to, cc), f"{what}: To and Cc {copies}")


@scenario("cron", needs=["cron", "sendmail", "unshare", "dnsmasq"], root=True)
def cron(box):
    """cron mails the output of its jobs to the local user, and by MAILTO to the Internet; as root and as nobody"""
    return run_cron(Programs(box))


@scenario("cron-daemon", needs=["cron", "sendmail", "unshare", "setpriv", "dnsmasq"], root=True)
def cron_daemon(box):
    """Only root may write into the queue: the mail of cron for the user nobody is submitted to the daemon"""
    programs = Programs(box, daemon=True)
    note = run_cron(programs)
    closed = lambda: re.findall("event=closed .* listener=submission ", programs.customer.log())
    wait_until(lambda: len(closed()) >= 2, "the ends of the sessions")
    check(len(closed()) == 2, f"not two sessions: {closed()}")
    return f"{note}; nobody's by SMTP"


def run_cron(programs):
    box = programs.box
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
    wait_until(root_at_home, "root's mail at home")
    # The daemon delivers to local mailboxes at once; for nobody, who may not write into mailboxes, a call does it.
    count = 2 if programs.daemon else 3
    wait_until(lambda: len(queued(programs.customer)) >= count, f"{count} messages in the queue")

    for message, parsed in programs.arrived(2):
        user = message.sender.split("@")[0]
        wants(
            "cron", message, parsed, sender=f"{user}@example.org", recipients=[EVA],
            author="root@example.org", subject=str(parsed["Subject"]),
        )
        of_cron(parsed, user)
    for user in ("root", "nobody"):
        wait_until(lambda: programs.mailbox(user), f"the mail of {user} at home")
        (parsed,) = programs.mailbox(user)
        check(str(parsed["To"]) == f"{user}@example.org", f"To: {parsed['To']}")
        check(parsed["Return-Path"] == f"<{user}@example.org>", f"{parsed['Return-Path']}")
        of_cron(parsed, user)
    return "2 at home, 2 by MAILTO"


def of_cron(parsed, user):
    # cron writes "From: root (Cron Daemon)" for the jobs of all users.
    check(parsed.source == "root@example.org (Cron Daemon)", f"From: {parsed.source}")
    check(parsed["Subject"].startswith(f"Cron <{user}@"), f"Subject: {parsed['Subject']}")
    check(parsed.get_content() == f"job of {user}: Gr\u00fc\u00dfe\n.\nthe end\n", f"{parsed.get_content()!r}")


@scenario("sendmail-clients", needs=["bsd-mailx", "mutt", "git", "sendmail", "unshare", "dnsmasq"], root=True)
def sendmail_clients(box):
    """bsd-mailx, mutt and git send-email call sendmail: sender, recipients, Bcc, Date and content are right"""
    programs = Programs(box)
    mailx(programs)
    mutt(programs)
    git(programs)
    return "bsd-mailx, mutt, git send-email"


@scenario("sendmail-nobody", needs=["bsd-mailx", "mutt", "git", "sendmail", "unshare", "setpriv", "prlimit", "dnsmasq"], root=True)
def sendmail_nobody(box):
    """bsd-mailx, mutt and git send-email call sendmail as a user that may not write into the queue: it submits to the daemon; -t, -bs, -bp, 40 MB, SIGTERM, no daemon"""
    programs = Programs(box, daemon=True)
    mailx(programs)
    mutt(programs)
    git(programs)
    programs.run("sendmail", "-t", "-oi", text=f"To: {EVA}\nBcc: {HIDDEN}\nSubject: by -t\n\n.\n")
    session = f"EHLO me\r\nMAIL FROM:<{ADAM}>\r\nRCPT TO:<{EVA}>\r\nRCPT TO:<{CARL}>\r\nDATA\r\nFrom: <{ADAM}>\r\nSubject: by -bs\r\n\r\nx\r\n.\r\n"
    done = programs.run("sendmail", "-bs", text=f"{session}QUIT\r\n")
    codes = re.findall(r"(?m)^(\d{3}) ", done.stdout)
    check(codes == ["220", "250", "250", "250", "250", "354", "250", "221"], f"-bs: {done.stdout} {done.stderr}")
    arrived = programs.arrived(2)
    found = sorted((str(parsed["Subject"]), sorted(message.recipients)) for message, parsed in arrived)
    check(found == [("by -bs", sorted([EVA, CARL])), ("by -t", sorted([EVA, HIDDEN]))], f"{found}")
    listing = programs.run("sendmail", "-bp", code=77)
    check("Permission denied" in listing.stderr and not listing.stdout, f"-bp: {listing.stdout}{listing.stderr}")
    large(programs)
    stopped(programs)
    programs.stop_daemon()
    down = programs.run("sendmail", "-i", EVA, text="Subject: x\n\nx\n", code=75)
    check("odmr pull --daemon" in down.stderr and down.stderr.count("\n") == 1, f"no daemon: {down.stderr}")
    check(not queued(programs.customer), "something is in the queue")
    return "bsd-mailx, mutt, git send-email, -t, -bs; 40 MiB in 16 MiB of memory"


def start_sendmail(programs, *words):
    """sendmail as nobody, without unshare in between, so that it gets a signal; in 16 MiB of memory."""
    program = programs.box.path / "bin" / "sendmail"
    if not program.exists():
        program.parent.mkdir()
        shutil.copy(ODMR, program)
    return subprocess.Popen(
        ["prlimit", f"--data={16 * MIB}", program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=programs.environment,
        user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
    )


def large(programs):
    """40 MiB arrive unchanged."""
    line = b"." + b"z" * 74 + b"\n"
    body = line * (40 * MIB // len(line))
    process = start_sendmail(programs, "-i", "-f", ADAM, EVA)
    process.stdin.write(b"Subject: large\n\n" + body)
    process.stdin.close()
    check((result := process.wait(60)) == 0, f"40 MiB: exit {result}")
    process.stdout.close()
    (file,) = queued(programs.customer)
    check(file.read_bytes().endswith(b"\n\n" + body), "40 MiB: another content")
    programs.arrived(1)


def stopped(programs):
    """SIGTERM before the end of the message: no message is sent, and -bs ends too."""
    for words, text in ((["-i", EVA], b"Subject: x\n\nhalf"), (["-bs"], b"EHLO me\r\nMAIL FROM:<>\r\n")):
        process = start_sendmail(programs, *words)
        process.stdin.write(text)
        process.stdin.flush()
        if words == ["-bs"]:
            while not process.stdout.readline().startswith(b"250 2.1.0"):
                pass
        process.send_signal(signal.SIGTERM)
        check((result := process.wait(5)) in (-signal.SIGTERM, 0), f"SIGTERM: {words}: exit {result}")
        process.stdin.close()
        process.stdout.close()
    check(not queued(programs.customer), "something was queued after SIGTERM")


def mailx(programs):
    words = ["bsd-mailx", "-s", "by mailx: Gr\u00fc\u00dfe", "-r", ADAM, "-c", CARL, "-b", HIDDEN, EVA, "root"]
    programs.run(*words, text=TEXT)
    ((message, parsed),) = programs.arrived(1)
    wants(
        "mailx", message, parsed, recipients=[EVA, CARL, HIDDEN], author=str(parsed["From"]),
        subject="by mailx: Gr\u00fc\u00dfe", to=f"{EVA}, root@example.org", cc=CARL,
    )
    check(parsed["From"].addresses[0].addr_spec == ADAM, f"mailx: From {parsed['From']}")
    (at_home,) = programs.mailbox("root")
    for one in (parsed, at_home):
        check(one.get_content() == TEXT, f"mailx: {one.get_content()!r}")


def mutt(programs):
    settings = f'set realname="\u00c4dam B. Example" from="{ADAM}" use_from use_envelope_from use_8bitmime charset=utf-8\n'
    settings += 'set dsn_notify="failure,delay" dsn_return=hdrs copy=no record="" send_charset="utf-8"\n'
    rc = programs.box.write("muttrc", settings, mode=0o644)
    attached = programs.box.write("table.txt", "1;2\n", mode=0o644)
    words = ["mutt", "-n", "-F", rc, "-s", "by mutt: Gr\u00fc\u00dfe", "-a", attached, "-c", CARL, "-b", HIDDEN, "--", EVA]
    programs.run(*words, text=TEXT)
    ((message, parsed),) = programs.arrived(1)
    wants(
        "mutt", message, parsed, recipients=[EVA, CARL, HIDDEN], author=AUTHOR,
        subject="by mutt: Gr\u00fc\u00dfe", cc=CARL,
    )
    text, table = parsed.iter_parts()
    check(text.get_content() == TEXT and table.get_content() == "1;2\n", f"mutt: {parsed}")


def git(programs):
    box, repository = programs.box, programs.box.path / "repository"
    repository.mkdir()
    if programs.daemon:
        os.chown(repository, NOBODY, NOBODY)
    who = {"GIT_AUTHOR_NAME": "\u00c4dam B. Example", "GIT_AUTHOR_EMAIL": ADAM}
    programs.environment |= who | {name.replace("AUTHOR", "COMMITTER"): value for name, value in who.items()}
    box.write("repository/greeting", "Gr\u00fc\u00dfe\n" + "long " * 300 + "\n", mode=0o644)
    for words in (["init", "-q"], ["add", "greeting"], ["commit", "-q", "-m", "by git: Gr\u00fc\u00dfe"], ["format-patch", "-q", "--root"]):
        programs.run("git", *words, cwd=repository)
    (patch,) = pathlib.Path(repository).glob("*.patch")
    options = ["--to", EVA, "--cc", CARL, "--bcc", HIDDEN, "--envelope-sender=auto", "--suppress-cc=self", "--confirm=never", "--quiet"]
    programs.run("git", "send-email", *options, patch, cwd=repository)
    ((message, parsed),) = programs.arrived(1)
    wants(
        "git", message, parsed, recipients=[EVA, CARL, HIDDEN], author=AUTHOR,
        subject="[PATCH] by git: Gr\u00fc\u00dfe", cc=CARL,
    )
    (box.path / "arrived.eml").write_bytes(at_rest(message.content))
    greeting = repository / "greeting"
    wanted = greeting.read_text()
    programs.run("git", "checkout", "-q", "--orphan", "other", cwd=repository)
    programs.run("git", "rm", "-q", "-f", "greeting", cwd=repository)
    programs.run("git", "am", "-q", box.path / "arrived.eml", cwd=repository)
    check(greeting.read_text() == wanted, "git am of what arrived makes another file")
