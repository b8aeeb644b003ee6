//! The exit codes of the program.
//!
//! By the code, programs that call `odmr send` decide what to do with their message, and supervisors decide whether to
//! try again.

use std::io;

/// The exit codes, by their names in sysexits.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sysexit {
    /// `odmr check` has found an error. This code is not in sysexits.h.
    CheckFailed = 1,
    /// The command line is wrong.
    Usage = 64,
    /// An address or a header cannot be read.
    DataError = 65,
    /// A file that is named on the command line cannot be read.
    NoInput = 66,
    /// A recipient has no mailbox here.
    NoUser = 67,
    /// The name of the provider has no address.
    NoHost = 68,
    /// The provider does not answer, or the message is too large or in a loop.
    Unavailable = 69,
    /// A system call failed.
    OsError = 71,
    /// A directory or file cannot be created.
    CannotCreate = 73,
    /// Reading or writing failed.
    InputOutput = 74,
    /// Try again later.
    Temporary = 75,
    /// The peer, or its certificate, breaks the protocol.
    Protocol = 76,
    NoPermission = 77,
    /// The configuration is wrong.
    Config = 78,
}

impl Sysexit {
    /// The exit code of an error of the system, mostly about a file or directory.
    pub fn of_system(kind: io::ErrorKind) -> Sysexit {
        use io::ErrorKind::*;
        match kind {
            PermissionDenied => Sysexit::NoPermission,
            ReadOnlyFilesystem | NotFound | NotADirectory | AlreadyExists | IsADirectory => Sysexit::CannotCreate,
            StorageFull | QuotaExceeded | FileTooLarge => Sysexit::Temporary,
            _ => Sysexit::OsError,
        }
    }
}
