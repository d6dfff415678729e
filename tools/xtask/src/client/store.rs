//! A client that rewrites values all the time and remembers every one that the store acknowledged.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::hosts::{Background, Host, SERVICE, Stop};
use crate::workload::{Memcached, Redis, Values};

/// How a store is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Memcached,
    Redis,
}

impl Protocol {
    fn port(self) -> u16 {
        match self {
            Self::Memcached => Memcached::PORT,
            Self::Redis => Redis::PORT,
        }
    }

    fn set(self, output: &mut impl Write, key: &str, value: &[u8]) -> Result<()> {
        match self {
            Self::Memcached => write!(output, "set {key} 0 0 {}\r\n", value.len())?,
            Self::Redis => write!(
                output,
                "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n",
                key.len(),
                value.len()
            )?,
        }
        output.write_all(value)?;
        output.write_all(b"\r\n")?;
        Ok(output.flush()?)
    }

    fn stored(self) -> &'static str {
        match self {
            Self::Memcached => "STORED",
            Self::Redis => "+OK",
        }
    }
}

/// A client that writes all the time, over one connection that must survive the move.
#[derive(Debug)]
pub(crate) struct Writer {
    work: Background<Written>,
    acknowledged: Arc<AtomicU64>,
}

/// What a store must hold after a client wrote to it.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) values: Values,
    pub(crate) acknowledged: u64,
    /// The longest time from a write to its acknowledgement.
    pub(crate) slowest: Duration,
}

impl Writer {
    /// Starts on `host` to rewrite `rate` of `values` a second.
    pub(crate) fn start(
        host: &Host,
        protocol: Protocol,
        values: Values,
        rate: u32,
    ) -> Result<Self> {
        let acknowledged = Arc::new(AtomicU64::new(0));
        let count = acknowledged.clone();
        let work = host.background(move |stop| write(protocol, values, rate, &stop, &count))?;
        Ok(Self { work, acknowledged })
    }

    /// Writes that were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Ends it after an acknowledged write.
    pub(crate) fn finish(self) -> Result<Written> {
        self.work.finish().context("the client that writes")
    }
}

fn write(
    protocol: Protocol,
    values: Values,
    rate: u32,
    stop: &Stop,
    count: &AtomicU64,
) -> Result<Written> {
    let stream = TcpStream::connect((SERVICE, protocol.port()))?;
    stream.set_nodelay(true)?;
    // Longer than any move; shorter than a test.
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut input = BufReader::new(stream.try_clone()?);
    let mut output = BufWriter::with_capacity(1 << 17, stream);
    let mut written = Written {
        values,
        acknowledged: 0,
        slowest: Duration::ZERO,
    };
    let period = Duration::from_secs(1) / rate.max(1);
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let index = written.values.rewrite_one();
        let value = written.values.value(index);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // What was missed during a standstill is not made up for.
        due = (due + period).max(Instant::now());
        let begin = Instant::now();
        protocol
            .set(&mut output, &Values::key(index), &value)
            .context("the connection broke")?;
        let mut line = String::new();
        input.read_line(&mut line).context("no acknowledgement")?;
        if line.trim_end() != protocol.stored() {
            bail!("the store said {line:?} to a write");
        }
        written.slowest = written.slowest.max(begin.elapsed());
        written.acknowledged += 1;
        count.store(written.acknowledged, Ordering::Relaxed);
    }
    Ok(written)
}
