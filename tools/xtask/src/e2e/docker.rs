//! Docker containers that are moved between two daemons while clients use them, and moves that fail.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, Report, Scope};
use crate::apt;
use crate::crxfer::migrate::{Ended, Migrating, Migration, Report as Moved};
use crate::crxfer::{Crxfer, Place, Receiver};
use crate::docker::{self, Counter, Daemon, Daemons};
use crate::hosts::{Host, Network, Rate, Side};
use crate::run;
use crate::scratch::Scratch;
use crate::stage::Stage;

/// The container's name on both hosts.
const NAME: &str = "store";

/// A receiver that is started again must be found where the first one was.
const PORT: u16 = 7434;

/// What the container on A starts with: the move must not end in two because of it.
const RESTART: &str = "--restart=always";

pub(super) fn cases(context: &Context, report: &mut Report) {
    if context.criu.is_none() {
        return;
    }
    let needed = [apt::MEMCACHED, apt::ARPING, apt::DOCKER, apt::NODE];
    if let Err(error) = apt::ensure(&needed) {
        return report.failed(&["docker".to_owned()], &error);
    }
    report.case("docker: memcached keeps its data", || memcached(context));
    if context.scope == Scope::Quick {
        return;
    }
    report.case("docker: a Node.js counter keeps its count", || {
        counter(context)
    });
    report.case("docker: no such image on the destination", || {
        without_image(context)
    });
    if context.scope < Scope::All {
        return;
    }
    for fault in FAULTS {
        report.case(&format!("docker: {}", fault.name()), || {
            struck(context, fault)
        });
    }
}

/// Two hosts with a daemon each, a memcached in a container on A, and its clients on C.
struct Ground<'a> {
    context: &'a Context,
    stage: Stage,
    daemons: Daemons,
    memory: Scratch,
}

impl<'a> Ground<'a> {
    fn new(context: &'a Context, rate: Rate) -> Result<Self> {
        let (stage, daemons) = docker::serving(NAME, rate, 60, 50, &[RESTART])?;
        Ok(Self {
            context,
            stage,
            daemons,
            memory: Scratch::within(Path::new("/dev/shm"), "docker")?,
        })
    }

    fn network(&self) -> &Network {
        &self.stage.network
    }

    fn host(&self, side: Side) -> &Host {
        self.network().host(side)
    }

    fn daemon(&self, side: Side) -> &Daemon {
        match side {
            Side::A => &self.daemons.a,
            Side::B => &self.daemons.b,
        }
    }

    fn directory(&self, name: &str) -> String {
        self.memory.path().join(name).display().to_string()
    }

    /// Starts the destination on B, again where it was killed.
    fn receive(&self, crxfer: &Crxfer) -> Result<Receiver> {
        receive(crxfer, self.network(), &self.daemons, &self.memory)
    }

    fn start(&self, crxfer: &Crxfer, to: &Receiver) -> Result<Migrating> {
        let state = self.directory("state");
        self.daemons
            .a
            .migration(self.host(Side::A), crxfer, NAME, to)
            .with(&["--state", &state])
            .start()
    }

    /// The container runs on `side` and not on the other, as both daemons have it.
    fn ensure_daemons(&self, side: Side) -> Result<()> {
        for other in [Side::A, Side::B] {
            let running = self.daemon(other).running(self.host(other))?;
            let wanted: &[&str] = if other == side { &[NAME] } else { &[] };
            ensure!(running == wanted, "on {other:?} Docker runs {running:?}");
        }
        let template = "{{.HostConfig.RestartPolicy.Name}}";
        let policy = self.daemon(side).inspect(self.host(side), NAME, template)?;
        ensure!(policy == "always", "its restart policy is {policy} now");
        Ok(())
    }

    /// Lines that nobody takes away again would turn up in every other dump.
    fn ensure_tidy(&self) -> Result<()> {
        for side in [Side::A, Side::B] {
            let conf = self.host(side).file(Path::new("/etc/criu/runc.conf"));
            let text = fs::read_to_string(conf).unwrap_or_default();
            ensure!(
                text.trim().is_empty(),
                "runc.conf on {side:?} still has:\n{text}"
            );
        }
        Ok(())
    }
}

fn receive(
    crxfer: &Crxfer,
    network: &Network,
    daemons: &Daemons,
    memory: &Scratch,
) -> Result<Receiver> {
    let mut words = Migration::hooks(network);
    words.extend(daemons.b.restore_options());
    words.push("--listen".to_owned());
    words.push(format!("{}:{PORT}", network.hosts.b.address));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let place = Place::On(&network.hosts.b);
    crxfer.await_migration(place, &memory.path().join("received"), &words)
}

/// What it reports, or what both sides said.
fn moved(ended: Ended, receiver: &Receiver) -> Result<Moved> {
    ended
        .migrated()
        .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))
}

fn memcached(context: &Context) -> Result<String> {
    let ground = Ground::new(context, Rate::Megabits(1000))?;
    let receiver = ground.receive(&context.crxfer)?;
    let ended = ground.start(&context.crxfer, &receiver)?.wait()?;
    let report = moved(ended, &receiver)?;
    ground.network().withdraw(ground.host(Side::A))?;
    ground.ensure_daemons(Side::B)?;
    ground.ensure_tidy()?;
    let names = ground.daemons.a.docker(
        ground.host(Side::A),
        &["ps", "-a", "--format", "{{.Names}}"],
    )?;
    ensure!(
        names.starts_with(&format!("{NAME}-moved-")),
        "the container on A is named {names}"
    );
    let seen = ground.stage.moved()?;
    report.ensure_plausible(seen.downtime.ms())?;
    Ok(format!(
        "{:.0} ms without answers, {} values compared",
        seen.downtime.ms(),
        seen.compared
    ))
}

fn counter(context: &Context) -> Result<String> {
    let network = Network::new(Rate::Megabits(1000))?;
    let daemons = Daemons::start(&network)?;
    // The daemons go last: what containers leave behind can be removed when their hosts have ended.
    let both = (network, daemons);
    let (network, daemons) = &both;
    let memory = Scratch::within(Path::new("/dev/shm"), "docker")?;
    let program = run::find_program("node").context("Node.js is not installed")?;
    let file = [(Counter::FILE, Counter::SOURCE)];
    daemons.import(network, "counter:1", &program, &file)?;
    let (program, file) = (program.display().to_string(), format!("/{}", Counter::FILE));
    let (a, b) = (&network.hosts.a, &network.hosts.b);
    daemons
        .a
        .run(a, "counter", &[], "counter:1", &[&program, &file])?;
    let mut client = Counter::connect(&network.c)?;
    client.count(100)?;
    let receiver = receive(&context.crxfer, network, daemons, &memory)?;
    let migrating = daemons
        .a
        .migration(a, &context.crxfer, "counter", &receiver)
        .start()?;
    moved(migrating.wait()?, &receiver)?;
    network.withdraw(a)?;
    let count = client.count(100)?;
    ensure!(daemons.a.running(a)?.is_empty(), "it still runs on A");
    ensure!(daemons.b.running(b)? == ["counter"], "it does not run on B");
    Ok(format!("counted to {count} over one connection"))
}

fn without_image(context: &Context) -> Result<String> {
    let ground = Ground::new(context, Rate::Megabits(1000))?;
    let image = ["rmi", docker::STORE];
    ground.daemons.b.docker(ground.host(Side::B), &image)?;
    let receiver = ground.receive(&context.crxfer)?;
    let since = ground.stage.poller.now();
    let ended = ground.start(&context.crxfer, &receiver)?.wait()?;
    let (code, message) = ended.refused()?;
    ensure!(
        message.contains("No such image"),
        "the message does not name the image: {message}"
    );
    ground.ensure_daemons(Side::A)?;
    ground.ensure_tidy()?;
    let gap = ground.stage.stayed(since)?.ms();
    Ok(format!("exit {code}, {gap:.0} ms without answers"))
}

/// What is killed, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    SourceInPrecopy,
    /// Before the destination has voted.
    SourceInFreeze,
    DestinationBuilding,
    DestinationVoted,
    /// The daemon that restores, with its containerd.
    Dockerd,
    /// CRIU, as it restores.
    Criu,
}

const FAULTS: [Fault; 6] = [
    Fault::SourceInPrecopy,
    Fault::SourceInFreeze,
    Fault::DestinationBuilding,
    Fault::DestinationVoted,
    Fault::Dockerd,
    Fault::Criu,
];

/// How long a migration may take to come to the moment.
const LIMIT: Duration = Duration::from_secs(60);

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::SourceInPrecopy => "crxfer migrate killed in the pre-copy",
            Self::SourceInFreeze => "crxfer migrate killed in the freeze",
            Self::DestinationBuilding => "crxfer recv killed while it builds the copy",
            Self::DestinationVoted => "crxfer recv killed after its vote",
            Self::Dockerd => "dockerd killed while it restores",
            Self::Criu => "CRIU killed while it restores",
        }
    }

    /// The point at which one side of crxfer is to be stopped for a while.
    fn points(self) -> [Option<&'static str>; 2] {
        match self {
            Self::SourceInPrecopy => [Some("iterating"), None],
            Self::SourceInFreeze => [Some("held"), None],
            Self::DestinationVoted => [None, Some("voted")],
            Self::DestinationBuilding | Self::Dockerd | Self::Criu => [None, None],
        }
    }
}

fn struck(context: &Context, fault: Fault) -> Result<String> {
    let ground = Ground::new(context, Rate::Megabits(1000))?;
    let point = ground.memory.path().join("point");
    let paused = |point_of_side: Option<&str>| match point_of_side {
        Some(name) => context
            .crxfer
            .with_env("CRXFER_PAUSE", &format!("{name}:2000"))
            .with_env("CRXFER_PAUSE_FILE", &point.display().to_string()),
        None => context.crxfer.clone(),
    };
    let [source, destination] = fault.points().map(paused);
    let mut receiver = ground.receive(&destination)?;
    let since = ground.stage.poller.now();
    let mut migrating = ground.start(&source, &receiver)?;
    let at = run::wait_for("the moment", LIMIT, || match fault.points() {
        [None, None] => restoring(&ground).map(drop),
        _ => point.exists().then_some(()),
    });
    if let Err(error) = at {
        let ended = migrating.wait();
        bail!(
            "{error:#}: {ended:?}; crxfer recv said:\n{}",
            receiver.said()
        );
    }
    strike(&ground, fault, &mut migrating, &mut receiver)?;
    let ended = migrating.wait()?;
    let (side, log) = settle(&ground, receiver)?;
    // Of use where both, crxfer and the script, were killed.
    let mut clean = ground
        .daemon(Side::A)
        .script(ground.host(Side::A), &context.crxfer);
    run::quiet(clean.args(["clean", "--", "--state", &ground.directory("state")]))?;
    let checked = || -> Result<String> {
        ground.ensure_tidy()?;
        let gap = ground.stage.poller.direct();
        let gap = gap.longest_gap(since, ground.stage.poller.now()).ms();
        match side {
            Side::A => ground.stage.ensure_stayed(since).map(drop)?,
            Side::B => ground.stage.poller.ensure_only(Side::B)?,
        }
        ground.ensure_daemons(side)?;
        Ok(format!("it runs on {side:?}, {gap:.0} ms without answers"))
    };
    let remark = checked().with_context(|| format!("{ended:?}\n{log}"))?;
    match side {
        Side::A => ground.stage.stayed(since).map(drop)?,
        Side::B => ground.stage.moved().map(drop)?,
    }
    Ok(remark)
}

fn strike(
    ground: &Ground<'_>,
    fault: Fault,
    migrating: &mut Migrating,
    receiver: &mut Receiver,
) -> Result<()> {
    let b = ground.host(Side::B);
    match fault {
        Fault::SourceInPrecopy | Fault::SourceInFreeze => {
            // The script and what it started: as a power cut would, but the container.
            let script = migrating.process()?;
            let crxfer = crate::hosts::only_child(u32::try_from(script)?)?;
            crate::hosts::kill(script);
            crate::hosts::kill(crxfer);
        }
        Fault::DestinationBuilding | Fault::DestinationVoted => receiver.kill(),
        Fault::Criu => {
            // runc first asks a CRIU that ends at once what it can do.
            run::wait_for("a CRIU to kill", Duration::from_secs(5), || {
                b.signal(restoring(ground)?, "KILL").ok()
            })?;
        }
        Fault::Dockerd => {
            b.signal(ground.daemons.b.pid()?, "KILL")?;
            run::wait_for("dockerd to end", Duration::from_secs(10), || {
                named(b, "dockerd").is_none().then_some(())
            })?;
            ground.daemons.b.start(b)?;
            ground.daemons.b.await_answer(b)?;
        }
    }
    Ok(())
}

/// The CRIU that runc has on B.
fn restoring(ground: &Ground<'_>) -> Option<u32> {
    if !ground.daemons.b.has_containers() {
        return None;
    }
    process(ground.host(Side::B), "cmdline", "\0swrk\0")
}

/// A process of `host` by its name.
fn named(host: &Host, name: &str) -> Option<u32> {
    process(host, "comm", &format!("{name}\n"))
}

/// A process of `host` whose `file` has this text.
fn process(host: &Host, file: &str, text: &str) -> Option<u32> {
    let processes = fs::read_dir(host.file(Path::new("/proc"))).ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let file = host.file(Path::new(&format!("/proc/{pid}/{file}")));
        fs::read_to_string(file).is_ok_and(|found| found.contains(text))
    })
}

/// Has both hosts finish what was interrupted, as an operator would. Says where it runs then.
fn settle(ground: &Ground<'_>, mut receiver: Receiver) -> Result<(Side, String)> {
    if !receiver.is_running() {
        receiver = ground.receive(&ground.context.crxfer)?;
    }
    let mut log = String::new();
    let place = run::wait_for("both hosts to finish", LIMIT, || {
        let mut is_quiet = true;
        for side in [Side::A, Side::B] {
            let (is_done, said) =
                recover(ground, side).unwrap_or_else(|error| (false, format!("{error:#}")));
            is_quiet &= is_done;
            log = format!("{log}{side:?}: {said}\n");
        }
        let sides = [Side::A, Side::B].into_iter().filter(|side| {
            let host = ground.host(*side);
            host.listens_on(crate::workload::Memcached::PORT)
        });
        let sides: Vec<Side> = sides.collect();
        (is_quiet && sides.len() == 1).then(|| sides[0])
    });
    let side = place
        .with_context(|| format!("{}\nrecv: {}", run::last_lines(&log, 20), receiver.said()))?;
    if side == Side::B {
        ground.network().withdraw(ground.host(Side::A))?;
    }
    Ok((side, log))
}

/// Runs `crxfer recover`: whether nothing is left to do there, and what it said.
fn recover(ground: &Ground<'_>, side: Side) -> Result<(bool, String)> {
    const FINISHED: [&str; 5] = ["kept", "moved", "running", "removed", "over"];
    let place = match side {
        Side::A => ["--state".to_owned(), ground.directory("state")],
        Side::B => ["--dir".to_owned(), ground.directory("received")],
    };
    let mut command = ground.context.crxfer.command(Place::On(ground.host(side)));
    command
        .args(["recover", "--json", "--wait", "3"])
        .args(place);
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut outcomes = lines.filter(|line| line["event"] == "outcome");
    let is_done = outcomes.all(|line| FINISHED.iter().any(|outcome| line["outcome"] == *outcome));
    Ok((is_done, run::said(&output)))
}
