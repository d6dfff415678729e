//! The session around iterations and freeze.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use super::freeze::{self, DumpPlace, Frozen, Job, Moment, Prepared};
use super::iterate::{Reading, Scanned, iterate};
use super::report::{Host, IterationReport, MigrationReport, Outcome, PhaseReport};
use super::stream::RecordStream;
use super::{MigrateError, MigrateEvent, MigrateFailure, MigrateOptions};
use crate::criu::{CriuError, CriuOptions, Verdict};
use crate::delta::{Compared, Outgoing};
use crate::hooks;
use crate::live::{LiveReader, Method, ReaderOptions};
use crate::page::PageSize;
use crate::precopy::{Costs, Decision, Iteration, Measured, Policy};
use crate::preflight::{self, Check, Choices, Survey};
use crate::session::migration::{
    ClockSamples, MigrationSource, MigrationSourceCommand as Command, Owner,
};
use crate::transfer::TransferError;
use crate::transfer::clock::Clock;
use crate::transfer::costs;
use crate::transfer::send::{EndOnDrop, connect, source_config};
use crate::transport::{CloseCode, Connection, ControlReceiver, ControlSender, TransportError};
use crate::wire::{Message, MigrationId, Offer, Phase, RestoreOptions, limits};

/// Progress is told, and the policy asked, this often within an iteration.
const TICK: Duration = Duration::from_millis(100);

/// The clocks are compared this often, and this many times at the begin.
const CLOCK_EVERY: Duration = Duration::from_secs(1);
const CLOCK_AT_FIRST: u32 = 8;

/// How long the destination may take to say that nothing is left there.
const ABORT_TIME: Duration = Duration::from_secs(10);

/// How long CRIU may take to let the tree run again.
const RESUME_TIME: Duration = Duration::from_secs(10);

/// Moves a running process tree to the destination, and returns when it runs there.
///
/// Must be called inside a tokio runtime. On a failure the tree runs on here, unless
/// [`MigrateFailure::owner`] says otherwise. Do not drop the future: use
/// [`MigrateOptions::stop`], so that the destination is cleaned up (a dropped future resumes the tree, too, where
/// it was frozen).
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
    if !options.dry_run && !preflight::may_begin(&checks) {
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
    tokio::spawn(read_messages(messages, input));
    match driver.run().await {
        Ok(()) => {
            let report = driver.report();
            connection.close_and_tell(CloseCode::Done, "").await;
            Ok(report)
        }
        Err(error) => {
            let failure = driver.give_up(error).await;
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

struct Driver<'a> {
    options: &'a MigrateOptions,
    connection: &'a Connection,
    clock: Clock,
    id: MigrationId,
    name: String,
    page: PageSize,
    survey: Survey,
    session: MigrationSource,
    control: ControlSender,
    input: mpsc::UnboundedSender<Input>,
    inputs: mpsc::UnboundedReceiver<Input>,
    events: VecDeque<Event>,
    stop: tokio::sync::watch::Receiver<bool>,
    // After the commit it is too late to stop.
    may_stop: bool,
    samples: ClockSamples,
    clock_asked: Duration,
    clock_questions: u32,
    policy: Policy,
    // Of the iteration under way.
    counted: Arc<Counted>,
    iterating: Option<(u32, Duration, u64)>,
    cut_short: Option<Decision>,
    stream: Option<RecordStream>,
    frozen: Option<Frozen>,
    place: Option<DumpPlace>,
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
        checks: Vec<Check>,
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
        let offer = Offer {
            id,
            name: name.clone(),
            page_size: page,
            memory_bytes: survey.facts.tree.memory_bytes,
            facts: survey.facts.encode(),
            options: restore_options(&options.criu),
            dry_run: options.dry_run,
        };
        let config = source_config(&options.target, connection);
        let now = Instant::now();
        let session = MigrationSource::new(config, offer, options.freeze_limit, now);
        let (input, inputs) = mpsc::unbounded_channel();
        let report = MigrationReport {
            id,
            name: name.clone(),
            outcome: Outcome::Checked,
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
            control,
            input,
            inputs,
            events: VecDeque::new(),
            stop: options.stop.clone(),
            may_stop: true,
            samples: ClockSamples::default(),
            clock_asked: Duration::ZERO,
            clock_questions: 0,
            policy: Policy::new(options.goals.clone(), Costs::default()),
            counted: Arc::default(),
            iterating: None,
            cut_short: None,
            stream: None,
            frozen: None,
            place: None,
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
        self.touched = true;
        self.hook(hooks::Moment::BeforeFirstIteration).await?;
        let program = self.options.program.clone();
        let preparing = spawn_blocking(move || freeze::prepare(&program));
        let outgoing = self.iterations().await?;
        self.hook(hooks::Moment::BeforeFreeze).await?;
        let prepared = self.job(preparing).await??;
        let outgoing = self.freeze(outgoing, prepared).await?;
        self.hand_over(outgoing).await
    }

    // False where only this was wanted.
    async fn offer(&mut self) -> Result<bool, MigrateError> {
        let begun = self.clock.now_ns();
        let offered = self
            .until(|event| match event {
                Event::Session(Command::Offered(offered)) => Ok(offered),
                other => Err(other),
            })
            .await?;
        self.phase("preflight", begun, self.clock.now_ns());
        let theirs = preflight::decode_checks(&offered.checks)
            .map_err(|_| crate::session::SessionError::Protocol("checks that cannot be read"))?;
        self.report.checks.extend(theirs);
        let checks = self.report.checks.clone();
        self.emit(MigrateEvent::Preflight(checks.clone()));
        if !preflight::may_begin(&checks) {
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

    async fn iterations(&mut self) -> Result<Outgoing, MigrateError> {
        let bulk = self.connection.open_bulk().await;
        let bulk = bulk.map_err(TransferError::from)?;
        let input = self.input.clone();
        let stream = RecordStream::start(bulk, self.options.bytes_per_s, move |error| {
            let _ = input.send(Input::Ended(error));
        });
        self.stream = Some(stream.clone());
        let reader = ReaderOptions {
            bytes_per_s: self.options.read_bytes_per_s,
            ..ReaderOptions::default()
        };
        let (pid, page) = (self.options.pid, self.page);
        let opening = spawn_blocking(move || LiveReader::new(pid, page, reader));
        let reader = self.job(opening).await??;
        self.report.method = match reader.method() {
            Method::PagemapScan => "live, PAGEMAP_SCAN",
            Method::Pagemap => "live, pagemap",
        };
        let mut reading = Reading {
            outgoing: Outgoing::new(page),
            reader,
        };
        loop {
            reading = self.iterate(reading, &stream).await?;
            match self.decision() {
                Decision::Again => {}
                Decision::Freeze(why) => {
                    self.report.why_frozen = Some(why);
                    return Ok(reading.outgoing);
                }
                Decision::GiveUp(why) => return Err(MigrateError::GivenUp(why)),
            }
        }
    }

    async fn iterate(
        &mut self,
        mut reading: Reading,
        stream: &RecordStream,
    ) -> Result<Reading, MigrateError> {
        let number = self.session.begin_iteration();
        let (begun, begun_ns) = (self.clock.elapsed(), self.clock.now_ns());
        let bytes_before = stream.written().bytes();
        self.emit(MigrateEvent::IterationBegun(number));
        self.counted = Arc::default();
        self.iterating = Some((number, begun, bytes_before));
        stream.stop(false);
        let (counted, page, to) = (self.counted.clone(), self.page, stream.clone());
        let scanning = spawn_blocking(move || {
            let mut count = |compared: &Compared| {
                let bytes = |pages| pages * page.bytes();
                counted
                    .scanned
                    .store(bytes(compared.pages), Ordering::Relaxed);
                counted
                    .changed
                    .store(bytes(compared.changed), Ordering::Relaxed);
            };
            let scanned = iterate(&mut reading, &to, number, &mut count);
            (reading, scanned)
        });
        let (reading, scanned) = self.job(scanning).await?;
        let scanned = scanned?;
        let streamed = self.clock.elapsed();
        self.session.end_iteration();
        let work = self
            .until(|event| match event {
                Event::Session(Command::Stored { work, .. }) => Ok(work),
                other => Err(other),
            })
            .await?;
        self.iterating = None;
        let stream_bytes = stream.written().bytes() - bytes_before;
        self.iterated(number, begun, streamed, &scanned, stream_bytes, work);
        let name = format!("iteration {number}");
        self.phase(&name, begun_ns, self.clock.now_ns());
        Ok(reading)
    }

    fn iterated(
        &mut self,
        number: u32,
        begun: Duration,
        streamed: Duration,
        scanned: &Scanned,
        stream_bytes: u64,
        work: Duration,
    ) {
        let end = self.clock.elapsed();
        let compared = scanned.compared;
        let scan_time = scanned.pass.took.saturating_sub(scanned.pass.waited);
        let iteration = Iteration {
            number,
            begin: begun,
            end,
            scanned_bytes: compared.pages * self.page.bytes(),
            scan_time: scan_time.saturating_sub(scanned.link_wait),
            changed_bytes: compared.changed * self.page.bytes(),
            wire_bytes: stream_bytes,
            send_time: scanned.link_wait + (end - streamed),
        };
        let decision = self.policy.after(&iteration);
        self.cut_short = Some(decision);
        let prediction = self.policy.predict();
        let took = end - begun;
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let bytes_per_s = stream_bytes as f64 / took.as_secs_f64().max(1e-9);
        let report = IterationReport {
            number,
            scanned_pages: compared.pages,
            changed_pages: compared.changed,
            sent_pages: compared.sent,
            stream_bytes,
            took,
            link_wait: scanned.link_wait,
            destination_wait: end - streamed,
            destination_work: work,
            bytes_per_s,
            predicted_downtime: prediction.downtime,
            dirty_bytes_per_s: prediction.dirty_bytes_per_s,
        };
        self.emit(MigrateEvent::IterationDone(report.clone()));
        self.report.iterations.push(report);
    }

    fn decision(&mut self) -> Decision {
        self.cut_short.take().unwrap_or(Decision::Again)
    }

    /// From here on the tree stands still.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn freeze(
        &mut self,
        outgoing: Outgoing,
        prepared: Prepared,
    ) -> Result<Outgoing, MigrateError> {
        let begun = self.clock.now_ns();
        let number = self.session.prepare_final(Instant::now());
        let place = DumpPlace::create(&self.options.work, &self.id.to_string());
        let place = place.map_err(|source| MigrateError::Work {
            path: self.options.work.clone(),
            source,
        })?;
        let job = Job {
            pid: self.options.pid,
            number,
            page: self.page,
            criu: self.options.criu.clone(),
            images: place.images(),
            work: place.root().to_owned(),
        };
        self.place = Some(place);
        self.until(|event| match event {
            Event::Session(Command::Freeze) => Ok(()),
            other => Err(other),
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
        let frozen = freeze::freeze(job, prepared, outgoing, stream, self.clock, tell);
        self.frozen = Some(frozen.map_err(|source| MigrateError::Work {
            path: "/proc/self".into(),
            source,
        })?);
        self.dumped().await
    }

    // Until all of the dump is written and its memory on the stream.
    async fn dumped(&mut self) -> Result<Outgoing, MigrateError> {
        let (mut outgoing, mut held, mut from) = (None, false, 0);
        let mut hook: Option<JoinHandle<_>> = None;
        while !held || outgoing.is_none() {
            let moment = self.moment().await?;
            match moment {
                Moment::Freezing { at_ns } => (self.freezing_ns, from) = (at_ns, at_ns),
                Moment::MemoryBegins { at_ns } => {
                    self.phase("freeze the tree", from, at_ns);
                    from = at_ns;
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
                Moment::Held { at_ns } => {
                    self.phase("dump the rest", from, at_ns);
                    let took = Duration::from_nanos(at_ns.saturating_sub(self.freezing_ns));
                    costs::learn_dump(self.survey.facts.tree.memory_bytes, took);
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

    fn final_pages(&mut self, compared: Compared) {
        self.report.dumped_pages = compared.pages;
        self.report.final_changed_pages = compared.changed;
        self.report.final_sent_pages = compared.sent;
    }

    // The memory stream broke: CRIU knows why, or it does not.
    async fn criu_error(&mut self, memory: String) -> MigrateError {
        self.let_run();
        loop {
            match tokio::time::timeout(RESUME_TIME, self.moment()).await {
                Ok(Ok(Moment::Ended {
                    result: Err(error @ CriuError::Failed(_)),
                    ..
                })) => return error.into(),
                Ok(Ok(Moment::Ended { .. })) | Err(_) => return MigrateError::Memory(memory),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return error,
            }
        }
    }

    async fn hand_over(&mut self, mut outgoing: Outgoing) -> Result<(), MigrateError> {
        let begun = self.clock.now_ns();
        let images = self.place.as_ref().expect("made before").images();
        let stream = self.stream.clone().expect("opened before");
        let (page, number) = (self.page, self.session.iteration());
        let path = images.clone();
        let sending = spawn_blocking(move || {
            freeze::send_images(&path, page, number, &mut outgoing, &stream)
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
            Event::Session(Command::Built) => Ok(()),
            other => Err(other),
        })
        .await?;
        let built = self.clock.now_ns();
        self.phase("wait for the copy", sent_at, built);
        self.emit(MigrateEvent::Built);
        self.hook(hooks::Moment::BeforeSourceKill).await?;
        self.commit().await?;
        self.phase("commit", built, self.clock.now_ns());
        self.end_source().await;
        Ok(())
    }

    // The point of no return. The tree stays frozen until the destination has said that its copy runs.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn commit(&mut self) -> Result<(), MigrateError> {
        if *self.stop.borrow() {
            return Err(MigrateError::Stopped);
        }
        self.may_stop = false;
        if !self.session.commit(Instant::now()) {
            return Err(MigrateError::Stopped);
        }
        let running = self.until(|event| match event {
            Event::Session(Command::Running {
                pid,
                resumed_ns,
                phases,
                notes,
            }) => Ok((pid, resumed_ns, phases, notes)),
            other => Err(other),
        });
        let (pid, resumed_ns, phases, notes) = running.await?;
        self.report.pid = Some(pid);
        self.report.notes.extend(notes);
        self.report.outcome = Outcome::Migrated;
        self.resumed_ns = resumed_ns;
        self.peer_phases = phases;
        Ok(())
    }

    // The workload runs at the destination: whatever fails now is only reported.
    async fn end_source(&mut self) {
        let begun = self.clock.now_ns();
        if let Some(frozen) = &self.frozen {
            frozen.end(Verdict::GoOn);
        }
        let ended = tokio::time::timeout(RESUME_TIME, async {
            loop {
                match self.moment().await {
                    Ok(Moment::Ended { result }) => {
                        return result.err().map(|it| it.to_string());
                    }
                    Ok(_) => {}
                    Err(error) => return Some(error.to_string()),
                }
            }
        });
        let problem = match ended.await {
            Ok(problem) => problem,
            Err(_) => Some("CRIU does not end".to_owned()),
        };
        self.kill_what_is_left(problem).await;
        self.phase("end the source's tree", begun, self.clock.now_ns());
        self.report.criu_stats = self.place.as_ref().and_then(DumpPlace::stats);
        if let Err(error) = self.hook(hooks::Moment::AfterCommit).await {
            self.report.notes.push(error.to_string());
        }
    }

    // CRIU kills the tree when it ends well. Where it did not, the tree must not run on beside its copy.
    async fn kill_what_is_left(&mut self, problem: Option<String>) {
        let Some(problem) = problem else { return };
        let pids: Vec<u32> = self.survey.processes.iter().map(|it| it.pid).collect();
        let killing = spawn_blocking(move || {
            for pid in pids {
                let pid = i32::try_from(pid)
                    .ok()
                    .and_then(rustix::process::Pid::from_raw);
                if let Some(pid) = pid {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
        });
        let _ = killing.await;
        self.report.notes.push(format!(
            "CRIU did not end the tree here ({problem}); crxfer killed it"
        ));
    }

    /// Ends the migration early, with the workload where it belongs.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn give_up(&mut self, error: MigrateError) -> MigrateFailure {
        self.may_stop = false;
        if self.session.owner() == Owner::InDoubt {
            self.hold(&error).await;
        }
        let owner = self.session.owner();
        self.let_run();
        let reason = match &error {
            MigrateError::Stopped => "the source's operator stopped it".to_owned(),
            error => error.to_string(),
        };
        let told = self.session.abort(Instant::now(), &reason);
        let is_clean = told && {
            let aborted = self.until(|event| match event {
                Event::Session(Command::Aborted) => Ok(()),
                // The tree runs again, or was never frozen.
                other => Err(other),
            });
            matches!(tokio::time::timeout(ABORT_TIME, aborted).await, Ok(Ok(())))
        };
        if self.touched {
            let mut environment = self.environment();
            environment.reason = Some(reason);
            let hooks = self.options.hooks.clone();
            let running =
                spawn_blocking(move || hooks.run(hooks::Moment::AfterAbort, &environment));
            let _ = running.await;
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
    async fn hold(&mut self, error: &MigrateError) {
        self.emit(MigrateEvent::InDoubt(error.to_string()));
        let mut stop = self.options.stop.clone();
        // An operator who asked before the doubt did not know of it.
        stop.mark_unchanged();
        if stop.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn let_run(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.end(Verdict::Refuse);
        }
    }

    fn report(&mut self) -> MigrationReport {
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

    fn environment(&self) -> hooks::Environment {
        let sockets = &self.survey.facts.sockets;
        let mut addresses: Vec<_> = sockets
            .iter()
            .map(|socket| socket.address)
            .filter(|address| !address.is_unspecified() && !address.is_loopback())
            .collect();
        addresses.dedup();
        hooks::Environment {
            migration: self.name.clone(),
            pid: Some(self.options.pid),
            peer: Some(self.connection.remote_address().ip()),
            addresses,
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

    /// Waits for a moment of the freeze.
    async fn moment(&mut self) -> Result<Moment, MigrateError> {
        self.until(|event| match event {
            Event::Freeze(moment) => Ok(moment),
            other => Err(other),
        })
        .await
    }

    /// Waits for an event that `pick` takes; gives others back to it until then. While it waits for the
    /// session, CRIU's end of the dump is an error.
    async fn until<T>(
        &mut self,
        pick: impl Fn(Event) -> Result<T, Event>,
    ) -> Result<T, MigrateError> {
        let mut passed_over = VecDeque::new();
        loop {
            while let Some(event) = self.events.pop_front() {
                match pick(event) {
                    Ok(found) => {
                        passed_over.append(&mut self.events);
                        self.events = passed_over;
                        return Ok(found);
                    }
                    Err(Event::Freeze(Moment::Ended { result })) if self.frozen.is_some() => {
                        return Err(ended(result));
                    }
                    Err(other) => passed_over.push_back(other),
                }
            }
            self.flush().await?;
            if self.events.is_empty() {
                self.wait().await?;
            }
        }
    }

    /// Waits for work on another thread, and keeps the session going meanwhile.
    async fn job<T>(&mut self, mut job: JoinHandle<T>) -> Result<T, MigrateError> {
        loop {
            self.flush().await?;
            tokio::select! {
                done = &mut job => return Ok(done.expect("the work does not panic")),
                waited = self.wait() => waited?,
            }
        }
    }

    async fn flush(&mut self) -> Result<(), MigrateError> {
        while let Some(command) = self.session.poll_command() {
            match command {
                Command::Send(message) => {
                    let written = self.control.write_message(&message.encode()).await;
                    written.map_err(TransferError::from)?;
                }
                Command::Clock { asked_ns, here_ns } => {
                    self.samples.add(asked_ns, here_ns, self.clock.now_ns());
                    // The next one at once, until there are a few.
                    if self.clock_questions < CLOCK_AT_FIRST {
                        self.ask_clock();
                    }
                }
                other => self.events.push_back(Event::Session(other)),
            }
        }
        Ok(())
    }

    // Loses nothing when it is dropped.
    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    async fn wait(&mut self) -> Result<(), MigrateError> {
        let timeout = tokio::time::Instant::from_std(self.session.poll_timeout());
        let (may_stop, mut stop) = (self.may_stop, self.stop.clone());
        tokio::select! {
            input = self.inputs.recv() => self.take(input.expect("this side holds a sender"))?,
            () = tokio::time::sleep_until(timeout) => self.session.handle_timeout(Instant::now())?,
            () = tokio::time::sleep(TICK) => self.tick(),
            stopped = stop.wait_for(|&stop| stop), if may_stop => {
                if stopped.is_ok() {
                    return Err(MigrateError::Stopped);
                }
                // Nobody can ask any more.
                self.may_stop = false;
            }
        }
        Ok(())
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn take(&mut self, input: Input) -> Result<(), MigrateError> {
        match input {
            Input::Message(message) => Ok(self.session.handle_message(Instant::now(), message)?),
            Input::Ended(error) => Err(error.into()),
            Input::Freeze(moment) => {
                self.events.push_back(Event::Freeze(moment));
                Ok(())
            }
        }
    }

    fn tick(&mut self) {
        if self.clock.elapsed() >= self.clock_asked + CLOCK_EVERY {
            self.ask_clock();
        }
        let (Some((number, begin, bytes_before)), Some(stream)) = (self.iterating, &self.stream)
        else {
            return;
        };
        let scanned_bytes = self.counted.scanned.load(Ordering::Relaxed);
        let so_far = Iteration {
            number,
            begin,
            end: self.clock.elapsed(),
            scanned_bytes,
            scan_time: (self.clock.elapsed() - begin).saturating_sub(stream.written().busy()),
            changed_bytes: self.counted.changed.load(Ordering::Relaxed),
            wire_bytes: stream.written().bytes() - bytes_before,
            send_time: stream.written().busy(),
        };
        if self.policy.progress(&so_far) != Decision::Again {
            // What was read so far is a whole iteration for the destination; `after` says the rest.
            stream.stop(true);
        }
        let (sent, received) = self.connection.wire_bytes();
        self.emit(MigrateEvent::Progress {
            number,
            scanned_bytes,
            memory_bytes: self.survey.facts.tree.memory_bytes,
            wire_bytes: sent + received,
            prediction: self.policy.predict(),
        });
    }

    #[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
    fn ask_clock(&mut self) {
        self.clock_asked = self.clock.elapsed();
        self.clock_questions += 1;
        self.session.ask_clock(Instant::now(), self.clock.now_ns());
    }
}

fn ended(result: Result<(), CriuError>) -> MigrateError {
    match result {
        Err(error) => error.into(),
        Ok(()) => MigrateError::Memory("CRIU ended before it was told to".to_owned()),
    }
}

fn since(at_ns: u64, begun_ns: u64) -> i64 {
    i64::try_from(i128::from(at_ns) - i128::from(begun_ns)).unwrap_or(i64::MAX)
}

async fn read_messages(mut messages: ControlReceiver, input: mpsc::UnboundedSender<Input>) {
    loop {
        let next = match messages.read_message(limits::CONTROL_MESSAGE).await {
            Ok(Some(bytes)) => match Message::decode(&bytes) {
                Ok(message) => Input::Message(message),
                Err(error) => Input::Ended(crate::session::SessionError::from(error).into()),
            },
            Ok(None) => Input::Ended(TransportError::CutShort.into()),
            Err(error) => Input::Ended(error.into()),
        };
        let is_last = !matches!(next, Input::Message(_));
        if input.send(next).is_err() || is_last {
            return;
        }
    }
}
