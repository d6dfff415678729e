//! A destination that lies. The source says what is wrong, or finds its own set published.

use std::time::Duration;

use super::*;
use crate::testing::{Conditions, Ended, Side, Unit, World, framed, transfer};
use crate::wire::{Message, Published, SegmentAt, VERSIONS};

fn sets() -> Vec<MemorySet> {
    let page = |byte: u8| vec![byte; 4096];
    let pages = [page(1), page(0), page(2), page(3), page(4)].concat();
    let files = vec![
        ("core-1.img".to_owned(), b"hello".to_vec()),
        ("pages-1.img".to_owned(), pages),
    ];
    let first = MemorySet::new("1", 4096, files);
    let mut second = first.clone();
    second.name = "2".into();
    second.parent_link = Some("../1".into());
    vec![first, second]
}

fn lying(lie: impl FnMut(&mut Unit)) -> Outcome {
    let mut lie = lie;
    let other = vec![("x".to_owned(), vec![7; 10])];
    let other = MemorySet::new("other", 4096, other);
    let store = transfer(Conditions::new(1), &[other], MemoryStore::default()).store;
    let conditions = Conditions {
        patience: Some(Duration::from_secs(600)),
        ..Conditions::new(1)
    };
    let sets = sets();
    let world = World::new(conditions, &sets, store);
    let tampered = world.with_tamper(|unit| {
        if unit.from == Side::Destination {
            lie(unit);
        }
    });
    tampered.run()
}

#[track_caller]
fn assert_caught(outcome: &Outcome, why: &str) {
    let Err(Ended::Session(error)) = &outcome.source else {
        panic!("{:?} instead of {why:?}", outcome.source);
    };
    assert!(
        error.to_string().contains(why),
        "{error} instead of {why:?}"
    );
}

#[track_caller]
fn message_lie(why: &str, mut change: impl FnMut(&mut Message)) {
    let outcome = lying(|unit| {
        if let Some(mut message) = unit.message() {
            change(&mut message);
            unit.set_message(&message);
        }
    });
    assert_caught(&outcome, why);
}

/// `extra` follows each message for which it gives one.
#[track_caller]
fn extra_lie(why: &str, mut extra: impl FnMut(&Message) -> Option<Message>) {
    let outcome = lying(|unit| {
        if let Some(more) = unit.message().and_then(|message| extra(&message)) {
            unit.bytes.extend_from_slice(&framed(&more));
        }
    });
    assert_caught(&outcome, why);
}

#[test]
fn without_a_lie_the_sets_arrive() {
    let outcome = lying(|_| {});
    outcome.source.as_ref().unwrap();
    assert_published(&outcome.store, &sets(), "no lie");
}

#[test]
fn a_wrong_introduction_is_refused() {
    message_lie("the ticket is not one of this", |message| {
        if let Message::Welcome(welcome) = message {
            welcome.ticket_proof = Some([9; 32]);
        }
    });
    message_lie("no common protocol version", |message| {
        if let Message::Welcome(welcome) = message {
            welcome.version = *VERSIONS.end() + 1;
        }
    });
    message_lie("out of order", |message| {
        if let Message::Welcome(_) = message {
            *message = Message::Held(vec![false]);
        }
    });
}

#[test]
fn answers_of_the_wrong_length_are_caught() {
    for held in [vec![], vec![false; 2]] {
        message_lie("an answer of the wrong length", |message| {
            if let Message::Held(answers) = message {
                answers.clone_from(&held);
            }
        });
    }
    for change in [
        |lacking: &mut Vec<bool>| lacking.clear(),
        |lacking: &mut Vec<bool>| lacking.resize(16, false),
        // Five blocks: the sixth bit means nothing and must not be set.
        |lacking: &mut Vec<bool>| lacking[5] = true,
    ] {
        message_lie("an answer of the wrong length", |message| {
            if let Message::Lacking(at, lacking) = message
                && at.file == 1
            {
                change(lacking);
            }
        });
    }
}

#[test]
fn answers_to_nothing_are_caught() {
    for change in [
        |at: &mut SegmentAt| at.set += 1,
        |at: &mut SegmentAt| at.file += 7,
        |at: &mut SegmentAt| at.segment = u64::MAX,
    ] {
        message_lie("an answer to nothing", |message| {
            if let Message::SegmentState(at, _) | Message::Lacking(at, _) = message {
                change(at);
            }
        });
    }
    // Twice: the second answers nothing, or comes when nothing is asked any more.
    extra_lie("", |message| {
        matches!(message, Message::SegmentState(..)).then(|| message.clone())
    });
    extra_lie("", |message| {
        matches!(message, Message::Lacking(..)).then(|| message.clone())
    });
    // Of the other kind.
    message_lie("an answer to nothing", |message| {
        if let Message::SegmentState(at, _) = *message {
            *message = Message::Lacking(at, vec![true; 5]);
        }
    });
    message_lie("an answer to nothing", |message| {
        if let Message::Lacking(at, _) = *message {
            *message = Message::SegmentState(at, true);
        }
    });
}

#[test]
fn a_segment_answered_twice_does_not_hide_one_that_is_not() {
    // Both questions are open when the first is answered twice.
    let mut first = None;
    let outcome = lying(|unit| {
        if let Some(Message::Lacking(at, lacking)) = unit.message() {
            let (at, lacking) = first.get_or_insert((at, lacking)).clone();
            unit.set_message(&Message::Lacking(at, lacking));
        }
    });
    assert_caught(&outcome, "an answer to nothing");
}

#[test]
fn publications_out_of_turn_are_caught() {
    let published = |set| {
        Message::Published(Published {
            set,
            name: "1".into(),
            generation: 1,
            layout: crate::wire::Layout::Faithful,
            base: None,
            completeness: "complete".into(),
            unchanged: false,
            notes: Vec::new(),
        })
    };
    // In place of Welcome, of Held, and of the first answers. SetReady of an ancestor is another
    // matter: the set may stand there.
    for early in [0, 1, 3, 4] {
        let mut said = 0;
        message_lie("out of order", |message| {
            if said == early {
                *message = published(1);
            }
            said += 1;
        });
    }
    message_lie("out of order", |message| {
        if let Message::Published(published) = message {
            published.set += 1;
        }
    });
    let mut said = 0;
    let outcome = lying(|unit| {
        if said == 2 {
            unit.set_message(&published(1));
        }
        said += 1;
    });
    assert!(outcome.source.is_err(), "set 2 without room for it");
    extra_lie("out of order", |message| {
        matches!(message, Message::Published(_)).then(|| message.clone())
    });
    message_lie("out of order", |message| {
        if let Message::SetReady { set, .. } = message {
            *set += 1;
        }
    });
    extra_lie("out of order", |message| {
        matches!(message, Message::SetReady { .. }).then(|| message.clone())
    });
    extra_lie("out of order", |message| {
        let hello = crate::wire::Hello {
            versions: (1, 1),
            software: "me too".into(),
            ticket_proof: None,
        };
        matches!(message, Message::Welcome(_)).then_some(Message::Hello(hello))
    });
}

#[test]
fn blocks_claimed_to_be_held_are_not_published() {
    // It saves the source work and leaves the destination without a set.
    for change in [
        |message: &mut Message| {
            if let Message::Lacking(_, lacking) = message {
                lacking.fill(false);
            }
        },
        |message: &mut Message| {
            if let Message::SegmentState(_, held) = message {
                *held = true;
            }
        },
    ] {
        let outcome = lying(|unit| {
            if let Some(mut message) = unit.message() {
                change(&mut message);
                unit.set_message(&message);
            }
        });
        assert!(outcome.source.is_err());
        assert_eq!(
            outcome.store.published.len(),
            1,
            "only what was there before"
        );
    }
}
