"""What the program itself costs: its file, its start, its memory when nothing happens. `make size` prints it; doc/size.md has the figures."""

import os
import pathlib
import statistics
import subprocess
import time

from harness import LOOPBACK, ODMR, Certificates, Customer, Provider, check, free_port, scenario, wait_until
from world import outgoing_table

STARTS = 21
MOST_OCTETS = 5_000_000  # of the program's file
MOST_KIB = 6 * 1024  # resident in an idle process, the part of the program's file that is in memory included


def milliseconds_to_ready(*command):
    """From the start of a daemon to its newline on --ready-fd, and to its end by SIGTERM after that."""
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


@scenario("size")
def size(box):
    """the program has less than 5,000,000 octets, and an idle provider and an idle customer less than 6 MiB each"""
    octets = os.path.getsize(ODMR)
    check(octets <= MOST_OCTETS, f"the program has {octets} octets")
    certificates = Certificates(box)
    provider = Provider(box, certificates=certificates)
    customer = Customer(box, free_port(), authority=certificates.authority, more=outgoing_table(box, more=f'listen = ["{LOOPBACK}:0"]'))
    commands = {"serve": [ODMR, "serve", "-c", provider.config], "pull --daemon": [ODMR, "pull", "-c", customer.config, "--daemon"]}
    facts = [f"{octets} octets"]
    for name, command in commands.items():
        start = statistics.median(milliseconds_to_ready(*command) for _ in range(STARTS))
        process = box.start(f"{name[:4]}.log", *command)
        wait_until(lambda: "event=listening" in box.log(f"{name[:4]}.log"), "a listener")
        rss, pss, own = resident_kib(process.pid)
        check(rss <= MOST_KIB, f"an idle {name} has {rss} KiB")
        facts.append(f"{name}: ready after {start:.1f} ms, idle {rss} KiB (PSS {pss}, its own {own})")
    return "; ".join(facts)
