//! What the transcripts must contain between them: each code of RFC 2645, each verb in each state of each listener.
//!
//! The walk pairs replies with commands in order, as RFC 2920 section 3.1 demands of a client, so that a transcript of
//! pipelined groups counts as well.

use super::format::{Action, Transcript, shown};
use std::collections::{BTreeSet, VecDeque};

const VERBS: &[&str] = &[
    "EHLO", "HELO", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "NOOP", "VRFY", "EXPN", "HELP", "QUIT", "STARTTLS", "AUTH",
    "ATRN", "ETRN", "TURN", UNKNOWN,
];

/// Any word that is not a verb.
const UNKNOWN: &str = "an unknown word";

/// The servers of the program and the states that change what a verb means there.
const STATES: &[(&str, &[&str])] = &[
    ("inbound", &["before EHLO", "after EHLO", "in a transaction"]),
    ("odmr", &["before EHLO", "after EHLO", "authenticated", "in a transaction"]),
    ("customer", &["before EHLO", "after EHLO", "in a transaction"]),
];

/// RFC 2645 sections 5.2.1 and 7, and a provider's reply to a wrong ATRN.
const CODES: &[&str] = &["250", "450", "451", "453", "501", "502", "503", "530"];

/// The codes and verbs that no transcript has.
pub fn missing(transcripts: &[Transcript]) -> Vec<String> {
    let exchanges: Vec<Exchange> = transcripts.iter().flat_map(walk).collect();
    let of_atrn = |code: &&&str| {
        !exchanges
            .iter()
            .any(|exchange| exchange.server == "odmr" && exchange.verb == "ATRN" && exchange.reply.starts_with(**code))
    };
    // 502 is the code of the verbs that the listener does not have (RFC 2645 section 5.4).
    let codes = CODES.iter().filter(|code| **code != "502").filter(of_atrn).map(|code| format!("{code} to ATRN"));
    let has_502 = exchanges.iter().any(|exchange| exchange.server == "odmr" && exchange.reply.starts_with("502"));
    let seen: BTreeSet<(&str, &str, &str)> =
        exchanges.iter().map(|exchange| (exchange.server, exchange.state, exchange.verb.as_str())).collect();
    let verbs = STATES.iter().flat_map(|(server, states)| {
        let seen = &seen;
        states.iter().flat_map(move |state| {
            VERBS
                .iter()
                .filter(move |verb| !seen.contains(&(*server, *state, **verb)))
                .map(move |verb| format!("{server}, {state}: {verb}"))
        })
    });
    codes.chain((!has_502).then(|| "502 on the odmr listener".to_owned())).chain(verbs).collect()
}

/// Replies of the program that have no enhanced code of their class.
pub fn without_enhanced_code(transcripts: &[Transcript]) -> Vec<String> {
    let wrong = |exchange: &Exchange| {
        let class = exchange.reply.as_bytes().first().copied().unwrap_or_default();
        !matches!(exchange.verb.as_str(), "EHLO" | "HELO")
            && class != b'3'
            && !has_code_of(class, exchange.reply.get(4..).unwrap_or_default())
    };
    let exchanges = transcripts.iter().flat_map(walk).filter(wrong);
    exchanges.map(|exchange| format!("{}:{}: {}", exchange.file, exchange.line, exchange.reply)).collect()
}

fn has_code_of(class: u8, text: &str) -> bool {
    // `2.{...}`: the class will do where RFC 3463 leaves a choice.
    if let Some(("", "{...}")) = text.strip_prefix(char::from(class)).and_then(|rest| rest.split_once('.')) {
        return true;
    }
    let code = text.split(' ').next().unwrap_or_default();
    let parts: Vec<&str> = code.split('.').collect();
    let number = |part: &&str| (1..=3).contains(&part.len()) && part.bytes().all(|octet| octet.is_ascii_digit());
    parts.len() == 3 && parts.iter().all(number) && parts[0].as_bytes() == [class]
}

/// A command and the program's (last line of the) reply.
struct Exchange<'a> {
    file: &'a str,
    line: usize,
    server: &'static str,
    state: &'static str,
    verb: String,
    reply: String,
}

/// The state of one connection as the steps go by.
struct Walk<'a> {
    file: &'a str,
    server: Option<&'static str>,
    /// Index into the server's states.
    state: usize,
    greeted: bool,
    /// Verbs that still wait for their reply.
    pending: VecDeque<String>,
    content: bool,
    /// The next line is a response, and the reply to it one to AUTH.
    response: bool,
    exchanges: Vec<Exchange<'a>>,
}

fn walk(transcript: &Transcript) -> Vec<Exchange<'_>> {
    let customer = transcript.name.starts_with("customer/");
    let mut walk = Walk {
        file: &transcript.name,
        server: None,
        state: 0,
        greeted: false,
        pending: VecDeque::new(),
        content: false,
        response: false,
        exchanges: Vec::new(),
    };
    for step in &transcript.steps {
        match &step.action {
            Action::Connect { listener, .. } => walk.begin(match listener.as_str() {
                _ if customer => None,
                "inbound" => Some("inbound"),
                "host" => None,
                _ => Some("odmr"),
            }),
            // A second connection at the same time is not followed.
            Action::Use(_) => walk.begin(None),
            Action::Turn => walk.begin(customer.then_some("customer")),
            Action::Tls { .. } => walk.state = 0,
            Action::Send { octets, line: true, .. } => {
                walk.command(&shown(octets.strip_suffix(b"\r\n").unwrap_or(octets)))
            }
            Action::Expect { text, .. } => walk.reply(step.line, text),
            _ => {}
        }
    }
    walk.exchanges
}

impl Walk<'_> {
    fn begin(&mut self, server: Option<&'static str>) {
        self.server = server;
        self.state = 0;
        self.greeted = false;
        self.content = false;
        self.response = false;
        self.pending.clear();
    }

    fn command(&mut self, text: &str) {
        if self.content {
            if text == "." {
                self.content = false;
                self.pending.push_back(".".into());
            }
            return;
        }
        if std::mem::take(&mut self.response) {
            self.pending.push_back("AUTH".into());
            return;
        }
        let verb = text.split([' ', ':']).next().unwrap_or_default().to_ascii_uppercase();
        self.pending.push_back(if VERBS.contains(&verb.as_str()) { verb } else { UNKNOWN.to_owned() });
    }

    fn reply(&mut self, line: usize, text: &str) {
        let Some(server) = self.server else { return };
        if text.as_bytes().get(3) == Some(&b'-') {
            return;
        }
        if !self.greeted {
            self.greeted = true;
            return;
        }
        let Some(verb) = self.pending.pop_front() else { return };
        let good = text.starts_with('2');
        let states = STATES.iter().find(|(name, _)| *name == server).map_or(&[""][..], |(_, states)| *states);
        let state = states.get(self.state).copied().unwrap_or_default();
        self.exchanges.push(Exchange {
            file: self.file,
            line,
            server,
            state,
            verb: verb.clone(),
            reply: text.to_owned(),
        });
        self.content = verb == "DATA" && text.starts_with("354");
        self.response = text.starts_with("334");
        self.state = match (server, verb.as_str()) {
            ("odmr", "EHLO" | "HELO") if good => self.state.clamp(1, 2),
            ("odmr", "AUTH") if text.starts_with("235") => 2,
            ("odmr", "MAIL") if good => 3,
            ("odmr", "RSET" | ".") => self.state.min(2),
            ("odmr", _) => self.state,
            (_, "EHLO" | "HELO") if good => 1,
            (_, "MAIL") if good => 2,
            (_, "RSET" | ".") => self.state.min(1),
            _ => self.state,
        };
    }
}
