"""The customer hands mail over to a real Postfix, and to hops that reject mail, are down, or are killed."""

import collections
import os
import pathlib
import random
import re
import threading

from dovecot import ALICE, BOB, ELSEWHERE, MESSAGES, NOBODY, Dovecot, same_after_trace, homes
from harness import LOOPBACK, Customer, Provider, Smtp, at_rest, check, events, field, free_port, scenario, wait_until
from hop import Hop, start_hop
from postfix import UID, Postfix
from turning import SENDER, Turning
from world import RELAYS, House, Names, outgoing_table, queued, sendmail

BERT, CAROL = "bert@example.org", "carol@example.org"
MANY, KILLS = 500, 20
HANDOVER = ".handover"  # below the root: mail that a next hop has not accepted yet


def receive(provider, messages, source=None):
    """A client sends these messages to the provider: (recipients, content) each."""
    with Smtp(provider.inbound, source=source) as line:
        line.hello()
        for recipients, content in messages:
            check((reply := line.send(SENDER, recipients, content)).startswith("250"), reply)


def fill(provider, count, *recipients):
    """Puts numbered messages into the held Maildir of a domain, as another delivery agent would."""
    directory = provider.spool / "domains" / recipients[0].split("@")[1]
    envelope = f"Return-Path: <{SENDER}>\n" + "".join(f"Delivered-To: {recipient}\n" for recipient in recipients)
    for part in ("tmp", "new", "cur"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        text = f"{envelope}Subject: {number}\n\n" + f"{number}\n" * 300
        draft = directory / "tmp" / f"1767323045.N{number}.fill"
        draft.write_text(text)
        draft.rename(directory / "new" / draft.name)


def calls(customer, provider, *, at_most, between=None):
    """Calls until the provider holds no mail; runs `between` after each call. Returns the exit codes."""
    codes = []
    while provider.held():
        check(len(codes) < at_most, f"{len(provider.held())} messages are still held after calls that ended with {codes}")
        codes.append(customer.pull())
        check(codes[-1] in (0, 75), f"pull: exit {codes[-1]}")
        if between:
            between()
    return codes


def left_over(customer):
    """The files of messages that wait for their next hop."""
    return [file for file in (customer.root / HANDOVER).rglob("*") if file.is_file() and file.parent.name in ("new", "cur")]


def due(customer):
    """Makes all mail for next hops due: the time of the next attempt is that of the file."""
    for file in left_over(customer):
        os.utime(file)


def being_tried(customer):
    """Whether a process has locked the retry queue. (A lock taken here would disturb that process.)"""
    inode = (customer.root / HANDOVER / "odmr.lock").stat().st_ino
    return any(line.split()[5].endswith(f":{inode}") for line in pathlib.Path("/proc/locks").read_text().splitlines())


def once_each(numbers, count):
    seen = collections.Counter(numbers)
    lost = [number for number in range(count) if number not in seen]
    twice = {number: times for number, times in seen.items() if times > 1}
    check(not lost, f"{len(lost)} lost: {lost[:10]}")
    return sum(twice.values()) - len(twice)


def served_postfix(box, ports):
    """A Postfix that accepts mail for alice and bob at three ports: with XCLIENT, with XFORWARD, with neither."""
    boxes = box.path / "boxes"
    boxes.mkdir()
    os.chown(boxes, UID, UID)
    (box.path / "postfix").mkdir(exist_ok=True)
    box.write("postfix/boxes", f"{ALICE} alice/\n{BOB} bob/\n", mode=0o644)
    options = {
        "xclient": f"-o smtpd_authorized_xclient_hosts={LOOPBACK}",
        "xforward": f"-o smtpd_authorized_xforward_hosts={LOOPBACK}",
        "neither": "",
    }
    services = "".join(
        f"{LOOPBACK}:{port} inet n - n - - smtpd -o syslog_name=postfix/{name} {options[name]}\n"
        for name, port in ports.items()
    )
    Postfix(
        box,
        f"""virtual_mailbox_domains = example.org, example.com
virtual_mailbox_base = {boxes}
virtual_mailbox_maps = texthash:{box.path}/postfix/boxes
virtual_uid_maps = static:{UID}
virtual_gid_maps = static:{UID}
virtual_minimum_uid = 100
message_size_limit = 20000000
local_header_rewrite_clients =
smtpd_recipient_restrictions = reject_unauth_destination""",
        services=services,
    )
    return boxes


@scenario("postfix-handover", needs=["postfix"], root=True)
def postfix_handover(box):
    """Postfix as the next hop over SMTP: the provider gets 550 at RCPT for an unknown user; XCLIENT or XFORWARD transmit the client of the mail"""
    ports = {name: free_port() for name in ("xclient", "xforward", "neither")}
    boxes = served_postfix(box, ports)
    files = lambda name: [file.read_bytes() for file in boxes.glob(f"{name}/new/*")]
    provider = Provider(box, require_tls=False).start()
    facts = []
    for turn, (name, port) in enumerate(ports.items(), 1):
        receive(provider, [([ALICE, NOBODY, BOB], content) for content in MESSAGES], source=ELSEWHERE)
        customer = Customer(box, provider.odmr, tls="none", file=name, more=f'deliver = "smtp:{LOOPBACK}:{port}"\n')
        check((result := customer.pull()) == 0, f"{name}: pull: exit {result}")
        check(not provider.held(), f"{name}: {len(provider.held())} files are left with the provider")
        rejected = events(provider.log(), "delivery", via="atrn", status="rejected")
        replies = [(line["to"], line["reply"][:4]) for line in rejected]
        check(replies == [(f"<{NOBODY}>", "550 ")] * len(MESSAGES) * turn, f"{name}: {rejected}")
        log = lambda: box.log("postfix.log")
        wait_until(lambda: log().count("delivered to maildir") == 2 * turn * len(MESSAGES), f"{name}: messages in Maildirs")
        for user in ("alice", "bob"):
            for content in MESSAGES:
                times = sum(postfix_kept(file, content) for file in files(user))
                check(times == turn, f"{name}: {user} has it {times} times: {content[:60]!r}")
        clients = re.findall(rf"postfix/{name}/smtpd\[\d+\]: \w+: (client=.*)", log())
        wanted = {"xclient": f"client=.*\\[{ELSEWHERE}\\]", "xforward": f".*orig_client=.*\\[{ELSEWHERE}\\]", "neither": ".*"}
        told = [client for client in clients if re.fullmatch(wanted[name], client)]
        check(len(told) >= len(MESSAGES), f"{name}: the log of Postfix has {clients}")
        check(name != "neither" or set(told) == {f"client=localhost[{LOOPBACK}]"}, f"{name}: {told}")
        facts.append(f"{name}: {told[-1]}")
    return "; ".join(facts)


def postfix_kept(file, content):
    """As `same_after_trace`, but Postfix adds X-Original-To, and is not an LMTP server."""
    return same_after_trace(re.sub(rb"(?m)^X-Original-To: .*\n", b"", file, count=1), content)


@scenario("hop-killed")
def hop_killed(box):
    """The next hop kills itself within two of 500 contents: each message arrives exactly once"""
    provider = Provider(box, require_tls=False)
    fill(provider, MANY, ALICE)
    provider.start()
    taken, path = box.path / "taken", box.path / "hop.sock"
    taken.mkdir()
    customer = Customer(box, provider.odmr, tls="none", more=f'deliver = "lmtp:{path}"\n')
    deaths = [120, 333]
    hops = [start_hop(box, path, taken, deaths.pop(0))]

    def revive():
        if hops[-1].poll() is not None:
            hops.append(start_hop(box, path, taken, deaths.pop(0) if deaths else None))

    codes = calls(customer, provider, at_most=12, between=revive)
    check(len(hops) == 3, f"the hop died {len(hops) - 1} times")
    check(not left_over(customer), f"wait for the hop: {left_over(customer)}")
    messages = [file.read_bytes().split(b"\n", 1) for file in taken.glob("*.eml")]
    check(all(envelope == f"{SENDER} {ALICE}".encode() for envelope, _ in messages), f"{[one for one, _ in messages][:3]}")
    numbers = [whole_message(at_rest(content)) for _, content in messages]
    check(once_each(numbers, MANY) == 0, f"twice: {[one for one, times in collections.Counter(numbers).items() if times > 1]}")
    return f"{MANY} messages, 2 deaths, calls ended with {codes}"


def whole_message(file):
    """The number of one of the numbered messages, which must be complete."""
    number = int(field(file, "Subject"))
    check(file.endswith(f"\n\n{number}\n".encode() + f"{number}\n".encode() * 299), f"message {number} came cut: {file[-60:]!r}")
    return number


@scenario("hop-killed-dovecot", needs=["dovecot", "doveadm"], root=True)
def hop_killed_dovecot(box):
    """Dovecot as the next hop is killed twice (SIGKILL) while it receives 500 messages: none is lost"""
    provider = Provider(box, require_tls=False)
    fill(provider, MANY, ALICE)
    provider.start()
    dovecot = Dovecot(box, homes(box, ALICE)).start()
    customer = Customer(box, provider.odmr, tls="none", more=f'deliver = "lmtp:{dovecot.socket}"\n')
    new = box.path / "homes" / ALICE / "Maildir/new"
    arrived = lambda: len(list(new.glob("*")))
    codes = []
    for goal in (MANY // 8, MANY // 4):
        call = customer.start()
        wait_until(lambda: arrived() >= goal or call.poll() is not None, f"{goal} messages", seconds=20, pause=0.002)
        dovecot.kill()
        codes.append(call.wait(30))
        check(arrived() < MANY, "it was too late to kill anything")
        dovecot.start()
    codes += calls(customer, provider, at_most=12)
    check(not left_over(customer), f"wait for the hop: {left_over(customer)}")
    numbers = [whole_message(text) for (text,) in dovecot.fetch(ALICE, "text")]
    twice = once_each(numbers, MANY)
    # A hop that is killed after it has stored a message and before its reply gets that message again: at most one for each kill.
    check(twice <= 2, f"{twice} messages came twice")
    return f"{MANY} messages, 2 kills, {twice} twice, calls ended with {codes}"


class MoodyHop(Hop):
    """Defers now and then, for one recipient and not for the other: at RCPT and after the content, equally often."""

    def __init__(self, dice, *, at_rcpt, after):
        super().__init__()
        self.dice, self.moody = dice, True
        self.at_rcpt, self.after = at_rcpt, after

    def next(self, replies, recipient):
        chance = self.at_rcpt if replies is self.at_recipient else self.after
        return "452 4.2.2 not now" if self.moody and self.dice.random() < chance else None


@scenario("handover-kills")
def handover_kills(box):
    """A customer that hands mail over is killed at 20 random moments, and the hop defers one recipient of three with 452: no message is lost"""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(1_000_000)))
    print(f"   handover-kills: seed {seed} (SEED={seed} repeats the dice)", flush=True)
    dice = random.Random(seed)
    provider = Provider(box, require_tls=False)
    three = (ALICE, BERT, CAROL)
    fill(provider, MANY, *three)
    provider.start()
    hop = MoodyHop(random.Random(seed + 1), at_rcpt=0.1, after=0.2).start(box)
    customer = Customer(box, provider.odmr, tls="none", more=f'deliver = "{hop.address}"\n')
    killed = 0
    while provider.held() and killed < KILLS:
        call = customer.start()
        goal = len(hop.messages) + dice.randrange(2 * len(three) * MANY // KILLS)
        wait_until(lambda: len(hop.messages) >= goal or call.poll() is not None, "messages at the hop", pause=0.001)
        killed += call.poll() is None
        call.kill()
        call.wait()
        box.children.remove(call)
    hop.moody = False

    def dust_settled():
        due(customer)
        check((result := customer.pull()) in (0, 75), f"pull: exit {result}")
        return not provider.held() and not left_over(customer)

    wait_until(dust_settled, "all mail to be handed over", seconds=30)
    arrived = collections.Counter((whole_message(at_rest(content)), recipient) for _, recipient, content in hop.messages)
    lost = [(number, one) for number in range(MANY) for one in three if not arrived[number, one]]
    facts = f"seed {seed}: {killed} kills, {sum(arrived.values()) - len(arrived)} of {3 * MANY} twice, {len(lost)} lost"
    check(not lost, f"{facts}: {lost[:10]}")
    check(killed >= 5, f"hardly any kills: {facts}")
    return facts


@scenario("lmtp-mixed", needs=["dnsmasq"])
def lmtp_mixed(box):
    """The hop replies 250, 452 and 550 to one content: the provider gets one 250, the next call delivers the second, and a DSN reports the third"""
    house = House(box)
    names = Names(box, mx={"sender.example": [(10, "mx.dest.example")]}, hosts={"mx.dest.example": LOOPBACK})
    relay = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {house.port}\n'
    provider = Provider(box, require_tls=False, accounts=RELAYS, more=relay).start()
    rejections = {BERT: ["452 4.2.2 mailbox full"], CAROL: ["550 5.2.0 not of that kind"]}
    hop = Hop(box.path / "hop.sock", after_content=rejections).start(box)
    customer = Customer(box, provider.odmr, tls="none", more=f'deliver = "{hop.address}"\n' + outgoing_table(box))
    receive(provider, [([ALICE, BERT, CAROL], MESSAGES[1])])
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not provider.held(), "the provider still holds it")
    attempts = events(provider.log(), "delivery", via="atrn")
    seen = sorted((attempt["to"], attempt["status"]) for attempt in attempts)
    check(seen == [(f"<{one}>", "sent") for one in (ALICE, BERT, CAROL)], f"the provider saw {attempts}")
    check(hop.count(ALICE) == 1 and hop.count(BERT) == 0, f"{hop.messages}")
    check(len(left_over(customer)) == 1, f"wait for the hop: {left_over(customer)}")
    due(customer)
    check((result := customer.pull()) == 0, f"second pull: exit {result}")
    check(hop.count(ALICE) == 1 and hop.count(BERT) == 1 and hop.count(CAROL) == 0, f"{hop.messages}")
    check(all(same_after_trace(at_rest(content), MESSAGES[1]) for *_, content in hop.messages), f"{hop.messages}")
    check(not left_over(customer), f"wait for the hop: {left_over(customer)}")
    wait_until(lambda: house.messages, "the DSN")
    (dsn,) = house.messages
    check(dsn.sender == "" and dsn.recipients == [SENDER], f"{dsn}")
    for word in (CAROL.encode(), b"550 5.2.0", b"not of that kind"):
        check(word in dsn.content, f"no {word!r} in {dsn.content!r}")
    for word in (ALICE.encode() + b"\r\n", BERT.encode() + b"\r\n"):
        check(b"Final-Recipient: rfc822;" + word not in dsn.content.replace(b"; ", b";"), f"{dsn.content!r}")
    return "250: once; 452: once, by a later call; 550: a DSN"


@scenario("handover-to-two")
def handover_to_two(box):
    """A message for a next hop and for a Maildir that is full: the hop gets it once, and the Maildir gets it when it has room"""
    provider = Provider(box, require_tls=False).start()
    hop = Hop(box.path / "hop.sock").start(box)
    more = f'[mailboxes.deliver]\n"{ALICE}" = "{hop.address}"\n'
    customer = Customer(box, provider.odmr, tls="none", accept=[ALICE, BERT, CAROL], more=more)
    maildirs = {name: customer.root / "example.org" / name for name in ("bert", "carol")}
    for maildir in maildirs.values():
        for part in ("tmp", "new", "cur"):
            (maildir / part).mkdir(parents=True)
    limits = maildirs["bert"] / "maildirsize"
    limits.write_text("100S\n0 0\n")
    (maildirs["carol"] / "new").rmdir()
    (maildirs["carol"] / "new").write_text("in the way")
    receive(provider, [([ALICE, BERT], MESSAGES[0]), ([ALICE, CAROL], MESSAGES[1])])
    for _ in range(3):
        due(customer)
        # Bert's quota has no room, so his mail stays with the provider.
        check((result := customer.pull()) == 75, f"pull: exit {result}")
    check(hop.count(ALICE) == 2, f"the hop was given 2 messages {hop.count(ALICE)} times")
    limits.write_text("100000S\n0 0\n")
    (maildirs["carol"] / "new").unlink()
    (maildirs["carol"] / "new").mkdir()
    due(customer)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not provider.held() and not left_over(customer), f"wait: {provider.held()} {left_over(customer)}")
    check(hop.count(ALICE) == 2, f"the hop was given 2 messages {hop.count(ALICE)} times")
    for (name, maildir), content in zip(maildirs.items(), MESSAGES):
        texts = [file.read_bytes() for file in maildir.glob("new/*")]
        check(len(texts) == 1 and same_after_trace(texts[0], content), f"{name} has {texts}")


class SlowHop(Hop):
    """Accepts a content, and replies when the test permits it."""

    def __init__(self, path):
        super().__init__(path)
        self.taken, self.told = threading.Event(), threading.Event()

    def take(self, sender, recipients, content):
        super().take(sender, recipients, content)
        self.taken.set()
        self.told.wait(20)


@scenario("hop-slow")
def hop_slow(box):
    """SIGTERM while the hop has a content and has not replied: the customer waits for the reply, and no message is delivered twice"""
    provider = Provider(box, require_tls=False).start()
    hop = SlowHop(box.path / "hop.sock").start(box)
    customer = Customer(box, provider.odmr, tls="none", more=f'deliver = "{hop.address}"\n')
    receive(provider, [([ALICE], MESSAGES[0])])
    call = customer.start()
    check(hop.taken.wait(10), "no content came to the hop")
    call.terminate()
    wait_until(lambda: signalled(call), "the delivery of the signal")
    check(call.poll() is None, f"it ended with {call.returncode} and did not wait")
    hop.told.set()
    call.wait(10)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not provider.held(), f"{len(provider.held())} files are held")
    check(hop.count(ALICE) == 1, f"it came {hop.count(ALICE)} times")


class HesitantHop(Hop):
    """Delays the reply to every second recipient until the test permits it."""

    def __init__(self, path):
        super().__init__(path)
        self.asked, self.asked_twice, self.told = 0, threading.Event(), threading.Event()

    def next(self, replies, recipient):
        if replies is self.at_recipient:
            self.asked += 1
            if self.asked == 2:
                self.asked_twice.set()
                self.told.wait(20)
        return super().next(replies, recipient)


@scenario("hop-hesitates")
def hop_hesitates(box):
    """While the hop delays its reply to a RCPT of the next message, the provider already has the 250 for the last message"""
    provider = Turning(box, mail=True)
    hop = HesitantHop(box.path / "hop.sock").start(box)
    customer = Customer(box, provider.port, tls="none", more=f'deliver = "{hop.address}"\n')
    call = customer.start()
    line = provider.line()
    group = f"MAIL FROM:<{SENDER}>\r\nRCPT TO:<{ALICE}>\r\nBDAT {len(MESSAGES[0])} LAST\r\n".encode() + MESSAGES[0]
    line.socket.sendall(group * 2)
    check(hop.asked_twice.wait(10), "the hop was not asked about the second message")
    line.socket.settimeout(5)
    for _ in range(3):
        line.want("250")
    check(hop.count(ALICE) == 1, f"{hop.messages}")
    hop.told.set()
    for _ in range(3):
        line.want("250")
    line.leave()
    check((result := call.wait(10)) == 0, f"pull: exit {result}")


def signalled(process):
    """Whether no signal is pending for a process."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    pending = re.findall(r"(?m)^(?:SigPnd|ShdPnd):\s*(\w+)", status.read_text()) if status.exists() else []
    return not any(int(one, 16) for one in pending)


@scenario("hop-rejects")
def hop_rejects(box):
    """The hop rejects a message over its SIZE, and one after the content: the provider gets these replies, and the other messages arrive"""
    provider = Provider(box, require_tls=False).start()
    rejections = {BERT: ["554 5.7.1 looks like spam"]}
    hop = Hop(lmtp=False, after_content=rejections, size=2000).start(box)
    customer = Customer(box, provider.odmr, tls="none", more=f'deliver = "{hop.address}"\n')
    receive(provider, [([ALICE], MESSAGES[6]), ([BERT], MESSAGES[0]), ([ALICE], MESSAGES[1])])
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not provider.held(), f"{len(provider.held())} files are held")
    rejected = events(provider.log(), "delivery", via="atrn", status="rejected")
    seen = {(line["to"], line["reply"][:10]) for line in rejected}
    check(seen == {(f"<{ALICE}>", "550 5.3.4 "), (f"<{BERT}>", "554 5.7.1 ")}, f"the provider saw {rejected}")
    check([(one, at_rest(content)[-20:]) for _, one, content in hop.messages] == [(ALICE, at_rest(MESSAGES[1])[-20:])], f"{hop.messages}")
    for word in (ALICE, BERT, "5.3.4", "looks like spam"):
        check(word in customer.log(), f"the summary has no {word!r}: {customer.log()}")


@scenario("handover-local")
def handover_local(box):
    """Mail of the customer's own users for mailboxes at the next hop: the next call delivers it; for unknown recipients there is a DSN"""
    provider = Provider(box, require_tls=False, accounts=RELAYS).start()
    path = box.path / "hop.sock"
    more = f'deliver = "lmtp:{path}"\n' + outgoing_table(box)
    customer = Customer(box, provider.odmr, tls="none", accept=["@example.org"], more=more)
    for recipient in (ALICE, NOBODY):
        done = sendmail(box, customer, "-f", CAROL, recipient, text="Subject: local\n\nx\n")
        check(done.returncode == 0 and not done.stderr, f"sendmail: exit {done.returncode}: {done.stderr}")
    check((result := customer.pull()) == 0, f"pull while the hop is down: exit {result}")
    check(len(left_over(customer)) == 2, f"while the hop is down: {left_over(customer)}")
    hop = Hop(path, at_recipient={NOBODY: ["550 5.1.1 no such user"]}).start(box)
    for _ in range(2):  # the DSN is a message for the hop, too
        due(customer)
        check((result := customer.pull()) == 0, f"pull: exit {result}")
    check([one[:2] for one in hop.messages] == [(CAROL, ALICE), ("", CAROL)], f"{hop.messages}")
    check(b"no such user" in hop.messages[-1][2], f"{hop.messages[-1]}")
    check(not left_over(customer), f"{left_over(customer)}")
    check(not queued(customer), "mail for our own was queued for the provider")


@scenario("hop-down")
def hop_down(box):
    """The next hop is down: the provider gets 451 at RCPT and holds the mail until the hop is up"""
    provider = Provider(box, require_tls=False).start()
    receive(provider, [([ALICE], content) for content in MESSAGES])
    path = box.path / "hop.sock"
    customer = Customer(box, provider.odmr, tls="none", more=f'deliver = "lmtp:{path}"\n')
    down = customer.pull()
    check(down == 75, f"pull while the hop is down: exit {down}")
    check(len(provider.held()) == len(MESSAGES), f"{len(provider.held())} files are held")
    replies = {line["reply"][:10] for line in events(provider.log(), "delivery", via="atrn", status="deferred")}
    check(replies == {"451 4.4.1 "}, f"the provider saw {replies}")
    hop = Hop(path).start(box)
    check((result := customer.pull()) == 0, f"pull with the hop up: exit {result}")
    check(not provider.held(), f"{len(provider.held())} files are held")
    contents = [at_rest(content) for *_, content in hop.messages]
    check(len(contents) == len(MESSAGES), f"{len(contents)} messages came")
    check(all(any(same_after_trace(got, sent) for got in contents) for sent in MESSAGES), "not the messages that were sent")
    return f"exit {down} while it is down"
