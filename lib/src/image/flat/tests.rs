use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use super::super::flatten::flatten;
use super::*;
use crate::image::{PageFlags, PageRun};
use crate::page::PageSize;

const PAGE: usize = 4096;

fn view(directory: &Path) -> FlatView {
    FlatView::new(Chain::open(directory, None).unwrap()).unwrap()
}

fn read(view: &FlatView, name: &str) -> Option<Vec<u8>> {
    let mut file = view.open(name).unwrap()?;
    let mut bytes = Vec::new();
    while let Some(piece) = file.next_piece().unwrap() {
        match piece {
            Piece::Bytes(more) => bytes.extend(more),
            Piece::Zeros(length) => bytes.resize(bytes.len() + usize::try_from(length).unwrap(), 0),
            Piece::File {
                file,
                offset,
                length,
                ..
            } => {
                let mut more = vec![0; usize::try_from(length).unwrap()];
                file.read_exact_at(&mut more, offset).unwrap();
                bytes.extend(more);
            }
        }
    }
    Some(bytes)
}

#[test]
fn a_view_is_what_flatten_writes() {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    for set in ["memcached/1", "memcached/3", "shm-tree/2", "shm-tree/3"] {
        let view = view(&testdata.join(set));
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("flat");
        flatten(view.chain(), &out).unwrap();
        for file in fs::read_dir(&out).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            let wanted = fs::read(file.path()).unwrap();
            let found = read(&view, &name).expect("flatten wrote it");
            assert!(same_image(&name, &found, &wanted), "{set}: {name}");
        }
        for name in ["parent", "nothing.img", "pages-999.img", "pagemap-9.img"] {
            assert!(read(&view, name).is_none(), "{set}: {name}");
        }
    }
}

#[test]
fn what_needs_no_parent_is_left_to_the_byte() {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let set = testdata.join("memcached/1");
    let view = view(&set);
    for file in fs::read_dir(&set).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        assert!(
            read(&view, &name) == Some(fs::read(set.join(&name)).unwrap()),
            "{name}"
        );
    }
}

fn write(directory: &Path, runs: &[(u64, u64, u32)], pages: &[u8]) {
    let runs = runs.iter().map(|&(number, pages, flags)| PageRun {
        vaddr: number * 4096,
        pages,
        flags: PageFlags::from_bits(flags).unwrap(),
    });
    let page_size = PageSize::new(4096).unwrap();
    let pagemap = Pagemap::new("pagemap-1.img", 1, page_size, runs.collect()).unwrap();
    fs::create_dir(directory).unwrap();
    fs::write(directory.join("pagemap-1.img"), pagemap.encode()).unwrap();
    let bytes: Vec<u8> = pages.iter().flat_map(|&byte| vec![byte; PAGE]).collect();
    fs::write(directory.join("pages-1.img"), bytes).unwrap();
}

#[test]
fn pages_that_follow_one_another_in_a_file_are_one_piece() {
    let place = tempfile::tempdir().unwrap();
    write(
        &place.path().join("1"),
        &[(1, 2, 4), (5, 1, 4)],
        &[11, 12, 15],
    );
    let newest = place.path().join("2");
    // In memory apart, in the file of the parent not; then zeros, then its own.
    write(
        &newest,
        &[(1, 2, 1), (5, 1, 1), (6, 1, 0), (8, 1, 0), (9, 1, 4)],
        &[19],
    );
    symlink("../1", newest.join("parent")).unwrap();
    let view = view(&newest);
    let mut file = view.open("pages-1.img").unwrap().unwrap();
    let mut lengths = Vec::new();
    while let Some(piece) = file.next_piece().unwrap() {
        lengths.push(match piece {
            Piece::File { length, .. } | Piece::Zeros(length) => length / 4096,
            Piece::Bytes(_) => panic!("no page is made up"),
        });
    }
    assert_eq!(lengths, [3, 2, 1]);
}

#[test]
fn a_file_that_changed_since_is_not_given_out() {
    let place = tempfile::tempdir().unwrap();
    let set = place.path().join("1");
    write(&set, &[(1, 1, 4)], &[1]);
    fs::write(set.join("other.img"), b"first").unwrap();
    let view = view(&set);
    fs::write(set.join("other.img"), b"second").unwrap();
    let error = view.open("other.img").unwrap_err();
    assert!(matches!(error, ImageError::Changed(_)), "{error}");
}
