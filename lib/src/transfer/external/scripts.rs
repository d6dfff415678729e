//! Where the script of a migration is when programs cannot be run from the migration's own directory:
//! distributions mount `/run` so.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;

/// Directories that are tried in this order.
const BASES: [&str; 2] = ["/var/lib/crxfer", "/dev/shm/crxfer"];

/// The directory for the script of the migration in `place`: that one, or one made for it elsewhere, mode
/// 0700, until it is [removed](remove).
pub(super) fn directory(place: &Path) -> io::Result<PathBuf> {
    if !is_noexec(place)? {
        return Ok(place.to_owned());
    }
    let bases = BASES.map(Path::new);
    elsewhere(place, &bases).ok_or_else(|| {
        io::Error::other(format!(
            "{} is on a file system that is mounted noexec, and neither {} nor {} can be used: name a \
             directory elsewhere (--work, --dir), or make the first",
            place.display(),
            BASES[0],
            BASES[1],
        ))
    })
}

/// Removes what was made elsewhere for `place`. May be called by whoever ends the migration, and twice.
pub(in crate::transfer) fn remove(place: &Path) {
    remove_from(place, &BASES.map(Path::new));
}

fn remove_from(place: &Path, bases: &[&Path]) {
    for base in bases.iter().filter(|base| is_ours(base)) {
        let _ = fs::remove_dir_all(base.join(name_of(place)));
    }
}

// Found again by the path of the migration alone: the directory itself may have gone with a power cut.
fn name_of(place: &Path) -> String {
    let hash = blake3::hash(place.as_os_str().as_encoded_bytes());
    format!("action-{}", &hash.to_hex()[..32])
}

fn elsewhere(place: &Path, bases: &[&Path]) -> Option<PathBuf> {
    bases
        .iter()
        .find_map(|base| made_in(base, &name_of(place)).ok())
}

fn made_in(base: &Path, name: &str) -> io::Result<PathBuf> {
    let mut private = fs::DirBuilder::new();
    private.mode(0o700);
    match private.create(base) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if !is_ours(base) || is_noexec(base)? {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let path = base.join(name);
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    private.create(&path)?;
    Ok(path)
}

// Anybody may make a directory in /dev/shm.
fn is_ours(base: &Path) -> bool {
    fs::symlink_metadata(base).is_ok_and(|about| {
        about.is_dir()
            && about.uid() == rustix::process::geteuid().as_raw()
            && about.mode() & 0o022 == 0
    })
}

fn is_noexec(path: &Path) -> io::Result<bool> {
    let about = rustix::fs::statvfs(path)?;
    Ok(about.f_flag.contains(StatVfsMountFlags::NOEXEC))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn script_goes_to_the_first_directory_that_only_we_can_write_to() {
        let root = tempfile::tempdir().unwrap();
        let [open, file, good, late] =
            ["open", "file", "good", "late"].map(|it| root.path().join(it));
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        fs::write(&file, "").unwrap();
        let bases = [&*open, &*file, &*good, &*late];
        let place = Path::new("/run/crxfer/1");

        let made = elsewhere(place, &bases).unwrap();
        assert!(made.starts_with(&good) && !late.exists());
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
        fs::write(made.join("action"), "of one that was killed").unwrap();
        assert_eq!(elsewhere(place, &bases).unwrap(), made);
        assert!(!made.join("action").exists());
        let other = elsewhere(Path::new("/run/crxfer/2"), &bases).unwrap();

        remove_from(place, &bases);
        assert!(!made.exists() && other.exists());
        assert_eq!(elsewhere(place, &bases[..2]), None);
    }

    #[test]
    fn a_mount_without_programs_is_known() {
        assert!(!is_noexec(&std::env::current_exe().unwrap()).unwrap());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let proc = mounts.lines().find(|line| line.starts_with("proc /proc "));
        let Some(proc) = proc else {
            println!("not tried: /proc is mounted in an unusual way");
            return;
        };
        assert_eq!(
            is_noexec(Path::new("/proc")).unwrap(),
            proc.contains("noexec")
        );
    }
}
