//! The address that gets mail for names without a mailbox, in the domains that are in `accept` as a whole (rule 9).
//!
//! A name has a mailbox if its Maildir exists, or if the configuration mentions it: as the target of an alias, as
//! `postmaster`, in `catch-all` or in `deliver`. Without this rule, a sender could make a Maildir of each word of a
//! dictionary. Mail with a next hop always goes there: the next hop has its own list of names.

use super::input::{
    AddressPattern, CatchAll, CatchAllRule, ConfigError, Located, Route, SourceLine, TargetKind, address,
};
use super::{Destination, MailboxExists, Match, MatchedRule, RecipientRules};
use crate::mail::address::{Domain, Mailbox};

impl RecipientRules {
    /// A note on the first line of a domain in `accept` without a `catch-all`: mail for its names without a mailbox goes to
    /// postmaster. `None`: there is no such domain.
    pub fn catch_all_note(&self) -> Option<&ConfigError> {
        self.catch_all_note.as_ref()
    }

    /// The address that gets the mail of a name without a mailbox, and the rule. `None`: the name has one, or needs none.
    pub(super) fn catch_all_target(
        &self, found: &Match<'_>, mailbox_exists: MailboxExists<'_>,
    ) -> Option<(Mailbox, MatchedRule)> {
        let Match::Mailbox { local, rule: MatchedRule::CatchAll { domain, .. }, .. } = found else { return None };
        let catch_all = self.catch_all_of(domain);
        let target = self.address_of(catch_all, domain)?;
        let Destination::Maildir { path, .. } = self.destination(local, domain, None) else { return None };
        if self.named.contains(&AddressPattern::address(local, domain)) || mailbox_exists(&path) {
            return None;
        }
        let to_postmaster = *catch_all == CatchAll::Postmaster;
        Some((target, MatchedRule::CatchAllAddress { domain: domain.clone(), to_postmaster }))
    }

    fn catch_all_of(&self, domain: &Domain) -> &CatchAll {
        self.catch_alls.get(domain).unwrap_or(&self.catch_all)
    }

    /// `None`: a mailbox is made for each name.
    fn address_of(&self, catch_all: &CatchAll, domain: &Domain) -> Option<Mailbox> {
        match catch_all {
            CatchAll::Create => None,
            CatchAll::Postmaster => address("postmaster", domain),
            CatchAll::Mailbox(mailbox) => Some(mailbox.clone()),
        }
    }

    /// Whether the names of a domain have Maildirs, not counting names with their own route.
    fn has_maildirs(&self, domain: &Domain) -> bool {
        let route = self.routes.get(&AddressPattern::Domain(domain.clone())).unwrap_or(&self.route);
        matches!(route, Route::Maildir(_))
    }

    /// Adds the catch-alls. Call it after all other rules are added.
    ///
    /// # Errors
    ///
    /// A catch-all has no effect, or leads to no mailbox here; or a domain has neither a catch-all nor a postmaster here.
    pub(super) fn add_catch_alls(
        &mut self, rules: &[CatchAllRule], accept: &[Located<AddressPattern>],
    ) -> Result<(), ConfigError> {
        for CatchAllRule { domain, catch_all, source } in rules {
            let catch_all = match catch_all {
                CatchAll::Mailbox(mailbox) => CatchAll::Mailbox(self.canonical(mailbox.clone())),
                other => other.clone(),
            };
            let Some(domain) = domain else {
                self.catch_all = catch_all;
                continue;
            };
            self.check_catch_all_domain(domain, source)?;
            if self.catch_alls.insert(domain.clone(), catch_all).is_some() {
                return Err(source.duplicate(domain));
            }
        }
        self.name_mailboxes();
        for CatchAllRule { catch_all, source, .. } in rules {
            let CatchAll::Mailbox(mailbox) = catch_all else { continue };
            if let Some(fault) = self.fault_of(&self.canonical(mailbox.clone()), true) {
                return Err(source.error(format!(
                    "{mailbox} leads to no mailbox here ({fault}), and `catch-all` must: name another address, or add this \
                     one to `accept`"
                )));
            }
        }
        self.check_postmasters(rules, accept)
    }

    /// Rejects a catch-all for a domain in which no name needs one: it has no effect.
    fn check_catch_all_domain(&self, domain: &Domain, source: &SourceLine) -> Result<(), ConfigError> {
        let text = match self.domain_aliases.get(domain) {
            Some(own) => format!("{domain} is another name of {own} only: write {own}"),
            None if !self.accept.contains(&AddressPattern::Domain(domain.clone())) => format!(
                "a catch-all for {domain} has no effect: it is for the domains that are in `accept` as a whole, and \
                 \"@{domain}\" is not among them"
            ),
            None if !self.has_maildirs(domain) => format!(
                "a catch-all for {domain} has no effect, as `deliver` gives all its names to a next hop: remove one of the \
                 two"
            ),
            None => return Ok(()),
        };
        Err(source.error(text))
    }

    /// Records the names that have a mailbox because the configuration mentions them.
    fn name_mailboxes(&mut self) {
        let targets = self.aliases.values().flat_map(|alias| &alias.targets).filter_map(|target| match &target.kind {
            TargetKind::Mailbox { mailbox, .. } => Some(mailbox),
            TargetKind::Discard | TargetKind::Unserved(_) => None,
        });
        let catch_alls = [&self.catch_all].into_iter().chain(self.catch_alls.values()).filter_map(|to| match to {
            CatchAll::Mailbox(mailbox) => Some(mailbox),
            CatchAll::Create | CatchAll::Postmaster => None,
        });
        let named = targets.chain(catch_alls).chain(&self.postmaster).filter_map(|mailbox| {
            let (local, _) = self.split(mailbox.local());
            mailbox.domain().map(|domain| AddressPattern::address(local, domain))
        });
        let routed = self.routes.keys().filter(|pattern| matches!(pattern, AddressPattern::Address(..))).cloned();
        self.named = named.chain(routed).collect();
    }

    /// Rejects a domain that needs postmaster as its catch-all and has no postmaster here. Makes the note on domains without a
    /// `catch-all`.
    fn check_postmasters(
        &mut self, rules: &[CatchAllRule], accept: &[Located<AddressPattern>],
    ) -> Result<(), ConfigError> {
        let for_all = rules.iter().find(|rule| rule.domain.is_none());
        let (mut unsaid, mut faulty) = (Vec::new(), Vec::new());
        for Located { value, source } in accept {
            let AddressPattern::Domain(domain) = value else { continue };
            if *self.catch_all_of(domain) != CatchAll::Postmaster || !self.has_maildirs(domain) {
                continue;
            }
            let rule = rules.iter().find(|rule| rule.domain.as_ref() == Some(domain)).or(for_all);
            let Some(postmaster) = address("postmaster", domain) else { continue };
            match self.fault_of(&postmaster, false) {
                Some(fault) => faulty.push((domain, fault, rule.map_or(source, |rule| &rule.source))),
                None if rule.is_none() => unsaid.push((postmaster, source)),
                None => {}
            }
        }
        let and_others = |count: usize| match count - 1 {
            0 => String::new(),
            others => format!(", and so in {others} other domains"),
        };
        if let [(domain, fault, source), others @ ..] = &faulty[..] {
            let (others, key) = (and_others(faulty.len()), if others.is_empty() { domain.as_str() } else { "*" });
            return Err(source.error(format!(
                "postmaster@{domain} gets mail for names without a mailbox, and leads to none ({fault}){others}: below \
                 [mailboxes] write catch-all = {{ \"{key}\" = \"alice@{domain}\" }}, or another address here, or catch-all \
                 = \"create\" for a mailbox of each name"
            )));
        }
        self.catch_all_note = unsaid.first().map(|(postmaster, source)| {
            let others = and_others(unsaid.len());
            source.error(format!(
                "mail for names without a mailbox goes to {postmaster}{others}; catch-all = \"postmaster\" below \
                 [mailboxes] means the same, an address there gets it instead, and \"create\" makes a mailbox of each name"
            ))
        });
        Ok(())
    }

    /// Why mail for the address of a catch-all would not reach a mailbox here; `None`: it would. `may_discard`: `/dev/null` is
    /// permitted.
    fn fault_of(&self, target: &Mailbox, may_discard: bool) -> Option<String> {
        match self.deliveries_to(target, Vec::new()) {
            Err((reason, via)) => Some(self.unserved_target(&via).unwrap_or(reason.text()).to_owned()),
            Ok(deliveries) => {
                let elsewhere = deliveries.iter().find(|delivery| delivery.destination == Destination::Elsewhere);
                let discards = || deliveries.iter().all(|delivery| delivery.destination == Destination::Discard);
                match elsewhere {
                    Some(delivery) => Some(format!("an alias leads to {}", delivery.mailbox)),
                    None => (!may_discard && discards()).then(|| "an alias leads to /dev/null".to_owned()),
                }
            }
        }
    }
}
