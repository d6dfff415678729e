//! Transfers that end early, and the next attempt.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crxfer::transfer::{Event, Events, SendOptions, send};
use crxfer::wire::Layout;
use tokio::sync::Notify;

use crate::images::{PAGE, pages, write_dump};
use crate::support::{Destination, LAYOUTS, Peer, count, memory, published, tempdir, tree};

const PAGES: u64 = 8000;

/// Sends and drops the transfer when the destination has dealt with about `part` of it.
async fn send_until(peer: &Peer, source: &Path, to: &Destination, part: u64) {
    let reached = Arc::new(Notify::new());
    let notify = reached.clone();
    let options = SendOptions {
        bytes_per_s: Some(40 << 20),
        events: Events::new(move |event| {
            if let Event::Progress { wire_bytes, .. } = event
                && wire_bytes >= part
            {
                notify.notify_one();
            }
        }),
        ..peer.options(source, to)
    };
    tokio::select! {
        sent = send(options) => panic!("too fast to be cut: {:?}", sent.map(|it| it.wire_bytes)),
        () = reached.notified() => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_transfer_publishes_nothing_and_the_next_sends_only_the_rest() {
    for layout in LAYOUTS {
        let place = tempdir();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let peer = Peer::new();
        let source = place.path().join("dump");
        write_dump(&source, &(1..=PAGES).collect::<Vec<_>>());
        let whole = PAGES * PAGE as u64;
        send_until(&peer, &source, &to, whole / 2).await;
        to.settled().await;
        assert_eq!(published(&to.dir).len(), 0);
        assert_eq!(count(&to.dir.join(".crxfer/partial")), 1);
        let report = peer.send(&source, &to).await;
        assert!(
            report.wire_bytes.0 < whole * 7 / 10,
            "{:?} of {whole}",
            report.wire_bytes
        );
        assert_eq!(memory(&to.set("dump")), memory(&source));
        to.settled().await;
        assert_eq!(count(&to.dir.join(".crxfer/partial")), 0);
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_stopped_and_started_goes_on_where_it_was() {
    let place = tempdir();
    let dir = place.path().join("in");
    let to = Destination::at(&dir, Layout::Incremental).await;
    let peer = Peer::new();
    let source = place.path().join("dump");
    write_dump(&source, &[1, 2, 3]);
    peer.send(&source, &to).await;
    let before = published(&dir);
    fs::remove_dir_all(&source).unwrap();
    write_dump(&source, &(1..=PAGES).collect::<Vec<_>>());
    let whole = PAGES * PAGE as u64;
    send_until(&peer, &source, &to, whole / 2).await;
    to.stop().await;
    let to = Destination::at(&dir, Layout::Incremental).await;
    assert_eq!(published(&dir), before);
    let report = peer.send(&source, &to).await;
    assert!(
        report.wire_bytes.0 < whole * 7 / 10,
        "{:?} of {whole}",
        report.wire_bytes
    );
    assert_eq!(
        (memory(&to.set("dump")), report.published.generation),
        (memory(&source), 2)
    );
    to.stop().await;
}

/// A receiver that is killed has no time to put anything away.
#[test]
fn a_receiver_that_is_killed_goes_on_where_it_was() {
    let place = tempdir();
    let dir = place.path().join("in");
    let source = place.path().join("dump");
    write_dump(&source, &(1..=PAGES).collect::<Vec<_>>());
    let whole = PAGES * PAGE as u64;
    let peer = Peer::new();
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let killed = place.path().join("killed");
    runtime().block_on(async {
        let to = Destination::at(&dir, Layout::Faithful).await;
        send_until(&peer, &source, &to, whole / 2).await;
        // What a killed process leaves is what lies there now.
        copy_tree(&dir, &killed);
        to.stop().await;
    });
    assert_eq!(count(&killed.join(".crxfer/stage")), 1);
    runtime().block_on(async {
        let to = Destination::at(&killed, Layout::Faithful).await;
        assert_eq!(count(&killed.join(".crxfer/stage")), 0);
        let report = peer.send(&source, &to).await;
        assert!(
            report.wire_bytes.0 < whole * 8 / 10,
            "{:?} of {whole}",
            report.wire_bytes
        );
        assert_eq!(memory(&to.set("dump")), memory(&source));
        to.stop().await;
    });
}

fn copy_tree(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp")
        .args(["-a", "--sparse=always"])
        .args([from, to])
        .status();
    assert!(status.unwrap().success());
}

/// The other end must notice at once, not when it gives the connection up.
#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_transfer_ends_the_connection() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let source = place.path().join("dump");
    write_dump(&source, &(1..=PAGES).collect::<Vec<_>>());
    send_until(&Peer::new(), &source, &to, 4 << 20).await;
    let settled = tokio::time::timeout(Duration::from_secs(5), to.settled()).await;
    assert!(settled.is_ok(), "{:?}", tree(&to.dir).keys());
    to.stop().await;
}

/// A transfer that was cut is no reason to keep what a later one made unnecessary.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_ancestors_is_removed_too() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let peer = Peer::new();
    write_dump(&place.path().join("1"), &(1..=PAGES).collect::<Vec<_>>());
    crate::images::write_child(&place.path().join("2"), &[None, Some(5)], "../1");
    let source = place.path().join("2");
    send_until(&peer, &source, &to, PAGES * PAGE as u64 / 2).await;
    to.settled().await;
    assert_eq!(count(&to.dir.join(".crxfer/partial")), 1);
    peer.send(&source, &to).await;
    to.settled().await;
    assert_eq!(count(&to.dir.join(".crxfer/partial")), 0);
    to.stop().await;
}

/// Bytes of an unfinished transfer that went bad must not end every later one.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_rest_is_noticed_and_given_up() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let peer = Peer::new();
    let source = place.path().join("dump");
    write_dump(&source, &(1..=PAGES).collect::<Vec<_>>());
    let whole = PAGES * PAGE as u64;
    for _ in 0..2 {
        // The second attempt indexes what the first left.
        send_until(&peer, &source, &to, whole / 4).await;
        to.settled().await;
    }
    let partials = to.dir.join(".crxfer/partial");
    for entry in fs::read_dir(&partials).unwrap() {
        let path = entry.unwrap().path();
        if path.join("index").exists() {
            fs::write(
                path.join("files/pages-1.img"),
                pages(90_000..90_000 + PAGES),
            )
            .unwrap();
        }
    }
    let error = peer.try_send(&source, &to).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    to.settled().await;
    peer.send(&source, &to).await;
    assert_eq!(memory(&to.set("dump")), memory(&source));
    to.stop().await;
}
