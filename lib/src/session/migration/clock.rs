//! How far the two hosts' clocks are apart.

/// Samples that are kept: the best of the last minutes decide, so that drift does not matter.
const KEPT: usize = 64;

/// How far the destination's clock is ahead of the source's, with the most that this can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockOffset {
    /// Destination's time minus the source's, in nanoseconds.
    pub ahead_ns: i64,
    /// At most this far off, in nanoseconds: half the round trip of the best sample.
    pub error_ns: u64,
}

impl ClockOffset {
    /// A time of the destination's clock on the source's.
    pub fn to_source(self, destination_ns: u64) -> u64 {
        destination_ns.saturating_add_signed(self.ahead_ns.saturating_neg())
    }
}

/// Questions and answers about the time, and what follows from them.
#[derive(Clone, Debug, Default)]
pub struct ClockSamples {
    samples: std::collections::VecDeque<ClockOffset>,
}

impl ClockSamples {
    /// The destination's clock showed `here_ns` some time between `asked_ns` and `heard_ns` of the
    /// source's. An answer from before its question is left out.
    pub fn add(&mut self, asked_ns: u64, here_ns: u64, heard_ns: u64) {
        let Some(round_trip) = heard_ns.checked_sub(asked_ns) else {
            return;
        };
        let middle = asked_ns + round_trip / 2;
        let ahead = i128::from(here_ns) - i128::from(middle);
        let Ok(ahead_ns) = i64::try_from(ahead) else {
            return;
        };
        if self.samples.len() == KEPT {
            self.samples.pop_front();
        }
        self.samples.push_back(ClockOffset {
            ahead_ns,
            error_ns: round_trip.div_ceil(2),
        });
    }

    /// The best of what is known: the answer that came soonest bounds the error most.
    pub fn offset(&self) -> Option<ClockOffset> {
        self.samples
            .iter()
            .min_by_key(|sample| sample.error_ns)
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_clock_that_is_3_s_ahead_is_found_within_its_bound() {
        let ahead = 3 * SECOND;
        let mut samples = ClockSamples::default();
        // Ways there and back differ, as they do when a queue stands in one direction.
        for (at, there, back) in [
            (0, 40_000_000, 100_000),
            (1, 300_000, 200_000),
            (2, 9_000_000, 9),
        ] {
            let asked = at * SECOND;
            samples.add(asked, asked + there + ahead, asked + there + back);
        }
        let offset = samples.offset().unwrap();
        assert_eq!(offset.error_ns, 250_000);
        assert!(offset.ahead_ns.abs_diff(3_000_000_000) <= offset.error_ns);
        let there = offset.to_source(10 * SECOND + ahead);
        assert!(there.abs_diff(10 * SECOND) <= offset.error_ns);
    }

    #[test]
    fn impossible_answers_are_left_out() {
        let mut samples = ClockSamples::default();
        samples.add(10, 5, 9);
        samples.add(0, u64::MAX, 1);
        assert_eq!(samples.offset(), None);
    }
}
