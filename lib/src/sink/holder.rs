//! Finding what another process holds by a descriptor.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::tree::Process;

/// A process that holds a directory by a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The process, as its pid namespace numbers it.
    pub process: Process,
    /// Its number for the directory.
    pub descriptor: RawFd,
    /// Names the pid namespace in which `process` has that number.
    pub pid_namespace: String,
}

/// Processes of another pid namespace cannot be found from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it is in memory that processes of another pid namespace hold: look from there, for example by nsenter"
)]
pub struct Unseen;

impl Holder {
    /// This process holds it as `descriptor`. `None` where /proc does not show this process.
    pub fn here(descriptor: RawFd) -> Option<Self> {
        Self::of(own_pid(), descriptor)
    }

    /// Process `pid` holds it as `descriptor`.
    pub fn of(pid: u32, descriptor: RawFd) -> Option<Self> {
        Some(Self {
            process: Process::of(pid)?,
            descriptor,
            pid_namespace: pid_namespace().ok()?,
        })
    }

    /// Where the directory is, as long as the process has it.
    pub fn path(&self) -> PathBuf {
        path_of(self.process.pid, self.descriptor)
    }

    /// The first of `holders` that still has `name` in its directory, as a path; `None` where none has.
    pub fn find(holders: &[Self], name: &Path) -> Result<Option<PathBuf>, Unseen> {
        let here = pid_namespace().unwrap_or_default();
        let there = |holder: &Self| {
            let path = holder.path().join(name);
            (holder.process.is_there() && path.is_dir()).then_some(path)
        };
        let (seen, unseen): (Vec<_>, Vec<_>) = holders
            .iter()
            .partition(|holder| holder.pid_namespace == here);
        match seen.into_iter().find_map(there) {
            None if !unseen.is_empty() => Err(Unseen),
            found => Ok(found),
        }
    }
}

pub(super) fn path_of(pid: u32, descriptor: RawFd) -> PathBuf {
    format!("/proc/{pid}/fd/{descriptor}").into()
}

/// As /proc numbers it, which may be that of an outer pid namespace.
pub(super) fn own_pid() -> u32 {
    let link = fs::read_link("/proc/self").ok();
    let pid = link.and_then(|link| link.to_str()?.parse().ok());
    pid.unwrap_or_else(std::process::id)
}

fn pid_namespace() -> io::Result<String> {
    let name = fs::read_link("/proc/self/ns/pid")?;
    Ok(name.to_string_lossy().into_owned())
}

/// `path` without links, as [`fs::canonicalize`], which would lose its way in a [`Memory`](super::Memory):
/// a path through a process's descriptor stays as it is.
pub fn real_path(path: &Path) -> io::Result<PathBuf> {
    if !leads_through_descriptor(path) {
        return fs::canonicalize(path);
    }
    fs::metadata(path)?;
    let is_plain = |part: &Component<'_>| !matches!(part, Component::CurDir);
    Ok(path.components().filter(is_plain).collect())
}

fn leads_through_descriptor(path: &Path) -> bool {
    let mut parts = path.components().map(|part| part.as_os_str());
    let head = [parts.next(), parts.next(), parts.next(), parts.next()];
    let [Some(root), Some(proc), Some(process), Some(fd)] = head else {
        return false;
    };
    let is_process = process == "self"
        || process
            .to_str()
            .is_some_and(|pid| pid.parse::<u32>().is_ok());
    root == "/" && proc == "proc" && is_process && fd == "fd"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_through_a_descriptor_is_not_resolved() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("set")).expect("made");
        let opened = fs::File::open(directory.path()).expect("there");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&opened);
        let path = path_of(own_pid(), fd).join("./set");
        assert_eq!(
            real_path(&path).unwrap(),
            path_of(own_pid(), fd).join("set")
        );
        assert!(real_path(&path.join("not-there")).is_err());
        std::os::unix::fs::symlink("set", directory.path().join("link")).expect("a link");
        let plain = real_path(&directory.path().join("link")).unwrap();
        assert!(plain.ends_with("set"));
    }

    #[test]
    fn holder_is_found_by_what_it_has() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("set")).expect("made");
        let opened = fs::File::open(directory.path()).expect("there");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&opened);
        let here = Holder::here(fd).expect("it is this process");
        let find = |holders: &[Holder], name: &str| Holder::find(holders, Path::new(name));
        let mut dead = here.clone();
        dead.process.started += 1;
        let found = find(&[dead.clone(), here.clone()], "set").expect("all are seen");
        assert_eq!(found, Some(here.path().join("set")));
        assert_eq!(find(std::slice::from_ref(&here), "other"), Ok(None));
        assert_eq!(find(std::slice::from_ref(&dead), "set"), Ok(None));
        let mut elsewhere = here;
        elsewhere.pid_namespace = "pid:[1]".to_owned();
        assert_eq!(find(&[dead, elsewhere], "set"), Err(Unseen));
    }
}
