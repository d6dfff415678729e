//! `crxfer migrate` as far as one host goes: what is refused, and that the workload is left alone.

use std::fs;
use std::process::{Child, Command, Stdio};

use crate::sandbox::{Ended, Sandbox, published};

/// A process that could be moved; killed when dropped.
struct Workload(Child);

impl Workload {
    fn start() -> Self {
        let mut sleep = Command::new("sleep");
        let sleep = sleep.arg("600").stdin(Stdio::null());
        let child = sleep.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self(child.unwrap())
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// Neither ended nor stopped.
    #[track_caller]
    fn runs(&self) {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let state = stat.rsplit(')').next().unwrap().trim().chars().next();
        assert!(matches!(state, Some('S' | 'R')), "{stat}");
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn migrate(sandbox: &Sandbox, pid: &str, ticket: &str, args: &[&str]) -> Ended {
    let mut all = vec!["migrate", "--pid", pid, "--to", ticket];
    all.extend(args);
    sandbox.run(&all)
}

#[test]
fn wrong_usage_is_told_before_anything_happens() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&["--allow-restore"]).ticket();
    let workload = Workload::start();
    let try_with = |args: &[&str]| migrate(&sandbox, &workload.pid(), &ticket, args);
    try_with(&["--hook", "after-commit"]).refused(2, &["MOMENT=COMMAND"]);
    try_with(&["--hook", "some-day=true"]).refused(2, &["some-day", "before-source-kill"]);
    try_with(&["--hook", "address-prepare=true"]).refused(2, &["moment of the source"]);
    try_with(&["--manage-cgroups", "all"]).refused(2, &["strict"]);
    try_with(&["--downtime", "0"]).refused(2, &["milliseconds"]);
    try_with(&["--on-slow", "panic"]).refused(2, &["cancel"]);
    migrate(&sandbox, "0", &ticket, &[]).refused(2, &["--pid"]);
    // Larger than any pid can be.
    migrate(&sandbox, "4194305", &ticket, &[]).refused(2, &["no process 4194305"]);
    let own = std::process::id().to_string();
    migrate(&sandbox, &own, &ticket, &[]).refused(2, &[&own, "its own child"]);
    workload.runs();
}

#[test]
fn a_receiver_says_which_hooks_it_has() {
    let sandbox = Sandbox::new();
    let refused = |args: &[&str], words: &[&str]| sandbox.recv(args).ended().refused(2, words);
    refused(&["--hook", "after-restore=true"], &["--allow-restore"]);
    refused(
        &["--allow-restore", "--hook", "after-commit=true"],
        &["moment of the destination", "address-announce"],
    );
    assert!(!sandbox.path("recv").exists());
}

#[test]
fn a_receiver_that_was_not_told_to_restore_refuses() {
    let sandbox = Sandbox::new();
    let (mut recv, ticket) = sandbox.recv(&[]).ticket();
    let workload = Workload::start();
    let ended = migrate(&sandbox, &workload.pid(), &ticket, &["--dry-run"]);
    ended.refused(7, &["--allow-restore", "runs on here"]);
    let failed = recv.next_event();
    assert_eq!(failed["event"], "failed");
    assert!(
        failed["error"]
            .as_str()
            .unwrap()
            .contains("--allow-restore")
    );
    workload.runs();
}

#[test]
fn a_dry_run_shows_every_check_and_touches_nothing() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&["--allow-restore"]).ticket();
    let workload = Workload::start();
    let args = ["--dry-run", "--report", "checks.json"];
    let ended = migrate(&sandbox, &workload.pid(), &ticket, &args);
    // The same pid cannot be taken twice on one host.
    ended.refused(11, &["check", "nothing was touched"]);
    assert!(ended.stdout.contains("✗ "), "{ended:?}");
    assert!(ended.stdout.contains("✓ "), "{ended:?}");
    assert!(!ended.stdout.contains('\x1b'), "{ended:?}");
    let report = fs::read_to_string(sandbox.path("checks.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["exit_code"], 11);
    let failed = |check: &&serde_json::Value| check["outcome"] == "failed";
    let checks = report["checks"].as_array().unwrap();
    let failed = checks.iter().find(failed).expect("a failed check");
    assert_ne!(failed["advice"], "");
    workload.runs();
    assert_eq!(published(&sandbox.path("recv")), Vec::<String>::new());
}

#[test]
fn a_failed_check_ends_a_real_run_before_anything_is_touched() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&["--allow-restore"]).ticket();
    let workload = Workload::start();
    let ended = migrate(&sandbox, &workload.pid(), &ticket, &["--json"]);
    ended.refused(11, &["nothing was touched"]);
    let events = ended.events();
    let kinds: Vec<_> = events.iter().map(|event| &event["event"]).collect();
    assert_eq!(kinds, ["preflight", "error"], "{ended:?}");
    assert_eq!(events[1]["workload"], "source");
    assert_eq!(events[1]["untouched"], true);
    workload.runs();
}

#[test]
fn a_destination_that_is_gone_is_no_failed_check() {
    let sandbox = Sandbox::new();
    let (recv, ticket) = sandbox.recv(&["--allow-restore"]).ticket();
    drop(recv);
    let workload = Workload::start();
    migrate(&sandbox, &workload.pid(), &ticket, &["--dry-run"])
        // Nobody listens there, or the guard of the dead receiver says so.
        .refused(5, &["runs on here"]);
    workload.runs();
}

#[test]
fn help_and_man_page_teach_it() {
    let sandbox = Sandbox::new();
    let help = sandbox.run(&["migrate", "--help"]).stdout;
    for text in [
        "When to freeze:",
        "CRIU:",
        "Hooks:",
        "Connection:",
        "Examples:",
        "Exit codes:",
        " 14  ",
        "130  ",
        "before-source-kill",
        "CRXFER_ADDRESSES",
    ] {
        assert!(help.contains(text), "{text} is not in {help}");
    }
    let recv = sandbox.run(&["recv", "--help"]).stdout;
    for text in ["--allow-restore", "address-announce", "\"restored\""] {
        assert!(recv.contains(text), "{text} is not in {recv}");
    }
    assert_eq!(sandbox.run(&["man", "man"]).code, Some(0));
    let page = fs::read_to_string(sandbox.path("man/crxfer-migrate.1")).unwrap();
    assert!(page.contains(".SH \"EXIT STATUS\"") && page.contains(".SH HOOKS"));
    let completions = sandbox.run(&["completions", "bash"]).stdout;
    assert!(
        completions.contains("crxfer__migrate") || completions.contains("crxfer__subcmd__migrate")
    );
    assert!(completions.contains("--max-iterations"));
}
