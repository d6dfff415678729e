//! Containers of runc that are moved while clients use them, by their own runtime on both hosts.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, Report};
use crate::apt;
use crate::bench::baseline::Daemon;
use crate::crxfer::migrate::{Migrating, Migration};
use crate::crxfer::{Crxfer, Place, Receiver};
use crate::hosts::{Host, Network, Rate, Side};
use crate::run;
use crate::scratch::Scratch;
use crate::stage::Stage;
use crate::workload::Runc;

/// The container's name on both hosts.
const ID: &str = "cache";

/// Of a receiver whose guard takes its place.
const PORT: u16 = 7434;

/// How long a process may take to come to where it is killed.
const LIMIT: Duration = Duration::from_secs(30);

/// How long guards and runtimes may take after that.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

pub(super) fn cases(context: &Context, report: &mut Report) {
    if context.criu.is_none() {
        return;
    }
    let needed = [apt::RUNC, apt::MEMCACHED, apt::ARPING, apt::RSYNC, apt::NFT];
    if let Err(error) = apt::ensure(&needed) {
        return report.failed(&["runc".to_owned()], &error);
    }
    report.case("runc: a container moves with its clients", || {
        moves(context)
    });
    report.case("runc: the destination's restore fails", || {
        restore_fails(context)
    });
    report.case("runc: no bundle at the destination", || no_bundle(context));
    report.case("runc: crxfer migrate killed before the vote", || {
        killed(context, "source", "held", Side::A)
    });
    report.case("runc: crxfer migrate killed after the commit", || {
        killed(context, "source", "commit-sent", Side::B)
    });
    report.case("runc: crxfer recv killed while it builds", || {
        killed(context, "destination", "building", Side::A)
    });
    report.case("runc: crxfer recv killed after the commit", || {
        killed(context, "destination", "resuming", Side::B)
    });
}

/// A memcached in a container on A, and a place for it on B.
struct Ground<'a> {
    context: &'a Context,
    a: Runc,
    b: Runc,
    memory: Scratch,
    stage: Stage,
}

impl<'a> Ground<'a> {
    fn new(context: &'a Context) -> Result<Self> {
        let memory = Scratch::within(Path::new("/dev/shm"), "runc")?;
        let (a, b) = (
            Runc::new(memory.path(), "a")?,
            Runc::new(memory.path(), "b")?,
        );
        let start = |network: &Network, program: &Path, words: &[&str]| {
            let Network { hosts, .. } = network;
            for (host, runc) in [(&hosts.a, &a), (&hosts.b, &b)] {
                runc.bundle(ID, program, words)?;
                set_up(&context.crxfer, host)?;
            }
            a.start(&hosts.a, ID)
        };
        let stage = Stage::start_by(Rate::Megabits(1000), 60, 50, &start)?;
        Ok(Self {
            context,
            a,
            b,
            memory,
            stage,
        })
    }

    fn network(&self) -> &Network {
        &self.stage.network
    }

    fn receive(&self, crxfer: &Crxfer, more: &[&str]) -> Result<Receiver> {
        let network = self.network();
        let hooks = Migration::hooks(network);
        let listen = format!("{}:{PORT}", network.hosts.b.address);
        let mut words: Vec<&str> = hooks.iter().map(String::as_str).collect();
        words.extend(["--listen", &listen]);
        words.extend(more);
        let place = Place::On(&network.hosts.b);
        crxfer.await_migration(place, &self.memory.path().join("received"), &words)
    }

    /// One that restores with runc.
    fn receive_containers(&self, crxfer: &Crxfer) -> Result<Receiver> {
        let (bundles, root) = (text(&self.b.bundles)?, text(&self.b.root)?);
        self.receive(crxfer, &["--runc-bundles", bundles, "--runc-root", root])
    }

    fn migrate(&self, crxfer: &Crxfer, to: &Receiver) -> Result<Migrating> {
        let (state, root) = (self.memory.path().join("source"), text(&self.a.root)?);
        let words = [
            "--runc",
            ID,
            "--runc-root",
            root,
            "--tcp-established",
            "--state",
            text(&state)?,
        ];
        crxfer
            .migration(&self.network().hosts.a, to, &words)?
            .start()
    }

    /// What runc says on both hosts.
    fn ensure_listed(&self, side: Side) -> Result<()> {
        let hosts = &self.network().hosts;
        let lists = || Ok::<_, anyhow::Error>((self.a.list(&hosts.a)?, self.b.list(&hosts.b)?));
        let running = vec![(ID.to_owned(), "running".to_owned())];
        let wanted = match side {
            Side::A => (running, Vec::new()),
            Side::B => (Vec::new(), running),
        };
        let matched = run::wait_for("runc to know its containers", SETTLED_WITHIN, || {
            lists().is_ok_and(|lists| lists == wanted).then_some(())
        });
        matched.with_context(|| format!("runc has {:?}", lists()))
    }

    /// A command that stops at `point`, which it then names in a file.
    fn pausing(&self, point: &str) -> Crxfer {
        let file = self.memory.path().join("reached");
        let pause = format!("{point}:{}", LIMIT.as_millis());
        self.context
            .crxfer
            .with_env("CRXFER_PAUSE", &pause)
            .with_env("CRXFER_PAUSE_FILE", &file.display().to_string())
    }

    fn await_reached(&self) -> Result<()> {
        let file = self.memory.path().join("reached");
        run::wait_for("its point", LIMIT, || file.exists().then_some(()))
    }
}

/// runc's CRIU on `host` waits for the other host. The file with that is the host's own.
fn set_up(crxfer: &Crxfer, host: &Host) -> Result<()> {
    std::fs::create_dir_all("/etc/criu")?;
    run::quiet(
        host.command("mount")
            .args(["-t", "tmpfs", "tmpfs", "/etc/criu"]),
    )?;
    run::quiet(crxfer.command(Place::On(host)).arg("runc-setup")).map(drop)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a place with a plain name")
}

fn moves(context: &Context) -> Result<String> {
    let ground = Ground::new(context)?;
    let receiver = ground.receive_containers(&context.crxfer)?;
    let report = ground
        .migrate(&context.crxfer, &receiver)?
        .wait()?
        .migrated()
        .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
    let hosts = &ground.network().hosts;
    ground.network().withdraw(&hosts.a)?;
    ground.ensure_listed(Side::B)?;
    ensure!(
        report.method.contains("live"),
        "pre-copied by {}",
        report.method
    );
    let Ground { stage, .. } = ground;
    let seen = stage.moved()?;
    let rival = copied(context)?;
    let here = seen.downtime.ms();
    ensure!(
        here < rival,
        "{here:.0} ms without answers, by checkpoint, rsync and restore {rival:.0} ms"
    );
    Ok(format!(
        "{here:.0} ms without answers, by checkpoint, rsync and restore {rival:.0} ms; {} values compared",
        seen.compared
    ))
}

/// The same container moved by runc's own commands: a checkpoint into memory, rsync, a restore.
fn copied(context: &Context) -> Result<f64> {
    let ground = Ground::new(context)?;
    let (network, hosts) = (ground.network(), &ground.network().hosts);
    // Nobody is there to be asked.
    for host in [&hosts.a, &hosts.b] {
        let conf = host.file("/etc/criu/runc.conf".as_ref());
        std::fs::write(conf, "network-lock nftables\n")?;
    }
    let memory = &ground.memory;
    let (images, arrived) = (memory.directory("images")?, memory.directory("arrived")?);
    let daemon = Daemon::start(&hosts.b, &arrived, memory)?;
    network.prepare(&hosts.b)?;
    let begun = Instant::now();
    let options = ["--tcp-established", "--work-path"];
    let work = memory.directory("work")?;
    let image_words = ["--image-path", text(&images)?];
    let words = [
        &["checkpoint"][..],
        &image_words,
        &options,
        &[text(&work)?, ID],
    ]
    .concat();
    ground.a.run(&hosts.a, &words)?;
    daemon.copy(&hosts.a, &hosts.b, &images)?;
    let bundle = ground.b.bundles.join(ID);
    let image_words = ["--image-path", text(&arrived)?, "--bundle", text(&bundle)?];
    let words = [
        &["restore", "--detach"][..],
        &image_words,
        &options,
        &[text(&work)?, ID],
    ]
    .concat();
    let mut restore = hosts.b.command("runc");
    restore.arg("--root").arg(&ground.b.root).args(words);
    let status = restore
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()?;
    ensure!(status.success(), "runc restore: {status}");
    network.announce(&hosts.b)?;
    network.withdraw(&hosts.a)?;
    run::quiet(hosts.a.command("nft").args(["flush", "ruleset"]))?;
    let took = begun.elapsed();
    drop(daemon);
    let Ground { stage, .. } = ground;
    let seen = stage.moved()?;
    let seen = seen.downtime.ms();
    ensure!(
        seen <= took.as_secs_f64() * 1e3 + 1000.0,
        "no answers for {seen} ms"
    );
    Ok(seen)
}

fn restore_fails(context: &Context) -> Result<String> {
    let ground = Ground::new(context)?;
    let command = "runc=echo no container today; exit 3";
    let receiver = ground.receive(&context.crxfer, &["--restore-with", command])?;
    let since = ground.stage.poller.now();
    let ended = ground.migrate(&context.crxfer, &receiver)?.wait()?;
    let (code, message) = ended.refused()?;
    ensure!(
        message.contains("no container today"),
        "the reason is missing: {message}"
    );
    stayed(ground, since, &format!("exit {code}"))
}

fn no_bundle(context: &Context) -> Result<String> {
    let ground = Ground::new(context)?;
    std::fs::remove_dir_all(ground.b.bundles.join(ID))?;
    let receiver = ground.receive_containers(&context.crxfer)?;
    let since = ground.stage.poller.now();
    let ended = ground.migrate(&context.crxfer, &receiver)?.wait()?;
    let (code, message) = ended.refused()?;
    ensure!(
        message.contains("bundle"),
        "the reason is missing: {message}"
    );
    stayed(ground, since, &format!("exit {code}"))
}

/// One container runs, on A as before, with all its data.
fn stayed(ground: Ground<'_>, since: Duration, remark: &str) -> Result<String> {
    ground.ensure_listed(Side::A)?;
    let Ground { stage, .. } = ground;
    let gap = stage.stayed(since)?;
    Ok(format!("{remark}, {:.0} ms without answers", gap.ms()))
}

/// SIGKILL for one of both at `point`; the container then runs at `then`, and nowhere else.
fn killed(context: &Context, side: &str, point: &str, then: Side) -> Result<String> {
    let ground = Ground::new(context)?;
    let (paused, plain) = (ground.pausing(point), context.crxfer.clone());
    let is_source = side == "source";
    let (here, there) = if is_source {
        (&paused, &plain)
    } else {
        (&plain, &paused)
    };
    let mut receiver = ground.receive_containers(there)?;
    let since = ground.stage.poller.now();
    let migrating = ground.migrate(here, &receiver)?;
    if let Err(error) = ground.await_reached() {
        let _ = migrating.kill();
        let ended = migrating.wait()?;
        bail!("{error:#}: {}\n{}", ended.message, receiver.said());
    }
    if is_source {
        migrating.kill()?;
    } else {
        receiver.kill();
    }
    let _ = migrating.wait()?;
    match then {
        Side::A => stayed(ground, since, "it stays"),
        Side::B => {
            let network = ground.network();
            ground.ensure_listed(Side::B)?;
            network.withdraw(&network.hosts.a)?;
            let Ground { stage, .. } = ground;
            let seen = stage.moved()?;
            let gap = seen.downtime.ms();
            Ok(format!("it runs on B, after {gap:.0} ms"))
        }
    }
}
