//! How much memory a restore may take here.

use std::fs;
use std::path::{Path, PathBuf};

use super::procfs;

/// What is free on the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// What the kernel would give without swapping, and free swap.
    pub(super) available: u64,
    /// What the nearest memory cgroup leaves, and which one it is.
    pub(super) group: Option<(u64, PathBuf)>,
    /// What the file system of the images takes; `None` where it would not say.
    pub(super) images_free: Option<u64>,
    /// The images are kept in memory.
    pub(super) images_in_memory: bool,
}

impl Memory {
    /// Looks at this host; `images` is the directory that receives the images, unless they go to memory,
    /// of which they may take `in_memory` bytes.
    pub(super) fn look(images: &Path, in_memory: Option<u64>) -> Self {
        let info = read("/proc/meminfo");
        let part = |key| procfs::number(&info, key).unwrap_or(0);
        let groups = directories(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        let room = |group: PathBuf| Some((room_of(&group)?, group));
        let free = rustix::fs::statvfs(images).ok();
        let free = free.map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize));
        let is_tmpfs = || crate::sys::is_durable(images).is_ok_and(|durable| !durable);
        Self {
            available: part("MemAvailable").saturating_add(part("SwapFree")),
            group: groups.into_iter().filter_map(room).min(),
            images_free: in_memory.or(free),
            images_in_memory: in_memory.is_some() || is_tmpfs(),
        }
    }
}

/// Bytes that may be taken without swapping, as far as the host and this process's control groups have
/// them.
#[cfg(feature = "net")]
pub(crate) fn memory_available() -> u64 {
    let available = procfs::number(&read("/proc/meminfo"), "MemAvailable").unwrap_or(0);
    let groups = directories(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
    let rooms = groups.iter().filter_map(|group| room_of(group));
    rooms.min().map_or(available, |room| room.min(available))
}

/// Directories of the memory cgroups that this process is in, innermost first.
fn directories(mountinfo: &str, cgroup: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut left = left.split(' ').skip(3);
        let mut right = right.split(' ');
        let (Some(root), Some(point), Some(kind)) = (left.next(), left.next(), right.next()) else {
            continue;
        };
        let options = right.next_back().unwrap_or_default();
        let has_memory = |list: &str| list.split(',').any(|name| name == "memory");
        let ours = |(controllers, _): &(&str, &str)| match kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => has_memory(options) && has_memory(controllers),
            _ => false,
        };
        let Some((_, path)) = procfs::cgroups(cgroup).find(ours) else {
            continue;
        };
        // A container sees its own group as the root of the mount, or does not see it at all.
        let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        let below = below.strip_prefix("/").unwrap_or(below);
        let innermost = Path::new(point).join(below);
        let outermost = Path::new(point);
        let within = |path: &&Path| path.starts_with(outermost);
        found.extend(innermost.ancestors().take_while(within).map(Path::to_owned));
    }
    found
}

/// What the limit of one group leaves; `None` where it has none. What it caches of files can be
/// given back.
fn room_of(group: &Path) -> Option<u64> {
    let text = |name: &str| fs::read_to_string(group.join(name)).ok();
    let either = |new: &str, old: &str| text(new).or_else(|| text(old));
    let limit = procfs::memory_limit(&either("memory.max", "memory.limit_in_bytes")?)?;
    let used = either("memory.current", "memory.usage_in_bytes")?;
    let used: u64 = used.trim().parse().ok()?;
    let stat = text("memory.stat").unwrap_or_default();
    let part = |key: &str| -> u64 {
        let value = |line: &str| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok();
        stat.lines().find_map(value).unwrap_or(0)
    };
    let new = part("inactive_file").saturating_add(part("active_file"));
    let old = part("total_inactive_file").saturating_add(part("total_active_file"));
    Some(limit.saturating_sub(used.saturating_sub(new.max(old))))
}

fn read(path: &str) -> String {
    super::gather::read(path.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_found_up_to_their_root() {
        let mounts = "35 31 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            broken\n";
        let paths = directories(mounts, "4:memory:/a/b\n1:cpu:/c\n0::/\n");
        let expected = [
            "/sys/fs/cgroup/memory/a/b",
            "/sys/fs/cgroup/memory/a",
            "/sys/fs/cgroup/memory",
        ];
        assert_eq!(paths, expected.map(PathBuf::from));

        let mounts = "30 23 0:26 /outer /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let paths = directories(mounts, "0::/outer/x.service\n");
        assert_eq!(
            paths,
            ["/sys/fs/cgroup/x.service", "/sys/fs/cgroup"].map(PathBuf::from)
        );
        let elsewhere = directories(mounts, "0::/other\n");
        assert_eq!(elsewhere, [PathBuf::from("/sys/fs/cgroup/")]);
    }

    #[test]
    fn the_room_of_a_group_is_its_limit_without_what_it_cannot_give_back() {
        let group = tempfile::tempdir().expect("a directory");
        let put = |name, text: &str| fs::write(group.path().join(name), text).expect("a file");
        assert_eq!(room_of(group.path()), None);
        put("memory.max", "max\n");
        put("memory.current", "700\n");
        assert_eq!(room_of(group.path()), None);
        put("memory.max", "1000\n");
        put("memory.stat", "anon 5\ninactive_file 200\nactive_file 50\n");
        assert_eq!(room_of(group.path()), Some(550));
        put("memory.max", "100\n");
        assert_eq!(room_of(group.path()), Some(0));
    }

    #[test]
    fn this_host_has_memory() {
        let memory = Memory::look(Path::new("/"), None);
        assert!(memory.available > 0 && memory.images_free.is_some());
    }
}
