//! A page session, without I/O: the memory of one dump becomes the next generation of a name.
//!
//! ```text
//!  source                                            destination
//!    Hello (3 to 3) ---------------------------------> checks version and ticket
//!      <---------------------------------------------- Welcome
//!    Offer (name, what is known of it) --------------> what is held under that name?
//!      <---------------------------------------------- Offered
//!      <---------------------------------------------- Held ..., where the source does not know it
//!    Begin, Objects, frames, Runs, End on the bulk stream: hashes, writes
//!      <---------------------------------------------- Stored: checked, durable, visible
//! ```
//! Both sides are driven as those of [`session`](super).

mod destination;
mod source;
#[cfg(test)]
mod tests;

pub use destination::{PagesDestination, PagesDestinationCommand};
pub use source::{PagesBase, PagesSource, PagesSourceCommand};
