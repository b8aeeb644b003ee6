//! Replies: three digits, an enhanced status code, and lines of text (RFC 5321 section 4.2, RFC 2034).
//!
//! A peer's replies are read leniently: a code without text, odd texts and unknown codes are accepted (RFC 5321 section 4.2).
//! Our replies are written strictly: CRLF, at most 512 octets a line, the enhanced status code on every line. What a reply
//! means depends on its code only, never on its text: see `status.rs`.

use std::borrow::Cow;
use std::fmt::{self, Write};

use super::limits;

/// Characters of a reply's text that `Display` writes. Rejections of 500 characters, with a link at the end, are common.
const DISPLAY_LIMIT: usize = 1000;

/// The first digit of a reply (RFC 5321 section 4.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// 2yz: the command was executed.
    Positive,
    /// 3yz: the server waits for more.
    Intermediate,
    /// 4yz: the command failed, and may succeed later.
    Transient,
    /// 5yz: the command failed, and will fail again.
    Permanent,
}

/// The beginning of the text of a softened reply.
const SOFT_BOUNCE: &str = "Soft bounce: ";

/// A reply, ours or a peer's.
#[derive(Clone, Debug, Eq)]
pub struct Reply {
    /// A peer has sent it.
    from_peer: bool,
    code: u16,
    /// `class.subject.detail`; `None` for greetings, EHLO and 3yz (RFC 2034 section 4).
    enhanced: Option<Cow<'static, str>>,
    lines: Vec<Cow<'static, str>>,
}

/// Two replies are equal if their codes and texts are, whether they are ours or a peer's.
impl PartialEq for Reply {
    fn eq(&self, other: &Reply) -> bool {
        (self.code, &self.enhanced, &self.lines) == (other.code, &other.enhanced, &other.lines)
    }
}

impl Reply {
    /// A reply with an enhanced status code, whose class must be the first digit of `code`.
    pub fn new(code: u16, enhanced: &'static str, text: impl Into<Cow<'static, str>>) -> Reply {
        debug_assert_eq!(enhanced.as_bytes().first(), Some(&(b'0' + (code / 100) as u8)));
        Reply { from_peer: false, code, enhanced: Some(Cow::Borrowed(enhanced)), lines: vec![text.into()] }
    }

    /// A reply without an enhanced status code: a greeting, the reply to EHLO, 3yz.
    pub fn bare(code: u16, text: impl Into<Cow<'static, str>>) -> Reply {
        Reply { from_peer: false, code, enhanced: None, lines: vec![text.into()] }
    }

    /// The reply with one more line.
    pub fn with_line(mut self, text: impl Into<Cow<'static, str>>) -> Reply {
        self.lines.push(text.into());
        self
    }

    /// A peer's reply as we may send it to another peer: in ASCII (RFC 5321 section 4.2), and with an enhanced status code
    /// (RFC 2034 section 4). If it has none, it gets the one with the class alone, such as 5.0.0.
    pub fn for_relaying(self) -> Reply {
        let class = match self.code / 100 {
            2 => "2.0.0",
            4 => "4.0.0",
            _ => "5.0.0",
        };
        let ascii = |line: &Cow<'static, str>| line.replace(|character: char| !character.is_ascii(), "?").into();
        let lines = self.lines.iter().map(ascii).collect();
        Reply { enhanced: self.enhanced.or(Some(Cow::Borrowed(class))), lines, ..self }
    }

    /// The reply with another code of the same class.
    pub fn with_code(self, code: u16) -> Reply {
        debug_assert_eq!(code / 100, self.code / 100);
        Reply { code, ..self }
    }

    /// For `soft-bounce`: a 451 in place of a 5yz, whose code and text become its text. Any other reply is unchanged.
    pub fn softened(self) -> Reply {
        if self.severity() != Severity::Permanent {
            return self;
        }
        let class = |enhanced: &str| format!("4{}", enhanced.trim_start_matches('5'));
        let enhanced = self.enhanced.as_deref().map_or_else(|| "4.0.0".to_owned(), class);
        let text = format!("{SOFT_BOUNCE}{self}");
        Reply { code: 451, enhanced: Some(enhanced.into()), lines: vec![text.into()], ..self }
    }

    /// Whether [`Reply::softened`] has made this reply of a 5yz.
    pub fn is_softened(&self) -> bool {
        self.lines().next().is_some_and(|text| text.starts_with(SOFT_BOUNCE))
    }

    /// Whether a peer has sent the reply; otherwise it is our own.
    pub fn is_from_peer(&self) -> bool {
        self.from_peer
    }

    /// The three digits, 200 to 599.
    pub fn code(&self) -> u16 {
        self.code
    }

    /// The meaning of the first digit.
    pub fn severity(&self) -> Severity {
        match self.code / 100 {
            2 => Severity::Positive,
            3 => Severity::Intermediate,
            4 => Severity::Transient,
            _ => Severity::Permanent,
        }
    }

    /// Whether the reply is a 2yz.
    pub fn is_positive(&self) -> bool {
        self.severity() == Severity::Positive
    }

    /// The enhanced status code, `class.subject.detail`, if the reply has one.
    pub fn enhanced(&self) -> Option<&str> {
        self.enhanced.as_deref()
    }

    /// The lines of text, without codes.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(|line| &**line)
    }

    /// Appends the reply as it is on the wire; long lines are cut into several (RFC 5321 section 4.5.3.1.5).
    pub fn write_to(&self, out: &mut Vec<u8>) {
        let pieces: Vec<&str> = self.lines.iter().flat_map(|line| pieces(line)).collect();
        for (number, piece) in pieces.iter().enumerate() {
            let separator = if number + 1 < pieces.len() { '-' } else { ' ' };
            out.extend_from_slice(format!("{}{separator}", self.code).as_bytes());
            if let Some(enhanced) = &self.enhanced {
                out.extend_from_slice(enhanced.as_bytes());
                out.push(b' ');
            }
            // A text may contain octets from a peer. A line end in them would begin another reply. RFC 5321 section 4.2: a
            // textstring may contain tabs.
            let plain = |octet: u8| octet == b'\t' || octet >= b' ' && octet != 127;
            out.extend(piece.bytes().map(|octet| if plain(octet) { octet } else { b'?' }));
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// The reply on one line, for the log, DSNs and the records of deferred mail.
impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if let Some(enhanced) = &self.enhanced {
            write!(f, " {enhanced}")?;
        }
        let lines = self.lines.iter().filter(|line| !line.is_empty());
        for character in lines.flat_map(|line| " ".chars().chain(line.chars())).take(DISPLAY_LIMIT) {
            f.write_char(if character.is_control() && character != '\t' { '?' } else { character })?;
        }
        Ok(())
    }
}

/// Cuts a text into pieces that fit into a reply line.
fn pieces(mut text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    while text.len() > limits::REPLY_TEXT {
        let cut = (1..=limits::REPLY_TEXT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
        let (piece, rest) = text.split_at(cut);
        pieces.push(piece);
        text = rest;
    }
    pieces.push(text);
    pieces
}

/// A line that is not part of a valid reply: its first 80 octets.
#[derive(Debug, PartialEq, Eq)]
pub struct NotAReply(pub String);

/// Assembles a peer's reply from its lines.
#[derive(Debug, Default)]
pub struct ReplyReader {
    begun: Option<Reply>,
}

impl ReplyReader {
    /// Reads one line without its line end. Returns the reply after its last line.
    ///
    /// # Errors
    /// The line is not part of a valid reply, or has another code than the lines before it.
    pub fn line(&mut self, line: &[u8]) -> Result<Option<Reply>, NotAReply> {
        // Some hosts end lines in CR CR LF.
        let line = line.trim_ascii_end();
        let broken = || NotAReply(String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned());
        let code = match line {
            [a @ b'2'..=b'5', b @ b'0'..=b'9', c @ b'0'..=b'9', ..] => {
                u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0')
            }
            _ => return Err(broken()),
        };
        // RFC 5321 section 4.2: a client must accept a code without text.
        let (last, text) = match line.get(3) {
            None => (true, &line[3..]),
            Some(b' ') => (true, &line[4..]),
            Some(b'-') => (false, &line[4..]),
            Some(_) => return Err(broken()),
        };
        let text = String::from_utf8_lossy(&text[..text.len().min(limits::STORED_REPLY_LINE)]);
        let mut reply = match self.begun.take() {
            None => Reply { from_peer: true, code, enhanced: None, lines: Vec::new() },
            Some(reply) if reply.code == code => reply,
            Some(_) => return Err(broken()),
        };
        let (enhanced, rest) = split_enhanced(code, &text);
        reply.enhanced = reply.enhanced.or_else(|| enhanced.map(|code| Cow::Owned(code.to_owned())));
        if reply.lines.len() < limits::STORED_REPLY_LINES {
            let text = if reply.enhanced.as_deref() == enhanced { rest } else { &text };
            reply.lines.push(Cow::Owned(text.to_owned()));
        }
        if last {
            return Ok(Some(reply));
        }
        self.begun = Some(reply);
        Ok(None)
    }

    /// Reads the octets that the peer has sent after its last line end before it closed the connection. Returns the reply if
    /// its code is complete and is 4yz or 5yz: no missing text could change what it means. A 2yz or 3yz that was cut off does
    /// not count, because the peer may have failed while it sent it. The message is in doubt then, and stays in the queue.
    pub fn end(&mut self, rest: &[u8]) -> Option<Reply> {
        let begun = self.begun.clone();
        let last = if rest.is_empty() { None } else { self.line(rest).ok().flatten() };
        last.or(self.begun.take()).or(begun).filter(|reply| reply.code() >= 400)
    }
}

/// Splits a text into the enhanced status code, if its class is that of the code (RFC 2034 section 4), and the rest.
fn split_enhanced(code: u16, text: &str) -> (Option<&str>, &str) {
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    let mut fields = word.split('.');
    let class_fits = fields.next().is_some_and(|class| class == (code / 100).to_string());
    let mut number = || {
        fields
            .next()
            .is_some_and(|field| (1..=3).contains(&field.len()) && field.bytes().all(|octet| octet.is_ascii_digit()))
    };
    if class_fits && number() && number() && fields.next().is_none() { (Some(word), rest) } else { (None, text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(reply: &Reply) -> String {
        let mut out = Vec::new();
        reply.write_to(&mut out);
        String::from_utf8(out).unwrap()
    }

    fn read(lines: &[&str]) -> Result<Option<Reply>, NotAReply> {
        let mut reader = ReplyReader::default();
        let mut last = Ok(None);
        for line in lines {
            last = reader.line(line.as_bytes());
        }
        last
    }

    #[test]
    fn every_line_carries_the_codes() {
        let reply = Reply::new(550, "5.1.1", "No such mailbox").with_line("Ask postmaster");
        assert_eq!(written(&reply), "550-5.1.1 No such mailbox\r\n550 5.1.1 Ask postmaster\r\n");
        assert_eq!(written(&Reply::bare(334, "")), "334 \r\n");
    }

    /// Rules: SMTP-10.
    #[test]
    fn no_line_is_longer_than_512_octets_and_none_is_forged() {
        let reply = Reply::new(554, "5.0.0", "é".repeat(1000));
        for line in written(&reply).split_inclusive("\r\n") {
            assert!(line.len() <= 512 && line.starts_with("554"));
        }
        // RFC 3463 section 2: subject and detail have up to three digits each, those of a peer too.
        let relayed = read(&[&format!("550 5.123.456 {}", "x".repeat(512))]).unwrap().unwrap().for_relaying();
        for reply in [relayed.clone(), relayed.softened()] {
            assert!(written(&reply).split_inclusive("\r\n").all(|line| line.len() <= 512), "{}", written(&reply));
        }
        assert_eq!(written(&Reply::new(250, "2.0.0", "a\r\n221 b")), "250 2.0.0 a??221 b\r\n");
    }

    #[test]
    fn replies_of_all_shapes_are_read() {
        let reply = read(&["250-2.1.0 a", "250-b", "250"]).unwrap().unwrap();
        assert_eq!((reply.code(), reply.enhanced()), (250, Some("2.1.0")));
        assert_eq!(reply.lines().collect::<Vec<_>>(), ["a", "b", ""]);
        let odd = read(&["459 5.1.1 class does not fit"]).unwrap().unwrap();
        assert_eq!((odd.severity(), odd.enhanced()), (Severity::Transient, None));
        assert_eq!(read(&["250-a"]), Ok(None));
        // Some hosts have the status on the last line only, or another one there, or end their lines in CR CR LF.
        for (lines, shown) in [
            (["550-Rejected", "550 5.7.1 See a.example"], "550 5.7.1 Rejected See a.example"),
            (["550-5.7.26 No signature", "550 5.7.1 See a.example"], "550 5.7.26 No signature 5.7.1 See a.example"),
            (["550-5.1.1 Nobody\r", "550\r"], "550 5.1.1 Nobody"),
        ] {
            assert_eq!(read(&lines).unwrap().unwrap().to_string(), shown);
        }
        // A sender needs the link at the end, and a DSN has what `Display` writes.
        let line = format!("550-5.7.26 {}", "x".repeat(80));
        let long = read(&[&*line, &line, &line, &line, &line, &line, "550 5.7.26 See a.example"]).unwrap().unwrap();
        assert!(long.to_string().ends_with("x See a.example"), "{long}");
    }

    /// What a peer has sent before it closed without a line end. RFC 5321 section 4.2.
    #[test]
    fn a_rejection_that_is_cut_off_counts_and_an_acceptance_does_not() {
        for (lines, rest, code) in [
            (&[][..], "550 5.1.1 No such user", Some(550)),
            (&[], "421", Some(421)),
            (&[], "550-5.1.1 No such", Some(550)),
            (&["550-5.1.1 No such user"], "", Some(550)),
            (&["550-5.1.1 No such user"], "55", Some(550)),
            (&["550-5.1.1 No such user"], "550 5.1.1 Ask", Some(550)),
            (&[], "", None),
            (&[], "55", None),
            (&[], "hello", None),
            (&[], "250 2.0.0 OK", None),
            (&["250-2.0.0 OK"], "250 2.0", None),
            (&[], "354 go on", None),
        ] {
            let mut reader = ReplyReader::default();
            lines.iter().for_each(|line| assert_eq!(reader.line(line.as_bytes()), Ok(None)));
            assert_eq!(reader.end(rest.as_bytes()).map(|reply| reply.code()), code, "{lines:?} {rest}");
        }
    }

    #[test]
    fn a_line_that_is_not_part_of_a_reply_is_an_error() {
        for lines in [&["hello"][..], &["99 x"], &["1234"], &["150 x"], &["600 x"], &[""], &["250-a", "251 b"]] {
            assert!(read(lines).is_err(), "{lines:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_line_makes_it_panic(line: Vec<u8>) {
            let _ = ReplyReader::default().line(&line);
        }

        #[test]
        fn what_is_written_is_read_again(code in 200u16..560, text in "[ -~]{0,2000}") {
            let reply = Reply::bare(code, text);
            let mut reader = ReplyReader::default();
            let mut read = None;
            for line in written(&reply).split_terminator("\r\n") {
                proptest::prop_assert!(read.is_none());
                read = reader.line(line.as_bytes()).unwrap();
            }
            proptest::prop_assert_eq!(read.map(|reply| reply.code()), Some(code));
        }
    }
}
