//! `odmr status`: the mail that waits, by domain, with its age, and the results of the last calls. It only reads files.

use std::fmt::{Display, Write as _};
use std::path::Path;
use std::time::Duration;

use getopts::{Matches, Options};

use super::check_report::check_error;
use super::exit::{ExitError, Sysexit};
use super::json::Json;
use super::process::{config_path, print};
use crate::clock::{Clock, Timestamp};
use crate::config::{self, Config, CustomerConfig, ProviderAccount, ProviderConfig};
use crate::customer::status::{CustomerStatus, ProviderCalls};
use crate::ids::Ids;
use crate::mail::address::Domain;
use crate::maildir::shell_word;
use crate::net::tls;
use crate::net::trace::quoted;
use crate::plural::counted;
use crate::provider::status::{AccountStatus, DomainStatus, ProviderStatus};
use crate::queue::QueueSummary;
use crate::queue::retry::age;
use crate::report::calls::{CallRecord, CallResult, seconds};

const HINT: &str = "odmr status -h";

/// An account that has used this much of its quota needs a person.
const FULL_PERCENT: u64 = 90;

/// A certificate that ends sooner needs a person.
const CERTIFICATE_DAYS: i64 = 14;

/// Held mail that expires sooner needs a person.
const EXPIRY_NEAR: Duration = Duration::from_secs(24 * 60 * 60);

/// The options of `odmr status`.
pub(super) fn options(options: &mut Options) {
    let warn =
        "only what needs a person: mail or a failure older than AGE (such as 2d), mail set aside; then exit code 1";
    options.optopt("", "warn", warn, "AGE");
    options.optopt("", "format", "text (the default), json or prometheus", "FORMAT");
    options.optopt("", "by", "a line for each domain instead of each account: --by domain", "domain");
}

/// The options for the output.
struct Show {
    now: Timestamp,
    by_domain: bool,
    /// In seconds.
    warn: Option<u64>,
    format: Format,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
    Prometheus,
}

/// A finding that needs a person: its subject and its text.
struct Finding {
    about: String,
    text: String,
}

/// Prints the status of the file that `-c` names, of either side.
///
/// # Errors
///
/// An option is wrong; there is no such account or domain; a directory cannot be read; with `--warn`, there is something
/// that needs a person (code 1).
pub(super) fn run(matches: &Matches) -> Result<(), ExitError> {
    let wrong = |text: String| Err(ExitError::usage(text, HINT));
    let format = match matches.opt_str("format").as_deref() {
        None | Some("text") => Format::Text,
        Some("json") => Format::Json,
        Some("prometheus") => Format::Prometheus,
        Some(other) => return wrong(format!("--format is text, json or prometheus, not {other}")),
    };
    if let Some(other) = matches.opt_str("by").filter(|by| by != "domain") {
        return wrong(format!("--by is domain, not {other}"));
    }
    let warn = matches.opt_str("warn").map(|age| config::duration(&age)).transpose();
    let warn = warn.map_err(|text| ExitError::usage(format!("--warn: {text}"), HINT))?.map(|age| age.as_secs());
    if warn.is_some() && format == Format::Prometheus {
        return Err(ExitError::usage("--warn has no meaning with --format prometheus: let its rules warn", HINT));
    }
    let name = match matches.free.as_slice() {
        [] => None,
        [name] => Some(name.as_str()),
        [_, other, ..] => return wrong(format!("one account or domain, not {other:?} too")),
    };
    let show = Show { now: Clock::System.now(), by_domain: matches.opt_present("by"), warn, format };
    let path = config_path(matches);
    let (text, findings) = match Config::load(&path)? {
        Config::Provider(config) => provider(&config, &path, name, &show)?,
        Config::Customer(config) => customer(&config, &path, name, &show)?,
    };
    let Some(_) = warn else { return print(&text) };
    match format {
        Format::Json => print(&format!("{}\n", findings_json(&findings)))?,
        _ => findings.iter().try_for_each(|found| print(&format!("{}: {}\n", found.about, found.text)))?,
    }
    match findings.len() {
        0 => Ok(()),
        count => Err(check_error(counted(count, "finding needs a person", "findings need a person"))),
    }
}

fn unknown(path: &Path, name: &str, what: &str) -> ExitError {
    let text = format!("{name} is not an {what} here: `odmr status -c {}` shows all", shell_word(path));
    ExitError::new(Sysexit::DataError, text)
}

fn findings_json(findings: &[Finding]) -> Json {
    let finding =
        |found: &Finding| Json::Object(vec![("about", Json::text(&found.about)), ("text", Json::text(&found.text))]);
    Json::Object(vec![("warnings", Json::List(findings.iter().map(finding).collect()))])
}

/// The text and the findings for a provider.
fn provider(
    config: &ProviderConfig, path: &Path, name: Option<&str>, show: &Show,
) -> Result<(String, Vec<Finding>), ExitError> {
    let domain = name.and_then(Domain::parse).map(|domain| domain.to_string());
    let wanted = |account: Option<&str>, other: &str| match name {
        None => true,
        Some(name) => account == Some(name) || domain.as_deref().unwrap_or(name) == other,
    };
    let status = ProviderStatus::read(config, &Ids::system(tls::random), wanted)?;
    if let Some(name) = name
        && status.accounts.is_empty()
        && status.unowned.is_empty()
        && status.outgoing.is_empty()
        && name != "postmaster"
    {
        return Err(unknown(path, name, "account or domain with mail"));
    }
    let text = match show.format {
        Format::Text => provider_text(&status, show),
        Format::Json => format!("{}\n", provider_json(&status, &config.hostname, show)),
        Format::Prometheus => provider_metrics(&status, show).text(),
    };
    Ok((text, show.warn.map(|warn| provider_findings(&status, warn, show)).unwrap_or_default()))
}

/// The text and the findings for a customer.
fn customer(
    config: &CustomerConfig, path: &Path, name: Option<&str>, show: &Show,
) -> Result<(String, Vec<Finding>), ExitError> {
    if show.by_domain {
        let text = format!("--by domain is for a provider's file: see `odmr queue -c {} list`", shell_word(path));
        return Err(ExitError::usage(text, HINT));
    }
    let domain = name.and_then(Domain::parse);
    let wanted = |provider: &ProviderAccount| {
        let is_named = |name| [provider.remote.login_name(), &provider.remote.address].contains(&name);
        name.is_none_or(is_named) || domain.as_ref().is_some_and(|domain| provider.domains.contains(domain))
    };
    let status = CustomerStatus::read(config, &Ids::system(tls::random), wanted)?;
    if let Some(name) = name.filter(|_| status.providers.is_empty()) {
        return Err(unknown(path, name, "account, provider or domain"));
    }
    let text = match show.format {
        Format::Text => customer_text(&status, show),
        Format::Json => format!("{}\n", customer_json(&status, &config.hostname)),
        Format::Prometheus => customer_metrics(&status).text(),
    };
    Ok((text, show.warn.map(|warn| customer_findings(&status, warn, show.now)).unwrap_or_default()))
}

// Text

/// `3d4h`, `12m`, `5s`: two units at most.
pub(super) fn short_time(seconds: u64) -> String {
    let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let first = units.iter().position(|(unit, _)| seconds >= *unit).unwrap_or(3);
    let (unit, name) = units[first];
    let rest = units.get(first + 1).map(|(next, name)| (seconds % unit / next, name)).filter(|(rest, _)| *rest > 0);
    format!("{}{name}{}", seconds / unit, rest.map(|(rest, name)| format!("{rest}{name}")).unwrap_or_default())
}

impl Show {
    fn ago(&self, time: Timestamp) -> String {
        short_time(age(time, self.now).as_secs())
    }

    /// The mail that a customer has rejected, and that waits for a person; `None`: there is none.
    fn soft_bounced(&self, waiting: &QueueSummary) -> Option<String> {
        let (since, reply) = waiting.first_soft_bounce.as_ref()?;
        let (messages, since, reply) = (waiting.soft_bounced, self.ago(*since), shown(reply));
        Some(format!("{messages} rejected by its server, and deferred, since {since} ago: {reply}"))
    }

    /// `in 2h30m`, or `now`.
    fn until(&self, time: Timestamp) -> String {
        if time <= self.now { "now".to_owned() } else { format!("in {}", short_time(age(self.now, time).as_secs())) }
    }

    fn waiting(&self, text: &mut String, name: &str, waiting: &QueueSummary, what_else: &str) {
        let oldest = waiting.oldest.map_or("-".to_owned(), |oldest| self.ago(oldest));
        let QueueSummary { messages, bytes, in_doubt, deferred, set_aside, .. } = waiting;
        let line = format!(
            "{name:<28} {messages:>8} {bytes:>12} {oldest:>8} {deferred:>8} {in_doubt:>8} {set_aside:>9}  {what_else}"
        );
        let _ = writeln!(text, "{}", line.trim_end());
        for (reply, messages) in waiting.frequent_replies().into_iter().take(3) {
            let _ = writeln!(text, "    {messages} × {}", shown(reply));
        }
        if let Some(soft_bounced) = self.soft_bounced(waiting) {
            let _ = writeln!(text, "    {soft_bounced}");
        }
    }

    fn call(&self, call: &CallRecord) -> String {
        let counts: Vec<_> = call
            .counts
            .iter()
            .filter(|(key, count)| *count > 0 && key != "octets")
            .map(|(key, count)| format!("{count} {}", shown(key)))
            .collect();
        let has_reason = call.result == CallResult::Failed || !["", "done"].contains(&call.reason.as_str());
        let reason = if has_reason { format!(": {}", call.reason) } else { String::new() };
        let counts = if counts.is_empty() { String::new() } else { format!(", {}", counts.join(", ")) };
        format!("{} ago, {}, {}{}{counts}", self.ago(call.at), shown(&call.peer), call.result.word(), shown(&reason))
    }
}

/// A value from the wire or a file, for a terminal.
fn shown(text: &str) -> String {
    let text = quoted(text);
    if text == "-" { String::new() } else { text.trim_matches('"').to_owned() }
}

fn heading(text: &mut String, name: &str, what_else: &str) {
    let _ = writeln!(
        text,
        "{name:<28} {:>8} {:>12} {:>8} {:>8} {:>8} {:>9}  {what_else}",
        "messages", "bytes", "oldest", "deferred", "in doubt", "set aside"
    );
}

fn provider_text(status: &ProviderStatus, show: &Show) -> String {
    let unseen = "only root and the owner of the spool can see whether one runs";
    let serve = status.serve.map_or(unseen, |runs| if runs { "running" } else { "none" });
    let mut text = format!("serve: {serve}\n\n");
    heading(&mut text, if show.by_domain { "domain" } else { "account" }, "last call");
    for account in &status.accounts {
        let mut call = account.call.as_ref().map_or("never".to_owned(), |call| show.call(call));
        if let Some(next) = account.next_call {
            let _ = write!(call, "; next call permitted {}", show.until(next));
        }
        if let Some(expiry) = account.next_expiry.filter(|_| !show.by_domain) {
            call += &format!("; mail expires {}", show.until(expiry));
        }
        if show.by_domain {
            for DomainStatus { domain, waiting } in &account.domains {
                show.waiting(&mut text, domain, waiting, &format!("{}: {call}", account.name));
            }
        } else {
            show.waiting(&mut text, &account.name, &account.held, &call);
        }
        if let Some(learned @ 1..) = account.learned {
            let rejected = counted(learned, "recipient is rejected", "recipients are rejected");
            let them = if learned == 1 { "it" } else { "them" };
            let _ = writeln!(text, "    {rejected}: its server does not know {them}");
        }
        if account.quota_used().is_some() && account.is_whole {
            let _ = writeln!(text, "    quota: {}", quota_text(account));
        }
        match &account.recipients {
            None => {}
            Some(Ok(entries)) => drop(writeln!(text, "    recipients: {}", counted(*entries, "entry", "entries"))),
            Some(Err(error)) => drop(writeln!(text, "    recipients: {}", list_error(error))),
        }
    }
    for DomainStatus { domain, waiting } in &status.unowned {
        show.waiting(&mut text, domain, waiting, of_no_account(status));
    }
    if !status.postmaster.is_empty() {
        show.waiting(&mut text, "postmaster", &status.postmaster, "the provider's own");
    }
    if !status.outgoing.is_empty() {
        text.push('\n');
        heading(&mut text, "outgoing to", "next attempt");
        for DomainStatus { domain, waiting } in &status.outgoing {
            let next = waiting.next_attempt.map_or("-".to_owned(), |next| show.until(next));
            show.waiting(&mut text, domain, waiting, &next);
        }
    }
    if let Some(until) = status.certificate_until {
        let _ = writeln!(text, "\ncertificate: until {}", until.rfc3339());
    }
    for (name, error) in &status.skipped {
        let _ = writeln!(text, "customer {}: skipped: {}", shown(name), shown(error));
    }
    reload_text(&mut text, status.reload.as_ref());
    text
}

/// The limits of an account.
fn quota_text(account: &AccountStatus) -> String {
    let held = &account.held;
    let bytes = account.quota_bytes.map(|limit| format!("{} of {}", held.bytes, counted(limit, "octet", "octets")));
    let messages =
        account.quota_messages.map(|limit| format!("{} of {}", held.messages, counted(limit, "message", "messages")));
    bytes.into_iter().chain(messages).collect::<Vec<_>>().join(", ")
}

/// Why a domain has no account.
fn of_no_account(status: &ProviderStatus) -> &'static str {
    if status.skipped.is_empty() { "of no account any more" } else { "of no account that can be read" }
}

fn reload_text(text: &mut String, reload: Option<&CallRecord>) {
    if let Some(reload) = reload.filter(|reload| reload.result == CallResult::Failed) {
        let _ = writeln!(text, "configuration: not read at {}: {}", reload.at.rfc3339(), shown(&reload.reason));
    }
}

fn customer_text(status: &CustomerStatus, show: &Show) -> String {
    let mut text = status.daemon.map_or("daemon: none\n".to_owned(), |pid| format!("daemon: process {pid}\n"));
    for ProviderCalls { address, account, last, next } in &status.providers {
        let last = last.as_ref().map_or("never".to_owned(), |call| show.call(call));
        let next = next.map(|next| format!("; next call {}", show.until(next))).unwrap_or_default();
        let _ = writeln!(text, "{address} as {account}: last call {last}{next}");
    }
    text.push('\n');
    heading(&mut text, "queue", "next attempt");
    let queues = status.outgoing.as_ref().map(|outgoing| ("outgoing", outgoing));
    for (name, waiting) in queues.into_iter().chain([("next hops", &status.next_hops)]) {
        let next = waiting.next_attempt.map_or("-".to_owned(), |next| show.until(next));
        show.waiting(&mut text, name, waiting, &next);
    }
    reload_text(&mut text, status.reload.as_ref());
    text
}

// JSON; doc/operating.md has the keys

fn waiting_json(waiting: &QueueSummary) -> Vec<(&'static str, Json)> {
    let reply = |(reply, messages): (&str, u64)| {
        Json::Object(vec![("reply", Json::text(reply)), ("messages", Json::Count(messages))])
    };
    vec![
        ("messages", Json::Count(waiting.messages)),
        ("bytes", Json::Count(waiting.bytes)),
        ("oldest", Json::time(waiting.oldest)),
        ("in_doubt", Json::Count(waiting.in_doubt)),
        ("deferred", Json::Count(waiting.deferred)),
        ("ended_sessions", Json::Count(waiting.ended_sessions)),
        ("soft_bounced", Json::Count(waiting.soft_bounced)),
        ("soft_bounced_since", Json::time(waiting.first_soft_bounce.as_ref().map(|(since, _)| *since))),
        ("soft_bounced_reply", waiting.first_soft_bounce.as_ref().map_or(Json::Null, |(_, reply)| Json::text(reply))),
        ("replies", Json::List(waiting.frequent_replies().into_iter().map(reply).collect())),
        ("set_aside", Json::Count(waiting.set_aside)),
        ("set_aside_bytes", Json::Count(waiting.set_aside_bytes)),
    ]
}

fn queue_json(waiting: &QueueSummary) -> Json {
    let mut members = waiting_json(waiting);
    members.push(("next_attempt", Json::time(waiting.next_attempt)));
    Json::Object(members)
}

fn call_json(call: Option<&CallRecord>) -> Json {
    let Some(call) = call else { return Json::Null };
    let count = |wanted: &str| call.counts.iter().find(|(key, _)| key == wanted).map_or(0, |(_, count)| *count);
    Json::Object(vec![
        ("at", Json::time(Some(call.at))),
        ("peer", Json::text(&call.peer)),
        ("result", Json::text(call.result.word())),
        ("reason", Json::text(&call.reason)),
        ("duration", Json::Number(seconds(call.duration))),
        ("last_success", Json::time(call.success)),
        ("calls", Json::Count(call.calls)),
        ("failed", Json::Count(call.failed)),
        ("sent", Json::Count(count("sent"))),
        ("received", Json::Count(count("received"))),
        ("deferred", Json::Count(count("deferred"))),
        ("rejected", Json::Count(count("rejected"))),
        ("in_doubt", Json::Count(count("in-doubt"))),
        ("bytes", Json::Count(count("octets"))),
    ])
}

fn reload_json(reload: Option<&CallRecord>) -> Json {
    let Some(reload) = reload else { return Json::Null };
    Json::Object(vec![
        ("at", Json::time(Some(reload.at))),
        ("result", Json::text(reload.result.word())),
        ("reason", Json::text(&reload.reason)),
    ])
}

fn domain_json(DomainStatus { domain, waiting }: &DomainStatus) -> Json {
    let mut members = vec![("domain", Json::text(domain))];
    members.extend(waiting_json(waiting));
    Json::Object(members)
}

fn provider_json(status: &ProviderStatus, hostname: &str, show: &Show) -> Json {
    let account = |account: &AccountStatus| {
        let mut members = vec![("account", Json::text(&account.name))];
        members.extend(waiting_json(&account.held));
        members.push(("next_expiry", Json::time(account.next_expiry)));
        members.push(("last_call", call_json(account.call.as_ref())));
        members.push(("next_call_permitted", Json::time(account.next_call)));
        members.push(("learned_recipients", account.learned.map_or(Json::Null, |count| Json::Count(count as u64))));
        let limits = [("quota_bytes", account.quota_bytes), ("quota_messages", account.quota_messages)];
        let limits = limits.into_iter().chain([("recipients", known_recipients(account))]);
        members.extend(limits.map(|(key, limit)| (key, limit.map_or(Json::Null, Json::Count))));
        if show.by_domain {
            members.push(("domains", Json::List(account.domains.iter().map(domain_json).collect())));
        }
        Json::Object(members)
    };
    let destination = |DomainStatus { domain, waiting }: &DomainStatus| {
        let mut members = vec![("destination", Json::text(domain))];
        members.extend(waiting_json(waiting));
        members.push(("next_attempt", Json::time(waiting.next_attempt)));
        Json::Object(members)
    };
    let skipped = |(name, error): &(String, String)| {
        Json::Object(vec![("account", Json::text(name)), ("error", Json::text(error))])
    };
    Json::Object(vec![
        ("role", Json::text("provider")),
        ("version", Json::text(env!("CARGO_PKG_VERSION"))),
        ("hostname", Json::text(hostname)),
        ("serve", status.serve.map_or(Json::Null, |serve| Json::Number(serve.to_string()))),
        ("accounts", Json::List(status.accounts.iter().map(account).collect())),
        ("unowned", Json::List(status.unowned.iter().map(domain_json).collect())),
        ("postmaster", Json::Object(waiting_json(&status.postmaster))),
        ("outgoing", Json::List(status.outgoing.iter().map(destination).collect())),
        ("certificate_until", Json::time(status.certificate_until)),
        ("skipped", Json::List(status.skipped.iter().map(skipped).collect())),
        ("reload", reload_json(status.reload.as_ref())),
    ])
}

fn customer_json(status: &CustomerStatus, hostname: &str) -> Json {
    let provider = |calls: &ProviderCalls| {
        Json::Object(vec![
            ("provider", Json::text(&calls.address)),
            ("account", Json::text(&calls.account)),
            ("last_call", call_json(calls.last.as_ref())),
            ("next_call", Json::time(calls.next)),
        ])
    };
    let daemon = status.daemon.and_then(|pid| u64::try_from(pid).ok());
    Json::Object(vec![
        ("role", Json::text("customer")),
        ("version", Json::text(env!("CARGO_PKG_VERSION"))),
        ("hostname", Json::text(hostname)),
        ("daemon", daemon.map_or(Json::Null, Json::Count)),
        ("providers", Json::List(status.providers.iter().map(provider).collect())),
        ("outgoing", status.outgoing.as_ref().map_or(Json::Null, queue_json)),
        ("next_hops", queue_json(&status.next_hops)),
        ("reload", reload_json(status.reload.as_ref())),
    ])
}

// Prometheus text

/// Metrics in the text format of Prometheus; those of one name are together.
#[derive(Default)]
struct Metrics(Vec<(String, String)>);

impl Metrics {
    fn text(self) -> String {
        self.0.into_iter().map(|(_, lines)| lines).collect()
    }

    fn add(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: &dyn Display) {
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        let head = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let line = format!("{name}{labels} {value}\n");
        match self.0.iter_mut().find(|(other, _)| other == name) {
            Some((_, lines)) => lines.push_str(&line),
            None => self.0.push((name.to_owned(), head + &line)),
        }
    }

    /// A time, if there is one.
    fn add_time(&mut self, name: &str, help: &str, labels: &[(&str, &str)], time: Option<Timestamp>) {
        if let Some(time) = time {
            self.add(name, help, labels, &time.seconds());
        }
    }

    /// `prefix`: `odmr_queue` for mail that is held, `odmr_outgoing` and so on for others.
    fn add_waiting(&mut self, prefix: &str, labels: &[(&str, &str)], waiting: &QueueSummary) {
        let name = |end: &str| format!("{prefix}_{end}");
        self.add(&name("messages"), "Messages that wait.", labels, &waiting.messages);
        self.add(&name("bytes"), "Size of the files of messages that wait.", labels, &waiting.bytes);
        self.add(&name("in_doubt_messages"), "Messages that may have been sent.", labels, &waiting.in_doubt);
        self.add(&name("deferred_messages"), "Messages that were offered and stayed.", labels, &waiting.deferred);
        let soft_bounced = &waiting.soft_bounced;
        self.add(&name("soft_bounced_messages"), "Messages that were rejected, and stayed.", labels, soft_bounced);
        let help = "Rejected messages whose sender gets no DSN.";
        self.add(&name("set_aside_messages"), help, labels, &waiting.set_aside);
        self.add_time(&name("oldest_timestamp_seconds"), "Arrival of the oldest message.", labels, waiting.oldest);
        let next = waiting.next_attempt;
        self.add_time(&name("next_attempt_timestamp_seconds"), "When the next attempt is due.", labels, next);
    }

    fn add_call(&mut self, labels: &[(&str, &str)], call: Option<&CallRecord>) {
        let Some(call) = call else { return };
        self.add_time("odmr_last_call_timestamp_seconds", "End of the last call.", labels, Some(call.at));
        let help = "End of the last call that did not fail.";
        self.add_time("odmr_last_success_timestamp_seconds", help, labels, call.success);
        let successful = u8::from(call.result != CallResult::Failed);
        self.add("odmr_last_call_successful", "Whether the last call did not fail.", labels, &successful);
        self.add("odmr_last_call_duration_seconds", "Duration of the last call.", labels, &seconds(call.duration));
        self.add("odmr_calls_total", "Calls since the record was made.", labels, &call.calls);
        self.add("odmr_calls_failed_total", "Calls that have failed since then.", labels, &call.failed);
    }

    fn add_program(&mut self, role: &str, reload: Option<&CallRecord>) {
        let labels = [("version", env!("CARGO_PKG_VERSION")), ("role", role)];
        self.add("odmr_build_info", "The program.", &labels, &1);
        if let Some(reload) = reload {
            let successful = u8::from(reload.result != CallResult::Failed);
            self.add("odmr_config_last_reload_successful", "Whether the configuration was read.", &[], &successful);
            self.add_time("odmr_config_last_reload_timestamp_seconds", "When it was read.", &[], Some(reload.at));
        }
    }
}

fn provider_metrics(status: &ProviderStatus, show: &Show) -> Metrics {
    let mut metrics = Metrics::default();
    metrics.add_program("provider", status.reload.as_ref());
    if let Some(serve) = status.serve {
        metrics.add("odmr_serve_running", "Whether `odmr serve` runs.", &[], &u8::from(serve));
    }
    for account in &status.accounts {
        let name = ("account", account.name.as_str());
        if show.by_domain {
            for DomainStatus { domain, waiting } in &account.domains {
                metrics.add_waiting("odmr_queue", &[name, ("domain", domain)], waiting);
            }
        } else {
            metrics.add_waiting("odmr_queue", &[name], &account.held);
        }
        let help = "When the oldest message expires.";
        metrics.add_time("odmr_queue_next_expiry_timestamp_seconds", help, &[name], account.next_expiry);
        metrics.add_call(&[name], account.call.as_ref());
        let help = "When the next call is permitted (min-interval).";
        metrics.add_time("odmr_next_call_permitted_timestamp_seconds", help, &[name], account.next_call);
        if let Some(learned) = account.learned {
            let help = "Recipients that are rejected because the customer's server does not know them.";
            metrics.add("odmr_learned_recipients", help, &[name], &learned);
        }
        for (metric, help, limit) in [
            ("odmr_quota_bytes", "Size of files that may be held.", account.quota_bytes),
            ("odmr_quota_messages", "Messages that may be held.", account.quota_messages),
            ("odmr_known_recipients", "Recipients that the customer has named.", known_recipients(account)),
        ] {
            limit.iter().for_each(|limit| metrics.add(metric, help, &[name], limit));
        }
    }
    // The number of destinations has no limit, so they are labels only with `--by domain`.
    for (prefix, label, list) in [("unowned", "domain", &status.unowned), ("outgoing", "destination", &status.outgoing)]
    {
        let prefix = format!("odmr_{prefix}");
        let mut all = QueueSummary::default();
        for DomainStatus { domain, waiting } in list {
            all.add(waiting);
            if show.by_domain {
                metrics.add_waiting(&prefix, &[(label, domain)], waiting);
            }
        }
        if !show.by_domain {
            metrics.add_waiting(&prefix, &[], &all);
        }
    }
    metrics.add_waiting("odmr_postmaster", &[], &status.postmaster);
    let skipped = status.skipped.len();
    metrics.add("odmr_config_skipped_customers", "Customers' files with mistakes.", &[], &skipped);
    let help = "End of the certificate's validity.";
    metrics.add_time("odmr_certificate_expiry_timestamp_seconds", help, &[], status.certificate_until);
    metrics
}

fn customer_metrics(status: &CustomerStatus) -> Metrics {
    let mut metrics = Metrics::default();
    metrics.add_program("customer", status.reload.as_ref());
    metrics.add("odmr_daemon_running", "Whether the daemon runs.", &[], &u8::from(status.daemon.is_some()));
    for calls in &status.providers {
        let labels = [("provider", calls.address.as_str()), ("account", calls.account.as_str())];
        metrics.add_call(&labels, calls.last.as_ref());
        metrics.add_time("odmr_next_call_timestamp_seconds", "When the daemon calls next.", &labels, calls.next);
    }
    if let Some(outgoing) = &status.outgoing {
        metrics.add_waiting("odmr_outgoing", &[], outgoing);
    }
    metrics.add_waiting("odmr_next_hops", &[], &status.next_hops);
    metrics
}

// What needs a person

/// The findings about a queue; `warn`: seconds that mail may wait.
fn queue_findings(about: &str, waiting: &QueueSummary, warn: u64, now: Timestamp) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |text: String| findings.push(Finding { about: about.to_owned(), text });
    let oldest = waiting.oldest.map(|oldest| age(oldest, now).as_secs()).filter(|age| *age >= warn);
    if let Some(oldest) = oldest {
        let reply = waiting.frequent_replies().first().map(|(reply, _)| format!("; last reply: {}", shown(reply)));
        let (wait, age) = (counted(waiting.messages, "message waits", "messages wait"), short_time(oldest));
        add(format!("{wait}, the oldest for {age}{}", reply.unwrap_or_default()));
    }
    if waiting.in_doubt > 0 && oldest.is_some() {
        let in_doubt = counted(waiting.in_doubt, "message is in doubt: it", "messages are in doubt: they");
        add(format!("{in_doubt} may have been sent"));
    }
    if waiting.ended_sessions > 0 && oldest.is_some() {
        add(counted(waiting.ended_sessions, "message has ended sessions", "messages have ended sessions"));
    }
    if waiting.set_aside > 0 {
        let rejected = counted(waiting.set_aside, "message was rejected", "messages were rejected");
        let are = if waiting.set_aside == 1 { "it is" } else { "they are" };
        add(format!("{rejected} and the sender gets no DSN: {are} in .refused"));
    }
    findings
}

/// The finding that calls fail, if none has succeeded for `warn` seconds.
fn call_finding(about: &str, call: Option<&CallRecord>, warn: u64, now: Timestamp) -> Option<Finding> {
    let call = call.filter(|call| call.result == CallResult::Failed)?;
    let failing = call.success.is_none_or(|success| age(success, now).as_secs() >= warn);
    let since = call.success.map_or("no call has succeeded yet".to_owned(), |success| {
        format!("no call has succeeded for {}", short_time(age(success, now).as_secs()))
    });
    failing.then(|| Finding { about: about.to_owned(), text: format!("{since}: {}", shown(&call.reason)) })
}

fn reload_finding(reload: Option<&CallRecord>) -> Option<Finding> {
    let reload = reload.filter(|reload| reload.result == CallResult::Failed)?;
    let text =
        format!("it was not read at {}, the old one is in effect: {}", reload.at.rfc3339(), shown(&reload.reason));
    Some(Finding { about: "configuration".to_owned(), text })
}

/// Mail that expires within a day, or within half of the time that it may wait.
fn expiry_finding(account: &AccountStatus, now: Timestamp) -> Option<Finding> {
    let left = age(now, account.next_expiry?);
    let soon = account.expire_after.is_some_and(|time| left < EXPIRY_NEAR.min(time / 2));
    let text = format!("held mail expires in {}, unless it is fetched before", short_time(left.as_secs()));
    soon.then(|| Finding { about: account.name.clone(), text })
}

fn provider_findings(status: &ProviderStatus, warn: u64, show: &Show) -> Vec<Finding> {
    let now = show.now;
    let mut findings = Vec::new();
    for account in &status.accounts {
        findings.extend(quota_finding(account));
        let wrong = account.recipients.as_ref().and_then(|recipients| recipients.as_ref().err());
        findings.extend(wrong.map(|error| Finding { about: account.name.clone(), text: list_error(error) }));
        findings.extend(queue_findings(&account.name, &account.held, warn, now));
        let soft_bounced = show.soft_bounced(&account.held);
        findings.extend(soft_bounced.map(|text| Finding { about: account.name.clone(), text }));
        findings.extend(call_finding(&account.name, account.call.as_ref(), warn, now));
        findings.extend(expiry_finding(account, now));
    }
    for DomainStatus { domain, waiting } in &status.unowned {
        let held = counted(waiting.messages, "message is held", "messages are held");
        let text = format!("{held} for it; it is {}", of_no_account(status));
        findings.push(Finding { about: domain.clone(), text });
    }
    findings.extend(queue_findings("postmaster", &status.postmaster, warn, now));
    for DomainStatus { domain, waiting } in &status.outgoing {
        findings.extend(queue_findings(&format!("outgoing to {domain}"), waiting, warn, now));
    }
    if let Some(until) = status.certificate_until
        && until.seconds() - now.seconds() < CERTIFICATE_DAYS * 86_400
    {
        let text = format!("it is valid until {}: renew it", until.rfc3339());
        findings.push(Finding { about: "certificate".to_owned(), text });
    }
    let skipped = status.skipped.iter().map(|(name, error)| (format!("customer {}", shown(name)), shown(error)));
    findings.extend(skipped.map(|(about, error)| Finding { about, text: format!("skipped: {error}") }));
    findings.extend(reload_finding(status.reload.as_ref()));
    findings
}

/// How many recipients an account has named, in a list that can be used.
fn known_recipients(account: &AccountStatus) -> Option<u64> {
    account.recipients.as_ref().and_then(|recipients| recipients.as_ref().ok().copied())
}

fn list_error(error: &str) -> String {
    format!("its list of recipients cannot be used: {}", shown(error))
}

/// An account has used nearly all of its quota.
fn quota_finding(account: &AccountStatus) -> Option<Finding> {
    let used = account.quota_used().filter(|used| account.is_whole && *used >= FULL_PERCENT)?;
    let text = format!("{used} % of its quota is used up: {}", quota_text(account));
    Some(Finding { about: account.name.clone(), text })
}

fn customer_findings(status: &CustomerStatus, warn: u64, now: Timestamp) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ProviderCalls { address, account, last, .. } in &status.providers {
        let about = format!("{address} as {account}");
        findings.extend(call_finding(&about, last.as_ref(), warn, now));
        if let Some(last) = last.as_ref().filter(|last| age(last.at, now).as_secs() >= warn) {
            findings.push(Finding { about, text: format!("the last call was at {}", last.at.rfc3339()) });
        }
    }
    if let Some(outgoing) = &status.outgoing {
        findings.extend(queue_findings("outgoing", outgoing, warn, now));
    }
    findings.extend(queue_findings("next hops", &status.next_hops, warn, now));
    findings.extend(reload_finding(status.reload.as_ref()));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (61, "1m1s"),
            (7200, "2h"),
            (9000, "2h30m"),
            (90_000, "1d1h"),
            (86_460, "1d"),
        ] {
            assert_eq!(short_time(seconds), text);
        }
    }
}
