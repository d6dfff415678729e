//! What tests and fuzz targets share; behind the feature `testing`, never in a release.
//!
//! ```text
//!  MemorySet ─► SourceHost ─► World: link in virtual time ─► DestinationHost ─► MemoryStore
//!                (Source)       encoded bytes, streams        (Destination)
//! ```

pub mod fuzz;
mod hosts;
mod rng;
mod session_fuzz;
mod sets;
mod small_disk;
mod standby_fuzz;
mod world;

pub use hosts::{
    AdmittedFrame, DestinationHost, DestinationOutput, Ended, SourceHost, SourceOutput,
    WrittenFrame, frame, framed, take_frame,
};
pub use rng::Rng;
pub use sets::{MemorySet, MemoryStore, PublishedSet};
pub use small_disk::SmallDisk;
pub use world::{Conditions, Outcome, Side, Tamper, Unit, World, transfer};
