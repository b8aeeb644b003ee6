//! The SMTP server role: a line comes in, a [`Step`] goes out (RFC 5321, RFC 2645 section 5).
//!
//! One machine serves all three listeners; a [`Profile`] says which commands each of them has. What only
//! a party knows (accounts, mailboxes) it is asked through [`Host`]. The machine moves no octets: its
//! driver says the replies, reads content, starts TLS.
//!
//! ```text
//!            EHLO                  AUTH                    ATRN
//! greeted ─────────▶ introduced ─────────▶ authenticated ─────────▶ turned (turn.rs: another role)
//!                     │  ▲  MAIL RCPT DATA/BDAT  (25, and the customer after the turn)
//!                     └──┘
//! ```

use super::command::{Command, MailFrom, Notify, Recipient, ServerExtensions, Verb, announced_chunk_size};
use super::reply::Reply;
use crate::clock::Timestamp;
use crate::ids::Ids;
use crate::mail::address::{Domain, ForwardPath, Host as HostName, Mailbox};
use crate::sasl::{CredentialStore, ExchangeStep, Mechanism, ServerExchange};

/// So many refused recipients weigh as much as one bad command.
const REJECTIONS_PER_ERROR: usize = 20;

/// On which door this server stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerRole {
    /// Port 25 of the provider: the world brings mail for the customers.
    Inbound,
    /// Port 366 of the provider, before the turn: ATRN, and submission (RFC 6409) where mail is taken.
    Odmr,
    /// The customer's own users and programs hand in their mail.
    Submission,
    /// The customer after the turn.
    Customer,
}

/// What one listener offers, and how far it lets a client go.
#[derive(Clone)]
pub struct ServerOptions {
    pub role: ServerRole,
    pub hostname: String,
    /// Octets of one message, as SIZE counts them (RFC 1870).
    pub max_size: u64,
    /// Recipients of one transaction; 100 at least (RFC 5321 section 4.5.3.1.8).
    pub max_recipients: usize,
    /// Bad commands before the connection is closed with 421.
    pub max_errors: usize,
    /// Failed AUTH commands before the connection is closed; 3 at least (RFC 4954 section 9).
    pub max_auth_failures: usize,
    /// A certificate is there, so STARTTLS is offered.
    pub starttls: bool,
    /// AUTH is offered under TLS only.
    pub require_tls: bool,
    /// Delivery status notifications can be made and sent (RFC 3461).
    pub dsn: bool,
    pub mechanisms: Vec<Mechanism>,
    pub ids: Ids,
}

impl ServerOptions {
    /// The command table of each listener (RFC 2645 section 5.4: port 366 need not have more).
    fn implements(&self, verb: Verb) -> bool {
        use Verb::*;
        match verb {
            Ehlo | Helo | Rset | Noop | Help | Quit => true,
            Mail | Rcpt | Data | Bdat => true,
            Vrfy => self.role != ServerRole::Odmr,
            StartTls => self.starttls && matches!(self.role, ServerRole::Inbound | ServerRole::Odmr),
            Auth | Atrn => self.role == ServerRole::Odmr,
            Etrn | Expn | Turn | Unknown | Http => false,
        }
    }

    fn offers(&self) -> ServerExtensions {
        let auth = self.role == ServerRole::Odmr;
        ServerExtensions { size: true, eight_bit: true, utf8: true, auth, dsn: self.dsn }
    }
}

/// What the party behind the listener is asked.
pub trait ServerHandler: CredentialStore {
    /// May mail of this sender and size come in now? `account`: who has authenticated.
    fn sender(&mut self, mail: &MailFrom, account: Option<&str>) -> Result<(), Reply>;
    /// Which mailbox is meant, and may mail for it come in? `notify` and `original`: what its sender wants to know
    /// (RFC 3461).
    fn recipient(&mut self, path: &ForwardPath, notify: &Notify, original: Option<&str>) -> Result<Mailbox, Reply>;
    /// Octets of one message, where it may be less than the listener says.
    fn size_limit(&self, _account: Option<&str>) -> u64 {
        u64::MAX
    }
}

/// What the driver does next.
#[derive(Debug)]
pub enum ServerStep_ {
    /// Say it and read the next line.
    Reply(Reply),
    /// Say it and close.
    Close(Reply),
    /// Say it, start TLS, then call [`Server::secured`].
    StartTls(Reply),
    /// Say it, read content up to its end, then call [`Server::done`].
    Data(Reply),
    /// Read this many octets; refused ones are thrown away and the reply said. Otherwise they are content:
    /// call [`Server::done`] behind the last chunk, [`Server::chunk_refused`] when one cannot be taken.
    Chunk { size: u64, last: bool, refused: Option<Reply> },
    /// ATRN, permitted by the protocol: the party looks at the domains.
    Atrn(Vec<Domain>),
}

/// A mail transaction under way: the envelope so far.
#[derive(Clone, Debug)]
pub struct Transaction {
    pub mail: MailFrom,
    pub recipients: Vec<Recipient>,
    /// Octets its content may have.
    limit: u64,
    /// BDAT has begun (RFC 3030 section 2): octets so far.
    chunked: Option<u64>,
    /// A chunk was refused: only RSET helps.
    failed: bool,
}

/// The server role on one connection.
pub struct Server {
    options: ServerOptions,
    hello: Option<Hello>,
    tls: bool,
    account: Option<String>,
    exchange: Option<Box<dyn ServerExchange>>,
    transaction: Option<Transaction>,
    errors: usize,
    rejections: usize,
    auth_failures: usize,
}

struct Hello {
    name: String,
    extended: bool,
}

fn sequence(text: &'static str) -> Reply {
    Reply::new(503, "5.5.1", text)
}

impl Server {
    /// `tls`: the connection began with TLS, or keeps it over the turn.
    pub fn new(profile: ServerOptions, tls: bool) -> Server {
        Server {
            options: profile,
            hello: None,
            tls,
            account: None,
            exchange: None,
            transaction: None,
            errors: 0,
            rejections: 0,
            auth_failures: 0,
        }
    }

    /// The first line of all (RFC 5321 section 4.3.1; the words are those of RFC 2645 section 6).
    pub fn greeting(&self) -> Reply {
        let words = match self.options.role {
            ServerRole::Inbound => "ESMTP mail for the domains held here",
            ServerRole::Odmr => "on-demand mail relay server ready",
            ServerRole::Customer => "ready to receive email",
            ServerRole::Submission => "ESMTP mail of this host's users",
        };
        Reply::bare(220, format!("{} {words}", self.options.hostname))
    }

    pub fn hostname(&self) -> &str {
        &self.options.hostname
    }

    /// Octets that the message under way may have.
    pub fn max_size(&self) -> u64 {
        self.transaction.as_ref().map_or(self.options.max_size, |transaction| transaction.limit)
    }

    /// The authenticated account.
    pub fn account(&self) -> Option<&str> {
        self.account.as_deref()
    }

    /// The name the client gave with EHLO or HELO.
    pub fn client_name(&self) -> Option<&str> {
        self.hello.as_ref().map(|hello| hello.name.as_str())
    }

    pub fn transaction(&self) -> Option<&Transaction> {
        self.transaction.as_ref()
    }

    /// Whether clients authenticate here.
    pub fn offers_auth(&self) -> bool {
        self.options.implements(Verb::Auth)
    }

    /// Whether the next line is part of an AUTH exchange, and not for any log.
    pub fn in_auth(&self) -> bool {
        self.exchange.is_some()
    }

    /// One line without its CRLF.
    pub fn line(&mut self, line: &[u8], host: &mut dyn ServerHandler) -> ServerStep_ {
        let step = match self.exchange.take() {
            Some(exchange) => self.auth_response(exchange, line, host),
            None => self.command(line, host).unwrap_or_else(ServerStep_::Reply),
        };
        self.count_errors(step)
    }

    /// A line longer than any command may be (RFC 5321 section 4.5.3.1.9, RFC 4954 section 4).
    pub fn line_too_long(&mut self) -> ServerStep_ {
        let reply = match self.exchange.take() {
            Some(_) => Reply::new(500, "5.5.6", "Authentication exchange line is too long"),
            None => Reply::new(500, "5.5.2", "Line is too long"),
        };
        self.count_errors(ServerStep_::Reply(reply))
    }

    /// TLS has begun: everything said before is forgotten (RFC 3207 section 4.2).
    pub fn tls_started(&mut self) {
        *self = Server::new(self.options.clone(), true);
    }

    /// The content has been dealt with, taken or refused: the transaction is over.
    pub fn end_transaction(&mut self) {
        self.transaction = None;
        self.errors = 0;
    }

    /// A chunk could not be taken: nothing but RSET helps this transaction (RFC 3030 section 2).
    pub fn chunk_rejected(&mut self, last: bool) {
        match &mut self.transaction {
            Some(transaction) if !last => transaction.failed = true,
            _ => self.transaction = None,
        }
    }

    /// The `Received` field for the transaction, LF line ends (RFC 5321 section 4.4, RFC 3848).
    /// `peer`: the client's address as a literal; `secure`: TLS version and cipher.
    pub fn received(&self, peer: &str, secure: Option<&str>, id: &str, date: Timestamp) -> String {
        let utf8 = self.transaction.as_ref().is_some_and(|transaction| transaction.mail.utf8);
        let (name, extended) = match &self.hello {
            // A name that is no name would break the field's grammar.
            Some(hello) if HostName::parse(&hello.name).is_some() => (hello.name.as_str(), hello.extended),
            Some(hello) => ("unknown", hello.extended),
            None => ("unknown", false),
        };
        let protocol = match (utf8, extended) {
            (true, _) => "UTF8SMTP",
            (false, true) => "ESMTP",
            (false, false) => "SMTP",
        };
        // The letters are defined for ESMTP only; after a turn there is no A: the provider, who is the
        // SMTP client then, has not authenticated (RFC 3848, RFC 4954 section 7).
        let s = if self.tls && protocol != "SMTP" { "S" } else { "" };
        let a = if self.account.is_some() && protocol != "SMTP" { "A" } else { "" };
        let tls = secure.map_or(String::new(), |secure| format!(" ({secure})"));
        // With more recipients than one their names are not for each other's eyes (section 7.6).
        let recipient = match self.transaction.as_ref().map(|transaction| transaction.recipients.as_slice()) {
            Some([one]) if one.mailbox.is_ascii() || utf8 => format!(" for <{}>", one.mailbox),
            _ => String::new(),
        };
        format!(
            "Received: from {name} ({peer})\n\tby {} with {protocol}{s}{a}{tls}\n\tid {id}{recipient};\n\t{}\n",
            self.options.hostname,
            date.rfc5322()
        )
    }

    fn command(&mut self, line: &[u8], host: &mut dyn ServerHandler) -> Result<ServerStep_, Reply> {
        let (verb, rest) = Verb::of(line)?;
        if verb == Verb::Http {
            return Ok(ServerStep_::Close(Reply::new(421, "4.7.0", "This is SMTP, not HTTP")));
        }
        if !self.options.implements(verb) {
            return Err(match verb {
                // RFC 2645 section 5.4: on port 366 everything else is 502.
                Verb::Unknown if self.options.role != ServerRole::Odmr => {
                    Reply::new(500, "5.5.1", "Command not recognised")
                }
                _ => Reply::new(502, "5.5.1", "Command not implemented here"),
            });
        }
        if verb == Verb::Bdat {
            return self.chunk(rest);
        }
        self.permitted(verb)?;
        match Command::parse(verb, rest, self.options.offers())? {
            Command::Ehlo(name) => Ok(ServerStep_::Reply(self.ehlo(name))),
            Command::Helo(name) => Ok(ServerStep_::Reply(self.helo(name))),
            Command::Mail(mail) => self.mail(mail, host),
            Command::Rcpt { path, utf8, notify, original } => self.rcpt(&path, utf8, notify, original, host),
            Command::Data => Ok(ServerStep_::Data(Reply::bare(354, "Go ahead, end with <CRLF>.<CRLF>"))),
            Command::Rset => {
                self.transaction = None;
                Ok(ServerStep_::Reply(Reply::new(250, "2.0.0", "OK")))
            }
            Command::Noop => Ok(ServerStep_::Reply(Reply::new(250, "2.0.0", "OK"))),
            Command::Help => Ok(ServerStep_::Reply(self.help())),
            // RFC 5321 section 3.5.3: 250 only for what was verified.
            Command::Vrfy => Ok(ServerStep_::Reply(Reply::new(252, "2.0.0", "Send the mail and see"))),
            Command::Quit => {
                let text = format!("{} closing connection", self.options.hostname);
                Ok(ServerStep_::Close(Reply::new(221, "2.0.0", text)))
            }
            Command::StartTls => Ok(ServerStep_::StartTls(Reply::new(220, "2.0.0", "Go ahead"))),
            Command::Auth { mechanism, initial } => self.auth(&mechanism, initial, host),
            Command::Atrn(domains) => Ok(ServerStep_::Atrn(domains)),
            Command::Bdat { .. } | Command::Other => Err(Reply::new(502, "5.5.1", "Command not implemented here")),
        }
    }

    /// Whether the command may be said now: before its argument is looked at.
    fn permitted(&self, verb: Verb) -> Result<(), Reply> {
        let extended = self.hello.as_ref().is_some_and(|hello| hello.extended);
        let no_tls = self.options.require_tls && !self.tls;
        let sequence = |good: bool, text| if good { Ok(()) } else { Err(sequence(text)) };
        let odmr = self.options.role == ServerRole::Odmr;
        match verb {
            // RFC 3207 section 4: TLS is required for all that follows.
            Verb::Auth | Verb::Atrn | Verb::Mail | Verb::Rcpt | Verb::Data | Verb::Bdat if odmr && no_tls => {
                Err(Reply::new(530, "5.7.0", "TLS is required here: say STARTTLS first"))
            }
            // RFC 2645 section 5.2.1; RFC 6409 section 4.3.
            Verb::Atrn | Verb::Mail | Verb::Rcpt | Verb::Data | Verb::Bdat if odmr && self.account.is_none() => {
                Err(Reply::new(530, "5.7.0", "Authentication required"))
            }
            Verb::Auth => {
                sequence(extended, "Say EHLO first")?;
                sequence(self.account.is_none(), "You are authenticated already")
            }
            Verb::Atrn => {
                sequence(extended, "Say EHLO first")?;
                sequence(self.transaction.is_none(), "A mail transaction is open: end it first")
            }
            Verb::StartTls => {
                sequence(!self.tls, "TLS is active already")?;
                sequence(self.account.is_none(), "Too late: you are authenticated")?;
                sequence(extended, "Say EHLO first")
            }
            Verb::Mail => {
                sequence(self.hello.is_some(), "Say EHLO first")?;
                sequence(self.transaction.is_none(), "A mail transaction is open: RSET ends it")
            }
            Verb::Rcpt | Verb::Data => match &self.transaction {
                None => Err(self::sequence("Say MAIL first")),
                Some(transaction) if transaction.failed || transaction.chunked.is_some() => {
                    Err(self::sequence("BDAT has begun: go on with it, or say RSET"))
                }
                Some(transaction) if verb == Verb::Data && transaction.recipients.is_empty() => {
                    Err(self::sequence("No recipient was accepted"))
                }
                Some(_) => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn ehlo(&mut self, name: String) -> Reply {
        self.hello = Some(Hello { name, extended: true });
        // RFC 5321 section 4.1.4: EHLO resets as RSET does; authentication and TLS stay.
        self.transaction = None;
        let profile = &self.options;
        let mut reply = Reply::bare(250, profile.hostname.clone());
        let mechanisms: Vec<_> = self.mechanisms().map(|mechanism| mechanism.name()).collect();
        reply = reply
            .with_line("PIPELINING")
            .with_line(format!("SIZE {}", profile.max_size))
            .with_line("8BITMIME")
            .with_line("SMTPUTF8")
            .with_line("ENHANCEDSTATUSCODES")
            .with_line("CHUNKING");
        if profile.dsn {
            reply = reply.with_line("DSN");
        }
        if !mechanisms.is_empty() {
            reply = reply.with_line(format!("AUTH {}", mechanisms.join(" ")));
        }
        // RFC 3207 section 4.2: never under TLS.
        if profile.implements(Verb::StartTls) && !self.tls {
            reply = reply.with_line("STARTTLS");
        }
        if profile.role == ServerRole::Odmr {
            reply = reply.with_line("ATRN");
        }
        reply
    }

    fn helo(&mut self, name: String) -> Reply {
        self.hello = Some(Hello { name, extended: false });
        self.transaction = None;
        Reply::bare(250, self.options.hostname.clone())
    }

    /// The mechanisms that may be used now (RFC 4954 section 4: plain text under TLS only).
    fn mechanisms(&self) -> impl Iterator<Item = Mechanism> {
        let offered = self.options.role == ServerRole::Odmr && (self.tls || !self.options.require_tls);
        let tls = self.tls;
        self.options.mechanisms.iter().copied().filter(move |mechanism| offered && (tls || !mechanism.needs_tls()))
    }

    fn mail(&mut self, mail: MailFrom, host: &mut dyn ServerHandler) -> Result<ServerStep_, Reply> {
        let account = self.account.as_deref();
        let limit = self.options.max_size.min(host.size_limit(account));
        if mail.size.is_some_and(|size| size > limit) {
            return Err(message_too_large(limit));
        }
        host.sender(&mail, account)?;
        self.transaction = Some(Transaction { mail, recipients: Vec::new(), limit, chunked: None, failed: false });
        Ok(ServerStep_::Reply(Reply::new(250, "2.1.0", "OK")))
    }

    fn rcpt(
        &mut self,
        path: &ForwardPath,
        utf8: bool,
        notify: Notify,
        original: Option<String>,
        host: &mut dyn ServerHandler,
    ) -> Result<ServerStep_, Reply> {
        let limit = self.options.max_recipients;
        let Some(transaction) = &mut self.transaction else {
            return Err(sequence("Say MAIL first"));
        };
        if transaction.recipients.len() >= limit {
            return Err(Reply::new(452, "4.5.3", "Too many recipients: send the rest in another transaction"));
        }
        if utf8 && !transaction.mail.utf8 {
            return Err(Reply::new(553, "5.6.7", "A UTF-8 address needs the SMTPUTF8 parameter"));
        }
        let mailbox = host.recipient(path, &notify, original.as_deref())?;
        if !transaction.recipients.iter().any(|recipient| recipient.mailbox == mailbox) {
            transaction.recipients.push(Recipient { mailbox, notify, original });
        }
        Ok(ServerStep_::Reply(Reply::new(250, "2.1.5", "OK, recipient accepted")))
    }

    /// BDAT: whatever is wrong, the octets it announces follow, and are read away (RFC 3030 section 2).
    fn chunk(&mut self, rest: &[u8]) -> Result<ServerStep_, Reply> {
        let (size, last) = match Command::parse(Verb::Bdat, rest, self.options.offers()) {
            Ok(Command::Bdat { size, last }) => (size, last),
            Ok(_) => return Err(sequence("Say BDAT")),
            Err(reply) => match announced_chunk_size(rest) {
                Some(size) => return Ok(self.reject_chunk(size, false, reply)),
                None => return Err(reply),
            },
        };
        let limit = self.max_size();
        let permitted = self.permitted(Verb::Bdat);
        let refusal = match &mut self.transaction {
            _ if permitted.is_err() => permitted.err(),
            None => Some(sequence("Say MAIL first")),
            Some(transaction) if transaction.failed => Some(sequence("A chunk was refused: say RSET")),
            Some(transaction) if transaction.recipients.is_empty() => Some(sequence("No recipient was accepted")),
            Some(transaction) => {
                let octets = transaction.chunked.unwrap_or(0).saturating_add(size);
                transaction.chunked = Some(octets);
                (octets > limit).then(|| message_too_large(limit))
            }
        };
        Ok(match refusal {
            None => ServerStep_::Chunk { size, last, refused: None },
            Some(reply) => self.reject_chunk(size, last, reply),
        })
    }

    fn reject_chunk(&mut self, size: u64, last: bool, reply: Reply) -> ServerStep_ {
        self.chunk_rejected(last);
        // To read away what no message may be long is not asked of anybody.
        if size > self.options.max_size.saturating_mul(2).max(1 << 26) {
            return ServerStep_::Close(reply);
        }
        ServerStep_::Chunk { size, last, refused: Some(reply) }
    }

    fn auth(
        &mut self,
        name: &[u8],
        initial: Option<Vec<u8>>,
        host: &mut dyn ServerHandler,
    ) -> Result<ServerStep_, Reply> {
        if self.auth_failures >= self.options.max_auth_failures {
            return Ok(ServerStep_::Close(Reply::new(421, "4.7.0", "Too many failed authentications")));
        }
        let wanted = Mechanism::parse(name);
        let Some(mechanism) = self.mechanisms().find(|mechanism| Some(*mechanism) == wanted) else {
            return Err(Reply::new(504, "5.5.4", "That authentication mechanism is not offered here"));
        };
        let challenge = self.options.ids.challenge(&self.options.hostname);
        let mut exchange = mechanism.server(challenge);
        match (exchange.first(), initial) {
            (Some(_), Some(_)) => {
                // RFC 4954 section 4: the server speaks first in this mechanism.
                Err(Reply::new(501, "5.7.0", "This mechanism takes no initial response"))
            }
            (Some(challenge), None) => Ok(self.challenge(exchange, &challenge)),
            (None, None) => Ok(self.challenge(exchange, b"")),
            // RFC 4954 section 4: "=" is a response of no length.
            (None, Some(initial)) if initial == b"=" => Ok(self.auth_step(exchange, b"", host)),
            (None, Some(initial)) => Ok(self.auth_response(exchange, &initial, host)),
        }
    }

    /// A client's line inside an exchange: base64, or `*` (RFC 4954 section 4).
    fn auth_response(
        &mut self,
        exchange: Box<dyn ServerExchange>,
        line: &[u8],
        host: &mut dyn ServerHandler,
    ) -> ServerStep_ {
        if line == b"*" {
            return ServerStep_::Reply(Reply::new(501, "5.7.0", "Authentication cancelled"));
        }
        match data_encoding::BASE64.decode(line) {
            Ok(response) => self.auth_step(exchange, &response, host),
            Err(_) => ServerStep_::Reply(Reply::new(501, "5.5.2", "That is not base64")),
        }
    }

    fn auth_step(
        &mut self,
        mut exchange: Box<dyn ServerExchange>,
        response: &[u8],
        host: &mut dyn ServerHandler,
    ) -> ServerStep_ {
        ServerStep_::Reply(match exchange.step(response, host) {
            ExchangeStep::Challenge(challenge) => return self.challenge(exchange, &challenge),
            ExchangeStep::Done(account) => {
                let reply = Reply::new(235, "2.7.0", format!("now authenticated as {account}"));
                self.account = Some(account);
                reply
            }
            ExchangeStep::Failed => {
                self.auth_failures += 1;
                Reply::new(535, "5.7.8", "Authentication credentials invalid")
            }
            ExchangeStep::Malformed => Reply::new(501, "5.5.2", "The response is not what this mechanism asks for"),
            ExchangeStep::Unavailable => Reply::new(454, "4.7.0", "Accounts cannot be looked up now, try again later"),
        })
    }

    fn challenge(&mut self, exchange: Box<dyn ServerExchange>, challenge: &[u8]) -> ServerStep_ {
        self.exchange = Some(exchange);
        ServerStep_::Reply(Reply::bare(334, data_encoding::BASE64.encode(challenge)))
    }

    fn help(&self) -> Reply {
        use Verb::*;
        let all = [
            (Ehlo, "EHLO"),
            (Helo, "HELO"),
            (StartTls, "STARTTLS"),
            (Auth, "AUTH"),
            (Atrn, "ATRN"),
            (Mail, "MAIL"),
            (Rcpt, "RCPT"),
            (Data, "DATA"),
            (Bdat, "BDAT"),
            (Rset, "RSET"),
            (Noop, "NOOP"),
            (Vrfy, "VRFY"),
            (Help, "HELP"),
            (Quit, "QUIT"),
        ];
        let words: Vec<_> =
            all.iter().filter(|(verb, _)| self.options.implements(*verb)).map(|(_, word)| *word).collect();
        Reply::new(214, "2.0.0", format!("Commands: {}", words.join(" "))).with_line("See RFC 5321 and RFC 2645")
    }

    /// Bad commands are patiently answered, but not for ever.
    fn count_errors(&mut self, step: ServerStep_) -> ServerStep_ {
        let reply = match &step {
            ServerStep_::Reply(reply) => reply,
            ServerStep_::Chunk { refused: Some(reply), .. } => reply,
            _ => return step,
        };
        match reply.code() {
            500..=502 | 504 | 555 => self.errors += 1,
            // Recipients that are not here may be honest mistakes, and behind a MAIL that was refused the rest of
            // its group gets 503; thousands of them are not.
            503 | 550 | 551 | 553 => self.rejections += 1,
            _ => return step,
        }
        let limit = self.options.max_errors;
        if self.errors >= limit || self.rejections >= limit.saturating_mul(REJECTIONS_PER_ERROR) {
            return ServerStep_::Close(Reply::new(421, "4.7.0", "Too many errors"));
        }
        step
    }
}

/// RFC 1870 section 6.2.
pub fn message_too_large(limit: u64) -> Reply {
    Reply::new(552, "5.3.4", format!("The message is larger than {limit} octets"))
}
