//! Stopping a tree in the moment in which CRIU may die.
//!
//! When a tracer dies the kernel lets its tracees run. What runs then has sockets in repair mode: its
//! first read fails, and the program closes the connection. A stop signal that is pending by then is taken
//! first: the process stops before it executes anything of its own.
//!
//! From post-dump on no process runs code of CRIU's any more, so that the signal can wait there. It is
//! not in the images: those have been written.

use rustix::process::Signal;

use super::Process;

/// Stops them: at once, or before they run again where a tracer has them.
pub fn stop(processes: &[Process]) {
    signal(processes, Signal::STOP);
}

/// Takes that back, and continues those that have stopped.
pub fn release(processes: &[Process]) {
    signal(processes, Signal::CONT);
}

fn signal(processes: &[Process], signal: Signal) {
    for process in processes {
        // One that has gone needs none.
        let _ = process.signal(signal);
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::preflight::Stat;
    use crate::tree::Tree;

    #[test]
    fn a_tree_stops_and_goes_on_as_a_whole() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 100 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = shell.stdout.take().unwrap();
        std::io::BufReader::new(output)
            .read_line(&mut line)
            .unwrap();
        let child: u32 = line.trim().parse().unwrap();
        let tree = Tree::below(shell.id()).unwrap().processes;
        let pids: Vec<u32> = tree.iter().map(|process| process.pid).collect();
        assert_eq!(pids, [shell.id(), child]);
        let state = |pid| Stat::of(pid).unwrap().state;
        let all = |wanted: char| {
            for _ in 0..500 {
                if pids.iter().all(|&pid| state(pid) == wanted) {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            false
        };
        stop(&tree);
        assert!(all('T'));
        release(&tree);
        assert!(all('S'));
        for process in &tree {
            let _ = process.kill();
        }
        let _ = shell.wait();
    }
}
