//! Image directories of one made-up process, as CRIU lays them out.
//!
//! What a transfer looks at is complete and valid: inventory, process tree, pagemap in the form
//! that CRIU before and since 4.2 reads, pages, statistics. `core` and `mm` carry only what names
//! the process and its one mapping; nothing can be restored from them. The bytes are put together
//! here rather than by the library, so that the library's reader meets another writer.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use crate::pages::{Kind, Random, changed_pages, fill_pages};

const COMMON_MAGIC: u32 = 0x5456_4319;
const SERVICE_MAGIC: u32 = 0x5510_5940;
const INVENTORY_MAGIC: u32 = 0x5831_3116;
const PSTREE_MAGIC: u32 = 0x5027_3030;
const CORE_MAGIC: u32 = 0x5505_3847;
const MM_MAGIC: u32 = 0x5749_2820;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const STATS_MAGIC: u32 = 0x5709_3306;

/// PE_PRESENT | PE_LAZY: what CRIU writes for anonymous private memory.
const PRESENT_LAZY: u64 = 4 | 2;
/// Regular and anonymous private, as in `vma_entry.status`.
const ANON_PRIVATE: u64 = 1 | 1 << 9;

/// CRIU's own bound on a run with the default pipe size.
const RUN_BYTES: u64 = 1 << 20;
/// Runs between two holes, so that the pagemap is not one flat range.
const RUNS_PER_REGION: usize = 64;
const FIRST_ADDRESS: u64 = 0x5600_0000_0000;

const PID: u64 = 4;
const PAGES_ID: u64 = 1;

/// What an image directory holds.
#[derive(Clone, Copy, Debug)]
pub struct ImageSpec {
    /// Pages of the process; at least 1.
    pub pages: u64,
    /// Bytes of a page.
    pub page_len: usize,
    /// Their content.
    pub kind: Kind,
    /// Seed of the content.
    pub seed: u64,
}

/// Name of the pages file within a directory made by [`write_image`].
pub fn pages_file_name() -> String {
    format!("pages-{PAGES_ID}.img")
}

/// Writes the image directory of `spec` into `dir`, which must be new or empty.
pub fn write_image(dir: &Path, spec: &ImageSpec) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    if fs::read_dir(dir)?.next().is_some() {
        let text = format!("{} is not empty: name a new directory", dir.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    let runs = runs(spec);
    let file = |name: String, bytes: Vec<u8>| fs::write(dir.join(name), bytes);
    file(format!("core-{PID}.img"), image(CORE_MAGIC, &[core()]))?;
    file(format!("mm-{PID}.img"), image(MM_MAGIC, &[mm(spec, &runs)]))?;
    file(
        format!("pagemap-{PID}.img"),
        image(PAGEMAP_MAGIC, &pagemap(&runs)),
    )?;
    file("pstree.img".into(), image(PSTREE_MAGIC, &[pstree()]))?;
    write_pages(&dir.join(pages_file_name()), spec)?;
    // Last, as CRIU does: the inventory near the end, the statistics when all went well.
    file(
        "inventory.img".into(),
        framed(&[INVENTORY_MAGIC], &[inventory()]),
    )?;
    let stats = framed(&[SERVICE_MAGIC, STATS_MAGIC], &[stats(spec)]);
    file("stats-dump".into(), stats)
}

/// Overwrites `percent` per cent of the pages of a directory that [`write_image`] made with other
/// pages of `kind`; returns how many. Different seeds choose different pages.
pub fn change_image(
    dir: &Path,
    page_len: usize,
    kind: Kind,
    percent: f64,
    seed: u64,
) -> io::Result<u64> {
    let path = dir.join(pages_file_name());
    let mut file = File::options().read(true).write(true).open(path)?;
    let pages = file.metadata()?.len() / page_len as u64;
    let changed = changed_pages(pages, percent, seed);
    let content_seed = Random::new(seed ^ 0x00c0_ffee).next_word();
    let mut page = vec![0; page_len];
    for number in &changed {
        fill_pages(&mut page, page_len, kind, content_seed, *number);
        file.seek(SeekFrom::Start(number * page_len as u64))?;
        file.write_all(&page)?;
    }
    Ok(changed.len() as u64)
}

fn write_pages(path: &Path, spec: &ImageSpec) -> io::Result<()> {
    let mut out = File::create(path)?;
    let at_once = 256;
    let mut buffer = vec![0; at_once * spec.page_len];
    let mut first = 0;
    while first < spec.pages {
        let left = usize::try_from(spec.pages - first).unwrap_or(at_once);
        let count = left.min(at_once);
        let bytes = &mut buffer[..count * spec.page_len];
        fill_pages(bytes, spec.page_len, spec.kind, spec.seed, first);
        out.write_all(bytes)?;
        first += count as u64;
    }
    out.flush()
}

/// Address and page count of each run, with a hole of one page after every region.
fn runs(spec: &ImageSpec) -> Vec<(u64, u64)> {
    let page_len = spec.page_len as u64;
    let most = (RUN_BYTES / page_len).max(1);
    let mut address = FIRST_ADDRESS;
    let mut left = spec.pages;
    let mut runs = Vec::new();
    while left > 0 {
        let pages = left.min(most);
        runs.push((address, pages));
        address += pages * page_len;
        left -= pages;
        if runs.len().is_multiple_of(RUNS_PER_REGION) {
            address += page_len;
        }
    }
    runs
}

fn address_range(spec: &ImageSpec, runs: &[(u64, u64)]) -> Range<u64> {
    let end = runs.last().map_or(FIRST_ADDRESS, |(address, pages)| {
        address + pages * spec.page_len as u64
    });
    FIRST_ADDRESS..end
}

fn pagemap(runs: &[(u64, u64)]) -> Vec<Message> {
    let head = Message::new().number(1, PAGES_ID);
    let entries = runs.iter().map(|&(address, pages)| {
        // Field 2 is read up to CRIU 4.1, field 5 since 4.2.
        Message::new()
            .number(1, address)
            .number(2, pages)
            .number(4, PRESENT_LAZY)
            .number(5, pages)
    });
    std::iter::once(head).chain(entries).collect()
}

fn inventory() -> Message {
    let ids = (1..=10).fold(Message::new(), |ids, field| {
        ids.number(field, u64::from(field))
    });
    Message::new()
        .number(1, 2)
        .number(2, 1)
        .message(3, &ids)
        .number(4, 1)
        .number(5, 1)
        .number(6, 0)
        .number(11, 2)
        .message(12, &Message::new())
        .text(13, "5ca1ab1e-0000-4000-8000-00000000c0de")
}

fn pstree() -> Message {
    Message::new()
        .number(1, PID)
        .number(2, 0)
        .number(3, PID)
        .number(4, PID)
        .number(5, PID)
}

/// Only the machine type (x86-64); registers and the rest are left out.
fn core() -> Message {
    Message::new().number(1, 1)
}

fn mm(spec: &ImageSpec, runs: &[(u64, u64)]) -> Message {
    let range = address_range(spec, runs);
    let vma = Message::new()
        .number(1, range.start)
        .number(2, range.end)
        .number(3, 0)
        .number(4, 0)
        .number(5, 3)
        .number(6, 0x22)
        .number(7, ANON_PRIVATE)
        .signed(8, -1);
    // Fields 1 to 12 are addresses of the program's parts, which it does not have.
    (1..=12)
        .fold(Message::new(), |mm, field| mm.number(field, 0))
        .message(14, &vma)
}

fn stats(spec: &ImageSpec) -> Message {
    let dump = Message::new()
        .number(1, 100)
        .number(2, 50_000)
        .number(3, 10_000)
        .number(4, 30_000)
        .number(5, spec.pages)
        .number(6, 0)
        .number(7, spec.pages)
        .number(9, 0);
    Message::new().message(1, &dump)
}

fn image(magic: u32, records: &[Message]) -> Vec<u8> {
    framed(&[COMMON_MAGIC, magic], records)
}

fn framed(magics: &[u32], records: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for magic in magics {
        bytes.extend(magic.to_le_bytes());
    }
    for Message(record) in records {
        let len = u32::try_from(record.len()).expect("records here are short");
        bytes.extend(len.to_le_bytes());
        bytes.extend(record);
    }
    bytes
}

/// A protobuf message under construction.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn new() -> Self {
        Self::default()
    }

    fn number(mut self, field: u32, value: u64) -> Self {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    fn signed(self, field: u32, value: i64) -> Self {
        self.number(field, value.cast_unsigned())
    }

    fn text(self, field: u32, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(self, field: u32, message: &Self) -> Self {
        self.bytes(field, &message.0)
    }

    fn bytes(mut self, field: u32, bytes: &[u8]) -> Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: ImageSpec = ImageSpec {
        pages: 1000,
        page_len: 4096,
        kind: Kind::Mixed,
        seed: 7,
    };

    fn pages_of(dir: &Path) -> Vec<u8> {
        fs::read(dir.join(pages_file_name())).unwrap()
    }

    #[test]
    fn pagemap_begins_as_criu_writes_it_and_counts_all_pages() {
        let dir = tempfile::tempdir().unwrap();
        write_image(dir.path(), &SPEC).unwrap();
        let pagemap = fs::read(dir.path().join("pagemap-4.img")).unwrap();
        let expected = [
            0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, // magics
            2, 0, 0, 0, 0x08, 1, // head: pages_id 1
            0x10, 0, 0, 0, // first entry
            0x08, 0x80, 0x80, 0x80, 0x80, 0x80, 0xc0, 0x15, // vaddr 0x560000000000
            0x10, 0x80, 0x02, 0x20, 6, 0x28, 0x80, 0x02, // 256 pages, both forms, flags 6
        ];
        assert_eq!(pagemap[..expected.len()], expected);
        let counted: u64 = runs(&SPEC).iter().map(|(_, pages)| pages).sum();
        assert_eq!(counted, 1000);
        assert_eq!(pages_of(dir.path()).len(), 1000 * 4096);
    }

    #[test]
    fn runs_ascend_with_holes_between_regions() {
        let spec = ImageSpec {
            pages: 40_000,
            ..SPEC
        };
        let runs = runs(&spec);
        let gaps = runs
            .windows(2)
            .map(|pair| pair[1].0 - (pair[0].0 + pair[0].1 * 4096));
        let holes: Vec<u64> = gaps.filter(|gap| *gap > 0).collect();
        assert_eq!(holes, [4096, 4096]);
    }

    #[test]
    fn same_arguments_make_the_same_directory() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&a, &b] {
            write_image(dir.path(), &SPEC).unwrap();
            change_image(dir.path(), 4096, Kind::Random, 2.0, 3).unwrap();
        }
        for entry in fs::read_dir(&a).unwrap() {
            let name = entry.unwrap().file_name();
            let [in_a, in_b] = [&a, &b].map(|dir| fs::read(dir.path().join(&name)).unwrap());
            assert_eq!(in_a, in_b, "{}", name.display());
        }
    }

    #[test]
    fn change_touches_as_many_pages_as_it_says() {
        let dir = tempfile::tempdir().unwrap();
        write_image(dir.path(), &SPEC).unwrap();
        let before = pages_of(dir.path());
        let changed = change_image(dir.path(), 4096, Kind::Random, 1.0, 1).unwrap();
        let after = pages_of(dir.path());
        let differing = before
            .chunks(4096)
            .zip(after.chunks(4096))
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!((changed, differing), (10, 10));
    }

    #[test]
    fn directory_with_content_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        let refused = write_image(dir.path(), &SPEC).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    }
}
