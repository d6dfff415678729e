use std::time::Duration;

use crxfer::transport::Attempt;
use crxfer::wire::Failure;

use super::*;

fn of(error: impl Into<TransferError>) -> Exit {
    Exit::from(&error.into())
}

fn peer(code: FailureCode) -> Exit {
    of(SessionError::Peer(Failure::new(code, "why")))
}

fn io(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

#[test]
fn codes_are_documented_and_keep_their_numbers() {
    let codes: Vec<_> = Exit::ALL.iter().map(|(exit, _)| exit.code()).collect();
    assert_eq!(
        codes,
        [
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 130
        ]
    );
    let text = help("Examples:");
    for (exit, meaning) in Exit::ALL {
        assert!(text.contains(&format!("{:>3}  {meaning}", exit.code())));
    }
}

#[test]
fn images_that_cannot_be_sent_are_the_sets_fault() {
    let path = || "dump".into();
    assert_eq!(of(ImageError::NoDirectory(path())), Exit::Set);
    let dangling = ImageError::DanglingParent {
        path: path(),
        target: "../0".into(),
    };
    assert_eq!(of(dangling), Exit::Set);
    let damaged = TransferError::Incomplete {
        directory: path(),
        what: "damaged".into(),
    };
    assert_eq!(of(damaged), Exit::Set);
    assert_eq!(of(TransferError::Layout("no".into())), Exit::Set);
    assert_eq!(peer(FailureCode::Image), Exit::Set);
}

#[test]
fn this_hosts_files_and_the_other_hosts_are_told_apart() {
    let full = StoreError::Io {
        what: "write",
        path: "images".into(),
        source: io(28),
    };
    assert_eq!(of(full), Exit::Storage);
    assert_eq!(of(StoreError::Busy("images".into())), Exit::Storage);
    let unreadable = TransferError::Read {
        path: "core-1.img".into(),
        source: io(5),
    };
    assert_eq!(of(unreadable), Exit::Storage);
    let key = IdentityError::Io {
        doing: "read",
        path: "key".into(),
        source: io(13),
    };
    assert_eq!(of(key), Exit::Storage);
    assert_eq!(
        of(SessionError::Local(Failure::new(FailureCode::Storage, ""))),
        Exit::Storage
    );
    for code in [
        FailureCode::Storage,
        FailureCode::Name,
        FailureCode::Held,
        FailureCode::Internal,
    ] {
        assert_eq!(peer(code), Exit::Destination, "{code:?}");
    }
}

#[test]
fn sets_that_are_not_there_are_not_a_storage_fault() {
    assert_eq!(of(StoreError::NoSuchSet("a".into())), Exit::Set);
    assert_eq!(of(StoreError::NotAStore("a".into())), Exit::Set);
    let garbled = StoreError::Io {
        what: "open",
        path: "index".into(),
        source: io::Error::new(io::ErrorKind::InvalidData, "not a whole index"),
    };
    assert_eq!(of(garbled), Exit::Set);
}

#[test]
fn keys_and_tickets() {
    assert_eq!(of(SessionError::Ticket), Exit::Authentication);
    assert_eq!(peer(FailureCode::Ticket), Exit::Authentication);
    assert_eq!(of(TransportError::KeyRefused), Exit::Authentication);
    let exposed = IdentityError::Exposed {
        path: "key".into(),
        mode: 0o644,
    };
    assert_eq!(of(exposed), Exit::Authentication);
    let exists = IdentityError::Exists { path: "key".into() };
    assert_eq!(of(exists), Exit::Usage);
    assert_eq!(of(crxfer::ticket::TicketError::Damaged), Exit::Usage);
}

#[test]
fn the_address_that_answered_decides_how_connecting_failed() {
    let attempt = |error| Attempt {
        address: ([192, 0, 2, 7], 1).into(),
        error,
    };
    let failed = |errors: Vec<AttemptError>| {
        of(ConnectError::Failed(
            errors.into_iter().map(attempt).collect(),
        ))
    };
    let silent = || AttemptError::Timeout(Duration::from_secs(10));
    assert_eq!(
        failed(vec![AttemptError::Refused, silent()]),
        Exit::Connection
    );
    let found = crxfer::identity::Fingerprint([1; 32]);
    assert_eq!(
        failed(vec![silent(), AttemptError::WrongKey { found }]),
        Exit::Authentication
    );
    assert_eq!(
        failed(vec![AttemptError::Incompatible, silent()]),
        Exit::Version
    );
    let refused = AttemptError::Handshake(TransportError::KeyRefused);
    assert_eq!(failed(vec![refused]), Exit::Authentication);
}

#[test]
fn lost_connections_are_worth_another_try() {
    for error in [
        TransportError::Timeout,
        TransportError::Reset,
        TransportError::CutShort,
        TransportError::StreamStopped(CloseCode::Unspecified),
    ] {
        assert_eq!(of(error.clone()), Exit::Connection, "{error}");
    }
    assert_eq!(of(SessionError::Silent(60)), Exit::Connection);
    assert_eq!(peer(FailureCode::Cancelled), Exit::Connection);
    let taken = BindError::Socket {
        address: ([127, 0, 0, 1], 1).into(),
        source: io(98),
    };
    assert_eq!(of(taken), Exit::Connection);
}

#[test]
fn close_codes_say_what_failures_say() {
    let closed = |code| {
        of(TransportError::PeerClosed {
            code,
            reason: String::new(),
        })
    };
    for (code, exit) in [
        (CloseCode::Unspecified, Exit::Connection),
        (CloseCode::Done, Exit::Connection),
        (CloseCode::Cancelled, Exit::Connection),
        (CloseCode::Busy, Exit::Connection),
        (CloseCode::ShuttingDown, Exit::Connection),
        (CloseCode::Unauthorized, Exit::Authentication),
        (CloseCode::Incompatible, Exit::Version),
        (CloseCode::ProtocolViolation, Exit::Version),
        (CloseCode::ContentMismatch, Exit::Content),
        (CloseCode::LimitExceeded, Exit::Limit),
        (CloseCode::LocalFailure, Exit::Destination),
        (CloseCode::Other(99), Exit::Destination),
    ] {
        assert_eq!(closed(code), exit, "{code}");
    }
}

#[test]
fn content_limits_and_versions() {
    assert_eq!(of(SessionError::Root), Exit::Content);
    assert_eq!(
        of(SessionError::Changed("pages-1.img".into())),
        Exit::Content
    );
    assert_eq!(of(ImageError::Changed("pages-1.img".into())), Exit::Content);
    assert_eq!(peer(FailureCode::Content), Exit::Content);
    assert_eq!(
        of(SessionError::TooLarge { size: 2, limit: 1 }),
        Exit::Limit
    );
    assert_eq!(peer(FailureCode::Limit), Exit::Limit);
    assert_eq!(of(SessionError::Protocol("no")), Exit::Version);
    assert_eq!(peer(FailureCode::Version), Exit::Version);
    assert_eq!(peer(FailureCode::Protocol), Exit::Version);
    assert_eq!(of(TransportError::Incompatible), Exit::Version);
    assert_eq!(of(TransferError::Cancelled), Exit::Stopped);
    assert_eq!(of(TransportError::ClosedHere), Exit::Fault);
}

#[test]
fn a_migrations_code_says_what_ended_it() {
    use crxfer::criu::CriuError;
    use crxfer::hooks::{HookError, Moment};
    use crxfer::precopy::Why;

    let ended = |error: MigrateError, owner| {
        Exit::from(&MigrateFailure {
            error,
            owner,
            untouched: false,
            destination_is_clean: true,
        })
    };
    let of = |error| ended(error, Owner::Source);
    let session = |error: SessionError| of(TransferError::from(error).into());
    let hook = HookError::TimedOut {
        moment: Moment::AfterFreeze,
        command: "sleep 9".into(),
        limit: Duration::from_secs(5),
        output: String::new(),
    };
    let limit = SessionError::FreezeLimit(Duration::from_secs(10));
    assert_eq!(of(MigrateError::Preflight(Vec::new())).code(), 11);
    assert_eq!(of(MigrateError::GivenUp(Why::Deadline)).code(), 12);
    assert_eq!(of(CriuError::NoSocket { pid: 1 }.into()).code(), 13);
    assert_eq!(of(MigrateError::Memory("cut".into())).code(), 13);
    let there = SessionError::Peer(Failure::new(FailureCode::Criu, "CRIU's restore failed"));
    let refused = SessionError::Peer(Failure::new(FailureCode::Refused, "--allow-restore"));
    let hook_there = SessionError::Peer(Failure::new(FailureCode::Hook, "hook failed"));
    assert_eq!(session(there).code(), 13);
    assert_eq!(session(hook_there).code(), 15);
    assert_eq!(session(refused).code(), 7);
    assert_eq!(ended(MigrateError::Stopped, Owner::InDoubt).code(), 14);
    assert_eq!(of(hook.into()).code(), 15);
    assert_eq!(session(limit).code(), 16);
    assert_eq!(of(MigrateError::Stopped).code(), 130);
    assert_eq!(of(PreflightError::NoProcess(7).into()).code(), 2);
    assert_eq!(session(SessionError::Silent(9)).code(), 5);
    assert_eq!(session(SessionError::Ticket).code(), 4);
}
