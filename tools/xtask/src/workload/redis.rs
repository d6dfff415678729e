//! redis and a small client of its protocol.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Values, Workload};
use crate::hosts::Host;
use crate::run;

/// A redis whose values are known.
#[derive(Debug)]
pub(crate) struct Redis {
    pub(crate) values: Values,
    rounds: usize,
    serves: bool,
}

impl Redis {
    pub(crate) const PORT: u16 = 6379;

    pub(crate) fn new(values: Values) -> Self {
        Self {
            values,
            rounds: 0,
            serves: false,
        }
    }

    /// One that other hosts reach.
    pub(crate) fn serving(values: Values) -> Self {
        Self {
            serves: true,
            ..Self::new(values)
        }
    }

    fn set(&self, host: &Host, indexes: &[usize]) -> Result<()> {
        host.within(|| {
            let mut client = Client::connect()?;
            indexes
                .iter()
                .try_for_each(|&index| client.set(&Values::key(index), &self.values.value(index)))
        })?;
        host.wait_for_closed_connections()
    }
}

impl Workload for Redis {
    fn start(&mut self, host: &Host) -> Result<u32> {
        let program = run::find_program("redis-server").context("redis-server is not installed")?;
        let port = Self::PORT.to_string();
        let address = if self.serves { "0.0.0.0" } else { "127.0.0.1" };
        let arguments = [
            "--bind",
            address,
            "--protected-mode",
            "no",
            "--port",
            &port,
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            "/",
        ];
        let pid = host.start_workload(&program, &arguments)?;
        let all: Vec<usize> = (0..self.values.len()).collect();
        self.set(host, &all)?;
        Ok(pid)
    }

    fn write(&mut self, host: &Host) -> Result<()> {
        self.rounds += 1;
        let changed = self.values.change(self.rounds, 20);
        self.set(host, &changed)
    }

    fn check(&self, host: &Host) -> Result<usize> {
        host.within(|| {
            let mut client = Client::connect()?;
            for index in 0..self.values.len() {
                let key = Values::key(index);
                let found = client
                    .value(&key)?
                    .with_context(|| format!("redis lost {key}"))?;
                self.values.compare(index, &found)?;
            }
            Ok(self.values.len())
        })
    }
}

/// A connection to redis.
#[derive(Debug)]
struct Client {
    input: BufReader<TcpStream>,
    output: BufWriter<TcpStream>,
}

impl Client {
    fn connect() -> Result<Self> {
        let output = run::wait_for("redis to answer", Duration::from_secs(10), || {
            TcpStream::connect(("127.0.0.1", Redis::PORT)).ok()
        })?;
        output.set_read_timeout(Some(Duration::from_secs(20)))?;
        // A value that does not fit in the buffer would wait for an acknowledgement in the middle.
        output.set_nodelay(true)?;
        Ok(Self {
            input: BufReader::new(output.try_clone()?),
            output: BufWriter::with_capacity(1 << 17, output),
        })
    }

    fn request(&mut self, words: &[&[u8]]) -> Result<String> {
        write!(self.output, "*{}\r\n", words.len())?;
        for word in words {
            write!(self.output, "${}\r\n", word.len())?;
            self.output.write_all(word)?;
            self.output.write_all(b"\r\n")?;
        }
        self.output.flush()?;
        let mut line = String::new();
        self.input
            .read_line(&mut line)
            .context("redis does not answer")?;
        Ok(line.trim_end().to_owned())
    }

    fn set(&mut self, key: &str, value: &[u8]) -> Result<()> {
        match self.request(&[b"SET", key.as_bytes(), value])?.as_str() {
            "+OK" => Ok(()),
            other => bail!("redis refused {key}: {other}"),
        }
    }

    fn value(&mut self, key: &str) -> Result<Option<Vec<u8>>> {
        let head = self.request(&[b"GET", key.as_bytes()])?;
        match head.strip_prefix('$') {
            Some("-1") => Ok(None),
            Some(size) => {
                let mut value = vec![0; size.parse::<usize>()? + 2];
                self.input.read_exact(&mut value)?;
                value.truncate(value.len() - 2);
                Ok(Some(value))
            }
            None => bail!("redis answered {head:?} for {key}"),
        }
    }
}
