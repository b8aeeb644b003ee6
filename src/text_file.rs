//! Reading the text files that an administrator writes: TOML, aliases, secrets, certificates and keys.
//!
//! A byte order mark at the beginning is not part of the text. Lines may end in CRLF, and the last line may have no
//! end: each parser of these texts accepts that.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::sandbox;

/// Octets of a file. A longer file is not a configuration, and could use up the memory.
const FILE_SIZE_LIMIT: u64 = 16 << 20;

/// U+FEFF in UTF-8: some editors begin a file with it.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Returns the mode of a file, and its octets without a byte order mark.
///
/// # Errors
///
/// The file cannot be read, is a pipe, has more than 16 MiB, or is UTF-16 or UTF-32.
pub fn read(path: &Path) -> io::Result<(u32, Vec<u8>)> {
    sandbox::note_file(path);
    // Without these flags, open(2) would wait for the writer of a pipe, and read(2) for the user of a terminal.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    let file = file.map_err(|error| sandbox::explain(path, error))?;
    let found = file.metadata()?;
    if found.file_type().is_fifo() {
        return Err(io::Error::other("is a pipe, and must be a file"));
    }
    let mode = found.permissions().mode();
    let mut octets = Vec::new();
    if file.take(FILE_SIZE_LIMIT + 1).read_to_end(&mut octets)? as u64 > FILE_SIZE_LIMIT {
        return Err(io::Error::other("it has more than 16 MiB"));
    }
    if is_wide(&octets) {
        return Err(io::Error::other("it is UTF-16 or UTF-32: save it as UTF-8"));
    }
    if octets.starts_with(BYTE_ORDER_MARK) {
        octets.drain(..BYTE_ORDER_MARK.len());
    }
    Ok((mode, octets))
}

/// The text without byte order marks at the beginning of its lines, which occur in joined files. Only for texts in which a
/// line cannot begin with that character.
pub fn without_inner_marks(octets: Vec<u8>) -> Vec<u8> {
    if !octets.windows(BYTE_ORDER_MARK.len()).any(|part| part == BYTE_ORDER_MARK) {
        return octets;
    }
    let lines = octets.split_inclusive(|octet| *octet == b'\n');
    lines.flat_map(|line| line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line)).copied().collect()
}

/// The input without a byte order mark at its beginning, also if the mark arrives octet by octet.
///
/// # Errors
///
/// The first octets cannot be read.
pub fn without_first_mark(mut input: impl Read) -> io::Result<impl Read> {
    let mut begin = Vec::new();
    while BYTE_ORDER_MARK.starts_with(&begin) && input.by_ref().take(1).read_to_end(&mut begin)? > 0 {}
    if begin.starts_with(BYTE_ORDER_MARK) {
        begin.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(io::Cursor::new(begin).chain(input))
}

/// Whether a text has two or four octets for each character: it has the byte order mark of UTF-16 or UTF-32, or zeros in its
/// first characters.
fn is_wide(octets: &[u8]) -> bool {
    octets.starts_with(b"\xff\xfe") || octets.starts_with(b"\xfe\xff") || octets.iter().take(4).any(|octet| *octet == 0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write_and_read(octets: &[u8]) -> Result<Vec<u8>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), octets).unwrap();
        read(file.path()).map(|(_, octets)| octets).map_err(|error| error.to_string())
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        for text in ["", "a", "a = 1\r\nb = 2", "ä\n", "\u{feff}"] {
            assert_eq!(write_and_read(text.as_bytes()).unwrap(), text.trim_start_matches('\u{feff}').as_bytes());
            assert_eq!(write_and_read(format!("\u{feff}{text}").as_bytes()).unwrap(), text.as_bytes(), "{text:?}");
            let mut read = String::new();
            let slow = (&b"\xef"[..]).chain(&b"\xbb"[..]).chain(&b"\xbf"[..]).chain(text.as_bytes());
            without_first_mark(slow).unwrap().read_to_string(&mut read).unwrap();
            assert_eq!(read, text);
        }
        // The parsers reject other encodings and binary files.
        for octets in [&b"\xe4 = 1\n"[..], b"\xef\xbb", b"\xff", b"abcd\0"] {
            assert_eq!(write_and_read(octets).unwrap(), octets);
        }
    }

    #[test]
    fn utf_16_is_an_error_with_a_remedy() {
        let little = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let big = |text: &str| text.encode_utf16().flat_map(u16::to_be_bytes).collect::<Vec<u8>>();
        for text in ["\u{feff}hostname = 1\n", "hostname = 1\n", "ä", "\u{feff}", "\u{feff}\0a\0"] {
            for octets in [little(text), big(text)] {
                assert!(write_and_read(&octets).unwrap_err().contains("save it as UTF-8"), "{octets:?}");
            }
        }
    }

    #[test]
    fn a_pipe_and_a_long_file_are_rejected() {
        assert!(write_and_read(&vec![b'#'; (16 << 20) + 1]).unwrap_err().contains("16 MiB"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("pipe"));
        assert!(read(directory.path()).is_err());
        // A terminal without input.
        assert!(read(Path::new("/dev/ptmx")).is_err());
        assert_eq!(read(Path::new("/dev/null")).unwrap().1, b"");
    }
}
