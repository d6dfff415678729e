//! What goes wrong, and what it leaves.

use std::time::Duration;

use super::{BOTH, Book, Copy, Doing, Fault, Happening, Holder, Images, Model, Mutation, Side};
use crate::handover::{DestinationState, Keep, SourceState};

impl Model {
    pub(super) fn faults(&mut self) -> bool {
        if !self
            .conditions
            .faults
            .iter()
            .any(|(at, _)| *at <= self.moments)
        {
            return false;
        }
        let faults = std::mem::take(&mut self.conditions.faults);
        let (due, later) = faults.into_iter().partition(|(at, _)| *at <= self.moments);
        self.conditions.faults = later;
        let due: Vec<(usize, Fault)> = due;
        for (_, fault) in due {
            self.fault(fault);
            self.check();
        }
        true
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.log(|| format!("-- {fault:?}"));
        match fault {
            Fault::Deaf(side, learns) => {
                self.lose(side);
                self.deaf[side as usize] = true;
                if let Some(after) = learns {
                    self.add(self.now + after, Happening::Ended(side, false));
                }
            }
            Fault::Cut(heals) => self.cut_link(heals),
            Fault::Hang(side) => self.hanging[side as usize] = !self.crashed[side as usize],
            Fault::Stop if self.in_session(Side::Source) => self.stop(),
            Fault::Fail(Side::Source) if self.in_session(Side::Source) => self.give_up(),
            Fault::Fail(Side::Destination) if self.in_session(Side::Destination) => {
                self.destination_fails(true);
            }
            Fault::Crash(side) => self.crash(side),
            Fault::Criu(side, leaves) => self.kill_criu(side, leaves),
            Fault::Guard(side) => self.kill_guard(side),
            Fault::All(side) => {
                self.kill_guard(side);
                self.crash(side);
                self.kill_criu(side, true);
            }
            Fault::Reboot(side, durable) => self.reboot(side, durable),
            Fault::Recover(side) => self.takes_lease(side, Holder::Recover),
            Fault::NoRestore => self.restores = false,
            Fault::Serve => self.serve(),
            Fault::Decide(side, keep) => self.decide(side, keep),
            Fault::Stop | Fault::Fail(_) => {}
        }
    }

    fn stop(&mut self) {
        if !self.source_state().is_some_and(SourceState::is_given_away) {
            self.give_up();
        }
    }

    fn cut_link(&mut self, heals: Option<Duration>) {
        self.cut = true;
        for side in BOTH {
            self.lose(side);
            self.deaf[side as usize] = true;
            // QUIC's idle timeout.
            let after = Duration::from_millis(15_000 + self.rng.below(3000));
            self.add(self.now + after, Happening::Ended(side, false));
        }
        self.happenings
            .retain(|_, it| !matches!(it, Happening::Meet(_) | Happening::Met(_)));
        if let Some(after) = heals {
            self.add(self.now + after, Happening::Heal);
        }
    }

    // The guard hears of it by its pipe, CRIU by its socket, the other host by its idle timeout.
    pub(super) fn crash(&mut self, side: Side) {
        if self.crashed[side as usize] {
            return;
        }
        self.crashed[side as usize] = true;
        self.hanging[side as usize] = false;
        match side {
            Side::Source => self.doing = Doing::Over,
            Side::Destination => self.session_over = true,
        }
        self.drop_lease(side, &[Holder::Live, Holder::Met]);
        self.work(Happening::CriuLeft(side));
        self.work(Happening::Guard(side));
        let at = self.now + Duration::from_secs(self.rng.below(30));
        self.deaf[side.other() as usize] = true;
        self.add(at, Happening::Ended(side.other(), false));
    }

    fn drop_lease(&mut self, side: Side, holders: &[Holder]) {
        if self.leases[side as usize].is_some_and(|holder| holders.contains(&holder)) {
            self.leases[side as usize] = None;
            self.workers[side as usize] = None;
        }
    }

    fn kill_guard(&mut self, side: Side) {
        self.guards[side as usize] = false;
        self.drop_lease(side, &[Holder::Guard]);
    }

    // A tree that is held runs on, if no fence holds it; a copy that is held is removed, mostly.
    pub(super) fn criu_left(&mut self, side: Side) {
        match side {
            Side::Source if self.source_criu => {
                self.source_criu = false;
                self.tree.held = None;
            }
            Side::Destination if self.copy == Copy::Held && self.crashed[side as usize] => {
                self.copy = if self.rng.once_in(2) {
                    Copy::Leftover
                } else {
                    Copy::None
                };
            }
            _ => {}
        }
    }

    fn kill_criu(&mut self, side: Side, leaves: bool) {
        match side {
            Side::Source if self.source_criu => {
                self.source_criu = false;
                self.tree.held = None;
                self.tree.whole = false;
            }
            Side::Destination if self.copy == Copy::Held => {
                self.copy = if leaves { Copy::Leftover } else { Copy::None };
            }
            Side::Destination if self.copy == Copy::LettingGo && leaves => self.copy_runs(),
            Side::Destination if self.copy == Copy::LettingGo => self.copy = Copy::Leftover,
            _ => return,
        }
        self.work(Happening::CriuDied(side));
    }

    pub(super) fn criu_died(&mut self, side: Side) {
        if self.mutated(Mutation::DoesNotLook) {
            return;
        }
        match side {
            Side::Source => {
                let state = self.source_state();
                if matches!(state, Some(SourceState::Freezing | SourceState::Fencing))
                    && self.in_session(side)
                {
                    self.give_up();
                }
            }
            Side::Destination => {
                if self.destination_state() == Some(DestinationState::Receiving)
                    && self.in_session(side)
                {
                    self.destination_fails(true);
                }
            }
        }
    }

    fn reboot(&mut self, side: Side, durable: bool) {
        let complete = self.images == Images::Complete
            && matches!(
                self.destination_state(),
                Some(DestinationState::Complete | DestinationState::Resuming)
            );
        self.kill_guard(side);
        self.crash(side);
        self.drop_lease(side, &[Holder::Recover]);
        match side {
            Side::Source => {
                // What ran there dies as with any host; what was complete nowhere else, too.
                let moved = self.copy == Copy::Running;
                self.excused |= self.tree.there && !moved && (self.tree.runs() || !complete);
                self.end_tree();
                self.tree.held = None;
                if !durable {
                    self.source_book = None;
                }
            }
            Side::Destination => {
                self.excused |= self.copy == Copy::Running;
                self.excused |= !durable && !self.tree.there;
                self.copy = Copy::None;
                if !durable {
                    self.images = Images::None;
                    self.destination_book = None;
                }
            }
        }
    }

    // A new receiver looks at what it finds.
    pub(super) fn serve(&mut self) {
        if self.crashed[Side::Destination as usize] {
            self.crashed[Side::Destination as usize] = false;
            self.guards[Side::Destination as usize] = true;
            self.takes_lease(Side::Destination, Holder::Met);
        }
    }

    pub(super) fn decide(&mut self, side: Side, keep: Keep) {
        self.operator = true;
        // `recover` at the destination says whether it can still be kept from running.
        if keep == Keep::Source {
            let complete = self.destination_state() == Some(DestinationState::Complete);
            let rests = self.workers[Side::Destination as usize].is_none();
            let runs = self.copy == Copy::Running;
            match side {
                Side::Destination => self.may_keep_source = complete || (rests && !runs),
                Side::Source if !self.may_keep_source => return,
                Side::Source => {}
            }
        }
        let noted = match side {
            Side::Source => note(&mut self.source_book, keep),
            Side::Destination => note(&mut self.destination_book, keep),
        };
        if noted {
            self.wakes(side);
            self.takes_lease(side, Holder::Recover);
        }
    }
}

fn note<S>(book: &mut Option<Book<S>>, keep: Keep) -> bool {
    book.as_mut().is_some_and(|book| {
        book.decided = Some(keep);
        true
    })
}
