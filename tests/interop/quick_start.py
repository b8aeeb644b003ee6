"""The quick start of README.md, typed word for word on two clean Debian machines, and their state afterwards."""

import os
import re
import shutil
import socket
import threading
import time

from harness import ODMR, ROOT, Server, Smtp, check, connections, events, field, scenario, wait_until
from machines import Machine, World

README = ROOT / "README.md"
WHOLE = 300  # seconds that the quick start may take, without the build
PROVIDER, CUSTOMER, WORLD_HOST = "11.11.1.2", "100.64.2.2", "11.11.3.1"
RECORDS = [
    f"--host-record=relay.example.net,{PROVIDER}",
    "--mx-host=example.org,relay.example.net,10",
    f"--host-record=mx.example.com,{WORLD_HOST}",
    "--mx-host=example.com,mx.example.com,10",
]
NEEDS = ["debootstrap", "dnsmasq", "ip", "nsenter", "unshare", "make"]
MESSAGE = b"From: bob@example.com\r\nTo: alice@example.org\r\nSubject: the first one\r\n\r\nwelcome\r\n"


def blocks():
    """The blocks of commands in the section of README.md: each a list of (command, comment after `#`)."""
    section = re.search(r"(?ms)^## Quick start.*?(?=^## )", README.read_text())[0]
    check(section.count("\n") <= 40, f"the quick start has {section.count(chr(10))} lines")
    lines = lambda block: [re.fullmatch(r" {4}(.*?)(?: +# (.*))?", line).groups("") for line in block.splitlines()]
    found = [lines(block) for block in re.findall(r"(?m)(?:^ {4}\S.*\n)+", section)]
    check(len(found) == 3 and all(len(block) <= 5 for block in found), f"not two machines with five commands each: {found}")
    return found


def alternative(comment, word):
    """The other form of a command, which its comment has after `word:`."""
    return re.search(rf"\b{word}: (.*)", comment)[1]


class Player:
    """Types a block of commands on a machine. `install` replaces the first command."""

    def __init__(self, machine, install):
        self.machine, self.install, self.typed = machine, install, []

    def play(self, block, user="root"):
        for command, comment in block:
            if command == "make install":
                self.install(self.machine, alternative(comment, "or"))
                continue
            if command.startswith("systemctl ") and not self.machine.systemd:
                command = alternative(comment, "without systemd")
            done = self.machine.type(command, user)
            self.typed.append((command, done))
            if done:
                check(done.returncode == 0, f"{self.machine.name}: {command}: exit {done.returncode}: {done.stdout} {done.stderr}")


def log_of(machine):
    """The log of the daemon of a machine, from the journal or the terminal."""
    return machine.box.log(f"{machine.name}-{'journal' if machine.systemd else 'daemon'}.log")


def wait_for_listener(world, address, port):
    def listens():
        try:
            return world.inside(lambda: Smtp(port, host=address, seconds=5))
        except OSError:
            return None

    return wait_until(listens, f"port {port} of {address}")


def send_from_world(world, recipient, content):
    with wait_for_listener(world, PROVIDER, 25) as line:
        line.hello()
        reply = line.send("bob@example.com", [recipient], content)
        check(reply.startswith("250"), reply)


def host_of_world(box, world):
    """The MX host of example.com. Returns the list of the messages that it receives."""
    world.run(f"ip address add {WORLD_HOST}/32 dev lo")
    listener = box.keep(world.inside(lambda: socket.create_server((WORLD_HOST, 25))))
    messages = []

    def serve():
        for connection in connections(listener):
            server = Server(connection)
            server.serve()
            messages.extend(server.messages)

    threading.Thread(target=serve, daemon=True).start()
    return messages


def pair(box, install, systemd=False):
    """Plays the quick start. Returns both machines and the facts."""
    world = World(box, *RECORDS)
    relay = Machine(box, world, "relay", PROVIDER, systemd=systemd)
    mail = Machine(box, world, "mail", CUSTOMER, systemd=systemd)
    messages = host_of_world(box, world)
    provider, customer, afterwards = blocks()
    begin = time.monotonic()
    operator = Player(relay, install)
    operator.play(provider)
    # scp
    shutil.copy(relay.root / "root/acme.toml", mail.root / "root")
    send_from_world(world, "alice@example.org", MESSAGE)
    user = Player(mail, install)
    user.play(customer)
    seconds = time.monotonic() - begin
    (records,) = (done.stdout for command, done in operator.typed if command.endswith("--dns"))
    check(f"IN A {PROVIDER}" in records and "IN PTR relay.example.net." in records, f"check --dns does not name the records: {records}")
    read = user.typed[-1][1].stdout
    check("\nwelcome\n" in read and field(read.encode(), "Subject") == "the first one", f"not the message: {read}")
    check(seconds < WHOLE, f"the quick start took {seconds:.0f} s")
    sends_back(mail, afterwards, messages)
    says_what_is_next(operator.typed, user.typed)
    return relay, mail, f"{seconds:.1f} s from nothing to the first message"


def says_what_is_next(*typed):
    """`odmr setup` tells users to type the same commands as README."""
    readme = [word for block in blocks() for command, comment in block for word in (command, comment.split(": ", 1)[-1])]
    for command, done in (one for commands in typed for one in commands if one[0].startswith("odmr setup ")):
        told = re.findall(r"(?m)^ {4}((?:odmr|systemctl) .*?) *(?:#.*)?$", done.stdout)
        check(told, f"{command} does not say what is next: {done.stdout}")
        for line in told:
            check(line in readme, f"{command} says {line!r}, and README does not")


def sends_back(mail, afterwards, messages):
    """The daemon calls, and an ordinary user sends a message to the Internet."""
    (daemon, comment), *rest = afterwards
    Player(mail, None).play([(daemon, comment)])
    wait_until(lambda: events(log_of(mail), "listening", listener="submission"), "the daemon")
    mail.type("useradd -m alice")
    Player(mail, None).play(rest, "alice")
    check(mail.type("odmr pull -c /etc/odmr/customer.toml --now").returncode == 0, "odmr pull --now")
    wait_until(lambda: messages, "the message in the world")
    check(messages[0].sender == "alice@example.org" and b"Hello, world" in messages[0].content, f"{messages}")


def made_by_make(machine, _):
    make(machine, "make", "install")


def make(machine, program, target):
    done = machine.box.run(program, "-s", target, f"DESTDIR={machine.root}", f"ODMR={ODMR}", cwd=ROOT)
    check(done.returncode == 0, f"make {target}: {done.stdout} {done.stderr}")


@scenario("quick-start", needs=[*NEEDS, "bmake"], root=True, waits=True)
def quick_start(box):
    """README's quick start after `make install`, word for word, on clean Debian machines: mail arrives and is sent"""
    relay, mail, facts = pair(box, made_by_make)
    # The installed files are removed again, the configuration and the mail stay.
    make(mail, "bmake", "uninstall")
    left = mail.type("find /usr/local -name '*odmr*' -o -type l -lname '*odmr'").stdout
    check(not left, f"make uninstall leaves {left}")
    check(mail.type("ls /var/mail/odmr/example.org/postmaster/new").stdout, "the message is gone")
    return facts


def package(box, name="target"):
    """Makes the Debian package of the program under test, in a target directory of the box."""
    environment = {**os.environ, "ODMR": ODMR, "CARGO_TARGET_DIR": str(box.path / name)}
    done = box.run("make", "--silent", "deb", cwd=ROOT, env=environment)
    check(done.returncode == 0, f"make deb: {done.stderr}")
    (file,) = (box.path / name).glob("*.deb")
    return file


def installed(machine, file, command):
    shutil.copy(file, machine.root / "root")
    done = machine.type(command)
    check(done.returncode == 0, f"{command}: {done.stdout} {done.stderr}")
    check(not machine.type("dpkg --verify odmr").stdout, "files differ from md5sums")


@scenario("quick-start-deb", needs=[*NEEDS, "dpkg-deb", "dpkg-shlibdeps"], root=True, waits=True)
def quick_start_deb(box):
    """README's quick start after `apt install ./odmr_*.deb`, with systemd on each machine, which runs both daemons"""
    file = package(box)
    relay, mail, facts = pair(box, lambda machine, command: installed(machine, file, command), systemd=True)
    # The files that root makes at a first start must be usable under the restrictions of the unit.
    for machine, unit in ((relay, "odmr-serve"), (mail, "odmr-pull")):
        done = machine.type(f"systemctl restart {unit} && systemctl reload {unit}")
        check(done.returncode == 0, machine.type(f"journalctl --unit={unit} --lines=5 --output=cat").stdout)
    return f"{file.stat().st_size} octets; {facts}"


PROVIDER_FILE = """hostname = "relay.example.net"
spool = "/srv/relay"
customers = "customers.d"
user = "odmr"
[odmr]
require-tls = false
"""


@scenario("debian-package", needs=[*NEEDS, "dpkg-deb", "dpkg-shlibdeps", "lintian", "mandoc"], root=True, waits=True)
def debian_package(box):
    """make deb gives the same file twice, and lintian reports nothing; an upgrade restarts only running daemons; a purge keeps mail and prints its place"""
    file = package(box)
    old = os.umask(0o077)
    again = package(box, "again")
    os.umask(old)
    check(file.read_bytes() == again.read_bytes(), "two builds of the package differ")
    linted = box.run("lintian", "--fail-on=error,warning", "--allow-root", file)
    check(linted.returncode == 0 and not linted.stdout.strip(), f"lintian: {linted.stdout} {linted.stderr}")
    linted = box.run("mandoc", "-Tlint", "-Wwarning", ROOT / "doc/odmr.8")
    check(linted.returncode == 0, f"mandoc: {linted.stdout}")
    world = World(box, *RECORDS)
    life_with_systemd(world, Machine(box, world, "relay", PROVIDER, systemd=True), file)
    # The same without systemd: no script of the package fails or prints anything.
    bare = Machine(box, world, "bare", CUSTOMER)
    installed(bare, file, "dpkg -i ./odmr_*.deb")
    for command in ("dpkg -i ./odmr_*.deb", "dpkg --remove odmr", "dpkg --purge odmr"):
        done = bare.type(command)
        check(done.returncode == 0 and not done.stderr and "odmr:" not in done.stdout, f"{command}: {done.stdout} {done.stderr}")
    return f"{file.stat().st_size} octets"


def life_with_systemd(world, machine, file):
    def state(unit):
        shown = machine.type(f"systemctl show -p ActiveState -p UnitFileState -p MainPID {unit}").stdout
        shown = dict(line.split("=", 1) for line in shown.splitlines())
        return [shown["ActiveState"], shown["UnitFileState"], shown["MainPID"]]

    def run(command):
        done = machine.type(command)
        check(done.returncode == 0, f"{command}: {done.stdout} {done.stderr}")
        return done.stdout

    installed(machine, file, "dpkg -i ./odmr_*.deb")
    check(machine.type("ls -d /etc/odmr").returncode != 0, "the package has made /etc/odmr")
    for unit in ("odmr-serve", "odmr-pull"):
        check(state(unit) == ["inactive", "disabled", "0"], f"after the installation {unit} is {state(unit)}")
    run("useradd -r odmr; mkdir -p /etc/odmr/customers.d")
    (machine.root / "etc/odmr/provider.toml").write_text(PROVIDER_FILE)
    run("printf 'domains = [\"example.org\"]\nsecret = \"a long random word\"' >acme && chgrp odmr acme && chmod 640 acme")
    run("mv acme /etc/odmr/customers.d/acme.toml")
    run("systemctl enable --now odmr-serve")
    before = state("odmr-serve")
    check(before[:2] == ["active", "enabled"], f"{before}: {log_of(machine)}")
    send_from_world(world, "alice@example.org", MESSAGE)
    run("systemctl reload odmr-serve")
    wait_until(lambda: events(log_of(machine), "reloaded"), "the reload")
    run("dpkg -i ./odmr_*.deb")
    after = state("odmr-serve")
    check(after[0] == "active" and after[2] != before[2], f"the upgrade has not restarted it: {before} {after}")
    check(state("odmr-pull") == ["inactive", "disabled", "0"], f"the upgrade has started odmr-pull: {state('odmr-pull')}")
    run("dpkg --remove odmr")
    check(state("odmr-serve")[0] == "inactive", "it runs after its removal")
    purged = run("dpkg --purge odmr")
    for directory in ("/etc/odmr", "/srv/relay"):
        check(f" {directory}" in purged, f"{directory} is not named: {purged}")
    check(run("ls /srv/relay/domains/example.org/new"), "held mail is gone")
    left = run("find / -xdev -name '*odmr*' -not -path '/proc/*' -not -path '/sys/*' -print").split()
    left = [path for path in left if path != "/etc/odmr" and not path.startswith(("/root/", "/srv/"))]
    check(not left, f"after the purge: {left}")
