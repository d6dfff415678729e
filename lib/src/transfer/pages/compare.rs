//! Compares memory with what the destination holds, beside the thread that copies it out of CRIU's
//! socket.

use std::sync::mpsc::Receiver;

use bytes::Bytes;

use crate::criu::page_server::Batch;
use crate::delta::{Missing, Outgoing, Record};
use crate::digest::Digest;
use crate::image::{PageRun, PagemapName};
use crate::session::SessionError;
use crate::transfer::TransferError;
use crate::transfer::migrate::{RecordStream, StreamEnded};
use crate::wire::{Failure, FailureCode, StreamNote};

/// The only iteration of a page session.
const NUMBER: u32 = 1;

/// What CRIU's stream says, in order.
#[derive(Debug)]
pub(super) enum Piece {
    Open(PagemapName),
    Pages(Batch, Bytes),
    InParent(PagemapName, PageRun),
    End,
}

/// A dump that is on the stream whole.
#[derive(Debug)]
pub(super) struct Compared {
    pub(super) outgoing: Outgoing,
    pub(super) root: Digest,
}

#[derive(Debug)]
pub(super) struct Comparer {
    outgoing: Outgoing,
    stream: RecordStream,
    records: Vec<Record>,
    begun: bool,
}

impl Comparer {
    pub(super) fn new(outgoing: Outgoing, stream: RecordStream) -> Self {
        Self {
            outgoing,
            stream,
            records: Vec::new(),
            begun: false,
        }
    }

    /// To the end of the dump.
    pub(super) fn run(mut self, pieces: &Receiver<Piece>) -> Result<Box<Compared>, TransferError> {
        for piece in pieces {
            // Not before: a connection that CRIU never came to has lost no dump.
            if !std::mem::replace(&mut self.begun, true) {
                self.outgoing.begin(NUMBER, true, &mut self.records);
            }
            if matches!(piece, Piece::End) {
                return self.end();
            }
            self.take(piece).map_err(|error| not_held(&error))?;
            if !self.records.is_empty() {
                self.stream.put(NUMBER, &mut self.records).map_err(ended)?;
            }
        }
        Err(TransferError::Cancelled)
    }

    fn take(&mut self, piece: Piece) -> Result<(), Missing> {
        let records = &mut self.records;
        match piece {
            Piece::Open(space) => self.outgoing.open_dumped(space, records),
            Piece::Pages(batch, bytes) => {
                let (space, flags) = (batch.space, batch.flags);
                self.outgoing
                    .dumped_pages(space, batch.vaddr, flags, &bytes, records);
            }
            Piece::InParent(space, run) => {
                self.outgoing
                    .dumped_in_parent(space, run.vaddr, run.pages, records)?;
            }
            Piece::End => {}
        }
        Ok(())
    }

    fn end(mut self) -> Result<Box<Compared>, TransferError> {
        self.outgoing.end(&mut self.records);
        let root = self.records.iter().find_map(|record| match record {
            Record::Note(StreamNote::End { root, .. }) => *root,
            _ => None,
        });
        let root = root.expect("a final iteration ends with its root");
        self.stream.put(NUMBER, &mut self.records).map_err(ended)?;
        let outgoing = self.outgoing;
        Ok(Box::new(Compared { outgoing, root }))
    }
}

// Why, the connection knows.
fn ended(_: StreamEnded) -> TransferError {
    TransferError::Cancelled
}

fn not_held(error: &Missing) -> TransferError {
    let reason = format!(
        "{error}: the destination does not hold what this dump builds on; dump all of the memory (no --prev-images-dir), or begin with the pre-dump again"
    );
    SessionError::Local(Failure::new(FailureCode::Content, reason)).into()
}
