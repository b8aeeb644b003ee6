//! Tests of quotas: the file, counting, and several writers.

use super::*;
use crate::maildir::{Maildir, MessageWriter};
use proptest::prelude::*;
use std::os::unix::fs::{PermissionsExt, symlink};

const UNLIMITED: u64 = u64::MAX;

/// A mailbox whose file `maildirsize` has this content.
fn mailbox_with(content: &str) -> (tempfile::TempDir, Maildir) {
    let directory = tempfile::tempdir().unwrap();
    let maildir = Maildir::mailbox(directory.path().join("eva"), 0o077);
    maildir.create().unwrap();
    fs::write(maildir.path().join(NAME), content).unwrap();
    (directory, maildir)
}

fn maildirsize(maildir: &Maildir) -> String {
    fs::read_to_string(maildir.path().join(NAME)).unwrap()
}

/// Delivers a message of this many octets.
fn deliver(maildir: &Maildir, unique: &str, octets: usize) -> io::Result<()> {
    let mut writer = MessageWriter::default();
    writer.begin(maildir, unique, &vec![b'x'; octets])?;
    writer.commit().map(|_| ())
}

fn age(maildir: &Maildir, age: Duration) {
    let file = File::options().write(true).open(maildir.path().join(NAME)).unwrap();
    file.set_modified(SystemTime::now() - age).unwrap();
}

fn quota_error(delivered: io::Result<()>) -> String {
    let error = delivered.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded, "{error}");
    error.to_string()
}

#[test]
fn limits_are_parsed() {
    let check = |definition: &str, expected: Option<(u64, u64)>| {
        let expected = expected.map(|(octets, messages)| Usage { octets, messages });
        assert_eq!(limits(definition), expected, "{definition:?}");
    };
    check("1000S,10C", Some((1000, 10)));
    check("10C,1000S", Some((1000, 10)));
    check("1000S", Some((1000, UNLIMITED)));
    check("10C", Some((UNLIMITED, 10)));
    check(" 1000S , 10C \r", Some((1000, 10)));
    check("0S,10C", Some((UNLIMITED, 10)));
    check("0S", Some((UNLIMITED, UNLIMITED)));
    // Unknown units.
    check("7X,1000S,3s", Some((1000, UNLIMITED)));
    check("7X", Some((UNLIMITED, UNLIMITED)));
    check("1000S,rubbish", Some((1000, UNLIMITED)));
    check("99999999999999999999S,10C", Some((UNLIMITED, 10)));
    for undefined in ["", " ", "S", "C,S", "1000", "-5S", "+5S", "1 000S", "ten C", "1000é", "1000 1"] {
        check(undefined, None);
    }
}

#[test]
fn the_quota_file_is_parsed() {
    let check = |content: &[u8], expected: Option<(u64, u64)>, lines: usize| {
        let read = parse(content).unwrap();
        let expected = expected.map(|(octets, messages)| Usage { octets, messages });
        assert_eq!((read.sum, read.lines), (expected, lines), "{}", content.escape_ascii());
    };
    check(b"9S\n0 0\n", Some((0, 0)), 1);
    check(b"9S\n100 2\n50 1\n-100 -2\n", Some((50, 1)), 3);
    // As Courier pads them.
    check(b"9S\n         100            2\n        -100           -1\n", Some((0, 1)), 2);
    check(b"9S\r\n100 2\r\n", Some((100, 2)), 1);
    // The sum is missing or not valid.
    check(b"9S", None, 0);
    check(b"9S\n", None, 0);
    check(b"9S\n100 2\n\n", None, 2);
    check(b"9S\n100\n", None, 1);
    check(b"9S\n100 2 3\n", None, 1);
    check(b"9S\n100 two\n", None, 1);
    check(b"9S\n100 2\n-101 -1\n", None, 2);
    check(b"9S\n100 2\n-10 -3\n", None, 2);
    check(b"9S\n99999999999999999999 1\n", None, 1);
    // The file was truncated.
    check(b"9S\n100 2\n50", None, 2);
    check(b"9S\n100 2\n\0\0\0\0\n", None, 2);
    check(b"9S\n\xff\xfe\n", None, 0);
    for undefined in [&b""[..], b"\n", b"\n100 2\n", b"rubbish\n100 2\n", b"\xff9S\n100 2\n", b"\0\0\0"] {
        assert_eq!(parse(undefined), None, "{}", undefined.escape_ascii());
    }
}

proptest! {
    #[test]
    fn any_file_can_be_parsed(content: Vec<u8>, lines in "[0-9SC,]{0,9}\n[-+0-9 \n]{0,60}") {
        parse(&content);
        parse(lines.as_bytes());
    }

    #[test]
    fn the_sum_is_that_of_the_lines(octets: u32, messages: u16, changes: Vec<(i64, i32)>) {
        let mut content = format!("{octets}S,{messages}C\n{octets} {messages}\n");
        let mut expected = (i128::from(octets), i128::from(messages));
        for (octets, messages) in &changes {
            content.push_str(&format!("{octets:12} {messages}\n"));
            expected = (expected.0 + i128::from(*octets), expected.1 + i128::from(*messages));
        }
        let read = parse(content.as_bytes()).unwrap();
        let sum = u64::try_from(expected.0).ok().zip(u64::try_from(expected.1).ok());
        prop_assert_eq!(read.sum, sum.map(|(octets, messages)| Usage { octets, messages }));
        prop_assert_eq!(read.lines, changes.len() + 1);
    }
}

#[test]
fn file_names_give_the_size_and_whether_a_message_counts() {
    let check = |name: &str, expected: Option<u64>, gone: bool| {
        let entry = Entry { name: name.into(), seen: true };
        assert_eq!((size(&entry), entry.has(DELETED)), (expected, gone), "{name}");
    };
    check("1.M2P3.host,S=10", Some(10), false);
    check("1.M2P3.host,S=10,W=12:2,FS", Some(10), false);
    check("1.M2P3.host,W=12,S=10:2,ST", Some(10), true);
    check("1.M2P3.host:2,T", None, true);
    // `a` to `z` are keywords; after another character there are no flags.
    check("1.M2P3.host,S=10:2,St", Some(10), false);
    check("1.M2P3.host,S=10:2,S,T", Some(10), false);
    check("1.M2P3.host,S=:1,T", None, false);
    check("1.M2P3.host,S=1x:2,", None, false);
    check("S=10", None, false);
    check("", None, false);
}

#[test]
fn an_accepted_message_is_added_to_the_file() {
    let (_directory, maildir) = mailbox_with("100S,3C\n10 1\n");
    deliver(&maildir, "1", 40).unwrap();
    assert_eq!(maildirsize(&maildir), "100S,3C\n10 1\n40 1\n");
    // The last octet of the quota may be used.
    deliver(&maildir, "2", 50).unwrap();
    assert_eq!(maildirsize(&maildir), "100S,3C\n10 1\n40 1\n50 1\n");
}

#[test]
fn a_message_over_quota_is_rejected_with_the_limit() {
    for (content, expected) in [
        ("100S,5C\n90 1\n", "quota exceeded: 90 octets stored, 11 to come, 100 allowed"),
        ("100S,5C\n9 5\n", "quota exceeded: 5 messages stored, 1 to come, 5 allowed"),
        ("100S\n100 9\n", "quota exceeded: 100 octets stored, 11 to come, 100 allowed"),
        ("5C\n9000 5\n", "quota exceeded: 5 messages stored, 1 to come, 5 allowed"),
    ] {
        let (_directory, maildir) = mailbox_with(content);
        let error = quota_error(deliver(&maildir, "1", 11));
        assert_eq!(error, format!("{}: {expected}", maildir.path().display()));
        assert!(maildir.is_empty().unwrap());
        assert_eq!(fs::read_dir(maildir.path().join("tmp")).unwrap().count(), 0);
        assert_eq!(maildirsize(&maildir), content);
    }
}

#[test]
fn a_mailbox_without_quota_gets_no_file() {
    let (_directory, maildir) = mailbox_with("");
    fs::remove_file(maildir.path().join(NAME)).unwrap();
    deliver(&maildir, "1", 10).unwrap();
    assert!(!maildir.path().join(NAME).exists());
    // A file that defines no quota is not changed.
    for content in ["", "\n", "hello\n1 1\n"] {
        let (_directory, maildir) = mailbox_with(content);
        deliver(&maildir, "1", 10).unwrap();
        assert_eq!(maildirsize(&maildir), content);
    }
    // A quota without limits is updated: mail readers show the size of the mailbox.
    let (_directory, maildir) = mailbox_with("0S\n70 7\n");
    deliver(&maildir, "1", 10).unwrap();
    assert_eq!(maildirsize(&maildir), "0S\n70 7\n10 1\n");
}

#[test]
fn all_mailboxes_have_room_or_none_gets_the_message() {
    let (_directory, eva) = mailbox_with("100S\n0 0\n");
    let (_directory, adam) = mailbox_with("100S\n95 1\n");
    let (_directory, free) = mailbox_with("");
    for order in [[&eva, &adam, &free], [&adam, &free, &eva]] {
        let mut writer = MessageWriter::default();
        order.iter().for_each(|maildir| writer.begin(maildir, "1", b"0123456789").unwrap());
        let error = quota_error(writer.commit().map(|_| ()));
        assert!(error.starts_with(&adam.path().display().to_string()), "{error}");
        order.iter().for_each(|maildir| assert!(maildir.is_empty().unwrap()));
    }
    assert_eq!((maildirsize(&eva), maildirsize(&adam)), ("100S\n0 0\n".into(), "100S\n95 1\n".into()));
}

#[test]
fn two_copies_for_one_mailbox_are_added() {
    let (_directory, maildir) = mailbox_with("100S\n70 1\n");
    let lists = maildir.folder("lists");
    Maildir::new(lists.path()).create().unwrap();
    let commit = |octets: &[u8]| {
        let mut writer = MessageWriter::default();
        writer.begin(&maildir, "1", octets).unwrap();
        writer.begin(&lists, "2", octets).unwrap();
        writer.commit().map(|_| ())
    };
    assert!(quota_error(commit(&[b'x'; 16])).contains("70 octets stored, 32 to come"));
    assert!(maildir.is_empty().unwrap() && lists.is_empty().unwrap());
    commit(&[b'x'; 15]).unwrap();
    assert_eq!(maildirsize(&maildir), "100S\n70 1\n30 2\n");
}

#[test]
fn a_message_that_is_not_published_is_not_counted() {
    let (_directory, maildir) = mailbox_with("100S\n0 0\n");
    let mut writer = MessageWriter::default();
    writer.begin(&maildir, "1", b"0123456789").unwrap();
    drop(writer);
    // A message whose file could not be moved is not counted either.
    fs::write(maildir.path().join("new/2,S=10,W=10"), "").unwrap();
    assert_eq!(deliver(&maildir, "2", 10).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(maildirsize(&maildir), "100S\n0 0\n");
}

/// The mailbox has one message of 20 octets.
#[test]
fn a_mailbox_is_counted_again_if_the_file_may_be_wrong() {
    let young = Duration::from_secs(14 * 60);
    let long = format!("100S\n{}", "0 00\n".repeat(1023));
    for (content, written, recounted) in [
        // There is enough room: the sum is valid at any age.
        ("100S\n90 1\n", COUNT_LIFETIME, false),
        ("100S\n50 1\n40 1\n", COUNT_LIFETIME, false),
        // The mailbox is full: only a recent count is valid.
        ("100S\n91 1\n", young, false),
        ("100S\n91 1\n", COUNT_LIFETIME, true),
        ("100S\n50 1\n41 1\n", young, true),
        ("1C\n50 1\n41 1\n-41 -1\n", young, true),
        // No sum.
        ("100S\n", young, true),
        ("100S", young, true),
        ("100S\n10 1\n-11 -1\n", young, true),
        ("100S\n10 1\n1", young, true),
        // 5120 octets, and a line less.
        (&long, young, true),
        (&long[5..].replacen("0 00", "100S", 1), young, false),
    ] {
        let (_directory, maildir) = mailbox_with(content);
        fs::write(maildir.path().join("cur/0,S=20:2,S"), "").unwrap();
        age(&maildir, written);
        let fits = deliver(&maildir, "1", 10);
        let now = maildirsize(&maildir);
        let definition = content.lines().next().unwrap();
        let case = format!("{content:.40} {now:.40}");
        if recounted {
            let added = if fits.is_ok() { "10 1\n" } else { "" };
            assert_eq!(now, format!("{definition}\n20 1\n{added}"), "{case}");
        } else {
            assert!(now.starts_with(content), "{case}");
        }
        assert_eq!(fits.is_ok(), now.lines().last() == Some("10 1"), "{case}");
        assert_eq!(fs::read_dir(maildir.path().join("tmp")).unwrap().count(), 0, "{case}");
    }
}

#[test]
fn the_count_has_all_messages_but_deleted_ones_and_the_trash() {
    let (directory, maildir) = mailbox_with("7X,1000S\n");
    for name in [".lists", ".lists.rust", TRASH, "other"] {
        Maildir::new(maildir.path().join(name)).create().unwrap();
    }
    let other = Maildir::new(directory.path().join("adam"));
    other.create().unwrap();
    symlink(other.path(), maildir.path().join(".shared")).unwrap();
    for (name, octets) in [
        ("new/1,S=1", 500),
        ("cur/2,S=2,W=3:2,S", 500),
        ("cur/3:2,", 4),
        (".lists/new/4,S=8", 500),
        (".lists.rust/cur/5:2,RS", 16),
        // These do not count.
        ("cur/6,S=100:2,ST", 100),
        ("new/.hidden", 100),
        ("tmp/7,S=100", 100),
        (".Trash/cur/8,S=100:2,", 100),
        ("other/new/9,S=100", 100),
        (".shared/new/10,S=100", 100),
        (".file", 100),
    ] {
        fs::write(maildir.path().join(name), vec![b'x'; octets]).unwrap();
    }
    let path = maildir.path().join(NAME);
    fs::set_permissions(&path, Permissions::from_mode(0o646)).unwrap();
    deliver(&maildir, "11", 32).unwrap();
    assert_eq!(maildirsize(&maildir), "7X,1000S\n31 5\n32 1\n");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o646);
}

#[test]
fn a_message_in_a_sub_folder_counts_in_the_mailbox() {
    let (_directory, maildir) = mailbox_with("30S\n0 0\n");
    for name in ["lists", "Trash"] {
        Maildir::new(maildir.folder(name).path()).create().unwrap();
    }
    deliver(&maildir.folder("lists"), "1", 20).unwrap();
    assert_eq!(maildirsize(&maildir), "30S\n0 0\n20 1\n");
    let error = quota_error(deliver(&maildir.folder("lists"), "2", 11));
    assert!(error.starts_with(&format!("{}: ", maildir.path().display())), "{error}");
    // A message for the trash needs no room.
    deliver(&maildir.folder("Trash"), "3", 1000).unwrap();
    assert_eq!(maildirsize(&maildir), "30S\n20 1\n");
    // A directory with a dot is a sub-folder only within a mailbox.
    let (directory, _) = mailbox_with("");
    let hidden = directory.path().join(".maildir");
    assert_eq!(mailbox_of(&hidden), Some(hidden.as_path()));
    for path in ["/", ".", "..", "", "eva"] {
        assert_eq!(mailbox_of(Path::new(path)), Some(Path::new(path)));
    }
}

#[test]
fn a_link_a_directory_or_a_pipe_instead_of_the_file_is_an_error() {
    let (directory, maildir) = mailbox_with("");
    let path = maildir.path().join(NAME);
    let other = directory.path().join("other");
    fs::write(&other, "100S\n").unwrap();
    let replace: [fn(&Path, &Path); 3] = [
        |path, other| symlink(other, path).unwrap(),
        |path, _| fs::create_dir(path).unwrap(),
        |path, _| crate::platform::make_fifo(path),
    ];
    fs::remove_file(&path).unwrap();
    for replace in replace {
        replace(&path, &other);
        let error = deliver(&maildir, "1", 10).unwrap_err().to_string();
        assert!(error.contains(NAME), "{error}");
        assert!(maildir.is_empty().unwrap());
        assert_eq!(fs::read_to_string(&other).unwrap(), "100S\n");
        fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
    }
}

#[test]
fn a_failure_to_record_does_not_undo_the_delivery() {
    let (_directory, maildir) = mailbox_with("100S\n0 0\n");
    let path = maildir.path().join(NAME);
    let mut quotas = QuotaCheck::default();
    quotas.admit(maildir.path(), || "1".to_owned(), 10).unwrap();
    fs::remove_file(&path).unwrap();
    quotas.record();
    assert!(!path.exists());
    fs::create_dir(&path).unwrap();
    quotas.record();
    assert!(path.is_dir());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// With one writer, and a mail reader that records what it removes, the sum is always exact.
    #[test]
    fn a_message_is_rejected_exactly_when_there_is_no_room(
        limits in (100_u64..400, 2_u64..8),
        steps in proptest::collection::vec((0_usize..120, any::<bool>()), 1..20),
    ) {
        let (_directory, maildir) = mailbox_with(&format!("{}S,{}C\n", limits.0, limits.1));
        let mut there = Vec::new();
        for (number, (octets, removes)) in steps.into_iter().enumerate() {
            let sum: usize = there.iter().map(|(_, octets)| octets).sum();
            let fits = (sum + octets) as u64 <= limits.0 && (there.len() as u64) < limits.1;
            match deliver(&maildir, &number.to_string(), octets) {
                Ok(()) => there.push((format!("new/{number},S={octets},W={octets}"), octets)),
                rejected => _ = quota_error(rejected),
            }
            prop_assert_eq!(fits, there.last().is_some_and(|(name, _)| name.starts_with(&format!("new/{number},"))));
            if removes && !there.is_empty() {
                let (name, octets) = there.remove(0);
                fs::remove_file(maildir.path().join(name)).unwrap();
                let mut file = File::options().append(true).open(maildir.path().join(NAME)).unwrap();
                writeln!(file, "-{octets} -1").unwrap();
            }
        }
    }
}

/// Delivers `each` messages from each of two threads; returns how many were accepted.
fn race(maildir: &Maildir, each: usize) -> usize {
    let deliver = |thread: usize| {
        let accepted = (0..each).filter(|number| match deliver(maildir, &format!("{thread}-{number}"), 10) {
            Ok(()) => true,
            rejected => quota_error(rejected).is_empty(),
        });
        accepted.count()
    };
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|thread| scope.spawn(move || deliver(thread)));
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

#[test]
fn no_line_of_two_writers_is_lost() {
    let (_directory, maildir) = mailbox_with("10000S,1000C\n0 0\n");
    assert_eq!(race(&maildir, 100), 200);
    let read = parse(maildirsize(&maildir).as_bytes()).unwrap();
    assert_eq!((read.sum, read.lines), (Some(Usage { octets: 2000, messages: 200 }), 201));
}

/// Each delivery into the full mailbox counts it again, while the other thread delivers.
#[test]
fn two_writers_that_count_again_leave_a_valid_file() {
    let (_directory, maildir) = mailbox_with("500S\n");
    let accepted = race(&maildir, 60);
    assert_eq!(maildir.entries().unwrap().len(), accepted);
    assert!(accepted >= 50, "{accepted}");
    let read = parse(maildirsize(&maildir).as_bytes()).unwrap();
    assert_eq!(read.definition, "500S");
    assert!(read.sum.is_some());
    // The race may have made the sum wrong; the next count corrects it.
    age(&maildir, COUNT_LIFETIME);
    quota_error(deliver(&maildir, "last", 500));
    let octets = 10 * accepted;
    assert_eq!(maildirsize(&maildir), format!("500S\n{octets} {accepted}\n"));
    assert_eq!(fs::read_dir(maildir.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_queue_has_no_quota() {
    let (_directory, maildir) = mailbox_with("100S\n100 1\n");
    quota_error(deliver(&maildir, "1", 10));
    deliver(&Maildir::new(maildir.path()), "2", 10).unwrap();
    assert_eq!(maildirsize(&maildir), "100S\n100 1\n");
}
