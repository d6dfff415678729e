//! The driver of [`PageServer`]: reads CRIU's memory from a socket.
//!
//! One thread calls [`serve`] while another one sits in [`Worker::dump`](super::Worker::dump). Page
//! data is copied once, by the kernel, from the socket to the buffer that the sink gets.

use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};

use super::page_server::{
    BATCH_BYTES, Batch, Event, HeaderLayout, PageServer, PageServerError, Reply, Want,
};
use crate::image::{PageRun, PagemapName};
use crate::page::PageSize;

/// What CRIU may write ahead of us, in bytes: a whole batch. Measured with 265 MB on a busy machine,
/// the dump takes 0.45 to 0.48 s (median of 7) with up to the kernel's default of 208 KiB, and 0.36
/// to 0.42 s with 512 KiB to 8 MiB, in no order.
const SEND_BUFFER: usize = 1 << 20;

/// Smallest batch that gets a buffer of the pool. Below, an allocation of its own costs little, and a
/// sink that keeps many small batches does not keep a large buffer for each.
const POOLED_BYTES: usize = 256 << 10;

/// Buffers that are kept for use again: a sink that is done with each batch at once needs one, one
/// with a few threads behind it a few.
const MOST_FREE: usize = 16;

/// An error of a sink, of whatever kind.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Where memory goes. All calls come from the thread in [`serve`], in the order of the stream.
///
/// Until `close` the tree is frozen (in a final dump), so time spent here is downtime. On an error
/// the socket should be dropped: CRIU then fails its dump and resumes the tree.
pub trait PageSink {
    /// The memory of `space` follows: everything that is dumped of it, ascending. Whether its pages
    /// of the iteration before are held; if so CRIU leaves out those that did not change since.
    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError>;

    /// Whether `space` will be answered with true by `open`. Only pre-dumps ask.
    fn has_parent(&mut self, space: PagemapName) -> Result<bool, SinkError>;

    /// Whole pages: at most 1 MiB, not crossing a multiple of 1 MiB in the address space.
    ///
    /// The bytes may be kept; their buffer is used again when the last handle to it is dropped.
    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError>;

    /// Pages without bytes: in the parent, left at the source (lazy), or zero, as the flags say.
    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError>;

    /// There is no more. 0 accepts; anything else makes CRIU fail and resume the tree. That CRIU sent
    /// all does not mean that its dump is good.
    fn close(&mut self) -> Result<i32, SinkError>;
}

/// What a finished session was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// Whose headers: tells CRIU up to 4.1 from later ones.
    pub layout: Option<HeaderLayout>,
    /// Tasks and shared segments.
    pub spaces: u64,
    /// Bytes of page data.
    pub bytes: u64,
    /// What `close` answered.
    pub status: i32,
    /// CRIU was given its socket, and leaves it open: the next session may begin on it.
    pub keeps_socket: bool,
}

/// Why a session did not end with its CLOSE.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// CRIU's stream cannot be taken.
    #[error(transparent)]
    Stream(#[from] PageServerError),
    /// The socket fails; also when a read timeout of the socket passes.
    #[error("CRIU's memory stream: cannot {action} ({source})")]
    Io {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The sink does not take it.
    #[error("memory from CRIU cannot be kept: {0}")]
    Sink(SinkError),
}

/// A connected pair: our end, for [`serve`], and CRIU's, for [`Worker::start`](super::Worker::start).
pub fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    // The plain call is bounded by net.core.wmem_max; it is only slower, so failing is no error.
    if set_socket_send_buffer_size_force(&theirs, SEND_BUFFER).is_err() {
        let _ = set_socket_send_buffer_size(&theirs, SEND_BUFFER);
    }
    Ok((ours, theirs.into()))
}

/// Takes one session from `socket` to `sink`, to its CLOSE.
///
/// Blocks. To give up early from another thread, shut the socket down; to give up by time, set its
/// read timeout before. `page_size` is this host's.
pub fn serve(
    socket: &mut (impl Read + Write),
    page_size: PageSize,
    sink: &mut dyn PageSink,
) -> Result<Served, ServeError> {
    serve_next(socket, page_size, None, sink)
}

/// The same on a socket whose earlier session had this layout.
pub fn serve_next(
    socket: &mut (impl Read + Write),
    page_size: PageSize,
    layout: Option<HeaderLayout>,
    sink: &mut dyn PageSink,
) -> Result<Served, ServeError> {
    let mut session = Session {
        server: PageServer::following(page_size, layout),
        header: HeaderBytes::default(),
        buffers: Buffers::default(),
        served: Served {
            layout: None,
            spaces: 0,
            bytes: 0,
            status: 0,
            keeps_socket: false,
        },
    };
    loop {
        match session.server.wants() {
            Want::Header(missing) => {
                if let Some(event) = session.read_header(socket, missing)? {
                    session.handle(event, socket, sink)?;
                }
            }
            Want::Batch(batch) => {
                let bytes = session.read_batch(socket, &batch)?;
                sink.pages(&batch, bytes).map_err(ServeError::Sink)?;
            }
            // Every event that asks is answered where it is handled.
            Want::Answer | Want::Nothing => {
                session.served.layout = session.server.layout();
                return Ok(session.served);
            }
        }
    }
}

#[derive(Debug)]
struct Session {
    server: PageServer,
    header: HeaderBytes,
    buffers: Buffers,
    served: Served,
}

/// Header bytes that were read together with the pages before them.
#[derive(Debug, Default)]
struct HeaderBytes {
    bytes: [u8; 32],
    len: usize,
}

impl Session {
    fn read_header(
        &mut self,
        socket: &mut impl Read,
        missing: usize,
    ) -> Result<Option<Event>, ServeError> {
        let header = &mut self.header;
        if header.len == 0 {
            let room = missing.min(header.bytes.len());
            header.len = read(|| socket.read(&mut header.bytes[..room]))?;
        }
        if header.len == 0 {
            self.server.end_of_stream()?;
        }
        // Never more was read than the server said, so all of it is taken.
        let (_, event) = self.server.header(&header.bytes[..header.len])?;
        header.len = 0;
        Ok(event)
    }

    fn read_batch(&mut self, socket: &mut impl Read, batch: &Batch) -> Result<Bytes, ServeError> {
        let mut buffer = self.buffers.get(batch.len);
        let pages = &mut buffer.bytes[..batch.len];
        let mut filled = 0;
        while filled < batch.len {
            let behind = &mut self.header.bytes[..batch.header_follows.min(32)];
            let mut places = [
                IoSliceMut::new(&mut pages[filled..]),
                IoSliceMut::new(behind),
            ];
            match read(|| socket.read_vectored(&mut places))? {
                0 => self.server.end_of_stream()?,
                count => filled += count,
            }
        }
        self.header.len = filled - batch.len;
        self.server.batch_read();
        self.served.bytes += batch.len as u64;
        Ok(buffer.into_bytes(batch.len))
    }

    fn handle(
        &mut self,
        event: Event,
        socket: &mut impl Write,
        sink: &mut dyn PageSink,
    ) -> Result<(), ServeError> {
        match event {
            Event::Open { space, asks } => {
                self.served.spaces += 1;
                let has_parent = sink.open(space).map_err(ServeError::Sink)?;
                if asks {
                    send(socket, self.server.answer_parent(has_parent)?)?;
                }
            }
            Event::Parent { space } => {
                let has_parent = sink.has_parent(space).map_err(ServeError::Sink)?;
                send(socket, self.server.answer_parent(has_parent)?)?;
            }
            Event::Run { run, .. } if run.flags.is_present() => {}
            Event::Run { space, run } => sink.elsewhere(space, run).map_err(ServeError::Sink)?,
            Event::Close { force } => {
                self.served.keeps_socket = force;
                self.served.status = sink.close().map_err(ServeError::Sink)?;
                send(socket, self.server.answer_close(self.served.status)?)?;
            }
        }
        Ok(())
    }
}

fn read(mut read: impl FnMut() -> io::Result<usize>) -> Result<usize, ServeError> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A killed CRIU, with an answer of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
            result => {
                return result.map_err(|source| ServeError::Io {
                    action: "read",
                    source,
                });
            }
        }
    }
}

fn send(socket: &mut impl Write, reply: Reply) -> Result<(), ServeError> {
    let gone = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
    socket.write_all(reply.as_ref()).map_err(|source| {
        if gone.contains(&source.kind()) {
            return PageServerError::Cut("before an answer").into();
        }
        ServeError::Io {
            action: "answer",
            source,
        }
    })
}

/// Buffers of [`BATCH_BYTES`], used again once their readers let go of them: fresh memory would cost
/// a page fault for each page of the dump.
#[derive(Clone, Debug, Default)]
struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// Bytes to read into, and where they return to.
#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    home: Option<Buffers>,
}

impl Buffers {
    fn get(&self, len: usize) -> Buffer {
        let whole = usize::try_from(BATCH_BYTES).unwrap_or(len);
        // Pages larger than a batch also get buffers of their own.
        if !(POOLED_BYTES..=whole).contains(&len) {
            return Buffer {
                bytes: vec![0; len],
                len,
                home: None,
            };
        }
        let free = self.0.lock().ok().and_then(|mut free| free.pop());
        Buffer {
            bytes: free.unwrap_or_else(|| vec![0; whole]),
            len,
            home: Some(self.clone()),
        }
    }
}

impl Buffer {
    fn into_bytes(mut self, len: usize) -> Bytes {
        self.len = len;
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let free = self.home.as_ref().map(|home| home.0.lock());
        if let Some(Ok(mut free)) = free
            && free.len() < MOST_FREE
        {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests;
