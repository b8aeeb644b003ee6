//! `odmr check --print`: a configuration with all defaults, in the form of its files, without secrets.
//!
//! Values that have a default are printed from the checked configuration, all others as they are written in the file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::limits::{limit_values, size_values, timeout_values};
use super::source::Source;
use super::{
    Account, Config, ConfigError, CustomerConfig, HeldConfig, KnownRecipients, OverQuota, ProviderAccount,
    ProviderConfig, TlsPolicy,
};
use crate::queue::retry::Retry;
use crate::schedule::{Schedule, When};
use crate::session::{Limits, RemoteSettings, Timeouts, TlsMode};
use crate::smtp::client::Without8BitMime;

/// Prints the configuration of a file, and of a provider the files of its customers.
///
/// # Errors
///
/// The first mistake in a file.
pub fn effective(path: &Path) -> Result<String, ConfigError> {
    match Config::load(path)? {
        Config::Provider(config) => {
            let mut text = Printer::open(path)?.provider(&config)?;
            let source = Source::read(path)?;
            let mut document = source.parse()?;
            let directory = document.remove("customers").and_then(|value| Some(value.get_ref().as_str()?.to_owned()));
            let directory = source.absolute(&PathBuf::from(directory.unwrap_or_default()));
            for account in config.accounts.iter() {
                text += "\n";
                text += &Printer::open(&directory.join(format!("{}.toml", account.name)))?.account(account)?;
            }
            Ok(text)
        }
        Config::Customer(config) => Printer::open(path)?.customer(&config),
    }
}

/// Prints the file of one customer at its provider in the same form.
///
/// # Errors
///
/// The file cannot be read.
pub fn effective_account(file: &Path, account: &Account) -> Result<String, ConfigError> {
    Printer::open(file)?.account(account)
}

/// Keys whose value is a path, or a list of them.
const PATHS: [&str; 9] =
    ["spool", "customers", "certificate", "key", "root", "queue", "ca", "secret-file", "alias-file"];

/// The keys of the trust in a host, and of the login there.
const LOGIN_KEYS: [&str; 7] = ["ca", "pin", "certificate", "key", "name", "secret", "secret-file"];

/// Prints one file.
struct Printer {
    source: Source,
    out: String,
}

impl Printer {
    fn open(path: &Path) -> Result<Printer, ConfigError> {
        Ok(Printer { source: Source::read(path)?, out: format!("# {}\n", path.display()) })
    }

    fn provider(mut self, config: &ProviderConfig) -> Result<String, ConfigError> {
        let source = Source::read(&self.source.file)?;
        let mut file = source.parse()?;
        self.written(&mut file, &["hostname", "user", "group", "spool", "customers"]);
        if let Some(mut tls) = self.table(&mut file, "tls") {
            self.written(&mut tls, &["certificate", "key"]);
        }
        self.head("inbound");
        self.list("listen", &config.inbound.listen);
        self.value("max-size", config.inbound.max_size);
        self.value("offer-dsn", config.inbound.offer_dsn);
        self.head("odmr");
        self.list("listen", &config.odmr.listen);
        self.list("listen-tls", &config.odmr.listen_tls);
        self.value("require-tls", config.odmr.require_tls);
        self.value("cram-md5", config.odmr.cram_md5);
        if let Some(give_up) = config.odmr.give_up {
            self.value("give-up", time(give_up));
        }
        self.value("without-8bitmime", eight_bit(config.odmr.without_8bitmime));
        let relay = &config.relay;
        let mut table = take_table(&mut file, "relay").unwrap_or_default();
        self.head("relay");
        self.written(&mut table, &["smarthost"]);
        relay.smarthost.iter().for_each(|host| self.remote(&mut table, "smarthost-tls", host));
        self.written(&mut table, &["tls-for", "resolver"]);
        let tls = match relay.tls {
            TlsPolicy::May => "\"may\"",
            TlsPolicy::Must => "\"must\"",
            TlsPolicy::Verify => "\"verify\"",
        };
        self.value("tls", tls);
        self.value("port", relay.port);
        self.value("allow-private", relay.allow_private);
        self.value("connections", relay.connections);
        self.value("connections-per-host", relay.connections_per_host);
        self.value("without-8bitmime", eight_bit(relay.without_8bitmime));
        self.value("retry-first", time(relay.retry.first));
        self.value("retry-max", time(relay.retry.max));
        self.give_up(&relay.retry);
        self.limits(&config.limits, &config.timeouts);
        Ok(self.out)
    }

    fn account(mut self, account: &Account) -> Result<String, ConfigError> {
        let source = Source::read(&self.source.file)?;
        let mut file = source.parse()?;
        self.written(&mut file, &["domains", "secret", "secret-file", "scram", "max-size", "delivered-to-prefix"]);
        if !account.certificates.is_empty() {
            self.list("certificate", &account.certificates);
        }
        self.list("mechanisms", &account.mechanisms);
        self.value("relay", account.relay);
        self.value("any-sender", account.any_sender);
        self.value("rate", account.rate);
        self.held(&account.held, &mut file);
        Ok(self.out)
    }

    /// `file`: the table of the file, for keys without a default of their own.
    fn held(&mut self, held: &HeldConfig, file: &mut DeTable<'_>) {
        let or_never = |limit: Option<Duration>| limit.map_or_else(|| "\"never\"".to_owned(), time);
        self.value("expire-after", or_never(held.expire_after));
        self.value("delay-warning", or_never(held.delay_warning));
        self.value("soft-bounce", time(held.soft_bounce));
        self.value("over-quota", if held.over_quota == OverQuota::Defer { "\"defer\"" } else { "\"reject\"" });
        self.value("min-interval", time(held.min_interval));
        self.written(
            file,
            &["max-bytes", "max-messages", "messages-per-turn", "octets-per-turn", "turn", "recipients-file"],
        );
        match held.recipients {
            KnownRecipients::Any => self.value("recipients", "\"any\""),
            _ => self.written(file, &["recipients"]),
        }
    }

    fn customer(mut self, config: &CustomerConfig) -> Result<String, ConfigError> {
        let source = Source::read(&self.source.file)?;
        let mut file = source.parse()?;
        self.written(&mut file, &["hostname", "user", "group"]);
        let common = take_table(&mut file, "schedule").unwrap_or_default();
        let tables = match file.remove("provider").map(|value| value.into_inner()) {
            Some(DeValue::Array(tables)) => tables.into_iter().map(|table| table.into_inner()).collect(),
            one => one.into_iter().collect::<Vec<_>>(),
        };
        for (table, provider) in tables.into_iter().zip(&config.providers) {
            let DeValue::Table(table) = table else { continue };
            self.provider_account(table, &common, provider);
        }
        let mailboxes = &config.mailboxes;
        let mut table = take_table(&mut file, "mailboxes").unwrap_or_default();
        self.head("mailboxes");
        self.written(&mut table, &["root", "accept", "except"]);
        match table.contains_key("catch-all") {
            true => self.written(&mut table, &["catch-all"]),
            false => self.value("catch-all", "\"postmaster\""),
        }
        self.written(&mut table, &["aliases", "alias-file", "domain-aliases"]);
        match table.contains_key("separator") {
            true => self.written(&mut table, &["separator"]),
            false => self.value("separator", "\"+\""),
        }
        self.written(&mut table, &["postmaster", "deliver"]);
        self.value("umask", format!("\"{:03o}\"", mailboxes.umask));
        self.value("max-size", mailboxes.max_size);
        self.value("without-8bitmime", eight_bit(mailboxes.without_8bitmime));
        if let (Some(outgoing), Some(mut table)) = (&config.outgoing, take_table(&mut file, "outgoing")) {
            self.head("outgoing");
            self.written(&mut table, &["queue", "submission"]);
            outgoing.submission.iter().for_each(|host| self.remote(&mut table, "submission-tls", host));
            self.list("listen", &outgoing.listen);
            self.list("networks", &outgoing.networks);
            // The default, that of the first mailbox, may lack a dot. Such a domain is not valid in a file.
            if outgoing.domain.as_str().contains('.') {
                self.value("domain", quote(outgoing.domain.as_str()));
            }
            self.give_up(&outgoing.retry);
            self.value("max-size", outgoing.max_size);
            self.value("without-8bitmime", eight_bit(outgoing.without_8bitmime));
        }
        self.limits(&config.limits, &config.timeouts);
        Ok(self.out)
    }

    /// `common`: `[schedule]`, for providers without their own.
    fn provider_account(&mut self, mut table: DeTable<'_>, common: &DeTable<'_>, provider: &ProviderAccount) {
        self.out += "\n[[provider]]\n";
        self.value("address", quote(&provider.remote.address));
        self.remote(&mut table, "tls", &provider.remote);
        self.list("domains", &provider.domains);
        self.value("outgoing", provider.outgoing);
        let own = take_table(&mut table, "schedule");
        self.out += "[provider.schedule]\n";
        self.schedule(own.as_ref().unwrap_or(common), &provider.schedule);
    }

    /// The TLS mode of a host, the trust in it, and the login there.
    fn remote(&mut self, table: &mut DeTable<'_>, tls_key: &str, remote: &RemoteSettings) {
        let tls = match remote.tls {
            TlsMode::StartTls => "\"starttls\"",
            TlsMode::Implicit => "\"implicit\"",
            TlsMode::None => "\"none\"",
        };
        self.value(tls_key, tls);
        self.written(table, &LOGIN_KEYS);
        remote.login.iter().for_each(|login| self.list("mechanisms", &login.mechanisms));
    }

    fn schedule(&mut self, table: &DeTable<'_>, schedule: &Schedule) {
        match schedule.when {
            When::Every(pause) => self.value("every", time(pause)),
            When::At(_) => {
                for key in ["at", "zone"] {
                    if let Some(value) = table.get(key) {
                        self.value(key, written(value.get_ref()));
                    }
                }
            }
        }
        let jitter = if schedule.jitter.is_zero() { "\"none\"".to_owned() } else { time(schedule.jitter) };
        self.value("jitter", jitter);
        self.value("retry-first", time(schedule.retry_first));
        self.value("retry-max", time(schedule.retry_max));
    }

    fn give_up(&mut self, retry: &Retry) {
        self.value("give-up", time(retry.give_up));
        self.value("delay-warning", retry.delay_warning.map_or_else(|| "\"never\"".to_owned(), time));
    }

    fn limits(&mut self, limits: &Limits, timeouts: &Timeouts) {
        self.head("limits");
        for (key, _, value) in limit_values(&mut limits.clone()) {
            self.value(key, *value);
        }
        for (key, value) in size_values(&mut limits.clone()) {
            self.value(key, *value);
        }
        self.head("timeouts");
        for (key, value) in timeout_values(&mut timeouts.clone()) {
            self.value(key, time(*value));
        }
    }

    fn head(&mut self, table: &str) {
        self.out += &format!("\n[{table}]\n");
    }

    /// Removes a table from the file and prints its head; `None`: the file has no such table.
    fn table<'s>(&mut self, file: &mut DeTable<'s>, name: &str) -> Option<DeTable<'s>> {
        let table = take_table(file, name)?;
        self.head(name);
        Some(table)
    }

    fn value(&mut self, key: &str, value: impl ToString) {
        self.out += &format!("{key} = {}\n", value.to_string());
    }

    fn list(&mut self, key: &str, values: &[impl ToString]) {
        let values: Vec<_> = values.iter().map(|value| quote(value.to_string())).collect();
        self.value(key, format!("[{}]", values.join(", ")));
    }

    /// Prints the values of these keys as in the file, with absolute paths and without secrets.
    fn written(&mut self, table: &mut DeTable<'_>, keys: &[&str]) {
        for key in keys {
            let Some(value) = table.remove(*key) else { continue };
            let absolute = |text: &str| quote(self.source.absolute(Path::new(text)).display().to_string());
            let text = match value.get_ref() {
                _ if ["secret", "scram"].contains(key) => "\"***\"".to_owned(),
                DeValue::String(text) if PATHS.contains(key) => absolute(text),
                DeValue::Array(values) if PATHS.contains(key) => {
                    let paths: Vec<_> =
                        values.iter().filter_map(|value| value.get_ref().as_str()).map(absolute).collect();
                    format!("[{}]", paths.join(", "))
                }
                other => written(other),
            };
            self.value(key, text);
        }
    }
}

fn take_table<'s>(file: &mut DeTable<'s>, name: &str) -> Option<DeTable<'s>> {
    match file.remove(name)?.into_inner() {
        DeValue::Table(table) => Some(table),
        _ => None,
    }
}

/// A value in one line of TOML.
fn written(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => quote(text),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(values) => {
            format!("[{}]", values.iter().map(|value| written(value.get_ref())).collect::<Vec<_>>().join(", "))
        }
        DeValue::Table(values) => {
            let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
                format!("{} = {}", quote(key.get_ref()), written(value.get_ref()))
            };
            format!("{{ {} }}", values.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
    }
}

/// A string of TOML, with its quotes.
pub fn quote(text: impl AsRef<str>) -> String {
    let mut quoted = String::from("\"");
    for character in text.as_ref().chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => quoted += &format!("\\u{:04X}", u32::from(control)),
            other => quoted.push(other),
        }
    }
    quoted + "\""
}

/// A time in the largest unit in which it is whole.
fn time(time: Duration) -> String {
    let milliseconds = time.as_millis();
    let units = [(24 * 60 * 60 * 1000, "d"), (60 * 60 * 1000, "h"), (60 * 1000, "m"), (1000, "s"), (1, "ms")];
    let (length, unit) =
        units.into_iter().find(|(length, _)| milliseconds.is_multiple_of(*length)).unwrap_or((1, "ms"));
    format!("\"{}{unit}\"", milliseconds / length)
}

fn eight_bit(without: Without8BitMime) -> &'static str {
    match without {
        Without8BitMime::Send => "\"send\"",
        Without8BitMime::Bounce => "\"bounce\"",
    }
}
