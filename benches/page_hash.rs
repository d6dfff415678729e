//! Page digests against BLAKE3's own rate on long inputs, one core.
//!
//! Measured on an AMD EPYC with AVX-512 (2 shared cores), 64 MiB of random pages, medians of 31
//! rounds in which all variants take turns, as `cargo bench --bench page_hash` prints them first:
//!
//! | block | batched / long input | batched / one by one |
//! |---|---|---|
//! | 4 KiB | 1.10 | 2.1 |
//! | 16 KiB | 1.13 | 1.2 |
//! | 64 KiB | 1.13 | 1.1 |
//!
//! The long input is `blake3::hash` of 1 MiB at a time, 4.6 GB/s in that run. Batches exceed it
//! because the lanes read from places a block apart, which the processor prefetches better.

#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crxfer::digest::{Digest, hash_blocks, is_zero};
use crxfer_bench::pages::{Kind, fill_pages};

/// Bytes of one round: larger than the caches of a core, like the pages files that are hashed.
const INPUT_LEN: usize = 64 << 20;

/// What the engine hands over at once.
const CALL_LEN: usize = 1 << 20;

/// Where the input begins within a page: mapped files at 0, frames after their header elsewhere.
const OFFSETS: [usize; 2] = [0, 24];

const BLOCK_LENS: [usize; 3] = [4096, 16384, 65536];

fn input() -> Vec<u8> {
    let mut data = vec![0; INPUT_LEN + 4096];
    fill_pages(&mut data, 4096, Kind::Random, 1, 0);
    data
}

fn long_input(data: &[u8]) {
    for call in data.chunks(CALL_LEN) {
        black_box(blake3::hash(call));
    }
}

fn batched(data: &[u8], block_len: usize) {
    let mut digests = Vec::with_capacity(CALL_LEN / block_len);
    for call in data.chunks(CALL_LEN) {
        digests.clear();
        hash_blocks(call, block_len, &mut digests);
        black_box(&digests);
    }
}

fn one_by_one(data: &[u8], block_len: usize) {
    for block in data.chunks(block_len) {
        black_box(Digest::of(block));
    }
}

fn page_hash(c: &mut Criterion) {
    let data = input();
    let mut group = c.benchmark_group("page_hash");
    group.throughput(Throughput::Bytes(INPUT_LEN as u64));
    group
        .measurement_time(Duration::from_secs(3))
        .sample_size(20);
    for offset in OFFSETS {
        let input = &data[offset..][..INPUT_LEN];
        group.bench_function(BenchmarkId::new("long_input", offset), |b| {
            b.iter(|| long_input(input));
        });
        for block_len in BLOCK_LENS {
            let name = format!("{}K/{offset}", block_len >> 10);
            group.bench_function(BenchmarkId::new("batched", &name), |b| {
                b.iter(|| batched(input, block_len));
            });
            group.bench_function(BenchmarkId::new("one_by_one", &name), |b| {
                b.iter(|| one_by_one(input, block_len));
            });
        }
    }
    group.finish();
}

fn zero_check(c: &mut Criterion) {
    // Written, or every page of it would be the kernel's one page of zeros.
    let mut data = input();
    data.fill(0);
    let mut group = c.benchmark_group("is_zero");
    group
        .throughput(Throughput::Bytes(INPUT_LEN as u64))
        .sample_size(20);
    group.bench_function("zero_pages", |b| {
        b.iter(|| {
            data[..INPUT_LEN]
                .chunks(4096)
                .filter(|page| is_zero(page))
                .count()
        });
    });
    group.finish();
}

/// The figures that matter are ratios, and neighbours on the machine come and go: so all variants
/// take turns in each round, and the medians of the rounds are compared.
fn print_ratios(_: &mut Criterion) {
    const ROUNDS: usize = 31;
    // Cargo passes --bench for `cargo bench` only; under `cargo test` everything runs once.
    let has = |flag: &str| std::env::args().any(|arg| arg == flag);
    if !has("--bench") || has("--list") || has("--test") {
        return;
    }
    let data = input();
    for offset in OFFSETS {
        let input = &data[offset..][..INPUT_LEN];
        let mut rounds: [Vec<Duration>; 7] = Default::default();
        for _ in 0..ROUNDS {
            rounds[0].push(time(|| long_input(input)));
            for (i, block_len) in BLOCK_LENS.into_iter().enumerate() {
                rounds[1 + 2 * i].push(time(|| batched(input, block_len)));
                rounds[2 + 2 * i].push(time(|| one_by_one(input, block_len)));
            }
        }
        let medians = rounds.map(median);
        let rate = |took: f64| INPUT_LEN as f64 / took / 1e9;
        println!("offset {offset}: long input {:.2} GB/s", rate(medians[0]));
        for (i, block_len) in BLOCK_LENS.into_iter().enumerate() {
            let (batched, single) = (medians[1 + 2 * i], medians[2 + 2 * i]);
            println!(
                "  {:2} KiB blocks: batched {:.2} of long input, {:.2} times one by one",
                block_len >> 10,
                medians[0] / batched,
                single / batched,
            );
        }
    }
}

fn time(run: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    run();
    begin.elapsed()
}

fn median(mut rounds: Vec<Duration>) -> f64 {
    rounds.sort();
    rounds[rounds.len() / 2].as_secs_f64()
}

criterion_group!(benches, print_ratios, page_hash, zero_check);
criterion_main!(benches);
