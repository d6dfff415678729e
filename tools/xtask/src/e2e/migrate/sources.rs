//! A source that dies at a named point of the hand-over: its guard keeps the workload, or gives it away,
//! as the journal says. Clients' connections live.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::crashes::locks;
use super::held::Scene;
use super::trouble::said;
use super::{Context, Report, Scope};
use crate::run;

pub(super) fn cases(context: &Context, report: &mut Report) {
    for death in DEATHS {
        let name = format!("migrate: {} killed {}", death.who(), death.when);
        // The others wait until a dead host is noticed.
        if context.scope != Scope::Quick || death.point == "fenced" {
            report.case(&name, || died(context, death));
        }
    }
}

/// QUIC takes a silent host for gone after 15 s.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// How long the guard may take to see that it is alone and to let the workload run.
const RESUMED_WITHIN_MS: f64 = 5_000.0;

#[derive(Clone, Copy, Debug)]
struct Death {
    point: &'static str,
    when: &'static str,
    /// CRIU dies in the same moment.
    criu_too: bool,
    /// The workload was handed over.
    is_given: bool,
}

const DEATHS: [Death; 5] = [
    Death {
        point: "fenced",
        when: "behind the fence",
        criu_too: true,
        is_given: false,
    },
    Death {
        point: "before-commit-record",
        when: "before the commit",
        criu_too: false,
        is_given: false,
    },
    Death {
        point: "committed",
        when: "when it has committed",
        criu_too: false,
        is_given: true,
    },
    Death {
        point: "commit-sent",
        when: "when it has said so",
        criu_too: true,
        is_given: true,
    },
    Death {
        point: "moved",
        when: "when the copy runs",
        criu_too: false,
        is_given: true,
    },
];

impl Death {
    fn who(self) -> &'static str {
        if self.criu_too {
            "source and its CRIU"
        } else {
            "source"
        }
    }
}

fn died(context: &Context, death: Death) -> Result<String> {
    let scene = Scene::new(context)?;
    let since = scene.stage.poller.now();
    let outcome = die(&scene, death);
    outcome.with_context(|| scene.journals())?;
    if death.is_given {
        let seen = scene.stage.moved()?;
        return Ok(format!("one copy, on B, after {} ms", seen.downtime.ms()));
    }
    let gap = scene.stage.stayed(since)?.ms();
    ensure!(gap <= RESUMED_WITHIN_MS, "no answers for {gap:.0} ms");
    Ok(format!("one copy, on A, {gap:.0} ms without answers"))
}

fn die(scene: &Scene<'_>, death: Death) -> Result<()> {
    let receiver = scene.receive(None)?;
    let migrating = scene.migrate(&receiver, Some(death.point))?;
    if let Err(error) = scene.await_reached("source") {
        return Err(error.context(said(migrating, &receiver)));
    }
    let a = &scene.network().hosts.a;
    let begun = journals(scene);
    ensure!(begun.len() == 1, "journals {begun:?}");
    migrating.kill()?;
    if death.criu_too
        && let Some(pid) = criu(scene)?
    {
        // The death of its caller may have ended it.
        let _ = a.signal(pid, "KILL");
    }
    if death.is_given {
        scene.await_on_b()?;
        scene.network().withdraw(a)?;
    } else {
        scene
            .mover
            .await_removed(scene.network(), scene.stage.pid)?;
    }
    // Journal, lock and fence go last; the lock waits for the address.
    run::wait_for("the guard to be done", SETTLED_WITHIN, || {
        let is_over = journals(scene).is_empty();
        let is_open = locks(a).ok()?.is_empty() && fences(&begun).is_empty();
        (is_over && is_open).then_some(())
    })?;
    let _ = migrating.wait()?;
    Ok(())
}

/// CRIU's pid on A, as the journal has it.
fn criu(scene: &Scene<'_>) -> Result<Option<u32>> {
    let mut entries = fs::read_dir(scene.records())?;
    let Some(entry) = entries.next() else {
        return Ok(None);
    };
    let text = fs::read_to_string(entry?.path().join("journal"))?;
    let headers = text.lines().rev().filter_map(|line| line.split_once(' '));
    let headers = headers.filter_map(|(_, json)| serde_json::from_str::<Value>(json).ok());
    let mut pids = headers.filter_map(|header| header["about"]["criu"]["pid"].as_u64());
    Ok(pids.next().and_then(|pid| u32::try_from(pid).ok()))
}

/// Names of this source's journals.
fn journals(scene: &Scene<'_>) -> Vec<String> {
    let entries = fs::read_dir(scene.records())
        .into_iter()
        .flatten()
        .flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("source-")).collect()
}

/// Cgroups of these migrations that are left.
fn fences(journals: &[String]) -> Vec<String> {
    const PLACES: [&str; 3] = [
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/freezer",
    ];
    let ids = journals
        .iter()
        .filter_map(|name| name.strip_prefix("source-"));
    let all = ids.flat_map(|id| PLACES.map(|place| format!("{place}/crxfer-{id}")));
    all.filter(|path| fs::exists(path).unwrap_or(false))
        .collect()
}
