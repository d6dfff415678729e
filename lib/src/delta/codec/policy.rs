//! Whether compressing a frame gets it across sooner.

use std::time::Duration;

use super::Level;

/// Bytes at the front of a frame that a probe compresses: enough to tell 4 KiB pages of text from
/// noise, and 8 µs (noise) to 300 µs (words) of zstd level 1.
const PROBE_BYTES: usize = 64 << 10;

/// Shorter frames go raw: zstd's start costs more than they could save.
const MIN_FRAME_BYTES: usize = 512;

/// Probes may take this share of the time that the link takes for the frames between them.
const PROBE_SHARE: f64 = 1.0 / 128.0;

/// Compressing must be this much faster to be chosen, since it also takes CPU on both hosts.
const MARGIN: f64 = 1.1;

/// Level 3 must beat level 1 by this much: what the estimates are good for.
const LEVEL_MARGIN: f64 = 1.03;

/// Level 3 is tried when level 1 would keep its threads busy for less than this share of the time.
const IDLE_SHARE: f64 = 0.25;

/// Link measurements are taken over at least this many bytes or this long, since a single write
/// says more about buffers than about the link.
const WINDOW_BYTES: u64 = 1 << 20;
const WINDOW_TIME: Duration = Duration::from_millis(50);

/// The link counts as what limits us when at least this share of a window was spent waiting for it.
const WAITING_SHARE: f64 = 0.25;

/// Weight of the newest window in the link's estimate. The average is over time per byte, so a
/// link that gets slower is noticed in one window.
const LINK_WEIGHT: f64 = 1.0 / 3.0;

/// By how much the link's estimate grows in a window that did not wait: quickly while frames are
/// raw and simply fit, slowly while compressed frames leave the link idle.
const GROWTH_RAW: f64 = 2.0;
const GROWTH_COMPRESSED: f64 = 1.1;

/// Weight of the newest frame in the estimates of level 1. Speed depends on the data as much as the
/// saving does (words take forty times as long as noise), so both follow it alike.
const FRAME_WEIGHT: f64 = 0.5;

/// Weight of the newest comparison of the levels, which hardly changes.
const COMPARISON_WEIGHT: f64 = 0.25;

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send it as it is.
    Raw,
    /// Compress the first `bytes` bytes at `level`, then ask [`CodecPolicy::on_probed`].
    Probe {
        /// Level to try.
        level: Level,
        /// Length of the trial; never more than the frame.
        bytes: usize,
    },
    /// Compress all of it, then ask [`CodecPolicy::on_compressed`] whether to use the result.
    Compress(Level),
}

/// Result of one use of zstd.
#[derive(Clone, Copy, Debug)]
pub struct Compressed {
    /// At which level.
    pub level: Level,
    /// Bytes that went in.
    pub input: usize,
    /// Bytes that came out.
    pub output: usize,
    /// How long it took, on one thread.
    pub took: Duration,
}

/// One frame, or several, handed to the link.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Bytes as they went out: compressed, with headers.
    pub bytes: u64,
    /// How long handing them over had to wait for the link (flow control, congestion, a rate cap).
    pub waited: Duration,
    /// Time since the previous report: everything the sender did, waiting included.
    pub interval: Duration,
}

/// Decides frame by frame whether to compress.
///
/// With the link's rate `l`, the compressor's rate `c` (all threads) and the share `f` that is left
/// of a frame, raw frames cross at `l` and compressed ones at the slower of `c` and `l / f`. The
/// hazard is in how the three become known. `f` and `c` only show by compressing, which is wasted on
/// noise; so while frames go raw, the front of one is tried now and then, as often as fits into a
/// fixed share of the time the link takes. On a slow link that is every frame, on a fast one it is
/// seldom, on one that never makes us wait it is never. `l` only shows while the link is what
/// everybody waits for: after that its estimate grows until the link is waited for again, but never
/// above what the time spent waiting allows. So an estimate that is too low corrects itself by a
/// short stretch of raw frames, and one that is too high by waiting.
///
/// For each frame: [`next_frame`](Self::next_frame), do the [`Step`], report it; then
/// [`on_sent`](Self::on_sent). Several threads may compress for one policy (it wants to know how
/// many); their reports are taken in any order.
#[derive(Clone, Debug)]
pub struct CodecPolicy {
    threads: f64,
    /// Seconds the link takes for a byte; `None` until it was waited for.
    link: Option<f64>,
    window: Window,
    /// What is known of level 1 on the data that passes now.
    one: Option<Estimate>,
    /// Level 3 as multiples of level 1, from trying both on the same bytes.
    three: Option<Estimate>,
    /// A trial of level 3 whose counterpart at level 1 is still to come.
    half_compared: Option<Compressed>,
    current: Option<Level>,
    /// Seconds that probes may still take.
    probe_budget: f64,
}

/// What is known of one level.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    /// Seconds for a byte of input, one thread.
    cost: f64,
    /// Output by input.
    fraction: f64,
}

impl Estimate {
    fn of(result: &Compressed) -> Self {
        let input = result.input.max(1) as f64;
        Self {
            // A clock that saw no time pass must not make anything infinitely fast or slow.
            cost: result.took.as_secs_f64().max(1e-9) / input,
            fraction: result.output.max(1) as f64 / input,
        }
    }

    fn times(self, other: Self) -> Self {
        Self {
            cost: self.cost * other.cost,
            fraction: self.fraction * other.fraction,
        }
    }

    fn divided_by(self, other: Self) -> Self {
        Self {
            cost: self.cost / other.cost,
            fraction: self.fraction / other.fraction,
        }
    }

    fn mixed(old: Option<Self>, new: Self, weight: f64) -> Self {
        Self {
            cost: mix(old.map(|old| old.cost), new.cost, weight),
            fraction: mix(old.map(|old| old.fraction), new.fraction, weight),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    bytes: u64,
    waited: Duration,
    interval: Duration,
}

impl CodecPolicy {
    /// A policy for frames that `threads` threads compress side by side.
    pub fn new(threads: usize) -> Self {
        Self {
            threads: threads.max(1) as f64,
            link: None,
            window: Window::default(),
            one: None,
            three: None,
            half_compared: None,
            current: None,
            probe_budget: 0.0,
        }
    }

    /// Begins with a link of `bytes_per_s`, for instance the cap that the user set or what an
    /// earlier transfer saw. Without it frames go raw until the link makes us wait.
    pub fn assume_link(&mut self, bytes_per_s: f64) {
        if bytes_per_s.is_finite() && bytes_per_s > 0.0 {
            self.link = Some(1.0 / bytes_per_s);
        }
    }

    /// Bytes the link takes in a second, as far as known.
    pub fn link_bytes_per_s(&self) -> Option<f64> {
        self.link.map(|link| 1.0 / link)
    }

    /// What to do with the next frame, of `len` bytes.
    pub fn next_frame(&mut self, len: usize) -> Step {
        let Some(link) = self.link else {
            return Step::Raw;
        };
        self.earn_probes(len as f64 * link);
        if len < MIN_FRAME_BYTES {
            return Step::Raw;
        }
        if self.current.is_some() {
            self.current = self.best_level();
        }
        let bytes = len.min(PROBE_BYTES);
        let probe = |level| Step::Probe { level, bytes };
        let Some(level) = self.current else {
            return if self.is_probe_due() {
                probe(Level::One)
            } else {
                Step::Raw
            };
        };
        if self.is_comparison_due() {
            probe(Level::Three)
        } else {
            Step::Compress(level)
        }
    }

    /// Takes the result of a probe; says what to do with the frame: compress it, send it raw, or
    /// probe the same bytes at another level.
    pub fn on_probed(&mut self, result: Compressed) -> Step {
        // Known only now: on noise it is soon over, on words not.
        self.probe_budget -= result.took.as_secs_f64();
        if result.level == Level::Three {
            self.half_compared = Some(result);
            return Step::Probe {
                level: Level::One,
                bytes: result.input,
            };
        }
        let one = Estimate::of(&result);
        if let Some(three) = self.half_compared.take() {
            let three = Estimate::of(&three).divided_by(one);
            self.three = Some(Estimate::mixed(self.three, three, COMPARISON_WEIGHT));
        } else {
            // After raw frames this one counts, not the data before them.
            self.one = Some(one);
        }
        self.current = self.best_level();
        self.current.map_or(Step::Raw, Step::Compress)
    }

    /// Takes the result of compressing a frame; says whether to send that instead of the frame.
    pub fn on_compressed(&mut self, result: Compressed) -> bool {
        let seen = Estimate::of(&result);
        let as_one = match (result.level, self.three) {
            (Level::Three, Some(three)) => seen.divided_by(three),
            _ => seen,
        };
        self.one = Some(Estimate::mixed(self.one, as_one, FRAME_WEIGHT));
        is_smaller(&result)
    }

    /// Takes how the link received what was sent.
    pub fn on_sent(&mut self, sent: Sent) {
        let window = &mut self.window;
        window.bytes += sent.bytes;
        window.waited += sent.waited;
        window.interval += sent.interval.max(sent.waited);
        let is_long = window.bytes >= WINDOW_BYTES || window.interval >= WINDOW_TIME;
        if is_long && window.bytes > 0 {
            let window = std::mem::take(window);
            self.learn_link(&window);
        }
    }

    fn learn_link(&mut self, window: &Window) {
        let bytes = window.bytes as f64;
        let interval = window.interval.as_secs_f64();
        let waited = window.waited.as_secs_f64();
        if waited > 0.0 && waited >= interval * WAITING_SHARE {
            let cost = interval / bytes;
            self.link = Some(mix(self.link, cost, LINK_WEIGHT));
            return;
        }
        let growth = match self.current {
            None => GROWTH_RAW,
            Some(_) => GROWTH_COMPRESSED,
        };
        // It was busy at least while we waited, so it is no faster than this.
        let fastest = waited / bytes;
        self.link = self.link.map(|link| (link / growth).max(fastest));
    }

    /// The level that gets frames across soonest, `None` when that is raw.
    fn best_level(&self) -> Option<Level> {
        let (raw, one) = (self.link?, self.one?);
        let (mut level, mut best) = (Level::One, self.seconds_per_byte(one, raw));
        if let Some(three) = self.three {
            let three = self.seconds_per_byte(one.times(three), raw);
            if three * LEVEL_MARGIN < best {
                (level, best) = (Level::Three, three);
            }
        }
        (best * MARGIN < raw).then_some(level)
    }

    fn seconds_per_byte(&self, level: Estimate, link: f64) -> f64 {
        (level.cost / self.threads).max(link * level.fraction)
    }

    fn earn_probes(&mut self, link_seconds: f64) {
        // Saved up to a few probes: enough to follow data that changes from frame to frame,
        // without a burst of probes after a long stretch of compressed frames.
        let most = 4.0 * self.comparison_seconds();
        self.probe_budget = (self.probe_budget + link_seconds * PROBE_SHARE).min(most);
    }

    /// Whether a trial of level 1 is due: the very first at once, others when earned.
    fn is_probe_due(&self) -> bool {
        if self.one.is_none() {
            return true;
        }
        self.probe_budget >= self.probe_seconds()
    }

    /// Whether a trial of both levels is due: only where level 1 leaves its threads idle.
    fn is_comparison_due(&self) -> bool {
        let (Some(one), Some(link)) = (self.one, self.link) else {
            return false;
        };
        let is_idle = one.cost / self.threads < link * one.fraction * IDLE_SHARE;
        is_idle && self.probe_budget >= self.comparison_seconds()
    }

    fn probe_seconds(&self) -> f64 {
        // Before anything is measured: 1 GB/s.
        PROBE_BYTES as f64 * self.one.map_or(1e-9, |one| one.cost)
    }

    fn comparison_seconds(&self) -> f64 {
        // Before anything is measured: level 3 takes three times as long.
        let factor = self.three.map_or(3.0, |three| three.cost);
        self.probe_seconds() * (1.0 + factor)
    }
}

/// Whether the compressed form saves enough (a sixteenth) to be worth unpacking on the other side.
pub(super) fn is_smaller(result: &Compressed) -> bool {
    result.output < result.input - result.input / 16
}

fn mix(old: Option<f64>, new: f64, weight: f64) -> f64 {
    old.map_or(new, |old| old + (new - old) * weight)
}

#[cfg(test)]
mod tests;
