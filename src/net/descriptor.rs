//! Reading and writing, with or without waiting, on descriptors of this process and of others.
//!
//! `O_NONBLOCK` belongs to the open file, which processes share. If this process set it on an inherited descriptor (stdin,
//! stdout, or one of a supervisor), the shell and every other program on that terminal or pipe would get EAGAIN, even after
//! the end of this process. If another process has set it, EAGAIN means "not yet" here and is not an error. So the flags of
//! inherited descriptors stay unchanged:
//!
//! | descriptor | how a call is prevented from waiting |
//! |---|---|
//! | made by this process | `O_NONBLOCK` |
//! | inherited socket | `MSG_DONTWAIT` |
//! | any other inherited one | poll(2) first; then it reads once, or writes `PIPE_BUF` octets at most |
//!
//! [`Waiting`] is for threads that may wait.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::pipe::PIPE_BUF;

use crate::net::cancel::poll;

/// A descriptor whose reads and writes never wait: they fail with `WouldBlock` instead.
#[derive(Debug)]
pub struct Descriptor {
    fd: Arc<OwnedFd>,
    kind: DescriptorKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DescriptorKind {
    /// Only this process has it, and it is non-blocking.
    Own,
    /// A socket that another process may have, too.
    SharedSocket,
    /// A pipe, a terminal or a file that another process may have, too.
    SharedFile,
}

impl Descriptor {
    /// A socket that only this process has. It is closed after all its `Arc`s were dropped.
    ///
    /// # Errors
    ///
    /// The socket cannot be made non-blocking.
    pub fn own(fd: Arc<OwnedFd>) -> io::Result<Descriptor> {
        rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Descriptor { fd, kind: DescriptorKind::Own })
    }

    /// A descriptor that another process may have, too. Its flags stay unchanged.
    pub fn shared(fd: OwnedFd) -> Descriptor {
        let is_socket = rustix::net::sockopt::socket_type(&fd).is_ok();
        let kind = if is_socket { DescriptorKind::SharedSocket } else { DescriptorKind::SharedFile };
        Descriptor { fd: fd.into(), kind }
    }

    /// The descriptor, for another owner: it stays open until both are dropped.
    pub fn share(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// Reads into `space` once. Returns the octets that were read; none: the input has ended.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is nothing to read yet; the errors of the system.
    pub fn read<'a>(&self, space: &'a mut [MaybeUninit<u8>]) -> io::Result<&'a [u8]> {
        let (read, _) = match self.kind {
            DescriptorKind::Own => rustix::io::read(&self.fd, space)?,
            DescriptorKind::SharedSocket => rustix::net::recv(&self.fd, space, RecvFlags::DONTWAIT)?.0,
            DescriptorKind::SharedFile => {
                self.check_ready(PollFlags::IN)?;
                rustix::io::read(&self.fd, space)?
            }
        };
        Ok(read)
    }

    /// Fails with `WouldBlock` if a call would wait. A hang-up and an error count as ready, because the call reports them.
    fn check_ready(&self, flag: PollFlags) -> io::Result<()> {
        let mut polls = [PollFd::new(&self.fd, flag)];
        poll(&mut polls, Some(Instant::now()))?;
        if polls[0].revents().is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Write for &Descriptor {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let written = match self.kind {
            DescriptorKind::Own => rustix::io::write(&self.fd, octets)?,
            DescriptorKind::SharedSocket => rustix::net::send(&self.fd, octets, SendFlags::DONTWAIT)?,
            DescriptorKind::SharedFile => {
                self.check_ready(PollFlags::OUT)?;
                // After POLLOUT a pipe has room for this many, so that write(2) does not wait.
                rustix::io::write(&self.fd, &octets[..octets.len().min(PIPE_BUF)])?
            }
        };
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Stdin, stdout or stderr: reads and writes wait, even if another process has made the descriptor non-blocking. There is no
/// buffer.
#[derive(Debug)]
pub struct Waiting<T>(pub T);

impl<T: AsFd> Waiting<T> {
    /// Repeats a call until it does not fail with EAGAIN.
    fn retry<R>(&self, flag: PollFlags, mut call: impl FnMut(BorrowedFd<'_>) -> Result<R, Errno>) -> io::Result<R> {
        loop {
            match call(self.0.as_fd()) {
                Err(Errno::AGAIN) => poll(&mut [PollFd::new(&self.0, flag)], None)?,
                result => return Ok(result?),
            }
        }
    }
}

impl<T: AsFd> Read for Waiting<T> {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        self.retry(PollFlags::IN, |fd| rustix::io::read(fd, &mut *space))
    }
}

impl<T: AsFd> Write for Waiting<T> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.retry(PollFlags::OUT, |fd| rustix::io::write(fd, octets))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.retry(PollFlags::OUT, |fd| rustix::io::writev(fd, slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    fn flags(fd: impl AsFd) -> OFlags {
        rustix::fs::fcntl_getfl(fd).unwrap()
    }

    fn would_block<T: std::fmt::Debug>(result: io::Result<T>) {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe().unwrap()
    }

    fn sockets() -> (OwnedFd, OwnedFd) {
        let (one, other) = UnixStream::pair().unwrap();
        (one.into(), other.into())
    }

    #[test]
    fn calls_on_inherited_descriptors_do_not_wait_and_leave_their_flags() {
        for (reader, writer) in [pipe(), sockets()] {
            for nonblocking in [OFlags::empty(), OFlags::NONBLOCK] {
                for end in [&reader, &writer] {
                    rustix::fs::fcntl_setfl(end, (flags(end) - OFlags::NONBLOCK) | nonblocking).unwrap();
                }
                let before = (flags(&reader), flags(&writer));
                let input = Descriptor::shared(reader.try_clone().unwrap());
                let output = Descriptor::shared(writer.try_clone().unwrap());
                let mut space = [MaybeUninit::uninit(); 512];
                would_block(input.read(&mut space));
                let mut written = 0;
                let full = loop {
                    match (&output).write(&[b'x'; 100_000]) {
                        Ok(count) => written += count,
                        Err(error) => break error,
                    }
                };
                assert!(written >= PIPE_BUF, "{written}");
                assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
                while written > 0 {
                    written -= input.read(&mut space).unwrap().len();
                }
                would_block(input.read(&mut space));
                assert_eq!(before, (flags(&reader), flags(&writer)));
            }
            drop(writer);
            assert!(Descriptor::shared(reader).read(&mut [MaybeUninit::uninit(); 8]).unwrap().is_empty());
        }
    }

    #[test]
    fn waiting_reads_and_writes_wait_on_non_blocking_descriptors() {
        for (reader, writer) in [pipe(), sockets()] {
            for end in [&reader, &writer] {
                rustix::fs::fcntl_setfl(end, flags(end) | OFlags::NONBLOCK).unwrap();
            }
            let before = (flags(&reader), flags(&writer));
            // More than a pipe or a socket holds, read late.
            let content: Vec<u8> = (0..3_000_000).map(|index| (index % 251) as u8).collect();
            let (content, mut received) = (&content, Vec::new());
            thread::scope(|scope| {
                let output = writer.try_clone().unwrap();
                scope.spawn(move || {
                    thread::sleep(Duration::from_millis(20));
                    Waiting(output).write_all(content).unwrap();
                });
                let mut input = Waiting(&reader).take(content.len() as u64);
                input.read_to_end(&mut received).unwrap();
            });
            assert!(received == *content);
            assert_eq!(before, (flags(&reader), flags(&writer)));
        }
    }
}
