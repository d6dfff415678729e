//! The source's side of a hand-over.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::super::{Liveness, SessionError, SourceConfig};
use super::Owner;
use crate::wire::{Hello, MIGRATION_VERSION, Message, Offer, Offered, Phase, Step, Welcome};

/// What the source's driver has to do, or may do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationSourceCommand {
    /// Put this message on the control stream.
    Send(Message),
    /// The destination answered the offer. Go on with [`MigrationSource::begin_iteration`],
    /// [`MigrationSource::prepare_final`] or [`MigrationSource::abort`].
    Offered(Offered),
    /// The destination has stored the iteration.
    Stored {
        /// Which.
        number: u32,
        /// Bytes written for it.
        stored_bytes: u64,
        /// How long it worked on it.
        work: Duration,
    },
    /// The destination is ready: freeze, and say so with [`MigrationSource::frozen`].
    Freeze,
    /// The copy is built: record that, and say [`MigrationSource::commit`].
    Built,
    /// The copy runs: end the frozen tree.
    Running {
        /// Root process at the destination.
        pid: u32,
        /// When it was let go, in nanoseconds of the destination's clock.
        resumed_ns: u64,
        /// What took the destination how long.
        phases: Vec<Phase>,
        /// What the operator should know.
        notes: Vec<String>,
    },
    /// After [`MigrationSource::abort`]: the destination has removed everything.
    Aborted,
    /// The destination's clock, for [`ClockSamples`](super::ClockSamples).
    Clock {
        /// When it was asked.
        asked_ns: u64,
        /// What it showed.
        here_ns: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitWelcome,
    AwaitOffered,
    // Between iterations.
    Idle,
    Iterating,
    AwaitStored,
    AwaitReady,
    // The destination is ready, the tree not frozen yet.
    Ready,
    Frozen,
    AwaitBuilt,
    Built,
    Committed,
    Done,
    Aborting,
    Aborted,
}

/// State machine of the host that a workload leaves.
#[derive(Debug)]
pub struct MigrationSource {
    config: SourceConfig,
    offer: Option<Offer>,
    state: State,
    iteration: u32,
    freeze_limit: Duration,
    frozen_until: Option<Instant>,
    commands: VecDeque<MigrationSourceCommand>,
    liveness: Liveness,
}

impl MigrationSource {
    /// Offers a tree. Between the freeze and the commit at most `freeze_limit` passes: then
    /// [`MigrationSource::handle_timeout`] fails, and the tree must be resumed.
    pub fn new(config: SourceConfig, offer: Offer, freeze_limit: Duration, now: Instant) -> Self {
        let hello = Hello {
            versions: (MIGRATION_VERSION, MIGRATION_VERSION),
            software: config.software.clone(),
            ticket_proof: config.ticket_proof,
        };
        Self {
            config,
            offer: Some(offer),
            state: State::AwaitWelcome,
            iteration: 0,
            freeze_limit,
            frozen_until: None,
            commands: VecDeque::from([MigrationSourceCommand::Send(Message::Hello(hello))]),
            liveness: Liveness::new(now),
        }
    }

    /// What the driver has to do next.
    pub fn poll_command(&mut self) -> Option<MigrationSourceCommand> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        let next = self.liveness.next();
        self.frozen_until.map_or(next, |until| until.min(next))
    }

    /// Whose the workload is, for whatever ends the session early.
    pub fn owner(&self) -> Owner {
        match self.state {
            State::Committed => Owner::InDoubt,
            State::Done => Owner::Destination,
            _ => Owner::Source,
        }
    }

    /// The time that `poll_timeout` named has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.is_frozen_too_long(now) {
            return Err(SessionError::FreezeLimit(self.freeze_limit));
        }
        if self.liveness.check(now)? {
            self.push(Message::Working);
        }
        Ok(())
    }

    /// A control message arrived.
    pub fn handle_message(&mut self, now: Instant, message: Message) -> Result<(), SessionError> {
        self.liveness.heard = now;
        match (self.state, message) {
            (_, Message::Failure(failure)) => Err(SessionError::Peer(failure)),
            (_, Message::Working) => Ok(()),
            (State::AwaitWelcome, Message::Welcome(welcome)) => self.welcomed(now, &welcome),
            (State::AwaitWelcome, _) => Err(SessionError::Protocol("a message out of order")),
            (state, Message::Migration(step)) => self.step(state, step),
            _ => Err(SessionError::Protocol("a message out of order")),
        }
    }

    fn step(&mut self, state: State, step: Step) -> Result<(), SessionError> {
        use MigrationSourceCommand as Command;
        let (next, command) = match (state, step) {
            (state, Step::ClockTell { asked_ns, here_ns }) => {
                (state, Command::Clock { asked_ns, here_ns })
            }
            (State::AwaitOffered, Step::Offered(offered)) => {
                (State::Idle, Command::Offered(offered))
            }
            // The destination may be done before the driver has said that the stream is.
            (
                State::Iterating | State::AwaitStored,
                Step::IterationDone {
                    number,
                    stored_bytes,
                    work_ns,
                },
            ) if number == self.iteration => {
                let work = Duration::from_nanos(work_ns);
                let stored = Command::Stored {
                    number,
                    stored_bytes,
                    work,
                };
                (State::Idle, stored)
            }
            (State::AwaitReady, Step::FinalReady) => (State::Ready, Command::Freeze),
            (State::Frozen | State::AwaitBuilt, Step::Built) => (State::Built, Command::Built),
            (
                State::Committed,
                Step::Running {
                    pid,
                    resumed_ns,
                    phases,
                    notes,
                },
            ) => {
                let running = Command::Running {
                    pid,
                    resumed_ns,
                    phases,
                    notes,
                };
                (State::Done, running)
            }
            (State::Aborting, Step::Aborted) => (State::Aborted, Command::Aborted),
            // Was on its way when this side gave up.
            (
                State::Aborting,
                Step::Offered(_) | Step::IterationDone { .. } | Step::FinalReady | Step::Built,
            ) => return Ok(()),
            _ => return Err(SessionError::Protocol("a message out of order")),
        };
        self.state = next;
        self.commands.push_back(command);
        Ok(())
    }

    fn welcomed(&mut self, now: Instant, welcome: &Welcome) -> Result<(), SessionError> {
        if welcome.version != MIGRATION_VERSION {
            return Err(SessionError::Version {
                ours: format!("{MIGRATION_VERSION}"),
                theirs: welcome.version.to_string(),
            });
        }
        if self.config.expected_proof.is_some()
            && welcome.ticket_proof != self.config.expected_proof
        {
            return Err(SessionError::Ticket);
        }
        let offer = self.offer.take().expect("offered once, after the welcome");
        self.state = State::AwaitOffered;
        self.say(now, Step::Offer(Box::new(offer)));
        Ok(())
    }

    /// The number of the iteration that was begun last, the final one included.
    pub fn iteration(&self) -> u32 {
        self.iteration
    }

    /// The next iteration is put on the stream now; gives its number.
    ///
    /// # Panics
    /// If another iteration is under way, or the offer is not answered.
    pub fn begin_iteration(&mut self) -> u32 {
        assert_eq!(self.state, State::Idle, "one iteration after the other");
        self.iteration += 1;
        self.state = State::Iterating;
        self.iteration
    }

    /// All of the iteration is on the stream.
    pub fn end_iteration(&mut self) {
        if self.state == State::Iterating {
            self.state = State::AwaitStored;
        }
    }

    /// The next iteration will be the final one; gives its number.
    ///
    /// # Panics
    /// If an iteration is under way.
    pub fn prepare_final(&mut self, now: Instant) -> u32 {
        assert_eq!(self.state, State::Idle, "one iteration after the other");
        self.iteration += 1;
        self.state = State::AwaitReady;
        self.say(now, Step::PrepareFinal(self.iteration));
        self.iteration
    }

    /// The tree is about to be frozen: from now on the freeze limit counts.
    pub fn frozen(&mut self, now: Instant) {
        if self.state == State::Ready {
            self.state = State::Frozen;
            self.frozen_until = Some(now + self.freeze_limit);
        }
    }

    /// All of the final iteration is on the stream.
    pub fn end_final(&mut self) {
        if self.state == State::Frozen {
            self.state = State::AwaitBuilt;
        }
    }

    /// Whether [`commit`](Self::commit) would be said now: not where the session was given up, or the
    /// freeze limit has passed. Ask before the commit is recorded.
    pub fn may_commit(&self, now: Instant) -> bool {
        self.state == State::Built && !self.is_frozen_too_long(now)
    }

    /// The destination may let its copy go. The source's tree must stay frozen from now on until
    /// [`MigrationSourceCommand::Running`].
    ///
    /// False where it is too late for that: the session was given up, or the freeze limit has passed,
    /// be it that nobody has noticed yet.
    #[must_use]
    pub fn commit(&mut self, now: Instant) -> bool {
        if !self.may_commit(now) {
            return false;
        }
        self.state = State::Committed;
        self.frozen_until = None;
        self.say(now, Step::Commit);
        true
    }

    /// The destination has given up: it says when nothing is left there. False where there is nothing
    /// to wait for.
    pub fn given_up(&mut self) -> bool {
        self.frozen_until = None;
        let waits = !matches!(
            self.state,
            State::AwaitWelcome
                | State::AwaitOffered
                | State::Committed
                | State::Done
                | State::Aborted
        );
        if waits {
            self.state = State::Aborting;
        }
        waits
    }

    /// The workload stays here: tells the destination to remove what came. False where it is too
    /// late, because the commit was sent, or where there is nobody to tell.
    pub fn abort(&mut self, now: Instant, reason: &str) -> bool {
        self.frozen_until = None;
        match self.state {
            State::Committed | State::Done | State::Aborting | State::Aborted => false,
            State::AwaitWelcome => {
                self.state = State::Aborted;
                false
            }
            _ => {
                self.state = State::Aborting;
                let reason = reason.replace(char::is_control, " ");
                self.say(now, Step::Abort(reason));
                true
            }
        }
    }

    fn is_frozen_too_long(&self, now: Instant) -> bool {
        self.frozen_until.is_some_and(|until| now >= until)
    }

    /// Asks the destination for the time.
    pub fn ask_clock(&mut self, now: Instant, asked_ns: u64) {
        if !matches!(
            self.state,
            State::AwaitWelcome | State::Done | State::Aborted
        ) {
            self.say(now, Step::ClockAsk { asked_ns });
        }
    }

    fn say(&mut self, now: Instant, step: Step) {
        self.liveness.said = now;
        self.push(Message::Migration(step));
    }

    fn push(&mut self, message: Message) {
        self.commands
            .push_back(MigrationSourceCommand::Send(message));
    }
}
