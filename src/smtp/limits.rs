//! Every number of the protocol, with the section that gives it. What an operator may change is in the configuration.

use std::time::Duration;

/// Octets of a command line that the server accepts, its CRLF included. RFC 4954 section 4 asks for 12,288 in a line
/// of base64; with an initial response the AUTH command comes before it, and that is at most 512 octets long (RFC 5321
/// section 4.5.3.1.4).
pub const COMMAND_LINE: usize = 12 * 1024 + 512;

/// Octets of a command line that the client sends, its CRLF included (RFC 5321 section 4.5.3.1.4).
pub const SENT_COMMAND_LINE: usize = 512;

/// Octets of a list of domains in ATRN: a longer list takes several calls.
pub const ATRN_DOMAINS: usize = SENT_COMMAND_LINE - "ATRN \r\n".len();

/// Octets that a client may send without a line end before the connection is closed.
pub const UNTERMINATED_LINE: usize = 1 << 20;

/// Octets of a reply line that the server sends (RFC 5321 section 4.5.3.1.5), less the code, the enhanced status code
/// and the CRLF.
pub const REPLY_TEXT: usize = 512 - "250-".len() - "5.5.555 ".len() - "\r\n".len();

/// Octets of a reply line that the client accepts: more than RFC 5321 section 4.5.3.1.5 permits, but not endless.
pub const REPLY_LINE: usize = 8 * 1024;

/// Lines of a peer's reply that are kept, and octets of each; the rest is read and discarded.
pub const REPLY_LINES_KEPT: usize = 64;
pub const REPLY_LINE_KEPT: usize = 512;

/// Rejected recipients that count as one bad command.
pub const REJECTIONS_PER_ERROR: usize = 20;

/// Octets of content after which a client that sends more than the server accepts is disconnected: twice the message
/// limit, and 64 MiB at least. Up to there the rest is read, so that the client receives its 552.
pub fn discarded_content(max_size: u64) -> u64 {
    max_size.saturating_mul(2).max(1 << 26)
}

/// Octets of ENVID (RFC 3461 section 4.4) and of ORCPT (section 4.2).
pub const ENVELOPE_ID: usize = 100;
pub const ORIGINAL_RECIPIENT: usize = 500;

/// Octets of the name in EHLO: those of a domain (section 4.5.3.1.2).
pub const HELLO_NAME: usize = 255;

/// Fewest recipients of a transaction that a server must accept (RFC 5321 section 4.5.3.1.8).
pub const FEWEST_RECIPIENTS: u32 = 100;

/// Fewest failed AUTH commands before a connection may be closed (RFC 4954 section 9).
pub const FEWEST_AUTH_FAILURES: u32 = 3;

/// The shortest time that a customer may wait for the reply to ATRN (RFC 2645 section 5.2.1).
pub const SHORTEST_ATRN_TIMEOUT: Duration = Duration::from_secs(10 * 60);
