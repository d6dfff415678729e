use crxfer::precopy::{Measured, Prediction, Why};
use crxfer::preflight::Check;
use crxfer::transfer::migrate::{Host, HostCheck, Outcome};
use crxfer::wire::MigrationId;

use super::*;

const MS: i64 = 1_000_000;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn an_iteration(number: u32, pages: u64) -> IterationReport {
    IterationReport {
        number,
        scanned_pages: 62_500,
        changed_pages: pages,
        sent_pages: pages - 100,
        stream_bytes: pages * 4000,
        took: ms(pages / 20),
        link_wait: ms(pages / 40),
        destination_wait: ms(12),
        destination_work: ms(pages / 50),
        bytes_per_s: 80_000_000.0,
        predicted_downtime: ms(300 + pages / 100),
        frozen: None,
        dirty_bytes_per_s: 5_000_000.0,
    }
}

fn phase(name: &str, host: Host, begin_ms: i64, end_ms: i64) -> PhaseReport {
    PhaseReport {
        name: name.to_owned(),
        host,
        begin_ns: begin_ms * MS,
        end_ns: end_ms * MS,
    }
}

/// A migration of 5 s with a freeze of 0.3 s at its end.
pub(in crate::migrate) fn made_up() -> MigrationReport {
    use Host::{Destination, Source};
    let prediction = Prediction {
        downtime: ms(279),
        final_downtime: ms(279),
        finish: ms(5100),
        dirty_bytes_per_s: 5_000_000.0,
        link_bytes_per_s: 80_000_000.0,
        hash_bytes_per_s: 900_000_000.0,
    };
    let measured = Measured {
        downtime: ms(300),
        finish: ms(5000),
        changed_bytes: 320 * 4096,
    };
    MigrationReport {
        id: MigrationId([0xab; 16]),
        name: "memcached-4711".to_owned(),
        outcome: Outcome::Migrated,
        mode: Mode::Disk,
        checks: HostCheck::all(
            Host::Destination,
            vec![Check::warning("memory", "little", "free some")],
        )
        .collect(),
        method: "live, pagemap",
        iterations: vec![an_iteration(1, 62_500), an_iteration(2, 1_300)],
        why_frozen: Some(Why::NoGain),
        dumped_pages: 62_400,
        final_changed_pages: 320,
        final_sent_pages: 318,
        downtime: Some(ms(300)),
        accuracy: Some(Accuracy {
            predicted: prediction,
            predicted_changed_bytes: 1_048_576.0,
            measured,
            early_finish: Some(ms(4000)),
        }),
        total: ms(5000),
        clock: Some(ClockOffset {
            ahead_ns: -3000 * MS,
            error_ns: 250_000,
        }),
        criu_stats: Some(DumpStats {
            freezing_time: 1_200,
            frozen_time: 310_000,
            memdump_time: 40_000,
            memwrite_time: 35_000,
            ..DumpStats::default()
        }),
        phases: vec![
            phase("look at the tree", Source, 0, 12),
            phase("connect", Source, 12, 40),
            phase("iteration 1", Source, 300, 3425),
            phase("iteration 2", Source, 3425, 4690),
            phase("destination gets ready", Source, 4690, 4700),
            phase("freeze the tree", Source, 4700, 4710),
            phase("dump and compare memory", Source, 4710, 4790),
            phase("store", Destination, 4720, 4830),
            phase("wait for the copy", Source, 4800, 4980),
            phase("restore", Destination, 4830, 4975),
            phase("commit", Source, 4980, 5002),
            phase("end the source's tree", Source, 5002, 5040),
        ],
        wire_bytes: (260_000_000, 1_300_000),
        pid: Some(4711),
        notes: vec!["a hook said so".to_owned()],
    }
}

#[test]
fn an_operator_sees_where_each_millisecond_went() {
    assert_eq!(lines(&made_up()).join("\n"), GOLDEN.trim_matches('\n'));
}

#[test]
fn what_a_crash_would_have_cost_is_told() {
    let mut report = made_up();
    let of_crash =
        |report: &MigrationReport| lines(report).join("\n").contains("destination crashed");
    assert!(!of_crash(&report));
    report.mode = Mode::Diskless;
    assert!(of_crash(&report));
}

#[test]
fn stops_for_pre_dumps_are_told() {
    let mut report = made_up();
    assert!(!lines(&report).join("\n").contains("stopped for"));
    report.iterations[0].frozen = Some(ms(40));
    report.iterations[1].frozen = Some(ms(4));
    let text = lines(&report).join("\n");
    let expected = "stopped for 2 of these iterations as well, for 44 ms in all, the longest 40 ms";
    assert!(text.contains(expected), "{text}");
}

const GOLDEN: &str = r##"
migrated: memcached-4711 runs on the destination as pid 4711
  downtime     300 ms ± 0.25 ms  (predicted 279 ms, 7 % too low)
  total        5.00 s  (predicted 5.10 s, 2 % too high; after iteration 2: 4.00 s, 20 % too low)
  on the wire  247 MiB sent, 1.23 MiB received
  mode         disk
  clocks       the destination's is 3.00 s ± 0.25 ms behind; phases are told by the source's

While it ran (live, pagemap): pages, waits on link and destination, downtime if frozen then
       #  scanned  changed    sent    stream    time        rate  link wait  dest wait  dest work  if frozen
       1   62 500   62 500  62 400   238 MiB  3.12 s  76.2 MiB/s    1562 ms      12 ms    1250 ms     925 ms
       2   62 500    1 300   1 200  4.95 MiB   65 ms  76.2 MiB/s      32 ms      12 ms      26 ms     313 ms
  frozen   62 400      320     318
  Frozen then because another iteration would not lower the downtime by a tenth.

The freeze: milliseconds since its begin; the bars span the downtime
   from     to   took
    0.0   10.0   10.0  |#                             |  source       freeze the tree
   10.0   90.0   80.0  | ########                     |  source       dump and compare memory
   20.0  130.0  110.0  |  ###########                 |  destination  store
  100.0  280.0  180.0  |          ##################  |  source       wait for the copy
  130.0  275.0  145.0  |             ###############  |  destination  restore
  280.0  302.0   22.0  |                            ##|  source       commit
  302.0  340.0   38.0  |                              |  source       end the source's tree
  Before it: look at the tree 12 ms, connect 28 ms, destination gets ready 10 ms.
  Waits while it ran: the source 1594 ms for the link, 24 ms for the destination, which worked 1276 ms.
  Waits while frozen: the source 180 ms: wait for the copy.
  Left to send when frozen: 1.25 MiB, predicted 1.00 MiB.
  CRIU: freezing 1.2 ms, memory dump 40 ms, memory write 35 ms,
        frozen 310 ms (CRIU's own figure: includes waiting for the destination).
  note: a hook said so
"##;

#[test]
fn short_phases_are_seen_and_none_reaches_out_of_the_window() {
    let cells = |begin, end| bar(begin, end, 300 * MS);
    assert_eq!(cells(0, 0), format!("|#{}|", " ".repeat(29)));
    assert_eq!(cells(299 * MS, 400 * MS), format!("|{}#|", " ".repeat(29)));
    assert_eq!(cells(-5 * MS, 1000 * MS), format!("|{}|", "#".repeat(30)));
    assert_eq!(cells(300 * MS, 400 * MS), format!("|{}|", " ".repeat(30)));
    assert_eq!(cells(-9 * MS, -MS), format!("|{}|", " ".repeat(30)));
    assert_eq!(cells(i64::MIN, i64::MAX), format!("|{}|", "#".repeat(30)));
    assert_eq!(bar(0, 5, 0), "");
}

#[test]
fn without_a_common_clock_no_downtime_is_made_up() {
    let mut report = made_up();
    (report.downtime, report.clock, report.accuracy) = (None, None, None);
    let text = lines(&report).join("\n");
    assert!(text.contains("downtime     unknown"), "{text}");
    assert!(
        text.contains("since the begin") && !text.contains('|'),
        "{text}"
    );
    assert!(!text.contains("predicted"), "{text}");
}

#[test]
fn clocks_that_cannot_be_told_apart_are_the_same() {
    let told = |ahead_ns, error_ns| clocks(ClockOffset { ahead_ns, error_ns });
    assert_eq!(told(-80_000, 80_000), "the same on both hosts ± 0.08 ms");
    assert!(told(3 * MS, 80_000).contains("3.0 ms ± 0.08 ms ahead"));
    assert!(told(i64::MIN, u64::MAX).contains("the same"));
}

#[test]
fn predictions_are_judged() {
    assert_eq!(off_by(ms(279), ms(300)), ", 7 % too low");
    assert_eq!(off_by(ms(330), ms(300)), ", 10 % too high");
    assert_eq!(off_by(ms(300), ms(300)), "");
    assert_eq!(off_by(ms(300), ms(0)), "");
}
