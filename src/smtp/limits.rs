//! Every number of the protocol, with the section that it comes from. The limits of addresses are with their parsers in
//! `mail/address`. Numbers that an operator may change have their least value or their default here.

use std::time::Duration;

use crate::mail::address::DOMAIN_LIMIT;

/// Octets of a command line that the server accepts, its CRLF included. RFC 4954 section 4 requires 12,288 for a line of
/// base64, which may be an initial response after `AUTH mechanism`; without it a command has at most 512 octets (RFC 5321
/// section 4.5.3.1.4).
pub const COMMAND_LINE: usize = 12 * 1024 + 512;

/// Octets of a command line that the client sends, its CRLF included (RFC 5321 section 4.5.3.1.4).
pub const SENT_COMMAND_LINE: usize = 512;

/// Octets of the list of domains in one ATRN; a customer with more domains sends ATRN in several calls.
pub const ATRN_DOMAINS: usize = SENT_COMMAND_LINE - "ATRN \r\n".len();

/// Octets that a client may send without a line end before the server closes the connection.
pub const UNTERMINATED_LINE: usize = 1 << 20;

/// Octets of the text in a reply line that the server sends: 512 (RFC 5321 section 4.5.3.1.5) without the code, the longest
/// enhanced status code and the CRLF.
pub const REPLY_TEXT: usize = 512 - "250-".len() - "5.555.555 ".len() - "\r\n".len();

/// Octets of a reply line that the client accepts: more than RFC 5321 section 4.5.3.1.5 permits, because some servers send
/// more.
pub const REPLY_LINE: usize = 8 * 1024;

/// Lines of a peer's reply that are kept, and octets of each. The client reads the rest and drops it.
pub const REPLY_LINES_KEPT: usize = 64;
pub const REPLY_LINE_KEPT: usize = 512;

/// Octets of a line of content without its line end (RFC 5321 section 4.5.3.1.6, RFC 5322 section 2.1.1).
pub const CONTENT_LINE: usize = 998;

/// Octets of content after which the server closes the connection of a client that sends more than it accepts: twice
/// `max_size`, the limit of a message, and at least 64 MiB. Up to there it reads the content, so that the client gets 552.
pub fn discarded_content(max_size: u64) -> u64 {
    max_size.saturating_mul(2).max(1 << 26)
}

/// Octets of ENVID (RFC 3461 section 4.4).
pub const ENVELOPE_ID: usize = 100;

/// Octets of ORCPT (RFC 3461 section 4.2).
pub const ORIGINAL_RECIPIENT: usize = 500;

/// Octets of the name in EHLO, which is a domain (RFC 5321 section 4.5.3.1.2).
pub const HELLO_NAME: usize = DOMAIN_LIMIT;

/// Fewest recipients of a transaction that a server must accept (RFC 5321 section 4.5.3.1.8).
pub const FEWEST_RECIPIENTS: u32 = 100;

/// Fewest `Received` fields that may mean a mail loop (RFC 5321 section 6.3).
pub const LOOP_HOPS: usize = 100;

/// Fewest failed AUTH commands before a server may close the connection (RFC 4954 section 9).
pub const FEWEST_AUTH_FAILURES: u32 = 3;

/// Rejected recipients that count as one failed command, so that a client cannot try many addresses (RFC 5321 section 7.3).
pub const REJECTIONS_PER_ERROR: usize = 20;

/// Commands that a client may send before its first message or accepted recipient and between two, if it has not
/// authenticated, beside one for each recipient of a transaction.
pub const COMMANDS_WITHOUT_MESSAGE: usize = 100;

/// The shortest times that a client should wait: for the greeting, and for the replies to MAIL, RCPT and DATA (RFC 5321
/// sections 4.5.3.2.1 to 4.5.3.2.4).
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5 * 60);
pub const MAIL_TIMEOUT: Duration = Duration::from_secs(5 * 60);
pub const RCPT_TIMEOUT: Duration = Duration::from_secs(5 * 60);
pub const DATA_TIMEOUT: Duration = Duration::from_secs(2 * 60);

/// The shortest time for one block of content (RFC 5321 section 4.5.3.2.5).
pub const BLOCK_TIMEOUT: Duration = Duration::from_secs(3 * 60);

/// The shortest time that a client should wait for the reply to the content (RFC 5321 section 4.5.3.2.6): if it gives up
/// earlier, the message is in doubt and is sent twice.
pub const CONTENT_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// The shortest time that a server should wait for a command (RFC 5321 section 4.5.3.2.7).
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// The shortest time that a customer must wait for the reply to ATRN (RFC 2645 section 5.2.1).
pub const ATRN_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// Octets of content in a second, averaged over [`PACE_WINDOW`], while which the clock of a session does not run: of a
/// client that has not authenticated (port 25), and of any other peer. RFC 5321 section 4.5.3.2 limits the time of each
/// block only: a whole message may take as long as its line needs.
pub const UNKNOWN_CLIENT_PACE: u64 = 1024;
pub const KNOWN_PEER_PACE: u64 = 100;
pub const PACE_WINDOW: Duration = Duration::from_secs(2 * 60);
