//! Tests of SPF: a zone, and the result of each record in it for three addresses.

use super::*;
use crate::cli::dns::zone::zone_of;
use proptest::prelude::*;

const ZONE: &str = "
    ip.example TXT v=spf1 ip4:192.0.2.0/24 ip6:2001:db8::/32 -all
    case.example TXT V=SPF1 IP4:192.0.2.1 -ALL
    plus.example TXT v=spf1 +all
    empty.example TXT v=spf1
    other.example TXT v=spf10 -all
    other.example TXT v=spf1x
    other.example TXT some words
    soft.example TXT v=spf1 ~all
    neutral.example TXT v=spf1 ?all
    a.example TXT v=spf1 a -all
    a.example A 192.0.2.1
    a.example AAAA 2001:db8::1
    wide.example TXT v=spf1 a:a.example/24//32 -all
    mx.example TXT v=spf1 mx -all
    mx.example MX 10 a.example
    mx2.example TXT v=spf1 mx:mx.example -all
    include.example TXT v=spf1 include:ip.example ~all
    includesfail.example TXT v=spf1 include:a.example ~all
    includesnone.example TXT v=spf1 include:mx3.example ~all
    redirect.example TXT v=spf1 redirect=ip.example
    redirectafter.example TXT v=spf1 redirect=ip.example ?all
    redirectnone.example TXT v=spf1 redirect=none.example
    two.example TXT v=spf1 -all
    two.example TXT v=spf1 +all
    loop.example TXT v=spf1 include:loop.example -all
    eleven.example TXT v=spf1 a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example -all
    ten.example TXT v=spf1 a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:b.example a:a.example -all
    b.example A 198.51.100.1
    b.example AAAA 2001:db9::1
    void.example TXT v=spf1 a:n1.example a:n2.example a:n3.example +all
    void2.example TXT v=spf1 a:n1.example mx:n2.example +all
    exists.example TXT v=spf1 exists:b.example -all
    ptr.example TXT v=spf1 ptr -all
    first.example TXT v=spf1 ip4:192.0.2.1 ip6:2001:db8::1 ptr -all
    macro.example TXT v=spf1 exists:%{i}._spf.example -all
    slash.example TXT v=spf1 a:%{d/}.example/24 -all
    typo.example TXT v=spf1 +all ipv4:192.0.2.1
    number.example TXT v=spf1 +all a:192.0.2.1
    length.example TXT v=spf1 +all ip4:192.0.2.1/33
    length2.example TXT v=spf1 +all a/+3
    family.example TXT v=spf1 +all ip4:2001:db8::1
    allmore.example TXT v=spf1 all:b.example
    bare.example TXT v=spf1 include -all
    modifier.example TXT v=spf1 future=x exp=why.example +all
    exptwice.example TXT v=spf1 exp=a.example exp=b.example +all
    umlaut.example TXT v=spf1 +all ü
    tab.example TXT v=spf1 +all\ta
    control.example TXT v=spf1 a:b\u{1}.example +all
    port.example TXT v=spf1 a:b.example:25 +all
    hyphen.example TXT v=spf1 a:b.-example +all
    hyphen2.example TXT v=spf1 a:b.1-2 +all
    includelength.example TXT v=spf1 include:ip.example/24 -all
    existslength.example TXT v=spf1 exists:b.example/24 +all
    zeros.example TXT v=spf1 +all ip4:192.0.2.1/032
    zeros2.example TXT v=spf1 +all a//00
    zero.example TXT v=spf1 ip4:198.51.100.1/0 -all
    expempty.example TXT v=spf1 exp= +all
    redirectempty.example TXT v=spf1 +all redirect=
    badmodifier.example TXT v=spf1 x*=y +all
    goodmodifier.example TXT v=spf1 x-1_2.z=%{s}:/y +all
    broken.example FAIL";

/// `domain`, the results for 192.0.2.1, for 2001:db8::1, for 203.0.113.1.
const RESULTS: &str = "
    ip pass pass fail
    case pass fail fail
    plus pass pass pass
    empty neutral neutral neutral
    other none none none
    none none none none
    soft softfail softfail softfail
    neutral neutral neutral neutral
    a pass pass fail
    wide pass pass fail
    mx pass pass fail
    mx2 pass pass fail
    include pass pass softfail
    includesfail pass pass softfail
    includesnone permerror permerror permerror
    redirect pass pass fail
    redirectafter neutral neutral neutral
    redirectnone permerror permerror permerror
    two permerror permerror permerror
    loop permerror permerror permerror
    eleven permerror permerror permerror
    ten pass pass fail
    void permerror permerror permerror
    void2 pass pass pass
    exists pass pass pass
    ptr ? ? ?
    first pass pass ?
    macro ? ? ?
    slash ? ? ?
    typo permerror permerror permerror
    number permerror permerror permerror
    length permerror permerror permerror
    length2 permerror permerror permerror
    family permerror permerror permerror
    allmore permerror permerror permerror
    bare permerror permerror permerror
    modifier pass pass pass
    exptwice permerror permerror permerror
    umlaut permerror permerror permerror
    tab permerror permerror permerror
    control permerror permerror permerror
    port permerror permerror permerror
    hyphen permerror permerror permerror
    hyphen2 pass pass pass
    includelength permerror permerror permerror
    existslength permerror permerror permerror
    zeros permerror permerror permerror
    zeros2 permerror permerror permerror
    zero pass fail pass
    expempty permerror permerror permerror
    redirectempty permerror permerror permerror
    badmodifier permerror permerror permerror
    goodmodifier pass pass pass
    broken temperror temperror temperror";

#[test]
fn spf_lets_those_send_whom_the_record_names() {
    let ask = zone_of(ZONE);
    for line in RESULTS.lines().filter(|line| !line.trim().is_empty()) {
        let words: Vec<_> = line.split_whitespace().collect();
        let domain = Domain::of_dns(&format!("{}.example", words[0])).unwrap();
        for (address, expected) in ["192.0.2.1", "2001:db8::1", "203.0.113.1"].iter().zip(&words[1..]) {
            let result = check_spf(&domain, address.parse().unwrap(), &ask);
            let word = match &result {
                SpfResult::None => "none",
                SpfResult::Neutral => "neutral",
                SpfResult::Pass => "pass",
                SpfResult::SoftFail => "softfail",
                SpfResult::Fail => "fail",
                SpfResult::TempError(_) => "temperror",
                SpfResult::PermError(_) => "permerror",
                SpfResult::NotEvaluated(_) => "?",
            };
            assert_eq!(word, *expected, "{domain} {address}: {result:?}");
        }
    }
    let mapped = check_spf(&Domain::of_dns("ip.example").unwrap(), "::ffff:192.0.2.1".parse().unwrap(), &ask);
    assert_eq!(mapped, SpfResult::Pass);
}

proptest! {
    #[test]
    fn any_record_is_evaluated(text in "[vV]=spf1 [ -~]{0,60}", octets: Vec<u8>) {
        for text in [text.into_bytes(), [b"v=spf1 ", &octets[..]].concat()] {
            let ask = |_: &Domain, _| Ok(Answer::Records(vec![Record::Text(text.clone())]));
            check_spf(&Domain::of_dns("a.example").unwrap(), "192.0.2.1".parse().unwrap(), &ask);
        }
    }

    #[test]
    fn any_terms_are_evaluated(terms in prop::collection::vec("[-+~?]?(a|mx|ip4|ip6|include|redirect=|ptr|all|exists)(:|/)?[a.1%{}:/=]{0,9}", 0..8)) {
        let text = format!("v=spf1 {}", terms.join(" ")).into_bytes();
        let ask = |_: &Domain, _| Ok(Answer::Records(vec![Record::Text(text.clone())]));
        check_spf(&Domain::of_dns("a.example").unwrap(), "2001:db8::1".parse().unwrap(), &ask);
    }
}
