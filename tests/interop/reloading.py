"""SIGHUP to a busy provider: sessions under way, and the next connection."""

import signal
import ssl

from harness import LOOPBACK, ODMR, Certificates, Customer, Provider, Smtp, check, events, scenario, secret, wait_until
from hop import Hop, Session
from turning import SENDER


class Removing(Hop):
    """Calls a function of the test during the first content."""

    act = None

    def content_begins(self, _):
        act, self.act = self.act, None
        if act:
            act()


def reload(provider):
    before = len(events(provider.log(), "reloaded"))
    provider.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(events(provider.log(), "reloaded")) > before, "the reload")
    return events(provider.log(), "reloaded")[-1]


def turned(provider, trust, hop):
    """A call over TLS, until it ends."""
    with Smtp(provider.odmr_tls, tls=trust) as line:
        line.hello()
        line.log_in("acme")
        check((reply := line.say("ATRN")).startswith("250"), reply)
        session = Session(line.socket, hop)
        session.received = line.received
        session.serve()


def certificate_of(port):
    return ssl.get_server_certificate((LOOPBACK, port))


@scenario("reload", needs=["openssl"])
def reloading(box):
    """During a turn a certificate is renewed and the account is removed: the session ends after the message under way"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    with Smtp(provider.inbound) as line:
        line.hello()
        for number in range(5):
            reply = line.send(SENDER, ["alice@example.org"], f"Subject: {number}\r\n\r\n{number}\r\n".encode())
            check(reply.startswith("250"), reply)
    trust = ssl.create_default_context(cafile=certificates.authority)
    old, account = certificate_of(provider.odmr_tls), provider.config.parent / "serve-customers.d/acme.toml"
    renewed = Certificates(box)  # the same files
    hop = Removing(lmtp=False)

    def renew_and_remove():
        said = reload(provider)
        check("certificate-until" in str(said), f"{said}")
        check(certificate_of(provider.odmr_tls) != old, "the next connection meets the old certificate")
        account.rename(account.with_suffix(".away"))
        reload(provider)

    hop.act = renew_and_remove
    turned(provider, trust, hop)
    # The message under way, and the one whose MAIL was sent after it.
    came = len(hop.messages)
    check(came in (1, 2), f"{came} messages, though the account was removed during the first")
    check(len(provider.held()) == 5 - came, f"{len(provider.held())} are held")
    wait_until(lambda: events(provider.log(), "mail-without-account"), "the report of the mail without account")
    said = wait_until(lambda: events(provider.log(), "turn-ended"), "the end of the turn")[-1]["reason"]
    check("the account lost a domain" in said, f"the end of the turn: {said}")
    account.with_suffix(".away").rename(account)
    reload(provider)
    turned(provider, ssl.create_default_context(cafile=renewed.authority), hop)
    check(len(hop.messages) == 5 and not provider.held(), f"{len(hop.messages)} in all")
    # A key that does not fit: the old pair stays in use.
    other = box.run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", renewed.key)
    check(other.returncode == 0, other.stderr)
    provider.process.send_signal(signal.SIGHUP)
    wait_until(lambda: events(provider.log(), "reload-failed"), "the rejection")
    certificate_of(provider.odmr_tls)
    return f"{came} messages until the removal took effect, {5 - came} after the return"


def send_to(provider, recipient):
    """One message to port 25. Returns the reply to RCPT if that is negative, otherwise the reply to the content."""
    with Smtp(provider.inbound) as line:
        line.hello()
        line.want("250", f"MAIL FROM:<{SENDER}>")
        reply = line.say(f"RCPT TO:<{recipient}>")
        if not reply.startswith("250"):
            return reply
        line.want("354", "DATA")
        return line.say(f"Subject: for {recipient}\r\n\r\nx\r\n.")


def expect(provider, recipient, code):
    reply = send_to(provider, recipient)
    check(reply.startswith(code), f"{recipient}: {reply}, not {code}")


@scenario("two-days", needs=["openssl"])
def two_days(box):
    """Two days of an operator: a new customer, a renewed certificate, a mistake in a file before a reload and before a start, a removed customer"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates, customers={"acme": ["example.org"]}).start()
    accounts = provider.config.parent / "serve-customers.d"
    acme = Customer(box, provider.odmr, authority=certificates.authority)
    branch = Customer(box, provider.odmr, authority=certificates.authority, name="branch", file="branch", accept=["@branch.example"])
    checks = lambda: box.run(ODMR, "check", "-c", provider.config)
    status = lambda *words: box.run(ODMR, "status", "-c", provider.config, *words)

    # The first morning: a customer is added.
    expect(provider, "eva@branch.example", "550")
    good = f'domains = ["branch.example"]\nsecret = "{secret("branch")}"\n'
    file = box.write("serve-customers.d/branch.toml", good)
    check(checks().returncode == 0, f"check: {checks().stderr}")
    check("'added': '1'" in str(reload(provider)), "the customer is not counted")
    expect(provider, "eva@branch.example", "250")
    check(branch.pull() == 0 and len(branch.files()) == 1, "the new customer has no mail")

    # The certificate is renewed while a customer fetches its mail.
    for _ in range(3):
        expect(provider, "alice@example.org", "250")
    trust, old = ssl.create_default_context(cafile=certificates.authority), certificate_of(provider.odmr_tls)
    hop = Removing(lmtp=False)

    def renew():
        Certificates(box)
        reload(provider)
        check(certificate_of(provider.odmr_tls) != old, "the next connection meets the old certificate")

    hop.act = renew
    turned(provider, trust, hop)
    check(len(hop.messages) == 3, f"{len(hop.messages)} of 3 messages came in the turn under way")
    check(acme.pull() == 0, "the next call does not trust the new certificate")

    # The evening: a typing error, which `check` finds, and a reload all the same.
    file.write_text(good.replace("domains = [", "domains = "))
    found = checks()
    check(found.returncode == 1 and "branch.toml:1" in found.stderr, f"check: {found.returncode}, {found.stderr}")
    reload(provider)
    check(events(provider.log(), "customer-skipped"), "the file that is skipped is not reported")
    expect(provider, "eva@branch.example", "250")
    check(branch.pull() == 0 and len(branch.files()) == 2, "the account is not as it was last read")

    # The night: the machine restarts, and the error is not corrected.
    expect(provider, "eva@branch.example", "250")
    check(provider.stop() == 0, "it does not end")
    provider.inbound = provider.odmr = provider.odmr_tls = 0
    provider.start()
    for customer in (acme, branch):
        text = customer.config.read_text()
        customer.config.write_text(text.replace(text.split('address = "')[1].split('"')[0], f"{LOOPBACK}:{provider.odmr}"))
    expect(provider, "eva@branch.example", "451")
    expect(provider, "alice@example.org", "250")
    check(acme.pull() == 0 and len(acme.files()) == 1, "the other customer has no mail")
    check(branch.pull() == 75, f"the skipped customer gets no temporary error: {branch.log()}")
    check(len(provider.held()) == 1, f"{len(provider.held())} are held")

    # The second morning: the error is corrected.
    file.write_text(good)
    reload(provider)
    expect(provider, "eva@branch.example", "250")
    check(branch.pull() == 0 and len(branch.files()) == 4, f"{len(branch.files())} messages of 4")

    # The customer is removed while mail is held for it.
    expect(provider, "eva@branch.example", "250")
    file.rename(accounts / "branch.gone")
    check("'removed': '1'" in str(reload(provider)), "the customer is not counted")
    wait_until(lambda: events(provider.log(), "mail-without-account"), "the report of its mail")
    expect(provider, "eva@branch.example", "550")
    found, shown = checks(), status("--warn", "1d")
    check(found.returncode == 1 and "branch.example" in found.stderr, f"check: {found.stderr}")
    check(shown.returncode == 1 and "branch.example" in shown.stdout, f"status: {shown.stdout}")
    (accounts / "branch.gone").rename(file)
    reload(provider)
    check(branch.pull() == 0 and len(branch.files()) == 5, "its mail was not kept")
    check(not provider.held() and not list(provider.spool.glob("outgoing/*/*/*")), "something has bounced")
    check(status("--warn", "1d").returncode in (0, 1) and "branch" not in status("--warn", "1d").stdout, status("--warn", "1d").stdout)
    return "10 messages to 2 customers, none bounced"
