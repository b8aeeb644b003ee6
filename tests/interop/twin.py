"""A twin of this machine for a recipe of dist/: its files are an overlay on those of this machine; it has its own
processes, network
and users. So users, /etc, /var and the ports 25 and 366 are as in the recipes, word for word, and all is removed at the end.
"""

import contextlib
import ctypes
import os
import pathlib
import shutil

from harness import ODMR, PATIENCE, ROOT, Smtp, check, wait_until
from packages import unpacked

DIST = ROOT / "dist"
NEW_NET = 0x40000000  # CLONE_NEWNET of setns(2)
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "container": "odmr"}

SETUP = """set -e
place=$1 init=$2
mount --make-rprivate /
mount -t tmpfs machine $place && mkdir $place/upper $place/work $place/root
mount -t overlay -o lowerdir=/,upperdir=$place/upper,workdir=$place/work machine $place/root
cd $place/root
# A systemd sets kernel variables where it can; some of them are those of the whole machine.
mount -t proc proc proc && mount -o bind,ro proc/sys proc/sys
mount -t sysfs -o ro sys sys && mount -t tmpfs cgroups sys/fs/cgroup
mount -t tmpfs dev dev && mkdir dev/pts dev/shm && ln -s /proc/self/fd dev/fd && ln -s pts/ptmx dev/ptmx
for name in null zero full random urandom tty; do :>dev/$name; mount --bind /dev/$name dev/$name; done
mount -t tmpfs run run && mount -t tmpfs tmp tmp && mkdir -p run/lock run/systemd/system
rm -rf etc/odmr var/spool/odmr var/spool/odmr-out var/mail/odmr
ip link set lo up
mkdir old && pivot_root . old && umount -l /old && rmdir /old
if [ $init = systemd ]; then
    mount -t cgroup2 cgroups /sys/fs/cgroup
    rm -rf /etc/systemd/system /var/log/journal && mkdir /etc/systemd/system
    : >/etc/machine-id
    printf '[Unit]\\nRequires=sockets.target timers.target\\nAllowIsolate=yes\\n' >/run/systemd/system/odmr-test.target
    exec /lib/systemd/systemd --unit=odmr-test.target
fi
# bash waits for the processes that others have left.
exec bash -c ':>/run/up; while :; do sleep 1000 & wait; done'
"""

PROVIDER = """hostname = "relay.example.net"
spool = "/var/spool/odmr"
customers = "customers.d"
user = "odmr"
[inbound]
listen = ["127.0.0.1:25"]
[odmr]
listen = ["127.0.0.1:366"]
require-tls = false
[relay]
resolver = "127.0.0.1:1"
"""
ACCOUNT = 'domains = ["example.org"]\nsecret = "the secret of acme"\nrelay = true\n'
CUSTOMER = """hostname = "mail.example.org"
user = "odmr"
[provider]
address = "127.0.0.1:366"
tls = "none"
name = "acme"
secret = "the secret of acme"
[mailboxes]
root = "/var/mail/odmr"
accept = ["@example.org"]
catch-all = "create"
[outgoing]
queue = "/var/spool/odmr-out"
listen = ["127.0.0.1:587"]
"""


class Twin:
    """`packages`: Debian packages with programs that this machine need not have. `systemd`: it is PID 1."""

    def __init__(self, box, *, packages=(), systemd=False):
        self.box = box
        self.pid = None
        self.cgroup = own_cgroup(box) if systemd else None
        place = box.path / "machine"
        place.mkdir()
        enter = f'echo $$ >{self.cgroup}/cgroup.procs && exec "$@"' if systemd else 'exec "$@"'
        namespaces = ["--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc", "--net"] + ["--cgroup"] * systemd
        setup = ["sh", box.write("machine.sh", SETUP), place, "systemd" if systemd else "none"]
        process = box.start("machine.log", "sh", "-c", enter, "sh", "unshare", *namespaces, *setup, env=ENVIRONMENT)
        box.at_end(lambda: self.close(process))
        child = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        self.pid = int(wait_until(lambda: process.poll() or child.read_text(), "the machine"))
        check(process.poll() is None, "the machine has ended")
        self.root = pathlib.Path(f"/proc/{self.pid}/root")
        # Before that, `systemctl` would ask the systemd of this machine.
        begun = lambda: pathlib.Path(f"/proc/{self.pid}/comm").read_text() == "systemd\n"
        up = lambda: begun() and self.run("systemctl", "is-system-running", code=None).stdout.strip() in ("running", "degraded")
        wait_until(up if systemd else (self.root / "run/up").exists, "the machine to be up", seconds=100, pause=0.05)
        self.install("usr/local/bin/odmr", pathlib.Path(ODMR), 0o755)
        for package in unpacked(box, *packages).values():
            done = box.run("sh", "-c", f"tar -C {package} -c . | tar -C {self.root} -x --keep-directory-symlink")
            check(done.returncode == 0, done.stderr)
        self.run("sh", "-c", "id odmr || useradd -r odmr")

    def close(self, process):
        process.kill()  # and with it, PID 1 and all others of the machine
        process.wait()
        if self.cgroup:
            gone = lambda: "populated 0" in (self.cgroup / "cgroup.events").read_text()
            wait_until(gone, "the end of the machine")
            for directory, _, _ in os.walk(self.cgroup, topdown=False):
                os.rmdir(directory)

    def command(self, *words):
        return ["nsenter", "--target", self.pid, "--all", "--root", "--wd", *words]

    def run(self, *words, code=0, **options):
        """Runs a command there; `code`: the expected exit code, None: any."""
        done = self.box.run(*self.command(*words), env=ENVIRONMENT, **options)
        told = f"{words}: exit {done.returncode}: {done.stdout}{done.stderr}"
        check(code is None or done.returncode == code, told)
        return done

    def start(self, log, *words):
        return self.box.start(log, *self.command(*words), env=ENVIRONMENT)

    def install(self, path, source, mode=0o644):
        """A file there, from a text, a file or a directory."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, str):
            file.write_text(source)
        elif source.is_dir():
            shutil.copytree(source, file)
            return
        else:
            shutil.copyfile(source, file)
            mode = mode | source.stat().st_mode & 0o777
        file.chmod(mode)

    def text(self, path):
        """A file there; empty if it does not exist."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="backslashreplace")
        except FileNotFoundError:
            return ""

    def configure(self, provider=PROVIDER, customer=CUSTOMER):
        """The files of a provider with one customer, and of that customer."""
        self.install("etc/odmr/provider.toml", provider)
        self.install("etc/odmr/customers.d/acme.toml", ACCOUNT, 0o640)
        self.install("etc/odmr/customer.toml", customer, 0o640)
        self.run("chgrp", "-R", "odmr", "/etc/odmr")

    @contextlib.contextmanager
    def network(self):
        """Sockets that this thread opens within the block are in the network of the machine."""
        enter = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{self.pid}/ns/net") as theirs:
            check(enter(theirs.fileno(), NEW_NET) == 0, "setns")
            try:
                yield
            finally:
                enter(ours.fileno(), NEW_NET)

    def connect(self, port, within=PATIENCE, **options):
        """A client, as soon as a server listens there: within so many seconds."""

        def connected():
            try:
                with self.network():
                    return Smtp(port, **options)
            except ConnectionRefusedError:
                return None

        return wait_until(connected, f"port {port}", within)

    def held(self):
        return list(self.root.glob("var/spool/odmr/domains/*/new/*"))

    def fetched(self):
        return list(self.root.glob("var/mail/odmr/*/*/new/*"))

    def serves(self, port=25):
        """The provider accepts a message on `port`, and a call fetches it."""
        before = len(self.fetched())
        self.connect(366).close()
        with self.connect(port) as line:
            line.hello()
            reply = line.send("a@sender.example", ["eva@example.org"], b"Subject: x\r\n\r\nx\r\n")
            check(reply.startswith("250"), reply)
        # If a daemon runs, its own call may fetch the message now.
        check(len(self.held()) == 1 or wait_until(lambda: len(self.fetched()) == before + 1, "the message"), f"{self.held()}")
        self.run("odmr", "pull", "--now", "-c", "/etc/odmr/customer.toml")
        wait_until(lambda: not self.held() and len(self.fetched()) == before + 1, "the message at the customer")


def own_cgroup(box):
    """A new cgroup of version 2 for a systemd, which uses the whole tree below it."""
    mounts = [line.split() for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    found = [mount[1] for mount in mounts if mount[2] == "cgroup2"]
    check(found, "no cgroup2 is mounted")
    place = pathlib.Path(found[0]) / box.path.name
    place.mkdir()
    return place
