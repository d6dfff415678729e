//! What was checked before a migration, as a table.

use crxfer::preflight::Outcome;
use crxfer::transfer::migrate::HostCheck;

/// Lines for `checks`; with `all` also those that passed. Colours are for terminals.
pub(super) fn lines(checks: &[HostCheck], all: bool, colour: bool) -> Vec<String> {
    let is_shown =
        |it: &&HostCheck| all || matches!(it.check.outcome, Outcome::Warning | Outcome::Failed);
    let shown: Vec<_> = checks.iter().filter(is_shown).collect();
    let width = shown.iter().map(|it| it.check.name.chars().count()).max();
    let width = width.unwrap_or(0);
    let mut lines = Vec::new();
    let mut last = None;
    for HostCheck { host, check } in shown {
        if last.replace(*host) != Some(*host) {
            lines.push(format!("{}:", host.as_str()));
        }
        let mark = mark(check.outcome, colour);
        let line = format!("{mark} {:width$}  {}", check.name, check.found);
        lines.push(line.trim_end().to_owned());
        if !check.advice.is_empty() {
            lines.push(format!("  {:width$}  → {}", "", check.advice));
        }
    }
    lines
}

fn mark(outcome: Outcome, colour: bool) -> String {
    let (mark, code) = match outcome {
        Outcome::Passed => ("✓", 32),
        Outcome::Skipped => ("–", 2),
        Outcome::Warning => ("!", 33),
        Outcome::Failed => ("✗", 31),
    };
    if colour {
        format!("\x1b[{code}m{mark}\x1b[0m")
    } else {
        mark.to_owned()
    }
}

/// A word for programs.
pub(super) fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Skipped => "skipped",
        Outcome::Warning => "warning",
        Outcome::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use crxfer::preflight::Check;
    use crxfer::transfer::migrate::Host;

    use super::*;

    fn checks() -> Vec<HostCheck> {
        let here = vec![
            Check::passed("criu", "4.2.1 on both"),
            Check::skipped("cpu", "not compared"),
            Check::warning("memory", "1.1 GiB free of 1 GiB needed", "free some"),
        ];
        let there = vec![Check::failed(
            "pids",
            "pid 7 is taken by sshd",
            "restart the receiver",
        )];
        HostCheck::all(Host::Source, here)
            .chain(HostCheck::all(Host::Destination, there))
            .collect()
    }

    #[test]
    fn every_check_has_its_mark_and_advice_below() {
        assert_eq!(
            lines(&checks(), true, false).join("\n"),
            "\
source:
✓ criu    4.2.1 on both
– cpu     not compared
! memory  1.1 GiB free of 1 GiB needed
          → free some
destination:
✗ pids    pid 7 is taken by sshd
          → restart the receiver"
        );
    }

    #[test]
    fn a_real_run_shows_only_what_matters() {
        let lines = lines(&checks(), false, false);
        assert_eq!(lines.len(), 6);
        assert!(lines[1].starts_with("! memory"));
    }

    #[test]
    fn colour_is_only_for_terminals() {
        let plain = lines(&checks(), true, false).join("");
        assert!(!plain.contains('\x1b'));
        assert!(lines(&checks(), true, true)[1].starts_with("\x1b[32m✓\x1b[0m criu"));
    }
}
