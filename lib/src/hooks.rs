//! Commands of the operator at named moments of a migration.
//!
//! A hook does what crxfer cannot know: move a service address, copy files that changed, stop a
//! supervisor. Each [`Moment`] has a contract: what state the workload is in, who waits, and what
//! a failure does.
//!
//! | moment | side | the workload | who waits | a failure |
//! |---|---|---|---|---|
//! | `before-first-iteration` | source | runs on the source | the migration | ends the migration |
//! | `before-freeze` | source | runs on the source | the migration | ends the migration |
//! | `address-prepare` | destination | runs on the source | the migration | ends the migration |
//! | `after-freeze` | source | is frozen: costs downtime | the dump | resumes it on the source |
//! | `before-restore` | destination | is frozen: costs downtime | the restore | resumes it on the source |
//! | `before-source-kill` | source | is frozen on both, the destination has voted: costs downtime | the commit | resumes it on the source |
//! | `address-announce` | destination | is committed to the destination and being let go there | nobody | is reported |
//! | `after-restore` | destination | runs on the destination | the destination's report | is reported |
//! | `after-commit` | source | is gone from the source | the end of the migration | is reported |
//! | `after-abort` | both | runs on the source, the destination is clean | the end of the migration | is reported |
//!
//! - `address-prepare` must be silent on the network: the source still has the address. It makes
//!   the address one that sockets can be bound to, on no link (docs/HOOKS.md).
//! - `address-announce` puts it on its link and tells the neighbours.
//! - On a side where a migration failed, `after-abort` also runs when a hook was what failed. It must
//!   undo what that side's earlier hooks did, and must work when they did nothing.
//! - After the commit there is no way back: those hooks should be tried before they are relied on.
//!
//! Each command is run by `sh -c` in a process group of its own, with nothing on its standard input.
//! It has the environment of crxfer and the variables of [`Environment`]. When its time is over, the
//! whole group is killed. What it prints is kept for the report, up to [`MOST_OUTPUT`] bytes. What it
//! leaves running in the background should have its output sent elsewhere.
//!
//! Names and addresses in the variables come from the other host: a command must quote them.

use std::fmt;
use std::io::{PipeReader, Read};
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of a command's output that are kept.
pub const MOST_OUTPUT: usize = 16 << 10;

/// What a command may take where nothing else is said. Three of the moments are downtime; an `ip`
/// command takes a few milliseconds, a gratuitous ARP a second if it is waited for.
pub const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait for the last output of a command that has ended: only what it left running in the
/// background can still hold its output open.
const LAST_OUTPUT: Duration = Duration::from_millis(20);

/// How long to wait for a killed command.
const KILLED: Duration = Duration::from_secs(1);

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the workload runs before.
    Source,
    /// Where it runs afterwards.
    Destination,
}

/// When a hook runs; the module has the contracts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Moment {
    /// Source: preflight has passed, nothing was touched.
    BeforeFirstIteration,
    /// Source: what can be sent beforehand is sent.
    BeforeFreeze,
    /// Destination, before the freeze: make the tree's addresses ones that it can bind to, silently.
    AddressPrepare,
    /// Source: the tree is frozen and being dumped.
    AfterFreeze,
    /// Destination: all images are there, CRIU has not begun.
    BeforeRestore,
    /// Source: the copy stands built on the destination; the last moment at which a failure saves the source.
    BeforeSourceKill,
    /// Destination: committed. Put the addresses on their link and tell the neighbours.
    AddressAnnounce,
    /// Destination: the workload runs.
    AfterRestore,
    /// Source: the tree is gone.
    AfterCommit,
    /// Either: the migration failed, the tree runs on the source.
    AfterAbort,
}

impl Moment {
    /// Every moment, in the order in which a migration comes to them.
    pub const ALL: [Self; 10] = [
        Self::BeforeFirstIteration,
        Self::BeforeFreeze,
        Self::AddressPrepare,
        Self::AfterFreeze,
        Self::BeforeRestore,
        Self::BeforeSourceKill,
        Self::AddressAnnounce,
        Self::AfterRestore,
        Self::AfterCommit,
        Self::AfterAbort,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::BeforeFirstIteration => "before-first-iteration",
            Self::BeforeFreeze => "before-freeze",
            Self::AddressPrepare => "address-prepare",
            Self::AfterFreeze => "after-freeze",
            Self::BeforeRestore => "before-restore",
            Self::BeforeSourceKill => "before-source-kill",
            Self::AddressAnnounce => "address-announce",
            Self::AfterRestore => "after-restore",
            Self::AfterCommit => "after-commit",
            Self::AfterAbort => "after-abort",
        }
    }

    /// Whether it exists on `side`.
    pub fn is_on(self, side: Side) -> bool {
        let destination = matches!(
            self,
            Self::AddressPrepare | Self::BeforeRestore | Self::AddressAnnounce | Self::AfterRestore
        );
        self == Self::AfterAbort || destination == (side == Side::Destination)
    }

    /// Whether a failure ends the migration; otherwise it is only reported.
    pub fn failure_aborts(self) -> bool {
        !matches!(
            self,
            Self::AddressAnnounce | Self::AfterRestore | Self::AfterCommit | Self::AfterAbort
        )
    }

    /// Whether the workload stands still meanwhile.
    pub fn costs_downtime(self) -> bool {
        matches!(
            self,
            Self::AfterFreeze | Self::BeforeRestore | Self::BeforeSourceKill
        )
    }
}

/// The commands of one side.
#[derive(Clone, Debug)]
pub struct Hooks {
    side: Side,
    hooks: Vec<Hook>,
    time_limit: Duration,
}

/// A command and its moment: `MOMENT=COMMAND`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// When it runs.
    pub moment: Moment,
    /// What `sh -c` is given.
    pub command: String,
}

/// What the commands are told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `CRXFER_MIGRATION`: name of the migration, the same on both sides.
    pub migration: String,
    /// `CRXFER_PID`: the tree's root, as this side numbers it; absent before it is there.
    pub pid: Option<u32>,
    /// `CRXFER_PEER`: address of the other host.
    pub peer: Option<IpAddr>,
    /// `CRXFER_ADDRESSES`: local addresses that the tree's sockets are bound to, with a space between.
    pub addresses: Vec<IpAddr>,
    /// `CRXFER_IMAGES`: the directory of the images, on this side.
    pub images: Option<PathBuf>,
    /// `CRXFER_REASON`: why the migration failed, with [`Moment::AfterAbort`].
    pub reason: Option<String>,
}

/// What came of the commands of a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookRun {
    /// How long they took.
    pub duration: Duration,
    /// What they printed, both streams, without control characters other than line ends.
    pub output: String,
}

/// A command that did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started.
    #[error("hook {moment}: `{command}` could not be started")]
    Start {
        /// When.
        moment: Moment,
        /// Which command.
        command: String,
        /// Why.
        source: std::io::Error,
    },
    /// It ended with something else than 0.
    #[error("hook {moment}: `{command}` failed ({status}){}", shown(output))]
    Failed {
        /// When.
        moment: Moment,
        /// Which command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it had printed.
        output: String,
    },
    /// It took too long.
    #[error(
        "hook {moment}: `{command}` had not ended after {} s and was killed; --hook-timeout gives more{}",
        limit.as_secs_f32(), shown(output)
    )]
    TimedOut {
        /// When.
        moment: Moment,
        /// Which command.
        command: String,
        /// What it was given.
        limit: Duration,
        /// What it had printed.
        output: String,
    },
}

/// What is no hook.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookSyntaxError {
    /// There is no `=`, or nothing behind it.
    #[error("a hook is MOMENT=COMMAND, for example after-commit='logger moved'")]
    NotAHook,
    /// There is no such moment.
    #[error("there is no moment {0:?}; there are {names}", names = names(None))]
    UnknownMoment(String),
    /// It belongs to the other side.
    #[error("{0} is not a moment of the {1}; there are {names}", names = names(Some(*.1)))]
    OtherSide(Moment, Side),
}

impl Hooks {
    /// Commands of `side`; several of one moment run one after another, in this order, each with `time_limit`.
    ///
    /// # Errors
    /// When a moment does not exist on `side`.
    pub fn new(
        side: Side,
        hooks: Vec<Hook>,
        time_limit: Duration,
    ) -> Result<Self, HookSyntaxError> {
        if let Some(hook) = hooks.iter().find(|hook| !hook.moment.is_on(side)) {
            return Err(HookSyntaxError::OtherSide(hook.moment, side));
        }
        Ok(Self {
            side,
            hooks,
            time_limit,
        })
    }

    /// No commands.
    pub fn none(side: Side) -> Self {
        Self {
            side,
            hooks: Vec::new(),
            time_limit: DEFAULT_TIME_LIMIT,
        }
    }

    /// All commands, as [`Hook`] reads them, in their order.
    pub fn commands(&self) -> Vec<String> {
        let text = |hook: &Hook| format!("{}={}", hook.moment, hook.command);
        self.hooks.iter().map(text).collect()
    }

    /// How long each command may take.
    pub fn time_limit(&self) -> Duration {
        self.time_limit
    }

    /// Whether there is a command for `moment`.
    pub fn has(&self, moment: Moment) -> bool {
        self.hooks.iter().any(|hook| hook.moment == moment)
    }

    /// Runs the commands of `moment` and waits for them; `None` where there are none.
    ///
    /// # Errors
    /// The first command that failed. Where a failure ends the migration, those behind it are not run.
    pub fn run(
        &self,
        moment: Moment,
        environment: &Environment,
    ) -> Result<Option<HookRun>, HookError> {
        if !self.has(moment) {
            return Ok(None);
        }
        let started = now();
        let mut output = String::new();
        let mut first_error = None;
        for hook in self.hooks.iter().filter(|hook| hook.moment == moment) {
            match self.run_one(hook, environment) {
                Ok(printed) => output.push_str(&printed),
                Err(error) if moment.failure_aborts() => return Err(error),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match first_error {
            Some(error) => Err(error),
            None => Ok(Some(HookRun {
                duration: now().saturating_duration_since(started),
                output,
            })),
        }
    }

    fn run_one(&self, hook: &Hook, environment: &Environment) -> Result<String, HookError> {
        let moment = hook.moment;
        let command = hook.command.clone();
        let mut running = match Running::start(hook, self.side, environment) {
            Ok(running) => running,
            Err(source) => {
                return Err(HookError::Start {
                    moment,
                    command,
                    source,
                });
            }
        };
        let ended = running.wait(self.time_limit);
        let output = running.output();
        match ended {
            None => Err(HookError::TimedOut {
                moment,
                command,
                limit: self.time_limit,
                output,
            }),
            Some(Err(source)) => Err(HookError::Start {
                moment,
                command,
                source,
            }),
            Some(Ok(status)) if status.success() => Ok(output),
            Some(Ok(status)) => Err(HookError::Failed {
                moment,
                command,
                status,
                output,
            }),
        }
    }
}

impl Environment {
    fn variables(&self, moment: Moment, side: Side) -> Vec<(&'static str, String)> {
        let addresses: Vec<_> = self.addresses.iter().map(IpAddr::to_string).collect();
        let images = self.images.as_ref();
        // Each is set, though it be empty: `set -u` in a command, and nothing from outside.
        vec![
            ("CRXFER_MOMENT", moment.to_string()),
            ("CRXFER_SIDE", side.to_string()),
            ("CRXFER_MIGRATION", self.migration.clone()),
            (
                "CRXFER_PID",
                self.pid.map_or_else(String::new, |pid| pid.to_string()),
            ),
            (
                "CRXFER_PEER",
                self.peer.map_or_else(String::new, |peer| peer.to_string()),
            ),
            ("CRXFER_ADDRESSES", addresses.join(" ")),
            (
                "CRXFER_IMAGES",
                images.map_or_else(String::new, |path| path.display().to_string()),
            ),
            (
                "CRXFER_REASON",
                self.reason.clone().unwrap_or_default().replace('\0', " "),
            ),
        ]
    }
}

/// A command that was started; two threads wait for its end and its output.
struct Running {
    group: Option<rustix::process::Pid>,
    ended: Receiver<std::io::Result<ExitStatus>>,
    printed: Arc<Mutex<Vec<u8>>>,
    closed: Receiver<()>,
}

impl Running {
    fn start(hook: &Hook, side: Side, environment: &Environment) -> std::io::Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(&hook.command)
            .envs(environment.variables(hook.moment, side))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()?;
        let group = i32::try_from(child.id()).ok();
        let group = group.and_then(rustix::process::Pid::from_raw);
        let (end, ended) = channel();
        thread::spawn(move || end.send(child.wait()));
        let printed = Arc::new(Mutex::new(Vec::new()));
        let (close, closed) = channel();
        let kept = Arc::clone(&printed);
        thread::spawn(move || {
            keep_output(reader, &kept);
            let _ = close.send(());
        });
        Ok(Self {
            group,
            ended,
            printed,
            closed,
        })
    }

    /// How it ended, or `None` when it had to be killed.
    fn wait(&mut self, limit: Duration) -> Option<std::io::Result<ExitStatus>> {
        if let Ok(ended) = self.ended.recv_timeout(limit) {
            return Some(ended);
        }
        if let Some(group) = self.group {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        // One that hangs in the kernel is left behind: the workload may be waiting, frozen.
        let _ = self.ended.recv_timeout(KILLED);
        None
    }

    fn output(&self) -> String {
        let _ = self.closed.recv_timeout(LAST_OUTPUT);
        let printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&printed)
            .chars()
            .map(|c| if c.is_control() && c != '\n' { ' ' } else { c })
            .collect()
    }
}

// Reads on behind the limit: a command must not stop at a full pipe.
fn keep_output(mut reader: PipeReader, kept: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MOST_OUTPUT - kept.len();
        kept.extend_from_slice(&buffer[..count.min(room)]);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the duration of a command is part of the report; nothing is decided by it"
)]
fn now() -> Instant {
    Instant::now()
}

/// The end of what was printed: shells and programs say last what went wrong.
fn shown(output: &str) -> String {
    let lines: Vec<_> = output
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    let last = lines[lines.len().saturating_sub(3)..].join(" / ");
    if last.is_empty() {
        last
    } else {
        format!(": {last}")
    }
}

fn names(side: Option<Side>) -> String {
    let there = |moment: &Moment| side.is_none_or(|side| moment.is_on(side));
    let names: Vec<_> = Moment::ALL
        .into_iter()
        .filter(there)
        .map(Moment::name)
        .collect();
    names.join(", ")
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

impl FromStr for Moment {
    type Err = HookSyntaxError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|moment| moment.name() == name);
        found.ok_or_else(|| HookSyntaxError::UnknownMoment(name.to_owned()))
    }
}

impl FromStr for Hook {
    type Err = HookSyntaxError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (moment, command) = text.split_once('=').ok_or(HookSyntaxError::NotAHook)?;
        if command.trim().is_empty() || command.contains('\0') {
            return Err(HookSyntaxError::NotAHook);
        }
        Ok(Self {
            moment: moment.trim().parse()?,
            command: command.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(commands: &[&str], limit: Duration) -> Hooks {
        let hooks = commands.iter().map(|text| text.parse().expect("a hook"));
        Hooks::new(Side::Source, hooks.collect(), limit).expect("moments of the source")
    }

    fn run(command: &str) -> Result<Option<HookRun>, HookError> {
        hooks(&[command], DEFAULT_TIME_LIMIT).run(Moment::BeforeFreeze, &Environment::default())
    }

    #[test]
    fn every_moment_reads_as_it_prints_and_is_on_a_side() {
        for moment in Moment::ALL {
            assert_eq!(moment.to_string().parse(), Ok(moment));
            let sides = [Side::Source, Side::Destination].map(|side| moment.is_on(side));
            assert!(sides.contains(&true));
            assert_eq!(sides == [true, true], moment == Moment::AfterAbort);
            assert!(moment.failure_aborts() || !moment.costs_downtime());
        }
    }

    #[test]
    fn a_hook_is_a_moment_and_a_command() {
        let hook: Hook = "after-commit=ip addr del $A dev eth0; x=1"
            .parse()
            .expect("a hook");
        assert_eq!(hook.moment, Moment::AfterCommit);
        assert_eq!(hook.command, "ip addr del $A dev eth0; x=1");
        let bad = |text: &str| text.parse::<Hook>().expect_err("no hook");
        assert_eq!(bad("after-commit"), HookSyntaxError::NotAHook);
        assert_eq!(bad("after-commit= "), HookSyntaxError::NotAHook);
        assert!(bad("after=true").to_string().contains("before-source-kill"));
        let hook = "address-prepare=true".parse().expect("a hook");
        let error = Hooks::new(Side::Source, vec![hook], DEFAULT_TIME_LIMIT);
        let text = error.expect_err("not of this side").to_string();
        assert!(
            text.contains("source") && !text.contains("address-announce"),
            "{text}"
        );
    }

    #[test]
    fn commands_are_told_what_happens() {
        let environment = Environment {
            migration: "m 1".into(),
            pid: Some(7),
            peer: "192.0.2.9".parse().ok(),
            addresses: vec![
                [192, 0, 2, 7].into(),
                "2001:db8::1".parse().expect("an address"),
            ],
            images: Some("/images".into()),
            reason: None,
        };
        let command = "before-freeze=echo \"$CRXFER_MOMENT|$CRXFER_SIDE|$CRXFER_MIGRATION|$CRXFER_PID|$CRXFER_PEER|\
            $CRXFER_ADDRESSES|$CRXFER_IMAGES|${CRXFER_REASON?}\"";
        let done = hooks(&[command], DEFAULT_TIME_LIMIT).run(Moment::BeforeFreeze, &environment);
        assert_eq!(
            done.expect("it succeeds").expect("there is one").output,
            "before-freeze|source|m 1|7|192.0.2.9|192.0.2.7 2001:db8::1|/images|\n"
        );
    }

    #[test]
    fn what_a_failing_command_printed_is_in_the_error() {
        let error = run("before-freeze=echo out; echo no route >&2; exit 3").expect_err("it fails");
        let text = error.to_string();
        assert!(
            text.contains("out / no route") && text.contains("before-freeze"),
            "{text}"
        );
        assert!(text.contains("exit status: 3"), "{text}");
        let missing = run("before-freeze=/nonexistent/program").expect_err("it fails");
        assert!(missing.to_string().contains("not found"), "{missing}");
    }

    #[test]
    fn a_slow_command_is_killed_with_its_children() {
        let directory = tempfile::tempdir().expect("a directory");
        let mark = directory.path().join("mark");
        let slow = format!(
            "before-freeze=echo begun; (sleep 0.4; touch {}) & wait",
            mark.display()
        );
        let limit = Duration::from_millis(150);
        let started = now();
        let error = hooks(&[&slow], limit).run(Moment::BeforeFreeze, &Environment::default());
        let text = error.expect_err("it takes too long").to_string();
        assert!(text.contains("killed") && text.contains("begun"), "{text}");
        assert!(started.elapsed() < Duration::from_millis(390));
        thread::sleep(Duration::from_millis(500));
        assert!(!mark.exists(), "a child went on");
    }

    #[test]
    fn output_is_bounded_and_printable() {
        let done = run("before-freeze=printf '\\033[2Ja\\n'; yes | head -c 1000000");
        let output = done.expect("it succeeds").expect("there is one").output;
        assert!(
            output.len() <= MOST_OUTPUT && output.starts_with(" [2Ja\n"),
            "{}",
            output.len()
        );
    }

    #[test]
    fn what_stays_in_the_background_is_not_waited_for() {
        let started = now();
        let done = run("before-freeze=echo here; sleep 1 &")
            .expect("it succeeds")
            .expect("there is one");
        assert_eq!(done.output, "here\n");
        assert!(started.elapsed() < Duration::from_millis(900));
    }

    #[test]
    fn a_failure_stops_the_rest_only_where_it_ends_the_migration() {
        let directory = tempfile::tempdir().expect("a directory");
        let mark = directory.path().join("mark");
        let touch = format!("touch {}", mark.display());
        for moment in [Moment::BeforeFreeze, Moment::AfterCommit] {
            let commands = [format!("{moment}=false"), format!("{moment}={touch}")];
            let hooks = hooks(&[&commands[0], &commands[1]], DEFAULT_TIME_LIMIT);
            hooks
                .run(moment, &Environment::default())
                .expect_err("the first fails");
            assert_eq!(mark.exists(), !moment.failure_aborts());
        }
        let none = Hooks::none(Side::Destination);
        let done = none.run(Moment::AddressAnnounce, &Environment::default());
        assert!(done.expect("nothing can fail").is_none());
    }
}
