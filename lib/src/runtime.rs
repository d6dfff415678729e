//! Commands that dump and restore in the place of a CRIU of our own: what a container's runtime needs.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The command that dumps a workload in the place of a CRIU of our own.
///
/// It is run by `sh -c` at the freeze, with `CRXFER_PID`, `CRXFER_NAME`, `CRXFER_CONTAINER`,
/// `CRXFER_IMAGES` (an empty directory), `CRXFER_WORK` (for logs), `CRXFER_OPTIONS` (CRIU's words for
/// what was asked for, such as `--tcp-established`), `CRXFER_PAGE_SERVER_ADDRESS`,
/// `CRXFER_PAGE_SERVER_PORT` and `CRXFER_ACTION_SCRIPT`. It ends with 0 when the workload is dumped
/// and gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpCommand {
    /// The command.
    pub command: String,
    /// What the destination must know to restore it: a name that its receiver was given with a
    /// command.
    pub runtime: String,
    /// The container's name there; may be empty.
    pub container: String,
    /// Has the runtime here forget the workload, where that was ended behind the command's back; run by
    /// `sh -c`. It must leave one alone that runs.
    pub forget: Option<String>,
    /// What answers CRIU's action scripts.
    pub action: ActionProgram,
}

/// The command that restores workloads of one runtime.
///
/// It is run by `sh -c` with `CRXFER_NAME`, `CRXFER_CONTAINER`, `CRXFER_IMAGES`, `CRXFER_WORK`
/// (for logs; CRIU's is best named `restore.log`), `CRXFER_OPTIONS` as on the source, and
/// `CRXFER_ACTION_SCRIPT`, and ends with 0 when the copy runs, detached from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreCommand {
    /// Name of the runtime, as the source's offer has it.
    pub runtime: String,
    /// The command.
    pub command: String,
    /// Removes what a restore that was cut short has left with the runtime; run by `sh -c` with
    /// `CRXFER_NAME`, `CRXFER_CONTAINER` and `CRXFER_WORK`.
    #[serde(default)]
    pub remove: Option<String>,
    /// A directory that has to hold a directory of the container's name, if the runtime needs one.
    #[serde(default)]
    pub bundles: Option<PathBuf>,
    /// What answers CRIU's action scripts.
    pub action: ActionProgram,
}

/// A program that answers CRIU's action scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionProgram {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// `text` as one word of a shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

impl RestoreCommand {
    /// Whether `name` can name a container in a command line and a path: letters, digits and `_.-`,
    /// not first a `.` or `-`.
    pub fn can_name(name: &str) -> bool {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        !name.is_empty() && !name.starts_with(['.', '-']) && name.chars().all(plain)
    }
}

/// What was asked for in CRIU's own words, as command lines of runtimes have them, too.
#[cfg(feature = "net")]
pub(crate) fn words(options: &crate::wire::RestoreOptions) -> String {
    let flags = [
        (options.tcp_established, "--tcp-established"),
        (options.tcp_close, "--tcp-close"),
        (options.shell_job, "--shell-job"),
        (options.file_locks, "--file-locks"),
        (options.link_remap, "--link-remap"),
        (options.ext_unix_sk, "--ext-unix-sk"),
    ];
    let words = flags.iter().filter(|(is_asked, _)| *is_asked);
    let words: Vec<_> = words.map(|(_, word)| *word).collect();
    words.join(" ")
}
