//! What can go wrong while CRIU is driven.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::stage::Stage;

/// What CRIU was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Versions and features.
    Probe,
    /// An iteration of pre-copy.
    PreDump,
    /// The final dump.
    Dump,
    /// A restore.
    Restore,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Probe => "probe",
            Self::PreDump => "pre-dump",
            Self::Dump => "dump",
            Self::Restore => "restore",
        })
    }
}

/// Why an operation of CRIU did not succeed.
///
/// After a failed dump or pre-dump the tree runs on, after a failed restore no copy runs; where that
/// is not certain the variant says so.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// The program does not start at all.
    #[error("{}: cannot be started ({source}). Install CRIU, or say where it is", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The operating system refused something around the worker.
    #[error("criu worker {pid}: cannot {action} ({source})")]
    Io {
        /// The worker; 0 before it exists.
        pid: u32,
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// CRIU said something that is not of the protocol.
    #[error("criu worker {pid}: {what} during {operation}; this CRIU is not known to crxfer")]
    Protocol {
        /// The worker.
        pid: u32,
        /// What was asked of it.
        operation: Operation,
        /// What it said instead.
        what: String,
    },
    /// The worker ended without an answer. Processes of a restore may be left behind.
    #[error("criu worker {pid} ended during {operation} without an answer ({status}){output}")]
    Gone {
        /// The worker.
        pid: u32,
        /// What was asked of it.
        operation: Operation,
        /// How it ended.
        status: String,
        /// The end of what it printed, after a colon; empty if that was nothing.
        output: String,
    },
    /// CRIU reports a failure.
    #[error("{0}")]
    Failed(Box<Failure>),
    /// A command that runs CRIU in its own way did not end well.
    #[error("the {operation} command {how}{output}{}", place_of(log.as_deref()))]
    Command {
        /// What was asked of it.
        operation: Operation,
        /// How it ended, as the end of a sentence.
        how: String,
        /// The end of what it printed, after a colon; empty if that was nothing.
        output: String,
        /// CRIU's log, where there is one.
        log: Option<PathBuf>,
        /// Its CRIU is not known to have tidied up.
        died: bool,
    },
    /// The caller's own refusal at a stage.
    #[error("{operation} given up at {stage}, as decided by the caller")]
    Refused {
        /// What was asked for.
        operation: Operation,
        /// Where it was refused.
        stage: Stage,
    },
    /// [`Canceller`](super::Canceller) ended it.
    #[error("{operation} cancelled{}", if *killed { KILLED } else { "" })]
    Cancelled {
        /// What was asked for.
        operation: Operation,
        /// CRIU did not end by itself: network lock and sockets of the tree may need healing, and
        /// processes of a restore may be left.
        killed: bool,
    },
    /// The worker's deadline passed.
    #[error("{operation} not finished in time{}", if *killed { KILLED } else { "" })]
    TimedOut {
        /// What was asked for.
        operation: Operation,
        /// As for `Cancelled`.
        killed: bool,
    },
    /// A worker does one operation.
    #[error("criu worker {pid} has done its one operation; start another one")]
    Used {
        /// The worker.
        pid: u32,
    },
    /// A pre-dump was asked for where [`Probe::mem_track`](super::Probe::mem_track) is false.
    #[error(
        "criu cannot pre-dump here: this kernel does not track changed memory \
         (CONFIG_MEM_SOFT_DIRTY); memory must be read live instead"
    )]
    NoSoftDirty,
    /// A page server was asked for, but the worker has no socket.
    #[error("criu worker {pid} was started without a socket for memory")]
    NoSocket {
        /// The worker.
        pid: u32,
    },
}

impl CriuError {
    /// What to make of the operating system's refusal to `action` (an infinitive), where there is no
    /// worker yet.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self + Copy {
        move |source| Self::Io {
            pid: 0,
            action,
            source: source.into(),
        }
    }

    /// CRIU's log of the failure, where it is known: it may be moved.
    #[cfg(feature = "net")]
    pub(crate) fn log(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::Failed(failure) => Some(&mut failure.log),
            Self::Command { log, .. } => log.as_mut(),
            _ => None,
        }
    }

    /// Whether CRIU ended without tidying up: a tree that it had runs on with what was done to it.
    pub fn has_died(&self) -> bool {
        matches!(
            self,
            Self::Gone { .. }
                | Self::Protocol { .. }
                | Self::Io { .. }
                | Self::Command { died: true, .. }
                | Self::Cancelled { killed: true, .. }
                | Self::TimedOut { killed: true, .. }
        )
    }
}

fn place_of(log: Option<&Path>) -> String {
    log.map_or_else(String::new, |log| format!(" (log: {})", log.display()))
}

const KILLED: &str = "; criu did not react and was killed";

/// A failure that CRIU reports, with all that helps to explain it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What was asked for.
    pub operation: Operation,
    /// CRIU's own message.
    pub message: Option<String>,
    /// CRIU's error number.
    pub errno: Option<i32>,
    /// Its log.
    pub log: PathBuf,
    /// The first error lines of the log, as they stand there.
    pub lines: Vec<String>,
    /// What to do, if the cause is a common one.
    pub advice: Option<&'static str>,
}

/// Lines of CRIU's log that an error quotes.
const QUOTED: usize = 3;

/// Our sentence if there is one, else CRIU's words; then where to look, and CRIU's first errors.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CRIU's {} failed: ", self.operation)?;
        let errno = self.errno.map(io::Error::from_raw_os_error);
        let message = self.message.as_ref().or(self.lines.first());
        match (self.advice, message, errno) {
            (Some(advice), _, _) => f.write_str(advice)?,
            (None, Some(message), _) => f.write_str(message.trim_end_matches('.'))?,
            (None, None, Some(errno)) => write!(f, "{errno}")?,
            (None, None, None) => f.write_str("it does not say why")?,
        }
        write!(f, " (log: {})", self.log.display())?;
        let quoted = self.lines.iter().take(QUOTED);
        quoted
            .map(|line| line.trim())
            .try_for_each(|line| write!(f, "\n  CRIU: {line}"))
    }
}
