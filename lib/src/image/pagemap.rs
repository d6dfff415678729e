//! Pagemaps: which pages of a task or shared segment a dump holds, and where.
//!
//! A pagemap is a head that names the pages file, then entries in ascending order of address. The
//! pages file is the plain concatenation of the pages of all PRESENT entries, so an entry's place in
//! it is the number of PRESENT pages before it.
//!
//! The page count moved between versions: CRIU up to 4.1 reads and writes field 2 (32 bits), CRIU
//! 4.2 writes 0 there and the count to field 5 (64 bits), and 4.1 takes a 4.2 file for one of empty
//! entries. [`Pagemap::encode`] fills both, which both read.

use std::fmt;

use crxfer_proto::criu;
use prost::Message;
use prost::encoding::{DecodeContext, decode_key, skip_field};

use super::error::{ImageError, RunFault};
use super::framing::{Frame, Record, Records, Writer, magic};
use crate::page::PageSize;

/// Most pages in one pagemap: 64 TiB of 4 KiB pages. A larger count is damage, and would make
/// loops over pages endless.
pub const MAX_PAGES: u64 = 1 << 34;

/// Largest pagemap file that is read, in bytes: more than 25 million entries. CRIU writes about
/// 1,000 entries (16 to 20 bytes each) for a GiB, one for each page at the very worst.
pub const MAX_FILE_BYTES: u64 = 512 << 20;

/// Where the content of a run of pages is.
///
/// No bit at all means pages of zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageFlags(u8);

impl PageFlags {
    /// The content is in the parent directory (PE_PARENT).
    pub const PARENT: Self = Self(1);
    /// The page may be restored on first access (PE_LAZY). Alone: the content was left at the source.
    pub const LAZY: Self = Self(2);
    /// The content is in this directory's pages file (PE_PRESENT).
    pub const PRESENT: Self = Self(4);
    /// No bit: pages of zeros.
    pub const ZERO: Self = Self(0);

    /// The flags with these bits, unless there are others than the three known ones.
    pub fn from_bits(bits: u32) -> Option<Self> {
        u8::try_from(bits)
            .ok()
            .filter(|bits| bits & !7 == 0)
            .map(Self)
    }

    /// The bits as in the file.
    pub fn bits(self) -> u32 {
        self.0.into()
    }

    /// Whether all bits of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets of bits.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// In the parent.
    pub fn is_parent(self) -> bool {
        self.contains(Self::PARENT)
    }

    /// In this directory's pages file.
    pub fn is_present(self) -> bool {
        self.contains(Self::PRESENT)
    }

    /// In no file at all: left at the source by a lazy dump.
    pub fn is_lazy_only(self) -> bool {
        self == Self::LAZY
    }
}

impl fmt::Debug for PageFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::PARENT, "PARENT"),
            (Self::LAZY, "LAZY"),
            (Self::PRESENT, "PRESENT"),
        ];
        let set: Vec<_> = names
            .iter()
            .filter(|(bit, _)| self.contains(*bit))
            .collect();
        let joined = set
            .iter()
            .map(|(_, name)| *name)
            .collect::<Vec<_>>()
            .join("|");
        f.write_str(if joined.is_empty() { "ZERO" } else { &joined })
    }
}

/// One entry: pages that follow one another in memory and lie in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Address of the first page; for shared segments the offset in the segment, in bytes.
    pub vaddr: u64,
    /// Number of pages.
    pub pages: u64,
    /// Where their content is.
    pub flags: PageFlags,
}

impl PageRun {
    /// Address of the first byte behind the run. Runs of a [`Pagemap`] never overflow.
    pub fn end(&self, page_size: PageSize) -> u64 {
        self.vaddr + self.pages * page_size.bytes()
    }
}

/// One parsed pagemap: ascending, aligned, without overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    pages_id: u32,
    page_size: PageSize,
    runs: Vec<PageRun>,
}

impl Pagemap {
    /// A pagemap of these runs, if they keep the rules; `name` is for the error.
    pub fn new(
        name: &str,
        pages_id: u32,
        page_size: PageSize,
        runs: Vec<PageRun>,
    ) -> Result<Self, ImageError> {
        check_runs(&runs, page_size).map_err(|(entry, what)| ImageError::BadRun {
            file: name.to_owned(),
            entry,
            vaddr: runs[entry].vaddr,
            what,
        })?;
        Ok(Self {
            pages_id,
            page_size,
            runs,
        })
    }

    /// Parses the bytes of the pagemap file `name`.
    ///
    /// Refuses everything that CRIU cannot have written. A pagemap with compressed or unknown
    /// entries gives an error for which [`ImageError::is_opaque`] holds.
    pub fn parse(bytes: &[u8], name: &str, page_size: PageSize) -> Result<Self, ImageError> {
        let framing = |error| ImageError::Framing {
            file: name.to_owned(),
            error,
        };
        let mut records = Records::parse(bytes).map_err(framing)?;
        if records.magic() != magic::PAGEMAP {
            return Err(ImageError::WrongMagic {
                file: name.to_owned(),
                expected: magic::PAGEMAP,
                found: records.magic(),
            });
        }
        let head = records.next().ok_or_else(|| ImageError::BadCount {
            file: name.to_owned(),
            what: "the head that names the pages file is missing",
        })?;
        let pages_id = parse_head(head.map_err(framing)?, name)?;
        let mut runs = Vec::new();
        for record in records {
            runs.push(parse_entry(record.map_err(framing)?, name, runs.len())?);
        }
        Self::new(name, pages_id, page_size, runs)
    }

    /// The same pagemap seen with another page size, if its runs allow that.
    pub fn with_page_size(self, name: &str, page_size: PageSize) -> Result<Self, ImageError> {
        Self::new(name, self.pages_id, page_size, self.runs)
    }

    /// The file's bytes, in the form that every CRIU since 1.6 reads.
    ///
    /// Runs of more than 2³² − 1 pages are split, so that the count fits the old field too.
    pub fn encode(&self) -> Vec<u8> {
        let mut image = Writer::new(Frame::V11, magic::PAGEMAP);
        image.record(&criu::PagemapHead {
            pages_id: Some(self.pages_id),
        });
        for run in &self.runs {
            let (mut vaddr, mut left) = (run.vaddr, run.pages);
            while left > 0 {
                let count = u32::try_from(left).unwrap_or(u32::MAX);
                image.record(&criu::PagemapEntry {
                    vaddr: Some(vaddr),
                    compat_nr_pages: Some(count),
                    in_parent: None,
                    flags: Some(run.flags.bits()),
                    nr_pages: Some(count.into()),
                });
                vaddr += u64::from(count) * self.page_size.bytes();
                left -= u64::from(count);
            }
        }
        image.finish()
    }

    /// Number in the name of the pages file.
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// The page size that the runs count in.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The entries, ascending.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// Pages of all kinds.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages).sum()
    }

    /// Pages whose bytes are in this directory's pages file.
    pub fn present_pages(&self) -> u64 {
        self.pages_where(PageFlags::is_present)
    }

    /// Pages whose flags satisfy `kind`.
    pub fn pages_where(&self, kind: impl Fn(PageFlags) -> bool) -> u64 {
        self.runs
            .iter()
            .filter(|run| kind(run.flags))
            .map(|run| run.pages)
            .sum()
    }

    /// Size in bytes that the pages file must have at least.
    pub fn present_bytes(&self) -> u64 {
        self.present_pages() * self.page_size.bytes()
    }

    /// Whether any page's content is in the parent.
    pub fn needs_parent(&self) -> bool {
        self.runs.iter().any(|run| run.flags.is_parent())
    }
}

/// Which field of a pagemap's entries holds the page count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CountForm {
    /// Only field 2: CRIU up to 4.1.
    Old,
    /// Fields 2 and 5 with the same count: written by this crate.
    Both,
    /// Field 5, with 0 in field 2: CRIU 4.2 and later.
    New,
}

/// The form of a pagemap file's first entry; `None` if it has none that can be read.
pub fn count_form(bytes: &[u8]) -> Option<CountForm> {
    let record = Records::parse(bytes).ok()?.nth(1)?.ok()?;
    let entry = criu::PagemapEntry::decode(record.message).ok()?;
    Some(match (entry.nr_pages, entry.compat_nr_pages) {
        (None, _) => CountForm::Old,
        (Some(count), Some(compat)) if count == u64::from(compat) => CountForm::Both,
        (Some(_), _) => CountForm::New,
    })
}

fn parse_head(record: Record<'_>, name: &str) -> Result<u32, ImageError> {
    let head = criu::PagemapHead::decode(record.message)
        .map_err(|error| bad_record(name, record, &format!("not a pagemap head ({error})")))?;
    head.pages_id
        .ok_or_else(|| bad_record(name, record, "the head names no pages file"))
}

fn parse_entry(record: Record<'_>, name: &str, index: usize) -> Result<PageRun, ImageError> {
    check_fields(record, name)?;
    let entry = criu::PagemapEntry::decode(record.message)
        .map_err(|error| bad_record(name, record, &format!("not a pagemap entry ({error})")))?;
    let vaddr = entry
        .vaddr
        .ok_or_else(|| bad_record(name, record, "the entry has no address"))?;
    let pages = entry
        .nr_pages
        .or(entry.compat_nr_pages.map(u64::from))
        .ok_or_else(|| bad_record(name, record, "the entry has no page count"))?;
    let fault = |what| ImageError::BadRun {
        file: name.to_owned(),
        entry: index,
        vaddr,
        what,
    };
    let bits = match (entry.flags, entry.in_parent.unwrap_or(false)) {
        // Writers before CRIU 3.5 had `in_parent` and no flags; absence of both meant "here".
        (flags, true) => flags.unwrap_or(0) | PageFlags::PARENT.bits(),
        (Some(flags), false) => flags,
        (None, false) => PageFlags::PRESENT.bits(),
    };
    if bits & 8 != 0 && bits & !15 == 0 {
        let what = "flag 8: payload on a page boundary";
        return Err(ImageError::Compressed {
            file: name.to_owned(),
            what,
        });
    }
    let flags = PageFlags::from_bits(bits).ok_or_else(|| fault(RunFault::UnknownFlags(bits)))?;
    Ok(PageRun {
        vaddr,
        pages,
        flags,
    })
}

/// Fields behind the five known ones change where the bytes are, so such entries are not read.
fn check_fields(record: Record<'_>, name: &str) -> Result<(), ImageError> {
    let mut rest = record.message;
    while !rest.is_empty() {
        let damaged = |error| bad_record(name, record, &format!("not a pagemap entry ({error})"));
        let (field, wire_type) = decode_key(&mut rest).map_err(damaged)?;
        match field {
            1..=5 => {}
            6..=8 => {
                let what = "entries of compressed blocks";
                return Err(ImageError::Compressed {
                    file: name.to_owned(),
                    what,
                });
            }
            _ => {
                let what = format!(
                    "the pagemap entry at byte {} has field {field}",
                    record.offset
                );
                return Err(ImageError::TooNew {
                    file: name.to_owned(),
                    what,
                });
            }
        }
        skip_field(wire_type, field, &mut rest, DecodeContext::default()).map_err(damaged)?;
    }
    Ok(())
}

fn check_runs(runs: &[PageRun], page_size: PageSize) -> Result<(), (usize, RunFault)> {
    let (mut end, mut total) = (0, 0u64);
    for (entry, run) in runs.iter().enumerate() {
        let next = check_run(run, end, page_size).map_err(|fault| (entry, fault))?;
        end = next;
        total += run.pages;
        if total > MAX_PAGES {
            return Err((entry, RunFault::Absurd(total)));
        }
    }
    Ok(())
}

/// Checks one run against the end of the one before; gives its own end.
fn check_run(run: &PageRun, previous: u64, page_size: PageSize) -> Result<u64, RunFault> {
    if run.flags.is_parent() && run.flags.is_present() {
        return Err(RunFault::PresentAndParent);
    }
    if !page_size.is_aligned(run.vaddr) {
        return Err(RunFault::Unaligned(page_size.bytes()));
    }
    if run.pages == 0 {
        return Err(RunFault::Empty);
    }
    let end = page_size
        .checked_bytes(run.pages)
        .and_then(|bytes| run.vaddr.checked_add(bytes))
        .ok_or(RunFault::Overflow(run.pages))?;
    if run.pages > MAX_PAGES {
        return Err(RunFault::Absurd(run.pages));
    }
    if run.vaddr < previous {
        return Err(RunFault::Descending(previous));
    }
    Ok(end)
}

fn bad_record(name: &str, record: Record<'_>, what: &str) -> ImageError {
    ImageError::BadRecord {
        file: name.to_owned(),
        offset: record.offset,
        what: what.to_owned(),
    }
}

#[cfg(test)]
mod tests;
