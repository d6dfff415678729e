use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use tempfile::TempDir;

use super::super::chain::ChainOptions;
use super::super::dir::ParentLinks;
use super::*;
use crate::page::PageSize;

const NAME: PagemapName = PagemapName::Task(1);
const PAGE: usize = 4096;

/// Writes a directory with a pagemap of (page number, pages, flags) and these pages, each filled
/// with one byte.
fn write(directory: &Path, runs: &[(u64, u64, u32)], pages: &[u8]) {
    let runs = runs
        .iter()
        .map(|&(number, pages, flags)| PageRun {
            vaddr: number * 4096,
            pages,
            flags: PageFlags::from_bits(flags).unwrap(),
        })
        .collect();
    let page_size = PageSize::new(4096).unwrap();
    let pagemap = Pagemap::new("pagemap-1.img", 1, page_size, runs).unwrap();
    fs::create_dir(directory).unwrap();
    fs::write(directory.join("pagemap-1.img"), pagemap.encode()).unwrap();
    let bytes: Vec<u8> = pages.iter().flat_map(|&byte| vec![byte; PAGE]).collect();
    fs::write(directory.join("pages-1.img"), bytes).unwrap();
}

/// A chain of two: pages 1 and 2 from the parent, 3 (lazy) and 4 (zeros) present, 5 absent in `2`.
fn chain() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let newest = place.path().join("2");
    write(
        &place.path().join("1"),
        &[(1, 2, 6), (5, 1, 4)],
        &[11, 12, 15],
    );
    write(
        &newest,
        &[(1, 2, 1), (3, 1, 6), (4, 1, 4), (9, 1, 0)],
        &[13, 0],
    );
    symlink("../1", newest.join("parent")).unwrap();
    (place, newest)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn pages_of_all_levels_end_in_one_directory() {
    let (place, newest) = chain();
    let out = place.path().join("out");
    let flattened = flatten(&Chain::open(&newest, None).unwrap(), &out).unwrap();
    assert_eq!(
        flattened,
        Flattened {
            pages: 5,
            zero_pages: 2,
            files: 2
        }
    );
    assert_eq!(names(&out), ["pagemap-1.img", "pages-1.img"]);
    let flat = Chain::open(&out, None).unwrap();
    let runs: Vec<_> = flat.newest().pagemaps()[&NAME]
        .runs()
        .iter()
        .map(|run| (run.vaddr / 4096, run.pages, run.flags.bits()))
        .collect();
    assert_eq!(runs, [(1, 2, 4), (3, 1, 6), (4, 1, 4), (9, 1, 4)]);
    let bytes = fs::read(out.join("pages-1.img")).unwrap();
    let firsts: Vec<_> = bytes.chunks(PAGE).map(|page| page[0]).collect();
    assert_eq!(firsts, [11, 12, 13, 0, 0]);
    let mode = fs::metadata(&out).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o700, "process memory is its owner's only");
}

#[test]
fn an_existing_output_is_left_alone() {
    let (place, newest) = chain();
    let out = place.path().join("out");
    fs::create_dir(&out).unwrap();
    let chain = Chain::open(&newest, None).unwrap();
    assert!(matches!(
        flatten(&chain, &out),
        Err(ImageError::OutputExists(_))
    ));
    assert_eq!(names(place.path()), ["1", "2", "out"]);
    assert!(names(&out).is_empty());
    assert!(matches!(
        flatten(&chain, Path::new("/")),
        Err(ImageError::BadOutput(_))
    ));
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let (place, newest) = chain();
    let pages = place.path().join("1/pages-1.img");
    File::options()
        .write(true)
        .open(pages)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let chain = Chain::open(&newest, None).unwrap();
    let error = flatten(&chain, &place.path().join("out")).unwrap_err();
    assert!(
        matches!(error, ImageError::ShortPages { size: 4096, .. }),
        "{error}"
    );
    assert_eq!(names(place.path()), ["1", "2"]);
}

#[test]
fn pages_left_at_the_source_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let newest = place.path().join("1");
    write(&newest, &[(1, 1, 4), (2, 3, 2)], &[1]);
    let chain = Chain::open(&newest, None).unwrap();
    let error = flatten(&chain, &place.path().join("out")).unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::LazyPages {
                vaddr: 0x2000,
                pages: 3,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn an_absolute_parent_is_followed_on_request() {
    let (place, newest) = chain();
    fs::remove_file(newest.join("parent")).unwrap();
    symlink(place.path().join("1"), newest.join("parent")).unwrap();
    let error = Chain::open(&newest, None).unwrap_err();
    assert!(
        matches!(error, ImageError::AbsoluteParent { .. }),
        "{error}"
    );
    let options = ChainOptions {
        parent_links: ParentLinks::Any,
        ..ChainOptions::default()
    };
    let chain = Chain::open_with(&newest, options).unwrap();
    flatten(&chain, &place.path().join("out")).unwrap();
    assert_eq!(
        names(&place.path().join("out")),
        ["pagemap-1.img", "pages-1.img"]
    );
}

#[test]
fn other_files_are_copied_with_their_holes_and_modes() {
    let (place, newest) = chain();
    let path = newest.join("ghost-file-1.img");
    let file = File::create(&path).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(b"middle", 1 << 20).unwrap();
    file.set_len(4 << 20).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    fs::write(newest.join("empty.img"), b"").unwrap();
    fs::write(newest.join("pages-77.img"), b"no pagemap names this").unwrap();
    let out = place.path().join("out");
    flatten(&Chain::open(&newest, None).unwrap(), &out).unwrap();
    for name in ["ghost-file-1.img", "empty.img", "pages-77.img"] {
        assert_eq!(
            fs::read(out.join(name)).unwrap(),
            fs::read(newest.join(name)).unwrap()
        );
    }
    let (old, new) = (
        fs::metadata(&path).unwrap(),
        fs::metadata(out.join("ghost-file-1.img")).unwrap(),
    );
    assert_eq!(new.permissions().mode(), old.permissions().mode());
    assert!(
        new.blocks() <= old.blocks(),
        "{} > {}",
        new.blocks(),
        old.blocks()
    );
}

#[test]
fn pagemaps_that_share_a_pages_file_get_one_each() {
    let (place, newest) = chain();
    fs::copy(
        place.path().join("1/pagemap-1.img"),
        newest.join("pagemap-2.img"),
    )
    .unwrap();
    fs::copy(
        place.path().join("1/pages-1.img"),
        newest.join("pages-1.img"),
    )
    .unwrap();
    let out = place.path().join("out");
    flatten(&Chain::open(&newest, None).unwrap(), &out).unwrap();
    assert_eq!(
        names(&out),
        [
            "pagemap-1.img",
            "pagemap-2.img",
            "pages-1.img",
            "pages-2.img"
        ]
    );
}
