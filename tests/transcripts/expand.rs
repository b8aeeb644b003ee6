//! The shorthands of transcripts, text into lines. `testdata/passages.txt` has the passages that they name.

const PASSAGES: &str = include_str!("../../testdata/passages.txt");

/// The lines of a transcript in full, each with the number of the line that it was made of. `directory` is the first of
/// its path. A customer's transcript without `== pull … ==` ends with `== pull ok ==`.
///
/// # Errors
///
/// The number of a line and what is wrong there: a passage that does not exist, or arguments that it does not have.
pub fn expand(directory: &str, text: &str) -> Result<Vec<(usize, String)>, (usize, String)> {
    let mut lines = Vec::new();
    let mut in_octets = false;
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        in_octets = if line.starts_with("-- ") { line.ends_with(" | --") } else { in_octets && !is_event(line) };
        let expanded =
            if in_octets || line.starts_with('#') { Ok(vec![line.to_owned()]) } else { expand_line(directory, line) };
        lines.extend(expanded.map_err(|what| (number, what))?.into_iter().map(|line| (number, line)));
    }
    if directory == "customer" && !lines.iter().any(|(_, line)| line.starts_with("== pull ")) {
        let after = lines.iter().position(|(_, line)| line == "== after ==").unwrap_or(lines.len());
        let number = after.checked_sub(1).map_or(1, |last| lines[last].0);
        lines.insert(after, (number, "== pull ok ==".into()));
    }
    Ok(lines)
}

fn is_event(line: &str) -> bool {
    line.starts_with("== ") && line.ends_with(" ==")
}

fn expand_line(directory: &str, line: &str) -> Result<Vec<String>, String> {
    if is_event(line) {
        let event = &line[3..line.len() - 3];
        return Ok(passage(directory, event)?.unwrap_or_else(|| vec![line.to_owned()]));
    }
    // Of a dialogue, `C: `, or of a file.
    let (party, rest) = match line.as_bytes() {
        [b'C' | b'P' | b'S', b':' | b'.', b' ', ..] => (&line[..1], &line[3..]),
        _ => ("", line),
    };
    let ends_content = !party.is_empty() && line.as_bytes()[1] == b'.';
    let mut lines = match rest.strip_prefix('{').and_then(|rest| rest.split_once("} ")) {
        _ if ends_content => messages(directory, rest)?,
        Some((range, pattern)) if is_number(range) => counted(range, pattern)?,
        None if rest.strip_prefix('{').is_some_and(is_number) => {
            return Err(format!("a range, a space and the text, such as {{1..100}} text: {rest}"));
        }
        _ => match rest.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            Some(names) if !is_text(names) => messages(directory, names)?,
            _ => return Ok(vec![line.to_owned()]),
        },
    };
    if ends_content {
        lines.push(".".into());
    }
    if !party.is_empty() {
        for line in &mut lines {
            *line = if line.is_empty() { format!("{party}:") } else { format!("{party}: {line}") };
        }
    }
    Ok(lines)
}

fn is_number(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_digit())
}

/// Whether the runner fills in what is written so, in braces (see `play`).
fn is_text(braced: &str) -> bool {
    matches!(braced, "..." | "ca" | "tls") || braced.starts_with("scram: ") || braced.starts_with("...}")
}

/// The lines of the messages and parts of messages `NAME, NAME`.
fn messages(directory: &str, names: &str) -> Result<Vec<String>, String> {
    let mut lines = Vec::new();
    for name in names.split(", ") {
        let found = passage(directory, &format!("{{{name}}}"))?;
        lines.extend(found.ok_or_else(|| format!("no passage {{{name}}} in testdata/passages.txt"))?);
    }
    Ok(lines)
}

/// A line for each number of `1..100`, in which `{n}` and `{n+1}` are the number and the next one.
fn counted(range: &str, pattern: &str) -> Result<Vec<String>, String> {
    let (first, last) = range.split_once("..").ok_or("a range such as 1..100")?;
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("not a range such as 1..100: {range}"));
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("a range without a number: {range}"));
    }
    let line = |n: u32| pattern.replace("{n}", &n.to_string()).replace("{n+1}", &(n + 1).to_string());
    Ok((first..=last).map(line).collect())
}

/// The lines of the passage `NAME [as CONNECTION] [: EXTENSION, …]`, if there is one.
fn passage(directory: &str, event: &str) -> Result<Option<Vec<String>>, String> {
    let (event, extensions) = match event.split_once(": ") {
        Some((event, extensions)) => (event, Some(extensions)),
        None => (event, None),
    };
    let (name, connection) = match event.rsplit_once(" as ") {
        Some((name, connection)) if !event.ends_with('}') => (name, Some(connection)),
        _ => (event, None),
    };
    let Some((pattern, body)) = find(directory, name) else { return Ok(None) };
    let (mut listed, mut lines) = (extensions.is_none(), Vec::new());
    for line in body {
        if let Some((reply, default)) = line.strip_suffix(']').and_then(|line| line.split_once(" [")) {
            listed = true;
            lines.extend(multi_line(reply, extensions.unwrap_or(default)));
        } else {
            lines.extend(expand_line(directory, &line)?);
        }
    }
    if let Some(connection) = connection {
        let connect = lines.iter_mut().find(|line| line.starts_with("== connect "));
        let connect =
            connect.ok_or_else(|| format!("the passage {pattern:?} opens no connection, so it takes no name"))?;
        connect.insert_str(connect.len() - 3, &format!(" as {connection}"));
    }
    if !listed {
        return Err(format!("the passage {pattern:?} has no EHLO reply, so it takes no extensions"));
    }
    Ok(Some(lines))
}

/// The passage of a name: its header, and its lines with their holes filled. The longest header fits best,
/// and one without a hole before others.
fn find(directory: &str, name: &str) -> Option<(&'static str, Vec<String>)> {
    let side = if directory == "customer" { "customer: " } else { "provider: " };
    let headers = || PASSAGES.lines().enumerate().filter_map(|(at, line)| Some((at, line.strip_prefix(side)?)));
    let exact = headers().find(|(_, header)| *header == name).map(|(at, header)| (at, header, None));
    let fitting = headers().filter_map(|(at, header)| Some((at, header, Some(filled(header, name)?))));
    let (at, header, hole) = exact.or_else(|| fitting.max_by_key(|(_, header, _)| header.len()))?;
    let body = PASSAGES.lines().skip(at + 1).take_while(|line| line.is_empty() || line.starts_with("    "));
    let mut lines: Vec<String> = body
        .map(|line| line.strip_prefix("    ").unwrap_or(line))
        .map(|line| hole.map_or_else(|| line.to_owned(), |(hole, text)| line.replace(hole, text)))
        .collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    Some((header, lines))
}

/// The hole of a header, with what a name has in its place.
fn filled<'a>(header: &'a str, name: &'a str) -> Option<(&'a str, &'a str)> {
    // The braces around the name of a message are no hole.
    let begin = header[1..].find('{')? + 1;
    let end = begin + header[begin..].find('}')? + 1;
    let text = name.strip_prefix(&header[..begin])?.strip_suffix(&header[end..])?;
    (!text.is_empty()).then_some((&header[begin..end], text))
}

/// `C: 250 host` with extensions `A, B`: `C: 250-host`, `C: 250-A`, `C: 250 B`.
fn multi_line(reply: &str, extensions: &str) -> Vec<String> {
    let (code, host) = reply.split_at(6);
    let extensions = extensions.split(", ").filter(|extension| !matches!(*extension, "" | "none"));
    let mut lines: Vec<String> =
        std::iter::once(&host[1..]).chain(extensions).map(|text| format!("{code}-{text}")).collect();
    if let Some(last) = lines.last_mut() {
        last.replace_range(6..7, " ");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::expand;

    /// A transcript for the customer ends with `== pull ok ==`.
    fn check(directory: &str, text: &str, expected: &str) {
        let expected = if directory == "customer" { format!("{expected}== pull ok ==\n") } else { expected.to_owned() };
        let lines =
            expand(directory, text).map(|lines| lines.into_iter().map(|(_, line)| line + "\n").collect::<String>());
        assert_eq!(lines, Ok(expected), "{text}");
    }

    #[test]
    fn a_passage_is_named_in_one_line() {
        check("customer", "== provider quits ==", "P: QUIT\nC: 221 2.0.0 mail.example.org closing connection\nC!\n");
        check(
            "customer",
            "== connect hop, LHLO as second: SIZE, DSN ==",
            "== connect hop as second ==\nS: 220 hop.example.org ready\nC: LHLO mail.example.org\nS: 250-hop.example.org\n\
             S: 250-SIZE\nS: 250 DSN\n",
        );
        let reply = |host, what| {
            format!(
                "== turn ==\nC: 220 mail.example.org ready to receive email\nP: EHLO relay.example.net\n{host}\n{what}"
            )
        };
        check("provider", "== turn, EHLO: none ==", &reply("C: 250 mail.example.org", ""));
        check("inbound", "== turn, EHLO: SIZE 5 ==", &reply("C: 250-mail.example.org", "C: 250 SIZE 5\n"));
        let turned = super::expand("customer", "== turned as second ==").expect("a passage");
        assert_eq!((turned.len(), turned[0].1.as_str()), (25, "== connect odmr as second =="));
        check("provider", "== turn ==\n== wait 5ms ==", "== turn ==\n== wait 5ms ==\n");
    }

    #[test]
    fn lines_of_messages() {
        check("customer", "P. hello", "P: Subject: hello\nP:\nP: Hello.\nP: .\n");
        check("inbound", "C: {hello}", "C: Subject: hello\nC:\nC: Hello.\n");
        let received = "Received: from relay.example.net ([127.0.0.1])\n\tby mail.example.org with ESMTP{...}\n\tid id1 for <a@b>;\n\tFri, 02 Jan 2026 03:04:05 +0000\n";
        check(
            "customer",
            "-- a --\n{received id1 for <a@b>, hello}\n{ca}\n{...}",
            &format!("-- a --\n{received}Subject: hello\n\nHello.\n{{ca}}\n{{...}}\n"),
        );
        check("customer", "-- a | --\n{hello}\n", "-- a | --\n{hello}\n");
        check("customer", "C: {scram: n,,n=a}", "C: {scram: n,,n=a}\n");
    }

    #[test]
    fn counted_lines() {
        check("inbound", "C: {1..2} RCPT TO:<user{n}@a>", "C: RCPT TO:<user1@a>\nC: RCPT TO:<user2@a>\n");
        check("inbound", "{9..10} from h{n} by h{n+1}", "from h9 by h10\nfrom h10 by h11\n");
    }

    #[test]
    fn what_does_not_exist_is_an_error() {
        for text in [
            "P. nothing",
            "{no such message}",
            "== provider quits as second ==",
            "== provider quits: DSN ==",
            "{1..x} a",
            "{2..1} a",
            "P: {1..2}NOOP",
        ] {
            assert_eq!(expand("customer", text).map_err(|(line, _)| line), Err(1), "{text}");
        }
    }
}
