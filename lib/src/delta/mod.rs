//! What a destination lacks, and how it is packed for the wire.

pub mod codec;
