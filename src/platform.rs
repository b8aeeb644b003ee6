//! What Unix systems do differently: the calls that Linux has and macOS or a BSD lacks, or has with other types.
//!
//! Elsewhere the program asks which system it runs on only for what exists on one system alone: rtnetlink, TCP_QUICKACK,
//! renameat2.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use nix::unistd::Gid;
use rustix::fs::{Mode, OFlags, RawMode};
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketType};

/// Returns the two ends of a pipe, the one to read from first. Both are non-blocking, and no program that is executed
/// inherits them.
///
/// # Errors
///
/// The system's.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    // macOS has no pipe2.
    let (reader, writer) = rustix::pipe::pipe()?;
    Ok((nonblocking(reader)?, nonblocking(writer)?))
}

/// Returns a socket that is non-blocking, and that no program that is executed inherits.
///
/// # Errors
///
/// The system's.
pub fn socket(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    // macOS has no SOCK_NONBLOCK and no SOCK_CLOEXEC.
    nonblocking(rustix::net::socket(family, kind, None)?)
}

/// For descriptors that this process has made: the flag belongs to the description, which other processes may share.
fn nonblocking(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&descriptor, rustix::fs::fcntl_getfl(&descriptor)? | OFlags::NONBLOCK)?;
    Ok(descriptor)
}

/// Whether connections can be accepted at a socket; always true on macOS, which cannot tell.
pub fn is_listening(socket: &OwnedFd) -> bool {
    #[cfg(not(target_vendor = "apple"))]
    return rustix::net::sockopt::socket_acceptconn(socket).unwrap_or(true);
    #[cfg(target_vendor = "apple")]
    {
        let _ = socket;
        true
    }
}

/// Sets the umask of this process.
pub fn set_umask(mask: u32) {
    // The type has 16 bits on the BSDs and macOS; a umask has nine.
    rustix::process::umask(Mode::from_raw_mode(mask as RawMode));
}

/// Gives this process the groups of a user, `group` among them.
///
/// # Errors
///
/// The system's; on macOS always, as no safe call does it there.
#[cfg(not(target_vendor = "apple"))]
pub fn set_groups(user: &CStr, group: Gid) -> io::Result<()> {
    Ok(nix::unistd::initgroups(user, group)?)
}

/// Fails: with the user alone changed, the process would keep the groups of root.
#[cfg(target_vendor = "apple")]
pub fn set_groups(_: &CStr, _: Gid) -> io::Result<()> {
    let text = "this system does not support it; remove `user`, and let launchd start it as that user (UserName)";
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

/// Returns the groups of a user, `group` among them; on macOS that one alone.
///
/// # Errors
///
/// The system's.
#[cfg(not(target_vendor = "apple"))]
pub fn groups_of(user: &CStr, group: Gid) -> io::Result<Vec<Gid>> {
    Ok(nix::unistd::getgrouplist(user, group)?)
}

/// Returns `group`: no safe call finds the others.
#[cfg(target_vendor = "apple")]
pub fn groups_of(_: &CStr, group: Gid) -> io::Result<Vec<Gid>> {
    Ok(vec![group])
}

/// Which start of the system this is, in letters, digits and hyphens; `-`: it does not tell, as only Linux does. It is read
/// once, so call it before this process may read no other files.
pub fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let is_plain = |id: &&str| id.len() == 36 && id.bytes().all(|octet| octet.is_ascii_hexdigit() || octet == b'-');
        Some(id.trim()).filter(is_plain).unwrap_or("-").to_owned()
    })
}

/// Makes a FIFO, for tests: macOS has no mkfifoat.
#[cfg(test)]
pub(crate) fn make_fifo(path: &std::path::Path) {
    let made = std::process::Command::new("mkfifo").args(["-m", "400"]).arg(path).status().unwrap();
    assert!(made.success(), "{}", path.display());
}
