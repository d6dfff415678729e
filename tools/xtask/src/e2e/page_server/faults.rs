//! What is killed or hangs in the middle of a dump: the program runs on with all its values, the
//! destination shows nothing of the dump, and the next one is taken.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::endpoint::Endpoint;
use super::{Case, NAME, Store};
use crate::criu::{Criu, End};
use crate::crxfer::Receiver;
use crate::e2e::{Context, Report, Scope};
use crate::hosts::{Host, Rate};
use crate::run;
use crate::workload::{Memcached, Values, Workload};

/// Who goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    CriuKilled,
    EndpointKilled,
    EndpointStopped,
    ReceiverKilled,
    LineDead,
}

impl Fault {
    const ALL: [(Self, &str); 5] = [
        (Self::CriuKilled, "killed CRIU"),
        (Self::EndpointKilled, "killed crxfer page-server"),
        (Self::EndpointStopped, "stopped crxfer page-server"),
        (Self::ReceiverKilled, "killed crxfer recv"),
        (Self::LineDead, "dead line"),
    ];
}

/// When, after CRIU's first message.
const MOMENTS_MS: [u64; 3] = [0, 300, 900];

pub(super) fn cases(context: &Context, criu: &Criu, report: &mut Report) {
    let moments = match context.scope {
        Scope::Quick => &MOMENTS_MS[1..2],
        _ => &MOMENTS_MS[..],
    };
    for (fault, name) in Fault::ALL {
        report.case(&format!("page-server: {name} in a dump"), || {
            let mut remarks = Vec::new();
            for moment in moments {
                let after = Duration::from_millis(*moment);
                let remark = goes_wrong(context, criu, fault, after);
                remarks.push(remark.with_context(|| format!("after {moment} ms"))?);
            }
            Ok(remarks.join("; "))
        });
    }
}

fn goes_wrong(context: &Context, criu: &Criu, fault: Fault, after: Duration) -> Result<String> {
    let memcached =
        |_: &Path| -> Box<dyn Workload> { Box::new(Memcached::new(Values::new(6_000, 8192), 50)) };
    let case = Case::new(criu, Store::Disk, &memcached)?;
    // 48 MB take 2 s.
    case.hosts.shape(Rate::Megabits(200))?;
    let mut receiver = case.receive(context)?;
    let serve = |receiver: &Receiver| {
        let limit = ["--freeze-limit", "3"];
        Endpoint::listening(context, &case.hosts.a, &case.scratch, receiver, &limit)
    };
    let mut endpoint = serve(&receiver)?;
    let words = endpoint.words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (host, images) = (&case.hosts.a, case.images(1));
    let (dumped, took) = thread::scope(|scope| {
        let dump = scope.spawn(|| criu.dump(host, case.pid, &images, End::Kill, &words));
        let begun = endpoint.next("begin")?;
        thread::sleep(after);
        let since = Instant::now();
        match fault {
            Fault::CriuKilled => {
                let pid = begun["pid"].as_u64().context("no pid of CRIU")?;
                host.signal(u32::try_from(pid)?, "KILL")?;
            }
            Fault::EndpointKilled => endpoint.kill(),
            Fault::EndpointStopped => endpoint.terminate()?,
            Fault::ReceiverKilled => receiver.kill(),
            Fault::LineDead => set_line(&case.hosts.b, "down")?,
        }
        let dumped = dump.join().map_err(|_| anyhow!("the dump panicked"))?;
        Ok::<_, anyhow::Error>((dumped, since.elapsed()))
    })?;
    ensure!(dumped.is_err(), "CRIU's dump succeeded");
    ensure!(
        took < Duration::from_secs(8),
        "CRIU was let go after {took:?}"
    );
    let compared = case.workload.check(host);
    // CRIU killed while the program runs code of CRIU's takes it along, whoever takes the pages.
    let remark = match compared {
        Err(_) if fault == Fault::CriuKilled && host.session_of(case.pid).is_empty() => {
            return Ok("CRIU took the program with it".to_owned());
        }
        compared => format!("{} values after {:.1} s", compared?, took.as_secs_f64()),
    };
    ensure!(
        !case.received.join(NAME).exists(),
        "there is a set of half a dump"
    );
    set_line(&case.hosts.b, "up")?;
    drop(endpoint);
    receiver.kill();
    let receiver = case.receive(context)?;
    let endpoint = serve(&receiver)?;
    let words = endpoint.words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    criu.dump(host, case.pid, &case.images(2), End::Kill, &words)
        .with_context(|| endpoint.said())
        .context("the next dump")?;
    endpoint.taken()?;
    let place = crate::crxfer::Place::On(host);
    let sent = context
        .crxfer
        .send(place, &case.images(2), &receiver, NAME)?;
    ensure!(
        sent.completeness == "complete",
        "it is {}",
        sent.completeness
    );
    case.restore(&case.received.join(NAME))?;
    Ok(remark)
}

fn set_line(host: &Host, state: &str) -> Result<()> {
    run::quiet(host.command("ip").args(["link", "set", "eth0", state])).map(drop)
}
