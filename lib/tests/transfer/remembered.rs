//! Digests that a source remembers of what it has sent.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crxfer::transfer::{SendOptions, SendReport, TransferError, send};
use crxfer::wire::{FailureCode, Layout};

use crate::images::write_dump;
use crate::support::{Destination, Peer, code_of, memory, tempdir};

const PAGES: u64 = 2000;

async fn send_with_memo(
    peer: &Peer,
    source: &Path,
    to: &Destination,
    memo: &Path,
) -> Result<SendReport, TransferError> {
    send(SendOptions {
        memo: Some(memo.to_owned()),
        ..peer.options(source, to)
    })
    .await
}

/// A dump whose files were last written long enough ago for their times to be trusted.
async fn settled_dump(source: &Path) {
    write_dump(source, &(1..=PAGES).collect::<Vec<_>>());
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_remembered_is_not_asked_for_again_and_stays_remembered() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Incremental).await;
    let (peer, source, memo) = (
        Peer::new(),
        place.path().join("dump"),
        place.path().join("memo"),
    );
    settled_dump(&source).await;
    let first = send_with_memo(&peer, &source, &to, &memo).await.unwrap();
    for _ in 0..2 {
        let again = send_with_memo(&peer, &source, &to, &memo).await.unwrap();
        assert!(again.published.unchanged);
        assert_eq!((again.pages.total, again.pages.known), (PAGES, PAGES));
        // No segment was described: only the files were named.
        assert!(again.wire_bytes.0 < first.wire_bytes.0 / 100, "{again:?}");
    }
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_written_since_is_read_again() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let (peer, source, memo) = (
        Peer::new(),
        place.path().join("dump"),
        place.path().join("memo"),
    );
    settled_dump(&source).await;
    send_with_memo(&peer, &source, &to, &memo).await.unwrap();
    let file = File::options().write(true).open(source.join("pages-1.img"));
    file.unwrap().write_all_at(b"other", 7 * 4096).unwrap();
    let report = send_with_memo(&peer, &source, &to, &memo).await.unwrap();
    assert_eq!((report.published.unchanged, report.pages.sent), (false, 1));
    assert_eq!(memory(&to.set("dump")), memory(&source));
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_digests_are_noticed_and_forgotten() {
    let place = tempdir();
    let (peer, source, memo) = (
        Peer::new(),
        place.path().join("dump"),
        place.path().join("memo"),
    );
    settled_dump(&source).await;
    let to = Destination::at(&place.path().join("first"), Layout::Faithful).await;
    send_with_memo(&peer, &source, &to, &memo).await.unwrap();
    to.stop().await;

    let remembered = fs::read_dir(&memo).unwrap().next().unwrap().unwrap().path();
    let index = File::options()
        .write(true)
        .open(remembered.join("index"))
        .unwrap();
    // Far behind the list of files, in the digests of the pages.
    index.write_all_at(&[0xaa; 4], 20_000).unwrap();

    let to = Destination::at(&place.path().join("second"), Layout::Faithful).await;
    let error = send_with_memo(&peer, &source, &to, &memo)
        .await
        .unwrap_err();
    assert_eq!(code_of(&error), Some(FailureCode::Content), "{error}");
    send_with_memo(&peer, &source, &to, &memo).await.unwrap();
    assert_eq!(memory(&to.set("dump")), memory(&source));
    to.stop().await;
}
