//! The other way round: `crxfer feed` to a real `criu page-server`, and the result restored.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::Store;
use super::{Case, NAME};
use crate::checkpoint::resolve;
use crate::criu::{self, Criu, End};
use crate::crxfer::Place;
use crate::e2e::{Context, Report};
use crate::run;
use crate::workload::{Memcached, Tree, Values, Workload};

const PORT: u16 = 27_002;

pub(super) fn cases(context: &Context, criu: &Criu, report: &mut Report) {
    let memcached =
        |_: &Path| -> Box<dyn Workload> { Box::new(Memcached::new(Values::new(2_000, 8192), 50)) };
    let tree = |place: &Path| -> Box<dyn Workload> { Box::new(Tree::new(place.to_owned())) };
    report.case("feed: an incremental set to criu page-server", || {
        feeds(context, Case::new(criu, Store::Disk, &memcached)?)
    });
    if let Ok(older) = run::target().and_then(|target| criu::ensure_older(&target)) {
        report.case("feed: to criu page-server 4.1", || {
            feeds(context, Case::new(&older, Store::Disk, &tree)?)
        });
    }
}

/// Two dumps travel to B, where the second lies upon the first; from there they are fed to a page server on
/// A, where the program is brought back to life.
fn feeds(context: &Context, mut case: Case<'_>) -> Result<String> {
    let (a, b) = (&case.hosts.a, &case.hosts.b);
    let receiver = context
        .crxfer
        .receive(Place::On(b), &case.received, "incremental", &[])?;
    let send = |images: &Path, name| context.crxfer.send(Place::On(a), images, &receiver, name);
    case.criu
        .dump(a, case.pid, &case.images(1), End::LeaveRunning, &[])?;
    send(&case.images(1), "earlier")?;
    case.workload.write(a)?;
    case.criu
        .dump(a, case.pid, &case.images(2), End::Kill, &[])?;
    send(&case.images(2), NAME)?;
    let set = case.received.join(NAME);
    ensure!(set.join("parent").exists(), "the set has no parent");

    let fed = case.scratch.path().join("fed");
    let server = case.criu.page_server(a, &fed, PORT)?;
    let mut command = context.crxfer.command(Place::On(b));
    command.args(["feed", "--to-criu", &format!("{}:{PORT}", a.address)]);
    let said = run::quiet(command.arg(&set))?;
    server.finish()?;
    for file in fs::read_dir(&set)? {
        let file = file?;
        let name = file.file_name();
        let text = name.to_string_lossy();
        let memory = text.starts_with("pagemap-") || text.starts_with("pages-");
        if !memory && text != "parent" {
            fs::copy(file.path(), fed.join(&name))?;
        }
    }
    resolve(&case.images(2))?
        .ensure_same(&resolve(&fed)?)
        .context("what the page server wrote")?;
    let work = case.scratch.path().join("restore");
    case.criu.restore(a, &fed, &work)?;
    let compared = case.workload.check(a);
    a.end(case.pid)?;
    ensure!(compared? > 0, "nothing was compared");
    Ok(said.trim().to_owned())
}
