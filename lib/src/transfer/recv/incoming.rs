//! What arrives of a running tree: read from its stream, written by a thread of its own, in order.

use std::path::PathBuf;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::session::SessionError;
use crate::standby::{self, Standby, StandbyError};
use crate::transfer::TransferError;
use crate::transfer::clock::nanos;
use crate::transfer::external::scripts;
use crate::transport::{BulkReceiver, Connection, TransportError};
use crate::wire::{
    FrameHeader, HEADER_LEN, Op, RecordKind, StreamNote, WireError, decode_page_ops, limits,
};

/// Records that were read and wait for being written: 8 MiB.
const WAITING: usize = 8;

#[derive(Debug)]
enum Record {
    Note(StreamNote),
    Frame(FrameHeader, Vec<Op>, Bytes),
}

/// What the standby says.
#[derive(Debug)]
pub(super) enum Arrived {
    /// Something happened; with the nanoseconds of work since the last one.
    Event(standby::Event, u64),
    /// It cannot go on.
    Failed(TransferError),
}

/// What reads and writes. Ends both when it is dropped; [`Receiving::end`] also waits for it.
#[derive(Debug)]
pub(super) struct Receiving {
    reader: tokio::task::JoinHandle<()>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Receiving {
    /// Nothing is written any more when this returns. Blocks.
    pub(super) fn end(mut self) {
        self.reader.abort();
        if let Some(writer) = self.writer.take() {
            // It has said what went wrong, if anything.
            let _ = writer.join();
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        // The writer ends when nothing comes any more.
        self.reader.abort();
    }
}

/// Reads and writes until the stream ends. `tell` hears of what happens, from a thread of its own.
pub(super) fn receive(
    connection: Connection,
    standby: Standby,
    tell: impl Fn(Arrived) + Clone + Send + Sync + 'static,
) -> std::io::Result<Receiving> {
    let (records, inbox) = mpsc::channel(WAITING);
    let told = tell.clone();
    let writer = std::thread::Builder::new()
        .name("standby".to_owned())
        .spawn(move || write_all(standby, inbox, &told))?;
    let reader = tokio::spawn(async move {
        let result = async {
            let mut stream = connection.accept_bulk().await?;
            read_all(&mut stream, &records).await
        };
        match result.await {
            // The source may leave when it has been told that all is well; the control stream says
            // so first.
            Ok(()) | Err(TransferError::Transport(_)) => {}
            Err(error) => tell(Arrived::Failed(error)),
        }
    });
    Ok(Receiving {
        reader,
        writer: Some(writer),
    })
}

async fn read_all(
    stream: &mut BulkReceiver,
    records: &mpsc::Sender<Record>,
) -> Result<(), TransferError> {
    let mut kind = [0];
    while stream.read_exact(&mut kind).await? {
        let record = match RecordKind::from_byte(kind[0]).map_err(SessionError::from)? {
            RecordKind::Note => read_note(stream).await?,
            RecordKind::Frame => read_frame(stream).await?,
        };
        if records.send(record).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

async fn read_note(stream: &mut BulkReceiver) -> Result<Record, TransferError> {
    let mut length = [0; 4];
    whole(stream.read_exact(&mut length).await?)?;
    let length = u32::from_le_bytes(length);
    if length > limits::STREAM_NOTE {
        return Err(SessionError::from(WireError::Field("length of a note")).into());
    }
    let bytes = stream.read_vec(length as usize).await?;
    let note = StreamNote::decode(&bytes).map_err(SessionError::from)?;
    Ok(Record::Note(note))
}

async fn read_frame(stream: &mut BulkReceiver) -> Result<Record, TransferError> {
    let mut head = [0; HEADER_LEN];
    whole(stream.read_exact(&mut head).await?)?;
    let header = FrameHeader::decode(&head).map_err(SessionError::from)?;
    let ops = stream.read_vec(header.ops_len as usize).await?;
    let ops = decode_page_ops(&ops).map_err(SessionError::from)?;
    let payload = stream.read_vec(header.payload_len as usize).await?;
    Ok(Record::Frame(header, ops, payload.into()))
}

fn whole(complete: bool) -> Result<(), TransportError> {
    complete.then_some(()).ok_or(TransportError::CutShort)
}

#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
fn write_all(mut standby: Standby, mut inbox: mpsc::Receiver<Record>, tell: &impl Fn(Arrived)) {
    let mut worked = 0;
    while let Some(record) = inbox.blocking_recv() {
        let begun = Instant::now();
        let event = match record {
            Record::Note(note) => standby.note(note),
            Record::Frame(header, ops, payload) => {
                standby.frame(&header, &ops, payload).map(|()| None)
            }
        };
        worked += nanos(begun.elapsed());
        match event {
            Ok(None) => {}
            Ok(Some(event)) => {
                let is_stored = matches!(event, standby::Event::Stored { .. });
                tell(Arrived::Event(event, std::mem::take(&mut worked)));
                if is_stored {
                    standby.drop_replaced();
                }
            }
            Err(error) => {
                tell(Arrived::Failed(error.into()));
                return;
            }
        }
    }
}

impl From<StandbyError> for TransferError {
    fn from(error: StandbyError) -> Self {
        match error {
            StandbyError::Protocol(what) => SessionError::Protocol(what).into(),
            StandbyError::Root => SessionError::Root.into(),
            StandbyError::TooLarge { size, limit } => SessionError::TooLarge { size, limit }.into(),
            StandbyError::Unpack(_) => {
                SessionError::Protocol("a frame that cannot be unpacked").into()
            }
            StandbyError::Image(error) => error.into(),
            StandbyError::Store(error) => error.into(),
        }
    }
}

/// The directory of a migration that arrives; removed with this where this connection made it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    /// CRIU's directory.
    pub(super) work: PathBuf,
    pub(super) owned: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Some(scene) = self.work.parent() {
            scripts::remove(scene);
        }
        for path in [&self.path, &self.work] {
            if let Err(error) = std::fs::remove_dir_all(path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }
}
