use crate::delta::RecipeError;
use crate::wire::{Failure, FailureCode, FrameError, WireError};

/// Why a session ended early, sorted by fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The peer gave up and said why.
    #[error("the other side gave up: {0}")]
    Peer(Failure),
    /// The peer sent what does not belong there.
    #[error("the other side broke the protocol: {0}")]
    Protocol(&'static str),
    /// A message cannot be read.
    #[error("the other side broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// A frame cannot be read.
    #[error("the other side broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// There is no common version.
    #[error(
        "no common protocol version: this side speaks {ours}, the other {theirs}; update the older one"
    )]
    Version {
        /// What this side speaks.
        ours: String,
        /// What the other speaks.
        theirs: String,
    },
    /// The ticket's secret was not proven.
    #[error(
        "the ticket is not one of this `crxfer recv` (it may be of an earlier one: use the ticket that runs now)"
    )]
    Ticket,
    /// The set is larger than the operator allows.
    #[error("the set has {size} bytes, more than --max-bytes {limit} allows")]
    TooLarge {
        /// Size of the set.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// What arrived is not what was announced.
    #[error(transparent)]
    Content(#[from] RecipeError),
    /// The set as a whole is not the one that the source stated.
    #[error("the set that arrived does not have the root digest that the source stated")]
    Root,
    /// A file changed on the source.
    #[error("{0} changed while it was sent; send the directory again when nothing writes to it")]
    Changed(String),
    /// The peer says nothing any more.
    #[error("the other side said nothing for {0} s")]
    Silent(u64),
    /// The workload stayed frozen for as long as the operator allows.
    #[error(
        "the workload was frozen for {} s, the limit (--freeze-limit); it runs on here", .0.as_secs_f64()
    )]
    FreezeLimit(std::time::Duration),
    /// Something on this side failed; the text says what.
    #[error("{}", .0.reason)]
    Local(Failure),
}

impl SessionError {
    /// What the peer is told, unless it is the one who told us.
    pub fn to_failure(&self) -> Option<Failure> {
        let code = match self {
            Self::Peer(_) => return None,
            Self::Local(failure) => return Some(failure.clone()),
            Self::Protocol(_) | Self::Wire(_) | Self::Frame(_) => FailureCode::Protocol,
            Self::Version { .. } => FailureCode::Version,
            Self::Ticket => FailureCode::Ticket,
            Self::TooLarge { .. } => FailureCode::Limit,
            Self::Content(RecipeError::WrongBytes { .. } | RecipeError::WrongFile { .. })
            | Self::Root
            | Self::Changed(_) => FailureCode::Content,
            Self::Content(_) => FailureCode::Protocol,
            Self::Silent(_) | Self::FreezeLimit(_) => FailureCode::Cancelled,
        };
        Some(Failure::new(code, self.to_string()))
    }
}
