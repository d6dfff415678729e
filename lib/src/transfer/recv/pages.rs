//! The memory of one dump comes, from CRIU's page-server stream on the other host: it becomes the
//! next generation of its name, in state *pages*.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::Shared;
use super::incoming::{Arrived, Receiving, receive};
use super::serve::Input;
use crate::delta::{BlockRef, FileMeta, FileName};
use crate::digest::{Digest, hash_blocks};
use crate::image::{FileKind, ImageError, PagemapName, ResolvedRun, Source, pages_file_name};
use crate::page::PageSize;
use crate::session::SessionError;
use crate::session::pages::{PagesDestination, PagesDestinationCommand as Command};
use crate::standby::{
    DumpedPages, Event as StandbyEvent, HeldMemory, HeldPages, HeldPlaces, Standby, sync_directory,
};
use crate::store::{NewSet, PAGES_STATE, Record, Stage, Store, StoreError, Tried as _};
use crate::transfer::TransferError;
use crate::transfer::assemble::DEEPEST;
use crate::transfer::chain::StoredChain;
use crate::transfer::event::{Event, Received};
use crate::transport::{CloseCode, Connection, ControlSender, TransportError};
use crate::wire::{
    Generation, HeldRun, Layout, PagesHeld, PagesOffer, PagesStored, held_messages, limits,
};

/// Takes one dump, or nothing of it.
pub(super) async fn serve(
    connection: &Connection,
    shared: Arc<Shared>,
    control: &mut ControlSender,
    inputs: &mut mpsc::Receiver<Input>,
    offer: PagesOffer,
) -> Result<(), TransferError> {
    let (tell, happenings) = mpsc::unbounded_channel();
    let mut driver = Driver::new(connection, shared, offer, tell);
    let outcome = driver.run(control, inputs, happenings).await;
    driver.end().await;
    outcome
}

enum Happening {
    Prepared(Result<Box<Prepared>, TransferError>),
    Arrived(Arrived),
    Stored(Result<Box<(PagesStored, Received)>, TransferError>),
}

/// Where a dump comes to, and what it builds on.
struct Prepared {
    place: Place,
    standby: Standby,
    base: Option<Base>,
    untracked: Option<u64>,
    listing: Vec<PagesHeld>,
}

/// The stage of a dump; removed with this unless it was published.
#[derive(Debug)]
struct Place {
    store: Store,
    stage: Option<Stage>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(stage) = self.stage.take()
            && let Err(error) = self.store.discard(stage)
        {
            tracing::warn!("{error}; the next `crxfer recv` removes it");
        }
    }
}

/// The generation that a dump builds on.
#[derive(Clone, Debug)]
struct Base {
    record: Record,
    // The kernel tracks changes from the dump on that it holds.
    continues: bool,
}

/// Who brings a dump, and which one it is.
#[derive(Clone, Debug)]
struct Which {
    peer: [u8; 32],
    offer: PagesOffer,
    // Among all sessions of this receiver.
    number: u64,
    // The session has ended: what was not published must not be.
    gone: Arc<AtomicBool>,
    stored: Arc<AtomicBool>,
}

impl Which {
    fn name(&self) -> &str {
        self.offer.name.as_str()
    }
}

struct Driver<'a> {
    connection: &'a Connection,
    shared: Arc<Shared>,
    which: Which,
    session: PagesDestination,
    tell: mpsc::UnboundedSender<Happening>,
    receiving: Option<Receiving>,
    place: Option<Place>,
    base: Option<Base>,
    // Its generation was tracked until this session came.
    untracked: Option<u64>,
    // The source may have been told that its dump may begin.
    offered: bool,
    begun: bool,
    // The source has left without a dump: one that has begun is never given up in silence.
    withdrawn: bool,
    dumped: Option<DumpedPages>,
}

impl<'a> Driver<'a> {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn new(
        connection: &'a Connection,
        shared: Arc<Shared>,
        offer: PagesOffer,
        tell: mpsc::UnboundedSender<Happening>,
    ) -> Self {
        let which = Which {
            peer: connection.peer().0,
            offer: offer.clone(),
            number: shared.offers.number(),
            gone: Arc::default(),
            stored: Arc::default(),
        };
        Self {
            connection,
            shared,
            which,
            session: PagesDestination::new(offer, Instant::now()),
            tell,
            receiving: None,
            place: None,
            base: None,
            untracked: None,
            offered: false,
            begun: false,
            withdrawn: false,
            dumped: None,
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn run(
        &mut self,
        control: &mut ControlSender,
        inputs: &mut mpsc::Receiver<Input>,
        mut happenings: mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        self.prepare();
        loop {
            while let Some(command) = self.session.poll_command() {
                match command {
                    Command::Send(message) => control.write_message(&message.encode()).await?,
                    Command::Store => self.store()?,
                }
            }
            let timeout = tokio::time::Instant::from_std(self.session.poll_timeout());
            tokio::select! {
                // What is stored is stored, also where the source has gone.
                biased;
                happening = happenings.recv() => {
                    self.happened(happening.expect("this side holds a sender"))?;
                }
                input = inputs.recv() => {
                    if self.take(input)? {
                        return Ok(());
                    }
                }
                () = tokio::time::sleep_until(timeout) => self.session.handle_timeout(Instant::now())?,
            }
        }
    }

    // True when the source has left, and may.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn take(&mut self, input: Option<Input>) -> Result<bool, TransferError> {
        match input {
            Some(Input::Message(message)) => {
                let message = message.map_err(SessionError::from)?;
                self.session.handle_message(Instant::now(), message)?;
            }
            Some(Input::ControlEnded(ended)) if self.session.is_over() => {
                self.withdrawn = matches!(
                    ended,
                    Some(TransportError::PeerClosed {
                        code: CloseCode::Done,
                        ..
                    })
                );
                return Ok(true);
            }
            None if self.session.is_over() => return Ok(true),
            Some(Input::ControlEnded(Some(error))) => return Err(error.into()),
            Some(Input::ControlEnded(None)) | None => return Err(TransportError::CutShort.into()),
            Some(Input::Failed(error)) => return Err(error),
            // Those of sets, which this connection does not send.
            Some(_) => {}
        }
        Ok(false)
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn happened(&mut self, happening: Happening) -> Result<(), TransferError> {
        match happening {
            Happening::Prepared(prepared) => self.prepared(*prepared?)?,
            Happening::Arrived(Arrived::Event(event, _)) => {
                self.session.heard(Instant::now());
                self.arrived(event)?;
            }
            Happening::Arrived(Arrived::Failed(error)) => return Err(error),
            Happening::Stored(stored) => {
                let (stored, received) = *stored?;
                self.shared.events.emit(Event::Received(received));
                self.session.stored(stored);
            }
        }
        Ok(())
    }

    fn prepare(&self) {
        let (shared, which, tell) = (self.shared.clone(), self.which.clone(), self.tell.clone());
        spawn_blocking(move || {
            let prepared = prepare(&shared, &which).map(Box::new);
            let _ = tell.send(Happening::Prepared(prepared));
        });
    }

    fn prepared(&mut self, prepared: Prepared) -> Result<(), TransferError> {
        let Prepared {
            place,
            standby,
            base,
            untracked,
            listing,
        } = prepared;
        (self.untracked, self.offered) = (untracked, true);
        let tell = self.tell.clone();
        let told = move |arrived| drop(tell.send(Happening::Arrived(arrived)));
        let receiving = receive(self.connection.clone(), standby, told);
        let stage = place.stage.as_ref().map(Stage::files).unwrap_or_default();
        self.receiving = Some(receiving.tried("start a thread for", &stage)?);
        let generation = base.as_ref().map(|base| Generation {
            number: base.record.generation,
            root: base.record.root,
        });
        let continues = base.as_ref().is_some_and(|base| base.continues);
        (self.place, self.base) = (Some(place), base);
        self.session.prepared(generation, continues, listing);
        Ok(())
    }

    fn arrived(&mut self, event: StandbyEvent) -> Result<(), TransferError> {
        match event {
            StandbyEvent::Begun { .. } => {
                self.session.dump_begun()?;
                self.begun = true;
                let offer = self.session.offer();
                let continues = self.base.as_ref().is_some_and(|base| base.continues);
                let (number, name) = (self.which.number, self.which.name());
                // Another connection may have withdrawn its own meanwhile, or stored one.
                untrack_current(&self.shared.store, name)?;
                if !self.shared.offers.begin(name, number, continues) {
                    return Err(StoreError::Overtaken(name.to_owned()).into());
                }
                self.shared.events.emit(Event::SetBegun {
                    name: offer.name.to_string(),
                    total_bytes: 0,
                    ancestor: false,
                });
            }
            StandbyEvent::Dumped(dumped) => {
                self.dumped = Some(dumped);
                self.session.dump_complete()?;
            }
            StandbyEvent::Stored { .. } | StandbyEvent::Complete { .. } => {
                return Err(SessionError::Protocol("a dump of another kind").into());
            }
        }
        Ok(())
    }

    fn store(&mut self) -> Result<(), TransferError> {
        let (Some(mut place), Some(dumped)) = (self.place.take(), self.dumped.take()) else {
            return Err(SessionError::Protocol("a dump out of order").into());
        };
        self.shared.events.emit(Event::Storing);
        let (shared, which) = (self.shared.clone(), self.which.clone());
        let (base, tell) = (self.base.clone(), self.tell.clone());
        spawn_blocking(move || {
            let stored = publish(&shared, &which, &mut place, base.as_ref(), dumped);
            let _ = tell.send(Happening::Stored(stored.map(Box::new)));
        });
        Ok(())
    }

    // Nothing is written any more, and nothing half stored is left, when this returns.
    async fn end(&mut self) {
        self.which.gone.store(true, Ordering::SeqCst);
        let (receiving, place) = (self.receiving.take(), self.place.take());
        let is_unbegun = self.withdrawn && !self.begun;
        let untracked = self.untracked.take().filter(|_| is_unbegun);
        let may_be_lost = self.offered && !is_unbegun;
        let (shared, which) = (self.shared.clone(), self.which.clone());
        let ending = spawn_blocking(move || {
            if let Some(receiving) = receiving {
                receiving.end();
            }
            // After what is just being published.
            let order = shared.offers.lock();
            if let Some(id) = untracked.filter(|_| order.is_last(which.name(), which.number)) {
                // Where that fails, the next dump is whole.
                let _ = shared.store.track(id);
            }
            // A dump that was lost before it arrived has still reset what the kernel tracks.
            if may_be_lost
                && !which.stored.load(Ordering::SeqCst)
                && let Err(error) = untrack_current(&shared.store, which.name())
            {
                tracing::warn!("{error}; the next dump may leave out too much, take a whole one");
            }
            order.remove(which.name(), which.number);
            drop(order);
            drop(place);
        });
        let _ = ending.await;
    }
}

// Makes room, and finds what the name has.
fn prepare(shared: &Shared, which: &Which) -> Result<Prepared, TransferError> {
    let (store, offer) = (&shared.store, &which.offer);
    let page = offer.page_size;
    store.check_may_publish(which.name(), &which.peer, shared.pinned)?;
    let order = shared.offers.lock();
    if which.gone.load(Ordering::SeqCst) {
        return Err(TransferError::Cancelled);
    }
    order.offer(which.name(), which.number);
    drop(order);
    // From here on nobody else makes a generation of this name a tracked one.
    let untracked = untrack_current(store, which.name())?;
    let found = find_base(store, which.peer, offer)?;
    let stage = store.stage_unkept()?;
    let directory = stage.files();
    let place = Place {
        store: store.clone(),
        stage: Some(stage),
    };
    let (base, held) = match found {
        Some((record, held)) => {
            let continues = untracked == Some(record.id);
            (Some(Base { record, continues }), held)
        }
        None => (None, HeldPages::default()),
    };
    let is_known = offer.known
        == base.as_ref().map(|base| Generation {
            number: base.record.generation,
            root: base.record.root,
        });
    let listing = if is_known { Vec::new() } else { list(&held) };
    let standby = Standby::building_on(&directory, page, held, shared.max_set_bytes)?;
    Ok(Prepared {
        place,
        standby,
        base,
        untracked,
        listing,
    })
}

// Whatever the dump builds on: it will be the one that changes are tracked from. The generation that was.
fn untrack_current(store: &Store, name: &str) -> Result<Option<u64>, StoreError> {
    let Some(current) = store.current(name)? else {
        return Ok(None);
    };
    Ok(store.untrack(current.id)?.then_some(current.id))
}

// The current generation of the name, where it can be built on, and its pages.
fn find_base(
    store: &Store,
    peer: [u8; 32],
    offer: &PagesOffer,
) -> Result<Option<(Record, HeldPages)>, TransferError> {
    let records = store.records()?;
    let current = store.current(offer.name.as_str())?.filter(|record| {
        record.peer == peer
            && record.page_size == offer.page_size
            && record.completeness != "opaque"
            && store.is_sound(record, &records)
    });
    let Some(record) = current else {
        return Ok(None);
    };
    match StoredChain::open(store, record.id).and_then(|chain| {
        let is_deep = chain.levels.len() >= DEEPEST;
        let held = held_of(&chain, offer.page_size, limits::HELD_PAGES)?;
        Ok((held.unwrap_or_default(), is_deep))
    }) {
        Ok((held, false)) if !held.memories.is_empty() => Ok(Some((record, held))),
        Ok(_) => Ok(None),
        Err(error) => {
            tracing::warn!("{error}; nothing is built on {}", offer.name);
            Ok(None)
        }
    }
}

// `None`: more than `most` pages, which a source does not let itself be told of.
fn held_of(
    chain: &StoredChain,
    page: PageSize,
    most: u64,
) -> Result<Option<HeldPages>, TransferError> {
    let (mut memories, mut left) = (Vec::new(), most);
    for &name in chain.levels[0].pagemaps.keys() {
        let resolved = chain.resolve(name)?;
        let at = |source: &Source| matches!(source, Source::At { .. });
        let held = resolved.iter().filter(|run| at(&run.source));
        let pages = held.fold(0, |sum: u64, run| sum.saturating_add(run.pages));
        let Some(rest) = left.checked_sub(pages) else {
            return Ok(None);
        };
        left = rest;
        memories.push(held_memory(chain, name, &resolved, page)?);
    }
    Ok(Some(HeldPages {
        directories: chain
            .levels
            .iter()
            .map(|level| level.directory.clone())
            .collect(),
        memories,
    }))
}

fn held_memory(
    chain: &StoredChain,
    name: PagemapName,
    resolved: &[ResolvedRun],
    page: PageSize,
) -> Result<HeldMemory, TransferError> {
    let pages_ids: Vec<_> = chain
        .pagemaps_of(name)
        .map(|pagemap| pagemap.pages_id())
        .collect();
    let mut runs = Vec::new();
    for run in resolved {
        let Source::At { level, page: index } = run.source else {
            continue;
        };
        let short = || ImageError::Unresolved {
            file: name.to_string(),
            error: crate::image::ResolveError::MissingParent {
                vaddr: run.vaddr,
                pages: run.pages,
                level,
                chain_ends: false,
            },
        };
        let stored = &chain.levels[level].index;
        let file = stored.file_named(&pages_file_name(pages_ids[level]));
        let file = file.ok_or_else(short)?;
        let end = index.checked_add(run.pages);
        if end.is_none_or(|end| end > stored.file(file).blocks()) {
            return Err(short().into());
        }
        let digest = |block| stored.digest(BlockRef { file, block });
        runs.push(HeldPlaces {
            first: run.vaddr / page.bytes(),
            level,
            index: u32::try_from(index).map_err(|_| short())?,
            digests: (index..index + run.pages).map(digest).collect(),
        });
    }
    Ok(HeldMemory {
        name,
        pages_ids,
        runs,
    })
}

fn list(held: &HeldPages) -> Vec<PagesHeld> {
    let messages = held.memories.iter().flat_map(|memory| {
        let runs = memory.runs.iter().map(|run| HeldRun {
            first: run.first,
            digests: run.digests.clone(),
        });
        held_messages(memory.name, runs.collect())
    });
    messages.collect()
}

// The dump becomes the next generation of its name.
fn publish(
    shared: &Shared,
    which: &Which,
    place: &mut Place,
    base: Option<&Base>,
    dumped: DumpedPages,
) -> Result<(PagesStored, Received), TransferError> {
    let (store, offer) = (&shared.store, &which.offer);
    let page = offer.page_size;
    let image_bytes = dumped.pages.saturating_mul(page.bytes());
    if let Some(limit) = shared.max_set_bytes.filter(|&limit| image_bytes > limit) {
        let size = image_bytes;
        return Err(SessionError::TooLarge { size, limit }.into());
    }
    let stage = place.stage.take().ok_or(TransferError::Cancelled)?;
    let described = describe(&stage.files(), page, &dumped).and_then(|described| {
        if store.is_durable() {
            sync_directory(&stage.files())?;
        }
        Ok(described)
    });
    let (files, digests) = match described {
        Ok(described) => described,
        Err(error) => {
            place.stage = Some(stage);
            return Err(error);
        }
    };
    let order = shared.offers.lock();
    if which.gone.load(Ordering::SeqCst) {
        place.stage = Some(stage);
        return Err(TransferError::Cancelled);
    }
    let new = NewSet {
        name: Some(offer.name.to_string()),
        peer: which.peer,
        names_are_owned: shared.pinned,
        root: dumped.root,
        layout: Layout::Incremental,
        page_size: page,
        completeness: PAGES_STATE.to_owned(),
        base: base
            .filter(|_| dumped.needs_held)
            .map(|base| base.record.id),
        keep_link: None,
        image_bytes,
        succeeds: base.map(|base| base.record.id),
        tracked: order.is_last(which.name(), which.number),
    };
    let published = store.publish(stage, new, &files, digests.into_iter())?;
    which.stored.store(true, Ordering::SeqCst);
    order.remove(which.name(), which.number);
    drop(order);
    if let Err(error) = store.tidy(Some(offer.name.as_str()), shared.keep) {
        tracing::warn!("{error}; old generations stay");
    }
    let stored = PagesStored {
        generation: published.record.generation,
        pages: dumped.pages,
        fresh_pages: dumped.fresh_pages,
        stored_bytes: dumped.fresh_pages * page.bytes(),
        notes: published.notes.clone(),
    };
    let received = Received {
        name: offer.name.to_string(),
        path: store.root().join(offer.name.as_str()),
        generation: published.record.generation,
        layout: Layout::Incremental,
        base: published.base,
        completeness: PAGES_STATE.to_owned(),
        unchanged: false,
        image_bytes,
        notes: published.notes,
    };
    Ok((stored, received))
}

// Its files in order of name, and the digests of their blocks: those of pages are known already.
fn describe(
    directory: &Path,
    page: PageSize,
    dumped: &DumpedPages,
) -> Result<(Vec<FileMeta>, Vec<Digest>), TransferError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).tried("list", directory)? {
        let entry = entry.tried("list", directory)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = entry.metadata().tried("examine", &entry.path())?.len();
        files.push(FileMeta::new(FileName::new(name)?, 0o600, size, page));
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let mut digests = Vec::new();
    for meta in &files {
        let name = meta.name.as_str();
        if let FileKind::Pagemap(_) = FileKind::of(name) {
            let path = directory.join(name);
            let bytes = std::fs::read(&path).tried("read", &path)?;
            hash_blocks(&bytes, meta.block_len as usize, &mut digests);
            continue;
        }
        let known = dumped.files.iter().find(|(file, _)| file == name);
        digests.extend(known.iter().flat_map(|(_, digests)| digests));
    }
    Ok((files, digests))
}
