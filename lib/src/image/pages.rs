//! Page bytes of a chain, read by resolved run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::chain::Chain;
use super::error::ImageError;
use super::name::PagemapName;
use super::resolve::{ResolvedRun, Source};

/// Most pages files kept open at once. A chain may have more levels than a process may have
/// descriptors.
const MAX_OPEN: usize = 64;

/// Most bytes handed out at once by [`PagesReader::for_each_piece`].
const PIECE_BYTES: u64 = 1 << 20;

/// Reads the pages of a chain, keeping the files open that it needed last.
#[derive(Debug)]
pub struct PagesReader<'a> {
    chain: &'a Chain,
    open: BTreeMap<(usize, PagemapName), (File, PathBuf)>,
    buffer: Vec<u8>,
}

impl<'a> PagesReader<'a> {
    /// A reader of `chain`.
    pub fn new(chain: &'a Chain) -> Self {
        Self {
            chain,
            open: BTreeMap::new(),
            buffer: Vec::new(),
        }
    }

    /// Hands the pages of `run`, of pagemap `name`, to `take` in pieces of whole pages, with the
    /// address of each piece's first page. Zero pages come as zeros; pages left at the source are
    /// an error.
    pub fn for_each_piece<E: From<ImageError>>(
        &mut self,
        name: PagemapName,
        run: &ResolvedRun,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let page_bytes = self.chain.page_size().bytes();
        let step = (PIECE_BYTES / page_bytes).max(1);
        let mut done = 0;
        while done < run.pages {
            let pages = step.min(run.pages - done);
            self.read(name, run, done, pages)?;
            take(run.vaddr + done * page_bytes, &self.buffer)?;
            done += pages;
        }
        Ok(())
    }

    /// Reads `pages` pages of `run`, `skip` pages from its begin, into `self.buffer`.
    fn read(
        &mut self,
        name: PagemapName,
        run: &ResolvedRun,
        skip: u64,
        pages: u64,
    ) -> Result<(), ImageError> {
        let page_size = self.chain.page_size();
        let length = usize::try_from(pages).expect("a piece is small") * page_size.byte_len();
        self.buffer.clear();
        self.buffer.resize(length, 0);
        match run.source {
            Source::Zero => Ok(()),
            Source::Lazy => Err(ImageError::LazyPages {
                file: name.to_string(),
                vaddr: run.vaddr,
                pages: run.pages,
            }),
            Source::At { level, page } => {
                self.read_at(name, level, (page + skip) * page_size.bytes())
            }
        }
    }

    fn read_at(&mut self, name: PagemapName, level: usize, offset: u64) -> Result<(), ImageError> {
        if !self.open.contains_key(&(level, name)) {
            if self.open.len() >= MAX_OPEN {
                self.open.clear();
            }
            self.open
                .insert((level, name), self.chain.open_pages(level, name)?);
        }
        let (file, path) = &self.open[&(level, name)];
        match file.read_exact_at(&mut self.buffer, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let size = file.metadata().map_or(0, |metadata| metadata.len());
                let needed = offset + self.buffer.len() as u64;
                Err(ImageError::ShortPages {
                    path: path.clone(),
                    size,
                    needed,
                })
            }
            Err(error) => Err(ImageError::io(path, "read pages")(error)),
        }
    }
}
