//! Where the memory of a dump comes from that a command makes.

use std::io::{self, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::Shutdown;

use crate::criu::endpoint::local::serve_here;
use crate::criu::endpoint::reset;
use crate::criu::page_client::{self, PageSink, SinkError};
use crate::criu::page_server::Batch;
use crate::image::{ImageDir, Pagemap, PagemapName};
use crate::page::PageSize;

/// Bytes of pages that are read and passed on at once. As CRIU's stream has it: no batch crosses a
/// multiple of it.
const BATCH_BYTES: u64 = 1 << 20;

/// Largest pagemap that is read.
const MOST_PAGEMAP_BYTES: u64 = 256 << 20;

/// A page server's listener, of which one connection is taken; or word that there is none.
#[derive(Debug)]
pub(in crate::transfer) struct Door {
    listener: TcpListener,
    shared: Arc<Shared>,
}

/// What the thread that hears of stages tells the one that takes memory.
#[derive(Clone, Debug)]
pub(in crate::transfer) struct DoorKeeper(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The connection, to be shut down where it has to end.
    connection: Option<TcpStream>,
    /// All images are in this directory.
    images: Option<PathBuf>,
    over: bool,
}

/// Where the memory is.
#[derive(Debug)]
pub(in crate::transfer) enum Memory {
    /// A CRIU of our own sends it.
    Pair(UnixStream),
    /// A CRIU that was told of our page server sends it.
    Stream(TcpStream),
    /// It lies in files of this directory.
    Files(PathBuf),
}

impl Memory {
    /// Passes it on as CRIU sends it, to its end.
    pub(in crate::transfer) fn serve(
        self,
        page: PageSize,
        sink: &mut dyn PageSink,
    ) -> Result<(), SinkError> {
        match self {
            Self::Pair(mut socket) => {
                page_client::serve(&mut socket, page, sink)?;
            }
            Self::Stream(stream) => {
                let socket = OwnedFd::from(stream);
                let served = serve_here(&socket, page, sink);
                // The door has a handle to it, too: CRIU must not wait for a socket that nobody reads.
                match served {
                    // What it was told must reach it.
                    Ok(_) => drop(rustix::net::shutdown(&socket, Shutdown::Both)),
                    Err(error) => {
                        reset(&socket);
                        return Err(error.into());
                    }
                }
            }
            Self::Files(images) => read_files(&images, page, sink)?,
        }
        Ok(())
    }
}

impl Door {
    /// Opens one on a free port of 127.0.0.1.
    pub(in crate::transfer) fn open() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            listener,
            shared: Arc::new(Shared {
                wake,
                state: Mutex::default(),
            }),
        })
    }

    pub(in crate::transfer) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    pub(in crate::transfer) fn keeper(&self) -> DoorKeeper {
        DoorKeeper(self.shared.clone())
    }

    /// Waits for CRIU's connection, or for the word where memory is instead. `None`: nothing comes.
    pub(in crate::transfer) fn wait(self) -> Option<Memory> {
        loop {
            let mut polled = [
                PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
                PollFd::new(&self.shared.wake, PollFlags::IN),
            ];
            match poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return None,
            }
            if let Ok((stream, peer)) = self.listener.accept()
                && peer.ip().is_loopback()
                && is_of_this_user(peer)
                && stream.set_nonblocking(false).is_ok()
            {
                // Answers of one byte must not wait for more.
                let _ = stream.set_nodelay(true);
                let mut state = self.shared.state();
                state.connection = stream.try_clone().ok();
                if state.over {
                    return None;
                }
                return Some(Memory::Stream(stream));
            }
            let state = self.shared.state();
            if let Some(images) = &state.images {
                return Some(Memory::Files(images.clone()));
            }
            if state.over {
                return None;
            }
        }
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DoorKeeper {
    /// All images are written: memory that was not sent is in them. True where that is so.
    pub(in crate::transfer) fn is_in(&self, images: &Path) -> bool {
        let mut state = self.0.state();
        if state.connection.is_some() {
            return false;
        }
        state.images = Some(images.to_owned());
        drop(state);
        self.wake();
        true
    }

    /// Nothing more comes; what is being read ends.
    pub(in crate::transfer) fn close(&self) {
        let mut state = self.0.state();
        state.over = true;
        if let Some(connection) = &state.connection {
            // It may be in the middle of writing, where a shutdown would leave it.
            reset(connection);
        }
        drop(state);
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.0.wake, &1_u64.to_ne_bytes());
    }
}

// Programs of other users reach the port, too.
fn is_of_this_user(peer: SocketAddr) -> bool {
    let SocketAddr::V4(peer) = peer else {
        return false;
    };
    let address = u32::from_ne_bytes(peer.ip().octets());
    let local = format!("{address:08X}:{:04X}", peer.port());
    let me = rustix::process::geteuid().as_raw().to_string();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    table.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(1) == Some(&local) && words.nth(5) == Some(&me)
    })
}

/// Reads the memory in the directory `images` and passes it on as CRIU would have sent it.
fn read_files(images: &Path, page: PageSize, sink: &mut dyn PageSink) -> Result<(), SinkError> {
    let directory = ImageDir::open(images)?;
    let listing = directory.list_memory()?;
    let mut names: Vec<String> = listing.files.iter().map(|file| file.name.clone()).collect();
    names.sort();
    for name in names {
        let Some(space) = PagemapName::parse(&name) else {
            continue;
        };
        let bytes = directory.read_small(&name, MOST_PAGEMAP_BYTES)?;
        let pagemap = Pagemap::parse(&bytes, &name, page)?;
        sink.open(space)?;
        let mut pages = None;
        for run in pagemap.runs() {
            if !run.flags.is_present() {
                sink.elsewhere(space, *run)?;
                continue;
            }
            let file = match &mut pages {
                Some(file) => file,
                None => {
                    pages.insert(directory.open_file(&format!("pages-{}.img", pagemap.pages_id()))?)
                }
            };
            let (mut at, end) = (run.vaddr, run.end(page));
            while at < end {
                let boundary = (at / BATCH_BYTES + 1) * BATCH_BYTES;
                let until = end.min(boundary.max(at + page.bytes()));
                let len = usize::try_from(until - at)?;
                let mut bytes = vec![0; len];
                file.read_exact(&mut bytes)?;
                let batch = Batch {
                    space,
                    vaddr: at,
                    pages: (until - at) / page.bytes(),
                    flags: run.flags,
                    len,
                    header_follows: 0,
                };
                sink.pages(&batch, Bytes::from(bytes))?;
                at = until;
            }
        }
    }
    sink.close()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::thread::{self, JoinHandle};
    use std::time::Duration;

    use super::*;
    use crate::image::PageRun;

    /// A CRIU that writes pages, of which there are more than any buffer takes.
    fn writes(door: &Door) -> JoinHandle<io::Error> {
        let mut criu = TcpStream::connect(door.address().unwrap()).unwrap();
        criu.set_write_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        thread::spawn(move || {
            let mut header = |command: u32, pages: u64, vaddr: u64| {
                let mut bytes = command.to_ne_bytes().to_vec();
                bytes.extend([0; 4]);
                for field in [pages, vaddr, 4 << 8 | 1] {
                    bytes.extend(field.to_ne_bytes());
                }
                criu.write_all(&bytes).unwrap();
            };
            header(4, 0, 0);
            header(6 | 4 << 16, 1 << 16, 1 << 30);
            (0..1 << 16)
                .find_map(|_| criu.write_all(&[1; 4096]).err())
                .expect("nobody reads 256 MiB")
        })
    }

    fn is_freed(criu: JoinHandle<io::Error>) {
        let error = criu.join().expect("no panic");
        let kinds = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
        assert!(kinds.contains(&error.kind()), "{error}");
    }

    /// Takes no pages.
    struct Refuses;

    impl PageSink for Refuses {
        fn open(&mut self, _: PagemapName) -> Result<bool, SinkError> {
            Ok(false)
        }

        fn has_parent(&mut self, _: PagemapName) -> Result<bool, SinkError> {
            Ok(false)
        }

        fn pages(&mut self, _: &Batch, _: Bytes) -> Result<(), SinkError> {
            // CRIU has filled the buffers meanwhile.
            thread::sleep(Duration::from_millis(200));
            Err("no room".into())
        }

        fn elsewhere(&mut self, _: PagemapName, _: PageRun) -> Result<(), SinkError> {
            Ok(())
        }

        fn close(&mut self) -> Result<i32, SinkError> {
            Ok(0)
        }
    }

    #[test]
    fn a_criu_in_the_middle_of_a_write_is_freed_when_the_door_closes() {
        let door = Door::open().unwrap();
        let (keeper, criu) = (door.keeper(), writes(&door));
        // Held, and never read.
        let memory = door.wait().expect("it comes");
        thread::sleep(Duration::from_millis(200));
        keeper.close();
        is_freed(criu);
        drop(memory);
    }

    #[test]
    fn a_criu_in_the_middle_of_a_write_is_freed_when_its_pages_are_refused() {
        let door = Door::open().unwrap();
        let (keeper, criu) = (door.keeper(), writes(&door));
        let memory = door.wait().expect("it comes");
        let page = PageSize::new(4096).unwrap();
        let error = memory.serve(page, &mut Refuses).expect_err("refused");
        assert!(error.to_string().contains("no room"), "{error}");
        is_freed(criu);
        // It has the connection still.
        drop(keeper);
    }
}
