//! `odmr demo`: a provider and a customer on loopback, in a temporary directory, and their dialogue.
//!
//! The provider holds one message for the customer, and another waits in the customer's outgoing queue. In one call the
//! customer sends its message to the provider and, after the turn, receives the other. Only the certificate and the two
//! messages are made for the demonstration; listeners, configuration files, queues, turn and Maildirs are those of
//! `serve`, `send` and `pull`.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::{LevelFilter, Log, Metadata, Record};

use crate::config;
use crate::customer;
use crate::customer::sendmail::{self, SendmailOptions};
use crate::ids::Ids;
use crate::maildir::Maildir;
use crate::net::cancel::CancelToken;
use crate::net::tls;
use crate::provider::Provider;

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
Subject: going up

This message waited for the call, and went up before the line was turned.
";

/// Runs the demonstration and prints it.
///
/// # Errors
///
/// The text of the first error; the temporary directory is removed in any case.
pub(super) fn run() -> Result<(), String> {
    let directory = TemporaryDirectory::new().map_err(|error| error.to_string())?;
    play(&directory.0).map_err(|error| error.to_string())
}

fn play(directory: &Path) -> Result<(), Box<dyn std::error::Error>> {
    static PRINTER: Printer = Printer;
    if log::set_logger(&PRINTER).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
    let ids = Ids::system(tls::random);
    title("A provider for example.org, with a certificate made just now")?;
    let running = Provider::start(config::ProviderConfig::load(&provider_files(directory)?)?, ids.clone())?;
    let (Some(inbound), Some(odmr)) = (running.inbound().first(), running.odmr().first()) else {
        return Err("the provider has no listener".into());
    };
    println!("    inbound on {inbound}, on-demand mail relay on {odmr}");

    title("The world delivers a message; C is the sender's server, S the provider's")?;
    deliver(*inbound)?;
    let held = Maildir::new(directory.join("spool/domains/example.org"));
    title("It is held, in a plain Maildir, until the customer calls")?;
    for entry in held.entries()? {
        println!("    example.org/new/{}", entry.name);
    }

    let config = config::CustomerConfig::load(&customer_file(directory, *odmr)?)?;
    title("On the customer's side somebody has typed: sendmail -t -f eva -F Eva; that message waits too")?;
    let (sender, full_name) = (Some("eva".to_owned()), Some("Eva".to_owned()));
    let options = SendmailOptions { recipients_from_header: true, sender, full_name, ..SendmailOptions::default() };
    sendmail::send(&config, &ids, &options, &mut OUTGOING_MESSAGE.as_bytes()).map_err(|error| error.text)?;
    show(&Maildir::new(directory.join("outgoing")))?;

    title("The customer calls; C is the customer, P the provider; they keep their names over the turn")?;
    let summary = customer::pull(&config, &ids, &CancelToken::new()?)?;
    title("What came down is in the customer's Maildir")?;
    show(&Maildir::new(directory.join("mail/example.org/eva")))?;
    title("What went up is held for example.edu; mail for the rest of the world would go to its MX")?;
    show(&Maildir::new(directory.join("spool/domains/example.edu")))?;
    title(&format!("{summary}; held for example.org now: {}", held.entries()?.len()))?;
    running.stop();
    Ok(())
}

/// Prints the messages of a Maildir.
fn show(maildir: &Maildir) -> io::Result<()> {
    for entry in maildir.entries()? {
        for line in fs::read_to_string(maildir.file(&entry))?.lines() {
            println!("    {line}");
        }
    }
    Ok(())
}

fn title(text: &str) -> io::Result<()> {
    writeln!(io::stdout(), "\n# {text}")
}

fn provider_files(directory: &Path) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let (certificate, key) = tls::self_signed(&["localhost"])?;
    write(&directory.join("relay.pem"), &certificate)?;
    write(&directory.join("relay.key"), &key)?;
    fs::create_dir(directory.join("customers.d"))?;
    write(
        &directory.join("customers.d/acme.toml"),
        "domains = [\"example.org\"]\nsecret = \"tanstaaftanstaaf\"\nrelay = true\n",
    )?;
    write(&directory.join("customers.d/beta.toml"), "domains = [\"example.edu\"]\nsecret = \"another secret\"\n")?;
    let file = directory.join("provider.toml");
    write(
        &file,
        "hostname = \"relay.example.net\"\nspool = \"spool\"\ncustomers = \"customers.d\"\n\
         [tls]\ncertificate = \"relay.pem\"\nkey = \"relay.key\"\n\
         [inbound]\nlisten = [\"127.0.0.1:0\"]\n[odmr]\nlisten = [\"127.0.0.1:0\"]\n",
    )?;
    Ok(file)
}

fn customer_file(directory: &Path, odmr: SocketAddr) -> io::Result<PathBuf> {
    let file = directory.join("customer.toml");
    let text = format!(
        "hostname = \"mail.example.org\"\n[provider]\naddress = \"localhost:{}\"\nca = \"relay.pem\"\n\
         name = \"acme\"\nsecret = \"tanstaaftanstaaf\"\n[mailboxes]\nroot = \"mail\"\naccept = [\"@example.org\"]\n\
         [outgoing]\nqueue = \"outgoing\"\n",
        odmr.port()
    );
    write(&file, &text)?;
    Ok(file)
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
    let mut replies = BufReader::new(stream.try_clone()?);
    let content = INBOUND_MESSAGE.replace("\n.", "\n..").replace('\n', "\r\n") + ".";
    let lines = [
        "",
        "EHLO dot.foo.bar",
        "MAIL FROM:<lester@dot.foo.bar>",
        "RCPT TO:<eva@example.org>",
        "DATA",
        &content,
        "QUIT",
    ];
    for line in lines {
        if !line.is_empty() {
            (&stream).write_all(format!("{line}\r\n").as_bytes())?;
        }
        let mut reply = String::new();
        while reply.get(3..4) != Some(" ") {
            reply.clear();
            if replies.read_line(&mut reply)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the provider closed the connection"));
            }
        }
        if reply.starts_with(['4', '5']) {
            return Err(io::Error::other(reply));
        }
    }
    Ok(())
}

/// A logger that prints the provider's side of each dialogue, without the session id.
struct Printer;

impl Log for Printer {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "dialogue"
    }

    fn log(&self, record: &Record<'_>) {
        let line = record.args().to_string();
        // The customer logs the same dialogue again, with the session id `pull`.
        if self.enabled(record.metadata())
            && let Some((session, line)) = line.split_once("] ")
            && session != "[pull"
        {
            let _ = writeln!(io::stdout(), "    {line}");
        }
    }

    fn flush(&self) {}
}

/// A directory that is removed when it is dropped.
struct TemporaryDirectory(PathBuf);

impl TemporaryDirectory {
    fn new() -> io::Result<TemporaryDirectory> {
        let mut name = [0; 8];
        tls::random(&mut name);
        let directory = std::env::temp_dir().join(format!("odmr-demo-{:016x}", u64::from_be_bytes(name)));
        fs::DirBuilder::new().create(&directory)?;
        Ok(TemporaryDirectory(directory))
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
