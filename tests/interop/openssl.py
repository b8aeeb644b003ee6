"""openssl s_client on every listener: TLS 1.2 and 1.3 work, 1.1 is refused."""

import re

from harness import LOOPBACK, Certificates, Provider, check, scenario


@scenario("openssl", needs=["openssl"])
def openssl(box):
    """openssl s_client by STARTTLS and plain TLS: 1.2 and 1.3 work, 1.1 and 1.0 are refused"""
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
            # -crlf ends each line properly; ehlo is in small letters because s_client keeps Q and R for itself.
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
            check("Cipher is (NONE)" in text, f"{name} {version}: not refused: {text[-600:]}")
            alert = re.search(r"alert ([a-z ]+):", text)
            check(alert, f"{name} {version}: refused without an alert: {text[-600:]}")
            alerts.add(alert.group(1))
    return f"3 listeners x 4 versions; {' '.join(sorted(ciphers))}; 1.1 is refused by alert {', '.join(sorted(alerts))}"
