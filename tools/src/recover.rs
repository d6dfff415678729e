//! `crxfer recover`, `crxfer status`, and the hidden `crxfer guard`.

mod found;

use std::time::{Duration, Instant};

use crxfer::handover::{DestinationState, Journal, Lease, SourceState, Verdict};
use crxfer::transfer::Target;
use crxfer::transfer::finish::{
    DestinationOutcome, FinishOptions, SourceOutcome, clear_source, finish_destination,
    finish_source,
};
use crxfer::transfer::guard::run_guard;
use serde_json::json;
use tokio::sync::watch;

use self::found::{Found, Side, find};
use crate::args::{GuardArgs, RecoverArgs, StatusArgs};
use crate::error::Failed;
use crate::output::{self, hint};
use crate::stop::Stop;
use crate::target;

/// Between looks at records that another process takes care of.
const LOOK: Duration = Duration::from_millis(200);

pub(crate) fn guard(args: &GuardArgs) -> Result<(), Failed> {
    run_guard(&args.state, args.side.into()).map_err(Failed::from)
}

pub(crate) fn status(args: &StatusArgs) -> Result<(), Failed> {
    let (found, unreadable) = find(&args.places)?;
    found::show(&found, &unreadable, args.json)?;
    let left = found.iter().filter(|it| it.is_left()).count();
    if left > 0 {
        hint(&format!(
            "crxfer: {left} unfinished with nobody to end them: crxfer recover"
        ));
    }
    Ok(())
}

pub(crate) async fn recover(args: RecoverArgs) -> Result<(), Failed> {
    let mut stop = Stop::catch()?;
    let target = match &args.to {
        Some(to) => Some(target::find(to, &args.peer, true)?),
        None => None,
    };
    let (mut found, mut unreadable) = find(&args.places)?;
    found.retain(|it| args.means(it.id));
    unreadable.retain(|it| args.means(it.id));
    if let Some(keep) = args.keep() {
        decide(&found, keep)?;
    }
    found::show(&found, &unreadable, args.json)?;
    let (stopping, stopped) = watch::channel(false);
    let asked = async {
        stop.asked().await;
        let _ = stopping.send(true);
        std::future::pending::<()>().await;
    };
    let damaged = unreadable.iter();
    let mut left: Vec<_> = damaged
        .map(|it| format!("{} ({}): {}", it.id, it.side.as_str(), it.error))
        .collect();
    let work = async {
        for one in found {
            let (id, side) = (one.id, one.side);
            let ended = end(one, &args, target.clone(), &stopped).await;
            let ended = ended.unwrap_or_else(|error| Ended::failed(error.text()));
            tell(id, side, &ended, args.json)?;
            if ended.is_left {
                left.push(format!("{id} ({}): {}", side.as_str(), ended.detail));
            }
        }
        Ok::<(), Failed>(())
    };
    tokio::select! {
        done = work => done?,
        () = asked => {}
    }
    match (*stopped.borrow(), left.as_slice()) {
        (true, _) => Err(Failed::Interrupted),
        (false, []) => Ok(()),
        (false, left) => Err(Failed::Doubt(left.join("\n  "))),
    }
}

/// Records what the operator wants, where that is a question.
fn decide(found: &[Found], keep: crxfer::handover::Keep) -> Result<(), Failed> {
    let in_doubt: Vec<_> = found.iter().filter(|it| it.can_take(keep)).collect();
    match in_doubt.as_slice() {
        [one] => one.decide(keep),
        [] => {
            let known: Vec<_> = found
                .iter()
                .map(|it| format!("\n  {} ({}): {}", it.id, it.side.as_str(), it.finding()))
                .collect();
            let known = match known.is_empty() {
                true => "; no record of a migration is here".to_owned(),
                false => known.concat(),
            };
            Err(Failed::Usage(format!(
                "nothing is in doubt here, so there is nothing to decide{known}"
            )))
        }
        several => {
            let ids: Vec<_> = several.iter().map(|it| it.id.to_string()).collect();
            Err(Failed::Usage(format!(
                "several are in doubt: name one of {}",
                ids.join(", ")
            )))
        }
    }
}

/// How one migration stands now.
struct Ended {
    outcome: &'static str,
    detail: String,
    notes: Vec<String>,
    is_left: bool,
}

impl Ended {
    fn done(outcome: &'static str, detail: impl Into<String>, notes: Vec<String>) -> Self {
        Self {
            outcome,
            detail: detail.into(),
            notes,
            is_left: false,
        }
    }

    fn left(outcome: &'static str, detail: impl Into<String>) -> Self {
        Self {
            outcome,
            detail: detail.into(),
            notes: Vec::new(),
            is_left: true,
        }
    }

    fn failed(detail: String) -> Self {
        Self::left("failed", detail)
    }
}

#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
async fn end(
    found: Found,
    args: &RecoverArgs,
    target: Option<Target>,
    stopped: &watch::Receiver<bool>,
) -> Result<Ended, Failed> {
    let until = Instant::now() + args.wait;
    // Whoever has it acts upon a decision as well.
    loop {
        let Some(again) = found.again()? else {
            return Ok(Ended::done(
                "over",
                "another process has ended it meanwhile",
                Vec::new(),
            ));
        };
        if let Some(lease) = again.lease()? {
            let options = FinishOptions {
                patience: until.saturating_duration_since(Instant::now()).max(LOOK),
                target,
                transport: args.transport.to_options(),
                stop: stopped.clone(),
            };
            return again.end(lease, options).await;
        }
        // One of those decisions that only one side has to take may be waited for, too.
        let decided = args.keep().is_some_and(|keep| again.can_take(keep));
        if !decided && !again.is_in_doubt() {
            return Ok(Ended::done(
                "busy",
                "a process takes care of it",
                Vec::new(),
            ));
        }
        if Instant::now() >= until || *stopped.borrow() {
            let detail = format!("{}; a process goes on trying", again.finding());
            return Ok(Ended::left("held", detail));
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn end_source(
    journal: Journal<SourceState>,
    lease: Lease,
    options: FinishOptions,
) -> Result<Ended, Failed> {
    let ended = match finish_source(&journal, &lease, &options).await? {
        SourceOutcome::Kept { told: true, notes } => {
            Ended::done("kept", "the workload runs here", notes)
        }
        SourceOutcome::Kept { told: false, notes } => Ended {
            notes,
            ..Ended::left(
                "kept",
                "the workload runs here; the destination must still be told",
            )
        },
        SourceOutcome::Moved { pid: 0, notes } => {
            Ended::done("moved", "the workload is the destination's", notes)
        }
        SourceOutcome::Moved { pid, notes } => Ended::done(
            "moved",
            format!("the workload runs at the destination, as process {pid}"),
            notes,
        ),
        SourceOutcome::Held { reason } => Ended::left(
            "held",
            format!("the workload is held frozen here, complete: {reason}"),
        ),
        SourceOutcome::Undecided { reason } => Ended::left("undecided", reason),
    };
    if ended.is_left {
        return Ok(ended);
    }
    let cleared = tokio::task::spawn_blocking(move || clear_source(journal)).await;
    drop(lease);
    if cleared.expect("clearing does not panic")? {
        return Ok(ended);
    }
    let mut notes = ended.notes;
    notes.push(
        "CRIU's network lock stays until the address has moved; then: crxfer recover".to_owned(),
    );
    Ok(Ended { notes, ..ended })
}

async fn end_destination(
    journal: Journal<DestinationState>,
    lease: Lease,
) -> Result<Ended, Failed> {
    let finishing =
        tokio::task::spawn_blocking(move || finish_destination(&journal, &lease, Verdict::Ask));
    let outcome = finishing.await.expect("finishing does not panic")?;
    Ok(match outcome {
        DestinationOutcome::Running { pid: 0, notes } => Ended::done(
            "running",
            "the workload came here, and has ended since",
            notes,
        ),
        DestinationOutcome::Running { pid, notes } => Ended::done(
            "running",
            format!("the workload runs here, as process {pid}"),
            notes,
        ),
        DestinationOutcome::Removed { notes } => Ended::done(
            "removed",
            "the workload is the source's; nothing is left here",
            notes,
        ),
        DestinationOutcome::Held { place } => Ended::left(
            "held",
            format!(
                "the complete images are in {}; the source, or an operator, must say whose the \
                 workload is: crxfer recover there, or --keep-source or --keep-destination here",
                place.display()
            ),
        ),
    })
}

fn tell(
    id: crxfer::wire::MigrationId,
    side: Side,
    ended: &Ended,
    as_json: bool,
) -> Result<(), Failed> {
    if as_json {
        return output::json(&json!({
            "event": "outcome",
            "id": id.to_string(),
            "side": side.as_str(),
            "outcome": ended.outcome,
            "detail": ended.detail,
            "notes": ended.notes,
        }));
    }
    output::line(&format!("{id}: {}", ended.detail))?;
    ended
        .notes
        .iter()
        .try_for_each(|note| output::line(&format!("  {note}")))
}
