//! Addresses and lists of them: the input is read as addresses, as a list, and as the header of a submitted message.

use std::net::IpAddr;

use odmr::mail::address::{Domain, ForwardPath, Host, Mailbox, ReversePath, forward_path, literal, reverse_path};
use odmr::mail::address_list::{AddressList, divide, parse_addresses};
use odmr::mail::header::{Header, HeaderAdditions};
use odmr::mail::received::{ClientInfo, Received};
use odmr::smtp::command::Command;

use super::check;
use super::command::{ALL, parse};

pub fn run(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    for line in text.lines().take(20) {
        domain(line);
        mailbox(line);
        list(line);
        client(line);
    }
    list(&text);
    header(input);
}

fn home() -> Domain {
    Domain::parse("home.example").expect("a domain")
}

fn domain(text: &str) {
    let (strict, any) = (Domain::parse(text), Domain::parse_any(text));
    if let Some(strict) = &strict {
        assert_eq!(any.as_ref(), Ok(strict), "two readings of {text:?}");
        assert!(strict.is_strict() && strict.file_name() == strict.as_str());
    }
    for domain in strict.into_iter().chain(any.ok()) {
        let name = domain.as_str();
        assert!((1..=255).contains(&name.len()) && name.bytes().all(|octet| octet.is_ascii_graphic()), "{name}");
        assert_eq!(Domain::parse_any(name).as_ref(), Ok(&domain), "{text:?}");
        let file = domain.file_name();
        assert!((1..=255).contains(&file.len()) && !file.starts_with('.') && !file.contains('/'), "{file}");
        assert_eq!(Domain::of_file_name(&file).as_ref(), Some(&domain), "{file}");
        assert_eq!(Domain::parse_odmr(name.as_bytes()).is_some(), domain.is_strict() && name.contains('.'));
    }
    if let Some(domain) = Domain::of_file_name(text) {
        assert_eq!(domain.file_name(), text);
    }
    if let Some(host) = Domain::of_dns(text) {
        check::shown(host.as_str());
        assert!(!host.as_str().contains(' '));
    }
    if let Ok(host) = Host::parse_any(text) {
        assert_eq!(Host::parse_any(&host.to_string()), Ok(host));
    }
}

fn mailbox(text: &str) {
    let path = format!("<{text}> X");
    if let Ok((found, used)) = reverse_path(path.as_bytes()) {
        assert!(used <= path.len() && path.as_bytes()[used - 1] == b'>');
        let again = format!("<{found}>");
        assert_eq!(reverse_path(again.as_bytes()), Ok((found.clone(), again.len())), "{text:?}");
        if let ReversePath::Mailbox(mailbox) = found {
            one_mailbox(&mailbox);
        }
    }
    if let Ok((found, _)) = forward_path(path.as_bytes()) {
        let again = format!("<{found}>");
        assert_eq!(forward_path(again.as_bytes()), Ok((found.clone(), again.len())), "{text:?}");
        if let ForwardPath::Mailbox(mailbox) = found {
            one_mailbox(&mailbox);
        }
    }
    if let Some(mailbox) = Mailbox::parse(text) {
        assert_eq!(Mailbox::parse_any(text).as_ref(), Ok(&mailbox));
        one_mailbox(&mailbox);
    }
}

fn one_mailbox(mailbox: &Mailbox) {
    let text = mailbox.to_string();
    check::shown(&text);
    for form in [text.clone(), mailbox.with_a_labels().into_owned(), mailbox.canonical().to_string()] {
        assert_eq!(Mailbox::parse_any(&form).as_ref(), Ok(mailbox), "{form:?} of {text:?}");
    }
    assert!(!mailbox.is_ascii() || mailbox.with_a_labels().is_ascii(), "{text}");
    let canonical = mailbox.canonical();
    assert_eq!(canonical.canonical().to_string(), canonical.to_string());
    if let Some(domain) = mailbox.domain() {
        assert_eq!(&mailbox.with_domain(domain), mailbox);
        assert_eq!(mailbox.with_domain(&home()).domain(), Some(&home()));
    }
    // In a header the address is the same, with angle brackets or without; unless it looks like an encoded word (RFC 2047).
    let header = mailbox.header_form();
    if text.len() <= 900 && !mailbox.local().contains(char::REPLACEMENT_CHARACTER) && !text.contains("=?") {
        for form in [header.to_string(), format!("Eva <{header}>")] {
            assert_eq!(parse_addresses(&form, &home()).as_deref(), Ok(&[mailbox.clone()][..]), "{form:?} of {text:?}");
        }
    }
}

fn list(text: &str) {
    let list = AddressList::parse(text, Some(&home()));
    let within = |range: &std::ops::Range<usize>| text.get(range.clone()).is_some();
    let mut end = 0;
    for address in &list.addresses {
        assert!(address.at >= end && text[address.at..].starts_with(address.text), "{text:?}");
        end = address.at + address.text.len();
        assert!(within(&address.address));
        match &address.mailbox {
            Ok(mailbox) => {
                one_mailbox(mailbox);
                // The address is within its entry.
                assert!(address.address.start >= address.at && address.address.end <= end);
            }
            Err(reason) => assert!(!reason.is_empty() && address.address.is_empty()),
        }
    }
    assert!(list.phrases.iter().flatten().chain(&list.comments).all(within));
    assert!(list.commas.iter().all(|at| text.as_bytes()[*at] == b','));
    let all: Result<Vec<_>, _> = divide(text, Some(&home())).into_iter().map(|address| address.mailbox).collect();
    assert_eq!(parse_addresses(text, &home()), all);
}

/// The name of a client in EHLO goes into the `Received` field, and from there to a next hop (XCLIENT).
fn client(line: &str) {
    let Ok(Command::Ehlo(helo)) = parse(format!("EHLO {line}").as_bytes(), ALL) else { return };
    for address in ["192.0.2.1", "2001:db8::1"].map(|text| text.parse::<IpAddr>().expect("an address")) {
        let peer = literal(address);
        let received = Received {
            helo: Some(&helo),
            extended: true,
            peer: &peer,
            by: "relay.example.net",
            utf8: false,
            tls: None,
            authenticated: false,
            recipient: None,
        };
        let field = received.field("id1", "Fri, 02 Jan 2026 03:04:05 +0000");
        assert_eq!(Header::parse(field.as_bytes()).octets(), field.len());
        let info = Header::parse(field.as_bytes()).client_info("relay.example.net").expect("our own field");
        assert_eq!(info.address, address, "{field}");
        assert!(info.extended && info.helo.as_ref().is_none_or(|name| *name == helo), "{field}");
    }
    let _ = ClientInfo::parse(line, "relay.example.net");
}

fn header(content: &[u8]) {
    let header = Header::parse(content);
    assert!(header.octets() <= content.len());
    let relayed = header.relayed();
    let again = Header::parse(&relayed);
    assert_eq!(again.relayed(), relayed);
    let thread = header.thread();
    assert!(
        thread.message_id.iter().chain(&thread.references).all(|id| id.bytes().all(|octet| octet.is_ascii_graphic()))
    );
    for drop_bcc in [false, true] {
        let additions = HeaderAdditions {
            home: home(),
            date: "Fri, 02 Jan 2026 03:04:05 +0000".to_owned(),
            message_id: "<1@home.example>".to_owned(),
            from: Some("Eva <eva@home.example>".to_owned()),
            drop_bcc,
        };
        let completed = header.complete(&additions);
        let again = Header::parse(&completed);
        assert_eq!(again.octets(), completed.len(), "the header has an end: {}", completed.escape_ascii());
        // A completed header names the same recipients.
        if !drop_bcc && let Ok(recipients) = header.recipients(&home()) {
            assert_eq!(again.recipients(&home()), Ok(recipients), "{}", completed.escape_ascii());
        }
        // A complete header does not change. (Text that is neither ASCII nor an address may be read differently.)
        if content.is_ascii() {
            // Added lines have the line end of the first line, which may have been removed.
            let lines = |octets: &[u8]| octets.iter().filter(|octet| **octet != b'\r').copied().collect::<Vec<_>>();
            assert_eq!(lines(&again.complete(&additions)), lines(&completed), "{}", completed.escape_ascii());
        }
    }
}
