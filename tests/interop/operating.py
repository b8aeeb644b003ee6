"""The work of an administrator: the status of a hundred thousand messages, JSON and metrics for other programs, a move.

What must hold: status commands are fast and change nothing; their output is valid for other programs; a domain that is moved to
another spool has the same octets and envelopes there.
"""

import json
import os
import resource
import time

from harness import ODMR, Customer, Provider, Smtp, at_rest, check, program_path, scenario, stuffed

DOMAINS = 1000
EACH = 100
SLOW = 10.0  # seconds: an idle machine needs half of one
MANY = 800
ALL = {f"a{number}": [f"d{number}.example"] for number in range(DOMAINS)}


def fill(provider, now):
    """Every other message is ours; the others are from another agent, without `S=` in their names."""
    for number in range(DOMAINS):
        domain = f"d{number}.example"
        maildir = provider.spool / "domains" / domain
        for part in ("tmp", "new", "cur"):
            (maildir / part).mkdir(parents=True)
        for message in range(EACH):
            arrived = now - 60 * message
            content = f"Received: from w.example by relay.example.net id x{number}-{message}; now\nSubject: x\n\n" + "line\n" * 20
            lines = f"Return-Path: <bob@w.example>\nDelivered-To: alice@{domain}\n"
            name = f"{arrived}.V1I{message}.host"
            if message % 2:
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(arrived))
                lines += f"Delivered-To: eva@{domain}\nX-ODMR-Envelope: id=x{number}-{message}; arrived={stamp}; body=8BITMIME\n"
                text = lines + content
                name += f",S={len(text)},W={len(text) + text.count(chr(10))},O={arrived},A=2,L=450_4.2.1_full"
            (maildir / "new" / name).write_text(lines + content)


def fastest(box, *command):
    """The output, and the least time of several runs: wall clock, and processor."""
    clock, processor = [], []
    for _ in range(5):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = box.run(ODMR, *command)
        clock.append(time.monotonic() - begin)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        check(done.returncode == 0, f"{command[0]}: {done.stderr}")
    return done.stdout, min(clock), min(processor)


@scenario("status-many")
def status_many(box):
    """status and queue list are fast with 100,000 messages in 1,000 domains, half of them from another agent"""
    provider = Provider(box, require_tls=False, customers=ALL)
    fill(provider, int(time.time()))
    facts = []
    for words in (["status"], ["status", "--format", "json", "--by", "domain"], ["queue", "list"]):
        output, clock, processor = fastest(box, words[0], "-c", provider.config, *words[1:])
        check(min(clock, processor) < SLOW, f"{' '.join(words)}: {clock:.2f} s, {processor:.2f} s of the processor")
        facts.append(f"{' '.join(words[:2])} {clock:.2f} s")
        if words[0] == "queue":
            check(len(output.splitlines()) == DOMAINS * EACH, f"{len(output.splitlines())} lines")
        elif "json" in words:
            status = json.loads(output)
            total = sum(account["messages"] for account in status["accounts"])
            check(total == DOMAINS * EACH, f"{total} messages")
            files = sum(file.stat().st_size for file in provider.held())
            check(sum(account["bytes"] for account in status["accounts"]) == files, "the sizes differ from those of the files")
    return ", ".join(facts)


def messages(spool):
    """The content of each file of a spool, without the lines that name its other copies, sorted."""
    return sorted(file.read_bytes() for file in spool.glob("domains/*/*/*") if file.is_file())


@scenario("status-formats")
def status_formats(box):
    """json.tool and promtool accept the status of both sides, with awkward names and replies, also after calls that failed"""
    provider = Provider(box, require_tls=False).start()
    customer = Customer(box, provider.odmr, tls="none")
    with Smtp(provider.inbound) as client:
        client.hello()
        check(client.send("bob@w.example", ["alice@example.org"], b"Subject: x\r\n\r\nx\r\n").startswith("250"), "not accepted")
    check(customer.pull() == 0, "the call failed")
    odd = provider.spool / "domains/example.org/new" / '1763607845.x,A=1,L=450_"_\\_é'
    odd.write_text("Return-Path: <>\nDelivered-To: alice@example.org\n\nx\n")
    provider.stop()
    check(customer.pull() == 69, "the second call did not fail")
    promtool = program_path("promtool")
    for side in (provider, customer):
        done = box.run(ODMR, "status", "-c", side.config, "--format", "json")
        check(box.run("python3", "-m", "json.tool", input=done.stdout).returncode == 0, f"json.tool: {done.stdout}")
        check('"calls": ' in done.stdout, f"no call is known: {done.stdout}")
        for more in ([], ["--by", "domain"])[: 2 if side is provider else 1]:
            metrics = box.run(ODMR, "status", "-c", side.config, "--format", "prometheus", *more).stdout
            if promtool:
                checked = box.run(promtool, "check", "metrics", input=metrics)
                complaint = checked.stdout + checked.stderr
                check(checked.returncode == 0 and not complaint.strip(), f"promtool: {complaint}")
    return "promtool check metrics" if promtool else "without promtool (apt: prometheus)"


ENVELOPES = [
    ("MAIL FROM:<bob@w.example> BODY=8BITMIME RET=HDRS ENVID=a+2Bb", "NOTIFY=SUCCESS,DELAY ORCPT=rfc822;old@w.example"),
    ("MAIL FROM:<> BODY=7BIT", "NOTIFY=NEVER"),
    ("MAIL FROM:<j\u00f6rg@w.example> SMTPUTF8 BODY=8BITMIME RET=FULL", "NOTIFY=FAILURE"),
]
CONTENTS = [
    b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\n\r\n",
    b"Subject: large\r\n\r\n" + b"0123456789" * 90 + b"\r\n" + b"line\r\n" * 200_000,
    "Subject: \u00e4\r\n\r\n\u00f6\r\n".encode() + b"\xff\x80\t \r\n",
]


@scenario("export-import")
def export_import(box):
    """A domain is moved from one spool to another while both serve: the messages and all parameters are unchanged, and are delivered from there"""
    old = Provider(box, require_tls=False, name="old").start()
    new = Provider(box, require_tls=False, name="new").start()
    with Smtp(old.inbound) as client:
        client.hello()
        for mail, rcpt in ENVELOPES:
            for content in CONTENTS:
                client.want("250", mail)
                client.want("250", f"RCPT TO:<alice@example.org> {rcpt}")
                client.want("250", "RCPT TO:<eva@example.org>")
                client.want("354", "DATA")
                client.socket.sendall(stuffed(content))
                client.want("250")
    before = messages(old.spool)
    check(len(before) == len(ENVELOPES) * len(CONTENTS), f"{len(before)} messages")
    batch = box.path / "batch"
    with open(batch, "wb") as file:
        exported = box.start("export.log", ODMR, "queue", "-c", old.config, "export", "example.org", stdout=file)
        check(exported.wait(60) == 0, "export failed")
    with open(batch, "rb") as file:
        imported = box.start("import.log", ODMR, "queue", "-c", new.config, "import", stdin=file)
        check(imported.wait(60) == 0, "import failed")
    check(messages(old.spool) == before, "export has changed the files")
    check(messages(new.spool) == before, "the messages differ in the other spool")
    customer = Customer(box, new.odmr, tls="none")
    check(customer.pull() == 0, "the call failed")
    received = [file.read_bytes() for file in customer.files()]
    for content in CONTENTS:
        copies = sum(at_rest(content.split(b"\r\n\r\n", 1)[1]) in file for file in received)
        check(copies == 2 * len(ENVELOPES), f"{copies} copies of {content[:20]}")
    return f"{len(before)} messages, {os.path.getsize(batch)} octets of batch SMTP"


@scenario("queue-during-calls")
def queue_during_calls(box):
    """While a customer fetches its mail, an administrator removes every other message: each message is either delivered or removed, once"""
    provider = Provider(box, require_tls=False, more="[limits]\nmessages-per-turn = 20\n").start()
    customer = Customer(box, provider.odmr, tls="none")
    with Smtp(provider.inbound) as client:
        client.hello()
        for number in range(MANY):
            content = f"Subject: number-{number}-\r\n\r\nx\r\n".encode()
            check(client.send("bob@w.example", ["alice@example.org"], content).startswith("250"), "not accepted")
    listed = box.run(ODMR, "queue", "-c", provider.config, "list").stdout.splitlines()
    check(len(listed) == MANY, f"{len(listed)} lines")
    ids = [dict(word.split("=", 1) for word in line.split()[:2])["id"] for line in listed]
    call, removed, busy = None, [], 0
    # Remove the newest first: the customer gets the oldest first.
    for number in range(MANY - 1, 0, -2):
        if len(removed) == 25 and not call:
            call = customer.start()
        while True:
            done = box.run(ODMR, "queue", "-c", provider.config, "remove", ids[number])
            if done.returncode != 75:
                break
            busy += 1
        if call and call.poll() is not None:
            # The call found the lock of `remove`, or has fetched the mail of one session.
            call = customer.start()
        check(done.returncode in (0, 65), f"remove: {done.returncode} {done.stderr}")
        if ": removed" in done.stdout:
            removed.append(number)
    call.wait(30)
    check(0 < len(removed) < MANY // 2, f"{len(removed)} removed: they did not meet")
    # A call before the last session has released the queue fetches nothing, and does not fail.
    for _ in range(20):
        check(customer.pull() in (0, 75), "a call failed")
        if not provider.held():
            break
    received = b"".join(file.read_bytes() for file in customer.files())
    for number in range(MANY):
        copies = received.count(f"number-{number}-".encode())
        check(copies == (0 if number in removed else 1), f"message {number}: {copies} copies, removed: {number in removed}")
    check(not provider.held(), "mail is left")
    return f"{len(removed)} removed, {MANY - len(removed)} delivered, {busy} times the queue was busy"
