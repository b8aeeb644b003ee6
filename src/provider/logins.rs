//! Slows clients that guess secrets, across all processes of a spool.
//!
//! Each AUTH that tries a secret is an attempt under the rules of [`LoginTable`]. The table is in memory and in the
//! file `SPOOL/.odmr/logins`, which `serve` and each process of `serve --inetd` read and replace while they lock
//! `logins.lock`. Only a separate thread uses the disk, and ends when it has nothing to do: if the disk hangs, attempts
//! use the table in memory. The file is not fsynced: if a power cut loses it, the counts begin anew.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::login_table::{Admission, AttemptEnd, AttemptOrigin, ClientNetwork, LoginTable, Subject};
use crate::clock::Clock;
use crate::file_stamp::FileStamp;
use crate::log_limit::{LoggedWarnings, may_log};
use crate::maildir::{replace_file, wait_for_state_file, with_path};
use crate::net::cancel::{CancelToken, poll};
use crate::net::trace::quoted;
use crate::plural::counted;
use crate::threads::{self, Guarded};

/// How long an attempt waits for the file, and the thread for the lock.
const FILE_WAIT: Duration = Duration::from_millis(250);

/// How often a waiting attempt checks whether another has displaced it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum size of the file in octets: more than any table has.
const TABLE_SIZE_LIMIT: u64 = 1 << 20;

/// Changes that are stored in memory while the file cannot be written.
const CHANGES_LIMIT: usize = 256;

/// How long an attempt waits for the open attempts of its network or account.
const CROWD_WAIT: Duration = Duration::from_secs(5);

/// The maximum of subjects with a delay in the log within the interval.
const LOGGED_LIMIT: usize = 1000;

/// A change of the table.
#[derive(Clone)]
enum Change {
    Begin(AttemptOrigin),
    End { attempt: AttemptOrigin, counted: bool, end: AttemptEnd },
}

/// The attempts to authenticate, and the networks from which accounts have authenticated. It outlives reloads.
pub struct Logins {
    root: PathBuf,
    clock: Clock,
    state: Guarded<LoginState>,
    synchronised: Condvar,
}

#[derive(Default)]
struct LoginState {
    /// The table of the file, with all later changes of this process.
    table: LoginTable,
    /// The changes that are not in the file yet, each with its time.
    changes: Vec<(i64, Change)>,
    /// The admissions of attempts that have begun and not read theirs yet, by id.
    admissions: Vec<(String, Admission)>,
    /// The file as it was read or written last.
    stamp: Option<FileStamp>,
    text: String,
    /// The number of the last request to the thread, and of the last request that is done.
    asked: u64,
    done: u64,
    /// Since when the thread works on a request; `None`: it does not run.
    running: Option<Instant>,
    failures_logged: LoggedWarnings<()>,
    delays_logged: LoggedWarnings<Subject>,
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

    /// Replaces the table by that of the file, and repeats the changes that are not in the file. Returns the number of damaged
    /// lines.
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

    /// Whether an account has authenticated from the network of this address. Does not wait for the file.
    pub fn knows(&self, address: IpAddr) -> bool {
        self.state.lock().table.knows(ClientNetwork::of(Some(address)))
    }

    /// Reads the file, and writes the changes that it does not have. Returns when that is done, but after 250 ms at the
    /// latest.
    pub fn synchronise(self: &Arc<Self>) {
        let asked = self.ask(&mut self.state.lock());
        drop(self.wait(asked, FILE_WAIT));
    }

    /// Makes the network of a client known that has authenticated by a certificate, and so without a wait.
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

    /// Waits, for [`CROWD_WAIT`] at most, while other open attempts of the network or account are as many as permitted.
    fn wait_for_others(&self, attempt: &AttemptOrigin, cancel: &CancelToken) {
        let late = Instant::now() + CROWD_WAIT;
        while Instant::now() < late && !cancel.is_cancelled() {
            let is_crowded = |state: &mut LoginState| {
                let now = self.now();
                !state.table.open(attempt, now) && state.table.is_crowded(attempt, now)
            };
            let waiting = self.synchronised.wait_timeout_while(self.state.lock(), LOOK_INTERVAL, is_crowded);
            if !waiting.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
                return;
            }
        }
    }

    fn change(self: &Arc<Self>, change: Change) -> u64 {
        let (now, mut state) = (self.now(), self.state.lock());
        state.apply(now, &change);
        self.synchronised.notify_all();
        state.changes.push((now, change));
        if state.changes.len() > CHANGES_LIMIT {
            state.changes.remove(0);
        }
        self.ask(&mut state)
    }

    /// Has the thread read and write the file. Starts it if it does not run. Returns the number of the request.
    fn ask(self: &Arc<Self>, state: &mut LoginState) -> u64 {
        state.asked += 1;
        if state.running.is_none() {
            let logins = self.clone();
            // If the system has no thread, attempts use the table in memory.
            if threads::spawn("logins", move || logins.run()).is_ok() {
                state.running = Some(Instant::now());
            }
        }
        state.asked
    }

    fn wait(&self, asked: u64, limit: Duration) -> MutexGuard<'_, LoginState> {
        let state = self.state.lock();
        // If the disk hangs, only the first attempt waits for it.
        let left = state.running.map_or(Duration::ZERO, |since| limit.saturating_sub(since.elapsed()));
        let waiting = self.synchronised.wait_timeout_while(state, left, |state| state.done < asked);
        let mut state = waiting.unwrap_or_else(PoisonError::into_inner).0;
        if state.done < asked {
            log_failure(&mut state, &io::Error::other("the disk does not answer"));
        }
        state
    }

    fn now(&self) -> i64 {
        self.clock.now().seconds()
    }

    /// The work of the thread. It ends when no request is left.
    fn run(&self) {
        loop {
            let (asked, has_changes) = {
                let mut state = self.state.lock();
                if state.done >= state.asked {
                    state.running = None;
                    return;
                }
                state.running = Some(Instant::now());
                (state.asked, !state.changes.is_empty())
            };
            let result = self.exchange(has_changes);
            let mut state = self.state.lock();
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
        // Read before an error of the lock returns: a file that cannot be written may be readable.
        let Some(_lock) = lock.transpose()? else { return Ok(()) };
        let path = self.path();
        let (text, written) = {
            let state = self.state.lock();
            (Some(state.table.text()).filter(|text| *text != state.text), state.changes.len())
        };
        if let Some(text) = &text {
            replace_file(&path, text)?;
        }
        let stamp = path.metadata().ok().map(|found| FileStamp::of(&found));
        let mut state = self.state.lock();
        // While the file was written, changes may have been added, and the oldest dropped because there were too many.
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
            if self.state.lock().stamp != stamp {
                file.take(TABLE_SIZE_LIMIT).read_to_end(&mut text)?;
            }
            Ok((text, stamp))
        };
        let (text, stamp) = read().map_err(|error| with_path(&path, error))?;
        let (now, mut state) = (self.now(), self.state.lock());
        let wrong = if state.stamp == stamp { 0 } else { state.read(text, stamp, now) };
        match wrong {
            0 => Ok(()),
            // The other lines count, and the next change replaces the file.
            lines => {
                state.text.clear();
                let text = counted(lines, "line is damaged", "lines are damaged");
                log_failure(&mut state, &with_path(&path, io::Error::other(text)));
                Ok(())
            }
        }
    }
}

fn log_failure(state: &mut LoginState, error: &io::Error) {
    if may_log(&mut state.failures_logged, &[()], usize::MAX, Instant::now()).is_some() {
        log::warn!("event=logins-unusable error={}", quoted(error));
    }
}

/// Why the server does not decide an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Undecided {
    /// Too many attempts wait, or another attempt has displaced this one.
    TooMany,
    /// The process is shutting down.
    Stopping,
    /// The client has closed the connection.
    ClientGone,
}

/// One attempt of a session. If it is dropped without [`LoginAttempt::end`], it is withdrawn.
pub struct LoginAttempt {
    logins: Arc<Logins>,
    attempt: AttemptOrigin,
    counted: bool,
    end: AttemptEnd,
}

impl LoginAttempt {
    /// Begins an attempt, and waits until the server may decide it. `input`: the connection, which is not read. `log` logs
    /// a delay: its seconds, or `None` if too many attempts wait; and the number of delays that were not logged since the
    /// last line.
    ///
    /// # Errors
    /// The reason why the server must not decide the attempt.
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
        let subjects = attempt.attempt.subjects();
        let others = may_log(&mut logins.state.lock().delays_logged, &subjects, LOGGED_LIMIT, Instant::now());
        if let Some(others) = others {
            log(seconds, others);
        }
        let seconds = seconds.ok_or(Undecided::TooMany)?;
        attempt.wait_until(begun + Duration::from_secs(seconds.into()), input, cancel)?;
        Ok(attempt)
    }

    fn wait_until(&self, deadline: Instant, input: BorrowedFd<'_>, cancel: &CancelToken) -> Result<(), Undecided> {
        loop {
            let now = Instant::now();
            if self.logins.state.lock().table.is_displaced(&self.attempt.id) {
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
            // Read the file before the next check: another process may have displaced this attempt.
            self.logins.ask(&mut self.logins.state.lock());
        }
    }

    /// Ends the attempt with this result.
    pub fn end(mut self, end: AttemptEnd) {
        self.end = end;
    }
}

impl Drop for LoginAttempt {
    fn drop(&mut self) {
        let LoginAttempt { attempt, counted, end, .. } = self;
        let asked = self.logins.change(Change::End { attempt: attempt.clone(), counted: *counted, end: *end });
        // Wait for the file before the client gets its 535: otherwise it could guess faster in other processes.
        if *end == AttemptEnd::Failed {
            drop(self.logins.wait(asked, FILE_WAIT));
        }
    }
}

/// The event of poll(2) for a client that has closed its side. POLLHUP is reported in any case.
#[cfg(target_os = "linux")]
const CLOSED: PollFlags = PollFlags::RDHUP;
#[cfg(not(target_os = "linux"))]
const CLOSED: PollFlags = PollFlags::empty();

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::thread;

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
    fn many_customers_in_one_network_log_in_without_a_delay() {
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
        assert!(!logins.state.lock().table.text().contains("failed"));
    }

    fn is_quick(work: impl FnOnce()) -> bool {
        let begun = Instant::now();
        work();
        begun.elapsed() < Duration::from_millis(900)
    }

    #[test]
    fn processes_count_together_and_known_networks_survive_a_restart() {
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
    fn a_login_from_a_known_network_writes_nothing() {
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
    fn the_wait_ends_when_the_client_closes_the_connection_or_the_process_stops() {
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
        // Both have left: of eight places, two are free.
        logins.begin(&attempt(12));
        logins.begin(&attempt(13));
        assert_eq!(wait(14, &CancelToken::new().unwrap()), Some(Undecided::TooMany));
    }

    fn attempt(number: u32) -> AttemptOrigin {
        AttemptOrigin { id: number.to_string(), address: "192.0.2.1".parse().ok(), account: ACME }
    }

    /// A slow disk must not delay logins.
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
        // A directory in place of the file.
        std::fs::remove_file(root.path().join(".odmr/logins")).unwrap();
        std::fs::create_dir(root.path().join(".odmr/logins")).unwrap();
        assert!(is_quick(|| drop(begin(&logins, "c", "203.0.113.1").unwrap())));
    }
}
