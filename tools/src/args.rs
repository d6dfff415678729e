//! The command line: what may be written, and what `--help` teaches.

mod archive;
mod container;
mod migrate;
mod page_server;
mod recover;
mod stream;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use crxfer::delta::SetName;
use crxfer::identity::Fingerprint;
use crxfer::page::PageSize;
use crxfer::sink::SinkKind;
use crxfer::transfer::Target;
use crxfer::transport::{CongestionControl, Options};
use crxfer::wire::Layout;

use crate::error::Failed;
use crate::exit;
use crate::size::{Bytes, Rate};
use crate::target;

pub(crate) use self::archive::{ArchiveArgs, ArchiveCommand};
pub(crate) use self::container::{ContainerArgs, RuncSetupArgs, RuntimeArgs};
pub(crate) use self::migrate::{MigrateArgs, ModeArg, RestoreArgs};
pub(crate) use self::page_server::{FeedArgs, PageServerArgs};
pub(crate) use self::recover::{GuardArgs, PlaceArgs, RecoverArgs, StatusArgs};
pub(crate) use self::stream::{CaptureArgs, ServeArgs, StreamArgs, StreamCommand, VoteArgs};

const EXAMPLES: &str = "\
Examples:
  crxfer recv --dir /var/lib/images --allow-restore   on the destination: prints a ticket
  crxfer migrate --pid 4711 --to crxfer1-…            on the source: moves the running program
  crxfer send ./dump --to crxfer1-…                   or only an image directory that CRIU wrote";

/// Move running programs and CRIU image directories between hosts: verified, and without sending
/// what is there already.
#[derive(Debug, Parser)]
#[command(
    name = "crxfer",
    version,
    after_help = EXAMPLES,
    after_long_help = exit::help(EXAMPLES),
    max_term_width = 100,
    subcommand_help_heading = "Commands"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Log what happens inside to stderr; twice for more. RUST_LOG chooses in detail
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Recv(Box<RecvArgs>),
    Migrate(Box<MigrateArgs>),
    Recover(Box<RecoverArgs>),
    Status(StatusArgs),
    Send(SendArgs),
    PageServer(PageServerArgs),
    Feed(FeedArgs),
    Stream(StreamArgs),
    Archive(ArchiveArgs),
    Inspect(InspectArgs),
    Verify(VerifyArgs),
    Diff(DiffArgs),
    Flatten(FlattenArgs),
    List(ListArgs),
    Rm(RmArgs),
    Keygen(KeygenArgs),
    RuncSetup(RuncSetupArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
    #[command(hide = true)]
    Guard(GuardArgs),
    /// What CRIU's action-script calls: asks the migration whether CRIU may go on
    #[command(
        hide = true,
        after_help = "\
Examples, of action scripts:
  exec crxfer action
  crxfer action || exit 1"
    )]
    Action,
}

/// Receive image directories and, with --allow-restore, running process trees
///
/// Prints a ticket: one word that names this host's addresses, its key and a secret. Whoever has it
/// can send here until this command ends. Each set appears at DIR/NAME, complete or not at all.
/// Runs until it is stopped (Ctrl-C, SIGTERM), or with --once until one set is there, or one
/// workload runs here.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer recv --dir /var/lib/images
  crxfer recv --dir /dev/shm/images --once --ticket-file ticket --allow-restore
  crxfer recv --dir images --listen 192.0.2.7:4433 --identity key.pem --peer crxkey1-…")]
pub(crate) struct RecvArgs {
    /// Directory that receives: each set becomes a directory in it. Made if it does not exist
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// Address and UDP port to listen at; may be repeated. Port 0: any free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:0")]
    pub(crate) listen: Vec<SocketAddr>,

    /// Also write the ticket to this file (mode 0600), when the socket is ready
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ticket_file: Option<PathBuf>,

    /// End after one set (with what it builds on), or one workload that runs here
    #[arg(long)]
    pub(crate) once: bool,

    /// How sets are laid out
    #[arg(long, value_enum, default_value_t = LayoutArg::Faithful)]
    pub(crate) layout: LayoutArg,

    /// Where sets and the images of live migrations are kept
    ///
    /// With `memory` nothing of them is in DIR, nor in any file system that can be seen: they are gone
    /// when this command ends, whatever ends it. Until then `crxfer list`, `inspect` and `verify` find
    /// them by DIR as ever, and CRIU by the path that is printed.
    #[arg(long, value_enum, default_value_t = SinkArg::Disk)]
    pub(crate) sink: SinkArg,

    /// Most bytes that `--sink memory` may take (K, M, G: powers of 1024) [default: half of the memory
    /// that is available; for a live migration what its memory needs]
    #[arg(long, value_name = "SIZE")]
    pub(crate) sink_size: Option<Bytes>,

    /// Refuse sets with more bytes than this (K, M, G, T: powers of 1024)
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_bytes: Option<Bytes>,

    /// Superseded generations of each name to keep, besides those that others build on
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) keep: u64,

    /// Directory of the journals of live migrations, which `crxfer recover` reads [default:
    /// .crxfer/state in the receiving directory]
    ///
    /// It should survive what the receiving directory survives: the journal says which images in there
    /// are complete, and whose the workload is.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state: Option<PathBuf>,

    /// Key of this host (see `crxfer keygen`). Without it: one made and kept inside DIR
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) identity: Option<PathBuf>,

    /// Accept only the host with this key, and no tickets; may be repeated
    #[arg(long, value_name = "FINGERPRINT")]
    pub(crate) peer: Vec<Fingerprint>,

    /// Print one JSON object a line instead of text
    ///
    /// Objects: {"event":"listening","ticket","addresses","fingerprint"} when the socket is ready,
    /// {"event":"received","name","path","generation","layout","base","completeness","unchanged",
    /// "image_bytes","notes"} when a set is visible (name is null for an ancestor that was taken
    /// along), {"event":"restored","name","pid","address"} when a workload that came from that
    /// address runs here, {"event":"holding","id","name","address","images"} when a complete copy is
    /// held and the source has not said whose the workload is (see `crxfer recover`),
    /// {"event":"failed","address","error"} when a transfer ended early. Each line is written at once.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) restore: RestoreArgs,

    #[command(flatten)]
    pub(crate) transport: TransportArgs,
}

/// Where sets go, and who sends them.
#[derive(Debug, Args)]
pub(crate) struct DestinationArgs {
    /// A ticket, @FILE that holds one, - to read one from stdin, or HOST:PORT (needs --peer)
    #[arg(long, value_name = "TICKET|@FILE|-|HOST:PORT")]
    pub(crate) to: String,

    /// Key of this host [default: crxfer/identity.pem in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) identity: Option<PathBuf>,

    /// Key that the destination must have, with --to HOST:PORT; may be repeated
    #[arg(long, value_name = "FINGERPRINT")]
    pub(crate) peer: Vec<Fingerprint>,
}

impl DestinationArgs {
    /// Reads files, stdin and names as needed: blocks.
    pub(crate) fn target(&self) -> Result<Target, Failed> {
        target::find(&self.to, &self.peer, self.identity.is_some())
    }

    /// The same from a task.
    pub(crate) async fn target_later(&self) -> Result<Target, Failed> {
        target::find_later(self.to.clone(), self.peer.clone(), self.identity.is_some()).await
    }
}

/// Send an image directory, with what it builds on
///
/// Returns when the destination has checked, stored and published all of it. What the destination
/// holds already, from an earlier set of this host or from a transfer that ended early, is not sent
/// again. If anything goes wrong nothing is published, and the same command goes on where it ended.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer send ./dump --to crxfer1-…
  ssh host cat ticket | crxfer send ./dump --to - --name web-1
  crxfer send ./dump --to host:4433 --identity key.pem --peer crxkey1-… --bwlimit 50M")]
pub(crate) struct SendArgs {
    /// The image directory: what `criu dump -D` wrote
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    #[command(flatten)]
    pub(crate) destination: DestinationArgs,

    /// Name of the set at the destination [default: the directory's name]
    #[arg(long, value_parser = set_name)]
    pub(crate) name: Option<SetName>,

    /// Received set to build on [default: the destination finds the best one]
    #[arg(long, value_name = "NAME", value_parser = set_name)]
    pub(crate) base: Option<SetName>,

    /// Most bytes (not bits) a second on the wire (K, M, G: powers of 1024)
    #[arg(long, value_name = "RATE")]
    pub(crate) bwlimit: Option<Rate>,

    /// Page size in bytes of the host that dumped [default: found from the files]
    #[arg(long, value_name = "BYTES", value_parser = page_size)]
    pub(crate) page_size: Option<PageSize>,

    /// Read every file, even those that are known to be unchanged since they were last sent
    #[arg(long)]
    pub(crate) reread: bool,

    /// Print one JSON object a line instead of progress bar and summary
    ///
    /// {"event":"begin","name","bytes","ancestor"} when a set begins,
    /// {"event":"progress","name","done","total","wire","bytes_per_second"} at most five times a
    /// second (bytes of the set's files that are dealt with, bytes on the wire so far), and as last
    /// line either {"event":"done",…} or {"event":"error","error","exit_code"}. "done" is printed
    /// only after the destination has acknowledged that the set is stored.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) transport: TransportArgs,
}

/// Settings of the connection.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct TransportArgs {
    /// Congestion control: cubic, bbr (for lossy links) or newreno
    #[arg(long, value_name = "NAME", default_value_t = CongestionControl::Cubic)]
    pub(crate) cc: CongestionControl,

    /// Without UDP segmentation offload, for network drivers that break it
    #[arg(long)]
    pub(crate) no_gso: bool,
}

impl TransportArgs {
    pub(crate) fn to_options(&self) -> Options {
        Options {
            congestion_control: self.cc,
            segmentation_offload: !self.no_gso,
            ..Options::default()
        }
    }
}

/// Show what an image directory holds
///
/// Processes, pages (zero, duplicate, from the parent), sizes, CRIU's version and figures, and
/// whether CRIU could restore it. Reads every page once. Exit code 3 if it is damaged.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer inspect ./dump
  crxfer inspect --json ./dump | jq .completeness.state")]
pub(crate) struct InspectArgs {
    /// The image directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// Page size in bytes of the host that dumped [default: found from the files]
    #[arg(long, value_name = "BYTES", value_parser = page_size)]
    pub(crate) page_size: Option<PageSize>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Check received sets against their digests
///
/// DIR is a received set: every file of it and of all that it builds on is hashed again and
/// compared, and the chain must be complete. With a receiving directory, all its sets are checked.
/// Any other image directory has no digests to compare with: then only completeness is checked,
/// and the command says so. Exit code 3 if anything is wrong.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer verify /var/lib/images/web-1
  crxfer verify --json /var/lib/images")]
pub(crate) struct VerifyArgs {
    /// A received set, a receiving directory, or any image directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// Print one JSON object a line, one for each set
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show which pages differ between two image directories
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer diff images/1 images/2
  crxfer diff --json images/1 images/2 | jq '.memory[].changed'")]
pub(crate) struct DiffArgs {
    /// The earlier one
    #[arg(value_name = "A", value_hint = ValueHint::DirPath)]
    pub(crate) before: PathBuf,

    /// The later one
    #[arg(value_name = "B", value_hint = ValueHint::DirPath)]
    pub(crate) after: PathBuf,

    /// Page size in bytes of the host that dumped [default: found from the files]
    #[arg(long, value_name = "BYTES", value_parser = page_size)]
    pub(crate) page_size: Option<PageSize>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Write an image directory and its parents as one directory without a parent
///
/// OUT appears complete or not at all. Absolute parent links are followed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer flatten images/3 flat
  crxfer flatten images/3 flat && criu restore -D flat")]
pub(crate) struct FlattenArgs {
    /// The newest image directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// The directory to make; must not exist
    #[arg(value_name = "OUT", value_hint = ValueHint::AnyPath)]
    pub(crate) out: PathBuf,

    /// Page size in bytes of the host that dumped [default: found from the files]
    #[arg(long, value_name = "BYTES", value_parser = page_size)]
    pub(crate) page_size: Option<PageSize>,
}

/// List the sets of a receiving directory
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer list /var/lib/images
  crxfer list --all --json /var/lib/images | jq -r .sets[].name")]
pub(crate) struct ListArgs {
    /// The receiving directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// Also superseded generations that are kept, and ancestors that were taken along
    #[arg(short, long)]
    pub(crate) all: bool,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Remove sets from a receiving directory
///
/// What other sets build on stays, without a name, until they are removed as well.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer rm /var/lib/images web-1
  crxfer rm /var/lib/images web-1 web-2")]
pub(crate) struct RmArgs {
    /// The receiving directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// Names of the sets
    #[arg(value_name = "NAME", required = true, value_parser = set_name)]
    pub(crate) names: Vec<SetName>,
}

/// Make a key for this host, and print its fingerprint
///
/// For hosts that send to each other without tickets: each has a key (--identity) and is given the
/// other's fingerprint (--peer). If FILE exists it is left alone.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer keygen /etc/crxfer/key.pem
  PEER=$(crxfer keygen key.pem)")]
pub(crate) struct KeygenArgs {
    /// The file to make (mode 0600)
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer completions bash > /usr/share/bash-completion/completions/crxfer
  crxfer completions zsh > ~/.zfunc/_crxfer")]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// Print the man page, or write those of all commands into a directory
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer man | man -l -
  crxfer man /usr/local/share/man/man1")]
pub(crate) struct ManArgs {
    /// Directory to write to
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: Option<PathBuf>,
}

/// `--sink`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum SinkArg {
    /// In DIR, synced before it is acknowledged
    Disk,
    /// In DIR, which must be on a tmpfs
    Tmpfs,
    /// In memory of this process only
    Memory,
}

impl From<SinkArg> for SinkKind {
    fn from(sink: SinkArg) -> Self {
        match sink {
            SinkArg::Disk => Self::Disk,
            SinkArg::Tmpfs => Self::Tmpfs,
            SinkArg::Memory => Self::Memory,
        }
    }
}

/// `--layout`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LayoutArg {
    /// The same files, byte for byte
    Faithful,
    /// Pages that did not change are left to the set before
    Incremental,
    /// One directory without a parent
    Flat,
}

impl From<LayoutArg> for Layout {
    fn from(layout: LayoutArg) -> Self {
        match layout {
            LayoutArg::Faithful => Self::Faithful,
            LayoutArg::Incremental => Self::Incremental,
            LayoutArg::Flat => Self::Flat,
        }
    }
}

fn set_name(text: &str) -> Result<SetName, crxfer::delta::BadName> {
    SetName::new(text)
}

fn page_size(text: &str) -> Result<PageSize, String> {
    let bytes: Bytes = text
        .parse()
        .map_err(|error: crate::size::BadSize| error.to_string())?;
    PageSize::new(bytes.0).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_teaches_by_example() {
        for command in Cli::command().get_subcommands() {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            let examples = help.lines().filter(|line| line.contains("crxfer ")).count();
            assert!((2..=3).contains(&examples), "{}", command.get_name());
        }
    }
}
