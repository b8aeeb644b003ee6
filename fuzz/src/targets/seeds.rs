//! The seeds: inputs made of `testdata` (transcripts, rules, messages), and those of `found/TARGET`, each of which has found
//! a fault.

use std::fs;
use std::path::{Path, PathBuf};

use super::peer::PART;
use crate::transcripts::format::{self, Action, Transcript};

/// The most octets of a seed.
const LONGEST: usize = 8 * 1024;

/// The root of odmr, in this crate and in the tests of odmr.
fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    if here.join("testdata").is_dir() { here } else { here.parent().expect("the root") }
}

fn testdata() -> PathBuf {
    root().join("testdata")
}

/// The inputs that have found a fault in a target.
fn found(target: &str) -> Vec<Vec<u8>> {
    let files = fs::read_dir(root().join("fuzz/found").join(target)).into_iter().flatten();
    files.map(|file| read(&file.expect("an entry").path())).collect()
}

fn files_with(ending: &str) -> Vec<PathBuf> {
    let (mut directories, mut files) = (vec![testdata()], Vec::new());
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("testdata") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => directories.push(path),
                false if path.extension().is_some_and(|extension| extension == ending) => files.push(path),
                false => {}
            }
        }
    }
    files.sort();
    files
}

fn transcripts() -> Vec<Transcript> {
    let read = |path: PathBuf| {
        let name = path.strip_prefix(testdata()).expect("below testdata").with_extension("");
        let text = fs::read_to_string(&path).expect("a transcript");
        format::parse(&name.display().to_string(), &text).unwrap_or_else(|error| panic!("{error}"))
    };
    files_with("smtp").into_iter().map(read).collect()
}

/// What the runner of a transcript sends on its first connection, before the turn and after it. A new part begins after each
/// step in which it receives.
struct Sent {
    transcript: Transcript,
    before: Vec<Vec<u8>>,
    after: Vec<Vec<u8>>,
}

fn sent(transcript: Transcript) -> Sent {
    let (mut before, mut after, mut turned, mut received, mut connections) = (Vec::new(), Vec::new(), false, true, 0);
    for step in &transcript.steps {
        let parts: &mut Vec<Vec<u8>> = if turned { &mut after } else { &mut before };
        match &step.action {
            Action::Connect { .. } => connections += 1,
            Action::Turn => (turned, received) = (true, true),
            Action::Send { octets, .. } if connections == 1 => {
                match parts.last_mut() {
                    Some(last) if !received => last.extend_from_slice(octets),
                    _ => parts.push(octets.clone()),
                }
                received = false;
            }
            Action::Expect { .. } | Action::ExpectOctets { .. } => received = true,
            _ => {}
        }
    }
    Sent { transcript, before, after }
}

/// The seeds of a target.
pub fn of(target: &str) -> Vec<Vec<u8>> {
    let sent = || transcripts().into_iter().map(sent);
    let mut seeds: Vec<Vec<u8>> = match target {
        "address" => addresses(),
        "aliases" => files_with("txt")
            .iter()
            .filter(|path| path.parent().is_some_and(|at| at.ends_with("rules")))
            .map(read)
            .collect(),
        "client" => sent().flat_map(replies).collect(),
        "command" => sent().flat_map(|sent| [sent.before, sent.after].map(|parts| parts.concat())).collect(),
        "config" => transcripts().iter().filter_map(configuration).collect(),
        "content" => {
            stored().into_iter().flat_map(|file| [[&[0], &file[..]].concat(), [&[63], &file[..]].concat()]).collect()
        }
        "customer" => sent().flat_map(customer).collect(),
        "dns" => dns(),
        "envelope" => stored().into_iter().flat_map(|file| [0, 1, 3].map(|how| [&[how], &file[..]].concat())).collect(),
        "maildir" => stored().into_iter().enumerate().map(queued).collect(),
        "provider" => sent().flat_map(provider).collect(),
        "relay" => sent().flat_map(relayed).collect(),
        "reply" => sent().flat_map(|sent| [sent.before, sent.after].map(|parts| parts.concat())).collect(),
        "sasl" => sasl(sent()),
        "server" => sent().flat_map(server).collect(),
        "state" => state(),
        other => panic!("no seeds for {other}"),
    };
    seeds.extend(found(target));
    seeds.retain(|seed| !seed.is_empty() && seed.len() <= LONGEST);
    seeds.sort();
    seeds.dedup();
    seeds
}

fn read(path: &PathBuf) -> Vec<u8> {
    fs::read(path).expect("a file")
}

/// Messages of queues and mailboxes, and DSNs.
fn stored() -> Vec<Vec<u8>> {
    let of_transcript = |transcript: Transcript| {
        let files = transcript.before.into_iter().chain(transcript.after);
        files.filter(|file| file.path.contains("/new/")).map(|file| file.content()).collect::<Vec<_>>()
    };
    let mut files: Vec<_> = transcripts().into_iter().flat_map(of_transcript).collect();
    files.extend(files_with("eml").iter().map(read));
    files
}

/// Whether the transcript plays a provider, which sends replies before the turn.
fn is_customers(sent: &Sent) -> bool {
    sent.transcript.name.starts_with("customer/")
}

fn addresses() -> Vec<Vec<u8>> {
    let mut seeds = stored();
    for sent in transcripts().into_iter().map(sent) {
        for line in sent.before.concat().split(|octet| *octet == b'\n') {
            if let (Some(begin), Some(end)) =
                (line.iter().position(|octet| *octet == b'<'), line.iter().rposition(|octet| *octet == b'>'))
            {
                seeds.extend(line.get(begin + 1..end).map(<[u8]>::to_vec));
            }
        }
    }
    let lists = [
        "Joe Doe <joe@example.net>, (a comment) friends: eva, \"Bob B.\"@example.org;",
        "=?UTF-8?Q?J=C3=BCrgen?= <j\u{fc}rgen@b\u{fc}cher.example>, undisclosed recipients:;",
        "<@one.example,@two.example:\"a>b\"@example.org>, x@[IPv6:2001:db8::1]",
    ];
    seeds.extend(lists.map(|list| list.as_bytes().to_vec()));
    seeds.extend(
        lists.map(|list| {
            format!("From: {list}\nTo: {list},\n {list}\nBcc: eva\nSubject: \u{fc}\n\nbody\n").into_bytes()
        }),
    );
    seeds
}

fn replies(sent: Sent) -> Vec<Vec<u8>> {
    let (how, parts): (&[[u8; 2]], _) = match is_customers(&sent) {
        true => (&[[8, 2], [8, 0], [9, 3]], sent.before),
        false => (&[[0, 0], [16, 0], [32, 1], [0, 5]], sent.after),
    };
    how.iter().map(|how| [&how[..], &parts.concat()].concat()).collect()
}

fn configuration(transcript: &Transcript) -> Option<Vec<u8>> {
    let mut files: Vec<_> = transcript.before.iter().filter(|file| !file.path.contains("/new/")).collect();
    files.sort_by_key(|file| !file.path.ends_with("r.toml"));
    let first = files.first().filter(|file| file.path.ends_with("r.toml"))?;
    let is_provider = first.path.starts_with("provider");
    let mut seed = String::new();
    for file in files {
        seed += &format!("-- {} --\n{}", file.path, file.text);
    }
    if is_provider && !seed.contains("-- customers.d/") {
        seed += "-- customers.d/acme.toml --\ndomains = [\"example.org\", \"example.com\"]\nsecret = \"tanstaaftanstaaf\"\n";
    }
    let filled = [
        ("{dir}", "/var/spool"),
        ("{tls}", "[tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n"),
        ("{listen-tls}", "[\"127.0.0.1:0\"]"),
        ("{require-tls}", "true"),
        ("{address}", "127.0.0.1:366"),
        ("{hop}", "127.0.0.1:25"),
        ("{tls-mode}", "none"),
        ("{ca}", ""),
    ];
    Some(filled.iter().fold(seed, |seed, (from, to)| seed.replace(from, to)).into_bytes())
}

fn parts(how: u8, parts: &[Vec<u8>]) -> Vec<u8> {
    [vec![how], parts.join(&[PART][..])].concat()
}

fn customer(sent: Sent) -> Vec<Vec<u8>> {
    if !is_customers(&sent) {
        return Vec::new();
    }
    let whole: Vec<_> = sent.before.iter().chain(&sent.after).cloned().collect();
    [parts(0, &whole), parts(2, &whole), parts(1, &sent.after)].into()
}

fn provider(sent: Sent) -> Vec<Vec<u8>> {
    if is_customers(&sent) {
        return Vec::new();
    }
    let inbound = matches!(&sent.transcript.steps.first().map(|step| &step.action), Some(Action::Connect { listener, .. }) if listener == "inbound");
    let whole: Vec<_> = sent.before.iter().chain(&sent.after).cloned().collect();
    let mut seeds = vec![parts(if inbound { 0 } else { 5 }, &whole)];
    seeds.extend((!sent.after.is_empty()).then(|| parts(2, &sent.after)));
    seeds
}

/// The envelope and the content of each message in a dialogue.
fn relayed(sent: Sent) -> Vec<Vec<u8>> {
    let octets = [sent.before, sent.after].concat().concat();
    let text = String::from_utf8_lossy(&octets).into_owned();
    let (mut envelope, mut seeds) = (String::new(), Vec::new());
    let mut rest = text.as_str();
    while let Some((line, after)) = rest.split_once("\r\n") {
        rest = after;
        match line.get(..4) {
            Some("MAIL") => envelope = format!("{line}\n"),
            Some("RCPT") => envelope += &format!("{line}\n"),
            Some("DATA") if after.contains("\r\n.\r\n") => {
                let content = after.split("\r\n.\r\n").next().unwrap_or_default().replace("\r\n", "\n");
                seeds.extend([0, 1, 9].map(|how| [&[how], envelope.as_bytes(), b"\n", content.as_bytes()].concat()));
            }
            _ => {}
        }
    }
    seeds
}

/// What a client sends: the peer of a provider before the turn, the provider after it.
fn server(sent: Sent) -> Vec<Vec<u8>> {
    match is_customers(&sent) {
        true => vec![parts(3, &sent.after), parts(35, &[vec![Vec::new()], sent.after].concat())],
        false => [0, 1, 2, 9].map(|how| parts(how, &sent.before)).into(),
    }
}

fn queued((number, file): (usize, Vec<u8>)) -> Vec<u8> {
    let results = [0, 0b1110_0100, 0b0101_0101, 0b1010_1010][number % 4];
    [&[(number / 4) as u8, results][..], b"1767323045.M1P2Q3.host,S=100,W=110:2,S\n", &file].concat()
}

/// The challenges and responses of all AUTH commands.
fn sasl(sent: impl Iterator<Item = Sent>) -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = (0..32).map(|how| vec![how]).collect();
    for sent in sent {
        let octets = sent.before.concat();
        let messages: Vec<Vec<u8>> = octets
            .split(|octet| matches!(octet, b'\n' | b'\r' | b' '))
            .filter_map(|word| {
                let text = std::str::from_utf8(word).ok()?;
                let inside = text.strip_prefix("{scram:").map_or(text, |rest| rest.trim_end_matches('}'));
                (inside.len() > 7 && inside.contains(['=', '+'])).then(|| decode(inside))
            })
            .collect();
        if !messages.is_empty() {
            seeds.extend((0..5).map(|how| parts(how, &messages)));
        }
    }
    let scram = ["n,,n=acme,r=client", "c=biws,r=clientnonce1-,p=AAAA", ""].map(|text| text.as_bytes().to_vec());
    let server = ["r=clientX,s=c2l4dGVlbiBvY3RldHMuLg==,i=4096", "v=AAAA"].map(|text| text.as_bytes().to_vec());
    seeds.extend([parts(2, &scram), parts(1, &scram), parts(2, &server), parts(1, &server)]);
    seeds.extend([parts(4, &[b"\0acme\0tanstaaftanstaaf".to_vec()]), parts(0, &[b"acme".to_vec()])]);
    seeds
}

/// Decodes base64, and skips characters that do not belong to it.
fn decode(text: &str) -> Vec<u8> {
    let value = |octet: u8| match octet {
        b'A'..=b'Z' => Some(octet - b'A'),
        b'a'..=b'z' => Some(octet - b'a' + 26),
        b'0'..=b'9' => Some(octet - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (mut out, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for six in text.bytes().filter_map(value) {
        (bits, count) = (bits << 6 | u32::from(six), count + 6);
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    out
}

/// Replies of a name server about example.org.
fn dns() -> Vec<Vec<u8>> {
    // A header with an empty id, and no question: the target inserts both.
    let reply = |flags: [u8; 2], records: &[(u16, &[u8])], authority: &[(u16, &[u8])]| {
        let count = |records: &[(u16, &[u8])]| u16::try_from(records.len()).expect("few").to_be_bytes();
        let mut octets = [&[0, 0][..], &flags, &[0, 1], &count(records), &count(authority), &[0, 0]].concat();
        for (kind, data) in records.iter().chain(authority) {
            let length = u16::try_from(data.len()).expect("short").to_be_bytes();
            octets.extend([&[0xC0, 12][..], &kind.to_be_bytes(), &[0, 1, 0, 0, 0, 60], &length, data].concat());
        }
        octets
    };
    let (a, mx, aaaa, cname, soa, ptr, txt, tlsa) = (1, 15, 28, 5, 6, 12, 16, 52);
    let ok = [0x81, 0x80];
    let replies = [
        reply(ok, &[(mx, b"\x00\x0a\x02mx\xc0\x0c"), (mx, b"\x00\x05\x03mx2\xc0\x0c")], &[]),
        reply(ok, &[(mx, b"\x00\x00\x00")], &[]),
        reply(ok, &[(a, &[192, 0, 2, 1]), (a, &[192, 0, 2, 2])], &[]),
        reply(ok, &[(aaaa, &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])], &[]),
        reply(ok, &[(cname, b"\x03www\xc0\x0c")], &[]),
        reply(ok, &[(ptr, b"\x05relay\xc0\x0c")], &[]),
        reply(ok, &[(txt, b"\x07v=spf1 \x04-all\x00"), (txt, b"\x05short")], &[]),
        reply(ok, &[(tlsa, b"\x03\x01\x01digest"), (tlsa, b"\x03\x01\x01")], &[]),
        reply(ok, &[(cname, b"\xc0\x0c")], &[]),
        reply(ok, &[], &[(soa, b"\x00\x00\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\0\0\x01")]),
        reply(ok, &[], &[]),
        reply([0x81, 0x83], &[], &[]),
        reply([0x81, 0x82], &[], &[]),
        reply([0x81, 0x81], &[], &[]),
        reply([0x83, 0x80], &[], &[]),
    ];
    let framed = |reply: &Vec<u8>| [&u16::try_from(reply.len()).expect("short").to_be_bytes()[..], reply].concat();
    let mut seeds = Vec::new();
    for first in &replies {
        for second in &replies {
            for how in [0, 2, 4, 6, 8, 10] {
                seeds.push([vec![how], framed(first), framed(second), framed(second)].concat());
            }
        }
    }
    seeds
}

fn state() -> Vec<Vec<u8>> {
    let files = [
        "at=2026-01-02T03:04:05Z\npeer=[192.0.2.1]\nresult=failed\nreason=x\nduration=1.234\nsuccess=2026-01-01T03:04:05Z\n\
         calls=12\nfailed=1\nno-mail=2026-01-02T03:04:05Z a.example,b.example\ncount sent=3\n",
        "1767300000 1767320000 bob@example.org\n1767300000 1767300000 \"a b\"@example.org\n",
        "seen=2026-01-02T03:04:05Z\nleft=2027-01-02T03:04:05Z\njump=2025-01-02T03:04:05Z 2026-01-01T03:04:05Z\n",
        "failed 1767323000 12 network 192.0.2.0/24\nfailed 1767323000 3 account 01010101010101010101010101010101\n\
         known 1767323000 0 01010101010101010101010101010101 192.0.2.0/24\nwaits 1767323046 12 1 192.0.2.0/24\n",
        "x 1000 20 30 2 - .\n",
        "1767323000 12 .\n",
        "2026-01-02T03:04:05Z\n",
        "",
    ];
    files.iter().map(|file| file.as_bytes().to_vec()).chain([b"\0".to_vec()]).collect()
}
