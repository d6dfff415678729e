//! Docker daemons on two hosts that share nothing but the machine, images of programs that the machine
//! has, and containers of them.

mod counter;

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

pub(crate) use counter::Counter;

use crate::crxfer::migrate::Migration;
use crate::crxfer::{Crxfer, Receiver};
use crate::hosts::{Host, Network, Rate};
use crate::run;
use crate::scratch::Scratch;
use crate::stage::Stage;

/// Docker's own command: others by its name may come first in PATH.
const DOCKER: &str = "/usr/bin/docker";

/// Where a host finds programs, crxfer-docker and what it starts among them.
const PATH: &str = "PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";

/// How long a daemon may take to answer.
const STARTED_WITHIN: Duration = Duration::from_secs(40);

/// Name of the image with memcached.
pub(crate) const STORE: &str = "memcached:1";

/// Starts everything for a memcached in container `name` on A, with daemons on A and B.
pub(crate) fn serving(
    name: &str,
    rate: Rate,
    mib: u64,
    writes: u32,
    options: &[&str],
) -> Result<(Stage, Daemons)> {
    let started = OnceCell::new();
    let stage = Stage::start_by(rate, mib, writes, &|network, program, words| {
        let daemons = Daemons::start(network)?;
        daemons.import(network, STORE, program, &[])?;
        let program = program.display().to_string();
        let words: Vec<&str> = [&[program.as_str()], words].concat();
        let pid = daemons
            .a
            .run(&network.hosts.a, name, options, STORE, &words)?;
        started.get_or_init(|| daemons);
        Ok(pid)
    })?;
    Ok((stage, started.into_inner().context("no daemons")?))
}

/// What a container runs.
pub(crate) fn words_of(daemon: &Daemon, host: &Host, name: &str) -> Result<Vec<String>> {
    let words = daemon.inspect(host, name, "{{json .Config.Cmd}}")?;
    Ok(serde_json::from_str(&words)?)
}

/// A daemon on each of two hosts.
#[derive(Debug)]
pub(crate) struct Daemons {
    pub(crate) a: Daemon,
    pub(crate) b: Daemon,
    scratch: Scratch,
}

/// One dockerd with a containerd of its own.
#[derive(Debug)]
pub(crate) struct Daemon {
    root: PathBuf,
}

impl Daemons {
    /// Starts both, and waits until they answer.
    pub(crate) fn start(network: &Network) -> Result<Self> {
        let scratch = Scratch::new("docker")?;
        let daemons = Self {
            a: Daemon::new(&network.hosts.a, scratch.directory("a")?)?,
            b: Daemon::new(&network.hosts.b, scratch.directory("b")?)?,
            scratch,
        };
        for (daemon, host) in daemons.both(network) {
            daemon.start(host)?;
        }
        for (daemon, host) in daemons.both(network) {
            daemon.await_answer(host)?;
        }
        Ok(daemons)
    }

    fn both<'a>(&'a self, network: &'a Network) -> [(&'a Daemon, &'a Host); 2] {
        [(&self.a, &network.hosts.a), (&self.b, &network.hosts.b)]
    }

    /// Gives both an image `name` with `program`, its libraries, and these files at its root.
    pub(crate) fn import(
        &self,
        network: &Network,
        name: &str,
        program: &Path,
        files: &[(&str, &str)],
    ) -> Result<()> {
        let tree = self.scratch.directory(&format!("image-{name}"))?;
        lay_out(&tree, program, files)?;
        for (daemon, host) in self.both(network) {
            daemon.import(host, name, &tree)?;
        }
        Ok(())
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        let mut left = BTreeSet::new();
        for daemon in [&self.a, &self.b] {
            left.extend(daemon.container_ids());
        }
        // Their processes end with the host, which may take a moment.
        for _ in 0..20 {
            left.retain(|id| !remove_cgroups(id));
            if left.is_empty() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Daemon {
    /// Gives the host what is its own on a machine of its own, and is one file system here.
    fn new(host: &Host, root: PathBuf) -> Result<Self> {
        let script = r#"set -e
            mkdir "$0/etc" "$0/etc-work" "$0/tmp"
            mount -t overlay -o "lowerdir=/etc,upperdir=$0/etc,workdir=$0/etc-work" etc /etc
            mount -t tmpfs -o mode=755 run /run
            mkdir -p /etc/criu
            mount -t tmpfs -o mode=755 criu /etc/criu"#;
        run::quiet(host.command("sh").args(["-c", script]).arg(&root))?;
        Ok(Self { root })
    }

    /// Starts it; a second time after it was killed.
    pub(crate) fn start(&self, host: &Host) -> Result<()> {
        let script = r#"TMPDIR=$0/tmp; export TMPDIR
            rm -f "$0/pid" "$0/socket"
            exec setsid --fork /usr/sbin/dockerd --experimental --data-root "$0/data" --exec-root "$0/run" \
                --pidfile "$0/pid" -H "unix://$0/socket" --bridge=none --iptables=false -s overlay2 \
                </dev/null >>"$0/log" 2>&1"#;
        let mut command = host.command("env");
        command.args([PATH, "sh", "-c", script]).arg(&self.root);
        run::quiet(&mut command).map(drop)
    }

    pub(crate) fn await_answer(&self, host: &Host) -> Result<()> {
        run::wait_for("dockerd to answer", STARTED_WITHIN, || {
            self.docker(host, &["version"]).ok()
        })
        .map(drop)
        .with_context(|| format!("dockerd said:\n{}", self.said()))
    }

    /// The last lines of its log.
    pub(crate) fn said(&self) -> String {
        run::last_lines(
            &fs::read_to_string(self.root.join("log")).unwrap_or_default(),
            12,
        )
    }

    /// Its process, as its host numbers it.
    pub(crate) fn pid(&self) -> Result<u32> {
        Ok(fs::read_to_string(self.root.join("pid"))?.trim().parse()?)
    }

    /// Where it looks for checkpoints of container `id`.
    pub(crate) fn checkpoints(&self, id: &str) -> PathBuf {
        self.root
            .join("data/containers")
            .join(id)
            .join("checkpoints")
    }

    fn address(&self) -> String {
        format!("DOCKER_HOST=unix://{}/socket", self.root.display())
    }

    /// Runs `docker` on its host.
    pub(crate) fn docker(&self, host: &Host, words: &[&str]) -> Result<String> {
        let mut command = host.command("env");
        command.args([PATH, &self.address(), DOCKER]).args(words);
        Ok(run::quiet(&mut command)?.trim().to_owned())
    }

    /// Starts a container with the host's network; `words` are what it runs. Gives its pid on the host.
    pub(crate) fn run(
        &self,
        host: &Host,
        name: &str,
        options: &[&str],
        image: &str,
        words: &[&str],
    ) -> Result<u32> {
        let mut all = vec!["run", "-d", "--network", "host", "--name", name];
        all.extend(options);
        all.push(image);
        all.extend(words);
        self.docker(host, &all)?;
        self.pid_of(host, name)
    }

    /// What `docker inspect` says of a container, by a template.
    pub(crate) fn inspect(&self, host: &Host, name: &str, template: &str) -> Result<String> {
        self.docker(host, &["container", "inspect", "-f", template, name])
    }

    pub(crate) fn pid_of(&self, host: &Host, name: &str) -> Result<u32> {
        Ok(self.inspect(host, name, "{{.State.Pid}}")?.parse()?)
    }

    /// Names of containers that run, as the daemon has it.
    pub(crate) fn running(&self, host: &Host) -> Result<Vec<String>> {
        let list = self.docker(host, &["ps", "--format", "{{.Names}}"])?;
        Ok(list.lines().map(str::to_owned).collect())
    }

    /// `crxfer-docker` on its host.
    pub(crate) fn script(&self, host: &Host, crxfer: &Crxfer) -> Command {
        let mut command = host.command("env");
        let program = format!("CRXFER_PROGRAM={}", crxfer.program().display());
        let variables = crxfer.environment().iter();
        command.args([PATH, &self.address(), &program]);
        command.args(variables.map(|(name, value)| format!("{name}={value}")));
        command.arg(script());
        command
    }

    /// What `crxfer recv` must be told so that it restores containers here.
    pub(crate) fn restore_options(&self) -> [String; 4] {
        let command = format!("docker={PATH} {} {}", self.address(), script().display());
        [
            "--restore-with".to_owned(),
            format!("{command} restore"),
            "--remove-with".to_owned(),
            format!("{command} remove"),
        ]
    }

    /// The move of container `name` away from here; to be started.
    pub(crate) fn migration(
        &self,
        host: &Host,
        crxfer: &Crxfer,
        name: &str,
        to: &Receiver,
    ) -> Migration {
        let mut command = self.script(host, crxfer);
        command.args(["migrate", name]);
        Migration::by(command, to)
    }

    fn import(&self, host: &Host, name: &str, tree: &Path) -> Result<()> {
        let script = r#"tar -C "$0" -c . | "$1" import - "$2""#;
        let mut command = host.command("env");
        command.args([PATH, &self.address(), "sh", "-c", script]);
        run::quiet(command.arg(tree).args([DOCKER, name])).map(drop)
    }

    /// Whether it knows any container.
    pub(crate) fn has_containers(&self) -> bool {
        !self.container_ids().is_empty()
    }

    fn container_ids(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.join("data/containers"));
        let entries = entries.into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }
}

/// The script under test.
fn script() -> PathBuf {
    run::workspace().join("contrib/docker/crxfer-docker")
}

/// A file system of `program`, its libraries, and files.
fn lay_out(tree: &Path, program: &Path, files: &[(&str, &str)]) -> Result<()> {
    let libraries = run::quiet(Command::new("ldd").arg(program))?;
    let paths = libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    for path in paths.map(Path::new).chain([program]) {
        let copy = tree.join(path.strip_prefix("/")?);
        fs::create_dir_all(copy.parent().context("a file has a directory")?)?;
        fs::copy(path, copy)?;
    }
    fs::create_dir_all(tree.join("etc"))?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
    for (name, text) in files {
        fs::write(tree.join(name), text)?;
    }
    Ok(())
}

/// Removes the cgroups that a container's runtime left behind; says whether none is left.
fn remove_cgroups(id: &str) -> bool {
    let hierarchies = fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten();
    let places = hierarchies.map(|entry| entry.path().join("docker").join(id));
    let mut roots: Vec<PathBuf> = places.collect();
    roots.push(Path::new("/sys/fs/cgroup/docker").join(id));
    roots.iter().all(|root| remove_cgroup(root))
}

fn remove_cgroup(group: &Path) -> bool {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.path().is_dir()) {
        remove_cgroup(&entry.path());
    }
    fs::remove_dir(group).is_ok() || !group.exists()
}
