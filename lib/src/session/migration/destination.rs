//! The destination's side of a hand-over.

use std::collections::VecDeque;
use std::time::Instant;

use super::super::{Liveness, SessionError};
use super::Owner;
use crate::wire::{Message, Offered, Phase, Step, limits};

/// What the destination's driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MigrationDestinationCommand {
    /// Put this message on the control stream.
    Send(Message),
    /// Start CRIU, run the hooks, make the directory for this iteration, then say
    /// [`MigrationDestination::final_ready`].
    PrepareFinal(u32),
    /// Let the copy go, then say [`MigrationDestination::running`].
    Resume,
    /// The source keeps the workload: remove everything, then say
    /// [`MigrationDestination::aborted`].
    Remove {
        /// Why, in the source's words.
        reason: String,
    },
    /// Answer with [`MigrationDestination::tell_clock`].
    Clock {
        /// Of the question.
        asked_ns: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    // The offer is being looked at.
    Offered,
    Receiving,
    Preparing,
    // Everything up to the vote: the final iteration arrives, is checked, CRIU builds the copy.
    Building,
    Voted,
    Resuming,
    Done,
    Removing,
    Removed,
}

/// State machine of the host that a workload comes to. It begins with the source's offer.
#[derive(Debug)]
pub struct MigrationDestination {
    state: State,
    iterations: u32,
    commands: VecDeque<MigrationDestinationCommand>,
    liveness: Liveness,
}

impl MigrationDestination {
    /// The offer has arrived.
    pub fn new(now: Instant) -> Self {
        Self {
            state: State::Offered,
            iterations: 0,
            commands: VecDeque::new(),
            liveness: Liveness::new(now),
        }
    }

    /// What the driver has to do next.
    pub fn poll_command(&mut self) -> Option<MigrationDestinationCommand> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        self.liveness.next()
    }

    /// Whose the workload is, for whatever ends the session early. Without the source's word the
    /// copy must not run.
    pub fn owner(&self) -> Owner {
        match self.state {
            State::Resuming | State::Done => Owner::Destination,
            _ => Owner::Source,
        }
    }

    /// Whether the source may leave now.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Done | State::Removed)
    }

    /// The time that `poll_timeout` named has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.liveness.check(now)? {
            self.push(Message::Working);
        }
        Ok(())
    }

    /// Bytes arrived on the bulk stream.
    pub fn heard(&mut self, now: Instant) {
        self.liveness.heard = now;
    }

    /// A control message arrived.
    pub fn handle_message(&mut self, now: Instant, message: Message) -> Result<(), SessionError> {
        use MigrationDestinationCommand as Command;
        self.liveness.heard = now;
        let step = match message {
            Message::Failure(failure) => return Err(SessionError::Peer(failure)),
            Message::Working => return Ok(()),
            Message::Migration(step) => step,
            _ => return Err(SessionError::Protocol("a message out of order")),
        };
        let (next, command) = match (self.state, step) {
            (state, Step::ClockAsk { asked_ns }) => (state, Command::Clock { asked_ns }),
            (State::Receiving, Step::PrepareFinal(number)) if number == self.iterations + 1 => {
                (State::Preparing, Command::PrepareFinal(number))
            }
            (State::Voted, Step::Commit) => (State::Resuming, Command::Resume),
            (
                State::Offered
                | State::Receiving
                | State::Preparing
                | State::Building
                | State::Voted,
                Step::Abort(reason),
            ) => (State::Removing, Command::Remove { reason }),
            // The source takes its offer back, which was refused: nothing is here.
            (State::Removed, Step::Abort(_)) => {
                self.say(now, Step::Aborted);
                return Ok(());
            }
            _ => return Err(SessionError::Protocol("a message out of order")),
        };
        self.state = next;
        self.commands.push_back(command);
        Ok(())
    }

    /// The offer was looked at. With `refused` nothing may follow but the end.
    pub fn offered(&mut self, now: Instant, offered: Offered, refused: bool) {
        if self.state == State::Offered {
            self.state = if refused {
                State::Removed
            } else {
                State::Receiving
            };
            self.say(now, Step::Offered(offered));
        }
    }

    /// An iteration begins on the stream.
    pub fn iteration_begun(&mut self, number: u32, is_final: bool) -> Result<(), SessionError> {
        let expected = if is_final {
            State::Building
        } else {
            State::Receiving
        };
        if matches!(self.state, State::Removing | State::Removed) {
            return Ok(());
        }
        if self.state != expected || number != self.iterations + 1 || number > limits::ITERATIONS {
            return Err(SessionError::Protocol("an iteration out of order"));
        }
        self.iterations = number;
        Ok(())
    }

    /// The iteration is stored.
    pub fn stored(&mut self, now: Instant, number: u32, stored_bytes: u64, work_ns: u64) {
        if self.state == State::Receiving {
            self.say(
                now,
                Step::IterationDone {
                    number,
                    stored_bytes,
                    work_ns,
                },
            );
        }
    }

    /// Everything is ready for the final iteration.
    pub fn final_ready(&mut self, now: Instant) {
        if self.state == State::Preparing {
            self.state = State::Building;
            self.say(now, Step::FinalReady);
        }
    }

    /// The copy is built, complete and stored. False where the source has given up meanwhile.
    pub fn built(&mut self, now: Instant) -> bool {
        let is_wanted = self.state == State::Building;
        if is_wanted {
            self.state = State::Voted;
            self.say(now, Step::Built);
        }
        is_wanted
    }

    /// The copy runs.
    pub fn running(
        &mut self,
        now: Instant,
        pid: u32,
        resumed_ns: u64,
        phases: Vec<Phase>,
        notes: Vec<String>,
    ) {
        if self.state == State::Resuming {
            self.state = State::Done;
            self.say(
                now,
                Step::Running {
                    pid,
                    resumed_ns,
                    phases,
                    notes,
                },
            );
        }
    }

    /// Nothing is left of what came.
    pub fn aborted(&mut self, now: Instant) {
        if self.state == State::Removing {
            self.state = State::Removed;
            self.say(now, Step::Aborted);
        }
    }

    /// The answer to [`MigrationDestinationCommand::Clock`].
    pub fn tell_clock(&mut self, now: Instant, asked_ns: u64, here_ns: u64) {
        self.say(now, Step::ClockTell { asked_ns, here_ns });
    }

    fn say(&mut self, now: Instant, step: Step) {
        self.liveness.said = now;
        self.push(Message::Migration(step));
    }

    fn push(&mut self, message: Message) {
        self.commands
            .push_back(MigrationDestinationCommand::Send(message));
    }
}
