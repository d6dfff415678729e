//! What a page costs on its way: compared with what the destination holds, and stored there.

#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use crxfer::delta::{Outgoing, Record};
use crxfer::image::PagemapName;
use crxfer::page::PageSize;
use crxfer::standby::Standby;
use crxfer::wire::{Codec, FrameHeader, StreamNote};
use crxfer_bench::pages::{Kind, Random, fill_pages};

/// Pages of the workload: 64 MiB, more than the caches hold.
const PAGES: usize = 16 << 10;
const PAGE: usize = 4096;

/// As the live reader hands them out.
const CHUNK: usize = 1 << 20;

const TASK: PagemapName = PagemapName::Task(7);

fn page_size() -> PageSize {
    PageSize::new(PAGE as u64).expect("a page size")
}

fn memory(seed: u64) -> Vec<u8> {
    let mut memory = vec![0; PAGES * PAGE];
    fill_pages(&mut memory, PAGE, Kind::Random, seed, 0);
    memory
}

/// Changes one page in a hundred.
fn write(memory: &mut [u8], random: &mut Random) {
    for _ in 0..PAGES / 100 {
        let at = random.below(PAGES) * PAGE;
        random.fill(&mut memory[at..at + 64]);
    }
}

fn iterate(outgoing: &mut Outgoing, number: u32, memory: &[u8], records: &mut Vec<Record>) {
    outgoing.begin(number, false, records);
    for (index, chunk) in memory.chunks(CHUNK).enumerate() {
        outgoing.pages(TASK, (index * CHUNK) as u64, chunk, records);
    }
    outgoing.end(records);
}

/// Source: pages a second, hashing included, with nothing, a hundredth, and all of it changed.
fn compare(c: &mut Criterion) {
    let mut group = c.benchmark_group("compare");
    group
        .throughput(Throughput::Elements(PAGES as u64))
        .measurement_time(Duration::from_secs(4))
        .sample_size(20);
    let mut memory = memory(1);
    let mut outgoing = Outgoing::new(page_size());
    let mut records = Vec::new();
    iterate(&mut outgoing, 1, &memory, &mut records);
    group.bench_function("unchanged", |b| {
        b.iter(|| {
            records.clear();
            iterate(&mut outgoing, 2, &memory, &mut records);
        });
    });
    let mut random = Random::new(2);
    group.bench_function("1_percent_changed", |b| {
        b.iter_custom(|times| {
            let mut took = Duration::ZERO;
            for _ in 0..times {
                write(&mut memory, &mut random);
                records.clear();
                let begun = Instant::now();
                iterate(&mut outgoing, 2, &memory, &mut records);
                took += begun.elapsed();
            }
            took
        });
    });
    group.bench_function("all_new", |b| {
        b.iter_custom(|times| {
            let mut took = Duration::ZERO;
            for _ in 0..times {
                let mut outgoing = Outgoing::new(page_size());
                records.clear();
                let begun = Instant::now();
                iterate(&mut outgoing, 1, &memory, &mut records);
                took += begun.elapsed();
            }
            took
        });
    });
    group.finish();
}

fn deliver(standby: &mut Standby, number: u32, records: Vec<Record>) {
    for record in records {
        match record {
            Record::Note(note) => {
                standby.note(note).expect("an honest stream");
            }
            Record::Frame(changes) => {
                let length = u32::try_from(changes.literal.len()).expect("a segment");
                let header = FrameHeader {
                    set: number,
                    file: changes.object,
                    segment: changes.segment,
                    codec: Codec::Raw,
                    ops_len: 8,
                    raw_len: length,
                    payload_len: length,
                };
                let payload = changes.literal.into();
                standby
                    .frame(&header, &changes.ops, payload)
                    .expect("an honest stream");
            }
        }
    }
}

/// Destination: pages a second that are hashed and written to memory, in whole segments, and as
/// copies of others.
fn store(c: &mut Criterion) {
    let mut group = c.benchmark_group("standby");
    group
        .throughput(Throughput::Elements(PAGES as u64))
        .measurement_time(Duration::from_secs(4))
        .sample_size(10);
    let noise = memory(1);
    let copies = noise[..PAGE].repeat(PAGES);
    for (name, memory) in [("new_pages", noise), ("copies", copies)] {
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let mut took = Duration::ZERO;
                for _ in 0..times {
                    let place = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
                    let root = place.path().join("m");
                    let mut standby = Standby::create(&root, page_size(), false).expect("new");
                    let mut outgoing = Outgoing::new(page_size());
                    let mut records = Vec::new();
                    iterate(&mut outgoing, 1, &memory, &mut records);
                    assert!(matches!(
                        records.last(),
                        Some(Record::Note(StreamNote::End { .. }))
                    ));
                    let begun = Instant::now();
                    deliver(&mut standby, 1, records);
                    took += begun.elapsed();
                }
                took
            });
        });
    }
    group.finish();
}

criterion_group!(benches, compare, store);
criterion_main!(benches);
