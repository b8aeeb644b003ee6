"""The subcommands, exit codes and signals."""

import os
import signal
import time

from harness import ODMR, Certificates, Customer, Failed, Provider, Smtp, check, free_port, scenario, wait_until

USAGE, UNAVAILABLE, TEMPORARY, PERMISSION, CONFIGURATION = 64, 69, 75, 77, 78  # sysexits


def code(box, *words, wanted, says=None):
    done = box.run(ODMR, *words)
    text = done.stdout + done.stderr
    check(done.returncode == wanted, f"odmr {' '.join(map(str, words))}: exit {done.returncode}, wanted {wanted}: {text}")
    for part in [says] if isinstance(says, str) else says or []:
        check(part in text, f"odmr {' '.join(map(str, words))}: no {part!r} in {text!r}")
    return done


@scenario("usage")
def usage(box):
    """help, version and wrong words of the command line"""
    for words in (["-h"], ["--help"], ["serve", "-h"], ["pull", "-h"], ["check", "-h"], ["demo", "-h"]):
        done = code(box, *words, wanted=0)
        check("odmr" in done.stdout, f"{words}: help is on standard output, got {done.stdout!r}")
    check(code(box, "--version", wanted=0).stdout.startswith("odmr "), "--version")
    lines = 0
    for words in (["sreve"], ["serve", "--nonsense"], ["serve"], []):
        done = code(box, *words, wanted=USAGE)
        check(done.stdout == "", f"{words}: errors go to standard error, got {done.stdout!r}")
        lines = max(lines, len(done.stderr.strip().splitlines()))
    check(lines <= 3, f"a wrong word gets {lines} lines")


@scenario("check")
def check_files(box):
    """check, and mistakes in the configuration: file, line, exit code 78"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates)
    customer = Customer(box, 366, authority=certificates.authority)
    code(box, "check", "-c", provider.config, wanted=0)
    code(box, "check", "-c", customer.config, wanted=0)

    text = provider.config.read_text()
    number = text.splitlines().index("[odmr]") + 4
    bad = box.write("bad.toml", text.replace("require-tls = true", "require-tls = 3"))
    code(box, "check", "-c", bad, wanted=1, says=f"bad.toml:{number}")
    code(box, "serve", "-c", bad, wanted=CONFIGURATION, says=f"bad.toml:{number}")
    unknown = box.write("unknown.toml", text.replace("require-tls", "requier-tls"))
    code(box, "check", "-c", unknown, wanted=1, says=[f"unknown.toml:{number}", "requier-tls"])
    code(box, "serve", "-c", unknown, wanted=CONFIGURATION)
    code(box, "serve", "-c", box.path / "absent.toml", wanted=CONFIGURATION, says="absent.toml")
    code(box, "serve", "-c", bad, "--inetd", "odmr", wanted=CONFIGURATION)

    text = customer.config.read_text()
    bad = box.write("bad-pull.toml", text.replace('tls = "starttls"', 'tls = "perhaps"'))
    number = text.splitlines().index('tls = "starttls"') + 1
    code(box, "check", "-c", bad, wanted=1, says=f"bad-pull.toml:{number}")
    code(box, "pull", "-c", bad, wanted=CONFIGURATION, says=f"bad-pull.toml:{number}")
    code(box, "pull", "-c", box.path / "absent.toml", wanted=CONFIGURATION)

    # A secret that every user can read is a mistake.
    os.chmod(customer.config, 0o644)
    code(box, "check", "-c", customer.config, wanted=1, says="pull.toml")
    code(box, "pull", "-c", customer.config, wanted=CONFIGURATION)
    account = box.path / "serve-customers.d/acme.toml"
    os.chmod(account, 0o644)
    # `serve` skips that file: one customer's mistake does not affect others.
    code(box, "check", "-c", provider.config, wanted=1, says="acme.toml")


@scenario("pull-exit-codes")
def pull_exit_codes(box):
    """The exit codes of pull: mail, no mail, wrong secret, wrong certificate, no listener"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    customer = Customer(box, provider.odmr, authority=certificates.authority)
    with Smtp(provider.inbound) as sender:
        sender.hello()
        check(sender.send("a@sender.example", ["eva@example.org"], b"Subject: x\r\n\r\nx\r\n")[:3] == "250", "sent")
    for expected, name in ((1, "mail"), (1, "no mail")):
        result = customer.pull()
        check(result == 0, f"{name}: exit {result}, wanted 0")
        check(len(customer.files()) == expected, f"{name}: {len(customer.files())} files")
    implicit = Customer(box, provider.odmr_tls, tls="implicit", authority=certificates.authority, file="implicit")
    check((result := implicit.pull()) == 0, f"implicit TLS: exit {result}")
    wrong = Customer(box, provider.odmr, authority=certificates.authority, password="wrong", file="wrong")
    check((result := wrong.pull()) == PERMISSION, f"wrong secret: exit {result}, wanted {PERMISSION}")
    unknown = Customer(box, provider.odmr, authority=certificates.authority, name="nobody", file="unknown")
    check((result := unknown.pull()) == PERMISSION, f"unknown name: exit {result}, wanted {PERMISSION}")
    untrusting = Customer(box, provider.odmr, file="untrusting")
    untrusted = untrusting.pull()
    check(untrusted != 0, "a certificate of an unknown authority was accepted")
    check("certificate" in untrusting.log(), "the log does not speak of the certificate")
    lonely = Customer(box, free_port(), tls="none", file="lonely")
    nobody = lonely.pull()
    check(nobody in (UNAVAILABLE, TEMPORARY), f"no listener: exit {nobody}, wanted {UNAVAILABLE} or {TEMPORARY}")
    return f"no listener: exit {nobody}; unknown authority: exit {untrusted}"


@scenario("sigterm")
def sigterm(box):
    """SIGTERM ends serve with exit code 0, when it is idle and with open sessions"""
    provider = Provider(box, require_tls=False).start()
    begin = time.monotonic()
    check((result := provider.stop()) == 0, f"idle: exit {result}")
    idle = time.monotonic() - begin
    provider.start()
    with Smtp(provider.inbound) as one, Smtp(provider.odmr) as other, Smtp(provider.inbound) as third:
        one.hello()
        other.hello()
        third.hello()
        third.want("250", "MAIL FROM:<a@sender.example>")
        begin = time.monotonic()
        provider.process.send_signal(signal.SIGTERM)
        for session in (one, other):
            check((reply := session.reply()).startswith("421"), f"an idle session got {reply!r}")
        try:  # after the command or message under way, which may be now
            third.want("250", "RCPT TO:<eva@example.org>")
            third.want("354", "DATA")
            third.socket.sendall(b"Subject: last\r\n\r\nlast\r\n.\r\n")
            third.want("250")
            counted = 1
        except (Failed, OSError):
            counted = 0
        result = provider.process.wait(30)
        busy = time.monotonic() - begin
    check(result == 0, f"with sessions: exit {result}")
    check(len(provider.held()) == counted, f"{counted} accepted, {len(provider.held())} held")
    try:
        Smtp(provider.inbound).close()
        raise Failed("still listening")
    except ConnectionRefusedError:
        pass
    return f"idle {idle * 1000:.0f} ms, with three sessions {busy * 1000:.0f} ms, last transaction accepted: {bool(counted)}"


@scenario("busy")
def busy(box):
    """A second turn gets 450 4.4.5 while the first has the domain; the mail is still held after the first one has closed the connection"""
    provider = Provider(box, require_tls=False).start()
    with Smtp(provider.inbound) as sender:
        sender.hello()
        check(sender.send("a@sender.example", ["eva@example.org"], b"Subject: x\r\n\r\nx\r\n")[:3] == "250", "sent")
    customer = Customer(box, provider.odmr, tls="none")
    with Smtp(provider.odmr) as first:
        first.turn("acme")
        with Smtp(provider.odmr) as second:
            second.hello()
            second.log_in("acme")
            second.want("450 4.4.5", "ATRN")
        result = customer.pull()
        check(result == TEMPORARY, f"pull while busy: exit {result}, wanted {TEMPORARY}")
    wait_until(lambda: customer.pull() == 0, "a pull after the first customer hung up")
    check(len(customer.files()) == 1 and not provider.held(), "the message did not come")


@scenario("demo")
def demo(box):
    """demo succeeds in less than 5 s and shows the turn"""
    begin = time.monotonic()
    done = box.run(ODMR, "demo", cwd=box.path)
    seconds = time.monotonic() - begin
    text = done.stdout + done.stderr
    check(done.returncode == 0, f"exit {done.returncode}: {text[-500:]}")
    check(seconds < 5, f"{seconds:.1f} s")
    for part in ("C: ", "P: ", "ATRN", "turn"):
        check(part in text, f"no {part!r} in its output")
    for line in ("C: ATRN", "== turn ==", "C: RCPT TO:<eva@example.org>", "P: RCPT TO:<eva@example.org>"):
        times = text.splitlines().count(f"    {line}")
        check(times == 1, f"{line!r} is {times} times in its output")
    left = [file.name for file in box.path.iterdir()]
    check(not left, f"left over: {left}")
    return f"{seconds * 1000:.0f} ms, {len(text.splitlines())} lines"
