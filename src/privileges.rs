//! The user of this process, and the change from root to the owner of the mail.
//!
//! A process that was started as root becomes the owner of the mail before it reads or writes any mail.

use std::ffi::CString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown};
use std::path::Path;

use nix::unistd::{self, Gid, Uid};

use crate::{platform, sandbox};

/// A user of this machine, and the group of the files that are made for them.
#[derive(Debug)]
pub struct SystemUser {
    name: CString,
    uid: Uid,
    gid: Gid,
}

impl SystemUser {
    /// Looks up a user; `group`: a group other than the user's primary one.
    ///
    /// # Errors
    ///
    /// There is no such user or group, or the user is root. The text has the remedy.
    pub fn find(name: &str, group: Option<&str>) -> Result<SystemUser, String> {
        let user = unistd::User::from_name(name)
            .map_err(|error| format!("the user {name:?} cannot be looked up: {error}"))?
            .ok_or_else(|| {
                let command = if cfg!(target_os = "linux") { "useradd -r" } else { "pw useradd" };
                format!("there is no user {name:?} here: make one (as root type `{command} {name}`), or change `user`")
            })?;
        if user.uid.is_root() {
            return Err(format!("the user {name:?} is root: name another user in `user`"));
        }
        let gid = match group {
            None => user.gid,
            Some(group) => {
                unistd::Group::from_name(group)
                    .map_err(|error| format!("the group {group:?} cannot be looked up: {error}"))?
                    .ok_or_else(|| format!("there is no group {group:?} here: make one, or change `group`"))?
                    .gid
            }
        };
        let name = CString::new(name).map_err(|_| format!("{name:?} is not a valid user name"))?;
        Ok(SystemUser { name, uid: user.uid, gid })
    }

    /// Returns whether the system has a user of this name, and whether it has a group of this name.
    pub fn is_known(name: &str) -> (bool, bool) {
        let (user, group) = (unistd::User::from_name(name), unistd::Group::from_name(name));
        (matches!(user, Ok(Some(_))), matches!(group, Ok(Some(_))))
    }

    /// Returns the owner of a file or directory; `None`: it belongs to root, or does not exist.
    ///
    /// # Errors
    ///
    /// The owner is unknown here. The text has the remedy.
    pub fn owner_of(path: &Path) -> Result<Option<SystemUser>, String> {
        let Some(uid) = fs::metadata(path).ok().map(|found| found.uid()).filter(|uid| *uid != 0) else {
            return Ok(None);
        };
        let user = unistd::User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let user =
            user.ok_or_else(|| format!("{} belongs to user {uid}, and there is no such user here", path.display()))?;
        SystemUser::find(&user.name, None).map(Some)
    }

    /// Returns whether this process already runs as this user.
    pub fn is_current(&self) -> bool {
        self.uid == Uid::effective()
    }

    /// Returns the login name.
    pub fn name(&self) -> &str {
        self.name.to_str().unwrap_or_default()
    }

    /// Returns the user id.
    pub fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// Returns the id of the group of the files that are made for this user.
    pub fn gid(&self) -> u32 {
        self.gid.as_raw()
    }

    /// Returns whether the mode of a file permits this user to read it. The directories above it are not checked.
    ///
    /// # Errors
    ///
    /// The file or the groups of the user cannot be looked up.
    pub fn may_read(&self, path: &Path) -> io::Result<bool> {
        let found = fs::metadata(path)?;
        let groups = platform::groups_of(&self.name, self.gid)?;
        let in_group = groups.contains(&Gid::from_raw(found.gid()));
        let bit = match (found.uid() == self.uid.as_raw(), in_group) {
            (true, _) => 0o400,
            (false, true) => 0o040,
            (false, false) => 0o004,
        };
        Ok(found.mode() & bit != 0)
    }

    /// Makes a directory that belongs to this user, unless it exists. New directories above it belong to the current user.
    ///
    /// # Errors
    ///
    /// The errors of the system.
    pub fn make_directory(&self, path: &Path) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.and_then(|()| lchown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))),
        }
    }

    /// Makes this process run as this user, with all the user's groups. Call it before threads are started: they would
    /// stay root.
    ///
    /// # Errors
    ///
    /// A call has failed; the text has its cause. The process must end, because it may have lost some of its rights.
    pub fn assume(&self) -> Result<(), String> {
        let failed =
            |what: &str, error: io::Error| format!("{what} failed: {error}; start it as root, or as that user");
        platform::set_groups(&self.name, self.gid).map_err(|error| failed("setting the groups", error))?;
        unistd::setgid(self.gid).map_err(|error| failed("setting the group", error.into()))?;
        unistd::setuid(self.uid).map_err(|error| failed("setting the user", error.into()))?;
        // If the process can become root again, its saved user ID was not changed.
        match unistd::setuid(Uid::from_raw(0)) {
            Ok(()) => Err("the process can become root again: its saved user id did not change".to_owned()),
            Err(_) => {
                sandbox::harden();
                Ok(())
            }
        }
    }
}

/// The user of this process, for sendmail(8).
#[derive(Clone, Debug, Default)]
pub struct LoginUser {
    /// The real user id of the process.
    pub uid: u32,
    /// The login name; it may be empty.
    pub name: String,
    /// The full name; empty if none is known.
    pub full_name: String,
}

impl LoginUser {
    /// Returns the system's user with the real user id of this process. If there is none, the name is the value of the
    /// environment variable `LOGNAME`, or else of `USER`.
    pub fn current() -> LoginUser {
        let uid = Uid::current();
        match unistd::User::from_uid(uid) {
            Ok(Some(user)) if !user.name.is_empty() => {
                let full_name = full_name(&user.gecos.to_string_lossy(), &user.name);
                LoginUser { uid: uid.as_raw(), name: user.name, full_name }
            }
            _ => {
                let name = ["LOGNAME", "USER"].iter().find_map(|variable| std::env::var(variable).ok());
                LoginUser { uid: uid.as_raw(), name: name.unwrap_or_default(), full_name: String::new() }
            }
        }
    }
}

/// The full name in a GECOS field: the part before the first comma, with `&` for the capitalised login name, as finger(1)
/// shows it.
fn full_name(gecos: &str, login: &str) -> String {
    let mut capitalised = login.to_owned();
    if let Some(first) = capitalised.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    gecos.split(',').next().unwrap_or_default().replace('&', &capitalised)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_about_an_unusable_name_has_the_remedy() {
        let find = |name: &str, group: Option<&str>| SystemUser::find(name, group).unwrap_err();
        assert!(find("no-such-user", None).ends_with(" no-such-user`), or change `user`"));
        assert!(find("root", None).contains("name another user in `user`"));
        assert!(find("nobody", Some("no-such-group")).contains("make one, or change `group`"));
    }

    #[test]
    fn the_full_name_is_the_first_part_of_the_gecos_field() {
        assert_eq!(full_name("& Example,room 1,,", "eva"), "Eva Example");
        assert_eq!(full_name("", "eva"), "");
        assert_eq!(full_name("&", ""), "");
    }
}
