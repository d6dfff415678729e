//! Page sizes and runs of pages, with nothing known about files or hashes.

use std::fmt;

/// Size of a memory page in bytes: a power of two from 4 KiB to 2 MiB.
///
/// CRIU images do not record it (x86-64 uses 4 KiB, arm64 4, 16 or 64 KiB, ppc64 64 KiB), so it is
/// a value found or given for each image directory and carried in the manifest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize {
    shift: u8,
}

/// A number of bytes that cannot be a page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a page size: it must be a power of two from 4096 to 2097152")]
pub struct BadPageSize(pub u64);

impl PageSize {
    const MIN_SHIFT: u32 = 12;
    const MAX_SHIFT: u32 = 21;

    /// The page size of `bytes` bytes.
    pub fn new(bytes: u64) -> Result<Self, BadPageSize> {
        let shift = bytes.trailing_zeros();
        if !bytes.is_power_of_two() || !(Self::MIN_SHIFT..=Self::MAX_SHIFT).contains(&shift) {
            return Err(BadPageSize(bytes));
        }
        Ok(Self {
            shift: u8::try_from(shift).map_err(|_| BadPageSize(bytes))?,
        })
    }

    /// The page size of the running host.
    pub fn of_host() -> Self {
        Self::new(rustix::param::page_size() as u64).expect("the kernel's page size is one")
    }

    /// Size in bytes.
    pub fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// Size in bytes, as a length in memory.
    pub fn byte_len(self) -> usize {
        1 << self.shift
    }

    /// Whether `address` is the first byte of a page.
    pub fn is_aligned(self, address: u64) -> bool {
        address & (self.bytes() - 1) == 0
    }

    /// The bytes of `pages` pages, unless that overflows.
    pub fn checked_bytes(self, pages: u64) -> Option<u64> {
        pages.checked_mul(self.bytes())
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSize({})", self.bytes())
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_in_range_are_page_sizes() {
        for bytes in [4096, 16384, 65536, 2 << 20] {
            assert_eq!(PageSize::new(bytes).unwrap().bytes(), bytes);
        }
        for bytes in [0, 1, 2048, 4095, 4097, 12288, 4 << 20, u64::MAX] {
            assert_eq!(PageSize::new(bytes), Err(BadPageSize(bytes)));
        }
    }
}
