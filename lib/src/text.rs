//! Keys and tickets as one word that survives being pasted: `prefix` + base32 of payload and checksum.
//!
//! Base32 (RFC 4648 alphabet, lower case, no padding) and not base64: it is the same word when a
//! terminal, a mail program or a person changes its case, and a double click selects it.

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// Bytes of BLAKE3 over prefix and payload behind the payload: 1 in 2^40 damaged words passes.
const CHECKSUM: usize = 5;

/// Why a word is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DecodeError {
    /// It does not begin with the prefix.
    OtherPrefix,
    /// Longer than any such word.
    TooLong,
    /// A character that is not of the alphabet, a length that no payload has, or a wrong checksum.
    Damaged,
}

/// The word for `payload`.
pub(crate) fn encode(prefix: &str, payload: &[u8]) -> String {
    let mut bytes = payload.to_vec();
    bytes.extend_from_slice(&checksum(prefix, payload));
    let mut word = String::with_capacity(prefix.len() + bytes.len() * 8 / 5 + 1);
    word.push_str(prefix);
    push_base32(&mut word, &bytes);
    word
}

/// The payload of `word`, at most `max` bytes long.
pub(crate) fn decode(prefix: &str, word: &str, max: usize) -> Result<Vec<u8>, DecodeError> {
    let digits = match word.get(..prefix.len()) {
        Some(start) if start.eq_ignore_ascii_case(prefix) => &word.as_bytes()[prefix.len()..],
        _ => return Err(DecodeError::OtherPrefix),
    };
    if digits.len() > (max + CHECKSUM) * 8 / 5 + 1 {
        return Err(DecodeError::TooLong);
    }
    let mut bytes = parse_base32(digits).ok_or(DecodeError::Damaged)?;
    let payload_len = bytes
        .len()
        .checked_sub(CHECKSUM)
        .ok_or(DecodeError::Damaged)?;
    let found = bytes.split_off(payload_len);
    if found != checksum(prefix, &bytes) {
        return Err(DecodeError::Damaged);
    }
    if bytes.len() > max {
        return Err(DecodeError::TooLong);
    }
    Ok(bytes)
}

fn checksum(prefix: &str, payload: &[u8]) -> [u8; CHECKSUM] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(prefix.as_bytes());
    hasher.update(payload);
    let mut sum = [0; CHECKSUM];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM]);
    sum
}

fn push_base32(word: &mut String, bytes: &[u8]) {
    for group in bytes.chunks(5) {
        let mut padded = [0; 8];
        padded[3..3 + group.len()].copy_from_slice(group);
        let bits = u64::from_be_bytes(padded);
        for digit in 0..(group.len() * 8).div_ceil(5) {
            let value = (bits >> (35 - 5 * digit)) & 31;
            word.push(char::from(ALPHABET[usize::from(value.to_le_bytes()[0])]));
        }
    }
}

/// `None` for what [`push_base32`] never writes: foreign characters, lengths that no bytes have, and
/// bits set behind the last byte. One payload has one spelling (and its upper-case ones).
fn parse_base32(digits: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(digits.len() * 5 / 8);
    for group in digits.chunks(8) {
        let count = group.len() * 5 / 8;
        if (count * 8).div_ceil(5) != group.len() {
            return None;
        }
        let mut bits = 0;
        for (place, digit) in group.iter().enumerate() {
            bits |= value_of(*digit)? << (35 - 5 * place);
        }
        let all = bits.to_be_bytes();
        let (data, spare) = all[3..].split_at(count);
        if spare.iter().any(|byte| *byte != 0) {
            return None;
        }
        bytes.extend_from_slice(data);
    }
    Some(bytes)
}

fn value_of(digit: u8) -> Option<u64> {
    let value = match digit.to_ascii_lowercase() {
        letter @ b'a'..=b'z' => letter - b'a',
        number @ b'2'..=b'7' => number - b'2' + 26,
        _ => return None,
    };
    Some(u64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base32_agrees_with_the_vectors_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "my"),
            ("fo", "mzxq"),
            ("foo", "mzxw6"),
            ("foob", "mzxw6yq"),
            ("fooba", "mzxw6ytb"),
            ("foobar", "mzxw6ytboi"),
        ] {
            let mut word = String::new();
            push_base32(&mut word, bytes.as_bytes());
            assert_eq!(word, text);
            assert_eq!(parse_base32(text.as_bytes()).unwrap(), bytes.as_bytes());
        }
    }

    #[test]
    fn only_the_canonical_spelling_is_read() {
        for text in ["a", "mzx", "mzxw6y", "mz", "m1", "my=", "m y"] {
            assert_eq!(parse_base32(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn words_of_every_length_come_back() {
        for len in 0..64 {
            let payload: Vec<u8> = (0..len).map(|i: u8| i.wrapping_mul(37)).collect();
            let word = encode("test1-", &payload);
            assert_eq!(decode("test1-", &word, 64).unwrap(), payload);
            assert_eq!(decode("test1-", &word.to_uppercase(), 64).unwrap(), payload);
            assert_eq!(decode("test2-", &word, 64), Err(DecodeError::OtherPrefix));
            assert_eq!(
                decode("test1-", &word[..word.len() - 1], 64),
                Err(DecodeError::Damaged)
            );
        }
    }

    #[test]
    fn longer_words_than_asked_for_are_refused() {
        let word = encode("test1-", &[7; 33]);
        assert_eq!(decode("test1-", &word, 32), Err(DecodeError::TooLong));
        let endless = format!("test1-{}", "a".repeat(1 << 20));
        assert_eq!(decode("test1-", &endless, 32), Err(DecodeError::TooLong));
    }

    #[test]
    fn the_prefix_may_cut_a_character_of_the_word() {
        assert_eq!(
            decode("test1-", "testé-aaaa", 32),
            Err(DecodeError::OtherPrefix)
        );
        assert_eq!(decode("test1-", "t", 32), Err(DecodeError::OtherPrefix));
    }
}
