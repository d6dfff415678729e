//! The report of a migration, for people.

use crxfer::transfer::migrate::MigrationReport;

use super::progress::milliseconds;
use crate::error::Failed;
use crate::output;
use crate::size::{Bytes, seconds};

/// Where each millisecond went.
pub(super) fn print(report: &MigrationReport) -> Result<(), Failed> {
    lines(report).iter().try_for_each(|text| output::line(text))
}

fn lines(report: &MigrationReport) -> Vec<String> {
    vec![
        format!("migrated {}: {}", report.name, seconds(report.total)),
        format!(
            "downtime {}",
            report.downtime.map_or_else(String::new, milliseconds)
        ),
        format!("sent {}", Bytes(report.wire_bytes.0)),
    ]
}
