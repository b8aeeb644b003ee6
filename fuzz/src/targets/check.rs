//! Checks of everything that the program sends and logs.

use odmr::smtp::limits;
use odmr::smtp::reply::Reply;

/// The lines of a text. Each must end in CRLF, and have no other CR, LF or NUL.
pub fn lines(octets: &[u8]) -> Vec<&[u8]> {
    let mut lines = Vec::new();
    for line in octets.split_inclusive(|octet| *octet == b'\n') {
        let line = line.strip_suffix(b"\r\n").unwrap_or_else(|| panic!("no CRLF: {}", line.escape_ascii()));
        assert!(!line.iter().any(|octet| matches!(octet, b'\r' | 0)), "bare: {}", line.escape_ascii());
        lines.push(line);
    }
    lines
}

/// The lines of a server's replies, which must have the form of RFC 5321 section 4.2.
pub fn replies(octets: &[u8]) -> Vec<&[u8]> {
    let lines = lines(octets);
    for line in &lines {
        assert!(line.len() + 2 <= 512, "{} octets: {}", line.len() + 2, line.escape_ascii());
        let form = matches!(line, [b'2'..=b'5', b'0'..=b'9', b'0'..=b'9', b' ' | b'-', ..]);
        assert!(form, "not a reply: {}", line.escape_ascii());
        assert!(!line.iter().any(|octet| *octet != b'\t' && octet.is_ascii_control()), "{}", line.escape_ascii());
    }
    lines
}

/// Checks one of our replies, as it is sent.
pub fn reply(reply: &Reply) {
    let mut octets = Vec::new();
    reply.write_to(&mut octets);
    let lines = replies(&octets);
    let (last, others) = lines.split_last().expect("a reply has a line");
    assert!(last[3] == b' ' && others.iter().all(|line| line[3] == b'-'), "{}", octets.escape_ascii());
    shown(&reply.to_string());
}

/// Checks a text for one line of the log.
pub fn shown(text: &str) {
    assert!(!text.chars().any(|character| character.is_control() && character != '\t'), "{}", text.escape_debug());
}

/// The lines of a client's commands, without content. (Responses in AUTH are base64.)
pub fn commands(octets: &[u8]) -> Vec<&[u8]> {
    let lines = lines(octets);
    for line in &lines {
        assert!(line.len() + 2 <= limits::COMMAND_LINE, "{} octets: {}", line.len() + 2, line.escape_ascii());
    }
    lines
}
