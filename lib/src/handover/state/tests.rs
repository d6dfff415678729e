use super::*;

const SOURCE: [SourceState; 8] = [
    SourceState::Begun,
    SourceState::Freezing,
    SourceState::Fencing,
    SourceState::Committed,
    SourceState::Moved,
    SourceState::Keeping,
    SourceState::Kept,
    SourceState::Over,
];

const DESTINATION: [DestinationState; 7] = [
    DestinationState::Receiving,
    DestinationState::Complete,
    DestinationState::Resuming,
    DestinationState::Running,
    DestinationState::Removing,
    DestinationState::Removed,
    DestinationState::Over,
];

const DECIDED: [Option<Keep>; 3] = [None, Some(Keep::Source), Some(Keep::Destination)];
const VERDICTS: [Verdict; 3] = [Verdict::Ask, Verdict::Commit, Verdict::Abort];
const RUNS: Answer = Answer::Runs { pid: 7 };
const ANSWERS: [Answer; 5] = [
    Answer::Unknown,
    Answer::Holds,
    RUNS,
    Answer::Removed,
    Answer::Busy,
];

// One line for each state, one column for each that may follow.
fn table<S: Copy>(all: &[S], may_become: impl Fn(S, S) -> bool) -> Vec<String> {
    let line = |from: &S| {
        let column = |to: &S| if may_become(*from, *to) { 'x' } else { '.' };
        all.iter().map(column).collect()
    };
    all.iter().map(line).collect()
}

#[test]
fn the_source_takes_these_steps_and_no_others() {
    let expected = [
        // begun, freezing, fencing, committed, moved, keeping, kept, over
        ".x...x..", // begun
        "..xx.x..", // freezing
        "...x.x..", // fencing
        "....xx..", // committed
        ".......x", // moved
        "...x..x.", // keeping
        "....x..x", // kept
        "........", // over
    ];
    assert_eq!(table(&SOURCE, SourceState::may_become), expected);
}

#[test]
fn the_destination_takes_these_steps_and_no_others() {
    let expected = [
        // receiving, complete, resuming, running, removing, removed, over
        ".x..x..", // receiving
        "..x.x..", // complete
        "...xx..", // resuming
        "....x.x", // running
        ".....x.", // removing
        "......x", // removed
        ".......", // over
    ];
    assert_eq!(table(&DESTINATION, DestinationState::may_become), expected);
}

#[test]
fn what_a_source_does_alone() {
    use SourceDuty::{
        AskOperator, EndTree, EndTreeAndTell, HoldAndTell, KeepTree, Nothing, TellAbort,
    };
    // With the tree, then without; for nothing decided, the source, the destination.
    let expected = [
        [[KeepTree; 3], [KeepTree; 3]],
        [[KeepTree; 3], [AskOperator, KeepTree, EndTreeAndTell]],
        [[KeepTree; 3], [AskOperator, KeepTree, EndTreeAndTell]],
        [
            [HoldAndTell, KeepTree, EndTreeAndTell],
            [HoldAndTell, HoldAndTell, EndTreeAndTell],
        ],
        [[EndTree; 3], [EndTree; 3]],
        [[KeepTree; 3], [AskOperator, KeepTree, EndTreeAndTell]],
        [[TellAbort; 3], [TellAbort; 3]],
        [[Nothing; 3], [Nothing; 3]],
    ];
    for (state, expected) in SOURCE.into_iter().zip(expected) {
        for (has_tree, expected) in [true, false].into_iter().zip(expected) {
            let found = DECIDED.map(|decided| state.duty(has_tree, decided));
            assert_eq!(found, expected, "{state:?}, tree: {has_tree}");
        }
    }
}

#[test]
fn what_a_destination_does_alone() {
    use DestinationDuty::{GiveBack, Hold, Remove, Resume, Tell};
    const RUN: DestinationDuty = Tell(Answer::Runs { pid: 0 });
    // For the verdicts ask, commit, abort; each for nothing decided, the source, the destination.
    let expected = [
        [[Remove; 3]; 3],
        [
            [Hold, Remove, Resume],
            [Resume, Remove, Resume],
            [Remove, Remove, Remove],
        ],
        [
            [Resume, GiveBack, Resume],
            [Resume, GiveBack, Resume],
            [GiveBack; 3],
        ],
        [[RUN; 3], [RUN; 3], [RUN, Remove, RUN]],
        [[Remove; 3]; 3],
        [[Tell(Answer::Removed); 3]; 3],
        [[Tell(Answer::Unknown); 3]; 3],
    ];
    for (state, expected) in DESTINATION.into_iter().zip(expected) {
        for (verdict, expected) in VERDICTS.into_iter().zip(expected) {
            let found = DECIDED.map(|decided| state.duty(verdict, decided));
            assert_eq!(found, expected, "{state:?}, {verdict:?}");
        }
    }
}

#[test]
fn only_these_answers_move_a_source() {
    let mut moves = Vec::new();
    for state in SOURCE {
        for answer in ANSWERS {
            for decided in DECIDED {
                if let Some(next) = state.answered(answer, decided) {
                    assert!(state.may_become(next), "{state:?} to {next:?}");
                    moves.push((state, answer, decided, next));
                }
            }
        }
    }
    let any = |state, answer, next| DECIDED.map(|decided| (state, answer, decided, next));
    let mut expected = Vec::new();
    let committed = SourceState::Committed;
    for (looked, next) in [
        (Keep::Source, SourceState::Keeping),
        (Keep::Destination, SourceState::Moved),
    ] {
        expected.push((committed, Answer::Unknown, Some(looked), next));
    }
    expected.extend(any(committed, RUNS, SourceState::Moved));
    expected.extend(any(committed, Answer::Removed, SourceState::Keeping));
    let kept = SourceState::Kept;
    expected.extend(any(kept, Answer::Unknown, SourceState::Over));
    let copy = Some(Keep::Destination);
    expected.push((kept, RUNS, copy, SourceState::Moved));
    expected.extend(any(kept, Answer::Removed, SourceState::Over));
    assert_eq!(moves, expected);
}

#[test]
fn two_run_only_where_the_tree_does_not_wait_for_an_answer() {
    for state in SOURCE {
        let kept = matches!(state, SourceState::Keeping | SourceState::Kept);
        assert_eq!(state.is_contradicted(RUNS), kept, "{state:?}");
        assert!(!state.is_contradicted(Answer::Holds), "{state:?}");
        let given = matches!(state, SourceState::Committed | SourceState::Moved);
        assert_eq!(state.is_given_away(), given, "{state:?}");
    }
    for state in DESTINATION {
        let ours = matches!(
            state,
            DestinationState::Resuming | DestinationState::Running
        );
        assert_eq!(state.is_ours(), ours, "{state:?}");
    }
}
