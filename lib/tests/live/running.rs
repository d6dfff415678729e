//! Trees that change while they are read, and end.

use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;

use crxfer::live::{LiveError, LiveReader, ReaderOptions, tree};
use crxfer::page::PageSize;

use crate::support::{Workload, content, is_root, kill, pass, reader};

#[test]
fn mappings_and_tasks_that_come_and_go_are_no_errors() {
    if !is_root() {
        eprintln!("skipped: only root may read a process that forks and maps at will");
        return;
    }
    let Some(mut workload) = Workload::start("churn") else {
        return;
    };
    let mut reader = reader(workload.pid(), None);
    let page = PageSize::of_host().bytes();
    let begin = workload.number("steady", "address");
    for _ in 0..30 {
        let (_, pages) = pass(&mut reader);
        for index in 0..16 {
            let delivered = &pages[&(workload.task(), begin + index * page)];
            assert_eq!(*delivered, content("steady", index));
        }
    }
    assert!(workload.is_running());
}

#[test]
fn a_root_that_ends_during_a_pass_is_named() {
    let Some(workload) = Workload::start("kinds") else {
        return;
    };
    if !is_root() {
        return;
    }
    let pid = workload.pid();
    let mut reader = reader(pid, None);
    let mut killed = false;
    let error = reader
        .pass(&mut |_| {
            if !killed {
                kill(pid.into());
                killed = true;
            }
            ControlFlow::Continue(())
        })
        .unwrap_err();
    assert!(
        matches!(error, LiveError::RootGone { pid: gone } if gone == pid),
        "{error}"
    );
    let again = reader.pass(&mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(again, LiveError::RootGone { .. }), "{again}");
    kill(workload.number("child", "pid"));
}

#[test]
fn the_sink_ends_a_pass() {
    let Some(workload) = Workload::start("kinds") else {
        return;
    };
    if !is_root() {
        return;
    }
    let mut reader = reader(workload.pid(), None);
    let mut chunks = 0;
    let stopped = reader
        .pass(&mut |_| {
            chunks += 1;
            ControlFlow::Break(())
        })
        .unwrap();
    assert!(stopped.stopped && chunks == 1);
    // Nothing of the pass that was ended reaches the next one.
    let (whole, _) = pass(&mut reader);
    assert!(!whole.stopped && whole.pages > 590);
}

#[test]
fn a_rate_is_kept() {
    let Some(workload) = Workload::start("kinds") else {
        return;
    };
    if !is_root() {
        return;
    }
    let (free, _) = pass(&mut reader(workload.pid(), None));
    let options = ReaderOptions {
        bytes_per_s: Some(free.bytes * 2),
        ..ReaderOptions::default()
    };
    let mut paced = LiveReader::new(workload.pid(), PageSize::of_host(), options).unwrap();
    let (slow, _) = pass(&mut paced);
    // Half a second, less the last block.
    assert!(slow.took > Duration::from_millis(350), "{slow:?}");
    assert!(!slow.waited.is_zero(), "{slow:?}");
}

#[test]
fn a_forked_child_has_its_own_memory_and_its_place_in_the_tree() {
    let Some(workload) = Workload::start("kinds") else {
        return;
    };
    let tasks = tree(workload.pid()).unwrap();
    assert_eq!(tasks.len(), 2);
    assert_eq!(u64::from(tasks[1].pid), workload.number("child", "pid"));
    assert_eq!(tasks[1].parent, Some(workload.pid()));
}

#[test]
fn a_task_is_named_by_its_pid_in_its_own_namespace() {
    if !is_root() {
        eprintln!("skipped: only root may make a pid namespace");
        return;
    }
    let arguments = ["--pid", "--fork", "sleep", "60"];
    let workload = Workload::program("unshare", &arguments).unwrap();
    for _ in 0..500 {
        let tasks = tree(workload.pid()).unwrap();
        if let [root, inner] = &tasks[..] {
            assert_eq!(root.vpid, root.pid);
            assert_eq!((inner.vpid, &inner.threads[..]), (1, &[1][..]));
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("unshare has no child");
}
