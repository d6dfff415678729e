//! Packing of page frames: raw or zstd, whichever gets them across sooner.
//!
//! [`CodecPolicy`] decides for each frame from what was measured on this link and this CPU;
//! [`Compressor`] and [`Decompressor`] keep zstd's working memory from frame to frame; [`pack`]
//! joins the two for a caller that has a clock. Nothing here does I/O or reads time by itself.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use zstd::zstd_safe;

mod policy;

pub use policy::{CodecPolicy, Compressed, Sent, Step};

/// How hard zstd tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// zstd level 1: the fastest that still finds repetitions at a distance.
    One,
    /// zstd level 3: half to two thirds of the speed for some 5 % less; for links of some MB/s.
    Three,
}

impl Level {
    fn zstd_level(self) -> i32 {
        match self {
            Self::One => 1,
            Self::Three => 3,
        }
    }
}

/// Why a frame could not be compressed: zstd had no memory, or a fault of ours.
#[derive(Debug, thiserror::Error)]
#[error("zstd could not compress a frame of {len} bytes; it can be sent raw")]
pub struct CompressError {
    /// Length of the frame.
    pub len: usize,
    #[source]
    source: io::Error,
}

/// Why a compressed frame is not what its header says.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// The bytes do not begin with a zstd frame that states its length, or more follows after it.
    #[error("payload of {len} bytes is not exactly one zstd frame of stated length")]
    NotOneFrame {
        /// Length of the payload.
        len: usize,
    },
    /// The zstd frame is for another length than was announced.
    #[error("payload unpacks to {stated} bytes, announced were {expected}")]
    WrongLength {
        /// Length announced, which the caller has bounded.
        expected: usize,
        /// Length the zstd frame states.
        stated: u64,
    },
    /// No memory for the announced length.
    #[error("no memory to unpack {expected} bytes")]
    NoMemory {
        /// Length announced.
        expected: usize,
    },
    /// Damaged inside.
    #[error("payload of {len} bytes is damaged: zstd refuses it")]
    Damaged {
        /// Length of the payload.
        len: usize,
        /// What zstd says.
        #[source]
        source: io::Error,
    },
}

/// A zstd compressor that is used for frame after frame.
pub struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    level: Level,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl Compressor {
    /// A compressor; its working memory (some 600 KiB at level 1) comes with the first frame.
    pub fn new() -> Result<Self, CompressError> {
        let level = Level::One;
        let zstd = zstd::bulk::Compressor::new(level.zstd_level())
            .map_err(|source| CompressError { len: 0, source })?;
        Ok(Self { zstd, level })
    }

    /// One zstd frame that states its length, for `data`.
    pub fn compress(&mut self, level: Level, data: &[u8]) -> Result<Vec<u8>, CompressError> {
        let mut out = Vec::new();
        self.compress_into(level, data, &mut out)?;
        Ok(out)
    }

    /// As [`Compressor::compress`], in place of what `out` held.
    pub fn compress_into(
        &mut self,
        level: Level,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), CompressError> {
        let fault = |source| CompressError {
            len: data.len(),
            source,
        };
        if self.level != level {
            self.zstd
                .set_compression_level(level.zstd_level())
                .map_err(fault)?;
            self.level = level;
        }
        out.clear();
        out.reserve(zstd_safe::compress_bound(data.len()));
        self.zstd.compress_to_buffer(data, out).map_err(fault)?;
        Ok(())
    }
}

/// A zstd decompressor that is used for frame after frame, from peers that are not trusted.
pub struct Decompressor {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

impl Decompressor {
    /// A decompressor.
    pub fn new() -> Result<Self, DecompressError> {
        let zstd = zstd::bulk::Decompressor::new()
            .map_err(|source| DecompressError::Damaged { len: 0, source })?;
        Ok(Self { zstd })
    }

    /// The `expected_len` bytes that `data` stands for: exactly one zstd frame, of that length.
    ///
    /// `expected_len` is what the peer announced and the caller has held against its limit: it is
    /// the most that is allocated, and only once the frame itself states the same length.
    pub fn decompress(
        &mut self,
        data: &[u8],
        expected_len: usize,
    ) -> Result<Vec<u8>, DecompressError> {
        check_frame(data, expected_len)?;
        let mut out = Vec::new();
        out.try_reserve_exact(expected_len)
            .map_err(|_| DecompressError::NoMemory {
                expected: expected_len,
            })?;
        let damaged = |source| DecompressError::Damaged {
            len: data.len(),
            source,
        };
        self.zstd
            .decompress_to_buffer(data, &mut out)
            .map_err(damaged)?;
        if out.len() != expected_len {
            return Err(DecompressError::WrongLength {
                expected: expected_len,
                stated: out.len() as u64,
            });
        }
        Ok(out)
    }
}

/// Refuses what could unpack to another length, from the header alone.
fn check_frame(data: &[u8], expected_len: usize) -> Result<(), DecompressError> {
    let not_one_frame = DecompressError::NotOneFrame { len: data.len() };
    let Ok(Some(stated)) = zstd_safe::get_frame_content_size(data) else {
        return Err(not_one_frame);
    };
    if zstd_safe::find_frame_compressed_size(data) != Ok(data.len()) {
        return Err(not_one_frame);
    }
    if stated != expected_len as u64 {
        return Err(DecompressError::WrongLength {
            expected: expected_len,
            stated,
        });
    }
    Ok(())
}

/// Packs one frame as `policy` decides: its zstd form, or `None` to send `data` as it is.
///
/// Several threads may pack side by side: the policy is locked only while it decides. `clock` gives
/// time since any fixed moment; it is asked around each use of zstd. Report the sending with
/// [`CodecPolicy::on_sent`] afterwards.
pub fn pack(
    policy: &Mutex<CodecPolicy>,
    compressor: &mut Compressor,
    data: &[u8],
    mut clock: impl FnMut() -> Duration,
) -> Result<Option<Vec<u8>>, CompressError> {
    let decide = || policy.lock().unwrap_or_else(PoisonError::into_inner);
    let mut timed = |level, input: &[u8]| {
        let begin = clock();
        let packed = compressor.compress(level, input)?;
        let result = Compressed {
            level,
            input: input.len(),
            output: packed.len(),
            took: clock().saturating_sub(begin),
        };
        Ok((packed, result))
    };
    let mut step = decide().next_frame(data.len());
    while let Step::Probe { level, bytes } = step {
        let (packed, result) = timed(level, &data[..bytes])?;
        step = decide().on_probed(result);
        if step == Step::Compress(level) && bytes == data.len() {
            return Ok(policy::is_smaller(&result).then_some(packed));
        }
    }
    let Step::Compress(level) = step else {
        return Ok(None);
    };
    let (packed, result) = timed(level, data)?;
    Ok(decide().on_compressed(result).then_some(packed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(len: usize) -> Vec<u8> {
        let line = b"2024-05-01 worker 17 finished request 4711 in 12 ms\n";
        line.iter().copied().cycle().take(len).collect()
    }

    fn packed(data: &[u8]) -> Vec<u8> {
        let mut compressor = Compressor::new().unwrap();
        compressor.compress(Level::One, data).unwrap()
    }

    #[test]
    fn frames_come_back_at_every_level() {
        let mut compressor = Compressor::new().unwrap();
        let mut decompressor = Decompressor::new().unwrap();
        for level in [Level::One, Level::Three, Level::One] {
            for len in [0, 1, 4096, 300_000] {
                let data = text(len);
                let packed = compressor.compress(level, &data).unwrap();
                assert_eq!(decompressor.decompress(&packed, len).unwrap(), data);
            }
        }
    }

    #[test]
    fn other_lengths_than_announced_are_refused() {
        let packed = packed(&text(5000));
        let mut decompressor = Decompressor::new().unwrap();
        for announced in [0, 4999, 5001, usize::MAX] {
            let refused = decompressor.decompress(&packed, announced).unwrap_err();
            assert!(
                matches!(refused, DecompressError::WrongLength { expected, stated: 5000 } if expected == announced),
                "{refused}"
            );
        }
    }

    #[test]
    fn cut_or_lengthened_frames_are_refused() {
        let packed = packed(&text(5000));
        let mut decompressor = Decompressor::new().unwrap();
        for len in 0..packed.len() {
            decompressor.decompress(&packed[..len], 5000).unwrap_err();
        }
        for tail in [&b"\0"[..], &packed, b"\x50\x2a\x4d\x18\0\0\0\0"] {
            let refused = decompressor.decompress(&[&packed, tail].concat(), 5000);
            assert!(matches!(refused, Err(DecompressError::NotOneFrame { .. })));
        }
        assert_eq!(
            decompressor.decompress(&packed, 5000).unwrap(),
            text(5000),
            "usable after errors"
        );
    }

    #[test]
    fn flipped_bits_never_panic_and_never_change_the_length() {
        let data = text(3000);
        let good = packed(&data);
        let mut decompressor = Decompressor::new().unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            if let Ok(out) = decompressor.decompress(&bad, data.len()) {
                assert_eq!(out.len(), data.len());
            }
        }
    }

    #[test]
    fn absurd_length_on_both_sides_is_an_error() {
        // A frame header that states 2^62 bytes: magic, single segment with 8-byte size, one
        // empty last block.
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0b1110_0000];
        frame.extend((1_u64 << 62).to_le_bytes());
        frame.extend([1, 0, 0]);
        let mut decompressor = Decompressor::new().unwrap();
        let refused = decompressor.decompress(&frame, 1 << 62).unwrap_err();
        assert!(
            matches!(refused, DecompressError::NoMemory { .. }),
            "{refused}"
        );
    }

    #[test]
    fn pack_sends_text_packed_and_noise_raw_on_a_slow_link() {
        let mut compressor = Compressor::new().unwrap();
        let policy = Mutex::new(CodecPolicy::new(1));
        policy.lock().unwrap().assume_link(1e6);
        let mut now = Duration::ZERO;
        let mut clock = || {
            now += Duration::from_micros(100);
            now
        };
        let text = text(200_000);
        let packed = pack(&policy, &mut compressor, &text, &mut clock).unwrap();
        assert!(packed.is_some_and(|packed| packed.len() < 20_000));

        let mut noise = vec![0; 200_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for len in [200_000, 4096] {
            let packed = pack(&policy, &mut compressor, &noise[..len], &mut clock).unwrap();
            assert!(packed.is_none(), "{len} bytes of noise");
        }
    }
}
