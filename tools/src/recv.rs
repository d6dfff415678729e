//! `crxfer recv`.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crxfer::hooks::{Hooks, Side};
use crxfer::transfer::guard::GuardProgram;
use crxfer::transfer::{Event, Events, ReceiveOptions, Received, Receiver, RestoreHost};
use serde_json::{Value, json};

use crate::args::{RecvArgs, RestoreArgs};
use crate::container;
use crate::error::Failed;
use crate::key;
use crate::output::{self, hint};
use crate::size::Bytes;
use crate::stop::Stop;

pub(crate) async fn run(args: RecvArgs) -> Result<(), Failed> {
    let mut stop = Stop::catch()?;
    let receiver = Receiver::bind(ReceiveOptions {
        directory: args.dir.clone(),
        listen: args.listen.clone(),
        layout: args.layout.into(),
        max_set_bytes: args.max_bytes.map(|bytes| bytes.0),
        keep: args.keep,
        restore: restore_host(&args.restore)?,
        state: args.state.clone(),
        guard: Some(guard()?),
        identity: key::of_destination(args.identity.as_deref())?,
        peers: args.peer.clone(),
        transport: args.transport.to_options(),
        events: events(args.json),
        sink: args.sink.into(),
        sink_bytes: args.sink_size.map(|bytes| bytes.0),
    })?;
    if let Some(file) = &args.ticket_file {
        write_ticket(&receiver, file)?;
    }
    announce(&receiver, &args)?;
    tokio::select! {
        () = receiver.run(args.once) => {}
        () = stop.asked() => {}
    }
    receiver.close().await;
    Ok(())
}

/// This program once more.
fn guard() -> Result<GuardProgram, Failed> {
    let failed = Failed::file("find this program in", Path::new("/proc/self/exe"));
    Ok(GuardProgram {
        program: std::env::current_exe().map_err(failed)?,
        args: vec!["guard".into()],
    })
}

fn restore_host(args: &RestoreArgs) -> Result<Option<RestoreHost>, Failed> {
    if !args.allow_restore {
        return Ok(None);
    }
    let hooks = Hooks::new(Side::Destination, args.hooks.clone(), args.hook_timeout)
        .map_err(|error| Failed::Usage(format!("--hook: {error}")))?;
    Ok(Some(RestoreHost {
        program: args.criu.clone(),
        config_file: args.criu_config.clone(),
        hooks,
        runtimes: container::runtimes(&args.runtimes)?,
    }))
}

/// Says that sources may come, and how.
fn announce(receiver: &Receiver, args: &RecvArgs) -> Result<(), Failed> {
    let ticket = receiver.ticket().map(ToString::to_string);
    let addresses: Vec<_> = receiver
        .addresses()
        .iter()
        .map(ToString::to_string)
        .collect();
    let fingerprint = receiver.fingerprint().to_string();
    if args.json {
        return output::json(&json!({
            "event": "listening",
            "ticket": ticket,
            "addresses": addresses,
            "fingerprint": fingerprint,
        }));
    }
    let Some(ticket) = ticket else {
        hint(&format!(
            "listening at {} for pinned hosts only; this host's key:",
            addresses.join(", ")
        ));
        output::line(&fingerprint)?;
        let command = on_the_source(&args.restore);
        hint(&format!(
            "On a source:  crxfer {command} --to HOST:PORT --identity FILE --peer FINGERPRINT"
        ));
        return Ok(());
    };
    hint(&format!(
        "listening at {}; the ticket:",
        addresses.join(", ")
    ));
    output::line(&ticket)?;
    let command = on_the_source(&args.restore);
    hint(&format!(
        "On the source:  crxfer {command} --to TICKET      Stop with Ctrl-C"
    ));
    Ok(())
}

fn on_the_source(restore: &RestoreArgs) -> &'static str {
    if restore.allow_restore {
        "migrate --pid PID"
    } else {
        "send DIR"
    }
}

fn events(json: bool) -> Events {
    Events::new(move |event| {
        // Called from the transfer: a stdout that fails must not end it.
        let _ = match event {
            Event::Received(received) if json => output::json(&received_json(&received)),
            Event::Received(received) => received_text(&received),
            Event::Restored { name, pid, address } if json => output::json(&json!({
                "event": "restored", "name": name, "pid": pid, "address": address.to_string(),
            })),
            Event::Restored { name, pid, address } => {
                output::line(&format!("running {name}: pid {pid} (from {address})"))
            }
            Event::Holding {
                id,
                name,
                address,
                images,
            } if json => output::json(&json!({
                "event": "holding", "id": id.to_string(), "name": name,
                "address": address.to_string(), "images": images.to_string_lossy(),
            })),
            Event::Holding {
                id, name, images, ..
            } => {
                hint(&format!(
                    "crxfer: holds a complete copy of {name} in {} (migration {id}); the source has not said whose the workload is: it will when it can, or see `crxfer recover --dir` with this directory",
                    images.display()
                ));
                Ok(())
            }
            Event::Failed { address, error } if json => output::json(
                &json!({"event": "failed", "address": address.to_string(), "error": error}),
            ),
            Event::Failed { address, error } => {
                hint(&format!("crxfer: transfer from {address} failed: {error}"));
                Ok(())
            }
            Event::Connected { .. }
            | Event::SetBegun { .. }
            | Event::Progress { .. }
            | Event::Storing => Ok(()),
        };
    })
}

fn received_json(received: &Received) -> Value {
    json!({
        "event": "received",
        "name": Some(&received.name).filter(|name| !name.is_empty()),
        "path": received.path.to_string_lossy(),
        "generation": received.generation,
        "layout": received.layout.as_str(),
        "base": received.base,
        "completeness": received.completeness,
        "unchanged": received.unchanged,
        "image_bytes": received.image_bytes,
        "notes": received.notes,
    })
}

fn received_text(received: &Received) -> Result<(), Failed> {
    let what = match (received.name.as_str(), received.unchanged) {
        ("", _) => "received ancestor".to_owned(),
        (name, true) => format!("unchanged {name}"),
        (name, false) => format!("received {name}"),
    };
    let base = received
        .base
        .as_ref()
        .map(|base| format!(" on {base}"))
        .unwrap_or_default();
    output::line(&format!(
        "{what}: {} (generation {}, {}{base}, {}, {})",
        received.path.display(),
        received.generation,
        received.layout.as_str(),
        received.completeness,
        Bytes(received.image_bytes),
    ))?;
    for note in &received.notes {
        hint(&format!("  note: {note}"));
    }
    Ok(())
}

/// Whoever waits for the file finds all of it, and nobody else can read it.
fn write_ticket(receiver: &Receiver, path: &Path) -> Result<(), Failed> {
    let Some(ticket) = receiver.ticket() else {
        let text = "--ticket-file: there is no ticket between pinned hosts (--peer)";
        return Err(Failed::Usage(text.to_owned()));
    };
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}.new", std::process::id()));
    let draft = Path::new(&draft);
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(draft)
        .and_then(|mut file| writeln!(file, "{ticket}"))
        .and_then(|()| fs::rename(draft, path));
    if written.is_err() {
        let _ = fs::remove_file(draft);
    }
    written.map_err(Failed::file("write the ticket file", path))
}
