use std::io;

/// Why a running tree cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The root process has ended, or its pid belongs to another process by now.
    #[error("process {pid} has ended; there is nothing left to migrate")]
    RootGone {
        /// Its pid, as seen here.
        pid: u32,
    },
    /// This process may not look into a task of the tree.
    #[error(
        "not allowed to {what} of process {pid}; run as root, or with CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE in the tree's user namespace"
    )]
    Denied {
        /// What was tried.
        what: &'static str,
        /// The task, as seen here.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel does not list children.
    #[error(
        "this kernel has no /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN), which CRIU needs too; use another kernel"
    )]
    NoChildren,
    /// The operating system refused something else.
    #[error("cannot {what} of process {pid}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The task, as seen here.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
}

impl LiveError {
    pub(super) fn of(what: &'static str, pid: u32, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { what, pid, source },
            _ => Self::Io { what, pid, source },
        }
    }
}

/// A result without what only says that the process, or a part of it, has gone meanwhile.
pub(super) fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_gone(error: &io::Error) -> bool {
    let no_such_process = rustix::io::Errno::SRCH.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(no_such_process)
}
