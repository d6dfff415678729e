//! What a chain holds, counted: for `crxfer inspect` and `crxfer diff`.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::path::PathBuf;

use super::chain::Chain;
use super::complete::Completeness;
use super::error::ImageError;
use super::inventory::Inventory;
use super::name::{FileKind, PagemapName};
use super::pagemap::{CountForm, MAX_FILE_BYTES, count_form};
use super::pages::PagesReader;
use super::resolve::{ResolvedRun, Source};
use super::stats::DumpStats;
use crate::digest::Digest;
use crate::page::PageSize;

/// What one image directory holds, its ancestors counted in where pages come from there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The newest directory.
    pub path: PathBuf,
    /// Directories in the chain, the newest included.
    pub levels: usize,
    /// Text of its `parent` link.
    pub parent: Option<String>,
    /// Page size found or given.
    pub page_size: PageSize,
    /// Its inventory.
    pub inventory: Option<Inventory>,
    /// Statistics of the dump.
    pub stats: Option<DumpStats>,
    /// Which CRIU wrote it, as far as the files tell.
    pub criu: CriuVersion,
    /// Whether CRIU could restore it.
    pub completeness: Completeness,
    /// Files of the newest directory.
    pub files: u64,
    /// Their sizes together, in bytes.
    pub bytes: u64,
    /// What they occupy, in bytes; less where files have holes.
    pub allocated: u64,
    /// One for each pagemap, tasks before shared segments.
    pub memory: Vec<MemorySummary>,
}

impl Summary {
    /// The sum of one count over all pagemaps.
    pub fn total(&self, count: impl Fn(&MemorySummary) -> u64) -> u64 {
        self.memory.iter().map(count).sum()
    }
}

/// The memory of one task or shared segment. All counts but `runs` are pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySummary {
    /// The pagemap.
    pub name: PagemapName,
    /// Command name of the task, if the directory says.
    pub comm: Option<String>,
    /// Number in the name of its pages file.
    pub pages_id: u32,
    /// Entries of the pagemap.
    pub runs: u64,
    /// All pages.
    pub pages: u64,
    /// Content in this directory.
    pub present: u64,
    /// Content in an ancestor.
    pub from_parent: u64,
    /// Content in no file: left at the source by a lazy dump.
    pub left_at_source: u64,
    /// Content is all zeros.
    pub zero: u64,
    /// Content was seen before in this set, in this pagemap or an earlier one (zero pages apart).
    pub duplicate: u64,
}

/// Which CRIU wrote a directory. Images do not say; the form of a few fields does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CriuVersion {
    /// Before 1.6: images have one magic number only.
    Before1_6,
    /// No field that 4.1 introduced; in pre-dumps 4.1 does not write it either.
    UpTo4_1,
    /// Run id of 4.1, page counts in the old field.
    V4_1,
    /// Page counts in the new field.
    From4_2,
    /// Rewritten in the form that both read.
    Rewritten,
    /// Nothing tells.
    Unknown,
}

impl fmt::Display for CriuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Before1_6 => "before 1.6",
            Self::UpTo4_1 => "4.1 or older",
            Self::V4_1 => "4.1",
            Self::From4_2 => "4.2 or newer",
            Self::Rewritten => "rewritten for all versions",
            Self::Unknown => "unknown",
        })
    }
}

/// Counts what `chain` holds. Reads every page once.
pub fn inspect(chain: &Chain) -> Result<Summary, ImageError> {
    chain.require_understood()?;
    let newest = chain.newest();
    let files = &newest.listing().files;
    let tree = chain.process_tree().ok().flatten().unwrap_or_default();
    let mut counter = Counter {
        reader: PagesReader::new(chain),
        seen: HashSet::new(),
    };
    let mut memory = Vec::new();
    for (&name, pagemap) in newest.pagemaps() {
        let task = tree
            .tasks
            .iter()
            .find(|task| PagemapName::Task(task.pid.into()) == name);
        let mut summary = MemorySummary {
            name,
            comm: task.and_then(|task| task.comm.clone()),
            pages_id: pagemap.pages_id(),
            runs: pagemap.runs().len() as u64,
            pages: pagemap.pages(),
            present: pagemap.present_pages(),
            from_parent: pagemap.pages_where(|flags| flags.is_parent()),
            left_at_source: 0,
            zero: 0,
            duplicate: 0,
        };
        for run in chain.resolve(name)? {
            counter.count(&mut summary, &run, chain.page_size())?;
        }
        memory.push(summary);
    }
    Ok(Summary {
        path: newest.path().to_owned(),
        levels: chain.levels().len(),
        parent: newest
            .listing()
            .parent
            .as_ref()
            .map(|link| link.text.clone()),
        page_size: chain.page_size(),
        inventory: chain.inventory().cloned(),
        stats: chain.stats()?,
        criu: criu_version(chain)?,
        completeness: chain.completeness(),
        files: files.len() as u64,
        bytes: files.iter().map(|file| file.stat.size).sum(),
        allocated: files.iter().map(|file| file.stat.allocated).sum(),
        memory,
    })
}

struct Counter<'a> {
    reader: PagesReader<'a>,
    /// Half a digest is enough to count by, and halves the memory that this takes.
    seen: HashSet<[u8; 16]>,
}

impl Counter<'_> {
    fn count(
        &mut self,
        summary: &mut MemorySummary,
        run: &ResolvedRun,
        page_size: PageSize,
    ) -> Result<(), ImageError> {
        match run.source {
            Source::Lazy => summary.left_at_source += run.pages,
            Source::Zero => summary.zero += run.pages,
            Source::At { .. } => self.reader.for_each_piece(summary.name, run, |_, bytes| {
                for page in bytes.chunks(page_size.byte_len()) {
                    if page.iter().all(|&byte| byte == 0) {
                        summary.zero += 1;
                    } else if !self.seen.insert(half_digest(page)) {
                        summary.duplicate += 1;
                    }
                }
                Ok::<(), ImageError>(())
            })?,
        }
        Ok(())
    }
}

fn half_digest(page: &[u8]) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&Digest::of(page).0[..16]);
    half
}

fn criu_version(chain: &Chain) -> Result<CriuVersion, ImageError> {
    let directory = chain.open_dir(0)?;
    let mut forms = BTreeSet::new();
    for file in &chain.newest().listing().files {
        if matches!(file.kind, FileKind::Pagemap(_)) {
            forms.extend(count_form(
                &directory.read_small(&file.name, MAX_FILE_BYTES)?,
            ));
        }
    }
    let inventory = chain.inventory();
    let has_run_id = inventory.is_some_and(|inventory| inventory.criu_run_id.is_some());
    Ok(match forms.last() {
        _ if inventory.is_some_and(|inventory| inventory.img_version == 1) => {
            CriuVersion::Before1_6
        }
        Some(CountForm::New) => CriuVersion::From4_2,
        Some(CountForm::Both) => CriuVersion::Rewritten,
        Some(CountForm::Old) if has_run_id => CriuVersion::V4_1,
        Some(CountForm::Old) => CriuVersion::UpTo4_1,
        None => CriuVersion::Unknown,
    })
}
