//! `crxfer migrate` and the receiver that it moves a process to.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver as Lines};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Crxfer, Place, Receiver};
use crate::hosts::{self, Host, Network};
use crate::run;

/// A `crxfer migrate` that can be started.
#[derive(Debug)]
pub(crate) struct Migration {
    command: Command,
    report: PathBuf,
}

impl Crxfer {
    /// Starts `crxfer recv` as the destination of a migration, with `more` options.
    pub(crate) fn await_migration(
        &self,
        place: Place<'_>,
        directory: &Path,
        more: &[&str],
    ) -> Result<Receiver> {
        let words = [&["--allow-restore"], more].concat();
        self.receive(place, directory, "incremental", &words)
    }

    /// The migration of process `pid` of host `from`.
    pub(crate) fn migrate(
        &self,
        from: &Host,
        pid: u32,
        to: &Receiver,
        more: &[&str],
    ) -> Result<Migration> {
        let pid = pid.to_string();
        self.migration(from, to, &[&["--pid", &pid], more].concat())
    }

    /// The migration of whatever `words` say.
    pub(crate) fn migration(
        &self,
        from: &Host,
        to: &Receiver,
        words: &[&str],
    ) -> Result<Migration> {
        let report = to.ticket.with_extension("report.json");
        let _ = fs::remove_file(&report);
        let mut command = self.command(Place::On(from));
        command
            .args(["migrate", "--json", "--to", &to.target(), "--report"])
            .arg(&report)
            .args(words);
        Ok(Migration { command, report })
    }
}

impl Crxfer {
    /// The same for people: progress and report go where this program's output goes.
    pub(crate) fn show_migration(
        &self,
        from: &Host,
        pid: u32,
        to: &Receiver,
        more: &[&str],
    ) -> Command {
        let mut command = self.command(Place::On(from));
        command
            .args(["migrate", "--pid", &pid.to_string(), "--to", &to.target()])
            .args(more);
        command
    }
}

impl Migration {
    /// Options for `crxfer recv` that make it move the service address, too.
    pub(crate) fn hooks(network: &Network) -> Vec<String> {
        ["prepare", "announce"]
            .iter()
            .flat_map(|step| {
                let script = network.script(step);
                [
                    "--hook".to_owned(),
                    format!("address-{step}={}", script.display()),
                ]
            })
            .collect()
    }

    /// One that `command` makes, which hands crxfer all that follows `--`.
    pub(crate) fn by(mut command: Command, to: &Receiver) -> Self {
        let report = to.ticket.with_extension("report.json");
        let _ = fs::remove_file(&report);
        command.args(["--to", &to.target(), "--", "--json", "--report"]);
        command.arg(&report);
        Self { command, report }
    }

    /// With one more word for the command.
    pub(crate) fn with(mut self, words: &[&str]) -> Self {
        self.command.args(words);
        self
    }

    pub(crate) fn start(mut self) -> Result<Migrating> {
        self.command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self
            .command
            .spawn()
            .context("cannot start crxfer migrate")?;
        let mut errors = child.stderr.take().context("no standard error")?;
        let collector = thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            text
        });
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Migrating {
            child,
            collector,
            lines,
            events: Vec::new(),
            report: self.report,
        })
    }
}

/// A running `crxfer migrate`.
#[derive(Debug)]
pub(crate) struct Migrating {
    child: Child,
    collector: JoinHandle<String>,
    lines: Lines<String>,
    /// Those of its lines that were read already.
    events: Vec<Value>,
    report: PathBuf,
}

impl Migrating {
    /// Sends `signal` to it, as a terminal or a supervisor would.
    pub(crate) fn signal(&self, signal: &str) -> Result<()> {
        // The child is nsenter, and crxfer the child of that.
        let pid = hosts::only_child(self.child.id())?.to_string();
        run::quiet(Command::new("kill").args(["-s", signal, &pid])).map(drop)
    }

    /// Waits until it takes signals, which is the first thing that it does.
    pub(crate) fn await_signals(&self) -> Result<()> {
        const INTERRUPT: u64 = 1 << 1;
        run::wait_for("crxfer migrate to begin", Duration::from_secs(10), || {
            let pid = hosts::only_child(self.child.id()).ok()?;
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let caught = status
                .lines()
                .find_map(|line| line.strip_prefix("SigCgt:"))?;
            let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
            (caught & INTERRUPT != 0).then_some(())
        })
    }

    /// Its process, by its pid outside.
    pub(crate) fn process(&self) -> Result<i32> {
        hosts::only_child(self.child.id())
    }

    /// Kills it at once, as a crash or a power cut would.
    pub(crate) fn kill(&self) -> Result<()> {
        hosts::kill(hosts::only_child(self.child.id())?);
        Ok(())
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it tells of `event`, which it must before it ends.
    pub(crate) fn await_event(&mut self, event: &str) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(60);
        loop {
            let line = self.lines.recv_timeout(LIMIT);
            let line = line.with_context(|| format!("crxfer migrate told of no {event:?}"))?;
            let found = self.note(&line)?["event"] == *event;
            if found {
                return Ok(());
            }
        }
    }

    fn note(&mut self, line: &str) -> Result<&Value> {
        let value = serde_json::from_str(line)
            .with_context(|| format!("crxfer migrate printed a line that is no JSON: {line}"))?;
        self.events.push(value);
        Ok(self.events.last().expect("one was added"))
    }

    /// Waits until it ends, for at most a few minutes.
    pub(crate) fn wait(mut self) -> Result<Ended> {
        let status = run::wait_for("crxfer migrate to end", Duration::from_secs(240), || {
            self.child.try_wait().transpose()
        });
        if status.is_err() {
            // It would hold the host open.
            let _ = self.signal("KILL");
        }
        let code = status??.code();
        let collector = std::mem::replace(&mut self.collector, thread::spawn(String::new));
        let mut message = collector.join().unwrap_or_default();
        while let Ok(line) = self.lines.recv() {
            self.note(&line)?;
        }
        for check in self.events.last().into_iter().flat_map(failed_checks) {
            message.push_str(&check);
        }
        let report = fs::read_to_string(&self.report).ok();
        let report = report.map(|text| serde_json::from_str(&text)).transpose()?;
        Ok(Ended {
            code,
            message,
            report,
        })
    }
}

/// What the checks found that failed, a line for each: people get it in the message, programs in the
/// last line.
fn failed_checks(last: &Value) -> Vec<String> {
    let checks = last["checks"].as_array().into_iter().flatten();
    let failed = checks.filter(|check| check["outcome"] == "failed");
    let line = |check: &Value| {
        format!(
            "{}: {}; {}\n",
            check["name"], check["found"], check["advice"]
        )
    };
    failed.map(line).collect()
}

/// How a `crxfer migrate` ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) message: String,
    report: Option<Value>,
}

impl Ended {
    /// The report of a migration that should have succeeded.
    pub(crate) fn migrated(self) -> Result<Report> {
        ensure!(
            self.code == Some(0),
            "crxfer migrate ended with {:?}: {}",
            self.code,
            run::last_lines(&self.message, 20)
        );
        let report = self.report.context("crxfer migrate wrote no report")?;
        Report::read(&report).with_context(|| format!("the report is {report}"))
    }

    /// Exit code and message of a migration that should not have succeeded.
    pub(crate) fn refused(self) -> Result<(i32, String)> {
        match self.code {
            Some(0) => bail!("crxfer migrate succeeded where it should not"),
            Some(code) => {
                ensure!(
                    !self.message.trim().is_empty(),
                    "crxfer migrate failed with {code} and gave no reason"
                );
                ensure!(!self.message.contains("panicked"), "{}", self.message);
                Ok((code, self.message))
            }
            None => bail!("crxfer migrate died of a signal: {}", self.message),
        }
    }
}

/// What a migration reports.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Report {
    pub(crate) outcome: String,
    pub(crate) method: String,
    pub(crate) downtime_ms: f64,
    pub(crate) total_ms: f64,
    pub(crate) wire_bytes: u64,
    pub(crate) criu_frozen_ms: Option<f64>,
    /// Of the last dump.
    pub(crate) dumped_pages: u64,
    pub(crate) final_changed_pages: u64,
    pub(crate) clock_offset_ms: Option<f64>,
    pub(crate) clock_error_ms: Option<f64>,
    pub(crate) iterations: Vec<Iteration>,
    pub(crate) phases: Vec<Phase>,
}

/// One iteration of the pre-copy, or the last one.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Iteration {
    pub(crate) number: u64,
    pub(crate) scanned_pages: u64,
    pub(crate) changed_pages: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) duration_ms: f64,
    pub(crate) predicted_downtime_ms: Option<f64>,
    pub(crate) frozen_ms: Option<f64>,
}

/// One phase, on the source's clock.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) host: String,
    pub(crate) begin_ms: f64,
    pub(crate) end_ms: f64,
}

impl Report {
    fn read(value: &Value) -> Result<Self> {
        let list = |name: &str| value[name].as_array().cloned().unwrap_or_default();
        let iterations: Vec<Iteration> = list("iterations").iter().map(Iteration::read).collect();
        let phases = list("phases")
            .iter()
            .map(Phase::read)
            .collect::<Result<_>>()?;
        ensure!(!iterations.is_empty(), "no iterations");
        Ok(Self {
            outcome: text(value, "outcome")?,
            method: text(value, "method")?,
            downtime_ms: number(value, "downtime_ms")?,
            total_ms: number(value, "total_ms")?,
            wire_bytes: value["wire_bytes"].as_u64().context("no wire_bytes")?,
            criu_frozen_ms: value["criu_frozen_ms"].as_f64(),
            dumped_pages: value["final"]["dumped_pages"].as_u64().unwrap_or(0),
            final_changed_pages: value["final"]["changed_pages"].as_u64().unwrap_or(0),
            clock_offset_ms: value["clock_offset_ms"].as_f64(),
            clock_error_ms: value["clock_error_ms"].as_f64(),
            iterations,
            phases,
        })
    }

    /// Fails if its figures contradict each other or what a client saw, which is `seen_ms` of downtime.
    pub(crate) fn ensure_plausible(&self, seen_ms: f64) -> Result<()> {
        ensure!(
            self.outcome == "migrated",
            "the outcome is {}",
            self.outcome
        );
        ensure!(!self.phases.is_empty(), "no phases");
        for phase in &self.phases {
            ensure!(
                phase.end_ms >= phase.begin_ms,
                "{} ends before it begins",
                phase.name
            );
            ensure!(
                phase.host == "source" || phase.host == "destination",
                "{} is on host {}",
                phase.name,
                phase.host
            );
        }
        for host in ["source", "destination"] {
            let begins = self.phases.iter().filter(|phase| phase.host == host);
            let begins: Vec<f64> = begins.map(|phase| phase.begin_ms).collect();
            ensure!(!begins.is_empty(), "no phase on the {host}");
            ensure!(
                begins.is_sorted(),
                "phases of the {host} are out of order: {begins:?}"
            );
        }
        ensure!(
            self.downtime_ms <= self.total_ms,
            "a downtime of {} ms in {} ms",
            self.downtime_ms,
            self.total_ms
        );
        // A client sees what lies between two of its questions on top, and the machine is busy.
        let allowed = 60.0 + seen_ms * 0.2;
        ensure!(
            (self.downtime_ms - seen_ms).abs() <= allowed,
            "it says {:.0} ms of downtime, a client saw {seen_ms:.0} ms",
            self.downtime_ms
        );
        let numbers: Vec<u64> = self.iterations.iter().map(|one| one.number).collect();
        ensure!(
            numbers.windows(2).all(|pair| pair[0] < pair[1]),
            "iterations are numbered {numbers:?}"
        );
        Ok(())
    }
}

impl Iteration {
    fn read(value: &Value) -> Self {
        let count = |name: &str| value[name].as_u64().unwrap_or(0);
        Self {
            number: count("number"),
            scanned_pages: count("scanned_pages"),
            changed_pages: count("changed_pages"),
            sent_bytes: count("sent_bytes"),
            wire_bytes: count("wire_bytes"),
            duration_ms: value["duration_ms"].as_f64().unwrap_or(0.0),
            predicted_downtime_ms: value["predicted_downtime_ms"].as_f64(),
            frozen_ms: value["frozen_ms"].as_f64(),
        }
    }
}

impl Phase {
    fn read(value: &Value) -> Result<Self> {
        Ok(Self {
            name: text(value, "name")?,
            host: text(value, "host")?,
            begin_ms: number(value, "begin_ms")?,
            end_ms: number(value, "end_ms")?,
        })
    }
}

fn text(value: &Value, name: &str) -> Result<String> {
    let found = value[name].as_str().map(str::to_owned);
    found.with_context(|| format!("no text {name} in {value}"))
}

fn number(value: &Value, name: &str) -> Result<f64> {
    value[name]
        .as_f64()
        .with_context(|| format!("no number {name} in {value}"))
}
