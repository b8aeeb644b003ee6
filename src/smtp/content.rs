//! Message content between its form at rest and its form on the wire.
//!
//! At rest lines end in LF, on the wire in CRLF (RFC 5321 section 2.3.8). DATA adds a dot to each line that begins with
//! one and ends with a line that is a dot (section 4.5.2); BDAT announces a number of octets instead (RFC 3030).
//!
//! ```text
//! wire → rest    ContentDecoder    reports a CR or an LF that is not part of a CRLF: such mail is rejected
//! rest → wire    ContentEncoder    never sends a CR or an LF that is not part of a CRLF
//!                WireSize          counts the octets that it will send
//!                HeaderScanner     counts Received fields and finds the Message-ID
//! ```
//!
//! All receive the content in pieces and keep a few octets of state. The result does not depend on how the content was cut
//! into pieces. NUL is an octet like any other.

/// Decodes content from the wire.
///
/// After DATA only `<CRLF>.<CRLF>` is the end; its first CRLF may be that of the DATA line itself (RFC 5321 section
/// 4.1.1.4). Sequences such as `<LF>.<LF>` are content, and [`bare`](Self::bare) reports them: if the next server reads them
/// as the end, a message can smuggle commands past this one.
#[derive(Debug)]
pub struct ContentDecoder {
    state: DotState,
    /// The state after a CRLF, which is the only difference between DATA and BDAT.
    line_start: DotState,
    size: u64,
    bare: bool,
}

/// What [`ContentDecoder::feed`] has read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fed {
    /// Octets of the input that were content or its end: fewer than all only after the end.
    pub used: usize,
    /// The content has ended. In BDAT, whose chunks have a size, it never does.
    pub end: bool,
}

/// The position in a line, which decides what the next octet means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum DotState {
    LineStart,
    /// After the dot that begins a line, which is not content.
    Dot,
    /// After that dot and a CR: an LF is the end.
    DotCr,
    Text,
    /// After a CR that is content or part of a line end.
    Cr,
    End,
}

impl ContentDecoder {
    /// A decoder for the content of one DATA command.
    pub fn data() -> ContentDecoder {
        ContentDecoder { state: DotState::LineStart, line_start: DotState::LineStart, size: 0, bare: false }
    }

    /// A decoder for the chunks of all BDAT commands of a message, in which a dot means nothing. A chunk may end inside a
    /// CRLF.
    pub fn bdat() -> ContentDecoder {
        ContentDecoder { state: DotState::Text, line_start: DotState::Text, ..ContentDecoder::data() }
    }

    /// Appends the content in `input` to `out`, up to the end of the content.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Fed {
        let mut rest = input;
        while self.state != DotState::End
            && let Some((&octet, after)) = rest.split_first()
        {
            let here = rest;
            rest = after;
            self.state = match (self.state, octet) {
                (DotState::DotCr, b'\n') => DotState::End,
                (DotState::Cr, b'\n') => {
                    self.size += 2;
                    out.push(b'\n');
                    self.line_start
                }
                (DotState::Cr | DotState::DotCr, _) => {
                    self.push_bare(b'\r', out);
                    rest = here;
                    DotState::Text
                }
                (DotState::LineStart, b'.') => DotState::Dot,
                (DotState::Dot, b'\r') => DotState::DotCr,
                (_, b'\r') => DotState::Cr,
                (_, b'\n') => {
                    self.push_bare(b'\n', out);
                    DotState::Text
                }
                _ => {
                    let (text, after) = split_text(here);
                    self.size += text.len() as u64;
                    out.extend_from_slice(text);
                    rest = after;
                    DotState::Text
                }
            };
        }
        Fed { used: input.len() - rest.len(), end: self.state == DotState::End }
    }

    /// Appends the CR at the end of the last chunk, if it has one. DATA cannot end with a CR.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if self.state == DotState::Cr {
            self.state = DotState::Text;
            self.push_bare(b'\r', out);
        }
    }

    /// Whether there was a CR without LF or an LF without CR (RFC 5321 section 2.3.8 forbids both).
    pub fn bare(&self) -> bool {
        self.bare
    }

    /// Octets on the wire as RFC 1870 section 5 counts them: with each CRLF, without added dots and the end.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn push_bare(&mut self, octet: u8, out: &mut Vec<u8>) {
        self.bare = true;
        self.size += 1;
        out.push(octet);
    }
}

/// Encodes content for the wire.
///
/// An LF or a CRLF at rest becomes CRLF. Any other CR becomes a space (RFC 5321 section 2.3.8): another program may have
/// written the file, and the peer might read one message as two.
#[derive(Debug)]
pub struct ContentEncoder {
    state: DotState,
    /// For DATA: with added dots and the end.
    dots: bool,
}

impl ContentEncoder {
    /// An encoder for the content of one DATA command.
    pub fn data() -> ContentEncoder {
        ContentEncoder { state: DotState::LineStart, dots: true }
    }

    /// An encoder for the content of one `BDAT … LAST` command, as many octets as [`WireSize`] counts.
    pub fn bdat() -> ContentEncoder {
        ContentEncoder { dots: false, ..ContentEncoder::data() }
    }

    /// Appends `input` in its form on the wire to `out`.
    pub fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while let Some((&octet, after)) = input.split_first() {
            let here = input;
            input = after;
            self.state = match (self.state, octet) {
                (_, b'\n') => {
                    out.extend_from_slice(b"\r\n");
                    DotState::LineStart
                }
                (DotState::Cr, _) => {
                    out.push(b' ');
                    input = here;
                    DotState::Text
                }
                (_, b'\r') => DotState::Cr,
                (state, _) => {
                    // RFC 5321 section 4.5.2: a dot before each dot that begins a line.
                    if self.dots && state == DotState::LineStart && octet == b'.' {
                        out.push(b'.');
                    }
                    let (text, after) = split_text(here);
                    out.extend_from_slice(text);
                    input = after;
                    DotState::Text
                }
            };
        }
    }

    /// Ends the last line if it has no line end, and DATA with its dot (RFC 5321 section 4.1.1.4).
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if self.state == DotState::Cr {
            out.push(b' ');
        }
        if self.state != DotState::LineStart {
            out.extend_from_slice(b"\r\n");
        }
        if self.dots {
            out.extend_from_slice(b".\r\n");
        }
        self.state = DotState::LineStart;
    }
}

/// Counts the octets that a [`ContentEncoder`] will send, as RFC 1870 section 5 counts them: without added dots and the end.
#[derive(Debug, Default)]
pub struct WireSize {
    size: u64,
    last: Option<u8>,
}

impl WireSize {
    /// Counts a piece of the content at rest.
    pub fn feed(&mut self, input: &[u8]) {
        for &octet in input {
            let without_cr = octet == b'\n' && self.last != Some(b'\r');
            self.size += 1 + u64::from(without_cr);
            self.last = Some(octet);
        }
    }

    /// The octets of the content, with the CRLF that [`ContentEncoder::finish`] adds to a last line without a line end.
    pub fn finish(&self) -> u64 {
        self.size + if matches!(self.last, None | Some(b'\n')) { 0 } else { 2 }
    }
}

/// Reads the header of content at rest, up to the empty line that ends it; of each line the first 512 octets.
#[derive(Debug, Default)]
pub struct HeaderScanner {
    /// The beginning of the current line.
    line: Vec<u8>,
    /// The field that the current line belongs to.
    field: ScannedField,
    received: usize,
    received_id: Option<String>,
    message_id: Option<String>,
    over: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ScannedField {
    #[default]
    Other,
    Received,
    MessageId,
}

/// Octets of a header line that are read.
const SCANNED_LINE: usize = 512;

impl HeaderScanner {
    /// Reads a piece of the content; the body is ignored.
    pub fn feed(&mut self, input: &[u8]) {
        for &octet in input {
            match octet {
                _ if self.over => return,
                b'\n' => self.end_line(),
                _ if self.line.len() < SCANNED_LINE => self.line.push(octet),
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let text = line.trim_ascii_end();
        self.over = line.iter().all(|octet| *octet == b'\r');
        let mut value = text;
        if !text.first().is_some_and(u8::is_ascii_whitespace) {
            let colon = text.iter().position(|octet| *octet == b':');
            let (name, rest) = text.split_at(colon.map_or(0, |at| at + 1));
            self.field = match name.to_ascii_lowercase().as_slice() {
                b"received:" => ScannedField::Received,
                b"message-id:" => ScannedField::MessageId,
                _ => ScannedField::Other,
            };
            self.received += usize::from(self.field == ScannedField::Received);
            value = rest;
        }
        let value = String::from_utf8_lossy(value.trim_ascii());
        match self.field {
            ScannedField::Received if self.received == 1 && self.received_id.is_none() => {
                let mut words = value.split_ascii_whitespace().skip_while(|word| *word != "id").skip(1);
                self.received_id = words.next().map(|id| id.trim_end_matches(';').to_owned());
            }
            ScannedField::MessageId if self.message_id.is_none() && !value.is_empty() => {
                self.message_id = Some(value.into_owned());
            }
            _ => {}
        }
    }

    /// The number of `Received` fields so far: many of them mean that the message is in a mail loop (RFC 5321 section 6.3).
    pub fn received(&self) -> usize {
        self.received
    }

    /// The id in the topmost `Received` field, by which the host that wrote it knows the message (RFC 5321 section 4.4).
    pub fn received_id(&self) -> Option<&str> {
        self.received_id.as_deref()
    }

    /// The Message-ID with its angle brackets (RFC 5322 section 3.6.4).
    pub fn message_id(&self) -> Option<&str> {
        self.message_id.as_deref()
    }
}

/// Splits before the first CR or LF.
fn split_text(input: &[u8]) -> (&[u8], &[u8]) {
    let end = input.iter().position(|&octet| octet == b'\r' || octet == b'\n');
    input.split_at(end.unwrap_or(input.len()))
}

#[cfg(test)]
mod tests;
