//! `migrate`, with a real CRIU and a real program, against destinations that break their word: the
//! program runs on.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crxfer::criu::CriuOptions;
use crxfer::handover::{Journal, OnPartition, SourceState};
use crxfer::hooks::{Hooks, Side};
use crxfer::precopy::Goals;
use crxfer::preflight;
use crxfer::session::migration::Owner;
use crxfer::testing::SmallDisk;
use crxfer::ticket::{Role, Secret, Ticket, proof};
use crxfer::transfer::Target;
use crxfer::transfer::migrate::{
    MigrateError, MigrateEvent, MigrateEvents, MigrateFailure, MigrateOptions, Precopy, migrate,
};
use crxfer::transport::{
    self, BulkReceiver, CloseCode, Connection, ControlReceiver, ControlSender, Identity, Server,
    Trust,
};
use crxfer::wire::{
    FrameHeader, HEADER_LEN, Layout, MIGRATION_VERSION, Message, Offered, RecordKind, Step,
    StreamNote, Welcome, limits,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::hostile_source::{Program, has_criu};
use crate::support::{Destination, Peer, count, receive_options, tempdir};

const FREEZE_LIMIT: Duration = Duration::from_secs(2);

/// What the destination does wrong, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// It says nothing more once the tree is frozen.
    SilentAfterFreeze,
    /// Frozen, and the connection is gone.
    GoneAfterFreeze,
    /// The copy runs, it says, without the source's word.
    RunningWithoutCommit,
    /// Built, before anything was frozen.
    BuiltBeforeFreeze,
    /// Removed, although nobody asked.
    AbortedUnasked,
    /// Stored what was not begun.
    StoredOfTheFuture,
    /// None: its copy is built. It is the source's disk that is full when the commit is recorded.
    FullDiskHere,
}

const LIES: [Lie; 7] = [
    Lie::SilentAfterFreeze,
    Lie::GoneAfterFreeze,
    Lie::RunningWithoutCommit,
    Lie::BuiltBeforeFreeze,
    Lie::AbortedUnasked,
    Lie::StoredOfTheFuture,
    Lie::FullDiskHere,
];

/// A host that takes one migration, and lies.
struct FakeDestination {
    connection: Connection,
    control: ControlSender,
    lie: Lie,
}

impl FakeDestination {
    async fn serve(server: Server, secret: Secret, lie: Lie) -> Option<()> {
        let connection = server.accept().await?.complete().await.ok()?;
        let (control, messages) = connection.accept_control().await.ok()?;
        let ticket_proof = Some(proof(&secret, Role::Destination, &connection.binding()));
        let mut destination = Self {
            connection,
            control,
            lie,
        };
        destination.run(messages, ticket_proof).await;
        destination.connection.closed().await;
        Some(())
    }

    async fn run(
        &mut self,
        mut messages: ControlReceiver,
        ticket_proof: Option<[u8; 32]>,
    ) -> Option<()> {
        assert!(matches!(hear(&mut messages).await?, Message::Hello(_)));
        self.say(Message::Welcome(Welcome {
            version: MIGRATION_VERSION,
            software: "fake".into(),
            ticket_proof,
            layout: Layout::Faithful,
            max_set_bytes: None,
        }))
        .await;
        assert!(matches!(step(&mut messages).await?, Step::Offer(_)));
        self.step(Step::Offered(Offered {
            checks: preflight::encode_checks(&[]),
            restore_ns: 1,
            criu: "4.2.1".into(),
        }))
        .await;
        let mut bulk = self.connection.accept_bulk().await.ok()?;
        // Read by tasks of their own: a read that is dropped half way loses what it has read.
        let (heard, mut steps) = mpsc::channel(1);
        let (read, mut notes) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while heard.send(step(&mut messages).await?).await.is_ok() {}
            None::<()>
        });
        tasks.spawn(async move {
            while read.send(note(&mut bulk).await?).await.is_ok() {}
            None::<()>
        });
        loop {
            tokio::select! {
                Some(step) = steps.recv() => self.on_step(step).await?,
                Some(note) = notes.recv() => self.on_note(note).await?,
                Some(ended) = tasks.join_next() => {
                    ended.expect("what a source sends can be read");
                }
                else => return None,
            }
        }
    }

    async fn on_step(&mut self, step: Step) -> Option<()> {
        match step {
            Step::PrepareFinal(_) if self.lie == Lie::BuiltBeforeFreeze => {
                self.step(Step::Built).await;
            }
            Step::PrepareFinal(_) => self.step(Step::FinalReady).await,
            Step::Abort(_) => self.step(Step::Aborted).await,
            Step::Commit => panic!("{:?} was given the workload", self.lie),
            _ => {}
        }
        Some(())
    }

    async fn on_note(&mut self, note: StreamNote) -> Option<()> {
        match (note, self.lie) {
            (StreamNote::Begin { is_final: true, .. }, Lie::SilentAfterFreeze) => {
                std::future::pending::<()>().await;
            }
            (StreamNote::Begin { is_final: true, .. }, Lie::GoneAfterFreeze) => {
                self.connection.close(CloseCode::LocalFailure, "");
            }
            (StreamNote::Begin { is_final: true, .. }, Lie::RunningWithoutCommit) => {
                let (phases, notes) = (Vec::new(), Vec::new());
                self.step(Step::Running {
                    pid: 1,
                    resumed_ns: 1,
                    phases,
                    notes,
                })
                .await;
            }
            (StreamNote::Begin { is_final: true, .. }, Lie::AbortedUnasked) => {
                self.step(Step::Aborted).await;
            }
            (StreamNote::End { root: Some(_), .. }, Lie::FullDiskHere) => {
                self.step(Step::Built).await;
            }
            (StreamNote::End { number, root: None }, lie) => {
                let number = number + u32::from(lie == Lie::StoredOfTheFuture);
                self.step(Step::IterationDone {
                    number,
                    stored_bytes: 1,
                    work_ns: 1,
                })
                .await;
            }
            _ => {}
        }
        Some(())
    }

    async fn say(&mut self, message: Message) {
        let _ = self.control.write_message(&message.encode()).await;
    }

    async fn step(&mut self, step: Step) {
        self.say(Message::Migration(step)).await;
    }
}

async fn hear(messages: &mut ControlReceiver) -> Option<Message> {
    let bytes = messages
        .read_message(limits::CONTROL_MESSAGE)
        .await
        .ok()??;
    Some(Message::decode(&bytes).unwrap())
}

async fn step(messages: &mut ControlReceiver) -> Option<Step> {
    loop {
        match hear(messages).await? {
            Message::Migration(step) => return Some(step),
            Message::Working | Message::Failure(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

// The next note; frames are read and forgotten.
async fn note(bulk: &mut BulkReceiver) -> Option<StreamNote> {
    loop {
        let mut kind = [0];
        bulk.read_exact(&mut kind).await.ok()?;
        if RecordKind::from_byte(kind[0]) == Ok(RecordKind::Note) {
            let mut length = [0; 4];
            bulk.read_exact(&mut length).await.ok()?;
            let bytes = bulk
                .read_vec(u32::from_le_bytes(length) as usize)
                .await
                .ok()?;
            return Some(StreamNote::decode(&bytes).unwrap());
        }
        let mut head = [0; HEADER_LEN];
        bulk.read_exact(&mut head).await.ok()?;
        let header = FrameHeader::decode(&head).unwrap();
        bulk.read_vec(header.ops_len as usize).await.ok()?;
        let _: Vec<u8> = bulk.read_vec(header.payload_len as usize).await.ok()?;
    }
}

/// A program that adds a byte to a file every few milliseconds.
struct Ticking {
    program: Program,
    file: std::path::PathBuf,
}

impl Ticking {
    fn start(dir: &Path) -> Self {
        let file = dir.join("ticks");
        let script = "import sys,time\nf=open(sys.argv[1],'ab',0)\nm=bytearray(b'x'*(8<<20))\nwhile 1:\n f.write(b'.')\n time.sleep(.005)";
        let program = Program::start("python3", &["-c", script, file.to_str().unwrap()]);
        Self { program, file }
    }

    fn ticks(&self) -> u64 {
        fs::metadata(&self.file).map_or(0, |about| about.len())
    }

    /// Whether it ticks within five seconds: machines that build and test at once are slow.
    async fn runs(&self) -> bool {
        let before = self.ticks();
        for _ in 0..500 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if self.ticks() > before {
                return true;
            }
        }
        false
    }

    /// The longest time without a tick, until `stop`.
    #[expect(clippy::disallowed_methods, reason = "a pause is measured")]
    async fn longest_pause(&self, stop: Arc<Mutex<bool>>) -> Duration {
        let (mut longest, mut last, mut since) = (Duration::ZERO, self.ticks(), Instant::now());
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let now = self.ticks();
            longest = longest.max(since.elapsed());
            if now != last {
                (last, since) = (now, Instant::now());
                if *stop.lock().unwrap() {
                    return longest;
                }
            } else if since.elapsed() > Duration::from_secs(20) {
                return since.elapsed();
            }
        }
    }
}

fn options(pid: u32, work: &Path, target: Target, events: MigrateEvents) -> MigrateOptions {
    let (stop, stopped) = watch::channel(false);
    std::mem::forget(stop);
    MigrateOptions {
        pid,
        external: None,
        name: None,
        target,
        identity: Peer::new().identity(),
        goals: Goals::default(),
        precopy: Precopy::Live,
        freeze_limit: FREEZE_LIMIT,
        program: "criu".into(),
        criu: CriuOptions::default(),
        hooks: Hooks::none(Side::Source),
        force: true,
        dry_run: false,
        bytes_per_s: None,
        read_bytes_per_s: None,
        mode: crxfer::transfer::migrate::Mode::Disk,
        work: work.to_owned(),
        // Beside it: in the work directory nothing may be left.
        state: work.with_file_name("state"),
        guard: None,
        on_partition: OnPartition::Hold,
        partition_wait: Duration::from_secs(60),
        transport: transport::Options::default(),
        stop: stopped,
        events,
    }
}

async fn lied_to(lie: Lie) -> (MigrateFailure, bool, Duration) {
    let place = tempdir();
    let mut ticking = Ticking::start(place.path());
    assert!(ticking.runs().await, "python3 runs");
    let identity = Identity::generate().unwrap();
    let listen = ["127.0.0.1:0".parse().unwrap()];
    let options_there = transport::Options::default();
    let server = Server::bind(&listen, identity, Trust::Anyone, options_there).unwrap();
    let secret = Secret::from_bytes([5; 32]);
    let addresses = server.local_addresses().unwrap();
    let ticket = Ticket::new(addresses, server.fingerprint(), secret.clone()).unwrap();
    let serving = tokio::spawn(FakeDestination::serve(server, secret, lie));

    let froze = Arc::new(Mutex::new(false));
    let saw = froze.clone();
    let state = place.path().join("state");
    let disk = (lie == Lie::FullDiskHere).then(|| {
        SmallDisk::mount(&state, 256)
            .unwrap()
            .expect("root may mount")
    });
    let events = MigrateEvents::new(move |event| match event {
        MigrateEvent::Freezing => *saw.lock().unwrap() = true,
        MigrateEvent::Built => {
            if let Some(disk) = &disk {
                fill(disk, &state);
            }
        }
        _ => {}
    });
    let work = place.path().join("work");
    let migrating = migrate(options(
        ticking.program.pid(),
        &work,
        Target::Ticket(ticket),
        events,
    ));
    let ended = Arc::new(Mutex::new(false));
    let until = ended.clone();
    let migrating = async {
        let outcome = tokio::time::timeout(Duration::from_secs(60), migrating).await;
        *until.lock().unwrap() = true;
        outcome.expect("an end within 60 s")
    };
    let (outcome, pause) = tokio::join!(migrating, ticking.longest_pause(ended));
    let failure = outcome.expect_err("nothing can have moved");
    assert!(
        ticking.program.is_running() && ticking.runs().await,
        "{lie:?}: {failure}"
    );
    assert_eq!(count(&work), 0, "{lie:?}: the images of the dump are gone");
    serving.abort();
    let panicked = serving.await.is_err_and(|error| error.is_panic());
    assert!(!panicked, "{lie:?}");
    let froze = *froze.lock().unwrap();
    (failure, froze, pause)
}

/// Leaves no room in `state` for another line of its journal, once the tree is being fenced.
fn fill(disk: &SmallDisk, state: &Path) {
    let id = Journal::<SourceState>::list(state).unwrap()[0];
    let journal = Journal::<SourceState>::open(state, id).unwrap().unwrap();
    while journal.read().unwrap().state() != SourceState::Fencing {
        std::thread::sleep(Duration::from_millis(1));
    }
    disk.fill(&journal);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_destination_does_before_the_commit_the_program_runs_on() {
    if !has_criu() {
        return;
    }
    for lie in LIES {
        let (failure, froze, pause) = lied_to(lie).await;
        println!("{lie:?}: paused for {pause:?}: {failure}");
        assert_eq!(failure.owner, Owner::Source, "{lie:?}: {failure}");
        assert!(
            pause < FREEZE_LIMIT + Duration::from_secs(1),
            "{lie:?}: {pause:?}"
        );
        let before = matches!(lie, Lie::BuiltBeforeFreeze | Lie::StoredOfTheFuture);
        assert_eq!(froze, !before, "{lie:?}: {failure}");
        let text = failure.to_string();
        let expected = match lie {
            Lie::SilentAfterFreeze => "--freeze-limit",
            Lie::GoneAfterFreeze => "ended the connection",
            Lie::FullDiskHere => "cannot write",
            _ => "broke the protocol",
        };
        assert!(text.contains(expected), "{lie:?}: {text}");
        if lie == Lie::SilentAfterFreeze {
            assert!(pause > FREEZE_LIMIT / 2, "it was frozen: {pause:?}");
        }
    }
}

/// On one host the pids of the tree are taken by the tree itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_tree_whose_pids_are_taken_is_refused_and_not_touched() {
    if !has_criu() {
        return;
    }
    let place = tempdir();
    let ticking = Ticking::start(place.path());
    let dir = place.path().join("in");
    let to = Destination::with(|| crxfer::transfer::ReceiveOptions {
        restore: Some(crxfer::transfer::RestoreHost {
            runtimes: Vec::new(),
            program: "criu".into(),
            config_file: None,
            hooks: Hooks::none(Side::Destination),
        }),
        ..receive_options(&dir, Layout::Faithful)
    })
    .await;
    let work = place.path().join("work");
    let pid = ticking.program.pid();
    let target = Target::Ticket(to.ticket());
    let failure = migrate(options(pid, &work, target, MigrateEvents::none())).await;
    let failure = failure.expect_err("its pids are taken");
    assert!(
        matches!(failure.error, MigrateError::Preflight(_)),
        "{failure}"
    );
    assert!(failure.to_string().contains(&pid.to_string()), "{failure}");
    assert!(failure.untouched && failure.owner == Owner::Source);
    assert!(ticking.runs().await);
    assert_eq!(count(&to.dir.join(".crxfer/migrations")), 0);
    to.stop().await;
}
