"""Postfix and Exim as remote mail hosts, with SMTPUTF8, without it, and without 8BITMIME: our relay sends to them, and
they send
to our port 25. Messages arrive unchanged, and SMTPUTF8 is used only if an address needs it."""

import collections
import os
import pwd
import re

from corpus import after_trace, difference
from exim import Exim
from harness import LOOPBACK, Customer, Provider, Smtp, at_rest, check, free_port, scenario, wait_until
from postfix import UID, Postfix
from routes import all_reports
from world import RELAYS, Names

ADAM, BERT = "adam@example.org", "bert@sender.example"
JOERG = "j\u00f6rg"
# `kind`: its domain has that name; `utf8`: announces SMTPUTF8; `maildir`: the Maildir into which it delivers.
Host = collections.namedtuple("Host", "kind address utf8 eight maildir")
# `parameters`: of MAIL, when a host announces them; `needs`: SMTPUTF8, because an address is not ASCII.
Message = collections.namedtuple("Message", "name user parameters needs content")

# The fields before the trace in a file at rest.
ENVELOPE = re.compile(rb"(?:(?:Return-Path|X-Original-To|Delivered-To|X-ODMR-[\w-]+): [^\n]*\n)*")
KINDS = {"full": (True, True), "ascii": (False, True), "seven": (False, False)}  # SMTPUTF8, 8BITMIME
TO_THE_CUSTOMER = {"plain", "eight", "header", "address"}  # Postfix breaks lines over 998 octets when it sends


def message(name, body, *, user="eva", parameters="", needs=False, author=ADAM, subject=None):
    head = f"From: <{author}>\r\nSubject: {subject or name}\r\nMessage-ID: <{name}@example.org>\r\nX-Name: {name}\r\n"
    return Message(name, user, parameters, needs, (head + "Date: Fri, 2 Jan 2026 03:04:05 +0000\r\n\r\n").encode() + body)


UMLAUTS = "Gr\u00fc\u00dfe"
MESSAGES = [
    message("plain", b".\r\n..\r\nFrom here \t \r\n\ta tab\r\n\r\n\r\n"),
    message("eight", UMLAUTS.encode() + b"\r\n" + UMLAUTS.encode("latin-1") + b" \x80\xff\r\n", parameters=" BODY=8BITMIME"),
    # SMTPUTF8 is declared, but not needed: text beyond ASCII needs only 8BITMIME.
    message("header", b"x\r\n", subject=UMLAUTS, parameters=" BODY=8BITMIME SMTPUTF8"),
    message("long", b"z" * 1500 + b"\r\n"),
    # The last message, because Exim writes utf8esmtp for all messages after it in one session.
    message("address", b"x\r\n", user=JOERG, parameters=" SMTPUTF8", needs=True),
    message("author", b"x\r\n", author=f"{JOERG}@example.org", parameters=" BODY=8BITMIME SMTPUTF8", needs=True),
]


def send_all(line, messages, sender, domain, announced):
    """Submits them; a parameter that is not announced is left out. Returns the names of those that were accepted."""
    sent = set()
    for one in messages:
        words = [word for word in one.parameters.split() if word.split("=")[-1] in announced]
        reply = line.send(sender, [f"{one.user}@{domain}"], one.content, "".join(f" {word}" for word in words))
        check(reply.startswith("250"), f"{one.name} to {domain}: {reply}")
        sent.add(one.name)
    return sent


def by_name(files):
    """The name of each message -> the octets of its file."""
    found = [path.read_bytes() for path in files]
    return {re.search(rb"(?m)^X-Name: (\w+)$", file).group(1).decode(): file for file in found}


def relay_to(box, hosts, port):
    """Our relay sends each message to each host. Returns how many arrived and how many came back."""
    domain = lambda host: f"{host.kind}.example"
    names = Names(
        box,
        mx={domain(host): [(1, f"mx-{domain(host)}")] for host in hosts},
        hosts={f"mx-{domain(host)}": host.address for host in hosts},
    )
    relay = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {port}\nretry-first = "1s"\n'
    provider = Provider(box, require_tls=False, accounts=RELAYS, more=relay).start()
    customer = Customer(box, provider.odmr, tls="none")
    with Smtp(provider.odmr) as line:
        announced = line.hello()
        line.log_in("acme")
        for host in hosts:
            send_all(line, MESSAGES, ADAM, domain(host), announced)
    user = lambda one: one.user.replace("\u00f6", r"\x{F6}")  # as a DSN in ASCII has it (RFC 6533 section 3)
    back = [f"{user(one)}@{domain(host)}" for host in hosts for one in MESSAGES if one.needs and not host.utf8]
    for host in hosts:
        wanted = {one.name for one in MESSAGES if host.utf8 or not one.needs}
        got = lambda: by_name(host.maildir.glob("new/*"))
        wait_until(lambda: set(got()) >= wanted, f"{wanted} at {host}", pause=0.05)
        check(set(got()) == wanted, f"{host.kind}: {set(got())}")
        for one in MESSAGES:
            if one.name in wanted:
                check_relayed(host, one, got()[one.name])
    reports = all_reports(customer, back)
    statuses = {group["Status"] for group in reports.values()}
    check(set(reports) == set(back) and statuses <= {"5.6.7"}, f"{[(who, one['Status']) for who, one in reports.items()]}")
    return len(MESSAGES) * len(hosts), len(back)



def check_relayed(host, one, file):
    """Checks that it has all octets, and its transfer: Postfix writes UTF8SMTP, Exim utf8esmtp (RFC 6531 section 4.3)."""
    file = ENVELOPE.sub(b"", file, count=1)
    wrong = difference(after_trace(file, "Received", "Received"), at_rest(one.content))
    check(not wrong, f"{host.kind} has {one.name}: {wrong}")
    protocol = re.match(rb"Received: .*?\swith (\w+)", file, re.S).group(1).upper()
    check((b"UTF8" in protocol) == one.needs, f"{host.kind} has {one.name} by {protocol.decode()}")


def bring_from(box, provider, customer, hosts, port):
    """Each host gets the messages that it accepts, for our customer, and sends them to our port 25."""
    count = 0
    for host in hosts:
        messages = [one for one in MESSAGES if one.name in TO_THE_CUSTOMER and (host.utf8 or not one.needs)]
        with Smtp(port, host=host.address) as line:
            sent = send_all(line, messages, BERT, "example.org", line.hello())
        wait_until(lambda: len(provider.held()) >= len(sent), f"{sent} of {host}", pause=0.05)
        held = by_name(provider.held())
        check((result := customer.pull()) == 0, f"pull: exit {result}")
        came = by_name(customer.files())
        for path in customer.files():
            path.unlink()
        check(set(held) == set(came) == sent, f"{host.kind}: {set(held)} {set(came)} of {sent}")
        for one in messages:
            file, at_home = held[one.name], came[one.name]
            recipient = f"\nDelivered-To: {one.user}@example.org\n".encode()
            check(recipient in file and recipient in at_home, f"{one.name}: no {recipient} in {file[:300]}")
            for got, received in ((ENVELOPE.sub(b"", file, count=1), 2), (ENVELOPE.sub(b"", at_home, count=1), 3)):
                rest = after_trace(got, *["Received"] * received)
                wrong = difference(rest, at_rest(one.content))
                check(not wrong, f"{one.name} of {host.kind}: {wrong}")
        count += len(sent)
    return count


def maildir(box, name, uid):
    path = box.path / "boxes" / name
    path.mkdir(parents=True)
    for directory in (path.parent, path):
        os.chown(directory, uid, -1)
    return path


def both_ways(box, hosts, port, provider):
    """`provider`: the one that the hosts know; our relay is another."""
    provider.start()
    customer = Customer(box, provider.odmr, tls="none", file="home")
    brought = bring_from(box, provider, customer, hosts, port)
    sent, back = relay_to(box, hosts, port)
    return f"{sent - back} of {sent} sent to 3 hosts, {back} came back; {brought} brought by them"


def receiving_provider(box):
    """A provider whose port 25 is known before it runs."""
    ports = (free_port(), 0, 0)
    return Provider(box, require_tls=False, name="home-serve", ports=ports)


@scenario("postfix-host", needs=["postfix", "dnsmasq"], root=True)
def postfix_host(box):
    """Postfix as host with SMTPUTF8, without it, and without 8BITMIME, in both directions: octets, SMTPUTF8 only if needed, returned messages"""
    port, provider = free_port(), receiving_provider(box)
    (box.path / "postfix").mkdir()
    hosts, services = [], ""
    for last, (kind, (utf8, eight)) in enumerate(KINDS.items(), 11):
        hosts.append(Host(kind, f"127.0.0.{last}", utf8, eight, maildir(box, kind, UID)))
        options = " -o smtputf8_enable=no" * (not utf8) + " -o smtpd_discard_ehlo_keywords=8bitmime" * (not eight)
        services += f"127.0.0.{last}:{port} inet n - n - - smtpd{options}\n"
    box.write("postfix/boxes", "".join(f"@{kind}.example {kind}/\n" for kind in KINDS), mode=0o644)
    box.write("postfix/transport", f"example.org smtp:[{LOOPBACK}]:{provider.inbound}\n", mode=0o644)
    Postfix(
        box,
        f"""virtual_mailbox_domains = {", ".join(f"{kind}.example" for kind in KINDS)}
virtual_mailbox_base = {box.path}/boxes
virtual_mailbox_maps = texthash:{box.path}/postfix/boxes
virtual_uid_maps = static:{UID}
virtual_gid_maps = static:{UID}
virtual_minimum_uid = 100
transport_maps = texthash:{box.path}/postfix/transport
mynetworks = 127.0.0.0/8
local_header_rewrite_clients =
smtputf8_enable = yes""",
        services=services,
    )
    return both_ways(box, hosts, port, provider)


@scenario("exim-host", needs=["dnsmasq", "apt-get", "dpkg-deb"], root=True)
def exim_host(box):
    """Debian's Exim as host with SMTPUTF8, without it, and without 8BITMIME, in both directions: as postfix-host"""
    port, provider = free_port(), receiving_provider(box)
    hosts = []
    for last, (kind, (utf8, eight)) in enumerate(KINDS.items(), 21):
        host = Host(kind, f"127.0.0.{last}", utf8, eight, maildir(box, kind, pwd.getpwnam("mail").pw_uid))
        hosts.append(host)
        Exim(
            box,
            f"""acl_smtp_rcpt = take
tls_advertise_hosts =
smtputf8_advertise_hosts = {"*" * utf8}
accept_8bitmime = {str(eight).lower()}""",
            f"""begin routers
here:
  driver = accept
  domains = {kind}.example
  transport = inbox
ours:
  driver = manualroute
  route_list = * {LOOPBACK}
  self = send
  transport = ours
begin transports
inbox:
  driver = appendfile
  directory = {host.maildir}
  maildir_format
  user = mail
ours:
  driver = smtp
  port = {provider.inbound}
begin retry
* * F,1h,1s
""",
            name=f"exim-{kind}",
            address=host.address,
            port=port,
        ).start()
    return both_ways(box, hosts, port, provider)
