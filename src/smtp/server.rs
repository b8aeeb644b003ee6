//! The SMTP server role: a line comes in, a [`ServerStep`] goes out (RFC 5321, RFC 2645 section 5).
//!
//! One machine serves all listeners; [`ServerOptions`] says which commands each of them has. What depends on accounts,
//! mailboxes and queues it asks its [`SessionHandler`]. The machine moves no octets: its driver (`session/server`)
//! sends the replies, reads content, starts TLS.
//!
//! ```text
//!            EHLO                  AUTH                    ATRN
//! greeted ─────────▶ introduced ─────────▶ authenticated ─────────▶ turned (turn.rs: another role)
//!                     │  ▲  MAIL RCPT DATA/BDAT  (port 25, and the customer after the turn)
//!                     └──┘
//! ```

use super::command::{Command, Envelope, MailFrom, Notify, Recipient, Verb, announced_chunk_size};
use super::extensions::ServerExtensions;
use super::limits;
use super::reply::Reply;
use crate::mail::address::{Domain, ForwardPath, Mailbox};
use crate::mail::received::Received;
use crate::sasl::{CredentialStore, ExchangeStep, Mechanism, NoCredentials, ServerExchange};

/// Which listener the server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerRole {
    /// Port 25 of the provider: the world sends mail for the customers.
    Inbound,
    /// Port 366 of the provider, before the turn: ATRN, and submission (RFC 6409).
    Odmr,
    /// The customer's own users and programs submit mail.
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

/// What a session asks the party that it serves for.
pub trait SessionHandler {
    /// The accounts that may authenticate. A listener without AUTH has none.
    fn credentials(&self) -> &dyn CredentialStore {
        &NoCredentials
    }

    /// Whether a message with this sender and size is accepted now. `account`: the client has authenticated as that.
    ///
    /// # Errors
    /// The reply to MAIL.
    fn sender(&mut self, mail: &MailFrom, account: Option<&str>) -> Result<(), Reply>;

    /// The mailbox that a path means, if mail for it is accepted. `notify` and `original`: NOTIFY and ORCPT (RFC 3461).
    ///
    /// # Errors
    /// The reply to RCPT.
    fn recipient(&mut self, path: &ForwardPath, notify: &Notify, original: Option<&str>) -> Result<Mailbox, Reply>;

    /// Octets of one message, if an account may send less than the listener accepts.
    fn size_limit(&self, _account: Option<&str>) -> u64 {
        u64::MAX
    }

    /// Whether an answer may take long, as a next hop is asked first. Then the replies so far are sent before.
    fn may_wait(&self) -> bool {
        false
    }

    /// Begins to receive the content of a transaction.
    ///
    /// # Errors
    /// The reply to DATA or BDAT.
    fn receive(&mut self, envelope: &Envelope, received: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply>;
}

/// What is known of a message before its content.
#[derive(Clone, Debug)]
pub struct Incoming<'a> {
    /// The id of the session in the log.
    pub session: &'a str,
    pub received: Received<'a>,
    /// Octets that the client has announced with SIZE (RFC 1870).
    pub size: Option<u64>,
}

/// Where the content of one message goes. Dropped before its commit it leaves nothing.
pub trait MessageSink: Send {
    /// Content with LF line ends.
    ///
    /// # Errors
    /// The reply to the content; no more of it is written then.
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply>;

    /// Makes the message durable, and returns its id: only then may it be answered with 250.
    ///
    /// # Errors
    /// The reply to the content: the client keeps the message.
    fn commit(self: Box<Self>) -> Result<String, Reply>;
}

/// What the driver does next.
#[derive(Debug)]
pub enum ServerStep {
    /// Send it and read the next line.
    Reply(Reply),
    /// Send it and close.
    Close(Reply),
    /// Send it, start TLS, then call [`Server::tls_started`].
    StartTls(Reply),
    /// Send it, read content up to its end, then call [`Server::end_transaction`].
    Data(Reply),
    /// Read `size` octets. Rejected ones are discarded, then the reply is sent. Otherwise they are content: call
    /// [`Server::end_transaction`] after the last chunk, [`Server::chunk_rejected`] if one cannot be stored.
    Chunk { size: u64, last: bool, rejected: Option<Reply> },
    /// ATRN, in a state that permits it: the provider looks at the domains.
    Atrn(Vec<Domain>),
}

/// A mail transaction under way: the envelope so far.
#[derive(Clone, Debug)]
pub struct Transaction {
    pub envelope: Envelope,
    /// Octets that the client has announced with SIZE.
    pub size: Option<u64>,
    /// Octets that its content may have.
    limit: u64,
    /// BDAT has begun (RFC 3030 section 2): octets so far.
    chunked: Option<u64>,
    /// A chunk was rejected: only RSET helps.
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
    auth_attempt: Option<AuthAttempt>,
}

/// An attempt to authenticate, for the log.
#[derive(Clone, Debug)]
pub struct AuthAttempt {
    pub mechanism: Mechanism,
    /// The name that the client claimed, once it has.
    pub account: Option<String>,
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
            auth_attempt: None,
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

    pub fn role(&self) -> ServerRole {
        self.options.role
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

    /// The last attempt to authenticate.
    pub fn auth_attempt(&self) -> Option<&AuthAttempt> {
        self.auth_attempt.as_ref()
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
    pub fn line(&mut self, line: &[u8], handler: &mut dyn SessionHandler) -> ServerStep {
        let step = match self.exchange.take() {
            Some(exchange) => self.auth_response(exchange, line, handler),
            None => self.command(line, handler).unwrap_or_else(ServerStep::Reply),
        };
        self.count_errors(step)
    }

    /// A line longer than any command may be (RFC 5321 section 4.5.3.1.9, RFC 4954 section 4).
    pub fn line_too_long(&mut self) -> ServerStep {
        let reply = match self.exchange.take() {
            Some(_) => Reply::new(500, "5.5.6", "Authentication exchange line is too long"),
            None => Reply::new(500, "5.5.2", "Line is too long"),
        };
        self.count_errors(ServerStep::Reply(reply))
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

    /// What is known of the message whose content comes next; `None` without a transaction. `session`: its id in
    /// the log; `peer`: the client's address as a literal; `tls`: TLS version and cipher.
    pub fn incoming<'a>(
        &'a self, session: &'a str, peer: &'a str, tls: Option<&'a str>,
    ) -> Option<(&'a Envelope, Incoming<'a>)> {
        let Transaction { envelope, size, .. } = self.transaction.as_ref()?;
        let received = Received {
            helo: self.client_name(),
            extended: self.hello.as_ref().is_some_and(|hello| hello.extended),
            peer,
            by: &self.options.hostname,
            utf8: envelope.utf8,
            tls,
            authenticated: self.account.is_some(),
            recipient: match envelope.recipients.as_slice() {
                [one] => Some(&one.mailbox),
                _ => None,
            },
        };
        Some((envelope, Incoming { session, received, size: *size }))
    }

    fn command(&mut self, line: &[u8], handler: &mut dyn SessionHandler) -> Result<ServerStep, Reply> {
        let (verb, rest) = Verb::of(line)?;
        if verb == Verb::Http {
            return Ok(ServerStep::Close(Reply::new(421, "4.7.0", "This is SMTP, not HTTP")));
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
            Command::Ehlo(name) => Ok(ServerStep::Reply(self.ehlo(name))),
            Command::Helo(name) => Ok(ServerStep::Reply(self.helo(name))),
            Command::Mail(mail) => self.mail(mail, handler),
            Command::Rcpt { path, utf8, notify, original } => self.rcpt(&path, utf8, notify, original, handler),
            Command::Data => Ok(ServerStep::Data(Reply::bare(354, "Go ahead, end with <CRLF>.<CRLF>"))),
            Command::Rset => {
                self.transaction = None;
                Ok(ServerStep::Reply(Reply::new(250, "2.0.0", "OK")))
            }
            Command::Noop => Ok(ServerStep::Reply(Reply::new(250, "2.0.0", "OK"))),
            Command::Help => Ok(ServerStep::Reply(self.help())),
            // RFC 5321 section 3.5.3: 250 only for what was verified.
            Command::Vrfy => Ok(ServerStep::Reply(Reply::new(252, "2.0.0", "Send the mail and see"))),
            Command::Quit => {
                let text = format!("{} closing connection", self.options.hostname);
                Ok(ServerStep::Close(Reply::new(221, "2.0.0", text)))
            }
            Command::StartTls => Ok(ServerStep::StartTls(Reply::new(220, "2.0.0", "Go ahead"))),
            Command::Auth { mechanism, initial } => self.auth(&mechanism, initial, handler),
            Command::Atrn(domains) => Ok(ServerStep::Atrn(domains)),
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
                Some(transaction) if verb == Verb::Data && transaction.envelope.recipients.is_empty() => {
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

    fn mail(&mut self, mail: MailFrom, handler: &mut dyn SessionHandler) -> Result<ServerStep, Reply> {
        let account = self.account.as_deref();
        let limit = self.options.max_size.min(handler.size_limit(account));
        if mail.size.is_some_and(|size| size > limit) {
            return Err(message_too_large(limit));
        }
        handler.sender(&mail, account)?;
        let MailFrom { envelope, size } = mail;
        self.transaction = Some(Transaction { envelope, size, limit, chunked: None, failed: false });
        Ok(ServerStep::Reply(Reply::new(250, "2.1.0", "OK")))
    }

    fn rcpt(
        &mut self, path: &ForwardPath, utf8: bool, notify: Notify, original: Option<String>,
        handler: &mut dyn SessionHandler,
    ) -> Result<ServerStep, Reply> {
        let limit = self.options.max_recipients;
        let Some(transaction) = &mut self.transaction else {
            return Err(sequence("Say MAIL first"));
        };
        if transaction.envelope.recipients.len() >= limit {
            return Err(Reply::new(452, "4.5.3", "Too many recipients: send the rest in another transaction"));
        }
        if utf8 && !transaction.envelope.utf8 {
            return Err(Reply::new(553, "5.6.7", "A UTF-8 address needs the SMTPUTF8 parameter"));
        }
        let mailbox = handler.recipient(path, &notify, original.as_deref())?;
        if !transaction.envelope.recipients.iter().any(|recipient| recipient.mailbox == mailbox) {
            transaction.envelope.recipients.push(Recipient { mailbox, notify, original });
        }
        Ok(ServerStep::Reply(Reply::new(250, "2.1.5", "OK, recipient accepted")))
    }

    /// BDAT: whatever is wrong, the octets it announces follow, and are read away (RFC 3030 section 2).
    fn chunk(&mut self, rest: &[u8]) -> Result<ServerStep, Reply> {
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
            Some(transaction) if transaction.envelope.recipients.is_empty() => {
                Some(sequence("No recipient was accepted"))
            }
            Some(transaction) => {
                let octets = transaction.chunked.unwrap_or(0).saturating_add(size);
                transaction.chunked = Some(octets);
                (octets > limit).then(|| message_too_large(limit))
            }
        };
        Ok(match refusal {
            None => ServerStep::Chunk { size, last, rejected: None },
            Some(reply) => self.reject_chunk(size, last, reply),
        })
    }

    fn reject_chunk(&mut self, size: u64, last: bool, reply: Reply) -> ServerStep {
        self.chunk_rejected(last);
        // Do not discard more than twice the message limit; close the connection instead.
        if size > limits::discarded_content(self.options.max_size) {
            return ServerStep::Close(reply);
        }
        ServerStep::Chunk { size, last, rejected: Some(reply) }
    }

    fn auth(
        &mut self, name: &[u8], initial: Option<Vec<u8>>, handler: &mut dyn SessionHandler,
    ) -> Result<ServerStep, Reply> {
        if self.auth_failures >= self.options.max_auth_failures {
            return Ok(ServerStep::Close(Reply::new(421, "4.7.0", "Too many failed authentications")));
        }
        let wanted = Mechanism::parse(name);
        let Some(mechanism) = self.mechanisms().find(|mechanism| Some(*mechanism) == wanted) else {
            return Err(Reply::new(504, "5.5.4", "That authentication mechanism is not offered here"));
        };
        let challenge = handler.credentials().challenge();
        let mut exchange = mechanism.server(challenge);
        self.auth_attempt = Some(AuthAttempt { mechanism, account: None });
        match (exchange.first(), initial) {
            (Some(_), Some(_)) => {
                // RFC 4954 section 4: the server speaks first in this mechanism.
                Err(Reply::new(501, "5.7.0", "This mechanism takes no initial response"))
            }
            (Some(challenge), None) => Ok(self.challenge(exchange, &challenge)),
            (None, None) => Ok(self.challenge(exchange, b"")),
            // RFC 4954 section 4: "=" is a response of no length.
            (None, Some(initial)) if initial == b"=" => Ok(self.auth_step(exchange, b"", handler)),
            (None, Some(initial)) => Ok(self.auth_response(exchange, &initial, handler)),
        }
    }

    /// A client's line inside an exchange: base64, or `*` (RFC 4954 section 4).
    fn auth_response(
        &mut self, exchange: Box<dyn ServerExchange>, line: &[u8], handler: &mut dyn SessionHandler,
    ) -> ServerStep {
        if line == b"*" {
            return ServerStep::Reply(Reply::new(501, "5.7.0", "Authentication cancelled"));
        }
        match data_encoding::BASE64.decode(line) {
            Ok(response) => self.auth_step(exchange, &response, handler),
            Err(_) => ServerStep::Reply(Reply::new(501, "5.5.2", "That is not base64")),
        }
    }

    fn auth_step(
        &mut self, mut exchange: Box<dyn ServerExchange>, response: &[u8], handler: &mut dyn SessionHandler,
    ) -> ServerStep {
        ServerStep::Reply(match exchange.step(response, handler.credentials()) {
            ExchangeStep::Challenge(challenge) => return self.challenge(exchange, &challenge),
            ExchangeStep::Done(account) => {
                let reply = Reply::new(235, "2.7.0", format!("now authenticated as {account}"));
                self.account = Some(account);
                reply
            }
            ExchangeStep::Failed(account) => {
                self.auth_failures += 1;
                if let Some(attempt) = &mut self.auth_attempt {
                    attempt.account = Some(account);
                }
                Reply::new(535, "5.7.8", "Authentication credentials invalid")
            }
            ExchangeStep::Malformed => Reply::new(501, "5.5.2", "The response is not what this mechanism asks for"),
            ExchangeStep::Unavailable => Reply::new(454, "4.7.0", "Accounts cannot be looked up now, try again later"),
        })
    }

    fn challenge(&mut self, exchange: Box<dyn ServerExchange>, challenge: &[u8]) -> ServerStep {
        self.exchange = Some(exchange);
        ServerStep::Reply(Reply::bare(334, data_encoding::BASE64.encode(challenge)))
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
    fn count_errors(&mut self, step: ServerStep) -> ServerStep {
        let reply = match &step {
            ServerStep::Reply(reply) => reply,
            ServerStep::Chunk { rejected: Some(reply), .. } => reply,
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
        if self.errors >= limit || self.rejections >= limit.saturating_mul(limits::REJECTIONS_PER_ERROR) {
            return ServerStep::Close(Reply::new(421, "4.7.0", "Too many errors"));
        }
        step
    }
}

/// RFC 1870 section 6.2.
pub fn message_too_large(limit: u64) -> Reply {
    Reply::new(552, "5.3.4", format!("The message is larger than {limit} octets"))
}
