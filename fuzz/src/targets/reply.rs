//! Replies: the lines of a peer are parsed as replies, which are relayed, softened, logged and parsed again.

use odmr::smtp::extensions::PeerExtensions;
use odmr::smtp::limits;
use odmr::smtp::reply::{Reply, ReplyReader, Severity};
use odmr::smtp::status::{HopReply, HopStage, RecipientStatus, is_about_us, may_be_about_sender, reply_of_hop};

use super::check;

pub fn run(input: &[u8]) {
    let mut reader = ReplyReader::default();
    let mut lines = input.split(|octet| *octet == b'\n').take(300).peekable();
    while let Some(line) = lines.next() {
        if lines.peek().is_none() {
            // The peer closes without a line end.
            let cut = reader.end(line);
            assert!(cut.is_none_or(|reply| reply.code() >= 400));
            return;
        }
        match reader.line(line) {
            Ok(Some(reply)) => one(&reply),
            Ok(None) => {}
            Err(error) => {
                assert!(error.0.chars().count() <= 80);
                reader = ReplyReader::default();
            }
        }
    }
}

/// Parses a reply as it is sent.
fn read(octets: &[u8]) -> Reply {
    let mut reader = ReplyReader::default();
    let mut replies: Vec<Reply> =
        check::replies(octets).iter().filter_map(|line| reader.line(line).expect("part of a reply")).collect();
    assert_eq!(replies.len(), 1, "{}", octets.escape_ascii());
    replies.remove(0)
}

fn one(reply: &Reply) {
    assert!((200..600).contains(&reply.code()) && reply.is_from_peer());
    assert!((1..=limits::STORED_REPLY_LINES).contains(&reply.lines().count()));
    // Each octet that is not UTF-8 was replaced by three octets.
    assert!(reply.lines().all(|line| line.len() <= 3 * limits::STORED_REPLY_LINE));
    check::shown(&reply.to_string());
    assert!(reply.to_string().chars().count() <= 330);
    PeerExtensions::parse(reply);

    if reply.severity() != Severity::Intermediate {
        relayed(reply);
    }

    let softened = reply.clone().softened();
    assert_ne!(softened.severity(), Severity::Permanent);
    assert_eq!(softened.is_softened(), reply.severity() == Severity::Permanent || reply.is_softened());
    if reply.severity() == Severity::Permanent {
        assert!(softened.code() == 451 && softened.enhanced().is_some_and(|code| code.starts_with("4.")));
    }
    check::reply(&softened);
    for stage in [HopStage::Recipient, HopStage::Message, HopStage::Content] {
        if let HopReply::AboutMail(hop) = reply_of_hop(reply.clone(), stage) {
            assert_eq!(hop.severity(), reply.severity());
            check::reply(&hop);
        }
    }
    status(reply);
}

/// The reply as the client of this host gets it.
fn relayed(reply: &Reply) {
    let relayed = reply.clone().for_relaying();
    check::reply(&relayed);
    let mut octets = Vec::new();
    relayed.write_to(&mut octets);
    assert!(octets.is_ascii());
    let again = read(&octets);
    assert_eq!((again.code(), again.enhanced()), (reply.code(), relayed.enhanced()));
    let is_plain = |line: &str| line.len() <= limits::REPLY_TEXT && !line.contains(|octet: char| octet.is_control());
    if relayed.lines().all(is_plain) && relayed.lines().count() <= limits::STORED_REPLY_LINES {
        assert_eq!(again.lines().collect::<Vec<_>>(), relayed.lines().collect::<Vec<_>>());
    }
}

/// The status of a recipient by the reply: RFC 5321 section 4.2.1.
fn status(reply: &Reply) {
    assert!(!(is_about_us(reply) && may_be_about_sender(reply)));
    let (rcpt, content) = (RecipientStatus::after_rcpt(reply), RecipientStatus::after_content(reply));
    assert_eq!(content.is_sent(), reply.code() / 100 == 2);
    assert_eq!(content.is_rejected(), reply.code() / 100 == 5);
    assert_eq!(rcpt.is_rejected(), reply.code() / 100 == 5 && reply.code() != 552);
    for status in [rcpt, content] {
        check::shown(&status.to_string());
        assert!(status.enhanced().split('.').count() == 3);
    }
}
