//! Judges the records about mail that is sent from a domain: SPF (RFC 7208) and DMARC (RFC 7489).

use std::net::IpAddr;

use super::finding::{DnsFinding, DnsVerdict, listed, txt_line};
use super::spf::{SpfResult, spf_texts};
use crate::mail::address::Domain;
use crate::net::resolver::{Answer, Record, ResolveError};

/// The host that sends the mail of a domain.
pub(super) enum SendingHost<'a> {
    /// By this host, with the SPF result of each of its addresses; empty: no address is known. The last: whether it is certain
    /// that this host sends. A customer knows only the name that it calls.
    Host(&'a Domain, Vec<(IpAddr, SpfResult)>, bool),
    /// By another host, whose addresses are not known here, for this reason.
    Elsewhere(&'a str),
}

impl SendingHost<'_> {
    /// Whether every address passes; `None`: it is not known.
    pub fn passes(&self) -> Option<bool> {
        let SendingHost::Host(_, results, is_certain) = self else { return None };
        let judge = |(_, result): &(IpAddr, SpfResult)| match result {
            SpfResult::Pass => Some(true),
            SpfResult::NotEvaluated(_) | SpfResult::TempError(_) => None,
            _ => is_certain.then_some(false),
        };
        // The worst result counts: one address that fails is enough.
        results.iter().map(judge).max_by_key(|passes| match passes {
            Some(true) => 0,
            None => 1,
            Some(false) => 2,
        })?
    }
}

/// Judges the SPF record of a domain, or of a host: `is_helo` (RFC 7208 section 2.3).
pub(super) fn judge_spf(
    domain: &Domain, is_helo: bool, found: &Result<Answer, ResolveError>, sender: &SendingHost<'_>,
) -> DnsFinding {
    let spf = |verdict, text: &str| DnsFinding::new(verdict, "SPF", text);
    let records = match found {
        Ok(Answer::Records(records)) => &records[..],
        Ok(_) => &[],
        Err(error) => return spf(DnsVerdict::Warning, &error.text),
    };
    let mut texts: Vec<&[u8]> = Vec::new();
    for text in spf_texts(records) {
        // Sorted: name servers change the order.
        let at = texts.iter().position(|other| *other > text).unwrap_or(texts.len());
        texts.insert(at, text);
    }
    let is: Vec<String> = texts.iter().map(|text| txt_line(domain, text)).collect();
    // The term that lets the host send.
    let term = match sender {
        _ if is_helo => Some("a".to_owned()),
        SendingHost::Host(host, ..) => Some(format!("a:{host}")),
        SendingHost::Elsewhere(_) => None,
    };
    let should =
        |texts: &[&[u8]]| term.iter().map(|term| txt_line(domain, &with_term(texts, term))).collect::<Vec<_>>();
    match (&texts[..], sender) {
        ([], _) if is_helo => {
            let text = "there is no record; with it, no other host can send as this one (RFC 7208 section 2.3)";
            spf(DnsVerdict::Note, text).with(is, should(&[]))
        }
        ([], SendingHost::Elsewhere(_)) => spf(DnsVerdict::Note, "there is no record"),
        ([], _) => {
            let text = "there is no record, so any host can send as this domain; add other senders";
            spf(DnsVerdict::Warning, text).with(is, should(&[]))
        }
        ([_], SendingHost::Elsewhere(why)) => spf(DnsVerdict::Good, &format!("{}; {why}", is[0])),
        ([one], SendingHost::Host(host, results, is_certain)) => match judge_results(host, results, *is_certain) {
            None if results.is_empty() => {
                let text = format!("not evaluated, as no address of {host} is known");
                spf(DnsVerdict::Note, &text).with(is, Vec::new())
            }
            None => spf(DnsVerdict::Good, &is[0]),
            // If the record is not valid, no added term repairs it.
            Some((verdict, text, repairs)) => {
                spf(verdict, &text).with(is, if repairs { should(&[*one]) } else { Vec::new() })
            }
        },
        (texts, _) => {
            let text = format!(
                "there are {} records, and there must be one: receivers use none of them (RFC 7208 section 3.2)",
                texts.len()
            );
            spf(DnsVerdict::Error, &text)
                .with(is, if texts.iter().any(has_redirect) { Vec::new() } else { should(texts) })
        }
    }
}

/// The worst finding about the results of a host's addresses, and whether a term for the host repairs the record; `None`: all
/// pass.
fn judge_results(
    host: &Domain, results: &[(IpAddr, SpfResult)], is_certain: bool,
) -> Option<(DnsVerdict, String, bool)> {
    use DnsVerdict::{Error, Note, Warning};
    let judge = |result: &SpfResult| {
        let mut addresses = results.iter().filter(|(_, other)| other == result).map(|(address, _)| address as _);
        let addresses = listed(&mut addresses);
        let unless = if is_certain { "" } else { ", if your provider sends by that host: ask its operator" };
        let sends = |what: &str| format!("it does not let {host} ({addresses}) send: {what}{unless}");
        let fail = if is_certain { Error } else { Warning };
        match result {
            SpfResult::Pass => None,
            SpfResult::Fail => Some((fail, sends("receivers reject its mail (fail)"), true)),
            SpfResult::SoftFail => Some((Warning, sends("receivers mark its mail as suspicious (softfail)"), true)),
            SpfResult::None | SpfResult::Neutral => {
                Some((Warning, sends("it neither permits nor forbids that (neutral)"), true))
            }
            SpfResult::PermError(why) => {
                Some((Error, format!("it is not valid, and receivers may reject mail: {why}"), false))
            }
            SpfResult::TempError(why) => Some((Warning, format!("it cannot be evaluated now: {why}"), false)),
            SpfResult::NotEvaluated(why) => Some((
                Note,
                format!("whether it lets {host} send depends on {why}, which is not evaluated here"),
                false,
            )),
        }
    };
    results.iter().filter_map(|(_, result)| judge(result)).max_by_key(|(verdict, ..)| *verdict)
}

/// Whether a record may have a `redirect`, which cannot be merged: a record has one at most (RFC 7208 section 6).
fn has_redirect(text: &&[u8]) -> bool {
    text.to_ascii_lowercase().windows(9).any(|octets| octets == b"redirect=")
}

/// One record with the terms of these, and with `term` as the first.
fn with_term(texts: &[&[u8]], term: &str) -> Vec<u8> {
    let (mut terms, mut end) = (vec![term.as_bytes()], None);
    for other in texts.iter().flat_map(|text| text.split(|octet| *octet == b' ').skip(1)) {
        let mechanism = other.strip_prefix(b"+").or(other.strip_prefix(b"-")).or(other.strip_prefix(b"~"));
        if mechanism.or(other.strip_prefix(b"?")).unwrap_or(other).eq_ignore_ascii_case(b"all") {
            end.get_or_insert(other);
        } else if !other.is_empty() && !terms.contains(&other) {
            terms.push(other);
        }
    }
    if texts.is_empty() {
        end = Some(b"-all");
    }
    let mut text = b"v=spf1".to_vec();
    for term in terms.into_iter().chain(end) {
        text.push(b' ');
        text.extend_from_slice(term);
    }
    text
}

/// The names and values of a DMARC record.
fn tags_of(text: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    text.split(|octet| *octet == b';').filter_map(|tag| {
        let at = tag.iter().position(|octet| *octet == b'=')?;
        Some((tag[..at].trim_ascii(), tag[at + 1..].trim_ascii()))
    })
}

/// Judges the DMARC record of a domain; `passes`: whether SPF lets the provider send its mail. `at`: `_dmarc.` and the domain.
pub(super) fn judge_dmarc(at: &Domain, passes: Option<bool>, found: &Result<Answer, ResolveError>) -> DnsFinding {
    let dmarc = |verdict, text: &str| DnsFinding::new(verdict, "DMARC", text);
    let records = match found {
        Ok(Answer::Records(records)) => &records[..],
        Ok(_) => &[],
        Err(error) => return dmarc(DnsVerdict::Warning, &error.text),
    };
    // RFC 7489 section 6.4: spaces may surround `=` and `;`.
    let is_dmarc = |text: &[u8]| tags_of(text).next().is_some_and(|tag| tag == (b"v", b"DMARC1"));
    let texts = records.iter().filter_map(|record| match record {
        Record::Text(text) if is_dmarc(text) => Some(&**text),
        _ => None,
    });
    let texts: Vec<&[u8]> = texts.collect();
    let is: Vec<String> = texts.iter().map(|text| txt_line(at, text)).collect();
    let text = match texts[..] {
        [] => {
            let text = "there is no record; one of a parent domain may apply";
            return dmarc(DnsVerdict::Note, text).with(is, vec![txt_line(at, b"v=DMARC1; p=none")]);
        }
        [text] => text,
        // RFC 7489 section 6.6.3.
        _ => return dmarc(DnsVerdict::Warning, "of several records receivers use none: keep one").with(is, Vec::new()),
    };
    let policy = tags_of(text).find(|(name, _)| *name == b"p");
    let policy = policy.map(|(_, policy)| policy.to_ascii_lowercase()).unwrap_or_default();
    let strict = match &policy[..] {
        b"none" => return dmarc(DnsVerdict::Good, &is[0]),
        b"quarantine" => "treat its mail as spam",
        b"reject" => "reject its mail",
        _ => return dmarc(DnsVerdict::Warning, "its policy `p` is none, quarantine or reject").with(is, Vec::new()),
    };
    match passes {
        Some(false) => {
            let text = format!(
                "as SPF does not let the provider send, receivers {strict} unless it has a DKIM signature of the domain, and \
                 odmr makes none"
            );
            dmarc(DnsVerdict::Warning, &text).with(is, Vec::new())
        }
        _ => {
            let text = "; mail that is forwarded passes by a DKIM signature only, and odmr makes none";
            dmarc(DnsVerdict::Good, &(is[0].clone() + text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DnsVerdict::{Error, Good, Note, Warning};

    fn domain(text: &str) -> Domain {
        Domain::of_dns(text).unwrap()
    }

    fn answer(texts: &[&str]) -> Result<Answer, ResolveError> {
        let records: Vec<_> = texts.iter().map(|text| Record::Text(text.as_bytes().to_vec())).collect();
        Ok(if records.is_empty() { Answer::NoRecords } else { Answer::Records(records) })
    }

    #[test]
    fn spf_records_are_judged() {
        let host = domain("relay.example.net");
        let (v4, v6): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
        let perm = SpfResult::PermError("a typo".to_owned());
        let macros = SpfResult::NotEvaluated("`ptr`".to_owned());
        let (pass, fail) = (|| (v4, SpfResult::Pass), |address| (address, SpfResult::Fail));
        // The records, the results; the verdict, a part of the text, the record as it should be.
        let table = [
            (&["v=spf1 a:relay.example.net -all", "x"][..], vec![pass()], Good, "IN TXT \"v=spf1 a:relay", ""),
            (&["x"], vec![], Warning, "there is no record", "v=spf1 a:relay.example.net -all"),
            (
                &["v=spf1 mx -all"],
                vec![fail(v4), fail(v6)],
                Error,
                "let relay.example.net (192.0.2.1, 2001:db8::1) send: receivers reject its mail (fail)",
                "v=spf1 a:relay.example.net mx -all",
            ),
            (
                &["v=spf1 mx -all"],
                vec![pass(), fail(v6)],
                Error,
                "(2001:db8::1) send",
                "v=spf1 a:relay.example.net mx -all",
            ),
            (
                &["v=spf1 ~all"],
                vec![(v4, SpfResult::SoftFail)],
                Warning,
                "suspicious",
                "v=spf1 a:relay.example.net ~all",
            ),
            (&["v=spf1"], vec![(v4, SpfResult::Neutral)], Warning, "(neutral)", "v=spf1 a:relay.example.net"),
            (&["v=spf1 al"], vec![(v4, perm)], Error, "not valid, and receivers may reject mail: a typo", ""),
            (&["v=spf1 ptr"], vec![(v4, macros)], Note, "depends on `ptr`, which is not evaluated here", ""),
            (&["v=spf1 a"], vec![], Note, "not evaluated, as no address of relay.example.net is known", ""),
            (
                &["v=spf1 mx ?all", "v=spf1 mx  ip4:192.0.2.9 -all"],
                vec![],
                Error,
                "there are 2 records, and there must be one",
                "v=spf1 a:relay.example.net mx ip4:192.0.2.9 -all",
            ),
            // A record with two `redirect` is not valid, and with `all` a `redirect` has no effect (RFC 7208 section
            // 6).
            (&["v=spf1 redirect=a.example", "v=spf1 Redirect=b.example"], vec![], Error, "there are 2 records", ""),
        ];
        for (texts, results, verdict, text, should) in table {
            let sender = SendingHost::Host(&host, results, true);
            let found = judge_spf(&domain("example.org"), false, &answer(texts), &sender);
            assert!(found.verdict == verdict && found.text.contains(text), "{texts:?}: {found:?}");
            let should: Vec<_> = [should]
                .iter()
                .filter(|text| !text.is_empty())
                .map(|text| format!("example.org. IN TXT \"{text}\""))
                .collect();
            assert_eq!(found.should, should, "{texts:?}");
        }
        let helo = judge_spf(&host, true, &answer(&[]), &SendingHost::Host(&host, vec![], true));
        assert_eq!(helo.verdict, Note);
        assert_eq!(helo.should, ["relay.example.net. IN TXT \"v=spf1 a -all\""]);
        let elsewhere = SendingHost::Elsewhere("not evaluated");
        let found = judge_spf(&host, false, &answer(&["v=spf1 -all"]), &elsewhere);
        assert!(found.verdict == Good && found.text.ends_with("; not evaluated"), "{found:?}");
        assert_eq!(judge_spf(&host, false, &answer(&["v=spf1", "v=spf1"]), &elsewhere).verdict, Error);
        let failed = Err(ResolveError { text: "SERVFAIL".to_owned(), no_reply: false });
        assert_eq!(judge_spf(&host, false, &failed, &elsewhere).verdict, Warning);
    }

    #[test]
    fn a_customer_is_warned_of_spf_without_the_host_that_it_calls() {
        let (host, address) = (domain("relay.example.net"), "192.0.2.1".parse().unwrap());
        // The provider may send by another host, which the record names.
        let perhaps = SendingHost::Host(&host, vec![(address, SpfResult::Fail)], false);
        let found =
            judge_spf(&domain("example.org"), false, &answer(&["v=spf1 include:_spf.example.net -all"]), &perhaps);
        assert!(found.verdict == Warning && found.text.ends_with("sends by that host: ask its operator"), "{found:?}");
        assert_eq!(perhaps.passes(), None);
    }

    /// A record whose macros are not evaluated here may let the host send.
    #[test]
    fn what_is_not_evaluated_is_not_known_to_fail() {
        let host = domain("relay.example.net");
        let (v4, v6): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
        let passes = |results| SendingHost::Host(&host, results, true).passes();
        let unknown = [SpfResult::NotEvaluated("a macro".to_owned()), SpfResult::TempError("SERVFAIL".to_owned())];
        for unknown in unknown {
            assert_eq!(passes(vec![(v4, SpfResult::Pass), (v6, unknown.clone())]), None);
            assert_eq!(passes(vec![(v4, SpfResult::Fail), (v6, unknown)]), Some(false));
        }
        assert_eq!(passes(vec![(v4, SpfResult::Pass)]), Some(true));
        assert_eq!(passes(vec![]), None);
    }

    #[test]
    fn dmarc_records_are_judged() {
        let at = domain("_dmarc.example.org");
        // The records, whether SPF passes; the verdict, a part of the text.
        let table = [
            (&["x"][..], Some(true), Note, "there is no record; one"),
            (&["v=DMARC1; p=none"], Some(false), Good, "_dmarc.example.org. IN TXT \"v=DMARC1; p=none\""),
            (
                &["v=DMARC1;p = Reject ;rua=mailto:x@y"],
                Some(true),
                Good,
                "is forwarded passes by a DKIM signature only",
            ),
            (&["v=DMARC1; p=reject"], None, Good, "is forwarded passes"),
            (&["v=DMARC1; p=reject"], Some(false), Warning, "receivers reject its mail unless it has a DKIM signature"),
            (&["v=DMARC1; sp=none; p=quarantine"], Some(false), Warning, "treat its mail as spam unless"),
            (&["v=DMARC1; sp=none"], Some(true), Warning, "its policy `p`"),
            (&["v=DMARC1; p=none", "v=DMARC1; p=reject"], Some(true), Warning, "of several records"),
            (&["v=DMARC1"], Some(true), Warning, "its policy `p`"),
            (&["v = DMARC1 ; p=none"], Some(true), Good, "p=none"),
            (&["v=DMARC10; p=none"], Some(true), Note, "there is no record; one"),
        ];
        for (texts, passes, verdict, text) in table {
            let found = judge_dmarc(&at, passes, &answer(texts));
            assert!(found.verdict == verdict && found.text.contains(text), "{texts:?} {passes:?}: {found:?}");
        }
        let failed = Err(ResolveError { text: "SERVFAIL".to_owned(), no_reply: false });
        assert_eq!(judge_dmarc(&at, None, &failed).verdict, Warning);
    }
}
