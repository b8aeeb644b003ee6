//! Message content between the disk and the wire.
//!
//! At rest lines end in LF, on the wire in CRLF (RFC 5321 section 2.3.8). DATA doubles the dots that
//! begin a line and ends with a dot alone (section 4.5.2); BDAT counts octets instead (RFC 3030).
//!
//! ```text
//!                DATA        BDAT
//! wire → disk    Unstuffer   Chunks      say whether a CR or an LF stood alone: such mail is refused
//! disk → wire    Stuffer     Liner       never let a CR or an LF stand alone
//!                Sizer                   the size of what they send
//!                HeaderScanner           the Received fields and the Message-ID that go by
//! ```
//!
//! All take the content in pieces, append to `out`, keep nothing but a few octets of state, and give
//! the same however it was cut. NUL is an octet like any other.

/// Takes content off the wire after DATA, up to and with the line that is a dot alone.
///
/// Only `<CRLF>.<CRLF>` ends it, whose first CRLF may be that of DATA itself (RFC 5321 section
/// 4.1.1.4). Anything nearly like it is content, and [`bare`](Self::bare) tells: if it were an end
/// for some servers and not for others, a letter could smuggle commands past the first of them.
#[derive(Debug, Default)]
pub struct Unstuffer {
    state: DotState,
    /// Where a CRLF leads to: the one difference between DATA and BDAT.
    line_start: DotState,
    size: u64,
    bare: bool,
    eight_bit: bool,
}

/// What [`Unstuffer::feed`] made of its input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fed {
    /// Octets of the input that were content or its end. Less than all only at the end.
    pub used: usize,
    /// The content is over.
    pub end: bool,
}

/// What the octets so far mean for the next one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum DotState {
    #[default]
    LineStart,
    /// Behind a dot at the line's start, which is not content.
    Dot,
    /// Behind that and a CR: an LF would be the end.
    DotCr,
    Text,
    /// Behind a CR, which counts only when we know what follows.
    Cr,
    End,
}

impl Unstuffer {
    pub fn new() -> Unstuffer {
        Unstuffer::default()
    }

    /// Appends the content in `input` to `out`. Of what follows the end nothing is used.
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
                    self.alone(b'\r', out);
                    rest = here;
                    DotState::Text
                }
                (DotState::LineStart, b'.') => DotState::Dot,
                (DotState::Dot, b'\r') => DotState::DotCr,
                (_, b'\r') => DotState::Cr,
                (_, b'\n') => {
                    self.alone(b'\n', out);
                    DotState::Text
                }
                _ => {
                    let (text, after) = split_text(here);
                    self.size += text.len() as u64;
                    self.eight_bit |= !text.is_ascii();
                    out.extend_from_slice(text);
                    rest = after;
                    DotState::Text
                }
            };
        }
        Fed { used: input.len() - rest.len(), end: self.state == DotState::End }
    }

    /// Whether a CR without LF or an LF without CR was seen (RFC 5321 section 2.3.8 forbids both).
    pub fn bare(&self) -> bool {
        self.bare
    }

    /// Whether an octet above 127 was seen.
    pub fn eight_bit(&self) -> bool {
        self.eight_bit
    }

    /// Octets on the wire as RFC 1870 section 5 counts them: every CRLF, no stuffed dots, no end.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn alone(&mut self, octet: u8, out: &mut Vec<u8>) {
        self.bare = true;
        self.size += 1;
        out.push(octet);
    }
}

/// Takes content off the wire in the chunks of BDAT, whose borders may lie even inside a CRLF.
#[derive(Debug)]
pub struct BdatDecoder(Unstuffer);

impl BdatDecoder {
    pub fn new() -> BdatDecoder {
        // Without line starts there are no dots to see, and no end.
        BdatDecoder(Unstuffer { state: DotState::Text, line_start: DotState::Text, ..Unstuffer::default() })
    }

    /// Appends the content in `input` to `out`.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) {
        self.0.feed(input, out);
    }

    /// After the last chunk: what was held back.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if self.0.state == DotState::Cr {
            self.0.state = DotState::Text;
            self.0.alone(b'\r', out);
        }
    }

    /// As [`Unstuffer::bare`].
    pub fn bare(&self) -> bool {
        self.0.bare
    }

    /// As [`Unstuffer::eight_bit`].
    pub fn eight_bit(&self) -> bool {
        self.0.eight_bit
    }

    /// As [`Unstuffer::size`]: the sum of the chunks, once finished.
    pub fn size(&self) -> u64 {
        self.0.size
    }
}

impl Default for BdatDecoder {
    fn default() -> Self {
        BdatDecoder::new()
    }
}

/// Puts content on the wire after DATA.
///
/// An LF at rest, or a CRLF that somebody left there, becomes CRLF. Any other CR becomes a space: the
/// file may come from another program, and nobody must read what we send as two messages.
#[derive(Debug, Default)]
pub struct Stuffer(CrlfEncoder);

impl Stuffer {
    pub fn new() -> Stuffer {
        Stuffer::default()
    }

    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) {
        // RFC 5321 section 4.5.2: a dot that begins a line gets another before it.
        self.0.lines(input, b".", out);
    }

    /// Appends the end mark, before it a CRLF only if the last line lacks one (section 4.1.1.4).
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        self.0.finish(out);
        out.extend_from_slice(b".\r\n");
    }
}

/// Puts content on the wire for BDAT: as [`Stuffer`], without the dots and the end.
#[derive(Debug, Default)]
pub struct CrlfEncoder {
    state: DotState,
}

impl CrlfEncoder {
    pub fn new() -> CrlfEncoder {
        CrlfEncoder::default()
    }

    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) {
        self.lines(input, b"", out);
    }

    /// Ends the last line if it is open.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if self.state == DotState::Cr {
            out.push(b' ');
        }
        if self.state != DotState::LineStart {
            out.extend_from_slice(b"\r\n");
        }
        self.state = DotState::LineStart;
    }

    fn lines(&mut self, mut input: &[u8], before_dot: &[u8], out: &mut Vec<u8>) {
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
                (place, _) => {
                    if place == DotState::LineStart && octet == b'.' {
                        out.extend_from_slice(before_dot);
                    }
                    let (text, after) = split_text(here);
                    out.extend_from_slice(text);
                    input = after;
                    DotState::Text
                }
            };
        }
    }
}

/// Counts the octets that [`Stuffer`] or [`Liner`] will send, as RFC 1870 section 5 counts them.
#[derive(Debug, Default)]
pub struct WireSize {
    size: u64,
    last: Option<u8>,
}

impl WireSize {
    pub fn new() -> WireSize {
        WireSize::default()
    }

    pub fn feed(&mut self, input: &[u8]) {
        for &octet in input {
            let without_cr = octet == b'\n' && self.last != Some(b'\r');
            self.size += 1 + u64::from(without_cr);
            self.last = Some(octet);
        }
    }

    /// The size, with the end of a last line that is open.
    pub fn finish(&self) -> u64 {
        match self.last {
            None | Some(b'\n') => self.size,
            Some(_) => self.size + 2,
        }
    }
}

/// Reads the header of content at rest as it goes by, up to the empty line that ends it.
#[derive(Debug, Default)]
pub struct HeaderScanner {
    /// The beginning of the line under way.
    line: Vec<u8>,
    received: usize,
    received_id: Option<String>,
    message_id: Option<String>,
    field: ScannedField,
    over: bool,
}

/// The field that a continuation line belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ScannedField {
    #[default]
    Other,
    Received,
    MessageId,
}

/// Octets of a header line that are looked at.
const SCANNED_LINE: usize = 512;

impl HeaderScanner {
    pub fn new() -> HeaderScanner {
        HeaderScanner::default()
    }

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
        self.over = text.is_empty();
        let mut value = text;
        if !text.first().is_some_and(u8::is_ascii_whitespace) {
            let after = |name: &[u8]| text.get(..name.len()).filter(|begin| begin.eq_ignore_ascii_case(name)).is_some();
            self.field = ScannedField::Other;
            for (name, field) in [("received:", ScannedField::Received), ("message-id:", ScannedField::MessageId)] {
                if after(name.as_bytes()) {
                    (self.field, value) = (field, &text[name.len()..]);
                }
            }
            self.received += usize::from(self.field == ScannedField::Received);
        }
        match self.field {
            ScannedField::Received if self.received == 1 && self.received_id.is_none() => {
                let words = String::from_utf8_lossy(value);
                let mut words = words.split_ascii_whitespace().skip_while(|word| *word != "id").skip(1);
                self.received_id = words.next().map(|id| id.trim_end_matches(';').to_owned());
            }
            ScannedField::MessageId if self.message_id.is_none() && !value.trim_ascii().is_empty() => {
                self.message_id = Some(String::from_utf8_lossy(value.trim_ascii()).into_owned());
            }
            _ => {}
        }
        self.line = line;
        self.line.clear();
    }

    /// The number of `Received` fields so far: many of them mean that the message goes round in circles (RFC 5321
    /// section 6.3).
    pub fn received(&self) -> usize {
        self.received
    }

    /// The id in the topmost `Received` field, by which the host before us knows the message (RFC 5321 section 4.4).
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
