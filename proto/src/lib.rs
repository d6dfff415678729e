//! The protobuf messages of crxfer: CRIU's image messages and its own wire messages.
//!
//! Everything here is generated from the `.proto` files of this crate by `cargo xtask proto` and
//! committed, so that building crxfer needs no protobuf compiler. No logic lives here:
//! `crxfer::wire` and `crxfer::image` turn these into types that cannot be wrong.

/// Messages of CRIU image files.
pub mod criu {
    #![allow(
        missing_docs,
        reason = "generated; the .proto file documents the fields"
    )]
    include!("generated/criu.rs");

    /// Messages on the socket of `criu swrk`.
    pub mod rpc {
        #![allow(
            missing_docs,
            reason = "generated; the .proto file documents the fields"
        )]
        include!("generated/criu.rpc.rs");
    }

    /// Messages on the sockets of an image streamer.
    pub mod streamer {
        #![allow(
            missing_docs,
            reason = "generated; the .proto file documents the fields"
        )]
        include!("generated/criu.streamer.rs");
    }
}

/// Session and store messages, version 1.
pub mod v1 {
    #![allow(
        missing_docs,
        reason = "generated; the .proto files document the fields"
    )]
    include!("generated/crxfer.v1.rs");
}
