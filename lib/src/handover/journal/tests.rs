use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::handover::OnPartition;
use crate::tree::{Tree, boot_id};

type Source = Journal<SourceState>;

const ID: MigrationId = MigrationId([7; 16]);

fn about(name: &str) -> SourceAbout {
    SourceAbout {
        name: name.into(),
        tree: Tree {
            boot: boot_id(),
            processes: Vec::new(),
        },
        addresses: vec!["10.0.0.2:4433".parse().unwrap()],
        peer: "key".into(),
        identity: "/identity".into(),
        work: "/work".into(),
        run_id: None,
        foreign_tables: Vec::new(),
        criu: None,
        command: None,
        forget: None,
        fence: None,
        partition_wait_ms: 0,
        on_partition: OnPartition::Hold,
        bound: Vec::new(),
        hook_addresses: Vec::new(),
        hooks: Vec::new(),
        hook_limit_ms: 0,
        hooked: false,
    }
}

fn begun() -> (tempfile::TempDir, Source, Lease) {
    let root = tempfile::tempdir().unwrap();
    let (journal, lease) = Source::create(&root.path().join("state"), ID, about("web")).unwrap();
    (root, journal, lease)
}

fn again(journal: &Source) -> Source {
    let root = journal.directory().parent().unwrap();
    Source::open(root, ID).unwrap().unwrap()
}

fn states(journal: &Source) -> Vec<SourceState> {
    let history = journal.read().unwrap();
    history.entries.iter().map(|entry| entry.state).collect()
}

#[test]
fn what_two_processes_note_both_stays() {
    let (_root, journal, _lease) = begun();
    let other = again(&journal);
    let mut seen = journal.read().unwrap().about;
    other.note(|about| about.run_id = Some("7".into())).unwrap();
    journal
        .note(|about| about.foreign_tables.push("t".into()))
        .unwrap();
    let found = other.read().unwrap().about;
    seen.run_id = Some("7".into());
    seen.foreign_tables.push("t".into());
    assert_eq!(found, seen);
}

#[test]
fn what_is_recorded_is_read_by_another_process() {
    let (_root, journal, _lease) = begun();
    journal.advance(SourceState::Freezing, "because").unwrap();
    journal.note(|it| *it = about("renamed")).unwrap();
    journal.decide(Keep::Destination, "policy").unwrap();
    journal.decide(Keep::Source, "root").unwrap();
    let history = again(&journal).read().unwrap();
    assert_eq!(history.about, about("renamed"));
    assert_eq!(history.state(), SourceState::Freezing);
    assert_eq!(history.entries[1].note, "because");
    assert!(history.since() > UNIX_EPOCH);
    assert_eq!(history.decided, Some((Keep::Source, "root".into())));
    assert_eq!(history.keep(), Some(Keep::Source));
}

#[test]
fn nobody_else_can_read_it() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_root, journal, _lease) = begun();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(journal.directory()), 0o700);
    assert_eq!(mode(journal.directory().parent().unwrap()), 0o700);
    assert_eq!(mode(&journal.path()), 0o600);
}

#[test]
fn a_step_that_may_not_follow_is_refused_and_not_recorded() {
    let (_root, journal, _lease) = begun();
    let refused = journal.advance(SourceState::Moved, "").unwrap_err();
    assert!(
        matches!(refused, JournalError::Overtaken { .. }),
        "{refused}"
    );
    assert_eq!(states(&journal), [SourceState::Begun]);
}

/// It was joined with the record behind it, and both were taken for torn: a commit that did not count.
#[test]
fn a_torn_last_line_does_not_count_and_goes_with_the_next_record() {
    for torn in [
        "0123",
        "01234567 {\"state\":\"comm",
        "garbage\n",
        "\0\0\0\0",
    ] {
        let (_root, journal, _lease) = begun();
        journal.advance(SourceState::Freezing, "").unwrap();
        (&journal.file).write_all(torn.as_bytes()).unwrap();
        assert_eq!(
            states(&journal),
            [SourceState::Begun, SourceState::Freezing]
        );
        journal.advance(SourceState::Fencing, "").unwrap();
        journal.advance(SourceState::Committed, "").unwrap();
        assert_eq!(
            again(&journal).read().unwrap().state(),
            SourceState::Committed
        );
        assert_eq!(states(&journal).len(), 4);
    }
}

#[test]
fn a_torn_first_state_is_the_first_state() {
    let (_root, journal, _lease) = begun();
    let bytes = fs::read(journal.path()).unwrap();
    journal.file.set_len(bytes.len() as u64 - 3).unwrap();
    assert_eq!(journal.read().unwrap().state(), SourceState::Begun);
    journal.advance(SourceState::Freezing, "").unwrap();
    assert_eq!(journal.read().unwrap().state(), SourceState::Freezing);
}

#[test]
fn damage_in_the_middle_is_named_and_nothing_is_added_behind_it() {
    let (_root, journal, _lease) = begun();
    journal.advance(SourceState::Freezing, "").unwrap();
    let mut bytes = fs::read(journal.path()).unwrap();
    let second = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    bytes[second + 20] ^= 1;
    fs::write(journal.path(), &bytes).unwrap();
    let error = journal.read().unwrap_err();
    assert!(
        matches!(error, JournalError::Damaged { line: 2, .. }),
        "{error}"
    );
    let directory = journal.directory().display().to_string();
    assert!(
        error.to_string().ends_with(&format!("remove {directory}")),
        "{error}"
    );
    assert!(journal.advance(SourceState::Fencing, "").is_err());
    assert!(journal.decide(Keep::Source, "root").is_err());
    assert_eq!(fs::read(journal.path()).unwrap(), bytes);
}

#[test]
fn a_whole_last_line_that_is_not_understood_is_not_taken_for_torn() {
    let (_root, journal, _lease) = begun();
    let json = r#"{"state":{"state":"of-a-later-version","at_ms":1,"note":""}}"#;
    let line = format!("{} {json}\n", checksum(json));
    (&journal.file).write_all(line.as_bytes()).unwrap();
    assert!(matches!(
        journal.read(),
        Err(JournalError::Damaged { line: 3, .. })
    ));
    assert!(journal.advance(SourceState::Freezing, "").is_err());
}

#[test]
fn a_journal_without_a_header_and_one_that_is_too_long_are_refused() {
    let (_root, journal, _lease) = begun();
    journal.file.set_len(0).unwrap();
    assert!(matches!(
        journal.read(),
        Err(JournalError::Damaged { line: 1, .. })
    ));
    let (_root, journal, _lease) = begun();
    journal.file.set_len(MOST_BYTES as u64 + 1).unwrap();
    let error = journal.read().unwrap_err().to_string();
    assert!(error.contains("16777216"), "{error}");
}

#[test]
fn of_two_that_take_different_steps_at_once_one_is_told_so() {
    for _ in 0..20 {
        let (_root, journal, _lease) = begun();
        journal.advance(SourceState::Freezing, "").unwrap();
        journal.advance(SourceState::Fencing, "").unwrap();
        let (taken, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let shared = again(&journal);
        thread::scope(|scope| {
            for (index, next) in [SourceState::Committed, SourceState::Moved]
                .into_iter()
                .cycle()
                .take(6)
                .enumerate()
            {
                let own = again(&journal);
                let (taken, refused, shared) = (&taken, &refused, &shared);
                scope.spawn(move || {
                    // Threads with a file of their own, and threads that share one.
                    let journal = if index < 3 { &own } else { shared };
                    match journal.advance(next, "") {
                        Ok(()) => taken.fetch_add(1, Ordering::Relaxed),
                        Err(JournalError::Overtaken { .. }) => {
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                        Err(error) => panic!("{error}"),
                    };
                });
            }
        });
        let history = states(&journal);
        assert_eq!(history.len(), 3 + taken.load(Ordering::Relaxed));
        assert_eq!(refused.load(Ordering::Relaxed), 6 - (history.len() - 3));
        assert_eq!(history[3], SourceState::Committed);
        assert!(history.len() <= 5, "each step once: {history:?}");
    }
}

#[test]
fn the_lease_is_one_holders_until_it_ends() {
    let (_root, journal, lease) = begun();
    let other = again(&journal);
    assert!(other.lease().unwrap().is_none());
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _lease = other.await_lease().unwrap();
            send.send(()).unwrap();
        });
        let early = receive.recv_timeout(Duration::from_millis(50));
        assert!(early.is_err(), "it did not wait");
        // As when its process dies: the file is closed.
        drop(lease);
        receive.recv_timeout(Duration::from_secs(10)).unwrap();
    });
    let lease = journal.lease().unwrap();
    assert!(lease.is_some(), "free again");
    assert!(again(&journal).lease().unwrap().is_none());
}

#[test]
fn only_directories_with_a_journal_of_that_side_are_listed() {
    let (_root, journal, _lease) = begun();
    let root = journal.directory().parent().unwrap();
    fs::create_dir(root.join(format!("source-{}", MigrationId([8; 16])))).unwrap();
    fs::create_dir(root.join(format!("destination-{ID}"))).unwrap();
    fs::create_dir(root.join("source-xyz")).unwrap();
    fs::write(root.join("guard.pid"), "1").unwrap();
    // Its process died before the first lines were there.
    let unbegun = root.join(format!("source-{}", MigrationId([9; 16])));
    fs::create_dir(&unbegun).unwrap();
    fs::write(unbegun.join(UNBEGUN), "").unwrap();
    assert_eq!(Source::list(root).unwrap(), [ID]);
    assert!(Journal::<DestinationState>::list(root).unwrap().is_empty());
    assert!(Source::open(root, MigrationId([8; 16])).unwrap().is_none());
    assert!(Source::list(&root.join("nowhere")).unwrap().is_empty());
}

#[test]
fn an_id_that_is_there_is_not_begun_again() {
    let (_root, journal, _lease) = begun();
    let root = journal.directory().parent().unwrap();
    assert!(Source::create(root, ID, about("second")).is_err());
    assert_eq!(journal.read().unwrap().about.name, "web");
}

#[test]
fn a_removed_journal_leaves_nothing() {
    let (_root, journal, _lease) = begun();
    let root = journal.directory().parent().unwrap().to_owned();
    fs::write(journal.directory().join("guard.log"), "text").unwrap();
    journal.remove().unwrap();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert!(Source::open(&root, ID).unwrap().is_none());
}

#[test]
fn what_cannot_be_opened_or_written_is_named() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("state");
    fs::write(&file, "").unwrap();
    let error = Source::create(&file, ID, about("web")).unwrap_err();
    assert!(
        error.to_string().contains(file.to_str().unwrap()),
        "{error}"
    );
    assert!(Source::list(&file).is_err());
    let (_root, journal, _lease) = begun();
    fs::remove_file(journal.path()).unwrap();
    fs::create_dir(journal.path()).unwrap();
    let root = journal.directory().parent().unwrap();
    let error = Source::open(root, ID).unwrap_err();
    assert!(error.to_string().starts_with("cannot open"), "{error}");
}

#[test]
fn no_bytes_make_the_parser_panic() {
    let seeds = fuzz::journal_seeds();
    for seed in &seeds {
        fuzz::journal(seed);
        // Each byte changed, each length.
        for at in 1..seed.len() {
            fuzz::journal(&seed[..at]);
            let mut changed = seed.clone();
            changed[at] ^= 0x15;
            fuzz::journal(&changed);
        }
    }
    let parsed =
        |seed: &[u8]| parse::<SourceState>(&seed[1..], Path::new("x")).map(|it| it.0.entries.len());
    assert_eq!(parsed(&seeds[1]).unwrap(), 2, "the seeds are journals");
    let (history, _) = parse::<DestinationState>(&seeds[3][1..], Path::new("x")).unwrap();
    assert_eq!(history.state(), DestinationState::Complete);
}
