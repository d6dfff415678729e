//! The sink that the endpoint gets: an upload that says why it failed, and can be ended from outside.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use crxfer::criu::page_client::{PageSink, SinkError};
use crxfer::criu::page_server::Batch;
use crxfer::image::{PageRun, PagemapName};
use crxfer::transfer::TransferError;
use crxfer::transfer::pages::{PagesCanceller, PagesOptions, PagesUpload};
use crxfer::wire::PagesStored;
use tokio::runtime::Handle;

use crate::error::Failed;

/// The upload that CRIU waits for.
#[derive(Clone, Debug, Default)]
pub(super) struct Current(Arc<Mutex<Option<PagesCanceller>>>);

impl Current {
    /// Ends it, if it has not ended: whoever waits for it goes on, and the destination drops what it has.
    pub(super) fn cancel(&self) {
        if let Some(canceller) = self.lock().take() {
            canceller.cancel();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<PagesCanceller>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One dump on its way.
#[derive(Debug)]
pub(super) struct Upload {
    inner: Option<PagesUpload>,
    canceller: PagesCanceller,
    current: Current,
}

impl Upload {
    pub(super) fn connect(
        options: PagesOptions,
        runtime: &Handle,
        current: &Current,
    ) -> Result<Self, SinkError> {
        let inner = PagesUpload::connect(options, runtime.clone())?;
        Ok(Self {
            canceller: inner.canceller(),
            inner: Some(inner),
            current: current.clone(),
        })
    }

    /// Whether there is a way at all.
    pub(super) fn try_once(options: PagesOptions, runtime: &Handle) -> Result<(), Failed> {
        PagesUpload::connect(options, runtime.clone())?;
        Ok(())
    }

    /// What became of it, after CRIU was answered.
    pub(super) fn finish(mut self) -> Result<PagesStored, TransferError> {
        let inner = self.inner.take().ok_or(TransferError::Cancelled)?;
        let result = inner.finish();
        self.current.lock().take();
        result
    }

    /// Its own errors only say that it takes no more.
    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut PagesUpload) -> Result<T, SinkError>,
    ) -> Result<T, SinkError> {
        let inner = self.inner.as_mut().ok_or("the upload has failed")?;
        match call(inner) {
            Ok(value) => Ok(value),
            Err(error) => Err(self.why().unwrap_or(error)),
        }
    }

    fn why(&mut self) -> Option<SinkError> {
        let error = self.inner.take()?.finish().err()?;
        Some(error.into())
    }
}

impl PageSink for Upload {
    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        *self.current.lock() = Some(self.canceller.clone());
        self.call(|inner| inner.open(space))
    }

    fn has_parent(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        *self.current.lock() = Some(self.canceller.clone());
        self.call(|inner| inner.has_parent(space))
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        self.call(|inner| inner.pages(batch, bytes))
    }

    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError> {
        self.call(|inner| inner.elsewhere(space, run))
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        match self.call(PageSink::close)? {
            0 => Ok(0),
            status => self.why().map_or(Ok(status), Err),
        }
    }
}
