//! Tickets: what a source needs to reach one running destination, as one word to paste.
//!
//! ```text
//! crxfer1- base32( count  { 4 | 6   address   port } × count   fingerprint   secret   checksum )
//!                  1 B      1 B     4 or 16 B  2 B, BE          32 B          32 B     5 B
//! ```
//!
//! The fingerprint lets the source recognise the destination. The secret lets the destination
//! recognise who was given the ticket; it never crosses the wire: both sides send a [`proof`] that
//! is bound to their TLS session, so a host in the middle cannot carry it elsewhere.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::identity::Fingerprint;
use crate::text::{self, DecodeError};

/// Addresses that a ticket can name.
pub const MAX_ADDRESSES: usize = 8;

const PREFIX: &str = "crxfer1-";
/// What tickets of all versions begin with.
const FAMILY: &str = "crxfer";
const ADDRESS_V4: u8 = 4;
const ADDRESS_V6: u8 = 6;
const MAX_PAYLOAD: usize = 1 + MAX_ADDRESSES * (1 + 16 + 2) + 32 + 32;

/// Addresses, key and secret of one running destination.
///
/// Its text form contains the secret: whoever has the ticket can send to this destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    addresses: Vec<SocketAddr>,
    fingerprint: Fingerprint,
    secret: Secret,
}

/// Why a text is no ticket, or a ticket cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It begins otherwise.
    #[error("this is not a ticket: tickets begin with \"{PREFIX}\"")]
    NotATicket,
    /// A ticket of another version of crxfer.
    #[error("this ticket is of another version of crxfer: use the same version on both hosts")]
    OtherVersion,
    /// A character or the end is missing, or something was changed.
    #[error("the ticket is cut short or mistyped: copy it again, it is one word")]
    Damaged,
    /// The checksum is right and the content is not: whoever made it did not follow the format.
    #[error("the ticket is malformed: {0}")]
    Malformed(&'static str),
    /// Nothing to connect to.
    #[error("a ticket needs an address")]
    NoAddress,
    /// More than [`MAX_ADDRESSES`].
    #[error("a ticket holds at most {MAX_ADDRESSES} addresses, not {0}")]
    TooManyAddresses(usize),
}

impl Ticket {
    /// The ticket for a destination at `addresses` (1 to [`MAX_ADDRESSES`], tried in this order).
    pub fn new(
        addresses: Vec<SocketAddr>,
        fingerprint: Fingerprint,
        secret: Secret,
    ) -> Result<Self, TicketError> {
        match addresses.len() {
            0 => Err(TicketError::NoAddress),
            1..=MAX_ADDRESSES => Ok(Self {
                addresses,
                fingerprint,
                secret,
            }),
            count => Err(TicketError::TooManyAddresses(count)),
        }
    }

    /// Where the destination may be reached, in the order to try.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The key that the destination must have.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// What the holder of the ticket proves to know.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    fn payload(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(MAX_PAYLOAD);
        payload.push(u8::try_from(self.addresses.len()).expect("at most MAX_ADDRESSES"));
        for address in &self.addresses {
            push_address(&mut payload, address);
        }
        payload.extend_from_slice(&self.fingerprint.0);
        payload.extend_from_slice(&self.secret.0);
        payload
    }

    fn from_payload(payload: &[u8]) -> Result<Self, TicketError> {
        let mut rest = payload;
        let [count] = take(&mut rest)?;
        if !(1..=MAX_ADDRESSES).contains(&usize::from(count)) {
            return Err(TicketError::Malformed("number of addresses"));
        }
        let addresses = (0..count)
            .map(|_| take_address(&mut rest))
            .collect::<Result<Vec<_>, _>>()?;
        let fingerprint = Fingerprint(take(&mut rest)?);
        let secret = Secret(take(&mut rest)?);
        if !rest.is_empty() {
            return Err(TicketError::Malformed("bytes behind its end"));
        }
        Self::new(addresses, fingerprint, secret)
    }
}

fn push_address(payload: &mut Vec<u8>, address: &SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            payload.push(ADDRESS_V4);
            payload.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            payload.push(ADDRESS_V6);
            payload.extend_from_slice(&ip.octets());
        }
    }
    payload.extend_from_slice(&address.port().to_be_bytes());
}

fn take_address(rest: &mut &[u8]) -> Result<SocketAddr, TicketError> {
    let [kind] = take(rest)?;
    let ip: IpAddr = match kind {
        ADDRESS_V4 => Ipv4Addr::from(take::<4>(rest)?).into(),
        ADDRESS_V6 => Ipv6Addr::from(take::<16>(rest)?).into(),
        _ => return Err(TicketError::Malformed("kind of an address")),
    };
    let port = u16::from_be_bytes(take(rest)?);
    if ip.is_unspecified() || ip.is_multicast() || port == 0 {
        return Err(TicketError::Malformed("an address that no host has"));
    }
    Ok(SocketAddr::new(ip, port))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TicketError> {
    let (field, behind) = rest
        .split_first_chunk()
        .ok_or(TicketError::Malformed("it ends too early"))?;
    *rest = behind;
    Ok(*field)
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::encode(PREFIX, &self.payload()))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(word: &str) -> Result<Self, TicketError> {
        let word = word.trim();
        let payload = text::decode(PREFIX, word, MAX_PAYLOAD).map_err(|error| match error {
            DecodeError::OtherPrefix if names_other_version(word) => TicketError::OtherVersion,
            DecodeError::OtherPrefix => TicketError::NotATicket,
            DecodeError::TooLong | DecodeError::Damaged => TicketError::Damaged,
        })?;
        Self::from_payload(&payload)
    }
}

/// Whether `word` begins like `crxfer2-`.
fn names_other_version(word: &str) -> bool {
    let Some((start, _)) = word.split_once('-') else {
        return false;
    };
    let Some(family) = start.get(..FAMILY.len()) else {
        return false;
    };
    let version = &start[FAMILY.len()..];
    family.eq_ignore_ascii_case(FAMILY)
        && !version.is_empty()
        && version.bytes().all(|byte| byte.is_ascii_digit())
}

/// What a destination gives out with its tickets. Compares in constant time and is never printed,
/// except as part of a ticket.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new one from the kernel's random numbers.
    ///
    /// # Panics
    /// When the kernel gives none: there is nothing safe to do then.
    pub fn generate() -> Self {
        let mut bytes = [0; 32];
        fill_random(&mut bytes);
        Self(bytes)
    }

    /// The secret with these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

pub(crate) fn fill_random(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("the kernel gives no random numbers: {error}"),
        }
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        equal_in_constant_time(self.0, other.0)
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// BLAKE3's hash type compares in constant time.
pub(crate) fn equal_in_constant_time(one: [u8; 32], other: [u8; 32]) -> bool {
    blake3::Hash::from_bytes(one) == blake3::Hash::from_bytes(other)
}

/// Which side proves that it knows a secret. The two proofs of one session differ, so that none can
/// be sent back to the side that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host that sends, holder of the ticket.
    Source,
    /// The host that receives, maker of the ticket.
    Destination,
}

/// Proof that `role` knows `secret`, good for the one TLS session with this `binding` only: keyed
/// BLAKE3 (key: the secret) of `"crxfer ticket proof 1"`, one byte for the role (1 source,
/// 2 destination) and the 32 bytes of the binding.
pub fn proof(secret: &Secret, role: Role, binding: &[u8; 32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&secret.0);
    hasher.update(b"crxfer ticket proof 1");
    hasher.update(match role {
        Role::Source => &[1],
        Role::Destination => &[2],
    });
    hasher.update(binding);
    *hasher.finalize().as_bytes()
}

/// Whether `found`, as it came from the peer, is its proof. Takes the same time for every wrong one
/// of the right length.
pub fn verify_proof(secret: &Secret, role: Role, binding: &[u8; 32], found: &[u8]) -> bool {
    let Ok(found) = <[u8; 32]>::try_from(found) else {
        return false;
    };
    equal_in_constant_time(proof(secret, role, binding), found)
}

#[cfg(test)]
mod tests;
