//! What CRIU's action script says to the migration that waits for it.
//!
//! A line of text each way, over a UNIX socket: `STAGE CRIU ROOT IMAGES`, the pids as numbers, 0 where
//! they are not known, and the directory as CRIU has it open; then `go` or `no`. Whoever hears nothing
//! takes that for `no`: a migration that is gone decides nothing, and CRIU lets the tree run, or removes
//! the copy.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::scripts;
use crate::criu::Stage;
use crate::runtime::ActionProgram;
use crate::tree::Process;

/// Variable with the path of the socket.
pub const SOCKET: &str = "CRXFER_ACTION_SOCKET";

/// File in a directory of images that names the socket of their migration.
pub(in crate::transfer) const POINTER: &str = ".crxfer-action";

/// Name of the socket in its directory.
pub(in crate::transfer) const SOCKET_NAME: &str = "action.sock";

/// File beside the socket, written when CRIU begins to build a copy: CRIU's pid, and when it was
/// started.
const BEGUN: &str = "begun";

/// The same when CRIU has let it go: the pid of its root.
const RESUMED: &str = "resumed";

/// Where sockets of dumps are found by the root of the tree.
const BY_ROOT: &str = "/run/crxfer/actions";

/// Longest line that is taken.
const MOST_BYTES: u64 = 512;

/// How long the other end may take to say its line.
const LINE_TIME: Duration = Duration::from_secs(2);

/// Stages that a migration has to hear of. CRIU waits for a shell and a program at each of them.
const STAGES: [Stage; 5] = [
    Stage::PreDump,
    Stage::PostDump,
    Stage::PreRestore,
    Stage::PostRestore,
    Stage::PostResume,
];

/// Why an action script cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// It is not CRIU that called.
    #[error("{0} is not set: this command is for CRIU's action-script")]
    NotCriu(&'static str),
    /// The migration is not there any more.
    #[error("the migration that waits for this is gone ({}: {source})", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Reports the stage that CRIU is in, as its variables have it, and waits for the verdict: whether CRIU
/// may go on. A CRIU that is of no migration always may.
pub fn report(variable: impl Fn(&str) -> Option<OsString>) -> Result<bool, ActionError> {
    const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
    let stage = variable(ACTION).ok_or(ActionError::NotCriu(ACTION))?;
    let name = stage.to_string_lossy();
    let stage = Stage::named(&name);
    if !STAGES.contains(&stage) {
        return Ok(true);
    }
    let images = variable("CRTOOLS_IMAGE_DIR").map(PathBuf::from);
    let root = variable("CRTOOLS_INIT_PID");
    let root: u32 = root.and_then(|pid| pid.to_str()?.parse().ok()).unwrap_or(0);
    let socket = variable(SOCKET).map(PathBuf::from);
    let Some(socket) = socket.or_else(|| find(images.as_deref(), stage, root)) else {
        return Ok(true);
    };
    let criu = images.as_deref().and_then(criu_of).unwrap_or(0);
    note(&socket, stage, criu, root);
    let images = images.as_ref().map_or("".into(), |it| it.to_string_lossy());
    let answer = ask(&socket, &format!("{name} {criu} {root} {images}\n"));
    match answer {
        Ok(answer) => Ok(answer),
        // It was allowed to go on, whatever has become of who allowed it.
        Err(_) if stage == Stage::PostResume => Ok(true),
        Err(source) => Err(ActionError::Gone {
            path: socket,
            source,
        }),
    }
}

// It is read where nobody is left to be told.
fn note(socket: &Path, stage: Stage, criu: u32, root: u32) {
    let Some(place) = socket.parent() else { return };
    match stage {
        Stage::PreRestore => begin(place, Process::of(criu)),
        Stage::PostResume => {
            let _ = fs::write(place.join(RESUMED), root.to_string());
        }
        _ => {}
    }
}

/// Notes that a copy may have been begun from the images of `place`, by the process `criu` if that is
/// known.
pub(in crate::transfer) fn begin(place: &Path, criu: Option<Process>) {
    let text = criu.map_or_else(String::new, |criu| format!("{} {}", criu.pid, criu.started));
    let _ = fs::write(place.join(BEGUN), text);
}

fn ask(socket: &Path, line: &str) -> io::Result<bool> {
    let mut stream = beside(socket, |path| UnixStream::connect(path))?;
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(MOST_BYTES)).read_line(&mut answer)?;
    match answer.as_str() {
        "go\n" => Ok(true),
        "no\n" => Ok(false),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// CRIU's own process: its directory of images is named by its descriptor.
fn criu_of(images: &Path) -> Option<u32> {
    let below = images.to_str()?.strip_prefix("/proc/")?;
    below.split_once("/fd/")?.0.parse().ok()
}

// A runtime's daemon does not pass variables on.
fn find(images: Option<&Path>, stage: Stage, root: u32) -> Option<PathBuf> {
    let pointer = images.and_then(|images| pointed(&images.join(POINTER)));
    pointer.or_else(|| {
        let is_dump = matches!(stage, Stage::PreDump | Stage::PostDump);
        is_dump.then(|| pointed(&by_root(root)?)).flatten()
    })
}

// Only the word of this user counts.
fn pointed(path: &Path) -> Option<PathBuf> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
        .ok()?;
    if file.metadata().ok()?.uid() != rustix::process::geteuid().as_raw() {
        return None;
    }
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text).ok()?;
    let target = PathBuf::from(text.trim_end());
    target.is_absolute().then_some(target)
}

fn by_root(root: u32) -> Option<PathBuf> {
    // Hosts that share /run and not their pids.
    let space = fs::metadata("/proc/self/ns/pid").ok()?.ino();
    (root > 0).then(|| Path::new(BY_ROOT).join(format!("{space}-{root}")))
}

/// The dump of the tree below `root` finds the socket in `place` by that, until it is
/// [taken back](unregister).
pub(in crate::transfer) fn register(root: u32, place: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let path = by_root(root).ok_or(io::ErrorKind::NotFound)?;
    let mut private = fs::DirBuilder::new();
    private.mode(0o700).recursive(true).create(BY_ROOT)?;
    let draft = path.with_extension("new");
    fs::write(
        &draft,
        place.join(SOCKET_NAME).as_os_str().as_encoded_bytes(),
    )?;
    fs::rename(&draft, &path)
}

/// Takes that back, if it leads to `place` or is of nobody any more.
pub(in crate::transfer) fn unregister(root: u32, place: &Path) {
    let Some(path) = by_root(root) else { return };
    if pointed(&path).is_some_and(|socket| socket.starts_with(place)) {
        let _ = fs::remove_file(path);
    }
}

// A socket's path may have 107 bytes and no more: the directory is named by a descriptor instead.
fn beside<T>(socket: &Path, open: impl Fn(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(directory), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = File::open(directory)?;
    open(&PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))
}

/// Whether a CRIU has begun to build a copy from the images of `place`.
pub(in crate::transfer) fn has_begun(place: &Path) -> bool {
    place.join(BEGUN).exists()
}

/// The CRIU that has begun it, which may have ended since.
pub(in crate::transfer) fn builder(place: &Path) -> Option<Process> {
    let text = fs::read_to_string(place.join(BEGUN)).ok()?;
    let (pid, started) = text.trim().split_once(' ')?;
    Some(Process {
        pid: pid.parse().ok()?,
        started: started.parse().ok()?,
    })
}

/// The root of a copy that CRIU has let go, as it was when its script said so.
pub(in crate::transfer) fn resumed(place: &Path) -> Option<u32> {
    fs::read_to_string(place.join(RESUMED))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Forgets both, before a copy is built again.
pub(in crate::transfer) fn forget(place: &Path) {
    for name in [BEGUN, RESUMED] {
        let _ = fs::remove_file(place.join(name));
    }
}

/// A stage that CRIU is in, with the script that waits for an answer.
#[derive(Debug)]
pub(in crate::transfer) struct Report {
    pub(in crate::transfer) stage: Stage,
    /// CRIU's own process.
    pub(in crate::transfer) criu: Option<Process>,
    /// Root of the tree, or of the copy.
    pub(in crate::transfer) root: Option<u32>,
    /// The directory of the images, through CRIU's own descriptor.
    pub(in crate::transfer) images: PathBuf,
    stream: UnixStream,
}

impl Report {
    /// Lets the script end.
    pub(in crate::transfer) fn answer(mut self, goes_on: bool) {
        // Fails where it has ended.
        let _ = self
            .stream
            .write_all(if goes_on { b"go\n" } else { b"no\n" });
    }
}

/// Makes the socket in `place` and the script there or [elsewhere](scripts), and gives both.
pub(in crate::transfer) fn listen(
    place: &Path,
    program: &ActionProgram,
) -> io::Result<(UnixListener, PathBuf)> {
    let socket = place.join(SOCKET_NAME);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = beside(&socket, |path| UnixListener::bind(path))?;
    listener.set_nonblocking(true)?;
    let script = scripts::directory(place)?.join("action");
    let variable = format!("{SOCKET}={} ", quoted(socket.as_os_str())?);
    let text = format!(
        "#!/bin/sh\n# The action script of a migration; made by crxfer.\n{}",
        case(program, &variable)?
    );
    write_whole(&script, text.as_bytes(), 0o700)?;
    Ok((listener, script))
}

/// Replaces the file at `path` at once: CRIU takes an empty script for one that approves.
pub fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o700)
        .open(&draft)?;
    file.write_all(bytes)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    // A power cut must not leave the new name with nothing below it.
    file.sync_data()?;
    fs::rename(&draft, path)
}

/// Name of the action script for every CRIU of a host, beside CRIU's file of options.
pub const HOST_SCRIPT: &str = "crxfer-action";

/// Its first lines: they tell it from a migration's own.
const HOST_SCRIPT_HEAD: &str =
    "#!/bin/sh\n# CRIU's action script; made by crxfer. Does nothing for a CRIU of no migration.\n";

/// The text of an action script for every CRIU of this host: `program` looks for the migration itself.
pub fn script(program: &ActionProgram) -> io::Result<String> {
    Ok(format!("{HOST_SCRIPT_HEAD}{}", case(program, "")?))
}

/// Whether the script `text` has every CRIU of this host ask: it is [ours](script), or one of the
/// operator's that calls ours.
pub fn asks(text: &str) -> bool {
    let calls = |line: &str| {
        let line = line.trim_start();
        !line.starts_with('#') && (line.contains(HOST_SCRIPT) || line.contains("crxfer action"))
    };
    let is_ours = text
        .strip_prefix(HOST_SCRIPT_HEAD)
        .is_some_and(|rest| rest.trim_end().ends_with("esac"));
    is_ours || text.lines().any(calls)
}

// CRIU waits for it at every stage: few have to be heard of.
fn case(program: &ActionProgram, before: &str) -> io::Result<String> {
    let names: Vec<_> = STAGES.iter().map(ToString::to_string).collect();
    let mut command = quoted(program.program.as_os_str())?;
    for argument in &program.args {
        command.push(' ');
        command.push_str(&quoted(argument)?);
    }
    let names = names.join("|");
    Ok(format!(
        "case $CRTOOLS_SCRIPT_ACTION in\n{names}) {before}exec {command} ;;\nesac\n"
    ))
}

fn quoted(text: &std::ffi::OsStr) -> io::Result<String> {
    let text = text.to_str().filter(|text| !text.contains('\n'));
    let text = text.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "a path that is no plain text")
    })?;
    Ok(crate::runtime::quoted(text))
}

/// The next report; `None` where who connected is not this user's script, or says nothing.
pub(in crate::transfer) fn accept(listener: &UnixListener) -> Option<Report> {
    let (stream, _) = listener.accept().ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
    if peer.uid != rustix::process::geteuid() {
        return None;
    }
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(LINE_TIME)).ok()?;
    let mut line = String::new();
    BufReader::new((&stream).take(MOST_BYTES))
        .read_line(&mut line)
        .ok()?;
    let mut words = line.trim_end_matches('\n').splitn(4, ' ');
    let stage = Stage::named(words.next()?);
    let (criu, root) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let images = PathBuf::from(words.next()?);
    Some(Report {
        stage,
        criu: Process::of(criu),
        root: Some(root).filter(|&root| root > 0),
        images,
        stream,
    })
}
