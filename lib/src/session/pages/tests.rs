use std::time::{Duration, Instant};

use super::*;
use crate::delta::SetName;
use crate::digest::Digest;
use crate::image::PagemapName;
use crate::page::PageSize;
use crate::session::{KEEP_TALKING, SILENCE_LIMIT, SessionError, SourceConfig};
use crate::wire::{
    Failure, FailureCode, Generation, HeldRun, Layout, Message, PAGES_VERSION, PagesHeld,
    PagesOffer, PagesOffered, PagesStep, PagesStored, Welcome, held_messages,
};

const FIRST: Generation = Generation {
    number: 3,
    root: Digest([7; 32]),
};

#[expect(
    clippy::disallowed_methods,
    reason = "a beginning, from which the test counts"
)]
fn now() -> Instant {
    Instant::now()
}

fn offer(known: Option<Generation>) -> PagesOffer {
    PagesOffer {
        name: SetName::new("web").unwrap(),
        page_size: PageSize::new(4096).unwrap(),
        known,
    }
}

fn config() -> SourceConfig {
    SourceConfig {
        software: "test".into(),
        ticket_proof: Some([1; 32]),
        expected_proof: Some([2; 32]),
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: PAGES_VERSION,
        software: "test".into(),
        ticket_proof: Some([2; 32]),
        layout: Layout::Faithful,
        max_set_bytes: None,
    }
}

fn held(memory: PagemapName, first: u64, pages: u64) -> Vec<PagesHeld> {
    let digests = (first..first + pages).map(|page| Digest::of(&page.to_le_bytes()));
    let digests = digests.collect();
    held_messages(memory, vec![HeldRun { first, digests }])
}

// What a source has said up to now.
fn said(source: &mut PagesSource) -> Vec<PagesSourceCommand> {
    std::iter::from_fn(|| source.poll_command()).collect()
}

fn sent(destination: &mut PagesDestination) -> Vec<Message> {
    let commands = std::iter::from_fn(|| destination.poll_command());
    commands
        .filter_map(|command| match command {
            PagesDestinationCommand::Send(message) => Some(message),
            PagesDestinationCommand::Store => None,
        })
        .collect()
}

// A source that has been welcomed and has said its offer.
fn offering(known: Option<Generation>) -> PagesSource {
    let mut source = PagesSource::new(config(), offer(known), now());
    source
        .handle_message(now(), Message::Welcome(welcome()))
        .unwrap();
    let said = said(&mut source);
    assert!(matches!(
        said.as_slice(),
        [
            PagesSourceCommand::Send(Message::Hello(_)),
            PagesSourceCommand::Send(Message::Pages(PagesStep::Offer(_)))
        ]
    ));
    source
}

// What a source begins with, when it has heard this destination out.
fn base(known: Option<Generation>, generation: Option<Generation>) -> PagesBase {
    let mut source = offering(known);
    let mut destination = PagesDestination::new(offer(known), now());
    let mut listing = held(PagemapName::Task(5), 10, 3);
    listing.extend(held(PagemapName::Shmem(2), 0, 1));
    destination.prepared(generation, true, listing);
    for message in sent(&mut destination) {
        let message = Message::decode(&message.encode()).unwrap();
        source.handle_message(now(), message).unwrap();
    }
    match said(&mut source).pop() {
        Some(PagesSourceCommand::Begin(base)) => base,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_new_source_does_not_know_is_listed() {
    let base = base(None, Some(FIRST));
    assert_eq!((base.generation, base.continues), (Some(FIRST), true));
    let known = base.listed.unwrap();
    let task = known.find(PagemapName::Task(5)).unwrap();
    assert_eq!(
        known.digest(task, 12),
        Some(Digest::of(&12u64.to_le_bytes()))
    );
    assert_eq!(known.digest(task, 13), None);
    assert_eq!(known.find(PagemapName::Shmem(2)), Some(1));
}

#[test]
fn what_the_source_knows_is_not_listed_and_nothing_is_empty() {
    assert!(base(Some(FIRST), Some(FIRST)).listed.is_none());
    let other = Generation { number: 4, ..FIRST };
    assert!(base(Some(other), Some(FIRST)).listed.is_some());
    let nothing = base(Some(FIRST), None);
    assert_eq!((nothing.generation, nothing.continues), (None, false));
    assert!(nothing.listed.unwrap().find(PagemapName::Task(5)).is_none());
}

#[test]
fn a_dump_is_stored_once_it_has_begun_and_ended() {
    let mut destination = PagesDestination::new(offer(None), now());
    assert!(!destination.is_over() && destination.dump_begun().is_err());
    destination.prepared(None, false, []);
    assert!(destination.is_over() && destination.dump_complete().is_err());
    destination.dump_begun().unwrap();
    assert!(!destination.is_over() && destination.dump_begun().is_err());
    destination.dump_complete().unwrap();
    let commands: Vec<_> = std::iter::from_fn(|| destination.poll_command()).collect();
    assert!(matches!(commands[1], PagesDestinationCommand::Store));
    let stored = PagesStored {
        generation: 1,
        pages: 2,
        fresh_pages: 2,
        stored_bytes: 8192,
        notes: Vec::new(),
    };
    destination.stored(stored.clone());
    assert!(destination.is_over());

    let mut source = offering(None);
    let nothing = PagesOffered {
        generation: None,
        listed: false,
        continues: false,
    };
    let step = |step| Message::Pages(step);
    let offered = step(PagesStep::Offered(nothing));
    source.handle_message(now(), offered).unwrap();
    source.ended();
    let stored = step(PagesStep::Stored(stored));
    source.handle_message(now(), stored.clone()).unwrap();
    assert!(matches!(
        said(&mut source).last(),
        Some(PagesSourceCommand::Stored(_))
    ));
    assert!(source.handle_message(now(), stored).is_err());
}

#[test]
fn a_source_believes_no_lie() {
    let lies: Vec<Vec<PagesStep>> = vec![
        // Stored, before anything was sent.
        vec![PagesStep::Stored(PagesStored {
            generation: 1,
            pages: 0,
            fresh_pages: 0,
            stored_bytes: 0,
            notes: Vec::new(),
        })],
        // Pages before the offer was answered.
        vec![PagesStep::Held(held(PagemapName::Task(1), 0, 1).remove(0))],
        // Neither known here nor listed.
        vec![offered(Some(FIRST), false)],
        // A listing of nothing.
        vec![offered(None, true)],
        // Memories, and pages, that do not ascend.
        [
            vec![offered(Some(FIRST), true)],
            listing(held(PagemapName::Shmem(1), 0, 1)),
            listing(held(PagemapName::Task(1), 0, 1)),
        ]
        .concat(),
        [
            vec![offered(Some(FIRST), true)],
            listing(held(PagemapName::Task(1), 5, 2)),
            listing(held(PagemapName::Task(1), 6, 1)),
        ]
        .concat(),
        // The source's own words.
        vec![PagesStep::Offer(offer(None))],
    ];
    for lie in lies {
        let mut source = offering(None);
        let mut steps = lie.into_iter().map(Message::Pages);
        let heard = steps.try_for_each(|step| source.handle_message(now(), step));
        assert!(matches!(heard, Err(SessionError::Protocol(_))), "{heard:?}");
    }
}

fn offered(generation: Option<Generation>, listed: bool) -> PagesStep {
    PagesStep::Offered(PagesOffered {
        generation,
        listed,
        continues: false,
    })
}

fn listing(held: Vec<PagesHeld>) -> Vec<PagesStep> {
    held.into_iter().map(PagesStep::Held).collect()
}

#[test]
fn a_wrong_version_and_a_wrong_proof_end_it() {
    for (welcome, is_ticket) in [
        (
            Welcome {
                version: 2,
                ..welcome()
            },
            false,
        ),
        (
            Welcome {
                ticket_proof: None,
                ..welcome()
            },
            true,
        ),
    ] {
        let mut source = PagesSource::new(config(), offer(None), now());
        let error = source.handle_message(now(), Message::Welcome(welcome));
        match error {
            Err(SessionError::Ticket) => assert!(is_ticket),
            Err(SessionError::Version { .. }) => assert!(!is_ticket),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn both_sides_talk_and_give_up_a_silent_peer() {
    let begun = now();
    let mut source = offering(None);
    let mut destination = PagesDestination::new(offer(None), begun);
    let talk = begun + KEEP_TALKING + Duration::from_secs(1);
    source.handle_timeout(talk).unwrap();
    destination.handle_timeout(talk).unwrap();
    assert!(matches!(
        said(&mut source).pop(),
        Some(PagesSourceCommand::Send(Message::Working))
    ));
    assert_eq!(sent(&mut destination), [Message::Working]);
    let silent = begun + SILENCE_LIMIT + Duration::from_secs(1);
    assert!(source.handle_timeout(silent).is_err());
    assert!(destination.handle_timeout(silent).is_err());
}

#[test]
fn a_peers_failure_is_told_in_its_words() {
    let failure = Failure::new(FailureCode::Storage, "the disk is full");
    let told = Message::Failure(failure.clone());
    let mut destination = PagesDestination::new(offer(None), now());
    let expected = Err(SessionError::Peer(failure));
    assert_eq!(destination.handle_message(now(), told.clone()), expected);
    assert_eq!(offering(None).handle_message(now(), told), expected);
}
