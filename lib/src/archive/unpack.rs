//! An archive becomes an image directory.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::members::{Member, Members};
use super::{ArchiveError, IMAGES, REST};
use crate::delta::FileName;
use crate::image::flatten::Target;

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Images.
    pub images: u64,
    /// Their bytes.
    pub image_bytes: u64,
    /// Other members, directories included, all in one file.
    pub others: u64,
}

/// Makes the image directory `out` of the archive at `archive`: zstd, gzip or plain.
///
/// `out` must not exist; it appears complete or not at all, readable by its owner only. Unpacked, the
/// archive may have `max_bytes`; by default as many as there is room for.
pub fn unpack(
    archive: &Path,
    out: &Path,
    max_bytes: Option<u64>,
) -> Result<Unpacked, ArchiveError> {
    let from = open(archive)?;
    let mut target = Target::create(out)?;
    let limit = match max_bytes {
        Some(limit) => limit,
        None => room(&target, out)?,
    };
    let mut unpacking = Unpacking {
        members: Members::new(from, archive, limit),
        archive,
        target: &target,
        rest: target.create_file(REST, 0o600)?,
        rest_path: out.join(REST),
        images: None,
        unpacked: Unpacked::default(),
    };
    unpacking.run()?;
    let unpacked = unpacking.unpacked;
    target.publish()?;
    Ok(unpacked)
}

/// Opens an archive and whatever compresses it.
pub(super) fn open(archive: &Path) -> Result<Box<dyn Read>, ArchiveError> {
    let reading = |error: io::Error| ArchiveError::io(archive, "read")(error);
    let mut file = File::open(archive).map_err(ArchiveError::io(archive, "open"))?;
    let mut magic = Vec::new();
    (&file).take(4).read_to_end(&mut magic).map_err(reading)?;
    file.seek(SeekFrom::Start(0)).map_err(reading)?;
    Ok(match magic.as_slice() {
        [0x28, 0xb5, 0x2f, 0xfd] => {
            Box::new(zstd::stream::read::Decoder::new(file).map_err(reading)?)
        }
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file))),
        _ => Box::new(BufReader::with_capacity(1 << 20, file)),
    })
}

fn room(target: &Target, out: &Path) -> Result<u64, ArchiveError> {
    let room = rustix::fs::fstatvfs(target).map_err(ArchiveError::io(out, "examine"))?;
    Ok(room.f_bavail.saturating_mul(room.f_frsize))
}

struct Unpacking<'a> {
    members: Members<Box<dyn Read>>,
    archive: &'a Path,
    target: &'a Target,
    rest: File,
    rest_path: std::path::PathBuf,
    /// The directory of the archive that images are in, once one was seen.
    images: Option<&'static str>,
    unpacked: Unpacked,
}

impl Unpacking<'_> {
    fn run(&mut self) -> Result<(), ArchiveError> {
        while let Some(member) = self.members.next()? {
            match image_of(&member.path) {
                Some((directory, name)) if !member.is_directory => {
                    self.image(&member, directory, name)?;
                }
                _ => self.other(&member)?,
            }
        }
        if self.images.is_none() {
            return Err(ArchiveError::NoImages(self.archive.to_owned()));
        }
        self.write_rest(&[0; 1024])?;
        Ok(self.target.sync(&self.rest, &self.rest_path)?)
    }

    fn image(
        &mut self,
        member: &Member,
        directory: &'static str,
        name: &str,
    ) -> Result<(), ArchiveError> {
        let refused = |what| ArchiveError::Refused {
            archive: self.archive.to_owned(),
            member: member.path.clone(),
            what,
        };
        if name == REST || FileName::new(name).is_err() {
            return Err(refused("has a name that no image has"));
        }
        if *self.images.get_or_insert(directory) != directory {
            return Err(refused("is in a second directory of images"));
        }
        let mut file = match self.target.create_file(name, member.mode & 0o700 | 0o600) {
            Err(error) if already_exists(&error) => return Err(refused("comes twice")),
            other => other?,
        };
        let path = self.target.path().join(name);
        self.members.copy(member.size, &mut file, &path)?;
        self.target.sync(&file, &path)?;
        self.unpacked.images += 1;
        self.unpacked.image_bytes += member.size;
        Ok(())
    }

    fn other(&mut self, member: &Member) -> Result<(), ArchiveError> {
        self.write_rest(&member.headers)?;
        self.members
            .copy(member.size, &mut self.rest, &self.rest_path)?;
        let padding = member.size.next_multiple_of(512) - member.size;
        self.write_rest(&[0; 512][..usize::try_from(padding).expect("part of a block")])?;
        self.unpacked.others += 1;
        Ok(())
    }

    fn write_rest(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        let written = self.rest.write_all(bytes);
        written.map_err(ArchiveError::io(&self.rest_path, "write"))
    }
}

// The directory and the name of an image; anything below a further directory is none.
fn image_of(path: &str) -> Option<(&'static str, &str)> {
    let (directory, name) = path.split_once('/')?;
    let directory = IMAGES.into_iter().find(|known| *known == directory)?;
    (!name.contains('/')).then_some((directory, name))
}

fn already_exists(error: &crate::image::ImageError) -> bool {
    matches!(error, crate::image::ImageError::Io { source, .. }
        if source.kind() == io::ErrorKind::AlreadyExists)
}
