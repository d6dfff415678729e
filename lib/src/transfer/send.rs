//! The source's driver.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::event::{Event, Events};
use super::memo::Memo;
use super::pack::Packer;
use super::plan::{SourceSet, plan};
use super::{TransferError, software};
use crate::delta::SetName;
use crate::digest::Digest;
use crate::identity::Fingerprint;
use crate::page::PageSize;
use crate::session::{PageCounts, SessionError, Source, SourceCommand, SourceConfig};
use crate::ticket::{Role, Ticket, proof};
use crate::transport::{
    self, BulkSender, CloseCode, Connection, ControlReceiver, ControlSender, Identity,
    TransportError,
};
use crate::wire::{Failure, FailureCode, Message, Op, Published, SegmentAt, limits};

/// Streams that carry frames. Two keep one frame's preparation from holding up the next.
pub(super) const BULK_STREAMS: usize = 2;

/// Bytes of segments that are kept between hashing and sending.
const KEPT_BYTES: usize = 16 << 20;

/// Where to send.
#[derive(Clone, Debug)]
pub enum Target {
    /// To the `recv` that made this ticket.
    Ticket(Ticket),
    /// To a host with one of these keys, which knows ours.
    Pinned {
        /// Its addresses, the best first.
        addresses: Vec<SocketAddr>,
        /// Its keys.
        peers: Vec<Fingerprint>,
    },
}

/// What to send, and how.
#[derive(Debug)]
pub struct SendOptions {
    /// The image directory.
    pub directory: PathBuf,
    /// Its name at the destination; by default the directory's own.
    pub name: Option<SetName>,
    /// The received set to build on; by default the destination finds one.
    pub base: Option<SetName>,
    /// Page size of the host that dumped it; by default found.
    pub page_size: Option<PageSize>,
    /// Most bytes a second on the wire.
    pub bytes_per_s: Option<u64>,
    /// Where to.
    pub target: Target,
    /// This host's key.
    pub identity: Identity,
    /// Where digests of what was sent are remembered, so that unchanged files are not read again.
    pub memo: Option<PathBuf>,
    /// Settings of the connection.
    pub transport: transport::Options,
    /// Who is told what happens.
    pub events: Events,
}

/// What came of a transfer.
#[derive(Clone, Debug)]
pub struct SendReport {
    /// The destination's word on the last set.
    pub published: Published,
    /// Ancestors that had to be sent along.
    pub ancestors: usize,
    /// Files of all sets that were sent.
    pub files: u64,
    /// Their bytes.
    pub image_bytes: u64,
    /// Pages by how they crossed.
    pub pages: PageCounts,
    /// Of the pages sent, those in compressed frames.
    pub compressed_pages: u64,
    /// Bytes on the wire, sent and received, with all headers from UDP's payload on.
    pub wire_bytes: (u64, u64),
    /// From the call to the acknowledgement.
    pub elapsed: Duration,
}

/// Sends an image directory with what it builds on, and returns when the destination has stored it.
///
/// Dropping the future stops the transfer; nothing is published then.
#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
pub async fn send(options: SendOptions) -> Result<SendReport, TransferError> {
    let begun = Instant::now();
    let (directory, name, base, page_size) = (
        options.directory.clone(),
        options.name.clone(),
        options.base.clone(),
        options.page_size,
    );
    let memo = Memo::new(options.memo.clone());
    let (recalled, digested) = (memo.clone(), SystemTime::now());
    let planning = spawn_blocking(move || plan(&directory, name, base, page_size, &recalled));
    let (sets, plans) = planning.await.expect("planning does not panic")?;
    let connection = connect(&options.target, &options.identity, &options.transport).await?;
    let _ends_with_this = EndOnDrop(connection.clone());

    let config = source_config(&options.target, &connection);
    let source = Source::new(config, plans, Instant::now());
    let (control, messages) = connection.open_control().await?;
    let mut driver = Driver::new(&connection, source, sets, control, &options).await?;
    let outcome = driver.run(messages).await;
    match outcome {
        Ok(published) => {
            let mut report = driver.report(published);
            report.wire_bytes = connection.wire_bytes();
            report.elapsed = begun.elapsed();
            connection.close_and_tell(CloseCode::Done, "").await;
            driver.remember(memo, digested).await;
            Ok(report)
        }
        Err(error) => {
            let error = driver.give_up(error).await;
            driver.forget_if_wrong(&memo, &error);
            let error = driver.name_what_changed(error).await;
            connection
                .close_and_tell(error.close_code(), &error.to_string())
                .await;
            Err(error)
        }
    }
}

/// Ends the connection when the transfer is dropped: tasks that read from it would keep it open, and
/// the destination would wait for the rest.
#[derive(Debug)]
pub(super) struct EndOnDrop(pub(super) Connection);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        // Does nothing where it has been closed before.
        self.0.close(CloseCode::Cancelled, "the sender was stopped");
    }
}

pub(super) async fn connect(
    target: &Target,
    identity: &Identity,
    transport: &transport::Options,
) -> Result<Connection, TransferError> {
    let (addresses, peers) = match target {
        Target::Ticket(ticket) => (ticket.addresses(), vec![ticket.fingerprint()]),
        Target::Pinned { addresses, peers } => (addresses.as_slice(), peers.clone()),
    };
    Ok(transport::connect(addresses, identity, &peers, transport).await?)
}

/// What the source says of itself on this connection.
pub(super) fn source_config(target: &Target, connection: &Connection) -> SourceConfig {
    let (own, expected) = match target {
        Target::Ticket(ticket) => {
            let binding = connection.binding();
            let proof = |role| Some(proof(ticket.secret(), role, &binding));
            (proof(Role::Source), proof(Role::Destination))
        }
        Target::Pinned { .. } => (None, None),
    };
    SourceConfig {
        software: software(),
        ticket_proof: own,
        expected_proof: expected,
    }
}

enum Input {
    Message(Message),
    Ended(TransferError),
    Scanned(SegmentAt, Option<Bytes>, Vec<Digest>),
    FrameSent {
        at: SegmentAt,
        compressed_pages: u64,
    },
    Failed(TransferError),
}

struct FrameJob {
    // Number of the set in the session; in `at` stands its index in the plan.
    number: u32,
    at: SegmentAt,
    ops: Vec<Op>,
    bytes: Option<Bytes>,
}

struct Driver<'a> {
    connection: &'a Connection,
    source: Source,
    sets: Arc<Vec<SourceSet>>,
    // Sets of the plan that come before the session's first.
    skipped: usize,
    control: ControlSender,
    inputs: mpsc::UnboundedReceiver<Input>,
    input: mpsc::UnboundedSender<Input>,
    frames: mpsc::UnboundedSender<FrameJob>,
    kept: Kept,
    events: &'a Events,
    sent_sets: Vec<usize>,
    scanned_bytes: u64,
    // Of the scanned ones, those of segments that have a frame which is not with the transport yet.
    queued_bytes: u64,
    done_bytes: u64,
    compressed_pages: u64,
}

impl<'a> Driver<'a> {
    async fn new(
        connection: &'a Connection,
        source: Source,
        sets: Vec<SourceSet>,
        control: ControlSender,
        options: &'a SendOptions,
    ) -> Result<Self, TransferError> {
        let (input, inputs) = mpsc::unbounded_channel();
        let (frames, jobs) = mpsc::unbounded_channel();
        let sets = Arc::new(sets);
        let jobs = Arc::new(tokio::sync::Mutex::new(jobs));
        let packer = Arc::new(Packer::new(sets.clone(), options.bytes_per_s));
        for _ in 0..BULK_STREAMS {
            let stream = connection.open_bulk().await?;
            tokio::spawn(send_frames(
                stream,
                jobs.clone(),
                packer.clone(),
                input.clone(),
            ));
        }
        Ok(Self {
            connection,
            source,
            sets,
            skipped: 0,
            control,
            inputs,
            input,
            frames,
            kept: Kept::default(),
            events: &options.events,
            sent_sets: Vec::new(),
            scanned_bytes: 0,
            queued_bytes: 0,
            done_bytes: 0,
            compressed_pages: 0,
        })
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn run(&mut self, messages: ControlReceiver) -> Result<Vec<Published>, TransferError> {
        tokio::spawn(read_messages(messages, self.input.clone()));
        loop {
            while let Some(command) = self.source.poll_command() {
                if let Some(published) = self.carry_out(command).await? {
                    return Ok(published);
                }
            }
            let timeout = tokio::time::Instant::from_std(self.source.poll_timeout());
            tokio::select! {
                input = self.inputs.recv() => self.take(input.expect("this side holds a sender"))?,
                () = tokio::time::sleep_until(timeout) => self.source.handle_timeout(Instant::now())?,
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn take(&mut self, input: Input) -> Result<(), TransferError> {
        let now = Instant::now();
        match input {
            Input::Message(message) => Ok(self.source.handle_message(now, message)?),
            Input::Ended(error) | Input::Failed(error) => Err(error),
            Input::Scanned(at, bytes, digests) => {
                if let Some(bytes) = bytes {
                    self.kept.put(at, bytes);
                }
                self.scanned_bytes += self.segment_bytes(self.in_plan(at));
                self.progress();
                Ok(self.source.handle_scanned(now, at, digests)?)
            }
            Input::FrameSent {
                at,
                compressed_pages,
            } => {
                self.compressed_pages += compressed_pages;
                self.queued_bytes = self.queued_bytes.saturating_sub(self.segment_bytes(at));
                self.progress();
                Ok(self.source.handle_frame_sent(now)?)
            }
        }
    }

    async fn carry_out(
        &mut self,
        command: SourceCommand,
    ) -> Result<Option<Vec<Published>>, TransferError> {
        match command {
            SourceCommand::Send(message) => self.send_message(message).await?,
            SourceCommand::Scan(at) => self.scan(at),
            SourceCommand::SendFrame(at, ops) => {
                let bytes = self.kept.take(at);
                self.queued_bytes += self.segment_bytes(self.in_plan(at));
                // Fails only when the senders have failed, which an input says.
                let _ = self.frames.send(FrameJob {
                    number: at.set,
                    at: self.in_plan(at),
                    ops,
                    bytes,
                });
            }
            SourceCommand::Finish(published) => return Ok(Some(published)),
        }
        Ok(None)
    }

    async fn send_message(&mut self, message: Message) -> Result<(), TransferError> {
        match &message {
            Message::BeginSet(begin) => {
                let remaining = self.sets.len() - self.sent_sets.len();
                let index = self.source.set_index();
                debug_assert!(index < self.sets.len() && remaining > 0);
                self.skipped = index + 1 - begin.set as usize;
                self.sent_sets.push(index);
                (self.scanned_bytes, self.done_bytes) = (0, 0);
                self.events.emit(Event::SetBegun {
                    name: begin.name.to_string(),
                    total_bytes: begin.total_bytes,
                    ancestor: begin.ancestor,
                });
            }
            Message::EndSet { set, .. } => {
                let (sets, index) = (self.sets.clone(), self.skipped + *set as usize - 1);
                spawn_blocking(move || sets[index].check_unchanged())
                    .await
                    .expect("listing does not panic")?;
                self.events.emit(Event::Storing);
            }
            _ => {}
        }
        Ok(self.control.write_message(&message.encode()).await?)
    }

    fn scan(&self, at: SegmentAt) {
        let (sets, input, place) = (self.sets.clone(), self.input.clone(), self.in_plan(at));
        // Where the destination is asked first, little of what is read will be sent.
        let keep = self.source.sends_unasked();
        spawn_blocking(move || {
            let set = &sets[place.set as usize];
            let result = match keep {
                true => set.scan(at.file, at.segment),
                false => set
                    .digest_segment(at.file, at.segment)
                    .map(|digests| (None, digests)),
            };
            let _ = input.send(match result {
                Ok((bytes, digests)) => Input::Scanned(at, bytes.map(Bytes::from), digests),
                Err(error) => Input::Failed(error),
            });
        });
    }

    // The same segment with the index of its set in the plan for the session's number.
    fn in_plan(&self, at: SegmentAt) -> SegmentAt {
        let index = self.skipped + at.set as usize - 1;
        SegmentAt {
            set: u32::try_from(index).expect("sets are limited"),
            ..at
        }
    }

    // `at` has the set's index in the plan.
    fn segment_bytes(&self, at: SegmentAt) -> u64 {
        let meta = &self.sets[at.set as usize].files[at.file as usize];
        let range = meta.bytes_of(&meta.segment_range(at.segment));
        range.end - range.start
    }

    fn progress(&mut self) {
        let done = self.scanned_bytes.saturating_sub(self.queued_bytes);
        // A segment counts until it turns out that it must be sent: never go back.
        self.done_bytes = self.done_bytes.max(done);
        let (sent, received) = self.connection.wire_bytes();
        self.events.emit(Event::Progress {
            done_bytes: self.done_bytes,
            wire_bytes: sent + received,
            pages: self.source.counts(),
        });
    }

    fn report(&self, mut published: Vec<Published>) -> SendReport {
        let last = published
            .pop()
            .expect("a session publishes at least one set");
        let files = || {
            self.sent_sets
                .iter()
                .flat_map(|&index| &self.sets[index].files)
        };
        SendReport {
            published: last,
            ancestors: published.len(),
            files: files().count() as u64,
            image_bytes: files().map(|file| file.size).sum(),
            pages: self.source.counts(),
            compressed_pages: self.compressed_pages,
            wire_bytes: (0, 0),
            elapsed: Duration::ZERO,
        }
    }

    async fn remember(&mut self, memo: Memo, begun: SystemTime) {
        let (sets, leaves) = (self.sets.clone(), self.source.take_leaves());
        if leaves.is_empty() {
            // The set stood there already: what is remembered of it stays.
            return;
        }
        let remember = move || {
            if let Some(set) = sets.last() {
                set.remember(&memo, begun, &leaves);
            }
        };
        spawn_blocking(remember)
            .await
            .expect("remembering does not panic");
    }

    // Digests that were remembered and turned out wrong are not used again.
    fn forget_if_wrong(&self, memo: &Memo, error: &TransferError) {
        let is_wrong = match error {
            TransferError::Session(SessionError::Peer(failure)) => {
                failure.code == FailureCode::Content
            }
            TransferError::Session(SessionError::Changed(_)) => true,
            _ => false,
        };
        if is_wrong {
            self.sets.iter().for_each(|set| set.forget(memo));
        }
    }

    // The destination sees bytes that are not the announced ones; here the reason shows.
    async fn name_what_changed(&self, error: TransferError) -> TransferError {
        if !matches!(&error, TransferError::Session(SessionError::Peer(failure)) if failure.code == FailureCode::Content)
        {
            return error;
        }
        let sets = self.sets.clone();
        let changed = move || sets.iter().find_map(|set| set.check_unchanged().err());
        let changed = spawn_blocking(changed)
            .await
            .expect("listing does not panic");
        changed.unwrap_or(error)
    }

    // Tells the destination, or finds out what it told us while we were writing.
    async fn give_up(&mut self, error: TransferError) -> TransferError {
        if let Some(failure) = error.to_failure() {
            let _ = self
                .control
                .write_message(&Message::Failure(failure).encode())
                .await;
            let _ = self.control.finish();
            // Closing at once could drop what was just written.
            let _ = tokio::time::timeout(Duration::from_secs(1), self.connection.closed()).await;
            return error;
        }
        // A broken stream is often the echo of a failure that the destination explains.
        let explained = async {
            while let Some(input) = self.inputs.recv().await {
                match input {
                    Input::Message(Message::Failure(failure)) => return Some(failure),
                    Input::Ended(_) => return None,
                    _ => {}
                }
            }
            None
        };
        match tokio::time::timeout(Duration::from_secs(2), explained).await {
            Ok(Some(failure)) => peer_failure(failure),
            _ => error,
        }
    }
}

fn peer_failure(failure: Failure) -> TransferError {
    SessionError::Peer(failure).into()
}

async fn read_messages(mut messages: ControlReceiver, input: mpsc::UnboundedSender<Input>) {
    loop {
        let read = messages.read_message(limits::CONTROL_MESSAGE).await;
        let next = match read {
            Ok(Some(bytes)) => match Message::decode(&bytes) {
                Ok(message) => Input::Message(message),
                Err(error) => Input::Failed(SessionError::from(error).into()),
            },
            Ok(None) => Input::Ended(TransportError::CutShort.into()),
            Err(error) => Input::Ended(error.into()),
        };
        let is_last = !matches!(next, Input::Message(_));
        if input.send(next).is_err() || is_last {
            return;
        }
    }
}

async fn send_frames(
    mut stream: BulkSender,
    jobs: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<FrameJob>>>,
    packer: Arc<Packer>,
    input: mpsc::UnboundedSender<Input>,
) {
    loop {
        let Some(job) = jobs.lock().await.recv().await else {
            return;
        };
        let at = job.at;
        let result = send_frame(&mut stream, job, &packer).await;
        let failed = result.is_err();
        let next = match result {
            Ok(compressed_pages) => Input::FrameSent {
                at,
                compressed_pages,
            },
            Err(error) => Input::Failed(error),
        };
        if input.send(next).is_err() || failed {
            return;
        }
    }
}

async fn send_frame(
    stream: &mut BulkSender,
    job: FrameJob,
    packer: &Arc<Packer>,
) -> Result<u64, TransferError> {
    let packing = packer.clone();
    let pack = spawn_blocking(move || packing.pack(job.at, job.number, &job.ops, job.bytes));
    let (packed, compressed_pages) = pack.await.expect("packing does not panic")?;
    packer.line.send(stream, packed).await?;
    Ok(compressed_pages)
}

/// Segments that were read for hashing and may be sent soon.
#[derive(Debug, Default)]
struct Kept {
    bytes: HashMap<SegmentAt, Bytes>,
    order: VecDeque<SegmentAt>,
    total: usize,
}

impl Kept {
    fn put(&mut self, at: SegmentAt, bytes: Bytes) {
        self.total += bytes.len();
        self.bytes.insert(at, bytes);
        self.order.push_back(at);
        while self.total > KEPT_BYTES {
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            self.take(oldest);
        }
    }

    fn take(&mut self, at: SegmentAt) -> Option<Bytes> {
        let bytes = self.bytes.remove(&at)?;
        self.total -= bytes.len();
        Some(bytes)
    }
}
