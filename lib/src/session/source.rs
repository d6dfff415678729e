//! The source's side of a session.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use super::{Liveness, SessionError};
use crate::delta::{BlockRef, FileMeta, FirstSeen, Manifest, ParentRef, SetName, file_digest};
use crate::digest::{Digest, tree, zero_digest};
use crate::page::PageSize;
use crate::wire::{
    BeginSet, BlockId, Hello, Layout, MIGRATION_VERSION, Message, Op, Published, SegmentAt,
    VERSIONS, Welcome, limits,
};

/// Segments that are read and hashed at the same time: keeps up to four cores busy.
const SCANS_IN_FLIGHT: usize = 4;

/// Frames that wait for the streams: 8 MiB at most, enough to cover a scheduling hiccup.
const FRAMES_IN_FLIGHT: usize = 8;

/// Questions that wait for an answer. They cost a few bytes each; this many cover 2 GiB, so that a
/// long round trip does not slow hashing down.
const QUESTIONS_IN_FLIGHT: usize = 2048;

/// Up to this many blocks their ids are sent at once instead of the segment's digest: they cost
/// about as much and save a round trip.
const FEW_BLOCKS: u64 = 3;

/// What the source says of itself.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Name and version of the program.
    pub software: String,
    /// Proof of the ticket's secret, made for this connection.
    pub ticket_proof: Option<[u8; 32]>,
    /// The proof that the destination must give.
    pub expected_proof: Option<[u8; 32]>,
}

/// Digests of all blocks of each file, in the order of the files.
pub type SetLeaves = Vec<Vec<Digest>>;

/// One image directory to send.
#[derive(Clone, Debug)]
pub struct SetPlan {
    /// Its name at the destination.
    pub name: SetName,
    /// Page size of the host that dumped it.
    pub page_size: PageSize,
    /// `img_version` of its inventory, 0 where it has none.
    pub image_version: u32,
    /// Text of its `parent` link. The parent is the set before in the plan.
    pub parent_link: Option<String>,
    /// Its files in ascending order of name.
    pub files: Vec<FileMeta>,
    /// The received set to build on, where the operator names one.
    pub base_name: Option<SetName>,
    /// Digests where they are known; every set but the last needs them.
    pub leaves: Option<SetLeaves>,
}

impl SetPlan {
    /// The manifest of this set with these digests of its files' content.
    fn manifest(&self, parent: Option<Digest>, file_digests: Vec<Digest>) -> Manifest {
        let link = self.parent_link.clone().unwrap_or_default();
        Manifest {
            page_size: self.page_size,
            image_version: self.image_version,
            parent: parent.map(|root| ParentRef { root, link }),
            files: self.files.iter().cloned().zip(file_digests).collect(),
        }
    }

    fn root(&self, parent: Option<Digest>) -> Option<Digest> {
        let leaves = self.leaves.as_ref()?;
        let digests = self
            .files
            .iter()
            .zip(leaves)
            .map(|(file, leaves)| file_digest(file, leaves));
        Some(self.manifest(parent, digests.collect()).root())
    }
}

/// Pages of a set by how they crossed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// All pages in files of pages.
    pub total: u64,
    /// Pages of zero bytes.
    pub zero: u64,
    /// Pages that the destination had.
    pub known: u64,
    /// Pages that equal another of the same transfer.
    pub duplicate: u64,
    /// Pages that were sent.
    pub sent: u64,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceCommand {
    /// Put this message on the control stream.
    Send(Message),
    /// Read a segment and report the digests of its blocks with `handle_scanned`.
    Scan(SegmentAt),
    /// Put a frame on one of the other streams and report with `handle_frame_sent`.
    SendFrame(SegmentAt, Vec<Op>),
    /// Everything is published; close.
    Finish(Vec<Published>),
}

#[derive(Debug)]
enum State {
    AwaitWelcome,
    // So many answers are due.
    AwaitHeld(usize),
    AwaitReady,
    Sending,
    AwaitPublished,
    Done,
}

/// State machine of the sending side. See the module for how to drive it.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    plan: Vec<SetPlan>,
    // Root digests of the sets before the current one.
    parent: Option<Digest>,
    index: usize,
    number: u32,
    state: State,
    sending: Sending,
    published: Vec<Published>,
    leaves: SetLeaves,
    counts: PageCounts,
    layout: Layout,
    commands: VecDeque<SourceCommand>,
    liveness: Liveness,
}

impl Source {
    /// Starts a session that sends the sets of `plan`, each the parent of the next.
    ///
    /// # Panics
    /// If `plan` is empty, or a set other than the last has no digests.
    pub fn new(config: SourceConfig, plan: Vec<SetPlan>, now: Instant) -> Self {
        assert!(!plan.is_empty(), "a session sends at least one set");
        assert!(
            plan[..plan.len() - 1]
                .iter()
                .all(|set| set.leaves.is_some()),
            "ancestors are digested first"
        );
        let hello = Hello {
            versions: (*VERSIONS.start(), MIGRATION_VERSION),
            software: config.software.clone(),
            ticket_proof: config.ticket_proof,
        };
        Self {
            config,
            plan,
            parent: None,
            index: 0,
            number: 0,
            state: State::AwaitWelcome,
            sending: Sending::default(),
            published: Vec::new(),
            leaves: SetLeaves::new(),
            counts: PageCounts::default(),
            layout: Layout::Faithful,
            commands: VecDeque::from([SourceCommand::Send(Message::Hello(hello))]),
            liveness: Liveness::new(now),
        }
    }

    /// What the driver has to do next.
    pub fn poll_command(&mut self) -> Option<SourceCommand> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        self.liveness.next()
    }

    /// Pages by how they crossed, so far.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Whether what is scanned now will be sent without asking the destination.
    pub fn sends_unasked(&self) -> bool {
        self.sending.eager
    }

    /// Which set of the plan is being sent.
    pub fn set_index(&self) -> usize {
        self.index
    }

    /// The digests of the set that was ended last, once.
    pub fn take_leaves(&mut self) -> SetLeaves {
        std::mem::take(&mut self.leaves)
    }

    /// How the destination lays sets out; known after its first message.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The time that `poll_timeout` named has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.liveness.check(now)? {
            self.commands
                .push_back(SourceCommand::Send(Message::Working));
        }
        Ok(())
    }

    /// A control message arrived.
    pub fn handle_message(&mut self, now: Instant, message: Message) -> Result<(), SessionError> {
        self.liveness.heard = now;
        match (&self.state, message) {
            (_, Message::Failure(failure)) => Err(SessionError::Peer(failure)),
            (_, Message::Working) => Ok(()),
            (State::AwaitWelcome, Message::Welcome(welcome)) => self.welcomed(&welcome),
            (&State::AwaitHeld(asked), Message::Held(held)) => {
                if held.len() != asked {
                    return Err(SessionError::Protocol("an answer of the wrong length"));
                }
                self.told_held(now, &held)
            }
            (
                State::AwaitReady,
                Message::SetReady {
                    set,
                    lacks_everything,
                },
            ) if set == self.number => {
                self.state = State::Sending;
                self.sending.eager = lacks_everything;
                self.advance(now)
            }
            (State::Sending, Message::SegmentState(at, held)) => self.told_segment(now, at, held),
            (State::Sending, Message::Lacking(at, lacking)) => self.told_lacking(now, at, &lacking),
            // The set stands there already; only one whose root was named can.
            (State::AwaitReady, Message::Published(published))
                if published.set == self.number && self.plan[self.index].leaves.is_some() =>
            {
                self.parent = self.plan[self.index].root(self.parent);
                self.count_all_known();
                self.published.push(published);
                self.next_set(now)
            }
            (State::AwaitPublished, Message::Published(published))
                if published.set == self.number =>
            {
                self.published.push(published);
                self.next_set(now)
            }
            _ => Err(SessionError::Protocol("a message out of order")),
        }
    }

    /// A segment was read: the digests of its blocks.
    pub fn handle_scanned(
        &mut self,
        now: Instant,
        at: SegmentAt,
        digests: Vec<Digest>,
    ) -> Result<(), SessionError> {
        self.sending.scanning -= 1;
        self.describe(at, digests);
        self.advance(now)
    }

    /// A frame was handed to its stream.
    pub fn handle_frame_sent(&mut self, now: Instant) -> Result<(), SessionError> {
        self.liveness.said = now;
        self.sending.frames_in_flight -= 1;
        self.advance(now)
    }

    fn welcomed(&mut self, welcome: &Welcome) -> Result<(), SessionError> {
        if !(*VERSIONS.start()..=MIGRATION_VERSION).contains(&welcome.version) {
            let ours = format!("{} to {MIGRATION_VERSION}", VERSIONS.start());
            return Err(SessionError::Version {
                ours,
                theirs: welcome.version.to_string(),
            });
        }
        if self.config.expected_proof.is_some()
            && welcome.ticket_proof != self.config.expected_proof
        {
            return Err(SessionError::Ticket);
        }
        self.layout = welcome.layout;
        let mut parent = None;
        let mut roots = Vec::new();
        for set in &self.plan {
            let Some(root) = set.root(parent) else { break };
            roots.push(root);
            parent = Some(root);
        }
        self.state = State::AwaitHeld(roots.len());
        self.send(Message::QueryHeld(roots));
        Ok(())
    }

    // Sets below the newest one that the destination holds need not be sent. The last set is sent
    // all the same: it may be wanted under another name; it costs nothing where it is held.
    fn told_held(&mut self, now: Instant, held: &[bool]) -> Result<(), SessionError> {
        let ancestors = self.plan.len() - 1;
        let newest = held.iter().take(ancestors).rposition(|&held| held);
        self.index = newest.map_or(0, |newest| newest + 1);
        for set in &self.plan[..self.index] {
            self.parent = set.root(self.parent);
        }
        self.begin_set(now);
        Ok(())
    }

    fn begin_set(&mut self, now: Instant) {
        self.number += 1;
        let set = &self.plan[self.index];
        let begin = BeginSet {
            set: self.number,
            name: set.name.clone(),
            ancestor: self.index + 1 < self.plan.len(),
            page_size: set.page_size,
            image_version: set.image_version,
            file_count: u32::try_from(set.files.len())
                .expect("files are limited where they are listed"),
            total_bytes: set.files.iter().map(|file| file.size).sum(),
            parent: self
                .parent
                .map(|root| (root, set.parent_link.clone().unwrap_or_default())),
            base_name: set.base_name.clone(),
            root: set.root(self.parent),
        };
        let mut messages = vec![Message::BeginSet(begin)];
        for files in set.files.chunks(limits::FILES_PER_MESSAGE) {
            messages.push(Message::Files {
                set: self.number,
                files: files.to_vec(),
            });
        }
        self.sending = Sending::new(set);
        self.state = State::AwaitReady;
        messages.into_iter().for_each(|message| self.send(message));
        self.liveness.said = now;
    }

    fn next_set(&mut self, now: Instant) -> Result<(), SessionError> {
        self.index += 1;
        if self.index == self.plan.len() {
            self.state = State::Done;
            self.commands
                .push_back(SourceCommand::Finish(std::mem::take(&mut self.published)));
        } else {
            self.begin_set(now);
        }
        Ok(())
    }

    // Starts what the limits allow, and ends the set when nothing is left to do.
    fn advance(&mut self, now: Instant) -> Result<(), SessionError> {
        if !matches!(self.state, State::Sending) {
            return Ok(());
        }
        while let Some(at) = self
            .sending
            .next_segment(&self.plan[self.index].files, self.number)
        {
            let known = self.plan[self.index].leaves.as_ref().map(|leaves| {
                let range = self.plan[self.index].files[at.file as usize].segment_range(at.segment);
                let fits = |block: u64| usize::try_from(block).expect("blocks are limited");
                leaves[at.file as usize][fits(range.start)..fits(range.end)].to_vec()
            });
            match known {
                Some(digests) => self.describe(at, digests),
                None => {
                    self.sending.scanning += 1;
                    self.commands.push_back(SourceCommand::Scan(at));
                }
            }
        }
        if self.sending.is_complete() {
            self.end_set(now);
        }
        Ok(())
    }

    // A segment's digests are known: say them, or send its blocks at once.
    fn describe(&mut self, at: SegmentAt, digests: Vec<Digest>) {
        let file = &self.plan[self.index].files[at.file as usize];
        self.sending.put(at, digests);
        if file.is_pages() {
            let range = file.segment_range(at.segment);
            self.counts.total += range.end - range.start;
        }
        if self.sending.eager {
            let ops = self.sending.eager_ops(file, at);
            self.count_ops(at, &ops);
            self.send_frame(at, ops);
        } else if file.segment_range(at.segment).count() as u64 <= FEW_BLOCKS {
            self.send_ids(at);
        } else {
            let digest = tree::segment_digest(self.sending.digests(at));
            self.sending.asked.insert(at, Question::Segment);
            self.send(Message::SegmentDigest(at, digest));
        }
    }

    fn send_ids(&mut self, at: SegmentAt) {
        let ids = self.sending.digests(at).iter().map(BlockId::of).collect();
        self.sending.asked.insert(at, Question::Blocks);
        self.send(Message::BlockIds(at, ids));
    }

    fn told_segment(
        &mut self,
        now: Instant,
        at: SegmentAt,
        held: bool,
    ) -> Result<(), SessionError> {
        self.answered(at, Question::Segment)?;
        if held {
            let count = self.sending.digests(at).len();
            self.count_lacking(at, &vec![false; count]);
        } else {
            self.send_ids(at);
        }
        self.advance(now)
    }

    fn told_lacking(
        &mut self,
        now: Instant,
        at: SegmentAt,
        lacking: &[bool],
    ) -> Result<(), SessionError> {
        self.answered(at, Question::Blocks)?;
        let count = self.sending.digests(at).len();
        // On the wire there are whole bytes; the bits behind the last block mean nothing.
        let is_whole = (count..=count.next_multiple_of(8)).contains(&lacking.len());
        if !is_whole || lacking[count..].contains(&true) {
            return Err(SessionError::Protocol("an answer of the wrong length"));
        }
        let lacking = &lacking[..count];
        self.count_lacking(at, lacking);
        if lacking.contains(&true) {
            let mut ops = Vec::new();
            lacking.iter().for_each(|&lacking| {
                Op::push(&mut ops, if lacking { Op::Literal(1) } else { Op::Held(1) });
            });
            self.send_frame(at, ops);
        }
        self.advance(now)
    }

    fn answered(&mut self, at: SegmentAt, question: Question) -> Result<(), SessionError> {
        match self.sending.asked.remove(&at) {
            Some(asked) if asked == question => Ok(()),
            _ => Err(SessionError::Protocol("an answer to nothing")),
        }
    }

    fn send_frame(&mut self, at: SegmentAt, ops: Vec<Op>) {
        self.sending.frames_in_flight += 1;
        self.sending.frames += 1;
        self.commands.push_back(SourceCommand::SendFrame(at, ops));
    }

    fn end_set(&mut self, now: Instant) {
        let set = &self.plan[self.index];
        let digests: Vec<_> = set
            .files
            .iter()
            .zip(&self.sending.segments)
            .map(|(file, segments)| segments_digest(file, segments))
            .collect();
        let root = set.manifest(self.parent, digests.clone()).root();
        self.parent = Some(root);
        for digests in digests.chunks(limits::DIGESTS_PER_MESSAGE) {
            self.send(Message::FileDigests {
                set: self.number,
                digests: digests.to_vec(),
            });
        }
        self.send(Message::EndSet {
            set: self.number,
            root,
            frames: self.sending.frames,
        });
        self.state = State::AwaitPublished;
        let segments = std::mem::take(&mut self.sending).segments;
        self.leaves = segments
            .into_iter()
            .map(|file| file.into_iter().flatten().collect())
            .collect();
        self.liveness.said = now;
    }

    fn send(&mut self, message: Message) {
        self.commands.push_back(SourceCommand::Send(message));
    }

    fn count_all_known(&mut self) {
        let files = self.plan[self.index].files.iter();
        let pages = files
            .filter(|file| file.is_pages())
            .map(FileMeta::blocks)
            .sum::<u64>();
        self.counts.total += pages;
        self.counts.known += pages;
    }

    fn count_ops(&mut self, at: SegmentAt, ops: &[Op]) {
        if !self.plan[self.index].files[at.file as usize].is_pages() {
            return;
        }
        for op in ops {
            let count = u64::from(op.blocks());
            match op {
                Op::Literal(_) => self.counts.sent += count,
                Op::Zero(_) => self.counts.zero += count,
                Op::Same(..) => self.counts.duplicate += count,
                Op::Held(_) => self.counts.known += count,
            }
        }
    }

    fn count_lacking(&mut self, at: SegmentAt, lacking: &[bool]) {
        let file = &self.plan[self.index].files[at.file as usize];
        if !file.is_pages() {
            return;
        }
        let zero = zero_digest(file.block_len as usize);
        for (digest, &lacking) in self.sending.digests(at).iter().zip(lacking) {
            match lacking {
                true => self.counts.sent += 1,
                false if *digest == zero => self.counts.zero += 1,
                false => self.counts.known += 1,
            }
        }
    }
}

fn segments_digest(file: &FileMeta, segments: &[Vec<Digest>]) -> Digest {
    let digests: Vec<_> = segments
        .iter()
        .map(|leaves| tree::segment_digest(leaves))
        .collect();
    tree::file_digest(file.size, u64::from(file.block_len), &digests)
}

/// What the destination was asked about a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// Whether it holds all of it.
    Segment,
    /// Which blocks it lacks.
    Blocks,
}

/// What is known and under way of the set that is being sent.
#[derive(Debug, Default)]
struct Sending {
    eager: bool,
    file: u32,
    segment: u64,
    all_started: bool,
    scanning: usize,
    asked: HashMap<SegmentAt, Question>,
    frames_in_flight: usize,
    frames: u64,
    // Per file, per segment: digests of the blocks. Empty: not scanned yet.
    segments: Vec<Vec<Vec<Digest>>>,
    segment_blocks: Vec<u64>,
    first_seen: FirstSeen,
}

impl Sending {
    fn new(set: &SetPlan) -> Self {
        let segments = set
            .files
            .iter()
            .map(|file| {
                vec![Vec::new(); usize::try_from(file.segments()).expect("segments are limited")]
            })
            .collect();
        let segment_blocks = set.files.iter().map(FileMeta::segment_blocks).collect();
        Self {
            segments,
            segment_blocks,
            ..Self::default()
        }
    }

    fn next_segment(&mut self, files: &[FileMeta], set: u32) -> Option<SegmentAt> {
        let busy = self.scanning >= SCANS_IN_FLIGHT
            || self.frames_in_flight >= FRAMES_IN_FLIGHT
            || self.asked.len() >= QUESTIONS_IN_FLIGHT
            // In eager mode every scan becomes a frame.
            || self.eager && self.scanning + self.frames_in_flight >= FRAMES_IN_FLIGHT;
        if busy {
            return None;
        }
        while let Some(file) = files.get(self.file as usize) {
            if self.segment < file.segments() {
                self.segment += 1;
                return Some(SegmentAt {
                    set,
                    file: self.file,
                    segment: self.segment - 1,
                });
            }
            self.file += 1;
            self.segment = 0;
        }
        self.all_started = true;
        None
    }

    fn is_complete(&self) -> bool {
        self.all_started
            && self.scanning == 0
            && self.asked.is_empty()
            && self.frames_in_flight == 0
    }

    fn put(&mut self, at: SegmentAt, digests: Vec<Digest>) {
        self.segments[at.file as usize]
            [usize::try_from(at.segment).expect("segments are limited")] = digests;
    }

    fn digests(&self, at: SegmentAt) -> &[Digest] {
        &self.segments[at.file as usize][usize::try_from(at.segment).expect("segments are limited")]
    }

    // Nothing is held over there: zero blocks and repetitions are named, all else is sent.
    fn eager_ops(&mut self, file: &FileMeta, at: SegmentAt) -> Vec<Op> {
        let Self {
            segments,
            segment_blocks,
            first_seen,
            ..
        } = self;
        let id_of = |at: BlockRef| {
            let per_segment = segment_blocks[at.file as usize];
            let fits = |value: u64| usize::try_from(value).expect("blocks are limited");
            BlockId::of(
                &segments[at.file as usize][fits(at.block / per_segment)]
                    [fits(at.block % per_segment)],
            )
        };
        let mut ops = Vec::new();
        for block in file.segment_range(at.segment) {
            let here = BlockRef {
                file: at.file,
                block,
            };
            let id = id_of(here);
            let op = if id == BlockId::of(&zero_digest(file.block_bytes(block))) {
                Op::Zero(1)
            } else {
                first_seen
                    .note(id, here, id_of)
                    .map_or(Op::Literal(1), |earlier| Op::Same(1, earlier))
            };
            Op::push(&mut ops, op);
        }
        ops
    }
}
