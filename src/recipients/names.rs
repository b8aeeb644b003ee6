//! Safe names of directories for any local part and any detail.
//!
//! A local part may contain `../x`, slashes and spaces. The name of its directory is encoded, so that it cannot lead out of
//! the domain's directory: lower-case letters, digits and `._+=-` stay as they are; each octet of any other character, and
//! of a dot in front, becomes `%HH`. The Maildir++ folder of a detail is encoded in the same way, but without any dot,
//! because dots separate the levels of folders.

use std::fmt::Write;

/// The maximum length of a directory's name in octets: mail readers append to it, and file systems permit 255.
pub(super) const DIRECTORY_NAME_LIMIT: usize = 200;

/// The name of a mailbox's directory: one component of a path that does not begin with a dot. It is empty for an empty local
/// part, and may be too long for a file system.
pub fn directory_name(local: &str) -> String {
    encoded(&local.to_lowercase(), true)
}

/// Whether a local part can have a directory: it is not empty, and the name is not too long.
pub(super) fn has_directory_name(local: &str) -> bool {
    !local.is_empty() && directory_name(local).len() <= DIRECTORY_NAME_LIMIT
}

/// The names of Maildir++ folders for a detail, the preferred one first; no name has a dot.
pub(super) fn folder_names(detail: &str) -> Vec<String> {
    let mut names = vec![encoded(detail, false), encoded(&detail.to_lowercase(), false)];
    names.dedup();
    // A sender must not be able to choose Trash: mail readers empty it, and quotas do not count it.
    let trash = |name: &String| name.eq_ignore_ascii_case("Trash");
    names.retain(|name| (1..=DIRECTORY_NAME_LIMIT).contains(&name.len()) && !trash(name));
    names
}

fn encoded(text: &str, dots: bool) -> String {
    let mut name = String::with_capacity(text.len());
    for character in text.chars() {
        if is_plain(character) && (character != '.' || dots && !name.is_empty()) {
            name.push(character);
            continue;
        }
        let mut octets = [0; 4];
        for octet in character.encode_utf8(&mut octets).bytes() {
            let _ = write!(name, "%{octet:02X}");
        }
    }
    name
}

/// Whether a character is its own encoding.
pub(super) fn is_plain(character: char) -> bool {
    matches!(character, '.' | '_' | '+' | '=' | '-') || character.is_alphanumeric()
}
