use clap::Parser;
use crxfer::hooks::Moment;

use super::super::{Cli, Command, RecvArgs};
use super::*;

fn parse(args: &[&str]) -> Result<Cli, String> {
    let all = ["crxfer"].iter().chain(args);
    Cli::try_parse_from(all).map_err(|error| error.to_string())
}

fn migrate(args: &[&str]) -> Result<MigrateArgs, String> {
    let all = [&["migrate", "--pid", "7", "--to", "@t"], args].concat();
    match parse(&all)?.command {
        Command::Migrate(args) => Ok(*args),
        other => panic!("{other:?}"),
    }
}

fn recv(args: &[&str]) -> Result<RecvArgs, String> {
    match parse(&[&["recv", "--dir", "d"], args].concat())?.command {
        Command::Recv(args) => Ok(*args),
        other => panic!("{other:?}"),
    }
}

#[test]
fn defaults_are_those_of_the_library() {
    let args = migrate(&[]).unwrap();
    let (ours, theirs) = (args.goals.to_goals(), Goals::default());
    assert_eq!(format!("{ours:?}"), format!("{theirs:?}"));
    assert_eq!(args.criu.to_options(), CriuOptions::default());
    assert_eq!(args.hooks.hook_timeout, crxfer::hooks::DEFAULT_TIME_LIMIT);
    assert_eq!(args.criu.program, PathBuf::from("criu"));
}

#[test]
fn goals_are_in_the_units_that_help_names() {
    let goals = migrate(&["--downtime", "300", "--deadline", "1.5", "--on-slow=cancel"])
        .unwrap()
        .goals
        .to_goals();
    assert_eq!(goals.downtime, Some(Duration::from_millis(300)));
    assert_eq!(goals.deadline, Some(Duration::from_millis(1500)));
    assert_eq!(goals.on_slow, OnSlow::Cancel);
    for wrong in ["0", "-1", "nan", "inf", "1e30", "ten"] {
        let text = migrate(&["--downtime", wrong]).unwrap_err();
        assert!(
            text.contains("milliseconds") || text.contains("unexpected"),
            "{text}"
        );
    }
    assert!(migrate(&["--max-iterations", "0"]).is_err());
}

#[test]
fn criu_is_told_what_was_asked() {
    let options = migrate(&[
        "--tcp-established",
        "--shell-job",
        "--external=mnt[/x]:x",
        "--external=dev[1/2]:y",
        "--manage-cgroups=none",
        "--criu-config=c.conf",
    ])
    .unwrap()
    .criu
    .to_options();
    let expected = CriuOptions {
        tcp_established: true,
        shell_job: true,
        external: vec!["mnt[/x]:x".into(), "dev[1/2]:y".into()],
        manage_cgroups: Some(CgroupMode::None),
        config_file: Some("c.conf".into()),
        ..CriuOptions::default()
    };
    assert_eq!(options, expected);
    assert!(
        migrate(&["--manage-cgroups=all"])
            .unwrap_err()
            .contains("strict")
    );
    assert!(migrate(&["--tcp-close", "--tcp-established"]).is_err());
}

#[test]
fn hooks_are_checked_before_anything_happens() {
    let args = migrate(&[
        "--hook",
        "before-source-kill=a=b",
        "--hook",
        "after-commit=c",
    ])
    .unwrap();
    let hooks = args.hooks.to_hooks().unwrap();
    assert!(hooks.has(Moment::BeforeSourceKill) && hooks.has(Moment::AfterCommit));
    assert!(
        migrate(&["--hook", "sometime=true"])
            .unwrap_err()
            .contains("after-commit")
    );
    assert!(
        migrate(&["--hook", "after-commit"])
            .unwrap_err()
            .contains("MOMENT=COMMAND")
    );
    let other_side = migrate(&["--hook", "address-prepare=true"]).unwrap();
    assert!(other_side.hooks.to_hooks().is_err());
}

#[test]
fn a_receiver_that_does_not_restore_takes_nothing_for_it() {
    for flag in [
        "--criu=/x",
        "--criu-config=f",
        "--hook=after-restore=true",
        "--hook-timeout=1",
    ] {
        let text = recv(&[flag]).unwrap_err();
        assert!(text.contains("--allow-restore"), "{text}");
        assert!(recv(&["--allow-restore", flag]).is_ok(), "{flag}");
    }
    assert!(!recv(&[]).unwrap().restore.allow_restore);
}
