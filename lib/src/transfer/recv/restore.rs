//! CRIU's part on the destination: the copy is built, held, and let go or removed.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc as blocking;
use std::time::Duration;

use crate::criu::{
    Canceller, CgroupMode, CriuError, CriuOptions, Operation, RestoreOptions, Stage, Verdict,
    Worker,
};
use crate::runtime::RestoreCommand;
use crate::session::SessionError;
use crate::transfer::TransferError;
use crate::transfer::clock::Clock;
use crate::transfer::external::action::{self, POINTER, SOCKET_NAME};
use crate::transfer::external::command;
use crate::wire::{self, Failure, FailureCode};

/// How long a runtime may take to forget a container.
const REMOVE_TIME: Duration = Duration::from_secs(10);

/// What happens during a restore, in order.
#[derive(Debug)]
pub(in crate::transfer) enum Moment {
    /// The copy is built and held: it runs when [`Restoring::end`] says so.
    Held { pid: u32, at_ns: u64 },
    /// The copy was let go.
    Resumed { at_ns: u64 },
    /// CRIU has ended.
    Ended { result: Result<u32, CriuError> },
}

/// A restore under way. Dropping it removes the copy, unless it was let go.
#[derive(Debug)]
pub(in crate::transfer) struct Restoring {
    verdict: blocking::Sender<Verdict>,
    canceller: Ender,
}

#[derive(Debug)]
enum Ender {
    Own(Canceller),
    Command(command::Canceller),
}

/// What builds a copy: it has been started, and waits.
#[derive(Debug)]
pub(in crate::transfer) enum Builder {
    /// A CRIU of our own.
    Own(Worker),
    /// A command of the operator's.
    Command(command::External),
}

impl Builder {
    /// Its process: whatever it makes is younger.
    pub(in crate::transfer) fn pid(&self) -> u32 {
        match self {
            Self::Own(worker) => worker.pid(),
            Self::Command(external) => external.leader().pid,
        }
    }
}

/// For whom a command builds a copy.
#[derive(Clone, Debug)]
pub(in crate::transfer) struct Wanted {
    pub(in crate::transfer) runtime: RestoreCommand,
    /// Name of the migration.
    pub(in crate::transfer) name: String,
    pub(in crate::transfer) container: String,
    /// What the source asks CRIU for.
    pub(in crate::transfer) options: wire::RestoreOptions,
    /// Where its script and socket are, and its log below.
    pub(in crate::transfer) place: PathBuf,
}

impl Wanted {
    fn variables(&self) -> command::Variables {
        vec![
            ("CRXFER_NAME", self.name.clone()),
            ("CRXFER_CONTAINER", self.container.clone()),
            ("CRXFER_OPTIONS", crate::runtime::words(&self.options)),
        ]
    }
}

impl Restoring {
    pub(in crate::transfer) fn end(&self, verdict: Verdict) {
        if verdict == Verdict::Refuse {
            match &self.canceller {
                Ender::Own(canceller) => canceller.cancel(),
                Ender::Command(canceller) => canceller.cancel(),
            }
        }
        // Fails where CRIU has ended already.
        let _ = self.verdict.send(verdict);
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        self.end(Verdict::Refuse);
    }
}

/// A copy that was let go.
#[derive(Debug)]
pub(in crate::transfer) struct Released {
    pub(in crate::transfer) pid: u32,
    /// What CRIU did not like after that, such as an old network lock.
    pub(in crate::transfer) complaint: Option<String>,
}

/// An error of this host that the source can be told.
pub(in crate::transfer) fn refused(code: FailureCode, reason: impl Into<String>) -> TransferError {
    SessionError::Local(Failure::new(code, reason)).into()
}

/// CRIU's options as the source asks for them, with this host's own file, which wins.
pub(in crate::transfer) fn options(
    asked: &wire::RestoreOptions,
    config_file: Option<&Path>,
) -> CriuOptions {
    CriuOptions {
        tcp_established: asked.tcp_established,
        shell_job: asked.shell_job,
        file_locks: asked.file_locks,
        link_remap: asked.link_remap,
        ext_unix_sk: asked.ext_unix_sk,
        tcp_close: asked.tcp_close,
        external: asked.external.clone(),
        manage_cgroups: CgroupMode::named(&asked.manage_cgroups),
        config_file: config_file.map(Path::to_owned),
        // From here on CRIU writes down that it let the copy go: whoever finds it later must know.
        log_level: 3,
        ..CriuOptions::default()
    }
}

/// Starts CRIU and lets it look around.
pub(in crate::transfer) fn prepare(program: &Path) -> Result<Builder, CriuError> {
    let mut worker = Worker::start(program, None, None)?;
    worker.probe()?;
    Ok(Builder::Own(worker))
}

/// Has the runtime forget what it knows of a copy that does not run, if CRIU had begun to build it: what
/// else has the container's name is somebody else's.
pub(in crate::transfer) fn remove_from_runtime(wanted: &Wanted) -> Result<(), String> {
    if !action::has_begun(&wanted.place) {
        return Ok(());
    }
    let Some(remove) = &wanted.runtime.remove else {
        action::forget(&wanted.place);
        return Ok(());
    };
    let work = wanted.place.join("work");
    command::run_to_end(remove, &work, wanted.variables(), REMOVE_TIME)?;
    action::forget(&wanted.place);
    Ok(())
}

/// Starts the shell of a command, which waits.
pub(in crate::transfer) fn prepare_command(
    wanted: &Wanted,
    images: &Path,
) -> Result<Builder, CriuError> {
    let external = command::External::start(
        Operation::Restore,
        &wanted.runtime.command,
        &wanted.place,
        images,
        wanted.variables(),
        &wanted.runtime.action,
    )?;
    Ok(Builder::Command(external))
}

/// Builds the copy from the images in `images`; logs go to `work`. Returns at once.
pub(in crate::transfer) fn restore(
    builder: Builder,
    images: PathBuf,
    work: PathBuf,
    criu: CriuOptions,
    clock: Clock,
    tell: impl Fn(Moment) + Send + 'static,
) -> std::io::Result<Restoring> {
    let (verdict, verdicts) = blocking::channel();
    let restoring = Restoring {
        verdict,
        canceller: match &builder {
            Builder::Own(worker) => Ender::Own(worker.canceller()),
            Builder::Command(external) => Ender::Command(external.canceller()),
        },
    };
    let run = move || {
        let mut builder = builder;
        let result = run(&mut builder, &images, &work, criu, clock, &verdicts, &tell);
        // Ends CRIU: what it left of the copy is a child of this process from then on, and can be reaped.
        drop(builder);
        tell(Moment::Ended { result });
    };
    std::thread::Builder::new()
        .name("restore".to_owned())
        .spawn(run)?;
    Ok(restoring)
}

/// Builds the copy and lets it go as soon as it stands. Blocks.
pub(in crate::transfer) fn at_once(
    builder: Builder,
    images: &Path,
    work: &Path,
    criu: CriuOptions,
) -> Result<Released, CriuError> {
    let mut builder = builder;
    let (mut root, mut is_released) = (None, false);
    let result = hold(&mut builder, images, work, criu, &mut |stage, pid| {
        root = pid.or(root);
        is_released |= stage == Stage::PostResume;
        Verdict::GoOn
    });
    // As above: what it leaves is this process's from then on.
    drop(builder);
    match (result, root.filter(|_| is_released)) {
        (Ok(pid), _) => Ok(Released {
            pid,
            complaint: None,
        }),
        (Err(error), Some(pid)) => Ok(Released {
            pid,
            complaint: Some(error.to_string()),
        }),
        (Err(error), None) => Err(error),
    }
}

fn run(
    builder: &mut Builder,
    images: &Path,
    work: &Path,
    criu: CriuOptions,
    clock: Clock,
    verdicts: &blocking::Receiver<Verdict>,
    tell: &impl Fn(Moment),
) -> Result<u32, CriuError> {
    hold(builder, images, work, criu, &mut |stage, pid| match stage {
        Stage::PostRestore => {
            tell(Moment::Held {
                pid: pid.unwrap_or(0),
                at_ns: clock.now_ns(),
            });
            // Whoever would answer is gone: no copy.
            verdicts.recv().unwrap_or(Verdict::Refuse)
        }
        Stage::PostResume => {
            tell(Moment::Resumed {
                at_ns: clock.now_ns(),
            });
            Verdict::GoOn
        }
        _ => Verdict::GoOn,
    })
}

fn hold(
    builder: &mut Builder,
    images: &Path,
    work: &Path,
    criu: CriuOptions,
    decide: &mut dyn FnMut(Stage, Option<u32>) -> Verdict,
) -> Result<u32, CriuError> {
    let open =
        |path: &Path| File::open(path).map_err(CriuError::io("open the directory of the images"));
    let worker = match builder {
        Builder::Own(worker) => worker,
        Builder::Command(external) => return hold_command(external, images, work, decide),
    };
    let (images, work) = (open(images)?, open(work)?);
    let options = RestoreOptions::new(images.as_fd(), work.as_fd(), criu);
    Ok(worker.restore(&options, decide)?.pid)
}

fn hold_command(
    external: &mut command::External,
    images: &Path,
    work: &Path,
    decide: &mut dyn FnMut(Stage, Option<u32>) -> Verdict,
) -> Result<u32, CriuError> {
    let place = work.parent().unwrap_or(work);
    let socket = place.join(SOCKET_NAME);
    // A runtime's daemon does not pass variables on to CRIU's script, but the images.
    let written = std::fs::write(images.join(POINTER), socket.as_os_str().as_encoded_bytes());
    written.map_err(CriuError::io("write into the directory of the images"))?;
    let (mut root, mut is_released) = (None, false);
    external.run(&mut |report| {
        root = report.root.or(root);
        is_released |= report.stage == Stage::PostResume;
        decide(report.stage, report.root)
    })?;
    if !is_released {
        decide(Stage::PostResume, root);
    }
    Ok(root.unwrap_or(0))
}
