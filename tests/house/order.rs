//! The uses between rooms, and between the files of a room.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::paths::{Names, Path, Place, names, tokens};
use super::source::Source;

/// All files, and the names in them.
pub struct Crate {
    pub sources: Vec<Source>,
    /// The names of each file, in the order of `sources`.
    pub names: Vec<Names>,
    /// The top-level modules in the order of `src/lib.rs`.
    pub rooms: Vec<String>,
    /// The file of each module, as an index of `sources`.
    files: BTreeMap<Vec<String>, usize>,
}

impl Crate {
    pub fn new(sources: Vec<Source>) -> Crate {
        let indexed = sources.iter().enumerate().filter(|(_, source)| source.room().is_some());
        let files: BTreeMap<_, _> = indexed.map(|(index, source)| (source.module.clone(), index)).collect();
        let modules = files.keys().cloned().collect();
        let names = sources.iter().map(|source| names(source, &modules)).collect();
        let lib = sources.iter().find(|source| source.path == "src/lib.rs");
        let rooms = lib.map_or(Vec::new(), |lib| rooms(&lib.product));
        Crate { sources, names, rooms, files }
    }

    /// Each file with the paths that its product code uses.
    pub fn paths(&self) -> impl Iterator<Item = (&Source, &Path)> {
        let files = self.sources.iter().zip(&self.names);
        files.flat_map(|(source, names)| names.paths.iter().map(move |path| (source, path)))
    }

    /// The same without the paths that begin with an imported name, because the import is a use already.
    pub fn uses(&self) -> impl Iterator<Item = (&Source, &Path)> {
        self.paths().filter(|(_, path)| path.place != Place::Imported)
    }

    /// The position of a room in the order.
    fn number(&self, room: &str) -> Option<usize> {
        self.rooms.iter().position(|other| other == room)
    }

    /// The uses of a room that `src/lib.rs` lists after the room that uses it.
    pub fn uses_against_the_order(&self) -> Vec<String> {
        let mut findings = Vec::new();
        for (source, path) in self.uses() {
            let Some(room) = source.room() else { continue };
            let Some(number) = self.number(room) else { continue };
            let used = path.segment(1);
            if path.segment(0) != "crate" || used == room {
                continue;
            }
            let at = source.at(path.line);
            match self.number(used) {
                Some(other) if other < number => {}
                Some(_) => findings.push(format!("{at}: {path}: {used} comes after {room}")),
                None => findings.push(format!("{at}: {path}: begin the path with crate::ROOM::")),
            }
        }
        findings
    }

    /// The circles among the files of each room.
    pub fn circles(&self) -> Vec<String> {
        let edges = self.edges();
        let mut findings = Vec::new();
        for circle in circles(&edges) {
            let room = self.sources[circle[0]].room().unwrap_or_default();
            let file = |index: usize| match &self.sources[index].module[1..] {
                [] => "mod".to_owned(),
                below => below.join("/"),
            };
            let next = |at: usize| circle[(at + 1) % circle.len()];
            let names: Vec<_> = circle.iter().chain(&circle[..1]).map(|index| file(*index)).collect();
            let lines = (0..circle.len()).map(|at| {
                let line = edges[&circle[at]][&next(at)];
                format!("\n    {}: uses {}", self.sources[circle[at]].at(line), file(next(at)))
            });
            findings.push(format!("{room}: {}{}", names.join(" → "), lines.collect::<String>()));
        }
        findings
    }

    /// For each file, the files of its room that it uses, with the line of the first use.
    fn edges(&self) -> BTreeMap<usize, BTreeMap<usize, usize>> {
        let mut edges: BTreeMap<usize, BTreeMap<usize, usize>> = BTreeMap::new();
        for (index, source) in self.sources.iter().enumerate() {
            for path in self.real_uses(index) {
                for used in self.files_of(path, 0) {
                    if used != index && self.sources[used].room() == source.room() {
                        let line = edges.entry(index).or_default().entry(used).or_insert(path.line);
                        *line = (*line).min(path.line);
                    }
                }
            }
        }
        edges
    }

    /// The paths of a file, without the names that it only re-exports from its own directory.
    fn real_uses(&self, index: usize) -> Vec<&Path> {
        let (source, names) = (&self.sources[index], &self.names[index]);
        let own = source.module.join("::");
        let re_exported = |path: &Path| {
            let below = path.place == Place::PublicUse && path.is_below(&format!("crate::{own}"));
            let name = || names.imported.iter().find(|(_, imported)| *imported == path).map(|(name, _)| name);
            below && name().is_none_or(|name| !is_used_alone(&source.product, name))
        };
        names.paths.iter().filter(|path| !re_exported(path)).collect()
    }

    /// The files that a path leads to: that of its module; or, if the module imports the name, the file that defines it.
    fn files_of(&self, path: &Path, depth: usize) -> BTreeSet<usize> {
        let Some(("crate", segments)) = path.segments.split_first().map(|(head, rest)| (head.as_str(), rest)) else {
            return BTreeSet::new();
        };
        let lengths = (1..=segments.len()).rev();
        let found =
            lengths.filter_map(|length| Some((*self.files.get(&segments[..length])?, &segments[length..]))).next();
        let Some((file, rest)) = found else { return BTreeSet::new() };
        let names = &self.names[file];
        let own: BTreeSet<usize> = [file].into();
        let follow = |path: &Path, rest: &[String]| {
            let segments = [path.segments.as_slice(), rest].concat();
            if depth < 8 { self.files_of(&Path { segments, ..path.clone() }, depth + 1) } else { BTreeSet::new() }
        };
        let of_each = |path| follow(path, &[]);
        match rest.first().map(String::as_str) {
            None => own,
            Some("*") => names.imported.values().chain(&names.globs).flat_map(of_each).chain(own).collect(),
            Some(name) => match names.imported.get(name) {
                Some(path) => follow(path, &rest[1..]),
                None => names.globs.iter().flat_map(of_each).chain(own).collect(),
            },
        }
    }
}

/// The modules that `src/lib.rs` declares, in order.
fn rooms(lib: &str) -> Vec<String> {
    let tokens = tokens(lib);
    let declared = tokens.windows(3).filter(|three| three[0].text == "mod" && three[2].text == ";");
    declared.map(|three| three[1].text.to_owned()).collect()
}

/// Whether a name occurs outside `use`, and not as part of a path, a method call or a declaration.
fn is_used_alone(code: &str, name: &str) -> bool {
    let (mut in_use, mut before) = (false, "");
    tokens(code).windows(2).any(|pair| {
        let [token, after] = pair else { return false };
        in_use = token.text == "use" || (in_use && token.text != ";");
        let part = ["::", ".", "fn", "mod"].contains(&before) || after.text == ":";
        before = token.text;
        token.text == name && !in_use && !part
    })
}

/// The shortest circle through each node. Each circle is listed once.
fn circles(edges: &BTreeMap<usize, BTreeMap<usize, usize>>) -> Vec<Vec<usize>> {
    let (mut circles, mut seen) = (Vec::new(), BTreeSet::new());
    for node in edges.keys() {
        if let Some(circle) = shortest_circle(edges, *node)
            && seen.insert(circle.iter().copied().collect::<BTreeSet<_>>())
        {
            circles.push(circle);
        }
    }
    circles
}

fn shortest_circle(edges: &BTreeMap<usize, BTreeMap<usize, usize>>, start: usize) -> Option<Vec<usize>> {
    let (mut came_from, mut waiting) = (BTreeMap::new(), VecDeque::from([start]));
    while let Some(node) = waiting.pop_front() {
        for next in edges.get(&node).into_iter().flat_map(BTreeMap::keys) {
            if *next == start {
                let mut circle = vec![node];
                while let Some(previous) = came_from.get(&circle[circle.len() - 1]) {
                    circle.push(*previous);
                }
                circle.reverse();
                return Some(circle);
            }
            if !came_from.contains_key(next) {
                came_from.insert(*next, node);
                waiting.push_back(*next);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Crate {
        Crate::new(files.iter().map(|(path, text)| Source::new(path, text)).collect())
    }

    #[test]
    fn a_use_of_a_later_room_is_found() {
        let lib = (
            "src/lib.rs",
            "pub mod ids;
// pub mod sasl;
pub mod queue;
pub mod turn;
",
        );
        let found = |path, text| {
            of(&[lib, (path, text)]).uses_against_the_order().join(
                "
",
            )
        };
        assert_eq!(
            found(
                "src/queue/mod.rs",
                "use crate::{ids, queue::x};
use std::io;"
            ),
            ""
        );
        assert_eq!(found("src/main.rs", "use odmr::turn;"), "");
        assert!(
            found(
                "src/queue/mod.rs",
                "use crate::{ids,
  turn::Turn};"
            )
            .starts_with("src/queue/mod.rs:2: crate::turn::Turn")
        );
        assert!(
            found("src/ids.rs", "fn f(a: super::queue::Queue) {}").starts_with("src/ids.rs:1: crate::queue::Queue")
        );
        assert!(found("src/turn.rs", "use crate as all;").contains("crate::ROOM"));
        assert!(found("src/turn.rs", "use super::*;").contains("crate::ROOM"));
    }

    #[test]
    fn circles_of_files_are_found() {
        for (files, expected) in [
            // A child may use its parent, and the parent may re-export the child's names.
            (
                vec![
                    (
                        "src/a/mod.rs",
                        "mod b;
pub use b::B;",
                    ),
                    ("src/a/b.rs", "use super::A;"),
                ],
                "",
            ),
            (vec![("src/a/mod.rs", "use b::B;"), ("src/a/b.rs", "use super::A;")], "a: b → mod → b"),
            (
                vec![
                    (
                        "src/a/mod.rs",
                        "pub use b::B;
struct A(B);",
                    ),
                    ("src/a/b.rs", "use super::A;"),
                ],
                "a: b → mod → b",
            ),
            (vec![("src/a/mod.rs", "fn f() { b::g() }"), ("src/a/b.rs", "fn g() { crate::a::h() }")], "a: b → mod → b"),
            (vec![("src/a/b.rs", "use super::c;"), ("src/a/c.rs", "use super::d::D;"), ("src/a/d.rs", "")], ""),
            (
                vec![
                    ("src/a/b.rs", "use super::c;"),
                    ("src/a/c.rs", "use crate::a::{d::D};"),
                    ("src/a/d.rs", "use super::b;"),
                ],
                "a: b → c → d → b",
            ),
            // A name that the parent re-exports belongs to its child.
            (
                vec![
                    ("src/a/mod.rs", "pub use b::B;"),
                    ("src/a/b.rs", "use super::c::C;"),
                    ("src/a/c.rs", "use super::B;"),
                ],
                "a: b → c → b",
            ),
            (
                vec![
                    ("src/a/mod.rs", "pub use b::*;"),
                    ("src/a/b.rs", "use super::c::C;"),
                    ("src/a/c.rs", "use super::B;"),
                ],
                "a: b → c → b",
            ),
            // Files in subdirectories of a room belong to the room.
            (
                vec![
                    ("src/a/d/mod.rs", "use e::E;"),
                    ("src/a/d/e.rs", "use crate::a::b::B;"),
                    ("src/a/b.rs", "use super::d::D;"),
                ],
                "a: b → d → d/e → b",
            ),
            // Tests may use any module.
            (
                vec![
                    (
                        "src/a/b.rs",
                        "#[cfg(test)]
mod tests { use crate::a::c; }",
                    ),
                    ("src/a/c.rs", "use super::b;"),
                ],
                "",
            ),
        ] {
            let mut all = vec![("src/a/mod.rs", "")];
            all.retain(|(path, _)| files.iter().all(|(other, _)| other != path));
            all.extend(&files);
            all.sort_unstable();
            let found = of(&all).circles();
            let first_lines: Vec<_> = found.iter().filter_map(|finding| finding.lines().next()).collect();
            assert_eq!(first_lines.join(", "), expected, "{files:?}");
        }
    }
}
