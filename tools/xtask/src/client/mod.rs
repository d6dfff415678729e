//! Clients of a service that moves: what they see, and what they remember to compare.

mod echo;
pub(crate) mod poll;
mod store;
mod stream;
mod timeline;

pub(crate) use echo::Connections;
pub(crate) use poll::{Poller, Question};
pub(crate) use store::{Protocol, Writer};
pub(crate) use stream::Download;
pub(crate) use timeline::{Gap, Latency};
