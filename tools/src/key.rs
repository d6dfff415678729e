//! Which key this host sends with, and where the command keeps its state.

use std::path::{Path, PathBuf};

use crxfer::transport::{Identity, IdentityError};

use crate::error::{Failed, with_causes};
use crate::output::hint;

/// The key in `given`, which must exist, or this user's own, made on first use.
pub(crate) fn of_source(given: Option<&Path>) -> Result<Identity, Failed> {
    if let Some(path) = given {
        return Ok(Identity::load(path)?);
    }
    let made = match state_directory() {
        Some(state) => Identity::load_or_create(&state.join("identity.pem")),
        None => {
            hint(
                "crxfer: no place to keep a key (HOME is not set): what was sent earlier will be sent again",
            );
            return Ok(Identity::generate()?);
        }
    };
    match made {
        Err(error @ IdentityError::Io { .. }) => {
            hint(&format!(
                "crxfer: {}; going on with a new key: what was sent earlier will be sent again",
                with_causes(&error)
            ));
            Ok(Identity::generate()?)
        }
        other => Ok(other?),
    }
}

/// The key in `given`, if one is given.
pub(crate) fn of_destination(given: Option<&Path>) -> Result<Option<Identity>, Failed> {
    Ok(given.map(Identity::load).transpose()?)
}

/// Where this user's key and the digests of what was sent lie: state, not configuration, because
/// the command makes it by itself. Need not exist.
pub(crate) fn state_directory() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    state_directory_of(variable, rustix::process::geteuid().is_root())
}

/// Where what belongs to this boot lies; `None` for who may not write there.
pub(crate) fn run_directory() -> Option<PathBuf> {
    const RUN: &str = "/run/crxfer";
    let writable = |path: &Path| {
        use rustix::fs::{Access, access};
        access(path, Access::WRITE_OK | Access::EXEC_OK).is_ok()
    };
    let run = Path::new(RUN);
    let nearest = if run.exists() { run } else { Path::new("/run") };
    writable(nearest).then(|| run.to_owned())
}

/// Where records of migrations are, if nothing else is said.
pub(crate) fn records() -> PathBuf {
    run_directory()
        .or_else(|| state_directory().map(|state| state.join("migrations")))
        .unwrap_or_else(|| "/run/crxfer".into())
}

fn state_directory_of(variable: impl Fn(&str) -> Option<PathBuf>, root: bool) -> Option<PathBuf> {
    // The base directory specification has relative paths ignored.
    let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .or_else(|| root.then(|| "/var/lib".into()))?;
    Some(state.join("crxfer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(variables: &[(&str, &str)], root: bool) -> Option<String> {
        let find = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name)?;
            Some(PathBuf::from(found.1))
        };
        state_directory_of(find, root).map(|path| path.display().to_string())
    }

    #[test]
    fn the_users_state_is_found_without_a_home_too() {
        let home = ("HOME", "/home/ann");
        let end = "crxfer";
        assert_eq!(
            path(&[home, ("XDG_STATE_HOME", "/s")], false),
            Some(format!("/s/{end}"))
        );
        assert_eq!(
            path(&[home, ("XDG_STATE_HOME", "s")], false),
            Some(format!("/home/ann/.local/state/{end}"))
        );
        assert_eq!(path(&[], true), Some(format!("/var/lib/{end}")));
        assert_eq!(path(&[], false), None);
    }
}
