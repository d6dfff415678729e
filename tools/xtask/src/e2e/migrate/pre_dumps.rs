//! Migrations by CRIU's pre-dumps, where the kernel tracks what is written.

use anyhow::{Context as _, Result, ensure};

use super::{Context, Mover, Report};
use crate::crxfer::migrate;
use crate::hosts::{Network, Rate};
use crate::scratch::Scratch;
use crate::stage::Stage;
use crate::workload::BusyTree;

/// What makes them slow on an emulated machine is the machine.
const MIB: u64 = 50;

pub(super) fn cases(context: &Context, report: &mut Report) {
    let tracks = |criu: &crate::criu::Criu| criu.tracks_writes();
    if !context.criu.as_ref().is_some_and(tracks) {
        println!(
            "  migrate by pre-dumps: skipped, this kernel does not track writes (CONFIG_MEM_SOFT_DIRTY)"
        );
        return;
    }
    report.case("migrate memcached by pre-dumps", || {
        memcached(context, "pre-dump")
    });
    report.case("migrate memcached live beside soft-dirty", || {
        memcached(context, "live")
    });
    report.case("migrate tree by pre-dumps", || tree(context));
}

fn memcached(context: &Context, precopy: &str) -> Result<String> {
    let stage = Stage::start(Rate::Megabits(1000), MIB, 50)?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    // An emulated machine is slow to restore.
    let words = [
        "--tcp-established",
        "--precopy",
        precopy,
        "--freeze-limit",
        "60",
    ];
    let report = mover.migrate(&stage.network, stage.pid, &receiver, &words)?;
    let seen = stage.moved()?;
    if precopy == "pre-dump" {
        ensure_by_pre_dumps(&report)?;
    } else {
        ensure!(report.method.starts_with("live"), "{}", report.method);
    }
    Ok(format!(
        "{:.0} ms without answers (it says {:.0}), {}, {} values right after {} writes",
        seen.downtime.ms(),
        report.downtime_ms,
        figures(&report),
        seen.compared,
        seen.writes,
    ))
}

fn tree(context: &Context) -> Result<String> {
    let network = Network::new(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let files = Scratch::new("tree")?;
    let tree = BusyTree::start(&network.hosts.a, files.path().to_owned())?;
    tree.check(&network.hosts.a)?;
    let receiver = mover.receive(&network)?;
    let words = ["--precopy", "pre-dump", "--freeze-limit", "60"];
    let report = mover.migrate(&network, tree.pid(), &receiver, &words)?;
    ensure_by_pre_dumps(&report)?;
    tree.ensure_gone(&network.hosts.a)?;
    let after = tree.check(&network.hosts.b)?;
    Ok(format!("{} pages right, {}", after.pages, figures(&report)))
}

fn ensure_by_pre_dumps(report: &migrate::Report) -> Result<()> {
    ensure!(
        report.method.contains("pre-dumps"),
        "memory was copied by {}",
        report.method
    );
    let first = report.iterations.first().context("no iterations")?;
    let frozen = report.iterations.iter().all(|one| one.frozen_ms.is_some());
    ensure!(frozen, "an iteration does not say how long it froze");
    // CRIU's own marks: all the rest was left to the pre-dumps.
    ensure!(
        report.dumped_pages < first.scanned_pages,
        "the last dump had {} pages, the first pre-dump {}",
        report.dumped_pages,
        first.scanned_pages
    );
    Ok(())
}

fn figures(report: &migrate::Report) -> String {
    let each = report.iterations.iter().map(|one| {
        format!(
            "{}/{} in {:.0} ms, frozen {:.1}",
            one.changed_pages,
            one.scanned_pages,
            one.duration_ms,
            one.frozen_ms.unwrap_or(0.0)
        )
    });
    format!(
        "pages changed of read: {}; last {}/{}",
        each.collect::<Vec<_>>().join(", "),
        report.final_changed_pages,
        report.dumped_pages
    )
}
