//! Processes of restored trees: children of this process, because it is their subreaper.

use std::fs;
use std::sync::Once;
use std::time::Duration;

use crate::preflight::Stat;
use rustix::process::{Pid, WaitOptions};

/// How often the dead are looked for.
const EVERY: Duration = Duration::from_millis(200);

/// Processes that lose their parent come to this one from now on: what CRIU leaves behind can be
/// found and killed, and restored trees stay where they can be reaped.
pub(in crate::transfer) fn adopt() {
    // Fails on no kernel since 3.4.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
}

/// Reaps restored processes when they end, on a thread of its own, for as long as this process lives.
pub(in crate::transfer) fn reap() {
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

fn session_of(pid: u32) -> Option<u32> {
    Some(Stat::of(pid)?.session)
}
