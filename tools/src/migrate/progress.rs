//! What `crxfer migrate` shows while it works: a line for people, lines for programs.

use std::io::IsTerminal as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crxfer::precopy::Prediction;
use crxfer::transfer::migrate::{HostCheck, IterationReport, MigrateEvent};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::{checks, json};
use crate::args::MigrateArgs;
use crate::output::{self, hint};
use crate::size::{Bytes, seconds};

/// At most five lines a second: documented in `crxfer migrate --help`.
const LINES_APART: Duration = Duration::from_millis(200);

/// How often the line is drawn in a second.
const DRAWS: u8 = 10;

/// Where the migration stands. Fed by its task.
#[derive(Debug)]
pub(super) struct Progress {
    json: bool,
    dry_run: bool,
    pid: u32,
    bar: ProgressBar,
    begun: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What is under way, for an operator who asks twice.
    doing: String,
    printed: Option<Instant>,
    checks_shown: bool,
    in_doubt: bool,
}

impl Progress {
    #[expect(
        clippy::disallowed_methods,
        reason = "the time to finish counts from here"
    )]
    pub(super) fn new(args: &MigrateArgs, pid: u32) -> Self {
        let bar = if args.json {
            ProgressBar::hidden()
        } else {
            // Draws nothing where stderr is no terminal.
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(DRAWS))
        };
        bar.set_style(ProgressStyle::with_template("{wide_msg}").expect("it is well-formed"));
        let doing = "looking at the tree and at both hosts";
        bar.set_message(doing);
        Self {
            json: args.json,
            dry_run: args.dry_run,
            pid,
            bar,
            begun: Instant::now(),
            state: Mutex::new(State {
                doing: doing.to_owned(),
                printed: None,
                checks_shown: false,
                in_doubt: false,
            }),
        }
    }

    pub(super) fn take(&self, event: MigrateEvent) {
        match event {
            MigrateEvent::Preflight(checks) => {
                self.checks(&checks);
            }
            MigrateEvent::Warning(text) => {
                self.say(
                    &json!({"event": "warning", "text": text}),
                    &[format!("! {text}")],
                );
            }
            MigrateEvent::IterationBegun(number) => self.doing(format!("iteration {number}")),
            MigrateEvent::Progress {
                number,
                scanned_bytes,
                memory_bytes,
                wire_bytes,
                prediction,
            } => self.advance(number, scanned_bytes, memory_bytes, wire_bytes, &prediction),
            MigrateEvent::IterationDone(iteration) => self.iterated(&iteration),
            MigrateEvent::Freezing => {
                self.doing("frozen: dumping and sending the rest".to_owned());
                self.say(&json!({"event": "freezing"}), &[]);
            }
            MigrateEvent::Built => {
                self.doing("frozen: the copy stands there, handing over".to_owned());
                self.say(&json!({"event": "built"}), &[]);
            }
            MigrateEvent::InDoubt(error) => self.in_doubt(&error),
        }
    }

    /// Shows what was found, once.
    pub(super) fn checks(&self, found: &[HostCheck]) {
        if std::mem::replace(&mut self.lock().checks_shown, true) {
            return;
        }
        let lines = checks::lines(found, self.dry_run, colour(self.dry_run));
        if self.dry_run && !self.json {
            // It is the result of this run. A stdout that fails must not end it.
            self.bar.suspend(|| {
                let _ = lines.iter().try_for_each(|line| output::line(line));
            });
        } else {
            let event = json!({"event": "preflight", "checks": json::checks(found)});
            self.say(&event, &lines);
        }
    }

    /// The operator has asked, for the `asked`th time.
    pub(super) fn stopping(&self, asked: u32) {
        let (doing, in_doubt) = {
            let state = self.lock();
            (state.doing.clone(), state.in_doubt)
        };
        let text = match (in_doubt, asked) {
            (true, _) => "crxfer: leaving the workload held; crxfer recover says more".to_owned(),
            (false, 1) => "crxfer: stopping; the workload will run on here, unless it runs on the destination already"
                .to_owned(),
            (false, _) => format!(
                "crxfer: still waiting ({doing}): for the workload to run here again and for the destination to \
                 remove what came, or for its word that the copy runs"
            ),
        };
        self.bar.suspend(|| hint(&text));
    }

    /// Takes the line away; what follows is the report or an error.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    #[expect(clippy::disallowed_methods, reason = "lines are printed by the time")]
    fn advance(&self, number: u32, scanned: u64, memory: u64, wire: u64, prediction: &Prediction) {
        let now = Instant::now();
        let elapsed = now - self.begun;
        self.bar
            .set_message(line(number, scanned, memory, prediction, elapsed));
        let mut state = self.lock();
        let is_due = state
            .printed
            .is_none_or(|printed| now >= printed + LINES_APART);
        if !self.json || !is_due {
            return;
        }
        state.printed = Some(now);
        let mut event = json!({
            "event": "progress",
            "iteration": number,
            "scanned_bytes": scanned,
            "memory_bytes": memory,
            "wire_bytes": wire,
        });
        merge(&mut event, json::prediction(prediction));
        let _ = output::json(&event);
    }

    fn iterated(&self, iteration: &IterationReport) {
        let mut event = json!({"event": "iteration"});
        merge(&mut event, json::iteration(iteration));
        self.say(&event, &[]);
    }

    fn in_doubt(&self, error: &str) {
        self.lock().in_doubt = true;
        self.doing("in doubt: held until the hosts meet".to_owned());
        let advice = doubt(self.pid);
        let event = json!({"event": "in-doubt", "error": error, "advice": advice.join(" ")});
        let mut lines = vec![format!("crxfer: IN DOUBT: {error}")];
        lines.extend(advice.iter().map(|text| format!("  {text}")));
        self.say(&event, &lines);
    }

    // Programs get the event, people the lines.
    fn say(&self, event: &Value, lines: &[String]) {
        if self.json {
            // A stdout that fails must not end the migration.
            let _ = output::json(event);
        } else {
            self.bar
                .suspend(|| lines.iter().for_each(|line| hint(line)));
        }
    }

    fn doing(&self, what: String) {
        self.bar.set_message(what.clone());
        self.lock().doing = what;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is going on, and what to do, where nobody here knows whether the copy of `pid` runs.
fn doubt(pid: u32) -> [String; 7] {
    [
        "The destination was told to let the copy run, and has not answered. It may run, or not.".into(),
        format!("Process {pid} and its children are held frozen here, so that nothing runs twice."),
        "crxfer asks again every second: as soon as both hosts meet, this goes on by itself.".into(),
        "If they never will, look there (crxfer recv prints \"running\"; a client gets answers), then:".into(),
        "- it runs there: crxfer recover --keep-destination".into(),
        "- it does not, and never will: crxfer recover --keep-source".into(),
        "Ctrl-C leaves it held: a guard goes on asking, and crxfer recover works then, too.".into(),
    ]
}

fn colour(on_stdout: bool) -> bool {
    let is_terminal = if on_stdout {
        std::io::stdout().is_terminal()
    } else {
        std::io::stderr().is_terminal()
    };
    is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn line(
    number: u32,
    scanned: u64,
    memory: u64,
    prediction: &Prediction,
    elapsed: Duration,
) -> String {
    let left = prediction.finish.saturating_sub(elapsed);
    let percent = u128::from(scanned) * 100 / u128::from(memory.max(scanned).max(1));
    // What matters most first: a narrow terminal cuts the end.
    format!(
        "iteration {number}  {percent} % of {}  downtime {}  {} left  dirty {}  link {}",
        Bytes(memory.max(scanned)),
        milliseconds(prediction.downtime),
        seconds(left),
        rate(prediction.dirty_bytes_per_s),
        rate(prediction.link_bytes_per_s),
    )
}

/// `12.0 MiB/s`, or `?` while unknown.
pub(super) fn rate(bytes_per_s: f64) -> String {
    match whole(bytes_per_s) {
        0 => "?".to_owned(),
        rate => format!("{}/s", Bytes(rate)),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and a rate is for people"
)]
fn whole(number: f64) -> u64 {
    number.round() as u64
}

/// `0.25 ms`, `312 ms`, and `14.3 s` where it is long.
pub(super) fn milliseconds(time: Duration) -> String {
    match time.as_millis() {
        0 => format!("{:.2} ms", time.as_secs_f64() * 1e3),
        1..10 => format!("{:.1} ms", time.as_secs_f64() * 1e3),
        10..2_000 => format!("{:.0} ms", time.as_secs_f64() * 1e3),
        _ => seconds(time),
    }
}

fn merge(into: &mut Value, more: Value) {
    if let (Value::Object(into), Value::Object(more)) = (into, more) {
        into.extend(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_where_it_stands() {
        let prediction = Prediction {
            downtime: Duration::from_millis(312),
            final_downtime: Duration::from_millis(200),
            finish: Duration::from_secs(20),
            dirty_bytes_per_s: 5.0 * 1024.0 * 1024.0,
            link_bytes_per_s: 0.0,
            hash_bytes_per_s: 0.0,
        };
        assert_eq!(
            line(2, 1 << 20, 4 << 20, &prediction, Duration::from_secs(6)),
            "iteration 2  25 % of 4.00 MiB  downtime 312 ms  14.0 s left  dirty 5.00 MiB/s  link ?"
        );
        // More than was expected to be there, and later than expected.
        let late = line(2, 5 << 20, 4 << 20, &prediction, Duration::from_secs(60));
        assert!(late.contains("100 % of 5.00 MiB") && late.contains("0.00 s left"));
        assert!(line(1, 0, 0, &prediction, Duration::ZERO).contains("0 % of 0 B"));
    }

    #[test]
    fn times_have_the_digits_that_matter() {
        let of = |micros| milliseconds(Duration::from_micros(micros));
        assert_eq!(of(250), "0.25 ms");
        assert_eq!(of(1_234), "1.2 ms");
        assert_eq!(of(312_400), "312 ms");
        assert_eq!(of(14_300_000), "14.3 s");
    }

    #[test]
    fn a_doubt_comes_with_what_to_do() {
        let text = doubt(4711).join("\n");
        for word in [
            "4711",
            "frozen",
            "--keep-destination",
            "--keep-source",
            "Ctrl-C",
        ] {
            assert!(text.contains(word), "{word} is not in {text}");
        }
    }

    #[test]
    fn rates_that_are_no_numbers_do_no_harm() {
        for unknown in [0.0, -1.0, f64::NAN] {
            assert_eq!(rate(unknown), "?");
        }
        assert!(rate(f64::INFINITY).ends_with("/s"));
    }
}
