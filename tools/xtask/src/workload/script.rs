//! Python programs that check their own memory all the time: nothing was made to suit them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::hosts::Host;
use crate::run;

const SOURCE: &str = include_str!("script.py");

/// One of them, running.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) pid: u32,
    /// Where it tells how it is.
    place: PathBuf,
}

impl Script {
    /// The interpreter itself, not what a version manager has in its place.
    pub(crate) fn interpreter() -> Option<PathBuf> {
        let mut command = Command::new("python3");
        let found = run::quiet(command.args(["-c", "import sys; print(sys.executable)"])).ok()?;
        Some(PathBuf::from(found.trim())).filter(|path| path.is_file())
    }

    /// Starts the program `kind`, with its files in `directory`, which both hosts see.
    pub(crate) fn start(host: &Host, kind: &str, directory: &Path) -> Result<Self> {
        let interpreter = Self::interpreter().context("no python3")?;
        let script = directory.join("script.py");
        fs::write(&script, SOURCE)?;
        let place = directory.join(kind);
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a strange name");
        let (script, told) = (text(&script)?, text(&place)?);
        let pid = host.start_workload(&interpreter, &[&script, kind, &told])?;
        let script = Self { pid, place };
        script.await_rounds(3)?;
        Ok(script)
    }

    /// Rounds that it has made; an error where it found its memory wrong.
    pub(crate) fn rounds(&self) -> Result<u64> {
        let text = fs::read_to_string(&self.place).unwrap_or_default();
        match text.strip_prefix("right ") {
            Some(rounds) => Ok(rounds.trim().parse()?),
            None if text.is_empty() => Ok(0),
            None => bail!("it found: {text}"),
        }
    }

    /// Waits until it has made `more` rounds from now on.
    pub(crate) fn await_rounds(&self, more: u64) -> Result<u64> {
        let before = self.rounds()?;
        let grown = || match self.rounds() {
            Ok(rounds) => (rounds >= before + more).then_some(Ok(rounds)),
            Err(error) => Some(Err(error)),
        };
        run::wait_for("the program to go on", Duration::from_secs(20), grown)?
    }

    /// Lets a program of the kind `ending` end.
    pub(crate) fn let_end(&self) -> Result<()> {
        Ok(fs::write(self.place.with_extension("end"), "")?)
    }
}
