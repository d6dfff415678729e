//! Iterations while the tree runs.

use std::ops::ControlFlow::{Break, Continue};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::spawn_blocking;

use super::{Begun, Command, Counted, Driver, Event, Input};
use crate::delta::Outgoing;
use crate::live::ReaderOptions;
use crate::precopy::{Decision, Iteration, Why};
use crate::transfer::migrate::iterate::{self, PrecopySource, Scanned, Setup};
use crate::transfer::migrate::report::IterationReport;
use crate::transfer::migrate::stream::RecordStream;
use crate::transfer::migrate::{MigrateError, MigrateEvent, Precopy};
use crate::transfer::{TransferError, costs, pause};

/// The parts that read and compare, which move from thread to thread.
pub(super) struct Reading {
    outgoing: Outgoing,
    source: Box<dyn PrecopySource>,
}

impl Driver<'_> {
    pub(super) async fn iterations(&mut self) -> Result<Outgoing, MigrateError> {
        let bulk = self.connection.open_bulk().await;
        let bulk = bulk.map_err(TransferError::from)?;
        let input = self.input.clone();
        let stream = RecordStream::start(
            self.connection,
            bulk,
            self.options.bytes_per_s,
            move |error| {
                let _ = input.send(Input::Ended(error));
            },
        );
        self.stream = Some(stream.clone());
        let mut reading = Reading {
            outgoing: Outgoing::new(self.page),
            source: self.open_source().await?,
        };
        loop {
            let decision;
            (reading, decision) = self.iterate(reading, &stream).await?;
            self.report.method = reading.source.method();
            match decision {
                Decision::Again => {}
                Decision::Freeze(why) => {
                    self.report.why_frozen = Some(why);
                    self.parent = reading.source.into_parent();
                    self.is_chained = self.parent.is_some();
                    return Ok(reading.outgoing);
                }
                Decision::GiveUp(why) => return Err(MigrateError::GivenUp(why)),
            }
        }
    }

    async fn open_source(&mut self) -> Result<Box<dyn PrecopySource>, MigrateError> {
        let reader = ReaderOptions {
            bytes_per_s: self.options.read_bytes_per_s,
            ..ReaderOptions::default()
        };
        let setup = Setup {
            pid: self.options.pid,
            program: self.options.program.clone(),
            criu: self.options.criu.clone(),
            work: self.work_path(),
            name: self.id.to_string(),
        };
        let precopy = match (&self.options.external, &self.options.precopy) {
            // A command's dump builds on no pre-dump of ours.
            (Some(_), Precopy::Auto) => Precopy::Live,
            (_, precopy) => precopy.clone(),
        };
        let page = self.page;
        let opening = spawn_blocking(move || iterate::open(&precopy, page, reader, setup));
        let source = self.job(opening).await??;
        self.report.method = source.method();
        Ok(source)
    }

    async fn iterate(
        &mut self,
        mut reading: Reading,
        stream: &RecordStream,
    ) -> Result<(Reading, Decision), MigrateError> {
        let (begun, begun_ns) = (self.clock.elapsed(), self.clock.now_ns());
        let next = u32::try_from(self.report.iterations.len()).unwrap_or(u32::MAX - 1) + 1;
        let preparing = spawn_blocking(move || {
            let is_more = reading.source.prepare(next);
            (reading, is_more)
        });
        let (mut reading, is_more) = self.job(preparing).await?;
        if !is_more? {
            return Ok((reading, Decision::Freeze(Why::NothingMore)));
        }
        let number = self.session.begin_iteration();
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
        pause::at_point("iterating").await;
        stream.stop(false);
        let (page, to) = (self.page, stream.clone());
        let scanning = spawn_blocking(move || {
            let mut count = |covered: u64, changed: u64| {
                let bytes = |pages| pages * page.bytes();
                counted.scanned.store(bytes(covered), Ordering::Relaxed);
                counted.changed.store(bytes(changed), Ordering::Relaxed);
            };
            let Reading { outgoing, source } = &mut reading;
            let scanned = iterate::iterate(source.as_mut(), outgoing, &to, number, &mut count);
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
        let decision = self.iterated(number, begun, streamed, &scanned, stream_bytes, work);
        let name = format!("iteration {number}");
        self.phase(&name, begun_ns, self.clock.now_ns());
        Ok((reading, decision))
    }

    fn iterated(
        &mut self,
        number: u32,
        begun: Duration,
        streamed: Duration,
        scanned: &Scanned,
        stream_bytes: u64,
        work: Duration,
    ) -> Decision {
        let end = self.clock.elapsed();
        let compared = scanned.compared;
        let iteration = Iteration {
            number,
            begin: begun,
            end,
            scanned_bytes: scanned.covered * self.page.bytes(),
            scan_time: scanned.read.took.saturating_sub(scanned.link_wait),
            changed_bytes: compared.changed * self.page.bytes(),
            wire_bytes: stream_bytes,
            send_time: scanned.link_wait + (end - streamed),
        };
        self.expect_dump(number, scanned);
        let decision = self.policy.after(&iteration);
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
            frozen: scanned.read.frozen,
            dirty_bytes_per_s: prediction.dirty_bytes_per_s,
        };
        self.report.notes.extend(scanned.read.note.clone());
        self.emit(MigrateEvent::IterationDone(report.clone()));
        self.report.iterations.push(report);
        decision
    }

    // A dump that builds on a pre-dump does what that did, and the rest of a dump of so little memory.
    fn expect_dump(&mut self, number: u32, scanned: &Scanned) {
        let read = &scanned.read;
        // The first one has no parent: it takes as long as a dump.
        if let Some(frozen) = read.frozen.filter(|_| number > 1 && read.is_parent) {
            let bytes = scanned.compared.pages * self.page.bytes();
            self.policy.set_dump_cost(frozen + costs::dump(bytes));
        }
    }
}
