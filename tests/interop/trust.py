"""Certificates of clients (SASL EXTERNAL): openssl and swaks at the provider, our customer at a server with OpenSSL,
changes of keys."""

import base64
import re
import signal
import socket
import ssl
import threading

from harness import LOOPBACK, Certificates, Customer, Provider, Smtp, check, events, scenario, secret, wait_until
from openssl import made

KINDS = ["rsa", "p256", "p384", "ed25519"]


def pins(box, certificate):
    """`sha256:` and `spki-sha256:` of a certificate, as computed by openssl."""
    print_one = box.run("openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256").stdout
    key = f"openssl x509 -in {certificate} -noout -pubkey | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary"
    digits = box.run("sh", "-c", f"{key} | openssl base64").stdout.strip()
    return "sha256:" + print_one.strip().split("=")[1], "spki-sha256:" + digits


def expired(box):
    """An expired self-signed certificate, and its key: another one each time."""
    key, request, certificate = (box.path / f"expired.{end}" for end in ("key", "csr", "pem"))
    for command in (
        ["req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=expired", "-keyout", key, "-out", request],
        ["x509", "-req", "-in", request, "-signkey", key, "-days", "-1", "-out", certificate],
    ):
        done = box.run("openssl", *command)
        check(done.returncode == 0, f"openssl: {done.stderr}")
    return certificate, key


def account(provider, name, certificates, with_secret=False):
    lines = f'domains = ["{name}.example"]\ncertificate = [{", ".join(f"{pin!r}" for pin in certificates)}]\n'
    lines += f'secret = "{secret(name)}"\n' if with_secret else ""
    provider.box.write(f"serve-customers.d/{name}.toml", lines)


@scenario("client-certificates", needs=["openssl"])
def client_certificates(box):
    """openssl s_client -cert logs in by EXTERNAL with each kind of key, X.509 1 and 3, expired; port 25 never asks for a certificate"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates)
    own = {f"{kind}-{version}": made(box, kind, version) for kind in KINDS for version in (1, 3)}
    own["expired"] = expired(box)
    for number, (name, (certificate, _)) in enumerate(own.items()):
        account(provider, name, [pins(box, certificate)[number % 2]])
    provider.start()

    def client(port, options, lines, *more):
        return box.run(
            *["openssl", "s_client", "-connect", f"{LOOPBACK}:{port}", "-servername", "localhost", "-CAfile"],
            *[certificates.authority, "-verify_return_error", "-crlf", "-ign_eof", *options, *more],
            input="".join(f"{line}\n" for line in ["ehlo client.example", *lines, "quit"]),
            seconds=20,
        ).stdout

    logins = 0
    for name, (certificate, key) in own.items():
        for port, options in ((provider.odmr, ["-starttls", "smtp"]), (provider.odmr_tls, [])):
            for version in ("-tls1_2", "-tls1_3"):
                text = client(port, options, ["auth external =", "atrn"], version, "-cert", certificate, "-key", key)
                check(f"\n235 2.7.0 now authenticated as {name}" in text, f"{name} {version}: {text[-700:]}")
                check("\n453 4.3.2 " in text and "No client certificate CA names sent" in text, text[-700:])
                check(re.search(r"(?m)^250[- ]AUTH EXTERNAL CRAM-MD5 (SCRAM-SHA-256-PLUS )?SCRAM-SHA-256 PLAIN", text), text[-700:])
                logins += 1
    # A certificate of the same name with another key; none; port 25.
    (certificate, key), lines = own["p256-3"], ["auth external =", "atrn"]
    old = expired(box)
    text = client(provider.odmr_tls, [], lines, "-cert", old[0], "-key", old[1])
    check("\n504 5.5.4 " in text and "\n530 " in text, text[-700:])
    unknown = wait_until(lambda: events(provider.log(), "unknown-certificate"), "the unknown certificate in the log")
    digest = base64.b64decode(pins(box, old[0])[1].split(":")[1]).hex()
    check(unknown[0]["pin"] == f"spki-sha256:{digest}", unknown)
    text = client(provider.odmr_tls, [], lines)
    check("\n504 5.5.4 " in text and "\n530 " in text, text[-700:])
    # A key that cannot be verified: the client sends no certificate, or the handshake fails, and the log has the reason.
    for kind, version in (("p521", "-tls1_3"), ("p521", "-tls1_2"), ("rsa-1024", "-tls1_3")):
        weak = made(box, kind, 3)
        closed = lambda: [event["reason"] for event in events(provider.log(), "closed")]
        before = len(closed())
        text = client(provider.odmr_tls, [], lines, version, "-cipher", "DEFAULT:@SECLEVEL=0", "-cert", weak[0], "-key", weak[1])
        wait_until(lambda: len(closed()) > before, "the end of the session in the log")
        check("\n504 5.5.4 " in text or "EC on P-256 or P-384" in closed()[-1], f"{kind} {version}: {closed()[-1]} {text[-700:]}")
    asked = "Requested Signature Algorithms"
    for port, expected in ((provider.odmr, True), (provider.inbound, False)):
        text = client(port, ["-starttls", "smtp"], [], "-cert", certificate, "-key", key)
        check((asked in text) == expected, f"{port}: {text[-900:]}")
    return f"{logins} logins with {len(own)} certificates; port 25 does not ask"


@scenario("swaks-certificate", needs=["swaks", "openssl"])
def swaks_certificate(box):
    """swaks --tls-cert: with a secret a certificate changes nothing; without a secret only the certificate opens the account"""
    provider = Provider(box, certificates=Certificates(box))
    certificate, key = made(box, "p256", 3)
    account(provider, "both", [pins(box, certificate)[0]], with_secret=True)
    account(provider, "only", [pins(box, certificate)[1]])
    provider.start()

    def send(name, mechanism, *options):
        return box.run(
            *["swaks", "--server", LOOPBACK, "--port", provider.odmr, "--helo", "client.example", "--tls"],
            *["--tls-cert", certificate, "--tls-key", key, "--from", f"alice@{name}.example", "--to", "bob@both.example"],
            *["--auth", mechanism, "--auth-user", name, "--auth-password", secret(name), *options],
        )

    for mechanism in ("PLAIN", "CRAM-MD5"):
        done = send("both", mechanism)
        check(done.returncode == 0 and "AUTH EXTERNAL CRAM-MD5 SCRAM-SHA-256" in done.stdout, f"{mechanism}: {done.stdout[-900:]}")
        done = send("only", mechanism)
        check(done.returncode == 28 and "535 5.7.8" in done.stdout, f"{mechanism}: {done.stdout[-900:]}")
    found = {event["mechanism"]: event["pin"] for event in events(provider.log(), "authenticated")}
    check(set(found) == {"PLAIN", "CRAM-MD5"}, found)
    # swaks has no EXTERNAL; the same key opens two accounts, so the client has to name one.
    context = ssl.create_default_context(cafile=str(box.path / "ca.pem"))
    context.load_cert_chain(certificate, key)
    with Smtp(provider.odmr_tls, tls=context) as client:
        client.reply()
        client.say("EHLO client.example")
        check(client.say("AUTH EXTERNAL =").startswith("535 5.7.8"), "two accounts, no name")
        check(client.say("AUTH EXTERNAL b25seQ==").startswith("235 "), "the account that was named")
    return "PLAIN and CRAM-MD5 with a certificate; 535 without a secret; EXTERNAL by name"


def customer_with(box, provider, certificate, key, name="acme"):
    """A customer that has a certificate, and no secret."""
    customer = Customer(box, provider.odmr, authority=box.path / "ca.pem", name=name)
    text = customer.config.read_text().replace(f'secret = "{secret(name)}"', f'certificate = "{certificate}"\nkey = "{key}"')
    customer.config.write_text(text)
    return customer


@scenario("key-change", needs=["openssl"])
def key_change(box):
    """Both sides change their keys while a customer calls by EXTERNAL: with two pins during the change, no call fails"""
    provider = Provider(box, certificates=Certificates(box))
    keys = [made(box, kind, 3) for kind in ("p256", "rsa", "ed25519")]
    names = [pins(box, certificate)[1] for certificate, _ in keys]
    account(provider, "acme", names[:1])
    provider.start()
    customer = customer_with(box, provider, *keys[0])
    stop, results = threading.Event(), []

    def call():
        while not stop.is_set():
            results.append(customer.pull())

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for old, new in ((0, 1), (1, 2)):
            for pinned in ([names[old], names[new]], [names[new]]):
                reloads = len(events(provider.log(), "reloaded"))
                account(provider, "acme", pinned)
                provider.process.send_signal(signal.SIGHUP)
                wait_until(lambda: len(events(provider.log(), "reloaded")) > reloads, "the reload")
                before = len(results)
                wait_until(lambda: len(results) >= before + 3, "calls")
                if len(pinned) == 2:
                    text = customer.config.read_text()
                    for of, to in zip(keys[old], keys[new]):
                        text = text.replace(f'"{of}"', f'"{to}"')
                    changed = box.write("changed.toml", text)
                    changed.replace(customer.config)
                    before = len(results)
                    wait_until(lambda: len(results) >= before + 3, "calls")
    finally:
        stop.set()
        caller.join()
    check(set(results) == {0}, f"{results}: {customer.log()[-600:]}")
    used = {event["pin"] for event in events(provider.log(), "authenticated", mechanism="EXTERNAL")}
    check(len(used) == 3, used)
    return f"{len(results)} calls, 3 keys"


@scenario("external-elsewhere", needs=["openssl"])
def external_elsewhere(box):
    """Our customer at a server with OpenSSL that asks for its certificate: TLS 1.2 and 1.3, each kind of key"""
    Certificates(box)
    calls = 0
    for kind in KINDS:
        certificate, key = made(box, kind, 3)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(box.path / "relay.pem", box.path / "relay.key")
            context.minimum_version = context.maximum_version = version
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(certificate)
            listener = box.keep(socket.create_server((LOOPBACK, 0)))
            heard = []

            def serve():
                with context.wrap_socket(listener.accept()[0], server_side=True) as peer:
                    heard.append(peer.getpeercert(binary_form=True))
                    lines = peer.makefile("rb")
                    ehlo = b"250-relay.example.net\r\n250-AUTH PLAIN EXTERNAL\r\n250 ATRN\r\n"
                    replies = [b"220 relay\r\n", ehlo, b"235 2.7.0 ok\r\n", b"453 no mail\r\n", b"221 bye\r\n"]
                    for reply in replies:
                        peer.sendall(reply)
                        heard.append(lines.readline())

            server = threading.Thread(target=serve)
            server.start()
            port = listener.getsockname()[1]
            customer = Customer(box, port, authority=box.path / "ca.pem", tls="implicit")
            text = customer.config.read_text()
            own = f'certificate = "{certificate}"\nkey = "{key}"'
            customer.config.write_text(text.replace(f'secret = "{secret("acme")}"', own))
            code = customer.pull()
            server.join(60)
            check(code == 0, f"{kind} {version}: {code} {customer.log()[-500:]}")
            der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
            check(heard[0] == der and heard[2] == b"AUTH EXTERNAL YWNtZQ==\r\n", f"{kind} {version}: {heard[1:]}")
            calls += 1
    return f"{calls} calls"
