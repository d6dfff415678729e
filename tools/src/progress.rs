//! What `crxfer send` shows while it works: a bar for people, lines for programs.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crxfer::transfer::Event;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde_json::json;

use crate::output;
use crate::size::{Bytes, rate, seconds};

/// At most five lines a second: documented in `crxfer send --help`.
const LINES_APART: Duration = Duration::from_millis(200);

/// Characters of a set's name beside the bar: the line must fit into 80.
const NAME_CHARS: usize = 24;

/// How often the bar is drawn in a second.
const DRAWS: u8 = 10;

/// Where the transfer stands. Fed by the transfer's tasks.
#[derive(Debug)]
pub(crate) struct Progress {
    json: bool,
    bar: ProgressBar,
    set: Mutex<Set>,
}

/// The set that is being sent.
#[derive(Debug, Default)]
struct Set {
    name: String,
    total: u64,
    begun: Option<Instant>,
    printed: Option<Instant>,
}

impl Progress {
    pub(crate) fn new(json: bool) -> Self {
        let bar = if json {
            ProgressBar::hidden()
        } else {
            // Draws nothing where stderr is no terminal.
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(DRAWS))
        };
        bar.set_style(ProgressStyle::with_template("{msg}").expect("the template is well-formed"));
        bar.set_message("looking at the images, connecting");
        Self {
            json,
            bar,
            set: Mutex::default(),
        }
    }

    pub(crate) fn take(&self, event: &Event) {
        match event {
            Event::SetBegun {
                name,
                total_bytes,
                ancestor,
            } => self.begin(name, *total_bytes, *ancestor),
            Event::Progress {
                done_bytes,
                wire_bytes,
                ..
            } => self.advance(*done_bytes, *wire_bytes),
            Event::Storing => self
                .bar
                .set_message(format!("{}: storing", shortened(&self.name()))),
            Event::Connected { .. }
            | Event::Received(_)
            | Event::Restored { .. }
            | Event::Holding { .. }
            | Event::Failed { .. } => {}
        }
    }

    /// Takes the bar away; what follows is the summary or an error.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    #[expect(clippy::disallowed_methods, reason = "rates need the time")]
    fn begin(&self, name: &str, total: u64, ancestor: bool) {
        *self.lock() = Set {
            name: name.to_owned(),
            total,
            begun: Some(Instant::now()),
            printed: None,
        };
        self.bar.reset();
        self.bar.set_length(total);
        let short = shortened(name);
        self.bar.set_message(if ancestor {
            format!("{short} (ancestor)")
        } else {
            short
        });
        self.bar.set_style(style());
        if self.json {
            // A stdout that fails must not end the transfer.
            let _ = output::json(
                &json!({"event": "begin", "name": name, "bytes": total, "ancestor": ancestor}),
            );
        }
    }

    #[expect(clippy::disallowed_methods, reason = "rates need the time")]
    fn advance(&self, done: u64, wire: u64) {
        self.bar.set_position(done);
        if !self.json {
            return;
        }
        let now = Instant::now();
        let mut set = self.lock();
        if !set.is_due(now) {
            return;
        }
        set.printed = Some(now);
        let time = set.begun.map_or(Duration::ZERO, |begun| now - begun);
        let _ = output::json(&json!({
            "event": "progress",
            "name": set.name,
            "done": done,
            "total": set.total,
            "wire": wire,
            "bytes_per_second": rate(done, time),
        }));
    }

    fn name(&self) -> String {
        self.lock().name.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Set> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Set {
    fn is_due(&self, now: Instant) -> bool {
        self.printed
            .is_none_or(|printed| now >= printed + LINES_APART)
    }
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= NAME_CHARS {
        return name.to_owned();
    }
    let begin: String = name.chars().take(NAME_CHARS - 1).collect();
    begin + "…"
}

fn style() -> ProgressStyle {
    type Out<'a> = &'a mut dyn std::fmt::Write;
    let done = |state: &ProgressState, out: Out<'_>| {
        let _ = write!(out, "{}", Bytes(state.pos()));
    };
    let all = |state: &ProgressState, out: Out<'_>| {
        let _ = write!(out, "{}", Bytes(state.len().unwrap_or(0)));
    };
    let speed = |state: &ProgressState, out: Out<'_>| {
        let _ = write!(out, "{}/s", Bytes(rate(state.pos(), state.elapsed())));
    };
    let left = |state: &ProgressState, out: Out<'_>| {
        let total = state.len().unwrap_or(0);
        let _ = out.write_str(&time_left(state.pos(), total, state.elapsed()));
    };
    ProgressStyle::with_template("{msg} [{wide_bar}] {done}/{all}  {speed}  {left} left")
        .expect("the template is well-formed")
        .progress_chars("=> ")
        .with_key("done", done)
        .with_key("all", all)
        .with_key("speed", speed)
        .with_key("left", left)
}

/// At the rate so far; unknown before there is one.
fn time_left(done: u64, total: u64, elapsed: Duration) -> String {
    const TOO_SOON: Duration = Duration::from_millis(500);
    let remaining = u128::from(total.saturating_sub(done));
    let left = (elapsed.as_millis() * remaining).checked_div(u128::from(done));
    match left {
        Some(millis) if elapsed >= TOO_SOON => {
            let millis = u64::try_from(millis).unwrap_or(u64::MAX);
            seconds(Duration::from_millis(millis))
        }
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "an instant to count from")]
    fn lines_are_a_fifth_of_a_second_apart() {
        let now = Instant::now();
        let mut set = Set::default();
        assert!(set.is_due(now));
        set.printed = Some(now);
        assert!(!set.is_due(now + Duration::from_millis(199)));
        assert!(set.is_due(now + Duration::from_millis(200)));
    }

    #[test]
    fn long_names_leave_room_for_the_bar() {
        assert_eq!(shortened("web-1"), "web-1");
        assert_eq!(shortened(&"ä".repeat(255)).chars().count(), NAME_CHARS);
    }

    #[test]
    fn the_time_left_follows_the_rate_so_far() {
        let second = Duration::from_secs(1);
        assert_eq!(time_left(25, 100, second), "3.00 s");
        assert_eq!(time_left(0, 100, second), "?");
        assert_eq!(time_left(1, u64::MAX, second / 10), "?");
        assert_eq!(time_left(100, 100, second), "0.00 s");
    }

    #[test]
    fn the_bar_can_be_drawn() {
        let _ = style();
    }
}
