//! Content on the wire and at rest, whole and cut into pieces.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// The content of one DATA, whether it held a bare CR or LF, and the octets after its end.
fn unstuff(pieces: &[Vec<u8>]) -> (Vec<u8>, bool, Option<Vec<u8>>) {
    let (mut decoder, mut out) = (ContentDecoder::data(), Vec::new());
    for (n, piece) in pieces.iter().enumerate() {
        let fed = decoder.feed(piece, &mut out);
        if fed.end {
            let rest = [&piece[fed.used..], &pieces[n + 1..].concat()].concat();
            return (out, decoder.bare(), Some(rest));
        }
        assert_eq!(fed.used, piece.len());
    }
    (out, decoder.bare(), None)
}

fn unchunk(pieces: &[Vec<u8>]) -> (Vec<u8>, bool, u64) {
    let (mut decoder, mut out) = (ContentDecoder::bdat(), Vec::new());
    for piece in pieces {
        decoder.feed(piece, &mut out);
    }
    decoder.finish(&mut out);
    (out, decoder.bare(), decoder.size())
}

fn stuff(pieces: &[Vec<u8>]) -> Vec<u8> {
    let (mut encoder, mut out) = (ContentEncoder::data(), Vec::new());
    pieces.iter().for_each(|piece| encoder.feed(piece, &mut out));
    encoder.finish(&mut out);
    out
}

fn lines(pieces: &[Vec<u8>]) -> Vec<u8> {
    let (mut encoder, mut out) = (ContentEncoder::bdat(), Vec::new());
    pieces.iter().for_each(|piece| encoder.feed(piece, &mut out));
    encoder.finish(&mut out);
    out
}

fn size(pieces: &[Vec<u8>]) -> u64 {
    let mut size = WireSize::default();
    pieces.iter().for_each(|piece| size.feed(piece));
    size.finish()
}

fn received(pieces: &[Vec<u8>]) -> usize {
    let mut headers = HeaderScanner::default();
    pieces.iter().for_each(|piece| headers.feed(piece));
    headers.received()
}

fn whole(input: &str) -> [Vec<u8>; 1] {
    [input.into()]
}

/// Rules: SMTP-07, SMUG-05.
#[test]
fn data_ends_with_a_line_that_is_a_dot() {
    fn check(input: &str, content: &str, rest: Option<&str>) {
        let expected = (content.into(), false, rest.map(Into::into));
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
fn nothing_is_used_after_the_end() {
    let (mut decoder, mut out) = (ContentDecoder::data(), Vec::new());
    assert_eq!(decoder.feed(b"a\r\n.\r\nb", &mut out), Fed { used: 6, end: true });
    assert_eq!(decoder.feed(b"b\r\n", &mut out), Fed { used: 0, end: true });
    assert_eq!(out, b"a\n");
}

/// Rules: SMTP-03, SMUG-01.
#[test]
fn no_smuggling_vector_ends_the_data() {
    fn check(vector: &str, bare: bool) {
        let input = format!("a{vector}MAIL FROM:<b@example.org>\r\n.\r\nQUIT\r\n");
        let (content, seen, rest) = unstuff(&whole(&input));
        assert!(content.ends_with(b"MAIL FROM:<b@example.org>\n"), "{vector:?}");
        assert_eq!((seen, rest), (bare, Some(b"QUIT\r\n".to_vec())), "{vector:?}");
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
fn a_dot_means_nothing_in_a_chunk() {
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
    fn check(input: &str, size: u64) {
        let mut decoder = ContentDecoder::data();
        decoder.feed(input.as_bytes(), &mut Vec::new());
        assert_eq!(decoder.size(), size, "{input:?}");
    }
    check(".\r\n", 0);
    check("a\r\n.\r\n", 3);
    check("..\r\nü\r\n.\r\n", 7);
    check("a\rb\nc\r\n.\rd\r\n.\r\n", 11);
}

/// Rules: SMTP-02, SMTP-05, SMUG-03.
#[test]
fn content_is_sent_in_whole_lines() {
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
fn received_fields_are_counted_in_the_header_only() {
    fn check(content: &str, expected: usize) {
        assert_eq!(received(&whole(content)), expected, "{content:?}");
    }
    check("", 0);
    check("Received: from a\n by b\nreceived:x\nRECEIVED:\n\nReceived: c\n", 3);
    check("Received: a\r\n\r\nReceived: b\r\n", 1);
    check("\nReceived: a\n", 0);
    // A line of white space is a continuation, not the end of the header (RFC 5322 section 2.2.3).
    check("To: a\n \t\nReceived: b\r\n\r\nReceived: c\n", 1);
    check("Received-SPF: a\nReceive: b\nX-Received: c\n Received: d\nReceivedReceived: e\n\n", 0);
    check("Received", 0);
}

/// Few kinds of octets, so that every combination of line ends and dots occurs.
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
    fn the_result_does_not_depend_on_the_cuts(pieces in pieces()) {
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
    fn a_received_field_is_found_in_two_pieces(
        text in "(Received: a\n|X: b\n|\n|\r\n|re){0,6}",
        at in 0usize..70,
    ) {
        let (start, end) = text.split_at(at.min(text.len()));
        prop_assert_eq!(received(&[start.into(), end.into()]), received(&whole(&text)));
    }

    #[test]
    fn data_ends_at_the_first_crlf_dot_crlf(pieces in pieces()) {
        // The CRLF of DATA itself comes first.
        let connection = [&b"\r\n"[..], &pieces.concat()].concat();
        let end = position(&connection, b"\r\n.\r\n");
        let rest = end.map(|end| connection[end + 5..].to_vec());
        let content = &connection[..end.map_or(connection.len(), |end| end + 2)];
        let text = String::from_utf8_lossy(content).replace("\r\n", "");
        let (_, bare, seen) = unstuff(&pieces);
        prop_assert_eq!(&seen, &rest);
        if seen.is_some() {
            prop_assert_eq!(bare, text.contains(['\r', '\n']));
        }
    }

    /// Rules: SMTP-02, SMUG-03.
    #[test]
    fn what_is_sent_is_one_message_of_whole_lines(pieces in pieces()) {
        let connection = stuff(&pieces);
        let framed = [b"\r\n", &connection[..]].concat();
        prop_assert_eq!(position(&framed, b"\r\n.\r\n"), Some(framed.len() - 5));
        let text = String::from_utf8_lossy(&connection).replace("\r\n", "");
        prop_assert!(!text.contains(['\r', '\n']));
        prop_assert_eq!(size(&pieces), lines(&pieces).len() as u64);
    }

    /// Rules: MD-17.
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
