//! nginx: a master and a worker with shared memory, which counts requests there.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Workload;
use crate::hosts::Host;
use crate::run;

const PORT: u16 = 8087;
/// The module that counts is part of Debian's nginx.
const CONFIGURATION: &str = "
daemon off; user root; worker_processes 1; pid DIR/nginx.pid; error_log /dev/null;
events { worker_connections 64; }
http {
    access_log off; keepalive_timeout 0;
    client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
    limit_req_zone $binary_remote_addr zone=seen:8m rate=10000r/s;
    server {
        listen 127.0.0.1:8087;
        location / { limit_req zone=seen burst=1000 nodelay; return 200 here; }
        location /count { stub_status; }
    }
}
";

/// One that streams a file slowly, and answers a short question.
const STREAMING: &str = "
daemon off; user root; worker_processes 1; pid DIR/nginx.pid; error_log /dev/null;
events { worker_connections 64; }
http {
    access_log off; sendfile off; output_buffers 2 64k;
    client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
    server {
        listen 0.0.0.0:8088;
        location / { root DIR; limit_rate RATE; }
        location /here { return 200 here; }
    }
}
";

/// An nginx that streams one file.
#[derive(Debug)]
pub(crate) struct Streaming {
    pub(crate) pid: u32,
    /// Digest of the file.
    pub(crate) digest: blake3::Hash,
}

impl Streaming {
    pub(crate) const PORT: u16 = 8088;
    pub(crate) const FILE: &'static str = "/stream";

    /// Starts it on `host` with a file of `bytes`, of which a client gets `rate` a second.
    pub(crate) fn start(host: &Host, directory: &Path, bytes: usize, rate: usize) -> Result<Self> {
        let mut content = vec![0; bytes];
        blake3::Hasher::new()
            .update(b"stream")
            .finalize_xof()
            .fill(&mut content);
        fs::write(directory.join(&Self::FILE[1..]), &content)?;
        let program = run::find_program("nginx").context("nginx is not installed")?;
        let place = directory
            .to_str()
            .context("the scratch directory has a strange name")?;
        let file = directory.join("nginx.conf");
        let text = STREAMING
            .replace("DIR", place)
            .replace("RATE", &rate.to_string());
        fs::write(&file, text)?;
        let file = file
            .to_str()
            .context("the scratch directory has a strange name")?;
        let pid = host.start_workload(&program, &["-p", place, "-c", file])?;
        run::wait_for("nginx to listen", Duration::from_secs(5), || {
            host.listens_on(Self::PORT).then_some(())
        })?;
        Ok(Self {
            pid,
            digest: blake3::hash(&content),
        })
    }
}

/// An nginx whose count of requests is known.
#[derive(Debug)]
pub(crate) struct Nginx {
    directory: PathBuf,
    requests: u64,
}

impl Nginx {
    /// Keeps its files in `directory`, which both hosts see.
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            requests: 0,
        }
    }

    fn ask(&mut self, host: &Host, count: u64) -> Result<()> {
        host.within(|| {
            (0..count).try_for_each(|_| match request("/")?.ends_with("here") {
                true => Ok(()),
                false => bail!("nginx gave another page"),
            })
        })?;
        self.requests += count;
        host.wait_for_closed_connections()
    }
}

impl Workload for Nginx {
    fn start(&mut self, host: &Host) -> Result<u32> {
        let program = run::find_program("nginx").context("nginx is not installed")?;
        let place = self
            .directory
            .to_str()
            .context("the scratch directory has a strange name")?;
        let file = self.directory.join("nginx.conf");
        fs::write(&file, CONFIGURATION.replace("DIR", place))?;
        let file = file
            .to_str()
            .context("the scratch directory has a strange name")?;
        let pid = host.start_workload(&program, &["-p", place, "-c", file])?;
        self.ask(host, 100)?;
        Ok(pid)
    }

    fn write(&mut self, host: &Host) -> Result<()> {
        self.ask(host, 50)
    }

    fn check(&self, host: &Host) -> Result<usize> {
        // The question is a request too.
        let wanted = self.requests + 1;
        let text = host.within(|| request("/count"))?;
        let numbers = text
            .lines()
            .skip_while(|line| !line.starts_with("server accepts"))
            .nth(1);
        let counted = numbers.and_then(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
        if counted != Some(wanted) {
            bail!("nginx counted {counted:?} requests, not {wanted}");
        }
        host.wait_for_closed_connections()?;
        Ok(1)
    }
}

fn request(path: &str) -> Result<String> {
    let mut stream = run::wait_for("nginx to answer", Duration::from_secs(10), || {
        TcpStream::connect(("127.0.0.1", PORT)).ok()
    })?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("nginx does not answer")?;
    Ok(answer)
}
