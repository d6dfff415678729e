//! How runs ended, and how many of each kind did.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;

use super::plan::Plan;
use super::run::Passed;

/// How one run ended.
#[derive(Debug)]
pub(super) struct Ended {
    outcome: Result<Passed, String>,
    ms: u128,
}

impl Ended {
    pub(super) fn new(outcome: Result<Passed>, ms: u128) -> Self {
        Self {
            outcome: outcome.map_err(|error| format!("{error:#}")),
            ms,
        }
    }

    /// One line for people; a failure has more below.
    pub(super) fn line(&self, plan: &Plan) -> String {
        let seed = plan.seed;
        match &self.outcome {
            Ok(passed) => {
                let place = if passed.moved { "moved" } else { "stayed" };
                let code = passed
                    .code
                    .map_or("killed".to_owned(), |code| format!("exit {code}"));
                let when = match passed.struck {
                    true => format!("after {:?}", passed.told),
                    false => "missed".to_owned(),
                };
                let broke = match passed.broke {
                    0 => String::new(),
                    some => format!("{some} CONNECTIONS BROKE, "),
                };
                format!(
                    "  ok      seed {seed}: {plan}: {place}, {code}, {when}, {broke}no answer for {} ms, {} ms",
                    passed.standstill.as_millis(),
                    self.ms
                )
            }
            Err(text) => {
                let text = text.replace('\n', "\n            ");
                format!(
                    "  FAILED  seed {seed}: {plan}, {} ms\n            {text}",
                    self.ms
                )
            }
        }
    }
}

/// Counts of one kind of fault in one phase.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    moved: u32,
    stayed: u32,
    missed: u32,
    failed: u32,
}

/// How all runs ended.
#[derive(Debug, Default)]
pub(super) struct Tally {
    counts: BTreeMap<String, BTreeMap<&'static str, Count>>,
    failed: Vec<u64>,
    criu_killed: u32,
    broke: Vec<u64>,
}

impl Tally {
    pub(super) fn note(&mut self, plan: &Plan, ended: Ended) {
        if let Ok(passed) = &ended.outcome
            && passed.struck
            && plan.fault.kills_criu()
        {
            self.criu_killed += 1;
            if passed.broke > 0 {
                self.broke.push(plan.seed);
            }
        }
        let kind = self.counts.entry(plan.fault.kind()).or_default();
        let count = kind.entry(plan.moment.name()).or_default();
        match ended.outcome {
            Err(_) => {
                count.failed += 1;
                self.failed.push(plan.seed);
            }
            Ok(passed) if !passed.struck => count.missed += 1,
            Ok(passed) if passed.moved => count.moved += 1,
            Ok(_) => count.stayed += 1,
        }
    }

    /// Seeds of the runs that failed.
    pub(super) fn failed(&self) -> &[u64] {
        &self.failed
    }
}

/// Columns, in the order of a migration.
const MOMENTS: [&str; 8] = [
    "pre-copy", "freeze", "transfer", "vote", "commit", "resume", "end", "point",
];

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "moved/stayed, (runs whose fault came too late), ! failed"
        )?;
        write!(f, "{:32}", "")?;
        for moment in MOMENTS {
            write!(f, "{moment:>12}")?;
        }
        writeln!(f)?;
        for (kind, moments) in &self.counts {
            write!(f, "{kind:32}")?;
            for moment in MOMENTS {
                let count = moments.get(moment).copied().unwrap_or_default();
                write!(f, "{:>12}", count.to_string())?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "CRIU killed in {} runs; connections broke by that in {} of them: {:?}",
            self.criu_killed,
            self.broke.len(),
            self.broke
        )
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.moved, self.stayed)?;
        if self.missed > 0 {
            write!(f, " ({})", self.missed)?;
        }
        if self.failed > 0 {
            write!(f, " !{}", self.failed)?;
        }
        Ok(())
    }
}
