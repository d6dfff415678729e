//! A memcached that serves clients while it is moved: what migrations are measured and tested with.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::{Gap, Latency, Poller, Protocol, Question, Writer};
use crate::hosts::{Network, Rate, Side};
use crate::workload::{Memcached, Values, Workload};

/// Bytes of one value.
const VALUE_BYTES: usize = 100_000;

/// Starts a program with arguments on A of the network, and gives its pid there.
type Start<'a> = dyn Fn(&Network, &Path, &[&str]) -> Result<u32> + 'a;

/// A memcached on A with a client that polls and one that writes, both on C.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) network: Network,
    pub(crate) poller: Poller,
    pub(crate) writer: Writer,
    pub(crate) pid: u32,
    memcached: Memcached,
}

/// What the clients saw of a move, and what was there afterwards.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Between the last answer of the one host and the first of the other, both asked directly.
    pub(crate) downtime: Gap,
    /// The same at the service address, which moves too.
    pub(crate) service_downtime: Gap,
    /// Writes that were acknowledged.
    pub(crate) writes: u64,
    /// The longest time that one write took.
    pub(crate) slowest_write: Duration,
    /// Values that were compared.
    pub(crate) compared: usize,
}

impl Stage {
    /// Starts everything, with `mib` of values of which `writes` are rewritten a second.
    pub(crate) fn start(rate: Rate, mib: u64, writes: u32) -> Result<Self> {
        Self::start_by(rate, mib, writes, &|network, program, arguments| {
            network.hosts.a.start_workload(program, arguments)
        })
    }

    /// The same with a memcached that `start` starts.
    pub(crate) fn start_by(rate: Rate, mib: u64, writes: u32, start: &Start<'_>) -> Result<Self> {
        let network = Network::new(rate)?;
        let count = usize::try_from(mib)? * 1_000_000 / VALUE_BYTES;
        let mut memcached = Memcached::serving(Values::new(count, VALUE_BYTES));
        let a = &network.hosts.a;
        let pid = memcached.start_by(a, &|program, words| start(&network, program, words))?;
        let question = Question::MemcachedUdp {
            port: Memcached::PORT,
        };
        let poller = Poller::start(&network, question)?;
        let values = memcached.values.clone();
        let writer = Writer::start(&network.c, Protocol::Memcached, values, writes)?;
        crate::run::wait_for("the first writes", Duration::from_secs(10), || {
            (writer.acknowledged() > 5).then_some(())
        })?;
        Ok(Self {
            network,
            poller,
            writer,
            pid,
            memcached,
        })
    }

    /// How answers came within the last `span`.
    pub(crate) fn latency(&self, span: Duration) -> Latency {
        let now = self.poller.now();
        self.poller.direct().latency(now.saturating_sub(span), now)
    }

    /// The workload's pid must be on `side` and on no other host.
    pub(crate) fn ensure_at(&self, side: Side) -> Result<()> {
        for other in [Side::A, Side::B] {
            let host = self.network.host(other);
            let runs = host.listens_on(Memcached::PORT);
            ensure!(
                runs == (other == side),
                "memcached {} on {other:?}",
                if runs { "listens" } else { "does not listen" }
            );
        }
        Ok(())
    }

    /// Checks, after a move, that one copy runs, on B, and has every acknowledged value.
    pub(crate) fn moved(self) -> Result<Seen> {
        self.poller.ensure_only(Side::B)?;
        self.ensure_at(Side::B)?;
        let downtime = self.poller.direct().handover()?;
        let service_downtime = self
            .poller
            .service()
            .handover()
            .context("at the service address")?;
        let left = self.network.hosts.a.session_of(self.pid);
        ensure!(left.is_empty(), "processes {left:?} are left on A");
        let (writes, slowest_write, compared) = self.compare(Side::B)?;
        Ok(Seen {
            downtime,
            service_downtime,
            writes,
            slowest_write,
            compared,
        })
    }

    /// Checks that one copy runs, on A as before, and that nothing of another is on B.
    /// Gives the longest time without answers since `since`.
    pub(crate) fn ensure_stayed(&self, since: Duration) -> Result<Gap> {
        self.poller.ensure_only(Side::A)?;
        self.ensure_at(Side::A)?;
        let left = self.network.hosts.b.session_of(self.pid);
        ensure!(left.is_empty(), "processes {left:?} are left on B");
        Ok(self.poller.direct().longest_gap(since, self.poller.now()))
    }

    /// The same, and compares every acknowledged value.
    pub(crate) fn stayed(self, since: Duration) -> Result<Gap> {
        let gap = self.ensure_stayed(since)?;
        self.compare(Side::A)?;
        Ok(gap)
    }

    fn compare(mut self, side: Side) -> Result<(u64, Duration, usize)> {
        let before = self.writer.acknowledged();
        crate::run::wait_for("writes to go on", Duration::from_secs(10), || {
            (self.writer.acknowledged() > before + 5).then_some(())
        })?;
        let written = self.writer.finish()?;
        self.memcached.values = written.values;
        let compared = self.memcached.check(self.network.host(side))?;
        ensure!(compared > 0, "nothing was compared");
        self.poller.finish()?;
        Ok((written.acknowledged, written.slowest, compared))
    }
}
