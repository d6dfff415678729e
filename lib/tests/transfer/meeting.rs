//! A destination that loses its source, or dies itself, around the commit; and the source that is back.
//!
//! The receiver is a process of its own, so that it can be killed; the source speaks the protocol by
//! hand; CRIU and the workload are real.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crxfer::delta::{FileMeta, FileName, Outgoing};
use crxfer::handover::{DestinationState, Journal, Keep};
use crxfer::image::{Chain, ImageError, PageFlags, PagesReader};
use crxfer::page::PageSize;
use crxfer::preflight::{self, Choices};
use crxfer::ticket::Ticket;
use crxfer::transfer::{Event, Events, ReceiveOptions, Receiver};
use crxfer::transport;
use crxfer::wire::{Answer, Message, MigrationId, Offer, RestoreOptions, Step, Verdict, limits};
use tempfile::TempDir;

use crate::hostile_source::{FakeSource, encode, has_criu, host};
use crate::support::{Peer, count, tempdir};

/// Where the process that receives does so; set for that process only.
const RECEIVE: &str = "CRXFER_TEST_RECEIVE";

const ID: MigrationId = MigrationId([7; 16]);

/// Not a test: the receiver's process, when it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn receiver_process() {
    let Some(dir) = std::env::var_os(RECEIVE).map(PathBuf::from) else {
        return;
    };
    let log = dir.with_extension("events");
    let receiver = Receiver::bind(ReceiveOptions {
        events: Events::new(move |event| {
            if let Event::Failed { error, .. } = event {
                eprintln!("{error}");
            } else if let Event::Holding { .. } = event {
                fs::write(&log, "holding").unwrap();
            }
        }),
        ..host(&dir)
    });
    let receiver = receiver.unwrap();
    let ticket = receiver.ticket().unwrap().to_string();
    let draft = dir.with_extension("draft");
    fs::write(&draft, ticket).unwrap();
    fs::rename(draft, dir.with_extension("ticket")).unwrap();
    receiver.run(false).await;
}

/// Waits for something, for a few seconds.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..600 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    panic!("not within 15 s: {what}");
}

struct Receiving {
    process: Child,
    ticket: Ticket,
}

impl Receiving {
    /// Sleeps at the point `pause`, where one is given, and says so in a file.
    fn start(dir: &Path, pause: Option<&str>) -> Self {
        let ticket = dir.with_extension("ticket");
        let _ = fs::remove_file(&ticket);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "meeting::receiver_process", "--nocapture"])
            .env(RECEIVE, dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some(point) = pause {
            command
                .env("CRXFER_PAUSE", format!("{point}:600000"))
                .env("CRXFER_PAUSE_FILE", dir.with_extension("paused"));
        }
        let process = command.spawn().unwrap();
        eventually("a ticket", || ticket.exists());
        let ticket = fs::read_to_string(ticket).unwrap().parse().unwrap();
        Self { process, ticket }
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// What it says to a source that is back.
    async fn meet(&self, peer: &Peer, verdict: Verdict) -> Answer {
        loop {
            match self.meet_once(peer, verdict).await {
                Answer::Busy => tokio::time::sleep(Duration::from_millis(100)).await,
                answer => return answer,
            }
        }
    }

    async fn meet_once(&self, peer: &Peer, verdict: Verdict) -> Answer {
        let options = transport::Options::default();
        let (identity, keys) = (peer.identity(), [self.ticket.fingerprint()]);
        let connection =
            transport::connect(self.ticket.addresses(), &identity, &keys, &options).await;
        let connection = connection.unwrap();
        let (mut control, mut messages) = connection.open_control().await.unwrap();
        let meet = Message::Migration(Step::Meet { id: ID, verdict });
        control.write_message(&meet.encode()).await.unwrap();
        loop {
            let read = messages.read_message(limits::CONTROL_MESSAGE);
            let read = tokio::time::timeout(Duration::from_secs(60), read).await;
            match Message::decode(&read.unwrap().unwrap().unwrap()).unwrap() {
                Message::Working => {}
                Message::Migration(Step::Met(answer)) => return answer,
                other => panic!("{other:?}"),
            }
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A program that counts, dumped by CRIU: it runs nowhere.
struct Workload {
    pid: u32,
    place: TempDir,
    facts: Vec<u8>,
}

impl Workload {
    fn dumped() -> Self {
        let place = tempdir();
        let script = "while (1) { open F, '>', 'counter'; print F ++$i; close F; \
                      select undef, undef, undef, 0.01 }";
        let mut child = Command::new("setsid")
            .args(["perl", "-e", script])
            .current_dir(place.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id();
        let images = place.path().join("images");
        fs::create_dir(&images).unwrap();
        eventually("it counts", || place.path().join("counter").exists());
        let choices = Choices {
            force: true,
            ..Choices::default()
        };
        let facts = preflight::gather(pid, &choices).unwrap().facts.encode();
        let dumped = Command::new("criu")
            .args(["dump", "-t", &pid.to_string(), "-o", "dump.log", "-D"])
            .arg(&images)
            .status();
        assert!(dumped.unwrap().success(), "criu dump");
        child.wait().unwrap();
        fs::remove_file(images.join("dump.log")).unwrap();
        Self { pid, place, facts }
    }

    fn offer(&self) -> Offer {
        Offer {
            id: ID,
            name: "counter".into(),
            page_size: PageSize::of_host(),
            memory_bytes: 8 << 20,
            facts: self.facts.clone(),
            options: RestoreOptions::default(),
            dry_run: false,
            keeping: crxfer::wire::Keeping::AsSet,
            runtime: String::new(),
            container: String::new(),
        }
    }

    fn counter(&self) -> Vec<u8> {
        fs::read(self.place.path().join("counter")).unwrap_or_default()
    }

    fn runs(&self) {
        // A write is no single step: an empty file is no count.
        let before = self.counter();
        eventually("it counts on", || {
            let now = self.counter();
            !now.is_empty() && now != before
        });
    }

    fn stands_still(&self) {
        let before = self.counter();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(self.counter(), before, "a copy runs");
    }

    fn started(&self) -> Option<String> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let (_, rest) = stat.rsplit_once(')')?;
        let mut words = rest.split_whitespace();
        (words.next()? != "Z").then(|| words.nth(18).map(str::to_owned))?
    }

    /// All of the dump, as the final iteration.
    async fn send(&self, source: &mut FakeSource) {
        source.ready().await;
        let images = self.place.path().join("images");
        let chain = Chain::open(&images, None).unwrap();
        let mut out = Outgoing::new(PageSize::of_host());
        let mut records = Vec::new();
        out.begin(1, true, &mut records);
        let mut reader = PagesReader::new(&chain);
        for &name in chain.newest().pagemaps().keys() {
            out.open_dumped(name, &mut records);
            for run in chain.resolve(name).unwrap() {
                let mut at = run.vaddr;
                let read = reader.for_each_piece(name, &run, |_, bytes| {
                    out.dumped_pages(name, at, PageFlags::PRESENT, bytes, &mut records);
                    at += bytes.len() as u64;
                    Ok::<_, ImageError>(())
                });
                read.unwrap();
            }
        }
        for entry in fs::read_dir(&images).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with("pages-") || name.starts_with("pagemap-") {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            let mode = u16::try_from(path.metadata().unwrap().permissions().mode() & 0o777);
            let meta = FileMeta::new(
                FileName::new(name).unwrap(),
                mode.unwrap(),
                bytes.len() as u64,
                PageSize::of_host(),
            );
            let mut file = out.begin_file(meta, &mut records);
            let mut rest = &bytes[..];
            while let Some(part) = file.next_part() {
                let (now, later) = rest.split_at(part);
                out.file_part(&mut file, now.to_vec(), &mut records);
                rest = later;
            }
            out.end_file(file);
        }
        out.end(&mut records);
        for record in records {
            source.bytes(encode(record)).await;
        }
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // Another process may have got the pid meanwhile.
        let place = fs::read_link(format!("/proc/{}/cwd", self.pid));
        if place.is_ok_and(|place| place != self.place.path()) {
            return;
        }
        let pid = i32::try_from(self.pid).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

struct Scene {
    place: TempDir,
    workload: Workload,
    peer: Peer,
}

impl Scene {
    fn new() -> Option<Self> {
        has_criu().then(|| Self {
            place: tempdir(),
            workload: Workload::dumped(),
            peer: Peer::new(),
        })
    }

    fn dir(&self) -> PathBuf {
        self.place.path().join("in")
    }

    fn receive(&self) -> Receiving {
        Receiving::start(&self.dir(), None)
    }

    /// A receiver that stops at `point`, and a source that has sent everything.
    async fn sent(&self, point: Option<&str>) -> (Receiving, FakeSource) {
        let receiving = Receiving::start(&self.dir(), point);
        let mut source = FakeSource::connect_to(&receiving.ticket, &self.peer).await;
        let offered = source.offer(self.workload.offer()).await;
        let checks = preflight::decode_checks(&offered.checks).unwrap();
        assert!(preflight::may_begin(&checks), "{checks:#?}");
        self.workload.send(&mut source).await;
        (receiving, source)
    }

    /// A receiver that has voted, and whose source is lost then.
    async fn held(&self) -> Receiving {
        let (receiving, mut source) = self.sent(None).await;
        assert_eq!(source.hear().await, Message::Migration(Step::Built));
        drop(source);
        let events = self.dir().with_extension("events");
        eventually("an event says that it is held", || events.exists());
        receiving
    }

    /// A receiver that is killed at `point`.
    async fn killed_at(&self, point: &str, commit: bool) {
        let (receiving, mut source) = self.sent(Some(point)).await;
        if commit {
            assert_eq!(source.hear().await, Message::Migration(Step::Built));
            source.step(Step::Commit).await;
        }
        let paused = self.dir().with_extension("paused");
        eventually(point, || paused.exists());
        receiving.kill();
    }

    fn journals(&self) -> usize {
        count(&self.dir().join(".crxfer/state"))
    }

    fn migrations(&self) -> usize {
        count(&self.dir().join(".crxfer/migrations"))
    }

    fn journal(&self) -> Journal<DestinationState> {
        let state = self.dir().join(".crxfer/state");
        Journal::open(&state, ID).unwrap().unwrap()
    }

    fn nothing_is_left(&self) {
        eventually("no images", || self.migrations() == 0);
        eventually("no journal", || self.journals() == 0);
        eventually("no process", || self.workload.started().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_voted_for_is_held_until_its_source_is_back() {
    let Some(scene) = Scene::new() else { return };
    let receiving = scene.held().await;
    scene.workload.stands_still();
    let stranger = receiving.meet(&Peer::new(), Verdict::Commit).await;
    assert_eq!(stranger, Answer::Unknown);
    assert_eq!(
        receiving.meet(&scene.peer, Verdict::Ask).await,
        Answer::Holds
    );
    scene.workload.stands_still();
    let runs = Answer::Runs {
        pid: scene.workload.pid,
    };
    assert_eq!(receiving.meet(&scene.peer, Verdict::Commit).await, runs);
    scene.workload.runs();
    // A source that did not hear that asks again; also a receiver that knows it from the journal only.
    assert_eq!(receiving.meet(&scene.peer, Verdict::Commit).await, runs);
    eventually("no images", || scene.migrations() == 0);
    receiving.kill();
    let again = scene.receive();
    assert_eq!(again.meet(&scene.peer, Verdict::Commit).await, runs);
    scene.workload.runs();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_copy_goes_when_the_source_keeps_the_workload() {
    let Some(scene) = Scene::new() else { return };
    let receiving = scene.held().await;
    let answer = receiving.meet(&scene.peer, Verdict::Abort).await;
    assert_eq!(answer, Answer::Removed);
    scene.nothing_is_left();
    let answer = receiving.meet(&scene.peer, Verdict::Abort).await;
    assert_eq!(answer, Answer::Unknown);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_decide_for_a_held_copy() {
    let Some(scene) = Scene::new() else { return };
    let receiving = scene.held().await;
    scene.journal().decide(Keep::Source, "a test").unwrap();
    eventually("no images", || scene.migrations() == 0);
    eventually("no process", || scene.workload.started().is_none());
    // A source that had committed must hear that it may take the workload back.
    let answer = receiving.meet(&scene.peer, Verdict::Commit).await;
    assert_eq!(answer, Answer::Removed);
    drop(receiving);

    let scene = Scene::new().unwrap();
    let receiving = scene.held().await;
    scene.journal().decide(Keep::Destination, "a test").unwrap();
    scene.workload.runs();
    let answer = receiving.meet(&scene.peer, Verdict::Ask).await;
    assert!(matches!(answer, Answer::Runs { .. }), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_died_while_it_built_leaves_nothing_to_the_next() {
    let Some(scene) = Scene::new() else { return };
    scene.killed_at("building", false).await;
    let receiving = scene.receive();
    let answer = receiving.meet(&scene.peer, Verdict::Ask).await;
    // CRIU may have recorded nothing, or all images may have been complete already.
    if answer == Answer::Holds {
        let answer = receiving.meet(&scene.peer, Verdict::Abort).await;
        assert_eq!(answer, Answer::Removed);
    }
    scene.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_whose_receiver_died_is_built_again_when_the_source_says_so() {
    let Some(scene) = Scene::new() else { return };
    scene.held().await.kill();
    scene.workload.stands_still();
    let receiving = scene.receive();
    assert_eq!(
        receiving.meet(&scene.peer, Verdict::Ask).await,
        Answer::Holds
    );
    scene.workload.stands_still();
    let answer = receiving.meet(&scene.peer, Verdict::Commit).await;
    assert!(matches!(answer, Answer::Runs { .. }), "{answer:?}");
    scene.workload.runs();
    eventually("no images", || scene.migrations() == 0);
    // It is nobody's child that would take it along.
    receiving.kill();
    scene.workload.runs();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_about_to_be_let_go_is_by_the_next_receiver() {
    let Some(scene) = Scene::new() else { return };
    scene.killed_at("resuming", true).await;
    let receiving = scene.receive();
    scene.workload.runs();
    let answer = receiving.meet(&scene.peer, Verdict::Commit).await;
    assert!(matches!(answer, Answer::Runs { .. }), "{answer:?}");
    eventually("no images", || scene.migrations() == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_runs_is_not_started_twice() {
    let Some(scene) = Scene::new() else { return };
    scene.killed_at("running", true).await;
    scene.workload.runs();
    let started = scene.workload.started();
    let receiving = scene.receive();
    let answer = receiving.meet(&scene.peer, Verdict::Commit).await;
    assert!(matches!(answer, Answer::Runs { .. }), "{answer:?}");
    scene.workload.runs();
    assert_eq!(scene.workload.started(), started);
}
