//! The name of a message in a Maildir (maildir(5), Maildir++): `unique,S=size,W=wire-size:2,flags`. File names are
//! octets.
//!
//! In a queue the fields after the unique part also record the attempts at a message that stays ([`AttemptRecord`]): a
//! rename is atomic, and works on a full disk.
//!
//! ```text
//! T=1795689600                   when the message was first seen, if its time of arrival is impossible
//! O=1795689600                   when the first attempt was made
//! A=3                            the number of attempts
//! R=1795689600                   when a rejection was first turned into a deferral (`soft-bounce`)
//! P=3-1-1795689600               the sessions that it has ended, the calls that skip it, when it ended the last session
//! L=450_4.2.1_mailbox_is_full    the last reply
//! ```

use std::cmp::Ordering;
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::clock::Timestamp;
use crate::net::trace::printable;

/// The keys of the fields of [`AttemptRecord`].
const RECORD_KEYS: [&[u8]; 6] = [b"T=", b"O=", b"A=", b"R=", b"P=", b"L="];

/// Octets of a file name at most: `NAME_MAX`, less the room for flags that a mail reader may add.
const NAME_LIMIT: usize = 255 - 12;

/// Octets that stay of the unique part if the name would be too long.
const SHORT_UNIQUE: usize = 100;

/// Octets of a reply that are recorded at most.
const LAST_REPLY_LIMIT: usize = 60;

/// The name of a message in a Maildir.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// `1767323045.M1P2Q3.host,S=120,W=128`; in `cur` with its info, `:2,` and flags.
    pub name: OsString,
    /// The file is in `cur`.
    pub seen: bool,
}

/// The record of the attempts to send a message, in the name of its file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttemptRecord {
    /// When the message was first seen. Only a message whose time of arrival is impossible has it.
    pub first_seen: Option<Timestamp>,
    /// When the first attempt was made after which the message stayed.
    pub first_offered: Option<Timestamp>,
    /// The number of attempts after which the message stayed.
    pub attempts: u32,
    /// When a customer first rejected the message and that counted as a deferral (`soft-bounce`).
    pub first_rejected: Option<Timestamp>,
    /// The sessions that the message has ended; `None`: the last attempt ended none.
    pub ended: Option<EndedSessions>,
    /// The last reply to a recipient that stayed open, at most 60 octets, with `_` for all but letters, digits, `.`,
    /// `-`, `+` and `@` of ASCII.
    pub last_reply: Option<String>,
}

/// The sessions in a row that a message has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedSessions {
    /// The number of sessions.
    pub sessions: u32,
    /// The number of calls that will skip the message.
    pub skip: u32,
    /// When the message ended the last session.
    pub at: Timestamp,
}

impl Entry {
    /// Orders messages by the unique parts of their names, which begin with the time: the oldest first.
    pub fn by_age(one: &Entry, other: &Entry) -> Ordering {
        one.unique().cmp(other.unique()).then_with(|| one.cmp(other))
    }

    /// Returns the name before the info.
    fn base(&self) -> &[u8] {
        self.name.as_bytes().split(|octet| *octet == b':').next().unwrap_or_default()
    }

    /// Returns the part of the name before the fields and the info. It stays when a mail reader moves or flags the
    /// file.
    pub fn unique(&self) -> &OsStr {
        OsStr::from_bytes(self.base().split(|octet| *octet == b',').next().unwrap_or_default())
    }

    /// Returns the unique part for the log and for terminals, without control characters.
    pub fn shown_unique(&self) -> String {
        printable(self.unique().as_bytes())
    }

    /// Returns the flags, and what other programs have written after them; both may be empty.
    fn info(&self) -> (&[u8], &[u8]) {
        let info = &self.name.as_bytes()[self.base().len()..];
        let info = info.strip_prefix(b":2,").unwrap_or_default();
        info.split_at(info.iter().take_while(|octet| octet.is_ascii_uppercase()).count())
    }

    /// Returns whether the message has this flag, `A` to `Z`.
    pub fn has(&self, flag: char) -> bool {
        self.seen && self.info().0.iter().any(|other| char::from(*other) == flag)
    }

    /// Returns the entry with one more flag: in `cur`, with the flags in alphabetical order (maildir(5)). What other
    /// programs have written after the flags stays there.
    pub(super) fn flagged(&self, flag: char) -> Entry {
        let (flags, others) = self.info();
        let has = |octet: &u8| flags.contains(octet) || char::from(*octet) == flag;
        let flags: Vec<u8> = (b'A'..=b'Z').filter(has).collect();
        let name = [self.base(), b":2,", &flags, others].concat();
        Entry { name: OsString::from_vec(name), seen: true }
    }

    /// Returns whether the file has octets above 127, according to its name (`E=8`, which only
    /// [`MessageWriter`](super::MessageWriter) writes).
    pub fn eight_bit(&self) -> bool {
        self.field("E=") == Some("8")
    }

    /// Returns the size of the whole file in octets with CRLF line ends, according to its name (Maildir++ `W=`).
    /// `None`: the name does not have it.
    pub fn wire_size(&self) -> Option<u64> {
        self.field("W=")?.parse().ok()
    }

    /// Returns the size of the file in octets, according to its name (Maildir++ `S=`). `None`: the name does not have
    /// it.
    pub fn file_size(&self) -> Option<u64> {
        self.field("S=")?.parse().ok()
    }

    /// Returns the domain in the name of a file in a shared directory
    /// ([`Domain::file_name`](crate::mail::address::Domain::file_name)), and whether the message has no sender.
    pub fn destination(&self) -> Option<(&str, bool)> {
        self.field("D=").map(|name| (name, false)).or_else(|| self.field("B=").map(|name| (name, true)))
    }

    /// Returns when the file was named, according to its name (maildir(5)).
    pub fn named(&self) -> Option<Timestamp> {
        seconds(self.unique().to_str()?.split('.').next()?)
    }

    /// Returns the record of attempts in the name.
    pub fn record(&self) -> AttemptRecord {
        AttemptRecord {
            first_seen: self.field("T=").and_then(seconds),
            first_offered: self.field("O=").and_then(seconds),
            attempts: self.field("A=").and_then(|attempts| attempts.parse().ok()).unwrap_or(0),
            first_rejected: self.field("R=").and_then(seconds),
            ended: self.ended(),
            last_reply: self.field("L=").map(str::to_owned),
        }
    }

    /// Returns the record of the sessions that the message has ended.
    pub fn ended(&self) -> Option<EndedSessions> {
        let mut numbers = self.field("P=")?.splitn(3, '-');
        let (sessions, skip) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        Some(EndedSessions { sessions, skip, at: seconds(numbers.next()?)? })
    }

    /// Returns the entry with this record instead of the old one. If the name would be too long for the system, it gets
    /// another unique part, and loses its other fields.
    pub(super) fn with_record(&self, record: &AttemptRecord) -> Entry {
        let is_record = |field: &[u8]| RECORD_KEYS.iter().any(|key| field.starts_with(key));
        let mut fields = self.base().split(|octet| *octet == b',');
        let mut name = fields.next().unwrap_or_default().to_vec();
        for field in fields.filter(|field| !is_record(field)) {
            name.push(b',');
            name.extend_from_slice(field);
        }
        let time = |key: &str, time: Option<Timestamp>| time.map(|time| format!(",{key}={}", time.seconds()));
        let ended =
            record.ended.map(|EndedSessions { sessions, skip, at }| format!(",P={sessions}-{skip}-{}", at.seconds()));
        let attempts = Some(format!(",A={}", record.attempts)).filter(|_| record.attempts > 0);
        let rejected = time("R", record.first_rejected);
        let fields = [time("T", record.first_seen), time("O", record.first_offered), attempts, rejected, ended];
        let fields: String = fields.into_iter().flatten().collect();
        let mut info = self.name.as_bytes()[self.base().len()..].to_vec();
        if name.len() + fields.len() + info.len() > NAME_LIMIT {
            name = self.short_unique();
            info = if info.is_empty() { info } else { [b":2,", self.info().0].concat() };
        }
        name.extend_from_slice(fields.as_bytes());
        if let Some(reply) = &record.last_reply {
            let room = NAME_LIMIT.saturating_sub(name.len() + info.len() + ",L=".len()).min(LAST_REPLY_LIMIT);
            let plain =
                |octet: u8| if octet.is_ascii_alphanumeric() || b".-+@".contains(&octet) { octet } else { b'_' };
            if room > 0 {
                name.extend_from_slice(b",L=");
                name.extend(reply.bytes().take(room).map(plain));
            }
        }
        name.extend_from_slice(&info);
        Entry { name: OsString::from_vec(name), seen: self.seen }
    }

    /// Returns a shorter unique part; a hash of the whole name makes it unique.
    fn short_unique(&self) -> Vec<u8> {
        let mut hasher = DefaultHasher::new();
        self.name.hash(&mut hasher);
        let unique = self.unique().as_bytes();
        let start = &unique[..unique.len().min(SHORT_UNIQUE)];
        [start, format!(".{:016x}", hasher.finish()).as_bytes()].concat()
    }

    /// Returns the value of a field after the unique part.
    pub(super) fn field(&self, key: &str) -> Option<&str> {
        let mut fields = self.base().split(|octet| *octet == b',').skip(1);
        std::str::from_utf8(fields.find_map(|field| field.strip_prefix(key.as_bytes()))?).ok()
    }
}

fn seconds(text: &str) -> Option<Timestamp> {
    text.parse().ok().map(Timestamp::from_seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &[u8]) -> Entry {
        Entry { name: OsString::from_vec(name.to_vec()), seen: true }
    }

    #[test]
    fn a_name_records_attempts() {
        let time = Timestamp::from_seconds;
        let record = AttemptRecord {
            first_seen: Some(time(5)),
            first_offered: Some(time(6)),
            attempts: 7,
            first_rejected: Some(time(9)),
            ended: Some(EndedSessions { sessions: 4, skip: 2, at: time(8) }),
            last_reply: Some("450 4.2.1 <a@b>: full, wait/2".to_owned()),
        };
        let fields = ",T=5,O=6,A=7,R=9,P=4-2-8,L=450_4.2.1__a@b___full__wait_2";
        for (name, base, info) in [
            ("7.x.host", "7.x.host", ""),
            ("7.x.host,S=1,W=2:2,FS", "7.x.host,S=1,W=2", ":2,FS"),
            ("7.x.host,T=9999999999,W=2,A=1,L=x:2,S", "7.x.host,W=2", ":2,S"),
            ("7 x", "7 x", ""),
        ] {
            let named = entry(name.as_bytes()).with_record(&record);
            assert_eq!(named.name.to_str(), Some(format!("{base}{fields}{info}").as_str()));
            assert_eq!(named.unique(), entry(name.as_bytes()).unique());
            let read = named.record();
            let last_reply = Some("450_4.2.1__a@b___full__wait_2".to_owned());
            assert_eq!(read, AttemptRecord { last_reply, ..record.clone() });
            assert_eq!(
                named.with_record(&AttemptRecord::default()).name.to_str(),
                Some(format!("{base}{info}").as_str())
            );
        }
        assert_eq!(entry(b"7.x,P=1-2,A=x,T=,O=-,R=y").record(), AttemptRecord::default());
    }

    #[test]
    fn a_name_may_have_any_octets_and_its_length_is_limited() {
        let latin = entry(b"2.M1.\xe4rger.host,S=3:2,S");
        assert_eq!(
            (latin.unique().as_bytes(), latin.field("S="), latin.has('S')),
            (&b"2.M1.\xe4rger.host"[..], Some("3"), true)
        );
        let reply = |length| AttemptRecord { last_reply: Some("x".repeat(length)), ..AttemptRecord::default() };
        assert_eq!(
            latin.with_record(&reply(1000)).record().last_reply.map(|reply| reply.len()),
            Some(LAST_REPLY_LIMIT)
        );
        let long = entry(&[&b"l".repeat(200)[..], b":2,S"].concat());
        assert_eq!(long.with_record(&reply(1000)).name.len(), NAME_LIMIT);
        // Names that have no room for the fields get different unique parts.
        let [one, other] = [b'1', b'2'].map(|end| entry(&[&b"l".repeat(249)[..], &[end], b":2,S"].concat()));
        let [one, other] = [&one, &other].map(|entry| entry.with_record(&reply(3)));
        assert_eq!((one.record().last_reply.as_deref(), one.has('S')), (Some("xxx"), true));
        assert!(one.unique() != other.unique() && one.name.len() < NAME_LIMIT);
    }

    #[test]
    fn flags_of_names_that_other_programs_made() {
        for (name, flags, flagged) in [
            ("1", "", "1:2,F"),
            ("1:2,", "", "1:2,F"),
            ("1:2,RS", "RS", "1:2,FRS"),
            ("1:2,FSa,x", "FS", "1:2,FSa,x"),
            // Experimental semantics (maildir(5)), and two infos.
            ("1:1,x", "", "1:2,F"),
            ("1,U=3:2:2,RS", "", "1,U=3:2,F"),
        ] {
            let entry = entry(name.as_bytes());
            assert!(flags.chars().all(|flag| entry.has(flag)), "{name}");
            assert_eq!(entry.flagged('F').name.to_str(), Some(flagged));
        }
    }
}
