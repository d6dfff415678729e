//! A destination that takes process trees, against sources that speak the protocol by hand.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use crxfer::delta::{FileName, Outgoing, Record};
use crxfer::digest::Digest;
use crxfer::hooks::{Hooks, Side};
use crxfer::image::{PageFlags, PageRun, PagemapName};
use crxfer::page::PageSize;
use crxfer::preflight::{self, Choices};
use crxfer::ticket::{Role, Ticket, proof};
use crxfer::transfer::{ReceiveOptions, RestoreHost};
use crxfer::transport::{self, BulkSender, Connection, ControlReceiver, ControlSender};
use crxfer::wire::{
    Codec, Failure, FailureCode, FrameHeader, Hello, Layout, Message, MigrationId, Object, Offer,
    Offered, Op, RecordKind, RestoreOptions, Step, StreamNote, encode_ops, limits,
};

use crate::images::write_dump;
use crate::support::{Destination, Peer, count, receive_options, tempdir};

const PAGE: usize = 4096;

/// Whether trees can be dumped and restored here; says why not.
pub(crate) fn has_criu() -> bool {
    let version = Command::new("criu").arg("--version").output();
    let there =
        rustix::process::geteuid().is_root() && version.is_ok_and(|output| output.status.success());
    if !there {
        eprintln!("skipped: needs root and criu");
    }
    there
}

/// A program of its own session that holds nothing of this one, killed when dropped.
pub(crate) struct Program(Child);

impl Program {
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Self {
        let child = Command::new("setsid")
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let program = Self(child.unwrap());
        // Until setsid has become the program itself.
        std::thread::sleep(Duration::from_millis(300));
        program
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn host(dir: &Path) -> ReceiveOptions {
    ReceiveOptions {
        restore: Some(RestoreHost {
            runtimes: Vec::new(),
            program: "criu".into(),
            config_file: None,
            hooks: Hooks::none(Side::Destination),
        }),
        ..receive_options(dir, Layout::Faithful)
    }
}

/// Facts of a process that has ended since: its pids are free.
fn facts_of_the_past() -> Vec<u8> {
    let program = Program::start("sleep", &["1000"]);
    let choices = Choices {
        force: true,
        ..Choices::default()
    };
    preflight::gather(program.pid(), &choices)
        .unwrap()
        .facts
        .encode()
}

fn offer(id: u8, facts: &[u8]) -> Offer {
    Offer {
        id: MigrationId([id; 16]),
        name: "web".into(),
        page_size: PageSize::of_host(),
        memory_bytes: 1 << 20,
        facts: facts.to_vec(),
        options: RestoreOptions::default(),
        dry_run: false,
        keeping: crxfer::wire::Keeping::AsSet,
        runtime: String::new(),
        container: String::new(),
    }
}

pub(crate) struct FakeSource {
    _connection: Connection,
    control: ControlSender,
    messages: ControlReceiver,
    bulk: BulkSender,
}

impl FakeSource {
    async fn connect(to: &Destination, peer: &Peer) -> Self {
        Self::connect_to(&to.ticket(), peer).await
    }

    pub(crate) async fn connect_to(ticket: &Ticket, peer: &Peer) -> Self {
        let options = transport::Options::default();
        let (identity, keys) = (peer.identity(), [ticket.fingerprint()]);
        let connection = transport::connect(ticket.addresses(), &identity, &keys, &options);
        let connection = connection.await.unwrap();
        let (control, messages) = connection.open_control().await.unwrap();
        let ticket_proof = Some(proof(ticket.secret(), Role::Source, &connection.binding()));
        let mut source = Self {
            bulk: connection.open_bulk().await.unwrap(),
            _connection: connection,
            control,
            messages,
        };
        let hello = Hello {
            versions: (2, 2),
            software: "fake".to_owned(),
            ticket_proof,
        };
        source.say(Message::Hello(hello)).await;
        assert!(matches!(source.hear().await, Message::Welcome(_)));
        source
    }

    /// As far as the offer's acceptance.
    async fn accepted(to: &Destination, peer: &Peer, offer: Offer) -> Self {
        let mut source = Self::connect(to, peer).await;
        let offered = source.offer(offer).await;
        let checks = preflight::decode_checks(&offered.checks).unwrap();
        assert!(preflight::may_begin(&checks), "{checks:#?}");
        source
    }

    pub(crate) async fn say(&mut self, message: Message) {
        let _ = self.control.write_message(&message.encode()).await;
    }

    pub(crate) async fn step(&mut self, step: Step) {
        self.say(Message::Migration(step)).await;
    }

    pub(crate) async fn hear(&mut self) -> Message {
        let heard = async {
            loop {
                let read = self.messages.read_message(limits::CONTROL_MESSAGE).await;
                match Message::decode(&read.unwrap().unwrap()).unwrap() {
                    Message::Working => {}
                    message => return message,
                }
            }
        };
        let heard = tokio::time::timeout(Duration::from_secs(30), heard).await;
        heard.expect("an answer within 30 s")
    }

    pub(crate) async fn offer(&mut self, offer: Offer) -> Offered {
        self.step(Step::Offer(Box::new(offer))).await;
        match self.hear().await {
            Message::Migration(Step::Offered(offered)) => offered,
            other => panic!("{other:?}"),
        }
    }

    async fn failure(&mut self) -> Failure {
        loop {
            if let Message::Failure(failure) = self.hear().await {
                return failure;
            }
        }
    }

    pub(crate) async fn bytes(&mut self, bytes: Vec<u8>) {
        let _ = self.bulk.write(Bytes::from(bytes)).await;
    }

    async fn note(&mut self, note: StreamNote) {
        self.bytes(note.encode()).await;
    }

    async fn begin(&mut self, number: u32, is_final: bool) {
        self.note(StreamNote::Begin { number, is_final }).await;
    }

    async fn memory(&mut self) {
        let memory = Object::Memory(PagemapName::Task(7));
        self.note(StreamNote::Objects(vec![memory])).await;
    }

    async fn frame(&mut self, set: u32, segment: u64, ops: &[Op], raw: &[u8]) {
        self.bytes(frame(set, 0, segment, ops, raw)).await;
    }

    pub(crate) async fn ready(&mut self) {
        self.step(Step::PrepareFinal(1)).await;
        let heard = self.hear().await;
        assert_eq!(heard, Message::Migration(Step::FinalReady));
    }
}

fn frame(set: u32, file: u32, segment: u64, ops: &[Op], raw: &[u8]) -> Vec<u8> {
    let ops = encode_ops(ops);
    let len = u32::try_from(raw.len()).unwrap();
    let header = FrameHeader {
        set,
        file,
        segment,
        codec: Codec::Raw,
        ops_len: u32::try_from(ops.len()).unwrap(),
        raw_len: len,
        payload_len: len,
    };
    [&[RecordKind::FRAME], &header.encode()[..], &ops, raw].concat()
}

/// A destination for trees with a peer, and a set that can be sent to see that it still serves.
struct Scene {
    place: tempfile::TempDir,
    to: Destination,
    peer: Peer,
}

impl Scene {
    async fn new() -> Self {
        let place = tempdir();
        let dir = place.path().join("in");
        let to = Destination::with(|| host(&dir)).await;
        write_dump(&place.path().join("dump"), &[1, 2, 3]);
        Self {
            place,
            to,
            peer: Peer::new(),
        }
    }

    /// Nothing of any migration is left, and others are served.
    async fn is_clean(&self, case: &str) {
        let migrations = self.to.dir.join(".crxfer/migrations");
        for _ in 0..200 {
            if count(&migrations) == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        assert_eq!(count(&migrations), 0, "{case}");
        self.peer
            .send(&self.place.path().join("dump"), &self.to)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_is_refused_where_only_images_are_taken() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let mut source = FakeSource::connect(&to, &Peer::new()).await;
    source.step(Step::Offer(Box::new(offer(1, &[])))).await;
    let failure = source.failure().await;
    assert_eq!(failure.code, FailureCode::Refused);
    assert!(failure.reason.contains("--allow-restore"), "{failure}");
    assert!(!to.dir.join(".crxfer/migrations").exists());
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_and_a_refused_offer_leave_nothing() {
    if !has_criu() {
        return;
    }
    let scene = Scene::new().await;
    let mut source = FakeSource::connect(&scene.to, &scene.peer).await;
    let dry = Offer {
        dry_run: true,
        ..offer(1, &facts_of_the_past())
    };
    let checks = preflight::decode_checks(&source.offer(dry).await.checks).unwrap();
    assert!(preflight::may_begin(&checks), "{checks:#?}");
    scene.is_clean("a dry run").await;

    let running = Program::start("sleep", &["1000"]);
    let survey = preflight::gather(running.pid(), &Choices::default()).unwrap();
    let mut source = FakeSource::connect(&scene.to, &scene.peer).await;
    let offered = source.offer(offer(2, &survey.facts.encode())).await;
    let checks = preflight::decode_checks(&offered.checks).unwrap();
    assert!(!preflight::may_begin(&checks), "{checks:#?}");
    // As `migrate` does. It was an error of the protocol.
    source.step(Step::Abort("refused".into())).await;
    assert_eq!(source.hear().await, Message::Migration(Step::Aborted));
    scene.is_clean("a refused offer").await;
    scene.to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_source_sends_ends_its_migration_only() {
    if !has_criu() {
        return;
    }
    let scene = Scene::new().await;
    let facts = facts_of_the_past();
    let whole = [Op::Literal(1), Op::Held(255)];
    let page = vec![7; PAGE];
    for case in 0.. {
        let id = u8::try_from(case).unwrap();
        let mut source = FakeSource::accepted(&scene.to, &scene.peer, offer(id, &facts)).await;
        let mut expected = FailureCode::Protocol;
        match case {
            // Before anything was begun.
            0 => source.frame(1, 0, &whole, &page).await,
            1 => source.memory().await,
            2 => source.begin(2, false).await,
            // The final iteration without asking.
            3 => source.begin(1, true).await,
            4 => source.bytes(vec![9]).await,
            5 => {
                source
                    .bytes([&[1][..], &u32::MAX.to_le_bytes()].concat())
                    .await
            }
            6 => {
                source
                    .bytes(vec![1, 4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])
                    .await
            }
            7 => {
                source.begin(1, false).await;
                source.memory().await;
                source.frame(1, u64::MAX >> 8, &whole, &page).await;
            }
            8 => {
                source.begin(1, false).await;
                source.memory().await;
                source.frame(1, 0, &whole, &page[..9]).await;
            }
            9 => {
                source.begin(1, false).await;
                let file = Object::File {
                    name: FileName::new("core-7.img").unwrap(),
                    mode: 0o600,
                    size: 1,
                };
                source.note(StreamNote::Objects(vec![file])).await;
            }
            10 => source.step(Step::Commit).await,
            11 => source.step(Step::PrepareFinal(7)).await,
            12 => source.step(Step::Built).await,
            13 => source.step(Step::Offer(Box::new(offer(id, &facts)))).await,
            14 => source.say(Message::QueryHeld(Vec::new())).await,
            // The whole of it, but for one bit of the root.
            15 => {
                source.ready().await;
                source.begin(1, true).await;
                source.memory().await;
                source.frame(1, 0, &whole, &page).await;
                let run = PageRun {
                    vaddr: 0,
                    pages: 1,
                    flags: PageFlags::PRESENT,
                };
                let runs = StreamNote::Runs {
                    object: 0,
                    runs: vec![run],
                };
                source.note(runs).await;
                let root = Some(Digest([3; 32]));
                source.note(StreamNote::End { number: 1, root }).await;
                expected = FailureCode::Content;
            }
            // A dump that is what was stated, and nothing that could be restored.
            16 => {
                source.ready().await;
                let mut out = Outgoing::new(PageSize::of_host());
                let mut records = Vec::new();
                out.begin(1, true, &mut records);
                let task = PagemapName::Task(7);
                out.dumped_pages(task, 0, PageFlags::PRESENT, &page, &mut records);
                out.end(&mut records);
                for record in records {
                    source.bytes(encode(record)).await;
                }
                expected = FailureCode::Criu;
            }
            // A commit before the vote, while the final iteration arrives.
            17 => {
                source.ready().await;
                source.begin(1, true).await;
                source.step(Step::Commit).await;
            }
            _ => break,
        }
        let failure = source.failure().await;
        assert_eq!(failure.code, expected, "case {case}: {failure}");
        scene.is_clean(&format!("case {case}")).await;
    }
    scene.to.stop().await;
}

pub(crate) fn encode(record: Record) -> Vec<u8> {
    match record {
        Record::Note(note) => note.encode(),
        Record::Frame(it) => frame(1, it.object, it.segment, &it.ops, &it.literal),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_leaves_or_gives_up_while_it_sends_leaves_nothing() {
    if !has_criu() {
        return;
    }
    let scene = Scene::new().await;
    let facts = facts_of_the_past();
    for gives_up in [true, false] {
        for round in 0..5 {
            let offer = offer(round, &facts);
            let mut source = FakeSource::accepted(&scene.to, &scene.peer, offer).await;
            source.begin(1, false).await;
            // Many small files, so that some are made while the directory is removed.
            for object in 0..400 {
                if object == 200 && gives_up {
                    source.step(Step::Abort("enough".into())).await;
                }
                let memory = Object::Memory(PagemapName::Task(object + 1));
                source.note(StreamNote::Objects(vec![memory])).await;
                let object = u32::try_from(object).unwrap();
                let ops = [Op::Literal(16), Op::Held(240)];
                source
                    .bytes(frame(1, object, 0, &ops, &[7; 16 * PAGE]))
                    .await;
            }
            if gives_up {
                let heard = source.hear().await;
                assert_eq!(heard, Message::Migration(Step::Aborted), "round {round}");
            }
            drop(source);
            scene
                .is_clean(&format!("gives up: {gives_up}, round {round}"))
                .await;
        }
    }
    scene.to.stop().await;
}

/// The directory of the first would go with the end of the second.
#[tokio::test(flavor = "multi_thread")]
async fn an_offer_with_the_id_of_another_does_not_harm_it() {
    if !has_criu() {
        return;
    }
    let scene = Scene::new().await;
    let facts = facts_of_the_past();
    let mut first = FakeSource::accepted(&scene.to, &scene.peer, offer(1, &facts)).await;
    for dry_run in [true, false] {
        let mut second = FakeSource::connect(&scene.to, &scene.peer).await;
        let same = Offer {
            dry_run,
            ..offer(1, &facts)
        };
        second.step(Step::Offer(Box::new(same))).await;
        let _ = second.hear().await;
        drop(second);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    first.begin(1, false).await;
    first
        .note(StreamNote::End {
            number: 1,
            root: None,
        })
        .await;
    let stored = first.hear().await;
    assert!(
        matches!(stored, Message::Migration(Step::IterationDone { .. })),
        "{stored:?}"
    );
    drop(first);
    scene.is_clean("the first").await;
    scene.to.stop().await;
}
