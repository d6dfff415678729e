use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::*;
use crate::ticket::{Role, Secret, proof, verify_proof};

fn loopback() -> [SocketAddr; 1] {
    ["127.0.0.1:0".parse().unwrap()]
}

fn server(trust: Trust) -> Server {
    Server::bind(
        &loopback(),
        Identity::generate().unwrap(),
        trust,
        Options::default(),
    )
    .unwrap()
}

/// A connection as both ends see it: (server's, client's).
async fn pair() -> (Server, Connection, Connection) {
    let server = server(Trust::Anyone);
    let (accepted, connected) = meet(&server).await;
    (server, accepted, connected)
}

async fn meet(server: &Server) -> (Connection, Connection) {
    let identity = Identity::generate().unwrap();
    let addresses = server.local_addresses().unwrap();
    let expected = [server.fingerprint()];
    let options = Options::default();
    let (accepted, connected) = tokio::join!(
        async { server.accept().await.unwrap().complete().await.unwrap() },
        connect(&addresses, &identity, &expected, &options),
    );
    (accepted, connected.unwrap())
}

#[tokio::test]
async fn two_hosts_that_pin_each_other_connect_and_know_each_other() {
    let (here, there) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (here_name, there_name) = (here.fingerprint(), there.fingerprint());
    let trust = Trust::Pinned(vec![Fingerprint([0; 32]), there_name]);
    let server = Server::bind(&loopback(), here, trust, Options::default()).unwrap();
    let addresses = server.local_addresses().unwrap();
    let (accepted, connected) = tokio::join!(
        async { server.accept().await.unwrap().complete().await.unwrap() },
        async {
            connect(&addresses, &there, &[here_name], &Options::default())
                .await
                .unwrap()
        },
    );
    assert_eq!(accepted.peer(), there_name);
    assert_eq!(connected.peer(), here_name);
    assert_eq!(connected.remote_address(), addresses[0]);
}

#[tokio::test]
async fn a_server_with_another_key_is_not_talked_to() {
    let server = server(Trust::Anyone);
    let addresses = server.local_addresses().unwrap();
    let identity = Identity::generate().unwrap();
    let (accepted, connected) = tokio::join!(
        async { server.accept().await.unwrap().complete().await },
        async {
            connect(
                &addresses,
                &identity,
                &[Fingerprint([1; 32])],
                &Options::default(),
            )
            .await
        },
    );
    let error = connected.unwrap_err();
    assert_eq!(
        error.wrong_key(),
        Some((addresses[0], server.fingerprint()))
    );
    assert!(error.to_string().contains("another key"), "{error}");
    assert!(!error.is_retryable());
    assert!(
        matches!(accepted, Err(AcceptError::Handshake { .. })),
        "{accepted:?}"
    );
}

#[tokio::test]
async fn a_client_with_an_unknown_key_is_refused_and_told() {
    let server = server(Trust::Pinned(vec![Fingerprint([1; 32])]));
    let addresses = server.local_addresses().unwrap();
    let identity = Identity::generate().unwrap();
    let expected = [server.fingerprint()];
    let (accepted, refused) = tokio::join!(
        async { server.accept().await.unwrap().complete().await },
        async {
            match connect(&addresses, &identity, &expected, &Options::default()).await {
                Ok(connection) => connection.closed().await,
                Err(error) => panic!("the client's own half succeeds: {error}"),
            }
        },
    );
    let error = accepted.unwrap_err();
    assert!(
        matches!(error, AcceptError::UnknownKey { peer, .. } if peer == identity.fingerprint()),
        "{error:?}"
    );
    assert_eq!(refused, TransportError::KeyRefused);
}

/// The certificate of the pinned host with another key's signature: what a thief of public
/// certificates can do.
#[tokio::test]
async fn a_certificate_without_its_key_is_worthless() {
    let victim = Identity::generate().unwrap();
    let thief = Identity::generate().unwrap();
    let server = server(Trust::Pinned(vec![victim.fingerprint()]));
    let config = tls::forged_client_config(&victim, &thief, ALPN, server.fingerprint());
    let endpoint = server::endpoint(loopback()[0], &Options::default(), None).unwrap();
    let config = quinn::ClientConfig::new(std::sync::Arc::new(config));
    let address = server.local_addresses().unwrap()[0];
    let connecting = endpoint.connect_with(config, address, "crxfer").unwrap();
    let (accepted, _) = tokio::join!(
        async { server.accept().await.unwrap().complete().await },
        connecting
    );
    assert!(
        matches!(accepted, Err(AcceptError::Handshake { .. })),
        "{accepted:?}"
    );
}

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "it measures real time")]
async fn nobody_listening_is_said_soon_and_by_address() {
    let gone = server(Trust::Anyone);
    let addresses = gone.local_addresses().unwrap();
    gone.close(CloseCode::ShuttingDown, "").await;
    drop(gone);
    let begin = Instant::now();
    let identity = Identity::generate().unwrap();
    let error = connect(
        &addresses,
        &identity,
        &[Fingerprint([1; 32])],
        &Options::default(),
    )
    .await
    .unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(5));
    let message = error.to_string();
    assert!(message.contains(&addresses[0].to_string()), "{message}");
    assert!(message.contains("nothing listens there"), "{message}");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn another_address_is_tried_when_one_is_dead() {
    let server = server(Trust::Anyone);
    let dead = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let silent = dead.local_addr().unwrap();
    let refused: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let addresses = [&[refused, silent][..], &server.local_addresses().unwrap()].concat();
    let identity = Identity::generate().unwrap();
    let expected = [server.fingerprint()];
    let options = Options::default();
    let (accepted, connected) = tokio::join!(
        async { server.accept().await.unwrap().complete().await.unwrap() },
        connect(&addresses, &identity, &expected, &options),
    );
    assert_eq!(connected.unwrap().binding(), accepted.binding());
}

#[tokio::test]
async fn another_protocol_is_a_version_mismatch_on_both_sides() {
    let server = server(Trust::Anyone);
    let identity = Identity::generate().unwrap();
    let config = tls::forged_client_config(&identity, &identity, b"crxfer/0", server.fingerprint());
    let endpoint = server::endpoint(loopback()[0], &Options::default(), None).unwrap();
    let config = quinn::ClientConfig::new(std::sync::Arc::new(config));
    let address = server.local_addresses().unwrap()[0];
    let connecting = endpoint.connect_with(config, address, "crxfer").unwrap();
    let (accepted, connected) = tokio::join!(
        async { server.accept().await.unwrap().complete().await },
        connecting
    );
    assert!(
        matches!(accepted, Err(AcceptError::Incompatible { .. })),
        "{accepted:?}"
    );
    assert_eq!(
        TransportError::from(connected.unwrap_err()),
        TransportError::Incompatible
    );
}

#[tokio::test]
async fn a_proof_is_good_on_its_own_connection_only() {
    let (server, accepted, connected) = pair().await;
    let (accepted2, connected2) = meet(&server).await;
    assert_eq!(accepted.binding(), connected.binding());
    assert_ne!(accepted.binding(), accepted2.binding());
    let secret = Secret::generate();
    let found = proof(&secret, Role::Source, &connected.binding());
    assert!(verify_proof(
        &secret,
        Role::Source,
        &accepted.binding(),
        &found
    ));
    assert!(!verify_proof(
        &secret,
        Role::Source,
        &accepted2.binding(),
        &found
    ));
    assert!(!verify_proof(
        &secret,
        Role::Destination,
        &accepted.binding(),
        &found
    ));
    drop(connected2);
}

#[tokio::test]
async fn messages_arrive_whole_and_the_end_is_seen() {
    let (_server, accepted, connected) = pair().await;
    let large: Vec<u8> = (0..300_000u32).map(|i| i.to_le_bytes()[0]).collect();
    let (mut send, _receive) = connected.open_control().await.unwrap();
    for message in [&b""[..], b"one", &large] {
        send.write_message(message).await.unwrap();
    }
    send.finish().unwrap();
    let (_send, mut receive) = accepted.accept_control().await.unwrap();
    assert_eq!(receive.read_message(0).await.unwrap().unwrap(), b"");
    assert_eq!(receive.read_message(3).await.unwrap().unwrap(), b"one");
    assert_eq!(receive.read_message(300_000).await.unwrap().unwrap(), large);
    assert_eq!(receive.read_message(100).await.unwrap(), None);
}

#[tokio::test]
async fn a_message_beyond_the_limit_is_refused_before_its_bytes() {
    let (_server, accepted, connected) = pair().await;
    let mut send = connected.open_raw().await;
    send.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let (_send, mut receive) = accepted.accept_control().await.unwrap();
    assert_eq!(
        receive.read_message(1 << 20).await,
        Err(TransportError::MessageTooLong {
            length: u32::MAX.into(),
            max: 1 << 20
        })
    );
}

#[tokio::test]
async fn a_message_or_length_cut_short_is_an_error() {
    for bytes in [&[5, 0, 0, 0, 1, 2][..], &[5, 0]] {
        let (_server, accepted, connected) = pair().await;
        let mut send = connected.open_raw().await;
        send.write_all(bytes).await.unwrap();
        send.finish().unwrap();
        let (_send, mut receive) = accepted.accept_control().await.unwrap();
        assert_eq!(
            receive.read_message(100).await,
            Err(TransportError::CutShort)
        );
    }
}

#[tokio::test]
async fn bulk_bytes_arrive_in_order_and_packets_have_grown() {
    let (_server, accepted, connected) = pair().await;
    let block = bytes::Bytes::from(vec![7; 1 << 20]);
    let sending = async {
        let mut bulk = connected.open_bulk().await.unwrap();
        for number in 0..32u8 {
            let header = bytes::Bytes::copy_from_slice(&[number]);
            bulk.write_parts(&mut [header, block.clone()])
                .await
                .unwrap();
        }
        bulk.finish().unwrap();
        bulk.delivered().await.unwrap();
    };
    let receiving = async {
        let mut bulk = accepted.accept_bulk().await.unwrap();
        let mut frame = vec![0; 1 + (1 << 20)];
        let mut count = 0;
        while bulk.read_exact(&mut frame).await.unwrap() {
            assert_eq!(frame[0], count);
            assert!(frame[1..] == block[..]);
            count += 1;
        }
        count
    };
    let ((), count) = tokio::join!(sending, receiving);
    assert_eq!(count, 32);
    assert!(
        connected.path().packet_bytes > 6000,
        "{:?}",
        connected.path()
    );
    let (sent, received) = connected.wire_bytes();
    assert!(sent > 32 << 20, "{sent}");
    assert!(received < 4 << 20, "{received}");
}

#[tokio::test]
async fn the_reason_of_a_close_reaches_the_peer() {
    let (_server, accepted, connected) = pair().await;
    connected
        .close_and_tell(CloseCode::LimitExceeded, "set is\x1b[2J too large")
        .await;
    assert_eq!(
        accepted.closed().await,
        TransportError::PeerClosed {
            code: CloseCode::LimitExceeded,
            reason: "set is\u{fffd}[2J too large".to_owned()
        }
    );
    assert_eq!(connected.close_reason(), Some(TransportError::ClosedHere));
}

#[tokio::test]
async fn a_closed_server_tells_its_peers_and_accepts_no_more() {
    let (server, _accepted, connected) = pair().await;
    server.close(CloseCode::ShuttingDown, "").await;
    assert!(server.accept().await.is_none());
    let error = connected.closed().await;
    assert!(error.is_retryable(), "{error:?}");
}

#[tokio::test]
async fn a_server_at_several_addresses_accepts_at_each() {
    let listen = [loopback()[0], loopback()[0]];
    let identity = Identity::generate().unwrap();
    let server = Server::bind(&listen, identity, Trust::Anyone, Options::default()).unwrap();
    let addresses = server.local_addresses().unwrap();
    assert_eq!(addresses.len(), 2);
    for address in addresses {
        let identity = Identity::generate().unwrap();
        let (accepted, connected) = tokio::join!(
            async { server.accept().await.unwrap().complete().await.unwrap() },
            async {
                connect(
                    &[address],
                    &identity,
                    &[server.fingerprint()],
                    &Options::default(),
                )
                .await
            },
        );
        assert_eq!(accepted.peer(), identity.fingerprint());
        assert_eq!(connected.unwrap().remote_address(), address);
    }
}

#[tokio::test]
async fn a_taken_address_is_named() {
    let server = server(Trust::Anyone);
    let taken = server.local_addresses().unwrap();
    let identity = Identity::generate().unwrap();
    let error = Server::bind(&taken, identity, Trust::Anyone, Options::default()).unwrap_err();
    assert!(error.to_string().contains(&taken[0].to_string()), "{error}");
}

impl Connection {
    async fn open_raw(&self) -> quinn::SendStream {
        self.raw().open_bi().await.unwrap().0
    }
}
