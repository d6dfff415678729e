//! What CRIU sends to a page server becomes sets: with a made-up CRIU at the other end of the socket.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crxfer::criu::page_client::{PageSink as _, serve, socket_pair};
use crxfer::delta::SetName;
use crxfer::image::{Chain, Completeness, PagemapName};
use crxfer::page::PageSize;
use crxfer::store::{Record, Store};
use crxfer::transfer::pages::{PagesMemory, PagesOptions, PagesUpload};
use crxfer::transfer::{Target, TransferError};
use crxfer::transport;
use crxfer::wire::{FailureCode, Layout, PagesStored};
use tokio::runtime::Handle;

use crate::images::{self, PAGE, page};
use crate::support::{
    Destination, LAYOUTS, Peer, code_of, count, memory, published, receive_options, tempdir, tree,
};

const FIRST: u64 = 0x7000_0000_0000;
const TASK: u64 = 4 << 8 | 1;
const SHMEM: u64 = 9 << 8 | 2;

/// Pages of one space: the number of what is in each, or nothing where CRIU leaves it to the parent.
type Space = (u64, Vec<Option<u64>>);

fn full(space: u64, numbers: impl IntoIterator<Item = u64>) -> Space {
    (space, numbers.into_iter().map(Some).collect())
}

/// What a made-up CRIU heard.
#[derive(Debug, PartialEq, Eq)]
struct Heard {
    has_parent: Vec<bool>,
    /// `None`: its socket ended before CLOSE was answered.
    status: Option<i32>,
}

fn header(command: u32, pages: u64, vaddr: u64, id: u64) -> Vec<u8> {
    let mut bytes = command.to_ne_bytes().to_vec();
    bytes.extend([0; 4]);
    for field in [pages, vaddr, id] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes
}

/// Sends these spaces as CRIU would, and `closes`.
fn dump(mut socket: UnixStream, spaces: &[Space], closes: bool) -> Heard {
    let mut heard = Heard {
        has_parent: Vec::new(),
        status: None,
    };
    let mut run = || -> std::io::Result<()> {
        for (space, pages) in spaces {
            socket.write_all(&header(4, 0, 0, *space))?;
            let mut answer = [0];
            socket.read_exact(&mut answer)?;
            heard.has_parent.push(answer[0] != 0);
            for (index, number) in (0u64..).zip(pages) {
                let flags = if number.is_some() { 4 } else { 1 };
                let vaddr = FIRST + index * PAGE as u64;
                socket.write_all(&header(6 | flags << 16, 1, vaddr, *space))?;
                if let Some(number) = number {
                    socket.write_all(&page(*number))?;
                }
            }
        }
        if closes {
            socket.write_all(&header(0x1024, 0, 0, 0))?;
            let mut status = [0; 4];
            socket.read_exact(&mut status)?;
            heard.status = Some(i32::from_ne_bytes(status));
        }
        Ok(())
    };
    // An end of the socket is what is looked for.
    let _ = run();
    heard
}

pub(crate) fn options(peer: &Peer, to: &Destination) -> PagesOptions {
    PagesOptions {
        target: Target::Ticket(to.ticket()),
        name: SetName::new("web").unwrap(),
        identity: peer.identity(),
        transport: transport::Options::default(),
        bytes_per_s: None,
        leaves_out: true,
        memory: PagesMemory::default(),
    }
}

type Uploaded = (Heard, Result<PagesStored, TransferError>);

/// One invocation of CRIU, into the destination.
async fn upload_as(options: PagesOptions, spaces: Vec<Space>, closes: bool) -> Uploaded {
    let handle = Handle::current();
    let blocking = move || {
        let mut upload = PagesUpload::connect(options, handle).expect("the destination answers");
        let (mut ours, theirs) = socket_pair().unwrap();
        let criu = std::thread::spawn(move || dump(theirs.into(), &spaces, closes));
        let page_size = PageSize::new(PAGE as u64).unwrap();
        let _ = serve(&mut ours, page_size, &mut upload);
        drop(ours);
        let heard = criu.join().expect("no panic");
        (heard, upload.finish())
    };
    tokio::task::spawn_blocking(blocking).await.unwrap()
}

async fn upload(options: &PagesOptions, spaces: Vec<Space>) -> (Vec<bool>, PagesStored) {
    let (heard, stored) = upload_as(options.clone(), spaces, true).await;
    assert_eq!(heard.status, Some(0), "{stored:?}");
    (heard.has_parent, stored.expect("it is stored"))
}

fn current(dir: &Path) -> Record {
    let store = Store::open_existing(dir).unwrap();
    store.current("web").unwrap().expect("a set")
}

/// All images of a made-up dump but its memory.
fn small_images(dir: &Path) {
    images::write_dump(dir, &[1]);
    for name in ["pagemap-4.img", "pages-1.img"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
}

fn is_sound(dir: &Path) -> bool {
    let store = Store::open_existing(dir).unwrap();
    store.verify(&current(dir)).unwrap().is_sound()
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_build_on_each_other_by_content() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = options(&Peer::new(), &to);
    let spaces = vec![full(TASK, 1..=40), full(SHMEM, [7, 8])];
    let (parents, stored) = upload(&options, spaces).await;
    assert_eq!(parents, [false, false]);
    assert_eq!(
        (stored.generation, stored.pages, stored.fresh_pages),
        (1, 42, 42)
    );
    let record = current(dir.path());
    assert_eq!((record.completeness.as_str(), record.base), ("pages", None));
    assert_eq!(
        Chain::open(to.set("web"), None).unwrap().completeness(),
        Completeness::PagesOnly
    );

    // Two pages differ, one is that of another place, one is gone.
    let mut numbers: Vec<_> = (1..=39).collect();
    (numbers[3], numbers[20], numbers[30]) = (100, 0, 7);
    let second = vec![full(TASK, numbers.clone()), full(SHMEM, [7, 8])];
    // With the same memory, and as a new process that has to be told.
    for (generation, options) in [(2, options.clone()), (3, self::options_anew(&options))] {
        let (parents, stored) = upload(&options, second.clone()).await;
        assert_eq!(parents, [true, true]);
        assert_eq!(stored.generation, generation);
        let fresh = if generation == 2 { 3 } else { 0 };
        assert_eq!((stored.pages, stored.fresh_pages), (41, fresh));
    }
    let whole = tempdir();
    images::write_dump(&whole.path().join("dump"), &numbers);
    let expected = memory(&whole.path().join("dump"));
    let got = memory(&to.set("web"));
    assert_eq!(got["pagemap-4.img"], expected["pagemap-4.img"]);
    assert!(is_sound(dir.path()));
    to.stop().await;
}

// As another process of the same host has them.
fn options_anew(options: &PagesOptions) -> PagesOptions {
    PagesOptions {
        memory: PagesMemory::default(),
        ..options.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_criu_leaves_out_are_those_of_the_generation_before() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = options(&Peer::new(), &to);
    upload(&options, vec![full(TASK, 1..=8)]).await;
    let left = |numbers: [Option<u64>; 3]| vec![(TASK, numbers.to_vec())];
    let (_, stored) = upload(&options, left([None, Some(50), None])).await;
    assert_eq!((stored.pages, stored.fresh_pages), (3, 1));
    let (_, stored) = upload(&options_anew(&options), left([None, None, None])).await;
    assert_eq!((stored.pages, stored.fresh_pages), (3, 0));
    let whole = tempdir();
    images::write_dump(&whole.path().join("dump"), &[1, 50, 3]);
    let expected = memory(&whole.path().join("dump"));
    assert_eq!(memory(&to.set("web")), expected);

    // A page that nobody has: CRIU is refused, and nothing changes.
    let before = published(dir.path());
    let beyond = vec![(TASK, vec![None; 4])];
    let (heard, stored) = upload_as(options.clone(), beyond, true).await;
    assert_ne!(heard.status, Some(0));
    let error = stored.expect_err("refused").to_string();
    assert!(error.contains("0x700000003000"), "{error}");
    to.settled().await;
    assert_eq!(published(dir.path()), before);

    // That dump has reset what the kernel tracks: the next one must be whole.
    let (parents, _) = upload(&options, vec![full(TASK, 1..=3)]).await;
    assert_eq!(parents, [false]);
    // One that never began has not.
    for drops in [true, false] {
        let (options, handle) = (options.clone(), Handle::current());
        let nothing = move || {
            let upload = PagesUpload::connect(options, handle).unwrap();
            if drops {
                return drop(upload);
            }
            upload.finish().expect_err("nothing came");
        };
        tokio::task::spawn_blocking(nothing).await.unwrap();
        to.settled().await;
    }
    let (parents, _) = upload(&options, vec![full(TASK, 1..=3)]).await;
    assert_eq!(parents, [true]);
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_criu_that_leaves_nothing_out_is_not_told_that_anything_is_held() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = PagesOptions {
        leaves_out: false,
        ..options(&Peer::new(), &to)
    };
    upload(&options, vec![full(TASK, 1..=5)]).await;
    let (parents, stored) = upload(&options, vec![full(TASK, 1..=5)]).await;
    assert_eq!((parents, stored.fresh_pages), (vec![false], 0));
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_small_images_make_it_complete_in_every_layout() {
    for layout in LAYOUTS {
        let dir = tempdir();
        let to = Destination::at(dir.path(), layout).await;
        let peer = Peer::new();
        let options = options(&peer, &to);
        upload(&options, vec![full(TASK, 1..=20)]).await;
        let numbers: Vec<_> = (1..=9).chain(70..=75).collect();
        upload(&options, vec![full(TASK, numbers.clone())]).await;
        let scratch = tempdir();
        let small = scratch.path().join("small");
        small_images(&small);
        let sent = peer.send_as(&small, "web", &to).await.published;
        assert_eq!(sent.completeness, "complete", "{layout:?}");
        assert_eq!((sent.generation, sent.layout), (3, layout));
        let whole = scratch.path().join("whole");
        images::write_dump(&whole, &numbers);
        assert_eq!(memory(&to.set("web")), memory(&whole), "{layout:?}");
        let chain = Chain::open(to.set("web"), None).unwrap();
        assert_eq!(chain.completeness(), Completeness::Complete);
        assert_eq!(chain.levels().len() == 1, layout == Layout::Flat);
        assert!(is_sound(dir.path()), "{layout:?}");
        // Once more is the same set, and the next dump builds on it.
        assert!(peer.send_as(&small, "web", &to).await.published.unchanged);
        let (parents, stored) = upload(&options, vec![full(TASK, numbers)]).await;
        assert_eq!((parents, stored.fresh_pages), (vec![true], 0));
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_tasks_without_memory_do_not_complete_it() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let peer = Peer::new();
    upload(&options(&peer, &to), vec![full(5 << 8 | 1, 1..=20)]).await;
    let before = published(dir.path());
    let scratch = tempdir();
    let small = scratch.path().join("web");
    small_images(&small);
    let error = peer.try_send(&small, &to).await.expect_err("refused");
    assert_eq!(code_of(&error), Some(FailureCode::Image));
    assert!(error.to_string().contains("pagemap-4.img"), "{error}");
    to.settled().await;
    assert_eq!(published(dir.path()), before);
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_with_memory_is_an_ordinary_generation() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let peer = Peer::new();
    upload(&options(&peer, &to), vec![full(TASK, 1..=20)]).await;
    let scratch = tempdir();
    let whole = scratch.path().join("web");
    images::write_dump(&whole, &[5, 6]);
    let sent = peer.send(&whole, &to).await.published;
    assert_eq!(
        (sent.completeness.as_str(), sent.generation),
        ("complete", 2)
    );
    assert_eq!(memory(&to.set("web")), memory(&whole));
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_end_leaves_nothing() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = options(&Peer::new(), &to);
    let cut = upload_as(options.clone(), vec![full(TASK, 1..=600)], false).await;
    assert_eq!(cut.0.status, None);
    cut.1.expect_err("CRIU died");
    to.settled().await;
    let partials = count(&dir.path().join(".crxfer/partial"));
    assert_eq!((count(&to.set("web")), partials), (0, 0));
    upload(&options, vec![full(TASK, 1..=3)]).await;
    let before = tree(dir.path());

    // A CRIU that has failed: it says CLOSE all the same.
    for spaces in [vec![], vec![full(TASK, [])]] {
        let (heard, stored) = upload_as(options.clone(), spaces, true).await;
        assert_ne!(heard.status, Some(0));
        let error = stored.expect_err("no pages").to_string();
        assert!(error.contains("without a single page"), "{error}");
        to.settled().await;
    }

    // Given up by another thread.
    let handle = Handle::current();
    let given_up = tokio::task::spawn_blocking(move || {
        let mut upload = PagesUpload::connect(options, handle).unwrap();
        let canceller = upload.canceller();
        canceller.cancel();
        std::thread::sleep(Duration::from_millis(50));
        let status = upload.close().unwrap();
        (status, upload.finish())
    });
    let (status, stored) = given_up.await.unwrap();
    assert_ne!(status, 0);
    stored.expect_err("given up");
    to.settled().await;
    assert_eq!(published(dir.path()).len(), {
        let mut before = before;
        before.retain(|path, _| !path.starts_with(".crxfer"));
        before.len()
    });
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_sizes_are_the_destinations_to_refuse() {
    let dir = tempdir();
    let limited = || {
        let mut options = receive_options(dir.path(), Layout::Faithful);
        options.max_set_bytes = Some(10 * PAGE as u64);
        options
    };
    let to = Destination::with(limited).await;
    let peer = Peer::new();
    let (heard, stored) = upload_as(options(&peer, &to), vec![full(TASK, 1..=11)], true).await;
    assert_ne!(heard.status, Some(0));
    let error = stored.expect_err("too large");
    assert_eq!(code_of(&error), Some(FailureCode::Limit), "{error}");
    to.settled().await;
    assert_eq!(count(&to.set("web")), 0);

    fs::create_dir(to.set("web")).unwrap();
    let (options, handle) = (options(&peer, &to), Handle::current());
    let refused = tokio::task::spawn_blocking(move || PagesUpload::connect(options, handle));
    let error = refused.await.unwrap().expect_err("not a set of ours");
    assert_eq!(code_of(&error), Some(FailureCode::Name), "{error}");
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_generation_is_not_built_on() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = options(&Peer::new(), &to);
    upload(&options, vec![full(TASK, 1..=20)]).await;
    let pages = to.set("web").join("pages-1.img");
    fs::write(&pages, vec![1; 20 * PAGE]).unwrap();
    let (parents, stored) = upload(&options, vec![full(TASK, 1..=20)]).await;
    assert_eq!((parents, stored.fresh_pages), (vec![false], 20));
    assert!(is_sound(dir.path()));
    to.stop().await;
}

/// Dumps of which only the questions arrive have reset what the kernel tracks.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_pre_dump_that_only_asked_makes_the_next_one_whole() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = options(&Peer::new(), &to);
    for ends in [Some("close"), Some("end"), None] {
        // Twice: the first may be the whole one that follows.
        upload(&options, vec![full(TASK, 1..=3)]).await;
        let (parents, _) = upload(&options, vec![full(TASK, 1..=3)]).await;
        assert_eq!(parents, [true]);
        let (again, handle) = (options.clone(), Handle::current());
        let asks = move || {
            let mut upload = PagesUpload::connect(again, handle).unwrap();
            let Some(end) = ends else {
                assert!(upload.has_parent(PagemapName::Task(4)).unwrap());
                return drop(upload);
            };
            let (mut ours, theirs) = socket_pair().unwrap();
            let mut criu = UnixStream::from(theirs);
            criu.write_all(&header(5, 0, 0, TASK)).unwrap();
            if end == "close" {
                criu.write_all(&header(0x1024, 0, 0, 0)).unwrap();
            }
            criu.shutdown(std::net::Shutdown::Write).unwrap();
            let page_size = PageSize::new(PAGE as u64).unwrap();
            let _ = serve(&mut ours, page_size, &mut upload);
            let mut answer = [0; 4];
            criu.read_exact(&mut answer).unwrap();
            assert_eq!(i32::from_ne_bytes(answer), 1, "it is held");
            upload.finish().expect_err("nothing came");
        };
        tokio::task::spawn_blocking(asks).await.unwrap();
        to.settled().await;
        let (parents, _) = upload(&options, vec![full(TASK, 1..=3)]).await;
        assert_eq!(parents, [false], "{ends:?}");
    }
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_are_left_out_unasked_are_refused() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = PagesOptions {
        leaves_out: false,
        ..options(&Peer::new(), &to)
    };
    upload(&options, vec![full(TASK, 1..=3)]).await;
    let left = vec![(TASK, vec![None, Some(2)])];
    let (heard, stored) = upload_as(options.clone(), left, true).await;
    assert_eq!((heard.has_parent, heard.status), (vec![false], None));
    let error = stored.expect_err("refused").to_string();
    assert!(error.contains("left pages out"), "{error}");
    assert_eq!(current(dir.path()).generation, 1);
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_connection_has_ended_fails_at_its_first_call() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let (options, handle) = (options(&Peer::new(), &to), Handle::current());
    let given_up = tokio::task::spawn_blocking(move || {
        for opens in [true, false] {
            let mut upload = PagesUpload::connect(options.clone(), handle.clone()).unwrap();
            upload.canceller().cancel();
            let space = PagemapName::Task(4);
            let said = if opens {
                upload.open(space)
            } else {
                upload.has_parent(space)
            };
            said.expect_err("it has ended");
        }
    });
    given_up.await.unwrap();
    to.stop().await;
}

async fn connected(options: &PagesOptions) -> PagesUpload {
    let (options, handle) = (options.clone(), Handle::current());
    let connects = tokio::task::spawn_blocking(move || PagesUpload::connect(options, handle));
    connects.await.unwrap().expect("the destination answers")
}

/// One page of one task, as the first dump has it.
async fn dump_into(mut upload: PagesUpload, number: u64) -> Uploaded {
    let dumps = move || {
        let (mut ours, theirs) = socket_pair().unwrap();
        let spaces = [full(TASK, [number])];
        let criu = std::thread::spawn(move || dump(theirs.into(), &spaces, true));
        let page_size = PageSize::new(PAGE as u64).unwrap();
        let _ = serve(&mut ours, page_size, &mut upload);
        drop(ours);
        (criu.join().expect("no panic"), upload.finish())
    };
    tokio::task::spawn_blocking(dumps).await.unwrap()
}

/// What the second one's dump takes from the kernel's tracking, the first one's CRIU would leave out.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_sources_of_one_name_the_earlier_one_does_not_continue() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = options(&Peer::new(), &to);
    upload(&options, vec![full(TASK, [1])]).await;
    for dumps in [false, true] {
        upload(&options, vec![full(TASK, [1])]).await;
        let early = connected(&options_anew(&options)).await;
        let late = connected(&options_anew(&options)).await;
        let late = if dumps {
            let (heard, stored) = dump_into(late, 2).await;
            assert_eq!(heard.has_parent, [false], "the early one may have begun");
            stored.expect("the last one that was offered");
            None
        } else {
            Some(late)
        };
        let before = current(dir.path()).generation;
        let (heard, stored) = dump_into(early, 3).await;
        assert_ne!(heard.status, Some(0));
        let error = stored.expect_err("overtaken").to_string();
        assert!(error.contains("another transfer"), "{error}");
        drop(late);
        to.settled().await;
        assert_eq!(current(dir.path()).generation, before);
        // And it has reset what the kernel tracks.
        let (parents, _) = upload(&options, vec![full(TASK, [1])]).await;
        assert_eq!(parents, [false], "the late one dumps: {dumps}");
    }
    to.stop().await;
}

/// Not tracked is also what a session that was offered meanwhile must not be told of.
#[tokio::test(flavor = "multi_thread")]
async fn a_dump_that_ends_after_another_was_offered_is_not_continued() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let options = options(&Peer::new(), &to);
    let early = connected(&options).await;
    let late = connected(&options_anew(&options)).await;
    let (_, stored) = dump_into(early, 1).await;
    stored.expect("the first of its name");
    drop(late);
    to.settled().await;
    let (parents, _) = upload(&options, vec![full(TASK, [1])]).await;
    assert_eq!(parents, [false]);
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_that_is_not_built_on_is_not_tracked_either() {
    let dir = tempdir();
    let to = Destination::at(dir.path(), Layout::Faithful).await;
    let (one, another) = (Peer::new(), Peer::new());
    upload(&options(&one, &to), vec![full(TASK, [1])]).await;
    let store = Store::open_existing(dir.path()).unwrap();
    let id = current(dir.path()).id;
    assert!(store.is_tracked(id));
    // Another key's dump of the same name builds on nothing, and is lost.
    let options_of_another = options(&another, &to);
    let open = connected(&options_of_another).await;
    assert!(!store.is_tracked(id));
    drop(open);
    to.settled().await;
    // It has withdrawn.
    assert!(store.is_tracked(id));
    // Another key's dump of the same name builds on nothing, and is lost.
    let options_of_another = options(&another, &to);
    let open = connected(&options_of_another).await;
    assert!(!store.is_tracked(id));
    drop(open);
    to.settled().await;
    // It has withdrawn: the mark comes back, a moment after its stage has gone.
    for _ in 0..100 {
        if store.is_tracked(id) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(store.is_tracked(id));
    let lost = upload_as(options_of_another, vec![full(TASK, [2])], false).await;
    lost.1.expect_err("CRIU died");
    to.settled().await;
    assert_eq!(current(dir.path()).id, id);
    assert!(!store.is_tracked(id));
    to.stop().await;
}
