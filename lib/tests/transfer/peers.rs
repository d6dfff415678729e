//! Several peers, several transfers at once, and the names of sets.

use std::fs;

use crxfer::delta::SetName;
use crxfer::transfer::{SendOptions, Target, send};
use crxfer::transport::Options;
use crxfer::wire::Layout;

use crate::images::{PAGE, page, write_child, write_dump};
use crate::support::{Destination, LAYOUTS, Peer, count, memory, receive_options, tempdir};

#[tokio::test(flavor = "multi_thread")]
async fn several_senders_at_once_under_one_name_and_under_others() {
    for layout in LAYOUTS {
        let place = tempdir();
        let to = Destination::at(&place.path().join("in"), layout).await;
        let peer = Peer::new();
        let dump = |name: &str, first: u64| {
            let source = place.path().join(name);
            write_dump(&source, &(first..first + 600).collect::<Vec<_>>());
            source
        };
        let sources = [
            dump("a", 1),
            dump("b", 301),
            dump("c", 601),
            dump("d", 1201),
        ];
        tokio::join!(
            peer.send_as(&sources[0], "same", &to),
            peer.send_as(&sources[1], "same", &to),
            peer.send(&sources[2], &to),
            peer.send(&sources[3], &to),
        );
        to.settled().await;
        let same = memory(&to.set("same"));
        assert!(same == memory(&sources[0]) || same == memory(&sources[1]));
        assert_eq!(memory(&to.set("c")), memory(&sources[2]));
        assert_eq!(memory(&to.set("d")), memory(&sources[3]));
        assert_eq!(count(&to.dir), 4, ".crxfer and three sets");
        to.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_peer_sent_saves_no_bytes_and_is_not_built_on() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Incremental).await;
    let source = place.path().join("dump");
    write_dump(&source, &(1..=500).collect::<Vec<_>>());
    Peer::new().send(&source, &to).await;
    let stranger = Peer::new();
    let report = stranger.send_as(&source, "mine", &to).await;
    assert_eq!(report.published.base, None);
    assert!(report.wire_bytes.0 > 500 * PAGE as u64 * 9 / 10);
    let base = Some(SetName::new("dump").unwrap());
    let options = SendOptions {
        base,
        ..stranger.options(&source, &to)
    };
    let error = send(options).await.unwrap_err().to_string();
    assert!(error.contains("no received set dump"), "{error}");
    // With a ticket, names belong to nobody.
    let report = stranger.send(&source, &to).await;
    assert_eq!(
        (report.published.generation, report.published.unchanged),
        (2, false)
    );
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_peer_cannot_take_another_s_name() {
    let place = tempdir();
    let (first, second) = (Peer::new(), Peer::new());
    let keys = [
        first.identity().fingerprint(),
        second.identity().fingerprint(),
    ];
    let here = Peer::new();
    let to = {
        let dir = place.path().join("in");
        Destination::with(|| {
            let mut options = receive_options(&dir, Layout::Flat);
            options.peers = keys.to_vec();
            options.identity = Some(here.identity());
            options
        })
        .await
    };
    let source = place.path().join("dump");
    write_dump(&source, &[1, 2, 3]);
    let options = |peer: &Peer, name: &str| SendOptions {
        directory: source.clone(),
        name: Some(SetName::new(name).unwrap()),
        base: None,
        page_size: None,
        bytes_per_s: None,
        target: Target::Pinned {
            addresses: to.addresses(),
            peers: vec![here.identity().fingerprint()],
        },
        identity: peer.identity(),
        transport: Options::default(),
        events: crxfer::transfer::Events::none(),
        memo: None,
    };
    send(options(&first, "web")).await.unwrap();
    let error = send(options(&second, "web")).await.unwrap_err().to_string();
    assert!(
        error.contains("web belongs to a set of another peer"),
        "{error}"
    );
    send(options(&second, "db")).await.unwrap();
    assert!(send(options(&Peer::new(), "third")).await.is_err());
    assert_eq!(count(&to.dir.join(".crxfer/stage")), 0);
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_no_set_s_are_refused_before_anything_is_sent() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    fs::create_dir(to.set("dump")).unwrap();
    fs::write(to.set("dump").join("letter"), "dear").unwrap();
    let source = place.path().join("dump");
    write_dump(&source, &(1..=500).collect::<Vec<_>>());
    let peer = Peer::new();
    let error = peer.try_send(&source, &to).await.unwrap_err().to_string();
    assert!(error.contains("was not received by crxfer"), "{error}");
    assert_eq!(fs::read(to.set("dump").join("letter")).unwrap(), b"dear");
    to.settled().await;
    assert_eq!(
        count(&to.dir.join(".crxfer/partial")),
        0,
        "no byte was sent"
    );
    for name in ["../x", ".hidden", "", "a/b", "..", "a\nb"] {
        assert!(SetName::new(name).is_err(), "{name:?}");
    }
    to.stop().await;
}

/// A directory that was removed by hand leaves its inode's number to the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_was_removed_by_hand_is_sent_again() {
    let place = tempdir();
    let to = Destination::at(&place.path().join("in"), Layout::Faithful).await;
    let peer = Peer::new();
    let source = |name: &str| place.path().join(name);
    write_dump(&source("1"), &[1, 2]);
    write_child(&source("2"), &[None, Some(3)], "../1");
    write_dump(&source("other"), &[8, 9]);
    peer.send(&source("1"), &to).await;
    fs::remove_dir_all(to.set("1")).unwrap();
    fs::create_dir(to.set("1")).unwrap();
    let error = peer
        .try_send(&source("1"), &to)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("was not received by crxfer"), "{error}");
    fs::remove_dir(to.set("1")).unwrap();
    peer.send(&source("other"), &to).await;
    let report = peer.send(&source("2"), &to).await;
    assert_eq!(report.ancestors, 1);
    assert_eq!(memory(&to.set("2")), memory(&source("2")));
    to.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_are_kept_as_asked_and_while_others_build_on_them() {
    let place = tempdir();
    let dir = place.path().join("in");
    let to = Destination::with(|| {
        let mut options = receive_options(&dir, Layout::Faithful);
        options.keep = 1;
        options
    })
    .await;
    let peer = Peer::new();
    let source = place.path().join("dump");
    for round in 1..=4 {
        let _ = fs::remove_dir_all(&source);
        write_dump(&source, &[round, 2, 3]);
        assert_eq!(peer.send(&source, &to).await.published.generation, round);
    }
    assert_eq!(
        count(&dir.join(".crxfer/base")),
        1,
        "one besides the newest"
    );
    assert_eq!(count(&dir.join(".crxfer/sets")), 2);
    to.stop().await;
    // Without --keep the next one removes them.
    let to = Destination::at(&dir, Layout::Faithful).await;
    fs::write(
        source.join("pages-1.img"),
        [page(9), page(2), page(3)].concat(),
    )
    .unwrap();
    peer.send(&source, &to).await;
    assert_eq!(count(&dir.join(".crxfer/base")), 0);
    assert_eq!(count(&dir.join(".crxfer/sets")), 1);
    to.stop().await;
}
