//! nginx, and what its clients know of it: how many requests it has answered, and every byte of a
//! download that never ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::clients::{PATIENCE, Pulse, Talk, connect};
use super::ground::SOON;
use crate::hosts::{Background, Host, Network, SERVICE, Stop};
use crate::run;

const PORT: u16 = 8088;

/// Answers each path with itself; counts requests in memory that master and worker share.
const CONFIGURATION: &str = "
daemon off; user root; worker_processes 1; pid DIR/nginx.pid; error_log /dev/null;
events { worker_connections 256; }
http {
    access_log off; keepalive_timeout 7200; keepalive_requests 100000000; reset_timedout_connection on;
    client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
    server {
        listen 0.0.0.0:8088;
        location / { return 200 $request_uri; }
        location /count { stub_status; }
        location /stream { root DIR; sendfile off; output_buffers 2 64k; limit_rate 200k; }
    }
}
";

/// Bytes of the download: five minutes of it.
const STREAM_BYTES: u64 = 60 << 20;

/// What the clients of an nginx know.
#[derive(Debug, Default)]
pub(super) struct Web {
    /// Requests that were sent.
    sent: AtomicU64,
    acknowledged: AtomicU64,
    /// Pieces of the download that came.
    arrived: Arc<AtomicU64>,
}

impl Web {
    /// Starts nginx on `host` with its files in `directory`, which both hosts see.
    pub(super) fn start(host: &Host, directory: &Path) -> Result<(u32, Self)> {
        let program = run::find_program("nginx").context("nginx is not installed")?;
        let place = directory
            .to_str()
            .context("the scratch directory has a strange name")?;
        let file = directory.join("nginx.conf");
        std::fs::write(&file, CONFIGURATION.replace("DIR", place))?;
        let content: Vec<u8> = (0..STREAM_BYTES / 8).flat_map(u64::to_le_bytes).collect();
        std::fs::write(directory.join("stream"), content)?;
        let file = file
            .to_str()
            .context("the scratch directory has a strange name")?;
        let pid = host.start_workload(&program, &["-p", place, "-c", file])?;
        run::wait_for("nginx to listen", SOON, || {
            host.listens_on(PORT).then_some(())
        })?;
        Ok((pid, Self::default()))
    }

    fn get(stream: &mut TcpStream, path: &str) -> Result<String> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        stream
            .write_all(request.as_bytes())
            .context("a request broke")?;
        let mut input = BufReader::new(stream);
        let length = read_head(&mut input)?;
        ensure!(length < 4096, "a long answer to {path}");
        let mut body = vec![0; usize::try_from(length)?];
        input.read_exact(&mut body).context("half an answer")?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

/// Reads the head of an answer; gives how long the body is.
fn read_head(input: &mut impl BufRead) -> Result<u64> {
    let mut length = None;
    let mut first = true;
    loop {
        let mut line = String::new();
        let count = input.read_line(&mut line).context("no answer")?;
        ensure!(count > 0, "closed before the answer");
        if std::mem::take(&mut first) {
            ensure!(line.starts_with("HTTP/1.1 200"), "answered {line:?}");
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = Some(value.trim().parse()?);
        }
        if line.trim_end().is_empty() {
            return length.context("the answer tells no length");
        }
    }
}

impl Talk for Web {
    fn port(&self) -> u16 {
        PORT
    }

    fn exchange(&self, stream: &mut TcpStream) -> Result<()> {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        let path = format!("/question-{number}");
        let answer = Self::get(stream, &path)?;
        ensure!(answer == path, "{path} was answered {answer:?}");
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn look(&self, stream: &mut TcpStream) -> Result<()> {
        self.exchange(stream)
    }

    /// The count of answers, which only this copy's memory has, must not fall behind.
    fn compare(&self, stream: &mut TcpStream) -> Result<usize> {
        let least = self.acknowledged.load(Ordering::Relaxed);
        let text = Self::get(stream, "/count")?;
        let mut lines = text.lines();
        lines.find(|line| line.starts_with("server accepts"));
        let numbers = lines.next().unwrap_or_default();
        let counted: Option<u64> = numbers
            .split_whitespace()
            .nth(2)
            .and_then(|word| word.parse().ok());
        let most = self.sent.load(Ordering::Relaxed);
        match counted {
            Some(counted) if counted >= least => {}
            _ => bail!("it counted {counted:?} requests; {least} were answered, {most} sent"),
        }
        let arrived = self.arrived.load(Ordering::Relaxed);
        run::wait_for("the download to go on", SOON, || {
            (self.arrived.load(Ordering::Relaxed) > arrived).then_some(())
        })?;
        Ok(usize::try_from(least)?)
    }

    fn beside(&self, network: &Network, pulse: &Arc<Pulse>) -> Result<Option<Background<()>>> {
        let (arrived, pulse) = (self.arrived.clone(), pulse.clone());
        let work = network.c.background(move |stop| {
            download(&arrived, &pulse, &stop);
            Ok(())
        });
        work.map(Some)
    }
}

/// Downloads again and again, and compares every byte.
fn download(arrived: &AtomicU64, pulse: &Pulse, stop: &Stop) {
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = download_once(arrived, stop) {
            pulse.note_break(&error.context("the download"));
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn download_once(arrived: &AtomicU64, stop: &Stop) -> Result<()> {
    let mut stream = connect(SERVICE, PORT, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /stream HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut input = BufReader::new(stream);
    let length = read_head(&mut input)?;
    ensure!(length == STREAM_BYTES, "{length} bytes long");
    for number in 0..STREAM_BYTES / 8 {
        let mut word = [0; 8];
        input
            .read_exact(&mut word)
            .with_context(|| format!("broke after {} bytes", number * 8))?;
        let found = u64::from_le_bytes(word);
        ensure!(found == number, "number {found} where {number} should be");
        if number.is_multiple_of(512) {
            arrived.fetch_add(1, Ordering::Relaxed);
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    Ok(())
}
