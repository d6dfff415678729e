//! With a real CRIU: its dumps arrive, and whatever goes wrong, the tree runs on.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use super::*;
use crate::criu::testing::{Tree, criu, eventually};
use crate::image::DumpStats;

/// What `criu dump` is told.
struct Dump<'a> {
    criu: &'a Path,
    pid: u32,
    images: &'a Path,
    more: Vec<String>,
}

impl Dump<'_> {
    /// Over TCP.
    fn to(mut self, address: SocketAddr) -> Self {
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let words = ["--page-server", "--address", &ip, "--port", &port];
        self.more.extend(words.map(str::to_owned));
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.criu);
        command
            .args(["dump", "--leave-running", "-v2", "-o", "dump.log", "-t"])
            .arg(self.pid.to_string())
            .arg("-D")
            .arg(self.images)
            .args(&self.more)
            .stdin(Stdio::null());
        command
    }

    fn run(&self) -> Output {
        self.command().output().expect("criu starts")
    }

    fn frozen(&self) -> Duration {
        let stats = std::fs::read(self.images.join("stats-dump")).expect("figures of the dump");
        let stats = DumpStats::parse(&stats, "stats-dump").expect("figures of the dump");
        Duration::from_micros(stats.frozen_time.into())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.images.join("dump.log")).unwrap_or_default()
    }
}

/// A tree, and a place for its images.
struct Ground {
    criu: PathBuf,
    tree: Tree,
    images: tempfile::TempDir,
}

impl Ground {
    fn new() -> Option<Self> {
        Some(Self {
            criu: criu()?,
            tree: Tree::start(),
            images: tempfile::tempdir().expect("a scratch directory"),
        })
    }

    fn dump(&self) -> Dump<'_> {
        Dump {
            criu: &self.criu,
            pid: self.tree.pid(),
            images: self.images.path(),
            more: Vec::new(),
        }
    }

    /// Whether `sink` has the text of the tree's shell.
    fn is_in(&self, sink: &Memory) -> bool {
        let text = b"while sleep 0.02";
        let task = PagemapName::Task(self.tree.pid().into());
        sink.pages.keys().any(|(space, _)| *space == task)
            && sink
                .pages
                .values()
                .any(|bytes| bytes.windows(text.len()).any(|window| window == text))
    }
}

fn patient() -> Options {
    Options {
        limits: Limits::default(),
        ..options(false)
    }
}

#[test]
fn dumps_over_tcp_arrive_and_are_not_held_up_by_the_cork() {
    let Some(ground) = Ground::new() else { return };
    let running = Running::listen(patient(), good);
    let mut frozen = Vec::new();
    for _ in 0..3 {
        let dump = ground.dump().to(running.address.expect("it listens"));
        let output = dump.run();
        assert!(output.status.success(), "{}", dump.log());
        assert!(ground.is_in(&running.taken().expect("it has memory")));
        frozen.push(dump.frozen());
    }
    // The cork alone takes 200 ms.
    let best = frozen.iter().min().expect("three");
    assert!(*best < Duration::from_millis(150), "{frozen:?}");
    assert!(ground.tree.counts());
    running.stop();
}

#[test]
fn dumps_over_one_inherited_socket_arrive() {
    let Some(ground) = Ground::new() else { return };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut running = Running::at(Place::Inherited(ours.into()), patient(), good);
    for _ in 0..3 {
        let theirs = OwnedFd::from(theirs.try_clone().unwrap());
        let mut dump = ground.dump();
        let number = std::os::fd::AsRawFd::as_raw_fd(&theirs).to_string();
        let words = ["--page-server", "--ps-socket", &number];
        dump.more.extend(words.map(str::to_owned));
        let mut command = dump.command();
        crate::sys::pass_descriptors(&mut command, vec![theirs]);
        let output = command.output().expect("criu starts");
        assert!(output.status.success(), "{}", dump.log());
        assert!(ground.is_in(&running.taken().expect("it has memory")));
    }
    drop(theirs);
    running.join().expect("the socket ended between dumps");
    assert!(ground.tree.counts());
}

#[test]
fn a_refused_dump_leaves_the_tree_running() {
    let Some(ground) = Ground::new() else { return };
    let running = Running::listen(patient(), || {
        Ok(Memory {
            status: 1,
            ..Memory::default()
        })
    });
    let dump = ground.dump().to(running.address.expect("it listens"));
    assert!(!dump.run().status.success());
    assert!(matches!(running.failed(), SessionError::Refused(1)));
    assert!(ground.tree.counts());
    running.stop();
}

#[test]
fn a_destination_that_hangs_leaves_the_tree_running() {
    let Some(ground) = Ground::new() else { return };
    for behave in [
        Behave::HangsInPages,
        Behave::HangsInClose,
        Behave::FailsAtOpen,
    ] {
        let running = Running::listen(options(false), behaving(behave));
        let dump = ground.dump().to(running.address.expect("it listens"));
        let begun = now();
        assert!(!dump.run().status.success());
        assert!(begun.elapsed() < Duration::from_secs(8), "{}", dump.log());
        assert!(ground.tree.counts());
        running.failed();
        running.stop();
    }
}

/// Waits until the endpoint serves.
fn begun(running: &Running) {
    let event = running.events.recv_timeout(Duration::from_secs(10));
    assert!(matches!(event, Ok(Event::Begun { .. })), "{event:?}");
}

#[test]
fn a_killed_criu_is_noticed_at_once_and_its_pages_dropped() {
    let Some(ground) = Ground::new() else { return };
    let (dropped, drops) = channel();
    let running = Running::listen(patient(), move || {
        Ok(Memory {
            dropped: Some(Told(dropped.clone())),
            ..Memory::default()
        })
    });
    // What stands before CRIU and this endpoint stops it in the middle.
    let gate = Gate::before(running.address.expect("it listens"), 20_000);
    let dump = ground.dump().to(gate.address);
    let mut child: Child = dump.command().spawn().expect("criu starts");
    begun(&running);
    thread::sleep(Duration::from_millis(300));
    child.kill().expect("it is ours");
    child.wait().expect("it is ours");
    let error = running.failed();
    assert!(error.to_string().contains("ends early"), "{error}");
    drops
        .recv_timeout(Duration::from_secs(2))
        .expect("what came is dropped");
    // The shell may be amidst a system call of CRIU's.
    assert!(eventually(|| ground.tree.is_alive()));
    running.stop();
}

/// Passes bytes on, up to a number; then both sides wait. As it stands on this host too, CRIU's socket
/// is not the endpoint's other end, and stays corked.
struct Gate {
    address: SocketAddr,
}

impl Gate {
    fn before(server: SocketAddr, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, mut server) =
                    (client.unwrap(), TcpStream::connect(server).unwrap());
                let (mut answers, mut to) =
                    (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || io::copy(&mut answers, &mut to));
                thread::spawn(move || {
                    let mut part = Read::take(&mut client, bytes as u64);
                    let passed = io::copy(&mut part, &mut server).unwrap_or(0);
                    if passed == bytes as u64 {
                        // Its end is passed on, whatever comes before.
                        let _ = io::copy(&mut client, &mut io::sink());
                    }
                    let _ = server.shutdown(std::net::Shutdown::Write);
                });
            }
        });
        Self { address }
    }
}

/// Of a shell, or of the process that CRXFER_MEASURE_PID names.
#[test]
#[ignore = "a measurement of several seconds; run it alone with --ignored --nocapture"]
fn how_long_a_tree_is_frozen_with_and_without_the_cork() {
    let Some(ground) = Ground::new() else { return };
    let named = std::env::var("CRXFER_MEASURE_PID").ok();
    let pid = named.and_then(|text| text.parse().ok());
    let running = Running::listen(patient(), || {
        Ok(Memory {
            behave: Behave::Discards,
            ..Memory::default()
        })
    });
    let address = running.address.expect("it listens");
    let gate = Gate::before(address, usize::MAX >> 1);
    let mut all = [Vec::new(), Vec::new()];
    for _ in 0..7 {
        for (at, times) in [address, gate.address].into_iter().zip(&mut all) {
            let mut dump = ground.dump().to(at);
            dump.pid = pid.unwrap_or(dump.pid);
            dump.more.push("--tcp-established".to_owned());
            assert!(dump.run().status.success(), "{}", dump.log());
            times.push(dump.frozen());
            running.taken();
        }
    }
    for (name, mut times) in ["uncorked", "corked"].into_iter().zip(all) {
        times.sort();
        println!("{name}: median {:?} of {times:?}", times[3]);
    }
    running.stop();
}
