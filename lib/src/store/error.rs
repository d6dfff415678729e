use std::io;
use std::path::{Path, PathBuf};

/// What went wrong with a receiving directory.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused something.
    #[error("cannot {what} {}: {}", path.display(), explain(source))]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The place for the sets cannot be had.
    #[error(transparent)]
    Sink(#[from] crate::sink::SinkError),
    /// The sets are where this process cannot see them.
    #[error("the sets of {}: {why}", path.display())]
    Unseen {
        /// The receiving directory.
        path: PathBuf,
        /// Where they are.
        why: crate::sink::Unseen,
    },
    /// Another `crxfer recv` serves the directory.
    #[error("{} is served by another `crxfer recv` already; use another --dir or stop that one", .0.display())]
    Busy(PathBuf),
    /// The directory is no receiving directory.
    #[error("{} is not a receiving directory (it has no .crxfer); name the directory that `crxfer recv --dir` was given", .0.display())]
    NotAStore(PathBuf),
    /// The sets were in the memory of a process that has ended.
    #[error("{}: its sets were in the memory of a `crxfer recv` that has ended, and are gone", .0.display())]
    Gone(PathBuf),
    /// Something that crxfer did not receive has the name.
    #[error("{} exists and was not received by crxfer; move it away or send with another --name", .0.display())]
    Foreign(PathBuf),
    /// Another pinned peer sent the set that has the name.
    #[error("the name {0} belongs to a set of another peer; send with another --name")]
    NotYours(String),
    /// There is no such set.
    #[error("there is no received set {0}; `crxfer list` shows what there is")]
    NoSuchSet(String),
    /// The name was given to another set since this one was begun.
    #[error("{0} was given a new generation meanwhile, by another transfer; send again")]
    Overtaken(String),
    /// A block of a stored set no longer has its bytes.
    #[error("{}: block {block} no longer has the bytes that were stored (restored with --auto-dedup, or a failing disk?); the set is not used any more, send again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Index of the block.
        block: u64,
        /// Number of the set's record, 0 for an unfinished transfer.
        set: u64,
    },
}

impl StoreError {
    /// Whether there was no room.
    pub fn is_out_of_space(&self) -> bool {
        let full = |source: &io::Error| {
            matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        };
        matches!(self, Self::Io { source, .. } if full(source))
    }
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull => {
            "no space left on the device; free some and send again".to_owned()
        }
        io::ErrorKind::QuotaExceeded => "the disk quota is used up".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied; run as a user who may write there".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Adds to a result of the operating system what was tried and where.
pub(crate) trait Tried<T> {
    fn tried(self, what: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried(self, what: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io {
            what,
            path: path.to_owned(),
            source: source.into(),
        })
    }
}
