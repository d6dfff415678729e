//! What stands between a session and its sink: the sink is made when it is needed, and the time that it
//! keeps CRIU waiting is known to the supervisor.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::super::page_client::{PageSink, SinkError};
use super::super::page_server::Batch;
use super::maker::Maker;
use super::now;
use crate::image::{PageRun, PagemapName};

/// Why a session was cut from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    Slow,
    Stopped,
}

/// What the supervisor and a session know of each other.
#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Since when the sink has been at work.
    busy: Option<Instant>,
    cut: Option<Cut>,
}

impl Shared {
    pub(super) fn busy_since(&self) -> Option<Instant> {
        self.state(|state| state.busy)
    }

    /// From now on nothing goes to the sink any more.
    pub(super) fn cut(&self, why: Cut) {
        self.state(|state| state.cut.get_or_insert(why).to_owned());
    }

    pub(super) fn why_cut(&self) -> Option<Cut> {
        self.state(|state| state.cut)
    }

    fn state<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn call<T>(&self, call: impl FnOnce() -> Result<T, SinkError>) -> Result<T, SinkError> {
        let begun = now();
        let cut = self.state(|state| {
            state.busy = Some(begun);
            state.cut
        });
        let result = match cut {
            None => call(),
            Some(_) => Err("CRIU's connection was closed".into()),
        };
        self.state(|state| state.busy = None);
        result
    }
}

/// The sink of one session.
pub(super) struct Guarded<S> {
    maker: Arc<Maker<S>>,
    shared: Arc<Shared>,
    sink: Option<S>,
    /// Whether CRIU has images of a dump before, on which this one can build.
    continues: bool,
    /// Whether any memory came, or was said to be in the parent.
    filled: bool,
}

impl<S: PageSink + Send + 'static> Guarded<S> {
    pub(super) fn new(maker: Arc<Maker<S>>, shared: Arc<Shared>, continues: bool) -> Self {
        Self {
            maker,
            shared,
            sink: None,
            continues,
            filled: false,
        }
    }

    pub(super) fn into_sink(self) -> Option<S> {
        self.sink
    }

    /// The first question of a session. A sink that was made long before, and fails at once, may have
    /// lost its destination meanwhile.
    fn ask(&mut self, ask: impl Fn(&mut S) -> Result<bool, SinkError>) -> Result<bool, SinkError> {
        let (sink, maker) = (&mut self.sink, &self.maker);
        self.shared.call(|| {
            if let Some(sink) = sink {
                return ask(sink);
            }
            let (mut made, spare) = maker.take()?;
            let mut answer = ask(&mut made);
            if answer.is_err() && spare {
                drop(made);
                made = maker.fresh()?;
                answer = ask(&mut made);
            }
            *sink = Some(made);
            answer
        })
    }

    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut S) -> Result<T, SinkError>,
    ) -> Result<T, SinkError> {
        let sink = self.sink.as_mut();
        self.shared
            .call(|| call(sink.ok_or("pages of nothing that was opened")?))
    }
}

impl<S: PageSink + Send + 'static> PageSink for Guarded<S> {
    // A CRIU without images of the dump before fails if it hears that the server has it.

    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        let held = self.ask(|sink| sink.open(space))?;
        Ok(held && self.continues)
    }

    fn has_parent(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        let held = self.ask(|sink| sink.has_parent(space))?;
        Ok(held && self.continues)
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        self.filled = true;
        self.call(|sink| sink.pages(batch, bytes))
    }

    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError> {
        self.filled = true;
        self.call(|sink| sink.elsewhere(space, run))
    }

    /// A CRIU that fails says CLOSE all the same. No process is without memory: where none has come, it
    /// must not become a generation.
    fn close(&mut self) -> Result<i32, SinkError> {
        if !self.filled {
            self.sink = None;
            return Ok(0);
        }
        self.call(PageSink::close)
    }
}
