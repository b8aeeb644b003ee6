//! Suggestions for a wrong word of the command line, and the page about exit codes.

use getopts::{Fail, Options};

use crate::nearest::nearest;

/// `odmr help exit-codes`.
pub(super) const EXIT_CODES: &str = include_str!("pages/exit-codes.txt");

/// Returns `; did you mean …?` if one of the words is nearly this one, or else nothing.
pub(super) fn suggestion<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, known).map(|near| format!("; did you mean {near}?")).unwrap_or_default()
}

/// The text for an error about an option.
pub(super) fn wrong_option(error: Fail, options: &Options) -> String {
    let with_dashes = |name: &str| format!("{}{name}", if name.len() == 1 { "-" } else { "--" });
    match error {
        Fail::UnrecognizedOption(name) => {
            let shown = options.usage("");
            let known: Vec<_> = shown.split([' ', '[']).filter(|word| word.starts_with("--")).collect();
            let name = with_dashes(&name);
            format!("no such option: {name}{}", suggestion(&name, known))
        }
        Fail::ArgumentMissing(name) => format!("the value of {} is missing", with_dashes(&name)),
        Fail::UnexpectedArgument(name) => format!("{} has no value", with_dashes(&name)),
        Fail::OptionDuplicated(name) => format!("{} is given twice", with_dashes(&name)),
        Fail::OptionMissing(name) => format!("{} is missing", with_dashes(&name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_suggested() {
        let known = ["serve", "send", "secret", "queue"];
        for (word, expected) in
            [("sreve", "serve"), ("sned", "send"), ("queu", "queue"), ("secrets", "secret"), ("x", ""), ("bounce", "")]
        {
            let expected = if expected.is_empty() { String::new() } else { format!("; did you mean {expected}?") };
            assert_eq!(suggestion(word, known), expected, "{word}");
        }
    }
}
