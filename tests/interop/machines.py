"""Machines for scenarios that type the commands of a user: a clean Debian each, in its own namespaces, and the Internet between
them with its name server.

The machine that plays the scenarios is not changed: files are in an overlay on a directory that debootstrap has made
once. They are
removed with the scenario, as are processes, interfaces and users.
"""

import ctypes
import fcntl
import os
import pathlib
import re
import shutil
import threading

from harness import check, wait_until
from packages import STORE

RELEASE = "bookworm"
BASE = pathlib.Path(os.environ.get("DEBIAN_BASE", STORE / f"debian-{RELEASE}"))
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def debian(box, systemd=False):
    """The directory with a minimal Debian; made at the first run, which takes half a minute and needs the network.
    `systemd`: with that package too, and with ca-certificates, which odmr recommends: so apt needs no network."""
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
    """Runs commands that fill a directory, `{}` in them; the directory gets its name when it is complete."""
    draft = directory.with_name(f".{directory.name}")
    shutil.rmtree(draft, ignore_errors=True)
    for command in commands:
        done = box.run(*(str(draft) if word == "{}" else word for word in command), seconds=200)
        check(done.returncode == 0, f"{command}: {done.stdout[-500:]} {done.stderr[-500:]}")
    draft.rename(directory)


def mirror():
    """The mirror that this machine's apt uses for Debian itself; none: the default of debootstrap."""
    sources = [pathlib.Path("/etc/apt/sources.list"), *pathlib.Path("/etc/apt/sources.list.d").glob("*")]
    text = "\n".join(file.read_text() for file in sources if file.is_file())
    found = re.search(r"(?m)^(?:deb (?:\[[^]]*\] )?|URIs: *)(https?://\S+/debian/?)(?=\s)", text)
    return [found[1]] if found else []


class World:
    """A network namespace that knows all machines, and routes between them; its name server is 11.11.0.1."""

    ADDRESS = "11.11.0.1"

    def __init__(self, box, *records):
        self.box = box
        self.pid = namespaces(box, "world", ["--net"], "exec sleep infinity")
        self.run(f"ip link set lo up; ip address add {self.ADDRESS}/32 dev lo; echo 1 >/proc/sys/net/ipv4/ip_forward")
        self.machines = 0
        options = ["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--log-queries", "--log-facility=-"]
        options += ["--user=root", "--bind-interfaces", f"--listen-address={self.ADDRESS}", "--pid-file="]
        options += [f"--local=/{zone}/" for zone in ("net", "org", "com", "example", "arpa")]
        box.start("dnsmasq.log", *in_network(self.pid), "dnsmasq", *options, *records)
        wait_until(lambda: "started, version" in box.log("dnsmasq.log"), "dnsmasq to start")

    def run(self, script):
        """A script in this network."""
        done = self.box.run(*in_network(self.pid), "sh", "-ec", script)
        check(done.returncode == 0, f"{script}: {done.stderr}")

    def inside(self, function):
        """Calls a function in a thread in this network. Sockets that it opens stay there."""
        result = []

        def call():
            try:
                with open(f"/proc/{self.pid}/ns/net") as namespace:
                    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NEW_NETWORK):
                        raise OSError(ctypes.get_errno(), "setns")
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
    """A clean Debian with an address, a default route and a resolver; with `systemd` as its first process, or with none.

    `root` is its root directory as this machine sees it.
    """

    KINDS = ["--net", "--mount", "--uts", "--ipc", "--pid"]

    def __init__(self, box, world, name, address, systemd=False):
        self.box, self.name, self.address, self.systemd = box, name, address, systemd
        self.kinds = [*self.KINDS, "--cgroup"] if systemd else self.KINDS
        before = control_group(box, name) if systemd else ""
        self.pid = namespaces(box, name, self.kinds, self.beginning(world), before)
        self.root = pathlib.Path(f"/proc/{self.pid}/root")
        self.connect(world)
        if systemd:
            state = lambda: self.type("systemctl is-system-running").stdout.strip()
            wait_until(lambda: state() in ("running", "degraded"), f"systemd of {name}", seconds=100)
            box.start(f"{name}-journal.log", *self.command("exec journalctl --follow --lines=all --output=cat", "root"))

    def beginning(self, world):
        """The script that makes its file system, and then executes its first process."""
        mounted = self.box.path / self.name
        mounted.mkdir()
        # The overlay is on tmpfs, because a directory of an overlay (for instance in a container) cannot be the upper one.
        script = f"""
            mount -t tmpfs tmpfs {mounted}; cd {mounted}; mkdir upper work root
            mount -t overlay overlay -o lowerdir={debian(self.box, self.systemd)},upperdir=upper,workdir=work root; cd root
            mount -t proc proc proc; mount -t tmpfs tmpfs run; hostname {self.name}; ip link set lo up
            echo 'nameserver {world.ADDRESS}' >etc/resolv.conf"""
        first = "sleep infinity"
        if self.systemd:
            first = "/lib/systemd/systemd"
            script += """
            mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup; mount -t tmpfs tmpfs dev
            mkdir dev/pts dev/shm; mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts; ln -s pts/ptmx dev/ptmx
            for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
            ln -s /proc/self/fd dev/fd"""
        # Its root is that of its mount namespace: in a chroot the sandboxes of systemd's units fail.
        return f"{script}\n pivot_root . .; umount -l .; exec chroot . env -i container=other PATH={PATH} {first}"

    def connect(self, world):
        world.machines += 1
        gateway, inner, outer = re.sub(r"\d+$", "1", self.address), f"in{world.machines}", f"out{world.machines}"
        world.run(
            f"ip link add {outer} type veth peer name {inner} netns {self.pid}\n"
            f"ip address add {gateway}/24 dev {outer}; ip link set {outer} up"
        )
        script = f"ip address add {self.address}/24 dev {inner}; ip link set {inner} up; ip route add default via {gateway}"
        done = self.box.run(*in_network(self.pid), "sh", "-ec", script)
        check(done.returncode == 0, f"the network of {self.name}: {done.stderr}")

    def command(self, line, user):
        environment = [f"PATH={PATH}", f"HOME={'/root' if user == 'root' else '/tmp'}", "TERM=dumb", f"LOGNAME={user}"]
        become = ["runuser", "-u", user, "--"] if user != "root" else []
        # `nsenter` begins in /; a user begins in the home directory.
        shell = ["env", "-i", *environment, *become, "bash", "-c", f"cd; {line}"]
        return ["nsenter", f"--target={self.pid}", *self.kinds, *shell]

    def type(self, line, user="root"):
        """Types a command. Returns the finished process; a daemon (`&`) continues, and its output is in NAME-daemon.log."""
        if line.endswith("&"):
            self.box.start(f"{self.name}-daemon.log", *self.command(f"exec {line[:-1]}", user))
            return None
        return self.box.run(*self.command(line, user), seconds=120)


def in_network(pid):
    return ["nsenter", f"--target={pid}", "--net"]


def control_group(box, name):
    """A group in the unified hierarchy of cgroups(7), in which systemd may work; removed with the box. Returns the
    script with which
    a process enters it."""
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
    """Makes namespaces that last as long as the box. Returns the id of their first process, which the script executes after its
    preparations. `before` is run outside."""
    fork = ["--fork", "--kill-child", "--propagation=private"] if "--pid" in kinds else []
    child = box.start(f"{name}.log", "sh", "-exc", f'{before}exec unshare "$@"', "sh", *kinds, *fork, "sh", "-exc", script)
    box.at_end(child.kill)  # `unshare --fork` ignores SIGTERM

    def first_process():
        check(child.poll() is None, f"{name}: {box.log(f'{name}.log')}")
        pids = pathlib.Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split() if fork else [child.pid]
        return next((int(pid) for pid in pids if pathlib.Path(f"/proc/{pid}/comm").read_text() in ("sleep\n", "systemd\n")), None)

    return wait_until(first_process, f"the namespaces of {name}")
