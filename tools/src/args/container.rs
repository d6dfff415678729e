//! Containers: dumped and restored by their own runtimes.

use std::path::PathBuf;

use clap::{Args, ValueHint};

/// On the source.
#[derive(Debug, Args)]
#[command(next_help_heading = "Containers")]
pub(crate) struct ContainerArgs {
    /// Move this container of runc; `crxfer recv --runc-bundles` takes it
    #[arg(long, value_name = "ID", conflicts_with_all = ["pid", "dump_with"])]
    pub(crate) runc: Option<String>,

    /// runc's directory of containers [default: runc's own]
    #[arg(long, value_name = "DIR", requires = "runc", value_hint = ValueHint::DirPath)]
    pub(crate) runc_root: Option<PathBuf>,

    /// Dump by this command in the place of CRIU, as a container's runtime does
    ///
    /// Run by `sh -c` at the freeze, with CRXFER_PID, CRXFER_NAME, CRXFER_CONTAINER, CRXFER_IMAGES
    /// (an empty directory for the images), CRXFER_WORK (for logs), CRXFER_OPTIONS,
    /// CRXFER_PAGE_SERVER_ADDRESS and CRXFER_PAGE_SERVER_PORT (for memory, which may also be among
    /// the images) and CRXFER_ACTION_SCRIPT: what CRIU must run as its action script, or
    /// `crxfer action`. It waits there until the copy runs. Exit code 0: the workload is dumped and
    /// gone.
    #[arg(long, value_name = "COMMAND", requires = "restore_as")]
    pub(crate) dump_with: Option<String>,

    /// What the destination restores it as: a RUNTIME of its --restore-with
    #[arg(long, value_name = "RUNTIME", requires = "dump_with")]
    pub(crate) restore_as: Option<String>,

    /// Name of the container there [default: that of --runc, else none]
    #[arg(long, value_name = "NAME")]
    pub(crate) container: Option<String>,
}

/// On the destination.
#[derive(Debug, Args)]
#[command(next_help_heading = "Containers")]
pub(crate) struct RuntimeArgs {
    /// Restore what comes as RUNTIME by this command; may be repeated
    ///
    /// Run by `sh -c` with CRXFER_IMAGES, CRXFER_WORK (for logs; CRIU's should be restore.log),
    /// CRXFER_NAME, CRXFER_CONTAINER, CRXFER_OPTIONS and CRXFER_ACTION_SCRIPT, as --dump-with. CRIU
    /// waits in post-restore until the source has given the workload up. The command ends with 0
    /// when the workload runs, detached from it.
    #[arg(
        long,
        value_name = "RUNTIME=COMMAND",
        requires = "allow_restore",
        value_parser = named
    )]
    pub(crate) restore_with: Vec<(String, String)>,

    /// Remove by this command what a restore of RUNTIME that was cut short has left; may be repeated
    #[arg(
        long,
        value_name = "RUNTIME=COMMAND",
        requires = "restore_with",
        value_parser = named
    )]
    pub(crate) remove_with: Vec<(String, String)>,

    /// Take containers of runc: DIR/ID is the bundle of container ID
    #[arg(long, value_name = "DIR", requires = "allow_restore", value_hint = ValueHint::DirPath)]
    pub(crate) runc_bundles: Option<PathBuf>,

    /// runc's directory of containers [default: runc's own]
    #[arg(long, value_name = "DIR", requires = "runc_bundles", value_hint = ValueHint::DirPath)]
    pub(crate) runc_root: Option<PathBuf>,
}

/// Have runc's CRIU wait for the other host
///
/// Writes an action script beside FILE, and the lines that FILE lacks: `action-script` and
/// `network-lock nftables`. What else is in it stays. Needed once on each host whose containers are
/// moved; a CRIU that is of no migration does not notice.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer runc-setup                                 once, on both hosts
  crxfer recv --dir /var/lib/images --allow-restore --runc-bundles /srv/bundles
  crxfer migrate --runc web --to crxfer1-…          moves the container")]
pub(crate) struct RuncSetupArgs {
    /// The file with runc's options for CRIU
    #[arg(long, value_name = "FILE", default_value = "/etc/criu/runc.conf",
        value_hint = ValueHint::FilePath)]
    pub(crate) conf: PathBuf,
}

fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, command)) if !name.is_empty() && !command.is_empty() => {
            Ok((name.to_owned(), command.to_owned()))
        }
        _ => Err("write RUNTIME=COMMAND".to_owned()),
    }
}
