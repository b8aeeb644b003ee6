"""swaks submits mail on port 366, as at any submission server."""

from harness import LOOPBACK, Certificates, Provider, check, field, free_port, scenario, secret

CUSTOMERS = {
    "acme": ["example.org", "example.com"],
    "mute": ["mute.example"],
    "bulk": ["bulk.example"],
    "slow": ["slow.example"],
}
ACCOUNTS = {
    "acme": "relay = true\n",
    "mute": "relay = false\n",
    "bulk": 'relay = true\nany-sender = true\nmax-size = "10KiB"\n',
    "slow": "relay = true\nrate = 2\n",
}


@scenario("submission", needs=["swaks"])
def submission(box):
    """swaks submits on port 366 after AUTH; it gets 530 before, 550 for a foreign sender and for relay = false; rate and size are enforced"""
    certificates = Certificates(box)
    nowhere = f'[relay]\nresolver = "{LOOPBACK}:{free_port()}"\n'
    provider = Provider(box, certificates=certificates, customers=CUSTOMERS, accounts=ACCOUNTS, more=nowhere).start()

    def swaks(*options, account="acme", sender="adam@example.com", to="eva@example.org", auth="PLAIN", tls="--tls"):
        login = ["--auth", auth, "--auth-user", account, "--auth-password", secret(account)] if auth else []
        port = provider.odmr_tls if tls == "--tlsc" else provider.odmr
        done = box.run(
            *["swaks", "--server", LOOPBACK, "--port", port, "--helo", "sender.example", tls],
            *["--from", sender, "--to", to, *login, *options],
        )
        done.text = done.stdout + done.stderr
        return done

    def rejected(code, done):
        check(done.returncode != 0, f"wanted {code}, it was accepted: {done.text[-600:]}")
        check(f"<** {code}" in done.text or f"<~* {code}" in done.text, f"wanted {code}: {done.text[-600:]}")

    for auth, tls in (("PLAIN", "--tls"), ("CRAM-MD5", "--tls"), ("PLAIN", "--tlsc")):
        before = len(provider.held())
        done = swaks("--header", f"Subject: by {auth} {tls}", auth=auth, tls=tls)
        check(done.returncode == 0, f"{auth} {tls}: exit {done.returncode}: {done.text[-800:]}")
        check(len(provider.held()) == before + 1, f"{auth} {tls}: {len(provider.held()) - before} files more")
    for path in provider.held():
        file = path.read_bytes()
        check(path.parent.parent.name == "example.org", f"{path}")
        check(field(file, "Return-Path") == "<adam@example.com>", f"{file[:300]!r}")
        check(" ESMTPSA " in field(file, "Received") + " ", field(file, "Received"))

    # The customer's mail server relays: a header without some fields stays unchanged (RFC 5321 section 6.4).
    done = swaks("--data", "Subject: bare\n\nbare\n")
    check(done.returncode == 0, f"bare: {done.text[-600:]}")
    bare = [path.read_bytes() for path in provider.held() if field(path.read_bytes(), "Subject") == "bare"]
    check(len(bare) == 1 and not field(bare[0], "Date") and not field(bare[0], "Message-ID"), f"{bare}")

    rejected("530 5.7.0", swaks(auth=None))
    rejected("530 5.7.0", swaks(auth=None, tls="--pipeline"))  # in clear
    rejected("550 5.7.1", swaks(sender="me@foreign.example"))
    rejected("550 5.7.1", swaks(sender="me@mute.example", account="mute"))
    rejected("554 5.1.2", swaks(to="nobody@localhost"))
    check(swaks(sender="<>", to="eva@example.org").returncode == 0, "a DSN has no sender, and was rejected")
    check(swaks(sender="any@foreign.example", account="bulk").returncode == 0, "any-sender")
    rejected("552 5.3.4", swaks("--body", "z" * 70 + ("\n" + "z" * 70) * 200, sender="a@bulk.example", account="bulk"))
    for _ in range(2):
        check((done := swaks(sender="a@slow.example", account="slow")).returncode == 0, f"rate: {done.text[-600:]}")
    rejected("452", swaks(sender="a@slow.example", account="slow"))
    wrong = swaks("--auth-password", "wrong")
    check(wrong.returncode == 28, f"wrong password: exit {wrong.returncode}, {wrong.text[-300:]}")
    check(not list(provider.spool.glob("outgoing/*/new/*")), "something went out")
    # The relay sends to a foreign recipient.
    done = swaks(to="someone@dest.invalid")
    check(done.returncode == 0, f"to the world: {done.text[-600:]}")
    return f"{len(provider.held())} held"
