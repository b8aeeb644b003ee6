"""Supervisors of daemons, with the files of dist/: each starts the provider, waits until it is ready, reloads and stops it.
And root, which binds the ports and becomes `user`."""

import os
import pathlib
import pwd
import re
import shutil
import signal
import socket

from harness import LOOPBACK, ODMR, ROOT, Certificates, Provider, Smtp, check, events, free_port, scenario, secret, wait_until

USER = "nobody"


def prepared(box, kind):
    """The directory of one service of dist/, with our program and our configuration."""
    service = box.path / f"{kind}-service"
    shutil.copytree(ROOT / "dist" / kind / "odmr-serve", service)
    run = service / "run"
    text = run.read_text().replace("/usr/local/bin/odmr", ODMR).replace("/etc/odmr/provider.toml", str(box.path / "serve.toml"))
    run.write_text(text.replace("exec 2>&1", f"exec 2>>{box.path / kind}.log"))
    check(os.access(run, os.X_OK), f"{run} cannot be executed")
    return service


def works(port):
    with Smtp(port) as line:
        line.hello()
        reply = line.send("a@sender.example", ["eva@example.org"], b"Subject: x\r\n\r\nx\r\n")
        check(reply.startswith("250"), reply)


def add_customer(box, name):
    box.write(f"serve-customers.d/{name}.toml", f'domains = ["{name}.example"]\nsecret = "{secret(name)}"\n')


def one_life(box, provider, kind, hang_up_command, stop_command):
    """Mail is accepted, a reload finds a new customer, and the program ends by itself."""
    log = lambda: box.log(f"{kind}.log")
    port = int(wait_until(lambda: re.search(r"listening inbound \S+:(\d+)", log()), f"{kind}: the listener")[1])
    works(port)
    add_customer(box, kind)
    done = box.run(*hang_up_command)
    check(done.returncode == 0, f"{hang_up_command}: {done.stderr}")
    wait_until(lambda: events(log(), "reloaded", added="1"), f"{kind}: the reload")
    works(port)
    done = box.run(*stop_command)
    check(done.returncode == 0, f"{stop_command}: {done.stderr}")
    wait_until(lambda: events(log(), "stopped"), f"{kind}: the end")
    check(len(events(log(), "stopping")) == 1, f"{kind} has sent more than one signal")


def runit(box, provider):
    service = prepared(box, "runit")
    supervisor = box.start("runsv.log", "runsv", service)
    one_life(box, provider, "runit", ["sv", "hup", service], ["sv", "-w", "20", "down", service])
    box.run("sv", "exit", service)
    supervisor.wait(10)


def daemontools(box, provider):
    service = prepared(box, "daemontools")
    supervisor = box.start("supervise.log", "supervise", service)
    wait_until(lambda: box.run("svok", service).returncode == 0, "supervise")
    one_life(box, provider, "daemontools", ["svc", "-h", service], ["svc", "-d", service])
    box.run("svc", "-x", service)
    supervisor.wait(10)


def s6(box, provider):
    service = prepared(box, "s6")
    supervisor = box.start("s6-supervise.log", "s6-supervise", service)
    # For s6-svok it runs a moment before it writes the status that s6-svwait reads.
    wait_until(lambda: box.run("s6-svok", service).returncode == 0 and box.run("s6-svstat", service).returncode == 0, "s6-supervise")
    # It distinguishes up and ready.
    ready = box.run("s6-svwait", "-U", "-t", "20000", service)
    check(ready.returncode == 0, f"s6-svwait -U: {ready.stderr}")
    check(box.run("s6-svstat", "-o", "ready", service).stdout.strip() == "true", "s6 does not see that it is ready")
    one_life(box, provider, "s6", ["s6-svc", "-h", service], ["s6-svc", "-wD", "-T", "20000", "-d", service])
    box.run("s6-svc", "-x", service)
    supervisor.wait(10)


class NotifySocket:
    """The part of systemd for a service of Type=notify-reload."""

    def __init__(self, box, address):
        self.socket = box.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(20)

    def report(self):
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())


def notified(box, provider):
    """Both kinds of NOTIFY_SOCKET; kill -HUP replaces ExecReload=."""
    for address in (str(box.path / "notify"), f"@odmr-interop-{os.getpid()}"):
        listener = NotifySocket(box, address)
        daemon = box.start("notify.log", ODMR, "serve", "-c", provider.config, env={**os.environ, "NOTIFY_SOCKET": address})
        check((said := listener.report()) == {"READY": "1"}, f"first: {said}")
        daemon.send_signal(signal.SIGHUP)
        said = listener.report()
        check(said.get("RELOADING") == "1" and said["MONOTONIC_USEC"].isdigit(), f"at SIGHUP: {said}")
        check((said := listener.report()) == {"READY": "1"}, f"after the reload: {said}")
        daemon.terminate()
        check((said := listener.report()) == {"STOPPING": "1"}, f"at SIGTERM: {said}")
        check(daemon.wait(20) == 0, f"exit {daemon.returncode}")


def activated(box, provider):
    """systemd-socket-activate passes sockets by name, at the first connection."""
    inbound, odmr = free_port(), free_port()
    command = ["systemd-socket-activate", "-l", f"{LOOPBACK}:{inbound}", "-l", f"{LOOPBACK}:{odmr}"]
    serve = [ODMR, "serve", "-c", provider.config]
    daemon = box.start("activated.log", *command, "--fdname=inbound:odmr", *serve)
    wait_until(lambda: "Listening on" in box.log("activated.log"), "systemd-socket-activate")
    works(inbound)
    with Smtp(odmr) as line:
        line.hello()
    log = box.log("activated.log")
    for name, port in (("inbound", inbound), ("odmr", odmr)):
        check(events(log, "listening", listener=name, address=f"{LOOPBACK}:{port}", source="supervisor"), f"{name}: {log}")
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: events(box.log("activated.log"), "reloaded"), "the reload")
    works(inbound)
    daemon.terminate()
    check(daemon.wait(20) == 0, f"exit {daemon.returncode}")
    # Without names the program cannot assign the sockets.
    daemon = box.start("nameless.log", *command, *serve)
    wait_until(lambda: "Listening on" in box.log("nameless.log"), "systemd-socket-activate")
    socket.create_connection((LOOPBACK, inbound)).close()
    check(daemon.wait(20) == 78, f"exit {daemon.returncode}")
    check("write FileDescriptorName=" in box.log("nameless.log"), box.log("nameless.log"))


@scenario("supervisors", needs=["runsv", "sv", "s6-supervise", "supervise", "svc", "systemd-socket-activate"])
def supervisors(box):
    """runit, daemontools, s6 and the protocols of systemd: each starts the provider, waits until it is ready, reloads and stops it"""
    provider = Provider(box, require_tls=False)
    kinds = [runit, daemontools, s6, notified, activated]
    for kind in kinds:
        kind(box, provider)
    return ", ".join(kind.__name__ for kind in kinds)


def status(process):
    """The ids of a process: user, group, and all other groups."""
    text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return [[int(word) for word in re.search(rf"(?m)^{key}:(.*)$", text)[1].split()] for key in ("Uid", "Gid", "Groups")]


@scenario("root", needs=["openssl", "unshare", "ip"], root=True)
def root(box):
    """root binds ports 25 and 366, becomes `user` for good, and reloads as that user; check reports the files that only root may read"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates, ports=(25, 366, 465))
    text = f'user = "{USER}"\n' + provider.config.read_text()
    provider.config.write_text(text)
    owner = pwd.getpwnam(USER)
    readable = [provider.config, certificates.certificate, box.path / "serve-customers.d"]
    for file in readable + list((box.path / "serve-customers.d").iterdir()):
        os.chown(file, owner.pw_uid, -1)
    check_it = lambda: box.run(ODMR, "check", "-c", provider.config)
    # Only root may read the key, as certbot leaves it.
    checked = check_it()
    check(checked.returncode == 0, f"check: {checked.stderr}")
    check("relay.key may not be read by this user" in checked.stdout, checked.stdout)
    hook = re.search(r"(?m)^ +#!/bin/sh.*\n(?: +install .*\n)+", checked.stdout)
    check(hook, f"no deploy hook: {checked.stdout}")
    # In its own network no other program has these ports.
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", ODMR, "serve", "-c", provider.config]
    serve = box.start("serve.log", *command)
    wait_until(lambda: events(provider.log(), "listening", address=f"{LOOPBACK}:25"), "port 25")
    wait_until(lambda: events(provider.log(), "listening", address=f"{LOOPBACK}:366"), "port 366")
    users, groups, others = status(serve)
    check(users == [owner.pw_uid] * 4 and groups == [owner.pw_gid] * 4 and 0 not in others, f"{users} {groups} {others}")
    check(provider.spool.stat().st_uid == owner.pw_uid, "the spool is not the user's")
    prevented = wait_until(lambda: events(provider.log(), "reload-prevented"), "the warning about a reload")
    check("relay.key" in prevented[0]["error"], "the log does not name the key")
    serve.send_signal(signal.SIGHUP)
    wait_until(lambda: events(provider.log(), "reload-failed"), "the failure of the reload")
    # The command that check has printed corrects it.
    done = box.run("sh", "-ec", hook[0])
    check(done.returncode == 0, f"the deploy hook: {done.stderr}")
    copies = {str(certificates.certificate): box.path / "tls/certificate.pem", str(certificates.key): box.path / "tls/key.pem"}
    for name, copy in copies.items():
        text = text.replace(name, str(copy))
    provider.config.write_text(text)
    os.rename(certificates.certificate, certificates.certificate.with_suffix(".away"))
    checked = check_it()
    check(checked.returncode == 0 and "SIGHUP" not in checked.stdout, f"{checked.stdout} {checked.stderr}")
    serve.send_signal(signal.SIGHUP)
    wait_until(lambda: events(provider.log(), "reloaded"), "the reload")
    serve.terminate()
    check(serve.wait(20) == 0, f"exit {serve.returncode}")
    # If the spool belongs to root, chown is needed, and the error names it.
    for directory, _, _ in os.walk(provider.spool):
        os.chown(directory, 0, 0)
    serve = box.run(*command)
    remedy = f"chown -R {USER} {provider.spool}"
    check(serve.returncode == 73 and remedy in serve.stderr, f"exit {serve.returncode}: {serve.stderr}")
    check(box.run("sh", "-c", remedy).returncode == 0, remedy)
    provider.log_name = "again.log"
    serve = box.start("again.log", *command)
    wait_until(lambda: events(provider.log(), "listening", listener="odmr-tls"), "the start after chown")
    return f"uid {users[0]} on ports 25, 366, 465"
