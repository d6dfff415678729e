//! Decoding images of which all records have one type.

use prost::Message;

use super::error::ImageError;
use super::framing::{Record, Records};

/// The records of an image that must be of type `magic`, with the file named in errors.
pub(crate) fn records_of<'a>(
    bytes: &'a [u8],
    file: &'a str,
    magic: u32,
) -> Result<impl Iterator<Item = Result<Record<'a>, ImageError>>, ImageError> {
    let framing = |error| ImageError::Framing {
        file: file.to_owned(),
        error,
    };
    let records = Records::parse(bytes).map_err(framing)?;
    if records.magic() != magic {
        return Err(ImageError::WrongMagic {
            file: file.to_owned(),
            expected: magic,
            found: records.magic(),
        });
    }
    Ok(records.map(move |record| record.map_err(framing)))
}

/// All records of an image, decoded.
pub(crate) fn decode_all<M: Message + Default>(
    bytes: &[u8],
    file: &str,
    magic: u32,
) -> Result<Vec<M>, ImageError> {
    records_of(bytes, file, magic)?
        .map(|record| {
            let record = record?;
            M::decode(record.message).map_err(|error| ImageError::BadRecord {
                file: file.to_owned(),
                offset: record.offset,
                what: error.to_string(),
            })
        })
        .collect()
}

/// The one record of an image that has exactly one.
pub(crate) fn decode_one<M: Message + Default>(
    bytes: &[u8],
    file: &str,
    magic: u32,
) -> Result<M, ImageError> {
    let mut records = decode_all(bytes, file, magic)?;
    let bad = |what| ImageError::BadCount {
        file: file.to_owned(),
        what,
    };
    let record = records
        .pop()
        .ok_or_else(|| bad("holds no record where one is due"))?;
    if !records.is_empty() {
        return Err(bad("holds several records where one is due"));
    }
    Ok(record)
}
