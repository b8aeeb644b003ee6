//! A queue with one file. The input is two octets, the name of the file, a line end, and the file. The queue offers the
//! message, it is read and settled, and offered again. Then its envelope and content are stored as a new message.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use odmr::ids::Ids;
use odmr::mail::address::Domain;
use odmr::maildir::continues_field;
use odmr::queue::envelope::{ParseOptions, Parsed, ParsedEnvelope, parse};
use odmr::queue::{Queue, QueueName, QueuedMessage};
use odmr::smtp::command::Recipient;
use odmr::smtp::content::WireSize;
use odmr::smtp::reply::Reply;
use odmr::smtp::status::{DecidedBy, DeliveryResult, RecipientStatus};

use super::directory::temporary_directory;

pub fn run(input: &[u8]) {
    let Some(([how, results], rest)) = input.split_first_chunk::<2>() else { return };
    let end = rest.iter().position(|octet| *octet == b'\n').unwrap_or(0);
    let (file_name, file) = (&rest[..end], rest.get(end + 1..).unwrap_or_default());
    if file_name.windows(3).any(|part| part == b",P=") {
        // A message that has ended sessions may be skipped.
        return;
    }
    let root = temporary_directory();
    let name = queue_name(root.path(), "held", *how);
    let path = place(&name, file_name, *how);
    let ids = Ids::fixed();
    let arrived = ids.clock().now();
    fs::write(&path, file).expect("a file");
    let queue = Queue::new("relay.example.net", ids, Duration::from_secs(60));
    let options = ParseOptions { domain: name.domain.as_ref(), prefix: None, id: "none", arrived };
    let parsed = match parse(file, true, options) {
        Parsed::Envelope(parsed) if !parsed.recipients().is_empty() => parsed,
        _ => {
            // A file that cannot be sent stays where it is, unless all of its recipients are settled.
            drop(queue.try_lock(&name).expect("the lock").next_message());
            return;
        }
    };
    offered(&queue, &name, file, &parsed, *results);
    let left = parse_of(&name, options);
    check_left(&name, file, &parsed, *results, left);
    stored(&queue, root.path(), &parsed, &file[parsed.octets..], *how);
}

fn queue_name(root: &Path, name: &str, how: u8) -> QueueName {
    let domain = Domain::parse("example.org").filter(|_| how & 1 == 1);
    let path = root.join(name);
    for directory in ["tmp", "new", "cur"] {
        fs::create_dir_all(path.join(directory)).expect("a directory");
    }
    QueueName { path, domain, retries: how & 2 == 2, ..QueueName::default() }
}

/// The path of the file: with the name of the input if that is a possible name of a file, otherwise with the name `1`.
fn place(name: &QueueName, file: &[u8], how: u8) -> PathBuf {
    let good = !file.is_empty() && file.len() <= 200 && !file.contains(&b'/') && !file.contains(&0) && file[0] != b'.';
    let file = OsStr::from_bytes(if good { file } else { b"1" });
    name.path.join(if how & 4 == 4 { "cur" } else { "new" }).join(file)
}

/// The status of a recipient.
fn status(results: u8, number: usize) -> RecipientStatus {
    match results >> (2 * (number % 4)) & 3 {
        0 => RecipientStatus::Sent(Reply::new(250, "2.0.0", "OK")),
        1 => RecipientStatus::Rejected(Reply::new(550, "5.1.1", "No such mailbox")),
        2 => RecipientStatus::Deferred(Reply::new(450, "4.2.1", "Later / \u{fc}")),
        _ => RecipientStatus::InDoubt,
    }
}

fn is_open(results: u8, number: usize) -> bool {
    status(results, number).is_open()
}

fn read(message: &mut QueuedMessage) -> Vec<u8> {
    let mut content = Vec::new();
    message.read_to_end(&mut content).expect("the content");
    content
}

fn size(content: &[u8]) -> u64 {
    let mut size = WireSize::default();
    size.feed(content);
    size.finish()
}

fn offered(queue: &Queue, name: &QueueName, file: &[u8], parsed: &ParsedEnvelope, results: u8) {
    let mut lock = queue.try_lock(name).expect("the lock");
    let mut message = lock.next_message().unwrap_or_else(|| panic!("not offered: {}", file.escape_ascii()));
    let content = &file[parsed.octets..];
    assert_eq!(read(&mut message), content);
    assert_eq!(message.envelope, parsed.envelope.envelope);
    // The name of a file that we have written has the size.
    if !parsed.ours {
        assert_eq!(message.size, size(content));
        assert_eq!(message.eight_bit, !content.is_ascii());
    }
    message.outgoing_message();
    let count = parsed.recipients().len();
    let recipients = (0..count).map(|number| status(results, number)).collect();
    lock.settle(message, &DeliveryResult { recipients, decided_by: DecidedBy::PeerAtContent }).expect("a disk");
}

/// The contents of the only file in a queue; `None`: there is none.
fn file_of(name: &QueueName) -> Option<Vec<u8>> {
    let files = ["new", "cur"].map(|directory| fs::read_dir(name.path.join(directory)).expect("a directory"));
    let mut files = files.into_iter().flatten().map(|file| file.expect("an entry").path());
    let file = files.next().map(|path| fs::read(path).expect("a file"));
    assert_eq!(files.next(), None, "one file, not two");
    file
}

/// The file that is left in the queue, and its envelope.
fn parse_of(name: &QueueName, options: ParseOptions<'_>) -> Option<(Vec<u8>, Box<ParsedEnvelope>)> {
    let file = file_of(name)?;
    match parse(&file, true, options) {
        Parsed::Envelope(parsed) => Some((file, parsed)),
        other => panic!("{other:?} from {}", file.escape_ascii()),
    }
}

/// Checks that no recipient is lost, and that no recipient that is settled is offered again.
fn check_left(
    name: &QueueName, file: &[u8], parsed: &ParsedEnvelope, results: u8, left: Option<(Vec<u8>, Box<ParsedEnvelope>)>,
) {
    let all = parsed.recipients().iter().enumerate();
    let open: Vec<&Recipient> = all.filter(|(number, _)| is_open(results, *number)).map(|(_, one)| one).collect();
    match left {
        Some((left, now)) => {
            assert_eq!(now.recipients().iter().collect::<Vec<_>>(), open, "{}", left.escape_ascii());
            assert_eq!(now.unread, parsed.unread);
            assert!(!open.is_empty() || !parsed.unread.is_empty(), "nothing is left for {}", left.escape_ascii());
            assert_eq!(left[now.octets..], file[parsed.octets..]);
        }
        None => {
            assert!(open.is_empty() && parsed.unread.is_empty(), "lost: {}", file.escape_ascii());
            // A message that was rejected without a DSN is set aside.
            let rejected = (0..parsed.recipients().len()).any(|number| status(results, number).is_rejected());
            if rejected {
                let aside = fs::read_dir(name.path.join(".refused/new")).expect("a directory").count();
                assert_eq!(aside, 1);
            }
        }
    }
}

/// Checks that a message that we store is read back octet for octet.
fn stored(queue: &Queue, root: &Path, parsed: &ParsedEnvelope, content: &[u8], how: u8) {
    const HEAD: &str = "Received: by relay.example.net; Fri, 02 Jan 2026 03:04:05 +0000\n";
    let name = QueueName { retries: false, ..queue_name(root, "stored", how) };
    let mut writer = queue.begin_message(&[(name.clone(), parsed.envelope.clone())], HEAD).expect("a short envelope");
    for piece in content.chunks(usize::from(how >> 3) * 7 + 1) {
        writer.write(piece).expect("a disk");
    }
    assert_eq!(writer.commit().expect("a disk").len(), 1);
    let blank = if continues_field(content) { "\n" } else { "" };
    let whole = [HEAD.as_bytes(), blank.as_bytes(), content].concat();
    let mut lock = queue.try_lock(&name).expect("the lock");
    let mut message = lock.next_message().expect("the message");
    assert!(read(&mut message) == whole, "{}", whole.escape_ascii());
    assert_eq!(message.envelope, parsed.envelope.envelope);
    assert_eq!(message.id, parsed.envelope.id);
    assert_eq!(message.size, size(&whole), "{}", whole.escape_ascii());
    assert_eq!(message.eight_bit, !whole.is_ascii());
}
