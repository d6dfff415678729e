//! Both hosts of a hand-over with their drivers' rules, and the link between them, in virtual time.
//!
//! What is modelled, as the drivers do it: the order of the steps; what each side does on an error, a
//! timeout, the operator's word and the end of the connection; that a side which ends closes the
//! connection, whereby what it sent last may be lost; control messages in order, records of the bulk
//! stream in order, neither in order with the other; a link that ends in both directions at different
//! moments, of which the sides learn at different moments or never; a side that is killed; a side that
//! stands still without ending.
//!
//! What is simplified: work takes any time but does not fail half way; letting the tree run, killing
//! it, and removing a copy take no time; the operator does not decide a doubt. A source that is killed
//! leaves CRIU behind, which lets the tree run whatever has been said: [`Ending::BothAfterCrash`]. A
//! CRIU that fails after its copy was let go is not modelled.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::super::{
    MigrationDestination, MigrationDestinationCommand as AtDestination, MigrationSource,
    MigrationSourceCommand as AtSource, Owner,
};
use super::{config, offer, offered, welcome};
use crate::testing::Rng;
use crate::wire::{Failure, FailureCode, MIGRATION_VERSION, Message, Step};

/// Every history is over by then, or it is stuck.
const LONGEST: Duration = Duration::from_secs(900);

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

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// Nothing reaches this side any more; it learns so after a while, or not before it is told.
    Deaf(Side, Option<Duration>),
    /// The process is killed.
    Crash(Side),
    /// Something on this side fails.
    Fail(Side),
    /// This side stands still, its connection stays.
    Hang(Side),
    /// The operator at the source says stop.
    Stop,
}

/// What the two sides do, and how long that takes.
#[derive(Clone, Debug)]
pub(super) struct Conditions {
    pub(super) seed: u64,
    pub(super) iterations: u32,
    pub(super) freeze_limit: Duration,
    /// At most this long each message and each work takes.
    pub(super) most_delay: Duration,
    /// Each with the number of messages and records that were sent before it.
    pub(super) faults: Vec<(usize, Fault)>,
    /// The destination says no.
    pub(super) refused: bool,
}

/// Where the workload is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Ending {
    AtSource,
    AtDestination,
    /// The source holds its frozen tree, and the copy runs.
    InDoubtItRuns,
    /// The source holds its frozen tree, and there is no copy.
    InDoubtItDoesNot,
    /// The source was killed after its commit: CRIU let the tree run, and the copy runs.
    BothAfterCrash,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tree {
    Running,
    Frozen(Instant),
    Killed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    None,
    Held,
    Running,
    Removed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Offering,
    Scanning,
    AwaitStored,
    AwaitReady,
    Dumping,
    Sending,
    AwaitBuilt,
    Hook,
    AwaitRunning,
    AwaitAborted(Instant),
    Holding,
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DestinationJob {
    Check,
    Prepare,
    Sync,
    Restore,
    Release,
}

#[derive(Clone, Copy, Debug)]
enum Record {
    Begin(u32, bool),
    End(u32, bool),
}

#[derive(Debug)]
enum Happening {
    Message(Side, Message),
    Record(Record),
    SourceWork(Doing),
    DestinationWork(DestinationJob),
    // The side learns that the connection has ended.
    Ended(Side),
    AskClock,
}

/// Both hosts and the link.
pub(super) struct Model {
    conditions: Conditions,
    rng: Rng,
    begun: Instant,
    now: Instant,
    happenings: BTreeMap<(Instant, usize), Happening>,
    sent: usize,
    number: usize,
    // By side that hears: nothing arrives any more; when the last arrived.
    deaf: [bool; 2],
    last_control: [Instant; 2],
    last_record: Instant,
    hanging: [bool; 2],
    crashed: [bool; 2],
    source: MigrationSource,
    doing: Doing,
    events: VecDeque<AtSource>,
    tree: Tree,
    iterated: u32,
    committed: bool,
    aborted: bool,
    destination: MigrationDestination,
    destination_over: bool,
    copy: Copy,
    synced: bool,
    prepared: bool,
    commit_arrived: bool,
    log: Vec<String>,
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
            sent: 0,
            number: 0,
            deaf: [false; 2],
            last_control: [now; 2],
            last_record: now,
            hanging: [false; 2],
            crashed: [false; 2],
            source,
            doing: Doing::Offering,
            events: VecDeque::new(),
            tree: Tree::Running,
            iterated: 0,
            committed: false,
            aborted: false,
            destination: MigrationDestination::new(now),
            destination_over: false,
            copy: Copy::None,
            synced: false,
            prepared: false,
            commit_arrived: false,
            log: Vec::new(),
            conditions,
        };
        model.work(Happening::DestinationWork(DestinationJob::Check));
        model.work(Happening::AskClock);
        model
    }

    /// Lets everything happen; gives where the workload is, and how many messages and records there
    /// were.
    ///
    /// # Panics
    /// If a rule is broken, with what happened before.
    pub(super) fn run(mut self) -> (Ending, usize) {
        let mut steps = 0;
        self.faults();
        while self.step() {
            self.check();
            steps += 1;
            let is_stuck = steps > 10_000 || self.now > self.begun + LONGEST;
            assert!(!is_stuck, "no end: {self}");
        }
        (self.ending(), self.sent)
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
                self.log
                    .push(format!("{:?} {happening:?}", at - self.begun));
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
        let source = (self.is_awake(Side::Source)).then(|| {
            let at = self.source.poll_timeout();
            let at = match self.doing {
                Doing::AwaitAborted(until) => at.min(until),
                _ => at,
            };
            (at, Side::Source)
        });
        let destination = self
            .is_awake(Side::Destination)
            .then(|| (self.destination.poll_timeout(), Side::Destination));
        [source, destination].into_iter().flatten().min()
    }

    fn is_awake(&self, side: Side) -> bool {
        let is_over = match side {
            Side::Source => matches!(self.doing, Doing::Over | Doing::Holding),
            Side::Destination => self.destination_over,
        };
        !is_over && !self.hanging[side as usize] && !self.crashed[side as usize]
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
        let side = match &happening {
            Happening::Message(side, _) | Happening::Ended(side) => *side,
            Happening::Record(_) | Happening::DestinationWork(_) => Side::Destination,
            Happening::SourceWork(_) | Happening::AskClock => Side::Source,
        };
        if !self.is_awake(side) {
            return;
        }
        match happening {
            Happening::Message(Side::Source, message) => {
                if self.source.handle_message(self.now, message).is_err() {
                    self.give_up();
                }
            }
            Happening::Message(Side::Destination, message) => self.at_destination(message),
            Happening::Record(record) => self.record(record),
            Happening::SourceWork(done) if done == self.doing => self.worked(),
            Happening::SourceWork(_) => {}
            Happening::DestinationWork(job) => self.destination_worked(job),
            Happening::Ended(Side::Source) => self.give_up(),
            Happening::Ended(Side::Destination) if self.destination.is_over() => {
                self.destination_over = true;
            }
            Happening::Ended(Side::Destination) => self.destination_fails(false),
            Happening::AskClock => {
                self.source.ask_clock(self.now, 1);
                self.work(Happening::AskClock);
            }
        }
    }

    // ---- the source's driver

    fn pump(&mut self) {
        loop {
            let sent = self.sent;
            if self.is_awake(Side::Source) {
                self.pump_source();
            }
            if self.is_awake(Side::Destination) {
                self.pump_destination();
            }
            if self.sent == sent {
                return;
            }
        }
    }

    fn pump_source(&mut self) {
        loop {
            while let Some(command) = self.source.poll_command() {
                match command {
                    AtSource::Send(message) => self.send(Side::Destination, message),
                    AtSource::Clock { .. } => {}
                    other => self.events.push_back(other),
                }
            }
            let doing = self.doing;
            let wanted = |event: &AtSource| {
                matches!(
                    (doing, event),
                    (Doing::Offering, AtSource::Offered(_))
                        | (Doing::AwaitStored, AtSource::Stored { .. })
                        | (Doing::AwaitReady, AtSource::Freeze)
                        | (Doing::AwaitBuilt, AtSource::Built)
                        | (Doing::AwaitRunning, AtSource::Running { .. })
                        | (Doing::AwaitAborted(_), AtSource::Aborted)
                )
            };
            let Some(at) = self.events.iter().position(wanted) else {
                return;
            };
            let event = self.events.remove(at).expect("found there");
            self.on_event(event);
        }
    }

    fn on_event(&mut self, event: AtSource) {
        match event {
            AtSource::Offered(_) if self.conditions.refused => self.give_up(),
            AtSource::Offered(_) | AtSource::Stored { .. } => self.iterate_or_freeze(),
            AtSource::Freeze => {
                self.source.frozen(self.now);
                self.tree = Tree::Frozen(self.now);
                self.put(Record::Begin(self.source.iteration(), true));
                self.do_now(Doing::Dumping);
            }
            AtSource::Built => self.do_now(Doing::Hook),
            AtSource::Running { .. } => {
                assert!(matches!(self.tree, Tree::Frozen(_)), "{self}");
                self.tree = Tree::Killed;
                self.source_over();
            }
            AtSource::Aborted => self.source_over(),
            AtSource::Send(_) | AtSource::Clock { .. } => unreachable!("not waited for"),
        }
    }

    fn iterate_or_freeze(&mut self) {
        if self.iterated == self.conditions.iterations {
            self.source.prepare_final(self.now);
            self.doing = Doing::AwaitReady;
            return;
        }
        self.iterated += 1;
        let number = self.source.begin_iteration();
        self.put(Record::Begin(number, false));
        self.do_now(Doing::Scanning);
    }

    // What the source did is done.
    fn worked(&mut self) {
        let number = self.source.iteration();
        match self.doing {
            Doing::Scanning => {
                self.put(Record::End(number, false));
                self.source.end_iteration();
                self.doing = Doing::AwaitStored;
            }
            Doing::Dumping => self.do_now(Doing::Sending),
            Doing::Sending => {
                self.put(Record::End(number, true));
                self.source.end_final();
                self.doing = Doing::AwaitBuilt;
            }
            Doing::Hook if self.source.commit(self.now) => self.doing = Doing::AwaitRunning,
            Doing::Hook => self.give_up(),
            _ => unreachable!("no work"),
        }
    }

    fn do_now(&mut self, doing: Doing) {
        self.doing = doing;
        self.work(Happening::SourceWork(doing));
    }

    // As in the driver's `ending`.
    fn give_up(&mut self) {
        if matches!(self.doing, Doing::AwaitAborted(_)) {
            return self.source_over();
        }
        self.log.push("the source gives up".into());
        if self.source.owner() == Owner::InDoubt {
            self.doing = Doing::Holding;
            return;
        }
        if matches!(self.tree, Tree::Frozen(_)) {
            self.tree = Tree::Running;
        }
        if self.source.abort(self.now, "it failed") {
            self.doing = Doing::AwaitAborted(self.now + ABORT_TIME);
        } else {
            self.source_over();
        }
    }

    fn source_over(&mut self) {
        self.doing = Doing::Over;
        self.close(Side::Source);
    }

    // ---- the destination's driver

    fn pump_destination(&mut self) {
        while let Some(command) = self.destination.poll_command() {
            match command {
                AtDestination::Send(message) => self.send(Side::Source, message),
                AtDestination::PrepareFinal(_) => {
                    self.work(Happening::DestinationWork(DestinationJob::Prepare));
                }
                AtDestination::Resume => {
                    assert_eq!(self.copy, Copy::Held, "{self}");
                    self.copy = Copy::Running;
                    self.work(Happening::DestinationWork(DestinationJob::Release));
                }
                AtDestination::Remove { .. } => {
                    self.remove();
                    self.destination.aborted(self.now);
                }
                AtDestination::Clock { asked_ns } => {
                    self.destination.tell_clock(self.now, asked_ns, 2);
                }
            }
            if !self.is_awake(Side::Destination) {
                return;
            }
        }
    }

    fn at_destination(&mut self, message: Message) {
        self.commit_arrived |= matches!(message, Message::Migration(Step::Commit));
        if self.destination.handle_message(self.now, message).is_err() {
            self.destination_fails(true);
        }
    }

    fn record(&mut self, record: Record) {
        self.destination.heard(self.now);
        match record {
            // Its directory is gone.
            _ if self.copy == Copy::Removed => self.destination_fails(true),
            Record::Begin(number, is_final) => {
                if self.destination.iteration_begun(number, is_final).is_err() {
                    self.destination_fails(true);
                }
            }
            Record::End(number, false) => self.destination.stored(self.now, number, 1, 1),
            Record::End(_, true) => {
                self.work(Happening::DestinationWork(DestinationJob::Sync));
                if self.prepared {
                    self.work(Happening::DestinationWork(DestinationJob::Restore));
                }
            }
        }
    }

    fn destination_worked(&mut self, job: DestinationJob) {
        let now = self.now;
        match job {
            DestinationJob::Check => {
                let refused = self.conditions.refused;
                self.destination.offered(now, offered(), refused);
            }
            DestinationJob::Prepare => {
                self.prepared = true;
                self.destination.final_ready(now);
            }
            DestinationJob::Sync => {
                self.synced = true;
                self.vote();
            }
            DestinationJob::Restore if self.copy == Copy::None => {
                self.copy = Copy::Held;
                self.vote();
            }
            // Cancelled when the copy was removed.
            DestinationJob::Restore => {}
            DestinationJob::Release => {
                self.destination.running(now, 7, 8, Vec::new(), Vec::new());
            }
        }
    }

    fn vote(&mut self) {
        if self.synced && self.copy == Copy::Held {
            self.destination.built(self.now);
        }
    }

    fn remove(&mut self) {
        assert_ne!(self.copy, Copy::Running, "{self}");
        self.copy = Copy::Removed;
    }

    // As in `Driver::run`: what is half done is removed, then the source is told where it is there.
    fn destination_fails(&mut self, tell: bool) {
        self.log.push("the destination fails".into());
        self.destination_over = true;
        if self.destination.owner() == Owner::Destination {
            assert_eq!(self.copy, Copy::Running, "{self}");
        } else {
            self.remove();
            if tell {
                let failure = Failure::new(FailureCode::Storage, "it failed");
                self.send(Side::Source, Message::Failure(failure));
            }
        }
        self.close(Side::Destination);
    }

    // ---- the link

    fn delay(&mut self) -> Duration {
        let most = u64::try_from(self.conditions.most_delay.as_nanos())
            .unwrap()
            .max(1);
        // Mostly short, now and then as long as allowed.
        let bits = self.rng.below(24);
        Duration::from_nanos(self.rng.below(most) >> bits)
    }

    fn work(&mut self, happening: Happening) {
        let at = self.now + self.delay() + Duration::from_millis(1);
        // Questions about the time end with the session.
        if !matches!(happening, Happening::AskClock) {
            self.add(at, happening);
        } else if self.is_awake(Side::Source) {
            self.add(at + Duration::from_secs(1), happening);
        }
    }

    fn add(&mut self, at: Instant, happening: Happening) {
        self.number += 1;
        self.happenings.insert((at, self.number), happening);
    }

    fn send(&mut self, to: Side, message: Message) {
        if let Message::Migration(step) = &message {
            let is_commit = *step == Step::Commit;
            let is_abort = matches!(step, Step::Abort(_));
            if is_commit {
                assert!(!self.committed && !self.aborted, "{self}");
                let in_time = matches!(self.tree, Tree::Frozen(at) if self.now < at + self.conditions.freeze_limit);
                assert!(in_time, "a commit beyond the freeze limit: {self}");
            }
            assert!(!(is_abort && self.committed), "{self}");
            self.committed |= is_commit;
            self.aborted |= is_abort;
        }
        let delay = self.delay();
        let at = self.last_control[to as usize].max(self.now + delay);
        self.last_control[to as usize] = at;
        if !self.deaf[to as usize] {
            self.add(at, Happening::Message(to, message));
        }
        self.sent += 1;
    }

    fn put(&mut self, record: Record) {
        let delay = self.delay();
        self.last_record = self.last_record.max(self.now + delay);
        if !self.deaf[Side::Destination as usize] {
            self.add(self.last_record, Happening::Record(record));
        }
        self.sent += 1;
    }

    // This side closes the connection: what it sent last may be lost with it.
    fn close(&mut self, side: Side) {
        let hears = side.other();
        if self.deaf[hears as usize] {
            // Its idle timeout tells it.
            let at = self.now + Duration::from_secs(self.rng.below(60));
            return self.add(at, Happening::Ended(hears));
        }
        let mut at = self.last_control[hears as usize];
        if self.rng.once_in(3) {
            self.lose(hears);
            at = self.now + self.delay();
        }
        self.deaf[hears as usize] = true;
        self.add(at.max(self.now), Happening::Ended(hears));
    }

    // What is on its way to this side does not arrive.
    fn lose(&mut self, hears: Side) {
        self.happenings.retain(|_, happening| match happening {
            Happening::Message(side, _) => *side != hears,
            Happening::Record(_) => hears != Side::Destination,
            _ => true,
        });
    }

    // ---- what goes wrong

    fn faults(&mut self) -> bool {
        let faults = std::mem::take(&mut self.conditions.faults);
        let (due, later) = faults.into_iter().partition(|(at, _)| *at <= self.sent);
        self.conditions.faults = later;
        let due: Vec<(usize, Fault)> = due;
        let any = !due.is_empty();
        for (_, fault) in due {
            self.log
                .push(format!("{:?} {fault:?}", self.now - self.begun));
            self.fault(fault);
        }
        any
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Deaf(side, learns) => {
                self.lose(side);
                self.deaf[side as usize] = true;
                if let Some(after) = learns {
                    self.add(self.now + after, Happening::Ended(side));
                }
            }
            Fault::Hang(side) => self.hanging[side as usize] = true,
            Fault::Stop if !self.committed && self.is_awake(Side::Source) => self.give_up(),
            Fault::Fail(Side::Source) if self.is_awake(Side::Source) => self.give_up(),
            Fault::Fail(Side::Destination) if self.is_awake(Side::Destination) => {
                self.destination_fails(true);
            }
            Fault::Crash(side) if !self.crashed[side as usize] => self.crash(side),
            Fault::Stop | Fault::Fail(_) | Fault::Crash(_) => {}
        }
    }

    // CRIU outlives its caller: a tree that is held runs on, a copy that is held is removed.
    fn crash(&mut self, side: Side) {
        self.crashed[side as usize] = true;
        match side {
            Side::Source if matches!(self.tree, Tree::Frozen(_)) => self.tree = Tree::Running,
            Side::Destination if self.copy != Copy::Running => self.copy = Copy::Removed,
            _ => {}
        }
        let at = self.now + Duration::from_secs(self.rng.below(30));
        self.deaf[side.other() as usize] = true;
        self.add(at, Happening::Ended(side.other()));
    }

    // ---- the rules

    fn check(&self) {
        let source_crashed = self.crashed[Side::Source as usize];
        let (tree, copy) = (self.tree, self.copy);
        if copy == Copy::Running {
            assert!(self.commit_arrived && self.committed, "{self}");
            assert!(tree != Tree::Running || source_crashed, "two run: {self}");
        }
        if self.committed && !source_crashed {
            assert_ne!(tree, Tree::Running, "{self}");
        }
        if let Tree::Frozen(at) = tree
            && !self.committed
            && !self.hanging[Side::Source as usize]
        {
            let limit = at + self.conditions.freeze_limit + BUSY;
            assert!(self.now <= limit, "frozen beyond the limit: {self}");
        }
    }

    fn ending(&self) -> Ending {
        let ends = |side| {
            self.crashed[side as usize] || self.hanging[side as usize] || !self.is_awake(side)
        };
        assert!(ends(Side::Source) && ends(Side::Destination), "{self}");
        let hangs = self.hanging[Side::Source as usize];
        match (self.tree, self.copy) {
            (Tree::Running, Copy::Running) => Ending::BothAfterCrash,
            (Tree::Running, _) => Ending::AtSource,
            (Tree::Killed, Copy::Running) => Ending::AtDestination,
            (Tree::Frozen(_), Copy::Running) => Ending::InDoubtItRuns,
            (Tree::Frozen(_), _) => {
                // A frozen source process does not resume anything either.
                assert!(self.committed || hangs, "kept frozen for nothing: {self}");
                Ending::InDoubtItDoesNot
            }
            (Tree::Killed, _) => panic!("lost: {self}"),
        }
    }
}

impl std::fmt::Display for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:?}", self.conditions)?;
        writeln!(
            f,
            "tree {:?}, copy {:?}, {:?}",
            self.tree, self.copy, self.doing
        )?;
        self.log.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}
