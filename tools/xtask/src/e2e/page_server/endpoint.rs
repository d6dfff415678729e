//! A running `crxfer page-server`.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::super::Context;
use super::NAME;
use crate::crxfer::{Place, Receiver};
use crate::hosts::{self, Host};
use crate::run;
use crate::scratch::Scratch;

/// It, with what it printed; dropping it kills it.
pub(super) struct Endpoint {
    child: Child,
    log: PathBuf,
    /// How CRIU reaches it.
    words: Vec<String>,
    /// CRIU's end of the socket.
    theirs: Option<UnixStream>,
    /// Events that were looked at.
    seen: Mutex<usize>,
}

/// What it says of a dump that it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) generation: u64,
    pub(super) pages: u64,
    pub(super) fresh_pages: u64,
}

impl Endpoint {
    pub(super) fn listening(
        context: &Context,
        host: &Host,
        scratch: &Scratch,
        receiver: &Receiver,
        more: &[&str],
    ) -> Result<Self> {
        let mut command = context.crxfer.command(Place::On(host));
        command.args(["page-server", "--listen", "127.0.0.1:0"]);
        let mut endpoint = Self::start(command, scratch.path(), receiver, more)?;
        let ready = endpoint.next("ready")?;
        let address = ready["address"].as_str().context("it has no address")?;
        let (_, port) = address.rsplit_once(':').context("no port")?;
        let words = ["--page-server", "--address", "127.0.0.1", "--port", port];
        endpoint.words = words.map(str::to_owned).to_vec();
        Ok(endpoint)
    }

    /// CRIU is to be started by this program too.
    pub(super) fn inherited(
        context: &Context,
        host: &Host,
        scratch: &Scratch,
        receiver: &Receiver,
    ) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        inheritable(&ours)?;
        let mut command = context.crxfer.command(Place::On(host));
        let number = ours.as_raw_fd().to_string();
        command.args(["page-server", "--fd", &number]);
        let mut endpoint = Self::start(command, scratch.path(), receiver, &[])?;
        endpoint.next("ready")?;
        drop(ours);
        inheritable(&theirs)?;
        let number = theirs.as_raw_fd().to_string();
        let words = ["--page-server", "--ps-socket", &number];
        endpoint.words = words.map(str::to_owned).to_vec();
        endpoint.theirs = Some(theirs);
        Ok(endpoint)
    }

    fn start(
        mut command: Command,
        place: &Path,
        receiver: &Receiver,
        more: &[&str],
    ) -> Result<Self> {
        let log = place.join("page-server.events");
        let output = File::create(&log)?;
        let child = command
            .args(["--json", "--name", NAME, "--to", &receiver.target()])
            .args(more)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("cannot start crxfer page-server")?;
        Ok(Self {
            child,
            log,
            words: Vec::new(),
            theirs: None,
            seen: Mutex::new(0),
        })
    }

    /// Address and port, for those that want it in one word.
    pub(super) fn address(&self) -> String {
        let port = self.words.last().map(String::as_str);
        format!("127.0.0.1:{}", port.unwrap_or_default())
    }

    /// What `criu dump` is to be told.
    pub(super) fn words(&self) -> Vec<String> {
        self.words.clone()
    }

    /// The next event of this kind; others before it are an error.
    pub(super) fn next(&self, kind: &str) -> Result<Value> {
        let what = format!("crxfer page-server to say {kind}");
        let found = run::wait_for(&what, Duration::from_secs(20), || {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            let mut seen = self.seen.lock().unwrap_or_else(|it| it.into_inner());
            for line in text.lines().skip(*seen) {
                let event: Value = serde_json::from_str(line).ok()?;
                *seen += 1;
                if event["event"] == kind {
                    return Some(Ok(event));
                }
                if event["event"] != "begin" {
                    return Some(Err(anyhow::anyhow!("it says {event}")));
                }
            }
            None
        });
        found.and_then(|event| event).with_context(|| self.said())
    }

    pub(super) fn taken(&self) -> Result<Taken> {
        let event = self.next("taken")?;
        let number = |name: &str| {
            event[name]
                .as_u64()
                .with_context(|| format!("no {name}: {event}"))
        };
        Ok(Taken {
            generation: number("generation")?,
            pages: number("pages")?,
            fresh_pages: number("fresh_pages")?,
        })
    }

    pub(super) fn said(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        format!("crxfer page-server said:\n{}", run::last_lines(&text, 10))
    }

    /// Ends it as a user would, and waits for that.
    pub(super) fn stop(mut self) -> Result<()> {
        if self.theirs.take().is_none() {
            hosts::terminate(hosts::only_child(self.child.id())?);
        }
        let status = run::wait_for("crxfer page-server to end", Duration::from_secs(10), || {
            self.child.try_wait().transpose()
        })??;
        ensure!(status.success(), "it ended with {status}\n{}", self.said());
        Ok(())
    }

    /// Asks it to end, and does not wait.
    pub(super) fn terminate(&self) -> Result<()> {
        hosts::terminate(hosts::only_child(self.child.id())?);
        Ok(())
    }

    /// Kills it, as a crash would.
    pub(super) fn kill(&mut self) {
        if let Ok(pid) = hosts::only_child(self.child.id()) {
            hosts::kill(pid);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.kill();
        }
    }
}

/// Rust's descriptors are closed in children.
fn inheritable(socket: &UnixStream) -> Result<()> {
    Ok(rustix::io::fcntl_setfd(
        socket,
        rustix::io::FdFlags::empty(),
    )?)
}
