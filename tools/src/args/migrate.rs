//! `crxfer migrate`, and what `crxfer recv` takes for the other end of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};
use crxfer::criu::{CgroupMode, CriuOptions};
use crxfer::delta::SetName;
use crxfer::hooks::{Hook, HookSyntaxError, Hooks, Side};
use crxfer::identity::Fingerprint;
use crxfer::precopy::{Goals, OnSlow};
use crxfer::transfer::migrate::{Mode, Precopy};

use super::container::{ContainerArgs, RuntimeArgs};
use super::recover::SafetyArgs;
use super::{TransportArgs, set_name};
use crate::exit;
use crate::size::Rate;

const EXAMPLES: &str = "\
Examples:
  crxfer migrate --pid 4711 --to crxfer1-… --dry-run
  crxfer migrate --pid 4711 --to @ticket --tcp-established --downtime 300 --report move.json
  crxfer migrate --pid 4711 --to @ticket --deadline 60 --hook before-source-kill='systemctl stop web'";

/// Move a running process tree to another host
///
/// While the tree runs, its memory is read and sent again and again, each time only what changed.
/// Then it is frozen, the rest is sent, and CRIU brings it to life where
/// `crxfer recv --allow-restore` waits. Here it is ended only after its copy stands there; until then
/// whatever goes wrong leaves it running here, and nothing there. Both sides are checked first
/// (--dry-run: only that). Needs root and CRIU on both hosts.
///
/// Each step is recorded before it is taken, and a guard goes on where this command dies: one copy
/// runs, never two. Where only the operator can say which, it is held until `crxfer recover`.
///
/// Ctrl-C stops it: the workload runs on here. In the moment in which nobody knows whether the copy
/// runs, it leaves the workload held, and the guard goes on.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = exit::help(EXAMPLES))]
pub(crate) struct MigrateArgs {
    /// Root of the process tree
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..),
        required_unless_present = "runc")]
    pub(crate) pid: Option<u32>,

    /// A ticket, @FILE that holds one, - to read one from stdin, or HOST:PORT (needs --peer)
    #[arg(long, value_name = "TICKET|@FILE|-|HOST:PORT")]
    pub(crate) to: String,

    /// Name of the migration [default: the program's name and the pid]
    #[arg(long, value_parser = set_name)]
    pub(crate) name: Option<SetName>,

    /// Only check whether it could work, on both sides; touch nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Go on where a check only guards against a risk
    #[arg(long)]
    pub(crate) force: bool,

    /// Also write the report to this file, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) report: Option<PathBuf>,

    /// How memory is copied while the tree runs
    #[arg(long, value_enum, default_value_t = PrecopyArg::Auto)]
    pub(crate) precopy: PrecopyArg,

    /// Where images are until the workload runs on the other host
    #[arg(long, value_enum, default_value_t = ModeArg::Diskless)]
    pub(crate) mode: ModeArg,

    /// Directory for the last, small images; with --mode diskless only for CRIU's log if it fails
    /// [default: /run/crxfer]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) work: Option<PathBuf>,

    /// Print one JSON object a line instead of progress and report
    ///
    /// {"event":"preflight","checks"}, {"event":"warning","text"}, {"event":"progress",…} at most
    /// five times a second, {"event":"iteration",…} when one is stored at the destination,
    /// {"event":"freezing"}, {"event":"built"} when the copy stands there, {"event":"in-doubt",…},
    /// and as last line either {"event":"done",…} with the whole report or
    /// {"event":"error","error","exit_code",…}. Times are in milliseconds.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) goals: GoalArgs,

    #[command(flatten)]
    pub(crate) safety: SafetyArgs,

    #[command(flatten)]
    pub(crate) criu: CriuArgs,

    #[command(flatten)]
    pub(crate) container: ContainerArgs,

    #[command(flatten)]
    pub(crate) hooks: HookArgs,

    #[command(flatten)]
    pub(crate) link: LinkArgs,

    #[command(flatten)]
    pub(crate) transport: TransportArgs,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ModeArg {
    /// In directories: --work here, the receiving directory there
    Disk,
    /// As disk; --work must be on a tmpfs
    Tmpfs,
    /// In memory only, on both hosts: no file of them is visible, and nothing is left whatever dies. If
    /// the other host crashes before the workload runs there, they are lost, and it runs on here
    Diskless,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Disk => Self::Disk,
            ModeArg::Tmpfs => Self::Tmpfs,
            ModeArg::Diskless => Self::Diskless,
        }
    }
}

/// When to freeze.
#[derive(Debug, Args)]
#[command(next_help_heading = "When to freeze")]
pub(crate) struct GoalArgs {
    /// Milliseconds that the workload may stand still, CRIU's part included
    /// [default: as few as iterations can reach]
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    pub(crate) downtime: Option<Duration>,

    /// Iterations at most before the freeze
    #[arg(long, value_name = "N", default_value_t = 30,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_iterations: u32,

    /// Seconds until the workload must run on the other host
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub(crate) deadline: Option<Duration>,

    /// Where --downtime is out of reach
    #[arg(long, value_enum, default_value_t = OnSlowArg::Freeze)]
    pub(crate) on_slow: OnSlowArg,

    /// Seconds frozen after which it runs on here, whatever happens
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub(crate) freeze_limit: Duration,
}

/// What CRIU is told.
#[derive(Debug, Args)]
#[command(next_help_heading = "CRIU")]
pub(crate) struct CriuArgs {
    /// The program
    #[arg(id = "criu", long = "criu", value_name = "PATH", default_value = "criu",
        value_hint = ValueHint::CommandName)]
    pub(crate) program: PathBuf,

    /// A file of CRIU's options for this host; it wins over these
    #[arg(id = "criu-config", long = "criu-config", value_name = "FILE",
        value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,

    /// Take open TCP connections along; needs the address to move with the workload
    #[arg(long)]
    pub(crate) tcp_established: bool,

    /// Let open TCP connections be closed on the other host
    #[arg(long, conflicts_with = "tcp_established")]
    pub(crate) tcp_close: bool,

    /// Drop TCP connections that are still being made: their clients try again
    #[arg(long)]
    pub(crate) skip_in_flight: bool,

    /// The tree was started from a terminal, which stays behind
    #[arg(long)]
    pub(crate) shell_job: bool,

    /// Take file locks along
    #[arg(long)]
    pub(crate) file_locks: bool,

    /// Give files that were deleted but are open a name, so that they can be opened there
    #[arg(long)]
    pub(crate) link_remap: bool,

    /// UNIX sockets may be connected to processes outside of the tree
    #[arg(long)]
    pub(crate) ext_unix_sk: bool,

    /// A resource from outside of the tree, as CRIU's --external; may be repeated
    #[arg(long, value_name = "RESOURCE")]
    pub(crate) external: Vec<String>,

    /// How cgroups are restored: ignore, none, props, soft, full or strict [default: CRIU's, soft]
    #[arg(long, value_name = "MODE", value_parser = cgroup_mode)]
    pub(crate) manage_cgroups: Option<CgroupMode>,
}

/// Commands at named moments.
#[derive(Debug, Args)]
#[command(next_help_heading = "Hooks")]
pub(crate) struct HookArgs {
    /// Run a command at a moment; may be repeated
    ///
    /// Moments, in order: before-first-iteration, before-freeze, after-freeze (frozen),
    /// before-source-kill (frozen, the copy stands built; the last moment to refuse), after-commit, and
    /// after-abort when it failed. Up to before-source-kill a command that fails ends the migration,
    /// and the workload runs on here. `crxfer recv` has those of the other side. Commands are run by
    /// `sh -c` with CRXFER_MOMENT, CRXFER_SIDE, CRXFER_MIGRATION, CRXFER_PID, CRXFER_PEER,
    /// CRXFER_ADDRESSES, CRXFER_IMAGES and CRXFER_REASON.
    #[arg(long = "hook", value_name = "MOMENT=COMMAND")]
    pub(crate) hooks: Vec<Hook>,

    /// Seconds that a command may take before it is killed and counts as failed
    #[arg(long, value_name = "S", default_value = "5", value_parser = seconds)]
    pub(crate) hook_timeout: Duration,
}

/// How fast, and who is there.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct LinkArgs {
    /// Most bytes (not bits) a second on the wire (K, M, G: powers of 1024)
    #[arg(long, value_name = "RATE")]
    pub(crate) bwlimit: Option<Rate>,

    /// Most bytes of memory read a second while the tree runs: reading takes a part of one core from
    /// it
    #[arg(long, value_name = "RATE", default_value = "1G")]
    pub(crate) read_limit: Rate,

    /// Key of this host [default: crxfer/identity.pem in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) identity: Option<PathBuf>,

    /// Key that the destination must have, with --to HOST:PORT; may be repeated
    #[arg(long, value_name = "FINGERPRINT")]
    pub(crate) peer: Vec<Fingerprint>,
}

/// The receiving side of `crxfer migrate`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Live migration")]
pub(crate) struct RestoreArgs {
    /// Also take process trees that `crxfer migrate` moves here, and run them
    ///
    /// Whoever may send here can then run programs here, as root. Without it they are refused.
    #[arg(long)]
    pub(crate) allow_restore: bool,

    /// The program CRIU
    #[arg(long, value_name = "PATH", default_value = "criu", requires = "allow_restore",
        value_hint = ValueHint::CommandName)]
    pub(crate) criu: PathBuf,

    /// A file of CRIU's options for this host; it wins over what the source asks for
    #[arg(long, value_name = "FILE", requires = "allow_restore",
        value_hint = ValueHint::FilePath)]
    pub(crate) criu_config: Option<PathBuf>,

    /// Run a command at a moment; may be repeated
    ///
    /// Moments, in order: address-prepare (the workload still runs on the source: nothing on the
    /// network may notice), before-restore (frozen), address-announce (it is ours now), after-restore,
    /// and after-abort when it failed. Up to before-restore a command that fails ends the migration.
    /// Commands are run as those of `crxfer migrate`.
    #[arg(
        long = "hook",
        value_name = "MOMENT=COMMAND",
        requires = "allow_restore"
    )]
    pub(crate) hooks: Vec<Hook>,

    /// Seconds that a command may take before it is killed and counts as failed
    #[arg(long, value_name = "S", default_value = "5", requires = "allow_restore",
        value_parser = seconds)]
    pub(crate) hook_timeout: Duration,

    #[command(flatten)]
    pub(crate) runtimes: RuntimeArgs,
}

/// `--precopy`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum PrecopyArg {
    /// By pre-dumps where CRIU and the kernel can do them, else live
    Auto,
    /// Read from outside; never stops the tree
    Live,
    /// By CRIU's pre-dumps; each stops the tree for some milliseconds, and the last stop is shorter.
    /// Needs a kernel that tracks writes (CONFIG_MEM_SOFT_DIRTY)
    PreDump,
}

impl From<PrecopyArg> for Precopy {
    fn from(precopy: PrecopyArg) -> Self {
        match precopy {
            PrecopyArg::Auto => Self::Auto,
            PrecopyArg::Live => Self::Live,
            PrecopyArg::PreDump => Self::PreDump,
        }
    }
}

/// `--on-slow`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum OnSlowArg {
    /// Come as close as iterations can, then freeze
    Freeze,
    /// Give up: the workload stays here
    Cancel,
    /// Go on, hoping for a quieter workload
    Wait,
}

impl From<OnSlowArg> for OnSlow {
    fn from(on_slow: OnSlowArg) -> Self {
        match on_slow {
            OnSlowArg::Freeze => Self::Freeze,
            OnSlowArg::Cancel => Self::Cancel,
            OnSlowArg::Wait => Self::Wait,
        }
    }
}

impl GoalArgs {
    pub(crate) fn to_goals(&self) -> Goals {
        Goals {
            downtime: self.downtime,
            max_iterations: self.max_iterations,
            deadline: self.deadline,
            freeze_limit: Some(self.freeze_limit),
            on_slow: self.on_slow.into(),
        }
    }
}

impl CriuArgs {
    pub(crate) fn to_options(&self) -> CriuOptions {
        CriuOptions {
            tcp_established: self.tcp_established,
            tcp_close: self.tcp_close,
            tcp_skip_in_flight: self.skip_in_flight,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            link_remap: self.link_remap,
            ext_unix_sk: self.ext_unix_sk,
            external: self.external.clone(),
            manage_cgroups: self.manage_cgroups,
            config_file: self.config.clone(),
            ..CriuOptions::default()
        }
    }
}

impl HookArgs {
    pub(crate) fn to_hooks(&self) -> Result<Hooks, HookSyntaxError> {
        Hooks::new(Side::Source, self.hooks.clone(), self.hook_timeout)
    }
}

fn cgroup_mode(word: &str) -> Result<CgroupMode, String> {
    CgroupMode::named(word)
        .ok_or_else(|| "there are ignore, none, props, soft, full and strict".to_owned())
}

pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    time(text, 1.0, "seconds, such as 10 or 0.5")
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    time(text, 1e-3, "milliseconds, such as 300")
}

/// A year is enough; nothing is done in no time.
fn time(text: &str, unit: f64, what: &str) -> Result<Duration, String> {
    const LONGEST: f64 = 366.0 * 86_400.0;
    let number: Option<f64> = text.parse().ok();
    let time = number.map(|number| number * unit);
    match time.filter(|&time| time > 0.0 && time <= LONGEST) {
        Some(time) => Ok(Duration::from_secs_f64(time)),
        None => Err(format!("write a number of {what}")),
    }
}

#[cfg(test)]
mod tests;
