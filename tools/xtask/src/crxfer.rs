//! The crxfer command under test: builds it, runs its sides on hosts, reads what they report.

pub(crate) mod migrate;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::hosts::{self, Host};
use crate::run;

/// Where a command runs: on one of two hosts, or beside this program.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    On(&'a Host),
    Here,
}

impl Place<'_> {
    fn command(self, program: &Path) -> Command {
        match self {
            Place::On(host) => host.command(program),
            Place::Here => Command::new(program),
        }
    }

    fn address(self) -> String {
        match self {
            Place::On(host) => host.address.to_string(),
            Place::Here => "127.0.0.1".to_owned(),
        }
    }
}

/// The layouts that a destination can have.
pub(crate) const LAYOUTS: [&str; 3] = ["faithful", "incremental", "flat"];

/// The command.
#[derive(Clone, Debug)]
pub(crate) struct Crxfer {
    program: PathBuf,
    /// Variables for what is started.
    environment: Vec<(String, String)>,
}

impl Crxfer {
    /// Builds the release version, unless CRXFER_PROGRAM names one that is there already.
    pub(crate) fn build() -> Result<Self> {
        if let Some(program) = std::env::var_os("CRXFER_PROGRAM") {
            return Ok(Self {
                program: program.into(),
                environment: Vec::new(),
            });
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let build = ["build", "--quiet", "--release", "--package", "crxfer-tools"];
        run::shown(
            Command::new(cargo)
                .args(build)
                .current_dir(run::workspace()),
        )?;
        Ok(Self {
            program: run::target()?.join("release/crxfer"),
            environment: Vec::new(),
        })
    }

    /// The same command, which gets a variable in its environment.
    pub(crate) fn with_env(&self, name: &str, value: &str) -> Self {
        let mut other = self.clone();
        other.environment.push((name.to_owned(), value.to_owned()));
        other
    }

    /// The file of the command.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Variables for what is started.
    pub(crate) fn environment(&self) -> &[(String, String)] {
        &self.environment
    }

    /// It, with its environment, to be given a verb.
    pub(crate) fn command(&self, place: Place<'_>) -> Command {
        let mut command = place.command(&self.program);
        let variables = self.environment.iter();
        command.envs(variables.map(|(name, value)| (name.as_str(), value.as_str())));
        command
    }

    /// Starts `crxfer recv` into `directory` and waits until it listens.
    pub(crate) fn receive(
        &self,
        place: Place<'_>,
        directory: &Path,
        layout: &str,
        more: &[&str],
    ) -> Result<Receiver> {
        fs::create_dir_all(directory)?;
        self.receive_beside(place, directory, directory, layout, more)
    }

    /// The same into a `directory` that only `host` can see; ticket and log are beside `files`.
    pub(crate) fn receive_inside(
        &self,
        host: &Host,
        directory: &Path,
        files: &Path,
    ) -> Result<Receiver> {
        self.receive_beside(Place::On(host), directory, files, "faithful", &[])
    }

    fn receive_beside(
        &self,
        place: Place<'_>,
        directory: &Path,
        files: &Path,
        layout: &str,
        more: &[&str],
    ) -> Result<Receiver> {
        let (ticket, log) = (files.with_extension("ticket"), files.with_extension("log"));
        let _ = fs::remove_file(&ticket);
        let output = File::create(&log)?;
        let mut command = self.command(place);
        command
            .args(["recv", "--json", "--layout", layout, "--dir"])
            .arg(directory);
        command.arg("--ticket-file").arg(&ticket).args(more);
        if !more.contains(&"--listen") {
            command.args(["--listen", &format!("{}:0", place.address())]);
        }
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = command.spawn().context("cannot start crxfer recv")?;
        let inside = matches!(place, Place::On(_));
        let mut receiver = Receiver {
            child,
            inside,
            ticket,
            log,
        };
        receiver.wait_until_ready()?;
        Ok(receiver)
    }

    /// Sends `directory` as `name` and gives what the command reports.
    pub(crate) fn send(
        &self,
        place: Place<'_>,
        directory: &Path,
        to: &Receiver,
        name: &str,
    ) -> Result<Sent> {
        self.send_with(place, directory, &to.target(), name, &[], |_| ())?
            .finished()
    }

    /// Sends `directory` to the ticket or `@FILE` `to`; a failure of the command is part of the outcome.
    pub(crate) fn send_with(
        &self,
        place: Place<'_>,
        directory: &Path,
        to: &str,
        name: &str,
        more: &[&str],
        mut on_line: impl FnMut(&Value),
    ) -> Result<Outcome> {
        let mut command = self.command(place);
        command
            .args(["send", "--json", "--name", name, "--to", to])
            .args(more)
            .arg(directory);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start crxfer send")?;
        let mut errors = child.stderr.take().context("no standard error")?;
        let collector = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            text
        });
        let mut last = None;
        for line in BufReader::new(child.stdout.take().context("no standard output")?).lines() {
            let line = line?;
            let value: Value = serde_json::from_str(&line)
                .with_context(|| format!("crxfer send printed a line that is no JSON: {line}"))?;
            on_line(&value);
            last = Some(value);
        }
        let code = child.wait()?.code();
        let message = collector.join().unwrap_or_default();
        Ok(Outcome {
            code,
            message,
            last,
        })
    }

    /// Runs another verb of the command here and gives its output.
    pub(crate) fn run(&self, words: &[&str]) -> Result<String> {
        run::quiet(Command::new(&self.program).args(words))
    }
}

/// How `crxfer send` ended.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) message: String,
    last: Option<Value>,
}

impl Outcome {
    /// The report of a transfer that should have succeeded.
    pub(crate) fn finished(self) -> Result<Sent> {
        if self.code != Some(0) {
            bail!(
                "crxfer send ended with {:?}: {}",
                self.code,
                run::last_lines(&self.message, 10)
            );
        }
        let last = self.last.context("crxfer send printed nothing")?;
        Sent::read(&last).with_context(|| format!("last line of crxfer send: {last}"))
    }

    /// The message of a transfer that should have failed.
    pub(crate) fn refused(self) -> Result<(i32, String)> {
        match self.code {
            Some(0) => bail!("crxfer send succeeded where it should not: {:?}", self.last),
            Some(code) => Ok((code, self.message)),
            None => bail!("crxfer send died of a signal: {}", self.message),
        }
    }
}

/// What the last line of `crxfer send --json` says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sent {
    pub(crate) name: String,
    pub(crate) generation: u64,
    pub(crate) completeness: String,
    pub(crate) layout: String,
    pub(crate) base: Option<String>,
    pub(crate) pages: PageCounts,
    pub(crate) image_bytes: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) seconds: f64,
}

/// Pages by what was done with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageCounts {
    pub(crate) total: u64,
    pub(crate) zero: u64,
    pub(crate) known: u64,
    pub(crate) duplicate: u64,
    pub(crate) compressed: u64,
    pub(crate) raw: u64,
}

impl Sent {
    fn read(value: &Value) -> Result<Self> {
        let number = |path: &str| {
            value
                .pointer(path)
                .and_then(Value::as_u64)
                .ok_or_else(|| anyhow!("no number at {path}"))
        };
        let text = |path: &str| {
            value
                .pointer(path)
                .and_then(Value::as_str)
                .map(str::to_owned)
                .ok_or_else(|| anyhow!("no text at {path}"))
        };
        if text("/event")? != "done" {
            bail!("the event is not \"done\"");
        }
        let pages = PageCounts {
            total: number("/pages/total")?,
            zero: number("/pages/zero")?,
            known: number("/pages/known")?,
            duplicate: number("/pages/duplicate")?,
            compressed: number("/pages/compressed")?,
            raw: number("/pages/raw")?,
        };
        Ok(Self {
            name: text("/name")?,
            generation: number("/generation")?,
            completeness: text("/completeness")?,
            layout: text("/layout")?,
            base: text("/base").ok(),
            pages,
            image_bytes: number("/bytes/image")?,
            sent_bytes: number("/bytes/sent")?,
            received_bytes: number("/bytes/received")?,
            seconds: value
                .pointer("/seconds")
                .and_then(Value::as_f64)
                .context("no number at /seconds")?,
        })
    }

    /// Bytes on the wire, both ways.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.sent_bytes + self.received_bytes
    }
}

/// A running `crxfer recv`; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Receiver {
    child: Child,
    /// The child is nsenter, and crxfer the child of that.
    inside: bool,
    ticket: PathBuf,
    log: PathBuf,
}

impl Receiver {
    fn wait_until_ready(&mut self) -> Result<()> {
        let outcome = run::wait_for(
            "crxfer recv to listen",
            Duration::from_secs(20),
            || match self.child.try_wait() {
                Ok(None) => self.ticket.exists().then_some(Ok(())),
                Ok(Some(status)) => Some(Err(anyhow!("crxfer recv ended: {status}"))),
                Err(error) => Some(Err(error.into())),
            },
        );
        outcome
            .and_then(|ready| ready)
            .with_context(|| format!("crxfer recv said:\n{}", self.said()))
    }

    /// What to give to `crxfer send --to`.
    pub(crate) fn target(&self) -> String {
        format!("@{}", self.ticket.display())
    }

    /// The ticket itself.
    pub(crate) fn ticket(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.ticket)?.trim().to_owned())
    }

    /// What it printed last.
    pub(crate) fn said(&self) -> String {
        run::last_lines(&fs::read_to_string(&self.log).unwrap_or_default(), 12)
    }

    /// Its process, where it runs beside this program.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end, as a service manager would, and waits for that.
    pub(crate) fn stop(&mut self) -> Result<()> {
        let pid = match self.inside {
            true => hosts::only_child(self.child.id()).unwrap_or(0),
            false => i32::try_from(self.child.id())?,
        };
        hosts::terminate(pid);
        run::wait_for("crxfer recv to end", Duration::from_secs(10), || {
            (!self.is_running()).then_some(())
        })
    }

    /// Kills it, as a crash or a power cut would.
    pub(crate) fn kill(&mut self) {
        if self.inside
            && let Ok(pid) = hosts::only_child(self.child.id())
        {
            hosts::kill(pid);
        } else {
            // An ended process is as good.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.kill();
    }
}
