//! Reading blocks in a thread of its own, one ahead of whoever takes them, and with a time limit.
//!
//! A read of another process' memory can take for ever: a page on a swap device that hangs, a
//! file system in user space that never answers. Such a read cannot be interrupted. So it happens
//! in a thread that can be left behind; it ends when its read does.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::image::PagemapName;
use crate::page::PageSize;

/// Blocks under way at once: one is read while the one before is taken.
const AHEAD: usize = 2;

/// Pages of one block of one space, which are read together.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) space: PagemapName,
    pub(super) file: Arc<File>,
    /// Whole pages, ascending, all within one block.
    pub(super) pieces: Vec<Range<u64>>,
    /// Whether what lies behind the end of the file reads as zeros, up to the end of its page.
    pub(super) is_segment: bool,
}

impl Block {
    pub(super) fn bytes(&self) -> u64 {
        self.pieces
            .iter()
            .map(|piece| piece.end - piece.start)
            .sum()
    }
}

/// What came of a block.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The pages that could be read, one after another in `buffer`.
    Read {
        space: PagemapName,
        pieces: Vec<Range<u64>>,
        buffer: Vec<u8>,
        /// Pages that had gone.
        vanished: u64,
    },
    /// Nothing came within the time limit.
    Blocked(Block),
}

/// The reading thread and what it was asked for.
#[derive(Debug)]
pub(super) struct Blocks {
    page: PageSize,
    limit: Duration,
    thread: Option<Thread>,
    pending: VecDeque<Block>,
    buffers: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Thread {
    requests: SyncSender<(Block, Vec<u8>)>,
    answers: Receiver<Outcome>,
}

impl Blocks {
    pub(super) fn new(page: PageSize, limit: Duration) -> Self {
        Self {
            page,
            limit,
            thread: None,
            pending: VecDeque::new(),
            buffers: Vec::new(),
        }
    }

    /// Whether an outcome must be taken before the next block fits.
    pub(super) fn is_full(&self) -> bool {
        self.pending.len() >= AHEAD
    }

    /// Has `block` read.
    pub(super) fn submit(&mut self, block: Block) -> io::Result<()> {
        self.pending.push_back(block.clone());
        self.request(block)
    }

    /// Gives back a buffer that came with an outcome.
    pub(super) fn recycle(&mut self, buffer: Vec<u8>) {
        self.buffers.push(buffer);
    }

    /// The outcome of the oldest block, if there is one.
    pub(super) fn next(&mut self) -> io::Result<Option<Outcome>> {
        let Some(oldest) = self.pending.pop_front() else {
            return Ok(None);
        };
        let thread = self
            .thread
            .as_ref()
            .expect("a pending block has its thread");
        match thread.answers.recv_timeout(self.limit) {
            Ok(outcome) => return Ok(Some(outcome)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("the reading thread has ended"));
            }
        }
        // That thread is left to its read; the blocks behind go to a new one.
        self.thread = None;
        for block in self.pending.clone() {
            self.request(block)?;
        }
        Ok(Some(Outcome::Blocked(oldest)))
    }

    /// Forgets the blocks that are under way.
    pub(super) fn discard(&mut self) {
        if !self.pending.is_empty() {
            self.pending.clear();
            self.thread = None;
        }
    }

    fn request(&mut self, block: Block) -> io::Result<()> {
        if self.thread.is_none() {
            self.thread = Some(Thread::start(self.page)?);
        }
        let buffer = self.buffers.pop().unwrap_or_default();
        let thread = self.thread.as_ref().expect("started just now");
        thread
            .requests
            .send((block, buffer))
            .map_err(|_| io::Error::other("the reading thread has ended"))
    }
}

impl Thread {
    fn start(page: PageSize) -> io::Result<Self> {
        let (requests, asked) = sync_channel::<(Block, Vec<u8>)>(AHEAD);
        let (answer, answers) = sync_channel(AHEAD);
        thread::Builder::new()
            .name("live-read".to_owned())
            .spawn(move || {
                while let Ok((block, buffer)) = asked.recv() {
                    if answer.send(read(block, buffer, page)).is_err() {
                        break;
                    }
                }
            })?;
        Ok(Self { requests, answers })
    }
}

fn read(block: Block, mut buffer: Vec<u8>, page: PageSize) -> Outcome {
    let needed = usize::try_from(block.bytes()).expect("a block is small");
    if buffer.len() < needed {
        buffer.resize(needed, 0);
    }
    let mut read = Vec::with_capacity(block.pieces.len());
    let (mut filled, mut vanished) = (0, 0);
    for piece in &block.pieces {
        let mut at = piece.start;
        while at < piece.end {
            let length = usize::try_from(piece.end - at).expect("a block is small");
            let into = &mut buffer[filled..filled + length];
            let got = whole_pages(&block, at, into, page);
            if got == 0 {
                // One page that has gone hides those behind it.
                vanished += 1;
                at += page.bytes();
                continue;
            }
            push(&mut read, at..at + got as u64);
            filled += got;
            at += got as u64;
        }
    }
    Outcome::Read {
        space: block.space,
        pieces: read,
        buffer,
        vanished,
    }
}

/// Reads at `at` into `into`, and says how many bytes came, in whole pages.
fn whole_pages(block: &Block, at: u64, into: &mut [u8], page: PageSize) -> usize {
    let mut got = 0;
    while got < into.len() {
        match block.file.read_at(&mut into[got..], at + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let whole = got / page.byte_len() * page.byte_len();
    if whole < got && block.is_segment {
        // The file ends inside this page.
        let end = whole + page.byte_len();
        into[got..end].fill(0);
        return end;
    }
    whole
}

fn push(pieces: &mut Vec<Range<u64>>, piece: Range<u64>) {
    match pieces.last_mut() {
        Some(last) if last.end == piece.start => last.end = piece.end,
        _ => pieces.push(piece),
    }
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::single_range_in_vec_init,
        reason = "one piece is what is meant"
    )]

    use std::io::Write;
    use std::os::fd::OwnedFd;

    use super::*;

    fn block(file: File, pieces: Vec<Range<u64>>) -> Block {
        Block {
            space: PagemapName::Task(1),
            file: Arc::new(file),
            pieces,
            is_segment: true,
        }
    }

    #[test]
    fn the_page_in_which_a_segment_ends_is_padded_with_zeros() {
        let page = PageSize::new(4096).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let mut blocks = Blocks::new(page, Duration::from_secs(10));
        blocks.recycle(vec![9; 8192]);
        blocks.submit(block(file, vec![0..8192])).unwrap();
        let Some(Outcome::Read {
            pieces,
            buffer,
            vanished,
            ..
        }) = blocks.next().unwrap()
        else {
            panic!("nothing read");
        };
        assert_eq!((pieces, vanished), (vec![0..8192], 0));
        assert!(buffer[..5000].iter().all(|&byte| byte == 7));
        assert!(buffer[5000..8192].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn pages_behind_one_that_has_gone_are_still_read() {
        let page = PageSize::new(4096).unwrap();
        let me = File::open("/proc/self/mem").unwrap();
        let mut map = memmap2::MmapMut::map_anon(4096).unwrap();
        map.fill(3);
        let there = map.as_ptr().addr() as u64;
        let mut wanted = block(me, vec![0..8192, there..there + 4096]);
        wanted.is_segment = false;
        let Outcome::Read {
            pieces,
            buffer,
            vanished,
            ..
        } = read(wanted, Vec::new(), page)
        else {
            panic!("nothing read");
        };
        assert_eq!((pieces, vanished), (vec![there..there + 4096], 2));
        assert!(buffer[..4096].iter().all(|&byte| byte == 3));
    }

    /// A read that never returns must cost its limit, not the migration.
    #[test]
    fn a_read_that_blocks_is_given_up_and_the_next_one_still_comes() {
        let page = PageSize::new(4096).unwrap();
        let mut blocks = Blocks::new(page, Duration::from_millis(50));
        let (requests, _stuck) = sync_channel(AHEAD);
        let (_never, answers) = sync_channel(AHEAD);
        blocks.thread = Some(Thread { requests, answers });
        let file = || File::from(OwnedFd::from(tempfile::tempfile().unwrap()));
        blocks.submit(block(file(), vec![0..4096])).unwrap();
        blocks.submit(block(file(), vec![4096..8192])).unwrap();
        let blocked = blocks.next().unwrap();
        assert!(matches!(blocked, Some(Outcome::Blocked(block)) if block.pieces == [0..4096]));
        assert!(matches!(
            blocks.next().unwrap(),
            Some(Outcome::Read { vanished: 1, .. })
        ));
        assert!(blocks.next().unwrap().is_none());
    }
}
