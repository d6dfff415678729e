//! Replays the committed corpus of every fuzz target through the target's own body.

use std::fs;
use std::path::Path;

use crxfer::testing::fuzz::TARGETS;

fn replay(target: &str) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let (_, body) = TARGETS
        .iter()
        .find(|(name, _)| *name == target)
        .expect("a target of this name");
    let mut inputs = 0;
    for entry in fs::read_dir(corpus.join(target)).expect("every target has a corpus") {
        let path = entry.expect("the corpus can be listed").path();
        // Shown when the body panics.
        println!("{}", path.display());
        body(&fs::read(&path).expect("the corpus can be read"));
        inputs += 1;
    }
    assert!(inputs > 2, "a corpus of {inputs} inputs");
}

macro_rules! targets {
    ($($target:ident)*) => {
        $(
            #[test]
            fn $target() {
                replay(stringify!($target));
            }
        )*

        #[test]
        fn every_target_is_replayed() {
            let replayed = [$(stringify!($target)),*];
            let all: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(replayed.as_slice(), all);
        }
    };
}

targets! {
    image_framing pagemap inventory wire_message page_frame ticket store_index session preflight page_stream
    stream_note standby journal streamer
}
