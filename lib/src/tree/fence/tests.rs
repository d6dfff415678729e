//! With the kernel's freezers, as root; elsewhere each test says in one line why it does nothing.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::*;
use crate::criu::testing::{Tree as Workload, criu, eventually};
use crate::criu::{CriuOptions, DumpOptions, Stage, Verdict, Worker};

/// The freezers of this host.
fn freezers() -> Vec<Freezer> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: cgroups need root");
        return Vec::new();
    }
    let usable = |version: &Freezer| {
        let own = Tree::of([std::process::id()]);
        let planned = Fence::plan_with(*version, &own, "probe");
        if let Err(error) = &planned {
            println!("skipped for {version}: {error}");
        }
        planned.is_ok()
    };
    [Freezer::V1, Freezer::V2]
        .into_iter()
        .filter(usable)
        .collect()
}

fn id(name: &str, version: Freezer) -> String {
    format!("test-{name}-{}-{version:?}", std::process::id())
}

fn tree_of(root: u32) -> Tree {
    let tasks = crate::live::tree(root).expect("it runs");
    Tree::of(tasks.iter().map(|task| task.pid))
}

fn cgroup_of(version: Freezer, pid: u32) -> PathBuf {
    let hierarchy = Hierarchy::find(version).expect("it was found before");
    hierarchy.cgroup_of(pid).expect("the process is there")
}

#[expect(clippy::disallowed_methods, reason = "a measurement")]
fn now() -> Instant {
    Instant::now()
}

#[test]
fn a_closed_fence_holds_and_an_open_one_leaves_no_trace() {
    for version in freezers() {
        let workload = Workload::start();
        let before = cgroup_of(version, workload.pid());
        let tree = tree_of(workload.pid());
        let fence = Fence::plan_with(version, &tree, &id("holds", version)).unwrap();
        assert!(fence.made && fence.cgroup.starts_with(&before));
        assert!(!fence.cgroup.exists(), "a plan touches nothing");
        fence.open(&tree).expect("it was never closed");

        // Its short-lived children may end or be left outside; the shell itself is held.
        let shell = Tree::of([workload.pid()]);
        fence.close(&shell).unwrap();
        fence.close(&shell).expect("again");
        assert!(workload.stands_still());
        let text = serde_json::to_string(&fence).unwrap();
        let fence: Fence = serde_json::from_str(&text).unwrap();
        fence.open(&tree).unwrap();
        fence.open(&tree).expect("again");
        assert!(workload.counts());
        assert!(!fence.cgroup.exists());
        assert_eq!(cgroup_of(version, workload.pid()), before);
    }
}

#[test]
fn what_is_behind_the_fence_ends_without_running() {
    for version in freezers() {
        let workload = Workload::start();
        let tree = tree_of(workload.pid());
        let fence = Fence::plan_with(version, &tree, &id("ends", version)).unwrap();
        fence.close(&tree).unwrap();
        assert!(workload.stands_still());
        fence.end(&tree).unwrap();
        assert!(!workload.is_alive() && tree.left().is_empty());
        assert!(!fence.cgroup.exists());
        fence.end(&tree).expect("again");
        fence.open(&tree).expect("nothing is left");
        assert!(matches!(fence.close(&tree), Err(FenceError::Gone)));
    }
}

#[test]
fn a_tree_that_was_never_fenced_can_be_ended() {
    for version in freezers() {
        let workload = Workload::start();
        let tree = tree_of(workload.pid());
        let fence = Fence::plan_with(version, &tree, &id("never", version)).unwrap();
        fence.end(&tree).unwrap();
        assert!(!workload.is_alive());
    }
}

/// A cgroup that is removed, with all that is in it.
struct Group(Freezer, PathBuf);

impl Group {
    fn new(version: Freezer, name: &str) -> Self {
        let parent = cgroup_of(version, std::process::id());
        let path = parent.join(id(name, version));
        std::fs::create_dir(&path).unwrap();
        Self(version, path)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.0.set(&self.1, false);
        let gone = within(Duration::from_secs(5), || {
            for pid in cgroup::members(&self.1).unwrap_or_default() {
                let _ = Process::of(pid).map(|process| process.kill());
            }
            let below = std::fs::read_dir(&self.1).into_iter().flatten().flatten();
            for entry in below {
                let _ = std::fs::remove_dir(entry.path());
            }
            std::fs::remove_dir(&self.1).is_ok()
        });
        assert!(gone || std::thread::panicking());
    }
}

fn sleeper() -> Child {
    let mut command = Command::new("sleep");
    let null = command.arg("1000").stdin(Stdio::null());
    null.spawn().expect("sleep starts")
}

fn reap(mut children: Vec<Child>) {
    for child in &mut children {
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[test]
fn a_tree_alone_in_its_cgroup_is_frozen_in_place() {
    for version in freezers() {
        let group = Group::new(version, "alone");
        let (one, two) = (sleeper(), sleeper());
        let inner = group.1.join("inner");
        std::fs::create_dir(&inner).unwrap();
        cgroup::put(one.id(), &group.1).unwrap();
        cgroup::put(two.id(), &inner).unwrap();

        let both = Tree::of([one.id(), two.id()]);
        let fence = Fence::plan_with(version, &both, "alone").unwrap();
        assert_eq!((fence.made, &fence.cgroup), (false, &group.1));
        fence.close(&both).unwrap();
        assert!(version.is_frozen(&group.1).unwrap());
        // Frozen by somebody: not to be thawed by the end of another fence.
        let again = Fence::plan_with(version, &both, "again").unwrap();
        assert!(again.made);
        fence.open(&both).unwrap();
        assert_eq!(cgroup_of(version, two.id()), inner);
        assert!(!version.is_frozen(&group.1).unwrap());

        // With a stranger in it the tree is moved, and the stranger survives its end.
        let one_alone = Tree::of([one.id()]);
        let fence = Fence::plan_with(version, &one_alone, "moved").unwrap();
        assert!(fence.made && fence.cgroup.starts_with(&group.1));
        fence.close(&one_alone).unwrap();
        fence.end(&one_alone).unwrap();
        let stranger = Process::of(two.id());
        assert!(stranger.is_some());

        let two_alone = Tree::of([two.id()]);
        let fence = Fence::plan_with(version, &two_alone, "stranger").unwrap();
        assert!(!fence.made);
        fence.close(&two_alone).unwrap();
        let stranger = sleeper();
        cgroup::put(stranger.id(), &fence.cgroup).unwrap();
        fence.end(&two_alone).unwrap();
        assert!(Process::of(stranger.id()).is_some() && Process::of(two.id()).is_none());
        reap(vec![one, two, stranger]);
    }
}

#[test]
fn processes_return_to_different_cgroups_or_what_is_left_of_them() {
    for version in freezers() {
        let group = Group::new(version, "homes");
        let homes = ["a", "b", "c"].map(|name| group.1.join(name));
        let mut children: Vec<Child> = (0..3).map(|_| sleeper()).collect();
        for (home, child) in homes.iter().zip(&children) {
            std::fs::create_dir(home).unwrap();
            cgroup::put(child.id(), home).unwrap();
        }
        let stranger = sleeper();
        cgroup::put(stranger.id(), &homes[2]).unwrap();
        let tree = Tree::of(children.iter().map(Child::id));
        let fence = Fence::plan_with(version, &tree, "homes").unwrap();
        assert_eq!(fence.cgroup, group.1.join("crxfer-homes"));
        fence.close(&tree).unwrap();
        std::fs::remove_dir(&homes[1]).unwrap();
        children.push(stranger);
        fence.open(&tree).unwrap();
        let at: Vec<_> = children
            .iter()
            .map(|child| cgroup_of(version, child.id()))
            .collect();
        let [first, _, third] = &homes;
        let expected = [first, &group.1, third, third].map(PathBuf::clone);
        assert_eq!(at, expected);
        reap(children);
    }
}

#[test]
fn a_tree_beside_controllers_is_fenced_beside() {
    let Some(version) = freezers()
        .into_iter()
        .find(|version| *version == Freezer::V2)
    else {
        return;
    };
    let top = cgroup_of(version, std::process::id());
    let offered = std::fs::read_to_string(top.join("cgroup.controllers")).unwrap_or_default();
    let Some(controller) = offered.split_whitespace().next() else {
        println!("skipped: no controller is left to cgroup v2 here");
        return;
    };
    let enabled = std::fs::read_to_string(top.join("cgroup.subtree_control")).unwrap();
    let control = top.join("cgroup.subtree_control");
    if std::fs::write(control, format!("+{controller}")).is_err() {
        println!("skipped: cgroup v2's {controller} cannot be enabled here");
        return;
    }
    let group = Group::new(version, "control");
    std::fs::write(
        group.1.join("cgroup.subtree_control"),
        format!("+{controller}"),
    )
    .unwrap();
    let leaves = ["a", "b"].map(|name| group.1.join(name));
    let children = vec![sleeper(), sleeper(), sleeper()];
    for (index, child) in children.iter().enumerate() {
        let leaf = &leaves[index.min(1)];
        let _ = std::fs::create_dir(leaf);
        cgroup::put(child.id(), leaf).unwrap();
    }
    let tree = Tree::of([children[0].id(), children[1].id()]);
    let fence = Fence::plan_with(version, &tree, "beside").unwrap();
    assert_eq!(fence.cgroup, group.1.join("crxfer-beside"));
    fence.close(&tree).unwrap();
    fence.open(&tree).unwrap();
    assert_eq!(cgroup_of(version, children[1].id()), leaves[1]);
    reap(children);
    drop(group);
    if !enabled.contains(controller) {
        let _ = std::fs::write(top.join("cgroup.subtree_control"), format!("-{controller}"));
    }
}

#[test]
fn a_dead_criu_does_not_open_the_fence() {
    let Some(program) = criu() else { return };
    for version in freezers() {
        for end in [false, true] {
            let directory = tempfile::tempdir().expect("a scratch directory");
            let place = File::open(directory.path()).expect("it opens");
            let workload = Workload::start();
            let mut fenced = None;
            let mut worker = Worker::start(&program, None, None).expect("criu starts");
            let canceller = worker.canceller();
            let options = DumpOptions::new(
                workload.pid(),
                place.as_fd(),
                place.as_fd(),
                CriuOptions::default(),
            );
            let result = worker.dump(&options, &mut |stage, _| {
                if stage == Stage::PostDump {
                    let tree = tree_of(workload.pid());
                    let fence = Fence::plan_with(version, &tree, &id("criu", version)).unwrap();
                    let begun = now();
                    fence.close(&tree).unwrap();
                    println!("{version}: {:?} at post-dump", begun.elapsed());
                    fenced = Some((fence, tree));
                    canceller.kill();
                }
                Verdict::GoOn
            });
            result.expect_err("criu was killed");
            drop(worker);
            let (fence, tree) = fenced.expect("it came to post-dump");
            assert!(workload.stands_still(), "{version}: held without CRIU");
            super::super::heal::heal(&tree, None, &[]);
            assert!(workload.stands_still(), "{version}: still held");
            if end {
                fence.end(&tree).unwrap();
                assert!(!workload.is_alive() && tree.left().is_empty());
            } else {
                fence.open(&tree).unwrap();
                assert!(workload.counts(), "{version}: it runs on");
            }
            assert!(!fence.cgroup.exists());
        }
    }
}

#[test]
fn an_end_at_post_dump_ends_the_dump_well() {
    let Some(program) = criu() else { return };
    for version in freezers() {
        let directory = tempfile::tempdir().expect("a scratch directory");
        let place = File::open(directory.path()).expect("it opens");
        let workload = Workload::start();
        let mut worker = Worker::start(&program, None, None).expect("criu starts");
        let criu = CriuOptions::default();
        let options = DumpOptions::new(workload.pid(), place.as_fd(), place.as_fd(), criu);
        let result = worker.dump(&options, &mut |stage, _| {
            if stage == Stage::PostDump {
                let tree = tree_of(workload.pid());
                let fence = Fence::plan_with(version, &tree, &id("over", version)).unwrap();
                fence.close(&tree).unwrap();
                fence.end(&tree).unwrap();
                assert!(!fence.cgroup.exists());
            }
            Verdict::GoOn
        });
        result.unwrap_or_else(|error| panic!("{version}: {error}"));
        assert!(eventually(|| !workload.is_alive()));
    }
}

#[test]
fn closing_takes_milliseconds() {
    for version in freezers() {
        for count in [1, 50] {
            let children: Vec<Child> = (0..count).map(|_| sleeper()).collect();
            let tree = Tree::of(children.iter().map(Child::id));
            let fence = Fence::plan_with(version, &tree, &id("time", version)).unwrap();
            let begun = now();
            fence.close(&tree).unwrap();
            let closed = begun.elapsed();
            let begun = now();
            fence.open(&tree).unwrap();
            println!(
                "{version}, {count}: closed in {closed:?}, open in {:?}",
                begun.elapsed()
            );
            assert!(closed < Duration::from_secs(1));
            reap(children);
        }
    }
}

#[test]
fn plans_that_cannot_be_are_explained() {
    let own = Tree::of([std::process::id()]);
    for bad in ["", "a/b", "..", &"x".repeat(200)] {
        assert!(
            matches!(Fence::plan(&own, bad), Err(FenceError::BadId(_))),
            "{bad:?}"
        );
    }
    let none = Tree::of([]);
    assert!(matches!(Fence::is_possible(&none), Err(FenceError::Gone)));
    let error = FenceError::None("cgroup v2: none with a freezer is mounted".to_owned());
    assert!(error.to_string().contains("as root"));
}
