//! CRIU's log after a failure: its error lines, within bounds.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags};

/// How much of a log is searched, in bytes. At log level 2 a log has a few KiB; at 4 one of a large
/// tree has hundreds of MiB, but a failure's first error comes early or with the last lines.
const MOST_BYTES: u64 = 16 << 20;

/// How many error lines are kept: the first names the cause, a few more what followed from it.
const MOST_LINES: usize = 12;

/// Longest line that is kept, in bytes.
const MOST_LINE_BYTES: usize = 400;

/// Where the log `name` in the directory `work` is, for messages.
pub(super) fn path(work: BorrowedFd<'_>, name: &str) -> PathBuf {
    let link = format!("/proc/self/fd/{}", work.as_raw_fd());
    std::fs::read_link(link).unwrap_or_default().join(name)
}

/// Removes the log of an earlier attempt: if CRIU fails before it opens its own, that one must not
/// be taken for it.
pub(super) fn remove_old(work: BorrowedFd<'_>, name: &str) {
    let _ = rustix::fs::unlinkat(work, name, AtFlags::empty());
}

/// The first error lines of the log `name` in `work`; none if there is no such file.
pub(super) fn error_lines(work: BorrowedFd<'_>, name: &str) -> Vec<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    match rustix::fs::openat(work.as_fd(), name, flags, Mode::empty()) {
        Ok(file) => error_lines_of(File::from(file)),
        Err(_) => Vec::new(),
    }
}

fn error_lines_of(log: impl Read) -> Vec<String> {
    let mut log = BufReader::new(log.take(MOST_BYTES));
    let (mut lines, mut line) = (Vec::new(), Vec::new());
    while lines.len() < MOST_LINES {
        line.clear();
        match log.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => lines.extend(error_line(&line)),
        }
    }
    lines
}

/// `(00.012345) Error (criu/file.c:12): what`, if `line` is one of these.
fn error_line(line: &[u8]) -> Option<String> {
    let line = line.get(..line.len().min(MOST_LINE_BYTES))?;
    let text = String::from_utf8_lossy(line);
    (text.contains("Error (") && !is_harmless(&text)).then(|| printable(&text))
}

/// Whether `message` is one that CRIU reports as an error and goes on, also where all is well: hosts
/// whose limit of open files is lower than CRIU would like.
fn is_harmless(message: &str) -> bool {
    message.contains("Can't setup RLIMIT_NOFILE for self")
}

/// CRIU's own message of its answer, if it says anything.
pub(super) fn message(answer: Option<&String>) -> Option<String> {
    let message = answer.filter(|message| !is_harmless(message));
    message
        .map(|message| printable(message))
        .filter(|message| !message.is_empty())
}

/// `text` on one line, without what would confuse a terminal: names of files are in it.
pub(super) fn printable(text: &str) -> String {
    text.trim()
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_error_lines_are_kept_and_few_of_them() {
        let harmless = "Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: no";
        assert_eq!(error_lines_of(harmless.as_bytes()), Vec::<String>::new());
        let mut log = b"(00.1) fine\n(00.2) Error (criu/tty.c:1): Can't \x1b[1m \xff\n".to_vec();
        for _ in 0..100 {
            log.extend_from_slice(b"(00.3)     17: Error (criu/x.c:2): more\n");
        }
        let lines = error_lines_of(log.as_slice());
        assert_eq!(lines.len(), MOST_LINES);
        assert!(lines[0].contains("Can't \u{fffd}[1m"), "{}", lines[0]);
    }

    #[test]
    fn an_endless_line_is_cut() {
        let mut log = b"Error (".to_vec();
        log.resize(1 << 20, b'x');
        assert!(error_lines_of(log.as_slice())[0].len() <= MOST_LINE_BYTES);
    }
}
