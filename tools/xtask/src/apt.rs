//! Debian packages that the demo and the tests use.

use std::process::Command;
use std::sync::Mutex;

use anyhow::{Result, bail};

use crate::run;

/// A program and the Debian package that brings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const NETWORK: [Needed; 3] = [
    Needed {
        program: "ip",
        package: "iproute2",
    },
    Needed {
        program: "tc",
        package: "iproute2",
    },
    Needed {
        program: "nsenter",
        package: "util-linux",
    },
];
pub(crate) const MEMCACHED: Needed = Needed {
    program: "memcached",
    package: "memcached",
};
pub(crate) const REDIS: Needed = Needed {
    program: "redis-server",
    package: "redis-server",
};
pub(crate) const NGINX: Needed = Needed {
    program: "nginx",
    package: "nginx",
};

/// Installs what is missing of `needed`, and says so. Needs root only if something is missing.
pub(crate) fn ensure(needed: &[Needed]) -> Result<()> {
    let mut packages: Vec<&str> = needed
        .iter()
        .filter(|one| run::find_program(one.program).is_none())
        .map(|one| one.package)
        .collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if run::find_program("apt-get").is_none() {
        bail!("missing: {list}; this is no Debian, install them by hand");
    }
    if !run::is_root() {
        bail!("missing: {list}; install them as root: apt-get install {list}");
    }
    install(&packages)
}

fn install(packages: &[&str]) -> Result<()> {
    // dpkg has one lock; tests may ask at the same time.
    static LOCK: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOCK
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    println!("installing with apt-get: {}", packages.join(" "));
    if run::quiet(&mut apt_get(packages)).is_ok() {
        return Ok(());
    }
    // A fresh machine has no package lists, an old one outdated lists.
    run::quiet(Command::new("apt-get").args(["-qq", "update"]))?;
    run::quiet(&mut apt_get(packages)).map(drop)
}

fn apt_get(packages: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .args(["-qq", "-y", "--no-install-recommends", "install"])
        .args(packages);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    // Services would take the ports and the processors of the tests.
    command.env("RUNLEVEL", "1");
    command
}
