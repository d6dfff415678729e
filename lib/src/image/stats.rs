//! `stats-dump`: what a dump did. CRIU writes it only after a dump that succeeded.

use crxfer_proto::criu;

use super::error::ImageError;
use super::framing::magic;
use super::records::decode_one;

/// CRIU's own figures of one dump or pre-dump. Shared memory is counted apart (`shpages_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// Microseconds from the begin of freezing until all tasks stood still.
    pub freezing_time: u32,
    /// Microseconds that the tasks stood still. Includes the time in post-dump, wraps at 71 minutes.
    pub frozen_time: u32,
    /// Microseconds of collecting memory.
    pub memdump_time: u32,
    /// Microseconds of writing memory.
    pub memwrite_time: u32,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages left to the parent.
    pub pages_skipped_parent: u64,
    /// Pages written to this directory or sent to a page server.
    pub pages_written: u64,
    /// Pages left for lazy transfer.
    pub pages_lazy: u64,
    /// Pages of shared memory looked at.
    pub shpages_scanned: u64,
    /// Pages of shared memory left to the parent.
    pub shpages_skipped_parent: u64,
    /// Pages of shared memory written.
    pub shpages_written: u64,
}

impl DumpStats {
    /// Parses the bytes of a `stats-dump`; `name` is for the error. Fields that an older CRIU did
    /// not write are 0.
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        let entry: criu::StatsEntry = decode_one(bytes, name, magic::STATS)?;
        let dump = entry.dump.ok_or_else(|| ImageError::BadCount {
            file: name.to_owned(),
            what: "the statistics of the dump are missing",
        })?;
        Ok(Self {
            freezing_time: dump.freezing_time.unwrap_or(0),
            frozen_time: dump.frozen_time.unwrap_or(0),
            memdump_time: dump.memdump_time.unwrap_or(0),
            memwrite_time: dump.memwrite_time.unwrap_or(0),
            pages_scanned: dump.pages_scanned.unwrap_or(0),
            pages_skipped_parent: dump.pages_skipped_parent.unwrap_or(0),
            pages_written: dump.pages_written.unwrap_or(0),
            pages_lazy: dump.pages_lazy.unwrap_or(0),
            shpages_scanned: dump.shpages_scanned.unwrap_or(0),
            shpages_skipped_parent: dump.shpages_skipped_parent.unwrap_or(0),
            shpages_written: dump.shpages_written.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Service magic, type magic, one record: dump (field 1) with frozen_time 300 (field 2) and
    /// pages_written 5 (field 7).
    const STATS: &[u8] = &[
        0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57, 7, 0, 0, 0, 0x0a, 5, 0x10, 0xac, 0x02,
        0x38, 5,
    ];

    #[test]
    fn figures_come_from_their_fields() {
        let expected = DumpStats {
            frozen_time: 300,
            pages_written: 5,
            ..DumpStats::default()
        };
        assert_eq!(DumpStats::parse(STATS, "stats-dump").unwrap(), expected);
    }

    #[test]
    fn restore_statistics_are_no_dump() {
        let mut bytes = STATS.to_vec();
        bytes[12] = 0x12;
        let error = DumpStats::parse(&bytes, "stats-dump").unwrap_err();
        assert!(matches!(error, ImageError::BadCount { .. }), "{error}");
    }
}
