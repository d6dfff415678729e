//! CRIU's framing and the few protobuf fields that generated images need.

use std::fs;
use std::io;
use std::path::Path;

/// In front of the type magic of ordinary images (format 1.1).
pub(crate) const COMMON_MAGIC: u32 = 0x5456_4319;
/// In front of the type magic of statistics.
pub(crate) const SERVICE_MAGIC: u32 = 0x5510_5940;

pub(crate) const INVENTORY_MAGIC: u32 = 0x5831_3116;
pub(crate) const PSTREE_MAGIC: u32 = 0x5027_3030;
pub(crate) const CORE_MAGIC: u32 = 0x5505_3847;
pub(crate) const IDS_MAGIC: u32 = 0x5443_2030;
pub(crate) const MM_MAGIC: u32 = 0x5749_2820;
pub(crate) const PAGEMAP_MAGIC: u32 = 0x5608_4025;
pub(crate) const FILES_MAGIC: u32 = 0x5630_3138;
pub(crate) const FS_MAGIC: u32 = 0x5140_3912;
pub(crate) const MEMFD_MAGIC: u32 = 0x4845_3499;
pub(crate) const STATS_MAGIC: u32 = 0x5709_3306;

/// One protobuf message that is being written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// An integer, boolean or enum field.
    pub(crate) fn number(mut self, field: u8, value: u64) -> Self {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    /// A string, bytes or message field.
    pub(crate) fn bytes(mut self, field: u8, value: &[u8]) -> Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    /// A nested message.
    pub(crate) fn message(self, field: u8, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }
}

/// Writes the image `file`: `magics`, then each message behind its size.
pub(crate) fn write_image(file: &Path, magics: &[u32], records: &[Message]) -> io::Result<()> {
    let mut bytes: Vec<u8> = magics
        .iter()
        .flat_map(|magic| magic.to_le_bytes())
        .collect();
    for Message(record) in records {
        let size = u32::try_from(record.len()).map_err(io::Error::other)?;
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(record);
    }
    fs::write(file, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pagemap_entry_has_the_bytes_that_criu_writes() {
        let entry = Message::new()
            .number(1, 0x5630_2f3e_5000)
            .number(2, 0)
            .number(4, 4)
            .number(5, 1);
        let wanted = [
            0x08, 0x80, 0xa0, 0xf9, 0xf9, 0x82, 0xc6, 0x15, 0x10, 0x00, 0x20, 0x04, 0x28, 0x01,
        ];
        assert_eq!(entry.0, wanted);
    }
}
