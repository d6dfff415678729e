#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| crxfer::testing::fuzz::streamer(data));
