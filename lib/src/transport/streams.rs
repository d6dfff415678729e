//! Streams of a connection: messages with a length before them, and plain bytes.

use bytes::Bytes;
use quinn::{ReadExactError, RecvStream, SendStream};

use super::{CloseCode, TransportError};

/// A message grows to the length that its sender states as its bytes come, in steps of this.
const MESSAGE_STEP: usize = 64 << 10;

/// Our half of the control stream: messages, each behind its length (u32, little-endian).
#[derive(Debug)]
pub struct ControlSender {
    inner: SendStream,
}

impl ControlSender {
    pub(super) fn new(inner: SendStream) -> Self {
        Self { inner }
    }

    /// Sends one message. Cancelling this in the middle leaves half a message in the stream: after
    /// that the connection can only be closed.
    pub async fn write_message(&mut self, message: &[u8]) -> Result<(), TransportError> {
        let length = u32::try_from(message.len())
            .map_err(|_| TransportError::Misuse("a message of 4 GiB or more"))?;
        // One write, so that length and message leave in one packet.
        let mut framed = Vec::with_capacity(4 + message.len());
        framed.extend_from_slice(&length.to_le_bytes());
        framed.extend_from_slice(message);
        Ok(self.inner.write_chunk(framed.into()).await?)
    }

    /// Says that no further message comes.
    pub fn finish(&mut self) -> Result<(), TransportError> {
        self.inner
            .finish()
            .map_err(|_| TransportError::Misuse("finishing a stream twice"))
    }
}

/// The peer's half of the control stream.
#[derive(Debug)]
pub struct ControlReceiver {
    inner: RecvStream,
}

impl ControlReceiver {
    pub(super) fn new(inner: RecvStream) -> Self {
        Self { inner }
    }

    /// The next message, at most `max` bytes long; `None` when the peer has finished. Not to be
    /// cancelled in the middle: keep it in a task of its own.
    pub async fn read_message(&mut self, max: usize) -> Result<Option<Vec<u8>>, TransportError> {
        let mut prefix = [0; 4];
        match self.inner.read_exact(&mut prefix).await {
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            result => result?,
        }
        let stated = u32::from_le_bytes(prefix);
        let length = match usize::try_from(stated) {
            Ok(length) if length <= max => length,
            _ => {
                return Err(TransportError::MessageTooLong {
                    length: stated.into(),
                    max,
                });
            }
        };
        let mut message = Vec::with_capacity(length.min(MESSAGE_STEP));
        while message.len() < length {
            let part = (length - message.len()).min(MESSAGE_STEP);
            let chunk = self.inner.read_chunk(part, true).await?;
            message.extend_from_slice(&chunk.ok_or(TransportError::CutShort)?.bytes);
        }
        Ok(Some(message))
    }
}

/// A stream of page frames to the peer.
#[derive(Debug)]
pub struct BulkSender {
    inner: SendStream,
}

impl BulkSender {
    pub(super) fn new(inner: SendStream) -> Self {
        Self { inner }
    }

    /// Sends `bytes` without copying them: they are held until the peer has them.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        Ok(self.inner.write_chunk(bytes).await?)
    }

    /// Sends all of `parts` in order, such as header and payload, without copying them. Each part
    /// is empty afterwards.
    pub async fn write_parts(&mut self, parts: &mut [Bytes]) -> Result<(), TransportError> {
        Ok(self.inner.write_all_chunks(parts).await?)
    }

    /// Says that nothing further comes. What was written is still delivered.
    pub fn finish(&mut self) -> Result<(), TransportError> {
        self.inner
            .finish()
            .map_err(|_| TransportError::Misuse("finishing a stream twice"))
    }

    /// After [`BulkSender::finish`]: waits until the peer has acknowledged every byte. That is its
    /// QUIC stack's word, not its application's.
    pub async fn delivered(&mut self) -> Result<(), TransportError> {
        match self.inner.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(TransportError::StreamStopped(CloseCode::from_number(
                code.into_inner(),
            ))),
            Err(quinn::StoppedError::ConnectionLost(error)) => Err(error.into()),
            Err(quinn::StoppedError::ZeroRttRejected) => {
                Err(TransportError::Protocol("early data".to_owned()))
            }
        }
    }

    /// Gives the stream up: the peer drops what it has not read.
    pub fn reset(&mut self, code: CloseCode) {
        // Fails only if the stream has ended already.
        let _ = self.inner.reset(code.to_varint());
    }
}

/// A stream of page frames from the peer.
#[derive(Debug)]
pub struct BulkReceiver {
    inner: RecvStream,
}

impl BulkReceiver {
    pub(super) fn new(inner: RecvStream) -> Self {
        Self { inner }
    }

    /// The next bytes, at most `max`, without copying; `None` at the end. May be cancelled.
    pub async fn read(&mut self, max: usize) -> Result<Option<Bytes>, TransportError> {
        Ok(self
            .inner
            .read_chunk(max, true)
            .await?
            .map(|chunk| chunk.bytes))
    }

    /// The next bytes, as many as there are and `parts` takes, each part as it came in a packet;
    /// returns how many parts were filled, `None` at the end. May be cancelled.
    pub async fn read_parts(
        &mut self,
        parts: &mut [Bytes],
    ) -> Result<Option<usize>, TransportError> {
        Ok(self.inner.read_chunks(parts).await?)
    }

    /// Fills `buffer`; `false` if the stream ended before its first byte.
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<bool, TransportError> {
        match self.inner.read_exact(buffer).await {
            Ok(()) => Ok(true),
            Err(ReadExactError::FinishedEarly(0)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The next `len` bytes; the stream must not end before. `len` must be within a limit.
    pub async fn read_vec(&mut self, len: usize) -> Result<Vec<u8>, TransportError> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let chunk = self.inner.read_chunk(len - bytes.len(), true).await?;
            bytes.extend_from_slice(&chunk.ok_or(TransportError::CutShort)?.bytes);
        }
        Ok(bytes)
    }

    /// Tells the peer to stop sending.
    pub fn stop(&mut self, code: CloseCode) {
        // Fails only if the stream has ended already.
        let _ = self.inner.stop(code.to_varint());
    }
}
