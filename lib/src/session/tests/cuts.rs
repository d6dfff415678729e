use std::time::Duration;

use super::*;
use crate::testing::{Conditions, Ended, transfer};

/// Cuts the transfer of `sets` to `store` after `cut` bytes, then tries again.
fn cut_and_resume(conditions: &Conditions, sets: &[MemorySet], store: &MemoryStore, cut: u64) {
    let about = format!("seed {}, cut after {cut} bytes", conditions.seed);
    let before = store.published.len();
    let lacked = novel(sets, store);
    let cut_short = Conditions {
        cut_after: Some(cut),
        ..conditions.clone()
    };
    let first = transfer(cut_short, sets, store.clone());
    assert!(matches!(first.source, Err(Ended::Cut)), "{about}");
    // Sets before the last may stand; and the last, when only its acknowledgement was lost.
    let done = first.store.published.len() - before;
    for (published, set) in first.store.published[before..].iter().zip(sets) {
        assert!(published.files == set.files, "{about}");
    }
    let said_all = first.destination.is_ok() || done < sets.len();
    assert!(said_all, "published without the end: {about}");

    let second = transfer(conditions.clone(), sets, first.store);
    second.source.as_ref().expect(&about);
    assert_published(&second.store, &sets[sets.len() - 1..], &about);
    let arrived = first.arrived.into_iter().collect();
    assert_sent(&second, &(&lacked - &arrived), &about);
}

fn small_set() -> MemorySet {
    // Enough blocks that a segment's digest is asked for; the last is short.
    let mut pages = [[0; 4096], [7; 4096], [7; 4096], [0; 4096]].concat();
    pages.extend([6; 100]);
    let files = vec![
        ("core-1.img".to_owned(), b"a core".to_vec()),
        ("pages-1.img".to_owned(), pages),
        ("pipes.img".to_owned(), b"some pipes".to_vec()),
    ];
    MemorySet::new("1", 4096, files)
}

fn quick(seed: u64) -> Conditions {
    Conditions {
        jitter: Duration::from_millis(seed % 3 * 10),
        packet: 1500,
        streams: 2,
        compress: false,
        ..Conditions::new(seed)
    }
}

#[test]
fn a_cut_at_any_byte_of_an_eager_transfer_loses_nothing() {
    let (set, store) = ([small_set()], MemoryStore::default());
    let whole = transfer(quick(1), &set, store.clone());
    for cut in 0..whole.delivered {
        cut_and_resume(&quick(1), &set, &store, cut);
    }
}

#[test]
fn a_cut_at_any_byte_of_an_asking_transfer_loses_nothing() {
    let mut other = small_set();
    other.name = "other".into();
    other.files[1].1[4 * 4096] = 9;
    let store = transfer(quick(2), &[other], MemoryStore::default()).store;
    let set = [small_set()];
    let whole = transfer(quick(2), &set, store.clone());
    for cut in 0..whole.delivered {
        cut_and_resume(&quick(2), &set, &store, cut);
    }
}

#[test]
fn cuts_anywhere_in_large_transfers_lose_nothing() {
    for seed in 100..130 {
        let mut scene = Scene::new(seed);
        let length = 1 + scene.rng.index(3);
        let sets = scene.chain(length);
        let store = if scene.rng.once_in(2) {
            MemoryStore::default()
        } else {
            transfer(
                Conditions::new(seed),
                &[scene.set("other")],
                MemoryStore::default(),
            )
            .store
        };
        let whole = transfer(Conditions::new(seed), &sets, store.clone());
        let cut = scene.rng.below(whole.delivered);
        cut_and_resume(&Conditions::new(seed), &sets, &store, cut);
    }
}

#[test]
fn many_cuts_in_a_row_end_in_a_whole_set() {
    let mut scene = Scene::new(9);
    let sets = [scene.set("1")];
    let mut store = MemoryStore::default();
    let mut literals = Vec::new();
    for round in 0.. {
        let conditions = Conditions {
            cut_after: Some(200_000 * (round + 1)),
            ..Conditions::new(round)
        };
        let outcome = transfer(conditions, &sets, store);
        store = outcome.store;
        literals.extend(outcome.arrived);
        if outcome.source.is_ok() {
            break;
        }
        assert!(round < 1000, "no progress");
    }
    assert_published(&store, &sets, "after many cuts");
    let distinct: BTreeSet<_> = literals.iter().copied().collect();
    assert_eq!(
        distinct.len(),
        literals.len(),
        "what arrived was sent again"
    );
}
