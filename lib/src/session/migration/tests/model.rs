//! Both hosts of a hand-over and all that runs there, with the link between them, in virtual time.
//!
//! The real parts: the machines of both sides and the tables of [`handover`](crate::handover). The
//! model stands for what is around them:
//!
//! - `source`, `destination`: the drivers, as long as their connection lasts;
//! - `alone`: whoever takes care of a journal afterwards: the driver in doubt or holding, the guard, a
//!   `recover`, a receiver that is met. One step at a time, between which anything may die;
//! - `link`: control messages in order, records of the bulk stream in order, neither in order with the
//!   other; a connection that ends in both directions at different moments, of which the sides learn
//!   at different moments or never; meetings on connections of their own, each message of which may be
//!   late, lost or come twice;
//! - `faults`: what goes wrong; `rules`: what must hold after every step, and how it must end.
//!
//! What is simplified: a step is all or nothing, as one write, one kill, one removal is; whether a copy
//! has run can be seen; a rebuilt copy is as good as the first.

mod alone;
mod destination;
mod faults;
mod link;
mod rules;
mod source;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::super::{MigrationDestination, MigrationSource, MigrationSourceCommand as AtSource};
use super::{config, offer, offered, welcome};
use crate::handover::{Answer, DestinationState, Keep, OnPartition, SourceState, Verdict};
use crate::testing::Rng;
use crate::wire::{MIGRATION_VERSION, Message};

/// Every history stands still by then, or something is stuck.
const LONGEST: Duration = Duration::from_secs(2400);

/// As the source's driver waits for it.
const ABORT_TIME: Duration = Duration::from_secs(10);

/// A driver that is busy looks at the clock this late at most.
const BUSY: Duration = Duration::from_millis(20);

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    Source,
    Destination,
}

pub(super) const BOTH: [Side; 2] = [Side::Source, Side::Destination];

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// What goes wrong, or is done by people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nothing of the session reaches this side any more; it learns so after a while, or never.
    Deaf(Side, Option<Duration>),
    /// Nothing crosses in either direction, for a while or for good.
    Cut(Option<Duration>),
    /// `crxfer migrate` or `recv` is killed.
    Crash(Side),
    /// CRIU is killed. At the destination: whether a process stays behind (where the copy was being
    /// let go: whether it runs).
    Criu(Side, bool),
    /// The guard is killed.
    Guard(Side),
    /// Both of a host's programs, and CRIU.
    All(Side),
    /// The host goes down; whether its journals (and images) outlast that.
    Reboot(Side, bool),
    /// Something on this side fails.
    Fail(Side),
    /// This side stands still, its connection stays.
    Hang(Side),
    /// The operator at the source says stop.
    Stop,
    /// Somebody runs `recover` on this side.
    Recover(Side),
    /// A receiver is started where none runs.
    Serve,
    /// From now on CRIU cannot make a tree of the images.
    NoRestore,
    /// An operator decides on this side.
    Decide(Side, Keep),
}

/// A rule that is broken on purpose: the simulator must find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    /// The destination removes a complete copy when it loses the source.
    RemovesOnLoss,
    /// The source commits without a fence.
    NoFence,
    /// The source does not look whether CRIU lived until the fence was closed.
    DoesNotLook,
    /// Whoever finds a committed journal lets the tree run.
    ThawsCommitted,
    /// Commit is sent before it is recorded.
    SendsFirst,
    /// The destination takes a commit although its operator decided for the source.
    CommitBeatsOperator,
    /// The copy is let go before that is recorded.
    LetsGoFirst,
}

/// What the two sides do, and how long that takes.
#[derive(Clone, Debug)]
pub(super) struct Conditions {
    pub(super) seed: u64,
    pub(super) iterations: u32,
    pub(super) freeze_limit: Duration,
    /// At most this long each message and each work takes.
    pub(super) most_delay: Duration,
    /// Each with the number of moments before it.
    pub(super) faults: Vec<(usize, Fault)>,
    /// The destination says no.
    pub(super) refused: bool,
    /// One message of a meeting out of so many is lost, and comes twice; 0: none.
    pub(super) unreliable: u64,
    pub(super) policy: OnPartition,
    pub(super) mutation: Option<Mutation>,
}

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Runs {
    Tree,
    Copy,
    Neither,
    Both,
}

/// How a history went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Outcome {
    /// When all stood still by itself.
    pub(super) quiet: Runs,
    /// After that, with `recover` and where nothing else helped an operator.
    pub(super) end: Runs,
    /// An operator had to decide.
    pub(super) asked: bool,
    /// A host went down with the only workload that there was.
    pub(super) excused: bool,
    /// How many moments at which a fault may come.
    pub(super) moments: usize,
}

/// The journal of one side.
#[derive(Clone, Copy, Debug)]
struct Book<S> {
    state: S,
    decided: Option<Keep>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tree {
    there: bool,
    // By CRIU, since when.
    held: Option<Instant>,
    fenced: bool,
    // No socket in repair mode, no lock of CRIU's.
    whole: bool,
    dumped: bool,
    // After it was dumped: then the images are not what it is.
    ran_since: bool,
}

impl Tree {
    fn runs(&self) -> bool {
        self.there && self.held.is_none() && !self.fenced
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    None,
    Leftover,
    Held,
    LettingGo,
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Images {
    None,
    Partial,
    Complete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Offering,
    Scanning,
    AwaitStored,
    AwaitReady,
    Freezing,
    Dumping,
    Sending,
    AwaitBuilt,
    AwaitFence,
    Hook,
    Committing,
    AwaitRunning,
    Ending,
    Closing,
    Keeping,
    Telling,
    AwaitAborted(Instant),
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Check,
    Prepare,
    Sync,
    Restore,
    Vote,
}

#[derive(Clone, Copy, Debug)]
enum Record {
    Begin(u32, bool),
    End(u32, bool),
}

/// Who has a journal's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    // `crxfer migrate`, or the session of `recv`.
    Live,
    // A `recv` that found the journal, or is met.
    Met,
    Guard,
    Recover,
}

/// Who takes care of a journal step by step.
#[derive(Clone, Copy, Debug)]
struct Worker {
    holder: Holder,
    // Of the source that is there, at the destination.
    verdict: Verdict,
    answers: bool,
    // A source that has asked: until when it waits.
    asked: Option<Instant>,
    tries: u32,
    // Questions since the last answer.
    unreached: u32,
    // Nothing is to be done before something happens.
    idle: bool,
}

#[derive(Debug)]
enum Happening {
    Message(Side, Message),
    Record(Record),
    SourceWork(Doing),
    Fence,
    DestinationWork(Job),
    // The side learns that the connection has ended; whether all was done.
    Ended(Side, bool),
    // A driver learns that its CRIU has died.
    CriuDied(Side),
    // CRIU learns that its caller has died.
    CriuLeft(Side),
    LetGo,
    Guard(Side),
    // Whoever works on the journal takes the next step.
    Act(Side),
    Meet(Verdict),
    Met(Answer),
    Heal,
    AskClock,
}

/// Both hosts and the link.
#[expect(clippy::struct_excessive_bools, reason = "facts that are true or not")]
pub(super) struct Model {
    conditions: Conditions,
    rng: Rng,
    begun: Instant,
    now: Instant,
    happenings: BTreeMap<(Instant, usize), Happening>,
    moments: usize,
    number: usize,
    cut: bool,
    // By side that hears: nothing of the session arrives any more; when the last arrived.
    deaf: [bool; 2],
    last_control: [Instant; 2],
    last_record: Instant,
    hanging: [bool; 2],
    crashed: [bool; 2],
    guards: [bool; 2],
    leases: [Option<Holder>; 2],
    workers: [Option<Worker>; 2],
    source: MigrationSource,
    source_book: Option<Book<SourceState>>,
    doing: Doing,
    events: VecDeque<AtSource>,
    tree: Tree,
    source_criu: bool,
    iterated: u32,
    destination: MigrationDestination,
    destination_book: Option<Book<DestinationState>>,
    session_over: bool,
    copy: Copy,
    has_run: bool,
    images: Images,
    prepared: bool,
    restores: bool,
    // What the rules look at.
    commit_heard: bool,
    operator: bool,
    may_keep_source: bool,
    contradicts: bool,
    excused: bool,
    broken: Option<String>,
    log: Option<Vec<String>>,
}

impl Model {
    #[expect(clippy::disallowed_methods, reason = "any moment to count from")]
    pub(super) fn new(conditions: Conditions) -> Self {
        let now = Instant::now();
        let limit = conditions.freeze_limit;
        let mut source = MigrationSource::new(config(), offer(), limit, now);
        source.poll_command().expect("the hello");
        source
            .handle_message(now, welcome(MIGRATION_VERSION))
            .unwrap();
        source.poll_command().expect("the offer");
        let mut model = Self {
            rng: Rng::new(conditions.seed),
            begun: now,
            now,
            happenings: BTreeMap::new(),
            moments: 0,
            number: 0,
            cut: false,
            deaf: [false; 2],
            last_control: [now; 2],
            last_record: now,
            hanging: [false; 2],
            crashed: [false; 2],
            guards: [true; 2],
            leases: [Some(Holder::Live), None],
            workers: [None; 2],
            source,
            source_book: Some(Book {
                state: SourceState::Begun,
                decided: None,
            }),
            doing: Doing::Offering,
            events: VecDeque::new(),
            tree: Tree {
                there: true,
                held: None,
                fenced: false,
                whole: true,
                dumped: false,
                ran_since: false,
            },
            source_criu: false,
            iterated: 0,
            destination: MigrationDestination::new(now),
            destination_book: None,
            session_over: false,
            copy: Copy::None,
            has_run: false,
            images: Images::None,
            prepared: false,
            restores: true,
            commit_heard: false,
            operator: false,
            may_keep_source: false,
            contradicts: false,
            excused: false,
            broken: None,
            log: None,
            conditions,
        };
        model.work(Happening::DestinationWork(Job::Check));
        model.work(Happening::AskClock);
        model
    }

    /// Lets everything happen, then ends it with `recover`. The error says which rule was broken, and
    /// by which history.
    pub(super) fn run(conditions: &Conditions) -> Result<Outcome, String> {
        Self::new(conditions.clone()).whole().or_else(|_| {
            // Once more, with a log.
            let mut model = Self::new(conditions.clone());
            model.log = Some(Vec::new());
            let broken = model.whole();
            broken.map_err(|broken| format!("{broken}of {conditions:?}"))
        })
    }

    /// As `run`, up to where all stands still; the caller goes on.
    pub(super) fn until_quiet(conditions: &Conditions) -> Result<Self, String> {
        let mut model = Self::new(conditions.clone());
        model.log = Some(Vec::new());
        model.settle()?;
        Ok(model)
    }

    /// What happens in it.
    pub(super) fn history(conditions: &Conditions) -> String {
        let mut model = Self::new(conditions.clone());
        model.log = Some(Vec::new());
        let ended = model.settle().and_then(|()| model.finish());
        format!("{ended:?}, {model}")
    }

    fn whole(mut self) -> Result<Outcome, String> {
        self.settle()?;
        let (quiet, moments) = (self.runs(), self.moments);
        let asked = self.finish()?;
        Ok(Outcome {
            quiet,
            end: self.runs(),
            asked,
            excused: self.excused,
            moments,
        })
    }

    /// Until nothing happens any more.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        let mut steps = 0;
        self.faults();
        while self.broken.is_none() && self.step() {
            self.check();
            steps += 1;
            if steps > 20_000 || self.now > self.begun + LONGEST {
                self.breaks("it does not end");
            }
        }
        match self.broken.take() {
            Some(rule) => Err(format!("{rule}: {self}")),
            None => Ok(()),
        }
    }

    fn breaks(&mut self, rule: &str) {
        self.broken.get_or_insert_with(|| rule.to_owned());
    }

    fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:?} {}", self.now - self.begun, line()));
        }
    }

    fn mutated(&self, mutation: Mutation) -> bool {
        self.conditions.mutation == Some(mutation)
    }

    // The next thing that happens; false when nothing will any more.
    fn step(&mut self) -> bool {
        let timer = self.next_timer();
        let next = self.happenings.first_key_value().map(|(&(at, _), _)| at);
        match (timer, next) {
            (None, None) => return false,
            (Some((at, side)), next)
                if next.is_none_or(|next| at <= next && !self.is_late(at, next)) =>
            {
                self.now = self.now.max(at);
                self.timeout(side);
            }
            _ => {
                let ((at, _), happening) = self.happenings.pop_first().expect("looked at");
                self.now = at;
                self.log(|| format!("{happening:?}"));
                if !matches!(happening, Happening::AskClock) {
                    self.moments += 1;
                }
                self.happen(happening);
            }
        }
        self.pump();
        if self.faults() {
            self.pump();
        }
        true
    }

    // A driver that is busy takes what has arrived before it looks at the clock.
    fn is_late(&mut self, timer: Instant, next: Instant) -> bool {
        next < timer + BUSY && self.rng.once_in(2)
    }

    fn next_timer(&self) -> Option<(Instant, Side)> {
        // Who lets the tree run looks at no clock.
        let keeps = matches!(self.doing, Doing::Keeping | Doing::Telling);
        let source = (self.in_session(Side::Source) && !keeps).then(|| {
            let at = self.source.poll_timeout();
            let at = match self.doing {
                Doing::AwaitAborted(until) => at.min(until),
                _ => at,
            };
            (at, Side::Source)
        });
        let destination = self
            .in_session(Side::Destination)
            .then(|| (self.destination.poll_timeout(), Side::Destination));
        [source, destination].into_iter().flatten().min()
    }

    // Its process is there and goes on.
    fn lives(&self, side: Side) -> bool {
        !self.hanging[side as usize] && !self.crashed[side as usize]
    }

    // … and has its connection.
    fn in_session(&self, side: Side) -> bool {
        let is_over = match side {
            Side::Source => self.doing == Doing::Over,
            Side::Destination => self.session_over,
        };
        !is_over && self.lives(side)
    }

    fn timeout(&mut self, side: Side) {
        let now = self.now;
        match side {
            Side::Source => {
                if matches!(self.doing, Doing::AwaitAborted(until) if now >= until) {
                    self.source_over();
                } else if self.source.handle_timeout(now).is_err() {
                    self.give_up();
                }
            }
            Side::Destination => {
                if self.destination.handle_timeout(now).is_err() {
                    self.destination_fails(false);
                }
            }
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Guard(side) => self.guard_acts(side),
            Happening::Act(side) => self.act(side),
            Happening::CriuLeft(side) => self.criu_left(side),
            Happening::Meet(verdict) => self.met(verdict),
            Happening::Met(answer) => self.answered(answer),
            Happening::LetGo => self.let_go(),
            Happening::Heal => {
                self.cut = false;
                self.wakes(Side::Source);
            }
            Happening::CriuDied(side) if self.lives(side) => self.criu_died(side),
            Happening::SourceWork(done) if self.lives(Side::Source) && done == self.doing => {
                self.worked();
            }
            Happening::Fence if self.lives(Side::Source) => self.close_fence(),
            other => self.happen_in_session(other),
        }
    }

    fn happen_in_session(&mut self, happening: Happening) {
        let side = match &happening {
            Happening::Message(side, _) | Happening::Ended(side, _) => *side,
            Happening::Record(_) | Happening::DestinationWork(_) => Side::Destination,
            Happening::AskClock => Side::Source,
            _ => return,
        };
        if !self.in_session(side) {
            return;
        }
        match happening {
            Happening::Message(Side::Source, message) => self.at_source(message),
            Happening::Message(Side::Destination, message) => self.at_destination(message),
            Happening::Record(record) => self.record(record),
            Happening::DestinationWork(job) => self.destination_worked(job),
            Happening::Ended(Side::Source, _) => self.give_up(),
            Happening::Ended(Side::Destination, well) => self.destination_ended(well),
            Happening::AskClock => {
                self.source.ask_clock(self.now, 1);
                self.work(Happening::AskClock);
            }
            _ => {}
        }
    }

    fn pump(&mut self) {
        loop {
            let number = self.number;
            if self.in_session(Side::Source) {
                self.pump_source();
            }
            if self.in_session(Side::Destination) {
                self.pump_destination();
            }
            if self.number == number {
                return;
            }
        }
    }

    // ---- journals

    fn source_state(&self) -> Option<SourceState> {
        self.source_book.map(|book| book.state)
    }

    fn destination_state(&self) -> Option<DestinationState> {
        self.destination_book.map(|book| book.state)
    }

    fn source_records(&mut self, next: SourceState) {
        self.log(|| format!("source records {next:?}"));
        let found = self.source_state();
        match &mut self.source_book {
            Some(book) if book.state.may_become(next) => book.state = next,
            _ => self.breaks(&format!("{next:?} cannot follow {found:?}")),
        }
    }

    fn destination_records(&mut self, next: DestinationState) {
        self.log(|| format!("destination records {next:?}"));
        let found = self.destination_state();
        match &mut self.destination_book {
            Some(book) if book.state.may_become(next) => book.state = next,
            _ => self.breaks(&format!("{next:?} cannot follow {found:?}")),
        }
    }
}

impl std::fmt::Display for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:?}", self.conditions)?;
        writeln!(f, "{:?}, {:?}", self.tree, self.source_book)?;
        writeln!(
            f,
            "copy {:?} (has run: {}), images {:?}, {:?}",
            self.copy, self.has_run, self.images, self.destination_book
        )?;
        writeln!(
            f,
            "source {:?}, leases {:?}, cut {}",
            self.doing, self.leases, self.cut
        )?;
        let log = self.log.iter().flatten();
        log.into_iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}
