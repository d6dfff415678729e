//! Who is served, who waits, and when a connection is cut.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketType, recv, sockopt};

use super::super::page_client::PageSink;
use super::guard::{Cut, Shared};
use super::maker::{Make, Maker};
use super::session::{self, Connection, Outcome, reset};
use super::{
    Client, EndpointError, Event, MOST_WAITING, Options, Place, QUIET, SessionError, Stopper,
    io_error, now,
};

/// How often limits are looked at while there is anything to look at.
const TICK: Duration = Duration::from_millis(50);

/// Failures of `accept` after which nobody is there any more.
const PASSING: [ErrorKind; 3] = [
    ErrorKind::WouldBlock,
    ErrorKind::Interrupted,
    ErrorKind::ConnectionAborted,
];

/// How long a stop waits for the sink to notice.
const LAST_WORK: Duration = Duration::from_secs(2);

/// Most sinks that did not come back and still hold what they were given.
const MOST_STUCK: usize = 4;

/// Told of everything that happens.
pub(super) type Events<S> = Arc<dyn Fn(Event<S>) + Send + Sync>;

/// The thread that decides; sessions have threads of their own.
pub(super) struct Supervisor<S> {
    listener: Option<TcpListener>,
    options: Options,
    maker: Arc<Maker<S>>,
    events: Events<S>,
    stopper: Stopper,
    waiting: Vec<Waiting>,
    active: Option<Active>,
    stuck: Vec<JoinHandle<()>>,
    /// Where sessions report to.
    ended: (Sender<Ended>, Receiver<Ended>),
    /// Whether a dump was taken.
    took: bool,
    /// Numbers of sessions: what a cut one reports later is not that of the next.
    count: u64,
}

/// A connection that is not served.
struct Waiting {
    connection: Connection,
    /// Since it came, or since its last dump.
    since: Instant,
    /// Since it has something to say: the application behind it may be frozen.
    spoke: Option<Instant>,
    /// May be quiet as long as it likes: dumps were taken from it, or it was inherited.
    trusted: bool,
}

/// The session under way.
struct Active {
    number: u64,
    socket: Arc<OwnedFd>,
    client: Client,
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// What a session leaves.
struct Ended {
    number: u64,
    client: Client,
    /// Memory came, and was taken.
    took: bool,
    error: Option<SessionError>,
    connection: Option<Connection>,
}

impl<S: PageSink + Send + 'static> Supervisor<S> {
    pub(super) fn new(
        place: Place,
        options: &Options,
        make: Make<S>,
        events: Events<S>,
        stopper: &Stopper,
    ) -> Result<Self, EndpointError> {
        let mut supervisor = Self {
            listener: None,
            options: *options,
            maker: Maker::new(make, {
                let stopper = stopper.clone();
                move || stopper.wake()
            }),
            events,
            stopper: stopper.clone(),
            waiting: Vec::new(),
            active: None,
            stuck: Vec::new(),
            ended: channel(),
            took: false,
            count: 0,
        };
        match place {
            Place::Listen(listener) => {
                let failed = |source| EndpointError::Io {
                    action: "listen without blocking",
                    source,
                };
                listener.set_nonblocking(true).map_err(failed)?;
                supervisor.listener = Some(listener);
            }
            Place::Inherited(socket) => {
                let kind = sockopt::socket_type(&socket).map_err(|_| EndpointError::NoStream)?;
                let listens = sockopt::socket_acceptconn(&socket).unwrap_or(true);
                if kind != SocketType::STREAM || listens {
                    return Err(EndpointError::NoStream);
                }
                let client = Client {
                    address: None,
                    pid: None,
                };
                supervisor.wait(Connection::new(socket, client), true);
                supervisor.maker.prepare();
            }
        }
        Ok(supervisor)
    }

    pub(super) fn run(mut self) -> Result<(), EndpointError> {
        let result = self.serve();
        self.end();
        result
    }

    fn serve(&mut self) -> Result<(), EndpointError> {
        loop {
            self.look()?;
            let over = self.enforce().or_else(|| self.collect());
            if let Some(ended) = over
                && self.settle(ended)?
            {
                return Ok(());
            }
            if self.stopper.is_stopped() {
                let stopped = EndpointError::Session(SessionError::Stopped);
                return if self.options.once {
                    Err(stopped)
                } else {
                    Ok(())
                };
            }
            if self.stuck.len() > MOST_STUCK {
                return Err(EndpointError::Stuck(self.stuck.len()));
            }
            self.begin_next();
            if self.listener.is_none() && self.waiting.is_empty() && self.active.is_none() {
                return Ok(());
            }
        }
    }

    /// Waits for something to happen, and notes who came and who speaks.
    fn look(&mut self) -> Result<(), EndpointError> {
        let idle = self.active.is_none() && self.waiting.iter().all(|one| one.trusted);
        let limit = (!idle).then(|| Timespec::try_from(TICK).unwrap_or_default());
        let (comes, speaks) =
            {
                let mut polled = vec![PollFd::new(&self.stopper.0.event, PollFlags::IN)];
                polled.extend(
                    self.listener
                        .iter()
                        .map(|it| PollFd::new(it, PollFlags::IN)),
                );
                let quiet = self.waiting.iter().filter(|one| one.spoke.is_none());
                polled.extend(quiet.map(|one| {
                    PollFd::from_borrowed_fd(one.connection.socket.as_fd(), PollFlags::IN)
                }));
                match poll(&mut polled, limit.as_ref()) {
                    Ok(_) => {}
                    Err(Errno::INTR) => return Ok(()),
                    Err(errno) => return Err(io_error("wait for CRIU")(errno)),
                }
                let mut ready = polled.iter().skip(1).map(|one| !one.revents().is_empty());
                let comes = self.listener.is_some() && ready.next().unwrap_or(false);
                (comes, ready.collect::<Vec<_>>())
            };
        self.stopper.rest();
        let mut speaks = speaks.into_iter();
        let quiet = self.waiting.iter_mut().filter(|one| one.spoke.is_none());
        for one in quiet {
            if speaks.next().unwrap_or(false) {
                one.spoke = Some(now());
            }
        }
        // Those that only left, without a word.
        self.waiting
            .retain(|one| one.spoke.is_none() || !has_left(&one.connection.socket));
        if comes {
            self.accept();
        }
        if self.active.is_none() && self.waiting.is_empty() {
            self.maker.discard();
        }
        Ok(())
    }

    /// Has a sink made for whoever comes next: not while another one has that of the dump before it, on
    /// which the next may build; and not for sockets that may be quiet for hours.
    fn prepare(&self) {
        if self.active.is_none() && self.waiting.iter().any(|one| !one.trusted) {
            self.maker.prepare();
        }
    }

    fn accept(&mut self) {
        let (socket, address) = match self.listener.as_ref().map(TcpListener::accept) {
            Some(Ok(accepted)) => accepted,
            // The peer has left again.
            Some(Err(error)) if PASSING.contains(&error.kind()) => return,
            // Descriptors are short: who comes is still there in the next round, which must not be at once.
            Some(Err(_)) => return std::thread::sleep(TICK),
            None => return,
        };
        let client = Client {
            address: Some(address),
            pid: None,
        };
        if self.waiting.len() >= MOST_WAITING {
            let error = SessionError::TooMany;
            return (self.events)(Event::Failed { client, error });
        }
        self.wait(Connection::new(socket.into(), client), false);
        self.prepare();
    }

    fn wait(&mut self, connection: Connection, trusted: bool) {
        self.waiting.push(Waiting {
            connection,
            since: now(),
            spoke: None,
            trusted,
        });
    }

    /// The end of the session under way, if it has come.
    fn collect(&mut self) -> Option<Ended> {
        let active = self.active.as_ref()?;
        // Asked before its report is looked for: what is finished has reported, unless it panicked.
        let finished = active.thread.is_finished();
        let number = active.number;
        let mut reports = self.ended.1.try_iter();
        let ended = reports.find(|ended| ended.number == number);
        let ended = ended.or_else(|| {
            finished.then_some(Ended {
                number,
                client: active.client,
                took: false,
                error: Some(SessionError::Panicked),
                connection: None,
            })
        })?;
        let answered = matches!(
            ended.error,
            None | Some(SessionError::Refused(_) | SessionError::Behind)
        );
        if !answered {
            reset(&*active.socket);
        }
        self.active = None;
        Some(ended)
    }

    /// Reports how a session ended, and keeps its connection; whether there is nothing more to do.
    fn settle(&mut self, ended: Ended) -> Result<bool, EndpointError> {
        let lost = self.listener.is_none() && ended.connection.is_none();
        if let Some(connection) = ended.connection {
            self.wait(connection, true);
        }
        if let Some(error) = ended.error {
            if lost || self.options.once && !session::is_noise(&error) {
                return Err(EndpointError::Session(error));
            }
            let client = ended.client;
            (self.events)(Event::Failed { client, error });
            return Ok(false);
        }
        self.took |= ended.took;
        if self.options.once && !ended.took {
            return Err(EndpointError::Session(SessionError::NoMemory));
        }
        self.prepare();
        Ok(self.options.once)
    }

    /// Cuts what has taken too long: the session under way, and those whose turn did not come.
    fn enforce(&mut self) -> Option<Ended> {
        let limits = self.options.limits;
        self.stuck.retain(|thread| !thread.is_finished());
        let late = |since: Instant, limit| since.elapsed() >= limit;
        let events = self.events.clone();
        self.waiting.retain(|one| {
            let error = match one.spoke {
                Some(since) if late(since, limits.freeze) => SessionError::NoTurn(limits.freeze),
                None if !one.trusted && late(one.since, QUIET) => SessionError::Quiet(QUIET),
                _ => return true,
            };
            reset(&*one.connection.socket);
            let client = one.connection.client;
            events(Event::Failed { client, error });
            false
        });
        let active = self.active.take_if(|active| {
            let busy = active.shared.busy_since();
            busy.is_some_and(|since| late(since, limits.freeze))
        })?;
        active.shared.cut(Cut::Slow);
        reset(&*active.socket);
        self.stuck.push(active.thread);
        Some(Ended {
            number: active.number,
            client: active.client,
            took: false,
            error: Some(SessionError::Slow(limits.freeze)),
            connection: None,
        })
    }

    fn begin_next(&mut self) {
        if self.active.is_some() {
            return;
        }
        let speaking = self.waiting.iter().enumerate();
        let speaking = speaking.filter_map(|(at, one)| Some((one.spoke?, at)));
        let Some((_, at)) = speaking.min() else {
            return;
        };
        let Waiting {
            mut connection,
            trusted,
            ..
        } = self.waiting.remove(at);
        if trusted {
            connection.look_again();
        }
        self.count += 1;
        let shared = Arc::new(Shared::default());
        let (socket, client) = (connection.socket.clone(), connection.client);
        (self.events)(Event::Begun { client });
        let session = Session {
            number: self.count,
            options: self.options,
            continues: self.options.prev_images && self.took,
            maker: self.maker.clone(),
            events: self.events.clone(),
            shared: shared.clone(),
            ended: self.ended.0.clone(),
            stopper: self.stopper.clone(),
        };
        let thread = std::thread::spawn(move || session.run(connection));
        self.active = Some(Active {
            number: self.count,
            socket,
            client,
            shared,
            thread,
        });
    }

    /// Closes everything; a dump under way is refused.
    fn end(&mut self) {
        for one in self.waiting.drain(..) {
            reset(&*one.connection.socket);
        }
        let Some(active) = self.active.take() else {
            return;
        };
        active.shared.cut(Cut::Stopped);
        reset(&*active.socket);
        // Now: what the sink waits for ends by that.
        let (client, error) = (active.client, SessionError::Stopped);
        (self.events)(Event::Failed { client, error });
        let begun = now();
        while !active.thread.is_finished() && begun.elapsed() < LAST_WORK {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What a session's thread needs.
struct Session<S> {
    number: u64,
    options: Options,
    continues: bool,
    maker: Arc<Maker<S>>,
    events: Events<S>,
    shared: Arc<Shared>,
    ended: Sender<Ended>,
    stopper: Stopper,
}

impl<S: PageSink + Send + 'static> Session<S> {
    fn run(self, connection: Connection) {
        let client = connection.client;
        let Options {
            page_size, limits, ..
        } = self.options;
        let Outcome {
            result,
            sink,
            afterwards,
            connection,
        } = session::take(
            connection,
            page_size,
            limits,
            self.maker,
            &self.shared,
            self.continues,
        );
        let took = sink.is_some();
        let error = match result {
            Ok(served) => {
                (self.events)(Event::Taken {
                    client,
                    served,
                    sink,
                });
                afterwards
            }
            Err(error) => Some(error),
        };
        let _ = self.ended.send(Ended {
            number: self.number,
            client,
            took,
            error,
            connection,
        });
        self.stopper.wake();
    }
}

/// Whether a socket has ended without a byte.
fn has_left(socket: &OwnedFd) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match recv(socket, &mut [0; 1], flags) {
        Ok((_, there)) => there == 0,
        Err(Errno::AGAIN | Errno::INTR) => false,
        Err(_) => true,
    }
}
