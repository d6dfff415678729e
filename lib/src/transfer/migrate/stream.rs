//! From records to the migration's bulk stream: packed side by side, written in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::delta::{Changes, Record};
use crate::transfer::TransferError;
use crate::transfer::clock::nanos;
use crate::transfer::pack::{Line, Packed};
use crate::transport::{BulkSender, Connection};
use crate::wire::{Codec, RecordKind, SegmentAt};

/// Frames that are packed or wait for the stream: 4 MiB at most. What is in flight cannot be taken
/// back when a deadline comes.
const IN_FLIGHT: usize = 4;

/// For the same reason no more is handed to the transport than the line takes in about this time.
const AHEAD: Duration = Duration::from_millis(250);

/// But always this much, so that the line never waits for us.
const LEAST_AHEAD: u64 = 1 << 20;

/// How often the line is looked at while it is waited for.
const LOOK: Duration = Duration::from_millis(5);

enum Item {
    Note(Bytes),
    Frame(JoinHandle<Packed>),
    /// Everything before it has been handed to the transport.
    Mark(oneshot::Sender<()>),
    /// An iteration begins: everything before it has arrived.
    Arrived,
}

/// What was written so far.
#[derive(Debug, Default)]
pub(super) struct Written {
    bytes: AtomicU64,
    busy_ns: AtomicU64,
}

impl Written {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Time in which the transport was waited for.
    pub(super) fn busy(&self) -> Duration {
        Duration::from_nanos(self.busy_ns.load(Ordering::Relaxed))
    }
}

/// Where records go. Clones go to the same stream; only one may be in use at a time, or records
/// would mix.
#[derive(Clone, Debug)]
pub(in crate::transfer) struct RecordStream {
    items: mpsc::Sender<Item>,
    line: Arc<Line>,
    runtime: Handle,
    written: Arc<Written>,
    stop: Arc<AtomicBool>,
}

impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Item")
    }
}

/// The stream has ended: its writer knows why.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the stream to the destination has ended")]
pub(in crate::transfer) struct StreamEnded;

impl RecordStream {
    /// Starts the writer. `failed` hears of an error of the stream, once.
    pub(in crate::transfer) fn start(
        connection: &Connection,
        stream: BulkSender,
        bytes_per_s: Option<u64>,
        failed: impl FnOnce(TransferError) + Send + 'static,
    ) -> Self {
        let (items, inbox) = mpsc::channel(IN_FLIGHT);
        let line = Arc::new(Line::new(bytes_per_s));
        let written = Arc::new(Written::default());
        let ahead = Ahead::new(connection.clone(), &line);
        let writer = write_all(stream, inbox, ahead, line.clone(), written.clone());
        tokio::spawn(async move {
            if let Err(error) = writer.await {
                failed(error);
            }
        });
        Self {
            items,
            line,
            runtime: Handle::current(),
            written,
            stop: Arc::default(),
        }
    }

    /// What was written so far.
    pub(super) fn written(&self) -> &Written {
        &self.written
    }

    /// The next iteration begins, and all before it has arrived. For threads that may block.
    pub(super) fn arrived(&self) {
        // An ended stream is reported by its writer.
        let _ = self.items.blocking_send(Item::Arrived);
    }

    /// Ends the reading of an iteration soon: [`RecordStream::is_stopped`].
    pub(super) fn stop(&self, stop: bool) {
        self.stop.store(stop, Ordering::Relaxed);
    }

    /// Whether reading should end.
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Puts records of iteration `number` on the stream; waits while it is full. For threads that
    /// may block.
    pub(in crate::transfer) fn put(
        &self,
        number: u32,
        records: &mut Vec<Record>,
    ) -> Result<(), StreamEnded> {
        for record in records.drain(..) {
            let item = match record {
                Record::Note(note) => Item::Note(note.encode().into()),
                Record::Frame(changes) => Item::Frame(self.pack(number, changes)),
            };
            self.items.blocking_send(item).map_err(|_| StreamEnded)?;
        }
        Ok(())
    }

    /// Waits until all that was put before has been handed to the transport.
    pub(super) fn drained(&self) -> Result<(), StreamEnded> {
        let (done, when) = oneshot::channel();
        self.items
            .blocking_send(Item::Mark(done))
            .map_err(|_| StreamEnded)?;
        when.blocking_recv().map_err(|_| StreamEnded)
    }

    fn pack(&self, number: u32, changes: Changes) -> JoinHandle<Packed> {
        let line = self.line.clone();
        self.runtime.spawn_blocking(move || {
            let at = SegmentAt {
                set: number,
                file: changes.object,
                segment: changes.segment,
            };
            let packed = line.frame(at, &changes.ops, changes.literal.into());
            let [head, payload] = packed.parts;
            let head = [&[RecordKind::FRAME], &head[..]].concat();
            Packed {
                wire_len: packed.wire_len + 1,
                parts: [head.into(), payload],
                codec: packed.codec,
            }
        })
    }
}

async fn write_all(
    mut stream: BulkSender,
    mut inbox: mpsc::Receiver<Item>,
    mut ahead: Ahead,
    line: Arc<Line>,
    written: Arc<Written>,
) -> Result<(), TransferError> {
    while let Some(item) = inbox.recv().await {
        let packed = match item {
            Item::Mark(done) => {
                let _ = done.send(());
                continue;
            }
            Item::Arrived => {
                ahead.arrived(&line);
                continue;
            }
            Item::Note(note) => Packed {
                wire_len: note.len() as u64,
                parts: [note, Bytes::new()],
                codec: Codec::Raw,
            },
            Item::Frame(packing) => packing.await.expect("packing does not panic"),
        };
        let begun = line.clock();
        let bytes = packed.wire_len;
        line.send(&mut stream, packed).await?;
        ahead.wait(bytes, &line).await;
        let busy = nanos(line.clock() - begun);
        written.bytes.fetch_add(bytes, Ordering::Relaxed);
        written.busy_ns.fetch_add(busy, Ordering::Relaxed);
    }
    Ok(())
}

/// How far what was handed to the transport is ahead of what has left this host.
#[derive(Debug)]
struct Ahead {
    connection: Connection,
    // When all had arrived, and what had left by then.
    since: Instant,
    left_before: u64,
    given: u64,
}

impl Ahead {
    fn new(connection: Connection, line: &Line) -> Self {
        Self {
            since: line.clock(),
            left_before: connection.wire_bytes().0,
            given: 0,
            connection,
        }
    }

    fn arrived(&mut self, line: &Line) {
        self.since = line.clock();
        self.left_before = self.connection.wire_bytes().0;
        self.given = 0;
    }

    async fn wait(&mut self, bytes: u64, line: &Line) {
        self.given += bytes;
        while self.connection.close_reason().is_none() {
            let left = self.connection.wire_bytes().0 - self.left_before;
            if self.given.saturating_sub(left) <= allowed(left, line.clock() - self.since) {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

// What may wait in the transport where `left` bytes have left within `time`.
fn allowed(left: u64, time: Duration) -> u64 {
    let rate = u128::from(left) * AHEAD.as_nanos() / time.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX).max(LEAST_AHEAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_line_is_given_little_ahead_and_a_fast_one_enough() {
        let second = Duration::from_secs(1);
        assert_eq!(allowed(2_500_000, second), LEAST_AHEAD);
        assert_eq!(allowed(125_000_000, second), 31_250_000);
        assert_eq!(allowed(0, Duration::ZERO), LEAST_AHEAD);
    }
}
