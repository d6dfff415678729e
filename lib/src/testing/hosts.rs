//! Both hosts of a transfer without sockets and files: the real state machines, fed with encoded
//! bytes, over sets in memory.

use std::ops::Range;
use std::time::Instant;

use super::sets::{MemorySet, MemoryStore, Stage, size};
use crate::delta::FileMeta;
use crate::delta::codec::{Compressor, Decompressor, Level};
use crate::digest::{Digest, hash_blocks};
use crate::session::{
    Destination, DestinationCommand, DestinationConfig, PageCounts, SessionError, Source,
    SourceCommand, SourceConfig, StoreJob,
};
use crate::wire::{
    BeginSet, Codec, FrameHeader, HEADER_LEN, Message, Op, Published, SegmentAt, decode_ops,
    encode_ops, limits,
};

/// Why one side ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its state machine said so.
    Session(SessionError),
    /// Its store said so.
    Store(String),
    /// The link broke.
    Cut,
    /// The other side left.
    Left,
}

impl From<SessionError> for Ended {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

/// A message as it stands on the control stream: behind its length.
///
/// # Panics
/// If it is longer than any message.
pub fn framed(message: &Message) -> Vec<u8> {
    let bytes = message.encode();
    let length = u32::try_from(bytes.len()).expect("messages are limited");
    [&length.to_le_bytes(), bytes.as_slice()].concat()
}

/// Bytes of a control stream until they are messages.
#[derive(Debug, Default)]
struct ControlBuffer(Vec<u8>);

impl ControlBuffer {
    fn next(&mut self) -> Result<Option<Message>, SessionError> {
        let Some((length, rest)) = self.0.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > limits::CONTROL_MESSAGE {
            return Err(SessionError::Protocol("a message that is too long"));
        }
        let Some(bytes) = rest.get(..length) else {
            return Ok(None);
        };
        let message = Message::decode(bytes)?;
        self.0.drain(..4 + length);
        Ok(Some(message))
    }
}

/// What a source wants done.
#[derive(Debug)]
pub enum SourceOutput {
    /// Bytes for the control stream.
    Control(Vec<u8>),
    /// A frame for any of the other streams; report `frame_sent`.
    Frame(Vec<u8>),
    /// Report `scanned` after a while.
    Scan(SegmentAt),
    /// All is published.
    Finished(Vec<Published>),
}

/// The sending host.
#[derive(Debug)]
pub struct SourceHost {
    machine: Source,
    sets: Vec<MemorySet>,
    skipped: usize,
    control: ControlBuffer,
    compressor: Option<Compressor>,
    /// Digest of each literal block that was put on a stream, in order.
    pub literals: Vec<Digest>,
}

impl SourceHost {
    /// A source that sends these sets, each the parent of the next. `compress`: frames that get
    /// smaller by it go compressed.
    pub fn new(sets: Vec<MemorySet>, compress: bool, now: Instant) -> Self {
        let last = sets.len().saturating_sub(1);
        let plan = sets.iter().enumerate();
        let plan = plan.map(|(index, set)| set.plan(index != last)).collect();
        let config = SourceConfig {
            software: "test".into(),
            ticket_proof: Some([1; 32]),
            expected_proof: Some([2; 32]),
        };
        Self {
            machine: Source::new(config, plan, now),
            sets,
            skipped: 0,
            control: ControlBuffer::default(),
            compressor: compress.then(|| Compressor::new().expect("zstd has memory")),
            literals: Vec::new(),
        }
    }

    /// Bytes came on the control stream.
    pub fn handle_control(&mut self, now: Instant, bytes: &[u8]) -> Result<(), SessionError> {
        self.control.0.extend_from_slice(bytes);
        while let Some(message) = self.control.next()? {
            self.machine.handle_message(now, message)?;
        }
        Ok(())
    }

    /// A segment that was to be scanned has been read.
    pub fn scanned(&mut self, now: Instant, at: SegmentAt) -> Result<(), SessionError> {
        let set = &self.sets[self.skipped + at.set as usize - 1];
        let (meta, _) = &set.files[at.file as usize];
        let mut digests = Vec::new();
        let bytes = set.bytes(at.file, meta.segment_range(at.segment));
        hash_blocks(bytes, meta.block_len as usize, &mut digests);
        self.machine.handle_scanned(now, at, digests)
    }

    /// A frame is on its stream.
    pub fn frame_sent(&mut self, now: Instant) -> Result<(), SessionError> {
        self.machine.handle_frame_sent(now)
    }

    /// The time of `poll_timeout` has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        self.machine.handle_timeout(now)
    }

    /// When `handle_timeout` is due.
    pub fn poll_timeout(&self) -> Instant {
        self.machine.poll_timeout()
    }

    /// How pages crossed.
    pub fn counts(&self) -> PageCounts {
        self.machine.counts()
    }

    /// What is to be done next.
    pub fn poll(&mut self) -> Option<SourceOutput> {
        Some(match self.machine.poll_command()? {
            SourceCommand::Send(message) => {
                if let Message::BeginSet(begin) = &message {
                    self.skipped = self.machine.set_index() + 1 - begin.set as usize;
                }
                SourceOutput::Control(framed(&message))
            }
            SourceCommand::Scan(at) => SourceOutput::Scan(at),
            SourceCommand::SendFrame(at, ops) => SourceOutput::Frame(self.pack(at, &ops)),
            SourceCommand::Finish(published) => SourceOutput::Finished(published),
        })
    }

    fn pack(&mut self, at: SegmentAt, ops: &[Op]) -> Vec<u8> {
        let set = &self.sets[self.skipped + at.set as usize - 1];
        let (meta, _) = &set.files[at.file as usize];
        let mut raw = Vec::new();
        let mut block = meta.segment_range(at.segment).start;
        for op in ops {
            let end = block + u64::from(op.blocks());
            if matches!(op, Op::Literal(_)) {
                let bytes = set.bytes(at.file, block..end);
                hash_blocks(bytes, meta.block_len as usize, &mut self.literals);
                raw.extend_from_slice(bytes);
            }
            block = end;
        }
        let compressed = self.compressor.as_mut().filter(|_| !raw.is_empty());
        let compressed =
            compressed.and_then(|compressor| compressor.compress(Level::One, &raw).ok());
        match compressed.filter(|payload| payload.len() < raw.len()) {
            Some(payload) => frame(at, ops, Codec::Zstd, raw.len(), &payload),
            None => frame(at, ops, Codec::Raw, raw.len(), &raw),
        }
    }
}

/// A frame as it stands on a stream.
///
/// # Panics
/// If it is longer than any frame.
pub fn frame(at: SegmentAt, ops: &[Op], codec: Codec, raw_len: usize, payload: &[u8]) -> Vec<u8> {
    let ops = encode_ops(ops);
    let len = |len: usize| u32::try_from(len).expect("frames are limited");
    let header = FrameHeader {
        set: at.set,
        file: at.file,
        segment: at.segment,
        codec,
        ops_len: len(ops.len()),
        raw_len: len(raw_len),
        payload_len: len(payload.len()),
    };
    [&header.encode(), ops.as_slice(), payload].concat()
}

/// A frame that was admitted and waits to be written.
#[derive(Debug)]
pub struct AdmittedFrame {
    header: FrameHeader,
    ops: Vec<Op>,
    payload: Vec<u8>,
    ranges: Vec<Range<u64>>,
}

/// A frame that was written.
#[derive(Debug)]
pub struct WrittenFrame {
    frame: Box<AdmittedFrame>,
    digests: Vec<Digest>,
}

/// What a destination wants done.
#[derive(Debug)]
pub enum DestinationOutput {
    /// Bytes for the control stream.
    Control(Vec<u8>),
    /// Call `prepared` after a while.
    Prepare(BeginSet, Vec<FileMeta>),
    /// Call `write` after a while, then `written`.
    Write(Box<AdmittedFrame>),
    /// Call `store` after a while.
    Store(Box<StoreJob>),
}

/// The receiving host.
#[derive(Debug)]
pub struct DestinationHost {
    machine: Destination,
    /// What it has.
    pub store: MemoryStore,
    stage: Option<Stage>,
    control: ControlBuffer,
    streams: Vec<Vec<u8>>,
    admitted: std::collections::VecDeque<Box<AdmittedFrame>>,
    unwritten: usize,
}

impl DestinationHost {
    /// A destination with this store, reached by so many streams.
    pub fn new(
        store: MemoryStore,
        streams: usize,
        max_set_bytes: Option<u64>,
        now: Instant,
    ) -> Self {
        let config = DestinationConfig {
            software: "test".into(),
            ticket_proof: Some([2; 32]),
            expected_proof: Some([1; 32]),
            layout: crate::wire::Layout::Faithful,
            max_set_bytes,
        };
        Self {
            machine: Destination::new(config, now),
            store,
            stage: None,
            control: ControlBuffer::default(),
            streams: vec![Vec::new(); streams],
            admitted: std::collections::VecDeque::new(),
            unwritten: 0,
        }
    }

    /// Bytes came on the control stream.
    pub fn handle_control(&mut self, now: Instant, bytes: &[u8]) -> Result<(), SessionError> {
        self.control.0.extend_from_slice(bytes);
        while let Some(message) = self.control.next()? {
            self.machine.handle_message(now, message)?;
        }
        Ok(())
    }

    /// Bytes came on stream number `stream`.
    pub fn handle_stream(&mut self, stream: usize, bytes: &[u8]) -> Result<(), SessionError> {
        self.streams[stream].extend_from_slice(bytes);
        while let Some((header, ops, payload)) = take_frame(&mut self.streams[stream])? {
            let ranges = self.machine.admit_frame(&header, &ops)?;
            self.unwritten += 1;
            self.admitted.push_back(Box::new(AdmittedFrame {
                header,
                ops,
                payload,
                ranges,
            }));
        }
        Ok(())
    }

    /// Whether the source may leave now.
    pub fn is_idle(&self) -> bool {
        self.machine.is_idle()
    }

    /// The time of `poll_timeout` has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        self.machine.handle_timeout(now)
    }

    /// When `handle_timeout` is due.
    pub fn poll_timeout(&self) -> Instant {
        self.machine.poll_timeout()
    }

    /// What is to be done next. Look-ups are answered on the way.
    pub fn poll(&mut self) -> Result<Option<DestinationOutput>, SessionError> {
        while let Some(command) = self.machine.poll_command() {
            match command {
                DestinationCommand::Send(message) => {
                    return Ok(Some(DestinationOutput::Control(framed(&message))));
                }
                DestinationCommand::Prepare(begin, files) => {
                    return Ok(Some(DestinationOutput::Prepare(begin, files)));
                }
                // As a receiver that takes images only.
                DestinationCommand::Migrate(_)
                | DestinationCommand::Meet(..)
                | DestinationCommand::TakePages(_) => {
                    return Err(SessionError::Protocol("it is about a tree"));
                }
                DestinationCommand::Store(job) => {
                    assert_eq!(self.unwritten, 0, "stored before all was written");
                    return Ok(Some(DestinationOutput::Store(job)));
                }
                DestinationCommand::FindRoots(roots) => {
                    let held = roots.iter().map(|root| self.store.has_root(root)).collect();
                    self.machine.handle_roots_found(held);
                }
                DestinationCommand::FindSegment(at, digest) => {
                    let found = self.store.find_segment(&digest);
                    self.machine.handle_segment_found(at, found)?;
                }
                DestinationCommand::FindBlocks(at, ids) => {
                    let found: Vec<_> = ids.iter().map(|&id| self.store.find(id)).collect();
                    self.machine.handle_blocks_found(at, &ids, &found)?;
                }
            }
        }
        Ok(self.admitted.pop_front().map(DestinationOutput::Write))
    }

    /// Room was made for the set, unless it stands there.
    pub fn prepared(&mut self, begin: &BeginSet, files: Vec<FileMeta>) {
        if let Some(published) = self.store.unchanged(begin) {
            self.machine.handle_stored(published);
            return;
        }
        let lacks_everything = self.store.is_empty();
        self.stage = Some(Stage::new(files));
        self.machine.handle_prepared(lacks_everything);
    }

    /// Unpacks, hashes and writes a frame.
    ///
    /// # Panics
    /// If a frame was admitted while nothing is being received.
    pub fn write(&mut self, frame: Box<AdmittedFrame>) -> Result<WrittenFrame, SessionError> {
        let raw = match frame.header.codec {
            Codec::Raw => frame.payload.clone(),
            Codec::Zstd => Decompressor::new()
                .and_then(|mut zstd| zstd.decompress(&frame.payload, frame.header.raw_len as usize))
                .map_err(|_| SessionError::Protocol("a frame that cannot be unpacked"))?,
        };
        let stage = self.stage.as_mut().expect("a set is being received");
        let digests = stage.write(frame.header.file, &frame.ranges, &raw);
        self.unwritten -= 1;
        Ok(WrittenFrame { frame, digests })
    }

    /// A frame that was written is reported.
    pub fn written(&mut self, now: Instant, written: &WrittenFrame) -> Result<(), SessionError> {
        let WrittenFrame { frame, digests } = written;
        self.machine
            .handle_frame(now, &frame.header, &frame.ops, digests)
    }

    /// Publishes.
    ///
    /// # Panics
    /// If there is no set to publish.
    pub fn publish(&mut self, job: &StoreJob) -> Result<(), String> {
        let stage = self.stage.take().expect("a set was received");
        let published = self.store.publish(job, &stage);
        if published.is_err() {
            self.store.abandon(stage);
        }
        self.machine.handle_stored(published?);
        Ok(())
    }

    /// Ends: keeps what arrived, and gives the store back.
    pub fn into_store(mut self) -> MemoryStore {
        if let Some(stage) = self.stage.take() {
            self.store.abandon(stage);
        }
        self.store
    }
}

type Frame = (FrameHeader, Vec<Op>, Vec<u8>);

/// Takes a whole frame off the front of a stream's bytes.
pub fn take_frame(buffer: &mut Vec<u8>) -> Result<Option<Frame>, SessionError> {
    let Some((head, rest)) = buffer.split_first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let header = FrameHeader::decode(head)?;
    let (ops_len, payload_len) = (header.ops_len as usize, header.payload_len as usize);
    let Some(ops) = rest.get(..ops_len) else {
        return Ok(None);
    };
    let ops = decode_ops(ops)?;
    let Some(payload) = rest.get(ops_len..ops_len + payload_len) else {
        return Ok(None);
    };
    let payload = payload.to_vec();
    buffer.drain(..size(HEADER_LEN as u64) + ops_len + payload_len);
    Ok(Some((header, ops, payload)))
}

impl WrittenFrame {
    /// Digests of its literal blocks.
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        self.digests.iter().copied()
    }
}
