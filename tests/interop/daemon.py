"""`odmr pull --daemon`: when it calls, its signals, two providers; and the progress line of a call."""

import grp
import os
import pty
import pwd
import re
import signal
import threading
import time

from dovecot import ALICE
from handover import BERT, CAROL, being_tried, due, left_over
from harness import LOOPBACK, ODMR, PATIENCE, Customer, Provider, Smtp, check, events, scenario, thread_statuses, wait_until
from hop import Hop
from turning import SENDER, Turning

MESSAGE = b"Subject: x\r\n\r\nx\r\n"
BUSY, DONE = 75, 0
NEW_ADDRESSES = [f"127.77.{os.getpid() % 250}.{last}" for last in (77, 78)]  # come up on the loopback interface


def start_daemon(customer):
    process = customer.box.start(customer.log_name, ODMR, "pull", "--daemon", "-c", customer.config)
    wait_until(lambda: "event=next-call" in customer.log() or process.poll() is not None, "the daemon to begin")
    check(process.poll() is None, f"the daemon ended: {process.returncode}")
    return process


def rewrite(customer, old, new):
    text = customer.config.read_text()
    check(old in text, f"{customer.config} has no {old}")
    customer.config.write_text(text.replace(old, new))


def now(box, customer):
    return box.run(ODMR, "pull", "-c", customer.config, "--now")


def logged(customer, event, count=1):
    """The keys of the last line of that event, after `count` lines of it."""
    lines = lambda: events(customer.log(), event)
    wait_until(lambda: len(lines()) >= count, f"event={event} {count} times in the log")
    return lines()[-1]


@scenario("daemon-signals")
def daemon_signals(box):
    """SIGUSR1 and --now make the daemon call at once, one call at a time. SIGHUP reloads the file; a mistake in it changes nothing"""
    provider = Turning(box)
    schedule = '[schedule]\nevery = "1h"\n'
    customer = Customer(box, provider.port, tls="none", accept=[ALICE], more=schedule)
    process = start_daemon(customer)
    provider.called(1)
    logged(customer, "call")
    process.send_signal(signal.SIGUSR1)
    provider.called(2)
    logged(customer, "call", 2)
    done = now(box, customer)
    check(done.returncode == DONE, f"--now: exit {done.returncode}: {done.stdout}{done.stderr}")
    provider.called(3)
    logged(customer, "call", 3)

    # During a call: no second call begins, and a reload does not end it.
    provider.mail = True
    process.send_signal(signal.SIGUSR1)
    line = provider.line()
    second = box.run(ODMR, "pull", "-c", customer.config)
    check(second.returncode == BUSY, f"a second pull: exit {second.returncode}: {second.stdout}{second.stderr}")
    check("another call" in second.stdout + second.stderr, f"a second pull: {second.stdout}{second.stderr}")
    check(not line.knows(BERT), "bert has a mailbox already")
    rewrite(customer, f'"{ALICE}"', f'"{ALICE}", "{BERT}"')
    process.send_signal(signal.SIGHUP)
    check((reply := line.send(SENDER, [ALICE], MESSAGE)).startswith("250"), f"the session under way: {reply}")
    line.leave()
    logged(customer, "reloaded")
    logged(customer, "call", 4)
    process.send_signal(signal.SIGUSR1)
    line = provider.line()
    check(line.knows(BERT), "bert has no mailbox after the reload")
    line.leave()
    logged(customer, "call", 5)

    rewrite(customer, f'"{BERT}"', '"no address"')
    number = 1 + next(at for at, text in enumerate(customer.config.read_text().splitlines()) if "no address" in text)
    process.send_signal(signal.SIGHUP)
    failed = logged(customer, "reload-failed")
    check(f"pull.toml:{number}" in failed["error"] and "no address" in failed["error"], f"{failed}")
    process.send_signal(signal.SIGUSR1)
    line = provider.line()
    check(line.knows(ALICE) and line.knows(BERT), "the rules before the bad file are not in force")
    line.leave()
    logged(customer, "call", 6)
    check(len(customer.files()) == 1, f"{customer.files()}")

    process.send_signal(signal.SIGTERM)
    check((result := process.wait(10)) == 0, f"SIGTERM: exit {result}")
    provider.mail = False
    rewrite(customer, '"no address"', f'"{BERT}"')
    calls = provider.done
    done = now(box, customer)
    check(done.returncode == DONE, f"--now without a daemon: exit {done.returncode}: {done.stdout}{done.stderr}")
    check(provider.done == calls + 1, f"--now without a daemon: {provider.done - calls} calls")
    return f"{provider.done} calls, a second one at the same time: exit {second.returncode}"


@scenario("daemon-pauses")
def daemon_pauses(box):
    """While the provider is down, the pauses between calls grow; after the first successful call they are reset"""
    provider = Turning(box, away=True)
    schedule = '[schedule]\nevery = "1h"\nretry-first = "100ms"\nretry-max = "10s"\n'
    customer = Customer(box, provider.port, tls="none", accept=[ALICE], more=schedule)
    start_daemon(customer)
    wait_until(lambda: len(provider.times) >= 5, "five calls")
    times = provider.times[:5]
    pauses = [after - before for before, after in zip(times, times[1:])]
    check(min(pauses) >= 0.09, f"too short: {pauses}")
    check(pauses[-1] > 2 * min(pauses[:2]), f"the pauses do not grow: {pauses}")  # other work of the machine only adds time
    provider.away = False
    provider.called(1)
    logged(customer, "call", 6)
    for event, wanted in (("call-failed", 5), ("call", 6)):
        found = len(events(customer.log(), event))
        check(found == wanted, f"{event}: {found} times in the log, wanted {wanted}")
    results = [call["result"] for call in events(customer.log(), "call")]
    check(results == ["failed"] * 5 + ["done"], f"results of the calls in the log: {results}")
    return "pauses " + " ".join(f"{pause:.2f}" for pause in pauses) + " s"


@scenario("daemon-network", needs=["ip"], root=True)
def daemon_network(box):
    """A new address on an interface ends the pause after a failed call; a second address soon after it does so, too"""
    provider = Turning(box, away=True)
    schedule = '[schedule]\nevery = "1h"\nretry-first = "1h"\n'
    customer = Customer(box, provider.port, tls="none", accept=[ALICE], more=schedule)
    start_daemon(customer)
    logged(customer, "call-failed")
    for number, address in enumerate(NEW_ADDRESSES, 1):
        box.at_end(lambda address=address: box.run("ip", "address", "del", f"{address}/8", "dev", "lo"))
        provider.away = number < len(NEW_ADDRESSES)
        begin = time.monotonic()
        done = box.run("ip", "address", "add", f"{address}/8", "dev", "lo")
        check(done.returncode == 0, f"ip: {done.stderr}")
        if provider.away:
            logged(customer, "call-failed", 1 + number)
    provider.called(1, seconds=30)
    return f"called {time.monotonic() - begin:.2f} s later"


@scenario("daemon-handover")
def daemon_handover(box):
    """The daemon retries mail for a next hop without a call; mail that no next hop accepts does not keep the daemon busy"""
    provider = Turning(box, mail=True)
    hop = Hop(box.path / "hop.sock", after_content={BERT: ["452 4.2.2 not now"], CAROL: ["452 4.2.2 not now"]}).start(box)
    table = f'"{BERT}" = "{hop.address}"\n"{CAROL}" = "{hop.address}"\n'
    more = f'[mailboxes.deliver]\n"*" = "{hop.address}"\n{table}[schedule]\nevery = "1h"\n'
    customer = Customer(box, provider.port, tls="none", accept=[ALICE, BERT, CAROL], more=more)
    process = start_daemon(customer)
    line = provider.line()
    for recipient in (BERT, CAROL):
        check((reply := line.send(SENDER, [ALICE, recipient], MESSAGE)).startswith("250"), reply)
    line.leave()
    logged(customer, "call")
    check(len(left_over(customer)) == 2, f"wait for the hop: {left_over(customer)}")
    # Carol has a Maildir now, but a file is in its place; and one of the files in the queue is not a message.
    rewrite(customer, f'"{CAROL}" = "{hop.address}"\n', f'"{CAROL}" = "maildir:{box.path}/pull-mail/carol"\n')
    in_the_way = box.write("pull-mail/carol", "in the way")
    box.write("pull-mail/.handover/new/garbage", "garbage")
    due(customer)
    process.send_signal(signal.SIGHUP)
    # If the end of the attempt before comes now, the daemon finds its mail due again, and pauses for a minute.
    wait_until(lambda: hop.count(BERT) == 1, "the daemon to try again", seconds=100)
    logged(customer, "reloaded")
    wait_until(lambda: not being_tried(customer), "the attempts to end")
    in_the_way.unlink()
    for _ in range(20):  # reloads, so that it reads its queues
        before = len(events(customer.log(), "reloaded"))
        process.send_signal(signal.SIGHUP)
        logged(customer, "reloaded", before + 1)
    tried = events(customer.log(), "delivery", to=f"<{CAROL}>", status="deferred")
    attempts = len(tried) + len(events(customer.log(), "no-recipients"))
    wait_until(lambda: not being_tried(customer), "the attempts to end")
    due(customer)
    provider.mail = False
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: list(box.path.glob("pull-mail/carol/new/*")), "the message in carol's Maildir", seconds=100)
    check(attempts < 60, f"it was tried {attempts} times")
    check((hop.count(ALICE), hop.count(BERT), hop.count(CAROL)) == (2, 1, 0), f"{hop.messages}")
    wait_until(lambda: len(left_over(customer)) <= 1, "only the garbage to be left")


@scenario("two-providers", root=True)
def two_providers(box):
    """The daemon is started as root with [[provider]] twice: it fetches the mail of both, and the files belong to `user`"""
    owner = pwd.getpwnam("nobody")
    group = grp.getgrgid(owner.pw_gid)
    one = Provider(box, name="one", require_tls=False, customers={"acme": ["example.org"]}).start()
    two = Provider(box, name="two", require_tls=False, customers={"other": ["example.com"]}).start()
    for provider, recipient in ((one, ALICE), (two, "bob@example.com")):
        with Smtp(provider.inbound) as line:
            line.hello()
            check((reply := line.send(SENDER, [recipient], MESSAGE)).startswith("250"), reply)
    second = f"""[[provider]]
address = "{LOOPBACK}:{two.odmr}"
tls = "none"
name = "other"
secret = "the secret of other"

[provider.schedule]
every = "2h"

[mailboxes]"""
    customer = Customer(box, one.odmr, tls="none", head=f'user = "{owner.pw_name}"\ngroup = "{group.gr_name}"\n')
    rewrite(customer, "[provider]", "[[provider]]")
    rewrite(customer, "[mailboxes]", second)
    os.chown(customer.config, 0, group.gr_gid)  # it must read the file again, when it is no longer root
    customer.config.chmod(0o640)
    customer.root.mkdir()
    os.chown(customer.root, owner.pw_uid, group.gr_gid)
    process = start_daemon(customer)
    wait_until(lambda: len(customer.files()) == 2 and not one.held() and not two.held(), "the mail of both providers")
    for path in [customer.root, *customer.root.rglob("*")]:
        try:
            status = path.stat()
        except FileNotFoundError:  # a record that the daemon has just replaced
            continue
        check((status.st_uid, status.st_gid) == (owner.pw_uid, group.gr_gid), f"{path} belongs to {status.st_uid}:{status.st_gid}")
    identities = [
        re.search(rf"(?m)^{kind}:\s*(.*)", status).group(1).split()
        for _, status in thread_statuses(process.pid)
        for kind in ("Uid", "Gid", "Groups")
    ]
    check({word for words in identities for word in words} <= {str(owner.pw_uid), str(group.gr_gid)}, f"{identities}")
    rewrite(customer, '"@example.com"]', '"@example.com", "@example.net"]')
    process.send_signal(signal.SIGHUP)
    logged(customer, "reloaded")
    process.send_signal(signal.SIGTERM)
    check((result := process.wait(10)) == 0, f"SIGTERM: exit {result}")
    # A single call without the daemon calls both providers, too, and continues with the files of the other user.
    for provider, recipient in ((one, ALICE), (two, "bob@example.com")):
        with Smtp(provider.inbound) as line:
            line.hello()
            check((reply := line.send(SENDER, [recipient], MESSAGE)).startswith("250"), reply)
    check((result := customer.pull()) == 0, f"pull: exit {result}")
    check(len(customer.files()) == 4, f"{len(customer.files())} files")
    check({path.stat().st_uid for path in customer.files()} == {owner.pw_uid}, "files of another user")


class Screen:
    """A pseudo terminal, and the text that was written to it."""

    def __init__(self, box):
        self.octets = bytearray()
        self.master, self.slave = pty.openpty()
        box.at_end(lambda: os.close(self.master))
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        try:
            while some := os.read(self.master, 65536):
                self.octets += some
        except OSError:
            pass  # the last writer has closed it

    @property
    def text(self):
        return self.octets.decode("utf-8", "backslashreplace")


@scenario("progress")
def progress(box):
    """A slow call shows its progress on a terminal, but not with -q; at the end it lists rejected recipients with the reply, also with -q"""
    quiet = {"RUST_LOG": "warn"}
    big = b"Subject: big\r\n\r\n" + (b"z" * 70 + b"\r\n") * 20000
    runs = {}
    for name, words in (("terminal", []), ("quiet", ["-q"]), ("pipe", [])):
        provider = Turning(box, mail=True)
        customer = Customer(box, provider.port, tls="none", accept=[ALICE], file=name)
        screen = Screen(box) if name != "pipe" else None
        output = {"stdout": screen.slave, "stderr": screen.slave} if screen else {}
        process = box.start(f"{name}.log", ODMR, "pull", *words, "-c", customer.config, env=os.environ | quiet, **output)
        if screen:
            os.close(screen.slave)
        runs[name] = (provider.line(), process, screen, customer)
    for line, *_ in runs.values():
        for content in (MESSAGE, big):
            check((reply := line.send(SENDER, [ALICE], content)).startswith("250"), reply)
        check(not line.knows(BERT), "bert has a mailbox")
    screen = runs["terminal"][2]
    shown = lambda: [text for text in re.split(r"[\r\n]+", screen.text) if "2 messages" in text]
    wait_until(shown, f"a progress line: {screen.text!r}")
    during = shown()[-1]
    check(re.search(r"1[.,]4\d* ?M|14\d\d{5}", during), f"no octets in {during!r}")
    for line, process, *_ in runs.values():
        line.leave()
        check((result := process.wait(10)) == 0, f"exit {result}")
    rejected = f"from <{SENDER}> to <{BERT}>: rejected by us: 550 5.1.1 No such mailbox here\r\n"
    wait_until(lambda: runs["quiet"][2].text == rejected, f"-q shows {runs['quiet'][2].text!r}")
    screen.reader.join(PATIENCE)  # to the end: the summary has several lines
    for text in (screen.text, runs["pipe"][3].log()):
        end = text[text.rindex("2 messages") :]
        for word in ("1 recipient", "rejected", BERT, "550 5.1.1"):
            check(word in end, f"no {word!r} in {end!r}")
    log = runs["pipe"][3].log()
    check("\r" not in log and "\x1b" not in log and log.count("2 messages") == 1, f"not a terminal: {log!r}")
    return during.split("\x1b")[0]
