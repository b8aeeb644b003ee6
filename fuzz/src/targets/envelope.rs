//! The heads of files in a queue, and their names. The first octet of the input selects the options of the parser; the rest is
//! the file.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use odmr::clock::Timestamp;
use odmr::mail::address::Domain;
use odmr::maildir::Entry;
use odmr::queue::envelope::{Mark, ParseOptions, Parsed, ParsedEnvelope, continues_envelope, parse};

use super::check;

pub fn run(input: &[u8]) {
    let Some((how, file)) = input.split_first() else { return };
    name(file);
    let domain = Domain::parse("example.org").filter(|_| how & 1 == 1);
    let options = ParseOptions {
        domain: domain.as_ref(),
        prefix: (how & 2 == 2).then_some("acme-"),
        id: "none",
        arrived: Timestamp::from_seconds(1_767_323_045),
    };
    let parsed = parse(file, true, options);
    let Parsed::Envelope(parsed) = parsed else { return };
    head_alone(file, &parsed, options);
    assert!(parsed.octets <= file.len() && parsed.envelope.id.bytes().all(|octet| octet.is_ascii_graphic()));
    for (recipient, marks) in parsed.recipients().iter().zip(&parsed.marks) {
        assert!(domain.is_none() || recipient.mailbox.domain() == domain.as_ref());
        assert!(marks.iter().all(|at| file[*at as usize] == b'@' && (*at as usize) < parsed.octets));
    }
    assert_eq!(parsed.recipients().len(), parsed.marks.len());
    assert_eq!(parsed.settled.len(), parsed.settled_addresses.len());
    marked(file, &parsed, options);
    written(&parsed, options);
}

fn reparsed(file: &[u8], options: ParseOptions<'_>) -> Box<ParsedEnvelope> {
    match parse(file, true, options) {
        Parsed::Envelope(parsed) => parsed,
        other => panic!("{other:?} from {}", file.escape_ascii()),
    }
}

/// Checks that the envelope does not depend on what follows the head, and that a part of the head is not read as all of it.
fn head_alone(file: &[u8], parsed: &ParsedEnvelope, options: ParseOptions<'_>) {
    for end in [parsed.octets, parsed.octets / 2] {
        if let Parsed::Envelope(found) = parse(&file[..end], false, options) {
            assert_eq!((found.octets, &found.envelope), (parsed.octets, &parsed.envelope), "{end}");
        }
    }
}

/// Checks that the mark of a recipient settles this recipient and no other: otherwise a message would be sent twice, or not at
/// all.
fn marked(file: &[u8], parsed: &ParsedEnvelope, options: ParseOptions<'_>) {
    for (number, marks) in parsed.marks.iter().enumerate().take(4) {
        for mark in [Mark::Done, Mark::Rejected] {
            let mut file = file.to_vec();
            marks.iter().for_each(|at| file[*at as usize] = mark.octet());
            let after = reparsed(&file, options);
            let left = parsed.recipients().iter().enumerate().filter(|(other, _)| *other != number);
            let left: Vec<_> = left.map(|(_, recipient)| recipient.clone()).collect();
            assert_eq!(after.recipients(), left, "{}", file.escape_ascii());
            assert_eq!(after.settled.len(), parsed.settled.len() + marks.len(), "{}", file.escape_ascii());
            assert_eq!(after.unread, parsed.unread, "{}", file.escape_ascii());
            assert_eq!(after.octets, parsed.octets);
            assert!(after.settled.iter().filter(|other| **other == mark).count() >= marks.len());
        }
    }
}

/// Checks that the head that we write has the same envelope.
fn written(parsed: &ParsedEnvelope, options: ParseOptions<'_>) {
    if parsed.recipients().is_empty() {
        return;
    }
    let head = parsed.envelope.to_header("");
    let content = "Received: by relay.example.net\n\nDelivered-To: nobody@example.org\n";
    let file = format!("{head}{content}");
    let again = reparsed(file.as_bytes(), ParseOptions { prefix: None, ..options });
    assert_eq!(again.octets, head.len(), "{file}");
    assert_eq!(again.envelope, parsed.envelope, "{file}");
    assert!(again.ours && again.unread.is_empty() && again.settled.is_empty(), "{file}");
    for (one, other) in again.recipients().iter().zip(parsed.recipients()) {
        assert_eq!(one.mailbox.to_string(), other.mailbox.to_string());
    }
    assert_eq!(again.envelope.envelope.from.to_string(), parsed.envelope.envelope.from.to_string());
    marked(file.as_bytes(), &again, ParseOptions { prefix: None, ..options });
    assert!(!continues_envelope(content.as_bytes()));
}

/// The first line of the input as the name of a file.
fn name(file: &[u8]) {
    let name = file.split(|octet| matches!(octet, b'\n' | b'/' | 0)).next().unwrap_or_default();
    for seen in [false, true] {
        let entry = Entry { name: OsString::from_vec(name.to_vec()), seen };
        check::shown(&entry.shown_unique());
        assert!(name.starts_with(entry.unique().as_encoded_bytes()));
        assert_eq!(entry.record().ended, entry.ended());
        let _ = (entry.has('S'), entry.eight_bit(), entry.wire_size(), entry.file_size(), entry.named());
        if let Some((domain, _)) = entry.destination() {
            let _ = Domain::of_file_name(domain);
        }
    }
}
