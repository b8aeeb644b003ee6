"""The storage threads: the disk of one customer must not delay another."""

import os
import pathlib
import re
import resource
import statistics
import threading
import time

from hop import Hop, Session
from harness import MIB, Provider, Server, Smtp, check, end, events, hang_up, scenario, thread_statuses, wait_until
from stalled import drop

# Replaces calls of the C library: fsync needs SLOW_FSYNC microseconds; while the file HANG exists, the removal of a message of
# a domain that begins with `hang` does not return, and so for HANG_LISTING and directories, as on a network file system whose server is down.
SHIM = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    if (getenv("SLOW_FSYNC")) usleep(atoi(getenv("SLOW_FSYNC")));
    return real(fd);
}
DIR *opendir(const char *path) {
    DIR *(*real)(const char *) = dlsym(RTLD_NEXT, "opendir");
    while (getenv("HANG_LISTING") && strstr(path, "/hang") && access(getenv("HANG_LISTING"), F_OK) == 0) usleep(5000);
    return real(path);
}
int unlink(const char *path) {
    int (*real)(const char *) = dlsym(RTLD_NEXT, "unlink");
    while (getenv("HANG") && strstr(path, "/hang") && strstr(path, "/new/") && access(getenv("HANG"), F_OK) == 0) usleep(5000);
    return real(path);
}
"""
HANGING = 24
MESSAGES = 200


def start_with_shim(box, provider, **environment):
    source = box.write("shim.c", SHIM)
    library = box.path / "shim.so"
    made = box.run("cc", "-shared", "-fPIC", "-o", library, source, "-ldl")
    check(made.returncode == 0, made.stderr)
    os.environ.update({"LD_PRELOAD": str(library)}, **environment)
    try:
        return provider.start()
    finally:
        for name in ("LD_PRELOAD", *environment):
            del os.environ[name]


def fill(provider, domain, count, mark="m", size=1000):
    for number in range(count):
        drop(provider, domain, size, f"17673230{number:05}.{mark}.local")


def fetch(provider, customer):
    """A whole call of a good customer. Returns the seconds from ATRN to the end, and the messages."""
    with Smtp(provider.odmr) as line:
        line.hello()
        line.log_in(customer)
        begin = time.monotonic()
        line.want("250", "ATRN")
        server = Server(line.socket, received=line.received)
        check(server.serve(), "no QUIT")
        return time.monotonic() - begin, server.messages


class Rejecting(Server):
    """A customer that rejects each recipient."""

    def until(self, mark):
        while (line := super().until(mark)) is not None and line[:4].upper() == b"RCPT":
            self.say("550 5.1.1 no such user")
        return line


def drop_errors(serve):
    try:
        serve()
    except (OSError, ValueError):
        pass


def turned(box, provider, customer, serves):
    """A turned session with its own thread, which ends with its connection."""
    line = Smtp(provider.odmr, seconds=120)
    line.turn(customer)
    box.keep(line.socket)
    server = serves(line.socket, received=line.received)

    threading.Thread(target=drop_errors, args=(server.serve,), daemon=True).start()
    return server


@scenario("storage-slow", needs=("cc",))
def storage_slow(box):
    """fsync needs 20 ms, and sixteen customers reject all their mail: another one gets 200 messages as fast as alone"""
    customers = {f"bad{number}": [f"bad{number}.example"] for number in range(16)}
    provider = Provider(box, require_tls=False, customers=customers | {"good": ["good.example"]})
    start_with_shim(box, provider, SLOW_FSYNC="20000")

    def good(mark):
        fill(provider, "good.example", MESSAGES, mark)
        seconds, messages = fetch(provider, "good")
        check(len(messages) == MESSAGES, f"{len(messages)} messages came")
        return seconds

    alone = statistics.median(good(f"a{number}") for number in range(3))
    for customer in customers:
        fill(provider, f"{customer}.example", 100)
        turned(box, provider, customer, Rejecting)
    beside = [good(f"b{number}") for number in range(3)]
    left = len(provider.held())
    check(left > 0, "the others had nothing left to reject")
    facts = f"alone {alone * 1000:.0f} ms, with them {', '.join(f'{one * 1000:.0f}' for one in beside)} ms; {left} left of theirs"
    # Other work of the machine only adds time.
    check(min(beside) <= 3 * alone + 0.1, facts)
    return facts


@scenario("storage-hangs", needs=("cc",))
def storage_hangs(box):
    """The disk of 24 customers hangs: other customers do not wait, and one more gets 451 to ATRN. When the disk works again, all mail is sent once"""
    hanging = {f"hang{number}": [f"hang{number}.example"] for number in range(HANGING + 2)}
    provider = Provider(box, require_tls=False, customers=hanging | {"good": ["good.example"]})
    flag = box.write("hang", "")
    start_with_shim(box, provider, HANG=str(flag))
    fill(provider, "good.example", MESSAGES, "a")
    alone, _ = fetch(provider, "good")
    for customer in hanging:
        fill(provider, f"{customer}.example", 20)
    names = list(hanging)
    servers = [turned(box, provider, customer, Server) for customer in names[:HANGING]]
    wait_until(lambda: any(jobs["jobs"] == str(HANGING) for jobs in events(provider.log(), "storage-blocked")), "24 that hang")
    threads = len(list(pathlib.Path(f"/proc/{provider.process.pid}/task").iterdir()))
    times = []
    for number in range(3):  # other work of the machine only adds time
        fill(provider, "good.example", MESSAGES, f"b{number}")
        seconds, messages = fetch(provider, "good")
        check(len(messages) == MESSAGES, f"{len(messages)} messages arrived with them")
        times.append(seconds)
    beside = min(times)
    check(beside <= 2 * alone + 0.2, f"alone {alone * 1000:.0f} ms, with them {beside * 1000:.0f} ms")
    # The disk of one more customer hangs, and then no turn is accepted.
    servers.append(turned(box, provider, names[HANGING], Server))
    wait_until(lambda: any(jobs["jobs"] == str(HANGING + 1) for jobs in events(provider.log(), "storage-blocked")), "one more")
    with Smtp(provider.odmr) as line:
        line.hello()
        line.log_in(names[HANGING + 1])
        line.want("451 4.3.2", "ATRN")
    flag.unlink()
    ended = lambda: len(events(provider.log(), "turn-ended", reason="done")) == HANGING + 5
    wait_until(ended, "the end of the sessions", seconds=30)
    counts = {len(server.messages) for server in servers}
    check(counts == {20}, f"messages of a session that did hang: {counts}")
    _, messages = fetch(provider, names[HANGING + 1])
    check(len(messages) == 20 and not provider.held(), f"{len(messages)} messages; {len(provider.held())} are left")
    idle = lambda: len(list(pathlib.Path(f"/proc/{provider.process.pid}/task").iterdir())) <= threads - HANGING + 4
    wait_until(idle, "the end of the threads that are not needed", seconds=20, pause=0.1)
    return f"alone {alone * 1000:.0f} ms, with 24 that hang {beside * 1000:.0f} ms; {threads} threads then"


@scenario("storage-hangs-stop", needs=("cc",))
def storage_hangs_stop(box):
    """The disk hangs and serve gets SIGTERM: it ends in time, and sends again only messages that it could not settle"""
    provider = Provider(box, require_tls=False, customers={"hang": ["hang.example"]}, more="[timeouts]\nshutdown = \"2s\"\n")
    flag = box.write("hang", "")
    start_with_shim(box, provider, HANG=str(flag))
    fill(provider, "hang.example", 50)
    first = turned(box, provider, "hang", Server)
    wait_until(lambda: events(provider.log(), "storage-blocked"), "a job that hangs")
    begin = time.monotonic()
    check(provider.stop() == 0, "its exit code")
    seconds = time.monotonic() - begin
    check(seconds < 8, f"it took {seconds:.1f} s")
    check(events(provider.log(), "storage-abandoned"), "not in the log")
    check(len(provider.held()) == 50, f"{len(provider.held())} files")
    provider.box.children.remove(provider.process)
    provider.start()
    _, again = fetch(provider, "hang")
    check(len(again) == 50 and not provider.held(), f"{len(again)} came, {len(provider.held())} are left")
    check(0 < len(first.messages) <= 12, f"{len(first.messages)} were accepted before")
    return f"ended after {seconds:.1f} s; {len(first.messages)} of 50 messages twice"


@scenario("storage-hangs-tidy", needs=("cc",))
def storage_hangs_tidy(box):
    """The daily tidying hangs on the disk of one customer: another one gets its mail, and SIGTERM ends serve"""
    provider = Provider(box, require_tls=False, customers={"hang": ["hang.example"], "good": ["good.example"]})
    for customer in provider.customers:
        fill(provider, f"{customer}.example", 3)
    start_with_shim(box, provider, HANG_LISTING=str(box.write("hang", "")))
    wait_until(lambda: any("Name:\ttidy\n" in status for _, status in thread_statuses(provider.process.pid)), "the tidying")
    _, messages = fetch(provider, "good")
    check(len(messages) == 3, f"{len(messages)} messages")
    begin = time.monotonic()
    check(provider.stop() == 0, "its exit code")
    return f"ended after {time.monotonic() - begin:.1f} s"


@scenario("storage-no-thread", needs=("strace",))
def storage_no_thread(box):
    """The system permits only one storage thread: a customer that rejects its mail and a busy one are both served, and the log reports it now and then"""
    customers = {"busy": ["busy.example"], "bad": ["bad.example"]}
    provider = Provider(box, require_tls=False, customers=customers).start()
    fill(provider, "busy.example", 3000)
    fill(provider, "bad.example", 20)
    begin = time.monotonic()
    tracer = trace_delivery(box, provider, "-e", "trace=clone3,clone", "-e", "inject=clone3,clone:error=EAGAIN:when=2+")
    busy = turned(box, provider, "busy", Server)
    turned(box, provider, "bad", Rejecting)
    wait_until(lambda: len(events(provider.log(), "turn-ended", reason="done")) == 2, "the ends of both", seconds=30)
    seconds = time.monotonic() - begin
    end(tracer, 2)
    tracer.wait(10)
    said = len(events(provider.log(), "no-thread"))
    check(len(busy.messages) == 3000 and not provider.held(), f"{len(busy.messages)} came, {len(provider.held())} are left")
    check(0 < said <= seconds + 1, f"logged {said} times in {seconds:.1f} s")
    return f"logged {said} times in {seconds:.1f} s"


@scenario("storage-descriptors", needs=("cc",))
def storage_descriptors(box):
    """24 sessions have too few descriptors: each message arrives, and no session ends as if the queue were empty"""
    customers = {f"few{number}": [f"few{number}.example"] for number in range(24)}
    provider = Provider(box, require_tls=False, customers=customers, more="[limits]\nconnections-per-address = 100\n").start()
    resource.prlimit(provider.process.pid, resource.RLIMIT_NOFILE, (100, 100))
    for customer in customers:
        fill(provider, f"{customer}.example", 30)
    wrong, came = [], []

    class Slow(Server):
        def data(self):
            time.sleep(0.02)
            return super().data()

    def call_again(customer):
        while True:
            try:
                with Smtp(provider.odmr) as line:
                    line.hello()
                    line.log_in(customer)
                    reply = line.say("ATRN")
                    if reply.startswith("453"):
                        break
                    if reply.startswith("250"):
                        server = Slow(line.socket, received=line.received)
                        server.serve()
                        came.extend(server.messages)
            except OSError:
                pass
            time.sleep(0.05)
        wrong.extend(file for file in provider.held() if f"/{customer}.example/" in str(file))

    callers = [threading.Thread(target=call_again, args=(customer,), daemon=True) for customer in customers]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    check(not wrong and len(came) == 720, f"{len(came)} of 720 came; 453 while there was {wrong[:3]}")
    log = provider.log()
    sent, early = dict.fromkeys(customers, 0), []
    for turn in events(log, "turn-ended"):
        sent[turn["account"]] += int(turn["sent"])
        early += [turn] if turn["reason"] == "done" and sent[turn["account"]] < 30 else []
    said = len(events(log, "unreadable"))
    check(not early and said < 720, f"ended as if there were no more: {early[:3]}; {said} lines of the log about it")
    return f"{len(events(log, 'turn-ended', reason='no descriptors are left'))} sessions ended early, {said} lines of the log about it"


def trace_delivery(box, provider, *words):
    """strace of the delivery thread alone."""
    threads = lambda: thread_statuses(provider.process.pid)
    thread = next(tid for tid, status in threads() if "Name:\tdelivery\n" in status)
    tracer = box.start("strace.log", "strace", "-y", "-s", "0", "-e", "signal=none", *words, "-o", box.path / "delivery.output", "-p", thread)
    wait_until(lambda: "TracerPid:\t0\n" not in dict(threads())[thread], "strace to attach")
    return tracer


# Calls that the delivery thread must not make: each may wait for a disk.
FILE_CALLS = r"open|openat|openat2|creat|stat|lstat|fstat|newfstatat|statx|access|faccessat2?|fsync|fdatasync|sync_file_range"
FILE_CALLS += r"|rename|renameat2?|link|linkat|unlink|unlinkat|mkdir|mkdirat|rmdir|getdents|getdents64|ftruncate|fallocate|utimensat|flock"


class Moody(Hop):
    """Accepts, defers and rejects recipients and contents by their local parts, and closes the connection at some contents."""

    def __init__(self):
        super().__init__(lmtp=False)

    def next(self, replies, recipient):
        local = recipient.split("@")[0]
        if replies is self.at_recipient:
            return {"no": "550 5.1.1 no", "full": "452 4.2.2 over quota"}.get(local)
        return {"spam": "554 5.7.1 spam", "later": "451 4.3.0 later"}.get(local)


class HangsUp(Server):
    """Accepts a content and does not reply."""

    def data(self):
        super().data()
        hang_up(self.socket)
        raise OSError("hung up")


@scenario("delivery-thread", needs=("strace",))
def delivery_thread(box):
    """strace of the delivery thread with accepted, rejected, deferred, in-doubt and large messages: it makes no call on a file"""
    customers = {"moody": ["moody.example"], "doubt": ["doubt.example"], "large": ["large.example"]}
    provider = Provider(box, require_tls=False, customers=customers).start()
    drop(provider, "moody.example", 1000)  # makes the directories
    for local in ("yes", "no", "full", "spam", "later") * 6:
        with Smtp(provider.inbound) as line:
            line.hello()
            parameters = " BODY=8BITMIME" if local == "spam" else ""
            to = [f"{local}@moody.example", "yes@moody.example"]
            line.want("250", f"MAIL FROM:<a@sender.example>{parameters}")
            for one in to:
                line.want("250", f"RCPT TO:<{one}> NOTIFY=SUCCESS,FAILURE")
            line.want("354", "DATA")
            line.socket.sendall("Subject: ä\r\n\r\ncontent\r\n.\r\n".encode())
            line.want("250")
    drop(provider, "doubt.example", 1000)
    drop(provider, "large.example", 24 * MIB)
    output, tracer = box.path / "delivery.output", trace_delivery(box, provider)
    turned(box, provider, "doubt", HangsUp)
    large = turned(box, provider, "large", Server)
    with Smtp(provider.odmr) as line:
        line.turn("moody")
        session = Session(line.socket, Moody())
        session.received = line.received
        session.serve()
    wait_until(lambda: len(events(provider.log(), "turn-ended")) == 3, "the ends of the turns", seconds=60)
    end(tracer, 2)
    tracer.wait(10)
    log, text = provider.log(), output.read_text(errors="backslashreplace")
    statuses = {one["status"] for one in events(log, "delivery")}
    check(statuses == {"sent", "deferred", "rejected", "in-doubt"}, f"only {statuses}")
    check(events(log, "dsn-sent") and len(large.messages) == 1, "no DSN, or no large message")
    lines = text.splitlines()
    calls = {line.split("(")[0] for line in lines}
    check(calls & {"write", "sendto", "writev"} and calls & {"read", "recvfrom"}, f"it does not send and receive: {calls}")
    files = [line for line in lines if re.match(rf"({FILE_CALLS})\(", line) or re.match(r"\w+\(\d+</", line)]
    # The C library reads that when it frees memory.
    files = [line for line in files if "/proc/sys/vm/overcommit_memory" not in line]
    check(not files, f"calls on files: {files[:5]}")
    return f"{len(lines)} calls: {' '.join(sorted(calls))}"


class Paced(Server):
    """A customer that needs some time for each message; records how long it waits for the next one."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.waits, self.ready = [], time.monotonic()

    def data(self):
        content = super().data()
        self.waits.append(time.monotonic() - self.ready)
        time.sleep(0.002)
        self.ready = time.monotonic()
        return content


def resident(provider):
    """Its resident memory in octets."""
    status = pathlib.Path(f"/proc/{provider.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


@scenario("storage-large")
def storage_large(box):
    """60,000 messages in one domain, and one message with 30,000 recipients: the oldest are sent first, and other customers do not wait"""
    count, recipients = 60_000, 30_000
    customers = {"big": ["big.example"], "head": ["h.example"], "good": ["good.example"]}
    provider = Provider(box, require_tls=False, customers=customers).start()
    fill(provider, "good.example", 3000)
    drop(provider, "big.example", 100)
    (provider.spool / "domains/big.example/new/1767323045.stall.local").unlink()
    directory = os.open(provider.spool / "domains/big.example/new", os.O_RDONLY)
    for number in (one * 7919 % count for one in range(count)):
        text = f"Return-Path: <a@sender.example>\nDelivered-To: u{number}@big.example\nSubject: x\n\nx\n".encode()
        name = f"1767323{number:06}.M{number}P1Q1.relay.example.net,S={len(text)},W={len(text) + 5}"
        file = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=directory)
        os.write(file, text)
        os.close(file)
    os.close(directory)
    drop(provider, "h.example", 100)
    lines = "".join(f"Delivered-To: u{number}@h.example\n" for number in range(recipients))
    (provider.spool / "domains/h.example/new/1767323045.stall.local").write_text(f"{lines}Subject: x\n\nx\n")
    good = turned(box, provider, "good", Paced)
    wait_until(lambda: len(good.waits) > 100, "the messages of another customer")
    before, memory = len(good.waits), resident(provider)
    with Smtp(provider.odmr, seconds=60) as line:
        line.hello()
        line.log_in("big")
        begin = time.monotonic()
        line.want("250", "ATRN")
        reply = time.monotonic() - begin
        big = Server(line.socket, received=line.received)
        threading.Thread(target=drop_errors, args=(big.serve,), daemon=True).start()
        wait_until(lambda: len(big.messages) > 5000, "messages of the large domain", seconds=60)
        grown = resident(provider) - memory
        hang_up(line.socket)
    numbers = [int(re.match(r"u(\d+)@", message.recipients[0])[1]) for message in big.messages]
    check(numbers == list(range(len(numbers))), f"not the oldest first: {numbers[:5]}")
    longest, before = max(good.waits[before:]), len(good.waits)
    with Smtp(provider.odmr, seconds=60) as line:
        begin = time.monotonic()
        line.turn("head")
        head = Server(line.socket, received=line.received)
        check(head.serve(), "no QUIT")
        seconds = time.monotonic() - begin
    check(len(head.messages) == 1 and len(head.messages[0].recipients) == recipients, "the long head")
    facts = f"ATRN answered after {reply * 1000:.0f} ms, memory +{grown / MIB:.1f} MiB, the other waited {longest * 1000:.0f} ms at most"
    facts += f"; {recipients} recipients in {seconds:.1f} s, it waited {max(good.waits[before:]) * 1000:.0f} ms"
    check(grown <= 8 * MIB and reply < 0.5 and longest < 0.5, facts)
    return facts


class Defers(Server):
    """Defers each content."""

    def say(self, *lines):
        super().say(*(line.replace("250 2.6.0 kept", "451 4.3.0 later") for line in lines))


@scenario("storage-domains")
def storage_domains(box):
    """An account with 1,000 domains: ATRN makes no directory and no lock file; mail of one domain is fetched, no lock file stays; few descriptors are used"""
    domains = [f"d{number}.example" for number in range(1000)]
    provider = Provider(box, require_tls=False, customers={"many": domains}).start()
    held = lambda: sorted(path.name for path in (provider.spool / "domains").glob("*"))

    def atrn(*want):
        with Smtp(provider.odmr) as line:
            line.hello()
            line.log_in("many")
            begin = time.monotonic()
            line.want(*want)
            return time.monotonic() - begin

    none = atrn("453", "ATRN")
    check(held() == [], f"made: {held()[:5]}")
    drop(provider, "d7.example", 1000)
    line = Smtp(provider.odmr)
    box.keep(line.socket)
    line.turn("many")
    # A session of other domains of the account would have the same lock.
    atrn("450 4.4.5", "ATRN d8.example")
    server = Server(line.socket, received=line.received)
    check(server.serve() and len(server.messages) == 1, "the message of the seventh domain")
    lock = provider.spool / "domains/d7.example/odmr.lock"
    wait_until(lambda: not lock.exists(), "the end of the lock")
    check(held() == ["d7.example"], f"made: {held()[:5]}")
    for domain in domains:
        drop(provider, domain, 100)
    # The session that defers all mail offers the message of the last domain too.
    resource.prlimit(provider.process.pid, resource.RLIMIT_NOFILE, (250, 250))
    with Smtp(provider.odmr) as line:
        line.hello()
        line.log_in("many")
        line.want("250", "ATRN")
        server = Defers(line.socket, received=line.received)
        check(server.serve() and len(server.messages) == 1000, f"{len(server.messages)} of 1000 messages were offered")
        # The lock is released before the connection ends.
        check(line.socket.recv(1) == b"", "octets after QUIT")
    with Smtp(provider.odmr) as line:
        line.hello()
        line.log_in("many")
        begin = time.monotonic()
        line.want("250", "ATRN")
        reply = time.monotonic() - begin
        server = Server(line.socket, received=line.received)
        check(server.serve() and len(server.messages) == 1000, f"{len(server.messages)} of 1000 messages")
    facts = f"ATRN without mail {none * 1000:.0f} ms, with mail in all domains {reply * 1000:.0f} ms"
    check(none < 0.5 and reply < 0.5, facts)
    return facts


class RejectsAllButOne(Rejecting):
    """Rejects each recipient but one, which it accepts last."""

    def until(self, mark):
        while (line := Server.until(self, mark)) is not None and line[:4].upper() == b"RCPT" and b"<known@" not in line:
            self.say("550 5.1.1 no such user")
        return line


def drop_from(provider, sender, domain, name, *recipients):
    """The same as `drop`, but from another sender."""
    drop(provider, domain, 0, name)
    to = "".join(f"Delivered-To: {recipient}@{domain}\n" for recipient in recipients)
    file = provider.spool / "domains" / domain / "new" / name
    file.write_text(f"Return-Path: <{sender}>\n{to}\nSubject: x\n\nHello.\n")


def addresses(field, files):
    """The addresses in this field of the files in `new` and `cur`."""
    texts = (file.read_text() for file in files if file.parent.name in ("new", "cur"))
    return sorted(re.search(rf"(?m)^{field}: <?([^>\s]+)", text).group(1) for text in texts)


@scenario("storage-postponed", needs=("cc",))
def storage_postponed(box):
    """fsync needs 20 ms, and four customers reject 1,100 messages and then accept one: 4,000 DSNs delay no other customer, and SIGKILL loses none"""
    bad = [f"bad{number}" for number in range(4)]
    customers = {name: [f"{name}.example"] for name in (*bad, "good")}
    accounts = dict.fromkeys(bad, 'soft-bounce = "2d"')
    provider = Provider(box, require_tls=False, customers=customers, accounts=accounts)
    start_with_shim(box, provider, SLOW_FSYNC="20000")
    senders = {name: [f"a@s{number}.{name}.example" for number in range(1101)] for name in bad}
    for name in bad:
        for number, sender in enumerate(senders[name]):
            to = ["known", "unknown"] if number == 1100 else ["unknown"]
            drop_from(provider, sender, f"{name}.example", f"17673230{number:05}.{name}.local", *to)
    servers = [turned(box, provider, name, RejectsAllButOne) for name in bad]
    wait_until(lambda: all(server.messages for server in servers), "the messages that are accepted", seconds=120)
    fill(provider, "good.example", MESSAGES)
    beside, messages = fetch(provider, "good")
    check(len(messages) == MESSAGES and beside < 2, f"{len(messages)} messages in {beside:.1f} s")
    # They have replied to QUIT, and their mail is locked until the last DSN is stored.
    with Smtp(provider.odmr) as line:
        line.hello()
        line.log_in("bad0")
        line.want("450", "ATRN")
    settled = lambda: [line for line in events(provider.log(), "delivery", status="sent") if line["to"].startswith("<known@bad")]
    wait_until(lambda: len(settled()) == len(bad), "the accepted messages to be settled", seconds=60)
    wait_until(lambda: len(events(provider.log(), "dsn-sent")) >= 100, "DSNs", seconds=60)
    provider.process.kill()
    provider.process.wait()
    held = addresses("Return-Path", provider.spool.glob("domains/bad*/*/*"))
    check(not any("s1100." in sender for sender in held), "the message that was accepted is offered again")
    told = addresses("To", provider.spool.glob("outgoing/@all/*/*"))
    check(len(told) == len(set(told)), "two DSNs for one message")
    lost = {sender for name in bad for sender in senders[name]} - set(held) - set(told)
    check(not lost, f"{len(lost)} lost: {sorted(lost)[:5]}")
    return f"with them {MESSAGES} messages in {beside * 1000:.0f} ms; {len(told)} DSNs before SIGKILL"
