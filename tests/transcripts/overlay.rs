//! Lines of a transcript laid over a configuration file: `-- customer.toml + --`.

/// The text of a configuration with the lines of an overlay: `table.key = value` replaces the key or adds it, and the table
/// if need be; `- table.key` removes a key, `- [table]` a table. Each key of the file and its value are in one line.
///
/// # Errors
///
/// The index of a line and what is wrong there: a key or a table to remove that the file does not have, or no `key = value`.
pub fn laid_over(text: &str, overlay: &str) -> Result<String, (usize, String)> {
    let mut tables = vec![("", Vec::new())];
    for line in text.lines().filter(|line| !line.is_empty()) {
        match (line.strip_prefix('[').and_then(|line| line.strip_suffix(']')), tables.last_mut()) {
            (None, Some((_, lines))) => lines.push(line),
            (name, _) => tables.push((name.unwrap_or_default(), Vec::new())),
        }
    }
    for (index, line) in overlay.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        if let Some(name) = line.strip_prefix("- [").and_then(|line| line.strip_suffix(']')) {
            let position = tables.iter().position(|(other, _)| *other == name);
            tables.remove(position.ok_or_else(|| (index, format!("no table [{name}] to remove")))?);
            continue;
        }
        let removed = line.strip_prefix("- ");
        // `{ca}` is a line that the runner fills in.
        if removed.is_none() && !line.contains(" = ") && !line.ends_with('}') {
            return Err((index, format!("neither `key = value` nor `- key`: {line}")));
        }
        let (name, line) = split(removed.unwrap_or(line));
        let table = match tables.iter().position(|(other, _)| *other == name) {
            Some(position) => position,
            None => {
                tables.push((name, Vec::new()));
                tables.len() - 1
            }
        };
        let lines = &mut tables[table].1;
        match (lines.iter().position(|other| key(other) == key(line)), removed) {
            (Some(position), Some(_)) => drop(lines.remove(position)),
            (Some(position), None) => lines[position] = line,
            (None, Some(key)) => return Err((index, format!("no key {key} to remove"))),
            (None, None) => lines.push(line),
        }
    }
    let mut merged = String::new();
    for (name, lines) in tables {
        if !name.is_empty() {
            merged += &format!("[{name}]\n");
        }
        lines.into_iter().for_each(|line| merged += &format!("{line}\n"));
    }
    Ok(merged)
}

/// `table.key = value` taken apart at the last dot of the key, which is not one within quotation marks.
fn split(line: &str) -> (&str, &str) {
    let path = line.split(" = ").next().unwrap_or(line).split('"').next().unwrap_or(line);
    path.rfind('.').map_or(("", line), |dot| (&line[..dot], &line[dot + 1..]))
}

fn key(line: &str) -> &str {
    line.split(" = ").next().unwrap_or(line)
}

#[test]
fn an_overlay_replaces_adds_and_removes() {
    let file = "a = 1\n{ca}\nb = 2\n\n[t]\nc = 3\n\n[u]\nd = 4\n";
    let check = |overlay, expected: Result<&str, (usize, &str)>| {
        let expected = expected.map(str::to_owned).map_err(|(index, what)| (index, what.to_owned()));
        assert_eq!(laid_over(file, overlay), expected, "{overlay}");
    };
    check("a = 5\nu.e = 6.1", Ok("a = 5\n{ca}\nb = 2\n[t]\nc = 3\n[u]\nd = 4\ne = 6.1\n"));
    check("- {ca}\n- b\n- [t]\nv.f.\"a.b\" = \"x\"\nu.d = 5", Ok("a = 1\n[u]\nd = 5\n[v.f]\n\"a.b\" = \"x\"\n"));
    check("a = 5\n- t.g", Err((1, "no key t.g to remove")));
    check("- [g]", Err((0, "no table [g] to remove")));
    check("a: 5", Err((0, "neither `key = value` nor `- key`: a: 5")));
}
