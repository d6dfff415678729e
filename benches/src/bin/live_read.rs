//! Reads a running process tree again and again and says how fast: `live_read PID [PASSES
//! [MB_PER_S [PAUSE_MS]]]`. `LIVE_METHOD=pagemap` forces the way of kernels before 6.7.

use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;

use crxfer::live::{LiveReader, Method, ReaderOptions};
use crxfer::page::PageSize;

fn main() {
    let numbers: Vec<u64> = std::env::args()
        .skip(1)
        .map(|argument| argument.parse().expect("a number"))
        .collect();
    let given = |index: usize| numbers.get(index).copied();
    let root = given(0).and_then(|pid| u32::try_from(pid).ok());
    let fallback = std::env::var("LIVE_METHOD").is_ok_and(|method| method == "pagemap");
    let options = ReaderOptions {
        bytes_per_s: given(2)
            .filter(|&rate| rate > 0)
            .map(|rate| rate * 1_000_000),
        method: fallback.then_some(Method::Pagemap),
        ..ReaderOptions::default()
    };
    let root = root.expect("usage: live_read PID [PASSES [MB_PER_S [PAUSE_MS]]]");
    let mut reader = LiveReader::new(root, PageSize::of_host(), options).expect("a process");
    for _ in 0..given(1).unwrap_or(5) {
        let pass = reader
            .pass(&mut |_| ControlFlow::Continue(()))
            .expect("a pass");
        println!(
            "{:?}: {} spaces, {} pages, {:.3} s, {:.2} GB/s, waited {:.3} s, {} vanished, {} skipped",
            reader.method(),
            pass.spaces.len(),
            pass.pages,
            pass.took.as_secs_f64(),
            pass.bytes as f64 / pass.took.as_secs_f64() / 1e9,
            pass.waited.as_secs_f64(),
            pass.vanished,
            pass.skipped.len(),
        );
        thread::sleep(Duration::from_millis(given(3).unwrap_or(0)));
    }
}
