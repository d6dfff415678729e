//! Real programs with state in memory: started on one host, written to, checked on the other.

mod busy;
mod container;
mod echo;
mod memcached;
mod nginx;
mod redis;
mod script;
mod tree;
mod values;

use anyhow::{Result, bail};

pub(crate) use busy::BusyTree;
pub(crate) use container::Runc;
pub(crate) use echo::Echo;
pub(crate) use memcached::Memcached;
pub(crate) use nginx::{Nginx, Streaming};
pub(crate) use redis::Redis;
pub(crate) use script::Script;
pub(crate) use tree::Tree;
pub(crate) use values::Values;

use crate::hosts::Host;

/// A program whose memory can be told right from wrong.
pub(crate) trait Workload {
    /// Starts it and fills its memory. Gives its pid on `host`.
    fn start(&mut self, host: &Host) -> Result<u32>;

    /// Changes a part of its memory.
    fn write(&mut self, host: &Host) -> Result<()>;

    /// Compares all of its state with what was written. Gives how many values were compared.
    fn check(&self, host: &Host) -> Result<usize>;
}

/// Is the workload `name` that this program brings itself.
pub(crate) fn serve(name: &str) -> Result<()> {
    match name {
        "echo" => Echo::serve(),
        _ => bail!("there is no workload {name}"),
    }
}
