//! Workload generators shared by the benches and by whoever needs a realistic image directory.
//!
//! Everything is a function of a seed: the same arguments give the same bytes on every host.

pub mod image;
pub mod pages;
