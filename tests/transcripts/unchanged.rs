//! Whether transcripts are what they were at another revision, when all their shorthands are expanded.

use super::format::{DEFAULTS, File, Transcript, shown};
use std::collections::BTreeSet;

/// What differs between a transcript and the one that it was, in words; nothing if it is unchanged. Steps, settings and files
/// are compared octet for octet. Of the configuration, today's may have keys of the default file besides.
pub fn difference(before: &Transcript, now: &Transcript) -> Option<String> {
    if before.settings != now.settings {
        return Some(format!("settings\n{:?}\n{:?}", before.settings, now.settings));
    }
    let steps = before.steps.iter().map(Some).chain(std::iter::repeat(None));
    let steps_now = now.steps.iter().map(Some).chain(std::iter::repeat(None));
    for (step, step_now) in steps.zip(steps_now).take(before.steps.len().max(now.steps.len())) {
        let [action, action_now] = [step, step_now].map(|step| step.map(|step| &step.action));
        if action != action_now {
            let line = step_now.map_or(0, |step| step.line);
            return Some(format!("line {line}\n{action:?}\n{action_now:?}"));
        }
    }
    let (kept, written) = (files(&before.before), files(&now.before));
    if kept != written || files(&before.after) != files(&now.after) {
        let [old, new] = [(kept, before), (written, now)].map(|(mut files, transcript)| {
            files.extend(self::files(&transcript.after));
            files
        });
        let lost: Vec<_> = old.iter().filter(|file| !new.contains(file)).collect();
        let added: Vec<_> = new.iter().filter(|file| !old.contains(file)).collect();
        return Some(format!("files\n{lost:?}\n{added:?}"));
    }
    let [old, new] = [before, now].map(configuration);
    let defaults: BTreeSet<String> = DEFAULTS.iter().flat_map(|(path, text)| keys(path, text)).collect();
    let lost: Vec<_> = old.difference(&new).collect();
    let added: Vec<_> = new.difference(&old).filter(|key| !defaults.contains(*key)).collect();
    (!lost.is_empty() || !added.is_empty()).then(|| format!("configuration\n{lost:?}\n{added:?}"))
}

/// The files but for the configuration.
fn files(files: &[File]) -> Vec<(&str, String)> {
    let files = files.iter().filter(|file| !is_configuration(&file.path));
    files.map(|file| (file.path.as_str(), shown(&file.content()))).collect()
}

fn is_configuration(path: &str) -> bool {
    DEFAULTS.iter().any(|(default, _)| *default == path)
}

/// The keys of the configuration that a play has, as `play` writes it.
fn configuration(transcript: &Transcript) -> BTreeSet<String> {
    let is_own = |file: &&File| file.path.starts_with("customers.d/") && !file.overlay;
    let own_customers = transcript.before.iter().any(|file| is_own(&file));
    let of_customer = transcript.name.starts_with("customer/");
    let mut found = BTreeSet::new();
    for (path, text) in DEFAULTS.iter().filter(|(path, _)| (*path == "customer.toml") == of_customer) {
        match transcript.before.iter().find(|file| file.path == *path) {
            Some(file) => found.extend(keys(path, &file.text)),
            None if path.starts_with("customers.d/") && own_customers => {}
            None => found.extend(keys(path, text)),
        }
    }
    found
}

/// Each line of a configuration with its file and its table.
fn keys(path: &str, text: &str) -> Vec<String> {
    let (mut table, mut tables, mut keys) = (String::new(), 0, Vec::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        if line.starts_with("[[") {
            tables += 1;
            table = format!("{line} {tables}");
        } else if line.starts_with('[') {
            table = line.to_owned();
        } else {
            keys.push(format!("{path} {table} {}", line.replace("{require-tls}", "false")));
        }
    }
    keys
}
