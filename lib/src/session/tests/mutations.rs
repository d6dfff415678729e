use std::time::Duration;

use super::*;
use crate::testing::{Conditions, Side, Unit, World, transfer};

fn mutate(unit: &mut Unit, rng: &mut Rng) {
    let bytes = &mut unit.bytes;
    if bytes.is_empty() {
        return;
    }
    // Mostly near the front: that is where lengths and numbers are.
    let reach = if rng.once_in(4) {
        bytes.len()
    } else {
        bytes.len().min(64)
    };
    let at = rng.index(reach);
    match rng.below(7) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes[at] = 0,
        2 => bytes[at] = 0xff,
        3 => bytes.truncate(at),
        4 => bytes.extend_from_within(..),
        5 => {
            let len = 1 + rng.index(40);
            let noise = rng.bytes(len);
            bytes.splice(at..at, noise);
        }
        _ => {
            bytes.remove(at);
        }
    }
}

fn run(seed: u64, side: Side) -> (Outcome, MemorySet) {
    let mut scene = Scene::new(seed);
    scene.page_size = 4096;
    scene.pool.iter_mut().for_each(|page| page.truncate(4096));
    let files = vec![
        ("core-1.img".to_owned(), scene.odd_bytes(200)),
        ("ghost-file-1.img".to_owned(), scene.odd_bytes(90_000)),
        ("pages-1.img".to_owned(), scene.pages(12)),
    ];
    let set = MemorySet::new("1", 4096, files);
    let mut store = MemoryStore::default();
    if scene.rng.once_in(2) {
        let other = scene.next(&set, "other");
        let other = MemorySet {
            parent_link: None,
            ..other
        };
        store = transfer(Conditions::new(seed), &[other], store).store;
    }
    let mut units_left = scene.rng.below(12);
    let mut rng = scene.rng;
    let conditions = Conditions {
        patience: Some(Duration::from_secs(600)),
        ..Conditions::new(seed)
    };
    let world = World::new(conditions, std::slice::from_ref(&set), store);
    let tampered = world.with_tamper(|unit| {
        if unit.from == side {
            if units_left == 0 {
                mutate(unit, &mut rng);
                units_left = u64::MAX;
            }
            units_left = units_left.saturating_sub(1);
        }
    });
    (tampered.run(), set)
}

#[test]
fn a_source_whose_bytes_are_changed_publishes_nothing_else() {
    let mut refused = 0;
    for seed in 0..1500 {
        let (outcome, set) = run(seed, Side::Source);
        let published = outcome.store.published.iter();
        for published in published.filter(|published| published.name != "other") {
            assert!(published.files == set.files, "seed {seed}: other bytes");
        }
        refused += u32::from(outcome.destination.is_err());
    }
    assert!(refused > 800, "only {refused} of 1500 changes were noticed");
}

#[test]
fn a_source_lives_through_any_changed_answer() {
    for seed in 0..1500 {
        let (outcome, set) = run(seed, Side::Destination);
        let published = outcome.store.published.iter();
        for published in published.filter(|published| published.name != "other") {
            assert!(published.files == set.files, "seed {seed}: other bytes");
        }
    }
}
