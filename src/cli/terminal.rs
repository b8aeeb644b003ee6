//! Text for a person: on a terminal no line is wider than the terminal, and two words have a colour. Elsewhere the text is
//! unchanged.

use std::os::fd::AsFd;

use rustix::termios::{isatty, tcgetwinsize};

/// A terminal that reports fewer columns does not know its width.
const LEAST_WIDTH: usize = 20;

const RED: &str = "\x1b[1;31m";
const YELLOW: &str = "\x1b[1;33m";
const PLAIN: &str = "\x1b[0m";

/// Whether the stream may have colours: it is a terminal, and its user does not forbid them (no-color.org).
pub(super) fn has_colours(stream: impl AsFd) -> bool {
    let variable = |name| std::env::var(name).unwrap_or_default();
    isatty(stream) && variable("NO_COLOR").is_empty() && variable("TERM") != "dumb"
}

/// Returns the word, on a terminal in red if it is about an error, in yellow otherwise.
pub(super) fn highlighted(word: &str, is_error: bool, colours: bool) -> String {
    match colours {
        true => format!("{}{word}{PLAIN}", if is_error { RED } else { YELLOW }),
        false => word.to_owned(),
    }
}

/// Returns the text as it fits the terminal that it is written to.
pub(super) fn fitted(text: &str, stream: impl AsFd) -> String {
    match tcgetwinsize(stream).map(|size| usize::from(size.ws_col)) {
        Ok(width @ LEAST_WIDTH..) => text.split('\n').map(|line| wrapped(line, width)).collect::<Vec<_>>().join("\n"),
        _ => text.to_owned(),
    }
}

/// Divides a line between words. The parts after the first begin below the second column of a table, if the line has
/// one or is in it. Other indented lines, also with a comment after them, are not divided, because users copy them.
fn wrapped(line: &str, width: usize) -> String {
    let margin = line.len() - line.trim_start().len();
    let column = line.get(margin..).and_then(|rest| rest.find("  ").map(|at| (margin + at, rest[at..].trim_start())));
    let (first_column, indent) = match column {
        Some((_, rest)) if margin > 0 && rest.starts_with('#') => return line.to_owned(),
        Some((end, rest)) => (if margin > 0 { end } else { 0 }, line.len() - rest.len()),
        _ if margin > 8 => (0, margin),
        _ if margin > 0 => return line.to_owned(),
        _ => (0, 4),
    };
    let indent = if indent < width / 2 { indent } else { 4 };
    let (mut text, mut length) = (String::new(), 0);
    for (number, piece) in pieces(line, first_column).into_iter().enumerate() {
        let colours = if piece.ends_with(PLAIN) { RED.len() + PLAIN.len() } else { 0 };
        let width_of_piece = piece.chars().count() - colours;
        if number > 0 {
            if width_of_piece > 0 && length + 1 + width_of_piece > width && length > indent {
                text = format!("{}\n{}", text.trim_end(), " ".repeat(indent));
                length = indent;
            } else {
                text.push(' ');
                length += 1;
            }
        }
        text.push_str(piece);
        length += width_of_piece;
    }
    text
}

/// The parts of a line that are not divided: its first octets up to `whole`, then words, and what a user may copy: a command in
/// backquotes, `key = value`.
fn pieces(line: &str, whole: usize) -> Vec<&str> {
    let (mut pieces, mut begin) = (Vec::new(), 0);
    for (at, _) in line.match_indices(' ').filter(|(at, _)| *at >= whole) {
        let (piece, rest) = (&line[begin..at], &line[at + 1..]);
        let in_quotes = piece.matches('`').count() % 2 == 1 && rest.contains('`');
        if !in_quotes && !piece.ends_with(" =") && !rest.starts_with("= ") {
            pieces.push(piece);
            begin = at + 1;
        }
    }
    pieces.push(&line[begin..]);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_divided_between_words() {
        for (line, expected) in [
            ("short", "short"),
            ("one two three four five six", "one two three four\n    five six"),
            ("see averyveryverylongword.pem: no", "see averyveryverylongword.pem:\n    no"),
            ("    odmr serve -c FILE --verbose", "    odmr serve -c FILE --verbose"),
            ("  list  a line for each", "  list  a line for\n        each"),
            ("  two spaces  in all the words", "  two spaces  in all\n    the words"),
            ("so type `chmod 640 the file.toml` as root", "so type\n    `chmod 640 the file.toml`\n    as root"),
            ("it is a ` in a long reply text", "it is a ` in a long\n    reply text"),
            ("for all of them set tls = \"none\" here", "for all of them set\n    tls = \"none\"\n    here"),
            ("    odmr pull -c FILE || :    # or: odmr serve", "    odmr pull -c FILE || :    # or: odmr serve"),
            ("    odmr queue -c FILE list D    shows it", "    odmr queue -c FILE list D\n    shows it"),
            ("", ""),
        ] {
            assert_eq!(wrapped(line, 20), expected);
        }
    }
}
