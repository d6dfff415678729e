//! The policy against a simulated link and a simulated zstd, in virtual time.

use super::*;

const FRAME: usize = 1 << 20;
/// What a connection holds between the writer and the wire.
const BUFFER: f64 = 4e6;
/// Reading and hashing what is sent.
const SOURCE_COST: f64 = 1.0 / 3e9;

#[derive(Clone, Copy, PartialEq)]
enum Data {
    /// Repeats a lot, like logs.
    Text,
    /// Words in any order, which zstd searches long.
    Words,
    Noise,
    /// Shrinks by a seventh only.
    Dense,
}

impl Data {
    /// Seconds for a byte of input and what is left of it.
    fn zstd(self, level: Level) -> (f64, f64) {
        match (self, level) {
            (Self::Text, Level::One) => (1.0 / 1.2e9, 0.33),
            (Self::Text, Level::Three) => (1.0 / 0.4e9, 0.28),
            (Self::Words, Level::One) => (1.0 / 0.22e9, 0.36),
            (Self::Words, Level::Three) => (1.0 / 0.14e9, 0.34),
            (Self::Noise, Level::One) => (1.0 / 8.0e9, 1.0),
            (Self::Noise, Level::Three) => (1.0 / 4.2e9, 1.0),
            (Self::Dense, Level::One) => (1.0 / 0.5e9, 0.86),
            (Self::Dense, Level::Three) => (1.0 / 0.2e9, 0.85),
        }
    }
}

/// A writer with a buffer before a link, whose rate depends on how many bytes were given to it.
struct World {
    now: f64,
    drained_until: f64,
    buffered: f64,
    last_report: f64,
    rate: f64,
    report: Report,
}

#[derive(Clone, Copy, Debug, Default)]
struct Report {
    seconds: f64,
    wire: f64,
    raw: usize,
    one: usize,
    three: usize,
    probes: usize,
    probe_seconds: f64,
}

impl World {
    fn new() -> Self {
        Self {
            now: 0.0,
            drained_until: 0.0,
            buffered: 0.0,
            last_report: 0.0,
            rate: 1.0,
            report: Report::default(),
        }
    }

    fn compress(&mut self, data: Data, level: Level, input: usize) -> Compressed {
        let (cost, fraction) = data.zstd(level);
        let took = cost * input as f64;
        self.now += took;
        Compressed {
            level,
            input,
            output: whole(input as f64 * fraction),
            took: Duration::from_secs_f64(took),
        }
    }

    fn send(&mut self, bytes: usize) -> Sent {
        let bytes = bytes as f64;
        self.drain();
        let waited = ((self.buffered + bytes - BUFFER) / self.rate).max(0.0);
        self.now += waited;
        self.drain();
        self.buffered += bytes;
        self.report.wire += bytes;
        let interval = self.now - self.last_report;
        self.last_report = self.now;
        Sent {
            bytes: whole(bytes) as u64,
            waited: Duration::from_secs_f64(waited),
            interval: Duration::from_secs_f64(interval),
        }
    }

    fn drain(&mut self) {
        let sent = (self.now - self.drained_until) * self.rate;
        self.buffered = (self.buffered - sent).max(0.0);
        self.drained_until = self.now;
    }

    fn finish(mut self) -> Report {
        self.report.seconds = self.now + self.buffered / self.rate;
        self.report
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a byte count of a test"
)]
fn whole(bytes: f64) -> usize {
    bytes as usize
}

/// Frames as (data, link rate while the frame is sent).
type Frames = Vec<(Data, f64)>;

fn frames(count: usize, data: Data, link: f64) -> Frames {
    vec![(data, link); count]
}

/// Sends `frames` as `policy` says.
fn transfer(policy: &mut CodecPolicy, frames: &Frames) -> Report {
    let mut world = World::new();
    for &(data, rate) in frames {
        world.rate = rate;
        world.now += SOURCE_COST * FRAME as f64;
        let mut step = policy.next_frame(FRAME);
        while let Step::Probe { level, bytes } = step {
            world.report.probes += 1;
            let result = world.compress(data, level, bytes);
            world.report.probe_seconds += result.took.as_secs_f64();
            step = policy.on_probed(result);
        }
        let mut bytes = FRAME;
        match step {
            Step::Compress(level) => {
                let result = world.compress(data, level, FRAME);
                if policy.on_compressed(result) {
                    bytes = result.output;
                }
                match level {
                    Level::One => world.report.one += 1,
                    Level::Three => world.report.three += 1,
                }
            }
            _ => world.report.raw += 1,
        }
        let sent = world.send(bytes);
        policy.on_sent(sent);
    }
    world.finish()
}

fn run(frames: &Frames) -> Report {
    transfer(&mut CodecPolicy::new(1), frames)
}

/// Sends `frames` with a fixed choice for each kind of data and rate.
fn fixed(frames: &Frames, choose: impl Fn(Data, f64) -> Option<Level>) -> f64 {
    let mut world = World::new();
    for &(data, rate) in frames {
        world.rate = rate;
        world.now += SOURCE_COST * FRAME as f64;
        let bytes = match choose(data, rate) {
            Some(level) => world.compress(data, level, FRAME).output,
            None => FRAME,
        };
        world.send(bytes);
    }
    world.finish().seconds
}

fn always_raw(frames: &Frames) -> f64 {
    fixed(frames, |_, _| None)
}

/// Knows the data and the link beforehand.
fn oracle(frames: &Frames) -> f64 {
    fixed(frames, |data, rate| {
        let seconds = |level: Level| {
            let (cost, fraction) = data.zstd(level);
            cost.max(fraction / rate)
        };
        let best = [Level::One, Level::Three]
            .into_iter()
            .min_by(|a, b| seconds(*a).total_cmp(&seconds(*b)))?;
        (seconds(best) < 1.0 / rate).then_some(best)
    })
}

#[track_caller]
fn assert_near_oracle(frames: &Frames, most: f64) -> Report {
    let report = run(frames);
    let ratio = report.seconds / oracle(frames);
    assert!(ratio <= most, "{ratio:.3} times the oracle: {report:?}");
    report
}

#[test]
fn text_on_a_gigabit_link_is_compressed() {
    let frames = frames(1000, Data::Text, 125e6);
    let report = assert_near_oracle(&frames, 1.05);
    assert!(report.raw <= 8, "{report:?}");
    assert!(report.seconds < always_raw(&frames) / 2.5);
}

#[test]
fn noise_goes_raw_on_any_link() {
    for link in [5e6, 125e6, 640e6, 1.25e9, 3e9, 50e9] {
        let frames = frames(1000, Data::Noise, link);
        let report = assert_near_oracle(&frames, 1.01);
        assert_eq!(report.raw, 1000, "{report:?}");
        // Even where the link hides it: this is CPU that both hosts could use.
        assert!(report.probe_seconds < report.seconds / 100.0, "{report:?}");
    }
}

#[test]
fn links_faster_than_zstd_carry_text_raw() {
    for link in [1.25e9, 3e9, 50e9] {
        let report = assert_near_oracle(&frames(1000, Data::Text, link), 1.02);
        assert_eq!(report.raw, 1000, "{link}: {report:?}");
    }
}

#[test]
fn a_link_that_never_makes_us_wait_costs_no_probe() {
    let report = run(&frames(1000, Data::Text, 50e9));
    assert_eq!(report.probes, 0);
}

#[test]
fn data_that_saves_little_is_left_alone_when_zstd_is_the_slower_one() {
    let report = assert_near_oracle(&frames(1000, Data::Dense, 640e6), 1.02);
    assert_eq!(report.raw, 1000, "{report:?}");
    let slow = run(&frames(1000, Data::Dense, 50e6));
    assert!(slow.raw < 20, "{slow:?}");
}

#[test]
fn change_of_data_is_followed_within_some_frames() {
    let kinds = [Data::Text, Data::Noise, Data::Text, Data::Noise, Data::Text];
    for link in [12.5e6, 125e6, 500e6] {
        let frames = kinds.map(|data| frames(200, data, link)).concat();
        let report = assert_near_oracle(&frames, 1.06);
        assert!(report.raw > 300, "noise went through zstd: {report:?}");
    }
}

#[test]
fn slow_data_after_fast_data_is_judged_by_itself() {
    let kinds = [
        Data::Noise,
        Data::Words,
        Data::Text,
        Data::Words,
        Data::Noise,
    ];
    for link in [50e6, 300e6, 640e6] {
        let frames = kinds.map(|data| frames(200, data, link)).concat();
        assert_near_oracle(&frames, 1.06);
    }
    let words = run(&frames(500, Data::Words, 640e6));
    assert_eq!(words.raw, 500, "{words:?}");
}

#[test]
fn frames_of_alternating_kinds_still_gain() {
    let pair = [(Data::Text, 125e6), (Data::Noise, 125e6)];
    let frames: Frames = pair.into_iter().cycle().take(1000).collect();
    assert_near_oracle(&frames, 1.05);
}

#[test]
fn change_of_the_link_is_followed() {
    let rates = [5e9, 50e6, 5e9, 125e6, 1.5e9];
    let frames = rates.map(|link| frames(300, Data::Text, link)).concat();
    assert_near_oracle(&frames, 1.10);
}

#[test]
fn level_three_is_for_very_slow_links() {
    let slow = assert_near_oracle(&frames(300, Data::Text, 5e6), 1.06);
    assert!(slow.three > 250, "{slow:?}");
    let gigabit = run(&frames(300, Data::Text, 125e6));
    assert_eq!(gigabit.three, 0, "{gigabit:?}");
}

#[test]
fn known_link_compresses_from_the_first_frame() {
    let mut policy = CodecPolicy::new(1);
    policy.assume_link(10e6);
    let report = transfer(&mut policy, &frames(20, Data::Text, 10e6));
    assert_eq!(report.raw, 0, "{report:?}");

    let mut policy = CodecPolicy::new(1);
    policy.assume_link(f64::NAN);
    policy.assume_link(0.0);
    assert_eq!(policy.link_bytes_per_s(), None);
}

#[test]
fn more_threads_make_compressing_worth_it_on_faster_links() {
    let link = 1.5e9;
    let decide = |threads| {
        let mut policy = CodecPolicy::new(threads);
        policy.assume_link(link);
        let Step::Probe { level, bytes } = policy.next_frame(FRAME) else {
            panic!("the first frame is tried");
        };
        policy.on_probed(World::new().compress(Data::Text, level, bytes))
    };
    assert_eq!(decide(1), Step::Raw);
    assert_eq!(decide(4), Step::Compress(Level::One));
}

#[test]
fn link_estimate_is_what_the_link_took() {
    for (data, link) in [
        (Data::Noise, 125e6),
        (Data::Text, 125e6),
        (Data::Noise, 640e6),
    ] {
        let mut policy = CodecPolicy::new(1);
        transfer(&mut policy, &frames(300, data, link));
        let ratio = policy.link_bytes_per_s().unwrap() / link;
        assert!((0.9..1.1).contains(&ratio), "{ratio}");
    }
}

#[test]
fn link_estimate_never_exceeds_what_the_waiting_allows() {
    let mut policy = CodecPolicy::new(1);
    policy.assume_link(50e6);
    for _ in 0..1000 {
        // A fifth of the time was waiting, in which the link took at most these bytes.
        policy.on_sent(Sent {
            bytes: 1 << 20,
            waited: Duration::from_millis(2),
            interval: Duration::from_millis(10),
        });
    }
    let most = f64::from(1 << 20) / 0.002;
    let estimate = policy.link_bytes_per_s().unwrap();
    assert!((most * 0.99..most * 1.01).contains(&estimate), "{estimate}");
}

#[test]
fn short_frames_and_senseless_reports_do_no_harm() {
    let mut policy = CodecPolicy::new(0);
    policy.assume_link(1e6);
    assert_eq!(policy.next_frame(0), Step::Raw);
    assert_eq!(policy.next_frame(511), Step::Raw);
    let nothing = Compressed {
        level: Level::One,
        input: 0,
        output: 0,
        took: Duration::ZERO,
    };
    policy.on_probed(nothing);
    policy.on_compressed(nothing);
    policy.on_sent(Sent {
        bytes: 0,
        waited: Duration::from_secs(1),
        interval: Duration::ZERO,
    });
    assert!(policy.link_bytes_per_s().is_some_and(f64::is_finite));
    assert_ne!(policy.next_frame(FRAME), Step::Raw);
}
