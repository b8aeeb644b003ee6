//! The SMTP server role, without sockets (RFC 5321; on port 366 RFC 2645 section 5).
//!
//! A driver (`session/server`) gives the server each line of the client ([`Server::line`]) and acts on the returned
//! [`ServerStep`]: it sends the reply, reads content, starts TLS or closes. The server asks its [`SessionHandler`] what
//! depends on accounts, mailboxes and queues.
//!
//! # Commands
//!
//! `x`: the listener implements the command. RFC 2645 section 5.4 lets port 366 reply 502 to every other command. A command
//! out of its order gets 503 (RFC 5321 section 4.1.4), or 530 if TLS or authentication is missing (RFC 3207 section 4, RFC
//! 2645 section 5.2.1).
//!
//! ```text
//! command              inbound  odmr  submission  customer  when                                    RFC
//! EHLO, HELO              x      x        x          x      always; resets the transaction          5321 4.1.4
//! STARTTLS                x      x                          after EHLO; before TLS and AUTH         3207 4
//! AUTH                           x                          after EHLO; until it succeeds; after a  4954 4
//!                                                           failed -PLUS only QUIT follows          9266 4.1
//! ATRN                           x                          after AUTH, outside a transaction       2645 5.2.1
//! MAIL                    x      x        x          x      after EHLO or HELO, odmr: after AUTH;   5321 4.1.4
//!                                                           outside a transaction
//! RCPT                    x      x        x          x      after MAIL, before BDAT                 5321 3.3
//! DATA                    x      x        x          x      after an accepted RCPT, before BDAT     5321 3.3
//! BDAT                    x      x        x          x      after an accepted RCPT                  3030 2
//! VRFY                    x               x          x      always; the reply is 252                5321 3.5.3
//! RSET, NOOP, HELP, QUIT  x      x        x          x      always                                  5321 4.1.4
//! ```
//!
//! After AUTH the reply to EHLO lists the domains of the account, in lines `XDOMAINS`, for `odmr check --call`.
//!
//! After STARTTLS the server forgets everything that the client has sent before (RFC 3207 section 4.2). After ATRN the
//! connection turns, and `turn.rs` makes a client of the server (RFC 2645 section 5.3).

use super::command::{Command, Envelope, MailFrom, Notify, RcptTo, Recipient, VERBS, Verb, not_implemented};
use super::extensions::{self, ServerExtensions};
use super::limits;
use super::reply::Reply;
use crate::mail::address::{Domain, ForwardPath, Mailbox};
use crate::mail::received::Received;
use crate::sasl::{
    CertificateDigests, CredentialStore, ExchangeStep, Mechanism, NoCredentials, ServerExchange, TlsChannel,
};

/// The listener that a server belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerRole {
    /// Port 25 of the provider, for mail to the customers.
    Inbound,
    /// Port 366 of the provider, before the turn: ATRN, and submission by the customers (RFC 6409).
    Odmr,
    /// A listener of the customer, for the mail of its users.
    Submission,
    /// The customer after the turn.
    Customer,
}

/// What a listener offers, and its limits.
#[derive(Clone)]
pub struct ServerOptions {
    pub role: ServerRole,
    pub hostname: String,
    /// The largest message, in octets on the wire (RFC 1870).
    pub max_size: u64,
    /// Recipients of one transaction, at least [`limits::FEWEST_RECIPIENTS`].
    pub max_recipients: usize,
    /// Failed commands before the server closes the connection with 421.
    pub max_errors: usize,
    /// Failed AUTH commands before the server closes the connection with 421, at least [`limits::FEWEST_AUTH_FAILURES`].
    pub max_auth_failures: usize,
    /// STARTTLS is offered: there is a certificate.
    pub starttls: bool,
    /// AUTH, ATRN and mail on port 366 require TLS (RFC 3207 section 4).
    pub require_tls: bool,
    /// The extension DSN is offered (RFC 3461).
    pub dsn: bool,
    /// The driver defers what the server or its handler rejects.
    pub soft_bounce: bool,
    /// The mechanisms that AUTH may offer, in the order of the reply to EHLO.
    pub mechanisms: Vec<Mechanism>,
}

impl ServerOptions {
    /// Whether the listener implements a command: the table above.
    fn implements(&self, verb: Verb) -> bool {
        use Verb::*;
        match verb {
            Ehlo | Helo | Rset | Noop | Help | Quit => true,
            Mail | Rcpt | Data | Bdat => true,
            Vrfy => self.role != ServerRole::Odmr,
            StartTls => self.starttls && matches!(self.role, ServerRole::Inbound | ServerRole::Odmr),
            Auth | Atrn => self.role == ServerRole::Odmr,
            Unimplemented | Http | Unknown => false,
        }
    }

    fn offers(&self) -> ServerExtensions {
        let auth = self.role == ServerRole::Odmr;
        ServerExtensions { size: true, eight_bit: true, utf8: true, auth, dsn: self.dsn }
    }
}

/// The provider or the customer, for which a server accepts mail.
pub trait SessionHandler {
    /// The accounts that may authenticate. Default: none, for a listener without AUTH.
    fn credentials(&self) -> &dyn CredentialStore {
        &NoCredentials
    }

    /// Whether a client may authenticate as this account by this mechanism. If not, AUTH fails as if the secret were wrong.
    fn permits(&self, _account: &str, _mechanism: Mechanism) -> bool {
        true
    }

    /// Observes each step of an authentication; `None`: the client has cancelled it, or its line is not a valid response.
    /// Returns a reply if the session must end with it; `None`: the server replies to the step.
    fn authentication_step(&mut self, _step: Option<&ExchangeStep>) -> Option<Reply> {
        None
    }

    /// Accepts a message with this sender and size. `account`: the account of the client, if it has authenticated.
    ///
    /// # Errors
    /// The reply to MAIL that rejects it.
    fn sender(&mut self, mail: &MailFrom, account: Option<&str>) -> Result<(), Reply>;

    /// Accepts a recipient, and returns its mailbox. `notify` and `original`: NOTIFY and ORCPT (RFC 3461).
    ///
    /// # Errors
    /// The reply to RCPT that rejects it.
    fn recipient(&mut self, path: &ForwardPath, notify: &Notify, original: Option<&str>) -> Result<Mailbox, Reply>;

    /// The domains that this account may name in ATRN: the reply to EHLO lists them after AUTH (XDOMAINS).
    fn domains(&self, _account: &str) -> Vec<Domain> {
        Vec::new()
    }

    /// The largest message from this account, in octets on the wire; more than the listener accepts has no effect.
    fn size_limit(&self, _account: Option<&str>) -> u64 {
        u64::MAX
    }

    /// Whether the handler may wait for another host before it returns. Then the driver sends the earlier replies first, so
    /// that the client does not time out.
    fn may_wait(&self) -> bool {
        false
    }

    /// Observes a 4yz or 5yz to the client about its mail, whether it is from the server, this handler or a [`MessageSink`].
    fn not_accepted(&mut self, _what: Unaccepted<'_>, _reply: &Reply) {}

    /// Observes a RCPT without an open transaction, mostly in one group with a MAIL that was not accepted. `path`: as the
    /// client sent it, in angle brackets.
    fn recipient_without_mail(&mut self, _path: &[u8]) {}

    /// Begins to receive the content of a message.
    ///
    /// # Errors
    /// The reply to DATA or BDAT that rejects it.
    fn receive(&mut self, envelope: &Envelope, received: &Incoming<'_>) -> Result<Box<dyn MessageSink>, Reply>;
}

/// What a negative reply is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unaccepted<'a> {
    /// A message, at MAIL with this path, in angle brackets, as the client sent it.
    Sender(&'a [u8]),
    /// A recipient of the open transaction, at RCPT with this path.
    Recipient(&'a [u8]),
    /// The content, for all recipients of the transaction.
    Content,
    /// A line that is too long to be read.
    Line,
}

impl<'a> Unaccepted<'a> {
    /// What a negative reply to a command is about; `line`: the command, `None` if it was too long. Returns `None` if
    /// the command is not part of a transaction, or the reply is 503: that follows from an earlier reply, or from a
    /// wrong order of commands.
    pub fn at_command(line: Option<&'a [u8]>, reply: &Reply) -> Option<Unaccepted<'a>> {
        let Some(line) = line else { return Some(Unaccepted::Line) };
        let path = path_of(line);
        match Verb::of(line) {
            _ if reply.code() == 503 => None,
            Ok((Verb::Mail, _)) => Some(Unaccepted::Sender(path)),
            Ok((Verb::Rcpt, _)) => Some(Unaccepted::Recipient(path)),
            Ok((Verb::Data | Verb::Bdat, _)) => Some(Unaccepted::Content),
            _ => None,
        }
    }
}

/// The path of MAIL or RCPT and what follows it, as the client sent it; empty if the line has no `<`.
pub fn path_of(line: &[u8]) -> &[u8] {
    &line[line.iter().position(|octet| *octet == b'<').unwrap_or(line.len())..]
}

/// What the server knows of a message before its content arrives.
#[derive(Clone, Debug)]
pub struct Incoming<'a> {
    /// The id of the session in the log.
    pub session: &'a str,
    /// The parts of its `Received` field (RFC 5321 section 4.4).
    pub received: Received<'a>,
    /// Octets that the client has announced with SIZE (RFC 1870).
    pub size: Option<u64>,
}

/// The destination of the content of one message. Without a commit, nothing is stored.
pub trait MessageSink: Send {
    /// Writes a piece of the content, with LF line ends.
    ///
    /// # Errors
    /// The reply to the content. No more of it is written then.
    fn write(&mut self, octets: &[u8]) -> Result<(), Reply>;

    /// Makes the message durable, and returns its id. The reply to the content may be 250 only after that: the server must
    /// not lose a message that it has accepted (RFC 5321 section 6.1).
    ///
    /// # Errors
    /// The reply to the content. The client stays responsible for the message (RFC 5321 section 4.2.5).
    fn commit(self: Box<Self>) -> Result<String, Reply>;
}

/// What the driver does after a line.
#[derive(Debug)]
pub enum ServerStep {
    /// Send the reply.
    Reply(Reply),
    /// Send the reply and close.
    Close(Reply),
    /// Send the reply, start TLS, then call [`Server::tls_started`].
    StartTls(Reply),
    /// Send the reply, read the content up to its end, then call [`Server::end_transaction`].
    Data(Reply),
    /// Read `size` octets. If the chunk is rejected, discard them and send the reply (RFC 3030 section 2). Otherwise they
    /// are content: call [`Server::end_transaction`] after the last chunk, [`Server::chunk_rejected`] if one cannot be
    /// stored.
    Chunk { size: u64, last: bool, rejected: Option<Reply> },
    /// ATRN is permitted: check the domains and turn the connection, or reject ATRN.
    Atrn(Vec<Domain>),
}

/// An open mail transaction (RFC 5321 section 3.3).
#[derive(Clone, Debug)]
pub struct Transaction {
    /// The sender, and the recipients that were accepted.
    pub envelope: Envelope,
    /// Octets that the client has announced with SIZE.
    pub size: Option<u64>,
    /// The most octets that the content may have.
    limit: u64,
    /// Octets of the chunks that have arrived; `None`: there was no BDAT.
    chunked: Option<u64>,
    /// A chunk was rejected: every command but RSET gets 503 (RFC 3030 section 2).
    failed: bool,
}

/// The server role on one connection.
pub struct Server {
    options: ServerOptions,
    /// `None`: the connection is in clear.
    tls: Option<TlsChannel>,
    hello: Option<Hello>,
    account: Option<String>,
    /// AUTH has begun, and the next line is a response.
    exchange: Option<Box<dyn ServerExchange>>,
    transaction: Option<Transaction>,
    /// Failed commands since the last message.
    errors: usize,
    /// Rejected recipients in the whole session, and commands out of their order.
    rejections: usize,
    /// Other commands since the last message or the first recipient of a transaction.
    commands: usize,
    auth_failures: usize,
    auth_attempt: Option<AuthAttempt>,
    /// An exchange has used the channel binding of this connection (RFC 9266 section 4.1).
    binding_used: bool,
}

/// An AUTH command, for the log.
#[derive(Clone, Debug)]
pub struct AuthAttempt {
    pub mechanism: Mechanism,
    /// The account that the client has named, after the attempt has failed.
    pub account: Option<String>,
}

/// EHLO or HELO.
struct Hello {
    name: String,
    /// The command was EHLO.
    extended: bool,
}

impl Server {
    /// A server that has sent no greeting yet. `tls`: the TLS that the connection has already, from its first octet or from
    /// before the turn; `None`: the connection is in clear.
    pub fn new(options: ServerOptions, tls: Option<TlsChannel>) -> Server {
        Server {
            options,
            tls,
            hello: None,
            account: None,
            exchange: None,
            transaction: None,
            errors: 0,
            rejections: 0,
            commands: 0,
            auth_failures: 0,
            auth_attempt: None,
            binding_used: false,
        }
    }

    /// The greeting (RFC 5321 section 4.3.1), with the texts of RFC 2645 section 6.
    pub fn greeting(&self) -> Reply {
        let text = match self.options.role {
            ServerRole::Inbound => "ESMTP mail for the domains held here",
            ServerRole::Odmr => "on-demand mail relay server ready",
            ServerRole::Customer => "ready to receive email",
            ServerRole::Submission => "ESMTP mail of this host's users",
        };
        Reply::bare(220, format!("{} {text}", self.options.hostname))
    }

    /// The listener of this server.
    pub fn role(&self) -> ServerRole {
        self.options.role
    }

    /// Whether the driver defers what the server or its handler rejects.
    pub fn soft_bounce(&self) -> bool {
        self.options.soft_bounce
    }

    /// The name of this host, in the greeting and in the reply to EHLO.
    pub fn hostname(&self) -> &str {
        &self.options.hostname
    }

    /// The most octets that the content of the open transaction may have.
    pub fn max_size(&self) -> u64 {
        self.transaction.as_ref().map_or(self.options.max_size, |transaction| transaction.limit)
    }

    /// The account of the client, if it has authenticated.
    pub fn account(&self) -> Option<&str> {
        self.account.as_deref()
    }

    /// The last AUTH command that was permitted.
    pub fn auth_attempt(&self) -> Option<&AuthAttempt> {
        self.auth_attempt.as_ref()
    }

    /// The certificate of the client in TLS; `None`: the client has sent none, or was not asked for one.
    pub fn client_certificate(&self) -> Option<CertificateDigests> {
        self.tls.as_ref()?.client_certificate
    }

    /// The client's name in EHLO or HELO.
    pub fn client_name(&self) -> Option<&str> {
        self.hello.as_ref().map(|hello| hello.name.as_str())
    }

    /// The open transaction.
    pub fn transaction(&self) -> Option<&Transaction> {
        self.transaction.as_ref()
    }

    /// Whether the listener implements AUTH.
    pub fn offers_auth(&self) -> bool {
        self.options.implements(Verb::Auth)
    }

    /// Whether the next line is part of an AUTH exchange, and must not be logged.
    pub fn in_auth(&self) -> bool {
        self.exchange.is_some()
    }

    /// Executes one line of the client, without its CRLF.
    pub fn line(&mut self, line: &[u8], handler: &mut dyn SessionHandler) -> ServerStep {
        let step = match self.exchange.take() {
            Some(exchange) => self.auth_response(exchange, line, handler),
            None => self.command(line, handler).unwrap_or_else(ServerStep::Reply),
        };
        self.count_replies(step)
    }

    /// Rejects a line longer than [`limits::COMMAND_LINE`] (RFC 5321 section 4.5.3.1.9, RFC 4954 section 4).
    pub fn line_too_long(&mut self, handler: &mut dyn SessionHandler) -> ServerStep {
        let reply = match self.exchange.take() {
            Some(_) => {
                handler.authentication_step(None);
                Reply::new(500, "5.5.6", "Authentication exchange line is too long")
            }
            None => Reply::new(500, "5.5.2", "Line is too long"),
        };
        self.count_replies(ServerStep::Reply(reply))
    }

    /// TLS has started: the server forgets everything that the client has sent in clear (RFC 3207 section 4.2).
    pub fn tls_started(&mut self, channel: TlsChannel) {
        *self = Server::new(self.options.clone(), Some(channel));
    }

    /// Ends the transaction after the reply to its content.
    pub fn end_transaction(&mut self) {
        self.transaction = None;
        (self.errors, self.commands) = (0, 0);
    }

    /// Rejects a chunk: the transaction ends if it was the last, and otherwise waits for RSET (RFC 3030 section 2).
    pub fn chunk_rejected(&mut self, last: bool) {
        match &mut self.transaction {
            Some(transaction) if !last => transaction.failed = true,
            _ => self.transaction = None,
        }
    }

    /// What the server knows of the message whose content arrives next; `None`: there is no transaction. `session`: the id of
    /// the session in the log; `peer`: the client's address as a literal; `tls`: TLS version and cipher.
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
                // RFC 5321 section 4.2.4: 500 for an unknown command. RFC 2645 section 5.4: on port 366 it gets 502.
                Verb::Unknown if self.options.role != ServerRole::Odmr => {
                    Reply::new(500, "5.5.1", "Command not recognised")
                }
                _ => not_implemented(),
            });
        }
        // RFC 9266 section 4.1: a channel binding must serve one exchange only, so the connection ends after it.
        if self.binding_used && self.account.is_none() && verb != Verb::Quit {
            let text = "The channel binding of this connection is used up, connect again";
            return Ok(ServerStep::Close(Reply::new(421, "4.7.0", text)));
        }
        // The chunk of a BDAT that is not permitted must be discarded: `chunk` checks it.
        if verb != Verb::Bdat {
            self.permitted(verb)?;
        }
        match Command::parse(verb, rest, self.options.offers())? {
            Command::Ehlo(name) => Ok(ServerStep::Reply(self.ehlo(name, handler))),
            Command::Helo(name) => Ok(ServerStep::Reply(self.helo(name))),
            Command::Mail(mail) => self.mail(mail, handler),
            Command::Rcpt(rcpt) => self.rcpt(rcpt, handler),
            // RFC 5321 section 4.1.1.4.
            Command::Data => Ok(ServerStep::Data(Reply::bare(354, "Go ahead, end with <CRLF>.<CRLF>"))),
            // RFC 5321 section 4.1.1.5.
            Command::Rset => {
                self.transaction = None;
                Ok(ServerStep::Reply(Reply::new(250, "2.0.0", "OK")))
            }
            Command::Noop => Ok(ServerStep::Reply(Reply::new(250, "2.0.0", "OK"))),
            Command::Help => Ok(ServerStep::Reply(self.help())),
            // RFC 5321 section 3.5.3: 250 would mean that the address was verified.
            Command::Vrfy => Ok(ServerStep::Reply(Reply::new(252, "2.0.0", "Send the mail and see"))),
            // RFC 5321 section 4.1.1.10.
            Command::Quit => {
                let text = format!("{} closing connection", self.options.hostname);
                Ok(ServerStep::Close(Reply::new(221, "2.0.0", text)))
            }
            Command::StartTls => Ok(ServerStep::StartTls(Reply::new(220, "2.0.0", "Go ahead"))),
            Command::Auth { mechanism, initial } => self.auth(&mechanism, initial, handler),
            Command::Atrn(domains) => Ok(ServerStep::Atrn(domains)),
            Command::Bdat { size, rest } => Ok(self.chunk(size, rest)),
        }
    }

    /// Checks that the command is permitted in this state. The first matching line decides on the reply.
    fn permitted(&self, verb: Verb) -> Result<(), Reply> {
        use Verb::*;
        let odmr = self.options.role == ServerRole::Odmr;
        let extended = self.hello.as_ref().is_some_and(|hello| hello.extended);
        let authenticated = self.account.is_some();
        let transaction = self.transaction.as_ref();
        let chunk_rejected = transaction.is_some_and(|transaction| transaction.failed);
        let chunks = chunk_rejected || transaction.is_some_and(|transaction| transaction.chunked.is_some());
        let no_recipient = transaction.is_some_and(|transaction| transaction.envelope.recipients.is_empty());
        let text = match verb {
            // RFC 3207 section 4.
            Auth | Atrn | Mail | Rcpt | Data | Bdat if odmr && self.options.require_tls && self.tls.is_none() => {
                return Err(Reply::new(530, "5.7.0", "TLS is required here: send STARTTLS first"));
            }
            // RFC 2645 section 5.2.1 for ATRN, RFC 6409 section 4.3 for mail.
            Atrn | Mail | Rcpt | Data | Bdat if odmr && !authenticated => {
                return Err(Reply::new(530, "5.7.0", "Authentication required"));
            }
            Auth | Atrn if !extended => "Send EHLO first",
            // RFC 4954 section 4: no AUTH after a success. MAIL needs AUTH here, so none is in a transaction either.
            Auth if authenticated => "You are authenticated already",
            Atrn if transaction.is_some() => "A mail transaction is open: end it first",
            // RFC 3207 section 4.2.
            StartTls if self.tls.is_some() => "TLS is active already",
            StartTls if authenticated => "Too late: you are authenticated",
            StartTls if !extended => "Send EHLO first",
            // RFC 5321 section 4.1.4.
            Mail if self.hello.is_none() => "Send EHLO first",
            Mail if transaction.is_some() => "A mail transaction is open: RSET ends it",
            Rcpt | Data | Bdat if transaction.is_none() => "Send MAIL first",
            // RFC 3030 section 2.
            Bdat if chunk_rejected => "A chunk was rejected: send RSET",
            Rcpt | Data if chunks => "BDAT has begun: continue it, or send RSET",
            Data | Bdat if no_recipient => "No recipient was accepted",
            _ => return Ok(()),
        };
        Err(Reply::new(503, "5.5.1", text))
    }

    /// EHLO resets the transaction (RFC 5321 section 4.1.4); the session stays authenticated.
    fn ehlo(&mut self, name: String, handler: &dyn SessionHandler) -> Reply {
        self.hello = Some(Hello { name, extended: true });
        self.transaction = None;
        let options = &self.options;
        let mechanisms: Vec<_> = self.mechanisms(handler).map(|mechanism| mechanism.name()).collect();
        // A client bounces a message above the announced limit without sending MAIL, so this server could not defer it.
        // RFC 1870 section 4: 0 announces no limit.
        let size = if options.soft_bounce { 0 } else { options.max_size };
        let mut reply = Reply::bare(250, options.hostname.clone())
            .with_line("PIPELINING")
            .with_line(format!("SIZE {size}"))
            .with_line("8BITMIME")
            .with_line("SMTPUTF8")
            .with_line("ENHANCEDSTATUSCODES")
            // RFC 9422 section 4.2.
            .with_line(format!("LIMITS RCPTMAX={}", options.max_recipients))
            .with_line("CHUNKING");
        if options.dsn {
            reply = reply.with_line("DSN");
        }
        if !mechanisms.is_empty() {
            reply = reply.with_line(format!("AUTH {}", mechanisms.join(" ")));
        }
        // RFC 3207 section 4.2: STARTTLS must not be offered under TLS.
        if options.implements(Verb::StartTls) && self.tls.is_none() {
            reply = reply.with_line("STARTTLS");
        }
        // RFC 2645 section 5.1.1: even before AUTH.
        if options.role == ServerRole::Odmr {
            reply = reply.with_line("ATRN");
        }
        // Only an authenticated client learns which domains have mail here.
        let domains = self.account.as_deref().map(|account| handler.domains(account)).unwrap_or_default();
        extensions::domain_lines(&domains).into_iter().fold(reply, Reply::with_line)
    }

    /// HELO resets the transaction, too. Its reply must not list extensions (RFC 5321 section 3.2).
    fn helo(&mut self, name: String) -> Reply {
        self.hello = Some(Hello { name, extended: false });
        self.transaction = None;
        Reply::bare(250, self.options.hostname.clone())
    }

    /// The mechanisms that may be used now: PLAIN under TLS only (RFC 4954 section 4), -PLUS under TLS 1.3 only, EXTERNAL only
    /// if an account has the certificate that the client has sent in TLS (RFC 4422 appendix A).
    fn mechanisms(&self, handler: &dyn SessionHandler) -> impl Iterator<Item = Mechanism> {
        let tls = self.tls.as_ref();
        let offered = self.options.role == ServerRole::Odmr && (tls.is_some() || !self.options.require_tls);
        let certificate =
            self.client_certificate().is_some_and(|certificate| handler.credentials().knows(&certificate));
        self.options.mechanisms.iter().copied().filter(move |mechanism| match mechanism {
            Mechanism::External => offered && certificate,
            mechanism => offered && mechanism.is_possible(tls),
        })
    }

    /// MAIL begins a transaction (RFC 5321 section 3.3).
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

    /// RCPT adds a recipient to the transaction (RFC 5321 section 3.3). A recipient that occurs twice counts once.
    fn rcpt(&mut self, rcpt: RcptTo, handler: &mut dyn SessionHandler) -> Result<ServerStep, Reply> {
        let limit = self.options.max_recipients;
        let Some(Transaction { envelope, .. }) = &mut self.transaction else {
            return Err(Reply::new(503, "5.5.1", "Send MAIL first"));
        };
        // RFC 5321 section 4.5.3.1.10.
        if envelope.recipients.len() >= limit {
            return Err(Reply::new(452, "4.5.3", "Too many recipients: send the rest in another transaction"));
        }
        // RFC 6531 section 3.5.
        if rcpt.utf8 && !envelope.utf8 {
            return Err(Reply::new(553, "5.6.7", "A UTF-8 address needs the SMTPUTF8 parameter"));
        }
        let RcptTo { path, notify, original, .. } = rcpt;
        let mailbox = handler.recipient(&path, &notify, original.as_deref())?;
        if !envelope.recipients.iter().any(|recipient| recipient.mailbox == mailbox) {
            envelope.recipients.push(Recipient { mailbox, notify, original });
            // Some hosts verify each address by MAIL, RCPT and RSET, and send no message. The first recipient of a
            // transaction resets the count, so that they do not get 421.
            if envelope.recipients.len() == 1 {
                self.commands = 0;
            }
        }
        Ok(ServerStep::Reply(Reply::new(250, "2.1.5", "OK, recipient accepted")))
    }

    /// BDAT. Its octets follow even if it is rejected, and must be read, or they would be executed as commands (RFC 3030
    /// section 2). `rest`: see [`Command::Bdat`].
    fn chunk(&mut self, size: u64, rest: Result<bool, Reply>) -> ServerStep {
        let limit = self.max_size();
        let mut accepted = rest.clone().and_then(|_| self.permitted(Verb::Bdat));
        if accepted.is_ok()
            && let Some(transaction) = &mut self.transaction
        {
            let octets = transaction.chunked.unwrap_or(0).saturating_add(size);
            transaction.chunked = Some(octets);
            if octets > limit {
                accepted = Err(message_too_large(limit));
            }
        }
        let last = rest.unwrap_or(false);
        let Err(reply) = accepted else {
            return ServerStep::Chunk { size, last, rejected: None };
        };
        self.chunk_rejected(last);
        // Do not discard more than twice the message limit; close the connection instead.
        if size > limits::discarded_content(self.options.max_size) {
            return ServerStep::Close(reply);
        }
        ServerStep::Chunk { size, last, rejected: Some(reply) }
    }

    /// AUTH (RFC 4954 section 4).
    fn auth(
        &mut self, name: &[u8], initial: Option<Vec<u8>>, handler: &mut dyn SessionHandler,
    ) -> Result<ServerStep, Reply> {
        if self.auth_failures >= self.options.max_auth_failures {
            return Ok(ServerStep::Close(Reply::new(421, "4.7.0", "Too many failed authentications")));
        }
        let offered: Vec<_> = self.mechanisms(handler).collect();
        let Some(mechanism) = Mechanism::parse(name).filter(|mechanism| offered.contains(mechanism)) else {
            return Err(Reply::new(504, "5.5.4", "That authentication mechanism is not offered here"));
        };
        let channel = self.tls.clone().unwrap_or_default();
        let mut exchange = mechanism.server(handler.credentials(), &channel, &offered);
        self.auth_attempt = Some(AuthAttempt { mechanism, account: None });
        self.binding_used |= mechanism == Mechanism::ScramSha256Plus;
        match (exchange.first(), initial) {
            (Some(_), Some(_)) => {
                // RFC 4954 section 4: in this mechanism the server sends first.
                Err(Reply::new(501, "5.7.0", "This mechanism takes no initial response"))
            }
            (Some(challenge), None) => Ok(self.challenge(exchange, &challenge)),
            (None, None) => Ok(self.challenge(exchange, b"")),
            // RFC 4954 section 4: "=" is an empty response.
            (None, Some(initial)) if initial == b"=" => Ok(self.auth_step(exchange, b"", handler)),
            (None, Some(initial)) => Ok(self.auth_response(exchange, &initial, handler)),
        }
    }

    /// A line of the client in an AUTH exchange: base64, or `*` to cancel (RFC 4954 section 4).
    fn auth_response(
        &mut self, exchange: Box<dyn ServerExchange>, line: &[u8], handler: &mut dyn SessionHandler,
    ) -> ServerStep {
        if line == b"*" {
            handler.authentication_step(None);
            return ServerStep::Reply(Reply::new(501, "5.7.0", "Authentication cancelled"));
        }
        match data_encoding::BASE64.decode(line) {
            Ok(response) => self.auth_step(exchange, &response, handler),
            Err(_) => {
                handler.authentication_step(None);
                ServerStep::Reply(Reply::new(501, "5.5.2", "That is not base64"))
            }
        }
    }

    /// Gives a response to the mechanism, and replies to its result (RFC 4954 sections 4 and 6).
    fn auth_step(
        &mut self, mut exchange: Box<dyn ServerExchange>, response: &[u8], handler: &mut dyn SessionHandler,
    ) -> ServerStep {
        let mechanism = self.auth_attempt.as_ref().map(|attempt| attempt.mechanism);
        let forbidden = |account: &str| mechanism.is_none_or(|mechanism| !handler.permits(account, mechanism));
        let step = match exchange.step(response, handler.credentials()) {
            ExchangeStep::Done(account) if forbidden(&account) => ExchangeStep::Failed(account),
            step => step,
        };
        if let Some(reply) = handler.authentication_step(Some(&step)) {
            return ServerStep::Close(reply);
        }
        ServerStep::Reply(match step {
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
        let words: Vec<_> =
            VERBS.iter().filter(|(_, verb)| self.options.implements(*verb)).map(|(word, _)| *word).collect();
        Reply::new(214, "2.0.0", format!("Commands: {}", words.join(" "))).with_line("See RFC 5321 and RFC 2645")
    }

    /// Counts errors and rejected recipients, and closes the connection of a client that has too many.
    fn count_replies(&mut self, step: ServerStep) -> ServerStep {
        // Deferred mail stays in the client's queue. If it counted as an error, it would end each session before the
        // mail after it is sent.
        if self.options.soft_bounce {
            return step;
        }
        let reply = match &step {
            ServerStep::Reply(reply) => reply,
            ServerStep::Chunk { rejected: Some(reply), .. } => reply,
            // BDAT 0 moves no content. If it did not count, a client could repeat it for ever.
            ServerStep::Chunk { size: 0, last: false, .. } => return self.count_command(step),
            _ => return step,
        };
        match reply.code() {
            500..=502 | 504 | 555 => self.errors += 1,
            // A few rejected recipients are mistakes; many are an attempt to find addresses (RFC 5321 section 7.3). After a
            // rejected MAIL the rest of its group gets 503, so these count less than an error, too.
            503 | 550 | 551 | 553 => self.rejections += 1,
            // 452: a client may send more recipients than a transaction can have (RFC 5321 section 4.5.3.1.10).
            400..=499 => return step,
            _ => return self.count_command(step),
        }
        let limit = self.options.max_errors;
        if self.errors >= limit || self.rejections >= limit.saturating_mul(limits::REJECTIONS_PER_ERROR) {
            return ServerStep::Close(Reply::new(421, "4.7.0", "Too many errors"));
        }
        step
    }

    /// Counts a command that is not an error. Closes the connection of a client that has not authenticated and has sent
    /// far more of them than a message needs: thousands of HELP in one write would use up the processor (RFC 5321
    /// section 7.8).
    fn count_command(&mut self, step: ServerStep) -> ServerStep {
        let counts = match self.options.role {
            ServerRole::Inbound => true,
            ServerRole::Odmr => self.account.is_none(),
            ServerRole::Submission | ServerRole::Customer => false,
        };
        self.commands += usize::from(counts);
        if self.commands > self.options.max_recipients.saturating_add(limits::COMMANDS_WITHOUT_MESSAGE) {
            return ServerStep::Close(Reply::new(421, "4.7.0", "Too many commands without a message"));
        }
        step
    }
}

/// Checks that the domain of a recipient could be one of this host: it has the grammar of RFC 5321 section 4.1.2.
///
/// # Errors
/// The reply to RCPT.
pub fn check_held_domain(mailbox: &Mailbox) -> Result<(), Reply> {
    match mailbox.domain() {
        Some(domain) if !domain.is_strict() => {
            Err(Reply::new(501, "5.1.3", "The domains here are made of letters, digits and hyphens only"))
        }
        _ => Ok(()),
    }
}

/// Checks that mail can be relayed to a mailbox elsewhere (RFC 6409 section 4.2).
///
/// # Errors
/// The reply to RCPT.
pub fn check_qualified(mailbox: &Mailbox) -> Result<(), Reply> {
    match mailbox.domain() {
        None => Err(Reply::new(554, "5.1.2", "Mail for an address literal is not relayed")),
        Some(domain) if !domain.as_str().contains('.') => {
            Err(Reply::new(554, "5.1.2", "The domain is not fully qualified"))
        }
        Some(_) => Ok(()),
    }
}

/// The reply to a message of more than `limit` octets on the wire (RFC 1870 sections 6.1 and 6.3).
pub fn message_too_large(limit: u64) -> Reply {
    Reply::new(552, "5.3.4", format!("The message is larger than {limit} octets"))
}
