//! `crxfer send`.

use std::sync::Arc;
use std::time::Duration;

use crxfer::session::SessionError;
use crxfer::transfer::{Events, SendOptions, SendReport, Target, TransferError, send};
use crxfer::wire::FailureCode;
use serde_json::json;

use crate::args::SendArgs;
use crate::error::Failed;
use crate::output::{self, hint};
use crate::progress::Progress;
use crate::stop::Stop;
use crate::{key, summary};

/// Time for the destination to be told that this side was stopped.
const FAREWELL: Duration = Duration::from_millis(100);

pub(crate) async fn run(args: SendArgs) -> Result<(), Failed> {
    let json = args.json;
    let result = transfer(args).await;
    match result {
        Ok(report) if json => output::json(&summary::json(&report)),
        Ok(report) => summary::print(&report),
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

async fn transfer(args: SendArgs) -> Result<SendReport, Failed> {
    let mut stop = Stop::catch()?;
    let sending = async {
        let target = args.destination.target_later().await?;
        let progress = Arc::new(Progress::new(args.json));
        let result = match send(options(&args, &target, &progress)?).await {
            Err(error) if is_worth_repeating(&error) => {
                hint(&format!("crxfer: {error}; sending again"));
                send(options(&args, &target, &progress)?).await
            }
            other => other,
        };
        progress.finish();
        Ok(result?)
    };
    tokio::select! {
        result = sending => result,
        () = stop.asked() => {
            // Dropping the transfer closed its connection; that must still go out.
            tokio::time::sleep(FAREWELL).await;
            Err(Failed::Stopped)
        }
    }
}

fn options(
    args: &SendArgs,
    target: &Target,
    progress: &Arc<Progress>,
) -> Result<SendOptions, Failed> {
    let progress = progress.clone();
    Ok(SendOptions {
        directory: crxfer::store::locate(&args.dir)?,
        name: args.name.clone(),
        base: args.base.clone(),
        page_size: args.page_size,
        bytes_per_s: args.bwlimit.map(|rate| rate.0),
        target: target.clone(),
        identity: key::of_source(args.destination.identity.as_deref())?,
        memo: key::state_directory()
            .filter(|_| !args.reread)
            .map(|state| state.join("digests")),
        transport: args.transport.to_options(),
        events: Events::new(move |event| progress.take(&event)),
    })
}

/// The destination found one of its copies damaged and does not count on it any more.
fn is_worth_repeating(error: &TransferError) -> bool {
    let held = matches!(error, TransferError::Session(SessionError::Peer(failure))
        if failure.code == FailureCode::Held);
    held && error.is_retryable()
}
