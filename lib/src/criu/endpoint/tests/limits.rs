//! Nobody keeps an application frozen: neither a peer that stalls, nor one that hangs.

use super::*;

#[test]
fn a_criu_that_falls_silent_in_a_dump_is_cut() {
    let stream = one_page(HeaderLayout::New, CLOSE);
    for at in [10, 32, 40, 64, 2000, stream.len() - 5] {
        let running = Running::listen(options(false), good);
        let mut criu = running.connect();
        criu.write_all(&stream[..at]).unwrap();
        let error = running.failed();
        assert!(matches!(error, SessionError::Silent(_)), "{at}: {error}");
        if at >= 32 {
            criu.read_exact(&mut [0]).expect("the answer to OPEN2");
        }
        assert!(is_cut(&mut criu), "{at}");
        running.stop();
    }
}

#[test]
fn a_destination_that_does_not_answer_close_is_left_behind() {
    let mut made = 0;
    let running = Running::listen(options(false), move || {
        made += 1;
        let behave = if made == 1 {
            Behave::HangsInClose
        } else {
            Behave::Well
        };
        behaving(behave)()
    });
    let mut criu = running.connect();
    let begun = now();
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    criu.read_exact(&mut [0]).expect("the answer to OPEN2");
    assert!(is_cut(&mut criu));
    let took = begun.elapsed();
    assert!(took >= QUICK.freeze && took < QUICK.freeze * 5, "{took:?}");
    assert!(matches!(running.failed(), SessionError::Slow(_)));
    // The next one is not kept waiting by it.
    let mut criu = running.connect();
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    assert_eq!(answers(&mut criu), [0; 5]);
    running.stop();
}

/// A reader that hangs while CRIU still writes: shutting the socket down would leave CRIU waiting for room
/// in its buffers.
#[test]
fn a_criu_that_still_writes_is_cut_where_the_destination_hangs() {
    let running = Running::listen(options(false), behaving(Behave::HangsInPages));
    let mut criu = running.connect();
    let layout = HeaderLayout::New;
    criu.write_all(&header(layout, OPEN2, 0, 0, TASK)).unwrap();
    criu.write_all(&header(layout, add(4), 1 << 16, 0x10000, TASK))
        .unwrap();
    let begun = now();
    let error = (0..1 << 16)
        .find_map(|_| criu.write_all(&[1; 4096]).err())
        .expect("nobody reads 256 MiB");
    let kinds = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    assert!(kinds.contains(&error.kind()), "{error}");
    assert!(begun.elapsed() < QUICK.freeze * 5);
    assert!(matches!(running.failed(), SessionError::Slow(_)));
    running.stop();
}

#[test]
fn the_same_over_an_inherited_socket_ends_the_endpoint() {
    let (ours, mut criu) = UnixStream::pair().unwrap();
    let hangs = behaving(Behave::HangsInPages);
    let mut running = Running::at(Place::Inherited(ours.into()), options(false), hangs);
    let layout = HeaderLayout::Old;
    criu.write_all(&header(layout, OPEN2, 0, 0, TASK)).unwrap();
    criu.write_all(&header(layout, add(4), 1 << 16, 0x10000, TASK))
        .unwrap();
    let error = (0..1 << 16)
        .find_map(|_| criu.write_all(&[1; 4096]).err())
        .expect("nobody reads 256 MiB");
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    let error = running.join().expect_err("its only socket is gone");
    assert!(matches!(
        error,
        EndpointError::Session(SessionError::Slow(_))
    ));
}

#[test]
fn a_sink_that_panics_makes_criu_fail() {
    let running = Running::listen(options(false), behaving(Behave::PanicsInClose));
    let mut criu = running.connect();
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    criu.read_exact(&mut [0]).expect("the answer to OPEN2");
    assert!(is_cut(&mut criu));
    assert!(matches!(running.failed(), SessionError::Panicked));
    running.stop();
}

#[test]
fn a_second_dump_waits_for_its_turn() {
    let running = Running::listen(options(false), good);
    let (mut first, mut second) = (running.connect(), running.connect());
    let stream = one_page(HeaderLayout::New, CLOSE);
    first.write_all(&stream[..100]).unwrap();
    first.read_exact(&mut [0]).expect("the answer to OPEN2");
    second.write_all(&stream).unwrap();
    thread::sleep(QUICK.freeze / 3);
    first.write_all(&stream[100..]).unwrap();
    first.read_exact(&mut [0; 4]).expect("its status");
    drop(first);
    assert_eq!(answers(&mut second), [0; 5]);
    running.stop();
}

#[test]
fn a_dump_whose_turn_does_not_come_is_cut() {
    let running = Running::listen(options(false), good);
    let (mut first, mut second) = (running.connect(), running.connect());
    let stream = one_page(HeaderLayout::New, CLOSE);
    first.write_all(&stream[..32]).unwrap();
    first.read_exact(&mut [0]).expect("the answer to OPEN2");
    second.write_all(&stream).unwrap();
    // The first one goes on all the time, if slowly.
    let slowly = thread::spawn(move || {
        for piece in stream[32..].chunks(400) {
            thread::sleep(Duration::from_millis(100));
            first.write_all(piece).unwrap();
        }
        first.read_exact(&mut [0; 4]).expect("its status");
    });
    assert!(is_cut(&mut second));
    assert!(matches!(running.failed(), SessionError::NoTurn(_)));
    slowly.join().expect("the first one is taken");
    assert!(running.taken().is_some());
    running.stop();
}

#[test]
fn who_says_nothing_keeps_nobody_waiting_but_not_any_number_may() {
    let running = Running::listen(options(false), good);
    let quiet: Vec<_> = (0..MOST_WAITING - 1).map(|_| running.connect()).collect();
    let mut criu = running.connect();
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    assert_eq!(answers(&mut criu), [0; 5]);
    drop(criu);
    assert!(running.taken().is_some());
    let _last = running.connect();
    let mut one_more = running.connect();
    assert!(matches!(running.failed(), SessionError::TooMany));
    assert!(is_cut(&mut one_more));
    drop(quiet);
    running.stop();
}

#[test]
fn told_to_stop_it_refuses_what_is_under_way() {
    let (dropped, drops) = channel();
    let running = Running::listen(options(false), move || {
        Ok(Memory {
            dropped: Some(Told(dropped.clone())),
            ..Memory::default()
        })
    });
    let mut criu = running.connect();
    let stream = one_page(HeaderLayout::New, CLOSE);
    criu.write_all(&stream[..200]).unwrap();
    criu.read_exact(&mut [0]).expect("the answer to OPEN2");
    running.stopper.stop();
    assert!(is_cut(&mut criu));
    assert!(matches!(running.failed(), SessionError::Stopped));
    drops
        .recv_timeout(Duration::from_secs(5))
        .expect("what came is dropped");
    running.stop();
}

/// The event is what ends the sink's wait.
#[test]
fn told_to_stop_it_says_so_before_it_waits_for_the_sink() {
    let running = Running::listen(options(false), behaving(Behave::HangsInClose));
    let mut criu = running.connect();
    criu.write_all(&one_page(HeaderLayout::New, CLOSE)).unwrap();
    criu.read_exact(&mut [0]).expect("the answer to OPEN2");
    let begun = now();
    running.stopper.stop();
    assert!(matches!(running.failed(), SessionError::Stopped));
    assert!(begun.elapsed() < Duration::from_secs(1));
    running.stop();
}
