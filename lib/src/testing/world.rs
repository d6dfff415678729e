//! Two hosts and the link between them, in virtual time.
//!
//! One control stream each way and some streams for frames. Bytes of one stream arrive in order,
//! streams overtake one another as the seed has it. Nothing waits for real.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use super::hosts::{
    AdmittedFrame, DestinationHost, DestinationOutput, Ended, SourceHost, SourceOutput,
    WrittenFrame, framed,
};
use super::rng::Rng;
use super::sets::{MemorySet, MemoryStore};
use crate::delta::FileMeta;
use crate::digest::Digest;
use crate::session::{PageCounts, StoreJob};
use crate::wire::{BeginSet, Message, Published, SegmentAt};

/// No transfer of a test takes this long, unless it stands still.
const STALLED: Duration = Duration::from_secs(24 * 3600);

/// Who puts bytes on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The sending host.
    Source,
    /// The receiving host.
    Destination,
}

/// What a link is like, and how long things take on the hosts.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// For everything that is left to chance.
    pub seed: u64,
    /// One way.
    pub latency: Duration,
    /// Up to this much more for each packet.
    pub jitter: Duration,
    /// Bytes a second, of all streams together.
    pub bytes_per_s: u64,
    /// Streams for frames.
    pub streams: usize,
    /// Most bytes that arrive together.
    pub packet: usize,
    /// The link breaks when so many bytes have arrived, both ways together.
    pub cut_after: Option<u64>,
    /// Reading or writing one segment takes up to this long.
    pub work: Duration,
    /// Publishing takes this long.
    pub storing: Duration,
    /// Whether the source compresses.
    pub compress: bool,
    /// Largest set that the destination takes.
    pub max_set_bytes: Option<u64>,
    /// When somebody breaks the link, for transfers that may stand still.
    pub patience: Option<Duration>,
}

impl Conditions {
    /// A link of 100 Mb/s with 5 ms and much disorder.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            latency: Duration::from_millis(5),
            jitter: Duration::from_millis(20),
            bytes_per_s: 12_500_000,
            streams: 3,
            packet: 20_000,
            cut_after: None,
            work: Duration::from_millis(10),
            storing: Duration::from_millis(50),
            compress: true,
            max_set_bytes: None,
            patience: None,
        }
    }
}

/// One message or frame with its stream, on its way onto the link.
#[derive(Debug)]
pub struct Unit {
    /// Who sends it.
    pub from: Side,
    /// Number of the stream; `None`: the control stream.
    pub stream: Option<usize>,
    /// As it stands there, a message behind its length.
    pub bytes: Vec<u8>,
}

impl Unit {
    /// The message, on a control stream.
    pub fn message(&self) -> Option<Message> {
        match self.stream {
            None => Message::decode(self.bytes.get(4..)?).ok(),
            Some(_) => None,
        }
    }

    /// Puts another message in its place.
    pub fn set_message(&mut self, message: &Message) {
        self.bytes = framed(message);
    }
}

/// Changes what one side says.
pub type Tamper<'a> = Box<dyn FnMut(&mut Unit) + 'a>;

/// What came of a transfer.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended for the source.
    pub source: Result<Vec<Published>, Ended>,
    /// How it ended for the destination.
    pub destination: Result<(), Ended>,
    /// What the destination has now.
    pub store: MemoryStore,
    /// Literal blocks that were put on streams.
    pub literals: Vec<Digest>,
    /// Literal blocks that were written at the destination.
    pub arrived: Vec<Digest>,
    /// How pages crossed.
    pub counts: PageCounts,
    /// Bytes that arrived, both ways together.
    pub delivered: u64,
    /// Virtual time.
    pub elapsed: Duration,
}

enum Event {
    Bytes(Side, Option<usize>, Vec<u8>),
    Left(Side),
    Scanned(SegmentAt),
    FrameSent,
    Prepared(BeginSet, Vec<FileMeta>),
    Write(Box<AdmittedFrame>),
    Written(WrittenFrame),
    Store(Box<StoreJob>),
}

/// The simulation of one transfer.
pub struct World<'a> {
    conditions: Conditions,
    rng: Rng,
    began: Instant,
    now: Instant,
    events: BTreeMap<u64, Event>,
    due: BinaryHeap<Reverse<(Instant, u64)>>,
    number: u64,
    link_free: [Instant; 2],
    // When the last byte of each stream arrives: what follows on it comes later.
    arrivals: BTreeMap<(Side, Option<usize>), Instant>,
    source: SourceHost,
    destination: DestinationHost,
    source_ended: Option<Result<Vec<Published>, Ended>>,
    destination_ended: Option<Result<(), Ended>>,
    tamper: Option<Tamper<'a>>,
    arrived: Vec<Digest>,
    delivered: u64,
}

impl std::fmt::Debug for World<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("conditions", &self.conditions)
            .finish_non_exhaustive()
    }
}

/// Sends `sets` to a destination that has `store`.
pub fn transfer(conditions: Conditions, sets: &[MemorySet], store: MemoryStore) -> Outcome {
    World::new(conditions, sets, store).run()
}

impl<'a> World<'a> {
    /// Both hosts, before the first byte.
    #[expect(
        clippy::disallowed_methods,
        reason = "only an origin; time is virtual from here"
    )]
    pub fn new(conditions: Conditions, sets: &[MemorySet], store: MemoryStore) -> Self {
        let now = Instant::now();
        Self {
            rng: Rng::new(conditions.seed),
            began: now,
            now,
            events: BTreeMap::new(),
            due: BinaryHeap::new(),
            number: 0,
            link_free: [now; 2],
            arrivals: BTreeMap::new(),
            source: SourceHost::new(sets.to_vec(), conditions.compress, now),
            destination: DestinationHost::new(
                store,
                conditions.streams,
                conditions.max_set_bytes,
                now,
            ),
            source_ended: None,
            destination_ended: None,
            tamper: None,
            arrived: Vec::new(),
            delivered: 0,
            conditions,
        }
    }

    /// With somebody in the link, or a liar at one end.
    #[must_use]
    pub fn with_tamper(mut self, tamper: impl FnMut(&mut Unit) + 'a) -> Self {
        self.tamper = Some(Box::new(tamper));
        self
    }

    /// Runs until both sides have ended.
    ///
    /// # Panics
    /// If the transfer stands still.
    pub fn run(mut self) -> Outcome {
        loop {
            self.drain();
            if self.source_ended.is_some() && self.destination_ended.is_some() {
                break;
            }
            self.step();
            let elapsed = self.now - self.began;
            assert!(elapsed < STALLED, "stalled, seed {}", self.conditions.seed);
            if self.conditions.patience.is_some_and(|most| elapsed > most) {
                self.cut();
            }
        }
        Outcome {
            source: self.source_ended.expect("it ended"),
            destination: self.destination_ended.expect("it ended"),
            counts: self.source.counts(),
            literals: self.source.literals,
            store: self.destination.into_store(),
            arrived: self.arrived,
            delivered: self.delivered,
            elapsed: self.now - self.began,
        }
    }

    // Whichever comes first: the next event or a side's time-out.
    fn step(&mut self) {
        let event = self.due.peek().map(|Reverse((at, _))| *at);
        let source = self
            .source_ended
            .is_none()
            .then(|| self.source.poll_timeout());
        let destination = self.destination_ended.is_none();
        let destination = destination.then(|| self.destination.poll_timeout());
        let first = [event, source, destination].into_iter().flatten().min();
        let first = first.expect("a side that has not ended waits for something");
        self.now = self.now.max(first);
        if event == Some(first) {
            let Some(Reverse((_, number))) = self.due.pop() else {
                return;
            };
            let event = self.events.remove(&number).expect("what is due is there");
            self.happen(event);
        } else if source == Some(first) {
            let ended = self.source.handle_timeout(self.now);
            self.source_result(ended.map_err(Ended::from));
        } else {
            let ended = self.destination.handle_timeout(self.now);
            self.destination_result(ended.map_err(Ended::from));
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Bytes(from, stream, bytes) => self.deliver(from, stream, bytes),
            Event::Left(Side::Destination) => self.source_result(Err(Ended::Left)),
            Event::Left(Side::Source) if self.destination.is_idle() => {
                self.destination_ended.get_or_insert(Ok(()));
            }
            Event::Left(Side::Source) => self.destination_result(Err(Ended::Left)),
            Event::Scanned(at) if self.source_ended.is_none() => {
                let done = self.source.scanned(self.now, at);
                self.source_result(done.map_err(Ended::from));
            }
            Event::FrameSent if self.source_ended.is_none() => {
                let done = self.source.frame_sent(self.now);
                self.source_result(done.map_err(Ended::from));
            }
            Event::Scanned(_) | Event::FrameSent => {}
            event if self.destination_ended.is_none() => {
                let done = self.work(event);
                self.destination_result(done);
            }
            _ => {}
        }
    }

    fn work(&mut self, event: Event) -> Result<(), Ended> {
        match event {
            Event::Prepared(begin, files) => self.destination.prepared(&begin, files),
            Event::Write(frame) => {
                let written = self.destination.write(frame)?;
                self.arrived.extend(written.digests());
                let after = self.some(self.conditions.work);
                self.after(after, Event::Written(written));
            }
            Event::Written(written) => self.destination.written(self.now, &written)?,
            Event::Store(job) => self.destination.publish(&job).map_err(Ended::Store)?,
            _ => unreachable!("not the destination's work"),
        }
        Ok(())
    }

    fn deliver(&mut self, from: Side, stream: Option<usize>, mut bytes: Vec<u8>) {
        let left = self.conditions.cut_after.map(|cut| cut - self.delivered);
        let is_cut = left.is_some_and(|left| bytes.len() as u64 >= left);
        if let Some(left) = left.filter(|_| is_cut) {
            bytes.truncate(super::sets::size(left));
        }
        self.delivered += bytes.len() as u64;
        match (from, stream) {
            (Side::Destination, _) if self.source_ended.is_none() => {
                let done = self.source.handle_control(self.now, &bytes);
                self.source_result(done.map_err(Ended::from));
            }
            (Side::Source, _) if self.destination_ended.is_none() => {
                let done = match stream {
                    None => self.destination.handle_control(self.now, &bytes),
                    Some(stream) => self.destination.handle_stream(stream, &bytes),
                };
                self.destination_result(done.map_err(Ended::from));
            }
            _ => {}
        }
        if is_cut {
            self.cut();
        }
    }

    fn cut(&mut self) {
        // What a side had already been told to do last may still have ended it well.
        self.drain();
        self.source_ended.get_or_insert(Err(Ended::Cut));
        let idle = self.destination.is_idle();
        self.destination_ended
            .get_or_insert(if idle { Ok(()) } else { Err(Ended::Cut) });
    }

    fn drain(&mut self) {
        while self.source_ended.is_none()
            && let Some(output) = self.source.poll()
        {
            self.do_for_source(output);
        }
        while self.destination_ended.is_none() {
            match self.destination.poll() {
                Ok(Some(output)) => self.do_for_destination(output),
                Ok(None) => break,
                Err(error) => self.destination_result(Err(error.into())),
            }
        }
    }

    fn do_for_source(&mut self, output: SourceOutput) {
        match output {
            SourceOutput::Control(bytes) => {
                self.put(Side::Source, None, bytes);
            }
            SourceOutput::Frame(bytes) => {
                let stream = self.rng.index(self.conditions.streams);
                let sent = self.put(Side::Source, Some(stream), bytes);
                self.at(sent, Event::FrameSent);
            }
            SourceOutput::Scan(at) => {
                let after = self.some(self.conditions.work);
                self.after(after, Event::Scanned(at));
            }
            SourceOutput::Finished(published) => {
                self.source_ended = Some(Ok(published));
                self.leave(Side::Source);
            }
        }
    }

    fn do_for_destination(&mut self, output: DestinationOutput) {
        let work = self.some(self.conditions.work);
        match output {
            DestinationOutput::Control(bytes) => {
                self.put(Side::Destination, None, bytes);
            }
            DestinationOutput::Prepare(begin, files) => {
                self.after(work, Event::Prepared(begin, files))
            }
            DestinationOutput::Write(frame) => self.after(work, Event::Write(frame)),
            DestinationOutput::Store(job) => {
                self.after(self.conditions.storing, Event::Store(job));
            }
        }
    }

    fn source_result(&mut self, result: Result<(), Ended>) {
        if let (Err(ended), None) = (result, &self.source_ended) {
            self.tell(Side::Source, &ended);
            self.source_ended = Some(Err(ended));
        }
    }

    fn destination_result(&mut self, result: Result<(), Ended>) {
        if let (Err(ended), None) = (result, &self.destination_ended) {
            self.tell(Side::Destination, &ended);
            self.destination_ended = Some(Err(ended));
        }
    }

    // As the drivers do: say why, then go.
    fn tell(&mut self, side: Side, ended: &Ended) {
        if let Ended::Session(error) = ended
            && let Some(failure) = error.to_failure()
        {
            self.put(side, None, framed(&Message::Failure(failure)));
        }
        self.leave(side);
    }

    fn leave(&mut self, side: Side) {
        let arrives = self.arrivals.get(&(side, None)).copied();
        let arrives = arrives.unwrap_or(self.now + self.conditions.latency);
        self.at(arrives, Event::Left(side));
    }

    // Cuts a unit into packets and returns when its last byte has left.
    fn put(&mut self, from: Side, stream: Option<usize>, bytes: Vec<u8>) -> Instant {
        let mut unit = Unit {
            from,
            stream,
            bytes,
        };
        if let Some(tamper) = &mut self.tamper {
            tamper(&mut unit);
        }
        let mut rest = unit.bytes.as_slice();
        let way = from as usize;
        while !rest.is_empty() {
            let len = 1 + self.rng.index(self.conditions.packet);
            let (packet, behind) = rest.split_at(len.min(rest.len()));
            rest = behind;
            let nanoseconds = packet.len() as u64 * 1_000_000_000 / self.conditions.bytes_per_s;
            self.link_free[way] =
                self.link_free[way].max(self.now) + Duration::from_nanos(nanoseconds);
            let jitter = self.some(self.conditions.jitter);
            let arrives = self.link_free[way] + self.conditions.latency + jitter;
            let last = self.arrivals.get(&(from, stream)).copied();
            let arrives = last.map_or(arrives, |last| arrives.max(last));
            self.arrivals.insert((from, stream), arrives);
            self.at(arrives, Event::Bytes(from, stream, packet.to_vec()));
        }
        self.link_free[way].max(self.now)
    }

    fn some(&mut self, most: Duration) -> Duration {
        let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX - 1);
        Duration::from_nanos(self.rng.below(most + 1))
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.at(self.now + delay, event);
    }

    fn at(&mut self, at: Instant, event: Event) {
        self.number += 1;
        self.due.push(Reverse((at, self.number)));
        self.events.insert(self.number, event);
    }
}
