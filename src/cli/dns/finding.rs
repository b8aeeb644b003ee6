//! Findings about one record or one set of records, in lines for a person; and records in the form of a zone file.

use std::fmt::{Display, Write as _};
use std::net::IpAddr;

use crate::cli::terminal::highlighted;
use crate::mail::address::Domain;

/// Columns of a line, if no record is longer.
const COLUMNS: usize = 96;
/// The column of the verdict, after the kind.
const VERDICT_COLUMN: usize = 8;
/// The column of the text.
const INDENTATION: usize = 18;
/// Records of one set that are shown.
const SHOWN_LIMIT: usize = 10;
/// The longest string in a TXT record (RFC 1035 section 3.3).
const STRING_LIMIT: usize = 255;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum DnsVerdict {
    Good,
    /// It is not wrong, but could be better.
    Note,
    Warning,
    Error,
}

/// A finding about one set of records.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct DnsFinding {
    pub verdict: DnsVerdict,
    /// The kind of the records: "MX", "SPF", ...
    pub kind: &'static str,
    pub text: String,
    /// The records as they are, in the form of a zone file; empty: there are none, or the text names them.
    pub is: Vec<String>,
    /// The records as they should be.
    pub should: Vec<String>,
}

impl DnsFinding {
    pub fn new(verdict: DnsVerdict, kind: &'static str, text: &str) -> DnsFinding {
        DnsFinding { verdict, kind, text: text.to_owned(), is: Vec::new(), should: Vec::new() }
    }

    /// The same with the records as they are, and as they should be.
    pub fn with(self, is: Vec<String>, should: Vec<String>) -> DnsFinding {
        DnsFinding { is, should, ..self }
    }

    /// Appends its lines, each record on its own line so that it can be copied. `colours`: colours the words for an
    /// error or a warning.
    pub fn write(&self, out: &mut String, colours: bool) {
        let start = out.len() + VERDICT_COLUMN;
        let verdict = match self.verdict {
            DnsVerdict::Good => "good",
            DnsVerdict::Note => "note",
            DnsVerdict::Warning => "warning",
            DnsVerdict::Error => "error",
        };
        let mut line = format!("  {:6}{verdict:9}", self.kind);
        let mut is_empty = true;
        for word in self.text.split(' ') {
            if !is_empty && line.len() + 1 + word.len() > COLUMNS {
                let _ = writeln!(out, "{line}");
                line = " ".repeat(INDENTATION - 1);
            }
            let _ = write!(line, " {word}");
            is_empty = false;
        }
        let _ = writeln!(out, "{line}");
        if self.verdict >= DnsVerdict::Warning {
            let word = highlighted(verdict, self.verdict == DnsVerdict::Error, colours);
            out.replace_range(start..start + verdict.len(), &word);
        }
        let should = if self.verdict == DnsVerdict::Note { "could be" } else { "should be" };
        for (title, records) in [("is", &self.is), (should, &self.should)] {
            for (number, record) in records.iter().take(SHOWN_LIMIT).enumerate() {
                let title = if number == 0 { title } else { "" };
                let _ = writeln!(out, "        {title:9} {record}");
            }
            if let more @ 1.. = records.len().saturating_sub(SHOWN_LIMIT) {
                let _ = writeln!(out, "{}; and {more} more", " ".repeat(INDENTATION));
            }
        }
    }
}

/// A record in the form of a zone file; `data` as well.
pub(super) fn zone_line(name: &Domain, kind: &str, data: &str) -> String {
    format!("{}. IN {kind} {data}", name.as_str())
}

pub(super) fn mx_line(domain: &Domain, preference: u16, host: Option<&Domain>) -> String {
    let host = host.map_or("", Domain::as_str);
    zone_line(domain, "MX", &format!("{preference} {host}."))
}

/// A TXT record, in strings of at most 255 octets. Other octets than printable ASCII are escaped, so that none reaches the
/// terminal.
pub(super) fn txt_line(name: &Domain, text: &[u8]) -> String {
    let mut strings: Vec<String> = Vec::new();
    for part in text.chunks(STRING_LIMIT) {
        let mut string = String::new();
        for octet in part {
            let _ = match octet {
                b'"' | b'\\' => write!(string, "\\{}", char::from(*octet)),
                b' '..=b'~' => write!(string, "{}", char::from(*octet)),
                // RFC 1035 section 5.1.
                _ => write!(string, "\\{octet:03}"),
            };
        }
        strings.push(format!("\"{string}\""));
    }
    if strings.is_empty() {
        strings.push("\"\"".to_owned());
    }
    zone_line(name, "TXT", &strings.join(" "))
}

pub(super) fn address_line(host: &Domain, address: IpAddr) -> String {
    zone_line(host, address_kind(address), &address.to_string())
}

pub(super) fn address_kind(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "A" } else { "AAAA" }
}

/// The name at which the PTR record of an address is (RFC 1035 section 3.5, RFC 3596 section 2.5).
pub(super) fn reverse_name(address: IpAddr) -> Domain {
    let name = match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(address) => {
            let mut name = "ip6.arpa".to_owned();
            for octet in address.octets() {
                name = format!("{:x}.{:x}.{name}", octet & 15, octet >> 4);
            }
            name
        }
    };
    Domain::of_dns(&name).expect("a valid name")
}

/// The names or addresses of a list, for a sentence.
pub(super) fn listed(items: &mut dyn Iterator<Item = &dyn Display>) -> String {
    let mut out = String::new();
    for (number, item) in items.enumerate() {
        if number == SHOWN_LIMIT {
            out.push_str(", ...");
            break;
        }
        let _ = write!(out, "{}{item}", if number == 0 { "" } else { ", " });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(text: &str) -> Domain {
        Domain::of_dns(text).unwrap()
    }

    #[test]
    fn records_are_written_as_in_a_zone_file() {
        let name = domain("example.org");
        assert_eq!(mx_line(&name, 10, Some(&domain("a.example"))), "example.org. IN MX 10 a.example.");
        assert_eq!(mx_line(&name, 0, None), "example.org. IN MX 0 .");
        assert_eq!(txt_line(&name, b""), "example.org. IN TXT \"\"");
        assert_eq!(txt_line(&name, b"a \"\\\n\xff\x1b"), r#"example.org. IN TXT "a \"\\\010\255\027""#);
        let long = txt_line(&name, &[b'x'; 256]);
        assert_eq!(long, format!("example.org. IN TXT \"{}\" \"x\"", "x".repeat(255)));
        assert_eq!(address_line(&name, "2001:db8::1".parse().unwrap()), "example.org. IN AAAA 2001:db8::1");
        assert_eq!(reverse_name("192.0.2.17".parse().unwrap()).as_str(), "17.2.0.192.in-addr.arpa");
        let v6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
        assert_eq!(reverse_name("2001:db8::1".parse().unwrap()).as_str(), v6);
    }

    #[test]
    fn a_finding_fits_the_terminal_and_records_stay_whole() {
        let mut out = String::new();
        let text = "word ".repeat(30);
        let records: Vec<String> = (0..12).map(|number| format!("{number} {}", "y".repeat(100))).collect();
        let finding = DnsFinding::new(DnsVerdict::Warning, "MX", text.trim_end());
        finding.with(records.clone(), vec!["z".to_owned()]).write(&mut out, false);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 2 + 10 + 1 + 1, "{out}");
        assert!(lines[0].starts_with("  MX    warning   word word") && lines[0].len() <= COLUMNS, "{out}");
        assert!(lines[1].starts_with("                  word") && lines[1].len() <= COLUMNS, "{out}");
        assert_eq!(lines[2], format!("        is        {}", records[0]));
        assert_eq!(lines[12], "                  ; and 2 more");
        assert_eq!(lines[13], "        should be z");
        let mut out = "example.org\n".to_owned();
        DnsFinding::new(DnsVerdict::Error, "DMARC", "text").write(&mut out, true);
        assert_eq!(out, "example.org\n  DMARC \x1b[1;31merror\x1b[0m     text\n");
    }
}
