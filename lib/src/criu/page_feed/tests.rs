use super::*;

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use bytes::Bytes;

use crate::criu::page_client::{PageSink, Served, SinkError, serve};
use crate::criu::page_server::Batch;
use crate::criu::testing::{criu, eventually};
use crate::image::{PageRun, Pagemap};
use crate::page::PageSize;

const LIMIT: Duration = Duration::from_secs(10);

fn testdata(set: &str, number: u32) -> Chain {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("testdata").join(set).join(number.to_string());
    Chain::open(path, None).expect("a good chain")
}

/// Content of each page of each memory.
type Pages = BTreeMap<(PagemapName, u64), Vec<u8>>;

fn pages_of(chain: &Chain) -> Pages {
    let mut pages = Pages::new();
    let mut reader = PagesReader::new(chain);
    for space in chain.newest().pagemaps().keys() {
        for run in chain.resolve(*space).expect("it resolves") {
            let keep = |vaddr, bytes: &[u8]| {
                add(&mut pages, *space, vaddr, bytes);
                Ok::<(), ImageError>(())
            };
            reader.for_each_piece(*space, &run, keep).expect("pages");
        }
    }
    pages
}

fn add(pages: &mut Pages, space: PagemapName, vaddr: u64, bytes: &[u8]) {
    for (page, at) in bytes.chunks(4096).zip((vaddr..).step_by(4096)) {
        pages.insert((space, at), page.to_vec());
    }
}

#[derive(Default)]
struct Memory(Pages, i32);

impl PageSink for Memory {
    fn open(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Ok(true)
    }

    fn has_parent(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Err("only pre-dumps ask".into())
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        add(&mut self.0, batch.space, batch.vaddr, &bytes);
        Ok(())
    }

    fn elsewhere(&mut self, _: PagemapName, _: PageRun) -> Result<(), SinkError> {
        Err("everything is sent".into())
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        Ok(self.1)
    }
}

/// Feeds this library's own server.
fn fed(
    chain: &Chain,
    layout: Option<HeaderLayout>,
    status: i32,
) -> (Result<Fed, FeedError>, Served, Pages) {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let page_size = PageSize::new(4096).expect("a page size");
    thread::scope(|scope| {
        let server = scope.spawn(move || {
            let mut memory = Memory(Pages::new(), status);
            let served = serve(&mut theirs, page_size, &mut memory);
            (served.expect("a good session"), memory.0)
        });
        let result = feed(chain, &mut ours, layout, LIMIT, |_| {});
        let (served, pages) = server.join().expect("no panic");
        (result, served, pages)
    })
}

#[test]
fn all_pages_of_a_chain_are_sent_whatever_its_layout() {
    for (set, number) in [("shm-tree", 1), ("shm-tree", 3), ("memcached", 3)] {
        let chain = testdata(set, number);
        let wanted = pages_of(&chain);
        for layout in [HeaderLayout::Old, HeaderLayout::New] {
            let (fed, served, pages) = fed(&chain, Some(layout), 0);
            let fed = fed.expect("it is taken");
            assert!(pages == wanted, "{set}/{number}");
            assert_eq!((fed.layout, served.layout), (layout, Some(layout)));
            assert_eq!(fed.pages, wanted.len() as u64);
            assert_eq!(fed.bytes, served.bytes);
            assert_eq!(fed.spaces, served.spaces);
        }
    }
}

#[test]
fn a_server_that_refuses_is_believed() {
    let chain = testdata("shm-tree", 1);
    let (result, ..) = fed(&chain, Some(HeaderLayout::New), -1);
    assert!(matches!(result, Err(FeedError::Refused(-1))), "{result:?}");
}

#[test]
fn a_server_that_leaves_or_says_nothing_is_an_error() {
    let chain = testdata("shm-tree", 1);
    let limit = Duration::from_millis(200);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let result = feed(&chain, &mut ours, None, limit, |_| {});
    let text = result.expect_err("nobody answers").to_string();
    assert!(text.contains("--criu-version"), "{text}");
    drop(theirs);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let result = feed(&chain, &mut ours, None, limit, |_| {});
    assert!(matches!(result, Err(FeedError::Ended { .. })), "{result:?}");
}

#[test]
fn who_answers_anything_else_is_no_page_server() {
    let chain = testdata("shm-tree", 1);
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"SSH-2.0-").unwrap();
    let result = feed(&chain, &mut ours, None, LIMIT, |_| {});
    assert!(
        matches!(result, Err(FeedError::NoServer(b'S'))),
        "{result:?}"
    );
}

/// A real `criu page-server`; killed at the latest when it is dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(criu: &Path, directory: &Path) -> Self {
        // Taken and let go: CRIU tells a port that it chose only in its log.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let mut command = Command::new(criu);
        command.args(["page-server", "-v4", "-o", "server.log", "--address"]);
        command.args(["127.0.0.1", "--port", &port.to_string(), "-D"]);
        let child = command
            .arg(directory)
            .stdin(Stdio::null())
            .spawn()
            .expect("criu starts");
        Self { child, port }
    }

    fn connect(&self) -> TcpStream {
        let mut socket = None;
        let connected = eventually(|| {
            socket = TcpStream::connect(("127.0.0.1", self.port)).ok();
            socket.is_some()
        });
        assert!(connected, "criu page-server listens");
        socket.expect("it is connected")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CRIU of this host, and an older one if CRXFER_OLDER_CRIU names it.
fn criu_programs() -> Vec<PathBuf> {
    let older = std::env::var_os("CRXFER_OLDER_CRIU").map(PathBuf::from);
    criu().into_iter().chain(older).collect()
}

#[test]
fn a_real_page_server_writes_what_it_was_fed() {
    let chain = testdata("shm-tree", 3);
    let wanted = pages_of(&chain);
    for criu in criu_programs() {
        let directory = tempfile::tempdir().expect("a scratch directory");
        let mut server = Server::start(&criu, directory.path());
        let mut socket = server.connect();
        let fed = feed(&chain, &mut socket, None, LIMIT, |_| {}).expect("it is taken");
        drop(socket);
        let status = server.child.wait().expect("it is ours");
        let log = std::fs::read_to_string(directory.path().join("server.log"));
        assert!(status.success(), "{}", log.unwrap_or_default());
        println!("{}: {fed:?}", criu.display());
        let written = Chain::open(directory.path(), None).expect("image files");
        assert!(pages_of(&written) == wanted, "{}", criu.display());
        let same = written.newest().pagemaps().values().map(Pagemap::pages);
        assert_eq!(same.sum::<u64>(), fed.pages);
    }
}
