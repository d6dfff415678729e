use std::io;
use std::path::PathBuf;

use crate::delta::BadName;
use crate::image::ImageError;
use crate::session::SessionError;
use crate::store::StoreError;
use crate::ticket::TicketError;
use crate::transport::{BindError, CloseCode, ConnectError, IdentityError, TransportError};
use crate::wire::{Failure, FailureCode};

/// Why a transfer ended early, sorted by where the fault lies.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The source directory cannot be sent.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The source directory is damaged.
    #[error("{}: {what}; take the dump again", directory.display())]
    Incomplete {
        /// The directory.
        directory: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The set cannot be stored in the layout that was asked for.
    #[error("{0}")]
    Layout(String),
    /// The name cannot be that of a set.
    #[error("{0}; give another with --name")]
    Name(#[from] BadName),
    /// A file of the source directory could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No connection came about.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// This host's key could not be read or made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A ticket cannot be made.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// The receiving socket could not be opened.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The connection broke.
    #[error("{0}; sending again costs only what is missing there")]
    Transport(#[from] TransportError),
    /// The session ended.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The receiving directory failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Something stopped it.
    #[error("stopped; sending again costs only what is missing there")]
    Cancelled,
}

impl TransferError {
    /// Whether the same call may succeed with nothing changed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Transport(error) => error.is_retryable(),
            Self::Connect(error) => error.is_retryable(),
            Self::Session(SessionError::Peer(failure)) => failure.code == FailureCode::Held,
            Self::Session(SessionError::Silent(_)) => true,
            _ => false,
        }
    }

    /// What the other side is told, where it is still there to be told.
    pub(super) fn to_failure(&self) -> Option<Failure> {
        let code = match self {
            Self::Session(error) => return error.to_failure(),
            Self::Transport(TransportError::MessageTooLong { .. } | TransportError::CutShort) => {
                FailureCode::Protocol
            }
            Self::Transport(_)
            | Self::Connect(_)
            | Self::Bind(_)
            | Self::Identity(_)
            | Self::Ticket(_) => return None,
            Self::Image(_) | Self::Incomplete { .. } | Self::Layout(_) => FailureCode::Image,
            Self::Name(_) => FailureCode::Name,
            Self::Read { .. } => FailureCode::Internal,
            Self::Store(StoreError::Foreign(_) | StoreError::NotYours(_)) => FailureCode::Name,
            Self::Store(StoreError::Damaged { .. }) => FailureCode::Held,
            Self::Store(StoreError::Overtaken(_)) => FailureCode::Cancelled,
            Self::Store(_) => FailureCode::Storage,
            Self::Cancelled => FailureCode::Cancelled,
        };
        Some(Failure::new(code, self.to_string()))
    }

    /// With which code the connection is closed.
    pub(super) fn close_code(&self) -> CloseCode {
        match self.to_failure().map(|failure| failure.code) {
            None => CloseCode::Unspecified,
            Some(FailureCode::Ticket) => CloseCode::Unauthorized,
            Some(FailureCode::Version) => CloseCode::Incompatible,
            Some(FailureCode::Protocol) => CloseCode::ProtocolViolation,
            Some(FailureCode::Content) => CloseCode::ContentMismatch,
            Some(FailureCode::Limit) => CloseCode::LimitExceeded,
            Some(FailureCode::Cancelled) => CloseCode::Cancelled,
            Some(_) => CloseCode::LocalFailure,
        }
    }
}
