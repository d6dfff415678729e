//! A `crxfer migrate` that runs: what it says is kept with the time at which it came.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::hosts;

/// A `crxfer migrate`. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Moving {
    child: Child,
    pub(super) begin: Instant,
    events: Arc<Mutex<Vec<(Instant, Value)>>>,
    report: PathBuf,
    code: Option<Option<i32>>,
}

impl Moving {
    pub(super) fn start(mut command: Command, log: &Path, report: PathBuf) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(log.join("migrate.err"))?);
        let mut copy = File::create(log.join("migrate.out"))?;
        let begin = Instant::now();
        let mut child = command.spawn().context("cannot start crxfer migrate")?;
        let output = child.stdout.take().context("no standard output")?;
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = events.clone();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let at = Instant::now();
                let _ = writeln!(copy, "{:8.3} {line}", (at - begin).as_secs_f64());
                if let Ok(value) = serde_json::from_str(&line) {
                    seen.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((at, value));
                }
            }
        });
        Ok(Self {
            child,
            begin,
            events,
            report,
            code: None,
        })
    }

    /// When it told of `event`, if it has.
    pub(super) fn told(&self, event: &str) -> Option<Instant> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let found = events.iter().find(|(_, value)| value["event"] == *event);
        found.map(|(at, _)| *at)
    }

    /// The last thing that it told.
    pub(super) fn last(&self) -> String {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let last = events.last().and_then(|(_, value)| value["event"].as_str());
        last.unwrap_or("nothing").to_owned()
    }

    /// Its exit code once it has ended: `None` inside is a signal.
    pub(super) fn ended(&mut self) -> Option<Option<i32>> {
        if self.code.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.code = Some(status.code());
        }
        self.code
    }

    /// The program that has entered the host for it.
    pub(super) fn shell(&self) -> u32 {
        self.child.id()
    }

    /// Its report, if it wrote one.
    pub(super) fn report(&self) -> Option<Value> {
        serde_json::from_str(&std::fs::read_to_string(&self.report).ok()?).ok()
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        if self.ended().is_none() {
            if let Ok(pid) = hosts::only_child(self.child.id()) {
                hosts::kill(pid);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
