//! The source's driver, from the offer until it ends or is in doubt.

use super::{ABORT_TIME, AtSource, Doing, Happening, Model, Mutation, Record, Side};
use crate::handover::SourceState;

impl Model {
    pub(super) fn pump_source(&mut self) {
        loop {
            // The commit goes out when it is recorded.
            while self.doing != Doing::Committing
                && let Some(command) = self.source.poll_command()
            {
                match command {
                    AtSource::Send(message) => self.send(Side::Destination, message),
                    AtSource::Clock { .. } => {}
                    other => self.events.push_back(other),
                }
            }
            let doing = self.doing;
            let wanted = |event: &AtSource| {
                matches!(
                    (doing, event),
                    (Doing::Offering, AtSource::Offered(_))
                        | (Doing::AwaitStored, AtSource::Stored { .. })
                        | (Doing::AwaitReady, AtSource::Freeze)
                        | (Doing::AwaitBuilt, AtSource::Built)
                        | (Doing::AwaitRunning, AtSource::Running { .. })
                        | (Doing::AwaitAborted(_), AtSource::Aborted)
                )
            };
            let Some(at) = self.events.iter().position(wanted) else {
                return;
            };
            let event = self.events.remove(at).expect("found there");
            self.on_event(event);
        }
    }

    pub(super) fn at_source(&mut self, message: crate::wire::Message) {
        if self.source.handle_message(self.now, message).is_err() {
            self.give_up();
        }
    }

    fn on_event(&mut self, event: AtSource) {
        match event {
            AtSource::Offered(_) if self.conditions.refused => self.give_up(),
            AtSource::Offered(_) | AtSource::Stored { .. } => self.iterate_or_freeze(),
            AtSource::Freeze => {
                self.source_records(SourceState::Freezing);
                self.do_now(Doing::Freezing);
            }
            AtSource::Built if self.tree.fenced || self.mutated(Mutation::NoFence) => {
                self.do_now(Doing::Hook);
            }
            AtSource::Built => self.doing = Doing::AwaitFence,
            AtSource::Running { .. } => {
                self.source_records(SourceState::Moved);
                self.do_now(Doing::Ending);
            }
            AtSource::Aborted => {
                self.source_records(SourceState::Over);
                self.source_over();
            }
            AtSource::Send(_) | AtSource::Clock { .. } => unreachable!("not waited for"),
        }
    }

    fn iterate_or_freeze(&mut self) {
        if self.iterated == self.conditions.iterations {
            self.source.prepare_final(self.now);
            self.doing = Doing::AwaitReady;
            return;
        }
        self.iterated += 1;
        let number = self.source.begin_iteration();
        self.put(Record::Begin(number, false));
        self.do_now(Doing::Scanning);
    }

    // What the source did is done.
    pub(super) fn worked(&mut self) {
        let number = self.source.iteration();
        match self.doing {
            Doing::Scanning => {
                self.put(Record::End(number, false));
                self.source.end_iteration();
                self.doing = Doing::AwaitStored;
            }
            Doing::Freezing => {
                self.source.frozen(self.now);
                self.source_criu = true;
                self.tree.held = Some(self.now);
                self.put(Record::Begin(number, true));
                self.do_now(Doing::Dumping);
            }
            Doing::Dumping => {
                self.tree.dumped = true;
                self.source_records(SourceState::Fencing);
                self.work(Happening::Fence);
                self.do_now(Doing::Sending);
            }
            Doing::Sending => {
                self.put(Record::End(number, true));
                self.source.end_final();
                self.doing = Doing::AwaitBuilt;
            }
            Doing::Hook => self.commit(),
            Doing::Committing => {
                if self.mutated(Mutation::SendsFirst) {
                    self.source_records(SourceState::Committed);
                }
                self.doing = Doing::AwaitRunning;
            }
            Doing::Ending => {
                self.end_tree();
                self.do_now(Doing::Closing);
            }
            Doing::Closing => {
                self.source_records(SourceState::Over);
                self.source_over();
            }
            Doing::Keeping => self.keep(),
            Doing::Telling => {
                if self.source.abort(self.now, "it failed") {
                    self.doing = Doing::AwaitAborted(self.now + ABORT_TIME);
                } else {
                    self.source_over();
                }
            }
            _ => unreachable!("no work"),
        }
    }

    // The machine first: it knows the freeze limit. Its message waits for the record.
    fn commit(&mut self) {
        if !self.source.commit(self.now) {
            return self.give_up();
        }
        let limit = self.conditions.freeze_limit;
        if self.tree.held.is_some_and(|at| self.now >= at + limit) {
            self.breaks("a commit beyond the freeze limit");
        }
        if self.mutated(Mutation::SendsFirst) {
            self.doing = Doing::AwaitRunning;
            self.pump_source();
        } else {
            self.source_records(SourceState::Committed);
        }
        self.do_now(Doing::Committing);
    }

    pub(super) fn close_fence(&mut self) {
        if self.source_state() != Some(SourceState::Fencing) || self.mutated(Mutation::NoFence) {
            return;
        }
        self.tree.fenced = true;
        // If CRIU died before, the tree has run for a moment, and the images are not what it is now.
        if !self.source_criu && !self.mutated(Mutation::DoesNotLook) {
            return self.give_up();
        }
        if self.doing == Doing::AwaitFence {
            self.do_now(Doing::Hook);
        }
    }

    pub(super) fn end_tree(&mut self) {
        self.tree.there = false;
        self.tree.fenced = false;
        self.source_criu = false;
    }

    // CRIU is told to go, what it left is undone, the fence is opened; then that is recorded.
    fn keep(&mut self) {
        if self.tree.runs() && self.tree.whole {
            self.source_records(SourceState::Kept);
            return self.do_now(Doing::Telling);
        }
        self.source_criu = false;
        self.tree.held = None;
        self.tree.whole = true;
        self.tree.fenced = false;
        self.do_now(Doing::Keeping);
    }

    fn do_now(&mut self, doing: Doing) {
        self.doing = doing;
        self.work(Happening::SourceWork(doing));
    }

    // As in the driver's `ending`.
    pub(super) fn give_up(&mut self) {
        match self.doing {
            Doing::AwaitAborted(_) => return self.source_over(),
            Doing::Ending | Doing::Closing | Doing::Keeping | Doing::Telling => return,
            _ => {}
        }
        self.log(|| "the source gives up".into());
        if self.source_state() == Some(SourceState::Committed) {
            self.doing = Doing::Over;
            self.close(Side::Source, false);
            return self.takes_over(Side::Source);
        }
        self.source_records(SourceState::Keeping);
        self.doing = Doing::Keeping;
        // Whatever else is slow, this is not.
        let at = self.now + std::time::Duration::from_millis(1);
        self.add(at, Happening::SourceWork(Doing::Keeping));
    }

    pub(super) fn source_over(&mut self) {
        self.doing = Doing::Over;
        self.leases[Side::Source as usize] = None;
        let well = self.source_state() == Some(SourceState::Over);
        self.close(Side::Source, well);
    }
}
