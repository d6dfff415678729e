//! Sinks that are made before they are needed: making one may mean to connect to another host, which
//! belongs before the freeze.

use std::sync::{Arc, Mutex, PoisonError};

use super::super::page_client::SinkError;

/// The caller's way to make one.
pub(super) type Make<S> = Box<dyn FnMut() -> Result<S, SinkError> + Send>;

/// Makes sinks, and keeps one that nobody took.
pub(super) struct Maker<S> {
    inner: Mutex<Inner<S>>,
}

struct Inner<S> {
    make: Make<S>,
    spare: Option<S>,
}

impl<S: Send + 'static> Maker<S> {
    pub(super) fn new(make: Make<S>) -> Arc<Self> {
        let inner = Mutex::new(Inner { make, spare: None });
        Arc::new(Self { inner })
    }

    /// Begins to make one, if none is there. A failure is told to whoever needs one, by another try.
    pub(super) fn prepare(self: &Arc<Self>) {
        let maker = self.clone();
        std::thread::spawn(move || {
            let mut inner = maker.lock();
            if inner.spare.is_none() {
                inner.spare = (inner.make)().ok();
            }
        });
    }

    /// Drops the one that is there: nobody is about to need it, and it may keep others from the
    /// destination.
    pub(super) fn discard(&self) {
        // One that is just being made stays until the next time.
        if let Ok(mut inner) = self.inner.try_lock() {
            inner.spare = None;
        }
    }

    /// One that was made before, and whether it was; waits while one is being made.
    pub(super) fn take(&self) -> Result<(S, bool), SinkError> {
        let mut inner = self.lock();
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
