//! `odmr demo`: a provider and a customer on loopback, in a temporary directory, and their dialogue.
//!
//! The provider holds one message for the customer, and another waits in the customer's outgoing queue. In one call the
//! customer sends its message to the provider and, after the turn, receives the other. Only the certificate and the two
//! messages are made for the demonstration; the rest is what `serve`, `send` and `pull` do.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use env_logger::Target;
use log::LevelFilter;

use super::exit::{ExitError, Sysexit};
use super::process::print;
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

/// Runs the demonstration and prints it; removes the temporary directory also after an error.
pub(super) fn run() -> Result<(), ExitError> {
    let ids = Ids::system(tls::random);
    let directory = std::env::temp_dir().join(format!("odmr-demo-{:016x}", ids.random_number()));
    fs::create_dir(&directory)?;
    let played = play(&directory, &ids);
    let _ = fs::remove_dir_all(&directory);
    played
}

fn play(directory: &Path, ids: &Ids) -> Result<(), ExitError> {
    print_dialogue();
    title("A provider for example.org, with a certificate made just now")?;
    write_provider_files(directory)?;
    let running = Provider::start(ProviderConfig::load(&directory.join("provider.toml"))?, ids.clone())?;
    let (Some(inbound), Some(odmr)) = (running.address(Listener::Inbound), running.address(Listener::Odmr)) else {
        return Err(ExitError::new(Sysexit::OsError, "the provider has no listener"));
    };
    print(&format!("    inbound on {inbound}, on-demand mail relay on {odmr}\n"))?;

    title("The world delivers a message; C is the sender's server, S the provider's")?;
    deliver(inbound)?;
    let held = Maildir::new(directory.join("spool/domains/example.org"));
    title("It is held, in a plain Maildir, until the customer calls")?;
    for entry in held.entries()? {
        print(&format!("    example.org/new/{}\n", entry.name.display()))?;
    }

    write_customer_file(directory, odmr)?;
    let config = CustomerConfig::load(&directory.join("customer.toml"))?;
    title("A user of the customer has typed: sendmail -t -f eva -F Eva; that message waits too")?;
    let (sender, full_name) = (Some("eva".to_owned()), Some("Eva".to_owned()));
    let options = SendmailOptions { recipients_from_header: true, sender, full_name, ..SendmailOptions::default() };
    sendmail::send(&config, ids, &options, SubmissionRoute::Queue, &mut OUTGOING_MESSAGE.as_bytes())?;
    show(&directory.join("outgoing"))?;

    title("The customer calls; C is the customer and P the provider, also after the turn")?;
    let summary = customer::pull(&config, ids, &CancelToken::new()?)?;
    title("The message that the customer has received is in its Maildir")?;
    show(&directory.join("mail/example.org/eva"))?;
    title("The message that it has sent is held for example.edu; mail for other domains would go to their MX")?;
    show(&directory.join("spool/domains/example.edu"))?;
    title(&format!("{summary}; held for example.org now: {}", held.entries()?.len()))?;
    running.stop();
    Ok(())
}

/// Prints the provider's side of each dialogue on stdout, without the session id.
fn print_dialogue() {
    let customer = thread::current().id();
    let mut log = env_logger::Builder::new();
    log.filter_module("dialogue", LevelFilter::Debug).target(Target::Stdout).format(move |out, record| {
        match record.args().to_string().split_once("] ") {
            // This thread is the customer, which logs the same lines.
            Some((_, line)) if thread::current().id() != customer => writeln!(out, "    {line}"),
            _ => Ok(()),
        }
    });
    // It fails only if this process has a logger already.
    let _ = log.try_init();
}

/// Prints the messages of a Maildir.
fn show(path: &Path) -> Result<(), ExitError> {
    let maildir = Maildir::new(path);
    for entry in maildir.entries()? {
        for line in fs::read_to_string(maildir.file(&entry))?.lines() {
            print(&format!("    {line}\n"))?;
        }
    }
    Ok(())
}

fn title(text: &str) -> Result<(), ExitError> {
    print(&format!("\n# {text}\n"))
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
