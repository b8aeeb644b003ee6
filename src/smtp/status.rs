//! What a reply means for a recipient, for the session and for the next attempt. No other file interprets reply codes.
//!
//! ```text
//! reply to     2yz      4yz       5yz       exceptions
//! AUTH         go on    later     abort     500-504, 534, 538: another mechanism (RFC 4954 sections 4, 6)
//!                                           535, 530 to any command: check name and secret
//! ATRN         turned   later     abort     453: no mail, a success (RFC 2645 section 5.2.1)
//!                                           450 4.7.0: too soon after a call without mail; not a failure
//! MAIL         go on    deferred  rejected  about us (below): this server accepts no mail from us (RFC 2645 section 5.4);
//!                                           550, 530 5.7.z: either that, or it rejects this sender only
//! RCPT         go on    deferred  rejected  452, 552: too many recipients for this transaction; deferred, and sent at once
//!                                           in another (RFC 5321 section 4.5.3.1.10)
//! DATA (354)   -        deferred  rejected
//! the content  sent     deferred  rejected  no reply: in doubt (RFC 1047)
//! any of them                               421: deferred, and the peer ends the session (RFC 5321 section 3.8)
//! ```
//!
//! A 3yz where none is expected counts as 4yz. *Later*: the customer tries again in its next call.
//!
//! A 5yz before the content is *about us*, the client ([`is_about_us`]), if each of our messages would get it: the server does
//! not know a command, or requires authentication. If a next hop rejects mail with a reply about us, the host before us gets
//! a deferral; a reply about the sender, the recipient or the content is relayed to it. After the content a 5yz is about the
//! mail, because the server has accepted the transaction, unless it requires authentication even then:
//!
//! ```text
//!                        before the content    after it
//! 530, 535, 538          about us (*)          about us (*)
//! 502, 503               about us (*)          about the mail
//! 500 5.5.1              about us              about the mail
//! any other 5yz          about the mail        about the mail
//! (*) about the mail if the enhanced status code is x.1.z, x.2.z or x.6.z (address, mailbox, content; RFC 3463 section 3),
//!     or x.7.z (policy) with other codes than 530 5.7.0, 535 and 538 (RFC 4954 section 6)
//! ```
//!
//! The reply to BDAT, which is both a command and content, is interpreted as before the content.

use std::fmt;

use super::reply::{Reply, Severity};

/// The status of one recipient after an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecipientStatus {
    /// 2yz to the content: the peer is responsible now (RFC 5321 section 4.2.5).
    Sent(Reply),
    /// The recipient stays in the queue for another attempt.
    Deferred(Reply),
    /// No attempt can succeed: the sender gets a DSN.
    Rejected(Reply),
    /// All content was sent and no reply arrived (RFC 1047): the peer may have the message. The recipient stays in the queue.
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

    /// The status after a negative reply to RCPT. RFC 5321 section 4.5.3.1.10: 552 means "too many recipients" there, and is
    /// a 4yz.
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

    /// Whether the peer is responsible now.
    pub fn is_sent(&self) -> bool {
        matches!(self, RecipientStatus::Sent(_))
    }

    /// Whether no attempt can succeed.
    pub fn is_rejected(&self) -> bool {
        matches!(self, RecipientStatus::Rejected(_))
    }

    /// Whether the recipient stays in the queue: it is deferred or in doubt.
    pub fn is_open(&self) -> bool {
        matches!(self, RecipientStatus::Deferred(_) | RecipientStatus::InDoubt)
    }

    /// Whether the next transaction should have this recipient at once (RFC 5321 section 4.5.3.1.10). If every recipient of
    /// a message failed, 452 did not mean "too many recipients".
    pub fn is_one_too_many(&self) -> bool {
        matches!(self, RecipientStatus::Deferred(reply) if matches!(reply.code(), 452 | 552))
    }

    /// The same status, but with 451 in place of 452: if 452 did not mean "too many recipients", the next attempt must not
    /// follow at once.
    pub fn not_one_too_many(self) -> RecipientStatus {
        match self {
            RecipientStatus::Deferred(reply) if reply.code() == 452 => RecipientStatus::Deferred(reply.with_code(451)),
            status => status,
        }
    }

    /// The status at a next hop, as the host before us must receive it. `upstream` makes the reply for the host before
    /// us.
    pub fn of_hop(self, stage: HopStage, upstream: impl Fn(HopReply) -> Reply) -> RecipientStatus {
        match self {
            // 552 to RCPT defers here. To the host before us it would mean the limit of its own transaction.
            RecipientStatus::Deferred(reply) if reply.code() == 552 => {
                RecipientStatus::Rejected(upstream(reply_of_hop(reply, HopStage::Recipient)))
            }
            // The client defers a message with a 5yz of its own if the hop has rejected EHLO, which may be temporary.
            RecipientStatus::Deferred(reply) if reply.severity() == Severity::Permanent => {
                RecipientStatus::Deferred(Reply::new(451, "4.3.5", format!("Not now: {reply}")))
            }
            RecipientStatus::Deferred(reply) => RecipientStatus::Deferred(upstream(reply_of_hop(reply, stage))),
            RecipientStatus::Rejected(reply) => RecipientStatus::after_negative(&upstream(reply_of_hop(reply, stage))),
            status => status,
        }
    }

    /// The value of `status` in the log: `sent`, `deferred`, `rejected` or `in-doubt`.
    pub fn word(&self) -> &'static str {
        match self {
            RecipientStatus::Sent(_) => "sent",
            RecipientStatus::Deferred(_) => "deferred",
            RecipientStatus::Rejected(_) => "rejected",
            RecipientStatus::InDoubt => "in-doubt",
        }
    }

    /// The reply that decided; `None` for a recipient in doubt.
    pub fn reply(&self) -> Option<&Reply> {
        match self {
            RecipientStatus::Sent(reply) | RecipientStatus::Deferred(reply) | RecipientStatus::Rejected(reply) => {
                Some(reply)
            }
            RecipientStatus::InDoubt => None,
        }
    }

    /// The enhanced status code for a DSN and the log: that of the reply, or else the one with the class alone, such as 4.0.0
    /// (RFC 3464 section 2.3.4).
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

/// The reply that decided, on one line, without quotes.
impl fmt::Display for RecipientStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reply() {
            Some(reply) => reply.fmt(f),
            None => f.write_str("no reply to the content"),
        }
    }
}

/// The result of an attempt to send a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryResult {
    /// One status for each recipient, in the order of the envelope.
    pub recipients: Vec<RecipientStatus>,
    pub decided_by: DecidedBy,
}

impl DeliveryResult {
    /// The same status for `count` recipients.
    pub fn all(status: RecipientStatus, count: usize, decided_by: DecidedBy) -> DeliveryResult {
        DeliveryResult { recipients: vec![status; count], decided_by }
    }

    /// The connection was lost before the peer replied about any of `count` recipients. `text`: what happened.
    pub fn lost(text: impl Into<String>, count: usize) -> DeliveryResult {
        let reply = connection_lost(text);
        DeliveryResult::all(RecipientStatus::Deferred(reply), count, DecidedBy::ConnectionLoss)
    }

    /// The same result, if this side has stopped the session: the message did not cause the loss of the connection.
    pub fn stopped(mut self) -> DeliveryResult {
        if self.decided_by == DecidedBy::ConnectionLoss {
            self.decided_by = DecidedBy::UnrelatedConnectionLoss;
        }
        self
    }

    /// Whether the session ended with this message: by 421 to it, or because the connection was lost.
    pub fn ended_session(&self) -> bool {
        let replies = self.recipients.iter().filter_map(RecipientStatus::reply);
        self.decided_by == DecidedBy::ConnectionLoss || replies.into_iter().any(ends_session)
    }

    /// The reply to MAIL, if it may mean that this server accepts no mail from us at all (RFC 2645 section 5.4). See
    /// [`may_be_about_sender`].
    pub fn no_mail_accepted(&self) -> Option<&Reply> {
        if self.decided_by != DecidedBy::PeerAtMail {
            return None;
        }
        let replies = self.recipients.iter().filter(|status| status.is_rejected()).filter_map(RecipientStatus::reply);
        replies.into_iter().find(|reply| is_about_us(reply) || may_be_about_sender(reply))
    }
}

/// What decided on the recipients of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// The peer, with replies to RCPT.
    Peer,
    /// The peer, with a negative reply to MAIL.
    PeerAtMail,
    /// The peer, with a reply to DATA or BDAT. (Some recipients may have been rejected at RCPT.)
    PeerAtData,
    /// The peer, with a reply to content that followed DATA. (Some recipients may have been rejected at RCPT.)
    PeerAtContent,
    /// This client, before it sent anything of the message.
    Us,
    /// The loss of the connection while this message was sent, which it may have caused.
    ConnectionLoss,
    /// The loss of the connection for another reason than this message: an earlier message was being sent, or this side has
    /// stopped the session.
    UnrelatedConnectionLoss,
}

impl DecidedBy {
    /// Whether the loss of the connection decided.
    pub fn is_connection_loss(self) -> bool {
        matches!(self, DecidedBy::ConnectionLoss | DecidedBy::UnrelatedConnectionLoss)
    }
}

/// Whether a 5yz to a command is about this host and not about the mail: the server does not know the command, or requires
/// authentication (RFC 4954 section 6). This module's documentation has the table.
pub fn is_about_us(reply: &Reply) -> bool {
    match (reply.code(), enhanced_subject(reply)) {
        (500, _) => reply.enhanced() == Some("5.5.1"),
        (502 | 503, subject) => !matches!(subject, Some(1 | 2 | 6 | 7)),
        _ => requires_authentication(reply),
    }
}

/// Whether a reply means that the server accepts no mail without authentication, or rejects ours (RFC 4954 section 6: 530
/// 5.7.0, 535 5.7.8, 538 5.7.11).
fn requires_authentication(reply: &Reply) -> bool {
    match (reply.code(), enhanced_subject(reply)) {
        (530, subject) => !matches!(subject, Some(1 | 2 | 6 | 7)) || reply.enhanced() == Some("5.7.0"),
        (535 | 538, subject) => !matches!(subject, Some(1 | 2 | 6)),
        _ => false,
    }
}

/// Whether a negative reply to MAIL may reject all mail from us, or this sender only.
pub fn may_be_about_sender(reply: &Reply) -> bool {
    matches!(reply.code(), 530 | 550) && !is_about_us(reply) && !matches!(enhanced_subject(reply), Some(1 | 2 | 6))
}

/// The second number of the enhanced status code: what the reply is about (RFC 3463 section 3).
fn enhanced_subject(reply: &Reply) -> Option<u16> {
    reply.enhanced()?.split('.').nth(1)?.parse().ok()
}

/// Whether the peer ends the session with this reply (RFC 5321 section 3.8).
pub fn ends_session(reply: &Reply) -> bool {
    reply.code() == 421
}

/// Whether the reply to AUTH rejects the mechanism, so that the client may try another (RFC 4954 sections 4 and 6).
pub fn is_mechanism_rejected(reply: &Reply) -> bool {
    matches!(reply.code(), 500..=504 | 534 | 538)
}

/// Whether a rejected command means that the account or its secret is wrong (RFC 4954 section 6).
pub fn is_login_rejected(reply: &Reply) -> bool {
    matches!(reply.code(), 530 | 535)
}

/// Whether the reply to ATRN means that the provider has no mail for the customer, which is a success (RFC 2645 section 5.2.1).
pub fn means_no_mail(reply: &Reply) -> bool {
    reply.code() == 453
}

/// The reply to ATRN that makes the customer wait for `seconds`, because its last call has brought no mail (RFC 2645 section
/// 5.2.1: 450 may limit the rate of requests).
pub fn too_soon_reply(seconds: i64) -> Reply {
    Reply::new(450, "4.7.0", format!("Your last call has brought no mail: call again in {seconds} seconds"))
}

/// Whether the reply to ATRN is [`too_soon_reply`]: the provider requires a pause between calls, which is not a failure.
pub fn is_too_soon(reply: &Reply) -> bool {
    reply.code() == 450 && reply.enhanced() == Some("4.7.0")
}

/// The reply that defers a recipient because a connection was lost; `text`: what happened.
pub fn connection_lost(text: impl Into<String>) -> Reply {
    Reply::new(451, "4.4.2", text.into())
}

/// The command to which a next hop has replied negatively, and the one to which we reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HopStage {
    /// The hop has replied to MAIL or RCPT; we reply to RCPT.
    Recipient,
    /// The hop has replied to MAIL, RCPT, DATA or BDAT; we reply to the content.
    Message,
    /// Both reply to the content.
    Content,
}

/// What a next hop's negative reply is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HopReply {
    /// The sender, the recipient or the content: the reply for the host before us.
    AboutMail(Reply),
    /// The hop, which ends the session (421).
    Unavailable,
    /// This host: the hop does not know a command, or requires authentication. The message must be deferred: no sender
    /// should get a DSN because of our configuration.
    Unfit(Reply),
}

/// What a next hop's negative reply is about. The host before us gets a code that can only be about the mail (RFC 5321
/// section 4.3.2). It would interpret 501 or 530 as about itself. By 552 to RCPT the next hop means a quota or its
/// SIZE, but to the host before us it means "too many recipients" (section 4.5.3.1.10).
pub fn reply_of_hop(reply: Reply, stage: HopStage) -> HopReply {
    let code = match (reply.code(), stage) {
        (421, _) => return HopReply::Unavailable,
        (..400, _) => return HopReply::Unfit(reply),
        (_, HopStage::Recipient | HopStage::Message) if is_about_us(&reply) => return HopReply::Unfit(reply),
        (_, HopStage::Content) if requires_authentication(&reply) => return HopReply::Unfit(reply),
        (500..=504 | 530..=538 | 552, HopStage::Recipient) => 550,
        (500..=504 | 530..=538, HopStage::Message | HopStage::Content) => 554,
        (code, _) => code,
    };
    HopReply::AboutMail(reply.with_code(code).for_relaying())
}
