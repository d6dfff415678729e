//! How a migration ends: the report, or the workload where it belongs.

use std::ops::ControlFlow::{Break, Continue};
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use super::{Command, Driver, Event, RESUME_TIME, since};
use crate::criu::{CriuError, Verdict};
use crate::hooks;
use crate::precopy::Measured;
use crate::session::SessionError;
use crate::session::migration::Owner;
use crate::transfer::TransferError;
use crate::transfer::migrate::freeze::Moment;
use crate::transfer::migrate::report::{Host, MigrationReport, Outcome, PhaseReport};
use crate::transfer::migrate::{MigrateError, MigrateEvent, MigrateFailure};

/// How long the destination may take to say that nothing is left there.
const ABORT_TIME: Duration = Duration::from_secs(10);

/// Between looks at something that cannot be waited for.
const SHORTLY: Duration = Duration::from_millis(10);

impl Driver<'_> {
    /// Ends the migration early, with the workload where it belongs.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) async fn give_up(&mut self, error: MigrateError) -> MigrateFailure {
        self.may_stop = false;
        // Nothing is expected of an iteration any more.
        self.iterating = None;
        if self.session.owner() == Owner::InDoubt {
            self.hold(&error).await;
        }
        let owner = self.session.owner();
        self.let_run().await;
        let reason = match &error {
            MigrateError::Stopped => "the source's operator stopped it".to_owned(),
            error => error.to_string(),
        };
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
            matches!(tokio::time::timeout(ABORT_TIME, aborted).await, Ok(Ok(())))
        };
        if self.touched && owner == Owner::Source {
            let mut environment = self.environment();
            environment.reason = Some(reason);
            let hooks = self.options.hooks.clone();
            let running =
                spawn_blocking(move || hooks.run(hooks::Moment::AfterAbort, &environment));
            if let Ok(Err(error)) = running.await {
                self.emit(MigrateEvent::Warning(error.to_string()));
            }
        }
        if let (MigrateError::Criu(CriuError::Failed(_)), Some(place)) = (&error, &mut self.place) {
            place.keep_logs();
        }
        MigrateFailure {
            error,
            owner,
            untouched: !self.touched,
            destination_is_clean: is_clean || !self.touched,
        }
    }

    // Nobody knows whether the copy runs: the tree stays frozen until the operator decides.
    pub(super) async fn hold(&mut self, error: &MigrateError) {
        self.emit(MigrateEvent::InDoubt(error.to_string()));
        let mut stop = self.options.stop.clone();
        // An operator who asked before the doubt did not know of it.
        stop.mark_unchanged();
        if stop.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Ends a freeze, and waits until CRIU has let the tree go.
    pub(super) async fn let_run(&mut self) {
        let Some(frozen) = self.frozen.take() else {
            return;
        };
        frozen.end(Verdict::Refuse);
        let ended = async {
            loop {
                match self.moment().await {
                    Ok(Moment::Ended { .. }) => return,
                    Ok(_) => {}
                    // Of the session, which is over: it may say so again and again.
                    Err(_) => tokio::time::sleep(SHORTLY).await,
                }
            }
        };
        if tokio::time::timeout(RESUME_TIME, ended).await.is_err() {
            tracing::warn!("CRIU does not end; look whether the workload runs");
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
        if let Some(offset) = clock.filter(|_| report.outcome == Outcome::Migrated) {
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
