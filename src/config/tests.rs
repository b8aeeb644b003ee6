//! Whole files: the values, the defaults, and the errors about mistakes.

use super::*;
use crate::mail::address::{Domain, Mailbox};
use crate::net::pin::Pin;
use crate::queue::retry::Retry;
use crate::recipients::RecipientRules;
use crate::sasl::{CertificateDigests, Login, Mechanism, Unavailable};
use crate::schedule::{Schedule, When};
use crate::session::{ClientIdentity, Limits, RemoteSettings, Timeouts, TlsMode};
use crate::smtp::client::Without8BitMime;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tempfile::TempDir;

const PROVIDER: &str = r#"hostname = "relay.example.net"
spool = "spool"
customers = "customers.d"
[odmr]
require-tls = false
"#;

const ACME: &str = r#"domains = ["example.org", "example.com"]
secret = "open sesame"
"#;

const CUSTOMER: &str = r#"hostname = "mail.example.org"
[provider]
address = "relay.example.net"
name = "acme"
secret = "open sesame"
[mailboxes]
root = "mail"
accept = ["alice@example.org", "@example.com"]
"#;

/// Files in a new directory, which other users may not read.
fn files(files: &[(&str, &str)]) -> TempDir {
    let directory = TempDir::new().unwrap();
    fs::create_dir(directory.path().join("customers.d")).unwrap();
    for (name, text) in files {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        mode(&path, 0o640);
    }
    directory
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Of the secret `pencil` (RFC 7677 section 3).
const VERIFIER: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
                        wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

/// The error about `odmr.toml` among these files, without the name of their directory.
fn error_of(directory: &TempDir) -> String {
    let error = match Config::load(&directory.path().join("odmr.toml")) {
        Err(error) => error,
        // A mistake in the file of one customer is not an error of the configuration.
        Ok(Config::Provider(config)) => config.accounts.skipped().first().expect("a mistake").error.clone(),
        Ok(Config::Customer(_)) => panic!("no error"),
    };
    let error = error.to_string();
    assert!(!error.contains(char::is_control), "one error, one line:\n{error}");
    error.replace(&format!("{}/", directory.path().display()), "")
}

fn assert_error(directory: &TempDir, place: &str, phrase: &str) {
    let error = error_of(directory);
    let right = error.starts_with(&format!("{place}: ")) && error.contains(phrase);
    assert!(right, "\nwanted: {place}: … {phrase} …\n   got: {error}");
}

/// A provider's file with `old` replaced by `new` (at the end, if `old` is empty) is rejected.
fn provider(old: &str, new: &str, place: &str, phrase: &str) {
    let text = changed(PROVIDER, old, new);
    let directory = files(&[("odmr.toml", &text), ("customers.d/acme.toml", ACME)]);
    assert_error(&directory, place, phrase);
}

fn customer(old: &str, new: &str, place: &str, phrase: &str) {
    let directory = files(&[("odmr.toml", &changed(CUSTOMER, old, new))]);
    assert_error(&directory, place, phrase);
}

/// A customer of a provider with `old` replaced by `new` is rejected.
fn account(old: &str, new: &str, place: &str, phrase: &str) {
    let text = changed(ACME, old, new);
    let directory = files(&[("odmr.toml", PROVIDER), ("customers.d/acme.toml", &text)]);
    assert_error(&directory, place, phrase);
}

fn changed(text: &str, old: &str, new: &str) -> String {
    if old.is_empty() {
        return format!("{text}{new}");
    }
    assert!(text.contains(old), "{old:?} is not in the file");
    text.replacen(old, new, 1)
}

fn domain(text: &str) -> Domain {
    Domain::parse(text).unwrap()
}

/// Rules: ODMR-01.
#[test]
fn the_least_provider_has_the_documented_defaults() {
    let directory = files(&[("odmr.toml", PROVIDER), ("customers.d/acme.toml", ACME)]);
    let Ok(Config::Provider(provider)) = Config::load(&directory.path().join("odmr.toml")) else {
        panic!("not a provider's file");
    };
    assert_eq!(provider.hostname, "relay.example.net");
    assert_eq!(provider.spool, directory.path().join("spool"));
    assert!(provider.tls.is_none());
    assert_eq!(provider.inbound.listen, ["[::]:25".parse().unwrap()]);
    assert_eq!((provider.inbound.max_size, provider.inbound.offer_dsn), (52_428_800, true));
    assert_eq!(provider.odmr.listen, ["[::]:366".parse().unwrap()]);
    assert_eq!(provider.odmr.listen_tls, []);
    assert!(!provider.odmr.require_tls && provider.odmr.cram_md5);
    assert_eq!(provider.relay, relay(""));
    let acme = provider.accounts.account("acme").unwrap();
    assert_eq!((acme.relay, acme.any_sender, acme.max_size, acme.rate), (true, false, None, 0));
    assert_eq!(provider.limits, Limits::default());
    assert_eq!(provider.timeouts, Timeouts::default());
    assert_eq!(provider.timeouts.atrn, Duration::from_secs(600));
    assert!(!format!("{provider:?}").contains("sesame"));
}

#[test]
fn every_key_of_a_provider_is_read() {
    let text = r#"
        hostname = "EXAMPLE.NET"
        spool = "/var/spool/odmr"
        customers = "customers.d"
        [tls]
        certificate = "relay.pem"
        key = "/etc/relay.key"
        [inbound]
        listen = [":2525", "127.0.0.1:0"]
        max-size = 1000000
        offer-dsn = false
        [odmr]
        listen = []
        listen-tls = ["127.0.0.1:0", "127.0.0.1:0"]
        require-tls = true
        cram-md5 = false
    "#;
    let directory = files(&[("odmr.toml", text)]);
    let provider = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap();
    assert_eq!(provider.hostname, "EXAMPLE.NET");
    assert_eq!(provider.spool, Path::new("/var/spool/odmr"));
    let tls = provider.tls.unwrap();
    assert_eq!((tls.certificate, tls.key), (directory.path().join("relay.pem"), "/etc/relay.key".into()));
    assert_eq!((provider.inbound.max_size, provider.inbound.offer_dsn), (1_000_000, false));
    assert_eq!((provider.odmr.listen.len(), provider.odmr.listen_tls.len()), (0, 2));
    assert!(provider.odmr.require_tls && !provider.odmr.cram_md5);
    assert_eq!(provider.accounts.iter().count(), 0);
}

/// Rules: SMTP-60.
#[test]
fn every_limit_and_timeout_is_read() {
    let text = r#"
        [limits]
        connections = 1
        connections-per-address = 2
        recipients = 1000
        errors = 3
        auth-failures = 4
        turned-sessions = 5
        messages-per-turn = 6
        octets-per-turn = "6MiB"
        min-free = 0
        received-hops = 7
        [timeouts]
        connect = "1ms"
        greeting = "2ms"
        mail = "3ms"
        recipient = "4ms"
        data = "5ms"
        block = "6ms"
        end = "7ms"
        command = "8ms"
        atrn = "11m"
        outgoing = "14ms"
        handshake = "9ms"
        session = "10ms"
        turn = "11ms"
        takeover = "12ms"
        shutdown = "13ms"
    "#;
    let directory = files(&[("odmr.toml", &changed(PROVIDER, "", text))]);
    let provider = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap();
    let limits = Limits {
        connections: 1,
        connections_per_address: 2,
        recipients: 1000,
        errors: 3,
        auth_failures: 4,
        turned_sessions: 5,
        messages_per_turn: 6,
        octets_per_turn: 6 << 20,
        min_free: 0,
        received_hops: 7,
    };
    assert_eq!(provider.limits, limits);
    let times = &provider.timeouts;
    let short = [
        times.connect,
        times.greeting,
        times.mail,
        times.recipient,
        times.data,
        times.block,
        times.end,
        times.command,
        times.handshake,
        times.session,
        times.turn,
        times.takeover,
        times.shutdown,
        times.outgoing,
    ];
    assert_eq!(short.map(|time| time.as_millis()), std::array::from_fn(|at| at as u128 + 1));
    assert_eq!(times.atrn, Duration::from_secs(660));
}

fn relay(text: &str) -> RelayConfig {
    let text = format!("{PROVIDER}[relay]\n{text}\n");
    let directory = files(&[("odmr.toml", &text), ("secret", "open sesame\n")]);
    ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap().relay
}

fn outgoing(text: &str) -> OutgoingConfig {
    let text = format!("{CUSTOMER}[outgoing]\nqueue = \"out\"\n{text}\n");
    let directory = files(&[("odmr.toml", &text)]);
    CustomerConfig::load(&directory.path().join("odmr.toml")).unwrap().outgoing.unwrap()
}

fn login(name: &str, secret: &str) -> Option<Login> {
    Some(Login::with_secret(name.to_owned(), secret.into()))
}

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[test]
fn without_a_table_mail_goes_by_mx() {
    let relay = relay("");
    assert_eq!((&relay.smarthost, relay.tls, relay.tls_for.len(), relay.resolver), (&None, TlsPolicy::May, 0, None));
    assert_eq!((relay.port, relay.allow_private, relay.connections, relay.connections_per_host), (25, false, 20, 5));
    let times = Retry { first: 5 * MINUTE, max: 4 * HOUR, give_up: 5 * DAY, delay_warning: Some(4 * HOUR) };
    assert_eq!(relay.retry, times);
}

#[test]
fn every_key_of_relay_is_read() {
    let relay = relay(
        r#"
            smarthost = "smtp.example.net"
            smarthost-tls = "implicit"
            ca = "/etc/ca.pem"
            name = "relay"
            secret-file = "secret"
            tls = "must"
            tls-for = { "Example.COM" = "verify", localhost = "may", "my_host.example" = "must" }
            resolver = "127.0.0.1:5353"
            port = 2525
            allow-private = true
            connections = 1000
            connections-per-host = 1
            retry-first = "1s"
            retry-max = "2s"
            give-up = "3s"
            delay-warning = "never"
            "#,
    );
    assert!(!format!("{relay:?}").contains("sesame"));
    let smarthost = RemoteSettings {
        address: "smtp.example.net:587".to_owned(),
        host: "smtp.example.net".to_owned(),
        tls: TlsMode::Implicit,
        ca: Some("/etc/ca.pem".into()),
        pins: Vec::new(),
        identity: None,
        login: login("relay", "open sesame"),
    };
    assert_eq!(relay.smarthost, Some(smarthost));
    let policy = |name| relay.policy(&domain(name));
    assert_eq!(policy("example.com"), TlsPolicy::Verify);
    assert_eq!(policy("localhost"), TlsPolicy::May);
    assert_eq!(policy("sub.example.com"), TlsPolicy::Must);
    assert_eq!(relay.resolver, Some("127.0.0.1:5353".parse().unwrap()));
    assert_eq!((relay.port, relay.allow_private, relay.connections, relay.connections_per_host), (2525, true, 1000, 1));
    let seconds = Duration::from_secs;
    let times = Retry { first: seconds(1), max: seconds(2), give_up: seconds(3), delay_warning: None };
    assert_eq!(relay.retry, times);
}

/// Each table of a client has the key. The default is to send 8-bit content, as nearly all servers accept it.
#[test]
fn eight_bit_content_is_sent_or_bounced() {
    let of_provider = |table: &str, line: &str| {
        let text = changed(&format!("{PROVIDER}[relay]\n"), table, &format!("{table}\n{line}"));
        let directory = files(&[("odmr.toml", &text)]);
        let provider = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap();
        (provider.odmr.without_8bitmime, provider.relay.without_8bitmime)
    };
    let of_customer = |table: &str, line: &str| {
        let text = format!("{CUSTOMER}[outgoing]\nqueue = \"out\"\n");
        let directory = files(&[("odmr.toml", &changed(&text, table, &format!("{table}\n{line}")))]);
        let customer = CustomerConfig::load(&directory.path().join("odmr.toml")).unwrap();
        (customer.outgoing.unwrap().without_8bitmime, customer.mailboxes.without_8bitmime)
    };
    let (send, bounce) = (Without8BitMime::Send, Without8BitMime::Bounce);
    assert_eq!((of_provider("[odmr]", ""), of_customer("[outgoing]", "")), ((send, send), (send, send)));
    let (sends, line) = ("without-8bitmime = \"send\"", "without-8bitmime = \"bounce\"");
    assert_eq!(of_provider("[odmr]", sends), (send, send));
    assert_eq!((of_provider("[odmr]", line), of_provider("[relay]", line)), ((bounce, send), (send, bounce)));
    assert_eq!((of_customer("[outgoing]", line), of_customer("[mailboxes]", line)), ((bounce, send), (send, bounce)));
    let phrase = "\"7bit\" is not a valid way to treat 8-bit content: write \"send\" or \"bounce\"";
    provider("[odmr]", "[odmr]\nwithout-8bitmime = \"7bit\"", "odmr.toml:5", phrase);
    provider("", "[relay]\nwithout-8bitmime = \"7bit\"", "odmr.toml:7", phrase);
    customer("[mailboxes]", "[mailboxes]\nwithout-8bitmime = \"7bit\"", "odmr.toml:7", phrase);
    customer("", "[outgoing]\nqueue = \"out\"\nwithout-8bitmime = \"7bit\"", "odmr.toml:11", phrase);
    provider("", "[relay]\nwithout-8bitmime = true", "odmr.toml:7", "expected \"send\" or \"bounce\"");
}

/// Rules: SMTP-65.
#[test]
fn default_retry_times_fit_those_that_are_written() {
    let times = |text: &str| {
        let retry = relay(text).retry;
        (retry.first, retry.max, retry.give_up)
    };
    assert_eq!(times("give-up = \"1d\""), (5 * MINUTE, 4 * HOUR, DAY));
    assert_eq!(times("give-up = \"4h\""), (5 * MINUTE, 2 * HOUR, 4 * HOUR));
    assert_eq!(times("give-up = \"2m\""), (MINUTE, MINUTE, 2 * MINUTE));
    assert_eq!(times("retry-max = \"1m\""), (MINUTE, MINUTE, 5 * DAY));
    assert_eq!(times("retry-first = \"4h\""), (4 * HOUR, 4 * HOUR, 5 * DAY));
}

#[test]
fn what_a_customer_may_submit_is_read() {
    let text = changed(ACME, "", "relay = false\nany-sender = true\nmax-size = \"1MiB\"\nrate = 100\n");
    let directory = files(&[("odmr.toml", PROVIDER), ("customers.d/acme.toml", &text)]);
    let provider = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap();
    let acme = provider.accounts.account("acme").unwrap();
    assert_eq!((acme.relay, acme.any_sender, acme.max_size, acme.rate), (false, true, Some(1_048_576), 100));
    assert!(!format!("{acme:?}").contains("sesame"));
}

#[test]
fn the_settings_of_held_mail_are_read() {
    let held = |text: &str| {
        let directory = files(&[("odmr.toml", PROVIDER), ("customers.d/acme.toml", &changed(ACME, "", text))]);
        let provider = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap();
        provider.accounts.account("acme").unwrap().held.clone()
    };
    assert_eq!(held(""), HeldConfig::default());
    let text = "expire-after = \"90d\"\ndelay-warning = \"4h\"\nsoft-bounce = \"2d\"\nrecipients = \"learn\"\nmax-bytes = \"1MiB\"\nmax-messages = 1\n\
                over-quota = \"reject\"\nmessages-per-turn = 0\noctets-per-turn = 0\nturn = \"5m\"\nmin-interval = \"1m\"\n";
    let all = HeldConfig {
        expire_after: Some(90 * DAY),
        delay_warning: Some(4 * HOUR),
        soft_bounce: 2 * DAY,
        recipients: KnownRecipients::Learn,
        max_bytes: Some(1 << 20),
        max_messages: Some(1),
        over_quota: OverQuota::Reject,
        messages_per_turn: Some(0),
        octets_per_turn: Some(0),
        turn: Some(5 * MINUTE),
        min_interval: MINUTE,
    };
    assert_eq!(held(text), all);
    assert_eq!(held("recipients = \"any\"\n").recipients, KnownRecipients::Any);
    assert_eq!(held("recipients = \"learn\"\n").recipients, KnownRecipients::Learn);
    let listed = held("recipients = [\"alice@example.org\", \"@EXAMPLE.org\", \"!spam@example.org\"]\n").recipients;
    let knows = |address: &str| listed.look_up(&crate::mail::address::Mailbox::parse(address).unwrap(), "acme");
    assert_eq!((knows("bob@example.org"), knows("Spam+x@example.org")), (Knowledge::Known, Knowledge::Unknown));
    assert_eq!(held("expire-after = \"never\"\ndelay-warning = \"300d\"\n").expire_after, None);
}

#[test]
fn the_least_outgoing_has_the_documented_defaults() {
    let outgoing = outgoing("");
    assert!(outgoing.queue.is_absolute() && outgoing.queue.ends_with("out"));
    assert_eq!((outgoing.listen.len(), outgoing.networks.len()), (0, 0));
    assert_eq!(outgoing.domain, domain("example.org"));
    assert_eq!(outgoing.submission, None);
    assert_eq!(outgoing.retry, Retry::default());
    assert_eq!(outgoing.max_size, 52_428_800);
}

#[test]
fn the_first_listener_that_loopback_reaches_is_for_users_of_this_machine() {
    for (listen, found) in [
        ("", None),
        ("\"192.0.2.1:25\"", None),
        ("\"127.0.0.1:0\"", None),
        ("\"192.0.2.1:25\", \"127.0.0.2:26\", \"[::1]:27\"", Some("127.0.0.2:26")),
        ("\"0.0.0.0:25\"", Some("127.0.0.1:25")),
        ("\"[::]:25\"", Some("[::1]:25")),
    ] {
        let listener = outgoing(&format!("listen = [{listen}]")).loopback_listener();
        assert_eq!(listener, found.map(|found| found.parse().unwrap()), "{listen}");
    }
}

#[test]
fn every_key_of_outgoing_and_schedule_is_read() {
    let pin = format!("sha256:{}", "00".repeat(32));
    let text = format!(
        r#"
            listen = ["127.0.0.1:25", "[::1]:25"]
            networks = ["192.0.2.0/24", "2001:db8::1"]
            domain = "example.com"
            submission = "smtp.example.net:5870"
            submission-tls = "starttls"
            name = "sender"
            secret = "mellon"
            pin = "{pin}"
            give-up = "2d"
            delay-warning = "1h"
            max-size = "1MiB"
            [schedule]
            every = "1m"
            "#
    );
    let text = format!("{CUSTOMER}[outgoing]\nqueue = \"/var/out\"\n{text}");
    let directory = files(&[("odmr.toml", &text)]);
    let customer = CustomerConfig::load(&directory.path().join("odmr.toml")).unwrap();
    assert_eq!(customer.providers[0].schedule.when, When::Every(MINUTE));
    assert!(!format!("{customer:?}").contains("mellon"));
    let outgoing = customer.outgoing.unwrap();
    assert_eq!(outgoing.queue, Path::new("/var/out"));
    assert_eq!(outgoing.listen, ["127.0.0.1:25".parse().unwrap(), "[::1]:25".parse().unwrap()]);
    assert_eq!(outgoing.networks.iter().map(Network::to_string).collect::<Vec<_>>(), ["192.0.2.0/24", "2001:db8::1"]);
    assert_eq!(outgoing.domain, domain("example.com"));
    let submission = outgoing.submission.unwrap();
    assert_eq!(submission.address, "smtp.example.net:5870");
    assert_eq!((submission.tls, submission.pins), (TlsMode::StartTls, vec![Pin::Certificate([0; 32])]));
    assert_eq!(submission.login, login("sender", "mellon"));
    let times = Retry { give_up: 2 * DAY, delay_warning: Some(HOUR), ..Retry::default() };
    assert_eq!(outgoing.retry, times);
    assert_eq!(outgoing.max_size, 1_048_576);
}

#[test]
fn a_submission_host_has_the_credentials_of_the_provider() {
    let submission = outgoing("submission = \"[::1]\"\nsubmission-tls = \"none\"").submission.unwrap();
    assert_eq!((&*submission.address, submission.tls), ("[::1]:587", TlsMode::None));
    assert_eq!(submission.login, login("acme", "open sesame"));
    assert_eq!((submission.ca, submission.pins), (None, vec![]));
}

#[test]
fn clients_on_this_machine_and_in_the_networks_may_submit() {
    let outgoing = outgoing("networks = [\"192.0.2.0/24\", \"fd00::/8\"]");
    let admits = |address: &str| outgoing.admits(address.parse().unwrap());
    for address in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "192.0.2.9", "::ffff:192.0.2.9", "fdff::1"] {
        assert!(admits(address), "{address}");
    }
    for address in ["192.0.3.1", "::ffff:192.0.3.1", "2001:db8::1", "::192.0.2.9", "0.0.0.0", "::"] {
        assert!(!admits(address), "{address}");
    }
}

#[test]
#[rustfmt::skip]
fn mistakes_in_relay_are_named() {
    let relay = |text: &str, line: usize, phrase| {
        provider("", &format!("[relay]\n{text}\n"), &format!("odmr.toml:{line}"), phrase)
    };
    let pin = format!("pin = \"sha256:{}\"", "00".repeat(32));
    let host = "smarthost = \"smtp.example.net\"";
    relay("smart-host = \"a\"", 7, "unknown key `smart-host`, expected one of `smarthost`");
    relay("smarthost = \"smtp.example.net:smtp\"", 7, "\"smtp\" is not a valid port");
    relay("smarthost = \"smtp.example.net:0\"", 7, "mostly 587");
    relay("smarthost = \"::1\"", 7, "write \"[::1]:587\"");
    relay("smarthost = \"a b\"", 7, "is not a valid host with a port: write \"relay.example.net:587\"");
    relay("allow-private = \"yes\"", 7, "expected true or false");
    relay("allow_private = true", 7, "unknown key `allow_private`");
    relay("smarthost = 587", 7, "expected a host and a port such as \"smtp.example.net:587\"");
    relay(&format!("{host}\nsmarthost-tls = \"may\""), 8, "write \"starttls\", \"implicit\" or \"none\"");
    relay(&format!("{host}\n{pin}\nca = \"ca.pem\""), 9, "`ca` and `pin` exclude each other");
    relay(&format!("{host}\nsmarthost-tls = \"none\"\n{pin}"), 9, "have no effect with smarthost-tls = \"none\"");
    relay(&format!("{host}\nname = \"relay\""), 8, "`secret` is missing");
    relay(&format!("{host}\nsecret = \"s\""), 8, "no `name` to log in with");
    relay(&format!("{host}\nsecret-file = \"s\""), 8, "no `name` to log in with");
    relay(&format!("{host}\nname = \"relay\"\nsecret-file = \"no\""), 9, "no cannot be read");
    relay(&format!("{host}\nname = \"relay\"\nsecret = \"s\"\nsecret-file = \"s\""), 10, "exclude each other");
    relay("smarthost-tls = \"none\"", 7, "`smarthost-tls` is for `smarthost`, and there is none: add `smarthost`");
    relay("ca = \"ca.pem\"", 7, "`ca` is for `smarthost`");
    relay(&pin, 7, "`pin` is for `smarthost`");
    relay("name = \"relay\"", 7, "`name` is for `smarthost`");
    relay("secret = \"s\"", 7, "`secret` is for `smarthost`");
    relay("secret-file = \"s\"", 7, "`secret-file` is for `smarthost`");
    relay("mechanisms = [\"PLAIN\"]", 7, "`mechanisms` is for `smarthost`");
    relay(&format!("{host}\nmechanisms = [\"PLAIN\"]"), 8, "`mechanisms` has no effect without a login");
    let login = format!("{host}\nname = \"relay\"\nsecret = \"mellon, mellon\"");
    relay(&format!("{login}\nmechanisms = [\"LOGIN\"]"), 10, "\"LOGIN\" is not a mechanism of this program");
    relay(&format!("{login}\nmechanisms = [\"EXTERNAL\"]"), 10, "EXTERNAL needs `certificate` and `key`");
    relay("tls = \"always\"", 7, "write \"may\", \"must\" or \"verify\"");
    relay("tls = true", 7, "expected \"may\", \"must\" or \"verify\"");
    relay("tls-for = { \"exa mple\" = \"must\" }", 7, "\"exa mple\" is not a valid domain");
    relay("tls-for = { \"a.example\" = \"no\" }", 7, "\"no\" is not a valid TLS policy");
    relay("[relay.tls-for]\n\"A.example\" = \"may\"\n\"a.example\" = \"must\"", 9, "a.example occurs a second time here");
    relay("tls-for = [\"a.example\"]", 7, "expected a table, such as { \"example.org\" = \"must\" }");
    relay("resolver = \"dns.example.net:53\"", 7, "is not a valid address of a DNS server");
    relay("resolver = \":53\"", 7, "is not a valid address of a DNS server");
    relay("port = 0", 7, "\"0\" is not a valid port to connect to: write a number from 1 to 65535");
    relay("port = 65536", 7, "is not a valid port to connect to");
    relay("port = -1", 7, "is not a valid port to connect to");
    relay("connections = 0", 7, "0 is too small: write 1 or more");
    relay("connections = 1001", 7, "1001 is too large: write 1000 or less");
    relay("connections = \"20\"", 7, "expected a whole number from 1 to 1000");
    relay("connections-per-host = 0", 7, "0 is too small: write 1 or more");
    relay("retry-first = 5", 7, "expected a time such as \"5m\"");
    relay("retry-first = \"5h\"", 7, "`retry-first` must not be longer than `retry-max`");
    relay("retry-max = \"2m\"\nretry-first = \"3m\"", 8, "`retry-first` must not be longer than `retry-max`");
    relay("retry-max = \"31d\"\ngive-up = \"60d\"", 7, "must not be longer than \"30d\"");
    relay("retry-max = \"5d\"", 7, "`retry-max` must be shorter than `give-up`");
    relay("give-up = \"1h\"\nretry-max = \"1h\"", 8, "`retry-max` must be shorter than `give-up`");
    relay("delay-warning = \"soon\"", 7, "\"soon\" is not a valid time");
    relay("delay-warning = \"soon\"", 7, "or \"never\"");
    provider("", "relay = 5", "odmr.toml:6", "unknown key `relay`");
    provider("[odmr]", "relay = 5\n[odmr]", "odmr.toml:4", "expected a table");
}

#[test]
#[rustfmt::skip]
fn mistakes_in_what_a_customer_may_submit_are_named() {
    let at = "customers.d/acme.toml:3";
    account("", "relay = \"yes\"", at, "expected true or false");
    account("", "any-sender = 1", at, "expected true or false");
    account("", "max-size = \"big\"", at, "\"big\" is not a valid size");
    account("", "max-size = 0", at, "no message would be accepted");
    account("", "rate = -1", at, "-1 is too small: write 0 or more");
    account("", "rate = \"10/h\"", at, "expected a whole number, 0 or more");
}

#[test]
#[rustfmt::skip]
fn mistakes_in_settings_of_held_mail_are_named() {
    let at = "customers.d/acme.toml:3";
    account("", "expire-after = \"91d\"", at, "write \"90d\" or less, or \"never\"");
    account("", "expire-after = \"1ms\"", at, "write \"1s\" or more");
    account("", "expire-after = 14", at, "expected a time such as \"14d\", or \"never\"");
    account("", "delay-warning = \"14d\"", at, "`delay-warning` must be shorter than `expire-after`");
    account("", "soft-bounce = \"never\"", at, "\"never\" is not a valid time");
    account("", "max-bytes = 0", at, "no message would be accepted");
    account("", "max-messages = 0", at, "0 is too small: write 1 or more");
    account("", "over-quota = \"drop\"", at, "write \"defer\" or \"reject\"");
    account("", "octets-per-turn = \"1MB\"", at, "not a valid size");
    account("", "turn = \"0s\"", at, "would wait for nothing");
    account("", "min-interval = 5", at, "expected a time such as \"2d\", or \"0s\"");
    account("", "recipients = \"all\"", at, "\"all\" is not a valid value: write \"any\", \"learn\" or a list");
    account("", "recipients = 5", at, "expected \"any\", \"learn\" or a list");
    account("", "recipients = []", at, "`recipients` is empty");
    account("", "recipients = [\"alice\"]", at, "\"alice\" is not a valid address");
    account("", "recipients = [\"alice@example.edu\"]", at, "alice@example.edu is in no domain of this account");
    account("", "recipients = [\"!@example.org\"]", at, "excepts a whole domain");
    account("", "recipients = [\"@example.org\"]\nrecipients-file = \"list\"", at, "exclude each other");
}

#[test]
#[rustfmt::skip]
fn mistakes_in_outgoing_and_schedule_are_named() {
    let outgoing = |text: &str, line: usize, phrase| {
        let text = format!("[outgoing]\nqueue = \"out\"\n{text}\n");
        customer("", &text, &format!("odmr.toml:{line}"), phrase)
    };
    customer("", "[outgoing]", "odmr.toml:9", "[outgoing] needs `queue`");
    customer("hostname", "outgoing = true\nhostname", "odmr.toml:1", "expected a table");
    outgoing("queu = \"out\"", 11, "unknown key `queu`");
    outgoing("listen = [\"localhost:25\"]", 11, "a listener needs an address");
    outgoing("listen = [\":25\",\n\":25\"]", 12, "[::]:25 occurs a second time here");
    outgoing("networks = [\"192.0.2.0/33\"]", 11, "is not a valid network");
    outgoing("networks = [\n\"192.0.2.1/24\"]", 12, "write \"192.0.2.0/24\" for the network");
    outgoing("networks = \"192.0.2.0/24\"", 11, "expected a list, in [ ]");
    outgoing("domain = \"localhost\"", 11, "has no dot");
    outgoing("submission = \"::1\"", 11, "write \"[::1]:587\"");
    outgoing("submission-tls = \"none\"", 11, "`submission-tls` is for `submission`, and there is none");
    outgoing("name = \"sender\"", 11, "`name` is for `submission`");
    outgoing("submission = \"a\"\nname = \"sender\"", 12, "`secret` is missing");
    outgoing("mechanisms = [\"PLAIN\"]", 11, "`mechanisms` is for `submission`");
    outgoing("submission = \"a\"\nmechanisms = []", 12, "`mechanisms` is empty");
    outgoing("submission = \"a\"\nsecret = \"s\"", 12, "no `name` to log in with");
    outgoing("submission = \"a\"\nsubmission-tls = \"none\"\nca = \"c\"", 13, "have no effect with submission-tls = \"none\"");
    outgoing("retry-first = \"1m\"", 11, "unknown key `retry-first`");
    outgoing("give-up = 5", 11, "expected a time");
    outgoing("delay-warning = false", 11, "expected a time such as \"4h\", or \"never\"");
    outgoing("max-size = 0", 11, "no message would be accepted");
    customer("", "[schedule]\nevery = \"0s\"", "odmr.toml:10", "would wait for nothing");
    customer("", "[schedule]\nevery = 15", "odmr.toml:10", "expected a time");
    customer("", "[schedule]\nevry = \"15m\"", "odmr.toml:10", "unknown key `evry`");
    customer("", "[schedule]\nat = [\n\"* 08:00\",\n\"* 8:00\"]", "odmr.toml:12", "\"8:00\" is not a valid time of day");
    customer("", "[schedule]\nat = []", "odmr.toml:10", "`at` is empty");
    customer("", "[schedule]\nat = \"* 08:00\"", "odmr.toml:10", "expected a list, in [ ]");
    customer("", "[schedule]\nat = [\"* 08:00\"]\nzone = \"Berlin\"", "odmr.toml:11", "\"Berlin\" is not a time zone");
    customer("", "[schedule]\nat = [\"* 08:00\"]\nevery = \"5m\"", "odmr.toml:9", "`every` and `at` exclude each other");
    customer("name = \"acme\"", "name = \"acme\"\nschedule = { zone = \"UTC\" }", "odmr.toml:5", "`zone` is for `at`");
}

#[test]
fn the_directory_of_customers_becomes_accounts() {
    let directory = files(&[
        ("odmr.toml", PROVIDER),
        ("customers.d/acme.toml", ACME),
        ("customers.d/Bücher & Co.toml", "domains = [\"BÜCHER.example\"]\nsecret-file = \"co.secret\"\n"),
        ("customers.d/co.secret", "mellon\r\n"),
        ("customers.d/.draft.toml", "nonsense"),
        ("customers.d/acme.toml~", "nonsense"),
        ("customers.d/README", "nonsense"),
    ]);
    let provider = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap();
    let accounts = &provider.accounts;
    let names: Vec<_> = accounts.iter().map(|account| &account.name).collect();
    assert_eq!(names, ["Bücher & Co", "acme"]);
    let owner = |name| accounts.owner(&domain(name)).map(|account| &*account.name);
    assert_eq!(owner("Example.ORG"), Some("acme"));
    assert_eq!(owner("xn--bcher-kva.example"), Some("Bücher & Co"));
    assert_eq!(owner("sub.example.org"), None);
    let secret = |name| accounts.credentials(name).unwrap().and_then(|credentials| credentials.secret);
    assert_eq!(secret("acme").as_deref(), Some(&b"open sesame"[..]));
    assert_eq!(secret("Bücher & Co").as_deref(), Some(&b"mellon"[..]));
    assert_eq!(secret("Acme"), None);
    assert!(accounts.account(".draft").is_none());
}

#[test]
fn the_least_customer_has_the_documented_defaults() {
    let directory = files(&[("odmr.toml", CUSTOMER)]);
    let Ok(Config::Customer(customer)) = Config::load(&directory.path().join("odmr.toml")) else {
        panic!("not a customer's file");
    };
    let upstream = &customer.providers[0].remote;
    assert_eq!(customer.hostname, "mail.example.org");
    assert_eq!(upstream.address, "relay.example.net:366");
    assert_eq!(upstream.host, "relay.example.net");
    assert_eq!(upstream.tls, TlsMode::StartTls);
    assert_eq!((&upstream.ca, &upstream.pins[..]), (&None, &[][..]));
    assert_eq!(upstream.login, login("acme", "open sesame"));
    assert_eq!(customer.providers[0].domains, []);
    assert_eq!(customer.mailboxes.root, directory.path().join("mail"));
    assert_eq!(customer.mailboxes.max_size, 52_428_800);
    assert_eq!(customer.mailboxes.rules.domains(), [domain("example.org"), domain("example.com")]);
    assert_eq!(customer.mailboxes.umask, 0o077);
    assert_eq!(customer.outgoing, None);
    assert_eq!(customer.providers[0].schedule, Schedule::default());
    assert_eq!(customer.timeouts, Timeouts::default());
    assert!(!format!("{customer:?}").contains("sesame"));
}

#[test]
fn every_key_of_a_customer_is_read() {
    let text = r#"
            hostname = "mail.example.org"
            [provider]
            address = "[2001:db8::1]:3660"
            tls = "implicit"
            ca = "ca.pem"
            name = "acme"
            secret-file = "secret"
            domains = ["example.org", "Example.COM"]
            [mailboxes]
            root = "/var/mail/odmr"
            accept = ["@example.com"]
            max-size = "10KiB"
            [limits]
            recipients = 200
            [timeouts]
            connect = "2s"
        "#;
    let directory = files(&[("odmr.toml", text), ("secret", "open sesame")]);
    let customer = CustomerConfig::load(&directory.path().join("odmr.toml")).unwrap();
    let upstream = &customer.providers[0].remote;
    assert_eq!(upstream.address, "[2001:db8::1]:3660");
    assert_eq!(upstream.host, "2001:db8::1");
    assert_eq!(upstream.tls, TlsMode::Implicit);
    assert_eq!(upstream.ca, Some(directory.path().join("ca.pem")));
    assert_eq!(upstream.login, login("acme", "open sesame"));
    assert_eq!(customer.providers[0].domains, [domain("example.org"), domain("example.com")]);
    assert_eq!(customer.mailboxes.root, Path::new("/var/mail/odmr"));
    assert_eq!(customer.mailboxes.max_size, 10_240);
    assert_eq!(customer.limits.recipients, 200);
    assert_eq!(customer.timeouts.connect, Duration::from_secs(2));
}

#[test]
fn a_provider_has_an_owner_too() {
    let load = |head: &str| {
        let directory = files(&[("odmr.toml", &format!("{head}{PROVIDER}"))]);
        (Config::load(&directory.path().join("odmr.toml")).map_err(|error| error.to_string()), directory)
    };
    let owner = |head: &str| {
        let config = load(head).0.unwrap();
        config.owner().map(|owner| (owner.user.clone(), owner.group.clone()))
    };
    assert_eq!(owner(""), None);
    assert_eq!(owner("user = \"odmr\"\n"), Some(("odmr".to_owned(), None)));
    assert_eq!(owner("user = \"odmr\"\ngroup = \"mail\"\n"), Some(("odmr".to_owned(), Some("mail".to_owned()))));
    for (head, phrase) in [
        ("group = \"mail\"\n", "odmr.toml:1: `group` has no effect without `user`"),
        ("user = \"a:b\"\n", "is not a valid name of a user or group"),
        ("user = 5\n", "expected the name of a user or group"),
    ] {
        let error = load(head).0.unwrap_err();
        assert!(error.contains("odmr.toml:1: ") && error.contains(phrase), "{error}");
    }
}

#[test]
fn several_providers_have_each_their_own() {
    let text = r#"
            hostname = "mail.example.org"
            user = "vmail"
            group = "mail"
            [[provider]]
            address = "a.example.net"
            name = "acme"
            secret = "one"
            domains = ["example.org"]
            schedule = { every = "5m" }
            outgoing = false
            [[provider]]
            address = "b.example.net"
            name = "acme"
            secret = "two"
            domains = ["example.com"]
            [provider.schedule]
            at = ["* 08:00"]
            [[provider]]
            address = "b.example.net"
            name = "other"
            secret = "three"
            domains = ["example.edu"]
            [schedule]
            every = "2h"
            [mailboxes]
            root = "mail"
            accept = ["@example.org", "@example.com", "@example.edu"]
        "#;
    let directory = files(&[("odmr.toml", text)]);
    let customer = CustomerConfig::load(&directory.path().join("odmr.toml")).unwrap();
    let owner = customer.owner.unwrap();
    assert_eq!((owner.user.as_str(), owner.group.as_deref()), ("vmail", Some("mail")));
    let error: Vec<_> = customer
        .providers
        .iter()
        .map(|provider| {
            let every = match &provider.schedule.when {
                When::Every(every) => every.as_secs() / 60,
                When::At(_) => 0,
            };
            (provider.remote.address.as_str(), provider.remote.login_name(), every, provider.outgoing)
        })
        .collect();
    let wanted = [
        ("a.example.net:366", "acme", 5, false),
        // The first provider without `outgoing = false`.
        ("b.example.net:366", "acme", 0, true),
        ("b.example.net:366", "other", 120, false),
    ];
    assert_eq!(error, wanted);
}

#[test]
fn mistakes_with_several_providers_are_named() {
    const ONE: &str = "[[provider]]\naddress = \"a.example.net\"\nname = \"acme\"\nsecret = \"x\"\n";
    let check = |more: &str, place: &str, phrase: &str| {
        let text = format!(
            "hostname = \"mail.example.org\"\n{ONE}{more}[mailboxes]\nroot = \"m\"\naccept = [\"@example.org\"]\n"
        );
        assert_error(&files(&[("odmr.toml", &text)]), place, phrase);
    };
    check(ONE, "odmr.toml:6", "a.example.net:366 occurs twice as acme");
    check("[[provider]]\nname = \"acme\"\n", "odmr.toml:6", "[provider] needs `address`");
    let other = ONE.replace("acme", "b");
    let both = format!("outgoing = true\n{other}outgoing = true\n");
    check(&both, "odmr.toml:11", "another provider gets the outgoing mail already");
    let text = "hostname = \"h.example.org\"\n[[provider]]\naddress = \"a.example.net\"\nname = \"a\"\nsecret = \"x\"\n\
                outgoing = false\n[mailboxes]\nroot = \"m\"\naccept = [\"@example.org\"]\n[outgoing]\nqueue = \"q\"\n";
    assert_error(&files(&[("odmr.toml", text)]), "odmr.toml:10", "[outgoing] has no provider to send its mail to");
    check("outgoing = 1\n", "odmr.toml:6", "expected true or false");
    check("schedule = { evry = \"5m\" }\n", "odmr.toml:6", "unknown key `evry`");
    customer("hostname", "group = \"mail\"\nhostname", "odmr.toml:1", "`group` has no effect without `user`");
    customer("hostname", "user = \"a:b\"\nhostname", "odmr.toml:1", "is not a valid name of a user or group");
    customer("hostname", "user = 5\nhostname", "odmr.toml:1", "expected the name of a user or group");
    let circle =
        "[outgoing]\nqueue = \"q\"\nlisten = [\"127.0.0.1:2525\"]\n[mailboxes]\ndeliver = \"smtp:localhost:2525\"";
    customer("[mailboxes]", circle, "odmr.toml:8", "so mail would go in circles");
}

#[test]
#[rustfmt::skip]
fn mistakes_in_a_provider_s_file_are_named() {
    provider("hostname = ", "hostnam = ", "odmr.toml:1", "unknown key `hostnam`, expected one of `hostname`");
    provider("hostname = \"relay.example.net\"", "", "odmr.toml", "`hostname` is missing");
    provider("relay.example.net", "relay_1", "odmr.toml:1", "\"relay_1\" is not a valid host name");
    provider("\"relay.example.net\"", "5", "odmr.toml:1", "expected a host name");
    provider("\"relay.example.net\"", "relay", "odmr.toml:1", "must be quoted");
    provider("spool = \"spool\"", "spool = \"spool", "odmr.toml:2", "invalid basic string");
    provider("spool = \"spool\"", "", "odmr.toml", "`spool` is missing: the directory");
    provider("\"spool\"", "\"\"", "odmr.toml:2", "is not a valid path");
    provider("customers = \"customers.d\"", "", "odmr.toml", "`customers` is missing: the directory");
    provider("customers.d", "clients.d", "odmr.toml:3", "clients.d cannot be read: No such file");
    provider("customers = ", "spool = ", "odmr.toml:3", "`spool` occurs a second time here");
    provider("", "[odmr]\n", "odmr.toml:6", "second time");
    provider("", "[provider]\n", "odmr.toml:6", "make two files of this one");
    provider("", "[inbund]\n", "odmr.toml:6", "unknown key `inbund`");
    provider("[odmr]", "[odmr", "odmr.toml:4", "unclosed table");
    provider("[odmr]", "inbound = 5\n[odmr]", "odmr.toml:4", "expected a table");
    provider("", "listen = [\"localhost:366\"]", "odmr.toml:6", "is a name, and a listener needs an address");
    provider("", "listen = [\n \":0\",\n \"::\"]", "odmr.toml:8", "\"::\" has no port");
    provider("", "listen = \":366\"", "odmr.toml:6", "expected a list, in [ ]");
    provider("", "listen = [\":25\"]\n[inbound]\nlisten = [\"[::]:25\"]", "odmr.toml:6", "[::]:25 occurs a second time here");
    provider("require-tls = false", "", "odmr.toml:4", "there is no [tls]: add [tls] with `certificate` and `key`");
    provider("false", "true", "odmr.toml:5", "or write require-tls = false");
    provider("[odmr]\nrequire-tls = false", "", "odmr.toml", "`require-tls` is true, which it is by default");
    provider("false", "\"no\"", "odmr.toml:5", "expected true or false");
    provider("", "listen-tls = [\":465\"]", "odmr.toml:6", "`listen-tls` needs a certificate: add [tls]");
    provider("", "[tls]\nkey = \"k\"", "odmr.toml:6", "`certificate` is missing");
    provider("", "[tls]\ncertificate = \"c\"", "odmr.toml:6", "`key` is missing");
    provider("", "[tls]\ncert = \"c\"", "odmr.toml:7", "unknown key `cert`, expected `certificate` or `key`");
    provider("", "[inbound]\nmax-size = \"50MB\"", "odmr.toml:7", "\"50MB\" is not a valid size");
    provider("", "[inbound]\noffer-dsn = \"no\"", "odmr.toml:7", "expected true or false");
    provider("", "[inbound]\nmax-size = 0", "odmr.toml:7", "no message would be accepted");
    provider("", "[inbound]\nmax-size = true", "odmr.toml:7", "expected a size such as \"50MiB\"");
}

/// Rules: ODMR-20, AMB-12.
#[test]
#[rustfmt::skip]
fn mistakes_in_limits_and_timeouts_are_named() {
    let limit = |line: &str, phrase| {
        provider("", &format!("[limits]\n{line}\n"), "odmr.toml:7", phrase)
    };
    limit("recipients = 99", "99 is too small: write 100 or more");
    limit("auth-failures = 2", "2 is too small: write 3 or more");
    limit("connections = 0", "0 is too small: write 1 or more");
    limit("messages-per-turn = -1", "-1 is too small: write 0 or more");
    limit("errors = \"20\"", "expected a whole number, 1 or more");
    limit("received-hops = 1.5", "expected a whole number, 1 or more");
    limit("recipient = 100", "unknown key `recipient`, expected one of `connections`");
    let time = |line: &str, phrase| {
        provider("", &format!("[timeouts]\n{line}\n"), "odmr.toml:7", phrase)
    };
    time("atrn = \"599s\"", "RFC 2645 section 5.2.1");
    time("command = \"0s\"", "would wait for nothing");
    time("command = \"5min\"", "\"5min\" is not a valid time: write a whole number of ms, s, m, h or d");
    time("command = 300", "expected a time such as \"5m\"");
    time("rcpt = \"5m\"", "unknown key `rcpt`");
    customer("", "[timeouts]\natrn = \"9m\"", "odmr.toml:10", "write \"10m\" or more");
}

#[test]
#[rustfmt::skip]
fn mistakes_in_the_directory_of_customers_are_named() {
    let place = "customers.d/acme.toml";
    let at = |line| format!("{place}:{line}");
    account("[\"example.org\", \"example.com\"]", "[]", &at(1), "`domains` is missing or empty");
    account("domains = [\"example.org\", \"example.com\"]", "", place, "`domains` is missing or empty");
    account("example.com", "localhost", &at(1), "\"localhost\" has no dot");
    account("example.com", "exa mple.com", &at(1), "\"exa mple.com\" is not a valid domain");
    account("example.com", "Example.ORG", &at(1), "example.org occurs a second time here");
    account("open sesame", "", &at(2), "the secret is empty");
    account("open sesame", "a\\nb", &at(2), "more than one line");
    account("secret = \"open sesame\"", "", place, "`secret` is missing");
    account("", "secret-file = \"s\"", &at(3), "`secret` and `secret-file` exclude each other");
    account("secret = \"open sesame\"", "secret-file = \"no\"", &at(2), "customers.d/no cannot be read");
    account("secret = ", "password = ", &at(2), "unknown key `password`");
    account("\"open sesame\"", "12345", &at(2), "this is a number, expected a secret in quotes");
    let scram = format!("scram = \"{VERIFIER}\"");
    account("", &scram, &at(2), "`secret` and `scram` exclude each other: remove `secret`");
    account("secret = \"open sesame\"", &format!("{scram}\nsecret-file = \"no\""), &at(3), "`secret-file` and `scram` exclude");
    account("secret = \"open sesame\"", "scram = \"x\"", &at(2), "it must have the form SCRAM-SHA-256$ITERATIONS:SALT$");
    account("secret = \"open sesame\"", "scram = \"x\"", &at(2), "run `odmr secret NAME -c FILE`");
    account("secret = \"open sesame\"", &scram.replace("4096", "4095"), &at(2), "its iterations must be 4096 to 1000000");
    account("secret = \"open sesame\"", "scram = 5", &at(2), "expected a verifier as `odmr secret` prints it");
    account("", "mechanisms = []", &at(3), "`mechanisms` is empty, so no login is possible");
    account("", "mechanisms = \"PLAIN\"", &at(3), "expected a list, in [ ]");
    account("", "mechanisms = [\"LOGIN\"]", &at(3), "\"LOGIN\" is not a mechanism of this program: write one or more of \"");
    account("", "mechanisms = [\"PLAIN\", \"plain\"]", &at(3), "PLAIN occurs a second time here");
    account("secret = \"open sesame\"", &format!("{scram}\nmechanisms = [\"CRAM-MD5\"]"), &at(3), "CRAM-MD5 needs a `secret` in clear");
    account("sesame\"", "sésame\"\nmechanisms = [\"SCRAM-SHA-256\"]", &at(3), "needs a name and a secret in printable ASCII");
}

/// A provider with TLS, whose only customer has this file.
fn with_tls(account: &str) -> TempDir {
    let provider = PROVIDER.replace("[odmr]", "[tls]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n[odmr]");
    files(&[("odmr.toml", &provider), ("customers.d/acme.toml", account)])
}

#[test]
fn a_customer_may_log_in_by_certificates() {
    let certificate = CertificateDigests { certificate: [1; 32], key: [2; 32] };
    let (one, other) = (Pin::Certificate([1; 32]), Pin::Key([9; 32]));
    let directory = with_tls(&format!("domains = [\"example.org\"]\ncertificate = [\"{one}\", \"{other}\"]\n"));
    let path = directory.path().join("odmr.toml");
    let accounts = ProviderConfig::load(&path).unwrap().accounts;
    let acme = accounts.account("acme").unwrap();
    assert_eq!((&acme.secret, &acme.certificates[..]), (&None, &[one, other][..]));
    assert!(accounts.has_certificates() && accounts.knows(&certificate));
    for (wanted, found) in [(None, Some("acme")), (Some("acme"), Some("acme")), (Some("Acme"), None)] {
        assert_eq!(accounts.account_of(&certificate, wanted).unwrap().as_deref(), found, "{wanted:?}");
    }
    let foreign = CertificateDigests { certificate: [2; 32], key: [1; 32] };
    assert!(!accounts.knows(&foreign) && accounts.account_of(&foreign, None) == Ok(None));
    let printed = effective(&path).unwrap();
    assert!(printed.contains(&format!("\ncertificate = [\"{one}\", \"{other}\"]\n")), "{printed}");
}

#[test]
fn a_key_that_opens_two_accounts_needs_a_name() {
    let key = CertificateDigests { certificate: [1; 32], key: [2; 32] };
    let directory = with_tls(&format!("domains = [\"example.org\"]\ncertificate = [\"{}\"]\n", Pin::Key([2; 32])));
    let beta = format!("domains = [\"example.edu\"]\ncertificate = [\"{}\"]\n", Pin::Certificate([1; 32]));
    fs::write(directory.path().join("customers.d/beta.toml"), beta).unwrap();
    let accounts = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap().accounts;
    assert_eq!(accounts.account_of(&key, None), Ok(None));
    assert_eq!(accounts.account_of(&key, Some("beta")), Ok(Some("beta".to_owned())));
    let renewed = CertificateDigests { certificate: [3; 32], ..key };
    assert_eq!(accounts.account_of(&renewed, None), Ok(Some("acme".to_owned())));
    assert_eq!(accounts.account_of(&renewed, Some("beta")), Ok(None));
}

/// A typing error in an account's file must not make the provider reject its login permanently.
#[test]
fn a_certificate_may_belong_to_an_account_whose_file_has_a_mistake() {
    let key = CertificateDigests { certificate: [1; 32], key: [2; 32] };
    let foreign = CertificateDigests { certificate: [9; 32], key: [9; 32] };
    let directory = with_tls(&format!("domains = [\"example.org\"]\ncertificate = [\"{}\"]\n", Pin::Key([2; 32])));
    let path = directory.path().join("odmr.toml");
    let earlier = ProviderConfig::load(&path).unwrap().accounts;
    fs::write(directory.path().join("customers.d/acme.toml"), "domains = [\"example.org\"]\n").unwrap();
    let mut accounts = ProviderConfig::load(&path).unwrap().accounts;
    assert_eq!(accounts.account_of(&key, None), Err(Unavailable));
    assert_eq!(accounts.account_of(&key, Some("acme")), Err(Unavailable));
    assert_eq!(accounts.account_of(&key, Some("beta")), Ok(None));
    assert!(accounts.knows(&foreign));
    // After a reload the account is unchanged.
    accounts.keep_skipped(&earlier);
    assert_eq!(accounts.account_of(&key, None), Ok(Some("acme".to_owned())));
    assert!(!accounts.knows(&foreign));
}

/// A customer may be replacing its list at that moment. The configuration is read all the same, and after a reload the
/// old list stays in use.
#[test]
fn a_mistake_in_a_list_of_recipients_is_not_one_of_the_configuration() {
    let directory = with_tls("domains = [\"example.org\"]\nsecret = \"open sesame\"\nrecipients-file = \"list\"\n");
    let (path, list) = (directory.path().join("odmr.toml"), directory.path().join("customers.d/list"));
    let look_up = |accounts: &Accounts, address: &str| {
        let recipients = &accounts.account("acme").unwrap().held.recipients;
        recipients.look_up(&Mailbox::parse(address).unwrap(), "acme")
    };
    fs::write(&list, "").unwrap();
    let accounts = ProviderConfig::load(&path).unwrap().accounts;
    assert_eq!((accounts.skipped().len(), look_up(&accounts, "eva@example.org")), (0, Knowledge::Unsettled));
    fs::write(&list, "eva@example.org\n").unwrap();
    let earlier = ProviderConfig::load(&path).unwrap().accounts;
    assert_eq!(look_up(&earlier, "eva@example.org"), Knowledge::Known);
    fs::write(&list, "eva").unwrap();
    let again = ProviderConfig::load_again(&path, &earlier).unwrap().accounts;
    assert_eq!((again.skipped().len(), look_up(&again, "eva@example.org")), (0, Knowledge::Known));
}

#[test]
fn mistakes_in_certificates_of_customers_are_named() {
    let check = |line: &str, phrase: &str| {
        let directory = with_tls(&format!("domains = [\"example.org\"]\n{line}\n"));
        assert_error(&directory, "customers.d/acme.toml:2", phrase);
    };
    check("certificate = []", "`certificate` is empty: write the pin");
    check("certificate = [\"me.pem\"]", "\"me.pem\" is not a valid fingerprint: write \"sha256:\"");
    check("certificate = \"sha256:00\"", "expected a list, in [ ]");
    let pins = format!("certificate = [\"{}\"]", Pin::Key([0; 32]));
    account("secret = \"open sesame\"", &pins, "customers.d/acme.toml:2", "no effect without TLS: add [tls]");
    account("secret = \"open sesame\"", "", "customers.d/acme.toml", "or certificate = [\"spki-sha256:…\"]");
}

#[test]
fn each_host_may_be_shown_a_certificate() {
    let own = "certificate = \"me.pem\"\nkey = \"/etc/me.key\"";
    let directory = files(&[("odmr.toml", &CUSTOMER.replace("secret = \"open sesame\"", own))]);
    let identity = ClientIdentity { certificate: directory.path().join("me.pem"), key: "/etc/me.key".into() };
    let path = directory.path().join("odmr.toml");
    let remote = CustomerConfig::load(&path).unwrap().providers.remove(0).remote;
    let by_certificate = |name: &str| Login { secret: None, certificate: true, ..login(name, "").unwrap() };
    assert_eq!((remote.identity, remote.login), (Some(identity), Some(by_certificate("acme"))));
    let printed = effective(&path).unwrap();
    assert!(printed.contains("/me.pem\"\nkey = \"/etc/me.key\"\nname = \"acme\"\n"), "{printed}");
    // With a secret too, the submission host gets the secret, and not the certificate that is for another host.
    let both = CUSTOMER.replace("name = \"acme\"", &format!("name = \"acme\"\n{own}"));
    let both = format!("{both}[outgoing]\nqueue = \"out\"\nsubmission = \"smtp.example.net\"\n");
    let directory = files(&[("odmr.toml", &both)]);
    let config = CustomerConfig::load(&directory.path().join("odmr.toml")).unwrap();
    let by_both = Login { certificate: true, ..login("acme", "open sesame").unwrap() };
    assert_eq!(config.providers[0].remote.login, Some(by_both));
    let submission = config.outgoing.unwrap().submission.unwrap();
    assert_eq!((submission.identity, submission.login), (None, login("acme", "open sesame")));
    // A smarthost may identify its clients by their certificates without AUTH, or by EXTERNAL.
    let smarthost = relay(&format!("smarthost = \"smtp.example.net\"\n{own}")).smarthost.unwrap();
    assert_eq!((smarthost.identity.is_some(), smarthost.login), (true, None));
    let smarthost = relay(&format!("smarthost = \"smtp.example.net\"\nname = \"a\"\n{own}")).smarthost.unwrap();
    assert_eq!(smarthost.login, Some(by_certificate("a")));
}

#[test]
#[rustfmt::skip]
fn mistakes_in_our_own_certificate_are_named() {
    let secret = "secret = \"open sesame\"";
    let own = "certificate = \"me.pem\"\nkey = \"me.key\"";
    customer(secret, "certificate = \"me.pem\"", "odmr.toml:5", "`certificate` has no effect without `key`: write key =");
    customer(secret, "key = \"me.key\"", "odmr.toml:5", "`key` has no effect without `certificate`");
    customer(secret, &format!("tls = \"none\"\n{own}"), "odmr.toml:6", "have no effect with tls = \"none\"");
    customer(secret, "", "odmr.toml:2", "or log in by a certificate, with `certificate` and `key`");
    provider("", "[relay]\ncertificate = \"me.pem\"", "odmr.toml:7", "`certificate` is for `smarthost`");
    let submission = "[outgoing]\nqueue = \"out\"\nsubmission = \"a.example\"\n";
    let only = files(&[("odmr.toml", &format!("{}{submission}", CUSTOMER.replace(secret, own)))]);
    assert_error(&only, "odmr.toml:12", "the submission host has nothing to log in with");
    let readable = files(&[("odmr.toml", &CUSTOMER.replace(secret, own)), ("me.key", "")]);
    mode(&readable.path().join("me.key"), 0o644);
    assert_error(&readable, "odmr.toml:6", "every user may read it: chmod 640");
    // `chmod 640 /dev/null` would harm all programs.
    let device = files(&[("odmr.toml", &CUSTOMER.replace(secret, &own.replace("me.key", "/dev/null")))]);
    assert_error(&device, "odmr.toml:6", "/dev/null is not a file: name a file");
}

#[test]
fn a_domain_in_two_files_names_both() {
    let directory = files(&[
        ("odmr.toml", PROVIDER),
        ("customers.d/acme.toml", ACME),
        ("customers.d/zenith.toml", "secret = \"s\"\ndomains = [\n\"example.net\",\n\"EXAMPLE.com\"]\n"),
    ]);
    let phrase = "example.com is in customers.d/acme.toml too";
    assert_error(&directory, "customers.d/zenith.toml:4", phrase);
}

#[test]
#[rustfmt::skip]
fn mistakes_in_a_customer_s_file_are_named() {
    customer("[provider]", "[providers]", "odmr.toml", "has neither what a provider needs");
    customer("hostname = \"mail.example.org\"", "", "odmr.toml", "`hostname` is missing");
    customer("address = \"relay.example.net\"", "", "odmr.toml:2", "[provider] needs `address`");
    customer("relay.example.net", "relay.example.net:odmr", "odmr.toml:3", "\"odmr\" is not a valid port");
    customer("relay.example.net", "2001:db8::1", "odmr.toml:3", "write \"[2001:db8::1]:366\"");
    customer("name = \"acme\"", "", "odmr.toml:2", "[provider] needs `name`");
    customer("acme", "", "odmr.toml:4", "the login name is empty");
    customer("secret = \"open sesame\"", "", "odmr.toml:2", "`secret` is missing");
    customer("secret = \"open sesame\"", "secret-file = \"no\"", "odmr.toml:5", "no cannot be read: No such file");
    let mechanisms = |list: &str| format!("secret = \"open sesame\"\nmechanisms = {list}");
    let customer_has = |list: &str, phrase: &str| {
        customer("secret = \"open sesame\"", &mechanisms(list), "odmr.toml:6", phrase);
    };
    customer_has("[]", "`mechanisms` is empty, so no login is possible");
    customer_has("[\"SCRAM-SHA-1\"]", "\"SCRAM-SHA-1\" is not a mechanism of this program: write one or more of \"");
    customer_has("[\"PLAIN\", \"PLAIN\"]", "PLAIN occurs a second time here");
    customer("open sesame\"", "sésame\"\nmechanisms = [\"SCRAM-SHA-256\"]", "odmr.toml:6", "in printable ASCII");
    customer("name = \"acme\"", "tls = \"ssl\"\nname = \"acme\"", "odmr.toml:4", "\"ssl\" is not a valid TLS mode: write \"starttls\", \"implicit\" or \"none\"");
    customer("name = \"acme\"", "tls = true\nname = \"acme\"", "odmr.toml:4", "expected \"starttls\", \"implicit\" or \"none\"");
    customer("name = \"acme\"", "pin = \"00\"\nname = \"acme\"", "odmr.toml:4", "is not a valid fingerprint");
    let pin = format!("pin = \"sha256:{}\"", "00".repeat(32));
    customer("name = \"acme\"", &format!("{pin}\nca = \"ca.pem\"\nname = \"acme\""), "odmr.toml:5", "`ca` and `pin` exclude each other");
    customer("name = \"acme\"", &format!("tls = \"none\"\n{pin}\nname = \"acme\""), "odmr.toml:5", "have no effect with tls = \"none\"");
    customer("name = \"acme\"", "pin = []\nname = \"acme\"", "odmr.toml:4", "`pin` is empty, so no certificate would be trusted: write a pin");
    customer("name = \"acme\"", "pin = [\n7]\nname = \"acme\"", "odmr.toml:5", "this is a number, expected a fingerprint");
    let list = |octets: &[u8]| octets.iter().map(|octet| format!("\"{}\",\n", Pin::Key([*octet; 32]))).collect::<String>();
    customer("name = \"acme\"", &format!("pin = [{}]\nname = \"acme\"", list(&[1, 2, 1])), "odmr.toml:6", "occurs a second time here");
    let many = format!("pin = [{}]\nname = \"acme\"", list(&[1, 2, 3, 4, 5, 6, 7, 8, 9]));
    customer("name = \"acme\"", &many, "odmr.toml:4", "`pin` has 9 pins: write 8 or less");
    customer("name = \"acme\"", "domains = [\"localhost\"]\nname = \"acme\"", "odmr.toml:4", "has no dot");
    customer("name = \"acme\"", "domains = [\"a.example\",\n\"A.example\"]\nname = \"acme\"", "odmr.toml:5", "a.example occurs a second time here");
    customer("name = \"acme\"", "domains = [\"example.org\"]\nname = \"acme\"", "odmr.toml:9", "@example.com can get no mail");
    customer("root = \"mail\"", "", "odmr.toml:6", "[mailboxes] needs `root`");
    customer("accept = [\"alice@example.org\", \"@example.com\"]", "", "odmr.toml:6", "[mailboxes] needs `accept`");
    customer("\"alice@example.org\", \"@example.com\"", "", "odmr.toml:6", "[mailboxes] needs `accept`");
    customer("alice@example.org", "example.org", "odmr.toml:8", "\"example.org\" is not a valid address: write an address such as");
    customer("alice@example.org", "alice@[192.0.2.1]", "odmr.toml:8", "is not a valid address");
    customer("@example.com", "\\\"Alice\\\"@EXAMPLE.org", "odmr.toml:8", "Alice@example.org occurs a second time here");
    customer("\"@example.com\"", "\"@localhost\"", "odmr.toml:8", "has no dot");
    customer("[mailboxes]", "[mailbox]", "odmr.toml:6", "unknown key `mailbox`, expected one of `hostname`, `user`, `group`, `provider`, `mailboxes`, `outgoing`, `schedule`, `limits`, `timeouts`; did you mean `mailboxes`?");
    customer("[mailboxes]\nroot = \"mail\"\naccept = [\"alice@example.org\", \"@example.com\"]", "", "odmr.toml", "[mailboxes] is missing");
    customer("", "max-size = \"big\"", "odmr.toml:9", "\"big\" is not a valid size");
}

#[test]
fn a_file_for_the_other_side_is_rejected() {
    let directory = files(&[("p.toml", PROVIDER), ("c.toml", CUSTOMER), ("empty.toml", "")]);
    let path = |name| directory.path().join(name);
    let error = ProviderConfig::load(&path("c.toml")).unwrap_err().text;
    assert!(error.contains("is a customer's file"), "{error}");
    let error = CustomerConfig::load(&path("p.toml")).unwrap_err().text;
    assert!(error.contains("is a provider's file"), "{error}");
    let error = Config::load(&path("empty.toml")).unwrap_err().text;
    assert!(error.contains("has neither"), "{error}");
    let error = Config::load(&path("none.toml")).unwrap_err();
    assert_eq!((error.source.line, &error.text[..14]), (None, "cannot be read"));
}

#[test]
fn a_line_that_is_not_utf_8_is_named() {
    let directory = files(&[]);
    let path = directory.path().join("odmr.toml");
    fs::write(&path, b"# one\n# \xe4\n").unwrap();
    assert_error(&directory, "odmr.toml:2", "is not UTF-8");
}

#[test]
fn an_account_opens_by_the_mechanisms_that_it_has_something_for() {
    use Mechanism::{CramMd5, Plain, ScramSha256, ScramSha256Plus};
    let directory = |files_of_customers: &[(&str, &str)]| {
        let files_of_customers: Vec<_> = files_of_customers
            .iter()
            .map(|(name, rest)| {
                (format!("customers.d/{name}.toml"), format!("domains = [\"{name}.example\"]\n{rest}\n"))
            })
            .collect();
        let mut all = vec![("odmr.toml", PROVIDER)];
        all.extend(files_of_customers.iter().map(|(name, text)| (name.as_str(), text.as_str())));
        let directory = files(&all);
        ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap().accounts
    };
    let scram = format!("scram = \"{VERIFIER}\"");
    let check = |rest: &str, expected: &[Mechanism]| {
        let accounts = directory(&[("acme", rest)]);
        let mut offered = accounts.mechanisms();
        offered.sort_by_key(|mechanism| Mechanism::ALL.iter().position(|other| other == mechanism));
        assert_eq!(offered, expected, "{rest}");
        let permits = |mechanism: &Mechanism| accounts.account("acme").unwrap().permits(*mechanism);
        assert_eq!(Mechanism::ALL.into_iter().filter(permits).collect::<Vec<_>>(), expected, "{rest}");
    };
    check("secret = \"open sesame\"", &[ScramSha256Plus, ScramSha256, CramMd5, Plain]);
    check(&scram, &[ScramSha256Plus, ScramSha256, Plain]);
    check("secret = \"Sésame, ouvre-toi\"", &[CramMd5, Plain]);
    check(&format!("{scram}\nmechanisms = [\"SCRAM-SHA-256-PLUS\", \"CRAM-MD5\"]"), &[ScramSha256Plus]);
    check("secret = \"open sesame\"\nmechanisms = [\"cram-md5\"]", &[CramMd5]);

    let accounts = directory(&[("acme", &scram), ("beta", "secret = \"open sesame\"\nmechanisms = [\"CRAM-MD5\"]")]);
    assert_eq!(accounts.mechanisms(), [CramMd5, ScramSha256Plus, ScramSha256, Plain]);
    let found = accounts.credentials("acme").unwrap().unwrap();
    assert_eq!((found.secret, found.verifier.map(|verifier| verifier.to_string()).as_deref()), (None, Some(VERIFIER)));
    // Without customers, or with a mistake in a customer's file, all mechanisms are offered.
    assert_eq!(directory(&[]).mechanisms().len(), Mechanism::ALL.len());
    assert_eq!(directory(&[("acme", &scram), ("beta", "scram = \"x\"")]).mechanisms().len(), Mechanism::ALL.len());
}

#[test]
fn secrets_that_every_user_may_read_or_change_are_rejected() {
    let by_file = ACME.replace("secret = \"open sesame\"", "secret-file = \"secret\"");
    let key = changed(PROVIDER, "", "[tls]\ncertificate = \"c\"\nkey = \"key\"\n");
    let check = |text: &str, acme: &str, open: &str, place: &str| {
        let directory = files(&[
            ("odmr.toml", text),
            ("customers.d/acme.toml", acme),
            ("customers.d/secret", "open sesame"),
            ("key", "a key"),
        ]);
        assert!(Config::load(&directory.path().join("odmr.toml")).is_ok());
        for (bits, what) in [(0o644, "may read it"), (0o642, "may change it"), (0o666, "may read and change it")] {
            mode(&directory.path().join(open), bits);
            assert_error(&directory, place, what);
            assert_error(&directory, place, &format!("chmod 640 {open}"));
        }
    };
    check(PROVIDER, ACME, "customers.d/acme.toml", "customers.d/acme.toml:2");
    check(PROVIDER, &by_file, "customers.d/secret", "customers.d/acme.toml:2");
    check(&key, ACME, "key", "odmr.toml:8");
    check(CUSTOMER, ACME, "odmr.toml", "odmr.toml:5");
    let login = "[relay]\nsmarthost = \"smtp.example.net\"\nname = \"relay\"\n";
    let relay = changed(PROVIDER, "", &format!("{login}secret = \"s\"\n"));
    check(&relay, ACME, "odmr.toml", "odmr.toml:9");
    let relay = changed(PROVIDER, "", &format!("{login}secret-file = \"key\"\n"));
    check(&relay, ACME, "key", "odmr.toml:9");
}

#[test]
fn files_without_a_secret_may_be_read_by_all() {
    let by_file = ACME.replace("secret = \"open sesame\"", "secret-file = \"secret\"");
    let directory =
        files(&[("odmr.toml", PROVIDER), ("customers.d/acme.toml", &by_file), ("customers.d/secret", "open sesame\n")]);
    mode(&directory.path().join("odmr.toml"), 0o644);
    mode(&directory.path().join("customers.d/acme.toml"), 0o644);
    assert!(Config::load(&directory.path().join("odmr.toml")).is_ok());
}

#[test]
fn a_secret_file_is_one_line() {
    for (text, phrase) in [
        ("", "customers.d/secret is empty"),
        ("\n", "customers.d/secret is empty"),
        ("one\ntwo\n", "customers.d/secret has more than one line"),
    ] {
        let directory = files(&[
            ("odmr.toml", PROVIDER),
            ("customers.d/secret", text),
            ("customers.d/acme.toml", "domains = [\"a.example\"]\nsecret-file = \"secret\""),
        ]);
        assert_error(&directory, "customers.d/acme.toml:2", phrase);
    }
}

#[test]
fn an_error_is_one_line_whatever_the_names_of_files() {
    let directory = files(&[("odmr.toml", PROVIDER), ("customers.d/a\nb.toml", ACME)]);
    assert!(error_of(&directory).starts_with("customers.d/a?b.toml: the login name \"a\\nb\" has"));
}

#[test]
fn ten_thousand_customers_load_at_once() {
    let directory = files(&[("odmr.toml", PROVIDER)]);
    for number in 0..10_000 {
        let path = directory.path().join(format!("customers.d/c{number}.toml"));
        let text = format!("domains = [\"d{number}.example\"]\nsecret = \"s{number}\"\n");
        fs::write(&path, text).unwrap();
        mode(&path, 0o640);
    }
    let provider = ProviderConfig::load(&directory.path().join("odmr.toml")).unwrap();
    assert_eq!(provider.accounts.iter().count(), 10_000);
    let owner = provider.accounts.owner(&domain("d4711.example"));
    assert_eq!(owner.unwrap().name, "c4711");
}

/// The same function reads all text files of an administrator, so each may begin and end as any editor writes it.
#[test]
fn byte_order_marks_and_line_ends_do_not_matter_and_utf_16_is_named() {
    let crlf = |text: &str| format!("\u{feff}{}", text.trim_end().replace('\n', "\r\n"));
    let acme = ACME.replace("secret = \"open sesame\"", "secret-file = \"acme.secret\"");
    let customer = changed(CUSTOMER, "secret = \"open sesame\"", "secret-file = \"secret\"");
    let customer = changed(&customer, "", "alias-file = \"aliases\"\n");
    let provider = |acme: &str, secret: &str| {
        files(&[("odmr.toml", &crlf(PROVIDER)), ("customers.d/acme.toml", acme), ("customers.d/acme.secret", secret)])
    };
    let customer = |secret: &str, aliases: &str| {
        files(&[("odmr.toml", &crlf(&customer)), ("secret", secret), ("aliases", aliases)])
    };
    let load = |directory: TempDir| Config::load(&directory.path().join("odmr.toml")).unwrap();
    for secret in ["open sesame", "\u{feff}open sesame", "\u{feff}open sesame\r\n", "open sesame\n"] {
        let Config::Provider(read) = load(provider(&crlf(&acme), secret)) else { panic!("not a provider's file") };
        assert_eq!(read.accounts.account("acme").unwrap().secret.as_deref(), Some(&b"open sesame"[..]));
        let Config::Customer(read) = load(customer(secret, "\u{feff}root: alice\r\npostmaster: root")) else {
            panic!("not a customer's file")
        };
        assert_eq!(read.providers[0].remote.login, login("acme", "open sesame"));
    }
    // UTF-16, as "Unicode" of Windows is: each octet of ASCII and a zero.
    let wide = |text: &str| text.chars().flat_map(|character| [character, '\0']).collect::<String>();
    let save = "it is UTF-16 or UTF-32: save it as UTF-8";
    assert_error(&files(&[("odmr.toml", &wide(PROVIDER))]), "odmr.toml", save);
    assert_error(&provider(&wide(&acme), "open sesame"), "customers.d/acme.toml", save);
    assert_error(&provider(&acme, &wide("open sesame")), "customers.d/acme.toml:2", save);
    assert_error(&customer(&wide("open sesame"), "root: alice"), "odmr.toml:5", save);
    assert_error(&customer("open sesame", &wide("root: alice")), "odmr.toml:9", save);
}

/// The mistakes and the warnings in these files, without the name of their directory.
fn findings(directory: &TempDir) -> (Vec<String>, Vec<String>) {
    let (_, found) = Config::examine(&directory.path().join("odmr.toml"));
    let shown = |error: &ConfigError| error.to_string().replace(&format!("{}/", directory.path().display()), "");
    (found.errors.iter().chain(&found.skipped).map(shown).collect(), found.warnings.iter().map(shown).collect())
}

fn assert_found(found: &[String], expected: &[(&str, &str)]) {
    let fits = |(line, (place, phrase)): (&String, &(&str, &str))| {
        line.starts_with(&format!("{place}: ")) && line.contains(phrase)
    };
    let all = found.len() == expected.len() && found.iter().zip(expected).all(fits);
    assert!(all, "wanted {expected:#?}\ngot {found:#?}");
}

const MISTAKEN_PROVIDER: &str = r#"hostname = "no host"
spol = "spool"
customers = "customers.d"
[tls]
key = 5
[inbound]
listen = ["nohost", "[::]:25", "7"]
max-size = "0"
[odmr]
require-tls = "yes"
cram-md5 = 1
[relay]
tls = "perhaps"
port = 0
retry-first = "soon"
tls-for = { "example.com" = "no" }
[limits]
connections = 0
errors = -1
[timeouts]
connect = "5"
atrn = "1m"
"#;

#[test]
fn all_mistakes_of_a_provider_are_found_in_one_reading() {
    let directory = files(&[
        ("odmr.toml", MISTAKEN_PROVIDER),
        ("customers.d/acme.toml", "domains = [\"example.org\", \"nodot\"]\nrelay = 1\nmaxsize = 1\nrate = -5\n"),
        ("customers.d/beta.toml", "domains = [\"example.net\"]\nsecret = \"x\"\n"),
        ("customers.d/gamma.toml", "domains = [\"example.net\"]\nsecret = \"long enough to be one\"\n"),
        ("customers.d/zed", ""),
        ("customers.d/zed.toml~", ""),
        ("customers.d/.zed.toml.swp", ""),
    ]);
    let (errors, warnings) = findings(&directory);
    assert_found(
        &errors,
        &[
            ("odmr.toml:2", "unknown key `spol`"),
            ("odmr.toml:1", "is not a valid host name"),
            ("odmr.toml", "`spool` is missing"),
            ("odmr.toml:4", "`certificate` is missing"),
            ("odmr.toml:5", "this is a number"),
            ("odmr.toml:7", "\"nohost\" is"),
            ("odmr.toml:7", "\"7\" is"),
            ("odmr.toml:8", "no message would be accepted"),
            ("odmr.toml:10", "expected true or false"),
            ("odmr.toml:11", "expected true or false"),
            ("odmr.toml:13", "is not a valid TLS policy"),
            ("odmr.toml:16", "is not a valid TLS policy"),
            ("odmr.toml:14", "is not a valid port"),
            ("odmr.toml:15", "is not a valid time"),
            ("odmr.toml:18", "is too small"),
            ("odmr.toml:19", "is too small"),
            ("odmr.toml:21", "has no unit"),
            ("odmr.toml:22", "ten minutes"),
            ("customers.d/acme.toml:3", "unknown key `maxsize`"),
            ("customers.d/acme.toml", "`secret` is missing"),
            ("customers.d/acme.toml:2", "expected true or false"),
            ("customers.d/acme.toml:4", "is too small"),
            ("customers.d/acme.toml:1", "has no dot"),
            ("customers.d/gamma.toml:1", "example.net is in customers.d/beta.toml too"),
        ],
    );
    assert_found(
        &warnings,
        &[
            (
                "customers.d/zed",
                "is not read as a customer's file, as its name does not end in .toml: if it is one, rename it zed.toml",
            ),
            ("customers.d/zed.toml~", "is not read"),
            ("customers.d/beta.toml:2", "the secret has 1 octet and can be guessed"),
        ],
    );
}

#[test]
fn all_mistakes_of_a_customer_are_found_in_one_reading() {
    let text = r#"user = "a:b"
[[provider]]
address = "https://relay.example.net"
name = ""
secret = "short"
tls = "ssl"
[provider.schedule]
every = "15"
retry-max = 5
[[provider]]
name = "acme"
domains = ["nodot", "example.org"]
[mailboxes]
accept = ["@example.org", "alice", "bob"]
umask = 77
deliver = "pipe:x"
aliases = { "a b" = "c", "d" = "|e" }
[outgoing]
listen = []
[timeouts]
mail = "x"
"#;
    let (errors, warnings) = findings(&files(&[("odmr.toml", text)]));
    assert_found(
        &errors,
        &[
            ("odmr.toml", "`hostname` is missing"),
            ("odmr.toml:3", "is a URL: write HOST or HOST:PORT"),
            ("odmr.toml:4", "the login name is empty"),
            ("odmr.toml:8", "has no unit"),
            ("odmr.toml:9", "this is a number"),
            ("odmr.toml:10", "needs `address`"),
            ("odmr.toml:10", "`secret` is missing"),
            ("odmr.toml:12", "has no dot"),
            ("odmr.toml:13", "needs `root`"),
            ("odmr.toml:15", "this is a number"),
            ("odmr.toml:16", "is not a valid way to deliver"),
            ("odmr.toml:14", "\"alice\" is not a valid address"),
            ("odmr.toml:14", "\"bob\" is not a valid address"),
            ("odmr.toml:1", "is not a valid name of a user"),
            ("odmr.toml:21", "is not a valid time"),
        ],
    );
    assert_found(&warnings, &[("odmr.toml:5", "the secret has 5 octets")]);
}

#[test]
fn a_mistake_in_the_separator_makes_no_alias_wrong() {
    let table = "\n[mailboxes]\nroot = \"m\"\naccept = [\"alice@example.org\"]\naliases = { info = \"alice-lists\" }\n";
    let text = |separator: &str| {
        let head = "hostname = \"mail.example.org\"\n[provider]\naddress = \"relay.example.net\"\nname = \"acme\"\n\
                    secret = \"a long random word\"";
        findings(&files(&[("odmr.toml", &format!("{head}{table}separator = {separator}\n"))])).0
    };
    assert_found(&text("\"-\""), &[]);
    assert_found(&text("[\"-\"]"), &[("odmr.toml:10", "expected a character such as")]);
}

/// Files of earlier versions are read, and `check` warns with the new key.
#[test]
fn a_key_by_its_former_name_is_read_with_a_warning() {
    let old = "delay-notice = \"3h\"\n";
    let relay = changed(PROVIDER, "", &format!("[relay]\n{old}"));
    let outgoing = changed(CUSTOMER, "open sesame", "a long random word");
    let outgoing = format!("{outgoing}[outgoing]\nqueue = \"out\"\n{old}");
    for (text, line) in [(relay, "odmr.toml:7"), (outgoing, "odmr.toml:11")] {
        let directory = files(&[("odmr.toml", &text)]);
        let (errors, warnings) = findings(&directory);
        let warning = "`delay-notice` is `delay-warning` now: write delay-warning = … in its place";
        assert_found(&errors, &[]);
        assert_found(&warnings, &[(line, warning)]);
        let printed = effective(&directory.path().join("odmr.toml")).unwrap();
        assert!(printed.contains("\ndelay-warning = \"3h\"\n"), "{printed}");
    }
    let both = format!("[relay]\n{old}delay-warning = \"3h\"");
    provider("", &both, "odmr.toml:7", "unknown key `delay-notice`");
}

#[test]
fn each_line_that_is_not_valid_toml_is_found() {
    let (errors, _) = findings(&files(&[("odmr.toml", "hostname = \nspool = \"a\"\ncustomers = [1\n")]));
    assert!(errors.len() >= 2 && errors[0].starts_with("odmr.toml:1: "), "{errors:#?}");
}

/// `check --print` prints a valid configuration with the same effect, except for secrets.
#[test]
fn what_is_printed_is_read_again() {
    let account = "domains = [\"example.org\"]\nsecret = \"open sesame\"\nmax-size = \"1MiB\"\nmax-bytes = \"1GiB\"\n\
                   recipients = [\"@example.org\"]\n";
    let provider = format!(
        "user = \"odmr\"\ngroup = \"mail\"\n{PROVIDER}give-up = \"36h\"\n[relay]\nsmarthost = \"smtp.example.net\"\nname = \"a\\\"b\"\nsecret = \"open \
         sesame\"\ntls-for = {{ \"example.com\" = \"must\" }}\n[limits]\nerrors = 7\n[timeouts]\nmail = \"1500ms\"\n"
    );
    let customer = format!(
        "user = \"vmail\"\n{CUSTOMER}catch-all = {{ \"*\" = \"create\", \"example.com\" = \"alice@example.org\" }}\naliases = {{ root = [\"alice\"], \"info@example.com\" = \"alice@example.org\" }}\n\
         umask = \"027\"\n[outgoing]\nqueue = \"out\"\nnetworks = [\"192.0.2.0/24\"]\n[schedule]\nat = [\"* every 1h\"]\n\
         zone = \"UTC\"\njitter = \"none\"\n"
    );
    let pins = [Pin::Key([1; 32]), Pin::Certificate([2; 32])];
    let customer = customer.replace("[provider]\n", &format!("[provider]\npin = [\"{}\", \"{}\"]\n", pins[0], pins[1]));
    for text in [PROVIDER, &provider, CUSTOMER, &customer] {
        let directory = files(&[("odmr.toml", text), ("customers.d/acme.toml", account)]);
        let printed = effective(&directory.path().join("odmr.toml")).unwrap();
        assert!(!printed.contains("sesame"), "{printed}");
        let own = printed.split("\n# ").next().unwrap();
        let again = files(&[("odmr.toml", own)]);
        let printed_again = effective(&again.path().join("odmr.toml")).unwrap_or_else(|error| panic!("{error}\n{own}"));
        let lines =
            |text: &str| text.split("\n# ").next().unwrap().lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(lines(&printed), lines(&printed_again));
        let (one, other) =
            [&directory, &again].map(|files| Config::load(&files.path().join("odmr.toml")).unwrap()).into();
        match (one, other) {
            (Config::Provider(one), Config::Provider(other)) => {
                assert_eq!((one.odmr, one.limits, one.timeouts), (other.odmr, other.limits, other.timeouts));
                assert_eq!((one.relay.retry, one.relay.tls_for), (other.relay.retry, other.relay.tls_for));
            }
            (Config::Customer(one), Config::Customer(other)) => {
                assert_eq!(one.providers[0].remote.pins, if *text == *customer { &pins[..] } else { &[] });
                assert_eq!(one.providers[0].remote.pins, other.providers[0].remote.pins);
                assert_eq!(
                    (one.providers[0].schedule.clone(), one.limits),
                    (other.providers[0].schedule.clone(), other.limits)
                );
                assert_eq!(one.mailboxes.rules.alias_count(), other.mailboxes.rules.alias_count());
                let explain = |rules: &RecipientRules| rules.explain_typed("word@example.com", &|_| false).unwrap();
                let [one_text, other_text] = [&one.mailboxes.rules, &other.mailboxes.rules].map(explain);
                assert_eq!(one_text.lines().count(), 2, "{one_text}");
                let place = |text: &str| text.split(" -> ").next().map(str::to_owned);
                assert_eq!(place(&one_text), place(&other_text));
                assert_eq!((one.owner.is_some(), one.mailboxes.umask), (other.owner.is_some(), other.mailboxes.umask));
            }
            _ => panic!("another side"),
        }
    }
    let directory = files(&[("odmr.toml", &provider), ("customers.d/acme.toml", account)]);
    let printed = effective(&directory.path().join("odmr.toml")).unwrap();
    for line in [
        "give-up = \"36h\"",
        "errors = 7",
        "mail = \"1500ms\"",
        "takeover = \"1m\"",
        "listen = [\"[::]:25\"]",
        "name = \"a\\\"b\"",
        "max-size = \"1MiB\"",
        "any-sender = false",
        "expire-after = \"14d\"",
        "max-bytes = \"1GiB\"",
        "recipients = [\"@example.org\"]",
    ] {
        assert!(printed.lines().any(|printed| printed == line), "{line} is not in\n{printed}");
    }
}

/// A mailbox may be in a domain without a dot, which is not valid as `domain` of `[outgoing]`.
#[test]
fn a_default_that_a_file_cannot_name_is_not_printed() {
    let customer = CUSTOMER.replace("@example.org\"", "@localhost\"");
    assert_ne!(customer, CUSTOMER);
    let directory = files(&[("odmr.toml", &format!("{customer}[outgoing]\nqueue = \"out\"\n"))]);
    let printed = effective(&directory.path().join("odmr.toml")).unwrap();
    let again = files(&[("odmr.toml", &printed)]);
    CustomerConfig::load(&again.path().join("odmr.toml")).unwrap();
}
