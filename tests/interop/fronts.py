"""Postfix with postscreen and rspamd on port 25, in front of odmr, by the recipe of dist/postfix: spam is never held."""

import re

from harness import check, events, scenario, wait_until
from twin import ACCOUNT, DIST, PROVIDER, Twin

RSPAMD = ["rspamd", "libhyperscan5", "libluajit-5.1-2", "libluajit-5.1-common", "libsodium23"]
CLIENT, SERVER = "192.0.2.9", "192.0.2.1"  # untrusted clients: postscreen exempts `mynetworks`
GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
HEADER = b"From: a@sender.example\r\nTo: eva@example.org\r\nDate: Thu, 26 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@sender.example>\r\n"
MAIN = """compatibility_level = 3.6
maillog_file = /var/log/postfix.log
myhostname = relay.example.net
inet_interfaces = all
inet_protocols = ipv4
alias_maps =
postscreen_greet_wait = 1s
address_verify_poll_delay = 1s
"""


def start_front(machine, box):
    """Both programs. The files of the recipe are appended to their own files, or put next to them."""
    master = machine.text("usr/share/postfix/master.cf.dist")
    ours = (DIST / "postfix/master.cf").read_text()
    master = re.sub(r"(?m)^smtp +inet .*\n", ours, master, count=1)
    machine.install("etc/postfix/master.cf", master)
    machine.install("etc/postfix/main.cf", MAIN + (DIST / "postfix/main.cf").read_text())
    machine.install("etc/postfix/odmr-domains", "example.org odmr\n")
    machine.run("useradd", "-r", "_rspamd")
    machine.install("etc/rspamd/local.d/actions.conf", DIST / "postfix/rspamd/actions.conf")
    machine.install("etc/rspamd/override.d/logging.inc", 'type = "console";\nlevel = "warning";\n')
    machine.run("sh", "-c", "mkdir -p /var/lib/rspamd /var/log/rspamd /run/rspamd && chown _rspamd /var/lib/rspamd /var/log/rspamd /run/rspamd")
    machine.start("rspamd.log", "rspamd", "-f", "-u", "_rspamd", "-g", "_rspamd")
    machine.install("etc/resolv.conf", "nameserver 127.0.0.1\n")
    machine.start("dnsmasq.log", "dnsmasq", "-k", "--log-facility=-", "--no-resolv", "--no-hosts", "--local=//", "--local=/#/", f"--address=/sender.example/{CLIENT}")
    wait_until(lambda: "started, version" in box.log("dnsmasq.log"), "dnsmasq to start")
    machine.run("ip", "address", "add", f"{SERVER}/24", "dev", "lo")
    machine.run("ip", "address", "add", f"{CLIENT}/24", "dev", "lo")
    machine.run("postfix", "check")
    machine.run("touch", "/var/log/postfix.log")
    machine.start("postfix.log", "tail", "-f", "/var/log/postfix.log")
    machine.start("master.log", "postfix", "start-fg")
    machine.connect(11332, within=120, host="127.0.0.1").close()  # rspamd compiles its rules first


def sends(machine, content, recipient="eva@example.org"):
    """The reply to the first rejected command, or else to the content; the client is untrusted."""
    with machine.connect(25, host=SERVER, source=CLIENT, seconds=60) as line:
        line.hello()
        return line.send("a@sender.example", [recipient], content)


@scenario("dist-postfix", needs=["postfix", "unshare", "nsenter", "pivot_root"], root=True)
def dist_postfix(box):
    """Postfix, postscreen and rspamd reject spam and unknown recipients; odmr holds good mail, from SMTP or virtual(8), and a customer fetches it"""
    machine = Twin(box, packages=RSPAMD)
    machine.configure(PROVIDER.replace("127.0.0.1:25", "127.0.0.1:10025"))
    account = machine.root / "etc/odmr/customers.d/acme.toml"
    account.write_text(ACCOUNT + 'recipients = ["eva@example.org"]\nmax-messages = 1\n')
    serve = machine.start("serve.log", "odmr", "serve", "-c", "/etc/odmr/provider.toml")
    start_front(machine, box)
    log = lambda: box.log("postfix.log")
    # A client that sends before the greeting is not a mail server.
    with machine.connect(25, host=SERVER, source=CLIENT) as line:
        group = ["EHLO x", "MAIL FROM:<a@sender.example>", "RCPT TO:<eva@example.org>", "QUIT"]
        line.socket.sendall("".join(f"{word}\r\n" for word in group).encode())
        replies = [line.reply() for _ in range(4)]
    check(any(reply.startswith("550 5.5.1") for reply in replies), f"{replies}")
    wait_until(lambda: "PREGREET" in log(), "postscreen")
    reply = sends(machine, HEADER + b"Subject: spam\r\n\r\n" + GTUBE + b"\r\n")
    check(reply.startswith("554 5.7.1"), f"spam: {reply}")
    reply = sends(machine, HEADER + b"Subject: x\r\n\r\nx\r\n", "nobody@example.org")
    check(reply.startswith("550 5.1.1"), f"an unknown recipient: {reply}")
    reply = sends(machine, HEADER + b"Subject: x\r\n\r\nx\r\n", "eva@foreign.example")
    check(reply.startswith("554 5.7.1"), f"a foreign domain: {reply}")
    check(not machine.held(), f"{machine.held()}")
    good = HEADER + b"Subject: good\r\n\r\nDear Eva, how are you?\r\n"
    check((reply := sends(machine, good)).startswith("250"), reply)
    wait_until(machine.held, "the good message")
    reply = sends(machine, good, "eva+more@example.org")
    check(reply.startswith("450 4.1.1") and "452 4.2.2" in reply, f"beyond max-messages: {reply}")
    machine.run("odmr", "pull", "-c", "/etc/odmr/customer.toml")
    check(len(machine.fetched()) == 1, f"{machine.fetched()}")
    # The other way: odmr has no listener for the Internet.
    machine.install("etc/odmr/provider.toml", PROVIDER.replace('"127.0.0.1:25"', ""))
    machine.run("pkill", "-x", "odmr")  # SIGTERM to nsenter does not end it
    serve.wait(20)
    machine.start("again.log", "odmr", "serve", "-c", "/etc/odmr/provider.toml")
    wait_until(lambda: events(box.log("again.log"), "listening", listener="odmr"), "the provider without a listener for the Internet")
    ids = {word: machine.run("id", option, "odmr").stdout.strip() for word, option in (("UID", "-u"), ("GID", "-g"))}
    virtual = (DIST / "postfix/main-virtual.cf").read_text()
    for word, number in ids.items():
        virtual = virtual.replace(f"static:{word}", f"static:{number}")
    main = (DIST / "postfix/main.cf").read_text()
    replaced = [name for name in re.findall(r"(?m)^(\w+) =", virtual) if re.search(rf"(?m)^{name} =", main)]
    for name in replaced:  # Postfix warns of a parameter that occurs twice
        main = re.sub(rf"(?m)^{name} =.*\n", "", main)
    machine.install("etc/postfix/main.cf", MAIN + main + virtual)
    machine.install("etc/postfix/odmr-mailboxes", "eva@example.org example.org/\n")
    machine.run("postfix", "reload")
    reply = sends(machine, HEADER + b"Subject: spam\r\n\r\n" + GTUBE + b"\r\n")
    check(reply.startswith("554 5.7.1") and not machine.held(), f"spam: {reply}")
    reply = sends(machine, good, "nobody@example.org")
    check(reply.startswith("550 5.1.1"), f"an unknown recipient: {reply}")
    for _ in range(2):
        check((reply := sends(machine, good)).startswith("250"), reply)
    wait_until(lambda: len(machine.held()) == 2, "the good messages")
    machine.run("odmr", "pull", "-c", "/etc/odmr/customer.toml")
    check(len(machine.fetched()) == 3 and not machine.held(), f"{machine.fetched()}")
    complaints = [line for line in log().splitlines() if "warning:" in line or "fatal:" in line]
    return f"{len(complaints)} warnings of Postfix"
