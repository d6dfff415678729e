//! Scratch directories that go away with this process, however it ends.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{fs, io, thread};

use anyhow::{Context, Result};

use crate::run;

/// A directory of its own, removed when dropped; after ctrl-C or a kill a guard process removes it.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    guard: Child,
}

impl Scratch {
    /// A new directory whose name tells what it is for.
    pub(crate) fn new(purpose: &str) -> Result<Self> {
        Self::within(&std::env::temp_dir(), purpose)
    }

    /// The same in `parent`.
    pub(crate) fn within(parent: &Path, purpose: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("crxfer-{purpose}-{}-{number}", std::process::id());
        let path = parent.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let guard = Command::new(run::own_program()?)
            .arg("guard")
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start the guard of a scratch directory")?;
        Ok(Self { path, guard })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A new empty directory inside.
    pub(crate) fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        // Nothing can be done about a guard that fails; the directory then stays for the user.
        let _ = self.guard.wait();
    }
}

/// The guard process: waits until the other end of its standard input is closed, which the kernel
/// does even for a killed process, then removes the directories.
pub(crate) fn guard(directories: &[PathBuf]) -> Result<()> {
    let _ = io::stdin().read_to_end(&mut Vec::new());
    for directory in directories {
        // Programs of a killed run may write for a moment longer.
        for _ in 0..50 {
            match fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    thread::sleep(Duration::from_millis(100));
                }
                _ => break,
            }
        }
    }
    Ok(())
}

/// A new directory for a unit test, which has no guard: the test program is no xtask.
#[cfg(test)]
pub(crate) fn for_tests(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("crxfer-unit-{name}-{}", std::process::id()));
    fs::create_dir_all(&path).expect("a scratch directory");
    path
}
