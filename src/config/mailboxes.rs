//! Reads `[mailboxes]`: the recipients of a customer, and where their mail goes. [`crate::recipients`] applies these rules,
//! and rejects those that contradict each other.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::PathBuf;

use toml::de::DeValue;

use super::aliases;
use super::source::{Source, read, read_remedy};
use super::table::{Table, Value};
use super::value::{
    ACCEPTED, Accepted, DOMAIN, HostPort, MAX_SIZE, PATH, SIZE, Text, WITHOUT_8BITMIME, address_with_domain, host_port,
};
use crate::mail::address::{Domain, Mailbox};
use crate::maildir::shell_word;
use crate::recipients::{
    AddressPattern, Alias, CatchAll, CatchAllRule, ConfigError, DomainAlias, FORWARD_HINT, Located, NextHop,
    RecipientRules, Route, RouteRule, RuleInput, SourceLine, TargetKind,
};
use crate::smtp::client::Without8BitMime;

/// `[mailboxes]`: the recipients of a customer, and where their mail goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MailboxesConfig {
    /// The directory of the Maildirs, `root/<domain>/<local part>/`. Absolute.
    pub root: PathBuf,
    /// The rules by which a recipient is found, and where their mail goes.
    pub rules: RecipientRules,
    /// The bits that are removed from the modes of files and directories of mail, as umask(2) does. Default 0o077; otherwise
    /// some of these bits, among them 0o002.
    pub umask: u32,
    /// The largest message that is received, in octets on the wire. Default 50 MiB.
    pub max_size: u64,
    /// Whether 8-bit content is sent to a next hop that does not offer 8BITMIME. Default: it is.
    pub without_8bitmime: Without8BitMime,
    /// The line of `aliases`, or of the table if it has no `aliases`.
    pub aliases_line: SourceLine,
}

impl MailboxesConfig {
    /// Copies `root` and `umask` from `earlier`: a daemon does not change the directory of its locks and its umask.
    pub fn stay_in_place(&mut self, earlier: &MailboxesConfig) {
        (self.root, self.umask) = (earlier.root.clone(), earlier.umask);
        self.rules.set_root(&earlier.root);
    }

    /// Reads the table. `domains`: those that the customer asks its providers for; empty: all of its accounts.
    pub(super) fn build(mut table: Table<'_>, domains: &[Domain]) -> Result<MailboxesConfig, ConfigError> {
        let missing = "[mailboxes] needs `root`, the directory of the Maildirs, such as root = \"/var/mail/odmr\"";
        let (source, root) = (table.file, table.required("root", PATH, missing));
        let reader = Reader { source, domains };
        let (umask, max_size) = (table.or("umask", UMASK, 0o077), table.or("max-size", SIZE, MAX_SIZE));
        let without_8bitmime = table.or("without-8bitmime", WITHOUT_8BITMIME, Without8BitMime::default());
        let separators = table.get("separator", SEPARATORS);
        let (except, postmaster) = (table.list("except", USER_PATTERN), table.located("postmaster", USER));
        let domain_aliases = source.note(reader.domain_aliases(&mut table));
        let routes = table.take("deliver").map_or_else(|| Ok(Vec::new()), |written| reader.routes(written));
        let routes = source.note(routes);
        let catch_alls = table.take("catch-all").map_or_else(|| Ok(Vec::new()), Reader::catch_alls);
        let catch_alls = source.note(catch_alls);
        let accept = reader.accept(table.list("accept", ACCEPTED)?.unwrap_or_default())?;
        let home = accept.first().and_then(|entry| entry.value.domain()).cloned().ok_or_else(|| {
            let text = "[mailboxes] needs `accept`, the addresses that exist, such as \
                        accept = [\"alice@example.org\"], or [\"@example.org\"] for a whole domain";
            table.line.error(text)
        })?;
        let aliases_line = table.line_of("aliases");
        let mut aliases = Vec::new();
        let mut result = Ok(());
        for (name, targets) in table.entries("aliases")? {
            let alias = source.note(reader.alias(name, targets, &home));
            result = result.and(alias.map(|alias| aliases.push(alias)));
        }
        for file in table.take("alias-file").map(Value::one_or_many).unwrap_or_default() {
            let of_file = file.string(TEXTS).and_then(|file| reader.alias_file(&file, &home));
            result = result.and(source.note(of_file).map(|of_file| aliases.extend(of_file)));
        }
        let (root, except) = (source.absolute(&root?), except?.unwrap_or_default());
        let (domain_aliases, postmaster) = (domain_aliases?, postmaster?);
        let separators = separators?.unwrap_or_else(|| "+".to_owned());
        let (root_of_rules, routes, catch_alls) = (root.clone(), routes?, catch_alls?);
        result?;
        let input = RuleInput {
            root: root_of_rules,
            home,
            accept,
            except,
            aliases,
            domain_aliases,
            separators,
            postmaster,
            routes,
            catch_alls,
        };
        let rules = RecipientRules::new(input)?;
        Ok(MailboxesConfig { root, rules, umask, max_size, without_8bitmime, aliases_line })
    }
}

#[rustfmt::skip]
pub(super) const MAILBOXES_KEYS: [&str; 13] = [
    "root", "accept", "except", "catch-all", "aliases", "alias-file", "domain-aliases", "separator", "postmaster",
    "umask", "max-size", "deliver", "without-8bitmime",
];

const TEXTS: &str = "a string, or a list of them";

/// Reads those values of the table that depend on the file or on the domains.
struct Reader<'a> {
    source: &'a Source,
    /// Those that the customer asks its providers for; empty: all of its accounts.
    domains: &'a [Domain],
}

impl Reader<'_> {
    fn accept(&self, entries: Vec<Located<Accepted>>) -> Result<Vec<Located<AddressPattern>>, ConfigError> {
        let mut seen = HashSet::new();
        for Located { value: Accepted { pattern, shown }, source } in &entries {
            // Local parts that differ only in case have the same mailbox.
            if !seen.insert(pattern) {
                return Err(source.duplicate(shown));
            }
            self.may_get_mail(pattern, shown, source)?;
        }
        Ok(entries.into_iter().map(|entry| entry.map(|accepted| accepted.pattern)).collect())
    }

    /// Rejects a name in a domain that the customer does not ask its providers for, as no mail for it can arrive.
    fn may_get_mail(&self, pattern: &AddressPattern, shown: &str, line: &SourceLine) -> Result<(), ConfigError> {
        match pattern.domain() {
            Some(domain) if !self.domains.is_empty() && !self.domains.contains(domain) => Err(line.error(format!(
                "{shown} can get no mail, as its domain is not in the `domains` of [provider]: add it there, or \
                 leave `domains` empty to ask for all"
            ))),
            _ => Ok(()),
        }
    }

    fn alias(&self, written: Located<String>, targets: Value<'_>, home: &Domain) -> Result<Alias, ConfigError> {
        let source = written.source;
        let name = aliases::name(&written.value).map_err(|text| source.error(text))?;
        self.may_get_mail(&name, &name.to_string(), &source)?;
        let mut alias = Alias { name, targets: Vec::new(), source };
        for target in targets.one_or_many() {
            let target = target.string(TEXTS)?;
            let target = aliases::target(&target.value, home, target.source)?;
            // Unlike a line of /etc/aliases, this alias is not for another mail server too.
            if let TargetKind::Unserved(what) = &target.kind {
                let text = format!("{what}, and aliases lead to mailboxes here: {FORWARD_HINT}");
                return Err(target.source.error(text));
            }
            alias.targets.push(target);
        }
        aliases::check_targets(&alias)?;
        Ok(alias)
    }

    fn alias_file(&self, written: &Located<String>, home: &Domain) -> Result<Vec<Alias>, ConfigError> {
        let wrong = |text: String| written.source.error(text);
        let path = self.source.relative(&PATH.parse(&written.value).map_err(wrong)?);
        let (_, octets) = read(&path).map_err(|cause| {
            let (shown, path) = (path.display(), shell_word(&path));
            let remedy = match cause.kind() {
                ErrorKind::NotFound | ErrorKind::PermissionDenied => {
                    format!("; create that file, type `chmod 644 {path}` for users who send, or remove its name")
                }
                _ => read_remedy(&cause).to_owned(),
            };
            wrong(format!("the aliases in {shown} cannot be read: {cause}{remedy}"))
        })?;
        let aliases = aliases::parse(&path.as_path().into(), &octets, home)?;
        for Alias { name, source, .. } in &aliases {
            self.may_get_mail(name, &name.to_string(), source)?;
        }
        Ok(aliases)
    }

    fn domain_aliases(&self, table: &mut Table<'_>) -> Result<Vec<DomainAlias>, ConfigError> {
        let mut aliases = Vec::new();
        for (Located { value: written, source }, domain) in table.entries("domain-aliases")? {
            let name = DOMAIN.parse(&written).map_err(|text| source.error(text))?;
            self.may_get_mail(&AddressPattern::Domain(name.clone()), name.as_str(), &source)?;
            aliases.push(DomainAlias { name, domain: domain.read(&DOMAIN)?.value, source });
        }
        Ok(aliases)
    }

    fn routes(&self, written: Value<'_>) -> Result<Vec<RouteRule>, ConfigError> {
        let expected = "a way to deliver such as \"lmtp:/run/dovecot/lmtp\", or a table of them";
        if let DeValue::String(_) = written.value {
            let text = written.string(expected)?;
            let route = self.route(&text.value).map_err(|error| text.source.error(error))?;
            return Ok(vec![RouteRule { pattern: None, route, source: text.source }]);
        }
        let mut routes = Vec::new();
        for (Located { value: key, source }, text) in written.entries(expected)? {
            let pattern = match key.as_str() {
                "*" => None,
                key if key.contains('@') => Some(USER_PATTERN.parse(key)),
                key => Some(DOMAIN.parse(key).map(AddressPattern::Domain)),
            };
            let pattern = pattern
                .transpose()
                .map_err(|text| source.error(format!("{text}; or \"*\" for all that have no rule of their own")))?;
            let text = text.string("a string")?;
            let route = self.route(&text.value).map_err(|error| text.source.error(error))?;
            routes.push(RouteRule { pattern, route, source });
        }
        Ok(routes)
    }

    fn catch_alls(written: Value<'_>) -> Result<Vec<CatchAllRule>, ConfigError> {
        if let DeValue::String(_) = written.value {
            let Located { value: catch_all, source } = written.read(&CATCH_ALL)?;
            return Ok(vec![CatchAllRule { domain: None, catch_all, source }]);
        }
        let mut rules = Vec::new();
        for (Located { value: key, source }, target) in written.entries(CATCH_ALL_EXPECTED)? {
            let domain = match key.as_str() {
                "*" => None,
                key => Some(DOMAIN.parse(key).map_err(|text| source.error(text))?),
            };
            rules.push(CatchAllRule { domain, catch_all: target.read(&CATCH_ALL)?.value, source });
        }
        Ok(rules)
    }

    fn route(&self, text: &str) -> Result<Route, String> {
        let (kind, rest) = text.split_once(':').unwrap_or_default();
        let path = || PATH.parse(rest).map(|path| self.source.absolute(&path));
        match kind {
            "maildir" if !rest.is_empty() => Ok(Route::Maildir(path()?)),
            "lmtp" if rest.contains('/') => {
                let path = path()?;
                match path.as_os_str().len() {
                    ..=SOCKET_PATH => Ok(Route::NextHop(NextHop::LmtpUnix(path))),
                    length => Err(format!(
                        "the path of that socket has {length} octets, and a socket's has {SOCKET_PATH} at most: move \
                         it, or use lmtp:host:24"
                    )),
                }
            }
            "lmtp" if !rest.is_empty() => {
                let HostPort { address, host } = host_port::<24>().parse(rest)?;
                Ok(Route::NextHop(NextHop::Lmtp { address, host }))
            }
            "smtp" if rest.contains('/') => {
                Err(format!("{text:?} has a path, and SMTP goes to a host: write \"smtp:127.0.0.1:25\", or lmtp:"))
            }
            "smtp" if !rest.is_empty() => {
                let HostPort { address, host } = host_port::<25>().parse(rest)?;
                Ok(Route::NextHop(NextHop::Smtp { address, host }))
            }
            _ => Err(format!(
                "{text:?} is not a valid way to deliver: write \"lmtp:/run/dovecot/lmtp\", \
                 \"lmtp:mail.example.org:24\", \"smtp:127.0.0.1:25\" or \"maildir:/var/mail\""
            )),
        }
    }
}

/// The most octets of the path of a Unix socket: with the NUL at the end they fit into a `sockaddr_un` on every system.
const SOCKET_PATH: usize = 103;

/// One address.
const USER: Text<Mailbox> = Text::new(USER_EXPECTED, |text| address_with_domain(text).ok_or_else(|| bad_address(text)));

/// The pattern of one address.
const USER_PATTERN: Text<AddressPattern> = Text::new(USER_EXPECTED, |text| {
    Mailbox::parse(text).as_ref().and_then(AddressPattern::of).ok_or_else(|| bad_address(text))
});

const USER_EXPECTED: &str = "an address such as \"alice@example.org\"";

const CATCH_ALL_EXPECTED: &str = "an address such as \"alice@example.org\", \"postmaster\", or \"create\" for a mailbox of \
                                  each name; for one domain { \"example.org\" = … }";

const CATCH_ALL: Text<CatchAll> = Text::new(CATCH_ALL_EXPECTED, |text| match text {
    "create" => Ok(CatchAll::Create),
    "postmaster" => Ok(CatchAll::Postmaster),
    text => address_with_domain(text)
        .map(CatchAll::Mailbox)
        .ok_or_else(|| format!("{text:?} is not a valid address for a catch-all: write {CATCH_ALL_EXPECTED}")),
});

fn bad_address(text: &str) -> String {
    format!("{text:?} is not a valid address: write one such as \"alice@example.org\"")
}

const SEPARATORS_EXPECTED: &str = "a character such as \"+\", several, or \"\" for none";

const SEPARATORS: Text<String> = Text::new(SEPARATORS_EXPECTED, |text| {
    // Other characters have another meaning in addresses, or are common in names.
    match text.chars().find(|character| !"!#$%&*+-/=?^_{|}~.".contains(*character)) {
        None => Ok(text.to_owned()),
        Some(wrong) => Err(format!("{wrong:?} cannot separate a detail from a name: write {SEPARATORS_EXPECTED}")),
    }
});

const UMASK_EXPECTED: &str = "octal digits in quotes, such as \"077\" or \"027\"";

const UMASK: Text<u32> = Text::new(UMASK_EXPECTED, |text| {
    let digits = (3..=4).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    match u32::from_str_radix(text, 8).ok().filter(|_| digits) {
        None => Err(format!("{text:?} is not a valid umask: write {UMASK_EXPECTED}")),
        Some(mask) if mask > 0o077 => Err(format!(
            "with a umask of {text:?} the owner of a mailbox could not use it: write \"077\", or less in the last two \
             digits"
        )),
        Some(mask) if mask & 0o002 == 0 => {
            Err(format!("with a umask of {text:?} every user could change mail: write \"002\", \"027\" or \"077\""))
        }
        Some(mask) => Ok(mask),
    }
});

#[cfg(test)]
mod tests;
