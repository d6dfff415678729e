//! Magic numbers and record lengths: the frame around every CRIU image.
//!
//! ```text
//! image, v1.1      19 43 56 54 │ type magic │ records
//! service image    40 59 10 55 │ type magic │ records     (stats-dump, stats-restore, irmap-cache)
//! image, v1.0                    type magic │ records     (CRIU before 1.6; every inventory.img)
//! raw image        bytes from offset 0                    (pages-*.img, tarballs; not for this module)
//!
//! record           u32 length │ length bytes of a protobuf message
//! ```
//!
//! All numbers are little-endian. The end of the file ends the records; there is no count and no
//! checksum. Some image types put raw bytes after a record; those are carried as opaque files and
//! never come here.

/// The first word of images since CRIU 1.6.
pub const COMMON_MAGIC: u32 = 0x5456_4319;
/// The first word of service images.
pub const SERVICE_MAGIC: u32 = 0x5510_5940;

/// Type magics of the images that crxfer reads.
pub mod magic {
    /// `inventory.img`
    pub const INVENTORY: u32 = 0x5831_3116;
    /// `pstree.img`
    pub const PSTREE: u32 = 0x5027_3030;
    /// `core-ID.img`
    pub const CORE: u32 = 0x5505_3847;
    /// `ids-PID.img`
    pub const IDS: u32 = 0x5443_2030;
    /// `mm-PID.img`
    pub const MM: u32 = 0x5749_2820;
    /// `pagemap-PID.img` and `pagemap-shmem-ID.img`
    pub const PAGEMAP: u32 = 0x5608_4025;
    /// `memfd.img`
    pub const MEMFD: u32 = 0x4845_3499;
    /// `stats-dump` and `stats-restore`
    pub const STATS: u32 = 0x5709_3306;
}

/// No single record of the images read here is larger: the largest is `mm-PID.img`'s, with some
/// 60 bytes for each of at most 65,530 mappings (the kernel's default limit) or a few times that.
pub const MAX_RECORD_BYTES: usize = 64 << 20;

/// The kind of frame an image begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Common magic, then the type's.
    V11,
    /// Only the type's magic: `inventory.img`, and every image of CRIU before 1.6.
    V10,
    /// Service magic, then the type's.
    Service,
}

/// A damaged frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// The file ends inside the magic numbers.
    #[error("has only {length} bytes, less than the magic numbers of an image; it is cut short")]
    NoMagic {
        /// Size of the file in bytes.
        length: usize,
    },
    /// The file ends inside a record's length field.
    #[error(
        "{extra} stray bytes at byte {offset}, after the last record; it is cut short or damaged"
    )]
    StrayBytes {
        /// Where they begin.
        offset: usize,
        /// How many there are, 1 to 3.
        extra: usize,
    },
    /// The file ends inside a record.
    #[error(
        "the record at byte {offset} has {stated} bytes, but the file ends after {available}; it is cut short or damaged"
    )]
    CutShort {
        /// Offset of the record's length field.
        offset: usize,
        /// Length that the record states.
        stated: usize,
        /// Bytes that are left.
        available: usize,
    },
    /// A record longer than [`MAX_RECORD_BYTES`].
    #[error(
        "the record at byte {offset} states {stated} bytes, more than any record has; it is damaged"
    )]
    TooLong {
        /// Offset of the record's length field.
        offset: usize,
        /// Length that the record states.
        stated: usize,
    },
}

/// One record: a protobuf message and where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Offset of the record's length field in the file.
    pub offset: usize,
    /// The message.
    pub message: &'a [u8],
}

/// The records of one image, in order. After an error the iterator ends.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    frame: Frame,
    magic: u32,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Records<'a> {
    /// Reads the magic numbers of an image.
    ///
    /// Any first word that is neither the common nor the service magic is taken for a v1.0 type
    /// magic, as CRIU does: compare [`Records::magic`] with the type you expect.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FramingError> {
        let no_magic = FramingError::NoMagic {
            length: bytes.len(),
        };
        let first = word(bytes, 0).ok_or(no_magic)?;
        let frame = match first {
            COMMON_MAGIC => Frame::V11,
            SERVICE_MAGIC => Frame::Service,
            _ => {
                return Ok(Self {
                    frame: Frame::V10,
                    magic: first,
                    bytes,
                    offset: 4,
                });
            }
        };
        let magic = word(bytes, 4).ok_or(no_magic)?;
        Ok(Self {
            frame,
            magic,
            bytes,
            offset: 8,
        })
    }

    /// The kind of frame.
    pub fn frame(&self) -> Frame {
        self.frame
    }

    /// The type's magic number.
    pub fn magic(&self) -> u32 {
        self.magic
    }

    fn read(&mut self) -> Result<Record<'a>, FramingError> {
        let offset = self.offset;
        let extra = self.bytes.len() - offset;
        let stated = word(self.bytes, offset).ok_or(FramingError::StrayBytes { offset, extra })?;
        let stated = usize::try_from(stated).unwrap_or(usize::MAX);
        if stated > MAX_RECORD_BYTES {
            return Err(FramingError::TooLong { offset, stated });
        }
        let rest = &self.bytes[offset + 4..];
        let message = rest.get(..stated).ok_or(FramingError::CutShort {
            offset,
            stated,
            available: rest.len(),
        })?;
        self.offset = offset + 4 + stated;
        Ok(Record { offset, message })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, FramingError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.bytes.len() {
            return None;
        }
        let record = self.read();
        if record.is_err() {
            self.offset = self.bytes.len();
        }
        Some(record)
    }
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*field))
}

/// Writes an image: magic numbers, then records.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An image of type `magic`, without records yet.
    pub fn new(frame: Frame, magic: u32) -> Self {
        let mut bytes = Vec::new();
        match frame {
            Frame::V11 => bytes.extend(COMMON_MAGIC.to_le_bytes()),
            Frame::Service => bytes.extend(SERVICE_MAGIC.to_le_bytes()),
            Frame::V10 => {}
        }
        bytes.extend(magic.to_le_bytes());
        Self { bytes }
    }

    /// Appends one record.
    pub fn record(&mut self, message: &impl prost::Message) {
        let length = message.encoded_len();
        let stated = u32::try_from(length).expect("messages written here are small");
        self.bytes.extend(stated.to_le_bytes());
        message
            .encode(&mut self.bytes)
            .expect("a Vec grows as needed");
    }

    /// The whole image.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(words: &[u32], tail: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(tail);
        bytes
    }

    #[test]
    fn each_frame_is_told_by_its_first_word() {
        for (words, frame, magic) in [
            (
                &[COMMON_MAGIC, magic::PAGEMAP][..],
                Frame::V11,
                magic::PAGEMAP,
            ),
            (&[SERVICE_MAGIC, magic::STATS], Frame::Service, magic::STATS),
            (&[magic::PAGEMAP], Frame::V10, magic::PAGEMAP),
            (&[magic::INVENTORY], Frame::V10, magic::INVENTORY),
        ] {
            let bytes = image(words, &[]);
            let records = Records::parse(&bytes).unwrap();
            assert_eq!((records.frame(), records.magic()), (frame, magic));
            assert_eq!(records.count(), 0);
        }
    }

    #[test]
    fn records_come_with_their_offsets_and_may_be_empty() {
        let bytes = image(&[COMMON_MAGIC, magic::PAGEMAP, 0, 2], b"ab");
        let records: Vec<_> = Records::parse(&bytes)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(
            records,
            [
                Record {
                    offset: 8,
                    message: b""
                },
                Record {
                    offset: 12,
                    message: b"ab"
                }
            ]
        );
    }

    #[test]
    fn a_file_without_room_for_magic_numbers_is_refused() {
        for length in [0, 3] {
            let error = Records::parse(&[0x19, 0x43, 0x56][..length]).unwrap_err();
            assert_eq!(error, FramingError::NoMagic { length });
        }
        let error = Records::parse(&image(&[COMMON_MAGIC], &[1, 2])).unwrap_err();
        assert_eq!(error, FramingError::NoMagic { length: 6 });
    }

    #[test]
    fn damaged_ends_are_errors_with_their_place() {
        for (tail, error) in [
            (
                &[7, 0, 0][..],
                FramingError::StrayBytes {
                    offset: 8,
                    extra: 3,
                },
            ),
            (
                &[3, 0, 0, 0, 9, 9],
                FramingError::CutShort {
                    offset: 8,
                    stated: 3,
                    available: 2,
                },
            ),
            (
                &[0, 0, 0, 0xff, 9, 9],
                FramingError::TooLong {
                    offset: 8,
                    stated: 0xff00_0000,
                },
            ),
        ] {
            let bytes = image(&[COMMON_MAGIC, magic::PAGEMAP], tail);
            let found: Vec<_> = Records::parse(&bytes).unwrap().collect();
            assert_eq!(found, [Err(error)]);
        }
    }
}
