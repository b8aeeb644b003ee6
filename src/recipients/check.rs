//! Makes [`RecipientRules`] of [`RuleInput`], and rejects rules that contradict each other, never apply, or lead nowhere.
//! Each error has the line and the remedy.

use std::collections::{HashMap, HashSet};
use std::fmt;

use super::input::{
    AddressPattern, Alias, AliasTarget, CatchAll, ConfigError, DomainAlias, FORWARD_HINT, Route, RuleInput, SourceLine,
    TargetKind, is,
};
use super::names::has_directory_name;
use super::{DESTINATION_LIMIT, Expansion, Match, MatchedRule, NoMailbox, RecipientRules};
use crate::mail::address::{Domain, Mailbox};

/// The maximum of steps from alias to alias until the mailbox.
const ALIAS_DEPTH_LIMIT: usize = 10;

impl RecipientRules {
    /// Makes rules of the input, and checks them.
    ///
    /// # Errors
    ///
    /// The first rule that contradicts another, has no effect, or leads nowhere. In the returned rules, no aliases lead in a
    /// circle. [`RecipientRules::warnings`] has the aliases that do not lead to mailboxes of this customer.
    pub fn new(input: RuleInput) -> Result<RecipientRules, ConfigError> {
        let mut rules = RecipientRules {
            route: Route::Maildir(input.root.clone()),
            root: input.root,
            domains: vec![input.home.clone()],
            home: input.home,
            domain_aliases: HashMap::new(),
            accept: input.accept.iter().map(|entry| entry.value.clone()).collect(),
            except: HashSet::new(),
            aliases: HashMap::new(),
            separators: input.separators,
            postmaster: None,
            routes: HashMap::new(),
            catch_alls: HashMap::new(),
            catch_all: CatchAll::default(),
            named: HashSet::new(),
            catch_all_note: None,
            warnings: Vec::new(),
        };
        let patterns = input.accept.iter().map(|entry| &entry.value);
        rules.add_domains(patterns.chain(input.aliases.iter().map(|alias| &alias.name)));
        rules.add_domain_aliases(input.domain_aliases)?;
        let order = rules.add_aliases(input.aliases)?;
        rules.postmaster = input.postmaster.as_ref().map(|entry| rules.canonical(entry.value.clone()));
        for entry in &input.accept {
            rules.check_accepted(&entry.value, &entry.source)?;
        }
        for entry in input.except {
            rules.check_exception(&entry.value, &entry.source)?;
            rules.except.insert(entry.value);
        }
        for name in &order {
            rules.check_targets(&rules.aliases[name])?;
        }
        if let (Some(mailbox), Some(entry)) = (&rules.postmaster, &input.postmaster) {
            rules.check_postmaster(mailbox, &entry.source)?;
        }
        rules.check_depths(&order)?;
        rules.check_destination_counts(&order)?;
        for rule in input.routes {
            match rule.pattern {
                None => rules.route = rule.route,
                Some(pattern) => {
                    rules.check_routed(&pattern, &rule.source)?;
                    if rules.routes.insert(pattern.clone(), rule.route).is_some() {
                        return Err(rule.source.duplicate(pattern));
                    }
                }
            }
        }
        rules.add_catch_alls(&input.catch_alls, &input.accept)?;
        rules.warnings = order.iter().flat_map(|name| rules.alias_warnings(&rules.aliases[name])).collect();
        Ok(rules)
    }

    /// The warnings about an alias that does not lead only to mailboxes here.
    fn alias_warnings(&self, alias: &Alias) -> Vec<ConfigError> {
        let name = &alias.name;
        let warning = |target: &AliasTarget| match (self.follow(alias, target), &target.kind) {
            (_, TargetKind::Unserved(what)) => Some(target.source.error(format!(
                "{what}, and aliases lead to mailboxes here: mail for {name} is deferred with 451; {FORWARD_HINT}; or \
                 write an alias {name} in `aliases`, which counts in place of this one"
            ))),
            (Match::Elsewhere(to), _) => Some(target.source.error(format!(
                "the alias {name} leads to {to}, which is not in one of our domains: mail from the provider for it is \
                 deferred with 451, and only mail that is submitted here is sent there; for both, {FORWARD_HINT}"
            ))),
            _ => None,
        };
        alias.targets.iter().filter_map(warning).collect()
    }

    /// Adds the domains of these patterns, each once.
    fn add_domains<'a>(&mut self, patterns: impl Iterator<Item = &'a AddressPattern>) {
        let mut known: HashSet<_> = self.domains.iter().cloned().collect();
        for domain in patterns.filter_map(AddressPattern::domain) {
            if known.insert(domain.clone()) {
                self.domains.push(domain.clone());
            }
        }
    }

    /// Adds the other names of domains. Such a name must have no rules, and its domain must have some.
    fn add_domain_aliases(&mut self, aliases: Vec<DomainAlias>) -> Result<(), ConfigError> {
        let known: HashSet<_> = self.domains.iter().cloned().collect();
        for DomainAlias { name, domain, source } in &aliases {
            if known.contains(name) {
                return Err(source.error(format!(
                    "{name} has rules, in `accept` or in aliases, and cannot be another name of {domain}: \
                     remove those, or this"
                )));
            }
            if !known.contains(domain) {
                return Err(source.error(match aliases.iter().any(|other| other.name == *domain) {
                    true => format!("{domain} is itself another name only: write the domain that it is a name of"),
                    false => format!("{domain} has no rules here: add it to `accept`, such as \"@{domain}\""),
                }));
            }
        }
        for DomainAlias { name, domain, source } in aliases {
            if self.domain_aliases.insert(name.clone(), domain).is_some() {
                return Err(source.duplicate(name));
            }
            self.domains.push(name);
        }
        Ok(())
    }

    /// Adds the aliases. Returns their names, in the order of the file.
    fn add_aliases(&mut self, aliases: Vec<Alias>) -> Result<Vec<AddressPattern>, ConfigError> {
        let mut order = Vec::with_capacity(aliases.len());
        for mut alias in aliases {
            match self.aliases.get(&alias.name) {
                // If one of two aliases of a name is for another mail server, only the other one counts.
                Some(_) if alias.is_unserved() => continue,
                Some(other) if other.is_unserved() => {}
                Some(other) => {
                    return Err(alias.source.error(format!(
                        "{} is in {} too: put all targets into one of the two, and remove the other",
                        alias.name, other.source
                    )));
                }
                None => order.push(alias.name.clone()),
            }
            for target in &mut alias.targets {
                if let TargetKind::Mailbox { mailbox, .. } = &mut target.kind {
                    *mailbox = self.canonical(mailbox.clone());
                }
            }
            self.aliases.insert(alias.name.clone(), alias);
        }
        Ok(order)
    }

    /// Rejects an accepted address or domain if an alias gets all its mail.
    fn check_accepted(&self, pattern: &AddressPattern, source: &SourceLine) -> Result<(), ConfigError> {
        let alias = match pattern {
            AddressPattern::Address(local, _) if !has_directory_name(local) => {
                let text =
                    format!("{pattern} can have no mailbox: its local part is empty, or too long for a directory");
                return Err(source.error(text));
            }
            AddressPattern::Address(local, domain) => self.alias_over(local, domain),
            pattern => self.aliases.get(pattern),
        };
        let Some(alias) = alias.filter(|alias| !alias.is_unserved()) else { return Ok(()) };
        let both = match pattern {
            AddressPattern::Address(..) => format!(", or, for both, add {pattern} to its targets"),
            _ => String::new(),
        };
        Err(source.error(format!(
            "{pattern} is in `accept` and an alias ({}) that keeps all mail from it: remove one{both}",
            alias.source
        )))
    }

    /// The alias that gets all mail of a mailbox, unless it is for another mail server. `local` must be in lower case.
    fn alias_over(&self, local: &str, domain: &Domain) -> Option<&Alias> {
        match self.look_up(local, domain, true) {
            Match::Alias(alias, None) => {
                let left_out = !alias.targets.iter().any(|target| self.means(target, local, domain));
                (left_out && !alias.is_unserved()).then_some(alias)
            }
            _ => None,
        }
    }

    /// Whether a target is this mailbox, with a detail or without.
    fn means(&self, target: &AliasTarget, local: &str, domain: &Domain) -> bool {
        let TargetKind::Mailbox { mailbox, .. } = &target.kind else { return false };
        let (base, _) = self.split(mailbox.local());
        is(mailbox, local, domain) || (base.to_lowercase() == local && mailbox.domain() == Some(domain))
    }

    /// Rejects an exception from anything but a catch-all: it has no effect.
    fn check_exception(&self, pattern: &AddressPattern, source: &SourceLine) -> Result<(), ConfigError> {
        let AddressPattern::Address(local, domain) = pattern else { return Ok(()) };
        let text = match self.look_up(local, domain, true) {
            Match::Mailbox { rule: MatchedRule::CatchAll { .. }, .. }
            | Match::NoMailbox(NoMailbox::Exception | NoMailbox::Nameless) => return Ok(()),
            Match::Mailbox { rule: MatchedRule::User { .. }, local, .. } => {
                format!("{} is in `accept` too: remove one of the two", AddressPattern::address(&local, domain))
            }
            Match::Alias(alias, _) if alias.is_unserved() => return Ok(()),
            Match::Alias(alias, _) => format!("{pattern} is an alias too ({}): remove one of the two", alias.source),
            Match::Postmaster(_) | Match::Mailbox { .. } => format!(
                "{pattern} must be accepted (RFC 5321 section 4.5.1, RFC 2142): remove it, and name its reader in \
                 `postmaster`"
            ),
            Match::NoMailbox(_) | Match::Discard | Match::Elsewhere(_) => format!(
                "{pattern} is an exception without effect: `except` is for the domains that are in `accept` as a \
                 whole, and \"@{domain}\" is not among them"
            ),
        };
        Err(source.error(text))
    }

    /// Rejects an alias with a target in a domain of this customer that is not a mailbox.
    fn check_targets(&self, alias: &Alias) -> Result<(), ConfigError> {
        for target in &alias.targets {
            let TargetKind::Mailbox { mailbox, .. } = &target.kind else { continue };
            let Match::NoMailbox(reason) = self.follow(alias, target) else { continue };
            return Err(target.source.error(format!(
                "the alias {} leads to {mailbox}, which has no mailbox here ({}): add it to `accept`, or make an alias \
                 of it",
                alias.name,
                reason.text()
            )));
        }
        Ok(())
    }

    /// Rejects a `postmaster` that is not a mailbox of this customer.
    fn check_postmaster(&self, mailbox: &Mailbox, source: &SourceLine) -> Result<(), ConfigError> {
        match self.find(mailbox, true) {
            Match::NoMailbox(reason) => Err(source.error(format!(
                "{mailbox} has no mailbox here ({}), and `postmaster` must lead to a mailbox here: add it to `accept`",
                reason.text()
            ))),
            _ => Ok(()),
        }
    }

    /// Rejects aliases that lead in a circle, or in too many steps.
    fn check_depths(&self, order: &[AddressPattern]) -> Result<(), ConfigError> {
        let mut depths = HashMap::new();
        for name in order {
            self.depth(Match::Alias(&self.aliases[name], None), &mut Vec::new(), &mut depths)?;
        }
        Ok(())
    }

    /// Rejects an alias with more than [`DESTINATION_LIMIT`] destinations: one message would become too many copies.
    fn check_destination_counts(&self, order: &[AddressPattern]) -> Result<(), ConfigError> {
        for name in order {
            let alias = &self.aliases[name];
            let mut expansion = Expansion::new(self, Vec::new());
            for target in &alias.targets {
                let TargetKind::Mailbox { mailbox, .. } = &target.kind else { continue };
                // It fails only for an alias that is not served, whose mail is deferred.
                let _ = expansion.expand(mailbox, self.follow(alias, target));
                if expansion.deliveries.len() > DESTINATION_LIMIT {
                    return Err(alias.source.error(format!(
                        "the alias {name} leads to more than {DESTINATION_LIMIT} mailboxes: that is a mailing list, \
                         for a program that keeps lists; {FORWARD_HINT}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// The number of steps to the farthest mailbox, at most [`ALIAS_DEPTH_LIMIT`]. `path`: the steps that led here; `depths`:
    /// the numbers that are already known.
    ///
    /// # Errors
    ///
    /// There are too many steps, or they lead in a circle.
    fn depth(
        &self, found: Match<'_>, path: &mut Vec<Step>, depths: &mut HashMap<Step, usize>,
    ) -> Result<usize, ConfigError> {
        let (step, next) = match found {
            Match::Alias(alias, _) => {
                let targets = alias.targets.iter().map(|target| self.follow(alias, target));
                (Step::Alias(alias.name.clone()), targets.collect())
            }
            Match::Postmaster(mailbox) => {
                let next = vec![self.find(&mailbox, true)];
                (Step::Postmaster(mailbox), next)
            }
            Match::Mailbox { .. } | Match::NoMailbox(_) | Match::Discard | Match::Elsewhere(_) => return Ok(0),
        };
        path.push(step.clone());
        if let Some(from) = path.iter().position(|other| *other == step).filter(|from| from + 1 < path.len()) {
            self.reject_steps(&path[from..], "these aliases go in circles: let one of them lead to a mailbox")?;
        }
        let known = depths.get(&step).copied();
        if path.len() - 1 + known.unwrap_or(1) > ALIAS_DEPTH_LIMIT {
            let text = format!("more than {ALIAS_DEPTH_LIMIT} steps from alias to alias: name the mailboxes earlier");
            self.reject_steps(path, &text)?;
        }
        if let Some(known) = known {
            path.pop();
            return Ok(known);
        }
        let mut deepest = 0;
        for found in next {
            deepest = deepest.max(self.depth(found, path, depths)?);
        }
        path.pop();
        depths.insert(step, deepest + 1);
        Ok(deepest + 1)
    }

    /// Rejects these steps, if one of them is an alias.
    fn reject_steps(&self, steps: &[Step], text: &str) -> Result<(), ConfigError> {
        let shown: Vec<_> = steps.iter().map(Step::to_string).collect();
        let first = steps.iter().find_map(|step| match step {
            Step::Alias(name) => self.aliases.get(name),
            Step::Postmaster(_) => None,
        });
        first.map_or(Ok(()), |alias| Err(alias.source.error(format!("{}: {text}", shown.join(" -> ")))))
    }

    /// Rejects a route for anything but a mailbox or a domain of this customer: it has no effect.
    fn check_routed(&self, pattern: &AddressPattern, source: &SourceLine) -> Result<(), ConfigError> {
        let Some(domain) = pattern.domain() else { return Ok(()) };
        let text = match (pattern, self.domain_aliases.get(domain)) {
            (_, Some(own)) => format!("{domain} is another name of {own} only: write {own}"),
            (AddressPattern::Address(local, _), None) if self.serves(domain) => {
                match self.look_up(local, domain, false) {
                    Match::Mailbox { local: base, .. } if base == *local => match self.alias_over(local, domain) {
                        None => return Ok(()),
                        Some(alias) => format!(
                            "{pattern} gets no mail, as an alias ({}) sends it elsewhere: write where it leads, or \
                             remove one of the two",
                            alias.source
                        ),
                    },
                    Match::Mailbox { local: base, .. } => format!(
                        "{pattern} is a mailbox with a detail, which goes where the mailbox does: write {}",
                        AddressPattern::address(&base, domain)
                    ),
                    Match::Postmaster(to) => format!("mail for {pattern} goes to {to}: write that"),
                    Match::Alias(..) | Match::NoMailbox(_) | Match::Discard | Match::Elsewhere(_) => format!(
                        "{pattern} is not one of our mailboxes, and `deliver` is for mailboxes: add it to `accept`, \
                         or remove this"
                    ),
                }
            }
            (_, None) if self.serves(domain) => return Ok(()),
            (_, None) => format!("{domain} is not one of our domains: add it to `accept`, or remove this"),
        };
        Err(source.error(text))
    }
}

/// A step on the way from an address to its mailboxes.
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
