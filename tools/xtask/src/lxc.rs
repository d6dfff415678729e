//! LXC containers on the hosts: made of what this machine has, with their files in a directory that both
//! hosts see, and moved by nothing but their memory.
//!
//! *Blank* is busybox and a program that notes the time. *Video* is nginx, which streams a file at the
//! rate of a video. Both share the network of their host.

mod ground;
mod rootfs;
mod ticks;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub(crate) use ground::Ground;
pub(crate) use rootfs::{Kind, PORT as VIDEO_PORT, QUESTION, VIDEO};
pub(crate) use ticks::Ticks;

use crate::apt::Needed;
use crate::hosts::Host;
use crate::run;
use crate::scratch::Scratch;

/// What containers and the program that moves them are made of.
pub(crate) const PACKAGES: [Needed; 6] = [
    Needed {
        program: "lxc-start",
        package: "lxc",
    },
    Needed {
        program: "/usr/include/lxc/lxccontainer.h",
        package: "lxc-dev",
    },
    Needed {
        program: "gcc",
        package: "gcc",
    },
    Needed {
        program: "make",
        package: "make",
    },
    Needed {
        program: "busybox",
        package: "busybox-static",
    },
    crate::apt::NGINX,
];

/// A container that each host may run: a configuration for either, and the files that they share.
/// Dropping it takes its control groups away, which it can only when its hosts are gone.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// Of the streamed file.
    pub(crate) digest: Option<blake3::Hash>,
    files: Scratch,
}

impl Container {
    /// Makes the files of one; those of a video stream `bytes`.
    pub(crate) fn new(kind: Kind, bytes: usize) -> Result<Self> {
        let files = Scratch::new("lxc")?;
        let root = files.directory("rootfs")?;
        let digest = kind.fill(&root, files.path(), bytes)?;
        let name = format!("crxfer-{}-{}", kind.name(), std::process::id());
        let container = Self {
            kind,
            name,
            digest,
            files,
        };
        for host in ["A", "B"] {
            let place = container.lxcpath_of(host).join(&container.name);
            fs::create_dir_all(&place)?;
            fs::write(
                place.join("config"),
                rootfs::configuration(&container.name, &root),
            )?;
        }
        container.build_helper()?;
        Ok(container)
    }

    /// Builds the program that dumps and restores containers for crxfer, outside of the sources.
    fn build_helper(&self) -> Result<()> {
        let sources = run::workspace().join("contrib/lxc");
        let mut make = Command::new("make");
        make.arg("-f").arg(sources.join("Makefile"));
        make.arg(format!("VPATH={}", sources.display()));
        run::quiet(make.current_dir(self.files.path())).map(drop)
    }

    fn lxcpath_of(&self, host: &str) -> PathBuf {
        self.files.path().join(host)
    }

    /// Where `host` has its containers.
    pub(crate) fn lxcpath(&self, host: &Host) -> PathBuf {
        self.lxcpath_of(host.name)
    }

    /// The command by which crxfer dumps or restores it on `host`.
    pub(crate) fn helper(&self, host: &Host, verb: &str) -> String {
        let program = self.files.path().join("crxfer-lxc");
        let place = self.lxcpath(host);
        format!("{} -P {} {verb}", program.display(), place.display())
    }

    fn tool(&self, host: &Host, name: &str) -> Command {
        let mut command = host.command(name);
        command.arg("-P").arg(self.lxcpath(host));
        command.args(["-n", &self.name]);
        command
    }

    fn log(&self) -> PathBuf {
        self.files.path().join("lxc.log")
    }

    fn said(&self) -> String {
        last_lines(&self.log())
    }

    /// Starts it on `host` and waits until it does what it is for.
    pub(crate) fn start(&self, host: &Host) -> Result<()> {
        let mut command = self.tool(host, "lxc-start");
        command.args(["-d", "-l", "INFO", "-o"]).arg(self.log());
        run::quiet(&mut command).with_context(|| self.said())?;
        run::wait_for(
            "the container to work",
            Duration::from_secs(10),
            || match self.kind {
                Kind::Blank => (self.ticks().ok()?.len() > 10).then_some(()),
                Kind::Video => host.listens_on(rootfs::PORT).then_some(()),
            },
        )
        .with_context(|| self.said())
    }

    /// Its first process, by its pid on `host`.
    pub(crate) fn pid(&self, host: &Host) -> Result<u32> {
        let text = run::quiet(self.tool(host, "lxc-info").arg("-pH"))?;
        text.trim()
            .parse()
            .with_context(|| format!("no pid of {}: {text:?}", self.name))
    }

    /// What LXC on `host` says of it: RUNNING, STOPPED, …
    fn state(&self, host: &Host) -> Result<String> {
        let text = run::quiet(self.tool(host, "lxc-info").arg("-sH"))?;
        Ok(text.trim().to_owned())
    }

    /// Waits until LXC on `host` says that it is in `state`.
    pub(crate) fn await_state(&self, host: &Host, state: &str) -> Result<()> {
        let mut last = String::new();
        let reached = run::wait_for(
            "the state of the container",
            Duration::from_secs(10),
            || {
                last = self.state(host).ok()?;
                (last == state).then_some(())
            },
        );
        reached.with_context(|| {
            format!(
                "{} is {last} on {}, not {state}\n{}",
                self.name,
                host.name,
                self.said()
            )
        })
    }

    /// Dumps it into `directory` with LXC's own tool.
    pub(crate) fn checkpoint(&self, host: &Host, directory: &Path, stop: bool) -> Result<()> {
        let mut command = self.tool(host, "lxc-checkpoint");
        command.arg("-D").arg(directory).args(stop.then_some("-s"));
        run::quiet(command.arg("-o").arg(self.log()))
            .with_context(|| self.said())
            .map(drop)
    }

    /// Restores it from `directory` with LXC's own tool.
    pub(crate) fn restore(&self, host: &Host, directory: &Path) -> Result<()> {
        let mut command = self.tool(host, "lxc-checkpoint");
        command.args(["-r", "-d", "-D"]).arg(directory);
        command.arg("-o").arg(self.log());
        // The container's monitor keeps what it is given for as long as the container runs.
        let silent = command.stdin(Stdio::null()).stdout(Stdio::null());
        let status = silent.stderr(Stdio::null()).status()?;
        ensure!(
            status.success(),
            "lxc-checkpoint -r failed: {status}\n{}\n{}",
            last_lines(&directory.join("restore.log")),
            self.said()
        );
        Ok(())
    }

    /// What the blank one has noted so far.
    pub(crate) fn ticks(&self) -> Result<Ticks> {
        Ticks::read(&self.files.path().join("rootfs/run/ticks"))
    }

    /// Fails unless it runs on `here`, and soon nothing of it is on `there`.
    pub(crate) fn ensure_only(&self, here: &Host, there: &Host) -> Result<()> {
        self.await_state(here, "RUNNING")?;
        self.await_state(there, "STOPPED")?;
        let mut left = Vec::new();
        let gone = run::wait_for("the other container to go", Duration::from_secs(10), || {
            left = self.processes(there);
            left.is_empty().then_some(())
        });
        gone.with_context(|| format!("on {}: {left:?}", there.name))
    }

    /// What runs on `host` in the control groups of this container, by pid and name.
    fn processes(&self, host: &Host) -> Vec<String> {
        let all = fs::read_dir(host.file(Path::new("/proc")));
        let entries = all.into_iter().flatten().flatten();
        let ours = entries.filter(|entry| {
            let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            groups.contains(&format!(".{}", self.name))
        });
        let describe = |entry: fs::DirEntry| {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            format!("{} {}", entry.file_name().to_string_lossy(), name.trim())
        };
        ours.map(describe).collect()
    }

    fn remove_groups(&self) {
        for root in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            remove_groups_in(&root.path(), &self.name);
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.remove_groups();
    }
}

fn last_lines(log: &Path) -> String {
    run::last_lines(&fs::read_to_string(log).unwrap_or_default(), 12)
}

/// Removes the control groups that LXC made for container `name` in `directory` and below. Its monitor
/// does that, unless it was killed with its host.
fn remove_groups_in(directory: &Path, name: &str) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        remove_groups_in(&entry.path(), name);
        let file_name = entry.file_name();
        let is_ours = file_name
            .to_str()
            .and_then(|group| group.strip_prefix("lxc."))
            .and_then(|group| group.split_once('.'))
            .is_some_and(|(_, of)| of == name || of.strip_prefix(name).is_some_and(is_copy));
        if is_ours {
            // Those below it are gone; what still runs in it keeps it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// LXC numbers a group whose name is taken: `-1`, `-2`, …
fn is_copy(ending: &str) -> bool {
    ending
        .strip_prefix('-')
        .is_some_and(|number| number.parse::<u32>().is_ok())
}
