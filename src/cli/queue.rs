//! `odmr queue`: lists and shows messages that wait, and lets an administrator decide on them, even while a daemon
//! runs.
//!
//! Commands that only read need no lock. A command that changes a message locks its queue, as a session does; if a session
//! has the lock, the exit code is 75.

use std::borrow::Cow;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::mem;
use std::num::NonZero;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use getopts::Matches;

use super::exit::{ExitError, Sysexit};
use super::expire::reporter_beside_serve;
use super::help::suggestion;
use super::logging;
use super::owner::{become_customer_owner, become_spool_owner, check_not_root, owner_to_become};
use super::process::{config_path, raise_descriptor_limit, written};
use super::status::short_time;
use crate::clock::Timestamp;
use crate::config::{Config, CustomerConfig, ProviderConfig};
use crate::customer::mailboxes::Mailboxes;
use crate::customer::outbox::Outbox;
use crate::customer::store;
use crate::ids::Ids;
use crate::mail::address::{Domain, Mailbox, ReversePath};
use crate::maildir::{MessageWriter, shell_word};
use crate::net::descriptor::Waiting;
use crate::net::tls;
use crate::net::trace::{printable, quoted};
use crate::net::wake::WakeReason;
use crate::plural::counted;
use crate::provider::spool::{Spool, SpoolQueue};
use crate::queue::batch::{self, BatchEnvelope, BatchError, BatchReader};
use crate::queue::envelope::continues_envelope;
use crate::queue::retry::age;
use crate::queue::{ListedMessage, LockError, Queue, QueueLock, QueueName, QueuedEnvelope};
use crate::report::{Attempt, Reporter};
use crate::smtp::command::Recipient;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

pub(super) const SUMMARY: &str = include_str!("pages/queue.txt");

const HINT: &str = "odmr queue -h";

/// Queues that each thread lists before their lines are written.
const QUEUES_AT_ONCE: usize = 50;

/// How long to wait for a session that has the lock of a queue.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Octets of a header that `show` prints.
const HEADER_LIMIT: u64 = 64 << 10;

/// The queues of either side.
struct Queues {
    /// The directory of the spool or of the mailboxes.
    root: PathBuf,
    /// The configuration, as a word for a shell.
    file: String,
    ids: Ids,
    hostname: String,
    queue: Queue,
    /// With their names for administrators.
    names: Vec<(String, QueueName)>,
    reporter: Reporter,
    side: Side,
}

enum Side {
    Provider(Arc<Spool>),
    /// The queue that imported mail goes to; `None`: this customer sends no mail.
    Customer(Option<QueueName>),
}

/// A message, and where it is.
struct QueueItem<'a> {
    label: Cow<'a, str>,
    name: &'a QueueName,
    message: ListedMessage,
}

/// Runs the command that the arguments name.
///
/// # Errors
///
/// The command line is wrong (64); there is no such message (65); another session has its queue (75); the system's.
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let words: Vec<&str> = matches.free.iter().map(String::as_str).collect();
    let changes = match words[..] {
        ["list"] | ["list" | "show" | "export", _] | ["show", _, _] => false,
        ["remove" | "bounce" | "retry", _] | ["remove" | "bounce" | "retry", _, _] | ["import"] => true,
        _ => return Err(wrong_words(&words)),
    };
    logging::start_on_stderr(log::LevelFilter::Warn);
    // Each message of a shared directory has its own lock.
    raise_descriptor_limit();
    let path = config_path(matches);
    let queues = match Config::load(&path)? {
        Config::Provider(config) => Queues::of_provider(&config, &path, changes)?,
        Config::Customer(config) => Queues::of_customer(&config, &path, changes)?,
    };
    let mut out = QueueOutput { buffer: BufWriter::with_capacity(64 << 10, Waiting(io::stdout())), has_failed: false };
    let domain = words.get(2).copied();
    let done = match words[..] {
        ["show", id, ..] => queues.show(&mut out, id, domain),
        ["remove", id, ..] => queues.remove(&mut out, id, domain),
        ["bounce", what, ..] => queues.bounce(&mut out, what, domain),
        ["retry", what, ..] => queues.retry(&mut out, what, domain),
        ["export", domain] => queues.export(&mut out, domain),
        ["import"] => queues.import(&mut out),
        _ => queues.list(&mut out, words.get(1).copied()),
    };
    let printed = out.flush();
    match done {
        Err(Failure::Exit(error)) => Err(error),
        Err(Failure::Io(error)) if out.has_failed => written(Err(error)),
        Err(Failure::Io(error)) => Err(error.into()),
        Ok(()) => written(printed),
    }
}

/// Standard output. Large writes pass by the buffer, so that only this type knows afterwards that one of them has failed.
struct QueueOutput {
    buffer: BufWriter<Waiting<io::Stdout>>,
    has_failed: bool,
}

impl Write for QueueOutput {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.buffer.write(octets).inspect_err(|_| self.has_failed = true)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.buffer.flush()
    }
}

/// The error about a wrong command line.
fn wrong_words(words: &[&str]) -> ExitError {
    let text = match words {
        [] => "what to do is missing: list, show, remove, bounce, retry, export or import".to_owned(),
        ["list", ..] => "list needs no more than one account or domain".to_owned(),
        ["import", ..] => "import has no argument: it reads the messages from stdin".to_owned(),
        ["export", ..] => "export needs one domain".to_owned(),
        [word @ ("show" | "remove"), ..] => format!("{word} needs one id, or an id and a domain"),
        [word @ ("bounce" | "retry"), ..] => format!("{word} needs one id or domain, or an id and a domain"),
        [word, ..] => {
            let known = suggestion(word, ["list", "show", "remove", "bounce", "retry", "export", "import"]);
            format!("queue does not know {word:?}{known}")
        }
    };
    ExitError::usage(text, HINT)
}

enum Failure {
    Io(io::Error),
    Exit(ExitError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Io(error)
    }
}

fn failure<T>(code: Sysexit, text: impl ToString) -> Result<T, Failure> {
    Err(Failure::Exit(ExitError::new(code, text)))
}

impl Queues {
    fn of_provider(config: &ProviderConfig, path: &Path, changes: bool) -> Result<Queues, ExitError> {
        if changes {
            become_spool_owner(config)?;
        }
        let ids = Ids::system(tls::random);
        let spool = Arc::new(Spool::new(config, &ids));
        let names = spool.all_queues()?.into_iter().map(|(label, queue)| (label, spool.name(&queue))).collect();
        Ok(Queues {
            root: config.spool.clone(),
            file: shell_word(path),
            hostname: config.hostname.clone(),
            queue: spool.queue().clone(),
            names,
            reporter: reporter_beside_serve(config, &spool, &ids),
            side: Side::Provider(spool),
            ids,
        })
    }

    fn of_customer(config: &CustomerConfig, path: &Path, changes: bool) -> Result<Queues, ExitError> {
        if changes {
            check_not_root(config, path)?;
            become_customer_owner(config, owner_to_become(config.owner.as_ref())?.as_ref())?;
        }
        let ids = Ids::system(tls::random);
        let mailboxes = Arc::new(Mailboxes::new(config, &ids));
        let outgoing = config.outgoing.as_ref().map(|outgoing| store::outgoing_queue(&outgoing.queue));
        let reporter = match Outbox::new(&mailboxes) {
            Some(outbox) => outbox.retry_queue.reporter.clone(),
            None => Reporter::new(&config.hostname, &ids, None, &mailboxes.watch),
        };
        let names = outgoing.clone().map(|name| ("outgoing".to_owned(), name));
        let next_hops = ("next-hops".to_owned(), mailboxes.retry_queue());
        Ok(Queues {
            root: config.mailboxes.root.clone(),
            file: shell_word(path),
            hostname: config.hostname.clone(),
            queue: mailboxes.queue.clone(),
            names: names.into_iter().chain([next_hops]).collect(),
            reporter,
            side: Side::Customer(outgoing),
            ids,
        })
    }

    /// Shows each message of some domains: those of their queues, and those of queues for all domains with a recipient there.
    /// `None`: all messages.
    fn each<'a>(
        &'a self, domains: Option<&[Domain]>, show: &mut dyn FnMut(QueueItem<'a>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.each_of(&self.names, domains, show)
    }

    /// The same for some of the queues.
    fn each_of<'a>(
        &self, names: &'a [(String, QueueName)], domains: Option<&[Domain]>,
        show: &mut dyn FnMut(QueueItem<'a>) -> io::Result<()>,
    ) -> io::Result<()> {
        let has = |domain: Option<&Domain>| domains.is_none_or(|all| domain.is_some_and(|one| all.contains(one)));
        for (label, name) in names {
            let whole = has(name.domain.as_ref());
            if !whole && name.domain.is_some() {
                continue;
            }
            let wanted = |message: &ListedMessage| {
                let recipients = message.envelope.iter().flat_map(|queued| &queued.envelope.recipients);
                whole || recipients.into_iter().any(|recipient| has(recipient.mailbox.domain()))
            };
            self.queue.list(name, &mut |message| {
                if !wanted(&message) {
                    return Ok(());
                }
                show(QueueItem { label: label_of(label, name, &message), name, message })
            })?;
        }
        Ok(())
    }

    /// The messages of a domain, with an id. `None`: of all domains, or all.
    fn select(&self, id: Option<&str>, domain: Option<&str>) -> Result<Vec<QueueItem<'_>>, Failure> {
        let mut all = Vec::new();
        self.each(domain.map(domains_of).as_deref(), &mut |found| {
            if id.is_none_or(|id| found.message.is(id)) {
                all.push(found);
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// The messages with this id: one message has a file in each queue of its recipients. `domain`: only in its queue.
    fn find(&self, id: &str, domain: Option<&str>) -> Result<Vec<QueueItem<'_>>, Failure> {
        let (all, place) =
            (self.select(Some(id), domain)?, domain.map_or(String::new(), |domain| format!(" for {domain}")));
        let text =
            || format!("no message {id} waits here{place}: `odmr queue -c {} list` shows those that do", self.file);
        if all.is_empty() { failure(Sysexit::DataError, text()) } else { Ok(all) }
    }

    /// As [`Queues::find`] for a command that removes mail. A message to customers of several accounts has one id, and a
    /// decision for one of them must not remove the mail of another.
    fn find_of_one_account(&self, word: &str, id: &str, domain: Option<&str>) -> Result<Vec<QueueItem<'_>>, Failure> {
        let all = self.find(id, domain)?;
        let Side::Provider(spool) = &self.side else {
            let text = "a customer's message is to all its recipients: leave the domain out";
            return if domain.is_some() { failure(Sysexit::Usage, text) } else { Ok(all) };
        };
        let held = all.iter().filter(|found| !found.name.retries).filter_map(|found| found.name.domain.as_ref());
        let held: Vec<_> = held.map(|domain| (domain, spool.owner(domain))).collect();
        if held.iter().all(|(domain, owner)| held[0].0 == *domain || owner.is_some() && held[0].1 == *owner) {
            return Ok(all);
        }
        let names: Vec<_> =
            held.iter().map(|(at, owner)| format!("{at} ({})", owner.unwrap_or("of no account"))).collect();
        let (names, file, domain) = (names.join(" and "), &self.file, held[0].0);
        let text = format!(
            "{id} waits for several customers, in {names}, and nothing is changed: name the domain that is meant, such as \
             `odmr queue -c {file} {word} {id} {domain}`"
        );
        failure(Sysexit::DataError, text)
    }

    /// Locks the queues of these messages and, with `each`, the messages of a shared directory, all or none. Waits up to
    /// [`LOCK_WAIT`] for sessions that have one.
    fn lock(&self, found: &[QueueItem<'_>], each: bool) -> Result<QueueLock, Failure> {
        let begun = Instant::now();
        loop {
            let busy = match self.queue.lock(&names_of(found)) {
                Ok(lock) if !each => return Ok(lock),
                Ok(mut lock) => match found.iter().find_map(|found| lock_message(&mut lock, found)) {
                    None => return Ok(lock),
                    Some(Ok(busy)) => busy,
                    Some(Err(error)) => return Err(error.into()),
                },
                Err(LockError::Failed(error)) => return Err(error.into()),
                Err(LockError::Busy(name)) => {
                    let busy = found.iter().find(|found| *found.name == name);
                    busy.map_or_else(String::new, |found| found.label.to_string())
                }
            };
            if begun.elapsed() >= LOCK_WAIT {
                return failure(Sysexit::Temporary, format!("a session has the queue {busy}: try again later"));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Lists all messages, or those of a domain, of an account, or of a queue of another name.
    fn list(&self, out: &mut dyn Write, name: Option<&str>) -> Result<(), Failure> {
        let (mut domains, now, mut is_empty) = (name.map(domains_of), self.ids.clock().now(), true);
        let named = self.names.iter().position(|(label, queue)| Some(&**label) == name && queue.domain.is_none());
        let mut is_known = named.is_some() || domains.as_ref().is_none_or(|domains| !domains.is_empty());
        if let (Some(name), Some(domains), Side::Provider(spool), None) = (name, &mut domains, &self.side, named) {
            domains.extend_from_slice(spool.domains_of(name));
            is_known = domains.iter().any(|domain| self.is_known(domain));
        }
        let names = named.map_or(&self.names[..], |at| &self.names[at..=at]);
        let domains = domains.as_deref().filter(|_| named.is_none());
        let lines = |names: &[(String, QueueName)]| {
            let mut text = String::new();
            self.each_of(names, domains, &mut |found| {
                text += &line(&found, now);
                Ok(())
            })?;
            io::Result::Ok(text)
        };
        // Each file is opened, so the queues are divided between all processors.
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(8);
        for names in names.chunks(threads * QUEUES_AT_ONCE) {
            let share = names.len().div_ceil(threads);
            let parts = thread::scope(|scope| {
                let spawn = |part| thread::Builder::new().spawn_scoped(scope, move || lines(part));
                let parts = names.chunks(share).map(spawn).collect::<io::Result<Vec<_>>>()?;
                let panicked = |_| Err(io::Error::other("a thread has panicked"));
                let join = |part: ScopedJoinHandle<'_, _>| part.join().unwrap_or_else(panicked);
                parts.into_iter().map(join).collect::<io::Result<Vec<String>>>()
            })?;
            for part in parts {
                is_empty &= part.is_empty();
                out.write_all(part.as_bytes())?;
            }
        }
        match name.filter(|_| is_empty && !is_known) {
            None => Ok(()),
            Some(name) => self.unknown(name, "an account or domain"),
        }
    }

    /// The error about a word that names nothing with mail. `what`: what it should name.
    fn unknown<T>(&self, name: &str, what: &str) -> Result<T, Failure> {
        let text = format!("{name} is not {what} with mail here: `odmr queue -c {} list` shows all", self.file);
        failure(Sysexit::DataError, text)
    }

    /// Whether mail for this domain may come or wait here: a customer has it, or it has a queue.
    fn is_known(&self, domain: &Domain) -> bool {
        matches!(&self.side, Side::Provider(spool) if !spool.is_unowned(domain))
            || self.names.iter().any(|(label, _)| label == domain.as_str())
    }

    fn show(&self, out: &mut dyn Write, id: &str, domain: Option<&str>) -> Result<(), Failure> {
        for (number, found) in self.find(id, domain)?.iter().enumerate() {
            if number > 0 {
                writeln!(out)?;
            }
            show_message(out, found)?;
        }
        Ok(())
    }

    fn remove(&self, out: &mut dyn Write, id: &str, domain: Option<&str>) -> Result<(), Failure> {
        let all = self.find_of_one_account("remove", id, domain)?;
        let mut lock = self.lock(&all, true)?;
        for found in all {
            let removed = lock.remove(found.name, found.message.entry)?;
            let what = if removed { "removed" } else { "already removed" };
            writeln!(out, "{}: {what}, from {}", found.message.id, found.label)?;
        }
        Ok(())
    }

    fn bounce(&self, out: &mut dyn Write, what: &str, domain: Option<&str>) -> Result<(), Failure> {
        // A customer's message to that domain may have recipients elsewhere.
        let whole = domain.is_none() && matches!(self.side, Side::Provider(_));
        let all = if whole { self.select(None, Some(what))? } else { Vec::new() };
        let all = if all.is_empty() { self.find_of_one_account("bounce", what, domain)? } else { all };
        let mut lock = self.lock(&all, true)?;
        let mut stays = None;
        for QueueItem { label, name, message: ListedMessage { id, entry, .. } } in all {
            let Some(message) = lock.open_message(name, entry)? else {
                let show = format!("`odmr queue -c {} show {}`", self.file, shell_word(Path::new(&id)));
                writeln!(out, "{id}: not bounced: it no longer exists, or is not mail ({show}), in {label}")?;
                stays.get_or_insert((Sysexit::DataError, "remove what is not mail"));
                continue;
            };
            let has_sender = message.envelope.from != ReversePath::Null;
            let reply = Reply::new(554, "5.0.0", "Returned to its sender by an administrator");
            let recipients = message.envelope.recipients.len();
            let result = DeliveryResult::all(RecipientStatus::Rejected(reply), recipients, DecidedBy::Us);
            let settled = self.reporter.finish_attempt(message, result, &Attempt::by_administrator(), &mut lock)?;
            let done = match settled.recipients.iter().any(RecipientStatus::is_open) {
                true => "not bounced: the DSN cannot be stored",
                false if !has_sender && name.shared => "removed: it has no sender",
                false if !has_sender => "set aside: it has no sender",
                false if !self.reporter.can_report() => "set aside: this customer sends no mail, so no DSN",
                false => "bounced",
            };
            if done.starts_with("not") {
                stays = Some((Sysexit::Temporary, "it stays in its queue: try again later"));
            }
            writeln!(out, "{id}: {done}, from {label}")?;
        }
        self.wake();
        stays.map_or(Ok(()), |(code, text)| failure(code, text))
    }

    fn retry(&self, out: &mut dyn Write, what: &str, domain: Option<&str>) -> Result<(), Failure> {
        let all = if domain.is_none() { self.select(None, Some(what))? } else { Vec::new() };
        let all = if all.is_empty() { self.find(what, domain)? } else { all };
        let (mut lock, mut due) = (self.lock(&all, false)?, 0);
        for found in all.into_iter().filter(|found| found.message.envelope.is_ok()) {
            match lock.make_due(found.name, found.message.entry) {
                // A session is sending it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                made => due += usize::from(made?),
            }
        }
        writeln!(out, "{}", counted(due, "message is due", "messages are due"))?;
        self.wake();
        Ok(())
    }

    /// Wakes the running daemon, so that it reads its queues.
    fn wake(&self) {
        // If no daemon runs, the next one reads its queues at its start.
        let _ = WakeReason::Retry.send_surely(&self.root);
    }

    fn export(&self, out: &mut dyn Write, domain: &str) -> Result<(), Failure> {
        let domain =
            Domain::parse_any(domain).or_else(|_| failure(Sysexit::DataError, format!("{domain} is not a domain")))?;
        let (mut incomplete, mut is_empty) = (Vec::new(), true);
        self.each(Some(slice::from_ref(&domain)), &mut |QueueItem { name, message, .. }| {
            if mem::take(&mut is_empty) {
                batch::write_begin(out, &self.hostname)?;
            }
            if message.envelope.is_err() || !message.unread.is_empty() {
                incomplete.push(message.id.clone());
            }
            let Ok(queued) = &message.envelope else { return Ok(()) };
            let in_domain = |recipient: &&Recipient| recipient.mailbox.domain() == Some(&domain);
            let recipients: Vec<_> = queued.envelope.recipients.iter().filter(in_domain).cloned().collect();
            match message.open_content(name)? {
                Some(mut content) if !recipients.is_empty() => {
                    batch::write_message(out, &queued.with_recipients(recipients), &mut content)
                }
                _ => Ok(()),
            }
        })?;
        match is_empty {
            // An empty batch for a misspelt domain would pass for a copy of its mail.
            true if !self.is_known(&domain) => return self.unknown(domain.as_str(), "a domain"),
            true => batch::write_begin(out, &self.hostname)?,
            false => {}
        }
        batch::write_end(out)?;
        match incomplete.as_slice() {
            [] => Ok(()),
            ids => failure(Sysexit::DataError, format!("not exported, or without some recipients: {}", ids.join(" "))),
        }
    }

    fn import(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let mut reader = BatchReader::new(BufReader::new(Waiting(io::stdin())));
        let mut imported = 0;
        let done = loop {
            match self.import_message(&mut reader) {
                Ok(true) => imported += 1,
                Ok(false) => break Ok(()),
                Err(BatchError::Input(error)) if error.kind() != io::ErrorKind::InvalidInput => {
                    // The disk may be full: after that, the rest of the batch can be imported, from this message on.
                    break Err((Sysexit::of_system(error.kind()), reader.wrong(error.to_string())));
                }
                Err(BatchError::Input(error)) => break Err((Sysexit::DataError, reader.wrong(error.to_string()))),
                Err(error) => break Err((Sysexit::DataError, error)),
            }
        };
        writeln!(out, "{} imported", counted(imported, "message", "messages"))?;
        self.wake();
        match done {
            Ok(()) => Ok(()),
            Err((code, error)) => {
                let before = counted(imported, "message before is stored", "messages before are stored");
                failure(code, format!("{error}; the {before}, the rest is not"))
            }
        }
    }

    /// Stores the next message; false: there is none.
    fn import_message(&self, reader: &mut BatchReader<impl BufRead>) -> Result<bool, BatchError> {
        let Some(BatchEnvelope { id, arrived, envelope }) = reader.next_envelope()? else { return Ok(false) };
        let id = id.unwrap_or_else(|| self.ids.queue_id());
        let arrived = arrived.unwrap_or_else(|| self.ids.clock().now());
        let mut copies: Vec<(QueueName, QueuedEnvelope)> = Vec::new();
        for recipient in &envelope.recipients {
            let (mailbox, name) = self
                .place(&recipient.mailbox)
                .map_err(|text| reader.wrong(format!("<{}>: {text}", recipient.mailbox)))?;
            let recipient = Recipient { mailbox, ..recipient.clone() };
            match copies.iter_mut().find(|(other, _)| *other == name) {
                Some((_, copy)) => copy.envelope.recipients.push(recipient),
                None => {
                    let envelope = envelope.with_recipients(vec![recipient]);
                    copies.push((name, QueuedEnvelope { id: id.clone(), arrived, envelope }));
                }
            }
        }
        let first = reader.content()?;
        // The content is stored unchanged, unless its first line would be read as a part of the envelope.
        let head = match &first {
            Some(line) if continues_envelope(line) => {
                format!("Received: by {} (import) id {id}; {}\n", self.hostname, arrived.rfc5322())
            }
            _ => String::new(),
        };
        let mut writer: MessageWriter = self.queue.begin_message(&copies, &head)?;
        let mut next = first;
        while let Some(line) = next {
            writer.write(&line)?;
            next = reader.content()?;
        }
        writer.commit()?;
        Ok(true)
    }

    /// The queue for a recipient, and the recipient as its envelope has it.
    fn place(&self, mailbox: &Mailbox) -> Result<(Mailbox, QueueName), String> {
        match &self.side {
            Side::Provider(spool) => {
                let queue = spool.queue_for(mailbox).ok_or("mail for an address literal is not sent")?;
                if mailbox.domain().is_some_and(|domain| spool.may_be_skipped(domain)) {
                    return Err(format!(
                        "a customer's file has a mistake, and the domain may be that customer's: `odmr check -c {}` shows it",
                        self.file
                    ));
                }
                let held = matches!(queue, SpoolQueue::Held(_) | SpoolQueue::Postmaster);
                Ok((if held { mailbox.canonical() } else { mailbox.clone() }, spool.name(&queue)))
            }
            Side::Customer(outgoing) => {
                let name = outgoing.clone().ok_or("this customer sends no mail: it has no table [outgoing]")?;
                Ok((mailbox.clone(), name))
            }
        }
    }
}

/// The name of a message's queue for administrators: in a shared directory each domain has one.
fn label_of<'a>(label: &'a str, name: &QueueName, message: &ListedMessage) -> Cow<'a, str> {
    let recipients = message.envelope.iter().flat_map(|queued| &queued.envelope.recipients);
    let settled = message.settled.iter().filter_map(|(address, _)| Mailbox::parse(address));
    let mut mailboxes = recipients.map(|recipient| recipient.mailbox.clone()).chain(settled);
    match mailboxes.find_map(|mailbox| mailbox.domain().cloned()) {
        Some(domain) if name.shared => Cow::Owned(format!("{label}/{domain}")),
        _ => Cow::Borrowed(label),
    }
}

/// The queues of some messages, each once.
fn names_of(found: &[QueueItem<'_>]) -> Vec<QueueName> {
    // They were listed queue by queue.
    let mut names: Vec<_> = found.iter().map(|found| found.name).collect();
    names.dedup();
    names.into_iter().cloned().collect()
}

/// Locks a message of a shared directory. `Some`: a session has it, and this is its queue; or the system's error.
fn lock_message(lock: &mut QueueLock, found: &QueueItem<'_>) -> Option<io::Result<String>> {
    match lock.lock_message(found.name, &found.message.entry) {
        Ok(_) => None,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(Ok(found.label.to_string())),
        Err(error) => Some(Err(error)),
    }
}

/// The domain of a word, which may be the name of a queue; none: it is not a domain.
fn domains_of(word: &str) -> Vec<Domain> {
    Domain::parse_any(word.strip_prefix("outgoing/").unwrap_or(word)).into_iter().collect()
}

/// One line about a message.
fn line(QueueItem { label, message, .. }: &QueueItem<'_>, now: Timestamp) -> String {
    let age = short_time(age(message.arrived, now).as_secs());
    let mut line = format!("id={} queue={label} age={age} size={}", message.id, message.bytes);
    match &message.envelope {
        Err(reason) => line += &format!(" not-mail={}", quoted(reason)),
        Ok(queued) => {
            line += &format!(" from=<{}>", queued.envelope.from);
            for recipient in &queued.envelope.recipients {
                line += &format!(" to=<{}>", recipient.mailbox);
            }
        }
    }
    for (address, state) in &message.settled {
        line += &format!(" to=<{}>({state})", printable(address.as_bytes()));
    }
    for text in &message.unread {
        line += &format!(" to={}(unreadable)", quoted(text));
    }
    line += &format!(" attempts={}", message.record.attempts);
    line += if message.in_doubt { " in-doubt" } else { "" };
    if let Some(next) = message.next_attempt {
        line += &format!(" next={}", next.rfc3339());
    }
    if let Some(reply) = message.last_reply() {
        line += &format!(" reply={}", quoted(reply));
    }
    line.push('\n');
    line
}

/// The envelope, the history and the header of a message.
fn show_message(out: &mut dyn Write, QueueItem { label, name, message }: &QueueItem<'_>) -> io::Result<()> {
    let directory = name.path.join(if message.entry.seen { "cur" } else { "new" });
    writeln!(out, "id: {}\nqueue: {label}", message.id)?;
    writeln!(out, "file: {}", printable(directory.join(&message.entry.name).as_os_str().as_bytes()))?;
    writeln!(out, "arrived: {}\nsize: {}", message.arrived.rfc3339(), message.bytes)?;
    match &message.envelope {
        Err(reason) => writeln!(out, "not mail: {}", quoted(reason).trim_matches('"'))?,
        Ok(queued) => show_envelope(out, queued)?,
    }
    for (address, state) in &message.settled {
        writeln!(out, "to: <{}> {state}", printable(address.as_bytes()))?;
    }
    for text in &message.unread {
        writeln!(out, "to: {} unreadable", quoted(text))?;
    }
    let record = &message.record;
    let time = |time: Timestamp| time.rfc3339();
    let ended = record.ended.map(|ended| {
        let skips = counted(ended.skip, "call skips", "calls skip");
        format!("{}, the last one {}; {skips} it", ended.sessions, time(ended.at))
    });
    for (key, value) in [
        ("first seen", record.first_seen.map(time)),
        ("first offered", record.first_offered.map(time)),
        ("attempts", Some(record.attempts.to_string())),
        ("first rejected", record.first_rejected.map(time)),
        ("in doubt", message.in_doubt.then(|| "it may have been sent".to_owned())),
        ("sessions ended", ended),
        ("last reply", message.last_reply()),
        ("next attempt", message.next_attempt.map(time)),
    ] {
        if let Some(value) = value {
            writeln!(out, "{key}: {value}")?;
        }
    }
    writeln!(out)?;
    let Some(content) = message.open_content(name)? else { return Ok(()) };
    for line in BufReader::new(content.take(HEADER_LIMIT)).split(b'\n') {
        let line = line?;
        let line = line.strip_suffix(b"\r").unwrap_or(&line);
        if line.is_empty() {
            break;
        }
        // Control characters could change the terminal.
        let text = String::from_utf8_lossy(line);
        let plain: String = text.chars().map(|c| if c.is_control() && c != '\t' { '?' } else { c }).collect();
        writeln!(out, "{plain}")?;
    }
    Ok(())
}

fn show_envelope(out: &mut dyn Write, queued: &QueuedEnvelope) -> io::Result<()> {
    let envelope = &queued.envelope;
    writeln!(out, "from: <{}>{}", envelope.from, batch::mail_parameters(envelope, envelope.utf8))?;
    for recipient in &envelope.recipients {
        writeln!(out, "to: <{}> open{}", recipient.mailbox, batch::recipient_parameters(recipient))?;
    }
    Ok(())
}
