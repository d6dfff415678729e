//! What is refused, with which exit code, and that nothing is published then.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::sandbox::{Running, Sandbox, fixture, published};

#[track_caller]
fn nothing_arrived(sandbox: &Sandbox) {
    assert_eq!(published(&sandbox.path("recv")), Vec::<String>::new());
}

#[test]
fn directories_that_cannot_be_sent_are_named() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    let send = |dir: &Path| sandbox.send(dir, &ticket, &[]);
    send(&sandbox.path("nowhere")).refused(3, &["nowhere", "no such directory"]);

    let chain = sandbox.copy_chain("memcached");
    let pages = chain.join("3/pages-1.img");
    let len = pages.metadata().unwrap().len();
    let file = OpenOptions::new().write(true).open(&pages).unwrap();
    file.set_len(len - 4096).unwrap();
    send(&chain.join("3")).refused(3, &["pages-1.img"]);
    file.set_len(len).unwrap();

    fs::rename(chain.join("1"), chain.join("away")).unwrap();
    send(&chain.join("3")).refused(3, &["2/parent", "../1"]);

    fs::remove_file(chain.join("3/parent")).unwrap();
    symlink(chain.join("2"), chain.join("3/parent")).unwrap();
    send(&chain.join("3")).refused(3, &["absolute", "flatten"]);

    let sent = send(&chain.join("nowhere"));
    let error = sent.events().pop().unwrap();
    assert_eq!(
        (&error["event"], &error["exit_code"]),
        (&"error".into(), &3.into())
    );
    assert!(
        error["error"]
            .as_str()
            .unwrap()
            .contains("no such directory")
    );
    nothing_arrived(&sandbox);
}

#[test]
fn a_pagemap_with_a_flipped_bit_is_refused() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    let chain = sandbox.copy_chain("memcached");
    let pagemap = chain.join("3/pagemap-171.img");
    let mut bytes = fs::read(&pagemap).unwrap();
    bytes[0] ^= 1;
    fs::write(&pagemap, bytes).unwrap();
    sandbox
        .send(&chain.join("3"), &ticket, &[])
        .refused(3, &["pagemap-171.img"]);
    nothing_arrived(&sandbox);
}

#[test]
fn wrong_usage_is_told_before_anything_happens() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    let source = fixture("memcached/1");
    let send = |to: &str, args: &[&str]| sandbox.send(&source, to, args);
    send(&ticket, &["--name", "a/b"]).refused(2, &["a/b", "separator"]);
    send(&ticket, &["--name", ".hidden"]).refused(2, &["dot"]);
    send(&ticket[..ticket.len() - 2], &[]).refused(2, &["cut short or mistyped"]);
    send("@nowhere", &[]).refused(6, &["nowhere"]);
    send("host:1", &[]).refused(2, &["--peer"]);
    send("host", &[]).refused(2, &["HOST:PORT"]);
    send(&ticket, &["--bwlimit", "0"]).refused(2, &["nothing would ever arrive"]);
    send(&ticket, &["--page-size", "5000"]).refused(2, &["power of two"]);
    sandbox.run(&["frobnicate"]).refused(2, &["frobnicate"]);
    nothing_arrived(&sandbox);
}

#[test]
fn a_ticket_of_another_recv_is_no_key() {
    let sandbox = Sandbox::new();
    let source = fixture("memcached/1");
    let (recv, listening) = sandbox.recv(&[]).listening();
    let ticket = listening["ticket"].as_str().unwrap();
    let address = listening["addresses"][0].as_str().unwrap();
    drop(recv);
    sandbox
        .send(&source, ticket, &[])
        .refused(5, &["nothing listens there"]);

    // The same key at the same place, but another secret.
    let (recv, _) = sandbox.recv(&["--listen", address]).ticket();
    sandbox.send(&source, ticket, &[]).refused(4, &["ticket"]);
    drop(recv);

    let (_recv, _) = sandbox
        .recv(&["--listen", address, "--dir", "other"])
        .ticket();
    sandbox
        .send(&source, ticket, &[])
        .refused(4, &["another key"]);
    nothing_arrived(&sandbox);
}

#[test]
fn sets_larger_than_allowed_are_refused() {
    let sandbox = Sandbox::new();
    let (mut recv, ticket) = sandbox.recv(&["--max-bytes", "1M"]).ticket();
    sandbox
        .send(&fixture("memcached/1"), &ticket, &[])
        .refused(9, &["--max-bytes"]);
    let failed = recv.next_event();
    assert_eq!(failed["event"], "failed");
    assert!(failed["error"].as_str().unwrap().contains("--max-bytes"));
    nothing_arrived(&sandbox);
}

#[test]
fn one_directory_is_served_once() {
    let sandbox = Sandbox::new();
    let (_recv, _) = sandbox.recv(&[]).ticket();
    sandbox
        .recv(&[])
        .ended()
        .refused(6, &["another `crxfer recv`"]);
}

#[test]
fn a_name_that_something_else_has_is_left_alone() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    fs::create_dir(sandbox.path("recv/mine")).unwrap();
    sandbox
        .send(&fixture("memcached/1"), &ticket, &["--name", "mine"])
        .refused(7, &["recv/mine", "not received by crxfer"]);
    assert_eq!(fs::read_dir(sandbox.path("recv/mine")).unwrap().count(), 0);
}

#[test]
fn a_file_that_changes_while_it_is_sent_is_noticed() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    let source = sandbox.large_set(4 << 20);
    let args = [
        "send",
        source.to_str().unwrap(),
        "--to",
        &ticket,
        "--json",
        "--bwlimit",
        "4M",
    ];
    let mut send = Running::start(sandbox.command(&args));
    send.wait_for_wire_bytes(1 << 20);
    let mut file = OpenOptions::new()
        .append(true)
        .open(source.join("pages-1.img"))
        .unwrap();
    file.write_all(b"!").unwrap();
    send.ended().refused(8, &["pages-1.img", "changed"]);
    nothing_arrived(&sandbox);
}
