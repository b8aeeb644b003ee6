//! Text from a peer in the log: the dialogue, line by line at debug level, and the values of events.
//!
//! Control characters are escaped, so that no peer can forge a log line or send commands to an operator's terminal.

use std::fmt::Display;
use std::io;

use crate::log_limit::may_log_event;

/// Writes the lines of one connection into the log, as `[id] C: line`. The caller must replace secrets in them.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The id of the session.
    pub id: String,
    /// The initial of this side: `C` for the side that opened the connection (the customer, or a client), `P` for the
    /// provider on port 366, `S` for any other server. The turn does not change the initials.
    pub us: char,
    /// The initial of the peer.
    pub them: char,
}

impl Trace {
    /// Returns whether lines are logged. If not, a caller need not prepare them.
    pub fn enabled(&self) -> bool {
        log::log_enabled!(target: "dialogue", log::Level::Debug)
    }

    /// Logs one line that this side sends, with or without its line end.
    pub fn sent(&self, line: &[u8]) {
        self.write(self.us, line);
    }

    /// Logs one line that the peer has sent.
    pub fn received(&self, line: &[u8]) {
        self.write(self.them, line);
    }

    /// Logs an event between lines: TLS, the turn.
    pub fn event(&self, event: &str) {
        log::debug!(target: "dialogue", "[{}] == {event} ==", self.id);
    }

    fn write(&self, side: char, line: &[u8]) {
        if self.enabled() {
            log::debug!(target: "dialogue", "[{}] {side}: {}", self.id, printable(line));
        }
    }
}

/// Logs that the system gives no thread, once a minute.
pub fn log_no_thread(error: &io::Error) {
    if let Some(others) = may_log_event("no-thread") {
        log::error!("event=no-thread times={} error={}", others + 1, quoted(error));
    }
}

/// Returns a line without its line end as text; control characters and octets that are not UTF-8 are `\xNN`.
pub fn printable(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut shown = String::with_capacity(line.len());
    for chunk in line.utf8_chunks() {
        chunk.valid().chars().for_each(|character| push_printable(&mut shown, character));
        chunk.invalid().iter().for_each(|octet| shown.push_str(&format!("\\x{octet:02x}")));
    }
    shown
}

fn push_printable(shown: &mut String, character: char) {
    match character {
        _ if character.is_control() => shown.push_str(&format!("\\x{:02x}", u32::from(character))),
        // They reorder or break a line on a terminal, or are invisible.
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {
            shown.push_str(&character.escape_unicode().to_string());
        }
        _ => shown.push(character),
    }
}

/// The most octets of a value that the log shows.
const VALUE_LIMIT: usize = 256;

/// Returns a value from the wire as the log shows it: in quotes, control characters as `\xNN`, `"` and `\` after a `\`,
/// at most 256 octets and then `…`; an empty value as `-`.
pub fn quoted(value: impl Display) -> String {
    quoted_text(&value.to_string())
}

fn quoted_text(value: &str) -> String {
    if value.is_empty() {
        return "-".to_owned();
    }
    let mut shown = String::with_capacity(value.len().min(VALUE_LIMIT) + 2);
    shown.push('"');
    for character in value.chars() {
        if shown.len() + character.len_utf8() > VALUE_LIMIT {
            shown.push('…');
            break;
        }
        if matches!(character, '"' | '\\') {
            shown.push('\\');
        }
        push_printable(&mut shown, character);
    }
    shown.push('"');
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_shows_no_control_characters() {
        assert_eq!(printable(b"MAIL FROM:<\xc3\xa9@a>\x1b[2J\xff\r\n"), "MAIL FROM:<é@a>\\x1b[2J\\xff");
        assert_eq!(quoted("a\"b\\c\nd"), "\"a\\\"b\\\\c\\x0ad\"");
        assert_eq!(quoted("a\u{202e}b\u{2028}"), "\"a\\u{202e}b\\u{2028}\"");
        assert_eq!(quoted(""), "-");
        assert_eq!(quoted("x".repeat(1000)), format!("\"{}…\"", "x".repeat(VALUE_LIMIT - 1)));
    }
}
