//! Histories of a hand-over: all short ones with one or two faults, many long ones at random.

use std::collections::BTreeMap;
use std::time::Duration;

use super::model::{BOTH, Conditions, Fault, Model, Mutation, Outcome, Runs, Side};
use crate::handover::{Keep, OnPartition};
use crate::testing::Rng;

fn quiet(iterations: u32) -> Conditions {
    Conditions {
        seed: 1,
        iterations,
        freeze_limit: Duration::from_secs(10),
        most_delay: Duration::from_millis(20),
        faults: Vec::new(),
        refused: false,
        unreliable: 0,
        policy: OnPartition::Hold,
        mutation: None,
    }
}

// How many histories there are: docs/PROTOCOL.md and docs/TESTING.md say so.
const SINGLES: usize = 5_952;
const EVEN_PAIRS: usize = 181_440;
const ODD_PAIRS: usize = 174_720;
const RECOVERIES: usize = 7_000;

// One of each, with what a side may learn of it: at once, late, never.
fn faults() -> Vec<Fault> {
    let learns = [
        Some(Duration::ZERO),
        Some(Duration::from_millis(15)),
        Some(Duration::from_secs(30)),
        None,
    ];
    let mut faults = vec![
        Fault::Stop,
        Fault::Serve,
        Fault::Cut(Some(Duration::from_secs(25))),
        Fault::Cut(None),
    ];
    for side in BOTH {
        faults.extend([
            Fault::Crash(side),
            Fault::Criu(side, false),
            Fault::Criu(side, true),
            Fault::Guard(side),
            Fault::All(side),
            Fault::Reboot(side, false),
            Fault::Reboot(side, true),
            Fault::Fail(side),
            Fault::Hang(side),
            Fault::Recover(side),
        ]);
        faults.extend(learns.map(|learns| Fault::Deaf(side, learns)));
    }
    faults
}

// Those that leave another world behind: the others differ in when a side learns of them.
fn second_faults() -> Vec<Fault> {
    let mut faults = vec![Fault::Serve, Fault::Cut(Some(Duration::from_secs(25)))];
    for side in BOTH {
        faults.extend([
            Fault::Crash(side),
            Fault::Criu(side, true),
            Fault::Guard(side),
            Fault::All(side),
            Fault::Reboot(side, true),
            Fault::Recover(side),
        ]);
    }
    faults.push(Fault::Deaf(Side::Source, Some(Duration::from_millis(15))));
    faults
}

#[derive(Debug, Default)]
struct Endings {
    counts: BTreeMap<(Runs, Runs), usize>,
    asked: usize,
    excused: usize,
}

impl Endings {
    fn add(&mut self, conditions: &Conditions) -> Outcome {
        let outcome = Model::run(conditions).unwrap_or_else(|broken| panic!("{broken}"));
        let host_went = |(_, fault): &(usize, Fault)| matches!(fault, Fault::Reboot(..));
        if outcome.asked || outcome.excused {
            // Only a host that forgets, or dies with the workload, needs an operator.
            let known = conditions.faults.iter().any(host_went);
            assert!(known, "asked: {}", Model::history(conditions));
        }
        self.asked += usize::from(outcome.asked);
        self.excused += usize::from(outcome.excused);
        *self.counts.entry((outcome.quiet, outcome.end)).or_default() += 1;
        outcome
    }

    fn histories(&self) -> usize {
        self.counts.values().sum()
    }
}

fn moments(conditions: &Conditions) -> usize {
    Model::run(conditions).unwrap().moments
}

#[test]
fn without_a_fault_the_workload_moves() {
    let mut endings = Endings::default();
    for iterations in 0..5 {
        let outcome = endings.add(&quiet(iterations));
        assert_eq!((outcome.quiet, outcome.end), (Runs::Copy, Runs::Copy));
    }
    let refused = Conditions {
        refused: true,
        ..quiet(0)
    };
    assert_eq!(endings.add(&refused).quiet, Runs::Tree);
}

#[test]
fn every_single_fault_at_every_moment_ends_with_one_that_runs() {
    let mut endings = Endings::default();
    for iterations in 0..2 {
        for seed in 1..4 {
            let quiet = Conditions {
                seed,
                ..quiet(iterations)
            };
            for at in 0..=moments(&quiet) {
                for fault in faults() {
                    endings.add(&Conditions {
                        faults: vec![(at, fault)],
                        ..quiet.clone()
                    });
                }
            }
        }
    }
    println!("{} histories: {endings:?}", endings.histories());
    assert_eq!(endings.histories(), SINGLES);
}

// Two tests, so that they run side by side.
#[test]
fn every_pair_of_faults_that_begins_at_an_even_moment_ends_with_one_that_runs() {
    assert_eq!(pairs(0), EVEN_PAIRS);
}

#[test]
fn every_pair_of_faults_that_begins_at_an_odd_moment_ends_with_one_that_runs() {
    assert_eq!(pairs(1), ODD_PAIRS);
}

fn pairs(parity: usize) -> usize {
    let mut endings = Endings::default();
    let last = moments(&quiet(0));
    for at in (parity..=last).step_by(2) {
        for fault in faults() {
            // What follows the fault has moments, too.
            for later in at..=last + 12 {
                for second in second_faults() {
                    endings.add(&Conditions {
                        faults: vec![(at, fault), (later, second)],
                        ..quiet(0)
                    });
                }
            }
        }
    }
    println!("{} histories: {endings:?}", endings.histories());
    endings.histories()
}

/// Whoever may finish a migration does so in any order, and twice.
#[test]
fn whatever_dies_any_order_of_recovery_ends_it() {
    let mut endings = Endings::default();
    let recoveries = [
        Fault::Recover(Side::Source),
        Fault::Recover(Side::Destination),
        Fault::Serve,
        Fault::Guard(Side::Source),
        Fault::Guard(Side::Destination),
    ];
    let deaths = [
        Fault::Crash(Side::Source),
        Fault::Crash(Side::Destination),
        Fault::All(Side::Source),
        Fault::All(Side::Destination),
        Fault::Reboot(Side::Destination, true),
    ];
    let last = moments(&quiet(0));
    for at in 0..=last {
        for fault in deaths {
            for first in recoveries {
                for second in recoveries {
                    for gap in [0, 2] {
                        endings.add(&Conditions {
                            faults: vec![
                                (at, fault),
                                (at + 1 + gap, first),
                                (at + 2 + 2 * gap, second),
                            ],
                            ..quiet(0)
                        });
                    }
                }
            }
        }
    }
    println!("{} histories: {endings:?}", endings.histories());
    assert_eq!(endings.histories(), RECOVERIES);
}

#[test]
fn a_link_that_stays_cut_leaves_both_holding_until_an_operator_decides() {
    let mut held = 0;
    for at in 0..=moments(&quiet(0)) {
        for keep in [Keep::Source, Keep::Destination] {
            for crash in [None, Some(Side::Source), Some(Side::Destination)] {
                let mut faults = vec![(at, Fault::Cut(None))];
                faults.extend(crash.map(|side| (at + 2, Fault::Crash(side))));
                let conditions = Conditions { faults, ..quiet(0) };
                let mut model = Model::until_quiet(&conditions).unwrap();
                if !model.both_hold() {
                    continue;
                }
                assert_eq!(model.runs(), Runs::Neither);
                held += 1;
                model.operator_decides(keep).unwrap();
                let expected = match keep {
                    Keep::Source => Runs::Tree,
                    Keep::Destination => Runs::Copy,
                };
                assert_eq!(model.runs(), expected, "{model}");
                // And the hosts agree when they meet again.
                model.finish().unwrap_or_else(|broken| panic!("{broken}"));
                assert_eq!(model.runs(), expected, "{model}");
            }
        }
    }
    assert!(held > 5, "{held}");
}

/// The operator says the same on both sides while the source's word is still on its way.
#[test]
fn the_same_decision_on_both_sides_is_safe_at_any_moment() {
    decisions(None).unwrap_or_else(|broken| panic!("{broken}"));
}

fn decisions(mutation: Option<Mutation>) -> Result<(), String> {
    let last = moments(&quiet(0));
    for at in 0..=last {
        for heals in [16, 18, 20, 30] {
            for later in 0..30 {
                for gap in 0..4 {
                    let cut = Fault::Cut(Some(Duration::from_secs(heals)));
                    let conditions = Conditions {
                        faults: vec![(at, cut)],
                        mutation,
                        ..quiet(0)
                    };
                    let probe = Model::until_quiet(&Conditions {
                        faults: vec![(at, Fault::Cut(None))],
                        ..conditions.clone()
                    })?;
                    if !probe.both_hold() {
                        continue;
                    }
                    let first = at + later;
                    let mut faults = conditions.faults.clone();
                    faults.push((first, Fault::Decide(Side::Destination, Keep::Source)));
                    faults.push((first + gap, Fault::Decide(Side::Source, Keep::Source)));
                    Model::run(&Conditions {
                        faults,
                        ..conditions
                    })?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn each_policy_does_what_its_help_says() {
    let mut seen = BTreeMap::new();
    for policy in [OnPartition::KeepSource, OnPartition::KeepDestination] {
        for at in 0..=moments(&quiet(0)) {
            for heals in [None, Some(40)] {
                let conditions = Conditions {
                    faults: vec![(at, Fault::Cut(heals.map(Duration::from_secs)))],
                    policy,
                    ..quiet(0)
                };
                let model = Model::until_quiet(&conditions).unwrap();
                let runs = model.runs();
                match policy {
                    OnPartition::KeepSource => {
                        assert_eq!(
                            runs == Runs::Both,
                            model.heard_commit() && runs != Runs::Copy,
                            "{model}"
                        );
                        assert_ne!(runs, Runs::Neither, "{model}");
                    }
                    _ => assert_ne!(runs, Runs::Both, "{model}"),
                }
                if heals.is_some() && policy == OnPartition::KeepDestination {
                    assert_ne!(runs, Runs::Neither, "told when the link is back: {model}");
                }
                *seen
                    .entry((policy == OnPartition::KeepSource, runs))
                    .or_insert(0) += 1;
            }
        }
    }
    println!("{seen:?}");
    assert!(seen.contains_key(&(true, Runs::Both)));
    assert!(seen.contains_key(&(false, Runs::Neither)));
}

/// The policy that may run two: when the hosts have met, the operator's word ends it either way.
#[test]
fn where_a_policy_has_made_two_run_an_operator_ends_one() {
    let mut seen = 0;
    for at in 0..=moments(&quiet(0)) {
        for keep in [Keep::Source, Keep::Destination] {
            let conditions = Conditions {
                faults: vec![(at, Fault::Cut(Some(Duration::from_secs(40))))],
                policy: OnPartition::KeepSource,
                ..quiet(0)
            };
            let mut model = Model::until_quiet(&conditions).unwrap();
            if model.runs() == Runs::Both {
                seen += 1;
                model.operator_decides(keep).unwrap();
                model.finish().unwrap_or_else(|broken| panic!("{broken}"));
                let expected = match keep {
                    Keep::Source => Runs::Tree,
                    Keep::Destination => Runs::Copy,
                };
                assert_eq!(model.runs(), expected, "{model}");
            }
        }
    }
    assert!(seen > 1);
}

/// CRIU's restore may refuse for good when the source has committed: the tree is still there.
#[test]
fn a_copy_that_cannot_be_built_again_goes_back_by_an_operators_word() {
    let mut given_back = 0;
    for at in 0..=moments(&quiet(0)) {
        for fault in [
            Fault::Criu(Side::Destination, true),
            Fault::All(Side::Destination),
            Fault::Reboot(Side::Destination, true),
        ] {
            let conditions = Conditions {
                faults: vec![(at, Fault::NoRestore), (at, fault)],
                ..quiet(0)
            };
            let outcome = Model::run(&conditions).unwrap_or_else(|broken| panic!("{broken}"));
            if outcome.asked && !outcome.excused {
                assert_eq!(outcome.end, Runs::Tree, "{}", Model::history(&conditions));
                given_back += 1;
            }
        }
    }
    assert!(given_back > 3, "{given_back}");
}

#[test]
fn random_histories_end_with_one_that_runs() {
    let mut endings = Endings::default();
    for seed in 0..10_000 {
        endings.add(&random(seed));
    }
    println!("{} histories: {endings:?}", endings.histories());
    assert!(endings.counts[&(Runs::Tree, Runs::Tree)] > 500);
    assert!(endings.counts[&(Runs::Copy, Runs::Copy)] > 500);
    assert!(
        endings
            .counts
            .keys()
            .any(|(quiet, _)| *quiet == Runs::Neither)
    );
}

fn random(seed: u64) -> Conditions {
    let all = faults();
    let mut rng = Rng::new(seed);
    let iterations = u32::try_from(rng.below(6)).unwrap();
    let count = rng.below(6);
    let faults = (0..count).map(|_| {
        let late = |rng: &mut Rng| Duration::from_millis(rng.below(60_000) >> rng.below(12));
        let fault = match all[rng.index(all.len())] {
            Fault::Deaf(side, Some(_)) => Fault::Deaf(side, Some(late(&mut rng))),
            Fault::Cut(Some(_)) => Fault::Cut(Some(late(&mut rng))),
            other => other,
        };
        (rng.index(90), fault)
    });
    let faults = faults.collect();
    Conditions {
        seed,
        iterations,
        freeze_limit: Duration::from_millis(50 << rng.below(8)),
        most_delay: Duration::from_millis(1 << rng.below(16)),
        faults,
        refused: rng.once_in(50),
        unreliable: rng.below(6),
        policy: if rng.once_in(4) {
            OnPartition::KeepDestination
        } else {
            OnPartition::Hold
        },
        mutation: None,
    }
}

/// A test must be able to fail: each rule that is broken on purpose is found.
#[test]
fn rules_that_are_broken_on_purpose_are_found() {
    let found = |mutation, rule: &str| {
        let last = moments(&quiet(0));
        let histories = (0..=last).flat_map(|at| {
            faults().into_iter().flat_map(move |fault| {
                [None, Some(Fault::Serve)].map(move |second| {
                    let mut faults = vec![(at, fault)];
                    faults.extend(second.map(|second| (at + 4, second)));
                    Conditions {
                        faults,
                        mutation: Some(mutation),
                        ..quiet(0)
                    }
                })
            })
        });
        let broken = histories.filter_map(|conditions| Model::run(&conditions).err());
        let broken: Vec<String> = broken.collect();
        assert!(
            broken.iter().any(|text| text.starts_with(rule)),
            "{mutation:?} gives {:?}",
            broken.first()
        );
        println!("{mutation:?}: {} histories", broken.len());
    };
    found(Mutation::RemovesOnLoss, "none runs");
    found(Mutation::NoFence, "two run");
    found(Mutation::DoesNotLook, "the copy is older");
    found(Mutation::ThawsCommitted, "two run");
    found(Mutation::SendsFirst, "two run");
    found(Mutation::LetsGoFirst, "none runs");
    let broken = decisions(Some(Mutation::CommitBeatsOperator)).unwrap_err();
    assert!(broken.starts_with("two run"), "{broken}");
}
