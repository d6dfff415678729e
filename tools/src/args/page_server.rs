//! `crxfer page-server` and `crxfer feed`: both ends of CRIU's page-server protocol.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueHint};
use crxfer::criu::page_server::HeaderLayout;
use crxfer::delta::SetName;
use crxfer::page::PageSize;

use super::migrate::seconds;
use super::{DestinationArgs, TransportArgs, page_size, set_name};
use crate::exit;
use crate::size::Rate;

const EXAMPLES: &str = "\
Examples:
  crxfer page-server --listen 127.0.0.1:27001 --to crxfer1-… --name web-1 &
    criu dump -t 4711 -D images --page-server --address 127.0.0.1 --port 27001
    crxfer send images --to crxfer1-… --name web-1      then adds the images that are no memory
  crxfer page-server --fd 3 --to @ticket --name web-1   CRIU has the other end: --ps-socket";

/// Let CRIU dump memory straight to another host, where only what changed is sent
///
/// Takes what `criu dump --page-server`, `criu pre-dump --page-server`, `runc checkpoint --page-server`
/// and others send to a page server, of CRIU 3.4 to 4.2. `crxfer recv` at the other end makes the set
/// NAME of it, in state pages: one generation for each dump, built on the one before by content, so that
/// pages that are there already do not cross the wire, whatever CRIU tracks. Then `crxfer send DIR --name
/// NAME` adds CRIU's other images, and the set is complete.
///
/// CRIU is told that all is well only after the destination has checked and stored everything. Where that
/// fails, or somebody stalls, CRIU is refused, and the application runs on; nothing of the dump is kept.
/// One dump is taken at a time, others wait for their turn. Whoever can connect to the port can send
/// memory under this name: listen at 127.0.0.1, or use --fd.
///
/// CRIU corks its TCP socket, which costs a dump 0.2 s of freeze. Where CRIU runs on this host (and in
/// this network namespace) that is undone, which needs the right to trace it; --fd with a UNIX socket has
/// no cork.
///
/// Ctrl-C or SIGTERM end it; a dump under way is refused. With --once the exit code is then 130, and 13
/// where CRIU ended without sending memory.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = exit::help(EXAMPLES))]
pub(crate) struct PageServerArgs {
    /// Address and TCP port to listen at. Port 0: any free one, which is printed
    #[arg(long, value_name = "ADDR:PORT", required_unless_present = "fd")]
    pub(crate) listen: Option<SocketAddr>,

    /// Or: a connected stream socket that this command inherits; CRIU gets the other end, for one
    /// invocation after the other
    #[arg(long, value_name = "N", conflicts_with = "listen",
        value_parser = clap::value_parser!(i32).range(0..))]
    pub(crate) fd: Option<i32>,

    #[command(flatten)]
    pub(crate) destination: DestinationArgs,

    /// Name of the set at the destination
    #[arg(long, value_parser = set_name)]
    pub(crate) name: SetName,

    /// CRIU is run with --prev-images-dir and --track-mem: it may leave out what it knows to be unchanged
    ///
    /// From the second dump on. Only for a CRIU whose command line cannot be seen here, as one that runc or
    /// p.haul starts, or on another host; `criu` on this host tells it itself. A CRIU that has no such
    /// directory fails when it hears that there is a parent.
    #[arg(long)]
    pub(crate) prev_images: bool,

    /// End after one dump, whether it could be taken or not
    #[arg(long)]
    pub(crate) once: bool,

    /// Seconds that the destination may keep CRIU waiting at a stretch, after which CRIU is refused and the
    /// application runs on
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub(crate) freeze_limit: Duration,

    /// Seconds that CRIU may be silent in the middle of a dump before its connection is closed
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub(crate) silence_limit: Duration,

    /// Most bytes (not bits) a second on the wire (K, M, G: powers of 1024)
    #[arg(long, value_name = "RATE")]
    pub(crate) bwlimit: Option<Rate>,

    /// Print one JSON object a line instead of text
    ///
    /// {"event":"ready","address","fd"} when CRIU may come (one of the two is null),
    /// {"event":"begin","address","pid"} when a dump begins (pid of CRIU, where it runs here),
    /// {"event":"taken","address","pid","headers","tasks_and_segments","bytes","name","generation",
    /// "pages","fresh_pages","stored_bytes","notes"} when it is stored and CRIU was told so (from name on
    /// null if CRIU sent no memory), {"event":"failed","address","pid","error"} when CRIU was refused,
    /// {"event":"error","error","exit_code"} at the end if that is one.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) transport: TransportArgs,
}

/// Send the pages of an image directory to a `criu page-server`
///
/// The other way round: for a host that has CRIU and no crxfer. All pages of DIR are sent, those of its
/// parents too, so that what the server writes needs no parent. The other images are not sent, as CRIU's
/// protocol has no place for them: copied beside the pages they make the server's directory one that
/// `criu restore` takes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer feed images/web-1 --to-criu 192.0.2.7:27001     there: criu page-server -D web-1 --port 27001
  crxfer feed images/web-1 --to-criu 192.0.2.7:27001 --criu-version 4.1
  crxfer feed images/web-1 --to-criu 192.0.2.7:27001 && scp images/web-1/[!p]*.img images/web-1/p[!a]*.img 192.0.2.7:web-1/")]
pub(crate) struct FeedArgs {
    /// The image directory, in any layout
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: PathBuf,

    /// Where `criu page-server` listens
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to_criu: String,

    /// Version of CRIU there: up to 4.1 and since 4.2 it speaks differently [default: found out]
    #[arg(long, value_name = "X.Y", value_parser = criu_version)]
    pub(crate) criu_version: Option<HeaderLayout>,

    /// Seconds that the server may take for an answer
    #[arg(long, value_name = "S", default_value = "30", value_parser = seconds)]
    pub(crate) timeout: Duration,

    /// Page size in bytes of the host that dumped [default: found from the files]
    #[arg(long, value_name = "BYTES", value_parser = page_size)]
    pub(crate) page_size: Option<PageSize>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The headers of a version of CRIU.
fn criu_version(text: &str) -> Result<HeaderLayout, String> {
    let mut numbers = text.split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (4, 2) => Ok(HeaderLayout::New),
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (3, 5) => Ok(HeaderLayout::Old),
        (Some(Ok(major)), Some(Ok(_))) if major > 0 => {
            Err("CRIU before 3.5 cannot take all pages".to_owned())
        }
        _ => Err("not a version, such as 4.1 or 4.2".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_their_headers() {
        for (text, layout) in [
            ("4.2", HeaderLayout::New),
            ("4.2.1", HeaderLayout::New),
            ("4.10", HeaderLayout::New),
            ("5.0", HeaderLayout::New),
            ("4.1", HeaderLayout::Old),
            ("4.1.1", HeaderLayout::Old),
            ("3.17", HeaderLayout::Old),
        ] {
            assert_eq!(criu_version(text), Ok(layout), "{text}");
        }
        for text in ["", "4", "v4.2", "3.4", "0.0", "4.x"] {
            assert!(criu_version(text).is_err(), "{text}");
        }
    }
}
