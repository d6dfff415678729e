//! `crxfer list` and `rm`: the sets of a receiving directory.

use std::time::{SystemTime, UNIX_EPOCH};

use crxfer::identity::Fingerprint;
use crxfer::store::{Store, StoredSet};
use serde_json::{Value, json};

use crate::args::{ListArgs, RmArgs};
use crate::error::Failed;
use crate::output::{self, Align, Table};
use crate::size::{Bytes, age, grouped};

pub(crate) fn list(args: &ListArgs) -> Result<(), Failed> {
    let mut sets = Store::open_existing(&args.dir)?.list()?;
    sets.retain(|set| args.all || set.is_current());
    if args.json {
        let sets: Vec<_> = sets.iter().map(set_json).collect();
        return output::json(&json!({
            "directory": args.dir.to_string_lossy(),
            "sets": sets,
        }));
    }
    print(&sets)
}

pub(crate) fn rm(args: &RmArgs) -> Result<(), Failed> {
    let store = Store::open_existing(&args.dir)?;
    for name in &args.names {
        store.remove(name.as_str())?;
    }
    Ok(())
}

fn set_json(set: &StoredSet) -> Value {
    let record = &set.record;
    json!({
        "name": Some(&record.name).filter(|name| !name.is_empty()),
        "generation": record.generation,
        "current": set.is_current(),
        "layout": record.layout.as_str(),
        "completeness": record.completeness,
        "base": set.base,
        "path": set.directory.as_ref().map(|path| path.to_string_lossy()),
        "pages": set.pages,
        "page_size": record.page_size.bytes(),
        "image_bytes": record.image_bytes,
        "created_unix_s": record.created_unix_s,
        "peer": Fingerprint(record.peer).to_string(),
    })
}

fn print(sets: &[StoredSet]) -> Result<(), Failed> {
    use Align::{Left, Right};
    let mut table = Table::new(
        &[Left, Right, Left, Left, Right, Right, Left, Right, Left],
        &[
            "name", "gen", "layout", "state", "pages", "size", "base", "age", "from",
        ],
    );
    for set in sets {
        let record = &set.record;
        let name = match (record.name.as_str(), record.superseded) {
            ("", _) => format!("(ancestor #{})", record.id),
            (name, true) => format!("{name} (superseded, #{})", record.id),
            (name, false) => name.to_owned(),
        };
        let state = match &set.directory {
            Some(_) => record.completeness.clone(),
            None => "gone".to_owned(),
        };
        table.row(vec![
            name,
            record.generation.to_string(),
            record.layout.as_str().to_owned(),
            state,
            set.pages.map_or_else(|| "?".to_owned(), grouped),
            Bytes(record.image_bytes).to_string(),
            set.base.clone().unwrap_or_else(|| "-".to_owned()),
            age(seconds_since(record.created_unix_s)),
            Fingerprint(record.peer).short(),
        ]);
    }
    table.print()
}

#[expect(clippy::disallowed_methods, reason = "an age is counted from now")]
fn seconds_since(unix_s: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs()).saturating_sub(unix_s)
}
