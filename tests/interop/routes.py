"""The routes of mail and their conditions: MX records of all kinds, TLS policies, delivery status notifications."""

import email
import socket
import time

from harness import LOOPBACK, Customer, Provider, Smtp, check, events, free_port, scenario, wait_until
from world import RELAYS, House, Names, outgoing_table, self_signed, sendmail

MX = "127.0.0.3"


def world(box, house, *, mx, hosts, more="", aliases=None, retry="1s"):
    """Provider and customer, each with its own name."""
    names = Names(box, mx=mx, hosts=hosts, aliases=aliases)
    relay = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {house.port}\nretry-first = "{retry}"\n{more}'
    provider = Provider(box, require_tls=False, accounts=RELAYS, more=relay).start()
    return provider, Customer(box, provider.odmr, tls="none", more=outgoing_table(box))


def send(box, customer, *arguments, text="Subject: x\n\nx\n"):
    done = sendmail(box, customer, "-f", "adam@example.org", *arguments, text=text)
    check(done.returncode == 0, f"sendmail {arguments}: exit {done.returncode}: {done.stderr}")


def reports(dsn):
    """Recipient -> its group of fields, from the octets of a DSN; empty if they are not a DSN."""
    message = email.message_from_bytes(dsn)
    if message.get_content_type() != "multipart/report":
        return {}
    groups = message.get_payload(1).get_payload()[1:]
    return {group["Final-Recipient"].split("; ")[1]: group for group in groups}


def all_reports(customer, wanted):
    """Calls until DSNs about all these recipients have arrived. Returns recipient -> fields."""

    def found():
        check((result := customer.pull()) == 0, f"pull: exit {result}")
        every = {}
        for path in customer.files():
            every |= reports(path.read_bytes())
        return every if set(every) >= set(wanted) else None

    return wait_until(found, f"DSNs about {wanted}", pause=0.2)


@scenario("routes", needs=["dnsmasq"])
def routes(box):
    """MX records: sixty (over TCP), CNAMEs, only an address, our own name in the list. A domain that does not exist causes a DSN"""
    house = House(box, address=MX)
    long = [f"h{number}-with-a-name-so-long-that-sixty-are-too-many.many.example" for number in range(60)]
    provider, customer = world(
        box,
        house,
        mx={
            "many.example": list(enumerate(long)),
            "own.example": [(10, "relay.example.net"), (20, "mx.dest.example")],
            "after.example": [(10, "mx.dest.example"), (20, "relay.example.net"), (30, "dead.example")],
            "equal.example": [(10, "mx.dest.example"), (10, "mx2.dest.example")],
        },
        hosts={name: MX for name in ("mx.dest.example", "mx2.dest.example", "implicit.example", *long)},
        aliases={"alias.example": "implicit.example", "mxalias.example": "equal.example"},
    )
    good = ["many", "after", "equal", "implicit", "alias", "mxalias"]
    for name in [*good, "own", "none"]:
        send(box, customer, f"u@{name}.example")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wanted = sorted(f"u@{name}.example" for name in good)
    recipients = lambda: sorted(one for message in house.messages for one in message.recipients)
    wait_until(lambda: len(recipients()) >= len(wanted), f"{wanted}; {recipients()}")
    check(recipients() == wanted, f"{recipients()}")
    got = all_reports(customer, ["u@own.example", "u@none.example"])
    statuses = {recipient: group["Status"] for recipient, group in got.items()}
    check(statuses == {"u@own.example": "5.4.6", "u@none.example": "5.1.2"}, f"{statuses}")
    return f"{len(wanted)} ways good, 2 DSNs"


class Deaf:
    """For House.tls: replies 220 to STARTTLS and then closes the connection."""

    def wrap_socket(self, *_, **__):
        raise OSError("no TLS after all")


@scenario("relay-tls", needs=["dnsmasq"])
def relay_tls(box):
    """tls = may, must and verify to MX hosts: with a self-signed certificate, without STARTTLS, with broken TLS; a full host gets the mail after a pause"""
    tls = self_signed(box, "mx.dest.example")
    clear = House(box, address="127.0.0.3")
    signed = House(box, address="127.0.0.4", port=clear.port, tls=tls)
    deaf = House(box, address="127.0.0.5", port=clear.port, tls=tls)
    deaf.tls = Deaf()
    later = House(box, address="127.0.0.6", port=clear.port, tls=tls, rejections={"STAR": ["454 4.7.0 not now"] * 9})
    full = House(box, address="127.0.0.7", port=clear.port, rejections={"MAIL": ["452 4.3.1 no room"] * 9})
    hosts = {"clear": 3, "mclear": 3, "signed": 4, "msigned": 4, "vsigned": 4, "deaf": 5, "later": 6, "full": 7}
    provider, customer = world(
        box,
        clear,
        mx={f"{name}.example": [(1, f"mx-{name}.example")] for name in hosts},
        hosts={f"mx-{name}.example": f"127.0.0.{last}" for name, last in hosts.items()},
        more='tls-for = { "mclear.example" = "must", "msigned.example" = "must", "vsigned.example" = "verify" }\n',
    )
    for name in hosts:
        send(box, customer, f"u@{name}.example")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    recipients = lambda house: sorted(one for message in house.messages for one in message.recipients)
    wait_until(lambda: len(recipients(signed)) == 2 and recipients(clear) and recipients(later), "those that may go")
    wait_until(lambda: recipients(deaf), "mail in clear to a host whose TLS is broken")
    time.sleep(1)
    check(recipients(clear) == ["u@clear.example"], f"in clear: {recipients(clear)}")
    check(recipients(signed) == ["u@msigned.example", "u@signed.example"], f"self-signed: {recipients(signed)}")
    check(all(signed.secured) and not any(later.secured), f"{signed.secured} {later.secured}")
    failed = {line["host"]: line["error"] for line in events(provider.log(), "tls-failed")}
    check(set(failed) == {"mx-deaf.example", "mx-later.example"}, f"logged as in clear: {failed}")
    for name in ("mclear", "vsigned"):
        deferred = lambda name=name: events(provider.log(), "delivery", to=f"<u@{name}.example>", via="mx", status="deferred")
        wait_until(lambda: any(line["reply"].startswith("451 4.4.1 ") for line in deferred()), f"{name}: the deferral: {deferred()}")
    wait_until(lambda: full.connections, "a connection to a host whose disk is full")
    check(full.connections <= 4, f"{full.connections} connections to a host whose disk is full")
    return f"{full.connections} connections to a full host"


class HangsUp(House):
    """Closes the connection at each recipient called poison."""

    def rejection(self, verb, line):
        if verb == "RCPT" and b"<poison" in line:
            raise OSError("hangs up")
        return super().rejection(verb, line)


@scenario("relay-hang-up", needs=["dnsmasq"])
def relay_hang_up(box):
    """A host closes the connection at one message: the other messages, for the same domain and for another, are sent to it at once"""
    house = HangsUp(box, address=MX)
    domains = ("one.example", "two.example")
    provider, customer = world(
        box,
        house,
        mx={domain: [(1, "mx.dest.example")] for domain in domains},
        hosts={"mx.dest.example": MX},
        retry="1h",
    )
    for recipient in ("poison@one.example", "good@one.example", "good@two.example"):
        send(box, customer, recipient)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    recipients = lambda: sorted(one for message in house.messages for one in message.recipients)
    wait_until(lambda: len(recipients()) == 2, f"both good messages; {recipients()}")
    check(recipients() == ["good@one.example", "good@two.example"], f"{recipients()}")
    # They may have come over another connection, before the one of the other message was closed.
    deferred = lambda: events(provider.log(), "delivery", to="<poison@one.example>", status="deferred")
    check(len(wait_until(deferred, "the deferral of the other")) == 1, f"the other: {deferred()}")
    return f"{house.connections} connections"


@scenario("dsns", needs=["dnsmasq"])
def dsns(box):
    """DSNs: passed on or relayed, RET=FULL, 550 of many kinds. The sender of a message that the customer rejects gets a DSN"""
    plain = House(box, address=MX)
    able = House(box, address="127.0.0.4", port=plain.port, keywords=("PIPELINING", "8BITMIME", "DSN", "CHUNKING"))
    small = House(box, address="127.0.0.5", port=plain.port, keywords=("SIZE 500",))
    no = House(
        box, address="127.0.0.6", port=plain.port,
        rejections={"RCPT": ["550 5.1.1 no such user", "550-5.2.1 two\r\n550 5.2.1 lines"], "DATA": ["554 5.6.0 bad"]},
    )
    hosts = {"plain": MX, "able": "127.0.0.4", "small": "127.0.0.5", "no": "127.0.0.6"}
    provider, customer = world(
        box,
        plain,
        mx={f"{name}.example": [(1, f"mx-{name}.example")] for name in hosts},
        hosts={f"mx-{name}.example": address for name, address in hosts.items()},
    )
    send(box, customer, "-N", "success,failure", "-V", "id+2B1", "-R", "full", "u@plain.example", "u@able.example")
    send(box, customer, "u@small.example", text="Subject: big\n\n" + ("z" * 70 + "\n") * 20)
    send(box, customer, "-R", "full", "u@no.example", "v@no.example", "w@no.example", text="Subject: whole\n\nall of it\n")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wanted = {"u@no.example": "5.1.1", "v@no.example": "5.2.1", "w@no.example": "5.6.0", "u@small.example": "5.3.4"}
    got = all_reports(customer, [*wanted, "u@plain.example"])
    statuses = {recipient: group["Status"] for recipient, group in got.items() if group["Action"] == "failed"}
    check(statuses == wanted, f"{statuses}")
    check(got["u@plain.example"]["Action"] == "relayed", f"{got['u@plain.example']['Action']}")
    check("u@able.example" not in got, "a DSN of what the next hop will report")
    mail = [attempt.line for attempt in able.attempts if attempt.verb in ("MAIL", "RCPT")]
    check(all(word in mail[0] for word in ("RET=FULL", "ENVID=id+2B1")), f"{mail}")
    check("NOTIFY=SUCCESS,FAILURE" in mail[1].upper(), f"{mail}")
    check(able.messages and not small.messages and not no.messages, "who has it")
    files = [path.read_bytes() for path in customer.files()]
    (one,) = [file for file in files if "u@no.example" in reports(file)]
    whole = email.message_from_bytes(one).get_payload(2)
    check(whole.get_content_type() == "message/rfc822", f"RET=FULL: {whole.get_content_type()}")
    check("all of it" in whole.as_string() and "v@no.example" in reports(one), f"{one!r}")
    (one,) = [file for file in files if "u@plain.example" in reports(file)]
    check(email.message_from_bytes(one).get_payload(1).get_payload(0)["Original-Envelope-Id"] == "id+1", f"{one!r}")

    # A message from outside that the customer rejects permanently: its sender gets a DSN, by the relay.
    customer.config.write_text(customer.config.read_text().replace('"@example.org", "@example.com"', '"eva@example.org"'))
    before = len(plain.messages)
    with Smtp(provider.inbound) as line:
        line.hello()
        reply = line.send("l@plain.example", ["nosuch@example.org", "eva@example.org"], b"Subject: wrong\r\n\r\nx\r\n")
        check(reply.startswith("250"), reply)
        reply = line.send("", ["nosuch@example.org"], b"Subject: of nobody\r\n\r\nx\r\n")
        check(reply.startswith("250"), reply)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wait_until(lambda: len(plain.messages) > before, "a DSN to the sender outside")
    message = plain.messages[before]
    group = reports(message.content)["nosuch@example.org"]
    check(message.sender == "" and message.recipients == ["l@plain.example"], f"{message}")
    check(group["Status"] == "5.1.1" and group["Remote-MTA"] == "dns; mail.example.org", f"{message}")
    time.sleep(0.3)
    check(len(plain.messages) == before + 1, "a DSN about a DSN")
    return f"{len(wanted)} failed, 1 relayed, 1 passed on, 1 to the world"


@scenario("relay-stops", needs=["dnsmasq"])
def relay_stops(box):
    """SIGTERM ends serve soon, while a name server is silent, a host drops SYN, and a host sends no greeting"""
    port = free_port()
    silent_names = box.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    silent_names.bind((LOOPBACK, 0))
    # The backlog is full, so the kernel drops SYNs.
    dropping = box.keep(socket.socket())
    dropping.bind(("127.0.0.3", port))
    dropping.listen(0)
    for _ in range(3):
        knock = box.keep(socket.socket())
        knock.setblocking(False)
        knock.connect_ex(("127.0.0.3", port))
    box.keep(socket.create_server(("127.0.0.4", port)))  # accepts, and sends nothing
    hosts = {"mx-drop.example": "127.0.0.3", "mx-mute.example": "127.0.0.4"}
    mx = {"drop.example": [(1, "mx-drop.example")], "mute.example": [(1, "mx-mute.example")]}
    names = Names(box, mx=mx, hosts=hosts)
    took = []
    for resolver, domain in (
        (f"{LOOPBACK}:{silent_names.getsockname()[1]}", "lookup.example"),
        (names.resolver, "drop.example"),
        (names.resolver, "mute.example"),
    ):
        label = domain.split(".")[0]
        relay = f'[relay]\nresolver = "{resolver}"\nallow-private = true\nport = {port}\n'
        provider = Provider(box, require_tls=False, accounts=RELAYS, name=f"serve-{label}", more=relay).start()
        customer = Customer(box, provider.odmr, tls="none", file=label, more=outgoing_table(box, label))
        send(box, customer, f"u@{domain}")
        check((result := customer.pull()) == 0, f"pull: exit {result}")
        time.sleep(0.3)
        begin = time.monotonic()
        check((result := provider.stop()) == 0, f"{label}: exit {result}")
        seconds = time.monotonic() - begin
        check(seconds < 3, f"{label}: {seconds:.1f} s to end")
        left = [file for part in ("new", "cur") for file in provider.spool.glob(f"outgoing/@all/{part}/*,D={domain},*")]
        check(len(left) == 1, f"{label}: {len(left)} files left")
        took.append(f"{label} {seconds * 1000:.0f} ms")
    return ", ".join(took)
