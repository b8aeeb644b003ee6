"""Machines of their own for scenarios that type what a person types: a clean Debian each, in namespaces of its own, and
the world between them with its name server.

Nothing of the machine that plays the scenarios is changed: files are in an overlay on a directory that debootstrap has
made once, and are gone with the scenario, as are processes, interfaces and users.
"""

import ctypes
import fcntl
import os
import pathlib
import re
import shutil
import threading

from harness import ROOT, check, wait_until
from packages import STORE

RELEASE = "bookworm"
BASE = pathlib.Path(os.environ.get("DEBIAN_BASE", STORE / f"debian-{RELEASE}"))
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def debian(box, systemd=False):
    """The directory with the smallest Debian there is; made at the first run, which takes half a minute and the network.
    `systemd`: with that package too, and with ca-certificates, which odmr recommends: apt asks nobody and fetches nothing."""
    STORE.mkdir(parents=True, exist_ok=True)
    with open(STORE / ".debian-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not BASE.exists():
            make(box, BASE, [["debootstrap", "--variant=minbase", RELEASE, "{}", *mirror()]])
        if not systemd:
            return BASE
        whole = STORE / f"{BASE.name}-systemd"
        if not whole.exists():
            install = "apt-get update -q && apt-get install -q -y --no-install-recommends systemd ca-certificates"
            quiet = ["env", "DEBIAN_FRONTEND=noninteractive", f"PATH={PATH}"]
            make(box, whole, [["cp", "-a", BASE, "{}"], ["chroot", "{}", *quiet, "sh", "-ec", install]])
    return whole


def make(box, directory, commands):
    """Runs commands that fill a directory, `{}` in them; it gets its name when it is whole."""
    draft = directory.with_name(f".{directory.name}")
    shutil.rmtree(draft, ignore_errors=True)
    for command in commands:
        done = box.run(*(str(draft) if word == "{}" else word for word in command), seconds=200)
        check(done.returncode == 0, f"{command}: {done.stdout[-500:]} {done.stderr[-500:]}")
    draft.rename(directory)


def mirror():
    """The mirror that this machine's apt has for Debian itself; none: the default of debootstrap."""
    sources = [pathlib.Path("/etc/apt/sources.list"), *pathlib.Path("/etc/apt/sources.list.d").glob("*")]
    text = "\n".join(file.read_text() for file in sources if file.is_file())
    found = re.search(r"(?m)^(?:deb (?:\[[^]]*\] )?|URIs: *)(https?://\S+/debian/?)(?=\s)", text)
    return [found[1]] if found else []


class World:
    """A network namespace that knows all machines, and routes between them; its name server is 11.11.0.1."""

    ADDRESS = "11.11.0.1"

    def __init__(self, box, *records):
        self.box = box
        self.pid = namespaces(box, "world", ["--net"], "")
        self.run("ip link set lo up; ip address add 11.11.0.1/32 dev lo; echo 1 >/proc/sys/net/ipv4/ip_forward")
        self.machines = 0
        options = ["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--log-queries", "--log-facility=-"]
        options += ["--user=root", "--bind-interfaces", f"--listen-address={self.ADDRESS}", "--pid-file="]
        options += [f"--local=/{zone}/" for zone in ("net", "org", "example", "arpa")]
        box.start("dnsmasq.log", *self.enter(), "dnsmasq", *options, *records)

    def enter(self):
        return ["nsenter", f"--target={self.pid}", "--net"]

    def run(self, script):
        done = self.box.run(*self.enter(), "sh", "-ec", script)
        check(done.returncode == 0, f"{script}: {done.stderr}")
        return done.stdout

    def inside(self, function):
        """Calls a function in a thread that is in this network. What it opens stays there."""
        result = []

        def call():
            with open(f"/proc/{self.pid}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NEW_NETWORK):
                    result.append(OSError(ctypes.get_errno(), "setns"))
                    return
            try:
                result.append(function())
            except Exception as error:
                result.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]


class Machine:
    """A clean Debian with an address, a default route and a resolver; with `systemd` as its first process, or with none."""

    def __init__(self, box, world, name, address, systemd=False):
        self.box, self.name, self.address, self.systemd = box, name, address, systemd
        self.root = box.path / name / "root"
        rw = self.root.parent / "rw"
        for directory in (self.root, rw):
            directory.mkdir(parents=True)
        # An overlay on tmpfs, as a directory of an overlay (in a container, say) cannot be the upper one.
        mounts = f"""mount -t tmpfs tmpfs {rw}; mkdir {rw}/upper {rw}/work
            mount -t overlay overlay -o lowerdir={debian(box, systemd)},upperdir={rw}/upper,workdir={rw}/work {self.root}
            mount -t proc proc {self.root}/proc; mount -t tmpfs tmpfs {self.root}/run; hostname {name}
            echo 'nameserver {world.ADDRESS}' >{self.root}/etc/resolv.conf; ip link set lo up"""
        kinds = ["--net", "--mount", "--uts", "--ipc", "--pid"]
        if systemd:
            kinds.append("--cgroup")
            self.pid = namespaces(box, name, kinds, mounts + self.first_process(), control_group(box, name))
        else:
            self.pid = namespaces(box, name, kinds, mounts)
        self.kinds = kinds
        self.connect(world)
        if systemd:
            state = lambda: self.type("systemctl is-system-running").stdout.strip()
            wait_until(lambda: state() in ("running", "degraded"), f"systemd of {name}")
            box.start(f"{name}-journal.log", *self.command("exec journalctl --follow --lines=all --output=cat", "root"))

    def first_process(self):
        """What systemd needs, the lines that end in it."""
        return f"""
            cd {self.root}
            mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup; mount -t tmpfs tmpfs dev
            for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
            mkdir dev/pts dev/shm; ln -s /proc/self/fd dev/fd
            touch {self.box.path / self.name}.ready
            exec env -i container=other PATH={PATH} chroot . /lib/systemd/systemd"""

    def connect(self, world):
        world.machines += 1
        gateway, inner, outer = re.sub(r"\d+$", "1", self.address), f"in{world.machines}", f"out{world.machines}"
        world.run(
            f"ip link add {outer} type veth peer name {inner} netns {self.pid}\n"
            f"ip address add {gateway}/24 dev {outer}; ip link set {outer} up"
        )
        self.outside(f"ip address add {self.address}/24 dev {inner}; ip link set {inner} up; ip route add default via {gateway}")

    def enter(self):
        return ["nsenter", f"--target={self.pid}", *self.kinds]

    def outside(self, script):
        """A script with the programs of the machine that plays the scenarios, which sees this one's files and network."""
        done = self.box.run(*self.enter(), "sh", "-ec", f"cd {ROOT}; {script}")
        check(done.returncode == 0, f"{self.name}: {script}: {done.stdout} {done.stderr}")
        return done.stdout

    def command(self, line, user):
        environment = [f"PATH={PATH}", f"HOME={'/root' if user == 'root' else '/tmp'}", "TERM=dumb", f"LOGNAME={user}"]
        become = ["runuser", "-u", user, "--"] if user != "root" else []
        # `chroot` begins in /; a person begins at home.
        return [*self.enter(), "chroot", self.root, "env", "-i", *environment, *become, "bash", "-c", f"cd; {line}"]

    def type(self, line, user="root"):
        """What a person types. Gives the finished process; a daemon (`&`) goes on, and its output is in NAME-daemon.log."""
        if line.endswith("&"):
            self.box.start(f"{self.name}-daemon.log", *self.command(f"exec {line[:-1]}", user))
            return None
        return self.box.run(*self.command(line, user), seconds=120)


def control_group(box, name):
    """A group of its own in the unified hierarchy of cgroups(7), in which systemd may work; gone with the box."""
    mounts = [line.split() for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    group = next(pathlib.Path(words[1]) for words in mounts if words[2] == "cgroup2") / f"{box.path.name}-{name}"
    group.mkdir()

    def remove():
        (group / "cgroup.kill").write_text("1")
        wait_until(lambda: "populated 0" in (group / "cgroup.events").read_text(), f"the end of all processes of {name}")
        for directory, _, _ in os.walk(group, topdown=False):
            os.rmdir(directory)

    box.at_end(remove)
    return f"echo $$ >{group}/cgroup.procs; "


def namespaces(box, name, kinds, script, before=""):
    """Makes namespaces that last as long as the box, and gives the id of a process in them. The script prepares them, and
    may go on as something that stays; `before` comes before them."""
    ready = box.path / f"{name}.ready"
    fork = ["--fork", "--kill-child", "--propagation=private"] if "--pid" in kinds else []
    words = ["sh", "-exc", f'{before}exec unshare "$@"', "sh", *kinds, *fork, "sh", "-exc", f"{script}\n touch {ready}; exec sleep infinity"]
    child = box.start(f"{name}.log", *words)
    box.at_end(child.kill)  # `unshare --fork` ignores SIGTERM
    wait_until(lambda: ready.exists() or child.poll() is not None, f"the namespaces of {name}")
    check(ready.exists(), f"{name}: {box.log(f'{name}.log')}")
    if not fork:
        return child.pid
    return int(pathlib.Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0])
