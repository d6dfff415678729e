//! What CRIU's dump and restore cost on this host: measured in each migration, remembered for the next.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a host costs that has not measured yet: 60 ms, and 2.5 and 1.5 GB/s.
const FIRST_DUMP: Cost = Cost {
    base_ns: 60_000_000,
    ns_per_mib: 420_000,
};
const FIRST_RESTORE: Cost = Cost {
    base_ns: 60_000_000,
    ns_per_mib: 700_000,
};

/// How much a new measurement counts: scatter is large, and hosts change rarely.
const WEIGHT: u64 = 4;

/// A fixed part and one that grows with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost {
    base_ns: u64,
    ns_per_mib: u64,
}

impl Cost {
    fn of(self, bytes: u64) -> Duration {
        Duration::from_nanos(self.base_ns + (bytes >> 20).saturating_mul(self.ns_per_mib))
    }

    // Moves towards what was measured, the part that grows first: memory decides for large trees,
    // where the estimate matters.
    fn learn(self, bytes: u64, took: Duration) -> Self {
        let took = super::clock::nanos(took);
        let mib = bytes >> 20;
        let toward = |old: u64, new: u64| (old * (WEIGHT - 1) + new) / WEIGHT;
        if mib < 64 {
            return Self {
                base_ns: toward(self.base_ns, took.min(10_000_000_000)),
                ..self
            };
        }
        let growing = took.saturating_sub(self.base_ns) / mib;
        Self {
            ns_per_mib: toward(self.ns_per_mib, growing),
            ..self
        }
    }
}

static KNOWN: Mutex<Option<(Cost, Cost)>> = Mutex::new(None);

fn place() -> PathBuf {
    Path::new("/run/crxfer").join("costs")
}

fn known() -> (Cost, Cost) {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    *known.get_or_insert_with(|| read().unwrap_or((FIRST_DUMP, FIRST_RESTORE)))
}

fn read() -> Option<(Cost, Cost)> {
    parse(&fs::read_to_string(place()).ok()?)
}

fn parse(text: &str) -> Option<(Cost, Cost)> {
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    let mut cost = || {
        Some(Cost {
            base_ns: numbers.next()?.ok()?,
            ns_per_mib: numbers.next()?.ok()?,
        })
    };
    Some((cost()?, cost()?))
}

fn remember(dump: Cost, restore: Cost) {
    *KNOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some((dump, restore));
    let text = format!(
        "{} {} {} {}\n",
        dump.base_ns, dump.ns_per_mib, restore.base_ns, restore.ns_per_mib
    );
    let path = place();
    if let Some(parent) = path.parent() {
        let _ = fs::DirBuilder::new().mode(0o700).create(parent);
    }
    // An estimate: where it cannot be kept the next one begins anew.
    let draft = path.with_extension(std::process::id().to_string());
    if fs::write(&draft, text).is_ok() {
        let _ = fs::rename(&draft, &path);
    }
}

/// What CRIU's dump of a tree of so many bytes takes here, about.
pub(crate) fn dump(bytes: u64) -> Duration {
    known().0.of(bytes)
}

/// What CRIU's restore takes here, about.
pub(crate) fn restore(bytes: u64) -> Duration {
    known().1.of(bytes)
}

/// A dump took this long.
pub(crate) fn learn_dump(bytes: u64, took: Duration) {
    let (dump, restore) = known();
    remember(dump.learn(bytes, took), restore);
}

/// A restore took this long.
pub(crate) fn learn_restore(bytes: u64, took: Duration) {
    let (dump, restore) = known();
    remember(dump, restore.learn(bytes, took));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_come_nearer_to_what_is_measured() {
        let mut cost = FIRST_RESTORE;
        let bytes = 1000 << 20;
        let real = Duration::from_millis(2060);
        for _ in 0..20 {
            cost = cost.learn(bytes, real);
        }
        assert!(cost.of(bytes).abs_diff(real) < Duration::from_millis(20));
        assert_eq!(cost.base_ns, FIRST_RESTORE.base_ns);
    }

    #[test]
    fn what_is_kept_comes_back_and_nonsense_does_not() {
        let kept = parse("1 2 3 4\n").unwrap();
        assert_eq!((kept.0.base_ns, kept.1.ns_per_mib), (1, 4));
        assert_eq!(parse("1 2 3"), None);
        assert_eq!(parse("a b c d"), None);
    }
}
