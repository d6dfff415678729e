use std::time::Duration;

use super::*;
use crate::session::{SILENCE_LIMIT, SessionError};
use crate::testing::{Conditions, Ended, Side, World, transfer};
use crate::wire::Message;

fn set() -> MemorySet {
    MemorySet::new("1", 4096, vec![("pages-1.img".into(), vec![3; 40960])])
}

/// `side` says nothing from its message number `from` on.
fn muted(side: Side, from: usize) -> Outcome {
    let mut said = 0;
    let world = World::new(Conditions::new(1), &[set()], MemoryStore::default());
    let tampered = world.with_tamper(|unit| {
        if unit.from == side {
            said += 1;
            if said > from {
                unit.bytes.clear();
            }
        }
    });
    tampered.run()
}

fn assert_silent<T: std::fmt::Debug>(result: &Result<T, Ended>, elapsed: Duration) {
    let silent = Ended::Session(SessionError::Silent(SILENCE_LIMIT.as_secs()));
    assert_eq!(result.as_ref().err(), Some(&silent));
    let limit = SILENCE_LIMIT..SILENCE_LIMIT + Duration::from_secs(2);
    assert!(limit.contains(&elapsed), "{elapsed:?}");
}

#[test]
fn a_destination_that_falls_silent_is_an_error() {
    for from in 0..3 {
        let outcome = muted(Side::Destination, from);
        assert_silent(&outcome.source, outcome.elapsed);
        assert!(outcome.store.published.is_empty());
    }
}

#[test]
fn a_source_that_falls_silent_is_an_error() {
    for from in 0..4 {
        let outcome = muted(Side::Source, from);
        assert_silent(&outcome.destination, outcome.elapsed);
        assert!(outcome.store.published.is_empty());
    }
}

#[test]
fn a_destination_that_stores_for_an_hour_is_waited_for() {
    let conditions = Conditions {
        storing: Duration::from_secs(3600),
        ..Conditions::new(1)
    };
    let outcome = transfer(conditions, &[set()], MemoryStore::default());
    assert!(outcome.source.is_ok() && outcome.destination.is_ok());
}

#[test]
fn a_source_that_reads_for_an_hour_is_waited_for() {
    let conditions = Conditions {
        work: Duration::from_secs(3600),
        ..Conditions::new(1)
    };
    let outcome = transfer(conditions, &[set()], MemoryStore::default());
    assert!(outcome.elapsed > Duration::from_secs(60));
    assert!(outcome.source.is_ok() && outcome.destination.is_ok());
}

#[test]
fn a_long_wait_without_working_is_an_error() {
    let conditions = Conditions {
        storing: Duration::from_secs(3600),
        ..Conditions::new(1)
    };
    let world = World::new(conditions, &[set()], MemoryStore::default());
    let tampered = world.with_tamper(|unit| {
        if unit.from == Side::Destination && unit.message() == Some(Message::Working) {
            unit.bytes.clear();
        }
    });
    let outcome = tampered.run();
    let silent = SessionError::Silent(SILENCE_LIMIT.as_secs());
    assert_eq!(outcome.source, Err(Ended::Session(silent)));
    assert!(outcome.store.published.is_empty());
}
