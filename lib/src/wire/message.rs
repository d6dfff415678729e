//! Control messages as types of ours.

use crxfer_proto::v1;
use prost::Message as _;

use super::{BlockId, PagesStep, Step, limits};
use crate::delta::{BadName, FileMeta, FileName, SetName};
use crate::digest::Digest;
use crate::page::{BadPageSize, PageSize};

/// A control message that no correct peer sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It is no protobuf message of ours.
    #[error("a message cannot be read: {0}")]
    Decode(#[from] prost::DecodeError),
    /// It says nothing that this version knows.
    #[error("a message of an unknown kind")]
    Unknown,
    /// A field has a value that is not allowed.
    #[error("a message's {0} is not allowed")]
    Field(&'static str),
    /// A file or set has a name that is not allowed.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The page size is none.
    #[error(transparent)]
    PageSize(#[from] BadPageSize),
}

/// How a destination lays a set out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// The same files, byte for byte.
    #[default]
    Faithful,
    /// Pages that the set before has at the same place are left to it (PE_PARENT).
    Incremental,
    /// One directory without a parent.
    Flat,
}

impl Layout {
    /// Its name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Faithful => "faithful",
            Self::Incremental => "incremental",
            Self::Flat => "flat",
        }
    }

    /// Its number in messages and records.
    pub fn number(self) -> i32 {
        match self {
            Self::Faithful => v1::Layout::Faithful as i32,
            Self::Incremental => v1::Layout::Incremental as i32,
            Self::Flat => v1::Layout::Flat as i32,
        }
    }

    /// The layout with this number.
    pub fn from_number(number: i32) -> Result<Self, WireError> {
        match v1::Layout::try_from(number) {
            Ok(v1::Layout::Faithful) => Ok(Self::Faithful),
            Ok(v1::Layout::Incremental) => Ok(Self::Incremental),
            Ok(v1::Layout::Flat) => Ok(Self::Flat),
            _ => Err(WireError::Field("layout")),
        }
    }
}

/// First message of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest and highest protocol version that it speaks.
    pub versions: (u32, u32),
    /// Name and version of the program, for logs.
    pub software: String,
    /// Proof that it knows the ticket's secret.
    pub ticket_proof: Option<[u8; 32]>,
}

/// The destination's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that both will speak.
    pub version: u32,
    /// Name and version of the program, for logs.
    pub software: String,
    /// Proof that it knows the ticket's secret.
    pub ticket_proof: Option<[u8; 32]>,
    /// How it lays sets out.
    pub layout: Layout,
    /// Largest set that its operator allows, in bytes.
    pub max_set_bytes: Option<u64>,
}

/// A set follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BeginSet {
    /// Its number within the session, from 1.
    pub set: u32,
    /// Name of the image directory.
    pub name: SetName,
    /// It is sent only because a later set builds on it, and gets no name.
    pub ancestor: bool,
    /// Page size of the host that dumped it.
    pub page_size: PageSize,
    /// `img_version` of its inventory, 0 where it has none.
    pub image_version: u32,
    /// Number of its files.
    pub file_count: u32,
    /// Sum of their sizes.
    pub total_bytes: u64,
    /// Root digest and link text of the set that `parent` leads to.
    pub parent: Option<(Digest, String)>,
    /// The received set to build on, where the operator names one.
    pub base_name: Option<SetName>,
    /// Its root digest, where the source knows it before it has read the files.
    pub root: Option<Digest>,
}

/// One segment of one file of one set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentAt {
    /// Number of the set within the session.
    pub set: u32,
    /// Index of the file.
    pub file: u32,
    /// Index of the segment in the file.
    pub segment: u64,
}

/// The set is stored and visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its number within the session.
    pub set: u32,
    /// Its name there.
    pub name: String,
    /// Generation of that name, from 1.
    pub generation: u64,
    /// How it is laid out.
    pub layout: Layout,
    /// The set that it builds on there.
    pub base: Option<String>,
    /// Whether CRIU could restore it, in one word.
    pub completeness: String,
    /// The same set was there already.
    pub unchanged: bool,
    /// What the operator should know, a sentence each.
    pub notes: Vec<String>,
}

/// Why a peer gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureCode {
    /// The peer broke the protocol.
    Protocol,
    /// There is no common version.
    Version,
    /// No valid ticket proof.
    Ticket,
    /// Bytes do not match their digest.
    Content,
    /// The set is damaged or of a kind that the layout does not take.
    Image,
    /// Larger than the operator allows.
    Limit,
    /// Disk full, permission denied and the like.
    Storage,
    /// The name is taken or cannot be used.
    Name,
    /// A copy that the destination held is damaged; sending again helps.
    Held,
    /// Somebody stopped it.
    Cancelled,
    /// A fault of the program.
    Internal,
    /// CRIU failed on that side.
    Criu,
    /// A command of the operator's failed on that side.
    Hook,
    /// The operator of that side does not allow it.
    Refused,
}

const FAILURE_CODES: [(FailureCode, v1::FailureCode); 14] = [
    (FailureCode::Protocol, v1::FailureCode::FailureProtocol),
    (FailureCode::Version, v1::FailureCode::FailureVersion),
    (FailureCode::Ticket, v1::FailureCode::FailureTicket),
    (FailureCode::Content, v1::FailureCode::FailureContent),
    (FailureCode::Image, v1::FailureCode::FailureImage),
    (FailureCode::Limit, v1::FailureCode::FailureLimit),
    (FailureCode::Storage, v1::FailureCode::FailureStorage),
    (FailureCode::Name, v1::FailureCode::FailureName),
    (FailureCode::Held, v1::FailureCode::FailureHeld),
    (FailureCode::Cancelled, v1::FailureCode::FailureCancelled),
    (FailureCode::Internal, v1::FailureCode::FailureInternal),
    (FailureCode::Criu, v1::FailureCode::FailureCriu),
    (FailureCode::Hook, v1::FailureCode::FailureHook),
    (FailureCode::Refused, v1::FailureCode::FailureRefused),
];

/// The sender of this message gives up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// Whose fault.
    pub code: FailureCode,
    /// A sentence for the other side's operator.
    pub reason: String,
}

impl Failure {
    /// A failure with a reason cut to what the wire carries.
    pub fn new(code: FailureCode, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: cut(&reason.into()),
        }
    }
}

/// A control message. docs/PROTOCOL.md tells their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: versions and proof.
    Hello(Hello),
    /// Destination: version and proof.
    Welcome(Welcome),
    /// Source: are sets with these roots there?
    QueryHeld(Vec<Digest>),
    /// Destination: one answer for each.
    Held(Vec<bool>),
    /// Source: a set follows.
    BeginSet(BeginSet),
    /// Source: some of its files.
    Files {
        /// Number of the set.
        set: u32,
        /// The files, in ascending order of name over all messages.
        files: Vec<FileMeta>,
    },
    /// Destination: the files are known, go on.
    SetReady {
        /// Number of the set.
        set: u32,
        /// Nothing of this peer is held: do not ask, send.
        lacks_everything: bool,
    },
    /// Source: digest of one segment.
    SegmentDigest(SegmentAt, Digest),
    /// Destination: whether it holds that segment whole.
    SegmentState(SegmentAt, bool),
    /// Source: ids of the segment's blocks.
    BlockIds(SegmentAt, Vec<BlockId>),
    /// Destination: which of them must be sent.
    Lacking(SegmentAt, Vec<bool>),
    /// Source: digests of the next files.
    FileDigests {
        /// Number of the set.
        set: u32,
        /// In the order of the files over all messages.
        digests: Vec<Digest>,
    },
    /// Source: all of the set is on the streams.
    EndSet {
        /// Number of the set.
        set: u32,
        /// Its root digest.
        root: Digest,
        /// How many frames carried it: this message may overtake them.
        frames: u64,
    },
    /// Either: nothing to say, still at work.
    Working,
    /// Either: a step of a live migration, since version 2.
    Migration(Step),
    /// Either: a step of a page session, since version 3.
    Pages(PagesStep),
    /// Destination: the set is stored and visible.
    Published(Published),
    /// Either: the end.
    Failure(Failure),
}

impl Message {
    /// The message as it stands on the wire, without its length.
    pub fn encode(&self) -> Vec<u8> {
        v1::Control {
            body: Some(self.to_body()),
        }
        .encode_to_vec()
    }

    fn to_body(&self) -> v1::control::Body {
        use v1::control::Body;
        match self {
            Self::Hello(hello) => Body::Hello(v1::Hello {
                version_min: hello.versions.0,
                version_max: hello.versions.1,
                software: hello.software.clone(),
                ticket_proof: hello.ticket_proof.map(Vec::from).unwrap_or_default(),
            }),
            Self::Welcome(welcome) => Body::Welcome(v1::Welcome {
                version: welcome.version,
                software: welcome.software.clone(),
                ticket_proof: welcome.ticket_proof.map(Vec::from).unwrap_or_default(),
                layout: welcome.layout.number(),
                max_set_bytes: welcome.max_set_bytes.unwrap_or(0),
            }),
            Self::QueryHeld(roots) => Body::QueryHeld(v1::QueryHeld {
                roots: digests_out(roots),
            }),
            Self::Held(held) => Body::Held(v1::Held { held: held.clone() }),
            Self::BeginSet(begin) => Body::BeginSet(begin.to_proto()),
            Self::Files { set, files } => Body::Files(v1::Files {
                set: *set,
                files: files.iter().map(file_out).collect(),
            }),
            Self::SetReady {
                set,
                lacks_everything,
            } => Body::SetReady(v1::SetReady {
                set: *set,
                lacks_everything: *lacks_everything,
            }),
            &Self::SegmentDigest(SegmentAt { set, file, segment }, digest) => {
                Body::SegmentDigest(v1::SegmentDigest {
                    set,
                    file,
                    segment,
                    digest: digest.0.to_vec(),
                })
            }
            &Self::SegmentState(SegmentAt { set, file, segment }, held) => {
                Body::SegmentState(v1::SegmentState {
                    set,
                    file,
                    segment,
                    held,
                })
            }
            Self::BlockIds(at, ids) => Body::BlockIds(v1::BlockIds {
                set: at.set,
                file: at.file,
                segment: at.segment,
                ids: ids.iter().flat_map(|id| id.0).collect(),
            }),
            Self::Lacking(at, lacking) => Body::Lacking(v1::Lacking {
                set: at.set,
                file: at.file,
                segment: at.segment,
                bitmap: bitmap_out(lacking),
            }),
            Self::FileDigests { set, digests } => Body::FileDigests(v1::FileDigests {
                set: *set,
                digests: digests_out(digests),
            }),
            Self::EndSet { set, root, frames } => Body::EndSet(v1::EndSet {
                set: *set,
                root: root.0.to_vec(),
                frames: *frames,
            }),
            Self::Working => Body::Working(v1::Working {}),
            Self::Migration(step) => Body::Migration(step.to_proto()),
            Self::Pages(step) => Body::Pages(step.to_proto()),
            Self::Published(published) => Body::Published(published.to_proto()),
            Self::Failure(failure) => Body::Failure(v1::Failure {
                code: failure.to_proto_code() as i32,
                reason: cut(&failure.reason),
            }),
        }
    }

    /// Reads a message; everything in it is within [`limits`] afterwards.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        use v1::control::Body;
        Ok(
            match v1::Control::decode(bytes)?.body.ok_or(WireError::Unknown)? {
                Body::Hello(hello) => Self::Hello(Hello {
                    versions: (hello.version_min, hello.version_max),
                    software: text(hello.software)?,
                    ticket_proof: optional_32(&hello.ticket_proof, "ticket proof")?,
                }),
                Body::Welcome(welcome) => Self::Welcome(Welcome {
                    version: welcome.version,
                    software: text(welcome.software)?,
                    ticket_proof: optional_32(&welcome.ticket_proof, "ticket proof")?,
                    layout: Layout::from_number(welcome.layout)?,
                    max_set_bytes: Some(welcome.max_set_bytes).filter(|&bytes| bytes != 0),
                }),
                Body::QueryHeld(query) => {
                    Self::QueryHeld(digests_in(&query.roots, limits::CHAIN + 1)?)
                }
                Body::Held(held) if held.held.len() <= limits::CHAIN + 1 => Self::Held(held.held),
                Body::Held(_) => return Err(WireError::Field("number of answers")),
                Body::BeginSet(begin) => Self::BeginSet(BeginSet::from_proto(begin)?),
                Body::Files(files) => {
                    if files.files.is_empty() || files.files.len() > limits::FILES_PER_MESSAGE {
                        return Err(WireError::Field("number of files"));
                    }
                    Self::Files {
                        set: files.set,
                        files: files
                            .files
                            .into_iter()
                            .map(file_in)
                            .collect::<Result<_, _>>()?,
                    }
                }
                Body::SetReady(ready) => Self::SetReady {
                    set: ready.set,
                    lacks_everything: ready.lacks_everything,
                },
                Body::SegmentDigest(m) => Self::SegmentDigest(
                    SegmentAt {
                        set: m.set,
                        file: m.file,
                        segment: m.segment,
                    },
                    digest_in(&m.digest)?,
                ),
                Body::SegmentState(m) => Self::SegmentState(
                    SegmentAt {
                        set: m.set,
                        file: m.file,
                        segment: m.segment,
                    },
                    m.held,
                ),
                Body::BlockIds(m) => Self::BlockIds(
                    SegmentAt {
                        set: m.set,
                        file: m.file,
                        segment: m.segment,
                    },
                    ids_in(&m.ids)?,
                ),
                Body::Lacking(m) => Self::Lacking(
                    SegmentAt {
                        set: m.set,
                        file: m.file,
                        segment: m.segment,
                    },
                    bitmap_in(&m.bitmap)?,
                ),
                Body::FileDigests(m) => Self::FileDigests {
                    set: m.set,
                    digests: digests_in(&m.digests, limits::DIGESTS_PER_MESSAGE)?,
                },
                Body::EndSet(end) => Self::EndSet {
                    set: end.set,
                    root: digest_in(&end.root)?,
                    frames: end.frames,
                },
                Body::Working(v1::Working {}) => Self::Working,
                Body::Migration(migration) => Self::Migration(Step::from_proto(migration)?),
                Body::Pages(pages) => Self::Pages(PagesStep::from_proto(pages)?),
                Body::Published(published) => Self::Published(Published::from_proto(published)?),
                Body::Failure(failure) => Self::Failure(Failure::from_proto(&failure)),
            },
        )
    }
}

impl BeginSet {
    fn to_proto(&self) -> v1::BeginSet {
        let (parent_root, parent_link) = self
            .parent
            .as_ref()
            .map(|(root, link)| (root.0.to_vec(), link.clone()))
            .unwrap_or_default();
        v1::BeginSet {
            set: self.set,
            name: self.name.to_string(),
            ancestor: self.ancestor,
            page_size: self.page_size.bytes(),
            image_version: self.image_version,
            file_count: self.file_count,
            total_bytes: self.total_bytes,
            parent_root,
            parent_link,
            base_name: self
                .base_name
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            root: self.root.map(|root| root.0.to_vec()).unwrap_or_default(),
        }
    }

    fn from_proto(begin: v1::BeginSet) -> Result<Self, WireError> {
        if begin.file_count == 0 || begin.file_count > limits::FILES {
            return Err(WireError::Field("number of files"));
        }
        if begin.total_bytes > limits::SET_BYTES {
            return Err(WireError::Field("size"));
        }
        let parent = optional_32(&begin.parent_root, "parent")?;
        let link = text(begin.parent_link)?;
        let root = optional_32(&begin.root, "root")?.map(Digest);
        Ok(Self {
            set: begin.set,
            name: SetName::new(begin.name)?,
            ancestor: begin.ancestor,
            page_size: PageSize::new(begin.page_size)?,
            image_version: begin.image_version,
            file_count: begin.file_count,
            total_bytes: begin.total_bytes,
            parent: parent.map(|root| (Digest(root), link)),
            base_name: Some(begin.base_name)
                .filter(|name| !name.is_empty())
                .map(SetName::new)
                .transpose()?,
            root,
        })
    }
}

impl Published {
    fn to_proto(&self) -> v1::Published {
        v1::Published {
            set: self.set,
            name: self.name.clone(),
            generation: self.generation,
            layout: self.layout.number(),
            base: self.base.clone().unwrap_or_default(),
            completeness: self.completeness.clone(),
            unchanged: self.unchanged,
            notes: self.notes.iter().map(|note| cut(note)).collect(),
        }
    }

    fn from_proto(published: v1::Published) -> Result<Self, WireError> {
        Ok(Self {
            set: published.set,
            name: text(published.name)?,
            generation: published.generation,
            layout: Layout::from_number(published.layout)?,
            base: Some(text(published.base)?).filter(|base| !base.is_empty()),
            completeness: text(published.completeness)?,
            unchanged: published.unchanged,
            notes: published
                .notes
                .into_iter()
                .take(64)
                .map(text)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl Failure {
    fn to_proto_code(&self) -> v1::FailureCode {
        let found = FAILURE_CODES.iter().find(|(ours, _)| *ours == self.code);
        found.map_or(v1::FailureCode::FailureInternal, |(_, theirs)| *theirs)
    }

    // A code of a later version is still a failure: it reads as the peer's internal one.
    fn from_proto(failure: &v1::Failure) -> Self {
        let code = v1::FailureCode::try_from(failure.code).ok();
        let found = FAILURE_CODES
            .iter()
            .find(|(_, theirs)| Some(*theirs) == code);
        let printable: String = failure
            .reason
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        Self {
            code: found.map_or(FailureCode::Internal, |(ours, _)| *ours),
            reason: cut(&printable),
        }
    }
}

pub(super) fn cut(text: &str) -> String {
    let end = text
        .char_indices()
        .map(|(at, _)| at)
        .take_while(|&at| at < limits::TEXT)
        .last();
    text[..end.map_or(0, |at| {
        at + text[at..].chars().next().map_or(0, char::len_utf8)
    })]
        .to_owned()
}

// A text for humans ends on terminals: control characters would let the peer write there.
pub(super) fn text(text: String) -> Result<String, WireError> {
    if text.len() > limits::TEXT + 4 || text.chars().any(char::is_control) {
        return Err(WireError::Field("text"));
    }
    Ok(text)
}

fn file_out(file: &FileMeta) -> v1::File {
    v1::File {
        name: file.name.to_string(),
        mode: u32::from(file.mode),
        size: file.size,
        block_len: file.block_len,
    }
}

fn file_in(file: v1::File) -> Result<FileMeta, WireError> {
    let block_len = file.block_len;
    if !block_len.is_power_of_two()
        || !(limits::MIN_BLOCK_LEN..=limits::BLOCK_LEN).contains(&block_len)
    {
        return Err(WireError::Field("block length"));
    }
    let mode = u16::try_from(file.mode)
        .ok()
        .filter(|mode| mode & !0o777 == 0);
    let meta = FileMeta {
        name: FileName::new(file.name)?,
        mode: mode.ok_or(WireError::Field("mode"))?,
        size: file.size,
        block_len,
    };
    if meta.size > limits::SET_BYTES || meta.blocks() > limits::BLOCKS_PER_FILE {
        return Err(WireError::Field("file size"));
    }
    Ok(meta)
}

fn digest_in(bytes: &[u8]) -> Result<Digest, WireError> {
    bytes
        .try_into()
        .map(Digest)
        .map_err(|_| WireError::Field("digest"))
}

fn optional_32(bytes: &[u8], what: &'static str) -> Result<Option<[u8; 32]>, WireError> {
    match bytes {
        [] => Ok(None),
        _ => bytes
            .try_into()
            .map(Some)
            .map_err(|_| WireError::Field(what)),
    }
}

fn digests_in(digests: &[Vec<u8>], limit: usize) -> Result<Vec<Digest>, WireError> {
    if digests.len() > limit {
        return Err(WireError::Field("number of digests"));
    }
    digests.iter().map(|bytes| digest_in(bytes)).collect()
}

fn digests_out(digests: &[Digest]) -> Vec<Vec<u8>> {
    digests.iter().map(|digest| digest.0.to_vec()).collect()
}

fn ids_in(bytes: &[u8]) -> Result<Vec<BlockId>, WireError> {
    let (ids, rest) = bytes.as_chunks::<{ BlockId::LEN }>();
    if ids.is_empty() || ids.len() > limits::SEGMENT_BLOCKS || !rest.is_empty() {
        return Err(WireError::Field("ids"));
    }
    Ok(ids.iter().map(|&id| BlockId(id)).collect())
}

// One bit a block; the receiver knows how many of the last byte's bits count.
fn bitmap_out(bits: &[bool]) -> Vec<u8> {
    bits.chunks(8)
        .map(|bits| {
            bits.iter()
                .rev()
                .fold(0, |byte, &bit| byte << 1 | u8::from(bit))
        })
        .collect()
}

fn bitmap_in(bytes: &[u8]) -> Result<Vec<bool>, WireError> {
    if bytes.len() > limits::SEGMENT_BLOCKS / 8 {
        return Err(WireError::Field("bitmap"));
    }
    Ok(bytes
        .iter()
        .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Message> {
        let at = SegmentAt {
            set: 1,
            file: 2,
            segment: 3,
        };
        vec![
            Message::Hello(Hello {
                versions: (1, 2),
                software: "crxfer".into(),
                ticket_proof: Some([7; 32]),
            }),
            Message::Welcome(Welcome {
                version: 1,
                software: "crxfer".into(),
                ticket_proof: None,
                layout: Layout::Flat,
                max_set_bytes: Some(10),
            }),
            Message::QueryHeld(vec![Digest([1; 32])]),
            Message::Held(vec![true, false]),
            Message::BeginSet(BeginSet {
                set: 1,
                name: SetName::new("3").unwrap(),
                ancestor: false,
                page_size: PageSize::new(16384).unwrap(),
                image_version: 2,
                file_count: 1,
                total_bytes: 5,
                parent: Some((Digest([2; 32]), "../2".into())),
                base_name: Some(SetName::new("2").unwrap()),
                root: Some(Digest([9; 32])),
            }),
            Message::Files {
                set: 1,
                files: vec![FileMeta {
                    name: FileName::new("core-1.img").unwrap(),
                    mode: 0o644,
                    size: 5,
                    block_len: 65536,
                }],
            },
            Message::SetReady {
                set: 1,
                lacks_everything: true,
            },
            Message::SegmentDigest(at, Digest([3; 32])),
            Message::SegmentState(at, true),
            Message::BlockIds(at, vec![BlockId([4; 16]); 3]),
            Message::Lacking(
                at,
                [true, false, true, true, false, false, false, true].repeat(2),
            ),
            Message::FileDigests {
                set: 1,
                digests: vec![Digest([6; 32])],
            },
            Message::EndSet {
                set: 1,
                root: Digest([5; 32]),
                frames: 9,
            },
            Message::Working,
            Message::Published(Published {
                set: 1,
                name: "3".into(),
                generation: 2,
                layout: Layout::Incremental,
                base: None,
                completeness: "complete".into(),
                unchanged: false,
                notes: vec!["a note".into()],
            }),
            Message::Failure(Failure::new(FailureCode::Storage, "disk full")),
        ]
    }

    #[test]
    fn every_message_comes_back() {
        for message in samples() {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn a_message_has_the_documented_bytes() {
        let at = SegmentAt {
            set: 1,
            file: 2,
            segment: 3,
        };
        let message = Message::Lacking(
            at,
            vec![true, false, true, false, false, false, false, false],
        );
        // Control { lacking(11): { set 1, file 2, segment 3, bitmap [5] } }
        assert_eq!(
            message.encode(),
            [0x5a, 9, 0x08, 1, 0x10, 2, 0x18, 3, 0x22, 1, 5]
        );
    }

    #[test]
    fn what_a_peer_must_not_say_is_refused() {
        let file = |name: &str, mode, size, block_len| {
            let file = v1::File {
                name: name.into(),
                mode,
                size,
                block_len,
            };
            let body = v1::control::Body::Files(v1::Files {
                set: 1,
                files: vec![file],
            });
            Message::decode(&v1::Control { body: Some(body) }.encode_to_vec())
        };
        assert!(file("core-1.img", 0o644, 5, 65536).is_ok());
        for bad in [
            file("../core-1.img", 0o644, 5, 65536),
            file("parent", 0o644, 5, 65536),
            file("core-1.img", 0o4755, 5, 65536),
            file("core-1.img", 0o644, 5, 1000),
            file("core-1.img", 0o644, 5, 0),
            file("core-1.img", 0o644, u64::MAX, 65536),
        ] {
            assert!(bad.is_err(), "{bad:?}");
        }
        assert_eq!(Message::decode(&[]), Err(WireError::Unknown));
        assert!(Message::decode(&[0xff; 10]).is_err());
    }

    #[test]
    fn reasons_are_cut_and_cleaned() {
        let failure = Failure::new(FailureCode::Internal, "é".repeat(limits::TEXT));
        assert!(failure.reason.len() <= limits::TEXT + 4);
        let body = v1::control::Body::Failure(v1::Failure {
            code: 99,
            reason: "\x1b[2Jgone".into(),
        });
        let decoded = Message::decode(&v1::Control { body: Some(body) }.encode_to_vec());
        assert_eq!(
            decoded,
            Ok(Message::Failure(Failure {
                code: FailureCode::Internal,
                reason: " [2Jgone".into()
            }))
        );
    }
}
