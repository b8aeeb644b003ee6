//! A provider's file: its top level, `[tls]`, `[inbound]` and `[odmr]`.

use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::accounts::Accounts;
use super::limits::{limits, timeouts};
use super::owner::MailOwner;
use super::relay::RelayConfig;
use super::remote::file_error;
use super::source::{FileKind, Source, check_private};
use super::table::{Table, check_unique, values};
use super::value::{DURATION, Flag, HOSTNAME, HOSTNAME_MISSING, LISTENER, MAX_SIZE, PATH, SIZE, WITHOUT_8BITMIME};
use crate::net::tls::ServerTls;
use crate::recipients::{ConfigError, Located, SourceLine};
use crate::session::{Limits, Timeouts};
use crate::smtp::client::Without8BitMime;

/// The configuration of a provider.
#[derive(Clone, Debug)]
pub struct ProviderConfig {
    /// The name in greetings. ASCII, spelled as in the file.
    pub hostname: String,
    /// The user that a process becomes after it has bound its listeners, if root has started it; `None`: it stays root.
    pub owner: Option<MailOwner>,
    /// The directory of the queues. Absolute.
    pub spool: PathBuf,
    pub accounts: Accounts,
    pub tls: Option<TlsFiles>,
    pub inbound: InboundConfig,
    pub odmr: OdmrConfig,
    pub relay: RelayConfig,
    pub limits: Limits,
    pub timeouts: Timeouts,
}

impl ProviderConfig {
    /// The addresses of the listeners `inbound`, `odmr` and `odmr-tls`.
    pub fn listen(&self) -> [&Vec<SocketAddr>; 3] {
        [&self.inbound.listen, &self.odmr.listen, &self.odmr.listen_tls]
    }

    /// Reads a provider's file, and the files of its customers.
    ///
    /// # Errors
    ///
    /// The first mistake, or that a file cannot be read or is a customer's.
    pub fn load(path: &Path) -> Result<ProviderConfig, ConfigError> {
        ProviderConfig::load_again(path, &Accounts::default())
    }

    /// Reads the same files again; `earlier`: the accounts of the last reading. If an account's file has a mistake now,
    /// the account and its domains are those of `earlier`.
    ///
    /// # Errors
    ///
    /// Those of [`ProviderConfig::load`].
    pub fn load_again(path: &Path, earlier: &Accounts) -> Result<ProviderConfig, ConfigError> {
        let build = |source: &Source| match source.kind()? {
            Some(FileKind::Provider) | None => ProviderConfig::build(source, earlier),
            Some(FileKind::Customer) => Err(source.whole().error(
                "is a customer's file (it has [provider]), for `odmr pull`; a provider's has `spool` and `customers`",
            )),
        };
        Source::examine(path, build).0
    }

    pub(super) fn build(source: &Source, earlier: &Accounts) -> Result<ProviderConfig, ConfigError> {
        let mut file = Table::root(source, &PROVIDER_FILE_KEYS)?;
        let hostname = file.required("hostname", HOSTNAME, HOSTNAME_MISSING);
        let missing = "`spool` is missing: the directory for the mail that waits, such as spool = \"/var/spool/odmr\"";
        let spool = file.required("spool", PATH, missing);
        let owner = source.note(MailOwner::build(&mut file));
        let customers = file.located("customers", PATH).and_then(|customers| {
            let text = "`customers` is missing: the directory with one file for each customer, such as customers = \
                 \"customers.d\"";
            source.note(customers.ok_or_else(|| file.line.error(text)))
        });
        let tls = file.table("tls", &["certificate", "key"]);
        // If the table has a mistake, do not report listeners with TLS too.
        let has_tls = !matches!(tls, Ok(None));
        let tls = source.note(tls.and_then(|tls| tls.map(TlsFiles::build).transpose()));
        let mut inbound = file.table_or_empty("inbound", &["listen", "max-size", "offer-dsn"]);
        let inbound_listen = inbound.list("listen", LISTENER);
        let mut odmr = file.table_or_empty("odmr", &ODMR_KEYS);
        let (odmr_listen, listen_tls) = (odmr.list("listen", LISTENER), odmr.list("listen-tls", LISTENER));
        let lists = [&inbound_listen, &odmr_listen, &listen_tls].into_iter().flatten().flatten();
        let _ = source.note(check_listeners(lists.flatten()));
        let build = |customers: Located<PathBuf>| source.note(Accounts::build(source, &customers, has_tls, earlier));
        let accounts = customers.and_then(build);
        let max_size = inbound.or("max-size", SIZE, MAX_SIZE);
        let offer_dsn = inbound.or("offer-dsn", Flag, true);
        let odmr = source.note(OdmrConfig::build(odmr, odmr_listen, listen_tls, has_tls));
        let relay = source.note(RelayConfig::build(&mut file));
        let (limits, timeouts) = (limits(&mut file), source.note(timeouts(&mut file)));
        Ok(ProviderConfig {
            hostname: hostname?,
            owner: owner?,
            spool: source.absolute(&spool?),
            accounts: accounts?,
            tls: tls?,
            inbound: InboundConfig { listen: addresses(inbound_listen?, 25), max_size, offer_dsn },
            odmr: odmr?,
            relay: relay?,
            limits,
            timeouts: timeouts?,
        })
    }
}

const PROVIDER_FILE_KEYS: [&str; 11] =
    ["hostname", "user", "group", "spool", "customers", "tls", "inbound", "odmr", "relay", "limits", "timeouts"];

const ODMR_KEYS: [&str; 6] = ["listen", "listen-tls", "require-tls", "cram-md5", "give-up", "without-8bitmime"];

/// The result of reading a list of listeners.
type ListenerList = Result<Option<Vec<Located<SocketAddr>>>, ConfigError>;

/// The addresses of a list; without a list: `port` on all addresses.
fn addresses(list: Option<Vec<Located<SocketAddr>>>, port: u16) -> Vec<SocketAddr> {
    list.map_or_else(|| vec![SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))], values)
}

/// Rejects an address that occurs twice, as only one listener can bind it. Port 0 is another port each time.
pub(super) fn check_listeners<'a>(
    listeners: impl IntoIterator<Item = &'a Located<SocketAddr>>,
) -> Result<(), ConfigError> {
    check_unique(listeners.into_iter().filter(|entry| entry.value.port() != 0))
}

/// `[tls]`: the files with the certificate of the server and its key, both in PEM. Absolute paths.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The lines of both, for errors and warnings.
    pub certificate_line: SourceLine,
    pub key_line: SourceLine,
}

impl TlsFiles {
    fn build(mut table: Table<'_>) -> Result<TlsFiles, ConfigError> {
        let missing = |key: &str| format!("[tls] needs `certificate` and `key`, two files in PEM: `{key}` is missing");
        let (certificate_line, line) = (table.line_of("certificate"), table.line_of("key"));
        let certificate = table.required("certificate", PATH, &missing("certificate"));
        let key = table.file.absolute(&table.required("key", PATH, &missing("key"))?);
        let certificate = table.file.absolute(&certificate?);
        let files = TlsFiles { certificate, key, certificate_line, key_line: line };
        files.check_key().map(|()| files)
    }

    fn check_key(&self) -> Result<(), ConfigError> {
        // If the key cannot be read, `load` reports it.
        let mode = std::fs::metadata(&self.key).map_or(0, |found| found.permissions().mode());
        check_private(mode, &self.key).map_err(|text| self.key_line.error(text))
    }

    /// Reads the certificate and the key.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or is not valid. The error is on the line that names the file.
    pub fn load(&self) -> Result<ServerTls, ConfigError> {
        // A new key that all users may read is an error now too, as the next start would fail.
        self.check_key()?;
        ServerTls::load(&self.certificate, &self.key).map_err(|text| {
            let begins_with = |path: &Path| text.starts_with(&path.display().to_string());
            match begins_with(&self.key) && !begins_with(&self.certificate) {
                true => file_error(&self.key_line, "key", &self.key, &text),
                false => file_error(&self.certificate_line, "certificate", &self.certificate, &text),
            }
        })
    }
}

/// `[inbound]`: the listener for mail from the Internet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InboundConfig {
    /// Default: port 25 on all addresses. Empty: no listener, for example if another mail server fills the Maildirs.
    pub listen: Vec<SocketAddr>,
    /// The largest message from the Internet and from customers, in octets on the wire. Default 50 MiB. RFC 5321 section
    /// 4.5.3.1.7 requires 64 KiB at least; less is for tests.
    pub max_size: u64,
    /// Whether EHLO offers DSN (RFC 3461) to the Internet, by which a sender asks for DSNs of success. Default: true.
    pub offer_dsn: bool,
}

/// `[odmr]`: the listeners for customers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OdmrConfig {
    /// Default: port 366 on all addresses.
    pub listen: Vec<SocketAddr>,
    /// Listeners with TLS from the first octet on, for clients without STARTTLS. Default: none.
    pub listen_tls: Vec<SocketAddr>,
    /// Whether AUTH needs TLS. Default: true.
    pub require_tls: bool,
    /// Whether to offer CRAM-MD5. Default: true. RFC 2645 section 5.1.2 lets a site replace it by a better mechanism.
    pub cram_md5: bool,
    /// A held message that was deferred also expires this long after it was offered first; `None`, the default: it expires
    /// by its age only.
    pub give_up: Option<Duration>,
    /// Whether 8-bit content is sent to a customer whose server does not offer 8BITMIME. Default: it is.
    pub without_8bitmime: Without8BitMime,
}

impl OdmrConfig {
    /// Reads the rest of the table. `listen`, `listen_tls`: its lists, which were read before; `tls`: whether the file
    /// has `[tls]`.
    fn build(
        mut table: Table<'_>, listen: ListenerList, listen_tls: ListenerList, tls: bool,
    ) -> Result<OdmrConfig, ConfigError> {
        let require_line = table.line_of("require-tls");
        let require_tls = table.get("require-tls", Flag);
        let (cram_md5, give_up) = (table.or("cram-md5", Flag, true), table.optional("give-up", DURATION));
        let without_8bitmime = table.or("without-8bitmime", WITHOUT_8BITMIME, Without8BitMime::default());
        let require_tls = require_tls?.unwrap_or(true);
        let (listen, listen_tls) = (addresses(listen?, 366), listen_tls?.unwrap_or_default());
        if !tls {
            let add = "add [tls] with `certificate` and `key`";
            if let Some(first) = listen_tls.first() {
                let text = format!("`listen-tls` needs a certificate: {add}, or leave `listen-tls` empty");
                return Err(first.source.error(text));
            }
            if require_tls {
                return Err(require_line.error(format!(
                    "`require-tls` is true, which it is by default, and there is no [tls]: {add}, or write \
                     require-tls = false"
                )));
            }
        }
        let listen_tls = values(listen_tls);
        Ok(OdmrConfig { listen, listen_tls, require_tls, cram_md5, give_up, without_8bitmime })
    }
}
