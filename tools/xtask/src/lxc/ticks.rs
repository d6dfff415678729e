//! What the blank container has noted: when it ran, and on which host.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// One note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tick {
    /// Nanoseconds since 1970.
    at: u64,
    /// The network namespace of the host.
    network: u64,
}

/// All notes, in the order in which the container's memory numbers them.
#[derive(Clone, Debug)]
pub(crate) struct Ticks(Vec<Tick>);

impl Ticks {
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let number = |half: &[u8]| u64::from_ne_bytes(half.try_into().unwrap_or_default());
        let tick = |record: &[u8]| Tick {
            at: number(&record[..8]),
            network: number(&record[8..]),
        };
        Ok(Self(bytes.chunks_exact(16).map(tick).collect()))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The longest time without a note, from note number `since` on.
    pub(crate) fn longest_gap(&self, since: usize) -> Duration {
        let pairs = self.0.get(since..).unwrap_or_default().windows(2);
        let gaps = pairs.map(|pair| pair[1].at.saturating_sub(pair[0].at));
        Duration::from_nanos(gaps.max().unwrap_or(0))
    }

    /// Fails unless one container wrote them, on one host after the other, the last `host`: two at once
    /// would write over each other's notes.
    pub(crate) fn ensure_one_writer(&self, hosts: usize) -> Result<()> {
        let mut seen: Vec<u64> = self.0.iter().map(|tick| tick.network).collect();
        seen.dedup();
        ensure!(
            seen.len() == hosts,
            "the container noted {} changes of host, not {}: {seen:?}",
            seen.len() - 1,
            hosts - 1
        );
        let back = self.0.windows(2).position(|pair| pair[1].at < pair[0].at);
        ensure!(back.is_none(), "time goes back at note {back:?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(notes: &[(u64, u64)]) -> Ticks {
        let tick = |&(at, network): &(u64, u64)| Tick { at, network };
        Ticks(notes.iter().map(tick).collect())
    }

    #[test]
    fn second_writer_is_seen() {
        let moved = ticks(&[(1, 7), (2, 7), (9, 8), (10, 8)]);
        moved.ensure_one_writer(2).expect("one after the other");
        assert!(moved.ensure_one_writer(1).is_err());
        assert_eq!(moved.longest_gap(0), Duration::from_nanos(7));
        let both = ticks(&[(1, 7), (9, 8), (9, 7), (10, 8)]);
        assert!(both.ensure_one_writer(2).is_err());
        assert!(ticks(&[(5, 7), (4, 7)]).ensure_one_writer(1).is_err());
    }
}
