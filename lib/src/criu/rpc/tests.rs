//! With a real CRIU, as root; elsewhere each test says in one line why it does nothing.

use super::*;

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use crate::criu::network_lock::remove_nftables_lock;
use crate::criu::options::{CriuOptions, Leave, PreDumpOptions};
use crate::criu::testing::{Tree, criu, eventually};
use crate::image::Inventory;
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// Two directories, as a dump needs them.
struct Places {
    directory: TempDir,
    images: File,
    work: File,
}

impl Places {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a scratch directory");
        let open = |name: &str| {
            let path = directory.path().join(name);
            fs::create_dir(&path).expect("a directory is made");
            File::open(path).expect("the directory opens")
        };
        let (images, work) = (open("images"), open("work"));
        Self {
            directory,
            images,
            work,
        }
    }

    fn dump(&self, pid: u32) -> DumpOptions<'_> {
        let options = CriuOptions::default();
        DumpOptions::new(pid, self.images.as_fd(), self.work.as_fd(), options)
    }

    fn restore(&self) -> RestoreOptions<'_> {
        let options = CriuOptions::default();
        let mut options = RestoreOptions::new(self.images.as_fd(), self.work.as_fd(), options);
        options.sibling = true;
        options
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Removes the network lock of the dump that is here; false if there is none.
    fn remove_lock(&self) -> bool {
        let Ok(bytes) = fs::read(self.path("images/inventory.img")) else {
            return false;
        };
        let inventory = Inventory::parse(&bytes, "inventory.img").expect("CRIU wrote it");
        let id = inventory.criu_run_id;
        id.is_some_and(|id| remove_nftables_lock(&id).unwrap_or(false))
    }
}

/// What a killed CRIU and a refused restore leave must not pile up on the host of the tests.
impl Drop for Places {
    fn drop(&mut self) {
        self.remove_lock();
    }
}

fn worker(criu: &Path) -> Worker {
    Worker::start(criu, None, None).expect("criu starts")
}

#[test]
fn a_dumped_tree_is_restored_by_another_worker() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut worker_1 = worker(&criu);
    let probe = worker_1.probe().expect("criu says what it can do");
    assert!(probe.version >= (3, 0, 0), "{probe:?}");

    let mut stages = Vec::new();
    worker_1
        .dump(&places.dump(tree.pid()), &mut |stage, _| {
            stages.push(stage);
            Verdict::GoOn
        })
        .expect("a simple tree can be dumped");
    assert_eq!(stages.first(), Some(&Stage::PreDump));
    assert_eq!(stages.last(), Some(&Stage::PostDump));
    assert!(!tree.is_alive());
    assert!(places.path("images/inventory.img").exists());
    let again = worker_1.dump(&places.dump(1), &mut |_, _| Verdict::GoOn);
    assert!(matches!(again, Err(CriuError::Used { .. })), "{again:?}");

    tree.reap();
    let mut asked = None;
    let restored = worker(&criu)
        .restore(&places.restore(), &mut |stage, pid| {
            if stage == Stage::PostRestore {
                asked = pid;
            }
            Verdict::GoOn
        })
        .expect("the dumped tree can be restored");
    assert_eq!(restored.pid, tree.pid());
    assert_eq!(asked, Some(tree.pid()));
    assert!(tree.counts());
}

#[test]
fn a_tree_refused_at_post_dump_goes_on() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut stopped = None;
    let result = worker(&criu).dump(&places.dump(tree.pid()), &mut |stage, _| {
        if stage == Stage::PostDump {
            stopped = Some(tree.stands_still());
            return Verdict::Refuse;
        }
        Verdict::GoOn
    });
    let refused = matches!(
        result,
        Err(CriuError::Refused {
            stage: Stage::PostDump,
            ..
        })
    );
    assert!(refused, "{result:?}");
    assert_eq!(stopped, Some(true), "the tree is frozen at post-dump");
    assert!(tree.counts(), "it resumed");
}

#[test]
fn a_snapshot_leaves_the_tree_running() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut options = places.dump(tree.pid());
    options.leave = Leave::Running;
    worker(&criu)
        .dump(&options, &mut |_, _| Verdict::GoOn)
        .expect("the tree can be dumped");
    assert!(tree.counts());
}

#[test]
fn a_copy_refused_at_post_restore_is_gone() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    worker(&criu)
        .dump(&places.dump(tree.pid()), &mut |_, _| Verdict::GoOn)
        .expect("the tree can be dumped");
    tree.reap();
    let mut built = None;
    let result = worker(&criu).restore(&places.restore(), &mut |stage, pid| {
        if stage == Stage::PostRestore {
            let exists = pid.is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists());
            built = Some(exists && tree.stands_still());
            return Verdict::Refuse;
        }
        Verdict::GoOn
    });
    assert!(
        matches!(result, Err(CriuError::Refused { .. })),
        "{result:?}"
    );
    assert_eq!(built, Some(true), "the copy is there and has not run");
    assert!(eventually(|| !tree.is_alive()), "nothing is left of it");
}

#[test]
fn cancelling_at_post_dump_resumes_the_tree_while_the_caller_still_holds() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut worker = worker(&criu);
    let canceller = worker.canceller();
    let result = worker.dump(&places.dump(tree.pid()), &mut |stage, _| {
        if stage == Stage::PostDump {
            let canceller = canceller.clone();
            thread::spawn(move || canceller.cancel());
            assert!(tree.counts(), "resumed during the hold");
        }
        Verdict::GoOn
    });
    let cancelled = matches!(result, Err(CriuError::Cancelled { killed: false, .. }));
    assert!(cancelled, "{result:?}");
    assert!(tree.counts());
}

#[test]
fn a_decision_after_the_deadline_is_a_refusal() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut worker = worker(&criu);
    worker.probe().expect("criu says what it can do");
    worker.set_deadline(Some(now() + Duration::from_secs(5)));
    let deadline = now() + Duration::from_millis(5200);
    let result = worker.dump(&places.dump(tree.pid()), &mut |stage, _| {
        if stage == Stage::PostDump {
            thread::sleep(deadline.saturating_duration_since(now()));
        }
        Verdict::GoOn
    });
    let late = matches!(result, Err(CriuError::TimedOut { killed: false, .. }));
    assert!(late, "{result:?}");
    assert!(tree.counts());
}

#[test]
fn a_killed_worker_at_post_dump_leaves_the_tree_running() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut worker = worker(&criu);
    let canceller = worker.canceller();
    let result = worker.dump(&places.dump(tree.pid()), &mut |stage, _| {
        if stage == Stage::PostDump {
            canceller.kill();
        }
        Verdict::GoOn
    });
    let killed = matches!(result, Err(CriuError::Cancelled { killed: true, .. }));
    assert!(killed, "{result:?}");
    assert!(tree.counts());
    if Command::new("nft").arg("--version").output().is_err() {
        println!("partly skipped: there is no nft to remove the network lock with");
        return;
    }
    assert!(places.remove_lock(), "its network lock stayed");
    assert!(!places.remove_lock(), "and is gone");
}

#[test]
fn a_pre_dump_is_made_or_refused_by_what_the_kernel_has() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut worker = worker(&criu);
    let tracked = worker.probe().expect("criu says what it can do").mem_track;
    let result = worker.pre_dump(&PreDumpOptions {
        pid: tree.pid(),
        images: places.images.as_fd(),
        work: places.work.as_fd(),
        log_file: "pre-dump.log".into(),
        parent: None,
        page_server: false,
        read_memory: false,
        pidfd_store: None,
        criu: CriuOptions::default(),
    });
    if tracked {
        result.expect("a simple tree can be pre-dumped");
    } else {
        assert!(matches!(result, Err(CriuError::NoSoftDirty)), "{result:?}");
    }
    assert!(tree.counts());
}

#[test]
fn open_connections_are_explained() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    // A shell that holds a connection open, in a session of its own.
    let script = format!("exec 5<>/dev/tcp/127.0.0.1/{port}; echo >&5; sleep 1000");
    let mut child = Command::new("setsid")
        .args(["bash", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("bash starts");
    let (mut connection, _) = listener.accept().expect("it connects");
    connection.read_exact(&mut [0]).expect("it is ready");
    let pid = child.id();
    let result = worker(&criu).dump(&places.dump(pid), &mut |_, _| Verdict::GoOn);
    // Its own child as well.
    let group = Pid::from_child(&child);
    let _ = rustix::process::kill_process_group(group, Signal::KILL);
    child.wait().expect("our child can be reaped");
    let text = result.expect_err("it has a connection").to_string();
    assert!(text.contains("--tcp-established"), "{text}");
}

#[test]
fn a_taken_pid_is_explained() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let tree = Tree::start();
    let mut options = places.dump(tree.pid());
    options.leave = Leave::Running;
    worker(&criu)
        .dump(&options, &mut |_, _| Verdict::GoOn)
        .expect("the tree can be dumped");
    // The original still has them.
    let result = worker(&criu).restore(&places.restore(), &mut |_, _| Verdict::GoOn);
    let text = result.expect_err("its pids are taken").to_string();
    assert!(text.contains("has a pid that the tree needs"), "{text}");
    assert!(tree.counts());
}

#[test]
fn a_failure_carries_the_log_and_what_to_do() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let error = worker(&criu)
        .restore(&places.restore(), &mut |_, _| Verdict::GoOn)
        .expect_err("an empty directory cannot be restored");
    let CriuError::Failed(failure) = error else {
        panic!("{error}");
    };
    assert!(!failure.lines.is_empty(), "{failure:?}");
    assert!(failure.log.ends_with("work/restore.log"), "{failure:?}");
}

#[test]
fn a_tree_in_a_foreign_session_is_explained() {
    let Some(criu) = criu() else { return };
    let places = Places::new();
    let mut child = Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sleep starts");
    let result = worker(&criu).dump(&places.dump(child.id()), &mut |_, _| Verdict::GoOn);
    child.kill().expect("our child can be killed");
    child.wait().expect("our child can be reaped");
    let text = result.expect_err("not a session leader").to_string();
    assert!(text.contains("--shell-job"), "{text}");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let error = Worker::start(Path::new("/nowhere/criu"), None, None)
        .expect_err("there is no such program");
    assert!(error.to_string().contains("/nowhere/criu"), "{error}");
}

#[test]
fn a_program_that_fails_is_quoted() {
    let directory = tempfile::tempdir().expect("a scratch directory");
    let script = directory.path().join("criu");
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o755)
        .open(&script)
        .and_then(|mut file| {
            io::Write::write_all(&mut file, b"#!/bin/sh\necho no libnftables >&2\nexit 3\n")
        })
        .expect("a script is written");
    let mut worker = match Worker::start(&script, None, None) {
        Ok(worker) => worker,
        // Another test forked while the script was open for writing.
        Err(CriuError::Start { source, .. }) if source.raw_os_error() == Some(26) => return,
        Err(error) => panic!("{error}"),
    };
    let text = worker.probe().expect_err("it ended").to_string();
    assert!(
        text.contains("exit status: 3") && text.contains("no libnftables"),
        "{text}"
    );
}
