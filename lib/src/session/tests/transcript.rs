//! The exact bytes of one short session, as docs/PROTOCOL.md shows them.

use std::fmt::Write as _;
use std::time::Duration;

use super::*;
use crate::testing::{Conditions, Side, World, take_frame};

const TRANSCRIPT: &str = include_str!("../../../testdata/session/minimal.txt");

fn hex(out: &mut String, bytes: &[u8]) {
    for line in bytes.chunks(16) {
        out.push_str("   ");
        for byte in line {
            write!(out, " {byte:02x}").expect("strings take everything");
        }
        out.push('\n');
    }
}

// One file of five bytes, to a destination that has nothing.
fn transcript() -> String {
    let files = vec![("core-1.img".to_owned(), b"hello".to_vec())];
    let set = MemorySet::new("1", 4096, files);
    let conditions = Conditions {
        jitter: Duration::ZERO,
        work: Duration::ZERO,
        compress: false,
        streams: 1,
        ..Conditions::new(1)
    };
    let mut out = String::new();
    let world = World::new(
        conditions,
        std::slice::from_ref(&set),
        MemoryStore::default(),
    );
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
    assert_published(&outcome.store, &[set], "transcript");
    out
}

/// Bytes that change here change for every peer: that takes a new protocol version.
#[test]
fn a_session_has_the_documented_bytes() {
    let found = transcript();
    let documented: String = TRANSCRIPT
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| [line, "\n"])
        .collect();
    if found != documented {
        println!("{found}");
    }
    assert!(found == documented, "the session's bytes have changed");
}
