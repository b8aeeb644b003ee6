//! `odmr demo`: a provider and a customer on loopback, in a temporary directory, and their dialogue.
//!
//! The provider holds one message for the customer, and another waits in the customer's outgoing queue. In one call the
//! customer sends its message to the provider and, after the turn, receives the other. Only the certificate and the two
//! messages are made for the demonstration; everything else is done as by `serve`, `send` and `pull`.
//!
//! `--explain` prints `doc/tour.md`, with the lines of this run in place of those in the document.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use getopts::{Matches, Options};
use log::LevelFilter;

use super::exit::{ExitError, Sysexit};
use super::process::{print, print_fitted};
use crate::config::{CustomerConfig, ProviderConfig};
use crate::customer;
use crate::customer::sendmail::{self, SendmailOptions};
use crate::customer::submitter::SubmissionRoute;
use crate::ids::Ids;
use crate::maildir::Maildir;
use crate::net::cancel::CancelToken;
use crate::net::tls;
use crate::provider::{Listener, Provider};

/// The message that the provider holds for the customer.
const INBOUND_MESSAGE: &str = "\
From: Lester Tester <lester@dot.foo.bar>
To: Eva <eva@example.org>
Subject: hello

This message was held for you.
.This line began with a dot, and still does.
";

/// The message that the customer sends. Its recipient is at another customer of the same provider, so that the
/// demonstration needs no DNS.
const OUTGOING_MESSAGE: &str = "\
To: Carol <carol@example.edu>
Subject: going out

This message waited for the call, and was sent before the connection turned.
";

pub(super) const DEMO_SUMMARY: &str =
    "Shows two messages in one call over TLS: one to the provider, the turn, one into a Maildir.";

/// Each line of the demonstration and its explanation.
const TOUR: &str = include_str!("../../doc/tour.md");

/// How long the last line of a dialogue may take to be logged after the client has its reply.
const LOG_TIMEOUT: Duration = Duration::from_secs(5);

/// The options of `odmr demo`.
pub(super) fn options(options: &mut Options) {
    let help = "also explains each line: the RFC section, why it is sent, and the source file that sends it";
    options.optflag("", "explain", help);
}

/// Runs the demonstration and prints it; removes the temporary directory also after an error.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let ids = Ids::system(tls::random);
    let directory = std::env::temp_dir().join(format!("odmr-demo-{:016x}", ids.random_number()));
    fs::create_dir(&directory).map_err(|error| {
        let text = format!("{}: {error}; set TMPDIR to a directory that this user may write to", directory.display());
        io::Error::new(error.kind(), text)
    })?;
    let mut out = Output { dialogue: collect_dialogue(), tour: matches.opt_present("explain").then_some(TOUR) };
    let played = play(&directory, &ids, &mut out);
    let _ = fs::remove_dir_all(&directory);
    played.and_then(|()| out.finish())
}

fn play(directory: &Path, ids: &Ids, out: &mut Output) -> Result<(), ExitError> {
    out.title("A provider for example.org, with a certificate made just now")?;
    write_provider_files(directory)?;
    let running = Provider::start(ProviderConfig::load(&directory.join("provider.toml"))?, ids.clone())?;
    let (Some(inbound), Some(odmr)) = (running.address(Listener::Inbound), running.address(Listener::Odmr)) else {
        return Err(ExitError::new(Sysexit::OsError, "the provider has no listener"));
    };
    out.line(&format!("    inbound on {inbound}, on-demand mail relay on {odmr}"))?;

    out.title("The world delivers a message; C is the sender's server, S the provider's")?;
    out.dialogue(deliver(inbound), "S: 221")?;
    let held = Maildir::new(directory.join("spool/domains/example.org"));
    out.title("It is held, in a plain Maildir, until the customer calls")?;
    for entry in held.entries()? {
        out.line(&format!("    example.org/new/{}", entry.name.display()))?;
    }

    write_customer_file(directory, odmr)?;
    let config = CustomerConfig::load(&directory.join("customer.toml"))?;
    out.title("A user of the customer has typed: sendmail -t -f eva -F Eva; that message waits too")?;
    let (sender, full_name) = (Some("eva".to_owned()), Some("Eva".to_owned()));
    let options = SendmailOptions { recipients_from_header: true, sender, full_name, ..SendmailOptions::default() };
    sendmail::send(&config, ids, &options, SubmissionRoute::Queue, &mut OUTGOING_MESSAGE.as_bytes())?;
    out.messages(&directory.join("outgoing"))?;

    out.title("The customer calls; C is the customer and P the provider, also after the turn")?;
    let summary = out.dialogue(customer::pull(&config, ids, &CancelToken::new()?), "C: 221")?;
    out.title("The message that the customer has received is in its Maildir")?;
    out.messages(&directory.join("mail/example.org/eva"))?;
    out.title("The message that it has sent is held for example.edu; mail for other domains would go to their MX")?;
    out.messages(&directory.join("spool/domains/example.edu"))?;
    out.title(&format!("{summary}; held for example.org now: {}", held.entries()?.len()))?;
    running.stop();
    Ok(())
}

/// Receives the lines of each dialogue as the provider logs them, without the session ids.
fn collect_dialogue() -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    let mut log = env_logger::Builder::new();
    log.filter_module("dialogue", LevelFilter::Debug).format(move |_, record| {
        // The customer logs the same lines, in the thread of the call and in that of its outgoing mail.
        if !matches!(thread::current().name(), Some("main" | "upload"))
            && let Some((_, line)) = record.args().to_string().split_once("] ")
        {
            let _ = sender.send(line.to_owned());
        }
        Ok(())
    });
    // It fails only if this process has a logger already.
    let _ = log.try_init();
    lines
}

/// Prints the demonstration.
struct Output {
    dialogue: Receiver<String>,
    /// The rest of [`TOUR`] that is not printed yet; `None`: nothing is explained.
    tour: Option<&'static str>,
}

impl Output {
    /// Prints a line; in a tour, after the text that comes before it there.
    ///
    /// # Errors
    /// The tour has another line there.
    fn line(&mut self, line: &str) -> Result<(), ExitError> {
        if let Some(tour) = self.tour {
            let (text, rest) = split(tour, line)?;
            print_fitted(text)?;
            self.tour = Some(rest);
        }
        print(&format!("{line}\n"))
    }

    fn title(&mut self, text: &str) -> Result<(), ExitError> {
        // The tour has its own empty lines.
        if self.tour.is_none() {
            print("\n")?;
        }
        self.line(&format!("# {text}"))
    }

    /// Prints the dialogue of a session that has ended with `result`, which is returned. `last`: what its last line begins
    /// with.
    ///
    /// # Errors
    /// Those of [`Output::line`], or that of `result`.
    fn dialogue<T, E>(&mut self, result: Result<T, E>, last: &str) -> Result<T, ExitError>
    where
        ExitError: From<E>,
    {
        while let Ok(line) = self.dialogue.recv_timeout(LOG_TIMEOUT) {
            self.line(&format!("    {line}"))?;
            if line.starts_with(last) {
                break;
            }
        }
        Ok(result?)
    }

    /// Prints the messages of a Maildir.
    fn messages(&mut self, path: &Path) -> Result<(), ExitError> {
        let maildir = Maildir::new(path);
        for entry in maildir.entries()? {
            for line in fs::read_to_string(maildir.file(&entry))?.lines() {
                self.line(&format!("    {line}"))?;
            }
        }
        Ok(())
    }

    /// Prints the rest of the tour.
    ///
    /// # Errors
    /// The tour has a line that the demonstration has not printed.
    fn finish(self) -> Result<(), ExitError> {
        self.tour.map_or(Ok(()), |tour| split(tour, "").and_then(|(text, _)| print_fitted(text)))
    }
}

/// Splits a tour at the next line of the demonstration: the text before it, and the rest. At the end the line is empty. A tour
/// has `    ...` for lines that it does not explain again.
///
/// # Errors
/// The tour has another line there.
fn split<'a>(tour: &'a str, line: &str) -> Result<(&'a str, &'a str), ExitError> {
    let after_omitted = tour.strip_prefix("    ...\n");
    let next = after_omitted.unwrap_or(tour);
    let is_pattern = |text: &&str| text.starts_with("    ") || text.starts_with("# ");
    let pattern = next.lines().find(is_pattern).unwrap_or_default();
    let at_pattern = next.split_once(&format!("{pattern}\n")).filter(|_| !pattern.is_empty());
    let (text, rest) = at_pattern.unwrap_or((next, ""));
    match after_omitted {
        _ if matches(pattern, line) => Ok((text, rest)),
        Some(_) if !line.is_empty() => Ok(("", tour)),
        _ => Err(ExitError::new(Sysexit::OsError, format!("doc/tour.md has {pattern:?} in place of {line:?}"))),
    }
}

/// Whether a line is that of the tour, which may have one `...` for what is different in each run.
fn matches(pattern: &str, line: &str) -> bool {
    match pattern.split_once("...") {
        None => pattern == line,
        Some((begin, end)) => line.strip_prefix(begin).is_some_and(|rest| rest.ends_with(end)),
    }
}

/// Writes `provider.toml` and the files that it names.
fn write_provider_files(directory: &Path) -> Result<(), ExitError> {
    let made = tls::self_signed(&["localhost"]);
    let (certificate, key) = made.map_err(|error| ExitError::new(Sysexit::OsError, error))?;
    fs::create_dir(directory.join("customers.d"))?;
    let acme = "domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\nrelay = true\n";
    let config = "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n\
                  [tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n\
                  [inbound]\nlisten = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\n";
    write(&directory.join("relay.pem"), &certificate)?;
    write(&directory.join("relay.key"), &key)?;
    write(&directory.join("customers.d/acme.toml"), acme)?;
    write(&directory.join("customers.d/beta.toml"), "domains = [\"example.edu\"]\nsecret = \"another secret\"\n")?;
    Ok(write(&directory.join("provider.toml"), config)?)
}

/// Writes `customer.toml`. `odmr`: the provider's listener.
fn write_customer_file(directory: &Path, odmr: SocketAddr) -> io::Result<()> {
    let config = format!(
        "hostname = \"mail.example.org\"\n[provider]\naddress = \"localhost:{}\"\nca = \"relay.pem\"\n\
         name = \"acme\"\nsecret = \"tanstaaftanstaaf\"\n[mailboxes]\nroot = \"mail\"\naccept = [\"eva@example.org\"]\n\
         [outgoing]\nqueue = \"outgoing\"\n",
        odmr.port()
    );
    write(&directory.join("customer.toml"), &config)
}

/// Creates a file that only its owner may read: some of them contain secrets.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// Sends the first message by plain SMTP; the provider's log has the dialogue.
fn deliver(inbound: SocketAddr) -> io::Result<()> {
    let stream = TcpStream::connect(inbound)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let content = INBOUND_MESSAGE.replace("\n.", "\n..").replace('\n', "\r\n") + ".";
    let (mail, rcpt) = ("MAIL FROM:<lester@dot.foo.bar>", "RCPT TO:<eva@example.org>");
    let mut lines = ["EHLO dot.foo.bar", mail, rcpt, "DATA", &content, "QUIT"].into_iter();
    for reply in BufReader::new(&stream).lines() {
        let reply = reply?;
        if reply.starts_with(['4', '5']) {
            return Err(io::Error::other(reply));
        }
        // After a hyphen the reply goes on in the next line.
        if reply.get(3..4) != Some("-")
            && let Some(line) = lines.next()
        {
            (&stream).write_all(format!("{line}\r\n").as_bytes())?;
        }
    }
    lines.next().map_or(Ok(()), |_| Err(io::Error::other("the provider closed the connection")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The printed part of a tour for these lines; `None`: it does not fit them.
    fn explained(tour: &str, lines: &[&str]) -> Option<String> {
        let (mut rest, mut printed) = (tour, String::new());
        for line in lines.iter().copied().chain([""]) {
            let (text, after) = split(rest, line).ok()?;
            printed = format!("{printed}{text}{line}\n");
            rest = after;
        }
        Some(printed)
    }

    #[test]
    fn a_tour_explains_each_line_and_nothing_else() {
        let tour = "before\n# One\n    S: 250 OK, id=...\nwhy\n\n    C: EHLO a\n    ...\n    S: 250 LAST\nend\n";
        let printed =
            "before\n# One\n    S: 250 OK, id=1\nwhy\n\n    C: EHLO a\n    S: 250-A\n    S: 250 LAST\nend\n\n";
        let lines = ["# One", "    S: 250 OK, id=1", "    C: EHLO a", "    S: 250-A", "    S: 250 LAST"];
        assert_eq!(explained(tour, &lines).as_deref(), Some(printed));
        // A line too few at the end, one too few in between, one too many, and another.
        assert_eq!(explained(tour, &lines[..4]), None);
        assert_eq!(explained(tour, &[&lines[..1], &lines[2..]].concat()), None);
        assert_eq!(explained(tour, &[&lines[..], &["    C: QUIT"]].concat()), None);
        assert_eq!(explained(tour, &[&lines[..1], &["    S: 250 OK"], &lines[2..]].concat()), None);
    }
}
