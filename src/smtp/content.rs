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
//!                Headers                 the Received fields that went by
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

/// Watches content at rest go by, up to the empty line that ends its header.
#[derive(Debug)]
pub struct ReceivedCounter {
    /// How much of the name the line is so far; nothing when it is another field.
    matched: Option<usize>,
    received: usize,
    over: bool,
}

impl ReceivedCounter {
    pub fn new() -> ReceivedCounter {
        ReceivedCounter { matched: Some(0), received: 0, over: false }
    }

    pub fn feed(&mut self, input: &[u8]) {
        const NAME: &[u8] = b"received:";
        for &octet in input {
            if self.over {
                return;
            }
            self.matched = match self.matched {
                // A file that another program wrote with CRLF has an empty line, too.
                matched if octet == b'\r' => matched,
                matched if octet == b'\n' => {
                    self.over = matched == Some(0);
                    Some(0)
                }
                Some(octets) if octet.eq_ignore_ascii_case(&NAME[octets]) => Some(octets + 1),
                _ => None,
            };
            if self.matched == Some(NAME.len()) {
                self.received += 1;
                self.matched = None;
            }
        }
    }

    /// The number of `Received:` fields so far: many of them are a loop (RFC 5321 section 6.3).
    pub fn received(&self) -> usize {
        self.received
    }
}

impl Default for ReceivedCounter {
    fn default() -> Self {
        ReceivedCounter::new()
    }
}

/// Splits before the first CR or LF.
fn split_text(input: &[u8]) -> (&[u8], &[u8]) {
    let end = input.iter().position(|&octet| octet == b'\r' || octet == b'\n');
    input.split_at(end.unwrap_or(input.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// The content of one DATA, whether it held a bare CR or LF, and what was left behind its end.
    fn unstuff(pieces: &[Vec<u8>]) -> (Vec<u8>, bool, Option<Vec<u8>>) {
        let (mut unstuffer, mut out) = (Unstuffer::new(), Vec::new());
        for (n, piece) in pieces.iter().enumerate() {
            let fed = unstuffer.feed(piece, &mut out);
            if fed.end {
                let behind = [&piece[fed.used..], &pieces[n + 1..].concat()].concat();
                return (out, unstuffer.bare(), Some(behind));
            }
            assert_eq!(fed.used, piece.len());
        }
        (out, unstuffer.bare(), None)
    }

    fn unchunk(pieces: &[Vec<u8>]) -> (Vec<u8>, bool, u64) {
        let (mut chunks, mut out) = (BdatDecoder::new(), Vec::new());
        pieces.iter().for_each(|piece| chunks.feed(piece, &mut out));
        chunks.finish(&mut out);
        (out, chunks.bare(), chunks.size())
    }

    fn stuff(pieces: &[Vec<u8>]) -> Vec<u8> {
        let (mut stuffer, mut out) = (Stuffer::new(), Vec::new());
        pieces.iter().for_each(|piece| stuffer.feed(piece, &mut out));
        stuffer.finish(&mut out);
        out
    }

    fn lines(pieces: &[Vec<u8>]) -> Vec<u8> {
        let (mut liner, mut out) = (CrlfEncoder::new(), Vec::new());
        pieces.iter().for_each(|piece| liner.feed(piece, &mut out));
        liner.finish(&mut out);
        out
    }

    fn size(pieces: &[Vec<u8>]) -> u64 {
        let mut sizer = WireSize::new();
        pieces.iter().for_each(|piece| sizer.feed(piece));
        sizer.finish()
    }

    fn received(pieces: &[Vec<u8>]) -> usize {
        let mut headers = ReceivedCounter::new();
        pieces.iter().for_each(|piece| headers.feed(piece));
        headers.received()
    }

    fn whole(input: &str) -> [Vec<u8>; 1] {
        [input.into()]
    }

    #[test]
    fn data_ends_at_a_dot_alone() {
        fn check(input: &str, content: &str, behind: Option<&str>) {
            let expected = (content.into(), false, behind.map(Into::into));
            assert_eq!(unstuff(&whole(input)), expected, "{input:?}");
        }
        check(".\r\n", "", Some(""));
        check(".\r\nQUIT\r\n", "", Some("QUIT\r\n"));
        check("a\r\n.\r\n", "a\n", Some(""));
        check("a\r\n.\r\n.\r\n", "a\n", Some(".\r\n"));
        check("\r\n.\r\n", "\n", Some(""));
        check("a\r\n..\r\n.b\r\n...\r\n.\r\n", "a\n.\nb\n..\n", Some(""));
        check("a.\r\n.\r\n", "a.\n", Some(""));
        check("a\0\x01\x7f\r\n\0.\r\n.\r\n", "a\0\x01\x7f\n\0.\n", Some(""));
        check("", "", None);
        check(".", "", None);
        check("a\r\n.\r", "a\n", None);
        check("a", "a", None);
    }

    #[test]
    fn nothing_is_used_behind_the_end() {
        let (mut unstuffer, mut out) = (Unstuffer::new(), Vec::new());
        assert_eq!(unstuffer.feed(b"a\r\n.\r\nb", &mut out), Fed { used: 6, end: true });
        assert_eq!(unstuffer.feed(b"b\r\n", &mut out), Fed { used: 0, end: true });
        assert_eq!(out, b"a\n");
    }

    #[test]
    fn no_smuggling_vector_ends_the_data() {
        fn check(vector: &str, bare: bool) {
            let input = format!("a{vector}MAIL FROM:<b@example.org>\r\n.\r\nQUIT\r\n");
            let (content, seen, behind) = unstuff(&whole(&input));
            assert!(content.ends_with(b"MAIL FROM:<b@example.org>\n"), "{vector:?}");
            assert_eq!((seen, behind), (bare, Some(b"QUIT\r\n".to_vec())), "{vector:?}");
        }
        check("\n.\n", true);
        check("\r.\r", true);
        check("\r.\n", true);
        check("\n.\r", true);
        check("\n.\r\n", true);
        check("\r\n.\n", true);
        check("\r.\r\n", true);
        check("\r\n.\r", true);
        check("\r\n.\r\r\n", true);
        check("\r\n\0.\r\n", false);
    }

    #[test]
    fn chunks_know_no_dots() {
        fn check(chunks: &[&str], content: &str, bare: bool) {
            let chunks: Vec<Vec<u8>> = chunks.iter().map(|&chunk| chunk.into()).collect();
            let size = chunks.concat().len() as u64;
            assert_eq!(unchunk(&chunks), (content.into(), bare, size), "{chunks:?}");
        }
        check(&[], "", false);
        check(&["a\r\n.\r\n..b\r\n"], "a\n.\n..b\n", false);
        check(&[".\r\n"], ".\n", false);
        check(&["a\r", "\nb"], "a\nb", false);
        check(&["a\r", "b\0"], "a\rb\0", true);
        check(&["a\n"], "a\n", true);
        check(&["a\r"], "a\r", true);
        check(&["a\r\r\n"], "a\r\n", true);
    }

    #[test]
    fn size_leaves_out_stuffed_dots_and_the_end() {
        fn check(input: &str, size: u64, eight_bit: bool) {
            let mut unstuffer = Unstuffer::new();
            unstuffer.feed(input.as_bytes(), &mut Vec::new());
            assert_eq!((unstuffer.size(), unstuffer.eight_bit()), (size, eight_bit), "{input:?}");
        }
        check(".\r\n", 0, false);
        check("a\r\n.\r\n", 3, false);
        check("..\r\nü\r\n.\r\n", 7, true);
        check("a\rb\nc\r\n.\rd\r\n.\r\n", 11, false);
    }

    #[test]
    fn content_goes_out_in_whole_lines() {
        fn check(content: &str, expected: &str) {
            assert_eq!(String::from_utf8_lossy(&stuff(&whole(content))), expected, "{content:?}");
        }
        check("", ".\r\n");
        check("a\n", "a\r\n.\r\n");
        check("a", "a\r\n.\r\n");
        check("\n", "\r\n.\r\n");
        check(".", "..\r\n.\r\n");
        check("a\n.\n..b\nc.\n", "a\r\n..\r\n...b\r\nc.\r\n.\r\n");
        check("a\r\nb\r\n", "a\r\nb\r\n.\r\n");
        check("a\rb\n", "a b\r\n.\r\n");
        check("a\r\r\n", "a \r\n.\r\n");
        check("\r.\n", " .\r\n.\r\n");
        check("a\r", "a \r\n.\r\n");
        check("a\0b", "a\0b\r\n.\r\n");
    }

    #[test]
    fn received_fields_count_in_the_header_alone() {
        fn check(content: &str, expected: usize) {
            assert_eq!(received(&whole(content)), expected, "{content:?}");
        }
        check("", 0);
        check("Received: from a\n by b\nreceived:x\nRECEIVED:\n\nReceived: c\n", 3);
        check("Received: a\r\n\r\nReceived: b\r\n", 1);
        check("\nReceived: a\n", 0);
        check("Received-SPF: a\nReceive: b\nX-Received: c\n Received: d\nReceivedReceived: e\n\n", 0);
        check("Received", 0);
    }

    /// Few kinds of octets, so that every line end and dot meets every other.
    fn octets() -> impl Strategy<Value = Vec<u8>> {
        vec(proptest::sample::select(b"\n\n\n\r\r\r...a\0\xff".as_slice()), 0..8)
    }

    fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
        vec(octets(), 0..6)
    }

    fn position(haystack: &[u8], needle: &[u8]) -> Option<usize> {
        haystack.windows(needle.len()).position(|window| window == needle)
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(pieces in pieces()) {
            let whole = [pieces.concat()];
            let single: Vec<Vec<u8>> = whole[0].iter().map(|&octet| vec![octet]).collect();
            for cut in [&pieces, &single] {
                prop_assert_eq!(unstuff(cut), unstuff(&whole));
                prop_assert_eq!(unchunk(cut), unchunk(&whole));
                prop_assert_eq!(stuff(cut), stuff(&whole));
                prop_assert_eq!(lines(cut), lines(&whole));
                prop_assert_eq!(size(cut), size(&whole));
            }
        }

        #[test]
        fn cuts_hide_no_received_field(
            text in "(Received: a\n|X: b\n|\n|\r\n|re){0,6}",
            at in 0usize..70,
        ) {
            let (start, end) = text.split_at(at.min(text.len()));
            prop_assert_eq!(received(&[start.into(), end.into()]), received(&whole(&text)));
        }

        #[test]
        fn data_ends_where_the_standard_says(pieces in pieces()) {
            // The CRLF of DATA itself comes first.
            let connection = [&b"\r\n"[..], &pieces.concat()].concat();
            let end = position(&connection, b"\r\n.\r\n");
            let behind = end.map(|end| connection[end + 5..].to_vec());
            let content = &connection[..end.map_or(connection.len(), |end| end + 2)];
            let text = String::from_utf8_lossy(content).replace("\r\n", "");
            let (_, bare, seen) = unstuff(&pieces);
            prop_assert_eq!(&seen, &behind);
            if seen.is_some() {
                prop_assert_eq!(bare, text.contains(['\r', '\n']));
            }
        }

        #[test]
        fn what_is_sent_is_one_message_of_whole_lines(pieces in pieces()) {
            let connection = stuff(&pieces);
            let framed = [b"\r\n", &connection[..]].concat();
            prop_assert_eq!(position(&framed, b"\r\n.\r\n"), Some(framed.len() - 5));
            let text = String::from_utf8_lossy(&connection).replace("\r\n", "");
            prop_assert!(!text.contains(['\r', '\n']));
            prop_assert_eq!(size(&pieces), lines(&pieces).len() as u64);
        }

        #[test]
        fn content_survives_the_wire(pieces in pieces()) {
            let mut content = pieces.concat();
            content.retain(|&octet| octet != b'\r');
            if content.last().is_some_and(|&octet| octet != b'\n') {
                content.push(b'\n');
            }
            let connection = stuff(&[content.clone()]);
            prop_assert_eq!(unstuff(&[connection]), (content.clone(), false, Some(vec![])));
            let size = size(&[content.clone()]);
            prop_assert_eq!(unchunk(&[lines(&[content.clone()])]), (content, false, size));
        }
    }
}
