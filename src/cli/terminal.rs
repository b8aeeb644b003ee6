//! What is written for a person: on a terminal no line is longer than that is wide, and two words have a colour. Elsewhere
//! the text is as it is.

use std::os::fd::AsFd;

use rustix::termios::{isatty, tcgetwinsize};

/// A narrower terminal does not say how wide it is.
const LEAST_WIDTH: usize = 20;

const RED: &str = "\x1b[1;31m";
const YELLOW: &str = "\x1b[1;33m";
const PLAIN: &str = "\x1b[0m";

/// Whether what is written there may have colours: it is a terminal, and its user does not forbid it (no-color.org).
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

/// Divides a line between words. What follows begins below the second column of a table, if the line has one or is in it.
/// Other lines that are indented are left alone: they are there to be copied.
fn wrapped(line: &str, width: usize) -> String {
    let margin = line.len() - line.trim_start().len();
    let column = line.get(margin..).and_then(|rest| rest.find("  ").map(|at| (at, rest.get(at..))));
    let indent = match column {
        Some((at, Some(rest))) => margin + at + rest.len() - rest.trim_start().len(),
        _ if margin > 8 => margin,
        _ if margin > 0 => return line.to_owned(),
        _ => 4,
    };
    let indent = if indent < width / 2 { indent } else { 4 };
    let (mut text, mut length) = (String::new(), 0);
    for (number, word) in line.split(' ').enumerate() {
        let colours = if word.ends_with(PLAIN) { RED.len() + PLAIN.len() } else { 0 };
        let letters = word.chars().count() - colours;
        if number > 0 {
            if length + 1 + letters > width && length > indent {
                text = format!("{}\n{}", text.trim_end(), " ".repeat(indent));
                length = indent;
            } else {
                text.push(' ');
                length += 1;
            }
        }
        text.push_str(word);
        length += letters;
    }
    text
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
            ("", ""),
        ] {
            assert_eq!(wrapped(line, 20), expected);
        }
    }
}
