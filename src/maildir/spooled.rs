//! Content that is stored until its destination is known: the first 256 KiB in memory, the rest in a file without a
//! name.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};

use crate::smtp::content::WireSize;

/// Octets of a content that are stored in memory; the rest is written into a file.
pub const MEMORY_LIMIT: usize = 256 * 1024;

/// Content that can be read more than once.
pub trait Content: Read {
    /// Goes back to the beginning of the content.
    ///
    /// # Errors
    /// The system's.
    fn rewind(&mut self) -> io::Result<()>;
}

/// Content that is read more than once: to examine it before it is stored, or to send it to several next hops. Write
/// all of it, rewind, then read.
#[derive(Default)]
pub struct SpooledContent {
    memory: Vec<u8>,
    file: Option<BufWriter<File>>,
    wire_size: WireSize,
    eight_bit: bool,
    /// Octets of `memory` that were read since `rewind`.
    read: usize,
}

impl SpooledContent {
    /// Appends content. After 256 KiB `file` is called once, to make the file: see
    /// [`Maildir::unnamed_file`](super::Maildir::unnamed_file).
    ///
    /// # Errors
    /// Those of `file`; the system's, if the file cannot be written.
    pub fn write(&mut self, octets: &[u8], file: impl FnOnce() -> io::Result<File>) -> io::Result<()> {
        self.wire_size.feed(octets);
        self.eight_bit |= !octets.is_ascii();
        let (first, rest) = octets.split_at(octets.len().min(MEMORY_LIMIT - self.memory.len()));
        self.memory.extend_from_slice(first);
        if rest.is_empty() {
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(BufWriter::new(file()?)),
        };
        file.write_all(rest)
    }

    /// Returns the size in octets as sent in SMTP, with CRLF line ends.
    pub fn wire_size(&self) -> u64 {
        self.wire_size.finish()
    }

    /// Returns whether there are octets above 127.
    pub fn eight_bit(&self) -> bool {
        self.eight_bit
    }

    /// Returns the first 256 KiB, or the whole content if it is shorter.
    pub fn first_octets(&self) -> &[u8] {
        &self.memory
    }
}

impl Read for SpooledContent {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let octets = (&self.memory[self.read..]).read(buffer)?;
        self.read += octets;
        match &mut self.file {
            Some(file) if octets == 0 => file.get_mut().read(buffer),
            _ => Ok(octets),
        }
    }
}

impl Content for SpooledContent {
    fn rewind(&mut self) -> io::Result<()> {
        self.read = 0;
        self.file.as_mut().map_or(Ok(()), Seek::rewind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_read_again_from_memory_and_from_a_file() {
        let line = [b"x".repeat(998), b"\r\n".to_vec()].concat();
        for (lines, files_made) in [(1, 0), (MEMORY_LIMIT / 1000, 0), (MEMORY_LIMIT / 1000 + 2, 1)] {
            let (mut content, mut files) = (SpooledContent::default(), 0);
            for _ in 0..lines {
                let written = content.write(&line, || {
                    files += 1;
                    tempfile::tempfile()
                });
                written.unwrap();
            }
            assert_eq!((files, content.wire_size(), content.eight_bit()), (files_made, 1000 * lines as u64, false));
            let written = line.repeat(lines);
            assert!(content.first_octets() == &written[..written.len().min(MEMORY_LIMIT)]);
            for _ in 0..2 {
                let mut read = Vec::new();
                content.rewind().unwrap();
                content.read_to_end(&mut read).unwrap();
                assert!(read == written);
            }
        }
    }
}
