//! Exit codes: the one place where each failure of the program gets its code of sysexits.h.
//!
//! By the code, programs that call `odmr send` decide what to do with their message, and supervisors decide whether to
//! try again.

use std::io;
use std::path::Path;

use rustix::io::Errno;

use crate::config::ConfigError;
use crate::customer::CallError;
use crate::customer::sendmail::{SendmailError, SendmailErrorKind};
use crate::maildir::write_remedy;
use crate::provider::StartError;

/// The exit codes, by their names in sysexits.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sysexit {
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
    pub(super) fn of_system(kind: io::ErrorKind) -> Sysexit {
        use io::ErrorKind::*;
        match kind {
            PermissionDenied => Sysexit::NoPermission,
            ReadOnlyFilesystem | NotFound | NotADirectory | AlreadyExists | IsADirectory => Sysexit::CannotCreate,
            StorageFull | QuotaExceeded | FileTooLarge => Sysexit::Temporary,
            _ => Sysexit::OsError,
        }
    }
}

/// A failure of the program: its exit code, and one line for the user; empty: nothing is printed.
#[derive(Debug)]
pub(super) struct ExitError {
    pub code: Sysexit,
    pub text: String,
}

impl ExitError {
    pub fn new(code: Sysexit, text: impl ToString) -> ExitError {
        ExitError { code, text: text.to_string() }
    }

    /// A file or directory that cannot be made or changed; `rights`: what to do if the right to that is missing.
    pub fn cannot_create(error: io::Error, rights: &str) -> ExitError {
        match error.kind() {
            io::ErrorKind::PermissionDenied => ExitError::new(Sysexit::NoPermission, format!("{error}; {rights}")),
            io::ErrorKind::NotADirectory => {
                let text = format!("{error}: move that file away, or name another directory");
                ExitError::new(Sysexit::CannotCreate, text)
            }
            _ => ExitError::new(Sysexit::CannotCreate, error),
        }
    }

    /// A wrong command line; `hint` is the command that shows the help.
    pub fn usage(text: impl ToString, hint: &str) -> ExitError {
        let text = text.to_string();
        let separator = if text.ends_with('?') { "" } else { ";" };
        ExitError::new(Sysexit::Usage, format!("{text}{separator} try `{hint}`"))
    }
}

impl From<ConfigError> for ExitError {
    fn from(error: ConfigError) -> ExitError {
        ExitError::new(Sysexit::Config, error)
    }
}

impl From<StartError> for ExitError {
    fn from(error: StartError) -> ExitError {
        let code = match error {
            StartError::Config(_) => Sysexit::Config,
            StartError::System(_, kind) => Sysexit::of_system(kind),
            StartError::Spool(_) => Sysexit::CannotCreate,
            StartError::Busy(_) => Sysexit::Temporary,
        };
        ExitError::new(code, error)
    }
}

impl From<CallError> for ExitError {
    fn from(error: CallError) -> ExitError {
        let code = match &error {
            CallError::Config(_) => Sysexit::Config,
            CallError::NoHost(_) => Sysexit::NoHost,
            CallError::Unavailable(_) => Sysexit::Unavailable,
            CallError::Temporary(_) | CallError::Busy(_) | CallError::TooSoon(_) => Sysexit::Temporary,
            CallError::Denied(_) => Sysexit::NoPermission,
            CallError::Protocol(_) => Sysexit::Protocol,
            CallError::System(_, kind) => Sysexit::of_system(*kind),
        };
        ExitError::new(code, error)
    }
}

impl From<SendmailError> for ExitError {
    fn from(error: SendmailError) -> ExitError {
        let code = match error.kind {
            SendmailErrorKind::Usage => Sysexit::Usage,
            SendmailErrorKind::BadData => Sysexit::DataError,
            SendmailErrorKind::UnknownMailbox => Sysexit::NoUser,
            SendmailErrorKind::Rejected => Sysexit::Unavailable,
            SendmailErrorKind::Deferred => Sysexit::Temporary,
            SendmailErrorKind::CannotCreate => Sysexit::CannotCreate,
            SendmailErrorKind::InputOutput => Sysexit::InputOutput,
            SendmailErrorKind::NoPermission => Sysexit::NoPermission,
            SendmailErrorKind::Config => Sysexit::Config,
        };
        ExitError::new(code, error.text)
    }
}

impl From<io::Error> for ExitError {
    fn from(error: io::Error) -> ExitError {
        let (code, text) = (Sysexit::of_system(error.kind()), error.to_string());
        match code {
            // The text may name a better remedy already.
            _ if text.contains("; ") => ExitError::new(code, text),
            Sysexit::NoPermission => {
                ExitError::new(code, format!("{text}; be root, or the user whose files these are"))
            }
            _ if Errno::from_io_error(&error) == Some(Errno::MFILE) => {
                ExitError::new(code, format!("{text}; raise the limit of open files, such as by `ulimit -n 1024`"))
            }
            _ => ExitError::new(code, text + &write_remedy(&error, Path::new(""))),
        }
    }
}
