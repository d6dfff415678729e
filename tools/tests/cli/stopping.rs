//! Transfers that end early.

use rustix::process::Signal;

use crate::sandbox::{Running, Sandbox, published};

fn slow_send(sandbox: &Sandbox, source: &std::path::Path, ticket: &str) -> Running {
    let source = source.to_str().unwrap();
    let args = ["send", source, "--to", ticket, "--json", "--bwlimit", "4M"];
    Running::start(sandbox.command(&args))
}

#[test]
fn a_receiver_that_is_stopped_says_so_and_ends_well() {
    let sandbox = Sandbox::new();
    let source = sandbox.large_set(12 << 20);
    let (recv, ticket) = sandbox.recv(&[]).ticket();
    let mut send = slow_send(&sandbox, &source, &ticket);
    send.wait_for_wire_bytes(1 << 20);
    recv.signal(Signal::TERM);
    assert_eq!(recv.ended().code, Some(0));
    send.ended().refused(5, &["shutting down"]);
    assert_eq!(published(&sandbox.path("recv")), Vec::<String>::new());
}

#[test]
fn a_sender_that_is_stopped_publishes_nothing() {
    let sandbox = Sandbox::new();
    let source = sandbox.large_set(12 << 20);
    let (mut recv, ticket) = sandbox.recv(&[]).ticket();
    let mut send = slow_send(&sandbox, &source, &ticket);
    send.wait_for_wire_bytes(1 << 20);
    send.signal(Signal::INT);
    send.ended().refused(130, &["stopped"]);
    // It was told, not left to wait.
    assert_eq!(recv.next_event()["event"], "failed");
    assert_eq!(published(&sandbox.path("recv")), Vec::<String>::new());
}

#[test]
fn what_arrived_before_a_crash_is_not_sent_again() {
    let sandbox = Sandbox::new();
    let source = sandbox.large_set(8 << 20);
    let (recv, ticket) = sandbox.recv(&[]).ticket();
    let mut send = slow_send(&sandbox, &source, &ticket);
    send.wait_for_wire_bytes(6 << 20);
    recv.signal(Signal::KILL);
    recv.ended();
    send.signal(Signal::TERM);
    assert_eq!(send.ended().code, Some(130));
    assert_eq!(published(&sandbox.path("recv")), Vec::<String>::new());

    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    let done = sandbox.send(&source, &ticket, &[]).done();
    let (image, sent) = (&done["bytes"]["image"], &done["bytes"]["sent"]);
    let saved = image.as_u64().unwrap() - sent.as_u64().unwrap();
    assert!(saved > 3 << 20, "{done}");
    let set = sandbox.path("recv/large");
    assert_eq!(
        sandbox.run(&["verify", set.to_str().unwrap()]).code,
        Some(0)
    );
}
