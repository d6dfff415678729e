//! The nftables rules by which CRIU keeps a frozen tree's connections silent.
//!
//! CRIU makes a table of its own for a dump and removes it when the tree resumes, or on the host that
//! restores it. It stays where nothing resumes: on the source after a migration (where it must stay
//! until the address has moved: without it the kernel resets the connections), and wherever CRIU was
//! killed.

use std::io;
use std::process::{Command, Stdio};

/// CRIU formats `inet CRIU-ID` into 32 bytes, so that what is behind is cut off.
const MOST_NAME_BYTES: usize = 31 - "inet ".len();

/// Why a lock could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Not an id that CRIU makes.
    #[error("{0:?} is not the id of a run of CRIU")]
    BadId(String),
    /// There is no `nft`, or it does not start.
    #[error("nft cannot be run ({0}). Install nftables, or remove CRIU's table by other means")]
    Start(io::Error),
    /// `nft` refuses.
    #[error("nft cannot remove table inet {table}: {message}")]
    Refused {
        /// The table.
        table: String,
        /// What `nft` says.
        message: String,
    },
}

/// Name of the table, of family inet, that the dump with this id makes.
///
/// `run_id` is `dump_criu_run_id` of the dump's inventory (CRIU 4.1 and later). CRIU before uses the
/// root's pid, as a decimal number; that can be given as well.
pub fn nftables_table(run_id: &str) -> Result<String, LockError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if run_id.is_empty() || !run_id.bytes().all(allowed) {
        return Err(LockError::BadId(run_id.to_owned()));
    }
    let mut table = format!("CRIU-{run_id}");
    table.truncate(MOST_NAME_BYTES);
    Ok(table)
}

/// Removes that table from this network namespace; false if there was none.
pub fn remove_nftables_lock(run_id: &str) -> Result<bool, LockError> {
    let table = nftables_table(run_id)?;
    let output = Command::new("nft")
        .args(["delete", "table", "inet", &table])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(LockError::Start)?;
    if output.status.success() {
        return Ok(true);
    }
    let message = String::from_utf8_lossy(&output.stderr);
    if message.contains("No such file or directory") {
        return Ok(false);
    }
    Err(LockError::Refused {
        table,
        message: super::log::printable(message.lines().next().unwrap_or("")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_cut_as_criu_cuts_it() {
        let table = nftables_table("24e6ce95-a51a-498f-a7ff-0123456789ab");
        assert_eq!(table.expect("an id"), "CRIU-24e6ce95-a51a-498f-a7");
        assert_eq!(nftables_table("4711").expect("a pid"), "CRIU-4711");
    }

    #[test]
    fn only_ids_reach_a_command() {
        for id in ["", "a; flush ruleset", "é", "1\n"] {
            assert!(
                matches!(nftables_table(id), Err(LockError::BadId(_))),
                "{id:?}"
            );
        }
    }
}
