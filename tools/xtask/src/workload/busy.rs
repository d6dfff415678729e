//! A tree of processes that rewrites its memory all the time and checks it itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::tree::compile;
use crate::hosts::Host;
use crate::run;

const SOURCE: &str = include_str!("busy.c");

/// How many processes it always has; children of a moment come on top.
const PROCESSES: usize = 4;

/// The tree.
#[derive(Debug)]
pub(crate) struct BusyTree {
    directory: PathBuf,
    /// The processes that stay.
    members: Vec<u32>,
}

/// What the tree found in its own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) pages: u64,
    /// How far the slowest process has come since it began.
    pub(crate) rounds: u64,
}

impl BusyTree {
    /// Starts it on `host`, with its files in `directory`, which both hosts see.
    pub(crate) fn start(host: &Host, directory: PathBuf) -> Result<Self> {
        let program = directory.join("busy");
        compile(SOURCE, &directory.join("busy.c"), &program)?;
        let place = directory
            .to_str()
            .context("the scratch directory has a strange name")?;
        let pid = host.start_workload(&program, &[place])?;
        let mut tree = Self {
            directory,
            members: vec![pid],
        };
        run::wait_for("the tree to grow", Duration::from_secs(5), || {
            let members = host.session_of(pid);
            (members.len() >= PROCESSES).then_some(())
        })?;
        // The children of a moment have the highest pids: these four are forked first.
        tree.members = host.session_of(pid);
        tree.members.sort_unstable();
        tree.members.truncate(PROCESSES);
        tree.check(host)?;
        Ok(tree)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.members[0]
    }

    /// Has every process check its memory.
    pub(crate) fn check(&self, host: &Host) -> Result<Checked> {
        let mut checked = Checked {
            pages: 0,
            rounds: u64::MAX,
        };
        for &member in &self.members {
            let file = self.directory.join(format!("busy-{member}"));
            let _ = fs::remove_file(&file);
            host.signal(member, "USR2")
                .with_context(|| format!("process {member} of the tree is gone"))?;
            let answer = run::wait_for("the tree to answer", Duration::from_secs(10), || {
                fs::read_to_string(&file).ok()
            })?;
            let words: Vec<&str> = answer.split_whitespace().collect();
            let ["right", pages, rounds] = words[..] else {
                bail!("process {member} of the tree has {answer}");
            };
            checked.pages += pages.parse::<u64>()?;
            checked.rounds = checked.rounds.min(rounds.parse()?);
        }
        ensure!(checked.pages > 0, "the tree checked nothing");
        Ok(checked)
    }

    /// Fails if a process of it is on `host`.
    pub(crate) fn ensure_gone(&self, host: &Host) -> Result<()> {
        let left: Vec<&u32> = self
            .members
            .iter()
            .filter(|member| {
                host.file(Path::new(&format!("/proc/{member}/stat")))
                    .exists()
            })
            .collect();
        ensure!(left.is_empty(), "processes {left:?} of the tree are left");
        Ok(())
    }
}
