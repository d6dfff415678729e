//! QUIC between two hosts: endpoints, keys, streams. Bytes in, bytes out; what they mean is decided
//! in the session.
//!
//! ```text
//! destination                                   source
//! Server::bind ── accept ─ Incoming::complete ──┬── connect
//!                                          Connection
//!               control: one bidirectional stream, messages with a length before them
//!               bulk:    a few unidirectional streams of page frames
//! ```
//!
//! Both sides always show a certificate and sign with its key (TLS 1.3, ALPN `crxfer/1`). A
//! certificate is only the wrapping of a key, and a key's [`Fingerprint`] is the host's name: there
//! are no certificate authorities, validity periods or host names. The source always knows whom it
//! connects to (from the ticket or from its configuration). The destination either pins its peers
//! ([`Trust::Pinned`]) or lets the session ask for the ticket's secret ([`Trust::Anyone`] and
//! [`crate::ticket::proof`] over [`Connection::binding`]).
//!
//! No early data and no session resumption: nothing can be replayed, and every connection has a
//! binding of its own.

mod addresses;
mod connect;
mod connection;
mod error;
mod identity;
mod reset;
mod server;
mod socket;
mod streams;
mod tls;
mod tuning;

pub use self::connect::{Attempt, AttemptError, ConnectError, connect};
pub use self::connection::{Connection, PathReport};
pub use self::error::{CloseCode, TransportError};
pub use self::identity::{Identity, IdentityError};
pub use self::server::{AcceptError, BindError, Incoming, Server};
pub use self::streams::{BulkReceiver, BulkSender, ControlReceiver, ControlSender};
pub use self::tls::Trust;
pub use self::tuning::{CongestionControl, Options, UnknownCongestionControl};
pub use crate::identity::Fingerprint;

/// The application protocol and its major version, as negotiated in the TLS handshake.
pub const ALPN: &[u8] = b"crxfer/1";

/// The longest a handshake may take, on either side.
pub const HANDSHAKE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

#[cfg(test)]
mod tests;
