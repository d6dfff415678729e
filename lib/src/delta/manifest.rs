//! The manifest of one set: every file with its size, mode and digest, bound by one root digest.

use std::fmt;
use std::ops::Range;

use crate::digest::Digest;
use crate::page::PageSize;

/// Files are cut into segments of this many bytes: the unit of reading, of asking the destination
/// and of one frame on the wire. 1 MiB hashes in about 0.2 ms, so that cores share the work evenly;
/// a few of them in flight fill a link without costing memory.
pub const SEGMENT_BYTES: u64 = 1 << 20;

/// Files that hold no pages are digested in blocks of this length. Small enough that a changed
/// byte in a large ghost file costs little, large enough that digests are a two-thousandth.
pub const OPAQUE_BLOCK: u32 = 64 << 10;

/// A name that cannot be a file of an image directory or a set's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be used as a name: {1}")]
pub struct BadName(pub String, pub &'static str);

fn check_name(name: &str) -> Result<(), BadName> {
    let bad = |why| Err(BadName(name.chars().take(64).collect(), why));
    match name {
        "" => bad("it is empty"),
        "." | ".." => bad("it leads to another directory"),
        _ if name.len() > 255 => bad("it is longer than 255 bytes"),
        _ if name.contains('/') => bad("it has a separator"),
        _ if name.chars().any(char::is_control) => bad("it has control characters"),
        _ => Ok(()),
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// Name of one regular file of an image directory: a single path component, never `parent`.
    FileName
}

name_type! {
    /// Name of a set in a receiving directory: a single path component that does not start with a
    /// dot (those are the store's own).
    SetName
}

impl FileName {
    /// Takes `name` if a file of an image directory can have it.
    pub fn new(name: impl Into<String>) -> Result<Self, BadName> {
        let name = name.into();
        check_name(&name)?;
        if name == "parent" {
            return Err(BadName(
                name,
                "in an image directory that is the link to the parent",
            ));
        }
        Ok(Self(name))
    }
}

impl SetName {
    /// Takes `name` if a set can have it.
    pub fn new(name: impl Into<String>) -> Result<Self, BadName> {
        let name = name.into();
        check_name(&name)?;
        if name.starts_with('.') {
            return Err(BadName(
                name,
                "names that start with a dot belong to the store",
            ));
        }
        Ok(Self(name))
    }
}

/// One file of a set, without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileMeta {
    /// Its name in the image directory.
    pub name: FileName,
    /// Permission bits.
    pub mode: u16,
    /// Length in bytes.
    pub size: u64,
    /// Its digests are of blocks of this many bytes (the page size for files of pages).
    pub block_len: u32,
}

impl FileMeta {
    /// A file of this name, size and mode in a directory dumped with pages of `page_size`.
    pub fn new(name: FileName, mode: u16, size: u64, page_size: PageSize) -> Self {
        let mut meta = Self {
            name,
            mode,
            size,
            block_len: OPAQUE_BLOCK,
        };
        if meta.is_pages() {
            meta.block_len = u32::try_from(page_size.bytes()).expect("pages have at most 2 MiB");
        }
        meta
    }

    /// Whether it holds pages (`pages-N.img`) rather than messages or other bytes.
    pub fn is_pages(&self) -> bool {
        self.name.as_str().starts_with("pages-")
    }

    /// Number of blocks; the last may be shorter than the others.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(u64::from(self.block_len))
    }

    /// Blocks in each segment but the last.
    pub fn segment_blocks(&self) -> u64 {
        (SEGMENT_BYTES / u64::from(self.block_len)).max(1)
    }

    /// Number of segments.
    pub fn segments(&self) -> u64 {
        self.blocks().div_ceil(self.segment_blocks())
    }

    /// The blocks of segment `segment`.
    pub fn segment_range(&self, segment: u64) -> Range<u64> {
        let first = (segment.saturating_mul(self.segment_blocks())).min(self.blocks());
        first..(first + self.segment_blocks()).min(self.blocks())
    }

    /// The bytes of the blocks `blocks`.
    pub fn bytes_of(&self, blocks: &Range<u64>) -> Range<u64> {
        let block_len = u64::from(self.block_len);
        blocks.start * block_len..(blocks.end * block_len).min(self.size)
    }

    /// Length of block `block` in bytes.
    pub fn block_bytes(&self, block: u64) -> usize {
        let range = self.bytes_of(&(block..block + 1));
        usize::try_from(range.end - range.start).expect("a block fits into memory")
    }
}

/// The set that `parent` leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// Its root digest.
    pub root: Digest,
    /// The text of the link.
    pub link: String,
}

/// Everything that makes a set what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Page size of the host that dumped it.
    pub page_size: PageSize,
    /// `img_version` of its inventory, 0 where it has none.
    pub image_version: u32,
    /// The set that it continues.
    pub parent: Option<ParentRef>,
    /// Its files in ascending order of name, each with the digest of its content.
    pub files: Vec<(FileMeta, Digest)>,
}

impl Manifest {
    /// The digest that binds the whole set: names, sizes, modes, page size, CRIU's image version,
    /// the parent, and through the files' digests every page.
    ///
    /// The encoding that is hashed is written down in docs/PROTOCOL.md. The parent's link text is
    /// not part of it: the same set may lie under other names elsewhere.
    pub fn root(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("crxfer 2026 set root v1");
        hasher.update(&self.page_size.bytes().to_le_bytes());
        hasher.update(&self.image_version.to_le_bytes());
        let parent = self.parent.as_ref().map_or([0; 32], |parent| parent.root.0);
        hasher.update(&parent);
        for (meta, digest) in &self.files {
            let name = meta.name.as_str().as_bytes();
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name);
            hasher.update(&meta.mode.to_le_bytes());
            hasher.update(&digest.0);
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: u64, block_len: u32) -> FileMeta {
        FileMeta {
            name: FileName::new("pages-1.img").unwrap(),
            mode: 0o644,
            size,
            block_len,
        }
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "a\0b",
            "a\nb",
            "parent",
            &"x".repeat(256),
        ] {
            assert!(FileName::new(name).is_err(), "{name:?}");
        }
        assert!(SetName::new(".crxfer").is_err());
        assert!(FileName::new("tmpfs-dev-73.tar.gz.img").is_ok());
    }

    #[test]
    fn segments_cover_every_block_once() {
        for (size, block_len) in [
            (0, 4096),
            (1, 4096),
            (1 << 20, 4096),
            ((1 << 20) + 1, 4096),
            (5 << 20, 2 << 20),
        ] {
            let file = file(size, block_len);
            let mut next = 0;
            for segment in 0..file.segments() {
                let range = file.segment_range(segment);
                assert_eq!(range.start, next);
                assert!(range.end > range.start);
                next = range.end;
            }
            assert_eq!(next, file.blocks());
            assert_eq!(file.bytes_of(&(0..file.blocks())), 0..size);
        }
    }

    #[test]
    fn root_follows_every_part() {
        let base = Manifest {
            page_size: PageSize::new(4096).unwrap(),
            image_version: 2,
            parent: None,
            files: vec![(file(4096, 4096), Digest([1; 32]))],
        };
        let mut roots = vec![base.root()];
        let mut changed = base.clone();
        changed.page_size = PageSize::new(65536).unwrap();
        roots.push(changed.root());
        let mut changed = base.clone();
        changed.image_version = 1;
        roots.push(changed.root());
        let mut changed = base.clone();
        changed.parent = Some(ParentRef {
            root: Digest([7; 32]),
            link: "../1".into(),
        });
        roots.push(changed.root());
        let mut changed = base.clone();
        changed.files[0].0.mode = 0o600;
        roots.push(changed.root());
        let mut changed = base.clone();
        changed.files[0].1 = Digest([2; 32]);
        roots.push(changed.root());
        let mut changed = base;
        changed.files[0].0.name = FileName::new("pages-2.img").unwrap();
        roots.push(changed.root());
        let distinct: std::collections::HashSet<_> = roots.iter().collect();
        assert_eq!(distinct.len(), roots.len());
    }
}
