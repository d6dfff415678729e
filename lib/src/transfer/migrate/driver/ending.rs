//! How a migration ends: the report, or the workload where it belongs.

use std::ops::ControlFlow::{Break, Continue};
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use super::{Command, Driver, Event, since};
use crate::criu::CriuError;
use crate::hooks;
use crate::precopy::Measured;
use crate::session::SessionError;
use crate::session::migration::Owner;
use crate::transfer::TransferError;
use crate::transfer::finish::SourceOutcome;
use crate::transfer::migrate::report::{Host, MigrationReport, Outcome, PhaseReport};
use crate::transfer::migrate::{MigrateError, MigrateEvent, MigrateFailure};
use crate::transport::CloseCode;

/// How long the destination may take to say that nothing is left there.
const ABORT_TIME: Duration = Duration::from_secs(10);

impl Driver<'_> {
    /// Ends the migration early, with the workload where it belongs.
    ///
    /// Succeeds where it was in doubt, and the workload then runs at the destination.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) async fn give_up(&mut self, mut error: MigrateError) -> Result<(), MigrateFailure> {
        self.may_stop = false;
        // Nothing is expected of an iteration any more.
        self.iterating = None;
        if self.session.owner() == Owner::InDoubt {
            return self.end_doubt(error).await;
        }
        let owner = self.session.owner();
        let reason = match &error {
            MigrateError::Stopped => "the source's operator stopped it".to_owned(),
            error => error.to_string(),
        };
        self.let_run(&reason).await;
        let until = tokio::time::Instant::now() + ABORT_TIME;
        let told = match &error {
            MigrateError::Transfer(TransferError::Session(SessionError::Peer(_))) => {
                self.session.given_up()
            }
            _ => self.session.abort(Instant::now(), &reason),
        };
        let is_clean = told && {
            let aborted = self.until(|event| match event {
                Event::Session(Command::Aborted) => Break(()),
                // The tree runs again, or was never frozen.
                other => Continue(other),
            });
            matches!(tokio::time::timeout_at(until, aborted).await, Ok(Ok(())))
        };
        if self.touched && owner == Owner::Source {
            self.aborted(reason).await;
        }
        let is_clean = is_clean || {
            // Whatever comes on the old connection now is not waited for.
            self.connection.close(CloseCode::Cancelled, "");
            let left = until.saturating_duration_since(tokio::time::Instant::now());
            self.meet_to_abort(left).await
        };
        self.close_record(is_clean).await;
        if matches!(
            error,
            MigrateError::Criu(CriuError::Failed(_) | CriuError::Command { .. })
        ) && let Some(place) = &mut self.place
        {
            place.keep_logs();
        }
        if let (MigrateError::Criu(failure), Some(work)) = (&mut error, &self.work)
            && let Some(log) = failure.log()
        {
            work.keep_log(log, &self.id.to_string());
        }
        Err(MigrateFailure {
            error,
            owner,
            untouched: !self.touched,
            destination_is_clean: is_clean || !self.touched,
        })
    }

    async fn aborted(&mut self, reason: String) {
        let mut environment = self.environment();
        environment.reason = Some(reason);
        let hooks = self.options.hooks.clone();
        let running = spawn_blocking(move || hooks.run(hooks::Moment::AfterAbort, &environment));
        if let Ok(Err(error)) = running.await {
            self.emit(MigrateEvent::Warning(error.to_string()));
        }
        self.note_hooked();
    }

    /// Whoever goes on after this process must not run the last hook again.
    pub(super) fn note_hooked(&mut self) {
        if let Some(Err(error)) = self.record.as_ref().map(|record| record.hooked()) {
            self.emit(MigrateEvent::Warning(error.to_string()));
        }
    }

    // Nobody knows whether the copy runs: the tree stays frozen until somebody does.
    async fn end_doubt(&mut self, error: MigrateError) -> Result<(), MigrateFailure> {
        let failed = |error, owner, destination_is_clean| MigrateFailure {
            error,
            owner,
            untouched: false,
            destination_is_clean,
        };
        // It may still carry the commit, long after an operator has decided otherwise. From here on
        // only meetings say it.
        self.connection.close(CloseCode::LocalFailure, "");
        match self.settle(&error).await {
            Some(SourceOutcome::Moved { pid, notes }) => {
                self.moved_late(pid, notes);
                let note = self.close_record(true).await;
                self.report.notes.extend(note);
                Ok(())
            }
            Some(SourceOutcome::Kept { told, notes }) => {
                for note in notes {
                    self.emit(MigrateEvent::Warning(note));
                }
                self.close_record(told).await;
                Err(failed(error, Owner::Source, told))
            }
            // The guard goes on when this ends.
            _ => Err(failed(error, Owner::InDoubt, false)),
        }
    }

    pub(super) fn report(&mut self) -> MigrationReport {
        let clock = self.samples.offset();
        let begun = self.clock.begun_ns();
        let mut report = self.report.clone();
        report.clock = clock;
        report.wire_bytes = self.connection.wire_bytes();
        report.phases = std::mem::take(&mut self.phases);
        report.total = self.clock.elapsed();
        let is_timed = report.outcome == Outcome::Migrated && self.resumed_ns > 0;
        if let Some(offset) = clock.filter(|_| is_timed) {
            let here = |ns| since(offset.to_source(ns), begun);
            report
                .phases
                .extend(self.peer_phases.drain(..).map(|phase| PhaseReport {
                    name: phase.name,
                    host: Host::Destination,
                    begin_ns: here(phase.begin_ns),
                    end_ns: here(phase.end_ns),
                }));
            let resumed = offset.to_source(self.resumed_ns);
            let downtime = Duration::from_nanos(resumed.saturating_sub(self.freezing_ns));
            report.downtime = Some(downtime);
            report.total = Duration::from_nanos(resumed.saturating_sub(begun));
            report.accuracy = Some(self.policy.accuracy(Measured {
                downtime,
                finish: report.total,
                changed_bytes: report.final_changed_pages * self.page.bytes(),
            }));
        }
        report.phases.sort_by_key(|phase| phase.begin_ns);
        report
    }
}
