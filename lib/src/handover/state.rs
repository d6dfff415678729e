//! The decisions of a hand-over, as tables.
//!
//! The source decides: its record `committed` is the moment from which the workload is the
//! destination's. Before that record the destination may have a complete copy, but never runs it.
//! After it the source never runs its tree again, unless the destination has said that it removed its
//! copy, or an operator took that decision.

use serde::{Deserialize, Serialize};

pub use crate::wire::{Answer, Verdict};

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// Iterations are sent; the tree runs.
    Begun,
    /// CRIU may have frozen the tree.
    Freezing,
    /// The tree is being put behind the fence: CRIU's death no longer lets it run.
    Fencing,
    /// The workload is the destination's. It may or may not have heard so.
    Committed,
    /// The destination has said that the copy runs: the tree must end.
    Moved,
    /// The workload stays: the tree is made whole again and runs.
    Keeping,
    /// The tree runs; the destination may not know yet.
    Kept,
    /// Nothing is left to do.
    Over,
}

/// Where the destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationState {
    /// Images come, CRIU may be building a copy: nothing of it is promised.
    Receiving,
    /// All images are checked and stored; the vote may have been sent.
    Complete,
    /// The source has said that the workload is ours: the copy is let go.
    Resuming,
    /// The copy runs.
    Running,
    /// The workload stays at the source: copy and images are removed.
    Removing,
    /// Nothing is left of the copy.
    Removed,
    /// Nothing is left to do, nor to be asked.
    Over,
}

/// What an operator decides where nobody can know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The source's tree.
    Source,
    /// The destination's copy.
    Destination,
}

/// What a source does that has committed and cannot reach the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnPartition {
    /// Hold the tree frozen until the hosts meet or an operator decides. Never two, never none.
    #[default]
    Hold,
    /// Let the tree run again after a while. Two copies run where the destination has heard the
    /// commit.
    KeepSource,
    /// End the tree after a while. Nothing runs until the destination hears of it, where it has not
    /// heard the commit.
    KeepDestination,
}

/// What a source has to do that finds itself alone with its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceDuty {
    /// Record [`SourceState::Keeping`], make the tree whole, let it run, record
    /// [`SourceState::Kept`].
    KeepTree,
    /// Keep the tree behind its fence and tell the destination [`Verdict::Commit`] until it answers.
    HoldAndTell,
    /// End the tree now, and tell the destination [`Verdict::Commit`] until it answers.
    EndTreeAndTell,
    /// The tree is not there any more, and not by our hand: only an operator can say what was meant.
    AskOperator,
    /// End the tree, then record [`SourceState::Over`].
    EndTree,
    /// The tree runs here. Tell the destination [`Verdict::Abort`], then record
    /// [`SourceState::Over`].
    TellAbort,
    /// Nothing.
    Nothing,
}

/// What a destination has to do that finds itself alone with its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationDuty {
    /// Record [`DestinationState::Removing`], end what is left of the copy, remove the images,
    /// record [`DestinationState::Removed`].
    Remove,
    /// Keep images, and the copy as it is; the source or an operator will decide.
    Hold,
    /// Record [`DestinationState::Resuming`]; let the copy go, or build it from the images again and
    /// let it go; record [`DestinationState::Running`]. Where it can be seen that it has run, only
    /// the latter.
    Resume,
    /// Nothing; the answer to a source that asks.
    Tell(Answer),
}

impl SourceState {
    /// Whether `next` may be recorded after this state.
    pub fn may_become(self, next: Self) -> bool {
        use SourceState::{Begun, Committed, Fencing, Freezing, Keeping, Kept, Moved, Over};
        match next {
            Begun => false,
            Freezing => self == Begun,
            Fencing => self == Freezing,
            // From freezing where no tree is left that a fence could hold.
            Committed => matches!(self, Freezing | Fencing),
            Moved => self == Committed,
            Keeping => matches!(self, Begun | Freezing | Fencing | Committed),
            Kept => self == Keeping,
            Over => matches!(self, Moved | Kept),
        }
    }

    /// Whether that answer means that two copies run. Only a decision against the rule leads there.
    pub fn is_contradicted(self, answer: Answer) -> bool {
        matches!(self, Self::Keeping | Self::Kept) && matches!(answer, Answer::Runs { .. })
    }

    /// Whether the tree must not run: it is the destination's, or about to be.
    pub fn is_given_away(self) -> bool {
        matches!(self, Self::Committed | Self::Moved)
    }

    /// What to do. `has_tree`: the tree's processes are still there, frozen or not. `decided` is what
    /// an operator or the policy said.
    pub fn duty(self, has_tree: bool, decided: Option<Keep>) -> SourceDuty {
        match self {
            Self::Over => SourceDuty::Nothing,
            Self::Kept => SourceDuty::TellAbort,
            Self::Keeping => SourceDuty::KeepTree,
            Self::Moved => SourceDuty::EndTree,
            Self::Committed => match decided {
                Some(Keep::Source) if has_tree => SourceDuty::KeepTree,
                Some(Keep::Destination) => SourceDuty::EndTreeAndTell,
                _ => SourceDuty::HoldAndTell,
            },
            // A program may end while it runs.
            Self::Begun => SourceDuty::KeepTree,
            // Frozen programs do not end by themselves.
            Self::Freezing | Self::Fencing if !has_tree => match decided {
                Some(Keep::Source) => SourceDuty::KeepTree,
                Some(Keep::Destination) => SourceDuty::EndTreeAndTell,
                None => SourceDuty::AskOperator,
            },
            Self::Freezing | Self::Fencing => SourceDuty::KeepTree,
        }
    }

    /// What a source that has committed does when the destination has answered; `None`: ask again.
    pub fn answered(self, answer: Answer, decided: Option<Keep>) -> Option<Self> {
        match (self, answer) {
            (Self::Committed, Answer::Runs { .. }) => Some(Self::Moved),
            // An operator took it back there.
            (Self::Committed, Answer::Removed) => Some(Self::Keeping),
            // Its journal is lost: nobody knows whether a copy runs, unless somebody has looked.
            (Self::Committed, Answer::Unknown) if decided == Some(Keep::Source) => {
                Some(Self::Keeping)
            }
            (Self::Kept, Answer::Removed | Answer::Unknown) => Some(Self::Over),
            _ => None,
        }
    }
}

impl DestinationState {
    /// Whether `next` may be recorded after this state.
    pub fn may_become(self, next: Self) -> bool {
        use DestinationState::{Complete, Over, Receiving, Removed, Removing, Resuming, Running};
        match next {
            Receiving => false,
            Complete => self == Receiving,
            Resuming => self == Complete,
            Running => self == Resuming,
            Removing => matches!(self, Receiving | Complete),
            Removed => self == Removing,
            Over => matches!(self, Running | Removed),
        }
    }

    /// Whether a copy may run here.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Resuming | Self::Running)
    }

    /// What to do where the connection to the source, or the receiver itself, is gone. `verdict` is
    /// what the source said when it came back, `decided` what an operator said here.
    pub fn duty(self, verdict: Verdict, decided: Option<Keep>) -> DestinationDuty {
        match self {
            Self::Receiving | Self::Removing => DestinationDuty::Remove,
            Self::Complete => match (verdict, decided) {
                (Verdict::Commit, _) => DestinationDuty::Resume,
                (Verdict::Abort, _) => DestinationDuty::Remove,
                (Verdict::Ask, Some(Keep::Destination)) => DestinationDuty::Resume,
                (Verdict::Ask, Some(Keep::Source)) => DestinationDuty::Remove,
                (Verdict::Ask, None) => DestinationDuty::Hold,
            },
            Self::Resuming => DestinationDuty::Resume,
            Self::Running => DestinationDuty::Tell(Answer::Runs { pid: 0 }),
            Self::Removed | Self::Over => DestinationDuty::Tell(Answer::Removed),
        }
    }
}
