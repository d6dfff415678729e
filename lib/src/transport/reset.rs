//! Telling peers of a process that has died that it has: whoever takes its place, with its key and at its
//! port, answers their packets with QUIC's stateless reset, which they recognise.
//!
//! For that the tokens of resets come from the host's key, not from the process, and any connection id
//! may be one of the dead process.

use std::sync::Arc;

use quinn::crypto::{CryptoError, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};

use super::Identity;
use crate::ticket::fill_random;

/// Bytes of a connection id.
const ID_LEN: usize = 8;

/// Bytes of a signature; QUIC takes the first 16 for its token.
const SIGNATURE_LEN: usize = 32;

/// Lets whoever has `identity` reset the connections of this endpoint when it is gone, and those of an
/// endpoint before it.
pub(super) fn outlive(config: &mut EndpointConfig, identity: &Identity) {
    let secret = identity.private_key();
    let key = blake3::derive_key("crxfer 2026 stateless reset", secret.secret_der());
    config
        .reset_key(Arc::new(ResetKey(key)))
        .cid_generator(|| Box::new(Ids));
}

struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        SIGNATURE_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // Compared in constant time.
        let expected = blake3::keyed_hash(&self.0, data);
        let found = <[u8; SIGNATURE_LEN]>::try_from(signature).map_err(|_| CryptoError)?;
        (expected == blake3::Hash::from_bytes(found))
            .then_some(())
            .ok_or(CryptoError)
    }
}

struct Ids;

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN];
        fill_random(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}
