//! On the source.

use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use super::{FinishError, FinishOptions, heard::Heard, meet::meet, tree};
use crate::handover::journal::{History, SourceAbout};
use crate::handover::{
    Answer, Journal, Keep, Lease, OnPartition, SourceDuty, SourceState, Verdict,
};
use crate::hooks::{Environment, Hooks, Moment, Side};

/// Between attempts to reach the destination.
const RETRY: Duration = Duration::from_secs(1);

/// Between looks at what an operator decides meanwhile.
const LOOK: Duration = Duration::from_millis(200);

/// How long the destination is asked what it has, only to tell the operator.
const ASK_TIME: Duration = Duration::from_secs(10);

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceOutcome {
    /// The tree runs here; the destination knows (`told`), or could not be reached yet.
    Kept {
        /// The journal is over.
        told: bool,
        /// What was healed and what an operator should know.
        notes: Vec<String>,
    },
    /// The workload runs at the destination; nothing is left here.
    Moved {
        /// Root process there; 0 where that is not known any more.
        pid: u32,
        /// What an operator should know.
        notes: Vec<String>,
    },
    /// The tree is held frozen, complete; the destination could not be reached, or could not say.
    Held {
        /// Why.
        reason: String,
    },
    /// Only an operator can decide.
    Undecided {
        /// Why, and what to do.
        reason: String,
    },
}

/// Does what the journal, the operator's decision in it and the destination's answer ask for.
///
/// May be stopped by dropping it at any time, and begun again: the journal says where it was.
pub async fn finish_source(
    journal: &Journal<SourceState>,
    _lease: &Lease,
    options: &FinishOptions,
) -> Result<SourceOutcome, FinishError> {
    let mut finish = Finish::new(journal, options);
    loop {
        let history = journal.read()?;
        let has_tree = !history.about.tree.left().is_empty();
        let done = match history.state().duty(has_tree, history.keep()) {
            SourceDuty::KeepTree => finish.keep_tree(history).await?,
            SourceDuty::HoldAndTell => finish.tell_commit(SourceDuty::HoldAndTell).await?,
            SourceDuty::EndTreeAndTell => finish.end_and_tell(history).await?,
            SourceDuty::AskOperator => Some(finish.undecided(&history).await),
            SourceDuty::EndTree => finish.end_tree(history).await?,
            SourceDuty::TellAbort => {
                let reason = finish.abort_reason(&history);
                finish
                    .hook(&history.about, Moment::AfterAbort, reason)
                    .await?;
                finish.tell_abort(&history.about).await?
            }
            SourceDuty::Nothing => Some(finish.over(&history)),
        };
        if let Some(outcome) = done {
            if matches!(
                outcome,
                SourceOutcome::Kept { .. } | SourceOutcome::Moved { .. }
            ) {
                Heard::forget(journal.directory());
            }
            return Ok(outcome);
        }
    }
}

/// Removes the journal of a migration that is over, and CRIU's network lock with it. False where the
/// journal has to wait: for the workload's address to leave this host, or until the lock can be
/// removed. Blocks.
pub fn clear_source(journal: Journal<SourceState>) -> Result<bool, FinishError> {
    let history = journal.read()?;
    if history.state() != SourceState::Over {
        return Ok(false);
    }
    if has_moved(&history) {
        if !tree::has_left(&history.about) {
            return Ok(false);
        }
        if let Some(problem) = tree::remove_lock(&history.about) {
            tracing::warn!("{problem}");
            return Ok(false);
        }
    }
    journal.remove()?;
    Ok(true)
}

fn has_moved(history: &History<SourceState>) -> bool {
    let mut entries = history.entries.iter();
    entries.any(|entry| entry.state == SourceState::Moved)
}

/// How long to try to tell a destination what it does not have to know.
const COURTESY: Duration = Duration::from_secs(3);

/// What finishing one migration needs and learns.
struct Finish<'a> {
    journal: &'a Journal<SourceState>,
    options: &'a FinishOptions,
    heard: Heard,
    // The destination has answered here.
    has_met: bool,
    until: Instant,
    pid: u32,
    notes: Vec<String>,
    // Of the last attempt to reach the destination.
    reason: String,
}

impl<'a> Finish<'a> {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn new(journal: &'a Journal<SourceState>, options: &'a FinishOptions) -> Self {
        Self {
            journal,
            options,
            heard: Heard::of(journal.directory()),
            has_met: false,
            until: Instant::now() + options.patience,
            pid: 0,
            notes: Vec::new(),
            reason: "the destination was not reached yet".to_owned(),
        }
    }

    async fn keep_tree(
        &mut self,
        history: History<SourceState>,
    ) -> Result<Option<SourceOutcome>, FinishError> {
        let state = history.state();
        let by = history.decided.as_ref().map(|(_, by)| by.clone());
        let by = by.unwrap_or_default();
        // What was given away is taken back in the journal first. Without a commit the tree is this
        // host's anyhow, and runs again even where a full disk takes no record.
        if state == SourceState::Committed {
            self.journal.advance(SourceState::Keeping, &by)?;
        }
        let was = |wanted| history.entries.iter().any(|entry| entry.state == wanted);
        let was_frozen = was(SourceState::Freezing);
        let was_fenced = was(SourceState::Fencing);
        let notes = self
            .job(move || tree::keep(&history.about, was_frozen, was_fenced))
            .await?;
        self.notes.extend(notes);
        if !matches!(state, SourceState::Committed | SourceState::Keeping) {
            self.journal.advance(SourceState::Keeping, &by)?;
        }
        self.journal.advance(SourceState::Kept, "")?;
        Ok(None)
    }

    async fn end_tree(
        &mut self,
        history: History<SourceState>,
    ) -> Result<Option<SourceOutcome>, FinishError> {
        let about = history.about.clone();
        self.job(move || tree::end(&history.about)).await?;
        self.hook(&about, Moment::AfterCommit, None).await?;
        self.journal.advance(SourceState::Over, "")?;
        if !self.has_met {
            // So that nobody there waits for this host. Nothing hangs on it.
            let (id, options) = (self.journal.id(), self.options);
            let meeting = meet(&about, id, Verdict::Commit, options, &self.heard);
            let _ = tokio::time::timeout(COURTESY, meeting).await;
        }
        Ok(None)
    }

    /// Runs the hook of a `moment` that ends migrations, unless it has run. Its failure is a note.
    async fn hook(
        &mut self,
        about: &SourceAbout,
        moment: Moment,
        reason: Option<String>,
    ) -> Result<(), FinishError> {
        if about.hooked || about.hooks.is_empty() {
            return Ok(());
        }
        let about = about.clone();
        let run = move || {
            let hooks: Result<Vec<_>, _> = about.hooks.iter().map(|hook| hook.parse()).collect();
            let limit = Duration::from_millis(about.hook_limit_ms);
            let hooks = hooks.and_then(|hooks| Hooks::new(Side::Source, hooks, limit));
            let hooks =
                hooks.map_err(|error| format!("a hook in the journal cannot be read: {error}"))?;
            let environment = Environment {
                migration: about.name.clone(),
                pid: about.tree.processes.first().map(|root| root.pid),
                peer: about.addresses.first().map(|address| address.ip()),
                addresses: about.hook_addresses.clone(),
                images: None,
                reason,
            };
            let run = hooks.run(moment, &environment);
            run.map(drop).map_err(|error| error.to_string())
        };
        let ran = spawn_blocking(run).await.expect("a hook does not panic");
        self.notes.extend(ran.err());
        self.journal.note_quickly(|about| about.hooked = true)?;
        Ok(())
    }

    fn abort_reason(&self, history: &History<SourceState>) -> Option<String> {
        let decided = history.decided.as_ref();
        Some(decided.map_or_else(
            || "its crxfer has ended, or could not finish it".to_owned(),
            |(_, by)| format!("decided by {by}"),
        ))
    }

    async fn end_and_tell(
        &mut self,
        history: History<SourceState>,
    ) -> Result<Option<SourceOutcome>, FinishError> {
        if history.state() != SourceState::Committed {
            let by = history.decided.as_ref().map_or("", |(_, by)| by.as_str());
            self.journal.advance(SourceState::Committed, by)?;
        }
        self.job(move || tree::end(&history.about)).await?;
        self.tell_commit(SourceDuty::EndTreeAndTell).await
    }

    /// Tells the destination that the workload is its own until it has answered, or `duty` is not what
    /// has to be done any more (`None`).
    async fn tell_commit(
        &mut self,
        duty: SourceDuty,
    ) -> Result<Option<SourceOutcome>, FinishError> {
        let mut pause = Duration::ZERO;
        loop {
            let about = self.journal.read()?.about;
            let answered = self.ask(&about, Verdict::Commit, pause, Some(duty)).await?;
            let Some(answer) = answered else {
                // Something else has to be done, or nothing more now.
                return Ok(self.is_over_time().then(|| SourceOutcome::Held {
                    reason: self.reason.clone(),
                }));
            };
            self.has_met = true;
            if let Answer::Runs { pid } = answer {
                self.pid = pid;
            }
            let history = self.journal.read()?;
            if let Some(next) = history.state().answered(answer, history.keep()) {
                self.journal.advance(next, "as the destination says")?;
                return Ok(None);
            }
            answer_in_words(answer).clone_into(&mut self.reason);
            pause = RETRY;
        }
    }

    async fn tell_abort(
        &mut self,
        about: &SourceAbout,
    ) -> Result<Option<SourceOutcome>, FinishError> {
        let mut pause = Duration::ZERO;
        loop {
            let Some(answer) = self.ask(about, Verdict::Abort, pause, None).await? else {
                let mut notes = std::mem::take(&mut self.notes);
                notes.push(self.reason.clone());
                return Ok(Some(SourceOutcome::Kept { told: false, notes }));
            };
            let state = SourceState::Kept;
            let decided = self.journal.read()?.keep();
            // Also the way out where two run: the operator may want the copy.
            if let Some(next) = state.answered(answer, decided) {
                self.journal.advance(next, "")?;
                return Ok(None);
            }
            if state.is_contradicted(answer) {
                let mut notes = std::mem::take(&mut self.notes);
                notes.push(
                    "the workload was kept here by decision, and the destination says that its \
                     copy runs as well: end one of the two"
                        .to_owned(),
                );
                return Ok(Some(SourceOutcome::Kept { told: false, notes }));
            }
            answer_in_words(answer).clone_into(&mut self.reason);
            pause = RETRY;
        }
    }

    /// Waits for an answer; `None` where time is over, the caller wants to go, or `duty` is not what
    /// the journal asks for any more. The policy is looked after here, too.
    async fn ask(
        &mut self,
        about: &SourceAbout,
        verdict: Verdict,
        mut pause: Duration,
        duty: Option<SourceDuty>,
    ) -> Result<Option<Answer>, FinishError> {
        let (id, options) = (self.journal.id(), self.options);
        let heard = self.heard.clone();
        loop {
            // Where the one before was dropped half way.
            heard.parted();
            let heard = &heard;
            let meeting = async move {
                tokio::time::sleep(pause).await;
                meet(about, id, verdict, options, heard).await
            };
            tokio::pin!(meeting);
            let met = loop {
                if *options.stop.borrow() {
                    "stopped".clone_into(&mut self.reason);
                    self.until = now();
                }
                if self.is_over_time() || duty.is_some_and(|duty| !self.is_due(duty)) {
                    return Ok(None);
                }
                tokio::select! {
                    met = &mut meeting => break met,
                    () = tokio::time::sleep(LOOK) => {}
                }
            };
            match met {
                Ok(answer) => return Ok(Some(answer)),
                Err(error) => self.reason = error.to_string(),
            }
            pause = RETRY;
        }
    }

    /// Whether the journal asks for nothing else by now. Records what the policy says where its time
    /// has come.
    fn is_due(&self, duty: SourceDuty) -> bool {
        let Ok(history) = self.journal.read() else {
            return true;
        };
        if history.keep().is_none()
            && let Some(keep) = policy(&history, &self.heard)
        {
            // Read again at the next look.
            let _ = self.journal.decide(keep, "--on-partition");
            return true;
        }
        let has_tree = !history.about.tree.left().is_empty();
        history.state().duty(has_tree, history.keep()) == duty
    }

    fn is_over_time(&self) -> bool {
        now() >= self.until
    }

    async fn undecided(&self, history: &History<SourceState>) -> SourceOutcome {
        let asked = meet(
            &history.about,
            self.journal.id(),
            Verdict::Ask,
            self.options,
            &self.heard,
        );
        let there = match tokio::time::timeout(ASK_TIME, asked).await {
            Ok(Ok(answer)) => answer_in_words(answer).to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the destination does not answer".to_owned(),
        };
        SourceOutcome::Undecided {
            reason: format!(
                "the workload's processes are gone, and not by crxfer's hand, while they were \
                 frozen ({there}); decide with --keep-destination where the destination holds a \
                 complete copy, else with --keep-source"
            ),
        }
    }

    fn over(&mut self, history: &History<SourceState>) -> SourceOutcome {
        let notes = std::mem::take(&mut self.notes);
        if has_moved(history) {
            SourceOutcome::Moved {
                pid: self.pid,
                notes,
            }
        } else {
            SourceOutcome::Kept { told: true, notes }
        }
    }

    async fn job<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, FinishError> {
        let done = spawn_blocking(work).await.expect("the work does not panic");
        done.map_err(|what| FinishError::Left {
            what,
            journal: self.journal.directory().to_owned(),
        })
    }
}

/// What the policy decides by now.
fn policy(history: &History<SourceState>, heard: &Heard) -> Option<Keep> {
    let keep = match history.about.on_partition {
        OnPartition::Hold => return None,
        OnPartition::KeepSource => Keep::Source,
        OnPartition::KeepDestination => Keep::Destination,
    };
    let wait = Duration::from_millis(history.about.partition_wait_ms);
    (history.state() == SourceState::Committed && heard.is_cut_off(wait)).then_some(keep)
}

#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
fn now() -> Instant {
    Instant::now()
}

fn answer_in_words(answer: Answer) -> &'static str {
    match answer {
        Answer::Unknown => {
            "the destination knows nothing of this migration: look there whether the workload runs"
        }
        Answer::Holds => "the destination holds a complete copy that has not run",
        Answer::Runs { .. } => "the destination says that the copy runs",
        Answer::Removed => "the destination has removed its copy",
        Answer::Busy => "the destination is at work",
    }
}

#[cfg(test)]
mod tests;
