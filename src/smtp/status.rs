//! What a reply means: the one place that says what becomes of a recipient, a session or a next attempt.
//!
//! ```text
//! stage             2yz      4yz        5yz         exceptions
//! greeting … AUTH   go on    try later  give up     453 to ATRN: no mail, a success (RFC 2645 section 5.2.1)
//! MAIL              go on    deferred   rejected    502, 503, 530, 550: perhaps no mail at all is accepted here
//! RCPT              go on    deferred   rejected    452, 552: too many recipients, the rest at once in another
//!                                                   transaction (RFC 5321 section 4.5.3.1.10)
//! content           sent     deferred   rejected    no reply: in doubt (RFC 1047)
//! any               421: the peer ends the session (RFC 5321 section 3.8)
//! ```

use std::fmt;

use super::reply::{Reply, Severity};

/// What became of one recipient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecipientStatus {
    /// The peer has answered the content with 2yz: it is responsible now.
    Sent(Reply),
    /// Not this time; the message stays.
    Deferred(Reply),
    /// Never, by a 5yz.
    Rejected(Reply),
    /// All content was sent and no reply received (RFC 1047): neither sent nor failed.
    InDoubt,
}

impl RecipientStatus {
    /// The status after a negative reply to a command, or to content.
    pub fn after_negative(reply: &Reply) -> RecipientStatus {
        match reply.severity() {
            Severity::Permanent => RecipientStatus::Rejected(reply.clone()),
            _ => RecipientStatus::Deferred(reply.clone()),
        }
    }

    /// The status after a negative reply to RCPT. 552 means "too many recipients" there, for now (RFC 5321 section
    /// 4.5.3.1.10).
    pub fn after_rcpt(reply: &Reply) -> RecipientStatus {
        match reply.code() {
            552 => RecipientStatus::Deferred(reply.clone()),
            _ => RecipientStatus::after_negative(reply),
        }
    }

    /// The status after the reply to the content.
    pub fn after_content(reply: &Reply) -> RecipientStatus {
        match reply.is_positive() {
            true => RecipientStatus::Sent(reply.clone()),
            false => RecipientStatus::after_negative(reply),
        }
    }

    pub fn is_sent(&self) -> bool {
        matches!(self, RecipientStatus::Sent(_))
    }

    pub fn is_rejected(&self) -> bool {
        matches!(self, RecipientStatus::Rejected(_))
    }

    /// Neither sent nor rejected: the recipient stays in the queue.
    pub fn is_open(&self) -> bool {
        matches!(self, RecipientStatus::Deferred(_) | RecipientStatus::InDoubt)
    }

    /// The peer wants this recipient in another transaction, at once (RFC 5321 section 4.5.3.1.10). If every recipient
    /// of a message failed, 452 did not mean "too many recipients".
    pub fn is_one_too_many(&self) -> bool {
        matches!(self, RecipientStatus::Deferred(reply) if matches!(reply.code(), 452 | 552))
    }

    /// The word for it in logs.
    pub fn word(&self) -> &'static str {
        match self {
            RecipientStatus::Sent(_) => "sent",
            RecipientStatus::Deferred(_) => "deferred",
            RecipientStatus::Rejected(_) => "rejected",
            RecipientStatus::InDoubt => "in-doubt",
        }
    }

    /// The reply that decided; none was received for a recipient in doubt.
    pub fn reply(&self) -> Option<&Reply> {
        match self {
            RecipientStatus::Sent(reply) | RecipientStatus::Deferred(reply) | RecipientStatus::Rejected(reply) => {
                Some(reply)
            }
            RecipientStatus::InDoubt => None,
        }
    }

    /// The enhanced status code for a DSN and the log. If the peer gave none, the class is all that is known (RFC 3464
    /// section 2.3.4).
    pub fn enhanced(&self) -> &str {
        let class = match self {
            RecipientStatus::Sent(_) => "2.0.0",
            RecipientStatus::Deferred(_) => "4.0.0",
            RecipientStatus::Rejected(_) => "5.0.0",
            RecipientStatus::InDoubt => "4.4.2",
        };
        self.reply().and_then(Reply::enhanced).unwrap_or(class)
    }
}

/// The reply that decided, on one line.
impl fmt::Display for RecipientStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reply() {
            Some(reply) => reply.fmt(f),
            None => f.write_str("no reply to the content"),
        }
    }
}

/// What became of a message: a status for each of its recipients, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryResult {
    pub recipients: Vec<RecipientStatus>,
    pub decided_by: DecidedBy,
}

impl DeliveryResult {
    /// The same status for `count` recipients.
    pub fn all(status: RecipientStatus, count: usize, decided_by: DecidedBy) -> DeliveryResult {
        DeliveryResult { recipients: vec![status; count], decided_by }
    }

    /// The connection was lost before the peer decided on any of `count` recipients.
    pub fn lost(text: impl Into<String>, count: usize) -> DeliveryResult {
        let reply = connection_lost(text);
        DeliveryResult::all(RecipientStatus::Deferred(reply), count, DecidedBy::ConnectionLoss)
    }

    /// The reply to MAIL, if it may mean that this server accepts no mail from us at all (RFC 2645 section 5.4).
    pub fn no_mail_accepted(&self) -> Option<&Reply> {
        if self.decided_by != DecidedBy::PeerAtMail {
            return None;
        }
        let replies = self.recipients.iter().filter(|status| status.is_rejected()).filter_map(RecipientStatus::reply);
        replies.into_iter().find(|reply| matches!(reply.code(), 502 | 503 | 530 | 550))
    }
}

/// Who decided on the recipients of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// The peer, recipient by recipient or for the content.
    Peer,
    /// The peer, with a negative reply to MAIL.
    PeerAtMail,
    /// We, before anything of the message was sent.
    Us,
    /// Nobody: the connection was lost, which says nothing about the message.
    ConnectionLoss,
}

/// The peer ends the session with this reply (RFC 5321 section 3.8).
pub fn ends_session(reply: &Reply) -> bool {
    reply.code() == 421
}

/// The provider has no mail for the customer: a success (RFC 2645 section 5.2.1).
pub fn is_no_mail(reply: &Reply) -> bool {
    reply.code() == 453
}

/// The reply to whoever waits while a connection that decides was lost.
pub fn connection_lost(text: impl Into<String>) -> Reply {
    Reply::new(451, "4.4.2", text.into())
}

/// A next hop's negative reply to RCPT as the provider must receive it. Our 552 would mean "too many recipients" to the
/// provider (RFC 5321 section 4.5.3.1.10); a next hop means its quota by it, or its SIZE.
pub fn rcpt_reply_of_hop(reply: Reply) -> HopReply {
    match reply.code() {
        552 => HopReply::AboutMail(reply.with_code(550).for_relaying()),
        _ => reply_of_hop(reply),
    }
}

/// What a next hop's negative reply is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HopReply {
    /// The recipient or the content: passed on as it is.
    AboutMail(Reply),
    /// The hop itself: it shuts down.
    Unavailable,
    /// Us: it does not know a command, or requires authentication. No sender may get their mail back for that.
    Unfit(Reply),
}

/// Divides a next hop's negative replies.
pub fn reply_of_hop(reply: Reply) -> HopReply {
    match reply.code() {
        421 => HopReply::Unavailable,
        400..=499 | 505..=529 | 531..=599 => HopReply::AboutMail(reply.for_relaying()),
        _ => HopReply::Unfit(reply),
    }
}
