//! The source's driver of a page session: [`PagesUpload`] takes what CRIU sends to a page server, and
//! the destination makes a set of it.
//!
//! ```text
//!  CRIU ── page_client::serve ── PagesUpload ── pieces ──▶ thread "pages": hashes, compares
//!                                    │                          │ what the destination lacks
//!              close() waits ◀───────┼── task: control stream   ▼
//!              for Stored            ╰───────────────────── bulk stream
//! ```

mod compare;
mod watch;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, mpsc as blocking};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use self::compare::{Compared, Comparer, Piece};
use self::watch::{Watch, begin};
use super::TransferError;
use super::send::{EndOnDrop, Target, connect, source_config};
use crate::criu::page_client::{PageSink, SinkError};
use crate::criu::page_server::Batch;
use crate::delta::{Known, Outgoing, SetName};
use crate::image::{PageFlags, PageRun, PagemapName};
use crate::page::PageSize;
use crate::session::SessionError;
use crate::transport::{self, CloseCode, Connection, Identity};
use crate::wire::{Failure, FailureCode, Generation, PagesOffer, PagesStored};

/// Pieces of memory that were read and wait for being compared: 8 MiB at most.
const PIECES_WAITING: usize = 8;

/// What CRIU is answered at its end when the destination does not have the dump: any number but 0
/// makes it fail, and resume what it has frozen.
const REFUSED: i32 = 1;

/// Where the memory of dumps goes.
#[derive(Clone, Debug)]
pub struct PagesOptions {
    /// Where to.
    pub target: Target,
    /// Name of the set there.
    pub name: SetName,
    /// This host's key.
    pub identity: Identity,
    /// Settings of the connection.
    pub transport: transport::Options,
    /// Most bytes a second on the wire.
    pub bytes_per_s: Option<u64>,
    /// CRIU is run with `--track-mem` and `--prev-images-dir`: it may leave out pages that the
    /// destination holds and the kernel calls unchanged. A CRIU without `--prev-images-dir` fails
    /// when it is told that something is held ("Pid-reuse detection failed"), so this must be false
    /// for it. What crosses to the destination is the same either way.
    pub leaves_out: bool,
    /// What is remembered from one dump to the next; of this name at this destination only.
    pub memory: PagesMemory,
}

/// What the destination holds, as far as this process has brought it there: then it need not list
/// it for the next dump. Clones are the same memory.
#[derive(Clone, Debug, Default)]
pub struct PagesMemory(Arc<Mutex<Option<Remembered>>>);

#[derive(Debug)]
struct Remembered {
    generation: Generation,
    known: Known,
}

impl PagesMemory {
    fn take(&self) -> Option<Remembered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, remembered: Remembered) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(remembered);
    }
}

/// One dump's memory on its way to the destination, where it becomes the next generation of a set.
///
/// Give it to [`page_client::serve`](crate::criu::page_client::serve), then call
/// [`PagesUpload::finish`]. All calls block; none may come from inside the runtime. Dropping it ends
/// the session: nothing is stored then, unless CRIU's CLOSE has been answered with 0 already.
#[derive(Debug)]
pub struct PagesUpload {
    pieces: Option<blocking::SyncSender<Piece>>,
    comparing: Option<std::thread::JoinHandle<Comparing>>,
    watch: Watch,
    outcome: Option<oneshot::Receiver<Result<PagesStored, TransferError>>>,
    // Memories of which CRIU may leave out what did not change since they were stored.
    held: BTreeSet<PagemapName>,
    memory: PagesMemory,
    // CRIU has said something: its dump resets the kernel's tracking, whatever becomes of it.
    begun: bool,
    // Batches, and pages that were left out.
    pages: u64,
    stored: Option<PagesStored>,
    failed: Option<TransferError>,
    // Of what was stored: for the next dump.
    compared: Option<Box<Compared>>,
    runtime: Handle,
    connection: EndOnDrop,
}

type Comparing = Result<Box<Compared>, TransferError>;

/// Ends an upload from another thread, whatever it waits for: CRIU is answered with a failure.
#[derive(Clone, Debug)]
pub struct PagesCanceller(Connection);

impl PagesCanceller {
    /// Ends the session with the destination. Does nothing where it has ended.
    pub fn cancel(&self) {
        self.0.close(CloseCode::Cancelled, "the sender was stopped");
    }
}

impl PagesUpload {
    /// Connects, and learns what the destination holds. To be called before CRIU freezes anything,
    /// outside of the runtime that `handle` belongs to.
    ///
    /// # Panics
    /// If it is called from inside a runtime.
    pub fn connect(options: PagesOptions, handle: Handle) -> Result<Self, TransferError> {
        let remembered = options.memory.take();
        let offer = PagesOffer {
            name: options.name.clone(),
            page_size: PageSize::of_host(),
            known: remembered.as_ref().map(|it| it.generation),
        };
        let begun = handle.block_on(async {
            let (target, transport) = (&options.target, &options.transport);
            let connection = connect(target, &options.identity, transport).await?;
            let connection = EndOnDrop(connection);
            let config = source_config(target, &connection.0);
            let begun = begin(connection, config, offer, options.bytes_per_s).await?;
            Ok::<_, TransferError>(begun)
        })?;
        let known = match (begun.base.listed, remembered) {
            (Some(listed), _) => listed,
            (None, Some(remembered)) => remembered.known,
            (None, None) => Known::new(PageSize::of_host()),
        };
        let may_leave_out = begun.base.continues && options.leaves_out;
        let held = known.memories().filter(|_| may_leave_out).collect();
        let comparer = Comparer::new(
            Outgoing::building_on(PageSize::of_host(), known),
            begun.stream,
        );
        let (pieces, inbox) = blocking::sync_channel(PIECES_WAITING);
        let comparing = std::thread::Builder::new()
            .name("pages".to_owned())
            .spawn(move || comparer.run(&inbox))
            .map_err(|error| local(format!("cannot start a thread ({error})")))?;
        Ok(Self {
            pieces: Some(pieces),
            comparing: Some(comparing),
            watch: begun.watch,
            outcome: Some(begun.outcome),
            held,
            memory: options.memory,
            begun: false,
            pages: 0,
            stored: None,
            failed: None,
            compared: None,
            runtime: handle,
            connection: begun.connection,
        })
    }

    /// For giving up while a call blocks.
    pub fn canceller(&self) -> PagesCanceller {
        PagesCanceller(self.connection.0.clone())
    }

    /// Ends the session; gives what was stored, or why nothing was. Fails also where CRIU's stream
    /// ended early, so that [`PageSink::close`] was never called.
    pub fn finish(mut self) -> Result<PagesStored, TransferError> {
        let result = match self.stored.take() {
            Some(stored) => Ok(stored),
            None if !self.begun => Err(self.failed.take().unwrap_or(TransferError::Cancelled)),
            None => Err(self.why_not()),
        };
        let (code, reason) = match &result {
            Err(error) if self.begun => (error.close_code(), error.to_string()),
            _ => (CloseCode::Done, String::new()),
        };
        let connection = &self.connection.0;
        self.runtime
            .block_on(connection.close_and_tell(code, &reason));
        if let Ok(stored) = &result {
            self.remember(stored);
        }
        result
    }

    // Why nothing is stored. What this side knows is often the echo of what the destination says.
    fn why_not(&mut self) -> TransferError {
        self.pieces = None;
        let compared = self.comparing.take().filter(|it| it.is_finished());
        let compared = compared.and_then(|it| it.join().ok()?.err());
        let error = self.failed.take().or(compared);
        let error = error.unwrap_or(TransferError::Cancelled);
        self.watch.fail(error.to_failure());
        match self.outcome.take().map(oneshot::Receiver::blocking_recv) {
            Some(Ok(Err(told))) => told,
            _ => error,
        }
    }

    // Fails where the connection has ended: what waits in the queue would hide that for a while.
    fn begin(&mut self) -> Result<(), SinkError> {
        self.begun = true;
        match self.connection.0.close_reason() {
            Some(error) => Err(TransferError::from(error).into()),
            None => Ok(()),
        }
    }

    fn pass_on(&mut self, piece: Piece) -> Result<(), SinkError> {
        self.begin()?;
        let pieces = self.pieces.as_ref().ok_or("it has ended")?;
        let sent = pieces.send(piece);
        // What is wrong, `finish` says.
        sent.map_err(|_| "the destination takes no more of it".into())
    }

    fn close_all(&mut self) -> Result<PagesStored, TransferError> {
        if self.pages == 0 {
            // A CRIU that has failed says CLOSE like one that has not.
            let error =
                local("CRIU closed its stream without a single page: its log says why".into());
            self.watch.fail(error.to_failure());
            return Err(error);
        }
        // First: the answer may come as soon as the end is on the stream.
        self.watch.ended();
        let sent = self.pass_on(Piece::End);
        self.pieces = None;
        let comparing = self.comparing.take().ok_or(TransferError::Cancelled)?;
        let compared = comparing.join().expect("comparing does not panic");
        let compared = match (sent, compared) {
            (Ok(()), Ok(compared)) => compared,
            (_, compared) => {
                let error = compared.err().unwrap_or(TransferError::Cancelled);
                // At once: `finish` may come late.
                self.watch.fail(error.to_failure());
                return Err(error);
            }
        };
        let outcome = self.outcome.take().ok_or(TransferError::Cancelled)?;
        let stored = outcome.blocking_recv();
        let stored = stored.map_err(|_| TransferError::Cancelled)??;
        self.compared = Some(compared);
        Ok(stored)
    }

    // Not while CRIU waits for an answer.
    fn remember(&mut self, stored: &PagesStored) {
        if let Some(compared) = self.compared.take() {
            let generation = Generation {
                number: stored.generation,
                root: compared.root,
            };
            let known = compared.outgoing.into_known();
            self.memory.put(Remembered { generation, known });
        }
    }
}

impl Drop for PagesUpload {
    fn drop(&mut self) {
        if !self.begun {
            // Nothing is lost by that.
            self.connection.0.close(CloseCode::Done, "");
        }
    }
}

impl PageSink for PagesUpload {
    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        self.pass_on(Piece::Open(space))?;
        Ok(self.held.contains(&space))
    }

    fn has_parent(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        // Only pre-dumps ask, all of them first: they have the kernel forget what had changed, and
        // open afterwards.
        self.begin()?;
        Ok(self.held.contains(&space))
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        self.pages += 1;
        self.pass_on(Piece::Pages(*batch, bytes))
    }

    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError> {
        let why = if run.flags != PageFlags::PARENT {
            Some("CRIU kept pages back (--lazy-pages?)")
        } else if !self.held.contains(&space) {
            Some("CRIU left pages out without being told that they are held")
        } else {
            None
        };
        if let Some(why) = why {
            // For `finish`, which knows no more of it.
            self.failed = Some(local(format!("{space}: {why}")));
            return Err(why.into());
        }
        self.pages += run.pages;
        self.pass_on(Piece::InParent(space, run))
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        match self.close_all() {
            Ok(stored) => {
                self.stored = Some(stored);
                Ok(0)
            }
            Err(error) => {
                self.failed = Some(error);
                Ok(REFUSED)
            }
        }
    }
}

fn local(reason: String) -> TransferError {
    SessionError::Local(Failure::new(FailureCode::Internal, reason)).into()
}
