"""`odmr check --dns` with dnsmasq: correct zones, and each mistake in them."""

import re
import socket
import threading
import time

from harness import LOOPBACK, ODMR, Certificates, Customer, Provider, check, scenario
from world import Names

# dnsmasq is ready when it has gone into the background. The network of this machine is not used.
ALONE = """ip link set lo up && mount --bind "$0/resolv.conf" /etc/resolv.conf || exit 99
dnsmasq --conf-file="$0/zone.conf" --pid-file="$0/zone.pid" || exit 99
"$@"; code=$?; kill "$(cat "$0/zone.pid")"; exit $code"""
ZONE = ["no-resolv", "no-hosts", "bind-interfaces", f"listen-address={LOOPBACK}", "user=root", "cache-size=0", "no-round-robin"]
ZONE += ["local=/example/", "local=/net/", "local=/arpa/", "log-facility=-"]
HOST = [
    f"host-record=relay.example.net,{LOOPBACK}",
    "ptr-record=1.0.0.127.in-addr.arpa,relay.example.net",
    'txt-record=relay.example.net,"v=spf1 a -all"',
]
SPF = "v=spf1 a:relay.example.net -all"
GOOD = ["mx-host=good.example,relay.example.net,10", f'txt-record=good.example,"{SPF}"', 'txt-record=_dmarc.good.example,"v=DMARC1; p=none"']
# The records of a domain; the line of its MX (and of SPF, of DMARC) in the report, and the record to paste.
WRONG = {
    "null": (["dns-rr=null.example,15,000000"], ["MX    error     this is a null MX"]),
    "none": (['txt-record=none.example,"x"'], ["MX    error     there is neither an MX record nor an address of the domain"]),
    "absent": ([], ["MX    error     the domain does not exist (NXDOMAIN)"]),
    "literal": (["mx-host=literal.example,192.0.2.1,10"], ["MX    error     192.0.2.1 is an address"]),
    "alias": (
        ["mx-host=alias.example,mx.alias.example,10", "cname=mx.alias.example,relay.example.net"],
        ["MX    error     mx.alias.example is an alias (CNAME) of relay.example.net"],
    ),
    "other": (
        ["mx-host=other.example,mx.other.example,10", "host-record=mx.other.example,203.0.113.9"]
        + ['txt-record=other.example,"v=spf1 mx -all"', 'txt-record=_dmarc.other.example,"v=DMARC1; p=reject"'],
        ["MX    error     the mail goes to mx.other.example, and none to relay.example.net", "SPF   error     it does not let relay.example.net (127.0.0.1) send"]
        + ['should be other.example. IN TXT "v=spf1 a:relay.example.net mx -all"', "DMARC warning   as SPF does not let the provider send, receivers reject"],
    ),
    "backup": (
        ["mx-host=backup.example,relay.example.net,10", "mx-host=backup.example,mx.other.example,20"],
        ["MX    warning   mx.other.example gets the mail while relay.example.net is down"],
    ),
    "implicit": (["host-record=implicit.example,203.0.113.9"], ["MX    error     there is no MX record, so mail goes to the address"]),
    "vanity": (
        ["mx-host=vanity.example,mx.vanity.example,10", f"host-record=mx.vanity.example,{LOOPBACK}"],
        ["MX    warning   mx.vanity.example is relay.example.net by its address"],
    ),
    "twice": (
        ["mx-host=twice.example,relay.example.net,10", 'txt-record=twice.example,"v=spf1 mx -all"', 'txt-record=twice.example,"v=spf1 a -all"'],
        ["SPF   error     there are 2 records", 'should be twice.example. IN TXT "v=spf1 a:relay.example.net a mx -all"'],
    ),
    "loop": (
        ["mx-host=loop.example,relay.example.net,10", 'txt-record=loop.example,"v=spf1 include:loop.example -all"'],
        ["SPF   error     it is not valid, and receivers may reject mail: the record causes more than 10 lookups"],
    ),
    # Strings that are joined, in a reply that needs TCP.
    "large": (
        ["mx-host=large.example,relay.example.net,10", 'txt-record=large.example,"v=spf1 a:relay."," example.net"," -all"'.replace(" example", "example")]
        + [f'txt-record=large.example,"{number}{"x" * 250}"' for number in range(8)],
        ['SPF   good      large.example. IN TXT "v=spf1 a:relay.example.net -all"'],
    ),
    "refused.test": ([], ["MX    warning   MX records of refused.test: 127.0.0.1:53: REFUSED"]),
}
KINDS = {"should be": r"(?m)^        should be (\S+\.) IN (\w+) (.+)$"}


def alone(box, zone, *command):
    """Runs a command with a name server for these names only. Returns its exit code and its output."""
    box.write("resolv.conf", f"nameserver {LOOPBACK}\n", mode=0o644)
    box.write("zone.conf", "\n".join(ZONE + zone) + "\n")
    done = box.run("unshare", "--mount", "--net", "sh", "-c", ALONE, box.path, *command)
    check(done.returncode != 99, f"no name server: {done.stderr}")
    return done.returncode, done.stdout + done.stderr


def provider_of(box, domains, certificates=None, resolver=f"{LOOPBACK}:53", **more):
    relay = f'[relay]\nresolver = "{resolver}"\nallow-private = true\n'
    return Provider(box, require_tls=False, certificates=certificates, customers={"acme": domains}, more=relay, **more)


def digest(box, certificate, *, of_key):
    """The SHA-256 of a certificate or of its key, as openssl computes it."""
    command = 'openssl x509 -in "$0" -pubkey -noout | openssl pkey -pubin -outform der' if of_key else 'openssl x509 -in "$0" -outform der'
    return box.run("sh", "-c", f"{command} | sha256sum", certificate).stdout.split()[0]


def sections(output):
    """Name -> the lines of its section."""
    found = re.findall(r"(?m)^([\w.-]+)\n((?:  .*\n)+)", output)
    return dict(found)


@scenario("dns", needs=["dnsmasq", "openssl", "unshare", "ip"], root=True)
def provider_and_customer(box):
    """check --dns for a provider and a customer: correct zones are good, and for each mistake the report has the record to paste"""
    certificates = Certificates(box)
    key, whole = (digest(box, certificates.certificate, of_key=of_key) for of_key in (True, False))
    tlsa = lambda kind, data: f"dns-rr=_25._tcp.relay.example.net,52,{kind}{data}"
    provider = provider_of(box, ["good.example"], certificates)
    checked = lambda zone: alone(box, zone, ODMR, "check", "-c", provider.config, "--dns")
    for kind, data in (("030101", key), ("030001", whole)):
        code, output = checked(HOST + GOOD + [tlsa(kind, data)])
        bad = re.findall(r"(?m)^  \w+ +(?:error|warning|note) .*", output)
        check(code == 0 and not bad, f"exit {code}: {bad or output}")
        check(len(re.findall(r"(?m)^  \w+ +good ", output)) == 7, output)
    code, output = checked(HOST + GOOD + [tlsa("030101", whole)])
    wanted = f"should be _25._tcp.relay.example.net. IN TLSA 3 1 1 {key}\n"
    check(code == 1 and "TLSA  error     no record fits" in output and wanted in output, f"exit {code}: {output}")
    code, output = checked(GOOD)
    check(code == 1 and "A     error     the name does not exist (NXDOMAIN)" in output, f"exit {code}: {output}")
    code, output = checked([f"address=/relay.example.net/{LOOPBACK}"] + GOOD)
    for line in ("PTR   warning   127.0.0.1 has no name", "should be 1.0.0.127.in-addr.arpa. IN PTR relay.example.net.", "SPF   note ", f"could be  _25._tcp.relay.example.net. IN TLSA 3 1 1 {key}"):
        check(code == 0 and line in output, f"exit {code}, no {line!r}: {output}")
    judged = wrong_domains(box, certificates) + customer_side(box)
    return f"good zones have 7 good records and no other; {judged} domains judged, {dead(box)}"


def wrong_domains(box, certificates):
    domain = lambda label: label if "." in label else f"{label}.example"
    provider = provider_of(box, [domain(label) for label in WRONG], certificates, name="wrong")
    zone = HOST + [line for lines, _ in WRONG.values() for line in lines]
    code, output = alone(box, zone, ODMR, "check", "-c", provider.config, "--dns")
    check(code == 1 and "wrong records in DNS: " in output, f"exit {code}: {output}")
    found = sections(output)
    for label, (_, wanted) in WRONG.items():
        section = found.get(domain(label), "")
        for line in wanted:
            check(line in re.sub(r"\n {17}(?=\S)|\n {18}(?=\S)", " ", section), f"{label}: no {line!r}: {section}")
        paste = f"should be {domain(label)}. IN MX 10 relay.example.net."
        check((paste in section) == ("MX    good" not in section), f"{label}: {section}")
    too_wide = [line for line in output.splitlines() if len(line) > 100 and " IN " not in line and line.startswith("  ")]
    check(not too_wide, f"{too_wide}")
    return len(WRONG)


def customer_side(box):
    """The zone that follows these reports is good for the customer, too."""
    accept = ["@good.example", "@other.example", "@literal.example"]
    customer = Customer(box, 366, file="customer", accept=accept, more=f'[outgoing]\nqueue = "{box.path}/queue"\n')
    customer.config.write_text(customer.config.read_text().replace(f'"{LOOPBACK}:366"', '"relay.example.net"'))
    customer.root.mkdir()
    zone = HOST + GOOD + WRONG["other"][0] + WRONG["literal"][0]
    code, output = alone(box, zone, ODMR, "check", "-c", customer.config, "--dns")
    found = sections(output)
    check(code == 1 and all(line in output for line in WRONG["literal"][1]), f"exit {code}: {output}")
    check(found["good.example"].count(" good ") == 3, found["good.example"])
    check("MX    warning   mx.other.example must be the mail host of your provider" in found["other.example"], output)
    pasted = [" ".join(match) for match in re.findall(KINDS["should be"], output)]
    check("other.example. MX 10 relay.example.net." in pasted, f"{pasted}")
    fixed = HOST + GOOD
    for name, kind, data in re.findall(KINDS["should be"], output):
        words = data.split()
        fixed.append(f"mx-host={name[:-1]},{words[1][:-1]},{words[0]}" if kind == "MX" else f"txt-record={name[:-1]},{data}")
    code, output = alone(box, fixed, ODMR, "check", "-c", customer.config, "--dns")
    check(code == 0 and " error " not in output and output.count("MX    good") == 3, f"exit {code}: {output}")
    return len(accept)


def dead(box):
    """A name server that does not reply is a warning, and 10,000 domains are not looked up one by one."""
    silent = box.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    silent.bind((LOOPBACK, 0))
    domains = [f"d{number}.example" for number in range(10_000)]
    provider = provider_of(box, domains, resolver=f"{LOOPBACK}:{silent.getsockname()[1]}", name="dead")
    begin = time.monotonic()
    done = box.run(ODMR, "check", "-c", provider.config, "--dns")
    took = time.monotonic() - begin
    wanted = "warning: domains that were not looked up: 10000, as no name server replies: check `resolver` in [relay]"
    check(done.returncode == 0 and wanted in done.stdout and took < 30, f"exit {done.returncode}, {took:.1f} s: {done.stdout}{done.stderr}")
    return f"a dead name server ends it after {took:.0f} s"


def slow_proxy(box, port, seconds):
    """A name server with a delay of `seconds`. It does not reply for names with `lame`. Returns its port."""
    front = box.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    front.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    front.bind((LOOPBACK, 0))

    def answer(query, peer):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as back:
            back.settimeout(5)
            back.connect((LOOPBACK, port))
            back.send(query)
            try:
                front.sendto(back.recv(4096), peer)
            except OSError:
                pass  # the box is closed

    def serve():
        while True:
            try:
                query, peer = front.recvfrom(4096)
            except OSError:
                return
            if b"lame" not in query:
                threading.Timer(seconds, answer, (query, peer)).start()

    threading.Thread(target=serve, daemon=True).start()
    return front.getsockname()[1]


@scenario("dns-many", needs=["dnsmasq"])
def many_domains(box):
    """1,000 domains, six of them with dead name servers, by a name server that is 20 ms away: all are looked up within a minute"""
    labels = [f"lame{number}" if number in (300, 301, 302, 600, 601, 999) else f"d{number}" for number in range(1000)]
    domains = [f"{label}.example" for label in labels]
    names = Names(
        box,
        mx={domain: [(10, "relay.example.net")] for domain in domains},
        hosts={"relay.example.net": LOOPBACK},
        more=[f'txt-record={domain},"{SPF}"' for domain in domains] + ["local=/net/", "local=/arpa/"],
    )
    port = slow_proxy(box, int(names.resolver.split(":")[1]), 0.02)
    provider = provider_of(box, domains, resolver=f"{LOOPBACK}:{port}")
    begin = time.monotonic()
    done = box.run(ODMR, "check", "-c", provider.config, "--dns", seconds=150)
    took = time.monotonic() - begin
    found = sections(done.stdout)
    check(done.returncode == 0 and len(found) == 1001, f"exit {done.returncode}, {len(found)} names: {done.stderr}")
    good = [name for name in domains if "MX    good" in found[name] and "SPF   good" in found[name]]
    late = [name for name in domains if "MX    warning" in found[name] and "no answer in time" in found[name]]
    check(len(good) == 994 and len(late) == 6 and took < 60, f"{len(good)} good, {len(late)} late, {took:.1f} s")
    return f"{len(good)} good and {len(late)} without a reply in {took:.0f} s"
