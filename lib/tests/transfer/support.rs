//! Both hosts in one process.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crxfer::delta::SetName;
use crxfer::image::{Chain, ImageError, PagemapName, PagesReader};
use crxfer::ticket::Ticket;
use crxfer::transfer::{
    Event, Events, ReceiveOptions, Receiver, SendOptions, SendReport, Target, TransferError, send,
};
use crxfer::transport::{self, Identity};
use crxfer::wire::{FailureCode, Layout};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::task::JoinHandle;

pub(crate) const LAYOUTS: [Layout; 3] = [Layout::Faithful, Layout::Incremental, Layout::Flat];

/// A host that receives, with its directory.
pub(crate) struct Destination {
    pub(crate) dir: PathBuf,
    /// Bytes of the set under way that have arrived.
    arrived: Arc<AtomicU64>,
    receiver: Arc<Receiver>,
    running: JoinHandle<()>,
}

pub(crate) fn receive_options(dir: &Path, layout: Layout) -> ReceiveOptions {
    ReceiveOptions {
        directory: dir.to_owned(),
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        layout,
        max_set_bytes: None,
        keep: 0,
        restore: None,
        state: None,
        guard: None,
        identity: None,
        peers: Vec::new(),
        transport: transport::Options::default(),
        events: Events::none(),
        sink: crxfer::sink::SinkKind::Disk,
        sink_bytes: None,
    }
}

impl Destination {
    pub(crate) async fn at(dir: &Path, layout: Layout) -> Self {
        Self::with(|| receive_options(dir, layout)).await
    }

    /// Waits until an earlier receiver of the same process has let go of the directory.
    pub(crate) async fn with(options: impl Fn() -> ReceiveOptions) -> Self {
        let dir = options().directory;
        let arrived = Arc::new(AtomicU64::new(0));
        let count = arrived.clone();
        let events = Events::new(move |event| match event {
            Event::Progress { done_bytes, .. } => count.store(done_bytes, Ordering::Relaxed),
            Event::SetBegun { .. } => count.store(0, Ordering::Relaxed),
            _ => {}
        });
        let options = || ReceiveOptions {
            events: events.clone(),
            ..options()
        };
        let mut tries = 0;
        let receiver = loop {
            match Receiver::bind(options()) {
                Ok(receiver) => break Arc::new(receiver),
                Err(error) if tries < 200 && error.to_string().contains("is served by") => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        let running = tokio::spawn({
            let receiver = receiver.clone();
            async move { receiver.run(false).await }
        });
        Self {
            dir,
            arrived,
            receiver,
            running,
        }
    }

    /// Counts from here on.
    pub(crate) fn forget_arrived(&self) {
        self.arrived.store(0, Ordering::Relaxed);
    }

    /// Waits until that many bytes of a set have arrived.
    pub(crate) async fn has_arrived(&self, bytes: u64) {
        while self.arrived.load(Ordering::Relaxed) < bytes {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub(crate) fn ticket(&self) -> Ticket {
        self.receiver.ticket().unwrap().clone()
    }

    pub(crate) fn addresses(&self) -> Vec<std::net::SocketAddr> {
        self.receiver.addresses().to_vec()
    }

    pub(crate) async fn stop(self) {
        self.running.abort();
        let _ = self.running.await;
        self.receiver.close().await;
    }

    pub(crate) fn set(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Waits until no transfer is under way: what a source left has been put away then.
    pub(crate) async fn settled(&self) {
        for _ in 0..400 {
            if count(&self.dir.join(".crxfer/stage")) == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!(
            "a stage stays: {:?}",
            tree(&self.dir.join(".crxfer/stage")).keys()
        );
    }
}

/// A host that sends, known by its key.
pub(crate) struct Peer {
    place: TempDir,
}

impl Peer {
    pub(crate) fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        Identity::generate()
            .unwrap()
            .save(&place.path().join("key"))
            .unwrap();
        Self { place }
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::load(&self.place.path().join("key")).unwrap()
    }

    pub(crate) fn options(&self, dir: &Path, to: &Destination) -> SendOptions {
        SendOptions {
            directory: dir.to_owned(),
            name: None,
            base: None,
            page_size: None,
            bytes_per_s: None,
            target: Target::Ticket(to.ticket()),
            identity: self.identity(),
            transport: transport::Options::default(),
            events: Events::none(),
            memo: None,
        }
    }

    pub(crate) async fn try_send(
        &self,
        dir: &Path,
        to: &Destination,
    ) -> Result<SendReport, TransferError> {
        send(self.options(dir, to)).await
    }

    pub(crate) async fn send(&self, dir: &Path, to: &Destination) -> SendReport {
        self.try_send(dir, to).await.unwrap()
    }

    pub(crate) async fn send_as(&self, dir: &Path, name: &str, to: &Destination) -> SendReport {
        let name = Some(SetName::new(name).unwrap());
        send(SendOptions {
            name,
            ..self.options(dir, to)
        })
        .await
        .unwrap()
    }
}

/// Why the transfer failed, if it did as the other side says.
pub(crate) fn code_of(error: &TransferError) -> Option<FailureCode> {
    match error {
        TransferError::Session(crxfer::session::SessionError::Peer(failure)) => Some(failure.code),
        _ => None,
    }
}

/// SHA-256 of the memory of each pagemap, parents followed, and its runs.
pub(crate) fn memory(dir: &Path) -> BTreeMap<String, (String, Vec<(String, u64)>)> {
    let chain = Chain::open(dir, None).unwrap();
    let names: Vec<_> = chain.newest().pagemaps().keys().copied().collect();
    let facts = |name: PagemapName| (name.to_string(), memory_of(&chain, name));
    names.into_iter().map(facts).collect()
}

fn memory_of(chain: &Chain, name: PagemapName) -> (String, Vec<(String, u64)>) {
    let page_len = chain.page_size().bytes();
    let (mut hash, mut runs) = (Sha256::new(), Vec::<(u64, u64)>::new());
    let mut reader = PagesReader::new(chain);
    for run in chain.resolve(name).unwrap() {
        match runs.last_mut() {
            Some((vaddr, pages)) if *vaddr + *pages * page_len == run.vaddr => *pages += run.pages,
            _ => runs.push((run.vaddr, run.pages)),
        }
        let read = reader.for_each_piece(name, &run, |_, bytes| {
            hash.update(bytes);
            Ok::<_, ImageError>(())
        });
        read.unwrap();
    }
    let runs = runs
        .into_iter()
        .map(|(at, pages)| (format!("{at:x}"), pages));
    (hex(&hash.finalize()), runs.collect())
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything under `root` but locks and keys: kind, mode, and content or target.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let what = if meta.is_dir() {
                waiting.push(path.clone());
                format!("directory {:o}", meta.mode())
            } else if meta.is_symlink() {
                format!("link {}", fs::read_link(&path).unwrap().display())
            } else {
                let digest = Sha256::digest(fs::read(&path).unwrap());
                format!("file {:o} {}", meta.mode(), hex(&digest))
            };
            found.insert(path.strip_prefix(root).unwrap().to_owned(), what);
        }
    }
    found
}

/// The sets that are to be seen, with all that they hold, and what they build on.
pub(crate) fn published(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut tree = tree(dir);
    tree.retain(|path, _| {
        !path.starts_with(".crxfer") || path.starts_with(".crxfer/base") && path.iter().count() > 2
    });
    tree
}

pub(crate) fn count(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

/// In memory where that is possible: syncing thousands of files takes most of the time otherwise.
pub(crate) fn tempdir() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempdir_on_disk())
}

pub(crate) fn tempdir_on_disk() -> TempDir {
    tempfile::tempdir().unwrap()
}
