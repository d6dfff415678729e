//! This host's clock, as a migration's report shows it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Shifts the clock, in milliseconds: tests let the two hosts' clocks differ by it.
const SHIFT_VARIABLE: &str = "CRXFER_CLOCK_SHIFT_MS";

/// Nanoseconds since 1970, without jumps: read once, then counted on by the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    begun: Instant,
    begun_ns: u64,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(crate) fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let since = since.unwrap_or_default();
        let shift: i64 = std::env::var(SHIFT_VARIABLE)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        Self {
            begun: Instant::now(),
            begun_ns: nanos(since).saturating_add_signed(shift.saturating_mul(1_000_000)),
        }
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.begun_ns + nanos(self.begun.elapsed())
    }

    /// Since the clock was started.
    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// When it was started, in its own nanoseconds.
    pub(crate) fn begun_ns(&self) -> u64 {
        self.begun_ns
    }
}

/// Nanoseconds, which last 584 years.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
