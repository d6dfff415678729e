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
///
/// [`Keep::Source`] must be said at the destination first: once it has recorded
/// [`DestinationState::Removing`], no commit that is still on its way can bring the copy to life.
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
    /// Record [`DestinationState::Removing`], end what is left of the copy (from
    /// [`DestinationState::Running`] also one that runs), remove the images, record
    /// [`DestinationState::Removed`].
    Remove,
    /// Keep images, and the copy as it is; the source or an operator will decide.
    Hold,
    /// Record [`DestinationState::Resuming`]; let the copy go, or build it from the images again and
    /// let it go; record [`DestinationState::Running`]. Where it can be seen that it has run, only
    /// the latter.
    Resume,
    /// The operator wants the source's tree, and the copy could not be brought to life: as
    /// [`Remove`](Self::Remove), but as [`Resume`](Self::Resume) where it can be seen that the copy
    /// has run.
    GiveBack,
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
            // From freezing and keeping only where no tree is left that a fence could hold.
            Committed => matches!(self, Freezing | Fencing | Keeping),
            // From kept only where two run, and the operator wants the copy.
            Moved => matches!(self, Committed | Kept),
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
            Self::Moved => SourceDuty::EndTree,
            Self::Committed => match decided {
                Some(Keep::Source) if has_tree => SourceDuty::KeepTree,
                Some(Keep::Destination) => SourceDuty::EndTreeAndTell,
                _ => SourceDuty::HoldAndTell,
            },
            // A program may end while it runs.
            Self::Begun => SourceDuty::KeepTree,
            // Frozen programs do not end by themselves. While keeping, it may have been frozen still:
            // then the images of the destination are all that is left, and must not be removed.
            Self::Freezing | Self::Fencing | Self::Keeping if !has_tree => match decided {
                Some(Keep::Source) => SourceDuty::KeepTree,
                Some(Keep::Destination) => SourceDuty::EndTreeAndTell,
                None => SourceDuty::AskOperator,
            },
            Self::Freezing | Self::Fencing | Self::Keeping => SourceDuty::KeepTree,
        }
    }

    /// What follows for a source when the destination has answered; `None`: ask again.
    pub fn answered(self, answer: Answer, decided: Option<Keep>) -> Option<Self> {
        match (self, answer) {
            (Self::Committed, Answer::Runs { .. }) => Some(Self::Moved),
            // An operator took it back there.
            (Self::Committed, Answer::Removed) => Some(Self::Keeping),
            // Its journal is lost: nobody knows whether a copy runs, unless somebody has looked.
            (Self::Committed, Answer::Unknown) if decided == Some(Keep::Source) => {
                Some(Self::Keeping)
            }
            (Self::Committed, Answer::Unknown) if decided == Some(Keep::Destination) => {
                Some(Self::Moved)
            }
            (Self::Kept, Answer::Removed | Answer::Unknown) => Some(Self::Over),
            // Two run, and the operator wants that one.
            (Self::Kept, Answer::Runs { .. }) if decided == Some(Keep::Destination) => {
                Some(Self::Moved)
            }
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
            // From resuming only where the copy has never run; from running only where the source
            // has said that its tree runs, and the operator wants that one.
            Removing => matches!(self, Receiving | Complete | Resuming | Running),
            Removed => self == Removing,
            Over => matches!(self, Running | Removed),
        }
    }

    /// Whether `next` is against an operator's word: a commit that is still on its way must not
    /// overtake it.
    pub fn is_barred(next: Self, decided: Option<Keep>) -> bool {
        next == Self::Resuming && decided == Some(Keep::Source)
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
                // The operator's word goes before a commit: the source may have the same word from
                // the operator, and runs its tree, while its commit is still on the way.
                (Verdict::Abort, _) | (_, Some(Keep::Source)) => DestinationDuty::Remove,
                (Verdict::Commit, _) | (_, Some(Keep::Destination)) => DestinationDuty::Resume,
                (Verdict::Ask, None) => DestinationDuty::Hold,
            },
            // A source says that only by an operator's word, or its policy's: it runs its tree again.
            Self::Resuming if verdict == Verdict::Abort || decided == Some(Keep::Source) => {
                DestinationDuty::GiveBack
            }
            Self::Resuming => DestinationDuty::Resume,
            // Two run: the source's tree, as it says, and the copy.
            Self::Running if verdict == Verdict::Abort && decided == Some(Keep::Source) => {
                DestinationDuty::Remove
            }
            Self::Running => DestinationDuty::Tell(Answer::Runs { pid: 0 }),
            Self::Removed => DestinationDuty::Tell(Answer::Removed),
            // Whichever of the two it was. A source that would need to know has not let go of it.
            Self::Over => DestinationDuty::Tell(Answer::Unknown),
        }
    }
}

#[cfg(test)]
mod tests;
