//! Whose the copy is, whatever becomes of the connection.
//!
//! Once the journal says that all images are there, no failure of the link takes the copy away: the
//! driver keeps it as CRIU holds it, and waits for a source that is back on another connection, for an
//! operator, or for the end of the receiver. What is to be done then stands in
//! [`DestinationState::duty`].

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::{Driver, FAREWELL, Happening, REMOVE_TIME, is_told};
use crate::criu;
use crate::handover::{DestinationDuty, DestinationState, Keep, Verdict};
use crate::hooks::{self, Environment, Hooks, Side};
use crate::standby;
use crate::transfer::event::Event;
use crate::transfer::finish::{self, Alive};
use crate::transfer::recv::incoming::Place;
use crate::transfer::recv::meeting::Call;
use crate::transfer::recv::restore::{Moment, refused};
use crate::transfer::{TransferError, costs, pause};
use crate::transport::{CloseCode, ControlSender, TransportError};
use crate::wire::{Answer, FailureCode, Message, Phase, Step};

/// How often a copy that CRIU did not bring to life is built once more.
const TRIES: u32 = 1;

impl Driver<'_> {
    /// The connection is of no use any more. An error where the migration ends with it.
    pub(super) fn cut(&mut self, error: TransferError) -> Result<(), TransferError> {
        match self.state {
            Some(DestinationState::Complete) if !is_told(&error) => {
                tracing::info!("the connection to the source is lost: {error}");
                self.leave_link();
                if !self.committed {
                    self.shared.events.emit(Event::Holding {
                        id: self.offer.id,
                        name: self.offer.name.clone(),
                        address: self.connection.remote_address(),
                        images: self.place.path.join(standby::FINAL),
                    });
                }
                Ok(())
            }
            // Its copy runs, or is about to: that the source is gone changes nothing.
            Some(DestinationState::Resuming | DestinationState::Running) => {
                self.leave_link();
                Ok(())
            }
            Some(DestinationState::Removed) => {
                self.leave_link();
                Ok(())
            }
            _ => Err(error),
        }
    }

    fn leave_link(&mut self) {
        self.linked = false;
        self.connection.close(CloseCode::Unspecified, "");
    }

    /// Something on this host failed. An error where the migration ends with it.
    pub(super) fn trouble(&mut self, error: TransferError) -> Result<(), TransferError> {
        match self.state {
            // The source may count on it, or cannot be told: the images are good, and CRIU can be
            // asked once more when it is known whose they are.
            Some(DestinationState::Complete) if self.voted || !self.linked => {
                let is_under_way = self.restoring.is_some() && !self.restore_ended;
                self.building &= is_under_way;
                self.held = self.held.filter(|_| is_under_way);
                self.warn(format!("{error}; its complete images are kept"));
                self.proceed();
                Ok(())
            }
            Some(DestinationState::Running) => {
                self.notes.push(error.to_string());
                Ok(())
            }
            Some(DestinationState::Removed) => Ok(()),
            _ => Err(error),
        }
    }

    // What an operator has said here goes before a commit that was still on its way.
    fn decided(&self) -> Option<Keep> {
        self.record.as_ref()?.decided().ok().flatten()
    }

    fn warn(&self, error: String) {
        let address = self.connection.remote_address();
        self.shared.events.emit(Event::Failed { address, error });
    }

    /// A source is back on another connection: this one is dead, whatever it looks like.
    pub(super) async fn met(
        &mut self,
        call: Call,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) {
        let Some(state) = self.state else { return };
        let answer = match (state, call.verdict) {
            (DestinationState::Running, _) => Answer::Runs {
                pid: self.held.unwrap_or(0),
            },
            (DestinationState::Resuming, _) => {
                self.asking.push(call.answer);
                return;
            }
            (DestinationState::Complete, Verdict::Ask) => Answer::Holds,
            // The link's end has not been noticed yet; then this will be removed.
            (DestinationState::Receiving, Verdict::Ask | Verdict::Commit) => Answer::Busy,
            (state, verdict) => match state.duty(verdict, self.decided()) {
                DestinationDuty::Resume => {
                    self.leave_link();
                    self.asking.push(call.answer);
                    self.commit();
                    return;
                }
                DestinationDuty::Remove => {
                    self.leave_link();
                    self.withdraw("the source keeps the workload", happenings)
                        .await;
                    Answer::Removed
                }
                DestinationDuty::Hold | DestinationDuty::GiveBack => Answer::Holds,
                DestinationDuty::Tell(answer) => answer,
            },
        };
        let _ = call.answer.send(answer);
    }

    /// Whether the journal has to be looked at, or written again.
    pub(super) fn must_look(&self) -> bool {
        self.state == Some(DestinationState::Complete) && (!self.linked || self.committed)
    }

    /// What an operator has decided meanwhile, where nobody else can.
    pub(super) async fn look(&mut self, happenings: &mut mpsc::UnboundedReceiver<Happening>) {
        if self.committed {
            return self.proceed();
        }
        let decided = self.record.as_ref().map(|record| record.decided());
        let keep = match decided {
            Some(Ok(keep)) => keep,
            Some(Err(error)) => {
                return self.say_once(format!("cannot see what was decided: {error}"));
            }
            None => None,
        };
        match DestinationState::Complete.duty(Verdict::Ask, keep) {
            DestinationDuty::Resume => self.commit(),
            DestinationDuty::Remove => {
                self.taken_back = true;
                let why = "an operator decided that the source keeps it";
                self.withdraw(why, happenings).await;
            }
            DestinationDuty::Hold | DestinationDuty::GiveBack | DestinationDuty::Tell(_) => {}
        }
    }

    fn say_once(&mut self, text: String) {
        if !std::mem::replace(&mut self.stuck, true) {
            self.warn(text);
        }
    }

    /// The workload is this host's.
    pub(super) fn commit(&mut self) {
        self.committed = true;
        self.proceed();
    }

    /// Lets the copy go, if it is this host's and stands built. What cannot be recorded is not done:
    /// it is tried again with every [look](Self::look).
    pub(super) fn proceed(&mut self) {
        let is_complete = self.state == Some(DestinationState::Complete);
        if !is_complete || !self.committed || self.building {
            return;
        }
        let recorded = self.record.as_ref().map(|record| record.resuming(""));
        if let Some(Err(error)) = recorded {
            return self.say_once(format!(
                "holds a complete copy of {}, which is this host's, and does not let it go: {error}; it runs as soon as that can be written",
                self.offer.name
            ));
        }
        self.state = Some(DestinationState::Resuming);
        pause::at("resuming");
        self.released_ns = self.clock.now_ns();
        match &self.restoring {
            Some(restoring) if !self.restore_ended && self.held.is_some() => {
                restoring.end(criu::Verdict::GoOn);
                self.later(hooks::Moment::AddressAnnounce);
            }
            _ => {
                // The first time: it has not been tried yet. Clients are led here when it stands: until
                // then they would meet a host without their connections.
                let _ = self.bring_back("CRIU does not hold it any more");
            }
        }
    }

    /// CRIU is gone, and has not said that the copy runs: looks for it, or builds it once more.
    pub(super) fn bring_back(&mut self, why: &str) -> Result<(), TransferError> {
        if self.tries >= TRIES {
            return Err(refused(FailureCode::Criu, why));
        }
        self.tries += 1;
        self.bringing = true;
        // Neither CRIU has anything more to do, and leftovers are looked for when they are gone.
        drop((self.prepared.take(), self.restoring.take()));
        tracing::warn!("the copy is looked for, and built once more where it does not run: {why}");
        let Some(record) = self.record.clone() else {
            return Ok(());
        };
        let tell = self.tell.clone();
        spawn_blocking(move || {
            // The address is prepared already; the others are run by this driver.
            let none = Hooks::none(Side::Destination);
            let note = |criu| record.note_criu(criu);
            let brought = finish::bring_to_life(&record.about(), &none, note);
            let _ = tell.send(Happening::Brought(brought));
        });
        Ok(())
    }

    pub(super) fn brought(&mut self, result: Result<Alive, String>) -> Result<(), TransferError> {
        self.bringing = false;
        let alive = result.map_err(|why| refused(FailureCode::Criu, why))?;
        self.notes.extend(alive.notes);
        self.later(hooks::Moment::AddressAnnounce);
        self.resumed(alive.pid, self.clock.now_ns());
        Ok(())
    }

    /// The copy runs.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    pub(super) fn resumed(&mut self, pid: u32, at_ns: u64) {
        self.held = Some(pid);
        if let Some(Err(error)) = self.record.as_ref().map(|record| record.running(pid)) {
            // Whoever finds the journal finds the copy, too.
            self.notes.push(format!("not recorded as running: {error}"));
        }
        self.state = Some(DestinationState::Running);
        pause::at("running");
        let phase = |name: &str, begin_ns, end_ns| Phase {
            name: name.to_owned(),
            begin_ns,
            end_ns,
        };
        self.phases = vec![
            phase(
                "take the final iteration",
                self.final_begun_ns,
                self.complete_ns,
            ),
            phase("restore", self.complete_ns, self.held_ns),
            phase("hold for the commit", self.held_ns, self.released_ns),
            phase("resume", self.released_ns, at_ns),
        ];
        let (phases, notes) = (self.phases.clone(), self.notes.clone());
        self.session
            .running(Instant::now(), pid, at_ns, phases, notes);
        for asking in self.asking.drain(..) {
            let _ = asking.send(Answer::Runs { pid });
        }
        self.shared.events.emit(Event::Restored {
            name: self.offer.name.clone(),
            pid,
            address: self.connection.remote_address(),
        });
        self.later(hooks::Moment::AfterRestore);
        let took = Duration::from_nanos(self.held_ns.saturating_sub(self.complete_ns));
        costs::learn_restore(self.dumped_bytes, took);
    }

    // A hook that nobody waits for.
    pub(super) fn later(&mut self, moment: hooks::Moment) {
        if !self.host.hooks.has(moment) {
            return;
        }
        let (hooks, environment) = (self.host.hooks.clone(), self.environment(None));
        let (events, address) = (self.shared.events.clone(), self.connection.remote_address());
        let record = self.record.clone();
        spawn_blocking(move || {
            if let Err(error) = hooks.run(moment, &environment) {
                let error = error.to_string();
                events.emit(Event::Failed { address, error });
                return;
            }
            // Gone where all is over already.
            let record = record.filter(|_| moment == hooks::Moment::AddressAnnounce);
            let _ = record.map(|record| record.announced());
        });
    }

    pub(super) fn environment(&self, images: Option<PathBuf>) -> Environment {
        Environment {
            migration: self.offer.name.clone(),
            pid: self.held,
            peer: Some(self.connection.remote_address().ip()),
            addresses: self.facts.addresses(),
            images,
            reason: None,
        }
    }

    /// What came of a copy that runs.
    pub(super) async fn moved(&mut self) {
        // The source ends its connection in this way when it needs no answer any more.
        let closed = tokio::time::timeout(FAREWELL, self.connection.closed()).await;
        let well = matches!(
            closed,
            Ok(TransportError::PeerClosed {
                code: CloseCode::Done,
                ..
            })
        );
        self.remove_place().await;
        if well {
            self.forget();
        }
        // Only now: with --once the receiver ends, and the source should hear the last word.
        self.shared.received.send_modify(|count| *count += 1);
    }

    /// The copy was to run and does not. It is complete: it must not be lost.
    pub(super) fn stranded(&mut self, error: Option<TransferError>) -> TransferError {
        let why = error.map_or_else(|| "CRIU ended".to_owned(), |error| error.to_string());
        let reason = format!(
            "the copy was let go, but CRIU did not bring it to life ({why}); its complete images are in {} of the destination: `crxfer recover --dir` of that directory tries again",
            self.place.path.join(standby::FINAL).display()
        );
        refused(FailureCode::Criu, reason)
    }

    /// Removes the journal: nobody will ask any more, or whoever asks may hear that there is nothing.
    pub(super) fn forget(&mut self) {
        if self.taken_back {
            return;
        }
        self.registered = None;
        if let Some(Err(error)) = self.record.take().map(|record| record.close()) {
            tracing::warn!("{error}");
        }
    }

    /// The workload is the source's: nothing of it stays here.
    pub(super) async fn withdraw(
        &mut self,
        reason: &str,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) {
        // A full disk must not keep what fills it.
        if let Some(Err(error)) = self.record.as_ref().map(|record| record.removing(reason)) {
            tracing::warn!("{error}");
        }
        self.remove(happenings).await;
        if std::mem::take(&mut self.touched) {
            self.after_abort(reason.to_owned()).await;
        }
        if let Some(record) = &self.record {
            self.state = Some(DestinationState::Removed);
            if let Err(error) = record.removed() {
                tracing::warn!("{error}");
            }
        }
    }

    /// Tells the source first: its tree stands still until it knows.
    pub(super) async fn take_back(
        &mut self,
        error: TransferError,
        control: &mut ControlSender,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        if let Some(failure) = error.to_failure() {
            let failure = Message::Failure(failure).encode();
            let _ = tokio::time::timeout(FAREWELL, control.write_message(&failure)).await;
        }
        self.withdraw(&error.to_string(), happenings).await;
        self.forget();
        let aborted = Message::Migration(Step::Aborted).encode();
        let _ = tokio::time::timeout(FAREWELL, control.write_message(&aborted)).await;
        let _ = control.finish();
        // The source closes when it has read that.
        let _ = tokio::time::timeout(FAREWELL, self.connection.closed()).await;
        self.connection.close_and_tell(error.close_code(), "").await;
        Err(error)
    }

    // Nothing of the copy and its images stays.
    pub(super) async fn remove(&mut self, happenings: &mut mpsc::UnboundedReceiver<Happening>) {
        self.prepared = None;
        self.held = None;
        if let Some(receiving) = self.receiving.take() {
            let ending = spawn_blocking(move || receiving.end());
            ending.await.expect("ending does not panic");
        }
        if let Some(restoring) = self.restoring.take() {
            restoring.end(criu::Verdict::Refuse);
            let ended = async {
                while !self.restore_ended {
                    if let Some(Happening::Restore(Moment::Ended { .. })) = happenings.recv().await
                    {
                        self.restore_ended = true;
                    }
                }
            };
            if tokio::time::timeout(REMOVE_TIME, ended).await.is_err() {
                tracing::warn!("CRIU does not end");
            }
        }
        // What CRIU did not end itself.
        if let Some(record) = &self.record {
            let about = record.about();
            let clearing = spawn_blocking(move || finish::clear(&about));
            match clearing.await.expect("killing does not panic") {
                Ok(notes) => notes.iter().for_each(|note| tracing::warn!("{note}")),
                Err(error) => self.warn(error),
            }
        }
        self.remove_place().await;
    }

    async fn remove_place(&mut self) {
        self.place.owned = self.state.is_some();
        let gone = Place {
            path: PathBuf::new(),
            work: PathBuf::new(),
            owned: false,
        };
        let place = std::mem::replace(&mut self.place, gone);
        let removing = spawn_blocking(move || drop(place));
        removing.await.expect("removing does not panic");
        self.shared.memories.release(self.offer.id);
    }

    pub(super) async fn after_abort(&mut self, reason: String) {
        let mut environment = self.environment(None);
        environment.reason = Some(reason);
        let hooks = self.host.hooks.clone();
        let run = spawn_blocking(move || hooks.run(hooks::Moment::AfterAbort, &environment));
        if let Ok(Err(error)) = run.await {
            tracing::warn!("{error}");
        }
    }
}
