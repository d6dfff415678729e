//! Rates as they were measured, the newest weighed most.

use std::time::Duration;

use super::Iteration;

/// A measurement over this long weighs as much as all before it.
const HALF_WEIGHT: f64 = 0.1;

/// While the link was busy for less than this, buffers and round trips were measured and not the link.
const SHORTEST_SENDING: f64 = 0.02;

/// So many round trips, too.
const SENDING_ROUND_TRIPS: f64 = 4.0;

/// Weight of the newest iteration in what compression leaves. Pages that the workload writes may
/// compress unlike the rest of its memory, which only iterations after the first show.
const RATIO_WEIGHT: f64 = 0.75;

/// Fewer changed bytes say more about frame headers than about the pages.
const RATIO_BYTES: u64 = 64 << 10;

/// Seconds for a byte, averaged. Time and not rate is averaged, so that something that gets slower
/// is noticed sooner than something that gets faster.
#[derive(Clone, Copy, Debug, Default)]
struct Pace(Option<f64>);

impl Pace {
    fn observe(&mut self, bytes: f64, seconds: f64) {
        let newest = seconds / bytes;
        let weight = seconds / (seconds + HALF_WEIGHT);
        self.0 = Some(match self.0 {
            Some(pace) => pace + weight * (newest - pace),
            None => newest,
        });
    }

    fn bytes_per_s(self) -> f64 {
        self.0.map_or(0.0, |pace| 1.0 / pace)
    }
}

/// What the link, the reader and the compressor do.
#[derive(Clone, Debug, Default)]
pub(super) struct Rates {
    link: Pace,
    hash: Pace,
    ratio: Option<f64>,
    /// `ratio` is of the first iteration, which is still under way.
    ratio_is_early: bool,
    /// Of the current iteration, what the link's estimate contains already.
    counted_wire: u64,
    counted_time: Duration,
}

impl Rates {
    /// The current iteration as far as it is.
    pub(super) fn progress(&mut self, so_far: &Iteration, round_trip: Duration) {
        if self.ratio.is_none() || self.ratio_is_early {
            self.ratio_is_early = true;
            self.observe_ratio(so_far, 1.0);
        }
        let wire = so_far.wire_bytes.saturating_sub(self.counted_wire) as f64;
        let time = so_far
            .send_time
            .saturating_sub(self.counted_time)
            .as_secs_f64();
        let enough = SHORTEST_SENDING.max(SENDING_ROUND_TRIPS * round_trip.as_secs_f64());
        let unknown = self.link.0.is_none() && so_far.number > 0;
        if wire > 0.0 && time > 0.0 && (time >= enough || unknown) {
            self.link.observe(wire, time);
            self.counted_wire = so_far.wire_bytes;
            self.counted_time = so_far.send_time;
        }
    }

    /// A whole iteration.
    pub(super) fn iteration(&mut self, done: &Iteration, round_trip: Duration) {
        self.progress(done, round_trip);
        self.ratio_is_early = false;
        self.counted_wire = 0;
        self.counted_time = Duration::ZERO;
        if done.scanned_bytes > 0 && !done.scan_time.is_zero() {
            self.hash
                .observe(done.scanned_bytes as f64, done.scan_time.as_secs_f64());
        }
        self.observe_ratio(done, RATIO_WEIGHT);
    }

    fn observe_ratio(&mut self, iteration: &Iteration, weight: f64) {
        if iteration.changed_bytes >= RATIO_BYTES {
            let newest = iteration.wire_bytes as f64 / iteration.changed_bytes as f64;
            let before = self.ratio.unwrap_or(newest);
            self.ratio = Some(before + weight * (newest - before));
        }
    }

    /// Seconds until `changed` bytes of memory are across. Nothing is known of the link before it
    /// was used: then 0.
    pub(super) fn seconds_to_send(&self, changed: f64) -> f64 {
        changed * self.ratio.unwrap_or(1.0) * self.link.0.unwrap_or(0.0)
    }

    /// Seconds for reading and hashing `bytes`.
    pub(super) fn seconds_to_scan(&self, bytes: f64) -> f64 {
        bytes * self.hash.0.unwrap_or(0.0)
    }

    pub(super) fn link_bytes_per_s(&self) -> f64 {
        self.link.bytes_per_s()
    }

    pub(super) fn hash_bytes_per_s(&self) -> f64 {
        self.hash.bytes_per_s()
    }
}
