//! What must hold after every step, and how every history must end.

use std::time::Duration;

use super::{BOTH, BUSY, Copy, Holder, Images, Model, Runs, Side};
use crate::handover::{DestinationState, Keep, OnPartition, SourceState};

impl Model {
    pub(in crate::session::migration::tests) fn runs(&self) -> Runs {
        match (self.tree.runs(), self.copy == Copy::Running) {
            (true, true) => Runs::Both,
            (true, false) => Runs::Tree,
            (false, true) => Runs::Copy,
            (false, false) => Runs::Neither,
        }
    }

    /// Nobody has decided anything that could contradict the protocol.
    pub(super) fn obeys(&self) -> bool {
        !self.operator && self.conditions.policy != OnPartition::KeepSource
    }

    pub(super) fn check(&mut self) {
        let runs = self.runs();
        if self.tree.dumped && self.tree.runs() {
            self.tree.ran_since = true;
        }
        // What the policy's help says: only where the destination has heard the commit.
        let allowed = self.conditions.policy == OnPartition::KeepSource
            && self
                .source_book
                .is_some_and(|book| book.decided == Some(Keep::Source))
            && self.commit_heard;
        self.contradicts |= runs == Runs::Both && allowed;
        if runs == Runs::Both && !self.contradicts {
            self.breaks("two run");
        }
        if runs == Runs::Neither && !self.excused && !self.is_somewhere() {
            self.breaks("none runs, and nothing says where it is");
        }
        self.check_freeze();
    }

    // Both journals together lead to a complete tree or a complete copy.
    fn is_somewhere(&self) -> bool {
        let in_tree = self.tree.there
            && self
                .source_state()
                .is_some_and(|state| state != SourceState::Over);
        let in_images = self.images == Images::Complete
            && matches!(
                self.destination_state(),
                Some(DestinationState::Complete | DestinationState::Resuming)
            );
        in_tree || in_images
    }

    fn check_freeze(&mut self) {
        if let Some(at) = self.tree.held
            && self.in_session(Side::Source)
            && !self.source_state().is_some_and(SourceState::is_given_away)
        {
            let limit = at + self.conditions.freeze_limit + BUSY;
            if self.now > limit {
                self.breaks("frozen beyond the limit");
            }
        }
    }

    /// All faults are over: everything must come to its end by `recover`, and where a host has
    /// forgotten all it knew by an operator's word. True where that was needed.
    pub(in crate::session::migration::tests) fn finish(&mut self) -> Result<bool, String> {
        self.conditions.unreliable = 0;
        self.conditions.most_delay = Duration::from_millis(20);
        self.conditions.faults.clear();
        for side in BOTH {
            if self.hanging[side as usize] {
                self.crash(side);
            }
        }
        self.cut = false;
        self.settle()?;
        self.serve();
        self.recover()?;
        if !self.is_finished() && !self.advise()? {
            self.breaks("recover does not end it");
            self.settle()?;
        }
        let asked = self.operator;
        self.check_end();
        self.settle()?;
        Ok(asked)
    }

    fn recover(&mut self) -> Result<(), String> {
        for _ in 0..3 {
            for side in BOTH {
                self.wakes(side);
                self.takes_lease(side, Holder::Recover);
                self.settle()?;
            }
        }
        Ok(())
    }

    // What `recover` shows on both hosts tells an operator what to say; at the destination first.
    fn advise(&mut self) -> Result<bool, String> {
        let keep = if self.copy == Copy::Running {
            Keep::Destination
        } else if self.tree.there || self.images != Images::Complete {
            Keep::Source
        } else {
            Keep::Destination
        };
        for side in [Side::Destination, Side::Source] {
            self.decide(side, keep);
            self.settle()?;
        }
        self.recover()?;
        Ok(self.is_finished())
    }

    fn is_finished(&self) -> bool {
        let source = matches!(self.source_state(), None | Some(SourceState::Over));
        let destination = matches!(
            self.destination_state(),
            None | Some(
                DestinationState::Running | DestinationState::Removed | DestinationState::Over
            )
        );
        source && destination
    }

    fn check_end(&mut self) {
        match self.runs() {
            Runs::Neither if !self.excused => self.breaks("nothing runs in the end"),
            Runs::Both => self.breaks("two run in the end"),
            _ => {}
        }
        if self.tree.there && !(self.tree.runs() && self.tree.whole) {
            self.breaks("the tree is not whole in the end");
        }
        if self.copy != Copy::None && self.copy != Copy::Running {
            self.breaks("a process of a copy is left");
        }
        if self.images != Images::None {
            self.breaks("images are left");
        }
        if self
            .leases
            .iter()
            .any(|it| matches!(it, Some(Holder::Guard | Holder::Recover)))
        {
            self.breaks("a lease is held in the end");
        }
    }

    /// An operator decides on both sides, as the hosts say what is there, with the link still cut. The
    /// destination first.
    pub(in crate::session::migration::tests) fn operator_decides(
        &mut self,
        keep: Keep,
    ) -> Result<(), String> {
        for side in [Side::Destination, Side::Source] {
            self.decide(side, keep);
            self.settle()?;
        }
        Ok(())
    }

    /// Whether both sides hold, and an operator may say what is to be.
    pub(in crate::session::migration::tests) fn both_hold(&self) -> bool {
        self.source_state() == Some(SourceState::Committed)
            && self.destination_state() == Some(DestinationState::Complete)
            && self.tree.there
    }

    /// What the destination has heard.
    pub(in crate::session::migration::tests) fn heard_commit(&self) -> bool {
        self.commit_heard
    }
}
