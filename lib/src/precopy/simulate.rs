//! Workloads and links in virtual time, and every stop that the policy could have chosen.
//!
//! The memory is [`CHUNKS`] chunks of the same mix of pages. What an interval dirties follows from the
//! rates at which pages are written, in closed form, so that hours of migration cost microseconds.

use std::time::Duration;

use super::{Costs, Decision, Goals, Iteration, Measured, OnSlow, Policy, Sample, Why};
use crate::testing::Rng;

mod sweep;

const CHUNKS: usize = 40;

/// What may wait for the link before the reader does.
const BUFFERED: f64 = 8e6;

/// Pages with the same rate of writes.
#[derive(Clone, Copy, Debug)]
struct Class {
    share: f64,
    writes_per_s: f64,
}

/// How the activity changes over time.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    Steady,
    /// Of each `period` the part `busy` with `factor` times the writes.
    Bursts {
        period: f64,
        busy: f64,
        factor: f64,
    },
    /// From `at` on `factor` times the writes.
    Phase {
        at: f64,
        factor: f64,
    },
}

impl Pattern {
    /// Activity summed up to `t`.
    fn until(self, t: f64) -> f64 {
        match self {
            Self::Steady => t,
            Self::Bursts {
                period,
                busy,
                factor,
            } => {
                let (on, off) = (busy * period, (1.0 - busy) * period);
                let whole = (t / period).floor();
                let rest = t - whole * period;
                // Each period begins quiet.
                whole * (on * factor + off) + rest.min(off) + (rest - off).max(0.0) * factor
            }
            Self::Phase { at, factor } => t.min(at) + (t - at).max(0.0) * factor,
        }
    }
}

#[derive(Clone, Debug)]
struct Workload {
    kind: &'static str,
    memory: f64,
    classes: Vec<Class>,
    pattern: Pattern,
    /// Activity swings by this share with this many radians a second.
    swing: f64,
    swing_rate: f64,
    growth_per_s: f64,
}

impl Workload {
    fn activity(&self, t: f64) -> f64 {
        let wobble = self.swing / self.swing_rate * (1.0 - (self.swing_rate * t).cos());
        self.pattern.until(t + wobble)
    }

    /// Bytes that differ between `from` and `to`.
    fn dirtied(&self, from: f64, to: f64) -> f64 {
        let activity = self.activity(to) - self.activity(from);
        let written: f64 = self
            .classes
            .iter()
            .map(|class| class.share * (1.0 - (-class.writes_per_s * activity).exp()))
            .sum();
        self.memory * written + self.growth_per_s * (to - from)
    }
}

#[derive(Clone, Copy, Debug)]
struct Link {
    rate: f64,
    change_at: f64,
    factor: f64,
}

impl Link {
    fn carried(&self, t: f64) -> f64 {
        self.rate * (t.min(self.change_at) + (t - self.change_at).max(0.0) * self.factor)
    }

    /// When `bytes` handed over at `start` are across.
    fn done(&self, start: f64, bytes: f64) -> f64 {
        let end = self.carried(start) + bytes;
        let before = self.rate * self.change_at;
        if end <= before {
            end / self.rate
        } else {
            self.change_at + (end - before) / (self.rate * self.factor)
        }
    }
}

#[derive(Clone, Debug)]
struct World {
    workload: Workload,
    link: Link,
    hash_rate: f64,
    bulk_ratio: f64,
    dirty_ratio: f64,
    costs: Costs,
    /// Real CRIU times against `costs`.
    dump_factor: f64,
    restore_factor: f64,
}

/// Where a run is: when each chunk was read last, and when the link is free.
#[derive(Clone, Debug)]
struct State {
    read: [Option<f64>; CHUNKS],
    now: f64,
    link_free: f64,
    number: u32,
}

/// A freeze as it went.
#[derive(Clone, Copy, Debug)]
struct Stop {
    iterations: u32,
    downtime: f64,
    finish: f64,
    changed: f64,
}

impl World {
    fn start(&self) -> State {
        State {
            read: [None; CHUNKS],
            now: 0.0,
            link_free: 0.0,
            number: 0,
        }
    }

    fn round_trip(&self) -> f64 {
        self.costs.round_trip.as_secs_f64()
    }

    fn chunk(&self, read: Option<f64>, now: f64) -> (f64, f64) {
        let chunks = CHUNKS as f64;
        match read {
            None => {
                let grown = self.workload.growth_per_s * now;
                let bytes = (self.workload.memory + grown) / chunks;
                (bytes, bytes * self.bulk_ratio)
            }
            Some(read) => {
                let bytes = self.workload.dirtied(read, now) / chunks;
                (bytes, bytes * self.dirty_ratio)
            }
        }
    }

    /// One iteration; `watch` sees it after each chunk and may cut it short.
    fn iterate(
        &self,
        state: &mut State,
        mut watch: impl FnMut(&State, &Iteration) -> bool,
    ) -> Option<Iteration> {
        let begin = state.now;
        let memory = self.workload.memory + self.workload.growth_per_s * begin;
        let chunk_bytes = memory / CHUNKS as f64;
        let (mut scanned, mut changed, mut wire, mut busy) = (0.0, 0.0, 0.0, 0.0);
        state.number += 1;
        for index in 0..CHUNKS {
            let started = state.now;
            state.now += chunk_bytes / self.hash_rate;
            let (bytes, sent) = self.chunk(state.read[index], state.now);
            // Pages go out while more of the chunk is read.
            let start = state.link_free.max(started);
            let done = self.link.done(start, sent);
            busy += done - start;
            state.link_free = done.max(state.now);
            let buffered = BUFFERED / self.link.rate;
            state.now = state.now.max(state.link_free - buffered);
            state.read[index] = Some(f64::midpoint(started, state.now));
            scanned += chunk_bytes;
            changed += bytes;
            wire += sent;
            let so_far = Iteration {
                number: state.number,
                begin: secs(begin),
                end: secs(state.now),
                scanned_bytes: whole(scanned),
                scan_time: secs(scanned / self.hash_rate),
                changed_bytes: whole(changed),
                wire_bytes: whole(wire),
                send_time: secs(busy),
            };
            if !watch(state, &so_far) {
                return None;
            }
        }
        state.now = state.now.max(state.link_free) + self.round_trip();
        Some(Iteration {
            number: state.number,
            begin: secs(begin),
            end: secs(state.now),
            scanned_bytes: whole(scanned),
            scan_time: secs(scanned / self.hash_rate),
            changed_bytes: whole(changed),
            wire_bytes: whole(wire),
            send_time: secs(busy),
        })
    }

    /// Freezes now. CRIU hands the pages out between 0.3 and 0.9 of its dump.
    fn freeze(&self, state: &State) -> Stop {
        let frozen = state.now;
        let dump = self.costs.dump.as_secs_f64() * self.dump_factor;
        let mut free = state.link_free.max(frozen);
        let mut changed = 0.0;
        for (index, read) in state.read.iter().enumerate() {
            let handed = frozen + dump * (0.3 + 0.6 * index as f64 / CHUNKS as f64);
            let (bytes, sent) = self.chunk(*read, frozen);
            free = self.link.done(free.max(handed), sent);
            changed += bytes;
        }
        let restore = self.costs.restore.as_secs_f64() * self.restore_factor;
        let downtime = dump.max(free - frozen) + restore + 2.0 * self.round_trip();
        Stop {
            iterations: state.number,
            downtime,
            finish: frozen + downtime,
            changed,
        }
    }

    /// Every stop at the end of an iteration, the freeze without any first.
    fn stops(&self, max_iterations: u32) -> Vec<Stop> {
        let mut state = self.start();
        let mut stops = vec![self.freeze(&state)];
        for _ in 0..max_iterations {
            self.iterate(&mut state, |_, _| true);
            stops.push(self.freeze(&state));
        }
        stops
    }

    /// What a driver does that obeys the policy. With `samples` it reads pages again.
    fn migrate(&self, goals: &Goals, samples: bool) -> Run {
        let mut policy = Policy::new(goals.clone(), self.costs);
        policy.before_first(whole(self.workload.memory));
        let mut state = self.start();
        loop {
            let mut cut = Decision::Again;
            let done = self.iterate(&mut state, |state, so_far| {
                if samples && so_far.number == 1 {
                    policy.sampled(&self.sample(state));
                }
                cut = policy.progress(so_far);
                cut == Decision::Again
            });
            let decision = done.map_or(cut, |done| policy.after(&done));
            match decision {
                Decision::Again => assert!(state.number < goals.max_iterations, "never ends"),
                Decision::Freeze(why) => {
                    let stop = self.freeze(&state);
                    let measured = Measured {
                        downtime: secs(stop.downtime),
                        finish: secs(stop.finish),
                        changed_bytes: whole(stop.changed),
                    };
                    let off = policy.accuracy(measured).downtime_ratio();
                    return Run {
                        why,
                        stop: Some(stop),
                        iterations: state.number,
                        off,
                    };
                }
                Decision::GiveUp(why) => {
                    return Run {
                        why,
                        stop: None,
                        iterations: state.number,
                        off: 1.0,
                    };
                }
            }
        }
    }

    /// 2,000 of the pages read so far, read again now.
    fn sample(&self, state: &State) -> Sample {
        let (mut count, mut since, mut changed) = (0.0, 0.0, 0.0);
        for read in state.read.iter().flatten() {
            count += 1.0;
            since += state.now - read;
            changed += self.workload.dirtied(*read, state.now) / self.workload.memory;
        }
        Sample {
            interval: secs(since / count),
            pages: 2000,
            changed_pages: whole((changed / count).min(1.0) * 2000.0),
        }
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug)]
struct Run {
    why: Why,
    /// `None`: given up.
    stop: Option<Stop>,
    iterations: u32,
    /// Downtime as predicted by downtime as it was.
    off: f64,
}

fn secs(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "bytes of a simulated memory"
)]
fn whole(bytes: f64) -> u64 {
    bytes as u64
}

/// A number between `low` and `high`, all orders of magnitude alike.
fn between(rng: &mut Rng, low: f64, high: f64) -> f64 {
    let share = rng.below(1 << 20) as f64 / f64::from(1 << 20);
    low * (high / low).powf(share)
}
