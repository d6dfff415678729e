//! Asks a memcached on both hosts all the time, whoever should have it: two copies that run at once, if
//! only for a moment, are seen.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::hosts::{Background, Network, Side, Stop};
use crate::workload::Memcached;

const PERIOD: Duration = Duration::from_millis(10);

/// An answer of one host, by its own address.
#[derive(Clone, Copy, Debug)]
struct Answer {
    asked: Instant,
    at: Instant,
    by: Side,
}

/// Asks until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    answers: Arc<Mutex<Vec<Answer>>>,
    _work: Background<()>,
}

impl Watch {
    pub(super) fn start(network: &Network) -> Result<Self> {
        let answers: Arc<Mutex<Vec<Answer>>> = Arc::default();
        let seen = answers.clone();
        let hosts = [network.hosts.a.address, network.hosts.b.address];
        let work = network.c.background(move |stop| ask(hosts, &seen, &stop))?;
        Ok(Self {
            answers,
            _work: work,
        })
    }

    /// Forgets what was seen.
    pub(super) fn forget(&self) {
        self.answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Fails if a host answered a question that was asked after the other had begun to answer for
    /// good. The workload was at `first` when that was last forgotten, and has moved once at most.
    pub(super) fn never_two(&self, first: Side) -> Result<()> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let other = answers.iter().find(|answer| answer.by != first);
        let Some(other) = other else {
            return Ok(());
        };
        let mut again = answers
            .iter()
            .filter(|answer| answer.by == first && answer.asked > other.at);
        let count = again.clone().count();
        match again.next_back() {
            None => Ok(()),
            Some(last) => bail!(
                "two copies: {:?} began to answer, and {first:?} answered {count} questions that were asked later, over {} ms",
                other.by,
                (last.at - other.at).as_millis()
            ),
        }
    }
}

fn ask(hosts: [Ipv4Addr; 2], seen: &Mutex<Vec<Answer>>, stop: &Stop) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    let mut asked: HashMap<u16, Instant> = HashMap::new();
    for number in (0..=u16::MAX).cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        asked.insert(number, Instant::now());
        for address in hosts {
            // A host that nobody reaches gives no answer.
            let _ = socket.send_to(&question(number), (address, Memcached::PORT));
        }
        thread::sleep(PERIOD);
        while let Some((number, from)) = receive(&socket)? {
            let side = hosts.iter().position(|address| from.ip() == *address);
            if let (Some(side), Some(&asked)) = (side, asked.get(&number)) {
                let answer = Answer {
                    asked,
                    at: Instant::now(),
                    by: [Side::A, Side::B][side],
                };
                seen.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(answer);
            }
        }
    }
    Ok(())
}

/// memcached's UDP protocol: number, position, datagrams, reserved; two bytes each.
fn question(number: u16) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(24);
    for field in [number, 0, 1, 0] {
        datagram.extend_from_slice(&field.to_be_bytes());
    }
    datagram.extend_from_slice(b"get nothing\r\n");
    datagram
}

/// Number and sender of the next answer, if one is there.
fn receive(socket: &UdpSocket) -> Result<Option<(u16, SocketAddr)>> {
    let mut datagram = [0; 1500];
    match socket.recv_from(&mut datagram) {
        Ok((count, from)) if count >= 8 => {
            Ok(Some((u16::from_be_bytes([datagram[0], datagram[1]]), from)))
        }
        Ok(_) => bail!("an answer that is none"),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // An earlier question could not be delivered: there may be answers behind it.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => receive(socket),
        Err(error) => match error.raw_os_error() {
            // No way to a host at the moment.
            Some(101 | 113) => Ok(None),
            _ => Err(error.into()),
        },
    }
}
