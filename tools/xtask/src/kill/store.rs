//! memcached, and what its clients know of it: for each key, which write was sent last and which was
//! acknowledged last.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use super::clients::{Talk, connect};
use super::ground::SOON;
use crate::hosts::Host;
use crate::run;
use crate::workload::{Memcached, Values};

/// Bytes of a value: 3 MB with all keys.
const VALUE_BYTES: usize = 10_000;
const KEYS: usize = 300;

/// What the clients of a memcached know.
#[derive(Debug)]
pub(super) struct Store {
    ledger: Mutex<Ledger>,
}

#[derive(Debug)]
struct Ledger {
    /// Chooses the keys to write.
    choice: Values,
    sent: Vec<u32>,
    acknowledged: Vec<u32>,
}

impl Store {
    /// Starts memcached on `host` and fills it. Gives its pid and what its clients know.
    pub(super) fn start(host: &Host) -> Result<(u32, Self)> {
        let program = run::find_program("memcached").context("memcached is not installed")?;
        let port = Memcached::PORT.to_string();
        // Asking for limits of another user's process needs a right that containers lack: root.
        let words = [
            "-u", "root", "-l", "0.0.0.0", "-p", &port, "-U", &port, "-t", "2", "-m", "64",
        ];
        let pid = host.start_workload(&program, &words)?;
        run::wait_for("memcached to listen", SOON, || {
            host.listens_on(Memcached::PORT).then_some(())
        })?;
        let store = Self {
            ledger: Mutex::new(Ledger {
                choice: Values::new(KEYS, VALUE_BYTES),
                sent: vec![0; KEYS],
                acknowledged: vec![0; KEYS],
            }),
        };
        host.within(|| {
            let mut stream = connect(std::net::Ipv4Addr::LOCALHOST, Memcached::PORT, SOON)?;
            (0..KEYS).try_for_each(|index| store.write(&mut stream, index))
        })?;
        Ok((pid, store))
    }

    fn with<R>(&self, work: impl FnOnce(&mut Ledger) -> R) -> R {
        work(&mut self.ledger.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, stream: &mut TcpStream, index: usize) -> Result<()> {
        let sequence = self.with(|ledger| {
            ledger.sent[index] += 1;
            ledger.sent[index]
        });
        let value = Values::version(VALUE_BYTES, index, sequence);
        let mut request = format!("set {} 0 0 {VALUE_BYTES}\r\n", Values::key(index)).into_bytes();
        request.extend_from_slice(&value);
        request.extend_from_slice(b"\r\n");
        stream.write_all(&request).context("a write broke")?;
        let mut answer = [0; 8];
        stream
            .read_exact(&mut answer)
            .context("no acknowledgement")?;
        ensure!(&answer == b"STORED\r\n", "a write was answered {answer:?}");
        self.with(|ledger| ledger.acknowledged[index] = sequence);
        Ok(())
    }

    /// Reads key `index`: its version must be one between the last acknowledged and the last sent.
    fn read(&self, stream: &mut TcpStream, index: usize) -> Result<()> {
        let key = Values::key(index);
        let least = self.with(|ledger| ledger.acknowledged[index]);
        stream.write_all(format!("get {key}\r\n").as_bytes())?;
        let mut input = BufReader::new(stream);
        let mut head = String::new();
        input.read_line(&mut head).context("no answer")?;
        let wanted = format!("VALUE {key} 0 {VALUE_BYTES}\r\n");
        ensure!(head == wanted, "{key} is lost: {head:?}");
        let mut value = vec![0; VALUE_BYTES + b"\r\nEND\r\n".len()];
        input.read_exact(&mut value).context("half an answer")?;
        ensure!(
            value.ends_with(b"\r\nEND\r\n"),
            "{key} has no end where it should"
        );
        let found = Values::version_of(index, &value[..VALUE_BYTES])?;
        let most = self.with(|ledger| ledger.sent[index]);
        if !(least..=most).contains(&found) {
            bail!("{key} has version {found}; {least} was acknowledged, {most} sent");
        }
        Ok(())
    }
}

impl Talk for Store {
    fn port(&self) -> u16 {
        Memcached::PORT
    }

    fn exchange(&self, stream: &mut TcpStream) -> Result<()> {
        let index = self.with(|ledger| ledger.choice.rewrite_one());
        self.write(stream, index)
    }

    fn look(&self, stream: &mut TcpStream) -> Result<()> {
        self.read(stream, 0)
    }

    fn compare(&self, stream: &mut TcpStream) -> Result<usize> {
        (0..KEYS).try_for_each(|index| self.read(stream, index))?;
        Ok(KEYS)
    }
}
