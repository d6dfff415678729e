//! Packing and unpacking of page frames, one core.
//!
//! Measured on an AMD EPYC (2 shared cores), frames of 1 MiB in 4 KiB pages, medians of one run;
//! rates as multiples of level 1 on words (`Text`, 0.22 GB/s), and what is left of the frame:
//!
//! | pages | level 1 | left | level 3 | left | unpacking |
//! |---|---|---|---|---|---|
//! | random | 39 | 1.00 | 21 | 1.00 | 51 |
//! | text | 1 | 0.36 | 0.64 | 0.34 | 4.3 |
//! | mostly zero | 11 | 0.03 | 8.8 | 0.03 | 39 |
//! | mixed | 3.1 | 0.36 | 1.8 | 0.35 | 8.6 |
//!
//! zstd sees quickly that noise is noise, so trying costs little; words cost forty times as much,
//! which is why the policy judges speed as well as saving by the data at hand. Deciding takes 10 µs
//! for a frame of noise that a link of 640 MB/s carries in 1.6 ms.

#![expect(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crxfer::delta::codec::{CodecPolicy, Compressor, Decompressor, Level, Sent, pack};
use crxfer_bench::pages::{Kind, fill_pages};

/// Bytes of a frame.
const FRAME_LEN: usize = 1 << 20;

const KINDS: [Kind; 4] = [Kind::Random, Kind::Text, Kind::MostlyZero, Kind::Mixed];

fn frame(kind: Kind) -> Vec<u8> {
    let mut frame = vec![0; FRAME_LEN];
    fill_pages(&mut frame, 4096, kind, 1, 0);
    frame
}

fn zstd(c: &mut Criterion) {
    let mut compressor = Compressor::new().expect("zstd");
    let mut decompressor = Decompressor::new().expect("zstd");
    let mut group = c.benchmark_group("codec");
    group
        .throughput(Throughput::Bytes(FRAME_LEN as u64))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);
    for kind in KINDS {
        let frame = frame(kind);
        for level in [Level::One, Level::Three] {
            let mut out = Vec::new();
            let name = BenchmarkId::new(format!("compress_{level:?}"), format!("{kind:?}"));
            group.bench_function(name, |b| {
                b.iter(|| compressor.compress_into(level, &frame, &mut out));
            });
            println!(
                "left of the frame: {:.3}",
                out.len() as f64 / FRAME_LEN as f64
            );
        }
        let packed = compressor.compress(Level::One, &frame).expect("zstd");
        let name = BenchmarkId::new("decompress", format!("{kind:?}"));
        group.bench_function(name, |b| {
            b.iter(|| black_box(decompressor.decompress(&packed, FRAME_LEN)));
        });
    }
    group.finish();
}

/// What deciding costs where nothing is to gain: noise on a link of 640 MB/s.
fn policy(c: &mut Criterion) {
    let frame = frame(Kind::Random);
    let mut compressor = Compressor::new().expect("zstd");
    let policy = Mutex::new(CodecPolicy::new(1));
    let on_link = Duration::from_secs_f64(FRAME_LEN as f64 / 640e6);
    let begin = Instant::now();
    let mut group = c.benchmark_group("policy");
    group.bench_function("noise_frame_640MB/s", |b| {
        b.iter(|| {
            let packed = pack(&policy, &mut compressor, &frame, || begin.elapsed());
            policy.lock().expect("nothing panics").on_sent(Sent {
                bytes: FRAME_LEN as u64,
                waited: on_link,
                interval: on_link,
            });
            packed.expect("zstd").is_none()
        });
    });
    group.finish();
}

criterion_group!(benches, zstd, policy);
criterion_main!(benches);
