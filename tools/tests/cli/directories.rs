//! Commands about directories that are there.

use std::fs;

use crate::sandbox::{Running, Sandbox, fixture, published};

#[test]
fn inspect_tells_what_a_restore_needs() {
    let sandbox = Sandbox::new();
    let dir = fixture("shm-tree/3");
    let path = dir.to_str().unwrap();
    let found = sandbox.run(&["inspect", "--json", path]).done();
    assert_eq!(found["completeness"]["state"], "complete");
    assert_eq!(
        (&found["levels"], &found["page_size"]),
        (&3.into(), &4096.into())
    );
    assert_eq!(found["memory"][0]["pagemap"], "pagemap-214.img");
    assert_eq!(found["memory"][0]["comm"], "shmapp");
    let text = sandbox.run(&["inspect", path]);
    assert!(text.stdout.contains("process 214"), "{text:?}");
    assert!(text.stdout.contains("segment 14"), "{text:?}");
}

#[test]
fn inspect_and_verify_tell_damage_by_their_exit_code() {
    let sandbox = Sandbox::new();
    let chain = sandbox.copy_chain("memcached");
    fs::remove_file(chain.join("3/core-172.img")).unwrap();
    for command in ["inspect", "verify"] {
        sandbox
            .run(&[command, "memcached/3"])
            .refused(3, &["core-172.img"]);
    }
    let sound = sandbox.run(&["verify", "memcached/2"]);
    assert_eq!(sound.code, Some(0));
    assert!(sound.stdout.contains("no digests to compare"), "{sound:?}");
}

#[test]
fn verify_finds_a_byte_that_changed_in_a_base() {
    let sandbox = Sandbox::new();
    let (recv, ticket) = sandbox.recv(&["--layout", "incremental"]).ticket();
    let source = fixture("memcached/3");
    sandbox.send(&source, &ticket, &["--name", "set"]).done();
    drop(recv);
    let check = || sandbox.run(&["verify", "--json", "recv/set"]);
    let sound = check().done();
    assert_eq!((&sound["sound"], &sound["sets"]), (&true.into(), &3.into()));

    let base = sandbox.path("recv/set/parent").canonicalize().unwrap();
    let pages = base.join("pages-1.img");
    let mut bytes = fs::read(&pages).unwrap();
    bytes[4096] ^= 1;
    fs::write(&pages, bytes).unwrap();
    let damaged = check();
    damaged.refused(3, &["pages-1.img", "the first at byte 4096"]);
    assert_eq!(damaged.events()[0]["sound"], false);
    sandbox
        .run(&["verify", "recv"])
        .refused(3, &["pages-1.img"]);
    sandbox.run(&["verify", "nowhere"]).refused(3, &["nowhere"]);
}

#[test]
fn list_and_rm_agree() {
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    sandbox
        .send(&fixture("memcached/3"), &ticket, &["--name", "a"])
        .done();
    sandbox
        .send(&fixture("shm-tree/1"), &ticket, &["--name", "b"])
        .done();
    let names = |args: &[&str]| {
        let listed = sandbox
            .run(&[&["list", "--json", "recv"], args].concat())
            .done();
        let sets = listed["sets"].as_array().unwrap().clone();
        let name = |set: &serde_json::Value| set["name"].as_str().unwrap_or("-").to_owned();
        sets.iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(names(&[]), ["a", "b"]);
    assert_eq!(names(&["--all"]), ["-", "-", "a", "b"]);
    let text = sandbox.run(&["list", "recv"]);
    assert_eq!(text.stdout.lines().count(), 3, "{text:?}");

    assert_eq!(sandbox.run(&["rm", "recv", "a"]).code, Some(0));
    assert_eq!(names(&[]), ["b"]);
    assert_eq!(published(&sandbox.path("recv")), ["b"]);
    sandbox
        .run(&["rm", "recv", "a"])
        .refused(3, &["no received set a"]);
    sandbox
        .run(&["list", "state"])
        .refused(3, &["not a receiving directory"]);
}

#[test]
fn flatten_makes_a_set_without_parent_and_replaces_nothing() {
    let sandbox = Sandbox::new();
    let source = fixture("memcached/3");
    let path = source.to_str().unwrap();
    assert_eq!(sandbox.run(&["flatten", path, "flat"]).code, Some(0));
    let found = sandbox.run(&["inspect", "--json", "flat"]).done();
    assert_eq!(
        (&found["levels"], &found["parent"]),
        (&1.into(), &serde_json::Value::Null)
    );
    let before = fs::metadata(sandbox.path("flat"))
        .unwrap()
        .modified()
        .unwrap();
    sandbox
        .run(&["flatten", path, "flat"])
        .refused(2, &["flat: exists already"]);
    let after = fs::metadata(sandbox.path("flat"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(before, after);
}

#[test]
fn diff_counts_by_process() {
    let sandbox = Sandbox::new();
    let (one, two) = (fixture("shm-tree/2"), fixture("shm-tree/3"));
    let (one, two) = (one.to_str().unwrap(), two.to_str().unwrap());
    let changed = sandbox.run(&["diff", "--json", one, two]).done();
    assert!(
        changed["memory"][0]["changed"].as_u64() > Some(0),
        "{changed}"
    );
    let same = sandbox.run(&["diff", "--json", two, two]).done();
    assert_eq!(same["memory"][0]["changed"], 0);
    assert!(
        sandbox
            .run(&["diff", one, two])
            .stdout
            .contains("process 214")
    );
}

#[test]
fn a_key_is_made_once() {
    let sandbox = Sandbox::new();
    let made = sandbox.run(&["keygen", "key.pem"]);
    assert!(made.stdout.starts_with("crxkey1-"), "{made:?}");
    let key = fs::read(sandbox.path("key.pem")).unwrap();
    sandbox
        .run(&["keygen", "key.pem"])
        .refused(2, &["key.pem exists already"]);
    assert_eq!(fs::read(sandbox.path("key.pem")).unwrap(), key);
}

#[test]
fn man_pages_and_help_document_the_exit_codes() {
    let sandbox = Sandbox::new();
    assert_eq!(sandbox.run(&["man", "man"]).code, Some(0));
    let page = fs::read_to_string(sandbox.path("man/crxfer.1")).unwrap();
    for section in [".SH EXAMPLES", ".SH \"EXIT STATUS\"", ".SH VERSION"] {
        assert!(page.contains(section), "{page}");
    }
    assert_eq!(sandbox.run(&["man"]).stdout, page);
    let help = sandbox.run(&["--help"]).stdout;
    for text in [page, help] {
        assert!(text.contains("130"), "{text}");
    }
    let send = fs::read_to_string(sandbox.path("man/crxfer-send.1")).unwrap();
    assert!(
        send.contains(".SH EXAMPLES") && !send.contains("EXTRA"),
        "{send}"
    );
    assert!(
        sandbox
            .run(&["completions", "bash"])
            .stdout
            .contains("_crxfer")
    );
}

#[test]
fn a_reader_that_leaves_is_no_crash() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(&["completions", "zsh"]);
    let (reader, writer) = std::io::pipe().unwrap();
    command.stdout(writer);
    let child = command.spawn().unwrap();
    // The command, and with it this side's copy of the pipe's other end.
    drop((reader, command));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        output.stderr.is_empty(),
        "{:?}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn logs_are_written_only_when_asked_for() {
    let sandbox = Sandbox::new();
    let (recv, ticket) = sandbox.recv(&["--once"]).ticket();
    let source = fixture("memcached/1");
    let args = ["send", source.to_str().unwrap(), "--to", &ticket, "--json"];
    let quiet = Running::start(sandbox.command(&args)).ended();
    assert_eq!((quiet.code, quiet.stderr.as_str()), (Some(0), ""));
    assert_eq!(recv.ended().stderr, "");
}

#[test]
fn sets_in_memory_are_found_by_the_directory_and_gone_with_their_receiver() {
    if !rustix::process::geteuid().is_root() {
        println!("not tried: a file system in memory needs root");
        return;
    }
    let sandbox = Sandbox::new();
    let options = ["--sink", "memory", "--sink-size", "64M"];
    let (recv, ticket) = sandbox.recv(&options).ticket();
    let send = |name| sandbox.send(&fixture("shm-tree/3"), &ticket, &["--name", name]);
    send("a").done();
    send("b").done();
    let path = sandbox.path("recv");
    assert!(published(&path).is_empty());
    assert!(!path.join(".crxfer/sets").exists());
    let listed = sandbox.run(&["list", "--json", "recv"]).done();
    assert_eq!(listed["sets"].as_array().unwrap().len(), 2);
    let inspected = sandbox.run(&["inspect", "--json", "recv/a"]).done();
    assert_eq!(inspected["completeness"]["state"], "complete");
    for place in ["recv", "recv/b"] {
        let verified = sandbox.run(&["verify", "--json", place]);
        assert_eq!(verified.events()[0]["sound"], true, "{verified:?}");
    }
    assert_eq!(sandbox.run(&["rm", "recv", "a"]).code, Some(0));
    recv.signal(rustix::process::Signal::KILL);
    recv.ended();
    let gone = sandbox.run(&["list", "recv"]);
    gone.refused(3, &["recv", "has ended, and are gone"]);
    // What takes its place leads there again.
    let (_recv, ticket) = sandbox.recv(&[]).ticket();
    sandbox
        .send(&fixture("shm-tree/1"), &ticket, &["--name", "c"])
        .done();
    assert_eq!(published(&path), ["c"]);
}

#[test]
fn full_memory_is_said_as_of_a_full_disk() {
    if !rustix::process::geteuid().is_root() {
        println!("not tried: a file system in memory needs root");
        return;
    }
    let sandbox = Sandbox::new();
    let (_recv, ticket) = sandbox
        .recv(&["--sink", "memory", "--sink-size", "1M"])
        .ticket();
    let sent = sandbox.send(&fixture("shm-tree/3"), &ticket, &["--name", "a"]);
    sent.refused(7, &["no space left on the device"]);
}
