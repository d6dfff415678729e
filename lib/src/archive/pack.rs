//! An image directory becomes an archive again.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tar::{EntryType, Header};

use super::members::Members;
use super::{ArchiveError, IMAGES, REST};
use crate::image::{Chain, ChainOptions, FlatFile, FlatView, ImageError, ParentLinks, Piece};

/// podman's own level.
const ZSTD_LEVEL: i32 = 3;

/// Bytes copied at once.
const COPY_BYTES: usize = 1 << 20;

/// Longest name of an image in an archive, in bytes: what a plain header has room for.
const MAX_NAME: usize = 80;

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// As `podman … --compress gzip`.
    Gzip,
    /// As podman does by default.
    #[default]
    Zstd,
}

/// What was packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Images.
    pub images: u64,
    /// Their bytes.
    pub image_bytes: u64,
    /// Other members.
    pub others: u64,
}

/// Makes the archive `archive` of `directory`, which [`unpack`](super::unpack) made, or which was sent
/// from one that it made: in any layout, parents are followed.
///
/// `archive` must not exist; it appears complete or not at all, readable by its owner only.
pub fn pack(
    directory: &Path,
    archive: &Path,
    compression: Compression,
) -> Result<Packed, ArchiveError> {
    let options = ChainOptions {
        parent_links: ParentLinks::Any,
        ..ChainOptions::default()
    };
    let set = FlatView::new(Chain::open_with(directory, options)?)?;
    if set.chain().newest().listing().file(REST).is_none() {
        return Err(ArchiveError::NoRest(directory.to_owned()));
    }
    if archive.symlink_metadata().is_ok() {
        return Err(ArchiveError::Exists(archive.to_owned()));
    }
    let temporary = Temporary::create(archive)?;
    let writing = |error: io::Error| ArchiveError::io(archive, "write")(error);
    let file = BufWriter::with_capacity(COPY_BYTES, &temporary.file);
    let packed = match compression {
        Compression::None => {
            let mut to = file;
            let packed = write(&set, &mut to, archive)?;
            to.flush().map_err(writing)?;
            packed
        }
        Compression::Gzip => {
            let mut to = flate2::write::GzEncoder::new(file, flate2::Compression::default());
            let packed = write(&set, &mut to, archive)?;
            to.finish()
                .and_then(|mut file| file.flush())
                .map_err(writing)?;
            packed
        }
        Compression::Zstd => {
            let mut to = zstd::stream::write::Encoder::new(file, ZSTD_LEVEL).map_err(writing)?;
            let packed = write(&set, &mut to, archive)?;
            to.finish()
                .and_then(|mut file| file.flush())
                .map_err(writing)?;
            packed
        }
    };
    temporary.publish(archive)?;
    Ok(packed)
}

fn write(set: &FlatView, to: &mut impl Write, archive: &Path) -> Result<Packed, ArchiveError> {
    let mut packed = Packed::default();
    let directory = copy_rest(set, to, archive, &mut packed)?;
    for file in &set.chain().newest().listing().files {
        if file.name == REST {
            continue;
        }
        let mut image = set
            .open(&file.name)?
            .ok_or_else(|| ImageError::NoFile(set.chain().newest().path().join(&file.name)))?;
        let header = header(directory, &file.name, image.length(), file.stat.mode);
        let header = header.ok_or_else(|| ArchiveError::Refused {
            archive: archive.to_owned(),
            member: file.name.clone(),
            what: "has a name that is too long for an archive",
        })?;
        let writing = ArchiveError::io::<io::Error>(archive, "write");
        to.write_all(header.as_bytes()).map_err(writing)?;
        copy_image(&mut image, to, archive)?;
        packed.images += 1;
        packed.image_bytes += image_length(&header);
    }
    let writing = ArchiveError::io::<io::Error>(archive, "write");
    to.write_all(&[0; 1024]).map_err(writing)?;
    Ok(packed)
}

// Everything that is no image, as it was; gives the directory that images belong to.
fn copy_rest(
    set: &FlatView,
    to: &mut impl Write,
    archive: &Path,
    packed: &mut Packed,
) -> Result<&'static str, ArchiveError> {
    let file = set.chain().open_dir(0)?.open_file(REST)?;
    let path = set.chain().newest().path().join(REST);
    let mut members = Members::new(BufReader::new(file), &path, u64::MAX);
    let mut directory = IMAGES[0];
    while let Some(member) = members.next()? {
        if let Some(found) = IMAGES.into_iter().find(|known| *known == member.path) {
            directory = found;
        }
        let writing = |error: io::Error| ArchiveError::io(archive, "write")(error);
        to.write_all(&member.headers).map_err(writing)?;
        members.copy(member.size, to, archive)?;
        pad(to, member.size).map_err(writing)?;
        packed.others += 1;
    }
    Ok(directory)
}

fn header(directory: &str, name: &str, size: u64, mode: u32) -> Option<Header> {
    if name.len() > MAX_NAME {
        return None;
    }
    // Sizes above 8 GiB are written as GNU does, which Go's reader knows.
    let mut header = Header::new_gnu();
    header.set_path(format!("{directory}/{name}")).ok()?;
    header.set_entry_type(EntryType::Regular);
    header.set_size(size);
    header.set_mode(mode & 0o777);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    Some(header)
}

fn image_length(header: &Header) -> u64 {
    header.entry_size().expect("it was set")
}

fn copy_image(
    image: &mut FlatFile<'_>,
    to: &mut impl Write,
    archive: &Path,
) -> Result<(), ArchiveError> {
    let writing = |error: io::Error| ArchiveError::io(archive, "write")(error);
    let size = image.length();
    let mut buffer = vec![0; COPY_BYTES];
    while let Some(piece) = image.next_piece()? {
        match piece {
            Piece::Bytes(bytes) => to.write_all(&bytes).map_err(writing)?,
            Piece::Zeros(length) => {
                io::copy(&mut io::Read::take(io::repeat(0), length), to).map_err(writing)?;
            }
            Piece::File {
                file,
                path,
                offset,
                length,
            } => {
                let mut done = 0;
                while done < length {
                    let left = usize::try_from(length - done).unwrap_or(COPY_BYTES);
                    let now = &mut buffer[..left.min(COPY_BYTES)];
                    file.read_exact_at(now, offset + done)
                        .map_err(ArchiveError::io(&path, "read"))?;
                    to.write_all(now).map_err(writing)?;
                    done += now.len() as u64;
                }
            }
        }
    }
    pad(to, size).map_err(writing)
}

fn pad(to: &mut impl Write, size: u64) -> io::Result<()> {
    let padding = usize::try_from(size.next_multiple_of(512) - size).expect("part of a block");
    to.write_all(&[0; 512][..padding])
}

/// A file beside its place, under another name; removed unless published.
struct Temporary {
    file: File,
    path: PathBuf,
    published: bool,
}

impl Temporary {
    fn create(archive: &Path) -> Result<Self, ArchiveError> {
        let name = archive.file_name().unwrap_or_default().to_string_lossy();
        let path = archive.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let file = options
            .open(&path)
            .map_err(ArchiveError::io(&path, "create"))?;
        Ok(Self {
            file,
            path,
            published: false,
        })
    }

    fn publish(mut self, archive: &Path) -> Result<(), ArchiveError> {
        self.file
            .sync_all()
            .map_err(ArchiveError::io(&self.path, "write to disk"))?;
        std::fs::rename(&self.path, archive)
            .map_err(ArchiveError::io(archive, "rename into place"))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(file = %self.path.display(), %error, "cannot remove the unfinished archive");
        }
    }
}
