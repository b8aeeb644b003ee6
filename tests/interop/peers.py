"""Exim as the peer, as in doc/peers.md: a provider that behaves as Exim 4.99, and Debian's Exim as host."""

import os
import pwd
import socket
import ssl
import threading
import time

from exim import Exim
from harness import LOOPBACK, Certificates, Customer, Provider, Server, Smtp, check, connections
from harness import lets_in, scenario, wait_until

COUNT = 100


class OneACall:
    """Uses implicit TLS, gives each call one message, and does not report how many wait."""

    def __init__(self, box, certificates, messages):
        self.left, self.calls, self.replies = list(messages), 0, []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates.certificate, certificates.key)
        self.listener = box.keep(socket.create_server((LOOPBACK, 0)))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        for sock in connections(self.listener):
            self.calls += 1
            try:
                with self.context.wrap_socket(sock, server_side=True) as secured:
                    self.session(Server(secured))
            except OSError as error:
                self.replies.append(repr(error))

    def session(self, server):
        server.say("220 relay.example.net ESMTP Exim 4.99")
        while (line := server.until(b"\r\n")) is not None:
            verb = line[:4].upper()
            if lets_in(server, verb):
                continue
            if verb == b"QUIT":
                return server.say("221 relay.example.net closing connection")
            if not self.left:
                server.say("453 You have no mail")
                continue
            server.say("250 ODMR provider turning line around")
            return self.turned(server)

    def turned(self, server):
        server.until(b"\r\n")
        content = self.left[0]
        for line, lines in (
            ("EHLO relay.example.net", 1),
            (f"MAIL FROM:<bob@sender.example> SIZE=1537\r\nRCPT TO:<eva@example.org>\r\nBDAT {len(content)} LAST\r\n{content}", 3),
            ("QUIT", 1),
        ):
            server.say(line.removesuffix("\r\n"))
            for _ in range(lines):
                while (reply := server.until(b"\r\n")) is not None and reply[3:4] == b"-":
                    pass
            if lines == 3 and reply and reply.startswith(b"250"):
                self.left.pop(0)


@scenario("exim-one-a-call")
def exim_one_a_call(box):
    """The provider gives one message in each call, under TLS, as Exim does: one pull fetches all 100"""
    certificates = Certificates(box)
    messages = [f"Subject: message {number}\r\n\r\nmessage {number}\r\n" for number in range(COUNT)]
    provider = OneACall(box, certificates, messages)
    customer = Customer(box, provider.port, tls="implicit", authority=certificates.authority)
    begin = time.monotonic()
    code = customer.pull()
    took = time.monotonic() - begin
    found = sorted(file.read_text().rsplit("\n\n", 1)[1] for file in customer.files())
    check(code == 0, f"exit {code}: {customer.log()[-600:]}")
    check(found == sorted(f"message {number}\n" for number in range(COUNT)), f"{len(found)} messages came: {found[:3]}")
    check(provider.calls == COUNT, f"{provider.calls} calls, wanted {COUNT}: {provider.replies[:2]}")
    check(customer.pull() == 0 and provider.calls == COUNT + 1, f"then {provider.calls} calls")
    return f"{COUNT} messages in {COUNT} calls, {took:.1f} s"


@scenario("exim-sends", root=True)
def exim_sends(box):
    """Debian's Exim as the sending MX: with verified STARTTLS, 150 recipients and RCPTMAX, all mail is held"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    exim = Exim(
        box,
        "tls_advertise_hosts =",
        f"""begin routers
world:
  driver = manualroute
  route_list = * {LOOPBACK}
  self = send
  transport = smtp
begin transports
smtp:
  driver = smtp
  port = {provider.inbound}
  hosts_require_tls = *
  tls_verify_certificates = {certificates.authority}
  tls_verify_hosts = *
  tls_verify_cert_hostnames =
begin retry
* * F,1h,1s
""",
    ).start()
    for number in range(20):
        exim.send("bob@sender.example", ["eva@example.org"], f"From: bob@sender.example\nSubject: message {number}\n\nx\n.\n")
    many = [f"user{number}@example.org" for number in range(150)]
    exim.send("bob@sender.example", many, "From: bob@sender.example\nSubject: many\n\nx\n")

    def recipients():
        return [line for file in provider.held() for line in file.read_text().splitlines() if line.startswith("Delivered-To: ")]

    wait_until(lambda: len(recipients()) >= 170, "170 held recipients", seconds=60, pause=0.1)
    check(len(set(recipients())) == 151, f"{len(set(recipients()))} different recipients")
    return f"{len(provider.held())} files for {len(recipients())} recipients"


@scenario("exim-next-hop", root=True)
def exim_next_hop(box):
    """Debian's Exim as the next hop by SMTP: recipients that it rejects at RCPT are rejected, the other mail is in its mailbox file"""
    provider = Provider(box, require_tls=False).start()
    mailbox = box.path / "exim/inbox"
    mailbox.mkdir(parents=True)
    os.chown(mailbox, pwd.getpwnam("mail").pw_uid, -1)
    exim = Exim(
        box,
        """acl_smtp_rcpt = check
tls_advertise_hosts =
recipients_max = 100""",
        f"""check:
  accept recipients = eva@example.org : adam@example.org
  deny message = no such user here
begin routers
inbox:
  driver = accept
  transport = inbox
begin transports
inbox:
  driver = appendfile
  directory = {mailbox}
  maildir_format
  user = mail
begin retry
* * F,1h,1s
""",
    ).start()
    customer = Customer(
        box, provider.odmr, tls="none", accept=["@example.org"], more=f'deliver = "smtp:{LOOPBACK}:{exim.port}"\n'
    )
    with Smtp(provider.inbound) as sender:
        sender.hello()
        for number in range(10):
            body = f"Subject: message {number}\r\n\r\n" + "x" * 2000 + "\r\n.\r\n"
            reply = sender.send("bob@sender.example", ["eva@example.org", "zed@example.org"], body.encode())
            check(reply.startswith("250"), reply)
    code = customer.pull()
    check(code == 0, f"exit {code}: {customer.log()[-800:]}")
    wait_until(lambda: len(list(mailbox.glob("new/*"))) == 10, "10 messages in Exim's mailbox")
    check(not provider.held(), f"{len(provider.held())} are held still")
    return "10 messages, 10 rejected recipients"
