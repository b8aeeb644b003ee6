"""The size of the program, its start time, and its memory when it is idle. `make size` prints them; doc/size.md has the
figures."""

import os
import pathlib
import statistics
import subprocess
import time

from harness import LOOPBACK, ODMR, Certificates, Customer, Provider, check, free_port, scenario, wait_until
from world import outgoing_table

STARTS = 21
LOOKS = 5  # the system chooses other addresses each time, and maps other pages: a tenth of a MiB
MOST_OCTETS = 5_000_000  # of the program's file
MOST_KIB = 6 * 1024  # resident memory of an idle process, including the part of the program's file that is in memory


def milliseconds_to_ready(*command):
    """The time from the start of a daemon to its newline on --ready-fd, and from SIGTERM to its end."""
    ready, given = os.pipe()
    begin = time.monotonic()
    process = subprocess.Popen([*command, "--ready-fd", str(given)], pass_fds=[given], stderr=subprocess.DEVNULL)
    os.close(given)
    is_ready = os.read(ready, 1) == b"\n"
    milliseconds = (time.monotonic() - begin) * 1000
    os.close(ready)
    process.terminate()
    code = process.wait()
    check(is_ready and code == 0, f"{' '.join(map(str, command))} was not ready, or ended with {code}")
    return milliseconds


def resident_kib(pid):
    rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    values = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    return values["Rss"], values["Pss"], values["Anonymous"]


def idle_kib(box, log, command):
    """The memory of a daemon that listens. Then it is stopped."""
    process = box.start(log, *command)
    wait_until(lambda: "event=listening" in box.log(log), "a listener")
    found = resident_kib(process.pid)
    process.terminate()
    check(process.wait() == 0, f"{log}: not a good end")
    return found


@scenario("size")
def size(box):
    """The program has less than 5,000,000 octets; an idle provider and an idle customer have less than 6 MiB of memory each"""
    octets = os.path.getsize(ODMR)
    check(octets <= MOST_OCTETS, f"the program has {octets} octets")
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates)
    customer = Customer(box, free_port(), authority=certificates.authority, more=outgoing_table(box, more=f'listen = ["{LOOPBACK}:0"]'))
    commands = {"serve": [ODMR, "serve", "-c", provider.config], "pull --daemon": [ODMR, "pull", "-c", customer.config, "--daemon"]}
    facts = [f"{octets} octets"]
    for name, command in commands.items():
        start = statistics.median(milliseconds_to_ready(*command) for _ in range(STARTS))
        idle = [idle_kib(box, f"{name[:4]}-{number}.log", command) for number in range(LOOKS)]
        rss, pss, own = sorted(idle)[LOOKS // 2]
        check(rss <= MOST_KIB, f"an idle {name} has {rss} KiB")
        facts.append(f"{name}: ready after {start:.1f} ms, idle {rss} KiB (PSS {pss}, its own {own})")
    return "; ".join(facts)
