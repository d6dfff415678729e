//! Small image directories of one made-up process.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crxfer::image::{PageFlags, PageRun, Pagemap};
use crxfer::page::PageSize;

pub(crate) const PAGE: usize = 4096;
const FIRST: u64 = 0x7000_0000_0000;
const COMMON: u32 = 0x5456_4319;

/// A page of bytes that repeat nowhere; number 0 is the zero page.
pub(crate) fn page(number: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; PAGE];
    }
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(PAGE);
    while bytes.len() < PAGE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

pub(crate) fn pages(numbers: impl IntoIterator<Item = u64>) -> Vec<u8> {
    numbers.into_iter().flat_map(page).collect()
}

/// A full dump whose pages, side by side, have these numbers.
pub(crate) fn write_dump(dir: &Path, numbers: &[u64]) {
    let runs = [PageRun {
        vaddr: FIRST,
        pages: numbers.len() as u64,
        flags: PageFlags::PRESENT,
    }];
    write_files(dir, &pagemap(&runs), &pages(numbers.iter().copied()), 2);
}

/// A dump of which pages `None` are in the parent, with the link text `parent`.
pub(crate) fn write_child(dir: &Path, numbers: &[Option<u64>], parent: &str) {
    let run = |(index, number): (usize, &Option<u64>)| PageRun {
        vaddr: FIRST + (index * PAGE) as u64,
        pages: 1,
        flags: match number {
            Some(_) => PageFlags::PRESENT,
            None => PageFlags::PARENT,
        },
    };
    let runs: Vec<_> = numbers.iter().enumerate().map(run).collect();
    let own = pages(numbers.iter().flatten().copied());
    write_files(dir, &pagemap(&runs), &own, 2);
    symlink(parent, dir.join("parent")).unwrap();
}

pub(crate) fn write_files(dir: &Path, pagemap: &[u8], pages: &[u8], img_version: u8) {
    fs::create_dir_all(dir).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
    write(
        "inventory.img",
        &image(&[0x5831_3116], &[&[8, img_version]]),
    );
    write(
        "pstree.img",
        &image(
            &[COMMON, 0x5027_3030],
            &[&[8, 4, 16, 0, 24, 4, 32, 4, 40, 4]],
        ),
    );
    write("core-4.img", &image(&[COMMON, 0x5505_3847], &[&[8, 1]]));
    write(
        "mm-4.img",
        &image(&[COMMON, 0x5749_2820], &[&[8, 0, 16, 0]]),
    );
    write("pagemap-4.img", pagemap);
    write("pages-1.img", pages);
}

fn pagemap(runs: &[PageRun]) -> Vec<u8> {
    let size = PageSize::new(PAGE as u64).unwrap();
    Pagemap::new("pagemap-4.img", 1, size, runs.to_vec())
        .unwrap()
        .encode()
}

/// Magic numbers, then records.
pub(crate) fn image(magics: &[u32], records: &[&[u8]]) -> Vec<u8> {
    let mut bytes: Vec<u8> = magics
        .iter()
        .flat_map(|magic| magic.to_le_bytes())
        .collect();
    for record in records {
        bytes.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
        bytes.extend(*record);
    }
    bytes
}

/// A pagemap with these entries (address, pages, flags), whatever they say.
pub(crate) fn raw_pagemap(entries: &[(u64, u64, u64)]) -> Vec<u8> {
    let mut records = vec![vec![8, 1]];
    for &(vaddr, count, flags) in entries {
        let mut record = Vec::new();
        for (key, value) in [
            (8, vaddr),
            (16, count & 0xffff_ffff),
            (32, flags),
            (40, count),
        ] {
            record.push(key);
            varint(&mut record, value);
        }
        records.push(record);
    }
    let records: Vec<_> = records.iter().map(Vec::as_slice).collect();
    image(&[COMMON, 0x5608_4025], &records)
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

pub(crate) fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(path)
}

/// A copy of a directory of images, links as links, modes kept.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_symlink() {
            symlink(fs::read_link(entry.path()).unwrap(), target).unwrap();
        } else {
            fs::copy(entry.path(), &target).unwrap();
            let mode = entry.metadata().unwrap().permissions().mode();
            fs::set_permissions(target, fs::Permissions::from_mode(mode)).unwrap();
        }
    }
}

/// The three directories of a chain of real images, copied to `place/1`, `2` and `3`. The page
/// server's pages and the client's other images are put together, as for a restore.
pub(crate) fn real_chain(chain: &str, place: &Path) {
    for round in ["1", "2", "3"] {
        if chain == "memcached-pageserver" {
            copy_dir(
                &testdata(&format!("{chain}/server/{round}")),
                &place.join(round),
            );
            let _ = fs::remove_file(place.join(round).join("parent"));
            copy_dir(
                &testdata(&format!("{chain}/client/{round}")),
                &place.join(round),
            );
        } else {
            copy_dir(&testdata(&format!("{chain}/{round}")), &place.join(round));
        }
    }
}
