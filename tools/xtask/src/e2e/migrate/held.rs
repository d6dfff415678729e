//! A destination that dies, or cannot be reached, around the commit: the copy it has promised is there
//! when the hosts meet again, and it is the only one.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::trouble::{TCP, said};
use super::{Context, Mover, Report, Scope, diskless, small};
use crate::crxfer::Receiver;
use crate::crxfer::migrate::{Ended, Migrating};
use crate::hosts::{Network, Rate};
use crate::run;
use crate::stage::Stage;

/// How long one process may take to come to the point where it is stopped.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a source waits for its link to be cut: less than it may keep the workload frozen.
const UNTIL_CUT: Duration = Duration::from_secs(3);

/// QUIC takes a silent host for gone after 15 s; then the copy is built once more.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// For as long as nothing may happen.
const A_WHILE: Duration = Duration::from_secs(3);

pub(super) fn cases(context: &Context, report: &mut Report) {
    let quick = context.scope == Scope::Quick;
    for point in POINTS {
        for mode in ["disk", "diskless"] {
            let name = format!("migrate: destination killed when {}, {mode}", point.when);
            if !quick || point.name == "resuming" {
                report.case(&name, || killed(context, point, mode));
            }
        }
    }
    if quick {
        return;
    }
    report.case("migrate: link cut after the vote", || cut(context));
    report.case("migrate: an operator decides for a held copy", || {
        decided(context)
    });
}

/// Where a destination is killed, and what must come of it.
#[derive(Clone, Copy, Debug)]
struct Point {
    name: &'static str,
    when: &'static str,
    ends: Ends,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// The source has not committed.
    OnA,
    /// The guard knows that the copy is this host's, or hears so from the source in the place of the
    /// receiver, and lets it go.
    ByGuard,
}

const POINTS: [Point; 5] = [
    Point {
        name: "building",
        when: "it builds",
        ends: Ends::OnA,
    },
    Point {
        name: "complete",
        when: "it has all images",
        ends: Ends::OnA,
    },
    Point {
        name: "voted",
        when: "it has voted",
        ends: Ends::ByGuard,
    },
    Point {
        name: "resuming",
        when: "it lets the copy go",
        ends: Ends::ByGuard,
    },
    Point {
        name: "running",
        when: "the copy runs",
        ends: Ends::ByGuard,
    },
];

pub(super) struct Scene<'a> {
    pub(super) stage: Stage,
    pub(super) mover: Mover<'a>,
    mode: &'static str,
    /// Seconds.
    pub(super) freeze_limit: u32,
    /// For how long a destination is stopped.
    pub(super) pause: Duration,
}

impl<'a> Scene<'a> {
    pub(super) fn new(context: &'a Context) -> Result<Self> {
        Self::in_mode(context, "disk")
    }

    /// Images are kept as `--mode` has it.
    pub(super) fn in_mode(context: &'a Context, mode: &'static str) -> Result<Self> {
        Ok(Self {
            mode,
            freeze_limit: 10,
            pause: LIMIT,
            stage: small(Rate::Megabits(1000))?,
            mover: Mover::new(context)?,
        })
    }

    pub(super) fn network(&self) -> &Network {
        &self.stage.network
    }

    /// A file in which a process says that it is at its point.
    fn reached(&self, side: &str) -> PathBuf {
        self.mover.memory.path().join(format!("{side}-reached"))
    }

    pub(super) fn receive(&self, point: Option<&str>) -> Result<Receiver> {
        let crxfer = self.pausing("destination", point);
        self.mover.receive_again(&crxfer, self.network())
    }

    pub(super) fn migrate(&self, to: &Receiver, point: Option<&str>) -> Result<Migrating> {
        let crxfer = self.pausing("source", point);
        let state = self.records();
        let state = state.to_str().context("a place with a plain name")?;
        let words = [TCP, "--state", state, "--mode", self.mode];
        let limit = self.freeze_limit.to_string();
        let words = [&words[..], &["--freeze-limit", &limit]].concat();
        crxfer
            .migrate(&self.network().hosts.a, self.stage.pid, to, &words)?
            .start()
    }

    /// The source's journals.
    pub(super) fn records(&self) -> PathBuf {
        self.mover.memory.path().join("source")
    }

    fn pausing(&self, side: &str, point: Option<&str>) -> crate::crxfer::Crxfer {
        let crxfer = &self.mover.context.crxfer;
        let file = self.reached(side);
        let pause = if side == "source" {
            UNTIL_CUT
        } else {
            self.pause
        };
        match point {
            None => crxfer.clone(),
            Some(point) => crxfer
                .with_env("CRXFER_PAUSE", &format!("{point}:{}", pause.as_millis()))
                .with_env("CRXFER_PAUSE_FILE", &file.display().to_string()),
        }
    }

    pub(super) fn await_reached(&self, side: &str) -> Result<()> {
        let file = self.reached(side);
        run::wait_for(&format!("the {side}'s point"), LIMIT, || {
            file.exists().then_some(())
        })
    }

    /// Waits until the workload answers on B, and on no other host.
    pub(super) fn await_on_b(&self) -> Result<()> {
        run::wait_for("the copy on B", SETTLED_WITHIN, || {
            self.stage.ensure_at(crate::hosts::Side::B).ok()
        })
    }

    /// Nothing of the migration is left on the destination but what may answer a source.
    fn ensure_tidy(&self) -> Result<()> {
        run::wait_for("no images", SETTLED_WITHIN, || {
            self.mover.unfinished().is_empty().then_some(())
        })
    }

    /// What the journals say, for errors.
    pub(super) fn journals(&self) -> String {
        let places = [
            self.mover.received().join(".crxfer/state"),
            self.mover.memory.path().join("source"),
        ];
        let mut text = String::new();
        for place in places {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                let path = match entry.path().join("journal") {
                    journal if journal.exists() => journal,
                    _ => entry.path(),
                };
                let said = fs::read_to_string(&path).unwrap_or_default();
                let states = said.lines().filter(|line| !line.contains("\"about\""));
                let states: Vec<_> = states.collect();
                text.push_str(&format!("{}:\n{}\n", path.display(), states.join("\n")));
            }
        }
        text
    }
}

fn killed(context: &Context, point: Point, mode: &'static str) -> Result<String> {
    let scene = Scene::in_mode(context, mode)?;
    let outcome = kill(&scene, point);
    let outcome = outcome.with_context(|| scene.journals())?;
    diskless::ensure_nothing_held(scene.network())?;
    match point.ends {
        Ends::OnA => {
            scene.stage.stayed(outcome)?;
            Ok("the workload stays on A".to_owned())
        }
        Ends::ByGuard => {
            let seen = scene.stage.moved()?;
            Ok(format!("one copy, on B, after {} ms", seen.downtime.ms()))
        }
    }
}

fn kill(scene: &Scene<'_>, point: Point) -> Result<Duration> {
    let mut receiver = scene.receive(Some(point.name))?;
    let since = scene.stage.poller.now();
    let migrating = scene.migrate(&receiver, None)?;
    if let Err(error) = scene.await_reached("destination") {
        return Err(error.context(said(migrating, &receiver)));
    }
    receiver.kill();
    if point.ends == Ends::ByGuard {
        run::wait_for("the guard's copy", SETTLED_WITHIN, || {
            let b = &scene.network().hosts.b;
            b.listens_on(crate::workload::Memcached::PORT).then_some(())
        })?;
    } else {
        // Nobody has said that it is this host's.
        std::thread::sleep(A_WHILE);
        let b = &scene.network().hosts.b;
        ensure!(
            !b.listens_on(crate::workload::Memcached::PORT),
            "a copy listens on B"
        );
    }
    let receiver = scene.receive(None)?;
    let ended = migrating.wait()?;
    match point.ends {
        Ends::OnA => {
            let (_, message) = ended.refused()?;
            ensure!(!message.is_empty(), "no reason was given");
            scene
                .mover
                .await_removed(scene.network(), scene.stage.pid)?;
        }
        Ends::ByGuard => {
            ensure_migrated(&ended, &receiver)?;
            scene.network().withdraw(&scene.network().hosts.a)?;
            scene.await_on_b()?;
            scene.ensure_tidy()?;
        }
    }
    Ok(since)
}

/// Its report lacks what was lost with the connection, such as the downtime.
pub(super) fn ensure_migrated(ended: &Ended, receiver: &Receiver) -> Result<()> {
    ensure!(
        ended.code == Some(0),
        "crxfer migrate ended with {:?}: {}; crxfer recv said:\n{}",
        ended.code,
        ended.message,
        receiver.said()
    );
    Ok(())
}

/// The link between the two hosts, up or down.
fn link(scene: &Scene<'_>, state: &str) -> Result<()> {
    let b = &scene.network().hosts.b;
    let mut command = b.command("ip");
    run::quiet(command.args(["link", "set", "eth0", state])).map(drop)
}

fn cut(context: &Context) -> Result<String> {
    let scene = Scene::new(context)?;
    let outcome = cut_link(&scene);
    outcome.with_context(|| scene.journals())?;
    let seen = scene.stage.moved()?;
    Ok(format!("one copy, on B, after {} ms", seen.downtime.ms()))
}

fn cut_link(scene: &Scene<'_>) -> Result<()> {
    let receiver = scene.receive(None)?;
    let migrating = hold(scene, &receiver)?;
    // CRIU holds it with its sockets open: that it does not run shows in what was recorded.
    ensure!(
        !scene.journals().contains("resuming"),
        "a copy runs that nobody asked for"
    );
    link(scene, "up")?;
    ensure_migrated(&migrating.wait()?, &receiver)?;
    scene.network().withdraw(&scene.network().hosts.a)?;
    scene.await_on_b()?;
    scene.ensure_tidy()
}

/// The source has recorded the commit and cannot say so: the link is down, and both know.
fn hold(scene: &Scene<'_>, receiver: &Receiver) -> Result<Migrating> {
    let migrating = scene.migrate(receiver, Some("committed"))?;
    if let Err(error) = scene.await_reached("source") {
        return Err(error.context(said(migrating, receiver)));
    }
    link(scene, "down")?;
    run::wait_for("the destination to hold", SETTLED_WITHIN, || {
        receiver.said().contains("\"holding\"").then_some(())
    })?;
    std::thread::sleep(A_WHILE);
    Ok(migrating)
}

fn decided(context: &Context) -> Result<String> {
    let scene = Scene::new(context)?;
    let outcome = decide(&scene);
    let text = outcome.with_context(|| scene.journals())?;
    scene.stage.moved()?;
    Ok(text)
}

fn decide(scene: &Scene<'_>) -> Result<String> {
    let receiver = scene.receive(None)?;
    let migrating = hold(scene, &receiver)?;
    let place = scene.mover.received().join(".crxfer/state");
    let place = place.to_str().context("a place with a plain name")?;
    // The receiver lives, and does what it finds decided.
    let crxfer = &scene.mover.context.crxfer;
    let said = crxfer.run(&["recover", "--keep-destination", "--state", place])?;
    run::wait_for("the copy on B", SETTLED_WITHIN, || {
        scene.journals().contains("running").then_some(())
    })?;
    link(scene, "up")?;
    ensure_migrated(&migrating.wait()?, &receiver)?;
    scene.network().withdraw(&scene.network().hosts.a)?;
    // Its hook said so while nobody could hear it.
    scene.network().announce(&scene.network().hosts.b)?;
    scene.await_on_b()?;
    scene.ensure_tidy()?;
    Ok(run::last_lines(&said, 1))
}
