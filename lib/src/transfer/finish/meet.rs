//! Meeting the destination again, on a new connection.

use std::net::SocketAddr;
use std::time::Duration;

use super::{FinishOptions, heard::Heard};
use crate::handover::journal::SourceAbout;
use crate::identity::Fingerprint;
use crate::session::SessionError;
use crate::transfer::send::{EndOnDrop, Target};
use crate::transfer::{TransferError, finish::FinishError};
use crate::transport::{self, CloseCode, Identity, TransportError};
use crate::wire::{Answer, Message, MigrationId, Step, Verdict, limits};

/// A destination that says nothing for this long counts as unreachable. At work it says so every ten
/// seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// Tells the destination, and gives its answer. Fails where it cannot be reached now. Every word of
/// the destination goes to `heard`.
pub(super) async fn meet(
    about: &SourceAbout,
    id: MigrationId,
    verdict: Verdict,
    options: &FinishOptions,
    heard: &Heard,
) -> Result<Answer, FinishError> {
    let identity = Identity::load(&about.identity).map_err(TransferError::from)?;
    let (addresses, peers) = places(about, options.target.as_ref());
    let told = tell(&addresses, &identity, &peers, (id, verdict), options, heard).await;
    heard.parted();
    Ok(told?)
}

async fn tell(
    addresses: &[SocketAddr],
    identity: &Identity,
    peers: &[Fingerprint],
    (id, verdict): (MigrationId, Verdict),
    options: &FinishOptions,
    heard: &Heard,
) -> Result<Answer, TransferError> {
    let connection = transport::connect(addresses, identity, peers, &options.transport).await?;
    let _ends_with_this = EndOnDrop(connection.clone());
    let (mut control, mut messages) = connection.open_control().await?;
    let meet = Message::Migration(Step::Meet { id, verdict });
    control.write_message(&meet.encode()).await?;
    loop {
        let next = messages.read_message(limits::CONTROL_MESSAGE);
        let next = tokio::time::timeout(SILENCE, next).await;
        let bytes = next.map_err(|_| SessionError::Silent(SILENCE.as_secs()))??;
        let bytes = bytes.ok_or(TransportError::CutShort)?;
        match Message::decode(&bytes).map_err(SessionError::from)? {
            Message::Working => heard.works(),
            Message::Migration(Step::Met(answer)) => {
                heard.answered();
                connection.close_and_tell(CloseCode::Done, "").await;
                return Ok(answer);
            }
            Message::Failure(failure) => return Err(SessionError::Peer(failure).into()),
            _ => return Err(SessionError::Protocol("a message out of order").into()),
        }
    }
}

/// Where to try, and whose keys count: what the operator says now, then what was so then.
fn places(about: &SourceAbout, target: Option<&Target>) -> (Vec<SocketAddr>, Vec<Fingerprint>) {
    let (mut addresses, mut peers) = match target {
        Some(Target::Ticket(ticket)) => (ticket.addresses().to_vec(), vec![ticket.fingerprint()]),
        Some(Target::Pinned { addresses, peers }) => (addresses.clone(), peers.clone()),
        None => (Vec::new(), Vec::new()),
    };
    for address in &about.addresses {
        if !addresses.contains(address) {
            addresses.push(*address);
        }
    }
    // One that cannot be read matches nobody.
    if let Ok(peer) = about.peer.parse()
        && !peers.contains(&peer)
    {
        peers.push(peer);
    }
    (addresses, peers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_operator_says_now_comes_first() {
        let old = Fingerprint([1; 32]);
        let new = Fingerprint([2; 32]);
        let about = SourceAbout {
            addresses: vec!["192.0.2.1:7".parse().expect("an address")],
            peer: old.to_string(),
            ..super::super::sample_about()
        };
        let now = Target::Pinned {
            addresses: vec!["192.0.2.9:9".parse().expect("an address")],
            peers: vec![new],
        };
        let (addresses, peers) = places(&about, Some(&now));
        assert_eq!(addresses[0].port(), 9);
        assert_eq!(addresses[1].port(), 7);
        assert_eq!(peers, [new, old]);
        assert_eq!(places(&about, None).1, [old]);
    }
}
