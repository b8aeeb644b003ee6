//! `[mailboxes]`: for whom a customer takes mail, and where it goes.
//!
//! Here it is read; what it means, and what of it makes no sense, stands in [`crate::recipients`].

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::value::{Checked, HostPort, MAX_SIZE, OctetCount, Parse};
use super::{ConfigError, Source, aliases, line, read, twice};
use crate::mail::address::{Domain, Mailbox};
use crate::recipients::{
    AddressPattern, Alias, AliasTarget, NextHop, RecipientRules, Route, RuleError, RuleInput, SourceLine,
};

/// `[mailboxes]`: for whom a customer takes mail, and where it goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MailboxesConfig {
    /// Under it stand the Maildirs, `root/<domain>/<local part>/`. Absolute.
    pub root: PathBuf,
    /// Who a recipient is, and where his mail goes.
    pub rules: RecipientRules,
    /// Taken from the mode of the files and folders of mail, as umask(2) does; 0o077, the default, or less, and never
    /// without 0o002.
    pub umask: u32,
    /// The largest letter taken, in octets as they are on the wire; default 50 MiB.
    pub max_size: u64,
}

/// Recipients that exist.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Accept {
    /// `alice@example.org`; its host is a domain.
    Address(Mailbox),
    /// `@example.org`: whoever it is in this domain.
    Domain(Domain),
}

impl MailboxesConfig {
    /// `domains`: those that are asked for; none: all there are.
    pub(super) fn build(
        source: &Source,
        raw: Spanned<RawMailboxes>,
        domains: &[Domain],
    ) -> Result<MailboxesConfig, ConfigError> {
        let table = raw.span();
        let missing = |text: &str| source.error(table.clone(), format!("[mailboxes] needs {text}"));
        let raw = raw.into_inner();
        let root = raw
            .root
            .ok_or_else(|| missing("`root`, the directory of the Maildirs, such as root = \"/var/mail/odmr\""))?;
        let root = source.beside(&root.0);
        let reader = Reader { source, file: source.file.as_path().into(), domains };
        let accept = reader.accept(raw.accept)?;
        let home = accept.first().and_then(|(name, _)| name.domain()).cloned().ok_or_else(|| {
            missing(
                "`accept`, the addresses that exist, such as accept = [\"alice@example.org\"], or \
                 [\"@example.org\"] for a whole domain",
            )
        })?;
        let mut aliases = reader.aliases(raw.aliases, &home)?;
        if let Some(files) = raw.alias_file {
            let span = files.span();
            for (file, span) in files.into_inner().into_each(span) {
                aliases.extend(reader.alias_file(&file, span, &home)?);
            }
        }
        let written = RuleInput {
            root: root.clone(),
            home,
            accept,
            except: reader.except(raw.except)?,
            aliases,
            domain_aliases: reader.domain_aliases(raw.domain_aliases)?,
            separators: raw.separator.map_or_else(|| "+".to_owned(), |separators| separators.0.0),
            postmaster: raw.postmaster.map(|entry| (entry.get_ref().0.0.clone(), reader.origin(entry.span()))),
            routes: reader.routes(raw.deliver)?,
        };
        let rules = RecipientRules::new(written).map_err(|RuleError { origin, text }| ConfigError {
            file: origin.file.to_path_buf(),
            line: Some(origin.line),
            text,
        })?;
        Ok(MailboxesConfig {
            root,
            rules,
            umask: raw.umask.map_or(0o077, |umask| umask.0.0),
            max_size: raw.max_size.map_or(MAX_SIZE, |size| size.0.0),
        })
    }
}

impl From<Accept> for AddressPattern {
    fn from(accept: Accept) -> AddressPattern {
        match accept {
            Accept::Domain(domain) => AddressPattern::Domain(domain),
            Accept::Address(mailbox) => match mailbox.domain() {
                Some(domain) => AddressPattern::address(mailbox.local(), domain),
                None => AddressPattern::bare(mailbox.local()),
            },
        }
    }
}

impl fmt::Display for Accept {
    /// As it is written in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Accept::Address(mailbox) => mailbox.fmt(f),
            Accept::Domain(domain) => write!(f, "@{domain}"),
        }
    }
}

/// Brings what is written to its place in the file.
struct Reader<'a> {
    source: &'a Source,
    file: Arc<Path>,
    /// As in [`Mailboxes::build`].
    domains: &'a [Domain],
}

impl Reader<'_> {
    fn origin(&self, at: Range<usize>) -> SourceLine {
        let before = self.source.text.as_bytes().get(..at.start).unwrap_or_default();
        SourceLine { file: self.file.clone(), line: line(before) }
    }

    fn accept(&self, written: Vec<Spanned<Checked<Accept>>>) -> Result<Vec<(AddressPattern, SourceLine)>, ConfigError> {
        let mut accept = Vec::with_capacity(written.len());
        let mut seen = HashSet::new();
        for entry in written {
            let span = entry.span();
            let entry = entry.into_inner().0;
            let shown = entry.to_string();
            let name = AddressPattern::from(entry);
            // Two that differ in case alone would be two mailboxes nobody can tell apart.
            if !seen.insert(name.clone()) {
                return Err(self.source.error(span, twice(&shown)));
            }
            self.may_get_mail(name.domain(), &shown, span.clone())?;
            accept.push((name, self.origin(span)));
        }
        Ok(accept)
    }

    /// Only for domains that are asked for there is mail.
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

    fn except(&self, written: Vec<Spanned<Checked<User>>>) -> Result<Vec<(AddressPattern, SourceLine)>, ConfigError> {
        let name = |entry: Spanned<Checked<User>>| {
            let origin = self.origin(entry.span());
            (AddressPattern::from(Accept::Address(entry.into_inner().0.0)), origin)
        };
        Ok(written.into_iter().map(name).collect())
    }

    fn aliases(
        &self,
        written: BTreeMap<Spanned<String>, Spanned<OneOrMany>>,
        home: &Domain,
    ) -> Result<Vec<Alias>, ConfigError> {
        let mut read = Vec::with_capacity(written.len());
        for (key, targets) in written {
            let wrong = |text: String| self.source.error(key.span(), text);
            let name = aliases::name(key.get_ref()).map_err(wrong)?;
            self.may_get_mail(name.domain(), &name.to_string(), key.span())?;
            let mut alias = Alias { name, targets: Vec::new(), origin: self.origin(key.span()) };
            let span = targets.span();
            for (text, span) in targets.into_inner().into_each(span) {
                let (mailbox, direct) =
                    aliases::target(&text, home).map_err(|text| self.source.error(span.clone(), text))?;
                alias.targets.push(AliasTarget { mailbox, direct, origin: self.origin(span) });
            }
            if alias.targets.is_empty() {
                return Err(wrong(aliases::without_target(&alias.name)));
            }
            read.push(alias);
        }
        Ok(read)
    }

    fn alias_file(&self, written: &str, at: Range<usize>, home: &Domain) -> Result<Vec<Alias>, ConfigError> {
        let path = PathBuf::parse(written).map_err(|text| self.source.error(at.clone(), text))?;
        let path = self.source.directory().join(path);
        let (_, octets) = read(&path).map_err(|cause| {
            let text =
                format!("the aliases in {} cannot be read: {cause}; make that file, or take it out", path.display());
            self.source.error(at.clone(), text)
        })?;
        let aliases = aliases::parse(&path.as_path().into(), &octets, home)?;
        for alias in &aliases {
            let checked = self.may_get_mail(alias.name.domain(), &alias.name.to_string(), at.clone());
            checked.map_err(|error| ConfigError { file: path.clone(), line: Some(alias.origin.line), ..error })?;
        }
        Ok(aliases)
    }

    fn domain_aliases(
        &self,
        written: BTreeMap<Spanned<String>, Checked<Domain>>,
    ) -> Result<Vec<(Domain, Domain, SourceLine)>, ConfigError> {
        let mut read = Vec::with_capacity(written.len());
        for (key, to) in written {
            let from = <Domain as Parse>::parse(key.get_ref()).map_err(|text| self.source.error(key.span(), text))?;
            self.may_get_mail(Some(&from), from.as_str(), key.span())?;
            read.push((from, to.0, self.origin(key.span())));
        }
        Ok(read)
    }

    fn routes(
        &self,
        written: Option<Spanned<OneOrTable>>,
    ) -> Result<Vec<(Option<AddressPattern>, Route, SourceLine)>, ConfigError> {
        let Some(written) = written else { return Ok(Vec::new()) };
        let span = written.span();
        let table = match written.into_inner() {
            OneOrTable::One(text) => return Ok(vec![(None, self.route(&text, span.clone())?, self.origin(span))]),
            OneOrTable::Table(table) => table,
        };
        let mut routes = Vec::with_capacity(table.len());
        for (key, text) in table {
            let name = match key.get_ref().as_str() {
                "*" => None,
                written if written.contains('@') => {
                    Some(User::parse(written).map(|user| Accept::Address(user.0).into()))
                }
                written => Some(<Domain as Parse>::parse(written).map(AddressPattern::Domain)),
            };
            let name = name.transpose().map_err(|text| {
                self.source.error(key.span(), format!("{text}; or \"*\" for all that have no rule of their own"))
            })?;
            let span = text.span();
            routes.push((name, self.route(text.get_ref(), span)?, self.origin(key.span())));
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
        let path = || PathBuf::parse(rest).map(|path| self.source.beside(&path)).map_err(wrong);
        match kind {
            "maildir" => Ok(Route::Maildir(path()?)),
            "lmtp" if rest.contains('/') => {
                let path = path()?;
                // What every system can put into an address of a socket.
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

/// Octets of a socket's path (sockaddr_un has 104 and more).
const SOCKET_PATH: usize = 103;

// The table as it is written.

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table", rename_all = "kebab-case")]
pub(super) struct RawMailboxes {
    root: Option<Checked<PathBuf>>,
    #[serde(default)]
    accept: Vec<Spanned<Checked<Accept>>>,
    #[serde(default)]
    except: Vec<Spanned<Checked<User>>>,
    #[serde(default)]
    aliases: BTreeMap<Spanned<String>, Spanned<OneOrMany>>,
    alias_file: Option<Spanned<OneOrMany>>,
    #[serde(default)]
    domain_aliases: BTreeMap<Spanned<String>, Checked<Domain>>,
    separator: Option<Checked<Separators>>,
    postmaster: Option<Spanned<Checked<User>>>,
    umask: Option<Checked<Umask>>,
    max_size: Option<Checked<OctetCount>>,
    deliver: Option<Spanned<OneOrTable>>,
}

/// One address.
struct User(Mailbox);

impl Parse for User {
    const EXPECTED: &'static str = "an address such as \"alice@example.org\"";

    fn parse(text: &str) -> Result<User, String> {
        match Mailbox::parse(text) {
            Some(mailbox) if mailbox.domain().is_some() => Ok(User(mailbox)),
            _ => Err(format!("{text:?} is no address: write one such as \"alice@example.org\"")),
        }
    }
}

struct Separators(String);

impl Parse for Separators {
    const EXPECTED: &'static str = "a character such as \"+\", several, or \"\" for none";

    fn parse(text: &str) -> Result<Separators, String> {
        // The others mean something in addresses, or are parts of names.
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

/// `"one"`, or `["one", "two"]`.
enum OneOrMany {
    One(String),
    Many(Vec<Spanned<String>>),
}

impl OneOrMany {
    /// Each with the place where it is written; `whole`: where all of it is.
    fn into_each(self, whole: Range<usize>) -> Vec<(String, Range<usize>)> {
        match self {
            OneOrMany::One(one) => vec![(one, whole)],
            OneOrMany::Many(many) => many.into_iter().map(|one| (one.get_ref().clone(), one.span())).collect(),
        }
    }
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrMany, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, or a list of them")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<OneOrMany, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(OneOrMany::Many)
            }
        }

        deserializer.deserialize_any(Texts)
    }
}

/// One way for all, or a table of ways.
enum OneOrTable {
    One(String),
    Table(BTreeMap<Spanned<String>, Spanned<String>>),
}

impl<'de> Deserialize<'de> for OneOrTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrTable, D::Error> {
        struct Ways;

        impl<'de> Visitor<'de> for Ways {
            type Value = OneOrTable;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a way to deliver such as \"lmtp:/run/dovecot/lmtp\", or a table of them")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<OneOrTable, E> {
                Ok(OneOrTable::One(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OneOrTable, A::Error> {
                BTreeMap::deserialize(MapAccessDeserializer::new(map)).map(OneOrTable::Table)
            }
        }

        deserializer.deserialize_any(Ways)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CustomerConfig;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    /// So many lines stand before those of `[mailboxes]`.
    const HEAD: &str = "hostname = \"mail.example.org\"\n[provider]\naddress = \"relay.example.net\"\n\
                        name = \"acme\"\nsecret = \"s\"\n[mailboxes]\n";

    /// What a customer's file with this table says, and one called `aliases` beside it; less the name of their folder.
    fn load(table: &str, aliases: &str) -> Result<MailboxesConfig, String> {
        load_below(HEAD, table, aliases)
    }

    fn load_below(head: &str, table: &str, aliases: &str) -> Result<MailboxesConfig, String> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("odmr.toml");
        fs::write(&path, format!("{head}{table}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(folder.path().join("aliases"), aliases).unwrap();
        let said = |error: ConfigError| error.to_string().replace(&format!("{}/", folder.path().display()), "");
        CustomerConfig::load(&path).map(|customer| customer.mailboxes).map_err(said)
    }

    /// A table with these lines more is refused; line 1 is the first of them.
    #[track_caller]
    fn check(lines: &str, aliases: &str, place: &str, phrase: &str) {
        let table = "root = \"mail\"\naccept = [\"alice@example.org\", \"bob@example.org\", \"@example.com\"]\n";
        let Err(said) = load(&format!("{table}{lines}\n"), aliases) else { panic!("nothing was said of {lines}") };
        let place = match place.parse::<usize>() {
            Ok(line) => format!("odmr.toml:{}", HEAD.lines().count() + 2 + line),
            Err(_) => place.to_owned(),
        };
        let right = said.starts_with(&format!("{place}: ")) && said.contains(phrase);
        assert!(right, "{lines}\n{aliases}\nwanted: {place}: … {phrase} …\n   got: {said}");
    }

    #[test]
    #[rustfmt::skip]
    fn mistakes_in_mailboxes_are_named() {
        let toml = |lines: &str, place: usize, phrase: &str| check(lines, "", &place.to_string(), phrase);
        toml("except = [\"spam\"]", 1, "\"spam\" is no address: write one such as");
        toml("except = [\"@example.com\"]", 1, "is no address");
        toml("except = [\"spam@example.org\"]", 1, "spam@example.org is an exception of nothing");
        toml("except = [\n\"alice@example.org\"]", 2, "alice@example.org is in `accept` too");
        toml("except = [\"x@example.com\"]\naliases = { \"X@example.com\" = \"alice\" }", 1, "x@example.com is an alias too (odmr.toml:10): take one");
        toml("except = [\"x@example.com\"]\naliases = { X = \"alice\" }", 1, "x@example.com is an alias too");
        toml("except = [\"Abuse@example.com\"]", 1, "abuse@example.com must be taken (RFC 5321 section 4.5.1");
        toml("domain-aliases = { \"example.net\" = \"example.edu\" }", 1, "example.edu has no rules here: add it to `accept`");
        toml("domain-aliases = { \"example.com\" = \"example.org\" }", 1, "example.com has rules of its own");
        toml("domain-aliases = { \"a.example\" = \"example.org\", \"b.example\" = \"a.example\" }", 1, "a.example is itself another name only");
        toml("domain-aliases = { \"a.example\" = \"a.example\" }", 1, "a.example is itself another name only");
        toml("[mailboxes.domain-aliases]\n\"A.example\" = \"example.org\"\n\"a.example\" = \"example.org\"", 3, "a.example stands here twice");
        toml("domain-aliases = { \"a.example\" = \"localhost\" }", 1, "has no dot");
        toml("domain-aliases = { localhost = \"example.org\" }", 1, "has no dot");
        toml("separator = \"a\"", 1, "'a' cannot separate a detail from a name");
        toml("separator = \"+@\"", 1, "'@' cannot separate");
        toml("separator = 1", 1, "expected a character such as \"+\"");
        toml("postmaster = \"nobody@example.org\"", 1, "nobody takes nobody@example.org (no rule takes it), and `postmaster` must lead to");
        toml("postmaster = \"alice@example.net\"", 1, "nobody takes alice@example.net (foreign");
        toml("postmaster = \"alice\"", 1, "is no address");
        toml("umask = \"700\"", 1, "the owner of a mailbox could not use it");
        toml("umask = \"0177\"", 1, "the owner of a mailbox could not use it");
        toml("umask = \"000\"", 1, "every user could change mail");
        toml("umask = \"078\"", 1, "\"078\" is no umask: write octal digits");
        toml("umask = \"77\"", 1, "is no umask");
        toml("umask = 77", 1, "expected octal digits in quotes");
        toml("deliver = \"dovecot\"", 1, "\"dovecot\" is no way to deliver: write \"lmtp:/run/dovecot/lmtp\"");
        toml("deliver = \"lmtp:\"", 1, "is no way to deliver");
        toml("deliver = \"mbox:/var/mail\"", 1, "is no way to deliver");
        toml("deliver = \"smtp:/run/smtp\"", 1, "has a path, and SMTP goes to a host");
        toml("deliver = \"smtp:a:b\"", 1, "\"b\" is no port");
        toml("deliver = \"lmtp:::1\"", 1, "write \"[::1]:24\"");
        toml("deliver = [\"lmtp:a\"]", 1, "a way to deliver such as \"lmtp:/run/dovecot/lmtp\", or a table of them");
        toml("[mailboxes.deliver]\n\"x\" = \"lmtp:a\"", 2, "\"x\" has no dot");
        toml("[mailboxes.deliver]\n\"x\" = \"lmtp:a\"", 2, "or \"*\" for all that have no rule of their own");
        toml("[mailboxes.deliver]\n\"*\" = \"lmtp:a\"\n\"example.net\" = \"lmtp:a\"", 3, "example.net is no domain of ours");
        toml("[mailboxes.deliver]\n\"x@example.net\" = \"lmtp:a\"", 2, "example.net is no domain of ours");
        toml("[mailboxes.deliver]\n\"x@example.org\" = \"lmtp:a\"", 2, "x@example.org is no mailbox of ours");
        toml("[mailboxes.deliver]\n\"alice+x@example.org\" = \"lmtp:a\"", 2, "is a mailbox with a detail, which goes where the mailbox does: write alice@example.org");
        toml("[mailboxes.deliver]\n\"abuse@example.org\" = \"lmtp:a\"", 2, "mail for abuse@example.org goes to postmaster@example.org");
        toml("[mailboxes.deliver]\n\"a@b@c\" = \"lmtp:a\"", 2, "is no address");
        toml("[mailboxes.deliver]\n\"Example.com\" = \"lmtp:a\"\n\"example.com\" = \"lmtp:b\"", 3, "@example.com stands here twice");
        toml("domain-aliases = { \"example.net\" = \"example.org\" }\ndeliver = { \"example.net\" = \"lmtp:a\" }", 2, "example.net is another name of example.org only");
        toml("aliases = { \"x@example.com\" = \"alice\" }\ndeliver = { \"x@example.com\" = \"lmtp:a\" }", 2, "x@example.com gets no mail, as an alias (odmr.toml:9) sends it elsewhere");
        toml("deliver = { \"alice@example.org\" = 5 }", 1, "invalid type: integer `5`, expected a string");
    }

    #[test]
    #[rustfmt::skip]
    fn mistakes_in_aliases_are_named() {
        let toml = |lines: &str, place: isize, phrase: &str| {
            check(&format!("[mailboxes.aliases]\n{lines}"), "", &(1 + place).to_string(), phrase);
        };
        toml("\"a b\" = \"alice\"", 1, "\"a b\" is no name of an alias");
        toml("info = []", 1, "the alias info leads nowhere");
        toml("info = 5", 1, "expected a string, or a list");
        toml("info = [\n\"alice\",\n\"carol\"]", 3, "the alias info leads to carol@example.org, which nobody takes (no rule takes it): add it to `accept`");
        toml("info = \"dave@example.net\"", 1, "the alias info leads to dave@example.net, which is not in a domain of ours: take that alias out, accept the address itself, and hand it to the local mail server");
        toml("info = \"|/bin/cat\"", 1, "\"|/bin/cat\" is a program");
        toml("info = \"/var/mail/info\"", 1, "is a file");
        toml("info = \":include:/etc/list\"", 1, "is a list in another file");
        toml("a = \"alice\"\nb = \"c\"\nc = \"d\"\nd = \"b\"", 2, "b -> c -> d -> b: these aliases go in circles");
        toml("postmaster = \"abuse\"", 1, "postmaster -> postmaster@example.org -> postmaster: these aliases go in circles");
        toml("bob = \"bob\"\npostmaster = [\"bob\", \"abuse\"]", 2, "postmaster -> postmaster@example.org -> postmaster: these aliases go in circles");
        toml("\"info@example.org\" = [\"info@example.org\", \"bob\"]", 1, "the alias info@example.org leads to info@example.org, which nobody takes");
        toml("\"Info@example.org\" = \"alice\"\n\"info@example.org\" = \"bob\"", 2, "info@example.org stands in odmr.toml:10 too");
        toml("\"@localhost\" = \"alice\"", 1, "has no dot");
        let steps = |count: usize| (1..count).fold("a0 = \"alice\"".to_owned(), |text, at| format!("{text}\na{at} = \"a{}\"", at - 1));
        assert!(load(&format!("root = \"mail\"\naccept = [\"alice@example.org\"]\n[mailboxes.aliases]\n{}", steps(10)), "").is_ok());
        toml(&steps(11), 11, "a10 -> a9 -> a8 -> a7 -> a6 -> a5 -> a4 -> a3 -> a2 -> a1: more than 10 steps");
        let list = |count: usize| format!("all = [{}]", (0..count).map(|at| format!("\"u{at}@example.com\",")).collect::<String>());
        assert!(load(&format!("root = \"mail\"\naccept = [\"@example.com\"]\n[mailboxes.aliases]\n{}", list(100)), "").is_ok());
        toml(&list(101), 1, "the alias all leads to more than 100 mailboxes");
        for (alias, name) in [("alice@example.org", "alice@example.org"), ("alice", "alice@example.org"), ("@example.com", "@example.com")] {
            let phrase = format!("{name} is in `accept` and an alias (odmr.toml:10) that keeps all mail from it: take one out");
            toml(&format!("\"{alias}\" = \"bob\""), -1, &phrase);
        }
    }

    #[test]
    #[rustfmt::skip]
    fn mistakes_in_the_file_of_aliases_are_named() {
        let file = |aliases: &str, place: &str, phrase: &str| check("alias-file = \"aliases\"", aliases, place, phrase);
        file("root: alice\n\nRoot: bob", "aliases:3", "root stands in aliases:1 too: put all targets into one of the two");
        file("a: bob\nroot: alice,\n  carol", "aliases:3", "the alias root leads to carol@example.org, which nobody takes");
        file("a: bob\nroot: alice,\n  carol@example.net", "aliases:3", "which is not in a domain of ours");
        file("a: \"|/bin/cat\"", "aliases:1", "is a program, and aliases lead to mailboxes here");
        file("a: b\nb: a", "aliases:1", "a -> b -> a: these aliases go in circles");
        file("alice: bob", "0", "alice@example.org is in `accept` and an alias (aliases:1)");
        check("alias-file = \"aliases\"\naliases = { root = \"alice\" }", "root: bob", "aliases:1", "root stands in odmr.toml:10 too");
        check("alias-file = [\"aliases\", \"aliases\"]", "root: bob", "aliases:1", "root stands in aliases:1 too");
        check("alias-file = [\n\"aliases\",\n\"none\"]", "", "3", "the aliases in none cannot be read: No such file");
        check("alias-file = \"\"", "", "1", "is no path");
        check("alias-file = 5", "", "1", "expected a string, or a list of them");
    }

    #[test]
    fn names_in_domains_that_are_not_asked_for_get_no_mail() {
        fn check(lines: &str, aliases: &str, place: &str, phrase: &str) {
            let head = HEAD.replace("[mailboxes]", "domains = [\"example.org\"]\n[mailboxes]");
            let table = format!("root = \"mail\"\naccept = [\"alice@example.org\"]\n{lines}\n");
            let said = load_below(&head, &table, aliases).unwrap_err();
            assert!(said.starts_with(&format!("{place}: {phrase} can get no mail")), "{said}");
        }
        check("aliases = { \"info@example.com\" = \"alice\" }", "", "odmr.toml:10", "info@example.com");
        check("domain-aliases = { \"example.net\" = \"example.org\" }", "", "odmr.toml:10", "example.net");
        check("alias-file = \"aliases\"", "root: alice\n@example.com: alice", "aliases:2", "@example.com");
    }

    #[test]
    fn every_key_of_mailboxes_is_read() {
        let text = "root = \"/var/mail\"\naccept = [\"@example.org\"]\nexcept = [\"spam@example.org\"]\n\
                    aliases = { \"info@example.com\" = \"alice\" }\nalias-file = \"aliases\"\n\
                    domain-aliases = { \"example.net\" = \"example.org\" }\nseparator = \"\"\n\
                    postmaster = \"alice@example.org\"\numask = \"0027\"\nmax-size = \"1KiB\"\n\
                    deliver = \"lmtp:run/lmtp\"\n";
        let mailboxes = load(text, "root: alice").unwrap();
        assert_eq!((mailboxes.umask, mailboxes.max_size), (0o027, 1024));
        let domains: Vec<_> = mailboxes.rules.domains().iter().map(Domain::as_str).collect();
        assert_eq!(domains, ["example.org", "example.com", "example.net"]);
        let said = mailboxes.rules.explain_typed("a+b@example.net").unwrap();
        let expected = "a+b@example.net: domain alias of example.org, catch-all @example.org -> lmtp:/";
        assert!(said.starts_with(expected) && said.ends_with("/run/lmtp"), "{said}");
    }
}
