use super::*;
use crate::preflight::check::Outcome::{self, Failed, Passed, Skipped, Warning};
use crate::preflight::facts::{CriuVersion, sample};
use crate::preflight::found::Taken;
use crate::preflight::memory::Memory;

type World = (Facts, Place, Found);

/// A destination that is like the source, with room for it.
fn world() -> World {
    let facts = sample();
    let found = Found {
        host: facts.host.clone(),
        privileged: true,
        taken: Vec::new(),
        pid_max: Some(4_194_304),
        files: facts
            .files
            .iter()
            .map(|file| Some((file.size, file.mode)))
            .collect(),
        bound: vec![Binding::Free; facts.sockets.len()],
        memory: Memory {
            available: 1 << 30,
            group: Some((1 << 30, "/sys/fs/cgroup".into())),
            images_free: Some(1 << 30),
            images_in_memory: true,
        },
    };
    let mut facts = facts;
    facts.files_left_out = 0;
    (facts, Place::default(), found)
}

fn check(name: &str, change: impl FnOnce(&mut World)) -> Check {
    let mut world = world();
    change(&mut world);
    let (facts, place, found) = world;
    let checks = judge(&facts, &place, &found);
    let check = checks
        .into_iter()
        .find(|check| check.name == name)
        .expect("there is such a check");
    let must_advise = matches!(check.outcome, Failed | Warning);
    assert_eq!(must_advise, !check.advice.is_empty(), "{check}");
    check
}

fn outcome(name: &str, change: impl FnOnce(&mut World)) -> Outcome {
    check(name, change).outcome
}

#[test]
fn a_like_host_passes() {
    let (facts, place, found) = world();
    let checks = judge(&facts, &place, &found);
    assert!(
        checks.iter().all(|check| check.outcome == Passed),
        "{checks:?}"
    );
}

#[test]
fn another_machine_or_page_size_stops_it() {
    assert_eq!(
        outcome("architecture", |(_, _, found)| found.host.machine =
            "aarch64".into()),
        Failed
    );
    assert_eq!(
        outcome("page size", |(_, _, found)| found.host.page_size = 65536),
        Failed
    );
    assert_eq!(
        outcome("privileges", |(_, _, found)| found.privileged = false),
        Failed
    );
}

#[test]
fn missing_cpu_features_stop_it_unless_forced() {
    let lacks =
        |(_, _, found): &mut World| found.host.cpu_features = vec!["sse2".into(), "avx2".into()];
    let found = check("CPU features", lacks);
    assert!(
        found.outcome == Failed && found.found.contains("sse4_2"),
        "{found}"
    );
    let forced = |world: &mut World| {
        lacks(world);
        world.0.force = true;
    };
    assert_eq!(outcome("CPU features", forced), Warning);
    assert_eq!(
        outcome("CPU features", |(facts, _, _)| facts
            .host
            .cpu_features
            .clear()),
        Skipped
    );
}

#[test]
fn an_older_kernel_is_warned_of() {
    let kernel =
        |release: &str| outcome("kernel", |(_, _, found)| found.host.kernel = release.into());
    assert_eq!(kernel("5.10.0"), Warning);
    assert_eq!(kernel("6.1.9"), Passed);
    assert_eq!(kernel("6.12"), Passed);
    assert_eq!(kernel("odd"), Passed);
}

#[test]
fn images_of_a_newer_criu_need_a_newer_criu() {
    let versions = |source: (u16, u16, u16), here: (u16, u16, u16)| {
        let version = |(major, minor, sublevel)| CriuVersion::new(major, minor, sublevel);
        outcome("CRIU versions", |(facts, _, found)| {
            facts.host.criu = version(source);
            found.host.criu = version(here);
        })
    };
    assert_eq!(versions((4, 2, 0), (4, 1, 1)), Failed);
    assert_eq!(versions((4, 1, 1), (4, 2, 0)), Passed);
    assert_eq!(versions((4, 2, 1), (4, 2, 0)), Passed);
    assert_eq!(versions((4, 1, 0), (4, 0, 0)), Warning);
    assert_eq!(
        outcome("CRIU versions", |(facts, _, _)| facts.host.criu = None),
        Skipped
    );
    assert_eq!(
        outcome("criu", |(_, _, found)| found.host.criu = None),
        Failed
    );
}

#[test]
fn memory_counts_images_and_process() {
    let with =
        |change: fn(&mut Memory)| outcome("memory", |(_, _, found)| change(&mut found.memory));
    let needed = 512 << 20;
    assert_eq!(with(|memory| memory.available = 512 << 20), Passed);
    assert_eq!(with(|memory| memory.available = (512 << 20) - 1), Failed);
    assert_eq!(with(|memory| memory.images_free = Some(1 << 20)), Failed);
    assert_eq!(with(|memory| memory.images_free = None), Passed);
    assert_eq!(
        with(|memory| memory.group = Some((1 << 20, "/g".into()))),
        Failed
    );
    let on_disk = |(_, _, found): &mut World| {
        found.memory.images_in_memory = false;
        found.memory.available = needed / 2;
    };
    assert_eq!(outcome("memory", on_disk), Passed);
    let forced = |(facts, _, found): &mut World| {
        found.memory.available = 0;
        facts.force = true;
    };
    assert_eq!(outcome("memory", forced), Warning);
}

#[test]
fn pids_in_use_are_named_with_their_holder() {
    let taken = |own| {
        check("pids", |(_, _, found)| {
            found.taken = vec![Taken {
                id: 401,
                pid: 399,
                comm: "holder".into(),
                own,
            }];
        })
    };
    let other = taken(false);
    assert!(
        other.outcome == Failed && other.found.contains("holder"),
        "{other}"
    );
    let own = taken(true);
    assert!(
        own.outcome == Failed && own.advice.contains("ns_last_pid"),
        "{own}"
    );
    assert_eq!(
        outcome("pids", |(_, _, found)| found.pid_max = Some(402)),
        Failed
    );
    assert_eq!(
        outcome("pids", |(facts, _, _)| facts.tree.tasks_left_out = 1),
        Warning
    );
    let namespace = |(facts, _, found): &mut World| {
        facts.tree.own_pid_namespace = true;
        found.pid_max = Some(1);
    };
    assert_eq!(outcome("pids", namespace), Passed);
}

#[test]
fn files_must_be_the_same_where_criu_compares_them() {
    let service = |here| outcome("files", |(_, _, found)| found.files[2] = here);
    assert_eq!(service(None), Failed);
    assert_eq!(service(Some((1, 0o100_755))), Failed);
    assert_eq!(service(Some((123_456, 0o100_644))), Failed);
    let log = |here| outcome("files", |(_, _, found)| found.files[1] = here);
    assert_eq!(log(Some((1, 0o100_644))), Passed);
    assert_eq!(log(None), Failed);
    let directory = |here| outcome("files", |(_, _, found)| found.files[0] = here);
    assert_eq!(directory(Some((7, 0o040_700))), Passed);
    assert_eq!(directory(Some((7, 0o100_700))), Failed);
    let written = |(facts, _, found): &mut World| {
        facts.files[1].grows = false;
        found.files[1] = Some((1, 0o100_644));
    };
    assert_eq!(outcome("files", written), Warning);
    let hook = |(_, place, found): &mut World| {
        place.restore_hook = true;
        found.files[2] = None;
    };
    assert_eq!(outcome("files", hook), Warning);
    assert_eq!(
        outcome("files", |(facts, _, _)| facts.files_left_out = 1),
        Warning
    );
    assert_eq!(
        outcome("files", |(facts, _, _)| facts.tree.own_mount_namespace =
            true),
        Skipped
    );
}

#[test]
fn a_missing_address_needs_a_hook() {
    let missing = |(_, _, found): &mut World| found.bound[2] = Binding::NoAddress;
    let without = check("addresses", missing);
    assert!(
        without.outcome == Failed && without.found.contains("192.0.2.7"),
        "{without}"
    );
    let hook = |world: &mut World| {
        missing(world);
        world.1.address_hook = true;
    };
    assert_eq!(outcome("addresses", hook), Passed);
    assert_eq!(
        outcome("addresses", |(_, _, found)| found.bound[0] =
            Binding::Unknown),
        Warning
    );
    let namespace = |world: &mut World| {
        missing(world);
        world.0.tree.own_net_namespace = true;
    };
    assert_eq!(outcome("addresses", namespace), Passed);
}

#[test]
fn a_port_in_use_stops_it_unless_forced() {
    let taken = |(_, _, found): &mut World| found.bound[0] = Binding::PortTaken;
    let check = check("ports", taken);
    assert!(
        check.outcome == Failed && check.found.contains("127.0.0.1:11211"),
        "{check}"
    );
    let forced = |world: &mut World| {
        taken(world);
        world.0.force = true;
    };
    assert_eq!(outcome("ports", forced), Warning);
}

#[test]
fn many_are_counted_not_named() {
    assert_eq!(few(["a", "b"].iter()), "a, b");
    assert!(few(0..12).ends_with("4, 7 more"));
}
