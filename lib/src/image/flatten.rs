//! One directory out of a chain: every page present, no parent.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;

use super::chain::Chain;
use super::dir::{FileInfo, FileStat, ImageDir};
use super::error::ImageError;
use super::name::{FileKind, PagemapName, pages_file_name};
use super::pagemap::{PageFlags, PageRun, Pagemap};
use super::pages::PagesReader;
use super::resolve::{ResolvedRun, Source};

/// `f_type` of file systems that live in memory, where fsync means nothing.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// Bytes copied at once.
const COPY_BYTES: usize = 1 << 20;

/// What `flatten` wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flattened {
    /// Pages of all pagemaps.
    pub pages: u64,
    /// Of these, pages of zeros, written as holes.
    pub zero_pages: u64,
    /// Files in the new directory.
    pub files: u64,
}

/// Writes the newest directory of `chain` to `out`, with the content of all pages and no parent.
///
/// Everything that is not memory is copied byte for byte, holes included. `out` must not exist; it
/// appears complete or not at all, readable by its owner only, because it holds process memory.
pub fn flatten(chain: &Chain, out: &Path) -> Result<Flattened, ImageError> {
    chain.require_understood()?;
    let mut target = Target::create(out)?;
    let mut flattened = Flattened::default();
    let mut ids = PageIds::of(chain);
    let mut reader = PagesReader::new(chain);
    for name in chain.newest().pagemaps().keys() {
        let memory = flatten_memory(chain, *name, &mut ids, &mut reader, &target)?;
        flattened.pages += memory.pages;
        flattened.zero_pages += memory.zero_pages;
        flattened.files += 2;
    }
    let directory = chain.open_dir(0)?;
    for file in &chain.newest().listing().files {
        let written = match file.kind {
            FileKind::Pagemap(_) => true,
            FileKind::Pages(id) => ids.replaced.contains(&id),
            _ => false,
        };
        if !written {
            copy(&directory, file, &target)?;
            flattened.files += 1;
        }
    }
    target.publish()?;
    Ok(flattened)
}

/// Which numbers pages files of the new directory may have.
struct PageIds {
    /// Numbers of pages files that pagemaps use; these files are written anew.
    replaced: BTreeSet<u32>,
    /// Numbers that are taken: by files already written, or by files that no pagemap uses.
    taken: BTreeSet<u32>,
}

impl PageIds {
    fn of(chain: &Chain) -> Self {
        let newest = chain.newest();
        let replaced: BTreeSet<u32> = newest.pagemaps().values().map(Pagemap::pages_id).collect();
        let of_file = |file: &FileInfo| match file.kind {
            FileKind::Pages(id) if !replaced.contains(&id) => Some(id),
            _ => None,
        };
        let taken = newest.listing().files.iter().filter_map(of_file).collect();
        Self { replaced, taken }
    }

    /// `wanted`, or the next free number if two pagemaps share a pages file.
    fn take(&mut self, wanted: u32) -> u32 {
        let mut id = wanted;
        while !self.taken.insert(id) {
            id = id.wrapping_add(1);
        }
        id
    }
}

fn flatten_memory(
    chain: &Chain,
    name: PagemapName,
    ids: &mut PageIds,
    reader: &mut PagesReader<'_>,
    target: &Target,
) -> Result<Flattened, ImageError> {
    let runs = chain.resolve(name)?;
    let old = &chain.newest().pagemaps()[&name];
    let id = ids.take(old.pages_id());
    let pagemap = Pagemap::new(
        &name.to_string(),
        id,
        old.page_size(),
        present_runs(name, &runs)?,
    )?;
    let mode = |file: &str| {
        chain
            .newest()
            .listing()
            .file(file)
            .map_or(0o600, |info| info.stat.mode)
    };

    let file = target.create_file(&name.to_string(), mode(&name.to_string()))?;
    let path = target.path.join(name.to_string());
    file.write_all_at(&pagemap.encode(), 0)
        .map_err(ImageError::io(&path, "write"))?;
    target.sync(&file, &path)?;

    let pages_name = pages_file_name(id);
    let path = target.path.join(&pages_name);
    let file = target.create_file(&pages_name, mode(&pages_file_name(old.pages_id())))?;
    let page_len = pagemap.page_size().byte_len();
    let (mut offset, mut zero_pages) = (0, 0);
    for run in &runs {
        if run.source == Source::Zero {
            offset += run.pages * pagemap.page_size().bytes();
            zero_pages += run.pages;
            continue;
        }
        reader.for_each_piece(name, run, |_, bytes| {
            zero_pages += write_pages(&file, offset, bytes, page_len)
                .map_err(ImageError::io(&path, "write"))?;
            offset += bytes.len() as u64;
            Ok::<(), ImageError>(())
        })?;
    }
    file.set_len(offset)
        .map_err(ImageError::io(&path, "set the size"))?;
    target.sync(&file, &path)?;
    Ok(Flattened {
        pages: pagemap.pages(),
        zero_pages,
        files: 2,
    })
}

/// The flags of the new entries: a present page keeps its own; one from the parent has lost what
/// CRIU knew about lazy restore, and is restored at once.
pub(super) fn present_runs(
    name: PagemapName,
    runs: &[ResolvedRun],
) -> Result<Vec<PageRun>, ImageError> {
    runs.iter()
        .map(|run| {
            let &ResolvedRun {
                vaddr,
                pages,
                flags_at_top,
                source,
            } = run;
            if source == Source::Lazy {
                return Err(ImageError::LazyPages {
                    file: name.to_string(),
                    vaddr,
                    pages,
                });
            }
            let present = flags_at_top.is_present();
            let flags = if present {
                flags_at_top
            } else {
                PageFlags::PRESENT
            };
            Ok(PageRun {
                vaddr,
                pages,
                flags,
            })
        })
        .collect()
}

/// Writes pages at `offset`, leaving holes where they are zero. Gives the number of zero pages.
fn write_pages(file: &File, offset: u64, bytes: &[u8], page_len: usize) -> std::io::Result<u64> {
    let (mut zero_pages, mut start) = (0, 0);
    let is_zero = |page: &[u8]| page.iter().all(|&byte| byte == 0);
    for (index, page) in bytes.chunks(page_len).enumerate() {
        if is_zero(page) {
            let end = index * page_len;
            file.write_all_at(&bytes[start..end], offset + start as u64)?;
            start = end + page.len();
            zero_pages += 1;
        }
    }
    file.write_all_at(&bytes[start..], offset + start as u64)?;
    Ok(zero_pages)
}

/// Copies a file with its holes, and notices if it changed meanwhile.
fn copy(directory: &ImageDir, info: &FileInfo, target: &Target) -> Result<(), ImageError> {
    let source_path = directory.path().join(&info.name);
    let source = directory.open_file(&info.name)?;
    let unchanged = || match FileStat::of(&source) {
        Ok(stat) if stat == info.stat => Ok(()),
        Ok(_) => Err(ImageError::Changed(source_path.clone())),
        Err(error) => Err(ImageError::io(&source_path, "read the status")(error)),
    };
    unchanged()?;
    let path = target.path.join(&info.name);
    let file = target.create_file(&info.name, info.stat.mode)?;
    copy_data(&source, &file, info.stat.size).map_err(ImageError::io(&path, "copy"))?;
    unchanged()?;
    target.sync(&file, &path)
}

fn copy_data(source: &File, target: &File, size: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(size).unwrap_or(COPY_BYTES))];
    let mut end = 0;
    while let Some(start) = seek(source, SeekFrom::Data(end))?.filter(|&start| start < size) {
        end = seek(source, SeekFrom::Hole(start))?
            .unwrap_or(size)
            .min(size);
        let mut offset = start;
        while offset < end {
            let length =
                usize::try_from(end - offset).map_or(buffer.len(), |left| left.min(buffer.len()));
            source.read_exact_at(&mut buffer[..length], offset)?;
            target.write_all_at(&buffer[..length], offset)?;
            offset += length as u64;
        }
    }
    target.set_len(size)
}

/// `None` at the end of the file.
fn seek(file: &File, to: SeekFrom) -> std::io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(offset) => Ok(Some(offset)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A new directory under a hidden name beside its place; removed again unless published.
#[derive(Debug)]
pub(crate) struct Target {
    parent: OwnedFd,
    directory: OwnedFd,
    temporary: String,
    name: String,
    /// Where it will be, for messages.
    path: PathBuf,
    durable: bool,
    published: bool,
}

impl Target {
    pub(crate) fn create(out: &Path) -> Result<Self, ImageError> {
        let bad = || ImageError::BadOutput(out.to_owned());
        let name = out
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(bad)?
            .to_owned();
        let beside = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        let beside = beside.unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opening = ImageError::io(beside, "open the directory");
        let parent = rustix::fs::open(beside, flags, Mode::empty()).map_err(opening)?;
        if rustix::fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Err(ImageError::OutputExists(out.to_owned()));
        }
        let temporary = format!(".{name}.{}.partial", std::process::id());
        let path = beside.join(&temporary);
        rustix::fs::mkdirat(&parent, &temporary, Mode::RWXU)
            .map_err(ImageError::io(&path, "create the directory"))?;
        let directory =
            rustix::fs::openat(&parent, &temporary, flags | OFlags::NOFOLLOW, Mode::empty())
                .map_err(ImageError::io(&path, "open the directory"))?;
        let durable = is_durable(&directory);
        let path = out.to_owned();
        Ok(Self {
            parent,
            directory,
            temporary,
            name,
            path,
            durable,
            published: false,
        })
    }

    /// Where it will be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn create_file(&self, name: &str, mode: u32) -> Result<File, ImageError> {
        let path = self.path.join(name);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(ImageError::io(&path, "create"))?;
        // The mode is set apart because creating applies the umask.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o777))
            .map_err(ImageError::io(&path, "set the mode"))?;
        Ok(file.into())
    }

    pub(crate) fn sync(&self, file: impl AsFd, path: &Path) -> Result<(), ImageError> {
        if self.durable {
            rustix::fs::fsync(file).map_err(ImageError::io(path, "write to disk"))?;
        }
        Ok(())
    }

    pub(crate) fn publish(&mut self) -> Result<(), ImageError> {
        self.sync(&self.directory, &self.path)?;
        let flags = RenameFlags::NOREPLACE;
        let renamed = rustix::fs::renameat_with(
            &self.parent,
            &self.temporary,
            &self.parent,
            &self.name,
            flags,
        );
        let renamed = match renamed {
            // File systems without that flag: rename of a directory replaces nothing but an empty one.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::renameat(&self.parent, &self.temporary, &self.parent, &self.name)
            }
            other => other,
        };
        match renamed {
            Ok(()) => self.published = true,
            Err(Errno::EXIST | Errno::NOTEMPTY) => {
                return Err(ImageError::OutputExists(self.path.clone()));
            }
            Err(error) => return Err(ImageError::io(&self.path, "rename into place")(error)),
        }
        self.sync(&self.parent, &self.path)
    }

    fn remove(&self) -> Result<(), Errno> {
        for entry in Dir::read_from(&self.directory)? {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                rustix::fs::unlinkat(&self.directory, entry.file_name(), AtFlags::empty())?;
            }
        }
        rustix::fs::unlinkat(&self.parent, &self.temporary, AtFlags::REMOVEDIR)
    }
}

impl AsFd for Target {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if let Err(error) = self.remove() {
            tracing::warn!(directory = self.temporary, %error, "cannot remove the unfinished directory");
        }
    }
}

fn is_durable(directory: impl AsFd) -> bool {
    let in_memory = |kind: u64| kind == TMPFS_MAGIC || kind == RAMFS_MAGIC;
    !rustix::fs::fstatfs(directory).is_ok_and(|status| in_memory(status.f_type.cast_unsigned()))
}

#[cfg(test)]
mod tests;
