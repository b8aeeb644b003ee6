//! The delivery rules of a customer: who a recipient is here, where his mail goes, and by which rule.
//!
//! Pure: no files, no sockets, no clock. The configuration makes the [`Rules`], and they have been checked then: no
//! alias goes in circles, and each leads to mailboxes of ours. For an address, in this order:
//!
//! 0. *bare postmaster*: `Postmaster` alone is postmaster@ the first domain of `accept` (RFC 5321 section 4.5.1).
//! 1. *domain alias*: another name of one of our domains is replaced by it.
//! 2. *foreign*: no rule for that domain. Refused, since a turned session is no relay.
//! 3. *alias* of the address as it is; first of the address in full, then of its local part in every domain.
//! 4. *user*: an address of `accept` as it is.
//! 5. *detail*: alias, then user, without what follows the first separator (`alice+detail`). A user keeps the
//!    detail, an alias drops it.
//! 6. *postmaster*: postmaster@ and abuse@ that have no rule of their own go where `postmaster` says. Without it
//!    postmaster is a mailbox by default, and abuse goes where postmaster does.
//! 7. *alias of the domain*: `@example.org`.
//! 8. *exception*: refused, with or without detail.
//! 9. *catch-all*: the mailbox of the local part without its detail.
//! 10. *nobody*: refused.
//!
//! Local parts compare without case, domains as [`Domain`] does. An alias that names itself means the mailbox of that
//! name, and so does a target with a backslash in front: rules 3, 5 and 7 know no alias then.
//!
//! A local part may hold anything (`../x`, slashes, spaces), so its folder is a translation of it that stays below its
//! domain's: letters in lower case, digits and `._+=-` stand for themselves, everything else, and a dot in front, is
//! `%HH` an octet. The Maildir++ folder of a detail is made in the same way, without dots, as they would make levels.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::mail::address::{Domain, ForwardPath, Mailbox, forward_path};
use crate::smtp::reply::Reply;

/// The name of a folder may have so many octets, with room for what mail readers put beside it.
const DIRECTORY_NAME_LIMIT: usize = 200;

/// Aliases of aliases of aliases: so many steps in all.
const ALIAS_DEPTH_LIMIT: usize = 10;

/// One address leads to so many places at most.
const DESTINATION_LIMIT: usize = 100;

/// What the configuration says about mailboxes; [`Rules::new`] makes one sense of it.
#[derive(Debug)]
pub struct RuleInput {
    /// Where the Maildirs stand, unless `routes` says something else. Absolute.
    pub root: PathBuf,
    /// Names without a domain are here.
    pub home: Domain,
    /// Addresses and domains, in the order of the file; none twice.
    pub accept: Vec<(AddressPattern, SourceLine)>,
    pub except: Vec<(AddressPattern, SourceLine)>,
    pub aliases: Vec<Alias>,
    /// Another name, and the domain it is a name of.
    pub domain_aliases: Vec<(Domain, Domain, SourceLine)>,
    /// Any of these characters begins a detail.
    pub separators: String,
    pub postmaster: Option<(Mailbox, SourceLine)>,
    /// For an address, a domain, or (`None`) everybody.
    pub routes: Vec<(Option<AddressPattern>, Route, SourceLine)>,
}

/// What a rule is about. Local parts are in lower case: [`Name::address`] and [`Name::bare`] see to it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum AddressPattern {
    Address(String, Domain),
    /// `@example.org`
    Domain(Domain),
    /// `root`: a local part in every domain of ours.
    Bare(String),
}

impl AddressPattern {
    pub fn address(local: &str, domain: &Domain) -> AddressPattern {
        AddressPattern::Address(local.to_lowercase(), domain.clone())
    }

    pub fn bare(local: &str) -> AddressPattern {
        AddressPattern::Bare(local.to_lowercase())
    }

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

/// Another name for mailboxes of ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Alias {
    pub name: AddressPattern,
    /// At least one.
    pub targets: Vec<AliasTarget>,
    pub origin: SourceLine,
}

/// Where an alias leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AliasTarget {
    pub mailbox: Mailbox,
    /// `\alice`: the mailbox, whatever aliases there are.
    pub direct: bool,
    pub origin: SourceLine,
}

/// Where something is written. Shown as `aliases:12`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SourceLine {
    pub file: Arc<Path>,
    pub line: usize,
}

impl fmt::Display for SourceLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.file.file_name().unwrap_or(self.file.as_os_str());
        write!(f, "{}:{}", name.display(), self.line)
    }
}

/// What is wrong with the rules, and where it is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RuleError {
    pub origin: SourceLine,
    pub text: String,
}

/// Where mail is delivered to, for one address, a domain or all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Route {
    /// The Maildir itself, the folder of a domain's Maildirs, or the folder of all domains. Absolute.
    Maildir(PathBuf),
    NextHop(NextHop),
}

/// A server that is handed mail, in place of a Maildir.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum NextHop {
    /// A socket in the file system. Absolute.
    LmtpUnix(PathBuf),
    /// `address`: `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`; `host` of it, without brackets.
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
    /// Whether who listens there on this host would be spoken to, as far as the address tells without asking anybody.
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
    /// As the file has it, with the port: `lmtp:/run/dovecot/lmtp`, `smtp:127.0.0.1:25`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NextHop::LmtpUnix(path) => write!(f, "lmtp:{}", path.display()),
            NextHop::Lmtp { address, .. } => write!(f, "lmtp:{address}"),
            NextHop::Smtp { address, .. } => write!(f, "smtp:{address}"),
        }
    }
}

/// One final place of a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Delivery {
    /// The final address: its domain in its own name, its local part with the detail and the case it came with.
    pub mailbox: Mailbox,
    pub destination: Destination,
    /// The rules on the way there, and the one that took it.
    pub via: Vec<MatchedRule>,
    pub rule: MatchedRule,
    /// It must be taken somewhere, even if a next hop does not know it (RFC 5321 section 4.5.1).
    pub fallback: bool,
}

/// Where a message ends up.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Destination {
    Maildir {
        path: PathBuf,
        /// Maildir++ folders for the detail, without their dot: the first that exists. None: the inbox.
        folders: Vec<String>,
    },
    NextHop(NextHop),
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, folders) = match self {
            Destination::NextHop(hop) => return hop.fmt(f),
            Destination::Maildir { path, folders } => (path.display(), folders),
        };
        write!(f, "maildir:{path}")?;
        match folders.as_slice() {
            [] => Ok(()),
            [first, rest @ ..] => {
                write!(f, " (in .{first}")?;
                rest.iter().try_for_each(|folder| write!(f, " or .{folder}"))?;
                f.write_str(" if that folder exists)")
            }
        }
    }
}

/// A rule that was applied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MatchedRule {
    /// Rule 0, to this domain.
    BarePostmaster(Domain),
    /// Rule 1, to this domain.
    DomainAlias(Domain),
    /// Rules 3, 5 and 7. The detail was dropped.
    Alias { name: AddressPattern, origin: SourceLine, detail: Option<String> },
    /// Rules 4 and 5.
    User { detail: Option<String> },
    /// Rule 6, to another address.
    Postmaster,
    /// Rule 6, to a mailbox that nobody declared.
    PostmasterByDefault { detail: Option<String> },
    /// Rule 9.
    CatchAll { domain: Domain, detail: Option<String> },
}

impl fmt::Display for MatchedRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let detail = match self {
            MatchedRule::BarePostmaster(domain) => return write!(f, "bare postmaster of {domain}"),
            MatchedRule::DomainAlias(domain) => return write!(f, "domain alias of {domain}"),
            MatchedRule::Postmaster => return f.write_str("postmaster"),
            MatchedRule::Alias { name, origin, detail } => {
                write!(f, "alias {name} ({origin})")?;
                return match detail {
                    Some(detail) => write!(f, " without its detail {detail:?}"),
                    None => Ok(()),
                };
            }
            MatchedRule::User { detail } => {
                f.write_str("user")?;
                detail
            }
            MatchedRule::PostmasterByDefault { detail } => {
                f.write_str("postmaster by default")?;
                detail
            }
            MatchedRule::CatchAll { domain, detail } => {
                write!(f, "catch-all @{domain}")?;
                detail
            }
        };
        match detail {
            Some(detail) => write!(f, ", detail {detail:?}"),
            None => Ok(()),
        }
    }
}

/// Why nobody takes mail for an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NoMailbox {
    /// Rule 2.
    Foreign,
    /// Rule 8.
    Exception,
    /// Rule 10.
    Nobody,
    /// Its folder could have no name.
    Nameless,
}

impl NoMailbox {
    fn reply(self) -> Reply {
        match self {
            // A turned session is no relay.
            NoMailbox::Foreign => Reply::new(550, "5.7.1", "Relaying denied: that domain has no mailboxes here"),
            _ => Reply::new(550, "5.1.1", "No such mailbox here"),
        }
    }

    fn reason(self) -> &'static str {
        match self {
            NoMailbox::Foreign => "foreign: no rule for that domain",
            NoMailbox::Exception => "exception",
            NoMailbox::Nobody => "no rule takes it",
            NoMailbox::Nameless => "a local part that is empty, or too long for a folder",
        }
    }
}

/// The delivery rules of a customer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecipientRules {
    root: PathBuf,
    /// Those with rules, the first is home, then the aliases of domains.
    domains: Vec<Domain>,
    domain_aliases: HashMap<Domain, Domain>,
    /// Addresses and domains of `accept`.
    accept: HashSet<AddressPattern>,
    except: HashSet<AddressPattern>,
    aliases: HashMap<AddressPattern, Alias>,
    separators: String,
    postmaster: Option<Mailbox>,
    /// For an address or a domain.
    routes: HashMap<AddressPattern, Route>,
    /// For all others.
    route: Route,
}

/// What one rule makes of an address.
enum Match<'a> {
    Alias(&'a Alias, Option<String>),
    /// Rule 6 sends it there.
    Postmaster(Mailbox),
    /// It is a mailbox: its name without the detail.
    Mailbox {
        local: String,
        detail: Option<String>,
        rule: MatchedRule,
    },
    NoMailbox(NoMailbox),
}

/// A step on the way through aliases.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Step {
    Alias(AddressPattern),
    Postmaster(Mailbox),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Alias(name) => name.fmt(f),
            Step::Postmaster(mailbox) => mailbox.fmt(f),
        }
    }
}

impl RecipientRules {
    /// Makes rules of what is written, if they make sense.
    pub fn new(written: RuleInput) -> Result<RecipientRules, RuleError> {
        let mut rules = RecipientRules {
            route: Route::Maildir(written.root.clone()),
            root: written.root,
            domains: vec![written.home],
            domain_aliases: HashMap::new(),
            accept: HashSet::new(),
            except: HashSet::new(),
            aliases: HashMap::new(),
            separators: written.separators,
            postmaster: None,
            routes: HashMap::new(),
        };
        rules.add_domains(&written.accept, &written.aliases, written.domain_aliases)?;
        rules.accept = written.accept.iter().map(|(name, _)| name.clone()).collect();
        let order = rules.add_aliases(written.aliases)?;
        rules.postmaster = written.postmaster.as_ref().map(|(mailbox, _)| rules.canonical(mailbox.clone()));
        for (name, origin) in &written.accept {
            rules.check_accepted(name, origin)?;
        }
        for (name, origin) in written.except {
            rules.check_exception(&name, &origin)?;
            rules.except.insert(name);
        }
        for name in &order {
            rules.check_targets(&rules.aliases[name])?;
        }
        if let (Some(mailbox), Some((_, origin))) = (&rules.postmaster, &written.postmaster) {
            rules.check_postmaster(mailbox, origin)?;
        }
        rules.check_steps(&order)?;
        for (name, route, origin) in written.routes {
            match name {
                None => rules.route = route,
                Some(name) => {
                    rules.check_routed(&name, &origin)?;
                    if rules.routes.insert(name.clone(), route).is_some() {
                        return Err(rule_error(&origin, format!("{name} stands here twice: take one of the two out")));
                    }
                }
            }
        }
        Ok(rules)
    }

    /// Ours: those of `accept`, those of aliases, then the aliases of domains. The first is home; never none.
    pub fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// Whether mail for a domain is ours.
    pub fn serves(&self, domain: &Domain) -> bool {
        self.domains.contains(domain)
    }

    /// Where mail for a recipient goes: each place once, and at least one. Refused: `550` with 5.1.1 or 5.7.1.
    pub fn resolve(&self, path: &ForwardPath) -> Result<Vec<Delivery>, Reply> {
        self.trace(path).1.map_err(NoMailbox::reply)
    }

    /// The same in words: a line, and for an alias another for each place, all without a line end at the end.
    pub fn explain(&self, path: &ForwardPath) -> String {
        let (begin, result) = self.trace(path);
        let mut text = format!("{path}:");
        for rule in &begin {
            let _ = write!(text, " {rule},");
        }
        let deliveries = match result {
            Ok(deliveries) => deliveries,
            Err(refusal) => {
                let _ = write!(text, " refused: {} ({})", refusal.reply(), refusal.reason());
                return text;
            }
        };
        for (number, Delivery { mailbox, destination: place, via, rule, .. }) in deliveries.iter().enumerate() {
            if let Some((first, rest)) = via.get(begin.len()..).and_then(<[MatchedRule]>::split_first) {
                match first {
                    _ if number > 0 => {}
                    // Its name was just said.
                    MatchedRule::Alias {
                        name: AddressPattern::Address(..) | AddressPattern::Bare(_),
                        origin,
                        detail: None,
                    } => {
                        let _ = write!(text, " alias ({origin})");
                    }
                    first => {
                        let _ = write!(text, " {first}");
                    }
                }
                let _ = write!(text, "\n  {mailbox}:");
                for rule in rest {
                    let _ = write!(text, " {rule},");
                }
            }
            let _ = write!(text, " {rule} -> {place}");
        }
        text
    }

    /// What becomes of an address as a person types it, with or without angle brackets. `Err`: nobody takes it, or it
    /// is no address.
    pub fn explain_typed(&self, typed: &str) -> Result<String, String> {
        let typed = typed.trim();
        let bracketed = if typed.starts_with('<') { typed.to_owned() } else { format!("<{typed}>") };
        match forward_path(bracketed.as_bytes()) {
            Ok((path, used)) if used == bracketed.len() => match self.resolve(&path) {
                Ok(_) => Ok(self.explain(&path)),
                Err(_) => Err(self.explain(&path)),
            },
            _ => Err(format!("{typed:?} is no address: write one such as alice@example.org, or postmaster")),
        }
    }

    /// `ROOT/<domain>/<local part>`, without the detail: for a [`Delivery::fallback`] that no next hop takes.
    pub fn maildir_of(&self, mailbox: &Mailbox) -> PathBuf {
        let local = match mailbox.domain().map(|domain| self.look(mailbox.local(), domain, false)) {
            Some(Match::Mailbox { local, .. }) => local,
            _ => mailbox.local().to_owned(),
        };
        self.root.join(mailbox.host().to_string()).join(directory_name(&local))
    }

    /// Where a final address belongs, whatever aliases say of it: for mail that was taken for it and waits. `None`: it
    /// is nobody's any more.
    pub fn destination_of(&self, mailbox: &Mailbox) -> Option<Destination> {
        let domain = mailbox.domain().filter(|domain| self.serves(domain))?;
        match self.look(mailbox.local(), domain, false) {
            Match::Mailbox { local, detail, .. } => Some(self.destination(&local, domain, detail.as_deref())),
            _ => None,
        }
    }

    /// Whether some mail goes to next hops.
    pub fn has_next_hops(&self) -> bool {
        self.next_hops().next().is_some()
    }

    /// The next hops there are.
    pub fn next_hops(&self) -> impl Iterator<Item = &NextHop> {
        [&self.route].into_iter().chain(self.routes.values()).filter_map(|route| match route {
            Route::NextHop(hop) => Some(hop),
            Route::Maildir(_) => None,
        })
    }

    /// Whether an address is postmaster's, or abuse's by default (see [`Delivery::fallback`]).
    pub fn is_fallback(&self, mailbox: &Mailbox) -> bool {
        if self.split(mailbox.local()).0.eq_ignore_ascii_case("postmaster") {
            return true;
        }
        let found = mailbox.domain().map(|domain| self.look(mailbox.local(), domain, false));
        matches!(found, Some(Match::Mailbox { rule: MatchedRule::PostmasterByDefault { .. }, .. }))
    }

    /// Rules 0 to 2, and what comes of the others.
    fn trace(&self, path: &ForwardPath) -> (Vec<MatchedRule>, Result<Vec<Delivery>, NoMailbox>) {
        let mut via = Vec::new();
        let mut mailbox = match path {
            ForwardPath::Mailbox(mailbox) => mailbox.clone(),
            ForwardPath::Postmaster => match self.domains.first().and_then(|home| address("postmaster", home)) {
                Some(mailbox) => mailbox,
                None => return (via, Err(NoMailbox::Nobody)),
            },
        };
        if let (ForwardPath::Postmaster, Some(home)) = (path, mailbox.domain()) {
            via.push(MatchedRule::BarePostmaster(home.clone()));
        } else if let Some(domain) = mailbox.domain().and_then(|domain| self.domain_aliases.get(domain)) {
            via.push(MatchedRule::DomainAlias(domain.clone()));
            mailbox = self.canonical(mailbox);
        }
        let begin = via.clone();
        let mut walk = Expansion { rules: self, via, seen: HashSet::new(), deliveries: Vec::new() };
        let result = walk.go(&mailbox, self.find(&mailbox, true));
        (begin, result.map(|()| walk.deliveries))
    }

    /// Rule 1.
    fn canonical(&self, mailbox: Mailbox) -> Mailbox {
        let domain = mailbox.domain().and_then(|domain| self.domain_aliases.get(domain));
        domain.and_then(|domain| address(mailbox.local(), domain)).unwrap_or(mailbox)
    }

    /// Rules 2 to 10, for an address of a domain in its own name.
    fn find(&self, mailbox: &Mailbox, aliases: bool) -> Match<'_> {
        match mailbox.domain() {
            Some(domain) if self.serves(domain) => self.look(mailbox.local(), domain, aliases),
            _ => Match::NoMailbox(NoMailbox::Foreign),
        }
    }

    /// Rules 3 to 10.
    fn look(&self, local: &str, domain: &Domain, aliases: bool) -> Match<'_> {
        let (base, detail) = self.split(local);
        let detail = detail.map(str::to_owned);
        // 3 to 5.
        let both = [(local, None), (base, detail.clone())];
        for (local, detail) in both.into_iter().take(if detail.is_some() { 2 } else { 1 }) {
            let name = AddressPattern::address(local, domain);
            if let Some(alias) = self.aliases.get(&name).or_else(|| self.aliases.get(&AddressPattern::bare(local)))
                && aliases
            {
                return Match::Alias(alias, detail);
            }
            if self.accept.contains(&name) {
                return found(local, detail.clone(), MatchedRule::User { detail });
            }
        }
        // 6.
        let role = base.to_lowercase();
        if role == "postmaster" || role == "abuse" {
            match (&self.postmaster, address("postmaster", domain)) {
                (Some(mailbox), _) if !is(mailbox, &role, domain) => return Match::Postmaster(mailbox.clone()),
                (None, Some(mailbox)) if role == "abuse" => return Match::Postmaster(mailbox),
                _ => return found(base, detail.clone(), MatchedRule::PostmasterByDefault { detail }),
            }
        }
        // 7.
        let everybody = AddressPattern::Domain(domain.clone());
        if let Some(alias) = self.aliases.get(&everybody)
            && aliases
        {
            return Match::Alias(alias, None);
        }
        // 8 to 10.
        if [local, base].iter().any(|local| self.except.contains(&AddressPattern::address(local, domain))) {
            return Match::NoMailbox(NoMailbox::Exception);
        }
        if self.accept.contains(&everybody) {
            return found(base, detail.clone(), MatchedRule::CatchAll { domain: domain.clone(), detail });
        }
        Match::NoMailbox(NoMailbox::Nobody)
    }

    /// A local part and its detail, which may be empty; a separator in front is none (RFC 5233 leaves it to us).
    fn split<'a>(&self, local: &'a str) -> (&'a str, Option<&'a str>) {
        let at = local.char_indices().skip(1).find(|(_, character)| self.separators.contains(*character));
        match at {
            Some((at, separator)) => (&local[..at], Some(&local[at + separator.len_utf8()..])),
            None => (local, None),
        }
    }

    /// Where a target of an alias leads: to the mailbox of that name, if that is the alias itself.
    fn follow(&self, alias: &Alias, target: &AliasTarget) -> Match<'_> {
        match self.find(&target.mailbox, !target.direct) {
            Match::Alias(same, _) if same.name == alias.name => self.find(&target.mailbox, false),
            other => other,
        }
    }

    fn destination(&self, local: &str, domain: &Domain, detail: Option<&str>) -> Destination {
        let address = self.routes.get(&AddressPattern::address(local, domain)).map(|route| (route, 0));
        let whole = || self.routes.get(&AddressPattern::Domain(domain.clone())).map(|route| (route, 1));
        let (route, levels) = address.or_else(whole).unwrap_or((&self.route, 2));
        let path = match route {
            Route::NextHop(hop) => return Destination::NextHop(hop.clone()),
            Route::Maildir(path) => path,
        };
        let path = match levels {
            0 => path.clone(),
            1 => path.join(directory_name(local)),
            _ => path.join(domain.as_str()).join(directory_name(local)),
        };
        Destination::Maildir { path, folders: detail.map_or_else(Vec::new, folder_names) }
    }
}

/// A mailbox, unless its folder could have no name.
fn found<'a>(local: &str, detail: Option<String>, rule: MatchedRule) -> Match<'a> {
    if local.is_empty() || directory_name(local).len() > DIRECTORY_NAME_LIMIT {
        return Match::NoMailbox(NoMailbox::Nameless);
    }
    Match::Mailbox { local: local.to_owned(), detail, rule }
}

/// From an address to its places.
struct Expansion<'a> {
    rules: &'a RecipientRules,
    via: Vec<MatchedRule>,
    /// Aliases whose places are found.
    seen: HashSet<AddressPattern>,
    deliveries: Vec<Delivery>,
}

impl Expansion<'_> {
    fn go(&mut self, mailbox: &Mailbox, found: Match<'_>) -> Result<(), NoMailbox> {
        match found {
            Match::NoMailbox(refusal) => return Err(refusal),
            Match::Mailbox { local, detail, rule } => self.arrive(mailbox, &local, detail.as_deref(), rule),
            Match::Postmaster(mailbox) => {
                self.via.push(MatchedRule::Postmaster);
                self.go(&mailbox, self.rules.find(&mailbox, true))?;
                self.via.pop();
            }
            Match::Alias(alias, detail) => {
                if !self.seen.insert(alias.name.clone()) {
                    return Ok(());
                }
                self.via.push(MatchedRule::Alias { name: alias.name.clone(), origin: alias.origin.clone(), detail });
                for target in &alias.targets {
                    self.go(&target.mailbox, self.rules.follow(alias, target))?;
                }
                self.via.pop();
            }
        }
        Ok(())
    }

    fn arrive(&mut self, mailbox: &Mailbox, local: &str, detail: Option<&str>, rule: MatchedRule) {
        let Some(domain) = mailbox.domain() else { return };
        let place = self.rules.destination(local, domain, detail);
        let same = |other: &Delivery| {
            other.destination == place
                && (matches!(place, Destination::Maildir { .. })
                    || is(&other.mailbox, &mailbox.local().to_lowercase(), domain))
        };
        // One too many is enough for the check that there are not too many.
        if self.deliveries.len() <= DESTINATION_LIMIT && !self.deliveries.iter().any(same) {
            let fallback = matches!(rule, MatchedRule::PostmasterByDefault { .. });
            let via = self.via.clone();
            self.deliveries.push(Delivery { mailbox: mailbox.clone(), destination: place, via, rule, fallback });
        }
    }
}

// What makes no sense. Each text says what is wrong and the way out.

impl RecipientRules {
    fn add_domains(
        &mut self,
        accept: &[(AddressPattern, SourceLine)],
        aliases: &[Alias],
        domain_aliases: Vec<(Domain, Domain, SourceLine)>,
    ) -> Result<(), RuleError> {
        let names = accept.iter().map(|(name, _)| name).chain(aliases.iter().map(|alias| &alias.name));
        let mut known: HashSet<_> = self.domains.iter().cloned().collect();
        for domain in names.filter_map(AddressPattern::domain) {
            if known.insert(domain.clone()) {
                self.domains.push(domain.clone());
            }
        }
        for (from, to, origin) in &domain_aliases {
            if known.contains(from) {
                let text = format!(
                    "{from} has rules of its own, in `accept` or in aliases, and cannot be another name of {to}: take \
                     those out, or this"
                );
                return Err(rule_error(origin, text));
            }
            if !known.contains(to) {
                let text = match domain_aliases.iter().any(|(from, ..)| from == to) {
                    true => format!("{to} is itself another name only: write the domain that it stands for"),
                    false => format!("{to} has no rules here: add it to `accept`, such as \"@{to}\""),
                };
                return Err(rule_error(origin, text));
            }
        }
        for (from, to, origin) in domain_aliases {
            if self.domain_aliases.insert(from.clone(), to).is_some() {
                return Err(rule_error(&origin, format!("{from} stands here twice: take one of the two out")));
            }
            self.domains.push(from);
        }
        Ok(())
    }

    /// Says in which order they are written.
    fn add_aliases(&mut self, aliases: Vec<Alias>) -> Result<Vec<AddressPattern>, RuleError> {
        let mut order = Vec::with_capacity(aliases.len());
        for mut alias in aliases {
            if let Some(other) = self.aliases.get(&alias.name) {
                let text = format!(
                    "{} stands in {} too: put all targets into one of the two, and take the other out",
                    alias.name, other.origin
                );
                return Err(rule_error(&alias.origin, text));
            }
            for target in &mut alias.targets {
                target.mailbox = self.canonical(target.mailbox.clone());
            }
            order.push(alias.name.clone());
            self.aliases.insert(alias.name.clone(), alias);
        }
        Ok(order)
    }

    /// A user, or a whole domain, that an alias takes everything from.
    fn check_accepted(&self, name: &AddressPattern, origin: &SourceLine) -> Result<(), RuleError> {
        let alias = match name {
            AddressPattern::Address(local, _)
                if local.is_empty() || directory_name(local).len() > DIRECTORY_NAME_LIMIT =>
            {
                let text = format!("{name} can have no mailbox: its local part is empty, or too long for a folder");
                return Err(rule_error(origin, text));
            }
            AddressPattern::Address(local, domain) => self.alias_over(local, domain),
            name => self.aliases.get(name),
        };
        let Some(alias) = alias else { return Ok(()) };
        let both = match name {
            AddressPattern::Address(..) => format!(", or, for both, add {name} to its targets"),
            _ => String::new(),
        };
        let text = format!(
            "{name} is in `accept` and an alias ({}) that keeps all mail from it: take one out{both}",
            alias.origin
        );
        Err(rule_error(origin, text))
    }

    /// The alias that takes all mail from a mailbox; `local` is in lower case.
    fn alias_over(&self, local: &str, domain: &Domain) -> Option<&Alias> {
        match self.look(local, domain, true) {
            Match::Alias(alias, None) => {
                let left_out = !alias.targets.iter().any(|target| self.means(target, local, domain));
                left_out.then_some(alias)
            }
            _ => None,
        }
    }

    /// Whether a target is this mailbox, with a detail or without.
    fn means(&self, target: &AliasTarget, local: &str, domain: &Domain) -> bool {
        let (base, _) = self.split(target.mailbox.local());
        is(&target.mailbox, local, domain) || (base.to_lowercase() == local && target.mailbox.domain() == Some(domain))
    }

    /// An exception that no catch-all would come to means something else than it says.
    fn check_exception(&self, name: &AddressPattern, origin: &SourceLine) -> Result<(), RuleError> {
        let AddressPattern::Address(local, domain) = name else { return Ok(()) };
        let text = match self.look(local, domain, true) {
            Match::Mailbox { rule: MatchedRule::CatchAll { .. }, .. } => return Ok(()),
            Match::NoMailbox(NoMailbox::Exception | NoMailbox::Nameless) => return Ok(()),
            Match::Mailbox { rule: MatchedRule::User { .. }, local, .. } => {
                format!("{} is in `accept` too: take one of the two out", AddressPattern::address(&local, domain))
            }
            Match::Alias(alias, _) => format!("{name} is an alias too ({}): take one of the two out", alias.origin),
            Match::Postmaster(_) | Match::Mailbox { .. } => format!(
                "{name} must be taken (RFC 5321 section 4.5.1, RFC 2142): take it out, and say with `postmaster` who \
                 reads it"
            ),
            Match::NoMailbox(_) => format!(
                "{name} is an exception of nothing: `except` is for the domains that `accept` takes whole, and \
                 \"@{domain}\" is not among them"
            ),
        };
        Err(rule_error(origin, text))
    }

    /// Every target must lead to a mailbox here.
    fn check_targets(&self, alias: &Alias) -> Result<(), RuleError> {
        for target in &alias.targets {
            let Match::NoMailbox(refusal) = self.follow(alias, target) else { continue };
            let (name, to) = (&alias.name, &target.mailbox);
            let text = match refusal {
                NoMailbox::Foreign => {
                    format!("the alias {name} leads to {to}, which is not in a domain of ours: {FORWARD_HINT}")
                }
                refusal => format!(
                    "the alias {name} leads to {to}, which nobody takes ({}): add it to `accept`, or make an alias of it",
                    refusal.reason()
                ),
            };
            return Err(rule_error(&target.origin, text));
        }
        Ok(())
    }

    fn check_postmaster(&self, mailbox: &Mailbox, origin: &SourceLine) -> Result<(), RuleError> {
        match self.find(mailbox, true) {
            Match::NoMailbox(refusal) => {
                let text = format!(
                    "nobody takes {mailbox} ({}), and `postmaster` must lead to a mailbox here: add it to `accept`",
                    refusal.reason()
                );
                Err(rule_error(origin, text))
            }
            _ => Ok(()),
        }
    }

    /// No alias may go in circles, too deep, or to too many places.
    fn check_steps(&self, order: &[AddressPattern]) -> Result<(), RuleError> {
        let mut depths = HashMap::new();
        for name in order {
            self.depth(Match::Alias(&self.aliases[name], None), &mut Vec::new(), &mut depths)?;
        }
        for name in order {
            let alias = &self.aliases[name];
            let mut walk = Expansion { rules: self, via: Vec::new(), seen: HashSet::new(), deliveries: Vec::new() };
            for target in &alias.targets {
                // All targets were checked.
                let _ = walk.go(&target.mailbox, self.follow(alias, target));
                if walk.deliveries.len() > DESTINATION_LIMIT {
                    let text = format!(
                        "the alias {name} leads to more than {DESTINATION_LIMIT} mailboxes: that is a mailing list, for a program \
                         that keeps lists; {FORWARD_HINT}"
                    );
                    return Err(rule_error(&alias.origin, text));
                }
            }
        }
        Ok(())
    }

    /// So many steps lie between an address and its last mailbox; `depths`: those already known.
    fn depth(
        &self,
        found: Match<'_>,
        stack: &mut Vec<(Step, Option<SourceLine>)>,
        depths: &mut HashMap<Step, usize>,
    ) -> Result<usize, RuleError> {
        let step = match &found {
            Match::Alias(alias, _) => (Step::Alias(alias.name.clone()), Some(alias.origin.clone())),
            Match::Postmaster(mailbox) => (Step::Postmaster(mailbox.clone()), None),
            Match::Mailbox { .. } | Match::NoMailbox(_) => return Ok(0),
        };
        let wrong = |from: usize, stack: &[(Step, Option<SourceLine>)], text: &str| {
            let steps = stack[from..].iter().chain([&step]).map(|(step, _)| step.to_string());
            let text = format!("{}: {text}", steps.collect::<Vec<_>>().join(" -> "));
            let origin = stack[from..].iter().chain([&step]).find_map(|(_, origin)| origin.as_ref());
            origin.map(|origin| rule_error(origin, text))
        };
        if let Some(from) = stack.iter().position(|(other, _)| *other == step.0)
            && let Some(mistake) = wrong(from, stack, "these aliases go in circles: let one of them lead to a mailbox")
        {
            return Err(mistake);
        }
        let known = depths.get(&step.0).copied();
        if stack.len() + known.unwrap_or(1) > ALIAS_DEPTH_LIMIT {
            let text = format!("more than {ALIAS_DEPTH_LIMIT} steps from alias to alias: name the mailboxes earlier");
            if let Some(mistake) = wrong(0, stack, &text) {
                return Err(mistake);
            }
        }
        if let Some(known) = known {
            return Ok(known);
        }
        stack.push(step.clone());
        let mut deepest = 0;
        match found {
            Match::Alias(alias, _) => {
                for target in &alias.targets {
                    deepest = deepest.max(self.depth(self.follow(alias, target), stack, depths)?);
                }
            }
            Match::Postmaster(mailbox) => deepest = self.depth(self.find(&mailbox, true), stack, depths)?,
            Match::Mailbox { .. } | Match::NoMailbox(_) => {}
        }
        stack.pop();
        depths.insert(step.0, deepest + 1);
        Ok(deepest + 1)
    }

    /// What `deliver` names must be a mailbox or a domain of ours.
    fn check_routed(&self, name: &AddressPattern, origin: &SourceLine) -> Result<(), RuleError> {
        let Some(domain) = name.domain() else { return Ok(()) };
        let text = match (name, self.domain_aliases.get(domain)) {
            (_, Some(own)) => format!("{domain} is another name of {own} only: write {own}"),
            (AddressPattern::Address(local, _), None) if self.serves(domain) => match self.look(local, domain, false) {
                Match::Mailbox { local: base, .. } if base == *local => match self.alias_over(local, domain) {
                    None => return Ok(()),
                    Some(alias) => format!(
                        "{name} gets no mail, as an alias ({}) sends it elsewhere: write where it leads, or take one \
                         of the two out",
                        alias.origin
                    ),
                },
                Match::Mailbox { local: base, .. } => format!(
                    "{name} is a mailbox with a detail, which goes where the mailbox does: write {}",
                    AddressPattern::address(&base, domain)
                ),
                Match::Postmaster(to) => format!("mail for {name} goes to {to}: write that"),
                Match::Alias(..) | Match::NoMailbox(_) => format!(
                    "{name} is no mailbox of ours, and `deliver` is for mailboxes: add it to `accept`, or take this out"
                ),
            },
            (_, None) if self.serves(domain) => return Ok(()),
            (_, None) => format!("{domain} is no domain of ours: add it to `accept`, or take this out"),
        };
        Err(rule_error(origin, text))
    }
}

/// The way out for mail that is to leave this machine, or to be more than delivered.
pub const FORWARD_HINT: &str = "take that alias out, accept the address itself, and hand it to the local mail server, such \
                             as deliver = { \"info@example.org\" = \"smtp:127.0.0.1:25\" }";

fn rule_error(origin: &SourceLine, text: String) -> RuleError {
    RuleError { origin: origin.clone(), text }
}

/// Whether a mailbox is this one; `local` is in lower case.
fn is(mailbox: &Mailbox, local: &str, domain: &Domain) -> bool {
    mailbox.domain() == Some(domain) && mailbox.local().to_lowercase() == local
}

/// Whether two addresses are one mailbox: local parts compare without case.
pub fn same_mailbox(one: &Mailbox, other: &Mailbox) -> bool {
    one.host() == other.host() && one.local().to_lowercase() == other.local().to_lowercase()
}

/// `local@domain`, quoted as it must be; `None`: no such address can be.
pub fn address(local: &str, domain: &Domain) -> Option<Mailbox> {
    let escaped = local.replace('\\', r"\\").replace('"', "\\\"");
    Mailbox::parse(&format!("\"{escaped}\"@{domain}"))
}

/// The name of a mailbox's folder; safe as a name for anything.
pub fn directory_name(local: &str) -> String {
    translated(&local.to_lowercase(), true)
}

/// The names of Maildir++ folders for a detail, the best first; none of them has a dot.
fn folder_names(detail: &str) -> Vec<String> {
    let mut names = vec![translated(detail, false), translated(&detail.to_lowercase(), false)];
    names.dedup();
    // A stranger may not put mail where it is thrown away, and where no quota counts.
    let trash = |name: &String| name.eq_ignore_ascii_case("Trash");
    names.retain(|name| (1..=DIRECTORY_NAME_LIMIT).contains(&name.len()) && !trash(name));
    names
}

/// A text as one component of a path, which is never hidden.
fn translated(text: &str, dots: bool) -> String {
    let mut name = String::with_capacity(text.len());
    for character in text.chars() {
        if is_plain(character) && (character != '.' || dots && !name.is_empty()) {
            name.push(character);
            continue;
        }
        let mut octets = [0; 4];
        for octet in character.encode_utf8(&mut octets).bytes() {
            let _ = write!(name, "%{octet:02X}");
        }
    }
    name
}

/// Stands for itself in the name of a folder.
fn is_plain(character: char) -> bool {
    matches!(character, '.' | '_' | '+' | '=' | '-') || character.is_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Component;

    #[test]
    fn a_local_part_never_leaves_its_domain() {
        assert_eq!(directory_name("Alice.B"), "alice.b");
        assert_eq!(directory_name("user+detail"), "user+detail");
        assert_eq!(directory_name("../x"), "%2E.%2Fx");
        assert_eq!(directory_name("."), "%2E");
        assert_eq!(directory_name(".."), "%2E.");
        assert_eq!(directory_name("a/b c%"), "a%2Fb%20c%25");
        assert_eq!(directory_name("JÜRGEN"), "jürgen");
        assert_eq!(directory_name("\0"), "%00");
    }

    #[test]
    fn the_folder_of_a_detail_keeps_its_case_and_has_no_levels() {
        fn check(detail: &str, expected: &[&str]) {
            assert_eq!(folder_names(detail), expected, "{detail:?}");
        }
        check("Lists", &["Lists", "lists"]);
        check("lists", &["lists"]);
        check("", &[]);
        check(".", &["%2E"]);
        check("../../X", &["%2E%2E%2F%2E%2E%2FX", "%2E%2E%2F%2E%2E%2Fx"]);
        check("a/b", &["a%2Fb"]);
        check("a.b", &["a%2Eb"]);
        check("\0", &["%00"]);
        check("Entwürfe", &["Entwürfe", "entwürfe"]);
        check(&"x".repeat(DIRECTORY_NAME_LIMIT + 1), &[]);
    }

    fn domain(text: &str) -> Domain {
        Domain::parse(text).unwrap()
    }

    /// Whoever it is in two domains, in one of them with Maildirs of its own.
    fn open() -> RecipientRules {
        let origin = SourceLine { file: Path::new("odmr.toml").into(), line: 1 };
        let (home, other) = (domain("example.org"), domain("example.com"));
        RecipientRules::new(RuleInput {
            root: "/var/mail".into(),
            home: home.clone(),
            accept: vec![
                (AddressPattern::Domain(home), origin.clone()),
                (AddressPattern::Domain(other.clone()), origin.clone()),
            ],
            except: Vec::new(),
            aliases: Vec::new(),
            domain_aliases: Vec::new(),
            separators: "+-".to_owned(),
            postmaster: None,
            routes: vec![(Some(AddressPattern::Domain(other)), Route::Maildir("/srv".into()), origin)],
        })
        .unwrap()
    }

    #[test]
    fn what_is_typed_is_an_address_or_not() {
        fn check(typed: &str, expected: Option<&str>) {
            let said = open().explain_typed(typed).ok();
            let address = said.as_deref().and_then(|said| said.rsplit_once(": ")).map(|(address, _)| address);
            assert_eq!(address, expected, "{typed:?}");
        }
        check("alice@example.org", Some("alice@example.org"));
        check(" <Alice@Example.ORG> ", Some("Alice@example.org"));
        check("\"a b\"@example.org", Some("\"a b\"@example.org"));
        check("<\"a>b\"@example.org>", Some("\"a>b\"@example.org"));
        check("jürgen@example.org", Some("jürgen@example.org"));
        check("@one.example,@two.example:alice@example.org", Some("alice@example.org"));
        check("POSTMASTER", Some("Postmaster"));
        for wrong in
            ["", "<>", "alice", "alice@", "a b@example.org", "<alice@example.org", "alice@example.org>", "a\0@b"]
        {
            check(wrong, None);
        }
        let said = open().explain_typed("a\0b@example.org").unwrap_err();
        assert!(said.starts_with("\"a\\0b@example.org\" is no address"), "{said}");
    }

    /// Checks that a name can do no harm as one component of a path.
    fn harmless(name: &str) -> bool {
        !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']) && name.len() <= DIRECTORY_NAME_LIMIT
    }

    proptest! {
        #[test]
        fn no_local_part_makes_a_path(local: String) {
            let name = directory_name(&local);
            prop_assert!(!name.starts_with('.') && !name.contains('/') && !name.contains('\0'));
        }

        #[test]
        fn two_local_parts_have_two_folders(one in "[ -~]{1,8}", other in "[ -~]{1,8}") {
            let same = one.eq_ignore_ascii_case(&other);
            prop_assert_eq!(directory_name(&one) == directory_name(&other), same);
        }

        #[test]
        fn no_detail_makes_a_path(detail: String) {
            for name in folder_names(&detail) {
                prop_assert!(harmless(&name) && !name.contains('.'), "{:?}", name);
            }
        }

        #[test]
        fn no_address_leaves_the_root(
            local in r"(\PC{0,80}|[./+-]{0,9}|[a-c./%]{0,5}[+-][a-c./%]{0,9}|(\.\./){1,9}x?)",
            other: bool,
        ) {
            let rules = open();
            let (name, root) = if other { ("example.com", "/srv") } else { ("example.org", "/var/mail/example.org") };
            let Some(mailbox) = address(&local, &domain(name)) else { return Ok(()) };
            prop_assert!(rules.maildir_of(&mailbox).starts_with("/var/mail"));
            let Ok(deliveries) = rules.resolve(&ForwardPath::Mailbox(mailbox)) else { return Ok(()) };
            prop_assert_eq!(deliveries.len(), 1);
            let Destination::Maildir { path, folders } = &deliveries[0].destination else {
                return Err(TestCaseError::fail("no Maildir"));
            };
            let below: Vec<_> = path.strip_prefix(root).unwrap().components().collect();
            let [Component::Normal(name)] = below.as_slice() else {
                return Err(TestCaseError::fail(format!("{}", path.display())));
            };
            prop_assert!(harmless(name.to_str().unwrap()));
            for folder in folders {
                prop_assert!(harmless(folder) && !folder.contains('.'), "{:?}", folder);
            }
        }
    }
}
