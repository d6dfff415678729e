//! What must be true after every run: one copy that has everything, and nothing else.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::ground::{Diary, Ground, SOON};
use super::plan::{Fault, Plan, Victim};
use super::processes::{self, Found};
use crate::hosts::{Side, neighbour};

/// How long a copy that runs may take to answer on its own host.
const ANSWERS_WITHIN: Duration = Duration::from_millis(400);

/// How long to wait for a copy to answer before it is lost.
const LOST_AFTER: Duration = Duration::from_secs(6);

/// How long a client may take to go on.
const GOES_ON_WITHIN: Duration = Duration::from_secs(15);

/// Finds the one copy that answers with right data. None, or two, is what must never be.
pub(super) fn only_copy(ground: &Ground) -> Result<Side> {
    let begin = Instant::now();
    loop {
        let [a, b] = [Side::A, Side::B].map(|side| {
            let host = ground.network.host(side);
            ground.clients.answers_on(host, ANSWERS_WITHIN)
        });
        match (a, b) {
            (Ok(()), Ok(())) => bail!("two copies answer"),
            (Ok(()), Err(_)) => return Ok(Side::A),
            (Err(_), Ok(())) => return Ok(Side::B),
            (Err(a), Err(b)) if begin.elapsed() > LOST_AFTER => {
                bail!("no copy answers: A {a:#}; B {b:#}")
            }
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Fails unless the copy has its root and as many processes as the workload had, all of them awake.
pub(super) fn whole(ground: &Ground, copy: Side) -> Result<()> {
    let own = |process: &Found| process.session == ground.pid && !"ZTt".contains(process.state);
    let mut found = processes::all(ground.network.host(copy));
    found.retain(own);
    ensure!(
        found.len() == ground.processes && found.iter().any(|process| process.pid == ground.pid),
        "of {} processes the copy on {copy:?} has {:?}",
        ground.processes,
        found.iter().map(Found::line).collect::<Vec<_>>()
    );
    Ok(())
}

/// Moves the service address to the copy as a network's operator does, where crxfer did not have to:
/// the line was cut when the neighbours should have been told, or the host that has lost the copy
/// still has the address because the process with the hooks was killed.
pub(super) fn lead_clients(
    ground: &Ground,
    plan: &Plan,
    copy: Side,
    diary: &mut Diary,
) -> Result<()> {
    if plan.fault.cuts() {
        diary.note(format!("announcing the address on {copy:?} once more"));
        let host = ground.network.host(copy);
        ground.network.prepare(host)?;
        ground.network.announce(host)?;
    }
    if copy != ground.at && has_address(ground, copy.other())? {
        diary.note(format!("withdrawing the address from {:?}", copy.other()));
        ground.withdraw(copy.other());
    }
    let begin = Instant::now();
    loop {
        let found = ground.network.c.within(|| Ok(neighbour()))?;
        if found == Some(copy) {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < SOON,
            "clients are led to {found:?}, and the copy is on {copy:?}"
        );
        // Who talks is asked for again.
        let _ = ground.clients.serves(&ground.network);
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether the service address is on that host.
pub(super) fn has_address(ground: &Ground, side: Side) -> Result<bool> {
    let host = ground.network.host(side);
    let text = crate::run::quiet(
        host.command("ip")
            .args(["-o", "address", "show", "dev", "lo"]),
    )?;
    Ok(text.contains(&crate::hosts::SERVICE.to_string()))
}

/// Checks what clients have and see: every acknowledged write, every connection, no second copy. The
/// copy is on `copy`; it was elsewhere, or there, since `begin`.
///
/// Gives how many connections broke. None may, but by the death of a CRIU (`may_break`): processes die, but
/// the kernel's side of a connection is frozen with the tree, locked against the network, and either thawed
/// or built again from images that hold it; lines are down for seconds, and TCP tries for minutes. A
/// CRIU that dies while it has sockets in repair mode, or between its word to let a copy go and its end,
/// leaves processes that run at once, and may find a connection unusable or end by CRIU's own code.
pub(super) fn clients(
    ground: &mut Ground,
    copy: Side,
    begin: Instant,
    may_break: bool,
) -> Result<usize> {
    let rested = ground.clients.rest(GOES_ON_WITHIN);
    let compared = rested
        .context("a client's connection does not go on")
        .and_then(|()| ground.clients.compare_on(ground.network.host(copy)));
    ground.clients.work();
    compared.context("what was acknowledged")?;
    let breaks = ground.clients.breaks_since(begin);
    ensure!(
        may_break || breaks.is_empty(),
        "connections broke: {breaks:?}"
    );
    let idle = ground.clients.wake_idle(&ground.network)?;
    ensure!(
        may_break || idle.is_empty(),
        "idle connections broke: {idle:?}"
    );
    ground
        .clients
        .serves(&ground.network)
        .context("a new client")?;
    let before = ground.clients.acknowledged();
    crate::run::wait_for("clients to go on", SOON, || {
        (ground.clients.acknowledged() > before).then_some(())
    })?;
    if let Some(watch) = &ground.watch {
        watch.never_two(ground.at)?;
    }
    Ok(breaks.len() + idle.len())
}

impl Fault {
    /// Whether lines are cut.
    fn cuts(&self) -> bool {
        matches!(self, Self::Cut { .. } | Self::Gone { .. })
    }

    /// Whether a CRIU is killed.
    pub(super) fn kills_criu(&self) -> bool {
        matches!(self, Self::Kill { victims, .. } if victims.contains(&Victim::Criu))
    }

    /// How much longer than the limit a freeze may last that it comes within; `None`: any time.
    pub(super) fn excuse(&self) -> Option<Duration> {
        match self {
            Self::Kill { .. } => Some(Duration::ZERO),
            Self::Hang { ms, .. } | Self::Cut { ms, .. } => Some(Duration::from_millis(*ms)),
            Self::Gone { .. } => None,
        }
    }
}
