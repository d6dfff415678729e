//! `crxfer page-server`: CRIU's memory to a destination.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use crxfer::criu::endpoint::{self, Client, EndpointError, Event, Limits, Options, Place, Stopper};
use crxfer::criu::endpoint::{SessionError, inherited};
use crxfer::criu::page_client::{ServeError, Served};
use crxfer::page::PageSize;
use crxfer::transfer::pages::{PagesMemory, PagesOptions};
use crxfer::transfer::{Target, TransferError};
use crxfer::wire::PagesStored;
use serde_json::{Value, json};
use tokio::runtime::Handle;

use crate::args::PageServerArgs;
use crate::error::Failed;
use crate::feed::headers;
use crate::key;
use crate::output::{self, hint};
use crate::size::{Bytes, grouped};
use crate::stop::Stop;

use self::upload::{Current, Upload};

mod upload;

/// Time for the destination to be told that this side has ended.
const FAREWELL: Duration = Duration::from_millis(100);

pub(crate) async fn run(args: PageServerArgs) -> Result<(), Failed> {
    let json = args.json;
    let result = serve(args).await;
    if let (true, Err(error)) = (json, &result) {
        let _ = output::json(&json!({
            "event": "error",
            "error": error.text(),
            "exit_code": error.exit().code(),
        }));
    }
    result
}

async fn serve(args: PageServerArgs) -> Result<(), Failed> {
    let mut stop = Stop::catch()?;
    let stopper = Stopper::new().map_err(Failed::Endpoint)?;
    let runtime = Handle::current();
    let working = {
        let stopper = stopper.clone();
        tokio::task::spawn_blocking(move || work(&args, &runtime, &stopper))
    };
    tokio::pin!(working);
    let result = tokio::select! {
        result = &mut working => result,
        () = stop.asked() => {
            stopper.stop();
            working.await
        }
    };
    // What was cut has closed its connection; that must still go out.
    tokio::time::sleep(FAREWELL).await;
    result.expect("the endpoint does not panic")
}

/// On a thread of its own: everything here blocks.
fn work(args: &PageServerArgs, runtime: &Handle, stopper: &Stopper) -> Result<(), Failed> {
    let to = args.destination.target()?;
    let options = upload_options(args, to)?;
    let place = place(args)?;
    // Better now than when an application is frozen.
    Upload::try_once(options.clone(), runtime)?;
    let current = Current::default();
    announce(args, &place)?;
    let make = {
        let (runtime, current) = (runtime.clone(), current.clone());
        move || Upload::connect(options.clone(), &runtime, &current)
    };
    let served = endpoint::run(
        place,
        &Options {
            page_size: PageSize::of_host(),
            limits: Limits {
                silence: args.silence_limit,
                freeze: args.freeze_limit,
            },
            prev_images: args.prev_images,
            once: args.once,
        },
        make,
        reports(args, current.clone()),
        stopper,
    );
    current.cancel();
    served.map_err(why)
}

fn upload_options(args: &PageServerArgs, target: Target) -> Result<PagesOptions, Failed> {
    Ok(PagesOptions {
        target,
        name: args.name.clone(),
        identity: key::of_source(args.destination.identity.as_deref())?,
        transport: args.transport.to_options(),
        bytes_per_s: args.bwlimit.map(|rate| rate.0),
        // The endpoint tells CRIU only where that is so.
        leaves_out: true,
        memory: PagesMemory::default(),
    })
}

fn place(args: &PageServerArgs) -> Result<Place, Failed> {
    if let Some(number) = args.fd {
        let failed = |error| Failed::Usage(format!("--fd {number}: {error}"));
        return inherited(number).map(Place::Inherited).map_err(failed);
    }
    let address = args.listen.ok_or_else(|| {
        Failed::Usage("one of --listen and --fd says where CRIU comes".to_owned())
    })?;
    let failed = |error| Failed::Usage(format!("--listen {address}: {error}"));
    TcpListener::bind(address)
        .map(Place::Listen)
        .map_err(failed)
}

/// Says that CRIU may come, and how.
fn announce(args: &PageServerArgs, place: &Place) -> Result<(), Failed> {
    let failed = Failed::file("find the address of", Path::new("the socket"));
    let address = match place {
        Place::Listen(listener) => Some(listener.local_addr().map_err(failed)?),
        Place::Inherited(_) => None,
    };
    if args.json {
        return output::json(&json!({
            "event": "ready",
            "address": address.map(|address| address.to_string()),
            "fd": args.fd,
        }));
    }
    let Some(address) = address else {
        hint("ready: CRIU gets the other end of the socket (--page-server --ps-socket FD)");
        return Ok(());
    };
    hint("ready for CRIU at:");
    output::line(&address.to_string())?;
    let ip = if address.ip().is_unspecified() {
        "127.0.0.1".to_owned()
    } else {
        address.ip().to_string()
    };
    hint(&format!(
        "For instance:  criu dump -t PID -D DIR --page-server --address {ip} --port {}\n\
         and then:      crxfer send DIR --name {} --to TICKET      Stop with Ctrl-C",
        address.port(),
        args.name,
    ));
    Ok(())
}

/// Prints what happens.
fn reports(
    args: &PageServerArgs,
    current: Current,
) -> impl Fn(Event<Upload>) + Send + Sync + 'static {
    let (json, name) = (args.json, args.name.to_string());
    move |event| {
        // A stdout that fails must not end a dump.
        let _ = match event {
            Event::Begun { client } if json => {
                output::json(&with(client, json!({"event": "begin"})))
            }
            Event::Begun { .. } => Ok(()),
            Event::Taken {
                client,
                served,
                sink,
            } => {
                let stored = sink.map(Upload::finish).transpose();
                match stored {
                    Ok(stored) if json => output::json(&taken(client, &served, &name, stored)),
                    Ok(stored) => taken_text(client, &served, &name, stored),
                    // CRIU was told that all is well, and so it was: only the farewell failed.
                    Err(error) => {
                        hint(&format!("crxfer: after the dump: {error}"));
                        Ok(())
                    }
                }
            }
            Event::Failed { client, error } => {
                if matches!(error, SessionError::Slow(_) | SessionError::Stopped) {
                    current.cancel();
                }
                failed(client, &error, json)
            }
        };
    }
}

fn with(client: Client, event: Value) -> Value {
    let mut event = event;
    event["address"] = json!(client.address.map(|address| address.to_string()));
    event["pid"] = json!(client.pid);
    event
}

fn taken(client: Client, served: &Served, name: &str, stored: Option<PagesStored>) -> Value {
    let event = json!({
        "event": "taken",
        "headers": served.layout.filter(|_| served.spaces > 0).map(headers),
        "tasks_and_segments": served.spaces,
        "bytes": served.bytes,
        "name": stored.as_ref().map(|_| name),
        "generation": stored.as_ref().map(|it| it.generation),
        "pages": stored.as_ref().map(|it| it.pages),
        "fresh_pages": stored.as_ref().map(|it| it.fresh_pages),
        "stored_bytes": stored.as_ref().map(|it| it.stored_bytes),
        "notes": stored.as_ref().map(|it| &it.notes),
    });
    with(client, event)
}

fn taken_text(
    client: Client,
    served: &Served,
    name: &str,
    stored: Option<PagesStored>,
) -> Result<(), Failed> {
    let Some(stored) = stored else {
        return output::line(&format!("CRIU at {client} ended without memory"));
    };
    output::line(&format!(
        "stored {name}: generation {}, {} pages ({} from CRIU), {} of them new ({} written)",
        stored.generation,
        grouped(stored.pages),
        Bytes(served.bytes),
        grouped(stored.fresh_pages),
        Bytes(stored.stored_bytes),
    ))?;
    for note in &stored.notes {
        hint(&format!("  note: {note}"));
    }
    Ok(())
}

fn failed(client: Client, error: &SessionError, json: bool) -> Result<(), Failed> {
    if json {
        let event = json!({"event": "failed", "error": error.to_string()});
        return output::json(&with(client, event));
    }
    hint(&format!("crxfer: CRIU at {client} was refused: {error}"));
    Ok(())
}

/// What the destination said, where that was it.
fn why(error: EndpointError) -> Failed {
    match error {
        EndpointError::Session(SessionError::Serve(ServeError::Sink(error))) => {
            match error.downcast::<TransferError>() {
                Ok(error) => Failed::Refused(*error),
                Err(error) => {
                    let error = ServeError::Sink(error);
                    Failed::Endpoint(EndpointError::Session(error.into()))
                }
            }
        }
        error => Failed::Endpoint(error),
    }
}
