//! Running other programs, with errors that show what the program said.

use std::ffi::OsStr;
use std::io::IsTerminal;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The root directory of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest
        .ancestors()
        .nth(2)
        .expect("xtask lies two levels below the workspace")
}

/// This program, to be started again. A build may have replaced its file since it was started: the
/// new one does as well, but the kernel then adds a remark to the name of the old.
pub(crate) fn own_program() -> Result<PathBuf> {
    let path = std::env::current_exe()?;
    let replaced = path
        .to_str()
        .and_then(|path| path.strip_suffix(" (deleted)"))
        .map(PathBuf::from);
    Ok(replaced.filter(|path| path.exists()).unwrap_or(path))
}

/// The directory of build results, wherever it is.
pub(crate) fn target() -> Result<PathBuf> {
    let own = own_program()?;
    // target/PROFILE/xtask
    let target = own
        .ancestors()
        .nth(2)
        .context("xtask runs outside of target/")?;
    Ok(target.to_owned())
}

/// Whether this process may do what root may.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The program `name` in PATH or in a directory for administrators, which PATH of an ordinary user lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    places
        .map(|place| place.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Runs `command` with its output shown, and fails unless it succeeds.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let line = line_of(command);
    let status = command
        .status()
        .with_context(|| format!("cannot start {line}"))?;
    if !status.success() {
        bail!("{line} failed: {status}");
    }
    Ok(())
}

/// Runs `command` and gives its standard output; what it said is in the error where it fails.
pub(crate) fn quiet(command: &mut Command) -> Result<String> {
    let line = line_of(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {line}"))?;
    if !output.status.success() {
        bail!("{line} failed: {}\n{}", output.status, said(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last lines that a program wrote.
pub(crate) fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]]
        .map(String::from_utf8_lossy)
        .join("");
    last_lines(&text, 20)
}

/// The last `count` lines of `text`.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Calls `ready` until it gives a value, for at most `limit`.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Option<T>,
) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        if begin.elapsed() > limit {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Says what is being done, with the time since the start, as work goes on.
#[derive(Debug)]
pub(crate) struct Narrator {
    begin: Instant,
    live: bool,
}

impl Narrator {
    pub(crate) fn new() -> Self {
        Self {
            begin: Instant::now(),
            live: std::io::stdout().is_terminal(),
        }
    }

    /// One line for a step that begins.
    pub(crate) fn step(&self, text: &str) {
        self.clear();
        println!("[{:5.1} s] {text}", self.begin.elapsed().as_secs_f64());
    }

    /// Progress inside the step: one line that is overwritten, on terminals only.
    pub(crate) fn progress(&self, text: &str) {
        if self.live {
            eprint!("\r\x1b[2K            {text}");
        }
    }

    fn clear(&self) {
        if self.live {
            eprint!("\r\x1b[2K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_program_is_quoted_in_the_error() {
        let error = quiet(Command::new("sh").args(["-c", "echo out; echo wrong >&2; exit 3"]));
        let text = format!("{:#}", error.expect_err("exit 3 is a failure"));
        assert!(
            text.contains("wrong") && text.contains("exit status: 3"),
            "{text}"
        );
    }

    #[test]
    fn last_lines_keeps_the_end() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
    }

    #[test]
    fn waiting_ends_at_the_limit() {
        let outcome = wait_for("nothing", Duration::from_millis(30), || None::<()>);
        assert!(outcome.is_err());
    }
}
