//! Writes an image directory of made-up pages, or changes one, for benches and trials by hand.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use crxfer_bench::image::{ImageSpec, change_image, write_image};
use crxfer_bench::pages::Kind;

/// Write a CRIU image directory of one made-up process, or change pages of one.
///
/// The same arguments give the same bytes. `make_image d --mib 1024` makes 1 GiB of random pages;
/// `make_image d --change 1 --seed 2` then overwrites one page in a hundred.
#[derive(Debug, Parser)]
struct Arguments {
    /// Directory: new or empty to write, made by this program to change.
    dir: PathBuf,
    /// Size of the pages file in MiB.
    #[arg(long, default_value_t = 64, conflicts_with = "change", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    mib: u64,
    /// Content of the pages.
    #[arg(long, value_enum, default_value_t = Content::Random)]
    kind: Content,
    /// Bytes of a page.
    #[arg(long, default_value_t = 4096, value_parser = page_size)]
    page_size: usize,
    /// Seed of content and choice of pages.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Overwrite this percentage of the pages of an existing directory.
    #[arg(long, value_name = "PERCENT")]
    change: Option<f64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Content {
    Random,
    Text,
    Zero,
    MostlyZero,
    Mixed,
}

impl From<Content> for Kind {
    fn from(content: Content) -> Self {
        match content {
            Content::Random => Self::Random,
            Content::Text => Self::Text,
            Content::Zero => Self::Zero,
            Content::MostlyZero => Self::MostlyZero,
            Content::Mixed => Self::Mixed,
        }
    }
}

fn page_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(4096) => Ok(4096),
        Ok(16384) => Ok(16384),
        Ok(65536) => Ok(65536),
        _ => Err("page sizes are 4096, 16384 and 65536".into()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(done) => {
            println!("{done}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("make_image: {}: {error}", arguments.dir.display());
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> std::io::Result<String> {
    let Arguments {
        dir,
        page_size,
        seed,
        ..
    } = arguments;
    let kind = arguments.kind.into();
    if let Some(percent) = arguments.change {
        let changed = change_image(dir, *page_size, kind, percent, *seed)?;
        return Ok(format!("changed {changed} pages of {}", dir.display()));
    }
    let pages = (arguments.mib << 20) / *page_size as u64;
    let spec = ImageSpec {
        pages,
        page_len: *page_size,
        kind,
        seed: *seed,
    };
    write_image(dir, &spec)?;
    Ok(format!("wrote {pages} pages to {}", dir.display()))
}
