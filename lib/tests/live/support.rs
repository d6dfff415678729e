//! Workloads, and what a pass over them delivered.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crxfer::image::PagemapName;
use crxfer::live::{LiveReader, Method, Pass, ReaderOptions};
use crxfer::page::PageSize;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Page contents by space and address.
pub(crate) type Pages = BTreeMap<(PagemapName, u64), Vec<u8>>;

/// A running program, killed when dropped.
pub(crate) struct Workload {
    child: Child,
    /// What it says it did.
    pub(crate) facts: Value,
    pub(crate) dir: TempDir,
}

impl Workload {
    /// Starts `workload.py`, or says why that cannot be.
    pub(crate) fn start(scenario: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let facts = dir.path().join("facts");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/live/workload.py");
        let errors = fs::File::create(dir.path().join("errors")).unwrap();
        let child = Command::new("python3")
            .arg(script)
            .arg(scenario)
            .arg(&facts)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn();
        let Ok(child) = child else {
            eprintln!("skipped: there is no python3 to run {scenario}");
            return None;
        };
        let mut started = Self {
            child,
            facts: Value::Null,
            dir,
        };
        if started.wait_for(&facts) {
            started.facts = serde_json::from_slice(&fs::read(&facts).unwrap()).unwrap();
            return Some(started);
        }
        let errors = fs::read_to_string(started.dir.path().join("errors")).unwrap();
        let last = errors.lines().last().unwrap_or("it said nothing");
        eprintln!("skipped: {scenario} cannot be set up here: {last}");
        None
    }

    /// Starts any program with nothing open but /dev/null.
    pub(crate) fn program(program: &str, arguments: &[&str]) -> Option<Self> {
        let child = Command::new("setsid")
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        Some(Self {
            child,
            facts: Value::Null,
            dir: tempfile::tempdir().unwrap(),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn task(&self) -> PagemapName {
        PagemapName::Task(self.pid().into())
    }

    pub(crate) fn number(&self, of: &str, what: &str) -> u64 {
        self.facts[of][what].as_u64().unwrap()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn wait_for(&mut self, facts: &Path) -> bool {
        for _ in 0..1000 {
            if facts.exists() {
                return true;
            }
            if !self.is_running() {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // Children first: their parent would leave them to init.
        if let Ok(tasks) = crxfer::live::tree(self.pid()) {
            for task in &tasks[1..] {
                kill(task.pid.into());
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the workload writes to page `index` of the memory it calls `name`.
pub(crate) fn content(name: &str, index: u64) -> Vec<u8> {
    let tag = format!("{name}:{index};");
    let length = PageSize::of_host().byte_len();
    format!("{tag:.<32}").repeat(length / 32).into_bytes()
}

pub(crate) fn reader(pid: u32, method: Option<Method>) -> LiveReader {
    let options = ReaderOptions {
        method,
        ..ReaderOptions::default()
    };
    LiveReader::new(pid, PageSize::of_host(), options).unwrap()
}

/// One pass, with the rules for chunks checked.
pub(crate) fn pass(reader: &mut LiveReader) -> (Pass, Pages) {
    let page = PageSize::of_host();
    let block = 256 * page.bytes();
    let mut pages = Pages::new();
    let mut order: Vec<PagemapName> = Vec::new();
    let mut last = 0;
    let pass = reader
        .pass(&mut |chunk| {
            let length = chunk.bytes.len() as u64;
            assert!(length > 0 && length.is_multiple_of(page.bytes()));
            assert_eq!(
                chunk.address / block,
                (chunk.address + length - 1) / block,
                "{chunk:?} crosses a block"
            );
            if order.last() != Some(&chunk.space) {
                assert!(!order.contains(&chunk.space), "{chunk:?} comes late");
                order.push(chunk.space);
                last = 0;
            }
            assert!(chunk.address >= last, "{chunk:?} goes back");
            last = chunk.address + length;
            for (index, bytes) in chunk.bytes.chunks(page.byte_len()).enumerate() {
                let address = chunk.address + index as u64 * page.bytes();
                pages.insert((chunk.space, address), bytes.to_vec());
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(pass.pages, pages.len() as u64);
    assert_eq!(pass.bytes, pass.pages * page.bytes());
    (pass, pages)
}

/// Kills a process, if it is still there.
pub(crate) fn kill(pid: u64) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
    let _ = kill_process(pid, Signal::KILL);
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
