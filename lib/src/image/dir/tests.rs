use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use tempfile::TempDir;

use super::*;

fn image() -> (TempDir, ImageDir) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("2");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("pages-1.img"), b"content").unwrap();
    fs::write(path.join("inventory.img"), b"").unwrap();
    let directory = ImageDir::open(&path).unwrap();
    (place, directory)
}

#[test]
fn files_are_listed_by_name_with_their_status() {
    let (_place, directory) = image();
    let path = directory.path().join("pages-1.img");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("../1", directory.path().join("parent")).unwrap();
    let listing = directory.list().unwrap();
    let names: Vec<_> = listing
        .files
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    assert_eq!(names, ["inventory.img", "pages-1.img"]);
    assert_eq!(
        listing.parent,
        Some(ParentLink {
            text: "../1".to_owned()
        })
    );
    let pages = listing.file("pages-1.img").unwrap();
    assert_eq!(
        (pages.kind, pages.stat.size, pages.stat.mode),
        (FileKind::Pages(1), 7, 0o640)
    );
    assert_eq!(
        pages.stat,
        FileStat::of(File::open(&path).unwrap()).unwrap()
    );
    assert!(listing.file("pages-2.img").is_none());
}

#[test]
fn what_is_no_regular_file_is_refused_by_name() {
    let (_place, directory) = image();
    let path = directory.path().join("odd.img");
    symlink("pages-1.img", &path).unwrap();
    assert!(matches!(directory.list(), Err(ImageError::Symlink(found)) if found == path));
    assert!(matches!(
        directory.open_file("odd.img"),
        Err(ImageError::Symlink(_))
    ));
    fs::remove_file(&path).unwrap();

    fs::create_dir(&path).unwrap();
    assert!(matches!(directory.list(), Err(ImageError::SubDirectory(found)) if found == path));
    assert!(matches!(
        directory.open_file("odd.img"),
        Err(ImageError::SubDirectory(_))
    ));
    fs::remove_dir(&path).unwrap();

    let socket = UnixListener::bind(&path).unwrap();
    assert!(matches!(
        directory.list(),
        Err(ImageError::Special { kind: "socket", .. })
    ));
    drop(socket);
    fs::remove_file(&path).unwrap();

    rustix::fs::mknodat(
        &directory,
        "odd.img",
        FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(matches!(
        directory.list(),
        Err(ImageError::Special { kind: "fifo", .. })
    ));
    assert!(matches!(
        directory.open_file("odd.img"),
        Err(ImageError::Special { kind: "fifo", .. })
    ));
    assert!(
        directory.list_memory().is_ok(),
        "an ancestor may hold what CRIU does not look at"
    );
}

#[test]
fn names_that_no_terminal_shows_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let (_place, directory) = image();
    for (name, what) in [
        (&b"bad\n.img"[..], "control characters"),
        (b"bad\xff.img", "bytes that are not UTF-8"),
    ] {
        let path = directory.path().join(std::ffi::OsStr::from_bytes(name));
        fs::write(&path, b"").unwrap();
        let error = directory.list().unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("bad\\"), "{error}");
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn names_never_lead_out_of_the_directory() {
    let (place, directory) = image();
    fs::write(place.path().join("secret"), b"x").unwrap();
    for name in [
        "../secret",
        "..",
        ".",
        "",
        "/etc/hostname",
        "sub/../pages-1.img",
    ] {
        assert!(
            matches!(directory.open_file(name), Err(ImageError::Io { .. })),
            "{name}"
        );
    }
    assert!(matches!(
        directory.open_file("none"),
        Err(ImageError::NoFile(_))
    ));
}

#[test]
fn small_files_are_read_up_to_their_limit() {
    let (_place, directory) = image();
    assert_eq!(directory.read_small("pages-1.img", 7).unwrap(), b"content");
    let error = directory.read_small("pages-1.img", 6).unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::TooLarge {
                size: 7,
                limit: 6,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(directory.read_optional("none", 6).unwrap(), None);
}

#[test]
fn the_directory_itself_may_be_missing_or_a_file() {
    let (place, directory) = image();
    let open = |path| ImageDir::open(path).unwrap_err();
    assert!(matches!(
        open(place.path().join("none")),
        ImageError::NoDirectory(_)
    ));
    assert!(matches!(
        open(directory.path().join("pages-1.img")),
        ImageError::NotADirectory(_)
    ));
}

#[test]
fn a_relative_parent_is_followed_out_of_the_directory() {
    let (place, directory) = image();
    assert!(
        directory
            .open_parent(ParentLinks::Relative)
            .unwrap()
            .is_none()
    );
    fs::create_dir(place.path().join("1")).unwrap();
    symlink("../1", directory.path().join("parent")).unwrap();
    let parent = directory
        .open_parent(ParentLinks::Relative)
        .unwrap()
        .unwrap();
    assert_eq!(parent.path(), place.path().join("1"));
    assert_eq!(
        parent.id(),
        ImageDir::open(place.path().join("1")).unwrap().id()
    );
}

#[test]
fn every_bad_parent_has_its_own_error() {
    let (place, directory) = image();
    let link = directory.path().join("parent");
    let error = || directory.open_parent(ParentLinks::Relative).unwrap_err();
    let set = |target: &str| {
        let _ = fs::remove_file(&link);
        symlink(target, &link).unwrap();
    };
    set("../none");
    assert!(matches!(error(), ImageError::DanglingParent { target, .. } if target == "../none"));
    set(place.path().to_str().unwrap());
    assert!(error().to_string().contains("crxfer flatten"));
    assert!(directory.open_parent(ParentLinks::Any).unwrap().is_some());
    set("pages-1.img");
    assert!(matches!(
        error(),
        ImageError::BadParent {
            found: "a link to something else",
            ..
        }
    ));
    set("parent");
    assert!(matches!(error(), ImageError::BadParent { .. }));
    fs::remove_file(&link).unwrap();
    fs::create_dir(&link).unwrap();
    assert!(matches!(
        error(),
        ImageError::BadParent {
            found: "a file or directory itself",
            ..
        }
    ));
    assert!(matches!(
        directory.list(),
        Err(ImageError::BadParent { .. })
    ));
}
