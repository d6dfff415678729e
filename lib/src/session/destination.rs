//! The destination's side of a session.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::time::Instant;

use super::{Liveness, SessionError};
use crate::delta::{FileMeta, Manifest, ParentRef, Place, Recipe};
use crate::digest::Digest;
use crate::ticket::equal_in_constant_time;
use crate::wire::{
    BeginSet, BlockId, FrameHeader, Hello, Layout, MIGRATION_VERSION, Message, MigrationId, Offer,
    Op, PAGES_VERSION, PagesOffer, PagesStep, Published, SegmentAt, Step, VERSIONS, Verdict,
    Welcome, limits,
};

/// What the destination says of itself and asks of the source.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// Name and version of the program.
    pub software: String,
    /// Proof of the ticket's secret, made for this connection.
    pub ticket_proof: Option<[u8; 32]>,
    /// The proof that the source must give; `None` between pinned peers.
    pub expected_proof: Option<[u8; 32]>,
    /// How sets are laid out.
    pub layout: Layout,
    /// Largest set that is taken, in bytes.
    pub max_set_bytes: Option<u64>,
}

/// A set that has arrived whole and is what the source said; it wants storing.
#[derive(Debug)]
pub struct StoreJob {
    /// How the source introduced it.
    pub begin: BeginSet,
    /// The whole set by digests.
    pub manifest: Manifest,
    /// Where each block is.
    pub recipe: Recipe,
}

/// What the driver has to do.
#[derive(Debug)]
pub enum DestinationCommand {
    /// Put this message on the control stream.
    Send(Message),
    /// Look sets up by their roots; answer with `handle_roots_found`.
    FindRoots(Vec<Digest>),
    /// Make room for a set; answer with `handle_prepared`, or with `handle_stored` if the set whose
    /// root it names stands there already.
    Prepare(BeginSet, Vec<FileMeta>),
    /// Look a whole segment up; answer with `handle_segment_found`.
    FindSegment(SegmentAt, Digest),
    /// Look blocks up; answer with `handle_blocks_found`.
    FindBlocks(SegmentAt, Vec<BlockId>),
    /// Store and publish; answer with `handle_stored`.
    Store(Box<StoreJob>),
    /// A live migration is offered: all further messages are for
    /// [`MigrationDestination`](super::migration::MigrationDestination).
    Migrate(Box<Offer>),
    /// Hand the connection to [`handover`](crate::handover): a source of a migration is back.
    Meet(MigrationId, Verdict),
    /// The memory of a dump is offered: all further messages are for
    /// [`PagesDestination`](super::pages::PagesDestination).
    TakePages(PagesOffer),
}

#[derive(Debug)]
enum State {
    AwaitHello,
    AwaitQuery,
    AwaitSet,
    AwaitFiles(BeginSet, Vec<FileMeta>),
    Preparing(BeginSet, Vec<FileMeta>),
    Receiving(Box<Receiving>),
    Storing(u32),
    // After an error: whatever comes now is out of order.
    Failed,
}

/// State machine of the receiving side. See the module for how to drive it.
#[derive(Debug)]
pub struct Destination {
    config: DestinationConfig,
    state: State,
    version: u32,
    last_set: u32,
    commands: VecDeque<DestinationCommand>,
    liveness: Liveness,
}

impl Destination {
    /// Waits for a source.
    pub fn new(config: DestinationConfig, now: Instant) -> Self {
        Self {
            config,
            state: State::AwaitHello,
            version: 0,
            last_set: 0,
            commands: VecDeque::new(),
            liveness: Liveness::new(now),
        }
    }

    /// What the driver has to do next.
    pub fn poll_command(&mut self) -> Option<DestinationCommand> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        self.liveness.next()
    }

    /// Whether the source may leave now: nothing is half done.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::AwaitSet)
    }

    /// The time that `poll_timeout` named has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.liveness.check(now)? {
            self.send(Message::Working);
        }
        Ok(())
    }

    /// A control message arrived.
    pub fn handle_message(&mut self, now: Instant, message: Message) -> Result<(), SessionError> {
        self.liveness.heard = now;
        match message {
            Message::Failure(failure) => return Err(SessionError::Peer(failure)),
            // Whoever has not shown a ticket yet must not keep a place by that.
            Message::Working if !matches!(self.state, State::AwaitHello) => return Ok(()),
            _ => {}
        }
        self.state = match (std::mem::replace(&mut self.state, State::Failed), message) {
            (State::AwaitHello, Message::Hello(hello)) => self.greeted(&hello)?,
            // Its key and the id, which nobody else knows, are its proof.
            (State::AwaitHello, Message::Migration(Step::Meet { id, verdict })) => {
                self.commands
                    .push_back(DestinationCommand::Meet(id, verdict));
                State::Failed
            }
            (State::AwaitQuery, Message::Migration(Step::Offer(offer)))
                if self.version >= MIGRATION_VERSION =>
            {
                self.commands.push_back(DestinationCommand::Migrate(offer));
                State::Failed
            }
            (State::AwaitQuery, Message::Pages(PagesStep::Offer(offer)))
                if self.version >= PAGES_VERSION =>
            {
                self.commands
                    .push_back(DestinationCommand::TakePages(offer));
                State::Failed
            }
            (State::AwaitQuery, Message::QueryHeld(roots)) => {
                self.commands
                    .push_back(DestinationCommand::FindRoots(roots));
                State::AwaitSet
            }
            (State::AwaitSet, Message::BeginSet(begin)) => self.begun(begin)?,
            (State::AwaitFiles(begin, files), Message::Files { set, files: more })
                if set == begin.set =>
            {
                self.told_files(begin, files, more)?
            }
            (State::Receiving(mut receiving), message) => {
                let ended = receiving.handle(message, &mut self.commands)?;
                self.receive_or_store(receiving, ended)?
            }
            _ => return Err(SessionError::Protocol("a message out of order")),
        };
        Ok(())
    }

    /// Which of the asked roots are held.
    pub fn handle_roots_found(&mut self, held: Vec<bool>) {
        self.send(Message::Held(held));
    }

    /// Room is made for the set. `lacks_everything`: nothing of this peer is held.
    pub fn handle_prepared(&mut self, lacks_everything: bool) {
        match std::mem::replace(&mut self.state, State::Failed) {
            State::Preparing(begin, files) => {
                self.send(Message::SetReady {
                    set: begin.set,
                    lacks_everything,
                });
                self.state = State::Receiving(Box::new(Receiving::new(begin, files)));
            }
            other => self.state = other,
        }
    }

    /// The segment that was looked for: digest and place of each block, or `None`.
    pub fn handle_segment_found(
        &mut self,
        at: SegmentAt,
        found: Option<Vec<(Digest, Place)>>,
    ) -> Result<(), SessionError> {
        let receiving = self.receiving(at.set)?;
        let held = found.is_some();
        if let Some(blocks) = found {
            receiving.recipe.set_held(at.file, at.segment, blocks)?;
        }
        self.send(Message::SegmentState(at, held));
        Ok(())
    }

    /// The blocks that were looked for, one entry for each of the ids.
    ///
    /// # Panics
    /// If `found` has another length than `ids`.
    pub fn handle_blocks_found(
        &mut self,
        at: SegmentAt,
        ids: &[BlockId],
        found: &[Option<(Digest, Place)>],
    ) -> Result<(), SessionError> {
        let receiving = self.receiving(at.set)?;
        let lacking = receiving.recipe.set_ids(at.file, at.segment, ids, found)?;
        self.send(Message::Lacking(at, lacking));
        Ok(())
    }

    /// Checks a frame's description before its bytes are looked at. Returns where in the file its
    /// literal blocks belong, as ranges of bytes in the order of the payload.
    pub fn admit_frame(
        &mut self,
        header: &FrameHeader,
        ops: &[Op],
    ) -> Result<Vec<Range<u64>>, SessionError> {
        let receiving = self.receiving(header.set)?;
        let count = receiving.recipe.blocks_of(header.file, header.segment)?;
        if ops.iter().map(|op| u64::from(op.blocks())).sum::<u64>() != count {
            return Err(SessionError::Protocol("a frame of the wrong length"));
        }
        // Two frames of one segment could overwrite what was checked.
        if !receiving.admitted.insert((header.file, header.segment)) {
            return Err(SessionError::Protocol("a frame that was sent before"));
        }
        receiving.check_frames()?;
        let file = receiving.recipe.file(header.file);
        let mut block = file.segment_range(header.segment).start;
        let mut ranges = Vec::new();
        for op in ops {
            let end = block + u64::from(op.blocks());
            if matches!(op, Op::Literal(_)) {
                ranges.push(file.bytes_of(&(block..end)));
            }
            block = end;
        }
        if ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum::<u64>()
            != u64::from(header.raw_len)
        {
            return Err(SessionError::Protocol("a frame of the wrong length"));
        }
        Ok(ranges)
    }

    /// The literal blocks of an admitted frame have been hashed and written.
    pub fn handle_frame(
        &mut self,
        now: Instant,
        header: &FrameHeader,
        ops: &[Op],
        digests: &[Digest],
    ) -> Result<(), SessionError> {
        self.liveness.heard = now;
        let receiving = self.receiving(header.set)?;
        receiving
            .recipe
            .set_frame(header.file, header.segment, ops, digests)?;
        receiving.frames += 1;
        let State::Receiving(receiving) = std::mem::replace(&mut self.state, State::Failed) else {
            unreachable!("checked above");
        };
        self.state = self.receive_or_store(receiving, None)?;
        Ok(())
    }

    /// The set is stored: visible, and durable where its place is.
    pub fn handle_stored(&mut self, published: Published) {
        let set = match &self.state {
            State::Storing(set) => *set,
            State::Preparing(begin, _) => begin.set,
            _ => return,
        };
        self.send(Message::Published(Published { set, ..published }));
        self.state = State::AwaitSet;
    }

    fn greeted(&mut self, hello: &Hello) -> Result<State, SessionError> {
        let (low, high) = hello.versions;
        let version = high.min(*VERSIONS.end());
        if version < low || !VERSIONS.contains(&version) {
            let ours = format!("{} to {}", VERSIONS.start(), VERSIONS.end());
            return Err(SessionError::Version {
                ours,
                theirs: format!("{low} to {high}"),
            });
        }
        if let Some(expected) = &self.config.expected_proof
            && !hello
                .ticket_proof
                .is_some_and(|given| equal_in_constant_time(given, *expected))
        {
            return Err(SessionError::Ticket);
        }
        self.version = version;
        self.send(Message::Welcome(Welcome {
            version,
            software: self.config.software.clone(),
            ticket_proof: self.config.ticket_proof,
            layout: self.config.layout,
            max_set_bytes: self.config.max_set_bytes,
        }));
        Ok(State::AwaitQuery)
    }

    fn begun(&mut self, begin: BeginSet) -> Result<State, SessionError> {
        if begin.set != self.last_set + 1 || begin.set > limits::SETS {
            return Err(SessionError::Protocol("a set out of order"));
        }
        if let Some(limit) = self
            .config
            .max_set_bytes
            .filter(|&limit| begin.total_bytes > limit)
        {
            return Err(SessionError::TooLarge {
                size: begin.total_bytes,
                limit,
            });
        }
        self.last_set = begin.set;
        Ok(State::AwaitFiles(begin, Vec::new()))
    }

    fn told_files(
        &mut self,
        begin: BeginSet,
        mut files: Vec<FileMeta>,
        more: Vec<FileMeta>,
    ) -> Result<State, SessionError> {
        for file in more {
            if files.last().is_some_and(|last| last.name >= file.name) {
                return Err(SessionError::Protocol("files out of order"));
            }
            if file.is_pages() && u64::from(file.block_len) != begin.page_size.bytes() {
                return Err(SessionError::Protocol(
                    "a file of pages that is not in pages",
                ));
            }
            files.push(file);
        }
        let expected = begin.file_count as usize;
        if files.len() > expected {
            return Err(SessionError::Protocol("more files than announced"));
        }
        if files.len() < expected {
            return Ok(State::AwaitFiles(begin, files));
        }
        let sizes = files
            .iter()
            .try_fold(0u64, |sum, file| sum.checked_add(file.size));
        if sizes != Some(begin.total_bytes) {
            return Err(SessionError::Protocol("another size than announced"));
        }
        self.commands
            .push_back(DestinationCommand::Prepare(begin.clone(), files.clone()));
        Ok(State::Preparing(begin, files))
    }

    fn receive_or_store(
        &mut self,
        receiving: Box<Receiving>,
        ended: Option<End>,
    ) -> Result<State, SessionError> {
        let mut receiving = receiving;
        receiving.end = receiving.end.take().or(ended);
        receiving.check_frames()?;
        match &receiving.end {
            Some(end) if receiving.frames == end.frames => {
                let set = receiving.begin.set;
                let job = receiving.finish()?;
                self.commands
                    .push_back(DestinationCommand::Store(Box::new(job)));
                Ok(State::Storing(set))
            }
            _ => Ok(State::Receiving(receiving)),
        }
    }

    fn receiving(&mut self, set: u32) -> Result<&mut Receiving, SessionError> {
        match &mut self.state {
            State::Receiving(receiving) if receiving.begin.set == set => Ok(receiving),
            _ => Err(SessionError::Protocol(
                "blocks of a set that is not being received",
            )),
        }
    }

    fn send(&mut self, message: Message) {
        self.commands.push_back(DestinationCommand::Send(message));
    }
}

/// What the last message of a set said.
#[derive(Debug)]
struct End {
    root: Digest,
    frames: u64,
}

/// The set that is arriving.
#[derive(Debug)]
struct Receiving {
    begin: BeginSet,
    recipe: Recipe,
    admitted: HashSet<(u32, u64)>,
    file_digests: Vec<Digest>,
    frames: u64,
    end: Option<End>,
}

impl Receiving {
    fn new(begin: BeginSet, files: Vec<FileMeta>) -> Self {
        Self {
            begin,
            recipe: Recipe::new(files),
            admitted: HashSet::new(),
            file_digests: Vec::new(),
            frames: 0,
            end: None,
        }
    }

    fn handle(
        &mut self,
        message: Message,
        commands: &mut VecDeque<DestinationCommand>,
    ) -> Result<Option<End>, SessionError> {
        match message {
            _ if self.end.is_some() => {
                return Err(SessionError::Protocol("a message after the end of its set"));
            }
            Message::SegmentDigest(at, digest) if at.set == self.begin.set => {
                self.recipe.blocks_of(at.file, at.segment)?;
                commands.push_back(DestinationCommand::FindSegment(at, digest));
            }
            Message::BlockIds(at, ids) if at.set == self.begin.set => {
                self.recipe.blocks_of(at.file, at.segment)?;
                commands.push_back(DestinationCommand::FindBlocks(at, ids));
            }
            Message::FileDigests { set, digests } if set == self.begin.set => {
                self.file_digests.extend(digests);
                if self.file_digests.len() > self.recipe.files().len() {
                    return Err(SessionError::Protocol("more digests than files"));
                }
            }
            Message::EndSet { set, root, frames } if set == self.begin.set => {
                return Ok(Some(End { root, frames }));
            }
            _ => return Err(SessionError::Protocol("a message out of order")),
        }
        Ok(None)
    }

    // A set must not be stored while a frame of it is still being written, so those that were
    // admitted count, not only those that are done.
    fn check_frames(&self) -> Result<(), SessionError> {
        match &self.end {
            Some(end) if self.admitted.len() as u64 > end.frames => {
                Err(SessionError::Protocol("more frames than announced"))
            }
            _ => Ok(()),
        }
    }

    fn finish(mut self: Box<Self>) -> Result<StoreJob, SessionError> {
        let end = self
            .end
            .take()
            .ok_or(SessionError::Protocol("a set without its end"))?;
        if self.file_digests.len() != self.recipe.files().len() {
            return Err(SessionError::Protocol("fewer digests than files"));
        }
        self.recipe.finish(&self.file_digests)?;
        let manifest = Manifest {
            page_size: self.begin.page_size,
            image_version: self.begin.image_version,
            parent: self
                .begin
                .parent
                .clone()
                .map(|(root, link)| ParentRef { root, link }),
            files: self
                .recipe
                .files()
                .cloned()
                .zip(self.file_digests)
                .collect(),
        };
        if manifest.root() != end.root {
            return Err(SessionError::Root);
        }
        Ok(StoreJob {
            begin: self.begin,
            manifest,
            recipe: self.recipe,
        })
    }
}
