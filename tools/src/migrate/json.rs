//! A migration for programs: the lines of `--json`, and the file of `--report`.

use std::time::Duration;

use crxfer::precopy::Prediction;
use crxfer::session::migration::Owner;
use crxfer::transfer::migrate::{
    HostCheck, IterationReport, MigrateError, MigrationReport, Outcome, PhaseReport,
};
use serde_json::{Value, json};

use super::checks::word;
use crate::error::Failed;

/// What CRIU measures with its frozen time.
pub(super) const FROZEN_NOTE: &str = "CRIU's own figure: includes waiting for the destination";

/// The last line of `--json`, and the report file, of a migration or a dry run that went well.
pub(super) fn done(report: &MigrationReport) -> Value {
    let accuracy = report.accuracy.as_ref();
    json!({
        "event": "done",
        "outcome": match report.outcome {
            Outcome::Migrated => "migrated",
            Outcome::Checked => "checked",
        },
        "id": report.id.to_string(),
        "name": report.name,
        "mode": report.mode.as_str(),
        "downtime_ms": report.downtime.map(ms),
        "downtime_error_ms": report.downtime.and(report.clock).map(|clock| nanos(clock.error_ns)),
        "total_ms": ms(report.total),
        "predicted_downtime_ms": accuracy.map(|it| ms(it.predicted.downtime)),
        "iterations": report.iterations.iter().map(iteration).collect::<Vec<_>>(),
        "why_frozen": report.why_frozen.map(|why| why.as_str()),
        "final": {
            "dumped_pages": report.dumped_pages,
            "changed_pages": report.final_changed_pages,
            "sent_pages": report.final_sent_pages,
        },
        "phases": report.phases.iter().map(phase).collect::<Vec<_>>(),
        "wire_bytes": report.wire_bytes.0 + report.wire_bytes.1,
        "wire_sent_bytes": report.wire_bytes.0,
        "wire_received_bytes": report.wire_bytes.1,
        "criu": report.criu_stats.map(|stats| json!({
            "frozen_ms": micros(stats.frozen_time),
            "freezing_ms": micros(stats.freezing_time),
            "memdump_ms": micros(stats.memdump_time),
            "memwrite_ms": micros(stats.memwrite_time),
            "note": FROZEN_NOTE,
        })),
        "clock_offset_ms": report.clock.map(|clock| signed(clock.ahead_ns)),
        "clock_error_ms": report.clock.map(|clock| nanos(clock.error_ns)),
        "pid": report.pid,
        "method": report.method,
        "checks": checks(&report.checks),
        "notes": report.notes,
    })
}

/// The same of one that did not come about.
pub(super) fn error(failed: &Failed) -> Value {
    let mut value = json!({
        "event": "error",
        "outcome": "failed",
        "error": failed.text(),
        "exit_code": failed.exit().code(),
    });
    if let Failed::Migrate(failure) = failed {
        value["workload"] = match failure.owner {
            Owner::Source => "source",
            Owner::InDoubt => "in-doubt",
            Owner::Destination => "destination",
        }
        .into();
        value["untouched"] = failure.untouched.into();
        value["destination_is_clean"] = failure.destination_is_clean.into();
        if let MigrateError::Preflight(failed) = &failure.error {
            value["checks"] = checks(failed).into();
        }
    }
    value
}

/// `checks` with their outcome in a word.
pub(super) fn checks(checks: &[HostCheck]) -> Vec<Value> {
    let each = checks.iter().map(|HostCheck { host, check }| {
        json!({
            "host": host.as_str(),
            "name": check.name,
            "outcome": word(check.outcome),
            "found": check.found,
            "advice": check.advice,
        })
    });
    each.collect()
}

pub(super) fn iteration(iteration: &IterationReport) -> Value {
    json!({
        "number": iteration.number,
        "scanned_pages": iteration.scanned_pages,
        "changed_pages": iteration.changed_pages,
        "sent_pages": iteration.sent_pages,
        "stream_bytes": iteration.stream_bytes,
        "duration_ms": ms(iteration.took),
        "link_wait_ms": ms(iteration.link_wait),
        "destination_wait_ms": ms(iteration.destination_wait),
        "destination_work_ms": ms(iteration.destination_work),
        "frozen_ms": iteration.frozen.map(ms),
        "bytes_per_s": iteration.bytes_per_s.round(),
        "dirty_bytes_per_s": iteration.dirty_bytes_per_s.round(),
        "predicted_downtime_ms": ms(iteration.predicted_downtime),
    })
}

/// What is expected, as part of a progress line.
pub(super) fn prediction(prediction: &Prediction) -> Value {
    json!({
        "dirty_bytes_per_s": prediction.dirty_bytes_per_s.round(),
        "link_bytes_per_s": prediction.link_bytes_per_s.round(),
        "predicted_downtime_ms": ms(prediction.downtime),
        "predicted_finish_ms": ms(prediction.finish),
    })
}

fn phase(phase: &PhaseReport) -> Value {
    json!({
        "name": phase.name,
        "host": phase.host.as_str(),
        "begin_ms": signed(phase.begin_ns),
        "end_ms": signed(phase.end_ns),
    })
}

/// Milliseconds with their microseconds.
fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn nanos(time: u64) -> f64 {
    ms(Duration::from_nanos(time))
}

fn micros(time: u32) -> f64 {
    f64::from(time) / 1e3
}

fn signed(time: i64) -> f64 {
    let size = nanos(time.unsigned_abs());
    if time < 0 { -size } else { size }
}

#[cfg(test)]
mod tests {
    use crxfer::preflight::Check;
    use crxfer::transfer::migrate::Host;

    use super::*;
    use crate::migrate::report::tests::made_up;

    fn keys(value: &Value) -> Vec<&str> {
        let object = value.as_object().expect("an object");
        object.keys().map(String::as_str).collect()
    }

    #[test]
    fn the_report_has_the_keys_that_programs_count_on() {
        let value = done(&made_up());
        assert_eq!(
            keys(&value).join(" "),
            "event outcome id name mode downtime_ms downtime_error_ms total_ms predicted_downtime_ms \
             iterations why_frozen final phases wire_bytes wire_sent_bytes wire_received_bytes criu \
             clock_offset_ms clock_error_ms pid method checks notes"
        );
        assert_eq!(
            keys(&value["iterations"][1]).join(" "),
            "number scanned_pages changed_pages sent_pages stream_bytes duration_ms link_wait_ms \
             destination_wait_ms destination_work_ms frozen_ms bytes_per_s dirty_bytes_per_s \
             predicted_downtime_ms"
        );
        let expected = json!({"name": "store", "host": "destination", "begin_ms": 4720.0,
            "end_ms": 4830.0});
        assert_eq!(value["phases"][7], expected);
        let expected = json!({"frozen_ms": 310.0, "freezing_ms": 1.2, "memdump_ms": 40.0,
            "memwrite_ms": 35.0, "note": FROZEN_NOTE});
        assert_eq!(value["criu"], expected);
        let expected = json!({"dumped_pages": 62_400, "changed_pages": 320, "sent_pages": 318});
        assert_eq!(value["final"], expected);
        let expected = json!([{"host": "destination", "name": "memory", "outcome": "warning", "found": "little",
            "advice": "free some"}]);
        assert_eq!(value["checks"], expected);
    }

    #[test]
    fn times_are_fractional_milliseconds() {
        let mut report = made_up();
        report.downtime = Some(Duration::from_nanos(312_345_678));
        let value = done(&report);
        assert_eq!(value["downtime_ms"], 312.346);
        assert_eq!(value["downtime_error_ms"], 0.25);
        assert_eq!(value["clock_offset_ms"], -3000.0);
        assert_eq!(value["predicted_downtime_ms"], 279.0);
        assert_eq!(value["why_frozen"], "no-gain");
        assert_eq!(value["outcome"], "migrated");
    }

    #[test]
    fn what_was_not_measured_is_null() {
        let mut report = made_up();
        report.outcome = Outcome::Checked;
        (report.downtime, report.accuracy, report.criu_stats) = (None, None, None);
        let value = done(&report);
        for key in [
            "downtime_ms",
            "downtime_error_ms",
            "predicted_downtime_ms",
            "criu",
        ] {
            assert_eq!(value[key], Value::Null, "{key}");
        }
        assert_eq!(value["outcome"], "checked");
    }

    #[test]
    fn a_failure_says_whose_the_workload_is() {
        let failure = crxfer::transfer::migrate::MigrateFailure {
            error: MigrateError::Preflight(
                HostCheck::all(
                    Host::Source,
                    vec![Check::failed("pids", "taken", "free them")],
                )
                .collect(),
            ),
            owner: Owner::Source,
            untouched: true,
            destination_is_clean: true,
        };
        let value = error(&Failed::Migrate(Box::new(failure)));
        assert_eq!(value["event"], "error");
        assert_eq!(value["exit_code"], 11);
        assert_eq!(value["workload"], "source");
        assert_eq!(value["untouched"], true);
        assert_eq!(value["checks"][0]["advice"], "free them");
    }
}
