//! Every number of the protocol, with the section that it comes from. A number without a section is a choice of this
//! program. The limits of addresses are with their parsers in `mail/address`. If an operator may change a number, this
//! file has its minimum or its default.

use std::time::Duration;

use crate::mail::address::DOMAIN_LIMIT;

/// Octets of a command line that the server accepts, its CRLF included: 512 for the command (RFC 5321 section
/// 4.5.3.1.4), and 12,288 for a response in base64 (RFC 4954 section 4), which AUTH may have.
pub const COMMAND_LINE: usize = 12 * 1024 + 512;

/// Octets of a line with AUTH or ATRN that the client sends, its CRLF included (RFC 5321 section 4.5.3.1.4).
pub const SENT_COMMAND_LINE: usize = 512;

/// Octets of the list of domains in one ATRN: RFC 2645 permits no longer line than RFC 5321. A customer with more
/// domains needs several connections.
pub const ATRN_DOMAINS: usize = SENT_COMMAND_LINE - "ATRN \r\n".len();

/// Octets that a client may send without a line end before the server closes the connection.
pub const UNTERMINATED_LINE: usize = 1 << 20;

/// Octets of the text in a reply line that the server sends: 512 (RFC 5321 section 4.5.3.1.5) minus the code, the longest
/// enhanced status code (RFC 3463 section 2) and the CRLF.
pub const REPLY_TEXT: usize = 512 - "250-".len() - "5.555.555 ".len() - "\r\n".len();

/// Octets of a reply line that the client accepts. RFC 5321 section 4.5.3.1.5 permits 512, but some servers send more.
pub const REPLY_LINE: usize = 8 * 1024;

/// Lines of a peer's reply that the client stores, and octets of each. It reads the rest and drops it.
pub const STORED_REPLY_LINES: usize = 64;
pub const STORED_REPLY_LINE: usize = 512;

/// Octets of a line of content without its line end (RFC 5321 section 4.5.3.1.6, RFC 5322 section 2.1.1).
pub const CONTENT_LINE: usize = 998;

/// Octets of content after which the server closes the connection: twice `max_size`, the limit of a message, and at least 64
/// MiB. Until then it reads content over the limit, too, so that the client gets 552.
pub fn discarded_content(max_size: u64) -> u64 {
    max_size.saturating_mul(2).max(1 << 26)
}

/// Octets of ENVID (RFC 3461 section 4.4).
pub const ENVELOPE_ID: usize = 100;

/// Octets of ORCPT (RFC 3461 section 4.2).
pub const ORIGINAL_RECIPIENT: usize = 500;

/// Octets of the name in EHLO, which is a domain (RFC 5321 section 4.5.3.1.2).
pub const HELLO_NAME: usize = DOMAIN_LIMIT;

/// The least limit of recipients in a transaction (RFC 5321 section 4.5.3.1.8).
pub const FEWEST_RECIPIENTS: u32 = 100;

/// `Received` fields with which a message counts as in a mail loop (RFC 5321 section 6.3: at least 100).
pub const LOOP_HOPS: usize = 100;

/// The least limit of failed AUTH commands after which the server closes the connection (RFC 4954 section 9).
pub const FEWEST_AUTH_FAILURES: u32 = 3;

/// Rejected recipients that count as one failed command, so that a client cannot try many addresses (RFC 5321 section 7.3).
pub const REJECTIONS_PER_ERROR: usize = 20;

/// Commands that a client that has not authenticated may send without a message (RFC 5321 section 7.8), in addition to one
/// for each recipient that a transaction may have.
pub const COMMANDS_WITHOUT_MESSAGE: usize = 100;

/// The shortest times that a client should wait for the greeting, and for the replies to MAIL, RCPT and DATA (RFC 5321
/// sections 4.5.3.2.1 to 4.5.3.2.4).
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5 * 60);
pub const MAIL_TIMEOUT: Duration = Duration::from_secs(5 * 60);
pub const RCPT_TIMEOUT: Duration = Duration::from_secs(5 * 60);
pub const DATA_TIMEOUT: Duration = Duration::from_secs(2 * 60);

/// The shortest time that a client should wait until one block of content is sent (RFC 5321 section 4.5.3.2.5).
pub const BLOCK_TIMEOUT: Duration = Duration::from_secs(3 * 60);

/// The shortest time that a client should wait for the reply to the content (RFC 5321 section 4.5.3.2.6). If it gives up
/// earlier, a message that the server has accepted is in doubt, and is sent twice (RFC 1047).
pub const CONTENT_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// The shortest time that a server should wait for a command (RFC 5321 section 4.5.3.2.7).
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// The shortest time that a customer must wait for the reply to ATRN (RFC 2645 section 5.2.1).
pub const ATRN_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// The required pace of content, in octets a second averaged over [`PACE_WINDOW`]: of a client that has not authenticated
/// (port 25), and of any other peer. While content arrives at this pace, the time limit of the session does not run: RFC 5321
/// section 4.5.3.2 limits the time of each block only, and a large message needs long on a slow line.
pub const UNKNOWN_CLIENT_PACE: u64 = 1024;
pub const KNOWN_PEER_PACE: u64 = 100;
pub const PACE_WINDOW: Duration = Duration::from_secs(2 * 60);
