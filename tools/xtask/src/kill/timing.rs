//! When the phases of a migration are, learned from one that nobody disturbs.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::moving::Moving;
use super::plan::Phase;

/// When each phase begins and ends, in milliseconds since its [`Mark`].
#[derive(Clone, Debug)]
pub(super) struct Timing {
    precopy: (f64, f64),
    freeze: (f64, f64),
    transfer: (f64, f64),
    vote: (f64, f64),
    commit: (f64, f64),
    resume: (f64, f64),
    end: (f64, f64),
}

/// What a phase's times are counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// The command was started.
    Start,
    /// It told of this.
    Told(&'static str),
}

impl Phase {
    /// The last thing that is told before it: what comes before a mark takes another time each time.
    pub(super) fn mark(self) -> Mark {
        match self {
            Self::Precopy => Mark::Start,
            Self::Freeze | Self::Transfer | Self::Vote => Mark::Told("freezing"),
            Self::Commit | Self::Resume | Self::End => Mark::Told("built"),
        }
    }
}

/// A vote takes no time: what is around it, in milliseconds.
const AROUND: f64 = 5.0;
/// What is reported as no time at all takes as long, in milliseconds.
const SHORT: f64 = 1.5;
/// After the last phase that is reported, in milliseconds.
const AFTERWARDS: f64 = 40.0;

impl Timing {
    /// Those of `moving`, which has ended well.
    pub(super) fn of(moving: &Moving) -> Result<Self> {
        let freezing = moving.told("freezing").context("it told of no freeze")?;
        let report = moving.report().context("it wrote no report")?;
        let precopy_ms = (freezing - moving.begin).as_secs_f64() * 1e3;
        Self::from_report(&report, precopy_ms).with_context(|| format!("the report is {report}"))
    }

    fn from_report(report: &Value, precopy_ms: f64) -> Result<Self> {
        let phases = report["phases"].as_array().context("no phases")?;
        let find = |name: &str| {
            let found = phases.iter().rfind(|phase| phase["name"] == *name)?;
            Some((found["begin_ms"].as_f64()?, found["end_ms"].as_f64()?))
        };
        let phase = |name: &str| find(name).with_context(|| format!("no phase {name:?}"));
        // It tells of the freeze just before CRIU is started.
        let zero = phase("destination gets ready")?.1;
        let since = |ms: f64| (ms - zero).max(0.0);
        let dumped = since(phase("dump the rest")?.1);
        let voted = since(phase("hold for the commit")?.0);
        let after_vote = |ms: f64| (since(ms) - voted).max(0.0);
        let (resuming, resumed) = phase("resume")?;
        let (resuming, resumed) = (after_vote(resuming), after_vote(resumed));
        let ended = find("end the source's tree").map_or(resumed, |phase| after_vote(phase.1));
        Ok(Self {
            precopy: (0.0, precopy_ms),
            freeze: (0.0, dumped),
            transfer: (dumped, (voted - AROUND).max(dumped)),
            vote: (voted - AROUND, voted + AROUND),
            commit: (0.0, resuming.max(SHORT)),
            resume: (resuming, resumed.max(resuming + SHORT)),
            end: (resumed, ended.max(resumed) + AFTERWARDS),
        })
    }

    /// Of two, the one whose copy stood earlier.
    pub(super) fn faster(self, other: Self) -> Self {
        match self.vote.0 <= other.vote.0 {
            true => self,
            false => other,
        }
    }

    /// How long after its mark `part` of the phase is over.
    pub(super) fn offset(&self, phase: Phase, part: f64) -> Duration {
        let (begin, end) = match phase {
            Phase::Precopy => self.precopy,
            Phase::Freeze => self.freeze,
            Phase::Transfer => self.transfer,
            Phase::Vote => self.vote,
            Phase::Commit => self.commit,
            Phase::Resume => self.resume,
            Phase::End => self.end,
        };
        Duration::from_secs_f64((begin + (end - begin) * part).max(0.0) / 1e3)
    }
}
