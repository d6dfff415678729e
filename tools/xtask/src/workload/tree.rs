//! A tree of processes with private memory, shared anonymous memory and a memfd, written in C and
//! compiled here: no server program has all of that.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Workload;
use crate::hosts::Host;
use crate::run;

const SOURCE: &str = include_str!("tree.c");

/// How many processes it has.
const PROCESSES: usize = 4;

/// The tree; its processes write a checksum of all their memory to a file when asked by a signal.
#[derive(Debug)]
pub(crate) struct Tree {
    directory: PathBuf,
    pid: u32,
    sums: String,
}

impl Tree {
    /// Keeps program and checksums in `directory`, which both hosts see.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            pid: 0,
            sums: String::new(),
        }
    }

    /// Tells every process something by a signal and waits for all answers.
    fn ask(&self, host: &Host, signal: &str) -> Result<String> {
        let mut answers = Vec::new();
        let mut members = host.session_of(self.pid);
        members.sort_unstable();
        // In turn: they write to the same shared memory.
        for member in members {
            let file = self.directory.join(format!("answer-{member}"));
            let _ = fs::remove_file(&file);
            host.signal(member, signal)?;
            let answer = run::wait_for("the tree to answer", Duration::from_secs(10), || {
                fs::read_to_string(&file).ok()
            })?;
            answers.push(format!("{member}: {answer}"));
        }
        Ok(answers.concat())
    }
}

impl Workload for Tree {
    fn start(&mut self, host: &Host) -> Result<u32> {
        let program = self.directory.join("tree");
        compile(SOURCE, &self.directory.join("tree.c"), &program)?;
        let place = self
            .directory
            .to_str()
            .context("the scratch directory has a strange name")?;
        self.pid = host.start_workload(&program, &[place])?;
        run::wait_for("the tree to grow", Duration::from_secs(10), || {
            (host.session_of(self.pid).len() == PROCESSES).then_some(())
        })?;
        self.sums = self.ask(host, "USR2")?;
        Ok(self.pid)
    }

    fn write(&mut self, host: &Host) -> Result<()> {
        let before = self.sums.clone();
        self.ask(host, "USR1")?;
        self.sums = self.ask(host, "USR2")?;
        if self.sums == before {
            bail!("the tree did not change its memory");
        }
        Ok(())
    }

    fn check(&self, host: &Host) -> Result<usize> {
        let found = self.ask(host, "USR2")?;
        if found != self.sums {
            bail!(
                "memory of the tree differs: it was\n{}and is now\n{found}",
                self.sums
            );
        }
        Ok(found.lines().count())
    }
}

/// Writes `text` to the file `source` and compiles that.
pub(super) fn compile(text: &str, source: &Path, program: &Path) -> Result<()> {
    fs::write(source, text)?;
    // Rust programs are linked by it, so it is there.
    let mut compiler = Command::new("cc");
    run::quiet(
        compiler
            .args(["-O1", "-Wall", "-Werror", "-o"])
            .arg(program)
            .arg(source),
    )
    .map(drop)
}
