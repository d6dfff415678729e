//! A running tree comes: the destination's driver.
//!
//! - [`building`]: from what arrives to a copy that stands built.
//! - [`owning`]: whose it is, whatever becomes of the connection.

mod building;
mod owning;

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::MissedTickBehavior;

use super::incoming::{Arrived, Place, Receiving, receive};
use super::meeting::{Call, Registered};
use super::record::{LOOK, Record, cannot_record};
use super::restore::{self, Builder, Moment, Restoring, Wanted, refused};
use super::serve::Input;
use super::{RestoreHost, Shared};
use crate::criu::CriuError;
use crate::handover::{Answer, DestinationState};
use crate::hooks;
use crate::image::walk;
use crate::page::PageSize;
use crate::preflight::{self, Check, Facts};
use crate::runtime::RestoreCommand;
use crate::session::SessionError;
use crate::session::migration::{MigrationDestination, MigrationDestinationCommand as Command};
use crate::sink::Holder;
use crate::standby::{self, Standby};
use crate::store::Tried as _;
use crate::transfer::clock::{Clock, nanos};
use crate::transfer::finish::Alive;
use crate::transfer::{TransferError, costs, pause};
use crate::transport::{Connection, ControlSender, TransportError};
use crate::wire::{FailureCode, Message, Offer, Offered, Phase, Step};

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
    let runtime = runtime_of(&offer, &host)?;
    let (driver, happenings) = Driver::new(connection, shared, host, offer, facts, runtime)?;
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

/// The command that restores what is offered; `None` where that is CRIU of our own.
fn runtime_of(offer: &Offer, host: &RestoreHost) -> Result<Option<RestoreCommand>, TransferError> {
    if offer.runtime.is_empty() {
        return Ok(None);
    }
    let refuse = |reason: String| refused(FailureCode::Refused, reason);
    let name = offer.runtime.replace(char::is_control, " ");
    let mut runtimes = host.runtimes.iter();
    let found = runtimes.find(|runtime| runtime.runtime == offer.runtime);
    let found = found.ok_or_else(|| {
        refuse(format!(
            "this `crxfer recv` does not know how to restore for {name}: start it with --restore-with {name}=COMMAND{}",
            if name == "runc" { ", or --runc-bundles DIR" } else { "" }
        ))
    })?;
    let container = &offer.container;
    if !container.is_empty() && !RestoreCommand::can_name(container) {
        return Err(refuse(
            "the container's name has other characters than letters, digits and _.-".to_owned(),
        ));
    }
    if let Some(bundles) = &found.bundles {
        let bundle = bundles.join(container);
        if container.is_empty() || !bundle.join("config.json").is_file() {
            return Err(refuse(format!(
                "there is no bundle for {container} here: bring one to {}, with the same config.json and the same files below its root",
                bundle.display()
            )));
        }
    }
    Ok(Some(found.clone()))
}

/// What other threads tell the driver.
#[derive(Debug)]
enum Happening {
    Checked(Vec<Check>),
    Arrived(Arrived),
    // CRIU is started, the address hook has run.
    Prepared(Result<Box<Builder>, TransferError>),
    // All images are checked and on disk, and the journal says so.
    Completed(Result<(), TransferError>),
    HookRun(Result<(), hooks::HookError>),
    Restore(Moment),
    // The copy was found running, or built once more.
    Brought(Result<Alive, String>),
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
    // Where a command builds the copy.
    wanted: Option<Wanted>,
    in_memory: bool,
    receiving: Option<Receiving>,
    worker: Option<JoinHandle<Result<Builder, CriuError>>>,
    prepared: Option<Box<Builder>>,
    restoring: Option<Restoring>,
    // Of the copy that stands built, while it is held.
    held: Option<u32>,
    record: Option<Record>,
    // What the journal says, where there is one.
    state: Option<DestinationState>,
    // Sources that are back on a connection of their own.
    call: mpsc::UnboundedSender<Call>,
    calls: mpsc::UnboundedReceiver<Call>,
    registered: Option<Registered>,
    // They wait for the copy to run.
    asking: Vec<oneshot::Sender<Answer>>,
    // This connection is still there.
    linked: bool,
    // The source may have heard that the copy stands.
    voted: bool,
    // The source, or an operator, has said that the workload is ours.
    committed: bool,
    // An operator took it back: a source that committed must hear so.
    taken_back: bool,
    // Everything has arrived, and CRIU is about to build the copy, or does.
    building: bool,
    // The copy is looked for, or built once more; how often it was.
    bringing: bool,
    tries: u32,
    stuck: bool,
    phases: Vec<Phase>,
    notes: Vec<String>,
    final_begun_ns: u64,
    complete_ns: u64,
    held_ns: u64,
    released_ns: u64,
    dumped_bytes: u64,
    restore_ended: bool,
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
        runtime: Option<RestoreCommand>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Happening>), TransferError> {
        let parent = shared.store.home_path("migrations");
        if !parent.is_dir() {
            let made = fs::DirBuilder::new().mode(0o700).create(&parent);
            made.tried("create", &parent)?;
        }
        let path = parent.join(offer.id.to_string());
        let place = Place {
            work: path.join("work"),
            path,
            owned: false,
        };
        let wanted = runtime.map(|runtime| Wanted {
            runtime,
            name: offer.name.clone(),
            container: offer.container.clone(),
            options: offer.options.clone(),
            place: place.path.clone(),
            images: place.path.join(standby::FINAL),
        });
        let in_memory = shared.memories.wants(offer.keeping);
        let (tell, happenings) = mpsc::unbounded_channel();
        let (call, calls) = mpsc::unbounded_channel();
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
            wanted,
            in_memory,
            receiving: None,
            worker: None,
            prepared: None,
            restoring: None,
            held: None,
            record: None,
            state: None,
            call,
            calls,
            registered: None,
            asking: Vec::new(),
            linked: true,
            voted: false,
            committed: false,
            taken_back: false,
            building: false,
            bringing: false,
            tries: 0,
            stuck: false,
            phases: Vec::new(),
            notes: Vec::new(),
            final_begun_ns: 0,
            complete_ns: 0,
            held_ns: 0,
            released_ns: 0,
            dumped_bytes: 0,
            restore_ended: true,
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
        match (self.state, outcome) {
            (Some(DestinationState::Running), _) => {
                self.moved().await;
                Ok(())
            }
            (Some(DestinationState::Resuming), outcome) => Err(self.stranded(outcome.err())),
            (Some(DestinationState::Removed), Ok(())) => {
                self.forget();
                Ok(())
            }
            // What is promised stays promised, also where this driver is wrong about why it ends.
            (Some(DestinationState::Complete), Err(error)) if self.voted && !is_told(&error) => {
                Err(error)
            }
            (_, Err(error)) => self.take_back(error, control, &mut happenings).await,
            (_, Ok(())) => {
                self.remove(&mut happenings).await;
                Ok(())
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn serve(
        &mut self,
        control: &mut ControlSender,
        inputs: &mut mpsc::Receiver<Input>,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            while let Some(command) = self.session.poll_command() {
                self.carry_out(command, control, happenings).await?;
            }
            if self.is_done() {
                return Ok(());
            }
            let timeout = tokio::time::Instant::from_std(self.session.poll_timeout());
            tokio::select! {
                // What happened here first: a source that leaves after the last word is no error.
                biased;
                happening = happenings.recv() => {
                    let happened = self.happened(happening.expect("this side holds a sender"));
                    happened.or_else(|error| self.trouble(error))?;
                }
                call = self.calls.recv() => {
                    self.met(call.expect("this side holds a sender"), happenings).await;
                }
                input = inputs.recv(), if self.linked => {
                    let taken = self.take(input);
                    taken.or_else(|error| self.cut(error))?;
                }
                () = tokio::time::sleep_until(timeout), if self.linked => {
                    let alive = self.session.handle_timeout(Instant::now());
                    alive.or_else(|error| self.cut(error.into()))?;
                }
                _ = looks.tick(), if self.must_look() => self.look(happenings).await,
            }
        }
    }

    // The source is not there any more, and nothing is half done.
    fn is_done(&self) -> bool {
        !self.linked
            && match self.state {
                Some(DestinationState::Running) => self.restore_ended && !self.bringing,
                None | Some(DestinationState::Removed) => true,
                _ => false,
            }
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn take(&mut self, input: Option<Input>) -> Result<(), TransferError> {
        match input {
            Some(Input::Message(message)) => {
                let message = message.map_err(SessionError::from)?;
                self.session.handle_message(Instant::now(), message)?;
            }
            // After the last word.
            Some(Input::ControlEnded(_)) | None if self.session.is_over() => self.linked = false,
            Some(Input::ControlEnded(Some(error))) => return Err(error.into()),
            Some(Input::ControlEnded(None)) | None => return Err(TransportError::CutShort.into()),
            Some(Input::Failed(error)) => return Err(error),
            // Those of sets, which this connection does not send.
            Some(_) => {}
        }
        Ok(())
    }

    async fn carry_out(
        &mut self,
        command: Command,
        control: &mut ControlSender,
        happenings: &mut mpsc::UnboundedReceiver<Happening>,
    ) -> Result<(), TransferError> {
        match command {
            // To nobody.
            Command::Send(_) if !self.linked => {}
            Command::Send(message) => {
                let is_vote = message == Message::Migration(Step::Built);
                let sent = control.write_message(&message.encode()).await;
                sent.or_else(|error| self.cut(error.into()))?;
                if is_vote {
                    pause::at_point("voted").await;
                }
            }
            Command::PrepareFinal(_) => self.prepare_final(),
            Command::Resume => self.commit(),
            Command::Remove { reason } => {
                tracing::info!("the source gave up: {reason}");
                self.withdraw(&reason, happenings).await;
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
            Happening::Completed(result) => {
                result?;
                self.state = Some(DestinationState::Complete);
                self.vote();
            }
            Happening::Restore(moment) => self.restored(moment)?,
            Happening::Brought(result) => self.brought(result)?,
        }
        Ok(())
    }

    fn check(&mut self) {
        let place = preflight::Place {
            images: self.shared.store.home().to_owned(),
            memory: self.in_memory.then(|| self.shared.memories.room()),
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
            if let Some(config) = &self.host.config_file {
                refuse_auto_dedup(config)?;
            }
            let memory = self.find_place()?;
            let (path, offer) = (self.place.path.clone(), &self.offer);
            let record = Record::begin(
                &self.shared,
                self.connection,
                &self.host,
                offer,
                self.wanted.as_ref().map(|wanted| wanted.runtime.clone()),
                path,
                memory,
            );
            let record = record.map_err(|error| cannot_record(&error))?;
            self.place.work = record.about().work();
            if let Some(wanted) = &mut self.wanted {
                wanted.place = record.about().scene();
                wanted.images = self.place.path.join(standby::FINAL);
            }
            self.record = Some(record);
            self.state = Some(DestinationState::Receiving);
            let (id, peer) = (self.offer.id, self.connection.peer());
            self.registered = Some(Registered::new(&self.shared, id, peer, self.call.clone()));
            self.touched = true;
            let durable = self.is_durable();
            let standby = Standby::create(&self.place.path, self.offer.page_size, durable)?;
            self.place.owned = true;
            fs::create_dir(&self.place.work).tried("create", &self.place.work)?;
            let tell = self.tell.clone();
            let told = move |arrived| {
                let _ = tell.send(Happening::Arrived(arrived));
            };
            let started = receive(self.connection.clone(), standby, told);
            self.receiving = Some(started.tried("start a thread for", &self.place.path)?);
            let (program, wanted) = (self.host.program.clone(), self.wanted.clone());
            self.worker = Some(spawn_blocking(move || match wanted {
                Some(wanted) => restore::prepare_command(&wanted),
                None => restore::prepare(&program),
            }));
        }
        self.session.offered(Instant::now(), offered, refused);
        pause::at("receiving");
        Ok(())
    }

    // Where the images go; who holds that, where it is in memory.
    fn find_place(&mut self) -> Result<Vec<Holder>, TransferError> {
        if !self.in_memory {
            return Ok(Vec::new());
        }
        let (id, bytes) = (self.offer.id, self.offer.memory_bytes);
        let made = self.shared.memories.create(id, bytes, self.facts.force)?;
        self.place.path = made.path;
        Ok(made.holders)
    }

    fn is_durable(&self) -> bool {
        !self.in_memory && self.shared.store.is_durable()
    }

    fn criu_version(&self, checks: &[Check]) -> String {
        let found = checks.iter().find(|check| check.name == "CRIU");
        found.map(|check| check.found.clone()).unwrap_or_default()
    }
}

// The source itself has said that it keeps the workload.
fn is_told(error: &TransferError) -> bool {
    matches!(error, TransferError::Session(SessionError::Peer(_)))
}

// It punches pages out of the images while CRIU reads them: a copy could not be built again.
fn refuse_auto_dedup(config: &Path) -> Result<(), TransferError> {
    let text = fs::read_to_string(config).tried("read", config)?;
    let asks = |line: &str| {
        line.trim()
            .trim_start_matches("--")
            .starts_with("auto-dedup")
    };
    if text.lines().any(asks) {
        let text = format!(
            "{} has auto-dedup, which uses up the images: a restore that fails could not be repeated; remove it",
            config.display()
        );
        return Err(refused(FailureCode::Criu, text));
    }
    Ok(())
}

/// Finds images that CRIU would trip over; its own checks come too late to be understood.
pub(in crate::transfer) fn check_images(directory: &Path) -> Result<(), TransferError> {
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
