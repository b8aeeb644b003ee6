//! The directory of one run, and the messages in it.

use std::path::{Path, PathBuf};

use odmr::smtp::content::ContentEncoder;
use tempfile::TempDir;

/// A new directory, in memory if the system has a file system there. It is removed when the value is dropped.
pub fn temporary_directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::Builder::new().prefix("odmr-fuzz").tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a temporary directory")
}

/// All files below a directory, with their contents.
pub fn files(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let (mut directories, mut files) = (vec![path.to_owned()], Vec::new());
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten() {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => directories.push(path),
                false => files.extend(std::fs::read(&path).ok().map(|content| (path, content))),
            }
        }
    }
    files
}

/// The files below a directory that are messages.
///
/// # Panics
/// A file is left in a directory `tmp`.
pub fn messages(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = files(path);
    let is_in = |path: &Path, name: &str| path.parent().is_some_and(|parent| parent.ends_with(name));
    let left = files.iter().find(|(path, _)| is_in(path, "tmp"));
    assert!(left.is_none(), "left in tmp: {left:?}");
    files.retain(|(path, _)| is_in(path, "new") || is_in(path, "cur"));
    files
}

pub fn contains(octets: &[u8], part: &[u8]) -> bool {
    octets.windows(part.len()).any(|window| window == part)
}

/// Checks that a message that was waiting is not lost. Its subject is in a file of the directory, which is the message or a
/// DSN about it; or the peer has received all of its content, and may have replied 2yz.
pub fn check_not_lost(directory: &Path, waiting: &str, received: &[u8], input: &[u8]) {
    let at = waiting.find("Subject: ").expect("a subject");
    let subject = waiting[at..].lines().next().unwrap_or_default();
    if files(directory).iter().any(|(_, content)| contains(content, subject.as_bytes())) {
        return;
    }
    let content = &waiting[waiting.find("Received:").expect("a field")..];
    let has_content = [ContentEncoder::data(), ContentEncoder::bdat()].into_iter().any(|mut encoder| {
        let mut wire = Vec::new();
        encoder.feed(content.as_bytes(), &mut wire);
        encoder.finish(&mut wire);
        contains(received, &wire)
    });
    assert!(has_content, "{subject} is lost after {}", received.escape_ascii());
    assert!(input.contains(&b'2'), "{subject} was not accepted");
}
