//! From what arrives to a copy that stands built.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use tokio::task::spawn_blocking;

use super::{Driver, Happening, check_images, failed};
use crate::criu::CriuError;
use crate::handover::DestinationState;
use crate::hooks;
use crate::session::SessionError;
use crate::standby;
use crate::store::Tried as _;
use crate::transfer::TransferError;
use crate::transfer::pause;
use crate::transfer::recv::record::cannot_record;
use crate::transfer::recv::restore::{self, Moment, refused};
use crate::tree::Process;
use crate::wire::FailureCode;

impl Driver<'_> {
    pub(super) fn arrived(
        &mut self,
        event: standby::Event,
        work_ns: u64,
    ) -> Result<(), TransferError> {
        match event {
            standby::Event::Begun { number, is_final } => {
                self.session.iteration_begun(number, is_final)?;
                if is_final {
                    self.final_begun_ns = self.clock.now_ns();
                }
            }
            standby::Event::Stored { number, bytes } => self.stored(number, bytes, work_ns),
            standby::Event::Complete {
                directory, pages, ..
            } => {
                self.dumped_bytes = pages * self.offer.page_size.bytes();
                self.complete(directory);
            }
            standby::Event::Dumped(_) => {
                return Err(SessionError::Protocol("a dump out of order").into());
            }
        }
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) fn stored(&mut self, number: u32, bytes: u64, work_ns: u64) {
        self.session.stored(Instant::now(), number, bytes, work_ns);
    }

    // Before the freeze: CRIU waits for work, the addresses are there.
    pub(super) fn prepare_final(&mut self) {
        let (host, environment, tell) =
            (self.host.clone(), self.environment(None), self.tell.clone());
        let worker = self.worker.take();
        let root = self.place.path.clone();
        let record = self.record.clone();
        tokio::spawn(async move {
            let prepared = async {
                let worker = match worker {
                    Some(worker) => worker.await.expect("starting CRIU does not panic"),
                    None => return Err(SessionError::Protocol("a second final iteration").into()),
                };
                let worker = worker.map_err(|error| failed(&error))?;
                // Now, and not in the freeze: who finds leftovers must know since when.
                if let (Some(record), Some(criu)) = (record, Process::of(worker.pid())) {
                    let noted = record.note_criu(criu);
                    noted.map_err(|error| cannot_record(&error))?;
                }
                let hooked = spawn_blocking(move || {
                    host.hooks.run(hooks::Moment::AddressPrepare, &environment)
                });
                let hooked = hooked.await.expect("a hook does not panic");
                hooked.map_err(|error| refused(FailureCode::Hook, error.to_string()))?;
                standby::prepare_final(&root)?;
                Ok(Box::new(worker))
            };
            let _ = tell.send(Happening::Prepared(prepared.await));
        });
    }

    // Everything has arrived: CRIU begins, while the rest is checked and brought to disk.
    pub(super) fn complete(&mut self, directory: PathBuf) {
        self.complete_ns = self.clock.now_ns();
        self.building = true;
        // The journal says from now on what happens to it: this process's end does not remove it.
        self.place.owned = false;
        let tell = self.tell.clone();
        let durable = self.is_durable();
        let checked = directory.clone();
        let record = self.record.clone();
        spawn_blocking(move || {
            let synced = check_images(&checked).and_then(|()| match durable {
                true => Ok(standby::sync_directory(&checked)?),
                false => Ok(()),
            });
            // Before the vote can be given, and beside CRIU's work: it costs no downtime of its own.
            let recorded = synced.and_then(|()| {
                let recorded = record.map_or(Ok(()), |record| record.complete());
                recorded.map_err(|error| cannot_record(&error))
            });
            pause::at("complete");
            let _ = tell.send(Happening::Completed(recorded));
        });
        if !self.host.hooks.has(hooks::Moment::BeforeRestore) {
            let _ = self.tell.send(Happening::HookRun(Ok(())));
            return;
        }
        let (hooks, tell) = (self.host.hooks.clone(), self.tell.clone());
        let environment = self.environment(Some(directory));
        spawn_blocking(move || {
            let run = hooks.run(hooks::Moment::BeforeRestore, &environment);
            let _ = tell.send(Happening::HookRun(run.map(drop)));
        });
    }

    pub(super) fn start_restore(
        &mut self,
        hook: Result<(), hooks::HookError>,
    ) -> Result<(), TransferError> {
        pause::at("building");
        hook.map_err(|error| refused(FailureCode::Hook, error.to_string()))?;
        // It has gone with everything else where the source gave up meanwhile.
        let Some(worker) = self.prepared.take() else {
            return Ok(());
        };
        let criu = restore::options(&self.offer.options, self.host.config_file.as_deref());
        let tell = self.tell.clone();
        let told = move |moment| {
            let _ = tell.send(Happening::Restore(moment));
        };
        let images = self.place.path.join(standby::FINAL);
        let work = self.place.work.clone();
        self.restore_ended = false;
        let restoring = restore::restore(*worker, images, work, criu, self.clock, told);
        self.restoring = Some(restoring.tried("start a thread for", &self.place.path)?);
        Ok(())
    }

    pub(super) fn restored(&mut self, moment: Moment) -> Result<(), TransferError> {
        match moment {
            Moment::Held { pid, at_ns } => {
                self.building = false;
                self.held = Some(pid);
                self.held_ns = at_ns;
                self.vote();
            }
            Moment::Resumed { at_ns } => {
                if let Some(pid) = self.held {
                    self.resumed(pid, at_ns);
                }
            }
            Moment::Ended { result } => {
                self.restore_ended = true;
                self.building = false;
                match result {
                    // After its release CRIU's complaints are about the network lock and the like.
                    Err(error) if self.state == Some(DestinationState::Running) => {
                        self.notes.push(error.to_string());
                    }
                    result if self.state == Some(DestinationState::Resuming) => {
                        let why = result.err().map(|error| error.to_string());
                        self.bring_back(&why.unwrap_or_default())?;
                    }
                    Ok(_) => {}
                    Err(error) => return Err(failed(&self.with_kept_log(error))),
                }
            }
        }
        Ok(())
    }

    // The copy is built, and all of it is checked and stored.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) fn vote(&mut self) {
        if self.held.is_none() || self.state != Some(DestinationState::Complete) {
            return;
        }
        if self.linked {
            self.voted |= self.session.built(Instant::now());
        }
        self.proceed();
    }

    // The operator needs it; the directory it is in will be gone.
    fn with_kept_log(&self, mut error: CriuError) -> CriuError {
        let Some(log) = error.log() else {
            return error;
        };
        let kept = self.shared.store.home_path("restore.log");
        // It may be on another file system.
        match fs::copy(&*log, &kept) {
            Ok(_) => *log = kept,
            Err(error) => tracing::warn!("cannot keep {}: {error}", log.display()),
        }
        error
    }
}
