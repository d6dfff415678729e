//! Hundreds of worlds, and the policy against the best stop in hindsight.

use std::fmt;
use std::sync::LazyLock;

use super::*;

/// Kinds of workloads, see [`workload`].
const KINDS: u64 = 8;

/// The downtime may be this much above the best stop's.
const CLOSE: f64 = 1.3;

/// A deadline could be met if a stop met it with so much to spare, and stayed as far from the limit of
/// the freeze. CRIU alone is up to 15 % slower here than the policy was told.
const DEADLINE_EDGE: f64 = 1.02;
const LIMIT_EDGE: f64 = 1.15;

/// Deadlines are given in seconds.
const SHORTEST_DEADLINE: f64 = 2.0;

#[derive(Debug)]
struct Case {
    seed: u64,
    world: World,
    goals: Goals,
    samples: bool,
    stops: Vec<Stop>,
    run: Run,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let world = world(&mut rng, seed % KINDS);
        let mut goals = Goals {
            freeze_limit: None,
            ..Goals::default()
        };
        if rng.once_in(4) {
            goals.max_iterations = 2 + u32::try_from(rng.below(12)).expect("small");
        }
        let stops = world.stops(goals.max_iterations);
        // Goals in the region where they matter.
        if rng.once_in(3) {
            goals.downtime = Some(secs(lowest(&stops[1..]) * between(&mut rng, 0.5, 4.0)));
            goals.on_slow = match rng.below(4) {
                0 => OnSlow::Cancel,
                1 => OnSlow::Wait,
                _ => OnSlow::Freeze,
            };
        }
        if rng.once_in(3) {
            let deadline = stops[0].finish * between(&mut rng, 0.7, 5.0);
            goals.deadline = Some(secs(deadline.max(SHORTEST_DEADLINE)));
        }
        if rng.once_in(8) {
            goals.freeze_limit = Some(secs(lowest(&stops[1..]) * between(&mut rng, 0.7, 6.0)));
        }
        let samples = rng.once_in(2);
        let run = world.migrate(&goals, samples);
        Self {
            seed,
            world,
            goals,
            samples,
            stops,
            run,
        }
    }

    fn in_time(&self, stop: &Stop) -> bool {
        self.in_limit(stop)
            && self
                .goals
                .deadline
                .is_none_or(|deadline| secs(stop.finish) <= deadline)
    }

    fn in_limit(&self, stop: &Stop) -> bool {
        self.goals
            .freeze_limit
            .is_none_or(|limit| secs(stop.downtime) <= limit)
    }

    /// By more than what nobody can know who has to decide before.
    fn easily_in_time(&self, stop: &Stop) -> bool {
        self.in_time(&Stop {
            finish: stop.finish * DEADLINE_EDGE,
            downtime: stop.downtime * LIMIT_EDGE,
            ..*stop
        })
    }

    /// The best stop after an iteration that meets the deadline; a target that is met is good enough.
    fn best(&self) -> Option<f64> {
        let mut in_time = self.stops[1..].to_vec();
        in_time.retain(|stop| self.in_time(stop));
        let target = self
            .goals
            .downtime
            .map_or(0.0, |target| target.as_secs_f64());
        (!in_time.is_empty()).then(|| lowest(&in_time).max(target))
    }

    /// The downtime against the best one; `None` where the question does not arise.
    fn ratio(&self) -> Option<f64> {
        Some(self.run.stop?.downtime / self.best()?)
    }

    /// Whether some stop would have met the deadline that the policy had to meet.
    fn deadline_could_be_met(&self) -> bool {
        let may_cancel = self.goals.downtime.is_some() && self.goals.on_slow == OnSlow::Cancel;
        self.goals.deadline.is_some()
            && !may_cancel
            && self.stops.iter().any(|stop| self.easily_in_time(stop))
    }

    fn misses_deadline(&self) -> bool {
        let late = |stop: Stop| {
            self.goals
                .deadline
                .is_some_and(|deadline| secs(stop.finish) > deadline)
        };
        self.deadline_could_be_met() && self.run.stop.is_none_or(late)
    }

    /// Whether the freeze lasted longer than it may.
    fn breaks_limit(&self) -> bool {
        self.run.stop.is_some_and(|stop| !self.in_limit(&stop))
    }

    /// Whether the target could be met, by a margin, and was not.
    fn misses_target(&self) -> Option<bool> {
        let target = self.goals.downtime?.as_secs_f64();
        let reachable = |stop: &Stop| self.in_time(stop) && stop.downtime * 1.15 <= target;
        if !self.stops[1..].iter().any(reachable) {
            return None;
        }
        Some(
            self.run
                .stop
                .is_none_or(|stop| stop.downtime > target * 1.05),
        )
    }

    fn line(&self) -> String {
        let world = &self.world;
        let work = &world.workload;
        let show =
            |time: Option<Duration>| time.map_or("-".into(), |t| format!("{:.2}", t.as_secs_f64()));
        format!(
            "{:5} {:8} {:7.0} MB {:8.2} Mb/s x{:<3} at {:7.1} criu {:6.2} target {:>7} deadline {:>8} {} {:6?} | \
             {:2} its {:<22} {:8.3} s finish {:8.2} | best {:8.3} after {:2}, first {:8.2}, earliest {:8.2} off {:.2} limit {}",
            self.seed,
            work.kind,
            work.memory / 1e6,
            world.link.rate * 8e-6,
            world.link.factor,
            world.link.change_at,
            (world.costs.dump + world.costs.restore).as_secs_f64(),
            show(self.goals.downtime),
            show(self.goals.deadline),
            if self.samples { "s" } else { "-" },
            self.goals.on_slow,
            self.run.iterations,
            self.run.why.as_str(),
            self.run.stop.map_or(f64::NAN, |stop| stop.downtime),
            self.run.stop.map_or(f64::NAN, |stop| stop.finish),
            self.best().unwrap_or(f64::NAN),
            self.stops[1..]
                .iter()
                .min_by(|a, b| a.downtime.total_cmp(&b.downtime))
                .map_or(0, |stop| stop.iterations),
            self.stops[1].downtime,
            self.stops[0].finish,
            self.run.off,
            show(self.goals.freeze_limit),
        )
    }
}

fn lowest(stops: &[Stop]) -> f64 {
    stops
        .iter()
        .fold(f64::INFINITY, |low, stop| low.min(stop.downtime))
}

fn world(rng: &mut Rng, kind: u64) -> World {
    let memory = between(rng, 50e6, 32e9);
    let rate = between(rng, 10e6, 10e9) / 8.0;
    let bulk_ratio = between(rng, 0.3, 1.0);
    let workload = workload(rng, kind, memory, rate);
    let filling = memory * bulk_ratio / rate;
    let costs = Costs {
        dump: secs(0.03 + memory / between(rng, 2e9, 4e9)),
        restore: secs(0.05 + memory / between(rng, 1.2e9, 3e9)),
        round_trip: secs(between(rng, 0.0002, 0.05)),
    };
    World {
        workload,
        link: Link {
            rate,
            change_at: filling * between(rng, 0.1, 3.0),
            factor: [1.0, 1.0, 1.0, 0.5, 2.0][rng.index(5)],
        },
        hash_rate: between(rng, 1e9, 1.7e9),
        bulk_ratio,
        dirty_ratio: (bulk_ratio * between(rng, 0.7, 1.4)).min(1.0),
        costs,
        dump_factor: between(rng, 0.9, 1.15),
        restore_factor: between(rng, 0.9, 1.15),
    }
}

/// Rates are set against the link's, where the decision is hard.
fn workload(rng: &mut Rng, kind: u64, memory: f64, link: f64) -> Workload {
    let set = between(rng, 0.002, 0.5);
    let rate = link * between(rng, 0.02, 0.7);
    let class = |share: f64, bytes_per_s: f64| Class {
        share,
        writes_per_s: bytes_per_s / (share * memory),
    };
    let turn = memory / link;
    let mut workload = Workload {
        kind: "",
        memory,
        classes: vec![class(set, rate)],
        pattern: Pattern::Steady,
        swing: 0.3,
        swing_rate: between(rng, 0.2, 20.0),
        growth_per_s: 0.0,
    };
    workload.kind = match kind {
        0 => "converge",
        1 => {
            workload.classes = vec![class(set, link * between(rng, 1.0, 8.0))];
            "faster"
        }
        2 => {
            workload.pattern = Pattern::Bursts {
                period: between(rng, 0.5, 60.0),
                busy: between(rng, 0.1, 0.6),
                factor: between(rng, 3.0, 30.0),
            };
            "bursts"
        }
        3 => {
            let hot = between(rng, 0.001, 0.05);
            let tail = link * between(rng, 0.005, 0.2);
            workload.classes = vec![class(hot, link * between(rng, 0.2, 5.0)), class(0.6, tail)];
            "hot+tail"
        }
        4 => {
            workload.growth_per_s = (link * between(rng, 0.01, 0.3)).min(memory / 50.0);
            "growing"
        }
        5 => {
            workload.pattern = Pattern::Phase {
                at: turn * between(rng, 0.3, 2.0),
                factor: between(rng, 0.05, 10.0),
            };
            "phases"
        }
        6 => {
            workload.classes = vec![class(0.0005, 1e3)];
            "idle"
        }
        _ => {
            let sets = [between(rng, 0.001, 0.02), between(rng, 0.02, 0.2), 0.7];
            workload.classes = sets
                .iter()
                .map(|share| class(*share, link * between(rng, 0.01, 0.6)))
                .collect();
            "layers"
        }
    };
    workload
}

/// All cases, and those that are not as they should be, the worst first.
struct Verdict<'a> {
    judged: usize,
    far: Vec<&'a Case>,
    deadlines: usize,
    late: Vec<&'a Case>,
    reachable: usize,
    unmet: Vec<&'a Case>,
    limited: usize,
    broken: Vec<&'a Case>,
}

impl<'a> Verdict<'a> {
    fn of(cases: &'a [Case]) -> Self {
        let mut far: Vec<&Case> = cases
            .iter()
            .filter(|case| case.ratio() > Some(CLOSE))
            .collect();
        far.sort_by(|a, b| b.ratio().partial_cmp(&a.ratio()).expect("numbers"));
        let mut reachable: Vec<&Case> = cases.iter().collect();
        reachable.retain(|case| case.misses_target().is_some());
        Self {
            judged: cases.iter().filter_map(Case::ratio).count(),
            far,
            deadlines: cases
                .iter()
                .filter(|case| case.deadline_could_be_met())
                .count(),
            late: cases.iter().filter(|case| case.misses_deadline()).collect(),
            reachable: reachable.len(),
            unmet: reachable
                .into_iter()
                .filter(|case| case.misses_target() == Some(true))
                .collect(),
            limited: cases
                .iter()
                .filter(|case| case.goals.freeze_limit.is_some() && case.run.stop.is_some())
                .count(),
            broken: cases.iter().filter(|case| case.breaks_limit()).collect(),
        }
    }
}

impl fmt::Display for Verdict<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, count, cases) in [
            ("far from the best stop", self.judged, &self.far),
            ("deadline missed", self.deadlines, &self.late),
            ("target missed", self.reachable, &self.unmet),
            ("freeze longer than its limit", self.limited, &self.broken),
        ] {
            writeln!(f, "{title}: {} of {count}", cases.len())?;
            for case in cases.iter().take(20) {
                writeln!(f, "{}", case.line())?;
            }
        }
        Ok(())
    }
}

static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| (0..1200).map(Case::new).collect());

impl Verdict<'_> {
    fn assert_good(&self) {
        println!("{self}");
        let share = |bad: &[&Case], of: usize| bad.len() as f64 / of as f64;
        assert!(share(&self.far, self.judged) <= 0.05, "too far off");
        assert!(share(&self.unmet, self.reachable) <= 0.05, "targets missed");
        assert!(share(&self.broken, self.limited) <= 0.05, "limits broken");
    }
}

#[test]
fn over_hundreds_of_worlds_the_policy_stops_near_the_best_moment() {
    let verdict = Verdict::of(&CASES);
    verdict.assert_good();
    assert!(verdict.late.is_empty(), "a deadline was missed");
    // That there was something to judge.
    assert!(verdict.judged >= 900 && verdict.deadlines >= 300);
    assert!(verdict.reachable >= 150 && verdict.limited >= 80);
}

/// Over many more, one deadline in two hundred may be missed: by a link that halves after the freeze, a
/// burst in its last moments, pages that compress worse than those before.
#[test]
#[ignore = "20,000 worlds take half a minute"]
fn over_thousands_of_worlds_too() {
    let cases: Vec<Case> = (10_000..30_000).map(Case::new).collect();
    let verdict = Verdict::of(&cases);
    verdict.assert_good();
    assert!(
        verdict.late.len() * 200 <= verdict.deadlines,
        "deadlines were missed"
    );
}

#[test]
fn predicted_downtimes_are_near_the_real_ones() {
    let mut off: Vec<f64> = CASES
        .iter()
        .filter(|case| case.run.stop.is_some())
        .map(|case| case.run.off)
        .collect();
    off.sort_by(f64::total_cmp);
    let quantile = |percent: usize| off[off.len() * percent / 100];
    println!(
        "predicted by real: {:.2} {:.2} {:.2}",
        quantile(5),
        quantile(50),
        quantile(95)
    );
    assert!(quantile(10) > 0.75 && quantile(90) < 1.25);
}

/// The cost of the policy's patience: it must not reach its downtimes by iterating for ever.
#[test]
fn few_iterations_are_made_in_vain() {
    let mut cases: Vec<&Case> = CASES.iter().collect();
    cases.retain(|case| case.goals.deadline.is_none() && case.goals.downtime.is_none());
    let vain = |case: &Case| {
        // Iterations after the first that was nearly as good as the stop.
        let stop = case.run.stop.map_or(0.0, |stop| stop.downtime);
        let first = case.stops[1..]
            .iter()
            .find(|other| other.downtime <= stop * 1.1);
        first.map_or(0, |first| {
            case.run.iterations.saturating_sub(first.iterations)
        })
    };
    let total: u32 = cases.iter().map(|case| vain(case)).sum();
    let mean = f64::from(total) / cases.len() as f64;
    let made: u32 = cases.iter().map(|case| case.run.iterations).sum();
    println!(
        "{mean:.2} in vain, {:.2} made",
        f64::from(made) / cases.len() as f64
    );
    assert!(mean <= 1.5);
}
