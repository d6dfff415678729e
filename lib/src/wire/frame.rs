//! Frames of blocks on the unidirectional streams.
//!
//! ```text
//! 0      4      8              16     17          20       24         28           32
//! | set  | file | segment      | codec| 0    | ops len     | raw len  | payload len | ops … | payload …
//! ```
//! All numbers are little-endian. `ops len` is the length of the ops in bytes, `raw len` is the length of the literal blocks, `payload len` that
//! of what carries them (equal where the codec is raw). Each op is 8 or 20 bytes.

use crate::delta::BlockRef;
use crate::wire::limits;

/// Length of the fixed part of a frame.
pub const HEADER_LEN: usize = 32;

/// How the literal blocks of a frame are carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// What consecutive blocks of the segment are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The next blocks of the payload.
    Literal(u32),
    /// Zero bytes.
    Zero(u32),
    /// The blocks from this one on, which this session sends as literal blocks.
    Same(u32, BlockRef),
    /// Not sent, because the destination said that it has them.
    Held(u32),
}

impl Op {
    /// How many blocks it stands for.
    pub fn blocks(&self) -> u32 {
        match *self {
            Self::Literal(count) | Self::Zero(count) | Self::Same(count, _) | Self::Held(count) => {
                count
            }
        }
    }

    /// Appends one more block to `ops`, extending the last op where it continues it.
    pub fn push(ops: &mut Vec<Op>, next: Op) {
        match (ops.last_mut(), next) {
            (Some(Op::Literal(count)), Op::Literal(more))
            | (Some(Op::Zero(count)), Op::Zero(more))
            | (Some(Op::Held(count)), Op::Held(more)) => *count += more,
            (Some(Op::Same(count, from)), Op::Same(more, at))
                if from.file == at.file && from.block + u64::from(*count) == at.block =>
            {
                *count += more;
            }
            _ => ops.push(next),
        }
    }
}

/// The fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Number of the set within the session.
    pub set: u32,
    /// Index of the file.
    pub file: u32,
    /// Index of the segment.
    pub segment: u64,
    /// How the payload is carried.
    pub codec: Codec,
    /// Bytes of the ops.
    pub ops_len: u32,
    /// Bytes of the literal blocks.
    pub raw_len: u32,
    /// Bytes of the payload.
    pub payload_len: u32,
}

/// A frame that no correct source sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A number is outside of what is allowed.
    #[error("a frame's {0} is not allowed")]
    Field(&'static str),
    /// The ops are cut short.
    #[error("a frame's description is cut short")]
    Short,
}

impl FrameHeader {
    /// The header as it stands on the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0..4].copy_from_slice(&self.set.to_le_bytes());
        out[4..8].copy_from_slice(&self.file.to_le_bytes());
        out[8..16].copy_from_slice(&self.segment.to_le_bytes());
        out[16] = match self.codec {
            Codec::Raw => 0,
            Codec::Zstd => 1,
        };
        out[20..24].copy_from_slice(&self.ops_len.to_le_bytes());
        out[24..28].copy_from_slice(&self.raw_len.to_le_bytes());
        out[28..32].copy_from_slice(&self.payload_len.to_le_bytes());
        out
    }

    /// Reads a header; every length is within [`limits`] afterwards.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let word =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let header = Self {
            set: word(0),
            file: word(4),
            segment: u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes")),
            codec: match bytes[16] {
                0 => Codec::Raw,
                1 => Codec::Zstd,
                _ => return Err(FrameError::Field("codec")),
            },
            ops_len: word(20),
            raw_len: word(24),
            payload_len: word(28),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), FrameError> {
        if self.ops_len == 0 || self.ops_len as usize > limits::FRAME_OPS * SAME_LEN {
            return Err(FrameError::Field("number of runs"));
        }
        if self.raw_len > limits::FRAME_BYTES {
            return Err(FrameError::Field("length"));
        }
        match self.codec {
            Codec::Raw if self.payload_len != self.raw_len => {
                Err(FrameError::Field("payload length"))
            }
            // A compressed frame that is not smaller is never sent.
            Codec::Zstd if self.payload_len >= self.raw_len => {
                Err(FrameError::Field("payload length"))
            }
            _ => Ok(()),
        }
    }
}

const PLAIN_LEN: usize = 8;
const SAME_LEN: usize = 20;

/// The ops as they stand on the wire.
pub fn encode_ops(ops: &[Op]) -> Vec<u8> {
    let mut out = Vec::with_capacity(ops.len() * PLAIN_LEN);
    for op in ops {
        let kind: u32 = match op {
            Op::Literal(_) => 1,
            Op::Zero(_) => 2,
            Op::Same(..) => 3,
            Op::Held(_) => 4,
        };
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&op.blocks().to_le_bytes());
        if let Op::Same(_, from) = op {
            out.extend_from_slice(&from.file.to_le_bytes());
            out.extend_from_slice(&from.block.to_le_bytes());
        }
    }
    out
}

/// Reads the ops of a frame of a set; they fill `bytes` exactly.
pub fn decode_ops(bytes: &[u8]) -> Result<Vec<Op>, FrameError> {
    decode(bytes, limits::BLOCKS_PER_FILE)
}

/// Reads the ops of a frame of a migration, whose blocks are numbered by address.
pub fn decode_page_ops(bytes: &[u8]) -> Result<Vec<Op>, FrameError> {
    decode(bytes, limits::PAGES)
}

// `blocks`: how many a file may have.
fn decode(bytes: &[u8], blocks: u64) -> Result<Vec<Op>, FrameError> {
    let mut ops = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (op, len) = decode_op(rest, blocks)?;
        ops.push(op);
        rest = &rest[len..];
        if ops.len() > limits::FRAME_OPS {
            return Err(FrameError::Field("number of runs"));
        }
    }
    Ok(ops)
}

fn decode_op(bytes: &[u8], limit: u64) -> Result<(Op, usize), FrameError> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 4).ok_or(FrameError::Short)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
    };
    let blocks = word(4)?;
    if blocks == 0 || blocks as usize > limits::SEGMENT_BLOCKS {
        return Err(FrameError::Field("run"));
    }
    Ok(match word(0)? {
        1 => (Op::Literal(blocks), PLAIN_LEN),
        2 => (Op::Zero(blocks), PLAIN_LEN),
        3 => {
            let block = u64::from(word(12)?) | u64::from(word(16)?) << 32;
            let from = BlockRef {
                file: word(8)?,
                block,
            };
            let end = from.block.checked_add(u64::from(blocks));
            if from.file >= limits::FILES || end.is_none_or(|end| end > limit) {
                return Err(FrameError::Field("reference"));
            }
            (Op::Same(blocks, from), SAME_LEN)
        }
        4 => (Op::Held(blocks), PLAIN_LEN),
        _ => return Err(FrameError::Field("run")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_documented_bytes() {
        let header = FrameHeader {
            set: 1,
            file: 2,
            segment: 3,
            codec: Codec::Zstd,
            ops_len: 4,
            raw_len: 8192,
            payload_len: 100,
        };
        let bytes = header.encode();
        #[rustfmt::skip]
        assert_eq!(bytes, [
            1, 0, 0, 0,  2, 0, 0, 0,  3, 0, 0, 0, 0, 0, 0, 0, // set, file, segment
            1, 0, 0, 0,  4, 0, 0, 0,  0, 32, 0, 0,  100, 0, 0, 0, // codec, ops, raw, payload
        ]);
        assert_eq!(FrameHeader::decode(&bytes), Ok(header));
    }

    #[test]
    fn impossible_headers_are_refused() {
        let good = FrameHeader {
            set: 1,
            file: 0,
            segment: 0,
            codec: Codec::Raw,
            ops_len: 8,
            raw_len: 4096,
            payload_len: 4096,
        };
        for bad in [
            FrameHeader { ops_len: 0, ..good },
            FrameHeader {
                ops_len: 257 * 20,
                ..good
            },
            FrameHeader {
                raw_len: limits::FRAME_BYTES + 1,
                payload_len: limits::FRAME_BYTES + 1,
                ..good
            },
            FrameHeader {
                payload_len: 4095,
                ..good
            },
            FrameHeader {
                codec: Codec::Zstd,
                ..good
            },
        ] {
            assert!(FrameHeader::decode(&bad.encode()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ops_come_back() {
        let ops = [
            Op::Literal(3),
            Op::Zero(1),
            Op::Same(
                2,
                BlockRef {
                    file: 7,
                    block: 1 << 29,
                },
            ),
            Op::Held(5),
        ];
        let bytes = encode_ops(&ops);
        assert_eq!(decode_ops(&bytes), Ok(ops.to_vec()));
        assert_eq!(
            decode_ops(&bytes[..bytes.len() - 1]),
            Err(FrameError::Short)
        );
    }

    #[test]
    fn references_beyond_every_file_are_refused() {
        let at = |file, block| BlockRef { file, block };
        let last = limits::BLOCKS_PER_FILE - 1;
        assert!(decode_ops(&encode_ops(&[Op::Same(1, at(0, last))])).is_ok());
        for from in [
            at(0, limits::BLOCKS_PER_FILE),
            at(0, u64::MAX),
            at(limits::FILES, 0),
        ] {
            let decoded = decode_ops(&encode_ops(&[Op::Same(1, from)]));
            assert_eq!(decoded, Err(FrameError::Field("reference")), "{from:?}");
        }
    }

    #[test]
    fn neighbouring_blocks_become_one_op() {
        let mut ops = Vec::new();
        for block in 0..3 {
            Op::push(
                &mut ops,
                Op::Same(
                    1,
                    BlockRef {
                        file: 1,
                        block: 10 + block,
                    },
                ),
            );
        }
        Op::push(&mut ops, Op::Same(1, BlockRef { file: 1, block: 20 }));
        Op::push(&mut ops, Op::Zero(1));
        Op::push(&mut ops, Op::Zero(1));
        let at = |block| BlockRef { file: 1, block };
        assert_eq!(ops, [Op::Same(3, at(10)), Op::Same(1, at(20)), Op::Zero(2)]);
    }
}
