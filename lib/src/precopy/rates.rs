//! Rates as they were measured, the newest weighed most.

use std::time::Duration;

use super::Iteration;

/// A measurement over this long weighs as much as all before it.
const HALF_WEIGHT: f64 = 0.1;

/// While the link was busy for less than this, buffers and round trips were measured and not the link.
const SHORTEST_SENDING: f64 = 0.02;

/// So many round trips, too.
const SENDING_ROUND_TRIPS: f64 = 4.0;

/// Fewer bytes measure how long the destination took to store and answer, which a busy disk makes any
/// length, and not the link: 100 bytes acknowledged after 0.4 s are no link of 250 B/s.
const LEAST_SENT: f64 = 65_536.0;

/// In the first iteration the link says nothing before this: connections start slowly.
const LINK_STARTED: f64 = 0.1;

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
    /// An iteration was acknowledged.
    first_done: bool,
    /// Of the current iteration, what the link's estimate contains already.
    counted_wire: u64,
    counted_time: Duration,
    /// All that the link's estimate was made from.
    all_wire: f64,
    all_seconds: f64,
}

impl Rates {
    /// The current iteration as far as it is.
    pub(super) fn progress(&mut self, so_far: &Iteration, round_trip: Duration) {
        if self.first_done {
            self.observe_link(so_far, round_trip);
            return;
        }
        // Nothing else is known yet of the memory and the reader.
        self.observe_ratio(so_far, 1.0);
        self.observe_link(so_far, round_trip);
        if so_far.scanned_bytes > 0 && !so_far.scan_time.is_zero() {
            let pace = so_far.scan_time.as_secs_f64() / so_far.scanned_bytes as f64;
            self.hash = Pace(Some(pace));
        }
    }

    fn observe_link(&mut self, iteration: &Iteration, round_trip: Duration) {
        let wire = iteration.wire_bytes.saturating_sub(self.counted_wire) as f64;
        let time = iteration.send_time.saturating_sub(self.counted_time);
        let seconds = time.as_secs_f64();
        let enough = SHORTEST_SENDING.max(SENDING_ROUND_TRIPS * round_trip.as_secs_f64());
        let counts = seconds >= enough || self.link.0.is_none();
        if wire >= LEAST_SENT && seconds > 0.0 && counts {
            self.link.observe(wire, seconds);
            self.all_wire += wire;
            self.all_seconds += seconds;
            self.counted_wire = iteration.wire_bytes;
            self.counted_time = iteration.send_time;
        }
    }

    /// A whole iteration.
    pub(super) fn iteration(&mut self, done: &Iteration, round_trip: Duration) {
        self.observe_link(done, round_trip);
        self.first_done = true;
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

    /// The same, as fast as the link was now or on average, whichever is less: a link that stalls for a
    /// moment is not yet a slow one.
    pub(super) fn least_seconds_to_send(&self, changed: f64) -> f64 {
        let average = self.all_seconds / self.all_wire.max(1.0);
        let pace = self.link.0.unwrap_or(0.0).min(average);
        changed * self.ratio.unwrap_or(1.0) * pace
    }

    /// Whether the link was used for long enough to decide by it.
    pub(super) fn link_is_known(&self) -> bool {
        self.link.0.is_some() && (self.first_done || self.all_seconds >= LINK_STARTED)
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
