//! Calls that macOS or a BSD lacks, or has with other types than Linux.
//!
//! Outside this file, only calls that one system alone has depend on the system: rtnetlink, TCP_QUICKACK, renameat2.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use nix::unistd::Gid;
use rustix::fs::{Mode, OFlags, RawMode};
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketType};

/// Returns the two ends of a pipe, the reading end first. Both are non-blocking and close-on-exec.
///
/// # Errors
///
/// The errors of the system.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    // macOS has no pipe2.
    let (reader, writer) = rustix::pipe::pipe()?;
    Ok((nonblocking(reader)?, nonblocking(writer)?))
}

/// Returns a socket that is non-blocking and close-on-exec.
///
/// # Errors
///
/// The errors of the system.
pub fn socket(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    // macOS has no SOCK_NONBLOCK and no SOCK_CLOEXEC.
    nonblocking(rustix::net::socket(family, kind, None)?)
}

/// Makes a descriptor of this process non-blocking. Do not use it for an inherited one: the flag belongs to the open file,
/// which other processes share.
fn nonblocking(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&descriptor, rustix::fs::fcntl_getfl(&descriptor)? | OFlags::NONBLOCK)?;
    Ok(descriptor)
}

/// Whether connections can be accepted at a socket; on macOS, where it cannot be found out, always true.
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

/// Gives this process the groups of a user, and `group`.
///
/// # Errors
///
/// The errors of the system; on macOS it always fails, because there is no safe call.
#[cfg(not(target_vendor = "apple"))]
pub fn set_groups(user: &CStr, group: Gid) -> io::Result<()> {
    Ok(nix::unistd::initgroups(user, group)?)
}

/// Fails: if only the user were changed, the process would still have the groups of root.
#[cfg(target_vendor = "apple")]
pub fn set_groups(_: &CStr, _: Gid) -> io::Result<()> {
    let text = "this system does not support it; remove `user`, and let launchd start it as that user (UserName)";
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

/// Returns the groups of a user, and `group`; on macOS `group` only.
///
/// # Errors
///
/// The errors of the system.
#[cfg(not(target_vendor = "apple"))]
pub fn groups_of(user: &CStr, group: Gid) -> io::Result<Vec<Gid>> {
    Ok(nix::unistd::getgrouplist(user, group)?)
}

/// Returns `group`: there is no safe call for the others.
#[cfg(target_vendor = "apple")]
pub fn groups_of(_: &CStr, group: Gid) -> io::Result<Vec<Gid>> {
    Ok(vec![group])
}

/// The id of this start of the system, in letters, digits and hyphens; `-` on systems other than Linux, which have none. It
/// is read once: call it before the sandbox forbids to read other files.
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
