//! With a real CRIU and memcached, as root; elsewhere each test says in one line why it does nothing.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tempfile::TempDir;

use super::super::testing::{Memcached, Network};
use super::*;
use crate::criu::testing::criu;
use crate::criu::{Canceller, CriuError, CriuOptions, DumpOptions, RestoreOptions, Worker};
use crate::criu::{Stage, Verdict};

const PATIENCE: Duration = Duration::from_secs(5);

#[expect(clippy::disallowed_methods, reason = "a measurement")]
fn now() -> Instant {
    Instant::now()
}

/// Their pids and those of their threads are free between dump and restore: one test at a time, so that
/// they do not take each other's.
static ONE: Mutex<()> = Mutex::new(());

/// A memcached that was dumped, with a value in it.
struct Dumped {
    _one: MutexGuard<'static, ()>,
    program: PathBuf,
    network: Network,
    directory: TempDir,
    memcached: Memcached,
    tasks: Vec<u32>,
}

/// What a restore was told, and what came of it.
struct Attempt {
    wanted: Wanted,
    result: Result<(), CriuError>,
    /// From its beginning to the answer at post-restore, and to its end.
    took: (Duration, Duration),
}

impl Dumped {
    fn new() -> Option<Self> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (program, network) = (criu()?, Network::new()?);
        let directory = tempfile::tempdir().expect("a scratch directory");
        let (memcached, tasks) = network.inside(|| {
            let mut memcached = Memcached::start(11211);
            let mut client = memcached.connect();
            assert!(client.is_served(PATIENCE));
            drop(client);
            let tasks = crate::live::tree(memcached.pid()).expect("it runs");
            let tasks: Vec<u32> = tasks.into_iter().flat_map(|task| task.threads).collect();
            assert!(tasks.len() > 2, "it has threads");
            // The kernel needs a moment to forget the connection.
            std::thread::sleep(Duration::from_millis(100));
            let place = File::open(directory.path()).expect("it opens");
            let mut worker = Worker::start(&program, None, None).expect("criu starts");
            let (pid, options) = (memcached.pid(), CriuOptions::default());
            let options = DumpOptions::new(pid, place.as_fd(), place.as_fd(), options);
            let dumped = worker.dump(&options, &mut |_, _| Verdict::GoOn);
            dumped.expect("it can be dumped");
            memcached.reap();
            (memcached, tasks)
        });
        Some(Self {
            _one: one,
            program,
            network,
            directory,
            memcached,
            tasks,
        })
    }

    /// Restores; `at` is asked at each stage, with what kills CRIU.
    fn restore(
        &self,
        log_level: u8,
        at: &mut (dyn FnMut(Stage, &Canceller) -> Verdict + Send),
    ) -> Attempt {
        self.network.inside(|| {
            let place = File::open(self.directory.path()).expect("it opens");
            let mut worker = Worker::start(&self.program, None, None).expect("criu starts");
            let criu = Process::of(worker.pid());
            let canceller = worker.canceller();
            let criu_options = CriuOptions {
                log_level,
                ..CriuOptions::default()
            };
            let mut options = RestoreOptions::new(place.as_fd(), place.as_fd(), criu_options);
            // What is left becomes a child of this process, as of a subreaper.
            options.sibling = true;
            let begun = now();
            let mut held = Duration::ZERO;
            let result = worker.restore(&options, &mut |stage, _| {
                if stage == Stage::PostRestore {
                    held = begun.elapsed();
                }
                at(stage, &canceller)
            });
            let took = (held, begun.elapsed());
            drop(worker);
            Attempt {
                wanted: Wanted {
                    tasks: self.tasks.clone(),
                    own_pid_namespace: false,
                    criu,
                    log: self.directory.path().join("restore.log"),
                },
                result: result.map(|_| ()),
                took,
            }
        })
    }

    /// Whether it answers with the value that it was dumped with.
    fn serves(&self) -> bool {
        let limit = Duration::from_millis(400);
        self.network
            .inside(|| self.memcached.finds_value_of(1, limit))
    }

    /// Ends a copy that runs.
    fn end(&self, pid: u32) {
        assert_eq!(pid, self.memcached.pid());
        assert_eq!(remove(&[Process::of(pid).expect("it runs")]), 0);
    }

    /// Whether what was found is true; removes it.
    fn check(&self, attempt: &Attempt, when: &str) -> Found {
        let begun = now();
        let found = find(&attempt.wanted);
        let looked = begun.elapsed();
        assert!(looked < PATIENCE, "{when}: {looked:?}");
        let serves = self.serves();
        match &found {
            Found::Runs { pid } => {
                assert!(serves, "{when}: it does not run");
                self.end(*pid);
            }
            Found::Leftovers(leftovers) => {
                assert!(!serves, "{when}: it runs");
                assert_eq!(remove(leftovers), 0, "{when}");
                assert_eq!(find(&attempt.wanted), Found::Nothing, "{when}");
            }
            Found::Nothing => assert!(!serves, "{when}: it runs"),
        }
        // What CRIU has killed itself, or has died.
        let pid = i32::try_from(self.memcached.pid())
            .ok()
            .and_then(Pid::from_raw);
        if let Ok(Some((_, status))) = waitpid(pid, WaitOptions::NOHANG) {
            println!(
                "{when}: {found:?}, ended by signal {:?}",
                status.terminating_signal()
            );
        }
        let free = self.tasks.iter().all(|&task| Stat::of(task).is_none());
        assert!(free, "{when}: pids are taken after {found:?}");
        found
    }
}

fn go_on(_: Stage, _: &Canceller) -> Verdict {
    Verdict::GoOn
}

#[test]
fn a_copy_that_was_let_go_runs() {
    let Some(dumped) = Dumped::new() else { return };
    // At level 3 the log says so, below it the tasks do.
    for level in [3, 2] {
        let attempt = dumped.restore(level, &mut go_on);
        let said = log_says(&attempt.wanted.log);
        assert_eq!(said, (level == 3).then_some(Ended::Resumed));
        println!("log level {level}: restored in {:?}", attempt.took);
        let begun = now();
        let found = find(&attempt.wanted);
        println!("found in {:?}", begun.elapsed());
        assert_eq!(
            found,
            Found::Runs {
                pid: dumped.memcached.pid()
            }
        );
        dumped.check(&attempt, "restored");
        let expected = match level {
            3 => Found::Runs { pid: 0 },
            _ => Found::Nothing,
        };
        assert_eq!(find(&attempt.wanted), expected, "it has ended since");
    }
}

#[test]
fn a_refused_copy_is_gone() {
    let Some(dumped) = Dumped::new() else { return };
    let refuse = &mut |stage, _: &Canceller| match stage {
        Stage::PostRestore => Verdict::Refuse,
        _ => Verdict::GoOn,
    };
    let attempt = dumped.restore(2, refuse);
    let refused = matches!(attempt.result, Err(CriuError::Refused { .. }));
    assert!(refused, "{:?}", attempt.result);
    assert_eq!(log_says(&attempt.wanted.log), Some(Ended::Failed));
    assert_eq!(dumped.check(&attempt, "refused"), Found::Nothing);
}

#[test]
fn a_held_copy_whose_criu_is_killed_is_a_leftover() {
    let Some(dumped) = Dumped::new() else { return };
    let kill = &mut |stage, canceller: &Canceller| {
        if stage == Stage::PostRestore {
            canceller.kill();
        }
        Verdict::GoOn
    };
    let attempt = dumped.restore(2, kill);
    let Found::Leftovers(leftovers) = dumped.check(&attempt, "held") else {
        panic!("{:?}", attempt.result);
    };
    assert_eq!(leftovers[0].pid, dumped.memcached.pid());
    // A log that is gone with its directory, and a restore that was never begun.
    let mut wanted = attempt.wanted;
    wanted.log = "/nowhere/restore.log".into();
    assert_eq!(find(&wanted), Found::Nothing);
    wanted.criu = None;
    assert_eq!(find(&wanted), Found::Nothing);
}

#[test]
fn whenever_criu_is_killed_the_copy_runs_or_is_removed() {
    const RUNS: u32 = 40;
    let Some(dumped) = Dumped::new() else { return };
    let whole = dumped.restore(2, &mut go_on);
    let took = whole.took;
    dumped.check(&whole, "undisturbed");
    let (mut runs, mut leftovers, mut nothing) = (0, 0, 0);
    for run in 0..RUNS {
        // A quarter over the whole restore, the others between the vote and the end.
        let early = run % 4 == 0;
        let (stage, span) = if early {
            (Stage::PreRestore, took.0)
        } else {
            (Stage::PostRestore, took.1.saturating_sub(took.0))
        };
        let delay = span * run / RUNS;
        let kill = &mut |at, canceller: &Canceller| {
            if at == stage {
                let canceller = canceller.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    canceller.kill();
                });
            }
            Verdict::GoOn
        };
        let attempt = dumped.restore(2 + u8::from(run % 2 == 0), kill);
        let when = format!("killed {delay:?} after {stage}");
        match dumped.check(&attempt, &when) {
            Found::Runs { .. } => runs += 1,
            Found::Leftovers(_) => leftovers += 1,
            Found::Nothing => nothing += 1,
        }
    }
    println!(
        "restores of {took:?} with CRIU killed: {runs} ran, {leftovers} left processes, {nothing} nothing"
    );
    assert!(leftovers > 0);
}

/// A `sleep` with this pid.
fn sleeper_with(pid: u32) -> Option<Child> {
    const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
    for _ in 0..500 {
        let last = fs::read_to_string(LAST_PID).ok()?;
        fs::write(LAST_PID, (pid - 1).to_string()).ok()?;
        let mut command = Command::new("sleep");
        let null = command.arg("1000").stdin(Stdio::null());
        let mut child = null.spawn().expect("sleep starts");
        // Others on this host are not to get pids around it.
        let _ = fs::write(LAST_PID, last.trim());
        if child.id() == pid {
            return Some(child);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    println!("skipped: no process gets pid {pid} here");
    None
}

#[test]
fn a_process_that_has_a_pid_of_the_copy_is_left_alone() {
    let Some(dumped) = Dumped::new() else { return };
    let pid = dumped.memcached.pid();
    // Before the restore, and between its begin and the making of the copy.
    for wanted_stage in [None, Some(Stage::PreRestore)] {
        let mut sleeper = None;
        if wanted_stage.is_none() {
            sleeper = sleeper_with(pid);
        }
        let attempt = dumped.restore(2, &mut |stage, _| {
            if Some(stage) == wanted_stage {
                sleeper = sleeper_with(pid);
            }
            Verdict::GoOn
        });
        let Some(mut sleeper) = sleeper else { return };
        attempt.result.as_ref().expect_err("its pid is taken");
        let found = find(&attempt.wanted);
        assert_eq!(found, Found::Nothing);
        // Not even when all of its ids are wanted.
        let one = Wanted {
            tasks: vec![pid],
            ..attempt.wanted
        };
        assert_eq!(find(&one), Found::Nothing);
        assert!(sleeper.try_wait().expect("our child").is_none(), "it lives");
        sleeper.kill().expect("our child can be killed");
        sleeper.wait().expect("our child can be reaped");
    }
}

#[test]
fn operators_may_read_the_log() {
    let directory = tempfile::tempdir().expect("a scratch directory");
    let log = directory.path().join("restore.log");
    let own = Process::of(std::process::id()).expect("we live");
    std::fs::write(&log, "(00.1) Restore finished\n").expect("it is written");
    let open = |write: bool| {
        let file = fs::OpenOptions::new().read(!write).append(write).open(&log);
        let mut command = Command::new("sleep");
        let null = command.arg("1000").stdin(file.expect("it opens"));
        null.spawn().expect("sleep starts")
    };
    let (mut reader, mut writer) = (open(false), open(true));
    let criu = Process { pid: 0, ..own };
    let found = builders(criu, &log);
    fs::remove_file(&log).expect("it can be removed");
    let removed = builders(criu, &log);
    for child in [&mut reader, &mut writer] {
        child.kill().expect("our child can be killed");
        child.wait().expect("our child can be reaped");
    }
    let found: Vec<u32> = found.iter().map(|process| process.pid).collect();
    let removed: Vec<u32> = removed.iter().map(|process| process.pid).collect();
    assert_eq!((found, removed), (vec![writer.id()], vec![writer.id()]));
}
