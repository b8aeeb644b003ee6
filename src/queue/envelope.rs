//! The envelope of a message at rest: header lines in front of what is sent on.
//!
//! ```text
//! Return-Path: <sender@example.net>       the reverse path; <> for a notice
//! Delivered-To: alice@example.org         one line a recipient
//! X-ODMR-Recipient: NOTIFY=… ORCPT=…      what the sender wants to know of the recipient before it
//! X-ODMR-Envelope: id=…; arrived=…        ours; other agents' files do not have it
//! Received: from …                        here begins what is sent on
//! ```
//!
//! Delivery agents have written such lines for decades, so any of them may fill the queue. Where the lines
//! of the envelope end, the content begins, whatever it says itself: a `Return-Path` that a sender forged
//! stands behind our `Received` and is never read as an envelope.

use crate::clock::Timestamp;
use crate::mail::address::{Domain, Mailbox, ReversePath, reverse_path};
use crate::smtp::command::{Body, Envelope, Notify, Recipient, Return, original_recipient};

/// More than this is no envelope.
pub const ENVELOPE_LIMIT: usize = 1 << 20;

/// An envelope with what the queue adds to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedEnvelope {
    pub id: String,
    /// When we accepted the message, or found it, if another agent wrote it.
    pub arrived: Timestamp,
    pub envelope: Envelope,
}

impl QueuedEnvelope {
    /// The same message for other recipients.
    pub fn with_recipients(&self, recipients: Vec<Recipient>) -> QueuedEnvelope {
        let envelope = self.envelope.with_recipients(recipients);
        QueuedEnvelope { id: self.id.clone(), arrived: self.arrived, envelope }
    }

    /// The header lines in front of the content, with `extra` lines after our own.
    pub fn to_header(&self, extra: &str) -> String {
        let mut text = format!("Return-Path: <{}>\n", self.envelope.from);
        for recipient in &self.envelope.recipients {
            text.push_str(&format!("Delivered-To: {}\n", recipient.mailbox));
            let notify = recipient.notify.as_given().map(|notify| format!(" NOTIFY={notify}"));
            let original = recipient.original.as_ref().map(|original| format!(" ORCPT={original}"));
            if notify.is_some() || original.is_some() {
                let words = [notify, original].map(Option::unwrap_or_default).concat();
                text.push_str(&format!("X-ODMR-Recipient:{words}\n"));
            }
        }
        text.push_str(&format!("X-ODMR-Envelope: id={}; arrived={}", self.id, self.arrived.rfc3339()));
        match self.envelope.body {
            Body::Unsaid => {}
            Body::SevenBit => text.push_str("; body=7BIT"),
            Body::EightBit => text.push_str("; body=8BITMIME"),
        }
        if self.envelope.utf8 {
            text.push_str("; smtputf8");
        }
        match self.envelope.ret {
            None => {}
            Some(Return::Full) => text.push_str("; ret=FULL"),
            Some(Return::Header) => text.push_str("; ret=HDRS"),
        }
        // The last: xtext may hold a semicolon, but no space.
        if let Some(id) = &self.envelope.envelope_id {
            text.push_str(&format!("; envid={id}"));
        }
        text.push('\n');
        text.push_str(extra);
        text
    }
}

/// An envelope read from the front of a file.
#[derive(Debug)]
pub struct ParsedEnvelope {
    pub envelope: QueuedEnvelope,
    /// Octets and lines of the envelope: the content begins after them.
    pub octets: usize,
    pub lines: usize,
    /// We have written the file, so the sizes in its name are right.
    pub ours: bool,
}

impl ParsedEnvelope {
    pub fn recipients(&self) -> &[Recipient] {
        &self.envelope.envelope.recipients
    }
}

/// What the front of a file says.
#[derive(Debug)]
pub enum Parsed {
    Envelope(ParsedEnvelope),
    /// The envelope does not end within these octets.
    More,
    /// There is nobody to send it to.
    NoRecipients,
}

/// Reads the envelope. `end`: these octets are the whole file. `domain`: only recipients there are meant.
/// `id` is used for files that have none.
pub fn parse(front: &[u8], end: bool, domain: Option<&Domain>, id: &str, arrived: Timestamp) -> Parsed {
    let mut fields = Fields::default();
    let (mut octets, mut lines) = (0, 0);
    let mut field = Field::Content;
    loop {
        let rest = &front[octets..];
        let Some(length) = rest.iter().position(|octet| *octet == b'\n').map(|at| at + 1) else {
            if end {
                break;
            }
            return Parsed::More;
        };
        let line = rest[..length].trim_ascii_end();
        if !matches!(rest[0], b' ' | b'\t') || octets == 0 {
            field = Field::of(line);
        }
        if field == Field::Content {
            break;
        }
        fields.take(field, line);
        octets += length;
        lines += 1;
    }
    fields.head(domain, id, arrived, octets, lines)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    ReturnPath,
    DeliveredTo,
    OriginalTo,
    /// Written by delivery agents, of no use here.
    Passed,
    Ours,
    /// DSN parameters of the recipient before.
    DsnParameters,
    Content,
}

impl Field {
    fn of(line: &[u8]) -> Field {
        const NAMES: [(&str, Field); 9] = [
            ("Return-Path", Field::ReturnPath),
            ("Delivered-To", Field::DeliveredTo),
            ("X-Original-To", Field::OriginalTo),
            ("Envelope-To", Field::OriginalTo),
            ("Delivery-Date", Field::Passed),
            ("X-Envelope-From", Field::Passed),
            ("X-ODMR-Envelope", Field::Ours),
            ("X-ODMR-Recipient", Field::DsnParameters),
            ("X-ODMR-Refused", Field::Passed),
        ];
        let name = line.split(|octet| *octet == b':').next().unwrap_or_default().trim_ascii();
        let known = NAMES.iter().find(|(known, _)| known.as_bytes().eq_ignore_ascii_case(name));
        known.map_or(Field::Content, |(_, field)| *field)
    }
}

#[derive(Default)]
struct Fields<'a> {
    return_path: Option<&'a [u8]>,
    delivered_to: Vec<(&'a [u8], &'a [u8])>,
    original_to: Vec<(&'a [u8], &'a [u8])>,
    ours: Option<&'a str>,
}

impl<'a> Fields<'a> {
    fn take(&mut self, field: Field, line: &'a [u8]) {
        let value = match line.iter().position(|octet| *octet == b':') {
            Some(at) => line[at + 1..].trim_ascii(),
            None => return,
        };
        match field {
            Field::ReturnPath => self.return_path = self.return_path.or(Some(value)),
            Field::DeliveredTo => self.delivered_to.push((value, b"")),
            // Exim writes all recipients into one line.
            Field::OriginalTo => {
                self.original_to.extend(value.split(|octet| *octet == b',').map(|value| (value, &b""[..])));
            }
            Field::Ours => self.ours = std::str::from_utf8(value).ok(),
            Field::DsnParameters => {
                if let Some((_, wishes)) = self.delivered_to.last_mut() {
                    *wishes = value;
                }
            }
            Field::Passed | Field::Content => {}
        }
    }

    fn head(self, domain: Option<&Domain>, id: &str, arrived: Timestamp, octets: usize, lines: usize) -> Parsed {
        let here = |(value, wishes): &(&[u8], &[u8])| {
            // Not `trim`: a local part may begin or end with white space of Unicode's.
            let text = std::str::from_utf8(value).ok()?.trim_matches([' ', '\t']);
            let text = text.strip_prefix('<').and_then(|text| text.strip_suffix('>')).unwrap_or(text);
            let mailbox = Mailbox::parse(text).filter(|mailbox| domain.is_none() || mailbox.domain() == domain)?;
            Some(recipient(mailbox, wishes))
        };
        let mut recipients: Vec<Recipient> = Vec::new();
        for list in [&self.delivered_to, &self.original_to] {
            for found in list.iter().filter_map(here) {
                if !recipients.iter().any(|other| other.mailbox == found.mailbox) {
                    recipients.push(found);
                }
            }
            if !recipients.is_empty() {
                break;
            }
        }
        if recipients.is_empty() {
            return Parsed::NoRecipients;
        }
        let from = match self.return_path.map(reverse_path) {
            Some(Ok((path, _))) => path,
            // Better no notice than one to a wrong address.
            _ => ReversePath::Null,
        };
        let ours = self.ours.is_some();
        let mut envelope = Envelope { recipients, ..Envelope::new(from) };
        let (mut id, mut arrived) = (id.to_owned(), arrived);
        for word in self.ours.unwrap_or_default().split("; ").map(str::trim) {
            match word.split_once('=').unwrap_or((word, "")) {
                ("id", ours) => id = ours.to_owned(),
                ("arrived", date) => arrived = Timestamp::parse_rfc3339(date).unwrap_or(arrived),
                ("body", "8BITMIME") => envelope.body = Body::EightBit,
                ("body", "7BIT") => envelope.body = Body::SevenBit,
                ("smtputf8", _) => envelope.utf8 = true,
                ("ret", "FULL") => envelope.ret = Some(Return::Full),
                ("ret", "HDRS") => envelope.ret = Some(Return::Header),
                ("envid", id) => envelope.envelope_id = Some(id.to_owned()),
                _ => {}
            }
        }
        let envelope = QueuedEnvelope { id, arrived, envelope };
        Parsed::Envelope(ParsedEnvelope { envelope, octets, lines, ours })
    }
}

/// A recipient with the parameters it came with.
fn recipient(mailbox: Mailbox, wishes: &[u8]) -> Recipient {
    let mut recipient = Recipient::plain(mailbox);
    for word in wishes.split(|octet| *octet == b' ') {
        if let Some(value) = word.strip_prefix(b"NOTIFY=") {
            recipient.notify = Notify::parse(value).unwrap_or_default();
        } else if let Some(value) = word.strip_prefix(b"ORCPT=") {
            recipient.original = original_recipient(value);
        }
    }
    recipient
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> Option<Domain> {
        Domain::parse("example.org")
    }

    fn head(text: &str) -> ParsedEnvelope {
        match parse(text.as_bytes(), true, domain().as_ref(), "id", Timestamp::from_seconds(0)) {
            Parsed::Envelope(head) => head,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn recipients(text: &str) -> Vec<String> {
        head(text).recipients().iter().map(|recipient| recipient.mailbox.to_string()).collect()
    }

    /// Rules: MD-15.
    #[test]
    fn what_is_written_is_read_again() {
        let envelope = Envelope {
            from: reverse_path(b"<a@b.example>").unwrap().0,
            recipients: vec![
                recipient(Mailbox::parse("x@example.org").unwrap(), b"NOTIFY=SUCCESS,DELAY ORCPT=rfc822;X+40y"),
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
        let head = head(&text);
        assert_eq!(head.envelope, envelope);
        assert!(head.ours && text[head.octets..].starts_with("Received: x") && head.lines == 6);
    }

    #[test]
    fn files_of_other_agents() {
        let postfix = "Return-Path: <a@b.example>\nX-Original-To: list@example.org\nDelivered-To: eva@example.org\n\
                       Received: by mx\n\nDelivered-To: mallory@example.org\n";
        assert_eq!(recipients(postfix), ["eva@example.org"]);
        assert!(!head(postfix).ours);
        let exim = "Return-path: <>\nEnvelope-to: eva@example.org, bob@example.org\nDelivery-date: now\n\tand then\n\
                    Received: by mx\n";
        assert_eq!(recipients(exim), ["eva@example.org", "bob@example.org"]);
        assert_eq!(head(exim).envelope.envelope.from, ReversePath::Null);
        assert_eq!(recipients("Delivered-To: <eva@EXAMPLE.org>\r\nSubject: crlf\r\n"), ["eva@example.org"]);
        let other_domain = "Delivered-To: eva@example.net\nX-Original-To: eva@example.org\n\n";
        assert_eq!(recipients(other_domain), ["eva@example.org"]);
    }

    #[test]
    fn what_has_no_recipient_here_is_not_sent() {
        for text in ["", "\n", "Subject: hello\n\n", "Delivered-To: eva@example.net\n\n", "Return-Path: <a@b.c>\n"] {
            let parsed = parse(text.as_bytes(), true, domain().as_ref(), "id", Timestamp::from_seconds(0));
            assert!(matches!(parsed, Parsed::NoRecipients), "{text:?}");
        }
        let unfinished = parse(b"Delivered-To: eva@exam", false, domain().as_ref(), "id", Timestamp::from_seconds(0));
        assert!(matches!(unfinished, Parsed::More));
    }

    proptest::proptest! {
        #[test]
        fn any_file_is_survived(front: Vec<u8>, end: bool) {
            let _ = parse(&front, end, domain().as_ref(), "id", Timestamp::from_seconds(0));
        }
    }
}
