//! What is done in one run: drawn from its seed alone, so that a seed repeats it.

use std::fmt;

/// One run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) program: Program,
    pub(super) mode: Mode,
    pub(super) fault: Fault,
    pub(super) moment: Moment,
    /// How long the operator waits before a dead receiver is started again, in milliseconds.
    pub(super) restart_ms: u64,
}

/// Where images are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Mode {
    Disk,
    Tmpfs,
    Diskless,
}

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    Memcached,
    Nginx,
}

/// One of the two hosts, by its part in the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Source,
    Destination,
}

/// A process of crxfer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Victim {
    /// `crxfer migrate` or `crxfer recv`.
    Crxfer,
    /// The CRIU that this has started.
    Criu,
    /// The guard of it.
    Guard,
}

/// A line that can be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// The hosts no longer reach each other; clients reach both.
    Between,
    /// Nobody reaches that host.
    Of(Role),
}

/// What happens.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    /// SIGKILL to these, in this order, without a pause.
    Kill { at: Role, victims: Vec<Victim> },
    /// SIGSTOP, and SIGCONT after a while.
    Hang { at: Role, victim: Victim, ms: u64 },
    /// The line is down for a while.
    Cut { line: Line, ms: u64 },
    /// The line is down until the hosts are looked after.
    Gone { line: Line, until: Until },
}

/// What ends a line that is down for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// It is mended, and the hosts meet again.
    Mended,
    /// An operator decides on both hosts, then it is mended.
    Decided,
}

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Moment {
    /// By the clock: so far into a phase, from 0 to 1.
    Time { phase: Phase, part: f64 },
    /// When a process says that it is at this point, where it waits for a while.
    Point { at: Role, name: &'static str },
}

/// Part of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Precopy,
    /// From the freeze until the tree is dumped.
    Freeze,
    /// The rest is sent, the copy is built.
    Transfer,
    /// Around the destination's vote.
    Vote,
    Commit,
    Resume,
    /// The source's tree ends.
    End,
}

/// Points where `crxfer migrate` can be held, in their order.
const SOURCE_POINTS: [&str; 9] = [
    "iterating",
    "freezing",
    "held",
    "fenced",
    "before-commit-record",
    "committed",
    "commit-sent",
    "moved",
    "killed",
];
/// Points where `crxfer recv` can be held, in their order.
const DESTINATION_POINTS: [&str; 7] = [
    "receiving",
    "building",
    "held",
    "complete",
    "resuming",
    "resumed",
    "running",
];

/// Phases, and how many of 75 runs that go by the clock happen in each.
const PHASES: [(Phase, u64); 7] = [
    (Phase::Precopy, 16),
    (Phase::Freeze, 12),
    (Phase::Transfer, 16),
    (Phase::Vote, 8),
    (Phase::Commit, 8),
    (Phase::Resume, 8),
    (Phase::End, 7),
];

/// Kinds of faults, and how many of 100 runs have each.
const FAULTS: [(Kind, u64); 17] = {
    use Kind::{Cut, Gone, Hang, Kill};
    use Role::{Destination, Source};
    use Victim::{Criu, Crxfer, Guard};
    [
        (Kill(Source, &[Crxfer]), 10),
        (Kill(Destination, &[Crxfer]), 10),
        (Kill(Source, &[Criu]), 10),
        (Kill(Destination, &[Criu]), 10),
        (Kill(Source, &[Guard]), 4),
        (Kill(Destination, &[Guard]), 4),
        (Kill(Source, &[Crxfer, Criu]), 5),
        (Kill(Source, &[Criu, Crxfer]), 4),
        (Kill(Destination, &[Crxfer, Criu]), 5),
        (Kill(Destination, &[Criu, Crxfer]), 4),
        (Kill(Source, &[Guard, Crxfer]), 6),
        (Kill(Destination, &[Guard, Crxfer]), 6),
        (Cut, 8),
        (Gone(Until::Mended), 5),
        (Gone(Until::Decided), 3),
        (Hang(Source), 3),
        (Hang(Destination), 3),
    ]
};

#[derive(Clone, Copy, Debug)]
enum Kind {
    Kill(Role, &'static [Victim]),
    Cut,
    Gone(Until),
    Hang(Role),
}

impl Plan {
    /// What seed `seed` stands for.
    pub(super) fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let program = match random.below(5) {
            0..3 => Program::Memcached,
            _ => Program::Nginx,
        };
        let kind = random.weighted(&FAULTS);
        let moment = match random.below(4) {
            0 => Moment::any_point(&mut random),
            _ => Moment::Time {
                phase: random.weighted(&PHASES),
                part: random.part(),
            },
        };
        let fault = Fault::of(kind, &mut random);
        let restart_ms = 50 + random.below(1500);
        // Last, so that seeds stand for what they always have besides.
        let mode = match random.below(2) {
            0 => Mode::Disk,
            _ => Mode::Diskless,
        };
        Self {
            seed,
            program,
            mode,
            fault,
            moment,
            restart_ms,
        }
    }

    /// The same in that mode, if there is one.
    pub(super) fn in_mode(self, mode: Option<Mode>) -> Self {
        let mode = mode.unwrap_or(self.mode);
        Self { mode, ..self }
    }

    /// From `seed` on, `count` plans whose line contains `pattern`.
    pub(super) fn matching(seed: u64, count: usize, pattern: &str) -> Vec<Self> {
        const SEARCHED: u64 = 1_000_000;
        let plans = (seed..seed.saturating_add(SEARCHED)).map(Self::of);
        let wanted = plans.filter(|plan| plan.to_string().contains(pattern));
        wanted.take(count).collect()
    }

    /// A few runs, from `seed` on, that have every kind of fault once.
    pub(super) fn sample(seed: u64) -> Vec<Self> {
        let mut seen = Vec::new();
        let mut plans = Vec::new();
        for plan in (seed..).map(Self::of) {
            let kind = plan.fault.kind();
            if !seen.contains(&kind) {
                seen.push(kind);
                plans.push(plan);
            }
            if seen.len() == KINDS {
                break;
            }
        }
        plans
    }
}

impl Moment {
    fn any_point(random: &mut Random) -> Self {
        let all = SOURCE_POINTS.len() + DESTINATION_POINTS.len();
        let number = random.index(all);
        match number.checked_sub(SOURCE_POINTS.len()) {
            None => Self::Point {
                at: Role::Source,
                name: SOURCE_POINTS[number],
            },
            Some(number) => Self::Point {
                at: Role::Destination,
                name: DESTINATION_POINTS[number],
            },
        }
    }

    /// Its name, for counts.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Point { .. } => "point",
            Self::Time { phase, .. } => phase.name(),
        }
    }
}

/// Kinds of faults that [`Fault::kind`] tells apart.
const KINDS: usize = 13;

impl Fault {
    fn of(kind: Kind, random: &mut Random) -> Self {
        match kind {
            Kind::Kill(at, victims) => Self::Kill {
                at,
                victims: victims.to_vec(),
            },
            Kind::Cut => Self::Cut {
                line: Line::any(random),
                ms: 100 + random.below(2900),
            },
            Kind::Gone(until) => Self::Gone {
                line: Line::any(random),
                until,
            },
            Kind::Hang(at) => Self::Hang {
                at,
                victim: [Victim::Crxfer, Victim::Criu][random.index(2)],
                ms: 100 + random.below(2900),
            },
        }
    }

    /// Its name without details, for counts.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Kill { at, victims } => {
                let mut names: Vec<&str> = victims.iter().map(|victim| victim.name()).collect();
                names.sort_unstable();
                format!("kill {} {}", at.name(), names.join("+"))
            }
            Self::Hang { .. } => "hang".to_owned(),
            Self::Cut { .. } => "cut".to_owned(),
            Self::Gone { .. } => "cut for good".to_owned(),
        }
    }
}

impl Line {
    fn any(random: &mut Random) -> Self {
        [
            Self::Between,
            Self::Between,
            Self::Of(Role::Source),
            Self::Of(Role::Destination),
        ][random.index(4)]
    }
}

impl Program {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Memcached => "memcached",
            Self::Nginx => "nginx",
        }
    }
}

impl Mode {
    /// As `--mode` has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Tmpfs => "tmpfs",
            Self::Diskless => "diskless",
        }
    }
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl Victim {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Crxfer => "crxfer",
            Self::Criu => "criu",
            Self::Guard => "guard",
        }
    }
}

impl Phase {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Precopy => "pre-copy",
            Self::Freeze => "freeze",
            Self::Transfer => "transfer",
            Self::Vote => "vote",
            Self::Commit => "commit",
            Self::Resume => "resume",
            Self::End => "end",
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Between => f.write_str("between hosts"),
            Self::Of(role) => write!(f, "of {}", role.name()),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { at, victims } => {
                let names: Vec<&str> = victims.iter().map(|victim| victim.name()).collect();
                write!(f, "kill {} {}", at.name(), names.join("+"))
            }
            Self::Hang { at, victim, ms } => {
                write!(f, "hang {} {} {ms} ms", at.name(), victim.name())
            }
            Self::Cut { line, ms } => write!(f, "cut {line} {ms} ms"),
            Self::Gone { line, until } => {
                let until = match until {
                    Until::Mended => "until mended",
                    Until::Decided => "until decided",
                };
                write!(f, "cut {line} {until}")
            }
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time { phase, part } => write!(f, "{} {:.0} %", phase.name(), part * 100.0),
            Self::Point { at, name } => write!(f, "point {} {name}", at.name()),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (program, mode) = (self.program.name(), self.mode.name());
        write!(f, "{program}, {}, {}, {mode}", self.fault, self.moment)
    }
}

/// Numbers from a seed (splitmix64).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.below(count as u64)).unwrap_or(0)
    }

    /// From 0 to 1.
    fn part(&mut self) -> f64 {
        const STEPS: u32 = 10_000;
        f64::from(u32::try_from(self.below(u64::from(STEPS))).unwrap_or(0)) / f64::from(STEPS)
    }

    fn weighted<T: Copy>(&mut self, choices: &[(T, u64)]) -> T {
        let total = choices.iter().map(|(_, weight)| weight).sum();
        let mut number = self.below(total);
        for &(choice, weight) in choices {
            match number.checked_sub(weight) {
                None => return choice,
                Some(rest) => number = rest,
            }
        }
        unreachable!("a number below the sum of all weights")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: u64 = 4000;

    #[test]
    fn seed_repeats_its_plan() {
        assert_eq!(Plan::of(17), Plan::of(17));
        assert_ne!(Plan::of(17).to_string(), Plan::of(18).to_string());
    }

    #[test]
    fn a_third_of_the_runs_is_between_freeze_and_resume_and_a_quarter_at_points() {
        let (mut within, mut points) = (0, 0);
        for plan in (0..MANY).map(Plan::of) {
            match plan.moment {
                Moment::Time { phase, .. } if phase != Phase::Precopy && phase != Phase::End => {
                    within += 1;
                }
                Moment::Time { .. } => {}
                Moment::Point { .. } => points += 1,
            }
        }
        assert!(within * 3 > MANY, "{within}");
        assert!((900..1100).contains(&points), "{points}");
    }

    #[test]
    fn sample_has_every_kind_of_fault_and_both_programs() {
        let sample = Plan::sample(1);
        assert_eq!(sample.len(), KINDS);
        let kinds = |plans: &mut dyn Iterator<Item = Plan>| {
            let mut kinds: Vec<String> = plans.map(|plan| plan.fault.kind()).collect();
            kinds.sort();
            kinds.dedup();
            kinds
        };
        let of_all = kinds(&mut (0..MANY).map(Plan::of));
        assert_eq!(kinds(&mut sample.clone().into_iter()), of_all);
        for program in [Program::Memcached, Program::Nginx] {
            assert!(sample.iter().any(|plan| plan.program == program));
        }
    }

    #[test]
    fn half_of_the_runs_is_diskless() {
        let plans = (0..MANY).map(Plan::of);
        let diskless = plans.filter(|plan| plan.mode == Mode::Diskless).count();
        assert!((1900..2100).contains(&diskless), "{diskless}");
        let tmpfs = Plan::of(1).in_mode(Some(Mode::Tmpfs));
        assert_eq!((tmpfs.mode, tmpfs.fault), (Mode::Tmpfs, Plan::of(1).fault));
    }

    #[test]
    fn pattern_chooses_seeds() {
        let plans = Plan::matching(5, 3, "point source held");
        assert_eq!(plans.len(), 3);
        assert!(plans.iter().all(|plan| plan.seed >= 5));
        assert!(plans.iter().all(|plan| plan.moment.name() == "point"));
    }
}
