//! The journal's parser under any bytes.

use std::path::Path;

use super::{Line, State, checksum, parse};
use crate::handover::{DestinationState, Keep, SourceState};

/// The first byte says whose journal it is. What is taken is taken again when only the lines that
/// count are there, and a torn line behind them changes nothing.
///
/// # Panics
/// If that does not hold.
pub(crate) fn journal(data: &[u8]) {
    let Some((&side, bytes)) = data.split_first() else {
        return;
    };
    if side % 2 == 0 {
        check::<SourceState>(bytes);
    } else {
        check::<DestinationState>(bytes);
    }
}

fn check<S: State>(bytes: &[u8]) {
    let path = Path::new("journal");
    let Ok((history, whole)) = parse::<S>(bytes, path) else {
        return;
    };
    assert!(whole > 0 && whole <= bytes.len() && bytes[whole - 1] == b'\n');
    let torn = [&bytes[..whole], b"0123abcd {\"state"].concat();
    for same in [&bytes[..whole], &torn] {
        let (again, length) = parse::<S>(same, path).expect("it was taken");
        assert_eq!(length, whole);
        assert_eq!(again.entries, history.entries);
        assert_eq!(again.decided, history.decided);
    }
    let damaged = [&torn, b"\n".as_slice(), &bytes[..whole]].concat();
    assert!(parse::<S>(&damaged, path).is_err(), "damage in the middle");
}

/// Journals of both sides, for the corpus.
pub(crate) fn journal_seeds() -> Vec<Vec<u8>> {
    let source = r#"{"about":{"name":"web","tree":{"boot":"b","processes":[{"pid":7,"started":9}]},"addresses":["10.0.0.2:4433"],"peer":"k","identity":"/i","work":"/w","run_id":null,"foreign_tables":[],"criu":null,"fence":null,"on_partition":"hold","bound":["10.0.0.1"]}}"#;
    let destination = r#"{"about":{"name":"web","peer":"k","address":"10.0.0.1:9","place":"/p","facts":"01","options":{"tcp_established":true,"shell_job":false,"file_locks":false,"link_remap":false,"ext_unix_sk":false,"tcp_close":false,"external":[],"manage_cgroups":""},"program":"/criu","config_file":null,"hooks":[],"hook_limit_ms":1,"boot":"b","criu":null,"pid":7}}"#;
    let text = |json: &str| format!("{} {json}\n", checksum(json));
    let state = |state: &str| {
        text(&format!(
            r#"{{"state":{{"state":"{state}","at_ms":5,"note":"n"}}}}"#
        ))
    };
    let decided: Line<SourceState> = Line::Decided {
        keep: Keep::Source,
        at_ms: 6,
        by: "root".into(),
    };
    let decided = text(&serde_json::to_string(&decided).expect("plain data is JSON"));
    let begun = [text(source), state("begun")].concat();
    let freezing = [begun.clone(), state("freezing"), decided.clone()].concat();
    let received = [text(destination), state("receiving"), state("complete")].concat();
    let torn = [received.as_str(), &decided[..20]].concat();
    [(0, begun), (0, freezing), (1, received), (1, torn)]
        .map(|(side, text)| [&[side], text.as_bytes()].concat())
        .to_vec()
}
