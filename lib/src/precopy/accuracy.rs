//! How far off the predictions were.

use std::time::Duration;

use super::Prediction;

/// What really happened, once the workload runs on the destination.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// From the freeze until the workload ran.
    pub downtime: Duration,
    /// When that was, since the migration's start.
    pub finish: Duration,
    /// Bytes of pages that the frozen dump still had to send.
    pub changed_bytes: u64,
}

/// Predictions beside what was measured.
#[derive(Clone, Copy, Debug)]
pub struct Accuracy {
    /// The last prediction before the freeze.
    pub predicted: Prediction,
    /// Bytes that it expected to be left.
    pub predicted_changed_bytes: f64,
    /// What happened.
    pub measured: Measured,
    /// When the second iteration was done, the first moment at which a dirty rate is known: the finish
    /// predicted then. `None` if frozen before.
    pub early_finish: Option<Duration>,
}

impl Accuracy {
    /// Predicted by measured downtime: 1.2 is a fifth too high.
    pub fn downtime_ratio(&self) -> f64 {
        ratio(self.predicted.downtime, self.measured.downtime)
    }

    /// The same of the time to finish, as predicted last.
    pub fn finish_ratio(&self) -> f64 {
        ratio(self.predicted.finish, self.measured.finish)
    }

    /// The same of the time to finish, as predicted after the second iteration.
    pub fn early_finish_ratio(&self) -> Option<f64> {
        self.early_finish
            .map(|finish| ratio(finish, self.measured.finish))
    }
}

fn ratio(predicted: Duration, measured: Duration) -> f64 {
    predicted.as_secs_f64() / measured.as_secs_f64().max(1e-9)
}
