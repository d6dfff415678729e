//! Histories of a hand-over: all short ones with one or two faults, many long ones at random.

use std::collections::BTreeMap;
use std::time::Duration;

use super::model::{Conditions, Ending, Fault, Model, Side};
use crate::testing::Rng;

const BOTH: [Side; 2] = [Side::Source, Side::Destination];

fn quiet(iterations: u32) -> Conditions {
    Conditions {
        seed: 1,
        iterations,
        freeze_limit: Duration::from_secs(10),
        most_delay: Duration::from_millis(20),
        faults: Vec::new(),
        refused: false,
    }
}

// One of each, with what a side may learn of it: at once, late, never.
fn faults() -> Vec<Fault> {
    let learns = [
        Some(Duration::ZERO),
        Some(Duration::from_millis(15)),
        Some(Duration::from_secs(30)),
        None,
    ];
    let mut faults = vec![Fault::Stop];
    for side in BOTH {
        faults.extend([Fault::Crash(side), Fault::Fail(side), Fault::Hang(side)]);
        faults.extend(learns.map(|learns| Fault::Deaf(side, learns)));
    }
    faults
}

fn is_crash_of_source(fault: &Fault) -> bool {
    matches!(fault, Fault::Crash(Side::Source))
}

fn run(conditions: &Conditions, endings: &mut BTreeMap<Ending, usize>) -> Ending {
    let (ending, _) = Model::new(conditions.clone()).run();
    if ending == Ending::BothAfterCrash {
        let faults = &conditions.faults;
        assert!(
            faults.iter().any(|(_, it)| is_crash_of_source(it)),
            "{conditions:?}"
        );
    }
    *endings.entry(ending).or_default() += 1;
    ending
}

#[test]
fn without_a_fault_the_workload_moves() {
    for iterations in 0..5 {
        let (ending, _) = Model::new(quiet(iterations)).run();
        assert_eq!(ending, Ending::AtDestination);
    }
    let refused = Conditions {
        refused: true,
        ..quiet(0)
    };
    assert_eq!(Model::new(refused).run().0, Ending::AtSource);
}

#[test]
fn one_or_two_faults_at_every_message_never_make_two_owners() {
    let mut endings = BTreeMap::new();
    for iterations in 0..2 {
        let (_, messages) = Model::new(quiet(iterations)).run();
        for at in 0..=messages {
            for fault in faults() {
                let conditions = |faults| Conditions {
                    faults,
                    ..quiet(iterations)
                };
                run(&conditions(vec![(at, fault)]), &mut endings);
                // A second one at each message from there on.
                for (later, second) in (at..=messages).flat_map(|later| {
                    [
                        Fault::Stop,
                        Fault::Crash(Side::Destination),
                        Fault::Deaf(Side::Source, Some(Duration::from_millis(15))),
                        Fault::Deaf(Side::Destination, None),
                    ]
                    .map(|second| (later, second))
                }) {
                    run(
                        &conditions(vec![(at, fault), (later, second)]),
                        &mut endings,
                    );
                }
            }
        }
    }
    println!("{endings:?}");
    assert_eq!(endings.len(), 5, "each kind of ending is met: {endings:?}");
}

/// What only stops the link, or the one side's work, and is noticed, leaves a doubt only between the
/// commit and its answer.
#[test]
fn a_fault_before_the_commit_leaves_the_workload_at_the_source() {
    let (_, messages) = Model::new(quiet(1)).run();
    let mut doubts = 0;
    for at in 0..=messages {
        for fault in [
            Fault::Stop,
            Fault::Fail(Side::Source),
            Fault::Fail(Side::Destination),
        ] {
            let conditions = Conditions {
                faults: vec![(at, fault)],
                ..quiet(1)
            };
            match Model::new(conditions).run().0 {
                Ending::AtSource | Ending::AtDestination => {}
                Ending::InDoubtItRuns | Ending::InDoubtItDoesNot => doubts += 1,
                Ending::BothAfterCrash => panic!("nobody crashed"),
            }
        }
    }
    assert!(doubts < 10, "{doubts} of {} histories", 3 * (messages + 1));
}

#[test]
fn random_histories_never_make_two_owners() {
    let mut endings = BTreeMap::new();
    let all = faults();
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let iterations = u32::try_from(rng.below(6)).unwrap();
        let count = rng.below(4);
        let faults = (0..count).map(|_| {
            let fault = match all[rng.index(all.len())] {
                Fault::Deaf(side, Some(_)) => {
                    let learns = Duration::from_millis(rng.below(60_000) >> rng.below(12));
                    Fault::Deaf(side, Some(learns))
                }
                other => other,
            };
            (rng.index(50), fault)
        });
        let faults = faults.collect();
        let conditions = Conditions {
            seed,
            iterations,
            freeze_limit: Duration::from_millis(50 << rng.below(8)),
            most_delay: Duration::from_millis(1 << rng.below(16)),
            faults,
            refused: rng.once_in(50),
        };
        run(&conditions, &mut endings);
    }
    println!("{endings:?}");
    assert!(endings[&Ending::AtSource] > 500 && endings[&Ending::AtDestination] > 500);
    assert!(endings.contains_key(&Ending::InDoubtItRuns));
}
