//! Makes a user of this system, with the program that the system has for it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cli::exit::{ExitError, Sysexit};
use crate::privileges::SystemUser;

/// The directories with programs of administrators, which may not be in PATH after `su`.
const SYSTEM_DIRECTORIES_OF_PROGRAMS: [&str; 5] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin"];

/// Makes a user without a password, a home and a shell, and a group of the same name.
///
/// # Errors
///
/// The system has no program for it, or the program fails (71).
pub(super) fn make_user(name: &str) -> Result<(), ExitError> {
    let (_, has_group) = SystemUser::is_known(name);
    let Some(steps) = steps(name, has_group, &|program| find(program).is_some()) else {
        return Err(failed(name, "useradd, pw or adduser was not found"));
    };
    for step in steps {
        let [program, arguments @ ..] = step.as_slice() else { continue };
        let path = find(program).unwrap_or_else(|| program.into());
        // Its errors go to the user, on stderr.
        let done = Command::new(path).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).status();
        let done = done.map_err(|error| failed(name, &format!("{program}: {error}")))?;
        // Another process may have made the user.
        if !done.success() && !SystemUser::is_known(name).0 {
            return Err(failed(name, &format!("`{}` has failed ({done})", step.join(" "))));
        }
    }
    Ok(())
}

fn failed(name: &str, why: &str) -> ExitError {
    let text = format!(
        "the user {name} cannot be made: {why}; make that user, one without a password and a shell, and type the same command \
         again, or name another user in --user"
    );
    ExitError::new(Sysexit::OsError, text)
}

/// The commands, each with its arguments. `None`: the system has no program that makes users.
fn steps(name: &str, has_group: bool, exists: &dyn Fn(&str) -> bool) -> Option<Vec<Vec<String>>> {
    let is_bsd = cfg!(any(target_os = "openbsd", target_os = "netbsd"));
    let shell = ["/usr/sbin/nologin", "/sbin/nologin"].into_iter().find(|shell| Path::new(shell).exists());
    let shell = shell.unwrap_or("/bin/false");
    let with_group = |option: &str, otherwise: &str| match has_group {
        true => format!("{option} {name}"),
        false => otherwise.to_owned(),
    };
    let lines = if exists("useradd") && is_bsd {
        vec![format!("useradd {} -d /nonexistent -s {shell} {name}", with_group("-g", "-g =uid"))]
    } else if exists("useradd") {
        let group = with_group("--gid", "--user-group");
        vec![format!("useradd --system {group} --no-create-home --home-dir /nonexistent --shell {shell} {name}")]
    } else if exists("pw") {
        vec![format!("pw useradd {name} {} -d /nonexistent -s {shell}", with_group("-g", ""))]
    } else if exists("adduser") {
        // That of busybox: without -G the user would get a group with other members.
        let group = (!has_group).then(|| format!("addgroup -S {name}"));
        let user = format!("adduser -S -D -H -h /nonexistent -s {shell} -G {name} {name}");
        group.into_iter().chain([user]).collect()
    } else {
        return None;
    };
    Some(lines.iter().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect())
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(SYSTEM_DIRECTORIES_OF_PROGRAMS.map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|path| path.is_absolute() && path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_system_has_its_program() {
        let lines = |has_group, program: &str| {
            let steps = steps("odmr", has_group, &|name| name == program)?;
            Some(steps.iter().map(|step| step.join(" ")).collect::<Vec<_>>())
        };
        assert_eq!(lines(false, "make"), None);
        for (has_group, program, count, part) in [
            (false, "pw", 1, "pw useradd odmr -d /nonexistent -s /"),
            (true, "pw", 1, "pw useradd odmr -g odmr -d /nonexistent -s /"),
            (false, "adduser", 2, "adduser -S -D -H -h /nonexistent -s /"),
            (true, "adduser", 1, "-G odmr odmr"),
            (false, "useradd", 1, " odmr"),
        ] {
            let lines = lines(has_group, program).unwrap();
            assert!(lines.len() == count && lines.last().unwrap().contains(part), "{lines:?}");
        }
        if cfg!(target_os = "linux") {
            let [of_new, of_existing] = [false, true].map(|has_group| lines(has_group, "useradd").unwrap().remove(0));
            assert!(of_new.starts_with("useradd --system --user-group --no-create-home "), "{of_new}");
            assert!(of_existing.contains(" --gid odmr "), "{of_existing}");
        }
    }
}
