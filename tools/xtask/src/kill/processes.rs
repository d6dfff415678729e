//! Processes of a host: found by what they are, signalled by a descriptor that names no other.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::process::{Signal, pidfd_send_signal};

use super::plan::Victim;
use crate::hosts::Host;

/// A process of a host.
#[derive(Debug)]
pub(super) struct Found {
    /// As the host numbers it.
    pub(super) pid: u32,
    pub(super) parent: u32,
    pub(super) session: u32,
    /// `R`, `S`, `Z` and so on.
    pub(super) state: char,
    pub(super) name: String,
    pub(super) words: Vec<String>,
    /// Its directory in /proc, which is never another process's.
    handle: File,
}

impl Found {
    fn read(directory: &Path) -> Option<Self> {
        let handle = File::open(directory).ok()?;
        let stat = fs::read_to_string(directory.join("stat")).ok()?;
        // pid (name) state parent group session …; the name may hold anything.
        let (head, tail) = stat.rsplit_once(')')?;
        let (pid, name) = head.split_once(" (")?;
        let mut fields = tail.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let line = fs::read(directory.join("cmdline")).unwrap_or_default();
        let words = line
            .split(|&byte| byte == 0)
            .filter(|word| !word.is_empty());
        Some(Self {
            pid: pid.parse().ok()?,
            parent,
            session,
            state,
            name: name.to_owned(),
            words: words
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect(),
            handle,
        })
    }

    /// The program that it was started as, or its name where it has no command line any more.
    pub(super) fn program(&self) -> &str {
        let word = self
            .words
            .first()
            .map_or(self.name.as_str(), String::as_str);
        word.rsplit('/').next().unwrap_or(word)
    }

    fn is_crxfer(&self, verbs: &[&str]) -> bool {
        self.program() == "crxfer"
            && self
                .words
                .get(1)
                .is_some_and(|verb| verbs.contains(&verb.as_str()))
    }

    /// Whether `victim` means this process.
    pub(super) fn is(&self, victim: Victim) -> bool {
        match victim {
            Victim::Crxfer => self.is_crxfer(&["migrate", "recv"]),
            Victim::Guard => self.is_crxfer(&["guard"]),
            // It may be started by a loader; what a restore forks looks like it for a moment.
            Victim::Criu => self.words.iter().any(|word| word == "swrk"),
        }
    }

    /// Sends it a signal; one that is gone is no error.
    pub(super) fn signal(&self, signal: Signal) -> bool {
        // SAFETY of meaning: a directory of /proc stands for its process as a pidfd does.
        pidfd_send_signal(self.handle.as_fd(), signal).is_ok()
    }

    /// One line about it.
    pub(super) fn line(&self) -> String {
        let words = self.words.join(" ");
        format!(
            "{} (parent {}, {}, {}) {}",
            self.pid,
            self.parent,
            self.state,
            self.name,
            words.chars().take(120).collect::<String>()
        )
    }
}

/// All processes of `host` but its first.
pub(super) fn all(host: &Host) -> Vec<Found> {
    let entries = fs::read_dir(host.file(Path::new("/proc")));
    let entries = entries.into_iter().flatten().flatten();
    let pids = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.parse::<u32>().is_ok())
    });
    let paths = pids.map(|entry| entry.path());
    paths
        .filter_map(|path: PathBuf| Found::read(&path))
        .filter(|process| process.pid != 1)
        .collect()
}

/// The processes of `host` that `victim` means. Of CRIU's, those that crxfer has started: what CRIU
/// itself forks is its own to lose.
pub(super) fn of(host: &Host, victim: Victim) -> Vec<Found> {
    let processes = all(host);
    let criu: Vec<u32> = processes
        .iter()
        .filter(|process| process.is(Victim::Criu))
        .map(|process| process.pid)
        .collect();
    processes
        .into_iter()
        .filter(|process| process.is(victim) && process.state != 'Z')
        .filter(|process| victim != Victim::Criu || !criu.contains(&process.parent))
        .collect()
}
