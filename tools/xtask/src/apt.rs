//! Debian packages that the demo and the tests use.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Result, bail};

use crate::run;

/// A program, or a file by its full path, and the Debian package that brings it.
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
pub(crate) const ARPING: Needed = Needed {
    program: "arping",
    package: "iputils-arping",
};
pub(crate) const RUNC: Needed = Needed {
    program: "runc",
    package: "runc",
};
pub(crate) const NFT: Needed = Needed {
    program: "nft",
    package: "nftables",
};
pub(crate) const RSYNC: Needed = Needed {
    program: "rsync",
    package: "rsync",
};
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
pub(crate) const DOCKER: Needed = Needed {
    program: "dockerd",
    package: "docker.io",
};
pub(crate) const NODE: Needed = Needed {
    program: "node",
    package: "nodejs",
};

/// Installs what is missing of `needed`, and says so. Needs root only if something is missing.
pub(crate) fn ensure(needed: &[Needed]) -> Result<()> {
    let mut packages: Vec<&str> = needed
        .iter()
        .filter(|one| !is_there(one.program))
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

fn is_there(program: &str) -> bool {
    match program.starts_with('/') {
        true => Path::new(program).exists(),
        false => run::find_program(program).is_some(),
    }
}

fn install(packages: &[&str]) -> Result<()> {
    // dpkg has one lock; tests may ask at the same time.
    static LOCK: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOCK
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    println!(
        "installing with apt-get, without starting services: {}",
        packages.join(" ")
    );
    let _no_services = NoServices::new();
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
    command
}

/// While it exists, packages do not start the services that they bring: Debian asks this script.
#[derive(Debug)]
struct NoServices(Option<&'static Path>);

impl NoServices {
    fn new() -> Self {
        let script = Path::new("/usr/sbin/policy-rc.d");
        // One that is there already belongs to the administrator.
        let written = File::options()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(script);
        let written = written.and_then(|mut file| file.write_all(b"#!/bin/sh\nexit 101\n"));
        Self(written.is_ok().then_some(script))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(script) = self.0 {
            // Services that do not start later would be noticed by nobody: say so.
            if let Err(error) = fs::remove_file(script) {
                eprintln!("remove {} by hand: {error}", script.display());
            }
        }
    }
}
