//! `--to`: who is meant.

use std::fs::File;
use std::io::{self, Read};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;

use crxfer::identity::Fingerprint;
use crxfer::ticket::{Ticket, TicketError};
use crxfer::transfer::Target;

use crate::error::Failed;

/// Longest text that is read in search of a ticket, in bytes; tickets have less than 500.
const MAX_TEXT: u64 = 64 << 10;

/// The destination that `to` and the `--peer`s name. Reads files, stdin and names as needed.
pub(crate) fn find(to: &str, peers: &[Fingerprint], own_key: bool) -> Result<Target, Failed> {
    if let Some(path) = to.strip_prefix('@') {
        let path = Path::new(path);
        let text = File::open(path).and_then(read_text);
        return ticket(
            &text.map_err(Failed::file("read the ticket file", path))?,
            peers,
        );
    }
    if to == "-" {
        let text = read_text(io::stdin());
        return ticket(
            &text.map_err(Failed::file("read the ticket from", Path::new("stdin")))?,
            peers,
        );
    }
    match to.parse::<Ticket>() {
        Err(TicketError::NotATicket) if to.contains(':') => pinned(to, peers, own_key),
        Err(TicketError::NotATicket) => Err(Failed::Usage(format!(
            "--to {to}: this is neither a ticket (\"crxfer1-…\"), nor @FILE, nor -, nor HOST:PORT"
        ))),
        _ => ticket(to, peers),
    }
}

/// The same from a task: reading files, stdin and names blocks.
pub(crate) async fn find_later(
    to: String,
    peers: Vec<Fingerprint>,
    own_key: bool,
) -> Result<Target, Failed> {
    let finding = tokio::task::spawn_blocking(move || find(&to, &peers, own_key));
    finding.await.expect("finding the target does not panic")
}

fn ticket(text: &str, peers: &[Fingerprint]) -> Result<Target, Failed> {
    if !peers.is_empty() {
        let text = "--peer goes with --to HOST:PORT; a ticket names the destination's key itself";
        return Err(Failed::Usage(text.to_owned()));
    }
    // What `recv` prints may have been saved with the hints around it.
    let word = text
        .split_whitespace()
        .find(|word| word.starts_with("crxfer"))
        .unwrap_or(text);
    let ticket = word
        .parse()
        .map_err(|error: TicketError| Failed::Usage(format!("--to: {error}")))?;
    Ok(Target::Ticket(ticket))
}

fn pinned(to: &str, peers: &[Fingerprint], own_key: bool) -> Result<Target, Failed> {
    if peers.is_empty() {
        return Err(Failed::Usage(format!(
            "--to {to} needs --peer with that host's fingerprint (`crxfer recv` and `crxfer keygen` print it)"
        )));
    }
    if !own_key {
        return Err(Failed::Usage(format!(
            "--to {to} needs --identity: the destination knows this host by that key"
        )));
    }
    let found: Vec<SocketAddr> = to
        .to_socket_addrs()
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => {
                Failed::Usage(format!("--to {to}: not a HOST:PORT: {error}"))
            }
            _ => Failed::Unresolved(format!("cannot find the host of --to {to}: {error}")),
        })?
        .collect();
    Ok(Target::Pinned {
        addresses: found,
        peers: peers.to_vec(),
    })
}

fn read_text(from: impl Read) -> io::Result<String> {
    let mut text = String::new();
    from.take(MAX_TEXT).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crxfer::ticket::Secret;

    fn usage(result: Result<Target, Failed>) -> String {
        match result {
            Err(Failed::Usage(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let peer = [Fingerprint([1; 32])];
        assert!(usage(find("host:4433", &[], true)).contains("--peer"));
        assert!(usage(find("host:4433", &peer, false)).contains("--identity"));
        assert!(usage(find("host", &[], true)).contains("HOST:PORT"));
        assert!(usage(find("127.0.0.1:99999", &peer, true)).contains("127.0.0.1:99999"));
    }

    #[test]
    fn a_ticket_is_found_among_other_words() {
        let made = Ticket::new(
            vec![([192, 0, 2, 7], 4433).into()],
            Fingerprint([1; 32]),
            Secret::from_bytes([2; 32]),
        )
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ticket");
        std::fs::write(&path, format!("the ticket:\n{made}\n")).unwrap();
        let found = find(&format!("@{}", path.display()), &[], false).unwrap();
        assert!(matches!(found, Target::Ticket(found) if found == made));
        assert!(usage(find(&made.to_string(), &[Fingerprint([1; 32])], true)).contains("--peer"));
    }

    #[test]
    fn a_mistyped_ticket_is_wrong_usage() {
        assert!(usage(find("crxfer1-abcdefg", &[], false)).contains("mistyped"));
    }

    #[test]
    fn addresses_are_taken_as_they_are() {
        let peer = [Fingerprint([1; 32])];
        let found = find("[::1]:4433", &peer, true).unwrap();
        assert!(matches!(found, Target::Pinned { addresses, .. }
            if addresses == ["[::1]:4433".parse().unwrap()]));
    }
}
