//! A network namespace with a memcached in it, for tests.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{Tree, network, within};

/// Whether `program` can be run here.
fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(program).is_file());
    if !found {
        println!("skipped: there is no {program} on the PATH");
    }
    found
}

fn start(arguments: &[&str]) -> Child {
    Command::new(arguments[0])
        .args(&arguments[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{} starts: {error}", arguments[0]))
}

/// A network namespace whose loopback is up.
pub(super) struct Network(Child);

impl Network {
    /// `None` where that cannot be, or where a program that the tests need is missing.
    pub(super) fn new() -> Option<Self> {
        if !["memcached", "nft", "unshare", "ip"].into_iter().all(has) {
            return None;
        }
        let new = Self(start(&["unshare", "-n", "sleep", "1000"]));
        let pid = new.0.id();
        let apart = within(Duration::from_secs(5), || {
            network::name_of(pid) != network::own_name()
        });
        assert!(apart, "unshare makes a network namespace");
        let up = ["ip", "link", "set", "lo", "up"];
        assert!(new.inside(|| start(&up).wait().expect("ip ends").success()));
        Some(new)
    }

    pub(super) fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        network::inside(self.0.id(), run).expect("the namespace can be entered")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A memcached in the network namespace of the thread that starts it.
pub(super) struct Memcached {
    child: Child,
    port: u16,
}

impl Memcached {
    pub(super) fn start(port: u16) -> Self {
        let number = port.to_string();
        let command = [
            "setsid",
            "memcached",
            "-u",
            "root",
            "-l",
            "127.0.0.1",
            "-t",
            "2",
            "-p",
        ];
        let child = start(&[command.as_slice(), &[&number]].concat());
        Self { child, port }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn tree(&self) -> Tree {
        let tasks = crate::live::tree(self.pid()).expect("it runs");
        Tree::of(tasks.iter().map(|task| task.pid))
    }

    pub(super) fn connect(&self) -> Client {
        let mut stream = None;
        let connected = within(Duration::from_secs(5), || {
            stream = TcpStream::connect(("127.0.0.1", self.port)).ok();
            stream.is_some()
        });
        assert!(connected, "memcached listens");
        Client(stream.expect("it is connected"), 0)
    }

    /// Whether a new connection finds the value of the exchange with this number.
    pub(super) fn finds_value_of(&self, number: u64, limit: Duration) -> bool {
        let value = format!("{number:020}");
        let expected = format!("VALUE key 0 {}\r\n{value}\r\nEND\r\n", value.len());
        let stream = TcpStream::connect(("127.0.0.1", self.port));
        stream.is_ok_and(|stream| Client(stream, 0).exchange("get key\r\n", &expected, limit))
    }

    /// The signal by which it has ended.
    pub(super) fn ended_by(&mut self) -> Option<i32> {
        let mut status = None;
        within(Duration::from_secs(1), || {
            status = self.child.try_wait().expect("our child");
            status.is_some()
        });
        status.and_then(|status| status.signal())
    }

    /// Waits for the end of the original.
    pub(super) fn reap(&mut self) {
        self.child.wait().expect("our child can be reaped");
    }
}

impl Drop for Memcached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to it.
pub(super) struct Client(TcpStream, u64);

impl Client {
    /// Writes a value that was never there, and reads it again; false where no answer comes for
    /// `limit`.
    pub(super) fn is_served(&mut self, limit: Duration) -> bool {
        self.1 += 1;
        let value = format!("{:020}", self.1);
        let set = format!("set key 0 0 {}\r\n{value}\r\nget key\r\n", value.len());
        let expected = format!(
            "STORED\r\nVALUE key 0 {}\r\n{value}\r\nEND\r\n",
            value.len()
        );
        self.exchange(&set, &expected, limit)
    }

    /// Waits for the rest of the answer to an exchange that was in vain.
    pub(super) fn is_served_late(&mut self, limit: Duration) -> bool {
        let value = format!("{:020}", self.1);
        let expected = format!(
            "STORED\r\nVALUE key 0 {}\r\n{value}\r\nEND\r\n",
            value.len()
        );
        self.exchange("", &expected, limit)
    }

    fn exchange(&mut self, ask: &str, expected: &str, limit: Duration) -> bool {
        let stream = &mut self.0;
        stream.set_read_timeout(Some(limit)).expect("a time limit");
        let mut answer = vec![0; expected.len()];
        stream.write_all(ask.as_bytes()).is_ok()
            && stream.read_exact(&mut answer).is_ok()
            && answer == expected.as_bytes()
    }
}
