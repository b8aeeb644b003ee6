//! One call: dial, TLS, AUTH, ATRN, the turn, and mail until the provider says QUIT.
//!
//! 453 ("you have no mail") is a success. After the 250 to ATRN nothing but the greeting is said, and what
//! follows is an ordinary SMTP server session whose client is the provider (RFC 2645 section 5.3).

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::mailboxes::{Mailboxes, Tally};
use crate::config::{Customer, TlsMode};
use crate::session::{Bounds, End, Session};
use crate::smtp::address::Domain;
use crate::smtp::client::{Awaiting, Client, Halt, Plan, Step};
use crate::smtp::reply::{Reply, ReplyReader, Severity};
use crate::smtp::server::{Profile, Role};
use crate::stamp::Stamps;
use crate::tls::{self, ClientSide, Trust};
use crate::turn;
use crate::wire::{Filled, Line, Stop, Trace, Wire, Woken};

/// A command line may have 512 octets (RFC 5321 section 4.5.3.1.4): longer lists take several calls.
const ATRN_LIST_LIMIT: usize = 512 - "ATRN \r\n".len();

/// A reply line may be longer than RFC 5321 section 4.5.3.1.5 says, but not endless.
const REPLY_LINE_LIMIT: usize = 8 * 1024;

/// How long the reply to QUIT is waited for.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a call has brought.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    pub messages: u64,
    /// Octets of content.
    pub octets: u64,
    /// Recipients that have no mailbox here.
    pub refused: u64,
    pub seconds: f64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} messages, {} bytes, {:.1} seconds", self.messages, self.octets, self.seconds)?;
        if self.refused > 0 {
            write!(f, ", {} recipients refused", self.refused)?;
        }
        Ok(())
    }
}

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
    /// The provider does not let us in.
    Denied(String),
    /// The other end, or its certificate, is not what it should be.
    Protocol(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config(text)
            | Error::NoHost(text)
            | Error::Unavailable(text)
            | Error::Temporary(text)
            | Error::Denied(text)
            | Error::Protocol(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

/// Fetches the mail of all configured domains, in as few calls as their names take.
pub fn pull(config: &Customer, stamps: &Stamps, stop: &Stop) -> Result<Summary, Error> {
    let begun = Instant::now();
    let tls = client_side(config)?;
    let tally = Arc::new(Tally::default());
    for domains in lists(&config.provider.domains) {
        let call = Call { config, stamps, stop, tls: tls.as_ref(), tally: &tally };
        call.make(&domains)?;
    }
    Ok(Summary {
        messages: tally.messages.load(Ordering::Relaxed),
        octets: tally.octets.load(Ordering::Relaxed),
        refused: tally.refused.load(Ordering::Relaxed),
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// What the provider's certificate is checked against; `None`: no TLS.
pub fn client_side(config: &Customer) -> Result<Option<ClientSide>, Error> {
    let provider = &config.provider;
    let trust = match (&provider.tls, &provider.pin, &provider.ca) {
        (TlsMode::None, _, _) => return Ok(None),
        (_, Some(pin), _) => Trust::Pin(*pin),
        (_, None, Some(file)) => Trust::Authorities(file.clone()),
        (_, None, None) => Trust::System,
    };
    tls::client_config(&trust).map(Some).map_err(Error::Config)
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

/// What one call needs.
struct Call<'a> {
    config: &'a Customer,
    stamps: &'a Stamps,
    stop: &'a Stop,
    tls: Option<&'a ClientSide>,
    tally: &'a Arc<Tally>,
}

impl Call<'_> {
    fn make(&self, domains: &[Domain]) -> Result<(), Error> {
        let (stream, peer) = self.dial()?;
        log::info!("event=connected provider={} peer={peer}", self.config.provider.address);
        let trace = Trace { id: "pull".to_owned(), us: 'C', them: 'P' };
        let mut wire = Wire::new(stream.into(), trace).map_err(lost)?;
        if self.config.provider.tls == TlsMode::Implicit {
            self.begin_tls(&mut wire)?;
        }
        match self.converse(wire, domains)? {
            Some((wire, client)) => self.receive(wire, client, peer.ip()),
            None => Ok(()),
        }
    }

    /// Tries all addresses of the name, in the order the system gives.
    fn dial(&self) -> Result<(TcpStream, SocketAddr), Error> {
        let address = &self.config.provider.address;
        let found = address.to_socket_addrs().map_err(|error| {
            Error::NoHost(format!("{address} has no address: {error}; check `address` and the name server"))
        })?;
        let mut last = "the name has no address".to_owned();
        for socket in found {
            if self.stop.stopped() {
                return Err(Error::Temporary("stopped".to_owned()));
            }
            match TcpStream::connect_timeout(&socket, self.config.timeouts.connect) {
                Ok(stream) => return Ok((stream, socket)),
                Err(error) => {
                    last = format!("{socket}: {error}");
                    log::info!("event=no-connection peer={socket} error={:?}", error.to_string());
                }
            }
        }
        Err(Error::Unavailable(format!("no connection to {address}: {last}")))
    }

    fn begin_tls(&self, wire: &mut Wire) -> Result<(), Error> {
        let Some(side) = self.tls else {
            return Err(Error::Config("TLS is not configured".to_owned()));
        };
        let deadline = Instant::now() + self.config.timeouts.handshake;
        wire.start_tls_client(side, &self.config.provider.host, deadline).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => Error::Protocol(error.to_string()),
            _ => lost(error),
        })?;
        wire.trace.event("tls");
        Ok(())
    }

    /// Up to the reply to ATRN; `None`: there is no mail.
    fn converse(&self, wire: Wire, domains: &[Domain]) -> Result<Option<(Wire, Client)>, Error> {
        let provider = &self.config.provider;
        let plan = Plan {
            name: self.config.hostname.clone(),
            starttls: provider.tls == TlsMode::StartTls,
            tls: wire.secure().is_some(),
            atrn: true,
            credentials: Some((provider.name.clone(), provider.secret.clone())),
        };
        let mut dialogue = Dialogue { call: self, wire, client: Client::new(plan), replies: ReplyReader::default() };
        loop {
            let mut said = Vec::new();
            let step = match dialogue.next() {
                Ok(step) => step,
                Err(error) => {
                    dialogue.wire.shutdown();
                    return Err(error);
                }
            };
            match step {
                Step::StartTls => {
                    self.begin_tls(&mut dialogue.wire)?;
                    dialogue.client.secured(&mut said);
                }
                Step::Ready => dialogue.client.atrn(domains, &mut said),
                Step::Turned => return Ok(Some((dialogue.wire, dialogue.client))),
                Step::Halt(halt) => {
                    dialogue.client.quit(&mut said);
                    dialogue.say(&said);
                    dialogue.part();
                    return match halted(halt) {
                        None => Ok(None),
                        Some(error) => Err(error),
                    };
                }
                Step::Closed => return Err(Error::Temporary("the provider closed the session".to_owned())),
                Step::Wait | Step::Content | Step::Settled(_) => {}
            }
            dialogue.say(&said);
        }
    }

    /// The customer's half of the turn, and mail until QUIT.
    fn receive(&self, wire: Wire, client: Client, peer: IpAddr) -> Result<(), Error> {
        let config = self.config;
        let profile = Profile {
            role: Role::Customer,
            hostname: config.hostname.clone(),
            max_size: config.mailboxes.max_size,
            max_recipients: config.limits.recipients,
            max_errors: config.limits.errors,
            max_auth_failures: config.limits.auth_failures,
            starttls: false,
            require_tls: false,
            mechanisms: Vec::new(),
            stamps: self.stamps.clone(),
        };
        let (wire, server) =
            turn::take_over(wire, client, profile).map_err(|error| Error::Protocol(error.to_string()))?;
        let bounds = Bounds {
            command: config.timeouts.command,
            handshake: config.timeouts.handshake,
            session: config.timeouts.turn,
            hops: config.limits.received_hops,
            stop: self.stop.clone(),
            // A message half received stays with the provider: nothing is lost by stopping at once.
            halt: self.stop.clone(),
        };
        let mut mailboxes = Mailboxes::new(config, self.stamps, self.tally.clone());
        let mut session = Session::new(wire, server, crate::session::literal(peer), None, bounds);
        session.greet();
        let end = session.run(&mut mailboxes);
        session.close();
        match end {
            End::Quit => Ok(()),
            End::Closed(why) => Err(Error::Temporary(format!("the call was cut short: {why}"))),
            End::Atrn(_) => Err(Error::Protocol("the provider said ATRN".to_owned())),
        }
    }
}

/// The SMTP client's side of the call, before the turn.
struct Dialogue<'a> {
    call: &'a Call<'a>,
    wire: Wire,
    client: Client,
    replies: ReplyReader,
}

impl Dialogue<'_> {
    /// What the next reply leads to.
    fn next(&mut self) -> Result<Step, Error> {
        let reply = self.reply(Instant::now() + self.patience())?;
        let mut said = Vec::new();
        let step = self.client.reply(reply, &mut said).map_err(|broken| Error::Protocol(broken.0.to_owned()))?;
        self.say(&said);
        Ok(step)
    }

    /// RFC 5321 section 4.5.3.2, and ten minutes at least for ATRN (RFC 2645 section 5.2.1).
    fn patience(&self) -> Duration {
        let timeouts = &self.call.config.timeouts;
        match self.client.awaiting() {
            Some(Awaiting::Greeting) => timeouts.greeting,
            Some(Awaiting::Atrn) => timeouts.atrn,
            _ => timeouts.command,
        }
    }

    fn reply(&mut self, deadline: Instant) -> Result<Reply, Error> {
        loop {
            match self.wire.take_reply_line(REPLY_LINE_LIMIT) {
                Line::Whole(line) => {
                    self.wire.trace.heard(&line);
                    let reply = self.replies.line(&line);
                    let no_reply = |error: crate::smtp::reply::NotAReply| {
                        Error::Protocol(format!("that is no SMTP server: it said {:?}", error.0))
                    };
                    if let Some(reply) = reply.map_err(no_reply)? {
                        return Ok(reply);
                    }
                    continue;
                }
                Line::TooLong => return Err(Error::Protocol("a reply line without end".to_owned())),
                Line::None => {}
            }
            match self.wire.wait_input(deadline, self.call.stop).map_err(lost)? {
                Woken::Ready => {}
                Woken::Deadline => return Err(Error::Temporary("the provider does not answer".to_owned())),
                Woken::Stopped => return Err(Error::Temporary("stopped".to_owned())),
            }
            if self.wire.fill().map_err(lost)? == Filled::End {
                return Err(Error::Temporary("the provider closed the connection".to_owned()));
            }
        }
    }

    fn say(&mut self, octets: &[u8]) {
        for line in octets.split_inclusive(|octet| *octet == b'\n') {
            let line = line.trim_ascii_end();
            let end = if !self.client.in_auth() {
                line.len()
            } else if line.starts_with(b"AUTH ") {
                line.iter().enumerate().filter(|(_, octet)| **octet == b' ').nth(1).map_or(line.len(), |(at, _)| at)
            } else {
                0
            };
            let blanked: &[u8] = if end < line.len() { b" ***" } else { b"" };
            self.wire.trace.said(&[&line[..end], blanked].concat());
        }
        self.wire.say(octets);
    }

    /// Waits for the reply to QUIT, if the provider is so kind.
    fn part(mut self) {
        let _ = self.reply(Instant::now() + FAREWELL);
        self.wire.shutdown();
    }
}

fn lost(error: io::Error) -> Error {
    Error::Temporary(format!("the connection was lost: {error}"))
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
