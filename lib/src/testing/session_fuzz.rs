//! Operation lists against the session's state machines, with a model of what they may do.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::hosts::{
    AdmittedFrame, DestinationHost, DestinationOutput, SourceHost, SourceOutput, WrittenFrame,
    frame, framed, take_frame,
};
use super::sets::{MemorySet, MemoryStore};
use super::world::{Conditions, Side, Unit, World, transfer};
use crate::delta::{BlockRef, FileMeta, FileName, Manifest, SetName};
use crate::digest::Digest;
use crate::session::{SessionError, StoreJob};
use crate::wire::{
    BeginSet, BlockId, Codec, Failure, FailureCode, Hello, Layout, Message, Op, Published,
    SegmentAt, Welcome,
};

/// The fuzzer's bytes as small numbers; zeros behind their end.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        byte
    }

    fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    fn bytes(&mut self) -> &'a [u8] {
        let len = usize::from(self.byte()).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }

    // Mostly what exists, now and then what does not.
    fn at(&mut self) -> SegmentAt {
        let place = self.byte();
        SegmentAt {
            set: 1 + u32::from(place >> 6 & 1),
            file: u32::from(place & 3),
            segment: match place >> 4 & 3 {
                3 => u64::MAX,
                2 => 1,
                _ => 0,
            },
        }
    }
}

fn set(name: &str, first: u8) -> MemorySet {
    let page = |byte: u8| vec![byte; 4096];
    let pages = [page(first), page(0), page(2), page(2), page(3)].concat();
    let files = vec![
        ("core-1.img".to_owned(), b"hello".to_vec()),
        ("empty.img".to_owned(), Vec::new()),
        ("pages-1.img".to_owned(), pages),
    ];
    MemorySet::new(name, 4096, files)
}

fn store_with_a_set() -> MemoryStore {
    static STORE: OnceLock<MemoryStore> = OnceLock::new();
    let made = || {
        transfer(
            Conditions::new(1),
            &[set("other", 9)],
            MemoryStore::default(),
        )
        .store
    };
    STORE.get_or_init(made).clone()
}

/// Takes the first byte for which machine is attacked, the others for operations.
///
/// # Panics
/// When a machine lets something through that the model does not.
pub fn session(data: &[u8]) {
    let mut choices = Choices(data);
    match choices.below(3) {
        0 => Attacked::new(&mut choices).run(&mut choices),
        1 => Lied::new().run(&mut choices),
        _ => tampered(&mut choices),
    }
}

/// A destination whose source says anything.
struct Attacked {
    host: DestinationHost,
    set: MemorySet,
    now: Instant,
    work: Vec<Work>,
    published_before: usize,
    // What was said of the set that is on its way.
    begun: Option<BeginSet>,
    root: Option<Digest>,
}

enum Work {
    Prepare(BeginSet, Vec<FileMeta>),
    Write(Box<AdmittedFrame>),
    Written(WrittenFrame),
    Store(Box<StoreJob>),
}

impl Attacked {
    #[expect(clippy::disallowed_methods, reason = "only an origin of virtual time")]
    fn new(choices: &mut Choices<'_>) -> Self {
        let store = if choices.flag() {
            store_with_a_set()
        } else {
            MemoryStore::default()
        };
        let now = Instant::now();
        Self {
            published_before: store.published.len(),
            host: DestinationHost::new(store, 2, Some(1 << 30), now),
            set: set("1", 1),
            now,
            work: Vec::new(),
            begun: None,
            root: None,
        }
    }

    fn run(mut self, choices: &mut Choices<'_>) {
        for _ in 0..200 {
            if choices.is_empty() || self.operate(choices).is_err() {
                break;
            }
        }
        // Whatever came: what is published is what a root stood for (`MemoryStore` checks), one
        // set for each that was begun and ended.
        let published = self.host.store.published.len() - self.published_before;
        assert!(published <= 2, "{published} sets of at most two");
    }

    fn operate(&mut self, choices: &mut Choices<'_>) -> Result<(), SessionError> {
        match choices.below(8) {
            0 | 1 => {
                let message = self.message(choices);
                self.say(&message)?;
            }
            2 | 3 => {
                let bytes = self.frame(choices);
                self.host
                    .handle_stream(usize::from(choices.below(2)), &bytes)?;
            }
            4 | 5 => self.work(choices)?,
            6 => {
                self.now += Duration::from_secs(u64::from(choices.below(30)));
                self.host.handle_timeout(self.now)?;
            }
            _ => return self.noise(choices),
        }
        while let Some(output) = self.host.poll()? {
            match output {
                DestinationOutput::Control(_) => {}
                DestinationOutput::Prepare(begin, files) => {
                    self.work.push(Work::Prepare(begin, files))
                }
                DestinationOutput::Write(frame) => self.work.push(Work::Write(frame)),
                DestinationOutput::Store(job) => {
                    assert_eq!(self.root, Some(job.manifest.root()), "a root nobody stated");
                    assert_eq!(self.begun.as_ref(), Some(&job.begin), "another set");
                    self.work.push(Work::Store(job));
                }
            }
        }
        Ok(())
    }

    // The model does not know what these bytes say, so they are the last.
    fn noise(&mut self, choices: &mut Choices<'_>) -> Result<(), SessionError> {
        if choices.flag() {
            self.host.handle_stream(1, choices.bytes())?;
        } else {
            self.host.handle_control(self.now, choices.bytes())?;
        }
        while self.host.poll()?.is_some() {}
        Err(SessionError::Protocol("noise"))
    }

    fn say(&mut self, message: &Message) -> Result<(), SessionError> {
        match message {
            Message::BeginSet(begin) => self.begun = Some(begin.clone()),
            Message::EndSet { root, .. } => self.root = Some(*root),
            _ => {}
        }
        self.host.handle_control(self.now, &framed(message))
    }

    fn work(&mut self, choices: &mut Choices<'_>) -> Result<(), SessionError> {
        if self.work.is_empty() {
            return Ok(());
        }
        let index = usize::from(choices.byte()) % self.work.len();
        match self.work.swap_remove(index) {
            Work::Prepare(begin, files) => self.host.prepared(&begin, files),
            Work::Write(frame) => {
                let written = self.host.write(frame)?;
                self.work.push(Work::Written(written));
            }
            Work::Written(frame) => self.host.written(self.now, &frame)?,
            Work::Store(job) => {
                let stored = self.host.publish(&job);
                stored.map_err(|_| SessionError::Protocol("not stored"))?;
            }
        }
        Ok(())
    }

    fn manifest(&self) -> Manifest {
        let digests = file_digests(&self.set);
        let files = self.set.files.iter().map(|(meta, _)| meta.clone());
        Manifest {
            page_size: self.set.page_size,
            image_version: 2,
            parent: None,
            files: files.zip(digests).collect(),
        }
    }

    // True where the choices are zero, so that a list of few bytes comes far.
    fn message(&self, choices: &mut Choices<'_>) -> Message {
        let set = 1 + u32::from(choices.below(8) / 7);
        match choices.below(12) {
            0 => Message::Hello(Hello {
                versions: (1, 1),
                software: "fuzz".into(),
                ticket_proof: Some([1; 32]),
            }),
            1 => Message::QueryHeld(vec![Digest([1; 32]); usize::from(choices.below(3))]),
            2 => Message::BeginSet(self.begin(set, choices)),
            3 => Message::Files {
                set,
                files: self.files(choices),
            },
            4 => {
                let at = choices.at();
                let mut leaves = self.set.leaves();
                let leaves = leaves.get_mut(at.file as usize);
                let digests = leaves.map(std::mem::take).unwrap_or_default();
                Message::SegmentDigest(at, crate::digest::tree::segment_digest(&digests))
            }
            5 | 6 => {
                let at = choices.at();
                let leaves = self.set.leaves();
                let leaves = leaves.get(at.file as usize);
                let mut ids: Vec<_> = leaves.into_iter().flatten().map(BlockId::of).collect();
                match choices.below(8) {
                    6 => ids.push(BlockId([3; 16])),
                    7 => ids.reverse(),
                    _ => {}
                }
                Message::BlockIds(at, ids)
            }
            7 => {
                let mut digests = file_digests(&self.set);
                digests.truncate(3 - usize::from(choices.below(3)));
                Message::FileDigests { set, digests }
            }
            8 | 9 => Message::EndSet {
                set,
                root: self.manifest().root(),
                frames: u64::from(choices.below(5)),
            },
            10 => Message::Working,
            _ => Message::Failure(Failure::new(FailureCode::Cancelled, "fuzz")),
        }
    }

    fn begin(&self, set: u32, choices: &mut Choices<'_>) -> BeginSet {
        let odd = choices.byte();
        let total: u64 = self.set.files.iter().map(|(meta, _)| meta.size).sum();
        BeginSet {
            set,
            name: SetName::new("1").expect("a good name"),
            ancestor: odd & 1 == 1,
            page_size: self.set.page_size,
            image_version: 2,
            file_count: 3 + u32::from(odd >> 7),
            total_bytes: if odd & 2 == 2 { 1 << 29 } else { total },
            parent: (odd & 12 == 12).then(|| (self.manifest().root(), "../0".into())),
            base_name: None,
            root: (odd & 16 == 16).then(|| self.manifest().root()),
        }
    }

    fn files(&self, choices: &mut Choices<'_>) -> Vec<FileMeta> {
        let mut files: Vec<_> = self
            .set
            .files
            .iter()
            .map(|(meta, _)| meta.clone())
            .collect();
        match choices.below(10) {
            7 => files[2].size = (1 << 29) - 5,
            8 => files.swap(0, 2),
            9 => files[0].name = FileName::new("pages-0.img").expect("a good name"),
            _ => {}
        }
        files
    }

    fn frame(&self, choices: &mut Choices<'_>) -> Vec<u8> {
        let at = choices.at();
        let (mut ops, mut raw) = (Vec::new(), Vec::new());
        for _ in 0..=choices.below(4) {
            let blocks = 1 + u32::from(choices.below(6));
            match choices.below(5) {
                0 | 1 => {
                    let from = u64::from(choices.below(5));
                    let bytes = match self.set.files.get(at.file as usize) {
                        Some((meta, _)) if !meta.is_pages() => self.set.files[0].1.as_slice(),
                        _ => {
                            let end = (from + u64::from(blocks)).min(5);
                            self.set.bytes(2, from.min(end)..end)
                        }
                    };
                    ops.push(Op::Literal(blocks));
                    raw.extend_from_slice(bytes);
                }
                2 => ops.push(Op::Zero(blocks)),
                3 => {
                    let file = u32::from(choices.below(4));
                    let block = u64::from(choices.below(6));
                    ops.push(Op::Same(blocks, BlockRef { file, block }));
                }
                _ => ops.push(Op::Held(blocks)),
            }
        }
        frame(at, &ops, Codec::Raw, raw.len(), &raw)
    }
}

fn file_digests(set: &MemorySet) -> Vec<Digest> {
    let leaves = set.leaves();
    let files = set.files.iter().zip(&leaves);
    files
        .map(|((meta, _), leaves)| crate::delta::file_digest(meta, leaves))
        .collect()
}

/// A source whose destination says anything.
struct Lied {
    host: SourceHost,
    now: Instant,
    scans: Vec<SegmentAt>,
    frames: usize,
    eager: bool,
    // What was asked of each segment; for blocks that lack, how many.
    asked: HashMap<SegmentAt, Asked>,
    begun: u32,
    published: u32,
    expected: BTreeMap<SegmentAt, u32>,
    // Of the set that was begun last.
    ready: bool,
    ended: bool,
    finished: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Segment,
    Blocks,
}

impl Lied {
    #[expect(clippy::disallowed_methods, reason = "only an origin of virtual time")]
    fn new() -> Self {
        let now = Instant::now();
        let mut second = set("2", 7);
        second.parent_link = Some("../1".into());
        Self {
            host: SourceHost::new(vec![set("1", 1), second], false, now),
            now,
            scans: Vec::new(),
            frames: 0,
            eager: false,
            asked: HashMap::new(),
            begun: 0,
            published: 0,
            expected: BTreeMap::new(),
            ready: false,
            ended: false,
            finished: false,
        }
    }

    fn run(mut self, choices: &mut Choices<'_>) {
        self.drain();
        for _ in 0..200 {
            if choices.is_empty() || self.finished || self.operate(choices).is_err() {
                return;
            }
            self.drain();
        }
    }

    fn operate(&mut self, choices: &mut Choices<'_>) -> Result<(), SessionError> {
        match choices.below(8) {
            0..=3 => {
                let message = self.message(choices);
                self.host.handle_control(self.now, &framed(&message))?;
                self.allow(&message);
            }
            4 | 5 if !self.scans.is_empty() => {
                let at = self
                    .scans
                    .swap_remove(usize::from(choices.byte()) % self.scans.len());
                self.host.scanned(self.now, at)?;
            }
            4..=6 if self.frames > 0 => {
                self.frames -= 1;
                self.host.frame_sent(self.now)?;
            }
            4..=6 => {
                self.now += Duration::from_secs(u64::from(choices.below(30)));
                self.host.handle_timeout(self.now)?;
            }
            _ => {
                // The model does not know what these bytes say, so they are the last.
                self.host.handle_control(self.now, choices.bytes())?;
                while self.host.poll().is_some() {}
                return Err(SessionError::Protocol("noise"));
            }
        }
        Ok(())
    }

    fn message(&self, choices: &mut Choices<'_>) -> Message {
        let set = self.begun + u32::from(choices.below(8) / 7);
        match choices.below(10) {
            0 => Message::Welcome(Welcome {
                version: 1,
                software: "fuzz".into(),
                ticket_proof: Some([2; 32]),
                layout: Layout::Flat,
                max_set_bytes: None,
            }),
            1 => Message::Held(vec![choices.flag(); usize::from(1 + choices.below(3) / 2)]),
            2 => Message::SetReady {
                set,
                lacks_everything: choices.flag(),
            },
            3 | 4 => Message::SegmentState(self.at(choices), choices.flag()),
            5 | 6 => {
                let bits = choices.byte();
                let lacking = (0..8).map(|bit| bits >> bit & 1 == 1).collect();
                Message::Lacking(self.at(choices), lacking)
            }
            7 | 8 => Message::Published(Published {
                set,
                name: "1".into(),
                generation: 1,
                layout: Layout::Flat,
                base: None,
                completeness: "complete".into(),
                unchanged: false,
                notes: Vec::new(),
            }),
            _ => Message::Working,
        }
    }

    fn at(&self, choices: &mut Choices<'_>) -> SegmentAt {
        let at = choices.at();
        match at.set {
            1 => SegmentAt {
                set: self.begun,
                ..at
            },
            _ => at,
        }
    }

    // The machine took the message: the model must allow it.
    fn allow(&mut self, message: &Message) {
        match message {
            Message::SetReady {
                set,
                lacks_everything,
            } => {
                assert_eq!(*set, self.begun, "another set is ready");
                self.eager = *lacks_everything;
                self.ready = true;
            }
            Message::SegmentState(at, _) => {
                assert!(
                    self.asked.remove(at) == Some(Asked::Segment),
                    "not asked: {at:?}"
                );
            }
            Message::Lacking(at, lacking) => {
                assert!(
                    self.asked.remove(at) == Some(Asked::Blocks),
                    "not asked: {at:?}"
                );
                let count = lacking.iter().filter(|&&lacking| lacking).count();
                if count > 0 {
                    let count = u32::try_from(count).expect("few blocks");
                    self.expected.insert(*at, count);
                }
            }
            Message::Published(published) => {
                assert_eq!(published.set, self.begun, "another set is published");
                self.published += 1;
                assert_eq!(self.published, self.begun, "published before its end");
                // The first set is an ancestor: its root was named, and it may stand there.
                let was_there = self.begun == 1 && !self.ready;
                assert!(self.ended || was_there, "published before its end");
            }
            _ => {}
        }
    }

    fn drain(&mut self) {
        while let Some(output) = self.host.poll() {
            match output {
                SourceOutput::Control(bytes) => self.said(&bytes),
                SourceOutput::Scan(at) => self.scans.push(at),
                SourceOutput::Frame(mut bytes) => {
                    self.frames += 1;
                    self.sent(&mut bytes);
                }
                SourceOutput::Finished(published) => {
                    assert_eq!(published.len(), self.begun as usize);
                    assert_eq!(self.published, self.begun, "finished too early");
                    assert!(self.asked.is_empty() && self.scans.is_empty() && self.frames == 0);
                    self.finished = true;
                }
            }
        }
    }

    fn said(&mut self, bytes: &[u8]) {
        let message = Message::decode(&bytes[4..]).expect("what a source says can be read");
        match message {
            Message::BeginSet(begin) => {
                self.begun += 1;
                assert_eq!(begin.set, self.begun);
                (self.ready, self.ended) = (false, false);
            }
            Message::SegmentDigest(at, _) => {
                assert!(self.asked.insert(at, Asked::Segment).is_none());
            }
            Message::BlockIds(at, _) => assert!(self.asked.insert(at, Asked::Blocks).is_none()),
            Message::EndSet { set, .. } => {
                assert_eq!(set, self.begun);
                assert!(self.asked.is_empty() && self.scans.is_empty() && self.frames == 0);
                assert!(self.expected.is_empty(), "ended without what was asked for");
                self.ended = true;
            }
            _ => {}
        }
    }

    fn sent(&mut self, bytes: &mut Vec<u8>) {
        let frame = take_frame(bytes).expect("what a source sends can be read");
        let (header, ops, _) = frame.expect("frames are put whole");
        let at = SegmentAt {
            set: header.set,
            file: header.file,
            segment: header.segment,
        };
        let literal = ops.iter().filter(|op| matches!(op, Op::Literal(_)));
        let literal: u32 = literal.map(Op::blocks).sum();
        if !self.eager {
            // Taken out: the same segment a second time is a panic.
            assert_eq!(
                self.expected.remove(&at),
                Some(literal),
                "not as asked: {at:?}"
            );
        }
    }
}

/// Two honest hosts with somebody in the link.
fn tampered(choices: &mut Choices<'_>) {
    let store = if choices.flag() {
        store_with_a_set()
    } else {
        MemoryStore::default()
    };
    let from_source = choices.flag();
    let conditions = Conditions {
        patience: Some(Duration::from_secs(300)),
        compress: choices.flag(),
        ..Conditions::new(u64::from(choices.byte()))
    };
    let sets = [set("1", 1)];
    let world = World::new(conditions, &sets, store);
    let tampered = world.with_tamper(|unit| {
        if (unit.from == Side::Source) == from_source && !choices.is_empty() {
            change(unit, choices);
        }
    });
    let outcome = tampered.run();
    for published in outcome.store.published {
        let is_right = published.name == "other" || published.files == sets[0].files;
        assert!(is_right, "published other bytes");
    }
}

fn change(unit: &mut Unit, choices: &mut Choices<'_>) {
    let kind = choices.byte();
    if unit.bytes.is_empty() {
        return;
    }
    let at = usize::from(choices.byte()) % unit.bytes.len();
    match kind {
        0..=2 => unit.bytes[at] = choices.byte(),
        3 => unit.bytes.truncate(at),
        4 => unit.bytes.extend_from_within(..),
        5 => {
            unit.bytes.splice(at..at, choices.bytes().iter().copied());
        }
        6 => {
            unit.bytes.remove(at);
        }
        _ => {}
    }
}

/// Operations that lead honest sessions to their end: seeds of the corpus.
pub fn session_seeds() -> Vec<(&'static str, Vec<u8>)> {
    // Hello, QueryHeld, BeginSet, Files, then the destination makes room.
    let opening: &[u8] = &[0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 4, 0];
    let core: &[u8] = &[2, 0, 0, 0, 0, 0, 0];
    let pages: &[u8] = &[2, 2, 0, 4, 0, 0, 0];
    // Written and reported.
    let work: &[u8] = &[4, 0, 4, 0];
    let end = |frames| vec![0, 0, 7, 0, 0, 0, 8, frames, 4, 0];
    let ids: &[u8] = &[0, 0, 5, 0, 0, 0, 0, 5, 2, 0];
    let changed_page: &[u8] = &[2, 2, 1, 0, 0, 0, 3, 4, 0];
    let attacked_eager = [&[0, 0], opening, core, pages, work, work, &end(2)].concat();
    let attacked_asking = [&[0, 1], opening, ids, changed_page, work, &end(1)].concat();

    // Welcome, Held.
    let welcome: &[u8] = &[1, 0, 0, 0, 0, 0, 1, 0, 0];
    let ready = |eager| vec![0, 0, 2, eager];
    let (scans, frames): (&[u8], &[u8]) = (&[4, 0, 4, 0], &[6, 6]);
    let published: &[u8] = &[0, 0, 7];
    let answers: &[u8] = &[0, 0, 5, 1, 0, 0, 0, 3, 2, 0, 0, 0, 5, 31, 2];
    let lied = |eager, answers: &[u8]| {
        let first = [welcome, &ready(eager), answers, frames, published].concat();
        [&first, &ready(eager), scans, answers, frames, published].concat()
    };
    vec![
        ("attacked-eager", attacked_eager),
        ("attacked-asking", attacked_asking),
        ("lied-eager", lied(1, &[])),
        ("lied-asking", lied(0, answers)),
        (
            "tampered-source",
            vec![2, 1, 1, 1, 7, 9, 0, 9, 0, 9, 0, 0, 12, 0x80],
        ),
        (
            "tampered-destination",
            vec![2, 1, 0, 1, 7, 9, 0, 9, 0, 9, 0, 0, 12, 0x80],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without this a fuzzer could run for hours against the first message.
    #[test]
    fn honest_operations_come_to_the_end() {
        for (name, operations) in session_seeds() {
            let mut choices = Choices(&operations[1..]);
            if name.starts_with("attacked") {
                let mut machine = Attacked::new(&mut choices);
                while !choices.is_empty() {
                    machine.operate(&mut choices).expect(name);
                }
                let published = machine.host.store.published.len();
                assert_eq!(published, machine.published_before + 1, "{name}");
            }
            if name.starts_with("lied") {
                let mut machine = Lied::new();
                machine.drain();
                while !choices.is_empty() {
                    machine.operate(&mut choices).expect(name);
                    machine.drain();
                }
                assert!(machine.finished, "{name}");
            }
        }
    }
}
