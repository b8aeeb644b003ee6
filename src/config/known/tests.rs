//! Tests of files of recipients.

use std::time::Duration;

use super::*;

fn domains() -> Vec<Domain> {
    ["example.org", "example.net"].map(|name| Domain::parse(name).unwrap()).into()
}

fn knows(list: &RecipientList, address: &str) -> bool {
    list.knows(&Mailbox::parse(address).unwrap())
}

fn read_text(text: &[u8]) -> Result<RecipientList, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let line = SourceLine { file: Path::new("acme.toml").into(), line: Some(3) };
    let name = file.path().display().to_string();
    read(file.path(), &domains()).map_err(|error| error.on(&line).to_string().replace(&name, "LIST"))
}

#[test]
fn files_are_read_line_by_line() {
    let text = "\u{feff}# ours\r\n\r\n  alice@EXAMPLE.org \r\n!alice+spam@example.org\n#bob@example.org\n@example.net";
    let list = read_text(text.as_bytes()).unwrap();
    assert_eq!(list.count(), 2);
    assert!(knows(&list, "alice+x@example.org") && knows(&list, "eva@example.net"));
    assert!(!knows(&list, "bob@example.org") && !knows(&list, "alice+spam@example.org"));
}

#[test]
fn a_list_with_a_mistake_is_rejected() {
    let long = [&b"alice@example.org\n"[..], &b"x".repeat(100_000)].concat();
    let many = "@example.org\n".repeat(1_000_001);
    let cases: [(&[u8], &str); 12] = [
        (b"", "acme.toml:3: LIST has no address"),
        (b"# nobody\n\n", "acme.toml:3: LIST has no address"),
        (b"alice@example.org\nbob@exam", "LIST:2: "),
        (b"alice@example.org\n\nalice\n", "LIST:3: \"alice\" is not a valid address"),
        (b"alice@example.com\n", "LIST:1: alice@example.com is in no domain of this account"),
        (b"@example.com\n", "LIST:1: @example.com is in no domain of this account"),
        (b"!@example.org\n", "LIST:1: \"!@example.org\" excepts a whole domain"),
        (b"alice@[127.0.0.1]\n", "LIST:1: \"alice@[127.0.0.1]\" is not a valid address"),
        (b"alice@example.org\n\xff\xfe\n", "LIST:2: is not UTF-8"),
        (b"\0\x01\x02@example.org\n", "LIST:1: "),
        (&long, "LIST:2: the line is too long"),
        (many.as_bytes(), "LIST has more than a million"),
    ];
    for (text, expected) in cases {
        let error = read_text(text).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let directory = tempfile::tempdir().unwrap();
    assert!(read(directory.path(), &domains()).is_err());
    let sparse = directory.path().join("sparse");
    fs::File::create(&sparse).unwrap().set_len(FILE_LIMIT + 1).unwrap();
    assert!(read(&sparse, &domains()).is_err());
    let pipe = directory.path().join("pipe");
    crate::platform::make_fifo(&pipe);
    assert!(read(&pipe, &domains()).is_err());
}

/// Lets the time pass during which a file must be unchanged.
fn wait_until_quiet(file: &RecipientsFile) {
    let stamp = fs::metadata(&file.path).ok().map(|found| FileStamp::of(&found));
    while stamp.is_some_and(|stamp| !stamp.is_quiet(SystemTime::now())) {
        std::thread::sleep(Duration::from_millis(20));
    }
    if let Some((_, since)) = &mut file.state.lock().change {
        *since -= QUIET_TIME;
    }
}

fn file_at(path: &Path) -> Arc<RecipientsFile> {
    let line = SourceLine { file: Path::new("acme.toml").into(), line: Some(3) };
    RecipientsFile::new(path.to_owned(), &domains(), line)
}

#[test]
fn a_file_that_changes_is_read_again_when_it_is_quiet() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("list");
    let write = |text: &str| fs::write(&path, text).unwrap();
    write("alice@example.org\n");
    let file = file_at(&path);
    let state = |address: &str| {
        let (list, settled) = file.current("acme");
        (knows(&list.unwrap(), address), settled)
    };
    // The file was written just now: a recipient that it lacks may be in the rest.
    assert_eq!((state("alice@example.org"), state("bob@example.org")), ((true, false), (false, false)));
    wait_until_quiet(&file);
    assert_eq!(state("bob@example.org"), (false, true));
    // The file is written in place, and a half of it is a valid file.
    write("bob@example.org\n");
    assert_eq!((state("alice@example.org"), state("bob@example.org")), ((true, false), (false, false)));
    write("bob@example.org\neva@example.org\n");
    assert_eq!(state("bob@example.org"), (false, false));
    wait_until_quiet(&file);
    assert_eq!((state("alice@example.org"), state("eva@example.org")), ((false, true), (true, true)));
    // A file with a mistake changes nothing.
    for text in ["", "eva@example.or", "rubbish\n"] {
        write(text);
        assert_eq!(state("eva@example.org"), (true, false));
        wait_until_quiet(&file);
        assert_eq!((state("eva@example.org"), state("alice@example.org")), ((true, true), (false, true)), "{text}");
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(state("alice@example.org"), (false, false));
    wait_until_quiet(&file);
    assert_eq!((state("eva@example.org"), state("alice@example.org")), ((true, true), (false, true)));
    // Another file is renamed into its place, with an old time of modification.
    let other = directory.path().join("other");
    fs::write(&other, "alice@example.org\n").unwrap();
    fs::File::open(&other).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    fs::rename(&other, &path).unwrap();
    assert_eq!(state("alice@example.org"), (false, false));
    wait_until_quiet(&file);
    assert_eq!(state("alice@example.org"), (true, true));
    // A list whose file has changed rejects no recipient.
    write("bob@example.org\n");
    assert_eq!((state("bob@example.org"), state("eva@example.org")), ((false, false), (false, false)));
}

#[test]
fn all_recipients_are_deferred_until_a_first_list_was_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("list");
    let file = file_at(&path);
    let recipients = KnownRecipients::File(file.clone());
    let look_up = |address: &str| recipients.look_up(&Mailbox::parse(address).unwrap(), "acme");
    let error = recipients.read().unwrap_err().to_string();
    assert!(error.starts_with("acme.toml:3: ") && error.contains("list cannot be read: No such file"), "{error}");
    assert_eq!(look_up("alice@example.org"), Knowledge::Unsettled);
    // The file with the mistake is read once, and not for each recipient.
    fs::write(&path, "alice\n").unwrap();
    wait_until_quiet(&file);
    assert_eq!(look_up("alice@example.org"), Knowledge::Unsettled);
    assert_eq!(file.state.lock().read, Some(fs::metadata(&path).ok().map(|found| FileStamp::of(&found))));
    fs::write(&path, "alice@example.org\n").unwrap();
    assert_eq!(look_up("alice@example.org"), Knowledge::Changing);
    wait_until_quiet(&file);
    assert_eq!(look_up("alice@example.org"), Knowledge::Known);
    assert_eq!(look_up("bob@example.org"), Knowledge::Unknown);
}
