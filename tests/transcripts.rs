//! Transcripts: `testdata/<under test>/<topic>/<what it proves>.smtp`, played against the real program on loopback.
//!
//! ```text
//! # What it proves, RFC section.
//! # Rules: ODMR-22, ODMR-26.              those of `testdata/conformance.md` that it proves
//! == clear only ==                        settings, if any
//! -- provider.toml + --                   files before
//! limits.messages-per-turn = 1
//!
//! -- spool/domains/example.com/new/1 --
//! Return-Path: <lester@dot.example>
//! …
//! == turned, 1 message ==                 the dialogue, here a passage of it
//! P: MAIL FROM:<lester@dot.example>
//! C: 250 2.1.0 OK
//! …
//! == after ==                             files after
//! -- spool/domains/example.com/new/ --
//! ```
//!
//! The first directory names the program under test: `customer`, or the provider, whose relay sends to a host of the world in
//! `relay`. The runner is the other party. `C:` is the client of the first connection, the customer or another host, and `P:`
//! the provider; they keep their initials at the turn. `S:` is the server elsewhere: the provider's inbound listener, the
//! customer's next hop, or the host to which the relay, `C:` there, sends.
//!
//! # A line of dialogue
//!
//! - `X: text` is one line and its CRLF; in what is expected `{...}` is any text within the line.
//! - `X| text` is octets with `\r \n \t \0 \xHH \\`, without a CRLF of its own; `X* 1000 text` the same, a thousand times.
//! - `X: {1..100} text` is a line for each number, which is `{n}` in the text, and `{n+1}` the next one.
//! - `X!`: the runner closes without QUIT, and the program must close too; or the program must close, under TLS with
//!   close_notify.
//! - `{scram: TEXT}` is a message of SCRAM in base64 (see [`scram`]).
//! - `X. NAME, NAME` are messages, or parts of one, and the final dot; `X: {NAME}` the same without the dot.
//!
//! # Passages
//!
//! `testdata/passages.txt` has the passages that many transcripts share: the dialogue up to the turn, QUIT and its reply,
//! messages. A transcript names one in a line, `== turned, 1 message ==`, `{hello}`; [`format::expand`] says how. These
//! transcripts have every line: `customer/turn/{one-call,no-mail,rfc-2645-section-6}`, `customer/outgoing/and-turn`,
//! `customer/next-hop/lmtp-accepts-all`, `customer/exim/one-message-a-call`, `provider/turn/{bare-atrn,no-mail,
//! rfc-2645-section-6}`, `provider/delivery/{several-messages-in-one-stream,one-sent-one-rejected-one-deferred}`,
//! `provider/submission/of-two-messages`, `inbound/content/one-message`, `inbound/commands/pipelined-group` and
//! `hostile/closed-at-every-turn`. So have all parts of a dialogue that differ from a passage.
//!
//! # Events
//!
//! - `== connect inbound|odmr|odmr-tls [as NAME] ==` connects to the provider; in `customer/` the runner awaits the customer
//!   there. `== connect hop ==` awaits the customer at its next hop, and `== connect host ==` the relay. `== NAME ==` goes on
//!   with an earlier connection.
//! - `== turn ==` marks the turn. The parser checks that each party sends what its role demands.
//! - `== tls ==` shakes hands now. `== in clear ==`: what the runner sends from now on is not within TLS.
//! - `== wait 300ms ==`: the program sends nothing for that time.
//! - `== fault PATH is a file|is a directory|is gone ==`, while the program runs.
//! - `== stop ==` tells the program to stop. `== pull ok|failed ==`: how the customer's call ended; `ok` at the end of the
//!   dialogue if the transcript does not say.
//!
//! # Plays and settings
//!
//! All that the runner sends between two lines that it expects goes out in one write, so it may be a pipelined group, or octet
//! by octet. Every transcript is played four times: {whole, bytewise} × {clear, TLS}. Under TLS `connect odmr` takes the
//! implicit port, `connect host` begins with the handshake, and `connect inbound` does STARTTLS before the first line.
//!
//! - `== clear only ==`, `== tls only ==`, `== whole only ==`; `== tls ==` in the dialogue implies `clear only`.
//! - `== certificate ==`: the provider has a certificate in clear plays too; `== tls ==` and `odmr-tls` imply it.
//! - `== require tls ==`: `require-tls = true`. `== soft bounce ==`: the customer calls as `odmr pull --soft-bounce` does.
//! - `== only these calls ==`: the play fails if the customer calls again after the dialogue. Otherwise it gets 453 then.
//!
//! `== tls with NAME ==` and `== connect odmr-tls with NAME [as NAME] ==`: the TLS server must ask for a certificate, and the
//! client shows that of this name: `me`, `renewed` and `expired` have one key, `other` and `third` each another; `none`: it
//! shows none. Without `with` the program may not ask. `NAME.pem` and `NAME.key` exist if a file names the first.
//!
//! # Files
//!
//! Without files a play has those of `testdata/default`: the customer `acme`, with the secret `tanstaaftanstaaf` and the domains
//! `example.org` and `example.com`, and `beta` with `example.edu`. In each play the time is 2026-01-02T03:04:05Z, which is
//! 1767323045 in the name of a file, and ids are `id1`, `id2` and so on; `id0` is that of mail from before. In files a line with
//! `#` is text, elsewhere a comment.
//!
//! - `-- path --` and lines; `-- path | --` and octets as after `X|`.
//! - `-- customer.toml + --` and lines `table.key = value` over the file in `testdata/default`; `- table.key` and `- [table]`
//!   remove what that has. So for `provider.toml` and `customers.d/*.toml`. A whole file replaces the default, and a whole
//!   file of a customer all default customers.
//! - In `.toml` files the runner fills in `{dir}`, `{tls}`, `{listen-tls}`, `{require-tls}`, `{address}`, `{hop}`, `{host}`,
//!   `{tls-mode}` and `{ca}`, which is the line `ca = "relay.pem"` if there is a certificate, and empty otherwise.
//!   `{sha256:NAME}` and `{spki-sha256:NAME}` are the pins of a certificate.
//! - After the dialogue `-- path/ --` lists a directory exactly; without lines it is empty or does not exist. A name matches
//!   without its record of attempts too (`doc/queue.md`), so `1` matches `1,A=1`. `-- directory/2 --` is the second file in
//!   name order, and no file may come after the last one named so. `-- path is gone --`: there is no such file or directory.
//!   Control characters are shown as escapes.
//!
//! `TRANSCRIPT=provider/turn/ cargo test transcripts -- --nocapture` plays those whose name contains the word. A dialogue that
//! the program logs (`-v`) can be pasted. `tests/dialogues REVISION` shows that no dialogue differs from a revision's.

mod certificates;
mod coverage;
pub mod format;
mod play;
mod scram;
mod unchanged;

use crate::project;
use format::Transcript;
use play::Mode;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Plays at the same time. They wait for each other's bytes far more than they compute.
const PLAYERS: usize = 12;

#[test]
fn every_transcript_reads_as_written() {
    let started = Instant::now();
    let transcripts = all();
    let wanted = std::env::var("TRANSCRIPT").unwrap_or_default();
    let plays: Vec<(&Transcript, Mode)> = transcripts
        .iter()
        .filter(|transcript| transcript.name.contains(&wanted))
        .flat_map(|transcript| play::modes(transcript).map(move |mode| (transcript, mode)))
        .collect();
    assert!(!plays.is_empty(), "no transcript is called {wanted:?}");

    let panics = play::count_panics_of_the_program();
    let results = in_parallel(&plays);
    let mut failed = 0;
    for transcript in &transcripts {
        let of_this: Vec<_> =
            plays.iter().zip(&results).filter(|((played, _), _)| std::ptr::eq(*played, transcript)).collect();
        // The same difference in several plays is reported once.
        let mut failures: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for ((_, mode), failure) in of_this.iter().filter_map(|(play, result)| Some((play, result.as_deref()?))) {
            failures.entry(failure).or_default().push(mode.to_string());
        }
        let bad = failures.values().map(Vec::len).sum::<usize>();
        failed += bad;
        if bad > 0 {
            println!("FAILED {} ({bad} of {} plays)", transcript.name, of_this.len());
        } else if !wanted.is_empty() && !of_this.is_empty() {
            println!("ok     {} ({} plays)", transcript.name, of_this.len());
        }
        failures.iter().for_each(|(failure, modes)| println!("\n{failure}  in the plays: {}\n", modes.join("; ")));
    }
    println!("{} plays, {failed} failed, {:?}", plays.len(), started.elapsed());
    assert_eq!(failed, 0, "plays of {} failed", plays.len());
    assert_eq!(panics(), 0, "threads of the program panicked");
}

#[test]
fn transcripts_cover_every_code_and_every_verb_in_every_state() {
    let missing = coverage::missing(&all());
    assert!(missing.is_empty(), "no transcript has\n  {}", missing.join("\n  "));
}

/// RFC 2034 section 4: each 2xx, 4xx and 5xx begins with a status code of its class, but for the greeting and HELO/EHLO.
///
/// Rules: ESC-01, ESC-02, ODMR-D17.
#[test]
fn transcripts_demand_enhanced_codes() {
    let wrong = coverage::without_enhanced_code(&all());
    assert!(wrong.is_empty(), "no enhanced code of the reply's class:\n  {}", wrong.join("\n  "));
}

/// `tests/dialogues REVISION` runs it. `DIALOGUES` is a directory: `testdata` of the revision, and `moved`, the old path and
/// today's of each transcript.
#[test]
#[ignore = "tests/dialogues has the transcripts of a revision"]
fn transcripts_are_those_of_a_revision() {
    let before = PathBuf::from(std::env::var_os("DIALOGUES").expect("DIALOGUES=DIRECTORY"));
    let moved = std::fs::read_to_string(before.join("moved")).expect("the list of paths");
    let read = |root: &Path, name: &str| {
        let text = std::fs::read_to_string(root.join("testdata").join(format!("{name}.smtp"))).ok()?;
        Some(format::parse(name, &text).unwrap_or_else(|error| panic!("{error}")))
    };
    let (mut same, mut wrong) = (0, Vec::new());
    for line in moved.lines() {
        let (old, new) = line.split_once('\t').expect("two paths");
        let old_transcript = read(&before, old).expect("a transcript of the revision");
        let difference = match read(project::root(), new) {
            Some(new_transcript) => unchanged::difference(&old_transcript, &new_transcript),
            None => Some("is gone".into()),
        };
        match difference {
            Some(difference) => wrong.push(format!("{old} -> {new}: {difference}")),
            None => same += 1,
        }
    }
    println!(
        "{same} transcripts are those of the revision, octet for octet, {} are not; {} are here now",
        wrong.len(),
        all().len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn in_parallel(plays: &[(&Transcript, Mode)]) -> Vec<Option<String>> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(vec![None; plays.len()]);
    std::thread::scope(|scope| {
        for _ in 0..PLAYERS {
            let player = std::thread::Builder::new().name(play::PLAYER.into());
            let work = || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some((transcript, mode)) = plays.get(number) else { break };
                    let failure = play::play(transcript, *mode).err();
                    results.lock().unwrap_or_else(PoisonError::into_inner)[number] = failure;
                }
            };
            player.spawn_scoped(scope, work).expect("a thread");
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Every transcript under `testdata`, in name order.
fn all() -> Vec<Transcript> {
    let files = project::files("testdata").into_iter().filter(|path| project::has_extension(path, "smtp"));
    let parse = |path: PathBuf| {
        let name = path.strip_prefix(project::root().join("testdata")).expect("below testdata").with_extension("");
        format::parse(&name.display().to_string(), &project::read(&path))
    };
    let (good, bad): (Vec<_>, Vec<_>) = files.map(parse).partition(Result::is_ok);
    let bad: Vec<String> = bad.into_iter().filter_map(Result::err).collect();
    assert!(bad.is_empty(), "not a transcript\n{}", bad.join("\n"));
    good.into_iter().flatten().collect()
}
