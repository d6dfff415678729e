//! Which tasks belong to a tree.

use std::collections::BTreeSet;
use std::io;

use super::error::{LiveError, unless_gone};
use super::proc::ProcDir;

/// One process of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its pid as seen here.
    pub pid: u32,
    /// Its pid in its own, innermost, pid namespace: what names of images use.
    pub vpid: u32,
    /// Pid of its parent as seen here; `None` for the root.
    pub parent: Option<u32>,
    /// Ids of its threads in its innermost pid namespace, ascending, `vpid` among them.
    pub threads: Vec<u32>,
    /// When it was started, in clock ticks since boot: with `pid` names it for good.
    pub start_time: u64,
    /// It has ended and waits to be reaped: it has no memory any more.
    pub zombie: bool,
}

/// The tasks below `root`, and `root` first, parents before their children.
///
/// The tree runs meanwhile: tasks that end while it is listed are left out, and tasks that start
/// may be missing. Listed again, they are there.
///
/// Fails where `root` has ended, also where it waits as a zombie to be reaped.
pub fn tree(root: u32) -> Result<Vec<Task>, LiveError> {
    let mut found: Vec<Task> = Vec::new();
    let mut seen = BTreeSet::from([root]);
    let mut to_visit = vec![(root, None)];
    while let Some((pid, parent)) = to_visit.pop() {
        let visited =
            visit(pid, parent).map_err(|error| LiveError::of("read the state", pid, error));
        let Some((task, dir)) = visited? else {
            continue;
        };
        for child in children(&dir)? {
            // A task that was reparented between two looks is still one task.
            if seen.insert(child) {
                to_visit.push((child, Some(pid)));
            }
        }
        found.push(task);
    }
    match found.first() {
        Some(task) if task.pid == root && !task.zombie => Ok(found),
        _ => Err(LiveError::RootGone { pid: root }),
    }
}

fn visit(pid: u32, parent: Option<u32>) -> io::Result<Option<(Task, ProcDir)>> {
    let Some(dir) = unless_gone(ProcDir::open(pid))? else {
        return Ok(None);
    };
    Ok(unless_gone(describe(&dir, parent))?.map(|task| (task, dir)))
}

fn describe(dir: &ProcDir, parent: Option<u32>) -> io::Result<Task> {
    let status = dir.status(None)?;
    let mut threads = Vec::new();
    for tid in dir.numbers("task")? {
        if let Some(thread) = unless_gone(dir.status(Some(tid)))? {
            threads.push(thread.vpid);
        }
    }
    threads.sort_unstable();
    Ok(Task {
        pid: dir.pid,
        vpid: status.vpid,
        parent,
        threads,
        start_time: dir.start_time()?,
        zombie: status.zombie,
    })
}

/// Children of all threads: each thread has those that it forked.
fn children(dir: &ProcDir) -> Result<Vec<u32>, LiveError> {
    let failed = |error| LiveError::of("list the children", dir.pid, error);
    let mut children = Vec::new();
    let threads = unless_gone(dir.numbers("task")).map_err(failed)?;
    for tid in threads.into_iter().flatten() {
        let list = dir.text(format!("task/{tid}/children"));
        match unless_gone(list).map_err(failed)? {
            Some(list) => children.extend(
                list.split_ascii_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            ),
            None if children_are_listed() => {}
            None => return Err(LiveError::NoChildren),
        }
    }
    Ok(children)
}

/// Whether the kernel has lists of children at all: a missing one may also be a thread that ended.
fn children_are_listed() -> bool {
    std::path::Path::new("/proc/thread-self/children").exists()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_tree_has_its_children_and_threads() {
        let me = std::process::id();
        let mut child = Command::new("sleep")
            .arg("30")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let tasks = tree(me).unwrap();
        child.kill().unwrap();
        let unreaped = tree(me).unwrap();
        child.wait().unwrap();
        assert_eq!(tasks[0].pid, me);
        assert_eq!(tasks[0].parent, None);
        assert!(tasks[0].threads.contains(&tasks[0].vpid));
        let of_child = |tasks: &[Task]| tasks.iter().find(|task| task.pid == child.id()).cloned();
        assert_eq!(of_child(&tasks).unwrap().parent, Some(me));
        assert!(!of_child(&tasks).unwrap().zombie);
        assert!(of_child(&unreaped).is_some());
        assert!(of_child(&tree(me).unwrap()).is_none());
    }

    #[test]
    fn a_root_that_has_ended_is_named() {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let error = tree(child.id()).unwrap_err();
        assert!(
            matches!(error, LiveError::RootGone { pid } if pid == child.id()),
            "{error}"
        );
    }
}
