//! Commands that play a runtime, with scripts that play CRIU.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use super::action::{self, SOCKET, SOCKET_NAME};
use super::command::{External, Variables, run_to_end};
use super::memory::{Door, Memory};
use crate::criu::{CriuError, Operation, Stage, Verdict};
use crate::runtime::{ActionProgram, RestoreCommand};

/// What this test binary does as the action program: `report` with the variables that it is given.
const ACT: &str = "CRXFER_TEST_ACT";

// Called by the scripts of the tests below, in a process of its own.
#[test]
fn acts_where_it_is_told_to() {
    if std::env::var_os(ACT).is_none() {
        return;
    }
    let goes_on = action::report(|name| std::env::var_os(name)).unwrap_or(false);
    std::process::exit(if goes_on { 0 } else { 1 });
}

/// This binary, that test.
fn program() -> ActionProgram {
    let words = [
        "--exact",
        "transfer::external::tests::acts_where_it_is_told_to",
        "--nocapture",
    ];
    ActionProgram {
        program: std::env::current_exe().unwrap(),
        args: words.iter().map(Into::into).collect(),
    }
}

/// A shell that is CRIU as far as its script can tell: at each stage, it runs that and looks at its code.
fn criu(stages: &str) -> String {
    format!(
        "export {ACT}=1 CRTOOLS_INIT_PID=$$ CRTOOLS_IMAGE_DIR=/proc/$$/fd/9; exec 9<\"$CRXFER_IMAGES\"; \
         for stage in {stages}; do \
         CRTOOLS_SCRIPT_ACTION=$stage \"$CRXFER_ACTION_SCRIPT\" >/dev/null 2>&1 || exit 7; done"
    )
}

fn start(place: &Path, operation: Operation, command: &str) -> External {
    let images = place.join("images");
    if !images.exists() {
        fs::create_dir(&images).unwrap();
    }
    let variables: Variables = vec![("CRXFER_NAME", "sample".to_owned())];
    External::start(operation, command, place, &images, variables, &program()).unwrap()
}

#[test]
fn a_command_is_asked_at_its_stages_and_ends_well() {
    let place = tempfile::tempdir().unwrap();
    let stages = "pre-dump network-lock post-dump";
    let mut external = start(place.path(), Operation::Dump, &criu(stages));
    let mut seen = Vec::new();
    let result = external.run(&mut |report| {
        assert_eq!(report.criu.map(|criu| criu.pid), report.root);
        assert!(report.images.is_dir(), "{}", report.images.display());
        seen.push(report.stage);
        Verdict::GoOn
    });
    result.unwrap();
    // The others cost a process each, and nobody needs them.
    assert_eq!(seen, [Stage::PreDump, Stage::PostDump]);
}

#[test]
fn nothing_runs_before_it_is_told_to() {
    let place = tempfile::tempdir().unwrap();
    let external = start(place.path(), Operation::Dump, "touch \"$CRXFER_WORK/ran\"");
    std::thread::sleep(Duration::from_millis(50));
    assert!(external.leader().is_there());
    let leader = external.leader();
    drop(external);
    assert!(crate::tree::within(Duration::from_secs(5), || !leader.is_there()));
    assert!(!place.path().join("work/ran").exists());
}

#[test]
fn a_refusal_reaches_the_script_and_is_no_death() {
    let place = tempfile::tempdir().unwrap();
    let mut external = start(place.path(), Operation::Dump, &criu("pre-dump post-dump"));
    let error = external
        .run(&mut |report| match report.stage {
            Stage::PostDump => Verdict::Refuse,
            _ => Verdict::GoOn,
        })
        .unwrap_err();
    assert!(
        matches!(
            error,
            CriuError::Refused {
                stage: Stage::PostDump,
                ..
            }
        ),
        "{error}"
    );
    assert!(!error.has_died());
}

#[test]
fn a_command_that_never_asked_has_not_dumped_well() {
    let place = tempfile::tempdir().unwrap();
    let mut external = start(place.path(), Operation::Dump, "true");
    let error = external.run(&mut |_| Verdict::GoOn).unwrap_err();
    assert!(
        error.to_string().contains("CRXFER_ACTION_SCRIPT"),
        "{error}"
    );
}

#[test]
fn a_restore_that_never_asked_may_have_left_a_copy() {
    let place = tempfile::tempdir().unwrap();
    let mut external = start(place.path(), Operation::Restore, "true");
    let error = external.run(&mut |_| Verdict::GoOn).unwrap_err();
    assert!(error.to_string().contains("a copy may run"), "{error}");
    assert!(action::has_begun(place.path()));
    assert_eq!(action::builder(place.path()), None);

    let place = tempfile::tempdir().unwrap();
    let mut external = start(place.path(), Operation::Restore, "exit 3");
    external.run(&mut |_| Verdict::GoOn).unwrap_err();
    assert!(!action::has_begun(place.path()));
}

#[test]
fn criu_that_builds_a_copy_is_known_to_who_comes_later() {
    let place = tempfile::tempdir().unwrap();
    let mut external = start(place.path(), Operation::Restore, &criu("pre-restore"));
    let mut asked = None;
    let _ = external.run(&mut |report| {
        asked = report.criu;
        Verdict::GoOn
    });
    assert!(asked.is_some());
    assert_eq!(action::builder(place.path()), asked);
}

#[test]
fn what_a_failing_command_said_is_quoted_and_its_criu_is_taken_for_dead() {
    let place = tempfile::tempdir().unwrap();
    let failing = format!("{}; echo 'no such container' >&2; exit 4", criu("pre-dump"));
    let mut external = start(place.path(), Operation::Dump, &failing);
    let error = external.run(&mut |_| Verdict::GoOn).unwrap_err();
    assert!(error.to_string().contains("no such container"), "{error}");
    assert!(error.has_died());
    // Its log says that it tidied up.
    let failing = format!(
        "{}; echo 'Error: Dumping FAILED.' >\"$CRXFER_WORK/dump.log\"; exit 4",
        criu("pre-dump")
    );
    let mut external = start(place.path(), Operation::Dump, &failing);
    let error = external.run(&mut |_| Verdict::GoOn).unwrap_err();
    assert!(!error.has_died(), "{error}");
    let log = place.path().join("work/dump.log");
    assert!(error.to_string().contains(log.to_str().unwrap()), "{error}");
}

#[test]
fn a_cancelled_command_that_does_not_end_is_killed() {
    let place = tempfile::tempdir().unwrap();
    let mut external = start(place.path(), Operation::Dump, "sleep 1000 & wait");
    let canceller = external.canceller();
    let leader = external.leader();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        canceller.kill();
    });
    let error = external.run(&mut |_| Verdict::GoOn).unwrap_err();
    killer.join().unwrap();
    assert!(matches!(error, CriuError::Cancelled { .. }), "{error}");
    assert!(!leader.is_there());
}

#[test]
fn a_script_whose_migration_is_gone_refuses_until_the_copy_was_let_go() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join(SOCKET_NAME);
    let at = |stage: &'static str| {
        let socket = socket.clone();
        action::report(move |name| match name {
            "CRTOOLS_SCRIPT_ACTION" => Some(stage.into()),
            "CRTOOLS_INIT_PID" => Some("77".into()),
            SOCKET => Some(socket.clone().into()),
            _ => None,
        })
    };
    assert!(at("pre-restore").is_err() && at("post-restore").is_err() && at("post-dump").is_err());
    assert!(action::has_begun(place.path()));
    assert_eq!(action::resumed(place.path()), None);
    assert!(at("post-resume").unwrap());
    assert_eq!(action::resumed(place.path()), Some(77));
    action::forget(place.path());
    assert!(!action::has_begun(place.path()));
}

#[test]
fn a_criu_of_no_migration_goes_on() {
    let images = tempfile::tempdir().unwrap();
    let report = |stage: &'static str| {
        let images = images.path().to_owned();
        action::report(move |name| match name {
            "CRTOOLS_SCRIPT_ACTION" => Some(stage.into()),
            "CRTOOLS_IMAGE_DIR" => Some(images.clone().into()),
            _ => None,
        })
    };
    assert!(report("post-dump").unwrap() && report("post-restore").unwrap());
    // Named by its images, and nobody is there.
    let socket = images.path().join("gone.sock");
    let pointer = images.path().join(action::POINTER);
    fs::write(pointer, socket.as_os_str().as_encoded_bytes()).unwrap();
    report("post-restore").unwrap_err();
}

#[test]
fn only_a_script_for_every_criu_is_a_hold() {
    let ours = action::script(&program()).unwrap();
    assert!(action::asks(&ours));
    assert!(action::asks(
        "#!/bin/sh\nlog\nexec /etc/criu/crxfer-action\n"
    ));
    assert!(!action::asks(""));
    let cut = &ours[..ours.len() - 8];
    assert!(!action::asks(cut), "{cut}");
    assert!(!action::asks(
        "#!/bin/sh\n# not /etc/criu/crxfer-action any more\n"
    ));
    let place = tempfile::Builder::new()
        .prefix("crxfer-")
        .tempdir()
        .unwrap();
    let (_listener, script) = action::listen(place.path(), &program()).unwrap();
    let of_a_migration = fs::read_to_string(script).unwrap();
    assert!(!action::asks(&of_a_migration), "{of_a_migration}");
}

#[test]
fn memory_comes_by_the_door_or_lies_in_files_or_never_comes() {
    let door = Door::open().unwrap();
    let keeper = door.keeper();
    let mut criu = TcpStream::connect(door.address().unwrap()).unwrap();
    criu.write_all(b"x").unwrap();
    assert!(matches!(door.wait(), Some(Memory::Stream(_))));
    assert!(!keeper.is_in("/images".as_ref()), "it was sent");

    let door = Door::open().unwrap();
    assert!(door.keeper().is_in("/images".as_ref()));
    assert!(matches!(door.wait(), Some(Memory::Files(path)) if path == Path::new("/images")));

    let door = Door::open().unwrap();
    let keeper = door.keeper();
    let (tell, told) = mpsc::channel();
    let waiting = std::thread::spawn(move || tell.send(door.wait().is_none()));
    keeper.close();
    assert!(told.recv_timeout(Duration::from_secs(5)).unwrap());
    waiting.join().unwrap().unwrap();
}

#[test]
fn tidying_commands_are_given_up_in_time() {
    let work = tempfile::tempdir().unwrap();
    let run = |command: &str, limit| run_to_end(command, work.path(), Vec::new(), limit);
    let long = Duration::from_secs(10);
    run("touch \"$CRXFER_WORK/here\"", long).unwrap();
    assert!(work.path().join("here").exists());
    assert!(run("exit 3", long).unwrap_err().contains("exit status: 3"));
    assert!(run("sleep 100", Duration::from_millis(50)).is_err());
}

#[test]
fn names_of_containers_are_plain() {
    assert!(RestoreCommand::can_name("web-1.a_b"));
    for bad in ["", "../x", ".x", "-x", "a b", "a;b", "a/b", "ü"] {
        assert!(!RestoreCommand::can_name(bad), "{bad}");
    }
}
