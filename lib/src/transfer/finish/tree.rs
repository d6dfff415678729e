//! What a finished migration does with the tree on the source: let it run, or end it. All of it may be
//! repeated after a death at any place, and blocks.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use crate::criu::network_lock;
use crate::handover::journal::SourceAbout;
use crate::preflight::Stat;
use crate::transfer::external::{action, command, scripts};
use crate::tree::{self, FenceError, Process, Tree, boot_id, within};

/// How long a CRIU that has lost its caller may take to let the tree go by itself. It does that more
/// thoroughly than anybody else, but the tree waits.
const CRIU_TIME: Duration = Duration::from_millis(500);

/// How long the kernel may take to end a process that was killed, or to let one run.
const KERNEL_TIME: Duration = Duration::from_secs(2);

/// How long a runtime may take to forget what has ended.
const FORGET_TIME: Duration = Duration::from_secs(5);

/// How long a large tree may take to die.
const END_TIME: Duration = Duration::from_secs(10);

/// Waits until none of them is there any more; gives those that are.
pub(in crate::transfer) fn await_gone(processes: &[Process], longest: Duration) -> Vec<Process> {
    let mut left = processes.to_vec();
    within(longest, || {
        left.retain(Process::is_there);
        left.is_empty()
    });
    left
}

/// Ends a CRIU that still has the tree, and the command that has started it, if one has.
fn end_criu(about: &SourceAbout, may_finish: bool) -> Result<(), String> {
    let ended = end_criu_itself(about, may_finish);
    if let Some(leader) = about.command.filter(|_| about.tree.boot == boot_id()) {
        // Its own tidying: a runtime forgets a container that it has seen end.
        if may_finish {
            await_gone(&[leader], KERNEL_TIME);
        }
        command::kill_group(leader);
    }
    ended
}

fn end_criu_itself(about: &SourceAbout, may_finish: bool) -> Result<(), String> {
    let Some(criu) = about.criu.filter(|_| about.tree.boot == boot_id()) else {
        return Ok(());
    };
    if may_finish {
        // A driver that committed has stopped it.
        let _ = criu.signal(Signal::CONT);
        if await_gone(&[criu], CRIU_TIME).is_empty() {
            return Ok(());
        }
    }
    let _ = criu.kill();
    if await_gone(&[criu], KERNEL_TIME).is_empty() {
        return Ok(());
    }
    Err(format!("process {} (criu) cannot be killed", criu.pid))
}

/// Makes the tree whole and lets it run. Gives what an operator should know.
///
/// `was_frozen`: CRIU's dump has begun. `was_fenced`: closing the fence has, too.
pub(in crate::transfer) fn keep(
    about: &SourceAbout,
    was_frozen: bool,
    was_fenced: bool,
) -> Result<Vec<String>, String> {
    let mut notes = Vec::new();
    if about.tree.boot == boot_id() {
        // One that was not told to dump yet ends by itself, too.
        end_criu(about, true)?;
        notes.extend(release(about, was_frozen, was_fenced)?);
        if about.tree.left().is_empty() {
            notes.push("the workload has ended here meanwhile".to_owned());
        }
    } else {
        notes.push("this host was started again: the workload ended with it".to_owned());
    }
    remove_images(about);
    Ok(notes)
}

/// The tree with what it has forked since it was listed, as long as its root lives.
fn grown(tree: &Tree) -> Tree {
    let mut grown = tree.clone();
    let root = tree.processes.first().filter(|_| tree.boot == boot_id());
    let Some(root) = root.filter(|root| root.is_there()) else {
        return grown;
    };
    let Ok(now) = Tree::below(root.pid) else {
        return grown;
    };
    for process in now.processes {
        if !grown.processes.contains(&process) {
            grown.processes.push(process);
        }
    }
    // Else it may be the tree of another that has got the root's pid.
    if root.is_there() { grown } else { tree.clone() }
}

/// Heals a tree that no CRIU has any more, opens its fence, and looks that it runs.
pub(in crate::transfer) fn release(
    about: &SourceAbout,
    was_frozen: bool,
    was_fenced: bool,
) -> Result<Vec<String>, String> {
    let mut notes = Vec::new();
    let (run_id, foreign) = (about.run_id.as_deref(), &about.foreign_tables);
    // Parts of a killed CRIU that are stopped would stay for ever. It may have been killed before it
    // said that its dump begins.
    let criu = about.criu.filter(|_| about.tree.boot == boot_id());
    let ended = criu.filter(|criu| was_frozen || !criu.is_there());
    tree::copy::remove(&ended.map_or_else(Vec::new, tree::copy::helpers_of));
    if was_frozen {
        let healed = tree::heal::heal(&grown(&about.tree), run_id, foreign);
        if healed.sockets > 0 {
            let sockets = healed.sockets;
            notes.push(format!("{sockets} connections were woken from CRIU's hold"));
        }
        for table in healed.tables {
            notes.push(format!("CRIU's network lock {table} was removed"));
        }
        notes.extend(healed.problems);
    }
    // A cgroup that the tree had before may have been frozen by somebody else, who will thaw it.
    let fence = about.fence.as_ref();
    if let Some(fence) = fence.filter(|fence| was_fenced || fence.made) {
        match fence.open(&about.tree) {
            // It runs; where it is counted is not worth another round.
            Err(note @ FenceError::Inside { .. }) => notes.push(note.to_string()),
            opened => opened
                .map_err(|error| format!("the fence around the workload does not open: {error}"))?,
        }
        if was_frozen {
            // What was stopped behind it can be seen, and woken, only now.
            tree::heal::heal(&grown(&about.tree), run_id, foreign);
        }
    }
    let tree = grown(&about.tree);
    let held = || {
        let left = tree.left().into_iter();
        left.filter(|process| Stat::of(process.pid).is_some_and(|stat| stat.state == 't'))
            .map(|process| process.pid)
            .collect::<Vec<_>>()
    };
    if within(KERNEL_TIME, || held().is_empty()) {
        return Ok(notes);
    }
    Err(format!(
        "processes {:?} of the workload are held by a tracer; end it",
        held()
    ))
}

/// Ends the tree without letting it run.
pub(in crate::transfer) fn end(about: &SourceAbout) -> Result<(), String> {
    if about.tree.boot == boot_id() {
        end_processes(about)?;
        // It would try to resume what is dead, and take the lock away too soon.
        end_criu(about, false)?;
        forget(about);
    }
    remove_images(about);
    Ok(())
}

/// A runtime that did not see how its container ended may have it still.
pub(in crate::transfer) fn forget(about: &SourceAbout) {
    let Some(forget) = &about.forget else { return };
    let ended = command::run_to_end(forget, &about.work, Vec::new(), FORGET_TIME);
    if let Err(error) = ended {
        // Most often it has forgotten it already.
        tracing::debug!("{error}");
    }
}

/// Kills the tree's processes, behind their fence where there is one.
pub(in crate::transfer) fn end_processes(about: &SourceAbout) -> Result<(), String> {
    let fenced = about.fence.as_ref().map(|fence| fence.end(&about.tree));
    for process in about.tree.left() {
        let _ = process.kill();
    }
    let left = await_gone(&about.tree.left(), END_TIME);
    match (left.as_slice(), fenced) {
        ([], _) => Ok(()),
        (left, fenced) => {
            let pids: Vec<_> = left.iter().map(|process| process.pid).collect();
            let why = fenced.and_then(Result::err);
            let why = why.map_or_else(String::new, |error| format!(": {error}"));
            Err(format!(
                "the workload runs at the destination, and processes {pids:?} of it cannot be \
                 killed here{why}"
            ))
        }
    }
}

/// Directory of the pre-dumps of a migration whose last images are in `work`.
pub(in crate::transfer) fn pre_dumps(work: &Path) -> PathBuf {
    let mut name = work.as_os_str().to_owned();
    name.push(".pre-dumps");
    name.into()
}

fn remove_images(about: &SourceAbout) {
    if let Some(root) = about.tree.processes.first() {
        action::unregister(root.pid, &about.work);
    }
    scripts::remove(&about.work);
    let _ = fs::remove_dir_all(pre_dumps(&about.work));
    let _ = fs::remove_dir_all(&about.work);
}

/// Whether the source's network lock may go: no packet for the workload comes here any more, or
/// nothing of it is kept silent.
pub(in crate::transfer) fn has_left(about: &SourceAbout) -> bool {
    if about.bound.is_empty() || !keeps_silent(about) {
        return true;
    }
    // Not by trying to bind to them: ip_nonlocal_bind allows that for any.
    let Ok(interfaces) = if_addrs::get_if_addrs() else {
        return false;
    };
    let mut here = interfaces.iter().map(if_addrs::Interface::ip);
    !here.any(|address| about.bound.contains(&address))
}

// Where it cannot be seen it may.
fn keeps_silent(about: &SourceAbout) -> bool {
    let Some(Ok(table)) = about.run_id.as_deref().map(network_lock::nftables_table) else {
        return true;
    };
    match network_lock::nftables_locks() {
        Ok(tables) if !tables.contains(&table) => false,
        Ok(_) => network_lock::silenced_by(&table).map_or(true, |silenced| !silenced.is_nothing()),
        Err(_) => true,
    }
}

/// Removes the network lock of a workload that has moved. What cannot be removed is said.
pub(in crate::transfer) fn remove_lock(about: &SourceAbout) -> Option<String> {
    let run_id = about.run_id.as_ref()?;
    let removed = network_lock::remove_nftables_lock(run_id);
    // Where nothing was locked it does not matter whether there is an nft.
    let error = removed.err().filter(|_| !about.bound.is_empty());
    error.map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::sample_about;
    use super::*;
    use crate::tree::Tree;

    #[test]
    fn a_stranger_with_the_same_pid_is_not_killed() {
        let mut child = Command::new("sleep").arg("30").spawn().expect("sleep");
        let process = Process::of(child.id()).expect("it runs");
        let stranger = Process {
            started: process.started + 1,
            ..process
        };
        assert!(!stranger.kill().unwrap());
        assert!(process.is_there());
        assert!(process.kill().unwrap());
        assert!(await_gone(&[process], KERNEL_TIME).is_empty());
        child.wait().expect("it is ours");
    }

    #[test]
    fn a_tree_without_a_fence_is_ended_all_the_same() {
        let mut child = Command::new("sleep").arg("30").spawn().expect("sleep");
        let about = SourceAbout {
            tree: Tree::of([child.id()]),
            ..sample_about()
        };
        end_processes(&about).expect("it is ours to kill");
        assert!(about.tree.left().is_empty());
        child.wait().expect("it is ours");
    }

    #[test]
    fn pids_of_an_earlier_boot_are_nobodys() {
        let mut child = Command::new("sleep").arg("30").spawn().expect("sleep");
        let mut about = SourceAbout {
            tree: Tree::of([child.id()]),
            criu: Process::of(child.id()),
            ..sample_about()
        };
        about.tree.boot = "another".to_owned();
        end(&about).expect("nothing to end");
        keep(&about, true, true).expect("nothing to keep");
        assert!(child.try_wait().expect("ours").is_none(), "it was killed");
        child.kill().expect("ours");
        child.wait().expect("ours");
    }

    #[test]
    fn what_was_forked_since_is_woken_too() {
        let script = "sleep 30 & echo $!; wait";
        let mut shell = Command::new("sh");
        shell
            .args(["-c", script])
            .stdout(std::process::Stdio::piped());
        let mut root = shell.spawn().expect("sh");
        let mut line = String::new();
        let mut said = std::io::BufReader::new(root.stdout.take().expect("piped"));
        std::io::BufRead::read_line(&mut said, &mut line).expect("its child's pid");
        let forked = Process::of(line.trim().parse().expect("a pid")).expect("it runs");
        let about = SourceAbout {
            tree: Tree::of([root.id()]),
            ..sample_about()
        };
        let state = || Stat::of(forked.pid).map(|stat| stat.state);
        assert!(forked.signal(Signal::STOP).unwrap());
        assert!(within(KERNEL_TIME, || state() == Some('T')));
        let stranger = Tree {
            processes: vec![Process {
                started: about.tree.processes[0].started + 1,
                ..about.tree.processes[0]
            }],
            ..about.tree.clone()
        };
        assert_eq!(grown(&stranger), stranger);
        release(&about, true, true).expect("nothing is in the way");
        let woken = within(KERNEL_TIME, || state() == Some('S'));
        let _ = forked.kill();
        root.kill().expect("ours");
        root.wait().expect("ours");
        assert!(woken);
    }

    #[test]
    fn a_cgroup_that_somebody_else_froze_is_not_thawed() {
        let cgroup = tempfile::tempdir().expect("a directory");
        let switch = cgroup.path().join("cgroup.freeze");
        fs::write(&switch, "1").expect("written");
        let about = SourceAbout {
            tree: Tree::of([std::process::id()]),
            fence: Some(tree::Fence {
                cgroup: cgroup.path().to_owned(),
                version: tree::Freezer::V2,
                made: false,
                origins: Vec::new(),
            }),
            ..sample_about()
        };
        let frozen = || fs::read_to_string(&switch).expect("there").starts_with('1');
        release(&about, false, false).expect("nothing to do");
        assert!(frozen());
        release(&about, false, true).expect("it opens");
        assert!(!frozen());
    }

    #[test]
    fn an_address_is_here_while_an_interface_has_it() {
        let here = |address: &str| {
            !has_left(&SourceAbout {
                bound: vec![address.parse().expect("an address")],
                ..sample_about()
            })
        };
        assert!(here("127.0.0.1"));
        assert!(!here("127.0.0.77"), "it can be bound to, and is nobody's");
        assert!(!here("192.0.2.1"));
    }
}
