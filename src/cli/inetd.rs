//! `odmr serve --inetd`: the one connection that a supervisor (inetd, UCSPI) passes to this process.

use std::fs::File;
use std::io;
use std::net::SocketAddr;

use crate::provider::SupervisedConnection;

impl SupervisedConnection {
    /// Duplicates the descriptors 0 and 1. The client's address is that of the socket; if the supervisor connects this
    /// process by pipes (UCSPI), it is in `TCPREMOTEIP`.
    ///
    /// # Errors
    ///
    /// Descriptor 0 or 1 is closed, or the limit of descriptors is reached.
    pub(super) fn from_supervisor() -> io::Result<SupervisedConnection> {
        let input = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
        let is_socket = rustix::net::sockopt::socket_type(&input).is_ok();
        let output = (!is_socket).then(|| rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)).transpose()?;
        let of_socket = rustix::net::getpeername(&input).ok().flatten();
        let of_socket = of_socket.and_then(|peer| SocketAddr::try_from(peer).ok()).map(|peer| peer.ip());
        let of_supervisor = || std::env::var("TCPREMOTEIP").ok()?.parse().ok();
        Ok(SupervisedConnection { input, output, peer: of_socket.or_else(of_supervisor) })
    }
}

/// Points stderr to `/dev/null` if it is the connection too, as under inetd: the client would read a log line or an error
/// message there as a reply.
///
/// # Errors
///
/// `/dev/null` cannot be opened; stderr is still the connection.
pub(super) fn keep_stderr_out_of_connection() -> io::Result<()> {
    let file = |found: rustix::fs::Stat| (found.st_dev, found.st_ino);
    let Ok(stderr) = rustix::fs::fstat(io::stderr()).map(file) else { return Ok(()) };
    // Two pipes are a connection too (UCSPI): descriptor 1 is the one to the client.
    if [rustix::fs::fstat(io::stdin()), rustix::fs::fstat(io::stdout())]
        .map(|found| found.map(file))
        .contains(&Ok(stderr))
    {
        rustix::stdio::dup2_stderr(File::options().write(true).open("/dev/null")?)?;
    }
    Ok(())
}
