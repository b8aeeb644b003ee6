//! Sessions: the drivers of the two SMTP roles over a connection.
//!
//! `server` drives the server role, and `client` the client role, each in a thread that has one connection. After a
//! turn `provider/turned_session` drives the provider's client role in a thread for all, which never waits for one
//! peer. Both drivers of the client role use the functions here to read replies, send commands and send content.

pub mod client;
pub mod pace;
pub mod remote;
pub mod server;
pub mod settings;

use std::borrow::Cow;
use std::io::{self, Read};
use std::path::Path;

pub use self::remote::{ClientIdentity, Remote, RemoteError, RemoteSettings, TlsMode};
pub use self::settings::{Limits, Timeouts};
use crate::maildir::has_room;
use crate::net::connection::{Connection, Line};
use crate::net::trace::quoted;
use crate::smtp::client::Client;
use crate::smtp::content::ContentEncoder;
use crate::smtp::limits;
use crate::smtp::reply::{Reply, ReplyReader};

/// Octets of content in one block. Each block has its own deadline, against peers that send an octet now and then. It
/// also bounds the octets that wait to be sent.
pub const CONTENT_BLOCK: usize = 64 * 1024;

/// Octets of content that are read from the file and queued at a time.
const SEND_BLOCK: usize = 32 * 1024;

/// Reads a peer's replies.
#[derive(Default)]
pub struct ReplyInput {
    reader: ReplyReader,
}

impl ReplyInput {
    /// The next reply; `None`: not all its lines have arrived.
    ///
    /// # Errors
    /// The peer has sent something that is not a reply; the text has it.
    pub fn next(&mut self, connection: &mut Connection) -> Result<Option<Reply>, String> {
        loop {
            let line = match connection.take_reply_line(limits::REPLY_LINE) {
                Line::Whole(line) => line,
                Line::None => return Ok(None),
                Line::TooLong => return Err("a reply line is too long".to_owned()),
            };
            connection.trace.received(&line);
            let reply = self.reader.line(&line);
            let reply = reply.map_err(|error| format!("not a reply of an SMTP server: {:?}", error.0))?;
            if reply.is_some() {
                return Ok(reply);
            }
        }
    }

    /// The next reply after the end of the peer's input. Some servers close the connection after a rejection without a
    /// line end. So the end of the input ends the line too, but only of 4yz and 5yz: a truncated 250 must not count as
    /// sent.
    pub fn next_at_end(&mut self, connection: &mut Connection) -> Option<Reply> {
        if let Ok(Some(reply)) = self.next(connection) {
            return Some(reply);
        }
        let rest = connection.received().to_vec();
        connection.consume(rest.len());
        let rest = rest.strip_suffix(b"\r").unwrap_or(&rest);
        if !rest.is_empty() {
            connection.trace.received(rest);
        }
        self.reader.end(rest)
    }
}

/// Queues commands on the connection, and traces them without secrets.
pub fn send_commands(connection: &mut Connection, client: &Client, octets: &[u8]) {
    for line in octets.split_inclusive(|octet| *octet == b'\n').filter(|_| connection.trace.enabled()) {
        let line = line.trim_ascii_end();
        connection.trace.sent(&without_secrets(line, client.in_auth() && !line.starts_with(b"AUTH ")));
    }
    connection.send(octets);
}

/// A line as the trace shows it: AUTH with its mechanism but without the initial response; `***` if the line is
/// `secret`.
fn without_secrets(line: &[u8], secret: bool) -> Cow<'_, [u8]> {
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    match (words.next(), words.next(), words.next()) {
        _ if secret => b"***".into(),
        (Some(verb), Some(mechanism), Some(_)) if verb.eq_ignore_ascii_case(b"AUTH") => {
            [b"AUTH ", mechanism, b" ***"].concat().into()
        }
        _ => line.into(),
    }
}

/// Sends the content of one message, block by block.
pub struct ContentOutput {
    encoder: ContentEncoder,
    /// Octets that BDAT has announced (RFC 3030 section 2); `None`: the content follows DATA.
    announced: Option<u64>,
    /// Octets that were queued so far.
    sent: u64,
}

impl ContentOutput {
    /// Begins a message of `size` octets on the wire. `chunk`: the client has announced them by BDAT.
    pub fn new(chunk: bool, size: u64) -> ContentOutput {
        let encoder = if chunk { ContentEncoder::bdat() } else { ContentEncoder::data() };
        ContentOutput { encoder, announced: chunk.then_some(size), sent: 0 }
    }

    /// Reads a block of content, at most 32 KiB, and queues it on the connection. Returns whether the content has
    /// ended.
    ///
    /// # Errors
    /// The content cannot be read, or its size is not the one that BDAT has announced. Close the connection: the peer
    /// would read content as commands.
    pub fn send_block(&mut self, content: &mut dyn Read, connection: &mut Connection) -> io::Result<bool> {
        let mut buffer = [0; SEND_BLOCK];
        let octets = content.read(&mut buffer)?;
        let out = connection.out();
        let before = out.len();
        match octets {
            0 => self.encoder.finish(out),
            _ => self.encoder.feed(&buffer[..octets], out),
        }
        self.sent += (out.len() - before) as u64;
        if self.announced.is_some_and(|size| self.sent > size || octets == 0 && self.sent != size) {
            out.truncate(before);
            return Err(io::Error::other("the content does not have the size that BDAT announced"));
        }
        Ok(octets == 0)
    }
}

/// Checks that the disk of a directory has room for a message of this many octets and for the reserve (RFC 1870 section
/// 6.1), so that the client gets 452 before it sends the content.
///
/// # Errors
/// The 452 for MAIL or RCPT.
pub fn check_room(directory: &Path, octets: u64, reserve: u64) -> Result<(), Reply> {
    if has_room(directory, octets, reserve) { Ok(()) } else { Err(disk_full_reply()) }
}

fn disk_full_reply() -> Reply {
    Reply::new(452, "4.3.1", "The disk is full, try again later")
}

/// Logs that a message could not be stored, and returns the reply to the client (RFC 1870 section 6.1, RFC 3463 section
/// 3.4).
pub fn storage_failure_reply(error: &io::Error) -> Reply {
    log::error!("event=storage-failed error={}", quoted(error));
    storage_reply(error)
}

/// The reply to the client whose message could not be stored; nothing is logged.
pub fn storage_reply(error: &io::Error) -> Reply {
    match error.kind() {
        // `FileTooLarge`: the file exceeds RLIMIT_FSIZE, or the limit of the file system.
        io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge => disk_full_reply(),
        io::ErrorKind::QuotaExceeded => Reply::new(452, "4.2.2", "The quota is used up, try again later"),
        io::ErrorKind::InvalidInput => Reply::new(452, "4.5.3", "Too many recipients: send it in several transactions"),
        _ => Reply::new(451, "4.3.0", "The message could not be stored, try again later"),
    }
}
