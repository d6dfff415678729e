//! Room for the pids of restored trees.
//!
//! CRIU gives each task the pid it had. In a pid namespace that has just begun (a container, a test
//! host), programs that were started there once had the low pids, and the threads of a receiver would
//! take those very pids.

use std::fs;

const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
const MOST: &str = "/proc/sys/kernel/pid_max";

/// A namespace whose pids are all below this has just begun.
const FRESH: u32 = 1000;

/// Where this process's threads and children then go, where there are so many pids.
const FAR: u32 = 30_000;

/// Lets what is started from now on have pids far from those of images, where this pid namespace is a
/// fresh one. To be called before the first thread is started.
pub(crate) fn leave_low_ones() {
    let read = |path| fs::read_to_string(path).ok()?.trim().parse().ok();
    let (Some(last), Some(most)) = (read(LAST_PID), read(MOST)) else {
        return;
    };
    if let Some(last) = raised(std::process::id(), last, most) {
        // Where it cannot be written, the checks before a migration name the pids that are taken.
        let _ = fs::write(LAST_PID, last.to_string());
    }
}

/// What the last pid should have been, if it should be another.
fn raised(own: u32, last: u32, most: u32) -> Option<u32> {
    let far = FAR.min(most / 4 * 3);
    (own < FRESH && last < FRESH && far > last).then_some(far)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_fresh_namespace_is_changed() {
        assert_eq!(raised(3, 7, 4_194_304), Some(30_000));
        assert_eq!(raised(3, 7, 32_768), Some(24_576));
        assert_eq!(raised(3, 1000, 32_768), None);
        assert_eq!(raised(1000, 7, 32_768), None);
        assert_eq!(raised(3, 400, 301), None);
    }
}
