//! Memory contents, page by page.

/// What the pages of a workload look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No structure: encrypted or compressed data, the worst case of every codec.
    Random,
    /// Log lines and small records, as in caches and interpreters.
    Text,
    /// Nothing but zeros: memory that was written once and cleared.
    Zero,
    /// A few words on a page of zeros: sparse tables, thread stacks, young heaps.
    MostlyZero,
    /// A heap of all of these: two fifths text, a fifth each of random, mostly zero and zero.
    Mixed,
}

/// A small generator (splitmix64): fast enough to fill memory, the same everywhere.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The generator of `seed`; neighbouring seeds give unrelated sequences.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 bits.
    pub fn next_word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u128::from(bound as u64);
        usize::try_from((u128::from(self.next_word()) * bound) >> 64).expect("below a usize")
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.next_word().to_le_bytes()[..word.len()]);
        }
    }
}

/// Fills `bytes` with pages of `kind`, the first being page `first` of the workload of `seed`.
///
/// A page's content depends on seed and page number alone, so any part can be made by itself.
pub fn fill_pages(bytes: &mut [u8], page_len: usize, kind: Kind, seed: u64, first: u64) {
    for (page, number) in bytes.chunks_mut(page_len).zip(first..) {
        let mut random =
            Random::new(seed.rotate_left(32) ^ number.wrapping_mul(0x2545_f491_4f6c_dd1d));
        fill_page(page, kind, &mut random);
    }
}

fn fill_page(page: &mut [u8], kind: Kind, random: &mut Random) {
    match kind {
        Kind::Random => random.fill(page),
        Kind::Text => fill_text(page, random),
        Kind::Zero => page.fill(0),
        Kind::MostlyZero => fill_mostly_zero(page, random),
        Kind::Mixed => {
            let kinds = [
                Kind::Text,
                Kind::Text,
                Kind::Random,
                Kind::MostlyZero,
                Kind::Zero,
            ];
            fill_page(page, kinds[random.below(kinds.len())], random);
        }
    }
}

/// Lines of words and numbers; zstd level 1 makes about a third of it.
fn fill_text(page: &mut [u8], random: &mut Random) {
    const WORDS: [&str; 32] = [
        "request",
        "session",
        "cache",
        "user",
        "timeout",
        "connection",
        "accepted",
        "from",
        "worker",
        "thread",
        "started",
        "stopped",
        "error",
        "retry",
        "queue",
        "length",
        "value",
        "key",
        "expired",
        "updated",
        "index",
        "table",
        "row",
        "commit",
        "the",
        "of",
        "and",
        "in",
        "GET",
        "POST",
        "status",
        "bytes",
    ];
    let mut rest = page;
    while !rest.is_empty() {
        let word = random.next_word();
        let piece = match word % 8 {
            0 => format!("{}\n", (word >> 8) % 1_000_000),
            1 => format!("id={:08x} ", word >> 32),
            _ => format!("{} ", WORDS[random.below(WORDS.len())]),
        };
        let len = piece.len().min(rest.len());
        rest[..len].copy_from_slice(&piece.as_bytes()[..len]);
        rest = &mut rest[len..];
    }
}

fn fill_mostly_zero(page: &mut [u8], random: &mut Random) {
    page.fill(0);
    let words = page.len() / 8;
    for _ in 0..words.div_ceil(32) {
        // Like pointers: high bytes alike, low bits zero.
        let pointer = 0x7f00_0000_0000 | (random.next_word() & 0xffff_fff0);
        let at = random.below(words.max(1)) * 8;
        if let Some(slot) = page.get_mut(at..at + 8) {
            slot.copy_from_slice(&pointer.to_le_bytes());
        }
    }
}

/// Numbers of `percent` per cent of `pages` pages, ascending: which ones a round of work changed.
pub fn changed_pages(pages: u64, percent: f64, seed: u64) -> Vec<u64> {
    let mut random = Random::new(seed ^ 0xc4a9_6ed0);
    let mut wanted = count_of(pages, percent);
    // Selection sampling: each page is taken with the chance that leaves exactly `wanted`.
    let mut chosen = Vec::new();
    for (page, left) in (0..pages).zip((1..=pages).rev()) {
        let draw = u128::from(random.next_word()) * u128::from(left);
        if draw >> 64 < u128::from(wanted) {
            chosen.push(page);
            wanted -= 1;
        }
    }
    chosen
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share between 0 and 1 of a page count"
)]
fn count_of(pages: u64, percent: f64) -> u64 {
    (pages as f64 * percent.clamp(0.0, 100.0) / 100.0).round() as u64
}

/// `old` with everything moved up by `by` bytes and something new in front: an insertion near the
/// beginning of a buffer, after which no page is what it was though hardly a byte is new.
pub fn shifted(old: &[u8], by: usize, seed: u64) -> Vec<u8> {
    let by = by.min(old.len());
    let mut new = vec![0; old.len()];
    Random::new(seed).fill(&mut new[..by]);
    new[by..].copy_from_slice(&old[..old.len() - by]);
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 5] = [
        Kind::Random,
        Kind::Text,
        Kind::Zero,
        Kind::MostlyZero,
        Kind::Mixed,
    ];

    #[test]
    fn a_page_depends_on_seed_and_number_alone() {
        for kind in KINDS {
            let mut whole = vec![1; 8 * 4096];
            fill_pages(&mut whole, 4096, kind, 5, 0);
            let mut part = vec![2; 2 * 4096];
            fill_pages(&mut part, 4096, kind, 5, 3);
            assert_eq!(part, whole[3 * 4096..5 * 4096], "{kind:?}");
            fill_pages(&mut part, 4096, kind, 6, 3);
            assert_eq!(
                part == whole[3 * 4096..5 * 4096],
                kind == Kind::Zero,
                "{kind:?}"
            );
        }
    }

    #[test]
    fn pages_of_one_workload_differ() {
        for kind in [Kind::Random, Kind::Text, Kind::MostlyZero] {
            let mut pages = vec![0; 256 * 4096];
            fill_pages(&mut pages, 4096, kind, 1, 0);
            let distinct: std::collections::HashSet<_> = pages.chunks(4096).collect();
            assert_eq!(distinct.len(), 256, "{kind:?}");
        }
    }

    #[test]
    fn changed_pages_are_as_many_as_asked() {
        for (pages, percent, expected) in [
            (1000, 1.0, 10),
            (1000, 0.0, 0),
            (77, 100.0, 77),
            (0, 5.0, 0),
        ] {
            let changed = changed_pages(pages, percent, 9);
            assert_eq!(changed.len(), expected);
            assert!(changed.is_sorted_by(|a, b| a < b));
            assert!(changed.iter().all(|page| *page < pages));
        }
        assert_ne!(changed_pages(1000, 1.0, 1), changed_pages(1000, 1.0, 2));
    }

    #[test]
    fn shifting_keeps_the_length_and_moves_the_bytes() {
        let old: Vec<u8> = (0..=255).collect();
        let new = shifted(&old, 16, 1);
        assert_eq!(new.len(), 256);
        assert_eq!(new[16..], old[..240]);
    }
}
