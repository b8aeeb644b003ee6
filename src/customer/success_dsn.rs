//! The DSN of success for recipients whose mail the customer itself delivers (RFC 3461 section 5.2.3).

use super::mailboxes::Routing;
use crate::net::trace::quoted;
use crate::queue::QueuedEnvelope;
use crate::report::Reporter;
use crate::report::dsn::Action;
use crate::smtp::command::Recipient;

/// The DSN has this many octets of the header at most.
const HEADER_LIMIT: usize = 64 * 1024;

/// Collects the header for the DSN while the message arrives. If no recipient has NOTIFY=SUCCESS, it does nothing.
pub struct SuccessDsn {
    reporter: Reporter,
    /// The message with the recipients that get it in a Maildir here.
    message: QueuedEnvelope,
    /// Recipients at next hops about which the customer must send the DSN: they were expanded, or the next hop sends
    /// none.
    others: Vec<(Recipient, Action)>,
    requested: bool,
    header: Vec<u8>,
}

impl SuccessDsn {
    /// Prepares the DSN for the recipients of `message`, whose destinations are in `routing`.
    pub fn new(reporter: &Reporter, message: &QueuedEnvelope, routing: &Routing) -> SuccessDsn {
        SuccessDsn {
            reporter: reporter.clone(),
            message: message.with_recipients(routing.delivered_here.clone()),
            others: routing.expanded.iter().map(|recipient| (recipient.clone(), Action::Expanded)).collect(),
            requested: message.envelope.recipients.iter().any(|recipient| recipient.notify.success()),
            header: Vec::new(),
        }
    }

    /// Reads the next octets of the content, which begins with the header.
    pub fn observe(&mut self, octets: &[u8]) {
        if self.requested {
            let room = HEADER_LIMIT.saturating_sub(self.header.len());
            self.header.extend_from_slice(&octets[..octets.len().min(room)]);
        }
    }

    /// Adds a recipient whose mail was sent to a next hop that does not send DSNs.
    pub fn add_relayed(&mut self, recipient: &Recipient) {
        self.others.push((recipient.clone(), Action::Relayed));
    }

    /// Sends the DSN. A failure is only logged: the message is delivered already, and cannot be rejected any more.
    pub fn send(&self) {
        if let Err(error) = self.reporter.report_delivered(&self.message, &self.others, &self.header) {
            log::error!("event=dsn-failed id={} error={}", self.message.id, quoted(error));
        }
    }
}
