//! CRIU itself: installing, dumping, restoring.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::hosts::Host;
use crate::run;

const INSTALL_SCRIPT: &str = include_str!("../install-criu.sh");
/// Oldest version that the tests use, and that on Linux 6.16 and later, where 4.1 cannot dump TCP sockets.
const OLDEST: (u32, u32) = (4, 1);
const OLDEST_ON_LATE_KERNELS: (u32, u32) = (4, 2);
const LATE_KERNEL: (u32, u32) = (6, 16);

/// Runs the installing script with `options`.
pub(crate) fn install(options: &[String]) -> Result<()> {
    let status = Command::new("bash")
        .args(["-c", INSTALL_SCRIPT, "install-criu.sh"])
        .args(options)
        .stdin(Stdio::null())
        .status()
        .context("cannot start bash")?;
    match status.code() {
        Some(0) => Ok(()),
        Some(3) => {
            bail!("CRIU is installed, but does not work on this kernel or in this container")
        }
        _ => bail!("CRIU could not be installed"),
    }
}

/// The criu command, installed first if there is none that is new enough. Needs root.
pub(crate) fn ensure() -> Result<Criu> {
    static LOCK: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOCK
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if !run::is_root() {
        bail!("CRIU needs root");
    }
    if let Some(criu) = Criu::find() {
        return criu.check();
    }
    let (major, minor) = OLDEST_ON_LATE_KERNELS;
    println!("installing CRIU {major}.{minor} or later from Debian");
    install(&[])?;
    Criu::find()
        .context("CRIU was installed, but is not in PATH")?
        .check()
}

/// CRIU 4.1 of Debian 13, whose formats are older, in a folder below `target`. Needs root.
pub(crate) fn ensure_older(target: &Path) -> Result<Criu> {
    let program = target.join("criu-4.1/bin/criu");
    if let Some(criu) = Criu::at(&program) {
        return criu.check();
    }
    let home = target.join("criu-4.1/home");
    let path = |path: &Path| path.display().to_string();
    let bin = path(program.parent().unwrap_or(target));
    let words = [
        "--suite",
        "trixie",
        "--min",
        "4.1",
        "--home",
        &path(&home),
        "--bin",
        &bin,
    ];
    install(&words.map(str::to_owned))?;
    Criu::at(&program)
        .context("CRIU 4.1 does not start")?
        .check()
}

/// A criu command.
#[derive(Clone, Debug)]
pub(crate) struct Criu {
    program: PathBuf,
    pub(crate) version: String,
}

impl Criu {
    fn find() -> Option<Self> {
        Self::at(&run::find_program("criu")?).filter(|criu| is_new_enough(&criu.version, &kernel()))
    }

    /// The criu command at `program`, of any version.
    pub(crate) fn at(program: &Path) -> Option<Self> {
        let text = run::quiet(Command::new(program).arg("--version")).ok()?;
        let version = text
            .lines()
            .find_map(|line| line.strip_prefix("Version: "))?;
        Some(Self {
            program: program.to_owned(),
            version: version.trim().to_owned(),
        })
    }

    fn check(self) -> Result<Self> {
        run::quiet(Command::new(&self.program).arg("check"))
            .context("CRIU does not work on this kernel or in this container")?;
        Ok(self)
    }

    /// Whether CRIU can tell the pages that were written since the last dump, so that pre-dumps work.
    pub(crate) fn tracks_writes(&self) -> bool {
        let words = ["check", "--feature", "mem_dirty_track"];
        run::quiet(Command::new(&self.program).args(words)).is_ok()
    }

    /// Writes what the running tree of `pid` has in memory to `directory`, which is created.
    pub(crate) fn pre_dump(&self, host: &Host, pid: u32, directory: &Path) -> Result<()> {
        self.pre_dump_with(host, pid, directory, &[])
    }

    /// The same with `more` options.
    pub(crate) fn pre_dump_with(
        &self,
        host: &Host,
        pid: u32,
        directory: &Path,
        more: &[&str],
    ) -> Result<()> {
        fs::create_dir_all(directory)?;
        let mut command = host.command(&self.program);
        command.args(["pre-dump", "--track-mem", "-v2", "-o", "dump.log"]);
        command.args(["-t", &pid.to_string(), "-D"]).arg(directory);
        command.args(more);
        run::quiet(&mut command).with_context(|| log_of(&directory.join("dump.log")))?;
        Ok(())
    }

    /// Dumps the tree of `pid` into `directory`, which is created.
    pub(crate) fn dump(
        &self,
        host: &Host,
        pid: u32,
        directory: &Path,
        end: End,
        more: &[&str],
    ) -> Result<()> {
        fs::create_dir_all(directory)?;
        let mut command = host.command(&self.program);
        command
            .args([
                "dump",
                "-v2",
                "-o",
                "dump.log",
                "-t",
                &pid.to_string(),
                "-D",
            ])
            .arg(directory);
        if end == End::LeaveRunning {
            command.arg("--leave-running");
        }
        command.args(more);
        run::quiet(&mut command).with_context(|| log_of(&directory.join("dump.log")))?;
        Ok(())
    }

    /// Restores the tree in `directory`; log and statistics go to `work`, as a received set is never changed.
    pub(crate) fn restore(&self, host: &Host, directory: &Path, work: &Path) -> Result<()> {
        self.restore_with(host, directory, work, &[])
    }

    /// The same with `more` options.
    pub(crate) fn restore_with(
        &self,
        host: &Host,
        directory: &Path,
        work: &Path,
        more: &[&str],
    ) -> Result<()> {
        fs::create_dir_all(work)?;
        let mut command = host.command("timeout");
        // Damaged sets make CRIU spin for ever.
        command.args(["-s", "KILL", "60"]).arg(&self.program);
        command
            .args(["restore", "-d", "-v2", "-o", "restore.log", "-D"])
            .arg(directory);
        command.arg("-W").arg(work).args(more);
        run::quiet(&mut command).with_context(|| log_of(&work.join("restore.log")))?;
        Ok(())
    }

    /// Starts `criu page-server` on `host`, which writes to `directory` and ends after one dump.
    pub(crate) fn page_server(
        &self,
        host: &Host,
        directory: &Path,
        port: u16,
    ) -> Result<PageServer> {
        fs::create_dir_all(directory)?;
        let mut command = host.command(&self.program);
        command.args(["page-server", "-v2", "-o", "page-server.log", "--address"]);
        command
            .args([&host.address.to_string(), "--port", &port.to_string(), "-D"])
            .arg(directory);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().context("cannot start criu page-server")?;
        let server = PageServer {
            child,
            log: directory.join("page-server.log"),
        };
        run::wait_for("criu page-server to listen", Duration::from_secs(5), || {
            host.listens_on(port).then_some(())
        })
        .with_context(|| log_of(&server.log))?;
        Ok(server)
    }
}

/// A running `criu page-server`. It ends with its host at the latest.
#[derive(Debug)]
pub(crate) struct PageServer {
    child: Child,
    log: PathBuf,
}

impl PageServer {
    /// Waits until it has written everything, which is after CRIU's dump has ended.
    pub(crate) fn finish(mut self) -> Result<()> {
        let status = run::wait_for("criu page-server to end", Duration::from_secs(20), || {
            self.child.try_wait().transpose()
        })??;
        ensure!(
            status.success(),
            "criu page-server failed: {status}\n{}",
            log_of(&self.log)
        );
        Ok(())
    }
}

/// What becomes of the processes after a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    LeaveRunning,
    Kill,
}

fn is_new_enough(version: &str, kernel: &str) -> bool {
    let oldest = if major_minor(kernel) >= LATE_KERNEL {
        OLDEST_ON_LATE_KERNELS
    } else {
        OLDEST
    };
    major_minor(version) >= oldest
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn major_minor(version: &str) -> (u32, u32) {
    let mut numbers = version
        .split(['.', '-'])
        .map(|number| number.trim().parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn log_of(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    format!("{} ends:\n{}\n", file.display(), run::last_lines(&text, 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        let late = "6.18.5\n";
        assert!(is_new_enough("4.2.1", late));
        assert!(is_new_enough("4.10", late));
        assert!(is_new_enough("5.0", late));
        assert!(!is_new_enough("4.1.1", late));
        assert!(is_new_enough("4.1.1", "6.12.48+deb13-amd64\n"));
        assert!(!is_new_enough("3.17.1", "6.1.0-40-amd64\n"));
        assert!(!is_new_enough("nonsense", late));
    }
}
