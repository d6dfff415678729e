//! Wire messages of crxfer, generated from `proto/crxfer/v1/*.proto` by `cargo xtask proto`.
//!
//! No logic lives here; `crxfer::wire` turns these into types that cannot be wrong.

/// Session and store messages, version 1.
#[allow(missing_docs, clippy::all, unreachable_pub, reason = "generated code")]
pub mod v1 {
    include!("generated/crxfer.v1.rs");
}
