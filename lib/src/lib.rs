//! crxfer moves checkpoint state from a *source* host to a *destination* host, page by page, so that only
//! what the destination lacks crosses the wire, and only what is whole and checked is used there: CRIU image
//! directories, and running process trees.
//!
//! ```text
//!        source host                                              destination host
//!  dump/ inventory.img                                      DIR/dump/     inventory.img
//!        core-*.img …        ┌─ transfer::send ─┐                         core-*.img …
//!        pagemap-4.img  ───▶ │ blocks, digests  │ ═ QUIC ═▶ Receiver ───▶ pagemap-4.img
//!        pages-1.img         │ asks, compresses │ ◀════════ checks,       pages-1.img
//!        parent ─▶ ../1      └──────────────────┘           publishes     parent ─▶ ../.crxfer/base/7
//!                                                       DIR/.crxfer/      records, indexes, bases
//!
//!  a running tree       ┌─ transfer::migrate ───────┐       Receiver with restore
//!   memory, again   ──▶ │ compares with what was    │ ═════▶ iterations as image directories
//!   and again           │ sent, sends what differs  │
//!   frozen: criu swrk ─▶│ the same of CRIU's dump   │ ═════▶ criu swrk builds the copy, holds it
//!   ends it          ◀──│ Commit when it is built   │ ◀════▶ lets it run
//!                       └───────────────────────────┘
//! ```
//!
//! - [`image`]: image directories as files: chains of parents, pagemaps, whether CRIU could restore one.
//! - [`digest`], [`delta`], [`wire`], [`session`]: what a set is, what of it must be sent, and in which
//!   messages. No sockets, no files, no clock: the session is driven by events and `now`.
//!   [`session::migration`] says who owns a tree that moves.
//! - [`store`]: the receiving directory: published sets, their generations, what builds on what.
//! - [`live`]: the memory of a running process tree, read from outside without stopping it.
//! - [`precopy`]: when to freeze it. No I/O and no clock.
//! - [`criu`]: CRIU driven by RPC, and the protocols in which it sends memory and whole images.
//! - [`archive`]: checkpoints of containers in one file, as podman exports them.
//! - [`standby`]: the destination's copy in the making.
//! - [`preflight`], [`hooks`]: what is checked before; an operator's commands at named moments.
//! - `transport` and `transfer` (feature `net`, on by default): QUIC, and the drivers that join all this:
//!   `transfer::send`, `transfer::Receiver`, `transfer::migrate::migrate`.
//!
//! docs/ARCHITECTURE.md tells how it hangs together, docs/PROTOCOL.md what crosses the wire.
//!
//! What it does **not** do: dump or restore by itself (CRIU does), follow symbolic links out of an image
//! directory, move the files that a program has open, or keep images secret once they are on a disk. A
//! program that drives migrations and has no guard ([`transfer::guard`]) leaves what it was at to
//! [`transfer::finish`] when it dies. A restored image is code that runs: take images only from hosts that you trust with that, and trees
//! (`ReceiveOptions::restore`) from nobody whom you would not make root.
//!
//! # Example
//!
//! Both ends in one program; usually they are two hosts, and the ticket goes from one to the other.
//!
#![cfg_attr(feature = "net", doc = "```no_run")]
#![cfg_attr(not(feature = "net"), doc = "```ignore")]
//! use crxfer::sink::SinkKind;
//! use crxfer::transfer::{Event, Events, ReceiveOptions, Receiver, SendOptions, Target, send};
//! use crxfer::transport::{Identity, Options};
//! use crxfer::wire::Layout;
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let receiver = Receiver::bind(ReceiveOptions {
//!         directory: "/var/lib/images".into(),
//!         listen: vec!["[::]:0".parse()?],
//!         layout: Layout::Incremental,
//!         max_set_bytes: None,
//!         keep: 0,
//!         restore: None,
//!         state: None,
//!         guard: None,
//!         identity: None,
//!         peers: Vec::new(),
//!         transport: Options::default(),
//!         sink: SinkKind::Disk,
//!         sink_bytes: None,
//!         events: Events::new(|event| {
//!             if let Event::Received(set) = event {
//!                 println!("{} is {}", set.path.display(), set.completeness);
//!             }
//!         }),
//!     })?;
//!     let ticket = receiver.ticket().expect("no peers are pinned").clone();
//!
//!     let sending = send(SendOptions {
//!         directory: "dump".into(),
//!         name: None,
//!         base: None,
//!         page_size: None,
//!         bytes_per_s: None,
//!         target: Target::Ticket(ticket),
//!         identity: Identity::generate()?,
//!         memo: None,
//!         transport: Options::default(),
//!         events: Events::none(),
//!     });
//!     // `true`: end when one set is received.
//!     let (report, ()) = tokio::join!(sending, receiver.run(true));
//!     let (out, back) = report?.wire_bytes;
//!     println!("{} bytes crossed the wire", out + back);
//!     receiver.close().await;
//!     Ok(())
//! }
//! ```

pub mod archive;
pub mod criu;
pub mod delta;
pub mod digest;
pub mod handover;
pub mod hooks;
pub mod identity;
pub mod image;
pub mod live;
pub mod page;
pub mod precopy;
pub mod preflight;
pub mod runtime;
pub mod session;
pub mod sink;
pub mod standby;
pub mod store;
mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod text;
pub mod ticket;
#[cfg(feature = "net")]
pub mod transfer;
#[cfg(feature = "net")]
pub mod transport;
pub mod tree;
pub mod wire;
