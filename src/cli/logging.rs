//! Where log lines go (stderr or the system log), how many of them, and how they look.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;

use getopts::Matches;
use log::{Level, LevelFilter};

/// The facility `mail` of RFC 3164 section 4.1.1.
const MAIL_FACILITY: u8 = 2;

/// Where log lines go.
pub(super) enum LogTarget {
    Stderr,
    Syslog(UnixDatagram),
}

impl LogTarget {
    /// stderr; under inetd, if stderr leads nowhere, the system log, as far as this system has one.
    pub fn choose(inetd: bool) -> LogTarget {
        let syslog = || -> io::Result<UnixDatagram> {
            let socket = UnixDatagram::unbound()?;
            socket.connect("/dev/log")?;
            Ok(socket)
        };
        match (inetd && stderr_is_null()).then(syslog) {
            Some(Ok(socket)) => LogTarget::Syslog(socket),
            _ => LogTarget::Stderr,
        }
    }
}

/// Whether stderr is `/dev/null`, as it is after it was taken out of the connection.
fn stderr_is_null() -> bool {
    match (rustix::fs::fstat(io::stderr()), rustix::fs::stat("/dev/null")) {
        (Ok(stderr), Ok(null)) => stderr.st_rdev == null.st_rdev,
        _ => false,
    }
}

/// The level of the log lines that the options ask for.
pub(super) fn verbosity(matches: &Matches) -> LevelFilter {
    if matches.opt_present("verbose") { LevelFilter::Debug } else { LevelFilter::Info }
}

/// Shows a failure once: on stderr, or in the system log if stderr leads nowhere.
pub(super) fn report_failure(program: &str, text: &str, inetd: bool) {
    match LogTarget::choose(inetd) {
        LogTarget::Stderr => {
            let _ = writeln!(io::stderr(), "{program}: {text}");
        }
        syslog => {
            // A wrong option ends the program before it has started its log.
            start(syslog, LevelFilter::Info);
            log::error!("{text}");
        }
    }
}

/// Starts the log, one line for each event. `RUST_LOG` overrides `level` (`debug` adds the dialogue).
pub(super) fn start(target: LogTarget, level: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    // The log lines of rustls help only those who debug rustls.
    builder.filter_module("rustls", LevelFilter::Warn);
    builder.parse_default_env();
    match target {
        LogTarget::Stderr => {
            builder.format(|out, record| match record.level() {
                Level::Error => writeln!(out, "error: {}", record.args()),
                Level::Warn => writeln!(out, "warning: {}", record.args()),
                _ => writeln!(out, "{}", record.args()),
            });
        }
        LogTarget::Syslog(socket) => {
            builder.format(|out, record| {
                let priority = MAIL_FACILITY * 8 + severity(record.level());
                write!(out, "<{priority}>odmr[{}]: {}", std::process::id(), record.args())
            });
            builder.target(env_logger::Target::Pipe(Box::new(Syslog(socket))));
        }
    }
    // It fails only if this process has a logger already; then that one stays.
    let _ = builder.try_init();
    // By default a panic is printed on stderr, which may be a connection.
    std::panic::set_hook(Box::new(|panic| log::error!("event=panic {}", panic.to_string().replace('\n', " "))));
}

/// The severity of RFC 3164 section 4.1.1.
fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Writes each log line as one datagram (RFC 3164).
struct Syslog(UnixDatagram);

impl Write for Syslog {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        // A missing or slow log daemon must not stop a delivery.
        let _ = self.0.send(record);
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
