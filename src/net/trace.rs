//! The dialogue in the log: every line sent and received, at debug level.

/// Writes the lines of one connection into the log, as `[id] C: line`. The caller replaces secrets before.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Names the connection.
    pub id: String,
    /// The letter of this side: `C` the side that opened the connection (the customer, or a client), `P` the provider
    /// on port 366, `S` any other server. Connections that turn keep their letters.
    pub us: char,
    /// The letter of the peer.
    pub them: char,
}

impl Trace {
    /// Whether lines are logged. If not, a caller need not prepare them.
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
        log::debug!(target: "dialogue", "[{}] {side}: {}", self.id, Printable(line));
    }
}

/// A line as text: control characters of the peer must not reach the terminal of an operator.
struct Printable<'a>(&'a [u8]);

impl std::fmt::Display for Printable<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use std::fmt::Write;
        let line = self.0.strip_suffix(b"\n").unwrap_or(self.0);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        for chunk in line.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character.is_control() {
                    true => write!(formatter, "{}", character.escape_default())?,
                    false => formatter.write_char(character)?,
                }
            }
            for octet in chunk.invalid() {
                write!(formatter, "\\x{octet:02x}")?;
            }
        }
        Ok(())
    }
}

/// Octets of a value that the log shows.
const VALUE_LIMIT: usize = 256;

/// A value from the wire as the log shows it: in quotes, control characters as `\\xNN`, at most 256 octets.
pub fn quoted(value: impl std::fmt::Display) -> String {
    let value = value.to_string();
    let mut shown = String::with_capacity(value.len().min(VALUE_LIMIT) + 2);
    shown.push('"');
    for character in value.chars() {
        if shown.len() + character.len_utf8() > VALUE_LIMIT {
            shown.push('…');
            break;
        }
        match character {
            '"' | '\\' => shown.extend(['\\', character]),
            _ if character.is_control() => shown.push_str(&format!("\\x{:02x}", u32::from(character))),
            _ => shown.push(character),
        }
    }
    shown.push('"');
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_shows_no_control_characters() {
        let shown = Printable(b"MAIL FROM:<\xc3\xa9@a>\x1b[2J\xff\r\n").to_string();
        assert_eq!(shown, "MAIL FROM:<é@a>\\u{1b}[2J\\xff");
    }
}
