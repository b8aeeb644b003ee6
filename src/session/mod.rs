//! Sessions: the drivers of the two SMTP roles over a connection.
//!
//! `server` drives the server role for a thread that has one connection, `client` the client role. After a turn the
//! provider's client is driven by `provider/turned_session`, which never waits for one peer. Both drivers of the client
//! role read replies, send commands and send content with what is here.

pub mod client;
pub mod remote;
pub mod server;
pub mod settings;

use std::io::{self, Read};

pub use self::remote::{Remote, RemoteSettings, TlsMode};
pub use self::settings::{Limits, Timeouts};
use crate::net::connection::{Connection, Line};
use crate::smtp::client::Client;
use crate::smtp::content::{CrlfEncoder, Stuffer};
use crate::smtp::limits;
use crate::smtp::reply::{Reply, ReplyReader};

/// Octets of content in one block: of a deadline, and of the buffers.
pub const CONTENT_BLOCK: usize = 64 * 1024;

/// Octets of content that are read and sent at a time.
const SEND_BLOCK: usize = 32 * 1024;

/// Reads a peer's replies.
#[derive(Default)]
pub struct ReplyInput {
    reader: ReplyReader,
}

impl ReplyInput {
    /// The next reply that has arrived whole; `None`: not yet.
    ///
    /// # Errors
    /// What the peer has sent instead of a reply.
    pub fn next(&mut self, connection: &mut Connection) -> Result<Option<Reply>, String> {
        loop {
            let line = match connection.take_reply_line(limits::REPLY_LINE) {
                Line::Whole(line) => line,
                Line::None => return Ok(None),
                Line::TooLong => return Err("a reply line without end".to_owned()),
            };
            connection.trace.received(&line);
            let reply = self.reader.line(&line);
            let reply = reply.map_err(|error| format!("not a reply of an SMTP server: {:?}", error.0))?;
            if reply.is_some() {
                return Ok(reply);
            }
        }
    }
}

/// Traces and queues commands; secrets are blanked in the trace.
pub fn send_commands(connection: &mut Connection, client: &Client, octets: &[u8]) {
    let lines = octets.split_inclusive(|octet| *octet == b'\n').filter(|_| connection.trace.enabled());
    for line in lines {
        let line = line.trim_ascii_end();
        let end = match client.in_auth() {
            false => line.len(),
            // The mechanism is shown, the initial response is not.
            true if line.starts_with(b"AUTH ") => {
                line.iter().enumerate().filter(|(_, octet)| **octet == b' ').nth(1).map_or(line.len(), |(at, _)| at)
            }
            true => 0,
        };
        let blanked: &[u8] = if end < line.len() { b" ***" } else { b"" };
        connection.trace.sent(&[&line[..end], blanked].concat());
    }
    connection.send(octets);
}

/// The content of one message on its way to the peer, block by block.
pub struct ContentOutput(Encoder);

enum Encoder {
    /// DATA: with dots and the end (RFC 5321 section 4.5.2).
    Data(Stuffer),
    /// BDAT: this many octets were announced, and so many are sent (RFC 3030 section 2).
    Chunk { encoder: CrlfEncoder, size: u64, sent: u64 },
}

impl ContentOutput {
    /// `size`: octets on the wire; `chunk`: they are announced by BDAT.
    pub fn new(chunk: bool, size: u64) -> ContentOutput {
        ContentOutput(match chunk {
            false => Encoder::Data(Stuffer::new()),
            true => Encoder::Chunk { encoder: CrlfEncoder::new(), size, sent: 0 },
        })
    }

    /// Reads a block of content and queues it on the connection. Returns whether that was the end.
    ///
    /// # Errors
    /// The content cannot be read, or has not the size that BDAT has announced: the peer would read content as
    /// commands, so nothing more may be sent.
    pub fn send_block(&mut self, content: &mut dyn Read, connection: &mut Connection) -> io::Result<bool> {
        let mut buffer = [0; SEND_BLOCK];
        let octets = content.read(&mut buffer)?;
        let block = &buffer[..octets];
        let out = connection.out();
        let before = out.len();
        match &mut self.0 {
            Encoder::Data(stuffer) if octets == 0 => stuffer.finish(out),
            Encoder::Data(stuffer) => stuffer.feed(block, out),
            Encoder::Chunk { encoder, size, sent } => {
                if octets == 0 {
                    encoder.finish(out);
                } else {
                    encoder.feed(block, out);
                }
                *sent += (out.len() - before) as u64;
                if *sent > *size || octets == 0 && sent != size {
                    out.truncate(before);
                    return Err(io::Error::other("the message is not as long as it was"));
                }
            }
        }
        Ok(octets == 0)
    }
}

/// The reply before content that the disk would not hold (RFC 1870 section 6.1).
pub fn disk_full_reply() -> Reply {
    Reply::new(452, "4.3.1", "The disk is full, try again later")
}

/// The reply that a failure of the disk leads to (RFC 1870 section 6.1, RFC 3463 section 3.4); the failure is logged.
pub fn storage_failure_reply(error: &io::Error) -> Reply {
    log::error!("event=storage-failed error={:?}", error.to_string());
    match error.kind() {
        io::ErrorKind::StorageFull => disk_full_reply(),
        io::ErrorKind::QuotaExceeded => Reply::new(452, "4.2.2", "The quota is used up, try again later"),
        io::ErrorKind::InvalidInput => Reply::new(452, "4.5.3", "Too many recipients: send it in several transactions"),
        _ => Reply::new(451, "4.3.0", "The message could not be stored, try again later"),
    }
}
