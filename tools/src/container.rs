//! Commands of container runtimes, as the options ask for them.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crxfer::criu::CriuOptions;
use crxfer::runtime::{ActionProgram, DumpCommand, RestoreCommand, quoted};
use crxfer::transfer::external::action;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde_json::Value;

use crate::args::{ContainerArgs, RuncSetupArgs, RuntimeArgs};
use crate::error::Failed;
use crate::migrate::own_guard;

/// Where runc's CRIU finds the action script that waits for the hold.
const RUNC_CONF: &str = "/etc/criu/runc.conf";

/// The workload of the options: its root, and who dumps it.
#[derive(Debug)]
pub(crate) struct Dumped {
    pub(crate) pid: u32,
    pub(crate) name: Option<String>,
    pub(crate) by: Option<DumpCommand>,
}

/// This program, as what answers CRIU.
fn action_program() -> ActionProgram {
    ActionProgram {
        program: own_guard().map_or_else(|| "crxfer".into(), |guard| guard.program),
        args: vec!["action".into()],
    }
}

pub(crate) fn dumped(
    args: &ContainerArgs,
    pid: Option<u32>,
    criu: &CriuOptions,
) -> Result<Dumped, Failed> {
    if let Some(id) = &args.runc {
        return runc(args, id, criu);
    }
    let container = args.container.as_deref();
    can_name(container.filter(|name| !name.is_empty()))?;
    let pid = pid.ok_or_else(|| Failed::Usage("--pid or --runc says what to move".to_owned()))?;
    let by = args.dump_with.as_ref().map(|command| DumpCommand {
        command: command.clone(),
        runtime: args.restore_as.clone().unwrap_or_default(),
        container: args.container.clone().unwrap_or_default(),
        forget: None,
        action: action_program(),
    });
    Ok(Dumped {
        pid,
        name: None,
        by,
    })
}

fn runc(args: &ContainerArgs, id: &str, criu: &CriuOptions) -> Result<Dumped, Failed> {
    let container = args.container.as_deref().unwrap_or(id);
    can_name([id, container])?;
    if criu.link_remap || criu.tcp_close || criu.config_file.is_some() || !criu.external.is_empty()
    {
        return Err(Failed::Usage(format!(
            "runc has no options for that: write them into {RUNC_CONF} (link-remap, tcp-close, external)"
        )));
    }
    has_hold()?;
    let base = runc_base(args.runc_root.as_deref())?;
    let cgroups = criu.manage_cgroups.map_or_else(String::new, |mode| {
        format!(" --manage-cgroups-mode {}", mode.as_str())
    });
    Ok(Dumped {
        pid: runc_pid(args.runc_root.as_deref(), id)?,
        name: Some(container.to_owned()),
        by: Some(DumpCommand {
            command: format!(
                "{base} --log \"$CRXFER_WORK/runc.log\" checkpoint --image-path \"$CRXFER_IMAGES\" \
                 --work-path \"$CRXFER_WORK\" \
                 --page-server \"$CRXFER_PAGE_SERVER_ADDRESS:$CRXFER_PAGE_SERVER_PORT\" \
                 $CRXFER_OPTIONS{cgroups} {id} >/dev/null 2>&1 || {}",
                say_log("dump")
            ),
            runtime: "runc".to_owned(),
            container: container.to_owned(),
            // Without --force: it may run again, under the same name.
            forget: Some(format!("{base} delete {id}")),
            action: action_program(),
        }),
    })
}

// The destination would refuse it, later.
fn can_name<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<(), Failed> {
    let mut names = names.into_iter();
    match names.find(|name| !RestoreCommand::can_name(name)) {
        Some(name) => Err(Failed::Usage(format!(
            "{name}: a container's name has letters, digits and _.- here"
        ))),
        None => Ok(()),
    }
}

// runc passes CRIU's standard streams on, so that only its log is left to say what went wrong.
fn say_log(which: &str) -> String {
    format!(
        "{{ s=$?; tail -n 2 \"$CRXFER_WORK/runc.log\" >&2; \
         grep -h Error \"$CRXFER_WORK/{which}.log\" | head -n 2 >&2; exit $s; }}"
    )
}

fn runc_base(root: Option<&Path>) -> Result<String, Failed> {
    let Some(root) = root else {
        return Ok("runc".to_owned());
    };
    Ok(format!("runc --root {}", word(root)?))
}

fn word(path: &Path) -> Result<String, Failed> {
    let path = std::path::absolute(path).map_err(Failed::file("find", path))?;
    match path.to_str() {
        Some(text) => Ok(quoted(text)),
        None => Err(Failed::Usage(format!(
            "{}: not a plain text",
            path.display()
        ))),
    }
}

/// The first process of a container that runs.
fn runc_pid(root: Option<&Path>, id: &str) -> Result<u32, Failed> {
    let mut state = Command::new("runc");
    if let Some(root) = root {
        state.arg("--root").arg(root);
    }
    let output = state
        .args(["state", id])
        .stdin(Stdio::null())
        .output()
        .map_err(Failed::file("run", Path::new("runc")))?;
    let state: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let pid = state["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    match (pid, state["status"].as_str()) {
        (Some(pid @ 1..), Some("running")) => Ok(pid),
        (_, Some(status)) => Err(Failed::Usage(format!(
            "container {id} of runc is {status}: only one that runs can be moved"
        ))),
        _ => Err(Failed::Usage(format!(
            "runc does not know a container {id}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}

/// Whether runc's CRIU will ask before it goes on.
fn has_hold() -> Result<(), Failed> {
    let text = fs::read_to_string(RUNC_CONF).unwrap_or_default();
    if setting(&text, "action-script").is_some_and(|script| is_hold(Path::new(script))) {
        return Ok(());
    }
    Err(Failed::Usage(format!(
        "runc's CRIU would not wait for the other host: {RUNC_CONF} names no action script of crxfer's; \
         run `crxfer runc-setup`, once on each host"
    )))
}

// By what it says: the path of another migration's own script has our name in it, too.
fn is_hold(script: &Path) -> bool {
    let runs = fs::metadata(script)
        .is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0);
    runs && fs::read_to_string(script).is_ok_and(|text| action::asks(&text))
}

fn setting<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let line = line.trim().trim_start_matches("--");
        let value = line.strip_prefix(name)?;
        value.starts_with(char::is_whitespace).then(|| value.trim())
    })
}

/// Writes the action script and what the file of options lacks.
pub(crate) fn set_up_runc(args: &RuncSetupArgs) -> Result<(), Failed> {
    let conf = absolute(&args.conf);
    let directory = conf.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(Failed::file("make", directory))?;
    let script = directory.join(action::HOST_SCRIPT);
    if script.to_string_lossy().contains(char::is_whitespace) {
        let path = script.display();
        return Err(Failed::Usage(format!(
            "{path}: CRIU takes no path with a space in it"
        )));
    }
    let _lock = lock(&conf)?;
    let written = action::script(&action_program())
        .and_then(|text| action::write_whole(&script, text.as_bytes(), 0o755));
    written.map_err(Failed::file("write", &script))?;
    // It may be a link to where the operator keeps it.
    let conf = fs::canonicalize(&conf).unwrap_or(conf);
    let (mut text, mode) = match File::open(&conf) {
        Err(error) if error.kind() == ErrorKind::NotFound => (String::new(), 0o644),
        opened => opened
            .and_then(|mut file| {
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                Ok((text, file.metadata()?.permissions().mode() & 0o7777))
            })
            .map_err(Failed::file("read", &conf))?,
    };
    let other = setting(&text, "action-script").filter(|other| Path::new(other) != script);
    if let Some(other) = other.filter(|other| !is_hold(Path::new(other))) {
        return Err(Failed::Usage(format!(
            "{} has the action script {other} already: have it end with `exec {}`, or remove it and \
             run this again",
            conf.display(),
            script.display()
        )));
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for (name, value) in [
        ("action-script", script.to_string_lossy().as_ref()),
        ("network-lock", "nftables"),
    ] {
        if setting(&text, name).is_none() {
            text.push_str(&format!("{name} {value}\n"));
        }
    }
    action::write_whole(&conf, text.as_bytes(), mode).map_err(Failed::file("write", &conf))
}

/// Keeps others from changing `conf` for as long as what this gives is there.
fn lock(conf: &Path) -> Result<File, Failed> {
    let mut path = conf.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let file = File::create(&path).map_err(Failed::file("make", &path))?;
    loop {
        match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Failed::file("lock", &path)(errno.into())),
        }
    }
}

/// The commands that the options name.
pub(crate) fn runtimes(args: &RuntimeArgs) -> Result<Vec<RestoreCommand>, Failed> {
    let removes = |name: &str| {
        let mut removes = args.remove_with.iter();
        let found = removes.find(|(runtime, _)| runtime == name);
        found.map(|(_, command)| command.clone())
    };
    let named = args
        .restore_with
        .iter()
        .map(|(runtime, command)| RestoreCommand {
            runtime: runtime.clone(),
            command: command.clone(),
            remove: removes(runtime),
            bundles: None,
            action: action_program(),
        });
    let mut runtimes: Vec<_> = named.collect();
    if let Some(bundles) = &args.runc_bundles {
        has_hold()?;
        let base = runc_base(args.runc_root.as_deref())?;
        runtimes.push(RestoreCommand {
            runtime: "runc".to_owned(),
            command: format!(
                "{base} --log \"$CRXFER_WORK/runc.log\" restore --detach --bundle {}/\"$CRXFER_CONTAINER\" \
                 --image-path \"$CRXFER_IMAGES\" --work-path \"$CRXFER_WORK\" $CRXFER_OPTIONS \
                 \"$CRXFER_CONTAINER\" >/dev/null 2>&1 || {}",
                word(bundles)?,
                say_log("restore")
            ),
            remove: Some(format!("{base} delete --force \"$CRXFER_CONTAINER\"")),
            bundles: Some(absolute(bundles)),
            action: action_program(),
        });
    }
    Ok(runtimes)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runc_setup_keeps_what_is_there_and_writes_the_script_that_it_advises() {
        let directory = tempfile::tempdir().unwrap();
        let conf = directory.path().join("runc.conf");
        let args = RuncSetupArgs { conf: conf.clone() };
        let script = directory.path().join("crxfer-action");
        let other = directory.path().join("crxfer-1/action");
        fs::create_dir(other.parent().unwrap()).unwrap();
        action::write_whole(&other, b"#!/bin/sh\nexec crxfer-of-another action\n", 0o700).unwrap();
        let before = format!("tcp-close\naction-script {}", other.display());
        fs::write(&conf, &before).unwrap();

        let error = format!("{:?}", set_up_runc(&args).unwrap_err());
        assert!(error.contains(script.to_str().unwrap()), "{error}");
        assert!(is_hold(&script) && !is_hold(&other));
        assert_eq!(fs::read_to_string(&conf).unwrap(), before);

        let calls = format!("#!/bin/sh\nexec {}\n", script.display());
        action::write_whole(&other, calls.as_bytes(), 0o700).unwrap();
        set_up_runc(&args).unwrap();
        set_up_runc(&args).unwrap();
        let after = fs::read_to_string(&conf).unwrap();
        assert_eq!(after, format!("{before}\nnetwork-lock nftables\n"));
    }

    #[test]
    fn a_container_is_named_plainly_before_anybody_is_asked() {
        assert!(can_name(Some("web-1.a_b")).is_ok() && can_name(None).is_ok());
        assert!(can_name(Some("web;reboot")).is_err());
    }
}
