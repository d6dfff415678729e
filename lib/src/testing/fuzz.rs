//! The bodies of the fuzz targets: each takes any bytes and panics where a rule is broken.
//!
//! They live here so that ordinary tests replay the committed corpus through the same code, and
//! `fuzz/fuzz_targets/` has nothing but calls.

use std::collections::BTreeSet;

use crate::criu::page_server::{BATCH_BYTES, Event, PageServer, PageServerError, Want};
use crate::criu::streamer::{MAX_REQUEST_BYTES, Requests, Role, Want as RequestsWant};
use crate::delta::codec::Decompressor;
use crate::delta::{BlockRef, FileMeta, FileName, SetName};
use crate::digest::Digest;
use crate::identity::Fingerprint;
use crate::image::framing::Records;
use crate::image::{DumpStats, Inventory, PageFlags, PageRun, Pagemap, PagemapName};
use crate::page::PageSize;
use crate::preflight::{Facts, decode_checks, encode_checks, limits as facts_limits};
use crate::store::Index;
use crate::text;
use crate::ticket::Ticket;
use crate::wire::{
    BeginSet, BlockId, Codec, Failure, FailureCode, FrameHeader, Generation, HEADER_LEN, HeldRun,
    Hello, Layout, Message, MigrationId, Object, Offer, Offered, PagesHeld, PagesOffer,
    PagesOffered, PagesStep, PagesStored, Phase, Published, RecordKind, RestoreOptions, SegmentAt,
    Step, StreamNote, Welcome, decode_ops, encode_ops, limits,
};

pub use super::session_fuzz::{session, session_seeds};
pub use super::standby_fuzz::{standby, standby_seeds};

/// One target: takes the fuzzer's bytes.
pub type Target = fn(&[u8]);

/// Every target by the name of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("image_framing", image_framing),
    ("pagemap", pagemap),
    ("inventory", inventory),
    ("wire_message", wire_message),
    ("page_frame", page_frame),
    ("ticket", ticket),
    ("store_index", store_index),
    ("session", session),
    ("preflight", preflight),
    ("page_stream", page_stream),
    ("stream_note", stream_note),
    ("standby", standby),
    ("journal", journal),
    ("streamer", streamer),
];

/// What CRIU sends to an image streamer: which side, how the bytes are cut, then the bytes; each that
/// follows a request stands for a pipe. Names that come out are single components, a dump's come once,
/// and how the bytes are cut changes nothing.
pub fn streamer(data: &[u8]) {
    let [side, step, stream @ ..] = data else {
        return;
    };
    let role = match side % 2 {
        0 => Role::Capture,
        _ => Role::Serve,
    };
    let whole = played(role, usize::MAX, stream);
    assert_eq!(whole, played(role, usize::from(*step) % 7 + 1, stream));
    let (names, _) = whole;
    for name in &names {
        assert!(FileName::new(name.as_str()).is_ok() && !name.contains('/'));
    }
    if role == Role::Capture {
        let once: BTreeSet<_> = names.iter().collect();
        assert_eq!(once.len(), names.len());
    }
}

// Names in order, and how it ended.
fn played(role: Role, step: usize, mut stream: &[u8]) -> (Vec<String>, Option<String>) {
    let mut requests = Requests::new(role);
    let mut names = Vec::new();
    while !stream.is_empty() {
        match requests.want() {
            RequestsWant::Bytes(wanted) => {
                assert!((1..=MAX_REQUEST_BYTES as usize).contains(&wanted));
                let (now, later) = stream.split_at(wanted.min(step).min(stream.len()));
                stream = later;
                match requests.take_bytes(now) {
                    Ok(Some(name)) => names.push(name.to_string()),
                    Ok(None) => {}
                    Err(error) => return (names, Some(error.to_string())),
                }
            }
            RequestsWant::Answer => {
                let exists = stream[0].is_multiple_of(2);
                assert_eq!(requests.answer(exists).len(), 6);
            }
            RequestsWant::Pipe => {
                stream = &stream[1..];
                assert_eq!(
                    Some(requests.take_pipe().as_str()),
                    names.last().map(String::as_str)
                );
            }
        }
    }
    let end = requests.check_end();
    (names, end.err().map(|error| error.to_string()))
}

/// A migration's journal: see [`crate::handover::journal`].
pub fn journal(data: &[u8]) {
    crate::handover::journal::fuzz::journal(data);
}

/// Journals of both sides, whole and torn.
pub fn journal_seeds() -> Vec<Vec<u8>> {
    crate::handover::journal::fuzz::journal_seeds()
}

/// Records of an image: they follow one another without a gap and end with the file or an error.
pub fn image_framing(data: &[u8]) {
    let Ok(records) = Records::parse(data) else {
        return;
    };
    let mut expected = None;
    let mut failed = false;
    for record in records {
        assert!(!failed, "a record behind an error");
        let Ok(record) = record else {
            failed = true;
            continue;
        };
        assert!(expected.is_none_or(|at| at == record.offset));
        let end = record.offset + 4 + record.message.len();
        assert_eq!(&data[record.offset + 4..end], record.message);
        expected = Some(end);
    }
    assert!(failed || expected.is_none_or(|end| end == data.len()));
}

/// A pagemap: what is taken keeps the rules, and what is written from it reads as the same pages.
pub fn pagemap(data: &[u8]) {
    let Some((&size, image)) = data.split_first() else {
        return;
    };
    let page_size = PageSize::new(4096 << (size % 10)).expect("4 KiB to 2 MiB");
    let Ok(map) = Pagemap::parse(image, "pagemap-1.img", page_size) else {
        return;
    };
    let mut end = 0;
    for run in map.runs() {
        assert!(run.pages > 0 && run.vaddr >= end && page_size.is_aligned(run.vaddr));
        end = run.end(page_size);
        assert!(end > run.vaddr);
    }
    assert!(map.present_pages() <= map.pages());
    assert!(map.present_bytes() >= map.present_pages());
    // Writing splits runs of more than 2^32 pages: not a million of them for one input.
    if map.pages() < 1 << 40 {
        let again = Pagemap::parse(&map.encode(), "pagemap-1.img", page_size);
        let again = again.expect("what is written can be read");
        assert_eq!(again.pages_id(), map.pages_id());
        assert_eq!(again.pages(), map.pages());
        assert_eq!(again.present_pages(), map.present_pages());
    }
}

/// The two small images that are decoded whole.
pub fn inventory(data: &[u8]) {
    if let Ok(inventory) = Inventory::parse(data, "inventory.img") {
        let _ = inventory.is_pre_dump();
        let _ = inventory.check_understood("inventory.img");
    }
    let _ = DumpStats::parse(data, "stats-dump");
}

/// The memory stream of a dumping CRIU, without its page data: runs ascend, batches are all of their
/// run, and how the bytes were split changes nothing.
pub fn page_stream(data: &[u8]) {
    let Some((&size, stream)) = data.split_first() else {
        return;
    };
    let page_size = PageSize::new(4096 << (size % 10)).expect("4 KiB to 2 MiB");
    let whole = page_stream_events(stream, page_size, usize::MAX);
    assert_eq!(page_stream_events(stream, page_size, 1), whole);
}

/// Events up to the end, and how it ended; header bytes are given `most` at a time.
fn page_stream_events(
    mut stream: &[u8],
    page_size: PageSize,
    most: usize,
) -> (Vec<Event>, Result<(), PageServerError>) {
    let mut server = PageServer::new(page_size);
    let (mut events, mut at, mut end) = (Vec::new(), 0, 0);
    // A run may be of 64 TiB, and this takes a call for each MiB.
    let mut batches = 0;
    loop {
        match server.wants() {
            Want::Header(missing) => {
                assert_eq!(at, end, "bytes of a run are missing");
                let count = missing.min(most).min(stream.len());
                if count == 0 {
                    return (events, server.end_of_stream());
                }
                let (taken, event) = match server.header(&stream[..count]) {
                    Ok(taken) => taken,
                    Err(error) => return (events, Err(error)),
                };
                assert_eq!(taken, count);
                stream = &stream[count..];
                let Some(event) = event else { continue };
                match event {
                    Event::Open { .. } => (at, end) = (0, 0),
                    Event::Run { run, .. } => {
                        assert!(run.pages > 0 && page_size.is_aligned(run.vaddr));
                        assert!(run.vaddr >= end && run.end(page_size) > run.vaddr);
                        end = run.end(page_size);
                        at = if run.flags.is_present() {
                            run.vaddr
                        } else {
                            end
                        };
                    }
                    Event::Parent { .. } | Event::Close { .. } => {}
                }
                events.push(event);
            }
            Want::Batch(batch) => {
                assert_eq!(batch.vaddr, at);
                assert!(batch.pages == 1 || batch.len as u64 <= BATCH_BYTES);
                at += batch.len as u64;
                assert!(at <= end);
                server.batch_read();
                batches += 1;
                if batches > 10_000 {
                    return (events, Ok(()));
                }
            }
            Want::Answer => {
                let answered = server
                    .answer_parent(true)
                    .or_else(|_| server.answer_close(0));
                assert!(answered.is_ok_and(|reply| !reply.as_ref().is_empty()));
            }
            Want::Nothing => return (events, server.end_of_stream()),
        }
    }
}

/// Control messages: what is taken can be sent on, and then stays what it is.
pub fn wire_message(data: &[u8]) {
    let Ok(message) = Message::decode(data) else {
        return;
    };
    let bytes = message.encode();
    assert!(bytes.len() <= limits::CONTROL_MESSAGE || data.len() > limits::CONTROL_MESSAGE / 2);
    let again = Message::decode(&bytes).expect("what is written can be read");
    assert_eq!(again.encode(), bytes);
}

/// What a live migration says: a note of its stream, or a step on the control stream.
pub fn stream_note(data: &[u8]) {
    if let Ok(note) = StreamNote::decode(data) {
        let bytes = note.encode();
        let (head, body) = bytes.split_at(5);
        assert_eq!(RecordKind::from_byte(head[0]), Ok(RecordKind::Note));
        assert_eq!(
            head[1..],
            u32::to_le_bytes(body.len().try_into().expect("a note"))
        );
        assert!(body.len() <= limits::STREAM_NOTE as usize || data.len() > body.len() / 2);
        assert_eq!(StreamNote::decode(body), Ok(note));
    }
    if let Ok(message @ Message::Migration(_)) = Message::decode(data) {
        let bytes = message.encode();
        let again = Message::decode(&bytes).expect("what is written can be read");
        // Texts at their very limit may be cut once.
        assert!(again == message || data.len() > limits::TEXT);
        assert_eq!(again.encode(), bytes);
    }
}

/// A frame: header, ops and payload one behind the other, as they stand on a stream.
pub fn page_frame(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<HEADER_LEN>() else {
        return;
    };
    let Ok(header) = FrameHeader::decode(head) else {
        return;
    };
    assert!(header.raw_len <= limits::FRAME_BYTES && header.payload_len <= header.raw_len);
    assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    let Some((ops_bytes, payload)) = rest.split_at_checked(header.ops_len as usize) else {
        return;
    };
    let Ok(ops) = decode_ops(ops_bytes) else {
        return;
    };
    assert!(ops.len() <= limits::FRAME_OPS);
    assert_eq!(encode_ops(&ops), ops_bytes);
    if header.codec == Codec::Zstd {
        let mut decompressor = Decompressor::new().expect("zstd has memory");
        if let Ok(raw) = decompressor.decompress(payload, header.raw_len as usize) {
            assert_eq!(raw.len(), header.raw_len as usize);
        }
    }
}

/// Tickets and fingerprints: as pasted, and with a right checksum around any payload.
pub fn ticket(data: &[u8]) {
    let mut words = vec![text::encode("crxfer1-", data)];
    words.extend(std::str::from_utf8(data).map(str::to_owned));
    for word in words {
        if let Ok(ticket) = word.parse::<Ticket>() {
            assert_eq!(ticket.to_string().parse(), Ok(ticket));
        }
        if let Ok(fingerprint) = word.parse::<Fingerprint>() {
            assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        }
    }
}

/// The index of a stored set: a damaged one is refused or gives wrong answers, nothing worse.
pub fn store_index(data: &[u8]) {
    let directory = tempfile_directory();
    let path = directory.join(format!("crxfer-fuzz-index-{}", std::process::id()));
    std::fs::write(&path, data).expect("a scratch file can be written");
    if let Ok(index) = Index::open(&path) {
        let _ = index.find(BlockId([7; 16]));
        for (file, meta) in (0u32..).zip(index.files().collect::<Vec<&FileMeta>>()) {
            let _ = index.file_named(meta.name.as_str());
            for block in 0..meta.blocks().min(64) {
                let digest = index.digest(BlockRef { file, block });
                if let Some((found, at)) = index.find(BlockId::of(&digest)) {
                    assert_eq!(BlockId::of(&found), BlockId::of(&digest));
                    assert_eq!(index.digest(at), found);
                }
            }
        }
    }
    let _ = std::fs::remove_file(&path);
}

/// Preflight facts and checks: what is taken can be sent on, stays what it is, and is fit for a
/// terminal.
pub fn preflight(data: &[u8]) {
    if let Ok(facts) = Facts::decode(data) {
        assert!(facts.tree.tasks.len() <= facts_limits::TASKS);
        assert!(facts.files.len() <= facts_limits::FILES);
        assert_eq!(Facts::decode(&facts.encode()), Ok(facts));
    }
    if let Ok(checks) = decode_checks(data) {
        assert!(checks.len() <= facts_limits::CHECK_COUNT);
        for check in &checks {
            assert!(!check.to_string().chars().any(char::is_control));
        }
        assert_eq!(decode_checks(&encode_checks(&checks)), Ok(checks));
    }
}

pub(super) fn tempfile_directory() -> std::path::PathBuf {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

/// One of each control message, with every optional field set: seeds of the corpus.
///
/// # Panics
/// Never: names and sizes are constants.
pub fn sample_messages() -> Vec<Message> {
    let at = SegmentAt {
        set: 1,
        file: 0,
        segment: 2,
    };
    let set_name = |name| SetName::new(name).expect("a good name");
    let begin = BeginSet {
        set: 1,
        name: set_name("3"),
        ancestor: true,
        page_size: PageSize::new(4096).expect("a page size"),
        image_version: 2,
        file_count: 1,
        total_bytes: 5,
        parent: Some((Digest([2; 32]), "../2".into())),
        base_name: Some(set_name("2")),
        root: Some(Digest([9; 32])),
    };
    let file = FileMeta {
        name: FileName::new("core-1.img").expect("a good name"),
        mode: 0o644,
        size: 5,
        block_len: 65536,
    };
    let published = Published {
        set: 1,
        name: "3".into(),
        generation: 2,
        layout: Layout::Incremental,
        base: Some("2".into()),
        completeness: "complete".into(),
        unchanged: true,
        notes: vec!["a note".into()],
    };
    let generation = Generation {
        number: 2,
        root: Digest([4; 32]),
    };
    vec![
        Message::Hello(Hello {
            versions: (1, 1),
            software: "crxfer".into(),
            ticket_proof: Some([7; 32]),
        }),
        Message::Welcome(Welcome {
            version: 1,
            software: "crxfer".into(),
            ticket_proof: Some([8; 32]),
            layout: Layout::Flat,
            max_set_bytes: Some(1 << 30),
        }),
        Message::QueryHeld(vec![Digest([1; 32]); 2]),
        Message::Held(vec![true, false]),
        Message::BeginSet(begin),
        Message::Files {
            set: 1,
            files: vec![file],
        },
        Message::SetReady {
            set: 1,
            lacks_everything: true,
        },
        Message::SegmentDigest(at, Digest([3; 32])),
        Message::SegmentState(at, true),
        Message::BlockIds(at, vec![BlockId([4; 16]); 3]),
        Message::Lacking(
            at,
            vec![true, false, true, false, false, false, false, false],
        ),
        Message::FileDigests {
            set: 1,
            digests: vec![Digest([6; 32])],
        },
        Message::EndSet {
            set: 1,
            root: Digest([5; 32]),
            frames: 9,
        },
        Message::Working,
        Message::Published(published),
        Message::Failure(Failure::new(FailureCode::Storage, "disk full")),
        Message::Pages(PagesStep::Offer(PagesOffer {
            name: set_name("3"),
            page_size: PageSize::new(4096).expect("a page size"),
            known: Some(generation),
        })),
        Message::Pages(PagesStep::Offered(PagesOffered {
            generation: Some(generation),
            listed: true,
            continues: true,
        })),
        Message::Pages(PagesStep::Held(PagesHeld {
            memory: PagemapName::Shmem(9),
            runs: vec![
                HeldRun {
                    first: 5,
                    digests: vec![Digest([1; 32]); 2],
                },
                HeldRun {
                    first: 300,
                    digests: vec![Digest([2; 32])],
                },
            ],
            last: true,
        })),
        Message::Pages(PagesStep::Stored(PagesStored {
            generation: 3,
            pages: 7,
            fresh_pages: 2,
            stored_bytes: 8192,
            notes: vec!["a note".into()],
        })),
    ]
}

/// One of each step of a live migration: seeds of the corpus.
///
/// # Panics
/// Never: sizes are constants.
pub fn sample_steps() -> Vec<Step> {
    let offer = Offer {
        id: MigrationId([7; 16]),
        name: "web".into(),
        page_size: PageSize::new(4096).expect("a page size"),
        memory_bytes: 1 << 30,
        facts: vec![1, 2, 3],
        options: RestoreOptions {
            tcp_established: true,
            external: vec!["mnt[/x]:y".into()],
            manage_cgroups: "soft".into(),
            ..RestoreOptions::default()
        },
        dry_run: true,
        keeping: crate::wire::Keeping::AsSet,
        runtime: String::new(),
        container: String::new(),
    };
    let phase = Phase {
        name: "restore".into(),
        begin_ns: 1,
        end_ns: 2,
    };
    vec![
        Step::Offer(Box::new(offer)),
        Step::Offered(Offered {
            checks: vec![4],
            restore_ns: 5,
            criu: "4.2.1".into(),
        }),
        Step::IterationDone {
            number: 3,
            stored_bytes: 4,
            work_ns: 5,
        },
        Step::PrepareFinal(4),
        Step::FinalReady,
        Step::Built,
        Step::Commit,
        Step::Running {
            pid: 12,
            resumed_ns: 13,
            phases: vec![phase],
            notes: vec!["a note".into()],
        },
        Step::Abort("because".into()),
        Step::Aborted,
        Step::ClockAsk { asked_ns: 1 },
        Step::ClockTell {
            asked_ns: 1,
            here_ns: 2,
        },
        Step::Meet {
            id: MigrationId([7; 16]),
            verdict: crate::wire::Verdict::Commit,
        },
        Step::Met(crate::wire::Answer::Runs { pid: 4711 }),
    ]
}

/// One of each note of a migration's stream: seeds of the corpus.
///
/// # Panics
/// Never: names and sizes are constants.
pub fn sample_notes() -> Vec<StreamNote> {
    let run = |vaddr, pages| PageRun {
        vaddr,
        pages,
        flags: PageFlags::PRESENT,
    };
    let file = Object::File {
        name: FileName::new("core-4.img").expect("a good name"),
        mode: 0o644,
        size: 10,
    };
    let task = Object::Memory(PagemapName::Task(4));
    let shared = Object::Memory(PagemapName::Shmem(5));
    let end = |root| StreamNote::End { number: 1, root };
    vec![
        StreamNote::Begin {
            number: 1,
            is_final: true,
        },
        StreamNote::Objects(vec![task, shared, file]),
        StreamNote::Runs {
            object: 1,
            runs: vec![run(0x7000, 3), run(0x7fff_0000_0000, 1 << 20)],
        },
        end(Some(Digest([3; 32]))),
        end(None),
    ]
}
