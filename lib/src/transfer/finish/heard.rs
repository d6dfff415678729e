//! When the destination was heard last: the clock of the policy for partitions.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A destination at work says so every ten seconds: one that has, this long ago at most, is about to
/// answer.
const AT_WORK: Duration = Duration::from_secs(15);

/// Whoever finishes a migration does so in rounds, and its time runs on from one to the next.
static CLOCKS: LazyLock<Mutex<HashMap<Box<Path>, Heard>>> = LazyLock::new(Mutex::default);

/// The clock of one migration in this process. Another process begins its own: it does not know what
/// the one before has heard.
#[derive(Clone, Debug)]
pub(super) struct Heard(Arc<Mutex<Last>>);

#[derive(Clone, Copy, Debug)]
struct Last {
    // At first when finishing began.
    word: Instant,
    // In the meeting under way.
    at_work: Option<Instant>,
}

impl Last {
    /// Whether nothing was heard for `wait`, and no answer is being waited for.
    fn is_cut_off(self, now: Instant, wait: Duration) -> bool {
        let since = |at| now.saturating_duration_since(at);
        let is_answering = self.at_work.is_some_and(|at| since(at) < AT_WORK);
        !is_answering && since(self.word) >= wait
    }
}

impl Heard {
    /// That of the migration with this directory.
    pub(super) fn of(journal: &Path) -> Self {
        let mut clocks = CLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        let clock = clocks.entry(journal.into()).or_insert_with(|| {
            Self(Arc::new(Mutex::new(Last {
                word: now(),
                at_work: None,
            })))
        });
        clock.clone()
    }

    /// Nothing is left to be decided.
    pub(super) fn forget(journal: &Path) {
        let mut clocks = CLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        clocks.remove(journal);
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is at work, and will answer.
    pub(super) fn works(&self) {
        let now = now();
        *self.last() = Last {
            word: now,
            at_work: Some(now),
        };
    }

    /// It has answered.
    pub(super) fn answered(&self) {
        *self.last() = Last {
            word: now(),
            at_work: None,
        };
    }

    /// The meeting is over, with an answer or without.
    pub(super) fn parted(&self) {
        self.last().at_work = None;
    }

    /// Whether the destination was silent for `wait`.
    pub(super) fn is_cut_off(&self, wait: Duration) -> bool {
        self.last().is_cut_off(now(), wait)
    }
}

#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(5);

    #[test]
    fn any_word_begins_the_time_anew() {
        let begun = now();
        let mut last = Last {
            word: begun,
            at_work: None,
        };
        assert!(!last.is_cut_off(begun + WAIT / 2, WAIT));
        assert!(last.is_cut_off(begun + WAIT, WAIT));
        last.word = begun + WAIT / 2;
        assert!(!last.is_cut_off(begun + WAIT, WAIT));
        assert!(last.is_cut_off(begun + WAIT * 3 / 2, WAIT));
    }

    #[test]
    fn who_is_at_work_is_waited_for() {
        let begun = now();
        let last = Last {
            word: begun,
            at_work: Some(begun),
        };
        // Longer than the wait, shorter than to its next word.
        assert!(!last.is_cut_off(begun + WAIT * 2, WAIT));
        assert!(last.is_cut_off(begun + AT_WORK, WAIT));
        let parted = Last {
            at_work: None,
            ..last
        };
        assert!(parted.is_cut_off(begun + WAIT * 2, WAIT));
    }

    #[test]
    fn a_clock_runs_on_from_round_to_round() {
        let journal = Path::new("/nonexistent/rounds");
        let first = Heard::of(journal);
        first.works();
        assert!(Heard::of(journal).last().at_work.is_some());
        Heard::of(journal).parted();
        assert!(first.last().at_work.is_none());
        Heard::forget(journal);
        Heard::of(journal).works();
        assert!(first.last().at_work.is_none(), "it is another one");
        Heard::forget(journal);
    }
}
