"""Listening sockets: many clients at the same moment, a kernel without IPv6, a kernel that separates it from IPv4."""

import ctypes
import platform
import re
import resource
import selectors
import socket
import struct
import time

from harness import LOOPBACK, ODMR, Customer, Provider, Smtp, check, events, scenario, wait_until
from world import outgoing_table

CLIENTS = 1000
SECONDS = 2.0  # seconds within which each client is greeted; a SYN that finds the backlog full is sent again after 1, 3, 7 and 15 s
PATIENCE = 20.0


def greetings(port):
    """Connects all clients without waiting for any. Returns the seconds to each greeting."""
    waiting, clients, seconds = selectors.DefaultSelector(), [], []
    begin = time.monotonic()
    for _ in range(CLIENTS):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex((LOOPBACK, port))
        clients.append(client)
        waiting.register(client, selectors.EVENT_READ)
    while len(seconds) < CLIENTS and time.monotonic() < begin + PATIENCE:
        for key, _ in waiting.select(0.1):
            greeting = key.fileobj.recv(200)
            check(greeting.startswith(b"220 "), f"not a greeting: {greeting!r}")
            seconds.append(time.monotonic() - begin)
            waiting.unregister(key.fileobj)
    for client in clients:
        client.close()
    waiting.close()
    return seconds


@scenario("burst")
def burst(box):
    """1,000 clients connect to each listener at once: each gets its greeting within 2 s"""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    check(limit[1] >= 2 * CLIENTS, f"needs {2 * CLIENTS} descriptors, and may have {limit[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    more = f"[limits]\nconnections = {2 * CLIENTS}\nconnections-per-address = {2 * CLIENTS}\n"
    provider = Provider(box, require_tls=False, more=more).start()
    facts = []
    for name, port in (("inbound", provider.inbound), ("odmr", provider.odmr)):
        seconds = greetings(port)
        facts.append(f"{name}: {len(seconds)} greeted, the last after {max(seconds, default=0):.2f} s")
        in_time = sum(one <= SECONDS for one in seconds)
        check(in_time == CLIENTS, f"{name}: {in_time} of {CLIENTS} were greeted within {SECONDS} s, {len(seconds)} at all")
    return "; ".join(facts)


def no_ipv6():
    """For this process and its children, socket(AF_INET6) fails as with ipv6.disable=1: a seccomp filter of x86-64."""

    def step(code, value, yes=0, no=0):
        return struct.pack("HBBI", code, yes, no, value)

    # socket(2) is call 41; its first argument is at 16; EAFNOSUPPORT is 97.
    steps = [step(0x20, 0), step(0x15, 41, 0, 3), step(0x20, 16), step(0x15, socket.AF_INET6, 0, 1)]
    steps += [step(0x06, 0x00050000 | 97), step(0x06, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(steps))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    call = ctypes.CDLL(None).prctl
    # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
    if call(38, 1, 0, 0, 0) or call(22, 2, head, 0, 0):
        raise OSError("no filter")


@scenario("no-ipv6")
def without_ipv6(box):
    """On a kernel without IPv6, [::] means IPv4; [::1] is skipped if 127.0.0.1 is listed too, and is an error if it is alone"""
    if platform.machine() != "x86_64":
        return "not tried on this machine"
    provider = Provider(box, require_tls=False)
    text = provider.config.read_text()
    text = text.replace(f'[inbound]\nlisten = ["{LOOPBACK}:0"]', '[inbound]\nlisten = ["[::]:0"]')
    text = text.replace(f'[odmr]\nlisten = ["{LOOPBACK}:0"]', f'[odmr]\nlisten = ["[::1]:0", "{LOOPBACK}:0"]')
    provider.config.write_text(text)
    start, box.start = box.start, lambda *words, **options: start(*words, preexec_fn=no_ipv6, **options)
    provider.start()
    for port in (provider.inbound, provider.odmr):
        with Smtp(port) as client:
            client.hello()
    told = [(line["listener"], line["address"]) for line in events(provider.log(), "no-ipv6")]
    check(told == [("inbound", "[::]:0"), ("odmr", "[::1]:0")], f"logged: {told}")
    table = outgoing_table(box)
    customer = Customer(box, provider.odmr, tls="none", more=table + 'listen = ["[::1]:0"]\n')
    code = box.start("daemon.log", ODMR, "pull", "--daemon", "-c", customer.config).wait(10)
    check(code == 71 and "this kernel has no IPv6" in box.log("daemon.log"), f"exit {code}: {box.log('daemon.log')}")
    return "IPv4 is served"


@scenario("two-sockets", needs=["strace", "unshare", "ip", "sysctl"], root=True)
def two_sockets(box):
    """On a system that separates IPv6 from IPv4, as OpenBSD does, [::] is two sockets of one port"""
    provider = Provider(box, require_tls=False)
    text = provider.config.read_text()
    provider.config.write_text(text.replace(f'[inbound]\nlisten = ["{LOOPBACK}:0"]', '[inbound]\nlisten = ["[::]:0"]'))
    # The first call is for SO_REUSEADDR.
    fault = "inject=setsockopt:error=EINVAL:when=2"
    apart = "ip link set lo up && sysctl -qw net.ipv6.bindv6only=1 &&"
    command = f"{apart} exec timeout 5 strace -f -o /dev/null -e {fault} {ODMR} serve -c {provider.config}"
    box.start(provider.log_name, "unshare", "-n", "sh", "-c", command)

    def ports():
        return dict(re.findall(r"listening inbound (\S+):(\d+)", provider.log()))

    found = wait_until(lambda: "listening odmr" in provider.log() and ports(), "the listeners")
    check(set(found) == {"[::]", "0.0.0.0"} and len(set(found.values())) == 1, f"listening at {found}")
    return "both of one port"
