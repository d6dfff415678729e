//! The members of a tar archive, one after the other, with the bytes of their headers.
//!
//! Headers are parsed by the crate `tar`; walking is done here, because that crate reads extended
//! headers whole, whatever length they state, and drops what it does not know.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tar::{EntryType, Header, PaxExtensions};

use super::ArchiveError;

/// Tar counts in blocks of this many bytes.
const BLOCK: u64 = 512;

/// Largest extended header, in bytes: names and times, some hundred bytes.
const MAX_EXTENSION: u64 = 64 << 10;

/// Most extended headers before one member.
const MAX_EXTENSIONS: usize = 4;

/// Most members; an image directory has fewer files.
const MAX_MEMBERS: u64 = 1 << 20;

/// Bytes copied at once.
const COPY_BYTES: usize = 1 << 20;

/// One member; its bytes follow in the archive.
#[derive(Debug)]
pub(super) struct Member {
    /// Its path, without a slash at its end: relative, and no component leads up.
    pub(super) path: String,
    pub(super) is_directory: bool,
    /// Permission bits.
    pub(super) mode: u32,
    /// Length in bytes.
    pub(super) size: u64,
    /// Its headers as they were.
    pub(super) headers: Vec<u8>,
}

/// An archive that is read.
#[derive(Debug)]
pub(super) struct Members<R> {
    from: R,
    archive: PathBuf,
    at: u64,
    limit: u64,
    count: u64,
    buffer: Vec<u8>,
}

/// What extended headers say about the member that follows.
#[derive(Default)]
struct Extensions {
    path: Option<String>,
    size: Option<u64>,
}

impl<R: Read> Members<R> {
    /// The members of `from`, which has at most `limit` bytes; `archive` is for messages.
    pub(super) fn new(from: R, archive: &Path, limit: u64) -> Self {
        Self {
            from,
            archive: archive.to_owned(),
            at: 0,
            limit,
            count: 0,
            buffer: Vec::new(),
        }
    }

    /// The next member. The bytes of the one before must have been taken.
    pub(super) fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        let (mut headers, mut extensions) = (Vec::new(), Extensions::default());
        for _ in 0..=MAX_EXTENSIONS {
            let Some(header) = self.header()? else {
                return match headers.is_empty() {
                    true => Ok(None),
                    false => Err(self.damaged("ends where a member is due")),
                };
            };
            headers.extend_from_slice(header.as_bytes());
            let kind = header.entry_type();
            if !is_extension(kind) {
                return self.member(&header, headers, extensions).map(Some);
            }
            let text = self.extension(&header)?;
            extensions
                .take(kind, &text)
                .map_err(|what| self.damaged(what))?;
            headers.extend_from_slice(&text);
            headers.resize(headers.len().next_multiple_of(512), 0);
        }
        Err(self.damaged("too many extended headers for one member"))
    }

    fn member(
        &mut self,
        header: &Header,
        headers: Vec<u8>,
        extensions: Extensions,
    ) -> Result<Member, ArchiveError> {
        self.count += 1;
        if self.count > MAX_MEMBERS {
            return Err(self.damaged("more members than any checkpoint has"));
        }
        let own = || String::from_utf8(header.path_bytes().into_owned());
        let path = match extensions.path {
            Some(path) => path,
            None => own().map_err(|_| self.damaged("a name that is not UTF-8"))?,
        };
        let path = path.trim_end_matches('/');
        let path = path.strip_prefix("./").unwrap_or(path).to_owned();
        let is_directory = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => false,
            EntryType::Directory => true,
            _ => return Err(self.refused(&path, "is neither a file nor a directory")),
        };
        if path != "." && !is_inside(&path) {
            return Err(self.refused(&path, "leads out of the archive"));
        }
        let stated = header.entry_size();
        let stated = stated.map_err(|error| self.damaged(error.to_string()))?;
        let size = extensions.size.unwrap_or(stated);
        if is_directory && size > 0 {
            return Err(self.refused(&path, "is a directory with content"));
        }
        let mode = header
            .mode()
            .map_err(|error| self.damaged(error.to_string()))?;
        self.check_room(size)?;
        Ok(Member {
            path,
            is_directory,
            mode: mode & 0o777,
            size,
            headers,
        })
    }

    // `None` at the archive's end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut block = [0; 512];
        self.read(&mut block)?;
        if block == [0; 512] {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        let stated = header
            .cksum()
            .map_err(|error| self.damaged(error.to_string()))?;
        // The field itself counts as blanks.
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
        if stated != sum(&block[..148]) + 8 * 32 + sum(&block[156..]) {
            return Err(self.damaged("a header whose checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, ArchiveError> {
        let size = header.entry_size();
        let size = size.map_err(|error| self.damaged(error.to_string()))?;
        if size > MAX_EXTENSION {
            return Err(self.damaged(format!("an extended header of {size} bytes")));
        }
        let mut text = Vec::new();
        self.copy(size, &mut text, Path::new("memory"))?;
        Ok(text)
    }

    /// Copies the `size` bytes of a member to `to`, whose path is for messages.
    pub(super) fn copy(
        &mut self,
        size: u64,
        to: &mut impl Write,
        path: &Path,
    ) -> Result<(), ArchiveError> {
        self.check_room(size)?;
        let mut left = size;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(COPY_BYTES, 0);
        while left > 0 {
            let now = usize::try_from(left).map_or(COPY_BYTES, |left| left.min(COPY_BYTES));
            self.read(&mut buffer[..now])?;
            to.write_all(&buffer[..now])
                .map_err(ArchiveError::io(path, "write"))?;
            left -= now as u64;
        }
        self.buffer = buffer;
        let padding =
            usize::try_from(size.next_multiple_of(BLOCK) - size).expect("part of a block");
        self.read(&mut [0; 512][..padding])
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<(), ArchiveError> {
        self.check_room(buffer.len() as u64)?;
        match self.from.read_exact(buffer) {
            Ok(()) => {
                self.at += buffer.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.damaged("it ends too early"))
            }
            Err(error) => Err(self.damaged(error.to_string())),
        }
    }

    fn check_room(&self, bytes: u64) -> Result<(), ArchiveError> {
        if bytes > self.limit.saturating_sub(self.at) {
            let (archive, limit) = (self.archive.clone(), self.limit);
            return Err(ArchiveError::TooLarge { archive, limit });
        }
        Ok(())
    }

    fn damaged(&self, what: impl Into<String>) -> ArchiveError {
        ArchiveError::Damaged {
            archive: self.archive.clone(),
            at: self.at,
            what: what.into(),
        }
    }

    fn refused(&self, member: &str, what: &'static str) -> ArchiveError {
        ArchiveError::Refused {
            archive: self.archive.clone(),
            member: member.chars().take(80).collect(),
            what,
        }
    }
}

impl Extensions {
    fn take(&mut self, kind: EntryType, text: &[u8]) -> Result<(), String> {
        let utf8 = |bytes: &[u8]| {
            let text = String::from_utf8(bytes.to_vec());
            text.map_err(|_| "a name that is not UTF-8".to_owned())
        };
        if kind == EntryType::GNULongName {
            let end = text.iter().position(|&byte| byte == 0);
            self.path = Some(utf8(&text[..end.unwrap_or(text.len())])?);
        }
        if kind != EntryType::XHeader {
            return Ok(());
        }
        for record in PaxExtensions::new(text) {
            let record = record.map_err(|error| error.to_string())?;
            match record.key_bytes() {
                b"path" => self.path = Some(utf8(record.value_bytes())?),
                b"size" => {
                    let size = record.value().ok().and_then(|text| text.parse().ok());
                    self.size = Some(size.ok_or("a size that is no number")?);
                }
                key if key.starts_with(b"GNU.sparse") => {
                    return Err("a sparse member, which no checkpoint has".to_owned());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn is_extension(kind: EntryType) -> bool {
    matches!(
        kind,
        EntryType::XHeader
            | EntryType::XGlobalHeader
            | EntryType::GNULongName
            | EntryType::GNULongLink
    )
}

fn is_inside(path: &str) -> bool {
    let is_name =
        |name: &str| !matches!(name, "" | "." | "..") && !name.chars().any(char::is_control);
    path.split('/').all(is_name)
}
