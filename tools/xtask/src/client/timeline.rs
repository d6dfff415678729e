//! When a service answered, and which host did: what a client can say about a move.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::hosts::Side;

/// A right answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// When it was asked for, since the poller's begin.
    pub(crate) asked: Duration,
    /// When it came.
    pub(crate) at: Duration,
    /// Which host gave it.
    pub(crate) by: Side,
}

/// A time without answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) begin: Duration,
    pub(crate) end: Duration,
}

impl Gap {
    pub(crate) fn ms(self) -> f64 {
        (self.end - self.begin).as_secs_f64() * 1e3
    }
}

/// All right answers, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeline {
    answers: Vec<Answer>,
}

impl Timeline {
    pub(crate) fn new(answers: Vec<Answer>) -> Self {
        Self { answers }
    }

    pub(crate) fn len(&self) -> usize {
        self.answers.len()
    }

    fn first(&self, side: Side) -> Option<Answer> {
        self.answers
            .iter()
            .copied()
            .find(|answer| answer.by == side)
    }

    fn last(&self, side: Side) -> Option<Answer> {
        self.answers
            .iter()
            .copied()
            .rfind(|answer| answer.by == side)
    }

    /// The time between the last answer of A and the first of B.
    pub(crate) fn handover(&self) -> Result<Gap> {
        let last = self.last(Side::A).context("A never answered")?;
        let first = self.first(Side::B).context("B never answered")?;
        ensure!(
            last.at <= first.at,
            "two copies: A still answered {:?} after B began to",
            last.at - first.at
        );
        Ok(Gap {
            begin: last.at,
            end: first.at,
        })
    }

    /// Fails if anyone but `side` gave an answer after `since`, or if it gave none.
    pub(crate) fn ensure_only(&self, side: Side, since: Duration) -> Result<()> {
        let later: Vec<&Answer> = self
            .answers
            .iter()
            .filter(|answer| answer.asked >= since)
            .collect();
        ensure!(!later.is_empty(), "nobody answers since {since:?}");
        let strange = later.iter().find(|answer| answer.by != side);
        ensure!(
            strange.is_none(),
            "a second copy gave an answer: {strange:?}"
        );
        Ok(())
    }

    /// The longest time without answers between two of them, within `from` and `to`.
    pub(crate) fn longest_gap(&self, from: Duration, to: Duration) -> Gap {
        let within: Vec<Duration> = self
            .answers
            .iter()
            .map(|answer| answer.at)
            .filter(|at| (from..=to).contains(at))
            .collect();
        let gaps = within.windows(2).map(|pair| Gap {
            begin: pair[0],
            end: pair[1],
        });
        gaps.max_by_key(|gap| gap.end - gap.begin).unwrap_or(Gap {
            begin: from,
            end: to,
        })
    }

    /// How long the slowest of a hundred answers took, and the middle one, of those asked within
    /// `from` and `to`.
    pub(crate) fn latency(&self, from: Duration, to: Duration) -> Latency {
        let asked = self
            .answers
            .iter()
            .filter(|answer| (from..=to).contains(&answer.asked));
        let mut times: Vec<Duration> = asked.map(|answer| answer.at - answer.asked).collect();
        times.sort_unstable();
        let at = |percent: usize| times.get(times.len() * percent / 100).copied();
        Latency {
            median: at(50).unwrap_or_default(),
            percentile_99: at(99).unwrap_or_default(),
        }
    }
}

/// How long answers take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Latency {
    pub(crate) median: Duration,
    pub(crate) percentile_99: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(answers: &[(u64, Side)]) -> Timeline {
        let answer = |&(at, by): &(u64, Side)| Answer {
            asked: Duration::from_millis(at.saturating_sub(1)),
            at: Duration::from_millis(at),
            by,
        };
        Timeline::new(answers.iter().map(answer).collect())
    }

    #[test]
    fn handover_is_between_the_hosts_not_the_longest_gap() {
        let seen = timeline(&[
            (2, Side::A),
            (900, Side::A),
            (1000, Side::B),
            (1002, Side::B),
        ]);
        let gap = seen.handover().expect("a move");
        assert_eq!(gap.begin, Duration::from_millis(900));
        assert!((gap.ms() - 100.0).abs() < 1e-6);
        let longest = seen.longest_gap(Duration::ZERO, Duration::from_secs(9));
        assert_eq!(longest.begin, Duration::from_millis(2));
    }

    #[test]
    fn answer_of_the_source_after_the_move_is_a_second_copy() {
        let seen = timeline(&[(2, Side::A), (4, Side::B), (6, Side::A)]);
        assert!(seen.handover().is_err());
        assert!(seen.ensure_only(Side::B, Duration::from_millis(4)).is_err());
        assert!(timeline(&[(2, Side::A)]).handover().is_err());
    }

    #[test]
    fn only_one_host_answers_since_a_moment() {
        let seen = timeline(&[(2, Side::A), (14, Side::B), (16, Side::B)]);
        seen.ensure_only(Side::B, Duration::from_millis(10))
            .expect("B alone");
        assert!(seen.ensure_only(Side::B, Duration::from_secs(1)).is_err());
    }
}
