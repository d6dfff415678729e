//! The report of a migration, for people.

use std::time::Duration;

use crxfer::image::DumpStats;
use crxfer::precopy::Accuracy;
use crxfer::session::migration::ClockOffset;
use crxfer::transfer::migrate::{IterationReport, MigrationReport, Mode, PhaseReport};

use super::json::FROZEN_NOTE;
use super::progress::{milliseconds, rate};
use crate::error::Failed;
use crate::output::{self, Align, Table};
use crate::size::{Bytes, grouped};

/// Columns of the bars: the whole downtime.
const BAR: u128 = 30;

/// Where each millisecond went.
pub(super) fn print(report: &MigrationReport) -> Result<(), Failed> {
    lines(report).iter().try_for_each(|text| output::line(text))
}

fn lines(report: &MigrationReport) -> Vec<String> {
    let mut lines = headline(report);
    lines.push(String::new());
    lines.extend(iterations(report));
    lines.push(String::new());
    lines.extend(timeline(report));
    lines.extend(waits(report));
    lines.extend(report.criu_stats.iter().flat_map(criu));
    lines.extend(report.notes.iter().map(|note| format!("  note: {note}")));
    lines
}

fn headline(report: &MigrationReport) -> Vec<String> {
    let pid = report.pid.map(|pid| format!(" as pid {pid}"));
    let mut lines = vec![format!(
        "migrated: {} runs on the destination{}",
        report.name,
        pid.unwrap_or_default()
    )];
    let (downtime, total) = (downtime(report), milliseconds(report.total));
    let (mut of_downtime, mut of_total) = (String::new(), String::new());
    if let Some(accuracy) = &report.accuracy {
        of_downtime = format!("  ({})", predicted_downtime(accuracy));
        of_total = format!("  ({})", predicted_finish(accuracy));
    }
    let (sent, received) = report.wire_bytes;
    lines.push(item("downtime", &format!("{downtime}{of_downtime}")));
    lines.push(item("total", &format!("{total}{of_total}")));
    let wire = format!("{} sent, {} received", Bytes(sent), Bytes(received));
    lines.push(item("on the wire", &wire));
    lines.push(item("mode", mode(report.mode)));
    lines.extend(report.clock.map(|clock| item("clocks", &clocks(clock))));
    lines
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Disk => "disk",
        Mode::Tmpfs => "tmpfs",
        Mode::Diskless => {
            "diskless: no image was in a file system; had the destination crashed before the copy ran, it would have lost them"
        }
    }
}

fn item(name: &str, text: &str) -> String {
    format!("  {name:<12} {text}")
}

fn downtime(report: &MigrationReport) -> String {
    match (report.downtime, report.clock) {
        (Some(downtime), Some(clock)) => {
            let error = Duration::from_nanos(clock.error_ns);
            format!("{} ± {}", milliseconds(downtime), milliseconds(error))
        }
        (Some(downtime), None) => milliseconds(downtime),
        (None, _) => "unknown: the clocks of the hosts could not be compared".to_owned(),
    }
}

fn predicted_downtime(accuracy: &Accuracy) -> String {
    let (predicted, measured) = (accuracy.predicted.downtime, accuracy.measured.downtime);
    format!(
        "predicted {}{}",
        milliseconds(predicted),
        off_by(predicted, measured)
    )
}

fn predicted_finish(accuracy: &Accuracy) -> String {
    let (last, measured) = (accuracy.predicted.finish, accuracy.measured.finish);
    let early = accuracy.early_finish.map(|early| {
        format!(
            "; after iteration 2: {}{}",
            milliseconds(early),
            off_by(early, measured)
        )
    });
    format!(
        "predicted {}{}{}",
        milliseconds(last),
        off_by(last, measured),
        early.unwrap_or_default()
    )
}

fn off_by(predicted: Duration, measured: Duration) -> String {
    let difference = predicted.abs_diff(measured).as_nanos();
    let percent = (difference * 100).checked_div(measured.as_nanos());
    match percent {
        None | Some(0) => String::new(),
        Some(percent) if predicted < measured => format!(", {percent} % too low"),
        Some(percent) => format!(", {percent} % too high"),
    }
}

fn clocks(clock: ClockOffset) -> String {
    let ahead = milliseconds(Duration::from_nanos(clock.ahead_ns.unsigned_abs()));
    let error = milliseconds(Duration::from_nanos(clock.error_ns));
    if clock.ahead_ns.unsigned_abs() <= clock.error_ns {
        return format!("the same on both hosts ± {error}");
    }
    let where_to = if clock.ahead_ns < 0 {
        "behind"
    } else {
        "ahead"
    };
    format!("the destination's is {ahead} ± {error} {where_to}; phases are told by the source's")
}

fn iterations(report: &MigrationReport) -> Vec<String> {
    use Align::Right;
    const ALIGN: &[Align] = &[Right; 11];
    let mut table = Table::new(
        ALIGN,
        &[
            "#",
            "scanned",
            "changed",
            "sent",
            "stream",
            "time",
            "rate",
            "link wait",
            "dest wait",
            "dest work",
            "if frozen",
        ],
    );
    report
        .iterations
        .iter()
        .for_each(|it| table.row(iteration(it)));
    table.row(vec![
        "frozen".to_owned(),
        grouped(report.dumped_pages),
        grouped(report.final_changed_pages),
        grouped(report.final_sent_pages),
    ]);
    let title = format!(
        "While it ran ({}): pages, waits on link and destination, downtime if frozen then",
        report.method
    );
    let rows = table.lines().into_iter().map(|row| format!("  {row}"));
    let mut lines: Vec<_> = std::iter::once(title).chain(rows).collect();
    lines.extend(stops(&report.iterations));
    lines.extend(
        report
            .why_frozen
            .map(|why| format!("  Frozen then because {why}.")),
    );
    lines
}

/// How long the tree stood still for iterations, if it did.
fn stops(iterations: &[IterationReport]) -> Option<String> {
    let each: Vec<_> = iterations.iter().filter_map(|it| it.frozen).collect();
    let longest = each.iter().max()?;
    Some(format!(
        "  It was stopped for {} of these iterations as well, for {} in all, the longest {} (by CRIU).",
        each.len(),
        milliseconds(each.iter().sum()),
        milliseconds(*longest)
    ))
}

fn iteration(it: &IterationReport) -> Vec<String> {
    vec![
        it.number.to_string(),
        grouped(it.scanned_pages),
        grouped(it.changed_pages),
        grouped(it.sent_pages),
        Bytes(it.stream_bytes).to_string(),
        milliseconds(it.took),
        rate(it.bytes_per_s),
        milliseconds(it.link_wait),
        milliseconds(it.destination_wait),
        milliseconds(it.destination_work),
        milliseconds(it.predicted_downtime),
    ]
}

/// When the tree was frozen, in nanoseconds since the begin; and for how long.
fn window(report: &MigrationReport) -> (i64, i64) {
    let nanos = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
    match report.downtime {
        Some(downtime) => (
            nanos(report.total).saturating_sub(nanos(downtime)),
            nanos(downtime),
        ),
        None => (0, 0),
    }
}

fn timeline(report: &MigrationReport) -> Vec<String> {
    use Align::{Left, Right};
    const ALIGN: &[Align] = &[Right, Right, Right, Left, Left, Left];
    let (from, long) = window(report);
    let is_in = |phase: &&PhaseReport| phase.end_ns > from || phase.begin_ns >= from;
    let mut table = Table::new(ALIGN, &["from", "to", "took", "", "", ""]);
    for phase in report.phases.iter().filter(is_in) {
        let begin = phase.begin_ns.saturating_sub(from);
        let end = phase.end_ns.saturating_sub(from);
        table.row(vec![
            tenths(begin),
            tenths(end),
            tenths(end.saturating_sub(begin)),
            bar(begin, end, long),
            phase.host.as_str().to_owned(),
            phase.name.clone(),
        ]);
    }
    let title = if report.downtime.is_some() {
        "The freeze: milliseconds since its begin; the bars span the downtime"
    } else {
        "Phases: milliseconds since the begin"
    };
    let rows = table.lines().into_iter().map(|row| format!("  {row}"));
    let lines = std::iter::once(title.to_owned()).chain(rows);
    lines.chain(before(report, from)).collect()
}

fn before(report: &MigrationReport, from: i64) -> Option<String> {
    let is_before = |phase: &&PhaseReport| {
        // Iterations have their own table.
        phase.end_ns <= from && phase.begin_ns < from && !phase.name.starts_with("iteration ")
    };
    let phases = report.phases.iter().filter(is_before);
    let each: Vec<_> = phases
        .map(|phase| format!("{} {}", phase.name, took(phase)))
        .collect();
    (!each.is_empty()).then(|| format!("  Before it: {}.", each.join(", ")))
}

fn took(phase: &PhaseReport) -> String {
    let nanos = phase.end_ns.saturating_sub(phase.begin_ns);
    milliseconds(Duration::from_nanos(nanos.unsigned_abs()))
}

/// Milliseconds with one digit behind the point.
fn tenths(nanos: i64) -> String {
    let tenths = (nanos.unsigned_abs() + 50_000) / 100_000;
    let sign = if nanos < 0 && tenths > 0 { "-" } else { "" };
    format!("{sign}{}.{}", tenths / 10, tenths % 10)
}

/// The part from `begin` to `end` of `long`; what lies within it is seen, be it ever so short.
fn bar(begin: i64, end: i64, long: i64) -> String {
    let whole = u128::from(long.unsigned_abs()).max(1);
    let place = |at: i64| u128::from(at.clamp(0, long.max(0)).unsigned_abs()) * BAR;
    let first = (place(begin) / whole).min(BAR - 1);
    let last = place(end).div_ceil(whole).max(first + 1);
    if long <= 0 {
        return String::new();
    }
    let is_seen = begin < long && end >= 0;
    let cells = (0..BAR).map(|cell| {
        if is_seen && (first..last).contains(&cell) {
            '#'
        } else {
            ' '
        }
    });
    let cells: String = cells.collect();
    format!("|{cells}|")
}

/// Who waited for whom.
fn waits(report: &MigrationReport) -> Vec<String> {
    let sum = |of: fn(&IterationReport) -> Duration| {
        let all: Duration = report.iterations.iter().map(of).sum();
        milliseconds(all)
    };
    let mut lines = vec![format!(
        "  Waits while it ran: the source {} for the link, {} for the destination, which worked {}.",
        sum(|it| it.link_wait),
        sum(|it| it.destination_wait),
        sum(|it| it.destination_work)
    )];
    let (from, _) = window(report);
    let waiting = report
        .phases
        .iter()
        .filter(|phase| phase.begin_ns >= from && phase.name.contains("wait"));
    let each: Vec<_> = waiting
        .map(|phase| {
            format!(
                "the {} {}: {}",
                phase.host.as_str(),
                took(phase),
                phase.name
            )
        })
        .collect();
    if !each.is_empty() {
        lines.push(format!("  Waits while frozen: {}.", each.join("; ")));
    }
    if let Some(accuracy) = &report.accuracy {
        lines.push(format!(
            "  Left to send when frozen: {}, predicted {}.",
            Bytes(accuracy.measured.changed_bytes),
            Bytes(whole(accuracy.predicted_changed_bytes))
        ));
    }
    lines
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and an estimate is for people"
)]
fn whole(bytes: f64) -> u64 {
    bytes.round() as u64
}

fn criu(stats: &DumpStats) -> [String; 2] {
    let micros = |time: u32| milliseconds(Duration::from_micros(time.into()));
    [
        format!(
            "  CRIU: freezing {}, memory dump {}, memory write {},",
            micros(stats.freezing_time),
            micros(stats.memdump_time),
            micros(stats.memwrite_time)
        ),
        format!(
            "        frozen {} ({FROZEN_NOTE}).",
            micros(stats.frozen_time)
        ),
    ]
}

#[cfg(test)]
pub(super) mod tests;
