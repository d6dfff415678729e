//! A container of runc that holds one program of this machine.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::hosts::Host;
use crate::run;

/// What a program that is started as root may want.
const CAPABILITIES: [&str; 7] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_NET_BIND_SERVICE",
];

/// Where runc keeps its containers on one host, and where their bundles are.
#[derive(Clone, Debug)]
pub(crate) struct Runc {
    /// `runc --root`.
    pub(crate) root: PathBuf,
    /// A directory with a bundle for each container.
    pub(crate) bundles: PathBuf,
    /// Of its own, so that hosts that share their cgroups do not meet there.
    cgroup: String,
}

impl Runc {
    /// Below `directory`, for host `name`.
    pub(crate) fn new(directory: &Path, name: &str) -> Result<Self> {
        let runc = Self {
            root: directory.join(format!("runc-{name}")),
            bundles: directory.join(format!("bundles-{name}")),
            cgroup: format!("crxfer-{}-{name}", std::process::id()),
        };
        fs::create_dir_all(&runc.bundles)?;
        Ok(runc)
    }

    /// Makes the bundle of container `id`: a process, memory and mounts of its own, in its host's network.
    pub(crate) fn bundle(&self, id: &str, program: &Path, arguments: &[&str]) -> Result<PathBuf> {
        let bundle = self.bundles.join(id);
        let root = bundle.join("rootfs");
        for name in ["usr", "proc", "dev", "tmp", "etc", "run"] {
            fs::create_dir_all(root.join(name))?;
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), root.join(name))?;
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
        let mut words = vec![program.to_string_lossy().into_owned()];
        words.extend(arguments.iter().map(ToString::to_string));
        let cgroup = format!("/{}/{id}", self.cgroup);
        let config = configuration(&words, &cgroup);
        fs::write(bundle.join("config.json"), config.to_string())?;
        Ok(bundle)
    }

    /// Starts it detached. Gives the pid of its first process on `host`.
    pub(crate) fn start(&self, host: &Host, id: &str) -> Result<u32> {
        let file = self.bundles.join(format!("{id}.pid"));
        let log = self.bundles.join(format!("{id}.log"));
        let mut command = host.command("runc");
        // The container keeps runc's own output.
        command
            .arg("--root")
            .arg(&self.root)
            .arg("--log")
            .arg(&log)
            .args(["run", "--detach", "--pid-file"])
            .arg(&file)
            .arg("--bundle")
            .arg(self.bundles.join(id))
            .arg(id)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = command.status().context("cannot start runc")?;
        let said = fs::read_to_string(&log).unwrap_or_default();
        anyhow::ensure!(status.success(), "runc run: {status}: {said}");
        Ok(fs::read_to_string(&file)?.trim().parse()?)
    }

    /// Containers that it knows, with their states.
    pub(crate) fn list(&self, host: &Host) -> Result<Vec<(String, String)>> {
        let mut command = host.command("runc");
        command.arg("--root").arg(&self.root);
        let text = run::quiet(command.args(["list", "--format", "json"]))?;
        let list: Value = serde_json::from_str(&text)?;
        let word = |one: &Value, name: &str| one[name].as_str().unwrap_or_default().to_owned();
        let all = list.as_array().into_iter().flatten();
        Ok(all
            .map(|one| (word(one, "id"), word(one, "status")))
            .collect())
    }

    /// A command of runc's on `host`.
    pub(crate) fn run(&self, host: &Host, words: &[&str]) -> Result<()> {
        let mut command = host.command("runc");
        command.arg("--root").arg(&self.root).args(words);
        run::quiet(command.stdin(Stdio::null())).map(drop)
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        // Empty when the host has gone; runc leaves the parents of its cgroups.
        for controller in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let ours = controller.path().join(&self.cgroup);
            for below in fs::read_dir(&ours).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(below.path());
            }
            let _ = fs::remove_dir(ours);
        }
    }
}

fn configuration(words: &[String], cgroup: &str) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let spaces = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "hostname": "contained",
        "root": { "path": "rootfs", "readonly": false },
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": words,
            "env": ["PATH=/usr/sbin:/usr/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
        },
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777"]),
            { "destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"] },
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": spaces,
        },
    })
}
