//! Processes of restored trees: children of this process, because it is their subreaper.

use std::fs;
use std::sync::Once;
use std::time::Duration;

use crate::preflight::Stat;
use crate::tree::copy;

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
    let own = Stat::of(std::process::id()).map(|stat| stat.session);
    for pid in children() {
        let ended = Stat::of(pid).filter(|stat| stat.state == 'Z');
        if ended.is_some_and(|stat| Some(stat.session) != own) {
            copy::reap(pid);
        }
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
