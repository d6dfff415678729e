//! What can be wrong with an image directory.

use std::io;
use std::path::{Path, PathBuf};

use super::framing::FramingError;
use super::resolve::ResolveError;

/// Why an image directory, or one file of it, cannot be used.
///
/// Each variant names the file; errors inside a file also name the place in it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The operating system refused something.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The directory itself does not exist.
    #[error("{}: no such directory", .0.display())]
    NoDirectory(PathBuf),
    /// The path names something that is not a directory.
    #[error("{}: not a directory; give the image directory that criu wrote (its -D option)", .0.display())]
    NotADirectory(PathBuf),
    /// A file that must be there is not.
    #[error("{}: no such file in the image directory", .0.display())]
    NoFile(PathBuf),

    /// A symbolic link other than `parent`.
    #[error("{}: is a symbolic link; only `parent` may be one. Replace the link by the file", .0.display())]
    Symlink(PathBuf),
    /// A directory inside the image directory.
    #[error("{}: is a directory; an image directory holds only files. Move it elsewhere", .0.display())]
    SubDirectory(PathBuf),
    /// A device node, fifo or socket.
    #[error("{}: is a {kind}, which no CRIU image is. Remove it", path.display())]
    Special {
        /// The file.
        path: PathBuf,
        /// `device node`, `fifo`, `socket` or `file of unknown type`.
        kind: &'static str,
    },
    /// A name that is not printable UTF-8.
    #[error("{}: the file name {name} has {what}. Rename or remove the file", directory.display())]
    BadName {
        /// The image directory.
        directory: PathBuf,
        /// The name, escaped.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// More files than any dump writes.
    #[error("{}: more than {limit} files; this is not a CRIU image directory", directory.display())]
    TooManyFiles {
        /// The image directory.
        directory: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// A file that is read as a whole is larger than any that CRIU writes.
    #[error("{}: {size} bytes, more than the {limit} that such a file may have; it is damaged", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },

    /// Magic numbers or record lengths are wrong.
    #[error("{file}: {error}")]
    Framing {
        /// The image file.
        file: String,
        /// What and where.
        error: FramingError,
    },
    /// The file is of another type than its name says.
    #[error(
        "{file}: has the magic number {found:#010x} where {expected:#010x} is due; it is damaged or misnamed"
    )]
    WrongMagic {
        /// The image file.
        file: String,
        /// The magic number of the type that the name says.
        expected: u32,
        /// The magic number in the file.
        found: u32,
    },
    /// A record is not a protobuf message of the right kind, or lacks a field.
    #[error("{file}: record at byte {offset}: {what}; the file is damaged")]
    BadRecord {
        /// The image file.
        file: String,
        /// Offset of the record's length field in bytes.
        offset: usize,
        /// What is wrong.
        what: String,
    },
    /// A file has too few or too many records.
    #[error("{file}: {what}; the file is damaged")]
    BadCount {
        /// The image file.
        file: String,
        /// Which records are missing or too many.
        what: &'static str,
    },
    /// A pagemap entry that CRIU cannot have written.
    #[error("{file}: entry {entry} (address {vaddr:#x}): {what}; the pagemap is damaged")]
    BadRun {
        /// The pagemap.
        file: String,
        /// Index of the entry, the head not counted.
        entry: usize,
        /// Its address.
        vaddr: u64,
        /// What is wrong.
        what: RunFault,
    },

    /// Memory is stored compressed (the unreleased line after CRIU 4.2).
    #[error(
        "{file}: the memory is stored compressed ({what}), which only the faithful layout can carry. \
         Use --layout faithful, or dump again without --compress"
    )]
    Compressed {
        /// The file that says so.
        file: String,
        /// The field or flag.
        what: &'static str,
    },
    /// Written by a CRIU that this version of crxfer does not know.
    #[error(
        "{file}: {what}, from a CRIU newer than this crxfer knows. \
         Use --layout faithful, which copies the files as they are, or a newer crxfer"
    )]
    TooNew {
        /// The file that says so.
        file: String,
        /// The field or version.
        what: String,
    },

    /// The `parent` link leads nowhere.
    #[error("{}: the link leads to {target}, which does not exist. Put the parent back, or dump again without --prev-images-dir", path.display())]
    DanglingParent {
        /// The link.
        path: PathBuf,
        /// Its text.
        target: String,
    },
    /// The `parent` link is absolute, so it breaks on any other host.
    #[error(
        "{}: the link is absolute ({target}) and would break on another host. \
         Make it relative, or run `crxfer flatten` to get one directory without a parent", path.display()
    )]
    AbsoluteParent {
        /// The link.
        path: PathBuf,
        /// Its text.
        target: String,
    },
    /// There is a `parent` that is no symbolic link, or one to something else than a directory.
    #[error("{}: must be a symbolic link to the directory of the dump before, but is {found}", path.display())]
    BadParent {
        /// The file or link.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// Following `parent` comes back to a directory that was there before.
    #[error("{}: the parent links run in a circle ({depth} links lead back here)", directory.display())]
    ParentLoop {
        /// The directory that came again.
        directory: PathBuf,
        /// How many links were followed.
        depth: usize,
    },
    /// More parents than allowed.
    #[error("{}: more than {limit} directories follow each other by parent links. Run `crxfer flatten`, or take a full dump", directory.display())]
    TooDeep {
        /// The newest directory.
        directory: PathBuf,
        /// How many are allowed, the newest included.
        limit: usize,
    },
    /// The content of some pages is nowhere in the chain.
    #[error("{file}: {error}")]
    Unresolved {
        /// The pagemap of the newest directory.
        file: String,
        /// Which pages.
        error: ResolveError,
    },
    /// A pages file ends before the last page its pagemap counts.
    #[error("{}: ends at byte {size}, but {needed} bytes of pages are due; CRIU would hang on it", path.display())]
    ShortPages {
        /// The pages file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What its pagemap counts, in bytes.
        needed: u64,
    },
    /// Pages were left in the source's memory by `criu dump --lazy-pages`.
    #[error(
        "{file}: {pages} pages from address {vaddr:#x} were left at the source by a lazy dump; take a dump without --lazy-pages"
    )]
    LazyPages {
        /// The pagemap.
        file: String,
        /// First address.
        vaddr: u64,
        /// Number of pages.
        pages: u64,
    },
    /// A file or directory changed while it was used.
    #[error("{}: changed while it was read; wait until criu has finished and try again", .0.display())]
    Changed(PathBuf),
    /// Two sets that were to be compared count in different page sizes.
    #[error("{}: has pages of {second} bytes, the other set of {first}; they cannot be compared", directory.display())]
    DifferentPageSizes {
        /// The second set.
        directory: PathBuf,
        /// Page size of the first set in bytes.
        first: u64,
        /// Page size of the second set in bytes.
        second: u64,
    },
    /// The output of an operation exists already.
    #[error("{}: exists already; give a name that does not, or remove it", .0.display())]
    OutputExists(PathBuf),
    /// The output path has no file name to create.
    #[error("{}: is no name for a new directory", .0.display())]
    BadOutput(PathBuf),
}

impl ImageError {
    /// Whether only crxfer's understanding of the memory is at fault: copying the files byte for
    /// byte (the faithful layout) is still right.
    pub fn is_opaque(&self) -> bool {
        matches!(self, Self::Compressed { .. } | Self::TooNew { .. })
    }

    /// For `map_err`: an [`ImageError::Io`] about `path`.
    pub(crate) fn io<E: Into<io::Error>>(
        path: &Path,
        action: &'static str,
    ) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |error| Self::Io {
            path,
            action,
            source: error.into(),
        }
    }
}

/// What is wrong with one pagemap entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunFault {
    /// Flag bits that no CRIU sets.
    #[error("unknown flags {0:#x}")]
    UnknownFlags(u32),
    /// The content cannot be here and in the parent at once.
    #[error("marked both as present and as in the parent")]
    PresentAndParent,
    /// The address is inside a page.
    #[error("the address is not a multiple of the page size {0}")]
    Unaligned(u64),
    /// The entry counts nothing.
    #[error("counts 0 pages")]
    Empty,
    /// The entry runs past the end of the address space.
    #[error("{0} pages from there run past the end of the address space")]
    Overflow(u64),
    /// The entry begins below the end of the one before.
    #[error("begins below {0:#x}, where the entry before it ends")]
    Descending(u64),
    /// More pages than any host has.
    #[error("{0} pages is more than any host's memory")]
    Absurd(u64),
}
