"""openssl s_client on each listener, openssl s_server as the peer of a call: versions, kinds of keys, pins, alerts."""

import hashlib
import re
import ssl
import subprocess

from harness import LOOPBACK, Certificates, Customer, Provider, check, free_port, scenario, wait_until


@scenario("openssl", needs=["openssl"])
def openssl(box):
    """openssl s_client by STARTTLS and by implicit TLS: TLS 1.2 and 1.3 work, 1.1 and 1.0 are rejected"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    listeners = {
        "inbound": (provider.inbound, ["-starttls", "smtp"]),
        "odmr": (provider.odmr, ["-starttls", "smtp"]),
        "odmr-tls": (provider.odmr_tls, []),
    }
    ciphers, alerts = set(), set()
    for name, (port, options) in listeners.items():

        def client(*version):
            # -crlf ends each line with CRLF; ehlo is in lower case because s_client interprets Q and R itself.
            return box.run(
                *["openssl", "s_client", "-connect", f"{LOOPBACK}:{port}", "-servername", "localhost", "-CAfile"],
                *[certificates.authority, "-verify_return_error", "-verify_hostname", "localhost", "-crlf", "-ign_eof"],
                *[*options, *version],
                input="ehlo client.example\nquit\n",
                seconds=20,
            )

        for version, wanted in (("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")):
            done = client(version)
            text = done.stdout + done.stderr
            found = re.search(r"New, (TLSv1\.\d), Cipher is (\S+)", text)
            check(found and found.group(1) == wanted, f"{name} {version}: {text[-600:]}")
            check("Verification: OK" in text, f"{name} {version}: not verified")
            check("250-relay.example.net" in text and "\n221 " in text, f"{name} {version}: no dialogue: {text[-600:]}")
            check("250-STARTTLS" not in text.split("---")[-1], f"{name} {version}: STARTTLS offered under TLS")
            if name != "inbound":
                check(re.search(r"(?m)^250[- ]AUTH .*CRAM-MD5.*PLAIN", text), f"{name} {version}: no AUTH under TLS")
            ciphers.add(found.group(2))
        for version in ("-tls1_1", "-tls1"):
            done = client(version, "-cipher", "ALL:@SECLEVEL=0")
            text = done.stdout + done.stderr
            check("Cipher is (NONE)" in text, f"{name} {version}: not rejected: {text[-600:]}")
            alert = re.search(r"alert ([a-z ]+):", text)
            check(alert, f"{name} {version}: rejected without an alert: {text[-600:]}")
            alerts.add(alert.group(1))
    return f"3 listeners x 4 versions; {' '.join(sorted(ciphers))}; 1.1 is rejected by alert {', '.join(sorted(alerts))}"


# Clients send the host that they connect to as server name indication (RFC 6066 section 3 permits names only).
NAMES = ["127.0.0.1", "2001:db8::1", "relay_1.example.net", "relay.example.net."]

CURVE = ["-algorithm", "EC", "-pkeyopt"]
KEYS = {
    "rsa": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
    "p256": [*CURVE, "ec_paramgen_curve:P-256"],
    "p384": [*CURVE, "ec_paramgen_curve:P-384"],
    "ed25519": ["-algorithm", "ED25519"],
    "p521": [*CURVE, "ec_paramgen_curve:P-521"],
    "rsa-1024": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"],
}


def made(box, kind, version):
    """A self-signed certificate of X.509 version 1 or 3, and its key."""
    key, request, certificate = (box.path / f"{kind}-{version}.{end}" for end in ("key", "csr", "pem"))
    signing = ["x509", "-req", "-in", request, "-signkey", key, "-days", "2", "-out", certificate]
    if version == 3:
        signing += ["-extfile", box.write("names.ext", f"subjectAltName=IP:{LOOPBACK}\n")]
    for command in (
        ["genpkey", *KEYS[kind], "-out", key],
        ["req", "-new", "-key", key, "-subj", f"/CN={LOOPBACK}", "-out", request],
        signing,
    ):
        done = box.run("openssl", *command)
        check(done.returncode == 0, f"openssl: {done.stderr}")
    return certificate, key


def pins(box, certificate):
    """The two values of `pin`, computed as the error about a wrong pin describes."""
    octets = ssl.PEM_cert_to_DER_cert(certificate.read_text())
    command = f"openssl x509 -in {certificate} -noout -pubkey | openssl pkey -pubin -outform der | openssl sha256"
    spki = box.run("sh", "-c", command)
    return f"sha256:{hashlib.sha256(octets).hexdigest()}", f"spki-sha256:{spki.stdout.split()[-1]}"


def call(box, label, files, trust, version):
    """A call to an s_server with a certificate, which only sends the greeting 421. Returns the output of both."""
    certificate, key = files
    port, log = free_port(), f"s_server-{label}.log"
    command = ["openssl", "s_server", "-accept", f"{LOOPBACK}:{port}", "-cert", certificate, "-key", key, version]
    server = box.start(log, *command, "-cipher", "DEFAULT:@SECLEVEL=0", stdin=subprocess.PIPE)
    wait_until(lambda: "ACCEPT" in box.log(log), "s_server listens")
    server.stdin.write(b"421 not now\n")
    server.stdin.flush()
    customer = Customer(box, port, tls="implicit", file=f"pull-{label}")
    customer.config.write_text(customer.config.read_text().replace("\nname = ", f"\n{trust}\nname = ", 1))
    customer.pull()
    wait_until(lambda: re.search("DONE|ERROR\n.+|shut down SSL", box.log(log)), "s_server has noticed the end")
    server.kill()
    return customer.log(), box.log(log)


@scenario("openssl-keys", needs=["openssl"])
def openssl_keys(box):
    """openssl s_server with each kind of key, of X.509 version 1 and 3, by TLS 1.2 and 1.3: calls work; a wrong pin ends with an alert"""
    calls = 0
    for kind in KEYS:
        for x509 in (1, 3):
            files = made(box, kind, x509)
            certificate, key_only = pins(box, files[0])
            for version in ("-tls1_2", "-tls1_3"):
                for number, trust in enumerate((f'pin = "{certificate}"', f'pin = "{key_only}"', f'ca = "{files[0]}"')):
                    label = f"{kind}-{x509}{version}-{number}"
                    said, server = call(box, label, files, trust, version)
                    calls += 1
                    if kind in ("p521", "rsa-1024"):
                        check("EC on P-256 or P-384" in said, f"{label}: the error names no kind of key: {said}")
                    else:
                        check("421 not now" in said, f"{label}: {said}")
            if kind == "rsa":
                said, server = call(box, f"wrong-{x509}", files, f'pin = "{certificate[:-8]}00000000"', "-tls1_3")
                check(certificate in said and key_only in said, f"both pins are in the error: {said}")
                check("alert certificate unknown" in server, f"no alert at the peer: {server[-600:]}")
    provider = Provider(box, certificates=Certificates(box)).start()
    for name in NAMES:
        for version in ("-tls1_2", "-tls1_3"):
            done = box.run(
                *["openssl", "s_client", "-connect", f"{LOOPBACK}:{provider.odmr_tls}", "-servername", name, version],
                *["-crlf", "-ign_eof"],
                input="quit\n",
                seconds=20,
            )
            check("\n221 " in done.stdout, f"{name} {version}: {(done.stdout + done.stderr)[-600:]}")
    return f"{calls} calls with {len(KEYS)} kinds of keys; {len(NAMES)} names"
