//! Page sessions with a real CRIU: dumped through a socket, completed, restored.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use bytes::Bytes;
use crxfer::criu::page_client::{PageSink, SinkError, serve, socket_pair};
use crxfer::criu::page_server::Batch;
use crxfer::image::{Chain, Completeness, DumpStats, PageRun, PagemapName};
use crxfer::page::PageSize;
use crxfer::testing::Rng;
use crxfer::transfer::pages::PagesUpload;
use crxfer::wire::Layout;
use rustix::io::FdFlags;
use tempfile::TempDir;
use tokio::runtime::Handle;

use crate::pages::options;
use crate::support::{Destination, LAYOUTS, Peer, memory, tempdir};

fn has_criu() -> bool {
    let there = rustix::process::geteuid().is_root() && check(&[]);
    if !there {
        println!("skipped: needs root and criu");
    }
    there
}

/// Whether the kernel tracks changes for CRIU, so that there are pre-dumps.
fn tracks() -> bool {
    let tracks = check(&["--feature", "mem_dirty_track"]);
    if !tracks {
        println!("without pre-dump: the kernel does not track changes");
    }
    tracks
}

fn check(arguments: &[&str]) -> bool {
    let mut check = Command::new("criu");
    let output = check.arg("check").args(arguments).output();
    output.is_ok_and(|output| output.status.success())
}

/// Runs CRIU with one end of a socket as its page server; `sink` gets what comes out of the other.
fn criu(arguments: &[&str], images: &Path, sink: &mut (impl PageSink + Send)) -> bool {
    fs::create_dir_all(images).unwrap();
    let (mut ours, theirs) = socket_pair().unwrap();
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
    let mut child = spawn_criu(arguments, images, &theirs);
    drop(theirs);
    let page_size = PageSize::of_host();
    let served = serve(&mut ours, page_size, sink);
    drop(ours);
    // A receiver of another test that restores trees may have reaped it.
    let _ = child.wait();
    // Written last, and only where all went well.
    let succeeded = images.join("stats-dump").exists();
    if !succeeded {
        let log = fs::read_to_string(images.join("criu.log")).unwrap_or_default();
        println!("{served:?}\n{log}");
    }
    succeeded
}

fn spawn_criu(arguments: &[&str], images: &Path, socket: &OwnedFd) -> Child {
    Command::new("criu")
        .args(arguments)
        .args(["-o", "criu.log", "-v2", "--network-lock", "skip"])
        .args(["--page-server", "--ps-socket"])
        .arg(socket.as_raw_fd().to_string())
        .arg("-D")
        .arg(images)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Holds 24 MiB of bytes that repeat nowhere; a line in `ask` makes it change some of them and say
/// the digest of all.
const WORKLOAD: &str = r#"
import hashlib, os, random, time
random.seed(5)
data = bytearray(random.randbytes(24 << 20))
step = 0
while True:
    time.sleep(0.02)
    if os.path.exists("ask"):
        os.remove("ask")
        step += 1
        for page in range(0, len(data), 4096 * 50):
            data[page] = step
        with open("answer.new", "w") as answer:
            answer.write(f"{step} {hashlib.sha256(data).hexdigest()}")
        os.rename("answer.new", "answer")
"#;

struct Workload {
    child: Child,
    dir: TempDir,
}

impl Workload {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new("setsid")
            .args(["python3", "-c", WORKLOAD])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let workload = Self { child, dir };
        workload.ask();
        workload
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// Its next step, and the digest of its memory.
    fn ask(&self) -> (u64, String) {
        let (ask, answer) = (self.dir.path().join("ask"), self.dir.path().join("answer"));
        let _ = fs::remove_file(&answer);
        fs::write(ask, "").unwrap();
        for _ in 0..500 {
            sleep(Duration::from_millis(20));
            if let Ok(text) = fs::read_to_string(&answer) {
                let (step, digest) = text.split_once(' ').unwrap();
                return (step.parse().unwrap(), digest.to_owned());
            }
        }
        panic!("the workload does not answer");
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // Its restored copy has the same pid, and has not been seen by this process.
        let _ = Command::new("kill").args(["-9", &self.pid()]).output();
        let _ = self.child.wait();
    }
}

fn restore(images: &Path, work: &Path) {
    // Its end may be seen by another test's receiver; whether it has worked, the workload says.
    let _ = Command::new("criu")
        .args(["restore", "-d", "-o", "restore.log", "-v2", "-D"])
        .arg(images)
        .arg("-W")
        .arg(work)
        .args(["--network-lock", "skip"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let log = fs::read_to_string(work.join("restore.log")).unwrap_or_default();
    println!("{log}");
}

/// One invocation of CRIU into `to`; whether it succeeded, and how many pages were new.
async fn dump_into(
    peer: &Peer,
    to: &Destination,
    arguments: Vec<String>,
    images: PathBuf,
) -> (bool, u64) {
    let (mut options, handle) = (options(peer, to), Handle::current());
    options.leaves_out = arguments.contains(&"--prev-images-dir".to_owned());
    let dumping = move || {
        let mut upload = PagesUpload::connect(options, handle).unwrap();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let succeeded = criu(&arguments, &images, &mut upload);
        (succeeded, upload.finish().unwrap().fresh_pages)
    };
    tokio::task::spawn_blocking(dumping).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_restored_from_pages_and_small_images_in_every_layout() {
    if !has_criu() {
        return;
    }
    let tracks = tracks();
    for layout in LAYOUTS {
        let dir = tempdir();
        let to = Destination::at(dir.path(), layout).await;
        let peer = Peer::new();
        let mut workload = Workload::start();
        let scratch = tempdir();
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        let pid = workload.pid();
        let (first, second) = if tracks {
            let pre_dump = words(&["pre-dump", "-t", &pid, "--track-mem"]);
            let prev = ["--prev-images-dir", "../1"];
            let dump = [&["dump", "-t", &pid, "--track-mem"], &prev[..]].concat();
            (pre_dump, words(&dump))
        } else {
            let dump = ["dump", "-t", &pid];
            let first = [&dump[..], &["--leave-running"]].concat();
            (words(&first), words(&dump))
        };
        let first = dump_into(&peer, &to, first, scratch.path().join("1")).await;
        assert!(first.0 && first.1 > 6000, "{first:?}");
        let (step, _) = workload.ask();
        let small = scratch.path().join("2");
        let second = dump_into(&peer, &to, second, small.clone()).await;
        assert!(second.0 && second.1 < 2000, "{second:?}");
        let _ = workload.child.wait();

        let sent = peer.send_as(&small, "web", &to).await.published;
        assert_eq!(
            (sent.completeness.as_str(), sent.layout),
            ("complete", layout)
        );
        let chain = Chain::open(to.set("web"), None).unwrap();
        assert_eq!(chain.completeness(), Completeness::Complete);
        assert!(!memory(&to.set("web")).is_empty());
        restore(&to.set("web"), scratch.path());
        let (next, digest) = workload.ask();
        assert_eq!(next, step + 1);
        // What an undisturbed one says at that step.
        let other = Workload::start();
        let mut expected = other.ask();
        while expected.0 < next {
            expected = other.ask();
        }
        assert_eq!((next, digest), expected, "{layout:?}");
        to.stop().await;
    }
}

/// A destination that is gone when CRIU has sent all.
struct Refusing(PagesUpload);

impl PageSink for Refusing {
    fn open(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        self.0.open(space)
    }

    fn has_parent(&mut self, space: PagemapName) -> Result<bool, SinkError> {
        self.0.has_parent(space)
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        self.0.pages(batch, bytes)
    }

    fn elsewhere(&mut self, space: PagemapName, run: PageRun) -> Result<(), SinkError> {
        self.0.elsewhere(space, run)
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        self.0.canceller().cancel();
        self.0.close()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_is_lost_makes_criu_fail_and_the_process_run_on() {
    if !has_criu() {
        return;
    }
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let (peer, workload, scratch) = (Peer::new(), Workload::start(), tempdir());
    let (step, _) = workload.ask();
    let (options, handle) = (options(&peer, &to), Handle::current());
    let (pid, images) = (workload.pid(), scratch.path().join("1"));
    let dumping = move || {
        let mut sink = Refusing(PagesUpload::connect(options, handle).unwrap());
        let succeeded = criu(&["dump", "-t", &pid], &images, &mut sink);
        sink.0.finish().expect_err("nobody has it");
        succeeded
    };
    assert!(!tokio::task::spawn_blocking(dumping).await.unwrap());
    assert_eq!(workload.ask().0, step + 1);
    to.settled().await;
    assert!(!to.set("web").exists());
    to.stop().await;
}

/// Takes memory and forgets it.
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

struct Memcached {
    child: Child,
    port: u16,
}

impl Memcached {
    fn start(port: u16) -> Option<Self> {
        let text = port.to_string();
        let child = Command::new("setsid")
            .args(["memcached", "-u", "root", "-m", "1024", "-l", "127.0.0.1"])
            .args(["-p", &text])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        Some(Self { child, port })
    }

    /// Sets the values `keys`, of 100 KB each.
    fn fill(&self, keys: std::ops::Range<u32>, seed: u64) {
        let address = ("127.0.0.1", self.port);
        let connect = || {
            sleep(Duration::from_millis(20));
            TcpStream::connect(address).ok()
        };
        let mut connection = (0..200).find_map(|_| connect()).expect("memcached");
        for key in keys {
            let mut command = format!("set {key} 0 0 102400\r\n").into_bytes();
            command.extend(Rng::new(seed + u64::from(key)).bytes(102_400));
            command.extend(b"\r\n");
            connection.write_all(&command).unwrap();
            connection.read_exact(&mut [0; 8]).unwrap();
        }
    }
}

impl Drop for Memcached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn frozen(images: &Path) -> Duration {
    let bytes = fs::read(images.join("stats-dump")).unwrap();
    let stats = DumpStats::parse(&bytes, "stats-dump").unwrap();
    Duration::from_micros(stats.frozen_time.into())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of some 20 seconds; run it alone, in release, with --ignored --nocapture"]
async fn how_long_a_dump_freezes_into_a_destination_that_has_nearly_all() {
    let Some(memcached) = Memcached::start(21_921).filter(|_| has_criu()) else {
        println!("skipped: no memcached");
        return;
    };
    memcached.fill(0..5000, 1);
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let peer = Peer::new();
    let mut options = options(&peer, &to);
    options.leaves_out = false;
    let pid = memcached.child.id().to_string();
    let (mut discarded, mut compared) = (Vec::new(), Vec::new());
    for round in 0..7u64 {
        let scratch = tempdir();
        let images = scratch.path().join("dump");
        let arguments = ["dump", "-t", &pid, "--leave-running"];
        assert!(criu(&arguments, &images, &mut Discard));
        discarded.push(frozen(&images));
        memcached.fill(0..50, round * 10_000);
        sleep(Duration::from_millis(300));

        let (options, handle, pid) = (options.clone(), Handle::current(), pid.clone());
        let images = scratch.path().join("again");
        let dumping = move || {
            let mut upload = PagesUpload::connect(options, handle).unwrap();
            let arguments = ["dump", "-t", &pid, "--leave-running"];
            assert!(criu(&arguments, &images, &mut upload));
            (frozen(&images), upload.finish().unwrap())
        };
        let (took, stored) = tokio::task::spawn_blocking(dumping).await.unwrap();
        println!(
            "discarded {:?}, compared {took:?} {stored:?}",
            discarded.last()
        );
        // The first one brings everything.
        if round > 0 {
            compared.push(took);
        }
    }
    discarded.sort();
    compared.sort();
    let (discarded, compared) = (discarded[3], compared[3]);
    let ratio = compared.as_secs_f64() / discarded.as_secs_f64();
    println!("medians: discarded {discarded:?}, compared {compared:?}, {ratio:.2}");
    to.stop().await;
}
