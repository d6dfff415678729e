//! From the freeze to the end of the source's tree.

use std::ops::ControlFlow::{Break, Continue};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_blocking};

use super::{Command, Driver, Event, Input, ended, restore_options};
use crate::criu::{CriuError, Verdict};
use crate::delta::{Compared, Outgoing};
use crate::handover::SourceState;
use crate::hooks;
use crate::runtime;
use crate::session::SessionError;
use crate::transfer::migrate::freeze::{self, DumpPlace, Dumper, Images, Job, Moment};
use crate::transfer::migrate::report::Outcome;
use crate::transfer::migrate::{MigrateError, MigrateEvent};
use crate::transfer::{costs, finish, pause};

/// How long CRIU may take to say why it failed. The tree stands still meanwhile.
const SAY_TIME: Duration = Duration::from_millis(500);

/// How long CRIU may take to end when its tree is dead.
const END_TIME: Duration = Duration::from_secs(3);

/// The same of a command, whose runtime tidies up behind it.
const COMMAND_TIME: Duration = Duration::from_secs(20);

/// How long the destination may take to say that its copy runs before it is asked again.
const ANSWER_TIME: Duration = Duration::from_secs(3);

impl Driver<'_> {
    /// From here on the tree stands still.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) async fn freeze(
        &mut self,
        outgoing: Outgoing,
        dumper: Dumper,
    ) -> Result<Outgoing, MigrateError> {
        let begun = self.clock.now_ns();
        let number = self.session.prepare_final(Instant::now());
        let work = self.work_path();
        let place = DumpPlace::create(&work, &self.id.to_string());
        let mut place = place.map_err(|source| MigrateError::Work { path: work, source })?;
        if self.options.external.is_some() {
            place.serves(self.options.pid);
        }
        let job = Job {
            pid: self.options.pid,
            number,
            page: self.page,
            criu: self.options.criu.clone(),
            images: place.images(),
            work: place.root().to_owned(),
            parent: self.parent.take(),
            record: self.record.clone(),
            name: self.name.clone(),
            words: runtime::words(&restore_options(&self.options.criu)),
        };
        self.place = Some(place);
        let readying = spawn_blocking(move || {
            let ready = freeze::ready(&job, dumper);
            ready.map(|ready| (job, ready))
        });
        let (job, ready) = self.job(readying).await??;
        self.criu_is(&ready)?;
        self.until(|event| match event {
            Event::Session(Command::Freeze) => Break(()),
            other => Continue(other),
        })
        .await?;
        self.phase("destination gets ready", begun, self.clock.now_ns());
        let stream = self.stream.clone().expect("opened before the iterations");
        let input = self.input.clone();
        let tell = move |moment| {
            let _ = input.send(Input::Freeze(moment));
        };
        self.session.frozen(Instant::now());
        self.emit(MigrateEvent::Freezing);
        let frozen = freeze::freeze(job, ready, outgoing, stream, self.clock, tell);
        self.frozen = Some(frozen.map_err(|source| MigrateError::Work {
            path: "/proc/self".into(),
            source,
        })?);
        self.dumped().await
    }

    // Until all of the dump is written and its memory on the stream.
    pub(super) async fn dumped(&mut self) -> Result<Outgoing, MigrateError> {
        let (mut outgoing, mut held, mut from) = (None, false, 0);
        let mut is_begun = false;
        let mut hook: Option<JoinHandle<_>> = None;
        while !held || outgoing.is_none() {
            let moment = self.moment().await?;
            match moment {
                Moment::Freezing { at_ns } => (self.freezing_ns, from) = (at_ns, at_ns),
                Moment::MemoryBegins { at_ns } => {
                    if !held {
                        self.phase("freeze the tree", from, at_ns);
                        from = at_ns;
                    }
                    is_begun = true;
                    hook = self.start_hook(hooks::Moment::AfterFreeze);
                }
                Moment::MemoryEnds {
                    at_ns,
                    outgoing: back,
                    result,
                } => {
                    self.phase("dump and compare memory", from, at_ns);
                    from = at_ns;
                    match result {
                        Ok(compared) => self.final_pages(compared),
                        // CRIU's own error says more, and follows.
                        Err(error) => return Err(self.criu_error(error).await),
                    }
                    outgoing = Some(*back);
                }
                Moment::Held { at_ns, images } => {
                    self.dumped_images = images;
                    if is_begun {
                        self.phase("dump the rest", from.min(at_ns), at_ns);
                    } else {
                        // A command's, whose memory lies in files.
                        self.phase("freeze and dump", from, at_ns);
                        from = at_ns;
                    }
                    let took = at_ns.saturating_sub(self.freezing_ns);
                    self.dump_took = Duration::from_nanos(took);
                    held = true;
                }
                Moment::Ended { result } => return Err(ended(result)),
            }
        }
        if let Some(hook) = hook {
            self.job(hook).await??;
        }
        Ok(outgoing.expect("the loop ends with it"))
    }

    pub(super) fn final_pages(&mut self, compared: Compared) {
        self.report.dumped_pages = compared.pages;
        self.report.final_changed_pages = compared.changed;
        self.report.final_sent_pages = compared.sent;
    }

    // The memory stream broke: CRIU knows why, or it does not.
    pub(super) async fn criu_error(&mut self, memory: String) -> MigrateError {
        if let Some(frozen) = &self.frozen {
            frozen.end(Verdict::Refuse);
        }
        loop {
            match tokio::time::timeout(SAY_TIME, self.moment()).await {
                Ok(Ok(Moment::Ended {
                    result:
                        Err(
                            error @ MigrateError::Criu(
                                CriuError::Failed(_) | CriuError::Command { .. },
                            ),
                        ),
                    ..
                })) => return error,
                Ok(Ok(Moment::Ended { .. })) | Err(_) => return MigrateError::Memory(memory),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return error,
            }
        }
    }

    pub(super) async fn hand_over(&mut self, mut outgoing: Outgoing) -> Result<(), MigrateError> {
        pause::at_point("held").await;
        let begun = self.clock.now_ns();
        self.begin_fencing();
        let place = self.place.as_ref().expect("made before");
        let (images, has_memory) = match &self.dumped_images {
            Some(Images { path, has_memory }) => (path.clone(), *has_memory),
            None => (place.images(), false),
        };
        let stream = self.stream.clone().expect("opened before");
        let (page, number) = (self.page, self.session.iteration());
        let path = images.clone();
        let sending = spawn_blocking(move || {
            freeze::send_images(&path, page, number, &mut outgoing, &stream, has_memory)
        });
        let sent = self.job(sending).await?;
        sent.map_err(|source| MigrateError::Work {
            path: images,
            source,
        })?;
        self.session.end_final();
        let sent_at = self.clock.now_ns();
        self.phase("send the rest", begun, sent_at);
        self.until(|event| match event {
            Event::Session(Command::Built) => Break(()),
            other => Continue(other),
        })
        .await?;
        let built = self.clock.now_ns();
        self.phase("wait for the copy", sent_at, built);
        self.emit(MigrateEvent::Built);
        self.hook(hooks::Moment::BeforeSourceKill).await?;
        self.fenced().await?;
        self.commit().await?;
        self.phase("commit", built, self.clock.now_ns());
        self.end_source().await;
        Ok(())
    }

    // The point of no return. The tree stays frozen until the destination has said that its copy runs.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) async fn commit(&mut self) -> Result<(), MigrateError> {
        if *self.stop.borrow() {
            return Err(MigrateError::Stopped);
        }
        self.may_stop = false;
        pause::at_point("before-commit-record").await;
        self.put_criu_to_sleep();
        let now = Instant::now();
        if !self.session.may_commit(now) {
            // The freeze limit has passed, or the session is over.
            self.session.handle_timeout(now)?;
            return Err(MigrateError::Stopped);
        }
        // Where it cannot be recorded nothing was said, and the workload is still this host's. From the
        // record on nobody here may take it back: an operator who reads it may already have let the
        // copy go.
        self.advance(SourceState::Committed, "")?;
        let said = self.session.commit(now);
        debug_assert!(said, "the record took no time of the session's");
        pause::at_point("committed").await;
        self.flush();
        pause::at_point("commit-sent").await;
        let running = self.until(|event| match event {
            Event::Session(Command::Running {
                pid,
                resumed_ns,
                phases,
                notes,
            }) => Break((pid, resumed_ns, phases, notes)),
            other => Continue(other),
        });
        // Letting go takes milliseconds. Who does not say so for this long may be cut off, or dead: it is
        // asked on another connection, long before this one is given up.
        let running = tokio::time::timeout(ANSWER_TIME, running).await;
        let silent = |_| SessionError::Silent(ANSWER_TIME.as_secs());
        let (pid, resumed_ns, phases, notes) =
            running.map_err(|late| MigrateError::Transfer(silent(late).into()))??;
        self.report.pid = Some(pid);
        self.report.notes.extend(notes);
        self.report.outcome = Outcome::Migrated;
        self.resumed_ns = resumed_ns;
        self.peer_phases = phases;
        Ok(())
    }

    // The workload runs at the destination: whatever fails now is only reported.
    pub(super) async fn end_source(&mut self) {
        let begun = self.clock.now_ns();
        if let Err(error) = self.advance(SourceState::Moved, "") {
            self.report.notes.push(error.to_string());
        }
        pause::at_point("moved").await;
        // Not CRIU: a tree that is frozen by the kernel would make it wait.
        let left = self.kill_tree().await;
        pause::at_point("killed").await;
        if let Some(frozen) = &self.frozen {
            // Where the tree stays held it must not be let go either.
            frozen.give_away(left.is_some());
            frozen.end(Verdict::GoOn);
        }
        self.wake_criu();
        let longest = match &self.options.external {
            Some(_) => COMMAND_TIME,
            None => END_TIME,
        };
        let problem = self.end_criu(longest).await;
        self.report.notes.extend(left.clone());
        if let Some(problem) = problem {
            tracing::warn!("{problem}");
            if let Some(about) = self.record.as_ref().map(|record| record.about()) {
                let _ = spawn_blocking(move || finish::tree::forget(&about)).await;
            }
        }
        self.phase("end the source's tree", begun, self.clock.now_ns());
        // One that builds on a pre-dump says nothing about others.
        if !self.is_chained {
            costs::learn_dump(self.survey.facts.tree.memory_bytes, self.dump_took);
        }
        self.report.criu_stats = self.place.as_ref().and_then(DumpPlace::stats);
        if let Err(error) = self.after_commit().await {
            self.report.notes.push(error.to_string());
        }
        // The images are gone when the journal is.
        self.place = None;
        let note = self.close_record(left.is_none()).await;
        self.report.notes.extend(note);
    }

    pub(super) async fn after_commit(&mut self) -> Result<(), MigrateError> {
        let run = self.hook(hooks::Moment::AfterCommit).await;
        self.note_hooked();
        run
    }
}
