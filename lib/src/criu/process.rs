//! The worker's process and its sockets.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::error::CriuError;

/// How long CRIU may take to clean up after it was cancelled or its time was over. It resumes or
/// kills a tree in milliseconds; the rest is for a busy host.
pub(super) const GRACE: Duration = Duration::from_secs(3);

/// How much of what a worker printed is quoted.
const MOST_OUTPUT_BYTES: u64 = 2000;

/// Ends a [`Worker`](super::Worker)'s operation from another thread.
#[derive(Clone, Debug)]
pub struct Canceller(Arc<Shared>);

impl Canceller {
    /// Refuses whatever comes next: CRIU resumes the tree, or kills the half-made copy.
    ///
    /// Without effect on an operation that was already accepted at its decisive stage. The waiting
    /// call returns what really happened.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.refuse_further();
    }

    /// Kills CRIU at once. A tree being dumped runs on, but its network lock stays and its
    /// connections may hang in repair mode; a restore may leave processes behind. For what does not
    /// react to [`Canceller::cancel`].
    pub fn kill(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.kill();
    }
}

/// What both the worker and its cancellers have.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) socket: OwnedFd,
    /// Of a process that is not reaped while anybody can signal it: a pidfd never names another one.
    pub(super) process: OwnedFd,
    /// Our end of the socket for memory.
    pub(super) memory: OnceLock<OwnedFd>,
    pub(super) cancelled: AtomicBool,
}

impl Shared {
    /// CRIU reads end of file at its next stage, but can still send its answer.
    pub(super) fn refuse_further(&self) {
        let _ = shutdown(&self.socket, Shutdown::Write);
        if let Some(memory) = self.memory.get() {
            let _ = shutdown(memory, Shutdown::Both);
        }
    }

    pub(super) fn kill(&self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

/// A running `criu swrk`.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pub(super) shared: Arc<Shared>,
    output: Option<File>,
    /// Number of the inherited socket in the worker.
    pub(super) inherited: Option<RawFd>,
    /// It did not end by itself.
    pub(super) killed: bool,
}

impl Process {
    pub(super) fn start(
        program: &Path,
        inherit: Option<OwnedFd>,
        output: Option<File>,
    ) -> Result<Self, CriuError> {
        let (ours, theirs) = socket_pair().map_err(io_error(0, "make a socket pair"))?;
        // 0 to 2 would be replaced by the child's standard streams.
        let inherit = inherit.map(above_standard).transpose();
        let inherit = inherit.map_err(io_error(0, "duplicate the socket for memory"))?;
        let inherited = inherit.as_ref().map(AsRawFd::as_raw_fd);
        let own_output = output.is_none();
        let output = match output {
            Some(file) => file,
            None => rustix::fs::memfd_create("criu-output", MemfdFlags::CLOEXEC)
                .map(File::from)
                .map_err(io_error(0, "make a file for criu's output"))?,
        };
        let copies = output.try_clone().and_then(|copy| {
            let second = output.try_clone()?;
            Ok((copy, second))
        });
        let (stdout, stderr) =
            copies.map_err(CriuError::io("duplicate the file for criu's output"))?;

        let mut command = Command::new(program);
        command
            .arg("swrk")
            .arg(theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0);
        let passed = std::iter::once(theirs).chain(inherit).collect();
        crate::sys::pass_descriptors(&mut command, passed);
        let mut child = command.spawn().map_err(|source| CriuError::Start {
            program: program.to_owned(),
            source,
        })?;
        // Our copy of CRIU's end must go, or its death would not end our reads.
        drop(command);
        let pid = Pid::from_child(&child);
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => process,
            Err(errno) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(io_error(child.id(), "open a pidfd")(errno));
            }
        };
        Ok(Self {
            child,
            shared: Arc::new(Shared {
                socket: ours,
                process,
                memory: OnceLock::new(),
                cancelled: AtomicBool::new(false),
            }),
            output: own_output.then_some(output),
            inherited,
            killed: false,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn canceller(&self) -> Canceller {
        Canceller(Arc::clone(&self.shared))
    }

    /// Ends the process, by force after a while, and collects its status.
    pub(super) fn reap(&mut self) -> Option<ExitStatus> {
        let process = &self.shared.process;
        let until = now() + GRACE;
        loop {
            let left = until.saturating_duration_since(now());
            let mut polled = [PollFd::new(process, PollFlags::IN)];
            match poll(&mut polled, Timespec::try_from(left).ok().as_ref()) {
                Err(Errno::INTR) => {}
                Ok(1..) => break,
                _ => {
                    self.killed = true;
                    self.shared.kill();
                    break;
                }
            }
        }
        self.child.wait().ok()
    }

    pub(super) fn printed(&mut self) -> String {
        let Some(output) = self.output.as_mut() else {
            return String::new();
        };
        let mut text = Vec::new();
        let length = output.metadata().map_or(0, |metadata| metadata.len());
        let from = length.saturating_sub(MOST_OUTPUT_BYTES);
        let read = output
            .seek(SeekFrom::Start(from))
            .and_then(|_| output.take(MOST_OUTPUT_BYTES).read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        match read {
            Ok(1..) => format!(": {}", text.trim_end()),
            _ => String::new(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = shutdown(&self.shared.socket, Shutdown::Both);
        let _ = self.reap();
    }
}

fn socket_pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok((ours, above_standard(theirs)?))
}

/// The same descriptor with a number above those of the standard streams.
fn above_standard(descriptor: OwnedFd) -> rustix::io::Result<OwnedFd> {
    if descriptor.as_raw_fd() > 2 {
        return Ok(descriptor);
    }
    fcntl_dupfd_cloexec(descriptor.as_fd(), 3)
}

pub(super) fn io_error(pid: u32, action: &'static str) -> impl FnOnce(Errno) -> CriuError {
    move |errno| CriuError::Io {
        pid,
        action,
        source: io::Error::from(errno),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a driver: it waits for another process"
)]
pub(super) fn now() -> Instant {
    Instant::now()
}
