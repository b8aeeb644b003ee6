//! The log: its target, its level, and the form of its lines.
//!
//! Lines go to stderr; with `--syslog`, and under inetd if stderr is the connection, to the system log. Each line is
//! one event of `doc/log.md`, or at level `debug` one line of a dialogue. A thread writes them ([`LogQueue`]).

use std::io::{self, IoSlice, Write};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use getopts::{Matches, Options};
use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags};

use super::log_queue::{LogLine, LogQueue, LogSink};
use super::syslog::{self, Syslog, severity};
use super::terminal::{fitted, has_colours, highlighted};
use crate::clock::Clock;
use crate::net::cancel::poll;
use crate::net::descriptor::{Descriptor, Waiting};
use crate::net::trace::{printable, quoted};

/// How long the end of a daemon, or of any program that logs to the system log, waits for the last lines to be written.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The log of this process, once it is started.
static LOG: OnceLock<ProcessLog> = OnceLock::new();

struct ProcessLog {
    /// Only for its filter: `RUST_LOG`.
    filter: env_logger::Logger,
    queue: Arc<LogQueue>,
    /// Whether it goes to the system log.
    in_syslog: bool,
    /// How long the end of the program waits for the last lines to be written.
    end_timeout: Duration,
    format: StderrFormat,
}

impl Log for ProcessLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.filter.matches(record) {
            let (level, time) = (record.level(), Clock::System.microseconds());
            self.queue.push(LogLine { level, time, text: record.args().to_string() });
        }
    }

    fn flush(&self) {}
}

/// Adds the options for where the log goes.
pub(super) fn options(options: &mut Options) {
    let help = "logs to the system log, facility mail: to /dev/log or /var/run/log, or to the socket PATH";
    options.optflagopt("", "syslog", help, "PATH");
    options.optflag("", "log-time", "puts the time (RFC 3339, UTC) before each log line on stderr");
}

/// The target of the log.
pub(super) struct LogTarget {
    /// `Some(None)`: the system's socket.
    syslog: Option<Option<PathBuf>>,
    /// Why the system log cannot be reached.
    error: Option<io::Error>,
    format: StderrFormat,
}

impl LogTarget {
    /// The target that the options name. `inetd`: also without `--syslog` it is the system log if stderr is `/dev/null`, as it
    /// is after [`keep_stderr_out_of_connection`].
    ///
    /// [`keep_stderr_out_of_connection`]: super::inetd::keep_stderr_out_of_connection
    pub fn new(matches: &Matches, inetd: bool) -> LogTarget {
        let asked = matches.opt_present("syslog").then(|| matches.opt_str("syslog").map(PathBuf::from));
        LogTarget::to(asked.or_else(|| (inetd && stderr_is_null()).then_some(None)), matches.opt_present("log-time"))
    }

    fn to(syslog: Option<Option<PathBuf>>, time: bool) -> LogTarget {
        let error = syslog.as_ref().and_then(|path| syslog::connect(path.as_deref()).err());
        let format = StderrFormat { time, priority: stderr_is_journal(), colours: has_colours(io::stderr()) };
        LogTarget { syslog, error, format }
    }

    /// Whether the lines go to the system log, and it can be reached.
    pub fn is_syslog(&self) -> bool {
        self.syslog.is_some() && self.error.is_none()
    }

    /// Starts the log, one line for each event. `RUST_LOG` overrides `level`; `debug` adds the dialogue. `is_daemon`: at its
    /// end the program does not wait for a reader of stderr that reads nothing. A command does: its reader may be a pager.
    pub fn start(self, level: LevelFilter, is_daemon: bool) {
        let mut builder = env_logger::Builder::new();
        builder.filter_level(level).parse_default_env();
        let (in_syslog, format) = (self.is_syslog(), self.format);
        let log = LOG.get_or_init(|| {
            let stderr = || Box::new(StderrSink { format, is_torn: false }) as Box<dyn LogSink>;
            let queue = LogQueue::start(|| match &self.syslog {
                None => stderr(),
                Some(path) => Box::new(Syslog::new(path.as_deref(), (!in_syslog).then(stderr))),
            });
            let end_timeout = if is_daemon || in_syslog { END_TIMEOUT } else { Duration::MAX };
            ProcessLog { filter: builder.build(), queue, in_syslog, end_timeout, format }
        });
        // It fails only if this process has a logger already; then that one stays.
        if log::set_logger(log).is_ok() {
            log::set_max_level(log.filter.filter());
        }
        // By default a panic is printed on stderr, which may be a connection.
        std::panic::set_hook(Box::new(|panic| log::error!("event=panic error={}", quoted(panic))));
        if let Some(error) = self.error {
            let consequence = "the log goes to stderr until syslogd answers";
            log::warn!("event=no-syslog error={} consequence={consequence:?}", quoted(error));
        }
    }
}

/// Starts the log of a command that has no options for it, on stderr.
pub(super) fn start_on_stderr(level: LevelFilter) {
    LogTarget::to(None, false).start(level, false);
}

/// Lets the thread that writes the log do something, if there is one.
pub(super) fn do_in_thread(task: Box<dyn FnOnce() + Send>) {
    if let Some(log) = LOG.get() {
        log.queue.do_in_thread(task);
    }
}

/// The level of the log lines that the options ask for.
pub(super) fn verbosity(matches: &Matches) -> LevelFilter {
    if matches.opt_present("verbose") { LevelFilter::Debug } else { LevelFilter::Info }
}

/// Reports why the program fails, on stderr, and in the system log if the log goes there.
pub(super) fn report_failure(program: &str, text: &str, inetd: bool) {
    if inetd && LOG.get().is_none() {
        // After a wrong option the log has not been started.
        LogTarget::to(stderr_is_null().then_some(None), false).start(LevelFilter::Info, true);
    }
    if text.is_empty() {
        write_out();
        return;
    }
    if LOG.get().is_some_and(|log| log.in_syslog) {
        log::error!("event=failed error={}", quoted(text));
    }
    if write_out() {
        let priority = if stderr_is_journal() { "<3>" } else { "" };
        let name = highlighted(&format!("{program}:"), true, has_colours(io::stderr()));
        // An argument may have control characters: the ID of a message comes from its sender.
        let text = text.split('\n').map(|line| printable(line.as_bytes())).collect::<Vec<_>>().join("\n");
        // `odmr check` has found several errors; each begins with the name.
        let text = text.replace(&format!("\n{program}: "), &format!("\n{name} "));
        let text = fitted(&format!("{name} {text}\n"), io::stderr());
        let _ = Waiting(io::stderr()).write_all(format!("{priority}{text}").as_bytes());
    }
}

/// Waits until the log is written, and returns whether it is. If syslogd hangs, the lines that it does not accept go to
/// stderr.
pub(super) fn write_out() -> bool {
    let Some(log) = LOG.get() else { return true };
    if log.queue.wait_until_written(log.end_timeout) || !log.in_syslog {
        return log.queue.wait_until_written(Duration::ZERO);
    }
    let (lines, lost) = log.queue.unwritten();
    let mut text: String = lines.iter().map(|line| log.format.line(line)).collect();
    if lost > 0 {
        text.push_str(&format!("error: event=log-lost lines={lost}\n"));
    }
    write_stderr(text.as_bytes()).is_ok()
}

/// Writes to stderr, and gives up after [`END_TIMEOUT`].
fn write_stderr(mut octets: &[u8]) -> io::Result<()> {
    let deadline = Instant::now() + END_TIMEOUT;
    let stderr = Descriptor::shared(rustix::io::fcntl_dupfd_cloexec(io::stderr(), 3)?);
    while !octets.is_empty() {
        match (&stderr).write(octets) {
            Ok(written) => octets = &octets[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(deadline))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn stderr_is_null() -> bool {
    let (Ok(stderr), Ok(null)) = (rustix::fs::fstat(io::stderr()), rustix::fs::stat("/dev/null")) else { return false };
    stderr.st_rdev == null.st_rdev
}

/// Whether stderr is the journal of systemd (sd-daemon(3)). A child may inherit the variable with another stderr, so the
/// file is compared.
fn stderr_is_journal() -> bool {
    let (Ok(stderr), Ok(journal)) = (rustix::fs::fstat(io::stderr()), std::env::var("JOURNAL_STREAM")) else {
        return false;
    };
    journal == format!("{}:{}", stderr.st_dev, stderr.st_ino)
}

/// The form of lines on stderr.
#[derive(Clone, Copy)]
struct StderrFormat {
    /// The time is before each line.
    time: bool,
    /// Each line begins with its priority, which the journal removes; the words for it are left out.
    priority: bool,
    /// The words for the level have a colour.
    colours: bool,
}

impl StderrFormat {
    fn line(self, line: &LogLine) -> String {
        let mut shown = String::with_capacity(line.text.len() + 40);
        if self.priority {
            shown.push_str(&format!("<{}>", severity(line.level)));
        }
        if self.time {
            let seconds = line.timestamp().rfc3339();
            shown.push_str(&format!("{}.{:03}Z ", seconds.trim_end_matches('Z'), line.time / 1000 % 1000));
        }
        let (word, is_error) = match line.level {
            Level::Error => ("error:", true),
            Level::Warn => ("warning:", false),
            _ => ("", false),
        };
        if !self.priority && !word.is_empty() {
            shown.push_str(&highlighted(word, is_error, self.colours));
            shown.push(' ');
        }
        shown.push_str(&line.text);
        shown.push('\n');
        shown
    }
}

/// Writes lines to stderr.
struct StderrSink {
    format: StderrFormat,
    /// The last line was written in part, on a full disk.
    is_torn: bool,
}

impl LogSink for StderrSink {
    fn write(&mut self, line: &LogLine) -> io::Result<()> {
        let text = self.format.line(line);
        let text = if self.is_torn { format!("\n{text}") } else { text };
        let mut octets = text.as_bytes();
        while !octets.is_empty() {
            // The caller may have made stderr non-blocking. It is writev(2), because tests let the n-th write(2) of each thread
            // fail, which must be a write of mail.
            match Waiting(io::stderr()).write_vectored(&[IoSlice::new(octets)]) {
                Ok(written) => {
                    octets = &octets[written..];
                    self.is_torn = !octets.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
