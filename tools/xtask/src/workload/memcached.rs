//! memcached and a small client of its text protocol.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Values, Workload};
use crate::client::poll;
use crate::hosts::Host;
use crate::run;

/// Keys asked for in one request.
const KEYS_AT_ONCE: usize = 64;

/// A memcached whose values are known.
#[derive(Debug)]
pub(crate) struct Memcached {
    pub(crate) values: Values,
    /// One of how many values is written between two dumps.
    step: usize,
    rounds: usize,
    serves: bool,
}

impl Memcached {
    pub(crate) const PORT: u16 = 11211;

    pub(crate) fn new(values: Values, step: usize) -> Self {
        Self {
            values,
            step,
            rounds: 0,
            serves: false,
        }
    }

    /// One that other hosts reach, over UDP as well, and that answers what a poller asks.
    pub(crate) fn serving(values: Values) -> Self {
        Self {
            serves: true,
            ..Self::new(values, 1)
        }
    }
}

impl Workload for Memcached {
    fn start(&mut self, host: &Host) -> Result<u32> {
        self.start_by(host, &|program, arguments| {
            host.start_workload(program, arguments)
        })
    }

    fn write(&mut self, host: &Host) -> Result<()> {
        self.rounds += 1;
        let changed = self.values.change(self.rounds % self.step, self.step);
        host.within(|| Client::connect()?.set(&self.values, &changed))?;
        host.wait_for_closed_connections()
    }

    fn check(&self, host: &Host) -> Result<usize> {
        host.within(|| Client::connect()?.compare(&self.values))
    }
}

impl Memcached {
    /// Starts it on `host` in a way of the caller's, which gives its pid there.
    pub(crate) fn start_by(
        &mut self,
        host: &Host,
        start: &dyn Fn(&Path, &[&str]) -> Result<u32>,
    ) -> Result<u32> {
        let program = run::find_program("memcached").context("memcached is not installed")?;
        let limit = (self.values.bytes() * 2 / (1 << 20) + 64).to_string();
        let port = Self::PORT.to_string();
        let (address, udp_port) = match self.serves {
            true => ("0.0.0.0", port.as_str()),
            false => ("127.0.0.1", "0"),
        };
        let arguments = [
            "-u",
            // Asking for limits of another user's process needs a right that containers lack.
            "root", "-l", address, "-p", &port, "-U", udp_port, "-t", "2", "-m", &limit,
        ];
        let pid = start(&program, &arguments)?;
        let all: Vec<usize> = (0..self.values.len()).collect();
        host.within(|| {
            let mut client = Client::connect()?;
            client.set(&self.values, &all)?;
            match self.serves {
                true => client.set_one(poll::KEY, poll::VALUE.as_bytes()),
                false => Ok(()),
            }
        })?;
        host.wait_for_closed_connections()?;
        Ok(pid)
    }
}

/// A connection to memcached.
#[derive(Debug)]
struct Client {
    input: BufReader<TcpStream>,
    output: BufWriter<TcpStream>,
}

impl Client {
    fn connect() -> Result<Self> {
        let output = run::wait_for("memcached to answer", Duration::from_secs(10), || {
            TcpStream::connect(("127.0.0.1", Memcached::PORT)).ok()
        })?;
        output.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self {
            input: BufReader::new(output.try_clone()?),
            output: BufWriter::with_capacity(1 << 20, output),
        })
    }

    fn set(&mut self, values: &Values, indexes: &[usize]) -> Result<()> {
        for &index in indexes {
            self.put(&Values::key(index), &values.value(index))?;
        }
        self.settle()
    }

    fn set_one(&mut self, key: &str, value: &[u8]) -> Result<()> {
        self.put(key, value)?;
        self.settle()
    }

    fn put(&mut self, key: &str, value: &[u8]) -> Result<()> {
        write!(self.output, "set {key} 0 0 {} noreply\r\n", value.len())?;
        self.output.write_all(value)?;
        self.output.write_all(b"\r\n")?;
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        // Answered when all before it is done.
        self.output.write_all(b"version\r\n")?;
        self.output.flush()?;
        let answer = self.line()?;
        if !answer.starts_with("VERSION") {
            bail!("memcached refused a value: {answer}");
        }
        Ok(())
    }

    fn compare(&mut self, values: &Values) -> Result<usize> {
        let all: Vec<usize> = (0..values.len()).collect();
        for indexes in all.chunks(KEYS_AT_ONCE) {
            let keys: Vec<String> = indexes.iter().map(|&index| Values::key(index)).collect();
            write!(self.output, "get {}\r\n", keys.join(" "))?;
            self.output.flush()?;
            for &index in indexes {
                let found = self.value(&Values::key(index))?;
                values.compare(index, &found)?;
            }
            let end = self.line()?;
            if end != "END" {
                bail!("memcached said {end:?} after the last value");
            }
        }
        Ok(values.len())
    }

    /// The next value of an answer, which must be that of `key`.
    fn value(&mut self, key: &str) -> Result<Vec<u8>> {
        let head = self.line()?;
        let words: Vec<&str> = head.split(' ').collect();
        let ["VALUE", found, _, size] = words[..] else {
            bail!("{key} is lost: memcached said {head:?}")
        };
        if found != key {
            bail!("{key} is lost: memcached went on with {found}");
        }
        let mut value = vec![0; size.parse::<usize>()? + 2];
        self.input.read_exact(&mut value)?;
        value.truncate(value.len() - 2);
        Ok(value)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.input
            .read_line(&mut line)
            .context("memcached does not answer")?;
        Ok(line.trim_end().to_owned())
    }
}
