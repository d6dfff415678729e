//! What a file of an image directory is, by its name.

use std::fmt;

/// Longest name that CRIU's own template makes is far below this; the kernel's limit is 255.
pub const MAX_NAME_BYTES: usize = 255;

/// Whose memory a pagemap describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PagemapName {
    /// `pagemap-PID.img`: private memory of the task with this pid (inside its namespace).
    Task(u64),
    /// `pagemap-shmem-ID.img`: a shared memory segment; addresses are offsets inside it.
    Shmem(u64),
}

impl PagemapName {
    /// The pagemap that `name` is, if CRIU would write that very name.
    pub fn parse(name: &str) -> Option<Self> {
        let id = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
        match id.strip_prefix("shmem-") {
            Some(id) => decimal(id).map(Self::Shmem),
            None => decimal(id).map(Self::Task),
        }
    }
}

/// The file name.
impl fmt::Display for PagemapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Task(pid) => write!(f, "pagemap-{pid}.img"),
            Self::Shmem(id) => write!(f, "pagemap-shmem-{id}.img"),
        }
    }
}

/// What a file is. Everything that crxfer does not look into is `Other`: opaque bytes that must be
/// carried whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// `inventory.img`
    Inventory,
    /// `pagemap-*.img`
    Pagemap(PagemapName),
    /// `pages-ID.img`: page bytes, nothing else.
    Pages(u32),
    /// `pstree.img`
    Pstree,
    /// `core-ID.img`, one for each thread.
    Core(u32),
    /// `ids-PID.img`
    Ids(u32),
    /// `mm-PID.img`
    Mm(u32),
    /// `memfd.img`
    Memfd,
    /// `stats-dump`
    StatsDump,
    /// `stats-restore`
    StatsRestore,
    /// Anything else.
    Other,
}

impl FileKind {
    /// The kind of file that CRIU gives `name`.
    pub fn of(name: &str) -> Self {
        let numbered = |prefix: &str| {
            let id = name.strip_prefix(prefix)?.strip_suffix(".img")?;
            u32::try_from(decimal(id)?).ok()
        };
        match name {
            "inventory.img" => return Self::Inventory,
            "pstree.img" => return Self::Pstree,
            "memfd.img" => return Self::Memfd,
            "stats-dump" => return Self::StatsDump,
            "stats-restore" => return Self::StatsRestore,
            _ => {}
        }
        PagemapName::parse(name)
            .map(Self::Pagemap)
            .or_else(|| numbered("pages-").map(Self::Pages))
            .or_else(|| numbered("core-").map(Self::Core))
            .or_else(|| numbered("ids-").map(Self::Ids))
            .or_else(|| numbered("mm-").map(Self::Mm))
            .unwrap_or(Self::Other)
    }
}

/// The pages file of a pagemap whose head says `pages_id`.
pub fn pages_file_name(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// A number as `%lu` prints it: no sign, no leading zeros. Other spellings are other files.
fn decimal(text: &str) -> Option<u64> {
    let canonical =
        text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if canonical { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pagemap_names_read_back_as_written() {
        for name in [
            PagemapName::Task(171),
            PagemapName::Shmem(5),
            PagemapName::Shmem(u64::MAX),
        ] {
            assert_eq!(PagemapName::parse(&name.to_string()), Some(name));
        }
        assert_eq!(PagemapName::Task(171).to_string(), "pagemap-171.img");
        assert_eq!(PagemapName::Shmem(5).to_string(), "pagemap-shmem-5.img");
    }

    #[test]
    fn only_the_spelling_criu_writes_is_recognised() {
        for name in [
            "pagemap-.img",
            "pagemap-01.img",
            "pagemap-+1.img",
            "pagemap-shmem-.img",
            "pagemap-1.img.bak",
            "pagemap-18446744073709551616.img",
            "pagemap-1x.img",
        ] {
            assert_eq!(FileKind::of(name), FileKind::Other, "{name}");
        }
    }

    #[test]
    fn kinds_follow_names() {
        for (name, kind) in [
            ("inventory.img", FileKind::Inventory),
            ("pages-65537.img", FileKind::Pages(65537)),
            ("pages-4294967296.img", FileKind::Other),
            ("pages-shmem-3.img", FileKind::Other),
            ("core-7.img", FileKind::Core(7)),
            ("stats-dump", FileKind::StatsDump),
            ("tmpfs-dev-73.tar.gz.img", FileKind::Other),
            (
                "pagemap-shmem-14.img",
                FileKind::Pagemap(PagemapName::Shmem(14)),
            ),
        ] {
            assert_eq!(FileKind::of(name), kind, "{name}");
        }
    }
}
