//! What CRIU's own page server does with everything that may come, and what this one does: the same
//! where that is right, a refusal where CRIU's server stores what nobody could restore.

use super::*;

/// What the peer hears, and what becomes of the dump.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// Taken: the bytes of all answers.
    Taken(&'static [u8]),
    /// Refused, with these words, after these answers.
    Refused(&'static [u8], &'static str),
}

use Then::{Refused, Taken};

/// One message: command, pages, address, whose. Data follows where its flags say so.
type Message = (u32, u64, u64, u64);

const SHMEM: u64 = 9 << 8 | 2;
const PAGE: u64 = 4096;
const OPENED: Message = (OPEN2, 0, 0, TASK);
const CLOSED: Message = (CLOSE, 0, 0, 0);

/// What is said, in order, and what comes of it.
const CASES: &[(&str, &[Message], Then)] = &[
    // Commands.
    (
        "legacy: open without an answer, pages",
        &[(3, 0, 0, TASK), (1, 1, PAGE, TASK), CLOSED],
        Taken(&[0; 4]),
    ),
    (
        "legacy: a hole is in the parent",
        &[(3, 0, 0, TASK), (2, 4, PAGE, TASK), CLOSED],
        Taken(&[0; 4]),
    ),
    ("open answers one byte", &[OPENED, CLOSED], Taken(&[0; 5])),
    (
        "parent answers four, and no, where CRIU has none",
        &[(PARENT, 0, 0, TASK), OPENED, CLOSED],
        Taken(&[0; 9]),
    ),
    (
        "present pages bring their bytes",
        &[OPENED, (add(4), 2, PAGE, TASK), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "so do lazy ones in an ordinary dump",
        &[OPENED, (add(6), 1, PAGE, TASK), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "pages in the parent bring none",
        &[OPENED, (add(1), 7, PAGE, TASK), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "lazy pages that stay bring none",
        &[OPENED, (add(2), 7, PAGE, TASK), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "requests for pages are none of a dump's",
        &[OPENED, (7, 1, PAGE, TASK)],
        Refused(&[0], "unknown operation"),
    ),
    (
        "compressed pages",
        &[OPENED, (8 | 4 << 16, 1, PAGE, TASK)],
        Refused(&[0], "compressed"),
    ),
    (
        "a forced close ends it as well",
        &[OPENED, (FORCE_CLOSE, 0, 0, 0)],
        Taken(&[0; 5]),
    ),
    // Whose memory: present types, and those of old writers.
    (
        "shared memory",
        &[(OPEN2, 0, 0, SHMEM), (add(4), 1, 0, SHMEM), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "task 10",
        &[(OPEN2, 0, 0, 5 << 8 | 10), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "task 11",
        &[(OPEN2, 0, 0, 5 << 8 | 11), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "task 16",
        &[(OPEN2, 0, 0, 5 << 8 | 16), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "task 17",
        &[(OPEN2, 0, 0, 5 << 8 | 17), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "shmem 27",
        &[(OPEN2, 0, 0, 5 << 8 | 27), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "shmem 28",
        &[(OPEN2, 0, 0, 5 << 8 | 28), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "shmem 29",
        &[(OPEN2, 0, 0, 5 << 8 | 29), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "shmem 32",
        &[(OPEN2, 0, 0, 5 << 8 | 32), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "shmem 33",
        &[(OPEN2, 0, 0, 5 << 8 | 33), CLOSED],
        Taken(&[0; 5]),
    ),
    (
        "shmem 34",
        &[(OPEN2, 0, 0, 5 << 8 | 34), CLOSED],
        Taken(&[0; 5]),
    ),
    // Order.
    (
        "segments before tasks",
        &[(OPEN2, 0, 0, SHMEM), OPENED, CLOSED],
        Taken(&[0; 6]),
    ),
    (
        "a task without memory",
        &[OPENED, (OPEN2, 0, 0, 5 << 8 | 1), CLOSED],
        Taken(&[0; 6]),
    ),
    (
        "pages of the one that was open before",
        &[OPENED, (OPEN2, 0, 0, SHMEM), (add(4), 1, 0, TASK)],
        Refused(&[0; 2], "not open"),
    ),
    (
        "a close with flags goes on at CRIU's",
        &[OPENED, (CLOSE | 1 << 16, 0, 0, 0)],
        Refused(&[0], "more than its operation"),
    ),
    (
        "nothing but a close: CRIU failed before",
        &[CLOSED],
        Taken(&[0; 4]),
    ),
    // Errors. CRIU exits on the first four as well …
    (
        "end without a close",
        &[OPENED],
        Refused(&[0], "ends early, without its CLOSE"),
    ),
    (
        "end of everything",
        &[(add(4), 1, PAGE, TASK)],
        Refused(&[], "does not begin as one"),
    ),
    (
        "unknown operation",
        &[OPENED, (99, 0, 0, TASK)],
        Refused(&[0], "unknown operation 0x63"),
    ),
    (
        "unknown type",
        &[(OPEN2, 0, 0, 5 << 8 | 3)],
        Refused(&[], "neither a task nor a shared segment"),
    ),
    // … and stores these, though no restore could use them.
    (
        "unknown flags",
        &[OPENED, (add(16), 1, PAGE, TASK)],
        Refused(&[0], "flags"),
    ),
    (
        "present and in the parent",
        &[OPENED, (add(5), 1, PAGE, TASK)],
        Refused(&[0], "parent"),
    ),
    (
        "pages that descend",
        &[OPENED, (add(1), 2, 8 * PAGE, TASK), (add(1), 1, PAGE, TASK)],
        Refused(&[0], "begins below"),
    ),
    (
        "pages that overlap",
        &[OPENED, (add(1), 2, PAGE, TASK), (add(1), 1, 2 * PAGE, TASK)],
        Refused(&[0], "begins below"),
    ),
    (
        "half a page's address",
        &[OPENED, (add(1), 1, PAGE / 2, TASK)],
        Refused(&[0], "multiple"),
    ),
    (
        "no pages",
        &[OPENED, (add(4), 0, PAGE, TASK)],
        Refused(&[0], "0 pages"),
    ),
    (
        "pages behind the end of memory",
        &[OPENED, (add(1), 2, u64::MAX - PAGE + 1, TASK)],
        Refused(&[0], "end"),
    ),
    (
        "pages of what was never opened",
        &[(OPEN2, 0, 0, SHMEM), (add(4), 1, PAGE, TASK)],
        Refused(&[0], "not open"),
    ),
    (
        "the same memory twice",
        &[OPENED, OPENED],
        Refused(&[0], "comes twice"),
    ),
    (
        "an open with pages",
        &[OPENED, (OPEN2, 1, 0, SHMEM)],
        Refused(&[0], "more than its operation"),
    ),
];

fn without_parents(once: bool) -> Options {
    Options {
        prev_images: false,
        ..options(once)
    }
}

fn stream(layout: HeaderLayout, messages: &[Message]) -> Vec<u8> {
    let mut stream = Vec::new();
    for (command, pages, vaddr, dst_id) in messages {
        stream.extend(header(layout, *command, *pages, *vaddr, *dst_id));
        let op = command & 0xffff;
        if op == 1 || op == 6 && command >> 16 & 4 != 0 {
            let bytes = usize::try_from(pages * PAGE).expect("few");
            stream.extend(vec![3; bytes]);
        }
    }
    stream
}

/// All that the peer hears, to the end of the connection.
fn hear(socket: &mut impl Read) -> Vec<u8> {
    let mut heard = Vec::new();
    // A reset ends it as well.
    let _ = socket.read_to_end(&mut heard);
    heard
}

#[test]
fn what_criu_may_send_over_tcp() {
    for layout in LAYOUTS {
        let running = Running::listen(without_parents(false), good);
        for (name, messages, then) in CASES {
            let mut criu = running.connect();
            criu.write_all(&stream(layout, messages)).unwrap();
            criu.shutdown(std::net::Shutdown::Write).unwrap();
            check(name, layout, *then, &hear(&mut criu), running.next());
        }
        running.stop();
    }
}

#[test]
fn what_criu_may_send_over_an_inherited_socket() {
    for layout in LAYOUTS {
        for (name, messages, then) in CASES {
            let (ours, mut criu) = UnixStream::pair().unwrap();
            let mut running =
                Running::at(Place::Inherited(ours.into()), without_parents(true), good);
            criu.write_all(&stream(layout, messages)).unwrap();
            criu.shutdown(std::net::Shutdown::Write).unwrap();
            let event = match running.join() {
                Ok(()) | Err(EndpointError::Session(SessionError::NoMemory)) => running.next(),
                Err(EndpointError::Session(error)) => Event::Failed {
                    client: Client {
                        address: None,
                        pid: None,
                    },
                    error,
                },
                Err(error) => panic!("{name}: {error}"),
            };
            drop(running);
            check(name, layout, *then, &hear(&mut criu), event);
        }
    }
}

fn check(name: &str, layout: HeaderLayout, then: Then, heard: &[u8], event: Event<Memory>) {
    match (then, event) {
        (Taken(answers), Event::Taken { served, .. }) => {
            assert_eq!(heard, answers, "{name}, {layout:?}");
            assert_eq!(served.status, 0);
        }
        (Refused(answers, words), Event::Failed { error, .. }) => {
            // A reset may overtake answers.
            assert!(answers.starts_with(heard), "{name}, {layout:?}: {heard:?}");
            let text = error.to_string();
            assert!(text.contains(words), "{name}, {layout:?}: {text}");
        }
        (then, event) => panic!("{name}, {layout:?}: {then:?}, but {event:?}"),
    }
}

#[test]
fn bytes_behind_the_end_are_an_error() {
    for layout in LAYOUTS {
        let running = Running::listen(options(false), good);
        let mut criu = running.connect();
        criu.write_all(&one_page(layout, CLOSE)).unwrap();
        assert_eq!(answers(&mut criu), [0; 5]);
        criu.write_all(&header(layout, OPEN2, 0, 0, TASK)).unwrap();
        assert!(running.taken().is_some());
        assert!(matches!(running.failed(), SessionError::Behind));
        running.stop();
    }
}

#[test]
fn a_refusal_reaches_criu_as_its_status() {
    for status in [1, -1, i32::MIN] {
        let running = Running::listen(options(false), move || {
            Ok(Memory {
                status,
                ..Memory::default()
            })
        });
        let mut criu = running.connect();
        criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
        assert_eq!(answers(&mut criu)[1..], status.to_ne_bytes());
        drop(criu);
        assert!(matches!(running.failed(), SessionError::Refused(it) if it == status));
        running.stop();
    }
}
