//! Where the mail of a domain goes: its MX records, and the addresses of a host (RFC 5321 section 5.1).
//!
//! Contract: the answer is either definite (also "there is no such domain") or [`Unresolved`]: try again later. No
//! question waits for ever: a try ends at an absolute deadline, whatever comes in meanwhile. Nothing is cached: the
//! name server does that.
//!
//! ```text
//! route("example.org")                          each question, to each server in turn, then round again:
//!   MX? ── records ──▶ Hosts, or Null             UDP with EDNS0, new id and new port
//!    │ └── no such name ──▶ NoDomain               ├─ not the answer to this question: wait on
//!    └ none: AAAA? A? ── some ──▶ Implicit         ├─ truncated: TCP    not understood: without EDNS0
//!                    └── none ──▶ NoDomain         └─ SERVFAIL, REFUSED, nonsense, silence: next server
//! ```
//!
//! This is a stub resolver (RFC 1034 section 5.3.1): it needs a name server that recurses, and trusts it. Names are
//! absolute; neither `search` nor /etc/hosts is looked at.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain::base::iana::{Class, Opcode, OptRcode};
use domain::base::message_builder::PushError;
use domain::base::wire::ParseError;
use domain::base::{Message, MessageBuilder, Name, ParsedName, ParsedRecord, Rtype, ToName};
use domain::rdata::{A, Aaaa, Cname, Mx};
use log::debug;

use crate::ids::Ids;
use crate::mail::address::Domain;

const CONFIGURATION: &str = "/etc/resolv.conf";
const PORT: u16 = 53;

/// One try, over UDP or over TCP. Default and bounds are those of resolv.conf(5).
const TIMEOUT: u32 = 5;
const TIMEOUT_LIMIT: u32 = 30;
/// Rounds through all servers.
const ATTEMPTS: u32 = 2;
const ATTEMPTS_LIMIT: u32 = 5;
const SERVERS_LIMIT: usize = 3;

/// What fits through any path without fragments (RFC 6891 section 6.2.5, DNS flag day 2020).
const UDP_SIZE: u16 = 1232;
/// The largest message there is (RFC 1035 section 4.2.2).
const MESSAGE_LIMIT: usize = u16::MAX as usize;

/// CNAMEs followed for one question, within answers and by asking again (RFC 1034 section 3.6.2).
const ALIAS_LIMIT: usize = 8;
/// The best hosts of a domain, and the first addresses of a host: nobody needs more.
const RESULT_LIMIT: usize = 100;

/// Asks name servers. A clone asks the same ones.
#[derive(Clone)]
pub struct Resolver {
    servers: Arc<[SocketAddr]>,
    timeout: Duration,
    attempts: u32,
    ids: Ids,
}

/// Where the mail of a domain goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MxRoute {
    /// The hosts of its MX records, best first, equals in random order, none twice. Empty when there are MX records
    /// but no host among them has a name a host may have: undeliverable, not "implicit" (RFC 5321 section 5.1).
    Hosts(Vec<MxHost>),
    /// It says that it takes no mail (RFC 7505).
    Null,
    /// It has no MX record but addresses: it is its own host (RFC 5321 section 5.1).
    Implicit,
    /// It does not exist, or has neither MX records nor addresses.
    NoDomain,
}

/// One MX record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MxHost {
    /// Less is better.
    pub preference: u16,
    pub host: Domain,
}

/// No server gave a usable answer; the text says what each did. Try again later.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResolveError(pub String);

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ResolveError {}

impl Resolver {
    /// Asks the servers of /etc/resolv.conf as it is now, or the one on this machine when there are none.
    pub fn system(ids: &Ids) -> io::Result<Resolver> {
        let text = match fs::read(CONFIGURATION) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => other.map_err(|error| io::Error::new(error.kind(), format!("{CONFIGURATION}: {error}")))?,
        };
        Ok(Resolver::configured(&text, ids))
    }

    /// Asks this server only.
    pub fn at(server: SocketAddr, ids: &Ids) -> Resolver {
        Resolver::new(vec![server], TIMEOUT, ATTEMPTS, ids)
    }

    /// Where the mail of `domain` goes.
    pub fn route(&self, domain: &Domain) -> Result<MxRoute, ResolveError> {
        match self.look_up(domain, Rtype::MX)? {
            Answer::Records(records) => Ok(self.hosts(&records)),
            Answer::NoName => Ok(MxRoute::NoDomain),
            Answer::Nothing if self.addresses(domain)?.is_empty() => Ok(MxRoute::NoDomain),
            Answer::Nothing => Ok(MxRoute::Implicit),
        }
    }

    /// The addresses of `host`, IPv6 first, otherwise in the order of the answer (RFC 5321 section 5.1). Empty: it
    /// has none, which is definite.
    ///
    /// What is no host's address (unspecified, multicast, broadcast) is left out. Loopback and private ones are not:
    /// whether to connect to them is the caller's question.
    pub fn addresses(&self, host: &Domain) -> Result<Vec<IpAddr>, ResolveError> {
        let mut addresses = Vec::new();
        let mut failure = None;
        for kind in [Rtype::AAAA, Rtype::A] {
            match self.look_up(host, kind) {
                Ok(Answer::Records(records)) => addresses.extend(records.iter().filter_map(Record::address)),
                // Servers exist that say "no such name" of a name without AAAA (RFC 4074 section 4.2): ask for both.
                Ok(Answer::Nothing | Answer::NoName) => {}
                Err(unresolved) => failure = Some(unresolved),
            }
        }
        let mut seen = HashSet::new();
        addresses.retain(|address| is_unicast(*address) && seen.insert(*address));
        addresses.truncate(RESULT_LIMIT);
        match failure {
            // One half of the addresses is better than none.
            Some(unresolved) if addresses.is_empty() => Err(unresolved),
            _ => Ok(addresses),
        }
    }

    fn configured(text: &[u8], ids: &Ids) -> Resolver {
        // As other resolvers do: what cannot be read is passed over.
        let (configuration, errors) = resolv_conf::Config::parse_with_errors(text);
        for error in errors {
            debug!("{CONFIGURATION}: {error}");
        }
        let servers = configuration.get_nameservers_or_local();
        let servers = servers.iter().filter_map(|server| {
            // The system knows the number of the interface in "fe80::1%eth0"; no name is looked up here.
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
        }
    }

    fn hosts(&self, records: &[Record]) -> MxRoute {
        let exchanges = || records.iter().filter_map(Record::exchange);
        // RFC 7505 section 3. Beside other records "." is no null MX but a mistake, and no host either.
        if exchanges().all(|(_, name)| name.is_root()) {
            return MxRoute::Null;
        }
        let mut hops: Vec<MxHost> = exchanges()
            .filter_map(|(preference, name)| Some(MxHost { preference, host: Domain::parse(&name.to_string())? }))
            .collect();
        // RFC 5321 section 5.1: the lowest first, equals at random.
        hops.sort_by_cached_key(|hop| (hop.preference, self.ids.random_number()));
        let mut seen = HashSet::new();
        hops.retain(|hop| seen.insert(hop.host.clone()));
        hops.truncate(RESULT_LIMIT);
        MxRoute::Hosts(hops)
    }

    /// Follows aliases from answer to answer; never ends at one.
    fn look_up(&self, domain: &Domain, kind: Rtype) -> Result<Answer, ResolveError> {
        // SMTP allows a name two octets longer than DNS.
        let Ok(name) = Name::vec_from_str(domain.as_str()) else { return Ok(Answer::NoName) };
        let mut question = Question { name, kind, aliases: ALIAS_LIMIT };
        loop {
            match self.ask(&question) {
                Ok(RecordSet::Answer(answer)) => return Ok(answer),
                Ok(RecordSet::Alias { name, left }) => question = Question { name, kind, aliases: left },
                Err(text) => return Err(ResolveError(format!("{kind} records of {domain}: {text}"))),
            }
        }
    }

    /// Asks all servers in turn, and those that were silent again.
    fn ask(&self, question: &Question) -> Result<RecordSet, String> {
        let mut failures: Vec<Option<QueryError>> = self.servers.iter().map(|_| None).collect();
        for attempt in 0..self.attempts {
            for (server, failure) in self.servers.iter().zip(&mut failures) {
                if matches!(failure, Some(QueryError::Said(_))) {
                    continue;
                }
                // There are boxes in between that swallow what they do not know: the last try is a plain one.
                let edns = attempt == 0 || attempt + 1 < self.attempts;
                match self.ask_one(*server, question, edns) {
                    Ok(said) => return Ok(said),
                    Err(error) => *failure = Some(error),
                }
            }
        }
        let told = self.servers.iter().zip(failures).filter_map(|(server, failure)| match failure? {
            QueryError::Silent(error) => Some(format!("{server}: {error}")),
            QueryError::Said(text) => Some(format!("{server}: {text}")),
        });
        let told: Vec<String> = told.collect();
        Err(if told.is_empty() { "no name server is known".to_owned() } else { told.join("; ") })
    }

    /// Asks one server, at most once more each for two reasons: over TCP, without EDNS0.
    fn ask_one(&self, server: SocketAddr, question: &Question, edns: bool) -> Result<RecordSet, QueryError> {
        let (mut tcp, mut edns) = (false, edns);
        loop {
            let id = u16::from_le_bytes(self.octets());
            let query = question.message(id, edns)?;
            let read = |message: &[u8]| read(message, id, question);
            let reply = if tcp { self.over_tcp(server, &query, read)? } else { self.over_udp(server, &query, read)? };
            match reply {
                DnsReply::Said(said) => return Ok(said),
                // RFC 7766 section 5.
                DnsReply::Truncated if !tcp => tcp = true,
                DnsReply::Truncated => return Err(QueryError::Said("truncated over TCP".to_owned())),
                // RFC 6891 section 7.
                DnsReply::NotUnderstood(_) if edns => edns = false,
                DnsReply::NotUnderstood(code) => return Err(QueryError::Said(code.to_string())),
                DnsReply::Failure(text) => return Err(QueryError::Said(text)),
            }
        }
    }

    fn over_udp(
        &self,
        server: SocketAddr,
        query: &[u8],
        read: impl Fn(&[u8]) -> Option<DnsReply>,
    ) -> Result<DnsReply, QueryError> {
        let deadline = Instant::now() + self.timeout;
        let socket = self.socket(server)?;
        // From now on the system drops what comes from elsewhere, and says when nobody listens there.
        socket.connect(server)?;
        socket.send(query)?;
        let mut buffer = vec![0; MESSAGE_LIMIT];
        loop {
            let length = until(deadline, |left| {
                socket.set_read_timeout(Some(left))?;
                socket.recv(&mut buffer)
            })?;
            if let Some(reply) = buffer.get(..length).and_then(&read) {
                return Ok(reply);
            }
        }
    }

    fn over_tcp(
        &self,
        server: SocketAddr,
        query: &[u8],
        read: impl Fn(&[u8]) -> Option<DnsReply>,
    ) -> Result<DnsReply, QueryError> {
        let deadline = Instant::now() + self.timeout;
        let mut stream = TcpStream::connect_timeout(&server, self.timeout)?;
        // Length and message in one segment (RFC 7766 section 8). It fits into the empty buffer of the socket.
        let length = u16::try_from(query.len()).map_err(io::Error::other)?;
        stream.set_write_timeout(Some(self.timeout))?;
        stream.write_all(&[&length.to_be_bytes(), query].concat())?;
        loop {
            let mut length = [0; 2];
            receive(&mut stream, &mut length, deadline)?;
            let mut message = vec![0; u16::from_be_bytes(length).into()];
            receive(&mut stream, &mut message, deadline)?;
            if let Some(reply) = read(&message) {
                return Ok(reply);
            }
        }
    }

    /// A socket on a port nobody can guess (RFC 5452 section 9.2): not all systems choose them at random.
    fn socket(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        const FIRST: u16 = 16 * 1024;
        let any = match server {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        for _ in 0..4 {
            let port = FIRST + u16::from_le_bytes(self.octets()) % (u16::MAX - FIRST);
            if let Ok(socket) = UdpSocket::bind((any, port)) {
                return Ok(socket);
            }
        }
        UdpSocket::bind((any, 0))
    }

    fn octets(&self) -> [u8; 2] {
        let [first, second, ..] = self.ids.random_number().to_le_bytes();
        [first, second]
    }
}

/// Type and name, and how many more aliases may be followed.
struct Question {
    name: Name<Vec<u8>>,
    kind: Rtype,
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

/// The end of a question, on which one can rely.
#[derive(PartialEq, Debug)]
enum Answer {
    /// At least one, of the type asked for.
    Records(Vec<Record>),
    /// The name exists, but not with this type.
    Nothing,
    NoName,
}

#[derive(PartialEq, Debug)]
enum RecordSet {
    Answer(Answer),
    /// The server left it to us to ask for the target; so many more aliases may follow.
    Alias {
        name: Name<Vec<u8>>,
        left: usize,
    },
}

#[derive(Clone, PartialEq, Debug)]
enum Record {
    Exchange(u16, Name<Vec<u8>>),
    Address(IpAddr),
}

impl Record {
    fn exchange(&self) -> Option<(u16, &Name<Vec<u8>>)> {
        match self {
            Record::Exchange(preference, name) => Some((*preference, name)),
            Record::Address(_) => None,
        }
    }

    fn address(&self) -> Option<IpAddr> {
        match self {
            Record::Address(address) => Some(*address),
            Record::Exchange(..) => None,
        }
    }
}

/// What a message from the server is, if it belongs to our question.
#[derive(PartialEq, Debug)]
enum DnsReply {
    Said(RecordSet),
    Truncated,
    /// The server, or what pretends to be one, is older than EDNS0.
    NotUnderstood(OptRcode),
    Failure(String),
}

/// Why a server was of no use.
enum QueryError {
    /// No answer: it may be worth while to ask again.
    Silent(io::Error),
    /// An answer that will not be another one in a moment.
    Said(String),
}

impl From<io::Error> for QueryError {
    fn from(error: io::Error) -> QueryError {
        QueryError::Silent(error)
    }
}

impl From<PushError> for QueryError {
    fn from(error: PushError) -> QueryError {
        QueryError::Said(error.to_string())
    }
}

/// Judges a message. `None`: not the answer to this question (RFC 5452 section 9.1), wait for the real one.
fn read(message: &[u8], id: u16, question: &Question) -> Option<DnsReply> {
    let message = Message::from_octets(message).ok()?;
    let header = message.header();
    if !header.qr() || header.id() != id || header.opcode() != Opcode::QUERY {
        return None;
    }
    let code = message.opt_rcode();
    let not_understood = [OptRcode::FORMERR, OptRcode::NOTIMP, OptRcode::BADVERS].contains(&code);
    // Who did not understand the question cannot always repeat it.
    let excused = not_understood && message.header_counts().qdcount() == 0;
    if !excused && !repeats(&message, question) {
        return None;
    }
    Some(match code {
        _ if not_understood => DnsReply::NotUnderstood(code),
        _ if header.tc() => DnsReply::Truncated,
        OptRcode::NOERROR => match answer(&message, question) {
            Ok(Ok(said)) => DnsReply::Said(said),
            Ok(Err(text)) => DnsReply::Failure(text),
            Err(error) => DnsReply::Failure(format!("nonsense: {error}")),
        },
        // Said of the last name where there are aliases (RFC 6604 section 3).
        OptRcode::NXDOMAIN => DnsReply::Said(RecordSet::Answer(Answer::NoName)),
        other => DnsReply::Failure(other.to_string()),
    })
}

fn repeats(message: &Message<&[u8]>, question: &Question) -> bool {
    message.sole_question().is_ok_and(|asked| {
        asked.qname().name_eq(&question.name) && asked.qtype() == question.kind && asked.qclass() == Class::IN
    })
}

/// Reads the records and follows the aliases among them. The inner error is the server's fault, but not of form.
fn answer(message: &Message<&[u8]>, question: &Question) -> Result<Result<RecordSet, String>, ParseError> {
    let mut aliases = Vec::new();
    let mut records = Vec::new();
    for record in message.answer()? {
        let record = record?;
        if record.class() != Class::IN {
            continue;
        }
        if let Some(alias) = record.to_record::<Cname<ParsedName<&[u8]>>>()? {
            aliases.push((record.owner(), alias.into_data().into_cname()));
        } else if record.rtype() == question.kind
            && let Some(data) = data(&record)?
        {
            records.push((record.owner(), data));
        }
    }
    let mut name = question.name.to_name::<Vec<u8>>();
    for passed in 0..=question.aliases {
        let found = records.iter().filter(|(owner, _)| owner.name_eq(&name));
        let found: Vec<Record> = found.map(|(_, record)| record.clone()).collect();
        if !found.is_empty() {
            return Ok(Ok(RecordSet::Answer(Answer::Records(found))));
        }
        match aliases.iter().find(|(owner, _)| owner.name_eq(&name)) {
            Some((_, target)) => name = target.to_name(),
            None => return end(message, name, passed, question),
        }
    }
    Ok(Err(format!("more than {ALIAS_LIMIT} aliases, or a circle of them")))
}

/// What it means that there is no record at `name`, after so many aliases (RFC 2308 section 2.2).
fn end(
    message: &Message<&[u8]>,
    name: Name<Vec<u8>>,
    passed: usize,
    question: &Question,
) -> Result<Result<RecordSet, String>, ParseError> {
    let mut referral = false;
    for record in message.authority()? {
        match record?.rtype() {
            Rtype::SOA => return Ok(Ok(RecordSet::Answer(Answer::Nothing))),
            Rtype::NS => referral = true,
            _ => {}
        }
    }
    let header = message.header();
    if passed > 0 {
        Ok(Ok(RecordSet::Alias { name, left: question.aliases - passed }))
    } else if !header.aa() && (referral || !header.ra()) {
        Ok(Err("it does not answer, and does not ask others for us".to_owned()))
    } else {
        Ok(Ok(RecordSet::Answer(Answer::Nothing)))
    }
}

fn data(record: &ParsedRecord<&[u8]>) -> Result<Option<Record>, ParseError> {
    let record = match record.rtype() {
        Rtype::MX => record.to_record::<Mx<ParsedName<&[u8]>>>()?.map(|record| {
            let exchange = record.into_data();
            Record::Exchange(exchange.preference(), exchange.exchange().to_name())
        }),
        Rtype::A => record.to_record::<A>()?.map(|record| Record::Address(record.data().addr().into())),
        Rtype::AAAA => record.to_record::<Aaaa>()?.map(|record| Record::Address(record.data().addr().into())),
        _ => None,
    };
    Ok(record)
}

/// Whether it can be the address of one host (RFC 1122 section 3.2.1.3, RFC 4291 section 2). To connect to 0.0.0.0
/// or `::` is to connect to oneself.
fn is_unicast(address: IpAddr) -> bool {
    let broadcast = IpAddr::V4(Ipv4Addr::BROADCAST);
    // ::ffff:0.0.0.0 is the same in disguise.
    let address = address.to_canonical();
    !address.is_unspecified() && !address.is_multicast() && address != broadcast
}

/// Repeats an operation that waits no longer than it is told, until it has a result or `deadline` has passed.
fn until<T>(deadline: Instant, mut operation: impl FnMut(Duration) -> io::Result<T>) -> io::Result<T> {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(TimedOut, "no answer in time"));
        }
        match operation(left) {
            Err(error) if matches!(error.kind(), Interrupted | TimedOut | WouldBlock) => {}
            other => return other,
        }
    }
}

/// Fills `buffer` until `deadline`, however slowly the octets come.
fn receive(stream: &mut TcpStream, mut buffer: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        let length = until(deadline, |left| {
            stream.set_read_timeout(Some(left))?;
            stream.read(buffer)
        })?;
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
        }
        buffer = buffer.get_mut(length..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::base::iana::Rcode;
    use domain::base::message_builder::AnswerBuilder;
    use domain::base::{RecordData, Ttl, UnknownRecordData};
    use domain::rdata::{Ns, Soa};
    use proptest::prelude::*;
    use std::net::TcpListener;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::JoinHandle;

    /// The answers to the question `example.org MX` and what they mean.
    #[test]
    fn answers_mean_what_the_rfcs_say() {
        let mx = |names: &[(u16, &str)]| {
            let records = names.iter().map(|(preference, host)| Record::Exchange(*preference, name(host)));
            DnsReply::Said(RecordSet::Answer(Answer::Records(records.collect())))
        };
        let nothing = || DnsReply::Said(RecordSet::Answer(Answer::Nothing));
        let no_name = || DnsReply::Said(RecordSet::Answer(Answer::NoName));
        let alias = |target, left| DnsReply::Said(RecordSet::Alias { name: name(target), left });
        let circle = || DnsReply::Failure("more than 8 aliases, or a circle of them".to_owned());
        let useless = || DnsReply::Failure("it does not answer, and does not ask others for us".to_owned());

        let soa = "example.org SOA";
        check_reply("ok", &["example.org MX 10 a.example"], &[], mx(&[(10, "a.example")]));
        check_reply("ok", &["EXAMPLE.Org MX 1 A.example"], &[], mx(&[(1, "a.example")]));
        check_reply("ok", &["example.org MX 9 b", "example.org MX 1 a"], &[], mx(&[(9, "b"), (1, "a")]));
        check_reply("ok", &["example.org MX 0 ."], &[], mx(&[(0, ".")]));
        // Records of others, of another type or class are not for us.
        check_reply("ok", &["example.com MX 10 a"], &[], nothing());
        check_reply("ok", &["example.org A 192.0.2.1"], &[], nothing());
        check_reply("ok", &["example.org CH-MX 10 a"], &[], nothing());
        check_reply("ok", &["evil MX 1 evil", "example.org MX 2 a", "example.org TXT"], &[], mx(&[(2, "a")]));
        // RFC 1034 section 3.6.2, in any order of records.
        check_reply("ok", &["example.org CNAME a", "a CNAME b", "b MX 5 c"], &[], mx(&[(5, "c")]));
        check_reply("ok", &["b MX 5 c", "a CNAME b", "example.org CNAME a"], &[], mx(&[(5, "c")]));
        check_reply("ok", &["example.org CNAME a", "a CNAME b"], &[], alias("b", 6));
        check_reply("ok", &["example.org CNAME a"], &["a SOA"], nothing());
        check_reply("ok", &["example.org CNAME example.org"], &[], circle());
        check_reply("ok", &["example.org CNAME a", "a CNAME b", "b CNAME a"], &[], circle());
        let chain: Vec<String> = (0..9).map(|link| format!("n{link} CNAME n{}", link + 1)).collect();
        let mut chain: Vec<&str> = chain.iter().map(String::as_str).collect();
        chain[0] = "example.org CNAME n1";
        check_reply("ok", &chain, &[], circle());
        check_reply("ok", &chain[..8], &[], alias("n8", 0));
        chain[8] = "n8 MX 1 a";
        check_reply("ok", &chain, &[], mx(&[(1, "a")]));
        // RFC 2308 section 2.2: no data, in three forms, and a referral.
        check_reply("ok", &[], &[soa], nothing());
        check_reply("ok", &[], &[soa, "example.org NS a"], nothing());
        check_reply("ok", &[], &[], nothing());
        check_reply("aa", &[], &[], nothing());
        check_reply("ok", &[], &["org NS a"], useless());
        check_reply("lame", &[], &[], useless());
        check_reply("lame", &["example.org MX 10 a"], &[], mx(&[(10, "a")]));
        check_reply("nxdomain", &[], &[soa], no_name());
        check_reply("nxdomain", &["example.org CNAME a"], &[soa], no_name());
        check_reply("servfail", &[], &[], DnsReply::Failure("SERVFAIL".to_owned()));
        check_reply("refused", &[], &[], DnsReply::Failure("REFUSED".to_owned()));
        check_reply("truncated", &["example.org MX 10 a"], &[], DnsReply::Truncated);
        check_reply("formerr", &[], &[], DnsReply::NotUnderstood(OptRcode::FORMERR));
        check_reply("notimp", &[], &[], DnsReply::NotUnderstood(OptRcode::NOTIMP));
        check_reply("badvers", &[], &[], DnsReply::NotUnderstood(OptRcode::BADVERS));
        check_reply("cookie", &[], &[], DnsReply::Failure("BADCOOKIE".to_owned()));
    }

    #[track_caller]
    fn check_reply(how: &str, answer: &[&str], authority: &[&str], expected: DnsReply) {
        let question = question("example.org", Rtype::MX);
        let message = reply(&question.message(7, true).unwrap(), how, answer, authority);
        assert_eq!(read(&message, 7, &question), Some(expected), "{how} {answer:?} {authority:?}");
    }

    /// As name servers write it, with compressed names.
    const RECORDED: &[u8] = b"\x12\x34\x81\x80\0\x01\0\x02\0\0\0\x01\
        \x07example\x03org\0\0\x0f\0\x01\
        \xc0\x0c\0\x0f\0\x01\0\0\x0e\x10\0\x08\0\x14\x03mx2\xc0\x0c\
        \xc0\x0c\0\x0f\0\x01\0\0\x0e\x10\0\x08\0\x0a\x03mx1\xc0\x0c\
        \0\0\x29\x04\xd0\0\0\0\0\0\0";

    #[test]
    fn a_recorded_answer_is_read() {
        let records =
            vec![Record::Exchange(20, name("mx2.example.org")), Record::Exchange(10, name("mx1.example.org"))];
        let expected = DnsReply::Said(RecordSet::Answer(Answer::Records(records)));
        assert_eq!(read(RECORDED, 0x1234, &question("example.org", Rtype::MX)), Some(expected));
    }

    #[test]
    fn malformed_answers_are_nonsense() {
        let check = |from: &[u8], to: &[u8]| {
            let at = RECORDED.windows(from.len()).position(|window| window == from).unwrap();
            let message = [&RECORDED[..at], to, &RECORDED[at + from.len()..]].concat();
            let reply = read(&message, 0x1234, &question("example.org", Rtype::MX));
            assert!(
                matches!(&reply, Some(DnsReply::Failure(text)) if text.starts_with("nonsense")),
                "{to:?}: {reply:?}"
            );
        };
        check(b"\0\x01\0\x02\0\0\0\x01", b"\0\x01\xff\xff\0\0\0\x01"); // more records than there are
        check(b"\x03mx2\xc0\x0c", b"\x03mx2\xc0\x2e"); // a pointer that points to itself
        check(b"\x03mx2\xc0\x0c", b"\x03mx2\xff\xff"); // … out of the message
        check(b"\x03mx2\xc0\x0c", b"\x03mx2\xc0\x2a"); // … into its own name: for ever mx2.mx2.mx2
        check(b"\x03mx2\xc0\x0c", b"\x80mx2\xc0\x0c"); // a label type that does not exist
        check(b"\x03mx2\xc0\x0c", b"\x3fmx2\xc0\x0c"); // a label longer than its record
        check(b"\0\x08\0\x14", b"\0\x01\0\x14"); // a record too short for its data
        check(b"\0\x08\0\x14", b"\0\x09\0\x14"); // … too long
        check(b"\0\x08\0\x14", b"\xff\xff\0\x14"); // … longer than the message
        // Eight octets are an address of neither kind.
        for kind in [Rtype::A, Rtype::AAAA] {
            let [_, kind_octet] = kind.to_int().to_be_bytes();
            let mut message = RECORDED.to_vec();
            for at in [26, 32, 52] {
                message[at] = kind_octet;
            }
            let reply = read(&message, 0x1234, &question("example.org", kind));
            assert!(
                matches!(&reply, Some(DnsReply::Failure(text)) if text.starts_with("nonsense")),
                "{kind}: {reply:?}"
            );
        }
    }

    #[test]
    fn what_is_not_the_answer_to_this_question_is_none() {
        let asked = question("example.org", Rtype::MX);
        let query = asked.message(0x1234, true).unwrap();
        assert_eq!(read(&query, 0x1234, &asked), None, "the question itself");
        assert_eq!(read(RECORDED, 0x1235, &asked), None, "another id");
        assert_eq!(read(RECORDED, 0x1234, &question("example.com", Rtype::MX)), None, "another name");
        assert_eq!(read(RECORDED, 0x1234, &question("example.org", Rtype::A)), None, "another type");
        assert_eq!(read(&replace(RECORDED, b"\0\x0f\0\x01\xc0", b"\0\x0f\0\x03\xc0"), 0x1234, &asked), None, "class");
        assert_eq!(read(&replace(RECORDED, b"\x34\x81", b"\x34\xa9"), 0x1234, &asked), None, "another opcode");
        assert_eq!(read(b"\x12\x34\x81\x80\0\0\0\0\0\0\0\0", 0x1234, &asked), None, "no question");
        for length in 0..29 {
            assert_eq!(read(&RECORDED[..length], 0x1234, &asked), None, "only {length} octets");
        }
        // Only who says that it did not understand the question need not repeat it.
        let header = b"\x12\x34\x81\x81\0\0\0\0\0\0\0\0";
        assert_eq!(read(header, 0x1234, &asked), Some(DnsReply::NotUnderstood(OptRcode::FORMERR)));
    }

    proptest! {
        #[test]
        fn no_octets_harm(message: Vec<u8>, id: u16) {
            read(&message, id, &question("example.org", Rtype::MX));
        }

        #[test]
        fn no_octets_behind_the_question_harm(body: Vec<u8>, counts: [u8; 6], flags: u16) {
            for kind in [Rtype::MX, Rtype::A, Rtype::AAAA] {
                let asked = question("example.org", kind);
                let mut message = asked.message(7, false).unwrap();
                message[2..4].copy_from_slice(&(flags | 0x8000).to_be_bytes());
                message[6..12].copy_from_slice(&counts.map(|octet| octet & 3));
                message.extend_from_slice(&body);
                read(&message, 7, &asked);
            }
        }

        #[test]
        fn no_change_to_an_answer_harms(changes: Vec<(prop::sample::Index, u8)>, length in 0..RECORDED.len()) {
            let mut message = RECORDED.to_vec();
            for (index, octet) in changes {
                message[index.index(RECORDED.len())] = octet;
            }
            read(&message, 0x1234, &question("example.org", Rtype::MX));
            read(&message[..length], 0x1234, &question("example.org", Rtype::MX));
        }

        #[test]
        fn no_list_of_aliases_goes_on_for_ever(links: Vec<(u8, u8)>) {
            let answer: Vec<String> = links.iter().map(|(from, to)| format!("n{} CNAME n{}", from % 16, to % 16)).collect();
            let answer: Vec<&str> = answer.iter().map(String::as_str).collect();
            let asked = question("n0", Rtype::MX);
            let message = reply(&asked.message(7, true).unwrap(), "ok", &answer, &[]);
            prop_assert!(read(&message, 7, &asked).is_some());
        }
    }

    #[test]
    fn mail_goes_where_the_records_say() {
        let server = Fake::zone(&[
            "two.example MX 20 b.example",
            "two.example MX 10 A.example",
            "two.example MX 30 a.example",
            "equal.example MX 5 z",
            "equal.example MX 5 a",
            "null.example MX 0 .",
            "mixed.example MX 0 .",
            "mixed.example MX 1 a",
            "odd.example MX 1 under_score.example",
            "odd.example MX 2 sp\\032ace",
            "alias.example CNAME two.example",
            "far.example CNAME! alias.example",
            "circle.example CNAME! round.example",
            "round.example CNAME! circle.example",
            "v4.example A 192.0.2.1",
            "v6.example AAAA 2001:db8::1",
            "any.example A 0.0.0.0",
            "text.example TXT",
        ]);
        let resolver = server.resolver();
        let check = |name: &str, expected: MxRoute| assert_eq!(resolver.route(&host(name)), Ok(expected), "{name}");
        let hosts = |hops: &[(u16, &str)]| {
            MxRoute::Hosts(
                hops.iter().map(|(preference, name)| MxHost { preference: *preference, host: host(name) }).collect(),
            )
        };
        check("two.example", hosts(&[(10, "a.example"), (20, "b.example")]));
        check("equal.example", hosts(&[(5, "z"), (5, "a")])); // the numbers of `Stamps::fixed` count: no change
        check("null.example", MxRoute::Null);
        check("mixed.example", hosts(&[(1, "a")]));
        check("odd.example", hosts(&[]));
        check("alias.example", hosts(&[(10, "a.example"), (20, "b.example")]));
        check("far.example", hosts(&[(10, "a.example"), (20, "b.example")]));
        check("v4.example", MxRoute::Implicit);
        check("v6.example", MxRoute::Implicit);
        check("any.example", MxRoute::NoDomain);
        check("text.example", MxRoute::NoDomain);
        check("absent.example", MxRoute::NoDomain);
        let longest = [["a"; 63].concat(), ["b"; 63].concat(), ["c"; 63].concat(), ["d"; 63].concat()].join(".");
        check(&longest, MxRoute::NoDomain);
        let circle = resolver.route(&host("circle.example")).unwrap_err().0;
        assert!(circle.contains("circle.example") && circle.contains("aliases"), "{circle}");
    }

    #[test]
    fn equals_come_in_random_order() {
        let server = Fake::zone(&["e.example MX 5 a", "e.example MX 5 b", "e.example MX 5 c", "e.example MX 1 d"]);
        let resolver = Resolver::at(server.address, &Ids::system(crate::net::tls::random));
        let mut orders = HashSet::new();
        for _ in 0..100 {
            let Ok(MxRoute::Hosts(hops)) = resolver.route(&host("e.example")) else { panic!("no hosts") };
            orders.insert(hops.iter().map(|hop| hop.host.to_string()).collect::<String>());
        }
        assert_eq!(orders.len(), 6, "{orders:?}");
        assert!(orders.iter().all(|order| order.starts_with('d')));
    }

    #[test]
    fn addresses_of_both_kinds_are_found() {
        let server = Fake::zone(&[
            "both.example A 192.0.2.2",
            "both.example A 192.0.2.1",
            "both.example A 192.0.2.2",
            "both.example AAAA 2001:db8::1",
            "alias.example CNAME! both.example",
            "strange.example A 0.0.0.0",
            "strange.example A 224.0.0.1",
            "strange.example A 255.255.255.255",
            "strange.example AAAA ::",
            "strange.example AAAA ff02::1",
            "strange.example AAAA ::ffff:0.0.0.0",
            "strange.example A 127.0.0.1",
            "mail.example MX 1 a",
            "wrong.example A 192.0.2.3", // AAAA: NXDOMAIN
        ]);
        let resolver = server.resolver();
        let check = |name: &str, expected: &[&str]| {
            let found = resolver.addresses(&host(name)).unwrap();
            assert_eq!(found.iter().map(IpAddr::to_string).collect::<Vec<_>>(), expected, "{name}");
        };
        check("both.example", &["2001:db8::1", "192.0.2.2", "192.0.2.1"]);
        check("alias.example", &["2001:db8::1", "192.0.2.2", "192.0.2.1"]);
        check("strange.example", &["127.0.0.1"]);
        check("mail.example", &[]);
        check("wrong.example", &["192.0.2.3"]);
        check("absent.example", &[]);
    }

    #[test]
    fn half_of_the_addresses_is_better_than_none() {
        let server = Fake::start(|asked| {
            let how = if asked.kind() == Rtype::AAAA { "servfail" } else { "ok" };
            let answer = if asked.name() == "half.example" { &["half.example A 192.0.2.1"][..] } else { &[] };
            vec![reply(&asked.query, how, answer, &[])]
        });
        let resolver = server.resolver();
        assert_eq!(resolver.addresses(&host("half.example")).unwrap().len(), 1);
        assert!(resolver.addresses(&host("other.example")).is_err(), "the other half may exist");
        assert!(resolver.route(&host("other.example")).is_err());
    }

    #[test]
    fn a_truncated_answer_is_asked_for_again_over_tcp() {
        let many: Vec<String> = (0..1000).map(|n| format!("big.example MX {n} host-{n}.mail.big.example")).collect();
        let server = Fake::start(move |asked| {
            let many: Vec<&str> = many.iter().map(String::as_str).collect();
            let how = if asked.tcp { "ok" } else { "truncated" };
            let mut replies = vec![reply(&asked.query, how, if asked.tcp { &many } else { &many[..3] }, &[])];
            if asked.tcp {
                // Wrong ones are passed over here too.
                replies.splice(0..0, [Vec::new(), vec![1, 2, 3], reply(b"\0\0\x01\0\0\0\0\0\0\0\0\0", "ok", &[], &[])]);
            }
            replies
        });
        let Ok(MxRoute::Hosts(hops)) = server.resolver().route(&host("big.example")) else { panic!("no hosts") };
        assert_eq!(hops.len(), RESULT_LIMIT);
        assert_eq!(hops[99].host, host("host-99.mail.big.example"));
        assert_eq!(server.transports(), [false, true]);
    }

    #[test]
    fn truncated_over_tcp_or_no_tcp_is_no_answer() {
        let server = Fake::start(|asked| vec![reply(&asked.query, "truncated", &["t.example MX 1 a"], &[])]);
        let error = server.resolver().route(&host("t.example")).unwrap_err();
        assert!(error.0.contains("truncated over TCP"), "{error}");
        assert_eq!(server.transports(), [false, true]);

        let server =
            Fake::start(|asked| if asked.tcp { vec![] } else { vec![reply(&asked.query, "truncated", &[], &[])] });
        let error = server.resolver().route(&host("t.example")).unwrap_err();
        assert!(error.0.contains("closed the connection"), "{error}");
        assert_eq!(server.transports(), [false, true, false, true]);
    }

    #[test]
    fn forged_answers_are_passed_over() {
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = Fake::start(move |asked| {
            let true_answer = reply(&asked.query, "ok", &["f.example MX 1 good"], &[]);
            let forged = reply(&asked.query, "ok", &["f.example MX 1 evil"], &[]);
            stranger.send_to(&forged, asked.peer).unwrap();
            let mut other_id = forged.clone();
            other_id[0] ^= 1;
            let other_name = replace(&forged, b"\x01f\x07example", b"\x01g\x07example");
            vec![Vec::new(), asked.query.clone(), other_id, other_name, true_answer]
        });
        let expected = MxRoute::Hosts(vec![MxHost { preference: 1, host: host("good") }]);
        assert_eq!(server.resolver().route(&host("f.example")), Ok(expected));
    }

    #[test]
    fn a_flood_of_wrong_answers_does_not_outrun_the_deadline() {
        let server = Fake::start(|asked| {
            let mut forged = asked.query.clone();
            forged[0] ^= 1;
            vec![forged; 5000]
        });
        let mut resolver = server.resolver();
        resolver.timeout = Duration::from_millis(100);
        let start = Instant::now();
        let error = resolver.route(&host("flood.example")).unwrap_err();
        assert!(error.0.ends_with("no answer in time"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }

    #[test]
    fn a_trickle_over_tcp_does_not_outrun_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(b"\x10").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let mut resolver = Resolver::at(address, &Ids::fixed());
        resolver.timeout = Duration::from_millis(200);
        let start = Instant::now();
        assert!(matches!(resolver.over_tcp(address, b"query", |_| None), Err(QueryError::Silent(_))));
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }

    #[test]
    fn the_next_server_is_asked_and_the_silent_one_again() {
        let good = Fake::zone(&["n.example MX 1 a"]);
        let bad = Fake::start(|asked| vec![reply(&asked.query, "servfail", &[], &[])]);
        let silent = Fake::start(|_| vec![]);
        let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut resolver = good.resolver();
        resolver.timeout = Duration::from_millis(100);

        resolver.servers = vec![nobody, bad.address, silent.address, good.address].into();
        assert!(matches!(resolver.route(&host("n.example")), Ok(MxRoute::Hosts(_))));
        assert_eq!([bad.transports().len(), silent.transports().len()], [1, 1]);

        resolver.servers = vec![bad.address, silent.address].into();
        let error = resolver.route(&host("n.example")).unwrap_err().0;
        let expected = format!("{}: SERVFAIL; {}: no answer in time", bad.address, silent.address);
        assert_eq!(error, format!("MX records of n.example: {expected}"));
        assert_eq!([bad.transports().len(), silent.transports().len()], [2, 3]);

        resolver.servers = vec![].into();
        let error = resolver.route(&host("n.example")).unwrap_err().0;
        assert_eq!(error, "MX records of n.example: no name server is known");
    }

    #[test]
    fn servers_that_do_not_know_edns_are_asked_without() {
        for how in ["formerr", "notimp", "badvers", "silence"] {
            let server = Fake::start(move |asked| match (asked.has_edns(), how) {
                (true, "silence") => vec![],
                (true, _) => vec![reply(&asked.query, how, &[], &[])],
                (false, _) => vec![reply(&asked.query, "ok", &["old.example MX 1 a"], &[])],
            });
            let mut resolver = server.resolver();
            resolver.timeout = Duration::from_millis(200);
            assert!(matches!(resolver.route(&host("old.example")), Ok(MxRoute::Hosts(_))), "{how}");
        }
        let server = Fake::start(|asked| vec![reply(&asked.query, "notimp", &[], &[])]);
        let error = server.resolver().route(&host("old.example")).unwrap_err();
        assert!(error.0.ends_with("NOTIMP"), "{error}");
        assert_eq!(server.transports().len(), 2);
    }

    #[test]
    fn each_question_has_a_new_id_and_a_new_port() {
        let server = Fake::zone(&["i.example MX 1 a"]);
        let resolver = Resolver::at(server.address, &Ids::system(crate::net::tls::random));
        for _ in 0..20 {
            resolver.route(&host("i.example")).unwrap();
        }
        let seen = server.seen.lock().unwrap();
        let ids: HashSet<[u8; 2]> = seen.iter().map(|asked| [asked.query[0], asked.query[1]]).collect();
        let ports: HashSet<u16> = seen.iter().map(|asked| asked.peer.port()).collect();
        assert!(ids.len() > 15 && ports.len() > 15, "{} ids, {} ports", ids.len(), ports.len());
        assert!(seen.iter().all(|asked| asked.query[2] & 1 == 1 && asked.has_edns()), "recursion and EDNS0 are wanted");
    }

    #[test]
    fn the_question_is_written_as_name_servers_want_it() {
        let expected =
            b"\x12\x34\x01\0\0\x01\0\0\0\0\0\x01\x07example\x03org\0\0\x0f\0\x01\0\0\x29\x04\xd0\0\0\0\0\0\0";
        assert_eq!(question("example.org", Rtype::MX).message(0x1234, true).unwrap(), expected);
    }

    #[test]
    fn the_configuration_is_read() {
        let check = |text: &str, servers: &[&str], timeout: u64, attempts: u32| {
            let resolver = Resolver::configured(text.as_bytes(), &Ids::fixed());
            assert_eq!(resolver.servers.iter().map(SocketAddr::to_string).collect::<Vec<_>>(), servers, "{text}");
            assert_eq!((resolver.timeout.as_secs(), resolver.attempts), (timeout, attempts), "{text}");
        };
        check("", &["127.0.0.1:53", "[::1]:53"], 5, 2);
        check("nameserver 192.0.2.1\n", &["192.0.2.1:53"], 5, 2);
        check("nameserver 2001:db8::1\nnameserver fe80::1%3", &["[2001:db8::1]:53", "[fe80::1%3]:53"], 5, 2);
        check("# a\nnameserver 192.0.2.1\noptions timeout:2 attempts:3 edns0 trust-ad", &["192.0.2.1:53"], 2, 3);
        check("nameserver 192.0.2.1\noptions timeout:0 attempts:0", &["192.0.2.1:53"], 1, 1);
        check("nameserver 192.0.2.1\noptions timeout:99 attempts:99", &["192.0.2.1:53"], 30, 5);
        // What other resolvers do not know, we need not know either.
        check("family inet6\nnonsense\nnameserver x\nnameserver 192.0.2.1\noptions new:1", &["192.0.2.1:53"], 5, 2);
        let four = "nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nnameserver 192.0.2.4";
        check(four, &["192.0.2.1:53", "192.0.2.2:53", "192.0.2.3:53"], 5, 2);
    }

    fn name(text: &str) -> Name<Vec<u8>> {
        Name::vec_from_str(text).unwrap()
    }

    fn host(text: &str) -> Domain {
        Domain::parse(text).unwrap()
    }

    fn question(text: &str, kind: Rtype) -> Question {
        Question { name: name(text), kind, aliases: ALIAS_LIMIT }
    }

    fn replace(octets: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
        let at = octets.windows(from.len()).position(|window| window == from).unwrap();
        [&octets[..at], to, &octets[at + from.len()..]].concat()
    }

    /// The reply to a query. `how`: its code; or "aa" for an authoritative server, "lame" for one that is not and
    /// does not recurse. Records: "owner TYPE data", names without a final dot.
    fn reply(query: &[u8], how: &str, answer: &[&str], authority: &[&str]) -> Vec<u8> {
        let query = Message::from_octets(query).unwrap();
        let code = match how {
            "servfail" => Rcode::SERVFAIL,
            "nxdomain" => Rcode::NXDOMAIN,
            "refused" => Rcode::REFUSED,
            "formerr" => Rcode::FORMERR,
            "notimp" => Rcode::NOTIMP,
            _ => Rcode::NOERROR,
        };
        let mut message = MessageBuilder::new_vec().start_answer(&query, code).unwrap();
        message.header_mut().set_ra(how != "lame" && how != "aa");
        message.header_mut().set_aa(how == "aa");
        message.header_mut().set_tc(how == "truncated");
        for record in answer {
            push(&mut message, record);
        }
        let mut message = message.authority();
        for record in authority {
            let (owner, kind) = record.split_once(' ').unwrap();
            let name = name(owner);
            match kind.split(' ').next().unwrap() {
                "SOA" => {
                    let second = Ttl::from_secs(1);
                    let data = Soa::new(name.clone(), name.clone(), 1.into(), second, second, second, second);
                    message.push((name, second, data)).unwrap();
                }
                _ => message.push((name.clone(), Ttl::from_secs(1), Ns::new(name))).unwrap(),
            }
        }
        let mut message = message.additional();
        let extended = match how {
            "badvers" => Some(OptRcode::BADVERS),
            "cookie" => Some(OptRcode::BADCOOKIE),
            _ => None,
        };
        if let Some(code) = extended {
            let options = |options: &mut domain::base::message_builder::OptBuilder<Vec<u8>>| {
                options.set_rcode(code);
                Ok(())
            };
            message.opt(options).unwrap();
        }
        message.finish()
    }

    fn push(message: &mut AnswerBuilder<Vec<u8>>, record: &str) {
        let words: Vec<&str> = record.split(' ').collect();
        let owner = name(words[0]);
        match words[1..] {
            ["MX", preference, host] => add(message, owner, Mx::new(preference.parse().unwrap(), name(host))),
            ["CNAME" | "CNAME!", target] => add(message, owner, Cname::new(name(target))),
            ["A", address] => add(message, owner, A::new(address.parse().unwrap())),
            ["AAAA", address] => add(message, owner, Aaaa::new(address.parse().unwrap())),
            ["CH-MX", ..] => message.push((owner, Class::CH, Ttl::from_secs(1), Mx::new(1, name("a")))).unwrap(),
            _ => add(message, owner, UnknownRecordData::from_octets(Rtype::TXT, b"\x01x".as_slice()).unwrap()),
        }
    }

    fn add<D: RecordData + domain::base::rdata::ComposeRecordData>(
        message: &mut AnswerBuilder<Vec<u8>>,
        owner: impl ToName,
        data: D,
    ) {
        message.push((owner, Ttl::from_secs(3600), data)).unwrap();
    }

    /// A name server on loopback, over UDP and TCP.
    struct Fake {
        address: SocketAddr,
        seen: Arc<Mutex<Vec<Asked>>>,
        cancel: Arc<AtomicBool>,
        threads: Vec<JoinHandle<()>>,
    }

    #[derive(Clone)]
    struct Asked {
        query: Vec<u8>,
        tcp: bool,
        peer: SocketAddr,
    }

    impl Asked {
        fn name(&self) -> String {
            let message = Message::from_octets(self.query.as_slice()).unwrap();
            message.sole_question().unwrap().qname().to_string()
        }

        fn kind(&self) -> Rtype {
            Message::from_octets(self.query.as_slice()).unwrap().qtype().unwrap()
        }

        fn has_edns(&self) -> bool {
            let message = Message::from_octets(self.query.as_slice()).unwrap();
            message.opt().is_some_and(|options| options.udp_payload_size() == UDP_SIZE)
        }
    }

    impl Fake {
        /// Answers each query with these messages.
        fn start(replies: impl Fn(&Asked) -> Vec<Vec<u8>> + Send + Sync + 'static) -> Fake {
            let (udp, tcp) = Fake::sockets();
            let address = udp.local_addr().unwrap();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let cancel = Arc::new(AtomicBool::new(false));
            let replies = {
                let seen = seen.clone();
                Arc::new(move |asked: Asked| {
                    seen.lock().unwrap().push(asked.clone());
                    replies(&asked)
                })
            };
            let over_udp = {
                let (cancel, replies) = (cancel.clone(), replies.clone());
                std::thread::spawn(move || {
                    let mut buffer = [0; 1500];
                    loop {
                        let (length, peer) = udp.recv_from(&mut buffer).unwrap();
                        if cancel.load(Ordering::Relaxed) {
                            return;
                        }
                        for reply in replies(Asked { query: buffer[..length].to_vec(), tcp: false, peer }) {
                            let _ = udp.send_to(&reply, peer);
                        }
                    }
                })
            };
            let over_tcp = {
                let cancel = cancel.clone();
                std::thread::spawn(move || {
                    loop {
                        let (mut stream, peer) = tcp.accept().unwrap();
                        if cancel.load(Ordering::Relaxed) {
                            return;
                        }
                        let mut length = [0; 2];
                        stream.read_exact(&mut length).unwrap();
                        let mut query = vec![0; u16::from_be_bytes(length).into()];
                        stream.read_exact(&mut query).unwrap();
                        for reply in replies(Asked { query, tcp: true, peer }) {
                            let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
                            let _ = stream.write_all(&[&length, reply.as_slice()].concat());
                        }
                    }
                })
            };
            Fake { address, seen, cancel, threads: vec![over_udp, over_tcp] }
        }

        /// Answers like a recursive server that knows these records. "CNAME!": the target is left to the client.
        fn zone(records: &'static [&'static str]) -> Fake {
            Fake::start(move |asked| {
                let of = |name: &str| -> Vec<&str> {
                    records.iter().copied().filter(|record| record.split(' ').next() == Some(name)).collect()
                };
                let mut answer = of(&asked.name());
                let wrong = asked.name() == "wrong.example" && asked.kind() == Rtype::AAAA;
                let how = if answer.is_empty() || wrong { "nxdomain" } else { "ok" };
                let mut targets = Vec::new();
                for record in &answer {
                    if let Some((_, target)) = record.split_once(" CNAME ") {
                        targets.extend(of(target));
                    }
                }
                answer.extend(targets);
                let kind = format!(" {} ", asked.kind());
                answer.retain(|record| record.contains(&kind) || record.contains(" CNAME"));
                vec![reply(&asked.query, how, &answer, &[])]
            })
        }

        fn sockets() -> (UdpSocket, TcpListener) {
            loop {
                let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
                if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()) {
                    return (udp, tcp);
                }
            }
        }

        fn resolver(&self) -> Resolver {
            Resolver::at(self.address, &Ids::fixed())
        }

        /// How it was asked so far: whether over TCP.
        fn transports(&self) -> Vec<bool> {
            self.seen.lock().unwrap().iter().map(|asked| asked.tcp).collect()
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            self.cancel.store(true, Ordering::Relaxed);
            let waker = UdpSocket::bind("127.0.0.1:0").unwrap();
            waker.send_to(b"wake up", self.address).unwrap();
            drop(TcpStream::connect(self.address));
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
    }
}
