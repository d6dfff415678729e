//! What the source says of itself and of its tree.

use std::net::IpAddr;

use crxfer_proto::v1;
use prost::Message as _;

/// Limits on what the peer states.
pub mod limits {
    /// Bytes of encoded facts.
    pub const FACTS: usize = 512 << 10;
    /// Bytes of an encoded list of checks.
    pub const CHECKS: usize = 256 << 10;
    /// Checks in one list.
    pub const CHECK_COUNT: usize = 64;
    /// Bytes of each text of a check.
    pub const TEXT: usize = 1024;
    /// Pids and thread ids of a tree; what is above is counted, not named.
    pub const TASKS: usize = 32 << 10;
    /// Mapped and open files; what is above is counted, not named.
    pub const FILES: usize = 4096;
    /// Bytes of all paths together.
    pub const PATHS: usize = 256 << 10;
    /// Bytes of one path, as Linux has it.
    pub const PATH: usize = 4096;
    /// Different addresses and ports that sockets of a tree are bound to.
    pub const SOCKETS: usize = 1024;
    /// Features of a processor: Linux names about 250 on x86-64.
    pub const CPU_FEATURES: usize = 1024;
    /// Bytes of the name of a feature, a machine or a kernel.
    pub const WORD: usize = 128;
}

/// What the destination is told before a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The host that the tree runs on.
    pub host: Host,
    /// `--force` was given: what only guards against a risk does not stop the migration.
    pub force: bool,
    /// The tree itself.
    pub tree: Tree,
    /// Files that CRIU opens again on the destination, ascending by path.
    pub files: Vec<File>,
    /// Files that are not in `files` because they are too many, or have names that are no text.
    pub files_left_out: u32,
    /// What sockets of the tree are bound to, each once, ascending.
    pub sockets: Vec<Socket>,
}

/// A host, as far as a restored process notices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Release of the kernel, as `uname -r` shows it.
    pub kernel: String,
    /// Machine, as `uname -m` shows it.
    pub machine: String,
    /// Bytes of a page.
    pub page_size: u64,
    /// What every processor can do, in the words of /proc/cpuinfo, ascending.
    pub cpu_features: Vec<String>,
    /// CRIU's version; `None` where none was found.
    pub criu: Option<CriuVersion>,
}

/// A version of CRIU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CriuVersion {
    /// First number.
    pub major: u16,
    /// Second number; below 100.
    pub minor: u16,
    /// Third number; below 100, 0 where none is stated.
    pub sublevel: u16,
}

/// The tree, as far as the destination has to make room for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    /// Pids and thread ids that CRIU takes again, ascending.
    pub tasks: Vec<u32>,
    /// Tasks above the limit, which `tasks` does not name.
    pub tasks_left_out: u32,
    /// Anonymous and shared memory, swapped pages too.
    pub memory_bytes: u64,
    /// It brings its own pid namespace: its pids are free there.
    pub own_pid_namespace: bool,
    /// It brings its own network namespace: its addresses come with it.
    pub own_net_namespace: bool,
    /// It brings its own mount namespace: its paths are not this host's.
    pub own_mount_namespace: bool,
    /// It has IPv4 or IPv6 sockets.
    pub inet_sockets: bool,
    /// Established TCP connections.
    pub connections: u32,
}

/// A file that CRIU opens again: mapped, open, a directory that a process is in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct File {
    /// Where it is, absolute.
    pub path: String,
    /// Bytes of a regular file; 0 for a directory.
    pub size: u64,
    /// Kind and permission bits, as stat has them: CRIU compares both.
    pub mode: u32,
    /// Open for writing: its size may change until the freeze.
    pub written: bool,
    /// Open for appending only, as logs are: CRIU does not compare its size.
    pub grows: bool,
}

/// What a socket of the tree is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Socket {
    /// The local address; the unspecified one for any.
    pub address: IpAddr,
    /// The local port; 0 for connections, which share the port of what accepted them.
    pub port: u16,
    /// What it is.
    pub kind: SocketKind,
}

/// Kinds of sockets that are bound to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SocketKind {
    /// TCP, waiting for connections.
    Listening,
    /// TCP, connected.
    Connected,
    /// UDP, connected or not.
    Udp,
}

/// Facts or checks of the peer that break the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// More bytes than are taken.
    #[error("the peer's {0} have {1} bytes, more than are taken")]
    TooLarge(&'static str, usize),
    /// Not the message that it should be.
    #[error("the peer's {0} cannot be decoded: is it the same version of crxfer?")]
    NotTheMessage(&'static str),
    /// A field that has a value which it cannot have.
    #[error("the peer's preflight facts have a wrong {0}")]
    Field(&'static str),
}

impl std::fmt::Display for CriuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        match self.sublevel {
            0 => Ok(()),
            sublevel => write!(f, ".{sublevel}"),
        }
    }
}

impl CriuVersion {
    /// From its numbers, `None` where one does not fit the form in which it crosses the wire.
    pub fn new(major: u16, minor: u16, sublevel: u16) -> Option<Self> {
        (minor < 100 && sublevel < 100 && major > 0).then_some(Self {
            major,
            minor,
            sublevel,
        })
    }

    /// From what `criu --version` prints; suffixes of distributions are left out.
    pub fn parse(text: &str) -> Option<Self> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Version:"))?;
        let word = line.trim_start().trim_start_matches('v');
        let end = word.find(|c: char| !c.is_ascii_digit() && c != '.');
        let mut numbers = word[..end.unwrap_or(word.len())].split('.');
        let mut next = || match numbers.next() {
            None | Some("") => Some(0),
            Some(digits) => digits.parse().ok(),
        };
        Self::new(next()?, next()?, next()?)
    }

    fn to_number(self) -> u32 {
        u32::from(self.major) * 10_000 + u32::from(self.minor) * 100 + u32::from(self.sublevel)
    }

    fn from_number(number: u32) -> Result<Option<Self>, FormatError> {
        if number == 0 {
            return Ok(None);
        }
        let bad = || FormatError::Field("version of CRIU");
        let part = |value: u32| u16::try_from(value).map_err(|_| bad());
        let (major, minor, sublevel) = (number / 10_000, number / 100 % 100, number % 100);
        Self::new(part(major)?, part(minor)?, part(sublevel)?)
            .map(Some)
            .ok_or_else(bad)
    }
}

impl Facts {
    /// Addresses that sockets of the tree are bound to and that other hosts reach, each once: those
    /// that have to move with it.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let addresses = self.sockets.iter().map(|socket| socket.address);
        let mut addresses: Vec<_> = addresses
            .filter(|address| !address.is_unspecified() && !address.is_loopback())
            .collect();
        addresses.dedup();
        addresses
    }

    /// The bytes that [`Facts::decode`] takes, provided that the lists are within [`limits`].
    pub fn encode(&self) -> Vec<u8> {
        self.to_proto().encode_to_vec()
    }

    /// Facts of the peer.
    ///
    /// # Errors
    /// When they are too large, no such message, or have a list or text beyond [`limits`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > limits::FACTS {
            return Err(FormatError::TooLarge("preflight facts", bytes.len()));
        }
        let facts =
            v1::Facts::decode(bytes).map_err(|_| FormatError::NotTheMessage("preflight facts"))?;
        Self::from_proto(facts)
    }

    fn from_proto(facts: v1::Facts) -> Result<Self, FormatError> {
        bound(facts.files.len(), limits::FILES, "number of files")?;
        bound(facts.sockets.len(), limits::SOCKETS, "number of sockets")?;
        let paths = facts.files.iter().map(|file| file.path.len()).sum();
        bound(paths, limits::PATHS, "length of all paths")?;
        let files = facts.files.into_iter().map(File::from_proto);
        let sockets = facts.sockets.iter().map(Socket::from_proto);
        Ok(Self {
            host: Host::from_proto(facts.host.unwrap_or_default())?,
            force: facts.choices.unwrap_or_default().force,
            tree: Tree::from_proto(facts.tree.unwrap_or_default())?,
            files: files.collect::<Result<_, _>>()?,
            files_left_out: facts.files_left_out,
            sockets: sockets.collect::<Result<_, _>>()?,
        })
    }

    fn to_proto(&self) -> v1::Facts {
        v1::Facts {
            host: Some(self.host.to_proto()),
            choices: Some(v1::FactsChoices { force: self.force }),
            tree: Some(self.tree.to_proto()),
            files: self.files.iter().map(File::to_proto).collect(),
            files_left_out: self.files_left_out,
            sockets: self
                .sockets
                .iter()
                .map(|socket| socket.to_proto())
                .collect(),
        }
    }
}

impl Host {
    fn from_proto(host: v1::FactsHost) -> Result<Self, FormatError> {
        let count = host.cpu_features.len();
        bound(count, limits::CPU_FEATURES, "number of CPU features")?;
        for feature in &host.cpu_features {
            word(feature, "CPU feature")?;
        }
        word(&host.kernel, "kernel")?;
        word(&host.machine, "machine")?;
        Ok(Self {
            kernel: host.kernel,
            machine: host.machine,
            page_size: host.page_size,
            cpu_features: host.cpu_features,
            criu: CriuVersion::from_number(host.criu_version)?,
        })
    }

    fn to_proto(&self) -> v1::FactsHost {
        v1::FactsHost {
            kernel: self.kernel.clone(),
            machine: self.machine.clone(),
            page_size: self.page_size,
            cpu_features: self.cpu_features.clone(),
            criu_version: self.criu.map_or(0, CriuVersion::to_number),
        }
    }
}

impl Tree {
    fn from_proto(tree: v1::FactsTree) -> Result<Self, FormatError> {
        bound(tree.tasks.len(), limits::TASKS, "number of tasks")?;
        Ok(Self {
            tasks: tree.tasks,
            tasks_left_out: tree.tasks_left_out,
            memory_bytes: tree.memory_bytes,
            own_pid_namespace: tree.own_pid_namespace,
            own_net_namespace: tree.own_net_namespace,
            own_mount_namespace: tree.own_mount_namespace,
            inet_sockets: tree.inet_sockets,
            connections: tree.connections,
        })
    }

    fn to_proto(&self) -> v1::FactsTree {
        v1::FactsTree {
            tasks: self.tasks.clone(),
            tasks_left_out: self.tasks_left_out,
            memory_bytes: self.memory_bytes,
            own_pid_namespace: self.own_pid_namespace,
            own_net_namespace: self.own_net_namespace,
            own_mount_namespace: self.own_mount_namespace,
            inet_sockets: self.inet_sockets,
            connections: self.connections,
        }
    }
}

impl File {
    /// Whether `path` is one that facts can name: absolute, and safe to show on a terminal.
    pub(super) fn can_name(path: &str) -> bool {
        path.starts_with('/') && path.len() <= limits::PATH && !path.chars().any(char::is_control)
    }

    fn from_proto(file: v1::FactsFile) -> Result<Self, FormatError> {
        if !Self::can_name(&file.path) {
            return Err(FormatError::Field("path"));
        }
        Ok(Self {
            path: file.path,
            size: file.size,
            mode: file.mode,
            written: file.written,
            grows: file.grows,
        })
    }

    fn to_proto(&self) -> v1::FactsFile {
        v1::FactsFile {
            path: self.path.clone(),
            size: self.size,
            mode: self.mode,
            written: self.written,
            grows: self.grows,
        }
    }
}

impl Socket {
    fn from_proto(socket: &v1::FactsSocket) -> Result<Self, FormatError> {
        let bytes = socket.address.as_slice();
        let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
        let sixteen = || <[u8; 16]>::try_from(bytes).map(IpAddr::from);
        let address = four.or_else(|_| sixteen());
        Ok(Self {
            address: address.map_err(|_| FormatError::Field("address"))?,
            port: u16::try_from(socket.port).map_err(|_| FormatError::Field("port"))?,
            kind: match socket.kind {
                1 => SocketKind::Listening,
                2 => SocketKind::Connected,
                3 => SocketKind::Udp,
                _ => return Err(FormatError::Field("kind of socket")),
            },
        })
    }

    fn to_proto(self) -> v1::FactsSocket {
        v1::FactsSocket {
            address: match self.address {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            },
            port: self.port.into(),
            kind: match self.kind {
                SocketKind::Listening => 1,
                SocketKind::Connected => 2,
                SocketKind::Udp => 3,
            },
        }
    }
}

fn bound(count: usize, most: usize, what: &'static str) -> Result<(), FormatError> {
    if count > most {
        return Err(FormatError::Field(what));
    }
    Ok(())
}

fn word(text: &str, what: &'static str) -> Result<(), FormatError> {
    if text.len() > limits::WORD || text.chars().any(char::is_control) {
        return Err(FormatError::Field(what));
    }
    Ok(())
}

/// Facts with every field set: a seed of the corpus, and what tests start from.
#[cfg(any(test, feature = "testing"))]
pub fn sample() -> Facts {
    let file = |path: &str, size, mode| File {
        path: path.into(),
        size,
        mode,
        written: false,
        grows: false,
    };
    let socket = |address: [u8; 4], port, kind| Socket {
        address: address.into(),
        port,
        kind,
    };
    Facts {
        host: Host {
            kernel: "6.1.0-40-amd64".into(),
            machine: "x86_64".into(),
            page_size: 4096,
            cpu_features: ["avx2", "sse2", "sse4_2"].map(str::to_owned).to_vec(),
            criu: CriuVersion::new(4, 2, 1),
        },
        force: false,
        tree: Tree {
            tasks: vec![400, 401, 402],
            tasks_left_out: 0,
            memory_bytes: 256 << 20,
            own_pid_namespace: false,
            own_net_namespace: false,
            own_mount_namespace: false,
            inet_sockets: true,
            connections: 2,
        },
        files: vec![
            file("/srv", 0, 0o40755),
            File {
                written: true,
                grows: true,
                ..file("/srv/log", 700, 0o100_644)
            },
            file("/usr/bin/service", 123_456, 0o100_755),
        ],
        files_left_out: 1,
        sockets: vec![
            socket([127, 0, 0, 1], 11211, SocketKind::Listening),
            socket([127, 0, 0, 1], 11211, SocketKind::Udp),
            socket([192, 0, 2, 7], 0, SocketKind::Connected),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_come_back_as_they_were_sent() {
        let mut facts = sample();
        facts.force = true;
        facts.host.criu = None;
        facts.sockets.push(Socket {
            address: "2001:db8::7".parse().expect("an address"),
            port: u16::MAX,
            kind: SocketKind::Listening,
        });
        assert_eq!(Facts::decode(&facts.encode()), Ok(facts));
        assert_eq!(Facts::decode(&[]), Ok(Facts::default()));
    }

    #[test]
    fn too_many_or_too_long_is_refused() {
        let refused = |change: fn(&mut Facts)| {
            let mut facts = sample();
            change(&mut facts);
            assert!(Facts::decode(&facts.encode()).is_err());
        };
        refused(|facts| facts.tree.tasks = vec![1; limits::TASKS + 1]);
        refused(|facts| facts.files = vec![facts.files[0].clone(); limits::FILES + 1]);
        refused(|facts| facts.sockets = vec![facts.sockets[0]; limits::SOCKETS + 1]);
        refused(|facts| facts.files[0].path = "relative".into());
        refused(|facts| facts.files[0].path = "/\u{1b}[2J".into());
        refused(|facts| facts.files[0].path = format!("/{}", "x".repeat(limits::PATH)));
        refused(|facts| facts.host.kernel = "x".repeat(limits::WORD + 1));
        refused(|facts| facts.host.machine = "x\n".into());
        refused(|facts| facts.host.cpu_features = vec![String::new(); limits::CPU_FEATURES + 1]);
        let long = vec![0; limits::FACTS + 1];
        let error = FormatError::TooLarge("preflight facts", long.len());
        assert_eq!(Facts::decode(&long), Err(error));
        assert!(matches!(
            Facts::decode(b"what is this"),
            Err(FormatError::NotTheMessage(_))
        ));
    }

    #[test]
    fn the_fullest_facts_fit() {
        let mut facts = sample();
        let path = format!("/{}", "x".repeat(limits::PATHS / limits::FILES - 1));
        facts.tree.tasks = vec![1 << 22; limits::TASKS];
        facts.files = vec![
            File {
                path,
                ..facts.files[0].clone()
            };
            limits::FILES
        ];
        facts.files.iter_mut().for_each(|file| {
            (file.size, file.mode) = (1 << 40, u32::MAX);
            (file.written, file.grows) = (true, true);
        });
        facts.sockets = vec![facts.sockets[1]; limits::SOCKETS];
        facts.host.cpu_features = vec!["avx512_vpopcntdq".into(); limits::CPU_FEATURES / 2];
        let bytes = facts.encode();
        assert!(bytes.len() <= limits::FACTS, "{}", bytes.len());
        assert_eq!(Facts::decode(&bytes), Ok(facts));
    }

    #[test]
    fn versions_of_criu_are_read() {
        let version = |text| CriuVersion::parse(text).map(|version| version.to_string());
        assert_eq!(version("Version: 4.2.1\n").as_deref(), Some("4.2.1"));
        assert_eq!(
            version("Version: 4.2\nGitID: v4.2\n").as_deref(),
            Some("4.2")
        );
        assert_eq!(version("Version: 4.1-2~deb\n").as_deref(), Some("4.1"));
        assert_eq!(version("criu: not found"), None);
        assert_eq!(version("Version: x"), None);
        assert_eq!(version("Version: 99999999.1"), None);
    }
}
