//! Names that a user types: of hosts, domains, customers and users. An error has the text to type instead.

use std::net::IpAddr;

use crate::cli::exit::{ExitError, Sysexit};
use crate::mail::address::Domain;

/// Octets of a customer's name. It is the name of a file, with more after it.
const NAME_LIMIT: usize = 64;

/// Octets of the name of a user: the limit of useradd(8).
const USER_NAME_LIMIT: usize = 32;

/// Parses the name of a host or a domain, as a person types it; `command`: what is typed before it; `example`: a good one.
///
/// # Errors
///
/// It is not a name, or has no dot (65).
pub fn typed_domain(text: &str, command: &str, example: &str) -> Result<Domain, ExitError> {
    let domain = |text: &str| Domain::parse(text.strip_suffix('.').unwrap_or(text)).filter(|_| !is_address(text));
    let wrong = |what: &str, instead: &str| {
        // The rest may not be a valid name either.
        let instead = domain(instead).filter(|domain| domain.as_str().contains('.'));
        let instead = instead.as_ref().map_or(example, Domain::as_str);
        Err(ExitError::new(Sysexit::DataError, format!("{text:?} {what}: type `{command} {instead}`")))
    };
    if let Some((_, rest)) = text.split_once("://") {
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = host.rsplit('@').next().unwrap_or_default();
        return wrong("is a URL", host.split(':').next().unwrap_or_default());
    }
    if let Some((_, host)) = text.rsplit_once('@') {
        return wrong("is an e-mail address", host);
    }
    if is_address(text) {
        return wrong("is an IP address, and mail servers find each other by names", "");
    }
    if let Some((host, _)) = text.split_once([':', '/']) {
        return wrong("has more in it than a name", host);
    }
    match domain(text) {
        None => wrong("is not a valid name, which has letters, digits and hyphens, with dots between them", ""),
        Some(domain) if !domain.as_str().contains('.') => wrong("has no dot, so it is not the whole name", ""),
        Some(domain) => Ok(domain),
    }
}

fn is_address(text: &str) -> bool {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<IpAddr>().is_ok()
        || bare.contains('.')
            && bare.contains(|octet: char| octet.is_ascii_digit())
            && bare.bytes().all(|octet| octet.is_ascii_digit() || octet == b'.')
}

/// Checks the name of a new customer, which is the name of its file and its login name.
///
/// # Errors
///
/// It cannot be a name of that kind (65).
pub fn check_customer_name(name: &str) -> Result<(), ExitError> {
    let wrong = |text: &str| Err(ExitError::new(Sysexit::DataError, format!("{name:?} {text}")));
    if let Some(bare) = name.strip_suffix(".toml") {
        return wrong(&format!("is the name of a file: type that of the customer, {bare}"));
    }
    let allowed = |octet: u8| octet.is_ascii_alphanumeric() || b"._-".contains(&octet);
    match name {
        _ if name.is_empty() || name.len() > NAME_LIMIT => {
            wrong(&format!("has {} octets: the name of a customer has 1 to {NAME_LIMIT}", name.len()))
        }
        _ if !name.bytes().all(allowed) || name.starts_with(['.', '-']) => wrong(
            "is not a valid name of a customer: it has letters, digits, `.`, `_` and `-`, and begins with a letter or a \
             digit, such as acme",
        ),
        _ => Ok(()),
    }
}

/// Checks the name of a user that may have to be made: it is an argument of other programs.
///
/// # Errors
///
/// It cannot be a name of that kind (65).
pub(super) fn check_user_name(name: &str) -> Result<(), ExitError> {
    let allowed = |octet: u8| octet.is_ascii_alphanumeric() || b"._-".contains(&octet);
    let begins = name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_');
    if begins && name.len() <= USER_NAME_LIMIT && name.bytes().all(allowed) {
        return Ok(());
    }
    let text = format!("{name:?} is not a valid name of a user: type one such as --user odmr");
    Err(ExitError::new(Sysexit::DataError, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_written_in_its_canonical_form() {
        for (typed, domain) in [
            ("relay.example.net", "relay.example.net"),
            ("Relay.Example.NET.", "relay.example.net"),
            ("bücher.example", "xn--bcher-kva.example"),
            ("4you.example", "4you.example"),
        ] {
            assert_eq!(typed_domain(typed, "odmr", "x").unwrap().as_str(), domain);
        }
    }

    #[test]
    fn the_error_about_a_wrong_domain_has_what_to_type() {
        let check = |typed: &str, what: &str, instead: &str| {
            let error = typed_domain(typed, "odmr setup provider", "relay.example.net").unwrap_err();
            let text = &error.text;
            assert_eq!(error.code, Sysexit::DataError);
            assert!(text.starts_with(&format!("{typed:?} ")) && text.contains(what), "{text}");
            assert!(text.ends_with(&format!("type `odmr setup provider {instead}`")), "{text}");
        };
        let example = "relay.example.net";
        check("https://mx.example.org/odmr", "is a URL", "mx.example.org");
        check("smtp://user@MX.example.org:366", "is a URL", "mx.example.org");
        check("http://192.0.2.1/", "is a URL", example);
        check("postmaster@mx.example.org", "is an e-mail address", "mx.example.org");
        check("192.0.2.1", "is an IP address", example);
        check("2001:db8::1", "is an IP address", example);
        check("[192.0.2.1]", "is an IP address", example);
        check("mx.example.org:366", "has more in it than a name", "mx.example.org");
        check("mx.example.org/odmr", "has more in it than a name", "mx.example.org");
        check("relay", "has no dot", example);
        check("relay.", "has no dot", example);
        check("", "is not a valid name", example);
        check("..", "is not a valid name", example);
        check("...", "is not a valid name", example);
        check("mx_1.example.org", "is not a valid name", example);
        check("-mx.example.org", "is not a valid name", example);
        check("two words.example", "is not a valid name", example);
    }

    #[test]
    fn the_name_of_a_customer_is_that_of_a_file_and_a_login() {
        for name in ["acme", "Acme-2.example_org", "4", &"a".repeat(64)] {
            assert!(check_customer_name(name).is_ok(), "{name}");
        }
        for (name, part) in [
            ("", "has 0 octets"),
            (&*"a".repeat(65), "has 65 octets"),
            (".acme", "begins with a letter"),
            ("-c", "begins with a letter"),
            ("../acme", "is not a valid name"),
            ("a/b", "is not a valid name"),
            ("a b", "is not a valid name"),
            ("ac\nme", "is not a valid name"),
            ("bücher", "is not a valid name"),
            ("acme.toml", "type that of the customer, acme"),
        ] {
            let error = check_customer_name(name).unwrap_err();
            assert!(error.code == Sysexit::DataError && error.text.contains(part), "{}", error.text);
        }
        for (name, good) in
            [("odmr", true), ("_odmr", true), ("-o", false), ("", false), ("a:b", false), ("Root", false)]
        {
            assert_eq!(check_user_name(name).is_ok(), good, "{name}");
        }
    }
}
