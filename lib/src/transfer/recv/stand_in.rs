//! Answering sources in the place of a receiver that has died.
//!
//! A source that has committed holds its tree frozen until it hears what became of the copy. The guard
//! of a receiver therefore listens where that did, with its key, and answers those that are back;
//! nobody else. The next receiver takes the place by taking the [`Post`] away.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::meeting;
use crate::identity::Fingerprint;
use crate::transport::{self, CloseCode, Connection, HANDSHAKE_TIMEOUT, Identity, Server, Trust};
use crate::tree::Process;
use crate::wire::{Failure, FailureCode, Message, Step, limits};

/// The file that says who answers, and its key.
const POST: &str = "receiver";
const TAKEN: &str = "receiver.taken";
const KEY: &str = "receiver.pem";

/// Between looks whether the next receiver is there.
const LOOK: Duration = Duration::from_millis(100);

/// How long the guard of a receiver before may take to leave its place.
pub(super) const TAKE_OVER: Duration = Duration::from_secs(10);

/// Where a receiver answers, for whoever stands in for it.
#[derive(Debug, Serialize, Deserialize)]
struct Post {
    receiver: Process,
    listen: Vec<SocketAddr>,
    peers: Vec<String>,
}

/// Takes the post from whoever has it; true where somebody had.
pub(super) fn take_away(state: &Path) -> bool {
    fs::rename(state.join(POST), state.join(TAKEN)).is_ok()
}

/// Gives it back, where the place could not be taken.
pub(super) fn give_back(state: &Path) {
    let _ = fs::rename(state.join(TAKEN), state.join(POST));
}

/// Removes the word that process `receiver` has left.
pub(in crate::transfer) fn forget(state: &Path, receiver: u32) {
    if read(state).is_some_and(|post| post.receiver.pid == receiver) {
        let _ = fs::remove_file(state.join(POST));
        let _ = fs::remove_file(state.join(KEY));
    }
}

/// Leaves word where this process answers, should it die.
pub(super) fn leave_word(
    state: &Path,
    server: &Server,
    identity: &Identity,
    peers: &[Fingerprint],
) -> std::io::Result<()> {
    let Some(receiver) = Process::of(std::process::id()) else {
        return Ok(());
    };
    let post = Post {
        receiver,
        listen: server.bound()?,
        peers: peers.iter().map(ToString::to_string).collect(),
    };
    let key = state.join(KEY);
    let _ = fs::remove_file(&key);
    identity.save(&key).map_err(std::io::Error::other)?;
    let draft = state.join(format!("{POST}.new"));
    fs::write(&draft, serde_json::to_string(&post)?)?;
    fs::rename(&draft, state.join(POST))?;
    let _ = fs::remove_file(state.join(TAKEN));
    Ok(())
}

/// Listens in the place of a receiver that is dead.
#[derive(Debug)]
pub(in crate::transfer) struct StandIn {
    server: Arc<Server>,
    task: tokio::task::JoinHandle<()>,
    talking: Arc<AtomicUsize>,
}

impl StandIn {
    /// Takes the place of the receiver that was process `parent`; `None` where it has none any more, or
    /// where the place cannot be taken now. Inside a tokio runtime.
    pub(in crate::transfer) fn of(state: &Path, parent: u32) -> Option<Self> {
        let post = post_of(state, parent)?;
        let peers: Result<Vec<Fingerprint>, _> = post.peers.iter().map(|it| it.parse()).collect();
        let trust = match peers.ok()? {
            peers if peers.is_empty() => Trust::Anyone,
            peers => Trust::Pinned(peers),
        };
        let identity = Identity::load(&state.join(KEY)).ok()?;
        let options = transport::Options::default();
        let server = Arc::new(Server::bind(&post.listen, identity, trust, options).ok()?);
        let talking = Arc::new(AtomicUsize::new(0));
        let answering = answer_all(server.clone(), state.to_owned(), talking.clone());
        let leaving = leave_when_taken(server.clone(), state.to_owned(), parent);
        let task = tokio::spawn(async move {
            tokio::select! {
                () = answering => {}
                () = leaving => {}
            }
        });
        Some(Self {
            server,
            task,
            talking,
        })
    }

    /// Whether the place is still that of the receiver that was process `parent`.
    pub(in crate::transfer) fn is_wanted(state: &Path, parent: u32) -> bool {
        post_of(state, parent).is_some()
    }

    /// Whether a source waits for its answer.
    pub(in crate::transfer) fn is_talking(&self) -> bool {
        self.talking.load(Ordering::Acquire) > 0
    }

    /// Leaves the place.
    pub(in crate::transfer) async fn leave(self) {
        self.task.abort();
        self.server
            .close(CloseCode::ShuttingDown, "the receiver takes over")
            .await;
    }
}

fn read(state: &Path) -> Option<Post> {
    serde_json::from_str(&fs::read_to_string(state.join(POST)).ok()?).ok()
}

fn post_of(state: &Path, parent: u32) -> Option<Post> {
    let post = read(state)?;
    (post.receiver.pid == parent && !post.receiver.is_there()).then_some(post)
}

// The next receiver waits for the port, whatever this guard is at.
async fn leave_when_taken(server: Arc<Server>, state: PathBuf, receiver: u32) {
    while post_of(&state, receiver).is_some() {
        tokio::time::sleep(LOOK).await;
    }
    server
        .close(CloseCode::ShuttingDown, "the receiver takes over")
        .await;
}

async fn answer_all(server: Arc<Server>, state: PathBuf, talking: Arc<AtomicUsize>) {
    while let Some(incoming) = server.accept().await {
        let (state, talking) = (state.clone(), talking.clone());
        tokio::spawn(async move {
            talking.fetch_add(1, Ordering::AcqRel);
            if let Ok(connection) = incoming.complete().await {
                let _ = tokio::time::timeout(HANDSHAKE_TIMEOUT, hear(&connection, &state)).await;
            }
            talking.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

// The first message says whether this one has lost its receiver, or wants what only a receiver does.
async fn hear(connection: &Connection, state: &Path) {
    let Ok((mut control, mut messages)) = connection.accept_control().await else {
        return;
    };
    let first = messages.read_message(limits::CONTROL_MESSAGE).await;
    let first = first
        .ok()
        .flatten()
        .and_then(|it| Message::decode(&it).ok());
    if let Some(Message::Migration(Step::Meet { id, verdict })) = first {
        let (own, peer) = (state.to_owned(), connection.peer());
        // What it brings to life is in the journal.
        let answer = spawn_blocking(move || meeting::finish(&own, peer, id, verdict, |_, _, _| ()));
        let _ = meeting::tell(connection, &mut control, answer, state, id).await;
        return;
    }
    let reason = "the receiver here has died; start `crxfer recv` again";
    let failure = Message::Failure(Failure::new(FailureCode::Refused, reason));
    let _ = control.write_message(&failure.encode()).await;
    let _ = control.finish();
    connection
        .close_and_tell(CloseCode::ShuttingDown, reason)
        .await;
}
