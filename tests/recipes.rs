//! `dist/README.md` lists every recipe, and how it was tried.

use std::fs;

use crate::project::{code_spans, files, read, root};

/// The rows of the tables: recipes, and how they were tried.
fn rows(readme: &str) -> Vec<(Vec<&str>, &str)> {
    let rows = readme.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let columns: Vec<_> = row.split(" | ").collect();
        let names = columns[0].split('`').step_by(2).filter(|name| !name.is_empty()).collect();
        (names, columns[2])
    })
    .collect()
}

#[test]
fn each_recipe_is_listed() {
    let readme = read("dist/README.md");
    let names: Vec<_> = rows(&readme).into_iter().flat_map(|(names, _)| names).collect();
    let files = files("dist");
    for file in files {
        let path = file.strip_prefix(root().join("dist")).unwrap().to_str().unwrap();
        // A name that ends in a slash is a directory with all of its files.
        let listed = names.iter().any(|name| path == *name || name.ends_with('/') && path.starts_with(name));
        assert!(listed, "dist/README.md does not list {path}, and how it was tried");
    }
}

#[test]
fn each_recipe_names_the_scenario_that_tries_it_or_how_it_was_checked() {
    let readme = read("dist/README.md");
    let scripts = files("tests/interop");
    let scenarios: String = scripts.iter().filter_map(|script| fs::read_to_string(script).ok()).collect();
    for (names, how) in rows(&readme) {
        let word = how.split([' ', ':', '`']).find(|word| !word.is_empty()).unwrap();
        assert!(["tried", "linted", "read"].contains(&word) || word.starts_with("tests/"), "{names:?}: {how}");
        for scenario in code_spans(how).filter(|name| !name.contains(['.', '/', ' '])) {
            let known = scenarios.contains(&format!("@scenario(\"{scenario}\""));
            assert!(known, "{names:?}: there is no scenario {scenario}");
        }
    }
}

/// `make install` and the package replace only this path of the program.
#[test]
fn recipes_name_the_program_by_one_path() {
    let files = files("dist");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for line in text.lines().filter(|line| line.contains("bin/odmr ") || line.ends_with("bin/odmr")) {
            assert!(line.contains("/usr/local/bin/odmr"), "{}: {line}", file.display());
        }
    }
}
