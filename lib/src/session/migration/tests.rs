mod model;
mod simulation;

use std::time::{Duration, Instant};

use super::*;
use crate::page::PageSize;
use crate::session::{SessionError, SourceConfig};
use crate::wire::{
    Hello, MIGRATION_VERSION, Message, MigrationId, Offer, Offered, RestoreOptions, Step, Welcome,
};

const LIMIT: Duration = Duration::from_secs(10);

fn config() -> SourceConfig {
    SourceConfig {
        software: "test".into(),
        ticket_proof: None,
        expected_proof: None,
    }
}

fn welcome(version: u32) -> Message {
    Message::Welcome(Welcome {
        version,
        software: "test".into(),
        ticket_proof: None,
        layout: crate::wire::Layout::Faithful,
        max_set_bytes: None,
    })
}

struct Pair {
    now: Instant,
    source: MigrationSource,
    destination: MigrationDestination,
    // What the drivers were told to do.
    at_source: Vec<MigrationSourceCommand>,
    at_destination: Vec<MigrationDestinationCommand>,
}

fn offer() -> Offer {
    Offer {
        id: MigrationId([1; 16]),
        name: "web".into(),
        page_size: PageSize::new(4096).unwrap(),
        memory_bytes: 1,
        facts: Vec::new(),
        options: RestoreOptions::default(),
        dry_run: false,
        keeping: crate::wire::Keeping::AsSet,
        runtime: String::new(),
        container: String::new(),
    }
}

fn offered() -> Offered {
    Offered {
        checks: Vec::new(),
        restore_ns: 1,
        criu: "4.2.1".into(),
    }
}

impl Pair {
    #[expect(clippy::disallowed_methods, reason = "any moment to count from")]
    fn new() -> Self {
        let now = Instant::now();
        let mut pair = Self {
            now,
            source: MigrationSource::new(config(), offer(), LIMIT, now),
            destination: MigrationDestination::new(now),
            at_source: Vec::new(),
            at_destination: Vec::new(),
        };
        assert!(matches!(
            pair.source.poll_command(),
            Some(MigrationSourceCommand::Send(Message::Hello(Hello {
                versions: (2, _),
                ..
            })))
        ));
        pair.source
            .handle_message(now, welcome(MIGRATION_VERSION))
            .unwrap();
        // The offer is what the destination begins with.
        assert!(matches!(
            pair.source.poll_command(),
            Some(MigrationSourceCommand::Send(Message::Migration(
                Step::Offer(_)
            )))
        ));
        pair.destination.offered(now, offered(), false);
        pair.exchange();
        pair
    }

    fn exchange(&mut self) {
        loop {
            if let Some(command) = self.source.poll_command() {
                match command {
                    MigrationSourceCommand::Send(message) => {
                        self.destination.handle_message(self.now, message).unwrap();
                    }
                    other => self.at_source.push(other),
                }
            } else if let Some(command) = self.destination.poll_command() {
                match command {
                    MigrationDestinationCommand::Send(message) => {
                        self.source.handle_message(self.now, message).unwrap();
                    }
                    other => self.at_destination.push(other),
                }
            } else {
                return;
            }
        }
    }

    fn iterate(&mut self) {
        let number = self.source.begin_iteration();
        self.destination.iteration_begun(number, false).unwrap();
        self.source.end_iteration();
        self.destination.stored(self.now, number, 5, 6);
        self.exchange();
        assert!(matches!(
            self.at_source.pop(),
            Some(MigrationSourceCommand::Stored {
                stored_bytes: 5,
                ..
            })
        ));
    }

    fn freeze(&mut self) {
        let number = self.source.prepare_final(self.now);
        self.exchange();
        assert_eq!(
            self.at_destination.pop(),
            Some(MigrationDestinationCommand::PrepareFinal(number))
        );
        self.destination.final_ready(self.now);
        self.exchange();
        assert_eq!(self.at_source.pop(), Some(MigrationSourceCommand::Freeze));
        self.source.frozen(self.now);
        self.destination.iteration_begun(number, true).unwrap();
        self.source.end_final();
    }

    fn build(&mut self) {
        assert!(self.destination.built(self.now));
        self.exchange();
        assert_eq!(self.at_source.pop(), Some(MigrationSourceCommand::Built));
    }
}

#[test]
fn a_workload_changes_hands_once() {
    let mut pair = Pair::new();
    pair.iterate();
    pair.iterate();
    pair.freeze();
    pair.build();
    assert_eq!(pair.source.owner(), Owner::Source);
    assert_eq!(pair.destination.owner(), Owner::Source);
    assert!(pair.source.commit(pair.now));
    assert_eq!(pair.source.owner(), Owner::InDoubt);
    pair.exchange();
    assert_eq!(
        pair.at_destination.pop(),
        Some(MigrationDestinationCommand::Resume)
    );
    assert_eq!(pair.destination.owner(), Owner::Destination);
    pair.destination
        .running(pair.now, 7, 8, Vec::new(), Vec::new());
    pair.exchange();
    assert!(matches!(
        pair.at_source.pop(),
        Some(MigrationSourceCommand::Running { pid: 7, .. })
    ));
    assert_eq!(pair.source.owner(), Owner::Destination);
    assert!(pair.destination.is_over());
}

#[test]
fn before_the_commit_either_side_can_give_up_at_any_step() {
    type Advance = fn(&mut Pair);
    let steps: [Advance; 4] = [
        |_| (),
        Pair::iterate,
        Pair::freeze,
        |pair| {
            pair.freeze();
            pair.build();
        },
    ];
    for advance in steps {
        let mut pair = Pair::new();
        advance(&mut pair);
        assert!(pair.source.abort(pair.now, "the operator\nsaid so"));
        assert!(!pair.source.commit(pair.now), "too late to commit");
        assert_eq!(pair.source.owner(), Owner::Source);
        pair.exchange();
        let reason = "the operator said so".to_owned();
        assert_eq!(
            pair.at_destination.pop(),
            Some(MigrationDestinationCommand::Remove { reason })
        );
        assert!(
            !pair.destination.built(pair.now),
            "a late vote says nothing"
        );
        pair.destination.aborted(pair.now);
        pair.exchange();
        assert_eq!(pair.at_source.pop(), Some(MigrationSourceCommand::Aborted));
    }
}

#[test]
fn after_the_commit_nobody_gives_up() {
    let mut pair = Pair::new();
    pair.freeze();
    pair.build();
    assert!(pair.source.commit(pair.now));
    assert!(!pair.source.abort(pair.now, "too late"));
    assert_eq!(pair.source.owner(), Owner::InDoubt);
    // And no freeze limit ends it any more.
    pair.source
        .handle_timeout(pair.now + LIMIT + LIMIT)
        .unwrap();
}

#[test]
fn a_freeze_ends_at_its_limit() {
    let mut pair = Pair::new();
    pair.freeze();
    assert_eq!(pair.source.poll_timeout(), pair.now + LIMIT);
    assert_eq!(
        pair.source.handle_timeout(pair.now + LIMIT),
        Err(SessionError::FreezeLimit(LIMIT))
    );
    assert_eq!(pair.source.owner(), Owner::Source);
    assert!(pair.source.abort(pair.now, "the freeze limit"));
}

/// The driver may be busy when the limit passes, and take the vote before the clock.
#[test]
fn no_commit_is_sent_when_the_freeze_limit_has_passed() {
    let mut pair = Pair::new();
    pair.freeze();
    pair.build();
    assert!(!pair.source.commit(pair.now + LIMIT));
    assert_eq!(pair.source.owner(), Owner::Source);
    assert!(pair.source.poll_command().is_none());
}

/// It was an error of the protocol on the destination, which its operator read of every refusal.
#[test]
fn a_refused_offer_may_be_taken_back() {
    let mut pair = Pair::new();
    pair.destination = MigrationDestination::new(pair.now);
    pair.destination.offered(pair.now, offered(), true);
    while pair.destination.poll_command().is_some() {}
    assert!(pair.source.abort(pair.now, "refused"));
    pair.exchange();
    assert_eq!(pair.at_source.pop(), Some(MigrationSourceCommand::Aborted));
    assert!(pair.destination.is_over());
}

#[test]
fn a_destination_takes_no_commit_that_it_did_not_vote_for() {
    let mut pair = Pair::new();
    pair.freeze();
    let commit = Message::Migration(Step::Commit);
    assert!(pair.destination.handle_message(pair.now, commit).is_err());
    assert_eq!(pair.destination.owner(), Owner::Source);
}

#[test]
fn iterations_come_in_order() {
    let mut pair = Pair::new();
    assert!(pair.destination.iteration_begun(2, false).is_err());
    assert!(pair.destination.iteration_begun(1, true).is_err());
    pair.destination.iteration_begun(1, false).unwrap();
    let skipped = Message::Migration(Step::PrepareFinal(3));
    assert!(pair.destination.handle_message(pair.now, skipped).is_err());
}

#[test]
fn an_older_peer_is_named_as_such() {
    #[expect(clippy::disallowed_methods, reason = "any moment to count from")]
    let now = Instant::now();
    let mut source = MigrationSource::new(config(), offer(), LIMIT, now);
    let refused = source.handle_message(now, welcome(1));
    assert!(matches!(refused, Err(SessionError::Version { .. })));
}
