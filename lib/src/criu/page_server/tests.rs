use super::*;

use crate::testing::Rng;

const PAGE: u64 = 4096;

fn server() -> PageServer {
    PageServer::new(PageSize::new(PAGE).expect("a page size"))
}

/// A header as CRIU sends it; with the long layout there is junk in the padding.
fn header(layout: HeaderLayout, command: u32, pages: u64, vaddr: u64, dst_id: u64) -> Vec<u8> {
    let mut bytes = command.to_ne_bytes().to_vec();
    match layout {
        HeaderLayout::Old => {
            let pages = u32::try_from(pages).expect("few pages");
            bytes.extend(pages.to_ne_bytes());
        }
        HeaderLayout::New => {
            bytes.extend([0xfe, 0x7f, 0, 0]);
            bytes.extend(pages.to_ne_bytes());
        }
    }
    bytes.extend(vaddr.to_ne_bytes());
    bytes.extend(dst_id.to_ne_bytes());
    assert_eq!(bytes.len(), layout.byte_len());
    bytes
}

const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;
const TASK: PagemapName = PagemapName::Task(19203);
const TASK_ID: u64 = 0x4b_0301;

fn add(flags: u32) -> u32 {
    6 | flags << 16
}

/// What a session came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    events: Vec<Event>,
    batches: Vec<(u64, Vec<u8>)>,
    replies: Vec<u8>,
}

/// Feeds `stream` in pieces of the sizes that `piece` gives.
fn feed(stream: &[u8], mut piece: impl FnMut() -> usize) -> Result<Seen, PageServerError> {
    let (mut server, mut seen, mut rest) = (server(), Seen::default(), stream);
    let mut data = Vec::new();
    loop {
        match server.wants() {
            Want::Nothing => {
                server.end_of_stream()?;
                assert_eq!(rest.len(), 0, "bytes behind the end");
                return Ok(seen);
            }
            Want::Answer => unreachable!("answered below"),
            Want::Header(missing) => {
                let count = piece().clamp(1, missing).min(rest.len());
                if count == 0 {
                    server.end_of_stream()?;
                }
                let (taken, event) = server.header(&rest[..count])?;
                assert_eq!(taken, count);
                rest = &rest[count..];
                if let Some(event) = event {
                    seen.events.push(event);
                    answer(&mut server, event, &mut seen.replies);
                }
            }
            Want::Batch(batch) => {
                assert!(batch.pages > 0 && batch.len as u64 == batch.pages * PAGE);
                assert_eq!(
                    batch.vaddr / BATCH_BYTES,
                    (batch.vaddr + batch.len as u64 - 1) / BATCH_BYTES,
                );
                let count = piece().clamp(1, batch.len - data.len()).min(rest.len());
                if count == 0 {
                    server.end_of_stream()?;
                }
                data.extend_from_slice(&rest[..count]);
                rest = &rest[count..];
                if data.len() == batch.len {
                    seen.batches.push((batch.vaddr, std::mem::take(&mut data)));
                    server.batch_read();
                }
            }
        }
    }
}

fn answer(server: &mut PageServer, event: Event, replies: &mut Vec<u8>) {
    let reply = match event {
        Event::Open { asks: true, .. } => server.answer_parent(false),
        Event::Parent { .. } => server.answer_parent(true),
        Event::Close { .. } => server.answer_close(0),
        Event::Open { .. } | Event::Run { .. } => return,
    };
    replies.extend_from_slice(reply.expect("CRIU asked").as_ref());
}

fn at_once(stream: &[u8]) -> Result<Seen, PageServerError> {
    feed(stream, || usize::MAX)
}

/// One page of one task, as in the description of the format.
fn one_page(layout: HeaderLayout) -> Vec<u8> {
    let mut stream = header(layout, OPEN2, 0, 0, TASK_ID);
    stream.extend(header(layout, add(6), 1, 0x7f5c_2f3e_5000, TASK_ID));
    stream.extend([7; 4096]);
    stream.extend(header(layout, CLOSE, 0, 0, 0));
    stream
}

#[test]
#[cfg(target_endian = "little")]
fn the_short_layout_is_read_byte_for_byte() {
    let mut stream = Vec::new();
    stream.extend(b"\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x03\x4b\0\0\0\0\0");
    stream.extend(b"\x06\0\x06\0\x01\0\0\0\0\x50\x3e\x2f\x5c\x7f\0\0\x01\x03\x4b\0\0\0\0\0");
    stream.extend([7; 4096]);
    stream.extend(b"\x23\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(stream, one_page(HeaderLayout::Old));
    let seen = at_once(&stream).expect("a good session");
    assert_eq!(seen.replies, [0, 0, 0, 0, 0]);
    let run = PageRun {
        vaddr: 0x7f5c_2f3e_5000,
        pages: 1,
        flags: PageFlags::PRESENT.with(PageFlags::LAZY),
    };
    let expected = [
        Event::Open {
            space: TASK,
            asks: true,
        },
        Event::Run { space: TASK, run },
        Event::Close { force: false },
    ];
    assert_eq!(seen.events, expected);
    assert_eq!(seen.batches, [(run.vaddr, vec![7; 4096])]);
}

#[test]
fn both_layouts_and_all_splits_say_the_same() {
    let whole = at_once(&one_page(HeaderLayout::Old)).expect("a good session");
    for layout in [HeaderLayout::Old, HeaderLayout::New] {
        let stream = one_page(layout);
        assert_eq!(at_once(&stream).as_ref(), Ok(&whole));
        assert_eq!(feed(&stream, || 1).as_ref(), Ok(&whole), "byte by byte");
        let mut rng = Rng::new(5);
        for _ in 0..200 {
            let split = feed(&stream, || 1 + rng.index(100));
            assert_eq!(split.as_ref(), Ok(&whole));
        }
    }
}

#[test]
fn a_pre_dump_asks_before_it_opens() {
    for layout in [HeaderLayout::Old, HeaderLayout::New] {
        let mut stream = header(layout, PARENT, 0, 0, TASK_ID);
        stream.extend(header(layout, OPEN2, 0, 0, TASK_ID));
        stream.extend(header(layout, add(1), 40, 0x10000, TASK_ID));
        stream.extend(header(layout, FORCE_CLOSE, 0, 0, 0));
        let seen = at_once(&stream).expect("a good session");
        assert_eq!(seen.events[0], Event::Parent { space: TASK });
        assert_eq!(seen.events[3], Event::Close { force: true });
        let yes = 1i32.to_ne_bytes();
        assert_eq!(seen.replies, [&yes[..], &[0], &[0; 4]].concat());
        assert_eq!(seen.batches, []);
    }
}

#[test]
fn the_oldest_operations_are_taken() {
    let layout = HeaderLayout::Old;
    let shmem = 9 << 8 | 33;
    let mut stream = header(layout, 3, 0, 0, shmem);
    stream.extend(header(layout, 1, 1, 0, shmem));
    stream.extend([1; 4096]);
    stream.extend(header(layout, 2, 2, PAGE, shmem));
    stream.extend(header(layout, CLOSE, 0, 0, 0));
    let seen = at_once(&stream).expect("a good session");
    let space = PagemapName::Shmem(9);
    assert_eq!(seen.events[0], Event::Open { space, asks: false });
    assert_eq!(seen.batches, [(0, vec![1; 4096])]);
    let parent = |event: &Event| matches!(event, Event::Run { run, .. } if run.flags.is_parent());
    assert!(parent(&seen.events[2]));
}

#[test]
fn a_long_run_comes_in_batches_that_keep_to_their_mebibyte() {
    let layout = HeaderLayout::New;
    let mut stream = header(layout, OPEN2, 0, 0, TASK_ID);
    stream.extend(header(layout, add(4), 600, BATCH_BYTES - 3 * PAGE, TASK_ID));
    stream.extend((0..600u32).flat_map(|page| page.to_ne_bytes().repeat(1024)));
    stream.extend(header(layout, CLOSE, 0, 0, 0));
    let seen = at_once(&stream).expect("a good session");
    let pages: Vec<_> = seen
        .batches
        .iter()
        .map(|(_, data)| data.len() / 4096)
        .collect();
    assert_eq!(pages, [3, 256, 256, 85]);
    let all: Vec<u8> = seen
        .batches
        .into_iter()
        .flat_map(|(_, data)| data)
        .collect();
    let run = 2 * layout.byte_len();
    assert_eq!(all, stream[run..run + all.len()]);
}

#[test]
fn a_session_without_memory_only_closes() {
    for layout in [HeaderLayout::Old, HeaderLayout::New] {
        let mut server = server();
        let stream = header(layout, FORCE_CLOSE, 0, 0, 0);
        let (_, event) = server.header(&stream).expect("a close");
        assert_eq!(event, Some(Event::Close { force: true }));
    }
}

#[test]
fn a_refusal_is_sent_as_it_is() {
    let mut server = server();
    server
        .header(&header(HeaderLayout::New, CLOSE, 0, 0, 0))
        .expect("a close");
    let reply = server.answer_close(-5).expect("it asked");
    assert_eq!(reply.as_ref(), (-5i32).to_ne_bytes());
    assert_eq!(server.wants(), Want::Nothing);
    assert_eq!(server.answer_close(0), Err(PageServerError::NotAsked));
}

#[test]
fn what_breaks_a_rule_is_refused() {
    use RunProblem as P;
    let task = |vaddr, what| PageServerError::BadRun {
        space: TASK,
        vaddr,
        what,
    };
    let present = add(4);
    let high = 0u64.wrapping_sub(PAGE);
    for layout in [HeaderLayout::Old, HeaderLayout::New] {
        for ((command, pages, vaddr, dst_id), error) in [
            ((add(8), 1, 0, TASK_ID), task(0, P::UnknownFlags(8))),
            ((add(5), 1, 0, TASK_ID), task(0, P::PresentAndParent)),
            ((present, 1, 5, TASK_ID), task(5, P::Unaligned(PAGE))),
            ((present, 0, PAGE, TASK_ID), task(PAGE, P::Empty)),
            ((add(1), 2, high, TASK_ID), task(high, P::Overflow(2))),
            (
                (present, 1, 0, 5 << 8 | 1),
                PageServerError::NotOpen(PagemapName::Task(5)),
            ),
            (
                (present, 1, 0, 5 << 8 | 3),
                PageServerError::BadSpace(5 << 8 | 3),
            ),
            ((OPEN2, 0, 0, 1), PageServerError::BadSpace(1)),
            (
                (OPEN2, 0, 0, 1 << 40 | 1),
                PageServerError::BadSpace(1 << 40 | 1),
            ),
            ((OPEN2, 0, 0, TASK_ID), PageServerError::Twice(TASK)),
            ((OPEN2, 1, 0, 5 << 8 | 1), PageServerError::BadHeader),
            ((8, 1, 0, TASK_ID), PageServerError::Compressed),
            ((7, 1, 0, TASK_ID), PageServerError::UnknownOperation(7)),
            ((0, 0, 0, 0), PageServerError::UnknownOperation(0)),
        ] {
            let mut stream = header(layout, OPEN2, 0, 0, TASK_ID);
            stream.extend(header(layout, command, pages, vaddr, dst_id));
            assert_eq!(at_once(&stream), Err(error), "{layout:?} {command:#x}");
        }
    }
    let layout = HeaderLayout::New;
    let mut stream = header(layout, OPEN2, 0, 0, TASK_ID);
    stream.extend(header(layout, add(1), MAX_PAGES + 1, 0, TASK_ID));
    assert_eq!(at_once(&stream), Err(task(0, P::Absurd(MAX_PAGES + 1))));
}

#[test]
fn pages_only_ascend() {
    let layout = HeaderLayout::New;
    let mut stream = header(layout, OPEN2, 0, 0, TASK_ID);
    stream.extend(header(layout, add(1), 3, PAGE, TASK_ID));
    stream.extend(header(layout, add(1), 1, 3 * PAGE, TASK_ID));
    let error = at_once(&stream).expect_err("it overlaps");
    assert!(error.to_string().contains("begins below 0x4000"), "{error}");
}

#[test]
fn a_stream_that_is_none_is_refused_at_its_first_header() {
    for (command, vaddr) in [(add(4), 0x10000), (OPEN2, 0x10000), (add(4), 0)] {
        let stream = header(HeaderLayout::Old, command, 0, vaddr, TASK_ID);
        assert_eq!(at_once(&stream), Err(PageServerError::BadBegin));
    }
}

#[test]
fn a_cut_stream_is_an_error_wherever_it_is_cut() {
    for layout in [HeaderLayout::Old, HeaderLayout::New] {
        let stream = one_page(layout);
        for at in (0..stream.len()).filter(|at| at % 97 == 0 || *at < 100) {
            let error = at_once(&stream[..at]).expect_err("it is cut");
            assert!(matches!(error, PageServerError::Cut(_)), "{at}: {error}");
        }
    }
}

#[test]
fn a_page_larger_than_a_batch_comes_alone() {
    let page_size = PageSize::new(2 << 20).expect("a page size");
    let mut server = PageServer::new(page_size);
    let layout = HeaderLayout::New;
    server
        .header(&header(layout, OPEN2, 0, 0, TASK_ID))
        .expect("an open");
    server.answer_parent(false).expect("it asked");
    server
        .header(&header(layout, add(4), 2, 2 << 20, TASK_ID))
        .expect("a run");
    for vaddr in [2 << 20, 4 << 20] {
        let Want::Batch(batch) = server.wants() else {
            panic!("{:?}", server.wants());
        };
        assert_eq!((batch.vaddr, batch.pages, batch.len), (vaddr, 1, 2 << 20));
        server.batch_read();
    }
    assert_eq!(server.wants(), Want::Header(32));
}
