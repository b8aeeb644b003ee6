//! The DSN of success that a sender asked for, for recipients of ours.

use super::mailboxes::Routing;
use crate::net::trace::quoted;
use crate::queue::QueuedEnvelope;
use crate::report::Reporter;
use crate::report::dsn::Action;
use crate::smtp::command::Recipient;

/// Octets of a header that are kept for the DSN.
const HEADER_LIMIT: usize = 64 * 1024;

/// Collects what a DSN of success needs while the message arrives.
pub struct SuccessDsn {
    reporter: Reporter,
    message: QueuedEnvelope,
    /// Recipients whose next holder sends no DSN.
    others: Vec<(Recipient, Action)>,
    header: Vec<u8>,
}

impl SuccessDsn {
    /// `None`: the sender asked for none. `to_next_hop`: a recipient with NOTIFY=SUCCESS goes to a next hop.
    pub fn new(
        reporter: &Reporter, message: &QueuedEnvelope, routing: &Routing, to_next_hop: bool,
    ) -> Option<SuccessDsn> {
        let asked = to_next_hop
            || routing.delivered_here.iter().chain(&routing.expanded).any(|recipient| recipient.notify.success());
        asked.then(|| SuccessDsn {
            reporter: reporter.clone(),
            message: message.with_recipients(routing.delivered_here.clone()),
            others: routing.expanded.iter().map(|recipient| (recipient.clone(), Action::Expanded)).collect(),
            header: Vec::new(),
        })
    }

    /// Reads the content as it goes by.
    pub fn observe(&mut self, octets: &[u8]) {
        let room = HEADER_LIMIT.saturating_sub(self.header.len());
        self.header.extend_from_slice(&octets[..octets.len().min(room)]);
    }

    /// Adds recipients that a next hop has accepted and reports nothing of.
    pub fn add_relayed(&mut self, recipients: impl Iterator<Item = Recipient>) {
        self.others.extend(recipients.map(|recipient| (recipient, Action::Relayed)));
    }

    /// Sends the DSN. The message is delivered, so a failure is logged and does not reject it.
    pub fn send(&self) {
        if let Err(error) = self.reporter.report_delivered(&self.message, &self.others, &self.header) {
            log::error!("event=dsn-failed id={} error={}", self.message.id, quoted(error));
        }
    }
}
