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
        let mut command = ground.command(side, "recover");
        command
            .args(["--json", "--wait", PATIENCE, "--state"])
            .arg(ground.directory(side, "state"))
            .arg("--dir")
            .arg(ground.directory(side, "received"))
            .args(more);
        let output = command.output().context("cannot start crxfer recover")?;
        let text = String::from_utf8_lossy(&output.stdout);
        all.said = format!(
            "recover {side:?} {more:?}: {}\n{}",
            output.status,
            run::said(&output)
        );
        all.unfinished = unfinished(&text);
        if !output.status.success() && all.unfinished.is_empty() {
            all.unfinished.push(Value::String(all.said.clone()));
        }
        Ok(all)
    }

    /// Whether nothing is left to do.
    pub(super) fn is_done(&self) -> bool {
        self.unfinished.is_empty()
    }
}

/// Outcomes after which nothing is left to do.
const FINISHED: [&str; 5] = ["kept", "moved", "running", "removed", "over"];

fn unfinished(text: &str) -> Vec<Value> {
    let values = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    values
        .filter(|value| value["event"] == "outcome")
        .filter(|value| !FINISHED.iter().any(|outcome| value["outcome"] == *outcome))
        .collect()
}
