//! A client that downloads slowly, over one connection that survives the move of the server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::hosts::{Background, Host, SERVICE};

/// A download that goes on.
#[derive(Debug)]
pub(crate) struct Download {
    work: Background<Downloaded>,
    arrived: Arc<AtomicU64>,
}

/// What came of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Downloaded {
    pub(crate) bytes: u64,
    pub(crate) digest: blake3::Hash,
    /// The longest time in which nothing came.
    pub(crate) longest_pause: Duration,
}

impl Download {
    /// Starts on `host` to download `path` from the service address.
    pub(crate) fn start(host: &Host, port: u16, path: &'static str) -> Result<Self> {
        let arrived = Arc::new(AtomicU64::new(0));
        let count = arrived.clone();
        let work = host.background(move |_| download(port, path, &count))?;
        Ok(Self { work, arrived })
    }

    /// Bytes that came so far.
    pub(crate) fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Waits for the end of it.
    pub(crate) fn wait(self) -> Result<Downloaded> {
        self.work.wait().context("the download")
    }
}

fn download(port: u16, path: &str, count: &AtomicU64) -> Result<Downloaded> {
    let mut stream = TcpStream::connect((SERVICE, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut input = BufReader::new(stream);
    let mut wanted = None;
    loop {
        let mut line = String::new();
        input.read_line(&mut line)?;
        if let Some(length) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            wanted = Some(length.trim().parse::<u64>()?);
        }
        if line.trim_end().is_empty() {
            break;
        }
    }
    let wanted = wanted.context("the server told no length")?;
    let mut hasher = blake3::Hasher::new();
    let (mut bytes, mut longest_pause) = (0, Duration::ZERO);
    let mut piece = vec![0; 1 << 16];
    let mut last = Instant::now();
    loop {
        let got = input
            .read(&mut piece)
            .with_context(|| format!("the connection broke after {bytes} bytes"))?;
        if got == 0 {
            break;
        }
        longest_pause = longest_pause.max(last.elapsed());
        last = Instant::now();
        hasher.update(&piece[..got]);
        bytes += got as u64;
        count.store(bytes, Ordering::Relaxed);
    }
    ensure!(
        bytes == wanted,
        "the download ended after {bytes} of {wanted} bytes"
    );
    Ok(Downloaded {
        bytes,
        digest: hasher.finalize(),
        longest_pause,
    })
}
