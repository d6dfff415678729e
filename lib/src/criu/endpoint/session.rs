//! One connection, and one dump on it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{Shutdown, connect_unspec, shutdown};

use super::super::page_client::{PageSink, ServeError, Served, serve_next};
use super::super::page_server::{HeaderLayout, PageServerError};
use super::guard::{Cut, Guarded, Shared};
use super::maker::Maker;
use super::patient::Patient;
use super::uncork::Corked;
use super::{Client, Limits, SessionError};
use crate::page::PageSize;

/// How long CRIU may take to close its socket after it was told that all is well. It does so at once.
const FAREWELL: Duration = Duration::from_secs(2);

/// A connected socket, between dumps or before the first.
#[derive(Debug)]
pub(super) struct Connection {
    /// Shared with the supervisor, which resets it.
    pub(super) socket: Arc<OwnedFd>,
    pub(super) client: Client,
    /// CRIU's end.
    pub(super) cork: Option<Corked>,
    /// Headers of the dump before on the same socket.
    pub(super) layout: Option<HeaderLayout>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, mut client: Client) -> Self {
        let cork = Corked::find(&socket);
        client.pid = cork.as_ref().map(|corked| corked.pid);
        Self {
            socket: Arc::new(socket),
            client,
            cork,
            layout: None,
        }
    }

    /// A socket that serves several programs in a row has others at its end by and by.
    pub(super) fn look_again(&mut self) {
        if !self.cork.as_ref().is_some_and(Corked::uncork) {
            self.cork = Corked::find(&*self.socket);
            self.client.pid = self.cork.as_ref().map(|corked| corked.pid);
        }
    }
}

/// Ends a connection so that the peer notices at once, even while it writes and nobody reads.
///
/// Shutting down is not enough for TCP: what arrives is still acknowledged until the buffers are full, and
/// then CRIU would wait with the application frozen. Other sockets refuse to be disconnected like that.
pub(crate) fn reset(socket: impl AsFd) {
    let _ = shutdown(&socket, Shutdown::Both);
    let _ = connect_unspec(socket);
}

/// What a session came to.
pub(super) struct Outcome<S> {
    pub(super) result: Result<Served, SessionError>,
    /// Where memory went that was taken.
    pub(super) sink: Option<S>,
    /// What is wrong besides.
    pub(super) afterwards: Option<SessionError>,
    /// For the next dump, if CRIU leaves the socket open.
    pub(super) connection: Option<Connection>,
}

/// Serves one dump on `connection`.
pub(super) fn take<S: PageSink + Send + 'static>(
    mut connection: Connection,
    page_size: PageSize,
    limits: Limits,
    maker: Arc<Maker<S>>,
    shared: &Arc<Shared>,
    continues: bool,
) -> Outcome<S> {
    let mut socket = Patient {
        socket: &connection.socket,
        cork: connection.cork.as_ref(),
        limit: limits.silence,
        gave_up: false,
    };
    let told = connection.cork.as_ref().is_some_and(Corked::continues);
    let mut sink = Guarded::new(maker, shared.clone(), continues || told);
    let served = serve_next(&mut socket, page_size, connection.layout, &mut sink);
    let gave_up = socket.gave_up;
    let result = match served {
        _ if shared.why_cut() == Some(Cut::Slow) => Err(SessionError::Slow(limits.freeze)),
        _ if shared.why_cut() == Some(Cut::Stopped) => Err(SessionError::Stopped),
        Ok(served) => Ok(served),
        Err(_) if gave_up => Err(SessionError::Silent(limits.silence)),
        Err(error) => Err(error.into()),
    };
    let Ok(served) = result else {
        return Outcome {
            result,
            sink: None,
            afterwards: None,
            connection: None,
        };
    };
    if served.spaces == 0 && connection.layout.is_none() {
        // Of a longer header that could not be told from the shorter.
        socket.skip_zeros(HeaderLayout::New.byte_len() - HeaderLayout::Old.byte_len());
    }
    let afterwards = (!served.keeps_socket).then(|| farewell(&mut socket));
    if served.spaces > 0 {
        connection.layout = served.layout;
    }
    let result = match served.status {
        0 => Ok(served),
        status => Err(SessionError::Refused(status)),
    };
    Outcome {
        result,
        sink: sink.into_sink(),
        afterwards: afterwards.flatten(),
        connection: served.keeps_socket.then_some(connection),
    }
}

/// CRIU's socket is closed at once, and nothing comes behind CLOSE.
fn farewell(socket: &mut Patient<'_>) -> Option<SessionError> {
    socket.limit = FAREWELL;
    // A duplicate of CRIU's socket could keep it from ending.
    socket.cork = None;
    match socket.sees_end() {
        Ok(Some(false)) => Some(SessionError::Behind),
        // It stays, which is its own affair: it has no turn any more.
        Ok(Some(true) | None) | Err(_) => None,
    }
}

/// Whether a connection was none of CRIU's: such come to every open port.
pub(super) fn is_noise(error: &SessionError) -> bool {
    matches!(
        error,
        SessionError::Serve(ServeError::Stream(PageServerError::BadBegin)) | SessionError::TooMany
    )
}
