//! Descriptors that a supervisor has opened for this process and passes by their numbers: listening sockets by the
//! protocol of sd_listen_fds(3), and the pipe of `--ready-fd`.
//!
//! A number does not prove that a descriptor is open, so safe code cannot make an `OwnedFd` of it. But a socket can carry the
//! descriptor of a number (`SCM_RIGHTS`), and an owned duplicate arrives. That works with any kind of descriptor, on every
//! system.

use std::env;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketType, recvmsg, sockopt};

use crate::platform;

/// The number of the first socket (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// Takes over the descriptors of these numbers: returns a duplicate of each, and closes the numbers. Call it before this
/// process opens descriptors: if the supervisor has passed none, one of ours could have such a number.
///
/// # Errors
///
/// The first number that cannot be used, and why; `EBADF`: it is not open.
fn take_numbers(numbers: &[RawFd]) -> Result<Vec<OwnedFd>, (RawFd, io::Error)> {
    let mut taken: Vec<OwnedFd> = Vec::new();
    let pair = UnixDatagram::pair().map_err(|error| (-1, error))?;
    for &number in numbers {
        // A number of a descriptor that was opened here was not passed.
        let own = [pair.0.as_raw_fd(), pair.1.as_raw_fd()].contains(&number);
        let own = own || taken.iter().any(|descriptor| descriptor.as_raw_fd() == number);
        let duplicate = if own { Err(Errno::EBADF.into()) } else { duplicate(number, &pair) };
        taken.push(duplicate.map_err(|error| (number, error))?);
    }
    numbers.iter().try_for_each(|&number| nix::unistd::close(number).map_err(|error| (number, error.into())))?;
    Ok(taken)
}

/// Sends a descriptor through a pair of sockets.
fn duplicate(number: RawFd, (sender, receiver): &(UnixDatagram, UnixDatagram)) -> io::Result<OwnedFd> {
    let (octet, numbers) = ([IoSlice::new(&[0])], [number]);
    sendmsg::<()>(sender.as_raw_fd(), &octet, &[ControlMessage::ScmRights(&numbers)], MsgFlags::empty(), None)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let (mut octet, mut messages) = ([0], RecvAncillaryBuffer::new(&mut space));
    recvmsg(receiver, &mut [IoSliceMut::new(&mut octet)], &mut messages, RecvFlags::empty())?;
    let received = messages.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let descriptor = received.ok_or(io::ErrorKind::UnexpectedEof)?;
    // macOS has no MSG_CMSG_CLOEXEC.
    rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC)?;
    Ok(descriptor)
}

/// Why a descriptor of a supervisor cannot be used.
#[derive(Debug)]
pub enum TakeError {
    /// The descriptor of `--ready-fd`.
    ReadyFd(io::Error),
    /// The variables `LISTEN_…` or the sockets that they count; the text has the cause.
    Sockets(String),
}

/// Takes over the descriptors that a supervisor has passed: the sockets that `LISTEN_FDS` counts, if `LISTEN_PID` is this
/// process, and the one of `--ready-fd`, `ready`. Call it before this process opens descriptors.
///
/// # Errors
///
/// A descriptor cannot be used, or the variables are not valid.
pub fn take(ready: Option<RawFd>) -> Result<(PassedSockets, Option<OwnedFd>), TakeError> {
    let variable = |name: &str| env::var(name).ok();
    let is_ours = variable("LISTEN_PID").and_then(|process| process.parse().ok()) == Some(std::process::id());
    let count = variable("LISTEN_FDS").filter(|_| is_ours).unwrap_or_else(|| "0".to_owned());
    let wrong = |text: String| TakeError::Sockets(text);
    let number =
        count.parse::<u16>().map_err(|_| wrong(format!("LISTEN_FDS is {count:?}, not a number of sockets")))?;
    let numbers: Vec<_> = (FIRST..).take(number.into()).chain(ready).collect();
    let mut sockets = take_numbers(&numbers).map_err(|(number, error)| match ready == Some(number) {
        true => TakeError::ReadyFd(error),
        false => wrong(format!("LISTEN_FDS is {count}, and the descriptor {number} cannot be used: {error}")),
    })?;
    let pipe = ready.and_then(|_| sockets.pop());
    let names = variable("LISTEN_FDNAMES").filter(|_| !sockets.is_empty());
    let names = names.map(|names| names.split(':').map(str::to_owned).collect::<Vec<_>>());
    match &names {
        Some(names) if names.len() != sockets.len() => {
            Err(wrong(format!("LISTEN_FDNAMES has {} names for {count} sockets: pass one for each", names.len())))
        }
        _ => Ok((PassedSockets { sockets, names }, pipe)),
    }
}

/// The sockets that a supervisor has passed, before the configuration is known.
#[derive(Debug, Default)]
pub struct PassedSockets {
    sockets: Vec<OwnedFd>,
    /// The name of each; `None`: the supervisor has passed no names.
    names: Option<Vec<String>>,
}

impl PassedSockets {
    /// Assigns each socket to the listener of its name. `known`: the names of the listeners of this program. `only`: the
    /// listener of a single socket without a name.
    ///
    /// # Errors
    ///
    /// A name is missing or unknown, or a socket is of the wrong kind; the text has the remedy.
    pub fn into_listeners(self, known: &[&str], only: Option<&str>) -> Result<InheritedListeners, String> {
        let known_names = match known {
            [one] => (*one).to_owned(),
            [first @ .., last] => format!("{} or {last}", first.join(", ")),
            [] => String::new(),
        };
        let advice = format!(
            "write FileDescriptorName={known_names} in its .socket unit (--fdname= of systemd-socket-activate)"
        );
        let PassedSockets { sockets, names } = self;
        let names = match (names, only, sockets.len()) {
            (Some(names), ..) => names,
            (None, Some(only), 1) => vec![only.to_owned()],
            (None, _, 0) => Vec::new(),
            (None, _, count) => {
                return Err(format!("{count} sockets have been passed without names; for each {advice}"));
            }
        };
        let mut listeners = Vec::new();
        for (number, (name, socket)) in (FIRST..).zip(names.into_iter().zip(sockets)) {
            if !known.contains(&name.as_str()) {
                return Err(format!("the socket {name:?}, descriptor {number}, is for no listener; {advice}"));
            }
            let listener = listening(socket).map_err(|what| {
                format!(
                    "the socket {name:?}, descriptor {number}, is {what}: write ListenStream= with a TCP port, and \
                     Accept=no, in the .socket unit"
                )
            })?;
            listeners.push((name, listener));
        }
        Ok(InheritedListeners(listeners))
    }
}

/// Checks that TCP connections can be accepted at a socket, and makes it non-blocking, as [`Acceptor`] needs it.
///
/// [`Acceptor`]: super::listener::Acceptor
fn listening(socket: OwnedFd) -> Result<TcpListener, &'static str> {
    let address = rustix::net::getsockname(&socket).map_err(|_| "not a socket")?;
    if SocketAddr::try_from(address).is_err() || sockopt::socket_type(&socket) != Ok(SocketType::STREAM) {
        return Err("not a TCP socket");
    }
    if !platform::is_listening(&socket) {
        return Err("not listening");
    }
    let flags = rustix::fs::fcntl_getfl(&socket).map_err(|_| "not usable")?;
    rustix::fs::fcntl_setfl(&socket, flags | OFlags::NONBLOCK).map_err(|_| "not usable")?;
    Ok(socket.into())
}

/// The listening sockets that a supervisor has passed, with the names of their listeners.
#[derive(Debug, Default)]
pub struct InheritedListeners(Vec<(String, TcpListener)>);

impl InheritedListeners {
    /// Whether the supervisor has passed sockets for this listener.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(other, _)| other == name)
    }

    /// Removes and returns the sockets of one listener; empty if the supervisor has passed none.
    pub fn take(&mut self, name: &str) -> Vec<TcpListener> {
        self.0.extract_if(.., |(other, _)| other == name).map(|(_, listener)| listener).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::UdpSocket;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixListener;

    use rustix::net::AddressFamily;

    const KNOWN: [&str; 3] = ["inbound", "odmr", "odmr-tls"];

    fn passed(sockets: Vec<OwnedFd>, names: Option<&[&str]>) -> PassedSockets {
        let names = names.map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        PassedSockets { sockets, names }
    }

    fn tcp() -> OwnedFd {
        TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    #[test]
    fn descriptors_of_any_kind_are_taken_over_by_their_numbers() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut taken = take_numbers(&[listener.into_raw_fd(), writer.into_raw_fd()]).unwrap();
        let writer = taken.pop().unwrap();
        assert!(rustix::io::fcntl_getfd(&writer).unwrap().contains(FdFlags::CLOEXEC));
        File::from(writer).write_all(b"\n").unwrap();
        // The number is closed too: the pipe has ended.
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"\n");
        assert_eq!(TcpListener::from(taken.pop().unwrap()).local_addr().unwrap(), address);
        let (number, error) = take_numbers(&[4_000_000]).unwrap_err();
        assert_eq!((number, error.raw_os_error()), (4_000_000, Some(Errno::EBADF as i32)));
    }

    #[test]
    fn sockets_go_to_the_listeners_of_their_names() {
        let names = ["odmr", "inbound", "odmr"];
        let mut listeners = passed(vec![tcp(), tcp(), tcp()], Some(&names)).into_listeners(&KNOWN, None).unwrap();
        assert!(listeners.has("odmr") && !listeners.has("odmr-tls"));
        assert_eq!([2, 1, 0, 0], ["odmr", "inbound", "odmr-tls", "odmr"].map(|name| listeners.take(name).len()));
        let only = passed(vec![tcp()], None).into_listeners(&KNOWN, Some("odmr")).unwrap();
        assert!(only.has("odmr"));
        assert!(passed(Vec::new(), None).into_listeners(&KNOWN, None).is_ok());
    }

    #[test]
    fn wrong_sockets_are_errors_that_say_what_to_write() {
        let error = |socket: OwnedFd, names: Option<&[&str]>| {
            passed(vec![socket], names).into_listeners(&KNOWN, None).unwrap_err()
        };
        let name = "write FileDescriptorName=inbound, odmr or odmr-tls in its .socket unit";
        assert!(error(tcp(), None).contains(name));
        let unknown = error(tcp(), Some(&["odmr.socket"]));
        assert!(unknown.contains(name) && unknown.contains("\"odmr.socket\", descriptor 3"), "{unknown}");
        let directory = tempfile::tempdir().unwrap();
        let of_unix = UnixListener::bind(directory.path().join("socket")).unwrap();
        let others = [
            (OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap()), "not a TCP socket"),
            (of_unix.into(), "not a TCP socket"),
            (std::io::pipe().unwrap().0.into(), "not a socket"),
            (rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap(), "not listening"),
        ];
        for (socket, what) in others {
            let text = error(socket, Some(&["odmr"]));
            assert!(text.contains(what) && text.contains("write ListenStream= with a TCP port"), "{text}");
        }
    }
}
