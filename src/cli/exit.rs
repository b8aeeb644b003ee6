//! Failures of the program, each with its exit code.

use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use crate::config::ConfigError;
use crate::customer::CallError;
use crate::customer::sendmail::SendmailError;
use crate::maildir::write_remedy;
use crate::provider::StartError;
pub(super) use crate::sysexit::Sysexit;

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

    /// This failure to write `text` into a file durably, with what holds now. `with`: what the new text means; `without`: what
    /// the old one does. Only the directory may have failed, after the file was complete.
    pub fn of_file(self, file: &Path, text: &str, with: &str, without: &str) -> ExitError {
        match fs::read_to_string(file).is_ok_and(|found| found == text) {
            true => ExitError::new(self.code, format!("{}; {with}, but a power cut may undo that", self.text)),
            false => ExitError::new(self.code, format!("{}; {without}", self.text)),
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
        ExitError::new(error.code, error.text)
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
        ExitError::new(error.code, error.text)
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
