"""The quick start of README.md, typed word for word on two clean Debian machines, and what becomes of them afterwards."""

import os
import re
import time

from harness import ODMR, ROOT, Server, Smtp, check, events, field, scenario, wait_until
from machines import Machine, World

README = ROOT / "README.md"
WHOLE = 300  # seconds that the title of the section promises
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
    """The blocks of commands in the section of README.md: each a list of (what is typed, what comes after `#`)."""
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
    """Types a block of commands on a machine. `install` is what is done for the first command."""

    def __init__(self, machine, install):
        self.machine, self.install, self.said = machine, install, {}

    def play(self, block, user="root"):
        for command, comment in block:
            if command == "make install":
                self.install(self.machine, alternative(comment, "or"))
                continue
            # No service manager runs in these machines.
            if command.startswith("systemctl "):
                command = alternative(comment, "without systemd")
            done = self.machine.type(command, user)
            if done:
                self.said[command] = done
                check(done.returncode == 0, f"{self.machine.name}: {command}: exit {done.returncode}: {done.stdout} {done.stderr}")


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
    """The MX host of example.com: a listener on port 25."""
    import socket
    import threading

    from harness import connections

    world.run(f"ip address add {WORLD_HOST}/32 dev lo")
    listener = box.keep(world.inside(lambda: socket.create_server((WORLD_HOST, 25))))
    messages = []

    def serve():
        for connection in connections(listener):
            server = Server(connection)
            server.serve()
            messages.extend(server.letters)

    threading.Thread(target=serve, daemon=True).start()
    return messages


def pair(box, install):
    """Plays the quick start. Gives both machines and the facts."""
    world = World(box, *RECORDS)
    relay, mail = Machine(box, world, "relay", PROVIDER), Machine(box, world, "mail", CUSTOMER)
    messages = host_of_world(box, world)
    provider, customer, afterwards = blocks()
    begin = time.monotonic()
    Player(relay, install).play(provider)
    # scp
    relay.outside(f"cp {relay.root}/root/acme.toml {box.path}/acme.toml")
    mail.outside(f"install -m 600 {box.path}/acme.toml {mail.root}/root/acme.toml")
    os.remove(box.path / "acme.toml")
    send_from_world(world, "alice@example.org", MESSAGE)
    player = Player(mail, install)
    player.play(customer)
    seconds = time.monotonic() - begin
    read = next(done.stdout for command, done in player.said.items() if command.startswith("cat "))
    check("\nwelcome\n" in read and field(read.encode(), "Subject") == "the first one", f"not the message: {read}")
    check(seconds < WHOLE, f"the quick start took {seconds:.0f} s")
    sends_back(mail, afterwards, messages)
    return relay, mail, f"{seconds:.1f} s from nothing to the first message"


def sends_back(mail, afterwards, messages):
    """The daemon calls, and a user who is nobody special sends a message to the world."""
    (daemon, comment), *rest = afterwards
    Player(mail, None).play([(daemon, comment)])
    log = lambda: mail.box.log(f"{mail.name}-daemon.log")
    wait_until(lambda: events(log(), "listening", listener="local"), f"the daemon: {log()}")
    mail.type("useradd -m alice")
    Player(mail, None).play(rest, "alice")
    wait_until(lambda: mail.type("odmr pull -c /etc/odmr/customer.toml --now").returncode == 0, "the call")
    wait_until(lambda: messages, "the message in the world")
    check(messages[0].sender == "alice@example.org" and b"Hello, world" in messages[0].content, f"{messages}")


def made_by_make(machine, _):
    machine.outside(f"make --silent install DESTDIR={machine.root} ODMR={ODMR}")


@scenario("quick-start", needs=NEEDS, root=True)
def quick_start(box):
    """README's quick start after `make install`, word for word, in clean Debian machines: mail comes in and goes out"""
    relay, mail, facts = pair(box, made_by_make)
    # What was installed is removed again, and what was set up stays.
    mail.outside(f"make --silent uninstall DESTDIR={mail.root}")
    left = mail.outside(f"find {mail.root}/usr/local -name '*odmr*' -o -type l -lname '*odmr'")
    check(not left, f"make uninstall leaves {left}")
    check(mail.outside(f"ls {mail.root}/var/mail/odmr/example.org/postmaster/new"), "the message is gone")
    return facts


def package(box, name="target"):
    """Makes the Debian package of the program that is tried, in a target directory of the box."""
    environment = {**os.environ, "ODMR": ODMR, "CARGO_TARGET_DIR": str(box.path / name)}
    done = box.run("make", "--silent", "deb", cwd=ROOT, env=environment)
    check(done.returncode == 0, f"make deb: {done.stderr}")
    (file,) = (box.path / name).glob("*.deb")
    return file


@scenario("debian-package", needs=[*NEEDS, "dpkg-deb", "dpkg-shlibdeps", "lintian"], root=True)
def debian_package(box):
    """The same after `apt install ./odmr_*.deb`; lintian says nothing; two builds are equal; a purge leaves mail and says where"""
    file = package(box)
    os.umask(0o077)
    again = package(box, "again")
    os.umask(0o022)
    check(file.read_bytes() == again.read_bytes(), "two builds of the package differ")
    linted = box.run("lintian", "--fail-on=error,warning", "--no-cfg", file)
    check(linted.returncode == 0 and not linted.stdout.strip(), f"lintian: {linted.stdout} {linted.stderr}")

    def installed(machine, command):
        machine.outside(f"cp {file} {machine.root}/root/")
        done = machine.type(command)
        check(done.returncode == 0, f"{command}: {done.stdout} {done.stderr}")
        check(not machine.type("dpkg -V odmr").stdout, "files differ from md5sums")
        check(machine.type("ls -d /etc/odmr").returncode != 0, "the package has made /etc/odmr")

    relay, mail, facts = pair(box, installed)
    upgraded = mail.type("dpkg -i ./odmr_*.deb")
    check(upgraded.returncode == 0 and not upgraded.stderr, f"{upgraded.stderr}")
    check(mail.type("dpkg --remove odmr").returncode == 0, "dpkg --remove")
    purged = mail.type("dpkg --purge odmr")
    for directory in ("/etc/odmr", "/var/mail/odmr", "/var/spool/odmr-out"):
        check(f" {directory}" in purged.stdout, f"{directory} is not named: {purged.stdout} {purged.stderr}")
    check(mail.type("ls /var/mail/odmr/example.org/postmaster/new").stdout, "the message is gone")
    check(not mail.type("find / -xdev -path /proc -prune -o -name '*odmr*' -print | grep -Ev '^/(etc|var/(mail|spool)|root)/'").stdout, "left")
    return f"{file.stat().st_size} octets; {facts}"
