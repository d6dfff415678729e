//! What keeps the workload safe whatever dies: journal, guard, fence, and the way back.

use std::ops::ControlFlow::{Break, Continue};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::task::spawn_blocking;

use super::{Driver, Event};
use crate::criu::Verdict;
use crate::handover::journal::SourceAbout;
use crate::handover::{Journal, JournalError, SourceState};
use crate::transfer::finish::{
    self, FinishOptions, SourceOutcome, clear_source, finish_source, tree as hands,
};
use crate::transfer::guard::{Guard, GuardSide};
use crate::transfer::migrate::freeze::{DumpPlace, Moment, Ready};
use crate::transfer::migrate::record::Records;
use crate::transfer::migrate::report::Outcome;
use crate::transfer::migrate::{MigrateError, MigrateEvent};
use crate::transfer::pause;
use crate::transfer::send::Target;
use crate::tree::{self, Fence, Process, Tree};

/// How long CRIU may take to let the tree run again before it is killed, and the tree healed. It
/// takes milliseconds; the tree stands still meanwhile.
const CRIU_TIME: Duration = Duration::from_millis(600);

/// How long a killed process may take to be gone.
const KILL_TIME: Duration = Duration::from_secs(5);

/// How long one attempt to end a doubt may last. Another one follows, unless the workload was kept
/// and only the destination does not know yet.
const ATTEMPT: Duration = Duration::from_secs(30);

/// How CRIU's dump has ended, as far as the tree goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CriuEnd {
    /// It has answered, so it has tidied up, too.
    Tidy,
    /// It died: the tree runs, with whatever CRIU had done to it.
    Died,
}

impl CriuEnd {
    pub(super) fn of(result: &Result<(), MigrateError>) -> Self {
        match result {
            Err(MigrateError::Criu(error)) if error.has_died() => Self::Died,
            _ => Self::Tidy,
        }
    }
}

impl Driver<'_> {
    /// Begins the records. From here on somebody else could end this migration well.
    pub(super) async fn record(&mut self) -> Result<(), MigrateError> {
        let options = self.options;
        let state = std::path::absolute(&options.state).map_err(|source| MigrateError::Work {
            path: options.state.clone(),
            source,
        })?;
        let work = self.work_path();
        let work = std::path::absolute(&work).map_err(|source| MigrateError::Work {
            path: work.clone(),
            source,
        })?;
        let processes = self.survey.processes.iter().map(|process| process.pid);
        let tree = Tree::of(processes);
        let id = self.id.to_string();
        let fence = match Fence::plan(&tree, &id) {
            Ok(fence) => Some(fence),
            // The check has said so.
            Err(_) if options.force => None,
            Err(error) => return Err(error.into()),
        };
        let pid = options.pid;
        let foreign_tables = spawn_blocking(move || tree::heal::lock_tables(pid));
        let foreign_tables = self.job(foreign_tables).await?;
        let facts = &self.survey.facts;
        // Connections may come until the freeze: those of the survey say nothing about the lock.
        let may_be_locked = facts.tree.inet_sockets && !facts.tree.own_net_namespace;
        let about = SourceAbout {
            name: self.name.clone(),
            tree,
            addresses: self.meeting_places(),
            peer: self.connection.peer().to_string(),
            identity: state.join(format!("source-{id}")).join("identity.pem"),
            work: work.join(&id),
            run_id: None,
            foreign_tables,
            criu: None,
            command: None,
            forget: options.external.as_ref().and_then(|it| it.forget.clone()),
            fence,
            on_partition: options.on_partition,
            partition_wait_ms: u64::try_from(options.partition_wait.as_millis())
                .unwrap_or(u64::MAX),
            bound: if may_be_locked {
                facts.addresses()
            } else {
                Vec::new()
            },
            hook_addresses: facts.addresses(),
            hooks: options.hooks.commands(),
            hook_limit_ms: u64::try_from(options.hooks.time_limit().as_millis())
                .unwrap_or(u64::MAX),
            hooked: false,
        };
        let (journal, lease) = Journal::create(&state, self.id, about.clone())?;
        if let Err(error) = options.identity.save(&about.identity) {
            // Nothing has been touched: no record of it either.
            journal.remove()?;
            return Err(crate::transfer::TransferError::from(error).into());
        }
        if let Some(program) = &options.guard {
            let log = journal.directory().join("guard.log");
            match Guard::start(program, GuardSide::Source, &state, &log) {
                Ok(guard) => self.guard = Some(guard),
                Err(error) => self.emit(MigrateEvent::Warning(format!(
                    "no guard could be started ({error}): if crxfer dies here, call crxfer recover"
                ))),
            }
        }
        self.record = Some(Arc::new(Records::new(journal, lease, about)));
        Ok(())
    }

    fn meeting_places(&self) -> Vec<std::net::SocketAddr> {
        let mut places = vec![self.connection.remote_address()];
        let more = match &self.options.target {
            Target::Ticket(ticket) => ticket.addresses(),
            Target::Pinned { addresses, .. } => addresses,
        };
        for place in more {
            if !places.contains(place) {
                places.push(*place);
            }
        }
        places
    }

    pub(super) fn advance(&self, next: SourceState, note: &str) -> Result<(), JournalError> {
        let record = self.record.as_ref();
        record.map_or(Ok(()), |record| record.advance(next, note))
    }

    /// Recorded, or else only said: what follows must happen either way.
    fn try_advance(&self, next: SourceState, note: &str) -> bool {
        let recorded = self.advance(next, note);
        if let Err(error) = &recorded {
            tracing::warn!("{error}");
        }
        recorded.is_ok()
    }

    /// Puts the tree behind its fence while images are sent.
    pub(super) fn begin_fencing(&mut self) {
        let Some(record) = self.record.clone() else {
            return;
        };
        let images = self
            .dumped_images
            .as_ref()
            .map(|images| images.path.clone());
        let images = images.or_else(|| self.place.as_ref().map(DumpPlace::images));
        let pid = self.options.pid;
        let run_id = images.and_then(|images| DumpPlace::run_id(&images));
        self.fencing = Some(spawn_blocking(move || {
            let fenced = record.fence(pid, run_id);
            pause::at("fenced");
            fenced
        }));
    }

    /// The tree stands behind its fence.
    pub(super) async fn fenced(&mut self) -> Result<(), MigrateError> {
        while let Some(fencing) = &self.fencing {
            if fencing.is_finished() {
                let fencing = self.fencing.take().expect("just seen");
                return Ok(fencing.await.expect("fencing does not panic")?);
            }
            self.flush();
            // The tree's freeze is limited, whatever the kernel does.
            tokio::select! {
                waited = self.wait() => waited?,
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
        Ok(())
    }

    /// From the record of the commit on CRIU must not let the tree go, nor take its network lock
    /// away, when its caller dies: it sleeps until it is told how to end.
    pub(super) fn put_criu_to_sleep(&self) {
        let about = self.record.as_ref().map(|record| record.about());
        let fenced = about.filter(|about| about.fence.is_some());
        if let (Some(about), Some(frozen)) = (fenced, &self.frozen) {
            frozen.give_away(true);
            if let Some(criu) = about.criu {
                let _ = criu.signal(Signal::STOP);
            }
        }
    }

    pub(super) fn wake_criu(&self) {
        if let Some(criu) = self.record.as_ref().and_then(|record| record.about().criu) {
            let _ = criu.signal(Signal::CONT);
        }
    }

    /// Ends a freeze: the tree runs on here, whole.
    pub(super) async fn let_run(&mut self, reason: &str) {
        // Until it has run its course it could close the fence behind us.
        if let Some(fencing) = self.fencing.take()
            && let Ok(Err(error)) = fencing.await
        {
            tracing::warn!("{error}");
        }
        // The tree runs again whether that can be recorded or not.
        let is_keeping = self.try_advance(SourceState::Keeping, reason);
        if let Some(frozen) = self.frozen.take() {
            frozen.give_away(false);
            self.wake_criu();
            // Behind the fence, where there is one: it runs when it is whole.
            frozen.end(Verdict::Refuse);
            if !self.criu_ends_within(CRIU_TIME).await {
                frozen.kill_criu();
                if !self.criu_ends_within(KILL_TIME).await {
                    tracing::warn!("CRIU does not end; look whether the workload runs");
                }
                self.criu_end = Some(CriuEnd::Died);
            }
        }
        let Some(record) = self.record.clone() else {
            return;
        };
        let criu_died = self.criu_end == Some(CriuEnd::Died);
        let about = record.about();
        let history = record.journal().read();
        let was_fenced = history.map_or(true, |history| {
            let mut entries = history.entries.iter();
            entries.any(|entry| entry.state == SourceState::Fencing)
        });
        let releasing = spawn_blocking(move || hands::release(&about, criu_died, was_fenced));
        match releasing.await.expect("releasing does not panic") {
            Ok(notes) => {
                for note in notes {
                    self.emit(MigrateEvent::Warning(note));
                }
                // A full disk may have room by now.
                if !is_keeping {
                    self.try_advance(SourceState::Keeping, reason);
                }
                self.try_advance(SourceState::Kept, "");
            }
            // The guard, or recover, will try again.
            Err(problem) => self.emit(MigrateEvent::Warning(problem)),
        }
    }

    /// Waits until CRIU has ended, whatever the session says meanwhile.
    pub(super) async fn criu_ends_within(&mut self, longest: Duration) -> bool {
        let ended = async {
            while self.criu_end.is_none() {
                let Some(input) = self.inputs.recv().await else {
                    return;
                };
                // What the session finds wrong is not new.
                let _ = self.take(input);
            }
        };
        tokio::time::timeout(longest, ended).await.is_ok() && self.criu_end.is_some()
    }

    /// The connection is lost in the one moment in which nobody knows whether the copy runs: holds the
    /// tree until that is known, or decided. `None`: the operator left, and the tree stays held.
    pub(super) async fn settle(&mut self, error: &MigrateError) -> Option<SourceOutcome> {
        self.emit(MigrateEvent::InDoubt(error.to_string()));
        let record = self.record.clone()?;
        let mut stop = self.options.stop.clone();
        // An operator who asked before the doubt did not know of it.
        stop.mark_unchanged();
        let asked = async {
            if stop.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let (_never, not_stopped) = tokio::sync::watch::channel(false);
        let options = self.finish_options(ATTEMPT, not_stopped);
        tokio::pin!(asked);
        loop {
            tokio::select! {
                outcome = finish_source(record.journal(), record.lease(), &options) => match outcome {
                    Ok(outcome @ (SourceOutcome::Moved { .. } | SourceOutcome::Kept { .. })) => {
                        return Some(outcome);
                    }
                    // As before.
                    Ok(SourceOutcome::Held { .. }) => {}
                    Ok(SourceOutcome::Undecided { reason }) => {
                        self.emit(MigrateEvent::Warning(reason));
                    }
                    Err(error) => self.emit(MigrateEvent::Warning(error.to_string())),
                },
                () = &mut asked => return None,
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = &mut asked => return None,
            }
        }
    }

    fn finish_options(
        &self,
        patience: Duration,
        stop: tokio::sync::watch::Receiver<bool>,
    ) -> FinishOptions {
        FinishOptions {
            patience,
            target: None,
            transport: self.options.transport.clone(),
            stop,
        }
    }

    /// The connection is gone, and the workload stays: tells the destination on another one.
    pub(super) async fn meet_to_abort(&mut self, longest: Duration) -> bool {
        let Some(record) = self.record.clone() else {
            return false;
        };
        if record.journal().read().map(|history| history.state()).ok() != Some(SourceState::Kept) {
            return false;
        }
        let options = self.finish_options(longest, self.options.stop.clone());
        let told = finish_source(record.journal(), record.lease(), &options).await;
        matches!(told, Ok(SourceOutcome::Kept { told: true, .. }))
    }

    /// The workload runs at the destination, which has said so on another connection.
    pub(super) fn moved_late(&mut self, pid: u32, notes: Vec<String>) {
        self.report.outcome = Outcome::Migrated;
        self.report.pid = Some(pid).filter(|pid| *pid > 0);
        self.report.notes.extend(notes);
        self.report.notes.push(
            "the connection was lost in the moment of the hand-over, and made again: when the copy \
             was let go is not known"
                .to_owned(),
        );
    }

    /// Kills the tree behind its fence.
    pub(super) async fn kill_tree(&mut self) -> Option<String> {
        let about = match &self.record {
            Some(record) => record.about(),
            None => return None,
        };
        let killing = spawn_blocking(move || hands::end_processes(&about));
        killing.await.expect("killing does not panic").err()
    }

    /// Takes the records away, where nothing is left to do; else leaves them to the guard. Gives what
    /// an operator should know.
    pub(super) async fn close_record(&mut self, is_over: bool) -> Option<String> {
        let record = self.record.take()?;
        let about = record.about();
        if is_over {
            // The first of several that say so.
            let _ = record.advance(SourceState::Over, "");
        }
        let Ok(record) = Arc::try_unwrap(record) else {
            // A thread that still has it has lost its way; the guard will take the lease after it.
            return None;
        };
        let (journal, lease) = record.into_journal();
        let clearing = spawn_blocking(move || clear_source(journal));
        let cleared = clearing.await.expect("clearing does not panic");
        drop(lease);
        let guard = self.guard.take();
        match cleared {
            Ok(true) => {
                if let Some(guard) = guard {
                    let _ = spawn_blocking(move || guard.dismiss()).await;
                }
                None
            }
            // The guard goes on when this end of its pipe is dropped.
            Ok(false) if is_over => Some(lock_stays(&about, guard.is_some())),
            Ok(false) => None,
            Err(error) => Some(finish_problem(&error)),
        }
    }

    /// Records which process of CRIU will dump.
    pub(super) fn criu_is(&self, ready: &Ready) -> Result<(), JournalError> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        if let Some(leader) = ready.leader() {
            record.dumps_with(leader)?;
        }
        record.dumps_by(Process::of(ready.pid()))
    }

    /// Waits until CRIU has ended by itself, or kills it: what it holds is dead.
    pub(super) async fn end_criu(&mut self, longest: Duration) -> Option<String> {
        let ended = tokio::time::timeout(longest, async {
            loop {
                let picked = self.until(|event| match event {
                    Event::Freeze(Moment::Ended { result }) => Break(result),
                    other => Continue(other),
                });
                match picked.await {
                    Ok(result) => return result.err().map(|it| it.to_string()),
                    Err(error) if self.criu_end.is_some() => return Some(error.to_string()),
                    // Of the session, which is over and may say so again.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        match ended.await {
            Ok(problem) => problem,
            Err(_) => {
                if let Some(frozen) = &self.frozen {
                    frozen.kill_criu();
                }
                Some("CRIU did not end and was killed".to_owned())
            }
        }
    }
}

fn lock_stays(about: &SourceAbout, has_guard: bool) -> String {
    let table = about
        .run_id
        .as_deref()
        .map(crate::criu::network_lock::nftables_table);
    match table {
        Some(Ok(table)) if !has_guard => format!(
            "CRIU's network lock stays until the address has moved; then: nft delete table inet \
             {table}, or crxfer recover"
        ),
        _ => "CRIU's network lock stays until the address has moved: the guard removes it then"
            .to_owned(),
    }
}

fn finish_problem(error: &finish::FinishError) -> String {
    error.to_string()
}
