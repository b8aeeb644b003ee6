//! `odmr serve --inetd`: the one connection that a supervisor (inetd, UCSPI) passes to this process.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use super::exit::ExitError;
use crate::provider::Listener;

/// The connection that a supervisor passes.
pub(super) struct SupervisedConnection {
    /// Descriptor 0.
    pub input: OwnedFd,
    /// Descriptor 1, unless descriptor 0 is a socket and serves both ways.
    pub output: Option<OwnedFd>,
    /// The address of the client, if it is known.
    pub peer: Option<IpAddr>,
}

impl SupervisedConnection {
    /// Duplicates the descriptors 0 and 1. If another program stands between this one and the socket (UCSPI), descriptor 0
    /// has no peer, and `TCPREMOTEIP` names the client.
    ///
    /// # Errors
    ///
    /// The descriptors are closed, or there are too many.
    pub fn from_supervisor() -> io::Result<SupervisedConnection> {
        let input = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
        let is_socket = rustix::net::sockopt::socket_type(&input).is_ok();
        let output = match is_socket {
            true => None,
            false => Some(rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)?),
        };
        let by_socket = rustix::net::getpeername(&input).ok().flatten();
        let by_socket = by_socket.and_then(|peer| SocketAddr::try_from(peer).ok()).map(|peer| peer.ip());
        let by_name = || std::env::var("TCPREMOTEIP").ok()?.parse().ok();
        Ok(SupervisedConnection { input, output, peer: by_socket.or_else(by_name) })
    }
}

/// The listener that `--inetd` names.
///
/// # Errors
///
/// The name is neither `odmr` nor `inbound`.
pub(super) fn listener(name: &str) -> Result<Listener, ExitError> {
    match name {
        "odmr" => Ok(Listener::Odmr),
        "inbound" => Ok(Listener::Inbound),
        _ => Err(ExitError::usage(format!("--inetd is odmr or inbound, not {name}"), "odmr serve -h")),
    }
}

/// Points stderr to `/dev/null` if it is the connection too, as under inetd: a log line or an error message there would
/// be read by the client as a reply.
///
/// # Errors
///
/// `/dev/null` cannot be opened; stderr may still be the connection.
pub(super) fn keep_stderr_out_of_connection() -> io::Result<()> {
    let (Ok(stderr), Ok(stdin)) = (rustix::fs::fstat(io::stderr()), rustix::fs::fstat(io::stdin())) else {
        return Ok(());
    };
    if (stderr.st_dev, stderr.st_ino) == (stdin.st_dev, stdin.st_ino) {
        rustix::stdio::dup2_stderr(File::options().write(true).open("/dev/null")?)?;
    }
    Ok(())
}
