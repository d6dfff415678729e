//! Messages of a live migration: steps on the control stream, notes on its bulk stream.

use crxfer_proto::v1;
use prost::Message as _;

use super::message::{WireError, cut, text};
use super::{HEADER_LEN, limits};
use crate::delta::FileName;
use crate::digest::Digest;
use crate::image::{PageFlags, PageRun, PagemapName};
use crate::page::PageSize;

/// Which migration, on both hosts: 16 random bytes, shown in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// Reads what [`Display`](std::fmt::Display) writes.
    pub fn parse(text: &str) -> Option<Self> {
        let mut id = [0; 16];
        let digits = text.as_bytes();
        if digits.len() != 32 || digits.iter().any(u8::is_ascii_uppercase) {
            return None;
        }
        for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
            let pair = std::str::from_utf8(pair).ok()?;
            let is_hex = pair.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = is_hex
                .then(|| u8::from_str_radix(pair, 16).ok())
                .flatten()?;
        }
        Some(Self(id))
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// What CRIU must be told on both sides, because the images depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RestoreOptions {
    /// Take open TCP connections along.
    pub tcp_established: bool,
    /// The tree is a job of a shell: its session leader stays behind.
    pub shell_job: bool,
    /// Take file locks along.
    pub file_locks: bool,
    /// Deleted files that are open may be linked again.
    pub link_remap: bool,
    /// UNIX sockets may be connected to outside of the tree.
    pub ext_unix_sk: bool,
    /// Restore open TCP connections as closed.
    pub tcp_close: bool,
    /// Resources from outside of the tree, in CRIU's words.
    pub external: Vec<String>,
    /// What is done about cgroups, in CRIU's word; empty: its default.
    pub manage_cgroups: String,
}

/// A tree would like to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Which migration.
    pub id: MigrationId,
    /// A name for people.
    pub name: String,
    /// Page size of the source.
    pub page_size: PageSize,
    /// Bytes that CRIU would dump now, about.
    pub memory_bytes: u64,
    /// What the source found about itself and the tree, as preflight encodes it.
    pub facts: Vec<u8>,
    /// What CRIU must be told.
    pub options: RestoreOptions,
    /// Only the answer is wanted.
    pub dry_run: bool,
    /// Where images are to be kept at the destination.
    pub keeping: Keeping,
    /// What restores there, by the destination's own name for it; empty: CRIU alone.
    pub runtime: String,
    /// What that runtime calls the container; empty without one.
    pub container: String,
}

/// Where a destination is to keep the images of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keeping {
    /// As it was started.
    #[default]
    AsSet,
    /// In memory that no path leads to.
    Memory,
}

impl Keeping {
    fn to_proto(self) -> v1::Keeping {
        match self {
            Self::AsSet => v1::Keeping::AsSet,
            Self::Memory => v1::Keeping::Memory,
        }
    }

    fn from_proto(number: i32) -> Result<Self, WireError> {
        match v1::Keeping::try_from(number).map_err(|_| WireError::Field("keeping"))? {
            v1::Keeping::AsSet => Ok(Self::AsSet),
            v1::Keeping::Memory => Ok(Self::Memory),
        }
    }
}

/// The destination's answer to an [`Offer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    /// What it checked, as preflight encodes it.
    pub checks: Vec<u8>,
    /// What CRIU's restore of such a tree costs there, about, in nanoseconds.
    pub restore_ns: u64,
    /// CRIU's version there.
    pub criu: String,
}

/// A step of the destination with its times, in nanoseconds of its clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// What.
    pub name: String,
    /// From.
    pub begin_ns: u64,
    /// To.
    pub end_ns: u64,
}

/// What the source tells a destination that it meets again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Nothing is said: what is there?
    Ask,
    /// The workload is the destination's.
    Commit,
    /// The workload stays at the source.
    Abort,
}

/// What the destination answers, when it has done what the verdict says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It knows nothing of this migration.
    Unknown,
    /// It holds a complete copy that has not run.
    Holds,
    /// The copy runs, or has run.
    Runs {
        /// Its root process, as the destination sees it; 0 where that is not known any more.
        pid: u32,
    },
    /// Nothing is left of the copy, and it never ran.
    Removed,
    /// It is at work, or cannot do what it was told: ask again.
    Busy,
}

/// A step of the hand-over, on the control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Source: a tree would like to come.
    Offer(Box<Offer>),
    /// Destination: what it found.
    Offered(Offered),
    /// Destination: the iteration is checked and stored.
    IterationDone {
        /// Which.
        number: u32,
        /// Bytes written for it.
        stored_bytes: u64,
        /// Nanoseconds spent on unpacking, hashing and writing it.
        work_ns: u64,
    },
    /// Source: the iteration with this number will be the last; get ready.
    PrepareFinal(u32),
    /// Destination: ready.
    FinalReady,
    /// Destination: the copy is built and complete, and has not run.
    Built,
    /// Source: the workload is the destination's.
    Commit,
    /// Destination: it runs.
    Running {
        /// The root process's pid, as the destination sees it.
        pid: u32,
        /// When it was let go, in nanoseconds of the destination's clock.
        resumed_ns: u64,
        /// What took the destination how long.
        phases: Vec<Phase>,
        /// What the operator should know, a sentence each.
        notes: Vec<String>,
    },
    /// Source: the workload stays; remove what came.
    Abort(String),
    /// Destination: nothing is left.
    Aborted,
    /// Source: what time is it?
    ClockAsk {
        /// When it was asked, in nanoseconds of the source's clock.
        asked_ns: u64,
    },
    /// Destination: this.
    ClockTell {
        /// Of the question.
        asked_ns: u64,
        /// In nanoseconds of the destination's clock.
        here_ns: u64,
    },
    /// Source, on a connection of its own, in place of `Hello`: the two have lost each other.
    Meet {
        /// Which migration.
        id: MigrationId,
        /// What the source has decided.
        verdict: Verdict,
    },
    /// Destination: what is there, after it has done what the verdict says.
    Met(Answer),
}

/// What frames and runs refer to by index.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Object {
    /// Memory: blocks are pages, by their number in the address space or segment.
    Memory(PagemapName),
    /// A file of the image directory: blocks are of [`OPAQUE_BLOCK`](crate::delta::OPAQUE_BLOCK) bytes.
    File {
        /// Its name.
        name: FileName,
        /// Permission bits.
        mode: u16,
        /// Bytes.
        size: u64,
    },
}

/// Stands between the frames of the migration's bulk stream, in order with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamNote {
    /// An iteration begins.
    Begin {
        /// Its number, from 1, without gaps.
        number: u32,
        /// The tree is frozen: the last one.
        is_final: bool,
    },
    /// The next objects, in order of their indexes.
    Objects(Vec<Object>),
    /// Final iteration: pages that the dump holds of one memory, in ascending order.
    Runs {
        /// Which memory.
        object: u32,
        /// The next runs; none of them needs a parent.
        runs: Vec<PageRun>,
    },
    /// The iteration is complete.
    End {
        /// Its number.
        number: u32,
        /// Of the final iteration: the root digest.
        root: Option<Digest>,
    },
}

/// What comes next on the migration's bulk stream: one byte, before each note and frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// A length (u32) and a [`StreamNote`].
    Note,
    /// A frame: header, ops, payload.
    Frame,
}

impl RecordKind {
    /// The byte of a note.
    pub const NOTE: u8 = 1;
    /// The byte of a frame.
    pub const FRAME: u8 = 2;

    /// The kind with this byte.
    pub fn from_byte(byte: u8) -> Result<Self, WireError> {
        match byte {
            Self::NOTE => Ok(Self::Note),
            Self::FRAME => Ok(Self::Frame),
            _ => Err(WireError::Field("kind of record")),
        }
    }
}

/// Bytes before the ops of a frame on the migration's stream.
pub const RECORD_HEADER_LEN: usize = 1 + HEADER_LEN;

impl RestoreOptions {
    fn to_proto(&self) -> v1::RestoreOptions {
        v1::RestoreOptions {
            tcp_established: self.tcp_established,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            link_remap: self.link_remap,
            ext_unix_sk: self.ext_unix_sk,
            tcp_close: self.tcp_close,
            external: self.external.clone(),
            manage_cgroups: self.manage_cgroups.clone(),
        }
    }

    fn from_proto(options: v1::RestoreOptions) -> Result<Self, WireError> {
        if options.external.len() > limits::EXTERNALS {
            return Err(WireError::Field("number of externals"));
        }
        Ok(Self {
            tcp_established: options.tcp_established,
            shell_job: options.shell_job,
            file_locks: options.file_locks,
            link_remap: options.link_remap,
            ext_unix_sk: options.ext_unix_sk,
            tcp_close: options.tcp_close,
            external: options
                .external
                .into_iter()
                .map(text)
                .collect::<Result<_, _>>()?,
            manage_cgroups: text(options.manage_cgroups)?,
        })
    }
}

impl Step {
    pub(super) fn to_proto(&self) -> v1::Migration {
        use v1::migration::Step as Body;
        let step = match self {
            Self::Offer(offer) => Body::Offer(v1::Offer {
                id: offer.id.0.to_vec(),
                name: offer.name.clone(),
                page_size: offer.page_size.bytes(),
                memory_bytes: offer.memory_bytes,
                facts: offer.facts.clone(),
                options: Some(offer.options.to_proto()),
                dry_run: offer.dry_run,
                keeping: offer.keeping.to_proto().into(),
                runtime: offer.runtime.clone(),
                container: offer.container.clone(),
            }),
            Self::Offered(offered) => Body::Offered(v1::Offered {
                checks: offered.checks.clone(),
                restore_ns: offered.restore_ns,
                criu: offered.criu.clone(),
            }),
            &Self::IterationDone {
                number,
                stored_bytes,
                work_ns,
            } => Body::IterationDone(v1::IterationDone {
                number,
                stored_bytes,
                work_ns,
            }),
            &Self::PrepareFinal(number) => Body::PrepareFinal(v1::PrepareFinal { number }),
            Self::FinalReady => Body::FinalReady(v1::FinalReady {}),
            Self::Built => Body::Built(v1::Built {}),
            Self::Commit => Body::Commit(v1::Commit {}),
            Self::Running {
                pid,
                resumed_ns,
                phases,
                notes,
            } => Body::Running(v1::Running {
                pid: *pid,
                resumed_ns: *resumed_ns,
                phases: phases.iter().map(phase_out).collect(),
                notes: notes.iter().map(|note| cut(note)).collect(),
            }),
            Self::Abort(reason) => Body::Abort(v1::Abort {
                reason: cut(reason),
            }),
            Self::Aborted => Body::Aborted(v1::Aborted {}),
            &Self::ClockAsk { asked_ns } => Body::ClockAsk(v1::ClockAsk { asked_ns }),
            &Self::ClockTell { asked_ns, here_ns } => {
                Body::ClockTell(v1::ClockTell { asked_ns, here_ns })
            }
            Self::Meet { id, verdict } => Body::Meet(v1::Meet {
                id: id.0.to_vec(),
                verdict: verdict.to_proto() as i32,
            }),
            Self::Met(answer) => Body::Met(answer.to_proto()),
        };
        v1::Migration { step: Some(step) }
    }

    pub(super) fn from_proto(migration: v1::Migration) -> Result<Self, WireError> {
        use v1::migration::Step as Body;
        Ok(match migration.step.ok_or(WireError::Unknown)? {
            Body::Offer(offer) => Self::Offer(Box::new(offer_in(offer)?)),
            Body::Offered(offered) => {
                if offered.checks.len() > limits::FACTS {
                    return Err(WireError::Field("length of checks"));
                }
                Self::Offered(Offered {
                    checks: offered.checks,
                    restore_ns: offered.restore_ns,
                    criu: text(offered.criu)?,
                })
            }
            Body::IterationDone(done) => Self::IterationDone {
                number: done.number,
                stored_bytes: done.stored_bytes,
                work_ns: done.work_ns,
            },
            Body::PrepareFinal(prepare) => Self::PrepareFinal(prepare.number),
            Body::FinalReady(v1::FinalReady {}) => Self::FinalReady,
            Body::Built(v1::Built {}) => Self::Built,
            Body::Commit(v1::Commit {}) => Self::Commit,
            Body::Running(running) => Self::Running {
                pid: running.pid,
                resumed_ns: running.resumed_ns,
                phases: running
                    .phases
                    .into_iter()
                    .take(limits::PHASES)
                    .map(phase_in)
                    .collect::<Result<_, _>>()?,
                notes: running
                    .notes
                    .into_iter()
                    .take(limits::PHASES)
                    .map(text)
                    .collect::<Result<_, _>>()?,
            },
            Body::Abort(abort) => Self::Abort(text(abort.reason)?),
            Body::Aborted(v1::Aborted {}) => Self::Aborted,
            Body::ClockAsk(ask) => Self::ClockAsk {
                asked_ns: ask.asked_ns,
            },
            Body::ClockTell(tell) => Self::ClockTell {
                asked_ns: tell.asked_ns,
                here_ns: tell.here_ns,
            },
            Body::Meet(meet) => Self::Meet {
                id: id_in(&meet.id)?,
                verdict: Verdict::from_proto(meet.verdict())?,
            },
            Body::Met(met) => Self::Met(Answer::from_proto(met)?),
        })
    }
}

fn id_in(bytes: &[u8]) -> Result<MigrationId, WireError> {
    let id = bytes.try_into();
    Ok(MigrationId(
        id.map_err(|_| WireError::Field("migration's id"))?,
    ))
}

impl Verdict {
    fn to_proto(self) -> v1::Verdict {
        match self {
            Self::Ask => v1::Verdict::Ask,
            Self::Commit => v1::Verdict::Commit,
            Self::Abort => v1::Verdict::Abort,
        }
    }

    fn from_proto(verdict: v1::Verdict) -> Result<Self, WireError> {
        match verdict {
            v1::Verdict::None => Err(WireError::Field("verdict")),
            v1::Verdict::Ask => Ok(Self::Ask),
            v1::Verdict::Commit => Ok(Self::Commit),
            v1::Verdict::Abort => Ok(Self::Abort),
        }
    }
}

impl Answer {
    fn to_proto(self) -> v1::Met {
        let (holding, pid) = match self {
            Self::Unknown => (v1::Holding::Unknown, 0),
            Self::Holds => (v1::Holding::Complete, 0),
            Self::Runs { pid } => (v1::Holding::Runs, pid),
            Self::Removed => (v1::Holding::Removed, 0),
            Self::Busy => (v1::Holding::Busy, 0),
        };
        v1::Met {
            holding: holding as i32,
            pid,
        }
    }

    fn from_proto(met: v1::Met) -> Result<Self, WireError> {
        match met.holding() {
            v1::Holding::None => Err(WireError::Field("what is held")),
            v1::Holding::Unknown => Ok(Self::Unknown),
            v1::Holding::Complete => Ok(Self::Holds),
            v1::Holding::Runs => Ok(Self::Runs { pid: met.pid }),
            v1::Holding::Removed => Ok(Self::Removed),
            v1::Holding::Busy => Ok(Self::Busy),
        }
    }
}

fn offer_in(offer: v1::Offer) -> Result<Offer, WireError> {
    if offer.facts.len() > limits::FACTS {
        return Err(WireError::Field("length of facts"));
    }
    Ok(Offer {
        id: id_in(&offer.id)?,
        name: text(offer.name)?,
        page_size: PageSize::new(offer.page_size)?,
        memory_bytes: offer.memory_bytes,
        facts: offer.facts,
        options: RestoreOptions::from_proto(offer.options.unwrap_or_default())?,
        dry_run: offer.dry_run,
        keeping: Keeping::from_proto(offer.keeping)?,
        runtime: text(offer.runtime)?,
        container: text(offer.container)?,
    })
}

fn phase_out(phase: &Phase) -> v1::Phase {
    v1::Phase {
        name: cut(&phase.name),
        begin_ns: phase.begin_ns,
        end_ns: phase.end_ns,
    }
}

fn phase_in(phase: v1::Phase) -> Result<Phase, WireError> {
    Ok(Phase {
        name: text(phase.name)?,
        begin_ns: phase.begin_ns,
        end_ns: phase.end_ns,
    })
}

const TASK: u32 = 1;
const SHMEM: u32 = 2;
const FILE: u32 = 3;

impl Object {
    fn to_proto(&self) -> v1::Object {
        let memory = |kind, id| v1::Object {
            kind,
            id,
            ..v1::Object::default()
        };
        match self {
            &Self::Memory(PagemapName::Task(pid)) => memory(TASK, pid),
            &Self::Memory(PagemapName::Shmem(id)) => memory(SHMEM, id),
            Self::File { name, mode, size } => v1::Object {
                kind: FILE,
                name: name.to_string(),
                mode: u32::from(*mode),
                size: *size,
                ..v1::Object::default()
            },
        }
    }

    fn from_proto(object: v1::Object) -> Result<Self, WireError> {
        let mode = u16::try_from(object.mode)
            .ok()
            .filter(|mode| mode & !0o777 == 0);
        match object.kind {
            TASK => Ok(Self::Memory(PagemapName::Task(object.id))),
            SHMEM => Ok(Self::Memory(PagemapName::Shmem(object.id))),
            FILE if object.size > limits::SET_BYTES => Err(WireError::Field("file size")),
            FILE => Ok(Self::File {
                name: FileName::new(object.name)?,
                mode: mode.ok_or(WireError::Field("mode"))?,
                size: object.size,
            }),
            _ => Err(WireError::Field("kind of object")),
        }
    }
}

impl StreamNote {
    /// The note as it stands on the wire: its byte, its length and itself.
    pub fn encode(&self) -> Vec<u8> {
        use v1::stream_note::Note;
        let note = match self {
            &Self::Begin { number, is_final } => Note::Begin(v1::BeginIteration {
                number,
                r#final: is_final,
            }),
            Self::Objects(objects) => Note::Objects(v1::Objects {
                objects: objects.iter().map(Object::to_proto).collect(),
            }),
            Self::Runs { object, runs } => Note::Runs(v1::Runs {
                object: *object,
                addresses: runs.iter().map(|run| run.vaddr).collect(),
                pages: runs.iter().map(|run| run.pages).collect(),
                flags: runs.iter().map(|run| run.flags.bits()).collect(),
            }),
            Self::End { number, root } => Note::End(v1::EndIteration {
                number: *number,
                root: root.map(|root| root.0.to_vec()).unwrap_or_default(),
            }),
        };
        let body = v1::StreamNote { note: Some(note) }.encode_to_vec();
        let length = u32::try_from(body.len()).expect("notes are made within their limit");
        let mut out = vec![RecordKind::NOTE];
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&body);
        out
    }

    /// Reads a note (without byte and length); everything in it is within [`limits`] afterwards.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        use v1::stream_note::Note;
        let note = v1::StreamNote::decode(bytes)?.note;
        Ok(match note.ok_or(WireError::Unknown)? {
            Note::Begin(begin) => Self::Begin {
                number: begin.number,
                is_final: begin.r#final,
            },
            Note::Objects(objects) => {
                if objects.objects.is_empty() || objects.objects.len() > limits::FILES_PER_MESSAGE {
                    return Err(WireError::Field("number of objects"));
                }
                let objects = objects.objects.into_iter().map(Object::from_proto);
                Self::Objects(objects.collect::<Result<_, _>>()?)
            }
            Note::Runs(runs) => Self::Runs {
                object: runs.object,
                runs: runs_in(&runs)?,
            },
            Note::End(end) => Self::End {
                number: end.number,
                root: match end.root.as_slice() {
                    [] => None,
                    root => Some(Digest(
                        root.try_into()
                            .map_err(|_| WireError::Field("root digest"))?,
                    )),
                },
            },
        })
    }
}

fn runs_in(runs: &v1::Runs) -> Result<Vec<PageRun>, WireError> {
    let count = runs.addresses.len();
    if count > limits::RUNS_PER_NOTE || runs.pages.len() != count || runs.flags.len() != count {
        return Err(WireError::Field("number of runs"));
    }
    let each = runs.addresses.iter().zip(&runs.pages).zip(&runs.flags);
    each.map(|((&vaddr, &pages), &flags)| {
        let flags = PageFlags::from_bits(flags)
            .filter(|flags| flags.is_present() && !flags.is_parent())
            .ok_or(WireError::Field("page flags"))?;
        if pages == 0 {
            return Err(WireError::Field("run"));
        }
        Ok(PageRun {
            vaddr,
            pages,
            flags,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Message;

    fn steps() -> Vec<Step> {
        vec![
            Step::Offer(Box::new(Offer {
                id: MigrationId([7; 16]),
                name: "web".into(),
                page_size: PageSize::new(4096).unwrap(),
                memory_bytes: 1 << 30,
                facts: vec![1, 2, 3],
                options: RestoreOptions {
                    tcp_established: true,
                    external: vec!["mnt[/x]:y".into()],
                    manage_cgroups: "soft".into(),
                    ..RestoreOptions::default()
                },
                dry_run: true,
                keeping: Keeping::Memory,
                runtime: "runc".into(),
                container: "web".into(),
            })),
            Step::Offered(Offered {
                checks: vec![4],
                restore_ns: 5,
                criu: "4.2.1".into(),
            }),
            Step::IterationDone {
                number: 3,
                stored_bytes: 4,
                work_ns: 5,
            },
            Step::PrepareFinal(4),
            Step::FinalReady,
            Step::Built,
            Step::Commit,
            Step::Running {
                pid: 12,
                resumed_ns: 13,
                phases: vec![Phase {
                    name: "restore".into(),
                    begin_ns: 1,
                    end_ns: 2,
                }],
                notes: vec!["a note".into()],
            },
            Step::Abort("because".into()),
            Step::Aborted,
            Step::ClockAsk { asked_ns: 1 },
            Step::ClockTell {
                asked_ns: 1,
                here_ns: 2,
            },
            Step::Meet {
                id: MigrationId([7; 16]),
                verdict: Verdict::Commit,
            },
            Step::Met(Answer::Runs { pid: 4711 }),
            Step::Met(Answer::Holds),
        ]
    }

    fn notes() -> Vec<StreamNote> {
        let run = PageRun {
            vaddr: 0x7000,
            pages: 3,
            flags: PageFlags::PRESENT,
        };
        vec![
            StreamNote::Begin {
                number: 1,
                is_final: true,
            },
            StreamNote::Objects(vec![
                Object::Memory(PagemapName::Task(4)),
                Object::Memory(PagemapName::Shmem(5)),
                Object::File {
                    name: FileName::new("core-4.img").unwrap(),
                    mode: 0o644,
                    size: 10,
                },
            ]),
            StreamNote::Runs {
                object: 1,
                runs: vec![run],
            },
            StreamNote::End {
                number: 1,
                root: Some(Digest([3; 32])),
            },
            StreamNote::End {
                number: 1,
                root: None,
            },
        ]
    }

    #[test]
    fn every_step_comes_back() {
        for step in steps() {
            let message = Message::Migration(step);
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn every_note_comes_back() {
        for note in notes() {
            let bytes = note.encode();
            assert_eq!(RecordKind::from_byte(bytes[0]), Ok(RecordKind::Note));
            let length = u32::from_le_bytes(bytes[1..5].try_into().unwrap());
            assert_eq!(length as usize, bytes.len() - 5);
            assert_eq!(StreamNote::decode(&bytes[5..]), Ok(note));
        }
    }

    #[test]
    fn what_no_source_says_is_refused() {
        let object = |kind, name: &str, mode, size| {
            Object::from_proto(v1::Object {
                kind,
                id: 1,
                name: name.into(),
                mode,
                size,
            })
        };
        assert!(object(FILE, "core-1.img", 0o600, 1).is_ok());
        assert!(object(4, "", 0, 0).is_err());
        assert!(object(FILE, "../x", 0o600, 1).is_err());
        assert!(object(FILE, "core-1.img", 0o4600, 1).is_err());
        assert!(object(FILE, "core-1.img", 0o600, u64::MAX).is_err());
        let runs = |pages, flags| {
            runs_in(&v1::Runs {
                object: 0,
                addresses: vec![4096],
                pages: vec![pages],
                flags: vec![flags],
            })
        };
        assert!(runs(1, 4).is_ok() && runs(1, 6).is_ok());
        for (pages, flags) in [(0, 4), (1, 1), (1, 5), (1, 2), (1, 64)] {
            assert!(runs(pages, flags).is_err(), "{pages} {flags}");
        }
        assert!(StreamNote::decode(&[]).is_err());
        assert!(RecordKind::from_byte(9).is_err());
    }
}
