"""Customers that reject mail by mistake, and recipients that do not exist, at times that the scenario sets.

What must hold: a customer that rejects all its mail for a day loses none of it, and no sender gets a DSN; after two days they
do; the DSN about an unknown recipient among known ones is not delayed; with a clock that is wrong by years no message bounces.
"""

import contextlib
import re

from clock import HOUR, YEAR, Clock
from harness import Provider, Server, Smtp, angle, check, events, scenario, wait_until

CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
SENDER = "lester@dot.example"


class Rejecting(Server):
    """A customer's server. `mail`, `rcpt` and `content` return the reply to a command or a content, or None for 250."""

    def __init__(self, sock, received, mail=None, rcpt=None, content=None):
        super().__init__(sock, received=received)
        self.replies = {b"MAIL": mail, b"RCPT": rcpt, b"DATA": content}
        self.offered = []

    def serve(self):
        self.say("220 mail.example.org ready to receive email")
        recipients, rejected = [], False
        while (line := self.until(b"\r\n")) is not None:
            verb = line[:4].upper()
            of = self.replies.get(verb) or (lambda *_: None)
            if verb == b"EHLO":
                self.say("250-mail.example.org", "250-PIPELINING", "250 ENHANCEDSTATUSCODES")
            elif verb == b"MAIL":
                recipients, reply = [], of(angle(line))
                rejected = bool(reply)
                self.offered.append(angle(line))
                self.say(reply or "250 2.1.0 ok")
            elif verb == b"RCPT":
                reply = "503 5.5.1 no MAIL" if rejected else of(angle(line))
                recipients += [] if reply else [angle(line)]
                self.say(reply or "250 2.1.5 ok")
            elif verb == b"DATA" and not recipients:
                self.say("554 5.5.1 no valid recipients")
            elif verb == b"DATA":
                self.say("354 go ahead")
                content = self.data()
                reply = of(recipients)
                self.messages += [] if reply else [(recipients, content)]
                self.say(reply or "250 2.6.0 kept")
            elif verb == b"QUIT":
                self.say("221 2.0.0 bye")
                return
            else:
                self.say("250 2.0.0 ok")


class Place:
    """A provider whose clock the scenario sets, and its customer."""

    def __init__(self, box, lines="", **options):
        self.box, self.clock = box, Clock(box)
        # Another mechanism would end the wait.
        accounts = {"acme": f'expire-after = "never"\nsoft-bounce = "2d"\n{lines}'}
        options = {"customers": {"acme": ["example.org", "example.com"], "beta": ["example.edu"]}} | options
        self.provider = Provider(box, require_tls=False, accounts=accounts, **options)
        self.provider.environment = self.clock.environment
        self.provider.start()

    def send(self, *recipients):
        self.send_each([recipients])

    def send_each(self, messages):
        with Smtp(self.provider.inbound) as client:
            client.hello()
            for recipients in messages:
                reply = client.send(SENDER, recipients, CONTENT)
                check(reply.startswith("250"), f"{recipients}: {reply}")

    def rcpt(self, recipient):
        with Smtp(self.provider.inbound) as client:
            client.hello()
            client.want("250", f"MAIL FROM:<{SENDER}>")
            return client.say(f"RCPT TO:<{recipient}>")

    def call(self, **replies):
        """One call of the customer, until the log has the end of the session."""
        ended = len(events(self.provider.log(), "turn-ended"))
        with Smtp(self.provider.odmr) as client:
            client.turn("acme")
            server = Rejecting(client.socket, client.received, **replies)
            server.serve()
        wait_until(lambda: len(events(self.provider.log(), "turn-ended")) > ended, "the end of the session")
        return server

    def dsns(self):
        """The recipients about whom DSNs are in the queue. The relay renames a file after an attempt: then they are read again."""
        listed = lambda: sorted(self.provider.spool.glob("outgoing/@all/[nc]*/*"))
        while True:
            files, found = listed(), []
            with contextlib.suppress(FileNotFoundError):
                for file in files:
                    found += re.findall(r"(?m)^Final-Recipient: rfc822; (\S+)$", file.read_text())
                if files == listed():
                    return sorted(found)

    def waiting(self):
        return len(self.provider.held())

    def warned(self):
        done = self.clock.run("status", "-c", self.provider.config, "--warn", "300d")
        return done.stdout


REJECT_ALL = [
    {"mail": lambda *_: "554 5.7.1 we take nothing from there"},
    {"mail": lambda *_: "550 no"},
    {"rcpt": lambda *_: "550 5.1.1 no such user"},
    {"rcpt": lambda *_: "550 5.1.2 no such domain"},
    {"rcpt": lambda *_: "550 5.2.1 mailbox disabled"},
    {"content": lambda *_: "554 5.3.0 the filter does not answer"},
    {"content": lambda *_: "554 5.4.6 mail loop"},
    {"content": lambda *_: "552 5.2.2 over quota"},
]


@scenario("soft-bounce")
def soft_bounce(box):
    """A customer rejects all its mail in eight ways for a day, each hour, and is then corrected: no message bounces"""
    place = Place(box)
    for number in range(10):
        place.send(f"a{number}@example.org", f"b{number}@example.org")
        place.send(f"c{number}@example.com")
    for hour in range(25):
        place.clock.set(hour * HOUR)
        server = place.call(**REJECT_ALL[hour % len(REJECT_ALL)])
        check(len(server.offered) == 20 and not server.messages, f"hour {hour}: {len(server.offered)} offered")
        check(place.waiting() == 20 and not place.dsns(), f"hour {hour}: {place.waiting()} wait, DSNs about {place.dsns()}")
    wait_until(lambda: len(events(place.provider.log(), "soft-bounced", account="acme", messages="10")) == 50, "the warnings")
    warned = place.warned()
    check("acme: 20 rejected by its server, and deferred, since 1d" in warned, f"--warn: {warned}")
    server = place.call()
    check(sorted(len(recipients) for recipients, _ in server.messages) == [1] * 10 + [2] * 10, f"{server.messages}")
    check(place.waiting() == 0 and not place.dsns(), f"DSNs about {place.dsns()}")
    check(place.warned() == "", place.warned())
    return "20 messages, 26 calls"


@scenario("soft-bounce-is-over")
def soft_bounce_is_over(box):
    """A customer rejects all its mail for two days: the senders get DSNs at the first call after 48 h, and none a minute before"""
    place = Place(box)
    place.send("alice@example.org", "bob@example.org")
    place.send("carol@example.com")
    for offset in (HOUR, 30 * HOUR, 49 * HOUR - 60):
        place.clock.set(offset)
        place.call(rcpt=lambda *_: "550 5.1.1 no such user")
        check(place.waiting() == 2 and not place.dsns(), f"after {offset} s: DSNs about {place.dsns()}")
    # It arrives later, and has its own two days.
    place.send("dave@example.org")
    place.clock.set(49 * HOUR + 60)
    place.call(mail=lambda *_: "554 5.7.1 no")
    check(place.waiting() == 1, f"{place.waiting()} wait")
    check(place.dsns() == ["alice@example.org", "bob@example.org", "carol@example.com"], f"DSNs about {place.dsns()}")
    return "three recipients in two DSNs"


@scenario("soft-bounce-of-others")
def soft_bounce_of_others(box):
    """Of two recipients, one is rejected until it bounces, and the other is deferred: its first rejection after that is a deferral"""
    place = Place(box)
    place.send("alice@example.org", "bob@example.org")
    full, no = "450 4.2.2 full", "550 5.7.1 no"
    for offset, bob, dsns, warned in (
        (HOUR, full, [], True),
        (50 * HOUR, full, ["alice@example.org"], True),
        # No recipient is rejected now, so no administrator need check that server.
        (51 * HOUR, full, ["alice@example.org"], False),
        (52 * HOUR, no, ["alice@example.org"], True),
        (99 * HOUR, no, ["alice@example.org"], True),
        # The DSN about the other recipient has expired by now.
        (101 * HOUR, no, ["alice@example.org", "bob@example.org"], False),
    ):
        place.clock.set(offset)
        place.call(rcpt=lambda address: bob if address.startswith("bob") else no)
        check(place.dsns() == dsns, f"after {offset} s: DSNs about {place.dsns()}")
        check(("rejected by its server" in place.warned()) == warned, f"after {offset} s: {place.warned()!r}")
    return "three days for the other one"


@scenario("unknown-among-known")
def unknown_among_known(box):
    """Unknown recipients before, in and after an accepted message: a DSN about each in the same call, and none about the others"""
    place = Place(box)
    known = {"known@example.org"}
    rcpt = lambda address: None if address in known else "550 5.1.1 no such user"  # noqa: E731
    place.send("before@example.org")
    place.send("known@example.org", "beside@example.org")
    place.send("after@example.org")
    place.send("other@example.com")
    server = place.call(rcpt=rcpt)
    check(len(server.offered) == 4 and len(server.messages) == 1, f"{server.offered}")
    check(place.dsns() == ["after@example.org", "before@example.org", "beside@example.org"], f"DSNs about {place.dsns()}")
    check(place.waiting() == 1, f"{place.waiting()} wait")
    ended = events(place.provider.log(), "turn-ended")[-1]
    check((ended["sent"], ended["rejected"], ended["deferred"]) == ("1", "3", "1"), f"{ended}")
    # The same with many: the next call settles those that the session has no room to store.
    place.send_each([f"u{number}@example.org"] for number in range(1200))
    place.send("known@example.org")
    place.call(rcpt=rcpt)
    place.send("known@example.org")
    place.call(rcpt=rcpt)
    check(place.waiting() == 1, f"{place.waiting()} wait")
    check(len(place.dsns()) == 1203, f"{len(place.dsns())} DSNs")
    return "1,206 messages"


def learned_at(place):
    status = place.clock.run("status", "-c", place.provider.config, "--format", "json").stdout
    return int(re.search(r'"learned_recipients": ?(\d+)', status).group(1))


@scenario("recipients-learned")
def recipients_learned(box):
    """`recipients = "learn"`: after rejections in two calls an hour apart, each listener and process replies 550; a day or a 250 ends that"""
    place = Place(box, 'recipients = "learn"')
    rcpt = lambda address: "550 5.1.1 no such user" if address.lower().startswith("bob") else None  # noqa: E731
    everything = ("alice@example.org", "bob@Example.org")
    for offset, expected in ((0, "250"), (59 * 60, "250"), (2 * HOUR, "550 5.1.1")):
        place.clock.set(offset)
        place.send(*everything)
        place.call(rcpt=rcpt)
        check(place.rcpt("bob@example.org").startswith(expected), f"after {offset} s: {place.rcpt('bob@example.org')}")
    check(learned_at(place) == 1, "the status")
    check(place.rcpt("alice@example.org").startswith("250") and place.rcpt("postmaster@example.org").startswith("250"), "others")
    with Smtp(place.provider.odmr) as client:
        client.hello()
        client.log_in("beta")
        client.want("250", "MAIL FROM:<eve@example.edu>")
        client.want("550 5.1.1", "RCPT TO:<bob@example.org>")
    lines = f"HELO w.example\r\nMAIL FROM:<{SENDER}>\r\nRCPT TO:<bob@EXAMPLE.org>\r\nQUIT\r\n"
    done = place.clock.run("serve", "-c", place.provider.config, "--inetd", "inbound", input=lines)
    check("550 5.1.1" in done.stdout, f"inetd: {done.stdout}")
    # After a restart the provider still rejects it, until a day after the last rejection.
    place.provider.stop()
    place.provider.start()
    place.clock.set(26 * HOUR - 60)
    check(place.rcpt("bob@example.org").startswith("550"), "forgotten too early")
    place.clock.set(26 * HOUR + 60)
    check(place.rcpt("bob@example.org").startswith("250"), "not forgotten")
    for offset in (30 * HOUR, 32 * HOUR):
        place.clock.set(offset)
        place.send(*everything)
        place.call(rcpt=rcpt)
    check(place.rcpt("bob@example.org").startswith("550"), "not learned again")
    # Another agent delivers into the spool, and the mailbox exists now.
    file = place.provider.spool / "domains/example.org/new/1.agent"
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent.parent / "tmp").mkdir(exist_ok=True)
    (file.parent.parent / "cur").mkdir(exist_ok=True)
    file.write_text(f"Return-Path: <{SENDER}>\nDelivered-To: bob@example.org\n\nSubject: hello\n\nHello.\n")
    place.call()
    check(place.rcpt("bob@example.org").startswith("250") and learned_at(place) == 0, "not forgotten at the 250")
    return ""


@scenario("soft-bounce-clock")
def soft_bounce_clock(box):
    """The clock is set forward and back by years, while the customer rejects all mail: no message bounces, and no recipient is learned"""
    place = Place(box, 'recipients = "learn"')
    place.send("alice@example.org")
    place.send("bob@example.org", "carol@example.org")
    for offset in (0, 3 * YEAR, 3 * YEAR + HOUR, HOUR, -YEAR, 2 * HOUR, 10 * YEAR, 3 * HOUR, -20 * YEAR, 4 * HOUR):
        place.clock.set(offset)
        server = place.call(rcpt=lambda *_: "550 5.1.1 no such user")
        check(len(server.offered) == 2, f"at {offset}: {server.offered}")
        check(place.waiting() == 2 and not place.dsns(), f"at {offset}: DSNs about {place.dsns()}")
    for recipient in ("alice", "bob", "carol"):
        check(place.rcpt(f"{recipient}@example.org").startswith("250"), f"{recipient} was learned")
    place.clock.set(5 * HOUR)
    server = place.call()
    check(len(server.messages) == 2 and not place.dsns(), f"{server.messages}")
    return "ten jumps"
