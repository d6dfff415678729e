//! A Node.js program that keeps a count in memory, and the client that knows what it must be.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::hosts::{Host, SERVICE};
use crate::run;

/// One connection that is kept open, and what was counted over it so far.
#[derive(Debug)]
pub(crate) struct Counter {
    stream: BufReader<TcpStream>,
    count: u64,
}

impl Counter {
    pub(crate) const SOURCE: &str = include_str!("counter.js");
    pub(crate) const FILE: &str = "counter.js";
    pub(crate) const PORT: u16 = 8089;

    /// Connects from `host` to the service address.
    pub(crate) fn connect(host: &Host) -> Result<Self> {
        let stream = run::wait_for("the counter to answer", Duration::from_secs(10), || {
            host.within(|| Ok(TcpStream::connect((SERVICE, Self::PORT))?))
                .ok()
        })?;
        stream.set_nodelay(true)?;
        // Longer than any move; shorter than a test.
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self {
            stream: BufReader::new(stream),
            count: 0,
        })
    }

    /// Has it count `times` times. It must have forgotten none, and counted for nobody else.
    pub(crate) fn count(&mut self, times: u64) -> Result<u64> {
        for _ in 0..times {
            self.stream.get_mut().write_all(b"\n")?;
            let mut line = String::new();
            self.stream
                .read_line(&mut line)
                .context("the counter does not answer")?;
            let said: u64 = line.trim().parse().context("an answer is no number")?;
            ensure!(
                said == self.count + 1,
                "the counter says {said} after {}",
                self.count
            );
            self.count = said;
        }
        Ok(self.count)
    }
}
