//! What can go wrong on a connection, sorted by whose fault it is.

use std::fmt;

use quinn::{ConnectionError, ReadError, ReadExactError, TransportErrorCode, VarInt, WriteError};

/// Why one side ends a connection: crosses the wire as QUIC's application error code.
///
/// Numbers are never given a second meaning. Unknown ones are kept: a newer peer may have more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseCode {
    /// 0: the peer's process dropped the connection without a word.
    Unspecified,
    /// 1: everything is done.
    Done,
    /// 2: a person or the embedding program stopped it.
    Cancelled,
    /// 3: too many transfers at once; try again later.
    Busy,
    /// 4: the proof of the ticket is wrong or missing.
    Unauthorized,
    /// 5: no protocol version in common.
    Incompatible,
    /// 6: the other side broke the protocol.
    ProtocolViolation,
    /// 7: content is not what its digest says.
    ContentMismatch,
    /// 8: a limit that the user set.
    LimitExceeded,
    /// 9: this host's own trouble, such as a full disk.
    LocalFailure,
    /// 10: the destination is being stopped.
    ShuttingDown,
    /// A number that this version does not know.
    Other(u64),
}

impl CloseCode {
    const KNOWN: [Self; 11] = [
        Self::Unspecified,
        Self::Done,
        Self::Cancelled,
        Self::Busy,
        Self::Unauthorized,
        Self::Incompatible,
        Self::ProtocolViolation,
        Self::ContentMismatch,
        Self::LimitExceeded,
        Self::LocalFailure,
        Self::ShuttingDown,
    ];

    /// Its number on the wire.
    pub fn number(self) -> u64 {
        match self {
            Self::Other(number) => number,
            known => Self::KNOWN
                .iter()
                .position(|code| *code == known)
                .unwrap_or(0) as u64,
        }
    }

    /// The code with this number.
    pub fn from_number(number: u64) -> Self {
        let place = usize::try_from(number).unwrap_or(usize::MAX);
        Self::KNOWN
            .get(place)
            .copied()
            .unwrap_or(Self::Other(number))
    }

    pub(super) fn to_varint(self) -> VarInt {
        VarInt::from_u64(self.number()).unwrap_or(VarInt::MAX)
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unspecified => f.write_str("no reason given"),
            Self::Done => f.write_str("done"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Busy => f.write_str("busy"),
            Self::Unauthorized => f.write_str("not authorized"),
            Self::Incompatible => f.write_str("incompatible version"),
            Self::ProtocolViolation => f.write_str("protocol violation"),
            Self::ContentMismatch => f.write_str("content does not match its digest"),
            Self::LimitExceeded => f.write_str("limit exceeded"),
            Self::LocalFailure => f.write_str("failure on that host"),
            Self::ShuttingDown => f.write_str("shutting down"),
            Self::Other(number) => write!(f, "reason {number}"),
        }
    }
}

/// Why a connection or a stream of it ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// Nothing came from the peer for the idle timeout: host, network or process is gone.
    #[error("the other host does not answer any more")]
    Timeout,
    /// The peer's process was restarted and does not know the connection.
    #[error("the other host lost the connection (was crxfer restarted there?)")]
    Reset,
    /// The peer ended the connection.
    #[error("the other host ended the connection: {code}{}", Because(reason))]
    PeerClosed {
        /// Why.
        code: CloseCode,
        /// In words, at most 200 printable characters.
        reason: String,
    },
    /// The peer ended one stream only.
    #[error("the other host stopped a stream: {0}")]
    StreamStopped(CloseCode),
    /// The peer does not accept our key. Shows on first use of a connection, not in `connect`:
    /// the client's part of the handshake is over before the server has seen the client's key.
    #[error("the other host does not know this host's key: pin this host's fingerprint there")]
    KeyRefused,
    /// The peer speaks QUIC but not this version of crxfer.
    #[error("the other host speaks another version of crxfer: use the same on both")]
    Incompatible,
    /// The peer announced a message that is longer than it may be.
    #[error("the other host sent a message of {length} bytes where at most {max} are allowed")]
    MessageTooLong {
        /// Bytes announced.
        length: u64,
        /// Bytes allowed.
        max: usize,
    },
    /// A stream ended inside a message or frame.
    #[error("the other host ended a stream in the middle of a message")]
    CutShort,
    /// The peer broke the rules of QUIC or TLS.
    #[error("the connection broke: {0}")]
    Protocol(String),
    /// This side ended the connection before.
    #[error("the connection was closed on this side")]
    ClosedHere,
    /// The API was used wrongly, such as writing to a finished stream.
    #[error("misuse of the transport: {0}")]
    Misuse(&'static str),
}

impl TransportError {
    /// Whether a new connection may succeed with nothing changed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Timeout | Self::Reset => true,
            Self::PeerClosed { code, .. } | Self::StreamStopped(code) => matches!(
                code,
                CloseCode::Unspecified | CloseCode::Busy | CloseCode::ShuttingDown
            ),
            _ => false,
        }
    }
}

/// `": words"`, or nothing where there are none.
struct Because<'a>(&'a str);

impl fmt::Display for Because<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.0)
        }
    }
}

/// Text of the peer for a terminal: its control characters could move the cursor or worse.
pub(super) fn printable(text: &[u8]) -> String {
    const MAX_CHARS: usize = 200;
    String::from_utf8_lossy(text)
        .chars()
        .take(MAX_CHARS)
        .map(|c| if is_plain(c) { c } else { '\u{fffd}' })
        .collect()
}

/// Controls, and the marks that turn the direction of writing, are not plain.
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// TLS alerts as QUIC carries them (RFC 8446, section 6).
const ALERT_ACCESS_DENIED: u8 = 49;
const ALERT_NO_APPLICATION_PROTOCOL: u8 = 120;

/// Whether this is what a TLS stack says that has no application protocol in common.
pub(super) fn is_alpn_mismatch(code: TransportErrorCode) -> bool {
    code == TransportErrorCode::crypto(ALERT_NO_APPLICATION_PROTOCOL)
}

impl From<ConnectionError> for TransportError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::Timeout,
            ConnectionError::Reset => Self::Reset,
            ConnectionError::VersionMismatch => Self::Incompatible,
            ConnectionError::LocallyClosed => Self::ClosedHere,
            ConnectionError::ApplicationClosed(close) => Self::PeerClosed {
                code: CloseCode::from_number(close.error_code.into_inner()),
                reason: printable(&close.reason),
            },
            ConnectionError::ConnectionClosed(close) => {
                if close.error_code == TransportErrorCode::crypto(ALERT_ACCESS_DENIED) {
                    Self::KeyRefused
                } else if is_alpn_mismatch(close.error_code) {
                    Self::Incompatible
                } else {
                    Self::Protocol(printable(close.to_string().as_bytes()))
                }
            }
            ConnectionError::TransportError(error) if is_alpn_mismatch(error.code) => {
                Self::Incompatible
            }
            ConnectionError::TransportError(error) => {
                Self::Protocol(printable(error.to_string().as_bytes()))
            }
            ConnectionError::CidsExhausted => {
                Self::Protocol("no connection identifiers left".to_owned())
            }
        }
    }
}

impl From<ReadError> for TransportError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => {
                Self::StreamStopped(CloseCode::from_number(code.into_inner()))
            }
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::ClosedStream => Self::Misuse("reading a stream that was given up"),
            ReadError::IllegalOrderedRead => Self::Misuse("ordered reading after unordered"),
            ReadError::ZeroRttRejected => Self::Protocol("early data".to_owned()),
        }
    }
}

impl From<ReadExactError> for TransportError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => Self::CutShort,
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

impl From<WriteError> for TransportError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => {
                Self::StreamStopped(CloseCode::from_number(code.into_inner()))
            }
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::ClosedStream => Self::Misuse("writing to a finished stream"),
            WriteError::ZeroRttRejected => Self::Protocol("early data".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_codes_keep_their_numbers() {
        for (number, code) in CloseCode::KNOWN.iter().enumerate() {
            assert_eq!(code.number(), number as u64);
            assert_eq!(CloseCode::from_number(number as u64), *code);
        }
        assert_eq!(CloseCode::Unauthorized.number(), 4);
        assert_eq!(CloseCode::ShuttingDown.number(), 10);
        assert_eq!(CloseCode::from_number(11), CloseCode::Other(11));
        assert_eq!(CloseCode::from_number(u64::MAX), CloseCode::Other(u64::MAX));
        assert_eq!(CloseCode::Other(u64::MAX).to_varint(), VarInt::MAX);
    }

    #[test]
    fn text_of_the_peer_cannot_steer_the_terminal() {
        assert_eq!(printable(b"disk full"), "disk full");
        assert_eq!(
            printable(b"a\x1b[2Jb\nc\xff"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}"
        );
        assert_eq!(printable("a\u{202e}b".as_bytes()), "a\u{fffd}b");
        assert_eq!(printable(&[b'x'; 5000]).len(), 200);
    }

    #[test]
    fn only_passing_trouble_is_worth_a_retry() {
        let closed = |code| TransportError::PeerClosed {
            code,
            reason: String::new(),
        };
        assert!(TransportError::Timeout.is_retryable());
        assert!(closed(CloseCode::Busy).is_retryable());
        assert!(!closed(CloseCode::Unauthorized).is_retryable());
        assert!(!TransportError::KeyRefused.is_retryable());
        assert_eq!(
            closed(CloseCode::Busy).to_string(),
            "the other host ended the connection: busy"
        );
    }
}
