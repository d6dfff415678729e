//! Where CRIU's own page-server clients come: `criu dump --page-server`, `criu pre-dump
//! --page-server`, and whatever starts CRIU with that option.
//!
//! ```text
//!   criu dump --page-server ── TCP ──▶ listener ─▶ waiting (quiet, or its turn has not come)
//!   criu dump --ps-socket ── inherited ───────────▶    │ the first that speaks
//!                                                      ▼
//!                          page_client::serve ─▶ guarded sink ─▶ PageSink: memory, a destination
//!                             ▲    uncorks CRIU's socket    │ how long it keeps CRIU waiting
//!                             ╰──────── supervisor ◀────────╯ cuts the connection in time
//! ```
//!
//! CRIU has no time limit of its own: while it waits for a byte of ours, the application is frozen. So
//! [`run`] has one for each way in which that may happen: CRIU is silent in the middle of a dump
//! ([`Limits::silence`]), or what is behind the sink does not answer ([`Limits::freeze`]), or another
//! dump is under way. In each case the connection is reset, on which CRIU fails and the application runs
//! on; the sink is dropped, and with it what it had of this dump.
//!
//! One dump is served at a time, as there is one destination set and one link. Connections that say
//! nothing are no dump yet: CRIU connects before it freezes anything, and speaks afterwards.

mod guard;
#[cfg(feature = "net")]
pub(crate) mod local;
mod maker;
mod patient;
mod session;
#[cfg(feature = "net")]
pub(crate) use self::session::reset;
mod supervisor;
mod uncork;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::page_client::{PageSink, ServeError, Served, SinkError};
use crate::page::PageSize;

/// Most connections that are open beside the one that is served.
pub const MOST_WAITING: usize = 16;

/// How long a connection may say nothing before its first message. CRIU seizes the tree and collects
/// all that is no memory between connecting and that.
pub const QUIET: Duration = Duration::from_secs(60);

/// Time limits, each of which ends in the application running on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// CRIU says nothing in the middle of a dump.
    pub silence: Duration,
    /// The sink does not come back from one call, the answer to CLOSE in particular; or a dump waits
    /// for its turn.
    pub freeze: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(10),
            freeze: Duration::from_secs(10),
        }
    }
}

/// Where CRIU comes.
#[derive(Debug)]
pub enum Place {
    /// To a port: one connection for each CRIU, or several dumps on one.
    Listen(TcpListener),
    /// A connected stream socket whose other end CRIU inherits, for one dump after the other.
    Inherited(OwnedFd),
}

/// How to serve.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Page size of the host that CRIU runs on.
    pub page_size: PageSize,
    /// Time limits.
    pub limits: Limits,
    /// CRIU has images of the dump before this one (`--prev-images-dir`), and may be told that the sink
    /// has its memory. A CRIU that has none fails when it is told so. Without it, or before the first
    /// dump was taken, only a CRIU of this host is told so that says it on its command line.
    pub prev_images: bool,
    /// Return after one dump, whether it could be taken or not.
    pub once: bool,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its address; not of the inherited socket.
    pub address: Option<SocketAddr>,
    /// A process that has the socket, where it is one of this host.
    pub pid: Option<u32>,
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.pid) {
            (Some(address), Some(pid)) => write!(f, "{address} (pid {pid})"),
            (Some(address), None) => write!(f, "{address}"),
            (None, _) => write!(f, "the inherited socket"),
        }
    }
}

/// What happens. Reported from several threads, in order for one client.
#[derive(Debug)]
pub enum Event<S> {
    /// A dump or pre-dump begins.
    Begun {
        /// Whose.
        client: Client,
    },
    /// It was taken, and CRIU was told so.
    Taken {
        /// Whose.
        client: Client,
        /// What it was.
        served: Served,
        /// Where it went; none where CRIU sent nothing, as it does when it fails early.
        sink: Option<S>,
    },
    /// It was not taken; CRIU fails, and the application runs on.
    Failed {
        /// Whose.
        client: Client,
        /// Why.
        error: SessionError,
    },
}

/// Why a dump was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The stream, the socket or the sink.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The sink's answer to CLOSE.
    #[error("the destination did not take the memory, and CRIU was told so (status {0})")]
    Refused(i32),
    /// CRIU says nothing.
    #[error("CRIU said nothing for {} s in the middle of a dump: its connection was closed", .0.as_secs_f32())]
    Silent(Duration),
    /// The sink does not come back.
    #[error(
        "the destination did not answer within {} s: CRIU's connection was closed, the application \
         runs on. A longer --freeze-limit gives it more time",
        .0.as_secs_f32()
    )]
    Slow(Duration),
    /// Another dump took too long.
    #[error(
        "another dump was under way for {} s: its connection was closed, try again when that is done",
        .0.as_secs_f32()
    )]
    NoTurn(Duration),
    /// No dump, and no end either.
    #[error("it said nothing for {} s: its connection was closed", .0.as_secs_f32())]
    Quiet(Duration),
    /// The one dump of [`Options::once`] brought nothing.
    #[error("CRIU ended without sending memory; its log says why")]
    NoMemory,
    /// More connections than are kept.
    #[error("more than {MOST_WAITING} connections wait: this one was closed")]
    TooMany,
    /// CRIU sends on after its last message.
    #[error("CRIU's memory stream goes on behind its CLOSE; what came before it was taken")]
    Behind,
    /// The endpoint was told to stop.
    #[error("stopped: CRIU's connection was closed, the application runs on")]
    Stopped,
    /// A bug in the sink.
    #[error("taking the memory panicked")]
    Panicked,
}

/// Why no CRIU can be served any more.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The operating system refuses something.
    #[error("cannot {action} ({source})")]
    Io {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// An inherited descriptor that is no connected stream socket.
    #[error("the inherited descriptor is no connected stream socket")]
    NoStream,
    /// The one dump of [`Options::once`] or of the inherited socket.
    #[error(transparent)]
    Session(SessionError),
    /// Sinks that never came back hold too much.
    #[error("the destination left {0} dumps unanswered; no more are taken")]
    Stuck(usize),
}

fn io_error(action: &'static str) -> impl FnOnce(rustix::io::Errno) -> EndpointError {
    move |errno| EndpointError::Io {
        action,
        source: errno.into(),
    }
}

/// Ends [`run`] from another thread: a dump under way is refused.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Wake>);

#[derive(Debug)]
struct Wake {
    event: OwnedFd,
    stop: AtomicBool,
}

impl Stopper {
    /// For one [`run`].
    pub fn new() -> Result<Self, EndpointError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = eventfd(0, flags).map_err(io_error("make an event descriptor"))?;
        let stop = AtomicBool::new(false);
        Ok(Self(Arc::new(Wake { event, stop })))
    }

    /// To be called from any thread, any number of times.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        // Its only failure is that it has been woken 2⁶⁴ times and nobody looked.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    fn is_stopped(&self) -> bool {
        self.0.stop.load(Ordering::SeqCst)
    }

    fn rest(&self) {
        let _ = rustix::io::read(&self.0.event, &mut [0; 8]);
    }
}

/// Takes descriptor `number` that this process was started with, for [`Place::Inherited`].
pub fn inherited(number: i32) -> io::Result<OwnedFd> {
    // A duplicate, since nothing says that nobody else here has it. Ours resets the connection rather
    // than closing its copy, so that the other one does not keep CRIU waiting.
    let me = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&me, number, PidfdGetfdFlags::empty())?)
}

/// Serves CRIU after CRIU until `stopper` says stop, the inherited socket ends, or after one dump if that
/// is [all](Options::once). That it was stopped is an error only if that one dump was not taken.
///
/// `make` makes the sink of one dump. It is called when CRIU connects, before anything is frozen, from a
/// thread of its own (on a socket that serves many dumps: for the first at once, for others when they
/// begin); a sink that was made ahead and fails at its first call is made anew. The sink of the next dump
/// is made after [`Event::Taken`] of this one was reported. `events` should return soon: the next dump
/// waits for it.
///
/// A sink that does not come back in time is left behind on its thread, and is dropped there.
pub fn run<S>(
    place: Place,
    options: &Options,
    make: impl FnMut() -> Result<S, SinkError> + Send + 'static,
    events: impl Fn(Event<S>) + Send + Sync + 'static,
    stopper: &Stopper,
) -> Result<(), EndpointError>
where
    S: PageSink + Send + 'static,
{
    supervisor::Supervisor::new(place, options, Box::new(make), Arc::new(events), stopper)?.run()
}

#[expect(
    clippy::disallowed_methods,
    reason = "the limits of an endpoint are a driver's business"
)]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests;
