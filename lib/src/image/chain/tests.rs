use std::fs;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::super::pagemap::{PageFlags, PageRun};
use super::*;

const NAME: PagemapName = PagemapName::Task(1);

fn pagemap(page_size: u64, runs: &[(u64, u64, u32)]) -> Pagemap {
    let runs = runs
        .iter()
        .map(|&(number, pages, flags)| PageRun {
            vaddr: number * page_size,
            pages,
            flags: PageFlags::from_bits(flags).unwrap(),
        })
        .collect();
    Pagemap::new("pagemap-1.img", 1, PageSize::new(page_size).unwrap(), runs).unwrap()
}

/// A directory that holds that pagemap and `size` bytes of pages.
fn write(directory: &Path, pagemap: &Pagemap, size: u64) {
    fs::create_dir(directory).unwrap();
    fs::write(directory.join(NAME.to_string()), pagemap.encode()).unwrap();
    File::create(directory.join("pages-1.img"))
        .unwrap()
        .set_len(size)
        .unwrap();
}

/// Directories `1` to `depth`, each the parent of the next; all pages are in `1`.
fn deep_chain(depth: usize) -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    for index in 1..=depth {
        let directory = place.path().join(index.to_string());
        let (flags, size) = if index == 1 { (4, 8 * 4096) } else { (1, 0) };
        write(&directory, &pagemap(4096, &[(16, 8, flags)]), size);
        if index > 1 {
            symlink(format!("../{}", index - 1), directory.join("parent")).unwrap();
        }
    }
    let newest = place.path().join(depth.to_string());
    (place, newest)
}

#[test]
fn a_chain_of_1024_directories_opens_and_its_oldest_pages_are_read() {
    let (_place, newest) = deep_chain(MAX_LEVELS);
    let chain = Chain::open(&newest, None).unwrap();
    assert_eq!(chain.levels().len(), MAX_LEVELS);
    let runs = chain.resolve(NAME).unwrap();
    assert_eq!(runs.len(), 1);
    assert_eq!(chain.completeness(), Completeness::PagesOnly);
    let mut read = 0;
    super::super::pages::PagesReader::new(&chain)
        .for_each_piece(NAME, &runs[0], |_, bytes| {
            read += bytes.len();
            Ok::<_, ImageError>(())
        })
        .unwrap();
    assert_eq!(read, 8 * 4096);
    let held = chain
        .levels
        .iter()
        .filter(|level| level.held.is_some())
        .count();
    assert!(held <= 80, "few descriptors stay open: {held}");
}

#[test]
fn a_chain_of_1025_directories_is_refused() {
    let (_place, newest) = deep_chain(MAX_LEVELS + 1);
    let error = Chain::open(&newest, None).unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::TooDeep {
                limit: MAX_LEVELS,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("crxfer flatten"), "{error}");
}

#[test]
fn a_loop_of_parents_is_refused() {
    let (place, newest) = deep_chain(3);
    symlink("../3", place.path().join("1/parent")).unwrap();
    let error = Chain::open(&newest, None).unwrap_err();
    assert!(
        matches!(error, ImageError::ParentLoop { depth: 3, .. }),
        "{error}"
    );
    fs::remove_file(newest.join("parent")).unwrap();
    symlink(".", newest.join("parent")).unwrap();
    let error = Chain::open(&newest, None).unwrap_err();
    assert!(
        matches!(error, ImageError::ParentLoop { depth: 1, .. }),
        "{error}"
    );
}

#[test]
fn a_directory_exchanged_meanwhile_is_noticed() {
    let (place, newest) = deep_chain(12);
    let chain = Chain::open(&newest, None).unwrap();
    assert!(chain.open_dir(10).is_ok());
    fs::rename(place.path().join("2"), place.path().join("old")).unwrap();
    fs::create_dir(place.path().join("2")).unwrap();
    let error = chain.open_dir(10).unwrap_err();
    assert!(matches!(error, ImageError::Changed(_)), "{error}");
}

#[test]
fn the_page_size_is_found_from_the_files() {
    for (page_size, size, found) in [
        (4096, 3 * 4096, 4096),
        (16384, 3 * 16384, 16384),
        (65536, 3 * 65536, 65536),
        // Trailing bytes: nothing tells, so the host's.
        (4096, 3 * 4096 + 5, PageSize::of_host().bytes()),
        // Exact for 8192, which no host of CRIU has.
        (4096, 3 * 8192, PageSize::of_host().bytes()),
    ] {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("1");
        write(&directory, &pagemap(page_size, &[(16, 3, 4)]), size);
        let chain = Chain::open(&directory, None).unwrap();
        assert_eq!(chain.page_size().bytes(), found);
    }
}

#[test]
fn a_given_page_size_must_fit_the_addresses() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("1");
    write(&directory, &pagemap(4096, &[(1, 3, 4)]), 3 * 4096);
    let given = PageSize::new(65536).unwrap();
    let error = Chain::open(&directory, Some(given)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("not a multiple of the page size 65536"),
        "{error}"
    );
}

#[test]
fn a_compressed_set_opens_but_its_memory_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("1");
    write(&directory, &pagemap(4096, &[]), 0);
    let mut bytes = pagemap(4096, &[]).encode();
    bytes.extend([9, 0, 0, 0, 0x08, 0x80, 0x20, 0x10, 1, 0x20, 4, 0x32, 0]);
    fs::write(directory.join(NAME.to_string()), bytes).unwrap();
    let chain = Chain::open(&directory, None).unwrap();
    for error in [
        chain.require_understood().unwrap_err(),
        chain.resolve(NAME).unwrap_err(),
        super::super::flatten(&chain, &place.path().join("out")).unwrap_err(),
    ] {
        assert!(matches!(error, ImageError::Compressed { .. }), "{error}");
        assert!(error.to_string().contains("--layout faithful"), "{error}");
    }
    assert!(matches!(chain.completeness(), Completeness::Opaque(_)));
    assert!(!place.path().join("out").exists());
}

#[test]
fn damaged_files_are_named_with_the_place() {
    let (place, newest) = deep_chain(2);
    let damage = |file: &str, bytes: &[u8]| {
        let path = place.path().join(file);
        let old = fs::read(&path).unwrap_or_default();
        fs::write(&path, bytes).unwrap();
        let error = Chain::open(&newest, None).unwrap_err().to_string();
        fs::write(&path, old).unwrap();
        assert!(error.contains(file.rsplit('/').next().unwrap()), "{error}");
        error
    };
    let good = fs::read(newest.join("pagemap-1.img")).unwrap();
    let error = damage("2/pagemap-1.img", &good[..good.len() - 1]);
    assert!(error.contains("the record at byte 14 has"), "{error}");
    let error = damage(
        "1/pagemap-1.img",
        &[good.clone(), good[14..].to_vec()].concat(),
    );
    assert!(error.contains("begins below"), "{error}");
    let error = damage("1/pagemap-1.img", &good[..5]);
    assert!(error.contains("less than the magic numbers"), "{error}");
    let error = damage("2/inventory.img", b"\x16\x31\x31\x58\x05\0\0\0\x08");
    assert!(error.contains("cut short"), "{error}");
}

#[test]
fn a_process_tree_that_cannot_be_read_is_damage() {
    let (_place, newest) = deep_chain(1);
    fs::write(newest.join("pstree.img"), b"nonsense").unwrap();
    let completeness = Chain::open(&newest, None).unwrap().completeness();
    let Completeness::Damaged(problems) = completeness else {
        panic!("{completeness:?}")
    };
    assert_eq!(problems[0].file, "pstree.img");
}

#[test]
fn a_pages_file_that_changed_since_is_not_read() {
    let (place, newest) = deep_chain(2);
    let chain = Chain::open(&newest, None).unwrap();
    assert!(chain.open_pages(1, NAME).is_ok());
    let path = place.path().join("1/pages-1.img");
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(9 * 4096)
        .unwrap();
    let error = chain.open_pages(1, NAME).unwrap_err();
    assert!(matches!(error, ImageError::Changed(found) if found == path));
}
