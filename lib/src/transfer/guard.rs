//! The guard: a small process beside a migration that outlives the program that drives it.
//!
//! It does nothing but wait for the end of its standard input, whose other end only that program
//! holds; meanwhile it holds the private memory of migrations that are under way ([`line`]). Then it
//! looks at the journals: those that nobody takes care of any more it finishes, as `crxfer recover`
//! does.

mod line;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use self::line::{End, Held, Line};
use super::finish::{
    DestinationOutcome, FinishError, FinishOptions, SourceOutcome, clear_source,
    finish_destination, finish_source,
};
use super::pause;
use super::recv::stand_in::{self, StandIn};
use crate::handover::{
    DestinationState, Journal, JournalError, Lease, SourceState, Verdict,
    journal::{History, State},
};
use crate::sink::Holder;
use crate::transport;
use crate::wire::MigrationId;

/// Between looks at journals that are not finished yet.
const ROUND: Duration = Duration::from_millis(500);

/// So often nothing must be left to do before a guard ends: its parent's locks may outlive its pipe
/// by a moment.
const QUIET_ROUNDS: u32 = 4;

/// How long to try the other host in one go. The next round tries again.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long to try to tell a destination that the workload has stayed.
const TELL_TIME: Duration = Duration::from_secs(600);

/// How long to wait for a workload's address to leave this host.
const LOCK_TIME: Duration = Duration::from_secs(86_400);

/// How long a guard may take to end that is not needed any more.
const END_TIME: Duration = Duration::from_secs(1);

/// How long a guard waits for whoever else takes care of what it should end.
const BUSY_TIME: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a copy that runs is answered for to a source that has not heard so.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// Between attempts at what fails.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How to start a guard: a program that calls [`run_guard`].
///
/// It is given `--side source|destination --state DIR` after `args`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardProgram {
    /// The program, for example this one.
    pub program: PathBuf,
    /// Its first arguments.
    pub args: Vec<OsString>,
}

/// Of which side the journals are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardSide {
    /// Where workloads leave.
    Source,
    /// Where they arrive.
    Destination,
}

impl GuardSide {
    /// As the command line has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// A guard that waits. Dropping it sets it to work: so does the death of this process.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    line: Line,
}

impl Guard {
    /// Starts one for the journals of `side` below `state`, in a session of its own. What it says
    /// goes to the end of the file `log`.
    pub fn start(
        guard: &GuardProgram,
        side: GuardSide,
        state: &Path,
        log: &Path,
    ) -> io::Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)?;
        let (line, theirs) = line::pair()?;
        let mut command = Command::new(&guard.program);
        command
            .args(&guard.args)
            .args(["--side", side.as_str(), "--state"])
            .arg(std::path::absolute(state)?)
            .stdin(Stdio::from(theirs))
            .stdout(log.try_clone()?)
            .stderr(log);
        for variable in pause::VARIABLES {
            command.env_remove(variable);
        }
        crate::sys::own_session(&mut command);
        let child = command.spawn()?;
        Ok(Self { child, line })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it hold the directory `what` of a migration, which must outlive this process and has no
    /// name. Blocks for a moment; fails where the guard is gone or hangs.
    pub fn hold(&self, id: MigrationId, what: BorrowedFd<'_>) -> io::Result<Holder> {
        let number = self.line.hold(id, what)?;
        let holder = Holder::of(self.pid(), number);
        holder.ok_or_else(|| io::Error::other("the guard has ended"))
    }

    /// Has it let go of what it holds for that migration.
    pub fn release(&self, id: MigrationId) -> io::Result<()> {
        self.line.release(id)
    }

    /// Tells it that nothing is left to do, and waits a moment for its end. Blocks.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub fn dismiss(mut self) {
        let _ = self.line.dismiss();
        let until = Instant::now() + END_TIME;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() >= until {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits until the process at the other end of standard input is gone, then finishes what it has
/// left below `state`. Returns when nothing is left to do, or at once when it is told so.
pub fn run_guard(state: &Path, side: GuardSide) -> Result<(), JournalError> {
    // When memory is short the workload's way back must not be what is given up. Needs root.
    let _ = fs::write("/proc/self/oom_score_adj", "-900");
    // It stays in the parent's directory: the hooks may be relative to it.
    // The parent's number tells its word from that of the next one.
    let parent = std::os::unix::process::parent_id();
    let mut held = Held::new();
    if line::wait(io::stdin().lock(), &mut held) == End::Dismissed {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| JournalError::Io {
        action: "start a runtime for",
        path: state.to_owned(),
        source,
    })?;
    runtime.block_on(async {
        match side {
            GuardSide::Source => look_after::<SourceState>(state, parent, held).await,
            GuardSide::Destination => look_after::<DestinationState>(state, parent, held).await,
        }
    })
}

async fn look_after<S: Guarded>(
    state: &Path,
    parent: u32,
    mut held: Held,
) -> Result<(), JournalError> {
    let mut quiet = 0;
    let mut settled = Vec::new();
    let mut place = None;
    let mut said = HashMap::new();
    let (mut pauses, mut wait_until) = (HashMap::new(), HashMap::new());
    let begun = now();
    while quiet < QUIET_ROUNDS {
        quiet += 1;
        // At once, before anything that takes long: who talked to the dead process hears that it is.
        if S::stand_in(&mut place, state, parent).await {
            quiet = 0;
        }
        let listed = Journal::<S>::list(state);
        if let Ok(listed) = &listed {
            held.retain(|id, _| listed.contains(id) && S::needs_images(state, *id));
        }
        let mut listed = listed.unwrap_or_else(|error| {
            say(&error.to_string());
            Vec::new()
        });
        // Nobody else has them, and what cannot be read now may be later.
        if !held.is_empty() {
            quiet = 0;
        }
        // A tree that stands still comes before anybody's tidiness, which may wait for another host.
        listed.sort_by_cached_key(|id| {
            let journal = Journal::<S>::open(state, *id).ok().flatten();
            !journal.is_some_and(|journal| journal.read().is_ok_and(|it| S::is_urgent(&it)))
        });
        for id in listed {
            if settled.contains(&id) {
                continue;
            }
            // Another guard may have removed it meanwhile.
            let Ok(Some(journal)) = Journal::<S>::open(state, id) else {
                continue;
            };
            if wait_until.get(&id).is_some_and(|until| now() < *until) {
                quiet = 0;
                continue;
            }
            if journal.read().is_err() {
                settled.push(id);
                say(&format!("{id}: its record cannot be read: crxfer recover"));
                continue;
            }
            let lease = match journal.lease() {
                Ok(Some(lease)) => lease,
                // Whoever has it may end without having ended this.
                Ok(None) => {
                    if S::is_open(&journal) && begun.elapsed() < BUSY_TIME {
                        quiet = 0;
                    }
                    continue;
                }
                Err(_) => continue,
            };
            let round = S::finish(journal, lease, begun.elapsed(), &|| {
                StandIn::is_wanted(state, parent)
            })
            .await;
            let text = match round {
                Ok(Round::Settled(text)) => {
                    settled.push(id);
                    text
                }
                Ok(Round::Again(text)) => {
                    quiet = 0;
                    text
                }
                // What cannot be done now is tried again, ever more seldom.
                Err(text) => {
                    quiet = 0;
                    let pause = pauses.entry(id).or_insert(ROUND);
                    *pause = (*pause * 2).min(LONGEST_PAUSE);
                    wait_until.insert(id, now() + *pause);
                    text
                }
            };
            // Once, not twice a second.
            if said.insert(id, text.clone()).as_ref() != Some(&text) {
                say(&format!("{id}: {text}"));
            }
        }
        tokio::time::sleep(ROUND).await;
    }
    if let Some(place) = place {
        place.leave().await;
    }
    // One that was replaced has a parent that lives, whose word stands.
    if StandIn::is_wanted(state, parent) {
        stand_in::forget(state, parent);
    }
    Ok(())
}

/// For an operator who reads the log.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
fn now() -> Instant {
    Instant::now()
}

/// What came of one round, in words.
enum Round {
    /// Nothing is left to do, or nothing that a guard should wait for.
    Settled(String),
    Again(String),
}

/// A side whose journals can be finished.
trait Guarded: State {
    /// Whether something is left to do that its holder may leave undone.
    fn is_open(journal: &Journal<Self>) -> bool {
        let state = journal.read().map(|history| history.state());
        state.is_ok_and(|state| state != Self::LAST)
    }

    /// Whether a workload may be standing still.
    fn is_urgent(history: &History<Self>) -> bool;

    /// Whether somebody may still want the images of that migration.
    fn needs_images(_state: &Path, _id: MigrationId) -> bool {
        false
    }

    /// Answers the other hosts in the place of `parent`; true while one is being answered.
    async fn stand_in(_place: &mut Option<StandIn>, _state: &Path, _parent: u32) -> bool {
        false
    }

    /// `at_work`: for how long this guard has been trying. `answers`: whether it stands in for its parent.
    async fn finish(
        journal: Journal<Self>,
        lease: Lease,
        at_work: Duration,
        answers: &dyn Fn() -> bool,
    ) -> Result<Round, String>;
}

impl Guarded for SourceState {
    fn is_urgent(history: &History<Self>) -> bool {
        // A tree that was given away waits for the other host, one that was kept runs. One whose
        // processes are gone stands still for nobody, and may take long to be decided about.
        !matches!(history.state(), Self::Committed | Self::Kept | Self::Over)
            && !history.about.tree.left().is_empty()
    }

    async fn finish(
        journal: Journal<Self>,
        lease: Lease,
        at_work: Duration,
        _answers: &dyn Fn() -> bool,
    ) -> Result<Round, String> {
        let (_never, stop) = tokio::sync::watch::channel(false);
        let options = FinishOptions {
            patience: PATIENCE,
            target: None,
            transport: transport::Options::default(),
            stop,
        };
        let outcome = finish_source(&journal, &lease, &options).await;
        let outcome = outcome.map_err(|error| error.to_string())?;
        let text = format!("{outcome:?}");
        Ok(match outcome {
            // The workload is safe. The rest is the other host's tidiness, and recover's.
            SourceOutcome::Kept { told: false, .. } if at_work >= TELL_TIME => Round::Settled(text),
            SourceOutcome::Kept { told: false, .. }
            | SourceOutcome::Held { .. }
            | SourceOutcome::Undecided { .. } => Round::Again(text),
            SourceOutcome::Kept { .. } | SourceOutcome::Moved { .. } => {
                let cleared = clear_source(journal).map_err(|error| error.to_string())?;
                // The journal waits for the address to leave this host, and so does this guard.
                if cleared || at_work >= LOCK_TIME {
                    Round::Settled(text)
                } else {
                    Round::Again("the address has not left this host yet".to_owned())
                }
            }
        })
    }
}

impl Guarded for DestinationState {
    fn is_urgent(history: &History<Self>) -> bool {
        history.state() == Self::Resuming
    }

    fn needs_images(state: &Path, id: MigrationId) -> bool {
        let journal = Journal::<Self>::open(state, id).ok().flatten();
        // One that cannot be read now can be later.
        journal.is_none_or(|journal| {
            let state = journal.read().map(|history| history.state());
            !matches!(state, Ok(Self::Running | Self::Removed | Self::Over))
        })
    }

    async fn stand_in(place: &mut Option<StandIn>, state: &Path, parent: u32) -> bool {
        if !StandIn::is_wanted(state, parent) {
            if let Some(left) = place.take() {
                left.leave().await;
            }
            return false;
        }
        if place.is_none() {
            *place = StandIn::of(state, parent);
        }
        place.as_ref().is_some_and(StandIn::is_talking)
    }

    async fn finish(
        journal: Journal<Self>,
        lease: Lease,
        at_work: Duration,
        answers: &dyn Fn() -> bool,
    ) -> Result<Round, String> {
        let finishing = tokio::task::spawn_blocking(move || {
            let outcome = finish_destination(&journal, &lease, Verdict::Ask)?;
            Ok((outcome, journal.read()?.about.heard))
        });
        let finished = finishing.await.map_err(|error| error.to_string())?;
        let (outcome, heard) = finished.map_err(|error: FinishError| error.to_string())?;
        let text = format!("{outcome:?}");
        Ok(match outcome {
            DestinationOutcome::Held { .. } => Round::Again(text),
            // Its source may hold its tree until it has heard that: nobody else answers here.
            DestinationOutcome::Running { pid: 1.., .. }
                if !heard && at_work < ANSWER_TIME && answers() =>
            {
                Round::Again(text)
            }
            _ => Round::Settled(text),
        })
    }
}
