//! The most bytes a second that are read.

use std::time::{Duration, Instant};

/// Time lost to a slow taker that may be made up for.
const CATCH_UP: Duration = Duration::from_millis(20);

/// Spreads reads so that they stay below a rate. Has no clock of its own.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_s: Option<u64>,
    due: Option<Instant>,
}

impl Pace {
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        Self {
            bytes_per_s: bytes_per_s.map(|rate| rate.max(1)),
            due: None,
        }
    }

    /// How long to wait, at `now`, before `bytes` are read.
    pub(super) fn wait(&mut self, now: Instant, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_s else {
            return Duration::ZERO;
        };
        let earliest = now.checked_sub(CATCH_UP).unwrap_or(now);
        let due = self.due.map_or(now, |due| due.max(earliest));
        self.due = Some(due + Duration::from_secs(1).mul_f64(bytes as f64 / rate as f64));
        due.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::disallowed_methods, reason = "an instant to count from")]

    use super::*;

    #[test]
    fn reads_are_spread_to_the_rate() {
        let begin = Instant::now();
        let mut pace = Pace::new(Some(1_000_000));
        let mut now = begin;
        for _ in 0..100 {
            now += pace.wait(now, 10_000);
        }
        // The hundredth begins when 99 times 10 ms have gone.
        assert_eq!((now - begin).as_millis(), 990);
    }

    #[test]
    fn a_long_pause_does_not_allow_a_burst() {
        let begin = Instant::now();
        let mut pace = Pace::new(Some(1_000_000));
        pace.wait(begin, 10_000);
        let mut now = begin + Duration::from_secs(60);
        let resumed = now;
        for _ in 0..100 {
            now += pace.wait(now, 10_000);
        }
        assert_eq!((now - resumed).as_millis(), 970);
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        assert_eq!(
            Pace::new(None).wait(Instant::now(), u64::MAX),
            Duration::ZERO
        );
    }
}
