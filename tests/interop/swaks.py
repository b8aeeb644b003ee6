"""swaks as a sender to the inbound listener."""

from harness import LOOPBACK, Certificates, Provider, check, field, scenario


@scenario("swaks", needs=["swaks"])
def swaks(box):
    """swaks with STARTTLS sends a message; a foreign domain gets 550 5.7.1; a message that is too large is rejected at MAIL"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates, more='[inbound]\nmax-size = "1MiB"\n').start()

    def send(*options):
        return box.run(
            *["swaks", "--server", LOOPBACK, "--port", provider.inbound, "--helo", "sender.example"],
            *["--from", "lester@sender.example", *options],
        )

    done = send("--to", "eva@example.org,adam@example.com", "--tls", "--body", "hello\n.a dot\nbye")
    check(done.returncode == 0, f"exit {done.returncode}: {done.stdout[-800:]}{done.stderr}")
    check("TLS started with cipher TLSv1.3" in done.stdout, f"no TLS 1.3: {done.stdout[:1500]}")
    held = {file.parent.parent.name: file.read_bytes() for file in provider.held()}
    check(sorted(held) == ["example.com", "example.org"], f"a file for each domain, got {sorted(held)}")
    for domain, user in (("example.org", "eva"), ("example.com", "adam")):
        file = held[domain]
        check(file.startswith(b"Return-Path: <lester@sender.example>\nDelivered-To: "), f"{file[:200]!r}")
        check(field(file, "Delivered-To") == f"{user}@{domain}", f"Delivered-To {field(file, 'Delivered-To')}")
        trace = field(file, "Received")
        for part in ("from sender.example", "127.0.0.1", "with ESMTPS", "TLS", "by relay.example.net"):
            check(part in trace, f"no {part!r} in {trace!r}")
        check(b"\n\nhello\n.a dot\nbye\n" in file and b"\r" not in file, f"content {file[-100:]!r}")
    done = send("--to", "eva@example.org")
    check(done.returncode == 0, f"in clear: exit {done.returncode}")
    clear = next(file.read_bytes() for file in provider.held() if b"ESMTPS" not in file.read_bytes())
    check("with ESMTP" in field(clear, "Received"), field(clear, "Received"))
    done = send("--to", "x@foreign.example", "--tls")
    check(done.returncode == 24 and "550 5.7.1" in done.stdout, f"foreign domain: {done.returncode} {done.stdout[-500:]}")
    big = box.write("big.txt", "0123456789\n" * 200_000)
    done = send("--to", "eva@example.org", "--body", f"@{big}")
    check("552 5.3.4" in done.stdout, f"too big: {done.returncode} {done.stdout[-300:]}")
    check(len(provider.held()) == 3, f"{len(provider.held())} files")
    return "2 domains, TLS 1.3, foreign 550 5.7.1, too big 552 5.3.4"
