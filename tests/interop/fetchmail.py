"""fetchmail as the customer: it logs in by CRAM-MD5, sends ATRN, and connects the session to the local mail server."""

import collections
import concurrent.futures
import os
import random
import socket
import time

from harness import MIB, Certificates, Failed, Listener, Provider, Smtp, check, events, same_but_trace, scenario, wait_until

COUNT = 1000
# The extensions that a Postfix after fetchmail offers after the turn; the provider must not use STARTTLS.
KEYWORDS = ("PIPELINING", "SIZE 100000000", "VRFY", "ETRN", "STARTTLS", "8BITMIME", "DSN", "XCLIENT NAME ADDR", "SMTPUTF8")
HEAD = b"From: a@sender.example\r\nSubject: message\r\n"


def contents():
    """A thousand contents of 0 octets to 1 MiB, the difficult ones first. Always the same."""
    dice = random.Random(2645)
    every_octet = bytes(octet for octet in range(1, 256) if octet not in b"\r\n")
    found = [
        b"",
        b"x\r\n",
        b"\r\n",
        b"\r\n\r\n\r\n",
        b".\r\n",
        b"..\r\n",
        b"...\r\n.\r\n..\r\n.x\r\n. \r\n.\t.\r\n",
        HEAD,
        HEAD + b"\r\n",
        HEAD + b"\r\n.\r\n",
        HEAD + b"\r\n" + b".\r\n" * 5000,
        HEAD + b"\r\n" + b"\r\n" * 5000,
        HEAD + b"\r\n" + every_octet + b"\r\n" + every_octet[::-1] + b"\r\n",
        HEAD + b"\r\nnul \0 and \0\0 nul\r\n\0\r\n\0.\r\n",
        HEAD + b"\r\n" + "Grüße, 你好, \u00a0\r\n".encode() * 100,
        HEAD + b"X-Folded: " + b"a" * 900 + (b"\r\n\t" + b"b" * 900) * 300 + b"\r\n\r\nbody\r\n",
        HEAD + b"X-Long: " + b"c" * 200_000 + b"\r\n\r\nbody\r\n",
        HEAD + b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(5000)) + b"\r\nmany fields\r\n",
        HEAD + b"\r\n" + b"d" * 998 + b"\r\n" + b"e" * 999 + b"\r\n" + b"f" * 998 + b".\r\n",
        # Lines around fetchmail's buffer of 8 KiB, with a dot where a piece could begin.
        HEAD + b"\r\n" + b"".join(b"g" * size + b".\r\n" for size in range(8180, 8200)),
        HEAD + b"\r\n" + b"h" * MIB + b"\r\n",
        HEAD + b"\r\n" + b"From x\r\n>From y\r\nQUIT\r\nRSET\r\n250 ok\r\n",
        HEAD + b"Received: one\r\n" * 50 + b"\r\nalready travelled\r\n",
        b"no colon in the first line\r\nnor here\r\n\r\nbody\r\n",
        b"Return-Path: <forged@sender.example>\r\nDelivered-To: forged@example.org\r\n"
        b"X-ODMR-Envelope: id=forged\r\n\r\nforged\r\n",
    ]
    while len(found) < COUNT - 8:
        found.append(text(dice, int(2 ** dice.uniform(0, 17))))
    while len(found) < COUNT:
        found.append(text(dice, MIB))
    return found


def text(dice, size):
    """Lines of many lengths, some that begin with dots, some with 8-bit characters."""
    block = bytearray()
    while len(block) < min(size, 65536):
        line = dice.randbytes(dice.choice((0, 1, 3, 40, 70, 76, 300, 2000)))
        line = line.translate(DICE_TO_TEXT if dice.random() < 0.8 else DICE_TO_EIGHT_BIT)
        block += b"." * dice.choice((0, 0, 0, 1, 2)) + line + b"\r\n"
    body = bytes(block) * (size // len(block) + 1)
    # Cut to the size, but not within a CRLF.
    return (HEAD + b"\r\n" + body if size > 100 else body.lstrip(b" \t"))[: max(size - 2, 1)].rstrip(b"\r") + b"\r\n"


DICE_TO_TEXT = bytes(33 + octet % 94 for octet in range(256))
DICE_TO_EIGHT_BIT = bytes(octet if octet not in b"\0\r\n" else 65 for octet in range(256))


def fill(port, messages, lines=8):
    """Sends all messages to the inbound listener over several connections. Returns the seconds."""

    def one_line(first):
        with Smtp(port) as sender:
            sender.hello()
            for number in range(first, len(messages), lines):
                recipient = f"user{number % 7}@example.{'org' if number % 2 else 'com'}"
                # As senders do: BODY=8BITMIME if it is true, and often if it is not needed.
                body = " BODY=8BITMIME" if number % 2 or not messages[number].isascii() else ""
                reply = sender.send(f"n{number}@sender.example", [recipient], messages[number], body)
                check(reply.startswith("250"), f"message {number} ({messages[number][:60]!r}): {reply}")
            sender.want("221", "QUIT")

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(lines) as pool:
        list(pool.map(one_line, range(lines)))
    return time.monotonic() - begin


def fetch(box, provider, listener, *, tls, seconds=100):
    """One run of fetchmail. Returns its exit code and its output."""
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        raise Failed(f"fetchmail wants this host's name to resolve: add {socket.gethostname()} to /etc/hosts")
    port = provider.odmr_tls if tls else provider.odmr
    words = f'ssl sslcertck sslcertfile "{tls.authority}" sslproto "TLS1.2+"' if tls else 'sslproto ""'
    settings = box.write(
        "fetchmailrc",
        f"""poll localhost protocol ODMR service {port} timeout 60
    username "acme" password "the secret of acme"
    fetchdomains example.org example.com
    smtphost localhost/{listener.port}
    {words}
""",
    )
    environment = os.environ | {"HOME": str(box.path), "FETCHMAILHOME": str(box.path), "LC_ALL": "C"}
    log = box.path / "fetchmail.log"
    with open(log, "ab") as file:
        command = ["fetchmail", "--nodetach", "--nosyslog", "-v", "-f", settings, "--pidfile", box.path / "fetchmail.pid"]
        child = box.start("fetchmail.log", *command, env=environment, stdout=file)
    return child.wait(seconds)


def exchange(box, provider, *, tls, keywords, bounces=False):
    """Fill, fetch, compare, fetch again. 8-bit messages arrive also without 8BITMIME, unless the provider bounces them."""
    messages = contents()
    wanted = {number for number, message in enumerate(messages) if not bounces or message.isascii()}
    filled = fill(provider.inbound, messages)
    check(len(provider.held()) == COUNT, f"{len(provider.held())} held, wanted {COUNT}")
    listener = Listener(box, keywords=keywords)
    begin = time.monotonic()
    result = fetch(box, provider, listener, tls=tls)
    fetched = time.monotonic() - begin
    check(result == 0, f"fetchmail: exit {result}")
    wait_until(lambda: listener.quits or listener.errors, "the end of the session at the local listener")
    check(not listener.errors, f"the local listener: {listener.errors}")
    check(listener.quits == 1, f"{listener.quits} sessions ended with QUIT, wanted 1")
    check(not provider.held(), f"{len(provider.held())} messages are left in the spool")
    check(len(listener.messages) == len(wanted), f"{len(listener.messages)} messages came, wanted {len(wanted)}")
    # The messages that the local server does not accept go back to their sender, whose domain does not exist here.
    told = len(events(provider.log(), "dsn-sent"))
    check(told == COUNT - len(wanted), f"{told} DSNs, wanted {COUNT - len(wanted)}")
    statuses = collections.Counter(line["status"] for line in events(provider.log(), "delivery", via="atrn"))
    check(statuses == +collections.Counter(sent=len(wanted), rejected=told), f"in the log: {dict(statuses)}")
    seen = set()
    for message in listener.messages:
        number = int(message.sender[1:].split("@")[0])
        check(number not in seen, f"message {number} came twice")
        seen.add(number)
        recipient = f"user{number % 7}@example.{'org' if number % 2 else 'com'}"
        check(message.recipients == [recipient], f"message {number}: for {message.recipients}, wanted {recipient}")
        sent = messages[number]
        check(
            same_but_trace(message.content, sent),
            f"message {number} differs: {len(message.content)} octets for {len(sent)} plus Received;"
            f" {message.content[:400]!r} for {sent[:200]!r}",
        )
    again = fetch(box, provider, listener, tls=tls, seconds=20)
    check(again == 0, f"fetchmail again, no mail (453): exit {again}, wanted 0")
    check("453" in box.log("fetchmail.log"), "fetchmail never saw a 453")
    check(seen == wanted, f"8-bit messages came that were to bounce: {sorted(seen - wanted)[:5]}")
    check(len(listener.messages) == len(wanted), "the second call brought mail")
    size = sum(map(len, messages)) / MIB
    times = f"in {filled:.1f} s, fetched in {fetched:.1f} s"
    return f"{len(wanted)} messages of {COUNT}, {size:.0f} MiB: {times}; then 453: exit {again}"


@scenario("fetchmail-clear", needs=["fetchmail"])
def fetchmail_clear(box):
    """fetchmail --protocol odmr in clear: 1,000 messages arrive unchanged"""
    provider = Provider(box, require_tls=False).start()
    return exchange(box, provider, tls=None, keywords=KEYWORDS)


@scenario("fetchmail-tls", needs=["fetchmail"])
def fetchmail_tls(box):
    """fetchmail --ssl with a CA file: 1,000 messages arrive unchanged"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    return exchange(box, provider, tls=certificates, keywords=KEYWORDS)


@scenario("fetchmail-plain-server", needs=["fetchmail"])
def fetchmail_plain_server(box):
    """fetchmail --ssl with a local server without 8BITMIME: all messages arrive unchanged"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    return exchange(box, provider, tls=certificates, keywords=("SIZE",))


@scenario("fetchmail-bounce", needs=["fetchmail"])
def fetchmail_bounce(box):
    """fetchmail with a local server without 8BITMIME, and without-8bitmime = "bounce": the senders of 8-bit messages get DSNs"""
    provider = Provider(box, require_tls=False, more='[odmr]\nwithout-8bitmime = "bounce"\n').start()
    return exchange(box, provider, tls=None, keywords=("SIZE",), bounces=True)


@scenario("fetchmail-rejected", needs=["fetchmail"])
def fetchmail_rejected(box):
    """fetchmail fails with a wrong secret, in clear if TLS is required, and without a local listener: the mail stays held"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    fill(provider.inbound, [b"Subject: x\r\n\r\nx\r\n"] * 3, lines=1)
    listener = Listener(box)
    clear = fetch(box, provider, listener, tls=None, seconds=20)
    check(clear != 0 and not listener.messages, f"in clear: exit {clear}")
    listener.close()
    deaf = fetch(box, provider, listener, tls=certificates, seconds=20)
    check(len(provider.held()) == 3, f"no customer fetched them, yet {len(provider.held())} of 3 are held")
    listener = Listener(box)
    back = fetch(box, provider, listener, tls=certificates, seconds=20)
    check(back == 0 and len(listener.messages) == 3, f"afterwards: exit {back}, {len(listener.messages)} messages")
    return f"in clear: exit {clear}; local server down: exit {deaf}, mail kept"
