//! A place of its own for each test, and the commands running there.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

/// A directory with the state that the command would keep in a home directory.
pub(crate) struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command, not yet started.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crxfer"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("HOME", self.dir.path())
            .env("XDG_STATE_HOME", self.path("state"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        Ended::of(&self.command(args).output().unwrap())
    }

    /// Starts `recv --json` on loopback, and waits until it listens.
    pub(crate) fn recv(&self, args: &[&str]) -> Receiving {
        let mut all = vec!["recv", "--json"];
        if !args.contains(&"--dir") {
            all.extend(["--dir", "recv"]);
        }
        if !args.contains(&"--listen") {
            all.extend(["--listen", "127.0.0.1:0"]);
        }
        all.extend(args);
        Receiving(Running::start(self.command(&all)))
    }

    /// Sends with `--json`, and waits for the end.
    pub(crate) fn send(&self, dir: &Path, ticket: &str, args: &[&str]) -> Ended {
        let dir = dir.to_str().unwrap();
        let mut all = vec!["send", dir, "--to", ticket, "--json"];
        all.extend(args);
        self.run(&all)
    }

    /// A copy of a chain of the fixtures, to be damaged.
    pub(crate) fn copy_chain(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        copy_tree(&fixture(name), &to);
        to
    }

    /// A set without a parent, with `len` bytes that do not compress besides.
    pub(crate) fn large_set(&self, len: usize) -> PathBuf {
        let to = self.path("large");
        copy_tree(&fixture("memcached/1"), &to);
        fs::write(to.join("tmpfs-dev-1.tar.gz.img"), noise(len)).unwrap();
        to
    }
}

/// Image directories as CRIU wrote them.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../lib/testdata")
        .join(name)
}

/// Names of all files, `parent` left out.
pub(crate) fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<_> = names
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name != "parent")
        .collect();
    names.sort();
    names
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        let kind = entry.file_type().unwrap();
        if kind.is_symlink() {
            symlink(fs::read_link(entry.path()).unwrap(), target).unwrap();
        } else if kind.is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// xorshift64: the same bytes in every run, and none of them twice in sight.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(len.div_ceil(8)).flatten().take(len).collect()
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The JSON objects on stdout.
    pub(crate) fn events(&self) -> Vec<Value> {
        let lines = self.stdout.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
            .collect()
    }

    /// The last JSON object, of a command that succeeded.
    #[track_caller]
    pub(crate) fn done(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.events().pop().expect("a line of JSON")
    }

    /// Checks the exit code and that the message has all of `words`, one line and no debug output.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word} is not in {self:?}");
        }
        for debug in ["Error {", "Os {", "panicked"] {
            assert!(!self.stderr.contains(debug), "{self:?}");
        }
    }
}

/// A command that runs; killed when dropped.
pub(crate) struct Running {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The next JSON object on stdout.
    #[track_caller]
    pub(crate) fn next_event(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| {
            let _ = self.child.kill();
            let mut stderr = String::new();
            let _ = self
                .child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut stderr);
            panic!("no JSON: {line:?}, stderr: {stderr}")
        })
    }

    /// Reads progress until so many bytes have crossed the wire.
    #[track_caller]
    pub(crate) fn wait_for_wire_bytes(&mut self, bytes: u64) {
        loop {
            let event = self.next_event();
            assert_ne!(event["event"], "done", "it was too fast");
            if event["wire"].as_u64().is_some_and(|wire| wire >= bytes) {
                return;
            }
        }
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn ended(mut self) -> Ended {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.lines.read_to_string(&mut stdout).unwrap();
        let mut pipe = self.child.stderr.take().unwrap();
        pipe.read_to_string(&mut stderr).unwrap();
        Ended {
            code: self.child.wait().unwrap().code(),
            stdout,
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A `recv` that may not be listening yet.
pub(crate) struct Receiving(Running);

impl Receiving {
    /// Waits until it listens; what it said then.
    #[track_caller]
    pub(crate) fn listening(mut self) -> (Running, Value) {
        let event = self.0.next_event();
        assert_eq!(event["event"], "listening");
        (self.0, event)
    }

    /// Waits until it listens; its ticket.
    #[track_caller]
    pub(crate) fn ticket(self) -> (Running, String) {
        let (running, event) = self.listening();
        (running, event["ticket"].as_str().unwrap().to_owned())
    }

    pub(crate) fn ended(self) -> Ended {
        self.0.ended()
    }
}

/// Waits for something that happens soon after a command has ended.
#[track_caller]
pub(crate) fn eventually(mut is_so: impl FnMut() -> bool) {
    for _ in 0..200 {
        if is_so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    panic!("it did not happen within 5 s");
}

/// What lies in a receiving directory, the store's own files left out.
pub(crate) fn published(dir: &Path) -> Vec<String> {
    let is_own = |name: &String| Path::new(name) == OsStr::new(".crxfer");
    files(dir)
        .into_iter()
        .filter(|name| !is_own(name))
        .collect()
}
