//! CRIU's own regression programs, which check themselves: whatever plain CRIU moves from A to B,
//! crxfer moves as well.
//!
//! Their sources belong to CRIU. CRXFER_ZDTM names a directory with built ones, `test/zdtm/static`.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, Report, Scope};
use crate::criu::{Criu, End};
use crate::crxfer::Place;
use crate::hosts::{Hosts, Rate};
use crate::run;
use crate::scratch::Scratch;

/// Named by nobody, they run only with everything else.
const PREFIX: &str = "zdtm ";

pub(super) fn cases(context: &Context, report: &mut Report) {
    let Some(criu) = &context.criu else { return };
    let named = report.filter.starts_with(PREFIX.trim_end());
    if context.scope != Scope::All && !named {
        return;
    }
    let Some(directory) = env::var_os("CRXFER_ZDTM").map(PathBuf::from) else {
        println!("  cases with CRIU's own programs: skipped, CRXFER_ZDTM names no directory");
        return;
    };
    let mut unmoved = Vec::new();
    for program in programs(&directory) {
        let name = format!("{PREFIX}{program}");
        if !report.wants(&name) {
            continue;
        }
        let file = directory.join(&program);
        match Program::moves(&file, |hosts, pid, memory| plain(criu, hosts, pid, memory)) {
            Ok(()) => report.case(&name, || {
                let by_crxfer =
                    |hosts: &Hosts, pid, memory: &Scratch| migrated(context, hosts, pid, memory);
                Program::moves(&file, by_crxfer).map(|()| String::new())
            }),
            Err(error) => unmoved.push(format!("{program} ({})", first_line(&error))),
        }
    }
    println!(
        "  left out, as plain CRIU does not move them here: {}\n    {}",
        unmoved.len(),
        unmoved.join("\n    ")
    );
}

fn first_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

/// Their FIFO is one with the source's, which still has the data in it: both hosts are one machine. Plain
/// CRIU ends the source first.
const SHARED_FIFO: [&str; 2] = ["fifo", "fifo_ro"];

/// The programs that need nothing special: no options of CRIU, no namespaces, no helper beside them.
fn programs(directory: &Path) -> Vec<String> {
    const SPECIAL: [&str; 6] = ["'opts'", "'dopts'", "'ropts'", "'deps'", "noauto", "crfail"];
    let is_program = |name: &String| {
        let file = directory.join(name);
        let description = fs::read_to_string(directory.join(format!("{name}.desc")));
        let description = description.unwrap_or_default();
        !name.contains('.')
            && !SHARED_FIFO.contains(&name.as_str())
            && directory.join(format!("{name}.c")).exists()
            && !directory.join(format!("{name}.hook")).exists()
            && !SPECIAL.iter().any(|word| description.contains(word))
            && (!description.contains("'flavor'") || description.contains("'h"))
            && file
                .metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(is_program)
        .collect();
    names.sort();
    names
}

/// A running program; its files are in a directory that both hosts see.
struct Program {
    pid: u32,
    outcome: PathBuf,
}

impl Program {
    /// Starts `file` on A, moves it by `mover`, has it check itself on B.
    fn moves(file: &Path, mover: impl FnOnce(&Hosts, u32, &Scratch) -> Result<()>) -> Result<()> {
        let hosts = Hosts::new(Rate::Unlimited)?;
        for host in [&hosts.a, &hosts.b] {
            // Of one machine: a terminal that stands frozen on A would keep its number from B.
            let script = "mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts
                mount --bind /dev/pts/ptmx /dev/ptmx";
            run::quiet(host.command("sh").args(["-e", "-c", script]))?;
        }
        let memory = Scratch::within(Path::new("/dev/shm"), "zdtm-move")?;
        let files = Scratch::new("zdtm")?;
        let program = Self::start(&hosts, file, files.path())?;
        mover(&hosts, program.pid, &memory)?;
        let on_a = hosts.a.session_of(program.pid);
        ensure!(on_a.is_empty(), "processes {on_a:?} are left on A");
        program.verdict(&hosts)
    }

    fn start(hosts: &Hosts, file: &Path, directory: &Path) -> Result<Self> {
        // Which of these a program wants, it does not say; one that it does not know is an error.
        let choices: [&[&str]; 4] = [
            &[],
            &["--filename=file.test"],
            &["--dirname=dir.test"],
            &["--filename=file.test", "--dirname=dir.test"],
        ];
        let name = file.file_name().context("a program without a name")?;
        for (number, choice) in choices.iter().enumerate() {
            let place = directory.join(number.to_string());
            fs::create_dir_all(&place)?;
            // Some write to files beside themselves.
            let copy = place.join(name);
            fs::copy(file, &copy)?;
            let (copy, inside) = (copy.display().to_string(), place.display().to_string());
            let script = r#"cd "$0" && exec "$@""#;
            let mut words = vec![
                "-c",
                script,
                &inside,
                &copy,
                "--pidfile=pid",
                "--outfile=out",
            ];
            words.extend_from_slice(choice);
            let parent = hosts.a.start_workload(Path::new("/bin/bash"), &words)?;
            let parent = hosts.a.file(Path::new(&format!("/proc/{parent}")));
            // It writes the pid of its child and ends; or it ends because it wants other words.
            run::wait_for("the program to start", Duration::from_secs(10), || {
                (!parent.exists()).then_some(())
            })?;
            let text = fs::read_to_string(place.join("pid")).unwrap_or_default();
            let pid = text.parse();
            if let Ok(pid) = pid {
                let outcome = place.join("out");
                return Ok(Self { pid, outcome });
            }
        }
        bail!("it does not start")
    }

    fn verdict(&self, hosts: &Hosts) -> Result<()> {
        hosts
            .b
            .signal(self.pid, "TERM")
            .context("it does not run on B")?;
        let text = run::wait_for("its verdict", Duration::from_secs(15), || {
            fs::read_to_string(&self.outcome).ok()
        })?;
        ensure!(
            text.contains("PASS") && !text.contains("FAIL"),
            "it found: {}",
            run::last_lines(&text, 5)
        );
        Ok(())
    }
}

fn plain(criu: &Criu, hosts: &Hosts, pid: u32, memory: &Scratch) -> Result<()> {
    let directory = memory.path().join("1");
    criu.dump(&hosts.a, pid, &directory, End::Kill, &[])?;
    criu.restore(&hosts.b, &directory, memory.path())
}

fn migrated(context: &Context, hosts: &Hosts, pid: u32, memory: &Scratch) -> Result<()> {
    let place = Place::On(&hosts.b);
    let received = memory.path().join("received");
    let receiver = context.crxfer.await_migration(place, &received, &[])?;
    let report = context
        .crxfer
        .migrate(&hosts.a, pid, &receiver, &[])?
        .start()?
        .wait()?
        .migrated()
        .with_context(|| format!("crxfer recv said:\n{}", receiver.said()))?;
    ensure!(
        report.outcome == "migrated",
        "the outcome is {}",
        report.outcome
    );
    Ok(())
}
