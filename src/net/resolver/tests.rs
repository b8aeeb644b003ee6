//! Tests of the resolver, against fake name servers on loopback.

use super::*;
use domain::base::iana::Rcode;
use domain::base::message_builder::AnswerBuilder;
use domain::base::{RecordData, Ttl};
use domain::rdata::{Ns, Soa};
use proptest::prelude::*;
use std::net::TcpListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// The replies to the question `example.org MX`, and their results.
#[test]
fn replies_are_resolved_as_the_rfcs_require() {
    let mx = |names: &[(u16, &str)]| {
        let records = names.iter().map(|(preference, host)| Record::Exchange(*preference, name(host)));
        Ok(Resolution::Answer(Answer::Records(records.collect())))
    };
    let nothing = || Ok(Resolution::Answer(Answer::NoRecords));
    let no_name = || Ok(Resolution::Answer(Answer::NoName));
    let alias = |target| Ok(Resolution::Alias(name(target)));
    let useless = |text: &str| Err(QueryError::Useless(text.to_owned()));
    let not_understood = |code| Err(QueryError::NotUnderstood(code));
    let endless = || useless("a loop of aliases");
    let no_recursion = || useless("it has no answer and offers no recursion");

    let soa = "example.org SOA";
    check_reply("ok", &["example.org MX 10 a.example"], &[], mx(&[(10, "a.example")]));
    check_reply("ok", &["EXAMPLE.Org MX 1 A.example"], &[], mx(&[(1, "a.example")]));
    check_reply("ok", &["example.org MX 9 b", "example.org MX 1 a"], &[], mx(&[(9, "b"), (1, "a")]));
    check_reply("ok", &["example.org MX 0 ."], &[], mx(&[(0, ".")]));
    // Records of another name, type or class are ignored.
    check_reply("ok", &["example.com MX 10 a"], &[], nothing());
    check_reply("ok", &["example.org A 192.0.2.1"], &[], nothing());
    check_reply("ok", &["example.org CH-MX 10 a"], &[], nothing());
    check_reply("ok", &["evil MX 1 evil", "example.org MX 2 a", "example.org TXT"], &[], mx(&[(2, "a")]));
    // RFC 1034 section 3.6.2, in any order of records.
    check_reply("ok", &["example.org CNAME a", "a CNAME b", "b MX 5 c"], &[], mx(&[(5, "c")]));
    check_reply("ok", &["b MX 5 c", "a CNAME b", "example.org CNAME a"], &[], mx(&[(5, "c")]));
    check_reply("ok", &["example.org CNAME a", "a CNAME b"], &[], alias("b"));
    check_reply("ok", &["example.org CNAME a"], &["a SOA"], nothing());
    check_reply("ok", &["example.org CNAME example.org"], &[], endless());
    check_reply("ok", &["example.org CNAME a", "a CNAME b", "b CNAME a"], &[], endless());
    // Any number of them.
    let chain: Vec<String> = (0..40).map(|link| format!("n{link} CNAME n{}", link + 1)).collect();
    let mut chain: Vec<&str> = chain.iter().map(String::as_str).collect();
    chain[0] = "example.org CNAME n1";
    check_reply("ok", &chain, &[], alias("n40"));
    check_reply("ok", &chain, &["n40 SOA"], nothing());
    chain[39] = "n39 MX 1 a";
    check_reply("ok", &chain, &[], mx(&[(1, "a")]));
    chain[39] = "n39 CNAME n7";
    check_reply("ok", &chain, &[], endless());
    // RFC 2308 section 2.2: no data, in three forms, and a referral.
    check_reply("ok", &[], &[soa], nothing());
    check_reply("ok", &[], &[soa, "example.org NS a"], nothing());
    check_reply("ok", &[], &[], nothing());
    check_reply("aa", &[], &[], nothing());
    check_reply("ok", &[], &["org NS a"], no_recursion());
    check_reply("lame", &[], &[], no_recursion());
    check_reply("lame", &["example.org MX 10 a"], &[], mx(&[(10, "a")]));
    check_reply("nxdomain", &[], &[soa], no_name());
    check_reply("nxdomain", &["example.org CNAME a"], &[soa], no_name());
    check_reply("servfail", &[], &[], useless("SERVFAIL"));
    check_reply("refused", &[], &[], useless("REFUSED"));
    check_reply("truncated", &["example.org MX 10 a"], &[], Err(QueryError::Truncated));
    check_reply("formerr", &[], &[], not_understood(OptRcode::FORMERR));
    check_reply("notimp", &[], &[], not_understood(OptRcode::NOTIMP));
    check_reply("badvers", &[], &[], not_understood(OptRcode::BADVERS));
    check_reply("cookie", &[], &[], useless("BADCOOKIE"));
}

#[track_caller]
fn check_reply(how: &str, answer: &[&str], authority: &[&str], expected: QueryResult) {
    let question = question("example.org", Rtype::MX);
    let message = reply(&question.message(7, true).unwrap(), how, answer, authority);
    assert_eq!(parse_reply(&message, 7, &question), Some(expected), "{how} {answer:?} {authority:?}");
}

/// A reply as a name server sent it, with compressed names.
const RECORDED: &[u8] = b"\x12\x34\x81\x80\0\x01\0\x02\0\0\0\x01\
    \x07example\x03org\0\0\x0f\0\x01\
    \xc0\x0c\0\x0f\0\x01\0\0\x0e\x10\0\x08\0\x14\x03mx2\xc0\x0c\
    \xc0\x0c\0\x0f\0\x01\0\0\x0e\x10\0\x08\0\x0a\x03mx1\xc0\x0c\
    \0\0\x29\x04\xd0\0\0\0\0\0\0";

#[test]
fn a_recorded_reply_is_parsed() {
    let records = vec![Record::Exchange(20, name("mx2.example.org")), Record::Exchange(10, name("mx1.example.org"))];
    let expected = Ok(Resolution::Answer(Answer::Records(records)));
    assert_eq!(parse_reply(RECORDED, 0x1234, &question("example.org", Rtype::MX)), Some(expected));
}

#[test]
fn malformed_replies_are_errors() {
    let check = |from: &[u8], to: &[u8]| {
        let at = RECORDED.windows(from.len()).position(|window| window == from).unwrap();
        let message = [&RECORDED[..at], to, &RECORDED[at + from.len()..]].concat();
        let reply = parse_reply(&message, 0x1234, &question("example.org", Rtype::MX));
        assert!(
            matches!(&reply, Some(Err(QueryError::Useless(text))) if text.starts_with("malformed")),
            "{to:?}: {reply:?}"
        );
    };
    check(b"\0\x01\0\x02\0\0\0\x01", b"\0\x01\xff\xff\0\0\0\x01"); // more records than there are
    check(b"\x03mx2\xc0\x0c", b"\x03mx2\xc0\x2e"); // a pointer that points to itself
    check(b"\x03mx2\xc0\x0c", b"\x03mx2\xff\xff"); // … out of the message
    check(b"\x03mx2\xc0\x0c", b"\x03mx2\xc0\x2a"); // … into its own name: for ever mx2.mx2.mx2
    check(b"\x03mx2\xc0\x0c", b"\x80mx2\xc0\x0c"); // a label type that does not exist
    check(b"\x03mx2\xc0\x0c", b"\x3fmx2\xc0\x0c"); // a label longer than its record
    check(b"\0\x08\0\x14", b"\0\x01\0\x14"); // a record too short for its data
    check(b"\0\x08\0\x14", b"\0\x09\0\x14"); // … too long
    check(b"\0\x08\0\x14", b"\xff\xff\0\x14"); // … longer than the message
    // Eight octets are neither an IPv4 nor an IPv6 address.
    for kind in [Rtype::A, Rtype::AAAA] {
        let [_, kind_octet] = kind.to_int().to_be_bytes();
        let mut message = RECORDED.to_vec();
        for at in [26, 32, 52] {
            message[at] = kind_octet;
        }
        let reply = parse_reply(&message, 0x1234, &question("example.org", kind));
        assert!(
            matches!(&reply, Some(Err(QueryError::Useless(text))) if text.starts_with("malformed")),
            "{kind}: {reply:?}"
        );
    }
}

#[test]
fn a_reply_to_another_query_is_ignored() {
    let asked = question("example.org", Rtype::MX);
    let query = asked.message(0x1234, true).unwrap();
    assert_eq!(parse_reply(&query, 0x1234, &asked), None, "the query itself");
    assert_eq!(parse_reply(RECORDED, 0x1235, &asked), None, "another id");
    assert_eq!(parse_reply(RECORDED, 0x1234, &question("example.com", Rtype::MX)), None, "another name");
    assert_eq!(parse_reply(RECORDED, 0x1234, &question("example.org", Rtype::A)), None, "another type");
    assert_eq!(
        parse_reply(&replace(RECORDED, b"\0\x0f\0\x01\xc0", b"\0\x0f\0\x03\xc0"), 0x1234, &asked),
        None,
        "class"
    );
    assert_eq!(parse_reply(&replace(RECORDED, b"\x34\x81", b"\x34\xa9"), 0x1234, &asked), None, "another opcode");
    assert_eq!(parse_reply(b"\x12\x34\x81\x80\0\0\0\0\0\0\0\0", 0x1234, &asked), None, "no question");
    for length in 0..29 {
        assert_eq!(parse_reply(&RECORDED[..length], 0x1234, &asked), None, "only {length} octets");
    }
    // Only a server that did not understand the query need not repeat the question.
    let header = b"\x12\x34\x81\x81\0\0\0\0\0\0\0\0";
    assert_eq!(parse_reply(header, 0x1234, &asked), Some(Err(QueryError::NotUnderstood(OptRcode::FORMERR))));
}

proptest! {
    #[test]
    fn any_octets_can_be_parsed(message: Vec<u8>, id: u16) {
        parse_reply(&message, id, &question("example.org", Rtype::MX));
    }

    #[test]
    fn any_octets_after_the_question_can_be_parsed(body: Vec<u8>, counts: [u8; 6], flags: u16) {
        for kind in [Rtype::MX, Rtype::A, Rtype::AAAA, Rtype::CNAME, Rtype::PTR, Rtype::TXT, Rtype::TLSA] {
            let asked = question("example.org", kind);
            let mut message = asked.message(7, false).unwrap();
            message[2..4].copy_from_slice(&(flags | 0x8000).to_be_bytes());
            message[6..12].copy_from_slice(&counts.map(|octet| octet & 3));
            message.extend_from_slice(&body);
            parse_reply(&message, 7, &asked);
        }
    }

    #[test]
    fn any_change_to_a_reply_can_be_parsed(changes: Vec<(prop::sample::Index, u8)>, length in 0..RECORDED.len()) {
        let mut message = RECORDED.to_vec();
        for (index, octet) in changes {
            message[index.index(RECORDED.len())] = octet;
        }
        parse_reply(&message, 0x1234, &question("example.org", Rtype::MX));
        parse_reply(&message[..length], 0x1234, &question("example.org", Rtype::MX));
    }

    #[test]
    fn any_list_of_aliases_ends(links: Vec<(u8, u8)>) {
        let answer: Vec<String> = links.iter().map(|(from, to)| format!("n{} CNAME n{}", from % 16, to % 16)).collect();
        let answer: Vec<&str> = answer.iter().map(String::as_str).collect();
        let asked = question("n0", Rtype::MX);
        let message = reply(&asked.message(7, true).unwrap(), "ok", &answer, &[]);
        prop_assert!(parse_reply(&message, 7, &asked).is_some());
    }
}

/// Rules: SMTP-71.
#[test]
fn mail_is_routed_by_the_mx_records() {
    let server = FakeServer::zone(&[
        "two.example MX 20 b.example",
        "two.example MX 10 A.example",
        "two.example MX 30 a.example",
        "equal.example MX 5 z",
        "equal.example MX 5 a",
        "null.example MX 0 .",
        "mixed.example MX 0 .",
        "mixed.example MX 1 a",
        "odd.example MX 1 under_score.example",
        "odd.example MX 2 sp\\032ace",
        "odd.example MX 3 a/b.example",
        "literal.example MX 1 192.0.2.9",
        "literal.example MX 2 [192.0.2.10]",
        "literal.example MX 3 [IPv6:2001:db8::9]",
        "literal.example MX 4 0.0.0.0",
        "alias.example CNAME two.example",
        "far.example CNAME! alias.example",
        "circle.example CNAME! round.example",
        "round.example CNAME! circle.example",
        "v4.example A 192.0.2.1",
        "v6.example AAAA 2001:db8::1",
        "any.example A 0.0.0.0",
        "text.example TXT",
        "192.0.2.1 TXT",
    ]);
    let resolver = server.resolver();
    let check = |name: &str, expected: MxRoute| assert_eq!(resolver.route(&host(name)), Ok(expected), "{name}");
    let hosts = |hosts: &[(u16, &str)]| {
        MxRoute::Hosts(
            hosts.iter().map(|(preference, name)| MxHost { preference: *preference, host: host(name) }).collect(),
        )
    };
    check("two.example", hosts(&[(10, "a.example"), (20, "b.example")]));
    check("equal.example", hosts(&[(5, "z"), (5, "a")])); // the numbers of `Ids::fixed` count up: no change
    check("null.example", MxRoute::Null);
    check("mixed.example", hosts(&[(1, "a")]));
    // RFC 2181 section 11: a name in DNS may have any octets.
    check("odd.example", hosts(&[(1, "under_score.example"), (2, "sp\\032ace"), (3, "a/b.example")]));
    check(
        "literal.example",
        hosts(&[(1, "192.0.2.9"), (2, "[192.0.2.10]"), (3, "[ipv6:2001:db8::9]"), (4, "0.0.0.0")]),
    );
    check("alias.example", hosts(&[(10, "a.example"), (20, "b.example")]));
    check("far.example", hosts(&[(10, "a.example"), (20, "b.example")]));
    check("v4.example", MxRoute::Implicit);
    check("v6.example", MxRoute::Implicit);
    // The caller decides whether it connects to the address.
    check("any.example", MxRoute::Implicit);
    check("text.example", MxRoute::NoHost);
    // Only an MX record may have an address in place of a name: the owner of the domain has chosen it, not the sender.
    check("192.0.2.1", MxRoute::NoHost);
    check("absent.example", MxRoute::NoDomain);
    let longest = [["a"; 63].concat(), ["b"; 63].concat(), ["c"; 63].concat(), ["d"; 63].concat()].join(".");
    for name in [&longest, "a..example", ".example"] {
        check(name, MxRoute::NotDnsName);
    }
    let error = resolver.route(&host("circle.example")).unwrap_err().text;
    assert!(error.contains("circle.example") && error.contains("aliases"), "{error}");
}

/// The records that only `check --dns` queries, and records that are too short for their type.
#[test]
fn records_of_each_type_are_found() {
    let server = FakeServer::zone(&[
        "1.2.0.192.in-addr.arpa CNAME 1.0-7.2.0.192.in-addr.arpa",
        "1.0-7.2.0.192.in-addr.arpa PTR relay.example.net",
        "www.example CNAME relay.example.net",
        "relay.example.net A 192.0.2.1",
        "joined.example TXT 0261620163",
        "empty.example TXT 00",
        "bad.example TXT 05",
        "_25._tcp.relay.example.net TLSA 030101abcd",
        "_25._tcp.relay.example.net TLSA 030000",
        "bad.example TLSA 0301",
    ]);
    let resolver = server.resolver();
    let records = |text: &str, kind| match resolver.records(&host(text), kind) {
        Ok(Answer::Records(records)) => records,
        other => panic!("{text} {kind}: {other:?}"),
    };
    // RFC 2317: the zone of a part of a network.
    assert_eq!(records("1.2.0.192.in-addr.arpa", Rtype::PTR), [Record::Target(name("relay.example.net"))]);
    assert_eq!(records("www.example", Rtype::CNAME), [Record::Target(name("relay.example.net"))]);
    assert_eq!(records("www.example", Rtype::A), [Record::Address("192.0.2.1".parse().unwrap())]);
    assert_eq!(resolver.records(&host("relay.example.net"), Rtype::CNAME), Ok(Answer::NoRecords));
    assert_eq!(resolver.records(&host("no.example"), Rtype::CNAME), Ok(Answer::NoName));
    assert_eq!(records("joined.example", Rtype::TXT), [Record::Text(b"abc".to_vec())]);
    assert_eq!(records("empty.example", Rtype::TXT), [Record::Text(Vec::new())]);
    let tlsa = [Record::Tlsa([3, 1, 1], vec![0xab, 0xcd]), Record::Tlsa([3, 0, 0], Vec::new())];
    assert_eq!(records("_25._tcp.relay.example.net", Rtype::TLSA), tlsa);
    for kind in [Rtype::TXT, Rtype::TLSA] {
        let error = resolver.records(&host("bad.example"), kind).unwrap_err();
        assert!(error.text.contains("malformed") && !error.no_reply, "{error}");
    }
}

/// A command does not wait long for a server that does not reply, and reports that.
#[test]
fn a_hurried_query_reports_that_no_server_replies() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let resolver = Resolver::at(silent.local_addr().unwrap(), &Ids::fixed());
    let begin = Instant::now();
    let resolver = resolver.hurried(Duration::from_millis(20), begin + Duration::from_secs(60));
    let error = resolver.records(&host("example.org"), Rtype::MX).unwrap_err();
    assert!(error.no_reply && error.text.ends_with("no answer in time"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10));
    let server = FakeServer::start(|asked| vec![reply(&asked.query, "servfail", &[], &[])]);
    let error = server.resolver().records(&host("example.org"), Rtype::MX).unwrap_err();
    assert!(!error.no_reply && error.text.ends_with("SERVFAIL"), "{error}");
}

/// Rules: SMTP-71.
#[test]
fn hosts_of_equal_preference_are_in_random_order() {
    let server = FakeServer::zone(&["e.example MX 5 a", "e.example MX 5 b", "e.example MX 5 c", "e.example MX 1 d"]);
    let resolver = Resolver::at(server.address, &Ids::system(crate::net::tls::random));
    let mut orders = HashSet::new();
    for _ in 0..100 {
        let Ok(MxRoute::Hosts(hosts)) = resolver.route(&host("e.example")) else { panic!("no hosts") };
        orders.insert(hosts.iter().map(|host| host.host.to_string()).collect::<String>());
    }
    assert_eq!(orders.len(), 6, "{orders:?}");
    assert!(orders.iter().all(|order| order.starts_with('d')));
}

#[test]
fn addresses_of_both_kinds_are_found() {
    let server = FakeServer::zone(&[
        "both.example A 192.0.2.2",
        "both.example A 192.0.2.1",
        "both.example A 192.0.2.2",
        "both.example AAAA 2001:db8::1",
        "alias.example CNAME! both.example",
        "strange.example A 0.0.0.0",
        "strange.example A 224.0.0.1",
        "strange.example A 255.255.255.255",
        "strange.example AAAA ::",
        "strange.example AAAA ff02::1",
        "strange.example AAAA ::ffff:0.0.0.0",
        "strange.example A 127.0.0.1",
        "mail.example MX 1 a",
        "wrong.example A 192.0.2.3", // AAAA: NXDOMAIN
    ]);
    let resolver = server.resolver();
    let check = |name: &str, expected: &[&str]| {
        let found = resolver.addresses(&host(name)).unwrap();
        assert_eq!(found.iter().map(IpAddr::to_string).collect::<Vec<_>>(), expected, "{name}");
    };
    check("both.example", &["2001:db8::1", "192.0.2.2", "192.0.2.1"]);
    check("alias.example", &["2001:db8::1", "192.0.2.2", "192.0.2.1"]);
    let strange = ["::", "0.0.0.0", "ff02::1", "224.0.0.1", "::ffff:0.0.0.0", "255.255.255.255", "127.0.0.1"];
    check("strange.example", &strange);
    check("mail.example", &[]);
    check("wrong.example", &["192.0.2.3"]);
    check("absent.example", &[]);
}

/// Rules: SMTP-71.
#[test]
fn families_alternate_and_the_limit_cuts_off_neither() {
    let ipv6 = (1..=120).map(|n| &*format!("many.example AAAA 2001:db8::{n:x}").leak());
    let records: Vec<&str> = ipv6.chain(["many.example A 192.0.2.1", "many.example A 192.0.2.2"]).collect();
    let server = FakeServer::zone(records.leak());
    let found = server.resolver().addresses(&host("many.example")).unwrap();
    let found: Vec<_> = found.iter().map(IpAddr::to_string).collect();
    assert_eq!(found[..5], ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "2001:db8::3"]);
    assert_eq!(found.len(), RESULT_LIMIT);
    // In a list of the system, the family that the system prefers stays first.
    let order = |list: &[&str]| alternate_families(list.to_vec(), |address| address.contains(':')).concat();
    assert_eq!(order(&["1", "2", ":3", ":4", ":5"]), "1:32:4:5");
    assert_eq!(order(&["1", "2"]), "12");
    assert_eq!(order(&[]), "");
}

#[test]
fn addresses_of_one_kind_are_returned_if_the_other_query_fails() {
    let server = FakeServer::start(|asked| {
        let how = if asked.kind() == Rtype::AAAA { "servfail" } else { "ok" };
        let answer = if asked.name() == "half.example" { &["half.example A 192.0.2.1"][..] } else { &[] };
        vec![reply(&asked.query, how, answer, &[])]
    });
    let resolver = server.resolver();
    assert_eq!(resolver.addresses(&host("half.example")).unwrap().len(), 1);
    assert!(resolver.addresses(&host("other.example")).is_err(), "the other half may exist");
    assert!(resolver.route(&host("other.example")).is_err());
}

#[test]
fn a_truncated_reply_is_requested_again_over_tcp() {
    let many: Vec<String> = (0..1000).map(|n| format!("big.example MX {n} host-{n}.mail.big.example")).collect();
    let server = FakeServer::start(move |asked| {
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let how = if asked.tcp { "ok" } else { "truncated" };
        let mut replies = vec![reply(&asked.query, how, if asked.tcp { &many } else { &many[..3] }, &[])];
        if asked.tcp {
            // Wrong replies are ignored over TCP too.
            replies.splice(0..0, [Vec::new(), vec![1, 2, 3], reply(b"\0\0\x01\0\0\0\0\0\0\0\0\0", "ok", &[], &[])]);
        }
        replies
    });
    let Ok(MxRoute::Hosts(hosts)) = server.resolver().route(&host("big.example")) else { panic!("no hosts") };
    assert_eq!(hosts.len(), RESULT_LIMIT);
    assert_eq!(hosts[99].host, host("host-99.mail.big.example"));
    assert_eq!(server.transports(), [false, true]);
}

#[test]
fn a_server_that_truncates_over_tcp_or_has_no_tcp_is_an_error() {
    let server = FakeServer::start(|asked| vec![reply(&asked.query, "truncated", &["t.example MX 1 a"], &[])]);
    let error = server.resolver().route(&host("t.example")).unwrap_err();
    assert!(error.text.contains("truncated over TCP"), "{error}");
    assert_eq!(server.transports(), [false, true]);

    let server =
        FakeServer::start(|asked| if asked.tcp { vec![] } else { vec![reply(&asked.query, "truncated", &[], &[])] });
    let error = server.resolver().route(&host("t.example")).unwrap_err();
    assert!(error.text.contains("closed the connection"), "{error}");
    assert_eq!(server.transports(), [false, true, false, true]);
}

#[test]
fn forged_replies_are_ignored() {
    let forger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let server = FakeServer::start(move |asked| {
        let true_answer = reply(&asked.query, "ok", &["f.example MX 1 good"], &[]);
        let forged = reply(&asked.query, "ok", &["f.example MX 1 evil"], &[]);
        forger.send_to(&forged, asked.peer).unwrap();
        let mut other_id = forged.clone();
        other_id[0] ^= 1;
        let other_name = replace(&forged, b"\x01f\x07example", b"\x01g\x07example");
        vec![Vec::new(), asked.query.clone(), other_id, other_name, true_answer]
    });
    let expected = MxRoute::Hosts(vec![MxHost { preference: 1, host: host("good") }]);
    assert_eq!(server.resolver().route(&host("f.example")), Ok(expected));
}

#[test]
fn many_wrong_replies_do_not_extend_the_deadline() {
    let server = FakeServer::start(|asked| {
        let mut forged = asked.query.clone();
        forged[0] ^= 1;
        vec![forged; 5000]
    });
    let mut resolver = server.resolver();
    resolver.timeout = Duration::from_millis(100);
    let start = Instant::now();
    let error = resolver.route(&host("flood.example")).unwrap_err();
    assert!(error.text.ends_with("no answer in time"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn a_server_that_sends_slowly_over_tcp_does_not_extend_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        while stream.write_all(b"\x10").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut resolver = Resolver::at(address, &Ids::fixed());
    resolver.timeout = Duration::from_millis(200);
    let start = Instant::now();
    assert!(matches!(resolver.over_tcp(address, b"query", |_| None), Err(QueryError::NoReply(_))));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn the_next_server_is_queried_and_again_those_that_did_not_reply() {
    let good = FakeServer::zone(&["n.example MX 1 a"]);
    let bad = FakeServer::start(|asked| vec![reply(&asked.query, "servfail", &[], &[])]);
    let silent = FakeServer::start(|_| vec![]);
    let unused = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut resolver = good.resolver();
    resolver.timeout = Duration::from_millis(300);

    resolver.servers = vec![unused, bad.address, silent.address, good.address].into();
    assert!(matches!(resolver.route(&host("n.example")), Ok(MxRoute::Hosts(_))));
    assert_eq!([bad.transports().len(), silent.transports().len()], [1, 1]);

    resolver.servers = vec![bad.address, silent.address].into();
    let error = resolver.route(&host("n.example")).unwrap_err().text;
    let expected = format!("{}: SERVFAIL; {}: no answer in time", bad.address, silent.address);
    assert_eq!(error, format!("MX records of n.example: {expected}"));
    assert_eq!([bad.transports().len(), silent.transports().len()], [2, 3]);

    resolver.servers = vec![].into();
    let error = resolver.route(&host("n.example")).unwrap_err().text;
    assert_eq!(error, "MX records of n.example: no name server is known");
}

/// Names for which no server replies must delay neither a worker of the relay nor the end of the program.
#[test]
fn all_queries_end_at_one_deadline_or_when_they_are_cancelled() {
    let silent = FakeServer::start(|_| vec![]);
    let cancel = CancelToken::new().unwrap();
    let resolver = || silent.resolver();
    let begun = Instant::now();
    let limited = resolver().within(begun + Duration::from_millis(300), &cancel);
    let error = limited.addresses(&host("n.example")).unwrap_err().text;
    assert_eq!(error, "A records of n.example: there is no time left for the query");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    // There is no second query, and none for the other family.
    assert_eq!(silent.transports().len(), 1);
    let limited = resolver().within(begun + Duration::from_secs(600), &cancel);
    let stopping = std::thread::spawn({
        let cancel = cancel.clone();
        move || {
            std::thread::sleep(Duration::from_millis(100));
            cancel.cancel();
        }
    });
    let begun = Instant::now();
    limited.route(&host("n.example")).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    stopping.join().unwrap();
    let error = system_addresses("localhost:25", begun + Duration::from_secs(600), &cancel).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Interrupted);
}

#[test]
fn an_address_is_not_looked_up() {
    let cancel = CancelToken::new().unwrap();
    let soon = Instant::now() + Duration::from_secs(10);
    for address in ["192.0.2.1:25", "[2001:db8::1]:25"] {
        assert_eq!(system_addresses(address, soon, &cancel).unwrap(), [address.parse().unwrap()]);
    }
    assert!(!system_addresses("localhost:25", soon, &cancel).unwrap().is_empty());
}

#[test]
fn servers_that_do_not_know_edns0_are_queried_without_it() {
    for how in ["formerr", "notimp", "badvers", "silence"] {
        let server = FakeServer::start(move |asked| match (asked.has_edns(), how) {
            (true, "silence") => vec![],
            (true, _) => vec![reply(&asked.query, how, &[], &[])],
            (false, _) => vec![reply(&asked.query, "ok", &["old.example MX 1 a"], &[])],
        });
        let mut resolver = server.resolver();
        resolver.timeout = Duration::from_millis(200);
        assert!(matches!(resolver.route(&host("old.example")), Ok(MxRoute::Hosts(_))), "{how}");
    }
    let server = FakeServer::start(|asked| vec![reply(&asked.query, "notimp", &[], &[])]);
    let error = server.resolver().route(&host("old.example")).unwrap_err();
    assert!(error.text.ends_with("NOTIMP"), "{error}");
    assert_eq!(server.transports().len(), 2);
}

#[test]
fn each_question_has_a_new_id_and_a_new_port() {
    let server = FakeServer::zone(&["i.example MX 1 a"]);
    let resolver = Resolver::at(server.address, &Ids::system(crate::net::tls::random));
    for _ in 0..20 {
        resolver.route(&host("i.example")).unwrap();
    }
    let seen = server.seen.lock().unwrap();
    let ids: HashSet<[u8; 2]> = seen.iter().map(|asked| [asked.query[0], asked.query[1]]).collect();
    let ports: HashSet<u16> = seen.iter().map(|asked| asked.peer.port()).collect();
    assert!(ids.len() > 15 && ports.len() > 15, "{} ids, {} ports", ids.len(), ports.len());
    assert!(seen.iter().all(|asked| asked.query[2] & 1 == 1 && asked.has_edns()), "queries without recursion or EDNS0");
}

#[test]
fn the_octets_of_a_query() {
    let expected = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\x01\x07example\x03org\0\0\x0f\0\x01\0\0\x29\x04\xd0\0\0\0\0\0\0";
    assert_eq!(question("example.org", Rtype::MX).message(0x1234, true).unwrap(), expected);
}

#[test]
fn resolv_conf_is_read() {
    let check = |text: &str, servers: &[&str], timeout: u64, attempts: u32| {
        let resolver = Resolver::configured(text.as_bytes(), &Ids::fixed());
        assert_eq!(resolver.servers.iter().map(SocketAddr::to_string).collect::<Vec<_>>(), servers, "{text}");
        assert_eq!((resolver.timeout.as_secs(), resolver.attempts), (timeout, attempts), "{text}");
    };
    check("", &["127.0.0.1:53", "[::1]:53"], 5, 2);
    check("nameserver 192.0.2.1\n", &["192.0.2.1:53"], 5, 2);
    check("nameserver 2001:db8::1\nnameserver fe80::1%3", &["[2001:db8::1]:53", "[fe80::1%3]:53"], 5, 2);
    check("# a\nnameserver 192.0.2.1\noptions timeout:2 attempts:3 edns0 trust-ad", &["192.0.2.1:53"], 2, 3);
    check("nameserver 192.0.2.1\noptions timeout:0 attempts:0", &["192.0.2.1:53"], 1, 1);
    check("nameserver 192.0.2.1\noptions timeout:99 attempts:99", &["192.0.2.1:53"], 30, 5);
    // Unknown lines and options are ignored.
    check("family inet6\nmalformed\nnameserver x\nnameserver 192.0.2.1\noptions new:1", &["192.0.2.1:53"], 5, 2);
    let four = "nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4";
    check(four, &["192.0.2.1:53", "192.0.2.2:53", "192.0.2.3:53"], 5, 2);
}

fn name(text: &str) -> Name<Vec<u8>> {
    Name::vec_from_str(text).unwrap()
}

fn host(text: &str) -> Domain {
    Domain::of_dns(text).unwrap()
}

fn question(text: &str, kind: Rtype) -> Question {
    Question { name: name(text), kind, aliases: ALIAS_LIMIT }
}

fn replace(octets: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = octets.windows(from.len()).position(|window| window == from).unwrap();
    [&octets[..at], to, &octets[at + from.len()..]].concat()
}

/// The reply to a query. `how`: its code; or "aa" for an authoritative server, "lame" for a server that is neither
/// authoritative nor recursive. Records: "owner TYPE data", names without a final dot.
fn reply(query: &[u8], how: &str, answer: &[&str], authority: &[&str]) -> Vec<u8> {
    let query = Message::from_octets(query).unwrap();
    let code = match how {
        "servfail" => Rcode::SERVFAIL,
        "nxdomain" => Rcode::NXDOMAIN,
        "refused" => Rcode::REFUSED,
        "formerr" => Rcode::FORMERR,
        "notimp" => Rcode::NOTIMP,
        _ => Rcode::NOERROR,
    };
    let mut message = MessageBuilder::new_vec().start_answer(&query, code).unwrap();
    message.header_mut().set_ra(how != "lame" && how != "aa");
    message.header_mut().set_aa(how == "aa");
    message.header_mut().set_tc(how == "truncated");
    for record in answer {
        push(&mut message, record);
    }
    let mut message = message.authority();
    for record in authority {
        let (owner, kind) = record.split_once(' ').unwrap();
        let name = name(owner);
        match kind.split(' ').next().unwrap() {
            "SOA" => {
                let second = Ttl::from_secs(1);
                let data = Soa::new(name.clone(), name.clone(), 1.into(), second, second, second, second);
                message.push((name, second, data)).unwrap();
            }
            _ => message.push((name.clone(), Ttl::from_secs(1), Ns::new(name))).unwrap(),
        }
    }
    let mut message = message.additional();
    let extended = match how {
        "badvers" => Some(OptRcode::BADVERS),
        "cookie" => Some(OptRcode::BADCOOKIE),
        _ => None,
    };
    if let Some(code) = extended {
        let options = |options: &mut domain::base::message_builder::OptBuilder<Vec<u8>>| {
            options.set_rcode(code);
            Ok(())
        };
        message.opt(options).unwrap();
    }
    message.finish()
}

fn push(message: &mut AnswerBuilder<Vec<u8>>, record: &str) {
    let words: Vec<&str> = record.split(' ').collect();
    let owner = name(words[0]);
    match words[1..] {
        ["MX", preference, host] => add(message, owner, Mx::new(preference.parse().unwrap(), name(host))),
        ["CNAME" | "CNAME!", target] => add(message, owner, Cname::new(name(target))),
        ["A", address] => add(message, owner, A::new(address.parse().unwrap())),
        ["AAAA", address] => add(message, owner, Aaaa::new(address.parse().unwrap())),
        ["CH-MX", ..] => message.push((owner, Class::CH, Ttl::from_secs(1), Mx::new(1, name("a")))).unwrap(),
        ["PTR", target] => add(message, owner, Ptr::new(name(target))),
        // The octets of its data in hexadecimal.
        [kind @ ("TLSA" | "TXT"), data] => {
            let kind = if kind == "TLSA" { Rtype::TLSA } else { Rtype::TXT };
            let data = data_encoding::HEXLOWER.decode(data.as_bytes()).unwrap();
            add(message, owner, UnknownRecordData::from_octets(kind, data).unwrap())
        }
        _ => add(message, owner, UnknownRecordData::from_octets(Rtype::TXT, b"\x01x".as_slice()).unwrap()),
    }
}

fn add<D: RecordData + domain::base::rdata::ComposeRecordData>(
    message: &mut AnswerBuilder<Vec<u8>>, owner: impl ToName, data: D,
) {
    message.push((owner, Ttl::from_secs(3600), data)).unwrap();
}

/// A name server on loopback, over UDP and TCP.
struct FakeServer {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Asked>>>,
    cancel: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Clone)]
struct Asked {
    query: Vec<u8>,
    tcp: bool,
    peer: SocketAddr,
}

impl Asked {
    fn name(&self) -> String {
        let message = Message::from_octets(self.query.as_slice()).unwrap();
        message.sole_question().unwrap().qname().to_string()
    }

    fn kind(&self) -> Rtype {
        Message::from_octets(self.query.as_slice()).unwrap().qtype().unwrap()
    }

    fn has_edns(&self) -> bool {
        let message = Message::from_octets(self.query.as_slice()).unwrap();
        message.opt().is_some_and(|options| options.udp_payload_size() == UDP_SIZE)
    }
}

impl FakeServer {
    /// Sends these messages after each query.
    fn start(replies: impl Fn(&Asked) -> Vec<Vec<u8>> + Send + Sync + 'static) -> FakeServer {
        let (udp, tcp) = FakeServer::sockets();
        let address = udp.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let cancel = Arc::new(AtomicBool::new(false));
        let replies = {
            let seen = seen.clone();
            Arc::new(move |asked: Asked| {
                seen.lock().unwrap().push(asked.clone());
                replies(&asked)
            })
        };
        let over_udp = {
            let (cancel, replies) = (cancel.clone(), replies.clone());
            std::thread::spawn(move || {
                let mut buffer = [0; 1500];
                loop {
                    let (length, peer) = udp.recv_from(&mut buffer).unwrap();
                    if cancel.load(Ordering::Relaxed) {
                        return;
                    }
                    for reply in replies(Asked { query: buffer[..length].to_vec(), tcp: false, peer }) {
                        let _ = udp.send_to(&reply, peer);
                    }
                }
            })
        };
        let over_tcp = {
            let cancel = cancel.clone();
            std::thread::spawn(move || {
                loop {
                    let (mut stream, peer) = tcp.accept().unwrap();
                    if cancel.load(Ordering::Relaxed) {
                        return;
                    }
                    let mut length = [0; 2];
                    stream.read_exact(&mut length).unwrap();
                    let mut query = vec![0; u16::from_be_bytes(length).into()];
                    stream.read_exact(&mut query).unwrap();
                    for reply in replies(Asked { query, tcp: true, peer }) {
                        let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
                        let _ = stream.write_all(&[&length, reply.as_slice()].concat());
                    }
                }
            })
        };
        FakeServer { address, seen, cancel, threads: vec![over_udp, over_tcp] }
    }

    /// Replies as a recursive server that knows these records. "CNAME!": the client must query the target.
    fn zone(records: &'static [&'static str]) -> FakeServer {
        FakeServer::start(move |asked| {
            let of = |name: &str| -> Vec<&str> {
                records.iter().copied().filter(|record| record.split(' ').next() == Some(name)).collect()
            };
            let mut answer = of(&asked.name());
            let wrong = asked.name() == "wrong.example" && asked.kind() == Rtype::AAAA;
            let how = if answer.is_empty() || wrong { "nxdomain" } else { "ok" };
            let mut targets = Vec::new();
            for record in &answer {
                if let Some((_, target)) = record.split_once(" CNAME ") {
                    targets.extend(of(target));
                }
            }
            answer.extend(targets);
            let kind = format!(" {} ", asked.kind());
            answer.retain(|record| record.contains(&kind) || record.contains(" CNAME"));
            vec![reply(&asked.query, how, &answer, &[])]
        })
    }

    fn sockets() -> (UdpSocket, TcpListener) {
        loop {
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()) {
                return (udp, tcp);
            }
        }
    }

    fn resolver(&self) -> Resolver {
        Resolver::at(self.address, &Ids::fixed())
    }

    /// For each query so far, whether it arrived over TCP.
    fn transports(&self) -> Vec<bool> {
        self.seen.lock().unwrap().iter().map(|asked| asked.tcp).collect()
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        let waker = UdpSocket::bind("127.0.0.1:0").unwrap();
        waker.send_to(b"wake up", self.address).unwrap();
        drop(TcpStream::connect(self.address));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_temporary_failure_of_the_name_server_is_a_timeout() {
    let kind = |text: &str| timed_out_if_temporary(io::Error::other(text)).kind();
    for system in [
        "Temporary failure in name resolution",
        "temporary failure in name resolution",
        "Try again",
        "Name could not be resolved at this time",
    ] {
        assert_eq!(kind(&format!("failed to lookup address information: {system}")), io::ErrorKind::TimedOut);
    }
    for system in ["Name or service not known", "Name does not resolve", "No address associated with hostname"] {
        assert_eq!(kind(&format!("failed to lookup address information: {system}")), io::ErrorKind::Other);
    }
}
