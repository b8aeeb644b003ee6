//! On-Demand Mail Relay (RFC 2645): both ends, in one small synchronous program.
//!
//! A provider holds mail for domains whose server has no fixed address. When that server, the customer, connects to
//! port 366, authenticates and sends `ATRN`, the connection turns: the provider becomes the SMTP client and delivers.
//!
//! **The core is nine files.** Read them in this order:
//!
//! 1. [`turn`]: both halves of the turn; after it the provider is the SMTP client, the customer the SMTP server.
//! 2. [`smtp::command`]: the commands, as the SMTP server parses them.
//! 3. [`smtp::server`]: the role of the SMTP server, without I/O, with its table of commands: lines in, replies out.
//! 4. [`smtp::client`]: the role of the SMTP client, without I/O, with its table of states: replies in, commands out.
//! 5. [`provider::odmr`]: the provider's listener: AUTH, mail of the customer, `ATRN`, the locked queues.
//! 6. [`provider::delivery`]: the one thread of all turned sessions (`provider/turned_session`). Other threads wait for
//!    the disk (`provider/storage`, `provider/turned_queue`).
//! 7. [`queue`]: mail at rest: when a message is committed, what settles it (`queue/message`), when it is removed.
//! 8. [`mod@customer::pull`]: the customer's call, from the connection to the summary.
//! 9. [`customer::receiver`]: what the customer does with each recipient: RCPT, DATA, commit.
//!
//! The other files support these. A module uses only modules that come before it below; the same holds inside each
//! directory. `tests/house.rs` checks this, and that `sasl`, `mail`, `smtp`, `schedule`, `recipients` and some files of
//! `report` are pure: they use no socket, file, clock, random source or thread.
#![forbid(unsafe_code)]

// The system, time, randomness, the user, the files of an administrator, the log.
pub mod platform;
pub mod threads;
pub mod clock;
pub mod ids;
pub mod sandbox;
pub mod privileges;
pub mod text_file;
pub mod file_stamp;
pub mod log_limit;
pub mod plural;
pub mod nearest;
pub mod sorting;
pub mod sysexit;

// The protocol, pure.
pub mod sasl;
pub mod mail;
pub mod smtp;

// Sockets and files.
pub mod net;
pub mod maildir;
pub mod queue;

// Sessions of both roles, the turn between them, and what follows an attempt.
pub mod session;
pub mod turn;
pub mod report;

// Schedules, recipients, and the configuration.
pub mod schedule;
pub mod recipients;
pub mod config;

// The two parties, and the program.
pub mod provider;
pub mod customer;
pub mod cli;
