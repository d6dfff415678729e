//! A client that asks every 2 ms, whether or not it was answered before, and knows which host answers.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::timeline::{Answer, Timeline};
use crate::hosts::{Background, Network, SERVICE, Side, Stop, neighbour};
use crate::run;

/// Time from one question to the next.
pub(crate) const PERIOD: Duration = Duration::from_millis(2);
/// How long a question over TCP waits; the next one is a new connection.
const PATIENCE: Duration = Duration::from_millis(50);
/// Questions over UDP that can be told apart: as many as two bits less than memcached's number has.
const NUMBERS: usize = 1 << 14;

/// What is asked, and what a right answer to it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Question {
    /// memcached over UDP: to the service address and, beside, to both hosts by their own ones.
    MemcachedUdp { port: u16 },
    /// A new TCP connection to the service address each time.
    Tcp {
        port: u16,
        text: &'static str,
        answer: &'static str,
    },
}

/// A client that asks all the time.
#[derive(Debug)]
pub(crate) struct Poller {
    work: Background<()>,
    begin: Instant,
    service: Arc<Mutex<Vec<Answer>>>,
    direct: Arc<Mutex<Vec<Answer>>>,
}

impl Poller {
    /// Starts it on C and waits until A has answered.
    pub(crate) fn start(network: &Network, question: Question) -> Result<Self> {
        let begin = Instant::now();
        let (service, direct) = <(Arc<Mutex<Vec<Answer>>>, Arc<Mutex<Vec<Answer>>>)>::default();
        let asker = Asker {
            begin,
            service: service.clone(),
            direct: direct.clone(),
            hosts: [network.hosts.a.address, network.hosts.b.address],
        };
        let work = network.c.background(move |stop| match question {
            Question::MemcachedUdp { port } => asker.udp(port, &stop),
            Question::Tcp { port, text, answer } => {
                asker.tcp(port, text, answer, &stop);
                Ok(())
            }
        })?;
        let poller = Self {
            work,
            begin,
            service,
            direct,
        };
        run::wait_for("the service to answer", Duration::from_secs(5), || {
            (poller.service().len() > 10).then_some(())
        })?;
        Ok(poller)
    }

    /// Time since its begin, as its answers count.
    pub(crate) fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Answers from the service address so far.
    pub(crate) fn service(&self) -> Timeline {
        copy(&self.service)
    }

    /// Answers from the hosts' own addresses so far, where they are asked.
    pub(crate) fn direct(&self) -> Timeline {
        copy(&self.direct)
    }

    /// Waits for an answer, then fails unless, for the next half second, `side` answers and the other
    /// never. How long nobody answered is what the timelines tell.
    pub(crate) fn ensure_only(&self, side: Side) -> Result<()> {
        let before = self.service().len();
        run::wait_for("the service to answer", Duration::from_secs(10), || {
            (self.service().len() > before).then_some(())
        })?;
        let begin = self.now();
        thread::sleep(Duration::from_millis(500));
        self.service()
            .ensure_only(side, begin)
            .context("at the service address")?;
        let direct = self.direct();
        if direct.len() > 0 {
            direct
                .ensure_only(side, begin)
                .context("at the hosts' own addresses")?;
        }
        Ok(())
    }

    /// Ends it. An answer that was wrong is an error.
    pub(crate) fn finish(self) -> Result<()> {
        self.work.finish()
    }
}

fn copy(answers: &Mutex<Vec<Answer>>) -> Timeline {
    Timeline::new(
        answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone(),
    )
}

fn note(answers: &Mutex<Vec<Answer>>, answer: Answer) {
    answers
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(answer);
}

struct Asker {
    begin: Instant,
    service: Arc<Mutex<Vec<Answer>>>,
    direct: Arc<Mutex<Vec<Answer>>>,
    hosts: [Ipv4Addr; 2],
}

/// What is asked of memcached over UDP; the client that sets up the service stores it.
pub(crate) const KEY: &str = "poll";
pub(crate) const VALUE: &str = "yes, here";

impl Asker {
    fn udp(&self, port: u16, stop: &Stop) -> Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        let mut asked = vec![Duration::ZERO; NUMBERS];
        let mut next = self.begin.elapsed();
        for number in (0..NUMBERS).cycle() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            asked[number] = self.begin.elapsed();
            for (target, address) in [SERVICE, self.hosts[0], self.hosts[1]].iter().enumerate() {
                let id = u16::try_from(number * 4 + target)?;
                // A full queue or an unreachable host is a question without answer.
                let _ = socket.send_to(&question(id), (*address, port));
            }
            next = (next + PERIOD).max(self.begin.elapsed());
            while let Some(left) = next.checked_sub(self.begin.elapsed()) {
                wait(&socket, left)?;
                while let Some((id, from)) = receive(&socket)? {
                    self.note_udp(id, from, &asked);
                }
            }
        }
        Ok(())
    }

    fn note_udp(&self, id: u16, from: SocketAddr, asked: &[Duration]) {
        let by = match from.ip() {
            IpAddr::V4(address) if address == self.hosts[0] => Side::A,
            IpAddr::V4(address) if address == self.hosts[1] => Side::B,
            _ => return,
        };
        let answer = Answer {
            asked: asked[usize::from(id / 4)],
            at: self.begin.elapsed(),
            by,
        };
        note(
            if id.is_multiple_of(4) {
                &self.service
            } else {
                &self.direct
            },
            answer,
        );
    }

    fn tcp(&self, port: u16, text: &str, wanted: &str, stop: &Stop) {
        while !stop.load(Ordering::Relaxed) {
            let asked = self.begin.elapsed();
            // Nobody there, or nothing said in time: no answer. What matters is when there is one.
            if ask(port, text, wanted).is_ok()
                && let Some(by) = neighbour()
            {
                let at = self.begin.elapsed();
                note(&self.service, Answer { asked, at, by });
            }
            thread::sleep(PERIOD.saturating_sub(self.begin.elapsed() - asked));
        }
    }
}

fn ask(port: u16, text: &str, wanted: &str) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((SERVICE, port)), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(text.as_bytes())?;
    let mut answer = Vec::new();
    let mut piece = [0; 512];
    while !contains(&answer, wanted.as_bytes()) {
        let count = stream.read(&mut piece)?;
        ensure!(count > 0, "closed before the answer");
        answer.extend_from_slice(&piece[..count]);
    }
    Ok(())
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// A question of memcached's UDP protocol: number, position, datagrams, reserved; two bytes each.
fn question(id: u16) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(24);
    for field in [id, 0, 1, 0] {
        datagram.extend_from_slice(&field.to_be_bytes());
    }
    datagram.extend_from_slice(format!("get {KEY}\r\n").as_bytes());
    datagram
}

fn wait(socket: &UdpSocket, left: Duration) -> Result<()> {
    let limit = Timespec {
        tv_sec: i64::try_from(left.as_secs())?,
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    let mut polled = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)];
    match poll(&mut polled, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Number and sender of the next answer, if one is there.
fn receive(socket: &UdpSocket) -> Result<Option<(u16, SocketAddr)>> {
    let mut datagram = [0; 1500];
    let (count, from) = match socket.recv_from(&mut datagram) {
        Ok(received) => received,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        // An earlier question could not be delivered.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let wanted = format!("VALUE {KEY} 0 {}\r\n{VALUE}\r\nEND\r\n", VALUE.len());
    match datagram[..count].split_at_checked(8) {
        Some((head, text)) if text == wanted.as_bytes() => {
            Ok(Some((u16::from_be_bytes([head[0], head[1]]), from)))
        }
        _ => bail!(
            "{from} gave a wrong answer: {:?}",
            String::from_utf8_lossy(&datagram[..count])
        ),
    }
}
