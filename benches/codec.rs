//! Packing and unpacking of page frames, one core.

use std::hint::black_box;
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
    let mut policy = CodecPolicy::new(1);
    let on_link = Duration::from_secs_f64(FRAME_LEN as f64 / 640e6);
    let begin = Instant::now();
    let mut group = c.benchmark_group("policy");
    group.bench_function("noise_frame_640MB/s", |b| {
        b.iter(|| {
            let packed = pack(&mut policy, &mut compressor, &frame, || begin.elapsed());
            policy.on_sent(Sent {
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
