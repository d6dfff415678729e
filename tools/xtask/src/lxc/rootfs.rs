//! The files of the containers, taken from this machine.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::client::Question;
use crate::run;

/// Where the video is served.
pub(crate) const PORT: u16 = 8088;
/// What its clients load.
pub(crate) const VIDEO: &str = "/video";
/// What is answered at once.
pub(crate) const QUESTION: Question = Question::Tcp {
    port: PORT,
    text: "GET /here HTTP/1.0\r\n\r\n",
    answer: "here",
};
/// 1,560 kb/s, in bytes.
const VIDEO_RATE: usize = 195_000;

const TICKER: &str = include_str!("ticker.c");

/// A first process that reaps, as every container's should.
const INIT: &str = "#!/bin/sh
COMMAND &
while :; do wait; sleep 1; done
";

/// Without sendfile: the file is content of the worker's buffers, as with a server that changes it.
const NGINX: &str = "
daemon off; user root; worker_processes 1; pid /run/nginx.pid; error_log /dev/null;
events { worker_connections 64; }
http {
    access_log off; sendfile off; output_buffers 2 64k;
    client_body_temp_path /run/body; proxy_temp_path /run/proxy; fastcgi_temp_path /run/fastcgi;
    uwsgi_temp_path /run/uwsgi; scgi_temp_path /run/scgi;
    server {
        listen 0.0.0.0:PORT;
        location / { root /srv; limit_rate RATE; }
        location /here { return 200 here; }
    }
}
";

/// CRIU restores neither AppArmor's profile nor a terminal of the host.
const CONFIGURATION: &str = "lxc.uts.name = NAME
lxc.rootfs.path = dir:ROOT
lxc.init.cmd = /sbin/init
lxc.net.0.type = none
lxc.autodev = 1
lxc.mount.auto = proc:rw sys:ro
lxc.console.path = none
lxc.tty.max = 0
lxc.pty.max = 0
";

/// What a container is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Blank,
    Video,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Blank => "blank",
            Self::Video => "video",
        }
    }

    /// Fills `root`, with `scratch` for what is made on the way. Gives the digest of the video.
    pub(super) fn fill(
        self,
        root: &Path,
        scratch: &Path,
        bytes: usize,
    ) -> Result<Option<blake3::Hash>> {
        for name in ["bin", "sbin", "etc", "dev", "proc", "sys", "run", "srv"] {
            fs::create_dir_all(root.join(name))?;
        }
        install("busybox", root, "bin/busybox")?;
        for name in ["sh", "sleep"] {
            symlink("busybox", root.join("bin").join(name))?;
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
        fs::write(root.join("etc/group"), "root:x:0:\n")?;
        match self {
            Self::Blank => {
                compile_ticker(scratch, &root.join("bin/ticker"))?;
                init(root, "/bin/ticker /run/ticks")?;
                Ok(None)
            }
            Self::Video => {
                install("nginx", root, "sbin/nginx")?;
                let text = NGINX.replace("PORT", &PORT.to_string());
                let text = text.replace("RATE", &VIDEO_RATE.to_string());
                fs::write(root.join("etc/nginx.conf"), text)?;
                init(root, "/sbin/nginx -c /etc/nginx.conf")?;
                video(&root.join("srv/video"), bytes).map(Some)
            }
        }
    }
}

/// What LXC is told of container `name` with the files in `root`.
pub(super) fn configuration(name: &str, root: &Path) -> String {
    CONFIGURATION
        .replace("NAME", name)
        .replace("ROOT", &root.display().to_string())
}

fn init(root: &Path, command: &str) -> Result<()> {
    let file = root.join("sbin/init");
    fs::write(&file, INIT.replace("COMMAND", command))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Copies `program` of this machine to `root`/`place`, and the libraries that it is linked to.
fn install(program: &str, root: &Path, place: &str) -> Result<()> {
    let found = run::find_program(program).with_context(|| format!("no {program}"))?;
    fs::copy(&found, root.join(place))?;
    // Of a static program ldd says so, and fails.
    let libraries = run::quiet(Command::new("ldd").arg(&found)).unwrap_or_default();
    for library in libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let copy = root.join(&library[1..]);
        let directory = copy.parent().map(PathBuf::from).unwrap_or_default();
        fs::create_dir_all(directory)?;
        fs::copy(library, copy)?;
    }
    Ok(())
}

fn compile_ticker(scratch: &Path, program: &Path) -> Result<()> {
    let source = scratch.join("ticker.c");
    fs::write(&source, TICKER)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-O1", "-Wall", "-Werror", "-static", "-o"]);
    run::quiet(compiler.arg(program).arg(source)).map(drop)
}

/// A file of `bytes` that is as little compressible as a video.
fn video(file: &Path, bytes: usize) -> Result<blake3::Hash> {
    let mut content = vec![0; bytes];
    blake3::Hasher::new()
        .update(b"video")
        .finalize_xof()
        .fill(&mut content);
    fs::write(file, &content)?;
    Ok(blake3::hash(&content))
}
