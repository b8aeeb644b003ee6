//! The format of a transcript: text into steps. The parent module describes it.

#[path = "expand.rs"]
pub mod expand;
#[path = "overlay.rs"]
mod overlay;

use std::collections::HashMap;
use std::time::Duration;

/// The files of a play if its transcript has no others: the path and the text.
pub const DEFAULTS: [(&str, &str); 4] = [
    ("customer.toml", include_str!("../../testdata/default/customer.toml")),
    ("provider.toml", include_str!("../../testdata/default/provider.toml")),
    ("customers.d/acme.toml", include_str!("../../testdata/default/customers.d/acme.toml")),
    ("customers.d/beta.toml", include_str!("../../testdata/default/customers.d/beta.toml")),
];

pub struct Transcript {
    /// `provider/turn/bare-atrn`: the path without `.smtp`.
    pub name: String,
    pub settings: Settings,
    pub before: Vec<File>,
    pub steps: Vec<Step>,
    pub after: Vec<File>,
}

#[derive(Debug, Default, PartialEq)]
pub struct Settings {
    pub clear_only: bool,
    pub tls_only: bool,
    pub whole_only: bool,
    pub certificate: bool,
    pub require_tls: bool,
    /// For `customer/`: a call beyond those of the dialogue fails the play. Otherwise it gets 453.
    pub only_these_calls: bool,
    /// For `customer/`: the call is that of `odmr pull --soft-bounce`.
    pub soft_bounce: bool,
    /// The dialogue itself begins TLS.
    pub starttls: bool,
}

pub struct File {
    pub line: usize,
    pub path: String,
    /// As written: lines, or octets in escapes. Of an overlay, the default file with the lines laid over it.
    pub text: String,
    pub octets: bool,
    pub overlay: bool,
    /// After the dialogue there may be no file or directory of this path.
    pub gone: bool,
}

impl File {
    /// The octets of the file: each line with its LF, or the octets written.
    pub fn content(&self) -> Vec<u8> {
        if self.octets {
            octets(&self.text.replace('\n', "")).expect("checked by the parser")
        } else {
            self.text.clone().into_bytes()
        }
    }
}

pub struct Step {
    pub line: usize,
    pub action: Action,
}

#[derive(Debug, PartialEq)]
pub enum Action {
    Connect {
        listener: String,
        name: String,
        /// As of `Tls`, for `odmr-tls`.
        shown: Option<String>,
    },
    Use(String),
    Tls {
        /// The server requests a certificate, and the client shows that of this name, or `none`. `None`: it requests none.
        shown: Option<String>,
    },
    /// What the runner sends from now on is not within TLS.
    InClear,
    Turn,
    Silence(Duration),
    Fault {
        path: String,
        becomes: Becomes,
    },
    Pull {
        succeeds: bool,
    },
    Stop,
    /// A line or octets that the runner sends.
    Send {
        party: char,
        octets: Vec<u8>,
        line: bool,
    },
    Close,
    /// A line that the program must send. The text is a pattern.
    Expect {
        party: char,
        text: String,
    },
    ExpectOctets {
        party: char,
        octets: Vec<u8>,
    },
    ExpectClose {
        party: char,
    },
}

#[derive(Debug, PartialEq)]
pub enum Becomes {
    File,
    Directory,
    Gone,
}

/// Reads a transcript. `name` is its path below `testdata`, without `.smtp`.
///
/// # Errors
///
/// `file:line: what is wrong`.
pub fn parse(name: &str, text: &str) -> Result<Transcript, String> {
    let directory = name.split('/').next().unwrap_or_default();
    let wrong = |line: usize, what: &str| format!("testdata/{name}.smtp:{line}: {what}");
    let mut parser = Parser {
        runners: match directory {
            "customer" => "PS",
            "relay" => "S",
            _ => "C",
        },
        name,
        place: Place::Head,
        names: Vec::new(),
        transcript: Transcript {
            name: name.to_owned(),
            settings: Settings::default(),
            before: Vec::new(),
            steps: Vec::new(),
            after: Vec::new(),
        },
    };
    for (number, line) in expand::expand(directory, text).map_err(|(number, what)| wrong(number, &what))? {
        parser.line(number, &line).map_err(|what| wrong(number, &what))?;
    }
    let mut transcript = parser.transcript;
    if !text.starts_with("# ") {
        return Err(wrong(1, "begin with a comment: what does it prove?"));
    }
    for file in transcript.before.iter_mut().chain(&mut transcript.after) {
        // The empty line before the next section does not belong to the file.
        if file.text.ends_with("\n\n") || file.text == "\n" {
            file.text.pop();
        }
        if file.octets && octets(&file.text.replace('\n', "")).is_none() {
            return Err(wrong(file.line, "a wrong escape"));
        }
        if file.overlay {
            let default = DEFAULTS.iter().find(|(path, _)| *path == file.path);
            let (_, default) = default.ok_or_else(|| wrong(file.line, "there is no default file of this name"))?;
            let laid_over = overlay::laid_over(default, &file.text);
            file.text = laid_over.map_err(|(index, what)| wrong(file.line + 1 + index, &what))?;
        }
    }
    check_roles(&transcript)?;
    Ok(transcript)
}

/// A line of a dialogue as the program logs it, `[7] C: NOOP`, without the number of its session.
fn logged(line: &str) -> &str {
    let after = line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map(|(_, rest)| rest);
    after.filter(|rest| ["C: ", "P: ", "S: ", "== "].iter().any(|begin| rest.starts_with(begin))).unwrap_or(line)
}

/// The octets that `\r \n \t \0 \xHH \\` mean; the rest as it is.
pub fn octets(text: &str) -> Option<Vec<u8>> {
    let mut octets = Vec::new();
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        if character != '\\' {
            octets.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        octets.push(match rest.next()? {
            'r' => b'\r',
            'n' => b'\n',
            't' => b'\t',
            '0' => 0,
            '\\' => b'\\',
            'x' => u8::from_str_radix(&String::from_iter([rest.next()?, rest.next()?]), 16).ok()?,
            _ => return None,
        });
    }
    Some(octets)
}

/// Octets as a transcript shows them: control characters and what is not UTF-8 in escapes.
pub fn shown(octets: &[u8]) -> String {
    let mut text = String::new();
    for chunk in octets.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\r' => text.push_str("\\r"),
                '\n' => text.push_str("\\n"),
                '\0' => text.push_str("\\0"),
                '\t' => text.push('\t'),
                other if other.is_control() => text.push_str(&format!("\\x{:02x}", other as u32)),
                other => text.push(other),
            }
        }
        chunk.invalid().iter().for_each(|octet| text.push_str(&format!("\\x{octet:02x}")));
    }
    text
}

/// Whether `text` reads as `pattern`, in which `{...}` is any text.
pub fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split("{...}");
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

enum Place {
    Head,
    Before,
    Dialogue,
    After,
}

struct Parser<'a> {
    name: &'a str,
    /// The parties whose lines the runner sends.
    runners: &'static str,
    place: Place,
    /// The names of the connections so far.
    names: Vec<String>,
    transcript: Transcript,
}

impl Parser<'_> {
    fn line(&mut self, number: usize, line: &str) -> Result<(), String> {
        let line = logged(line);
        if let Some(event) = line.strip_prefix("== ").and_then(|rest| rest.strip_suffix(" ==")) {
            return self.event(number, event);
        }
        if let Some(path) = line.strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --")) {
            return self.file(number, path);
        }
        let files = match self.place {
            Place::Before => &mut self.transcript.before,
            Place::After if !self.transcript.after.is_empty() => &mut self.transcript.after,
            _ if line.is_empty() || line.starts_with('#') => return Ok(()),
            Place::Dialogue => return self.dialogue(number, line),
            _ => return Err(format!("neither a file nor dialogue: {line}")),
        };
        let file = files.last_mut().ok_or("no file")?;
        file.text.push_str(line);
        file.text.push('\n');
        Ok(())
    }

    fn file(&mut self, line: usize, path: &str) -> Result<(), String> {
        let (path, kind) = path.split_once(' ').unwrap_or((path, ""));
        if !matches!(
            (kind, &self.place),
            ("" | "|", _) | ("+", Place::Head | Place::Before) | ("is gone", Place::After)
        ) {
            return Err(format!("what is {kind:?} after the path?"));
        }
        let (octets, overlay, gone) = (kind == "|", kind == "+", kind == "is gone");
        let file = File { line, path: path.to_owned(), text: String::new(), octets, overlay, gone };
        match self.place {
            Place::Head | Place::Before => {
                let elsewhere = if self.runners == "PS" { "provider.toml" } else { "customer.toml" };
                if path == elsewhere || self.runners == "PS" && path.starts_with("customers.d/") {
                    return Err(format!("the program under test does not read {path}"));
                }
                if self.transcript.before.iter().any(|other| other.path == path) {
                    return Err(format!("{path} a second time"));
                }
                self.place = Place::Before;
                self.transcript.before.push(file);
            }
            Place::After => self.transcript.after.push(file),
            Place::Dialogue => return Err("a file within the dialogue".into()),
        }
        Ok(())
    }

    fn event(&mut self, line: usize, event: &str) -> Result<(), String> {
        let settings = &mut self.transcript.settings;
        match event {
            "clear only" => settings.clear_only = true,
            "tls only" => settings.tls_only = true,
            "whole only" => settings.whole_only = true,
            "certificate" => settings.certificate = true,
            "require tls" => settings.require_tls = true,
            "only these calls" => settings.only_these_calls = true,
            "soft bounce" => settings.soft_bounce = true,
            "after" => self.place = Place::After,
            _ => {
                if matches!(self.place, Place::After) {
                    return Err("an event after == after ==".into());
                }
                self.place = Place::Dialogue;
                let action = self.action(event)?;
                self.transcript.steps.push(Step { line, action });
            }
        }
        Ok(())
    }

    fn action(&mut self, event: &str) -> Result<Action, String> {
        let words: Vec<&str> = event.split(' ').collect();
        let settings = &mut self.transcript.settings;
        Ok(match words[..] {
            ["connect", listener @ ("inbound" | "odmr" | "odmr-tls" | "hop" | "host"), ref rest @ ..] => {
                let (name, shown) = match rest {
                    [] => (listener, None),
                    ["as", name] => (*name, None),
                    ["with", shown] if listener == "odmr-tls" => (listener, Some((*shown).to_owned())),
                    ["with", shown, "as", name] if listener == "odmr-tls" => (*name, Some((*shown).to_owned())),
                    _ => return Err(format!("unknown: {event}")),
                };
                self.names.push(name.to_owned());
                if listener == "odmr-tls" {
                    settings.clear_only = true;
                    settings.certificate = true;
                }
                Action::Connect { listener: listener.to_owned(), name: name.to_owned(), shown }
            }
            ["tls", ref rest @ ..] => {
                let shown = match rest {
                    [] => None,
                    ["with", shown] => Some((*shown).to_owned()),
                    _ => return Err(format!("unknown: {event}")),
                };
                settings.clear_only = true;
                settings.certificate = true;
                settings.starttls = true;
                Action::Tls { shown }
            }
            ["in", "clear"] => Action::InClear,
            ["turn"] => Action::Turn,
            ["wait", time] => {
                let time = time.strip_suffix("ms").and_then(|time| time.parse().ok()).ok_or("a time in ms")?;
                Action::Silence(Duration::from_millis(time))
            }
            ["fault", path, "is", "a", "file"] => Action::Fault { path: path.to_owned(), becomes: Becomes::File },
            ["fault", path, "is", "a", "directory"] => {
                Action::Fault { path: path.to_owned(), becomes: Becomes::Directory }
            }
            ["fault", path, "is", "gone"] => Action::Fault { path: path.to_owned(), becomes: Becomes::Gone },
            ["stop"] => Action::Stop,
            ["pull", "ok"] => Action::Pull { succeeds: true },
            ["pull", "failed"] => Action::Pull { succeeds: false },
            [name] if self.names.iter().any(|known| known == name) => Action::Use(name.to_owned()),
            _ => return Err(format!("unknown event: {event}")),
        })
    }

    fn dialogue(&mut self, line: usize, text: &str) -> Result<(), String> {
        let mut characters = text.chars();
        let party = characters.next().filter(|party| "CPS".contains(*party)).ok_or("which party?")?;
        let kind = characters.next().ok_or("which party?")?;
        let rest = characters.as_str();
        let words = rest.strip_prefix(' ').unwrap_or(rest);
        let action = match (kind, self.runners.contains(party)) {
            (':', true) => Action::Send { party, octets: format!("{words}\r\n").into_bytes(), line: true },
            (':', false) => Action::Expect { party, text: words.to_owned() },
            ('|', true) => Action::Send { party, octets: octets(words).ok_or("a wrong escape")?, line: false },
            ('|', false) => Action::ExpectOctets { party, octets: octets(words).ok_or("a wrong escape")? },
            ('*', true) => {
                let (times, words) = words.split_once(' ').ok_or("how many times, and what?")?;
                let times = times.parse().map_err(|_| "how many times?")?;
                let octets = octets(words).ok_or("a wrong escape")?.repeat(times);
                Action::Send { party, octets, line: false }
            }
            ('!', true) if rest.is_empty() => Action::Close,
            ('!', false) if rest.is_empty() => Action::ExpectClose { party },
            _ => return Err(format!("not a line of dialogue in {}: {text}", self.name)),
        };
        self.transcript.steps.push(Step { line, action });
        Ok(())
    }
}

/// Before the turn P sends replies. After it C sends replies, and P commands or content. At a host of the world S sends
/// replies.
fn check_roles(transcript: &Transcript) -> Result<(), String> {
    // By connection: the server, and whether P sends content.
    let mut states: HashMap<&str, (char, bool)> = HashMap::new();
    let mut current = "";
    for step in &transcript.steps {
        let (server, content) = states.entry(current).or_insert(('P', false));
        let (party, text) = match &step.action {
            Action::Connect { name, listener, .. } => {
                current = name;
                states.insert(name, (if listener == "host" { 'S' } else { 'P' }, false));
                continue;
            }
            Action::Use(name) => {
                current = name;
                continue;
            }
            Action::Turn => {
                *server = 'C';
                continue;
            }
            Action::Send { party, octets, line: true } => {
                (*party, shown(octets.strip_suffix(b"\r\n").unwrap_or(octets)))
            }
            Action::Expect { party, text } => (*party, text.clone()),
            _ => continue,
        };
        let wrong = |what: &str| Err(format!("testdata/{}.smtp:{}: {what}: {text}", transcript.name, step.line));
        if party == *server {
            if !is_reply(&text) {
                return wrong("not a reply, but this party is the server here");
            }
            *content = *content || text.starts_with("354");
        } else if *server != 'P' && *content {
            *content = text != ".";
        } else if matches!((*server, party), ('C', 'P') | ('S', 'C')) && is_reply(&text) {
            return wrong("a reply, but this party is the client here");
        }
    }
    Ok(())
}

/// `250 text`, `250-text` or `250`.
fn is_reply(text: &str) -> bool {
    let Some((code, rest)) = text.split_at_checked(3) else { return false };
    code.bytes().all(|octet| octet.is_ascii_digit()) && (rest.is_empty() || rest.starts_with([' ', '-']))
}

#[test]
fn pattern() {
    let check = |pattern, text, expected| assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
    check("250 OK", "250 OK", true);
    check("250 OK", "250 OK ", false);
    check("250 {...}", "250 ", true);
    check("250-{...} x {...}", "250-a x b", true);
    check("a{...}b{...}b", "ab", false);
    check("a{...}b", "a{...}bc", false);
}

#[test]
fn a_mistake_has_its_line() {
    let check = |name: &str, text: &str, expected: &str| {
        assert_eq!(
            parse(name, &format!("# What it proves.\n{text}")).err(),
            Some(format!("testdata/{name}.smtp:{expected}"))
        );
    };
    check("customer/a", "== turnd ==", "2: unknown event: turnd");
    check("customer/a", "-- customer.toml + --\nhostname = \"a\"\n- b", "4: no key b to remove");
    check("customer/a", "-- provider.toml + --", "2: the program under test does not read provider.toml");
    check("provider/a", "-- customer.toml --", "2: the program under test does not read customer.toml");
    check("provider/a", "-- customers.d/acne.toml + --", "2: there is no default file of this name");
    check("provider/a", "-- spool/a is gone --", "2: what is \"is gone\" after the path?");
    check("provider/a", "-- spool/a --\n-- spool/a --", "3: spool/a a second time");
    check("relay/a", "== connect host, EHLO ==\nC: 250 OK", "3: a reply, but this party is the client here: 250 OK");
}

#[test]
fn a_log_can_be_pasted() {
    for (line, wanted) in [("[7] C: NOOP", "C: NOOP"), ("[pull] == turn ==", "== turn =="), ("[odmr]", "[odmr]")] {
        assert_eq!(logged(line), wanted);
    }
}

#[test]
fn escapes() {
    assert_eq!(octets("a\\r\\n\\0\\x80\\\\é"), Some(b"a\r\n\0\x80\\\xc3\xa9".to_vec()));
    assert_eq!(octets("\\q"), None);
    assert_eq!(shown(b"a\r\n\0\x80\xc3\xa9\x01"), "a\\r\\n\\0\\x80é\\x01");
}
