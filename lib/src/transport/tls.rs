//! TLS below QUIC: both sides show a key, and trust is a matter of that key's fingerprint alone.

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::{ALPN, Fingerprint, Identity};

/// Who may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Whoever proves to own the key that it shows. The session asks for more: the proof that the
    /// peer holds the ticket.
    Anyone,
    /// The owners of these keys only.
    Pinned(Vec<Fingerprint>),
}

impl Trust {
    fn accepts(&self, peer: &Fingerprint) -> bool {
        match self {
            Self::Anyone => true,
            Self::Pinned(known) => known.contains(peer),
        }
    }
}

/// The key that the peer of one handshake showed and that [`Trust`] did not accept.
#[derive(Clone, Debug, Default)]
pub(super) struct Refused(Arc<OnceLock<Fingerprint>>);

impl Refused {
    pub(super) fn peer(&self) -> Option<Fingerprint> {
        self.0.get().copied()
    }
}

/// The settings of one handshake as client. What it refuses shows in `refused`.
pub(super) fn client_config(
    identity: &Identity,
    trust: Trust,
    refused: &Refused,
) -> Result<QuicClientConfig, TlsError> {
    let provider = provider();
    let key = provider
        .key_provider
        .load_private_key(identity.private_key())?;
    let shown = Arc::new(CertifiedKey::new(vec![identity.certificate()], key));
    Ok(client_config_showing(shown, ALPN, trust, refused)?.try_into()?)
}

fn client_config_showing(
    shown: Arc<CertifiedKey>,
    protocol: &[u8],
    trust: Trust,
    refused: &Refused,
) -> Result<rustls::ClientConfig, Error> {
    let provider = provider();
    let verifier = Verifier::new(trust, refused, &provider);
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// A client that may show any certificate with any key, and speak another protocol.
#[cfg(test)]
pub(super) fn forged_client_config(
    certificate: &Identity,
    key: &Identity,
    protocol: &[u8],
    server: Fingerprint,
) -> QuicClientConfig {
    let key = provider()
        .key_provider
        .load_private_key(key.private_key())
        .unwrap();
    let shown = Arc::new(CertifiedKey::new(vec![certificate.certificate()], key));
    let trust = Trust::Pinned(vec![server]);
    let config = client_config_showing(shown, protocol, trust, &Refused::default()).unwrap();
    config.try_into().unwrap()
}

/// The settings of one handshake as server. What it refuses shows in `refused`.
pub(super) fn server_config(
    identity: &Identity,
    trust: Trust,
    refused: &Refused,
) -> Result<QuicServerConfig, TlsError> {
    let provider = provider();
    let verifier = Verifier::new(trust, refused, &provider);
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![identity.certificate()], identity.private_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config.try_into()?)
}

/// rustls does not take our own key or settings: a bug here, or a key of a kind that it does not know.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum TlsError {
    #[error(transparent)]
    Rustls(#[from] Error),
    #[error(transparent)]
    NoInitialSuite(#[from] NoInitialCipherSuite),
}

/// ring, with the cipher first that this CPU is fastest at. The server follows the client's order.
fn provider() -> Arc<CryptoProvider> {
    let aes = [
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    let chacha = [cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    let cipher_suites = if cpu_has_aes() {
        [&aes[..], &chacha[..]].concat()
    } else {
        [&chacha[..], &aes[..]].concat()
    };
    Arc::new(CryptoProvider {
        cipher_suites,
        ..default_provider()
    })
}

fn cpu_has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// Fingerprint of the key in `certificate`; `None` if it is no certificate.
pub(super) fn fingerprint_of(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    Some(Fingerprint::of_public_key(
        &parsed.subject_public_key_info(),
    ))
}

/// Accepts a certificate by its key's fingerprint, and the handshake by a signature of that key.
///
/// The second is what makes the first worth anything: certificates are public, and without the
/// signature anyone could show another host's. Names, validity and issuers are not looked at.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    refused: Refused,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(trust: Trust, refused: &Refused, provider: &CryptoProvider) -> Self {
        let algorithms = provider.signature_verification_algorithms;
        Self {
            trust,
            refused: refused.clone(),
            algorithms,
        }
    }

    fn check_key(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let peer = fingerprint_of(certificate)
            .ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.trust.accepts(&peer) {
            return Ok(());
        }
        // Set once a handshake; a second certificate in it cannot come.
        let _ = self.refused.0.set(peer);
        Err(Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        ))
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

/// QUIC has no TLS 1.2, and only 1.3 is configured: this is never asked.
fn refuse_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken".to_owned()))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check_key(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check_key(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
