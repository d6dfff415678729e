//! CRIU's images through pipes: dumped on A straight into crxfer, restored on B straight out of it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{Context, Report, Scope};
use crate::apt::{self, Needed};
use crate::checkpoint::resolve;
use crate::criu::{Criu, End};
use crate::crxfer::{LAYOUTS, Place, Receiver};
use crate::hosts::{self, Host, Hosts, Rate};
use crate::run;
use crate::scratch::Scratch;
use crate::workload::{Memcached, Tree, Values, Workload};

/// Makes a workload that keeps its files in the given directory.
type Maker<'a> = &'a dyn Fn(&Path) -> Box<dyn Workload>;

pub(super) fn cases(context: &Context, report: &mut Report) {
    let Some(criu) = &context.criu else { return };
    let values = if context.scope == Scope::Quick {
        2_000
    } else {
        6_000
    };
    let memcached =
        |_: &Path| -> Box<dyn Workload> { Box::new(Memcached::new(Values::new(values, 8192), 50)) };
    let tree = |place: &Path| -> Box<dyn Workload> { Box::new(Tree::new(place.to_owned())) };
    let all: [(&str, &[Needed], Maker<'_>); 2] = [
        ("memcached", &[apt::MEMCACHED], &memcached),
        ("tree", &[], &tree),
    ];
    for (name, needed, make) in all {
        for layout in LAYOUTS {
            report.case(&format!("{name} streams through {layout}"), || {
                apt::ensure(needed)?;
                Streams::new(context, criu, make)?.moves(layout)
            });
        }
    }
    let case = |report: &mut Report, name: &str, work: fn(&mut Streams<'_>) -> Result<String>| {
        report.case(name, || {
            apt::ensure(&[apt::MEMCACHED])?;
            work(&mut Streams::new(context, criu, &memcached)?)
        });
    };
    case(report, "a directory streams into a restore", |streams| {
        streams.serves_a_directory()
    });
    case(report, "a killed capture costs no workload", |streams| {
        streams.survives_kills()
    });
    case(
        report,
        "a destination that is gone costs no workload",
        |streams| streams.survives_silence(),
    );
    case(report, "a slow destination is refused in time", |streams| {
        streams.keeps_the_limit()
    });
    case(
        report,
        "a dump without its script is not begun",
        |streams| streams.needs_the_script(),
    );
}

/// Two hosts, a workload on A, and places for files.
struct Streams<'a> {
    context: &'a Context,
    criu: &'a Criu,
    hosts: Hosts,
    scratch: Scratch,
    workload: Box<dyn Workload>,
    pid: u32,
    works: u32,
}

impl<'a> Streams<'a> {
    fn new(context: &'a Context, criu: &'a Criu, make: Maker<'_>) -> Result<Self> {
        let scratch = Scratch::new("streams")?;
        let hosts = Hosts::new(Rate::Unlimited)?;
        let mut workload = make(&scratch.directory("workload")?);
        let pid = workload.start(&hosts.a)?;
        Ok(Self {
            context,
            criu,
            hosts,
            scratch,
            workload,
            pid,
            works: 0,
        })
    }

    /// Sets of two dumps through every layout; the second one is restored.
    fn moves(&mut self, layout: &str) -> Result<String> {
        let mounts = self.hosts.a.mounts()?;
        let receiver = self.receive(layout)?;
        let first = self.dump(&receiver, End::LeaveRunning)?;
        self.workload.write(&self.hosts.a)?;
        let second = self.dump(&receiver, End::Kill)?;
        ensure!(self.hosts.a.mounts()? == mounts, "something is mounted");
        let received = self.received().join("one");
        ensure!(
            received.join("parent").exists() == (layout == "incremental"),
            "the set is not {layout}"
        );
        self.serve_and_restore(&["--dir", &text(&self.received())?, "--name", "one"])?;
        let held = |line: &Value| line["held_seconds"].as_f64().unwrap_or_default() * 1000.0;
        Ok(format!(
            "held for {:.0}, then {:.0} ms",
            held(&first),
            held(&second)
        ))
    }

    fn serves_a_directory(&mut self) -> Result<String> {
        let dump = self.scratch.path().join("dump");
        self.criu
            .dump(&self.hosts.a, self.pid, &dump, End::Kill, &[])?;
        self.serve_and_restore(&["--images", &text(&dump)?])?;
        // What CRIU could not restore is refused before CRIU is started.
        fs::remove_file(dump.join("pstree.img"))?;
        let sockets = self.scratch.path().join("sockets-b");
        let words = [
            "stream",
            "serve",
            &text(&sockets)?,
            "--images",
            &text(&dump)?,
        ];
        let refused = self.context.crxfer.run(&words);
        ensure!(refused.is_err(), "a damaged set is served");
        Ok(String::new())
    }

    /// The capture is killed at moments spread over the dump.
    fn survives_kills(&mut self) -> Result<String> {
        let receiver = self.receive("faithful")?;
        let begin = Instant::now();
        self.dump(&receiver, End::LeaveRunning)?;
        let whole = begin.elapsed();
        let kills = if self.context.scope == Scope::Quick {
            5
        } else {
            15
        };
        let mut failed = 0;
        for number in 0..kills {
            let mut capture = self.capture(&receiver, &[])?;
            let dump = self.dump_into(&capture, End::Kill)?;
            let outcome = thread::scope(|scope| {
                let dumping = scope.spawn(|| dump.run(self.criu, &self.hosts.a));
                thread::sleep(whole * number / kills);
                capture.kill();
                dumping.join().expect("CRIU's thread does not panic")
            });
            if outcome.is_ok() {
                // It was stored, and CRIU had its verdict, before the kill: then it is not here.
                self.workload.check(&self.hosts.a).err().with_context(|| {
                    format!("kill {number}: CRIU says that it killed the workload, which runs")
                })?;
                return Ok(format!("{failed} dumps failed, then one was done"));
            }
            failed += 1;
            let compared = self.workload.check(&self.hosts.a);
            compared.with_context(|| format!("after kill {number}"))?;
            self.hosts.a.wait_for_closed_connections()?;
        }
        // Nothing is left that disturbs the next one.
        self.dump(&receiver, End::Kill)?;
        self.serve_and_restore(&["--dir", &text(&self.received())?, "--name", "one"])?;
        Ok(format!("{failed} dumps failed"))
    }

    fn survives_silence(&mut self) -> Result<String> {
        let mut receiver = self.receive("faithful")?;
        let capture = self.capture(&receiver, &[])?;
        receiver.kill();
        let dumped = self.run_dump(&capture, End::Kill);
        ensure!(dumped.is_err(), "CRIU was told to go on");
        let (code, said) = capture.end()?;
        ensure!(code == Some(5), "the capture ended with {code:?}: {said}");
        self.workload.check(&self.hosts.a)?;
        Ok(String::new())
    }

    fn keeps_the_limit(&mut self) -> Result<String> {
        let receiver = self.receive("faithful")?;
        self.hosts.shape(Rate::Megabits(10))?;
        let capture = self.capture(&receiver, &["--freeze-limit", "1"])?;
        let begin = Instant::now();
        let dumped = self.run_dump(&capture, End::Kill);
        let took = begin.elapsed();
        ensure!(dumped.is_err(), "CRIU was told to go on");
        let (code, said) = capture.end()?;
        ensure!(code == Some(16), "the capture ended with {code:?}: {said}");
        self.workload.check(&self.hosts.a)?;
        ensure!(
            !self.received().join("one").exists(),
            "a set was published that was refused"
        );
        Ok(format!("CRIU ended after {:.1} s", took.as_secs_f64()))
    }

    fn needs_the_script(&mut self) -> Result<String> {
        let receiver = self.receive("faithful")?;
        let capture = self.capture(&receiver, &[])?;
        let plain = ["--stream", "-W", &self.work()?];
        let dumped = self
            .criu
            .dump(&self.hosts.a, self.pid, &capture.sockets, End::Kill, &plain);
        ensure!(dumped.is_err(), "CRIU dumped without the script");
        self.workload.check(&self.hosts.a)?;
        self.hosts.a.wait_for_closed_connections()?;
        self.run_dump(&capture, End::Kill)?;
        capture.finished()?;
        self.serve_and_restore(&["--dir", &text(&self.received())?, "--name", "one"])?;
        Ok(String::new())
    }

    fn received(&self) -> PathBuf {
        self.scratch.path().join("received")
    }

    fn work(&mut self) -> Result<String> {
        self.works += 1;
        text(&self.scratch.directory(&format!("work-{}", self.works))?)
    }

    fn receive(&self, layout: &str) -> Result<Receiver> {
        let place = Place::On(&self.hosts.b);
        self.context
            .crxfer
            .receive(place, &self.received(), layout, &[])
    }

    /// A whole dump through a capture; its last line.
    fn dump(&mut self, receiver: &Receiver, end: End) -> Result<Value> {
        let capture = self.capture(receiver, &[])?;
        self.run_dump(&capture, end)
            .with_context(|| format!("the capture said:\n{}", capture.said()))?;
        let images: Vec<_> = fs::read_dir(&capture.sockets)?.flatten().collect();
        let seen = images
            .iter()
            .find(|file| file.file_name().to_string_lossy().ends_with(".img"));
        ensure!(seen.is_none(), "{seen:?} can be seen");
        capture.finished()
    }

    fn capture(&self, receiver: &Receiver, more: &[&str]) -> Result<Capture> {
        let sockets = self.scratch.path().join("sockets-a");
        let mut words = vec!["--to".to_owned(), receiver.target()];
        words.extend(
            ["--name", "one"]
                .iter()
                .chain(more)
                .map(|&word| word.into()),
        );
        Capture::start(self.context, &self.hosts.a, "capture", sockets, &words)
    }

    fn dump_into(&mut self, capture: &Capture, end: End) -> Result<Dump> {
        Ok(Dump {
            pid: self.pid,
            sockets: capture.sockets.clone(),
            work: self.work()?,
            end,
        })
    }

    fn run_dump(&mut self, capture: &Capture, end: End) -> Result<()> {
        self.dump_into(capture, end)?.run(self.criu, &self.hosts.a)
    }

    /// Restores on B what a `stream serve` with these options gives, and compares it.
    fn serve_and_restore(&mut self, options: &[&str]) -> Result<()> {
        let sockets = self.scratch.path().join("sockets-b");
        let words: Vec<String> = options.iter().map(|&word| word.into()).collect();
        let serve = Capture::start(self.context, &self.hosts.b, "serve", sockets, &words)?;
        let work = self.work()?;
        self.criu
            .restore_with(&self.hosts.b, &serve.sockets, work.as_ref(), &["--stream"])
            .with_context(|| format!("crxfer stream serve said:\n{}", serve.said()))?;
        let compared = self.workload.check(&self.hosts.b);
        self.hosts.b.end(self.pid)?;
        ensure!(
            compared.context("after the restore")? > 0,
            "nothing was compared"
        );
        let last = serve.finished()?;
        ensure!(last["images"].as_u64() > Some(5), "it served {last}");
        if let Some(set) = options.iter().position(|&word| word == "--images") {
            resolve(options[set + 1].as_ref())?;
        }
        Ok(())
    }
}

/// A dump through a capture, held by its script.
struct Dump {
    pid: u32,
    sockets: PathBuf,
    work: String,
    end: End,
}

impl Dump {
    fn run(&self, criu: &Criu, host: &Host) -> Result<()> {
        let script = text(&self.sockets.join("action"))?;
        let words = ["--stream", "-W", &self.work, "--action-script", &script];
        criu.dump(host, self.pid, &self.sockets, self.end, &words)
    }
}

/// A running `crxfer stream`; dropping it kills it.
struct Capture {
    child: Child,
    sockets: PathBuf,
    log: PathBuf,
}

impl Capture {
    fn start(
        context: &Context,
        host: &Host,
        verb: &str,
        sockets: PathBuf,
        options: &[String],
    ) -> Result<Self> {
        let log = sockets.with_extension("log");
        let output = File::create(&log)?;
        let mut command = context.crxfer.command(Place::On(host));
        command.args(["stream", verb, "--json"]).arg(&sockets);
        command.args(options);
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().context("cannot start crxfer stream")?;
        let mut capture = Self {
            child,
            sockets,
            log,
        };
        run::wait_for("crxfer stream to listen", Duration::from_secs(20), || {
            let ended = !matches!(capture.child.try_wait(), Ok(None));
            (ended || capture.said().contains("listening")).then_some(())
        })?;
        ensure!(capture.said().contains("listening"), "{}", capture.said());
        Ok(capture)
    }

    fn said(&self) -> String {
        run::last_lines(&fs::read_to_string(&self.log).unwrap_or_default(), 12)
    }

    fn kill(&mut self) {
        if let Ok(pid) = hosts::only_child(self.child.id()) {
            hosts::kill(pid);
        }
        let _ = self.child.wait();
    }

    fn end(mut self) -> Result<(Option<i32>, String)> {
        let status = run::wait_for("crxfer stream to end", Duration::from_secs(40), || {
            self.child.try_wait().transpose()
        })??;
        Ok((status.code(), self.said()))
    }

    /// The last line of one that succeeded.
    fn finished(self) -> Result<Value> {
        let (code, said) = self.end()?;
        if code != Some(0) {
            bail!("crxfer stream ended with {code:?}:\n{said}");
        }
        let last = said.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("no JSON: {last}"))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("a strange name")
}
