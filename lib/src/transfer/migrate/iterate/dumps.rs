//! Dumps that an embedder has made.

use std::path::PathBuf;

use super::{Dumps, Pass, PrecopySource, Read};
use crate::image::{Chain, DirId, ImageError, PagemapName, PagesReader, ResolvedRun, Source};
use crate::page::PageSize;
use crate::transfer::clock::Clock;
use crate::transfer::migrate::MigrateError;

/// [`Dumps`] as a source of pre-copy.
#[derive(Debug)]
pub(in crate::transfer::migrate) struct ReadDumps {
    dumps: Dumps,
    page: PageSize,
    next: Option<PathBuf>,
    /// The directory that was read last, to its end.
    last: Option<DirId>,
}

/// Why a directory is not read further.
enum End {
    Stopped,
    Image(ImageError),
}

impl From<ImageError> for End {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl ReadDumps {
    pub(super) fn new(dumps: Dumps, page: PageSize) -> Self {
        Self {
            dumps,
            page,
            next: None,
            last: None,
        }
    }

    fn chain(&mut self) -> Result<Chain, ImageError> {
        let path = self.next.take().expect("prepared before");
        let chain = Chain::open(path, Some(self.page))?;
        chain.require_understood()?;
        Ok(chain)
    }

    fn read_chain(&self, chain: &Chain, pass: &mut Pass<'_>) -> Result<(), End> {
        // What this dump leaves to the one that was read before has not changed.
        let follows = |parent: &crate::image::Level| Some(parent.id()) == self.last;
        let follows = chain.levels().get(1).is_some_and(follows);
        let mut pages = PagesReader::new(chain);
        let names: Vec<PagemapName> = chain.newest().pagemaps().keys().copied().collect();
        for name in names {
            for run in chain.resolve(name)? {
                if run.source == Source::Lazy {
                    continue;
                }
                if follows && run.flags_at_top.is_parent() {
                    pass.covered(run.pages);
                    continue;
                }
                read_run(&mut pages, name, &run, pass)?;
            }
        }
        Ok(())
    }
}

fn read_run(
    pages: &mut PagesReader<'_>,
    name: PagemapName,
    run: &ResolvedRun,
    pass: &mut Pass<'_>,
) -> Result<(), End> {
    pages.for_each_piece(name, run, |address, bytes| {
        if pass.pages(name, address, bytes) {
            Ok(())
        } else {
            Err(End::Stopped)
        }
    })
}

impl PrecopySource for ReadDumps {
    fn method(&self) -> &'static str {
        "dumps by the caller"
    }

    fn prepare(&mut self, number: u32) -> Result<bool, MigrateError> {
        let mut next = self.dumps.0.lock().map_err(|_| MigrateError::Dump {
            number,
            source: std::io::Error::other("the caller's code has panicked"),
        })?;
        self.next = next(number).map_err(|source| MigrateError::Dump { number, source })?;
        Ok(self.next.is_some())
    }

    fn read(&mut self, pass: &mut Pass<'_>) -> Result<Read, MigrateError> {
        let clock = Clock::start();
        let chain = self.chain()?;
        self.last = match self.read_chain(&chain, pass) {
            Ok(()) => Some(chain.newest().id()),
            Err(End::Stopped) => None,
            Err(End::Image(error)) => return Err(error.into()),
        };
        let frozen = chain.stats()?.map(|stats| stats.frozen_time);
        Ok(Read {
            took: clock.elapsed(),
            frozen: frozen.map(|micros| std::time::Duration::from_micros(micros.into())),
            ..Read::default()
        })
    }
}
