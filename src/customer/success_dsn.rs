//! The DSN of success for recipients whose mail a customer delivers itself (RFC 3461 section 5.2.3).

use super::mailboxes::Routing;
use crate::net::trace::quoted;
use crate::queue::QueuedEnvelope;
use crate::report::Reporter;
use crate::report::dsn::Action;
use crate::smtp::command::Recipient;

/// How many octets of a header are kept for the DSN.
const HEADER_LIMIT: usize = 64 * 1024;

/// Collects what the DSN needs while the message arrives. If no sender asked for it, it does nothing.
pub struct SuccessDsn {
    reporter: Reporter,
    /// The message for the recipients that have it here.
    message: QueuedEnvelope,
    /// Recipients whose next holder sends no DSN.
    others: Vec<(Recipient, Action)>,
    requested: bool,
    header: Vec<u8>,
}

impl SuccessDsn {
    /// Begins with the recipients of `message`, which go where `routing` says.
    pub fn new(reporter: &Reporter, message: &QueuedEnvelope, routing: &Routing) -> SuccessDsn {
        SuccessDsn {
            reporter: reporter.clone(),
            message: message.with_recipients(routing.delivered_here.clone()),
            others: routing.expanded.iter().map(|recipient| (recipient.clone(), Action::Expanded)).collect(),
            requested: message.envelope.recipients.iter().any(|recipient| recipient.notify.success()),
            header: Vec::new(),
        }
    }

    /// Passes the next octets of the content, which begins with the header.
    pub fn observe(&mut self, octets: &[u8]) {
        if self.requested {
            let room = HEADER_LIMIT.saturating_sub(self.header.len());
            self.header.extend_from_slice(&octets[..octets.len().min(room)]);
        }
    }

    /// Adds a recipient that was sent to a next hop which sends no DSN.
    pub fn add_relayed(&mut self, recipient: &Recipient) {
        self.others.push((recipient.clone(), Action::Relayed));
    }

    /// Sends the DSN. The message is delivered, so a failure is logged and does not reject it.
    pub fn send(&self) {
        if let Err(error) = self.reporter.report_delivered(&self.message, &self.others, &self.header) {
            log::error!("event=dsn-failed id={} error={}", self.message.id, quoted(error));
        }
    }
}
