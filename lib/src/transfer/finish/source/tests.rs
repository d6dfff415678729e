use std::process::{Child, Command};

use super::super::sample_about;
use super::*;
use crate::testing::SmallDisk;
use crate::transport::{self, Identity};
use crate::tree::Tree;
use crate::wire::MigrationId;

/// A journal whose destination cannot be reached, and a tree of one process.
struct Stage {
    state: Option<tempfile::TempDir>,
    journal: Journal<SourceState>,
    lease: Lease,
    child: Child,
    stop: tokio::sync::watch::Sender<bool>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Stage {
    fn new(change: impl FnOnce(&mut SourceAbout)) -> Self {
        let state = tempfile::tempdir().expect("a directory");
        let mut stage = Self::below(state.path(), change);
        stage.state = Some(state);
        stage
    }

    fn below(state: &std::path::Path, change: impl FnOnce(&mut SourceAbout)) -> Self {
        let child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let identity = state.join("identity.pem");
        let key = Identity::generate().expect("a key");
        key.save(&identity).expect("saved");
        let mut about = SourceAbout {
            tree: Tree::of([child.id()]),
            // Nobody listens there.
            addresses: vec!["127.0.0.1:1".parse().expect("an address")],
            peer: key.fingerprint().to_string(),
            identity,
            work: state.join("work"),
            ..sample_about()
        };
        change(&mut about);
        let (journal, lease) =
            Journal::create(state, MigrationId([7; 16]), about).expect("a journal");
        Self {
            state: None,
            journal,
            lease,
            child,
            stop: tokio::sync::watch::Sender::new(false),
        }
    }

    fn at(self, states: &[SourceState]) -> Self {
        for state in states {
            self.journal.advance(*state, "").expect("in order");
        }
        self
    }

    async fn finish(&self, patience: Duration) -> SourceOutcome {
        self.try_finish(patience)
            .await
            .expect("nothing is in the way")
    }

    async fn try_finish(&self, patience: Duration) -> Result<SourceOutcome, FinishError> {
        let options = FinishOptions {
            patience,
            target: None,
            transport: transport::Options::default(),
            stop: self.stop.subscribe(),
        };
        finish_source(&self.journal, &self.lease, &options).await
    }

    fn state(&self) -> SourceState {
        self.journal.read().expect("readable").state()
    }

    /// As a CRIU that was killed leaves it.
    async fn be_stopped(&self) {
        let process = crate::tree::Process::of(self.child.id()).expect("it runs");
        assert!(process.signal(rustix::process::Signal::STOP).unwrap());
        assert!(self.comes_to('T').await);
    }

    async fn comes_to(&self, state: char) -> bool {
        for _ in 0..100 {
            let stat = crate::preflight::Stat::of(self.child.id());
            if stat.is_some_and(|stat| stat.state == state) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    fn runs(&self) -> bool {
        let stat = crate::preflight::Stat::of(self.child.id());
        stat.is_some_and(|stat| !matches!(stat.state, 'Z' | 'X'))
    }
}

const SOON: Duration = Duration::from_millis(300);
const TO_COMMIT: [SourceState; 3] = [
    SourceState::Freezing,
    SourceState::Fencing,
    SourceState::Committed,
];

#[tokio::test]
async fn before_the_commit_the_tree_runs_on_and_the_journal_stays_until_that_is_told() {
    let stage = Stage::new(|_| {}).at(&[SourceState::Freezing]);
    let outcome = stage.finish(SOON).await;
    assert!(
        matches!(outcome, SourceOutcome::Kept { told: false, .. }),
        "{outcome:?}"
    );
    assert_eq!(stage.state(), SourceState::Kept);
    assert!(stage.runs());
}

#[tokio::test]
async fn after_the_commit_nothing_is_decided_here() {
    let stage = Stage::new(|_| {}).at(&TO_COMMIT);
    let outcome = stage.finish(SOON).await;
    assert!(matches!(outcome, SourceOutcome::Held { .. }), "{outcome:?}");
    assert_eq!(stage.state(), SourceState::Committed);
    assert!(stage.runs(), "it was ended");
}

#[tokio::test]
async fn an_operator_takes_it_back_while_it_is_held() {
    let stage = Stage::new(|_| {}).at(&TO_COMMIT);
    let decide = async {
        tokio::time::sleep(SOON).await;
        let decided = stage.journal.decide(Keep::Source, "a test");
        decided.expect("recorded");
    };
    let (outcome, ()) = tokio::join!(stage.finish(Duration::from_secs(3)), decide);
    assert!(
        matches!(outcome, SourceOutcome::Kept { told: false, .. }),
        "{outcome:?}"
    );
    assert!(stage.runs());
}

#[tokio::test]
async fn an_operator_gives_it_away_while_it_is_held() {
    let stage = Stage::new(|_| {}).at(&TO_COMMIT);
    stage
        .journal
        .decide(Keep::Destination, "a test")
        .expect("recorded");
    let outcome = stage.finish(SOON).await;
    assert!(matches!(outcome, SourceOutcome::Held { .. }), "{outcome:?}");
    assert_eq!(stage.state(), SourceState::Committed);
    assert!(!stage.runs(), "it was not ended");
}

#[tokio::test]
async fn a_policy_decides_when_its_time_has_come() {
    let stage = Stage::new(|about| {
        about.on_partition = OnPartition::KeepSource;
        about.partition_wait_ms = 500;
    })
    .at(&TO_COMMIT);
    let early = stage.finish(Duration::from_millis(250)).await;
    assert!(matches!(early, SourceOutcome::Held { .. }), "{early:?}");
    let late = stage.finish(Duration::from_secs(2)).await;
    assert!(matches!(late, SourceOutcome::Kept { .. }), "{late:?}");
    let decided = stage.journal.read().expect("readable").decided;
    assert_eq!(decided, Some((Keep::Source, "--on-partition".to_owned())));
}

#[tokio::test]
async fn a_workload_that_runs_there_is_ended_here() {
    let stage = Stage::new(|_| {}).at(&TO_COMMIT).at(&[SourceState::Moved]);
    let outcome = stage.finish(SOON).await;
    assert!(
        matches!(outcome, SourceOutcome::Moved { .. }),
        "{outcome:?}"
    );
    assert_eq!(stage.state(), SourceState::Over);
    assert!(!stage.runs());
    // Again, as a guard and an operator may do.
    assert!(matches!(
        stage.finish(SOON).await,
        SourceOutcome::Moved { .. }
    ));
}

#[tokio::test]
async fn a_frozen_tree_that_is_gone_is_the_operators_to_judge() {
    let mut stage = Stage::new(|_| {}).at(&[SourceState::Freezing, SourceState::Fencing]);
    stage.child.kill().expect("ours");
    stage.child.wait().expect("ours");
    let outcome = stage.finish(SOON).await;
    assert!(
        matches!(outcome, SourceOutcome::Undecided { .. }),
        "{outcome:?}"
    );
    assert_eq!(stage.state(), SourceState::Fencing);
}

#[tokio::test]
async fn who_is_asked_to_stop_leaves_the_tree_held() {
    let stage = Stage::new(|_| {}).at(&TO_COMMIT);
    stage.stop.send_replace(true);
    let begun = now();
    let outcome = stage.finish(Duration::from_secs(60)).await;
    assert!(matches!(outcome, SourceOutcome::Held { .. }), "{outcome:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(stage.state(), SourceState::Committed);
}

#[tokio::test]
async fn on_a_full_disk_the_tree_is_released_first_and_recorded_later() {
    let place = tempfile::tempdir().expect("a directory");
    let Some(disk) = SmallDisk::mount(place.path(), 64).expect("mount starts") else {
        return;
    };
    let before = [SourceState::Freezing, SourceState::Fencing];
    let stage = Stage::below(place.path(), |_| {}).at(&before);
    stage.be_stopped().await;
    disk.fill(&stage.journal);
    let outcome = stage.try_finish(SOON).await;
    assert!(
        matches!(outcome, Err(FinishError::Journal(_))),
        "{outcome:?}"
    );
    assert_eq!(stage.state(), SourceState::Fencing, "nothing was recorded");
    assert!(stage.comes_to('S').await, "it was not woken");

    std::fs::remove_file(disk.filler()).expect("there");
    let outcome = stage.finish(SOON).await;
    assert!(matches!(outcome, SourceOutcome::Kept { .. }), "{outcome:?}");
    assert_eq!(stage.state(), SourceState::Kept);
}

#[tokio::test]
async fn on_a_full_disk_what_was_committed_stays_held() {
    let place = tempfile::tempdir().expect("a directory");
    let Some(disk) = SmallDisk::mount(place.path(), 64).expect("mount starts") else {
        return;
    };
    let stage = Stage::below(place.path(), |_| {}).at(&TO_COMMIT);
    stage.be_stopped().await;
    let decided = stage.journal.decide(Keep::Source, "a test");
    decided.expect("recorded");
    disk.fill(&stage.journal);
    let outcome = stage.try_finish(SOON).await;
    assert!(
        matches!(outcome, Err(FinishError::Journal(_))),
        "{outcome:?}"
    );
    tokio::time::sleep(SOON).await;
    assert!(stage.comes_to('T').await, "it was let go");
}

#[test]
fn the_journal_stays_while_the_network_lock_cannot_be_removed() {
    let stage = Stage::new(|about| {
        about.bound = vec!["192.0.2.1".parse().expect("an address")];
        // No table can have that name.
        about.run_id = Some("no id".to_owned());
    })
    .at(&TO_COMMIT)
    .at(&[SourceState::Moved, SourceState::Over]);
    let root = stage.state.as_ref().expect("its own").path();
    let open = || Journal::open(root, stage.journal.id()).expect("readable");
    assert_eq!(clear_source(open().expect("there")).ok(), Some(false));
    let journal = open().expect("it stays");
    let noted = journal.note(|about| about.bound.clear());
    noted.expect("recorded");
    assert_eq!(clear_source(journal).ok(), Some(true));
    assert!(open().is_none());
}

#[tokio::test]
async fn the_last_hook_runs_once_whoever_ends_the_migration() {
    let place = tempfile::tempdir().expect("a directory");
    let said = place.path().join("said");
    let hooks = |about: &mut SourceAbout| {
        let line = format!("echo $CRXFER_MOMENT $CRXFER_MIGRATION >>{}", said.display());
        about.hooks = vec![
            format!("after-abort={line}"),
            format!("after-commit={line}"),
        ];
        about.hook_limit_ms = 5000;
    };
    let mut kept = Stage::new(hooks);
    for _ in 0..2 {
        let outcome = kept.finish(Duration::ZERO).await;
        assert!(matches!(outcome, SourceOutcome::Kept { .. }), "{outcome:?}");
    }
    let text = || std::fs::read_to_string(&said).expect("it has run");
    assert_eq!(text(), "after-abort sample\n");
    kept.child.kill().expect("ours");

    let moved = Stage::new(hooks).at(&[
        SourceState::Freezing,
        SourceState::Fencing,
        SourceState::Committed,
        SourceState::Moved,
    ]);
    for _ in 0..2 {
        let outcome = moved.finish(Duration::ZERO).await;
        assert!(
            matches!(outcome, SourceOutcome::Moved { .. }),
            "{outcome:?}"
        );
    }
    assert_eq!(text(), "after-abort sample\nafter-commit sample\n");
}
