//! A CRIU that is played, on both sides.

use std::fs::File;
use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;

use super::*;

/// A capture at work, and where its images go.
struct Taking {
    place: TempDir,
    thread: JoinHandle<Result<Captured, StreamerError>>,
    _stopper: Stopper,
}

impl Taking {
    fn begin(options: CaptureOptions) -> Self {
        let place = tempfile::tempdir().unwrap();
        let images = place.path().join("images");
        std::fs::create_dir(&images).unwrap();
        let images = OwnedFd::from(File::open(images).unwrap());
        let (capture, stopper) =
            Capture::listen(&place.path().join("sockets"), images, options).unwrap();
        Self {
            place,
            thread: thread::spawn(move || capture.take()),
            _stopper: stopper,
        }
    }

    fn unheld() -> Self {
        Self::begin(CaptureOptions {
            hold: false,
            silence: Duration::from_secs(20),
        })
    }

    fn sockets(&self) -> PathBuf {
        self.place.path().join("sockets")
    }

    fn criu(&self) -> Criu {
        Criu::connect(&self.sockets().join("streamer-capture.sock"))
    }

    fn end(self) -> Result<Captured, StreamerError> {
        self.end_with_place().0
    }

    fn end_with_place(self) -> (Result<Captured, StreamerError>, TempDir) {
        (self.thread.join().unwrap(), self.place)
    }
}

/// What CRIU does on its socket.
struct Criu(UnixStream);

impl Criu {
    fn connect(path: &Path) -> Self {
        Self(UnixStream::connect(path).unwrap())
    }

    fn request(&mut self, name: &str) {
        self.0.write_all(&encode_request(name)).unwrap();
    }

    fn send(&mut self, descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
    }

    /// Begins to dump an image: its writing end.
    fn dump(&mut self, name: &str) -> File {
        self.request(name);
        let (read, write) = rustix::pipe::pipe().unwrap();
        self.send(&[read.as_fd()]);
        write.into()
    }

    /// Asks for an image: its reading end, or nothing.
    fn restore(&mut self, name: &str) -> Option<File> {
        self.request(name);
        let mut reply = [0; 6];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..5], [2, 0, 0, 0, 8]);
        (reply[5] == 1).then(|| {
            let (read, write) = rustix::pipe::pipe().unwrap();
            self.send(&[write.as_fd()]);
            read.into()
        })
    }
}

#[test]
fn images_that_are_written_by_turns_come_out_whole() {
    let taking = Taking::unheld();
    let mut criu = taking.criu();
    // More than all pipes hold, so that neither can be finished before the other is drained.
    let part = vec![7u8; 1 << 20];
    let mut files: Vec<_> = (0..4)
        .map(|n| criu.dump(&format!("pages-{n}.img")))
        .collect();
    for _ in 0..12 {
        for file in &mut files {
            file.write_all(&part).unwrap();
        }
    }
    drop(files);
    criu.dump("empty.img");
    drop(criu);
    let (captured, place) = taking.end_with_place();
    let captured = captured.unwrap();
    assert_eq!((captured.images, captured.bytes), (5, 48 << 20));
    let image = |name: &str| std::fs::read(place.path().join("images").join(name)).unwrap();
    for number in 0..4 {
        let image = image(&format!("pages-{number}.img"));
        assert!(image.len() == 12 << 20 && image.iter().all(|&byte| byte == 7));
    }
    assert_eq!(image("empty.img"), b"");
    let left = std::fs::read_dir(place.path().join("sockets")).unwrap();
    assert_eq!(left.count(), 0, "sockets stay behind");
}

#[test]
fn a_dump_that_was_not_announced_finds_no_socket() {
    let taking = Taking::begin(CaptureOptions::default());
    let socket = taking.sockets().join("streamer-capture.sock");
    assert!(UnixStream::connect(&socket).is_err());
    vote::announce(&taking.sockets()).unwrap();
    assert!(UnixStream::connect(&socket).is_ok());
    let error = taking.end().unwrap_err();
    assert!(matches!(error, StreamerError::NoVote), "{error}");
}

#[test]
fn a_vote_waits_for_the_images_and_gets_the_verdict() {
    for go in [true, false] {
        let taking = Taking::begin(CaptureOptions::default());
        let sockets = taking.sockets();
        vote::announce(&sockets).unwrap();
        let mut criu = taking.criu();
        let mut file = criu.dump("inventory.img");
        file.write_all(b"all").unwrap();
        let script = thread::spawn(move || vote::vote(&sockets));
        thread::sleep(Duration::from_millis(50));
        assert!(!taking.thread.is_finished(), "an image is still open");
        drop(file);
        let (captured, _place) = taking.end_with_place();
        let captured = captured.unwrap();
        assert!(!script.is_finished());
        let held = captured.vote.unwrap();
        assert!(held.is_awaited());
        match go {
            true => held.go_on().unwrap(),
            false => held.refuse("the disk\nis full"),
        }
        match script.join().unwrap() {
            Ok(()) => assert!(go),
            Err(StreamerError::Refused(why)) => assert!(!go && why == "the disk is full"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_capture_that_is_gone_is_a_refusal() {
    let taking = Taking::begin(CaptureOptions::default());
    let sockets = taking.sockets();
    vote::announce(&sockets).unwrap();
    let mut criu = taking.criu();
    criu.dump("inventory.img");
    let script = {
        let sockets = sockets.clone();
        thread::spawn(move || vote::vote(&sockets))
    };
    drop(taking.end().unwrap());
    let error = script.join().unwrap().unwrap_err();
    assert!(matches!(error, StreamerError::NoVerdict), "{error}");
    let error = vote::vote(&sockets).unwrap_err();
    assert!(matches!(error, StreamerError::NoCapture(_)), "{error}");
}

#[test]
fn a_script_that_was_killed_is_told_from_one_that_waits() {
    let taking = Taking::begin(CaptureOptions::default());
    let sockets = taking.sockets();
    vote::announce(&sockets).unwrap();
    let mut criu = taking.criu();
    criu.dump("inventory.img");
    let mut script = UnixStream::connect(sockets.join("crxfer-vote.sock")).unwrap();
    script.write_all(b"vote\n").unwrap();
    let held = taking.end().unwrap().vote.unwrap();
    assert!(held.is_awaited());
    drop(script);
    assert!(!held.is_awaited());
    assert!(held.go_on().is_err());
}

#[test]
fn what_is_no_dump_is_refused() {
    type Act = fn(&mut Criu);
    let acts: [(&str, Act); 9] = [
        ("length of", |criu| criu.0.write_all(&[0xff; 64]).unwrap()),
        ("not CRIU's protocol", |criu| {
            criu.0.write_all(b"\x03\0\0\0\x0a\x7fx").unwrap();
        }),
        ("separator", |criu| criu.request("../../etc/shadow")),
        ("came before", |criu| {
            drop(criu.dump("core-1.img"));
            drop(criu.dump("core-1.img"));
        }),
        ("no descriptor", |criu| {
            criu.request("core-1.img");
            criu.send(&[]);
        }),
        ("something else", |criu| {
            criu.request("core-1.img");
            criu.send(&[File::open("/dev/null").unwrap().as_fd()]);
        }),
        ("wrong end", |criu| {
            criu.request("core-1.img");
            let (_read, write) = rustix::pipe::pipe().unwrap();
            criu.send(&[write.as_fd()]);
        }),
        ("several descriptors", |criu| {
            criu.request("core-1.img");
            let (read, other) = rustix::pipe::pipe().unwrap();
            criu.send(&[read.as_fd(), other.as_fd()]);
        }),
        ("in the middle of its request", |criu| {
            criu.0.write_all(b"\x0d\0\0\0\x0a").unwrap();
        }),
    ];
    for (said, act) in acts {
        let taking = Taking::unheld();
        let mut criu = taking.criu();
        act(&mut criu);
        drop(criu);
        let error = taking.end().unwrap_err().to_string();
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn a_peer_that_says_nothing_is_given_up() {
    let silence = Duration::from_millis(100);
    let taking = Taking::begin(CaptureOptions {
        hold: false,
        silence,
    });
    let mut criu = taking.criu();
    // One image stays open, and another request is cut.
    let _open = criu.dump("pages-1.img");
    criu.0.write_all(b"\x0d\0").unwrap();
    let error = taking.end().unwrap_err();
    assert!(matches!(error, StreamerError::Silent(_)), "{error}");
}

#[test]
fn a_place_that_takes_no_files_is_told_with_the_image() {
    let place = tempfile::tempdir().unwrap();
    let images = OwnedFd::from(File::open("/proc/self/task").unwrap());
    let options = CaptureOptions {
        hold: false,
        ..CaptureOptions::default()
    };
    let (capture, _stopper) = Capture::listen(&place.path().join("s"), images, options).unwrap();
    let thread = thread::spawn(move || capture.take());
    let mut criu = Criu::connect(&place.path().join("s/streamer-capture.sock"));
    drop(criu.dump("core-1.img"));
    let error = thread.join().unwrap().unwrap_err();
    assert!(
        error.to_string().starts_with("core-1.img: cannot create"),
        "{error}"
    );
}

#[test]
fn a_stopped_capture_ends_and_takes_its_sockets_away() {
    let taking = Taking::unheld();
    let sockets = taking.sockets();
    let Taking {
        thread,
        _stopper: stopper,
        place: _place,
    } = taking;
    drop(stopper);
    let error = thread.join().unwrap().unwrap_err();
    assert!(matches!(error, StreamerError::Stopped), "{error}");
    assert_eq!(std::fs::read_dir(sockets).unwrap().count(), 0);
}

#[test]
fn a_directory_belongs_to_one_streamer_and_to_nobody_else() {
    let place = tempfile::tempdir().unwrap();
    let sockets = place.path().join("s");
    let (serve, _stopper) = Serve::listen(&sockets).unwrap();
    assert!(matches!(
        Serve::listen(&sockets),
        Err(StreamerError::Busy(_))
    ));
    drop(serve);
    let (_serve, _stopper) = Serve::listen(&sockets).unwrap();
    let public = place.path().join("public");
    std::fs::create_dir(&public).unwrap();
    std::fs::set_permissions(&public, PermissionsExt::from_mode(0o755)).unwrap();
    assert!(matches!(
        Serve::listen(&public),
        Err(StreamerError::Public(_))
    ));
    let long = place.path().join("l".repeat(100));
    assert!(matches!(
        Serve::listen(&long),
        Err(StreamerError::LongPath(_))
    ));
}

/// A set of `testdata` and its view.
fn fixture(name: &str) -> crate::image::FlatView {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(name);
    let chain = crate::image::Chain::open(path, None).unwrap();
    crate::image::FlatView::new(chain).unwrap()
}

struct Serving {
    place: TempDir,
    thread: JoinHandle<Result<Served, StreamerError>>,
    _stopper: Stopper,
}

impl Serving {
    fn begin(set: &'static str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let (serve, stopper) = Serve::listen(&place.path().join("s")).unwrap();
        let thread = thread::spawn(move || serve.serve(&fixture(set)));
        Self {
            place,
            thread,
            _stopper: stopper,
        }
    }

    fn criu(&self) -> Criu {
        Criu::connect(&self.place.path().join("s/streamer-serve.sock"))
    }

    fn end(self) -> Result<Served, StreamerError> {
        self.thread.join().unwrap()
    }
}

/// Names and contents of what `flatten` makes of a set.
fn flattened(set: &str) -> Vec<(String, Vec<u8>)> {
    let out = tempfile::tempdir().unwrap();
    let flat = out.path().join("flat");
    crate::image::flatten(fixture(set).chain(), &flat).unwrap();
    let files = std::fs::read_dir(flat).unwrap();
    files
        .map(|file| {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            (name, std::fs::read(file.path()).unwrap())
        })
        .collect()
}

#[test]
fn a_restore_gets_a_chain_as_one_directory() {
    for set in ["shm-tree/3", "memcached/3"] {
        let serving = Serving::begin(set);
        let mut criu = serving.criu();
        let wanted = flattened(set);
        assert!(criu.restore("tty.img").is_none());
        assert!(criu.restore("pages-4711.img").is_none());
        let mut total = 0;
        for (name, content) in &wanted {
            let mut found = Vec::new();
            let mut image = criu.restore(name).expect(name);
            image.read_to_end(&mut found).unwrap();
            let same = crate::image::flat::same_image(name, &found, content);
            assert!(same, "{set}: {name}");
            total += found.len() as u64;
        }
        drop(criu);
        let served = serving.end().unwrap();
        assert_eq!((served.images, served.absent), (wanted.len() as u64, 2));
        assert_eq!((served.bytes, served.unfinished), (total, 0));
    }
}

#[test]
fn images_that_are_read_by_turns_or_not_to_the_end_hold_nothing_up() {
    let serving = Serving::begin("memcached/3");
    let mut criu = serving.criu();
    let wanted = flattened("memcached/3");
    let mut open: Vec<_> = wanted
        .iter()
        .map(|(name, content)| (criu.restore(name).unwrap(), content))
        .collect();
    let (largest, content) = open
        .iter_mut()
        .max_by_key(|(_, content)| content.len())
        .unwrap();
    let mut first = [0; 4096];
    largest.read_exact(&mut first).unwrap();
    assert_eq!(first, content[..4096]);
    // More than a pipe holds is left: nobody reads it.
    assert!(content.len() > 8 << 20 || rustix::pipe::fcntl_getpipe_size(&*largest).unwrap() > 0);
    drop(criu);
    open.clear();
    let served = serving.end().unwrap();
    assert_eq!(served.images, wanted.len() as u64);
}

#[test]
fn a_set_that_criu_cannot_restore_is_refused_before_it_hears_anything() {
    let serving = Serving::begin("memcached-pageserver/client/3");
    let error = serving.end().unwrap_err();
    assert!(
        error.to_string().contains("sent to a page server"),
        "{error}"
    );
    let serving = Serving::begin("memcached-pageserver/server/3");
    let error = serving.end().unwrap_err();
    assert!(matches!(error, StreamerError::Incomplete { .. }), "{error}");
}

#[test]
fn what_is_no_restore_is_refused() {
    type Act = fn(&mut Criu);
    let acts: [(&str, Act); 5] = [
        ("length of", |criu| criu.0.write_all(&[0xff; 64]).unwrap()),
        ("separator", |criu| criu.request("../1/pages-1.img")),
        ("parent", |criu| criu.request("parent")),
        ("in the middle of its request", |criu| {
            criu.0.write_all(b"\x0d\0\0\0\x0a").unwrap();
        }),
        ("wrong end", |criu| {
            criu.request("inventory.img");
            criu.0.read_exact(&mut [0; 6]).unwrap();
            let (read, _write) = rustix::pipe::pipe().unwrap();
            criu.send(&[read.as_fd()]);
        }),
    ];
    for (said, act) in acts {
        let serving = Serving::begin("memcached/3");
        let mut criu = serving.criu();
        act(&mut criu);
        drop(criu);
        let error = serving.end().unwrap_err().to_string();
        assert!(error.contains(said), "{said}: {error}");
    }
}
