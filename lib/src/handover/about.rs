//! What a journal says about its migration: all that must be known to end it without its process.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sink::{Holder, Unseen};
use crate::tree::{Fence, Process, Tree, boot_id};

/// What must be known of a migration to end it on the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceAbout {
    /// Name of the migration.
    pub name: String,
    /// The tree's processes: pids as this host sees them, and when they were started.
    pub tree: Tree,
    /// Where the destination may be met again, best first.
    pub addresses: Vec<std::net::SocketAddr>,
    /// Fingerprint of the destination's key.
    pub peer: String,
    /// This host's key for the meeting: a PEM file beside the journal or of the operator's.
    pub identity: PathBuf,
    /// Directory of the last images, removed with the migration.
    pub work: PathBuf,
    /// Id that CRIU gives its network lock, once that is known.
    pub run_id: Option<String>,
    /// Names of nftables tables of CRIU's that were there before: not this migration's.
    pub foreign_tables: Vec<String>,
    /// Process of `criu`, and when it was started.
    pub criu: Option<Process>,
    /// The command that starts CRIU in the place of a CRIU of our own: it leads a process group.
    #[serde(default)]
    pub command: Option<Process>,
    /// A command that has the runtime forget a workload that was ended.
    #[serde(default)]
    pub forget: Option<String>,
    /// The fence, once there is one.
    pub fence: Option<Fence>,
    /// What to do where the destination cannot be reached.
    pub on_partition: super::OnPartition,
    /// How long it holds first, in milliseconds from the commit.
    #[serde(default)]
    pub partition_wait_ms: u64,
    /// Addresses that the workload's sockets are bound to: the network lock goes when they have.
    pub bound: Vec<std::net::IpAddr>,
    /// The same, for the hooks: whatever becomes of the lock.
    #[serde(default)]
    pub hook_addresses: Vec<std::net::IpAddr>,
    /// Commands at named moments, each as the command line takes it.
    #[serde(default)]
    pub hooks: Vec<String>,
    /// Milliseconds that each of them may take.
    #[serde(default)]
    pub hook_limit_ms: u64,
    /// The hook after-commit or after-abort has run, well or not.
    #[serde(default)]
    pub hooked: bool,
}

/// What must be known of a migration to end it on the destination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DestinationAbout {
    /// Name of the migration.
    pub name: String,
    /// Fingerprint of the source's key: only it is answered.
    pub peer: String,
    /// Where the source was.
    pub address: std::net::SocketAddr,
    /// Directory of the migration: iterations, `final`, `work`. Where `memory` names processes, the
    /// first of them has it by this path; see [`place`](Self::place).
    pub place: PathBuf,
    /// Processes that hold it by a descriptor, where it is in memory only and has no other path.
    #[serde(default)]
    pub memory: Vec<Holder>,
    /// CRIU's directory where it is not `place/work`: what tells whether a copy has run must not go with
    /// the images.
    #[serde(default)]
    pub work: Option<PathBuf>,
    /// The source's facts, as preflight encodes them: pids, sockets, addresses.
    #[serde(with = "hex")]
    pub facts: Vec<u8>,
    /// What CRIU must be told, as the source asked.
    pub options: crate::wire::RestoreOptions,
    /// The command that builds the copy in the place of a CRIU of our own.
    #[serde(default)]
    pub runtime: Option<crate::runtime::RestoreCommand>,
    /// The container's name, for that command.
    #[serde(default)]
    pub container: String,
    /// CRIU.
    pub program: PathBuf,
    /// A file of CRIU options of this host.
    pub config_file: Option<PathBuf>,
    /// Commands at named moments, each as the command line takes it.
    pub hooks: Vec<String>,
    /// Milliseconds that each of them may take.
    pub hook_limit_ms: u64,
    /// Which boot of this host it was: what runs does not outlive it.
    pub boot: String,
    /// Process of `criu`, and when it was started: copies are begun after that.
    pub criu: Option<Process>,
    /// Root process of the copy, once it is known.
    pub pid: Option<u32>,
    /// The same, told from a later process with its number, once the copy runs.
    #[serde(default)]
    pub root: Option<Process>,
    /// The hook address-announce has run well.
    #[serde(default)]
    pub announced: bool,
    /// The source has heard that the copy runs.
    #[serde(default)]
    pub heard: bool,
}

impl DestinationAbout {
    /// Where the directory of the migration is now; `None` where it was in memory only, and no process
    /// is left that holds it.
    pub fn place(&self) -> Result<Option<PathBuf>, Unseen> {
        if self.memory.is_empty() {
            return Ok(Some(self.place.clone()));
        }
        let name = self.place.file_name();
        match name.filter(|_| self.boot == boot_id()) {
            Some(name) => Holder::find(&self.memory, Path::new(name)),
            None => Ok(None),
        }
    }

    /// Where CRIU has its log and sockets.
    pub fn work(&self) -> PathBuf {
        let work = self.work.clone();
        work.unwrap_or_else(|| self.place.join("work"))
    }

    /// The directory around that: of the script and the socket of a command that restores.
    pub fn scene(&self) -> PathBuf {
        let work = self.work();
        work.parent().map_or(self.place.clone(), PathBuf::from)
    }
}

/// Bytes as hexadecimal digits.
mod hex {
    use std::fmt::Write as _;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], out: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        out.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let pair = |pair: &[u8]| {
            let [high, low] = pair else { return None };
            u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes.ok_or_else(|| D::Error::custom("not hexadecimal digits"))
    }
}
