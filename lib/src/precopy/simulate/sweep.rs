//! Hundreds of worlds, and the policy against the best stop in hindsight.

use super::*;

const WORLDS: u64 = 1200;
const KINDS: u64 = 8;

/// The downtime may be this much above the best stop's.
const CLOSE: f64 = 1.3;

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
            goals.deadline = Some(secs(stops[0].finish * between(&mut rng, 0.7, 5.0)));
        }
        let samples = rng.once_in(2);
        let run = world.migrate(&goals, samples);
        Self { seed, world, goals, samples, stops, run }
    }

    fn in_time(&self, stop: &Stop) -> bool {
        self.goals.deadline.is_none_or(|deadline| secs(stop.finish) <= deadline)
    }

    /// The best stop after an iteration that meets the deadline; a target that is met is good enough.
    fn best(&self) -> Option<f64> {
        let mut in_time = self.stops[1..].to_vec();
        in_time.retain(|stop| self.in_time(stop));
        let target = self.goals.downtime.map_or(0.0, |target| target.as_secs_f64());
        (!in_time.is_empty()).then(|| lowest(&in_time).max(target))
    }

    /// The downtime against the best one; `None` where the question does not arise.
    fn ratio(&self) -> Option<f64> {
        Some(self.run.stop?.downtime / self.best()?)
    }

    fn may_give_up(&self) -> bool {
        self.goals.downtime.is_some()
            && match self.goals.on_slow {
                OnSlow::Freeze => false,
                OnSlow::Cancel => true,
                OnSlow::Wait => self.goals.deadline.is_none(),
            }
    }

    /// Whether the deadline was missed, though some stop would have met it.
    fn misses_deadline(&self) -> bool {
        self.goals.deadline.is_some()
            && self.stops.iter().any(|stop| self.in_time(stop))
            && match self.run.stop {
                Some(stop) => !self.in_time(&stop),
                None => !self.may_give_up(),
            }
    }

    /// Whether the target could be met, by a margin, and was not.
    fn misses_target(&self) -> Option<bool> {
        let target = self.goals.downtime?.as_secs_f64();
        let reachable = |stop: &Stop| self.in_time(stop) && stop.downtime * 1.15 <= target;
        if !self.stops[1..].iter().any(reachable) {
            return None;
        }
        Some(self.run.stop.is_none_or(|stop| stop.downtime > target * 1.05))
    }

    fn line(&self) -> String {
        let world = &self.world;
        let work = &world.workload;
        let show = |time: Option<Duration>| time.map_or("-".into(), |t| format!("{:.2}", t.as_secs_f64()));
        format!(
            "{:5} {:8} {:7.0} MB {:8.2} Mb/s x{:<3} at {:7.1} criu {:6.2} target {:>7} deadline {:>8} {} {:6?} | \
             {:2} its {:<22} {:8.3} s finish {:8.2} | best {:8.3} after {:2}, first {:8.2}, earliest {:8.2} off {:.2}",
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
        )
    }
}

fn lowest(stops: &[Stop]) -> f64 {
    stops.iter().fold(f64::INFINITY, |low, stop| low.min(stop.downtime))
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

fn table(title: &str, cases: &[&Case]) -> String {
    let lines: Vec<String> = cases.iter().take(14).map(|case| case.line()).collect();
    format!("{title}: {}\n{}\n", cases.len(), lines.join("\n"))
}

#[test]
fn over_hundreds_of_worlds_the_policy_stops_near_the_best_moment() {
    let cases: Vec<Case> = (0..WORLDS).map(Case::new).collect();

    let mut judged: Vec<(f64, &Case)> = cases
        .iter()
        .filter_map(|case| Some((case.ratio()?, case)))
        .collect();
    judged.sort_by(|a, b| b.0.total_cmp(&a.0));
    let far: Vec<&Case> = judged.iter().filter(|(ratio, _)| *ratio > CLOSE).map(|(_, case)| *case).collect();
    let missed: Vec<&Case> = cases.iter().filter(|case| case.misses_deadline()).collect();
    let reachable: Vec<&Case> = cases.iter().filter(|case| case.misses_target().is_some()).collect();
    let unmet: Vec<&Case> = reachable.iter().copied().filter(|case| case.misses_target() == Some(true)).collect();

    for (name, with) in [("no deadline", 0), ("samples", 1), ("none", 2)] {
        let group = |case: &&Case| {
            with == match (case.goals.deadline, case.samples) { (None, _) => 0, (_, true) => 1, _ => 2 }
        };
        println!("{name}: {} of {} far", far.iter().copied().filter(group).count(), judged.iter().map(|(_, case)| *case).filter(group).count());
    }
    println!("{} judged, {} reachable targets", judged.len(), reachable.len());
    println!("{}", table("far from the best stop", &far));
    println!("{}", table("deadlines missed", &missed));
    println!("{}", table("targets missed", &unmet));
}
