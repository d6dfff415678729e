//! The reader against the dump that CRIU makes of the same, idle, processes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crxfer::image::{Chain, ImageError, PagemapName, PagesReader};
use crxfer::live::{LiveReader, Method, Pass};
use crxfer::page::PageSize;

use crate::support::{Pages, Workload, is_root, pass, reader};

fn has_criu() -> bool {
    let there = is_root()
        && Command::new("criu")
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success());
    if !there {
        eprintln!("skipped: needs root and criu");
    }
    there
}

fn dump(workload: &Workload, options: &[&str]) -> Pages {
    let dir = workload.dir.path().join("dump");
    fs::create_dir(&dir).unwrap();
    let dumped = Command::new("criu")
        .args(["dump", "-t", &workload.pid().to_string(), "-D"])
        .arg(&dir)
        .args(["-o", "dump.log", "-v2", "--leave-running", "--shell-job"])
        .args(["--network-lock", "skip"])
        .args(options)
        .output()
        .unwrap();
    let log = || fs::read_to_string(dir.join("dump.log")).unwrap_or_default();
    assert!(dumped.status.success(), "{}", log());
    pages_of(&dir)
}

fn pages_of(dir: &Path) -> Pages {
    let page = PageSize::of_host();
    let chain = Chain::open(dir, Some(page)).unwrap();
    let names: Vec<_> = chain.newest().pagemaps().keys().copied().collect();
    let mut reader = PagesReader::new(&chain);
    let mut pages = Pages::new();
    for name in names {
        for run in chain.resolve(name).unwrap() {
            reader
                .for_each_piece(name, &run, |address, bytes| {
                    for (index, bytes) in bytes.chunks(page.byte_len()).enumerate() {
                        let address = address + index as u64 * page.bytes();
                        pages.insert((name, address), bytes.to_vec());
                    }
                    Ok::<(), ImageError>(())
                })
                .unwrap();
        }
    }
    pages
}

/// What a dump and a pass over the same tree have of each other.
#[derive(Debug, Default)]
struct Comparison {
    equal: usize,
    /// Both have them, with different bytes.
    changed: BTreeMap<PagemapName, Vec<u64>>,
    /// Only the dump has them.
    missed: BTreeMap<PagemapName, Vec<u64>>,
    /// Only the pass has them.
    too_many: BTreeMap<PagemapName, Vec<u64>>,
}

fn compare(dumped: &Pages, delivered: &Pages) -> Comparison {
    let mut found = Comparison::default();
    for (key @ (name, address), bytes) in dumped {
        let list = match delivered.get(key) {
            Some(same) if same == bytes => {
                found.equal += 1;
                continue;
            }
            Some(_) => &mut found.changed,
            None => &mut found.missed,
        };
        list.entry(*name).or_default().push(*address);
    }
    for (name, address) in delivered.keys() {
        if !dumped.contains_key(&(*name, *address)) {
            found.too_many.entry(*name).or_default().push(*address);
        }
    }
    found
}

/// Holds two passes by each method against a dump. `restless`: most pages that may have changed
/// in between.
fn check(what: &str, workload: &Workload, options: &[&str], restless: usize) {
    let mut by_scan = reader(workload.pid(), None);
    let mut by_pagemap = reader(workload.pid(), Some(Method::Pagemap));
    let (last, scanned) = settled(&mut by_scan, restless);
    let (_, plain) = pass(&mut by_pagemap);
    let expected: BTreeMap<_, _> = last
        .tasks
        .iter()
        .map(|task| (PagemapName::Task(task.vpid.into()), Left::of(task.pid)))
        .collect();
    let dumped = dump(workload, options);
    for (method, delivered) in [("scan", scanned), ("pagemap", plain)] {
        let mut found = compare(&dumped, &delivered);
        for (name, addresses) in &mut found.missed {
            let left = expected.get(name).cloned().unwrap_or_default();
            addresses.retain(|at| !left.vdso.contains(at));
            if let [one] = addresses[..]
                && left.text.iter().any(|range| range.contains(&one))
            {
                addresses.clear();
            }
        }
        found.missed.retain(|_, addresses| !addresses.is_empty());
        let changed: usize = found.changed.values().map(Vec::len).sum();
        eprintln!(
            "{what} by {method}: {} of {} pages equal, {found:x?}",
            found.equal,
            dumped.len()
        );
        assert!(found.missed.is_empty() && found.too_many.is_empty());
        // The kernel writes the CPU that a thread runs on (rseq) when CRIU makes it run.
        let threads: usize = last.tasks.iter().map(|task| task.threads.len()).sum();
        assert!(changed <= restless + threads, "{changed} pages changed");
    }
}

/// Passes until the workload has come to rest: it was only just set up.
fn settled(reader: &mut LiveReader, restless: usize) -> (Pass, Pages) {
    let mut before = Pages::new();
    for _ in 0..100 {
        let (last, pages) = pass(reader);
        let changed = pages
            .iter()
            .filter(|(key, bytes)| before.get(key) != Some(bytes));
        if changed.count() <= restless && before.len() == pages.len() {
            return (last, pages);
        }
        before = pages;
        thread::sleep(Duration::from_millis(200));
    }
    panic!("the workload never rests");
}

/// Where a dump of a task holds pages that a pass leaves to it.
#[derive(Clone, Debug, Default)]
struct Left {
    vdso: Range<u64>,
    /// CRIU overwrites one page of the program's text for a moment, to make the task run its
    /// code; that page is private from then on.
    text: Vec<Range<u64>>,
}

impl Left {
    fn of(pid: u32) -> Self {
        let mut left = Self::default();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        for line in maps.lines().filter(|line| line.contains("xp ")) {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            let range = number(start)..number(end);
            match line.ends_with("[vdso]") {
                true => left.vdso = range,
                false => left.text.push(range),
            }
        }
        left
    }
}

#[test]
fn every_kind_of_memory_is_what_criu_dumps() {
    if !has_criu() {
        return;
    }
    for scenario in ["kinds", "huge"] {
        if let Some(workload) = Workload::start(scenario) {
            check(scenario, &workload, &[], 0);
        }
    }
}

#[test]
fn a_memcached_is_what_criu_dumps() {
    if !has_criu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let arguments = ["-u", "root", "-m", "256", "-s", socket.to_str().unwrap()];
    let Some(workload) = Workload::program("memcached", &arguments) else {
        eprintln!("skipped: there is no memcached");
        return;
    };
    let mut stream = connected(&socket);
    for key in 0..500 {
        let value = vec![u8::try_from(key % 251).unwrap(); 100_000];
        write!(stream, "set k{key} 0 0 {}\r\n", value.len()).unwrap();
        stream.write_all(&value).unwrap();
        stream.write_all(b"\r\n").unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"STORED\r\n");
    }
    drop(stream);
    // Its clock ticks.
    check("memcached", &workload, &[], 16);
}

#[test]
fn a_redis_is_what_criu_dumps() {
    if !has_criu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let path = socket.to_str().unwrap();
    let arguments = ["--port", "0", "--save", "", "--unixsocket", path];
    let Some(workload) = Workload::program("redis-server", &arguments) else {
        eprintln!("skipped: there is no redis-server");
        return;
    };
    let mut stream = connected(&socket);
    for key in 0..2000 {
        let value = "v".repeat(10_000 + key);
        write!(stream, "SET k{key} {value}\r\n").unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+OK\r\n");
    }
    drop(stream);
    // Its clock and statistics, ten times a second.
    check("redis", &workload, &[], 100);
}

#[test]
fn an_nginx_with_its_workers_is_what_criu_dumps() {
    if !has_criu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let configuration = dir.path().join("nginx.conf");
    let text = format!(
        "user root; daemon off; worker_processes 3; pid {dir}/pid; error_log /dev/null;
         events {{}} http {{ access_log off; limit_req_zone $uri zone=z:10m rate=9r/s;
         client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
         uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
         server {{ listen unix:{dir}/socket; location / {{ limit_req zone=z; return 200; }} }} }}",
        dir = dir.path().display()
    );
    fs::write(&configuration, text).unwrap();
    let arguments = ["-e", "/dev/null", "-c", configuration.to_str().unwrap()];
    let Some(workload) = Workload::program("nginx", &arguments) else {
        eprintln!("skipped: there is no nginx");
        return;
    };
    let mut stream = connected(&socket);
    let request = "GET / HTTP/1.0\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    check("nginx", &workload, &[], 0);
}

/// A connection to a server that may still be starting.
fn connected(socket: &Path) -> UnixStream {
    for _ in 0..500 {
        if let Ok(stream) = UnixStream::connect(socket) {
            return stream;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("no answer at {}", socket.display());
}
