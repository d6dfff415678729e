use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};

use super::*;

/// What every sink promises. `limited` to a few MiB where it can be.
fn keeps_the_contract(sink: &dyn Sink, limited: bool) {
    let stage = sink.path().join("stage");
    fs::create_dir(&stage).expect("a directory can be made");
    for number in 1..=2 {
        let set = stage.join(number.to_string());
        fs::create_dir(&set).expect("made");
        fs::write(set.join("pages-1.img"), vec![number; 8192]).expect("written");
        sink.sync_directory(&set).expect("synced");
    }
    std::os::unix::fs::symlink("../1", stage.join("2/parent")).expect("a link");
    // Published in one step, and not over something.
    for name in ["1", "2"] {
        let (from, to) = (stage.join(name), sink.path().join(name));
        rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE).expect("published");
    }
    fs::create_dir(stage.join("2")).expect("made");
    let (from, to) = (stage.join("2"), sink.path().join("2"));
    let again = rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE);
    assert_eq!(again, Err(rustix::io::Errno::EXIST));
    rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::EXCHANGE).expect("exchanged");
    rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::EXCHANGE).expect("and back");
    let parents = fs::read(sink.path().join("2/parent/pages-1.img")).expect("through the link");
    assert_eq!(parents, [1; 8192]);
    assert_eq!(
        real_path(&to).expect("there"),
        real_path(sink.path()).expect("there").join("2")
    );
    // Another process finds it, as CRIU does.
    let seen = std::process::Command::new("cmp")
        .arg(sink.path().join("1/pages-1.img"))
        .arg(sink.path().join("2/parent/pages-1.img"))
        .status();
    assert!(seen.expect("cmp").success());
    holes_give_room_back(sink);
    if limited {
        full_is_said_as_of_a_disk(sink);
    }
    fs::remove_dir_all(sink.path().join("2")).expect("removed");
}

fn holes_give_room_back(sink: &dyn Sink) {
    let path = sink.path().join("1/pages-2.img");
    let mut file = File::create(&path).expect("made");
    file.write_all(&[7; 1 << 20]).expect("written");
    file.sync_all().expect("synced");
    let before = sink.room().expect("known");
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 0, 1 << 20).expect("punched");
    assert!(sink.kind() == SinkKind::Disk || sink.room().expect("known") > before);
    assert_eq!(fs::read(&path).expect("there"), vec![0; 1 << 20]);
}

fn full_is_said_as_of_a_disk(sink: &dyn Sink) {
    use crate::store::Tried as _;
    let path = sink.path().join("1/pages-3.img");
    let room = usize::try_from(sink.room().expect("known")).expect("a few MiB");
    let written = fs::write(&path, vec![1; room + 4096]).tried("write", &path);
    let error = written.expect_err("it is full");
    assert!(error.is_out_of_space(), "{error}");
    assert!(error.to_string().contains("no space left"), "{error}");
    fs::remove_file(&path).expect("and can be emptied");
    assert!(sink.room().expect("known") > 0);
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("not tried: a file system in memory needs root");
    }
    root
}

#[test]
fn disk_keeps_the_contract() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    let disk = Disk::open(&directory.path().join("sink")).expect("opened");
    assert_eq!(
        (disk.kind(), disk.descriptor().is_some()),
        (SinkKind::Disk, false)
    );
    keeps_the_contract(&disk, false);
    let again = Disk::open(disk.path()).expect("opened again");
    assert!(again.path().join("1").is_dir(), "what is there stays");
}

#[test]
fn tmpfs_keeps_the_contract_and_is_no_disk() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let tmpfs = Tmpfs::open(&directory.path().join("sink")).expect("opened");
    assert!(!tmpfs.is_durable());
    keeps_the_contract(&tmpfs, false);
    let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    if crate::sys::is_durable(disk.path()).expect("known") {
        let wrong = disk.path().join("sink");
        assert!(matches!(Tmpfs::open(&wrong), Err(SinkError::NotTmpfs(path)) if path == wrong));
        assert!(!wrong.exists());
    }
}

#[test]
fn memory_keeps_the_contract_and_is_gone_afterwards() {
    if !is_root() {
        return;
    }
    let memory = Memory::create(4 << 20).expect("made");
    assert!(memory.room().expect("known") <= 4 << 20);
    keeps_the_contract(&memory, true);
    assert!(!crate::sys::is_durable(memory.path()).expect("known"));
    let path = memory.path().to_owned();
    drop(memory);
    assert!(!path.join("1").exists());
}

#[test]
fn memory_is_in_no_mount_table_and_lives_by_any_descriptor() {
    if !is_root() {
        return;
    }
    let memory = Memory::create(1 << 20).expect("made");
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("readable");
    let before = mounts();
    fs::write(memory.path().join("secret-of-the-sink"), "x").expect("written");
    assert_eq!(mounts(), before);
    let other: OwnedFd = memory
        .descriptor()
        .expect("it has one")
        .try_clone_to_owned()
        .expect("one more");
    drop(memory);
    let path = Holder::here(other.as_raw_fd())
        .expect("this process")
        .path();
    assert!(path.join("secret-of-the-sink").exists());
    // What a child would inherit would keep it alive.
    let flags = rustix::io::fcntl_getfd(&other).expect("open");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    drop(other);
    assert!(!Path::new(&path).join("secret-of-the-sink").exists());
}
