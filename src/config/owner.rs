//! `user` and `group` of both files: the user that a process becomes if root has started it.

use super::table::Table;
use super::value::SYSTEM_NAME;
use crate::privileges::SystemUser;
use crate::recipients::{ConfigError, SourceLine};

/// `user` and `group`: the owner of the mail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MailOwner {
    pub user: String,
    /// The group of the files. Default: the primary group of the user.
    pub group: Option<String>,
    /// The line of `user`.
    line: SourceLine,
}

impl MailOwner {
    /// The keys at the top of a file.
    ///
    /// # Errors
    ///
    /// A name that is not valid, or `group` without `user`.
    pub(super) fn build(file: &mut Table<'_>) -> Result<Option<MailOwner>, ConfigError> {
        let (user, group) = (file.located("user", SYSTEM_NAME), file.located("group", SYSTEM_NAME));
        match (user?, group?) {
            (None, None) => Ok(None),
            (None, Some(group)) => {
                let text = "`group` has no effect without `user`: write user = \"…\" too, or remove it";
                Err(group.source.error(text))
            }
            (Some(user), group) => {
                let group = group.map(|group| group.value);
                Ok(Some(MailOwner { user: user.value, group, line: user.source }))
            }
        }
    }

    /// An error about the user or the group, on the line of `user`.
    pub fn error(&self, text: String) -> ConfigError {
        self.line.error(text)
    }

    /// Returns the user and the group of the system.
    ///
    /// # Errors
    ///
    /// The system has no such user or group. The error is on the line of `user`.
    pub fn find(&self) -> Result<SystemUser, ConfigError> {
        SystemUser::find(&self.user, self.group.as_deref()).map_err(|text| self.error(text))
    }
}
