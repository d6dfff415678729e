//! Sets that arrive.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::sandbox::{Running, Sandbox, files, fixture, published};

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

/// Sends a whole chain, and checks that the memory is the same as at the source.
fn send_chain(layout: &str) -> (Sandbox, Running, Value) {
    let sandbox = Sandbox::new();
    let (mut recv, ticket) = sandbox.recv(&["--layout", layout]).ticket();
    for chain in ["memcached", "shm-tree"] {
        let source = fixture(chain).join("3");
        let done = sandbox.send(&source, &ticket, &["--name", chain]).done();
        assert_eq!(done["ancestors"], 2);
        assert_eq!(done["completeness"], "complete");
        let arrived = sandbox.path("recv").join(chain);
        let (from, to) = (source.to_str().unwrap(), arrived.to_str().unwrap());
        let diff = sandbox.run(&["diff", "--json", from, to]).done();
        for memory in diff["memory"].as_array().unwrap() {
            for kind in ["changed", "added", "removed", "unknown"] {
                assert_eq!(memory[kind], 0, "{memory}");
            }
        }
        assert_eq!(sandbox.run(&["verify", to]).code, Some(0));
    }
    let received = loop {
        let event = recv.next_event();
        if !event["name"].is_null() {
            break event;
        }
    };
    (sandbox, recv, received)
}

#[test]
fn a_faithful_chain_has_the_same_files() {
    let (sandbox, _recv, received) = send_chain("faithful");
    for chain in ["memcached", "shm-tree"] {
        let (source, arrived) = (fixture(chain).join("3"), sandbox.path("recv").join(chain));
        assert_eq!(files(&arrived), files(&source));
        for name in files(&source) {
            let same =
                fs::read(source.join(&name)).unwrap() == fs::read(arrived.join(&name)).unwrap();
            assert!(same, "{name}");
        }
    }
    assert_eq!(
        keys(&received),
        [
            "event",
            "name",
            "path",
            "generation",
            "layout",
            "base",
            "completeness",
            "unchanged",
            "image_bytes",
            "notes"
        ]
    );
    assert_eq!(received["layout"], "faithful");
    assert_eq!(
        received["path"],
        json!(sandbox.path("recv/memcached").canonicalize().unwrap())
    );
}

#[test]
fn an_incremental_chain_leaves_pages_to_its_base() {
    let (sandbox, _recv, received) = send_chain("incremental");
    assert!(sandbox.path("recv/memcached/parent").is_symlink());
    assert_eq!(received["base"].as_str().map(|base| &base[..1]), Some("#"));
}

#[test]
fn a_flat_chain_has_no_parent() {
    let (sandbox, _recv, received) = send_chain("flat");
    assert!(!sandbox.path("recv/memcached/parent").is_symlink());
    assert!(received["base"].is_null());
}

#[test]
fn json_has_the_documented_shape() {
    let sandbox = Sandbox::new();
    let (_recv, listening) = sandbox.recv(&[]).listening();
    assert_eq!(
        keys(&listening),
        ["event", "ticket", "addresses", "fingerprint"]
    );
    let ticket = listening["ticket"].as_str().unwrap();
    let sent = sandbox.send(&fixture("memcached/1"), ticket, &[]);
    let events = sent.events();
    assert_eq!(keys(&events[0]), ["event", "name", "bytes", "ancestor"]);
    assert_eq!(
        keys(&events[1]),
        ["event", "name", "done", "total", "wire", "bytes_per_second"]
    );
    let done = sent.done();
    assert_eq!(
        keys(&done),
        [
            "event",
            "name",
            "generation",
            "completeness",
            "layout",
            "base",
            "unchanged",
            "ancestors",
            "files",
            "pages",
            "bytes",
            "seconds",
            "bytes_per_second",
            "notes"
        ]
    );
    let kinds = ["total", "zero", "known", "duplicate", "compressed", "raw"];
    assert_eq!(keys(&done["pages"]), kinds);
    let count = |kind: &str| done["pages"][kind].as_u64().unwrap();
    assert_eq!(
        count("total"),
        kinds[1..].iter().map(|kind| count(kind)).sum::<u64>()
    );
    assert_eq!(keys(&done["bytes"]), ["image", "sent", "received"]);
    assert_eq!(
        (&done["name"], &done["generation"]),
        (&json!("1"), &json!(1))
    );
    assert_eq!(done["base"], Value::Null);
}

#[test]
fn what_did_not_change_is_not_sent_again() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    let source = fixture("memcached/1");
    let first = sandbox.send(&source, &ticket, &[]).done();
    let second = sandbox.send(&source, &ticket, &[]).done();
    assert_eq!(first["unchanged"], false);
    assert_eq!(
        (&second["unchanged"], &second["generation"]),
        (&json!(true), &json!(1))
    );
    let crossed = |done: &Value| {
        done["bytes"]["sent"].as_u64().unwrap() + done["bytes"]["received"].as_u64().unwrap()
    };
    assert!(crossed(&second) * 10 < crossed(&first), "{second}");
    let text = sandbox.run(&["send", source.to_str().unwrap(), "--to", &ticket]);
    assert!(
        text.stdout.starts_with("unchanged: 1 generation 1"),
        "{text:?}"
    );
    assert!(text.stdout.contains("on the wire"), "{text:?}");
}

#[test]
fn once_ends_after_one_set_and_the_ticket_file_is_private() {
    let sandbox = Sandbox::new();
    let (recv, ticket) = sandbox
        .recv(&["--once", "--ticket-file", "ticket"])
        .ticket();
    let file = sandbox.path("ticket");
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), ticket);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let sent = sandbox.send(&fixture("memcached/1"), "@ticket", &["--name", "one"]);
    assert_eq!(sent.done()["name"], "one");
    assert_eq!(recv.ended().code, Some(0));
    assert_eq!(published(&sandbox.path("recv")), ["one"]);
}

#[test]
fn without_json_the_ticket_stands_alone_on_stdout() {
    let sandbox = Sandbox::new();
    let args = [
        "recv",
        "--dir",
        "recv",
        "--listen",
        "127.0.0.1:0",
        "--once",
        "--ticket-file",
        "t",
    ];
    let recv = Running::start(sandbox.command(&args));
    crate::sandbox::eventually(|| sandbox.path("t").exists());
    sandbox.send(&fixture("memcached/1"), "@t", &[]).done();
    let ended = recv.ended();
    let lines: Vec<_> = ended.stdout.lines().collect();
    assert_eq!(
        lines[0],
        fs::read_to_string(sandbox.path("t")).unwrap().trim()
    );
    assert!(lines[1].starts_with("received 1: "), "{ended:?}");
    assert_eq!(lines.len(), 2);
}

#[test]
fn pinned_hosts_need_no_ticket_and_strangers_stay_out() {
    let sandbox = Sandbox::new();
    let keygen = |name: &str| sandbox.run(&["keygen", name]).stdout.trim().to_owned();
    let (source, destination) = (keygen("source.pem"), keygen("destination.pem"));
    keygen("stranger.pem");
    let (_recv, listening) = sandbox
        .recv(&["--identity", "destination.pem", "--peer", &source])
        .listening();
    assert!(listening["ticket"].is_null());
    assert_eq!(listening["fingerprint"], json!(destination));
    let address = listening["addresses"][0].as_str().unwrap();
    let send = |key: &str, peer: &str| {
        let args = ["--identity", key, "--peer", peer];
        sandbox.send(&fixture("memcached/1"), address, &args)
    };
    send("source.pem", &destination).done();
    send("stranger.pem", &destination).refused(4, &["does not know this host's key"]);
    send("source.pem", &source).refused(4, &["another key"]);
}

#[test]
fn a_named_base_is_built_on() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&["--layout", "incremental"]).ticket();
    let source = fixture("memcached/1");
    sandbox.send(&source, &ticket, &["--name", "one"]).done();
    let done = sandbox
        .send(&source, &ticket, &["--name", "two", "--base", "one"])
        .done();
    assert_eq!(done["base"], "one");
    assert!(Path::new(&sandbox.path("recv/two/parent")).is_symlink());
}

#[test]
fn a_copy_that_rotted_at_the_destination_is_sent_again() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    let source = fixture("memcached/1");
    sandbox.send(&source, &ticket, &["--name", "one"]).done();
    let pages = sandbox.path("recv/one/pages-1.img");
    let mut bytes = fs::read(&pages).unwrap();
    let found = bytes.iter().position(|&byte| byte != 0).unwrap();
    bytes[found] ^= 1;
    // Its time stays, as when a disk does it.
    let modified = pages.metadata().unwrap().modified().unwrap();
    fs::write(&pages, bytes).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&pages).unwrap();
    file.set_modified(modified).unwrap();
    let sent = sandbox.send(&source, &ticket, &["--name", "two"]);
    sent.done();
    assert!(sent.stderr.contains("sending again"), "{sent:?}");
    assert_eq!(sandbox.run(&["verify", "recv/two"]).code, Some(0));
    assert_eq!(sandbox.run(&["verify", "recv/one"]).code, Some(3));
}
