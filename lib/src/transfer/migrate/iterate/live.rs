//! The running tree, read from outside.

use std::ops::ControlFlow;

use super::{Pass, PrecopySource, Read};
use crate::live::{LiveError, LiveReader, Method, ReaderOptions};
use crate::page::PageSize;
use crate::transfer::migrate::MigrateError;

/// [`LiveReader`] as a source of pre-copy.
#[derive(Debug)]
pub(in crate::transfer::migrate) struct Live {
    reader: LiveReader,
}

impl Live {
    pub(super) fn open(
        pid: u32,
        page: PageSize,
        options: ReaderOptions,
    ) -> Result<Self, LiveError> {
        let reader = LiveReader::new(pid, page, options)?;
        Ok(Self { reader })
    }

    /// Whether everything is read, or only memory that CRIU never pre-dumps.
    pub(super) fn set_only_shared(&mut self, only_shared: bool) {
        self.reader.set_only_shared(only_shared);
    }
}

impl PrecopySource for Live {
    fn method(&self) -> &'static str {
        match self.reader.method() {
            Method::PagemapScan => "live, PAGEMAP_SCAN",
            Method::Pagemap => "live, pagemap",
        }
    }

    fn read(&mut self, pass: &mut Pass<'_>) -> Result<Read, MigrateError> {
        let done = self.reader.pass(&mut |chunk| {
            if pass.pages(chunk.space, chunk.address, chunk.bytes) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        Ok(Read {
            took: done.took.saturating_sub(done.waited),
            ..Read::default()
        })
    }
}
