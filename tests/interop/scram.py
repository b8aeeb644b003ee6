"""SCRAM-SHA-256 with other programs: gsasl at the provider, our customer's submission at Postfix with Dovecot's SASL."""

import os
import pty
import re
import signal
import socket
import termios
import threading

from harness import LOOPBACK, ODMR, Certificates, Customer, Provider, check, events, free_port, scenario, secret, serve_each, wait_until
from outgoing import NoMail, outgoing_table, queued, sendmail
from postfix import Postfix


def made(box, config, name, text=""):
    """The output of `odmr secret NAME -c FILE`; `text`: its input."""
    done = box.run(ODMR, "secret", name, "-c", config, input=text)
    check(done.returncode == 0, f"odmr secret: {done.stdout}{done.stderr}")
    return done.stdout


def hello_first(box, port):
    """A port for clients that send STARTTLS without EHLO, as gsasl does: they get the replies that follow an EHLO."""

    def serve(sock):
        with sock, socket.create_connection((LOOPBACK, port)) as provider:
            lines = provider.makefile("rb", buffering=0)
            greeting = lines.readline()
            provider.sendall(b"EHLO client.example\r\n")
            while lines.readline()[3:4] == b"-":
                pass
            sock.sendall(greeting)
            back = threading.Thread(target=pipe, args=(provider, sock), daemon=True)
            back.start()
            pipe(sock, provider)
            back.join(5)

    def pipe(source, to):
        try:
            while octets := source.recv(65536):
                to.sendall(octets)
            to.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    return serve_each(box, serve)[1]


@scenario("gsasl", needs=["gsasl"])
def gsasl(box):
    """gsasl as SCRAM client: with -PLUS by tls-exporter and without it, secrets in clear and verifiers, wrong secrets, no channel binding"""
    certificates = Certificates(box)
    customers = {"acme": ["example.org"], "beta": ["beta.example"]}
    provider = Provider(box, certificates=certificates, customers=customers).start()
    made(box, provider.config, "beta", secret("beta") + "\n")
    provider.process.send_signal(signal.SIGHUP)
    wait_until(lambda: events(provider.log(), "reloaded"), "the reload")

    port = hello_first(box, provider.odmr)

    def client(name, mechanism, *options, password=None):
        return box.run(
            *["gsasl", "--client", "--connect", f"{LOOPBACK}:{port}", "--smtp", "--starttls", "--hostname", "localhost"],
            *["--x509-ca-file", certificates.authority, "-m", mechanism, "-a", name, "-p", password or secret(name)],
            *["--no-client-first", *options],
            input="QUIT\n",
            seconds=20,
        )

    logins = 0
    for name in ("acme", "beta"):
        for mechanism, options in (("SCRAM-SHA-256-PLUS", []), ("SCRAM-SHA-256", ["--no-cb"]), ("PLAIN", [])):
            done = client(name, mechanism, *options)
            check(f"235 2.7.0 now authenticated as {name}" in done.stdout, f"{name} {mechanism}: {done.stdout[-900:]}{done.stderr[-900:]}")
            # A separate thread writes the log.
            wait_until(lambda: len(events(provider.log(), "authenticated")) > logins, "the login in the log")
            used = events(provider.log(), "authenticated")[-1]
            check((used["account"], used["mechanism"]) == (name, mechanism), used)
            logins += 1
            done = client(name, mechanism, *options, password="not the secret")
            check("535 5.7.8" in done.stdout and "235 2.7.0" not in done.stdout, f"{name} {mechanism}: {done.stdout[-900:]}")
    # beta has no secret in clear any more.
    done = client("beta", "CRAM-MD5")
    check("535 5.7.8" in done.stdout, f"CRAM-MD5: {done.stdout[-600:]}")
    done = client("acme", "CRAM-MD5")
    check("235 2.7.0" in done.stdout, f"CRAM-MD5: {done.stdout[-600:]}")
    stored = b"".join(path.read_bytes() for path in box.path.rglob("*.toml"))
    check(secret("beta").encode() not in stored, "the secret of beta is in a file")
    return f"{logins} logins"


def dovecot_auth(box, users):
    """Dovecot's SASL server on a socket; `users`: lines of its passwd-file."""
    directory = box.path / "sasl"
    box.write("sasl/users", users, mode=0o644)
    box.write(
        "sasl/dovecot.conf",
        f"""base_dir = {directory}/run
state_dir = {directory}/state
log_path = {box.path}/dovecot-auth.log
protocols =
ssl = no
auth_mechanisms = plain scram-sha-256
auth_verbose = yes
passdb {{
  driver = passwd-file
  args = {directory}/users
}}
userdb {{
  driver = static
  args = uid=5000 gid=5000 home=/nonexistent
}}
service auth {{
  unix_listener {directory}/auth {{
    mode = 0666
  }}
}}
""",
        mode=0o644,
    )
    directory.chmod(0o755)
    box.start("dovecot-master.log", "dovecot", "-F", "-c", directory / "dovecot.conf")
    wait_until(lambda: (directory / "auth").exists(), "Dovecot's socket")
    return directory / "auth"


@scenario("scram-submission", needs=["postfix", "dovecot", "doveadm"], root=True)
def scram_submission(box):
    """The customer submits mail to Postfix with Dovecot's SASL, which has only a verifier: by SCRAM-SHA-256, then by PLAIN because of `mechanisms`"""
    certificates = Certificates(box)
    verifier = box.run("doveadm", "pw", "-s", "SCRAM-SHA-256", "-p", "my own secret").stdout.strip()
    check(verifier.startswith("{SCRAM-SHA-256}4096,"), verifier)
    auth = dovecot_auth(box, f"adam:{verifier}\n")
    port = free_port()
    Postfix(
        box,
        f"""smtpd_sasl_auth_enable = yes
smtpd_sasl_type = dovecot
smtpd_sasl_path = {auth}
smtpd_tls_security_level = may
smtpd_tls_auth_only = yes
smtpd_tls_cert_file = {certificates.certificate}
smtpd_tls_key_file = {certificates.key}
smtpd_relay_restrictions = permit_sasl_authenticated, reject
default_transport = discard""",
        services=f"{LOOPBACK}:{port} inet n - n - - smtpd\ndiscard unix - - n - - discard\n",
    )
    provider = NoMail(box)
    facts = []
    for file, mechanisms, password, expected in (
        ("scram", "", "my own secret", "SCRAM-SHA-256"),
        ("plain", 'mechanisms = ["PLAIN"]', "my own secret", "PLAIN"),
        ("wrong", "", "another secret", None),
    ):
        more = f'submission = "localhost:{port}"\nca = "{certificates.authority}"\nname = "adam"\nsecret = "{password}"\n{mechanisms}'
        customer = Customer(box, provider.port, tls="none", file=file, more=outgoing_table(box, file, more))
        done = sendmail(box, customer, "-t", "-f", "adam@example.org", text="To: u@dest.example\nSubject: scram\n\nx\n")
        check(done.returncode == 0, f"sendmail: exit {done.returncode}: {done.stderr}")
        code = customer.pull()
        if expected:
            check(code == 0 and not queued(customer), f"{file}: {code}, {customer.log()[-700:]} {box.log('postfix.log')[-900:]}")
            used = lambda: re.findall(r"sasl_method=(\S+), sasl_username=adam", box.log("postfix.log"))
            wait_until(lambda: used()[-1:] == [expected], f"{file}: {expected} in the log of Postfix")  # postlogd writes it
            facts.append(expected)
        else:
            check(len(queued(customer)) == 1 and "535 5.7.8" in customer.log(), f"{file}: {code} {customer.log()[-700:]}")
    return ", ".join(facts) + "; a wrong secret waits"


@scenario("typed-secret")
def typed_secret(box):
    """odmr secret at a terminal asks twice, shows no secret, and restores the terminal, also after ^C"""
    provider = Provider(box, require_tls=False)
    file = box.path / "serve-customers.d/acme.toml"

    def at_terminal(typed, *arguments):
        """The text on the terminal, and the exit status."""
        process, terminal = pty.fork()
        if process == 0:
            os.execv(ODMR, [str(ODMR), "secret", *map(str, arguments)])
        shown = b""
        for question, line in typed:
            while question not in shown:
                shown += os.read(terminal, 1000)
            check(not termios.tcgetattr(terminal)[3] & termios.ECHO, "the terminal shows what is typed")
            os.write(terminal, line)
        try:
            while some := os.read(terminal, 1000):
                shown += some
        except OSError:
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        check(termios.tcgetattr(terminal)[3] & termios.ECHO, "the terminal does not show what is typed any more")
        os.close(terminal)
        return shown.decode(), status

    shown, status = at_terminal([(b"Secret", b"open sesame, please\n"), (b"again", b"open sesame, please\n")], "acme", "-c", provider.config)
    check(status == 0 and "sesame" not in shown and "SIGHUP" in shown, f"{status} {shown}")
    text = file.read_text()
    check(text.count("scram = ") == 1 and "secret = " not in text, text)
    shown, status = at_terminal([(b"Secret", b"open sesame, please\n"), (b"again", b"open sesame, Please\n")], "acme", "-c", provider.config)
    check(status == 65 and "not the same" in shown and file.read_text() == text, f"{status} {shown}")
    shown, status = at_terminal([(b"Secret", b"\n")])
    check(status == 0 and 'secret = "' in shown and 'scram = "' in shown, f"{status} {shown}")
    shown, status = at_terminal([(b"Secret", b"open \x03")], "acme", "-c", provider.config)
    check(status == 130 and file.read_text() == text, f"{status} {shown}")
    return "typed, mistyped, none, ^C"
