//! One image directory, held by its descriptor.
//!
//! Everything is opened beneath that descriptor without following links, so that a name can never
//! lead out of the directory. The one exception is `parent`, which leads out by design.

use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::{fmt, io};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::error::ImageError;
use super::name::FileKind;

/// Name of the link to the directory of the dump before.
pub const PARENT: &str = "parent";

/// Most files in one image directory. CRIU writes about six files for a process and one for each
/// thread; kernels allow some hundred thousand threads.
pub const MAX_FILES: usize = 1 << 20;

/// What names a directory on this host while it exists: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirId {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// A regular file as it was when the directory was listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Name in the directory: one component of printable UTF-8.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// What the file system says about it.
    pub stat: FileStat,
}

/// The part of a file's status that tells whether it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileStat {
    /// Size in bytes.
    pub size: u64,
    /// Permission bits (07777).
    pub mode: u32,
    /// Bytes that occupy space; less than `size` in files with holes.
    pub allocated: u64,
    /// Inode number.
    pub inode: u64,
    /// Modification time: seconds and nanoseconds since 1970.
    pub mtime: (i64, u64),
    /// Time of the last change of the inode, likewise.
    pub ctime: (i64, u64),
}

impl FileStat {
    /// The status of an open file.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        Ok(Self::new(&rustix::fs::fstat(file)?))
    }

    fn new(stat: &Stat) -> Self {
        Self {
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mode: stat.st_mode & 0o7777,
            allocated: u64::try_from(stat.st_blocks).unwrap_or(0) * 512,
            inode: stat.st_ino,
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// The `parent` link of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentLink {
    /// Its text, as CRIU wrote it.
    pub text: String,
}

/// All that an image directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The regular files, sorted by name.
    pub files: Vec<FileInfo>,
    /// The `parent` link, if there is one.
    pub parent: Option<ParentLink>,
}

impl Listing {
    /// The file of that name.
    pub fn file(&self, name: &str) -> Option<&FileInfo> {
        let index = self
            .files
            .binary_search_by(|file| file.name.as_str().cmp(name))
            .ok()?;
        Some(&self.files[index])
    }
}

/// Whether absolute `parent` links are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ParentLinks {
    /// Refused: they break on any other host.
    #[default]
    Relative,
    /// Followed, for what stays on this host (`flatten`, `inspect`).
    Any,
}

/// An open image directory.
pub struct ImageDir {
    fd: OwnedFd,
    path: PathBuf,
    id: DirId,
}

impl fmt::Debug for ImageDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageDir")
            .field("path", &self.path)
            .field("id", &self.id)
            .finish()
    }
}

impl ImageDir {
    /// Opens the directory at `path`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Self::new(fd, path.to_owned()),
            Err(Errno::NOENT) => Err(ImageError::NoDirectory(path.to_owned())),
            Err(Errno::NOTDIR) => Err(ImageError::NotADirectory(path.to_owned())),
            Err(error) => Err(ImageError::io(path, "open the directory")(error)),
        }
    }

    /// Takes an open directory; `path` is for messages.
    pub fn from_fd(fd: OwnedFd, path: impl Into<PathBuf>) -> Result<Self, ImageError> {
        Self::new(fd, path.into())
    }

    fn new(fd: OwnedFd, path: PathBuf) -> Result<Self, ImageError> {
        let stat = rustix::fs::fstat(&fd).map_err(ImageError::io(&path, "read the status"))?;
        let id = DirId {
            device: stat.st_dev,
            inode: stat.st_ino,
        };
        Ok(Self { fd, path, id })
    }

    /// The path for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which directory this is.
    pub fn id(&self) -> DirId {
        self.id
    }

    /// A second handle of the same open directory.
    pub fn try_clone(&self) -> Result<Self, ImageError> {
        let fd = self
            .fd
            .try_clone()
            .map_err(ImageError::io(&self.path, "duplicate the handle"))?;
        Ok(Self {
            fd,
            path: self.path.clone(),
            id: self.id,
        })
    }

    /// Lists everything, and refuses what an image directory cannot hold.
    pub fn list(&self) -> Result<Listing, ImageError> {
        self.list_where(|_| true)
    }

    /// Lists only pagemaps, pages files and the `parent` link, as CRIU looks only at those in the
    /// ancestors of a dump. Other entries may be anything.
    pub fn list_memory(&self) -> Result<Listing, ImageError> {
        self.list_where(|name| {
            matches!(
                FileKind::of(name),
                FileKind::Pagemap(_) | FileKind::Pages(_)
            )
        })
    }

    fn list_where(&self, wanted: impl Fn(&str) -> bool) -> Result<Listing, ImageError> {
        let reading = |error: Errno| ImageError::io(&self.path, "list the directory")(error);
        let mut listing = Listing {
            files: Vec::new(),
            parent: None,
        };
        for entry in Dir::read_from(&self.fd).map_err(reading)? {
            let entry = entry.map_err(reading)?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            let name = match self.check_name(entry.file_name()) {
                Ok(name) => name,
                Err(error) if wanted("") => return Err(error),
                Err(_) => continue,
            };
            if name == PARENT {
                listing.parent = Some(self.read_parent_link()?);
            } else if wanted(name) {
                listing.files.extend(self.file_info(name)?);
            }
            if listing.files.len() > MAX_FILES {
                return Err(ImageError::TooManyFiles {
                    directory: self.path.clone(),
                    limit: MAX_FILES,
                });
            }
        }
        listing
            .files
            .sort_unstable_by(|left, right| left.name.cmp(&right.name));
        Ok(listing)
    }

    fn check_name<'a>(&self, name: &'a CStr) -> Result<&'a str, ImageError> {
        let bad = |what| ImageError::BadName {
            directory: self.path.clone(),
            name: name.to_bytes().escape_ascii().to_string(),
            what,
        };
        let text = name.to_str().map_err(|_| bad("bytes that are not UTF-8"))?;
        if text.chars().any(char::is_control) {
            return Err(bad("control characters"));
        }
        Ok(text)
    }

    /// `None` if the file vanished since it was listed.
    fn file_info(&self, name: &str) -> Result<Option<FileInfo>, ImageError> {
        let path = self.path.join(name);
        let stat = match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(ImageError::io(&path, "read the status")(error)),
        };
        check_regular(&path, &stat)?;
        Ok(Some(FileInfo {
            name: name.to_owned(),
            kind: FileKind::of(name),
            stat: FileStat::new(&stat),
        }))
    }

    /// Opens a regular file of the directory for reading.
    pub fn open_file(&self, name: &str) -> Result<File, ImageError> {
        let path = self.path.join(name);
        let file = match open_beneath(self.fd.as_fd(), name) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return Err(ImageError::NoFile(path)),
            Err(Errno::LOOP) => return Err(ImageError::Symlink(path)),
            Err(error) => return Err(ImageError::io(&path, "open")(error)),
        };
        let stat = rustix::fs::fstat(&file).map_err(ImageError::io(&path, "read the status"))?;
        check_regular(&path, &stat)?;
        Ok(file)
    }

    /// Reads a whole file of at most `limit` bytes.
    pub fn read_small(&self, name: &str, limit: u64) -> Result<Vec<u8>, ImageError> {
        let path = self.path.join(name);
        let file = self.open_file(name)?;
        let stat = FileStat::of(&file).map_err(ImageError::io(&path, "read the status"))?;
        let too_large = |size| ImageError::TooLarge {
            path: path.clone(),
            size,
            limit,
        };
        if stat.size > limit {
            return Err(too_large(stat.size));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(stat.size).unwrap_or(0));
        // One byte more than allowed, so that a file that grows meanwhile is noticed.
        let mut bounded = file.take(limit.saturating_add(1));
        bounded
            .read_to_end(&mut bytes)
            .map_err(ImageError::io(&path, "read"))?;
        let length = bytes.len() as u64;
        if length > limit {
            Err(too_large(length))
        } else {
            Ok(bytes)
        }
    }

    /// As [`ImageDir::read_small`], with `None` for a file that does not exist.
    pub fn read_optional(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
        match self.read_small(name, limit) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(ImageError::NoFile(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens the directory that `parent` leads to; `None` if there is no `parent`.
    ///
    /// A relative link may leave this directory: that is what it is for.
    pub fn open_parent(&self, links: ParentLinks) -> Result<Option<Self>, ImageError> {
        let path = self.path.join(PARENT);
        match rustix::fs::statat(&self.fd, PARENT, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(ImageError::io(&path, "read the status")(error)),
            Ok(_) => {}
        }
        let ParentLink { text } = self.read_parent_link()?;
        if text.starts_with('/') && links == ParentLinks::Relative {
            return Err(ImageError::AbsoluteParent { path, target: text });
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, PARENT, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self::new(fd, join_for_display(&self.path, &text))?)),
            Err(Errno::NOENT) => Err(ImageError::DanglingParent { path, target: text }),
            Err(Errno::LOOP) => Err(ImageError::BadParent {
                path,
                found: "a symbolic link that leads to itself",
            }),
            Err(Errno::NOTDIR) => Err(ImageError::BadParent {
                path,
                found: "a link to something else",
            }),
            Err(error) => Err(ImageError::io(&path, "follow the link")(error)),
        }
    }

    fn read_parent_link(&self) -> Result<ParentLink, ImageError> {
        let path = self.path.join(PARENT);
        match rustix::fs::readlinkat(&self.fd, PARENT, Vec::new()) {
            Ok(text) => match text.into_string() {
                Ok(text) if !text.chars().any(char::is_control) => Ok(ParentLink { text }),
                _ => Err(ImageError::BadParent {
                    path,
                    found: "a link with unprintable text",
                }),
            },
            Err(Errno::INVAL) => Err(ImageError::BadParent {
                path,
                found: "a file or directory itself",
            }),
            Err(error) => Err(ImageError::io(&path, "read the link")(error)),
        }
    }
}

impl AsFd for ImageDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens `name` directly beneath `directory`. NONBLOCK keeps a fifo from blocking the open; it
/// means nothing for the regular files that pass the check that follows.
fn open_beneath(directory: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(Errno::INVAL);
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(directory, name, flags, Mode::empty(), resolve) {
        // Kernels before 5.6, and sandboxes that filter the call. One component without following
        // links cannot leave the directory either.
        Err(Errno::NOSYS | Errno::PERM) => {
            rustix::fs::openat(directory, name, flags, Mode::empty())
        }
        other => other,
    }
}

fn check_regular(path: &Path, stat: &Stat) -> Result<(), ImageError> {
    let path = path.to_owned();
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return Ok(()),
        FileType::Symlink => return Err(ImageError::Symlink(path)),
        FileType::Directory => return Err(ImageError::SubDirectory(path)),
        FileType::BlockDevice | FileType::CharacterDevice => "device node",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::Unknown => "file of unknown type",
    };
    Err(ImageError::Special { path, kind })
}

/// `directory` followed by the link's text, with `x/..` shortened so that deep chains stay readable.
fn join_for_display(directory: &Path, text: &str) -> PathBuf {
    let mut path = directory.to_owned();
    for component in Path::new(text).components() {
        match (component, path.components().next_back()) {
            (Component::CurDir, _) => {}
            (Component::ParentDir, Some(Component::Normal(_))) => {
                path.pop();
            }
            (component, _) => path.push(component),
        }
    }
    path
}

#[cfg(test)]
mod tests;
