"""Outgoing mail: up to the provider in the session that also brings mail, and from there to the Internet."""

import email
import os
import re
import shutil
import socket
import threading
import time

from harness import LOOPBACK, Certificates, Customer, Provider, Server, Smtp, check, connections, events, field, free_port
from harness import lets_in, scenario, secret, serve_each, wait_until
from postfix import UID, Postfix
from world import RELAYS, House, Names, outgoing_table, queued, self_signed, sendmail

DEAD, SECOND = "127.0.0.2", "127.0.0.3"

TYPED = """\
To: Eva <eva@dest.example>
Cc: nobody@nowhere.example
Bcc: secret@dest.example,
 hidden@dest.example
Subject: typed

typed into sendmail
.
.and a dot
"""


class Policy:
    """Postfix's policy protocol: defers the first `count` recipients, and permits all others."""

    def __init__(self, box, count):
        self.deferred = self.asked = 0
        self.count = count
        self.socket, self.port = serve_each(box, self.answer)

    def answer(self, sock):
        with sock, sock.makefile("rw") as lines:
            try:
                for line in lines:
                    if line != "\n":
                        continue
                    self.asked += 1
                    defer = self.deferred < self.count
                    self.deferred += defer
                    lines.write("action=450 4.7.1 come back later\n\n" if defer else "action=dunno\n\n")
                    lines.flush()
            except OSError:
                pass


def receiving_postfix(box, address, port, domain, policy):
    """A Postfix that accepts mail for a domain by STARTTLS into a Maildir. Returns the Maildir's path."""
    certificate, key = self_signed(box, f"mx.{domain}")
    boxes = box.path / "boxes"
    boxes.mkdir()
    os.chown(boxes, UID, UID)
    (box.path / "postfix").mkdir(exist_ok=True)
    box.write("postfix/boxes", f"@{domain} {domain}/\n", mode=0o644)
    Postfix(
        box,
        f"""virtual_mailbox_domains = {domain}
virtual_mailbox_base = {boxes}
virtual_mailbox_maps = texthash:{box.path}/postfix/boxes
virtual_uid_maps = static:{UID}
virtual_gid_maps = static:{UID}
virtual_minimum_uid = 100
smtpd_tls_security_level = may
smtpd_tls_cert_file = {certificate}
smtpd_tls_key_file = {key}
smtpd_tls_received_header = yes
smtpd_recipient_restrictions = check_policy_service inet:{LOOPBACK}:{policy.port}, reject_unauth_destination""",
        services=f"{address}:{port} inet n - n - - smtpd\n",
    )
    return boxes / domain


def give(provider, sender, recipient, content):
    with Smtp(provider.inbound) as line:
        line.hello()
        reply = line.send(sender, [recipient], content)
        check(reply.startswith("250"), reply)


@scenario("outgoing", needs=["postfix", "dnsmasq"], root=True)
def outgoing(box):
    """A user types a message into sendmail -t, and it is sent on: past a dead MX, after a 450, by STARTTLS into Postfix; a null MX causes a DSN"""
    port = free_port()
    names = Names(
        box,
        mx={"dest.example": [(10, "dead.dest.example"), (20, "mx.dest.example")]},
        hosts={"dead.dest.example": DEAD, "mx.dest.example": SECOND},
        null=["nowhere.example"],
    )
    policy = Policy(box, 1)
    delivered = receiving_postfix(box, SECOND, port, "dest.example", policy)
    certificates = Certificates(box)
    relay = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {port}\ntls = "may"\nretry-first = "1s"\n'
    provider = Provider(box, certificates=certificates, accounts=RELAYS, more=relay).start()
    customer = Customer(box, provider.odmr, authority=certificates.authority, more=outgoing_table(box))
    done = sendmail(box, customer, "-t", "-i", "-f", "adam@example.org", text=TYPED)
    check(done.returncode == 0, f"sendmail: exit {done.returncode}: {done.stderr}")
    check(len(queued(customer)) == 1, f"{len(queued(customer))} files wait")
    give(provider, "lester@sender.example", "eva@example.org", b"Subject: incoming\r\n\r\nin\r\n")

    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not queued(customer), "the message still waits at the customer")
    came = [field(path.read_bytes(), "Subject") for path in customer.files()]
    check("incoming" in came, f"no incoming mail: {came}")
    lines = events(provider.log(), "connected", listener="odmr")
    check(len(lines) == 1, f"{len(lines)} connections of the customer")
    check("1 sent" in customer.log(), f"the summary: {customer.log()[-300:]}")

    files = lambda: list(delivered.glob("new/*"))
    wait_until(lambda: len(files()) >= 3, "Postfix to have it for three recipients")
    check(events(provider.log(), "host-failed", host="dead.dest.example"), "the preferred MX was not tried")
    deferred = events(provider.log(), "delivery", via="mx", status="deferred")
    check(any(line["reply"].startswith("450 4.7.1 ") for line in deferred), f"not deferred: {deferred}")
    boxes = sorted(field(path.read_bytes(), "Delivered-To") for path in files())
    wanted = ["eva@dest.example", "hidden@dest.example", "secret@dest.example"]
    check(boxes == wanted, f"Postfix has it for {boxes}")
    for path in files():
        file = path.read_bytes()
        received = re.findall(r"(?m)^Received: (.*(?:\n[ \t].*)*)", file.decode())
        check("ESMTPS" in received[0] and "mx.sender.example" in received[0], f"Postfix's own: {received[0]}")
        check("relay.example.net" in received[1] and "ESMTPSA" in received[1], f"the provider's: {received[1]}")
        head = file.split(b"\n\n", 1)[0].lower()
        check(b"\nbcc" not in head and b"hidden@" not in head.split(b"\nreceived:")[-1], f"Bcc: {file!r}")
        for name in ("Date", "Message-ID", "From"):
            check(field(file, name), f"no {name}: {file!r}")
        check("adam@example.org" in field(file, "From"), f"{field(file, 'From')}")
        check(file.count(b"\nMessage-ID:") == 1 and file.count(b"\nDate:") == 1, f"{file!r}")
        check(file.endswith(b"\n\ntyped into sendmail\n.\n.and a dot\n"), f"{file[-100:]!r}")

    # The null MX is found so fast that the same call may fetch its DSN.
    find = lambda: [path for path in customer.files() if b"report-type" in path.read_bytes()]
    wait_until(lambda: find() or provider.held(), "a DSN in the held domain")
    check((result := customer.pull()) == 0, f"second pull: exit {result}")
    dsns = find()
    check(len(dsns) == 1, f"{len(dsns)} DSNs")
    check(dsns[0].parent.parent.name == "adam", f"{dsns[0]}")
    read_dsn(dsns[0].read_bytes(), "nobody@nowhere.example", "5.1.10", "556")
    left = lambda: list(provider.spool.glob("outgoing/*/*/*"))
    wait_until(lambda: not left(), f"an empty spool: {left()}")
    return f"one connection for both directions; {policy.deferred} deferred, 3 delivered, 1 DSN"


def read_dsn(octets, recipient, status, diagnostic):
    """Reads a DSN as a mail program does, and checks its content."""
    dsn = email.message_from_bytes(octets)
    check(dsn.get_content_type() == "multipart/report", dsn.get_content_type())
    check(dsn.get_param("report-type") == "delivery-status", f"{dsn['Content-Type']}")
    check(not dsn.defects, f"{dsn.defects}")
    check(dsn["Return-Path"] == "<>", f"Return-Path: {dsn['Return-Path']}")
    check(dsn["Auto-Submitted"] == "auto-replied", f"Auto-Submitted: {dsn['Auto-Submitted']}")
    text, report, returned = dsn.get_payload()
    check(text.get_content_type() == "text/plain" and recipient in text.get_payload(), f"{text.get_payload()}")
    check(report.get_content_type() == "message/delivery-status", report.get_content_type())
    message, *recipients = report.get_payload()
    check(message["Reporting-MTA"] == "dns; relay.example.net", f"{message['Reporting-MTA']}")
    check(len(recipients) == 1, f"{len(recipients)} recipients")
    got = recipients[0]
    check(got["Final-Recipient"] == f"rfc822; {recipient}", f"{got['Final-Recipient']}")
    check(got["Action"] == "failed", f"{got['Action']}")
    check(got["Status"] == status, f"Status: {got['Status']}")
    check(diagnostic in got["Diagnostic-Code"], f"Diagnostic-Code: {got['Diagnostic-Code']}")
    check("Subject: typed" in returned.as_string(), f"{returned.as_string()}")


@scenario("smarthost")
def smarthost(box):
    """The relay sends mail for many domains to a smarthost in one connection, with STARTTLS and AUTH; also to a second odmr"""
    tls = self_signed(box, "localhost", label="smart")
    keywords = ("PIPELINING", "8BITMIME", "SIZE", "SMTPUTF8", "CHUNKING")
    house = House(box, tls=tls, accounts={"isp": "open sesame"}, keywords=keywords, name="smart.example")
    certificates = Certificates(box)

    def relay(port, name, password, authority):
        return f"""[relay]
smarthost = "localhost:{port}"
ca = "{authority}"
name = "{name}"
secret = "{password}"
retry-first = "1s"
"""

    def send(customer, count):
        for number in range(count):
            text = f"To: u@d{number}.example, v@d{number + 1}.example\nSubject: s{number}\n\n{'z' * 100 * number}\n.\n"
            done = sendmail(box, customer, "-t", "-i", "-f", "adam@example.org", text=text)
            check(done.returncode == 0, f"sendmail: exit {done.returncode}: {done.stderr}")

    provider = Provider(
        box, certificates=certificates, accounts=RELAYS, ports=(free_port(), free_port(), free_port()),
        more=relay(house.port, "isp", "open sesame", tls[0]),
    ).start()
    customer = Customer(box, provider.odmr, authority=certificates.authority, more=outgoing_table(box))
    send(customer, 5)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    recipients = lambda: sorted(one for message in house.messages for one in message.recipients)
    wanted = sorted(one for number in range(5) for one in (f"u@d{number}.example", f"v@d{number + 1}.example"))
    wait_until(lambda: len(recipients()) >= len(wanted), "ten recipients at the smarthost")
    check(recipients() == wanted, f"{recipients()}")
    check(all(house.secured), f"in clear: {house.secured}")
    check(set(house.logins) == {("PLAIN", "isp", True)}, f"{house.logins}")
    first = house.connections
    check(house.most <= 5, f"{house.most} connections at once to the smarthost")

    # All waiting mail, for six domains, after a restart: one connection.
    send(customer, 5)
    house.messages.clear()
    house.rejections["MAIL"] = ["450 4.3.0 later"] * 1000
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    deferred = lambda: events(provider.log(), "delivery", via="smarthost", status="deferred", reply="450 4.3.0 later")
    wait_until(lambda: len(list(provider.spool.glob("outgoing/*/[nc]*/*"))) >= 10 and deferred(), "ten files")
    check((result := provider.stop()) == 0, f"serve: exit {result}")
    house.rejections.clear()
    due(provider.spool)
    time.sleep(0.2)  # the attempts under way have ended
    before, logins = house.connections, len(house.logins)
    provider.start()
    wait_until(lambda: len(recipients()) >= len(wanted), "ten recipients at the smarthost, again")
    check(house.connections - before == 1, f"{house.connections - before} connections for what was due at once")
    check(len(house.logins) - logins == 1, "not one login")

    # The relay does not connect to a smarthost that is down for each message.
    provider.stop()
    gone = House(box, rejections={"EHLO": ["421 4.3.2 going down"] * 100}, name="smart.example")
    text = provider.config.read_text()
    down = relay(gone.port, "isp", "open sesame", tls[0]).replace('"1s"', '"20s"')
    provider.config.write_text(text[: text.index("[relay]")] + down)
    provider.start()
    send(customer, 20)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wait_until(lambda: len(list(provider.spool.glob("outgoing/*/[nc]*/*"))) >= 40, "forty files")
    wait_until(lambda: gone.connections, "the first connection")
    time.sleep(0.3)
    check(gone.connections <= 5, f"{gone.connections} connections to a smarthost that is down")
    provider.stop()
    shutil.rmtree(provider.spool / "outgoing")

    # The same with another provider as the smarthost: its spool has the messages.
    domains = [f"d{number}.example" for number in range(6)]
    accounts = {"isp": "relay = true\nany-sender = true\n"}
    second = Provider(
        box, certificates=certificates, customers={"isp": domains}, name="second", accounts=accounts
    )
    second.config.write_text(second.config.read_text().replace('"relay.example.net"', '"second.example.net"'))
    second.start()
    text = provider.config.read_text()
    text = text[: text.index("[relay]")] + relay(second.odmr, "isp", secret("isp"), certificates.authority)
    provider.config.write_text(text)
    provider.start()
    send(customer, 5)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wait_until(lambda: len(second.held()) >= 10, "ten files held by the second provider")
    files = second.held()
    check(len(files) == 10, f"{len(files)} files")
    check(all("ESMTPSA" in field(path.read_bytes(), "Received") for path in files), "not over TLS with AUTH")
    return f"first {first} connections, then 1 for 10 messages; 10 held by a second provider"


def due(spool):
    """Makes all outgoing mail in a spool due now."""
    for file in list(spool.glob("outgoing/*/new/*")) + list(spool.glob("outgoing/*/cur/*")):
        os.utime(file)


class NoMail:
    """A provider that accepts no mail: it replies 502 to MAIL (RFC 2645 section 5.4)."""

    def __init__(self, box, reply="502 5.5.1 not implemented"):
        self.reply, self.heard, self.codes = reply, [], []
        self.messages = []
        self.socket = box.keep(socket.create_server((LOOPBACK, 0)))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        for sock in connections(self.socket):
            try:
                with sock:
                    sock.settimeout(20)
                    self.session(sock)
            except OSError:
                pass

    def session(self, sock):
        server = Server(sock)
        server.say("220 relay.example.net ODMR")
        while (line := server.until(b"\r\n")) is not None:
            verb = line[:4].upper()
            self.heard.append(verb.decode())
            if lets_in(server, verb):
                pass
            elif verb == b"ATRN":
                if not self.messages:
                    server.say("453 4.3.2 you have no mail")
                    continue
                server.say("250 2.0.0 turning, 1 message")
                return self.turned(server)
            elif verb == b"QUIT":
                return server.say("221 2.0.0 bye")
            else:
                server.say(self.reply if verb == b"MAIL" else "502 5.5.1 not implemented")

    def turned(self, server):
        self.codes.append(server.until(b"\r\n")[:3])
        for line in ("EHLO relay.example.net", "MAIL FROM:<l@sender.example>", "RCPT TO:<eva@example.org>", "DATA"):
            self.ask(server, line)
        self.ask(server, "Subject: " + self.messages.pop(0) + "\r\n\r\nx\r\n.")
        self.ask(server, "QUIT")

    def ask(self, server, line):
        server.say(line)
        while (reply := server.until(b"\r\n")) is not None and reply[3:4] == b"-":
            pass
        self.codes.append(reply and reply[:3])


@scenario("fallback")
def fallback(box):
    """The provider replies 502 to MAIL: the call fetches incoming mail, and outgoing mail goes to the submission host, or waits"""
    provider = NoMail(box)
    tls = self_signed(box, "localhost", label="submission")
    house = House(box, tls=tls, accounts={"adam": "my own"}, name="submission.example")
    more = f'submission = "localhost:{house.port}"\nca = "{tls[0]}"\nname = "adam"\nsecret = "my own"'
    facts = []
    for reply in ("502 5.5.1 not implemented", "503 5.5.1 ATRN first", "530 5.7.0 no", "550 5.7.1 no relaying"):
        provider.reply = reply
        file = f"with{reply[:3]}"
        customer = Customer(box, provider.port, tls="none", file=file, more=outgoing_table(box, file, more))
        for number in range(3):
            text = f"To: u{number}@dest.example\nSubject: fallback {reply[:3]}\n\nx\n"
            done = sendmail(box, customer, "-t", "-f", "adam@example.org", text=text)
            check(done.returncode == 0, f"sendmail: exit {done.returncode}: {done.stderr}")
        provider.messages.append("incoming")
        logins, messages = len(house.logins), len(house.messages)
        check((result := customer.pull()) == 0, f"{reply[:3]}: exit {result}")
        check(len(customer.files()) == 1, f"{reply[:3]}: {len(customer.files())} messages came")
        check(len(house.messages) - messages == 3, f"{reply[:3]}: {len(house.messages) - messages} messages submitted")
        check(len(house.logins) - logins == 1, f"{reply[:3]}: {len(house.logins) - logins} logins")
        check(not queued(customer), f"{reply[:3]}: still {len(queued(customer))} in the queue")
        check("3 sent" in customer.log(), f"{reply[:3]}: {customer.log()[-300:]}")
    check(all(house.secured) and house.logins[0] == ("PLAIN", "adam", True), f"{house.secured} {house.logins}")

    # No mail to fetch: 453, and the message is submitted all the same.
    file = "nomail"
    customer = Customer(box, provider.port, tls="none", file=file, more=outgoing_table(box, file, more))
    sendmail(box, customer, "-f", "adam@example.org", "u@dest.example", text="Subject: x\n\nx\n")
    messages = len(house.messages)
    check((result := customer.pull()) == 0, f"453: exit {result}")
    check(len(house.messages) - messages == 1 and not queued(customer), "after 453 the message was not submitted")

    # Without a submission host it is stored, and the log reports that.
    customer = Customer(box, provider.port, tls="none", file="without", more=outgoing_table(box, "without"))
    sendmail(box, customer, "-f", "adam@example.org", "u@dest.example", text="Subject: x\n\nx\n")
    provider.messages.append("incoming")
    check((result := customer.pull()) == 0, f"without: exit {result}")
    check(len(customer.files()) == 1, "without: no mail came")
    check(len(queued(customer)) == 1, f"without: {len(queued(customer))} in the queue")
    waits = events(customer.log(), "outgoing-waits")
    check(len(waits) == 1 and waits[0]["reason"].startswith("550 5.7.1 "), f"not logged: {customer.log()}")
    check("1 waiting to be sent" in customer.log(), f"the summary: {customer.log()[-300:]}")
    facts.append("stored and logged without a submission host")

    # The submission host is down: the message is stored, and incoming mail is fetched.
    more = f'submission = "localhost:{free_port()}"\nca = "{tls[0]}"'
    customer = Customer(box, provider.port, tls="none", file="dead", more=outgoing_table(box, "dead", more))
    sendmail(box, customer, "-f", "adam@example.org", "u@dest.example", text="Subject: x\n\nx\n")
    provider.messages.append("incoming")
    check((result := customer.pull()) == 0, f"dead: exit {result}")
    check(len(customer.files()) == 1 and len(queued(customer)) == 1, "dead host: the message is lost, or no mail arrived")
    check(events(customer.log(), "submission-failed"), f"not logged: {customer.log()}")
    check("1 waiting to be sent" in customer.log(), f"the summary: {customer.log()[-300:]}")

    # One message that the provider rejects does not block the others.
    strict = Provider(box, require_tls=False, accounts=RELAYS).start()
    customer = Customer(box, strict.odmr, tls="none", file="strict", more=outgoing_table(box, "strict"))
    sendmail(box, customer, "-f", "me@foreign.example", "eva@example.com.example", text="Subject: foreign\n\nx\n")
    sendmail(box, customer, "-f", "adam@example.org", "someone@dest.example", text="Subject: own\n\nx\n")
    check((result := customer.pull()) == 0, f"strict: exit {result}")
    check("1 sent" in customer.log(), f"the others wait after a foreign sender's message: {customer.log()[-500:]}")
    return "; ".join(facts)
