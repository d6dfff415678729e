//! `crxfer archive`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use crxfer::archive::Compression;

use crate::size::Bytes;

/// Take in and give out checkpoints of containers as podman and CRI-O export them
///
/// An archive becomes an image directory, which is sent, listed and verified as any other: pages that
/// the destination holds already do not cross the wire. There it becomes an archive again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer archive unpack web-1.tar.zst web-1 && crxfer send web-1 --to crxfer1-…
  crxfer archive pack /var/lib/images/web-1 web-1.tar.zst")]
pub(crate) struct ArchiveArgs {
    #[command(subcommand)]
    pub(crate) command: ArchiveCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ArchiveCommand {
    Unpack(UnpackArgs),
    Pack(PackArgs),
}

/// Make an image directory of an archive
///
/// What is not CRIU's stands in DIR/archive-rest.tar. DIR appears complete or not at all. Members that
/// lead out of the archive, links and devices are refused.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  podman container checkpoint --export web-1.tar.zst web-1
  crxfer archive unpack web-1.tar.zst web-1")]
pub(crate) struct UnpackArgs {
    /// The archive: zstd, gzip, or not compressed
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,

    /// The directory to make; must not exist
    #[arg(value_name = "DIR", value_hint = ValueHint::AnyPath)]
    pub(crate) dir: PathBuf,

    /// Refuse what unpacks to more than this (K, M, G, T) [default: what there is room for]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_bytes: Option<Bytes>,
}

/// Make an archive of an image directory that came from one
///
/// In any layout: parents are followed. FILE appears complete or not at all.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer archive pack /var/lib/images/web-1 web-1.tar.zst
  podman container restore --import web-1.tar.zst")]
pub(crate) struct PackArgs {
    /// The image directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// The archive to make; must not exist
    #[arg(value_name = "FILE", value_hint = ValueHint::AnyPath)]
    pub(crate) file: PathBuf,

    /// How it is compressed
    #[arg(long, value_enum, default_value_t = CompressArg::Zstd)]
    pub(crate) compress: CompressArg,
}

/// `--compress`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum CompressArg {
    /// podman's own default
    Zstd,
    /// For older readers
    Gzip,
    /// Not at all
    None,
}

impl From<CompressArg> for Compression {
    fn from(compress: CompressArg) -> Self {
        match compress {
            CompressArg::Zstd => Self::Zstd,
            CompressArg::Gzip => Self::Gzip,
            CompressArg::None => Self::None,
        }
    }
}
