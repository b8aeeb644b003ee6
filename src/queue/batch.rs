//! Messages as batch SMTP (RFC 2442), for `odmr queue export` and `import`: the commands of an SMTP client, without
//! replies.
//!
//! ```text
//! EHLO relay.example.net
//! NOOP id=1j14… arrived=2026-01-02T03:04:05Z     ours: other programs ignore the text (RFC 5321 section 4.1.1.9)
//! MAIL FROM:<bob@w.example> BODY=8BITMIME RET=HDRS ENVID=x
//! RCPT TO:<alice@example.org> NOTIFY=FAILURE ORCPT=rfc822;alice@example.org
//! DATA
//! …                                              with added dots (RFC 5321 section 4.5.2)
//! .
//! QUIT
//! ```

use std::fmt;
use std::io::{self, BufRead, Read, Write};

use super::envelope::{QueuedEnvelope, is_plain_id};
use crate::clock::Timestamp;
use crate::maildir::for_each_block;
use crate::smtp::command::{Body, Command, Envelope, Recipient, Return, Verb};
use crate::smtp::content::ContentEncoder;
use crate::smtp::extensions::ServerExtensions;

/// Octets of a line that are read at a time: a command is shorter, and content may be one endless line.
const LINE_BLOCK: u64 = 64 << 10;

/// Extensions for all parameters that an envelope can have.
const PARAMETERS: ServerExtensions =
    ServerExtensions { size: true, eight_bit: true, utf8: true, auth: true, dsn: true };

/// Writes the first line of a batch.
///
/// # Errors
/// Those of `out`.
pub fn write_begin(out: &mut dyn Write, hostname: &str) -> io::Result<()> {
    write!(out, "EHLO {hostname}\r\n")
}

/// Writes the last line of a batch.
///
/// # Errors
/// Those of `out`.
pub fn write_end(out: &mut dyn Write) -> io::Result<()> {
    out.write_all(b"QUIT\r\n")
}

/// Writes one message.
///
/// # Errors
/// Those of `content` and `out`.
pub fn write_message(out: &mut dyn Write, message: &QueuedEnvelope, content: &mut dyn Read) -> io::Result<()> {
    let QueuedEnvelope { id, arrived, envelope } = message;
    out.write_all(b"NOOP")?;
    // The id of another agent's file is its name, which may have any octets.
    if is_plain_id(id) {
        write!(out, " id={id}")?;
    }
    write!(out, " arrived={}\r\nMAIL FROM:<{}>", arrived.rfc3339(), envelope.from)?;
    // RFC 6531 section 3.4: an address beyond ASCII needs SMTPUTF8.
    out.write_all(mail_parameters(envelope, envelope.needs_utf8()).as_bytes())?;
    for recipient in &envelope.recipients {
        write!(out, "\r\nRCPT TO:<{}>{}", recipient.mailbox, recipient_parameters(recipient))?;
    }
    out.write_all(b"\r\nDATA\r\n")?;
    let (mut encoder, mut wire) = (ContentEncoder::data(), Vec::new());
    for_each_block(content, |block| {
        wire.clear();
        encoder.feed(block, &mut wire);
        out.write_all(&wire)
    })?;
    wire.clear();
    encoder.finish(&mut wire);
    out.write_all(&wire)
}

/// The parameters of MAIL, each with a space before it. `utf8`: SMTPUTF8 is one of them.
pub fn mail_parameters(envelope: &Envelope, utf8: bool) -> String {
    let mut parameters = match envelope.body {
        Body::Undeclared => "",
        Body::SevenBit => " BODY=7BIT",
        Body::EightBit => " BODY=8BITMIME",
    }
    .to_owned();
    parameters += if utf8 { " SMTPUTF8" } else { "" };
    parameters += match envelope.ret {
        None => "",
        Some(Return::Full) => " RET=FULL",
        Some(Return::Header) => " RET=HDRS",
    };
    parameters.extend(envelope.envelope_id.iter().map(|id| format!(" ENVID={id}")));
    parameters
}

/// The parameters of RCPT, each with a space before it.
pub fn recipient_parameters(recipient: &Recipient) -> String {
    let notify = recipient.notify.as_given().map(|notify| format!(" NOTIFY={notify}"));
    let original = recipient.original.as_ref().map(|original| format!(" ORCPT={original}"));
    notify.unwrap_or_default() + &original.unwrap_or_default()
}

/// Why the rest of a batch cannot be read.
#[derive(Debug)]
pub enum BatchError {
    /// The line of this number, counted from 1, is wrong for this reason.
    Line(usize, String),
    /// The input cannot be read.
    Input(io::Error),
}

impl fmt::Display for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BatchError::Line(line, text) => write!(f, "line {line}: {text}"),
            BatchError::Input(error) => error.fmt(f),
        }
    }
}

impl From<io::Error> for BatchError {
    fn from(error: io::Error) -> BatchError {
        BatchError::Input(error)
    }
}

/// The envelope of a message in a batch.
#[derive(Debug)]
pub struct BatchEnvelope {
    /// The id in the `NOOP` of [`write_message`].
    pub id: Option<String>,
    /// The time of arrival in that `NOOP`.
    pub arrived: Option<Timestamp>,
    /// The sender and the parameters of MAIL, and at least one recipient.
    pub envelope: Envelope,
}

/// Reads a batch message by message. Lines end in CRLF or LF. After QUIT another batch may follow.
pub struct BatchReader<R> {
    input: R,
    /// The number of the line that was read last, counted from 1.
    line: usize,
    /// The next octet begins a line.
    begins_line: bool,
    /// The next line is content of a message.
    in_content: bool,
    /// The last part of a long line ended in CR, which may belong to the line end, and was not returned yet.
    held_cr: bool,
}

impl<R: BufRead> BatchReader<R> {
    /// Reads a batch, or several, from `input`.
    pub fn new(input: R) -> BatchReader<R> {
        BatchReader { input, line: 0, begins_line: true, in_content: false, held_cr: false }
    }

    /// The next line with its end, or the next part of a long one; empty: the input has ended.
    fn next_octets(&mut self) -> io::Result<Vec<u8>> {
        let mut octets = Vec::new();
        self.input.by_ref().take(LINE_BLOCK).read_until(b'\n', &mut octets)?;
        self.line += usize::from(self.begins_line && !octets.is_empty());
        self.begins_line = octets.ends_with(b"\n");
        Ok(octets)
    }

    /// The next line without its end; `None`: the input has ended.
    fn next_line(&mut self) -> Result<Option<Vec<u8>>, BatchError> {
        let mut line = self.next_octets()?;
        if line.is_empty() {
            return Ok(None);
        }
        if line.len() as u64 == LINE_BLOCK {
            return self.error("this line is too long for a command");
        }
        for end in [b'\n', b'\r'] {
            line.pop_if(|last| *last == end);
        }
        Ok(Some(line))
    }

    fn error<T>(&self, text: impl Into<String>) -> Result<T, BatchError> {
        Err(self.wrong(text))
    }

    /// An error about the line that was read last.
    pub fn wrong(&self, text: impl Into<String>) -> BatchError {
        BatchError::Line(self.line, text.into())
    }

    /// Reads the commands of the next message, up to DATA; `None`: the input has ended.
    ///
    /// # Errors
    /// A command is wrong, or the input cannot be read.
    pub fn next_envelope(&mut self) -> Result<Option<BatchEnvelope>, BatchError> {
        let (mut known, mut envelope) = ((None, None), None::<Envelope>);
        while let Some(line) = self.next_line()? {
            if line.is_empty() && envelope.is_none() {
                continue;
            }
            let parsed = Verb::of(&line).and_then(|(verb, rest)| Command::parse(verb, rest, PARAMETERS));
            match parsed {
                Ok(Command::Quit) if envelope.is_some() => return self.error("QUIT comes within a message"),
                Ok(Command::Ehlo(_) | Command::Helo(_) | Command::Rset | Command::Quit) => {
                    (known, envelope) = ((None, None), None);
                }
                Ok(Command::Noop) => known = known_message(&line),
                Ok(Command::Mail(mail)) if envelope.is_none() => envelope = Some(mail.envelope),
                Ok(Command::Rcpt(rcpt)) => match (&mut envelope, rcpt.recipient()) {
                    (Some(envelope), Some(recipient)) => envelope.recipients.push(recipient),
                    (None, _) => return self.error("RCPT comes before MAIL"),
                    (_, None) => return self.error("RCPT names no domain"),
                },
                Ok(Command::Data) => match envelope {
                    Some(envelope) if !envelope.recipients.is_empty() => {
                        self.in_content = true;
                        return Ok(Some(BatchEnvelope { id: known.0, arrived: known.1, envelope }));
                    }
                    _ => return self.error("DATA comes before MAIL and RCPT"),
                },
                Ok(_) => return self.error("this command is not part of a batch: there are MAIL, RCPT and DATA"),
                Err(reply) => return self.error(reply.to_string()),
            }
        }
        match envelope {
            None => Ok(None),
            Some(_) => self.error("the batch ends within a message"),
        }
    }

    /// The next line of the content, or the next part of a long one, with LF and without an added dot; `None`: the
    /// content has ended.
    ///
    /// # Errors
    /// The batch ends within the content, or the input cannot be read.
    pub fn content(&mut self) -> Result<Option<Vec<u8>>, BatchError> {
        if !self.in_content {
            return Ok(None);
        }
        let (begins_line, held_cr) = (self.begins_line, std::mem::take(&mut self.held_cr));
        let mut octets = self.next_octets()?;
        if octets.is_empty() {
            return self.error("the batch ends within a message: the line with a dot is missing");
        }
        if begins_line && matches!(&octets[..], b".\n" | b".\r\n" | b"." | b".\r") {
            self.in_content = false;
            return Ok(None);
        }
        if begins_line && octets[0] == b'.' {
            octets.remove(0);
        }
        let held_cr = held_cr && octets != b"\n";
        let text_ends = octets.iter().rposition(|octet| *octet != b'\n').map_or(0, |at| at + 1);
        if octets[..text_ends].ends_with(b"\r") {
            octets.remove(text_ends - 1);
            self.held_cr = !self.begins_line;
        }
        if held_cr {
            octets.insert(0, b'\r');
        }
        Ok(Some(octets))
    }
}

/// The id and the time of arrival in a `NOOP` of [`write_message`].
fn known_message(line: &[u8]) -> (Option<String>, Option<Timestamp>) {
    let text = String::from_utf8_lossy(line);
    let word = |key: &str| text.split(' ').find_map(|word| word.strip_prefix(key));
    (word("id=").filter(|id| is_plain_id(id)).map(str::to_owned), word("arrived=").and_then(Timestamp::parse_rfc3339))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_read_as_it_was_written() {
        let text = "EHLO relay.example.net\r\nNOOP id=1j arrived=2026-01-02T03:04:05Z\r\n\
                    MAIL FROM:<bob@w.example> BODY=8BITMIME RET=HDRS ENVID=a+20b\r\n\
                    RCPT TO:<alice@example.org> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;alice@example.org\r\n\
                    RCPT TO:<eva@example.org>\r\nDATA\r\nSubject: x\r\n\r\n..\r\n..dot\r\n.\r\nQUIT\r\n";
        for text in [text.to_owned(), text.replace("\r\n", "\n")] {
            let mut reader = BatchReader::new(text.as_bytes());
            let BatchEnvelope { id, arrived, envelope } = reader.next_envelope().unwrap().unwrap();
            let mut content = Vec::new();
            while let Some(line) = reader.content().unwrap() {
                content.extend(line);
            }
            assert_eq!(content, b"Subject: x\n\n.\n.dot\n");
            assert!(reader.next_envelope().unwrap().is_none());
            let message = QueuedEnvelope { id: id.unwrap(), arrived: arrived.unwrap(), envelope };
            let mut written = Vec::new();
            write_begin(&mut written, "relay.example.net").unwrap();
            write_message(&mut written, &message, &mut &content[..]).unwrap();
            write_end(&mut written).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), text.replace("\r\n", "\n").replace('\n', "\r\n"));
        }
    }

    #[test]
    fn a_long_line_is_read_in_parts_and_another_batch_may_follow() {
        for fill in 0..4 {
            let block = usize::try_from(LINE_BLOCK).unwrap() - 2;
            let content = format!("{}\r\rx\ry\n\n..\r.\nz\n", "c".repeat(block + fill));
            for end in ["\n", "\r\n"] {
                let wire = content.replace("\n..", "\n...").replace('\n', end);
                let message = format!("MAIL FROM:<>{end}RCPT TO:<a@b.example>{end}DATA{end}{wire}.{end}QUIT{end}");
                let text = message.repeat(2);
                let mut reader = BatchReader::new(text.as_bytes());
                for _ in 0..2 {
                    assert!(reader.next_envelope().unwrap().is_some());
                    let mut read = Vec::new();
                    while let Some(part) = reader.content().unwrap() {
                        assert!(part.len() as u64 <= LINE_BLOCK + 1);
                        read.extend(part);
                    }
                    assert!(read == content.as_bytes(), "{fill} {end:?}");
                }
                assert!(reader.next_envelope().unwrap().is_none());
            }
        }
        let text = "x".repeat(1 << 20);
        let error = BatchReader::new(text.as_bytes()).next_envelope().unwrap_err().to_string();
        assert_eq!(error, "line 1: this line is too long for a command");
    }

    #[test]
    fn an_error_has_its_line() {
        for (text, expected) in [
            ("MAIL FROM:<>\nDATA\n", "line 2: DATA comes before MAIL and RCPT"),
            ("EHLO x\nRCPT TO:<a@b.example>\n", "line 2: RCPT comes before MAIL"),
            ("MAIL FROM:<a@b.example> X=1\n", "line 1: 555"),
            ("MAIL FROM:<>\nRCPT TO:<a@b.example>\n", "line 2: the batch ends within a message"),
            ("MAIL FROM:<>\nQUIT\n", "line 2: QUIT comes within a message"),
            ("ATRN\n", "line 1: this command is not part"),
            ("MAIL FROM:<>\nRCPT TO:<a@b.example>\nDATA\nx\n", "line 4: the batch ends within a message: the line"),
        ] {
            let mut reader = BatchReader::new(text.as_bytes());
            let read = reader.next_envelope().and_then(|_| reader.content()).and_then(|_| reader.content());
            let error = read.unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
