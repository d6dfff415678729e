//! What the journals of a host say, read by the harness's own reader.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::ground::Ground;
use crate::hosts::Side;

/// Whose the workload is, as an operator decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Source,
    Destination,
}

/// One journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Journal {
    /// `source-ID` or `destination-ID`.
    pub(super) name: String,
    /// The last state, as it is written.
    pub(super) state: String,
}

impl Journal {
    /// Whether nothing is left to do: at most an answer is kept for a peer that asks.
    pub(super) fn is_finished(&self) -> bool {
        let finished: &[&str] = match self.name.starts_with("source-") {
            true => &["over"],
            false => &["running", "removed", "over"],
        };
        finished.contains(&self.state.as_str())
    }
}

/// All journals of a host.
pub(super) fn all(ground: &Ground, side: Side) -> Vec<Journal> {
    let places = ground.journals(side);
    places.iter().flat_map(|place| below(place)).collect()
}

/// Whether a journal of a source on `side` has ever been in `state`.
pub(super) fn was(ground: &Ground, side: Side, state: &str) -> bool {
    let entries = fs::read_dir(ground.directory(side, "state"));
    let mut texts = entries.into_iter().flatten().flatten().filter_map(|entry| {
        let is_source = entry.file_name().to_string_lossy().starts_with("source-");
        let text = fs::read_to_string(entry.path().join("journal")).ok()?;
        is_source.then_some(text)
    });
    texts.any(|text| states(&text).any(|one| one == state))
}

/// Those that are not finished.
pub(super) fn unfinished(ground: &Ground, side: Side) -> Vec<Journal> {
    let mut journals = all(ground, side);
    journals.retain(|journal| !journal.is_finished());
    journals
}

fn below(place: &Path) -> Vec<Journal> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    let journal = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path().join("journal")).ok()?;
        Some(Journal {
            name: entry.file_name().to_string_lossy().into_owned(),
            state: states(&text).next()?,
        })
    };
    entries.filter_map(journal).collect()
}

/// The states that a journal names, the last first. Each line is a checksum and a record.
fn states(text: &str) -> impl Iterator<Item = String> {
    let values = text.lines().rev().filter_map(|line| {
        let (_, json) = line.split_once(' ')?;
        serde_json::from_str::<Value>(json).ok()
    });
    values.filter_map(|value| {
        let state = value.get("state")?.get("state")?;
        Some(state.as_str()?.to_owned())
    })
}

/// What an operator decides who reads the source's journals: what is committed is the destination's.
/// `None` where nothing is unfinished.
pub(super) fn decision(of_source: &[Journal]) -> Option<Keep> {
    let source = of_source
        .iter()
        .find(|journal| journal.name.starts_with("source-"))?;
    match source.state.as_str() {
        "committed" | "moved" => Some(Keep::Destination),
        _ => Some(Keep::Source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_state_counts_and_a_torn_line_does_not() {
        let text = concat!(
            "01234567 {\"about\":{}}\n",
            "01234567 {\"state\":{\"state\":\"begun\",\"at_ms\":1,\"note\":\"\"}}\n",
            "01234567 {\"state\":{\"state\":\"committed\",\"at_ms\":2,\"note\":\"\"}}\n",
            "01234567 {\"decided\":{\"keep\":\"source\",\"at_ms\":3,\"by\":\"x\"}}\n",
            "0123"
        );
        let state = states(text).next().expect("a state");
        assert_eq!(state, "committed");
        let name = "source-1".to_owned();
        let journal = Journal { name, state };
        assert!(!journal.is_finished());
        assert_eq!(decision(&[journal]), Some(Keep::Destination));
        assert_eq!(decision(&[]), None);
    }
}
