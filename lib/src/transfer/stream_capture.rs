//! `criu dump --stream` straight to a destination: the driver.
//!
//! ```text
//!   criu ── pipes ──▶ Capture ──▶ private tmpfs ── send ──▶ destination
//!     │ post-dump: vote ─────────▶ held                        │
//!     ◀──── go, or refuse ────────────────────────── Published, or an error
//! ```

use std::fs::File;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use super::TransferError;
use super::send::{SendOptions, SendReport, send};
use crate::criu::streamer::{Capture, CaptureOptions, Captured, StreamerError};
use crate::preflight;
use crate::session::SessionError;
use crate::sink::{Memory, Sink as _, SinkError};
use crate::wire::FailureCode;

/// What to take, and where it goes.
#[derive(Debug)]
pub struct StreamOptions {
    /// Directory of the sockets: what CRIU gets as `-D`.
    pub directory: PathBuf,
    /// How CRIU is spoken to.
    pub capture: CaptureOptions,
    /// Most bytes of memory that images may take here; by default half of the host's.
    pub memory: Option<u64>,
    /// How long the tree may be held at post-dump for the destination. Without one, as long as the
    /// destination shows that it is there.
    pub freeze_limit: Option<Duration>,
    /// How to send; `directory` and `memo` in it mean nothing.
    pub send: SendOptions,
}

/// A moment of a capture, for the caller to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamMoment {
    /// CRIU can be started.
    Listening,
    /// All images are here; sending begins.
    Captured {
        /// How many.
        images: u64,
        /// Their bytes.
        bytes: u64,
        /// Whether CRIU holds the tree meanwhile.
        held: bool,
    },
}

/// What came of it.
#[derive(Debug)]
pub struct StreamReport {
    /// Images that CRIU wrote.
    pub images: u64,
    /// Their bytes.
    pub image_bytes: u64,
    /// From the last image to the verdict: how long the tree was held for the destination.
    pub held: Option<Duration>,
    /// The transfer.
    pub sent: SendReport,
}

/// Why the images are not at the destination, or CRIU does not know that they are.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// CRIU's side. The tree runs on.
    #[error(transparent)]
    Streamer(#[from] StreamerError),
    /// There is no memory to keep the images in.
    #[error(transparent)]
    Memory(#[from] SinkError),
    /// The transfer. A tree that was held runs on.
    #[error("{error}{}", fate(*.held))]
    Transfer {
        /// What failed.
        error: TransferError,
        /// Whether CRIU held the tree for the verdict.
        held: bool,
    },
    /// The destination took too long. The tree runs on.
    #[error("the destination did not store the images within {} s; the tree runs on", .0.as_secs_f64())]
    Late(Duration),
    /// The destination has the images, but CRIU was gone before it heard so. The tree runs on.
    #[error(
        "the images are stored at the destination, but CRIU no longer waited for that: the tree runs on here. Do not restore the images there"
    )]
    Unheard,
}

fn fate(held: bool) -> &'static str {
    match held {
        true => "; CRIU was refused, and the tree runs on",
        false => "; CRIU was not held, so its images are lost",
    }
}

/// Takes one `criu dump --stream`, and sends it. Held CRIU is told to go on once the destination has
/// stored the set.
///
/// Images are only in memory that no other process can see. Dropping the future, or ending the
/// process, refuses: the tree runs on.
#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
pub async fn stream_capture(
    mut options: StreamOptions,
    moment: impl Fn(StreamMoment),
) -> Result<StreamReport, StreamError> {
    let most = options
        .memory
        .unwrap_or_else(|| preflight::memory_available() / 2);
    let memory = Memory::create(most)?;
    let writable = File::open(memory.path()).map_err(|source| SinkError::Kernel {
        call: "open",
        source,
    })?;
    let (capture, _stopper) =
        Capture::listen(&options.directory, writable.into(), options.capture)?;
    moment(StreamMoment::Listening);
    let taking = spawn_blocking(move || capture.take());
    let Captured {
        images: count,
        bytes,
        vote,
    } = taking.await.expect("capturing does not panic")?;
    let (begun, held) = (Instant::now(), vote.is_some());
    moment(StreamMoment::Captured {
        images: count,
        bytes,
        held,
    });

    options.send.directory = memory.path().to_owned();
    options.send.memo = None;
    let sent = within(
        options.freeze_limit.filter(|_| held),
        send_twice(options.send),
    )
    .await;
    let sent = match sent {
        Ok(Ok(sent)) => sent,
        Ok(Err(error)) => {
            refuse(vote, &error);
            return Err(StreamError::Transfer { error, held });
        }
        Err(limit) => {
            let error = StreamError::Late(limit);
            refuse(vote, &error);
            return Err(error);
        }
    };
    let waited = begun.elapsed();
    if let Some(vote) = vote {
        vote.go_on().map_err(|_| StreamError::Unheard)?;
    }
    Ok(StreamReport {
        images: count,
        image_bytes: bytes,
        held: held.then_some(waited),
        sent,
    })
}

fn refuse(vote: Option<crate::criu::streamer::Vote>, why: &impl ToString) {
    if let Some(vote) = vote {
        vote.refuse(&why.to_string());
    }
}

async fn within<T>(limit: Option<Duration>, work: impl Future<Output = T>) -> Result<T, Duration> {
    match limit {
        None => Ok(work.await),
        Some(limit) => tokio::time::timeout(limit, work).await.map_err(|_| limit),
    }
}

/// A destination that found one of its copies damaged does not count on it any more: once more.
async fn send_twice(options: SendOptions) -> Result<SendReport, TransferError> {
    let again = SendOptions {
        directory: options.directory.clone(),
        name: options.name.clone(),
        base: options.base.clone(),
        page_size: options.page_size,
        bytes_per_s: options.bytes_per_s,
        target: options.target.clone(),
        identity: options.identity.clone(),
        memo: None,
        transport: options.transport.clone(),
        events: options.events.clone(),
    };
    match send(options).await {
        Err(TransferError::Session(SessionError::Peer(failure)))
            if failure.code == FailureCode::Held =>
        {
            send(again).await
        }
        other => other,
    }
}
