//! The fixed header in front of everything that CRIU sends to a page server.
//!
//! ```text
//!            0     4        8         16        24        32
//!  to 4.1    │ cmd │ nr     │ vaddr   │ dst_id  │
//!  since 4.2 │ cmd │ (junk) │ nr      │ vaddr   │ dst_id  │
//! ```
//!
//! A C structure as it lies in CRIU's memory: in this host's byte order, and with whatever was on
//! CRIU's stack in the padding. `cmd` is the operation in its low half and pagemap flags in its high
//! one. `dst_id` is an id and, in its low byte, what kind of id.

use super::PageServerError;
use crate::image::PagemapName;

/// Length of the header that CRIU up to 4.1 sends, in bytes.
const OLD_LEN: usize = 24;

/// Length of the header since CRIU 4.2, in bytes.
const NEW_LEN: usize = 32;

/// The largest pid that Linux gives out, on any 64-bit machine.
const PID_MAX: u64 = 1 << 22;

/// Which of the two headers a connection uses. CRIU does not say; it is seen in the first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderLayout {
    /// 24 bytes: CRIU up to 4.1.
    Old,
    /// 32 bytes: CRIU 4.2 and later.
    New,
}

impl HeaderLayout {
    /// Length of a header in bytes.
    pub fn byte_len(self) -> usize {
        match self {
            Self::Old => OLD_LEN,
            Self::New => NEW_LEN,
        }
    }
}

/// Operations, by their numbers in the low half of `cmd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Up to 3.4: pages that follow.
    Add,
    /// Up to 3.4: pages in the parent.
    Hole,
    /// Begins a pagemap without an answer.
    Open,
    /// Begins a pagemap.
    Open2,
    /// Asks whether there is a parent.
    Parent,
    /// One run with flags.
    AddF,
    Close,
    ForceClose,
}

impl Op {
    fn of(number: u16) -> Result<Self, PageServerError> {
        Ok(match number {
            1 => Self::Add,
            2 => Self::Hole,
            3 => Self::Open,
            4 => Self::Open2,
            5 => Self::Parent,
            6 => Self::AddF,
            8 => return Err(PageServerError::Compressed),
            0x1023 => Self::Close,
            0x1024 => Self::ForceClose,
            number => return Err(PageServerError::UnknownOperation(number)),
        })
    }

    fn is_close(self) -> bool {
        matches!(self, Self::Close | Self::ForceClose)
    }

    /// Whether a session may begin with it; those tell the two layouts apart.
    fn begins(self) -> bool {
        matches!(self, Self::Open | Self::Open2 | Self::Parent) || self.is_close()
    }
}

/// One header, of either layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) op: Op,
    pub(super) flags: u32,
    pub(super) pages: u64,
    pub(super) vaddr: u64,
    pub(super) dst_id: u64,
}

impl Header {
    /// Whose memory it is about.
    pub(super) fn space(&self) -> Result<PagemapName, PageServerError> {
        let id = self.dst_id >> 8;
        // The other numbers are those of development versions before 3.4.
        match self.dst_id & 0xff {
            1 | 10 | 11 | 16 | 17 if (1..=PID_MAX).contains(&id) => Ok(PagemapName::Task(id)),
            2 | 27..=29 | 32..=34 => Ok(PagemapName::Shmem(id)),
            _ => Err(PageServerError::BadSpace(self.dst_id)),
        }
    }

    fn parse(layout: HeaderLayout, bytes: &[u8; NEW_LEN]) -> Result<Self, PageServerError> {
        let word = |at: usize| {
            let bytes: [u8; 4] = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
            u32::from_ne_bytes(bytes)
        };
        let long = |at: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(eight)
        };
        let (pages, vaddr) = match layout {
            HeaderLayout::Old => (word(4).into(), 8),
            HeaderLayout::New => (long(8), 16),
        };
        let command = word(0);
        Ok(Self {
            op: Op::of((command & 0xffff) as u16)?,
            flags: command >> 16,
            pages,
            vaddr: long(vaddr),
            dst_id: long(vaddr + 8),
        })
    }
}

/// Collects the bytes of one header after the other, and finds out their layout with the first.
#[derive(Debug, Default)]
pub(super) struct Collector {
    layout: Option<HeaderLayout>,
    /// That of an earlier session on the same socket.
    earlier: Option<HeaderLayout>,
    bytes: [u8; NEW_LEN],
    filled: usize,
}

impl Collector {
    pub(super) fn following(earlier: Option<HeaderLayout>) -> Self {
        Self {
            earlier,
            ..Self::default()
        }
    }

    pub(super) fn layout(&self) -> Option<HeaderLayout> {
        self.layout
    }

    /// Bytes that are surely part of the header being collected.
    pub(super) fn missing(&self) -> usize {
        self.layout.map_or(OLD_LEN, HeaderLayout::byte_len) - self.filled
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Takes what belongs to the header; how much that was, and the header once it is whole.
    pub(super) fn take(
        &mut self,
        input: &[u8],
    ) -> Result<(usize, Option<Header>), PageServerError> {
        let mut taken = 0;
        loop {
            let rest = &input[taken..];
            let count = rest.len().min(self.missing());
            self.bytes[self.filled..self.filled + count].copy_from_slice(&rest[..count]);
            self.filled += count;
            taken += count;
            if self.missing() > 0 {
                return Ok((taken, None));
            }
            if let Some(layout) = self.layout {
                self.filled = 0;
                return Header::parse(layout, &self.bytes).map(|header| (taken, Some(header)));
            }
            // With the longer layout this leaves 8 bytes missing.
            self.layout = Some(self.detect()?);
        }
    }

    /// The layout, by the first 24 bytes.
    ///
    /// A first message has neither pages nor an address, but a `dst_id`. Bytes 16 to 24 are the
    /// address in the long layout, the id in the short one. The padding says nothing. A session
    /// that only closes has no id: then the layout of an earlier one on the same socket decides, or
    /// the short one is taken, which at worst leaves the last 8 bytes of the message unread.
    fn detect(&self) -> Result<HeaderLayout, PageServerError> {
        let header =
            Header::parse(HeaderLayout::Old, &self.bytes).map_err(|_| PageServerError::BadBegin)?;
        if !header.op.begins() || header.flags != 0 || header.vaddr != 0 {
            return Err(PageServerError::BadBegin);
        }
        let long = header.dst_id == 0
            && (!header.op.is_close() || self.earlier == Some(HeaderLayout::New));
        Ok(if long {
            HeaderLayout::New
        } else {
            HeaderLayout::Old
        })
    }
}
