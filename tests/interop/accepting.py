"""The disk fails at each system call that accepts a message: on port 25, in the customer's receiver, in `odmr send`.

What must hold: the sender gets 452 (disk full), 451, or an exit code; no reader sees a rejected message and no file of
it is left; an
accepted message is delivered once; the next message is accepted.
"""

import collections
import os
import shutil

from handover import receive
from harness import ODMR, Customer, Provider, check, events, scenario, wait_until
from faults import SMALL, Sender, files, names
from moments import ERRORS, Tracer, injected, moments, strace
from settling import OURS, Provides, numbered
from world import outgoing_table, queued

TEMPORARY = 75  # EX_TEMPFAIL
NOT_QUEUED = (73, 74, TEMPORARY)  # EX_CANTCREAT, EX_IOERR
ROOM = ("ENOSPC", "EDQUOT")


def injections(found):
    """Each moment with one of the errors in turn: the injection, the error, and its description."""
    check(len(found) >= 4, f"hardly any moments: {found}")
    for number, (call, which, rest) in enumerate(found):
        error = ERRORS[number % len(ERRORS)]
        yield number, f"{call}:error={error}:when={which}", error, f"{error} of {call} {which} ({rest.strip()[-90:]})"


def fits(reply, error):
    """RFC 5321 section 4.2.3: 452 insufficient system storage, 451 local error in processing."""
    return reply.startswith("452" if error in ROOM else "451")


class Failures(list):
    """Collects all failures: several together explain more than the first."""

    def note(self, condition, text):
        if not condition:
            self.append(text)

    def check(self, count):
        check(not self, f"{len(self)} of {count} faults: " + "; ".join(self))


@scenario("inbound-disk-fails", needs=["strace"], root=True)
def inbound_disk_fails(box):
    """Each system call that accepts a message on port 25 fails, with new directories: the client gets 451 or 452, and the next message is held"""
    provider = Provider(box, require_tls=False).start()
    customer = Customer(box, provider.odmr, tls="none")

    def message(name, inject):
        shutil.rmtree(provider.spool / "domains/example.org", ignore_errors=True)
        with Tracer(box, provider.process.pid, inject) as tracer, Sender(provider) as sender:
            return sender.message(name, SMALL), tracer.output.read_text()

    for _ in range(2):
        reply, _ = message("rehearsal", None)
        check(reply.startswith("250"), f"the rehearsal: {reply}")
    found = moments(box.path / "strace.output", provider.spool)
    failures, hits, wrong = Failures(), 0, collections.Counter()
    for number, inject, error, step in injections(found):
        shutil.rmtree(provider.spool / "domains/example.com", ignore_errors=True)
        reply, output = message("faulty", inject)
        hits += "(INJECTED)" in output
        seen, left = names(files(provider, "new", "cur")), files(provider, "tmp")
        if "(INJECTED)" in output:
            failures.note(fits(reply, error) or reply.startswith("250"), f"{step}: {reply}")
        failures.note(seen["faulty"] == 2 * reply.startswith("250"), f"{step}: {reply}, and {seen} is seen")
        failures.note(not left, f"{step}: left in tmp: {left}")
        check(provider.process.poll() is None, f"{step}: serve ended")
        with Sender(provider) as sender:
            after = sender.message("next", SMALL)
        failures.note(after.startswith("250"), f"{step}: the next one: {after}")
        check((code := customer.pull()) == 0, f"{step}: pull: exit {code}")
        wanted = {"next": 2, "faulty": 2} if reply.startswith("250") else {"next": 2}
        came = names(customer.files())
        failures.note(came == wanted, f"{step}: {reply}, and the customer has {came}")
        shutil.rmtree(customer.root)
        wrong[reply[:3]] += 1
    check(hits >= len(found) // 2, f"only {hits} of {len(found)} faults came to be")
    failures.check(len(found))
    return f"{hits} faults, replies {dict(wrong)}"


@scenario("receiver-disk-fails", needs=["strace"], root=True)
def receiver_disk_fails(box):
    """Each system call of the customer that accepts a message for two new mailboxes fails: the provider gets 451 or 452, and the call continues"""
    provider = Provider(box, require_tls=False).start()
    customer = Customer(box, provider.odmr, tls="none")
    output = box.path / "strace.output"

    def call(number, inject):
        two = [f"{one}{number}@example.org" for one in ("eva", "bert")]
        receive(provider, [(two, numbered(f"two-{number}-x")), (["last@example.org"], numbered(f"last-{number}-x"))])
        words = strace(output, inject)
        process = box.start(customer.log_name, *words, ODMR, "pull", "-c", customer.config)
        code = process.wait(30)
        box.children.remove(process)
        return code

    for number in (9000, 9001):
        check((code := call(number, None)) == 0, f"the rehearsal: exit {code}")
    found = moments(output, customer.root)
    failures, hits, codes, twice = Failures(), 0, collections.Counter(), 0
    for number, inject, error, step in injections(found):
        before = len(provider.log())
        code = call(number, inject)
        codes[code] += 1
        hit = injected(output)
        hits += bool(hit)
        # The number of its writes to the socket varies. If one of them fails, the call ends with a message in doubt.
        cut = any("<socket:" in one.rest or "<TCP" in one.rest for one in hit)
        turn_ended = lambda: events(provider.log()[before:], "turn-ended")
        cut or wait_until(turn_ended, f"{step}: the end of the turn")
        deferred = events(provider.log()[before:], "delivery", status="deferred")
        wanted = TEMPORARY if deferred or cut else 0
        failures.note(code == wanted, f"{step}: exit {code}, {len(deferred)} deferred; what failed: {hit}")
        failures.note(len({line["id"] for line in deferred}) <= 1, f"{step}: the session did not go on: {deferred}")
        for line in deferred:
            failures.note(cut or fits(line["reply"], error), f"{step}: {line['reply']}")
        left = list(customer.root.rglob("tmp/*"))
        failures.note(not left, f"{step}: left in tmp: {left}")
        if provider.held():
            check((code := customer.pull()) == 0, f"{step}: pull: exit {code}")
        failures.note(not provider.held(), f"{step}: held: {provider.held()}")
        came = names(customer.files())
        failures.note(1 <= came[f"last-{number}-x"] <= 1 + cut, f"{step}: the other message: {came}")
        failures.note(2 <= came[f"two-{number}-x"] <= 4, f"{step}: the message: {came}")
        twice += came[f"two-{number}-x"] > 2
        shutil.rmtree(customer.root)
        # As in the second rehearsal, only the directories of mailboxes are missing.
        for name in ("example.org", ".odmr"):
            (customer.root / name).mkdir(parents=True)
    check(hits >= len(found) // 2, f"only {hits} of {len(found)} faults came to be")
    failures.check(len(found))
    return f"{hits} faults, {twice} twice, exits {dict(codes)}"


@scenario("send-disk-fails", needs=["strace"], root=True)
def send_disk_fails(box):
    """Each system call by which `odmr send` queues a message fails: it exits with 73 to 75 and queues nothing, or with 0 and the message is sent"""
    hop = Provides().start(box)
    hop.moody = False
    customer = Customer(box, hop.port, tls="none", more=outgoing_table(box))
    output = box.path / "strace.output"
    queue = box.path / "pull-queue"

    def submit(number, inject):
        shutil.rmtree(queue, ignore_errors=True)
        words = [*strace(output, inject), ODMR, "send", "-f", OURS, "yes@dest.example", "first@dest.example"]
        environment = os.environ | {"ODMR_CONFIG": str(customer.config)}
        return box.run(*words, input=f"Subject: send-{number}-x\n\nx\n", env=environment)

    for number in (9000, 9001):
        done = submit(number, None)
        check(done.returncode == 0, f"the rehearsal: {done.stderr}")
    found = moments(output, queue, box.path)
    failures, hits, codes = Failures(), 0, collections.Counter()
    for number, inject, error, step in injections(found):
        done = submit(number, inject)
        codes[done.returncode] += 1
        hits += "(INJECTED)" in output.read_text()
        failures.note(done.returncode in (0, *NOT_QUEUED), f"{step}: exit {done.returncode}: {done.stderr}")
        waiting, left = len(queued(customer)), list(queue.rglob("tmp/*"))
        failures.note(waiting == (done.returncode == 0), f"{step}: exit {done.returncode}, {waiting} queued")
        failures.note(not left, f"{step}: left in tmp: {left}")
        check((code := customer.pull()) == 0, f"{step}: pull: exit {code}")
        times = hop.counts()[f"send-{number}-x", "yes"]
        failures.note(times == (done.returncode == 0), f"{step}: exit {done.returncode}, sent {times} times")
    check(hits >= len(found) // 2, f"only {hits} of {len(found)} faults came to be")
    failures.check(len(found))
    return f"{hits} faults, exits {dict(codes)}"
