//! The exact bytes of one short session, as docs/PROTOCOL.md shows them.

use std::fmt::Write as _;
use std::time::Duration;

use super::*;
use crate::testing::{Conditions, Side, World, take_frame, transfer};

const MINIMAL: &str = include_str!("../../../testdata/session/minimal.txt");
const ASKING: &str = include_str!("../../../testdata/session/asking.txt");

fn hex(out: &mut String, bytes: &[u8]) {
    for line in bytes.chunks(16) {
        out.push_str("   ");
        for byte in line {
            write!(out, " {byte:02x}").expect("strings take everything");
        }
        out.push('\n');
    }
}

fn transcript(set: &MemorySet, store: MemoryStore) -> String {
    let conditions = Conditions {
        jitter: Duration::ZERO,
        work: Duration::ZERO,
        compress: false,
        streams: 1,
        ..Conditions::new(1)
    };
    let mut out = String::new();
    let world = World::new(conditions, std::slice::from_ref(set), store);
    let recorded = world.with_tamper(|unit| {
        let from = match unit.from {
            Side::Source => "source",
            Side::Destination => "destination",
        };
        match unit.message() {
            Some(message) => {
                writeln!(out, "{from}, control: {message:?}").expect("strings take everything");
                hex(&mut out, &unit.bytes[..4]);
                hex(&mut out, &unit.bytes[4..]);
            }
            None => {
                let frame = take_frame(&mut unit.bytes.clone()).unwrap();
                let (header, ops, payload) = frame.expect("a whole frame");
                writeln!(out, "{from}, stream: {header:?}, {ops:?}").expect("takes everything");
                let (fixed, rest) = unit.bytes.split_at(crate::wire::HEADER_LEN);
                let (described, literal) = rest.split_at(rest.len() - payload.len());
                for part in [fixed, described, literal] {
                    hex(&mut out, part);
                }
            }
        }
    });
    let outcome = recorded.run();
    assert_published(&outcome.store, std::slice::from_ref(set), "transcript");
    out
}

/// Bytes that change here change for every peer: that takes a new protocol version.
#[track_caller]
fn assert_documented(found: &str, documented: &str) {
    let lines = documented.lines().filter(|line| !line.starts_with('#'));
    let documented: String = lines.flat_map(|line| [line, "\n"]).collect();
    if found != documented {
        println!("{found}");
    }
    assert!(found == documented, "the session's bytes have changed");
}

#[test]
fn a_session_has_the_documented_bytes() {
    let files = vec![("core-1.img".to_owned(), b"hello".to_vec())];
    let set = MemorySet::new("1", 4096, files);
    let found = transcript(&set, MemoryStore::default());
    assert_documented(&found, MINIMAL);
}

#[test]
fn a_session_that_asks_has_the_documented_bytes() {
    let page = |byte: u8| vec![byte; 4096];
    let set = |name, last: &[u8]| {
        let pages = [&page(0), &page(1), &page(2), &page(2), last].concat();
        MemorySet::new(name, 4096, vec![("pages-1.img".to_owned(), pages)])
    };
    let known = transfer(
        Conditions::new(1),
        &[set("1", b"before")],
        MemoryStore::default(),
    );
    let found = transcript(&set("2", b"after"), known.store);
    assert_documented(&found, ASKING);
}
