//! Programs that nobody tuned anything for: threads and mapped files, large mappings that are mostly
//! holes, a family of processes, memory that grows, processes that come and go all the time.

use anyhow::{Context as _, Result, ensure};

use super::{Context, Mover, Report, Scope};
use crate::hosts::{Network, Rate};
use crate::scratch::Scratch;
use crate::workload::Script;

pub(super) fn cases(context: &Context, report: &mut Report) {
    if Script::interpreter().is_none() {
        println!("  cases with python programs: skipped, there is no python3");
        return;
    }
    let kinds = ["threads", "forking", "sparse", "prefork", "growing"];
    let count = if context.scope == Scope::Quick {
        2
    } else {
        kinds.len()
    };
    for kind in &kinds[..count] {
        let name = format!("migrate python {kind}");
        report.case(&name, || moved(context, kind));
    }
    report.case("migrate: program ends in the pre-copy", || ends(context));
}

fn moved(context: &Context, kind: &str) -> Result<String> {
    let network = Network::new(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let files = Scratch::new("script")?;
    let script = Script::start(&network.hosts.a, kind, files.path())?;
    let before = script.rounds()?;
    let receiver = mover.receive(&network)?;
    let report = mover.migrate(&network, script.pid, &receiver, &[])?;
    let left = network.hosts.a.session_of(script.pid);
    ensure!(left.is_empty(), "processes {left:?} are left on A");
    let after = script.await_rounds(10).context("on B")?;
    ensure!(after > before, "it is where it was before");
    let here = network.hosts.b.session_of(script.pid);
    ensure!(!here.is_empty(), "no process of it is on B");
    Ok(format!(
        "{} iterations, {} MB on the line, it says {:.0} ms of downtime",
        report.iterations.len(),
        report.wire_bytes / 1_000_000,
        report.downtime_ms
    ))
}

fn ends(context: &Context) -> Result<String> {
    let network = Network::new(Rate::Megabits(100))?;
    let mover = Mover::new(context)?;
    let files = Scratch::new("script")?;
    let script = Script::start(&network.hosts.a, "ending", files.path())?;
    let receiver = mover.receive(&network)?;
    let mut migrating = mover.start(&network, script.pid, &receiver, &[])?;
    migrating.await_event("progress")?;
    script.let_end()?;
    let (code, message) = migrating.wait()?.refused()?;
    let pid = script.pid.to_string();
    ensure!(
        message.contains(&pid) && message.contains("ended"),
        "the message does not say that process {pid} has ended: {message}"
    );
    mover.await_removed(&network, script.pid)?;
    Ok(format!("exit {code}: {}", message.trim()))
}
