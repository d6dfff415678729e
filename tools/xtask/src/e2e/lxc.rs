//! LXC containers that move: crxfer carries them, liblxc dumps and restores them by its own rules.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Context, Report};
use crate::apt;
use crate::client::{Download, Poller};
use crate::hosts::{Network, Rate, Side};
use crate::lxc::{self, Container, Ground, Kind, VIDEO_PORT};
use crate::run;
use crate::scratch::Scratch;

/// 15 s of the video: longer than a move takes.
const VIDEO_BYTES: usize = 3_000_000;
/// Hosts of a container that stayed, where it is counted from 1.
const ONE_HOST: usize = 1;
const TWO_HOSTS: usize = 2;
/// How long a container may stand still for a move that came to nothing, on a busy machine.
const RESUMED_WITHIN: Duration = Duration::from_secs(5);

pub(super) fn cases(context: &Context, report: &mut Report) {
    if context.criu.is_none() {
        return;
    }
    let missing = apt::ensure(&lxc::PACKAGES).and_then(|()| apt::ensure(&[apt::ARPING]));
    if let Err(error) = missing {
        return report.failed(&["lxc".to_owned()], &error);
    }
    report.case("lxc: lxc-checkpoint alone moves a container", plain);
    report.case("lxc: blank container moves", || blank(context));
    report.case("lxc: video container moves, its client streams on", || {
        video(context)
    });
    report.case("lxc: recv without --restore-with refuses", || {
        not_offered(context)
    });
    report.case("lxc: container not known on the destination", || {
        refused(context)
    });
    report.case("lxc: source killed before the vote", || killed(context));
}

fn ground(context: &Context, kind: Kind) -> Result<Ground<'_>> {
    Ground::new(&context.crxfer, kind, Rate::Megabits(1000), VIDEO_BYTES)
}

/// LXC's own tool on the same ground: what is wrong here is not crxfer's fault.
fn plain() -> Result<String> {
    let container = Container::new(Kind::Blank, 0)?;
    let network = Network::new(Rate::Megabits(1000))?;
    let memory = Scratch::within(Path::new("/dev/shm"), "lxc")?;
    let hosts = &network.hosts;
    container.start(&hosts.a)?;
    let images = memory.directory("images")?;
    container.checkpoint(&hosts.a, &images, true)?;
    container.restore(&hosts.b, &images)?;
    container.ensure_only(&hosts.b, &hosts.a)?;
    let ticks = goes_on(&container)?;
    ticks.ensure_one_writer(TWO_HOSTS)?;
    Ok(format!("{:.0} ms without a tick", ms(ticks.longest_gap(0))))
}

/// Waits until the blank container has noted more than it has now, and gives all of it.
fn goes_on(container: &Container) -> Result<lxc::Ticks> {
    let before = container.ticks()?.len();
    run::wait_for("the container to go on", Duration::from_secs(10), || {
        container
            .ticks()
            .ok()
            .filter(|now| now.len() > before + 100)
    })
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn blank(context: &Context) -> Result<String> {
    let ground = ground(context, Kind::Blank)?;
    let receiver = ground.receive_with(&ground.restore_command())?;
    let report = ground.migrate(&receiver)?;
    ground.ensure_on(Side::B)?;
    let ticks = goes_on(&ground.container)?;
    ticks.ensure_one_writer(TWO_HOSTS)?;
    let downtime = ms(ticks.longest_gap(0));
    report.ensure_plausible(downtime)?;
    Ok(format!(
        "{downtime:.0} ms without a tick (it says {:.0}), {} ticks in order",
        report.downtime_ms,
        ticks.len()
    ))
}

fn video(context: &Context) -> Result<String> {
    let ground = ground(context, Kind::Video)?;
    let client = &ground.network.c;
    let download = Download::start(client, VIDEO_PORT, lxc::VIDEO)?;
    run::wait_for("the video to flow", Duration::from_secs(10), || {
        (download.arrived() > VIDEO_BYTES as u64 / 20).then_some(())
    })?;
    let poller = Poller::start(&ground.network, lxc::QUESTION)?;
    let receiver = ground.receive_with(&ground.restore_command())?;
    ground.migrate(&receiver)?;
    let arrived = download.arrived();
    ensure!(
        arrived < VIDEO_BYTES as u64 * 9 / 10,
        "the video was over before the move was"
    );
    ground.ensure_on(Side::B)?;
    poller.ensure_only(Side::B)?;
    let downtime = poller.service().handover()?.ms();
    poller.finish()?;
    let downloaded = download.wait()?;
    ensure!(
        Some(downloaded.digest) == ground.container.digest,
        "the {} bytes that came differ from the video",
        downloaded.bytes
    );
    Ok(format!(
        "{downtime:.0} ms without answers, {} of {} KB came before the end of the move, the longest pause {:.0} ms",
        arrived / 1000,
        downloaded.bytes / 1000,
        ms(downloaded.longest_pause)
    ))
}

/// The container runs on A as before, from note number `since` on never still for long.
fn ensure_stayed(ground: &Ground<'_>, since: usize) -> Result<Duration> {
    ground.ensure_on(Side::A)?;
    let ticks = goes_on(&ground.container)?;
    ticks.ensure_one_writer(ONE_HOST)?;
    let gap = ticks.longest_gap(since);
    ensure!(gap <= RESUMED_WITHIN, "it stood still for {gap:?}");
    Ok(gap)
}

fn not_offered(context: &Context) -> Result<String> {
    let ground = ground(context, Kind::Blank)?;
    let receiver = ground.receive(&[])?;
    let since = ground.container.ticks()?.len();
    let (code, message) = ground.start(&receiver)?.wait()?.refused()?;
    ensure!(
        message.contains("lxc"),
        "the message does not name the runtime: {message}"
    );
    let gap = ensure_stayed(&ground, since)?;
    Ok(format!("exit {code}, {:.0} ms without a tick", ms(gap)))
}

/// The destination learns only when it is to restore that it cannot, and says no; then it can.
fn refused(context: &Context) -> Result<String> {
    let ground = ground(context, Kind::Blank)?;
    let wrong = format!("{} nobody", ground.restore_command());
    let receiver = ground.receive_with(&wrong)?;
    let since = ground.container.ticks()?.len();
    let (code, message) = ground.start(&receiver)?.wait()?.refused()?;
    ensure!(
        message.contains("there is no container nobody"),
        "the message does not say what is wrong: {message}"
    );
    let gap = ensure_stayed(&ground, since)?;
    drop(receiver);
    let receiver = ground.receive_with(&ground.restore_command())?;
    ground.migrate(&receiver).context("the next attempt")?;
    ground.ensure_on(Side::B)?;
    goes_on(&ground.container)?.ensure_one_writer(TWO_HOSTS)?;
    Ok(format!(
        "exit {code}, {:.0} ms without a tick; the next attempt succeeded",
        ms(gap)
    ))
}

fn killed(context: &Context) -> Result<String> {
    let ground = ground(context, Kind::Blank)?;
    // Time to kill the source while it waits for the vote.
    let slow = format!("sleep 2; {}", ground.restore_command());
    let receiver = ground.receive_with(&slow)?;
    let since = ground.container.ticks()?.len();
    let mut migrating = ground.start(&receiver)?;
    migrating.await_event("freezing")?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(migrating.is_running(), "it ended before it was killed");
    migrating.kill()?;
    let _ = migrating.wait()?;
    let gap = ensure_stayed(&ground, since)?;
    ensure!(
        receiver.said().lines().count() > 0,
        "the destination said nothing"
    );
    Ok(format!("{:.0} ms without a tick", ms(gap)))
}
