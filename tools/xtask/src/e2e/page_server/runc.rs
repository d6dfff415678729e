//! `runc checkpoint --page-server`: runc knows nothing of crxfer.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::NAME;
use super::endpoint::Endpoint;
use crate::apt::{self, Needed};
use crate::crxfer::Place;
use crate::e2e::{Context, Report};
use crate::hosts::{Host, Hosts, Rate};
use crate::run;
use crate::scratch::Scratch;

const RUNC: Needed = Needed {
    program: "runc",
    package: "runc",
};
const BUSYBOX: Needed = Needed {
    program: "busybox",
    package: "busybox-static",
};

/// What runs in the container.
const COUNTER: &str = "i=0; while sleep 0.1; do i=$((i+1)); echo $i >/counter; done";

const CONTAINER: &str = "counter";

pub(super) fn cases(context: &Context, report: &mut Report) {
    report.case("page-server: runc checkpoint and restore", || {
        moves(context)
    });
}

fn moves(context: &Context) -> Result<String> {
    apt::ensure(&[RUNC, BUSYBOX])?;
    let scratch = Scratch::new("runc-page-server")?;
    let hosts = Hosts::new(Rate::Unlimited)?;
    let bundle = make_bundle(&scratch)?;
    let counter = || -> Result<u64> {
        let text = fs::read_to_string(bundle.join("rootfs/counter"))?;
        text.trim().parse().context("the counter is no number")
    };
    let counts = |from: u64| {
        run::wait_for("the container to count", Duration::from_secs(10), || {
            counter().ok().filter(|now| *now > from)
        })
    };
    let (a, b) = (
        Runtime::on(&hosts.a, &scratch, "a"),
        Runtime::on(&hosts.b, &scratch, "b"),
    );
    let bundle_word = word(&bundle)?;
    a.run(&["run", "-d", "--bundle", bundle_word, CONTAINER])?;
    counts(5)?;
    let received = scratch.path().join("received");
    let place = Place::On(&hosts.b);
    let receiver = context.crxfer.receive(place, &received, "faithful", &[])?;
    let endpoint = Endpoint::listening(context, &hosts.a, &scratch, &receiver, &[])?;
    let images = scratch.directory("images")?;
    let work = scratch.directory("work")?;
    let address = endpoint.address();
    let images_word = word(&images)?;
    a.run(&[
        "checkpoint",
        "--image-path",
        images_word,
        "--work-path",
        word(&work)?,
        "--page-server",
        &address,
        CONTAINER,
    ])
    .with_context(|| endpoint.said())?;
    let taken = endpoint.taken()?;
    let stopped_at = counter()?;
    endpoint.stop()?;
    let place = Place::On(&hosts.a);
    let sent = context.crxfer.send(place, &images, &receiver, NAME)?;
    ensure!(
        sent.completeness == "complete",
        "it is {}",
        sent.completeness
    );
    let set = received.join(NAME);
    b.run(&[
        "restore",
        "-d",
        "--image-path",
        word(&set)?,
        "--work-path",
        word(&work)?,
        "--bundle",
        bundle_word,
        CONTAINER,
    ])?;
    let now = counts(stopped_at)?;
    ensure!(
        now < stopped_at + 100,
        "it counts from {stopped_at} to {now}"
    );
    Ok(format!(
        "{} pages; counted on from {stopped_at}",
        taken.pages
    ))
}

fn word(path: &Path) -> Result<&str> {
    path.to_str().context("a strange name")
}

/// A container of one program and a shell script.
fn make_bundle(scratch: &Scratch) -> Result<PathBuf> {
    let bundle = scratch.directory("bundle")?;
    let root = bundle.join("rootfs");
    for directory in ["bin", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let busybox = run::find_program("busybox").context("no busybox")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for name in ["sh", "sleep"] {
        symlink("busybox", root.join("bin").join(name))?;
    }
    run::quiet(Command::new("runc").arg("spec").current_dir(&bundle))?;
    let config = bundle.join("config.json");
    let mut spec: Value = serde_json::from_str(&fs::read_to_string(&config)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = vec!["sh", "-c", COUNTER].into();
    spec["root"]["readonly"] = false.into();
    fs::write(&config, spec.to_string())?;
    Ok(bundle)
}

/// The runtime of one host; what it runs ends when this is dropped.
struct Runtime<'a> {
    host: &'a Host,
    root: PathBuf,
}

impl<'a> Runtime<'a> {
    fn on(host: &'a Host, scratch: &Scratch, name: &str) -> Self {
        let root = scratch.path().join(format!("runc-{name}"));
        Self { host, root }
    }

    fn run(&self, words: &[&str]) -> Result<()> {
        // Not a pipe, which the container would keep, and CRIU refuse.
        let log = self.root.with_extension("log");
        let mut command = self.host.command("runc");
        command.arg("--log").arg(&log).arg("--root").arg(&self.root);
        let status = command
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("cannot start runc")?;
        let said = || run::last_lines(&fs::read_to_string(&log).unwrap_or_default(), 8);
        ensure!(status.success(), "runc {} failed:\n{}", words[0], said());
        Ok(())
    }
}

impl Drop for Runtime<'_> {
    fn drop(&mut self) {
        // There may be none.
        let _ = self.run(&["delete", "--force", CONTAINER]);
    }
}
