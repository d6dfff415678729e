//! Programs that are moved while clients use them: one copy runs, with all that clients were told.

mod crashes;
mod diskless;
mod held;
mod pre_dumps;
mod programs;
mod scripts;
mod sources;
mod trouble;
mod zdtm;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::{Context, Report, Scope};
use crate::apt;
use crate::crxfer::migrate::{Ended, Migrating, Migration};
use crate::crxfer::{Crxfer, Place, Receiver};
use crate::hosts::{Network, Rate};
use crate::run;
use crate::scratch::Scratch;
use crate::stage::Stage;

pub(super) fn cases(context: &Context, report: &mut Report) {
    if context.criu.is_none() {
        return;
    }
    let needed = [apt::MEMCACHED, apt::REDIS, apt::NGINX, apt::ARPING];
    if let Err(error) = apt::ensure(&needed) {
        return report.failed(&["migrate".to_owned()], &error);
    }
    programs::cases(context, report);
    scripts::cases(context, report);
    pre_dumps::cases(context, report);
    trouble::cases(context, report);
    crashes::cases(context, report);
    held::cases(context, report);
    diskless::cases(context, report);
    sources::cases(context, report);
    zdtm::cases(context, report);
}

/// QUIC takes a silent host for gone after 15 s.
const REMOVED_WITHIN: Duration = Duration::from_secs(30);

/// Of receivers that are started again.
const PORT: u16 = 7433;

/// A place for the destination's files, and the commands of both hosts.
struct Mover<'a> {
    context: &'a Context,
    /// In memory: what arrives is restored at once.
    memory: Scratch,
}

impl<'a> Mover<'a> {
    fn new(context: &'a Context) -> Result<Self> {
        Ok(Self {
            context,
            memory: Scratch::within(Path::new("/dev/shm"), "migrate")?,
        })
    }

    /// Starts the destination on B, which moves the service address, too.
    fn receive(&self, network: &Network) -> Result<Receiver> {
        let hooks = Migration::hooks(network);
        let hooks: Vec<&str> = hooks.iter().map(String::as_str).collect();
        self.receive_with(network, &hooks)
    }

    /// Starts the destination on B with these options.
    fn receive_with(&self, network: &Network, more: &[&str]) -> Result<Receiver> {
        let place = Place::On(&network.hosts.b);
        self.context
            .crxfer
            .await_migration(place, &self.received(), more)
    }

    /// Starts it where a source that has lost it finds it again.
    fn receive_again(&self, crxfer: &Crxfer, network: &Network) -> Result<Receiver> {
        let hooks = Migration::hooks(network);
        let listen = format!("{}:{PORT}", network.hosts.b.address);
        let mut words: Vec<&str> = hooks.iter().map(String::as_str).collect();
        words.extend(["--listen", &listen]);
        let place = Place::On(&network.hosts.b);
        crxfer.await_migration(place, &self.received(), &words)
    }

    fn received(&self) -> std::path::PathBuf {
        self.memory.path().join("received")
    }

    fn start(
        &self,
        network: &Network,
        pid: u32,
        to: &Receiver,
        more: &[&str],
    ) -> Result<Migrating> {
        self.context
            .crxfer
            .migrate(&network.hosts.a, pid, to, more)?
            .start()
    }

    /// Moves process `pid` and gives how that ended.
    fn run(&self, network: &Network, pid: u32, to: &Receiver, more: &[&str]) -> Result<Ended> {
        self.start(network, pid, to, more)?.wait()
    }

    /// Moves process `pid`, whatever the destination said is part of an error.
    fn migrate(
        &self,
        network: &Network,
        pid: u32,
        to: &Receiver,
        more: &[&str],
    ) -> Result<crate::crxfer::migrate::Report> {
        let report = self
            .run(network, pid, to, more)?
            .migrated()
            .with_context(|| format!("crxfer recv said:\n{}", to.said()))?;
        network.withdraw(&network.hosts.a)?;
        Ok(report)
    }

    /// Fails if an unfinished migration left a set behind that somebody might restore.
    fn ensure_nothing_published(&self) -> Result<()> {
        let entries = fs::read_dir(self.received()).into_iter().flatten();
        let names: Vec<String> = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| !name.starts_with('.'))
            .collect();
        ensure!(names.is_empty(), "left on the destination: {names:?}");
        Ok(())
    }

    /// Names of what there is of unfinished migrations.
    fn unfinished(&self) -> Vec<String> {
        let place = self.received().join(".crxfer/migrations");
        let entries = fs::read_dir(place).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// Waits until nothing of a migration is left on the destination: no process in the session of
    /// `pid`, no file. It may learn only by the silence that the source is gone.
    fn await_removed(&self, network: &Network, pid: u32) -> Result<Duration> {
        let begin = Instant::now();
        let removed = run::wait_for("the destination to clean up", REMOVED_WITHIN, || {
            let is_gone = network.hosts.b.session_of(pid).is_empty();
            (is_gone && self.unfinished().is_empty()).then_some(())
        });
        removed.with_context(|| {
            let stat = |pid| {
                fs::read_to_string(network.hosts.b.file(format!("/proc/{pid}/stat").as_ref()))
            };
            let processes = network.hosts.b.session_of(pid).into_iter().map(stat);
            let processes: Vec<_> = processes.flatten().collect();
            format!("processes {processes:?}, files of {:?}", self.unfinished())
        })?;
        self.ensure_nothing_published()?;
        Ok(begin.elapsed())
    }
}

/// Memory of a store, in MB.
fn mib(context: &Context) -> u64 {
    if context.scope == Scope::Quick {
        60
    } else {
        250
    }
}

/// A small memcached behind a line of `rate`.
fn small(rate: Rate) -> Result<Stage> {
    Stage::start(rate, 60, 50)
}
