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

use crate::smtp::address::{Domain, ForwardPath, Mailbox, forward_path};
use crate::smtp::reply::Reply;

/// The name of a folder may have so many octets, with room for what mail readers put beside it.
const FOLDER_LIMIT: usize = 200;

/// Aliases of aliases of aliases: so many steps in all.
const STEPS: usize = 10;

/// One address leads to so many places at most.
const PLACES: usize = 100;

/// What the configuration says about mailboxes; [`Rules::new`] makes one sense of it.
#[derive(Debug)]
pub struct Written {
    /// Where the Maildirs stand, unless `routes` says something else. Absolute.
    pub root: PathBuf,
    /// Names without a domain are here.
    pub home: Domain,
    /// Addresses and domains, in the order of the file; none twice.
    pub accept: Vec<(Name, Origin)>,
    pub except: Vec<(Name, Origin)>,
    pub aliases: Vec<Alias>,
    /// Another name, and the domain it is a name of.
    pub domain_aliases: Vec<(Domain, Domain, Origin)>,
    /// Any of these characters begins a detail.
    pub separators: String,
    pub postmaster: Option<(Mailbox, Origin)>,
    /// For an address, a domain, or (`None`) everybody.
    pub routes: Vec<(Option<Name>, Route, Origin)>,
}

/// What a rule is about. Local parts are in lower case: [`Name::address`] and [`Name::bare`] see to it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Name {
    Address(String, Domain),
    /// `@example.org`
    Domain(Domain),
    /// `root`: a local part in every domain of ours.
    Bare(String),
}

impl Name {
    pub fn address(local: &str, domain: &Domain) -> Name {
        Name::Address(local.to_lowercase(), domain.clone())
    }

    pub fn bare(local: &str) -> Name {
        Name::Bare(local.to_lowercase())
    }

    pub fn domain(&self) -> Option<&Domain> {
        match self {
            Name::Address(_, domain) | Name::Domain(domain) => Some(domain),
            Name::Bare(_) => None,
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Address(local, domain) => match address(local, domain) {
                Some(mailbox) => mailbox.fmt(f),
                None => write!(f, "{local:?}@{domain}"),
            },
            Name::Domain(domain) => write!(f, "@{domain}"),
            Name::Bare(local) if local.chars().all(is_plain) => f.write_str(local),
            Name::Bare(local) => write!(f, "{local:?}"),
        }
    }
}

/// Another name for mailboxes of ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Alias {
    pub name: Name,
    /// At least one.
    pub targets: Vec<Target>,
    pub origin: Origin,
}

/// Where an alias leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    pub mailbox: Mailbox,
    /// `\alice`: the mailbox, whatever aliases there are.
    pub direct: bool,
    pub origin: Origin,
}

/// Where something is written. Shown as `aliases:12`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Origin {
    pub file: Arc<Path>,
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.file.file_name().unwrap_or(self.file.as_os_str());
        write!(f, "{}:{}", name.display(), self.line)
    }
}

/// What is wrong with the rules, and where it is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mistake {
    pub origin: Origin,
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
    pub place: Place,
    /// The rules on the way there, and the one that took it.
    pub via: Vec<Rule>,
    pub rule: Rule,
    /// It must be taken somewhere, even if a next hop does not know it (RFC 5321 section 4.5.1).
    pub fallback: bool,
}

/// Where a message ends up.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Place {
    Maildir {
        path: PathBuf,
        /// Maildir++ folders for the detail, without their dot: the first that exists. None: the inbox.
        folders: Vec<String>,
    },
    NextHop(NextHop),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, folders) = match self {
            Place::NextHop(hop) => return hop.fmt(f),
            Place::Maildir { path, folders } => (path.display(), folders),
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
pub enum Rule {
    /// Rule 0, to this domain.
    BarePostmaster(Domain),
    /// Rule 1, to this domain.
    DomainAlias(Domain),
    /// Rules 3, 5 and 7. The detail was dropped.
    Alias { name: Name, origin: Origin, detail: Option<String> },
    /// Rules 4 and 5.
    User { detail: Option<String> },
    /// Rule 6, to another address.
    Postmaster,
    /// Rule 6, to a mailbox that nobody declared.
    PostmasterByDefault { detail: Option<String> },
    /// Rule 9.
    CatchAll { domain: Domain, detail: Option<String> },
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let detail = match self {
            Rule::BarePostmaster(domain) => return write!(f, "bare postmaster of {domain}"),
            Rule::DomainAlias(domain) => return write!(f, "domain alias of {domain}"),
            Rule::Postmaster => return f.write_str("postmaster"),
            Rule::Alias { name, origin, detail } => {
                write!(f, "alias {name} ({origin})")?;
                return match detail {
                    Some(detail) => write!(f, " without its detail {detail:?}"),
                    None => Ok(()),
                };
            }
            Rule::User { detail } => {
                f.write_str("user")?;
                detail
            }
            Rule::PostmasterByDefault { detail } => {
                f.write_str("postmaster by default")?;
                detail
            }
            Rule::CatchAll { domain, detail } => {
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
enum Refusal {
    /// Rule 2.
    Foreign,
    /// Rule 8.
    Exception,
    /// Rule 10.
    Nobody,
    /// Its folder could have no name.
    Nameless,
}

impl Refusal {
    fn reply(self) -> Reply {
        match self {
            // A turned session is no relay.
            Refusal::Foreign => Reply::new(550, "5.7.1", "Relaying denied: that domain has no mailboxes here"),
            _ => Reply::new(550, "5.1.1", "No such mailbox here"),
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Refusal::Foreign => "foreign: no rule for that domain",
            Refusal::Exception => "exception",
            Refusal::Nobody => "no rule takes it",
            Refusal::Nameless => "a local part that is empty, or too long for a folder",
        }
    }
}

/// The delivery rules of a customer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rules {
    root: PathBuf,
    /// Those with rules, the first is home, then the aliases of domains.
    domains: Vec<Domain>,
    domain_aliases: HashMap<Domain, Domain>,
    /// Addresses and domains of `accept`.
    accept: HashSet<Name>,
    except: HashSet<Name>,
    aliases: HashMap<Name, Alias>,
    separators: String,
    postmaster: Option<Mailbox>,
    /// For an address or a domain.
    routes: HashMap<Name, Route>,
    /// For all others.
    route: Route,
}

/// What one rule makes of an address.
enum Found<'a> {
    Alias(&'a Alias, Option<String>),
    /// Rule 6 sends it there.
    Postmaster(Mailbox),
    /// It is a mailbox: its name without the detail.
    Mailbox {
        local: String,
        detail: Option<String>,
        rule: Rule,
    },
    Refused(Refusal),
}

/// A step on the way through aliases.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Step {
    Alias(Name),
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

impl Rules {
    /// Makes rules of what is written, if they make sense.
    pub fn new(written: Written) -> Result<Rules, Mistake> {
        let mut rules = Rules {
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
                        return Err(mistake(&origin, format!("{name} stands here twice: take one of the two out")));
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
        self.trace(path).1.map_err(Refusal::reply)
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
        for (number, Delivery { mailbox, place, via, rule, .. }) in deliveries.iter().enumerate() {
            if let Some((first, rest)) = via.get(begin.len()..).and_then(<[Rule]>::split_first) {
                match first {
                    _ if number > 0 => {}
                    // Its name was just said.
                    Rule::Alias { name: Name::Address(..) | Name::Bare(_), origin, detail: None } => {
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
            Some(Found::Mailbox { local, .. }) => local,
            _ => mailbox.local().to_owned(),
        };
        self.root.join(mailbox.host().to_string()).join(folder(&local))
    }

    /// Where a final address belongs, whatever aliases say of it: for mail that was taken for it and waits. `None`: it
    /// is nobody's any more.
    pub fn place_of(&self, mailbox: &Mailbox) -> Option<Place> {
        let domain = mailbox.domain().filter(|domain| self.serves(domain))?;
        match self.look(mailbox.local(), domain, false) {
            Found::Mailbox { local, detail, .. } => Some(self.place(&local, domain, detail.as_deref())),
            _ => None,
        }
    }

    /// Whether some mail goes to next hops.
    pub fn hands_over(&self) -> bool {
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
        matches!(found, Some(Found::Mailbox { rule: Rule::PostmasterByDefault { .. }, .. }))
    }

    /// Rules 0 to 2, and what comes of the others.
    fn trace(&self, path: &ForwardPath) -> (Vec<Rule>, Result<Vec<Delivery>, Refusal>) {
        let mut via = Vec::new();
        let mut mailbox = match path {
            ForwardPath::Mailbox(mailbox) => mailbox.clone(),
            ForwardPath::Postmaster => match self.domains.first().and_then(|home| address("postmaster", home)) {
                Some(mailbox) => mailbox,
                None => return (via, Err(Refusal::Nobody)),
            },
        };
        if let (ForwardPath::Postmaster, Some(home)) = (path, mailbox.domain()) {
            via.push(Rule::BarePostmaster(home.clone()));
        } else if let Some(domain) = mailbox.domain().and_then(|domain| self.domain_aliases.get(domain)) {
            via.push(Rule::DomainAlias(domain.clone()));
            mailbox = self.canonical(mailbox);
        }
        let begin = via.clone();
        let mut walk = Walk { rules: self, via, seen: HashSet::new(), deliveries: Vec::new() };
        let result = walk.go(&mailbox, self.find(&mailbox, true));
        (begin, result.map(|()| walk.deliveries))
    }

    /// Rule 1.
    fn canonical(&self, mailbox: Mailbox) -> Mailbox {
        let domain = mailbox.domain().and_then(|domain| self.domain_aliases.get(domain));
        domain.and_then(|domain| address(mailbox.local(), domain)).unwrap_or(mailbox)
    }

    /// Rules 2 to 10, for an address of a domain in its own name.
    fn find(&self, mailbox: &Mailbox, aliases: bool) -> Found<'_> {
        match mailbox.domain() {
            Some(domain) if self.serves(domain) => self.look(mailbox.local(), domain, aliases),
            _ => Found::Refused(Refusal::Foreign),
        }
    }

    /// Rules 3 to 10.
    fn look(&self, local: &str, domain: &Domain, aliases: bool) -> Found<'_> {
        let (base, detail) = self.split(local);
        let detail = detail.map(str::to_owned);
        // 3 to 5.
        let both = [(local, None), (base, detail.clone())];
        for (local, detail) in both.into_iter().take(if detail.is_some() { 2 } else { 1 }) {
            let name = Name::address(local, domain);
            if let Some(alias) = self.aliases.get(&name).or_else(|| self.aliases.get(&Name::bare(local)))
                && aliases
            {
                return Found::Alias(alias, detail);
            }
            if self.accept.contains(&name) {
                return found(local, detail.clone(), Rule::User { detail });
            }
        }
        // 6.
        let role = base.to_lowercase();
        if role == "postmaster" || role == "abuse" {
            match (&self.postmaster, address("postmaster", domain)) {
                (Some(mailbox), _) if !is(mailbox, &role, domain) => return Found::Postmaster(mailbox.clone()),
                (None, Some(mailbox)) if role == "abuse" => return Found::Postmaster(mailbox),
                _ => return found(base, detail.clone(), Rule::PostmasterByDefault { detail }),
            }
        }
        // 7.
        let everybody = Name::Domain(domain.clone());
        if let Some(alias) = self.aliases.get(&everybody)
            && aliases
        {
            return Found::Alias(alias, None);
        }
        // 8 to 10.
        if [local, base].iter().any(|local| self.except.contains(&Name::address(local, domain))) {
            return Found::Refused(Refusal::Exception);
        }
        if self.accept.contains(&everybody) {
            return found(base, detail.clone(), Rule::CatchAll { domain: domain.clone(), detail });
        }
        Found::Refused(Refusal::Nobody)
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
    fn follow(&self, alias: &Alias, target: &Target) -> Found<'_> {
        match self.find(&target.mailbox, !target.direct) {
            Found::Alias(same, _) if same.name == alias.name => self.find(&target.mailbox, false),
            other => other,
        }
    }

    fn place(&self, local: &str, domain: &Domain, detail: Option<&str>) -> Place {
        let address = self.routes.get(&Name::address(local, domain)).map(|route| (route, 0));
        let whole = || self.routes.get(&Name::Domain(domain.clone())).map(|route| (route, 1));
        let (route, levels) = address.or_else(whole).unwrap_or((&self.route, 2));
        let path = match route {
            Route::NextHop(hop) => return Place::NextHop(hop.clone()),
            Route::Maildir(path) => path,
        };
        let path = match levels {
            0 => path.clone(),
            1 => path.join(folder(local)),
            _ => path.join(domain.as_str()).join(folder(local)),
        };
        Place::Maildir { path, folders: detail.map_or_else(Vec::new, folders) }
    }
}

/// A mailbox, unless its folder could have no name.
fn found<'a>(local: &str, detail: Option<String>, rule: Rule) -> Found<'a> {
    if local.is_empty() || folder(local).len() > FOLDER_LIMIT {
        return Found::Refused(Refusal::Nameless);
    }
    Found::Mailbox { local: local.to_owned(), detail, rule }
}

/// From an address to its places.
struct Walk<'a> {
    rules: &'a Rules,
    via: Vec<Rule>,
    /// Aliases whose places are found.
    seen: HashSet<Name>,
    deliveries: Vec<Delivery>,
}

impl Walk<'_> {
    fn go(&mut self, mailbox: &Mailbox, found: Found<'_>) -> Result<(), Refusal> {
        match found {
            Found::Refused(refusal) => return Err(refusal),
            Found::Mailbox { local, detail, rule } => self.arrive(mailbox, &local, detail.as_deref(), rule),
            Found::Postmaster(mailbox) => {
                self.via.push(Rule::Postmaster);
                self.go(&mailbox, self.rules.find(&mailbox, true))?;
                self.via.pop();
            }
            Found::Alias(alias, detail) => {
                if !self.seen.insert(alias.name.clone()) {
                    return Ok(());
                }
                self.via.push(Rule::Alias { name: alias.name.clone(), origin: alias.origin.clone(), detail });
                for target in &alias.targets {
                    self.go(&target.mailbox, self.rules.follow(alias, target))?;
                }
                self.via.pop();
            }
        }
        Ok(())
    }

    fn arrive(&mut self, mailbox: &Mailbox, local: &str, detail: Option<&str>, rule: Rule) {
        let Some(domain) = mailbox.domain() else { return };
        let place = self.rules.place(local, domain, detail);
        let same = |other: &Delivery| {
            other.place == place
                && (matches!(place, Place::Maildir { .. })
                    || is(&other.mailbox, &mailbox.local().to_lowercase(), domain))
        };
        // One too many is enough for the check that there are not too many.
        if self.deliveries.len() <= PLACES && !self.deliveries.iter().any(same) {
            let fallback = matches!(rule, Rule::PostmasterByDefault { .. });
            let via = self.via.clone();
            self.deliveries.push(Delivery { mailbox: mailbox.clone(), place, via, rule, fallback });
        }
    }
}

// What makes no sense. Each text says what is wrong and the way out.

impl Rules {
    fn add_domains(
        &mut self,
        accept: &[(Name, Origin)],
        aliases: &[Alias],
        domain_aliases: Vec<(Domain, Domain, Origin)>,
    ) -> Result<(), Mistake> {
        let names = accept.iter().map(|(name, _)| name).chain(aliases.iter().map(|alias| &alias.name));
        let mut known: HashSet<_> = self.domains.iter().cloned().collect();
        for domain in names.filter_map(Name::domain) {
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
                return Err(mistake(origin, text));
            }
            if !known.contains(to) {
                let text = match domain_aliases.iter().any(|(from, ..)| from == to) {
                    true => format!("{to} is itself another name only: write the domain that it stands for"),
                    false => format!("{to} has no rules here: add it to `accept`, such as \"@{to}\""),
                };
                return Err(mistake(origin, text));
            }
        }
        for (from, to, origin) in domain_aliases {
            if self.domain_aliases.insert(from.clone(), to).is_some() {
                return Err(mistake(&origin, format!("{from} stands here twice: take one of the two out")));
            }
            self.domains.push(from);
        }
        Ok(())
    }

    /// Says in which order they are written.
    fn add_aliases(&mut self, aliases: Vec<Alias>) -> Result<Vec<Name>, Mistake> {
        let mut order = Vec::with_capacity(aliases.len());
        for mut alias in aliases {
            if let Some(other) = self.aliases.get(&alias.name) {
                let text = format!(
                    "{} stands in {} too: put all targets into one of the two, and take the other out",
                    alias.name, other.origin
                );
                return Err(mistake(&alias.origin, text));
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
    fn check_accepted(&self, name: &Name, origin: &Origin) -> Result<(), Mistake> {
        let alias = match name {
            Name::Address(local, _) if local.is_empty() || folder(local).len() > FOLDER_LIMIT => {
                let text = format!("{name} can have no mailbox: its local part is empty, or too long for a folder");
                return Err(mistake(origin, text));
            }
            Name::Address(local, domain) => self.alias_over(local, domain),
            name => self.aliases.get(name),
        };
        let Some(alias) = alias else { return Ok(()) };
        let both = match name {
            Name::Address(..) => format!(", or, for both, add {name} to its targets"),
            _ => String::new(),
        };
        let text = format!(
            "{name} is in `accept` and an alias ({}) that keeps all mail from it: take one out{both}",
            alias.origin
        );
        Err(mistake(origin, text))
    }

    /// The alias that takes all mail from a mailbox; `local` is in lower case.
    fn alias_over(&self, local: &str, domain: &Domain) -> Option<&Alias> {
        match self.look(local, domain, true) {
            Found::Alias(alias, None) => {
                let left_out = !alias.targets.iter().any(|target| self.means(target, local, domain));
                left_out.then_some(alias)
            }
            _ => None,
        }
    }

    /// Whether a target is this mailbox, with a detail or without.
    fn means(&self, target: &Target, local: &str, domain: &Domain) -> bool {
        let (base, _) = self.split(target.mailbox.local());
        is(&target.mailbox, local, domain) || (base.to_lowercase() == local && target.mailbox.domain() == Some(domain))
    }

    /// An exception that no catch-all would come to means something else than it says.
    fn check_exception(&self, name: &Name, origin: &Origin) -> Result<(), Mistake> {
        let Name::Address(local, domain) = name else { return Ok(()) };
        let text = match self.look(local, domain, true) {
            Found::Mailbox { rule: Rule::CatchAll { .. }, .. } => return Ok(()),
            Found::Refused(Refusal::Exception | Refusal::Nameless) => return Ok(()),
            Found::Mailbox { rule: Rule::User { .. }, local, .. } => {
                format!("{} is in `accept` too: take one of the two out", Name::address(&local, domain))
            }
            Found::Alias(alias, _) => format!("{name} is an alias too ({}): take one of the two out", alias.origin),
            Found::Postmaster(_) | Found::Mailbox { .. } => format!(
                "{name} must be taken (RFC 5321 section 4.5.1, RFC 2142): take it out, and say with `postmaster` who \
                 reads it"
            ),
            Found::Refused(_) => format!(
                "{name} is an exception of nothing: `except` is for the domains that `accept` takes whole, and \
                 \"@{domain}\" is not among them"
            ),
        };
        Err(mistake(origin, text))
    }

    /// Every target must lead to a mailbox here.
    fn check_targets(&self, alias: &Alias) -> Result<(), Mistake> {
        for target in &alias.targets {
            let Found::Refused(refusal) = self.follow(alias, target) else { continue };
            let (name, to) = (&alias.name, &target.mailbox);
            let text = match refusal {
                Refusal::Foreign => {
                    format!("the alias {name} leads to {to}, which is not in a domain of ours: {ELSEWHERE}")
                }
                refusal => format!(
                    "the alias {name} leads to {to}, which nobody takes ({}): add it to `accept`, or make an alias of it",
                    refusal.reason()
                ),
            };
            return Err(mistake(&target.origin, text));
        }
        Ok(())
    }

    fn check_postmaster(&self, mailbox: &Mailbox, origin: &Origin) -> Result<(), Mistake> {
        match self.find(mailbox, true) {
            Found::Refused(refusal) => {
                let text = format!(
                    "nobody takes {mailbox} ({}), and `postmaster` must lead to a mailbox here: add it to `accept`",
                    refusal.reason()
                );
                Err(mistake(origin, text))
            }
            _ => Ok(()),
        }
    }

    /// No alias may go in circles, too deep, or to too many places.
    fn check_steps(&self, order: &[Name]) -> Result<(), Mistake> {
        let mut depths = HashMap::new();
        for name in order {
            self.depth(Found::Alias(&self.aliases[name], None), &mut Vec::new(), &mut depths)?;
        }
        for name in order {
            let alias = &self.aliases[name];
            let mut walk = Walk { rules: self, via: Vec::new(), seen: HashSet::new(), deliveries: Vec::new() };
            for target in &alias.targets {
                // All targets were checked.
                let _ = walk.go(&target.mailbox, self.follow(alias, target));
                if walk.deliveries.len() > PLACES {
                    let text = format!(
                        "the alias {name} leads to more than {PLACES} mailboxes: that is a mailing list, for a program \
                         that keeps lists; {ELSEWHERE}"
                    );
                    return Err(mistake(&alias.origin, text));
                }
            }
        }
        Ok(())
    }

    /// So many steps lie between an address and its last mailbox; `depths`: those already known.
    fn depth(
        &self,
        found: Found<'_>,
        stack: &mut Vec<(Step, Option<Origin>)>,
        depths: &mut HashMap<Step, usize>,
    ) -> Result<usize, Mistake> {
        let step = match &found {
            Found::Alias(alias, _) => (Step::Alias(alias.name.clone()), Some(alias.origin.clone())),
            Found::Postmaster(mailbox) => (Step::Postmaster(mailbox.clone()), None),
            Found::Mailbox { .. } | Found::Refused(_) => return Ok(0),
        };
        let wrong = |from: usize, stack: &[(Step, Option<Origin>)], text: &str| {
            let steps = stack[from..].iter().chain([&step]).map(|(step, _)| step.to_string());
            let text = format!("{}: {text}", steps.collect::<Vec<_>>().join(" -> "));
            let origin = stack[from..].iter().chain([&step]).find_map(|(_, origin)| origin.as_ref());
            origin.map(|origin| mistake(origin, text))
        };
        if let Some(from) = stack.iter().position(|(other, _)| *other == step.0)
            && let Some(mistake) = wrong(from, stack, "these aliases go in circles: let one of them lead to a mailbox")
        {
            return Err(mistake);
        }
        let known = depths.get(&step.0).copied();
        if stack.len() + known.unwrap_or(1) > STEPS {
            let text = format!("more than {STEPS} steps from alias to alias: name the mailboxes earlier");
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
            Found::Alias(alias, _) => {
                for target in &alias.targets {
                    deepest = deepest.max(self.depth(self.follow(alias, target), stack, depths)?);
                }
            }
            Found::Postmaster(mailbox) => deepest = self.depth(self.find(&mailbox, true), stack, depths)?,
            Found::Mailbox { .. } | Found::Refused(_) => {}
        }
        stack.pop();
        depths.insert(step.0, deepest + 1);
        Ok(deepest + 1)
    }

    /// What `deliver` names must be a mailbox or a domain of ours.
    fn check_routed(&self, name: &Name, origin: &Origin) -> Result<(), Mistake> {
        let Some(domain) = name.domain() else { return Ok(()) };
        let text = match (name, self.domain_aliases.get(domain)) {
            (_, Some(own)) => format!("{domain} is another name of {own} only: write {own}"),
            (Name::Address(local, _), None) if self.serves(domain) => match self.look(local, domain, false) {
                Found::Mailbox { local: base, .. } if base == *local => match self.alias_over(local, domain) {
                    None => return Ok(()),
                    Some(alias) => format!(
                        "{name} gets no mail, as an alias ({}) sends it elsewhere: write where it leads, or take one \
                         of the two out",
                        alias.origin
                    ),
                },
                Found::Mailbox { local: base, .. } => format!(
                    "{name} is a mailbox with a detail, which goes where the mailbox does: write {}",
                    Name::address(&base, domain)
                ),
                Found::Postmaster(to) => format!("mail for {name} goes to {to}: write that"),
                Found::Alias(..) | Found::Refused(_) => format!(
                    "{name} is no mailbox of ours, and `deliver` is for mailboxes: add it to `accept`, or take this out"
                ),
            },
            (_, None) if self.serves(domain) => return Ok(()),
            (_, None) => format!("{domain} is no domain of ours: add it to `accept`, or take this out"),
        };
        Err(mistake(origin, text))
    }
}

/// The way out for mail that is to leave this machine, or to be more than delivered.
pub const ELSEWHERE: &str = "take that alias out, accept the address itself, and hand it to the local mail server, such \
                             as deliver = { \"info@example.org\" = \"smtp:127.0.0.1:25\" }";

fn mistake(origin: &Origin, text: String) -> Mistake {
    Mistake { origin: origin.clone(), text }
}

/// Whether a mailbox is this one; `local` is in lower case.
fn is(mailbox: &Mailbox, local: &str, domain: &Domain) -> bool {
    mailbox.domain() == Some(domain) && mailbox.local().to_lowercase() == local
}

/// Whether two addresses are one mailbox: local parts compare without case.
pub fn same(one: &Mailbox, other: &Mailbox) -> bool {
    one.host() == other.host() && one.local().to_lowercase() == other.local().to_lowercase()
}

/// `local@domain`, quoted as it must be; `None`: no such address can be.
pub fn address(local: &str, domain: &Domain) -> Option<Mailbox> {
    let escaped = local.replace('\\', r"\\").replace('"', "\\\"");
    Mailbox::parse(&format!("\"{escaped}\"@{domain}"))
}

/// The name of a mailbox's folder; safe as a name for anything.
pub fn folder(local: &str) -> String {
    translated(&local.to_lowercase(), true)
}

/// The names of Maildir++ folders for a detail, the best first; none of them has a dot.
fn folders(detail: &str) -> Vec<String> {
    let mut names = vec![translated(detail, false), translated(&detail.to_lowercase(), false)];
    names.dedup();
    // A stranger may not put mail where it is thrown away, and where no quota counts.
    let trash = |name: &String| name.eq_ignore_ascii_case("Trash");
    names.retain(|name| (1..=FOLDER_LIMIT).contains(&name.len()) && !trash(name));
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
        assert_eq!(folder("Alice.B"), "alice.b");
        assert_eq!(folder("user+detail"), "user+detail");
        assert_eq!(folder("../x"), "%2E.%2Fx");
        assert_eq!(folder("."), "%2E");
        assert_eq!(folder(".."), "%2E.");
        assert_eq!(folder("a/b c%"), "a%2Fb%20c%25");
        assert_eq!(folder("JÜRGEN"), "jürgen");
        assert_eq!(folder("\0"), "%00");
    }

    #[test]
    fn the_folder_of_a_detail_keeps_its_case_and_has_no_levels() {
        fn check(detail: &str, expected: &[&str]) {
            assert_eq!(folders(detail), expected, "{detail:?}");
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
        check(&"x".repeat(FOLDER_LIMIT + 1), &[]);
    }

    fn domain(text: &str) -> Domain {
        Domain::parse(text).unwrap()
    }

    /// Whoever it is in two domains, in one of them with Maildirs of its own.
    fn open() -> Rules {
        let origin = Origin { file: Path::new("odmr.toml").into(), line: 1 };
        let (home, other) = (domain("example.org"), domain("example.com"));
        Rules::new(Written {
            root: "/var/mail".into(),
            home: home.clone(),
            accept: vec![(Name::Domain(home), origin.clone()), (Name::Domain(other.clone()), origin.clone())],
            except: Vec::new(),
            aliases: Vec::new(),
            domain_aliases: Vec::new(),
            separators: "+-".to_owned(),
            postmaster: None,
            routes: vec![(Some(Name::Domain(other)), Route::Maildir("/srv".into()), origin)],
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
        !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']) && name.len() <= FOLDER_LIMIT
    }

    proptest! {
        #[test]
        fn no_local_part_makes_a_path(local: String) {
            let name = folder(&local);
            prop_assert!(!name.starts_with('.') && !name.contains('/') && !name.contains('\0'));
        }

        #[test]
        fn two_local_parts_have_two_folders(one in "[ -~]{1,8}", other in "[ -~]{1,8}") {
            let same = one.eq_ignore_ascii_case(&other);
            prop_assert_eq!(folder(&one) == folder(&other), same);
        }

        #[test]
        fn no_detail_makes_a_path(detail: String) {
            for name in folders(&detail) {
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
            let Place::Maildir { path, folders } = &deliveries[0].place else {
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
