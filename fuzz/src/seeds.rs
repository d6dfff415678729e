//! Writes the first corpus: real images, one of each message, frames, tickets, an index.
//!
//! `cargo run --bin seeds` in this directory; fuzzing adds to it, `cargo fuzz cmin` thins it out.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use crxfer::delta::codec::{Compressor, Level};
use crxfer::delta::{BlockRef, FileMeta, FileName};
use crxfer::digest::Digest;
use crxfer::identity::Fingerprint;
use crxfer::page::PageSize;
use crxfer::preflight;
use crxfer::store::Index;
use crxfer::testing::fuzz::{journal_seeds, sample_messages, sample_notes, sample_steps, session_seeds, standby_seeds};
use crxfer::ticket::{Secret, Ticket};
use crxfer::wire::{Codec, FrameHeader, Message, Op, encode_ops};

type Done = Result<(), Box<dyn Error>>;

/// Larger images teach a fuzzer nothing that small ones do not.
const MOST_BYTES: usize = 4096;

fn main() -> Done {
    images()?;
    for (index, message) in sample_messages().iter().enumerate() {
        put("wire_message", &format!("message-{index:02}"), &message.encode())?;
    }
    frames()?;
    tickets()?;
    index()?;
    facts()?;
    page_streams()?;
    migrations()?;
    for (index, seed) in journal_seeds().iter().enumerate() {
        put("journal", &format!("seed-{index}"), seed)?;
    }
    sessions()
}

fn put(target: &str, name: &str, bytes: &[u8]) -> Done {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&directory)?;
    Ok(fs::write(directory.join(name), bytes)?)
}

fn images() -> Done {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lib/testdata");
    for path in files_below(&testdata)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = fs::read(&path)?;
        if bytes.len() > MOST_BYTES || name.starts_with("pages-") || name.ends_with(".json") || name.ends_with(".md") {
            continue;
        }
        let seed = Digest::of(&bytes).to_string();
        put("image_framing", &seed, &bytes)?;
        if name.starts_with("pagemap-") {
            put("pagemap", &seed, &[&[0], bytes.as_slice()].concat())?;
        }
        if name == "inventory.img" || name == "stats-dump" {
            put("inventory", &seed, &bytes)?;
        }
    }
    Ok(())
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files_below(&entry.path())?);
        } else if entry.file_type()?.is_file() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn frames() -> Done {
    let text = b"2024-05-01 worker 17 finished request 4711 in 12 ms\n".repeat(200);
    let packed = Compressor::new()?.compress(Level::One, &text)?;
    let at = BlockRef { file: 1, block: 9 };
    let all = [Op::Literal(3), Op::Zero(1), Op::Same(2, at), Op::Held(5)];
    for (name, ops, codec, raw_len, payload) in [
        ("raw", vec![Op::Literal(1)], Codec::Raw, 64, vec![7; 64]),
        ("zero", vec![Op::Zero(256)], Codec::Raw, 0, Vec::new()),
        ("zstd", all.to_vec(), Codec::Zstd, text.len(), packed),
    ] {
        let ops = encode_ops(&ops);
        let header = FrameHeader {
            set: 1,
            file: 0,
            segment: 2,
            codec,
            ops_len: u32::try_from(ops.len())?,
            raw_len: u32::try_from(raw_len)?,
            payload_len: u32::try_from(payload.len())?,
        };
        put("page_frame", name, &[&header.encode(), ops.as_slice(), &payload].concat())?;
    }
    Ok(())
}

fn tickets() -> Done {
    let fingerprint = Fingerprint([3; 32]);
    let addresses = vec!["192.0.2.7:4433".parse()?, "[2001:db8::1]:4433".parse()?];
    let ticket = Ticket::new(addresses, fingerprint, Secret::from_bytes([5; 32]))?;
    put("ticket", "word", ticket.to_string().as_bytes())?;
    put("ticket", "fingerprint", fingerprint.to_string().as_bytes())?;
    // The target itself puts prefix and checksum around a payload.
    let payload = [&[1, 4, 192, 0, 2, 7, 17, 81], [3; 64].as_slice()].concat();
    put("ticket", "payload", &payload)
}

/// Sessions of a dumping CRIU in both header layouts, without page data.
fn page_streams() -> Done {
    let (task, shared) = (171 << 8 | 1, 14 << 8 | 2);
    let (present, parent) = (6 | 6 << 16, 6 | 1 << 16);
    let dump = [
        (4, 0, 0, shared),
        (6 | 4 << 16, 3, 0, shared),
        (4, 0, 0, task),
        (present, 300, 0x55_0000, task),
        (parent, 40, 0x7f00_0000, task),
        (0x1024, 0, 0, 0),
    ];
    let pre_dump = [(5, 0, 0, task), (4, 0, 0, task), (parent, 9, 0x55_0000, task), (0x1023, 0, 0, 0)];
    let oldest = [(3, 0, 0, task), (1, 2, 0x55_0000, task), (2, 2, 0x66_0000, task), (0x1023, 0, 0, 0)];
    for (name, session) in [("dump", &dump[..]), ("pre-dump", &pre_dump), ("oldest", &oldest)] {
        for new in [false, true] {
            let mut bytes = vec![0];
            for &(command, pages, vaddr, id) in session {
                bytes.extend(u32::to_ne_bytes(command));
                match new {
                    false => bytes.extend(u32::to_ne_bytes(pages)),
                    true => bytes.extend([&[0xfe, 0x7f, 0, 0][..], &u64::from(pages).to_ne_bytes()].concat()),
                }
                bytes.extend(u64::to_ne_bytes(vaddr));
                bytes.extend(u64::to_ne_bytes(id));
            }
            let layout = if new { "new" } else { "old" };
            put("page_stream", &format!("{name}-{layout}"), &bytes)?;
        }
    }
    Ok(())
}

fn sessions() -> Done {
    for (name, operations) in session_seeds() {
        put("session", name, &operations)?;
    }
    Ok(())
}

fn migrations() -> Done {
    for (index, note) in sample_notes().iter().enumerate() {
        // Without its byte and its length.
        put("stream_note", &format!("note-{index:02}"), &note.encode()[5..])?;
    }
    for (index, step) in sample_steps().into_iter().enumerate() {
        put("stream_note", &format!("step-{index:02}"), &Message::Migration(step).encode())?;
    }
    for (name, records) in standby_seeds() {
        put("standby", name, &records)?;
    }
    Ok(())
}

fn facts() -> Done {
    put("preflight", "facts", &preflight::sample().encode())?;
    put("preflight", "no-facts", &preflight::Facts::default().encode())?;
    put("preflight", "checks", &preflight::encode_checks(&preflight::sample_checks()))
}

fn index() -> Done {
    let page_size = PageSize::new(4096)?;
    let file = |name, size| Ok::<_, Box<dyn Error>>(FileMeta::new(FileName::new(name)?, 0o644, size, page_size));
    let files = [file("core-1.img", 700)?, file("empty", 0)?, file("pages-1.img", 5 * 4096)?];
    let blocks = files.iter().map(FileMeta::blocks).sum::<u64>();
    let digests = (0..blocks).map(|block| Digest::of(&block.to_le_bytes()));
    let path = std::env::temp_dir().join(format!("crxfer-seed-{}", std::process::id()));
    Index::write(&path, &files, digests, false)?;
    let bytes = fs::read(&path)?;
    fs::remove_file(&path)?;
    put("store_index", "three-files", &bytes)?;
    put("store_index", "cut", &bytes[..bytes.len() - 4])?;
    put("store_index", "magic", &bytes[..8])
}
