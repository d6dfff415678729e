//! Processes of restored trees: children of this process, because it is their subreaper.

use std::fs;
use std::sync::Once;
use std::time::Duration;

use crate::preflight::Stat;
use crate::tree::{Process, copy};
use rustix::process::{Pid, WaitOptions};

/// How often the dead are looked for.
const EVERY: Duration = Duration::from_millis(200);

/// Processes that lose their parent come to this one from now on: what CRIU leaves behind can be
/// found and killed, and restored trees stay where they can be reaped.
pub(super) fn adopt() {
    // Fails on no kernel since 3.4.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
}

/// Reaps restored processes when they end, on a thread of its own, for as long as this process lives.
pub(super) fn reap() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let started = std::thread::Builder::new()
            .name("reaper".to_owned())
            .spawn(|| {
                loop {
                    reap_foreign();
                    std::thread::sleep(EVERY);
                }
            });
        if let Err(error) = started {
            tracing::warn!("restored processes are not reaped: {error}");
        }
    });
}

// Own children (CRIU, hooks) are in the session of this process, and are waited for by whoever
// started them; restored ones brought their session along.
fn reap_foreign() {
    let own = session_of(std::process::id());
    for pid in children() {
        if state_of(pid) == Some('Z') && session_of(pid) != own {
            wait_for(pid);
        }
    }
}

fn wait_for(pid: u32) {
    if let Some(pid) = to_pid(pid) {
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Kills what is left of a copy with these pids, waits until it is gone and its pids are free; gives
/// how many processes that were.
pub(super) fn kill(tasks: &[u32]) -> usize {
    let own = std::process::id();
    let ours = tasks
        .iter()
        .filter(|&&pid| pid != own && descends_from(pid, own));
    let left: Vec<Process> = ours
        .filter_map(|&pid| Process::dead_or_alive(pid))
        .collect();
    let stayed = copy::remove(&left);
    if stayed > 0 {
        tracing::warn!("{stayed} killed processes of a copy do not go away");
    }
    left.len()
}

fn descends_from(pid: u32, ancestor: u32) -> bool {
    let mut at = pid;
    // Deeper trees than this are not built from images.
    for _ in 0..1024 {
        match parent_of(at) {
            Some(parent) if parent == ancestor => return true,
            Some(parent) if parent > 1 => at = parent,
            _ => return false,
        }
    }
    false
}

fn children() -> Vec<u32> {
    let threads = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let lists = threads.filter_map(|it| fs::read_to_string(it.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

fn to_pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

fn state_of(pid: u32) -> Option<char> {
    Some(Stat::of(pid)?.state)
}

fn parent_of(pid: u32) -> Option<u32> {
    Some(Stat::of(pid)?.parent)
}

fn session_of(pid: u32) -> Option<u32> {
    Some(Stat::of(pid)?.session)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn descent_is_followed_over_generations() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 100 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = shell.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
        let grandchild: u32 = line.trim().parse().unwrap();
        let own = std::process::id();
        assert!(descends_from(grandchild, own));
        assert!(!descends_from(own, grandchild));
        assert!(!descends_from(1, own));
        let tasks = [grandchild, 1, own];
        assert_eq!(kill(&tasks), 1);
        let _ = shell.wait();
        assert_eq!(parent_of(grandchild), None);
    }
}
