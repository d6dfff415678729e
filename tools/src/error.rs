//! What a command can fail with, and how that is said.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use crxfer::archive::ArchiveError;
use crxfer::criu::endpoint::EndpointError;
use crxfer::criu::page_feed::FeedError;
use crxfer::criu::streamer::StreamerError;
use crxfer::handover::JournalError;
use crxfer::image::ImageError;
use crxfer::preflight::Outcome;
use crxfer::store::StoreError;
use crxfer::transfer::finish::FinishError;
use crxfer::transfer::migrate::{MigrateError, MigrateFailure};
use crxfer::transfer::{StreamError, TransferError};
use crxfer::transport::IdentityError;

use crate::exit::Exit;

/// Why a command ended early.
#[derive(Debug)]
pub(crate) enum Failed {
    /// A transfer, or what belongs to one.
    Transfer(TransferError),
    /// A migration; its checks were printed.
    Migrate(Box<MigrateFailure>),
    /// An image directory.
    Image(ImageError),
    /// A receiving directory.
    Store(StoreError),
    /// A key file.
    Identity(IdentityError),
    /// A container's archive.
    Archive(Box<ArchiveError>),
    /// CRIU's image streams.
    Stream(Box<StreamError>),
    /// A file of the command's own.
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// A host name that leads nowhere.
    Unresolved(String),
    /// The arguments do not fit together.
    Usage(String),
    /// What was asked for is there, and is not as it should be; the report was printed.
    Unsound(String),
    /// Results could not be printed.
    Output(io::Error),
    /// A page server for CRIU's clients.
    Endpoint(EndpointError),
    /// A dump of somebody's CRIU was refused for this reason.
    Refused(TransferError),
    /// A `criu page-server` does not take pages.
    Feed(FeedError),
    /// Records of migrations.
    Journal(JournalError),
    /// A migration could not be ended.
    Finish(Box<FinishError>),
    /// Migrations are still unfinished; what is known was printed.
    Doubt(String),
    /// By a signal.
    Stopped,
    /// By a signal, with migrations left as they were.
    Interrupted,
}

impl Failed {
    pub(crate) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            what,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Transfer(error) => error.into(),
            Self::Migrate(failure) => failure.as_ref().into(),
            Self::Image(error) => error.into(),
            Self::Archive(error) => error.as_ref().into(),
            Self::Stream(error) => error.as_ref().into(),
            Self::Store(error) => error.into(),
            Self::Identity(error) => error.into(),
            Self::File { .. } | Self::Output(_) => Exit::Storage,
            Self::Unresolved(_) => Exit::Connection,
            Self::Usage(_) => Exit::Usage,
            Self::Unsound(_) => Exit::Set,
            Self::Endpoint(error) => error.into(),
            Self::Refused(error) => error.into(),
            Self::Feed(error) => error.into(),
            Self::Journal(error) => error.into(),
            Self::Finish(error) => error.as_ref().into(),
            Self::Doubt(_) => Exit::InDoubt,
            Self::Stopped | Self::Interrupted => Exit::Stopped,
        }
    }

    /// The whole story in one line.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Transfer(TransferError::Store(error)) | Self::Store(error) => error.to_string(),
            Self::Transfer(error) => with_causes(error),
            Self::Migrate(failure) => migration(failure),
            Self::Image(error) => with_causes(error),
            Self::Archive(error) => with_causes(error.as_ref()),
            Self::Stream(error) => with_causes(error.as_ref()),
            Self::Identity(error) => with_causes(error),
            Self::File { what, path, source } => {
                format!("cannot {what} {}: {source}", path.display())
            }
            Self::Usage(text) | Self::Unresolved(text) | Self::Unsound(text) => text.clone(),
            Self::Endpoint(error) => with_causes(error),
            Self::Refused(error) => format!(
                "CRIU was refused, the application runs on: {}",
                with_causes(error)
            ),
            Self::Feed(error) => with_causes(error),
            Self::Journal(error) => with_causes(error),
            Self::Finish(error) => with_causes(error.as_ref()),
            Self::Doubt(left) => format!("still unfinished:\n  {left}"),
            Self::Interrupted => "stopped; what was not ended is as it was".to_owned(),
            Self::Output(error) => format!("cannot print the result: {error}"),
            Self::Stopped => "stopped; sending again costs only \
                              what is missing"
                .to_owned(),
        }
    }
}

/// Why it failed, then what became of the workload.
fn migration(failure: &MigrateFailure) -> String {
    let text = failure.to_string();
    let (why, fate) = text.rsplit_once('\n').unwrap_or((&text, ""));
    let why = match &failure.error {
        MigrateError::Preflight(checks) => {
            let failed =
                |it: &&crxfer::transfer::migrate::HostCheck| it.check.outcome == Outcome::Failed;
            match checks.iter().filter(failed).count() {
                1 => "a check failed".to_owned(),
                count => format!("{count} checks failed"),
            }
        }
        MigrateError::Stopped => why.to_owned(),
        // Its own text speaks of sending images again.
        MigrateError::Transfer(TransferError::Transport(error)) => with_causes(error),
        error => with_causes(error),
    };
    format!("{why}; {fate}")
}

/// An error with its causes, each once: some texts hold their cause already.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

impl From<TransferError> for Failed {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Image(error) => Self::Image(error),
            error => Self::Transfer(error),
        }
    }
}

impl From<ImageError> for Failed {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<IdentityError> for Failed {
    fn from(error: IdentityError) -> Self {
        Self::Identity(error)
    }
}

impl From<ArchiveError> for Failed {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(Box::new(error))
    }
}

impl From<StreamError> for Failed {
    fn from(error: StreamError) -> Self {
        Self::Stream(Box::new(error))
    }
}

impl From<StreamerError> for Failed {
    fn from(error: StreamerError) -> Self {
        Self::Stream(Box::new(error.into()))
    }
}

impl From<JournalError> for Failed {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

impl From<FinishError> for Failed {
    fn from(error: FinishError) -> Self {
        Self::Finish(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let cause = || io::Error::from_raw_os_error(13);
        let said = "Permission denied (os error 13)";
        let image = Failed::from(ImageError::Io {
            path: "dump/core-1.img".into(),
            action: "open the file",
            source: cause(),
        });
        assert_eq!(
            image.text(),
            format!("dump/core-1.img: cannot open the file: {said}")
        );
        let read = Failed::from(TransferError::Read {
            path: "dump/core-1.img".into(),
            source: cause(),
        });
        assert_eq!(read.text(), format!("cannot read dump/core-1.img: {said}"));
    }

    #[test]
    fn an_explained_cause_is_not_repeated_in_the_systems_words() {
        let store = || StoreError::Io {
            what: "write",
            path: "images/a".into(),
            source: io::Error::from_raw_os_error(28),
        };
        for failed in [Failed::from(store()), TransferError::from(store()).into()] {
            assert!(!failed.text().contains("os error"), "{}", failed.text());
        }
    }
}
