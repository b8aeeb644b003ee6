//! A name server for the tests of this module.

use domain::base::Name;

use crate::mail::address::Domain;
use crate::net::resolver::{Answer, Record, ResolveError, Rtype};

/// Answers from a zone: `owner TYPE data` on each line. `owner FAIL`: SERVFAIL.
pub(super) fn zone_of(zone: &str) -> impl Fn(&Domain, Rtype) -> Result<Answer, ResolveError> {
    let lines: Vec<Vec<String>> = zone
        .lines()
        .map(|line| line.trim().splitn(3, ' ').map(str::to_owned).collect())
        .filter(|words: &Vec<String>| words.len() > 1)
        .collect();
    let name = |text: &str| Name::vec_from_str(text).unwrap();
    move |domain, kind| {
        let of_name: Vec<_> = lines.iter().filter(|words| words[0] == domain.as_str()).collect();
        if of_name.iter().any(|words| words[1] == "FAIL") {
            return Err(ResolveError { text: "SERVFAIL".to_owned(), no_reply: false });
        }
        let found = of_name.iter().filter(|words| words[1] == kind.to_string()).map(|words| match &*words[1] {
            "TXT" => Record::Text(words[2].clone().into_bytes()),
            "MX" => {
                let (preference, host) = words[2].split_once(' ').unwrap();
                Record::Exchange(preference.parse().unwrap(), name(host))
            }
            "CNAME" | "PTR" => Record::Target(name(&words[2])),
            _ => Record::Address(words[2].parse().unwrap()),
        });
        let found: Vec<_> = found.collect();
        Ok(match (found.is_empty(), of_name.is_empty()) {
            (false, _) => Answer::Records(found),
            (true, false) => Answer::NoRecords,
            (true, true) => Answer::NoName,
        })
    }
}
