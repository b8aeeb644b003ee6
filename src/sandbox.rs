//! Restrictions of this process after its start, to limit the damage if a peer exploits a defect: no new privileges, no core
//! dumps with secrets, and no files outside the configured directories.
//!
//! ```text
//!           no new privileges, no core dumps    files
//! Linux     prctl(2)                            Landlock, from Linux 5.19 on
//! FreeBSD   procctl(2)                          -
//! others    RLIMIT_CORE                         -
//! ```
//!
//! pledge(2) and unveil(2) of OpenBSD are not used, because they are calls of its libc and this crate has no unsafe code. A
//! crate for them would be used here, with the directories that Landlock gets. Capsicum cannot be used: after cap_enter(2) no
//! file can be opened by its path, and this program opens all files by path.
//!
//! Landlock restricts files only. Connections, also to sockets that are files (LMTP, syslogd, supervisors), and signals
//! are not restricted. No program is executed. The rules are for directories with all their files, because files are
//! replaced by others of the same name: certificates, resolv.conf, the files of customers. The process may read each
//! directory in which it has read an administrator's file before ([`note_file`]) and those of the system's files, and
//! write the directories of mail. A directory that is replaced by another one (a symbolic link that was changed,
//! another file system in its place) is outside: then the process must be restarted, as the error reports
//! ([`explain`]).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::threads::Guarded;

/// Directories that the C library, the TLS library and the time library read: names, servers, certificates, time zones, and
/// the modules of the name service switch (nsswitch.conf), which are libraries, with their data.
const SYSTEM_DIRECTORIES: [&str; 13] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/opt/etc",
    "/opt/lib",
    "/nix/store",
    "/gnu/store",
    "/var/ssl",
    "/var/lib/ca-certificates",
    "/var/lib/sss",
    "/var/lib/libvirt/dnsmasq",
];

/// Files and directories of the system that may be symbolic links to other places.
const SYSTEM_FILES: [&str; 8] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/localtime",
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
];

/// Variables of the environment with the paths of such files.
const SYSTEM_VARIABLES: [&str; 6] = ["SSL_CERT_FILE", "SSL_CERT_DIR", "TZ", "TZDIR", "HOSTALIASES", "LD_LIBRARY_PATH"];

/// Symbolic links that are followed from one name, as by the kernel (path_resolution(7)).
const LINKS_LIMIT: usize = 40;

/// The text of an error about a path outside.
const OUTSIDE: &str = "it is outside the directories that this process may use since its start: restart it";

/// The directories in which this process has read files of an administrator.
static NOTED: Guarded<BTreeSet<PathBuf>> = Guarded::new(BTreeSet::new());

/// The directories that this process may use; empty: there is no restriction.
static PERMITTED: OnceLock<Permitted> = OnceLock::new();

struct Permitted {
    readable: Vec<Directory>,
    writable: Vec<Directory>,
    /// The writable directories, open so that autofs does not unmount an idle one: mounted again, it would be another directory.
    _open: Vec<File>,
}

/// A directory as it was at the start: the kernel permits this directory, and not another one that gets its name.
struct Directory {
    /// The path without symbolic links.
    path: PathBuf,
    inode: Option<(u64, u64)>,
}

impl Directory {
    fn new(path: PathBuf) -> Directory {
        Directory { inode: inode(&path), path }
    }

    fn has(&self, path: &Path) -> bool {
        path.starts_with(&self.path) && inode(&self.path) == self.inode
    }
}

impl AsRef<Path> for Directory {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// A directory of mail, in which this process writes files.
pub struct MailDirectory {
    pub path: PathBuf,
    /// The number of levels below it that may have symbolic links to other directories.
    pub depth: usize,
}

/// Gives up rights that no subcommand needs: executed programs get no new privileges, and neither a core dump nor a debugger
/// of the same user can read the secrets in memory. Call it before there are threads, and again after the process has become
/// another user, because the system then permits core dumps again.
pub fn harden() {
    // Errors are ignored: a container may forbid these calls, and the program works without them.
    #[cfg(target_os = "linux")]
    {
        let _ = rustix::thread::set_no_new_privs(true);
        let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    }
    #[cfg(target_os = "freebsd")]
    {
        let _ = rustix::process::set_no_new_privs(None);
        let _ = rustix::process::set_dumpable_behavior(None, rustix::process::DumpableBehavior::NotDumpable);
    }
    #[cfg(not(any(target_os = "linux", target_os = "freebsd")))]
    {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    }
}

/// Notes that this file of an administrator, and others that get its name, may be read again: permits its directory, and those
/// to which symbolic links lead.
pub fn note_file(path: &Path) {
    if PERMITTED.get().is_none() {
        add_places(&mut NOTED.lock(), path);
    }
}

/// Notes that the files of a directory may be read again.
pub fn note_directory(path: &Path) {
    if PERMITTED.get().is_none() {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        NOTED.lock().insert(path);
    }
}

/// Adds the directories in which a file is looked up.
fn add_places(places: &mut BTreeSet<PathBuf>, path: &Path) {
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for _ in 0..LINKS_LIMIT {
        let Some(directory) = path.parent().map(Path::to_owned) else { return };
        let target = fs::read_link(&path);
        if !places.contains(&directory) {
            places.insert(directory.clone());
        }
        match target {
            Ok(target) => path = directory.join(target),
            Err(_) => return,
        }
    }
}

/// Adds the directories in which a file is looked up, and the path itself if it is a directory.
fn add_system_places(places: &mut BTreeSet<PathBuf>, path: &Path) {
    add_places(places, path);
    if path.is_dir() {
        places.insert(path.to_owned());
    }
}

/// The directory, or if it does not exist yet, the nearest one above it, but not `/`; without symbolic links in the path.
fn existing(path: &Path) -> Option<PathBuf> {
    let found = path.ancestors().find_map(|above| fs::canonicalize(above).ok().filter(|found| found.is_dir()))?;
    (found.parent().is_some() || path.parent().is_none()).then_some(found)
}

/// Adds the directories to which symbolic links in a directory lead, down to a depth. Directories of messages are skipped.
fn add_linked(places: &mut BTreeSet<PathBuf>, directory: &Path, depth: usize) {
    let maildir = ["tmp", "new", "cur"];
    let is_maildir = depth > 1 && maildir.iter().all(|name| directory.join(name).is_dir());
    for entry in fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok) {
        let (Ok(kind), path) = (entry.file_type(), entry.path()) else { continue };
        let is_linked = kind.is_symlink() && path.is_dir();
        if is_linked {
            places.extend(existing(&path));
        }
        let has_messages = is_maildir && maildir.iter().any(|name| entry.file_name() == *name);
        if depth > 1 && (is_linked || kind.is_dir()) && !has_messages {
            add_linked(places, &path, depth - 1);
        }
    }
}

impl Permitted {
    fn new(directories: &[MailDirectory]) -> Permitted {
        let mut readable = NOTED.lock().clone();
        readable.extend(SYSTEM_DIRECTORIES.map(PathBuf::from).into_iter().filter(|path| path.is_dir()));
        SYSTEM_FILES.iter().for_each(|path| add_system_places(&mut readable, Path::new(path)));
        for value in SYSTEM_VARIABLES.iter().filter_map(std::env::var_os) {
            let paths = std::env::split_paths(&value).filter(|path| path.is_absolute());
            paths.for_each(|path| add_system_places(&mut readable, &path));
        }
        let readable: BTreeSet<_> = readable.iter().filter_map(|path| existing(path)).collect();
        let mut writable = BTreeSet::new();
        for MailDirectory { path, depth } in directories {
            writable.extend(existing(path));
            add_linked(&mut writable, path, *depth);
        }
        let open = writable.iter().filter_map(|path| File::open(path).ok()).collect();
        let directories = |paths: BTreeSet<PathBuf>| paths.into_iter().map(Directory::new).collect();
        Permitted { readable: directories(readable), writable: directories(writable), _open: open }
    }

    fn may_write(&self, path: &Path) -> bool {
        is_in(&self.writable, path)
    }

    fn may_read(&self, path: &Path) -> bool {
        is_in(&self.readable, path) || self.may_write(path)
    }
}

/// Whether a path, or the part of it that exists, is in one of these directories.
fn is_in(directories: &[Directory], path: &Path) -> bool {
    let found = path.ancestors().find_map(|above| fs::canonicalize(above).ok());
    found.is_some_and(|found| directories.iter().any(|directory| directory.has(&found)))
}

/// Checks that a directory is one that this process may write since its start.
///
/// # Errors
///
/// The directory is outside; the text has the remedy.
pub fn check_writable(path: &Path) -> Result<(), String> {
    match PERMITTED.get() {
        Some(permitted) if !permitted.may_write(path) => Err(format!("{}: {OUTSIDE}", path.display())),
        _ => Ok(()),
    }
}

/// The error of reading a path, with another text if the sandbox has caused it.
pub fn explain(path: &Path, error: io::Error) -> io::Error {
    explain_if(|permitted| !permitted.may_read(path), error)
}

/// The error of using a path in a directory of mail, with another text if the sandbox has caused it.
pub fn explain_mail(path: &Path, error: io::Error) -> io::Error {
    explain_if(|permitted| !permitted.may_write(path), error)
}

fn explain_if(is_outside: impl Fn(&Permitted) -> bool, error: io::Error) -> io::Error {
    let of_sandbox = matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::CrossesDevices);
    match PERMITTED.get().filter(|permitted| of_sandbox && is_outside(permitted)) {
        Some(_) => io::Error::new(error.kind(), OUTSIDE),
        None => error,
    }
}

/// Restricts this thread, and those that it starts from now on, to the directories that it needs, until the process ends.
/// `in_thread`: receives a function that another running thread must call to be restricted, too. Returns the version of the
/// ABI of Landlock.
///
/// # Errors
///
/// The system has no such restriction, or forbids it; the text has the reason. The thread is not restricted.
pub fn enter(
    directories: &[MailDirectory], in_thread: impl FnOnce(Box<dyn FnOnce() + Send>),
) -> Result<String, String> {
    let permitted = Permitted::new(directories);
    let abi = restrict(&permitted, in_thread)?;
    let _ = PERMITTED.set(permitted);
    Ok(abi)
}

#[cfg(target_os = "linux")]
const NO_LANDLOCK: &str = "this kernel has no Landlock, or that of before Linux 5.19";

#[cfg(target_os = "linux")]
fn restrict(permitted: &Permitted, in_thread: impl FnOnce(Box<dyn FnOnce() + Send>)) -> Result<String, String> {
    use landlock::{LandlockStatus, RulesetStatus};
    let rules = landlock_rules(permitted).map_err(|error| error.to_string())?;
    let other = rules.try_clone().map_err(|error| error.to_string())?;
    let status = rules.restrict_self().map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) | (_, LandlockStatus::NotEnabled | LandlockStatus::NotImplemented) => {
            Err(NO_LANDLOCK.to_owned())
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            in_thread(Box::new(move || drop(other.restrict_self())));
            Ok(format!("{effective_abi:?}").trim_start_matches('V').to_owned())
        }
    }
}

/// The rules of Landlock. Before Linux 5.19 (ABI 1) Landlock forbids moving a file into another directory, which each Maildir
/// needs, so ABI 1 is an error.
#[cfg(target_os = "linux")]
fn landlock_rules(permitted: &Permitted) -> Result<landlock::RulesetCreated, Box<dyn std::error::Error>> {
    use landlock::{
        ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, path_beneath_rules,
    };
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let change = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::Refer;
    // The socket by which other processes wake a daemon is made there too.
    let make = AccessFs::MakeReg | AccessFs::MakeDir | AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::RemoveDir;
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let ruleset = ruleset.handle_access(AccessFs::Refer).map_err(|_| NO_LANDLOCK)?;
    let ruleset = ruleset.set_compatibility(CompatLevel::BestEffort).handle_access(AccessFs::from_all(ABI::V5))?;
    let ruleset = ruleset.create()?.add_rules(path_beneath_rules(&permitted.readable, read))?;
    Ok(ruleset.add_rules(path_beneath_rules(&permitted.writable, read | change | make))?)
}

#[cfg(not(target_os = "linux"))]
fn restrict(_: &Permitted, _: impl FnOnce(Box<dyn FnOnce() + Send>)) -> Result<String, String> {
    Err("this system has nothing like Landlock that can be called without unsafe code".to_owned())
}
