//! JSON (RFC 8259): only the parts that the status needs.

use std::fmt::{self, Write};

use crate::clock::Timestamp;

/// A value of JSON.
pub(super) enum Json {
    Null,
    /// A number, true or false, in its form in JSON.
    Number(String),
    Count(u64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    pub fn text(text: impl ToString) -> Json {
        Json::Text(text.to_string())
    }

    /// A time as RFC 3339 writes it, or null.
    pub fn time(time: Option<Timestamp>) -> Json {
        time.map_or(Json::Null, |time| Json::Text(time.rfc3339()))
    }

    fn indented(&self, f: &mut fmt::Formatter<'_>, depth: usize) -> fmt::Result {
        let space = "  ".repeat(depth);
        match self {
            Json::Null => f.write_str("null"),
            Json::Number(number) => f.write_str(number),
            Json::Count(count) => write!(f, "{count}"),
            Json::Text(text) => write_text(f, text),
            Json::List(list) if list.is_empty() => f.write_str("[]"),
            Json::List(list) => {
                for (number, value) in list.iter().enumerate() {
                    write!(f, "{}\n{space}  ", if number == 0 { "[" } else { "," })?;
                    value.indented(f, depth + 1)?;
                }
                write!(f, "\n{space}]")
            }
            Json::Object(members) => {
                for (number, (key, value)) in members.iter().enumerate() {
                    write!(f, "{}\n{space}  \"{key}\": ", if number == 0 { "{" } else { "," })?;
                    value.indented(f, depth + 1)?;
                }
                write!(f, "\n{space}}}")
            }
        }
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.indented(f, 0)
    }
}

/// RFC 8259 section 7.
fn write_text(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_char('"')?;
    for character in text.chars() {
        match character {
            '"' | '\\' => write!(f, "\\{character}")?,
            // Also DEL and C1: the text may be shown on a terminal.
            control if control.is_control() => write!(f, "\\u{:04x}", u32::from(control))?,
            other => f.write_char(other)?,
        }
    }
    f.write_char('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        let text =
            Json::List(vec![Json::text("a\"\\\n\u{9b}ä"), Json::Count(7), Json::Null, Json::Number("1.5".to_owned())]);
        let text = Json::Object(vec![("key", text), ("none", Json::List(Vec::new()))]).to_string();
        assert_eq!(
            text,
            "{\n  \"key\": [\n    \"a\\\"\\\\\\u000a\\u009bä\",\n    7,\n    null,\n    1.5\n  ],\n  \"none\": []\n}"
        );
    }
}
