//! How much of the memory a workload dirties in an interval.

use super::Sample;

/// Observations kept; older ones weigh nothing.
const KEPT: usize = 6;

/// Weight of an observation against the next newer one.
const FADE: f64 = 0.4;

/// Changes of fewer bytes are all the same to us.
const NOISE_BYTES: f64 = 65_536.0;

/// How far the time constant may be from the last interval, as a factor, and in how many steps each
/// way it is searched.
const RANGE: f64 = 64.0;
const STEPS: i32 = 24;

/// What it costs a fit to be far from its prior (a time constant as long as the last interval), against
/// the squared error of the logarithms. Decides only where the observations do not.
const PRIOR: f64 = 0.001;

/// Before anything was observed: this share of the memory is the working set.
const UNKNOWN_SHARE: f64 = 0.2;

/// For a deadline: this much. With the doubt that is added there, half of the memory. To take all of it
/// would freeze every migration with a near deadline before its first iteration is done.
const UNKNOWN_AT_MOST: f64 = 1.0 / 3.0;

/// Pages of a sample are few: so many more are taken for changed where caution is asked for. None
/// changed of n has a rate below 3 / n with 95 % confidence.
const SAMPLE_DOUBT: f64 = 3.0;

/// What a curve through several observations may be exceeded by.
const SURE: f64 = 1.2;

/// Bytes dirtied within an interval.
#[derive(Clone, Copy, Debug)]
struct Observation {
    seconds: f64,
    bytes: f64,
}

/// The curve of dirtied bytes over the interval, fitted to the last iterations.
///
/// A plain rate misleads: a workload writes the same pages again and again, so twice the interval
/// dirties less than twice the pages. The curve is `W · (1 − exp(−t / τ))`: for short intervals it
/// grows by `W / τ`, for long ones it stays at the working set `W`. Two unknowns, because after two
/// iterations there are not more observations, and because workloads change faster than more
/// unknowns could be learned.
#[derive(Clone, Debug, Default)]
pub(super) struct Dirty {
    /// Newest first.
    seen: Vec<Observation>,
    curve: Option<Curve>,
    sample: Option<(Observation, Curve)>,
}

#[derive(Clone, Copy, Debug)]
struct Curve {
    working_set: f64,
    tau: f64,
}

impl Curve {
    fn at(self, seconds: f64) -> f64 {
        self.working_set * share_within(seconds, self.tau)
    }
}

impl Dirty {
    /// `bytes` differed between two reads that were `seconds` apart.
    pub(super) fn observe(&mut self, seconds: f64, bytes: f64) {
        let observation = Observation {
            seconds: seconds.max(1e-6),
            bytes: bytes.max(NOISE_BYTES),
        };
        self.seen.insert(0, observation);
        self.seen.truncate(KEPT);
        self.curve = Some(fit(&self.seen));
        self.sample = None;
    }

    /// A sample of memory of `memory` bytes. Ignored once a whole iteration was observed.
    pub(super) fn sample(&mut self, sample: &Sample, memory: f64) {
        if self.curve.is_some() || sample.pages == 0 {
            return;
        }
        let pages = sample.pages as f64;
        let changed = sample.changed_pages as f64;
        let seen = |changed: f64| Observation {
            seconds: sample.interval.as_secs_f64().max(1e-6),
            bytes: (memory * (changed / pages).min(1.0)).max(NOISE_BYTES),
        };
        let doubt = SAMPLE_DOUBT + 2.0 * changed.sqrt();
        self.sample = Some((seen(changed + doubt), fit(&[seen(changed)])));
    }

    /// Whether anything was observed.
    pub(super) fn is_known(&self) -> bool {
        self.curve.is_some() || self.sample.is_some()
    }

    /// How many iterations were observed.
    pub(super) fn observations(&self) -> usize {
        self.seen.len()
    }

    /// Bytes dirtied within `seconds`, as expected.
    pub(super) fn within(&self, seconds: f64, memory: f64) -> f64 {
        let curve = self.curve.or(self.sample.map(|(_, curve)| curve));
        match curve {
            Some(curve) => curve.at(seconds).min(memory),
            None => memory * UNKNOWN_SHARE * share_within(seconds, 1.0),
        }
    }

    /// The same, and hardly ever too little: growing evenly from the largest rate that was seen
    /// lately, and all of the memory while nothing is known.
    pub(super) fn at_most(&self, seconds: f64, memory: f64) -> f64 {
        let newest = self.seen.first().copied();
        let Some(base) = newest.or(self.sample.map(|(observation, _)| observation)) else {
            return memory * UNKNOWN_AT_MOST;
        };
        let evenly = base.bytes * (seconds / base.seconds).max(0.0);
        let curved = self.within(seconds, memory);
        // For intervals shorter than the observed one the line lies below the curve.
        evenly.max(curved).min(memory)
    }

    /// Bytes dirtied within an interval shorter than the last one, surely enough for a target: a curve
    /// through one observation is a guess, so then as much as was seen.
    pub(super) fn shorter(&self, seconds: f64, memory: f64) -> f64 {
        match self.seen.as_slice() {
            [] => memory,
            [only] => only.bytes.min(memory),
            _ => (self.within(seconds, memory) * SURE).min(memory),
        }
    }

    /// The rate over the last interval.
    pub(super) fn bytes_per_s(&self) -> f64 {
        self.seen
            .first()
            .map_or(0.0, |seen| seen.bytes / seen.seconds)
    }
}

/// Share of the working set that is dirty after `seconds`.
fn share_within(seconds: f64, tau: f64) -> f64 {
    -(-seconds.max(0.0) / tau).exp_m1()
}

/// The curve with the least weighted squared error of logarithms: an iteration that changed a
/// hundredth of the others counts like them.
fn fit(seen: &[Observation]) -> Curve {
    let mut best = (
        f64::INFINITY,
        Curve {
            working_set: 0.0,
            tau: 1.0,
        },
    );
    for step in -STEPS..=STEPS {
        let away = f64::from(step) / f64::from(STEPS) * RANGE.ln();
        let tau = seen[0].seconds * away.exp();
        let (error, working_set) = error_with(seen, tau);
        let error = error + PRIOR * away * away;
        if error < best.0 {
            best = (error, Curve { working_set, tau });
        }
    }
    best.1
}

/// Mean squared error with the best working set for `tau`, and that working set.
fn error_with(seen: &[Observation], tau: f64) -> (f64, f64) {
    let (mut weights, mut sum, mut squares) = (0.0, 0.0, 0.0);
    let mut weight = 1.0;
    for observation in seen {
        let shape = share_within(observation.seconds, tau);
        let log = (observation.bytes / shape).ln();
        weights += weight;
        sum += weight * log;
        squares += weight * log * log;
        weight *= FADE;
    }
    let mean = sum / weights;
    (squares / weights - mean * mean, mean.exp())
}
