//! Migrations that succeed: a client's connections survive, and what a store acknowledged is there.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Context, Mover, Report, mib};
use crate::client::{Connections, Download, Poller, Protocol, Question, Writer};
use crate::hosts::{Network, Rate, Side};
use crate::run;
use crate::scratch::Scratch;
use crate::stage::Stage;
use crate::workload::{BusyTree, Echo, Redis, Streaming, Values, Workload};

pub(super) fn cases(context: &Context, report: &mut Report) {
    report.case("migrate memcached", || memcached(context));
    report.case("migrate redis under writes", || redis(context));
    report.case("migrate nginx stream", || nginx(context));
    report.case("migrate 500 connections", || connections(context));
    report.case("migrate tree", || tree(context));
    report.case("migrate with clocks 3 s apart", || clocks(context));
}

fn memcached(context: &Context) -> Result<String> {
    // Of the pre-copy, which must not stop anyone; a busy machine stops a client by itself.
    const NOT_STOPPED_MS: f64 = 150.0;
    let stage = Stage::start(Rate::Megabits(1000), mib(context), 50)?;
    let mover = Mover::new(context)?;
    let receiver = mover.receive(&stage.network)?;
    let begin = stage.poller.now();
    let report = mover.migrate(&stage.network, stage.pid, &receiver, &["--tcp-established"])?;
    let direct = stage.poller.direct();
    let seen = stage.moved()?;
    report.ensure_plausible(seen.downtime.ms())?;
    let earlier = direct.longest_gap(begin, seen.downtime.begin).ms();
    ensure!(
        earlier <= NOT_STOPPED_MS,
        "no answer for {earlier:.0} ms before the freeze"
    );
    ensure!(
        report.iterations.len() >= 2,
        "only {} iterations",
        report.iterations.len()
    );
    Ok(format!(
        "{:.0} ms without answers (it says {:.0}), {earlier:.0} ms before, {} iterations, {} values right after {} writes, the slowest {:.0} ms",
        seen.downtime.ms(),
        report.downtime_ms,
        report.iterations.len(),
        seen.compared,
        seen.writes,
        seen.slowest_write.as_secs_f64() * 1e3
    ))
}

fn redis(context: &Context) -> Result<String> {
    const QUESTION: Question = Question::Tcp {
        port: Redis::PORT,
        text: "*1\r\n$4\r\nPING\r\n",
        answer: "+PONG\r\n",
    };
    let network = Network::new(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let mut redis = Redis::serving(Values::new(3000, 20_000));
    let pid = redis.start(&network.hosts.a)?;
    let poller = Poller::start(&network, QUESTION)?;
    let writer = Writer::start(&network.c, Protocol::Redis, redis.values.clone(), 200)?;
    let receiver = mover.receive(&network)?;
    // The poller's connections may wait for redis to take them, which CRIU refuses otherwise.
    let options = ["--tcp-established", "--skip-in-flight"];
    let report = mover.migrate(&network, pid, &receiver, &options)?;
    poller.ensure_only(Side::B)?;
    ensure!(
        !network.hosts.a.listens_on(Redis::PORT),
        "redis still listens on A"
    );
    let downtime = poller.service().handover()?.ms();
    report.ensure_plausible(downtime)?;
    let written = writer.finish()?;
    redis.values = written.values;
    let compared = redis.check(&network.hosts.b)?;
    poller.finish()?;
    Ok(format!(
        "{downtime:.0} ms without answers, {compared} values right after {} writes",
        written.acknowledged
    ))
}

fn nginx(context: &Context) -> Result<String> {
    const BYTES: usize = 24 << 20;
    const RATE: usize = 3 << 20;
    const SHORT: Question = Question::Tcp {
        port: Streaming::PORT,
        text: "GET /here HTTP/1.0\r\n\r\n",
        answer: "here",
    };
    let network = Network::new(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let files = Scratch::new("stream")?;
    let nginx = Streaming::start(&network.hosts.a, files.path(), BYTES, RATE)?;
    let download = Download::start(&network.c, Streaming::PORT, Streaming::FILE)?;
    run::wait_for("the stream to flow", Duration::from_secs(10), || {
        (download.arrived() > BYTES as u64 / 10).then_some(())
    })?;
    let receiver = mover.receive(&network)?;
    mover.migrate(&network, nginx.pid, &receiver, &["--tcp-established"])?;
    let arrived = download.arrived();
    ensure!(
        arrived < BYTES as u64 * 9 / 10,
        "the stream was over before the move was"
    );
    ensure!(
        !network.hosts.a.listens_on(Streaming::PORT),
        "nginx still listens on A"
    );
    let downloaded = download.wait()?;
    ensure!(
        downloaded.digest == nginx.digest,
        "the {} bytes that came differ from the file",
        downloaded.bytes
    );
    let poller = Poller::start(&network, SHORT).context("a new client")?;
    poller.ensure_only(Side::B)?;
    poller.finish()?;
    Ok(format!(
        "{} of {} MiB before the move, the longest pause {:.0} ms",
        arrived >> 20,
        downloaded.bytes >> 20,
        downloaded.longest_pause.as_secs_f64() * 1e3
    ))
}

fn connections(context: &Context) -> Result<String> {
    const COUNT: usize = 500;
    let network = Network::new(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let pid = Echo::start(&network.hosts.a)?;
    let mut connections = Connections::open(&network.c, COUNT)?;
    let receiver = mover.receive(&network)?;
    let report = mover.migrate(&network, pid, &receiver, &["--tcp-established"])?;
    connections.ask().context("after the move")?;
    connections.ask().context("once more")?;
    let [at_a, at_b] = [&network.hosts.a, &network.hosts.b].map(|h| h.listens_on(Echo::PORT));
    ensure!(!at_a && at_b, "on A {at_a}, on B {at_b}");
    Ok(format!("it says {:.0} ms of downtime", report.downtime_ms))
}

fn tree(context: &Context) -> Result<String> {
    let network = Network::new(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let files = Scratch::new("tree")?;
    let tree = BusyTree::start(&network.hosts.a, files.path().to_owned())?;
    let before = tree.check(&network.hosts.a)?;
    let receiver = mover.receive(&network)?;
    let report = mover.migrate(&network, tree.pid(), &receiver, &[])?;
    tree.ensure_gone(&network.hosts.a)?;
    let after = tree.check(&network.hosts.b)?;
    ensure!(
        after.rounds > before.rounds,
        "the tree is where it was before: {before:?}, {after:?}"
    );
    // It goes on changing, and stays right.
    let later = tree.check(&network.hosts.b)?;
    ensure!(later.rounds > after.rounds, "the tree stands still");
    Ok(format!(
        "{} pages right, it says {:.0} ms of downtime",
        later.pages, report.downtime_ms
    ))
}

fn clocks(context: &Context) -> Result<String> {
    const SHIFT_MS: f64 = 3000.0;
    let stage = super::small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let shifted = context.crxfer.with_env("CRXFER_CLOCK_SHIFT_MS", "3000");
    let hooks = crate::crxfer::migrate::Migration::hooks(&stage.network);
    let hooks: Vec<&str> = hooks.iter().map(String::as_str).collect();
    let place = crate::crxfer::Place::On(&stage.network.hosts.b);
    let receiver = shifted.await_migration(place, &mover.received(), &hooks)?;
    let report = mover.migrate(&stage.network, stage.pid, &receiver, &["--tcp-established"])?;
    let seen = stage.moved()?;
    report.ensure_plausible(seen.downtime.ms())?;
    let offset = report.clock_offset_ms.context("no clock_offset_ms")?;
    let error = report.clock_error_ms.context("no clock_error_ms")?;
    ensure!(
        (0.0..100.0).contains(&error),
        "an error of {error} ms is not believed"
    );
    ensure!(
        (offset.abs() - SHIFT_MS).abs() <= error + 1.0,
        "the clocks are {SHIFT_MS} ms apart, it says {offset} ms with an error of {error} ms"
    );
    Ok(format!("{offset:.2} ms, at most {error:.2} ms wrong"))
}
