//! Waiting for the moment, and doing what is to happen then.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use super::ground::{Diary, Ground, Hold};
use super::moving::Moving;
use super::plan::{Fault, Line, Moment, Plan, Role, Victim};
use super::processes::{self, Found};
use super::timing::{Mark, Timing};

/// Between looks at what a migration does.
const LOOK: Duration = Duration::from_micros(200);

/// Finding processes takes about as long.
const SEARCH: Duration = Duration::from_millis(2);

/// What has happened, and what of it is still to be undone.
#[derive(Debug)]
pub(super) struct Strike {
    pub(super) at: Instant,
    pub(super) undo: Option<Undo>,
}

/// How a fault ends.
#[derive(Debug)]
pub(super) struct Undo {
    /// When; `None`: when the hosts are looked after.
    pub(super) due: Option<Instant>,
    what: What,
}

#[derive(Debug)]
enum What {
    Mend(Line),
    Continue(Vec<Found>),
}

/// Waits until it is known when the plan's moment is, and gives that; `None` if the migration has ended
/// before.
pub(super) fn await_moment(
    plan: &Plan,
    moving: &mut Moving,
    hold: Option<&Hold>,
    timing: &Timing,
) -> Option<Instant> {
    loop {
        let at = match plan.moment {
            Moment::Point { .. } => hold.is_some_and(Hold::is_reached).then(Instant::now),
            Moment::Time { phase, part } => {
                let mark = match phase.mark() {
                    Mark::Start => Some(moving.begin),
                    Mark::Told(event) => moving.told(event),
                };
                mark.map(|mark| mark + timing.offset(phase, part))
            }
        };
        if at.is_some() || moving.ended().is_some() {
            return at;
        }
        thread::sleep(LOOK);
    }
}

/// Does it at that moment. `None` if what it is done to never came.
pub(super) fn strike(
    ground: &Ground,
    plan: &Plan,
    moment: Instant,
    moving: &mut Moving,
    diary: &mut Diary,
) -> Result<Option<Strike>> {
    let undo = match &plan.fault {
        Fault::Kill { at, victims } => {
            let Some(found) = find(ground, *at, victims, moment, moving) else {
                return Ok(None);
            };
            for process in &found {
                process.signal(Signal::KILL);
            }
            for process in &found {
                diary.note(format!("killed {}", process.line()));
            }
            None
        }
        Fault::Hang { at, victim, ms } => {
            let Some(found) = find(ground, *at, &[*victim], moment, moving) else {
                return Ok(None);
            };
            for process in &found {
                process.signal(Signal::STOP);
                diary.note(format!("stopped {}", process.line()));
            }
            Some(Undo {
                due: Some(Instant::now() + Duration::from_millis(*ms)),
                what: What::Continue(found),
            })
        }
        Fault::Cut { line, ms } => {
            sleep_until(moment);
            cut(ground, *line, true)?;
            diary.note(format!("cut the line {line}"));
            Some(Undo {
                due: Some(Instant::now() + Duration::from_millis(*ms)),
                what: What::Mend(*line),
            })
        }
        Fault::Gone { line, .. } => {
            sleep_until(moment);
            cut(ground, *line, true)?;
            diary.note(format!("cut the line {line}"));
            Some(Undo {
                due: None,
                what: What::Mend(*line),
            })
        }
    };
    Ok(Some(Strike {
        at: Instant::now(),
        undo,
    }))
}

/// Those of `victims` that are there at that moment; waits for one of them until the migration has
/// ended.
fn find(
    ground: &Ground,
    at: Role,
    victims: &[Victim],
    moment: Instant,
    moving: &mut Moving,
) -> Option<Vec<Found>> {
    let host = ground.network.host(ground.side(at));
    sleep_until(moment - SEARCH);
    loop {
        let found: Vec<Found> = victims
            .iter()
            .flat_map(|&victim| processes::of(host, victim))
            .collect();
        // Once more if there is time: others may come meanwhile.
        let is_time = Instant::now() + SEARCH / 2 >= moment;
        if is_time && !found.is_empty() {
            sleep_until(moment);
            return Some(found);
        }
        if moving.ended().is_some() {
            return None;
        }
        thread::sleep(LOOK);
    }
}

fn sleep_until(moment: Instant) {
    thread::sleep(moment.saturating_duration_since(Instant::now()));
}

fn cut(ground: &Ground, line: Line, is_cut: bool) -> Result<()> {
    match line {
        Line::Between => ground.network.part(is_cut),
        Line::Of(role) => ground.network.plug(ground.side(role), !is_cut),
    }
}

impl Undo {
    /// Undoes it. `shells` are the programs that have entered the hosts: they stop with what they
    /// started.
    pub(super) fn done(self, ground: &Ground, shells: &[u32], diary: &mut Diary) -> Result<()> {
        match self.what {
            What::Mend(line) => {
                cut(ground, line, false)?;
                diary.note(format!("mended the line {line}"));
            }
            What::Continue(found) => {
                for process in &found {
                    process.signal(Signal::CONT);
                }
                for &shell in shells {
                    crate::hosts::go_on(shell);
                }
                diary.note("let go on what was stopped");
            }
        }
        Ok(())
    }
}
