//! A running program, for tests that read its log and send it signals; and an SMTP client.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use odmr::sasl::{Login, Mechanism, TlsChannel};
use rustix::process::{Pid, Signal, kill_process};

/// A running program. It is killed when this is dropped.
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

    /// `/proc/PID/task/TID/status` of all threads, except those that end meanwhile.
    pub fn thread_statuses(&self) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        threads.filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).ok()).collect()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().cast_signed()).unwrap(), signal).unwrap();
    }

    /// Waits for the end of the program. Returns the exit code; `None`: a signal has killed it.
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

/// An SMTP client.
pub struct Client(BufReader<TcpStream>);

impl Client {
    pub fn connect(address: &str) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut client = Client(BufReader::new(stream));
        assert!(client.reply().starts_with("220 "));
        assert!(client.command("EHLO client.example").starts_with("250 "));
        client
    }

    /// The last line of the next reply.
    pub fn reply(&mut self) -> String {
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            if line.get(3..4) != Some("-") {
                return line;
            }
        }
    }

    pub fn command(&mut self, line: &str) -> String {
        self.0.get_ref().write_all(format!("{line}\r\n").as_bytes()).unwrap();
        self.reply()
    }

    /// Authenticates by CRAM-MD5. Returns the last reply.
    pub fn authenticate(&mut self, name: &str, secret: &str) -> String {
        let challenge = self.command("AUTH CRAM-MD5");
        let challenge = data_encoding::BASE64.decode(&challenge.trim_end().as_bytes()[4..]).unwrap();
        let login = Login::with_secret(name.to_owned(), secret.into());
        let channel = TlsChannel::default();
        let client = Mechanism::CramMd5.client(&login, &channel, &Mechanism::ALL, String::new());
        self.command(&data_encoding::BASE64.encode(&client.unwrap().step(&challenge).unwrap()))
    }

    /// Authenticates by SCRAM-SHA-256. Returns the last reply.
    pub fn authenticate_by_scram(&mut self, name: &str, secret: &str) -> String {
        let login = Login::with_secret(name.to_owned(), secret.into());
        let (channel, nonce) = (TlsChannel::default(), "abc".to_owned());
        let mut client = Mechanism::ScramSha256.client(&login, &channel, &Mechanism::ALL, nonce).unwrap();
        let initial = data_encoding::BASE64.encode(&client.initial().unwrap());
        let mut reply = self.command(&format!("AUTH SCRAM-SHA-256 {initial}"));
        while let Some(challenge) = reply.strip_prefix("334 ") {
            let challenge = data_encoding::BASE64.decode(challenge.trim_end().as_bytes()).unwrap();
            reply = self.command(&data_encoding::BASE64.encode(&client.step(&challenge).unwrap()));
        }
        reply
    }

    /// Sends a message with this many lines of 80 octets. Returns the reply to its content.
    pub fn send(&mut self, from: &str, to: &str, lines: usize) -> String {
        assert!(self.command(&format!("MAIL FROM:<{from}>")).starts_with("250 "));
        assert!(self.command(&format!("RCPT TO:<{to}>")).starts_with("250 "));
        assert!(self.command("DATA").starts_with("354 "));
        self.command(&format!(
            "Subject: x\r\n\r\n{}.",
            (String::from_utf8(vec![b'x'; 78]).unwrap() + "\r\n").repeat(lines)
        ))
    }

    /// Begins a new transaction with this recipient. Returns the reply to RCPT.
    pub fn rcpt(&mut self, to: &str) -> String {
        self.command("RSET");
        assert!(self.command("MAIL FROM:<a@b.example>").starts_with("250 "));
        self.command(&format!("RCPT TO:<{to}>"))
    }
}
