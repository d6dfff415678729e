//! A generator of checkpoints: one process with private memory and a shared segment.
//!
//! The directories have the files, names and formats of a full dump by CRIU 4.2, and a transfer
//! engine cannot tell them from one. CRIU could not restore them: there is no program behind them.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};

use super::encode::{
    COMMON_MAGIC, CORE_MAGIC, FILES_MAGIC, FS_MAGIC, IDS_MAGIC, INVENTORY_MAGIC, MEMFD_MAGIC,
    MM_MAGIC, Message, PAGEMAP_MAGIC, PSTREE_MAGIC, SERVICE_MAGIC, STATS_MAGIC, write_image,
};
use super::resolve::{Memory, PARENT, PRESENT};

const PID: u64 = 4242;
const SHMID: u64 = 777;
const FIRST_ADDRESS: u64 = 0x7f10_0000_0000;
/// Pages of 4 KiB, as on x86-64.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Longest run of pages, as CRIU's pipes limit it.
const RUN_PAGES: u64 = 256;
/// One page of each so many is followed by a hole, a page that the process never touched.
const PAGES_PER_HOLE: usize = 100;
/// One page of so many lies in the shared segment.
const SHARED_PART: usize = 8;

/// What pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// One page in eight zero, two like each other, the rest half text, half noise.
    Mixed,
    /// Noise only, which cannot be compressed.
    Noise,
}

/// A process that exists only as its checkpoints.
#[derive(Clone, Debug)]
pub(crate) struct Synthetic {
    seed: u64,
    content: Content,
    /// How often each page was written.
    versions: Vec<u32>,
}

impl Synthetic {
    /// A process of `pages` pages of mixed content, another one for each `seed`.
    pub(crate) fn mixed(pages: usize, seed: u64) -> Self {
        Self {
            seed,
            content: Content::Mixed,
            versions: vec![1; pages],
        }
    }

    /// A process of `pages` pages of noise.
    pub(crate) fn noise(pages: usize, seed: u64) -> Self {
        Self {
            seed,
            content: Content::Noise,
            versions: vec![1; pages],
        }
    }

    pub(crate) fn pages(&self) -> usize {
        self.versions.len()
    }

    /// Writes every `step`-th page from page `first` on; gives how many.
    pub(crate) fn change(&mut self, first: usize, step: usize) -> usize {
        let changed = self.versions.iter_mut().skip(first).step_by(step);
        changed.map(|version| *version += 1).count()
    }

    /// Writes a full dump of the process to `directory`, which is created.
    pub(crate) fn dump(&self, directory: &Path) -> Result<()> {
        self.dump_onto(directory, None)
    }

    /// Writes a dump that has only what changed since `earlier`, dumped to `../NAME`: as CRIU does
    /// where the kernel tracks writes.
    pub(crate) fn dump_onto(&self, directory: &Path, earlier: Option<(&Self, &str)>) -> Result<()> {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        if let Some((_, name)) = earlier {
            symlink(Path::new("..").join(name), directory.join("parent"))?;
        }
        let earlier = earlier.map(|(process, _)| process);
        let private = 0..self.pages() - self.shared();
        let shared = private.end..self.pages();
        let name = format!("pagemap-{PID}.img");
        self.write_memory(directory, &name, 2, FIRST_ADDRESS, private, earlier)?;
        let name = format!("pagemap-shmem-{SHMID}.img");
        self.write_memory(directory, &name, 1, 0, shared, earlier)?;
        self.write_metadata(directory)?;
        Ok(())
    }

    /// Writes what a pre-dump leaves: memory and a short inventory.
    pub(crate) fn pre_dump(&self, directory: &Path) -> Result<()> {
        self.pages_only(directory)?;
        let inventory = Message::new()
            .number(1, 0)
            .number(8, 1_000_000)
            .number(9, 1);
        let inventory = inventory.message(12, &Message::new());
        write_image(
            &directory.join("inventory.img"),
            &[INVENTORY_MAGIC],
            &[inventory],
        )?;
        Ok(())
    }

    /// Writes what a page server leaves: memory.
    pub(crate) fn pages_only(&self, directory: &Path) -> Result<()> {
        self.dump(directory)?;
        for file in fs::read_dir(directory)? {
            let file = file?;
            if !file.file_name().to_string_lossy().starts_with("page") {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }

    /// The memory that a dump stands for.
    pub(crate) fn memory(&self) -> Memory {
        let digests = |first: u64, pages: Range<usize>| {
            let begin = pages.start;
            pages
                .map(|index| {
                    (
                        first + address(index - begin),
                        *blake3::hash(&self.page(index)).as_bytes(),
                    )
                })
                .collect()
        };
        let border = self.pages() - self.shared();
        Memory::from_iter([
            (
                format!("pagemap-{PID}.img"),
                digests(FIRST_ADDRESS, 0..border),
            ),
            (
                format!("pagemap-shmem-{SHMID}.img"),
                digests(0, border..self.pages()),
            ),
        ])
    }

    fn shared(&self) -> usize {
        self.pages() / SHARED_PART
    }

    fn write_memory(
        &self,
        directory: &Path,
        pagemap: &str,
        pages_id: u64,
        first: u64,
        pages: Range<usize>,
        earlier: Option<&Self>,
    ) -> Result<()> {
        let name = directory.join(format!("pages-{pages_id}.img"));
        let mut data = BufWriter::with_capacity(1 << 20, File::create(&name)?);
        let begin = pages.start;
        let mut records = vec![Message::new().number(1, pages_id)];
        let mut run = Run {
            begin: 0,
            pages: 0,
            flags: PRESENT,
        };
        for index in pages {
            let known =
                earlier.is_some_and(|earlier| self.versions[index] == earlier.versions[index]);
            let flags = if known { PARENT } else { PRESENT };
            if !known {
                data.write_all(&self.page(index))
                    .with_context(|| format!("cannot write {}", name.display()))?;
            }
            let here = first + address(index - begin);
            if !run.continues(here, flags) {
                records.extend(run.entry());
                run = Run {
                    begin: here,
                    pages: 0,
                    flags,
                };
            }
            run.pages += 1;
        }
        records.extend(run.entry());
        data.flush()?;
        write_image(
            &directory.join(pagemap),
            &[COMMON_MAGIC, PAGEMAP_MAGIC],
            &records,
        )?;
        Ok(())
    }

    fn page(&self, index: usize) -> Vec<u8> {
        let version = u64::from(self.versions[index]);
        let kind = match self.content {
            Content::Noise => 7,
            Content::Mixed => index % 8,
        };
        let name = match kind {
            0 if version == 1 => return vec![0; PAGE_BYTES],
            // The same in many places.
            1 | 2 => (index % 5) as u64,
            _ => index as u64,
        };
        let mut state =
            (self.seed ^ name.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(version << 40) | 1;
        let mut page = Vec::with_capacity(PAGE_BYTES);
        if kind != 7 {
            while page.len() < PAGE_BYTES / 2 {
                page.extend_from_slice(
                    format!("entry {name} was written {version} times\n").as_bytes(),
                );
            }
        }
        while page.len() < PAGE_BYTES {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            page.extend_from_slice(&state.to_le_bytes());
        }
        page.truncate(PAGE_BYTES);
        page
    }

    fn write_metadata(&self, directory: &Path) -> Result<()> {
        let image = |name: &str, magic, records: &[Message]| {
            write_image(&directory.join(name), &[COMMON_MAGIC, magic], records)
        };
        write_image(
            &directory.join("inventory.img"),
            &[INVENTORY_MAGIC],
            &[inventory()],
        )?;
        let process = Message::new()
            .number(1, PID)
            .number(2, 0)
            .number(3, PID)
            .number(4, PID)
            .number(5, PID);
        image("pstree.img", PSTREE_MAGIC, &[process])?;
        image(
            &format!("core-{PID}.img"),
            CORE_MAGIC,
            &[Message::new().number(1, 1)],
        )?;
        image(&format!("ids-{PID}.img"), IDS_MAGIC, &[kernel_objects()])?;
        image(
            &format!("fs-{PID}.img"),
            FS_MAGIC,
            &[Message::new().number(1, 1).number(2, 2).number(3, 0o22)],
        )?;
        image(&format!("mm-{PID}.img"), MM_MAGIC, &[self.address_space()])?;
        image("files.img", FILES_MAGIC, &[])?;
        let bytes = self.shared() as u64 * PAGE_BYTES as u64;
        let segment = Message::new()
            .bytes(1, b"synthetic")
            .number(2, 0)
            .number(3, 0)
            .number(4, bytes);
        let segment = segment.number(5, SHMID).number(6, 0).number(7, 1);
        image("memfd.img", MEMFD_MAGIC, &[segment])?;
        let pages = self.pages() as u64;
        let times = (1..=4).fold(Message::new(), |message, field| message.number(field, 1000));
        let dump = times.number(5, pages).number(6, 0).number(7, pages);
        let stats = Message::new().message(1, &dump);
        write_image(
            &directory.join("stats-dump"),
            &[SERVICE_MAGIC, STATS_MAGIC],
            &[stats],
        )?;
        Ok(())
    }

    fn address_space(&self) -> Message {
        let private = address(self.pages() - self.shared()) + PAGE_BYTES as u64;
        let shared = self.shared() as u64 * PAGES_PER_HOLE as u64 / (PAGES_PER_HOLE as u64 - 1) + 1;
        let shared_begin = FIRST_ADDRESS + private + (1 << 30);
        let area = |begin: u64, end: u64, shmid: u64, flags: u64, status: u64| {
            let area = Message::new()
                .number(1, begin)
                .number(2, end)
                .number(3, 0)
                .number(4, shmid);
            area.number(5, 3)
                .number(6, flags)
                .number(7, status)
                .number(8, u64::MAX)
                .number(10, 0)
        };
        let numbers = (1..=13).fold(Message::new(), |message, field| {
            message.number(field, FIRST_ADDRESS)
        });
        // Flags as mmap knows them; status: regular, and anonymous private (bit 9) or memfd (bit 14).
        let private = area(FIRST_ADDRESS, FIRST_ADDRESS + private, 0, 0x22, 1 | 1 << 9);
        let shared = area(
            shared_begin,
            shared_begin + shared * PAGE_BYTES as u64,
            SHMID,
            0x01,
            1 | 1 << 14,
        );
        numbers.message(14, &private).message(14, &shared)
    }
}

/// Place of the page that is number `index` among those that the process touched.
fn address(index: usize) -> u64 {
    (index + index / PAGES_PER_HOLE) as u64 * PAGE_BYTES as u64
}

/// Pages side by side in one pagemap entry.
#[derive(Clone, Copy, Debug)]
struct Run {
    begin: u64,
    pages: u64,
    flags: u64,
}

impl Run {
    fn continues(self, address: u64, flags: u64) -> bool {
        let end = self.begin + self.pages * PAGE_BYTES as u64;
        self.flags == flags && end == address && self.pages < RUN_PAGES
    }

    /// As CRIU 4.2 writes it: the count only in the new field.
    fn entry(self) -> Option<Message> {
        let entry = Message::new().number(1, self.begin).number(2, 0);
        let entry = entry.number(4, self.flags).number(5, self.pages);
        (self.pages > 0).then_some(entry)
    }
}

fn inventory() -> Message {
    let objects = kernel_objects();
    Message::new()
        .number(1, 2)
        .number(2, 1)
        .message(3, &objects)
        .number(4, 1)
        .number(5, 1)
        .number(6, 0)
        .number(11, 1)
        .message(12, &Message::new())
        .bytes(13, b"00000000-0000-4000-8000-000000000000")
}

fn kernel_objects() -> Message {
    (1..=12).fold(Message::new(), |message, field| {
        message.number(field, u64::from(field))
    })
}
