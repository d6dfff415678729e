//! Where the source makes the images of a migration.

use std::fs;
use std::path::{Path, PathBuf};

use super::Mode;
use super::freeze::private_directory;
use crate::preflight;
use crate::sink::{Memory, Sink, SinkError, SinkKind, Tmpfs};

/// The place, as long as this lives.
#[derive(Debug)]
pub(super) struct Work {
    sink: Option<Box<dyn Sink>>,
    directory: PathBuf,
}

impl Work {
    /// In `directory`, or in memory of this process's own.
    pub(super) fn open(mode: Mode, directory: &Path) -> Result<Self, SinkError> {
        let sink: Option<Box<dyn Sink>> = match mode {
            Mode::Disk => None,
            Mode::Tmpfs => Some(Box::new(Tmpfs::open(directory)?)),
            // CRIU's small images and logs: without memory, they are as many as the tree has of sockets,
            // queues and deleted files.
            Mode::Diskless => {
                let bytes = preflight::memory_available() / 2;
                Some(Box::new(Memory::create(bytes)?))
            }
        };
        Ok(Self {
            sink,
            directory: directory.to_owned(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        match &self.sink {
            Some(sink) => sink.path(),
            None => &self.directory,
        }
    }

    /// Copies CRIU's log of a failure to where an operator finds it, below `name`, and has `log` lead
    /// there. In a directory it stays where it is.
    pub(super) fn keep_log(&self, log: &mut PathBuf, name: &str) {
        let in_memory = self.sink.as_ref();
        let Some(sink) = in_memory.filter(|sink| sink.kind() == SinkKind::Memory) else {
            return;
        };
        // The kernel names a file in it from the root of its file system; a command's is named in full.
        let below = log.strip_prefix(sink.path());
        let below = below.or_else(|_| log.strip_prefix("/")).unwrap_or(log);
        let inside = sink.path().join(below);
        let Some(file_name) = inside.file_name() else {
            return;
        };
        let kept = private_directory(&self.directory, name).and_then(|kept| {
            let kept = kept.join(file_name);
            fs::copy(&inside, &kept)?;
            Ok(kept)
        });
        match kept {
            Ok(kept) => *log = kept,
            Err(error) => tracing::warn!("cannot keep CRIU's log: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_of_a_failure_outlives_the_memory_that_it_was_written_to() {
        if !rustix::process::geteuid().is_root() {
            println!("not tried: a file system in memory needs root");
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let work = Work::open(Mode::Diskless, directory.path()).expect("opened");
        let root = private_directory(work.path(), "id").expect("made");
        fs::write(root.join("dump.log"), "Error").expect("written");
        // As CRIU's client names it, from the descriptor of its directory.
        let opened = fs::File::open(&root).expect("there");
        let number = std::os::fd::AsRawFd::as_raw_fd(&opened);
        let link = fs::read_link(format!("/proc/self/fd/{number}")).expect("a link");
        let mut log = link.join("dump.log");
        work.keep_log(&mut log, "id");
        // As a command's is named.
        let mut of_command = root.join("dump.log");
        work.keep_log(&mut of_command, "other");
        drop((opened, work));
        assert_eq!(log, directory.path().join("id/dump.log"));
        assert_eq!(of_command, directory.path().join("other/dump.log"));
        assert_eq!(fs::read(&log).expect("kept"), b"Error");
        assert_eq!(fs::read(&of_command).expect("kept"), b"Error");
    }

    #[test]
    fn tmpfs_is_no_disk() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
        let durable = crate::sys::is_durable(directory.path()).expect("known");
        assert_eq!(Work::open(Mode::Tmpfs, directory.path()).is_err(), durable);
        let same = Work::open(Mode::Disk, directory.path()).expect("as it is");
        assert_eq!(same.path(), directory.path());
    }
}
