//! Programs that go on where they were: dumped twice on A, sent, restored on B from every layout.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{Context, Report, Scope};
use crate::apt::{self, Needed};
use crate::checkpoint::{resolve, same_files};
use crate::criu::{self, Criu, End};
use crate::crxfer::{LAYOUTS, Place};
use crate::hosts::{Hosts, Rate};
use crate::run;
use crate::scratch::Scratch;
use crate::workload::{Memcached, Nginx, Redis, Tree, Values, Workload};

/// Where the pages of a dump go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// To the images directory, all of them in both dumps.
    Directory,
    /// To a `criu page-server`.
    PageServer,
    /// First in a pre-dump, then in a dump what was written since.
    PreDumped,
}

const PAGE_SERVER_PORT: u16 = 27_001;

pub(super) fn cases(context: &Context, report: &mut Report) {
    let Some(criu) = &context.criu else { return };
    let values = if context.scope == Scope::Quick {
        2_000
    } else {
        6_000
    };
    let memcached =
        |_: &Path| -> Box<dyn Workload> { Box::new(Memcached::new(Values::new(values, 8192), 50)) };
    let redis = |_: &Path| -> Box<dyn Workload> { Box::new(Redis::new(Values::new(values, 3000))) };
    let nginx = |place: &Path| -> Box<dyn Workload> { Box::new(Nginx::new(place.to_owned())) };
    let tree = |place: &Path| -> Box<dyn Workload> { Box::new(Tree::new(place.to_owned())) };
    let mut group = |criu: &Criu, name, needed: &[Needed], pages, make: Maker<'_>| {
        Group {
            name,
            needed,
            pages,
            make,
        }
        .run(context, criu, report);
    };
    let mc = &[apt::MEMCACHED];
    group(criu, "tree", &[], Pages::Directory, &tree);
    group(criu, "memcached", mc, Pages::Directory, &memcached);
    group(criu, "redis", &[apt::REDIS], Pages::Directory, &redis);
    group(criu, "nginx", &[apt::NGINX], Pages::Directory, &nginx);
    group(
        criu,
        "memcached-page-server",
        mc,
        Pages::PageServer,
        &memcached,
    );
    group(criu, "tree-page-server", &[], Pages::PageServer, &tree);
    if criu.tracks_writes() {
        group(
            criu,
            "memcached-pre-dumped",
            mc,
            Pages::PreDumped,
            &memcached,
        );
        group(criu, "tree-pre-dumped", &[], Pages::PreDumped, &tree);
    } else {
        println!(
            "  cases with pre-dumps: skipped, this kernel does not track writes (CONFIG_MEM_SOFT_DIRTY)"
        );
    }
    if context.scope == Scope::All {
        match run::target().and_then(|target| criu::ensure_older(&target)) {
            // It cannot dump TCP sockets on new kernels.
            Ok(older) => group(&older, "tree-criu-4.1", &[], Pages::Directory, &tree),
            Err(error) => println!("  cases with CRIU 4.1: skipped: {error:#}"),
        }
    }
}

/// Makes a workload that keeps its files in the given directory.
type Maker<'a> = &'a dyn Fn(&Path) -> Box<dyn Workload>;

/// The cases with one program: it is dumped once, and restored from each layout.
struct Group<'a> {
    name: &'static str,
    needed: &'a [Needed],
    pages: Pages,
    make: Maker<'a>,
}

/// A program that exists only in two dumps.
struct Dumped {
    hosts: Hosts,
    scratch: Scratch,
    workload: Box<dyn Workload>,
    pid: u32,
    dumps: [PathBuf; 2],
    /// What the first one is said to be.
    first_is: &'static str,
}

impl Group<'_> {
    fn run(&self, context: &Context, criu: &Criu, report: &mut Report) {
        let name = |layout: &str| format!("{} restores from {layout}", self.name);
        let flattened = format!("{} restores from a flattened set", self.name);
        let mut names: Vec<String> = LAYOUTS.iter().map(|layout| name(layout)).collect();
        names.push(flattened.clone());
        names.retain(|name| report.wants(name));
        if names.is_empty() {
            return;
        }
        let dumped = match self.prepare(criu) {
            Ok(dumped) => dumped,
            Err(error) => return report.failed(&names, &error),
        };
        for layout in LAYOUTS {
            report.case(&name(layout), || dumped.moves(context, criu, layout));
        }
        report.case(&flattened, || dumped.moves_flattened(context, criu));
    }

    fn prepare(&self, criu: &Criu) -> Result<Dumped> {
        apt::ensure(self.needed)?;
        let scratch = Scratch::new("restore")?;
        let hosts = Hosts::new(Rate::Unlimited)?;
        let mut workload = (self.make)(&scratch.directory("workload")?);
        let pid = workload.start(&hosts.a)?;
        let dumps = [
            scratch.path().join("source/1"),
            scratch.path().join("source/2"),
        ];
        match self.pages {
            Pages::PreDumped => criu.pre_dump(&hosts.a, pid, &dumps[0])?,
            _ => self.dump(criu, &hosts, pid, &dumps[0], End::LeaveRunning)?,
        }
        workload.write(&hosts.a)?;
        self.dump(criu, &hosts, pid, &dumps[1], End::Kill)?;
        Ok(Dumped {
            hosts,
            scratch,
            workload,
            pid,
            dumps,
            first_is: if self.pages == Pages::PreDumped {
                "pre-dump"
            } else {
                "complete"
            },
        })
    }

    fn dump(&self, criu: &Criu, hosts: &Hosts, pid: u32, directory: &Path, end: End) -> Result<()> {
        match self.pages {
            Pages::Directory => return criu.dump(&hosts.a, pid, directory, end, &[]),
            Pages::PreDumped => {
                let parent = ["--track-mem", "--prev-images-dir", "../1"];
                return criu.dump(&hosts.a, pid, directory, end, &parent);
            }
            Pages::PageServer => {}
        }
        let server = directory.with_extension("server");
        let page_server = criu.page_server(&hosts.b, &server, PAGE_SERVER_PORT)?;
        let (address, port) = (hosts.b.address.to_string(), PAGE_SERVER_PORT.to_string());
        criu.dump(
            &hosts.a,
            pid,
            directory,
            end,
            &["--page-server", "--address", &address, "--port", &port],
        )?;
        page_server.finish()?;
        // Restoring needs both parts in one directory; their names differ.
        for file in fs::read_dir(&server)? {
            let file = file?;
            if !directory.join(file.file_name()).exists() {
                fs::copy(file.path(), directory.join(file.file_name()))?;
            }
        }
        Ok(())
    }
}

impl Dumped {
    fn moves(&self, context: &Context, criu: &Criu, layout: &str) -> Result<String> {
        let received = self.scratch.path().join(layout);
        let receiver = context
            .crxfer
            .receive(Place::On(&self.hosts.b), &received, layout, &[])?;
        let mut wire = Vec::new();
        for (name, dump) in ["1", "2"].into_iter().zip(&self.dumps) {
            let sent = context
                .crxfer
                .send(Place::On(&self.hosts.a), dump, &receiver, name)
                .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
            let wanted = if name == "1" {
                self.first_is
            } else {
                "complete"
            };
            ensure!(
                sent.completeness == wanted,
                "{name} is said to be {}",
                sent.completeness
            );
            ensure!(
                sent.layout == layout,
                "{name} has the layout {}, not {layout}",
                sent.layout
            );
            self.compare(dump, &received.join(name), layout)
                .with_context(|| format!("received set {name}"))?;
            wire.push(sent.wire_bytes());
        }
        self.restore(criu, &received.join("2"), layout)?;
        Ok(format!(
            "{} KiB, then {} KiB on the wire",
            wire[0] >> 10,
            wire[1] >> 10
        ))
    }

    fn moves_flattened(&self, context: &Context, criu: &Criu) -> Result<String> {
        let received = self.scratch.path().join("incremental");
        let set = received.join("2");
        ensure!(set.exists(), "there is no incremental set, see above");
        let flat = self.scratch.path().join("flattened");
        let path = |path: &Path| path.to_str().map(str::to_owned).context("a strange name");
        context
            .crxfer
            .run(&["flatten", &path(&set)?, &path(&flat)?])?;
        ensure!(
            !flat.join("parent").exists(),
            "the flattened set has a parent"
        );
        self.compare(&self.dumps[1], &flat, "flat")?;
        context.crxfer.run(&["verify", &path(&set)?])?;
        self.restore(criu, &flat, "flattened")?;
        Ok(String::new())
    }

    fn compare(&self, dump: &Path, set: &Path, layout: &str) -> Result<()> {
        if layout == "faithful" {
            same_files(dump, set)?;
        }
        resolve(dump)?.ensure_same(&resolve(set)?)
    }

    fn restore(&self, criu: &Criu, set: &Path, layout: &str) -> Result<()> {
        let work = self.scratch.path().join(format!("restore-{layout}"));
        let before = listing(set)?;
        criu.restore(&self.hosts.b, set, &work)?;
        let compared = self
            .workload
            .check(&self.hosts.b)
            .context("after the restore");
        self.hosts.b.end(self.pid)?;
        ensure!(compared? > 0, "nothing was compared");
        ensure!(
            listing(set)? == before,
            "restoring changed the received set"
        );
        Ok(())
    }
}

/// Names, sizes and times of a set, as people see them.
fn listing(directory: &Path) -> Result<String> {
    run::quiet(
        Command::new("ls")
            .args(["-lA", "--full-time"])
            .arg(directory.join(".")),
    )
}
