//! Clients that never give up: each keeps one connection, counts what was acknowledged over it, notes
//! when it breaks, and makes a new one.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::hosts::{Background, Host, Network, SERVICE};
use crate::run;

/// Longer than any standstill: what takes longer is a connection that is lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);

/// How long an idle connection may take to answer when the service runs.
const AWAKE: Duration = Duration::from_secs(5);

/// Connections that are made once and do nothing until they are asked.
const IDLE: usize = 4;

/// What a client talks about, over any number of connections.
pub(super) trait Talk: Send + Sync + std::fmt::Debug + 'static {
    /// Port of the service.
    fn port(&self) -> u16;

    /// Asks once and checks the answer. An error means that the connection is of no use any more, or
    /// that the answer is wrong.
    fn exchange(&self, stream: &mut TcpStream) -> Result<()>;

    /// Asks without changing anything, and checks the answer.
    fn look(&self, stream: &mut TcpStream) -> Result<()>;

    /// Compares everything that was acknowledged. Nothing is being changed meanwhile. Gives how many
    /// answers were compared.
    fn compare(&self, stream: &mut TcpStream) -> Result<usize>;

    /// Another client that works all the time and notes in `pulse` when its connection breaks.
    fn beside(&self, _network: &Network, _pulse: &Arc<Pulse>) -> Result<Option<Background<()>>> {
        Ok(None)
    }
}

/// A service as its clients see it.
#[derive(Debug)]
pub(super) struct Clients<T> {
    pub(super) talk: Arc<T>,
    pulse: Arc<Pulse>,
    _worker: Background<()>,
    _beside: Option<Background<()>>,
    idle: Vec<TcpStream>,
}

/// How a client that works all the time is doing.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    acknowledged: AtomicU64,
    rest: AtomicBool,
    rests: AtomicBool,
    breaks: Mutex<Vec<(Instant, String)>>,
    standstill: Mutex<Standstill>,
}

/// How long nothing was acknowledged.
#[derive(Debug, Default)]
struct Standstill {
    last: Option<Instant>,
    longest: Duration,
}

impl Pulse {
    fn note_answer(&self) {
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        self.with_standstill(|standstill| {
            let gap = standstill.last.map_or(Duration::ZERO, |last| now - last);
            standstill.longest = standstill.longest.max(gap);
            standstill.last = Some(now);
        });
    }

    fn with_standstill<R>(&self, work: impl FnOnce(&mut Standstill) -> R) -> R {
        let standstill = self.standstill.lock();
        work(&mut standstill.unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn note_break(&self, error: &anyhow::Error) {
        let mut breaks = self.breaks.lock().unwrap_or_else(PoisonError::into_inner);
        breaks.push((Instant::now(), format!("{error:#}")));
    }

    /// Connections that broke since `begin`.
    pub(super) fn breaks_since(&self, begin: Instant) -> Vec<String> {
        let breaks = self.breaks.lock().unwrap_or_else(PoisonError::into_inner);
        let later = breaks.iter().filter(|(at, _)| *at >= begin);
        later
            .map(|(at, text)| format!("after {:.2} s: {text}", (*at - begin).as_secs_f64()))
            .collect()
    }
}

/// What the harness needs of clients, whatever they talk about.
pub(super) trait Witness: Send + std::fmt::Debug {
    /// Waits until the client that works has rested: everything under way was acknowledged.
    fn rest(&self, limit: Duration) -> Result<()>;
    /// Lets it work again.
    fn work(&self);
    /// Exchanges that were acknowledged so far.
    fn acknowledged(&self) -> u64;
    /// Connections that broke since `begin`.
    fn breaks_since(&self, begin: Instant) -> Vec<String>;
    /// The longest time in which nothing was acknowledged since that was last asked for.
    fn take_standstill(&self) -> Duration;
    /// Asks over each idle connection. Makes those anew that do not answer, and gives what was wrong.
    fn wake_idle(&mut self, network: &Network) -> Result<Vec<String>>;
    /// Whether the service answers on `host` itself, with right data: `Err` says what it did instead.
    fn answers_on(&self, host: &Host, limit: Duration) -> Result<()>;
    /// Compares everything on `host` itself. Only at rest.
    fn compare_on(&self, host: &Host) -> Result<usize>;
    /// Whether a new client is served at the service address.
    fn serves(&self, network: &Network) -> Result<()>;
}

impl<T: Talk> Clients<T> {
    /// Starts them on host C of `network`, with `period` between two exchanges.
    pub(super) fn start(network: &Network, talk: T, period: Duration) -> Result<Self> {
        let talk = Arc::new(talk);
        let pulse = Arc::new(Pulse::default());
        let worker = {
            let (talk, pulse) = (talk.clone(), pulse.clone());
            network.c.background(move |stop| {
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = work(&*talk, &pulse, period, &stop) {
                        pulse.note_break(&error);
                        thread::sleep(Duration::from_millis(50));
                    }
                }
                Ok(())
            })?
        };
        let beside = talk.beside(network, &pulse)?;
        let mut clients = Self {
            talk,
            pulse,
            _worker: worker,
            _beside: beside,
            idle: Vec::new(),
        };
        for _ in 0..IDLE {
            let stream = clients.connect_idle(network)?;
            clients.idle.push(stream);
        }
        run::wait_for("the first answers", Duration::from_secs(10), || {
            (clients.acknowledged() > 3).then_some(())
        })?;
        Ok(clients)
    }

    fn connect_idle(&self, network: &Network) -> Result<TcpStream> {
        let mut stream = network
            .c
            .within(|| connect(SERVICE, self.talk.port(), AWAKE))?;
        self.talk.look(&mut stream)?;
        Ok(stream)
    }

    fn direct<R: Send>(
        &self,
        host: &Host,
        limit: Duration,
        ask: impl FnOnce(&mut TcpStream) -> Result<R> + Send,
    ) -> Result<R> {
        let port = self.talk.port();
        host.within(|| ask(&mut connect(Ipv4Addr::LOCALHOST, port, limit)?))
    }
}

fn work(talk: &impl Talk, pulse: &Pulse, period: Duration, stop: &AtomicBool) -> Result<()> {
    let mut stream = connect(SERVICE, talk.port(), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    while !stop.load(Ordering::Relaxed) {
        if pulse.rest.load(Ordering::Acquire) {
            pulse.rests.store(true, Ordering::Release);
            pulse.with_standstill(|standstill| standstill.last = None);
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        pulse.rests.store(false, Ordering::Release);
        talk.exchange(&mut stream)?;
        pulse.note_answer();
        thread::sleep(period);
    }
    Ok(())
}

pub(super) fn connect(address: Ipv4Addr, port: u16, limit: Duration) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from((address, port)), limit)
        .context("no connection")?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl<T: Talk> Witness for Clients<T> {
    fn rest(&self, limit: Duration) -> Result<()> {
        self.pulse.rests.store(false, Ordering::Release);
        self.pulse.rest.store(true, Ordering::Release);
        run::wait_for("a client's last answer", limit, || {
            self.pulse.rests.load(Ordering::Acquire).then_some(())
        })
    }

    fn work(&self) {
        self.pulse.rest.store(false, Ordering::Release);
    }

    fn acknowledged(&self) -> u64 {
        self.pulse.acknowledged.load(Ordering::Relaxed)
    }

    fn breaks_since(&self, begin: Instant) -> Vec<String> {
        self.pulse.breaks_since(begin)
    }

    fn take_standstill(&self) -> Duration {
        self.pulse
            .with_standstill(|standstill| std::mem::take(&mut standstill.longest))
    }

    fn wake_idle(&mut self, network: &Network) -> Result<Vec<String>> {
        let mut broken = Vec::new();
        for number in 0..self.idle.len() {
            if let Err(error) = self.talk.look(&mut self.idle[number]) {
                broken.push(format!("{number}: {error:#}"));
                self.idle[number] = self.connect_idle(network)?;
            }
        }
        Ok(broken)
    }

    fn answers_on(&self, host: &Host, limit: Duration) -> Result<()> {
        self.direct(host, limit, |stream| self.talk.look(stream))
    }

    fn compare_on(&self, host: &Host) -> Result<usize> {
        self.direct(host, AWAKE, |stream| self.talk.compare(stream))
    }

    fn serves(&self, network: &Network) -> Result<()> {
        self.connect_idle(network).map(drop)
    }
}
