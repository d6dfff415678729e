//! Hosts with a container on them, and crxfer told how to move it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Container, Kind};
use crate::crxfer::migrate::{Migrating, Migration, Report};
use crate::crxfer::{Crxfer, Place, Receiver};
use crate::hosts::{Network, Rate, Side};
use crate::scratch::Scratch;

/// Three hosts, a container that runs on A, and room for the destination's files. Dropped in this
/// order: the container's control groups can go when its hosts are gone.
pub(crate) struct Ground<'a> {
    crxfer: &'a Crxfer,
    pub(crate) network: Network,
    pub(crate) container: Container,
    pub(crate) memory: Scratch,
}

impl<'a> Ground<'a> {
    /// Starts a container, one of [`Kind::Video`] with a file of `bytes`.
    pub(crate) fn new(crxfer: &'a Crxfer, kind: Kind, rate: Rate, bytes: usize) -> Result<Self> {
        let container = Container::new(kind, bytes)?;
        let ground = Self {
            crxfer,
            network: Network::new(rate)?,
            container,
            memory: Scratch::within(Path::new("/dev/shm"), "lxc")?,
        };
        ground.container.start(&ground.network.hosts.a)?;
        Ok(ground)
    }

    fn received(&self) -> PathBuf {
        self.memory.path().join("received")
    }

    /// The command by which the destination restores it.
    pub(crate) fn restore_command(&self) -> String {
        self.container.helper(&self.network.hosts.b, "restore")
    }

    /// Starts the destination, which restores LXC containers by `command`.
    pub(crate) fn receive_with(&self, command: &str) -> Result<Receiver> {
        let restore = format!("lxc={command}");
        let remove = self.container.helper(&self.network.hosts.b, "remove");
        let remove = format!("lxc={remove}");
        self.receive(&["--restore-with", &restore, "--remove-with", &remove])
    }

    /// Starts the destination with `more` options; it moves the service address, too.
    pub(crate) fn receive(&self, more: &[&str]) -> Result<Receiver> {
        let hooks = Migration::hooks(&self.network);
        let mut words: Vec<&str> = hooks.iter().map(String::as_str).collect();
        words.extend(more);
        let place = Place::On(&self.network.hosts.b);
        self.crxfer.await_migration(place, &self.received(), &words)
    }

    /// Starts to move it.
    pub(crate) fn start(&self, to: &Receiver) -> Result<Migrating> {
        let source = &self.network.hosts.a;
        let dump = self.container.helper(source, "dump");
        let words = [
            "--dump-with",
            &dump,
            "--restore-as",
            "lxc",
            "--container",
            &self.container.name,
            "--tcp-established",
        ];
        let pid = self.container.pid(source)?;
        self.crxfer.migrate(source, pid, to, &words)?.start()
    }

    /// Moves it; what the destination said is part of an error.
    pub(crate) fn migrate(&self, to: &Receiver) -> Result<Report> {
        let ended = self.start(to)?.wait()?;
        let report = ended
            .migrated()
            .with_context(|| format!("crxfer recv said:\n{}", to.said()))?;
        self.network.withdraw(&self.network.hosts.a)?;
        Ok(report)
    }

    /// Fails unless it runs on `side`, and nothing of it on the other.
    pub(crate) fn ensure_on(&self, side: Side) -> Result<()> {
        let here = self.network.host(side);
        let there = self.network.host(side.other());
        self.container.ensure_only(here, there)
    }
}
