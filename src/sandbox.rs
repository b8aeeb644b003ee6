//! What this process gives up after its start, in case a peer finds a defect in it: new privileges, core dumps with
//! secrets, and files that the configuration does not name.
//!
//! ```text
//!           no new privileges, no core dumps    files
//! Linux     prctl(2)                            Landlock, from Linux 5.19 on
//! FreeBSD   procctl(2)                          -
//! others    RLIMIT_CORE                         -
//! ```
//!
//! Not done, as this crate has no unsafe code: pledge(2) and unveil(2) of OpenBSD are calls of its libc. A crate with such
//! calls belongs into this file, with the directories that Landlock gets. Capsicum does not fit: after cap_enter(2) no file
//! can be opened by its path, and this program opens all of its files so.
//!
//! Landlock holds for files alone. Connections, also to sockets that are files (LMTP, syslogd, supervisors), and signals
//! stay as they are. Nothing is executed. The rules are for directories with all that is in them, because files are
//! replaced by others of the same name: certificates, resolv.conf, the files of customers. Each directory in which an
//! administrator's file was found before ([`note_file`]) can be read, those of the system's files too, and the directories
//! of mail can be written. A directory that becomes another one (a symbolic link that is changed, another file system in its
//! place) is outside: the process must be started again, and says so ([`explain`]).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What the C library, the TLS library and the time library read: names, servers, certificates, time zones, and the modules
/// of the name service switch (nsswitch.conf), which are libraries and have data of their own.
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

/// What an error says about a path outside.
const OUTSIDE: &str = "it is outside the directories that this process may use since its start: restart it";

/// The directories that this process has read files of an administrator in.
static NOTED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// What this process may use; empty: all that the system permits.
static PERMITTED: OnceLock<Permitted> = OnceLock::new();

struct Permitted {
    readable: Vec<Directory>,
    writable: Vec<Directory>,
    /// The writable ones, so that autofs does not unmount one that is idle: mounted again, it would be another directory.
    _open: Vec<File>,
}

/// A directory as it was at the start: the kernel permits it, and no other one that takes its name.
struct Directory {
    /// Without symbolic links.
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

/// Directories of mail, which this process writes into.
pub struct MailDirectory {
    pub path: PathBuf,
    /// How many levels below it may have symbolic links to other directories.
    pub depth: usize,
}

/// Gives up what no subcommand needs: programs that it would execute get no new privileges, and a core dump, or a debugger
/// of the same user, cannot read the secrets in memory. Call it before there are threads, and once more after the process
/// has become another user: the system resets the latter then.
pub fn harden() {
    // Best effort: a container may forbid these calls, and the program works all the same.
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

/// Notes that this file of an administrator may be read again, and others that take its name: its directory, and those that
/// symbolic links lead to.
pub fn note_file(path: &Path) {
    if PERMITTED.get().is_none() {
        add_places(&mut NOTED.lock().unwrap_or_else(PoisonError::into_inner), path);
    }
}

/// Notes that the files of a directory may be read again.
pub fn note_directory(path: &Path) {
    if PERMITTED.get().is_none() {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        NOTED.lock().unwrap_or_else(PoisonError::into_inner).insert(path);
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

/// The same, and the path itself if it is a directory.
fn add_system_places(places: &mut BTreeSet<PathBuf>, path: &Path) {
    add_places(places, path);
    if path.is_dir() {
        places.insert(path.to_owned());
    }
}

/// The directory without symbolic links in its path; if it does not exist yet, the nearest above it that does, but not `/`.
fn existing(path: &Path) -> Option<PathBuf> {
    let found = path.ancestors().find_map(|above| fs::canonicalize(above).ok().filter(|found| found.is_dir()))?;
    (found.parent().is_some() || path.parent().is_none()).then_some(found)
}

/// Adds the directories that symbolic links in a directory lead to, down to a depth. Messages are not looked at.
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
        let mut readable = NOTED.lock().unwrap_or_else(PoisonError::into_inner).clone();
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

/// Whether a path, or what of it exists, is in one of these directories.
fn is_in(directories: &[Directory], path: &Path) -> bool {
    let found = path.ancestors().find_map(|above| fs::canonicalize(above).ok());
    found.is_some_and(|found| directories.iter().any(|directory| directory.has(&found)))
}

/// Checks that a directory is not outside those that this process may write into since its start.
///
/// # Errors
///
/// A text that says what to do.
pub fn check_writable(path: &Path) -> Result<(), String> {
    match PERMITTED.get() {
        Some(permitted) if !permitted.may_write(path) => Err(format!("{}: {OUTSIDE}", path.display())),
        _ => Ok(()),
    }
}

/// The error of reading a path that may be outside what this process may use since its start: then its text says so.
pub fn explain(path: &Path, error: io::Error) -> io::Error {
    explain_if(|permitted| !permitted.may_read(path), error)
}

/// The same for a path in a directory of mail.
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

/// Restricts this thread, and those that it starts from now on, to the directories that it needs, for good. `in_thread`
/// gets what another thread that runs already must do to be restricted too. Returns the ABI of Landlock that is in force.
///
/// # Errors
///
/// A text that says why nothing is: the system has nothing for it, or forbids it.
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

/// The rules of Landlock. Before Linux 5.19 (ABI 1) it forbids moving a file into another directory, which each Maildir
/// needs, so that one is an error.
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
