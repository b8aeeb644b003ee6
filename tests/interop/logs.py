"""The log with other programs: rsyslog, busybox syslogd, fail2ban."""

import base64
import fcntl
import os
import re
import signal
import socket
import subprocess
import threading
import time

from harness import LOOPBACK, ODMR, ROOT, Customer, Provider, Smtp, check, free_port, scenario, wait_until
from world import outgoing_table

# The datagrams that a socket of Linux holds, unless net.unix.max_dgram_qlen is changed.
QUEUE = int(open("/proc/sys/net/unix/max_dgram_qlen").read()) + 1

RSYSLOG = """module(load="imuxsock" SysSock.Use="off")
input(type="imuxsock" Socket="{box}/log" RateLimit.Interval="0")
mail.* action(type="omfile" file="{box}/mail" template="RSYSLOG_TraditionalFileFormat")
mail.* action(type="omfile" file="{box}/mail-iso" template="RSYSLOG_FileFormat")
mail.=warning action(type="omfile" file="{box}/warnings" template="RSYSLOG_TraditionalFileFormat")
"""


def start_rsyslog(box):
    process = box.start("rsyslog.log", "rsyslogd", "-n", "-f", box.path / "rsyslog.conf", "-i", box.path / "rsyslog.pid")
    wait_until((box.path / "log").exists, "the socket of rsyslog")
    return process


def start_serve(box, provider, *options):
    provider.process = box.start(provider.log_name, ODMR, "serve", "-c", provider.config, *options)
    return provider.process


def address(text, listener):
    found = re.search(rf"listening listener={listener} address=\S+:(\d+)", text)
    return found and int(found[1])


def guess(port, account="acme"):
    """One wrong secret."""
    with Smtp(port) as client:
        client.hello()
        client.want("334", "AUTH CRAM-MD5")
        client.want("535", base64.b64encode(f"{account} {'0' * 32}".encode()).decode())
        client.want("221", "QUIT")


def banned(box, file):
    """The addresses that fail2ban finds in a log by the filter of dist/."""
    done = box.run("fail2ban-regex", "-o", "ip", file, ROOT / "dist/fail2ban/filter.conf")
    check(done.returncode in (0, 1), f"fail2ban-regex: {done.stdout}{done.stderr}")
    return done.stdout.split()


@scenario("logs", needs=["rsyslogd"])
def logs(box):
    """rsyslog is restarted and stopped under load: with --syslog no session waits, and each line is there that rsyslog has not lost itself"""
    box.write("rsyslog.conf", RSYSLOG.format(box=box.path))
    rsyslog = start_rsyslog(box)
    provider = Provider(box, require_tls=False)
    process = start_serve(box, provider, f"--syslog={box.path}/log")
    mail = lambda: box.log("mail")
    inbound = wait_until(lambda: address(mail(), "inbound"), "the address in the log of rsyslog")
    odmr = wait_until(lambda: address(mail(), "odmr"), "the address in the log of rsyslog")
    sessions, slowest, stop = [0], [0.0], threading.Event()

    def fire():
        while not stop.is_set():
            begin = time.monotonic()
            with Smtp(inbound) as client:
                client.hello()
                client.want("221", "QUIT")
            slowest[0] = max(slowest[0], time.monotonic() - begin)
            sessions[0] += 1
            time.sleep(0.003)

    gun = threading.Thread(target=fire, daemon=True)
    gun.start()
    time.sleep(1)
    for pause in (0, 2):
        rsyslog.send_signal(signal.SIGTERM)
        rsyslog.wait(10)
        time.sleep(pause)
        rsyslog = start_rsyslog(box)
        time.sleep(1)
    before = sessions[0]
    rsyslog.send_signal(signal.SIGSTOP)
    time.sleep(3)
    meanwhile = sessions[0] - before
    rsyslog.send_signal(signal.SIGCONT)
    stop.set()
    gun.join(60)
    check(meanwhile > 10, f"{meanwhile} sessions while rsyslog stood still")
    check(slowest[0] < 2, f"a session took {slowest[0]:.1f} s")
    guess(odmr)
    wait_until(lambda: "auth-failed" in box.log("warnings"), "the failed login among the warnings")
    check(box.log("warnings").count("event=") == 1, f"{box.log('warnings')}")
    process.send_signal(signal.SIGTERM)
    check(process.wait(10) == 0, "the end")
    wait_until(lambda: "event=stopped" in mail(), "the last line")
    lost = 2 * sessions[0] - mail().count("event=connected") - mail().count("event=closed") + 2
    reported = sum(int(count) for count in re.findall(r"event=log-lost lines=(\d+)", mail()))
    check(0 <= lost - reported <= 2 * QUEUE, f"{lost} lines lost, {reported} reported")
    check(re.search(r"(?m)^\w{3} [ \d]\d \d\d:\d\d:\d\d \S+ odmr\[\d+\]: event=", mail()), f"not the form of syslog: {mail()[:200]}")
    check(not box.log(provider.log_name), f"on stderr: {box.log(provider.log_name)}")
    return f"{sessions[0]} sessions, the slowest {slowest[0]:.2f} s; {lost} lines lost in two restarts, {reported} reported"


@scenario("logs-fail2ban", needs=["rsyslogd", "fail2ban-regex"])
def logs_fail2ban(box):
    """fail2ban finds the failed logins in each form of the log, and no address that a client has invented"""
    box.write("rsyslog.conf", RSYSLOG.format(box=box.path))
    start_rsyslog(box)
    provider = Provider(box, require_tls=False)
    made_up = "x event=auth-failed session=1 peer=[192.0.2.66] account=y"

    def attack(odmr):
        for account in ("acme", "nobody", f'" warning: {made_up}'):
            guess(odmr, account)
        with Smtp(odmr) as client:
            client.hello()
            client.say("EHLO event=auth-failed session=1 peer=[192.0.2.66]")
            client.say(f"warning: {made_up}")
            client.want("334", "AUTH CRAM-MD5")
            client.want("501", "*")

    files = {}
    for name, options in {"syslog": [f"--syslog={box.path}/log", "-v"], "plain": ["-v"], "times": ["--log-time", "-v"]}.items():
        provider.log_name = f"{name}.log"
        (provider.spool / ".odmr/logins").unlink(missing_ok=True)  # otherwise the next guesses wait for half a minute
        process = start_serve(box, provider, *options)
        log = (lambda: box.log("mail")) if name == "syslog" else provider.log
        attack(wait_until(lambda: address(log(), "odmr"), "the address in the log"))
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        wait_until(lambda: "event=stopped" in log(), "the last line")
        files[name] = box.path / provider.log_name
    files |= {"syslog": box.path / "mail", "iso": box.path / "mail-iso"}
    for name, file in files.items():
        found = banned(box, file)
        check(found == [LOOPBACK] * 3, f"{name}: fail2ban finds {found}")
    return f"3 failures in each of {', '.join(files)}"


# Its own /dev: the system's syslogd, if there is one, gets nothing.
PRIVATE_DEV = """mount --make-rprivate / && mkdir {box}/dev && cp -a /dev/null /dev/zero /dev/random /dev/urandom {box}/dev &&
mount --bind {box}/dev /dev || exit 99
if [ "$1" = syslogd ]; then
    busybox syslogd -n -O {box}/messages </dev/null >/dev/null 2>&1 & syslogd=$!
    while [ ! -e /dev/log ]; do sleep 0.1; done
fi
shift
"$@"; code=$?; sleep 0.5; [ -z "$syslogd" ] || kill $syslogd; rm -r {box}/dev/*; umount -l /dev; rmdir {box}/dev; exit $code
"""


@scenario("logs-inetd", needs=["unshare", "busybox"], root=True)
def logs_inetd(box):
    """With --inetd the log goes to /dev/log (busybox syslogd) or nowhere, but never to the client; `check --inetd` reports which"""
    provider = Provider(box, require_tls=False)
    script = box.write("private.sh", PRIVATE_DEV.format(box=box.path))
    private = lambda syslogd, *words: ["unshare", "-m", "sh", str(script), syslogd, ODMR, *map(str, words)]
    said = []
    for syslogd in ("none", "syslogd"):
        for listener in ("inbound", "odmr"):
            ours, theirs = socket.socketpair()
            box.keep(ours)
            ours.settimeout(20)
            serve = private(syslogd, "serve", "-c", provider.config, "--inetd", listener)
            child = subprocess.Popen(serve, stdin=theirs, stdout=theirs, stderr=theirs)
            theirs.close()
            ours.sendall(b"EHLO x.example\r\nNONSENSE\r\nQUIT\r\n")
            heard = b""
            while some := ours.recv(4096):
                heard += some
            check(child.wait(20) == 0, f"{listener}: exit {child.returncode}: {heard!r}")
            check(heard.startswith(b"220 ") and b"\r\n221 " in heard, f"{heard!r}")
            for line in heard.splitlines(keepends=True):
                check(line[:3].isdigit() and line[3:4] in b" -" and line.endswith(b"\r\n"), f"not a reply: {line!r}")
        done = box.run(*private(syslogd, "check", "-c", provider.config, "--inetd"))
        check(done.returncode == 0, f"check: {done.stdout}{done.stderr}")
        said.append(done.stdout)
    check("goes nowhere; start a syslogd" in said[0], said[0])
    check("goes to the system log" in said[1], said[1])
    messages = (box.path / "messages").read_text()
    check(messages.count("mail.info odmr[") >= 4 and messages.count("event=connected") == 2, messages)
    return f"{len(messages.splitlines())} lines"


@scenario("logs-customer")
def logs_customer(box):
    """The log of a customer's daemon is not read: the daemon still calls, accepts mail, reloads and ends, and then logs the number of lost lines"""
    provider = Provider(box, require_tls=False, accounts={"acme": "relay = true"}).start()
    port = free_port()
    customer = Customer(
        box, provider.odmr, tls="none",
        more=f'[schedule]\nevery = "1s"\njitter = "none"\n{outgoing_table(box)}listen = ["{LOOPBACK}:{port}"]\n',
    )
    content, recipients = b"Subject: x\r\n\r\nx\r\n", [f"eva{number}@example.org" for number in range(20)]
    facts, arrived = [], 0
    for is_read in (True, False):
        source, sink = os.pipe()
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 4096)
        daemon = box.start("daemon.log", ODMR, "pull", "--daemon", "-v", "-c", customer.config, stderr=sink, stdout=sink)
        os.close(sink)
        for _ in range(3):
            with Smtp(provider.inbound) as line:
                line.hello()
                for _ in range(40):
                    check(line.send("a@b.example", recipients, content).startswith("250"), "not accepted")
            arrived += 40 * len(recipients)
            wait_until(lambda: len(customer.files()) == arrived, "the mail at the customer", seconds=30)
            with Smtp(port) as line:
                line.hello()
                check((reply := line.send("eva@example.org", ["adam@example.org"], content)).startswith("250"), reply)
            arrived += 1
            daemon.send_signal(signal.SIGHUP)
        with open(f"/proc/{daemon.pid}/statm") as statm:
            size = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        check(size < 60_000, f"{size} KiB")
        with open(source, "rb") as pipe:
            lost = None
            while is_read and not lost:
                lost = re.search(rb"error: event=log-lost lines=(\d+)", pipe.readline())
            begun = time.monotonic()
            daemon.terminate()
            check(daemon.wait(20) == 0, f"exit {daemon.returncode}")
            check((end := time.monotonic() - begun) < 5, f"the end takes {end:.1f} s")
        facts.append(f"{lost[1].decode() if lost else 0} lines known as lost, {size} KiB, the end in {end:.1f} s")
    return "; ".join(facts)
