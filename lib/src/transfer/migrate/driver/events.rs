//! Waiting for what comes next, and what is done meanwhile.

use std::collections::VecDeque;
use std::ops::ControlFlow::{self, Break, Continue};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Command, CriuEnd, Driver, Event, Input, ended};
use crate::precopy::{Decision, Iteration};
use crate::session::SessionError;
use crate::transfer::migrate::freeze::Moment;
use crate::transfer::migrate::{MigrateError, MigrateEvent};
use crate::transport::{ControlReceiver, ControlSender, TransportError};
use crate::wire::{Message, limits};

/// Progress is told, and the policy asked, this often within an iteration.
const TICK: Duration = Duration::from_millis(100);

/// The clocks are compared this often, and this many times at the begin.
const CLOCK_EVERY: Duration = Duration::from_secs(1);
const CLOCK_AT_FIRST: u32 = 8;

impl Driver<'_> {
    /// Waits for a moment of the freeze.
    pub(super) async fn moment(&mut self) -> Result<Moment, MigrateError> {
        self.until(|event| match event {
            Event::Freeze(moment) => Break(moment),
            other => Continue(other),
        })
        .await
    }

    /// Waits for an event that `pick` takes; gives others back to it until then. While it waits for the
    /// session, CRIU's end of the dump is an error.
    pub(super) async fn until<T>(
        &mut self,
        pick: impl Fn(Event) -> ControlFlow<T, Event>,
    ) -> Result<T, MigrateError> {
        let mut passed_over = VecDeque::new();
        loop {
            while let Some(event) = self.events.pop_front() {
                match pick(event) {
                    Break(found) => {
                        passed_over.append(&mut self.events);
                        self.events = passed_over;
                        return Ok(found);
                    }
                    Continue(Event::Freeze(Moment::Ended { result })) if self.frozen.is_some() => {
                        return Err(ended(result));
                    }
                    Continue(other) => passed_over.push_back(other),
                }
            }
            self.flush();
            if self.events.is_empty() {
                self.wait().await?;
            }
        }
    }

    /// Waits for work on another thread, and keeps the session going meanwhile.
    pub(super) async fn job<T>(&mut self, mut job: JoinHandle<T>) -> Result<T, MigrateError> {
        loop {
            self.flush();
            tokio::select! {
                done = &mut job => return Ok(done.expect("the work does not panic")),
                waited = self.wait() => waited?,
            }
        }
    }

    pub(super) fn flush(&mut self) {
        while let Some(command) = self.session.poll_command() {
            match command {
                // Its writer says what goes wrong.
                Command::Send(message) => drop(self.control.send(message)),
                Command::Clock { asked_ns, here_ns } => {
                    self.samples.add(asked_ns, here_ns, self.clock.now_ns());
                    // The next one at once, until there are a few.
                    if self.clock_questions < CLOCK_AT_FIRST {
                        self.ask_clock();
                    }
                }
                other => self.events.push_back(Event::Session(other)),
            }
        }
    }

    // Loses nothing when it is dropped.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) async fn wait(&mut self) -> Result<(), MigrateError> {
        let timeout = tokio::time::Instant::from_std(self.session.poll_timeout());
        let (may_stop, mut stop) = (self.may_stop, self.stop.clone());
        tokio::select! {
            input = self.inputs.recv() => self.take(input.expect("this side holds a sender"))?,
            () = tokio::time::sleep_until(timeout) => self.session.handle_timeout(Instant::now())?,
            () = tokio::time::sleep_until(self.next_tick) => {
                self.next_tick = tokio::time::Instant::now() + TICK;
                self.tick()?;
            }
            stopped = stop.wait_for(|&stop| stop), if may_stop => {
                if stopped.is_ok() {
                    return Err(MigrateError::Stopped);
                }
                // Nobody can ask any more.
                self.may_stop = false;
            }
        }
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) fn take(&mut self, input: Input) -> Result<(), MigrateError> {
        match input {
            Input::Message(message) => Ok(self.session.handle_message(Instant::now(), message)?),
            Input::Ended(error) => Err(error.into()),
            Input::Freeze(moment) => {
                if let Moment::Ended { result } = &moment {
                    self.criu_end = Some(CriuEnd::of(result));
                }
                self.events.push_back(Event::Freeze(moment));
                Ok(())
            }
        }
    }

    pub(super) fn tick(&mut self) -> Result<(), MigrateError> {
        if self.clock.elapsed() >= self.clock_asked + CLOCK_EVERY {
            self.ask_clock();
        }
        let (Some(begun), Some(stream)) = (&self.iterating, &self.stream) else {
            return Ok(());
        };
        let number = begun.number;
        let scanned_bytes = begun.counted.scanned.load(Ordering::Relaxed);
        let busy = stream.written().busy().saturating_sub(begun.busy_before);
        let so_far = Iteration {
            number,
            begin: begun.begin,
            end: self.clock.elapsed(),
            scanned_bytes,
            scan_time: (self.clock.elapsed() - begun.begin).saturating_sub(busy),
            changed_bytes: begun.counted.changed.load(Ordering::Relaxed),
            wire_bytes: stream.written().bytes() - begun.bytes_before,
            send_time: busy,
        };
        match self.policy.progress(&so_far) {
            Decision::Again => {}
            // What was read so far is a whole iteration for the destination; `after` says the rest.
            Decision::Freeze(_) => stream.stop(true),
            Decision::GiveUp(why) => {
                stream.stop(true);
                return Err(MigrateError::GivenUp(why));
            }
        }
        let (sent, received) = self.connection.wire_bytes();
        self.emit(MigrateEvent::Progress {
            number,
            scanned_bytes,
            memory_bytes: self.survey.facts.tree.memory_bytes,
            wire_bytes: sent + received,
            prediction: self.policy.predict(),
        });
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) fn ask_clock(&mut self) {
        self.clock_asked = self.clock.elapsed();
        self.clock_questions += 1;
        self.session.ask_clock(Instant::now(), self.clock.now_ns());
    }
}

/// Writes messages in a task of its own: a peer that takes nothing must not hold up the freeze limit.
pub(super) async fn write_messages(
    mut control: ControlSender,
    mut messages: mpsc::UnboundedReceiver<Message>,
    input: mpsc::UnboundedSender<Input>,
) {
    while let Some(message) = messages.recv().await {
        if let Err(error) = control.write_message(&message.encode()).await {
            let _ = input.send(Input::Ended(error.into()));
            return;
        }
    }
}

pub(super) async fn read_messages(
    mut messages: ControlReceiver,
    input: mpsc::UnboundedSender<Input>,
) {
    loop {
        let next = match messages.read_message(limits::CONTROL_MESSAGE).await {
            Ok(Some(bytes)) => match Message::decode(&bytes) {
                Ok(message) => Input::Message(message),
                Err(error) => Input::Ended(SessionError::from(error).into()),
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
