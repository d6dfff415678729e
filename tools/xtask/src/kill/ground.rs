//! Where runs take place: two hosts and one for clients, a program that is moved to and fro, and the
//! commands of both hosts.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::clients::{Clients, Witness};
use super::moving::Moving;
use super::plan::{Mode, Program, Role};
use super::recover::Recovery;
use super::store::Store;
use super::watch::Watch;
use super::web::Web;
use crate::crxfer::migrate::Migration;
use crate::crxfer::{Crxfer, Place, Receiver};
use crate::hosts::{Network, Rate, Side};
use crate::scratch::Scratch;

/// What takes this long does not come any more.
pub(super) const SOON: Duration = Duration::from_secs(10);

/// Port of every receiver: one that was killed comes back where the source looks for it.
const PORT: u16 = 4433;

/// Seconds frozen after which the workload must run on at the source.
pub(super) const FREEZE_LIMIT: u32 = 4;

/// Between two exchanges of a client that works.
const PERIOD: Duration = Duration::from_millis(5);

/// Above the pids of workloads, and far from the greatest pid: what runs for a while only must not
/// take pids that a copy needs.
const OTHER_PIDS: u32 = 20_000;

/// The command under test.
#[derive(Clone, Debug)]
pub(super) struct Tested {
    pub(super) crxfer: Crxfer,
    /// It has `--state`, and `recover`.
    pub(super) recovers: bool,
}

impl Tested {
    /// Finds out what `crxfer` can do.
    pub(super) fn new(crxfer: Crxfer) -> Result<Self> {
        let help = crxfer.run(&["--help"])?;
        let recovers = help.lines().any(|line| line.trim().starts_with("recover"));
        Ok(Self { crxfer, recovers })
    }
}

/// A place for runs with one program.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) tested: Tested,
    pub(super) network: Network,
    pub(super) clients: Box<dyn Witness>,
    pub(super) watch: Option<Watch>,
    /// Root process of the workload, the same on both hosts.
    pub(super) pid: u32,
    /// How many processes it has.
    pub(super) processes: usize,
    /// Where the workload runs.
    pub(super) at: Side,
    /// Ids of migrations.
    seen: Mutex<BTreeSet<String>>,
    files: Scratch,
    _served: Scratch,
}

impl Ground {
    /// Starts hosts, program and clients, with the program on A.
    pub(super) fn new(tested: &Tested, program: Program) -> Result<Self> {
        // In memory: what arrives is restored at once.
        let files = Scratch::within(Path::new("/dev/shm"), "kill")?;
        let served = Scratch::new("served")?;
        for side in ["a", "b"] {
            for part in ["received", "work", "state"] {
                files.directory(&format!("{side}/{part}"))?;
            }
        }
        let network = Network::announcing(Rate::Megabits(1000), 1)?;
        network.retry_soon()?;
        let host = &network.hosts.a;
        let (pid, clients): (u32, Box<dyn Witness>) = match program {
            Program::Memcached => {
                let (pid, store) = Store::start(host)?;
                (pid, Box::new(Clients::start(&network, store, PERIOD)?))
            }
            Program::Nginx => {
                let (pid, web) = Web::start(host, served.path())?;
                (pid, Box::new(Clients::start(&network, web, PERIOD)?))
            }
        };
        let processes = network.hosts.a.session_of(pid).len();
        let watch = match program {
            Program::Memcached => Some(Watch::start(&network)?),
            Program::Nginx => None,
        };
        Ok(Self {
            tested: tested.clone(),
            network,
            clients,
            watch,
            pid,
            processes,
            at: Side::A,
            seen: Mutex::default(),
            files,
            _served: served,
        })
    }

    /// Has what runs for a while only take other pids than workloads have.
    pub(super) fn keep_pids_free(&self) -> Result<()> {
        for host in [&self.network.hosts.a, &self.network.hosts.b] {
            host.next_pids(OTHER_PIDS)?;
        }
        Ok(())
    }

    /// Forgets what was seen of earlier runs, and what was said.
    pub(super) fn forget(&self) {
        if let Some(watch) = &self.watch {
            watch.forget();
        }
        self.clients.take_standstill();
        for side in [Side::A, Side::B] {
            let _ = fs::remove_file(self.directory(side, "earlier.log"));
        }
    }

    /// Whether the name of `path` has the id of a migration that these hosts know of.
    pub(super) fn names_migration(&self, path: &Path) -> bool {
        let name = path.to_string_lossy();
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().any(|id| name.contains(id.as_str()))
    }

    /// Remembers the migrations that there are journals of.
    pub(super) fn remember_migrations(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for side in [Side::A, Side::B] {
            let journals = super::journals::all(self, side);
            let ids = journals.iter().filter_map(|one| one.name.split_once('-'));
            seen.extend(ids.map(|(_, id)| id.to_owned()));
        }
    }

    /// Takes the service address from `side`; a hook or a guard may do it at the same moment.
    pub(super) fn withdraw(&self, side: Side) {
        let _ = self.network.withdraw(self.network.host(side));
    }

    /// Keeps the journals as they are now: they are removed when they are over.
    pub(super) fn keep_journals(&self, log: &Path) {
        for side in [Side::A, Side::B] {
            for place in self.journals(side) {
                super::leftovers::keep(&place, &log.join(format!("journals-of-{side:?}")));
            }
        }
    }

    /// The host with that part in a migration that begins where the workload is.
    pub(super) fn side(&self, role: Role) -> Side {
        match role {
            Role::Source => self.at,
            Role::Destination => self.at.other(),
        }
    }

    /// A directory of host `side`: `received`, `work` or `state`.
    pub(super) fn directory(&self, side: Side, part: &str) -> PathBuf {
        let side = match side {
            Side::A => "a",
            Side::B => "b",
        };
        self.files.path().join(side).join(part)
    }

    /// Where all of it is.
    pub(super) fn files(&self) -> &Path {
        self.files.path()
    }

    /// Starts the receiver on `side`, held at `point` where one is given.
    pub(super) fn receive(&self, side: Side, hold: Option<&Hold>) -> Result<Receiver> {
        self.keep_log(side);
        let host = self.network.host(side);
        let listen = format!("{}:{PORT}", host.address);
        let mut words = vec!["--listen".to_owned(), listen];
        words.extend(Migration::hooks(&self.network));
        let withdraw = self.network.script("withdraw");
        words.push("--hook".to_owned());
        // Must work where there is nothing to withdraw.
        words.push(format!("after-abort={} || true", withdraw.display()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let crxfer = Hold::applied(hold, &self.tested.crxfer);
        crxfer.await_migration(Place::On(host), &self.directory(side, "received"), &words)
    }

    /// What an earlier receiver said must not be written over.
    fn keep_log(&self, side: Side) {
        let said = fs::read(self.directory(side, "received.log")).unwrap_or_default();
        let all = fs::read(self.directory(side, "earlier.log")).unwrap_or_default();
        let _ = fs::write(self.directory(side, "earlier.log"), [all, said].concat());
    }

    /// Starts `crxfer migrate` from `from` to `receiver`. What it says goes to files in `log`.
    pub(super) fn migrate(
        &self,
        from: Side,
        receiver: &Receiver,
        mode: Mode,
        hold: Option<&Hold>,
        log: &Path,
    ) -> Result<Moving> {
        let host = self.network.host(from);
        let crxfer = Hold::applied(hold, &self.tested.crxfer);
        let mut command = crxfer.command(Place::On(host));
        let report = log.join("report.json");
        command
            .args(["migrate", "--json", "--pid", &self.pid.to_string()])
            .args(["--to", &receiver.target(), "--report"])
            .arg(&report)
            // Clients that make connections all the time are always in the middle of one.
            .args([
                "--tcp-established",
                "--skip-in-flight",
                "--mode",
                mode.name(),
            ])
            .args(["--freeze-limit", &FREEZE_LIMIT.to_string(), "--work"])
            .arg(self.directory(from, "work"))
            .args(["--hook", &self.withdrawal()]);
        if self.tested.recovers {
            command.arg("--state").arg(self.directory(from, "state"));
        }
        Moving::start(command, log, report)
    }

    fn withdrawal(&self) -> String {
        format!("after-commit={}", self.network.script("withdraw").display())
    }

    /// `crxfer VERB` on `side`, for the journals of that host's two roles.
    pub(super) fn command(&self, side: Side, verb: &str) -> Command {
        let host = self.network.host(side);
        let mut command = self.tested.crxfer.command(Place::On(host));
        command.arg(verb);
        command
    }

    /// Directories with journals on `side`: as a source, and as a destination.
    pub(super) fn journals(&self, side: Side) -> [PathBuf; 2] {
        [
            self.directory(side, "state"),
            self.directory(side, "received").join(".crxfer/state"),
        ]
    }

    /// What `crxfer recover` finds on `side`, and does about it.
    pub(super) fn recover(&self, side: Side, more: &[&str]) -> Result<Recovery> {
        Recovery::run(self, side, more)
    }
}

/// Holds a process for a while at a named point.
#[derive(Clone, Debug)]
pub(super) struct Hold {
    name: &'static str,
    file: PathBuf,
}

impl Hold {
    const MS: u32 = 400;

    /// At point `name`; `file` is where the process says that it is there.
    pub(super) fn at(name: &'static str, file: PathBuf) -> Self {
        let _ = fs::remove_file(&file);
        Self { name, file }
    }

    fn applied(hold: Option<&Self>, crxfer: &Crxfer) -> Crxfer {
        let Some(hold) = hold else {
            return crxfer.clone();
        };
        let pause = format!("{}:{}", hold.name, Self::MS);
        crxfer
            .with_env("CRXFER_PAUSE", &pause)
            .with_env("CRXFER_PAUSE_FILE", &hold.file.to_string_lossy())
    }

    /// Whether the process is there.
    pub(super) fn is_reached(&self) -> bool {
        self.file.exists()
    }
}

/// What happened when, for whoever looks at a failure.
#[derive(Debug)]
pub(super) struct Diary {
    begin: Instant,
    lines: Vec<String>,
}

impl Diary {
    pub(super) fn new() -> Self {
        Self {
            begin: Instant::now(),
            lines: Vec::new(),
        }
    }

    pub(super) fn note(&mut self, text: impl std::fmt::Display) {
        let at = self.begin.elapsed().as_secs_f64();
        self.lines.push(format!("{at:8.3} {text}"));
    }

    pub(super) fn begin(&self) -> Instant {
        self.begin
    }

    pub(super) fn write(&self, file: &Path) -> Result<()> {
        fs::write(file, self.lines.join("\n") + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }
}
