use std::os::fd::AsRawFd as _;
use std::path::Path;

use super::*;
use crate::sink::{Holder, Memory, Sink as _};
use crate::wire::MigrationId;

const ID: MigrationId = MigrationId([7; 16]);

fn about(place: PathBuf, memory: Vec<Holder>, work: &Path) -> DestinationAbout {
    DestinationAbout {
        name: "sample".to_owned(),
        peer: String::new(),
        address: "127.0.0.1:1".parse().expect("an address"),
        place,
        memory,
        work: Some(work.to_owned()),
        facts: Vec::new(),
        options: crate::wire::RestoreOptions::default(),
        runtime: None,
        container: String::new(),
        program: "/nonexistent/criu".into(),
        config_file: None,
        hooks: Vec::new(),
        hook_limit_ms: 1000,
        boot: boot_id(),
        criu: None,
        pid: None,
        root: None,
        announced: false,
        heard: false,
    }
}

/// A memory with the images of a complete copy, and who holds it; `None` where there can be none.
fn held() -> Option<(Memory, Holder, PathBuf)> {
    if !rustix::process::geteuid().is_root() {
        println!("not tried: a file system in memory needs root");
        return None;
    }
    let memory = Memory::create(1 << 20).expect("made");
    let place = memory.path().join(ID.to_string());
    fs::create_dir_all(place.join(standby::FINAL)).expect("made");
    let number = memory.descriptor().expect("it has one").as_raw_fd();
    let holder = Holder::here(number).expect("it is this process");
    Some((memory, holder, place))
}

fn complete(state: &Path, about: DestinationAbout) -> (Journal<DestinationState>, Lease) {
    let (journal, lease) = Journal::create(state, ID, about).expect("a journal");
    journal
        .advance(DestinationState::Complete, "")
        .expect("recorded");
    (journal, lease)
}

fn state_of(journal: &Journal<DestinationState>) -> DestinationState {
    journal.read().expect("readable").state()
}

#[test]
fn copy_in_memory_is_held_where_any_process_has_it_and_gone_with_the_last() {
    let Some((memory, holder, place)) = held() else {
        return;
    };
    let state = tempfile::tempdir().expect("a directory");
    let mut dead = holder.clone();
    dead.process.started += 1;
    // As the journal of a receiver that has died: its guard is this process.
    let recorded = Path::new("/proc/1/fd/9999").join(ID.to_string());
    let about = about(recorded, vec![dead, holder], &state.path().join("work"));
    let (journal, lease) = complete(state.path(), about);
    let outcome = finish_destination(&journal, &lease, Verdict::Ask).expect("it is there");
    let images = place.join(standby::FINAL);
    assert_eq!(outcome, DestinationOutcome::Held { place: images });
    drop(memory);
    // Even where the source has committed: its tree is all there is.
    let outcome = finish_destination(&journal, &lease, Verdict::Commit).expect("removed");
    assert!(
        matches!(outcome, DestinationOutcome::Removed { .. }),
        "{outcome:?}"
    );
    assert_eq!(state_of(&journal), DestinationState::Removed);
}

#[test]
fn copy_that_was_to_run_and_never_did_is_removed_when_its_images_are_lost() {
    let Some((memory, holder, place)) = held() else {
        return;
    };
    let state = tempfile::tempdir().expect("a directory");
    let about = about(place, vec![holder], &state.path().join("work"));
    let (journal, lease) = complete(state.path(), about);
    journal
        .advance(DestinationState::Resuming, "")
        .expect("recorded");
    drop(memory);
    let outcome = finish_destination(&journal, &lease, Verdict::Ask).expect("removed");
    assert!(
        matches!(outcome, DestinationOutcome::Removed { .. }),
        "{outcome:?}"
    );
}

#[test]
fn nothing_is_decided_about_what_cannot_be_seen() {
    let Some((memory, mut holder, place)) = held() else {
        return;
    };
    let state = tempfile::tempdir().expect("a directory");
    holder.pid_namespace = "pid:[1]".to_owned();
    let about = about(place, vec![holder], &state.path().join("work"));
    let (journal, lease) = complete(state.path(), about);
    for verdict in [Verdict::Ask, Verdict::Commit] {
        let error = finish_destination(&journal, &lease, verdict).expect_err("unseen");
        assert!(
            error.to_string().contains("from their pid namespace"),
            "{error}"
        );
    }
    assert_eq!(state_of(&journal), DestinationState::Complete);
    drop(memory);
}

#[test]
fn memory_of_an_earlier_boot_is_lost_whoever_has_those_pids_now() {
    let Some((memory, holder, place)) = held() else {
        return;
    };
    let mut about = about(place, vec![holder], Path::new("/nonexistent"));
    assert!(matches!(about.place(), Ok(Some(_))));
    about.boot = "another".to_owned();
    assert_eq!(about.place(), Ok(None));
    drop(memory);
}
