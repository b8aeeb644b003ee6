//! The hosts for the mail of a domain: its MX records, and the addresses of a host (RFC 5321 section 5.1).
//!
//! The result is either definite (also if the domain does not exist) or a [`ResolveError`], which is temporary. Each
//! query ends at an absolute deadline, even if octets keep arriving. [`Resolver::within`] sets one deadline for all
//! queries, and a token that cancels them. There is no cache: the name server has one.
//!
//! ```text
//! route("example.org")                          each query, to each server in turn, then again:
//!   MX? ── records ──▶ Hosts, or Null             UDP with EDNS0, new id and new port
//!    │ └── no such name ──▶ NoDomain               ├─ not the reply to this query: wait for it
//!    └ none: AAAA? A? ── some ──▶ Implicit         ├─ truncated: TCP    not understood: without EDNS0
//!                    └── none ──▶ NoHost           └─ SERVFAIL, REFUSED, malformed, no reply: next server
//! ```
//!
//! This is a stub resolver (RFC 1034 section 5.3.1): it needs a recursive name server, and trusts it. Names are absolute;
//! neither `search` nor /etc/hosts is used.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

pub use domain::base::Rtype;
use domain::base::iana::{Class, Opcode, OptRcode};
use domain::base::message_builder::PushError;
use domain::base::wire::ParseError;
use domain::base::{Message, MessageBuilder, Name, ParsedName, ParsedRecord, ToName, UnknownRecordData};
use domain::rdata::{A, Aaaa, Cname, Mx, Ptr};
use rustix::event::{PollFd, PollFlags};

use crate::ids::Ids;
use crate::mail::address::{Domain, parse_literal};
use crate::net::cancel::{self, CancelToken};
use crate::net::connection;
use crate::sorting::sort_by_cached_key;
use crate::threads::{self, Guarded};

const CONFIGURATION: &str = "/etc/resolv.conf";
const PORT: u16 = 53;

/// Seconds for one query, over UDP or over TCP. This and the other defaults and bounds are those of resolv.conf(5).
const TIMEOUT: u32 = 5;
const TIMEOUT_LIMIT: u32 = 30;
/// How often all servers are queried.
const ATTEMPTS: u32 = 2;
const ATTEMPTS_LIMIT: u32 = 5;
const SERVERS_LIMIT: usize = 3;

/// A UDP message of this size needs no fragments on any path (RFC 6891 section 6.2.5, DNS flag day 2020).
const UDP_SIZE: u16 = 1232;
/// The largest DNS message (RFC 1035 section 4.2.2).
const MESSAGE_LIMIT: usize = u16::MAX as usize;

/// How often a CNAME may lead to another query (RFC 1034 section 3.6.2). All CNAMEs within one reply are followed.
const ALIAS_LIMIT: usize = 8;
/// The most hosts of a domain, or addresses of a host, that are returned: the first in their order.
const RESULT_LIMIT: usize = 100;

/// The most lookups by the system's resolver at the same time. Each has a thread that cannot be interrupted.
const SYSTEM_LOOKUP_LIMIT: usize = 32;
/// How often a lookup over this limit checks whether another one has ended.
const SYSTEM_LOOKUP_POLL: Duration = Duration::from_millis(50);

/// Queries name servers. A clone queries the same servers.
#[derive(Clone)]
pub struct Resolver {
    servers: Arc<[SocketAddr]>,
    timeout: Duration,
    attempts: u32,
    ids: Ids,
    /// All queries end then.
    deadline: Option<Instant>,
    /// Ends every wait.
    cancel: Option<CancelToken>,
}

/// The route for the mail of a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MxRoute {
    /// The hosts of its MX records, the lowest preference first, those of equal preference in random order, none twice, 100
    /// at most. A host may have any name that DNS permits, also one with `_`. Empty if there are MX records, but none with a
    /// name: the mail is undeliverable, and there is no implicit MX (RFC 5321 section 5.1).
    Hosts(Vec<MxHost>),
    /// The domain accepts no mail: it has a null MX (RFC 7505).
    Null,
    /// The domain has no MX record but addresses: it is its own host (RFC 5321 section 5.1).
    Implicit,
    /// The domain does not exist.
    NoDomain,
    /// The domain exists, and has neither MX records nor addresses.
    NoHost,
    /// DNS does not permit this name: a label is empty or longer than 63 octets, or the name is longer than 253 (RFC 1035
    /// section 2.3.4).
    NotDnsName,
}

/// One MX record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MxHost {
    /// The client tries the host with the lowest preference first.
    pub preference: u16,
    pub host: Domain,
}

/// No server gave a usable reply. Another attempt may succeed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResolveError {
    /// The name that was queried, and the error of each server.
    pub text: String,
    /// No server has replied at all: the next query would wait as long.
    pub no_reply: bool,
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Resolver {
    /// Returns a resolver for the first three servers in /etc/resolv.conf, which it reads now; if the file names none, for a
    /// server on this machine.
    ///
    /// # Errors
    ///
    /// The file exists and cannot be read.
    pub fn system(ids: &Ids) -> io::Result<Resolver> {
        let text = match fs::read(CONFIGURATION) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => other.map_err(|error| io::Error::new(error.kind(), format!("{CONFIGURATION}: {error}")))?,
        };
        Ok(Resolver::configured(&text, ids))
    }

    /// Returns a resolver for this server only.
    pub fn at(server: SocketAddr, ids: &Ids) -> Resolver {
        Resolver::new(vec![server], TIMEOUT, ATTEMPTS, ids)
    }

    /// The same resolver, but all queries end at this deadline, or when the token is cancelled.
    pub fn within(self, deadline: Instant, cancel: &CancelToken) -> Resolver {
        Resolver { deadline: Some(deadline), cancel: Some(cancel.clone()), ..self }
    }

    /// The same resolver, for a command whose user waits: all queries end at this deadline; each ends after `timeout`,
    /// and is sent twice at most.
    pub fn hurried(self, timeout: Duration, deadline: Instant) -> Resolver {
        let (timeout, attempts) = (self.timeout.min(timeout), self.attempts.min(2));
        Resolver { timeout, attempts, deadline: Some(deadline), ..self }
    }

    /// Finds the records of one type: A, AAAA, CNAME, MX, PTR, TLSA or TXT. Aliases are followed, except to CNAME itself.
    ///
    /// # Errors
    ///
    /// [`ResolveError`] if no server gave a usable reply.
    pub fn records(&self, name: &Domain, kind: Rtype) -> Result<Answer, ResolveError> {
        self.look_up(name, kind)
    }

    /// Finds the route for the mail of `domain`.
    ///
    /// # Errors
    ///
    /// [`ResolveError`] if no server gave a usable reply.
    pub fn route(&self, domain: &Domain) -> Result<MxRoute, ResolveError> {
        if dns_name(domain).is_none() {
            return Ok(MxRoute::NotDnsName);
        }
        match self.look_up(domain, Rtype::MX)? {
            Answer::Records(records) => Ok(self.mx_route(records)),
            Answer::NoName => Ok(MxRoute::NoDomain),
            // `192.0.2.1` is not a domain: without this check any sender could choose the address to connect to.
            Answer::NoRecords if address_for_name(domain).is_some() => Ok(MxRoute::NoHost),
            Answer::NoRecords if self.addresses(domain)?.is_empty() => Ok(MxRoute::NoHost),
            Answer::NoRecords => Ok(MxRoute::Implicit),
        }
    }

    /// Finds the addresses of `host`, 100 at most: IPv6 and IPv4 alternately, each in the order of the reply (RFC 5321 section
    /// 5.1). Empty: the host has no address. If `host` is itself an address, the result is that (see [`address_for_name`]).
    /// The caller decides which addresses it connects to.
    ///
    /// # Errors
    ///
    /// [`ResolveError`] if no address was found and a query has failed.
    pub fn addresses(&self, host: &Domain) -> Result<Vec<IpAddr>, ResolveError> {
        if let Some(address) = address_for_name(host) {
            return Ok(vec![address]);
        }
        let mut addresses = Vec::new();
        let mut failure = None;
        for kind in [Rtype::AAAA, Rtype::A] {
            match self.look_up(host, kind) {
                Ok(Answer::Records(records)) => {
                    addresses.extend(records.into_iter().filter_map(|record| match record {
                        Record::Address(address) => Some(address),
                        _ => None,
                    }));
                }
                // Some servers reply "no such name" if a name has no AAAA (RFC 4074 section 4.2), so both are always queried.
                Ok(Answer::NoRecords | Answer::NoName) => {}
                Err(error) => failure = Some(error),
            }
        }
        let mut seen = HashSet::new();
        addresses.retain(|address| seen.insert(*address));
        let mut addresses = alternate_families(addresses, IpAddr::is_ipv6);
        addresses.truncate(RESULT_LIMIT);
        match failure {
            Some(error) if addresses.is_empty() => Err(error),
            // The addresses of one family are better than none.
            _ => Ok(addresses),
        }
    }

    fn configured(text: &[u8], ids: &Ids) -> Resolver {
        // Lines that are not valid are ignored, as by other resolvers.
        let (configuration, _) = resolv_conf::Config::parse_with_errors(text);
        let servers = configuration.get_nameservers_or_local();
        let servers = servers.iter().filter_map(|server| {
            // This asks the system for the number of the interface in "fe80::1%eth0"; it looks up no name.
            (server.to_string().as_str(), PORT).to_socket_addrs().ok()?.next()
        });
        let servers = servers.take(SERVERS_LIMIT).collect();
        Resolver::new(servers, configuration.timeout, configuration.attempts, ids)
    }

    fn new(servers: Vec<SocketAddr>, timeout: u32, attempts: u32, ids: &Ids) -> Resolver {
        Resolver {
            servers: servers.into(),
            timeout: Duration::from_secs(timeout.clamp(1, TIMEOUT_LIMIT).into()),
            attempts: attempts.clamp(1, ATTEMPTS_LIMIT),
            ids: ids.clone(),
            deadline: None,
            cancel: None,
        }
    }

    /// The deadline of one query that begins now.
    fn query_deadline(&self) -> Instant {
        let end = Instant::now() + self.timeout;
        self.deadline.map_or(end, |deadline| deadline.min(end))
    }

    /// Whether no more query may begin.
    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
            || self.cancel.as_ref().is_some_and(CancelToken::is_cancelled)
    }

    /// Repeats an operation on a non-blocking socket until it has a result, the deadline has passed, or the token is
    /// cancelled. `flag`: the flag to poll for.
    fn wait_for<T>(
        &self, socket: BorrowedFd<'_>, flag: PollFlags, deadline: Instant, mut operation: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
        loop {
            self.cancel.as_ref().map_or(Ok(()), CancelToken::check)?;
            if Instant::now() >= deadline {
                return Err(io::Error::new(TimedOut, "no answer in time"));
            }
            match operation() {
                Err(error) if matches!(error.kind(), Interrupted | WouldBlock) => {}
                other => return other,
            }
            let mut descriptors = vec![PollFd::from_borrowed_fd(socket, flag)];
            let cancel = self.cancel.as_ref();
            descriptors.extend(cancel.map(|cancel| PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN)));
            cancel::poll(&mut descriptors, Some(deadline))?;
        }
    }

    fn mx_route(&self, records: Vec<Record>) -> MxRoute {
        let (mut hosts, mut null) = (Vec::new(), true);
        for record in records {
            let Record::Exchange(preference, name) = record else { continue };
            // RFC 7505 section 3: "." with other records is a mistake, neither a null MX nor a host.
            null &= name.is_root();
            hosts.extend(Domain::of_dns(&name.to_string()).map(|host| MxHost { preference, host }));
        }
        if null {
            return MxRoute::Null;
        }
        // RFC 5321 section 5.1: the lowest preference first, equal ones in random order.
        sort_by_cached_key(&mut hosts, |host| (host.preference, self.ids.random_number()));
        let mut seen = HashSet::new();
        hosts.retain(|host| seen.insert(host.host.clone()));
        hosts.truncate(RESULT_LIMIT);
        MxRoute::Hosts(hosts)
    }

    /// Queries the records of a name, and follows aliases from reply to reply.
    fn look_up(&self, domain: &Domain, kind: Rtype) -> Result<Answer, ResolveError> {
        let Some(name) = dns_name(domain) else { return Ok(Answer::NoName) };
        let mut question = Question { name, kind, aliases: ALIAS_LIMIT };
        loop {
            match self.query(&question) {
                Ok(Resolution::Answer(answer)) => return Ok(answer),
                Ok(Resolution::Alias(name)) if question.aliases > 0 => {
                    question = Question { name, kind, aliases: question.aliases - 1 };
                }
                Ok(Resolution::Alias(_)) => {
                    let text = format!("{kind} records of {domain}: aliases lead from one to another without end");
                    return Err(ResolveError { text, no_reply: false });
                }
                Err(error) => {
                    return Err(ResolveError { text: format!("{kind} records of {domain}: {error}"), ..error });
                }
            }
        }
    }

    /// Queries all servers in turn, and again those that did not reply. The error has the error of each server.
    fn query(&self, question: &Question) -> Result<Resolution, ResolveError> {
        let mut failures: Vec<Option<QueryError>> = self.servers.iter().map(|_| None).collect();
        for attempt in 0..self.attempts {
            for (server, failure) in self.servers.iter().zip(&mut failures) {
                if !matches!(failure, None | Some(QueryError::NoReply(_))) || self.is_over() {
                    continue;
                }
                // Some firewalls drop messages with EDNS0, so the last query does not have it.
                let edns = attempt == 0 || attempt + 1 < self.attempts;
                match self.query_server(*server, question, edns) {
                    Ok(resolution) => return Ok(resolution),
                    Err(error) => *failure = Some(error),
                }
            }
        }
        let no_reply = failures.iter().all(|failure| matches!(failure, None | Some(QueryError::NoReply(_))));
        let failures = self.servers.iter().zip(failures);
        let failures: Vec<String> =
            failures.filter_map(|(server, failure)| Some(format!("{server}: {}", failure?))).collect();
        let text = match failures.is_empty() {
            true if self.servers.is_empty() => "no name server is known".to_owned(),
            true => "there is no time left for the query".to_owned(),
            false => failures.join("; "),
        };
        Err(ResolveError { text, no_reply })
    }

    /// Queries one server; again over TCP if the reply is truncated, and without EDNS0 if it is not understood.
    fn query_server(&self, server: SocketAddr, question: &Question, mut edns: bool) -> QueryResult {
        let mut tcp = false;
        loop {
            let id = self.ids.random_number() as u16;
            let query = question.message(id, edns)?;
            let parse = |message: &[u8]| parse_reply(message, id, question);
            match if tcp { self.over_tcp(server, &query, parse) } else { self.over_udp(server, &query, parse) } {
                // RFC 7766 section 5.
                Err(QueryError::Truncated) if !tcp => tcp = true,
                // RFC 6891 section 7.
                Err(QueryError::NotUnderstood(_)) if edns => edns = false,
                result => return result,
            }
        }
    }

    fn over_udp(&self, server: SocketAddr, query: &[u8], parse: impl Fn(&[u8]) -> Option<QueryResult>) -> QueryResult {
        let deadline = self.query_deadline();
        let socket = self.socket(server)?;
        socket.set_nonblocking(true)?;
        // A connected socket receives no messages from other addresses, and reports ICMP "port unreachable".
        socket.connect(server)?;
        socket.send(query)?;
        let mut buffer = vec![0; MESSAGE_LIMIT];
        loop {
            let length = self.wait_for(socket.as_fd(), PollFlags::IN, deadline, || socket.recv(&mut buffer))?;
            if let Some(reply) = buffer.get(..length).and_then(&parse) {
                return reply;
            }
        }
    }

    fn over_tcp(&self, server: SocketAddr, query: &[u8], parse: impl Fn(&[u8]) -> Option<QueryResult>) -> QueryResult {
        let deadline = self.query_deadline();
        let mut stream = TcpStream::from(connection::connect(server, deadline, self.cancel.as_ref())?);
        // Length and message in one write (RFC 7766 section 8). They fit into the empty buffer of the socket.
        let length = u16::try_from(query.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), query].concat())?;
        loop {
            let mut length = [0; 2];
            self.read_exact(&stream, &mut length, deadline)?;
            let mut message = vec![0; u16::from_be_bytes(length).into()];
            self.read_exact(&stream, &mut message, deadline)?;
            if let Some(reply) = parse(&message) {
                return reply;
            }
        }
    }

    /// Fills `buffer`, or fails at the deadline, however slowly the octets arrive.
    fn read_exact(&self, stream: &TcpStream, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !buffer.is_empty() {
            let mut from = stream;
            let length = self.wait_for(stream.as_fd(), PollFlags::IN, deadline, || from.read(buffer))?;
            if length == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
            }
            buffer = buffer.get_mut(length..).unwrap_or_default();
        }
        Ok(())
    }

    /// A socket on a random port (RFC 5452 section 9.2): not all systems choose ports at random, and an attacker that
    /// guesses the port can forge replies.
    fn socket(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        const FIRST: u16 = 16 * 1024;
        let (v4, v6) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let any = if server.is_ipv4() { v4 } else { v6 };
        for _ in 0..4 {
            let port = FIRST + self.ids.random_number() as u16 % (u16::MAX - FIRST);
            if let Ok(socket) = UdpSocket::bind((any, port)) {
                return Ok(socket);
            }
        }
        UdpSocket::bind((any, 0))
    }
}

/// Orders addresses so that the families alternate, the family of the first address first; within a family the order stays.
/// Otherwise, if one family does not work on this machine, a limit could cut off all addresses of the other.
fn alternate_families<T>(addresses: Vec<T>, is_ipv6: impl Fn(&T) -> bool) -> Vec<T> {
    let first_family = addresses.first().is_some_and(&is_ipv6);
    let (first, second): (Vec<T>, Vec<T>) = addresses.into_iter().partition(|address| is_ipv6(address) == first_family);
    let mut second = second.into_iter();
    let mut ordered: Vec<T> = first.into_iter().flat_map(|address| [Some(address), second.next()]).flatten().collect();
    ordered.extend(second);
    ordered
}

/// Looks up the addresses of a configured host (`host:port`) by the system's resolver; the families alternate. Never empty.
///
/// # Errors
/// The host has no address, or cannot be looked up; `TimedOut` if a later attempt may succeed, `Interrupted` if `cancel` is
/// cancelled.
pub fn system_addresses(address: &str, deadline: Instant, cancel: &CancelToken) -> io::Result<Vec<SocketAddr>> {
    let found = match address.parse() {
        Ok(address) => vec![address],
        Err(_) => look_up_by_system(address, deadline, cancel)?,
    };
    let addresses = alternate_families(found, SocketAddr::is_ipv6);
    match addresses.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "the name is known, without an address")),
        false => Ok(addresses),
    }
}

/// Calls getaddrinfo(3) in a new thread, which may run on after the deadline, because the call cannot be interrupted.
fn look_up_by_system(address: &str, deadline: Instant, cancel: &CancelToken) -> io::Result<Vec<SocketAddr>> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, "the system's resolver does not answer");
    let slot = loop {
        cancel.check()?;
        if let Some(slot) = LookupSlot::take() {
            break slot;
        }
        if Instant::now() >= deadline {
            return Err(late());
        }
        cancel.wait_until(Some(deadline.min(Instant::now() + SYSTEM_LOOKUP_POLL)));
    };
    let found = Arc::new(Guarded::new(None));
    // A token, so that poll(2) can wait for it and for `cancel`.
    let done = CancelToken::new()?;
    let (name, result, ended) = (address.to_owned(), found.clone(), done.clone());
    threads::spawn("lookup", move || {
        let _slot = slot;
        *result.lock() = Some(name.to_socket_addrs().map(Iterator::collect).map_err(timed_out_if_temporary));
        ended.cancel();
    })?;
    while !done.is_cancelled() {
        cancel.check()?;
        if Instant::now() >= deadline {
            return Err(late());
        }
        let descriptors = [done.fd(), cancel.fd()];
        cancel::poll(&mut descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), Some(deadline))?;
    }
    let result = found.lock().take();
    result.unwrap_or_else(|| Err(io::Error::other("the lookup has ended without a result")))
}

/// Returns an error of getaddrinfo(3), with the kind `TimedOut` if it is EAI_AGAIN: no name server has replied, or one has
/// failed. The standard library hands over the text of the system only.
fn timed_out_if_temporary(error: io::Error) -> io::Error {
    let text = error.to_string();
    // Those of glibc and OpenBSD, of musl, and of FreeBSD.
    match ["emporary failure", "Try again", "at this time"].iter().any(|part| text.contains(part)) {
        true => io::Error::new(io::ErrorKind::TimedOut, text),
        false => error,
    }
}

/// Permission for one of [`SYSTEM_LOOKUP_LIMIT`] lookups, until it is dropped.
struct LookupSlot;

static SYSTEM_LOOKUPS: AtomicUsize = AtomicUsize::new(0);

impl LookupSlot {
    fn take() -> Option<LookupSlot> {
        let more = |count| (count < SYSTEM_LOOKUP_LIMIT).then_some(count + 1);
        SYSTEM_LOOKUPS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| LookupSlot)
    }
}

impl Drop for LookupSlot {
    fn drop(&mut self) {
        SYSTEM_LOOKUPS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One question to a name server.
struct Question {
    name: Name<Vec<u8>>,
    kind: Rtype,
    /// How many more times an alias may lead to another query.
    aliases: usize,
}

impl Question {
    fn message(&self, id: u16, edns: bool) -> Result<Vec<u8>, PushError> {
        let mut message = MessageBuilder::new_vec();
        message.header_mut().set_id(id);
        message.header_mut().set_rd(true);
        let mut message = message.question();
        message.push((&self.name, self.kind))?;
        let mut message = message.additional();
        if edns {
            message.opt(|options| {
                options.set_udp_payload_size(UDP_SIZE);
                Ok(())
            })?;
        }
        Ok(message.finish())
    }
}

/// The definite answer to a question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// At least one record of the queried type.
    Records(Vec<Record>),
    /// The name exists, but has no records of this type.
    NoRecords,
    /// The name does not exist.
    NoName,
}

/// The meaning of one reply.
#[derive(PartialEq, Debug)]
enum Resolution {
    Answer(Answer),
    /// The server has not looked up the target of an alias: this name must be queried.
    Alias(Name<Vec<u8>>),
}

/// The content of a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// MX: the preference and the host.
    Exchange(u16, Name<Vec<u8>>),
    /// A or AAAA.
    Address(IpAddr),
    /// CNAME or PTR.
    Target(Name<Vec<u8>>),
    /// TXT: its strings, joined (RFC 7208 section 3.3).
    Text(Vec<u8>),
    /// TLSA: the three numbers, and the data (RFC 6698 section 2.1).
    Tlsa([u8; 3], Vec<u8>),
}

/// The result of a query, or of one reply to it.
type QueryResult = Result<Resolution, QueryError>;

/// Why a server gave no resolution.
#[derive(PartialEq, Debug)]
enum QueryError {
    /// No reply has arrived: query the server again.
    NoReply(String),
    Truncated,
    /// The server does not know EDNS0.
    NotUnderstood(OptRcode),
    /// The reply is useless, and the next one would be too.
    Useless(String),
}

impl fmt::Display for QueryError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            QueryError::NoReply(text) | QueryError::Useless(text) => f.write_str(text),
            QueryError::Truncated => f.write_str("truncated over TCP"),
            QueryError::NotUnderstood(code) => code.fmt(f),
        }
    }
}

impl From<io::Error> for QueryError {
    fn from(error: io::Error) -> QueryError {
        QueryError::NoReply(error.to_string())
    }
}

impl From<PushError> for QueryError {
    fn from(error: PushError) -> QueryError {
        QueryError::Useless(error.to_string())
    }
}

impl From<ParseError> for QueryError {
    fn from(error: ParseError) -> QueryError {
        QueryError::Useless(format!("malformed: {error}"))
    }
}

/// Parses a message. `None`: it is not the reply to this query (RFC 5452 section 9.1), which may still arrive.
fn parse_reply(message: &[u8], id: u16, question: &Question) -> Option<QueryResult> {
    let message = Message::from_octets(message).ok()?;
    let header = message.header();
    if !header.qr() || header.id() != id || header.opcode() != Opcode::QUERY {
        return None;
    }
    let code = message.opt_rcode();
    let not_understood = [OptRcode::FORMERR, OptRcode::NOTIMP, OptRcode::BADVERS].contains(&code);
    let repeats_question = message.sole_question().is_ok_and(|asked| {
        asked.qname().name_eq(&question.name) && asked.qtype() == question.kind && asked.qclass() == Class::IN
    });
    // A server that did not understand the query cannot always repeat the question.
    let excused = not_understood && message.header_counts().qdcount() == 0;
    if !repeats_question && !excused {
        return None;
    }
    Some(match code {
        _ if not_understood => Err(QueryError::NotUnderstood(code)),
        _ if header.tc() => Err(QueryError::Truncated),
        OptRcode::NOERROR => resolve(&message, question),
        // If there are aliases, NXDOMAIN is about the last name (RFC 6604 section 3).
        OptRcode::NXDOMAIN => Ok(Resolution::Answer(Answer::NoName)),
        other => Err(QueryError::Useless(other.to_string())),
    })
}

/// Reads the records of a reply and follows the aliases among them.
fn resolve(message: &Message<&[u8]>, question: &Question) -> QueryResult {
    let mut aliases = HashMap::new();
    let mut records = Vec::new();
    for record in message.answer()? {
        let record = record?;
        if record.class() != Class::IN {
            continue;
        }
        if question.kind != Rtype::CNAME
            && let Some(alias) = record.to_record::<Cname<ParsedName<&[u8]>>>()?
        {
            aliases.entry(record.owner().to_name::<Vec<u8>>()).or_insert(alias.into_data().into_cname());
        } else if record.rtype() == question.kind
            && let Some(data) = record_data(&record)?
        {
            records.push((record.owner(), data));
        }
    }
    let mut name = question.name.to_name::<Vec<u8>>();
    // After as many steps as there are aliases, one of them was followed twice.
    for passed in 0..=aliases.len() {
        let found = records.iter().filter(|(owner, _)| owner.name_eq(&name));
        let found: Vec<Record> = found.map(|(_, record)| record.clone()).collect();
        if !found.is_empty() {
            return Ok(Resolution::Answer(Answer::Records(found)));
        }
        match aliases.get(&name) {
            Some(target) => name = target.to_name(),
            None => return resolve_without_records(message, name, passed),
        }
    }
    Err(QueryError::Useless("a loop of aliases".to_owned()))
}

/// The meaning of a reply without a record for `name`, after `passed` aliases (RFC 2308 section 2.2).
fn resolve_without_records(message: &Message<&[u8]>, name: Name<Vec<u8>>, passed: usize) -> QueryResult {
    let mut referral = false;
    for record in message.authority()? {
        match record?.rtype() {
            Rtype::SOA => return Ok(Resolution::Answer(Answer::NoRecords)),
            Rtype::NS => referral = true,
            _ => {}
        }
    }
    let header = message.header();
    if passed > 0 {
        Ok(Resolution::Alias(name))
    } else if !header.aa() && (referral || !header.ra()) {
        Err(QueryError::Useless("it has no answer and offers no recursion".to_owned()))
    } else {
        Ok(Resolution::Answer(Answer::NoRecords))
    }
}

/// The content of a record. `None`: this program does not use its type.
fn record_data(record: &ParsedRecord<&[u8]>) -> Result<Option<Record>, ParseError> {
    let record = match record.rtype() {
        Rtype::MX => record.to_record::<Mx<ParsedName<&[u8]>>>()?.map(|record| {
            let exchange = record.into_data();
            Record::Exchange(exchange.preference(), exchange.exchange().to_name())
        }),
        Rtype::A => record.to_record::<A>()?.map(|record| Record::Address(record.data().addr().into())),
        Rtype::AAAA => record.to_record::<Aaaa>()?.map(|record| Record::Address(record.data().addr().into())),
        Rtype::CNAME => record
            .to_record::<Cname<ParsedName<&[u8]>>>()?
            .map(|record| Record::Target(record.data().cname().to_name())),
        Rtype::PTR => record
            .to_record::<Ptr<ParsedName<&[u8]>>>()?
            .map(|record| Record::Target(record.data().ptrdname().to_name())),
        kind @ (Rtype::TXT | Rtype::TLSA) => {
            let data = record.to_record::<UnknownRecordData<&[u8]>>()?.map(|record| *record.data().data());
            let data = data.unwrap_or_default();
            let record = match (kind, data) {
                (Rtype::TXT, strings) => joined_strings(strings).map(Record::Text),
                (_, [usage, selector, matching, data @ ..]) => {
                    Some(Record::Tlsa([*usage, *selector, *matching], data.to_vec()))
                }
                _ => None,
            };
            Some(record.ok_or(ParseError::ShortInput)?)
        }
        _ => None,
    };
    Ok(record)
}

/// Joins the strings of a TXT record, each of which follows its length; `None`: a length is too large.
fn joined_strings(mut strings: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    while let [length, rest @ ..] = strings {
        let (string, rest) = rest.split_at_checked(usize::from(*length))?;
        text.extend_from_slice(string);
        strings = rest;
    }
    Some(text)
}

/// The DNS name of a domain; `None`: DNS does not permit it (RFC 1035 section 2.3.4).
fn dns_name(domain: &Domain) -> Option<Name<Vec<u8>>> {
    Name::vec_from_str(domain.as_str()).ok()
}

/// The address in an MX record that has one in place of a host name: `192.0.2.1`, with or without brackets. RFC 5321 section
/// 5.1 does not permit it, but other mail servers send to it.
pub fn address_for_name(host: &Domain) -> Option<IpAddr> {
    let text = host.as_str();
    let inside = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    inside.parse().ok().or_else(|| parse_literal(inside))
}

#[cfg(test)]
mod tests;
