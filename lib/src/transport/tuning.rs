//! Every knob of QUIC in one place, with its reason. What was measured is in docs/quic-tuning.md.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::{AckFrequencyConfig, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::socket;

/// Smallest UDP payload that every path must carry (RFC 9000): where each connection begins.
const MIN_PACKET: u16 = 1200;

/// Largest UDP payload with segmentation offload. quinn hands the kernel up to 10 packets as one
/// buffer, the kernel takes 65,507 bytes at once and refuses more, and quinn takes that refusal for
/// a lost packet: with larger packets nothing arrives.
const MAX_PACKET_OFFLOAD: u16 = 6500;

/// Largest UDP payload without segmentation offload (loopback has 65,536 bytes).
const MAX_PACKET_PLAIN: u16 = 65_000;

/// Knobs of a connection that a user or a measurement may turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Default: CUBIC.
    pub congestion_control: CongestionControl,
    /// UDP segmentation offload (GSO). Default on; off helps only where a driver breaks it, and
    /// more than doubles the processor time with 1,472-byte packets.
    pub segmentation_offload: bool,
    /// Largest UDP payload to try, in bytes, 1200 to 65,000; with segmentation offload at most
    /// 6,500. The path's own limit is found by probing. Default 6,500.
    pub max_packet_bytes: u16,
    /// Bytes that may be on their way to us or wait here unread, for one stream and for the whole
    /// connection. Default 16 MiB: 1 Gb/s × 128 ms or 10 Gb/s × 12 ms. All of it can become
    /// resident memory when the application stops reading.
    pub receive_window: u32,
    /// Bytes that we keep until the peer has them. Default 16 MiB, resident while sending.
    pub send_window: u32,
    /// Kernel buffer of the socket in each direction, in bytes. Default 16 MiB, the receive window:
    /// then no packet is dropped in the receiving host while its program writes to a file or waits
    /// for a processor. What the system's limit (`net.core.rmem_max`) does not allow is left out
    /// silently, except for root, who may pass it.
    pub socket_buffer: usize,
    /// Packets after which the peer acknowledges. Default 10 (QUIC's own is 2): no difference in
    /// bytes or time was seen between hosts that receive in batches anyway.
    pub packets_per_ack: u32,
    /// Silence after which a connection counts as lost. Default 15 s; keep-alives are sent after a
    /// sixth of it, so a long freeze or restore does not end a connection.
    pub idle_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            congestion_control: CongestionControl::Cubic,
            segmentation_offload: true,
            max_packet_bytes: MAX_PACKET_OFFLOAD,
            receive_window: 16 << 20,
            send_window: 16 << 20,
            socket_buffer: 16 << 20,
            packets_per_ack: 10,
            idle_timeout: Duration::from_secs(15),
        }
    }
}

/// How a sender finds the rate that the path carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CongestionControl {
    /// RFC 9438: fills the queue until packets are lost. Right inside a data centre.
    #[default]
    Cubic,
    /// BBR (version 1, experimental in quinn): estimates the rate; for paths that lose packets
    /// without being full, such as Wi-Fi. On a full 1 Gb/s link 13 % slower than TCP, and a
    /// quarter and more of what it sends is lost there.
    Bbr,
    /// RFC 9002's own: slower to regain speed than CUBIC.
    NewReno,
}

/// A name that is none of a congestion control.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no congestion control is called \"{0}\": there are cubic, bbr and newreno")]
pub struct UnknownCongestionControl(pub String);

impl FromStr for CongestionControl {
    type Err = UnknownCongestionControl;

    fn from_str(name: &str) -> Result<Self, UnknownCongestionControl> {
        match name {
            "cubic" => Ok(Self::Cubic),
            "bbr" => Ok(Self::Bbr),
            "newreno" => Ok(Self::NewReno),
            _ => Err(UnknownCongestionControl(name.to_owned())),
        }
    }
}

impl fmt::Display for CongestionControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
            Self::NewReno => "newreno",
        })
    }
}

impl Options {
    /// What the endpoint states to its peers and sizes its receive buffers by.
    pub(super) fn endpoint_config(&self) -> EndpointConfig {
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(self.packet_limit())
            .expect("at least 1200 bytes");
        config
    }

    /// The settings for a connection with the host at `remote`.
    pub(super) fn transport_config(&self, remote: SocketAddr) -> Arc<TransportConfig> {
        let mut config = TransportConfig::default();
        self.set_windows(&mut config);
        self.set_packets(&mut config, remote);
        self.set_timing(&mut config);
        Arc::new(config)
    }

    fn set_windows(&self, config: &mut TransportConfig) {
        // One stream may use the connection's whole window: with one bulk stream a smaller one is
        // a limit without a purpose, with several their sum is held by the connection's.
        config.stream_receive_window(VarInt::from_u32(self.receive_window));
        config.receive_window(VarInt::from_u32(self.receive_window));
        config.send_window(self.send_window.into());
        // Round-robin between streams would cut frames into packet-sized pieces of all streams.
        config.send_fairness(false);
        // What a peer may open: one control stream, a few bulk streams.
        config.max_concurrent_bidi_streams(VarInt::from_u32(4));
        config.max_concurrent_uni_streams(VarInt::from_u32(16));
        // Datagrams are not used: a peer cannot make us keep any.
        config.datagram_receive_buffer_size(None);
    }

    fn set_packets(&self, config: &mut TransportConfig, remote: SocketAddr) {
        let limit = self.packet_limit();
        let upper = socket::largest_payload(remote).map_or(limit, |route| route.min(limit));
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(upper.max(MIN_PACKET));
        // The last steps of the search cost a round trip each and bring less than this. On a
        // 1,500-byte path it must still reach the top: 3 % of the rate lie between 1,438 and 1,472.
        discovery.minimum_change(if upper > 2000 { 200 } else { 20 });
        config.initial_mtu(MIN_PACKET);
        config.mtu_discovery_config(Some(discovery));
        config.enable_segmentation_offload(self.segmentation_offload);
        config.congestion_controller_factory(self.controller());
        if self.packets_per_ack > 2 {
            let mut frequency = AckFrequencyConfig::default();
            frequency.ack_eliciting_threshold(VarInt::from_u32(self.packets_per_ack - 1));
            config.ack_frequency_config(Some(frequency));
        }
    }

    fn set_timing(&self, config: &mut TransportConfig) {
        config.keep_alive_interval(Some(self.idle_timeout / 6));
        let idle = self
            .idle_timeout
            .try_into()
            .expect("an idle timeout of less than 2^62 ms");
        config.max_idle_timeout(Some(idle));
    }

    fn packet_limit(&self) -> u16 {
        let most = if self.segmentation_offload {
            MAX_PACKET_OFFLOAD
        } else {
            MAX_PACKET_PLAIN
        };
        self.max_packet_bytes.clamp(MIN_PACKET, most)
    }

    fn controller(&self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self.congestion_control {
            CongestionControl::Cubic => Arc::new(CubicConfig::default()),
            CongestionControl::Bbr => Arc::new(BbrConfig::default()),
            CongestionControl::NewReno => Arc::new(NewRenoConfig::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_of_packets_stay_below_what_the_kernel_takes() {
        let large = Options {
            max_packet_bytes: u16::MAX,
            ..Options::default()
        };
        assert!(u32::from(large.packet_limit()) * 10 <= 65_507);
        let plain = Options {
            segmentation_offload: false,
            ..large
        };
        assert_eq!(plain.packet_limit(), MAX_PACKET_PLAIN);
        let tiny = Options {
            max_packet_bytes: 0,
            ..Options::default()
        };
        assert_eq!(tiny.packet_limit(), MIN_PACKET);
    }

    #[test]
    fn names_of_congestion_controls_come_back() {
        for control in [
            CongestionControl::Cubic,
            CongestionControl::Bbr,
            CongestionControl::NewReno,
        ] {
            assert_eq!(control.to_string().parse(), Ok(control));
        }
        assert!("reno".parse::<CongestionControl>().is_err());
    }
}
