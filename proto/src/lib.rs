//! The protobuf messages of crxfer: CRIU's image messages and its own wire messages.
//!
//! Everything here is generated from the `.proto` files of this crate by `cargo xtask proto` and
//! committed, so that building crxfer needs no protobuf compiler. No logic lives here.

/// Messages of CRIU image files.
pub mod criu {
    #![allow(
        missing_docs,
        reason = "generated; the .proto file documents the fields"
    )]
    include!("generated/criu.rs");
}
