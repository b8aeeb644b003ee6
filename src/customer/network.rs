//! Watches for a new address or route of this machine: after it, a call that has failed may succeed.
//!
//! On Linux the kernel reports them (rtnetlink(7)). On other systems the daemon calls by the schedule only.

use crate::net::cancel::CancelToken;

/// Calls `notify` after new addresses or routes, in a new thread, until it is cancelled. If the kernel does not report
/// them, that is logged.
#[cfg(target_os = "linux")]
pub fn watch(notify: impl Fn() + Send + 'static, cancel: &CancelToken) {
    let cancel = cancel.clone();
    let watched = linux::socket().and_then(|socket| {
        let work = move || linux::listen(&socket, &notify, &cancel);
        crate::threads::spawn("network", work)
    });
    if let Err(error) = watched {
        log::info!("event=network-not-watched error={}", crate::net::trace::quoted(error));
    }
}

/// Does nothing: this system does not report new addresses.
#[cfg(not(target_os = "linux"))]
pub fn watch(_: impl Fn() + Send + 'static, _: &CancelToken) {}

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::event::{PollFd, PollFlags};
    use rustix::net::netlink::SocketAddrNetlink;
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

    use crate::net::cancel::CancelToken;

    /// RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE.
    const GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400;

    /// RTM_NEWADDR and RTM_NEWROUTE, the types of netlink messages (netlink(7)).
    const NEW: [u16; 2] = [20, 24];

    /// A socket that receives a message for each change.
    pub fn socket() -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(socket)
    }

    /// Receives until it is cancelled.
    pub fn listen(socket: &OwnedFd, notify: &dyn Fn(), cancel: &CancelToken) {
        while !cancel.is_cancelled() {
            let mut polls = [
                PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN),
            ];
            let _ = rustix::event::poll(&mut polls, None);
            let (mut message, mut new) = ([0; 8192], false);
            loop {
                match rustix::net::recv(socket, &mut message[..], RecvFlags::empty()) {
                    Ok((octets, _)) => new |= is_new(&message[..octets]),
                    // The buffer was full, and messages were lost: they may have reported a new address.
                    Err(rustix::io::Errno::NOBUFS) => new = true,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(_) => break,
                }
            }
            if new {
                notify();
            }
        }
    }

    fn is_new(message: &[u8]) -> bool {
        message.get(4..6).is_some_and(|kind| NEW.contains(&u16::from_ne_bytes([kind[0], kind[1]])))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn new_addresses_and_routes_are_recognised() {
            let message = |kind: u16| [&16_u32.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]].concat();
            for (kind, new) in [(20, true), (24, true), (21, false), (25, false), (3, false)] {
                assert_eq!(is_new(&message(kind)), new, "{kind}");
            }
            assert!(!is_new(&[]) && !is_new(&[0; 5]));
        }
    }
}
