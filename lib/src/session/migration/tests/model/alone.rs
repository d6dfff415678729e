//! Whoever takes care of a journal without the session: the driver in doubt or holding, the guard,
//! `recover`, a receiver that starts or is met. One step at a time, each found anew in the journal.

use std::time::Duration;

use super::{Book, Copy, Happening, Holder, Images, Model, Mutation, Side, Worker};
use crate::handover::{
    Answer, DestinationDuty, DestinationState, Keep, OnPartition, SourceDuty, SourceState, Verdict,
};

/// How often a guard or a `recover` asks, and a driver in doubt before the model lets it rest.
const TRIES: u32 = 3;
const LIVE_TRIES: u32 = 12;
/// After so many questions without an answer a policy decides.
const PARTITION_TRIES: u32 = 6;

impl Model {
    /// The driver goes on without its session.
    pub(super) fn takes_over(&mut self, side: Side) {
        self.begins(side, Holder::Live, Verdict::Ask, false);
    }

    pub(super) fn begins(&mut self, side: Side, holder: Holder, verdict: Verdict, answers: bool) {
        self.leases[side as usize] = Some(holder);
        self.workers[side as usize] = Some(Worker {
            holder,
            verdict,
            answers,
            asked: None,
            tries: 0,
            unreached: 0,
            idle: false,
        });
        self.work(Happening::Act(side));
    }

    /// Takes the lease if it is free and there is something that could be done.
    pub(super) fn takes_lease(&mut self, side: Side, holder: Holder) {
        let is_there = match side {
            Side::Source => self.source_book.is_some(),
            Side::Destination => self.destination_book.is_some(),
        };
        if is_there && self.leases[side as usize].is_none() {
            self.begins(side, holder, Verdict::Ask, false);
        }
    }

    pub(super) fn guard_acts(&mut self, side: Side) {
        if self.guards[side as usize] && self.crashed[side as usize] {
            self.takes_lease(side, Holder::Guard);
        }
    }

    pub(super) fn act(&mut self, side: Side) {
        let Some(worker) = self.workers[side as usize] else {
            return;
        };
        let of_process = matches!(worker.holder, Holder::Live | Holder::Met);
        if of_process && self.hanging[side as usize] {
            return;
        }
        match side {
            Side::Source => self.act_at_source(worker),
            Side::Destination => self.act_at_destination(worker),
        }
    }

    /// Something has changed that whoever waits looks at.
    pub(super) fn wakes(&mut self, side: Side) {
        if let Some(worker) = &mut self.workers[side as usize] {
            worker.tries = 0;
            worker.asked = None;
            worker.idle = false;
            let at = self.now + Duration::from_millis(200);
            self.add(at, Happening::Act(side));
        }
    }

    fn leaves(&mut self, side: Side) {
        let live = self.workers[side as usize].is_some_and(|it| it.holder == Holder::Live);
        let session = side == Side::Destination && live && !self.session_over;
        self.workers[side as usize] = None;
        if !session {
            self.leases[side as usize] = None;
        }
    }

    // ---- the source

    fn act_at_source(&mut self, mut worker: Worker) {
        let Some(Book { state, decided }) = self.source_book else {
            return self.leaves(Side::Source);
        };
        let duty = match state.duty(self.tree.there, decided) {
            SourceDuty::HoldAndTell if self.mutated(Mutation::ThawsCommitted) => {
                SourceDuty::KeepTree
            }
            duty => duty,
        };
        match duty {
            SourceDuty::KeepTree => self.keep_step(state),
            SourceDuty::HoldAndTell => return self.meet(&mut worker, Verdict::Commit),
            SourceDuty::EndTreeAndTell if state != SourceState::Committed => {
                self.source_records(SourceState::Committed);
            }
            SourceDuty::EndTreeAndTell if self.tree.there => self.end_tree(),
            SourceDuty::EndTreeAndTell => return self.meet(&mut worker, Verdict::Commit),
            SourceDuty::EndTree if self.tree.there => self.end_tree(),
            SourceDuty::EndTree => self.source_records(SourceState::Over),
            SourceDuty::TellAbort => return self.meet(&mut worker, Verdict::Abort),
            SourceDuty::AskOperator | SourceDuty::Nothing => return self.leaves(Side::Source),
        }
        self.work(Happening::Act(Side::Source));
    }

    fn keep_step(&mut self, state: SourceState) {
        if state != SourceState::Keeping {
            self.source_records(SourceState::Keeping);
        } else if self.source_criu {
            // Of a dead driver; it would not have come to its end.
            self.source_criu = false;
            self.tree.held = None;
            self.tree.whole = false;
        } else if !self.tree.whole {
            self.tree.whole = true;
        } else if self.tree.fenced {
            self.tree.fenced = false;
        } else {
            self.source_records(SourceState::Kept);
        }
    }

    fn meet(&mut self, worker: &mut Worker, verdict: Verdict) {
        if worker.asked.is_some_and(|until| self.now < until) || worker.idle {
            return;
        }
        let most = match worker.holder {
            Holder::Live => LIVE_TRIES,
            _ => TRIES,
        };
        worker.tries += 1;
        if worker.tries > most {
            worker.idle = true;
            self.workers[Side::Source as usize] = Some(*worker);
            // Only what holds a tree stays.
            if worker.holder != Holder::Live || verdict != Verdict::Commit {
                self.leaves(Side::Source);
            }
            return;
        }
        worker.unreached += 1;
        if worker.unreached == PARTITION_TRIES && verdict == Verdict::Commit {
            self.policy_decides();
        }
        let until = self.now + Duration::from_secs(1);
        worker.asked = Some(until);
        self.workers[Side::Source as usize] = Some(*worker);
        self.send_meet(verdict);
        self.add(until, Happening::Act(Side::Source));
    }

    fn policy_decides(&mut self) {
        let keep = match self.conditions.policy {
            OnPartition::Hold => return,
            OnPartition::KeepSource => Keep::Source,
            OnPartition::KeepDestination => Keep::Destination,
        };
        self.log(|| format!("the policy decides: {keep:?}"));
        let lost = self.images != Images::Complete && self.copy != Copy::Running;
        if keep == Keep::Destination && lost {
            // Its risk, as its help says: the destination may have lost what it had.
            self.excused = true;
        }
        if let Some(book) = &mut self.source_book {
            book.decided = Some(keep);
        }
    }

    /// The destination's answer has come, be it late.
    pub(super) fn answered(&mut self, answer: Answer) {
        if self.cut || !self.waits() {
            return;
        }
        let Some(Book { state, decided }) = self.source_book else {
            return;
        };
        if state.is_contradicted(answer) && self.obeys() {
            self.breaks("the hosts contradict each other");
        }
        // It is no partition where the destination answers.
        if let Some(worker) = &mut self.workers[Side::Source as usize] {
            worker.unreached = 0;
        }
        if let Some(next) = state.answered(answer, decided) {
            self.source_records(next);
            if let Some(worker) = &mut self.workers[Side::Source as usize] {
                worker.asked = None;
                worker.tries = 0;
            }
            self.work(Happening::Act(Side::Source));
        }
    }

    fn waits(&self) -> bool {
        let hangs = self.hanging[Side::Source as usize];
        self.workers[Side::Source as usize].is_some_and(|worker| {
            worker.asked.is_some() && !(hangs && worker.holder == Holder::Live)
        })
    }

    // ---- the destination

    /// A source is back, on a connection of its own.
    pub(super) fn met(&mut self, verdict: Verdict) {
        if self.cut || !self.lives(Side::Destination) {
            return;
        }
        let Some(state) = self.destination_state() else {
            return self.send_met(Answer::Unknown);
        };
        let side = Side::Destination as usize;
        match (self.leases[side], self.workers[side]) {
            (None, _) => self.begins(Side::Destination, Holder::Met, verdict, true),
            (Some(Holder::Live), Some(_)) => {
                self.told(verdict);
                if let Some(worker) = &mut self.workers[side] {
                    worker.answers = true;
                }
            }
            (Some(Holder::Live), None) => {
                let matters = match state {
                    DestinationState::Receiving => verdict == Verdict::Abort,
                    _ => verdict != Verdict::Ask,
                };
                if !matters {
                    return self.send_met(Answer::Busy);
                }
                // The session's connection is dead, as this one proves.
                self.session_over = true;
                self.begins(Side::Destination, Holder::Live, verdict, true);
            }
            _ => return self.send_met(Answer::Busy),
        }
        self.commit_heard |= verdict == Verdict::Commit;
    }

    /// The driver that holds is told by the source.
    pub(super) fn told(&mut self, verdict: Verdict) {
        if let Some(worker) = &mut self.workers[Side::Destination as usize] {
            worker.verdict = verdict;
            if worker.idle {
                worker.idle = false;
                self.work(Happening::Act(Side::Destination));
            }
        }
    }

    fn act_at_destination(&mut self, worker: Worker) {
        let Some(Book { state, decided }) = self.destination_book else {
            return self.leaves(Side::Destination);
        };
        if worker.idle {
            return;
        }
        let decided = match worker.verdict {
            Verdict::Commit if self.mutated(Mutation::CommitBeatsOperator) => None,
            _ => decided,
        };
        let answer = match state.duty(worker.verdict, decided) {
            DestinationDuty::GiveBack if !self.has_run && self.copy != Copy::LettingGo => {
                self.remove_step(state)
            }
            DestinationDuty::Resume | DestinationDuty::GiveBack => self.resume_step(state),
            DestinationDuty::Remove => self.remove_step(state),
            DestinationDuty::Hold if self.mutated(Mutation::RemovesOnLoss) => {
                self.remove_step(state)
            }
            // Of a driver that has it in hand still.
            DestinationDuty::Hold if self.copy == Copy::Held && worker.holder == Holder::Live => {
                Some(Answer::Holds)
            }
            DestinationDuty::Hold if self.copy != Copy::None => {
                self.copy = Copy::None;
                None
            }
            DestinationDuty::Hold => Some(Answer::Holds),
            DestinationDuty::Tell(answer) => Some(answer),
        };
        match answer {
            None => self.work(Happening::Act(Side::Destination)),
            Some(answer) => self.done(worker, answer),
        }
    }

    fn done(&mut self, worker: Worker, answer: Answer) {
        if answer == Answer::Busy && self.in_session(Side::Destination) {
            // What it was told in the session cannot be done.
            self.destination_fails(true);
        }
        if worker.answers {
            self.send_met(answer);
        }
        self.tell_session();
        if worker.holder == Holder::Live && answer == Answer::Holds {
            self.workers[Side::Destination as usize] = Some(Worker {
                answers: false,
                idle: true,
                ..worker
            });
        } else {
            self.leaves(Side::Destination);
        }
    }

    fn remove_step(&mut self, state: DestinationState) -> Option<Answer> {
        if state != DestinationState::Removing {
            self.destination_records(DestinationState::Removing);
        } else if self.copy != Copy::None {
            self.copy = Copy::None;
        } else if self.images != Images::None {
            self.images = Images::None;
        } else {
            self.destination_records(DestinationState::Removed);
        }
        None
    }

    fn resume_step(&mut self, state: DestinationState) -> Option<Answer> {
        if state == DestinationState::Complete {
            self.destination_records(DestinationState::Resuming);
        } else if self.has_run {
            self.destination_records(DestinationState::Running);
            self.images = Images::None;
        } else {
            match self.copy {
                Copy::Leftover => self.copy = Copy::None,
                Copy::None if !self.restores => return Some(Answer::Busy),
                Copy::None => self.copy = Copy::Held,
                Copy::Held => {
                    self.copy = Copy::LettingGo;
                    self.work(Happening::LetGo);
                }
                Copy::LettingGo | Copy::Running => {}
            }
        }
        None
    }
}
