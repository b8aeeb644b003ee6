//! README and `doc/`: README is short, each link leads somewhere, and its nine core files are those of `src/lib.rs`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::project::{files, has_extension, read, root};

const MOST_LINES: usize = 200;

#[test]
fn readme_has_at_most_200_lines() {
    let lines = read("README.md").lines().count();
    assert!(lines <= MOST_LINES, "README.md has {lines} lines: move some to doc/");
}

/// README and the documents that it leads to.
fn documents() -> Vec<PathBuf> {
    let mut documents: Vec<_> = files("doc").into_iter().filter(|path| has_extension(path, "md")).collect();
    documents.extend(
        ["README.md", "dist/README.md", "dist/postfix/README.md", "fuzz/README.md"].map(|path| root().join(path)),
    );
    documents
}

/// The lines of a document that are not in a block of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        let fence = line.starts_with("```");
        fenced ^= fence;
        !fenced && !fence && !line.starts_with("    ")
    })
}

/// The anchors of the headings, as GitHub makes them: lower case, hyphens for spaces, no punctuation.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for heading in prose(text).filter(|line| line.starts_with('#')) {
        let title = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        let anchor: String = title.chars().filter(|one| one.is_alphanumeric() || matches!(one, '-' | '_')).collect();
        let number = (1..).map(|number| format!("{anchor}-{number}")).find(|name| !anchors.contains(name)).unwrap();
        let anchor = if anchors.contains(&anchor) { number } else { anchor };
        anchors.insert(anchor);
    }
    anchors
}

#[test]
fn each_link_leads_to_a_file_and_a_heading_that_exist() {
    let mut wrong = Vec::new();
    let mut links = 0;
    for document in documents() {
        let text = read(&document);
        for rest in prose(&text).flat_map(|line| line.split("](").skip(1)) {
            let link = rest.split(')').next().unwrap();
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { document.clone() } else { document.with_file_name(path) };
            let is_there = target.exists() && (anchor.is_empty() || anchors(&read(&target)).contains(anchor));
            if !is_there {
                wrong.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "links that lead nowhere:\n{}", wrong.join("\n"));
    assert!(links > 50, "only {links} links were found");
}

#[test]
fn the_core_files_of_readme_are_those_of_the_crate_in_the_same_order() {
    let readme = read("README.md");
    let rows = readme.lines().filter_map(|line| line.strip_prefix("| [`")?.split_once("`](src/"));
    let rows: Vec<_> = rows.map(|(name, rest)| (name, rest.split(')').next().unwrap())).collect();
    for (name, file) in &rows {
        assert!(
            [format!("{name}.rs"), format!("{name}/mod.rs")].contains(&(*file).to_owned()),
            "{name} leads to {file}"
        );
    }
    let names: Vec<_> = rows.iter().map(|(name, _)| (*name).to_owned()).collect();
    let library = read("src/lib.rs");
    let numbered = library.lines().filter_map(|line| line.strip_prefix("//! ")?.split_once(". [`"));
    let numbered = numbered.filter(|(number, _)| number.parse::<u32>().is_ok());
    let core: Vec<_> = numbered
        .map(|(_, rest)| rest.split('`').next().unwrap().trim_start_matches("mod@").replace("::", "/"))
        .collect();
    assert_eq!((names.len(), names), (9, core));
}
