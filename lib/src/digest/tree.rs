//! The tree over the blocks of a file: block → segment → file.
//!
//! ```text
//! file digest
//!   = BLAKE3 derive_key(FILE_CONTEXT,    size u64 LE ‖ block length u64 LE ‖ segment digests)
//! segment digest (the blocks of 1 MiB, at least one; the last segment fewer)
//!   = BLAKE3 derive_key(SEGMENT_CONTEXT, block digests)
//! block digest (`block length` bytes, the last block fewer)
//!   = BLAKE3 hash(bytes)
//! ```
//!
//! Digests are joined as their 32 bytes, in file order, with nothing between. The context strings
//! keep the three kinds apart: no list of digests that happens to be the content of a page has the
//! digest of a segment, and no segment that of a file. Size and block length are part of the file's
//! digest, so the number of blocks under it, and with that the shape of the tree, follows from it.
//! A pages file's digest thus comes from its pages' digests, without reading the file again, and two
//! generations are compared segment by segment before any list of blocks is.

use super::Digest;

/// Context of segment digests; part of the protocol.
pub const SEGMENT_CONTEXT: &str = "crxfer v1 segment: block digests";

/// Context of file digests; part of the protocol.
pub const FILE_CONTEXT: &str = "crxfer v1 file: size, block length, segment digests";

/// The digest of a segment with these block digests.
pub fn segment_digest(blocks: &[Digest]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(SEGMENT_CONTEXT);
    update_with_digests(&mut hasher, blocks);
    hasher.finalize().into()
}

/// The digest of a file of `size` bytes in blocks of `block_len` bytes.
pub fn file_digest(size: u64, block_len: u64, segments: &[Digest]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(FILE_CONTEXT);
    hasher.update(&size.to_le_bytes());
    hasher.update(&block_len.to_le_bytes());
    update_with_digests(&mut hasher, segments);
    hasher.finalize().into()
}

fn update_with_digests(hasher: &mut blake3::Hasher, digests: &[Digest]) {
    // Sixteen KiB at a time: update is slow for 32 bytes and fast for whole groups of chunks.
    let mut joined = [0; 512 * Digest::LEN];
    for digests in digests.chunks(512) {
        for (to, digest) in joined.chunks_mut(Digest::LEN).zip(digests) {
            to.copy_from_slice(digest.as_bytes());
        }
        hasher.update(&joined[..digests.len() * Digest::LEN]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digests(count: usize) -> Vec<Digest> {
        (0..count as u64)
            .map(|i| Digest::of(&i.to_le_bytes()))
            .collect()
    }

    fn joined(digests: &[Digest]) -> Vec<u8> {
        digests.iter().flat_map(|digest| digest.0).collect()
    }

    #[test]
    fn digests_are_those_the_module_text_specifies() {
        let blocks = digests(2500);
        let segments: Vec<_> = blocks.chunks(1024).map(segment_digest).collect();
        let by_hand: Vec<_> = [&blocks[..1024], &blocks[1024..2048], &blocks[2048..]]
            .map(|blocks| {
                Digest(blake3::derive_key(
                    "crxfer v1 segment: block digests",
                    &joined(blocks),
                ))
            })
            .to_vec();
        assert_eq!(segments, by_hand);

        let size: u64 = 2500 * 4096 - 5;
        let mut input = size.to_le_bytes().to_vec();
        input.extend(4096_u64.to_le_bytes());
        input.extend(joined(&segments));
        let context = "crxfer v1 file: size, block length, segment digests";
        let expected = Digest(blake3::derive_key(context, &input));
        assert_eq!(file_digest(size, 4096, &segments), expected);
    }

    /// Both hosts must agree for ever, or every kept set becomes foreign.
    #[test]
    fn digests_do_not_change_between_versions() {
        let segment = segment_digest(&digests(3));
        let file = file_digest(3 * 4096, 4096, &[segment]);
        assert_eq!(
            format!("{segment:x}"),
            "a82fbe5831f5726699bf9e085af66dd114ebbf0c5acbaa079d43ddb86347d37f"
        );
        assert_eq!(
            format!("{file:x}"),
            "2a05691dc62f10c9b512020e0cfb040093f150b958df4612972710b0f6cc106d"
        );
    }

    #[test]
    fn kinds_of_digest_never_coincide() {
        let blocks = digests(2);
        let list = joined(&blocks);
        assert_ne!(segment_digest(&blocks), Digest::of(&list));
        assert_ne!(file_digest(0, 4096, &blocks), segment_digest(&blocks));
        assert_ne!(file_digest(5, 4096, &blocks), file_digest(6, 4096, &blocks));
        assert_ne!(file_digest(5, 4096, &blocks), file_digest(5, 8192, &blocks));
    }
}
