//! What goes wrong: nothing half is published, what was there stays, and the next attempt works.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

use super::volume::Stage;
use super::{Context, Report};
use crate::checkpoint::{Synthetic, resolve, same_files};
use crate::crxfer::Place;
use crate::hosts::Rate;
use crate::run;

const PAGE_BYTES: u64 = 4096;

pub(super) fn cases(context: &Context, report: &mut Report) {
    report.case(
        "killed receiver publishes nothing, the next attempt sends the rest",
        || killed_receiver(context),
    );
    report.case("full disk keeps the earlier generation", || {
        full_disk(context)
    });
    report.case("--max-bytes is kept", || too_large(context));
    report.case("wrong ticket is refused", || wrong_ticket(context));
    report.case("two senders at once", || two_senders(context));
    report.case("damaged set is refused by name", || damaged_set(context));
    report.case("generations: list, rm and a base that is in use", || {
        generations(context)
    });
}

fn killed_receiver(context: &Context) -> Result<String> {
    let stage = Stage::new(context, Rate::Megabits(200))?;
    let process = Synthetic::noise(24_576, 21);
    let whole = process.pages() as u64 * PAGE_BYTES;
    process.dump(&stage.source("set"))?;
    let mut receiver = stage.receive("faithful", &[])?;
    let target = receiver.target();
    let before = stage.hosts.b.line_bytes()?;
    let arrived = || {
        stage
            .hosts
            .b
            .line_bytes()
            .map_or(0, |now| now.since(before))
    };
    let outcome = thread::scope(|scope| {
        let send = || {
            let place = Place::On(&stage.hosts.a);
            context
                .crxfer
                .send_with(place, &stage.source("set"), &target, "set", &[], |_| ())
        };
        let sender = scope.spawn(send);
        let half = run::wait_for("half of the set to arrive", Duration::from_secs(30), || {
            (arrived() > whole / 2).then_some(())
        });
        receiver.kill();
        let outcome = sender.join().map_err(|_| anyhow!("the sender panicked"))?;
        half.and(outcome)
    })?;
    let (_, message) = outcome.refused()?;
    ensure!(
        !message.trim().is_empty(),
        "the failed sender gave no reason"
    );
    ensure!(
        !stage.received().join("set").exists(),
        "a killed receiver published the set"
    );
    let first = arrived();

    stage.hosts.shape(Rate::Unlimited)?;
    let receiver = stage.receive("faithful", &[])?;
    let (_, second) = stage.send(&stage.source("set"), &receiver, "set")?;
    same_files(&stage.source("set"), &stage.received().join("set"))?;
    // Headers, acknowledgements and what was under way at the kill.
    let limit = whole + whole / 8;
    ensure!(
        first + second <= limit,
        "{first} and then {second} bytes on the line for a set of {whole}"
    );
    Ok(format!(
        "{} MiB before the kill, {} MiB after, of {} MiB",
        first >> 20,
        second >> 20,
        whole >> 20
    ))
}

fn full_disk(context: &Context) -> Result<String> {
    let stage = Stage::new(context, Rate::Unlimited)?;
    let small = stage.scratch.directory("small")?;
    let place = small.to_str().context("a strange name")?;
    run::quiet(
        stage
            .hosts
            .b
            .command("mount")
            .args(["-t", "tmpfs", "-o", "size=48m", "none", place]),
    )?;
    let received = small.join("received");
    run::quiet(stage.hosts.b.command("mkdir").arg(&received))?;
    let first = Synthetic::noise(4096, 22);
    first.dump(&stage.source("first"))?;
    Synthetic::noise(16_384, 23).dump(&stage.source("second"))?;
    let mut receiver =
        stage
            .context
            .crxfer
            .receive_inside(&stage.hosts.b, &received, &stage.received())?;
    stage.send(&stage.source("first"), &receiver, "set")?;
    let (code, message) = refused(&stage, &receiver.target(), "second", "set")?;
    ensure!(
        receiver.is_running(),
        "a full disk ended the receiver: {}",
        receiver.said()
    );
    let there = stage.hosts.b.file(&received.join("set"));
    resolve(&there)?
        .ensure_same(&first.memory())
        .context("the earlier generation")?;
    // What the failed attempt took may be kept for the next one, but must leave room for work.
    let third = Synthetic::noise(256, 24);
    third.dump(&stage.source("third"))?;
    stage
        .send(&stage.source("third"), &receiver, "third")
        .context("a small set after the failed one")?;
    Ok(format!("exit {code}: {}", first_line(&message)))
}

fn too_large(context: &Context) -> Result<String> {
    let stage = Stage::new(context, Rate::Unlimited)?;
    Synthetic::noise(1000, 25).dump(&stage.source("small"))?;
    Synthetic::noise(4096, 26).dump(&stage.source("large"))?;
    let receiver = stage.receive("faithful", &["--max-bytes", "8000000"])?;
    let (code, message) = refused(&stage, &receiver.target(), "large", "large")?;
    ensure!(
        !stage.received().join("large").exists(),
        "a set that is too large was published"
    );
    stage.send(&stage.source("small"), &receiver, "small")?;
    Ok(format!("exit {code}: {}", first_line(&message)))
}

fn wrong_ticket(context: &Context) -> Result<String> {
    let stage = Stage::new(context, Rate::Unlimited)?;
    Synthetic::mixed(500, 27).dump(&stage.source("set"))?;
    // One after the other on the same port: only their secrets and keys differ.
    let address = format!("{}:27100", stage.hosts.b.address);
    let old = stage
        .receive("faithful", &["--listen", &address])?
        .ticket()?;
    let receiver = stage.receive("faithful", &["--listen", &address])?;
    let new = receiver.ticket()?;
    ensure!(old != new, "two receivers gave the same ticket");
    // Of another receiver, damaged, and no ticket at all.
    let mut damaged: Vec<char> = new.chars().collect();
    let last = damaged.len() - 2;
    damaged[last] = if damaged[last] == 'a' { 'b' } else { 'a' };
    let damaged: String = damaged.into_iter().collect();
    let mut codes = Vec::new();
    for ticket in [old.as_str(), damaged.as_str(), "no ticket"] {
        let (code, message) = refused(&stage, ticket, "set", "set")?;
        ensure!(!message.contains("panicked"), "{message}");
        codes.push(code);
    }
    ensure!(
        !stage.received().join("set").exists(),
        "a set was published without the ticket"
    );
    stage
        .send(&stage.source("set"), &receiver, "set")
        .context("with the right ticket")?;
    Ok(format!("exits {codes:?}"))
}

fn two_senders(context: &Context) -> Result<String> {
    let stage = Stage::new(context, Rate::Megabits(1000))?;
    let processes = [Synthetic::mixed(12_000, 28), Synthetic::noise(8000, 29)];
    let names = ["one", "two"];
    for (name, process) in names.iter().zip(&processes) {
        process.dump(&stage.source(name))?;
    }
    let receiver = stage.receive("incremental", &[])?;
    thread::scope(|scope| {
        let send = |name: &'static str| {
            let (stage, receiver) = (&stage, &receiver);
            move || stage.send(&stage.source(name), receiver, name)
        };
        let senders = names.map(|name| scope.spawn(send(name)));
        senders
            .into_iter()
            .try_for_each(|sender| match sender.join() {
                Ok(outcome) => outcome.map(drop),
                Err(_) => Err(anyhow!("a sender panicked")),
            })
    })?;
    for (name, process) in names.iter().zip(&processes) {
        resolve(&stage.received().join(name))?
            .ensure_same(&process.memory())
            .with_context(|| (*name).to_owned())?;
    }
    Ok(String::new())
}

/// Something that spoils a set.
type Damage = fn(&Path) -> io::Result<()>;

fn damaged_set(context: &Context) -> Result<String> {
    let stage = Stage::new(context, Rate::Unlimited)?;
    let receiver = stage.receive("faithful", &[])?;
    let process = Synthetic::mixed(1000, 30);
    let damage: [(&str, Damage); 4] = [
        ("pages-2.img", |set| {
            fs::File::options()
                .write(true)
                .open(set.join("pages-2.img"))?
                .set_len(8192)
        }),
        ("pages-2.img", |set| {
            fs::remove_file(set.join("pages-2.img"))
        }),
        ("pagemap-4242.img", |set| {
            fs::File::options()
                .write(true)
                .open(set.join("pagemap-4242.img"))?
                .set_len(45)
        }),
        ("inventory.img", |set| {
            fs::write(set.join("inventory.img"), b"not an inventory")
        }),
    ];
    let mut messages = Vec::new();
    for (number, (file, damage)) in damage.into_iter().enumerate() {
        let name = format!("damaged-{number}");
        process.dump(&stage.source(&name))?;
        damage(&stage.source(&name))?;
        let (code, message) = refused(&stage, &receiver.target(), &name, &name)?;
        ensure!(
            message.contains(file),
            "the message does not name {file}: {message}"
        );
        ensure!(
            !stage.received().join(&name).exists(),
            "{name} was published"
        );
        messages.push(code);
    }
    Ok(format!("exits {messages:?}"))
}

fn generations(context: &Context) -> Result<String> {
    let stage = Stage::new(context, Rate::Unlimited)?;
    let mut process = Synthetic::mixed(3000, 31);
    process.dump(&stage.source("1"))?;
    let receiver = stage.receive("incremental", &[])?;
    stage.send(&stage.source("1"), &receiver, "base")?;
    process.change(1, 100);
    process.dump(&stage.source("2"))?;
    let (sent, _) = stage.send(&stage.source("2"), &receiver, "next")?;
    ensure!(
        sent.base.as_deref() == Some("base"),
        "built on {:?}",
        sent.base
    );
    let memory = process.memory();
    // Another generation of the base, and then its removal, must not touch what is built on the first.
    let other = Synthetic::mixed(2000, 32);
    other.dump(&stage.source("3"))?;
    let (sent, _) = stage.send(&stage.source("3"), &receiver, "base")?;
    ensure!(
        sent.generation == 2,
        "the second set of a name is generation {}",
        sent.generation
    );
    resolve(&stage.received().join("base"))?.ensure_same(&other.memory())?;
    resolve(&stage.received().join("next"))?.ensure_same(&memory)?;
    let directory = stage.received();
    let directory = directory.to_str().context("a strange name")?;
    let list = context.crxfer.run(&["list", directory])?;
    ensure!(
        list.contains("base") && list.contains("next"),
        "crxfer list says:\n{list}"
    );
    context.crxfer.run(&["rm", directory, "base"])?;
    ensure!(
        !stage.received().join("base").exists(),
        "base is still there"
    );
    resolve(&stage.received().join("next"))?
        .ensure_same(&memory)
        .context("after rm of its base")?;
    Ok(String::new())
}

fn refused(stage: &Stage<'_>, to: &str, directory: &str, name: &str) -> Result<(i32, String)> {
    let place = Place::On(&stage.hosts.a);
    stage
        .context
        .crxfer
        .send_with(place, &stage.source(directory), to, name, &[], |_| ())?
        .refused()
}

fn first_line(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}
