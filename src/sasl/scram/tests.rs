//! The example of RFC 7677, forged messages of each kind, and random octets.

use proptest::prelude::*;

use super::*;
use crate::sasl::verifier::{ITERATIONS, SALT_OCTETS, stable_salt};

/// RFC 7677 section 3.
const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";
const CLIENT_NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
const CLIENT_FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
const SERVER_FIRST: &str = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
const CLIENT_FINAL: &str =
    "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
const SERVER_FINAL: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";
const EXPORTER: [u8; 32] = [7; 32];

fn verifier(secret: &[u8]) -> ScramVerifier {
    ScramVerifier::new(secret, &BASE64.decode(SALT.as_bytes()).unwrap(), 4096)
}

/// The account `user` with the secret `pencil`, and a name for which the store fails.
fn find(name: &str) -> Result<(ScramVerifier, bool), Unavailable> {
    match name {
        "broken" => Err(Unavailable),
        "user" | "a,b=c" | "grün" => Ok((verifier(b"pencil"), true)),
        _ => Ok((ScramVerifier::fake(b"key", name, &Default::default()), false)),
    }
}

fn server(binding: Option<[u8; 32]>, plus_offered: bool) -> ScramServer {
    ScramServer::new(binding, plus_offered, SERVER_NONCE.into())
}

fn client(secret: &[u8], binding: ClientBinding) -> ScramClient {
    ScramClient::new("user", secret, CLIENT_NONCE.into(), binding).unwrap()
}

fn text(step: ExchangeStep) -> String {
    match step {
        ExchangeStep::Challenge(challenge) => String::from_utf8(challenge).unwrap(),
        step => format!("{step:?}"),
    }
}

fn failed(name: &str) -> ExchangeStep {
    ExchangeStep::Failed(name.into())
}

/// Rules: SCR-09.
#[test]
fn the_example_of_rfc_7677_passes_on_both_sides() {
    let mut client = client(b"pencil", ClientBinding::Unsupported);
    assert_eq!(client.initial().as_deref(), Some(CLIENT_FIRST.as_bytes()));
    assert_eq!(client.step(SERVER_FIRST.as_bytes()).as_deref(), Some(CLIENT_FINAL.as_bytes()));
    assert!(!client.finished(), "the server has proved nothing yet");
    assert_eq!(client.step(SERVER_FINAL.as_bytes()), Some(Vec::new()));
    assert!(client.finished());
    assert_eq!(client.step(b""), None, "the exchange is over");

    let mut server = server(None, false);
    assert_eq!(text(server.respond(CLIENT_FIRST.as_bytes(), find)), SERVER_FIRST);
    assert_eq!(text(server.respond(CLIENT_FINAL.as_bytes(), find)), SERVER_FINAL);
    assert_eq!(server.respond(b"", find), ExchangeStep::Done("user".into()));
    assert_eq!(server.respond(b"", find), ExchangeStep::Malformed, "the exchange is over");
}

/// RFC 7914 section 11, the first 32 octets of each.
#[test]
fn pbkdf2_passes_the_vectors_of_rfc_7914() {
    let check = |secret: &[u8], salt: &[u8], iterations, expected| {
        assert_eq!(data_encoding::HEXLOWER.encode(&salted_password(secret, salt, iterations)), expected);
    };
    check(b"passwd", b"salt", 1, "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc");
    check(b"Password", b"NaCl", 80_000, "4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56");
}

/// Runs both sides. Returns the server's last step, and whether the client is satisfied.
fn authenticate(mut client: ScramClient, mut server: ScramServer) -> (ExchangeStep, bool) {
    let mut response = client.initial().unwrap();
    loop {
        match server.respond(&response, find) {
            ExchangeStep::Challenge(challenge) => match client.step(&challenge) {
                Some(next) => response = next,
                None => return (ExchangeStep::Malformed, client.finished()),
            },
            step => return (step, client.finished()),
        }
    }
}

/// Rules: CB-03.
#[test]
fn both_sides_must_see_the_same_channel() {
    use ClientBinding::{NotOffered, TlsExporter, Unsupported};
    let check = |binding, server, passes: bool| {
        let (step, finished) = authenticate(client(b"pencil", binding), server);
        let expected = if passes { ExchangeStep::Done("user".into()) } else { failed("user") };
        assert_eq!((step, finished), (expected, passes), "{binding:?}");
    };
    check(Unsupported, server(None, false), true);
    check(Unsupported, server(None, true), true);
    check(NotOffered, server(None, false), true);
    check(NotOffered, server(None, true), false);
    check(TlsExporter(EXPORTER), server(Some(EXPORTER), true), true);
    check(TlsExporter([8; 32]), server(Some(EXPORTER), true), false);
    check(TlsExporter(EXPORTER), server(None, true), false);
    check(TlsExporter(EXPORTER), server(None, false), false);
    check(Unsupported, server(Some(EXPORTER), true), false);
    check(NotOffered, server(Some(EXPORTER), true), false);
}

/// Rules: SCR-03, SCR-05, SCR-10.
#[test]
fn a_first_message_of_the_client_is_accepted_rejected_or_malformed() {
    let check = |message: &str, expected: &str| {
        let got = text(server(None, false).respond(message.as_bytes(), find));
        assert!(got.starts_with(expected), "{message:?}: {got}");
    };
    let accepted = "r=abc%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    check("n,,n=user,r=abc", accepted);
    check("y,,n=user,r=abc", accepted);
    check("n,a=user,n=user,r=abc", accepted);
    check("n,,n=a=2Cb=3Dc,r=abc", accepted);
    check("n,,n=user,r=abc,t=later,q=x=y", accepted);
    check("n,,n=grün,r=abc", accepted);
    check(&format!("n,,n=user,r={}", "a".repeat(256)), "r=aaa");
    check(&format!("n,,n=user,r={}", "a".repeat(257)), "Malformed");
    // Fails only after the proof, as each check that depends on an account does.
    check("n,a=other,n=user,r=abc", accepted);
    check("n,,n=stranger,r=abc", "r=abc%hv");
    check("n,,n=broken,r=abc", "Unavailable");
    check("p=tls-exporter,,n=user,r=abc", "Failed(\"user\")");
    for malformed in [
        "",
        "n",
        "n,",
        "n,,",
        "n=user,r=abc",
        "x,,n=user,r=abc",
        "N,,n=user,r=abc",
        "p,,n=user,r=abc",
        "p=,,n=user,r=abc",
        "nn,,n=user,r=abc",
        "n,user,n=user,r=abc",
        "n,a=,n=user,r=abc",
        "n,a=u=ser,n=user,r=abc",
        "n,,m=x,n=user,r=abc",
        "n,,n=user",
        "n,,n=,r=abc",
        "n,,n=user,r=",
        "n,,r=abc,n=user",
        "n,,u=user,r=abc",
        "n,,n=u=2cser,r=abc",
        "n,,n=user=,r=abc",
        "n,,n=us=2Der,r=abc",
        "n,,n=us\0er,r=abc",
        "n,,n=user,r=a c",
        "n,,n=user,r=ä",
        "n,,n=user,r=a\u{7f}",
        "n,,n=user,r=abc,",
        "n,,n=user,r=abc,t",
        "n,,n=user,r=abc,t=",
        "n,,n=user,r=abc,1=x",
        "n,,n=user,r=abc,m=x",
        "n,,n=user,r=abc,r=abd",
        "n,,n=user,r=abc,p=x",
        "n,,n=user,r=abc\0",
        "n,,n=user,r=abc,t=\0",
    ] {
        check(malformed, "Malformed");
    }
    assert_eq!(server(None, false).respond(b"n,,n=us\xffer,r=abc", find), ExchangeStep::Malformed);

    // With -PLUS the flag must be `p=tls-exporter`.
    let check = |message: &str, expected: &str| {
        let got = text(server(Some(EXPORTER), true).respond(message.as_bytes(), find));
        assert!(got.starts_with(expected), "{message:?}: {got}");
    };
    check("p=tls-exporter,,n=user,r=abc", accepted);
    for flag in ["n", "y", "p=tls-unique", "p=tls-server-end-point", "p=TLS-EXPORTER", "p=tls-exporter2"] {
        check(&format!("{flag},,n=user,r=abc"), "Failed(\"user\")");
    }
}

/// Returns the client-final message for a challenge, with this proof or the right one.
fn client_final(header: &[u8], bare: &str, server_first: &str, nonce: &str, extra: &str, secret: &[u8]) -> String {
    let without_proof = format!("c={},r={nonce}{extra}", BASE64.encode(header));
    let auth_message = format!("{bare},{server_first},{without_proof}");
    let (client_key, _) = keys(&salted_password(secret, &BASE64.decode(SALT.as_bytes()).unwrap(), 4096));
    let proof = xor(&client_key, &finish(&keyed(&Sha256::digest(client_key)), &[auth_message.as_bytes()]));
    format!("{without_proof},p={}", BASE64.encode(&proof))
}

/// Each message has the proof that belongs to it, so that the tested part alone decides.
///
/// Rules: SCR-03, SCR-05.
#[test]
fn a_last_message_of_the_client_is_accepted_or_rejected() {
    let check = |first: &str, header: &[u8], nonce: Option<&str>, extra: &str, secret: &[u8], expected: &str| {
        let binding = header.ends_with(&EXPORTER).then_some(EXPORTER);
        let mut server = server(binding, false);
        let challenge = text(server.respond(first.as_bytes(), find));
        let bare = first.splitn(3, ',').last().unwrap();
        let own = challenge.split(',').next().unwrap().strip_prefix("r=").unwrap();
        let message = client_final(header, bare, &challenge, nonce.unwrap_or(own), extra, secret);
        let got = text(server.respond(message.as_bytes(), find));
        assert!(got.starts_with(expected), "{first:?} {message:?}: {got}");
    };
    let bound = [b"p=tls-exporter,,".as_slice(), &EXPORTER].concat();
    check("n,,n=user,r=abc", b"n,,", None, "", b"pencil", "v=");
    check("n,,n=user,r=abc", b"n,,", None, ",t=x,q=y", b"pencil", "v=");
    check("n,a=user,n=user,r=abc", b"n,a=user,", None, "", b"pencil", "v=");
    check("n,,n=a=2Cb=3Dc,r=abc", b"n,,", None, "", b"pencil", "v=");
    check("p=tls-exporter,,n=user,r=abc", &bound, None, "", b"pencil", "v=");

    check("n,,n=user,r=abc", b"n,,", None, "", b"Pencil", "Failed(\"user\")");
    check("n,,n=stranger,r=abc", b"n,,", None, "", b"pencil", "Failed(\"stranger\")");
    check("n,a=other,n=user,r=abc", b"n,a=other,", None, "", b"pencil", "Failed(\"user\")");
    check("n,,n=grün,r=abc", b"n,,", None, "", b"pencil", "Failed(\"grün\")");
    // The header of the first message is repeated.
    check("y,,n=user,r=abc", b"n,,", None, "", b"pencil", "Failed(\"user\")");
    check("n,,n=user,r=abc", b"y,,", None, "", b"pencil", "Failed(\"user\")");
    check("n,a=user,n=user,r=abc", b"n,,", None, "", b"pencil", "Failed(\"user\")");
    check("n,,n=user,r=abc", &[b"n,,".as_slice(), &EXPORTER[1..]].concat(), None, "", b"pencil", "Failed(\"user\")");
    let other = [b"p=tls-exporter,a=user,".as_slice(), &EXPORTER].concat();
    check("p=tls-exporter,,n=user,r=abc", &other, None, "", b"pencil", "Failed(\"user\")");
    // A recorded message has the nonce of another exchange.
    for nonce in ["abc", "abcx", "abc%hvYDpWUa2RaTCAfuxFIlj)hNlF$k1", "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"] {
        check("n,,n=user,r=abc", b"n,,", Some(nonce), "", b"pencil", "Failed(\"user\")");
    }
    for extra in [",m=x", ",t", ",t=", ",r=x", ",", ",p=x", ",1=x"] {
        check("n,,n=user,r=abc", b"n,,", None, extra, b"pencil", "Malformed");
    }
}

#[test]
fn a_last_message_of_another_form_is_malformed() {
    let proof = BASE64.encode(&[0; 32]);
    let nonce = format!("abc{SERVER_NONCE}");
    let check = |message: &str, expected: ExchangeStep| {
        let mut server = server(None, false);
        server.respond(b"n,,n=user,r=abc", find);
        assert_eq!(server.respond(message.as_bytes(), find), expected, "{message:?}");
        assert_eq!(server.respond(b"", find), ExchangeStep::Malformed, "{message:?}: the exchange is over");
    };
    check(&format!("c=biws,r={nonce},p={proof}"), failed("user"));
    for malformed in [
        String::new(),
        "n,,n=user,r=abc".into(),
        format!("c=biws,r={nonce}"),
        format!("c=biws,r={nonce},p="),
        format!("c=biws,r={nonce},p=AAAA"),
        format!("c=biws,r={nonce},p={proof}x"),
        format!("c=biws,r={nonce},p={proof},t=x"),
        format!("c=,r={nonce},p={proof}"),
        format!("c=biw,r={nonce},p={proof}"),
        format!("r={nonce},c=biws,p={proof}"),
        format!("m=x,c=biws,r={nonce},p={proof}"),
        format!("c=biws,p={proof}"),
    ] {
        check(&malformed, ExchangeStep::Malformed);
    }
    // After the server's signature only an empty response follows.
    let mut server = server(None, false);
    server.respond(CLIENT_FIRST.as_bytes(), find);
    assert_eq!(text(server.respond(CLIENT_FINAL.as_bytes(), find)), SERVER_FINAL);
    assert_eq!(server.respond(b"x", find), ExchangeStep::Malformed);
}

/// Rules: SCR-03, SCR-04, SCR-05.
#[test]
fn the_client_rejects_a_first_message_with_the_reason() {
    let check = |message: &str, problem: Option<&str>| {
        let mut client = client(b"pencil", ClientBinding::Unsupported);
        client.initial();
        assert_eq!(client.step(message.as_bytes()).is_some(), problem.is_none(), "{message:?}");
        assert_eq!(client.problem(), problem, "{message:?}");
        assert!(!client.finished());
    };
    let nonce = format!("{CLIENT_NONCE}x");
    check(&format!("r={nonce},s={SALT},i=4096"), None);
    check(&format!("r={nonce},s={SALT},i=4096,t=x"), None);
    let form = Some("sent a first message that is not one of SCRAM");
    for malformed in [
        String::new(),
        format!("m=x,r={nonce},s={SALT},i=4096"),
        format!("r={nonce},s={SALT},i=4096,m=x"),
        format!("s={SALT},r={nonce},i=4096"),
        format!("r={nonce},s={SALT}"),
        format!("r={nonce},s=,i=4096"),
        format!("r={nonce},s=W22,i=4096"),
        format!("r={nonce}\u{7f},s={SALT},i=4096"),
        format!("r={nonce},s={SALT},i=+4096"),
        format!("r={nonce},s={SALT},i=04096"),
        format!("r={nonce},s={SALT},i=-4096"),
        format!("r={nonce},s={SALT},i=0"),
        format!("r={nonce},s={SALT},i="),
        format!("r={nonce},s={SALT},i=4096,"),
        "e=other-error".into(),
        SERVER_FINAL.into(),
    ] {
        check(&malformed, form);
    }
    for nonce in [CLIENT_NONCE, "x", &format!("x{CLIENT_NONCE}y"), &CLIENT_NONCE[1..]] {
        let problem = "did not add its own part to the nonce";
        check(&format!("r={nonce},s={SALT},i=4096"), Some(problem));
    }
    for count in ["1", "4095", "1000001", "4294967296", "99999999999999999999"] {
        let problem = format!("asks for {count} iterations of SCRAM, and this client accepts 4096 to 1000000");
        check(&format!("r={nonce},s={SALT},i={count}"), Some(&problem));
    }
}

/// Rules: SCR-07.
#[test]
fn the_client_accepts_only_the_right_signature() {
    let check = |message: &str, response: Option<&[u8]>, problem: Option<&str>| {
        let mut client = client(b"pencil", ClientBinding::Unsupported);
        client.initial();
        assert!(!client.finished(), "before the server's first message");
        client.step(SERVER_FIRST.as_bytes());
        assert!(!client.finished(), "before the server's last message");
        assert_eq!(client.step(message.as_bytes()).as_deref(), response, "{message:?}");
        assert_eq!(client.problem(), problem, "{message:?}");
        assert_eq!(client.finished(), message.starts_with(SERVER_FINAL), "{message:?}");
    };
    check(SERVER_FINAL, Some(b""), None);
    check(&format!("{SERVER_FINAL},t=x"), Some(b""), None);
    // The server reports a failure, and the client sends the empty response.
    check("e=invalid-proof", Some(b""), None);
    let wrong = Some("does not know the secret, as its signature is wrong");
    check("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G8=", None, wrong);
    check("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl9", None, wrong);
    let form = Some("sent a last message that is not one of SCRAM");
    for malformed in
        ["", "v=", "v=%", "v", "e=", "x=y", "m=x,v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=", SERVER_FIRST]
    {
        check(malformed, None, form);
    }
}

#[test]
fn the_client_sends_its_first_message_with_auth_or_after_an_empty_challenge() {
    let mut client = client(b"pencil", ClientBinding::Unsupported);
    assert_eq!(client.step(b"").as_deref(), Some(CLIENT_FIRST.as_bytes()));
    assert_eq!(client.step(b""), None, "one response only");

    let mut client = self::client(b"pencil", ClientBinding::Unsupported);
    assert_eq!(client.step(SERVER_FIRST.as_bytes()), None);
    assert_eq!(client.problem(), Some("sent a challenge out of order"));
}

/// Rules: SCR-02.
#[test]
fn the_client_escapes_its_name() {
    let client = ScramClient::new("a,b=c", b"x", "n".into(), ClientBinding::Unsupported);
    assert_eq!(client.unwrap().initial().as_deref(), Some(&b"n,,n=a=2Cb=3Dc,r=n"[..]));
    assert_eq!(unescape(&escape("=2C,=3D")).as_deref(), Some("=2C,=3D"));
}

/// Rules: SCR-10.
#[test]
fn the_client_uses_no_name_or_secret_that_needs_preparation() {
    let usable =
        |name: &str, secret: &[u8]| ScramClient::new(name, secret, "n".into(), ClientBinding::Unsupported).is_some();
    assert!(usable("a, b=c", b"a secret ~"));
    for (name, secret) in [("", &b"x"[..]), ("grün", b"x"), ("a\tb", b"x"), ("a", b""), ("a", b"\xff"), ("a", b"x\x7f")]
    {
        assert!(!usable(name, secret), "{name:?} {secret:?}");
    }
}

#[test]
fn a_written_verifier_is_read_again() {
    let verifier = verifier(b"pencil");
    let text = verifier.to_string();
    let expected = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$\
                    WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
    assert_eq!(text, expected);
    assert_eq!(ScramVerifier::parse(&text), Ok(verifier.clone()));
    assert_eq!(format!("{verifier:?}"), "ScramVerifier(4096 iterations)");
    assert!(verifier.is_of_salted(&salted_password(b"pencil", &verifier.salt, 4096)));
    assert!(!verifier.is_of_salted(&salted_password(b"pencils", &verifier.salt, 4096)));
}

#[test]
fn a_verifier_that_is_not_valid_is_rejected_with_the_reason() {
    let (key, short) = (BASE64.encode(&[1; 32]), BASE64.encode(&[1; 31]));
    let check = |text: &str, expected: &str| {
        let error = ScramVerifier::parse(text).unwrap_err();
        assert!(error.contains(expected), "{text:?}: {error}");
    };
    let form = "SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY";
    for text in ["", "pencil", "SCRAM-SHA-1$4096:AAAA$A:A", "SCRAM-SHA-256$4096:AAAA", "SCRAM-SHA-256$4096$A:A"] {
        check(text, form);
    }
    for count in ["", "0", "4095", "1000001", "+4096", "x", "99999999999"] {
        check(&format!("SCRAM-SHA-256${count}:{SALT}${key}:{key}"), "its iterations must be 4096 to 1000000");
    }
    check(&format!("SCRAM-SHA-256$4096:AAAA${key}:{key}"), "its salt has 3 octets, fewer than 16");
    check(&format!("SCRAM-SHA-256$4096:%${key}:{key}"), "its salt is not base64");
    check(&format!("SCRAM-SHA-256$4096:{SALT}${short}:{key}"), "its stored key has 31 octets, not 32");
    check(&format!("SCRAM-SHA-256$4096:{SALT}${key}:{key}x"), "its server key is not base64");
}

/// Rules: CRAM-08.
#[test]
fn an_unknown_name_gets_the_same_salt_each_time() {
    let first = |name: &str| text(server(None, false).respond(format!("n,,n={name},r=abc").as_bytes(), find));
    assert_eq!(first("stranger"), first("stranger"));
    assert_ne!(first("stranger"), first("strange"));
    let fake = ScramVerifier::fake(b"key", "stranger", &Default::default());
    assert_eq!(fake.salt, stable_salt(b"key", "stranger"));
    assert_ne!(fake.salt, stable_salt(b"another key", "stranger"));
    assert_eq!((fake.salt.len(), fake.iterations), (SALT_OCTETS, ITERATIONS));
}

/// An account's verifier may be one that another program has made.
/// Rules: CRAM-08.
#[test]
fn an_unknown_name_has_iterations_and_a_salt_as_accounts_have() {
    let shapes = |shapes: &[(u32, usize)]| shapes.iter().copied().collect::<std::collections::BTreeSet<_>>();
    let shape = |name: &str, all: &[(u32, usize)]| {
        let fake = ScramVerifier::fake(b"key", name, &shapes(all));
        (fake.iterations, fake.salt.len())
    };
    let (ours, odd, long) = ((ITERATIONS, SALT_OCTETS), (4096, 24), (10_000, 100));
    let names: Vec<_> = (0..40).map(|number| format!("stranger{number}")).collect();
    for all in [&[ours][..], &[odd], &[ours, odd], &[ours, odd, long]] {
        let found: Vec<_> = names.iter().map(|name| shape(name, all)).collect();
        assert_eq!(shapes(&found), shapes(all), "each of them, and no other");
        // Another shape does not change the others.
        let more = names.iter().map(|name| shape(name, &[all, &[(5000, 32)]].concat()));
        assert!(found.iter().zip(more).all(|(before, after)| *before == after || after == (5000, 32)));
    }
    let salt = ScramVerifier::fake(b"key", "stranger", &shapes(&[long])).salt;
    assert_ne!(salt[..32], salt[32..64]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn both_sides_agree(
        name in "[ -~]{1,40}", secret in "[ -~]{1,40}", other in "[ -~]{1,40}", nonces in ("[!-+--~]{1,30}", "[!-+--~]{1,30}"),
        bound in any::<Option<[u8; 32]>>(),
    ) {
        let verifier = ScramVerifier::new(secret.as_bytes(), &[9; 16], 4096);
        prop_assert_eq!(ScramVerifier::parse(&verifier.to_string()), Ok(verifier.clone()));
        for attempt in [&secret, &other] {
            let binding = bound.map_or(ClientBinding::NotOffered, ClientBinding::TlsExporter);
            let mut client = ScramClient::new(&name, attempt.as_bytes(), nonces.0.clone(), binding).unwrap();
            let mut server = ScramServer::new(bound, bound.is_some(), nonces.1.clone());
            let find = |wanted: &str| Ok((verifier.clone(), wanted == name));
            let mut step = server.respond(&client.initial().unwrap(), find);
            while let ExchangeStep::Challenge(challenge) = &step {
                step = server.respond(&client.step(challenge).unwrap(), find);
            }
            let right = *attempt == secret;
            let expected = if right { ExchangeStep::Done(name.clone()) } else { ExchangeStep::Failed(name.clone()) };
            prop_assert_eq!(step, expected);
            prop_assert_eq!(client.finished(), right);
        }
    }
}

proptest! {
    #[test]
    fn no_octets_cause_a_panic(
        messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 3),
        likely in proptest::collection::vec("[nymprsicvea=,0-9A-C]{0,40}", 3),
    ) {
        for messages in [messages, likely.iter().map(|text| text.clone().into_bytes()).collect()] {
            for (binding, in_exchange) in [(None, false), (Some(EXPORTER), true), (None, true)] {
                let mut server = server(binding, false);
                let mut client = client(b"pencil", ClientBinding::Unsupported);
                if in_exchange {
                    server.respond(CLIENT_FIRST.as_bytes(), find);
                    client.initial();
                }
                for message in &messages {
                    prop_assert!(!matches!(server.respond(message, find), ExchangeStep::Done(_)));
                    client.step(message);
                    prop_assert!(!client.finished());
                }
            }
        }
        for text in likely {
            let _ = ScramVerifier::parse(&format!("SCRAM-SHA-256${text}"));
        }
    }
}
