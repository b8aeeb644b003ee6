//! Content at rest and on the wire. The first octet of the input says how the rest is divided into pieces. The result must
//! not depend on that.

use odmr::mail::address::Domain;
use odmr::mail::header::{HeaderAdditions, HeaderCompleter};
use odmr::smtp::content::{ContentDecoder, ContentEncoder, HeaderScanner, WireSize};

pub fn run(input: &[u8]) {
    let Some((cut, content)) = input.split_first() else { return };
    let pieces = || content.chunks(usize::from(*cut % 64) + 1);
    decoded(content, pieces);
    encoded(content, pieces);
    header(content, pieces);
}

/// The result of a decoder: the content, the octets used, whether the content has ended, whether there was a bare CR or LF,
/// and the size.
type Decoded = (Vec<u8>, usize, bool, bool, u64);

fn decode<'a>(mut decoder: ContentDecoder, pieces: impl Iterator<Item = &'a [u8]>) -> Decoded {
    let (mut out, mut used, mut end) = (Vec::new(), 0, false);
    for piece in pieces {
        if end {
            break;
        }
        let fed = decoder.feed(piece, &mut out);
        (used, end) = (used + fed.used, fed.end);
        assert!(fed.used == piece.len() || fed.end);
    }
    if !end {
        decoder.finish(&mut out);
    }
    (out, used, end, decoder.bare(), decoder.size())
}

fn decoded<'a, P: Iterator<Item = &'a [u8]>>(content: &'a [u8], pieces: impl Fn() -> P) {
    for make in [ContentDecoder::data, ContentDecoder::bdat] {
        let whole = decode(make(), std::iter::once(content));
        assert_eq!(decode(make(), pieces()), whole);
        let (out, used, end, ..) = &whole;
        if *end {
            // RFC 5321 section 4.1.1.4: only this ends the content.
            assert!(content[..*used].ends_with(b"\r\n.\r\n") || content[..*used] == *b".\r\n");
        }
        assert!(out.len() <= content.len());
    }
}

/// The content as it arrives: each line ends in LF, and a bare CR has become a space.
pub fn normalised(content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len() + 1);
    for (at, octet) in content.iter().enumerate() {
        match octet {
            b'\r' if content.get(at + 1) == Some(&b'\n') => {}
            b'\r' => out.push(b' '),
            octet => out.push(*octet),
        }
    }
    if out.last().is_some_and(|last| *last != b'\n') {
        out.push(b'\n');
    }
    out
}

fn encoded<'a, P: Iterator<Item = &'a [u8]>>(content: &[u8], pieces: impl Fn() -> P) {
    let mut size = WireSize::default();
    pieces().for_each(|piece| size.feed(piece));
    let normal = normalised(content);
    for (encoder, decoder, data) in [
        (ContentEncoder::data(), ContentDecoder::data(), true),
        (ContentEncoder::bdat(), ContentDecoder::bdat(), false),
    ] {
        let (mut wire, mut encoder) = (Vec::new(), encoder);
        pieces().for_each(|piece| encoder.feed(piece, &mut wire));
        encoder.finish(&mut wire);
        let lines = wire.split_inclusive(|octet| *octet == b'\n');
        for line in lines {
            let line = line.strip_suffix(b"\r\n").expect("a line ends in CRLF");
            assert!(!line.contains(&b'\r'), "a bare CR is sent");
        }
        if !data {
            assert_eq!(wire.len() as u64, size.finish());
        }
        let (out, used, end, bare, count) = decode(decoder, std::iter::once(&wire[..]));
        assert_eq!((used, end, bare, count), (wire.len(), data, false, size.finish()));
        assert_eq!(out, normal);
    }
}

fn header<'a, P: Iterator<Item = &'a [u8]>>(content: &'a [u8], pieces: impl Fn() -> P) {
    let scan = |pieces: &mut dyn Iterator<Item = &'a [u8]>| {
        let mut scanner = HeaderScanner::default();
        pieces.for_each(|piece| scanner.feed(piece));
        let (id, received_id) = (scanner.message_id().map(str::to_owned), scanner.received_id().map(str::to_owned));
        (scanner.received(), id, received_id)
    };
    assert_eq!(scan(&mut pieces()), scan(&mut std::iter::once(content)));
    let additions = || HeaderAdditions {
        home: Domain::parse("home.example").expect("a domain"),
        date: "Fri, 02 Jan 2026 03:04:05 +0000".to_owned(),
        message_id: "<1@home.example>".to_owned(),
        from: Some("Eva <eva@home.example>".to_owned()),
        drop_bcc: true,
    };
    let complete = |completer: HeaderCompleter, pieces: &mut dyn Iterator<Item = &'a [u8]>| {
        let (mut completer, mut out) = (completer, Vec::new());
        pieces.for_each(|piece| completer.feed(piece, &mut out));
        completer.finish(&mut out);
        out
    };
    for make in [&HeaderCompleter::relay as &dyn Fn() -> HeaderCompleter, &|| HeaderCompleter::new(additions())] {
        assert_eq!(complete(make(), &mut pieces()), complete(make(), &mut std::iter::once(content)));
    }
    let relayed = complete(HeaderCompleter::relay(), &mut std::iter::once(content));
    assert!(relayed.len() <= content.len());
}
