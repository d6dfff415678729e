//! A client of `criu swrk`: one worker process, one operation.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crxfer_proto::criu::rpc::{Features, Opts, Req, ReqType, Resp};
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::causes;
use super::error::{CriuError, Failure, Operation};
use super::log;
use super::options::{DumpOptions, PreDumpOptions, RestoreOptions};
use super::process::{Canceller, GRACE, Process, io_error, now};
use super::stage::{Stage, Verdict};

/// Largest message that is taken from CRIU, in bytes. Its answers are numbers and one error message
/// of at most a few hundred bytes.
const MOST_MESSAGE_BYTES: usize = 64 << 10;

/// What this CRIU and this kernel can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// CRIU's version: major, minor, sublevel.
    pub version: (u32, u32, u32),
    /// Soft-dirty tracking: without it there are no pre-dumps.
    pub mem_track: bool,
    /// Restoring pages on first access.
    pub lazy_pages: bool,
    /// Keeping pidfds from one iteration to the next.
    pub pidfd_store: bool,
}

/// What an accepted dump said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpOutcome {
    /// CRIU's first error message, which may be there although the dump is good.
    pub message: Option<String>,
}

/// A restored tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Its root, as seen from this pid namespace.
    pub pid: u32,
}

/// One `criu swrk` process, ready before it is needed.
///
/// Starting, loading libraries and looking at the kernel take CRIU tens of milliseconds; a worker
/// does that when it is started and probed, before anything is frozen. Then it does one operation.
///
/// All calls block. Another thread ends them with a [`Canceller`]; [`Worker::set_deadline`] ends them
/// by time. Both close the socket for sending, which CRIU takes for a refusal at the next stage: a
/// dumped tree resumes, a half-made copy is killed. **CRIU only looks at its socket at a stage.**
/// While it sends memory it notices that socket's end instead: name it with
/// [`Worker::end_with`]. What does not end within 3 s is killed.
///
/// Once the caller went on at [`Stage::PostDump`] or [`Stage::PostRestore`] the deadline is off: the
/// tree is being given up or let run, and nobody could say any more which of the two happened.
///
/// Dropping a worker ends its process in the same way and reaps it.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    probe: Option<Probe>,
    deadline: Option<Instant>,
    /// Until when CRIU may clean up; then it is killed.
    grace: Option<Instant>,
    ended_by: Option<Ended>,
    used: bool,
    /// The decisive stage was accepted: no deadline and no canceller counts any more.
    decided: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Deadline,
    Canceller,
}

impl Worker {
    /// Starts `program` as a worker, in a process group of its own, so that Ctrl-C on the terminal
    /// reaches only the caller.
    ///
    /// `inherit` is a connected stream socket that the worker gets, for memory: one end of a UNIX
    /// socket pair whose other end the caller [serves](super::page_client::serve). `output` takes
    /// what the worker prints before it opens its log; if not given, that is kept in memory and
    /// quoted in [`CriuError::Gone`].
    pub fn start(
        program: &Path,
        inherit: Option<OwnedFd>,
        output: Option<File>,
    ) -> Result<Self, CriuError> {
        Ok(Self {
            process: Process::start(program, inherit, output)?,
            probe: None,
            deadline: None,
            grace: None,
            ended_by: None,
            used: false,
            decided: false,
        })
    }

    /// The worker's process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Number of the inherited socket inside the worker.
    pub fn inherited(&self) -> Option<RawFd> {
        self.process.inherited
    }

    /// A handle that ends this worker's calls from another thread.
    pub fn canceller(&self) -> Canceller {
        self.process.canceller()
    }

    /// When the calls that follow are given up; see [`Worker`] for how. `None`, the default, is never.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Also shuts `memory` down when a call is given up: a duplicate of our end of the socket for
    /// memory. A CRIU that waits for us to read then fails its dump and resumes the tree at once.
    pub fn end_with(&mut self, memory: OwnedFd) {
        let _ = self.process.shared.memory.set(memory);
    }

    /// Kills the worker at once, as [`Canceller::kill`].
    pub fn kill(&mut self) {
        self.process.shared.kill();
    }

    /// Versions and features. Afterwards the worker's program and libraries are in memory, and CRIU
    /// has its knowledge of this kernel on disk, so that none of it happens during a freeze.
    pub fn probe(&mut self) -> Result<Probe, CriuError> {
        const OPERATION: Operation = Operation::Probe;
        self.check_unused()?;
        self.request(OPERATION, ReqType::Version, None)?;
        let answer = self.answer(OPERATION, ReqType::Version)?;
        let version = answer
            .version
            .ok_or_else(|| self.protocol(OPERATION, "no version in its answer"))?;
        let number = |value: Option<i32>| u32::try_from(value.unwrap_or(0)).unwrap_or(0);
        self.request(OPERATION, ReqType::FeatureCheck, None)?;
        let answer = self.answer(OPERATION, ReqType::FeatureCheck)?;
        // Without success the check itself did not work: then nothing is known to be there.
        let features = answer.features.unwrap_or_default();
        let probe = Probe {
            version: (
                number(version.major),
                number(version.minor),
                number(version.sublevel),
            ),
            mem_track: features.mem_track.unwrap_or(false),
            lazy_pages: features.lazy_pages.unwrap_or(false),
            pidfd_store: features.pidfd_store.unwrap_or(false),
        };
        self.probe = Some(probe);
        Ok(probe)
    }

    /// The final dump: freezes the tree, writes the images, and asks `decide` at each stage with
    /// what CRIU tells of the root's pid.
    ///
    /// On any error the tree runs on.
    pub fn dump(
        &mut self,
        options: &DumpOptions<'_>,
        decide: &mut dyn FnMut(Stage, Option<u32>) -> Verdict,
    ) -> Result<DumpOutcome, CriuError> {
        if options.page_server {
            self.check_socket()?;
        }
        let message = options.message(self.process.inherited);
        let place = (options.work, options.log_file.as_str());
        let answer = self.run(Operation::Dump, ReqType::Dump, message, place, decide)?;
        Ok(DumpOutcome {
            message: log::message(answer.cr_errmsg.as_ref()),
        })
    }

    /// One iteration of CRIU's own pre-copy; the tree is frozen only while pages are collected.
    ///
    /// [Probed](Self::probe) before if it was not yet: without soft-dirty some versions of CRIU end
    /// here on an assertion. CRIU has no stages in a pre-dump.
    pub fn pre_dump(&mut self, options: &PreDumpOptions<'_>) -> Result<DumpOutcome, CriuError> {
        let probe = match self.probe {
            Some(probe) => probe,
            None => self.probe()?,
        };
        if !probe.mem_track {
            return Err(CriuError::NoSoftDirty);
        }
        if options.page_server {
            self.check_socket()?;
        }
        // Since 3.17; the older request keeps the worker waiting for more, which drop ends.
        let request = if probe.version >= (3, 17, 0) {
            ReqType::SinglePreDump
        } else {
            ReqType::PreDump
        };
        let message = options.message(self.process.inherited);
        let place = (options.work, options.log_file.as_str());
        let go_on = &mut |_, _| Verdict::GoOn;
        let answer = self.run(Operation::PreDump, request, message, place, go_on)?;
        Ok(DumpOutcome {
            message: log::message(answer.cr_errmsg.as_ref()),
        })
    }

    /// A restore: builds the copy, asks `decide` at each stage, and lets it run.
    ///
    /// On any error no copy runs, except as [`CriuError`] says of killed workers.
    pub fn restore(
        &mut self,
        options: &RestoreOptions<'_>,
        decide: &mut dyn FnMut(Stage, Option<u32>) -> Verdict,
    ) -> Result<Restored, CriuError> {
        const OPERATION: Operation = Operation::Restore;
        let place = (options.work, options.log_file.as_str());
        let message = options.message();
        let answer = self.run(OPERATION, ReqType::Restore, message, place, decide)?;
        let pid = answer.restore.and_then(|restored| restored.pid);
        pid.and_then(|pid| u32::try_from(pid).ok())
            .filter(|pid| *pid > 0)
            .map(|pid| Restored { pid })
            .ok_or_else(|| self.protocol(OPERATION, "no pid of the restored tree"))
    }

    /// One operation from its request to its answer.
    fn run(
        &mut self,
        operation: Operation,
        request: ReqType,
        message: Opts,
        (work, log_file): (BorrowedFd<'_>, &str),
        decide: &mut dyn FnMut(Stage, Option<u32>) -> Verdict,
    ) -> Result<Resp, CriuError> {
        self.check_unused()?;
        self.used = true;
        log::remove_old(work, log_file);
        self.request(operation, request, Some(message))?;
        let mut refused = None;
        loop {
            let answer = self.receive(operation)?;
            if answer.r#type() == ReqType::Notify {
                self.consult(operation, &answer, decide, &mut refused)?;
                continue;
            }
            // CRIU answers a request that it could not read as EMPTY.
            if answer.r#type() != request && answer.r#type() != ReqType::Empty {
                return Err(self.protocol(operation, "an answer to another request"));
            }
            if answer.success() {
                return Ok(answer);
            }
            return Err(match (refused, self.ended()) {
                (Some(stage), _) => CriuError::Refused { operation, stage },
                (None, Some(ended)) => self.ended_error(operation, ended),
                (None, None) => failed(operation, &answer, work, log_file),
            });
        }
    }

    /// Gives one notification to the caller and its verdict to CRIU.
    fn consult(
        &mut self,
        operation: Operation,
        notification: &Resp,
        decide: &mut dyn FnMut(Stage, Option<u32>) -> Verdict,
        refused: &mut Option<Stage>,
    ) -> Result<(), CriuError> {
        let notify = notification.notify.as_ref();
        let stage = Stage::named(notify.map_or("", |notify| notify.script()));
        let pid = notify.and_then(|notify| notify.pid);
        // CRIU's next read says what the canceller or the deadline said; nothing is asked any more.
        if self.ended().is_some() {
            return Ok(());
        }
        let verdict = decide(stage, pid.and_then(|pid| u32::try_from(pid).ok()));
        if verdict == Verdict::Refuse {
            refused.get_or_insert(stage);
        } else if self.has_passed() {
            // A decision that came too late is none.
            self.end(Ended::Deadline);
            return Ok(());
        } else if stage.is_decisive() {
            self.decided = true;
        }
        let reply = Req {
            r#type: Some(ReqType::Notify.into()),
            notify_success: Some(verdict == Verdict::GoOn),
            ..Default::default()
        };
        self.send(operation, &reply)
    }

    fn request(
        &self,
        operation: Operation,
        request: ReqType,
        opts: Option<Opts>,
    ) -> Result<(), CriuError> {
        let probing = opts.is_none();
        let features = Features {
            mem_track: Some(true),
            lazy_pages: Some(true),
            pidfd_store: Some(true),
        };
        let request = Req {
            r#type: Some(request.into()),
            opts,
            keep_open: probing.then_some(true),
            features: (request == ReqType::FeatureCheck).then_some(features),
            ..Default::default()
        };
        self.send(operation, &request)
    }

    fn send(&self, operation: Operation, message: &Req) -> Result<(), CriuError> {
        let bytes = message.encode_to_vec();
        loop {
            match send(&self.process.shared.socket, &bytes, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                // Our end is closed by the canceller, or CRIU is gone: the next read tells which.
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Ok(()),
                Err(errno) => {
                    let action = match operation {
                        Operation::Probe => "ask criu for its version",
                        _ => "send criu a request",
                    };
                    return Err(io_error(self.pid(), action)(errno));
                }
            }
        }
    }

    /// The answer to a probe's request.
    fn answer(&mut self, operation: Operation, request: ReqType) -> Result<Resp, CriuError> {
        let answer = self.receive(operation)?;
        if answer.r#type() == request {
            Ok(answer)
        } else {
            Err(self.protocol(operation, "an answer to another request"))
        }
    }

    /// The next message, or why there is none.
    fn receive(&mut self, operation: Operation) -> Result<Resp, CriuError> {
        let mut buffer = vec![0; MOST_MESSAGE_BYTES];
        loop {
            let process_ended = self.wait(operation)?;
            let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
            match recv(&self.process.shared.socket, buffer.as_mut_slice(), flags) {
                Ok((_, 0)) => return Err(self.gone(operation)),
                Ok((_, length)) => {
                    let bytes = buffer.get(..length);
                    let message = bytes.and_then(|bytes| Resp::decode(bytes).ok());
                    return message
                        .ok_or_else(|| self.protocol(operation, "a message that is none"));
                }
                Err(Errno::AGAIN) if process_ended => return Err(self.gone(operation)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(self.gone(operation)),
                Err(errno) => {
                    return Err(io_error(self.pid(), "receive from criu")(errno));
                }
            }
        }
    }

    /// Waits for a message or the end of the worker; true for the latter.
    fn wait(&mut self, operation: Operation) -> Result<bool, CriuError> {
        loop {
            let mut polled = [
                PollFd::new(&self.process.shared.socket, PollFlags::IN),
                PollFd::new(&self.process.shared.process, PollFlags::IN),
            ];
            let result = poll(&mut polled, self.time_left().as_ref());
            let ready = polled.each_ref().map(|fd| !fd.revents().is_empty());
            match result {
                Ok(0) | Err(Errno::INTR) => self.time_passed(),
                Ok(_) if ready[1] => return Ok(true),
                Ok(_) if ready[0] => return Ok(false),
                Ok(_) => {}
                Err(errno) => {
                    let action = match operation {
                        Operation::Restore => "wait for criu's restore",
                        _ => "wait for criu",
                    };
                    return Err(io_error(self.pid(), action)(errno));
                }
            }
        }
    }

    /// How long to sleep: until the deadline, or in short steps so that a cancelled worker's grace
    /// begins soon (its shutdown does not wake this end).
    fn time_left(&self) -> Option<Timespec> {
        const STEP: Duration = Duration::from_millis(100);
        let until = self.grace.or(self.deadline);
        let left = until.map_or(STEP, |until| until.saturating_duration_since(now()));
        Timespec::try_from(left.min(STEP)).ok()
    }

    fn time_passed(&mut self) {
        if self.decided {
            return;
        }
        if self.grace.is_none() {
            if self.process.shared.cancelled.load(Ordering::Acquire) {
                self.end(Ended::Canceller);
            } else if self.has_passed() {
                self.end(Ended::Deadline);
            }
        } else if self.grace.is_some_and(|grace| grace <= now()) && !self.process.killed {
            self.process.killed = true;
            self.process.shared.kill();
        }
    }

    fn has_passed(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now())
    }

    fn end(&mut self, by: Ended) {
        self.ended_by.get_or_insert(by);
        self.grace.get_or_insert_with(|| now() + GRACE);
        self.process.shared.refuse_further();
    }

    fn ended(&self) -> Option<Ended> {
        let cancelled = self.process.shared.cancelled.load(Ordering::Acquire);
        self.ended_by.or(cancelled.then_some(Ended::Canceller))
    }

    fn ended_error(&self, operation: Operation, ended: Ended) -> CriuError {
        let killed = self.process.killed;
        match ended {
            Ended::Canceller => CriuError::Cancelled { operation, killed },
            Ended::Deadline => CriuError::TimedOut { operation, killed },
        }
    }

    /// The worker closed its socket or ended; this reaps it.
    fn gone(&mut self, operation: Operation) -> CriuError {
        let status = self.process.reap();
        if let Some(ended) = self.ended() {
            // Also when somebody else's SIGKILL ended it: what was left behind is not known.
            self.process.killed |=
                status.is_none_or(|status| !status.success() && status.code().is_none());
            return self.ended_error(operation, ended);
        }
        CriuError::Gone {
            pid: self.pid(),
            operation,
            status: status.map_or_else(|| "killed".into(), |status| status.to_string()),
            output: self.process.printed(),
        }
    }

    fn check_unused(&self) -> Result<(), CriuError> {
        if self.used {
            return Err(CriuError::Used { pid: self.pid() });
        }
        Ok(())
    }

    fn check_socket(&self) -> Result<(), CriuError> {
        match self.process.inherited {
            Some(_) => Ok(()),
            None => Err(CriuError::NoSocket { pid: self.pid() }),
        }
    }

    fn protocol(&self, operation: Operation, what: &str) -> CriuError {
        CriuError::Protocol {
            pid: self.pid(),
            operation,
            what: what.to_owned(),
        }
    }
}

/// CRIU's refusal with all that its log adds.
fn failed(operation: Operation, answer: &Resp, work: BorrowedFd<'_>, log_file: &str) -> CriuError {
    let lines = log::error_lines(work, log_file);
    let message = log::message(answer.cr_errmsg.as_ref());
    let known = lines.iter().chain(&message).map(String::as_str);
    CriuError::Failed(Box::new(Failure {
        operation,
        advice: causes::advice(known),
        message,
        errno: answer.cr_errno,
        log: log::path(work, log_file),
        lines,
    }))
}

#[cfg(test)]
mod tests;
