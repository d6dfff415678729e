//! One iteration: the running tree is read, what changed goes onto the stream.

use std::ops::ControlFlow;
use std::time::Duration;

use super::stream::RecordStream;
use crate::delta::{Compared, Outgoing};
use crate::live::{LiveError, LiveReader, Pass};

/// The source's parts that read and send, which move from thread to thread.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) outgoing: Outgoing,
    pub(super) reader: LiveReader,
}

/// What one iteration came to.
#[derive(Debug)]
pub(super) struct Scanned {
    pub(super) pass: Pass,
    pub(super) compared: Compared,
    /// Time in which the stream was waited for.
    pub(super) link_wait: Duration,
}

/// Reads the tree once. Blocks. An ended stream is reported by its writer: then what was read so far
/// is returned as if the pass had been stopped.
pub(super) fn iterate(
    reading: &mut Reading,
    stream: &RecordStream,
    number: u32,
    progress: &mut dyn FnMut(&Compared),
) -> Result<Scanned, LiveError> {
    let mut records = Vec::new();
    let mut compared = Compared::default();
    let busy_before = stream.written().busy();
    let outgoing = &mut reading.outgoing;
    outgoing.begin(number, false, &mut records);
    let pass = reading.reader.pass(&mut |chunk| {
        compared += outgoing.pages(chunk.space, chunk.address, chunk.bytes, &mut records);
        progress(&compared);
        match stream.put(number, &mut records) {
            Ok(()) if !stream.is_stopped() => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    })?;
    outgoing.end(&mut records);
    let _ = stream
        .put(number, &mut records)
        .and_then(|()| stream.drained());
    Ok(Scanned {
        pass,
        compared,
        link_wait: stream.written().busy().saturating_sub(busy_before),
    })
}
