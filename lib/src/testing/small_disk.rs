//! A file system of its own, small enough to be filled.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::handover::{Journal, SourceState};

/// A tmpfs that is unmounted with this. Needs root.
#[derive(Debug)]
pub struct SmallDisk {
    place: PathBuf,
}

impl SmallDisk {
    /// Mounts one with room for `kib` at `place`, which is made where it is missing. `None` where
    /// nothing can be mounted.
    pub fn mount(place: &Path, kib: u32) -> io::Result<Option<Self>> {
        fs::create_dir_all(place)?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={kib}k"), "tmpfs"]);
        let mounted = mount.arg(place).status()?.success();
        if !mounted {
            println!("not tried: nothing can be mounted here");
        }
        Ok(mounted.then(|| Self {
            place: place.to_owned(),
        }))
    }

    /// What takes its room after [`SmallDisk::fill`]; removed, there is some again.
    pub fn filler(&self) -> PathBuf {
        self.place.join("filler")
    }

    /// Leaves no room for another line of the journal, nor for anything else.
    ///
    /// # Panics
    ///
    /// Where it is full before, or too large.
    pub fn fill(&self, journal: &Journal<SourceState>) {
        const PAGE: u64 = 4096;
        let file = journal.directory().join("journal");
        let length = || fs::metadata(&file).expect("there").len();
        let lengthen = |by: &str| {
            journal
                .note(|about| about.name += by)
                .expect("there is room")
        };
        let before = length();
        // Only what is new is written: the same line once more is as much longer as the name.
        lengthen("x");
        let short = PAGE - (2 * length() - before) % PAGE;
        lengthen(&"x".repeat(usize::try_from(short).expect("at most a page")));
        assert_eq!(length() % PAGE, 0, "its last page is full");
        fs::write(self.filler(), vec![0; 1 << 20]).expect_err("it is small");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.place).status();
    }
}
