//! With a real CRIU and memcached, as root; elsewhere each test says in one line why it does nothing.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::testing::{Client, Memcached, Network};
use super::super::{Fence, copy, within};
use super::*;
use crate::criu::testing::criu;
use crate::criu::{CriuError, CriuOptions, DumpOptions, Stage, Verdict, Worker};
use crate::image::Inventory;

const PATIENCE: Duration = Duration::from_secs(10);

#[expect(clippy::disallowed_methods, reason = "a measurement")]
fn now() -> Instant {
    Instant::now()
}

/// A dump of `pid` at whose post-dump `at_post_dump` is called, with what kills CRIU. Gives the run's
/// id.
fn dump(
    program: &Path,
    pid: u32,
    at_post_dump: &mut dyn FnMut(&crate::criu::Canceller) -> Verdict,
    kill_after: Option<Duration>,
) -> (Option<String>, Result<(), CriuError>, Duration) {
    let directory = tempfile::tempdir().expect("a scratch directory");
    let place = File::open(directory.path()).expect("it opens");
    let mut worker = Worker::start(program, None, None).expect("criu starts");
    worker.probe().expect("it answers");
    let canceller = worker.canceller();
    let criu_process = Process::of(worker.pid()).expect("criu runs");
    let criu = CriuOptions {
        tcp_established: true,
        ..CriuOptions::default()
    };
    let options = DumpOptions::new(pid, place.as_fd(), place.as_fd(), criu);
    let begun = now();
    let result = std::thread::scope(|scope| {
        let killer = canceller.clone();
        scope.spawn(move || {
            if let Some(delay) = kill_after {
                std::thread::sleep(delay);
                killer.kill();
            }
        });
        worker.dump(&options, &mut |stage, _| match stage {
            Stage::PostDump => at_post_dump(&canceller),
            _ => Verdict::GoOn,
        })
    });
    let took = begun.elapsed();
    drop(worker);
    let helpers = copy::helpers_of(criu_process);
    assert_eq!(copy::remove(&helpers), 0, "{helpers:?}");
    let inventory = std::fs::read(directory.path().join("inventory.img"));
    let inventory = inventory
        .ok()
        .and_then(|bytes| Inventory::parse(&bytes, "it").ok());
    let run_id = inventory.and_then(|it| it.criu_run_id);
    (run_id, result.map(|_| ()), took)
}

fn killed_at_post_dump(program: &Path, pid: u32) -> Option<String> {
    let kill = &mut |canceller: &crate::criu::Canceller| {
        canceller.kill();
        Verdict::GoOn
    };
    let (run_id, result, _) = dump(program, pid, kill, None);
    let killed = matches!(result, Err(CriuError::Cancelled { killed: true, .. }));
    assert!(killed, "{result:?}");
    run_id
}

fn hangs(client: &mut Client) -> bool {
    !client.is_served(Duration::from_millis(300))
}

#[test]
fn a_connection_survives_criu_killed_at_post_dump() {
    let (Some(program), Some(network)) = (criu(), Network::new()) else {
        return;
    };
    network.inside(|| {
        let memcached = Memcached::start(11211);
        let mut client = memcached.connect();
        assert!(client.is_served(PATIENCE));
        let tree = memcached.tree();
        assert_eq!(heal(&tree, None, &[]), Healed::default(), "nothing to do");

        let run_id = killed_at_post_dump(&program, memcached.pid()).expect("an inventory");
        assert!(hangs(&mut client));
        let tables = lock_tables(0);
        let expected = network_lock::nftables_table(&run_id).unwrap();
        assert_eq!(tables, [expected]);
        assert_eq!(lock_tables(memcached.pid()), tables);
        // Somebody else's, and the sockets alone are not enough.
        let healed = heal(&tree, None, &tables);
        assert_eq!((healed.sockets, healed.tables.len()), (1, 0), "{healed:?}");
        assert_eq!(lock_tables(0), tables);
        let healed = heal(&tree, Some(&run_id), &[]);
        assert_eq!((healed.sockets, &healed.tables), (0, &tables), "{healed:?}");
        assert!(client.is_served_late(PATIENCE));
        assert!(client.is_served(PATIENCE));
        assert!(lock_tables(0).is_empty());
    });
}

#[test]
fn a_table_of_another_tree_is_left_alone() {
    let (Some(program), Some(network)) = (criu(), Network::new()) else {
        return;
    };
    network.inside(|| {
        let (ours, other) = (Memcached::start(11211), Memcached::start(11212));
        let (mut client, mut foreign) = (ours.connect(), other.connect());
        killed_at_post_dump(&program, other.pid());
        let theirs = lock_tables(0);
        killed_at_post_dump(&program, ours.pid());
        let healed = heal(&ours.tree(), None, &[]);
        assert_eq!((healed.sockets, healed.tables.len()), (1, 1), "{healed:?}");
        assert_eq!(lock_tables(0), theirs);
        assert!(client.is_served(PATIENCE));
        assert!(hangs(&mut foreign));
        let healed = heal(&other.tree(), None, &[]);
        assert_eq!(healed.tables, theirs);
        assert!(foreign.is_served_late(PATIENCE));
    });
}

#[test]
fn a_tree_is_healed_behind_its_fence() {
    let (Some(program), Some(network)) = (criu(), Network::new()) else {
        return;
    };
    network.inside(|| {
        let memcached = Memcached::start(11211);
        let mut client = memcached.connect();
        assert!(client.is_served(PATIENCE));
        let tree = memcached.tree();
        let fence = match Fence::plan(&tree, &format!("test-heal-{}", std::process::id())) {
            Ok(fence) => fence,
            Err(error) => {
                println!("skipped: {error}");
                return;
            }
        };
        let mut fenced = |canceller: &crate::criu::Canceller| {
            fence.close(&tree).expect("it can be closed");
            canceller.kill();
            Verdict::GoOn
        };
        let (_, result, _) = dump(&program, memcached.pid(), &mut fenced, None);
        result.expect_err("criu was killed");
        let begun = now();
        let healed = heal(&tree, None, &[]);
        println!("healed in {:?}: {healed:?}", begun.elapsed());
        assert_eq!((healed.sockets, healed.tables.len()), (1, 1), "{healed:?}");
        assert!(hangs(&mut client), "still held");
        fence.open(&tree).unwrap();
        assert!(client.is_served_late(PATIENCE));
        assert!(client.is_served(PATIENCE));
    });
}

#[test]
fn a_tree_in_a_network_namespace_of_its_own_is_healed_from_outside() {
    let (Some(program), Some(network)) = (criu(), Network::new()) else {
        return;
    };
    let (memcached, mut client) = network.inside(|| {
        let memcached = Memcached::start(11211);
        let client = memcached.connect();
        (memcached, client)
    });
    assert!(client.is_served(PATIENCE));
    killed_at_post_dump(&program, memcached.pid());
    assert!(hangs(&mut client));
    assert_eq!(lock_tables(memcached.pid()).len(), 1);
    let healed = heal(&memcached.tree(), None, &[]);
    assert_eq!((healed.sockets, healed.tables.len()), (1, 1), "{healed:?}");
    assert!(lock_tables(memcached.pid()).is_empty());
    assert!(client.is_served_late(PATIENCE));
    assert!(client.is_served(PATIENCE));
}

#[test]
fn whenever_criu_is_killed_the_connection_is_saved() {
    let (Some(program), Some(network)) = (criu(), Network::new()) else {
        return;
    };
    const RUNS: u32 = 20;
    network.inside(|| {
        let mut memcached = Memcached::start(11211);
        let mut client = memcached.connect();
        let mut tree = memcached.tree();
        let mut died = 0;
        // Held for a moment, as by a hand-over.
        let mut hold = |_: &crate::criu::Canceller| {
            std::thread::sleep(Duration::from_millis(20));
            Verdict::Refuse
        };
        let (_, result, whole) = dump(&program, memcached.pid(), &mut hold, None);
        assert!(matches!(result, Err(CriuError::Refused { .. })), "{result:?}");
        assert!(client.is_served(PATIENCE));
        let (mut killed, mut littered, mut in_repair, mut locked, mut woken) = (0, 0, 0, 0, 0);
        for run in 0..RUNS {
            let delay = whole * run / RUNS;
            let (_, result, _) = dump(&program, memcached.pid(), &mut hold, Some(delay));
            killed += u32::from(!matches!(result, Err(CriuError::Refused { .. })));
            let healed = heal(&tree, None, &[]);
            assert!(healed.problems.is_empty(), "{healed:?}");
            littered += healed.littered.len();
            in_repair += healed.sockets;
            locked += healed.tables.len();
            woken += healed.woken.len();
            if !client.is_served(PATIENCE) {
                let why = memcached.ended_by();
                // What CRIU's own code in it does when CRIU dies at that moment, and nothing can help.
                let helpless = matches!(why, Some(libc::SIGTRAP | libc::SIGSEGV));
                assert!(helpless, "killed after {delay:?}: {healed:?}, {why:?}");
                died += 1;
                memcached = Memcached::start(11211);
                (client, tree) = (memcached.connect(), memcached.tree());
                // Whose connections a dead tree's table names is not known any more.
                for table in lock_tables(0) {
                    network_lock::remove_table(&table).expect("it can be removed");
                }
            }
            assert!(lock_tables(0).is_empty(), "killed after {delay:?}");
        }
        println!(
            "{killed} of {RUNS} dumps of {whole:?} were killed: {in_repair} left a socket in repair, \
             {locked} a table, {littered} memory, {woken} a stopped process, {died} died of it"
        );
        assert!(killed > 0 && died <= RUNS / 5);
    });
}

#[test]
fn what_is_left_stopped_runs_again() {
    let mut child = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    let tree = Tree::of([child.id()]);
    tree.processes[0].signal(Signal::STOP).unwrap();
    let mut healed = Healed::default();
    let woken = within(PATIENCE, || {
        healed = heal(&tree, None, &["a table of others".to_owned()]);
        !healed.woken.is_empty()
    });
    let again = within(PATIENCE, || heal(&tree, None, &[]).woken.is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(woken && again);
    assert_eq!(healed.woken, [child.id()]);
}
