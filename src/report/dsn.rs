//! A delivery status notification as text (RFC 3464, RFC 6522, RFC 3461 section 6, RFC 6533).
//!
//! ```text
//! multipart/report; report-type=delivery-status
//! ├── text/plain                  what happened to whom, and what the sender can do     ┐
//! ├── message/delivery-status     the same for programs: once the message, then         │ head()
//! │                               a group of fields for each recipient                  │
//! └── text/rfc822-headers         what is returned of the message                       ┘
//!     │                             returned_header(), or all of it: message/rfc822
//!     └── the closing boundary      tail()
//! ```
//!
//! Nothing here decides whether a notice is due or sends it: it goes from `<>` to the sender in the
//! envelope, with NOTIFY=NEVER at most and without RET (RFC 3461 section 6.1).
//!
//! A notice is in 7-bit ASCII, so that it passes everywhere, also if the message was in UTF-8: addresses
//! then are escaped (RFC 6533 section 3), and other characters become `?`. With [`Notice::utf8`], for a
//! sender whose way back takes SMTPUTF8, it is 8-bit UTF-8 in the `message/global` types. A message
//! itself must not be recoded (RFC 6522 section 3, RFC 2046 section 5.2.1), so [`Notice::full`] is for
//! those of 7-bit content, or for notices in UTF-8; of others the header is returned.
//!
//! Lines end in LF and have at most 998 octets.

use std::fmt::Write;

use crate::clock::Timestamp;
use crate::mail::address::Mailbox;
use crate::mail::header::{HeaderLine, HeaderState};

/// A line of text is folded behind so many octets, where it can be (RFC 5322 section 2.1.1).
const FOLD_WIDTH: usize = 76;
/// No line has more octets, its end not counted (RFC 5322 section 2.1.1).
const LINE_LIMIT: usize = 998;

/// What was done for a recipient (RFC 3464 section 2.3.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Given up.
    Failed,
    /// Not yet delivered, and tried on.
    Delayed,
    /// It is in the mailbox.
    Delivered,
    /// A system that sends no notices has it now.
    Relayed,
    /// It stands for several, who have it now; of each of them no more is told (RFC 3461 section 5.2.7.3).
    Expanded,
}

/// What happened to one recipient.
#[derive(Clone, Debug)]
pub struct RecipientReport<'a> {
    pub recipient: &'a Mailbox,
    /// ORCPT as it was given, `rfc822;xtext`.
    pub original: Option<&'a str>,
    pub action: Action,
    /// An enhanced status code, `5.1.1`; what is none becomes the general one of its class.
    pub status: String,
    /// The name of the peer that refused or took it, or its address literal.
    pub remote: Option<&'a str>,
    /// The peer's reply on one line, `550 5.1.1 No such user`, or the reason without a peer.
    pub diagnostic: Option<&'a str>,
    pub last_attempt: Option<Timestamp>,
    /// Said of delayed ones only.
    pub retry_until: Option<Timestamp>,
}

/// One notice: about one message, to its sender.
#[derive(Clone, Debug)]
pub struct Dsn<'a> {
    /// Our name; also the domain of the postmaster it comes from.
    pub reporting: &'a str,
    /// The sender in the envelope of the message.
    pub to: &'a Mailbox,
    /// ENVID as it was given, xtext.
    pub envelope_id: Option<&'a str>,
    pub arrived: Timestamp,
    /// The name the peer gave from which the message came; `name ([192.0.2.1])` may be said too.
    pub received_from: Option<&'a str>,
    /// Those for whom a notice is due, no others (RFC 3461 section 6.2).
    pub reports: &'a [RecipientReport<'a>],
    pub now: Timestamp,
    pub message_id: &'a str,
    /// At most 70 letters and digits that are in no part.
    pub boundary: &'a str,
    /// It may be in UTF-8 (RFC 6533): the way back takes SMTPUTF8.
    pub utf8: bool,
    /// The whole message will be returned, not its header alone.
    pub full: bool,
}

impl Dsn<'_> {
    /// All up to the place where the returned content begins.
    pub fn head(&self) -> String {
        let mut out = self.header();
        let charset = if self.utf8 { "utf-8" } else { "us-ascii" };
        self.begin_part(&mut out, "Notification", &format!("text/plain; charset={charset}"));
        out.push_str(&self.explanation());
        let fields = self.fields();
        let status = if fields.is_ascii() { "message/delivery-status" } else { "message/global-delivery-status" };
        self.begin_part(&mut out, "Delivery report", status);
        out.push_str(&fields);
        let (description, content) = match (self.full, self.utf8) {
            (true, true) => ("Undelivered message", "message/global"),
            (true, false) => ("Undelivered message", "message/rfc822"),
            (false, true) => ("Header of the message", "message/global-headers"),
            (false, false) => ("Header of the message", "text/rfc822-headers"),
        };
        self.begin_part(&mut out, description, content);
        out
    }

    /// What stands behind the returned content.
    pub fn tail(&self) -> String {
        format!("\n--{}--\n", self.boundary)
    }

    /// The header of the message that `content` begins with, made fit to be returned in this notice:
    /// whole lines out of its first `limit` octets, without the blank line.
    ///
    /// RFC 6522 section 4 would have quoted-printable for a header of more than 7 bits, which makes each
    /// `=` of a sound one unreadable to those who search a notice for its Message-ID. So a character that
    /// cannot stand there becomes a `?`.
    pub fn returned_header(&self, content: &[u8], limit: usize) -> Vec<u8> {
        let content = &content[..content.len().min(limit)];
        let mut out = String::new();
        let mut state = HeaderState::Beginning;
        for line in content.split_inclusive(|octet| *octet == b'\n') {
            // The limit may have cut the last line.
            let cut = !line.ends_with(b"\n") && content.len() == limit;
            match HeaderLine::of(line, state) {
                HeaderLine::Field(_) | HeaderLine::Continuation if !cut => state = HeaderState::Field,
                _ => break,
            }
            let text = String::from_utf8_lossy(line);
            push_within_limit(&mut out, &self.clean(text.trim_end_matches(['\r', '\n'])));
        }
        out.into_bytes()
    }

    fn header(&self) -> String {
        let mut out = String::new();
        let host = self.clean(self.reporting);
        put(&mut out, "From", &format!("Mail Delivery System <postmaster@{host}>"));
        put(&mut out, "To", &self.addressee());
        put(&mut out, "Subject", self.subject());
        put(&mut out, "Date", &self.now.rfc5322());
        let id = self.clean(self.message_id);
        put(&mut out, "Message-ID", &format!("<{}>", id.trim_matches(['<', '>'])));
        // RFC 3834 section 5: "auto-generated" must not be used on notices.
        put(&mut out, "Auto-Submitted", "auto-replied");
        put(&mut out, "MIME-Version", "1.0");
        out.push_str("Content-Type: multipart/report; report-type=delivery-status;\n");
        let _ = writeln!(out, "\tboundary=\"{}\"", self.boundary);
        if self.utf8 {
            put(&mut out, "Content-Transfer-Encoding", "8bit");
        }
        out.push_str("\nThis is a notice in MIME format about the delivery of a message.\n");
        out
    }

    fn begin_part(&self, out: &mut String, description: &str, content: &str) {
        let _ = write!(out, "\n--{}\n", self.boundary);
        put(out, "Content-Description", description);
        put(out, "Content-Type", content);
        if self.utf8 {
            put(out, "Content-Transfer-Encoding", "8bit");
        }
        out.push('\n');
    }

    /// The sender; or, where it cannot be written in ASCII, an empty group that names it (RFC 6857).
    fn addressee(&self) -> String {
        match self.utf8 || self.to.is_ascii() {
            true => format!("<{}>", self.to),
            false => format!("\"{}\":;", self.address(self.to).replace('\\', r"\\").replace('"', "\\\"")),
        }
    }

    fn subject(&self) -> &'static str {
        let has = |action| self.reports.iter().any(|report| report.action == action);
        if has(Action::Failed) {
            "Your message could not be delivered"
        } else if has(Action::Delayed) {
            "Your message is delayed"
        } else if has(Action::Delivered) {
            "Your message was delivered"
        } else {
            "Your message was passed on"
        }
    }

    /// The fields of the message, and behind a blank line each those of the recipients (RFC 3464 section 2).
    fn fields(&self) -> String {
        let mut out = String::new();
        if let Some(id) = self.envelope_id {
            put(&mut out, "Original-Envelope-Id", &self.clean(&decoded(id)));
        }
        put(&mut out, "Reporting-MTA", &self.mta(self.reporting));
        if let Some(name) = self.received_from {
            put(&mut out, "Received-From-MTA", &self.mta(name));
        }
        put(&mut out, "Arrival-Date", &self.arrived.rfc5322());
        for report in self.reports {
            out.push('\n');
            self.put_recipient(&mut out, report);
        }
        out
    }

    /// RFC 3464 section 2.3.
    fn put_recipient(&self, out: &mut String, report: &RecipientReport) {
        // There if and only if ORCPT was (RFC 3461 section 6.3).
        if let Some(original) = report.original {
            put(out, "Original-Recipient", &self.original(original));
        }
        let kind = if report.recipient.is_ascii() { "rfc822" } else { "utf-8" };
        put(out, "Final-Recipient", &format!("{kind}; {}", self.address(report.recipient)));
        put(out, "Action", report.action.name());
        put(out, "Status", report.status());
        if let Some(name) = report.remote {
            put(out, "Remote-MTA", &self.mta(name));
        }
        if let Some(text) = report.diagnostic {
            let kind = if is_reply(text) { "smtp" } else { "x-odmr" };
            put_folded(out, "Diagnostic-Code", &format!("{kind}; {}", self.clean(text)));
        }
        if let Some(date) = report.last_attempt {
            put(out, "Last-Attempt-Date", &date.rfc5322());
        }
        if let Some(date) = report.retry_until.filter(|_| report.action == Action::Delayed) {
            put(out, "Will-Retry-Until", &date.rfc5322());
        }
    }

    /// The text for people.
    fn explanation(&self) -> String {
        let mut out = String::new();
        let host = self.clean(self.reporting);
        paragraph(&mut out, "", &format!("This is the mail system at {host}."));
        for action in [Action::Failed, Action::Delayed, Action::Delivered, Action::Relayed, Action::Expanded] {
            let reports: Vec<&RecipientReport> = self.reports.iter().filter(|report| report.action == action).collect();
            if reports.is_empty() {
                continue;
            }
            let one = reports.len() == 1;
            let arrived = self.arrived.rfc5322();
            out.push('\n');
            paragraph(&mut out, "", &action.introduction(&arrived, one));
            for report in &reports {
                self.explain(&mut out, report);
            }
            out.push('\n');
            paragraph(&mut out, "", action.conclusion());
        }
        out.push('\n');
        let rest = if self.full { "The message follows" } else { "The header of the message follows" };
        paragraph(&mut out, "", &format!("{rest} below. Questions are answered by <postmaster@{host}>."));
        out
    }

    fn explain(&self, out: &mut String, report: &RecipientReport) {
        let _ = writeln!(out, "\n    <{}>", self.address(report.recipient));
        let peer = report.remote.map(|name| self.clean(name));
        let text = report.diagnostic.map(|text| self.clean(text));
        let said = match (peer, text) {
            (Some(peer), Some(text)) if report.diagnostic.is_some_and(is_reply) => format!("{peer} answered: {text}"),
            (Some(peer), Some(text)) => format!("{peer}: {text}"),
            (None, Some(text)) => text,
            (Some(peer), None) => format!("by {peer}"),
            (None, None) => String::new(),
        };
        paragraph(out, "        ", &said);
        if let Some(date) = report.retry_until.filter(|_| report.action == Action::Delayed) {
            paragraph(out, "        ", &format!("It is tried until {}.", date.rfc5322()));
        }
        if report.action == Action::Failed {
            paragraph(out, "        ", report.advice());
        }
    }

    /// `dns; name`, if it is a full name or an address literal (RFC 3464 section 2.2.2).
    fn mta(&self, name: &str) -> String {
        let name = self.clean(name);
        let first = name.split_whitespace().next().unwrap_or_default();
        let kind = if first.contains(['.', '[']) { "dns" } else { "x-local-hostname" };
        format!("{kind}; {name}")
    }

    fn address(&self, mailbox: &Mailbox) -> String {
        match self.utf8 || mailbox.is_ascii() {
            true => mailbox.to_string(),
            false => escaped(&mailbox.to_string()),
        }
    }

    /// ORCPT decoded: as the sender's own program wrote it (RFC 3461 section 4.2).
    fn original(&self, original: &str) -> String {
        let (kind, address) = original.split_once(';').unwrap_or(("rfc822", original));
        let address = decoded(address);
        let address = match kind.eq_ignore_ascii_case("utf-8") {
            true if self.utf8 => unescaped(&address),
            true => escaped(&unescaped(&address)),
            false => address,
        };
        format!("{}; {}", self.clean(kind), self.clean(&address))
    }

    /// One line of characters that may stand in this notice.
    fn clean(&self, text: &str) -> String {
        let fit = |c: char| match c {
            '\t' => c,
            '\r' | '\n' => ' ',
            _ if c.is_control() || !(self.utf8 || c.is_ascii()) => '?',
            _ => c,
        };
        text.chars().map(fit).collect()
    }
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Action::Failed => "failed",
            Action::Delayed => "delayed",
            Action::Delivered => "delivered",
            Action::Relayed => "relayed",
            Action::Expanded => "expanded",
        }
    }

    fn introduction(self, arrived: &str, one: bool) -> String {
        let whom = if one { "this recipient" } else { "these recipients" };
        match self {
            Action::Failed => format!("Your message of {arrived} could NOT be delivered to {whom}:"),
            Action::Delayed => format!("Your message of {arrived} is delayed. It has NOT YET reached {whom}:"),
            Action::Delivered => {
                format!("Your message of {arrived} was delivered, as you asked to be told, to {whom}:")
            }
            Action::Relayed => format!("Your message of {arrived} was passed on, on its way to {whom}:"),
            Action::Expanded => format!("Your message of {arrived} was passed on to all who stand behind {whom}:"),
        }
    }

    /// What the sender can do.
    fn conclusion(self) -> &'static str {
        match self {
            Action::Failed => "It will not be tried again. To try once more, send the message anew.",
            Action::Delayed => {
                "You need do nothing, and need not send it again: it is still being tried. You will be told if it \
                 has to be given up."
            }
            Action::Delivered => "You need do nothing. That it was delivered does not mean that it was read.",
            Action::Relayed => {
                "You need do nothing. The next mail system does not say whether it delivers, so this may be the \
                 last you hear of it from us."
            }
            Action::Expanded => "You need do nothing. You will be told of those who cannot be reached.",
        }
    }
}

impl RecipientReport<'_> {
    /// The status code, or that of its class which says no more (RFC 3464 section 2.3.4).
    fn status(&self) -> &str {
        let mut parts = self.status.split('.');
        let number = |part: Option<&str>, most: usize| {
            part.is_some_and(|part| {
                (1..=most).contains(&part.len()) && part.bytes().all(|octet| octet.is_ascii_digit())
            })
        };
        let (class, default) = match self.action {
            Action::Failed => ("45", "5.0.0"),
            Action::Delayed => ("4", "4.0.0"),
            Action::Delivered | Action::Relayed | Action::Expanded => ("2", "2.0.0"),
        };
        let sound = parts.next().is_some_and(|part| part.len() == 1 && class.contains(part))
            && number(parts.next(), 3)
            && number(parts.next(), 3)
            && parts.next().is_none();
        if sound { &self.status } else { default }
    }

    /// What the sender can do about a failure, by its status code (RFC 3463).
    fn advice(&self) -> &'static str {
        let status = self.status();
        let subject = status.split_once('.').map_or("", |(_, subject)| subject);
        match subject {
            "1.1" | "1.0" | "1.3" | "1.6" => "Please check the address, above all what stands before the @.",
            "1.2" | "1.10" | "4.4" => "Please check the address, above all what stands behind the @.",
            "2.2" => "The mailbox is full: try again later, or reach the recipient in another way.",
            "2.3" | "3.4" => "The message is too large: send less at a time.",
            "4.1" | "4.2" | "4.7" | "3.2" => {
                "The recipient's mail system could not be reached in time. Try again later."
            }
            "4.6" => "The recipient's mail system passes the message round in a circle: only its owner can help.",
            "6.7" | "6.9" => "The recipient's mail system does not take addresses or headers in UTF-8.",
            _ if subject.starts_with("7.") => {
                "The recipient's mail system refuses the message by its own rules, which only its owner can change."
            }
            _ if subject.starts_with("1.") => "Please check the address.",
            _ => "",
        }
    }
}

/// A field as it is; its value must be short.
fn put(out: &mut String, name: &str, value: &str) {
    push_within_limit(out, &format!("{name}: {value}"));
}

/// A field folded between its words.
fn put_folded(out: &mut String, name: &str, value: &str) {
    fold(out, &format!("{name}:"), " ", value);
}

/// Text for people in lines of moderate length; nothing for nothing.
fn paragraph(out: &mut String, indent: &str, text: &str) {
    let mut words = text.split_whitespace();
    if let Some(first) = words.next() {
        let rest: Vec<&str> = words.collect();
        fold(out, &format!("{indent}{first}"), indent, &rest.join(" "));
    }
}

/// Appends `begin` and the words of `text`, further lines behind `indent`.
fn fold(out: &mut String, begin: &str, indent: &str, text: &str) {
    let mut line = begin.to_owned();
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > FOLD_WIDTH && line.trim() != "" {
            push_within_limit(out, &line);
            line = indent.to_owned();
            line.push_str(word);
        } else {
            line.push(' ');
            line.push_str(word);
        }
    }
    push_within_limit(out, &line);
}

/// Appends a line; one that is too long is cut into continuations.
fn push_within_limit(out: &mut String, line: &str) {
    let mut rest = line;
    // A continuation has one octet more.
    while rest.len() >= LINE_LIMIT {
        let cut = (1..LINE_LIMIT).rev().find(|at| rest.is_char_boundary(*at)).unwrap_or(rest.len());
        out.push_str(&rest[..cut]);
        out.push_str("\n ");
        rest = &rest[cut..];
    }
    out.push_str(rest);
    out.push('\n');
}

/// Whether a text begins like a reply of SMTP.
fn is_reply(text: &str) -> bool {
    let code = text.split_whitespace().next().unwrap_or_default();
    code.len() == 3 && code.bytes().all(|octet| octet.is_ascii_digit()) && code.starts_with(['2', '3', '4', '5'])
}

/// Decodes xtext (RFC 3461 section 4); what is none is left as it is.
fn decoded(xtext: &str) -> String {
    let mut octets = Vec::new();
    let mut rest = xtext.as_bytes();
    while let Some((&octet, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| octet == b'+');
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let coded = digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        octets.push(coded.unwrap_or(octet));
        rest = if coded.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&octets).into_owned()
}

/// An address as `utf-8-addr-xtext`, in ASCII (RFC 6533 section 3).
fn escaped(address: &str) -> String {
    let mut out = String::new();
    for character in address.chars() {
        match character {
            '!'..='~' if !matches!(character, '+' | '=' | '\\') => out.push(character),
            _ => out.push_str(&format!("\\x{{{:02X}}}", u32::from(character))),
        }
    }
    out
}

/// The address that `utf-8-addr-xtext` or `utf-8-addr-unitext` stands for.
fn unescaped(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("\\x{") {
        let point = after.split_once('}').and_then(|(digits, after)| {
            let valid = digits.len() <= 6 && digits.bytes().all(|octet| octet.is_ascii_hexdigit());
            let point = u32::from_str_radix(digits, 16).ok().filter(|_| valid)?;
            Some((char::from_u32(point)?, after))
        });
        out.push_str(before);
        match point {
            Some((character, after)) => {
                out.push(character);
                rest = after;
            }
            None => {
                out.push_str("\\x{");
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
