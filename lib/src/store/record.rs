//! What a receiving directory remembers of each set.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crxfer_proto::v1;
use prost::Message as _;

use super::error::{StoreError, Tried};
use crate::digest::Digest;
use crate::page::PageSize;
use crate::wire::Layout;

/// One set of a receiving directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Number within the directory, never 0.
    pub id: u64,
    /// Its name; empty for an ancestor that was taken along.
    pub name: String,
    /// Generation of the name, from 1.
    pub generation: u64,
    /// Fingerprint of the key that sent it.
    pub peer: [u8; 32],
    /// Root digest that the source stated.
    pub root: Digest,
    /// How it is laid out.
    pub layout: Layout,
    /// Page size of the host that dumped it.
    pub page_size: PageSize,
    /// Whether CRIU could restore it, in a word.
    pub completeness: String,
    /// The set that its `parent` leads to.
    pub base: Option<u64>,
    /// When it was published, in seconds since 1970.
    pub created_unix_s: u64,
    /// By which its directory is found under whichever name: made of inode and time of birth.
    pub directory_id: u64,
    /// Size of the source's files.
    pub image_bytes: u64,
    /// Its name was given to a newer generation.
    pub superseded: bool,
}

impl Record {
    /// Reads the record in the file `path`.
    pub(super) fn load(path: &Path) -> Result<Self, StoreError> {
        let bytes = fs::read(path).tried("read", path)?;
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let record =
            v1::SetRecord::decode(bytes.as_slice()).map_err(|_| bad("not a record of a set"));
        record
            .and_then(|record| Self::from_proto(record).ok_or_else(|| bad("not a whole record")))
            .tried("read", path)
    }

    /// Writes the record so that a crash leaves the old one or the new one.
    pub(super) fn save(&self, path: &Path, durable: bool) -> Result<(), StoreError> {
        write_atomically(path, &self.to_proto().encode_to_vec(), durable)
    }

    fn from_proto(record: v1::SetRecord) -> Option<Self> {
        Some(Self {
            id: Some(record.id).filter(|&id| id != 0)?,
            name: record.name,
            generation: record.generation,
            peer: record.peer.try_into().ok()?,
            root: Digest(record.root.try_into().ok()?),
            layout: Layout::from_number(i32::try_from(record.layout).ok()?).ok()?,
            page_size: PageSize::new(record.page_size).ok()?,
            completeness: record.completeness,
            base: Some(record.base).filter(|&base| base != 0),
            created_unix_s: record.created_unix_s,
            directory_id: record.directory_id,
            image_bytes: record.image_bytes,
            superseded: record.superseded,
        })
    }

    fn to_proto(&self) -> v1::SetRecord {
        v1::SetRecord {
            id: self.id,
            name: self.name.clone(),
            generation: self.generation,
            peer: self.peer.to_vec(),
            root: self.root.0.to_vec(),
            layout: self.layout.number().cast_unsigned(),
            page_size: self.page_size.bytes(),
            completeness: self.completeness.clone(),
            base: self.base.unwrap_or(0),
            created_unix_s: self.created_unix_s,
            directory_id: self.directory_id,
            image_bytes: self.image_bytes,
            superseded: self.superseded,
        }
    }
}

/// Writes `bytes` to a temporary file beside `path` and renames it there.
pub(super) fn write_atomically(path: &Path, bytes: &[u8], durable: bool) -> Result<(), StoreError> {
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary).tried("create", &temporary)?;
    file.write_all(bytes).tried("write", &temporary)?;
    if durable {
        file.sync_all().tried("sync", &temporary)?;
    }
    fs::rename(&temporary, path).tried("rename", &temporary)
}
