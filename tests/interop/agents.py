"""Three delivery agents store mail in the held Maildir, each called by pipe(8) of a Postfix."""

import os
import pwd

from harness import Certificates, Customer, Provider, check, field, scenario, wait_until
from postfix import Postfix, message

# The reverse paths that Postfix gets, and the Return-Path that the customer's mailbox must have. For <>, pipe(8) writes
# <MAILER-DAEMON>.
SENDERS = {
    "lester@sender.example": "<lester@sender.example>",
    '"les ter"@sender.example': '<"les ter"@sender.example>',
    "": "<>",
}
RECIPIENTS = ("eva@example.org", "adam@example.org")
DOVECOT = "mail_location = maildir:{held}\nlog_path = /dev/stderr\nbase_dir = {box.path}/agents\nssl = no\n"


@scenario("agents", needs=["postfix", "sendmail", "maildrop", "procmail", "doveadm"], root=True)
def agents(box):
    """maildrop, procmail and Dovecot's LDA deliver into the held Maildir, and pull fetches the mail"""
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates).start()
    held = provider.spool / "domains/example.org"
    nobody = pwd.getpwnam("nobody")
    for path in (held, *(held / name for name in ("tmp", "new", "cur"))):
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    for path in (provider.spool, provider.spool / "domains"):
        path.chmod(path.stat().st_mode | 0o011)
    box.write("agents/maildrop", f'to "{held}"\n', mode=0o600)
    os.chown(box.path / "agents/maildrop", nobody.pw_uid, nobody.pw_gid)
    box.write("agents/procmail", f":0\n{held}/\n", mode=0o644)
    box.write("agents/dovecot", DOVECOT.format(held=held, box=box), mode=0o644)
    (box.path / "agents").chmod(0o755)
    # Flags: the lines "From ", Return-Path, Delivered-To, X-Original-To.
    agents = {
        "maildrop": f"/usr/bin/maildrop {box.path}/agents/maildrop",
        "procmail": f"/usr/bin/procmail -f ${{sender}} -m {box.path}/agents/procmail",
        "dovecot": f"/usr/lib/dovecot/dovecot-lda -e -c {box.path}/agents/dovecot -f ${{sender}}",
    }
    line = "{} unix - n n - 1 pipe\n  flags=FRDO user=nobody argv={}\n"
    limit = "".join(f"{agent}_destination_recipient_limit = 1\n" for agent in agents)
    postfix = Postfix(
        box,
        f"virtual_mailbox_domains = example.org\nvirtual_mailbox_maps = static:x\n{limit}",
        "".join(line.format(*agent) for agent in agents.items()),
    )
    for number, agent in enumerate(agents):
        box.run("postconf", "-c", postfix.directory, f"virtual_transport={agent}")
        box.run("postfix", "-c", postfix.directory, "reload")
        for sender in SENDERS:
            postfix.send(sender, RECIPIENTS, message(number))
        wanted = (number + 1) * len(SENDERS) * len(RECIPIENTS)
        wait_until(lambda: len(provider.held()) >= wanted, f"{wanted} held files, the last by {agent}", seconds=60)
    first_lines = [path.read_bytes().split(b" ", 1)[0] for path in provider.held()]
    check(b"From" in first_lines and b"Return-Path:" in first_lines, f"the agents write {first_lines}")
    customer = Customer(box, provider.odmr, authority=certificates.authority)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(not provider.held(), f"{len(provider.held())} files are left in the spool")
    came = []
    for path in customer.files():
        file = path.read_bytes()
        number = int(field(file, "Subject").split()[-1])
        came.append((number, field(file, "Delivered-To"), field(file, "Return-Path")))
        check(file.count(b"Delivered-To:") == file.count(b"Return-Path:") == 1, f"two envelopes: {file[:600]!r}")
        check(b"\nFrom " not in file[:600], f"the first line of an mbox in the header: {file[:600]!r}")
    paths = [(number, to, path) for number in range(len(agents)) for to in RECIPIENTS for path in SENDERS.values()]
    check(sorted(came) == sorted(paths), f"{came}")
    return f"{len(came)} files by {len(agents)} agents, all fetched"
