//! `inventory.img`: what kind of dump a directory holds.

use crxfer_proto::criu;

use super::error::ImageError;
use super::framing::magic;
use super::records::decode_one;

/// The newest image version that released CRIU writes (1: v1.0, 2: v1.1).
const NEWEST_VERSION: u32 = 2;

/// The parts of an inventory that matter to a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    /// 0 in pre-dumps up to CRIU 4.2; 1 or 2 in dumps; 3 on the unreleased line.
    pub img_version: u32,
    /// Microseconds since boot of the dumping host; absent without memory tracking.
    pub dump_uptime: Option<u64>,
    /// 1 splice, 2 read; only in pre-dumps.
    pub pre_dump_mode: Option<u32>,
    /// UUID of the dumping CRIU process; only in dumps of CRIU 4.1 and later.
    pub criu_run_id: Option<String>,
    compressed: bool,
}

impl Inventory {
    /// Parses the bytes of an `inventory.img`; `name` is for the error.
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        let entry: criu::InventoryEntry = decode_one(bytes, name, magic::INVENTORY)?;
        Ok(Self {
            img_version: entry.img_version.ok_or_else(|| ImageError::BadCount {
                file: name.to_owned(),
                what: "the image version is missing",
            })?,
            dump_uptime: entry.dump_uptime,
            pre_dump_mode: entry.pre_dump_mode,
            criu_run_id: entry.dump_criu_run_id,
            compressed: entry.compress.unwrap_or(false)
                || entry.compress_region_size.unwrap_or(0) != 0,
        })
    }

    /// Whether this is a pre-dump: memory only, of a process that went on running.
    ///
    /// Up to CRIU 4.2 they have version 0; the unreleased line gives them a real one, so the mode
    /// tells as well.
    pub fn is_pre_dump(&self) -> bool {
        self.img_version == 0 || self.pre_dump_mode.is_some()
    }

    /// Whether memory is stored compressed (the unreleased line after CRIU 4.2).
    pub fn compressed(&self) -> bool {
        self.compressed
    }

    /// Refuses dumps of which the memory may not mean what this crate takes it to mean. The error
    /// says [`ImageError::is_opaque`].
    pub fn check_understood(&self, name: &str) -> Result<(), ImageError> {
        if self.compressed {
            let what = "the inventory says so";
            return Err(ImageError::Compressed {
                file: name.to_owned(),
                what,
            });
        }
        if self.img_version > NEWEST_VERSION {
            let what = format!("image version {}", self.img_version);
            return Err(ImageError::TooNew {
                file: name.to_owned(),
                what,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::framing::{Frame, Writer};
    use super::*;

    fn image(entry: &criu::InventoryEntry) -> Vec<u8> {
        let mut image = Writer::new(Frame::V10, magic::INVENTORY);
        image.record(entry);
        image.finish()
    }

    fn parse(entry: &criu::InventoryEntry) -> Result<Inventory, ImageError> {
        Inventory::parse(&image(entry), "inventory.img")
    }

    #[test]
    fn version_and_mode_tell_pre_dumps() {
        for (img_version, pre_dump_mode, is_pre_dump) in [
            (2, None, false),
            (1, None, false),
            (0, None, true),
            (0, Some(1), true),
            (3, Some(2), true),
        ] {
            let entry = criu::InventoryEntry {
                img_version: Some(img_version),
                pre_dump_mode,
                ..Default::default()
            };
            assert_eq!(parse(&entry).unwrap().is_pre_dump(), is_pre_dump);
        }
    }

    #[test]
    fn compressed_and_newer_dumps_are_opaque() {
        let compressed = criu::InventoryEntry {
            img_version: Some(3),
            compress: Some(true),
            ..Default::default()
        };
        let error = parse(&compressed)
            .unwrap()
            .check_understood("inventory.img")
            .unwrap_err();
        assert!(matches!(error, ImageError::Compressed { .. }) && error.is_opaque());
        let newer = criu::InventoryEntry {
            img_version: Some(3),
            ..Default::default()
        };
        let error = parse(&newer)
            .unwrap()
            .check_understood("inventory.img")
            .unwrap_err();
        assert!(
            error.to_string().contains("image version 3") && error.is_opaque(),
            "{error}"
        );
    }

    #[test]
    fn damaged_inventories_are_refused() {
        let good = image(&criu::InventoryEntry {
            img_version: Some(2),
            ..Default::default()
        });
        let parse = |bytes: &[u8]| Inventory::parse(bytes, "inventory.img").unwrap_err();
        assert!(matches!(
            parse(&good[..good.len() - 1]),
            ImageError::Framing { .. }
        ));
        assert!(matches!(parse(&good[..4]), ImageError::BadCount { .. }));
        assert!(matches!(
            parse(&[good.clone(), good[4..].to_vec()].concat()),
            ImageError::BadCount { .. }
        ));
        assert!(matches!(
            parse(&image(&criu::InventoryEntry::default())),
            ImageError::BadCount { .. }
        ));
        let mut wrong = good.clone();
        wrong[0] ^= 1;
        assert!(matches!(parse(&wrong), ImageError::WrongMagic { .. }));
    }
}
