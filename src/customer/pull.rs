//! One call: dial, TLS, AUTH, ATRN, the turn, and mail until the provider says QUIT.
//!
//! 453 ("you have no mail") is a success. After the 250 to ATRN nothing but the greeting is said, and what
//! follows is an ordinary SMTP server session whose client is the provider (RFC 2645 section 5.3).

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::handover::{Handover, NextHops};
use super::mailboxes::Mailboxes;
use super::outbox::Outbox;
use super::receiver::Receiver;
use super::tally::{Summary, Tally};
use crate::config::{Customer, TlsMode, Upstream};
use crate::dialogue::{Dialogue, Failure, client_side};
use crate::outgoing::Desk;
use crate::rules;
use crate::session::{Bounds, End, Session};
use crate::smtp::address::Domain;
use crate::smtp::client::{Client, Halt, Plan, StartTls};
use crate::smtp::reply::Severity;
use crate::smtp::server::{Profile, Role};
use crate::stamp::Stamps;
use crate::tls::ClientSide;
use crate::turn;
use crate::wire::{self, Stop, Trace, Wire};

/// A command line may have 512 octets (RFC 5321 section 4.5.3.1.4): longer lists take several calls.
const ATRN_LIST_LIMIT: usize = 512 - "ATRN \r\n".len();

/// Why a call has failed. What came before is kept in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The configuration names something that cannot be used.
    Config(String),
    /// The name of the provider has no address.
    NoHost(String),
    /// Nobody answers there.
    Unavailable(String),
    /// Not now: try again later.
    Temporary(String),
    /// Another call to this provider is under way.
    Busy(String),
    /// The provider does not let us in.
    Denied(String),
    /// The other end, or its certificate, is not what it should be.
    Protocol(String),
    /// The system refuses: a port, a thread.
    System(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config(text)
            | Error::NoHost(text)
            | Error::Unavailable(text)
            | Error::Temporary(text)
            | Error::Busy(text)
            | Error::Denied(text)
            | Error::Protocol(text)
            | Error::System(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

/// A customer, ready to call.
pub struct Caller {
    config: Customer,
    stamps: Stamps,
    /// What each provider's certificate is checked against, in their order.
    tls: Vec<Option<ClientSide>>,
    mailboxes: Arc<Mailboxes>,
    outbox: Option<Arc<Outbox>>,
    handover: Arc<Handover>,
}

/// One call to each provider; see [`Caller::pull`].
pub fn pull(config: &Customer, stamps: &Stamps, stop: &Stop) -> Result<Summary, Error> {
    Caller::new(config, stamps)?.pull(stop, &Arc::default())
}

impl Caller {
    /// Looks at what the configuration names: certificates, folders.
    pub fn new(config: &Customer, stamps: &Stamps) -> Result<Caller, Error> {
        let side = |provider: &Upstream| {
            client_side(provider.tls, provider.pin, provider.ca.as_deref())
                .map_err(|text| Error::Config(provider.error(&text).to_string()))
        };
        let tls = config.providers.iter().map(side).collect::<Result<_, _>>()?;
        let mailboxes = Arc::new(Mailboxes::new(config, stamps));
        let outbox = Outbox::new(config, &mailboxes, stamps).map(Arc::new);
        let handover = match &outbox {
            Some(outbox) => outbox.handover().clone(),
            None => Arc::new(Handover::new(config, &mailboxes, Desk::new(&config.hostname, stamps, None))),
        };
        Ok(Caller { config: config.clone(), stamps: stamps.clone(), tls, mailboxes, outbox, handover })
    }

    pub fn config(&self) -> &Customer {
        &self.config
    }

    pub fn outbox(&self) -> Option<&Arc<Outbox>> {
        self.outbox.as_ref()
    }

    /// When mail is due that waits for a next hop.
    pub fn handover_due(&self) -> Option<SystemTime> {
        self.handover.due()
    }

    /// Tries mail that waits for a next hop, as far as it is due.
    pub fn hand_over(&self, stop: &Stop) {
        self.handover.retry(&self.mailboxes, stop);
    }

    /// One call to each provider, in the order of the configuration; one that fails does not keep us from the next.
    pub fn pull(&self, stop: &Stop, tally: &Arc<Tally>) -> Result<Summary, Error> {
        let begun = Instant::now();
        let mut result = Ok(());
        for number in 0..self.config.providers.len() {
            result = result.and(self.call(number, stop, tally));
        }
        result.map(|()| tally.summary(begun.elapsed().as_secs_f64()))
    }

    /// Hands over outgoing mail, if this provider takes it, and fetches the mail of its domains, in as few calls as
    /// their names take. What came before a failure is kept. `number`: of the provider, in the order of the
    /// configuration; where there is none, there is no call.
    pub fn call(&self, number: usize, stop: &Stop, tally: &Arc<Tally>) -> Result<(), Error> {
        let (Some(provider), Some(tls)) = (self.config.providers.get(number), self.tls.get(number)) else {
            return Ok(());
        };
        let begun = Instant::now();
        let before = tally.summary(0.0);
        let result = self.lock(provider).and_then(|_lock| self.call_alone(provider, tls.as_ref(), stop, tally));
        let after = tally.summary(begun.elapsed().as_secs_f64());
        log::info!(
            "event=call provider={} account={} messages={} octets={} refused={} put-off={} sent={} kept={} seconds={:.3} outcome={:?}",
            provider.address,
            provider.name,
            after.messages - before.messages,
            after.octets - before.octets,
            after.refused - before.refused,
            after.put_off - before.put_off,
            after.sent - before.sent,
            after.kept,
            after.seconds,
            result.as_ref().map_or_else(Error::to_string, |()| "good".to_owned())
        );
        result
    }

    fn call_alone(
        &self,
        provider: &Upstream,
        tls: Option<&ClientSide>,
        stop: &Stop,
        tally: &Arc<Tally>,
    ) -> Result<(), Error> {
        let outbox = self.outbox.as_ref().filter(|_| provider.outgoing);
        if let Some(outbox) = outbox {
            outbox.deliver_here();
        }
        self.hand_over(stop);
        let mut result = Ok(());
        for domains in lists(&provider.domains) {
            result = result.and(Call { caller: self, provider, tls, outbox, stop, tally }.make(&domains));
        }
        // What the provider would not take goes to the submission host, after the mail that came.
        if let Some(outbox) = outbox {
            outbox.submit(stop, tally);
            tally.kept(outbox.waiting());
        }
        result
    }

    /// One call at a time to a provider's account, also of several processes; the kernel lets the lock go with us.
    fn lock(&self, provider: &Upstream) -> Result<File, Error> {
        let name = rules::folder(&format!("{}@{}", provider.name, provider.address));
        let file = state_file(&self.config, &format!("call-{name}"))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                Err(Error::Busy(format!("another call to {} as {} is under way", provider.address, provider.name)))
            }
            Err(TryLockError::Error(error)) => Err(Error::System(error.to_string())),
        }
    }
}

/// A lock of a customer, in a folder beside its mailboxes, which no domain can be called like. Links are not followed:
/// root may look at another user's folder.
pub fn state_file(config: &Customer, name: &str) -> Result<File, Error> {
    let folder = config.mailboxes.root.join(".odmr");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|error| Error::System(format!("{}: {error}; give its user the right to", folder.display())))?;
    let path = folder.join(name);
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true).mode(0o600).custom_flags(flags);
    options.open(&path).map_err(|error| Error::System(format!("{}: {error}", path.display())))
}

/// Divides the domains into lists that fit a line; no domains is one call for all.
fn lists(domains: &[Domain]) -> Vec<Vec<Domain>> {
    let mut lists = vec![Vec::new()];
    let mut length = 0;
    for domain in domains {
        let more = domain.as_str().len() + 1;
        if length + more > ATRN_LIST_LIMIT + 1 {
            lists.push(Vec::new());
            length = 0;
        }
        length += more;
        if let Some(list) = lists.last_mut() {
            list.push(domain.clone());
        }
    }
    lists
}

/// One connection to the provider, or two.
struct Call<'a> {
    caller: &'a Caller,
    provider: &'a Upstream,
    tls: Option<&'a ClientSide>,
    /// The outgoing mail, if it goes with this call.
    outbox: Option<&'a Arc<Outbox>>,
    stop: &'a Stop,
    tally: &'a Arc<Tally>,
}

impl Call<'_> {
    /// Outgoing mail up, the turn, incoming mail down; a failure of the first half costs the second nothing
    /// but another connection.
    fn make(&self, domains: &[Domain]) -> Result<(), Error> {
        let (mut dialogue, mut peer) = self.introduce()?;
        if let Some(outbox) = self.outbox
            && let Err(failure) = outbox.send(&mut dialogue, self.tally)
        {
            log::warn!("event=outgoing-cut-short error={:?}", failure.to_string());
            dialogue.leave(&failure);
            (dialogue, peer) = self.introduce()?;
        }
        match dialogue.atrn(domains) {
            Ok((wire, client)) => {
                self.tally.expect(client.waiting().unwrap_or(0));
                self.receive(wire, client, peer)
            }
            Err(failure) => failed(failure).map_or(Ok(()), Err),
        }
    }

    /// A connection that has come as far as AUTH.
    fn introduce(&self) -> Result<(Dialogue, IpAddr), Error> {
        let config = self.provider;
        let (stream, peer) = self.dial()?;
        log::info!("event=connected provider={} peer={peer}", config.address);
        let trace = Trace { id: "pull".to_owned(), us: 'C', them: 'P' };
        let wire =
            Wire::new(stream, trace).map_err(|error| Error::Temporary(format!("the connection was lost: {error}")))?;
        let plan = Plan {
            name: self.caller.config.hostname.clone(),
            starttls: if config.tls == TlsMode::StartTls { StartTls::Required } else { StartTls::Never },
            tls: config.tls == TlsMode::Implicit,
            credentials: Some((config.name.clone(), config.secret.clone())),
            chunking: true,
            atrn: true,
            ..Plan::default()
        };
        let mut dialogue = Dialogue::new(wire, plan, &self.caller.config.timeouts, self.stop);
        let tls = self.tls.map(|side| (side, config.host.as_str()));
        let introduced = match (config.tls, tls) {
            (TlsMode::Implicit, Some((side, name))) => dialogue.begin_tls(side, name),
            _ => Ok(()),
        };
        match introduced.and_then(|()| dialogue.introduce(tls)) {
            Ok(()) => Ok((dialogue, peer.ip())),
            Err(failure) => {
                dialogue.leave(&failure);
                Err(failed(failure).unwrap_or_else(|| Error::Protocol("453 came before ATRN".to_owned())))
            }
        }
    }

    /// Tries all addresses of the name, in the order the system gives.
    fn dial(&self) -> Result<(OwnedFd, SocketAddr), Error> {
        let address = &self.provider.address;
        let found = address.to_socket_addrs().map_err(|error| {
            Error::NoHost(format!("{address} has no address: {error}; check `address` and the name server"))
        })?;
        let mut last = "the name has no address".to_owned();
        for socket in found {
            if self.stop.stopped() {
                return Err(Error::Temporary("stopped".to_owned()));
            }
            let deadline = Instant::now() + self.caller.config.timeouts.connect;
            match wire::connect(socket, deadline, self.stop) {
                Ok(stream) => return Ok((stream, socket)),
                Err(error) => {
                    last = format!("{socket}: {error}");
                    log::info!("event=no-connection peer={socket} error={:?}", error.to_string());
                }
            }
        }
        Err(Error::Unavailable(format!("no connection to {address}: {last}")))
    }

    /// The customer's half of the turn, and mail until QUIT.
    fn receive(&self, wire: Wire, client: Client, peer: IpAddr) -> Result<(), Error> {
        let config = &self.caller.config;
        let profile = Profile {
            role: Role::Customer,
            hostname: config.hostname.clone(),
            max_size: config.mailboxes.max_size,
            max_recipients: config.limits.recipients,
            max_errors: config.limits.errors,
            max_auth_failures: config.limits.auth_failures,
            starttls: false,
            require_tls: false,
            // Whoever sends no mail cannot send notices.
            dsn: self.caller.outbox.is_some(),
            mechanisms: Vec::new(),
            stamps: self.caller.stamps.clone(),
        };
        let (wire, server) =
            turn::take_over(wire, client, profile).map_err(|error| Error::Protocol(error.to_string()))?;
        // A message half received stays with the provider: nothing is lost by stopping at once.
        let bounds = Bounds::new(&config.timeouts, &config.limits, self.stop, self.stop);
        let bounds = Bounds { session: config.timeouts.turn, ..bounds };
        let desk = self.caller.outbox.as_ref().map(|outbox| outbox.desk().clone());
        let hops = NextHops::new(&config.hostname, &config.timeouts, self.stop);
        let (mailboxes, handover) = (self.caller.mailboxes.clone(), self.caller.handover.clone());
        let mut receiver = Receiver::new(mailboxes, handover, desk, self.tally.clone(), hops);
        let mut session = Session::new(wire, server, crate::session::literal(peer), None, bounds);
        session.greet();
        let end = session.run(&mut receiver);
        session.close();
        match end {
            End::Quit => Ok(()),
            End::Closed(why) => Err(Error::Temporary(format!("the call was cut short: {why}"))),
            End::Atrn(_) => Err(Error::Protocol("the provider said ATRN".to_owned())),
        }
    }
}

/// What a failure means for the caller; `None`: there is no mail, and that is none.
fn failed(failure: Failure) -> Option<Error> {
    match failure {
        Failure::Halted(halt) => halted(halt),
        Failure::Broken(text) => Some(Error::Protocol(text)),
        Failure::NoTls(text) | Failure::Lost(text) => Some(Error::Temporary(text)),
        Failure::Stopped => Some(Error::Temporary("stopped".to_owned())),
    }
}

/// What a refusal means for the caller; `None`: all is well (RFC 2645 section 5.2.1).
fn halted(halt: Halt) -> Option<Error> {
    Some(match halt {
        Halt::Refused { what: "ATRN", reply } if reply.code() == 453 => return None,
        Halt::Refused { what, reply } => {
            let text = format!("the provider refused {what}: {reply}");
            match (what, reply.severity(), reply.code()) {
                (_, Severity::Transient, _) => Error::Temporary(text),
                ("AUTH", ..) | (_, _, 530 | 535) => Error::Denied(format!("{text}; check `name` and `secret`")),
                _ => Error::Protocol(text),
            }
        }
        Halt::NoStartTls => Error::Protocol(
            "the provider offers no STARTTLS, so neither secret nor mail was entrusted to it; \
             use `tls = \"implicit\"` if it has a port for that"
                .to_owned(),
        ),
        Halt::NoAtrn => Error::Protocol(
            "the server does not offer ATRN, so it is no provider of on-demand mail, and was not told the secret; \
             check host and port in `address`"
                .to_owned(),
        ),
        Halt::NoMechanism => Error::Protocol(
            "the provider offers no authentication that can be used: CRAM-MD5, or PLAIN under TLS".to_owned(),
        ),
        Halt::Unproven => Error::Denied("the provider did not prove that it knows the secret".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_take_several_calls() {
        assert_eq!(lists(&[]), [Vec::new()]);
        let domains: Vec<_> =
            (0..100).map(|number| Domain::parse(&format!("customer-{number}.example.org")).unwrap()).collect();
        let lists = lists(&domains);
        assert!(lists.len() > 1 && lists.concat() == domains);
        for list in lists {
            let names: Vec<_> = list.iter().map(Domain::as_str).collect();
            assert!(format!("ATRN {}\r\n", names.join(",")).len() <= 512);
        }
    }
}
