//! Where log lines go, which of them, and how they look.
//!
//! They go to stderr, or under inetd, where stderr is the connection, to the system log (RFC 3164). Each line is one event
//! of `doc/log.md`, or at level `debug` one line of a dialogue.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

use getopts::Matches;
use log::{Level, LevelFilter};

use crate::net::descriptor::Waiting;
use crate::net::trace::quoted;

/// The facility `mail` of RFC 3164 section 4.1.1.
const MAIL_FACILITY: u8 = 2;

/// The system log under inetd, if stderr is `/dev/null`, as it is after [`keep_stderr_out_of_connection`]. `None`: log
/// lines go to stderr, also if the system has no log.
///
/// [`keep_stderr_out_of_connection`]: super::inetd::keep_stderr_out_of_connection
pub(super) fn syslog(inetd: bool) -> Option<UnixDatagram> {
    let (stderr, null) = (rustix::fs::fstat(io::stderr()).ok()?, rustix::fs::stat("/dev/null").ok()?);
    if !inetd || stderr.st_rdev != null.st_rdev {
        return None;
    }
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect("/dev/log").ok().map(|()| socket)
}

/// The level of the log lines that the options ask for.
pub(super) fn verbosity(matches: &Matches) -> LevelFilter {
    if matches.opt_present("verbose") { LevelFilter::Debug } else { LevelFilter::Info }
}

/// Shows once why the program fails: on stderr, or in the system log.
pub(super) fn report_failure(program: &str, text: &str, inetd: bool) {
    match syslog(inetd) {
        None => {
            let _ = Waiting(io::stderr()).write_all(format!("{program}: {text}\n").as_bytes());
        }
        socket => {
            // After a wrong option the log has not been started.
            start(socket, LevelFilter::Info);
            log::error!("event=failed error={}", quoted(text));
        }
    }
}

/// Starts the log, one line for each event, in the system log or on stderr. `RUST_LOG` overrides `level`; `debug` adds the
/// dialogue.
pub(super) fn start(syslog: Option<UnixDatagram>, level: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    // What rustls logs below `warn` is not about mail.
    builder.filter_level(level).filter_module("rustls", LevelFilter::Warn).parse_default_env();
    match syslog {
        None => {
            builder.format(|out, record| match record.level() {
                Level::Error => writeln!(out, "error: {}", record.args()),
                Level::Warn => writeln!(out, "warning: {}", record.args()),
                _ => writeln!(out, "{}", record.args()),
            });
            // env_logger's own writer loses lines if the caller has made stderr non-blocking.
            builder.target(env_logger::Target::Pipe(Box::new(Waiting(io::stderr()))));
        }
        Some(socket) => {
            builder.format(|out, record| {
                // RFC 3164 section 4.1.1.
                let severity = match record.level() {
                    Level::Error => 3,
                    Level::Warn => 4,
                    Level::Info => 6,
                    Level::Debug | Level::Trace => 7,
                };
                write!(out, "<{}>odmr[{}]: {}", MAIL_FACILITY * 8 + severity, std::process::id(), record.args())
            });
            builder.target(env_logger::Target::Pipe(Box::new(Syslog(socket))));
        }
    }
    // It fails only if this process has a logger already; then that one stays.
    let _ = builder.try_init();
    // By default a panic is printed on stderr, which may be a connection.
    std::panic::set_hook(Box::new(|panic| log::error!("event=panic error={}", quoted(panic))));
}

/// Writes each log line as one datagram (RFC 3164).
struct Syslog(UnixDatagram);

impl Write for Syslog {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        // An absent or slow log daemon must not stop a delivery.
        let _ = self.0.send(record);
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
