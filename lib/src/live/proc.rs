//! `/proc/PID` of one process, held open: a pid that is reused meanwhile is not mistaken for it.

use crate::preflight::Stat;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{self, Dir, Mode, OFlags};

/// Longest file of `/proc` that is taken whole. A mapping is a line of about 100 bytes, and a
/// process may have 65,530 of them unless the limit was raised.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// One process' directory.
#[derive(Debug)]
pub(super) struct ProcDir {
    pub(super) pid: u32,
    dir: OwnedFd,
}

/// What `status` and `stat` say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// Pid in the innermost namespace.
    pub(super) vpid: u32,
    pub(super) zombie: bool,
}

impl ProcDir {
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let path = format!("/proc/{pid}");
        let dir = fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { pid, dir })
    }

    /// Opens a file of the directory for reading.
    pub(super) fn file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let fd = fs::openat(&self.dir, name.as_ref(), flags, Mode::empty())?;
        Ok(File::from(fd))
    }

    pub(super) fn text(&self, name: impl AsRef<Path>) -> io::Result<String> {
        let mut bytes = Vec::new();
        self.file(name)?
            .take(MAX_TEXT_BYTES)
            .read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(super) fn link(&self, name: impl AsRef<Path>) -> io::Result<PathBuf> {
        let target = fs::readlinkat(&self.dir, name.as_ref(), Vec::new())?;
        Ok(PathBuf::from(std::ffi::OsString::from_vec(
            target.into_bytes(),
        )))
    }

    /// The entries of a directory whose names are numbers: `task`, `fd`.
    pub(super) fn numbers(&self, name: &str) -> io::Result<Vec<u32>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::openat(&self.dir, name, flags, Mode::empty())?;
        let mut numbers = Vec::new();
        for entry in Dir::new(fd)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            numbers.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        Ok(numbers)
    }

    /// `status` of the process, or of its thread `tid`.
    pub(super) fn status(&self, tid: Option<u32>) -> io::Result<Status> {
        let text = match tid {
            Some(tid) => self.text(format!("task/{tid}/status"))?,
            None => self.text("status")?,
        };
        parse_status(&text, tid.unwrap_or(self.pid))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a status file"))
    }

    /// When the process was started, in clock ticks since boot.
    pub(super) fn start_time(&self) -> io::Result<u64> {
        let stat = Stat::parse(&self.text("stat")?);
        stat.map(|stat| stat.started)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a stat file"))
    }
}

fn parse_status(text: &str, pid: u32) -> Option<Status> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let state = field("State:")?.trim_start().chars().next()?;
    // A kernel without pid namespaces has no NSpid.
    let vpid = match field("NSpid:") {
        Some(pids) => pids.split_ascii_whitespace().last()?.parse().ok()?,
        None => pid,
    };
    Some(Status {
        vpid,
        zombie: matches!(state, 'Z' | 'X' | 'x'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_pid_names_a_task() {
        let text = "Name:\tx\nState:\tS (sleeping)\nNSpid:\t4711\t31\t2\n";
        let status = parse_status(text, 4711).unwrap();
        assert_eq!((status.vpid, status.zombie), (2, false));
        let text = "Name:\tx\nState:\tZ (zombie)\n";
        let status = parse_status(text, 4711).unwrap();
        assert_eq!((status.vpid, status.zombie), (4711, true));
        assert_eq!(parse_status("NSpid:\t1\n", 1), None);
    }

    #[test]
    fn a_process_sees_itself() {
        let me = ProcDir::open(std::process::id()).unwrap();
        assert!(me.start_time().unwrap() > 0);
        assert!(!me.status(None).unwrap().zombie);
        assert!(me.numbers("task").unwrap().contains(&me.pid));
    }
}
