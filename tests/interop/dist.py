"""The recipes of dist/, word for word, each on its own virtual machine with the program that it is for.

dist/README.md lists each recipe with the scenario that tries it (tests/dist.rs checks that).
"""

import re
import stat
import time

from harness import ROOT, Smtp, check, events, program_path, scenario, wait_until
from twin import DIST, PROVIDER, Twin
from packages import unpacked

NAMESPACES = ["unshare", "nsenter", "pivot_root"]
INETD = PROVIDER.replace('"127.0.0.1:25"', "").replace('"127.0.0.1:366"', "")  # a supervisor has the ports


def journal(machine, unit):
    return machine.run("journalctl", "-o", "cat", "-u", unit).stdout


def user_of(machine, pid):
    """The user that a process runs as."""
    return machine.run("stat", "-c", "%U", f"/proc/{pid}").stdout.strip()


def property_of(machine, unit, name):
    return machine.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()


def install_units(machine, *directories):
    for directory in directories:
        for unit in DIST.glob(f"{directory}/*.*"):
            if unit.suffix == ".conf":
                machine.install(f"etc/systemd/system/{unit.stem}.service.d/unprivileged.conf", unit)
            elif unit.suffix in (".service", ".socket", ".timer"):
                machine.install(f"etc/systemd/system/{unit.name}", unit)
    machine.run("systemctl", "daemon-reload")


def reloads(machine, log, hang_up):
    """After `hang_up()` the provider knows a new customer; `log()` returns the log."""
    before = len(events(log(), "reloaded"))
    name = f"new{time.monotonic_ns()}"
    machine.install(f"etc/odmr/customers.d/{name}.toml", f'domains = ["{name}.example"]\nsecret = "a secret of many words"\n', 0o640)
    machine.run("chgrp", "odmr", f"/etc/odmr/customers.d/{name}.toml")
    hang_up()
    wait_until(lambda: len(events(log(), "reloaded")) == before + 1, "the reload")
    check(events(log(), "reloaded")[-1]["added"] == "1", log())


@scenario("dist-systemd", needs=[*NAMESPACES, "systemctl"], root=True)
def dist_systemd(box):
    """systemd runs both daemons by the units of dist/: hardened, confined, ready, reloaded, stopped; timers make a call and an expiry pass"""
    machine = Twin(box, systemd=True)
    machine.configure()
    install_units(machine, "systemd")
    units = [unit.name for unit in DIST.glob("systemd/*.*")]
    verified = machine.run("systemd-analyze", "verify", *units)
    check(not verified.stderr.strip(), verified.stderr)
    machine.run("systemctl", "start", "odmr-serve")
    log = lambda: journal(machine, "odmr-serve")
    with machine.network():
        Smtp(366).close()  # systemd reports the start only after the daemon listens
    wait_until(lambda: events(log(), "listening", listener="odmr"), "the log")
    landlock = events(log(), "confined")[0]["landlock"]
    check(landlock != "none", "the filter of system calls leaves no Landlock")
    check(user_of(machine, property_of(machine, "odmr-serve", "MainPID")) == "odmr", "not `user`")
    machine.serves()
    reloads(machine, log, lambda: machine.run("systemctl", "reload", "odmr-serve"))
    machine.run("systemctl", "start", "odmr-call.service", "odmr-expire.service", "odmr-call.timer", "odmr-expire.timer")
    check(property_of(machine, "odmr-call.timer", "ActiveState") == "active", "the timer")
    machine.run("systemctl", "start", "odmr-pull")
    wait_until(lambda: property_of(machine, "odmr-call.timer", "ActiveState") == "inactive", "the end of the timer beside the daemon")
    customer = lambda: journal(machine, "odmr-pull")
    wait_until(lambda: events(customer(), "call", result="no-mail") or events(customer(), "call", result="done"), "a call of the daemon")
    check(events(customer(), "confined")[0]["landlock"] == landlock, "the customer is not confined")
    check(not events(customer(), "network-not-watched"), "no netlink")
    machine.run("systemctl", "reload", "odmr-pull")
    wait_until(lambda: events(customer(), "reloaded"), "the reload of the customer")
    check(property_of(machine, "odmr-call.service", "Result") == "success", "the call")
    # Now the directories belong to another user: root opens their locks before it becomes that user.
    machine.run("systemctl", "restart", "odmr-serve", "odmr-pull")
    machine.serves()
    machine.run("systemctl", "stop", "odmr-pull", "odmr-serve")
    for text in (log, customer):
        wait_until(lambda: events(text(), "stopped"), "the last line")
    # A call to a provider that is down does not make the unit fail; exit code 78 ends the daemon, and systemd does not restart it.
    machine.run("systemctl", "start", "odmr-call.service")
    machine.install("etc/odmr/provider.toml", "hostname = 1\n")
    machine.run("systemctl", "start", "odmr-serve", code=1)
    check(property_of(machine, "odmr-serve", "NRestarts") == "0", "restarted with a wrong configuration")
    scores = {}
    for unit in ("odmr-serve", "odmr-pull"):
        text = machine.run("systemd-analyze", "security", "--no-pager", unit).stdout
        scores[unit] = float(re.search(r"Overall exposure level for \S+: ([\d.]+)", text)[1])
        check(scores[unit] < 4, f"{unit}: {scores[unit]}")
    return f"Landlock {landlock}; exposure " + ", ".join(f"{unit} {score}" for unit, score in scores.items())


@scenario("dist-systemd-sockets", needs=[*NAMESPACES, "systemctl"], root=True)
def dist_systemd_sockets(box):
    """systemd binds the ports: for daemons that are never root, and for a process of each connection"""
    machine = Twin(box, systemd=True)
    machine.configure(INETD)
    install_units(machine, "systemd", "systemd/inetd")
    machine.run("systemctl", "start", "odmr.socket", "odmr-inbound.socket", "odmr-expire.service")
    machine.serves()
    failed = lambda: machine.run("systemctl", "list-units", "--failed", "--plain", "--no-legend").stdout
    check(not failed(), failed())
    wait_until(lambda: events(machine.run("journalctl", "-o", "cat").stdout, "accepted"), "the log of a connection in the journal")
    machine.run("systemctl", "stop", "odmr.socket", "odmr-inbound.socket")
    machine.configure(INETD.replace('user = "odmr"\n', ""))
    install_units(machine, "systemd/unprivileged")
    verified = machine.run("systemd-analyze", "verify", "odmr-serve.service", "odmr-pull.service", "odmr-serve-odmr-tls.socket")
    check(not verified.stderr.strip(), verified.stderr)
    machine.run("systemctl", "start", "odmr-serve-inbound.socket", "odmr-serve-odmr.socket")
    machine.serves()
    log = wait_until(lambda: events(text := journal(machine, "odmr-serve"), "turn-ended") and text, "the log")
    check(len(events(log, "listening", source="supervisor")) == 2, log)
    check(events(log, "confined")[0]["landlock"] != "none", log)
    check(user_of(machine, property_of(machine, "odmr-serve", "MainPID")) == "odmr", "not User=")
    reloads(machine, lambda: journal(machine, "odmr-serve"), lambda: machine.run("systemctl", "reload", "odmr-serve"))
    machine.run("systemctl", "stop", "odmr-serve-inbound.socket", "odmr-serve-odmr.socket", "odmr-serve")
    machine.run("systemctl", "start", "odmr-pull-local.socket")
    with machine.connect(25) as line:
        line.hello()
        reply = line.send("eva@example.org", ["bob@w.example"], b"Subject: x\r\n\r\nx\r\n")
        check(reply.startswith("250"), reply)
    check(list(machine.root.glob("var/spool/odmr-out/new/*")), "nothing in the outgoing queue")
    check(not failed(), failed())
    scores = []
    for unit in ("odmr-serve", "odmr-pull"):
        text = machine.run("systemd-analyze", "security", "--no-pager", unit).stdout
        scores.append(f"{unit} {re.search(r'Overall exposure level for [^:]+: ([0-9.]+)', text)[1]}")
    return "exposure " + ", ".join(scores)


# For each supervisor: its list of services, their directory, and its words for reload and stop.
SUPERVISORS = {
    "runit": ("runsvdir", ["sv", "hup"], ["sv", "-w", "20", "down"]),
    "s6": ("s6-svscan", ["s6-svc", "-h"], ["s6-svc", "-wD", "-T", "20000", "-d"]),
    "daemontools": ("svscan", ["svc", "-h"], ["svc", "-d"]),
}


@scenario("dist-supervisors", needs=[*NAMESPACES, "runsvdir", "svlogd", "s6-svscan", "s6-log", "svscan", "multilog"], root=True)
def dist_supervisors(box):
    """runit, s6 and daemontools run provider and customer with their logs; none restarts a daemon with a wrong configuration again and again"""
    machine = Twin(box)
    for kind, (scan, hang_up, stop) in SUPERVISORS.items():
        machine.configure()
        machine.run("rm", "-rf", "/var/log/odmr-serve", "/var/log/odmr-pull", "/var/mail/odmr")
        machine.install(f"service-{kind}", DIST / kind)
        supervisor = machine.start(f"{kind}.log", scan, f"/service-{kind}")
        log = lambda name: machine.text(f"var/log/odmr-{name}/current")
        stamped = lambda name, event: re.search(rf"(?m)^@?[-0-9a-f_:. ]{{20,}} +event={event}", log(name))
        wait_until(lambda: stamped("pull", "call"), f"{kind}: the log of the customer")
        machine.serves()
        wait_until(lambda: stamped("serve", "turn-ended"), f"{kind}: the log of the provider")
        for name in ("serve", "pull"):
            machine.run(*hang_up, f"/service-{kind}/odmr-{name}")
            wait_until(lambda: stamped(name, "reloaded"), f"{kind}: the reload of {name}")
            machine.run(*stop, f"/service-{kind}/odmr-{name}")
            wait_until(lambda: stamped(name, "stopped"), f"{kind}: the end of {name}")
        if kind != "daemontools":
            machine.install("etc/odmr/provider.toml", "hostname = 1\n")
            machine.run(*hang_up[:1], *{"runit": ["up"], "s6": ["-u"]}[kind], f"/service-{kind}/odmr-serve")
            down = {"runit": ["sv", "status"], "s6": ["s6-svstat"]}[kind]
            wait_until(lambda: "expected a host name" in log("serve"), f"{kind}: the error")
            wait_until(lambda: machine.run(*down, f"/service-{kind}/odmr-serve").stdout.startswith("down"), f"{kind}: down")
        machine.run("pkill", "-x", scan)
        for name in ("serve", "pull"):
            for service in (f"/service-{kind}/odmr-{name}", f"/service-{kind}/odmr-{name}/log"):
                machine.run(*{"runit": ["sv", "exit"], "s6": ["s6-svc", "-dx"], "daemontools": ["svc", "-dx"]}[kind], service, code=None)
        supervisor.wait(10)
    return ", ".join(SUPERVISORS)


@scenario("dist-openrc", needs=[*NAMESPACES, "busybox"], root=True)
def dist_openrc(box):
    """OpenRC with supervise-daemon: it starts odmr after check, reloads, restarts a killed process, stops"""
    machine = Twin(box, packages=["openrc", "librc1", "libeinfo1", "insserv"])
    machine.configure()
    machine.start("syslogd.log", "busybox", "syslogd", "-n", "-O", "/var/log/mail")
    wait_until(lambda: (machine.root / "dev/log").is_socket(), "the socket of syslogd")
    states = "starting started stopping inactive wasinactive failed hotplugged daemons options exclusive scheduled tmp"
    machine.run("sh", "-c", f"cd /run && mkdir openrc && cd openrc && mkdir {states} && echo default >softlevel")
    machine.install("etc/rc.conf", 'rc_provide="net"\n')
    for name in ("odmr-serve", "odmr-pull"):
        machine.install(f"etc/init.d/{name}", DIST / "openrc" / name)
    service = lambda name, word, **options: machine.run("rc-service", name, word, **options)
    log = lambda: machine.text("var/log/mail")
    service("odmr-serve", "start")
    machine.serves()
    service("odmr-pull", "start")
    wait_until(lambda: "event=call " in log(), "a call of the daemon")
    reloads(machine, lambda: re.sub(r"(?m)^.* odmr\[\d+\]: ", "", log()), lambda: service("odmr-serve", "reload"))
    check("started" in service("odmr-serve", "status").stdout, "status")
    service("odmr-pull", "stop")
    service("odmr-serve", "stop")
    wait_until(lambda: log().count("event=stopped") == 2, "both ends")
    machine.install("etc/odmr/provider.toml", "hostname = 1\n")
    failed = service("odmr-serve", "start", code=1)
    check("provider.toml: has neither" in failed.stdout + failed.stderr, f"{failed.stdout}{failed.stderr}")
    return "start, reload, stop"


@scenario("dist-inetd", needs=[*NAMESPACES, "inetd", "tcpserver", "multilog", "svscan"], root=True)
def dist_inetd(box):
    """inetd, xinetd and tcpserver of dist/ start a process for each connection: mail comes in and is fetched"""
    machine = Twin(box, packages=["xinetd"])
    machine.configure(INETD)
    machine.install("etc/inetd.conf", DIST / "inetd/inetd.conf")
    inetd = machine.start("inetd.log", "inetd", "-i")
    machine.serves()
    machine.run("pkill", "-x", "inetd")
    inetd.wait(10)
    for name in ("odmr", "odmr-inbound"):
        machine.install(f"etc/xinetd.d/{name}", DIST / "xinetd" / name)
    xinetd = machine.start("xinetd.log", "xinetd", "-dontfork")
    machine.serves()
    machine.run("pkill", "-x", "xinetd")
    xinetd.wait(10)
    machine.install("service", DIST / "tcpserver")
    machine.start("svscan.log", "svscan", "/service")
    machine.serves()
    wait_until(lambda: "event=turned" in machine.text("var/log/odmr/current"), "the log of multilog")
    cron = re.search(r"(?m)^\d+ .*? root +(.*)$", (DIST / "inetd/expire.cron").read_text())[1]
    machine.run("sh", "-c", cron)
    return "inetd, xinetd, tcpserver"


@scenario("dist-sendmail", needs=[*NAMESPACES, "dpkg-divert", "update-alternatives"], root=True)
def dist_sendmail(box):
    """dpkg-divert and alternatives(8) make odmr /usr/sbin/sendmail, and restore the former program"""
    machine = Twin(box)
    machine.configure()
    there = "for path in /usr/sbin/sendmail /usr/bin/mailq /usr/bin/newaliases; do ls -l $path && cksum <$path; done"
    before = machine.run("sh", "-c", there).stdout
    machine.install("root/debian", DIST / "sendmail/debian")
    sends = lambda: machine.run("/usr/sbin/sendmail", "-i", "-f", "eva@example.org", "bob@w.example", input="Subject: x\n\nx\n")
    without = machine.run("sh", "-c", "sed s,/usr/local/bin/odmr,/nonexistent, /root/debian | sh -s install 2>&1 || echo $?").stdout
    check("install it first\n69\n" in without and machine.run("sh", "-c", there).stdout == before, f"without odmr: {without}")
    for _ in range(2):  # a second time changes nothing
        machine.run("/root/debian", "install")
    sends()
    # After the package is removed, a link without a target is left; the package prints the command that removes it.
    machine.install("root/postrm", ROOT / "packaging/debian/postrm")
    said = machine.run("sh", "-c", "ln -sf /usr/bin/odmr /usr/sbin/sendmail; /root/postrm remove 2>&1").stdout
    (command,) = re.findall("type `(.*)`", said)
    machine.run("sh", "-c", command)
    machine.run("/root/debian", "install")
    listed = machine.run("/usr/bin/mailq").stdout
    check("bob@w.example" in listed, f"mailq: {listed}")
    for _ in range(2):
        machine.run("/root/debian", "remove")
    check((after := machine.run("sh", "-c", there).stdout) == before, f"{before}{after}")
    # RPM systems have the program of Debian under another name; no package owns the path itself there.
    machine.run("sh", "-c", "rm /usr/sbin/sendmail /usr/bin/mailq /usr/bin/newaliases && ln -s update-alternatives /usr/bin/alternatives")
    machine.install("root/alternatives", DIST / "sendmail/alternatives")
    machine.run("/root/alternatives", "install")
    sends()
    listed = machine.run("/usr/bin/mailq").stdout
    check(listed.count("bob@w.example") >= 2, f"mailq: {listed}")
    machine.run("/root/alternatives", "remove")
    machine.run("test", "!", "-e", "/usr/sbin/sendmail")
    return "dpkg-divert, alternatives"


@scenario("dist-certificates", needs=[*NAMESPACES, "openssl"], root=True)
def dist_certificates(box):
    """The certbot hook is the text that `odmr check` prints. A running serve uses the certificates that this hook and acme.sh copy"""
    machine = Twin(box)
    live = "/etc/letsencrypt/live/relay.example.net"
    tls = f'[tls]\ncertificate = "{live}/fullchain.pem"\nkey = "{live}/privkey.pem"\n'
    machine.configure(PROVIDER + tls)
    new_pair = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=relay.example.net"]
    new_pair += ["-addext", "subjectAltName=DNS:relay.example.net", "-keyout", f"{live}/privkey.pem", "-out", f"{live}/fullchain.pem", "-days"]
    machine.run("mkdir", "-p", live)
    machine.run(*new_pair, "30")
    printed = machine.run("odmr", "check", "-c", "/etc/odmr/provider.toml").stdout
    lines = (DIST / "certbot/odmr").read_text().splitlines()
    wanted = "\n".join(f"    {line}" for line in lines if not line.startswith("# "))
    check(wanted in printed, f"`odmr check` prints another hook than dist/certbot/odmr: {printed}")
    machine.install("etc/letsencrypt/renewal-hooks/deploy/odmr", DIST / "certbot/odmr")
    hook = lambda: machine.run("/etc/letsencrypt/renewal-hooks/deploy/odmr")
    hook()  # no daemon runs yet, and the renewal must not fail because of that
    machine.configure(PROVIDER + '[tls]\ncertificate = "tls/certificate.pem"\nkey = "tls/key.pem"\n')
    machine.start("serve.log", "odmr", "serve", "-c", "/etc/odmr/provider.toml")
    log = lambda: box.log("serve.log")
    wait_until(lambda: events(log(), "listening", listener="odmr"), "serve")
    machine.run(*new_pair, "60")
    hook()
    wait_until(lambda: events(log(), "reloaded"), "the reload")
    # A program that does the same as acme.sh with these options.
    machine.install("usr/local/bin/acme.sh", ACME, 0o755)
    machine.install("root/install-cert", DIST / "acme.sh/install-cert")
    machine.run("env", f"FROM={live}", "/root/install-cert")
    key = (machine.root / "etc/odmr/tls/key.pem").stat()
    check(stat.S_IMODE(key.st_mode) == 0o600 and machine.run("stat", "-c", "%U", "/etc/odmr/tls/key.pem").stdout == "odmr\n", f"{key}")
    checked = machine.run("odmr", "check", "-c", "/etc/odmr/provider.toml").stdout
    check("may not be read" not in checked, checked)
    return "certbot, acme.sh"


ACME = """#!/bin/sh -e
while [ $# -gt 0 ]; do
    case $1 in
    --fullchain-file) cat $FROM/fullchain.pem >$2 ;;
    --key-file) cat $FROM/privkey.pem >$2 ;;
    --reloadcmd) command=$2 ;;
    esac
    shift
done
eval "$command"
"""


@scenario("dist-logs", needs=[*NAMESPACES, "fail2ban-server"], root=True)
def dist_logs(box):
    """logrotate empties the log of a running serve; fail2ban with the filter and jail of dist/ bans a client that guesses secrets"""
    machine = Twin(box, packages=["logrotate", "libpopt0"])
    machine.configure()
    serve = "exec odmr serve -c /etc/odmr/provider.toml --log-time 2>>/var/log/odmr.log"
    machine.start("serve.log", "sh", "-c", serve)
    machine.serves()
    ended = lambda: "event=turn-ended" in machine.text("var/log/odmr.log")
    wait_until(ended, "the log")
    machine.install("etc/logrotate.d/odmr", DIST / "logrotate/odmr")
    machine.run("logrotate", "-f", "/etc/logrotate.d/odmr")
    check("event=turned" in machine.text("var/log/odmr.log.1"), "nothing was rotated")
    machine.serves()
    wait_until(ended, "the log after the rotation")
    text = machine.text("var/log/odmr.log")
    check(text.startswith("20") and text.count("event=turned ") == 1, f"after the rotation: {text[:300]!r}")
    machine.install("etc/fail2ban/filter.d/odmr.conf", DIST / "fail2ban/filter.conf")
    machine.install("etc/fail2ban/jail.d/odmr.conf", DIST / "fail2ban/jail.conf")
    # Without a journal and a firewall, and with a ban of loopback.
    local = "[DEFAULT]\nbanaction = dummy\nignoreself = false\nignoreip =\n[sshd]\nenabled = false\n[odmr]\nbackend = polling\nlogpath = /var/log/odmr.log\n"
    machine.install("etc/fail2ban/jail.local", local)
    machine.run("mkdir", "-p", "/run/fail2ban")
    machine.start("fail2ban.log", "fail2ban-server", "-f", "--logtarget", "STDERR")
    status = lambda: machine.run("fail2ban-client", "status", "odmr", code=None).stdout
    wait_until(lambda: "Currently banned" in status(), "the jail", pause=0.1)
    for _ in range(6):
        guess(machine)
    wait_until(lambda: re.search(r"Banned IP list:\s+127\.0\.0\.1", status()), "the ban", pause=0.1)
    return "logrotate, fail2ban"


def guess(machine):
    """Three wrong secrets, each over a new connection and with the record of failures removed, so that none is delayed."""
    (machine.root / "var/spool/odmr/.odmr/logins").unlink(missing_ok=True)
    with machine.connect(366) as line:
        line.hello()
        line.want("334", "AUTH CRAM-MD5")
        line.want("535", "YWNtZSAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMA==")


@scenario("dist-prometheus", needs=[*NAMESPACES, "systemctl"], root=True)
def dist_prometheus(box):
    """The metrics of both sides are written in one step, promtool accepts them and the alerts, and each alert has its metric"""
    machine = Twin(box, systemd=True)
    promtool = program_path("promtool") or unpacked(box, "prometheus")["prometheus"] / "usr/bin/promtool"
    machine.configure()
    install_units(machine, "systemd", "prometheus")
    machine.install("usr/local/sbin/odmr-metrics", DIST / "prometheus/odmr-metrics")
    place = "/var/lib/prometheus/node-exporter"
    machine.run("mkdir", "-p", place)
    machine.run("systemctl", "start", "odmr-serve", "odmr-pull")
    machine.serves()
    metrics = ""
    for name in ("provider", "customer"):
        machine.run("systemctl", "start", f"odmr-metrics@{name}.service", f"odmr-metrics@{name}.timer")
        text = machine.text(f"{place}/odmr-{name}.prom")
        checked = box.run(promtool, "check", "metrics", input=text)
        check(checked.returncode == 0 and not checked.stderr.strip(), checked.stderr)
        metrics += text
    # The timer may be writing one of them now.
    left = lambda: sorted(file.name for file in machine.root.glob(f"{place[1:]}/*"))
    wait_until(lambda: left() == ["odmr-customer.prom", "odmr-provider.prom"], "two files, and no other")
    # A failure leaves the old file, which becomes older, and no other.
    machine.install("etc/odmr/provider.toml", "hostname = 1\n")
    machine.run("systemctl", "start", "odmr-metrics@provider.service", code=1)
    wait_until(lambda: left() == ["odmr-customer.prom", "odmr-provider.prom"], "the two files, and no other")
    check(machine.text(f"{place}/odmr-provider.prom"), "the old file has become empty")
    rules = DIST / "prometheus/odmr.rules.yml"
    for command in (["check", "rules", rules], ["test", "rules", box.write("rules.yml", RULES_TEST.replace("RULES", str(rules)))]):
        checked = box.run(promtool, *command)
        check(checked.returncode == 0, f"{checked.stdout}{checked.stderr}")
    # A metric without a line now (a time that is unknown) is in doc/operating.md by its ending.
    documented = (DIST.parent / "doc/operating.md").read_text()
    for metric in set(re.findall(r"\bodmr_\w+", re.sub(r"(?m)^.*summary:.*$", "", rules.read_text()))):
        known = metric in metrics or metric in documented or re.sub(r"^odmr_[a-z]+(?=_)", "", metric) in documented
        check(known, f"an alert on {metric}, which does not exist")
    return f"{rules.read_text().count('- alert:')} alerts"


RULES_TEST = """rule_files: [RULES]
tests:
  - interval: 1h
    input_series:
      - {series: 'odmr_queue_oldest_timestamp_seconds{account="acme"}', values: '0x80'}
      - {series: 'odmr_queue_bytes{account="acme"}', values: '95x80'}
      - {series: 'odmr_quota_bytes{account="acme"}', values: '100x80'}
    alert_rule_test:
      - {eval_time: 47h, alertname: OdmrMailWaits}
      - eval_time: 49h
        alertname: OdmrMailWaits
        exp_alerts:
          - exp_labels: {account: acme}
            exp_annotations: {summary: "acme has not fetched its mail for two days"}
      - eval_time: 1h
        alertname: OdmrQuota
        exp_alerts:
          - exp_labels: {account: acme}
            exp_annotations: {summary: "acme has used up 90 % of its quota"}
"""


@scenario("dist-scripts", needs=["sh", "busybox"])
def dist_scripts(box):
    """Each script of dist/ is executable, and sh, busybox sh and shellcheck accept it"""
    store = unpacked(box, "shellcheck")
    shellcheck = store.get("shellcheck") and store["shellcheck"] / "usr/bin/shellcheck"
    scripts = [file for file in DIST.rglob("*") if file.is_file() and file.read_bytes().startswith(b"#!")]
    for script in scripts:
        check(script.stat().st_mode & 0o111, f"{script} is not executable")
        for shell in (["sh"], ["busybox", "sh"]):
            done = box.run(*shell, "-n", script)
            check(done.returncode == 0, f"{script}: {done.stderr}")
        if shellcheck:
            # SC1091: files that only the BSDs have. SC2034: variables for these.
            done = box.run(shellcheck, "-s", "sh", "-e", "SC1091,SC2034", script)
            check(done.returncode == 0, f"{script}: {done.stdout}")
    return f"{len(scripts)} scripts" + ("" if shellcheck else ", without shellcheck")
