//! The two kinds of freezer cgroups: where they are mounted, who is in which.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use serde::{Deserialize, Serialize};

/// Deepest nesting of cgroups that is searched. Container runtimes nest below ten.
const MOST_DEPTH: usize = 64;

/// Which of the kernel's freezers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Freezer {
    /// The `freezer` controller of cgroup v1: a process that is killed ends when it is thawed.
    V1,
    /// `cgroup.freeze` of cgroup v2 (Linux 5.2 and later): a process that is killed ends at once.
    V2,
}

impl std::fmt::Display for Freezer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "cgroup v1",
            Self::V2 => "cgroup v2",
        })
    }
}

impl Freezer {
    /// The file by which a cgroup is frozen; a hierarchy's root has none.
    pub(super) fn switch(self) -> &'static str {
        match self {
            Self::V1 => "freezer.state",
            Self::V2 => "cgroup.freeze",
        }
    }

    /// Begins to freeze or thaw the cgroup `directory`.
    pub(super) fn set(self, directory: &Path, frozen: bool) -> io::Result<()> {
        let word = match (self, frozen) {
            (Self::V1, true) => "FROZEN",
            (Self::V1, false) => "THAWED",
            (Self::V2, true) => "1",
            (Self::V2, false) => "0",
        };
        write(&directory.join(self.switch()), word)
    }

    /// Whether all tasks in the cgroup `directory` stand still.
    pub(super) fn is_frozen(self, directory: &Path) -> io::Result<bool> {
        let name = match self {
            Self::V1 => "freezer.state",
            Self::V2 => "cgroup.events",
        };
        let text = std::fs::read_to_string(directory.join(name))?;
        Ok(match self {
            Self::V1 => text.trim() == "FROZEN",
            Self::V2 => text.lines().any(|line| line == "frozen 1"),
        })
    }
}

/// A mounted hierarchy of cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) version: Freezer,
    /// Where it is mounted.
    mount: PathBuf,
    /// Which of its cgroups is seen there.
    root: PathBuf,
}

impl Hierarchy {
    /// That with this freezer; `None` where none is mounted.
    pub(super) fn find(version: Freezer) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        Self::among(version, &mounts)
    }

    /// That which shows most, where it is mounted more than once.
    fn among(version: Freezer, mountinfo: &str) -> Option<Self> {
        let found = mountinfo.lines().filter_map(|line| mounted(version, line));
        found.min_by_key(|hierarchy| hierarchy.root.components().count())
    }

    /// The directory of the cgroup that process `pid` is in.
    pub(super) fn cgroup_of(&self, pid: u32) -> io::Result<PathBuf> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        self.directory(&text).ok_or_else(|| {
            let message = "its cgroup is outside of what is mounted here";
            io::Error::new(io::ErrorKind::NotFound, message)
        })
    }

    fn directory(&self, memberships: &str) -> Option<PathBuf> {
        let mut groups = memberships.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            Some((parts.next()?, parts.next()?, parts.next()?))
        });
        let (_, _, path) = groups.find(|(number, controllers, _)| match self.version {
            Freezer::V1 => controllers.split(',').any(|name| name == "freezer"),
            Freezer::V2 => *number == "0" && controllers.is_empty(),
        })?;
        let below = Path::new(path).strip_prefix(&self.root).ok()?;
        let plain = below
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        plain.then(|| self.mount.join(below))
    }
}

/// The hierarchy of one line of mountinfo: proc_pid_mountinfo(5).
fn mounted(version: Freezer, line: &str) -> Option<Hierarchy> {
    let (mount, kind) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, at) = (mount.next()?, mount.next()?);
    let mut kind = kind.split(' ');
    let (name, options) = (kind.next()?, kind.nth(1)?);
    let fits = match version {
        Freezer::V1 => name == "cgroup" && options.split(',').any(|option| option == "freezer"),
        Freezer::V2 => name == "cgroup2",
    };
    fits.then(|| Hierarchy {
        version,
        mount: unescaped(at),
        root: unescaped(root),
    })
}

// Blanks, line feeds and backslashes are written as \ooo.
fn unescaped(text: &str) -> PathBuf {
    let mut path = text.to_owned();
    for (escaped, plain) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        path = path.replace(escaped, plain);
    }
    path.into()
}

/// The deepest cgroup that all of `directories` are or are below of.
pub(super) fn common<'a>(mut directories: impl Iterator<Item = &'a Path>) -> Option<PathBuf> {
    let mut common = directories.next()?.to_owned();
    for directory in directories {
        while !directory.starts_with(&common) {
            common.pop();
        }
    }
    Some(common)
}

/// The processes in the cgroup `directory` and in those below it; 0 stands for one outside of this
/// pid namespace.
pub(super) fn members(directory: &Path) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    gather(directory, MOST_DEPTH, &mut pids)?;
    Ok(pids)
}

fn gather(directory: &Path, depth: usize, pids: &mut Vec<u32>) -> io::Result<()> {
    pids.extend(own_members(directory)?);
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if depth == 0 || !entry.file_type()?.is_dir() {
            continue;
        }
        match gather(&entry.path(), depth - 1, pids) {
            // Removed meanwhile.
            Err(error) if is_gone(&error) => {}
            result => result?,
        }
    }
    Ok(())
}

fn own_members(directory: &Path) -> io::Result<Vec<u32>> {
    let text = match std::fs::read_to_string(directory.join("cgroup.procs")) {
        // The processes of a threaded cgroup are listed by the one that it is a part of.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        text => text?,
    };
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Puts process `pid` into the cgroup `directory`; false where there is no such process any more.
pub(super) fn put(pid: u32, directory: &Path) -> io::Result<bool> {
    match write(&directory.join("cgroup.procs"), &pid.to_string()) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
}

// Only to what exists: beside the mount of a hierarchy there may be a plain file system.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(text.as_bytes())
}

/// The `cgroup.type` of a cgroup v2: `domain`, `threaded`, …; a root has none and is a domain.
pub(super) fn kind(directory: &Path) -> String {
    let kind = std::fs::read_to_string(directory.join("cgroup.type"));
    kind.map_or_else(|_| "domain".to_owned(), |kind| kind.trim().to_owned())
}

/// Whether this process may write the file or directory `path`.
pub(super) fn may_write(path: &Path) -> io::Result<()> {
    Ok(access(path, Access::WRITE_OK)?)
}

/// What the kernel says of a cgroup that was removed.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        36 31 0:33 /docker/7 /mnt rw - cgroup cgroup rw,cpu,freezer\n\
        37 31 0:34 / /sys/fs/cgroup/free\\040zer rw shared:4 - cgroup cgroup rw,freezer\n\
        41 31 0:38 /a /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\nbroken\n";

    #[test]
    fn hierarchies_are_found_among_the_mounts() {
        let v1 = Hierarchy::among(Freezer::V1, HYBRID).unwrap();
        assert_eq!(v1.mount, Path::new("/sys/fs/cgroup/free zer"));
        assert_eq!(v1.root, Path::new("/"));
        let v2 = Hierarchy::among(Freezer::V2, HYBRID).unwrap();
        assert_eq!(v2.root, Path::new("/a"));
        assert_eq!(
            Hierarchy::among(Freezer::V2, "1 2 0:3 / / rw - ext4 d rw"),
            None
        );
    }

    #[test]
    fn memberships_name_a_directory_or_nothing() {
        let v1 = Hierarchy::among(Freezer::V1, HYBRID).unwrap();
        let v2 = Hierarchy::among(Freezer::V2, HYBRID).unwrap();
        let text = "6:cpu,freezer:/x:y\n4:memory:/m\n0::/a/b\n";
        let directory = v1.directory(text).unwrap();
        assert_eq!(directory, Path::new("/sys/fs/cgroup/free zer/x:y"));
        let directory = v2.directory(text).unwrap();
        assert_eq!(directory, Path::new("/sys/fs/cgroup/unified/b"));
        assert_eq!(v2.directory("0::/c\n"), None, "not what is mounted");
        assert_eq!(
            v1.directory("6:freezer:/../x\n"),
            None,
            "outside of the namespace"
        );
        assert_eq!(v1.directory("0::/a\n"), None);
    }

    #[test]
    fn the_common_cgroup_is_the_deepest() {
        let common = |paths: &[&str]| common(paths.iter().map(Path::new));
        assert_eq!(common(&["/c/a/b", "/c/a/d"]), Some("/c/a".into()));
        assert_eq!(common(&["/c/ab", "/c/a"]), Some("/c".into()));
        assert_eq!(common(&["/c/a"]), Some("/c/a".into()));
        assert_eq!(common(&[]), None);
    }
}
