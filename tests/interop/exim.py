"""Debian's Exim, as the peer in peers.py and mail_hosts.py."""

import os
import pathlib
import pwd

from harness import LOOPBACK, check, free_port, program_path, wait_until
from packages import unpacked

PACKAGE = "exim4-daemon-light"


class Exim:
    """An instance with its own configuration, spool and logs, at `address` and `port`. Its package conflicts with
    Postfix, so it is only
    unpacked.

    `main`: lines of the main section; `rest`: access control lists, routers, transports, retry rules.
    """

    def __init__(self, box, main, rest, *, name="exim", address=LOOPBACK, port=None):
        self.box, self.name, self.directory, self.port = box, name, box.path / name, port or free_port()
        (self.directory / "spool").mkdir(parents=True)
        owner = pwd.getpwnam("mail")
        os.chown(self.directory / "spool", owner.pw_uid, owner.pw_gid)
        self.command = [os.environ.get("EXIM") or program_path("exim4") or self.unpacked()]
        try:
            pwd.getpwnam("Debian-exim")
        except KeyError:
            # Exim does not start without this user, and the machine must not be changed.
            for file, line in (("passwd", "Debian-exim:x:8:8::/:/bin/false\n"), ("group", "Debian-exim:x:8:\n")):
                box.write(f"{name}/{file}", pathlib.Path("/etc", file).read_text() + line, mode=0o644)
            mount = 'mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/group" /etc/group && exec "$@"'
            self.command = ["unshare", "--mount", "sh", "-c", mount, self.directory, *self.command]
        self.config = box.write(
            f"{name}/exim.conf",
            f"""exim_user = {owner.pw_uid}
exim_group = {owner.pw_gid}
exim_path = {self.command[-1]}
spool_directory = {self.directory}/spool
log_file_path = {box.path}/{name}-%s.log
pid_file_path = {self.directory}/exim.pid
primary_hostname = mx.sender.example
local_interfaces = {address}
daemon_smtp_ports = {self.port}
keep_environment =
trusted_users = root
{main}
begin acl
take:
  accept
{rest}""",
            mode=0o644,
        )
        self.log_file = box.path / f"{name}-main.log"
        for file in ("main", "panic", "reject"):
            log = box.write(f"{name}-{file}.log", "")
            os.chown(log, owner.pw_uid, owner.pw_gid)

    def unpacked(self):
        directory = unpacked(self.box, PACKAGE).get(PACKAGE)
        check(directory, f"apt-get download {PACKAGE} failed")
        return str(directory / "usr/sbin/exim4")

    def start(self):
        self.box.start(f"{self.name}-daemon.log", *self.command, "-C", self.config, "-bdf", "-q2s")
        wait_until(lambda: "daemon started" in self.log_file.read_text(), "Exim to start")
        return self

    def send(self, sender, recipients, content):
        done = self.box.run(*self.command, "-C", self.config, "-odq", "-i", "-f", sender, *recipients, input=content)
        check(done.returncode == 0, f"exim: {done.stdout}{done.stderr}")
