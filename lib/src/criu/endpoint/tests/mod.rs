use super::*;

mod cases;
mod limits;
mod real;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use bytes::Bytes;

use crate::criu::page_server::{Batch, HeaderLayout};
use crate::image::{PageRun, PagemapName};

/// Keeps everything; reports when it is dropped.
#[derive(Debug, Default)]
struct Memory {
    pages: BTreeMap<(PagemapName, u64), Bytes>,
    parents: Vec<PageRun>,
    behave: Behave,
    status: i32,
    #[expect(dead_code, reason = "only dropped")]
    dropped: Option<Told>,
}

/// What it does besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Behave {
    #[default]
    Well,
    /// With measurements.
    Discards,
    FailsAtOpen,
    HangsInPages,
    HangsInClose,
    PanicsInClose,
}

/// Long against the limits of the tests; the thread is left behind.
fn hang() {
    thread::sleep(Duration::from_secs(20));
}

impl PageSink for Memory {
    fn open(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        match self.behave {
            Behave::FailsAtOpen => Err("the destination is gone".into()),
            _ => Ok(false),
        }
    }

    fn has_parent(&mut self, _: PagemapName) -> Result<bool, SinkError> {
        Ok(true)
    }

    fn pages(&mut self, batch: &Batch, bytes: Bytes) -> Result<(), SinkError> {
        match self.behave {
            Behave::HangsInPages => hang(),
            Behave::Discards => return Ok(()),
            _ => {}
        }
        self.pages.insert((batch.space, batch.vaddr), bytes);
        Ok(())
    }

    fn elsewhere(&mut self, _: PagemapName, run: PageRun) -> Result<(), SinkError> {
        self.parents.push(run);
        Ok(())
    }

    fn close(&mut self) -> Result<i32, SinkError> {
        match self.behave {
            Behave::HangsInClose => hang(),
            Behave::PanicsInClose => std::panic::resume_unwind(Box::new("as the test wants it")),
            _ => {}
        }
        Ok(self.status)
    }
}

/// Says that it was dropped.
#[derive(Debug)]
struct Told(Sender<()>);

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

/// An endpoint at work on a thread.
struct Running {
    address: Option<SocketAddr>,
    stopper: Stopper,
    events: Receiver<Event<Memory>>,
    thread: Option<JoinHandle<Result<(), EndpointError>>>,
}

const QUICK: Limits = Limits {
    silence: Duration::from_millis(300),
    freeze: Duration::from_millis(300),
};

fn options(once: bool) -> Options {
    Options {
        page_size: PageSize::new(4096).expect("a page size"),
        limits: QUICK,
        prev_images: true,
        once,
    }
}

impl Running {
    fn at(
        place: Place,
        options: Options,
        make: impl FnMut() -> Result<Memory, SinkError> + Send + 'static,
    ) -> Self {
        let address = match &place {
            Place::Listen(listener) => Some(listener.local_addr().expect("an address")),
            Place::Inherited(_) => None,
        };
        let stopper = Stopper::new().expect("an event descriptor");
        let (sender, events) = channel();
        let sender = Mutex::new(sender);
        let report = move |event| {
            let _ = sender.lock().expect("nobody panics").send(event);
        };
        let stop = stopper.clone();
        let thread = thread::spawn(move || run(place, &options, make, report, &stop));
        Self {
            address,
            stopper,
            events,
            thread: Some(thread),
        }
    }

    /// On a free port.
    fn listen(
        options: Options,
        make: impl FnMut() -> Result<Memory, SinkError> + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        Self::at(Place::Listen(listener), options, make)
    }

    fn connect(&self) -> TcpStream {
        let address = self.address.expect("it listens");
        let socket = TcpStream::connect(address).expect("it accepts");
        let limit = Some(Duration::from_secs(10));
        socket.set_read_timeout(limit).expect("a time-out");
        socket.set_write_timeout(limit).expect("a time-out");
        socket
    }

    /// The next event that is no begin.
    fn next(&self) -> Event<Memory> {
        loop {
            let event = self.events.recv_timeout(Duration::from_secs(10));
            match event.expect("something happens") {
                Event::Begun { .. } => {}
                event => return event,
            }
        }
    }

    fn taken(&self) -> Option<Memory> {
        match self.next() {
            Event::Taken { sink, .. } => sink,
            other => panic!("{other:?}"),
        }
    }

    fn failed(&self) -> SessionError {
        match self.next() {
            Event::Failed { error, .. } => error,
            other => panic!("{other:?}"),
        }
    }

    fn join(&mut self) -> Result<(), EndpointError> {
        let thread = self.thread.take().expect("once");
        thread.join().expect("no panic")
    }

    fn stop(mut self) {
        self.stopper.stop();
        self.join().expect("it ends well");
    }
}

fn good() -> Result<Memory, SinkError> {
    Ok(Memory::default())
}

fn behaving(behave: Behave) -> impl FnMut() -> Result<Memory, SinkError> + Send {
    move || {
        Ok(Memory {
            behave: behave.clone(),
            ..Memory::default()
        })
    }
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
    bytes
}

const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;
const TASK: u64 = 0x4b_0301;
const LAYOUTS: [HeaderLayout; 2] = [HeaderLayout::Old, HeaderLayout::New];

const fn add(flags: u32) -> u32 {
    6 | flags << 16
}

/// One page of one task, to its end.
fn one_page(layout: HeaderLayout, end: u32) -> Vec<u8> {
    let mut stream = header(layout, OPEN2, 0, 0, TASK);
    stream.extend(header(layout, add(6), 1, 0x7f5c_2f3e_5000, TASK));
    stream.extend([7; 4096]);
    stream.extend(header(layout, end, 0, 0, 0));
    stream
}

/// The answers to [`one_page`].
fn answers(socket: &mut impl Read) -> [u8; 5] {
    let mut answers = [9; 5];
    socket.read_exact(&mut answers).expect("two answers");
    answers
}

fn is_whole(memory: &Memory) -> bool {
    memory.pages.values().map(Bytes::len).sum::<usize>() == 4096
}

/// What the peer sees where its connection was cut: no more answers.
fn is_cut(socket: &mut impl Read) -> bool {
    let mut rest = [0; 4];
    match socket.read(&mut rest) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn dumps_are_taken_one_after_the_other() {
    let running = Running::listen(options(false), good);
    for layout in LAYOUTS {
        let mut criu = running.connect();
        criu.write_all(&one_page(layout, CLOSE)).unwrap();
        assert_eq!(answers(&mut criu), [0; 5]);
        drop(criu);
        assert!(is_whole(&running.taken().expect("it has memory")));
    }
    running.stop();
}

#[test]
fn one_socket_serves_many_dumps() {
    for layout in LAYOUTS {
        let (ours, mut criu) = UnixStream::pair().unwrap();
        let mut running = Running::at(Place::Inherited(ours.into()), options(false), good);
        for _ in 0..3 {
            criu.write_all(&one_page(layout, FORCE_CLOSE)).unwrap();
            assert_eq!(answers(&mut criu), [0; 5]);
            assert!(is_whole(&running.taken().expect("it has memory")));
            // Longer than any limit: nothing is frozen.
            thread::sleep(QUICK.silence + QUICK.freeze);
        }
        drop(criu);
        running.join().expect("the socket ended between dumps");
    }
}

#[test]
fn a_connection_serves_many_dumps_if_criu_leaves_it_open() {
    let running = Running::listen(options(false), good);
    let mut criu = running.connect();
    for layout in LAYOUTS {
        criu.write_all(&one_page(layout, FORCE_CLOSE)).unwrap();
        assert_eq!(answers(&mut criu), [0; 5]);
        assert!(is_whole(&running.taken().expect("it has memory")));
    }
    running.stop();
}

#[test]
fn a_criu_that_fails_before_it_dumps_memory_leaves_nothing() {
    for layout in LAYOUTS {
        let (ours, mut criu) = UnixStream::pair().unwrap();
        let running = Running::at(Place::Inherited(ours.into()), options(false), good);
        criu.write_all(&header(layout, FORCE_CLOSE, 0, 0, 0))
            .unwrap();
        let mut status = [9; 4];
        criu.read_exact(&mut status).unwrap();
        assert_eq!(status, [0; 4]);
        assert!(running.taken().is_none());
        // Nothing of its longer header is left for the next one.
        criu.write_all(&one_page(layout, FORCE_CLOSE)).unwrap();
        assert_eq!(answers(&mut criu), [0; 5]);
        assert!(running.taken().is_some());
        running.stop();
    }
}

#[test]
fn a_pre_dump_that_only_asked_leaves_nothing() {
    let running = Running::listen(options(false), good);
    let mut criu = running.connect();
    let mut stream = header(HeaderLayout::New, PARENT, 0, 0, TASK);
    stream.extend(header(HeaderLayout::New, CLOSE, 0, 0, 0));
    criu.write_all(&stream).unwrap();
    let mut replies = [9; 8];
    criu.read_exact(&mut replies).unwrap();
    assert_eq!(replies[..], [0; 8]);
    drop(criu);
    assert!(running.taken().is_none());
    running.stop();
}

#[test]
fn after_one_dump_it_ends_if_that_is_all() {
    let mut running = Running::listen(options(true), good);
    // What comes to any open port does not count.
    drop(running.connect());
    running
        .connect()
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    assert!(matches!(running.failed(), SessionError::Serve(_)));
    let mut criu = running.connect();
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    assert_eq!(answers(&mut criu), [0; 5]);
    drop(criu);
    running.join().expect("it was taken");
    assert!(running.taken().is_some());
}

#[test]
fn a_dump_that_fails_ends_it_with_the_reason_if_that_was_all() {
    let mut running = Running::listen(options(true), good);
    let mut criu = running.connect();
    let stream = one_page(HeaderLayout::New, CLOSE);
    criu.write_all(&stream[..200]).unwrap();
    drop(criu);
    let error = running.join().expect_err("it was cut");
    assert!(error.to_string().contains("inside a page"), "{error}");
}

#[test]
fn a_criu_that_brings_nothing_is_an_error_if_that_was_all() {
    for stream in [vec![], header(HeaderLayout::New, PARENT, 0, 0, TASK)] {
        let mut running = Running::listen(options(true), good);
        let mut criu = running.connect();
        criu.write_all(&stream).unwrap();
        criu.write_all(&header(HeaderLayout::New, CLOSE, 0, 0, 0))
            .unwrap();
        let error = running.join().expect_err("nothing came");
        assert!(matches!(
            error,
            EndpointError::Session(SessionError::NoMemory)
        ));
        assert!(running.taken().is_none());
    }
}

#[test]
fn a_criu_that_brings_nothing_has_no_parent_for_the_next() {
    let running = Running::listen(options(false), good);
    let layout = HeaderLayout::New;
    for _ in 0..2 {
        let mut criu = running.connect();
        criu.write_all(&header(layout, PARENT, 0, 0, TASK)).unwrap();
        let mut answer = [9; 4];
        criu.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [0; 4]);
        criu.write_all(&header(layout, CLOSE, 0, 0, 0)).unwrap();
        criu.read_exact(&mut answer).unwrap();
        drop(criu);
        assert!(running.taken().is_none());
    }
    running.stop();
}

#[test]
fn being_stopped_before_the_one_dump_was_taken_is_an_error() {
    for begins in [false, true] {
        let mut running = Running::listen(options(true), good);
        let mut criu = running.connect();
        if begins {
            criu.write_all(&one_page(HeaderLayout::New, CLOSE)[..200])
                .unwrap();
            criu.read_exact(&mut [0]).expect("the answer to OPEN2");
        }
        running.stopper.stop();
        let error = running.join().expect_err("nothing was taken");
        let stopped = EndpointError::Session(SessionError::Stopped);
        assert_eq!(error.to_string(), stopped.to_string());
    }
}

/// A sink that was made for somebody who has left meanwhile.
#[test]
fn a_sink_that_nobody_waits_for_is_dropped() {
    let (dropped, drops) = channel();
    let (tell, made) = channel();
    let running = Running::listen(options(false), move || {
        tell.send(()).expect("the test listens");
        thread::sleep(Duration::from_millis(200));
        Ok(Memory {
            dropped: Some(Told(dropped.clone())),
            ..Memory::default()
        })
    });
    // Many at once begin only one.
    let crowd: Vec<_> = (0..MOST_WAITING).map(|_| running.connect()).collect();
    made.recv().expect("one is being made");
    drop(crowd);
    drops
        .recv_timeout(Duration::from_secs(5))
        .expect("it is dropped when it is there");
    assert!(made.try_recv().is_err());
    running.stop();
}

#[test]
fn a_sink_made_long_before_is_made_anew_where_its_destination_is_gone() {
    let mut made = 0;
    let running = Running::listen(options(false), move || {
        made += 1;
        let behave = if made == 1 {
            Behave::FailsAtOpen
        } else {
            Behave::Well
        };
        Ok(Memory {
            behave,
            ..Memory::default()
        })
    });
    let mut criu = running.connect();
    // So that the first one is surely made ahead.
    thread::sleep(Duration::from_millis(100));
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    assert_eq!(answers(&mut criu), [0; 5]);
    running.stop();
}

#[test]
fn a_destination_that_cannot_be_had_makes_criu_fail() {
    let running = Running::listen(options(false), || Err("no route".into()));
    let mut criu = running.connect();
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    assert!(is_cut(&mut criu));
    let error = running.failed();
    assert!(error.to_string().contains("no route"), "{error}");
    running.stop();
}

#[test]
fn an_inherited_descriptor_must_be_a_connected_stream() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    for socket in [OwnedFd::from(file), listener.into(), datagram.into()] {
        let mut running = Running::at(Place::Inherited(socket), options(false), good);
        assert!(matches!(running.join(), Err(EndpointError::NoStream)));
    }
    assert!(inherited(1 << 20).is_err());
}

#[test]
fn criu_hears_of_a_parent_only_where_it_has_one_itself() {
    let layout = HeaderLayout::New;
    let parents = |prev_images| {
        let options = Options {
            prev_images,
            ..options(false)
        };
        let running = Running::listen(options, good);
        let mut answers = Vec::new();
        for _ in 0..2 {
            let mut criu = running.connect();
            criu.write_all(&header(layout, PARENT, 0, 0, TASK)).unwrap();
            let mut answer = [9; 4];
            criu.read_exact(&mut answer).unwrap();
            answers.push(i32::from_ne_bytes(answer));
            criu.write_all(&one_page(layout, CLOSE)).unwrap();
            criu.read_exact(&mut [0; 5]).unwrap();
            drop(criu);
            running.taken();
        }
        running.stop();
        answers
    };
    assert_eq!(parents(true), [0, 1]);
    assert_eq!(parents(false), [0, 0]);
}
