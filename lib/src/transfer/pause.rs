//! Named points at which a test can stop a process, to end it there.
//!
//! `CRXFER_PAUSE=POINT:MILLISECONDS` makes the process write the point's name into the file that
//! `CRXFER_PAUSE_FILE` names, and sleep. Without the variable a point costs one comparison.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// Which variables it reads. No guard may have them: it would sleep where its parent should.
pub(super) const VARIABLES: [&str; 2] = ["CRXFER_PAUSE", "CRXFER_PAUSE_FILE"];

#[derive(Debug, PartialEq, Eq)]
struct Pause {
    point: String,
    length: Duration,
    file: Option<PathBuf>,
}

/// Sleeps where this point was asked for. Blocks the thread.
pub(crate) fn at(point: &str) {
    if let Some(length) = reached(point) {
        std::thread::sleep(length);
    }
}

/// The same of a task: others run on.
pub(crate) async fn at_point(point: &str) {
    if let Some(length) = reached(point) {
        tokio::time::sleep(length).await;
    }
}

fn reached(point: &str) -> Option<Duration> {
    static ASKED: OnceLock<Option<Pause>> = OnceLock::new();
    let asked = ASKED.get_or_init(|| {
        let [pause, file] = VARIABLES.map(std::env::var_os);
        parse(pause?.to_str()?, file.map(PathBuf::from))
    });
    let pause = asked.as_ref().filter(|pause| pause.point == point)?;
    if let Some(file) = &pause.file {
        // Whoever waits for it sees a whole name, or none.
        let _ = std::fs::write(file, point);
    }
    Some(pause.length)
}

fn parse(text: &str, file: Option<PathBuf>) -> Option<Pause> {
    let (point, length) = text.split_once(':')?;
    Some(Pause {
        point: point.to_owned(),
        length: Duration::from_millis(length.parse().ok()?),
        file,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_has_a_name_and_a_length() {
        let pause = parse("committed:1500", None).expect("well formed");
        assert_eq!(pause.point, "committed");
        assert_eq!(pause.length, Duration::from_millis(1500));
        for wrong in ["committed", "committed:", "committed:soon", ""] {
            assert_eq!(parse(wrong, None), None, "{wrong:?}");
        }
    }
}
