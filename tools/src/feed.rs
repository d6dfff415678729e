//! `crxfer feed`.

use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use crxfer::criu::page_feed::{Fed, FeedError, feed};
use crxfer::criu::page_server::HeaderLayout;
use crxfer::image::Chain;
use serde_json::json;

use crate::args::FeedArgs;
use crate::error::Failed;
use crate::output;
use crate::size::{Bytes, grouped};

pub(crate) fn run(args: &FeedArgs) -> Result<(), Failed> {
    let chain = Chain::open(&args.dir, args.page_size)?;
    let mut socket = connect(&args.to_criu, args.timeout)?;
    let fed =
        feed(&chain, &mut socket, args.criu_version, args.timeout, |_| {}).map_err(|error| {
            match error {
                FeedError::Image(error) => Failed::Image(error),
                error => Failed::Feed(error),
            }
        })?;
    print(args, &fed)
}

/// To the first of the host's addresses that answers.
fn connect(to: &str, limit: Duration) -> Result<TcpStream, Failed> {
    let failed = |text: String| Failed::Unresolved(format!("--to-criu {to}: {text}"));
    let addresses: Vec<_> = to
        .to_socket_addrs()
        .map_err(|error| failed(error.to_string()))?
        .collect();
    let mut last = "the name has no address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(&address, limit) {
            Ok(socket) => {
                // Only the end of each answered message waits for more; then it shall wait for nothing.
                let _ = socket.set_nodelay(true);
                return Ok(socket);
            }
            Err(error) => last = error.to_string(),
        }
    }
    Err(failed(format!(
        "{last}; is `criu page-server` running there?"
    )))
}

fn print(args: &FeedArgs, fed: &Fed) -> Result<(), Failed> {
    let criu = headers(fed.layout);
    if args.json {
        return output::json(&json!({
            "event": "done",
            "headers": criu,
            "tasks_and_segments": fed.spaces,
            "pages": fed.pages,
            "bytes": fed.bytes,
        }));
    }
    output::line(&format!(
        "fed {} pages ({}) of {} tasks and segments to {} (CRIU {criu})",
        grouped(fed.pages),
        Bytes(fed.bytes),
        fed.spaces,
        args.to_criu,
    ))
}

/// Which CRIU speaks like that.
pub(crate) fn headers(layout: HeaderLayout) -> &'static str {
    match layout {
        HeaderLayout::Old => "up to 4.1",
        HeaderLayout::New => "since 4.2",
    }
}
