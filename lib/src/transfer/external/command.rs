//! A command that starts CRIU, from its start to its end.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::action::{self, Report};
use crate::criu::{CriuError, Operation, Stage, Verdict};
use crate::runtime::ActionProgram;
use crate::transfer::pause;
use crate::tree::Process;

/// Waits for a line before it runs the command, so that its process is known before it does anything.
const WAIT_AND_RUN: &str = r#"IFS= read -r go && [ "$go" = go ] && exec sh -c "$1" </dev/null"#;

/// How long a command may take to end when its CRIU was refused, or is to be given up.
const GRACE: Duration = Duration::from_secs(5);

/// How long a CRIU that was refused may have ended before its command counts as ended, too: the tree
/// is let go by then, and only tidying is left.
const TIDY_TIME: Duration = Duration::from_millis(100);

/// Between looks at what cannot be waited for.
const STEP: Duration = Duration::from_millis(50);

/// The same where somebody waits.
const SHORT_STEP: Duration = Duration::from_millis(5);

/// How much of what a command printed is quoted.
const MOST_OUTPUT_BYTES: u64 = 1000;

/// Variables of a command that are not of its place.
pub(in crate::transfer) type Variables = Vec<(&'static str, String)>;

/// Ends a command from another thread.
#[derive(Clone, Debug)]
pub(in crate::transfer) struct Canceller(Arc<Shared>);

impl Canceller {
    /// Refuses whatever comes next. Without effect once the decisive stage was accepted.
    pub(in crate::transfer) fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.wake();
    }

    /// Kills CRIU and the command at once.
    pub(in crate::transfer) fn kill(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.kill();
        self.0.wake();
    }
}

#[derive(Debug)]
struct Shared {
    leader: Process,
    criu: Mutex<Option<Process>>,
    cancelled: AtomicBool,
    wake: OwnedFd,
}

impl Shared {
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn criu(&self) -> Option<Process> {
        *self.criu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kill(&self) {
        if let Some(criu) = self.criu() {
            let _ = criu.kill();
        }
        kill_group(self.leader);
    }
}

/// Kills the command whose first process is, or was, `leader`, and all that it has started in its group.
pub(in crate::transfer) fn kill_group(leader: Process) {
    // Its number may belong to another by now.
    if Process::dead_or_alive(leader.pid).is_some_and(|now| now != leader) {
        return;
    }
    if let Some(group) = i32::try_from(leader.pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// A command that waits to be run, or runs.
#[derive(Debug)]
pub(in crate::transfer) struct External {
    operation: Operation,
    // None when it was waited for.
    child: Option<Child>,
    process: OwnedFd,
    go: Option<ChildStdin>,
    listener: UnixListener,
    work: PathBuf,
    output: File,
    shared: Arc<Shared>,
    // What was said at a stage: a runtime may have the script twice.
    answered: Vec<(Stage, Verdict)>,
}

impl External {
    /// Starts a shell that waits with `command`. Its socket and script are made in `place`; `work` is
    /// where CRIU's logs go.
    pub(in crate::transfer) fn start(
        operation: Operation,
        command: &str,
        place: &Path,
        images: &Path,
        variables: Variables,
        program: &ActionProgram,
    ) -> Result<Self, CriuError> {
        let work = place.join("work");
        if !work.is_dir() {
            fs::create_dir(&work).map_err(CriuError::io("make a directory for logs"))?;
        }
        let (listener, script) = action::listen(place, program)
            .map_err(CriuError::io("make a socket for the action script"))?;
        let output = rustix::fs::memfd_create("command-output", MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(CriuError::io("make a file for output"))?;
        let copy = || {
            output
                .try_clone()
                .map_err(CriuError::io("duplicate a descriptor"))
        };
        let mut shell = Command::new("sh");
        shell
            .args(["-c", WAIT_AND_RUN, "sh", command])
            .envs(variables)
            .env("CRXFER_IMAGES", images)
            .env("CRXFER_WORK", &work)
            .env("CRXFER_ACTION_SCRIPT", &script)
            .env(action::SOCKET, place.join(action::SOCKET_NAME))
            .stdin(Stdio::piped())
            .stdout(copy()?)
            .stderr(copy()?);
        for variable in pause::VARIABLES {
            shell.env_remove(variable);
        }
        // In this session: the receiver's reaper leaves those alone.
        shell.process_group(0);
        let mut child = shell.spawn().map_err(|source| CriuError::Start {
            program: "sh".into(),
            source,
        })?;
        let go = child.stdin.take();
        let opened = (|| -> Result<_, Errno> {
            let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let leader = Process::of(child.id()).ok_or(Errno::SRCH)?;
            Ok((process, wake, leader))
        })();
        let (process, wake, leader) = match opened {
            Ok(opened) => opened,
            Err(errno) => {
                drop(go);
                let _ = child.wait();
                return Err(CriuError::io("watch a command")(errno));
            }
        };
        Ok(Self {
            operation,
            child: Some(child),
            process,
            go,
            listener,
            work,
            output,
            shared: Arc::new(Shared {
                leader,
                criu: Mutex::default(),
                cancelled: AtomicBool::new(false),
                wake,
            }),
            answered: Vec::new(),
        })
    }

    /// Its first process, which leads its group.
    pub(in crate::transfer) fn leader(&self) -> Process {
        self.shared.leader
    }

    pub(in crate::transfer) fn canceller(&self) -> Canceller {
        Canceller(self.shared.clone())
    }

    /// Runs the command to its end, with `decide` asked at each of CRIU's stages.
    ///
    /// An error is what it is of a worker of our own: the tree runs on, or no copy runs. A command that
    /// ends well without having asked at the decisive stage has done something else.
    pub(in crate::transfer) fn run(
        &mut self,
        decide: &mut dyn FnMut(&Report) -> Verdict,
    ) -> Result<(), CriuError> {
        if let Some(mut go) = self.go.take() {
            // One that has died already is found below.
            let _ = go.write_all(b"go\n");
        }
        let mut given_up: Option<Instant> = None;
        let mut criu_gone: Option<Instant> = None;
        loop {
            let has_ended = self.wait()?;
            while let Some(report) = action::accept(&self.listener) {
                self.consult(report, decide);
            }
            if has_ended {
                let status = self.reap();
                return self.ended(status);
            }
            if self.is_decided() {
                continue;
            }
            let cancelled = self.shared.cancelled.load(Ordering::Acquire);
            if !cancelled && self.refused_at().is_none() {
                continue;
            }
            let since = *given_up.get_or_insert_with(now);
            let criu = self.shared.criu();
            if criu.is_none_or(|criu| !criu.is_there()) && self.refused_at().is_some() {
                let gone = *criu_gone.get_or_insert_with(now);
                if gone.elapsed() > TIDY_TIME {
                    return self.ended(None);
                }
            }
            if since.elapsed() > GRACE {
                self.shared.kill();
                self.reap();
                return Err(CriuError::Cancelled {
                    operation: self.operation,
                    killed: true,
                });
            }
        }
    }

    fn reap(&mut self) -> Option<ExitStatus> {
        self.child.take()?.wait().ok()
    }

    fn consult(&mut self, report: Report, decide: &mut dyn FnMut(&Report) -> Verdict) {
        let stage = report.stage;
        if let Some(criu) = report.criu {
            let known = self.shared.criu.lock();
            *known.unwrap_or_else(PoisonError::into_inner) = Some(criu);
        }
        let before = self.answered.iter().find(|(asked, _)| *asked == stage);
        let cancelled = self.shared.cancelled.load(Ordering::Acquire);
        let verdict = match before {
            Some((_, verdict)) => *verdict,
            None if cancelled && !self.is_decided() => Verdict::Refuse,
            None => decide(&report),
        };
        if before.is_none() {
            self.answered.push((stage, verdict));
        }
        report.answer(verdict == Verdict::GoOn);
    }

    fn is_decided(&self) -> bool {
        let decided =
            |(stage, verdict): &(Stage, Verdict)| stage.is_decisive() && *verdict == Verdict::GoOn;
        self.answered.iter().any(decided)
    }

    fn refused_at(&self) -> Option<Stage> {
        let mut refused = self.answered.iter();
        let refused = refused.find(|(_, verdict)| *verdict == Verdict::Refuse);
        refused.map(|(stage, _)| *stage)
    }

    /// Waits for a report, the end of the command (true), or a while.
    fn wait(&self) -> Result<bool, CriuError> {
        let mut polled = [
            PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
            PollFd::new(&self.process, PollFlags::IN),
            PollFd::new(&self.shared.wake, PollFlags::IN),
        ];
        let step = Timespec::try_from(STEP).ok();
        match poll(&mut polled, step.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(CriuError::Io {
                    pid: self.shared.leader.pid,
                    action: "wait for a command",
                    source: errno.into(),
                });
            }
        }
        let woken = !polled[2].revents().is_empty();
        let ended = !polled[1].revents().is_empty();
        if woken {
            let _ = rustix::io::read(&self.shared.wake, &mut [0_u8; 8]);
        }
        Ok(ended)
    }

    // `None`: it goes on without us, refused.
    fn ended(&mut self, status: Option<ExitStatus>) -> Result<(), CriuError> {
        let operation = self.operation;
        if let Some(stage) = self.refused_at() {
            return Err(CriuError::Refused { operation, stage });
        }
        if self.shared.cancelled.load(Ordering::Acquire) && !self.is_decided() {
            let killed = !self.is_tidy();
            return Err(CriuError::Cancelled { operation, killed });
        }
        let is_success = status.is_some_and(|status| status.success());
        if is_success && self.is_decided() {
            return Ok(());
        }
        let was_asked = !self.answered.is_empty();
        if is_success && operation == Operation::Restore && !was_asked {
            // Whatever it did: the runtime has to forget it.
            if let Some(place) = self.work.parent() {
                action::begin(place, None);
            }
        }
        let how = match (is_success, status) {
            (true, _) if operation == Operation::Restore => {
                "ended well without having asked whether it may: a copy may run on the destination, \
                 look there and end it; does its CRIU run $CRXFER_ACTION_SCRIPT, or `crxfer action`, \
                 as action script?"
                    .to_owned()
            }
            (true, _) => "ended well without having asked whether it may: does its CRIU run \
                          $CRXFER_ACTION_SCRIPT, or `crxfer action`, as action script?"
                .to_owned(),
            (false, Some(status)) => format!("failed ({status})"),
            (false, None) => "was lost".to_owned(),
        };
        Err(CriuError::Command {
            operation,
            how,
            output: self.printed(),
            log: Some(self.log()).filter(|log| log.exists()),
            died: !self.is_tidy(),
        })
    }

    fn log(&self) -> PathBuf {
        self.work.join(match self.operation {
            Operation::Restore => "restore.log",
            _ => "dump.log",
        })
    }

    /// Whether CRIU, if it has begun, is known to have tidied up before it ended.
    fn is_tidy(&self) -> bool {
        if self.answered.is_empty() {
            return true;
        }
        let end = end_of(&self.log()).unwrap_or_default();
        [
            "Dumping FAILED",
            "Restoring FAILED",
            "finished successfully",
        ]
        .iter()
        .any(|words| end.contains(words))
    }

    fn printed(&mut self) -> String {
        let mut text = Vec::new();
        let length = self.output.metadata().map_or(0, |about| about.len());
        let from = length.saturating_sub(MOST_OUTPUT_BYTES);
        let read = self.output.seek(SeekFrom::Start(from)).and_then(|_| {
            (&self.output)
                .take(MOST_OUTPUT_BYTES)
                .read_to_end(&mut text)
        });
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let last = lines[lines.len().saturating_sub(3)..].join(" / ");
        match read {
            Ok(1..) => format!(": {}", last.replace(char::is_control, " ")),
            _ => String::new(),
        }
    }
}

fn end_of(log: &Path) -> io::Result<String> {
    const MOST_LOG_BYTES: u64 = 4096;
    let mut file = File::open(log)?;
    let from = file.metadata()?.len().saturating_sub(MOST_LOG_BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut end = Vec::new();
    file.take(MOST_LOG_BYTES).read_to_end(&mut end)?;
    Ok(String::from_utf8_lossy(&end).into_owned())
}

impl Drop for External {
    fn drop(&mut self) {
        // A shell that waits reads the end of its input.
        drop(self.go.take());
        let Some(mut child) = self.child.take() else {
            return;
        };
        let leader = self.shared.leader;
        // It may have tidying to do that nobody waits for.
        let reap = move || {
            let until = now() + GRACE;
            while now() < until {
                if !matches!(child.try_wait(), Ok(None)) {
                    return;
                }
                std::thread::sleep(STEP);
            }
            kill_group(leader);
            let _ = child.wait();
        };
        let _ = std::thread::Builder::new()
            .name("reap".to_owned())
            .spawn(reap);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a driver: it waits for another process"
)]
fn now() -> Instant {
    Instant::now()
}

/// Runs a command of the operator's that tidies up, to its end or for `longest`. Blocks.
pub(in crate::transfer) fn run_to_end(
    command: &str,
    work: &Path,
    variables: Variables,
    longest: Duration,
) -> Result<(), String> {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .envs(variables)
        .env("CRXFER_WORK", work)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    for variable in pause::VARIABLES {
        shell.env_remove(variable);
    }
    let failed = |what: String| format!("`{command}` {what}");
    let mut child = shell
        .spawn()
        .map_err(|error| failed(format!("cannot be run: {error}")))?;
    let leader = Process::of(child.id());
    let until = now() + longest;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(failed(format!("failed ({status})"))),
            Ok(None) if now() < until => std::thread::sleep(SHORT_STEP),
            _ => break,
        }
    }
    if let Some(leader) = leader {
        kill_group(leader);
    }
    let _ = child.wait();
    Err(failed(format!("did not end in {} s", longest.as_secs())))
}
