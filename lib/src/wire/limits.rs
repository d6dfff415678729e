//! Every limit on what the peer states, in one place.

/// Bytes of one control message. The largest are lists of 16,384 file digests, 0.6 MB.
pub const CONTROL_MESSAGE: usize = 1 << 20;

/// Files in one set. A tree of 10,000 processes with 8 threads each has about 150,000 files.
pub const FILES: u32 = 1 << 18;

/// Files in one `Files` message.
pub const FILES_PER_MESSAGE: usize = 1024;

/// File digests in one `FileDigests` message.
pub const DIGESTS_PER_MESSAGE: usize = 16 << 10;

/// Blocks of one file: 4 TiB of 4 KiB pages.
pub const BLOCKS_PER_FILE: u64 = 1 << 30;

/// Bytes in one block: the largest page size.
pub const BLOCK_LEN: u32 = 2 << 20;

/// Smallest block. Anything less would make digests a noticeable part of what is sent.
pub const MIN_BLOCK_LEN: u32 = 4096;

/// Bytes of all files of one set.
pub const SET_BYTES: u64 = 1 << 46;

/// Ancestors in one chain: CRIU follows `parent` links without a limit of its own; chains of this
/// depth have been tried.
pub const CHAIN: usize = 1024;

/// Sets in one session: a chain and its last directory.
pub const SETS: u32 = 1 << 11;

/// Blocks in one segment: 1 MiB of the smallest blocks.
pub const SEGMENT_BLOCKS: usize = 256;

/// Runs of blocks that one frame describes: each block its own run at worst.
pub const FRAME_OPS: usize = SEGMENT_BLOCKS;

/// Bytes of literal blocks in one frame, before and after compression: one segment.
pub const FRAME_BYTES: u32 = 2 << 20;

/// Bytes (and up to three more, to end at a character) of a text for humans (a reason, a note, a link).
pub const TEXT: usize = 4096;

/// Bytes of a source's facts, and of a destination's checks.
pub const FACTS: usize = 512 << 10;

/// Resources from outside of the tree that CRIU is told of.
pub const EXTERNALS: usize = 256;

/// Phases and notes in a destination's last word.
pub const PHASES: usize = 64;

/// Runs of pages in one `Runs` note.
pub const RUNS_PER_NOTE: usize = 16 << 10;

/// Bytes of a note on the migration's stream.
pub const STREAM_NOTE: u32 = 1 << 20;

/// Memories and files of one migration.
pub const OBJECTS: u32 = 1 << 18;

/// Iterations of one migration.
pub const ITERATIONS: u32 = 1000;

/// Pages of an address space or segment: 64 bits of addresses in pages of 4 KiB.
pub const PAGES: u64 = 1 << 52;

/// Pages in one `PagesHeld` message: with a run for each they take less than 800 KiB.
pub const HELD_PAGES_PER_MESSAGE: usize = 16 << 10;

/// Pages that a destination may list: 1 TiB of 4 KiB pages.
pub const HELD_PAGES: u64 = 1 << 28;
