"""`odmr send`, called as programs call sendmail(8), and `odmr pull --daemon` with its listener."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time

from harness import LOOPBACK, MIB, ODMR, Certificates, Customer, Provider, Smtp, check, events, field, free_port, scenario
from harness import secret, wait_until
from world import RELAYS, House, Names, outgoing_table, queued, sendmail

USAGE, DATA, NO_USER, TOO_LARGE, CANNOT_CREATE, TEMPORARY, PERMISSION, CONFIG = 64, 65, 67, 69, 73, 75, 77, 78
MESSAGE = "Subject: x\n\nx\n"


@scenario("send-words")
def send_words(box):
    """odmr send: exit codes of sysexits, error texts, -bp, -bs, its changes to the header"""
    more = 'domain = "example.org"\nmax-size = "100KiB"'
    customer = Customer(box, free_port(), tls="none", more=outgoing_table(box, more=more))
    text = customer.config.read_text().replace('"@example.org", "@example.com"', '"eva@example.org", "@example.com"')
    customer.config.write_text(text)
    notes = []

    def wants(code, word, *arguments, text=MESSAGE, to=customer, **options):
        before = len(queued(customer))
        done = sendmail(box, to, *arguments, text=text, **options)
        check(done.returncode == code, f"{arguments}: exit {done.returncode}, wanted {code}: {done.stderr}")
        check(done.stderr.count("\n") == 1 and done.stderr.startswith("sendmail: "), f"{arguments}: no clear line: {done.stderr!r}")
        check(word in done.stderr, f"{arguments}: {word!r} is not in {done.stderr!r}")
        check(len(queued(customer)) == before, f"{arguments}: something was queued")

    def good(*arguments, text=MESSAGE, by="sendmail", code=0):
        before = set(queued(customer))
        done = sendmail(box, customer, *arguments, text=text, by=by)
        check(done.returncode == code, f"{arguments}: exit {done.returncode}: {done.stderr}")
        check(not done.stdout and not done.stderr, f"{arguments}: not silent: {done.stdout!r} {done.stderr!r}")
        new = set(queued(customer)) - before
        return [file.read_bytes() for file in new]

    wants(USAGE, "recipient")
    wants(USAGE, "nonsense", "--nonsense", "u@dest.example")
    wants(USAGE, "-bd", "-bd")
    wants(USAGE, "-N", "-N", "sometimes", "u@dest.example")
    wants(DATA, "<", "u@dest.example, <@")
    wants(DATA, "", "u@")
    wants(DATA, "recipient", "-t")
    wants(DATA, "", "-t", text="To: a b c <d@>\n\nx\n")
    wants(DATA, "sender", "-f", "a@example.org, b@example.org", "u@dest.example")
    wants(NO_USER, "adam@example.org", "adam@example.org")
    wants(NO_USER, "nobody@example.org", "u@dest.example", "nobody")
    wants(TOO_LARGE, "102400", "u@dest.example", text=MESSAGE + ("z" * 70 + "\n") * 2000)
    mute = Customer(box, free_port(), tls="none", file="mute")
    wants(CONFIG, "[outgoing]", "u@dest.example", to=mute)
    missing = Customer(box, free_port(), tls="none", file="missing")
    missing.config.unlink()
    wants(CONFIG, "missing.toml", "u@dest.example", to=missing)
    broken = Customer(box, free_port(), tls="none", file="broken", more="\n[outgoing]\nqueue = 7\n")
    wants(CONFIG, "broken.toml:", "u@dest.example", to=broken)

    # The message in the queue.
    (file,) = good("-f", "eva@example.org", "-F", "Eva \"E\" Example", "u@dest.example,v@dest.example", "w@other.example")
    check(field(file, "From") == '"Eva \\"E\\" Example" <eva@example.org>', f"{file!r}")
    check(all(field(file, name) for name in ("Date", "Message-ID")), f"{file!r}")
    check(file.count(b"Delivered-To: ") == 3, f"{file!r}")
    text = "From: other@example.com\nTo: u@dest.example,\n (a comment) \"q, x\" <v@dest.example>\nBcc: w@dest.example\nDate: x\n\n..\n.\nno\n"
    (file,) = good("-t", text=text)
    check(file.endswith(b"\n\n..\n") and b"Bcc" not in file and field(file, "From") == "other@example.com", f"{file!r}")
    check(file.count(b"Delivered-To: ") == 3 and file.count(b"\nDate: ") == 1, f"{file!r}")
    (file,) = good("-ti", "-oem", "-odb", text=text)
    check(file.endswith(b"\n\n..\n.\nno\n"), f"{file!r}")
    (file,) = good("-i", "-f", "<>", "-N", "success,failure", "-V", "id1", "u@dest.example", text="Subject: crlf\r\n\r\na\r\n")
    check(field(file, "Return-Path") == "<>" and b"\r" not in file, f"{file!r}")
    (file,) = good("-t", text="To: u@dest.example\nSubject: no body\n")
    check(b"Subject: no body\n" in file, f"{file!r}")

    # Mail for the customer's own domain does not go to the provider: it is in the mailbox at once.
    check(not good("eva"), "mail for a mailbox here was queued")
    (path,) = customer.files()
    check(path.parent.parent.name == "eva", f"{path}")

    # -bp, and the output of mailq.
    listing = sendmail(box, customer, "-bp")
    check(listing.returncode == 0, f"-bp: exit {listing.returncode}: {listing.stderr}")
    for word in ("u@dest.example", "w@other.example", "<eva@example.org>", "<>", f"{len(queued(customer))} messages"):
        check(word in listing.stdout, f"-bp: no {word} in {listing.stdout}")
    again = box.run(ODMR, "send", "-C", customer.config, "-bp")
    check(again.stdout == listing.stdout, f"odmr send -bp: {again.stdout}{again.stderr}")

    # -bs: SMTP on stdin and stdout.
    session = "EHLO me\r\nMAIL FROM:<eva@example.org>\r\nRCPT TO:<u@dest.example>\r\nRCPT TO:<no@example.org>\r\nDATA\r\n"
    session += "Subject: by -bs\r\n\r\nx\r\n.\r\nQUIT\r\n"
    before = len(queued(customer))
    done = sendmail(box, customer, "-bs", text=session)
    codes = re.findall(r"(?m)^(\d{3}) ", done.stdout)
    check(codes == ["220", "250", "250", "250", "550", "354", "250", "221"], f"-bs: {done.stdout} {done.stderr}")
    check(len(queued(customer)) == before + 1 and done.returncode == 0, f"-bs: exit {done.returncode}")

    # Directories that cannot be written to. Root can write to all of them, so a file is in the place of the directory.
    blocked = Customer(box, free_port(), tls="none", file="blocked", more=outgoing_table(box, "blocked"))
    box.write("blocked-queue", "not a directory")
    wants(CANNOT_CREATE, "", "u@dest.example", to=blocked)
    notes.append(unprivileged(box, customer, wants))
    notes.append(full_disk(box, wants))
    return "; ".join(note for note in notes if note)


def unprivileged(box, customer, wants):
    """A user that may not write to the queue, if this process may become another user."""
    if os.geteuid() != 0:
        return "no permission: not root, skipped"
    queue = box.path / "pull-queue"
    for path in (queue, *queue.iterdir()):
        path.chmod(0o700)
    os.chown(customer.config, 0, 65534)
    customer.config.chmod(0o640)
    (box.path / "bin").mkdir()
    shutil.copy(ODMR, box.path / "bin/sendmail")  # the program may be in a directory that other users cannot enter
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "by": "bin/sendmail"}
    wants(PERMISSION, "ermission denied", "u@dest.example", **nobody)
    wants(PERMISSION, 'add listen = ["127.0.0.1:25"]', "u@dest.example", **nobody)
    os.chown(customer.config, 0, 0)
    wants(PERMISSION, "pull.toml", "u@dest.example", **nobody)
    wants(PERMISSION, "chmod 644", "u@dest.example", **nobody)
    return "no permission: 77"


def full_disk(box, wants):
    """A queue on a file system of 5 MiB; the program reserves 4 MiB of it."""
    disk = box.path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        return "full disk: cannot mount, skipped"
    box.at_end(lambda: subprocess.run(["umount", "-l", str(disk)], capture_output=True))
    customer = Customer(box, free_port(), tls="none", file="full")
    with open(customer.config, "a") as file:
        file.write(f'\n[outgoing]\nqueue = "{disk}/queue"\n')
    done = sendmail(box, customer, "u@dest.example", text=MESSAGE)
    check(done.returncode == 0, f"room for one: exit {done.returncode}: {done.stderr}")
    wants(TEMPORARY, "later", "u@dest.example", text=MESSAGE + ("z" * 70 + "\n") * 40000, to=customer)  # more than there is room for
    (disk / "fill").write_bytes(b"z" * MIB)
    wants(TEMPORARY, "later", "u@dest.example", to=customer)
    try:
        (disk / "fill2").write_bytes(b"z" * 5 * MIB)
    except OSError:
        pass
    wants(TEMPORARY, "later", "u@dest.example", to=customer)
    left = [file.name for part in ("tmp", "new") for file in (disk / "queue" / part).iterdir()]
    check(len(left) == 1, f"left in the queue: {left}")
    return "full disk: 75"


def own_address():
    """An address of this machine that is not loopback, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            address = probe.getsockname()[0]
        except OSError:
            return None
    return None if address.startswith("127.") else address


@scenario("sendmail-users", root=True)
def sendmail_users(box):
    """An ordinary user, who can read neither the secret nor the mailboxes, sends; the next call sends the mail on"""
    provider = Provider(box, require_tls=False, accounts=RELAYS)
    provider.start()
    customer = Customer(box, provider.odmr, tls="none", more=outgoing_table(box))
    key = box.write("own.secret", secret("acme") + "\n", mode=0o600)
    text = re.sub(r"(?m)^secret = .*$", f'secret-file = "{key}"', customer.config.read_text(), count=1)
    customer.config.write_text(text)
    customer.config.chmod(0o644)
    queue = box.path / "pull-queue"
    for directory in (queue, queue / "tmp", queue / "new", queue / "cur"):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o777)
    customer.root.mkdir(mode=0o700, exist_ok=True)
    box.path.chmod(0o755)
    done = subprocess.run(
        [ODMR, "send", "-C", customer.config, "-f", "eva@example.org", "eva@example.org", "u@dest.example"],
        input=MESSAGE, text=True, capture_output=True, user=65534, group=65534, extra_groups=[], timeout=20, cwd="/",
    )
    check(done.returncode == 0, f"exit {done.returncode}: {done.stderr}")
    check(len(queued(customer)) == 1, f"{len(queued(customer))} messages wait, wanted one for both recipients")
    pulled = customer.pull()
    check(pulled == 0, f"pull: exit {pulled}: {customer.log()}")
    check(len(list(customer.root.glob("example.org/eva/new/*"))) == 1, "nothing came to eva")
    tried = lambda: events(provider.log(), "delivery", to="<u@dest.example>", via="mx")
    wait_until(tried, "the provider to try u@dest.example")
    check(not queued(customer), "something still waits")


@scenario("daemon", needs=["swaks", "dnsmasq"])
def daemon(box):
    """pull --daemon: swaks submits a message to its listener, and the next call sends it; untrusted clients get 554; SIGTERM ends it with 0"""
    house = House(box)
    names = Names(box, mx={"dest.example": [(10, "mx.dest.example")]}, hosts={"mx.dest.example": LOOPBACK})
    certificates = Certificates(box)
    relay = f'[relay]\nresolver = "{names.resolver}"\nallow-private = true\nport = {house.port}\n'
    provider = Provider(box, certificates=certificates, accounts=RELAYS, more=relay).start()
    address = own_address()
    port = free_port()
    more = f'listen = ["0.0.0.0:{port}"]\nnetworks = ["198.51.100.0/24", "fd00::/8"]\n[schedule]\nevery = "1s"'
    customer = Customer(box, provider.odmr, authority=certificates.authority, more=outgoing_table(box, more=more))
    process = box.start("pull.log", ODMR, "pull", "--daemon", "-c", customer.config)
    wait_until(lambda: re.search(rf"(?m)^listening \w+ 0\.0\.0\.0:{port}$", customer.log()), "the listener")
    ended = lambda: len(events(customer.log(), "call"))
    wait_until(ended, "the first call")
    done = box.run(
        *["swaks", "--server", LOOPBACK, "--port", port, "--helo", "pc.example.org", "--from", "adam@example.org"],
        *["--to", "u@dest.example,eva@example.org", "--header", "Subject: by swaks", "--body", "hello"],
    )
    check(done.returncode == 0, f"swaks: exit {done.returncode}: {done.stdout[-800:]}")
    check("STARTTLS" not in done.stdout and "AUTH" not in done.stdout, "the listener offers what it has not")
    # Mail for the customer's own domain is delivered locally, at once.
    check(customer.files(), "no copy for eva")
    wait_until(lambda: house.messages, "the message at its destination")
    (message,) = house.messages
    check(message.recipients == ["u@dest.example"] and b"Subject: by swaks\r\n" in message.content, f"{message}")
    # Incoming mail is fetched by the next call.
    with Smtp(provider.inbound) as line:
        line.hello()
        check(line.send("l@sender.example", ["eva@example.org"], b"Subject: down\r\n\r\nx\r\n").startswith("250"), "sent")
    wait_until(lambda: len(customer.files()) == 2, "mail by a later call")
    calls, begin = ended(), time.monotonic()
    wait_until(lambda: ended() >= calls + 4, "four calls", seconds=15)
    check(time.monotonic() - begin > 2, "calls more often than every second")

    note = "no address but loopback: untrusted clients not tried"
    if address:
        with socket.create_connection((address, port), timeout=10) as sock:
            said = b""
            while some := sock.recv(1000):
                said += some
        check(said.startswith(b"554 5.7.1"), f"an untrusted client got {said!r}")
        note = "an untrusted client got 554"
    # The provider stops and restarts: the daemon continues.
    provider.stop()
    wait_until(lambda: events(customer.log(), "call-failed"), "a failed call")
    check(process.poll() is None, f"the daemon ended: {process.returncode}")
    with Smtp(port) as idle:
        idle.hello()
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        check((result := process.wait(10)) == 0, f"SIGTERM: exit {result}")
        seconds = time.monotonic() - begin
    check(seconds < 3, f"it took {seconds:.1f} s to end")
    return f"{note}; SIGTERM in {seconds * 1000:.0f} ms"
