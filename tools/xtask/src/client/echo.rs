//! Many connections that are kept open, each with a count that its server keeps.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::hosts::{Host, SERVICE};
use crate::workload::Echo;

/// Open connections to an echo server.
#[derive(Debug)]
pub(crate) struct Connections {
    open: Vec<TcpStream>,
    /// Questions that each has asked.
    asked: u64,
}

impl Connections {
    /// Opens `count` connections from `host` to the service address and uses each once.
    pub(crate) fn open(host: &Host, count: usize) -> Result<Self> {
        let open = host.within(|| {
            let connect = |_| -> Result<TcpStream> {
                let stream = TcpStream::connect((SERVICE, Echo::PORT))?;
                stream.set_read_timeout(Some(Duration::from_secs(30)))?;
                stream.set_nodelay(true)?;
                Ok(stream)
            };
            (0..count).map(connect).collect::<Result<Vec<_>>>()
        })?;
        let mut connections = Self { open, asked: 0 };
        connections.ask()?;
        Ok(connections)
    }

    /// Asks once over each, and compares what the server remembers of it.
    pub(crate) fn ask(&mut self) -> Result<()> {
        self.asked += 1;
        // All questions first, so that all are under way together.
        for (number, stream) in self.open.iter_mut().enumerate() {
            stream
                .write_all(&(number as u64).to_le_bytes())
                .with_context(|| format!("connection {number} broke"))?;
        }
        for (number, stream) in self.open.iter_mut().enumerate() {
            let mut answer = [0; 16];
            stream
                .read_exact(&mut answer)
                .with_context(|| format!("connection {number} gave no answer"))?;
            let wanted = [(number as u64).to_le_bytes(), self.asked.to_le_bytes()].concat();
            ensure!(
                answer[..] == wanted[..],
                "connection {number} was answered {answer:?}, not {wanted:?}"
            );
        }
        Ok(())
    }
}
