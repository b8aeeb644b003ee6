//! The delivery rules of a customer: which recipients exist, where their mail goes, and by which rule.
//!
//! Pure: no files, no sockets, no clock. The configuration makes a [`RuleInput`]; [`RecipientRules::new`] checks it.
//! The rules for an address, in this order:
//!
//! 0. *bare postmaster*: `Postmaster` without a domain is postmaster@ the first domain of `accept` (RFC 5321 section 4.5.1).
//! 1. *domain alias*: another name of a domain is replaced by the domain's own name.
//! 2. *foreign*: no rule is for that domain. Rejected: a turned session must not relay to other hosts.
//! 3. *alias* of the whole address, or of its local part in every domain.
//! 4. *user*: the address is in `accept`.
//! 5. *detail*: rules 3 and 4 again, without the first separator and the text after it (`alice+detail`). A user keeps the
//!    detail, an alias drops it.
//! 6. *postmaster*: if postmaster@ and abuse@ have no rule of their own, their mail goes to `postmaster`. Without that key
//!    postmaster is a mailbox by default, which also gets mail for abuse.
//! 7. *alias of the domain*: `@example.org`.
//! 8. *exception*: rejected, with or without detail.
//! 9. *catch-all*: the mailbox of the local part without its detail, if there is one; otherwise the domain's
//!    `catch-all` address, by default postmaster (see `catch_all`).
//! 10. *no rule*: rejected.
//!
//! A target of an alias may also be `/dev/null`, which discards the message, or an address elsewhere, for mail that is
//! submitted here. If any target is elsewhere, mail from the provider is deferred: it would otherwise be relayed, or lost for
//! that target. If any target is not served, such as a program, all mail is deferred: it would be lost for that target.
//!
//! Local parts compare without case, domains as [`Domain`] does. An alias that has its own name as a target leads to the
//! mailbox of that name, and so does a target with a backslash in front: rules 3, 5 and 7 then ignore aliases.

mod catch_all;
mod check;
mod input;
mod known;
mod names;

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

pub use self::input::{
    AddressPattern, Alias, AliasTarget, CatchAll, CatchAllRule, ConfigError, DomainAlias, FORWARD_HINT, Located,
    NextHop, Route, RouteRule, RuleInput, SourceLine, TargetKind, address, same_mailbox,
};
pub use self::known::{ListedRecipient, RecipientList};
pub use self::names::directory_name;

use self::input::is;
use self::names::{folder_names, has_directory_name};
use crate::mail::address::{Domain, ForwardPath, Mailbox, forward_path};
use crate::smtp::reply::Reply;

/// The maximum of destinations of one address.
const DESTINATION_LIMIT: usize = 100;

/// Returns whether there is a Maildir at this path. The rules themselves read no files.
pub type MailboxExists<'a> = &'a dyn Fn(&Path) -> bool;

/// One copy of a message, for one mailbox.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Delivery {
    /// The final address: the domain's own name, and the local part with its detail, spelled as in the RCPT command.
    pub mailbox: Mailbox,
    pub destination: Destination,
    /// The rules that led to the mailbox, in their order.
    pub via: Vec<MatchedRule>,
    /// The rule that accepted the mailbox.
    pub rule: MatchedRule,
    /// RFC 5321 section 4.5.1: the message must be accepted even if the next hop rejects the recipient.
    pub fallback: bool,
}

/// The destination of a delivery.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Destination {
    Maildir {
        path: PathBuf,
        /// Maildir++ folders for the detail, without their dot. The first that exists gets the message; if none does, the
        /// inbox.
        folders: Vec<String>,
    },
    NextHop(NextHop),
    /// `/dev/null`: the message is accepted and discarded.
    Discard,
    /// An address in none of our domains: mail that is submitted here goes to the outgoing queue.
    Elsewhere,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, folders) = match self {
            Destination::NextHop(hop) => return hop.fmt(f),
            Destination::Discard => return f.write_str("/dev/null"),
            Destination::Elsewhere => {
                return write!(
                    f,
                    "outgoing mail, if submitted here; from the provider deferred: {}",
                    elsewhere_reply()
                );
            }
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
    Alias { name: AddressPattern, source: SourceLine, detail: Option<String> },
    /// Rules 4 and 5.
    User { detail: Option<String> },
    /// Rule 6, to another address.
    Postmaster,
    /// Rule 6, to a mailbox that is not in `accept`.
    PostmasterByDefault { detail: Option<String> },
    /// Rule 9, to the mailbox of the name, or to its next hop.
    CatchAll { domain: Domain, detail: Option<String> },
    /// Rule 9, to another address, because the name has no mailbox. `to_postmaster`: to the domain's postmaster.
    CatchAllAddress { domain: Domain, to_postmaster: bool },
    /// The target of an alias, accepted and discarded.
    Discard,
    /// The target of an alias, in none of our domains.
    Elsewhere,
}

impl fmt::Display for MatchedRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rule, detail) = match self {
            MatchedRule::BarePostmaster(domain) => (format!("bare postmaster of {domain}"), &None),
            MatchedRule::DomainAlias(domain) => (format!("domain alias of {domain}"), &None),
            MatchedRule::Alias { name, source, detail } => (format!("alias {name} ({source})"), detail),
            MatchedRule::User { detail } => ("user".to_owned(), detail),
            MatchedRule::Postmaster => ("postmaster".to_owned(), &None),
            MatchedRule::PostmasterByDefault { detail } => ("postmaster by default".to_owned(), detail),
            MatchedRule::CatchAll { domain, detail } => (format!("catch-all @{domain}"), detail),
            MatchedRule::CatchAllAddress { domain, .. } => {
                (format!("no mailbox of that name, catch-all @{domain}"), &None)
            }
            MatchedRule::Discard => ("discard".to_owned(), &None),
            MatchedRule::Elsewhere => ("elsewhere".to_owned(), &None),
        };
        f.write_str(&rule)?;
        match (self, detail) {
            (_, None) => Ok(()),
            (MatchedRule::Alias { .. }, Some(detail)) => write!(f, " without its detail {detail:?}"),
            (_, Some(detail)) => write!(f, ", detail {detail:?}"),
        }
    }
}

/// Why a recipient is rejected, or deferred.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NoMailbox {
    /// Rule 2.
    Foreign,
    /// Rule 8.
    Exception,
    /// Rule 10.
    NoRule,
    /// No directory can have its name.
    Nameless,
    /// An alias with a target that is not served. It is deferred: the administrator may change the alias.
    Unserved,
}

impl NoMailbox {
    fn reply(self) -> Reply {
        match self {
            NoMailbox::Foreign => Reply::new(550, "5.7.1", "Relaying denied: that domain has no mailboxes here"),
            NoMailbox::Unserved => {
                Reply::new(451, "4.3.5", "The alias for that address has a target that is not served")
            }
            _ => Reply::new(550, "5.1.1", "No such mailbox here"),
        }
    }

    fn text(self) -> &'static str {
        match self {
            NoMailbox::Foreign => "foreign: no rule for that domain",
            NoMailbox::Exception => "exception",
            NoMailbox::NoRule => "no rule matches it",
            NoMailbox::Nameless => "a local part that is empty, or too long for a folder",
            NoMailbox::Unserved => "odmr check shows the remedy",
        }
    }
}

/// The reply to RCPT from the provider if an alias of the recipient leads elsewhere.
fn elsewhere_reply() -> Reply {
    Reply::new(451, "4.3.5", "The alias for that address leads to another host, and this is not a relay")
}

/// The deliveries of an address; or why it has none, and the rules that led there.
type TraceResult = Result<Vec<Delivery>, (NoMailbox, Vec<MatchedRule>)>;

/// The delivery rules of a customer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecipientRules {
    root: PathBuf,
    home: Domain,
    /// The domains with rules, the home domain first; then the aliases of domains.
    domains: Vec<Domain>,
    domain_aliases: HashMap<Domain, Domain>,
    /// Addresses and domains of `accept`.
    accept: HashSet<AddressPattern>,
    except: HashSet<AddressPattern>,
    aliases: HashMap<AddressPattern, Alias>,
    separators: String,
    postmaster: Option<Mailbox>,
    /// The routes of addresses and domains.
    routes: HashMap<AddressPattern, Route>,
    /// The route of all other recipients.
    route: Route,
    /// The catch-alls for names without a mailbox: of single domains, and of all other domains in `accept`.
    catch_alls: HashMap<Domain, CatchAll>,
    catch_all: CatchAll,
    /// Names that the configuration mentions: they have a mailbox even before its first message.
    named: HashSet<AddressPattern>,
    /// See [`RecipientRules::catch_all_note`].
    catch_all_note: Option<ConfigError>,
    /// See [`RecipientRules::warnings`].
    warnings: Vec<ConfigError>,
}

/// The rule that an address matches, and where the rule leads.
enum Match<'a> {
    Alias(&'a Alias, Option<String>),
    /// Rule 6, which continues with this address.
    Postmaster(Mailbox),
    /// A mailbox. `local`: without the detail.
    Mailbox {
        local: String,
        detail: Option<String>,
        rule: MatchedRule,
    },
    NoMailbox(NoMailbox),
    /// The target of an alias: `/dev/null`.
    Discard,
    /// The target of an alias, in none of our domains.
    Elsewhere(Mailbox),
}

impl RecipientRules {
    /// Changes the root of the Maildirs.
    pub fn set_root(&mut self, root: &Path) {
        let before = std::mem::replace(&mut self.root, root.to_owned());
        for route in self.routes.values_mut().chain([&mut self.route]) {
            if matches!(route, Route::Maildir(path) if *path == before) {
                *route = Route::Maildir(root.to_owned());
            }
        }
    }

    /// The domains of `accept`, then those of aliases, then the aliases of domains. Never empty; the first is the home domain.
    pub fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// The first domain of `accept`.
    pub fn home(&self) -> &Domain {
        &self.home
    }

    /// Whether at least one address of a domain is a recipient.
    pub fn serves(&self, domain: &Domain) -> bool {
        self.domains.contains(domain)
    }

    /// Warnings about aliases whose mail is deferred, all of it or that from the provider; each with the remedy.
    pub fn warnings(&self) -> &[ConfigError] {
        &self.warnings
    }

    /// The deliveries of mail from the provider: as [`RecipientRules::resolve`], but none is elsewhere.
    ///
    /// # Errors
    ///
    /// Those of [`RecipientRules::resolve`], and `451` with 4.3.5 if an alias leads elsewhere. Then no target gets the
    /// message: the provider has one status for the recipient, and would send the message again to the targets that have
    /// it.
    pub fn resolve_from_provider(
        &self, path: &ForwardPath, mailbox_exists: MailboxExists<'_>,
    ) -> Result<Vec<Delivery>, Reply> {
        let deliveries = self.resolve(path, mailbox_exists)?;
        match deliveries.iter().any(|delivery| delivery.destination == Destination::Elsewhere) {
            true => Err(elsewhere_reply()),
            false => Ok(deliveries),
        }
    }

    /// The deliveries of mail for a recipient: at least one, and no destination twice.
    ///
    /// # Errors
    ///
    /// The reply to RCPT: `550` with 5.1.1, or with 5.7.1 for a foreign domain; or `451` with 4.3.5 if an alias has a
    /// target that is not served.
    pub fn resolve(&self, path: &ForwardPath, mailbox_exists: MailboxExists<'_>) -> Result<Vec<Delivery>, Reply> {
        self.trace(path, mailbox_exists).1.map_err(|(reason, _)| reason.reply())
    }

    /// The number of aliases, including those of domains.
    pub fn alias_count(&self) -> usize {
        self.aliases.len() + self.domain_aliases.len()
    }

    /// The result of [`RecipientRules::resolve`] as text: one line, and for an alias one more line for each delivery. The last
    /// line has no line end.
    fn explain(&self, path: &ForwardPath, mailbox_exists: MailboxExists<'_>) -> Result<String, String> {
        let listed = |rules: &[MatchedRule]| rules.iter().map(|rule| format!(" {rule},")).collect::<String>();
        let (begin, result) = self.trace(path, mailbox_exists);
        let mut text = format!("{path}:{}", listed(&begin));
        let deliveries = result.map_err(|(reason, via)| match self.unserved_target(&via) {
            Some(what) if reason == NoMailbox::Unserved => {
                format!("{path}:{} deferred: {} ({what}; {})", listed(&via), reason.reply(), reason.text())
            }
            _ => format!("{text} rejected: {} ({})", reason.reply(), reason.text()),
        })?;
        for (number, Delivery { mailbox, destination, via, rule, .. }) in deliveries.iter().enumerate() {
            if let Some((first, rest)) = via.get(begin.len()..).and_then(<[MatchedRule]>::split_first) {
                let bare_or_address = |name: &_| !matches!(name, AddressPattern::Domain(_));
                let _ = match first {
                    _ if number > 0 => Ok(()),
                    // The line begins with the alias's name already.
                    MatchedRule::Alias { name, source, detail: None } if bare_or_address(name) => {
                        write!(text, " alias ({source})")
                    }
                    first => write!(text, " {first}"),
                };
                let _ = write!(text, "\n  {mailbox}:{}", listed(rest));
            }
            let _ = write!(text, " {rule} -> {destination}");
        }
        Ok(text)
    }

    /// Explains in text where mail for an address goes, and by which rules. The address may be in angle brackets.
    ///
    /// # Errors
    ///
    /// The explanation of a rejection or deferral, or the error if it is not a valid address.
    pub fn explain_typed(&self, typed: &str, mailbox_exists: MailboxExists<'_>) -> Result<String, String> {
        let typed = typed.trim();
        let bracketed = if typed.starts_with('<') { typed.to_owned() } else { format!("<{typed}>") };
        match forward_path(bracketed.as_bytes()) {
            Ok((ForwardPath::Mailbox(mailbox), used)) if used == bracketed.len() => {
                self.explain(&ForwardPath::Mailbox(mailbox.canonical()), mailbox_exists)
            }
            Ok((path, used)) if used == bracketed.len() => self.explain(&path, mailbox_exists),
            _ => Err(format!("{typed:?} is not an address: write one such as alice@example.org, or postmaster")),
        }
    }

    /// The Maildir of a [`Delivery::fallback`] that the next hop rejects: `ROOT/<domain>/<local part>`, without the detail.
    pub fn maildir_of(&self, mailbox: &Mailbox) -> PathBuf {
        let local = match mailbox.domain().map(|domain| self.look_up(mailbox.local(), domain, false)) {
            Some(Match::Mailbox { local, .. }) => local,
            _ => mailbox.local().to_owned(),
        };
        self.root.join(directory_name(&mailbox.host().to_string())).join(directory_name(&local))
    }

    /// The destination of mail for a [`Delivery::mailbox`] whose message was accepted earlier and waits in the queue.
    /// Aliases are not applied again. `None`: the configuration has changed, and it is not a mailbox any more.
    pub fn destination_of(&self, mailbox: &Mailbox, mailbox_exists: MailboxExists<'_>) -> Option<Destination> {
        let domain = mailbox.domain().filter(|domain| self.serves(domain))?;
        let found = self.look_up(mailbox.local(), domain, false);
        if let Some((target, rule)) = self.catch_all_target(&found, mailbox_exists) {
            // A queued recipient has one status, so of several mailboxes only the first gets the message.
            let deliveries = self.deliveries_to(&target, vec![rule]).unwrap_or_default();
            let mut destinations = deliveries.into_iter().map(|delivery| delivery.destination);
            if let Some(maildir) = destinations.find(|to| matches!(to, Destination::Maildir { .. })) {
                return Some(maildir);
            }
        }
        match found {
            Match::Mailbox { local, detail, .. } => Some(self.destination(&local, domain, detail.as_deref())),
            Match::Alias(..) | Match::Postmaster(_) | Match::NoMailbox(_) | Match::Discard | Match::Elsewhere(_) => {
                None
            }
        }
    }

    /// Whether any route leads to a next hop.
    pub fn has_next_hops(&self) -> bool {
        self.next_hops().next().is_some()
    }

    /// The next hops of all routes, possibly with duplicates.
    pub fn next_hops(&self) -> impl Iterator<Item = &NextHop> {
        [&self.route].into_iter().chain(self.routes.values()).filter_map(|route| match route {
            Route::NextHop(hop) => Some(hop),
            Route::Maildir(_) => None,
        })
    }

    /// The root, and the Maildirs or their roots of all routes, possibly with duplicates.
    pub fn maildir_roots(&self) -> impl Iterator<Item = &PathBuf> {
        let routes = [&self.route].into_iter().chain(self.routes.values());
        let named = routes.filter_map(|route| match route {
            Route::NextHop(_) => None,
            Route::Maildir(path) => Some(path),
        });
        [&self.root].into_iter().chain(named)
    }

    /// Whether an address is postmaster, or abuse by default (see [`Delivery::fallback`]).
    pub fn is_fallback(&self, mailbox: &Mailbox) -> bool {
        if self.split(mailbox.local()).0.eq_ignore_ascii_case("postmaster") {
            return true;
        }
        let found = mailbox.domain().map(|domain| self.look_up(mailbox.local(), domain, false));
        matches!(found, Some(Match::Mailbox { rule: MatchedRule::PostmasterByDefault { .. }, .. }))
    }

    /// The target that is not served, of the alias that is the last of these rules.
    fn unserved_target(&self, via: &[MatchedRule]) -> Option<&str> {
        let Some(MatchedRule::Alias { name, .. }) = via.last() else { return None };
        self.aliases.get(name)?.targets.iter().find_map(|target| match &target.kind {
            TargetKind::Unserved(what) => Some(what.as_str()),
            _ => None,
        })
    }

    /// Applies all rules. Returns which of rules 0 and 1 were applied, and the result.
    fn trace(&self, path: &ForwardPath, mailbox_exists: MailboxExists<'_>) -> (Vec<MatchedRule>, TraceResult) {
        let mut via = Vec::new();
        let mut mailbox = match path {
            ForwardPath::Mailbox(mailbox) => mailbox.canonical(),
            ForwardPath::Postmaster => match address("postmaster", &self.home) {
                Some(mailbox) => mailbox,
                None => return (via, Err((NoMailbox::NoRule, Vec::new()))),
            },
        };
        if let (ForwardPath::Postmaster, Some(home)) = (path, mailbox.domain()) {
            via.push(MatchedRule::BarePostmaster(home.clone()));
        } else if let Some(domain) = mailbox.domain().and_then(|domain| self.domain_aliases.get(domain)) {
            via.push(MatchedRule::DomainAlias(domain.clone()));
            mailbox = self.canonical(mailbox);
        }
        let begin = via.clone();
        if let Some((target, rule)) = self.catch_all_target(&self.find(&mailbox, true), mailbox_exists) {
            via.push(rule);
            mailbox = target;
        }
        (begin, self.deliveries_to(&mailbox, via))
    }

    /// The deliveries of an address by rules 2 to 10. `via`: the rules that led to the address.
    fn deliveries_to(&self, mailbox: &Mailbox, via: Vec<MatchedRule>) -> TraceResult {
        let mut expansion = Expansion::new(self, via);
        match expansion.expand(mailbox, self.find(mailbox, true)) {
            Ok(()) => Ok(expansion.deliveries),
            Err(reason) => Err((reason, expansion.via)),
        }
    }

    /// Rule 1: the address with the domain's own name.
    fn canonical(&self, mailbox: Mailbox) -> Mailbox {
        let domain = mailbox.domain().and_then(|domain| self.domain_aliases.get(domain));
        domain.map(|domain| mailbox.with_domain(domain)).unwrap_or(mailbox)
    }

    /// Rules 2 to 10. `aliases`: whether aliases count.
    fn find(&self, mailbox: &Mailbox, aliases: bool) -> Match<'_> {
        match mailbox.domain() {
            Some(domain) if self.serves(domain) => self.look_up(mailbox.local(), domain, aliases),
            _ => Match::NoMailbox(NoMailbox::Foreign),
        }
    }

    /// Rules 3 to 10.
    fn look_up(&self, local: &str, domain: &Domain, aliases: bool) -> Match<'_> {
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
        Match::NoMailbox(NoMailbox::NoRule)
    }

    /// Splits a local part from its detail, which may be empty. A separator in front of the local part does not count, because
    /// the name would be empty (RFC 5233 leaves the syntax to the site).
    fn split<'a>(&self, local: &'a str) -> (&'a str, Option<&'a str>) {
        let at = local.char_indices().skip(1).find(|(_, character)| self.separators.contains(*character));
        match at {
            Some((at, separator)) => (&local[..at], Some(&local[at + separator.len_utf8()..])),
            None => (local, None),
        }
    }

    /// Resolves a target of an alias. A target that is the alias itself leads to the mailbox of that name.
    fn follow(&self, alias: &Alias, target: &AliasTarget) -> Match<'_> {
        let (mailbox, direct) = match &target.kind {
            TargetKind::Mailbox { mailbox, direct } => (mailbox, *direct),
            TargetKind::Discard => return Match::Discard,
            TargetKind::Unserved(_) => return Match::NoMailbox(NoMailbox::Unserved),
        };
        match self.find(mailbox, !direct) {
            Match::Alias(same, _) if same.name == alias.name => self.find(mailbox, false),
            Match::NoMailbox(NoMailbox::Foreign) => Match::Elsewhere(mailbox.clone()),
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

/// The match of a mailbox, unless no directory can have its name.
fn found<'a>(local: &str, detail: Option<String>, rule: MatchedRule) -> Match<'a> {
    if !has_directory_name(local) {
        return Match::NoMailbox(NoMailbox::Nameless);
    }
    Match::Mailbox { local: local.to_owned(), detail, rule }
}

/// Collects the deliveries of an address.
struct Expansion<'a> {
    rules: &'a RecipientRules,
    via: Vec<MatchedRule>,
    /// Aliases that are already expanded.
    seen: HashSet<AddressPattern>,
    deliveries: Vec<Delivery>,
}

impl<'a> Expansion<'a> {
    fn new(rules: &'a RecipientRules, via: Vec<MatchedRule>) -> Expansion<'a> {
        Expansion { rules, via, seen: HashSet::new(), deliveries: Vec::new() }
    }

    fn expand(&mut self, mailbox: &Mailbox, found: Match<'_>) -> Result<(), NoMailbox> {
        match found {
            Match::NoMailbox(reason) => return Err(reason),
            Match::Mailbox { local, detail, rule } => self.deliver(mailbox, &local, detail.as_deref(), rule),
            Match::Discard => self.add(mailbox, Destination::Discard, MatchedRule::Discard),
            Match::Elsewhere(mailbox) => self.add(&mailbox, Destination::Elsewhere, MatchedRule::Elsewhere),
            Match::Postmaster(mailbox) => {
                self.via.push(MatchedRule::Postmaster);
                self.expand(&mailbox, self.rules.find(&mailbox, true))?;
                self.via.pop();
            }
            Match::Alias(alias, detail) => {
                if !self.seen.insert(alias.name.clone()) {
                    return Ok(());
                }
                self.via.push(MatchedRule::Alias { name: alias.name.clone(), source: alias.source.clone(), detail });
                for target in &alias.targets {
                    let to = match &target.kind {
                        TargetKind::Mailbox { mailbox, .. } => mailbox,
                        TargetKind::Discard | TargetKind::Unserved(_) => mailbox,
                    };
                    self.expand(to, self.rules.follow(alias, target))?;
                }
                self.via.pop();
            }
        }
        Ok(())
    }

    fn deliver(&mut self, mailbox: &Mailbox, local: &str, detail: Option<&str>, rule: MatchedRule) {
        if let Some(domain) = mailbox.domain() {
            self.add(mailbox, self.rules.destination(local, domain, detail), rule);
        }
    }

    /// Adds a delivery, unless the mailbox gets the message already.
    fn add(&mut self, mailbox: &Mailbox, destination: Destination, rule: MatchedRule) {
        let same_recipient = |other: &Delivery| match destination {
            Destination::Maildir { .. } | Destination::Discard => true,
            Destination::NextHop(_) => same_mailbox(&other.mailbox, mailbox),
            // Only the recipient's host knows whether case counts.
            Destination::Elsewhere => other.mailbox == *mailbox,
        };
        let same = |other: &Delivery| other.destination == destination && same_recipient(other);
        // One delivery more than the limit is enough for the check of the limit.
        if self.deliveries.len() <= DESTINATION_LIMIT && !self.deliveries.iter().any(same) {
            // Mail that postmaster gets as the catch-all must be accepted like postmaster's own.
            let caught = |rule: &MatchedRule| matches!(rule, MatchedRule::CatchAllAddress { to_postmaster: true, .. });
            let fallback = matches!(rule, MatchedRule::PostmasterByDefault { .. }) || self.via.iter().any(caught);
            let via = self.via.clone();
            self.deliveries.push(Delivery { mailbox: mailbox.clone(), destination, via, rule, fallback });
        }
    }
}

#[cfg(test)]
mod tests;
