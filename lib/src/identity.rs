//! Who a host is: the fingerprint of its public key.

use std::fmt;
use std::str::FromStr;

use crate::text::{self, DecodeError};

const PREFIX: &str = "crxkey1-";

/// Name of a host: BLAKE3 of its public key (the certificate's SubjectPublicKeyInfo, DER).
///
/// Of the key and not of the certificate around it, so that the same key in a new certificate stays
/// the same host. As text it is one word, `crxkey1-` and 60 letters and digits, with a checksum:
/// a mistyped one is refused instead of being reported later as a stranger.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// A text that is no fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFingerprint {
    /// It begins otherwise.
    #[error("this is not a host key's fingerprint: those begin with \"{PREFIX}\"")]
    NotAFingerprint,
    /// It has the form, but its checksum or length is wrong.
    #[error("the fingerprint is cut short or mistyped: copy it again, it is one word")]
    Damaged,
}

impl Fingerprint {
    /// The fingerprint of the public key with this SubjectPublicKeyInfo (DER).
    pub fn of_public_key(spki: &[u8]) -> Self {
        Self(*blake3::hash(spki).as_bytes())
    }

    /// The first letters of the text form: enough for logs and progress lines, not for trust.
    pub fn short(&self) -> String {
        self.to_string()[PREFIX.len()..][..8].to_owned()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::encode(PREFIX, &self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({})", self.short())
    }
}

impl FromStr for Fingerprint {
    type Err = BadFingerprint;

    fn from_str(word: &str) -> Result<Self, BadFingerprint> {
        let payload = text::decode(PREFIX, word.trim(), 32).map_err(|error| match error {
            DecodeError::OtherPrefix => BadFingerprint::NotAFingerprint,
            DecodeError::TooLong | DecodeError::Damaged => BadFingerprint::Damaged,
        })?;
        payload
            .try_into()
            .map(Self)
            .map_err(|_| BadFingerprint::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_one_word_and_comes_back() {
        let fingerprint = Fingerprint::of_public_key(b"a key");
        let word = fingerprint.to_string();
        assert_eq!(word.len(), 8 + 60);
        assert_eq!(word.parse(), Ok(fingerprint));
        assert_eq!(
            format!("  {}\n", word.to_uppercase()).parse(),
            Ok(fingerprint)
        );
        assert!(word[8..].starts_with(&fingerprint.short()));
    }

    #[test]
    fn a_damaged_fingerprint_is_told_from_another_word() {
        let word = Fingerprint([7; 32]).to_string();
        assert_eq!(
            word[..40].parse::<Fingerprint>(),
            Err(BadFingerprint::Damaged)
        );
        assert_eq!(
            text::encode(PREFIX, &[7; 31]).parse::<Fingerprint>(),
            Err(BadFingerprint::Damaged)
        );
        assert_eq!(
            "host:4433".parse::<Fingerprint>(),
            Err(BadFingerprint::NotAFingerprint)
        );
    }
}
