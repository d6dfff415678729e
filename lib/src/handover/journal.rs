//! The records of one migration on one host.
//!
//! A migration has a directory of its own, `STATE/source-ID` or `STATE/destination-ID`, mode 0700:
//!
//! - `journal`: one record a line, `CHECKSUM JSON`, where CHECKSUM is the first eight hexadecimal
//!   digits of the JSON's BLAKE3. Lines are only ever appended, each by one write, so a process that
//!   dies leaves whole lines; a last line that a power cut has torn does not count.
//! - `lock`: held by whoever takes care of the migration ([`Lease`]); free when that has died.
//!
//! Appending locks the journal itself for a moment and reads it again: two processes cannot both take
//! a step from the same state.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use super::about::{DestinationAbout, SourceAbout};
use super::state::{DestinationState, Keep, SourceState};
use crate::wire::MigrationId;

/// Where journals lie, below the directory of the state.
const JOURNAL: &str = "journal";
// As long as its first lines are not all there.
const UNBEGUN: &str = "journal.new";
const LOCK: &str = "lock";

/// Longest journal that is read, in bytes: that of a large tree has a few hundred kilobytes.
const MOST_BYTES: usize = 16 << 20;

/// Hexadecimal digits before each record.
const CHECKSUM_DIGITS: usize = 8;

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A system call failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line that was not torn by a power cut is not what was written, or of another version.
    #[error(
        "{path}: line {line} is damaged, or of another version of crxfer; look on both hosts where the workload runs, end what must not, then remove {}",
        path.parent().unwrap_or(path).display()
    )]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
    /// Another process has recorded something else meanwhile.
    #[error("{path}: {wanted} cannot follow {found}: another crxfer has decided already")]
    Overtaken {
        /// The journal.
        path: PathBuf,
        /// The last state there.
        found: String,
        /// What should have been recorded.
        wanted: String,
    },
}

/// A state of one of the sides, as the journal needs it.
pub trait State: Copy + PartialEq + std::fmt::Debug + Serialize + DeserializeOwned {
    /// The header of a migration: what must be known to end it without its process.
    type About: Clone + std::fmt::Debug + Serialize + DeserializeOwned;
    /// How the directory's name begins.
    const SIDE: &'static str;
    /// The state of a new journal.
    const FIRST: Self;
    /// The state in which nothing is left to do.
    const LAST: Self;
    /// Whether `next` may be recorded after this.
    fn may_become(self, next: Self) -> bool;
    /// Whether `next` is against an operator's word.
    fn is_barred(_next: Self, _decided: Option<Keep>) -> bool {
        false
    }
}

/// The fields of a header, by name.
type Fields = serde_json::Map<String, serde_json::Value>;

fn fields<A: Serialize>(about: &A) -> Fields {
    match serde_json::to_value(about) {
        Ok(serde_json::Value::Object(fields)) => fields,
        other => unreachable!("a header is a struct of plain data: {other:?}"),
    }
}

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line<S> {
    /// The header. The first line.
    About(Fields),
    /// Fields of the header that have changed: what is learned on the way.
    Learned(Fields),
    /// A step.
    State { state: S, at_ms: u64, note: String },
    /// What an operator or a policy decided.
    Decided { keep: Keep, at_ms: u64, by: String },
}

/// When a state was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<S> {
    /// Which.
    pub state: S,
    /// When.
    pub at: SystemTime,
    /// Why, for people; may be empty.
    pub note: String,
}

/// What a journal says.
#[derive(Clone, Debug)]
pub struct History<S: State> {
    /// The header as it was written last.
    pub about: S::About,
    /// All states, oldest first. None where a power cut has torn the first: then it is that one.
    pub entries: Vec<Entry<S>>,
    /// The last decision, and whose.
    pub decided: Option<(Keep, String)>,
}

impl<S: State> History<S> {
    /// The state that counts.
    pub fn state(&self) -> S {
        self.entries.last().map_or(S::FIRST, |entry| entry.state)
    }

    /// Since when it counts.
    pub fn since(&self) -> SystemTime {
        self.entries.last().map_or(UNIX_EPOCH, |entry| entry.at)
    }

    /// The last decision.
    pub fn keep(&self) -> Option<Keep> {
        self.decided.as_ref().map(|(keep, _)| *keep)
    }
}

/// The journal of one migration on one host.
#[derive(Debug)]
pub struct Journal<S: State> {
    directory: PathBuf,
    id: MigrationId,
    file: File,
    durable: bool,
    // Threads that share this one: the file's lock is the same for all of them.
    turn: Mutex<()>,
    side: std::marker::PhantomData<S>,
}

/// The right to take care of a migration: ends with the process that holds it.
#[derive(Debug)]
pub struct Lease {
    _file: File,
}

impl<S: State> Journal<S> {
    /// Begins the journal of a migration below `root`, which is made where it does not exist, and
    /// takes its [`Lease`].
    ///
    /// Records are synced where `root` survives a power cut.
    pub fn create(
        root: &Path,
        id: MigrationId,
        about: S::About,
    ) -> Result<(Self, Lease), JournalError> {
        let directory = Self::directory_of(root, id);
        let mut private = fs::DirBuilder::new();
        private.mode(0o700).recursive(true);
        private.create(root).map_err(failed("make", root))?;
        private.recursive(false);
        private
            .create(&directory)
            .map_err(failed("make", &directory))?;
        let lease = lease(&directory)?.ok_or_else(|| JournalError::Overtaken {
            path: directory.clone(),
            found: "another process's lease".into(),
            wanted: "a new migration".into(),
        })?;
        let path = directory.join(UNBEGUN);
        let file = options().create_new(true).open(&path);
        let file = file.map_err(failed("create", &path))?;
        let journal = Self {
            durable: crate::sys::is_durable(root).map_err(failed("examine", root))?,
            directory,
            id,
            file,
            turn: Mutex::new(()),
            side: std::marker::PhantomData,
        };
        journal.append(&Line::About(fields(&about)), Sync::Quick)?;
        let first = Line::State {
            state: S::FIRST,
            at_ms: now_ms(),
            note: String::new(),
        };
        journal.append(&first, Sync::Durable)?;
        fs::rename(&path, journal.path()).map_err(failed("rename", &path))?;
        if journal.durable {
            for path in [journal.directory.as_path(), root] {
                let synced = File::open(path).and_then(|directory| directory.sync_all());
                synced.map_err(failed("sync", path))?;
            }
        }
        Ok((journal, lease))
    }

    /// Opens that of `id`; `None` where there is none.
    pub fn open(root: &Path, id: MigrationId) -> Result<Option<Self>, JournalError> {
        let directory = Self::directory_of(root, id);
        let path = directory.join(JOURNAL);
        let file = match options().open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed("open", &path))?,
        };
        Ok(Some(Self {
            durable: crate::sys::is_durable(root).map_err(failed("examine", root))?,
            directory,
            id,
            file,
            turn: Mutex::new(()),
            side: std::marker::PhantomData,
        }))
    }

    /// The migrations that have a journal of this side below `root`, in no order. A directory that
    /// a death left without a journal is not named.
    pub fn list(root: &Path) -> Result<Vec<MigrationId>, JournalError> {
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("list", root))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("list", root))?;
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| {
                let id = name.strip_prefix(S::SIDE)?.strip_prefix('-')?;
                MigrationId::parse(id)
            });
            if let Some(id) = id.filter(|_| entry.path().join(JOURNAL).exists()) {
                found.push(id);
            }
        }
        Ok(found)
    }

    /// Where the directory of migration `id` is, or will be.
    pub(crate) fn directory_of(root: &Path, id: MigrationId) -> PathBuf {
        root.join(format!("{}-{id}", S::SIDE))
    }

    /// Which migration.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// Its directory: for what else must outlive the process.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes the lease; `None` while another process has it.
    pub fn lease(&self) -> Result<Option<Lease>, JournalError> {
        lease(&self.directory)
    }

    /// Waits until the lease is free, and takes it. Blocks.
    pub fn await_lease(&self) -> Result<Lease, JournalError> {
        let path = self.directory.join(LOCK);
        let file = lock_file(&path)?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed("lock", &path)(error.into())),
                Ok(()) => return Ok(Lease { _file: file }),
            }
        }
    }

    /// What it says now.
    pub fn read(&self) -> Result<History<S>, JournalError> {
        let path = self.path();
        Ok(parse(&self.bytes()?, &path)?.0)
    }

    fn bytes(&self) -> Result<Vec<u8>, JournalError> {
        let path = self.path();
        let mut bytes = Vec::new();
        let mut part = [0; 16 << 10];
        loop {
            // By position: threads may share the file.
            match self.file.read_at(&mut part, bytes.len() as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", &path)(error)),
                Ok(0) => return Ok(bytes),
                Ok(read) => bytes.extend_from_slice(&part[..read]),
            }
            if bytes.len() > MOST_BYTES {
                // What lies behind might be what counts.
                let error = io::Error::other(format!("it has more than {MOST_BYTES} bytes"));
                return Err(failed("read", &path)(error));
            }
        }
    }

    /// Records a step. Fails where it may not follow what the journal says by now.
    pub fn advance(&self, next: S, note: &str) -> Result<(), JournalError> {
        self.step(next, note, Sync::Durable)
    }

    /// As [`advance`](Self::advance), without waiting for the disk: any process that lives sees the
    /// step, a power cut may forget it.
    ///
    /// For steps whose meaning a power cut takes along anyway. A copy that is let go, or runs, does not
    /// outlive this boot; that it was complete, which is on disk, is what is true afterwards. A sync
    /// would cost downtime: it stands between the source's word and the copy's first instruction.
    pub fn advance_quickly(&self, next: S, note: &str) -> Result<(), JournalError> {
        self.step(next, note, Sync::Quick)
    }

    fn step(&self, next: S, note: &str, sync: Sync) -> Result<(), JournalError> {
        let _locked = self.locked()?;
        let history = self.settled()?;
        let found = history.state();
        if !found.may_become(next) || S::is_barred(next, history.keep()) {
            return Err(JournalError::Overtaken {
                path: self.path(),
                found: format!("{found:?}"),
                wanted: format!("{next:?}"),
            });
        }
        let step = Line::State {
            state: next,
            at_ms: now_ms(),
            note: note.to_owned(),
        };
        self.append(&step, sync)
    }

    /// Records what an operator or a policy decided; whoever has the lease acts upon it.
    pub fn decide(&self, keep: Keep, by: &str) -> Result<(), JournalError> {
        let _locked = self.locked()?;
        self.settled()?;
        let decided = Line::Decided {
            keep,
            at_ms: now_ms(),
            by: by.to_owned(),
        };
        self.append(&decided, Sync::Durable)
    }

    /// Lets the header know more. `change` gets it as it is now: what another process has noted stays.
    pub fn note(&self, change: impl FnOnce(&mut S::About)) -> Result<(), JournalError> {
        self.learn(change, Sync::Durable)
    }

    /// As [`note`](Self::note), without waiting for the disk: for what does not outlive this boot, such
    /// as processes.
    pub fn note_quickly(&self, change: impl FnOnce(&mut S::About)) -> Result<(), JournalError> {
        self.learn(change, Sync::Quick)
    }

    fn learn(&self, change: impl FnOnce(&mut S::About), sync: Sync) -> Result<(), JournalError> {
        let _locked = self.locked()?;
        let mut about = self.settled()?.about;
        // Only what is new: a header may be long, and is noted often.
        let known = fields(&about);
        change(&mut about);
        let mut learned = fields(&about);
        learned.retain(|name, value| known.get(name) != Some(value));
        if learned.is_empty() {
            return Ok(());
        }
        self.append(&Line::Learned(learned), sync)
    }

    /// Removes the journal and its directory. Only after the last state, or where a migration never
    /// became more than an offer.
    pub fn remove(&self) -> Result<(), JournalError> {
        fs::remove_dir_all(&self.directory).map_err(failed("remove", &self.directory))
    }

    fn path(&self) -> PathBuf {
        self.directory.join(JOURNAL)
    }

    // All or nothing: what was written in part is taken back, or dropped by the next one.
    fn append(&self, line: &Line<S>, sync: Sync) -> Result<(), JournalError> {
        let path = self.path();
        let json = serde_json::to_string(line).expect("plain data is JSON");
        let text = format!("{} {json}\n", checksum(&json));
        let length = self.file.metadata().map_err(failed("examine", &path))?;
        let written = (&self.file).write_all(text.as_bytes());
        let written = written.map_err(failed("write", &path)).and_then(|()| {
            let synced = if self.durable && sync == Sync::Durable {
                self.file.sync_data()
            } else {
                Ok(())
            };
            synced.map_err(failed("sync", &path))
        });
        if written.is_err() {
            let _ = self.file.set_len(length.len());
        }
        written
    }

    // Released with the guard. A lock of the open file, which dies with its process.
    fn locked(&self) -> Result<Locked<'_>, JournalError> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match rustix::fs::flock(&self.file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed("lock", &self.path())(error.into())),
                Ok(()) => return Ok(Locked(&self.file, turn)),
            }
        }
    }

    // What it says, for whoever has it locked and will append: a torn last line goes.
    fn settled(&self) -> Result<History<S>, JournalError> {
        let path = self.path();
        let bytes = self.bytes()?;
        let (history, whole) = parse(&bytes, &path)?;
        if whole < bytes.len() {
            let cut = self.file.set_len(whole as u64);
            cut.map_err(failed("cut a torn line from", &path))?;
        }
        Ok(history)
    }
}

/// Whether a record must outlive a power cut before anything else is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sync {
    Durable,
    Quick,
}

struct Locked<'a>(
    &'a File,
    #[expect(dead_code, reason = "held")] MutexGuard<'a, ()>,
);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(self.0, FlockOperation::Unlock);
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).append(true).mode(0o600);
    options
}

fn lock_file(path: &Path) -> Result<File, JournalError> {
    let file = options().create(true).open(path);
    file.map_err(failed("open", path))
}

fn lease(directory: &Path) -> Result<Option<Lease>, JournalError> {
    let path = directory.join(LOCK);
    let file = lock_file(&path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(failed("lock", &path)(error.into())),
        Ok(()) => Ok(Some(Lease { _file: file })),
    }
}

// What it says, and how many of its bytes say so.
fn parse<S: State>(bytes: &[u8], path: &Path) -> Result<(History<S>, usize), JournalError> {
    let mut about: Option<Fields> = None;
    let mut told = 0;
    let mut entries = Vec::new();
    let mut decided = None;
    let mut whole = 0;
    let at = |ms| UNIX_EPOCH.checked_add(Duration::from_millis(ms));
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').enumerate();
    let damaged = |index: usize| JournalError::Damaged {
        path: path.to_owned(),
        line: index + 1,
    };
    while let Some((index, text)) = lines.next() {
        let Some(json) = checked(text) else {
            // The last one may be torn; what stands before it is what counts.
            if lines.next().is_none() && about.is_some() {
                break;
            }
            return Err(damaged(index));
        };
        // What is whole and not understood is of a later version, and may be what counts.
        let line = serde_json::from_str::<Line<S>>(json).map_err(|_| damaged(index))?;
        whole += text.len();
        match line {
            Line::About(newer) => (about, told) = (Some(newer), index),
            Line::Learned(fields) => {
                about.as_mut().ok_or_else(|| damaged(index))?.extend(fields);
                told = index;
            }
            Line::State { state, at_ms, note } => entries.push(Entry {
                state,
                at: at(at_ms).unwrap_or(UNIX_EPOCH),
                note,
            }),
            Line::Decided { keep, by, .. } => decided = Some((keep, by)),
        }
    }
    let about = about.ok_or_else(|| damaged(0))?;
    let about = serde_json::from_value(serde_json::Value::Object(about));
    let history = History {
        about: about.map_err(|_| damaged(told))?,
        entries,
        decided,
    };
    Ok((history, whole))
}

fn checked(line: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (sum, json) = text.split_at_checked(CHECKSUM_DIGITS)?;
    let json = json.strip_prefix(' ')?;
    (checksum(json) == sum).then_some(json)
}

fn checksum(json: &str) -> String {
    let mut hex = blake3::hash(json.as_bytes()).to_hex().to_string();
    hex.truncate(CHECKSUM_DIGITS);
    hex
}

#[expect(
    clippy::disallowed_methods,
    reason = "a driver: records say when they were made"
)]
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> JournalError + 'a {
    move |source| JournalError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

impl State for SourceState {
    type About = SourceAbout;
    const SIDE: &'static str = "source";
    const FIRST: Self = Self::Begun;
    const LAST: Self = Self::Over;

    fn may_become(self, next: Self) -> bool {
        self.may_become(next)
    }
}

impl State for DestinationState {
    type About = DestinationAbout;
    const SIDE: &'static str = "destination";
    const FIRST: Self = Self::Receiving;
    const LAST: Self = Self::Over;

    fn may_become(self, next: Self) -> bool {
        self.may_become(next)
    }

    fn is_barred(next: Self, decided: Option<Keep>) -> bool {
        Self::is_barred(next, decided)
    }
}

#[cfg(any(test, feature = "testing"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
