//! `crxfer stream`: CRIU's image streamer.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crxfer::criu::streamer::{CaptureOptions, Serve, Served, vote};
use crxfer::image::{Chain, ChainOptions, FlatView, ParentLinks};
use crxfer::runtime::quoted;
use crxfer::store::{Store, StoreError};
use crxfer::transfer::{
    Events, SendOptions, StreamMoment, StreamOptions, StreamReport, stream_capture,
};
use rustix::fs::StatVfsMountFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::args::{CaptureArgs, ServeArgs, StreamArgs, StreamCommand, VoteArgs};
use crate::error::Failed;
use crate::output::{self, hint};
use crate::progress::Progress;
use crate::size::{Bytes, seconds};
use crate::stop::Stop;
use crate::{key, summary};

/// Time for the sockets to be removed, and for the destination to be told.
const FAREWELL: Duration = Duration::from_millis(100);

/// Name of the action script in the directory of the sockets.
const ACTION: &str = "action";

pub(crate) async fn run(args: StreamArgs) -> Result<(), Failed> {
    match args.command {
        StreamCommand::Capture(args) => capture(*args).await,
        StreamCommand::Serve(args) => serve(args).await,
        StreamCommand::Vote(args) => vote_at_stage(&args),
    }
}

async fn capture(args: CaptureArgs) -> Result<(), Failed> {
    let json = args.json;
    let mut stop = Stop::catch()?;
    let taking = async {
        allow_many_pipes();
        let progress = Arc::new(Progress::new(json));
        let (options, _script) = prepare(&args, &progress).await?;
        let directory = options.directory.clone();
        let result = stream_capture(options, |moment| tell(&args, &directory, moment)).await;
        progress.finish();
        Ok(result?)
    };
    let outcome = tokio::select! {
        outcome = taking => outcome,
        () = stop.asked() => {
            tokio::time::sleep(FAREWELL).await;
            Err(Failed::Stopped)
        }
    };
    match outcome {
        Ok(report) => done(&report, json),
        Err(error) => {
            if json {
                let _ = output::json(&json!({
                    "event": "error",
                    "error": error.text(),
                    "exit_code": error.exit().code(),
                }));
            }
            Err(error)
        }
    }
}

async fn prepare(
    args: &CaptureArgs,
    progress: &Arc<Progress>,
) -> Result<(StreamOptions, Option<Script>), Failed> {
    let target = args.destination.target_later().await?;
    let directory = made(&args.directory)?;
    let script = match args.unheld {
        true => None,
        false => Some(Script::write(&directory)?),
    };
    let progress = progress.clone();
    let options = StreamOptions {
        directory,
        capture: CaptureOptions {
            hold: !args.unheld,
            ..CaptureOptions::default()
        },
        memory: args.memory.map(|bytes| bytes.0),
        freeze_limit: args.freeze_limit,
        send: SendOptions {
            directory: PathBuf::new(),
            name: Some(args.name.clone()),
            base: args.base.clone(),
            page_size: None,
            bytes_per_s: args.bwlimit.map(|rate| rate.0),
            target,
            identity: key::of_source(args.destination.identity.as_deref())?,
            memo: None,
            transport: args.transport.to_options(),
            events: Events::new(move |event| progress.take(&event)),
        },
    };
    Ok((options, script))
}

fn tell(args: &CaptureArgs, directory: &Path, moment: StreamMoment) {
    let script = directory.join(ACTION);
    // Nobody at the other end of stdout is no reason to let a dump fail.
    let _ = match moment {
        StreamMoment::Listening if args.json => output::json(&json!({
            "event": "listening",
            "directory": directory.to_string_lossy(),
            "action_script": (!args.unheld).then(|| script.to_string_lossy()),
        })),
        StreamMoment::Listening => {
            let script = match args.unheld {
                true => String::new(),
                false => format!(" --action-script {}", script.display()),
            };
            hint(&format!(
                "now: criu dump --stream -D {}{script} …",
                directory.display()
            ));
            Ok(())
        }
        StreamMoment::Captured {
            images,
            bytes,
            held,
        } if args.json => output::json(&json!({
            "event": "captured",
            "images": images,
            "bytes": bytes,
            "held": held,
        })),
        StreamMoment::Captured { .. } => Ok(()),
    };
}

fn done(report: &StreamReport, json: bool) -> Result<(), Failed> {
    if json {
        let mut line = summary::json(&report.sent);
        line["held_seconds"] = json!(report.held.map(|held| held.as_secs_f64()));
        return output::json(&line);
    }
    summary::print(&report.sent)?;
    match report.held {
        Some(held) => output::line(&format!("  CRIU was held for {}", seconds(held))),
        None => Ok(()),
    }
}

async fn serve(args: ServeArgs) -> Result<(), Failed> {
    allow_many_pipes();
    let set = FlatView::new(open(&args)?)?;
    Serve::check(&set)?;
    let directory = made(&args.directory)?;
    let (serve, stopper) = Serve::listen(&directory)?;
    let mut stop = Stop::catch()?;
    if args.json {
        output::json(&json!({
            "event": "listening",
            "directory": directory.to_string_lossy(),
        }))?;
    } else {
        let directory = directory.display();
        hint(&format!("now: criu restore --stream -D {directory} …"));
    }
    let serving = tokio::task::spawn_blocking(move || serve.serve(&set));
    tokio::select! {
        served = serving => tell_served(&served.expect("serving does not panic")?, args.json),
        () = stop.asked() => {
            drop(stopper);
            tokio::time::sleep(FAREWELL).await;
            Err(Failed::Stopped)
        }
    }
}

fn open(args: &ServeArgs) -> Result<Chain, Failed> {
    let (path, parent_links) = match (&args.images, &args.dir, &args.name) {
        (None, Some(dir), Some(name)) => (find(dir, name.as_str())?, ParentLinks::Relative),
        (Some(images), ..) => (images.clone(), ParentLinks::Any),
        _ => return Err(Failed::Usage("--dir needs --name".to_owned())),
    };
    let options = ChainOptions {
        page_size: args.page_size,
        parent_links,
    };
    Ok(Chain::open_with(path, options)?)
}

fn find(dir: &Path, name: &str) -> Result<PathBuf, Failed> {
    let store = Store::open_existing(dir)?;
    let record = store.current(name)?;
    let directory = record.and_then(|record| store.directory_of(&record));
    Ok(directory.ok_or_else(|| StoreError::NoSuchSet(name.to_owned()))?)
}

fn tell_served(served: &Served, json: bool) -> Result<(), Failed> {
    if json {
        return output::json(&json!({
            "event": "served",
            "images": served.images,
            "absent": served.absent,
            "bytes": served.bytes,
            "unfinished": served.unfinished,
        }));
    }
    output::line(&format!(
        "CRIU took {} images ({}); whether it restored them is in its log",
        served.images,
        Bytes(served.bytes)
    ))
}

/// At a stage of CRIU: announces, votes, or does nothing.
fn vote_at_stage(args: &VoteArgs) -> Result<(), Failed> {
    match std::env::var("CRTOOLS_SCRIPT_ACTION").as_deref() {
        Ok("pre-stream") => vote::announce(&args.directory)?,
        Ok("post-dump") => vote::vote(&args.directory)?,
        Ok(_) => {}
        Err(_) => {
            let text = "stream vote is called by CRIU, as its action script (see --help)";
            return Err(Failed::Usage(text.to_owned()));
        }
    }
    Ok(())
}

/// `directory` made if it does not exist, as a path that holds wherever CRIU runs.
fn made(directory: &Path) -> Result<PathBuf, Failed> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().mode(0o700).create(directory);
    match made {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Failed::file("create the directory", directory)(error));
        }
        _ => {}
    }
    fs::canonicalize(directory).map_err(Failed::file("find", directory))
}

/// The action script, while CRIU may need it.
#[derive(Debug)]
struct Script(PathBuf);

impl Script {
    fn write(directory: &Path) -> Result<Self, Failed> {
        let path = directory.join(ACTION);
        let found = rustix::fs::statvfs(directory)
            .map_err(|error| Failed::file("examine", directory)(error.into()))?;
        if found.f_flag.contains(StatVfsMountFlags::NOEXEC) {
            return Err(Failed::Usage(format!(
                "{}: programs cannot be run from this file system, which CRIU's action script needs; name a directory elsewhere",
                directory.display()
            )));
        }
        let program = std::env::current_exe()
            .map_err(Failed::file("find", "the path of this program".as_ref()))?;
        let text = format!(
            "#!/bin/sh\nexec {} stream vote {}\n",
            quoted(&program.to_string_lossy()),
            quoted(&directory.to_string_lossy())
        );
        let written = write_script(&path, &text);
        written.map_err(Failed::file("write the action script", &path))?;
        Ok(Self(path))
    }
}

// Another file of that name is somebody's: not replaced, unless it is an earlier script of this command.
fn write_script(path: &Path, text: &str) -> std::io::Result<()> {
    let is_ours =
        fs::read_to_string(path).is_ok_and(|old| old.contains(" stream vote ") || old.is_empty());
    if is_ours {
        fs::remove_file(path)?;
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o700);
    options.open(path)?.write_all(text.as_bytes())
}

impl Drop for Script {
    fn drop(&mut self) {
        // One that stays is replaced by the next capture.
        let _ = fs::remove_file(&self.0);
    }
}

/// CRIU has an image open for each task and more; the usual limit of descriptors is for programs that
/// use select.
fn allow_many_pipes() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        ..limit
    };
    // With fewer, a dump of very many tasks fails, and its tree runs on.
    let _ = setrlimit(Resource::Nofile, wanted);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_one_word() {
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
    }

    #[test]
    fn an_earlier_script_is_replaced_and_another_file_is_not() {
        let place = tempfile::tempdir().unwrap();
        drop(Script::write(place.path()).unwrap());
        std::mem::forget(Script::write(place.path()).unwrap());
        let script = Script::write(place.path()).unwrap();
        let text = fs::read_to_string(&script.0).unwrap();
        assert!(text.starts_with("#!/bin/sh\nexec '/"), "{text}");
        drop(script);
        fs::write(place.path().join(ACTION), "echo mine").unwrap();
        assert!(Script::write(place.path()).is_err());
    }
}
