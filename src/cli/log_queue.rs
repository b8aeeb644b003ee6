//! The log lines that wait to be written, and the thread that writes them.
//!
//! A pipe without a reader, a stopped terminal, a slow disk and a syslogd that hangs stop only this thread: no session waits
//! for it. Lines beyond [`QUEUE_LIMIT`] and lines that cannot be written are lost; `event=log-lost` counts them, as
//! soon as a line can be written again.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::{Arc, Condvar, PoisonError};
use std::time::Duration;

use log::Level;

use crate::clock::Timestamp;
use crate::threads::{self, Guarded};

/// Octets of the lines that wait at most.
const QUEUE_LIMIT: usize = 1024 * 1024;

/// About how many octets of memory a line needs besides its text.
const LINE_OVERHEAD: usize = 64;

/// The begin of the line that counts lost ones.
const LOSS_REPORT: &str = "event=log-lost ";

/// A line of the log, without the parts that its target adds.
pub(super) struct LogLine {
    pub level: Level,
    /// Microseconds since 1970.
    pub time: u64,
    pub text: String,
}

impl LogLine {
    /// When it was logged, in whole seconds.
    pub fn timestamp(&self) -> Timestamp {
        Timestamp::from_seconds((self.time / 1_000_000).cast_signed())
    }
}

/// A target of log lines.
pub(super) trait LogSink: Send {
    /// Writes one line; it may block without limit.
    ///
    /// # Errors
    ///
    /// The line is lost.
    fn write(&mut self, line: &LogLine) -> io::Result<()>;
}

/// The lines that wait.
#[derive(Default)]
pub(super) struct LogQueue {
    state: Guarded<QueueState>,
    changed: Condvar,
    /// Only if the system has no thread for the log: then the thread that logs a line writes it.
    direct: Option<Guarded<Box<dyn LogSink>>>,
}

#[derive(Default)]
struct QueueState {
    /// The first one is being written.
    lines: VecDeque<Arc<LogLine>>,
    octets: usize,
    /// Lines that were lost and not reported yet.
    lost: u64,
    /// The last line could not be written.
    is_failing: bool,
    /// A task for the thread, before the next line.
    task: Option<Box<dyn FnOnce() + Send>>,
}

impl LogQueue {
    /// Starts the thread. `make_sink` is called once more if there is no thread. When the process becomes another user, so
    /// does the thread: setuid(3) of the C library changes all threads, unlike the system call of Linux.
    pub fn start(make_sink: impl Fn() -> Box<dyn LogSink>) -> Arc<LogQueue> {
        let (queue, mut sink) = (Arc::new(LogQueue::default()), make_sink());
        let writer = Arc::clone(&queue);
        let thread = threads::spawn("log", move || writer.write_lines(sink.as_mut()));
        match thread {
            Ok(_) => queue,
            Err(_) => Arc::new(LogQueue { direct: Some(Guarded::new(make_sink())), ..LogQueue::default() }),
        }
    }

    /// Adds a line, or counts it as lost.
    pub fn push(&self, line: LogLine) {
        if let Some(sink) = &self.direct {
            let _ = sink.lock().write(&line);
            return;
        }
        let mut state = self.state.lock();
        let octets = line.text.len() + LINE_OVERHEAD;
        if state.octets + octets > QUEUE_LIMIT {
            state.lost += 1;
            return;
        }
        state.octets += octets;
        state.lines.push_back(Arc::new(line));
        if state.lines.len() == 1 {
            self.changed.notify_all();
        }
    }

    /// Lets the thread do something before the next line; nothing happens if there is no thread.
    pub fn do_in_thread(&self, task: Box<dyn FnOnce() + Send>) {
        if self.direct.is_none() {
            self.state.lock().task = Some(task);
            self.changed.notify_all();
        }
    }

    /// The thread: writes lines for ever.
    fn write_lines(&self, sink: &mut dyn LogSink) {
        // The number in a report that waits.
        let mut reported = 0;
        let mut state = self.state.lock();
        loop {
            if let Some(task) = state.task.take() {
                drop(state);
                task();
                state = self.state.lock();
            }
            let Some(line) = state.lines.front().cloned() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let result = sink.write(&line);
            state = self.state.lock();
            state.is_failing = result.is_err();
            let is_report = line.text.starts_with(LOSS_REPORT);
            match (state.is_failing, is_report) {
                (true, true) => state.lost += mem::take(&mut reported),
                (true, false) => state.lost += 1,
                (false, true) => reported = 0,
                (false, false) => {}
            }
            // A report needs room too. While one waits, no other is made.
            if state.lost > 0 && reported == 0 && !state.is_failing && state.octets < QUEUE_LIMIT / 2 {
                reported = mem::take(&mut state.lost);
                drop(state);
                log::error!("event=log-lost lines={reported}");
                state = self.state.lock();
            }
            // Subtract only now: `wait_until_written` must not end before the report.
            state.octets = state.octets.saturating_sub(line.text.len() + LINE_OVERHEAD);
            state.lines.pop_front();
            if state.lines.is_empty() {
                self.changed.notify_all();
            }
        }
    }

    /// Waits until all lines are written; returns whether they are.
    pub fn wait_until_written(&self, limit: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.state.lock(), limit, |state| !state.lines.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.lines.is_empty()
    }

    /// Returns the lines that are not written, also the one that is being written, and how many were lost.
    pub fn unwritten(&self) -> (Vec<Arc<LogLine>>, u64) {
        let state = self.state.lock();
        (state.lines.iter().cloned().collect(), state.lost)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    struct Nowhere;

    impl LogSink for Nowhere {
        fn write(&mut self, _: &LogLine) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_task_is_done_by_the_thread_although_no_line_comes() {
        let queue = LogQueue::start(|| Box::new(Nowhere));
        let (sender, receiver) = mpsc::channel();
        queue.do_in_thread(Box::new(move || sender.send(thread::current().name().map(str::to_owned)).unwrap()));
        assert_eq!(receiver.recv_timeout(Duration::from_secs(10)).unwrap().as_deref(), Some("log"));
    }
}
