//! Slows clients that guess secrets, across the processes of a spool.
//!
//! Each AUTH that tries a secret is an attempt, by the rules of [`LoginTable`]. The table is in memory and in the file
//! `SPOOL/.odmr/logins`, which `serve` and each process of `serve --inetd` read and replace under the lock of `logins.lock`.
//! Only a thread of its own touches the disk, and ends when it has nothing to do: if the disk hangs, attempts go on with what is
//! in memory. Nothing is fsynced: if a power cut loses the file, the counts begin anew.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::login_table::{Admission, AttemptEnd, AttemptOrigin, ClientNetwork, LoginTable, Subject};
use crate::clock::Clock;
use crate::file_stamp::FileStamp;
use crate::maildir::{replace_file, wait_for_state_file, with_path};
use crate::net::cancel::{CancelToken, poll};
use crate::net::trace::quoted;

/// How long an attempt waits for the file, and a process for its lock.
const FILE_WAIT: Duration = Duration::from_millis(250);

/// How often an attempt that waits looks whether it still has its place.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Octets of the file at most: all that a table can have.
const TABLE_SIZE_LIMIT: u64 = 1 << 20;

/// Changes that are kept for the file, if it cannot be written.
const CHANGES_LIMIT: usize = 256;

/// How long an attempt waits for others of its network or account that may be decided now.
const CROWD_WAIT: Duration = Duration::from_secs(5);

/// How often the same is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Subjects of which is known when they were logged last.
const LOGGED_LIMIT: usize = 1000;

/// A change of the table.
#[derive(Clone)]
enum Change {
    Begin(AttemptOrigin),
    End { attempt: AttemptOrigin, counted: bool, end: AttemptEnd },
}

/// The attempts to log in, and the networks from which accounts have authenticated. It lasts over reloads.
pub struct Logins {
    root: PathBuf,
    clock: Clock,
    state: Mutex<LoginState>,
    synchronised: Condvar,
}

#[derive(Default)]
struct LoginState {
    /// The file as it was read or written last, with all changes of this process.
    table: LoginTable,
    /// What is not in the file yet.
    changes: Vec<(i64, Change)>,
    /// What became of an attempt when it was last put into the table.
    admissions: Vec<(String, Admission)>,
    stamp: Option<FileStamp>,
    text: String,
    /// How often the file was asked for, and what of that is done.
    asked: u64,
    done: u64,
    /// Since when the thread is at it.
    running: Option<Instant>,
    failure_logged: Option<Instant>,
    /// When attempts of a subject were logged last, and how many were not since.
    logged: Vec<(Subject, Instant, usize)>,
}

impl LoginState {
    fn apply(&mut self, now: i64, change: &Change) {
        match change {
            Change::Begin(attempt) => {
                let admission = self.table.begin(attempt, now);
                self.forget(attempt);
                self.admissions.push((attempt.id.clone(), admission));
            }
            Change::End { attempt, counted, end } => {
                self.forget(attempt);
                self.table.end(attempt, *counted, *end, now);
            }
        }
    }

    fn forget(&mut self, attempt: &AttemptOrigin) {
        self.admissions.retain(|(id, _)| *id != attempt.id);
    }

    /// Replaces the table by that of the file.
    fn read(&mut self, text: Vec<u8>, stamp: Option<FileStamp>, now: i64) -> usize {
        let (mut table, wrong) = LoginTable::parse(&text);
        table.take_unwritten(&mut self.table);
        (self.table, self.stamp) = (table, stamp);
        self.text = String::from_utf8(text).unwrap_or_default();
        for (at, change) in self.changes.clone() {
            self.apply(at.min(now), &change);
        }
        wrong
    }
}

impl Logins {
    /// `root`: the spool.
    pub fn new(root: &Path, clock: Clock) -> Logins {
        let (state, synchronised) = Default::default();
        Logins { root: root.to_owned(), clock, state, synchronised }
    }

    /// Whether an account has authenticated from the network of this address. It does not wait for the file.
    pub fn knows(&self, address: IpAddr) -> bool {
        self.lock().table.knows(ClientNetwork::of(Some(address)))
    }

    /// Reads the file, and writes to it what is not there yet. Returns when that is done, or after [`FILE_WAIT`].
    pub fn synchronise(self: &Arc<Self>) {
        let asked = self.ask(&mut self.lock());
        drop(self.wait(asked, FILE_WAIT));
    }

    /// The client is authenticated, by a mechanism that tests nothing which could be guessed, so that it has not waited.
    pub fn learn(self: &Arc<Self>, attempt: AttemptOrigin) {
        self.change(Change::End { attempt, counted: false, end: AttemptEnd::Succeeded });
    }

    /// Begins an attempt.
    fn begin(self: &Arc<Self>, attempt: &AttemptOrigin) -> Admission {
        let asked = self.change(Change::Begin(attempt.clone()));
        let mut state = self.wait(asked, FILE_WAIT);
        let found = state.admissions.iter().find(|(id, _)| *id == attempt.id).map(|(_, admission)| *admission);
        state.forget(attempt);
        found.unwrap_or(Admission::Rejected)
    }

    /// Waits until not too many others of the network or account are open.
    fn wait_for_others(&self, attempt: &AttemptOrigin, cancel: &CancelToken) {
        let late = Instant::now() + CROWD_WAIT;
        while Instant::now() < late && !cancel.is_cancelled() {
            let is_crowded = |state: &mut LoginState| {
                let now = self.now();
                !state.table.open(attempt, now) && state.table.is_crowded(attempt, now)
            };
            let waiting = self.synchronised.wait_timeout_while(self.lock(), LOOK_INTERVAL, is_crowded);
            if !waiting.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
                return;
            }
        }
    }

    fn change(self: &Arc<Self>, change: Change) -> u64 {
        let (now, mut state) = (self.now(), self.lock());
        state.apply(now, &change);
        self.synchronised.notify_all();
        state.changes.push((now, change));
        if state.changes.len() > CHANGES_LIMIT {
            state.changes.remove(0);
        }
        self.ask(&mut state)
    }

    /// Has the thread look at the file, which is started if it does not run.
    fn ask(self: &Arc<Self>, state: &mut LoginState) -> u64 {
        state.asked += 1;
        if state.running.is_none() {
            let logins = self.clone();
            // Without a thread there is what is in memory.
            if thread::Builder::new().name("logins".to_owned()).spawn(move || logins.run()).is_ok() {
                state.running = Some(Instant::now());
            }
        }
        state.asked
    }

    fn wait(&self, asked: u64, limit: Duration) -> MutexGuard<'_, LoginState> {
        let state = self.lock();
        // If the disk hangs, nobody waits for it any more.
        let left = state.running.map_or(Duration::ZERO, |since| limit.saturating_sub(since.elapsed()));
        let waiting = self.synchronised.wait_timeout_while(state, left, |state| state.done < asked);
        let mut state = waiting.unwrap_or_else(PoisonError::into_inner).0;
        if state.done < asked {
            log_failure(&mut state, &io::Error::other("the disk does not answer"));
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, LoginState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> i64 {
        self.clock.now().seconds()
    }

    /// The thread.
    fn run(&self) {
        loop {
            let (asked, has_changes) = {
                let mut state = self.lock();
                if state.done >= state.asked {
                    state.running = None;
                    return;
                }
                state.running = Some(Instant::now());
                (state.asked, !state.changes.is_empty())
            };
            let result = self.exchange(has_changes);
            let mut state = self.lock();
            state.done = asked;
            self.synchronised.notify_all();
            if let Err(error) = result {
                log_failure(&mut state, &error);
            }
        }
    }

    /// Reads the file if it has changed, and writes the changes.
    fn exchange(&self, has_changes: bool) -> io::Result<()> {
        let lock = has_changes.then(|| wait_for_state_file(&self.root, "logins.lock", Instant::now() + FILE_WAIT));
        self.read()?;
        // What cannot be written can be read nevertheless.
        let Some(_lock) = lock.transpose()? else { return Ok(()) };
        let path = self.path();
        let (text, written) = {
            let state = self.lock();
            (Some(state.table.text()).filter(|text| *text != state.text), state.changes.len())
        };
        if let Some(text) = &text {
            replace_file(&path, text)?;
        }
        let stamp = path.metadata().ok().map(|found| FileStamp::of(&found));
        let mut state = self.lock();
        // Others have come meanwhile, and a few may have gone because they were too many.
        let written = written.min(state.changes.len());
        state.changes.drain(..written);
        state.stamp = stamp;
        text.into_iter().for_each(|text| state.text = text);
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.root.join(".odmr/logins")
    }

    fn read(&self) -> io::Result<()> {
        let path = self.path();
        let read = || {
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), None)),
                opened => opened?,
            };
            let stamp = Some(FileStamp::of(&file.metadata()?));
            let mut text = Vec::new();
            if self.lock().stamp != stamp {
                file.take(TABLE_SIZE_LIMIT).read_to_end(&mut text)?;
            }
            Ok((text, stamp))
        };
        let (text, stamp) = read().map_err(|error| with_path(&path, error))?;
        let (now, mut state) = (self.now(), self.lock());
        let wrong = if state.stamp == stamp { 0 } else { state.read(text, stamp, now) };
        match wrong {
            0 => Ok(()),
            // The rest counts, and the next change writes the file anew.
            lines => {
                state.text.clear();
                log_failure(&mut state, &io::Error::other(format!("{}: {lines} lines are damaged", path.display())));
                Ok(())
            }
        }
    }
}

fn log_failure(state: &mut LoginState, error: &io::Error) {
    if state.failure_logged.is_none_or(|last| last.elapsed() >= LOG_INTERVAL) {
        state.failure_logged = Some(Instant::now());
        log::warn!("event=logins-unusable error={}", quoted(error));
    }
}

/// Why an attempt that has begun is not decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Undecided {
    /// Too many wait, or another attempt has its place.
    TooMany,
    /// This process ends.
    Stopping,
    /// The client has closed the connection.
    ClientGone,
}

/// One attempt of a session. It ends when it is dropped.
pub struct LoginAttempt {
    logins: Arc<Logins>,
    attempt: AttemptOrigin,
    counted: bool,
    end: AttemptEnd,
}

impl LoginAttempt {
    /// Begins an attempt, and waits until it may be decided. `input`: the connection, which is not read. `log`: logs that it
    /// waits so many seconds, or `None` that it is not decided, and how many others have had a delay since the last line.
    ///
    /// # Errors
    /// It must not be decided.
    pub fn wait(
        logins: &Arc<Logins>, attempt: AttemptOrigin, input: BorrowedFd<'_>, cancel: &CancelToken,
        log: &dyn Fn(Option<u32>, usize),
    ) -> Result<LoginAttempt, Undecided> {
        logins.wait_for_others(&attempt, cancel);
        let begun = Instant::now();
        let admission = logins.begin(&attempt);
        let counted = matches!(admission, Admission::Delayed(_));
        let attempt = LoginAttempt { logins: logins.clone(), attempt, counted, end: AttemptEnd::Withdrawn };
        let seconds = match admission {
            Admission::Free => return Ok(attempt),
            Admission::Delayed(seconds) => Some(seconds),
            Admission::Rejected => None,
        };
        if let Some(others) = logins.may_log(&attempt.attempt) {
            log(seconds, others);
        }
        let seconds = seconds.ok_or(Undecided::TooMany)?;
        attempt.wait_until(begun + Duration::from_secs(seconds.into()), input, cancel)?;
        Ok(attempt)
    }

    fn wait_until(&self, deadline: Instant, input: BorrowedFd<'_>, cancel: &CancelToken) -> Result<(), Undecided> {
        loop {
            let now = Instant::now();
            if self.logins.lock().table.is_displaced(&self.attempt.id) {
                return Err(Undecided::TooMany);
            }
            if now >= deadline {
                return Ok(());
            }
            let mut descriptors =
                [PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN), PollFd::from_borrowed_fd(input, CLOSED)];
            let _ = poll(&mut descriptors, Some(deadline.min(now + LOOK_INTERVAL)));
            if cancel.is_cancelled() {
                return Err(Undecided::Stopping);
            }
            if !descriptors[1].revents().is_empty() {
                return Err(Undecided::ClientGone);
            }
            // The answer is there at the next look.
            self.logins.ask(&mut self.logins.lock());
        }
    }

    /// Ends the attempt. Without this it is withdrawn.
    pub fn end(mut self, end: AttemptEnd) {
        self.end = end;
    }
}

impl Drop for LoginAttempt {
    fn drop(&mut self) {
        let LoginAttempt { attempt, counted, end, .. } = self;
        let asked = self.logins.change(Change::End { attempt: attempt.clone(), counted: *counted, end: *end });
        // Before the client gets its 535, other processes know of it.
        if *end == AttemptEnd::Failed {
            drop(self.logins.wait(asked, FILE_WAIT));
        }
    }
}

/// What poll(2) reports of a client that has gone, without being asked for input. POLLHUP it reports in any case.
#[cfg(target_os = "linux")]
const CLOSED: PollFlags = PollFlags::RDHUP;
#[cfg(not(target_os = "linux"))]
const CLOSED: PollFlags = PollFlags::empty();

impl Logins {
    /// Whether a delay is logged: the first of its network and its account, then one a minute. Returns how many were not since.
    fn may_log(&self, attempt: &AttemptOrigin) -> Option<usize> {
        let (now, mut state) = (Instant::now(), self.lock());
        let is_recent = |last: &Instant| now.duration_since(*last) < LOG_INTERVAL;
        let is_of = |subject: &Subject| attempt.subjects().contains(subject);
        if state.logged.len() >= LOGGED_LIMIT {
            state.logged.retain(|(_, last, _)| is_recent(last));
        }
        let is_full = state.logged.len() >= LOGGED_LIMIT;
        let mut own: Vec<_> = state.logged.iter_mut().filter(|(subject, ..)| is_of(subject)).collect();
        if is_full || own.iter().any(|(_, last, _)| is_recent(last)) {
            own.iter_mut().for_each(|(.., others)| *others += 1);
            return None;
        }
        let others = own.iter().map(|(.., others)| *others).max().unwrap_or(0);
        state.logged.retain(|(subject, ..)| !is_of(subject));
        state.logged.extend(attempt.subjects().map(|subject| (subject, now, 0)));
        Some(others)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::maildir::lock_state_file;
    use crate::platform;

    const ACME: [u8; 16] = [1; 16];

    fn process(root: &Path) -> Arc<Logins> {
        Arc::new(Logins::new(root, Clock::Fixed))
    }

    /// An attempt by a client that stays.
    fn begin(logins: &Arc<Logins>, id: &str, address: &str) -> Result<LoginAttempt, Undecided> {
        let attempt = AttemptOrigin { id: id.to_owned(), address: address.parse().ok(), account: ACME };
        let (input, _output) = platform::pipe().unwrap();
        LoginAttempt::wait(logins, attempt, input.as_fd(), &CancelToken::new().unwrap(), &|_, _| {})
    }

    #[test]
    fn many_customers_of_one_network_wait_for_each_other_only() {
        let root = tempfile::tempdir().unwrap();
        let logins = process(root.path());
        let log_in = |account: u8| {
            let attempt =
                AttemptOrigin { id: account.to_string(), address: "203.0.113.1".parse().ok(), account: [account; 16] };
            let (input, _output) = platform::pipe().unwrap();
            let log = |_, _| panic!("{account} is delayed");
            LoginAttempt::wait(&logins, attempt, input.as_fd(), &CancelToken::new().unwrap(), &log)
                .unwrap()
                .end(AttemptEnd::Succeeded);
        };
        thread::scope(|scope| (0..60).for_each(|account| drop(scope.spawn(move || log_in(account)))));
        assert!(!logins.lock().table.text().contains("failed"));
    }

    fn is_quick(work: impl FnOnce()) -> bool {
        let begun = Instant::now();
        work();
        begun.elapsed() < Duration::from_millis(900)
    }

    #[test]
    fn processes_count_together_and_a_known_network_is_not_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let [one, other] = [process(root.path()), process(root.path())];
        begin(&one, "a", "203.0.113.1").unwrap().end(AttemptEnd::Succeeded);
        one.synchronise();
        for (logins, id) in [(&other, "b"), (&one, "c"), (&process(root.path()), "d")] {
            assert!(is_quick(|| begin(logins, id, "192.0.2.1").unwrap().end(AttemptEnd::Failed)));
        }
        assert!(!is_quick(|| begin(&other, "e", "192.0.2.1").unwrap().end(AttemptEnd::Failed)));
        let new = process(root.path());
        new.synchronise();
        assert!(new.knows("203.0.113.200".parse().unwrap()) && !new.knows("192.0.2.1".parse().unwrap()));
        assert!(is_quick(|| begin(&new, "f", "203.0.113.1").unwrap().end(AttemptEnd::Succeeded)));
    }

    #[test]
    fn an_ordinary_login_writes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let log_in = || {
            let logins = process(root.path());
            begin(&logins, "a", "203.0.113.1").unwrap().end(AttemptEnd::Succeeded);
            logins.synchronise();
            FileStamp::of(&root.path().join(".odmr/logins").metadata().unwrap())
        };
        assert_eq!(log_in(), log_in());
    }

    #[test]
    fn a_client_that_has_gone_and_a_process_that_ends_wait_no_longer() {
        let root = tempfile::tempdir().unwrap();
        let logins = process(root.path());
        for id in ["a", "b", "c"] {
            begin(&logins, id, "192.0.2.1").unwrap().end(AttemptEnd::Failed);
        }
        for number in 3..9 {
            logins.begin(&attempt(number));
        }
        let (socket, client) = std::os::unix::net::UnixStream::pair().unwrap();
        let cancel = CancelToken::new().unwrap();
        cancel.cancel();
        let wait = |number, cancel: &CancelToken| {
            LoginAttempt::wait(&logins, attempt(number), socket.as_fd(), cancel, &|_, _| {}).err()
        };
        assert_eq!(wait(10, &cancel), Some(Undecided::Stopping));
        drop(client);
        assert_eq!(wait(11, &CancelToken::new().unwrap()), Some(Undecided::ClientGone));
        // Neither has kept a place: there is one more of eight.
        logins.begin(&attempt(12));
        logins.begin(&attempt(13));
        assert_eq!(wait(14, &CancelToken::new().unwrap()), Some(Undecided::TooMany));
    }

    fn attempt(number: u32) -> AttemptOrigin {
        AttemptOrigin { id: number.to_string(), address: "192.0.2.1".parse().ok(), account: ACME }
    }

    /// A disk never delays a login for long.
    #[test]
    fn without_its_file_it_counts_in_memory() {
        let root = tempfile::tempdir().unwrap();
        let lock = lock_state_file(root.path(), "logins.lock").unwrap();
        let logins = process(root.path());
        assert!(is_quick(|| begin(&logins, "a", "203.0.113.1").unwrap().end(AttemptEnd::Succeeded)));
        assert!(logins.knows("203.0.113.1".parse().unwrap()));
        assert!(!root.path().join(".odmr/logins").exists());
        drop(lock);
        begin(&logins, "b", "203.0.113.1").unwrap().end(AttemptEnd::Failed);
        let late = Instant::now() + Duration::from_secs(10);
        while !root.path().join(".odmr/logins").exists() && Instant::now() < late {
            logins.synchronise();
        }
        assert!(root.path().join(".odmr/logins").exists());
        // It is a directory.
        std::fs::remove_file(root.path().join(".odmr/logins")).unwrap();
        std::fs::create_dir(root.path().join(".odmr/logins")).unwrap();
        assert!(is_quick(|| drop(begin(&logins, "c", "203.0.113.1").unwrap())));
    }
}
