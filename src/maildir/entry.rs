//! The name of a message in a Maildir (maildir(5), Maildir++): `unique,S=size,W=wire-size,T=first-seen:2,flags`.

use crate::clock::Timestamp;

/// The key of the field for when a message was first seen.
const FIRST_SEEN: &str = "T=";

/// A message found in a Maildir.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// `1767323045.M1P2Q3.host,S=120,W=128`; in `cur` with its info, `:2,` and flags.
    pub name: String,
    /// Whether it is in `cur`.
    pub seen: bool,
}

impl Entry {
    /// Returns the part of the name before size and info. It stays the same when a mail reader moves or flags the file.
    pub fn unique(&self) -> &str {
        self.name.split([',', ':']).next().unwrap_or(&self.name)
    }

    /// Returns whether the message has this flag, a capital letter.
    pub fn has(&self, flag: char) -> bool {
        let flags = self.name.split_once(":2,").map_or("", |(_, info)| info);
        self.seen && flags.chars().take_while(char::is_ascii_uppercase).any(|other| other == flag)
    }

    /// Returns whether the file has octets above 127, according to its name (`E=8`, which only
    /// [`MessageWriter`](super::MessageWriter) writes).
    pub fn eight_bit(&self) -> bool {
        self.field("E=") == Some("8")
    }

    /// Returns the size of the whole file in octets with CRLF line ends, according to its name (Maildir++ `W=`). `None`:
    /// the name does not have it.
    pub fn wire_size(&self) -> Option<u64> {
        self.field("W=")?.parse().ok()
    }

    /// Returns when the file was named, according to its name (maildir(5)).
    pub fn named(&self) -> Option<Timestamp> {
        self.unique().split('.').next()?.parse().ok().map(Timestamp::from_seconds)
    }

    /// Returns when the message was first seen, according to its name (`T=`, seconds since 1970). Only a message whose time
    /// of arrival is impossible has it.
    pub fn first_seen(&self) -> Option<Timestamp> {
        self.field(FIRST_SEEN)?.parse().ok().map(Timestamp::from_seconds)
    }

    /// Returns the entry with this time as the one when it was first seen.
    pub(super) fn with_first_seen(&self, time: Timestamp) -> Entry {
        let (base, info) = self.name.split_once(':').map_or((&*self.name, None), |(base, info)| (base, Some(info)));
        let mut fields: Vec<_> = base.split(',').filter(|field| !field.starts_with(FIRST_SEEN)).collect();
        let field = format!("{FIRST_SEEN}{}", time.seconds());
        fields.push(&field);
        let info = info.map(|info| format!(":{info}")).unwrap_or_default();
        Entry { name: fields.join(",") + &info, seen: self.seen }
    }

    /// Returns the value of a field after the unique part.
    pub(super) fn field(&self, key: &str) -> Option<&str> {
        self.name.split(':').next()?.split(',').skip(1).find_map(|field| field.strip_prefix(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_records_when_the_message_was_first_seen() {
        let mark = |name: &str, seconds| {
            let entry = Entry { name: name.to_owned(), seen: true };
            let marked = entry.with_first_seen(Timestamp::from_seconds(seconds));
            assert_eq!(marked.first_seen().map(Timestamp::seconds), Some(seconds));
            assert_eq!((marked.unique(), marked.has('S')), (entry.unique(), entry.has('S')));
            assert_eq!((marked.wire_size(), marked.seen), (entry.wire_size(), true));
            marked.name
        };
        assert_eq!(mark("7.x.host", 5), "7.x.host,T=5");
        assert_eq!(mark("7.x.host,S=1,W=2:2,FS", 5), "7.x.host,S=1,W=2,T=5:2,FS");
        // The clock was wrong when it was recorded.
        assert_eq!(mark("7.x.host,T=9999999999,W=2:2,S", 5), "7.x.host,W=2,T=5:2,S");
    }
}
