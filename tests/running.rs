//! The program at work, for tests that read its log and send it signals.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// The program at work; it is killed when it is dropped.
pub struct Running {
    pub child: Child,
    pub log: BufReader<ChildStderr>,
}

impl Running {
    pub fn start(command: &mut Command) -> Running {
        let mut child = command.env_remove("RUST_LOG").stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Running { child, log }
    }

    /// Reads the log up to the next line that contains `word`.
    pub fn wait_for(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "the log ends before {word:?}");
            if line.contains(word) {
                return line.trim_end().to_owned();
            }
        }
    }

    /// Waits for the line `listening LISTENER ADDRESS`, and returns the address.
    pub fn listening(&mut self, listener: &str) -> String {
        self.wait_for(&format!("listening {listener} ")).rsplit(' ').next().unwrap().to_owned()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().cast_signed()).unwrap(), signal).unwrap();
    }

    /// Waits for its end; `None`: a signal has killed it.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
