//! `crxfer stream`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};
use crxfer::delta::SetName;
use crxfer::page::PageSize;

use super::migrate::seconds;
use super::{DestinationArgs, TransportArgs, page_size, set_name};
use crate::size::{Bytes, Rate};

/// Be CRIU's image streamer: no image touches a file system of this host
///
/// `criu dump --stream` and `criu restore --stream` hand all images through pipes to a program that
/// listens in the directory given as -D. `capture` is that program for a dump, and sends what it gets;
/// `serve` is it for a restore.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer stream capture /run/stream --to crxfer1-… --name web-1
  crxfer stream serve /run/stream --dir /var/lib/images --name web-1")]
pub(crate) struct StreamArgs {
    #[command(subcommand)]
    pub(crate) command: StreamCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StreamCommand {
    Capture(Box<CaptureArgs>),
    Serve(ServeArgs),
    Vote(VoteArgs),
}

/// Take one `criu dump --stream` and send it
///
/// Writes an action script, SOCKDIR/action, that CRIU must be given: it holds CRIU at post-dump, with
/// the tree frozen, until the destination has stored the set. Only then CRIU may kill the tree;
/// whatever fails before, the tree runs on. A CRIU without that script finds no socket and fails
/// before it touches the tree (see --unheld).
///
/// Images are in private memory of this process until they are sent, and in no visible file system.
/// With `criu dump --stream --page-server` as well, memory goes to `crxfer page-server`, with the same
/// NAME, and the rest comes here.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer stream capture /run/stream --to @ticket --name web-1
  criu dump --stream -D /run/stream -W /tmp -t 4711 --action-script /run/stream/action

Exit code 0: the set is stored, and CRIU was told to go on.")]
pub(crate) struct CaptureArgs {
    /// Directory for the sockets, for you alone (mode 0700): CRIU's -D. Made if it does not exist
    #[arg(value_name = "SOCKDIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: PathBuf,

    #[command(flatten)]
    pub(crate) destination: DestinationArgs,

    /// Name of the set at the destination
    #[arg(long, value_parser = set_name)]
    pub(crate) name: SetName,

    /// Received set to build on [default: the destination finds the best one]
    #[arg(long, value_name = "NAME", value_parser = set_name)]
    pub(crate) base: Option<SetName>,

    /// Most memory that images may take on this host (K, M, G, T) [default: half of all]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Bytes>,

    /// Take a dump without an action script: CRIU kills the tree before its images are stored
    ///
    /// For `criu dump --leave-running`. Otherwise a transfer that fails loses the workload.
    #[arg(long)]
    pub(crate) unheld: bool,

    /// Refuse, so that the tree runs on, when it was held for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds, conflicts_with = "unheld")]
    pub(crate) freeze_limit: Option<Duration>,

    /// Most bytes (not bits) a second on the wire (K, M, G: powers of 1024)
    #[arg(long, value_name = "RATE")]
    pub(crate) bwlimit: Option<Rate>,

    /// Print one JSON object a line instead of progress bar and summary
    ///
    /// {"event":"listening","directory","action_script"} when CRIU can be started,
    /// {"event":"captured","images","bytes","held"} when all images are here, then as `crxfer send
    /// --json`; "done" also has "held_seconds".
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) transport: TransportArgs,
}

/// Give one `criu restore --stream` its images
///
/// Any set that CRIU can restore, in any layout: parents are followed, and CRIU gets every page in one
/// image, which is not written anywhere. What is incomplete is refused before CRIU hears anything.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer stream serve /run/stream --dir /var/lib/images --name web-1
  crxfer stream serve /run/stream --images ./dump/3
  criu restore --stream -D /run/stream -W /tmp -d

Ends with the restore. Exit code 0 says that CRIU got what it asked for, not that it succeeded.")]
pub(crate) struct ServeArgs {
    /// Directory for the socket, for you alone (mode 0700): CRIU's -D. Made if it does not exist
    #[arg(value_name = "SOCKDIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: PathBuf,

    /// The receiving directory
    #[arg(
        long,
        value_name = "DIR",
        value_hint = ValueHint::DirPath,
        requires = "name",
        required_unless_present = "images"
    )]
    pub(crate) dir: Option<PathBuf>,

    /// Name of the set in it
    #[arg(long, value_parser = set_name, requires = "dir")]
    pub(crate) name: Option<SetName>,

    /// Any image directory, instead of --dir and --name
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "dir")]
    pub(crate) images: Option<PathBuf>,

    /// Page size in bytes of the host that dumped [default: found from the files]
    #[arg(long, value_name = "BYTES", value_parser = page_size)]
    pub(crate) page_size: Option<PageSize>,

    /// Print one JSON object a line
    ///
    /// {"event":"listening","directory"} when CRIU can be started, {"event":"served","images","absent",
    /// "bytes","unfinished"} when it has ended.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What SOCKDIR/action runs: hold CRIU at post-dump until `stream capture` has a verdict
///
/// For action scripts of your own: CRIU takes the path of one program, and no arguments. Call it at
/// pre-stream and post-dump, or always: it looks at CRTOOLS_SCRIPT_ACTION, and does nothing at other
/// stages. Exit code 0 lets CRIU go on.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer stream vote /run/stream
  exec crxfer stream vote \"$CRTOOLS_IMAGE_DIR\"")]
pub(crate) struct VoteArgs {
    /// Directory of the sockets
    #[arg(value_name = "SOCKDIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: PathBuf,
}
