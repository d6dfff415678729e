//! Migrations whose images are in memory that only descriptors hold: nobody sees a file or a mount of
//! them, and nothing is left when the workload runs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::held::{Scene, ensure_migrated};
use super::trouble::TCP;
use super::{Context, Mover, Report, small};
use crate::crxfer::migrate::Migration;
use crate::hosts::{Host, Network, Rate};
use crate::run;

/// How long what is over may be held: the guard looks twice a second, and stays for a source that may
/// ask.
const RELEASED_WITHIN: Duration = Duration::from_secs(40);

/// A look at all files of this machine takes a while, and the tree is frozen meanwhile.
const TO_LOOK: Duration = Duration::from_secs(20);

pub(super) fn cases(context: &Context, report: &mut Report) {
    report.case("migrate: diskless, seen nowhere", || unseen(context));
    report.case(
        "migrate: diskless, more than the destination's memory",
        || refused(context),
    );
}

/// Whether any process of either host has a directory of a file system that is mounted nowhere.
pub(super) fn ensure_nothing_held(network: &Network) -> Result<()> {
    for host in [&network.hosts.a, &network.hosts.b] {
        let released = run::wait_for("memory to be released", RELEASED_WITHIN, || {
            holders(host).is_empty().then_some(())
        });
        released.with_context(|| format!("held on {}: {:?}", host.name, holders(host)))?;
    }
    Ok(())
}

/// Descriptors of directories that are in no mount table.
fn holders(host: &Host) -> Vec<String> {
    let processes = fs::read_dir(host.file(Path::new("/proc"))).into_iter();
    let processes = processes.flatten().flatten().map(|entry| entry.path());
    let is_process = |path: &std::path::PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.parse::<u32>().is_ok())
    };
    let mut found = Vec::new();
    for process in processes.filter(is_process) {
        let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        let is_mounted = |id: &str| {
            mounts
                .lines()
                .any(|line| line.split(' ').next() == Some(id))
        };
        let descriptors = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        for descriptor in descriptors {
            let info = process.join("fdinfo").join(descriptor.file_name());
            let info = fs::read_to_string(info).unwrap_or_default();
            let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
            let is_directory = fs::metadata(descriptor.path()).is_ok_and(|it| it.is_dir());
            if is_directory && mount.is_some_and(|id| !is_mounted(id.trim())) {
                let comm = fs::read_to_string(process.join("comm")).unwrap_or_default();
                found.push(format!("{} {}", comm.trim(), descriptor.path().display()));
            }
        }
    }
    found
}

fn unseen(context: &Context) -> Result<String> {
    let mut scene = Scene::in_mode(context, "diskless")?;
    (scene.pause, scene.freeze_limit) = (TO_LOOK, 60);
    let network = scene.network();
    let hosts = [&network.hosts.a, &network.hosts.b];
    let stamp = scene.mover.memory.path().join("stamp");
    fs::write(&stamp, "")?;
    let mounts = || -> Result<Vec<_>> { hosts.iter().map(|host| host.mounts()).collect() };
    let before = mounts()?;
    let receiver = scene.receive(Some("complete"))?;
    let migrating = scene.migrate(&receiver, None)?;
    scene.await_reached("destination")?;
    // All images are there, the copy is being built, and CRIU holds the tree.
    let looked = (|| {
        let images = images(&scene)?;
        let inventory = images.join("inventory.img");
        ensure!(
            fs::metadata(network.hosts.b.file(&inventory)).is_ok(),
            "{} cannot be read by its path",
            inventory.display()
        );
        let held = holders(&network.hosts.b);
        let of = |comm: &str| held.iter().filter(|it| it.starts_with(comm)).count();
        // CRIU has the directory that it restores from, too.
        let strangers = held.len() - of("crxfer ") - of("criu ") - of("ld-linux");
        ensure!(
            of("crxfer ") >= 2 && strangers == 0,
            "receiver and guard hold it, and no stranger: {held:?}"
        );
        for host in hosts {
            ensure_not_found(host, &stamp)?;
        }
        ensure!(
            mounts()? == before,
            "something was mounted: {:?}",
            mounts()?
        );
        Ok(())
    })();
    ensure_migrated(&migrating.wait()?, &receiver)?;
    looked?;
    network.withdraw(&network.hosts.a)?;
    scene.await_on_b()?;
    ensure_nothing_held(network)?;
    ensure!(mounts()? == before, "something stayed mounted");
    for host in hosts {
        ensure_not_found(host, &stamp)?;
    }
    let seen = scene.stage.moved()?;
    Ok(format!("no file and no mount, {} ms", seen.downtime.ms()))
}

fn refused(context: &Context) -> Result<String> {
    let stage = small(Rate::Megabits(1000))?;
    let mover = Mover::new(context)?;
    let hooks = Migration::hooks(&stage.network);
    let mut words: Vec<&str> = hooks.iter().map(String::as_str).collect();
    words.extend(["--sink-size", "20M"]);
    let receiver = mover.receive_with(&stage.network, &words)?;
    let since = stage.poller.now();
    let words = [TCP, "--mode", "diskless"];
    let ended = mover.run(&stage.network, stage.pid, &receiver, &words)?;
    let (code, message) = ended.refused()?;
    ensure!(code == 11, "the offer was not refused: {code}: {message}");
    ensure!(message.contains("--mode disk"), "no advice: {message}");
    stage.stayed(since)?;
    Ok(run::last_lines(&message, 1))
}

/// Where the journal says that the final images are, as processes of B have it.
fn images(scene: &Scene<'_>) -> Result<std::path::PathBuf> {
    let journals = scene.mover.received().join(".crxfer/state");
    for entry in fs::read_dir(journals)?.flatten() {
        let Ok(text) = fs::read_to_string(entry.path().join("journal")) else {
            continue;
        };
        let json = text.lines().next().and_then(|line| line.split_once(' '));
        let line: Value = serde_json::from_str(json.context("a line with a checksum")?.1)?;
        let about = line.as_object().and_then(|line| line.values().next());
        let place = about.and_then(|about| about["place"].as_str());
        let place = place.with_context(|| format!("no place in {line}"))?;
        ensure!(place.starts_with("/proc/"), "it is in a directory: {place}");
        return Ok(Path::new(place).join("final"));
    }
    bail!("the destination has no journal")
}

/// No image of a dump that is younger than `stamp` is in any file system that `host` sees.
fn ensure_not_found(host: &Host, stamp: &Path) -> Result<()> {
    // Every dump has an inventory. Others' tests run on the same machine and make some, too: only
    // those beside a memcached are looked at.
    let script = r#"find / -path /proc -prune -o -newer "$0" \
        \( -name inventory.img -o -name 'pages-*.img' -o -name 'core-*.img' \) -print 2>/dev/null |
        while read -r file; do grep -l memcached "${file%/*}"/core-*.img 2>/dev/null; done | sort -u"#;
    let mut command = host.command("sh");
    let found = run::quiet(command.arg("-c").arg(script).arg(stamp))?;
    ensure!(found.trim().is_empty(), "images are visible: {found}");
    Ok(())
}
