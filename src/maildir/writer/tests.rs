//! Messages that are written into several Maildirs.

use std::collections::HashSet;

use super::*;
use crate::ids::Ids;

fn masked<const N: usize>(names: [&str; N], mask: u32) -> (tempfile::TempDir, [Maildir; N]) {
    let directory = tempfile::tempdir().unwrap();
    let maildirs = names.map(|name| Maildir::mailbox(directory.path().join("box").join(name), mask));
    (directory, maildirs)
}

fn maildirs<const N: usize>(names: [&str; N]) -> (tempfile::TempDir, [Maildir; N]) {
    masked(names, 0o077)
}

/// The numbers of files in `tmp`, `new` and `cur`.
fn files(maildir: &Maildir) -> [usize; 3] {
    ["tmp", "new", "cur"].map(|name| fs::read_dir(maildir.path.join(name)).unwrap().count())
}

fn begin(maildirs: &[Maildir]) -> MessageWriter {
    let mut writer = MessageWriter::default();
    for (number, maildir) in maildirs.iter().enumerate() {
        writer.begin(maildir, "1", "head\n".repeat(number + 1).as_bytes()).unwrap();
    }
    writer
}

#[test]
fn content_is_written_once_while_it_arrives_and_the_copies_are_made_at_the_end() {
    let line = [&b"x".repeat(998)[..], b"\n"].concat();
    for (content, bits) in [(vec![], ""), (b"Subject: \xff\n\n".to_vec(), ",E=8"), (line.repeat(1500), "")] {
        for (copies, mask) in [(1, 0o077), (1, 0o007), (2, 0o077), (3, 0o077), (3, 0o022), (2, 0o007), (3, 0o002)] {
            let (_directory, maildirs) = masked(["a", "b", "c"], mask);
            let mut writer = begin(&maildirs[..copies]);
            content.chunks(50_000).for_each(|block| writer.write(block).unwrap());
            let in_first = usize::from(copies == 1 || mask & 0o022 == 0o022);
            let arriving = maildirs[..copies].iter().map(|maildir| files(maildir)[0]);
            assert_eq!(arriving.collect::<Vec<_>>(), [in_first, 0, 0][..copies]);
            let prepared = writer.prepare().unwrap();
            maildirs[..copies].iter().for_each(|maildir| assert_eq!(files(maildir), [1, 0, 0]));
            let entries = prepared.publish().unwrap();
            assert_eq!(entries.len(), copies);
            for (number, (maildir, entry)) in maildirs.iter().zip(&entries).enumerate() {
                assert_eq!(files(maildir), [0, 1, 0]);
                let expected = ["head\n".repeat(number + 1).as_bytes(), &content].concat();
                assert!(fs::read(maildir.file(entry)).unwrap() == expected);
                let lines = expected.iter().filter(|octet| **octet == b'\n').count();
                let name = format!("1,S={},W={}{bits}", expected.len(), expected.len() + lines);
                assert_eq!(entry.name.to_str(), Some(name.as_str()));
            }
        }
    }
}

#[test]
fn a_copy_that_cannot_be_created_is_an_error_before_the_content() {
    let (_directory, maildirs) = maildirs(["a", "b", "c"]);
    for broken in 0..3 {
        let mut writer = begin(&maildirs[..broken]);
        maildirs[broken].create().unwrap();
        let tmp = maildirs[broken].path.join("tmp");
        fs::remove_dir(&tmp).unwrap();
        fs::write(&tmp, "not a directory").unwrap();
        writer.begin(&maildirs[broken], "1", b"").unwrap_err();
        drop(writer);
        fs::remove_file(&tmp).unwrap();
        fs::create_dir(&tmp).unwrap();
        maildirs[..=broken].iter().for_each(|maildir| assert_eq!(files(maildir), [0; 3]));
    }
}

#[test]
fn no_copy_is_left_if_one_cannot_be_made() {
    for (broken, mask) in [(0, 0o007), (1, 0o007), (1, 0o077), (2, 0o077)] {
        let (_directory, maildirs) = masked(["a", "b", "c"], mask);
        let mut writer = begin(&maildirs);
        writer.write(b"content").unwrap();
        let theirs = maildirs[broken].temporary("1");
        fs::write(&theirs, "theirs").unwrap();
        assert_eq!(writer.prepare().err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
        fs::remove_file(&theirs).unwrap();
        maildirs.iter().for_each(|maildir| assert_eq!(files(maildir), [0; 3]));
    }
}

/// The disk fails after the write, or another process truncates the file.
#[test]
fn no_copy_is_made_of_content_that_was_truncated() {
    let (_directory, maildirs) = maildirs(["a", "b"]);
    let mut writer = begin(&maildirs);
    writer.write(&[b'x'; 2 * WRITE_BUFFER]).unwrap();
    let first = File::options().write(true).open(maildirs[0].temporary("1")).unwrap();
    first.set_len(WRITE_BUFFER as u64).unwrap();
    assert_eq!(writer.prepare().err().unwrap().kind(), io::ErrorKind::UnexpectedEof);
    maildirs.iter().for_each(|maildir| assert_eq!(files(maildir), [0; 3]));
}

#[test]
fn each_copy_needs_room() {
    let (directory, maildirs) = maildirs(["a", "b", "c"]);
    let disk = rustix::fs::statvfs(directory.path()).unwrap();
    let half = disk.f_bavail * disk.f_frsize / 2;
    begin(&maildirs[..1]).keep_free(0, half).unwrap();
    assert!(begin(&maildirs[..1]).keep_free(4 * half, 0).is_err());
    let mut writer = begin(&maildirs);
    writer.write(b"content").unwrap();
    writer.check_room(half / 4).unwrap();
    for octets in [half, u64::MAX] {
        assert_eq!(writer.check_room(octets).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}

/// Rules: MD-14.
#[test]
fn a_directory_that_gets_several_messages_is_fsynced_once() {
    let (_directory, [maildir, other]) = maildirs(["", "other"]);
    let mut writer = MessageWriter::default();
    for (number, maildir) in [&maildir, &other, &maildir, &maildir].into_iter().enumerate() {
        writer.begin(maildir, &number.to_string(), b"").unwrap();
    }
    let prepared = writer.prepare().unwrap();
    assert_eq!(
        prepared.directories().into_iter().collect::<Vec<_>>(),
        [maildir.path().join("new"), other.path().join("new")]
    );
    assert_eq!(prepared.publish().unwrap().len(), 4);
    assert_eq!(files(&maildir), [0, 3, 0]);
}

/// Rules: MD-03.
#[test]
fn ten_thousand_messages_written_at_once_get_different_names() {
    let (_directory, [maildir]) = maildirs([""]);
    maildir.create().unwrap();
    let ids = Ids::system(|octets| octets.fill(7));
    let unique: Vec<HashSet<String>> = std::thread::scope(|scope| {
        let deliver = || {
            let deliver = |_| {
                let mut copy = MessageCopy::new(&maildir, &ids.file_name("host"), b"");
                copy.create().unwrap();
                copy.publish(ContentInfo::default()).unwrap();
                copy.unique.clone()
            };
            (0..1250).map(deliver).collect()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(deliver)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(unique.iter().flatten().collect::<HashSet<_>>().len(), 10_000);
    assert_eq!(files(&maildir), [0, 10_000, 0]);
}
