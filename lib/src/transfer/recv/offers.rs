//! Which page session was offered last, by name: the kernel tracks changes from one dump on, and of
//! several sessions only one can hold that dump.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the page sessions of one receiver have in common.
#[derive(Debug, Default)]
pub(super) struct Offers {
    count: AtomicU64,
    last: Mutex<HashMap<String, u64>>,
    // Held while something is published or tracked on what `last` says. Not to be taken in a runtime.
    order: Mutex<()>,
}

/// Nothing is offered, begun or withdrawn in a way that changes what may be tracked while this lives.
#[derive(Debug)]
pub(super) struct Ordered<'a> {
    offers: &'a Offers,
    _order: MutexGuard<'a, ()>,
}

impl Offers {
    /// A number for a session.
    pub(super) fn number(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn lock(&self) -> Ordered<'_> {
        Ordered {
            offers: self,
            _order: self.order.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// The dump of session `number` begins, and `continues` one before it. False: another one may have
    /// begun since, so that what CRIU leaves out is not what is held.
    pub(super) fn begin(&self, name: &str, number: u64, continues: bool) -> bool {
        let mut last = self.last();
        if last.get(name) == Some(&number) {
            return true;
        }
        // This dump takes the tracking away from whoever was offered later.
        last.remove(name);
        !continues
    }

    fn last(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ordered<'_> {
    /// From now on session `number` is the last for `name`.
    pub(super) fn offer(&self, name: &str, number: u64) {
        self.offers.last().insert(name.to_owned(), number);
    }

    /// Whether session `number` is the last.
    pub(super) fn is_last(&self, name: &str, number: u64) -> bool {
        self.offers.last().get(name) == Some(&number)
    }

    /// Whether any session has been offered, and not ended.
    pub(super) fn has_any(&self, name: &str) -> bool {
        self.offers.last().contains_key(name)
    }

    /// Session `number` dumps no more.
    pub(super) fn remove(&self, name: &str, number: u64) {
        let mut last = self.offers.last();
        if last.get(name) == Some(&number) {
            last.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_one_that_was_offered_continues() {
        let offers = Offers::default();
        let (first, second) = (offers.number(), offers.number());
        offers.lock().offer("web", first);
        offers.lock().offer("web", second);
        assert!(!offers.lock().is_last("web", first));
        // Who is not the last removes nothing, and does not begin on what was held.
        offers.lock().remove("web", first);
        assert!(offers.begin("web", second, true));
        assert!(!offers.begin("web", first, true));
        assert!(!offers.begin("web", second, true));
    }

    #[test]
    fn a_whole_dump_takes_the_tracking_from_later_offers() {
        let offers = Offers::default();
        let (first, second) = (offers.number(), offers.number());
        offers.lock().offer("web", first);
        offers.lock().offer("web", second);
        assert!(offers.begin("web", first, false));
        assert!(!offers.lock().is_last("web", second));
        assert!(!offers.begin("web", second, true));
        assert!(!offers.lock().has_any("web"));
    }
}
