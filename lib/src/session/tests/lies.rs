//! A source that lies. The destination says what is wrong and publishes nothing.

use std::time::Duration;

use super::*;
use crate::delta::{BlockRef, FileName, Manifest, SetName};
use crate::session::SessionError;
use crate::testing::{
    Conditions, DestinationHost, DestinationOutput, Ended, Side, Unit, World, frame, framed,
    take_frame, transfer,
};
use crate::wire::{BeginSet, BlockId, Codec, FrameHeader, Hello, Message, Op, SegmentAt, VERSIONS};

fn page(byte: u8) -> Vec<u8> {
    vec![byte; 4096]
}

// File 0 is short; file 1 has zero, repeated and other pages; file 2 is one opaque block.
fn set() -> MemorySet {
    let pages = [page(1), page(0), page(2), page(1), page(3), page(4)].concat();
    let files = vec![
        ("core-1.img".to_owned(), b"hello".to_vec()),
        ("pages-1.img".to_owned(), pages),
        ("pipes.img".to_owned(), vec![5; 20_000]),
    ];
    MemorySet::new("1", 4096, files)
}

#[derive(Clone, Copy)]
enum Mode {
    /// The destination has nothing.
    Eager,
    /// It has pages 1 and 3 of the set.
    Asking,
}

fn lying(mode: Mode, lie: impl FnMut(&mut Unit)) -> Outcome {
    let mut store = MemoryStore::default();
    if matches!(mode, Mode::Asking) {
        let pages = [page(9), page(1), page(3), page(8)].concat();
        let other = MemorySet::new("other", 4096, vec![("pages-1.img".to_owned(), pages)]);
        store = transfer(Conditions::new(1), &[other], store).store;
        store.published.clear();
    }
    let mut lie = lie;
    let conditions = Conditions {
        patience: Some(Duration::from_secs(600)),
        max_set_bytes: Some(1 << 20),
        compress: false,
        jitter: Duration::ZERO,
        ..Conditions::new(1)
    };
    let world = World::new(conditions, &[set()], store);
    let tampered = world.with_tamper(|unit| {
        if unit.from == Side::Source {
            lie(unit);
        }
    });
    tampered.run()
}

#[track_caller]
fn assert_caught(outcome: &Outcome, why: &str) {
    let Err(Ended::Session(error)) = &outcome.destination else {
        panic!("{:?} instead of {why:?}", outcome.destination);
    };
    assert!(
        error.to_string().contains(why),
        "{error} instead of {why:?}"
    );
    assert!(matches!(outcome.source, Err(Ended::Session(_))));
    assert!(outcome.store.published.is_empty(), "published all the same");
}

/// The source says something else than the message that `change` is given.
#[track_caller]
fn message_lie(mode: Mode, why: &str, mut change: impl FnMut(&mut Message)) {
    let outcome = lying(mode, |unit| {
        if let Some(mut message) = unit.message() {
            change(&mut message);
            unit.set_message(&message);
        }
    });
    assert_caught(&outcome, why);
}

type Parts = (FrameHeader, Vec<Op>, Vec<u8>);

/// The source sends something else than the frames that `change` is given.
#[track_caller]
fn frame_lie(mode: Mode, why: &str, mut change: impl FnMut(&mut Parts)) {
    let outcome = lying(mode, |unit| {
        if unit.stream.is_some() {
            let parts = take_frame(&mut unit.bytes).unwrap();
            let mut parts = parts.expect("whole frames are put");
            change(&mut parts);
            unit.bytes = encode(&parts);
        }
    });
    assert_caught(&outcome, why);
}

fn encode((header, ops, payload): &Parts) -> Vec<u8> {
    let at = SegmentAt {
        set: header.set,
        file: header.file,
        segment: header.segment,
    };
    frame(at, ops, header.codec, header.raw_len as usize, payload)
}

// Describes the segment without bytes.
fn describe(parts: &mut Parts, ops: Vec<Op>) {
    parts.0.raw_len = 0;
    parts.1 = ops;
    parts.2.clear();
}

#[test]
fn without_a_lie_the_set_arrives() {
    for mode in [Mode::Eager, Mode::Asking] {
        let outcome = lying(mode, |_| {});
        outcome.source.as_ref().unwrap();
        assert_published(&outcome.store, &[set()], "no lie");
    }
}

#[test]
fn wrong_digests_of_the_whole_are_caught() {
    for mode in [Mode::Eager, Mode::Asking] {
        message_lie(mode, "root digest", |message| {
            if let Message::EndSet { root, .. } = message {
                root.0[0] ^= 1;
            }
        });
        message_lie(mode, "not the one that the source read", |message| {
            if let Message::FileDigests { digests, .. } = message {
                digests[1].0[31] ^= 1;
            }
        });
        message_lie(mode, "fewer digests", |message| {
            if let Message::FileDigests { digests, .. } = message {
                digests.pop();
            }
        });
        message_lie(mode, "more digests", |message| {
            if let Message::FileDigests { digests, .. } = message {
                digests.push(Digest([0; 32]));
            }
        });
        // Nothing else in the session says how a file was dumped; the root does.
        message_lie(mode, "root digest", |message| {
            if let Message::Files { files, .. } = message {
                files[0].mode = 0o777;
            }
        });
        message_lie(mode, "root digest", |message| {
            if let Message::BeginSet(begin) = message {
                begin.image_version = 1;
            }
        });
    }
}

#[test]
fn other_bytes_are_caught() {
    frame_lie(Mode::Eager, "not the one that the source read", |parts| {
        if let Some(byte) = parts.2.last_mut() {
            *byte ^= 1;
        }
    });
    frame_lie(Mode::Asking, "other bytes than its digest says", |parts| {
        if let Some(byte) = parts.2.last_mut() {
            *byte ^= 1;
        }
    });
    // Ids of blocks that the destination has, but the file does not.
    message_lie(
        Mode::Asking,
        "not the one that the source read",
        |message| {
            if let Message::BlockIds(at, ids) = message
                && at.file == 1
            {
                ids[5] = BlockId::of(&Digest::of(&page(1)));
            }
        },
    );
}

#[test]
fn zstd_that_is_something_else_is_caught() {
    frame_lie(Mode::Eager, "cannot be unpacked", |parts| {
        if parts.0.file == 2 {
            parts.0.codec = Codec::Zstd;
            parts.2.truncate(100);
        }
    });
}

#[test]
fn frames_that_do_not_belong_there_are_caught() {
    for mode in [Mode::Eager, Mode::Asking] {
        let twice = lying(mode, |unit| {
            if unit.stream.is_some() {
                unit.bytes.extend_from_within(..);
            }
        });
        assert_caught(&twice, "sent before");
        frame_lie(mode, "not being received", |parts| parts.0.set += 1);
        frame_lie(mode, "no file 7", |parts| parts.0.file = 7);
        frame_lie(mode, "segment 1", |parts| parts.0.segment = 1);
        frame_lie(mode, "segment", |parts| parts.0.segment = u64::MAX);
        frame_lie(mode, "wrong length", |parts| parts.1.push(Op::Zero(1)));
        frame_lie(mode, "wrong length", |parts| {
            parts.2.pop();
            parts.0.raw_len = u32::try_from(parts.2.len()).unwrap();
        });
    }
}

#[test]
fn an_early_end_is_caught() {
    for mode in [Mode::Eager, Mode::Asking] {
        message_lie(mode, "more frames than announced", |message| {
            if let Message::EndSet { frames, .. } = message {
                *frames -= 1;
            }
        });
    }
    let early = Message::EndSet {
        set: 1,
        root: Digest([0; 32]),
        frames: 0,
    };
    message_lie(Mode::Asking, "fewer digests", |message| {
        if matches!(message, Message::BlockIds(..)) {
            *message = early.clone();
        }
    });
}

/// The destination would have stored a set of which it holds every block, while a frame with other
/// bytes was being written into the same files.
#[test]
#[expect(clippy::disallowed_methods, reason = "no time passes")]
fn a_frame_on_its_way_when_the_set_ends_is_caught() {
    let set = set();
    let conditions = Conditions::new(1);
    let known = transfer(
        conditions,
        std::slice::from_ref(&set),
        MemoryStore::default(),
    );
    let now = std::time::Instant::now();
    let mut host = DestinationHost::new(known.store, 1, None, now);
    let mut messages = opening(&set);
    let end = messages.split_off(messages.len() - 2);
    let mut left = Vec::new();
    for message in messages {
        host.handle_control(now, &framed(&message)).unwrap();
        while let Some(output) = host.poll().unwrap() {
            if let DestinationOutput::Prepare(begin, files) = output {
                host.prepared(&begin, files);
            }
        }
    }
    let at = SegmentAt {
        set: 1,
        file: 1,
        segment: 0,
    };
    let other = frame(
        at,
        &[Op::Literal(6)],
        Codec::Raw,
        6 * 4096,
        &[0xee; 6 * 4096],
    );
    host.handle_stream(0, &other).unwrap();
    left.extend(host.poll().unwrap());
    assert!(matches!(left[..], [DestinationOutput::Write(_)]));
    host.handle_control(now, &framed(&end[0])).unwrap();
    let ended = host.handle_control(now, &framed(&end[1]));
    assert_eq!(
        ended,
        Err(SessionError::Protocol("more frames than announced"))
    );
}

// All control messages of a source that is asked for nothing.
fn opening(set: &MemorySet) -> Vec<Message> {
    let plan = set.plan(true);
    let leaves = plan.leaves.clone().unwrap();
    let digests = plan.files.iter().zip(&leaves);
    let digests = digests.map(|(file, leaves)| crate::delta::file_digest(file, leaves));
    let files = plan.files.iter().cloned().zip(digests.clone()).collect();
    let manifest = Manifest {
        page_size: set.page_size,
        image_version: 2,
        parent: None,
        files,
    };
    let mut messages = vec![
        Message::Hello(Hello {
            versions: (1, 1),
            software: "test".into(),
            ticket_proof: Some([1; 32]),
        }),
        Message::QueryHeld(Vec::new()),
        Message::BeginSet(BeginSet {
            set: 1,
            name: plan.name.clone(),
            ancestor: false,
            page_size: set.page_size,
            image_version: 2,
            file_count: u32::try_from(plan.files.len()).unwrap(),
            total_bytes: plan.files.iter().map(|file| file.size).sum(),
            parent: None,
            base_name: None,
            root: None,
        }),
        Message::Files {
            set: 1,
            files: plan.files.clone(),
        },
    ];
    for (file, leaves) in (0u32..).zip(&leaves) {
        let at = SegmentAt {
            set: 1,
            file,
            segment: 0,
        };
        messages.push(Message::BlockIds(
            at,
            leaves.iter().map(BlockId::of).collect(),
        ));
    }
    messages.push(Message::FileDigests {
        set: 1,
        digests: digests.collect(),
    });
    messages.push(Message::EndSet {
        set: 1,
        root: manifest.root(),
        frames: 0,
    });
    messages
}

#[test]
fn references_to_what_never_comes_are_caught() {
    let pages_same = |from| {
        move |parts: &mut Parts| {
            if parts.0.file == 1 {
                describe(parts, vec![Op::Same(6, from)]);
            }
        }
    };
    let at = |file, block| BlockRef { file, block };
    for from in [
        at(1, 0),
        at(1, 6),
        at(0, 0),
        at(2, 0),
        at(9, 0),
        at(1, 1 << 29),
    ] {
        frame_lie(
            Mode::Eager,
            "refers to one that was not sent",
            pages_same(from),
        );
    }
    frame_lie(Mode::Eager, "not sent as asked", |parts| {
        describe(parts, vec![Op::Held(parts.1.iter().map(Op::blocks).sum())]);
    });
}

#[test]
fn blocks_that_were_not_asked_for_and_asked_ones_left_out_are_caught() {
    frame_lie(Mode::Asking, "not sent as asked", |parts| {
        describe(parts, vec![Op::Held(parts.1.iter().map(Op::blocks).sum())]);
    });
    frame_lie(Mode::Asking, "not sent as asked", |parts| {
        if parts.0.file == 1 {
            parts.0.raw_len = 6 * 4096;
            parts.1 = vec![Op::Literal(6)];
            parts.2 = set().files[1].1.clone();
        }
    });
    frame_lie(Mode::Asking, "sent twice", |parts| {
        describe(parts, vec![Op::Zero(parts.1.iter().map(Op::blocks).sum())]);
    });
}

#[test]
fn wrong_questions_are_caught() {
    message_lie(Mode::Asking, "blocks, 7 were described", |message| {
        if let Message::BlockIds(at, ids) = message
            && at.file == 1
        {
            ids.push(ids[0]);
        }
    });
    let twice = lying(Mode::Asking, |unit| {
        if matches!(unit.message(), Some(Message::BlockIds(..))) {
            unit.bytes.extend_from_within(..);
        }
    });
    assert_caught(&twice, "sent twice");
    for change in [
        |at: &mut SegmentAt| at.segment = 1,
        |at: &mut SegmentAt| at.segment = u64::MAX,
        |at: &mut SegmentAt| at.file = u32::MAX,
    ] {
        message_lie(Mode::Asking, "the set has no file", |message| {
            if let Message::SegmentDigest(at, _) | Message::BlockIds(at, _) = message {
                change(at);
            }
        });
    }
}

#[test]
fn lists_of_files_that_do_not_fit_are_caught() {
    let files_lie = |why, change: fn(&mut Vec<crate::delta::FileMeta>)| {
        message_lie(Mode::Eager, why, |message| {
            if let Message::Files { files, .. } = message {
                change(files);
            }
        });
    };
    files_lie("more files than announced", |files| {
        let mut more = files[0].clone();
        more.name = FileName::new("zzz").unwrap();
        files.push(more);
    });
    files_lie("files out of order", |files| files.swap(0, 1));
    files_lie("files out of order", |files| {
        files[1].name = files[0].name.clone()
    });
    files_lie("another size than announced", |files| files[0].size += 1);
    files_lie("not in pages", |files| files[1].block_len = 16384);
    message_lie(Mode::Eager, "more than --max-bytes", |message| {
        if let Message::BeginSet(begin) = message {
            begin.total_bytes = 1 << 40;
        }
    });
    message_lie(Mode::Eager, "not in pages", |message| {
        if let Message::BeginSet(begin) = message {
            begin.page_size = crate::page::PageSize::new(65536).unwrap();
        }
    });
}

#[test]
fn a_name_that_leaves_the_directory_is_caught() {
    let good = FileName::new("core-1.img").unwrap();
    let outcome = lying(Mode::Eager, |unit| {
        if let Some(Message::Files { .. }) = unit.message() {
            let at = unit.bytes.windows(good.as_str().len());
            let at = at
                .clone()
                .position(|bytes| bytes == good.as_str().as_bytes());
            unit.bytes[at.unwrap()..][..4].copy_from_slice(b"../x");
        }
    });
    assert_caught(&outcome, "cannot be used as a name");
    assert!(SetName::new("..").is_err());
}

#[test]
fn messages_out_of_turn_are_caught() {
    for mode in [Mode::Eager, Mode::Asking] {
        for kind in 0..5 {
            let mut units = 0;
            let outcome = lying(mode, |unit| {
                // The message comes twice; the second time is never its turn.
                if unit.stream.is_none() {
                    if units == kind {
                        unit.bytes.extend_from_within(..);
                    }
                    units += 1;
                }
            });
            assert!(
                outcome.destination.is_err() || kind == 4,
                "message {kind} twice"
            );
            assert!(outcome.store.published.is_empty() || kind == 4);
        }
    }
    message_lie(Mode::Eager, "a set out of order", |message| {
        if let Message::BeginSet(begin) = message {
            begin.set = 2;
        }
    });
    message_lie(Mode::Eager, "out of order", |message| {
        if let Message::QueryHeld(_) = message {
            *message = Message::Held(Vec::new());
        }
    });
}

#[test]
fn a_wrong_introduction_is_refused() {
    message_lie(Mode::Eager, "no common protocol version", |message| {
        if let Message::Hello(hello) = message {
            hello.versions = (*VERSIONS.end() + 1, 9);
        }
    });
    for proof in [None, Some([7; 32])] {
        message_lie(Mode::Eager, "the ticket is not one of this", |message| {
            if let Message::Hello(hello) = message {
                hello.ticket_proof = proof;
            }
        });
    }
}

#[test]
fn a_parent_that_is_not_there_publishes_nothing() {
    let outcome = lying(Mode::Eager, |unit| {
        if let Some(Message::BeginSet(mut begin)) = unit.message() {
            begin.parent = Some((Digest([3; 32]), "../0".into()));
            unit.set_message(&Message::BeginSet(begin));
        }
    });
    assert!(outcome.destination.is_err() && outcome.store.published.is_empty());
}
