//! One dump of a CRIU that somebody else has started on this host, on a connection of its own.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::patient::Patient;
use super::uncork::Corked;
use crate::criu::page_client::{PageSink, ServeError, Served, serve};
use crate::page::PageSize;

/// Longer than any freeze: whoever limits that shuts the socket down.
const LIMIT: Duration = Duration::from_secs(3600);

/// As [`serve`], without the stall that TCP's cork puts into the end of a dump.
pub(crate) fn serve_here(
    socket: &OwnedFd,
    page_size: PageSize,
    sink: &mut dyn PageSink,
) -> Result<Served, ServeError> {
    let cork = Corked::find(socket);
    let mut socket = Patient {
        socket,
        cork: cork.as_ref(),
        limit: LIMIT,
        gave_up: false,
    };
    serve(&mut socket, page_size, sink)
}
