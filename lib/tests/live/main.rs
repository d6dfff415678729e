//! The live reader against real processes, and against what CRIU dumps of them.

mod criu;
mod kinds;
mod running;
mod support;
