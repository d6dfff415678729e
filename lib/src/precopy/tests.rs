//! One test for each rule, with iterations made up for it.

use super::*;

const MB: u64 = 1_000_000;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Dump and restore 200 ms each, no round trip.
fn costs() -> Costs {
    Costs {
        dump: ms(200),
        restore: ms(200),
        round_trip: Duration::ZERO,
    }
}

fn goals() -> Goals {
    Goals {
        freeze_limit: None,
        ..Goals::default()
    }
}

/// A policy fed with iterations of 1 GB of memory, scanned in 0.5 s, over a link of 100 MB/s.
struct Feed {
    policy: Policy,
    now: Duration,
    number: u32,
    link_mb_per_s: u64,
    scan_time: Duration,
}

impl Feed {
    fn new(goals: Goals) -> Self {
        let mut policy = Policy::new(goals, costs());
        policy.before_first(1000 * MB);
        Self {
            policy,
            now: Duration::ZERO,
            number: 0,
            link_mb_per_s: 100,
            scan_time: ms(500),
        }
    }

    fn next(&mut self, changed_mb: u64) -> Iteration {
        let send_time = ms(changed_mb * 1000 / self.link_mb_per_s);
        let begin = self.now;
        self.now += send_time.max(self.scan_time);
        self.number += 1;
        Iteration {
            number: self.number,
            begin,
            end: self.now,
            scanned_bytes: 1000 * MB,
            scan_time: self.scan_time,
            changed_bytes: changed_mb * MB,
            wire_bytes: changed_mb * MB,
            send_time,
        }
    }

    fn after(&mut self, changed_mb: u64) -> Decision {
        let done = self.next(changed_mb);
        self.policy.after(&done)
    }

    /// Iterations that change so many megabytes each, the last decision.
    fn through(&mut self, changed_mb: &[u64]) -> Decision {
        let mut decision = Decision::Again;
        for changed in changed_mb {
            assert_eq!(decision, Decision::Again, "before {changed} MB");
            decision = self.after(*changed);
        }
        decision
    }
}

/// Asserts `low <= what <= high`, in milliseconds.
fn assert_between(what: Duration, low: u64, high: u64) {
    assert!(
        what >= ms(low) && what <= ms(high),
        "{what:?} of {low} to {high} ms"
    );
}

#[test]
fn a_target_below_criu_alone_is_said_before_the_first_iteration() {
    let warning = |downtime: Option<u64>, deadline: Option<u64>| {
        let goals = Goals {
            downtime: downtime.map(ms),
            deadline: deadline.map(ms),
            ..goals()
        };
        Policy::new(goals, costs()).before_first(1000 * MB)
    };
    let criu = ms(400);
    assert_eq!(warning(None, None), None);
    assert_eq!(warning(Some(400), Some(400)), None);
    let downtime = ms(300);
    let target = Warning::CriuExceedsDowntime { criu, downtime };
    assert_eq!(warning(Some(300), None), Some(target));
    assert!(
        target
            .to_string()
            .contains("400 ms, more than --downtime 300")
    );
    let deadline = ms(300);
    assert_eq!(
        warning(Some(300), Some(300)),
        Some(Warning::CriuExceedsDeadline { criu, deadline })
    );
}

#[test]
fn an_idle_workload_is_frozen_after_the_iteration_that_shows_it() {
    let mut feed = Feed::new(goals());
    assert_eq!(feed.after(1000), Decision::Again);
    assert_eq!(feed.after(0), Decision::Freeze(Why::NoGain));
    assert_between(feed.policy.predict().downtime, 400, 410);
}

#[test]
fn iterations_go_on_while_they_shorten_the_downtime_and_no_longer() {
    let mut feed = Feed::new(goals());
    // A workload that dirties 40 MB/s. The downtime falls from 0.8 to 0.43 s, then to 0.4 s at best.
    assert_eq!(feed.through(&[1000, 250]), Decision::Again);
    assert_eq!(feed.after(63), Decision::Freeze(Why::NoGain));
}

#[test]
fn memory_that_crosses_in_no_time_needs_no_second_iteration() {
    let mut feed = Feed::new(goals());
    feed.link_mb_per_s = 100_000;
    assert_eq!(feed.after(1000), Decision::Freeze(Why::NoGain));
}

#[test]
fn several_small_gains_are_worth_as_much_as_a_large_one() {
    let mut feed = Feed::new(goals());
    feed.scan_time = ms(10);
    // A workload that dirties 90 MB/s: the next iteration saves less than a tenth of 0.63 s, but the
    // next few together more than a fifth.
    let changes = [
        1000, 818, 669, 547, 448, 366, 300, 245, 200, 164, 134, 110, 90, 73,
    ];
    assert_eq!(feed.through(&changes), Decision::Again);
    let now = feed.policy.predict();
    assert_between(now.downtime, 600, 670);
    assert_eq!(now.downtime, now.final_downtime, "one more would not do");
}

#[test]
fn a_burst_is_waited_for_but_not_for_ever() {
    let mut feed = Feed::new(goals());
    assert_eq!(feed.through(&[1000, 300, 100, 500]), Decision::Again);
    let mut decision = Decision::Again;
    for _ in 0..8 {
        if decision == Decision::Again {
            decision = feed.after(500);
        }
    }
    assert!(matches!(decision, Decision::Freeze(_)), "{decision:?}");
}

#[test]
fn a_reached_target_freezes_though_more_could_be_gained() {
    let changes = [1000, 400, 160];
    assert_eq!(Feed::new(goals()).through(&changes), Decision::Again);
    let mut feed = Feed::new(Goals {
        downtime: Some(ms(2500)),
        ..goals()
    });
    assert_eq!(feed.through(&changes), Decision::Freeze(Why::TargetReached));
}

#[test]
fn one_observation_reaches_a_target_only_if_all_of_it_would_fit() {
    let reached = |downtime| {
        Feed::new(Goals {
            downtime: Some(ms(downtime)),
            ..goals()
        })
        .through(&[1000, 100])
    };
    // 100 MB take 1 s, of which 0.1 s is hidden behind the dump.
    assert_eq!(reached(1310), Decision::Freeze(Why::TargetReached));
    assert_eq!(reached(1290), Decision::Again);
}

#[test]
fn on_slow_says_what_becomes_of_a_target_out_of_reach() {
    let end = |on_slow, max_iterations| {
        let mut feed = Feed::new(Goals {
            downtime: Some(ms(500)),
            on_slow,
            max_iterations,
            ..goals()
        });
        let mut decision = Decision::Again;
        for changed in [1000, 800, 800, 800, 800, 800, 800, 800, 800, 800] {
            if decision == Decision::Again {
                decision = feed.after(changed);
            }
        }
        (decision, feed.number)
    };
    assert_eq!(end(OnSlow::Freeze, 10), (Decision::Freeze(Why::NoGain), 3));
    let cancelled = Decision::GiveUp(Why::TargetOutOfReach);
    assert_eq!(end(OnSlow::Cancel, 10), (cancelled, 3));
    assert_eq!(end(OnSlow::Wait, 30), (Decision::Again, 10));
    assert_eq!(
        end(OnSlow::Wait, 10),
        (Decision::GiveUp(Why::MaxIterations), 10)
    );
    assert_eq!(
        end(OnSlow::Freeze, 2),
        (Decision::Freeze(Why::MaxIterations), 2)
    );
    assert_eq!(
        end(OnSlow::Cancel, 2),
        (Decision::GiveUp(Why::MaxIterations), 2)
    );
}

#[test]
fn nothing_is_waited_for_where_criu_alone_exceeds_the_target() {
    let end = |on_slow, deadline: Option<u64>| {
        let mut feed = Feed::new(Goals {
            downtime: Some(ms(300)),
            deadline: deadline.map(Duration::from_secs),
            on_slow,
            ..goals()
        });
        let mut decision = Decision::Again;
        while decision == Decision::Again {
            decision = feed.after(if feed.number == 0 { 1000 } else { 100 });
        }
        (decision, feed.number)
    };
    let hopeless = Decision::GiveUp(Why::TargetOutOfReach);
    assert_eq!(end(OnSlow::Cancel, None), (hopeless, 1));
    assert_eq!(end(OnSlow::Wait, None), (hopeless, 1));
    let (decision, iterations) = end(OnSlow::Wait, Some(100));
    assert!(matches!(decision, Decision::Freeze(_)), "{decision:?}");
    assert!((3..10).contains(&iterations));
}

#[test]
fn a_link_that_carries_nothing_loses_the_deadline_too() {
    let mut feed = with_deadline(5);
    let at = |seconds| Iteration {
        number: 1,
        end: Duration::from_secs(seconds),
        ..Iteration::default()
    };
    assert_eq!(feed.policy.progress(&at(4)), Decision::Again);
    let lost = Decision::GiveUp(Why::DeadlineOutOfReach);
    assert_eq!(feed.policy.progress(&at(5)), lost);
}

#[test]
fn waiting_ends_when_the_workload_becomes_quiet() {
    let mut feed = Feed::new(Goals {
        downtime: Some(ms(600)),
        on_slow: OnSlow::Wait,
        ..goals()
    });
    assert_eq!(feed.through(&[1000, 800, 800, 800, 800]), Decision::Again);
    assert_eq!(feed.after(10), Decision::Freeze(Why::TargetReached));
}

#[test]
fn max_iterations_ends_what_still_converges_and_zero_counts_as_one() {
    for (max_iterations, changes) in [(3, &[1000, 400, 160][..]), (1, &[1000]), (0, &[1000])] {
        let mut feed = Feed::new(Goals {
            max_iterations,
            ..goals()
        });
        assert_eq!(feed.through(changes), Decision::Freeze(Why::MaxIterations));
    }
}

#[test]
fn a_deadline_freezes_while_what_is_left_still_fits() {
    let deadline = |seconds, second_mb| with_deadline(seconds).through(&[1000, second_mb]);
    assert_eq!(deadline(60, 400), Decision::Again);
    // At 14 s; 2 s until the next iteration is done, and the dump, the rest and the restore.
    assert_eq!(deadline(17, 400), Decision::Freeze(Why::Deadline));
    // At 19 s with several hundred megabytes left.
    let lost = Decision::GiveUp(Why::DeadlineOutOfReach);
    assert_eq!(deadline(20, 900), lost);
}

#[test]
fn a_deadline_ends_waiting_with_a_freeze_and_cancelling_with_giving_up() {
    let end = |on_slow| {
        Feed::new(Goals {
            downtime: Some(ms(500)),
            deadline: Some(Duration::from_secs(17)),
            on_slow,
            ..goals()
        })
        .through(&[1000, 400])
    };
    assert_eq!(end(OnSlow::Wait), Decision::Freeze(Why::Deadline));
    assert_eq!(end(OnSlow::Cancel), Decision::GiveUp(Why::Deadline));
}

/// The first iteration of `feed` after `seconds` of 10, a tenth of the memory in each.
fn first_until(feed: &mut Feed, seconds: u64) -> Decision {
    let mut decision = Decision::Again;
    for second in 1..=seconds {
        let bytes = second * 100 * MB;
        decision = feed.policy.progress(&Iteration {
            number: 1,
            begin: Duration::ZERO,
            end: Duration::from_secs(second),
            scanned_bytes: bytes,
            scan_time: ms(second * 50),
            changed_bytes: bytes,
            wire_bytes: bytes,
            send_time: Duration::from_secs(second),
        });
    }
    decision
}

fn with_deadline(seconds: u64) -> Feed {
    Feed::new(Goals {
        deadline: Some(Duration::from_secs(seconds)),
        ..goals()
    })
}

#[test]
fn the_first_iteration_is_cut_short_where_it_would_cost_the_deadline() {
    // 10 s to send all of it. With 16 s there is time for half of it being dirty again, not with 12.
    assert_eq!(first_until(&mut with_deadline(16), 9), Decision::Again);
    let cut = first_until(&mut with_deadline(12), 6);
    assert_eq!(cut, Decision::Freeze(Why::Deadline));
    let lost = first_until(&mut with_deadline(4), 1);
    assert_eq!(lost, Decision::GiveUp(Why::DeadlineOutOfReach));
}

#[test]
fn a_sample_of_a_quiet_workload_lets_the_first_iteration_go_on() {
    let mut feed = with_deadline(12);
    first_until(&mut feed, 1);
    let without = feed.policy.latest_freeze().unwrap();
    feed.policy.sampled(&Sample {
        interval: ms(500),
        pages: 2000,
        changed_pages: 1,
    });
    let with = feed.policy.latest_freeze().unwrap();
    assert!(with > without, "{with:?} {without:?}");
    assert_eq!(first_until(&mut feed, 8), Decision::Again);
}

#[test]
fn the_latest_freeze_comes_sooner_when_the_link_halves() {
    let mut feed = with_deadline(60);
    feed.through(&[1000, 400]);
    let before = feed.policy.latest_freeze().unwrap();
    feed.link_mb_per_s = 50;
    feed.after(160);
    let after = feed.policy.latest_freeze().unwrap();
    assert!(after > feed.now && after < before, "{after:?} {before:?}");
    assert_eq!(Feed::new(goals()).policy.latest_freeze(), None);
}

#[test]
fn no_freeze_is_begun_that_its_limit_would_end() {
    let end = |limit| {
        let mut feed = Feed::new(Goals {
            freeze_limit: Some(ms(limit)),
            ..goals()
        });
        let mut decision = Decision::Again;
        for changed in [1000, 800, 800, 800, 800, 800, 800, 800, 800] {
            if decision == Decision::Again {
                decision = feed.after(changed);
            }
        }
        decision
    };
    assert!(matches!(end(10_000), Decision::Freeze(_)));
    assert_eq!(end(2_000), Decision::GiveUp(Why::FreezeLimit));
}

#[test]
fn a_freeze_for_the_deadline_that_its_limit_would_end_is_put_off() {
    let mut feed = Feed::new(Goals {
        deadline: Some(Duration::from_secs(12)),
        freeze_limit: Some(Duration::from_secs(2)),
        ..goals()
    });
    assert_eq!(first_until(&mut feed, 6), Decision::Again);
}

#[test]
fn a_halved_link_is_believed_and_one_that_was_hardly_used_is_not() {
    let mut feed = Feed::new(goals());
    feed.through(&[1000, 400]);
    let rate = |feed: &Feed| feed.policy.predict().link_bytes_per_s / 1e6;
    assert!((rate(&feed) - 100.0).abs() < 1.0);
    let mut idle = feed.next(0);
    idle.changed_bytes = 4096;
    idle.wire_bytes = 4096;
    idle.send_time = ms(10);
    feed.policy.after(&idle);
    assert!((rate(&feed) - 100.0).abs() < 1.0);
    feed.link_mb_per_s = 50;
    feed.after(160);
    assert!((rate(&feed) - 50.0).abs() < 3.0, "{}", rate(&feed));
}

#[test]
fn an_acknowledgement_that_took_long_says_nothing_about_the_link() {
    let mut feed = Feed::new(Goals {
        freeze_limit: Some(ms(10_000)),
        ..goals()
    });
    feed.after(19);
    for _ in 0..3 {
        let mut done = feed.next(0);
        // A few empty frames, and a destination whose disk was busy.
        (done.wire_bytes, done.send_time) = (100, ms(400));
        let decision = feed.policy.after(&done);
        assert!(
            !matches!(decision, Decision::GiveUp(_)),
            "{decision:?} with {:?}",
            feed.policy.predict()
        );
    }
    assert_between(feed.policy.predict().downtime, 400, 450);
}

#[test]
fn compression_and_pages_that_the_destination_has_count_for_what_is_left() {
    let downtime = |wire_share: u64| {
        let mut feed = Feed::new(goals());
        for changed in [1000, 400, 160] {
            let mut done = feed.next(changed);
            done.wire_bytes = changed * MB / wire_share;
            done.send_time = ms(changed * 10 / wire_share);
            feed.policy.after(&done);
        }
        feed.policy.predict().downtime
    };
    // The same iterations, and the link as fast, but a quarter of the bytes: less is left to send.
    let (raw, compressed) = (downtime(1) - ms(300), downtime(4) - ms(300));
    let ratio = raw.as_secs_f64() / compressed.as_secs_f64();
    assert!((3.5..4.5).contains(&ratio), "{ratio}");
}

#[test]
fn a_working_set_is_told_from_a_rate() {
    let dirtied = |observed: [(f64, f64); 2]| {
        let mut dirty = dirty::Dirty::default();
        for (seconds, bytes) in observed {
            dirty.observe(seconds, bytes);
        }
        (
            dirty.within(1.0, 1e12) / 1e6,
            dirty.within(100.0, 1e12) / 1e6,
        )
    };
    // As much in 2 s as in 8 s: a working set. A quarter in a quarter of the time: a rate.
    let (short, long) = dirtied([(8.0, 100e6), (2.0, 99e6)]);
    assert!(
        short > 80.0 && (95.0..105.0).contains(&long),
        "{short} {long}"
    );
    let (short, long) = dirtied([(8.0, 400e6), (2.0, 100e6)]);
    assert!(
        (45.0..56.0).contains(&short) && long > 1200.0,
        "{short} {long}"
    );
}

#[test]
fn predictions_are_compared_with_what_happened() {
    let mut feed = Feed::new(goals());
    feed.through(&[1000, 400, 160]);
    let predicted = feed.policy.predict();
    let accuracy = feed.policy.accuracy(Measured {
        downtime: predicted.downtime / 2,
        finish: predicted.finish,
        changed_bytes: 70 * MB,
    });
    assert!((accuracy.downtime_ratio() - 2.0).abs() < 0.001);
    assert!((accuracy.finish_ratio() - 1.0).abs() < 0.001);
    assert!(
        accuracy
            .early_finish_ratio()
            .is_some_and(|ratio| (0.5..2.0).contains(&ratio))
    );
    assert!(accuracy.predicted_changed_bytes > 30e6);
}

#[test]
fn before_anything_is_known_predictions_are_finite() {
    let mut policy = Policy::new(Goals::default(), Costs::default());
    assert_eq!(policy.predict().downtime, Duration::ZERO);
    policy.before_first(0);
    policy.sampled(&Sample {
        interval: Duration::ZERO,
        pages: 0,
        changed_pages: 0,
    });
    let nothing = Iteration {
        number: 1,
        ..Iteration::default()
    };
    assert_eq!(policy.progress(&nothing), Decision::Again);
    assert_eq!(policy.after(&nothing), Decision::Freeze(Why::NoGain));
    let more = Iteration {
        number: 2,
        ..nothing
    };
    policy.after(&more);
    let prediction = policy.predict();
    assert!(prediction.dirty_bytes_per_s.is_finite() && prediction.link_bytes_per_s == 0.0);
}

#[test]
fn no_measurement_however_odd_makes_it_panic() {
    let mut rng = crate::testing::Rng::new(3);
    let mut odd = |most: u32| {
        let bits = rng.below(u64::from(most) + 1);
        rng.number() >> (63 - bits)
    };
    for _ in 0..2000 {
        let mut policy = Policy::new(
            Goals {
                downtime: Some(ms(odd(20))),
                deadline: Some(ms(odd(30))),
                ..Goals::default()
            },
            Costs {
                dump: ms(odd(20)),
                restore: ms(odd(40)),
                round_trip: ms(odd(20)),
            },
        );
        policy.before_first(odd(63));
        for number in 1..6 {
            let iteration = Iteration {
                number,
                begin: ms(odd(40)),
                end: ms(odd(40)),
                scanned_bytes: odd(63),
                scan_time: ms(odd(40)),
                changed_bytes: odd(63),
                wire_bytes: odd(63),
                send_time: ms(odd(40)),
            };
            policy.progress(&iteration);
            policy.sampled(&Sample {
                interval: ms(odd(40)),
                pages: odd(63),
                changed_pages: odd(63),
            });
            policy.after(&iteration);
            let prediction = policy.predict();
            assert!(prediction.dirty_bytes_per_s.is_finite());
            assert!(prediction.link_bytes_per_s.is_finite());
            policy.latest_freeze();
        }
    }
}
