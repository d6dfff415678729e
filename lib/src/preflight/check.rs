//! What a check found, and how it travels.

use std::fmt;

use crxfer_proto::v1;
use prost::Message as _;

use super::facts::{FormatError, limits};

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Nothing is in the way.
    Passed,
    /// It does not apply, or could not be made here.
    Skipped,
    /// The migration may go wrong, or be slower than it need be.
    Warning,
    /// The migration would fail, or the workload could be lost or run twice: it is not begun.
    Failed,
}

/// One check of one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What is checked: a short name that stays the same.
    pub name: String,
    /// What came of it.
    pub outcome: Outcome,
    /// What was found, with the values.
    pub found: String,
    /// What to do about it; empty where there is nothing to do.
    pub advice: String,
}

impl Check {
    /// Nothing is in the way.
    pub fn passed(name: &str, found: impl Into<String>) -> Self {
        Self::new(name, Outcome::Passed, found, "")
    }

    /// It does not apply, or could not be made.
    pub fn skipped(name: &str, found: impl Into<String>) -> Self {
        Self::new(name, Outcome::Skipped, found, "")
    }

    /// The migration goes on, and this is shown.
    pub fn warning(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(name, Outcome::Warning, found, advice)
    }

    /// The migration is not begun.
    pub fn failed(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(name, Outcome::Failed, found, advice)
    }

    /// A risk rather than a certain failure: `force` makes it a warning.
    pub fn guarded(
        name: &str,
        force: bool,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        if force {
            return Self::warning(name, found, "goes on because of --force");
        }
        let advice = format!("{}, or go on with --force", advice.into());
        Self::failed(name, found, advice)
    }

    fn new(
        name: &str,
        outcome: Outcome,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            name: cut(name.into()),
            outcome,
            found: cut(found.into()),
            advice: cut(advice.into()),
        }
    }

    fn from_proto(check: v1::FactsCheck) -> Result<Self, FormatError> {
        let outcome = OUTCOMES
            .iter()
            .find(|(number, _)| *number == check.outcome)
            .ok_or(FormatError::Field("outcome of a check"))?;
        for text in [&check.name, &check.found, &check.advice] {
            if text.len() > limits::TEXT || text.chars().any(char::is_control) {
                return Err(FormatError::Field("text of a check"));
            }
        }
        Ok(Self {
            name: check.name,
            outcome: outcome.1,
            found: check.found,
            advice: check.advice,
        })
    }

    fn to_proto(&self) -> v1::FactsCheck {
        let outcome = OUTCOMES.iter().find(|(_, ours)| *ours == self.outcome);
        v1::FactsCheck {
            name: cut(self.name.clone()),
            outcome: outcome.map_or(0, |(number, _)| *number),
            found: cut(self.found.clone()),
            advice: cut(self.advice.clone()),
        }
    }
}

const OUTCOMES: [(u32, Outcome); 4] = [
    (1, Outcome::Passed),
    (2, Outcome::Warning),
    (3, Outcome::Failed),
    (4, Outcome::Skipped),
];

/// Whether none of `checks` stops the migration.
pub fn may_begin(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.outcome != Outcome::Failed)
}

/// The bytes that [`decode_checks`] takes. Above [`limits::CHECK_COUNT`]
/// the least serious are left out.
pub fn encode_checks(checks: &[Check]) -> Vec<u8> {
    let mut kept: Vec<&Check> = checks.iter().collect();
    if kept.len() > limits::CHECK_COUNT {
        kept.sort_by_key(|check| std::cmp::Reverse(check.outcome));
        kept.truncate(limits::CHECK_COUNT);
    }
    let checks = kept.into_iter().map(Check::to_proto).collect();
    v1::FactsChecks { checks }.encode_to_vec()
}

/// What the destination found.
///
/// # Errors
/// When the list is too long, no such message, or has a text that is too long or not printable.
pub fn decode_checks(bytes: &[u8]) -> Result<Vec<Check>, FormatError> {
    if bytes.len() > limits::CHECKS {
        return Err(FormatError::TooLarge("preflight checks", bytes.len()));
    }
    let list = v1::FactsChecks::decode(bytes)
        .map_err(|_| FormatError::NotTheMessage("preflight checks"))?;
    if list.checks.len() > limits::CHECK_COUNT {
        return Err(FormatError::Field("number of checks"));
    }
    list.checks.into_iter().map(Check::from_proto).collect()
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Passed => "passed",
            Self::Skipped => "skipped",
            Self::Warning => "warning",
            Self::Failed => "failed",
        })
    }
}

/// `name: found; advice`, one line.
impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.found)?;
        if self.advice.is_empty() {
            return Ok(());
        }
        write!(f, "; {}", self.advice)
    }
}

// Texts hold names of files and processes, which may be anything: they end on terminals.
fn cut(text: String) -> String {
    let mut text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.len() > limits::TEXT {
        let most = limits::TEXT - '…'.len_utf8();
        let end = (0..=most).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}

/// One check of each outcome: a seed of the corpus.
#[cfg(any(test, feature = "testing"))]
pub fn sample_checks() -> Vec<Check> {
    vec![
        Check::passed("kernel", "6.1.0"),
        Check::skipped("pids", "the tree has its own pid namespace"),
        Check::warning("network lock", "iptables", "install nftables"),
        Check::failed("memory", "1 GiB is free", "free 1 GiB more"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_come_back_as_they_were_sent() {
        let checks = sample_checks();
        assert_eq!(decode_checks(&encode_checks(&checks)), Ok(checks));
    }

    #[test]
    fn texts_are_cut_and_printable() {
        let check = Check::failed("files", "ä".repeat(limits::TEXT), "a\u{1b}[2Jb\n");
        assert!(check.found.len() <= limits::TEXT && check.found.ends_with('…'));
        assert_eq!(check.advice, "a [2Jb ");
        assert_eq!(
            decode_checks(&encode_checks(std::slice::from_ref(&check))),
            Ok(vec![check])
        );
    }

    #[test]
    fn of_too_many_checks_the_failed_ones_are_sent() {
        let mut checks = vec![Check::passed("a", ""); 100];
        checks.push(Check::failed("b", "", ""));
        let sent = decode_checks(&encode_checks(&checks)).expect("they fit");
        assert!(sent.len() == limits::CHECK_COUNT && !may_begin(&sent));
    }

    #[test]
    fn what_is_no_list_of_checks_is_refused() {
        let raw = |outcome, text: &str| {
            let check = v1::FactsCheck {
                outcome,
                found: text.into(),
                ..Default::default()
            };
            decode_checks(
                &v1::FactsChecks {
                    checks: vec![check],
                }
                .encode_to_vec(),
            )
        };
        assert!(raw(1, "good").is_ok());
        assert!(raw(0, "good").is_err());
        assert!(raw(1, "\u{7}").is_err());
        assert!(raw(1, &"x".repeat(limits::TEXT + 1)).is_err());
        assert!(decode_checks(&vec![0; limits::CHECKS + 1]).is_err());
        let many = v1::FactsChecks {
            checks: vec![Check::passed("", "").to_proto(); 65],
        };
        assert!(decode_checks(&many.encode_to_vec()).is_err());
    }

    #[test]
    fn the_longest_list_fits() {
        let text = "x".repeat(limits::TEXT);
        let check = Check::failed(&text, text.clone(), text.clone());
        let checks = vec![check; limits::CHECK_COUNT];
        assert_eq!(decode_checks(&encode_checks(&checks)), Ok(checks));
    }

    #[test]
    fn force_turns_a_risk_into_a_warning() {
        let guarded = |force| Check::guarded("cpu", force, "lacks avx2", "choose another host");
        assert_eq!(guarded(true).outcome, Outcome::Warning);
        assert_eq!(guarded(false).outcome, Outcome::Failed);
        assert!(guarded(false).advice.contains("--force"));
    }
}
