//! What CRIU says on a streamer's socket, without I/O.

use std::collections::BTreeSet;

use crxfer_proto::criu::streamer::{ImgStreamerReplyEntry, ImgStreamerRequestEntry};
use prost::Message as _;

use super::StreamerError;
use crate::delta::FileName;

/// Longest request, in bytes: names have at most 255, the rest is framing.
pub const MAX_REQUEST_BYTES: u32 = 1024;

/// Most requests on one connection: about as many files as an image directory may have.
pub const MAX_IMAGES: u64 = 1 << 20;

/// Which dialogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// CRIU dumps: a request is followed by a pipe.
    Capture,
    /// CRIU restores: a request is answered, and followed by a pipe if the image exists.
    Serve,
}

/// What has to happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// At most this many bytes must be read and given to [`Requests::take_bytes`]. Not one more: the
    /// byte behind them carries a descriptor, which a plain read would lose.
    Bytes(usize),
    /// [`Requests::answer`] must be called.
    Answer,
    /// One byte with a descriptor must be read; then [`Requests::take_pipe`].
    Pipe,
}

/// One connection of CRIU.
///
/// Drive it by [`Requests::want`]: calling another method than the one it names is a mistake of the
/// caller's, and panics.
#[derive(Debug)]
pub struct Requests {
    role: Role,
    state: State,
    buffer: Vec<u8>,
    number: u64,
    /// Images that were asked for; only of a dump, where each may come once.
    seen: BTreeSet<FileName>,
}

#[derive(Debug)]
enum State {
    Length,
    Body(usize),
    Asked(FileName),
    Pipe(FileName),
}

impl Requests {
    /// A connection that begins.
    pub fn new(role: Role) -> Self {
        Self {
            role,
            state: State::Length,
            buffer: Vec::new(),
            number: 1,
            seen: BTreeSet::new(),
        }
    }

    /// What has to happen next.
    pub fn want(&self) -> Want {
        match &self.state {
            State::Length => Want::Bytes(4 - self.buffer.len()),
            State::Body(length) => Want::Bytes(length - self.buffer.len()),
            State::Asked(_) => Want::Answer,
            State::Pipe(_) => Want::Pipe,
        }
    }

    /// Takes bytes of a request; the image's name once it is whole.
    pub fn take_bytes(&mut self, bytes: &[u8]) -> Result<Option<&FileName>, StreamerError> {
        let Want::Bytes(wanted) = self.want() else {
            panic!("no bytes were asked for")
        };
        assert!(bytes.len() <= wanted, "more bytes than were asked for");
        self.buffer.extend_from_slice(bytes);
        if bytes.len() < wanted {
            return Ok(None);
        }
        match self.state {
            State::Length => self.take_length()?,
            _ => self.take_body()?,
        }
        Ok(match &self.state {
            State::Asked(name) | State::Pipe(name) => Some(name),
            State::Length | State::Body(_) => None,
        })
    }

    fn take_length(&mut self) -> Result<(), StreamerError> {
        let bytes = self.buffer.as_slice().try_into().expect("four bytes");
        let stated = u32::from_le_bytes(bytes);
        let number = self.number;
        if number > MAX_IMAGES {
            return Err(StreamerError::TooMany(MAX_IMAGES));
        }
        // A request without a name has no bytes at all.
        if !(1..=MAX_REQUEST_BYTES).contains(&stated) {
            return Err(StreamerError::Length { number, stated });
        }
        self.buffer.clear();
        self.state = State::Body(usize::try_from(stated).expect("is small"));
        Ok(())
    }

    fn take_body(&mut self) -> Result<(), StreamerError> {
        let number = self.number;
        let wrong = |what| StreamerError::Request { number, what };
        let request = ImgStreamerRequestEntry::decode(self.buffer.as_slice())
            .map_err(|error| wrong(error.to_string()))?;
        let name = request
            .filename
            .ok_or_else(|| wrong("it names no image".to_owned()))?;
        let name = FileName::new(name).map_err(|error| StreamerError::Name { number, error })?;
        self.buffer.clear();
        self.state = match self.role {
            Role::Serve => State::Asked(name),
            Role::Capture if !self.seen.insert(name.clone()) => {
                let name = name.to_string();
                return Err(StreamerError::Twice { number, name });
            }
            Role::Capture => State::Pipe(name),
        };
        Ok(())
    }

    /// Says whether the image exists; the bytes of the reply.
    pub fn answer(&mut self, exists: bool) -> Vec<u8> {
        match std::mem::replace(&mut self.state, State::Length) {
            State::Asked(name) if exists => self.state = State::Pipe(name),
            State::Asked(_) => self.number += 1,
            _ => panic!("nothing was asked"),
        }
        framed(&ImgStreamerReplyEntry {
            exists: Some(exists),
        })
    }

    /// The pipe has come: the image that it is for.
    pub fn take_pipe(&mut self) -> FileName {
        let State::Pipe(name) = std::mem::replace(&mut self.state, State::Length) else {
            panic!("no pipe was due")
        };
        self.number += 1;
        name
    }

    /// The image that was asked for and is not answered yet.
    pub fn asked(&self) -> Option<&FileName> {
        match &self.state {
            State::Asked(name) => Some(name),
            _ => None,
        }
    }

    /// The image whose pipe is due.
    pub fn due(&self) -> Option<&FileName> {
        match &self.state {
            State::Pipe(name) => Some(name),
            _ => None,
        }
    }

    /// Whether CRIU may end here.
    pub fn check_end(&self) -> Result<(), StreamerError> {
        let number = self.number;
        match self.state {
            State::Length if self.buffer.is_empty() => Ok(()),
            _ => Err(StreamerError::CutShort { number }),
        }
    }
}

/// The bytes of CRIU's request for `name`: what tests and other programs in CRIU's place send.
pub fn encode_request(name: &str) -> Vec<u8> {
    framed(&ImgStreamerRequestEntry {
        filename: Some(name.to_owned()),
    })
}

fn framed(message: &impl prost::Message) -> Vec<u8> {
    let length = u32::try_from(message.encoded_len()).expect("names are short");
    let mut bytes = length.to_le_bytes().to_vec();
    message.encode(&mut bytes).expect("a vector grows");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRIU's request for `seccomp.img`, as it sent it.
    const SECCOMP: &[u8] = b"\x0d\0\0\0\x0a\x0bseccomp.img";

    /// Gives `bytes` as far as they are wanted, one by one; what is left.
    fn feed<'a>(requests: &mut Requests, mut bytes: &'a [u8]) -> Result<&'a [u8], StreamerError> {
        while let (Want::Bytes(_), Some((first, rest))) = (requests.want(), bytes.split_first()) {
            requests.take_bytes(&[*first])?;
            bytes = rest;
        }
        Ok(bytes)
    }

    #[test]
    fn a_request_of_criu_is_read_to_its_last_byte_and_not_further() {
        assert_eq!(encode_request("seccomp.img"), SECCOMP);
        let mut requests = Requests::new(Role::Capture);
        let bytes = [SECCOMP, b"\0"].concat();
        assert_eq!(feed(&mut requests, &bytes).unwrap(), b"\0");
        assert_eq!(requests.want(), Want::Pipe);
        assert_eq!(requests.take_pipe().as_str(), "seccomp.img");
        requests.check_end().unwrap();
    }

    #[test]
    fn a_restore_is_answered_with_the_bytes_that_criu_reads() {
        let mut requests = Requests::new(Role::Serve);
        feed(&mut requests, SECCOMP).unwrap();
        assert_eq!(requests.want(), Want::Answer);
        assert_eq!(requests.answer(false), b"\x02\0\0\0\x08\0");
        assert_eq!(requests.want(), Want::Bytes(4));
        feed(&mut requests, SECCOMP).unwrap();
        assert_eq!(requests.answer(true), b"\x02\0\0\0\x08\x01");
        assert_eq!(requests.due().unwrap().as_str(), "seccomp.img");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", ".", "..", "a/b", "/etc/passwd", "parent", "a\nb"] {
            let mut requests = Requests::new(Role::Capture);
            let error = feed(&mut requests, &encode_request(name)).unwrap_err();
            assert!(matches!(error, StreamerError::Name { .. }), "{error}");
        }
        let long = encode_request(&"n".repeat(256));
        assert!(feed(&mut Requests::new(Role::Capture), &long).is_err());
    }

    #[test]
    fn lengths_that_no_request_has_are_refused_before_a_byte_of_it_is_read() {
        for stated in [0, MAX_REQUEST_BYTES + 1, u32::MAX] {
            let error = Requests::new(Role::Serve)
                .take_bytes(&stated.to_le_bytes())
                .unwrap_err();
            assert!(
                matches!(error, StreamerError::Length { stated: found, .. } if found == stated)
            );
        }
        let error = feed(&mut Requests::new(Role::Serve), b"\x02\0\0\0\x0a\x7f").unwrap_err();
        assert!(matches!(error, StreamerError::Request { .. }), "{error}");
        let error = feed(&mut Requests::new(Role::Serve), b"\x02\0\0\0\x10\x01").unwrap_err();
        assert!(error.to_string().contains("names no image"), "{error}");
    }

    #[test]
    fn an_image_is_dumped_once_and_restored_as_often_as_it_is_asked_for() {
        let mut requests = Requests::new(Role::Capture);
        feed(&mut requests, SECCOMP).unwrap();
        requests.take_pipe();
        let error = feed(&mut requests, SECCOMP).unwrap_err();
        assert!(matches!(error, StreamerError::Twice { number: 2, .. }));
        let mut requests = Requests::new(Role::Serve);
        for _ in 0..3 {
            feed(&mut requests, SECCOMP).unwrap();
            requests.answer(true);
            requests.take_pipe();
        }
    }

    #[test]
    fn an_end_inside_a_request_is_told() {
        for cut in 0..=SECCOMP.len() {
            let mut requests = Requests::new(Role::Capture);
            feed(&mut requests, &SECCOMP[..cut]).unwrap();
            assert_eq!(requests.check_end().is_ok(), cut == 0, "{cut}");
        }
    }
}
