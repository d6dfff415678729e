//! A host's key: made, kept in a file, wrapped in a certificate.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ED25519};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Fingerprint, tls};
use crate::ticket::fill_random;

/// Longest key file that is read, in bytes: ours have about 130, an RSA key of 8,192 bits 6,500.
const MAX_KEY_FILE: u64 = 64 << 10;

/// The key pair of this host with a certificate around it. New ones are Ed25519.
///
/// The file holds the private key alone (PEM, PKCS#8): the certificate is made anew each time it is
/// read, and the [`Fingerprint`], which is the key's, stays.
#[derive(Clone)]
pub struct Identity {
    key: Arc<KeyPair>,
    certificate: CertificateDer<'static>,
    fingerprint: Fingerprint,
}

/// Why a host's key cannot be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Reading, creating or writing failed.
    #[error("cannot {doing} the key file {}", path.display())]
    Io {
        /// What was tried: `read`, `create`…
        doing: &'static str,
        /// The key file, or its directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others can read the key, so it may not be ours alone any more.
    #[error(
        "the key file {} can be read by others (mode {mode:04o}): if nobody did, \"chmod 600\" it, else make a new one",
        path.display()
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not a regular file, or a very long one.
    #[error("{} is not a key file: it is {what}", path.display())]
    NotAFile {
        /// The key file.
        path: PathBuf,
        /// What was found.
        what: &'static str,
    },
    /// Not PEM, or no private key that TLS can use.
    #[error("{} holds no usable private key (PEM, PKCS#8)", path.display())]
    NotAKey {
        /// The key file.
        path: PathBuf,
        /// What is wrong with it.
        source: rcgen::Error,
    },
    /// [`Identity::save`] does not replace a key.
    #[error("{} exists already: a key is not overwritten, remove it first", path.display())]
    Exists {
        /// The key file.
        path: PathBuf,
    },
    /// Key or certificate could not be made.
    #[error("cannot make a key")]
    Generate(#[source] rcgen::Error),
}

impl Identity {
    /// A new key, kept nowhere.
    pub fn generate() -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(IdentityError::Generate)?;
        Self::from_key(key).map_err(IdentityError::Generate)
    }

    /// The key in the file at `path`, which nobody but its owner may read.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let pem = read_private(path)?;
        KeyPair::from_pem(&pem)
            .and_then(Self::from_key)
            .map_err(|source| IdentityError::NotAKey {
                path: path.to_owned(),
                source,
            })
    }

    /// The key in the file at `path`; if there is none, a new one, saved there. Several processes
    /// that do this at once end up with the same key.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match Self::load(path) {
            Err(error) if error.is_missing_file() => {}
            result => return result,
        }
        let made = Self::generate()?;
        match made.save(path) {
            Ok(()) => Ok(made),
            // Another process was faster: its key is the host's.
            Err(IdentityError::Exists { .. }) => Self::load(path),
            Err(error) => Err(error),
        }
    }

    /// Writes the key to a new file at `path` (mode 0600), making its directory (0700) if needed.
    /// The file appears complete or not at all; one that exists is left alone.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let failed = |doing| {
            move |source| IdentityError::Io {
                doing,
                path: path.to_owned(),
                source,
            }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed("create the directory of"))?;
        let draft = directory.join(draft_name());
        let written = write_private(&draft, self.key.serialize_pem().as_bytes())
            .map_err(failed("write"))
            .and_then(|()| publish(&draft, path));
        if written.is_err() {
            let _ = std::fs::remove_file(&draft);
        }
        written?;
        File::open(directory)
            .and_then(|dir| dir.sync_all())
            .map_err(failed("make durable"))
    }

    /// The name that peers know this host by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(super) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    pub(super) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }

    fn from_key(key: KeyPair) -> Result<Self, rcgen::Error> {
        let mut params = CertificateParams::new(vec!["crxfer".to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "crxfer host key");
        let certificate = params.self_signed(&key)?.der().clone();
        let fingerprint =
            tls::fingerprint_of(&certificate).ok_or(rcgen::Error::CouldNotParseCertificate)?;
        Ok(Self {
            key: Arc::new(key),
            certificate,
            fingerprint,
        })
    }
}

/// Shows the name, never the key.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl IdentityError {
    fn is_missing_file(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Reads a file that must be regular, short and closed to others. Looks at the open file, not at
/// the name, so that what is checked is what is read.
fn read_private(path: &Path) -> Result<String, IdentityError> {
    let failed = |source| IdentityError::Io {
        doing: "read",
        path: path.to_owned(),
        source,
    };
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("a small flag");
    // Without O_NONBLOCK a named pipe at this place would block for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblock)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(IdentityError::NotAFile {
            path: path.to_owned(),
            what: "no regular file",
        });
    }
    if metadata.mode() & 0o077 != 0 {
        let mode = metadata.mode() & 0o7777;
        return Err(IdentityError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    if metadata.len() > MAX_KEY_FILE {
        return Err(IdentityError::NotAFile {
            path: path.to_owned(),
            what: "far too long",
        });
    }
    let mut text = String::new();
    file.take(MAX_KEY_FILE)
        .read_to_string(&mut text)
        .map_err(failed)?;
    Ok(text)
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    // The umask may have taken our own bits as well.
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn publish(draft: &Path, path: &Path) -> Result<(), IdentityError> {
    renameat_with(CWD, draft, CWD, path, RenameFlags::NOREPLACE).map_err(|error| match error {
        rustix::io::Errno::EXIST => IdentityError::Exists {
            path: path.to_owned(),
        },
        error => IdentityError::Io {
            doing: "create",
            path: path.to_owned(),
            source: error.into(),
        },
    })
}

fn draft_name() -> String {
    let mut random = [0; 8];
    fill_random(&mut random);
    format!(".crxfer-key-{:016x}", u64::from_ne_bytes(random))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode_of(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_key_is_made_once_and_found_again() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("new/dir/host.key");
        let made = Identity::load_or_create(&path).unwrap();
        let found = Identity::load_or_create(&path).unwrap();
        assert_eq!(made.fingerprint(), found.fingerprint());
        assert_eq!(mode_of(&path), 0o600);
        assert_eq!(mode_of(path.parent().unwrap()), 0o700);
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no draft left"
        );
        assert!(!format!("{made:?}").contains("PRIVATE"));
    }

    #[test]
    fn a_new_certificate_does_not_change_the_fingerprint() {
        let one = Identity::generate().unwrap();
        let other = CertificateParams::new(vec!["other.example".to_owned()]).unwrap();
        let other = other.self_signed(&*one.key).unwrap();
        assert_ne!(&one.certificate(), other.der());
        assert_eq!(tls::fingerprint_of(other.der()), Some(one.fingerprint()));
        assert_ne!(
            one.fingerprint(),
            Identity::generate().unwrap().fingerprint()
        );
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("host.key");
        Identity::generate().unwrap().save(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o644] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = Identity::load_or_create(&path).unwrap_err();
            assert!(matches!(error, IdentityError::Exposed { mode: found, .. } if found == mode));
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
    }

    #[test]
    fn a_key_is_never_overwritten() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("host.key");
        let first = Identity::generate().unwrap();
        first.save(&path).unwrap();
        let error = Identity::generate().unwrap().save(&path).unwrap_err();
        assert!(matches!(error, IdentityError::Exists { .. }), "{error}");
        assert_eq!(
            Identity::load(&path).unwrap().fingerprint(),
            first.fingerprint()
        );
        assert_eq!(
            std::fs::read_dir(scratch.path()).unwrap().count(),
            1,
            "no draft left"
        );
    }

    #[test]
    fn what_is_no_key_file_is_said() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("host.key");
        assert!(Identity::load(&path).unwrap_err().is_missing_file());
        write_private(
            &path,
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        )
        .unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::NotAKey { .. })
        ));
        std::fs::write(&path, vec![b'x'; 70_000]).unwrap();
        assert!(matches!(
            Identity::load(&path),
            Err(IdentityError::NotAFile { .. })
        ));
        assert!(matches!(
            Identity::load(scratch.path()),
            Err(IdentityError::NotAFile { .. })
        ));
    }
}
