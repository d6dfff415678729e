//! One connection between two hosts.

use std::net::SocketAddr;
use std::time::Duration;

use quinn::Endpoint;
use rustls::pki_types::CertificateDer;
use tokio::time::{sleep, timeout};

use super::{
    BulkReceiver, BulkSender, CloseCode, ControlReceiver, ControlSender, Fingerprint,
    TransportError, socket, tls,
};

/// Separates our use of the TLS exporter from any other.
const BINDING_LABEL: &[u8] = b"EXPORTER-crxfer-ticket-1";

/// Before bulk streams (0): an acknowledgement must not wait behind megabytes of pages.
const CONTROL_PRIORITY: i32 = 1;

/// How long [`Connection::close_and_tell`] waits for its packet to leave.
const CLOSE_TIME: Duration = Duration::from_millis(200);

/// A connection with a host whose key is known. Clones are the same connection; it ends when the
/// last clone and the last stream are dropped, better by [`Connection::close`].
#[derive(Clone, Debug)]
pub struct Connection {
    inner: quinn::Connection,
    peer: Fingerprint,
    binding: [u8; 32],
    /// A client's connection has a socket of its own.
    _endpoint: Option<Endpoint>,
}

/// How the path does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathReport {
    /// Round trip, smoothed.
    pub round_trip: Duration,
    /// UDP payload of a full packet now, in bytes.
    pub packet_bytes: u16,
    /// Bytes that may be on their way unacknowledged.
    pub congestion_window: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Of those, counted as lost.
    pub lost_packets: u64,
    /// Times that the congestion control slowed down.
    pub congestion_events: u64,
}

impl Connection {
    pub(super) fn new(
        inner: quinn::Connection,
        endpoint: Option<Endpoint>,
    ) -> Result<Self, TransportError> {
        let peer = peer_of(&inner)
            .ok_or_else(|| TransportError::Protocol("the peer showed no key".to_owned()))?;
        let mut binding = [0; 32];
        inner
            .export_keying_material(&mut binding, BINDING_LABEL, b"")
            .map_err(|_| TransportError::Protocol("TLS gives no binding".to_owned()))?;
        Ok(Self {
            inner,
            peer,
            binding,
            _endpoint: endpoint,
        })
    }

    /// The key of the host at the other end.
    pub fn peer(&self) -> Fingerprint {
        self.peer
    }

    /// Its address.
    pub fn remote_address(&self) -> SocketAddr {
        socket::canonical(self.inner.remote_address())
    }

    /// Bytes that only the two ends of this TLS session know, equal on both and different for every
    /// session: what a ticket's proof is bound to.
    pub fn binding(&self) -> [u8; 32] {
        self.binding
    }

    /// Opens the control stream. The peer sees it when the first message is written.
    pub async fn open_control(&self) -> Result<(ControlSender, ControlReceiver), TransportError> {
        let (send, receive) = self.inner.open_bi().await?;
        // Cannot fail: the stream was just made.
        let _ = send.set_priority(CONTROL_PRIORITY);
        Ok((ControlSender::new(send), ControlReceiver::new(receive)))
    }

    /// Waits for the control stream that the peer opens.
    pub async fn accept_control(&self) -> Result<(ControlSender, ControlReceiver), TransportError> {
        let (send, receive) = self.inner.accept_bi().await?;
        let _ = send.set_priority(CONTROL_PRIORITY);
        Ok((ControlSender::new(send), ControlReceiver::new(receive)))
    }

    /// Opens a stream for page frames. The peer sees it when the first bytes are written.
    pub async fn open_bulk(&self) -> Result<BulkSender, TransportError> {
        Ok(BulkSender::new(self.inner.open_uni().await?))
    }

    /// Waits for a stream of page frames that the peer opens.
    pub async fn accept_bulk(&self) -> Result<BulkReceiver, TransportError> {
        Ok(BulkReceiver::new(self.inner.accept_uni().await?))
    }

    /// Bytes of UDP payload (sent, received) since the connection began: all that QUIC adds is in
    /// it, the IP and UDP headers (28 or 48 bytes a packet) are not.
    pub fn wire_bytes(&self) -> (u64, u64) {
        let stats = self.inner.stats();
        (stats.udp_tx.bytes, stats.udp_rx.bytes)
    }

    /// How the path does.
    pub fn path(&self) -> PathReport {
        let path = self.inner.stats().path;
        PathReport {
            round_trip: path.rtt,
            packet_bytes: path.current_mtu,
            congestion_window: path.cwnd,
            sent_packets: path.sent_packets,
            lost_packets: path.lost_packets,
            congestion_events: path.congestion_events,
        }
    }

    /// Ends the connection; what was not acknowledged yet is dropped. The `reason` is for the
    /// person at the other end. Returns at once: a process that exits next must use
    /// [`Connection::close_and_tell`].
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.inner.close(code.to_varint(), reason.as_bytes());
    }

    /// Ends the connection and waits until the packet that says so has left, at most 200 ms.
    pub async fn close_and_tell(&self, code: CloseCode, reason: &str) {
        // A closed connection sends nothing but that packet (quinn does not count the frame).
        let before = self.inner.stats().udp_tx.datagrams;
        self.close(code, reason);
        let left = async {
            while self.inner.stats().udp_tx.datagrams == before {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let _ = timeout(CLOSE_TIME, left).await;
    }

    /// Waits for the end of the connection and says why.
    pub async fn closed(&self) -> TransportError {
        self.inner.closed().await.into()
    }

    #[cfg(test)]
    pub(super) fn raw(&self) -> &quinn::Connection {
        &self.inner
    }

    /// Why the connection ended, if it has.
    pub fn close_reason(&self) -> Option<TransportError> {
        self.inner.close_reason().map(Into::into)
    }
}

/// The key that TLS has verified; both sides must show one, so there always is.
fn peer_of(connection: &quinn::Connection) -> Option<Fingerprint> {
    let shown = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    tls::fingerprint_of(shown.first()?)
}
