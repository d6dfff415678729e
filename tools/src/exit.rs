//! Exit codes: the one place where every error of the library is given its number.

use std::fmt::Write as _;
use std::io;

use crxfer::archive::ArchiveError;
use crxfer::criu::endpoint::{EndpointError, SessionError as DumpError};
use crxfer::criu::page_client::ServeError;
use crxfer::criu::page_feed::FeedError;
use crxfer::criu::streamer::StreamerError;
use crxfer::handover::JournalError;
use crxfer::image::ImageError;
use crxfer::live::LiveError;
use crxfer::preflight::PreflightError;
use crxfer::session::SessionError;
use crxfer::session::migration::Owner;
use crxfer::store::StoreError;
use crxfer::transfer::finish::FinishError;
use crxfer::transfer::migrate::{MigrateError, MigrateFailure};
use crxfer::transfer::{StreamError, TransferError};
use crxfer::transport::{
    AttemptError, BindError, CloseCode, ConnectError, IdentityError, TransportError,
};
use crxfer::wire::FailureCode;

/// How the command ends. The numbers are documented and never given another meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Done = 0,
    Fault = 1,
    Usage = 2,
    Set = 3,
    Authentication = 4,
    Connection = 5,
    Storage = 6,
    Destination = 7,
    Content = 8,
    Limit = 9,
    Version = 10,
    Preflight = 11,
    GivenUp = 12,
    Criu = 13,
    InDoubt = 14,
    Hook = 15,
    FreezeLimit = 16,
    Stopped = 130,
}

impl Exit {
    const ALL: [(Self, &str); 18] = [
        (Self::Done, "done"),
        (Self::Fault, "a fault of the program"),
        (Self::Usage, "wrong usage"),
        (
            Self::Set,
            "the image directory or set is missing, damaged, incomplete or unsuitable",
        ),
        (
            Self::Authentication,
            "wrong key, or a ticket of another `crxfer recv`",
        ),
        (
            Self::Connection,
            "no connection, or it was lost; trying again may help",
        ),
        (
            Self::Storage,
            "this host's files: disk full, permission denied, directory in use",
        ),
        (
            Self::Destination,
            "the destination refused or failed: its disk full, the name taken, no --allow-restore",
        ),
        (
            Self::Content,
            "a file changed while it was sent, or bytes do not match their digest",
        ),
        (Self::Limit, "larger than the destination's --max-bytes"),
        (
            Self::Version,
            "the two sides do not understand each other: update the older one",
        ),
        (
            Self::Preflight,
            "migrate: a check failed; nothing was touched",
        ),
        (
            Self::GivenUp,
            "migrate: given up by --deadline, --on-slow or --max-iterations; stream: refused; the workload runs on here",
        ),
        (
            Self::Criu,
            "CRIU failed, here or there (migrate, stream, page-server: the workload runs on here)",
        ),
        (
            Self::InDoubt,
            "migrate, recover: nobody knows yet whether the copy runs; the workload is held: crxfer recover",
        ),
        (
            Self::Hook,
            "migrate: a hook failed; the workload runs on here",
        ),
        (
            Self::FreezeLimit,
            "migrate, stream, page-server: frozen for --freeze-limit; the workload runs on here",
        ),
        (Self::Stopped, "stopped by Ctrl-C or SIGTERM"),
    ];

    pub(crate) fn code(self) -> u8 {
        self as u8
    }
}

/// The end of the long help: examples and exit codes.
pub(crate) fn help(examples: &str) -> String {
    let mut text = format!("{examples}\n\nExit codes:");
    for (exit, meaning) in Exit::ALL {
        let _ = write!(text, "\n  {:>3}  {meaning}", exit.code());
    }
    text
}

impl From<&TransferError> for Exit {
    fn from(error: &TransferError) -> Self {
        match error {
            TransferError::Image(error) => error.into(),
            TransferError::Incomplete { .. } | TransferError::Layout(_) => Self::Set,
            TransferError::Name(_) | TransferError::Ticket(_) => Self::Usage,
            TransferError::Read { .. } => Self::Storage,
            TransferError::Connect(error) => error.into(),
            TransferError::Identity(error) => error.into(),
            TransferError::Bind(error) => error.into(),
            TransferError::Transport(error) => error.into(),
            TransferError::Session(error) => error.into(),
            TransferError::Store(error) => error.into(),
            TransferError::Cancelled => Self::Stopped,
        }
    }
}

impl From<&MigrateFailure> for Exit {
    fn from(failure: &MigrateFailure) -> Self {
        // Whatever led to it: this is what must be looked after first.
        if failure.owner == Owner::InDoubt {
            return Self::InDoubt;
        }
        match &failure.error {
            MigrateError::Transfer(error) => error.into(),
            MigrateError::Survey(PreflightError::NoProcess(_) | PreflightError::Own(_)) => {
                Self::Usage
            }
            MigrateError::Survey(PreflightError::Read { .. }) | MigrateError::Work { .. } => {
                Self::Storage
            }
            MigrateError::Journal(error) => error.into(),
            MigrateError::Fence(_) | MigrateError::Sink(_) => Self::Storage,
            MigrateError::Preflight(_) => Self::Preflight,
            MigrateError::Live(LiveError::RootGone { .. }) => Self::Content,
            MigrateError::Live(_) => Self::Storage,
            MigrateError::Dump { .. } => Self::Storage,
            MigrateError::Image(_) => Self::Content,
            MigrateError::Criu(_) | MigrateError::Memory(_) | MigrateError::LetGo => Self::Criu,
            MigrateError::Hook(_) => Self::Hook,
            MigrateError::GivenUp(_) => Self::GivenUp,
            MigrateError::Stopped => Self::Stopped,
        }
    }
}

impl From<&ArchiveError> for Exit {
    fn from(error: &ArchiveError) -> Self {
        match error {
            ArchiveError::Io { .. } => Self::Storage,
            ArchiveError::Image(error) => error.into(),
            ArchiveError::Exists(_) => Self::Usage,
            ArchiveError::TooLarge { .. } => Self::Limit,
            ArchiveError::Damaged { .. }
            | ArchiveError::Refused { .. }
            | ArchiveError::NoImages(_)
            | ArchiveError::NoRest(_) => Self::Set,
        }
    }
}

impl From<&StreamError> for Exit {
    fn from(error: &StreamError) -> Self {
        match error {
            StreamError::Streamer(error) => error.into(),
            StreamError::Transfer { error, .. } => error.into(),
            StreamError::Memory(_) => Self::Storage,
            StreamError::Late(_) => Self::FreezeLimit,
            StreamError::Unheard => Self::Criu,
        }
    }
}

impl From<&StreamerError> for Exit {
    fn from(error: &StreamerError) -> Self {
        match error {
            StreamerError::Image(error) => error.into(),
            StreamerError::Incomplete { .. } => Self::Set,
            StreamerError::Public(_) | StreamerError::LongPath(_) => Self::Usage,
            StreamerError::Io { .. } | StreamerError::Busy(_) | StreamerError::Full { .. } => {
                Self::Storage
            }
            StreamerError::Stopped => Self::Stopped,
            StreamerError::NoCapture(_) | StreamerError::NoVerdict | StreamerError::Refused(_) => {
                Self::GivenUp
            }
            _ => Self::Criu,
        }
    }
}

impl From<&EndpointError> for Exit {
    fn from(error: &EndpointError) -> Self {
        match error {
            EndpointError::Io { .. } => Self::Storage,
            EndpointError::NoStream => Self::Usage,
            EndpointError::Stuck(_) => Self::FreezeLimit,
            EndpointError::Session(error) => error.into(),
        }
    }
}

impl From<&DumpError> for Exit {
    fn from(error: &DumpError) -> Self {
        match error {
            // What a sink says, the command looks into itself.
            DumpError::Serve(ServeError::Sink(_)) | DumpError::Refused(_) => Self::Destination,
            DumpError::Serve(ServeError::Stream(_) | ServeError::Io { .. })
            | DumpError::Silent(_)
            | DumpError::NoMemory
            | DumpError::Behind => Self::Criu,
            DumpError::Slow(_) | DumpError::NoTurn(_) => Self::FreezeLimit,
            DumpError::TooMany | DumpError::Quiet(_) => Self::Connection,
            DumpError::Stopped => Self::Stopped,
            DumpError::Panicked => Self::Fault,
        }
    }
}

impl From<&FeedError> for Exit {
    fn from(error: &FeedError) -> Self {
        match error {
            FeedError::Image(error) => error.into(),
            FeedError::Io { .. } => Self::Connection,
            FeedError::Nothing => Self::Set,
            FeedError::Ended { .. }
            | FeedError::Silent { .. }
            | FeedError::NoServer(_)
            | FeedError::Refused(_) => Self::Criu,
        }
    }
}

impl From<&JournalError> for Exit {
    fn from(_: &JournalError) -> Self {
        Self::Storage
    }
}

impl From<&FinishError> for Exit {
    fn from(error: &FinishError) -> Self {
        match error {
            FinishError::Journal(error) => error.into(),
            FinishError::Left { .. } => Self::InDoubt,
            FinishError::Transfer(error) => error.into(),
        }
    }
}

impl From<&ImageError> for Exit {
    fn from(error: &ImageError) -> Self {
        match error {
            ImageError::Io { .. } => Self::Storage,
            ImageError::Changed(_) => Self::Content,
            ImageError::OutputExists(_) | ImageError::BadOutput(_) => Self::Usage,
            _ => Self::Set,
        }
    }
}

impl From<&StoreError> for Exit {
    fn from(error: &StoreError) -> Self {
        match error {
            StoreError::Io { source, .. } if source.kind() == io::ErrorKind::InvalidData => {
                Self::Set
            }
            StoreError::Io { .. } | StoreError::Busy(_) | StoreError::Overtaken(_) => Self::Storage,
            StoreError::Foreign(_) | StoreError::NotYours(_) => Self::Storage,
            StoreError::Sink(_) | StoreError::Unseen { .. } => Self::Storage,
            StoreError::NotAStore(_)
            | StoreError::Gone(_)
            | StoreError::NoSuchSet(_)
            | StoreError::Damaged { .. } => Self::Set,
        }
    }
}

impl From<&IdentityError> for Exit {
    fn from(error: &IdentityError) -> Self {
        match error {
            IdentityError::Io { .. } => Self::Storage,
            IdentityError::Exists { .. } => Self::Usage,
            IdentityError::Exposed { .. }
            | IdentityError::NotAFile { .. }
            | IdentityError::NotAKey { .. } => Self::Authentication,
            IdentityError::Generate(_) => Self::Fault,
        }
    }
}

impl From<&BindError> for Exit {
    fn from(error: &BindError) -> Self {
        match error {
            BindError::NoAddress => Self::Usage,
            BindError::Socket { .. } => Self::Connection,
            BindError::Key(_) => Self::Authentication,
        }
    }
}

impl From<&ConnectError> for Exit {
    fn from(error: &ConnectError) -> Self {
        match error {
            ConnectError::NoAddress => Self::Usage,
            ConnectError::Key(_) => Self::Authentication,
            ConnectError::Failed(attempts) => {
                // A host that answered wrongly says more than one that did not answer.
                let codes = || attempts.iter().map(|attempt| Self::from(&attempt.error));
                codes()
                    .find(|&code| code != Self::Connection)
                    .unwrap_or(Self::Connection)
            }
        }
    }
}

impl From<&AttemptError> for Exit {
    fn from(error: &AttemptError) -> Self {
        match error {
            AttemptError::Refused | AttemptError::Timeout(_) | AttemptError::Socket(_) => {
                Self::Connection
            }
            AttemptError::WrongKey { .. } => Self::Authentication,
            AttemptError::Incompatible => Self::Version,
            AttemptError::Handshake(error) => error.into(),
        }
    }
}

impl From<&TransportError> for Exit {
    fn from(error: &TransportError) -> Self {
        match error {
            TransportError::Timeout | TransportError::Reset | TransportError::CutShort => {
                Self::Connection
            }
            TransportError::PeerClosed { code, .. } | TransportError::StreamStopped(code) => {
                (*code).into()
            }
            TransportError::KeyRefused => Self::Authentication,
            TransportError::Incompatible
            | TransportError::MessageTooLong { .. }
            | TransportError::Protocol(_) => Self::Version,
            TransportError::ClosedHere | TransportError::Misuse(_) => Self::Fault,
        }
    }
}

impl From<CloseCode> for Exit {
    fn from(code: CloseCode) -> Self {
        match code {
            CloseCode::Unspecified
            | CloseCode::Done
            | CloseCode::Cancelled
            | CloseCode::Busy
            | CloseCode::ShuttingDown => Self::Connection,
            CloseCode::Unauthorized => Self::Authentication,
            CloseCode::Incompatible | CloseCode::ProtocolViolation => Self::Version,
            CloseCode::ContentMismatch => Self::Content,
            CloseCode::LimitExceeded => Self::Limit,
            CloseCode::LocalFailure | CloseCode::Other(_) => Self::Destination,
        }
    }
}

impl From<&SessionError> for Exit {
    fn from(error: &SessionError) -> Self {
        match error {
            SessionError::Peer(failure) => Self::of_peer(failure.code),
            SessionError::Local(failure) => match failure.code {
                FailureCode::Storage => Self::Storage,
                FailureCode::Internal => Self::Fault,
                FailureCode::Cancelled => Self::Stopped,
                code => Self::of_peer(code),
            },
            SessionError::Protocol(_)
            | SessionError::Wire(_)
            | SessionError::Frame(_)
            | SessionError::Version { .. } => Self::Version,
            SessionError::Ticket => Self::Authentication,
            SessionError::TooLarge { .. } => Self::Limit,
            SessionError::Content(_) | SessionError::Root | SessionError::Changed(_) => {
                Self::Content
            }
            SessionError::Silent(_) => Self::Connection,
            SessionError::FreezeLimit(_) => Self::FreezeLimit,
        }
    }
}

impl Exit {
    // Where a tree is moved, what the destination cannot make a tree of is CRIU's failure, and who
    // refuses does not do so for want of a connection.

    /// For what the other side gave as its reason.
    fn of_peer(code: FailureCode) -> Self {
        match code {
            FailureCode::Protocol | FailureCode::Version => Self::Version,
            FailureCode::Ticket => Self::Authentication,
            FailureCode::Content => Self::Content,
            FailureCode::Image => Self::Set,
            FailureCode::Limit => Self::Limit,
            FailureCode::Storage
            | FailureCode::Name
            | FailureCode::Held
            | FailureCode::Internal => Self::Destination,
            FailureCode::Cancelled => Self::Connection,
            FailureCode::Criu => Self::Criu,
            FailureCode::Hook => Self::Hook,
            FailureCode::Refused => Self::Destination,
        }
    }
}

#[cfg(test)]
mod tests;
