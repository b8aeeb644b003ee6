//! `[mailboxes]`: the recipients of a customer, and where their mail goes. What the rules mean, and which ones make no
//! sense, is in [`crate::recipients`].

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::aliases;
use super::lists::duplicate;
use super::shape::{Many, OneOrMany, Shape, each};
use super::source::{ConfigError, Source, read};
use super::value::{Accept, Checked, HostPort, MAX_SIZE, OctetCount, Parse, address_with_domain};
use crate::mail::address::{Domain, Mailbox};
use crate::recipients::{
    AddressPattern, Alias, DomainAlias, Located, NextHop, RecipientRules, Route, RouteRule, RuleInput,
};

/// `[mailboxes]`: the recipients of a customer, and where their mail goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MailboxesConfig {
    /// The directory of the Maildirs, `root/<domain>/<local part>/`. Absolute.
    pub root: PathBuf,
    /// Who a recipient is, and where their mail goes.
    pub rules: RecipientRules,
    /// The bits that are removed from the modes of files and directories of mail, as umask(2) does: 0o077, the default,
    /// or some of its bits, with 0o002 at least.
    pub umask: u32,
    /// The maximal size of a message, in octets on the wire. Default 50 MiB.
    pub max_size: u64,
}

impl MailboxesConfig {
    /// `domains`: those that the customer asks its providers for; empty: all that they have.
    pub(super) fn build(
        source: &Source, raw: Spanned<RawMailboxes>, domains: &[Domain],
    ) -> Result<MailboxesConfig, ConfigError> {
        let table = raw.span();
        let missing = |text: &str| source.error(table.clone(), format!("[mailboxes] needs {text}"));
        let raw = raw.into_inner();
        let root = raw
            .root
            .ok_or_else(|| missing("`root`, the directory of the Maildirs, such as root = \"/var/mail/odmr\""))?;
        let root = source.absolute(&root.0);
        let reader = Reader { source, domains };
        let accept = reader.accept(raw.accept)?;
        let home = accept.first().and_then(|entry| entry.value.domain()).cloned().ok_or_else(|| {
            missing(
                "`accept`, the addresses that exist, such as accept = [\"alice@example.org\"], or \
                 [\"@example.org\"] for a whole domain",
            )
        })?;
        let mut aliases = reader.aliases(raw.aliases, &home)?;
        for file in raw.alias_file.map(each).unwrap_or_default() {
            aliases.extend(reader.alias_file(&file, &home)?);
        }
        let input = RuleInput {
            root: root.clone(),
            home,
            accept,
            except: reader.except(raw.except),
            aliases,
            domain_aliases: reader.domain_aliases(raw.domain_aliases)?,
            separators: raw.separator.map_or_else(|| "+".to_owned(), |separators| separators.0.0),
            postmaster: raw.postmaster.map(|entry| {
                let source = source.line(entry.span());
                Located { value: entry.into_inner().0.0, source }
            }),
            routes: reader.routes(raw.deliver)?,
        };
        Ok(MailboxesConfig {
            root,
            rules: RecipientRules::new(input)?,
            umask: raw.umask.map_or(0o077, |umask| umask.0.0),
            max_size: raw.max_size.map_or(MAX_SIZE, |size| size.0.0),
        })
    }
}

/// Reads the values of the table.
struct Reader<'a> {
    source: &'a Source,
    /// Those that the customer asks its providers for; empty: all that they have.
    domains: &'a [Domain],
}

impl Reader<'_> {
    fn accept(&self, written: Vec<Spanned<Checked<Accept>>>) -> Result<Vec<Located<AddressPattern>>, ConfigError> {
        let mut accept = Vec::with_capacity(written.len());
        let mut seen = HashSet::new();
        for entry in written {
            let span = entry.span();
            let entry = entry.into_inner().0;
            let shown = entry.to_string();
            let value = AddressPattern::from(entry);
            // Nobody could tell apart two mailboxes that differ in case alone.
            if !seen.insert(value.clone()) {
                return Err(self.source.error(span, duplicate(&shown)));
            }
            self.may_get_mail(value.domain(), &shown, span.clone())?;
            accept.push(Located { value, source: self.source.line(span) });
        }
        Ok(accept)
    }

    /// Rejects a name in a domain that the customer does not ask for: no mail would come for it.
    fn may_get_mail(&self, domain: Option<&Domain>, shown: &str, at: Range<usize>) -> Result<(), ConfigError> {
        match domain {
            Some(domain) if !self.domains.is_empty() && !self.domains.contains(domain) => {
                let text = format!(
                    "{shown} can get no mail, as its domain is not in the `domains` of [provider]: add it there, or \
                     leave `domains` empty to ask for all"
                );
                Err(self.source.error(at, text))
            }
            _ => Ok(()),
        }
    }

    fn except(&self, written: Vec<Spanned<Checked<User>>>) -> Vec<Located<AddressPattern>> {
        let pattern = |entry: Spanned<Checked<User>>| {
            let source = self.source.line(entry.span());
            Located { value: Accept::Address(entry.into_inner().0.0).into(), source }
        };
        written.into_iter().map(pattern).collect()
    }

    fn aliases(
        &self, written: BTreeMap<Spanned<String>, Spanned<OneOrMany<Texts>>>, home: &Domain,
    ) -> Result<Vec<Alias>, ConfigError> {
        let mut read = Vec::with_capacity(written.len());
        for (key, targets) in written {
            let wrong = |text: String| self.source.error(key.span(), text);
            let name = aliases::name(key.get_ref()).map_err(wrong)?;
            self.may_get_mail(name.domain(), &name.to_string(), key.span())?;
            let mut alias = Alias { name, targets: Vec::new(), source: self.source.line(key.span()) };
            for text in each(targets) {
                alias.targets.push(aliases::target(text.get_ref(), home, self.source.line(text.span()))?);
            }
            if alias.targets.is_empty() {
                return Err(wrong(aliases::without_target(&alias.name)));
            }
            read.push(alias);
        }
        Ok(read)
    }

    fn alias_file(&self, written: &Spanned<String>, home: &Domain) -> Result<Vec<Alias>, ConfigError> {
        let wrong = |text: String| self.source.error(written.span(), text);
        let path = self.source.directory().join(PathBuf::parse(written.get_ref()).map_err(wrong)?);
        let (_, octets) = read(&path).map_err(|cause| {
            let path = path.display();
            wrong(format!("the aliases in {path} cannot be read: {cause}; make that file, or take it out"))
        })?;
        let aliases = aliases::parse(&path.as_path().into(), &octets, home)?;
        for alias in &aliases {
            let checked = self.may_get_mail(alias.name.domain(), &alias.name.to_string(), written.span());
            checked.map_err(|error| ConfigError::from(alias.source.error(error.text)))?;
        }
        Ok(aliases)
    }

    fn domain_aliases(
        &self, written: BTreeMap<Spanned<String>, Checked<Domain>>,
    ) -> Result<Vec<DomainAlias>, ConfigError> {
        let mut read = Vec::with_capacity(written.len());
        for (key, domain) in written {
            let name = <Domain as Parse>::parse(key.get_ref()).map_err(|text| self.source.error(key.span(), text))?;
            self.may_get_mail(Some(&name), name.as_str(), key.span())?;
            read.push(DomainAlias { name, domain: domain.0, source: self.source.line(key.span()) });
        }
        Ok(read)
    }

    fn routes(&self, written: Option<Spanned<OneOrMany<Routes>>>) -> Result<Vec<RouteRule>, ConfigError> {
        let Some(written) = written else { return Ok(Vec::new()) };
        let span = written.span();
        let table = match written.into_inner() {
            OneOrMany::One(text) => {
                let route = self.route(&text, span.clone())?;
                return Ok(vec![RouteRule { pattern: None, route, source: self.source.line(span) }]);
            }
            OneOrMany::Many(table) => table,
        };
        let mut routes = Vec::with_capacity(table.len());
        for (key, text) in table {
            let pattern = match key.get_ref().as_str() {
                "*" => None,
                written if written.contains('@') => {
                    Some(User::parse(written).map(|user| Accept::Address(user.0).into()))
                }
                written => Some(<Domain as Parse>::parse(written).map(AddressPattern::Domain)),
            };
            let pattern = pattern.transpose().map_err(|text| {
                self.source.error(key.span(), format!("{text}; or \"*\" for all that have no rule of their own"))
            })?;
            let route = self.route(text.get_ref(), text.span())?;
            routes.push(RouteRule { pattern, route, source: self.source.line(key.span()) });
        }
        Ok(routes)
    }

    fn route(&self, text: &str, at: Range<usize>) -> Result<Route, ConfigError> {
        let wrong = |text: String| self.source.error(at.clone(), text);
        let no_way = || {
            wrong(format!(
                "{text:?} is no way to deliver: write \"lmtp:/run/dovecot/lmtp\", \"lmtp:mail.example.org:24\", \
                 \"smtp:127.0.0.1:25\" or \"maildir:/var/mail\""
            ))
        };
        let (kind, rest) = text.split_once(':').filter(|(_, rest)| !rest.is_empty()).ok_or_else(no_way)?;
        let path = || PathBuf::parse(rest).map(|path| self.source.absolute(&path)).map_err(wrong);
        match kind {
            "maildir" => Ok(Route::Maildir(path()?)),
            "lmtp" if rest.contains('/') => {
                let path = path()?;
                match path.as_os_str().len() {
                    ..=SOCKET_PATH => Ok(Route::NextHop(NextHop::LmtpUnix(path))),
                    length => Err(wrong(format!(
                        "the path of that socket has {length} octets, and a socket's has {SOCKET_PATH} at most: move it, \
                         or use lmtp:host:24"
                    ))),
                }
            }
            "lmtp" => {
                let HostPort { address, host } = HostPort::<24>::parse(rest).map_err(wrong)?;
                Ok(Route::NextHop(NextHop::Lmtp { address, host }))
            }
            "smtp" if rest.contains('/') => Err(wrong(format!(
                "{text:?} has a path, and SMTP goes to a host: write \"smtp:127.0.0.1:25\", or lmtp:"
            ))),
            "smtp" => {
                let HostPort { address, host } = HostPort::<25>::parse(rest).map_err(wrong)?;
                Ok(Route::NextHop(NextHop::Smtp { address, host }))
            }
            _ => Err(no_way()),
        }
    }
}

/// Octets of the path of a Unix socket that fit into a `sockaddr_un` on every system, with the NUL at the end.
const SOCKET_PATH: usize = 103;

// The table as it is written.

type Texts = Vec<Spanned<String>>;

impl Many for Texts {
    type One = String;
    const EXPECTED: &'static str = "a string, or a list of them";
    const ONE: Shape = Shape::Text;
    const MANY: Shape = Shape::List;
}

/// The ways to deliver, by recipient.
type Routes = BTreeMap<Spanned<String>, Spanned<String>>;

impl Many for Routes {
    type One = String;
    const EXPECTED: &'static str = "a way to deliver such as \"lmtp:/run/dovecot/lmtp\", or a table of them";
    const ONE: Shape = Shape::Text;
    const MANY: Shape = Shape::Table;
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
pub(super) struct RawMailboxes {
    root: Option<Checked<PathBuf>>,
    #[serde(default)]
    accept: Vec<Spanned<Checked<Accept>>>,
    #[serde(default)]
    except: Vec<Spanned<Checked<User>>>,
    #[serde(default)]
    aliases: BTreeMap<Spanned<String>, Spanned<OneOrMany<Texts>>>,
    alias_file: Option<Spanned<OneOrMany<Texts>>>,
    #[serde(default)]
    domain_aliases: BTreeMap<Spanned<String>, Checked<Domain>>,
    separator: Option<Checked<Separators>>,
    postmaster: Option<Spanned<Checked<User>>>,
    umask: Option<Checked<Umask>>,
    max_size: Option<Checked<OctetCount>>,
    deliver: Option<Spanned<OneOrMany<Routes>>>,
}

/// One address.
struct User(Mailbox);

impl Parse for User {
    const EXPECTED: &'static str = "an address such as \"alice@example.org\"";

    fn parse(text: &str) -> Result<User, String> {
        address_with_domain(text)
            .map(User)
            .ok_or_else(|| format!("{text:?} is no address: write one such as \"alice@example.org\""))
    }
}

struct Separators(String);

impl Parse for Separators {
    const EXPECTED: &'static str = "a character such as \"+\", several, or \"\" for none";

    fn parse(text: &str) -> Result<Separators, String> {
        // Other characters have a meaning in addresses, or are common in names.
        match text.chars().find(|character| !"!#$%&*+-/=?^_{|}~.".contains(*character)) {
            None => Ok(Separators(text.to_owned())),
            Some(wrong) => Err(format!("{wrong:?} cannot separate a detail from a name: write {}", Self::EXPECTED)),
        }
    }
}

struct Umask(u32);

impl Parse for Umask {
    const EXPECTED: &'static str = "octal digits in quotes, such as \"077\" or \"027\"";

    fn parse(text: &str) -> Result<Umask, String> {
        let digits = (3..=4).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
        let mask = digits.then(|| u32::from_str_radix(text, 8).ok()).flatten();
        match mask {
            None => Err(format!("{text:?} is no umask: write {}", Self::EXPECTED)),
            Some(mask) if mask > 0o077 => Err(format!(
                "with a umask of {text:?} the owner of a mailbox could not use it: write \"077\", or less in the last \
                 two digits"
            )),
            Some(mask) if mask & 0o002 == 0 => {
                Err(format!("with a umask of {text:?} every user could change mail: write \"002\", \"027\" or \"077\""))
            }
            Some(mask) => Ok(Umask(mask)),
        }
    }
}
