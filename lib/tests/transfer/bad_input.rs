//! Damage of every kind: an error that names the file, nothing published, the set before untouched.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crxfer::delta::{FileMeta, FileName, SetName};
use crxfer::digest::{Digest, tree::file_digest, tree::segment_digest};
use crxfer::page::PageSize;
use crxfer::ticket::{Role, Secret, Ticket, proof};
use crxfer::transfer::{SendOptions, Target, TransferError, send};
use crxfer::transport::{self, Connection, ControlReceiver, ControlSender};
use crxfer::wire::{
    BeginSet, Codec, FailureCode, FrameHeader, Hello, Layout, Message, Op, encode_ops, limits,
};

use crate::images::{PAGE, copy_dir, page, pages, raw_pagemap, testdata, write_child, write_dump};
use crate::images::{image, write_files};
use crate::support::{Destination, LAYOUTS, Peer, code_of, count, memory, published, tempdir};

const BASE: u64 = 0x7000_0000_0000;

/// A good set under the name `dump` at the destination, and a directory of that name to damage.
struct Scene {
    place: tempfile::TempDir,
    to: Destination,
    peer: Peer,
}

impl Scene {
    async fn new(layout: Layout) -> Self {
        let place = tempdir();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let scene = Self {
            place,
            to,
            peer: Peer::new(),
        };
        write_dump(&scene.source(), &[1, 2, 3, 4]);
        scene.peer.send(&scene.source(), &scene.to).await;
        scene
    }

    fn source(&self) -> PathBuf {
        self.place.path().join("dump")
    }

    /// Sends what `damage` made of a good directory; returns why that failed.
    async fn refused(&self, damage: impl FnOnce(&Path)) -> TransferError {
        let before = published(&self.to.dir);
        let source = self.source();
        let _ = fs::remove_dir_all(&source);
        write_dump(&source, &[5, 6, 7, 8]);
        damage(&source);
        let error = self.peer.try_send(&source, &self.to).await.unwrap_err();
        self.to.settled().await;
        assert_eq!(published(&self.to.dir), before, "{error}");
        error
    }
}

type Damage = Box<dyn FnOnce(&Path)>;
type Make = fn(&Path);

#[tokio::test(flavor = "multi_thread")]
async fn damaged_memory_is_refused() {
    let entry = |pagemap: &[(u64, u64, u64)]| {
        let bytes = raw_pagemap(pagemap);
        move |dir: &Path| fs::write(dir.join("pagemap-4.img"), &bytes).unwrap()
    };
    let page = PAGE as u64;
    for layout in LAYOUTS {
        let scene = Scene::new(layout).await;
        let cases: Vec<(&str, Damage)> = vec![
            (
                "pages-1.img",
                Box::new(|dir| cut(&dir.join("pages-1.img"), 3 * PAGE as u64)),
            ),
            (
                "pages-1.img",
                Box::new(|dir| cut(&dir.join("pages-1.img"), 4 * PAGE as u64 - 1)),
            ),
            (
                "pages-1.img",
                Box::new(|dir| fs::remove_file(dir.join("pages-1.img")).unwrap()),
            ),
            (
                "pagemap-4.img",
                Box::new(|dir| cut(&dir.join("pagemap-4.img"), 17)),
            ),
            (
                "pagemap-4.img",
                Box::new(entry(&[(BASE, 2, 4), (BASE + page, 2, 4)])),
            ),
            (
                "pagemap-4.img",
                Box::new(entry(&[(BASE + 4 * page, 2, 4), (BASE, 2, 4)])),
            ),
            ("pagemap-4.img", Box::new(entry(&[(BASE + 1, 4, 4)]))),
            ("pagemap-4.img", Box::new(entry(&[(BASE, 0, 4)]))),
            (
                "pagemap-4.img",
                Box::new(entry(&[(u64::MAX - page + 1, 4, 4)])),
            ),
            ("pagemap-4.img", Box::new(entry(&[(BASE, 1 << 60, 4)]))),
            ("pages-1.img", Box::new(entry(&[(BASE, 5, 4)]))),
            ("pagemap-4.img", Box::new(entry(&[(BASE, 4, 64)]))),
            ("pagemap-4.img", Box::new(entry(&[(BASE, 4, 1)]))),
        ];
        for (file, damage) in cases {
            let error = scene.refused(damage).await.to_string();
            assert!(error.contains(file), "{file}: {error}");
        }
        // A pages file that is longer than accounted for is none of CRIU's errors.
        let source = scene.source();
        let _ = fs::remove_dir_all(&source);
        write_dump(&source, &[5, 6, 7, 8]);
        fs::write(source.join("pages-1.img"), pages([5, 6, 7, 8, 9])).unwrap();
        scene.peer.send(&source, &scene.to).await;
        assert_eq!(memory(&scene.to.set("dump")), memory(&source));
        scene.to.stop().await;
    }
}

fn cut(path: &Path, len: u64) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(len)
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn small_images_that_are_cut_short_are_refused() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let peer = Peer::new();
    let good = testdata("shm-tree/3");
    let mut names: Vec<_> = fs::read_dir(&good)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !["parent", "pages-"].iter().any(|no| name.starts_with(no)))
        .collect();
    names.sort();
    for name in names {
        let source = place.path().join("3");
        let _ = fs::remove_dir_all(&source);
        copy_dir(&good, &source);
        symlink_ancestors(place.path());
        let len = fs::metadata(source.join(&name)).unwrap().len();
        let is_only_magic = len <= 8;
        let cut_to = if is_only_magic { 3 } else { len - 1 };
        cut(&source.join(&name), cut_to);
        let error = peer.try_send(&source, &to).await.unwrap_err().to_string();
        assert!(error.contains(&name), "{name}: {error}");
    }
    assert_eq!(published(&to.dir).len(), 0);
    to.stop().await;
}

fn symlink_ancestors(place: &Path) {
    for round in ["1", "2"] {
        let _ = symlink(testdata(&format!("shm-tree/{round}")), place.join(round));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bits_that_were_flipped_in_the_frame_are_noticed() {
    let scene = Scene::new(Layout::Faithful).await;
    for name in ["core-4.img", "mm-4.img", "pstree.img", "inventory.img"] {
        for at in [0, 3, 4] {
            let error = scene
                .refused(|dir| flip(&dir.join(name), at))
                .await
                .to_string();
            assert!(error.contains(name), "{name}, byte {at}: {error}");
        }
    }
    let files = |dir: &Path| {
        let bytes = image(&[0x5456_4319, 0x5630_3138], &[&[8, 1, 16, 2], &[8, 2]]);
        fs::write(dir.join("files.img"), bytes).unwrap();
        flip(&dir.join("files.img"), 8);
    };
    let error = scene.refused(files).await.to_string();
    assert!(error.contains("files.img"), "{error}");
    scene.to.stop().await;
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x41;
    fs::write(path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn parents_that_lead_nowhere_are_refused() {
    let scene = Scene::new(Layout::Incremental).await;
    let link = |target: &'static str| {
        move |dir: &Path| {
            fs::remove_dir_all(dir).unwrap();
            write_child(dir, &[None, Some(9)], target);
        }
    };
    let missing = scene.refused(|dir: &Path| {
        link("../x")(dir);
        fs::remove_file(dir.join("parent")).unwrap();
    });
    let error = missing.await.to_string();
    assert!(
        error.contains("pagemap-4.img") && error.contains("no parent"),
        "{error}"
    );
    let error = scene.refused(link("../gone")).await.to_string();
    assert!(
        error.contains("parent") && error.contains("../gone"),
        "{error}"
    );
    let error = scene.refused(link("/tmp")).await.to_string();
    assert!(error.contains("flatten"), "{error}");
    let error = scene.refused(link("../dump")).await.to_string();
    assert!(error.contains("dump"), "{error}");
    let error = scene.refused(link("parent")).await.to_string();
    assert!(error.contains("parent"), "{error}");
    let other = scene.place.path().join("other");
    write_dump(&other, &[1, 2]);
    fs::rename(other.join("pagemap-4.img"), other.join("pagemap-5.img")).unwrap();
    let error = scene.refused(link("../other")).await.to_string();
    assert!(error.contains("pagemap-4.img"), "{error}");
    // There, but without the page that is left to it.
    let _ = fs::remove_dir_all(&other);
    write_files(
        &other,
        &raw_pagemap(&[(BASE + PAGE as u64, 1, 4)]),
        &page(1),
        2,
    );
    let error = scene.refused(link("../other")).await.to_string();
    assert!(error.contains("pagemap-4.img"), "{error}");
    scene.to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_regular_file_is_refused() {
    let scene = Scene::new(Layout::Faithful).await;
    let cases: [(&str, Make); 5] = [
        ("link", |path| symlink("core-4.img", path).unwrap()),
        ("folder", |path| fs::create_dir(path).unwrap()),
        ("fifo", |path| mknod(path, rustix::fs::FileType::Fifo)),
        ("socket", |path| drop(UnixListener::bind(path).unwrap())),
        ("control\u{1}", |path| fs::write(path, "").unwrap()),
    ];
    for (name, make) in cases {
        let error = scene.refused(|dir| make(&dir.join(name))).await.to_string();
        assert!(
            error.contains(name.trim_end_matches('\u{1}')),
            "{name}: {error}"
        );
    }
    if rustix::process::geteuid().is_root() {
        let device = |dir: &Path| mknod(&dir.join("null"), rustix::fs::FileType::CharacterDevice);
        let error = scene.refused(device).await.to_string();
        assert!(
            error.contains("null") && error.contains("device"),
            "{error}"
        );
    }
    let error = scene
        .peer
        .try_send(&scene.place.path().join("no"), &scene.to)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no such directory"), "{error}");
    scene.to.stop().await;
}

fn mknod(path: &Path, kind: rustix::fs::FileType) {
    use rustix::fs::{CWD, Mode, makedev, mknodat};
    let device = match kind {
        rustix::fs::FileType::CharacterDevice => makedev(1, 3),
        _ => 0,
    };
    mknodat(CWD, path, kind, Mode::RUSR, device).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_while_it_is_sent_is_named() {
    let scene = Scene::new(Layout::Faithful).await;
    let before = published(&scene.to.dir);
    let source = scene.source();
    fs::write(source.join("pages-1.img"), pages(10..4010)).unwrap();
    fs::write(
        source.join("pagemap-4.img"),
        raw_pagemap(&[(BASE, 4000, 4)]),
    )
    .unwrap();
    let options = SendOptions {
        bytes_per_s: Some(16 << 20),
        ..scene.peer.options(&source, &scene.to)
    };
    let writer = async {
        tokio::time::sleep(std::time::Duration::from_millis(400)).await;
        let file = File::options()
            .write(true)
            .open(source.join("pages-1.img"))
            .unwrap();
        file.write_all_at(b"other", 3999 * PAGE as u64).unwrap();
    };
    let (sent, ()) = tokio::join!(send(options), writer);
    let error = sent.unwrap_err().to_string();
    assert!(
        error.contains("pages-1.img") && error.contains("change"),
        "{error}"
    );
    scene.to.settled().await;
    assert_eq!(published(&scene.to.dir), before);
    scene.to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_larger_than_allowed_are_refused() {
    let place = tempdir();
    let dir = place.path().join("in");
    let to = Destination::with(|| {
        let mut options = crate::support::receive_options(&dir, Layout::Flat);
        options.max_set_bytes = Some(1 << 20);
        options
    })
    .await;
    let source = place.path().join("dump");
    write_dump(&source, &(1..=300).collect::<Vec<_>>());
    let error = Peer::new().try_send(&source, &to).await.unwrap_err();
    assert_eq!(code_of(&error), Some(FailureCode::Limit));
    assert!(error.to_string().contains("--max-bytes"), "{error}");
    assert_eq!(published(&dir).len(), 0);
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_and_other_tickets_are_refused() {
    let scene = Scene::new(Layout::Flat).await;
    let good = scene.to.ticket();
    let of_another_run = Ticket::new(
        good.addresses().to_vec(),
        good.fingerprint(),
        Secret::generate(),
    )
    .unwrap();
    let stranger = Peer::new().identity().fingerprint();
    let of_another_host =
        Ticket::new(good.addresses().to_vec(), stranger, good.secret().clone()).unwrap();
    write_dump(&scene.place.path().join("new"), &[9]);
    for (ticket, says) in [(of_another_run, "ticket"), (of_another_host, "key")] {
        let options = SendOptions {
            target: Target::Ticket(ticket),
            ..scene
                .peer
                .options(&scene.place.path().join("new"), &scene.to)
        };
        let error = send(options).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    assert!(!scene.to.set("new").exists());
    scene.to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_nothing_is_left() {
    let place = tempdir();
    let small = place.path().join("small");
    fs::create_dir(&small).unwrap();
    let mount = |args: &[&str]| {
        let status = std::process::Command::new(args[0])
            .args(&args[1..])
            .arg(&small)
            .output();
        status.is_ok_and(|output| output.status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs"]) {
        println!("skipped: a small file system cannot be mounted here");
        return;
    }
    let to = Destination::at(&small.join("in"), Layout::Flat).await;
    let peer = Peer::new();
    let source = place.path().join("dump");
    write_dump(&source, &[1, 2, 3]);
    peer.send(&source, &to).await;
    let before = published(&to.dir);
    write_dump(&source, &(1..=1500).collect::<Vec<_>>());
    let error = peer.try_send(&source, &to).await.unwrap_err();
    assert_eq!(code_of(&error), Some(FailureCode::Storage), "{error}");
    assert!(error.to_string().contains("no space left"), "{error}");
    to.settled().await;
    assert_eq!(published(&to.dir), before);
    assert_eq!(count(&to.dir.join(".crxfer/partial")), 0);
    write_dump(&source, &(1..=100).collect::<Vec<_>>());
    peer.send(&source, &to).await;
    to.stop().await;
    assert!(mount(&["umount", "-l"]));
}

/// Changes bytes of a file so that neither size nor time tells.
fn rot(path: &Path, change: impl FnOnce(&File)) {
    let times = fs::metadata(path).unwrap().modified().unwrap();
    let file = File::options().write(true).open(path).unwrap();
    change(&file);
    file.set_modified(times).unwrap();
}

fn punch(file: &File, pages: std::ops::Range<u64>) {
    use rustix::fs::{FallocateFlags, fallocate};
    let page = PAGE as u64;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(
        file,
        flags,
        pages.start * page,
        (pages.end - pages.start) * page,
    )
    .unwrap();
}

/// As `criu restore --auto-dedup` leaves it, or a failing disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_stored_set_that_lost_its_bytes_is_noticed_and_sent_again() {
    let numbers: Vec<u64> = (1..=200).collect();
    for layout in LAYOUTS {
        for (is_silent, is_cut) in [(true, false), (false, false), (false, true)] {
            let place = tempdir();
            let to = Destination::at(&place.path().join("in"), layout).await;
            let peer = Peer::new();
            let source = place.path().join("1");
            write_dump(&source, &numbers);
            let child = place.path().join("2");
            let mut changed = vec![None; 200];
            changed[7] = Some(1007);
            write_child(&child, &changed, "../1");
            peer.send(&source, &to).await;
            let stored = to.set("1").join("pages-1.img");
            // Two ticks of the clock that file times are taken from.
            tokio::time::sleep(std::time::Duration::from_millis(25)).await;
            match (is_silent, is_cut) {
                (true, _) => rot(&stored, |file| punch(file, 50..60)),
                (_, true) => cut(&stored, 150 * PAGE as u64),
                _ => punch(&File::options().write(true).open(&stored).unwrap(), 50..60),
            }
            // A full dump of the same memory: its pages would be copied from there.
            let full = place.path().join("full");
            let mut all = numbers.clone();
            all[3] = 1003;
            write_dump(&full, &all);
            let mut attempts = 0;
            while let Err(error) = peer.try_send(&full, &to).await {
                assert_eq!(code_of(&error), Some(FailureCode::Held), "{error}");
                assert!(error.to_string().contains("pages-1.img"), "{error}");
                attempts += 1;
                assert!(attempts < 2, "{error}");
            }
            // What goes bad without a trace is met only where it is read.
            let is_met = layout != Layout::Incremental || !is_silent;
            if is_met {
                assert_eq!(memory(&to.set("full")), memory(&full));
                // A child takes its parent along once more; the same set is no longer the same.
                let report = peer.send(&child, &to).await;
                assert_eq!(report.ancestors, 1);
                assert_eq!(memory(&to.set("2")), memory(&child));
                assert!(!peer.send(&source, &to).await.published.unchanged);
                assert_eq!(memory(&to.set("1")), memory(&source));
            }
            to.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_costs_bytes_and_nothing_else() {
    let scene = Scene::new(Layout::Incremental).await;
    let index = scene.to.dir.join(".crxfer/sets/1/index");
    for damage in 0..3 {
        match damage {
            0 => cut(&index, 40),
            1 => fs::write(&index, "nonsense").unwrap(),
            _ => fs::remove_file(&index).unwrap(),
        }
        let source = scene.place.path().join("next");
        let _ = fs::remove_dir_all(&source);
        write_dump(&source, &[1, 2, 3, 40 + damage]);
        let report = scene.peer.send(&source, &scene.to).await;
        assert_ne!(report.published.base.as_deref(), Some("dump"));
        assert_eq!(memory(&scene.to.set("next")), memory(&source));
    }
    scene.to.stop().await;
}

/// A source that speaks the protocol by hand.
struct FakeSource {
    connection: Connection,
    control: ControlSender,
    messages: ControlReceiver,
}

impl FakeSource {
    async fn connect(to: &Destination, peer: &Peer) -> Self {
        let ticket = to.ticket();
        let connection = transport::connect(
            ticket.addresses(),
            &peer.identity(),
            &[ticket.fingerprint()],
            &transport::Options::default(),
        )
        .await
        .unwrap();
        let (control, messages) = connection.open_control().await.unwrap();
        let ticket_proof = Some(proof(ticket.secret(), Role::Source, &connection.binding()));
        let mut source = Self {
            connection,
            control,
            messages,
        };
        source
            .say(Message::Hello(Hello {
                versions: (1, 1),
                software: "fake".to_owned(),
                ticket_proof,
            }))
            .await;
        assert!(matches!(source.hear().await, Message::Welcome(_)));
        source.say(Message::QueryHeld(Vec::new())).await;
        assert!(matches!(source.hear().await, Message::Held(_)));
        source
    }

    async fn say(&mut self, message: Message) {
        let _ = self.control.write_message(&message.encode()).await;
    }

    async fn hear(&mut self) -> Message {
        loop {
            let read = self.messages.read_message(limits::CONTROL_MESSAGE).await;
            match Message::decode(&read.unwrap().unwrap()).unwrap() {
                Message::Working => {}
                message => return message,
            }
        }
    }

    async fn failure(&mut self) -> FailureCode {
        loop {
            if let Message::Failure(failure) = self.hear().await {
                return failure.code;
            }
        }
    }

    async fn begin(&mut self, files: Vec<FileMeta>, change: impl FnOnce(&mut BeginSet)) {
        let mut begin = BeginSet {
            set: 1,
            name: SetName::new("dump").unwrap(),
            ancestor: false,
            page_size: PageSize::new(4096).unwrap(),
            image_version: 2,
            file_count: u32::try_from(files.len()).unwrap(),
            total_bytes: files.iter().map(|file| file.size).sum(),
            parent: None,
            base_name: None,
            root: None,
        };
        change(&mut begin);
        self.say(Message::BeginSet(begin)).await;
        self.say(Message::Files { set: 1, files }).await;
    }

    async fn frame(&self, ops: &[Op], raw: &[u8], change: impl FnOnce(&mut FrameHeader)) {
        let ops = encode_ops(ops);
        let len = u32::try_from(raw.len()).unwrap();
        let mut header = FrameHeader {
            set: 1,
            file: 0,
            segment: 0,
            codec: Codec::Raw,
            ops_len: u32::try_from(ops.len()).unwrap(),
            raw_len: len,
            payload_len: len,
        };
        change(&mut header);
        let mut stream = self.connection.open_bulk().await.unwrap();
        let bytes = [&header.encode()[..], &ops, raw].concat();
        let _ = stream.write(bytes.into()).await;
        // Kept open: its end is no part of the lie.
        std::mem::forget(stream);
    }
}

fn file(name: &str, size: u64) -> FileMeta {
    FileMeta::new(
        FileName::new(name).unwrap(),
        0o644,
        size,
        PageSize::new(4096).unwrap(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_a_set_are_found_out() {
    let scene = Scene::new(Layout::Faithful).await;
    let before = published(&scene.to.dir);
    let files = || vec![file("pages-1.img", 2 * PAGE as u64)];
    let connect = || FakeSource::connect(&scene.to, &scene.peer);
    let two = pages([900, 901]);

    let mut source = connect().await;
    source.begin(files(), |begin| begin.total_bytes = 5).await;
    assert_eq!(source.failure().await, FailureCode::Protocol);

    let mut source = connect().await;
    source.begin(vec![file("b", 1), file("a", 1)], |_| {}).await;
    assert_eq!(source.failure().await, FailureCode::Protocol);

    let mut source = connect().await;
    source.begin(files(), |begin| begin.file_count = 0).await;
    assert_eq!(source.failure().await, FailureCode::Protocol);

    let mut source = connect().await;
    source
        .begin(files(), |begin| {
            begin.base_name = SetName::new("nothing").ok()
        })
        .await;
    assert_eq!(source.failure().await, FailureCode::Storage);

    // A frame of the wrong length, of another file, of what is no zstd, one that comes twice.
    let mut source = connect().await;
    source.begin(files(), |_| {}).await;
    assert!(matches!(source.hear().await, Message::SetReady { .. }));
    source.frame(&[Op::Literal(2)], &two[..PAGE], |_| {}).await;
    assert_eq!(source.failure().await, FailureCode::Protocol);

    let mut source = connect().await;
    source.begin(files(), |_| {}).await;
    source.hear().await;
    source
        .frame(&[Op::Literal(2)], &two, |header| header.file = 7)
        .await;
    assert!(matches!(
        source.failure().await,
        FailureCode::Protocol | FailureCode::Content
    ));

    let mut source = connect().await;
    source.begin(files(), |_| {}).await;
    source.hear().await;
    source
        .frame(&[Op::Literal(2)], &two, |header| header.codec = Codec::Zstd)
        .await;
    assert_eq!(source.failure().await, FailureCode::Protocol);

    let mut source = connect().await;
    source.begin(files(), |_| {}).await;
    source.hear().await;
    source.frame(&[Op::Literal(2)], &two, |_| {}).await;
    source.frame(&[Op::Literal(2)], &two, |_| {}).await;
    assert_eq!(source.failure().await, FailureCode::Protocol);

    // Other bytes than the digests say.
    let mut source = connect().await;
    source.begin(files(), |_| {}).await;
    source.hear().await;
    source.frame(&[Op::Literal(2)], &two, |_| {}).await;
    let other = [Digest::of(&page(1)), Digest::of(&page(2))];
    let digest = file_digest(2 * PAGE as u64, PAGE as u64, &[segment_digest(&other)]);
    source
        .say(Message::FileDigests {
            set: 1,
            digests: vec![digest],
        })
        .await;
    source
        .say(Message::EndSet {
            set: 1,
            root: digest,
            frames: 1,
        })
        .await;
    assert_eq!(source.failure().await, FailureCode::Content);

    // Right digests, another root.
    let mut source = connect().await;
    source.begin(files(), |_| {}).await;
    source.hear().await;
    source.frame(&[Op::Literal(2)], &two, |_| {}).await;
    let own = [Digest::of(&page(900)), Digest::of(&page(901))];
    let digest = file_digest(2 * PAGE as u64, PAGE as u64, &[segment_digest(&own)]);
    source
        .say(Message::FileDigests {
            set: 1,
            digests: vec![digest],
        })
        .await;
    source
        .say(Message::EndSet {
            set: 1,
            root: digest,
            frames: 1,
        })
        .await;
    assert_eq!(source.failure().await, FailureCode::Content);

    scene.to.settled().await;
    assert_eq!(published(&scene.to.dir), before);
    scene.to.stop().await;
}

/// A pagemap of holes costs its sender nothing: its size must not become memory here.
#[tokio::test(flavor = "multi_thread")]
async fn a_pagemap_as_large_as_the_disk_is_not_read() {
    let scene = Scene::new(Layout::Incremental).await;
    let mut source = FakeSource::connect(&scene.to, &scene.peer).await;
    let size = 1 << 34;
    source
        .begin(vec![file("pagemap-4.img", size)], |_| {})
        .await;
    source.hear().await;
    let meta = file("pagemap-4.img", size);
    let mut segments = Vec::new();
    for segment in 0..meta.segments() {
        let blocks = meta.segment_range(segment);
        let count = u16::try_from(blocks.end - blocks.start).unwrap();
        let digests: Vec<_> = blocks
            .map(|block| crxfer::digest::zero_digest(meta.block_bytes(block)))
            .collect();
        segments.push(segment_digest(&digests));
        let _ = count;
    }
    let ops = [Op::Zero(16)];
    let mut stream = source.connection.open_bulk().await.unwrap();
    for segment in 0..meta.segments() {
        let encoded = encode_ops(&ops);
        let header = FrameHeader {
            set: 1,
            file: 0,
            segment,
            codec: Codec::Raw,
            ops_len: u32::try_from(encoded.len()).unwrap(),
            raw_len: 0,
            payload_len: 0,
        };
        stream
            .write([&header.encode()[..], &encoded].concat().into())
            .await
            .unwrap();
    }
    let digest = file_digest(size, u64::from(meta.block_len), &segments);
    let manifest = crxfer::delta::Manifest {
        page_size: PageSize::new(4096).unwrap(),
        image_version: 2,
        parent: None,
        files: vec![(meta.clone(), digest)],
    };
    source
        .say(Message::FileDigests {
            set: 1,
            digests: vec![digest],
        })
        .await;
    let frames = meta.segments();
    source
        .say(Message::EndSet {
            set: 1,
            root: manifest.root(),
            frames,
        })
        .await;
    assert_eq!(source.failure().await, FailureCode::Image);
    scene.to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_says_nothing_is_let_go() {
    let scene = Scene::new(Layout::Flat).await;
    let ticket = scene.to.ticket();
    let connection = transport::connect(
        ticket.addresses(),
        &scene.peer.identity(),
        &[ticket.fingerprint()],
        &transport::Options::default(),
    )
    .await
    .unwrap();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(15), connection.closed());
    assert!(
        ended.await.is_ok(),
        "it held its place by keep-alives alone"
    );
    scene.to.stop().await;
}
