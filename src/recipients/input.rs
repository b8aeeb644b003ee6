//! A customer's rules for recipients as they are in the configuration, not checked yet, each with its line in a file; and the
//! error about a line.

use core::net::{IpAddr, SocketAddr};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::names::is_plain;
use crate::mail::address::{Domain, Mailbox};

/// The unchecked rules. [`RecipientRules::new`](super::RecipientRules::new) checks them.
#[derive(Debug)]
pub struct RuleInput {
    /// The directory of the Maildirs, unless `routes` names another. Absolute.
    pub root: PathBuf,
    /// The domain of `Postmaster` and other names without a domain.
    pub home: Domain,
    /// Addresses and domains, in the order of the file, without duplicates.
    pub accept: Vec<Located<AddressPattern>>,
    pub except: Vec<Located<AddressPattern>>,
    pub aliases: Vec<Alias>,
    pub domain_aliases: Vec<DomainAlias>,
    /// Each of these characters begins a detail.
    pub separators: String,
    pub postmaster: Option<Located<Mailbox>>,
    pub routes: Vec<RouteRule>,
    pub catch_alls: Vec<CatchAllRule>,
}

/// A value, and the line that it comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Located<T> {
    pub value: T,
    pub source: SourceLine,
}

impl<T> Located<T> {
    /// Another value of the same line.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Located<U> {
        Located { value: change(self.value), source: self.source }
    }
}

/// The recipients that a rule is about. Local parts must be in lower case, as [`AddressPattern::address`] and
/// [`AddressPattern::bare`] make them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum AddressPattern {
    /// `info@example.org`
    Address(String, Domain),
    /// `@example.org`: each address of the domain.
    Domain(Domain),
    /// `root`: the local part in each domain of this customer.
    Bare(String),
}

impl AddressPattern {
    /// The pattern of one address.
    pub fn address(local: &str, domain: &Domain) -> AddressPattern {
        AddressPattern::Address(local.to_lowercase(), domain.clone())
    }

    /// The pattern of one mailbox; `None`: its host is an address literal.
    pub fn of(mailbox: &Mailbox) -> Option<AddressPattern> {
        mailbox.domain().map(|domain| AddressPattern::address(mailbox.local(), domain))
    }

    /// The pattern of one local part.
    pub fn bare(local: &str) -> AddressPattern {
        AddressPattern::Bare(local.to_lowercase())
    }

    /// The domain of the pattern; `None`: it is for all domains.
    pub fn domain(&self) -> Option<&Domain> {
        match self {
            AddressPattern::Address(_, domain) | AddressPattern::Domain(domain) => Some(domain),
            AddressPattern::Bare(_) => None,
        }
    }
}

impl fmt::Display for AddressPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AddressPattern::Address(local, domain) => match address(local, domain) {
                Some(mailbox) => mailbox.fmt(f),
                None => write!(f, "{local:?}@{domain}"),
            },
            AddressPattern::Domain(domain) => write!(f, "@{domain}"),
            AddressPattern::Bare(local) if local.chars().all(is_plain) => f.write_str(local),
            AddressPattern::Bare(local) => write!(f, "{local:?}"),
        }
    }
}

/// Another name for mailboxes of this customer, or for addresses elsewhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Alias {
    pub name: AddressPattern,
    /// At least one.
    pub targets: Vec<AliasTarget>,
    pub source: SourceLine,
}

impl Alias {
    /// Whether it has a target that this program does not serve. If so, its mail is deferred.
    pub fn is_unserved(&self) -> bool {
        self.targets.iter().any(|target| matches!(target.kind, TargetKind::Unserved(_)))
    }
}

/// One target of an alias.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AliasTarget {
    pub kind: TargetKind,
    pub source: SourceLine,
}

/// The kind of an alias's target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetKind {
    /// A mailbox here or elsewhere. `direct`: written `\alice`, the mailbox itself, even if an alias has that name.
    Mailbox { mailbox: Mailbox, direct: bool },
    /// `/dev/null`: the message is accepted and discarded.
    Discard,
    /// A program, a file or a list, which other mail servers serve: its description, with the text in the file.
    Unserved(String),
}

/// Another name of a whole domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DomainAlias {
    pub name: Domain,
    /// The domain's own name.
    pub domain: Domain,
    pub source: SourceLine,
}

/// A route for the mail of some recipients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouteRule {
    /// An address or a domain; `None`: all recipients without their own route.
    pub pattern: Option<AddressPattern>,
    pub route: Route,
    pub source: SourceLine,
}

/// The catch-all of a domain that is in `accept` as a whole, or of all such domains.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CatchAllRule {
    /// `None`: each domain without its own catch-all.
    pub domain: Option<Domain>,
    pub catch_all: CatchAll,
    pub source: SourceLine,
}

/// The mailbox that gets mail for a name without a mailbox.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum CatchAll {
    /// The postmaster of the domain (RFC 5321 section 4.5.1).
    #[default]
    Postmaster,
    /// A new mailbox of that name.
    Create,
    /// One mailbox, or an alias.
    Mailbox(Mailbox),
}

/// The way to a mailbox.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Route {
    /// For an address, its Maildir; for a domain, the directory of its Maildirs; otherwise the directory of all domains.
    /// Absolute.
    Maildir(PathBuf),
    NextHop(NextHop),
}

/// A local mail server that gets the mail in place of a Maildir.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum NextHop {
    /// The path of a Unix socket. Absolute.
    LmtpUnix(PathBuf),
    /// `address`: `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`; `host`: its host, without brackets.
    Lmtp {
        address: String,
        host: String,
    },
    Smtp {
        address: String,
        host: String,
    },
}

impl NextHop {
    /// Whether the next hop is this listener of the host `hostname`, as far as this is known without a DNS query: mail to it
    /// would loop.
    pub fn is_at(&self, listener: &SocketAddr, hostname: &str) -> bool {
        let (NextHop::Lmtp { address, host } | NextHop::Smtp { address, host }) = self else { return false };
        let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        let here = match host.parse::<IpAddr>() {
            Ok(ip) => ip == listener.ip() || listener.ip().is_unspecified() && ip.is_loopback(),
            Err(_) => [hostname, "localhost"].iter().any(|ours| host.eq_ignore_ascii_case(ours)),
        };
        here && port == Some(listener.port()) && listener.port() != 0
    }
}

impl fmt::Display for NextHop {
    /// As in the configuration, with the port: `lmtp:/run/dovecot/lmtp`, `smtp:127.0.0.1:25`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NextHop::LmtpUnix(path) => write!(f, "lmtp:{}", path.display()),
            NextHop::Lmtp { address, .. } => write!(f, "lmtp:{address}"),
            NextHop::Smtp { address, .. } => write!(f, "smtp:{address}"),
        }
    }
}

/// A place in a file of the configuration. Shown without the directories: `aliases:12`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SourceLine {
    pub file: Arc<Path>,
    /// Counted from 1; `None`: the error is about the file as a whole, or about something that is missing.
    pub line: Option<usize>,
}

impl SourceLine {
    /// An error about this place.
    pub fn error(&self, text: impl Into<String>) -> ConfigError {
        ConfigError { source: self.clone(), text: text.into() }
    }

    /// An error about a name that occurs twice. This is the place of the second one.
    pub fn duplicate(&self, name: impl fmt::Display) -> ConfigError {
        self.error(format!("{name} occurs a second time here: remove one of the two"))
    }
}

impl fmt::Display for SourceLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.file.file_name().unwrap_or(self.file.as_os_str());
        write!(f, "{}{}", name.display(), self.line.map_or_else(String::new, |line| format!(":{line}")))
    }
}

/// A mistake in a configuration. Shown in one line, with the whole path: `/etc/odmr/odmr.toml:12: text`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError {
    pub source: SourceLine,
    /// The mistake and its remedy.
    pub text: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.source.line.map_or_else(String::new, |line| format!(":{line}"));
        let text = format!("{}{line}: {}", self.source.file.display(), self.text);
        // The name of a file may contain a line end.
        f.write_str(&text.replace(char::is_control, "?"))
    }
}

/// The remedy for an alias whose mail is to leave this host, or to go to a program.
pub const FORWARD_HINT: &str = "remove that alias, accept the address itself, and send it to the local mail server, \
                                such as deliver = { \"info@example.org\" = \"smtp:127.0.0.1:25\" }";

/// The address `local@domain`, quoted if necessary; `None`: it is not a valid address.
pub fn address(local: &str, domain: &Domain) -> Option<Mailbox> {
    let escaped = local.replace('\\', r"\\").replace('"', "\\\"");
    Mailbox::parse(&format!("\"{escaped}\"@{domain}")).map(|mailbox| mailbox.canonical())
}

/// Whether two addresses are the same mailbox: local parts compare without case.
pub fn same_mailbox(one: &Mailbox, other: &Mailbox) -> bool {
    one.host() == other.host() && one.local().to_lowercase() == other.local().to_lowercase()
}

/// Whether a mailbox is `local@domain`; `local` is in lower case.
pub(super) fn is(mailbox: &Mailbox, local: &str, domain: &Domain) -> bool {
    mailbox.domain() == Some(domain) && mailbox.local().to_lowercase() == local
}
