use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::*;
use crate::image::{Chain, Completeness, flatten};

fn header(path: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    // As it is: `set_path` refuses what these tests are about.
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o600);
    header.set_cksum();
    header
}

struct Made {
    place: TempDir,
    tar: Builder<Vec<u8>>,
}

impl Made {
    fn new() -> Self {
        Self {
            place: tempfile::tempdir().unwrap(),
            tar: Builder::new(Vec::new()),
        }
    }

    fn add(&mut self, path: &str, content: &[u8]) -> &mut Self {
        let header = header(path, EntryType::Regular, content.len() as u64);
        self.tar.append(&header, content).unwrap();
        self
    }

    fn special(&mut self, path: &str, kind: EntryType) -> &mut Self {
        let header = header(path, kind, 0);
        self.tar.append(&header, &[][..]).unwrap();
        self
    }

    fn bytes(self) -> (TempDir, Vec<u8>) {
        (self.place, self.tar.into_inner().unwrap())
    }

    fn unpack(self) -> Result<Unpacked, ArchiveError> {
        let (place, bytes) = self.bytes();
        unpack_bytes(&place, &bytes, None)
    }
}

/// Unpacks, and checks that nothing stays where it fails.
fn unpack_bytes(
    place: &TempDir,
    bytes: &[u8],
    limit: Option<u64>,
) -> Result<Unpacked, ArchiveError> {
    let (file, out) = (place.path().join("archive"), place.path().join("out"));
    fs::write(&file, bytes).unwrap();
    let unpacked = unpack(&file, &out, limit);
    if unpacked.is_err() {
        let left: Vec<_> = fs::read_dir(place.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
    unpacked
}

/// A container's checkpoint with CRIU's images of a fixture.
fn container() -> (Made, PathBuf) {
    let mut made = Made::new();
    let images = made.place.path().join("images");
    let chain = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/shm-tree/3");
    flatten(&Chain::open(chain, None).unwrap(), &images).unwrap();
    made.special("checkpoint/", EntryType::Directory);
    for file in fs::read_dir(&images).unwrap() {
        let file = file.unwrap();
        let name = format!("checkpoint/{}", file.file_name().to_str().unwrap());
        made.add(&name, &fs::read(file.path()).unwrap());
    }
    made.add("config.dump", b"{\"id\":1}");
    // Longer than a plain header's field.
    let long = format!("volumes/{}.tar", "v".repeat(150));
    let mut wide = Header::new_gnu();
    wide.set_size(700);
    wide.set_mode(0o640);
    made.tar
        .append_data(&mut wide, &long, &[9; 700][..])
        .unwrap();
    (made, images)
}

#[test]
fn an_archive_becomes_a_set_and_an_archive_again() {
    let (made, images) = container();
    let (place, bytes) = made.bytes();
    let archive = place.path().join("a.tar");
    fs::write(&archive, &bytes).unwrap();
    let out = place.path().join("out");
    let unpacked = unpack(&archive, &out, None).unwrap();
    let count = fs::read_dir(&images).unwrap().count() as u64;
    assert_eq!((unpacked.images, unpacked.others), (count, 3));
    for file in fs::read_dir(&images).unwrap() {
        let name = file.unwrap().file_name();
        let same = fs::read(images.join(&name)).unwrap() == fs::read(out.join(&name)).unwrap();
        assert!(same, "{name:?}");
    }
    let chain = Chain::open(&out, None).unwrap();
    assert_eq!(chain.completeness(), Completeness::Complete);

    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let packed = place.path().join(format!("{compression:?}"));
        let report = pack(&out, &packed, compression).unwrap();
        assert_eq!(
            (report.images, report.image_bytes),
            (count, unpacked.image_bytes)
        );
        let again = place.path().join(format!("{compression:?}-out"));
        assert_eq!(unpack(&packed, &again, None).unwrap(), unpacked);
        for file in fs::read_dir(&out).unwrap() {
            let name = file.unwrap().file_name();
            assert!(fs::read(out.join(&name)).unwrap() == fs::read(again.join(&name)).unwrap());
        }
    }
    // What another reader makes of it.
    let mut names: Vec<_> = tar::Archive::new(&*fs::read(place.path().join("None")).unwrap())
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    names.retain(|name| !name.starts_with("checkpoint/p"));
    assert!(
        names.contains(&format!("volumes/{}.tar", "v".repeat(150))),
        "{names:?}"
    );
    assert!(names.contains(&"config.dump".to_owned()));
}

#[test]
fn a_set_with_a_parent_is_packed_with_all_its_pages() {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/shm-tree");
    let place = tempfile::tempdir().unwrap();
    for level in ["1", "2", "3"] {
        fs::create_dir(place.path().join(level)).unwrap();
        for file in fs::read_dir(testdata.join(level)).unwrap().flatten() {
            let to = place.path().join(level).join(file.file_name());
            match fs::read_link(file.path()) {
                Ok(link) => symlink(link, to).unwrap(),
                Err(_) => drop(fs::copy(file.path(), to).unwrap()),
            }
        }
    }
    let set = place.path().join("3");
    let archive = place.path().join("a.tar");
    let error = pack(&set, &archive, Compression::None).unwrap_err();
    assert!(matches!(error, ArchiveError::NoRest(_)), "{error}");
    fs::write(set.join(REST), [0; 1024]).unwrap();
    pack(&set, &archive, Compression::None).unwrap();
    let out = place.path().join("out");
    unpack(&archive, &out, None).unwrap();
    assert!(!out.join("parent").exists());
    let chain = Chain::open(&out, None).unwrap();
    assert_eq!(chain.completeness(), Completeness::Complete);
    assert!(matches!(
        pack(&set, &archive, Compression::None),
        Err(ArchiveError::Exists(_))
    ));
}

#[test]
fn hostile_members_are_refused_and_nothing_of_them_stays() {
    let members = [
        ("leads out", "../evil", EntryType::Regular),
        ("leads out", "/etc/passwd", EntryType::Regular),
        ("leads out", "checkpoint/../../x", EntryType::Regular),
        ("neither", "checkpoint/l", EntryType::Symlink),
        ("neither", "checkpoint/h", EntryType::Link),
        ("neither", "d", EntryType::Char),
        ("neither", "f", EntryType::Fifo),
        ("comes twice", "checkpoint/core-1.img", EntryType::Regular),
        (
            "no image has",
            "checkpoint/archive-rest.tar",
            EntryType::Regular,
        ),
        ("no image has", "checkpoint/parent", EntryType::Regular),
        (
            "second directory",
            "pre-checkpoint/a.img",
            EntryType::Regular,
        ),
    ];
    for (what, path, kind) in members {
        let mut made = Made::new();
        made.add("checkpoint/core-1.img", b"x").special(path, kind);
        let error = made.unpack().unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
    let error = Made::new().unpack().unwrap_err();
    assert!(matches!(error, ArchiveError::NoImages(_)), "{error}");
}

#[test]
fn bombs_end_at_the_limit() {
    let (place, mut bytes) = Made::new().bytes();
    bytes.clear();
    let mut zeros = zstd::stream::write::Encoder::new(&mut bytes, 3).unwrap();
    let big = header("checkpoint/pages-1.img", EntryType::Regular, 1 << 30);
    zeros.write_all(big.as_bytes()).unwrap();
    for _ in 0..64 {
        zeros.write_all(&[0; 1 << 20]).unwrap();
    }
    zeros.finish().unwrap();
    assert!(bytes.len() < 1 << 20);
    let error = unpack_bytes(&place, &bytes, Some(16 << 20)).unwrap_err();
    assert!(matches!(error, ArchiveError::TooLarge { .. }), "{error}");
    // A name as long as an archive.
    let long = header("././@LongLink", EntryType::GNULongName, 8 << 30);
    let error = unpack_bytes(&place, long.as_bytes(), None).unwrap_err();
    assert!(error.to_string().contains("extended header"), "{error}");
}

#[test]
fn an_archive_that_is_cut_anywhere_is_damaged() {
    let mut made = Made::new();
    made.add("checkpoint/core-1.img", &[7; 900])
        .add("spec.dump", b"s");
    let (place, bytes) = made.bytes();
    let end = bytes.len() - 1024;
    for cut in (0..end).step_by(97).chain([end]) {
        let error = unpack_bytes(&place, &bytes[..cut], None).unwrap_err();
        assert!(
            matches!(error, ArchiveError::Damaged { .. }),
            "{cut}: {error}"
        );
    }
    let mut flipped = bytes.clone();
    flipped[3] ^= 1;
    let error = unpack_bytes(&place, &flipped, None).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
}
