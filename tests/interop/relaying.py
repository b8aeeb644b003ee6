"""The relay with hosts that have many addresses, and with long queues."""

import threading
import time

from harness import check, events, scenario, wait_until
from routes import MX, all_reports, send, world
from world import House


def dead(first, count):
    """Addresses of loopback without a listener."""
    return [f"127.0.9.{number}" for number in range(first, first + count)]


def received(*houses):
    return sorted(one for house in houses for message in house.messages for one in message.recipients)


@scenario("relay-addresses", needs=["dnsmasq"])
def relay_addresses(box):
    """Many dead addresses before the one that works: of the other family, of a less preferred host, beyond the limit of an attempt"""
    house = House(box, address=MX)
    mapped = [f"::ffff:{address}" for address in dead(1, 20)]
    provider, customer = world(
        box,
        house,
        mx={
            "family.example": [(10, "mx-family.example")],
            "families.example": [(10, "mx-v6.example"), (10, "mx-v4.example")],
            "backup.example": [(10, "mx-dead.example"), (20, "mx-good.example")],
            "many.example": [(number, f"mx{number}.many.example") for number in range(30)],
            "long.example": [(10, "mx-long.example")],
        },
        hosts={
            "mx-family.example": [*mapped, MX],
            "mx-v6.example": mapped,
            "mx-v4.example": MX,
            "mx-dead.example": dead(50, 9),
            "mx-good.example": MX,
            **{f"mx{number}.many.example": dead(100 + number, 1) for number in range(29)},
            "mx29.many.example": MX,
            "mx-long.example": [*dead(150, 20), MX],
        },
    )
    at_once = ["family", "families", "backup", "many"]
    for name in [*at_once, "long"]:
        send(box, customer, f"u@{name}.example")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wanted = sorted(f"u@{name}.example" for name in [*at_once, "long"])
    wait_until(lambda: received(house) == wanted, f"{wanted}; {received(house)}")
    for name in at_once:
        deferred = events(provider.log(), "delivery", to=f"<u@{name}.example>", status="deferred")
        check(not deferred, f"{name}: not in the first attempt: {deferred}")
    deferred = events(provider.log(), "delivery", to="<u@long.example>", status="deferred")
    check(len(deferred) == 2, f"21 addresses, 8 an attempt: {deferred}")
    return f"{len(at_once)} in the first attempt, one in the third"


def eight_bit(box, more):
    """A customer, and a host without 8BITMIME to which the customer has sent 8-bit content."""
    house = House(box, address=MX, keywords=("PIPELINING", "SIZE"))
    hosts = {"mx.eight.example": MX}
    provider, customer = world(box, house, mx={"eight.example": [(10, "mx.eight.example")]}, hosts=hosts, more=more)
    send(box, customer, "u@eight.example", text="Subject: x\n\nGr\u00fc\u00dfe\n")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    return house, customer


@scenario("relay-eight-bit", needs=["dnsmasq"])
def relay_eight_bit(box):
    """8-bit content for a host without 8BITMIME is sent unchanged"""
    house, _ = eight_bit(box, "")
    wait_until(lambda: received(house) == ["u@eight.example"], "the message")
    check(house.messages[0].content.endswith("\r\n\r\nGr\u00fc\u00dfe\r\n".encode()), f"{house.messages[0].content!r}")
    return "sent"


@scenario("relay-eight-bit-bounce", needs=["dnsmasq"])
def relay_eight_bit_bounce(box):
    """8-bit content for a host without 8BITMIME, with without-8bitmime = "bounce": the sender gets a DSN"""
    house, customer = eight_bit(box, 'without-8bitmime = "bounce"\n')
    status = all_reports(customer, ["u@eight.example"])["u@eight.example"]["Status"]
    check(status == "5.6.3" and not house.messages, f"{status}, {house.messages}")
    return f"status {status}"


class Slow(House):
    """Needs some time for each message. `cuts`: the connections, by number, that it closes after some messages."""

    def __init__(self, box, *, pause=0.03, cuts=(), **more):
        self.pause, self.cuts, self.mails, self.threads = pause, cuts, {}, []
        super().__init__(box, **more)

    def rejection(self, verb, line):
        if verb == "MAIL":
            time.sleep(self.pause)
            with self.lock:
                me = threading.get_ident()
                if me not in self.threads:
                    self.threads.append(me)
                self.mails[me] = self.mails.get(me, 0) + 1
                cut = self.threads.index(me) in self.cuts and self.mails[me] > 5
            if cut:
                raise OSError("hangs up")
        return super().rejection(verb, line)


def submit_many(box, customer, domain, count):
    for number in range(count):
        send(box, customer, f"u{number}@{domain}")
    return sorted(f"u{number}@{domain}" for number in range(count))


@scenario("relay-limits", needs=["dnsmasq"])
def relay_limits(box):
    """A host announces LIMITS MAILMAX=7 (RFC 9422): a queue of 40 is sent in six sessions of one attempt, each message once"""
    keywords = ("PIPELINING", "8BITMIME", "SMTPUTF8", "LIMITS MAILMAX=7 RCPTMAX=1000")
    house = House(box, address="127.0.0.3", keywords=keywords)
    provider, customer = world(
        box,
        house,
        mx={"whole.example": [(1, "mx-whole.example")]},
        hosts={"mx-whole.example": "127.0.0.3"},
        more="connections-per-host = 1\n",
    )
    wanted = submit_many(box, customer, "whole.example", 40)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wait_until(lambda: len(received(house)) >= 40, f"{len(received(house))} of 40")
    check(received(house) == wanted, f"not each of them once: {received(house)}")
    sessions = house.connections
    check(6 <= sessions <= 8, f"{sessions} sessions")
    check(not events(provider.log(), "session-lost"), "a session was lost")
    return f"{sessions} sessions"


@scenario("relay-connections", needs=["dnsmasq"])
def relay_connections(box):
    """A long queue is sent over several connections, and one of them is lost within a message: no message is lost or sent twice"""
    houses = {"whole": Slow(box, address="127.0.0.3")}
    port = houses["whole"].port
    houses["first"] = Slow(box, address="127.0.0.4", port=port, cuts=(0,))
    houses["second"] = Slow(box, address="127.0.0.5", port=port, cuts=(1,))
    provider, customer = world(
        box,
        houses["whole"],
        mx={f"{name}.example": [(1, f"mx-{name}.example")] for name in houses},
        hosts={f"mx-{name}.example": f"127.0.0.{last}" for last, name in enumerate(houses, 3)},
        more="connections-per-host = 3\n",
    )
    wanted = {name: submit_many(box, customer, f"{name}.example", 100) for name in houses}
    begin = time.monotonic()
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    for name, house in houses.items():
        wait_until(lambda: len(received(house)) >= 100, f"{name}: {len(received(house))} of 100", seconds=30)
    seconds = time.monotonic() - begin
    time.sleep(1.5)
    for name, house in houses.items():
        check(received(house) == wanted[name], f"{name}: not each of them once: {received(house)}")
        check(2 <= house.most <= 3, f"{name}: {house.most} connections at once")
        left = [file for part in ("new", "cur") for file in provider.spool.glob(f"outgoing/@all/{part}/*,D={name}.example,*")]
        check(not left, f"{name}: left: {left}")
    check(not houses["whole"].errors and all(houses[name].errors for name in ("first", "second")), "who has hung up")
    return f"{[house.most for house in houses.values()]} connections at once, {seconds:.1f} s"


def fair(box, more):
    """A long queue has both connections when mail for another destination arrives that needs one of them."""
    house = Slow(box, address=MX, pause=0.05)
    other = House(box, address="127.0.0.4", port=house.port)
    same = [(1, "mx.example"), (2, "mx2.example")]
    mx = {"dest.example": [(1, "mx.example")], "same.example": same, "else.example": [(1, "mx2.example")]}
    _, customer = world(box, house, mx=mx, hosts={"mx.example": MX, "mx2.example": "127.0.0.4"}, more=more)
    count = len(submit_many(box, customer, "dest.example", 200))
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    wait_until(lambda: house.most == 2, "two connections")
    before = len(received(house))
    send(box, customer, "u@same.example")
    send(box, customer, "u@else.example")
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    found = lambda: {"u@same.example", "u@else.example"} <= set(received(house, other))
    wait_until(found, "mail for other destinations")
    check("u@same.example" in received(house), "a busy host does not lead to a less preferred one")
    after = len(received(house))
    check(after < count, "it has waited for the end of the long queue")
    wait_until(lambda: len(received(house)) == count + 1, "the long queue", seconds=30)
    check(house.most == 2, f"{house.most} connections")
    return f"between number {before} and {after} of {count}"


@scenario("relay-fair-host", needs=["dnsmasq"])
def relay_fair_host(box):
    """A long queue uses all connections to a host: mail for another destination at that host does not wait until the queue is sent"""
    return fair(box, "connections-per-host = 2\n")


@scenario("relay-fair", needs=["dnsmasq"])
def relay_fair(box):
    """A long queue uses all connections: mail for another destination does not wait until the queue is sent"""
    return fair(box, "connections = 2\n")
