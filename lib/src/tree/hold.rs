//! Stopping a tree in the moment in which CRIU may die.
//!
//! When a tracer dies the kernel lets its tracees run. What runs then has sockets in repair mode: its
//! first read fails, and the program closes the connection. A stop signal that is pending by then is taken
//! first: the process stops before it executes anything of its own.
//!
//! From post-dump on no process runs code of CRIU's any more, so that the signal can wait there. It is
//! not in the images: those have been written.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

use super::Process;

/// Process `root` and all below it, as they are now.
pub fn below(root: u32) -> Vec<Process> {
    let mut found: Vec<Process> = Process::of(root).into_iter().collect();
    let mut next = 0;
    while let Some(process) = found.get(next).copied() {
        next += 1;
        for child in children_of(process.pid) {
            let child = Process::of(child).filter(|child| !found.contains(child));
            found.extend(child);
        }
    }
    found
}

fn children_of(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let lists = threads.filter_map(|it| fs::read_to_string(it.path().join("children")).ok());
    lists
        .flat_map(|list| {
            let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<u32>>()
        })
        .collect()
}

/// Stops them: at once, or before they run again where a tracer has them.
pub fn stop(processes: &[Process]) {
    signal(processes, Signal::STOP);
}

/// Takes that back, and continues those that have stopped.
pub fn release(processes: &[Process]) {
    signal(processes, Signal::CONT);
}

fn signal(processes: &[Process], signal: Signal) {
    for process in processes.iter().filter(|process| process.is_there()) {
        let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
        let _ = pid.map(|pid| kill_process(pid, signal));
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::preflight::Stat;

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
        let tree = below(shell.id());
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
