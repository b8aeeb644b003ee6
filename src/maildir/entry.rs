//! The name of a message in a Maildir (maildir(5), Maildir++): `unique,S=size,W=wire-size:2,flags`.

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

    /// Returns the value of a field after the unique part.
    pub(super) fn field(&self, key: &str) -> Option<&str> {
        self.name.split(':').next()?.split(',').skip(1).find_map(|field| field.strip_prefix(key))
    }
}
