//! `crxfer action`: what CRIU's action-script calls.

use std::process::ExitCode;

use crxfer::transfer::external::action;

use crate::output::hint;

/// CRIU takes any other code than 0 for a refusal.
pub(crate) fn run() -> ExitCode {
    match action::report(|name| std::env::var_os(name)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            hint(&format!("crxfer action: {error}"));
            ExitCode::FAILURE
        }
    }
}
