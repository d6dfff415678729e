//! The control stream of a page session.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::session::pages::{PagesBase, PagesSource, PagesSourceCommand as Command};
use crate::session::{SessionError, SourceConfig};
use crate::transfer::TransferError;
use crate::transfer::migrate::RecordStream;
use crate::transfer::send::EndOnDrop;
use crate::transport::{Connection, ControlReceiver, ControlSender, TransportError};
use crate::wire::{Failure, Message, PagesOffer, PagesStored, limits};

/// How long a broken stream waits for the destination's reason.
const EXPLAINED: Duration = Duration::from_secs(2);

/// How long the destination may take to hear why this side gives up.
const FAREWELL: Duration = Duration::from_secs(1);

/// A session in which the dump may begin.
pub(super) struct Begun {
    pub(super) base: PagesBase,
    pub(super) stream: RecordStream,
    pub(super) watch: Watch,
    pub(super) outcome: oneshot::Receiver<Result<PagesStored, TransferError>>,
    pub(super) connection: EndOnDrop,
}

/// Tells the task that watches the control stream.
#[derive(Clone, Debug)]
pub(super) struct Watch(mpsc::UnboundedSender<Input>);

impl Watch {
    /// The end of the dump follows now.
    pub(super) fn ended(&self) {
        let _ = self.0.send(Input::Ended);
    }

    /// This side gives up; `failure` is what the destination is told.
    pub(super) fn fail(&self, failure: Option<Failure>) {
        let _ = self.0.send(Input::Fail(failure));
    }
}

#[derive(Debug)]
enum Input {
    Message(Message),
    // The connection, or one of its streams.
    Broken(TransferError),
    Ended,
    Fail(Option<Failure>),
}

/// Speaks with the destination until the dump may begin, and goes on in a task of its own.
pub(super) async fn begin(
    connection: EndOnDrop,
    config: SourceConfig,
    offer: PagesOffer,
    bytes_per_s: Option<u64>,
) -> Result<Begun, TransferError> {
    let mut driver = Driver::new(&connection.0, config, offer).await?;
    let base = match driver.until_begin().await {
        Ok(base) => base,
        Err(error) => return Err(driver.give_up(error).await),
    };
    let bulk = connection.0.open_bulk().await?;
    let tell = driver.tell.clone();
    let failed = move |error| drop(tell.send(Input::Broken(error)));
    let stream = RecordStream::start(&connection.0, bulk, bytes_per_s, failed);
    let watch = Watch(driver.tell.clone());
    let (done, outcome) = oneshot::channel();
    tokio::spawn(async move {
        let stored = match driver.until_stored().await {
            Ok(stored) => Ok(stored),
            Err(error) => Err(driver.give_up(error).await),
        };
        if let Err(error) = &stored {
            // Whoever waits for room on a stream must not wait any longer.
            let code = error.close_code();
            driver.connection.close(code, &error.to_string());
        }
        // Nobody asks any more where the upload was dropped.
        let _ = done.send(stored);
    });
    Ok(Begun {
        base,
        stream,
        watch,
        outcome,
        connection,
    })
}

struct Driver {
    connection: Connection,
    control: ControlSender,
    session: PagesSource,
    tell: mpsc::UnboundedSender<Input>,
    inputs: mpsc::UnboundedReceiver<Input>,
}

impl Driver {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn new(
        connection: &Connection,
        config: SourceConfig,
        offer: PagesOffer,
    ) -> Result<Self, TransferError> {
        let (control, messages) = connection.open_control().await?;
        let (tell, inputs) = mpsc::unbounded_channel();
        tokio::spawn(read_messages(messages, tell.clone()));
        Ok(Self {
            connection: connection.clone(),
            control,
            session: PagesSource::new(config, offer, Instant::now()),
            tell,
            inputs,
        })
    }

    async fn until_begin(&mut self) -> Result<PagesBase, TransferError> {
        loop {
            match self.next().await? {
                Command::Begin(base) => return Ok(base),
                Command::Stored(_) => return Err(out_of_order()),
                Command::Send(_) => {}
            }
        }
    }

    async fn until_stored(&mut self) -> Result<PagesStored, TransferError> {
        loop {
            match self.next().await? {
                Command::Stored(stored) => return Ok(stored),
                Command::Begin(_) => return Err(out_of_order()),
                Command::Send(_) => {}
            }
        }
    }

    // The next command that is not carried out here.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn next(&mut self) -> Result<Command, TransferError> {
        loop {
            while let Some(command) = self.session.poll_command() {
                match command {
                    Command::Send(message) => self.control.write_message(&message.encode()).await?,
                    other => return Ok(other),
                }
            }
            let timeout = tokio::time::Instant::from_std(self.session.poll_timeout());
            tokio::select! {
                input = self.inputs.recv() => match input.expect("this side holds a sender") {
                    Input::Message(message) => {
                        self.session.handle_message(Instant::now(), message)?;
                    }
                    Input::Broken(error) => return Err(error),
                    Input::Ended => self.session.ended(),
                    Input::Fail(Some(failure)) => return Err(SessionError::Local(failure).into()),
                    Input::Fail(None) => return Err(TransferError::Cancelled),
                },
                () = tokio::time::sleep_until(timeout) => self.session.handle_timeout(Instant::now())?,
            }
        }
    }

    // Tells the destination, or finds out what it told us.
    async fn give_up(&mut self, error: TransferError) -> TransferError {
        if let Some(failure) = error.to_failure() {
            let failure = Message::Failure(failure).encode();
            let _ = self.control.write_message(&failure).await;
            let _ = self.control.finish();
            // Closing at once could drop what was just written. Nobody waits for this but `finish`.
            let _ = tokio::time::timeout(FAREWELL, self.connection.closed()).await;
            return error;
        }
        let explained = async {
            while let Some(input) = self.inputs.recv().await {
                match input {
                    Input::Message(Message::Failure(failure)) => return Some(failure),
                    Input::Broken(_) => return None,
                    _ => {}
                }
            }
            None
        };
        match tokio::time::timeout(EXPLAINED, explained).await {
            Ok(Some(failure)) => SessionError::Peer(failure).into(),
            _ => error,
        }
    }
}

fn out_of_order() -> TransferError {
    SessionError::Protocol("a message out of order").into()
}

async fn read_messages(mut messages: ControlReceiver, tell: mpsc::UnboundedSender<Input>) {
    loop {
        let input = match messages.read_message(limits::CONTROL_MESSAGE).await {
            Ok(Some(bytes)) => match Message::decode(&bytes) {
                Ok(message) => Input::Message(message),
                Err(error) => Input::Broken(SessionError::from(error).into()),
            },
            Ok(None) => Input::Broken(TransportError::CutShort.into()),
            Err(error) => Input::Broken(error.into()),
        };
        let is_last = !matches!(input, Input::Message(_));
        if tell.send(input).is_err() || is_last {
            return;
        }
    }
}
