//! Maildirs: when a message becomes visible, and which files remain after a failure.

use super::*;
use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::time::{Duration, SystemTime};

const EMPTY: [Vec<String>; 3] = [Vec::new(), Vec::new(), Vec::new()];

fn maildir() -> (tempfile::TempDir, Maildir) {
    let directory = tempfile::tempdir().unwrap();
    let maildir = Maildir::new(directory.path().join("deep/down/box"));
    (directory, maildir)
}

fn names(path: impl AsRef<Path>) -> Vec<String> {
    let Ok(files) = fs::read_dir(path) else { return Vec::new() };
    let mut names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The names in `tmp`, `new` and `cur`.
fn inside(maildir: &Maildir) -> [Vec<String>; 3] {
    ["tmp", "new", "cur"].map(|name| names(maildir.path().join(name)))
}

fn words(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn deliver(maildir: &Maildir, unique: &str, content: &[u8]) -> io::Result<Vec<Entry>> {
    let mut writer = MessageWriter::default();
    writer.begin(maildir, unique, b"head\n")?;
    writer.write(content)?;
    writer.commit()
}

fn entry(name: &str, seen: bool) -> Entry {
    Entry { name: name.into(), seen }
}

fn flag(maildir: &Maildir, entry: &Entry, flag: char) -> io::Result<Entry> {
    maildir.rename(entry, Some(flag), &entry.record())
}

/// Rules: MD-04.
#[test]
fn a_message_is_visible_after_the_commit_and_not_before() {
    let (_directory, maildir) = maildir();
    assert!(maildir.entries().unwrap().is_empty() && maildir.is_empty().unwrap());
    let mut writer = MessageWriter::default();
    writer.begin(&maildir, "1.M2.host", b"head\n").unwrap();
    writer.write(&[b'x'; 100_000]).unwrap();
    writer.write(b"\nend\n").unwrap();
    assert_eq!(inside(&maildir), [words(&["1.M2.host"]), vec![], vec![]]);
    assert!(maildir.is_empty().unwrap());
    let entries = writer.commit().unwrap();
    let name = "1.M2.host,S=100010,W=100013";
    assert_eq!(entries, [entry(name, false)]);
    assert_eq!(inside(&maildir), [vec![], words(&[name]), vec![]]);
    assert_eq!((entries[0].unique(), entries[0].wire_size()), (OsStr::new("1.M2.host"), Some(100_013)));
    let content = fs::read(maildir.file(&entries[0])).unwrap();
    assert!(content.starts_with(b"head\nxxx") && content.ends_with(b"xxx\nend\n"));
    assert_eq!(content.len(), 100_010);
    assert_eq!(maildir.entries().unwrap(), entries);
}

#[test]
fn only_the_owner_can_read_a_queue() {
    use std::os::unix::fs::PermissionsExt;
    let (_directory, maildir) = maildir();
    let entries = deliver(&maildir, "1", b"").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077;
    assert_eq!((mode(&maildir.file(&entries[0])), mode(maildir.path())), (0, 0));
}

#[test]
fn a_mailbox_has_the_permissions_that_the_mask_leaves() {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for mask in [0o077, 0o027, 0o007, 0o022, 0] {
        let directory = tempfile::tempdir().unwrap();
        // The umask of this process applies too.
        let probe = directory.path().join("probe");
        DirBuilder::new().mode(0o777).create(&probe).unwrap();
        let umask = 0o777 & !mode(&probe);
        let (file, dir) = (0o666 & !mask & !umask, 0o777 & !mask & !umask);
        let maildir = Maildir::mailbox(directory.path().join("example.org/eva"), mask);
        let entries = deliver(&maildir, "1", b"").unwrap();
        assert_eq!(mode(&maildir.file(&entries[0])), file, "{mask:o}");
        for path in ["example.org", "example.org/eva", "example.org/eva/new", "example.org/eva/tmp"] {
            assert_eq!(mode(&directory.path().join(path)), dir, "{mask:o} {path}");
        }
        let lists = maildir.folder("lists");
        ["", "cur", "new"].iter().for_each(|name| fs::create_dir(lists.path().join(name)).unwrap());
        let entries = deliver(&lists, "2", b"").unwrap();
        assert_eq!(mode(&lists.file(&entries[0])), file, "{mask:o}");
    }
}

#[test]
fn a_sub_folder_gets_mail_if_it_exists_and_is_never_made() {
    let (_directory, maildir) = maildir();
    assert!(!maildir.exists());
    maildir.create().unwrap();
    assert!(maildir.exists());
    let lists = maildir.folder("lists");
    assert_eq!(lists.path(), maildir.path().join(".lists"));
    assert!(!lists.exists());
    assert_eq!(deliver(&lists, "1", b"").unwrap_err().kind(), io::ErrorKind::NotFound);
    assert!(!lists.path().exists());
    // In a sub-folder only a missing `tmp` is made.
    for name in ["", "cur", "new"] {
        assert!(!lists.exists());
        fs::create_dir(lists.path().join(name)).unwrap();
    }
    assert!(lists.exists());
    assert_eq!(deliver(&lists, "1", b"").unwrap(), [entry("1,S=5,W=6", false)]);
    assert_eq!(inside(&lists), [vec![], words(&["1,S=5,W=6"]), vec![]]);
    assert_eq!(inside(&maildir), EMPTY);
}

#[test]
fn no_copy_is_stored_if_a_sub_folder_was_removed() {
    let (_directory, maildir) = maildir();
    let lists = maildir.folder("lists");
    Maildir::new(lists.path()).create().unwrap();
    let mut writer = MessageWriter::default();
    writer.begin(&maildir, "1", b"").unwrap();
    writer.begin(&lists, "2", b"").unwrap();
    fs::remove_dir_all(lists.path()).unwrap();
    assert_eq!(writer.commit().unwrap_err().kind(), io::ErrorKind::NotFound);
    assert!(!lists.path().exists());
    assert_eq!(inside(&maildir), EMPTY);
}

#[test]
fn the_name_of_a_sub_folder_never_leads_out_of_the_mailbox() {
    let maildir = Maildir::new("box");
    for (name, path) in [
        ("lists", "box/.lists"),
        ("lists.rust", "box/.lists.rust"),
        ("", "box/.%"),
        (".", "box/.%."),
        ("./x", "box/.%.%2Fx"),
        ("../../x", "box/.%..%2F..%2Fx"),
        ("x/../../y", "box/.x%2F..%2F..%2Fy"),
    ] {
        assert_eq!(maildir.folder(name).path(), Path::new(path), "{name}");
    }
    assert!(!maildir.folder("\0").exists() && !maildir.folder(&"x".repeat(1000)).exists());
}

#[test]
fn a_prepared_message_is_not_visible() {
    let (_directory, maildir) = maildir();
    let prepared = |unique| {
        let mut writer = MessageWriter::default();
        writer.begin(&maildir, unique, b"head\n").unwrap();
        writer.prepare().unwrap()
    };
    let first = prepared("1");
    assert_eq!(inside(&maildir).map(|names| names.len()), [1, 0, 0]);
    first.publish().unwrap();
    drop(prepared("2"));
    assert_eq!(inside(&maildir).map(|names| names.len()), [0, 1, 0]);
}

/// Rules: MD-07.
#[test]
fn a_dropped_writer_leaves_no_file() {
    let (_directory, maildir) = maildir();
    let mut writer = MessageWriter::default();
    writer.begin(&maildir, "1", b"head").unwrap();
    drop(writer);
    assert_eq!(inside(&maildir), EMPTY);
}

/// Rules: MD-09.
#[test]
fn no_file_is_ever_overwritten() {
    let (_directory, maildir) = maildir();
    let entries = deliver(&maildir, "1", b"first").unwrap();
    // The same name again, of the same size: rename(2) would have replaced it.
    let error = deliver(&maildir, "1", b"other").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(maildir.file(&entries[0])).unwrap(), b"head\nfirst");
    assert_eq!(inside(&maildir), [vec![], words(&["1,S=10,W=11"]), vec![]]);
    // The file of another writer in `tmp` is not overwritten either.
    fs::write(maildir.path().join("tmp/2"), "theirs").unwrap();
    assert_eq!(deliver(&maildir, "2", b"").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(maildir.path().join("tmp/2")).unwrap(), b"theirs");
    fs::remove_file(maildir.path().join("tmp/2")).unwrap();
    assert_eq!(deliver(&maildir, "2", b"").unwrap().len(), 1);
}

#[test]
fn all_maildirs_get_a_message_or_none() {
    for broken in 0..3 {
        let directory = tempfile::tempdir().unwrap();
        let maildirs: Vec<_> = (0..3).map(|number| Maildir::new(directory.path().join(number.to_string()))).collect();
        let deliver = || {
            let mut writer = MessageWriter::default();
            for (number, maildir) in maildirs.iter().enumerate() {
                writer.begin(maildir, "1", format!("{number}\n").as_bytes()).unwrap();
            }
            writer.write(b"content\n").unwrap();
            writer.commit()
        };
        let new = maildirs[broken].path().join("new");
        maildirs[broken].create().unwrap();
        fs::remove_dir(&new).unwrap();
        fs::write(&new, "not a directory").unwrap();
        let error = deliver().unwrap_err();
        assert!(error.to_string().contains(&format!("/{broken}/")), "{error}");
        for maildir in &maildirs {
            assert_eq!(inside(maildir), EMPTY, "{broken}");
        }
        fs::remove_file(&new).unwrap();
        fs::create_dir(&new).unwrap();
        assert_eq!(deliver().unwrap().len(), 3);
        for (number, maildir) in maildirs.iter().enumerate() {
            let content = fs::read(maildir.path().join("new/1,S=10,W=12")).unwrap();
            assert_eq!(content, format!("{number}\ncontent\n").as_bytes());
        }
    }
}

#[test]
fn the_error_for_a_file_instead_of_a_directory_names_the_path() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    let maildir = Maildir::new(directory.path().join("file/box"));
    let error = maildir.create().unwrap_err();
    assert!(error.to_string().contains("/file"), "{error}");
    assert!(deliver(&maildir, "1", b"").is_err());
}

/// Rules: MD-12, MD-13.
#[test]
fn entries_are_sorted_by_name_without_hidden_files() {
    let (_directory, maildir) = maildir();
    maildir.create().unwrap();
    for name in ["new/3", "new/1,S=1,W=2", "cur/2:2,S", "new/.hidden", "cur/.4", "tmp/5"] {
        fs::write(maildir.path().join(name), "").unwrap();
    }
    let expected = [entry("1,S=1,W=2", false), entry("2:2,S", true), entry("3", false)];
    assert_eq!(maildir.entries().unwrap(), expected);
    for entry in &expected {
        assert!(!maildir.is_empty().unwrap());
        maildir.remove(entry).unwrap();
        let error = maildir.remove(entry).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "it was removed");
    }
    assert!(maildir.is_empty().unwrap());
}

#[test]
fn file_names_give_the_unique_part_and_the_wire_size() {
    let check = |name: &str, unique: &str, wire_size| {
        let entry = entry(name, false);
        assert_eq!((entry.unique(), entry.wire_size()), (OsStr::new(unique), wire_size), "{name}");
    };
    check("1.M2P3.host,S=10,W=12", "1.M2P3.host", Some(12));
    check("1.M2P3.host,W=12,S=10:2,FS", "1.M2P3.host", Some(12));
    check("1.M2P3.host:2,W=7", "1.M2P3.host", None);
    check("1.M2P3.host,W=x", "1.M2P3.host", None);
    check("1.M2P3.host", "1.M2P3.host", None);
    check("", "", None);
}

#[test]
fn a_message_in_doubt_is_flagged_in_cur() {
    let (_directory, maildir) = maildir();
    let entries = deliver(&maildir, "1", b"").unwrap();
    flag(&maildir, &entries[0], IN_DOUBT).unwrap();
    assert_eq!(inside(&maildir), [vec![], vec![], words(&["1,S=5,W=6:2,F"])]);
    let marked = maildir.entries().unwrap();
    assert_eq!((marked[0].seen, marked[0].unique()), (true, OsStr::new("1")));
    flag(&maildir, &marked[0], IN_DOUBT).unwrap();
    assert_eq!(maildir.entries().unwrap(), marked);
    // A flag does not overwrite a file either.
    deliver(&maildir, "1", b"").unwrap();
    assert!(flag(&maildir, &entries[0], IN_DOUBT).is_err());
    assert_eq!(maildir.entries().unwrap().len(), 2);
}

#[test]
fn a_flag_is_found_beside_what_other_programs_write() {
    let (_directory, maildir) = maildir();
    deliver(&maildir, "1", b"").unwrap();
    let [entry] = maildir.entries().unwrap().try_into().unwrap();
    fs::rename(maildir.file(&entry), maildir.path().join("cur/1:2,Sb,x")).unwrap();
    let [entry] = maildir.entries().unwrap().try_into().unwrap();
    let flagged = flag(&maildir, &entry, 'R').unwrap();
    assert_eq!((flagged.name.to_str(), flagged.has('R')), (Some("1:2,RSb,x"), true));
}

/// Rules: MD-08.
#[test]
fn old_files_in_tmp_are_removed_after_36_hours() {
    let (_directory, maildir) = maildir();
    maildir.sweep().unwrap();
    maildir.create().unwrap();
    let hours = |hours: u64| SystemTime::now() - Duration::from_secs(hours * 60 * 60);
    for (name, read, written) in
        [("young", 35, 35), ("old", 37, 37), ("written", 37, 1), ("read", 1, 37), (".old", 37, 40)]
    {
        let file = File::create(maildir.path().join("tmp").join(name)).unwrap();
        let times = fs::FileTimes::new().set_accessed(hours(read)).set_modified(hours(written));
        file.set_times(times).unwrap();
    }
    let directory = maildir.path().join("tmp/a-directory");
    fs::create_dir(&directory).unwrap();
    let times = fs::FileTimes::new().set_accessed(hours(40)).set_modified(hours(40));
    File::open(&directory).unwrap().set_times(times).unwrap();
    maildir.sweep().unwrap();
    assert_eq!(names(maildir.path().join("tmp")), ["a-directory", "read", "written", "young"]);
}

/// Sets the times of a file or directory to this many hours ago.
fn set_used(path: &Path, hours: u64) {
    let time = SystemTime::now() - Duration::from_secs(hours * 60 * 60);
    File::open(path).unwrap().set_times(fs::FileTimes::new().set_accessed(time).set_modified(time)).unwrap();
}

#[test]
fn an_unused_queue_is_removed_unless_it_has_a_file() {
    let others = ["odmr.lock", ".refused"];
    let unused = |prepare: &dyn Fn(&Maildir)| {
        let (directory, maildir) = maildir();
        maildir.create().unwrap();
        Maildir::new(maildir.path().join(".refused")).create().unwrap();
        File::create(maildir.path().join("odmr.lock")).unwrap();
        prepare(&maildir);
        for part in ["tmp", "new", "cur", ".refused/tmp", ".refused/new", ".refused/cur"] {
            set_used(&maildir.path().join(part), 37);
        }
        (directory, maildir)
    };
    let (_directory, maildir) = unused(&|_| {});
    set_used(&maildir.path().join("new"), 35);
    maildir.remove_unused(&others, true).unwrap();
    assert!(maildir.exists(), "it was used 35 hours ago");
    set_used(&maildir.path().join("new"), 37);
    maildir.remove_unused(&others, true).unwrap();
    assert!(!maildir.path().exists());
    for file in ["new/1", "cur/1:2,S", "tmp/1", "new/.hidden", ".refused/new/1", "maildirsize", ".refused/x"] {
        let (_directory, maildir) = unused(&|maildir| drop(File::create(maildir.path().join(file)).unwrap()));
        maildir.remove_unused(&others, true).unwrap();
        assert!(
            maildir.exists() && maildir.path().join("tmp").exists() && maildir.path().join(file).exists(),
            "{file}"
        );
    }
    // An administrator has moved the queue to another disk.
    let (_directory, maildir) = unused(&|_| {});
    let link = maildir.path().with_file_name("link");
    std::os::unix::fs::symlink(maildir.path(), &link).unwrap();
    Maildir::new(&link).remove_unused(&others, true).unwrap();
    assert!(maildir.exists() && link.exists());
}

#[test]
fn a_message_is_stored_even_if_its_queue_is_removed_while_it_is_written() {
    let (_directory, maildir) = maildir();
    maildir.create().unwrap();
    let mut writer = MessageWriter::default();
    writer.begin(&maildir, "1", b"").unwrap();
    for part in ["tmp", "new", "cur"] {
        set_used(&maildir.path().join(part), 37);
    }
    maildir.remove_unused(&[], true).unwrap();
    assert!(maildir.exists(), "a writer has a file in it");
    // In another order of events `new` does not exist.
    fs::remove_dir(maildir.path().join("new")).unwrap();
    writer.commit().unwrap();
    assert_eq!(maildir.entries().unwrap().len(), 1);
}

/// The clock may be set while a message is written.
#[test]
fn a_file_in_tmp_with_an_impossible_time_is_removed_36_hours_after_it_was_seen() {
    let (_directory, maildir) = maildir();
    maildir.create().unwrap();
    let (now, year) = (SystemTime::now(), Duration::from_secs(365 * 24 * 60 * 60));
    for (name, time) in [("1970", SystemTime::UNIX_EPOCH), ("future", now + year)] {
        let path = maildir.path().join("tmp").join(name);
        let set = |time| {
            let times = fs::FileTimes::new().set_accessed(time).set_modified(time);
            File::options().append(true).create(true).open(&path).unwrap().set_times(times).unwrap();
        };
        set(time);
        maildir.sweep().unwrap();
        let metadata = path.metadata().unwrap();
        for seen in [metadata.modified().unwrap(), metadata.accessed().unwrap()] {
            assert!(seen + Duration::from_secs(1) > now && seen < now + Duration::from_secs(60), "{name}");
        }
        set(now - Duration::from_secs(37 * 60 * 60));
        maildir.sweep().unwrap();
        assert!(!path.exists(), "{name}");
    }
}

/// A spool may be below such directories: those of autofs, or a root on squashfs.
#[test]
fn directories_that_cannot_be_fsynced_are_left_out() {
    let process = Path::new("/proc/self/fd");
    if process.is_dir() {
        assert!(sync_directory(process).is_err(), "this is such a directory");
        sync_names(process).unwrap();
    }
}

#[test]
fn a_file_and_a_tree_that_exist_are_not_changed() {
    let root = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let file = root.path().join("file");
    create_file_durably(&file, "one", 0o640, None).unwrap();
    let error = create_file_durably(&file, "two", 0o600, None).unwrap_err();
    assert_eq!((error.kind(), mode(&file)), (io::ErrorKind::AlreadyExists, 0o640));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one");
    let tree = root.path().join("above/tree");
    let below = ["a", "a/b"].map(PathBuf::from);
    assert!(make_tree(&tree, &below, 0o750, None).unwrap());
    assert_eq!(["", "a", "a/b"].map(|name| mode(&tree.join(name))), [0o750; 3]);
    assert!(!make_tree(&tree, &["c".into()], 0o700, None).unwrap() && !tree.join("c").exists());
    assert_eq!(make_tree(&file, &[], 0o700, None).unwrap_err().kind(), io::ErrorKind::NotADirectory);
    remove_file_durably(&file).unwrap();
    assert!(remove_file_durably(&file).unwrap_err().to_string().contains("/file: "));
    // No temporary file is left in the same directory.
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(root.path().join("above")).unwrap().count(), 1);
}
