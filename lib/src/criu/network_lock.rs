//! The nftables rules by which CRIU keeps a frozen tree's connections silent.
//!
//! CRIU makes a table of its own for a dump and removes it when the tree resumes, or on the host that
//! restores it. It stays where nothing resumes: on the source after a migration (where it must stay
//! until the address has moved: without it the kernel resets the connections), and wherever CRIU was
//! killed.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
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
    /// `nft` does not show what there is.
    #[error("nft cannot list CRIU's tables: {0}")]
    Unreadable(String),
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
    remove_table(&nftables_table(run_id)?)
}

/// Removes a table of family inet from this network namespace; false if there was none.
pub(crate) fn remove_table(table: &str) -> Result<bool, LockError> {
    match nft(&["delete", "table", "inet", table])? {
        Ok(_) => Ok(true),
        Err(message) if message.contains("No such file or directory") => Ok(false),
        Err(message) => Err(LockError::Refused {
            table: table.to_owned(),
            message: first_line(&message),
        }),
    }
}

/// Names of the tables in this network namespace that CRIU has made, of whatever dump.
pub fn nftables_locks() -> Result<Vec<String>, LockError> {
    let text = nft(&["list", "tables", "inet"])?.map_err(unreadable)?;
    let tables = text
        .lines()
        .filter_map(|line| line.strip_prefix("table inet "));
    let tables = tables.filter(|table| table.starts_with("CRIU-"));
    Ok(tables.map(|table| table.trim().to_owned()).collect())
}

/// What one of CRIU's tables keeps silent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Silenced {
    /// All of its network namespace: the lock of a tree that has one of its own.
    pub(crate) all: bool,
    /// The two ends of each connection, each connection in both orders.
    pub(crate) connections: HashSet<(SocketAddr, SocketAddr)>,
}

impl Silenced {
    /// CRIU makes the table before it knows of any connection, and for trees that have none.
    pub(crate) fn is_nothing(&self) -> bool {
        !self.all && self.connections.is_empty()
    }
}

/// Whether process `pid` is a CRIU that may have such a table, or a part of one.
pub(crate) fn is_process_of_criu(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    is_criu(String::from_utf8_lossy(&line).split('\0'))
}

fn is_criu<'a>(arguments: impl Iterator<Item = &'a str>) -> bool {
    // The program may have been started through a loader or a wrapper.
    let name = |argument: &&str| {
        let name = argument.rsplit('/').next();
        !name.is_some_and(|name| name.starts_with("criu"))
    };
    const OPERATIONS: [&str; 4] = ["swrk", "service", "dump", "restore"];
    let mut after = arguments.skip_while(name);
    after.any(|argument| OPERATIONS.contains(&argument))
}

/// What the table keeps silent, in this network namespace.
pub(crate) fn silenced_by(table: &str) -> Result<Silenced, LockError> {
    let text = nft(&["list", "table", "inet", table])?.map_err(unreadable)?;
    Ok(silenced(&text))
}

// Elements of sets are `ADDRESS . PORT . ADDRESS . PORT`, several on a line, between braces.
fn silenced(text: &str) -> Silenced {
    let elements = text.split(['{', '}', ',']).filter_map(|element| {
        let mut parts = element.split_whitespace().filter(|part| *part != ".");
        let mut end = || -> Option<SocketAddr> {
            let address: IpAddr = parts.next()?.parse().ok()?;
            let port = parts.next()?.parse().ok()?;
            Some(SocketAddr::new(address.to_canonical(), port))
        };
        Some((end()?, end()?))
    });
    Silenced {
        all: text.contains("policy drop"),
        connections: elements.collect(),
    }
}

/// What `nft` prints, or says where it refuses. Addresses and ports come as numbers.
fn nft(arguments: &[&str]) -> Result<Result<String, String>, LockError> {
    let output = Command::new("nft")
        .arg("--numeric")
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(LockError::Start)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    })
}

fn first_line(message: &str) -> String {
    super::log::printable(message.lines().next().unwrap_or(""))
}

fn unreadable(message: String) -> LockError {
    LockError::Unreadable(first_line(&message))
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

    #[test]
    fn what_a_table_keeps_silent_is_read() {
        let text = "table inet CRIU-ea99a10d {\n\tset conns4 {\n\
            \t\ttype ipv4_addr . inet_service . ipv4_addr . inet_service\n\
            \t\telements = { 192.0.2.1 . 11999 . 192.0.2.2 . 57294,\n\
            \t\t\t     192.0.2.2 . 57294 . 192.0.2.1 . 11999 }\n\t}\n\
            \tset conns6 {\n\t\telements = { 2001:db8::1 . 1 . ::ffff:192.0.2.9 . 2 }\n\t}\n\
            \tchain input {\n\t\ttype filter hook input priority 0; policy accept;\n\t}\n}\n";
        let found = silenced(text);
        let pair = |one: &str, other: &str| (one.parse().unwrap(), other.parse().unwrap());
        assert_eq!(found.connections.len(), 3);
        assert!(
            found
                .connections
                .contains(&pair("192.0.2.1:11999", "192.0.2.2:57294"))
        );
        assert!(
            found
                .connections
                .contains(&pair("[2001:db8::1]:1", "192.0.2.9:2"))
        );
        assert!(!found.all);
        assert!(silenced("chain input { type filter; policy drop; }").all);
    }

    #[test]
    fn a_criu_is_known_by_its_command_line() {
        let is = |line: &str| is_criu(line.split(' '));
        assert!(is("/usr/sbin/criu swrk 17"));
        assert!(is(
            "/lib/ld-linux.so.2 --argv0 criu /usr/lib/criu.bin dump -t 7"
        ));
        assert!(!is("criu check"));
        assert!(!is("memcached restore"));
        assert!(!is(""));
    }
}
