//! Whether a set of images is all that a restore needs.
//!
//! CRIU checks little before it restores. With a parent missing or a pages file too short it does
//! not fail but spins for ever, so a set is judged here before it is offered for restore. The
//! judgement is a pure function over sizes and pagemaps, because a destination asks it about a set
//! that it has not written yet.

use std::collections::BTreeMap;
use std::fmt;

use super::error::ImageError;
use super::inventory::Inventory;
use super::name::{FileKind, PagemapName, pages_file_name};
use super::pagemap::{PageFlags, Pagemap};
use super::resolve::{ResolveError, Source, resolve};
use super::tree::ProcessTree;

/// What is known about one directory of a chain.
#[derive(Clone, Copy, Debug)]
pub struct LevelFacts<'a> {
    /// Its pagemaps.
    pub pagemaps: &'a BTreeMap<PagemapName, Pagemap>,
    /// Size in bytes of its files by name: all of the newest directory, at least the pages files of
    /// the others.
    pub sizes: &'a BTreeMap<String, u64>,
}

/// What is known about a set.
#[derive(Clone, Copy, Debug)]
pub struct SetFacts<'a> {
    /// The newest directory, then its ancestors in order.
    pub levels: &'a [LevelFacts<'a>],
    /// `inventory.img` of the newest directory.
    pub inventory: Option<&'a Inventory>,
    /// `pstree.img` of the newest directory and what belongs to it.
    pub tree: Option<&'a ProcessTree>,
}

/// What can be done with a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// CRIU can restore it.
    Complete,
    /// A pre-dump: memory for a later dump to build on.
    PreDump,
    /// Memory without the rest: what a page server received.
    PagesOnly,
    /// A dump without its memory, which went to a page server.
    MissingPages,
    /// A dump with `--lazy-pages`: some memory was left at the source.
    Lazy,
    /// Stored in a way that cannot be judged; the text says which.
    Opaque(String),
    /// Something is missing or wrong. CRIU would fail on it, or hang.
    Damaged(Vec<Problem>),
}

impl Completeness {
    /// A word for records and programs.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::PreDump => "pre-dump",
            Self::PagesOnly => "pages-only",
            Self::MissingPages => "missing-pages",
            Self::Lazy => "lazy",
            Self::Opaque(_) => "opaque",
            Self::Damaged(_) => "damaged",
        }
    }

    /// Whether the set may be offered for restore.
    pub fn is_restorable(&self) -> bool {
        matches!(self, Self::Complete)
    }
}

/// One line that says what the set is; problems are separate.
impl fmt::Display for Completeness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => f.write_str("complete"),
            Self::PreDump => f.write_str("pre-dump, to be followed by a dump"),
            Self::PagesOnly => f.write_str("memory only, as a page server writes it"),
            Self::MissingPages => f.write_str("a dump without its memory (sent to a page server)"),
            Self::Lazy => f.write_str("a lazy dump, with memory left at the source"),
            Self::Opaque(reason) => write!(f, "cannot be judged: {reason}"),
            Self::Damaged(problems) => match problems.as_slice() {
                [only] => write!(f, "damaged: {only}"),
                [first, rest @ ..] => write!(f, "damaged: {first} (and {} more)", rest.len()),
                [] => f.write_str("damaged"),
            },
        }
    }
}

/// Something that keeps CRIU from restoring a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file concerned.
    pub file: String,
    /// How many parents up that file is, or should be.
    pub level: usize,
    /// What is wrong, with the place in the file.
    pub what: String,
}

impl Problem {
    fn new(file: impl fmt::Display, level: usize, what: impl Into<String>) -> Self {
        Self {
            file: file.to_string(),
            level,
            what: what.into(),
        }
    }

    /// A file of the newest directory that cannot be read.
    pub(crate) fn unreadable(error: &ImageError) -> Self {
        let text = error.to_string();
        let (file, what) = text.split_once(": ").unwrap_or(("", &text));
        Self::new(file, 0, what)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level {
            0 => write!(f, "{}: {}", self.file, self.what),
            1 => write!(f, "{} of the parent: {}", self.file, self.what),
            level => write!(
                f,
                "{} of the directory {level} parents up: {}",
                self.file, self.what
            ),
        }
    }
}

/// Judges a set.
pub fn check(facts: &SetFacts<'_>) -> Completeness {
    let Some(newest) = facts.levels.first() else {
        let what = "there is no image directory";
        return Completeness::Damaged(vec![Problem::new("inventory.img", 0, what)]);
    };
    let Memory { mut problems, lazy } = check_memory(facts.levels);
    let kind = match (facts.inventory, facts.tree) {
        (None, None) => check_rootless(newest, &mut problems),
        (Some(inventory), None) if inventory.is_pre_dump() => Completeness::PreDump,
        (inventory, tree) => {
            check_dump(newest, inventory, tree, &mut problems).unwrap_or(if lazy {
                Completeness::Lazy
            } else {
                Completeness::Complete
            })
        }
    };
    if problems.is_empty() {
        kind
    } else {
        Completeness::Damaged(problems)
    }
}

/// A directory with neither inventory nor process tree: memory only, or no image at all.
fn check_rootless(newest: &LevelFacts<'_>, problems: &mut Vec<Problem>) -> Completeness {
    let of_a_dump = |name: &String| {
        matches!(FileKind::of(name), FileKind::Core(_) | FileKind::Mm(_)) || name == "files.img"
    };
    if newest.sizes.keys().any(of_a_dump) {
        problems.push(Problem::new("inventory.img", 0, "is missing"));
        problems.push(Problem::new("pstree.img", 0, "is missing"));
    } else if newest.pagemaps.is_empty() {
        let what = "is missing, and there are no pagemaps: this is not a CRIU image directory";
        problems.push(Problem::new("inventory.img", 0, what));
    }
    Completeness::PagesOnly
}

/// A dump, or what is left of one. `Some` if nothing but all its memory is missing.
fn check_dump(
    newest: &LevelFacts<'_>,
    inventory: Option<&Inventory>,
    tree: Option<&ProcessTree>,
    problems: &mut Vec<Problem>,
) -> Option<Completeness> {
    match inventory {
        None => problems.push(Problem::new("inventory.img", 0, "is missing")),
        Some(inventory) if inventory.is_pre_dump() => {
            let what = "says that this is a pre-dump, but there is a process tree";
            problems.push(Problem::new("inventory.img", 0, what));
        }
        Some(_) => {}
    }
    let Some(tree) = tree else {
        problems.push(Problem::new("pstree.img", 0, "is missing"));
        return None;
    };
    problems.extend(missing_task_files(newest, tree));
    let missing = missing_pagemaps(newest, tree);
    if newest.pagemaps.is_empty() && !missing.is_empty() {
        return Some(Completeness::MissingPages);
    }
    problems.extend(missing);
    None
}

fn missing_task_files(newest: &LevelFacts<'_>, tree: &ProcessTree) -> Vec<Problem> {
    let mut problems = Vec::new();
    for task in &tree.tasks {
        for thread in task.core_ids() {
            let name = format!("core-{thread}.img");
            if !newest.sizes.contains_key(&name) {
                let what = format!("is missing, but process {} has that thread", task.pid);
                problems.push(Problem::new(name, 0, what));
            }
        }
        let name = format!("mm-{}.img", task.pid);
        if !task.zombie && !newest.sizes.contains_key(&name) {
            problems.push(Problem::new(
                name,
                0,
                "is missing, but the process is alive",
            ));
        }
    }
    problems
}

fn missing_pagemaps(newest: &LevelFacts<'_>, tree: &ProcessTree) -> Vec<Problem> {
    let has = |pid: u32| newest.pagemaps.contains_key(&PagemapName::Task(pid.into()));
    let shares = |vm_id: Option<u32>| {
        vm_id.is_some()
            && tree
                .tasks
                .iter()
                .any(|task| task.vm_id == vm_id && has(task.pid))
    };
    let tasks = tree
        .tasks
        .iter()
        .filter(|task| !task.zombie && !has(task.pid) && !shares(task.vm_id))
        .map(|task| {
            let what = format!(
                "is missing, but process {} is alive; CRIU would hang or fail",
                task.pid
            );
            Problem::new(PagemapName::Task(task.pid.into()), 0, what)
        });
    let segments = tree
        .segments
        .iter()
        .map(|&id| PagemapName::Shmem(id))
        .filter(|name| !newest.pagemaps.contains_key(name))
        .map(|name| Problem::new(name, 0, "is missing, but a process uses that shared memory"));
    tasks.chain(segments).collect()
}

struct Memory {
    problems: Vec<Problem>,
    /// Whether pages of the newest directory were left at the source.
    lazy: bool,
}

fn check_memory(levels: &[LevelFacts<'_>]) -> Memory {
    let mut memory = Memory {
        problems: Vec::new(),
        lazy: false,
    };
    let mut owners = BTreeMap::new();
    for (&name, pagemap) in levels[0].pagemaps {
        if let Some(other) = owners.insert(pagemap.pages_id(), name) {
            let file = pages_file_name(pagemap.pages_id());
            let what = format!("names {file}, which {other} names too");
            memory.problems.push(Problem::new(name, 0, what));
        }
        let chain: Vec<_> = levels
            .iter()
            .map_while(|level| Some((level, level.pagemaps.get(&name)?)))
            .collect();
        for (depth, (level, pagemap)) in chain.iter().enumerate() {
            memory
                .problems
                .extend(pages_file_problem(depth, level, pagemap));
            memory
                .problems
                .extend(parent_and_lazy(name, depth, pagemap));
        }
        let pagemaps: Vec<_> = chain.iter().map(|(_, pagemap)| *pagemap).collect();
        memory.check_resolution(name, &pagemaps, levels.len());
    }
    memory
}

impl Memory {
    fn check_resolution(&mut self, name: PagemapName, chain: &[&Pagemap], levels: usize) {
        let runs = match resolve(chain) {
            Ok(runs) => runs,
            Err(error) => {
                self.problems.push(unresolved(name, error, levels));
                return;
            }
        };
        for run in runs.iter().filter(|run| run.source == Source::Lazy) {
            if run.flags_at_top.is_parent() {
                let what = format!(
                    "{} pages from address {:#x} are marked as in the parent, but a lazy dump left them at the source",
                    run.pages, run.vaddr
                );
                self.problems.push(Problem::new(name, 0, what));
                return;
            }
            self.lazy = true;
        }
    }
}

fn unresolved(name: PagemapName, error: ResolveError, levels: usize) -> Problem {
    let what = match error {
        ResolveError::MissingParent {
            vaddr,
            pages,
            level,
            chain_ends: true,
        } => {
            let missing = if level == levels {
                "there is no parent directory"
            } else {
                "that directory has no such pagemap"
            };
            let child = level - 1;
            let what = format!(
                "{pages} pages from address {vaddr:#x} are marked as in the parent, but {missing}; CRIU would hang"
            );
            return Problem::new(name, if level == levels { child } else { level }, what);
        }
        other => other.to_string(),
    };
    Problem::new(name, 0, what)
}

fn pages_file_problem(depth: usize, level: &LevelFacts<'_>, pagemap: &Pagemap) -> Option<Problem> {
    let file = pages_file_name(pagemap.pages_id());
    let needed = pagemap.present_bytes();
    match level.sizes.get(&file) {
        None => Some(Problem::new(
            file,
            depth,
            format!("is missing; {needed} bytes of pages are due"),
        )),
        Some(&size) if size < needed => {
            let what = format!(
                "ends at byte {size}, but {needed} bytes of pages are due; CRIU would hang"
            );
            Some(Problem::new(file, depth, what))
        }
        Some(_) => None,
    }
}

/// CRIU's restore and its lazy-pages daemon both hang on an entry with these two flags.
fn parent_and_lazy(name: PagemapName, depth: usize, pagemap: &Pagemap) -> Option<Problem> {
    let both = PageFlags::PARENT.with(PageFlags::LAZY);
    let run = pagemap.runs().iter().find(|run| run.flags.contains(both))?;
    let what = format!(
        "the entry at address {:#x} is marked both as lazy and as in the parent; CRIU would hang",
        run.vaddr
    );
    Some(Problem::new(name, depth, what))
}

#[cfg(test)]
mod tests;
