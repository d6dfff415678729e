//! Which pages of a process are its own: what CRIU would dump.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::page::PageSize;
use crate::sys::{self, Region, Wanted, category};

/// How pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The PAGEMAP_SCAN ioctl of Linux 6.7 and later: the kernel skips what is not mapped.
    PagemapScan,
    /// `/proc/PID/pagemap`, 8 bytes for each page, mapped or not.
    Pagemap,
}

/// Most of an address space that is scanned in one call: the process cannot change its mappings
/// while the kernel walks, which takes 1 to 3 ms for this many bytes of pages.
const STEP_BYTES: u64 = 1 << 30;

/// Regions asked for at once.
const REGIONS: usize = 1024;

/// Entries of a pagemap read at once.
const ENTRIES: u64 = 8192;

/// Finds pages that are present or swapped, belong to the process alone, and are not the kernel's
/// zero page.
#[derive(Debug)]
pub(super) struct Scanner {
    method: Method,
    page: PageSize,
    wanted: Wanted,
    zero_frame: Option<u64>,
    regions: Vec<Region>,
    entries: Vec<u8>,
}

impl Scanner {
    /// A scanner by `method`, or by the best that the kernel has.
    pub(super) fn new(page: PageSize, method: Option<Method>) -> io::Result<Self> {
        let probed = probe()?;
        let method = method.unwrap_or(match probed {
            Some(_) => Method::PagemapScan,
            None => Method::Pagemap,
        });
        Ok(Self {
            method,
            page,
            wanted: probed.unwrap_or(wanted(0)),
            zero_frame: zero_frame(page)?,
            regions: vec![Region::default(); REGIONS],
            entries: Vec::new(),
        })
    }

    pub(super) fn method(&self) -> Method {
        self.method
    }

    /// Calls `found` with each run of pages in `range`, ascending, until it says false.
    pub(super) fn scan(
        &mut self,
        pagemap: &File,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>) -> bool,
    ) -> io::Result<()> {
        match self.method {
            Method::PagemapScan => self.scan_by_ioctl(pagemap, range, found),
            Method::Pagemap => self.scan_entries(pagemap, range, found),
        }
    }

    fn scan_by_ioctl(
        &mut self,
        pagemap: &File,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>) -> bool,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at.saturating_add(STEP_BYTES));
            let (filled, walked) =
                sys::pagemap_scan(pagemap, at, end, self.wanted, &mut self.regions)?;
            for region in &self.regions[..filled] {
                if !found(region.start..region.end) {
                    return Ok(());
                }
            }
            // Kernels around 6.12 leave `walked` behind the regions when there were more than they
            // buffer (512): what lies before the last region was walked in any case.
            let last = self.regions[..filled].last().map_or(0, |last| last.end);
            let reached = walked.max(last);
            if reached <= at {
                return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
            }
            at = reached;
        }
        Ok(())
    }

    fn scan_entries(
        &mut self,
        pagemap: &File,
        range: Range<u64>,
        found: &mut dyn FnMut(Range<u64>) -> bool,
    ) -> io::Result<()> {
        let page = self.page.bytes();
        let mut run: Option<Range<u64>> = None;
        let mut at = range.start;
        while at < range.end {
            let pages = ENTRIES.min((range.end - at) / page);
            let read = self.read_entries(pagemap, at / page, pages)?;
            for entry in self.entries[..read].as_chunks::<8>().0 {
                let is_own = self.is_own(u64::from_ne_bytes(*entry));
                if is_own {
                    run.get_or_insert(at..at).end = at + page;
                } else if let Some(run) = run.take()
                    && !found(run)
                {
                    return Ok(());
                }
                at += page;
            }
            // The end of the address space, or the process has none any more.
            if read == 0 {
                break;
            }
        }
        if let Some(run) = run {
            found(run);
        }
        Ok(())
    }

    fn read_entries(&mut self, pagemap: &File, first: u64, pages: u64) -> io::Result<usize> {
        let length = usize::try_from(pages).expect("at most ENTRIES") * 8;
        self.entries.resize(length, 0);
        let read = pagemap.read_at(&mut self.entries, first * 8)?;
        Ok(read / 8 * 8)
    }

    /// Bits as Documentation/admin-guide/mm/pagemap.rst has them.
    fn is_own(&self, entry: u64) -> bool {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const FILE: u64 = 1 << 61;
        const GUARD: u64 = 1 << 58;
        const FRAME: u64 = (1 << 55) - 1;
        let is_zero = entry & PRESENT != 0 && self.zero_frame == Some(entry & FRAME);
        entry & (PRESENT | SWAPPED) != 0 && entry & (FILE | GUARD) == 0 && !is_zero
    }
}

fn wanted(guard: u64) -> Wanted {
    Wanted {
        any: category::PRESENT | category::SWAPPED,
        none: category::FILE | category::ZERO | guard,
    }
}

/// What to ask PAGEMAP_SCAN for, if the kernel has it.
fn probe() -> io::Result<Option<Wanted>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    for wanted in [wanted(category::GUARD), wanted(0)] {
        match sys::pagemap_scan(&pagemap, 0, 0, wanted, &mut [Region::default()]) {
            Ok(_) => return Ok(Some(wanted)),
            // Unknown categories.
            Err(Errno::INVAL) => {}
            Err(_) => return Ok(None),
        }
    }
    Ok(None)
}

/// The frame of the zero page: that of a page which was read and never written. Unknown without
/// CAP_SYS_ADMIN.
fn zero_frame(page: PageSize) -> io::Result<Option<u64>> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let map = memmap2::MmapMut::map_anon(page.byte_len())?;
    std::hint::black_box(map[0]);
    let address = map.as_ptr().addr() as u64;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / page.bytes() * 8)?;
    let entry = u64::from_ne_bytes(entry);
    Ok((entry & PRESENT != 0 && entry & FRAME != 0).then_some(entry & FRAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More runs than any buffer holds: a redis on Linux 6.12 had pages delivered twice.
    #[test]
    fn scattered_pages_are_found_once_and_in_order() {
        let page = PageSize::of_host();
        let mut map = memmap2::MmapMut::map_anon(6000 * page.byte_len()).unwrap();
        // Without support for huge pages there is nothing to switch off.
        let _ = map.advise(memmap2::Advice::NoHugePage);
        let written = (0..6000).step_by(2);
        for index in written.clone() {
            map[index * page.byte_len()] = 1;
        }
        let begin = map.as_ptr().addr() as u64;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let expected: Vec<_> = written.map(|index| index as u64).collect();
        for method in [None, Some(Method::Pagemap)] {
            let mut found = Vec::new();
            let range = begin..begin + 6000 * page.bytes();
            let mut scanner = Scanner::new(page, method).unwrap();
            scanner
                .scan(&pagemap, range, &mut |run| {
                    assert_eq!(run.end - run.start, page.bytes());
                    found.push((run.start - begin) / page.bytes());
                    true
                })
                .unwrap();
            assert_eq!(found, expected, "{:?}", scanner.method());
        }
    }
}
