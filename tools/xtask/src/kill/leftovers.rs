//! What must not be left on either host: processes, rules, cgroups, mounts, files.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::ground::Ground;
use super::journals;
use super::processes;
use super::verdict::has_address;
use crate::hosts::{Host, Side};
use crate::run;

/// How long what is about to end may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(40);

/// Where the kernel's freezers are, of either kind.
const CGROUPS: &str = "/sys/fs/cgroup";
/// How deep a fence's cgroup may lie.
const DEPTH: usize = 5;

/// What there is when nothing is left.
#[derive(Debug)]
pub(super) struct Clean {
    mounts: [BTreeSet<String>; 2],
    files: BTreeSet<PathBuf>,
}

impl Clean {
    /// What there is now, after a migration that nobody disturbed.
    pub(super) fn of(ground: &Ground) -> Result<Self> {
        Ok(Self {
            mounts: [mounts(ground, Side::A)?, mounts(ground, Side::B)?],
            files: files(ground),
        })
    }

    /// Waits until nothing is left but the workload where it is; no receiver may run.
    pub(super) fn check(&self, ground: &Ground) -> Result<()> {
        let begin = Instant::now();
        loop {
            let left = self.left(ground)?;
            if left.is_empty() {
                return Ok(());
            }
            if begin.elapsed() > GONE_WITHIN {
                bail!("left behind: {}", left.join("; "));
            }
            thread::sleep(Duration::from_millis(30));
        }
    }

    fn left(&self, ground: &Ground) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for side in [Side::A, Side::B] {
            let on = |what: String| format!("{what} on {side:?}");
            left.extend(processes_left(ground, side).into_iter().map(on));
            left.extend(rules(ground.network.host(side))?.into_iter().map(on));
            let index = usize::from(side == Side::B);
            let more = mounts(ground, side)?;
            let more = more.difference(&self.mounts[index]);
            left.extend(more.map(|mount| on(format!("mount {mount}"))));
            let journals = journals::unfinished(ground, side);
            left.extend(journals.iter().map(|journal| on(format!("{journal:?}"))));
        }
        let other = ground.at.other();
        if has_address(ground, other)? {
            left.push(format!("service address on {other:?}"));
        }
        left.extend(fences(ground));
        let more = files(ground);
        let more = more.difference(&self.files);
        left.extend(more.map(|file| format!("file {}", file.display())));
        Ok(left)
    }
}

fn processes_left(ground: &Ground, side: Side) -> Vec<String> {
    let found = processes::all(ground.network.host(side));
    let own = |process: &processes::Found| {
        side == ground.at
            && (process.session == ground.pid || process.pid == ground.pid)
            && !matches!(process.state, 'Z' | 'T' | 't')
    };
    let strange = found.iter().filter(|process| !own(process));
    // What the hooks leave running for a moment.
    let strange = strange.filter(|process| process.program() != "arping");
    strange
        .map(|process| format!("process {}", process.line()))
        .collect()
}

/// CRIU's network locks.
fn rules(host: &Host) -> Result<Vec<String>> {
    let tables = run::quiet(host.command("nft").args(["list", "tables"]))?;
    let locks = tables.lines().filter(|line| line.contains("CRIU-"));
    Ok(locks.map(str::to_owned).collect())
}

fn mounts(ground: &Ground, side: Side) -> Result<BTreeSet<String>> {
    Ok(ground.network.host(side).mounts()?.into_iter().collect())
}

/// Fences that hold processes of these hosts, or that are older than any that is in use: other runs
/// may have theirs at the same time.
fn fences(ground: &Ground) -> Vec<String> {
    let own = [Side::A, Side::B].map(|side| ground.network.host(side).pid_namespace());
    let mut found = Vec::new();
    find_fences(Path::new(CGROUPS), DEPTH, &mut found);
    found.retain(|path| {
        let pids = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        let mut namespaces = pids
            .lines()
            .map(|pid| fs::read_link(format!("/proc/{pid}/ns/pid")).ok());
        match pids.trim().is_empty() {
            true => ground.names_migration(path),
            false => namespaces.any(|namespace| own.contains(&namespace)),
        }
    });
    found
        .iter()
        .map(|path| format!("cgroup {}", path.display()))
        .collect()
}

fn find_fences(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if depth == 0 {
        return;
    }
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        if entry.file_name().to_string_lossy().contains("crxfer") {
            found.push(path.clone());
        }
        find_fences(&path, depth - 1, found);
    }
}

/// Everything below the directories of both hosts that is not an answer which is kept for a peer, by
/// its path; not what the harness itself puts there.
fn files(ground: &Ground) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for side in [Side::A, Side::B] {
        for part in ["received", "work", "state"] {
            walk(&ground.directory(side, part), &mut found);
        }
    }
    found
}

fn walk(directory: &Path, found: &mut BTreeSet<PathBuf>) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let is_journal = name.starts_with("destination-") || name.starts_with("source-");
        if is_journal && path.join("journal").exists() {
            // Looked at by what it says.
            continue;
        }
        if entry.metadata().is_ok_and(|meta| meta.is_dir()) {
            walk(&path, found);
            found.insert(path);
        } else {
            found.insert(path);
        }
    }
}

/// Copies what is small of `from`, for whoever looks at a failure: journals and logs, no memory.
pub(super) fn keep(from: &Path, to: &Path) {
    const SMALL: u64 = 4 << 20;
    let _ = fs::create_dir_all(to);
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        let (path, place) = (entry.path(), to.join(entry.file_name()));
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => keep(&path, &place),
            Ok(meta) if meta.is_file() && meta.size() <= SMALL => {
                let _ = fs::copy(&path, &place);
            }
            _ => {}
        }
    }
}
