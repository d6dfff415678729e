//! Values for key-value stores: each carries its key, its sequence number and a checksum, and can be
//! made again from them, so that every byte is compared.

use anyhow::{Result, bail};

/// The values that a store should hold.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    /// Bytes of one value.
    size: usize,
    /// How often each key was written.
    sequence: Vec<u32>,
    /// Chooses the keys to rewrite.
    choice: u64,
}

impl Values {
    /// `count` values of `size` bytes, each written once.
    pub(crate) fn new(count: usize, size: usize) -> Self {
        Self {
            size,
            sequence: vec![1; count],
            choice: 0x2545_f491_4f6c_dd1d,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.sequence.len()
    }

    /// Bytes of all values.
    pub(crate) fn bytes(&self) -> usize {
        self.size * self.sequence.len()
    }

    pub(crate) fn key(index: usize) -> String {
        format!("key-{index:06}")
    }

    /// The current value of key `index`.
    pub(crate) fn value(&self, index: usize) -> Vec<u8> {
        Self::version(self.size, index, self.sequence[index])
    }

    /// The value of `size` bytes that key `index` has when it is written for the `sequence`-th time.
    pub(crate) fn version(size: usize, index: usize, sequence: u32) -> Vec<u8> {
        let key = Self::key(index);
        let mut state = checksum(format!("{key}/{sequence}").as_bytes());
        let mut body = Vec::with_capacity(size);
        // Half of it is like text, half like noise: memory of real programs is between the two.
        while body.len() < size / 2 {
            state = next(state);
            body.extend_from_slice(
                format!("{key} has number {} of {sequence}; ", state % 1000).as_bytes(),
            );
        }
        while body.len() < size {
            state = next(state);
            body.extend_from_slice(&state.to_le_bytes());
        }
        let head = format!("{key} {sequence} {:016x} ", checksum(&body));
        let mut value = head.into_bytes();
        value.extend_from_slice(&body);
        value.truncate(size);
        value
    }

    /// Writes every `step`-th key once more, from key `first` on; gives the indexes.
    pub(crate) fn change(&mut self, first: usize, step: usize) -> Vec<usize> {
        let changed: Vec<usize> = (first..self.len()).step_by(step).collect();
        for &index in &changed {
            self.sequence[index] += 1;
        }
        changed
    }

    /// Writes one key once more, any of them; gives its index.
    pub(crate) fn rewrite_one(&mut self) -> usize {
        self.choice = next(self.choice);
        // The high half is the better mixed one.
        let index = usize::try_from(self.choice >> 32).unwrap_or(0) % self.len();
        self.sequence[index] += 1;
        index
    }

    /// Which version of key `index` a store gave; fails where it is none, or not all of one.
    pub(crate) fn version_of(index: usize, found: &[u8]) -> Result<u32> {
        let shown = || String::from_utf8_lossy(&found[..found.len().min(40)]).into_owned();
        let mut words = found.splitn(3, |&byte| byte == b' ').map(str::from_utf8);
        let (Some(Ok(_)), Some(Ok(sequence))) = (words.next(), words.next()) else {
            bail!("{} has a strange value: {:?}", Self::key(index), shown())
        };
        match sequence.parse() {
            Ok(sequence) if found == Self::version(found.len(), index, sequence) => Ok(sequence),
            _ => bail!("{} has a damaged value: {:?}", Self::key(index), shown()),
        }
    }

    /// Compares what a store gave for key `index`.
    pub(crate) fn compare(&self, index: usize, found: &[u8]) -> Result<()> {
        let wanted = self.value(index);
        if found == wanted {
            return Ok(());
        }
        let shown = String::from_utf8_lossy(&found[..found.len().min(40)]).into_owned();
        bail!(
            "{} has a wrong value: {} bytes beginning {shown:?}, not its version {} of {} bytes",
            Self::key(index),
            found.len(),
            self.sequence[index],
            wanted.len()
        )
    }
}

/// FNV-1a: enough to tell a mixed-up value from a right one.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Xorshift; the state is never zero as no checksum here is.
fn next(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ (state << 17)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_value_differs_and_the_old_one_is_refused() {
        let mut values = Values::new(10, 500);
        let old = values.value(4);
        assert_eq!(old.len(), 500);
        values.compare(4, &old).expect("unchanged");
        assert_eq!(values.change(0, 4), vec![0, 4, 8]);
        assert!(values.compare(4, &old).is_err());
        assert!(values.compare(5, &values.value(6)).is_err());
    }

    #[test]
    fn value_tells_its_version_unless_a_byte_of_it_is_wrong() {
        let mut value = Values::version(500, 4, 77);
        assert_eq!(Values::version_of(4, &value).expect("whole"), 77);
        assert!(Values::version_of(5, &value).is_err());
        value[499] ^= 1;
        assert!(Values::version_of(4, &value).is_err());
        assert!(Values::version_of(4, b"").is_err());
    }

    #[test]
    fn rewriting_reaches_all_keys() {
        let mut values = Values::new(10, 500);
        let mut seen = [false; 10];
        (0..200).for_each(|_| seen[values.rewrite_one()] = true);
        assert_eq!(seen, [true; 10]);
    }
}
