"""A message far larger than the permitted memory."""

import hashlib
import os
import threading
import time

from harness import MIB, Certificates, Customer, Provider, Smtp, check, context, scenario

SIZE = 200 * MIB
LIMIT = 32 * 1024  # KiB
MARK = b"X-Begin: here\n"


class Peak(threading.Thread):
    """Records the highest resident memory of a process until it ends."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process = process
        self.kibibytes = 0
        self.start()

    def look(self):
        try:
            with open(f"/proc/{self.process.pid}/status") as status:
                for line in status:
                    if line.startswith("VmHWM:"):
                        self.kibibytes = max(self.kibibytes, int(line.split()[1]))
                        return True
        except OSError:
            pass
        return False

    def run(self):
        while self.look():
            time.sleep(0.005)


def blocks():
    """The content in pieces, with LF line ends; one line of ten begins with a dot."""
    yield b"Subject: large\n" + MARK + b"\n"
    noise = os.urandom(57 * 1024).hex().encode()
    lines = b"".join(
        (b"." if at % 10 == 0 else b"") + noise[at * 76 : at * 76 + 76] + b"\n" for at in range(len(noise) // 76)
    )
    sent = 0
    while sent < SIZE:
        block = b"block %d\n" % sent + lines
        yield block
        sent += len(block) + block.count(b"\n")


@scenario("large")
def large(box):
    """A message of 200 MiB is accepted, held and sent after the turn; each process uses less than 32 MiB of resident memory"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates, more='[inbound]\nmax-size = "300MiB"\n').start()
    serve = Peak(provider.process)
    sent = hashlib.sha256(MARK)
    begin = time.monotonic()
    with Smtp(provider.inbound, seconds=60) as sender:
        sender.hello()
        sender.start_tls(context(certificates.authority))
        sender.want("250", f"MAIL FROM:<a@sender.example> SIZE={SIZE + MIB}")
        sender.want("250", "RCPT TO:<eva@example.org>")
        sender.want("354", "DATA")
        past_mark = False
        for block in blocks():
            sent.update(block if past_mark else block.split(MARK, 1)[1])
            past_mark = True
            block = block.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n")
            sender.socket.sendall(block)
        sender.want("250", ".")
    accepted = time.monotonic() - begin
    check(len(provider.held()) == 1, "not held")
    held = provider.held()[0].stat().st_size
    customer = Customer(box, provider.odmr, authority=certificates.authority, more='max-size = "300MiB"\n')
    begin = time.monotonic()
    process = customer.start()
    pull = Peak(process)
    result = process.wait(100)
    fetched = time.monotonic() - begin
    check(result == 0, f"pull: exit {result}")
    check(not provider.held() and len(customer.files()) == 1, "it did not come")
    got = hashlib.sha256()
    with open(customer.files()[0], "rb") as file:
        for line in file:
            if line == MARK:
                break
        got.update(MARK)
        while block := file.read(MIB):
            got.update(block)
    check(got.digest() == sent.digest(), "the content differs")
    serve.look()
    facts = (
        f"{held / MIB:.0f} MiB under TLS: in {accepted:.1f} s, turned in {fetched:.1f} s;"
        f" peak serve {serve.kibibytes / 1024:.1f} MiB, pull {pull.kibibytes / 1024:.1f} MiB"
    )
    check(serve.kibibytes < LIMIT and pull.kibibytes < LIMIT, facts)
    check(serve.kibibytes > 0 and pull.kibibytes > 0, f"not measured: {facts}")
    return facts
