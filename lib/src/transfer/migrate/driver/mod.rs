//! The session around iterations and freeze.
//!
//! One task drives it: `events` waits for whatever comes next (messages, other threads, the clock,
//! the operator), the others say what is done with it, in the order of a migration.

mod ending;
mod events;
mod hand_over;
mod precopy;
mod safety;

use std::collections::VecDeque;
use std::ops::ControlFlow::{Break, Continue};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use self::safety::CriuEnd;
use super::freeze::{self, DumpPlace, Dumper, Frozen, Images, Moment};
use super::iterate::Parent;
use super::record::{FencingError, Records};
use super::report::{Host, HostCheck, MigrationReport, Outcome, PhaseReport, may_begin};
use super::stream::RecordStream;
use super::work::Work;
use super::{MigrateError, MigrateEvent, MigrateFailure, MigrateOptions, Mode};
use crate::criu::CriuOptions;
use crate::hooks;
use crate::page::PageSize;
use crate::precopy::{Costs, Goals, Policy};
use crate::preflight::{self, Choices, Survey};
use crate::session::migration::{
    ClockSamples, MigrationSource, MigrationSourceCommand as Command, Owner,
};
use crate::transfer::TransferError;
use crate::transfer::clock::Clock;
use crate::transfer::costs;
use crate::transfer::guard::Guard;
use crate::transfer::send::{EndOnDrop, connect, source_config};
use crate::transport::{CloseCode, Connection, ControlSender};
use crate::wire::{Keeping, Message, MigrationId, Offer, Phase, RestoreOptions};

/// Moves a running process tree to the destination, and returns when it runs there.
///
/// Must be called inside a tokio runtime. On a failure the tree runs on here, unless
/// [`MigrateFailure::owner`] says otherwise. Do not drop the future: use
/// [`MigrateOptions::stop`], so that the destination is cleaned up. A dropped future resumes a frozen tree, too;
/// after the commit it leaves it held, for whoever reads the journal: the guard, or
/// [`finish_source`](crate::transfer::finish::finish_source).
pub async fn migrate(options: MigrateOptions) -> Result<MigrationReport, MigrateFailure> {
    let clock = Clock::start();
    let untouched = |error: MigrateError| MigrateFailure {
        error,
        owner: Owner::Source,
        untouched: true,
        destination_is_clean: true,
    };
    let (pid, choices) = (options.pid, choices(&options));
    let surveying = spawn_blocking(move || {
        let survey = preflight::gather(pid, &choices)?;
        let checks = preflight::check_source(&survey);
        Ok::<_, preflight::PreflightError>((survey, checks))
    });
    let surveyed = surveying.await.expect("a survey does not panic");
    let (survey, checks) = surveyed.map_err(|error| untouched(error.into()))?;
    let checks: Vec<_> = HostCheck::all(Host::Source, checks).collect();
    if !options.dry_run && !may_begin(&checks) {
        return Err(untouched(MigrateError::Preflight(checks)));
    }
    let surveyed_at = clock.now_ns();
    let connected = connect(&options.target, &options.identity, &options.transport).await;
    let connection = connected.map_err(|error| untouched(error.into()))?;
    let _ends_with_this = EndOnDrop(connection.clone());
    let opened = connection.open_control().await;
    let (control, messages) =
        opened.map_err(|error| untouched(TransferError::from(error).into()))?;

    let mut driver = Driver::new(&options, clock, survey, checks, &connection, control);
    driver.phase("look at the tree", clock.begun_ns(), surveyed_at);
    driver.phase("connect", surveyed_at, clock.now_ns());
    let input = driver.input.clone();
    tokio::spawn(events::read_messages(messages, input));
    match driver.run().await {
        Ok(()) => {
            let report = driver.report();
            connection.close_and_tell(CloseCode::Done, "").await;
            Ok(report)
        }
        Err(error) => {
            let failure = match driver.give_up(error).await {
                // In doubt for a while, and moved after all.
                Ok(()) => {
                    let report = driver.report();
                    connection.close_and_tell(CloseCode::Done, "").await;
                    return Ok(report);
                }
                Err(failure) => failure,
            };
            let code = match &failure.error {
                MigrateError::Transfer(error) => error.close_code(),
                MigrateError::Stopped => CloseCode::Cancelled,
                _ => CloseCode::LocalFailure,
            };
            connection.close_and_tell(code, "").await;
            Err(failure)
        }
    }
}

fn choices(options: &MigrateOptions) -> Choices {
    let criu = &options.criu;
    Choices {
        force: options.force,
        tcp_established: criu.tcp_established,
        tcp_close: criu.tcp_close,
        shell_job: criu.shell_job,
        file_locks: criu.file_locks,
        link_remap: criu.link_remap,
        ext_unix_sk: criu.ext_unix_sk,
        external: !criu.external.is_empty(),
        kill_hook: options.hooks.has(hooks::Moment::BeforeSourceKill),
        freeze_hook: options.hooks.has(hooks::Moment::AfterFreeze),
        criu: options.program.clone(),
        ..Choices::default()
    }
}

fn restore_options(criu: &CriuOptions) -> RestoreOptions {
    RestoreOptions {
        tcp_established: criu.tcp_established,
        shell_job: criu.shell_job,
        file_locks: criu.file_locks,
        link_remap: criu.link_remap,
        ext_unix_sk: criu.ext_unix_sk,
        tcp_close: criu.tcp_close,
        external: criu.external.clone(),
        manage_cgroups: criu
            .manage_cgroups
            .map(|mode| mode.as_str().to_owned())
            .unwrap_or_default(),
    }
}

enum Input {
    Message(Message),
    Ended(TransferError),
    Freeze(Moment),
}

/// What the tree's dump waits for, in the order in which it comes.
#[derive(Debug)]
enum Event {
    Session(Command),
    Freeze(Moment),
}

/// Counters of the iteration under way, for progress.
#[derive(Debug, Default)]
struct Counted {
    scanned: AtomicU64,
    changed: AtomicU64,
}

/// An iteration under way.
#[derive(Debug)]
struct Begun {
    number: u32,
    begin: Duration,
    // Of the stream, before it.
    bytes_before: u64,
    busy_before: Duration,
    counted: Arc<Counted>,
}

struct Driver<'a> {
    options: &'a MigrateOptions,
    connection: &'a Connection,
    clock: Clock,
    id: MigrationId,
    name: String,
    page: PageSize,
    survey: Survey,
    session: MigrationSource,
    control: mpsc::UnboundedSender<Message>,
    input: mpsc::UnboundedSender<Input>,
    inputs: mpsc::UnboundedReceiver<Input>,
    events: VecDeque<Event>,
    stop: tokio::sync::watch::Receiver<bool>,
    // After the commit it is too late to stop.
    may_stop: bool,
    samples: ClockSamples,
    next_tick: tokio::time::Instant,
    clock_asked: Duration,
    clock_questions: u32,
    policy: Policy,
    iterating: Option<Begun>,
    stream: Option<RecordStream>,
    frozen: Option<Frozen>,
    criu_end: Option<CriuEnd>,
    record: Option<Arc<Records>>,
    guard: Option<Guard>,
    fencing: Option<JoinHandle<Result<(), FencingError>>>,
    // Where the images are made.
    work: Option<Work>,
    place: Option<DumpPlace>,
    // Where a command has made them.
    dumped_images: Option<Images>,
    // Of the final dump; and whether there is one.
    parent: Option<Parent>,
    is_chained: bool,
    // From the freeze until CRIU holds.
    dump_took: Duration,
    touched: bool,
    peer_phases: Vec<Phase>,
    phases: Vec<PhaseReport>,
    report: MigrationReport,
    freezing_ns: u64,
    resumed_ns: u64,
}

impl<'a> Driver<'a> {
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn new(
        options: &'a MigrateOptions,
        clock: Clock,
        survey: Survey,
        checks: Vec<HostCheck>,
        connection: &'a Connection,
        control: ControlSender,
    ) -> Self {
        let mut id = MigrationId([0; 16]);
        let random = rustix::rand::getrandom(&mut id.0, rustix::rand::GetRandomFlags::empty());
        debug_assert_eq!(random, Ok(16));
        let name = options.name.clone().unwrap_or_else(|| {
            let comm = std::fs::read_to_string(format!("/proc/{}/comm", options.pid));
            let comm = comm.unwrap_or_default();
            format!("{}-{}", comm.trim(), options.pid)
        });
        let page = PageSize::of_host();
        let external = options.external.as_ref();
        let offer = Offer {
            id,
            name: name.clone(),
            page_size: page,
            memory_bytes: survey.facts.tree.memory_bytes,
            facts: survey.facts.encode(),
            options: restore_options(&options.criu),
            dry_run: options.dry_run,
            keeping: match options.mode {
                Mode::Diskless => Keeping::Memory,
                Mode::Disk | Mode::Tmpfs => Keeping::AsSet,
            },
            runtime: external.map_or_else(String::new, |it| it.runtime.clone()),
            container: external.map_or_else(String::new, |it| it.container.clone()),
        };
        let goals = Goals {
            freeze_limit: Some(options.freeze_limit),
            ..options.goals.clone()
        };
        let config = source_config(&options.target, connection);
        let now = Instant::now();
        let session = MigrationSource::new(config, offer, options.freeze_limit, now);
        let (input, inputs) = mpsc::unbounded_channel();
        let (messages, to_write) = mpsc::unbounded_channel();
        tokio::spawn(events::write_messages(control, to_write, input.clone()));
        let report = MigrationReport {
            id,
            name: name.clone(),
            outcome: Outcome::Checked,
            mode: options.mode,
            checks,
            method: "",
            iterations: Vec::new(),
            why_frozen: None,
            dumped_pages: 0,
            final_changed_pages: 0,
            final_sent_pages: 0,
            downtime: None,
            accuracy: None,
            total: Duration::ZERO,
            clock: None,
            criu_stats: None,
            phases: Vec::new(),
            wire_bytes: (0, 0),
            pid: None,
            notes: Vec::new(),
        };
        Self {
            options,
            connection,
            clock,
            id,
            name,
            page,
            survey,
            session,
            control: messages,
            input,
            inputs,
            events: VecDeque::new(),
            stop: options.stop.clone(),
            may_stop: true,
            samples: ClockSamples::default(),
            next_tick: tokio::time::Instant::now(),
            clock_asked: Duration::ZERO,
            clock_questions: 0,
            policy: Policy::new(goals, Costs::default()),
            iterating: None,
            stream: None,
            frozen: None,
            criu_end: None,
            record: None,
            guard: None,
            fencing: None,
            work: None,
            place: None,
            dumped_images: None,
            parent: None,
            is_chained: false,
            dump_took: Duration::ZERO,
            touched: false,
            peer_phases: Vec::new(),
            phases: Vec::new(),
            report,
            freezing_ns: 0,
            resumed_ns: 0,
        }
    }

    async fn run(&mut self) -> Result<(), MigrateError> {
        if !self.offer().await? {
            return Ok(());
        }
        self.work = Some(Work::open(self.options.mode, &self.options.work)?);
        self.record().await?;
        self.touched = true;
        self.hook(hooks::Moment::BeforeFirstIteration).await?;
        let program = self.options.program.clone();
        let external = self.options.external.clone();
        let preparing = spawn_blocking(move || match external {
            Some(dump) => Ok(Dumper::Command(Box::new(dump))),
            None => freeze::prepare(&program).map(Dumper::Own),
        });
        let outgoing = self.iterations().await?;
        self.hook(hooks::Moment::BeforeFreeze).await?;
        let dumper = self.job(preparing).await??;
        let outgoing = self.freeze(outgoing, dumper).await?;
        self.hand_over(outgoing).await
    }

    // False where only this was wanted.
    async fn offer(&mut self) -> Result<bool, MigrateError> {
        let begun = self.clock.now_ns();
        let offered = self
            .until(|event| match event {
                Event::Session(Command::Offered(offered)) => Break(offered),
                other => Continue(other),
            })
            .await?;
        self.phase("preflight", begun, self.clock.now_ns());
        self.ask_clock();
        let theirs = preflight::decode_checks(&offered.checks)
            .map_err(|_| crate::session::SessionError::Protocol("checks that cannot be read"))?;
        let theirs = HostCheck::all(Host::Destination, theirs);
        self.report.checks.extend(theirs);
        let checks = self.report.checks.clone();
        self.emit(MigrateEvent::Preflight(checks.clone()));
        if !may_begin(&checks) {
            return Err(MigrateError::Preflight(checks));
        }
        if self.options.dry_run {
            return Ok(false);
        }
        let memory = self.survey.facts.tree.memory_bytes;
        self.policy.set_costs(Costs {
            dump: costs::dump(memory),
            restore: Duration::from_nanos(offered.restore_ns),
            round_trip: self.connection.path().round_trip,
        });
        if let Some(warning) = self.policy.before_first(memory) {
            self.emit(MigrateEvent::Warning(warning.to_string()));
            self.report.notes.push(warning.to_string());
        }
        Ok(true)
    }

    fn phase(&mut self, name: &str, begin_ns: u64, end_ns: u64) {
        let begun = self.clock.begun_ns();
        self.phases.push(PhaseReport {
            name: name.to_owned(),
            host: Host::Source,
            begin_ns: since(begin_ns, begun),
            end_ns: since(end_ns, begun),
        });
    }

    fn emit(&self, event: MigrateEvent) {
        self.options.events.emit(event);
    }

    fn work_path(&self) -> PathBuf {
        self.work
            .as_ref()
            .map_or_else(|| self.options.work.clone(), |work| work.path().to_owned())
    }

    fn environment(&self) -> hooks::Environment {
        hooks::Environment {
            migration: self.name.clone(),
            pid: Some(self.options.pid),
            peer: Some(self.connection.remote_address().ip()),
            addresses: self.survey.facts.addresses(),
            images: self.place.as_ref().map(DumpPlace::images),
            reason: None,
        }
    }

    fn start_hook(
        &self,
        moment: hooks::Moment,
    ) -> Option<JoinHandle<Result<Option<hooks::HookRun>, hooks::HookError>>> {
        let hooks = self.options.hooks.clone();
        let environment = self.environment();
        hooks
            .has(moment)
            .then(|| spawn_blocking(move || hooks.run(moment, &environment)))
    }

    async fn hook(&mut self, moment: hooks::Moment) -> Result<(), MigrateError> {
        let begun = self.clock.now_ns();
        if let Some(hook) = self.start_hook(moment) {
            self.job(hook).await??;
            self.phase(&format!("hook {moment}"), begun, self.clock.now_ns());
        }
        Ok(())
    }
}

fn ended(result: Result<(), MigrateError>) -> MigrateError {
    match result {
        Err(error) => error,
        Ok(()) => MigrateError::Memory("CRIU ended before it was told to".to_owned()),
    }
}

fn since(at_ns: u64, begun_ns: u64) -> i64 {
    i64::try_from(i128::from(at_ns) - i128::from(begun_ns)).unwrap_or(i64::MAX)
}
