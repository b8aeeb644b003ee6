//! A delivery status notification as text (RFC 3464, RFC 6522, RFC 3461 section 6, RFC 6533).
//!
//! ```text
//! multipart/report; report-type=delivery-status
//! ├── text/plain                  what happened to which recipient, what the sender can do   ┐
//! ├── message/delivery-status     the same for programs: fields of the message, then         │ head()
//! │                               fields of each recipient                                   │
//! └── text/rfc822-headers         the returned part of the message                           ┘
//!     │                             returned_header(), or the whole message: message/rfc822
//!     └── the closing boundary      tail()
//! ```
//!
//! This file does not decide whether a DSN is due, and does not send it. A DSN goes from `<>` to the sender in the
//! envelope, with NOTIFY=NEVER at most and without RET (RFC 3461 section 6.1).
//!
//! A DSN is 7-bit ASCII, so that every server accepts it, even if the message was in UTF-8: addresses are escaped (RFC
//! 6533 section 3), and other characters become `?`. With [`Dsn::utf8`], for a sender whose address needs SMTPUTF8, it
//! is 8-bit UTF-8 in the `message/global` types. A message must not be recoded (RFC 6522 section 3, RFC 2046 section
//! 5.2.1). So [`Dsn::full`] is for messages with 7-bit content, and for DSNs in UTF-8; of other messages only the
//! header is returned.
//!
//! Lines end in LF and have at most 998 octets.

use std::fmt::Write;

use crate::clock::Timestamp;
use crate::mail::address::Mailbox;
use crate::mail::header::{HeaderLine, HeaderState, Thread};
use crate::smtp::limits::CONTENT_LINE;

/// Octets of a line at most, if text can be folded between words (RFC 5322 section 2.1.1).
const FOLD_WIDTH: usize = 76;

/// The action for a recipient (RFC 3464 section 2.3.3). The most important comes first: it decides the subject of a
/// DSN.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Action {
    /// The recipient was rejected or has expired.
    Failed,
    /// The message is still in the queue.
    Delayed,
    /// The message is in the mailbox.
    Delivered,
    /// The message was sent to a server that sends no DSN of success.
    Relayed,
    /// The message was sent to all members of an alias, which the DSN does not list (RFC 3461 section 5.2.7.3).
    Expanded,
}

/// The report about one recipient.
#[derive(Clone, Debug)]
pub struct RecipientReport<'a> {
    pub recipient: &'a Mailbox,
    /// The value of ORCPT, `rfc822;xtext`.
    pub original: Option<&'a str>,
    pub action: Action,
    /// An enhanced status code, `5.1.1`. If it is not valid for the action, the DSN has the general code of the class.
    pub status: String,
    /// The name or address literal of the peer that has sent `reply`.
    pub remote: Option<&'a str>,
    /// The peer's last reply, unchanged, on one line: `550 5.1.1 No such user`.
    pub reply: Option<&'a str>,
    /// This program's own decision, with its reason.
    pub verdict: Option<&'a str>,
    /// When the last attempt was made; `None`: it is not known, or there was none.
    pub last_attempt: Option<Timestamp>,
    /// When the message will expire; used with [`Action::Delayed`] only.
    pub retry_until: Option<Timestamp>,
}

/// One DSN about one message.
#[derive(Clone, Debug)]
pub struct Dsn<'a> {
    /// The host name of this server; the DSN is from the postmaster there.
    pub reporting: &'a str,
    /// The recipient: the sender in the envelope of the message.
    pub to: &'a Mailbox,
    /// The value of ENVID, xtext.
    pub envelope_id: Option<&'a str>,
    /// When the message arrived.
    pub arrived: Timestamp,
    /// The recipients of the message for whom a DSN is due (RFC 3461 section 6.2).
    pub reports: &'a [RecipientReport<'a>],
    /// The date of the DSN.
    pub now: Timestamp,
    /// The Message-ID of the DSN.
    pub message_id: &'a str,
    /// At most 70 letters and digits that do not occur in a part.
    pub boundary: &'a str,
    /// The DSN may be in UTF-8 (RFC 6533), because it is sent with SMTPUTF8.
    pub utf8: bool,
    /// The whole message is returned, not only its header.
    pub full: bool,
    /// The Message-ID of the message, and those of the messages before it in its thread.
    pub thread: Thread,
}

impl Dsn<'_> {
    /// The DSN up to the returned content.
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

    /// The DSN after the returned content.
    pub fn tail(&self) -> String {
        format!("\n--{}--\n", self.boundary)
    }

    /// The header at the front of `content` as the DSN returns it: the complete lines in its first `limit` octets,
    /// without the blank line.
    ///
    /// RFC 6522 section 4 asks for quoted-printable if the header has octets above 127. That would change each `=`, and
    /// a program that looks for the Message-ID would not find it. So a character that is not permitted becomes `?`.
    pub fn returned_header(&self, content: &[u8], limit: usize) -> Vec<u8> {
        let content = &content[..content.len().min(limit)];
        let mut out = String::new();
        let mut state = HeaderState::Beginning;
        for line in content.split_inclusive(|octet| *octet == b'\n') {
            // The limit may have truncated the last line.
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
        let action = self.reports.iter().map(|report| report.action).min().unwrap_or(Action::Expanded);
        put(&mut out, "Subject", action.wording().subject);
        put(&mut out, "Date", &self.now.rfc5322());
        let id = self.clean(self.message_id);
        put(&mut out, "Message-ID", &format!("<{}>", id.trim_matches(['<', '>'])));
        // Mail readers and ticket systems find the message by these (RFC 5322 section 3.6.4).
        if let Some(id) = &self.thread.message_id {
            put(&mut out, "In-Reply-To", id);
            let references: Vec<_> = self.thread.references.iter().chain([id]).map(String::as_str).collect();
            fold(&mut out, "References:", " ", &references.join(" "));
        }
        // RFC 3834 section 5: not "auto-generated", which must not be used in DSNs.
        put(&mut out, "Auto-Submitted", "auto-replied");
        put(&mut out, "MIME-Version", "1.0");
        out.push_str("Content-Type: multipart/report; report-type=delivery-status;\n");
        let _ = writeln!(out, "\tboundary=\"{}\"", self.boundary);
        if self.utf8 {
            put(&mut out, "Content-Transfer-Encoding", "8bit");
        }
        out.push_str("\nThis is a report in MIME format about the delivery of a message.\n");
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

    /// The value of `To`. If the address cannot be written in ASCII, an empty group with the address as its name (RFC
    /// 6857).
    fn addressee(&self) -> String {
        match self.utf8 || self.to.is_ascii() {
            true => format!("<{}>", self.address(self.to)),
            false => format!("\"{}\":;", self.address(self.to).replace('\\', r"\\").replace('"', "\\\"")),
        }
    }

    /// The fields of the message; then, after a blank line each, those of the recipients (RFC 3464 section 2).
    fn fields(&self) -> String {
        let mut out = String::new();
        if let Some(id) = self.envelope_id {
            put(&mut out, "Original-Envelope-Id", &self.clean(&decoded(id)));
        }
        put(&mut out, "Reporting-MTA", &self.mta(self.reporting));
        put(&mut out, "Arrival-Date", &self.arrived.rfc5322());
        for report in self.reports {
            out.push('\n');
            self.put_recipient(&mut out, report);
        }
        out
    }

    /// The fields of one recipient (RFC 3464 section 2.3).
    fn put_recipient(&self, out: &mut String, report: &RecipientReport) {
        // This field is present if and only if the client gave ORCPT (RFC 3461 section 6.3).
        if let Some(original) = report.original {
            put(out, "Original-Recipient", &self.original(original));
        }
        let kind = if report.recipient.is_ascii() { "rfc822" } else { "utf-8" };
        put(out, "Final-Recipient", &format!("{kind}; {}", self.address(report.recipient)));
        put(out, "Action", report.action.wording().name);
        put(out, "Status", report.status());
        if let Some(name) = report.remote.filter(|_| report.reply.is_some()) {
            put(out, "Remote-MTA", &self.mta(name));
        }
        // RFC 3464 section 2.3.6: one such field, with the peer's reply and nothing else.
        if let Some(text) = report.reply {
            put_folded(out, "Diagnostic-Code", &format!("smtp; {}", self.clean(text)));
        }
        if let Some(text) = report.verdict {
            let name = if report.reply.is_some() { "X-ODMR-Diagnostic-Code" } else { "Diagnostic-Code" };
            put_folded(out, name, &format!("x-odmr; {}", self.clean(text)));
        }
        if let Some(date) = report.last_attempt {
            put(out, "Last-Attempt-Date", &date.rfc5322());
        }
        if let Some(date) = report.retry_until.filter(|_| report.action == Action::Delayed) {
            put(out, "Will-Retry-Until", &date.rfc5322());
        }
    }

    /// The text for the sender.
    fn explanation(&self) -> String {
        let mut out = String::new();
        let host = self.clean(self.reporting);
        paragraph(&mut out, "", &format!("This is the mail system at {host}."));
        for action in [Action::Failed, Action::Delayed, Action::Delivered, Action::Relayed, Action::Expanded] {
            let reports: Vec<&RecipientReport> = self.reports.iter().filter(|report| report.action == action).collect();
            if reports.is_empty() {
                continue;
            }
            let Wording { happened, conclusion, .. } = action.wording();
            let recipients = if reports.len() == 1 { "this recipient" } else { "these recipients" };
            let arrived = self.arrived.rfc5322();
            out.push('\n');
            paragraph(&mut out, "", &format!("Your message of {arrived} {happened} {recipients}:"));
            for report in &reports {
                self.explain(&mut out, report);
            }
            out.push('\n');
            paragraph(&mut out, "", conclusion);
        }
        out.push('\n');
        let rest = if self.full { "The message follows" } else { "The header of the message follows" };
        paragraph(&mut out, "", &format!("{rest} below. Questions are answered by <postmaster@{host}>."));
        out
    }

    fn explain(&self, out: &mut String, report: &RecipientReport) {
        let _ = writeln!(out, "\n    <{}>", self.address(report.recipient));
        if let Some(reply) = report.reply {
            let peer = report.remote.map(|name| format!("{} answered: ", self.clean(name))).unwrap_or_default();
            paragraph(out, "        ", &(peer + &self.clean(reply)));
        }
        if let Some(verdict) = report.verdict {
            paragraph(out, "        ", &self.clean(verdict));
        }
        if let Some(date) = report.retry_until.filter(|_| report.action == Action::Delayed) {
            paragraph(out, "        ", &format!("It is tried until {}.", date.rfc5322()));
        }
        if report.action == Action::Failed {
            paragraph(out, "        ", report.advice());
        }
    }

    /// A name as a field value: `dns; name` if it is a full name or an address literal (RFC 3464 section 2.2.2).
    fn mta(&self, name: &str) -> String {
        let name = self.clean(name);
        let first = name.split_whitespace().next().unwrap_or_default();
        let kind = if first.contains(['.', '[']) { "dns" } else { "x-local-hostname" };
        format!("{kind}; {name}")
    }

    fn address(&self, mailbox: &Mailbox) -> String {
        match self.utf8 || mailbox.is_ascii() {
            true => mailbox.header_form().into_owned(),
            false => escaped(&mailbox.header_form()),
        }
    }

    /// The value of ORCPT, decoded (RFC 3461 section 4.2).
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

    /// The text on one line, with `?` for characters that the DSN must not contain.
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

/// The texts of a DSN about an action.
struct Wording {
    /// The value of the field `Action`.
    name: &'static str,
    subject: &'static str,
    /// Between "Your message of DATE" and "this recipient".
    happened: &'static str,
    /// What the sender can do.
    conclusion: &'static str,
}

impl Action {
    /// The word of RFC 3464 section 2.3.3.
    pub fn name(self) -> &'static str {
        self.wording().name
    }

    fn wording(self) -> Wording {
        match self {
            Action::Failed => Wording {
                name: "failed",
                subject: "Your message could not be delivered",
                happened: "could NOT be delivered to",
                conclusion: "It will not be tried again. To try once more, send the message anew.",
            },
            Action::Delayed => Wording {
                name: "delayed",
                subject: "Your message is delayed",
                happened: "is delayed. It has NOT YET reached",
                conclusion: "You need do nothing, and need not send it again: it is still being tried. You will be told \
                             if it has to be given up.",
            },
            Action::Delivered => Wording {
                name: "delivered",
                subject: "Your message was delivered",
                happened: "was delivered, as you asked to be told, to",
                conclusion: "You need do nothing. That it was delivered does not mean that it was read.",
            },
            Action::Relayed => Wording {
                name: "relayed",
                subject: "Your message was passed on",
                happened: "was passed on, on its way to",
                conclusion: "You need do nothing. The next mail system does not say whether it delivers, so this may be \
                             the last you hear of it from us.",
            },
            Action::Expanded => Wording {
                name: "expanded",
                subject: "Your message was passed on",
                happened: "was passed on to all addresses of",
                conclusion: "You need do nothing. You will be told of those who cannot be reached.",
            },
        }
    }
}

impl RecipientReport<'_> {
    /// The status code; if it is not valid for the action, the general code of its class (RFC 3464 section 2.3.4).
    fn status(&self) -> &str {
        let (classes, default) = match self.action {
            Action::Failed => ("45", "5.0.0"),
            Action::Delayed => ("4", "4.0.0"),
            Action::Delivered | Action::Relayed | Action::Expanded => ("2", "2.0.0"),
        };
        let digits = |part: &str, most| part.len() <= most && part.bytes().all(|octet| octet.is_ascii_digit());
        let valid = match self.status.split('.').collect::<Vec<_>>()[..] {
            [class, subject, detail] if !subject.is_empty() && !detail.is_empty() => {
                class.len() == 1 && classes.contains(class) && digits(subject, 3) && digits(detail, 3)
            }
            _ => false,
        };
        if valid { &self.status } else { default }
    }

    /// The advice for the sender after a failure, by its status code (RFC 3463).
    fn advice(&self) -> &'static str {
        let subject = self.status().split_once('.').map_or("", |(_, subject)| subject);
        match subject {
            "1.1" | "1.0" | "1.3" | "1.6" => "Please check the address, above all the part before the @.",
            "1.2" | "1.10" | "4.4" => "Please check the address, above all the part after the @.",
            "2.2" => "The mailbox is full: try again later, or reach the recipient in another way.",
            "2.3" | "3.4" => "The message is too large: send less at a time.",
            "4.1" | "4.2" | "4.7" | "3.2" => {
                "The recipient's mail system did not take the message in time. Try again later."
            }
            "4.6" => "The recipient's mail system passes the message round in a circle: only its owner can help.",
            "6.7" | "6.9" => "The recipient's mail system does not take addresses or headers in UTF-8.",
            _ if subject.starts_with("7.") => {
                "The recipient's mail system rejects the message by its own rules, which only its owner can change."
            }
            _ if subject.starts_with("1.") => "Please check the address.",
            _ => "",
        }
    }
}

/// Appends a field with a short value, on one line.
fn put(out: &mut String, name: &str, value: &str) {
    push_within_limit(out, &format!("{name}: {value}"));
}

/// Appends a field, folded before white space, which is unchanged (RFC 5322 section 2.2.3).
fn put_folded(out: &mut String, name: &str, value: &str) {
    let (mut line, mut word) = (format!("{name}: "), String::new());
    let mut put_word = |line: &mut String, word: &mut String| {
        if line.len() + word.len() > FOLD_WIDTH && word.starts_with([' ', '\t']) && word.trim() != "" {
            push_within_limit(out, line);
            line.clear();
        }
        line.push_str(word);
        word.clear();
    };
    for character in value.chars() {
        if matches!(character, ' ' | '\t') && word.trim() != "" {
            put_word(&mut line, &mut word);
        }
        word.push(character);
    }
    put_word(&mut line, &mut word);
    push_within_limit(out, line.trim_end());
}

/// Appends text in lines of at most [`FOLD_WIDTH`] octets; nothing if the text is empty.
fn paragraph(out: &mut String, indent: &str, text: &str) {
    let mut words = text.split_whitespace();
    if let Some(first) = words.next() {
        let rest: Vec<&str> = words.collect();
        fold(out, &format!("{indent}{first}"), indent, &rest.join(" "));
    }
}

/// Appends `begin` and the words of `text`; further lines begin with `indent`.
fn fold(out: &mut String, begin: &str, indent: &str, text: &str) {
    let mut line = begin.to_owned();
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > FOLD_WIDTH && line.trim() != "" {
            push_within_limit(out, &line);
            line = indent.to_owned();
        } else {
            line.push(' ');
        }
        line.push_str(word);
    }
    push_within_limit(out, &line);
}

/// Appends a line. A line of more than 998 octets is divided into continuation lines.
fn push_within_limit(out: &mut String, line: &str) {
    let mut rest = line;
    // A continuation line begins with one more octet, a space.
    while rest.len() >= CONTENT_LINE {
        let cut = (1..CONTENT_LINE).rev().find(|at| rest.is_char_boundary(*at)).unwrap_or(rest.len());
        out.push_str(&rest[..cut]);
        out.push_str("\n ");
        rest = &rest[cut..];
    }
    out.push_str(rest);
    out.push('\n');
}

/// Decodes xtext (RFC 3461 section 4); other text is unchanged.
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
            _ => out += &format!("\\x{{{:02X}}}", u32::from(character)),
        }
    }
    out
}

/// Decodes `utf-8-addr-xtext` or `utf-8-addr-unitext` (RFC 6533 section 3); other text is unchanged.
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
        rest = point.map_or(after, |(_, after)| after);
        match point {
            Some((character, _)) => out.push(character),
            None => out.push_str("\\x{"),
        }
    }
    out + rest
}

#[cfg(test)]
mod tests;
