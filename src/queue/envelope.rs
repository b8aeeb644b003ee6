//! The envelope of a message in a queue: header lines in front of the content.
//!
//! ```text
//! Return-Path: <sender@example.net>       the reverse path; <> for a DSN
//! Delivered-To: alice@example.org         one line for each recipient
//! X-ODMR-Recipient: NOTIFY=… ORCPT=…      the DSN parameters of the recipient before it (RFC 3461)
//! X-ODMR-Envelope: id=…; arrived=…        ours; files of other delivery agents do not have it
//! Received: from …                        here the content begins
//! ```
//!
//! Delivery agents write such lines, so any of them may fill the queue. The envelope ends at the first other line. A
//! `Return-Path` that a sender has forged comes after our `Received`, so it is never read as part of the envelope.

use crate::clock::Timestamp;
use crate::mail::address::{Domain, Mailbox, ReversePath, reverse_path};
use crate::smtp::command::{Body, Envelope, Notify, Recipient, Return, original_recipient};

/// Octets of an envelope at most.
pub const ENVELOPE_LIMIT: usize = 1 << 20;

/// An envelope, and what the queue knows of the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedEnvelope {
    /// The id of the message in the log and in its `Received` field.
    pub id: String,
    /// When we accepted the message; if another agent wrote the file, when it did.
    pub arrived: Timestamp,
    pub envelope: Envelope,
}

impl QueuedEnvelope {
    /// The same message for other recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> QueuedEnvelope {
        let envelope = self.envelope.with_recipients(recipients);
        QueuedEnvelope { id: self.id.clone(), arrived: self.arrived, envelope }
    }

    /// The header lines in front of the content, each with its LF; `extra` lines come last.
    pub fn to_header(&self, extra: &str) -> String {
        let mut text = format!("Return-Path: <{}>\n", self.envelope.from);
        for recipient in &self.envelope.recipients {
            text += &format!("Delivered-To: {}\n", recipient.mailbox);
            let notify = recipient.notify.as_given().map(|notify| format!(" NOTIFY={notify}")).unwrap_or_default();
            let original = recipient.original.as_ref().map(|original| format!(" ORCPT={original}")).unwrap_or_default();
            if !notify.is_empty() || !original.is_empty() {
                text += &format!("X-ODMR-Recipient:{notify}{original}\n");
            }
        }
        text += &format!("X-ODMR-Envelope: id={}; arrived={}", self.id, self.arrived.rfc3339());
        text += match self.envelope.body {
            Body::Unsaid => "",
            Body::SevenBit => "; body=7BIT",
            Body::EightBit => "; body=8BITMIME",
        };
        text += if self.envelope.utf8 { "; smtputf8" } else { "" };
        text += match self.envelope.ret {
            None => "",
            Some(Return::Full) => "; ret=FULL",
            Some(Return::Header) => "; ret=HDRS",
        };
        // The last: xtext may hold a semicolon, but no space.
        if let Some(id) = &self.envelope.envelope_id {
            text += &format!("; envid={id}");
        }
        text + "\n" + extra
    }
}

/// An envelope read from the front of a file.
#[derive(Debug)]
pub struct ParsedEnvelope {
    pub envelope: QueuedEnvelope,
    /// Octets of the envelope: the content begins after them.
    pub octets: usize,
    /// Lines of the envelope.
    pub lines: usize,
    /// We have written the file, so the sizes in its name are right.
    pub ours: bool,
}

impl ParsedEnvelope {
    /// The recipients in the queue's domain; at least one.
    pub fn recipients(&self) -> &[Recipient] {
        &self.envelope.envelope.recipients
    }
}

/// The result of [`parse`].
#[derive(Debug)]
pub enum Parsed {
    Envelope(ParsedEnvelope),
    /// The envelope does not end within these octets.
    More,
    /// The file has no recipient in the domain.
    NoRecipients,
}

/// Reads the envelope from the octets at the front of a file. `end`: these octets are the whole file. `domain`: recipients
/// in other domains are ignored. `id` and `arrived` are used for files that have none.
pub fn parse(front: &[u8], end: bool, domain: Option<&Domain>, id: &str, arrived: Timestamp) -> Parsed {
    let mut fields = Fields::default();
    let (mut octets, mut lines) = (0, 0);
    loop {
        let rest = &front[octets..];
        let Some(length) = rest.iter().position(|octet| *octet == b'\n').map(|at| at + 1) else {
            if end {
                break;
            }
            return Parsed::More;
        };
        let continuation = octets > 0 && matches!(rest[0], b' ' | b'\t');
        if !continuation && !fields.add(&rest[..length]) {
            break;
        }
        octets += length;
        lines += 1;
    }
    let recipients = fields.recipients(domain);
    if recipients.is_empty() {
        return Parsed::NoRecipients;
    }
    let envelope = fields.envelope(recipients, id, arrived);
    Parsed::Envelope(ParsedEnvelope { envelope, octets, lines, ours: fields.ours.is_some() })
}

/// A recipient as the file names it.
struct NamedRecipient<'a> {
    address: &'a [u8],
    /// The value of `X-ODMR-Recipient`; empty: none.
    parameters: &'a [u8],
}

/// The fields of an envelope.
#[derive(Default)]
struct Fields<'a> {
    return_path: Option<&'a [u8]>,
    delivered_to: Vec<NamedRecipient<'a>>,
    original_to: Vec<NamedRecipient<'a>>,
    ours: Option<&'a str>,
}

impl<'a> Fields<'a> {
    /// Adds a field. Returns whether it belongs to the envelope.
    fn add(&mut self, line: &'a [u8]) -> bool {
        let Some(colon) = line.iter().position(|octet| *octet == b':') else { return false };
        let (name, value) = (line[..colon].trim_ascii().to_ascii_lowercase(), line[colon + 1..].trim_ascii());
        let named = |address| NamedRecipient { address, parameters: b"" };
        match name.as_slice() {
            b"return-path" => self.return_path = self.return_path.or(Some(value)),
            b"delivered-to" => self.delivered_to.push(named(value)),
            // Exim separates recipients by commas.
            b"x-original-to" | b"envelope-to" => {
                self.original_to.extend(value.split(|octet| *octet == b',').map(named));
            }
            b"x-odmr-envelope" => self.ours = std::str::from_utf8(value).ok(),
            b"x-odmr-recipient" => {
                if let Some(recipient) = self.delivered_to.last_mut() {
                    recipient.parameters = value;
                }
            }
            // Other lines of delivery agents, and of our copies in `.refused`.
            b"delivery-date" | b"x-envelope-from" | b"x-odmr-refused" => {}
            _ => return false,
        }
        true
    }

    /// The recipients in `domain`, each once: those of `Delivered-To`, or if there are none, the original ones.
    fn recipients(&self, domain: Option<&Domain>) -> Vec<Recipient> {
        let mut recipients: Vec<Recipient> = Vec::new();
        for list in [&self.delivered_to, &self.original_to] {
            for found in list.iter().filter_map(|named| recipient(named, domain)) {
                if !recipients.iter().any(|other| other.mailbox == found.mailbox) {
                    recipients.push(found);
                }
            }
            if !recipients.is_empty() {
                break;
            }
        }
        recipients
    }

    fn envelope(&self, recipients: Vec<Recipient>, id: &str, arrived: Timestamp) -> QueuedEnvelope {
        // A DSN to a wrong address would be worse than none.
        let from =
            self.return_path.and_then(|path| reverse_path(path).ok()).map_or(ReversePath::Null, |(path, _)| path);
        let envelope = Envelope { recipients, ..Envelope::new(from) };
        let mut queued = QueuedEnvelope { id: id.to_owned(), arrived, envelope };
        let envelope = &mut queued.envelope;
        for word in self.ours.unwrap_or_default().split("; ").map(str::trim) {
            match word.split_once('=').unwrap_or((word, "")) {
                ("id", id) => queued.id = id.to_owned(),
                ("arrived", date) => queued.arrived = Timestamp::parse_rfc3339(date).unwrap_or(arrived),
                ("body", "8BITMIME") => envelope.body = Body::EightBit,
                ("body", "7BIT") => envelope.body = Body::SevenBit,
                ("smtputf8", _) => envelope.utf8 = true,
                ("ret", "FULL") => envelope.ret = Some(Return::Full),
                ("ret", "HDRS") => envelope.ret = Some(Return::Header),
                ("envid", id) => envelope.envelope_id = Some(id.to_owned()),
                _ => {}
            }
        }
        queued
    }
}

/// The recipient with its parameters; `None`: it is not a valid address in `domain`.
fn recipient(named: &NamedRecipient<'_>, domain: Option<&Domain>) -> Option<Recipient> {
    // Not `trim`: a local part may begin or end with white space of Unicode.
    let text = std::str::from_utf8(named.address).ok()?.trim_matches([' ', '\t']);
    let text = text.strip_prefix('<').and_then(|text| text.strip_suffix('>')).unwrap_or(text);
    let mailbox = Mailbox::parse(text).filter(|mailbox| domain.is_none() || mailbox.domain() == domain)?;
    let mut recipient = Recipient::plain(mailbox);
    for parameter in named.parameters.split(|octet| *octet == b' ') {
        if let Some(value) = parameter.strip_prefix(b"NOTIFY=") {
            recipient.notify = Notify::parse(value).unwrap_or_default();
        } else if let Some(value) = parameter.strip_prefix(b"ORCPT=") {
            recipient.original = original_recipient(value);
        }
    }
    Some(recipient)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> Option<Domain> {
        Domain::parse("example.org")
    }

    fn parsed(text: &str) -> ParsedEnvelope {
        match parse(text.as_bytes(), true, domain().as_ref(), "id", Timestamp::from_seconds(0)) {
            Parsed::Envelope(parsed) => parsed,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn recipients(text: &str) -> Vec<String> {
        parsed(text).recipients().iter().map(|recipient| recipient.mailbox.to_string()).collect()
    }

    /// Rules: MD-15.
    #[test]
    fn what_is_written_is_read_again() {
        let parameters = b"NOTIFY=SUCCESS,DELAY ORCPT=rfc822;X+40y";
        let envelope = Envelope {
            from: reverse_path(b"<a@b.example>").unwrap().0,
            recipients: vec![
                recipient(&NamedRecipient { address: b"x@example.org", parameters }, None).unwrap(),
                Recipient::plain(Mailbox::parse("\"y z\"@example.org").unwrap()),
            ],
            body: Body::EightBit,
            utf8: true,
            ret: Some(Return::Header),
            envelope_id: Some("QQ;314159".to_owned()),
        };
        let envelope =
            QueuedEnvelope { id: "abc".to_owned(), arrived: Timestamp::from_seconds(1_767_323_045), envelope };
        let text = envelope.to_header("X-ODMR-Refused: <x@example.org> 550\n") + "Received: x\n\nbody\n";
        let parsed = parsed(&text);
        assert_eq!(parsed.envelope, envelope);
        assert!(parsed.ours && text[parsed.octets..].starts_with("Received: x") && parsed.lines == 6);
    }

    #[test]
    fn files_of_other_agents() {
        let postfix = "Return-Path: <a@b.example>\nX-Original-To: list@example.org\nDelivered-To: eva@example.org\n\
                       Received: by mx\n\nDelivered-To: mallory@example.org\n";
        assert_eq!(recipients(postfix), ["eva@example.org"]);
        assert!(!parsed(postfix).ours);
        let exim = "Return-path: <>\nEnvelope-to: eva@example.org, bob@example.org\nDelivery-date: now\n\tand then\n\
                    Received: by mx\n";
        assert_eq!(recipients(exim), ["eva@example.org", "bob@example.org"]);
        assert_eq!(parsed(exim).envelope.envelope.from, ReversePath::Null);
        assert_eq!(recipients("Delivered-To: <eva@EXAMPLE.org>\r\nSubject: crlf\r\n"), ["eva@example.org"]);
        let other_domain = "Delivered-To: eva@example.net\nX-Original-To: eva@example.org\n\n";
        assert_eq!(recipients(other_domain), ["eva@example.org"]);
    }

    #[test]
    fn a_file_without_a_recipient_in_the_domain_is_not_a_message() {
        for text in ["", "\n", "Subject: hello\n\n", "Delivered-To: eva@example.net\n\n", "Return-Path: <a@b.c>\n"] {
            let parsed = parse(text.as_bytes(), true, domain().as_ref(), "id", Timestamp::from_seconds(0));
            assert!(matches!(parsed, Parsed::NoRecipients), "{text:?}");
        }
        let unfinished = parse(b"Delivered-To: eva@exam", false, domain().as_ref(), "id", Timestamp::from_seconds(0));
        assert!(matches!(unfinished, Parsed::More));
    }

    proptest::proptest! {
        #[test]
        fn no_file_makes_it_panic(front: Vec<u8>, end: bool) {
            let _ = parse(&front, end, domain().as_ref(), "id", Timestamp::from_seconds(0));
        }
    }
}
