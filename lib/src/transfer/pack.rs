//! Frames from the blocks of a segment: gathered, compressed where that pays, held to the rate.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::TransferError;
use super::plan::SourceSet;
use crate::delta::FileMeta;
use crate::delta::codec::{CodecPolicy, Compressor, Sent, pack};
use crate::session::SessionError;
use crate::transport::BulkSender;
use crate::wire::{Codec, FrameHeader, Op, SegmentAt, encode_ops};

thread_local! {
    // A zstd context is a few hundred kilobytes: one for each thread that packs.
    static COMPRESSOR: RefCell<Option<Compressor>> = const { RefCell::new(None) };
}

/// With a rate limit, frames are handed over in pieces of this length: 20 ms at 800 KB/s.
const RATE_PIECE: usize = 16 << 10;

/// Headers of QUIC, UDP and IP take about one byte in this many of a 1,472-byte packet's payload.
const PACKET_OVERHEAD: u64 = 24;

/// A frame ready for its stream.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) parts: [Bytes; 2],
    pub(super) codec: Codec,
    pub(super) wire_len: u64,
}

/// Packs the frames of one transfer.
#[derive(Debug)]
pub(super) struct Packer {
    sets: Arc<Vec<SourceSet>>,
    pub(super) line: Line,
}

/// What frames are packed for: compressed where that pays, sent no faster than the user allows.
#[derive(Debug)]
pub(super) struct Line {
    bytes_per_s: Option<u64>,
    begun: Instant,
    policy: Mutex<CodecPolicy>,
    last_sent: Mutex<Instant>,
    free_at: Mutex<Instant>,
}

impl Packer {
    pub(super) fn new(sets: Arc<Vec<SourceSet>>, bytes_per_s: Option<u64>) -> Self {
        let line = Line::new(bytes_per_s);
        Self { sets, line }
    }

    /// Packs the literal blocks of a segment; `bytes` is the whole segment where it is still in
    /// memory. `at.set` is the set's index in the plan, `number` its number in the session. Gives also how many pages
    /// are compressed.
    pub(super) fn pack(
        &self,
        at: SegmentAt,
        number: u32,
        ops: &[Op],
        bytes: Option<Bytes>,
    ) -> Result<(Packed, u64), TransferError> {
        let set = &self.sets[at.set as usize];
        let meta = &set.files[at.file as usize];
        let (raw, blocks) = self.gather(set, meta, at, ops, bytes)?;
        let packed = self.line.frame(SegmentAt { set: number, ..at }, ops, raw);
        let is_compressed = packed.codec == Codec::Zstd && meta.is_pages();
        Ok((packed, if is_compressed { blocks } else { 0 }))
    }

    // The bytes of the literal blocks, and how many blocks they are.
    fn gather(
        &self,
        set: &SourceSet,
        meta: &FileMeta,
        at: SegmentAt,
        ops: &[Op],
        bytes: Option<Bytes>,
    ) -> Result<(Bytes, u64), TransferError> {
        let segment = meta.segment_range(at.segment);
        let whole = meta.bytes_of(&segment);
        if let ([Op::Literal(count)], Some(bytes)) = (ops, &bytes) {
            return Ok((bytes.clone(), u64::from(*count)));
        }
        let mut raw = Vec::new();
        let (mut block, mut blocks) = (segment.start, 0);
        for op in ops {
            let end = block + u64::from(op.blocks());
            if matches!(op, Op::Literal(_)) {
                let range = meta.bytes_of(&(block..end));
                match &bytes {
                    Some(bytes) => {
                        let fits =
                            |at: u64| usize::try_from(at - whole.start).expect("within a segment");
                        raw.extend_from_slice(&bytes[fits(range.start)..fits(range.end)]);
                    }
                    // A literal block was not zero when it was hashed: a hole now is a change.
                    None => match set.read(at.file, range)? {
                        Some(bytes) => raw.extend_from_slice(&bytes),
                        None => return Err(SessionError::Changed(meta.name.to_string()).into()),
                    },
                }
                blocks += u64::from(op.blocks());
            }
            block = end;
        }
        Ok((raw.into(), blocks))
    }
}

impl Line {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        let begun = Instant::now();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut policy = CodecPolicy::new(threads.min(super::send::BULK_STREAMS));
        if let Some(rate) = bytes_per_s {
            #[expect(clippy::cast_precision_loss, reason = "a rate is an estimate")]
            policy.assume_link(rate as f64);
        }
        Self {
            bytes_per_s,
            begun,
            policy: Mutex::new(policy),
            last_sent: Mutex::new(begun),
            free_at: Mutex::new(begun),
        }
    }

    /// A frame of these literal blocks.
    pub(super) fn frame(&self, at: SegmentAt, ops: &[Op], raw: Bytes) -> Packed {
        let compressed = if raw.is_empty() {
            None
        } else {
            self.compress(&raw)
        };
        let ops = encode_ops(ops);
        let len = |bytes: usize| u32::try_from(bytes).expect("frames are limited");
        let raw_len = len(raw.len());
        let (codec, payload) = match compressed {
            Some(payload) => (Codec::Zstd, Bytes::from(payload)),
            None => (Codec::Raw, raw),
        };
        let header = FrameHeader {
            set: at.set,
            file: at.file,
            segment: at.segment,
            codec,
            ops_len: len(ops.len()),
            raw_len,
            payload_len: len(payload.len()),
        };
        let head = [header.encode().as_slice(), &ops].concat();
        Packed {
            wire_len: (head.len() + payload.len()) as u64,
            parts: [head.into(), payload],
            codec,
        }
    }

    // A frame that cannot be compressed goes as it is: no reason to end a transfer.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn compress(&self, raw: &[u8]) -> Option<Vec<u8>> {
        COMPRESSOR.with_borrow_mut(|compressor| {
            if compressor.is_none() {
                *compressor = Compressor::new().ok();
            }
            pack(&self.policy, compressor.as_mut()?, raw, || {
                Instant::now() - self.begun
            })
            .ok()?
        })
    }

    /// Hands a frame to its stream, and learns how fast the link takes it.
    pub(super) async fn send(
        &self,
        stream: &mut BulkSender,
        packed: Packed,
    ) -> Result<(), TransferError> {
        let begun = self.clock();
        self.write(stream, packed.parts).await?;
        self.sent(packed.wire_len, begun);
        Ok(())
    }

    /// Hands bytes to their stream, no faster than the user allows.
    pub(super) async fn write(
        &self,
        stream: &mut BulkSender,
        mut parts: [Bytes; 2],
    ) -> Result<(), TransferError> {
        let Some(rate) = self.bytes_per_s else {
            return Ok(stream.write_parts(&mut parts).await?);
        };
        for mut part in parts {
            while !part.is_empty() {
                let piece = part.split_to(part.len().min(RATE_PIECE));
                self.wait_for_turn(piece.len() as u64, rate).await;
                stream.write(piece).await?;
            }
        }
        Ok(())
    }

    // Pieces of all streams queue behind one another: each has its time from the one before.
    async fn wait_for_turn(&self, bytes: u64, rate: u64) {
        let on_wire = bytes + bytes / PACKET_OVERHEAD;
        let takes = Duration::from_nanos(on_wire.saturating_mul(1_000_000_000) / rate.max(1));
        let turn = {
            let mut free = lock(&self.free_at);
            let turn = (*free).max(self.clock());
            *free = turn + takes;
            turn
        };
        tokio::time::sleep_until(turn.into()).await;
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) fn clock(&self) -> Instant {
        Instant::now()
    }

    // A frame of `bytes` was handed over since `begun`.
    fn sent(&self, bytes: u64, begun: Instant) {
        let now = self.clock();
        let interval = now - std::mem::replace(&mut *lock(&self.last_sent), now);
        lock(&self.policy).on_sent(Sent {
            bytes,
            waited: now - begun,
            interval,
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
