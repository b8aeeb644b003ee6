//! Rejections that look like a mistake on the customer's side count as deferrals for the time of `soft-bounce`.
//!
//! A customer's server that is set up wrongly may reject all its mail, and the senders would get DSNs within minutes. So a 5yz
//! reply is a rejection at once only if it is about the message or the recipient:
//!
//! ```text
//! enhanced status code (RFC 3463)      the 5yz is
//! none, or 5.0.z (undefined)           a deferral
//! 5.7.z, 5.1.2, 5.3.z, 5.4.z           a deferral: policy, domain, system, network. But 5.3.4, the message is too large, is a
//!                                      rejection: otherwise the message would be sent in each call
//! 5.1.1, 5.2.z                         a deferral if the customer accepts no recipient of that domain in this session, before
//!                                      or after: it may have lost its list of mailboxes. Otherwise a rejection: that mailbox
//!                                      does not exist, or does not accept the message
//! others                               a rejection
//! ```
//!
//! The time counts from the first deferral of this kind. The name of the message's file has it until the customer replies
//! without such a rejection. It is not a number of calls, because a customer may call each minute.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use crate::clock::Timestamp;
use crate::mail::address::Domain;
use crate::smtp::reply::Reply;
use crate::smtp::status::{DeliveryResult, RecipientStatus};

/// The subject of a rejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The customer's server: it may reject any message so.
    Server,
    /// The recipient, or the server's list of mailboxes.
    Mailbox,
    Mail,
}

impl Cause {
    fn of(reply: &Reply) -> Cause {
        let mut numbers =
            reply.enhanced().unwrap_or("5.0.0").split('.').skip(1).map(|number| number.parse().unwrap_or(0));
        match (numbers.next().unwrap_or(0u16), numbers.next().unwrap_or(0)) {
            (3, 4) => Cause::Mail,
            (0 | 3 | 4 | 7, _) | (1, 2) => Cause::Server,
            (1, 1) | (2, _) => Cause::Mailbox,
            _ => Cause::Mail,
        }
    }
}

/// The rejections of one turned session that may be deferrals.
pub struct SoftBounces {
    /// The time of `soft-bounce`; zero: no rejection is a deferral.
    time: Duration,
    /// The domains in which the customer has accepted a recipient.
    accepting: HashSet<Domain>,
    /// For each domain, the messages that were rejected and deferred, and the first reply.
    deferred: BTreeMap<Domain, (u64, String)>,
}

/// One message, for which rejections may be deferrals.
#[derive(Clone, Copy)]
pub struct RejectedMessage<'a> {
    pub domain: &'a Domain,
    /// When a rejection of it was first a deferral; now, if none was yet.
    pub first: Timestamp,
    /// The time since `first`, corrected if the clock was set.
    pub age: Duration,
}

impl SoftBounces {
    /// `time`: the value of `soft-bounce`.
    pub fn new(time: Duration) -> SoftBounces {
        SoftBounces { time, accepting: HashSet::new(), deferred: BTreeMap::new() }
    }

    /// Notes whether the customer has accepted a recipient of this domain: 2yz to the content.
    pub fn note(&mut self, domain: &Domain, result: &DeliveryResult) {
        if result.recipients.iter().any(RecipientStatus::is_sent) && !self.accepting.contains(domain) {
            self.accepting.insert(domain.clone());
        }
    }

    /// Whether the status of a recipient depends on the replies to messages after this one.
    pub fn is_undecided(&self, message: RejectedMessage<'_>, result: &DeliveryResult) -> bool {
        let about_mailbox =
            |status: &RecipientStatus| rejection(status).is_some_and(|reply| Cause::of(reply) == Cause::Mailbox);
        !self.is_over(message) && !self.is_accepting(message.domain) && result.recipients.iter().any(about_mailbox)
    }

    /// Turns the rejections that look like a mistake on the customer's side into deferrals with the same replies, until the
    /// time is over. Returns [`RejectedMessage::first`] if there is such a rejection.
    pub fn defer(&mut self, message: RejectedMessage<'_>, result: &mut DeliveryResult) -> Option<Timestamp> {
        if self.time.is_zero() {
            return None;
        }
        let (is_over, accepting) = (self.is_over(message), self.is_accepting(message.domain));
        let mut first = None;
        for status in &mut result.recipients {
            let mistaken = rejection(status).filter(|reply| match Cause::of(reply) {
                Cause::Server => true,
                Cause::Mailbox => !accepting,
                Cause::Mail => false,
            });
            if let Some(reply) = mistaken.cloned() {
                if !is_over {
                    *status = RecipientStatus::Deferred(reply.clone());
                }
                first.get_or_insert(reply);
            }
        }
        let reply = first?;
        if !is_over {
            self.deferred.entry(message.domain.clone()).or_insert((0, reply.to_string())).0 += 1;
        }
        Some(message.first)
    }

    /// The domains with rejections that became deferrals: the number of messages, and the first reply.
    pub fn deferred(&self) -> impl Iterator<Item = (&Domain, u64, &str)> {
        self.deferred.iter().map(|(domain, (messages, reply))| (domain, *messages, reply.as_str()))
    }

    /// Whether the customer has accepted a recipient of this domain. Then 5.1.1 is about the recipient, not the server.
    pub fn is_accepting(&self, domain: &Domain) -> bool {
        self.accepting.contains(domain)
    }

    fn is_over(&self, message: RejectedMessage<'_>) -> bool {
        message.age >= self.time
    }
}

/// The customer's reply that rejects a recipient. `None` also if the provider itself has decided, for instance because
/// of the size.
fn rejection(status: &RecipientStatus) -> Option<&Reply> {
    match status {
        RecipientStatus::Rejected(reply) => Some(reply).filter(|reply| reply.is_from_peer()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smtp::reply::ReplyReader;
    use crate::smtp::status::DecidedBy;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn reply(line: &str) -> Reply {
        ReplyReader::default().line(line.as_bytes()).unwrap().unwrap()
    }

    fn result(lines: &[&str]) -> DeliveryResult {
        let recipients = lines.iter().map(|line| RecipientStatus::after_content(&reply(line))).collect();
        DeliveryResult { recipients, decided_by: DecidedBy::Peer }
    }

    fn words(result: &DeliveryResult) -> Vec<&'static str> {
        result.recipients.iter().map(RecipientStatus::word).collect()
    }

    fn domain() -> Domain {
        Domain::parse("example.org").unwrap()
    }

    #[test]
    fn whether_a_rejection_is_a_deferral_depends_on_its_subject() {
        let (server, mailbox, mail) = (["deferred", "deferred"], ["deferred", "rejected"], ["rejected", "rejected"]);
        for (line, expected) in [
            ("550 no", server),
            ("554", server),
            ("550 5.0.0 no", server),
            // RFC 2034 section 4: an enhanced code of another class than the reply's does not count.
            ("550 4.1.1 no", server),
            ("554 5.7.1 we do not like it", server),
            ("530 5.7.0 authenticate first", server),
            ("550 5.1.2 no such domain", server),
            ("552 5.3.4 too big", mail),
            ("550 5.3.5 misconfigured", server),
            ("554 5.3.0 disk", server),
            ("554 5.4.6 loop", server),
            ("550 5.1.1 no such user", mailbox),
            ("550 5.01.001 no such user", mailbox),
            ("552 5.2.2 full", mailbox),
            ("550 5.2.1 disabled", mailbox),
            ("553 5.1.3 syntax", mail),
            ("550 5.1.8 sender", mail),
            ("501 5.5.4 parameter", mail),
            ("554 5.6.0 content", mail),
            ("550 5.9.1 unknown", mail),
        ] {
            for (accepting, expected) in [false, true].into_iter().zip(expected) {
                let domain = domain();
                let mut soft = SoftBounces::new(2 * DAY);
                if accepting {
                    soft.note(&domain, &result(&["250 2.6.0 accepted"]));
                }
                let now = Timestamp::from_seconds(1_767_323_045);
                let message = RejectedMessage { domain: &domain, first: now, age: Duration::ZERO };
                let mut result = result(&[line]);
                let undecided = soft.is_undecided(message, &result);
                assert_eq!(undecided, expected == "deferred" && Cause::of(&reply(line)) == Cause::Mailbox, "{line}");
                let first = soft.defer(message, &mut result);
                assert_eq!(
                    (words(&result), first),
                    (vec![expected], (expected == "deferred").then_some(now)),
                    "{line}"
                );
                assert_eq!(result.recipients[0].reply(), Some(&reply(line)));
            }
        }
    }

    #[test]
    fn a_recipient_does_not_affect_the_others() {
        let (domain, other) = (domain(), Domain::parse("example.com").unwrap());
        let mut soft = SoftBounces::new(DAY);
        let first = Timestamp::from_seconds(1_767_323_045);
        let message = RejectedMessage { domain: &domain, first, age: Duration::ZERO };
        let mut mixed = result(&["250 ok", "550 5.1.1 no", "554 5.7.1 no", "450 4.2.1 later", "550 5.1.3 syntax"]);
        mixed.recipients.push(RecipientStatus::InDoubt);
        mixed.recipients.push(RecipientStatus::Rejected(Reply::new(552, "5.3.4", "our own")));
        soft.note(&domain, &mixed);
        soft.defer(message, &mut mixed);
        let expected = ["sent", "rejected", "deferred", "deferred", "rejected", "in-doubt", "rejected"];
        assert_eq!(words(&mixed), expected);
        assert!(soft.is_accepting(&domain) && !soft.is_accepting(&other));
        let mut unknown = result(&["550 5.1.1 no"]);
        assert_eq!(soft.defer(RejectedMessage { domain: &other, ..message }, &mut unknown), Some(first));
        let deferred: Vec<_> = soft.deferred().map(|(domain, messages, _)| (domain.as_str(), messages)).collect();
        assert_eq!(deferred, [("example.com", 1), ("example.org", 1)]);
    }

    #[test]
    fn the_time_counts_from_the_first_rejection() {
        let (domain, first) = (domain(), Timestamp::from_seconds(1_767_323_045));
        let second = Duration::from_secs(1);
        for (time, age, deferred) in [
            (2 * DAY, Duration::ZERO, true),
            (2 * DAY, 2 * DAY - second, true),
            (2 * DAY, 2 * DAY, false),
            (2 * DAY, 102 * DAY, false),
            (365 * DAY, 364 * DAY, true),
            (Duration::ZERO, Duration::ZERO, false),
        ] {
            let message = RejectedMessage { domain: &domain, first, age };
            let mut result = result(&["554 5.7.1 no"]);
            let since = SoftBounces::new(time).defer(message, &mut result);
            assert_eq!(since, Some(first).filter(|_| !time.is_zero()), "{time:?} {age:?}");
            assert_eq!(words(&result) == ["deferred"], deferred, "{time:?} {age:?}");
        }
    }
}
