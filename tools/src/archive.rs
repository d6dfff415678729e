//! `crxfer archive`: checkpoints of containers in one file.

use crxfer::archive::{pack, unpack};

use crate::args::{ArchiveArgs, ArchiveCommand};
use crate::error::Failed;
use crate::output;
use crate::size::{Bytes, grouped};

pub(crate) fn run(args: &ArchiveArgs) -> Result<(), Failed> {
    let (place, images, bytes, others) = match &args.command {
        ArchiveCommand::Unpack(args) => {
            let limit = args.max_bytes.map(|bytes| bytes.0);
            let done = unpack(&args.file, &args.dir, limit)?;
            (&args.dir, done.images, done.image_bytes, done.others)
        }
        ArchiveCommand::Pack(args) => {
            let done = pack(&args.dir, &args.file, args.compress.into())?;
            (&args.file, done.images, done.image_bytes, done.others)
        }
    };
    output::line(&format!(
        "{}: {} images ({}), {} other members",
        place.display(),
        grouped(images),
        Bytes(bytes),
        grouped(others)
    ))
}
