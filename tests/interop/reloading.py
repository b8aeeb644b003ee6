"""SIGHUP to a provider at work: what goes on, and what the next connection meets."""

import signal
import ssl

from harness import LOOPBACK, Certificates, Provider, Smtp, check, events, scenario, wait_until
from hop import Hop, Session
from turning import SENDER


class Removing(Hop):
    """During the first content it does what the test wants."""

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
    """A call over TLS, to its end."""
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
    """a certificate is renewed and an account removed during a turn: it goes on, and ends after its message"""
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
    # The message under way, and the one whose MAIL was sent behind it.
    came = len(hop.letters)
    check(came in (1, 2), f"{came} messages, though the account was removed during the first")
    check(len(provider.held()) == 5 - came, f"{len(provider.held())} are held")
    check(events(provider.log(), "mail-without-account"), "the mail without account is not reported")
    account.with_suffix(".away").rename(account)
    reload(provider)
    turned(provider, ssl.create_default_context(cafile=renewed.authority), hop)
    check(len(hop.letters) == 5 and not provider.held(), f"{len(hop.letters)} in all")
    # A key that does not fit: the old pair stays.
    other = box.run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", renewed.key)
    check(other.returncode == 0, other.stderr)
    provider.process.send_signal(signal.SIGHUP)
    wait_until(lambda: events(provider.log(), "reload-failed"), "the refusal")
    certificate_of(provider.odmr_tls)
    return f"{came} messages until the removal took effect, {5 - came} after the return"
