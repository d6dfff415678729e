//! `crxfer recover`, as an operator or a service manager runs it on one host.

use anyhow::{Context, Result};
use serde_json::Value;

use super::ground::Ground;
use crate::hosts::Side;
use crate::run;

/// What one call found, for all journals of a host.
#[derive(Clone, Debug, Default)]
pub(super) struct Recovery {
    /// Migrations that are not finished, as it tells of them.
    pub(super) unfinished: Vec<Value>,
    /// All that it said, for the logs.
    pub(super) said: String,
}

/// Seconds that one call may wait for the other host.
const PATIENCE: &str = "3";

impl Recovery {
    /// Runs it on `side` with `more` options.
    pub(super) fn run(ground: &Ground, side: Side, more: &[&str]) -> Result<Self> {
        let mut all = Self::default();
        if !ground.tested.recovers {
            return Ok(all);
        }
        for journals in ground.journals(side) {
            let mut command = ground.command(side, "recover");
            command.args(["--json", "--wait", PATIENCE, "--state"]);
            command.arg(&journals).args(more);
            let output = command.output().context("cannot start crxfer recover")?;
            let text = String::from_utf8_lossy(&output.stdout);
            all.said.push_str(&format!(
                "recover {side:?} {} {more:?}: {}\n{}\n",
                journals.display(),
                output.status,
                run::said(&output)
            ));
            all.unfinished.extend(unfinished(&text));
        }
        Ok(all)
    }

    /// Whether nothing is left to do.
    pub(super) fn is_done(&self) -> bool {
        self.unfinished.is_empty()
    }
}

fn unfinished(text: &str) -> Vec<Value> {
    let values = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    values
        .filter(|value: &Value| value["finished"] == Value::Bool(false))
        .collect()
}
