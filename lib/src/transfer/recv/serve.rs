//! One source's connection.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::Shared;
use crate::delta::FileMeta;
use crate::delta::codec::Decompressor;
use crate::digest::{Digest, VerifiedRun};
use crate::image::Completeness;
use crate::session::{Destination, DestinationCommand, DestinationConfig, SessionError, StoreJob};
use crate::store::{Held, NewSet, Stage, Store, Tried as _};
use crate::ticket::{Role, proof};
use crate::transfer::assemble::Assembler;
use crate::transfer::event::{Event, Received};
use crate::transfer::{TransferError, software};
use crate::transport::{
    BulkReceiver, Connection, ControlReceiver, ControlSender, HANDSHAKE_TIMEOUT, TransportError,
};
use crate::wire::{
    BeginSet, BlockId, Codec, FrameHeader, HEADER_LEN, Layout, Message, Op, Published, WireError,
    decode_ops, limits,
};

/// Frames that were read from the streams and wait for a core: 8 MiB.
const FRAMES_WAITING: usize = 8;

/// Frames that are unpacked, hashed and written at the same time.
const FRAMES_AT_WORK: usize = 4;

/// Bytes after which what arrived is pushed to disk, where the place is durable.
const SYNC_STEP: u64 = 32 << 20;

/// Staged files that stay open.
const OPEN_FILES: usize = 128;

/// Serves one source until it leaves.
pub(super) async fn serve(
    connection: Connection,
    shared: &Arc<Shared>,
) -> Result<(), TransferError> {
    let address = connection.remote_address();
    let peer = connection.peer();
    shared.events.emit(Event::Connected { address, peer });
    // Until then nobody watches the peer: it must not hold its place by saying nothing.
    let begun = tokio::time::timeout(HANDSHAKE_TIMEOUT, connection.accept_control()).await;
    let (control, messages) =
        begun.map_err(|_| SessionError::Silent(HANDSHAKE_TIMEOUT.as_secs()))??;
    let mut driver = Driver::new(&connection, shared.clone(), control);
    let outcome = driver.run(messages).await;
    driver.keep_partial(outcome.as_ref().err());
    match outcome {
        Ok(()) => Ok(()),
        Err(error) => {
            if let Some(failure) = error.to_failure() {
                let _ = driver
                    .control
                    .write_message(&Message::Failure(failure).encode())
                    .await;
                let _ = driver.control.finish();
                // The source closes when it has read why.
                let _ = tokio::time::timeout(Duration::from_secs(2), connection.closed()).await;
            }
            connection.close_and_tell(error.close_code(), "").await;
            Err(error)
        }
    }
}

enum Input {
    Message(Result<Message, WireError>),
    ControlEnded(Option<TransportError>),
    Frame(Box<Frame>),
    Written {
        header: FrameHeader,
        ops: Vec<Op>,
        digests: Vec<Digest>,
    },
    Prepared {
        staged: Arc<Staged>,
        held: Arc<Held>,
    },
    Stored(Box<(Published, Received)>),
    Failed(TransferError),
}

struct Frame {
    header: FrameHeader,
    ops: Vec<Op>,
    payload: Bytes,
}

struct Driver<'a> {
    connection: &'a Connection,
    shared: Arc<Shared>,
    destination: Destination,
    control: ControlSender,
    input: mpsc::Sender<Input>,
    inputs: mpsc::Receiver<Input>,
    at_work: Arc<tokio::sync::Semaphore>,
    staged: Option<Arc<Staged>>,
    held: Option<Arc<Held>>,
    done_bytes: u64,
}

impl<'a> Driver<'a> {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn new(connection: &'a Connection, shared: Arc<Shared>, control: ControlSender) -> Self {
        let binding = connection.binding();
        let proof = |role| {
            shared
                .secret
                .as_ref()
                .map(|secret| proof(secret, role, &binding))
        };
        let config = DestinationConfig {
            software: software(),
            ticket_proof: proof(Role::Destination),
            expected_proof: proof(Role::Source),
            layout: shared.layout,
            max_set_bytes: shared.max_set_bytes,
        };
        let (input, inputs) = mpsc::channel(FRAMES_WAITING);
        Self {
            connection,
            destination: Destination::new(config, Instant::now()),
            shared,
            control,
            input,
            inputs,
            at_work: Arc::new(tokio::sync::Semaphore::new(FRAMES_AT_WORK)),
            staged: None,
            held: None,
            done_bytes: 0,
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn run(&mut self, messages: ControlReceiver) -> Result<(), TransferError> {
        tokio::spawn(read_messages(messages, self.input.clone()));
        loop {
            while let Some(command) = self.destination.poll_command() {
                self.carry_out(command).await?;
            }
            let timeout = tokio::time::Instant::from_std(self.destination.poll_timeout());
            tokio::select! {
                input = self.inputs.recv() => {
                    if self.take(input.expect("this side holds a sender")).await? {
                        return Ok(());
                    }
                }
                () = tokio::time::sleep_until(timeout) => self.destination.handle_timeout(Instant::now())?,
            }
        }
    }

    // True when the source has left and nothing is half done.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn take(&mut self, input: Input) -> Result<bool, TransferError> {
        let now = Instant::now();
        match input {
            Input::Message(message) => {
                self.destination
                    .handle_message(now, message.map_err(SessionError::from)?)?;
            }
            Input::ControlEnded(_) if self.destination.is_idle() => return Ok(true),
            Input::ControlEnded(Some(error)) => return Err(error.into()),
            Input::ControlEnded(None) => return Err(TransportError::CutShort.into()),
            Input::Frame(frame) => self.admit(*frame).await?,
            Input::Written {
                header,
                ops,
                digests,
            } => {
                self.destination
                    .handle_frame(now, &header, &ops, &digests)?;
                self.progress(&header);
            }
            Input::Prepared { staged, held } => {
                let lacks_everything = held.is_empty();
                self.staged = Some(staged);
                self.held = Some(held);
                self.destination.handle_prepared(lacks_everything);
            }
            Input::Stored(stored) => {
                let (published, received) = *stored;
                let is_named = !received.name.is_empty();
                self.shared.events.emit(Event::Received(received));
                self.destination.handle_stored(published);
                while let Some(command) = self.destination.poll_command() {
                    self.carry_out(command).await?;
                }
                if is_named {
                    // Only when the acknowledgement is on its way: with --once the receiver ends.
                    let received = self.shared.received.clone();
                    let connection = self.connection.clone();
                    tokio::spawn(async move {
                        let _ =
                            tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
                        received.send_modify(|count| *count += 1);
                    });
                }
            }
            Input::Failed(error) => return Err(error),
        }
        Ok(false)
    }

    async fn carry_out(&mut self, command: DestinationCommand) -> Result<(), TransferError> {
        match command {
            DestinationCommand::Send(message) => {
                self.control.write_message(&message.encode()).await?
            }
            DestinationCommand::FindRoots(roots) => self.find_roots(&roots)?,
            DestinationCommand::Prepare(begin, files) => self.prepare(begin, files),
            DestinationCommand::FindSegment(at, digest) => {
                let found = self
                    .held
                    .as_ref()
                    .and_then(|held| held.find_segment(&digest));
                self.destination.handle_segment_found(at, found)?;
            }
            DestinationCommand::FindBlocks(at, ids) => {
                let find = |id: &BlockId| self.held.as_ref()?.find(*id);
                let found: Vec<_> = ids.iter().map(find).collect();
                self.destination.handle_blocks_found(at, &ids, &found)?;
            }
            DestinationCommand::Store(job) => self.store(job),
        }
        Ok(())
    }

    fn find_roots(&mut self, roots: &[Digest]) -> Result<(), TransferError> {
        let peer = self.connection.peer().0;
        let held = self.shared.store.find_chain(&peer, roots)?;
        self.destination.handle_roots_found(held);
        Ok(())
    }

    fn prepare(&mut self, begin: BeginSet, files: Vec<FileMeta>) {
        // Not before: whoever has not shown a ticket must not make us hold frames.
        if begin.set == 1 {
            tokio::spawn(read_streams(self.connection.clone(), self.input.clone()));
        }
        self.done_bytes = 0;
        self.shared.events.emit(Event::SetBegun {
            name: begin.name.to_string(),
            total_bytes: begin.total_bytes,
            ancestor: begin.ancestor,
        });
        let (shared, input, peer) = (
            self.shared.clone(),
            self.input.clone(),
            self.connection.peer().0,
        );
        spawn_blocking(move || {
            let prepared = prepare_set(&shared, peer, &begin, files);
            let _ = input.blocking_send(prepared.unwrap_or_else(Input::Failed));
        });
    }

    async fn admit(&mut self, frame: Frame) -> Result<(), TransferError> {
        let ranges = self.destination.admit_frame(&frame.header, &frame.ops)?;
        let staged = self
            .staged
            .clone()
            .ok_or(SessionError::Protocol("a frame before its set"))?;
        let input = self.input.clone();
        let place = self
            .at_work
            .clone()
            .acquire_owned()
            .await
            .expect("never closed");
        spawn_blocking(move || {
            let written = staged.write(&frame, &ranges);
            drop(place);
            let Frame { header, ops, .. } = frame;
            let next = written.map(|digests| Input::Written {
                header,
                ops,
                digests,
            });
            // Through a thread of its own: the channel may be full of frames that wait for this.
            let _ = input.blocking_send(next.unwrap_or_else(Input::Failed));
        });
        Ok(())
    }

    fn store(&mut self, job: Box<StoreJob>) {
        let (Some(staged), Some(held)) = (self.staged.take(), self.held.take()) else {
            return;
        };
        self.shared.events.emit(Event::Storing);
        let (shared, input, peer) = (
            self.shared.clone(),
            self.input.clone(),
            self.connection.peer().0,
        );
        spawn_blocking(move || {
            let stored = store_set(&shared, peer, &job, staged, held);
            let _ = input
                .blocking_send(stored.map_or_else(Input::Failed, |it| Input::Stored(Box::new(it))));
        });
    }

    fn progress(&mut self, header: &FrameHeader) {
        self.done_bytes += u64::from(header.raw_len);
        let (sent, received) = self.connection.wire_bytes();
        self.shared.events.emit(Event::Progress {
            done_bytes: self.done_bytes,
            wire_bytes: sent + received,
            pages: crate::session::PageCounts::default(),
        });
    }

    // What arrived is kept for the next attempt, unless that would keep the disk full.
    fn keep_partial(&mut self, error: Option<&TransferError>) {
        let Some(staged) = self.staged.take() else {
            return;
        };
        if error.is_some_and(is_out_of_space) {
            staged.discard();
        }
    }
}

fn is_out_of_space(error: &TransferError) -> bool {
    matches!(error, TransferError::Store(error) if error.is_out_of_space())
}

async fn read_messages(mut messages: ControlReceiver, input: mpsc::Sender<Input>) {
    loop {
        let next = match messages.read_message(limits::CONTROL_MESSAGE).await {
            Ok(Some(bytes)) => Input::Message(Message::decode(&bytes)),
            Ok(None) => Input::ControlEnded(None),
            Err(error) => Input::ControlEnded(Some(error)),
        };
        let is_last = !matches!(next, Input::Message(Ok(_)));
        if input.send(next).await.is_err() || is_last {
            return;
        }
    }
}

async fn read_streams(connection: Connection, input: mpsc::Sender<Input>) {
    while let Ok(stream) = connection.accept_bulk().await {
        let input = input.clone();
        tokio::spawn(async move {
            let ended = match read_frames(stream, &input).await {
                Ok(()) => return,
                // The source may leave when it has been told that all is stored.
                Err(TransferError::Transport(error)) => Input::ControlEnded(Some(error)),
                Err(error) => Input::Failed(error),
            };
            let _ = input.send(ended).await;
        });
    }
}

async fn read_frames(
    mut stream: BulkReceiver,
    input: &mpsc::Sender<Input>,
) -> Result<(), TransferError> {
    let mut head = [0; HEADER_LEN];
    while stream.read_exact(&mut head).await? {
        let header = FrameHeader::decode(&head).map_err(SessionError::from)?;
        let ops = stream.read_vec(header.ops_len as usize).await?;
        let ops = decode_ops(&ops).map_err(SessionError::from)?;
        let payload = stream.read_vec(header.payload_len as usize).await?;
        let frame = Frame {
            header,
            ops,
            payload: payload.into(),
        };
        if input.send(Input::Frame(Box::new(frame))).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The files of a set that is arriving. What arrived is kept for the next attempt when this is
/// dropped without having been published.
#[derive(Debug)]
struct Staged {
    store: Store,
    stage: Mutex<Option<Stage>>,
    directory: PathBuf,
    files: Vec<FileMeta>,
    open: Mutex<Vec<(u32, Arc<File>)>>,
    written: AtomicU64,
}

impl Staged {
    fn prepare(
        shared: &Shared,
        peer: &[u8; 32],
        begin: &BeginSet,
        files: Vec<FileMeta>,
    ) -> Result<(Self, Held), TransferError> {
        let store = shared.store.clone();
        // What would be refused in the end is refused before the bytes are sent.
        if !begin.ancestor {
            store.check_may_publish(begin.name.as_str(), peer, shared.pinned)?;
        }
        if let Some(base) = &begin.base_name {
            store.named_by(base.as_str(), peer)?;
        }
        store.adopt_stages(peer, begin.name.as_str())?;
        let held = store.held_of(peer)?;
        let stage = store.stage(peer, begin.name.as_str(), begin.page_size)?;
        let directory = stage.files();
        let staged = Self {
            store,
            stage: Mutex::new(Some(stage)),
            directory,
            files,
            open: Mutex::default(),
            written: AtomicU64::new(0),
        };
        for meta in &staged.files {
            let path = staged.directory.join(meta.name.as_str());
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path);
            file.and_then(|file| file.set_len(meta.size))
                .tried("create", &path)?;
        }
        Ok((staged, held))
    }

    // Unpacks, hashes, writes. Where the bytes belong was checked before.
    fn write(&self, frame: &Frame, ranges: &[Range<u64>]) -> Result<Vec<Digest>, TransferError> {
        let meta = &self.files[frame.header.file as usize];
        let raw = match frame.header.codec {
            Codec::Raw => frame.payload.clone(),
            Codec::Zstd => Bytes::from(unpack(frame)?),
        };
        let path = self.directory.join(meta.name.as_str());
        let file = self.file(frame.header.file).tried("open", &path)?;
        let run = VerifiedRun::hash(raw, meta.block_len as usize);
        let mut at = 0;
        for range in ranges {
            let len = usize::try_from(range.end - range.start).expect("a segment fits into memory");
            file.write_all_at(&run.bytes()[at..at + len], range.start)
                .tried("write", &path)?;
            at += len;
        }
        self.sync_early(&file, at as u64).tried("sync", &path)?;
        Ok(run.digests().to_vec())
    }

    // What must be on disk before the set is published goes there while more arrives: one of the
    // writers waits for the disk, the others go on.
    fn sync_early(&self, file: &File, written: u64) -> std::io::Result<()> {
        let before = self.written.fetch_add(written, Ordering::Relaxed);
        if self.store.is_durable() && before / SYNC_STEP != (before + written) / SYNC_STEP {
            file.sync_data()?;
        }
        Ok(())
    }

    fn file(&self, file: u32) -> std::io::Result<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, handle)) = open.iter().find(|(number, _)| *number == file) {
            return Ok(handle.clone());
        }
        let path = self.directory.join(self.files[file as usize].name.as_str());
        let handle = Arc::new(OpenOptions::new().write(true).open(path)?);
        if open.len() >= OPEN_FILES {
            open.remove(0);
        }
        open.push((file, handle.clone()));
        Ok(handle)
    }

    // Removes what arrived.
    fn discard(&self) {
        if let Some(stage) = self.take_stage()
            && let Err(error) = self.store.discard(stage)
        {
            tracing::warn!("{error}; the next `crxfer recv` removes it");
        }
    }

    fn take_stage(&self) -> Option<Stage> {
        self.stage
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(stage) = self.take_stage()
            && let Err(error) = self.store.abandon(stage)
        {
            tracing::warn!("{error}; what arrived will be sent again");
        }
    }
}

thread_local! {
    static DECOMPRESSOR: std::cell::RefCell<Option<Decompressor>> = const { std::cell::RefCell::new(None) };
}

fn unpack(frame: &Frame) -> Result<Vec<u8>, TransferError> {
    DECOMPRESSOR.with_borrow_mut(|decompressor| {
        if decompressor.is_none() {
            *decompressor = Decompressor::new().ok();
        }
        let unpacked = decompressor
            .as_mut()
            .map(|it| it.decompress(&frame.payload, frame.header.raw_len as usize));
        match unpacked {
            Some(Ok(bytes)) => Ok(bytes),
            _ => Err(SessionError::Protocol("a frame that cannot be unpacked").into()),
        }
    })
}

// Removes what the set that was just stored has made superfluous.
fn tidy(shared: &Shared, peer: [u8; 32], begin: &BeginSet) {
    let name = begin.name.as_str();
    let mut tidied = shared.store.drop_partials(&peer, name);
    // An ancestor takes nobody's name; what can go is found when the last set has come.
    if !begin.ancestor {
        tidied = tidied.and_then(|()| shared.store.tidy(Some(name), shared.keep));
    }
    if let Err(error) = tidied {
        tracing::warn!("{error}; old generations stay");
    }
}

// Makes room, unless the set is there already.
fn prepare_set(
    shared: &Shared,
    peer: [u8; 32],
    begin: &BeginSet,
    files: Vec<FileMeta>,
) -> Result<Input, TransferError> {
    if let Some(root) = begin.root
        && let Some(done) = unchanged(shared, peer, begin, root)?
    {
        return Ok(Input::Stored(Box::new(done)));
    }
    let (staged, held) = Staged::prepare(shared, &peer, begin, files)?;
    Ok(Input::Prepared {
        staged: Arc::new(staged),
        held: Arc::new(held),
    })
}

// Assembles and publishes. Runs on a thread of its own.
fn store_set(
    shared: &Shared,
    peer: [u8; 32],
    job: &StoreJob,
    staged: Arc<Staged>,
    held: Arc<Held>,
) -> Result<(Published, Received), TransferError> {
    let begin = &job.begin;
    let root = job.manifest.root();
    let name = (!begin.ancestor).then(|| begin.name.to_string());
    if let Some(done) = unchanged(shared, peer, begin, root)? {
        staged.discard();
        drop(held);
        tidy(shared, peer, begin);
        return Ok(done);
    }
    // Ancestors of a flat set are only read from: keep them small.
    let layout = match shared.layout {
        Layout::Flat if begin.ancestor => Layout::Incremental,
        layout => layout,
    };
    let assembler = Assembler {
        store: &shared.store,
        held: &held,
        peer,
        job,
        layout,
        directory: staged.directory.clone(),
    };
    let assembled = assembler.assemble().inspect_err(|error| {
        if is_out_of_space(error) {
            staged.discard();
        }
    })?;
    let completeness = one_word(&assembled.completeness);
    let stage = staged.take_stage().ok_or(TransferError::Cancelled)?;
    let keep_link = job
        .manifest
        .parent
        .as_ref()
        .map(|parent| parent.link.clone());
    let new = NewSet {
        name: name.clone(),
        peer,
        names_are_owned: shared.pinned,
        root,
        layout,
        page_size: job.manifest.page_size,
        completeness: completeness.to_owned(),
        base: assembled.base,
        keep_link: keep_link.filter(|_| layout == Layout::Faithful),
        image_bytes: begin.total_bytes,
    };
    let digests = assembled.all_digests(&job.recipe);
    let published = shared
        .store
        .publish(stage, new, &assembled.files, digests)?;
    drop(held);
    tidy(shared, peer, begin);
    let path = shared
        .store
        .directory_of(&published.record)
        .unwrap_or_default();
    let mut received = Received {
        name: name.unwrap_or_default(),
        path: if begin.ancestor {
            path
        } else {
            shared.store.root().join(begin.name.as_str())
        },
        generation: published.record.generation,
        layout,
        base: published.base,
        completeness: completeness.to_owned(),
        unchanged: false,
        image_bytes: begin.total_bytes,
        notes: published.notes,
    };
    if let (Some(base), true) = (&begin.base_name, layout != Layout::Incremental) {
        let layout = layout.as_str();
        let note = format!("--base {base} has no effect: this destination stores {layout} sets");
        received.notes.push(note);
    }
    Ok((to_published(begin.set, &received), received))
}

// The set with this root is there under this name already, in this layout.
fn unchanged(
    shared: &Shared,
    peer: [u8; 32],
    begin: &BeginSet,
    root: Digest,
) -> Result<Option<(Published, Received)>, TransferError> {
    let rebased = shared.layout == Layout::Incremental && begin.base_name.is_some();
    if begin.ancestor || rebased {
        return Ok(None);
    }
    let current = shared.store.current(begin.name.as_str())?;
    let records = shared.store.records()?;
    let same = current.filter(|record| {
        record.peer == peer
            && record.root == root
            && record.layout == shared.layout
            && shared.store.is_sound(record, &records)
    });
    let Some(record) = same else { return Ok(None) };
    let base = record.base.map(|id| shared.store.name_of(id)).transpose()?;
    let received = Received {
        name: record.name.clone(),
        path: shared.store.root().join(begin.name.as_str()),
        generation: record.generation,
        layout: record.layout,
        base,
        completeness: record.completeness,
        unchanged: true,
        image_bytes: record.image_bytes,
        notes: Vec::new(),
    };
    Ok(Some((to_published(begin.set, &received), received)))
}

fn to_published(set: u32, received: &Received) -> Published {
    Published {
        set,
        name: received.name.clone(),
        generation: received.generation,
        layout: received.layout,
        base: received.base.clone(),
        completeness: received.completeness.clone(),
        unchanged: received.unchanged,
        notes: received.notes.clone(),
    }
}

fn one_word(completeness: &Completeness) -> &'static str {
    match completeness {
        Completeness::Complete => "complete",
        Completeness::PreDump => "pre-dump",
        Completeness::PagesOnly => "pages-only",
        Completeness::MissingPages => "missing-pages",
        Completeness::Lazy => "lazy",
        Completeness::Opaque(_) => "opaque",
        Completeness::Damaged(_) => "damaged",
    }
}
