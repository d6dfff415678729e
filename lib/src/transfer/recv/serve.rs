//! One source's connection.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::staged::Staged;
use super::storing::{prepare_set, store_set};
use super::{Shared, meeting, migration, pages};
use crate::delta::FileMeta;
use crate::digest::Digest;
use crate::session::{Destination, DestinationCommand, DestinationConfig, SessionError, StoreJob};
use crate::store::Held;
use crate::ticket::{Role, proof};
use crate::transfer::event::{Event, Received};
use crate::transfer::{TransferError, software};
use crate::transport::{
    BulkReceiver, Connection, ControlReceiver, ControlSender, HANDSHAKE_TIMEOUT, TransportError,
};
use crate::wire::{
    BeginSet, BlockId, FrameHeader, HEADER_LEN, Message, MigrationId, Offer, Op, PagesOffer,
    Published, Verdict, WireError, decode_ops, limits,
};

/// Frames that were read from the streams and wait for a core: 8 MiB.
const FRAMES_WAITING: usize = 8;

/// Frames that are unpacked, hashed and written at the same time.
const FRAMES_AT_WORK: usize = 4;

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
    let mut outcome = driver.run(messages).await;
    driver.keep_partial(outcome.as_ref().err());
    if let (Ok(()), Some((id, verdict))) = (&outcome, driver.meeting.take()) {
        outcome = meeting::serve(&connection, shared, &mut driver.control, id, verdict).await;
    } else if let (Ok(()), Some(offer)) = (&outcome, driver.offer.take()) {
        outcome = migration::serve(
            &connection,
            shared.clone(),
            &mut driver.control,
            &mut driver.inputs,
            *offer,
        )
        .await;
    } else if let (Ok(()), Some(offer)) = (&outcome, driver.pages.take()) {
        let (control, inputs) = (&mut driver.control, &mut driver.inputs);
        outcome = pages::serve(&connection, shared.clone(), control, inputs, offer).await;
    }
    match outcome {
        Ok(()) => Ok(()),
        // A migration has said so itself.
        Err(error) if connection.close_reason().is_some() => Err(error),
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

pub(super) enum Input {
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

pub(super) struct Frame {
    pub(super) header: FrameHeader,
    pub(super) ops: Vec<Op>,
    pub(super) payload: Bytes,
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
    // What follows is another protocol.
    offer: Option<Box<Offer>>,
    meeting: Option<(MigrationId, Verdict)>,
    pages: Option<PagesOffer>,
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
            offer: None,
            meeting: None,
            pages: None,
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn run(&mut self, messages: ControlReceiver) -> Result<(), TransferError> {
        tokio::spawn(read_messages(messages, self.input.clone()));
        loop {
            while let Some(command) = self.destination.poll_command() {
                self.carry_out(command).await?;
            }
            if self.offer.is_some() || self.meeting.is_some() || self.pages.is_some() {
                return Ok(());
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
            DestinationCommand::Migrate(offer) => self.offer = Some(offer),
            DestinationCommand::Meet(id, verdict) => self.meeting = Some((id, verdict)),
            DestinationCommand::TakePages(offer) => self.pages = Some(offer),
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

pub(super) fn is_out_of_space(error: &TransferError) -> bool {
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
