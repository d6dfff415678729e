//! A running tree comes: the destination's driver.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use super::incoming::{Arrived, Place, Receiving, receive};
use super::orphans;
use super::restore::{self, Moment, Restoring};
use super::serve::Input;
use super::{RestoreHost, Shared};
use crate::criu::{CriuError, Verdict, Worker};
use crate::hooks::{self, Environment};
use crate::image::walk;
use crate::page::PageSize;
use crate::preflight::{self, Check, Facts};
use crate::session::SessionError;
use crate::session::migration::{
    MigrationDestination, MigrationDestinationCommand as Command, Owner,
};
use crate::standby::{self, Standby};
use crate::store::Tried as _;
use crate::transfer::clock::{Clock, nanos};
use crate::transfer::event::Event;
use crate::transfer::{TransferError, costs};
use crate::transport::{Connection, ControlSender, TransportError};
use crate::wire::{Failure, FailureCode, Message, Offer, Offered, Phase, Step};

/// How long a source may take to hear why it fails.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long CRIU may take to remove a copy that is not wanted.
const REMOVE_TIME: Duration = Duration::from_secs(10);

/// Takes the tree, or refuses it.
pub(super) async fn serve(
    connection: &Connection,
    shared: Arc<Shared>,
    control: &mut ControlSender,
    inputs: &mut mpsc::Receiver<Input>,
    offer: Offer,
) -> Result<(), TransferError> {
    let Some(host) = shared.restore.clone() else {
        let reason = "this `crxfer recv` takes images only; start it with --allow-restore to let process trees come and run here";
        return Err(refused(FailureCode::Refused, reason));
    };
    let facts = Facts::decode(&offer.facts)
        .map_err(|_| SessionError::Protocol("facts that cannot be read"))?;
    check_offer(&offer, shared.max_set_bytes)?;
    let (driver, happenings) = Driver::new(connection, shared, host, offer, facts)?;
    driver.run(control, inputs, happenings).await
}

fn check_offer(offer: &Offer, max_bytes: Option<u64>) -> Result<(), TransferError> {
    let here = PageSize::of_host();
    if offer.page_size != here {
        let (theirs, here) = (offer.page_size.bytes(), here.bytes());
        let reason = format!(
            "the source has pages of {theirs} bytes, this host of {here}: memory cannot move between them"
        );
        return Err(refused(FailureCode::Image, reason));
    }
    match max_bytes.filter(|&limit| offer.memory_bytes > limit) {
        Some(limit) => Err(SessionError::TooLarge {
            size: offer.memory_bytes,
            limit,
        }
        .into()),
        None => Ok(()),
    }
}

fn refused(code: FailureCode, reason: impl Into<String>) -> TransferError {
    SessionError::Local(Failure::new(code, reason)).into()
}

/// What other threads tell the driver.
#[derive(Debug)]
enum Happening {
    Checked(Vec<Check>),
    Arrived(Arrived),
    // CRIU is started, the address hook has run.
    Prepared(Result<Box<Worker>, TransferError>),
    // All images are checked and on disk.
    Synced(Result<(), TransferError>),
    HookRun(Result<(), hooks::HookError>),
    Restore(Moment),
}

struct Driver<'a> {
    connection: &'a Connection,
    shared: Arc<Shared>,
    host: RestoreHost,
    offer: Offer,
    facts: Facts,
    session: MigrationDestination,
    clock: Clock,
    tell: mpsc::UnboundedSender<Happening>,
    place: Place,
    receiving: Option<Receiving>,
    worker: Option<JoinHandle<Result<Worker, CriuError>>>,
    prepared: Option<Box<Worker>>,
    restoring: Option<Restoring>,
    // Of the copy that stands built, while it is held.
    held: Option<u32>,
    is_synced: bool,
    phases: Vec<Phase>,
    notes: Vec<String>,
    final_begun_ns: u64,
    complete_ns: u64,
    held_ns: u64,
    released_ns: u64,
    dumped_bytes: u64,
    restore_ended: bool,
    is_running: bool,
    // Something was done on this host that a failure has to undo.
    touched: bool,
}

impl<'a> Driver<'a> {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn new(
        connection: &'a Connection,
        shared: Arc<Shared>,
        host: RestoreHost,
        offer: Offer,
        facts: Facts,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Happening>), TransferError> {
        let parent = shared.store.state_path("migrations");
        if !parent.is_dir() {
            let made = fs::DirBuilder::new().mode(0o700).create(&parent);
            made.tried("create", &parent)?;
        }
        let place = Place {
            path: parent.join(offer.id.to_string()),
            owned: false,
        };
        let (tell, happenings) = mpsc::unbounded_channel();
        let driver = Self {
            connection,
            shared,
            host,
            offer,
            facts,
            session: MigrationDestination::new(Instant::now()),
            clock: Clock::start(),
            tell,
            place,
            receiving: None,
            worker: None,
            prepared: None,
            restoring: None,
            held: None,
            is_synced: false,
            phases: Vec::new(),
            notes: Vec::new(),
            final_begun_ns: 0,
            complete_ns: 0,
            held_ns: 0,
            released_ns: 0,
            dumped_bytes: 0,
            restore_ended: true,
            is_running: false,
            touched: false,
        };
        Ok((driver, happenings))
    }

    async fn run(
        mut self,
        control: &mut ControlSender,
        inputs: &mut mpsc::Receiver<Input>,
        mut happenings: mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        self.check();
        let outcome = self.serve(control, inputs, &mut happenings).await;
        if self.session.owner() == Owner::Destination {
            // Its copy runs, or is about to: that the source is gone changes nothing.
            self.await_release(&mut happenings).await;
            return self.released(outcome);
        }
        let Err(error) = outcome else {
            self.remove(&mut happenings).await;
            return Ok(());
        };
        self.take_back(error, control, &mut happenings).await
    }

    // What came of a copy that was let go.
    fn released(&mut self, outcome: Result<(), TransferError>) -> Result<(), TransferError> {
        if self.is_running {
            // Only now: with --once the receiver ends, and the source should hear the last word.
            self.shared.received.send_modify(|count| *count += 1);
            return Ok(());
        }
        // The source keeps its tree frozen. What was built is complete: it must not be lost.
        let kept = self.shared.store.state_path("unfinished");
        let kept = kept.join(self.offer.id.to_string());
        let moved = kept
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::rename(&self.place.path, &kept));
        self.place.owned = false;
        let place = if moved.is_ok() {
            &kept
        } else {
            &self.place.path
        };
        let why = match outcome {
            Ok(()) => "CRIU ended".to_owned(),
            Err(error) => error.to_string(),
        };
        let reason = format!(
            "the copy was let go, but CRIU did not bring it to life ({why}); its complete images are in {} of the destination: look whether it runs there before anything else is started",
            place.join(standby::FINAL).display()
        );
        Err(refused(FailureCode::Criu, reason))
    }

    // Tells the source first: its tree stands still until it knows.
    async fn take_back(
        &mut self,
        error: TransferError,
        control: &mut ControlSender,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        if let Some(failure) = error.to_failure() {
            let failure = Message::Failure(failure).encode();
            let _ = tokio::time::timeout(FAREWELL, control.write_message(&failure)).await;
        }
        self.remove(happenings).await;
        if self.touched {
            self.after_abort(error.to_string()).await;
        }
        let aborted = Message::Migration(Step::Aborted).encode();
        let _ = tokio::time::timeout(FAREWELL, control.write_message(&aborted)).await;
        let _ = control.finish();
        // The source closes when it has read that.
        let _ = tokio::time::timeout(FAREWELL, self.connection.closed()).await;
        self.connection.close_and_tell(error.close_code(), "").await;
        Err(error)
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn serve(
        &mut self,
        control: &mut ControlSender,
        inputs: &mut mpsc::Receiver<Input>,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        loop {
            while let Some(command) = self.session.poll_command() {
                if let Command::Send(message) = command {
                    control.write_message(&message.encode()).await?;
                } else {
                    self.carry_out(command, happenings).await?;
                }
            }
            let timeout = tokio::time::Instant::from_std(self.session.poll_timeout());
            tokio::select! {
                // What happened here first: a source that leaves after the last word is no error.
                biased;
                happening = happenings.recv() => {
                    self.happened(happening.expect("this side holds a sender"))?;
                }
                input = inputs.recv() => {
                    if self.take(input)? {
                        return Ok(());
                    }
                }
                () = tokio::time::sleep_until(timeout) => self.session.handle_timeout(Instant::now())?,
            }
        }
    }

    // True when the source has left and nothing is half done.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn take(&mut self, input: Option<Input>) -> Result<bool, TransferError> {
        match input {
            Some(Input::Message(message)) => {
                let message = message.map_err(SessionError::from)?;
                self.session.handle_message(Instant::now(), message)?;
            }
            Some(Input::ControlEnded(_)) | None if self.session.is_over() => return Ok(true),
            Some(Input::ControlEnded(Some(error))) => return Err(error.into()),
            Some(Input::ControlEnded(None)) | None => return Err(TransportError::CutShort.into()),
            Some(Input::Failed(error)) => return Err(error),
            // Those of sets, which this connection does not send.
            Some(_) => {}
        }
        Ok(false)
    }

    async fn carry_out(
        &mut self,
        command: Command,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        match command {
            Command::Send(_) => {}
            Command::PrepareFinal(_) => self.prepare_final(),
            Command::Resume => self.resume(),
            Command::Remove { reason } => {
                tracing::info!("the source gave up: {reason}");
                self.remove(happenings).await;
                if std::mem::take(&mut self.touched) {
                    self.after_abort(reason).await;
                }
                self.aborted();
            }
            Command::Clock { asked_ns } => self.tell_clock(asked_ns),
        }
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn aborted(&mut self) {
        self.session.aborted(Instant::now());
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn tell_clock(&mut self, asked_ns: u64) {
        let here_ns = self.clock.now_ns();
        self.session.tell_clock(Instant::now(), asked_ns, here_ns);
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn happened(&mut self, happening: Happening) -> Result<(), TransferError> {
        let now = Instant::now();
        match happening {
            Happening::Checked(checks) => self.checked(&checks)?,
            Happening::Arrived(Arrived::Event(event, work_ns)) => {
                self.session.heard(now);
                self.arrived(event, work_ns)?;
            }
            Happening::Arrived(Arrived::Failed(error)) => return Err(error),
            Happening::Prepared(worker) => {
                self.prepared = Some(worker?);
                self.session.final_ready(now);
            }
            Happening::HookRun(result) => self.start_restore(result)?,
            Happening::Synced(result) => {
                result?;
                self.is_synced = true;
                self.vote();
            }
            Happening::Restore(moment) => self.restored(moment)?,
        }
        Ok(())
    }

    fn check(&mut self) {
        let place = preflight::Place {
            images: self.shared.store.root().to_owned(),
            criu: self.host.program.clone(),
            address_hook: self.host.hooks.has(hooks::Moment::AddressPrepare),
            restore_hook: self.host.hooks.has(hooks::Moment::BeforeRestore),
        };
        let (facts, tell) = (self.facts.clone(), self.tell.clone());
        spawn_blocking(move || {
            let checks = preflight::check_destination(&facts, &place);
            let _ = tell.send(Happening::Checked(checks));
        });
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn checked(&mut self, checks: &[Check]) -> Result<(), TransferError> {
        let refused = !preflight::may_begin(checks) || self.offer.dry_run;
        let version = self.criu_version(checks);
        let offered = Offered {
            checks: preflight::encode_checks(checks),
            restore_ns: nanos(costs::restore(self.offer.memory_bytes)),
            criu: version,
        };
        if !refused {
            self.touched = true;
            let durable = self.shared.store.is_durable();
            let standby = Standby::create(&self.place.path, self.offer.page_size, durable)?;
            self.place.owned = true;
            fs::create_dir(self.place.path.join("work")).tried("create", &self.place.path)?;
            let tell = self.tell.clone();
            let told = move |arrived| {
                let _ = tell.send(Happening::Arrived(arrived));
            };
            let started = receive(self.connection.clone(), standby, told);
            self.receiving = Some(started.tried("start a thread for", &self.place.path)?);
            let program = self.host.program.clone();
            self.worker = Some(spawn_blocking(move || restore::prepare(&program)));
        }
        self.session.offered(Instant::now(), offered, refused);
        Ok(())
    }

    fn criu_version(&self, checks: &[Check]) -> String {
        let found = checks.iter().find(|check| check.name == "CRIU");
        found.map(|check| check.found.clone()).unwrap_or_default()
    }

    fn arrived(&mut self, event: standby::Event, work_ns: u64) -> Result<(), TransferError> {
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
        }
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn stored(&mut self, number: u32, bytes: u64, work_ns: u64) {
        self.session.stored(Instant::now(), number, bytes, work_ns);
    }

    // Before the freeze: CRIU waits for work, the addresses are there.
    fn prepare_final(&mut self) {
        let (host, environment, tell) =
            (self.host.clone(), self.environment(None), self.tell.clone());
        let worker = self.worker.take();
        let root = self.place.path.clone();
        tokio::spawn(async move {
            let prepared = async {
                let worker = match worker {
                    Some(worker) => worker.await.expect("starting CRIU does not panic"),
                    None => return Err(SessionError::Protocol("a second final iteration").into()),
                };
                let worker = worker.map_err(|error| failed(&error))?;
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
    fn complete(&mut self, directory: PathBuf) {
        self.complete_ns = self.clock.now_ns();
        let tell = self.tell.clone();
        let durable = self.shared.store.is_durable();
        let checked = directory.clone();
        spawn_blocking(move || {
            let synced = check_images(&checked).and_then(|()| match durable {
                true => Ok(standby::sync_directory(&checked)?),
                false => Ok(()),
            });
            let _ = tell.send(Happening::Synced(synced));
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

    fn start_restore(&mut self, hook: Result<(), hooks::HookError>) -> Result<(), TransferError> {
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
        let work = self.place.path.join("work");
        self.restore_ended = false;
        let restoring = restore::restore(*worker, images, work, criu, self.clock, told);
        self.restoring = Some(restoring.tried("start a thread for", &self.place.path)?);
        Ok(())
    }

    fn restored(&mut self, moment: Moment) -> Result<(), TransferError> {
        match moment {
            Moment::Held { pid, at_ns } => {
                self.held = Some(pid);
                self.held_ns = at_ns;
                self.vote();
            }
            Moment::Resumed { at_ns } => self.resumed(at_ns),
            Moment::Ended { result, .. } => {
                self.restore_ended = true;
                match result {
                    Ok(_) => {}
                    // After its release CRIU's complaints are about the network lock and the like.
                    Err(error) if self.is_running => self.notes.push(error.to_string()),
                    Err(error) => return Err(failed(&self.with_kept_log(error))),
                }
            }
        }
        Ok(())
    }

    // The copy is built, and all of it is checked and stored.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn vote(&mut self) {
        if self.held.is_some() && self.is_synced {
            self.session.built(Instant::now());
        }
    }

    fn resume(&mut self) {
        self.released_ns = self.clock.now_ns();
        if let Some(restoring) = &self.restoring {
            restoring.end(Verdict::GoOn);
        }
        self.later(hooks::Moment::AddressAnnounce);
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn resumed(&mut self, at_ns: u64) {
        let Some(pid) = self.held else { return };
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
        self.is_running = true;
        self.session
            .running(Instant::now(), pid, at_ns, phases, notes);
        self.shared.events.emit(Event::Restored {
            name: self.offer.name.clone(),
            pid,
            address: self.connection.remote_address(),
        });
        self.later(hooks::Moment::AfterRestore);
        let took = Duration::from_nanos(self.held_ns.saturating_sub(self.complete_ns));
        costs::learn_restore(self.dumped_bytes, took);
        orphans::reap();
    }

    // A hook that nobody waits for.
    fn later(&mut self, moment: hooks::Moment) {
        if !self.host.hooks.has(moment) {
            return;
        }
        let (hooks, environment) = (self.host.hooks.clone(), self.environment(None));
        let (events, address) = (self.shared.events.clone(), self.connection.remote_address());
        spawn_blocking(move || {
            if let Err(error) = hooks.run(moment, &environment) {
                let error = error.to_string();
                events.emit(Event::Failed { address, error });
            }
        });
    }

    fn environment(&self, images: Option<PathBuf>) -> Environment {
        Environment {
            migration: self.offer.name.clone(),
            pid: self.held,
            peer: Some(self.connection.remote_address().ip()),
            addresses: self.facts.addresses(),
            images,
            reason: None,
        }
    }

    // After the source's word, without a source: CRIU lets the copy go by itself.
    async fn await_release(&mut self, happenings: &mut mpsc::UnboundedReceiver<Happening>) {
        while !self.restore_ended {
            let Some(Happening::Restore(moment)) = happenings.recv().await else {
                continue;
            };
            if let Err(error) = self.restored(moment) {
                let (address, error) = (self.connection.remote_address(), error.to_string());
                self.shared.events.emit(Event::Failed { address, error });
            }
        }
    }

    // Nothing of the copy and its images stays.
    async fn remove(&mut self, happenings: &mut mpsc::UnboundedReceiver<Happening>) {
        self.prepared = None;
        self.held = None;
        if let Some(receiving) = self.receiving.take() {
            let ending = spawn_blocking(move || receiving.end());
            ending.await.expect("ending does not panic");
        }
        if let Some(restoring) = self.restoring.take() {
            restoring.end(Verdict::Refuse);
            let ended = async {
                while !self.restore_ended {
                    if let Some(Happening::Restore(Moment::Ended { .. })) = happenings.recv().await
                    {
                        self.restore_ended = true;
                    }
                }
            };
            if tokio::time::timeout(REMOVE_TIME, ended).await.is_err() {
                tracing::warn!("CRIU does not end; its copy is killed");
            }
            // In a pid namespace of their own they have other numbers here, and end with it.
            if !self.facts.tree.own_pid_namespace {
                let tasks = self.facts.tree.tasks.clone();
                let killing = spawn_blocking(move || orphans::kill(&tasks));
                let killed = killing.await.expect("killing does not panic");
                if killed > 0 {
                    tracing::warn!("killed {killed} processes that CRIU left of the copy");
                }
            }
        }
        let gone = Place {
            path: PathBuf::new(),
            owned: false,
        };
        let place = std::mem::replace(&mut self.place, gone);
        let removing = spawn_blocking(move || drop(place));
        removing.await.expect("removing does not panic");
    }

    async fn after_abort(&mut self, reason: String) {
        let mut environment = self.environment(None);
        environment.reason = Some(reason);
        let hooks = self.host.hooks.clone();
        let run = spawn_blocking(move || hooks.run(hooks::Moment::AfterAbort, &environment));
        if let Ok(Err(error)) = run.await {
            tracing::warn!("{error}");
        }
    }

    // The operator needs it; the directory it is in will be gone.
    fn with_kept_log(&self, error: CriuError) -> CriuError {
        let CriuError::Failed(mut failure) = error else {
            return error;
        };
        let kept = self.shared.store.state_path("restore.log");
        match fs::rename(&failure.log, &kept) {
            Ok(()) => failure.log = kept,
            Err(error) => tracing::warn!("cannot keep {}: {error}", failure.log.display()),
        }
        CriuError::Failed(failure)
    }
}

// Images that CRIU would trip over; its own checks come too late to be understood.
fn check_images(directory: &std::path::Path) -> Result<(), TransferError> {
    for entry in fs::read_dir(directory).tried("list", directory)? {
        let entry = entry.tried("list", directory)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if walk::is_known(&name) && !name.starts_with("pagemap-") {
            let path = entry.path();
            walk::check_image(&name, fs::File::open(&path).tried("open", &path)?)?;
        }
    }
    Ok(())
}

fn failed(error: &CriuError) -> TransferError {
    let text = format!("at the destination: {error}").replace(char::is_control, " ");
    refused(FailureCode::Criu, text)
}
