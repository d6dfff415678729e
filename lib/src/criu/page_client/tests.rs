use super::*;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use crate::criu::options::{CriuOptions, DumpOptions};
use crate::criu::testing::{Tree, criu, eventually};
use crate::criu::{CriuError, Stage, Verdict, Worker};
use crate::image::PageFlags;

/// Keeps everything.
#[derive(Debug, Default)]
struct Memory {
    pages: BTreeMap<(PagemapName, u64), Bytes>,
    spaces: Vec<PagemapName>,
    status: i32,
}

impl PageSink for Memory {
    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        self.spaces.push(space);
        Ok(false)
    }

    fn has_parent(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Ok(false)
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        assert!(batch.flags.contains(PageFlags::PRESENT));
        self.pages.insert((batch.space, batch.vaddr), bytes);
        Ok(())
    }

    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError> {
        Err(format!("{space}: {run:?} has no parent").into())
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        Ok(self.status)
    }
}

fn header(command: u32, pages: u64, vaddr: u64, dst_id: u64) -> Vec<u8> {
    let mut bytes = command.to_ne_bytes().to_vec();
    bytes.extend([9; 4]);
    for field in [pages, vaddr, dst_id] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes
}

/// 300 pages of a task, one of a segment.
fn session() -> (Vec<u8>, Vec<u8>) {
    let data: Vec<u8> = (0..300u32)
        .flat_map(|page| page.to_ne_bytes().repeat(1024))
        .collect();
    let mut stream = header(4, 0, 0, 7 << 8 | 1);
    stream.extend(header(6 | 4 << 16, 300, 0x10_0000, 7 << 8 | 1));
    stream.extend(&data);
    stream.extend(header(4, 0, 0, 9 << 8 | 2));
    stream.extend(header(6 | 4 << 16, 1, 0, 9 << 8 | 2));
    stream.extend([5; 4096]);
    stream.extend(header(0x1024, 0, 0, 0));
    (stream, data)
}

fn page_size() -> PageSize {
    PageSize::new(4096).expect("a page size")
}

#[test]
fn memory_arrives_as_it_was_sent() {
    let (stream, data) = session();
    let (mut ours, theirs) = socket_pair().expect("a pair");
    let mut theirs = UnixStream::from(theirs);
    let sender = thread::spawn(move || {
        // In odd pieces, so that headers and pages come apart.
        for piece in stream.chunks(7777) {
            theirs.write_all(piece).expect("it is read");
        }
        let mut replies = [1; 6];
        theirs.read_exact(&mut replies).expect("answers");
        replies
    });
    let mut sink = Memory::default();
    let served = serve(&mut ours, page_size(), &mut sink).expect("a good session");
    assert_eq!(sender.join().expect("no panic"), [0; 6]);
    assert_eq!(served.bytes, 301 * 4096);
    assert_eq!(served.layout, Some(HeaderLayout::New));
    let task = PagemapName::Task(7);
    let got: Vec<u8> = sink
        .pages
        .range((task, 0)..=(task, u64::MAX))
        .flat_map(|(_, bytes)| bytes.to_vec())
        .collect();
    assert!(got == data);
    let segment = sink.pages.get(&(PagemapName::Shmem(9), 0));
    assert_eq!(segment.map(|bytes| &bytes[..]), Some(&[5; 4096][..]));
}

#[test]
fn kept_buffers_are_not_used_again_but_dropped_ones_are() {
    let buffers = Buffers::default();
    let fill = |value: u8| {
        let mut buffer = buffers.get(1 << 20);
        buffer.bytes.fill(value);
        buffer.into_bytes(1 << 20)
    };
    let (kept, dropped) = (fill(1), fill(2));
    let place = dropped.as_ptr();
    drop(dropped);
    let next = fill(3);
    assert_eq!(next.as_ptr(), place);
    assert!(kept.iter().all(|byte| *byte == 1));
}

#[test]
fn a_peer_that_ends_early_is_an_error() {
    let (stream, _) = session();
    for at in [0, 10, 32, 70, 100_000, stream.len() - 1] {
        let (mut ours, theirs) = socket_pair().expect("a pair");
        let mut theirs = UnixStream::from(theirs);
        let part = stream[..at].to_vec();
        let sender = thread::spawn(move || theirs.write_all(&part));
        let error = serve(&mut ours, page_size(), &mut Memory::default());
        let cut = matches!(error, Err(ServeError::Stream(PageServerError::Cut(_))));
        assert!(cut, "{at}: {error:?}");
        sender.join().expect("no panic").expect("all is read");
    }
}

/// Dumps a tree into `sink`.
fn dump_into(
    sink: &mut (impl PageSink + Send),
    tree: &Tree,
    images: &File,
    criu: &std::path::Path,
) -> (Result<(), CriuError>, Result<Served, ServeError>) {
    let (mut ours, theirs) = socket_pair().expect("a pair");
    ours.set_read_timeout(Some(Duration::from_secs(30)))
        .expect("a time-out");
    let mut worker = Worker::start(criu, Some(theirs), None).expect("criu starts");
    let options = CriuOptions::default();
    let mut options = DumpOptions::new(tree.pid(), images.as_fd(), images.as_fd(), options);
    options.page_server = true;
    thread::scope(|scope| {
        let server = scope.spawn(move || {
            let result = serve(&mut ours, page_size(), sink);
            drop(ours);
            result
        });
        let refuse = |stage| stage == Stage::PostDump;
        let result = worker.dump(&options, &mut |stage, _| {
            if refuse(stage) {
                Verdict::Refuse
            } else {
                Verdict::GoOn
            }
        });
        let served = server.join().expect("no panic");
        (result.map(drop), served)
    })
}

#[test]
fn a_real_dump_sends_its_memory_here() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir().expect("a scratch directory");
    let images = File::open(directory.path()).expect("it opens");
    let tree = Tree::start();
    let mut sink = Memory::default();
    let (result, served) = dump_into(&mut sink, &tree, &images, &criu);
    let served = served.expect("a good session");
    assert!(
        matches!(result, Err(CriuError::Refused { .. })),
        "{result:?}"
    );
    assert!(sink.spaces.contains(&PagemapName::Task(tree.pid().into())));
    assert!(served.bytes > 100 << 10, "{served:?}");
    let stack = sink.pages.values().any(|bytes| {
        let text = b"while sleep 0.02";
        bytes.windows(text.len()).any(|window| window == text)
    });
    assert!(stack, "the shell's script is in its memory");
    assert!(tree.counts());
}

#[test]
fn a_sink_that_refuses_makes_criu_fail_and_the_tree_run_on() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir().expect("a scratch directory");
    let images = File::open(directory.path()).expect("it opens");
    let tree = Tree::start();
    let mut sink = Memory {
        status: 1,
        ..Memory::default()
    };
    let (result, served) = dump_into(&mut sink, &tree, &images, &criu);
    assert_eq!(served.expect("a session").status, 1);
    assert!(matches!(result, Err(CriuError::Failed(_))), "{result:?}");
    assert!(tree.counts());
}

/// Fails with the first pages, as a destination that is gone.
struct Broken;

impl PageSink for Broken {
    fn open(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Ok(false)
    }

    fn has_parent(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Ok(false)
    }

    fn pages(&mut self, _: &Batch, _: Bytes) -> Result<(), SinkError> {
        Err("the link is down".into())
    }

    fn elsewhere(&mut self, _: PagemapName, _: PageRun) -> Result<(), SinkError> {
        Ok(())
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        Ok(0)
    }
}

#[test]
fn a_sink_that_fails_in_the_middle_ends_the_dump_at_once() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir().expect("a scratch directory");
    let images = File::open(directory.path()).expect("it opens");
    let tree = Tree::start();
    let (result, served) = dump_into(&mut Broken, &tree, &images, &criu);
    assert!(matches!(served, Err(ServeError::Sink(_))), "{served:?}");
    assert!(matches!(result, Err(CriuError::Failed(_))), "{result:?}");
    assert!(tree.counts());
}

#[test]
fn cancelling_while_nobody_reads_memory_resumes_the_tree_at_once() {
    let Some(criu) = criu() else { return };
    let directory = tempfile::tempdir().expect("a scratch directory");
    let images = File::open(directory.path()).expect("it opens");
    let tree = Tree::start();
    let (ours, theirs) = socket_pair().expect("a pair");
    let mut worker = Worker::start(&criu, Some(theirs), None).expect("criu starts");
    worker.end_with(ours.try_clone().expect("a duplicate").into());
    let canceller = worker.canceller();
    let options = CriuOptions::default();
    let mut options = DumpOptions::new(tree.pid(), images.as_fd(), images.as_fd(), options);
    options.page_server = true;
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            // CRIU waits for the answer to its first OPEN2, the tree frozen.
            assert!(eventually(|| tree.stands_still()));
            canceller.cancel();
        });
        worker.dump(&options, &mut |_, _| Verdict::GoOn)
    });
    let cancelled = matches!(result, Err(CriuError::Cancelled { killed: false, .. }));
    assert!(cancelled, "{result:?}");
    assert!(tree.counts());
}

/// Takes memory and forgets it.
#[derive(Debug)]
struct Discard;

impl PageSink for Discard {
    fn open(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Ok(false)
    }

    fn has_parent(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Ok(false)
    }

    fn pages(&mut self, _: &Batch, _: Bytes) -> Result<(), SinkError> {
        Ok(())
    }

    fn elsewhere(&mut self, _: PagemapName, _: PageRun) -> Result<(), SinkError> {
        Ok(())
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        Ok(0)
    }
}

/// A memcached with 2,500 values of 100 KB, killed at the end.
struct Memcached(std::process::Child);

impl Memcached {
    fn start() -> Option<Self> {
        use std::process::{Command, Stdio};
        let child = Command::new("setsid")
            .args([
                "memcached",
                "-u",
                "root",
                "-m",
                "512",
                "-l",
                "127.0.0.1",
                "-p",
                "21917",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let memcached = Self(child.ok()?);
        let mut connection = (0..100).find_map(|_| {
            thread::sleep(Duration::from_millis(20));
            std::net::TcpStream::connect("127.0.0.1:21917").ok()
        })?;
        for key in 0..2500u32 {
            let mut rng = crate::testing::Rng::new(key.into());
            let mut command = format!("set {key} 0 0 102400\r\n").into_bytes();
            command.extend(rng.bytes(102_400));
            command.extend(b"\r\n");
            connection.write_all(&command).ok()?;
            let mut stored = [0; 8];
            connection.read_exact(&mut stored).ok()?;
        }
        drop(connection);
        thread::sleep(Duration::from_millis(500));
        Some(memcached)
    }
}

impl Drop for Memcached {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From the request to post-dump, where the dump is refused.
fn time_dump(criu: &std::path::Path, pid: u32, to_sink: bool) -> (Duration, u64) {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let images = File::open(directory.path()).expect("it opens");
    let (mut ours, theirs) = socket_pair().expect("a pair");
    let mut worker = Worker::start(criu, Some(theirs), None).expect("criu starts");
    worker.probe().expect("criu answers");
    let options = CriuOptions::default();
    let mut options = DumpOptions::new(pid, images.as_fd(), images.as_fd(), options);
    options.page_server = to_sink;
    thread::scope(|scope| {
        let server = to_sink.then(|| scope.spawn(|| serve(&mut ours, page_size(), &mut Discard)));
        let (begin, mut took) = (now(), Duration::ZERO);
        let result = worker.dump(&options, &mut |stage, _| {
            if stage != Stage::PostDump {
                return Verdict::GoOn;
            }
            took = begin.elapsed();
            Verdict::Refuse
        });
        assert!(
            matches!(result, Err(CriuError::Refused { .. })),
            "{result:?}"
        );
        let served = server.map(|server| server.join().expect("no panic").expect("a session"));
        (took, served.map_or(0, |served| served.bytes))
    })
}

#[expect(clippy::disallowed_methods, reason = "a measurement")]
fn now() -> std::time::Instant {
    std::time::Instant::now()
}

#[test]
#[ignore = "a measurement of several seconds; run it alone with --ignored --nocapture"]
fn how_long_a_dump_takes_into_a_socket_and_into_memory() {
    let Some(criu) = criu() else { return };
    let Some(memcached) = Memcached::start() else {
        println!("skipped: no memcached");
        return;
    };
    let (mut sink, mut files) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let (took, bytes) = time_dump(&criu, memcached.0.id(), true);
        println!("sink {took:?} {bytes} bytes");
        sink.push(took);
        let (took, _) = time_dump(&criu, memcached.0.id(), false);
        println!("tmpfs {took:?}");
        files.push(took);
    }
    sink.sort();
    files.sort();
    println!("medians: sink {:?}, tmpfs {:?}", sink[2], files[2]);
}
