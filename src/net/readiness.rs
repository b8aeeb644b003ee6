//! The reports of a daemon to its supervisor: that it is ready, reloads, or stops.
//!
//! systemd and others read them on a socket (`NOTIFY_SOCKET`, sd_notify(3)); s6 waits for a newline on a descriptor
//! (`--ready-fd`). This program executes no other program, so none inherits the variable.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::clock::monotonic_microseconds;
use crate::net::trace::quoted;
use crate::threads::Guarded;

/// How long a report waits for the supervisor to read earlier ones.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Reports to the supervisor, if it asks for reports. A report that fails is logged.
#[derive(Debug, Default)]
pub struct Readiness {
    /// The address of the socket: a path, or `@` and an abstract name (unix(7)).
    socket: Option<String>,
    /// The descriptor of `--ready-fd`; closed after the newline.
    pipe: Guarded<Option<File>>,
}

impl Readiness {
    /// Reads `NOTIFY_SOCKET`. `pipe`: the descriptor that gets a newline.
    pub fn new(pipe: Option<OwnedFd>) -> Readiness {
        let socket = env::var("NOTIFY_SOCKET").ok().filter(|address| !address.is_empty());
        Readiness { socket, pipe: Guarded::new(pipe.map(File::from)) }
    }

    /// Reports that the listeners accept connections, after the start or a reload.
    pub fn ready(&self) {
        let pipe = self.pipe.lock().take();
        if let Some(mut pipe) = pipe
            && let Err(error) = pipe.write_all(b"\n")
        {
            log_failure(&error);
        }
        self.send("READY=1");
    }

    /// Reports that the configuration is being read again.
    pub fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_microseconds()));
    }

    /// Reports that the program ends.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, text: &str) {
        let Some(address) = &self.socket else { return };
        let sent = UnixDatagram::unbound().and_then(|socket| {
            connect(&socket, address)?;
            socket.set_write_timeout(Some(SEND_TIMEOUT))?;
            socket.send(text.as_bytes())
        });
        if let Err(error) = sent {
            log_failure(&error);
        }
    }
}

fn connect(socket: &UnixDatagram, address: &str) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if let Some(name) = address.strip_prefix('@') {
        use std::os::linux::net::SocketAddrExt;
        return socket.connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?);
    }
    socket.connect(address)
}

fn log_failure(error: &io::Error) {
    log::warn!("event=notify-failed error={}", quoted(error));
}
