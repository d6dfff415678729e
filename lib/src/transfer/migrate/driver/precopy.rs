//! Iterations while the tree runs.

use std::ops::ControlFlow::{Break, Continue};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::spawn_blocking;

use super::{Begun, Command, Counted, Driver, Event, Input};
use crate::delta::{Compared, Outgoing};
use crate::live::{LiveReader, Method, ReaderOptions};
use crate::precopy::{Decision, Iteration};
use crate::transfer::TransferError;
use crate::transfer::migrate::iterate::{Reading, Scanned, iterate};
use crate::transfer::migrate::report::IterationReport;
use crate::transfer::migrate::stream::RecordStream;
use crate::transfer::migrate::{MigrateError, MigrateEvent};

impl Driver<'_> {
    pub(super) async fn iterations(&mut self) -> Result<Outgoing, MigrateError> {
        let bulk = self.connection.open_bulk().await;
        let bulk = bulk.map_err(TransferError::from)?;
        let input = self.input.clone();
        let stream = RecordStream::start(bulk, self.options.bytes_per_s, move |error| {
            let _ = input.send(Input::Ended(error));
        });
        self.stream = Some(stream.clone());
        let reader = ReaderOptions {
            bytes_per_s: self.options.read_bytes_per_s,
            ..ReaderOptions::default()
        };
        let (pid, page) = (self.options.pid, self.page);
        let opening = spawn_blocking(move || LiveReader::new(pid, page, reader));
        let reader = self.job(opening).await??;
        self.report.method = match reader.method() {
            Method::PagemapScan => "live, PAGEMAP_SCAN",
            Method::Pagemap => "live, pagemap",
        };
        let mut reading = Reading {
            outgoing: Outgoing::new(page),
            reader,
        };
        loop {
            reading = self.iterate(reading, &stream).await?;
            match self.decision() {
                Decision::Again => {}
                Decision::Freeze(why) => {
                    self.report.why_frozen = Some(why);
                    return Ok(reading.outgoing);
                }
                Decision::GiveUp(why) => return Err(MigrateError::GivenUp(why)),
            }
        }
    }

    pub(super) async fn iterate(
        &mut self,
        mut reading: Reading,
        stream: &RecordStream,
    ) -> Result<Reading, MigrateError> {
        let number = self.session.begin_iteration();
        let (begun, begun_ns) = (self.clock.elapsed(), self.clock.now_ns());
        let bytes_before = stream.written().bytes();
        self.emit(MigrateEvent::IterationBegun(number));
        let counted = Arc::<Counted>::default();
        self.iterating = Some(Begun {
            number,
            begin: begun,
            bytes_before,
            busy_before: stream.written().busy(),
            counted: counted.clone(),
        });
        stream.stop(false);
        let (page, to) = (self.page, stream.clone());
        let scanning = spawn_blocking(move || {
            let mut count = |compared: &Compared| {
                let bytes = |pages| pages * page.bytes();
                counted
                    .scanned
                    .store(bytes(compared.pages), Ordering::Relaxed);
                counted
                    .changed
                    .store(bytes(compared.changed), Ordering::Relaxed);
            };
            let scanned = iterate(&mut reading, &to, number, &mut count);
            (reading, scanned)
        });
        let (reading, scanned) = self.job(scanning).await?;
        let scanned = scanned?;
        let streamed = self.clock.elapsed();
        self.session.end_iteration();
        let work = self
            .until(|event| match event {
                Event::Session(Command::Stored { work, .. }) => Break(work),
                other => Continue(other),
            })
            .await?;
        self.iterating = None;
        let stream_bytes = stream.written().bytes() - bytes_before;
        self.iterated(number, begun, streamed, &scanned, stream_bytes, work);
        let name = format!("iteration {number}");
        self.phase(&name, begun_ns, self.clock.now_ns());
        Ok(reading)
    }

    pub(super) fn iterated(
        &mut self,
        number: u32,
        begun: Duration,
        streamed: Duration,
        scanned: &Scanned,
        stream_bytes: u64,
        work: Duration,
    ) {
        let end = self.clock.elapsed();
        let compared = scanned.compared;
        let scan_time = scanned.pass.took.saturating_sub(scanned.pass.waited);
        let iteration = Iteration {
            number,
            begin: begun,
            end,
            scanned_bytes: compared.pages * self.page.bytes(),
            scan_time: scan_time.saturating_sub(scanned.link_wait),
            changed_bytes: compared.changed * self.page.bytes(),
            wire_bytes: stream_bytes,
            send_time: scanned.link_wait + (end - streamed),
        };
        let decision = self.policy.after(&iteration);
        self.cut_short = Some(decision);
        let prediction = self.policy.predict();
        let took = end - begun;
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let bytes_per_s = stream_bytes as f64 / took.as_secs_f64().max(1e-9);
        let report = IterationReport {
            number,
            scanned_pages: compared.pages,
            changed_pages: compared.changed,
            sent_pages: compared.sent,
            stream_bytes,
            took,
            link_wait: scanned.link_wait,
            destination_wait: end - streamed,
            destination_work: work,
            bytes_per_s,
            predicted_downtime: prediction.downtime,
            dirty_bytes_per_s: prediction.dirty_bytes_per_s,
        };
        self.emit(MigrateEvent::IterationDone(report.clone()));
        self.report.iterations.push(report);
    }

    pub(super) fn decision(&mut self) -> Decision {
        self.cut_short.take().unwrap_or(Decision::Again)
    }
}
