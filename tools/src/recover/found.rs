//! The records of this host.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crxfer::handover::journal::{History, State};
use crxfer::handover::{DestinationState, Journal, Keep, Lease, SourceState};
use crxfer::transfer::finish::FinishOptions;
use crxfer::wire::MigrationId;
use serde_json::json;

use super::{Ended, end_destination, end_source};
use crate::args::PlaceArgs;
use crate::error::Failed;
use crate::output::{self, Align, Table, hint};
use crate::size;

/// Where `crxfer recv` keeps its records, in its directory.
const IN_RECEIVING: &str = ".crxfer/state";

/// Of which host the record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Side {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

#[derive(Debug)]
enum Record {
    Source(Journal<SourceState>, Box<History<SourceState>>),
    Destination(Journal<DestinationState>, Box<History<DestinationState>>),
}

/// One migration of which there is a record.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) id: MigrationId,
    pub(super) side: Side,
    root: PathBuf,
    record: Record,
    /// A process takes care of it.
    held: bool,
}

/// A record that cannot be read. It must not keep the others from being ended.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) id: MigrationId,
    pub(super) side: Side,
    pub(super) error: String,
}

/// All of them, the oldest first, and those that cannot be read.
pub(super) fn find(places: &PlaceArgs) -> Result<(Vec<Found>, Vec<Unreadable>), Failed> {
    let mut roots = vec![places.state.clone().unwrap_or_else(crate::key::records)];
    roots.extend(places.dir.iter().map(|dir| dir.join(IN_RECEIVING)));
    roots.dedup();
    let (mut found, mut unreadable) = (Vec::new(), Vec::new());
    for root in &roots {
        let sources = Journal::<SourceState>::list(root)?.into_iter();
        let destinations = Journal::<DestinationState>::list(root)?.into_iter();
        let all = sources
            .map(|id| (id, Side::Source))
            .chain(destinations.map(|id| (id, Side::Destination)));
        for (id, side) in all {
            match Found::open(root, id, side) {
                Ok(opened) => found.extend(opened),
                Err(error) => unreadable.push(Unreadable {
                    id,
                    side,
                    error: error.text(),
                }),
            }
        }
    }
    found.sort_by_key(Found::since);
    Ok((found, unreadable))
}

/// A journal, what it says, and whether somebody has it.
type Opened<S> = (Journal<S>, History<S>, bool);

fn open<S: State>(root: &Path, id: MigrationId) -> Result<Option<Opened<S>>, Failed> {
    let Some(journal) = Journal::<S>::open(root, id)? else {
        return Ok(None);
    };
    let looked = journal
        .read()
        // Let go at once: this only looks.
        .and_then(|history| Ok((history, journal.lease()?.is_none())));
    match looked {
        Ok((history, held)) => Ok(Some((journal, history, held))),
        // Another process has ended it in this moment.
        Err(_) if !journal.directory().exists() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Found {
    fn open(root: &Path, id: MigrationId, side: Side) -> Result<Option<Self>, Failed> {
        let opened = match side {
            Side::Source => open(root, id)?
                .map(|(journal, history, held)| (Record::Source(journal, Box::new(history)), held)),
            Side::Destination => open(root, id)?.map(|(journal, history, held)| {
                (Record::Destination(journal, Box::new(history)), held)
            }),
        };
        Ok(opened.map(|(record, held)| Self {
            id,
            side,
            root: root.to_owned(),
            record,
            held,
        }))
    }

    /// As it is by now; `None` where it is gone.
    pub(super) fn again(&self) -> Result<Option<Self>, Failed> {
        Self::open(&self.root, self.id, self.side)
    }

    pub(super) fn lease(&self) -> Result<Option<Lease>, Failed> {
        Ok(match &self.record {
            Record::Source(journal, _) => journal.lease()?,
            Record::Destination(journal, _) => journal.lease()?,
        })
    }

    pub(super) async fn end(self, lease: Lease, options: FinishOptions) -> Result<Ended, Failed> {
        match self.record {
            Record::Source(journal, _) => end_source(journal, lease, options).await,
            Record::Destination(journal, _) => end_destination(journal, lease).await,
        }
    }

    pub(super) fn decide(&self, keep: Keep) -> Result<(), Failed> {
        const BY: &str = "crxfer recover";
        match &self.record {
            Record::Source(journal, _) => journal.decide(keep, BY)?,
            Record::Destination(journal, _) => journal.decide(keep, BY)?,
        }
        Ok(())
    }

    fn since(&self) -> SystemTime {
        match &self.record {
            Record::Source(_, history) => history.since(),
            Record::Destination(_, history) => history.since(),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "an age is shown")]
    fn age(&self) -> Duration {
        let age = SystemTime::now().duration_since(self.since());
        age.unwrap_or_default()
    }

    fn name(&self) -> &str {
        match &self.record {
            Record::Source(_, history) => &history.about.name,
            Record::Destination(_, history) => &history.about.name,
        }
    }

    fn pid(&self) -> Option<u32> {
        match &self.record {
            Record::Source(_, history) => history.about.tree.processes.first().map(|it| it.pid),
            Record::Destination(_, history) => history.about.pid,
        }
    }

    fn state(&self) -> String {
        let name = match &self.record {
            Record::Source(_, history) => serde_json::to_value(history.state()),
            Record::Destination(_, history) => serde_json::to_value(history.state()),
        };
        let name = name.ok();
        let name = name.as_ref().and_then(serde_json::Value::as_str);
        name.unwrap_or("?").to_owned()
    }

    /// Nothing is left but an answer, or a network lock.
    fn is_over(&self) -> bool {
        match &self.record {
            Record::Source(_, history) => history.state() == SourceState::Over,
            Record::Destination(_, history) => matches!(
                history.state(),
                DestinationState::Running | DestinationState::Removed | DestinationState::Over
            ),
        }
    }

    /// Somebody should end it, and nobody does.
    pub(super) fn is_left(&self) -> bool {
        !self.held && !self.is_over()
    }

    /// Whether only the other host, or an operator, can say whose the workload is.
    pub(super) fn is_in_doubt(&self) -> bool {
        [Keep::Source, Keep::Destination]
            .into_iter()
            .all(|keep| self.can_take(keep))
    }

    /// Whether an operator who says `keep` decides something that this host does not know.
    pub(super) fn can_take(&self, keep: Keep) -> bool {
        match &self.record {
            Record::Source(_, history) => match history.state() {
                SourceState::Committed => true,
                // Frozen programs do not end by themselves.
                SourceState::Freezing | SourceState::Fencing | SourceState::Keeping => {
                    history.about.tree.left().is_empty()
                }
                // The way out where two run.
                SourceState::Kept => keep == Keep::Destination,
                _ => false,
            },
            // A receiver that holds its copy acts upon a decision, too, once its source is lost.
            Record::Destination(_, history) => match history.state() {
                DestinationState::Complete => true,
                // One that cannot be brought to life; and the way out where two run.
                DestinationState::Resuming | DestinationState::Running => keep == Keep::Source,
                _ => false,
            },
        }
    }

    /// What the records say, in words.
    pub(super) fn finding(&self) -> &'static str {
        match &self.record {
            Record::Source(_, history) => {
                source_finding(history.state(), history.about.tree.left().is_empty())
            }
            Record::Destination(_, history) => destination_finding(history.state()),
        }
    }

    fn holder(&self) -> &'static str {
        match (self.held, self.is_over()) {
            (true, _) => "a process",
            (false, true) => "nobody needs to",
            (false, false) => "nobody",
        }
    }
}

fn source_finding(state: SourceState, is_gone: bool) -> &'static str {
    match (state, is_gone) {
        (SourceState::Begun, _) => "the workload runs here",
        (SourceState::Freezing | SourceState::Fencing, false) => "the workload is here, and stays",
        (SourceState::Freezing | SourceState::Fencing, true) => {
            "the workload was frozen here and is gone; the destination may hold a complete copy"
        }
        (SourceState::Committed, false) => {
            "the workload is held here, handed over; whether its copy runs is not known"
        }
        (SourceState::Committed, true) => {
            "the workload was handed over and has ended here; whether its copy runs is not known"
        }
        (SourceState::Moved, _) => "the copy runs at the destination; the workload ends here",
        (SourceState::Keeping, _) => "the workload stays here, and is being let go",
        (SourceState::Kept, _) => "the workload runs here; the destination must be told",
        (SourceState::Over, _) => "over",
    }
}

fn destination_finding(state: DestinationState) -> &'static str {
    match state {
        DestinationState::Receiving => "the workload is the source's; images were coming",
        DestinationState::Complete => {
            "the complete images are here; the source knows whose the workload is"
        }
        DestinationState::Resuming => "the workload is this host's, and is being let go",
        DestinationState::Running => "the workload runs here, or has run here",
        DestinationState::Removing => "the workload is the source's; its copy is removed here",
        DestinationState::Removed | DestinationState::Over => "over",
    }
}

pub(super) fn show(
    found: &[Found],
    unreadable: &[Unreadable],
    as_json: bool,
) -> Result<(), Failed> {
    if as_json {
        found.iter().try_for_each(|it| output::json(&value(it)))?;
        return unreadable.iter().try_for_each(|it| {
            output::json(&json!({
                "event": "migration",
                "id": it.id.to_string(),
                "side": it.side.as_str(),
                "error": it.error,
            }))
        });
    }
    for it in unreadable {
        hint(&format!(
            "crxfer: {} ({}): {}",
            it.id,
            it.side.as_str(),
            it.error
        ));
    }
    if found.is_empty() {
        return output::line(
            "no migration is unfinished or under way (a destination's are found with --dir)",
        );
    }
    let align = &[
        Align::Left,
        Align::Left,
        Align::Left,
        Align::Right,
        Align::Left,
        Align::Right,
        Align::Left,
    ];
    let head = [
        "id",
        "side",
        "state",
        "age",
        "name",
        "pid",
        "in the hands of",
    ];
    let mut table = Table::new(align, &head);
    for it in found {
        table.row(vec![
            it.id.to_string(),
            it.side.as_str().to_owned(),
            it.state(),
            size::age(it.age().as_secs()),
            it.name().to_owned(),
            it.pid().map_or_else(String::new, |pid| pid.to_string()),
            it.holder().to_owned(),
        ]);
    }
    table.print()
}

fn value(found: &Found) -> serde_json::Value {
    json!({
        "event": "migration",
        "id": found.id.to_string(),
        "side": found.side.as_str(),
        "name": found.name(),
        "pid": found.pid(),
        "state": found.state(),
        "age": found.age().as_secs(),
        "holder": if found.held { "process" } else { "nobody" },
        "finding": found.finding(),
    })
}
