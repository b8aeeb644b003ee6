//! Makes a user, directories and files on this system, each durable and in one step, so that a run that was interrupted
//! can be repeated. Nothing that exists is changed.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::names::check_user_name;
use super::users::make_user;
use crate::cli::exit::{ExitError, Sysexit};
use crate::maildir::{create_file_durably, make_tree, shell_word};
use crate::net::tls::{self, CertificateInfo, ServerTls};
use crate::platform;
use crate::privileges::SystemUser;

/// The user that the mail belongs to, if no other is named.
const DEFAULT_USER: &str = "odmr";

/// Makes files and directories, and remembers which.
pub(super) struct Installer {
    /// The owner of the mail; `None`: the user of this process, which is not root.
    pub owner: Option<SystemUser>,
    /// Lines for the user.
    pub made: Vec<String>,
}

/// The owner of a directory that root makes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum DirectoryOf {
    /// Root, and the group of the user.
    Root,
    /// The user.
    Mail,
}

impl Installer {
    /// As root, finds or makes the user; `named`: the value of --user.
    ///
    /// # Errors
    ///
    /// The user cannot be made; --user without root.
    pub fn begin(named: Option<String>) -> Result<Installer, ExitError> {
        // Each file and directory is made with its own mode.
        platform::set_umask(0o022);
        let mut made = Vec::new();
        if !rustix::process::geteuid().is_root() {
            if named.is_some() {
                let text = "only root can give the mail to another user: be root, or leave --user out";
                return Err(ExitError::new(Sysexit::NoPermission, text));
            }
            return Ok(Installer { owner: None, made });
        }
        let name = named.as_deref().unwrap_or(DEFAULT_USER);
        check_user_name(name)?;
        if let (false, _) = SystemUser::is_known(name) {
            make_user(name)?;
            made.push(format!("the user {name}"));
        }
        let owner = SystemUser::find(name, None).map_err(|text| ExitError::new(Sysexit::DataError, text))?;
        Ok(Installer { owner: Some(owner), made })
    }

    /// The name of the user; `None`: this is not root.
    pub fn user(&self) -> Option<&str> {
        self.owner.as_ref().map(SystemUser::name)
    }

    /// Makes a directory, with those in it, unless it exists. `mode`: of all of them.
    ///
    /// # Errors
    ///
    /// It cannot be made (73, 77); one for mail exists, and belongs to another user (73).
    pub fn directory(&mut self, path: &Path, below: &[PathBuf], mode: u32, of: DirectoryOf) -> Result<bool, ExitError> {
        let owner = self.owner.as_ref().map(|user| (if of == DirectoryOf::Mail { user.uid() } else { 0 }, user.gid()));
        if make_tree(path, below, mode, owner).map_err(cannot_make)? {
            self.made.push(path.display().to_string());
            return Ok(true);
        }
        let user = rustix::process::geteuid().as_raw();
        let user = self.owner.as_ref().map_or(user, SystemUser::uid);
        if of == DirectoryOf::Mail && fs::metadata(path).is_ok_and(|found| found.uid() != user) {
            let (shown, name, path) = (path.display(), self.user().unwrap_or("you"), shell_word(path));
            let text = format!(
                "{shown} exists, and does not belong to {name}: type `chown -R {name} {path}` if it is for the mail, or name \
                 another directory or the user that it belongs to (--user)"
            );
            return Err(ExitError::new(Sysexit::CannotCreate, text));
        }
        Ok(false)
    }

    /// Makes a file, unless it exists. Returns whether it was made. `readers`: the users that may read it.
    ///
    /// # Errors
    ///
    /// It cannot be written (73, 77).
    pub fn file(&mut self, path: &Path, text: &str, readers: Readers) -> Result<bool, ExitError> {
        let group = self.owner.as_ref().map(SystemUser::gid);
        let mode = match (readers, group) {
            (Readers::All, _) => 0o644,
            (Readers::User, Some(_)) => 0o640,
            // A person's group may have other members.
            (Readers::User, None) => 0o600,
        };
        match create_file_durably(path, text, mode, group) {
            Ok(()) => {
                self.made.push(path.display().to_string());
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(cannot_make(error)),
        }
    }

    /// Makes a self-signed certificate for a name, and its key. A key that exists is used: the other side may know its pin.
    ///
    /// # Errors
    ///
    /// They cannot be made; a certificate or a key exists, and the two do not belong together.
    pub fn certificate(&mut self, certificate: &Path, key: &Path, name: &str) -> Result<CertificateInfo, ExitError> {
        let failed = |text: String| ExitError::new(Sysexit::OsError, text);
        // Before its certificate, which is of no use without the key.
        self.file(key, &tls::new_key().map_err(failed)?, Readers::User)?;
        if !certificate.exists() {
            let text = fs::read_to_string(key).map_err(|error| failed(format!("{}: {error}", key.display())))?;
            let text = tls::certificate_with_key(&[name], &text)
                .map_err(|error| ExitError::new(Sysexit::Config, format!("{}: {error}", key.display())))?;
            self.file(certificate, &text, Readers::All)?;
        }
        checked_certificate(certificate, key)
    }

    /// A line for each file, directory or user that was made.
    pub fn report(&self) -> String {
        self.made.iter().map(|made| format!("made {made}\n")).collect()
    }
}

/// The users that may read a file.
#[derive(Clone, Copy)]
pub(super) enum Readers {
    All,
    /// The owner of the mail, and root.
    User,
}

/// Reads a certificate and its key.
///
/// # Errors
///
/// They cannot be used (78).
pub(super) fn checked_certificate(certificate: &Path, key: &Path) -> Result<CertificateInfo, ExitError> {
    ServerTls::load(certificate, key)
        .and_then(|_| CertificateInfo::load(certificate))
        .map_err(|text| ExitError::new(Sysexit::Config, text))
}

/// The error of making a file or a directory.
fn cannot_make(error: io::Error) -> ExitError {
    ExitError::cannot_create(error, "be root, or name a file of your own with -c FILE")
}
