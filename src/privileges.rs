//! Who this process is: started as root, it becomes the user who owns the mail, before it touches any.

use std::ffi::CString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown};
use std::path::Path;

use nix::unistd::{self, Gid, Uid};

/// A user of this machine, and the group his files are to belong to.
#[derive(Debug)]
pub struct SystemUser {
    name: CString,
    uid: Uid,
    gid: Gid,
}

impl SystemUser {
    /// Looks up a user, and a group other than his own.
    pub fn find(name: &str, group: Option<&str>) -> Result<SystemUser, String> {
        let user = unistd::User::from_name(name)
            .map_err(|error| format!("the user {name:?} cannot be looked up: {error}"))?
            .ok_or_else(|| format!("there is no user {name:?} here: make one, or change `user`"))?;
        if user.uid.is_root() {
            return Err(format!("the user {name:?} is root, and mail needs none: name another in `user`"));
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
        let name = CString::new(name).map_err(|_| format!("{name:?} is no name of a user"))?;
        Ok(SystemUser { name, uid: user.uid, gid })
    }

    /// Whether this process is that user already.
    pub fn is_current(&self) -> bool {
        self.uid == Uid::effective()
    }

    /// Whether this user may read a file, as far as its own mode says.
    pub fn may_read(&self, path: &Path) -> io::Result<bool> {
        let found = fs::metadata(path)?;
        let groups = unistd::getgrouplist(&self.name, self.gid)?;
        let in_group = groups.contains(&Gid::from_raw(found.gid()));
        let bit = match (found.uid() == self.uid.as_raw(), in_group) {
            (true, _) => 0o400,
            (false, true) => 0o040,
            (false, false) => 0o004,
        };
        Ok(found.mode() & bit != 0)
    }

    /// Makes a folder that is to be this user's, where there is none. Those above it stay root's.
    pub fn make_directory(&self, path: &Path) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.and_then(|()| lchown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))),
        }
    }

    /// Becomes this user, with all his groups, for good. Before there are threads: they would be somebody else.
    pub fn assume(&self) -> Result<(), String> {
        let failed =
            |what: &str, error: nix::Error| format!("{what} failed: {error}; start it as root, or as that user");
        unistd::initgroups(&self.name, self.gid).map_err(|error| failed("setting the groups", error))?;
        unistd::setgid(self.gid).map_err(|error| failed("setting the group", error))?;
        unistd::setuid(self.uid).map_err(|error| failed("setting the user", error))?;
        // Whoever can go back has not gone.
        match unistd::setuid(Uid::from_raw(0)) {
            Ok(()) => Err("the rights of root could be had back: the system does not let them go".to_owned()),
            Err(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_used_are_told() {
        let find = |name: &str, group: Option<&str>| SystemUser::find(name, group).unwrap_err();
        assert!(find("no-such-user", None).contains("make one, or change `user`"));
        assert!(find("root", None).contains("name another in `user`"));
        assert!(find("nobody", Some("no-such-group")).contains("make one, or change `group`"));
    }
}
