//! Small processes for tests with a real CRIU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, waitpid,
};
use tempfile::TempDir;

/// CRIU, where tests can use it.
pub(crate) fn criu() -> Option<PathBuf> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: CRIU needs root");
        return None;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join("criu"))
        .find(|program| program.is_file());
    if found.is_none() {
        println!("skipped: there is no criu on the PATH");
    }
    found
}

/// Whether `condition` becomes true within a few seconds.
pub(crate) fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    (0..100).any(|_| {
        condition() || {
            thread::sleep(Duration::from_millis(50));
            false
        }
    })
}

/// A shell in a session of its own that counts into a file, with a child now and then.
pub(crate) struct Tree {
    child: Mutex<Child>,
    pid: Pid,
    directory: TempDir,
}

impl Tree {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().expect("a scratch directory");
        let script = "while sleep 0.02; do i=$((i+1)); echo $i >counter; done";
        // setsid runs the program in its own process, unless that leads a process group.
        let child = Command::new("setsid")
            .args(["sh", "-c", script])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell starts");
        let tree = Self {
            pid: Pid::from_child(&child),
            child: Mutex::new(child),
            directory,
        };
        assert!(eventually(|| tree.counts()), "the shell counts");
        tree
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_pid().cast_unsigned()
    }

    /// Whether it runs: its counter moves within a few seconds.
    pub(crate) fn counts(&self) -> bool {
        let before = self.counter();
        eventually(|| self.counter() != before)
    }

    /// Whether it does not run: its counter stays for what is many steps of it.
    pub(crate) fn stands_still(&self) -> bool {
        let before = self.counter();
        thread::sleep(Duration::from_millis(400));
        self.counter() == before
    }

    fn counter(&self) -> Vec<u8> {
        fs::read(self.directory.path().join("counter")).unwrap_or_default()
    }

    /// Whether there is such a process that is no zombie.
    pub(crate) fn is_alive(&self) -> bool {
        let stat = Path::new("/proc").join(self.pid().to_string()).join("stat");
        fs::read_to_string(stat).is_ok_and(|stat| !stat.contains(") Z "))
    }

    /// Collects the killed original and waits until its pids are free: its own is taken as the name
    /// of the group for as long as init has not reaped an orphan of it.
    pub(crate) fn reap(&self) {
        let mut child = self.child.lock().expect("no test panicked with it");
        child.wait().expect("our child can be reaped");
        let free = eventually(|| test_kill_process_group(self.pid).is_err());
        assert!(free, "all processes of the tree are reaped");
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // The session's group is named by its leader, which also the copy is.
        let _ = kill_process_group(self.pid, Signal::KILL);
        for _ in 0..100 {
            // A copy is our child too (rst_sibling).
            match waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(None) => thread::sleep(Duration::from_millis(20)),
                _ => break,
            }
        }
    }
}
