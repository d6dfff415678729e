//! Sinks that are made before they are needed: making one may mean to connect to another host, which
//! belongs before the freeze.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::page_client::SinkError;

/// The caller's way to make one.
pub(super) type Make<S> = Box<dyn FnMut() -> Result<S, SinkError> + Send>;

/// Makes sinks, and keeps one that nobody took.
pub(super) struct Maker<S> {
    inner: Mutex<Inner<S>>,
    /// A thread makes one ahead, or is about to.
    making: AtomicBool,
    /// One that was made ahead would have a use. Otherwise it only keeps others from the destination.
    wanted: AtomicBool,
    /// Called after one was made ahead: whoever waited for it may have left.
    made: Box<dyn Fn() + Send + Sync>,
}

struct Inner<S> {
    make: Make<S>,
    spare: Option<S>,
}

impl<S: Send + 'static> Maker<S> {
    pub(super) fn new(make: Make<S>, made: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner { make, spare: None }),
            making: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            made: Box::new(made),
        })
    }

    /// Begins to make one, if none is there. A failure is told to whoever needs one, by another try.
    pub(super) fn prepare(self: &Arc<Self>) {
        self.wanted.store(true, Ordering::SeqCst);
        if self.making.swap(true, Ordering::SeqCst) {
            return;
        }
        let maker = self.clone();
        std::thread::spawn(move || {
            // Also where `make` panics.
            let _over = Over(&maker);
            let mut inner = maker.lock();
            // Whoever took the lock first may have made one for itself.
            if inner.spare.is_none() && maker.wanted.load(Ordering::SeqCst) {
                inner.spare = (inner.make)().ok();
            }
        });
    }

    /// Drops the one that is there: nobody is about to need it, and it may keep others from the
    /// destination.
    pub(super) fn discard(&self) {
        self.wanted.store(false, Ordering::SeqCst);
        // For one that is just being made this is called again when it is there.
        if let Ok(mut inner) = self.inner.try_lock() {
            inner.spare = None;
        }
    }

    /// One that was made before, and whether it was; waits while one is being made.
    pub(super) fn take(&self) -> Result<(S, bool), SinkError> {
        let mut inner = self.lock();
        self.wanted.store(false, Ordering::SeqCst);
        match inner.spare.take() {
            Some(sink) => Ok((sink, true)),
            None => (inner.make)().map(|sink| (sink, false)),
        }
    }

    /// One that is surely new.
    pub(super) fn fresh(&self) -> Result<S, SinkError> {
        (self.lock().make)()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner<S>> {
        // A `make` that panicked may work the next time.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a thread that makes one ahead. Dropped after the lock.
struct Over<'a, S>(&'a Maker<S>);

impl<S> Drop for Over<'_, S> {
    fn drop(&mut self) {
        self.0.making.store(false, Ordering::SeqCst);
        (self.0.made)();
    }
}
