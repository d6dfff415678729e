//! The destination's driver as long as it has its connection.

use super::super::super::MigrationDestinationCommand as AtDestination;
use super::{Book, Copy, Happening, Holder, Images, Job, Model, Mutation, Record, Side, offered};
use crate::handover::DestinationState;
use crate::wire::{Failure, FailureCode, Message, Step};

impl Model {
    pub(super) fn pump_destination(&mut self) {
        while let Some(command) = self.destination.poll_command() {
            match command {
                AtDestination::Send(message) => self.send(Side::Source, message),
                AtDestination::PrepareFinal(_) => {
                    self.work(Happening::DestinationWork(Job::Prepare));
                }
                AtDestination::Resume => {
                    if self.mutated(Mutation::LetsGoFirst) && self.copy == Copy::Held {
                        self.copy_runs();
                    }
                    self.takes_over(Side::Destination);
                    self.told(crate::handover::Verdict::Commit);
                }
                AtDestination::Remove { .. } => {
                    self.takes_over(Side::Destination);
                    self.told(crate::handover::Verdict::Abort);
                }
                AtDestination::Clock { asked_ns } => {
                    self.destination.tell_clock(self.now, asked_ns, 2);
                }
            }
        }
    }

    pub(super) fn at_destination(&mut self, message: Message) {
        self.commit_heard |= matches!(message, Message::Migration(Step::Commit));
        if self.destination.handle_message(self.now, message).is_err() {
            self.destination_fails(true);
        }
    }

    pub(super) fn record(&mut self, record: Record) {
        self.destination.heard(self.now);
        if self.destination_state() != Some(DestinationState::Receiving) {
            return;
        }
        match record {
            Record::Begin(number, is_final) => {
                self.images = Images::Partial;
                if self.destination.iteration_begun(number, is_final).is_err() {
                    self.destination_fails(true);
                }
            }
            Record::End(number, false) => self.destination.stored(self.now, number, 1, 1),
            Record::End(_, true) => {
                self.work(Happening::DestinationWork(Job::Sync));
                if self.prepared {
                    self.work(Happening::DestinationWork(Job::Restore));
                }
            }
        }
    }

    pub(super) fn destination_worked(&mut self, job: Job) {
        let now = self.now;
        let receives = self.destination_state() == Some(DestinationState::Receiving);
        match job {
            Job::Check => {
                let refused = self.conditions.refused;
                if !refused {
                    self.destination_book = Some(Book {
                        state: DestinationState::Receiving,
                        decided: None,
                    });
                    self.leases[Side::Destination as usize] = Some(Holder::Live);
                }
                self.destination.offered(now, offered(), refused);
            }
            Job::Prepare => {
                self.prepared = true;
                self.destination.final_ready(now);
            }
            // Cancelled when all was removed.
            Job::Sync if receives => {
                self.images = Images::Complete;
                self.vote();
            }
            Job::Restore if receives && self.copy == Copy::None => {
                self.copy = Copy::Held;
                self.vote();
            }
            Job::Sync | Job::Restore => {}
            Job::Vote => {
                self.destination.built(now);
            }
        }
    }

    fn vote(&mut self) {
        if self.images == Images::Complete && self.copy == Copy::Held {
            self.destination_records(DestinationState::Complete);
            self.work(Happening::DestinationWork(Job::Vote));
        }
    }

    pub(super) fn destination_ended(&mut self, well: bool) {
        if !self.destination.is_over() {
            return self.destination_fails(false);
        }
        self.session_over = true;
        self.leases[Side::Destination as usize] = None;
        if well && self.destination_state() == Some(DestinationState::Running) {
            self.destination_records(DestinationState::Over);
        }
    }

    // What is half done is removed; what is complete is held; what is ours goes on.
    pub(super) fn destination_fails(&mut self, tell: bool) {
        self.log(|| "the destination fails".into());
        if tell {
            let failure = Failure::new(FailureCode::Storage, "it failed");
            self.send(Side::Source, Message::Failure(failure));
        }
        self.session_over = true;
        self.close(Side::Destination, false);
        if self.destination_state().is_some() && self.workers[Side::Destination as usize].is_none()
        {
            self.takes_over(Side::Destination);
        }
    }

    // What a session waits for that a worker has done.
    pub(super) fn tell_session(&mut self) {
        if self.in_session(Side::Destination) {
            match self.destination_state() {
                Some(DestinationState::Running) => {
                    let now = self.now;
                    self.destination.running(now, 7, 8, Vec::new(), Vec::new());
                }
                Some(DestinationState::Removed) => self.destination.aborted(self.now),
                _ => {}
            }
        }
    }

    pub(super) fn copy_runs(&mut self) {
        self.copy = Copy::Running;
        if std::mem::replace(&mut self.has_run, true) {
            self.breaks("a copy that has run is built again");
        }
        if self.tree.ran_since && !self.operator {
            self.breaks("the copy is older than the tree");
        }
    }

    // CRIU has let it go.
    pub(super) fn let_go(&mut self) {
        if self.copy == Copy::LettingGo {
            self.copy_runs();
        }
    }
}
