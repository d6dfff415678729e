//! The link: the session's connection, and meetings.

use std::time::{Duration, Instant};

use super::{Happening, Model, Record, Side};
use crate::handover::{Answer, Verdict};
use crate::wire::Message;

impl Model {
    fn delay(&mut self) -> Duration {
        let most = u64::try_from(self.conditions.most_delay.as_nanos())
            .unwrap()
            .max(1);
        // Mostly short, now and then as long as allowed.
        let bits = self.rng.below(24);
        Duration::from_nanos(self.rng.below(most) >> bits)
    }

    pub(super) fn work(&mut self, happening: Happening) {
        let at = self.now + self.delay() + Duration::from_millis(1);
        // Questions about the time end with the session.
        if !matches!(happening, Happening::AskClock) {
            self.add(at, happening);
        } else if self.in_session(Side::Source) && at < self.begun + Duration::from_secs(3) {
            // Later ones would only make silence impossible.
            self.add(at + Duration::from_secs(1), happening);
        }
    }

    pub(super) fn add(&mut self, at: Instant, happening: Happening) {
        self.number += 1;
        self.happenings.insert((at, self.number), happening);
    }

    pub(super) fn send(&mut self, to: Side, message: Message) {
        let delay = self.delay();
        let at = self.last_control[to as usize].max(self.now + delay);
        self.last_control[to as usize] = at;
        if !self.deaf[to as usize] {
            self.add(at, Happening::Message(to, message));
        }
        self.number += 1;
    }

    pub(super) fn put(&mut self, record: Record) {
        let delay = self.delay();
        self.last_record = self.last_record.max(self.now + delay);
        if !self.deaf[Side::Destination as usize] {
            self.add(self.last_record, Happening::Record(record));
        }
        self.number += 1;
    }

    // This side closes the connection: what it sent last may be lost with it.
    pub(super) fn close(&mut self, side: Side, well: bool) {
        let hears = side.other();
        if self.deaf[hears as usize] {
            // Its idle timeout tells it.
            let at = self.now + Duration::from_secs(self.rng.below(60));
            return self.add(at, Happening::Ended(hears, false));
        }
        let mut at = self.last_control[hears as usize];
        if self.rng.once_in(3) {
            self.lose(hears);
            at = self.now + self.delay();
        }
        self.deaf[hears as usize] = true;
        self.add(at.max(self.now), Happening::Ended(hears, well));
    }

    // What is on its way to this side does not arrive.
    pub(super) fn lose(&mut self, hears: Side) {
        self.happenings.retain(|_, happening| match happening {
            Happening::Message(side, _) => *side != hears,
            Happening::Record(_) => hears != Side::Destination,
            _ => true,
        });
    }

    pub(super) fn send_meet(&mut self, verdict: Verdict) {
        for _ in 0..self.copies() {
            self.meeting(Happening::Meet(verdict));
        }
    }

    pub(super) fn send_met(&mut self, answer: Answer) {
        for _ in 0..self.copies() {
            self.meeting(Happening::Met(answer));
        }
    }

    fn meeting(&mut self, happening: Happening) {
        let mut at = self.now + self.delay() + Duration::from_millis(1);
        if self.conditions.unreliable > 0 && self.rng.once_in(self.conditions.unreliable) {
            // Later than whoever sent it has patience.
            at += Duration::from_millis(self.rng.below(8000));
        }
        self.add(at, happening);
    }

    fn copies(&mut self) -> usize {
        let one_in = self.conditions.unreliable;
        if self.cut || (one_in > 0 && self.rng.once_in(one_in)) {
            0
        } else if one_in > 0 && self.rng.once_in(one_in) {
            2
        } else {
            1
        }
    }
}
