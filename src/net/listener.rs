//! Listeners: one thread for each connection, within limits.
//!
//! The connections of a listener are limited, and so are those from one client, so that no client can use up all
//! threads: see [`ConnectionLimiter`]. Excess connections get 421 (RFC 5321 section 3.1). A panic ends only its connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketType, sockopt};

use crate::log_limit::may_log_event;
use crate::net::cancel::{CancelToken, poll};
use crate::net::limiter::{AcceptedConnection, ConnectionLimiter, NotAdmitted};
use crate::net::trace::{log_no_thread, quoted};
use crate::platform;
use crate::smtp::reply::Reply;
use crate::threads;

/// The pause after accept(2) has failed, usually because the system has no descriptors left.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Serves one connection, in its own thread.
pub type Service = Arc<dyn Fn(&Arc<AcceptedConnection>) + Send + Sync>;

/// Whether an account has authenticated from the network of this address before.
pub type KnownNetworks = Box<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// Connections that may wait for accept(2). The system reduces it to its own limit (somaxconn). With fewer, the clients
/// of a burst would have to send their SYN again, after 1, 3, 7 and 15 s.
const BACKLOG: i32 = i32::MAX;

/// Opens the listening sockets for these addresses, for [`Acceptor::accept`]. `name`: the listener's name in the log.
///
/// `[::]` means IPv6 and IPv4, on every system; IPv6 only if `addresses` has IPv4 addresses of the same port too. If the
/// kernel has no IPv6, `[::]` means IPv4, other IPv6 addresses are left out, and both are logged.
///
/// # Errors
///
/// An address cannot be bound: the text has the address, the cause and what to do.
pub fn bind(name: &str, addresses: &[SocketAddr]) -> io::Result<Vec<TcpListener>> {
    let (mut listeners, mut without_ipv6) = (Vec::new(), None);
    let addresses: Vec<_> = addresses.iter().map(|address| unmapped(*address)).collect();
    for address in &addresses {
        let (port, is_any) = (address.port(), address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let of_ipv4 = |other: &SocketAddr| other.is_ipv4() && port != 0 && other.port() == port;
        let both = is_any && !addresses.iter().any(of_ipv4);
        let wrong = |error: io::Error| bind_error(*address, &error);
        match open(*address, both) {
            Ok(opened) => listeners.extend(opened),
            Err(error) if address.is_ipv6() && is_without_ipv6(&error, is_any) => {
                let consequence = if both { "IPv4 only" } else { "not listening there" };
                log::warn!("event=no-ipv6 listener={name} address={address} consequence={consequence:?}");
                without_ipv6.get_or_insert_with(|| wrong(error));
                if both {
                    listeners.extend(open(any_ipv4(port), false).map_err(wrong)?);
                }
            }
            Err(error) => return Err(wrong(error)),
        }
    }
    match without_ipv6 {
        Some(error) if listeners.is_empty() => {
            let text = format!("{error}: this kernel has no IPv6; add an IPv4 address, such as \"0.0.0.0:25\"");
            Err(io::Error::new(error.kind(), text))
        }
        _ => Ok(listeners),
    }
}

/// Logs that the listener `name` accepts connections at an address. `inherited`: a supervisor has opened the socket. `plain`:
/// the listener's name in the line that programs read.
pub fn log_listening(name: &str, plain: &str, address: SocketAddr, inherited: bool) {
    log::info!("listening {plain} {address}");
    match inherited {
        false => log::info!("event=listening listener={name} address={address}"),
        true => log::info!("event=listening listener={name} address={address} source=supervisor"),
    }
}

fn bind_error(address: SocketAddr, error: &io::Error) -> io::Error {
    let advice = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            ": ports below 1024 need root, the capability CAP_NET_BIND_SERVICE (`setcap cap_net_bind_service=ep` on odmr, or \
             AmbientCapabilities of systemd), or a supervisor that passes them on (LISTEN_FDS)"
        }
        io::ErrorKind::AddrInUse => ": another program listens there; stop it or choose another address",
        io::ErrorKind::AddrNotAvailable if !address.ip().is_unspecified() => {
            ": this machine does not have that address; write one of `ip address`, or \"[::]\" for all"
        }
        _ => "",
    };
    io::Error::new(error.kind(), format!("cannot listen on {address}: {error}{advice}"))
}

/// An IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2) as an IPv4 address: a socket for IPv6 only cannot be bound to it.
fn unmapped(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => (ip, address.port()).into(),
        // The scope of a link-local address stays.
        IpAddr::V6(_) => address,
    }
}

fn any_ipv4(port: u16) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port).into()
}

/// Whether this error of [`open`] means that the kernel has no IPv6. EADDRNOTAVAIL means so for `[::]` (`is_any`) only: this
/// machine may not have another address.
fn is_without_ipv6(error: &io::Error, is_any: bool) -> bool {
    match Errno::from_io_error(error) {
        Some(Errno::AFNOSUPPORT | Errno::PROTONOSUPPORT) => true,
        Some(Errno::ADDRNOTAVAIL) => is_any,
        _ => false,
    }
}

/// Opens the socket for an address. With `both` it accepts IPv4 connections too, or a second socket does.
fn open(address: SocketAddr, both: bool) -> io::Result<Vec<TcpListener>> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    // Non-blocking: if a connection is reset between poll(2) and accept(2), accept(2) must not wait for the next one.
    let socket = platform::socket(family, SocketType::STREAM)?;
    // Otherwise a restart fails while connections of the old process are in TIME-WAIT.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    let mut second = false;
    if address.is_ipv6() {
        // Systems differ in the default: Linux has a sysctl, on FreeBSD and NetBSD it is IPv6 only. OpenBSD permits no other.
        second = both && sockopt::set_ipv6_v6only(&socket, false).is_err();
        if !both {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    let mut listeners = vec![TcpListener::from(socket)];
    if second {
        let port = listeners[0].local_addr()?.port();
        listeners.extend(open(any_ipv4(port), false)?);
    }
    Ok(listeners)
}

/// Accepts the connections of one listener.
pub struct Acceptor {
    /// The listener's name in the log. Connections are limited for each name separately.
    pub name: &'static str,
    /// Whether the server sends a greeting in clear, so that excess connections can get 421 in its place.
    pub greets: bool,
    /// Ends [`Acceptor::accept`].
    pub cancel: CancelToken,
    /// Limits the connections.
    pub limiter: ConnectionLimiter,
    /// The networks for which a part of the connections is reserved; `None`: none is.
    pub known: Option<KnownNetworks>,
}

impl Acceptor {
    /// Accepts connections and serves each in a new thread, until `cancel` is cancelled. `listener`: one of [`bind`].
    pub fn accept(&self, listener: &TcpListener, service: Service) {
        loop {
            let descriptors = [listener.as_fd(), self.cancel.fd()];
            let _ = poll(&mut descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), None);
            if self.cancel.is_cancelled() {
                return;
            }
            while !self.cancel.is_cancelled() && self.accept_one(listener, &service) {}
        }
    }

    /// Accepts one connection. Returns whether another one may wait.
    fn accept_one(&self, listener: &TcpListener, service: &Service) -> bool {
        match listener.accept() {
            Ok((stream, peer)) => self.admit(stream, peer.ip().to_canonical(), service),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // The client has closed the connection before it was accepted.
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                if let Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) = Errno::from_io_error(&error) {
                    self.limiter.relieve(Instant::now());
                }
                if let Some(others) = may_log_event("accept-failed") {
                    let (listener, error) = (self.name, quoted(error));
                    log::warn!("event=accept-failed listener={listener} times={} error={error}", others + 1);
                }
                // The connection stays in the backlog, so poll(2) would return at once.
                self.cancel.wait_until(Some(Instant::now() + ACCEPT_RETRY_PAUSE));
            }
        }
        true
    }

    fn admit(&self, stream: TcpStream, peer: IpAddr, service: &Service) {
        let (name, socket) = (self.name, Arc::new(OwnedFd::from(stream)));
        let (known, now) = (self.known.as_ref().map(|known| known(peer)), Instant::now());
        let permit = match self.limiter.admit(name, &socket, peer, known, now) {
            Ok(permit) => permit,
            Err(reason) => {
                if let Some(others) = self.limiter.may_log(name, peer, now) {
                    log::warn!("event=too-many-connections listener={name} peer={peer} times={}", others + 1);
                }
                return self.reject(&socket, reason);
            }
        };
        let service = service.clone();
        let worker = threads::spawn(&format!("{name}-worker"), move || {
            if catch_unwind(AssertUnwindSafe(|| service(permit.accepted()))).is_err() {
                log::error!("event=panic listener={name} peer={peer}");
            }
            drop(permit);
        });
        if let Err(error) = worker {
            log_no_thread(&error);
            self.limiter.relieve(Instant::now());
            self.reject(&socket, NotAdmitted::Full);
        }
    }

    /// Sends 421, if that is possible without waiting.
    fn reject(&self, socket: &OwnedFd, reason: NotAdmitted) {
        if self.greets {
            let mut octets = Vec::new();
            let enhanced = if reason == NotAdmitted::Full { "4.3.2" } else { "4.7.0" };
            Reply::new(421, enhanced, "Too many connections, try again later").write_to(&mut octets);
            let _ = rustix::net::send(socket, &octets, SendFlags::DONTWAIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn connects(address: IpAddr, port: u16) -> bool {
        TcpStream::connect((address, port)).is_ok()
    }

    #[test]
    fn any_address_means_both_families() {
        let listeners = bind("test", &addresses(&["[::]:0"])).unwrap();
        let port = listeners[0].local_addr().unwrap().port();
        assert!(connects(Ipv4Addr::LOCALHOST.into(), port));
        // A container may have no IPv6.
        if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
            assert!(connects(Ipv6Addr::LOCALHOST.into(), port));
        }
    }

    #[test]
    fn an_ipv4_address_may_be_written_as_ipv6() {
        for text in ["[::ffff:127.0.0.1]:0", "[::ffff:0.0.0.0]:0"] {
            let listeners = bind("test", &addresses(&[text])).unwrap();
            assert!(connects(Ipv4Addr::LOCALHOST.into(), listeners[0].local_addr().unwrap().port()), "{text}");
        }
    }

    /// Linux permits only one socket for an IPv4 address and port.
    #[test]
    fn next_to_ipv4_addresses_any_address_means_ipv6_only() {
        let any_port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        for ipv4 in ["0.0.0.0", "127.0.0.1"] {
            for order in [[0, 1], [1, 0]] {
                let bind_both = |port: u16| {
                    let both = [format!("[::]:{port}"), format!("{ipv4}:{port}")];
                    bind("test", &addresses(&order.map(|at| both[at].as_str()))).map(|listeners| (port, listeners))
                };
                // Another test may get the port first.
                let tries: Vec<_> = (0..10).map(|_| any_port()).collect();
                let (port, listeners) = tries.into_iter().find_map(|port| bind_both(port).ok()).expect("two sockets");
                assert!(listeners.len() == 2 || TcpListener::bind("[::]:0").is_err(), "{ipv4} {order:?}");
                assert!(connects(Ipv4Addr::LOCALHOST.into(), port), "{ipv4} {order:?}");
            }
        }
    }

    #[test]
    fn the_errors_of_a_kernel_without_ipv6_are_known() {
        let error = |errno: Errno| io::Error::from(errno);
        for is_any in [true, false] {
            assert!(is_without_ipv6(&error(Errno::AFNOSUPPORT), is_any));
            assert_eq!(is_without_ipv6(&error(Errno::ADDRNOTAVAIL), is_any), is_any);
            assert!(!is_without_ipv6(&error(Errno::ADDRINUSE), is_any));
        }
    }
}
