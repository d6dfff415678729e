//! Waiting for the moment, and doing what is to happen then.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use super::ground::{Diary, Ground, Hold};
use super::moving::Moving;
use super::plan::{Fault, Line, Moment, Phase, Plan, Role, Victim};
use super::processes::{self, Found};
use super::timing::Timing;

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

/// Waits until `moment`; false if the migration has ended before.
pub(super) fn await_moment(
    plan: &Plan,
    moving: &mut Moving,
    hold: Option<&Hold>,
    timing: &Timing,
) -> bool {
    let due = |moving: &Moving| match plan.moment {
        Moment::Point { .. } => hold.is_some_and(Hold::is_reached).then(Instant::now),
        Moment::Time { phase, part } => {
            let mark = match phase {
                Phase::Precopy => Some(moving.begin),
                _ => moving.told("freezing"),
            };
            mark.map(|mark| mark + timing.offset(phase, part))
        }
    };
    let at = loop {
        if let Some(at) = due(moving) {
            break at;
        }
        if moving.ended().is_some() {
            return false;
        }
        thread::sleep(Duration::from_micros(300));
    };
    thread::sleep(at.saturating_duration_since(Instant::now()));
    true
}

/// Does it. `None` if what it is done to never came.
pub(super) fn strike(
    ground: &Ground,
    plan: &Plan,
    moving: &mut Moving,
    diary: &mut Diary,
) -> Result<Option<Strike>> {
    let undo = match &plan.fault {
        Fault::Kill { at, victims } => {
            let Some(found) = find(ground, *at, victims, moving) else {
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
            let Some(found) = find(ground, *at, &[*victim], moving) else {
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
            cut(ground, *line, true)?;
            diary.note(format!("cut the line {line}"));
            Some(Undo {
                due: Some(Instant::now() + Duration::from_millis(*ms)),
                what: What::Mend(*line),
            })
        }
        Fault::Gone { line, .. } => {
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

/// Those of `victims` that are there; waits for one of them until the migration has ended.
fn find(ground: &Ground, at: Role, victims: &[Victim], moving: &mut Moving) -> Option<Vec<Found>> {
    let host = ground.network.host(ground.side(at));
    loop {
        let found: Vec<Found> = victims
            .iter()
            .flat_map(|&victim| processes::of(host, victim))
            .collect();
        if !found.is_empty() {
            return Some(found);
        }
        if moving.ended().is_some() {
            return None;
        }
        thread::sleep(Duration::from_micros(300));
    }
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
