//! A server that keeps many connections open, and a count for each: this program, as
//! `xtask workload echo`.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Result;
use rustix::event::{PollFd, PollFlags, poll};

use crate::hosts::Host;
use crate::run;

/// The server.
#[derive(Debug)]
pub(crate) struct Echo;

impl Echo {
    pub(crate) const PORT: u16 = 7007;

    /// Starts it on `host`; gives its pid there.
    pub(crate) fn start(host: &Host) -> Result<u32> {
        let pid = host.start_workload(&run::own_program()?, &["workload", "echo"])?;
        run::wait_for("the echo server to listen", Duration::from_secs(5), || {
            host.listens_on(Self::PORT).then_some(())
        })?;
        Ok(pid)
    }

    /// The server itself, which never ends: answers 8 bytes with them and the count of answers so far.
    pub(crate) fn serve() -> Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, Self::PORT))?;
        listener.set_nonblocking(true)?;
        let mut clients: Vec<Client> = Vec::new();
        loop {
            let mut polled = vec![PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
            let streams = clients.iter().map(|client| client.stream.as_fd());
            polled.extend(streams.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
            drop(polled);
            let mut turn = ready.iter().skip(1);
            clients.retain_mut(|client| turn.next() != Some(&true) || client.answer());
            if ready.first() == Some(&true)
                && let Ok((stream, _)) = listener.accept()
            {
                clients.push(Client {
                    stream,
                    question: Vec::new(),
                    answers: 0,
                });
            }
        }
    }
}

struct Client {
    stream: TcpStream,
    question: Vec<u8>,
    answers: u64,
}

impl Client {
    /// Reads what is there and answers if that completes a question. False once it has hung up.
    fn answer(&mut self) -> bool {
        let mut piece = [0; 8];
        let room = 8 - self.question.len();
        match self.stream.read(&mut piece[..room]) {
            Ok(0) => return false,
            Ok(count) => self.question.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => return true,
            Err(_) => return false,
        }
        if self.question.len() < 8 {
            return true;
        }
        self.answers += 1;
        let answer = [&self.question[..], &self.answers.to_le_bytes()].concat();
        self.question.clear();
        self.stream.write_all(&answer).is_ok()
    }
}
