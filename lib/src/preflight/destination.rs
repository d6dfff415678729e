//! Checks of the destination against the source's facts.

use super::check::Check;
use super::cpu;
use super::facts::{Facts, File, Host, Socket};
use super::found::{Binding, Found, Place};
use super::procfs::kernel_version;
use super::source::{FIRST_FOR_6_16, criu, privileges};

/// How many files, pids or addresses one sentence names.
const NAMED: usize = 5;
const KIND: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;

/// Checks of this host, where the tree is to be restored, against what its source says.
///
/// Reads /proc, the named files' status and the directory of the images; binds sockets for a moment;
/// runs CRIU for its version. Takes some ms, more where file systems answer slowly.
pub fn check_destination(facts: &Facts, place: &Place) -> Vec<Check> {
    judge(facts, place, &Found::look(facts, place))
}

fn judge(facts: &Facts, place: &Place, found: &Found) -> Vec<Check> {
    vec![
        privileges(found.privileged),
        architecture(&facts.host, &found.host),
        page_size(&facts.host, &found.host),
        cpu_features(facts, &found.host),
        kernel(&facts.host, &found.host),
        criu(&found.host, facts.tree.inet_sockets),
        criu_versions(&facts.host, &found.host),
        memory(facts, found),
        pids(facts, found),
        files(facts, place, found),
        addresses(facts, place, found),
        ports(facts, found),
    ]
}

fn architecture(source: &Host, here: &Host) -> Check {
    const NAME: &str = "architecture";
    if source.machine == here.machine {
        return Check::passed(NAME, here.machine.clone());
    }
    Check::failed(
        NAME,
        format!(
            "the source is {}, the destination {}",
            source.machine, here.machine
        ),
        "choose a destination of the same architecture",
    )
}

fn page_size(source: &Host, here: &Host) -> Check {
    const NAME: &str = "page size";
    if source.page_size == here.page_size {
        return Check::passed(NAME, format!("{} bytes", here.page_size));
    }
    Check::failed(
        NAME,
        format!(
            "{} bytes on the source, {} on the destination",
            source.page_size, here.page_size
        ),
        "choose a destination whose kernel has the same page size",
    )
}

fn cpu_features(facts: &Facts, here: &Host) -> Check {
    const NAME: &str = "CPU features";
    if facts.host.cpu_features.is_empty() || here.cpu_features.is_empty() {
        return Check::skipped(NAME, "/proc/cpuinfo names none");
    }
    let missing = cpu::missing(&here.machine, &facts.host.cpu_features, &here.cpu_features);
    if missing.is_empty() {
        return Check::passed(NAME, "the destination has all that the source has");
    }
    Check::guarded(
        NAME,
        facts.force,
        format!("the destination lacks {}", missing.join(", ")),
        "programs that found them at their start die of SIGILL: choose another destination, or mask \
         them on the source (GLIBC_TUNABLES, the hypervisor's CPU model)",
    )
}

fn kernel(source: &Host, here: &Host) -> Check {
    const NAME: &str = "kernel";
    let found = format!(
        "{} on the source, {} on the destination",
        source.kernel, here.kernel
    );
    let versions = (kernel_version(&source.kernel), kernel_version(&here.kernel));
    match versions {
        (Some(theirs), Some(ours)) if ours < theirs => Check::warning(
            NAME,
            found,
            "an older kernel may lack what the program uses; a restore then fails and the source goes on",
        ),
        _ => Check::passed(NAME, found),
    }
}

fn criu_versions(source: &Host, here: &Host) -> Check {
    const NAME: &str = "CRIU versions";
    let (Some(theirs), Some(ours)) = (source.criu, here.criu) else {
        return Check::skipped(NAME, "not both are known");
    };
    let found = format!("{theirs} on the source, {ours} on the destination");
    if theirs >= FIRST_FOR_6_16 && ours < FIRST_FOR_6_16 {
        return Check::failed(
            NAME,
            found,
            "images of 4.2 cannot be restored by older ones: install CRIU 4.2 or later on the destination",
        );
    }
    if (ours.major, ours.minor) < (theirs.major, theirs.minor) {
        return Check::warning(
            NAME,
            found,
            "an older CRIU may not know what a newer one wrote",
        );
    }
    Check::passed(NAME, found)
}

fn memory(facts: &Facts, found: &Found) -> Check {
    const NAME: &str = "memory";
    let (tree, here) = (facts.tree.memory_bytes, &found.memory);
    // Pages of zeros and of known files are not stored, so the images are at most about this.
    let images = tree;
    let needed = if here.images_in_memory {
        tree.saturating_add(images)
    } else {
        tree
    };
    let what = if here.images_in_memory {
        "images in memory and process"
    } else {
        "process"
    };
    if let Some(free) = here.images_free.filter(|&free| free < images) {
        return Check::guarded(
            NAME,
            facts.force,
            format!(
                "the images take up to {}, {} are free where they go",
                size(images),
                size(free)
            ),
            match here.images_in_memory {
                true => {
                    "free memory there, or keep the images on a disk: migrate with --mode disk to a \
                     receiving directory that is on one"
                }
                false => "free space there, or choose another directory",
            },
        );
    }
    if here.available < needed {
        return Check::guarded(
            NAME,
            facts.force,
            format!(
                "{what} take up to {}, {} are available",
                size(needed),
                size(here.available)
            ),
            "free memory, add swap, or keep the images on a disk (--mode disk)",
        );
    }
    if let Some((room, group)) = here.group.as_ref().filter(|(room, _)| *room < needed) {
        return Check::guarded(
            NAME,
            facts.force,
            format!(
                "{what} take up to {}, {} leaves {}",
                size(needed),
                group.display(),
                size(*room)
            ),
            "raise the limit of that control group, or run the receiver in another",
        );
    }
    Check::passed(
        NAME,
        format!(
            "{what} take up to {}, {} are available",
            size(needed),
            size(here.available)
        ),
    )
}

fn pids(facts: &Facts, found: &Found) -> Check {
    const NAME: &str = "pids";
    let tree = &facts.tree;
    if tree.own_pid_namespace {
        return Check::passed(NAME, "the tree brings its own pid namespace");
    }
    let too_high = |max: u32| {
        tree.tasks
            .iter()
            .find(move |&&id| id >= max)
            .map(|id| (id, max))
    };
    if let Some((id, max)) = found.pid_max.and_then(too_high) {
        return Check::failed(
            NAME,
            format!("the tree has id {id}, the destination's ids end below {max}"),
            "raise kernel.pid_max there",
        );
    }
    if found.taken.is_empty() && tree.tasks_left_out > 0 {
        let left_out = tree.tasks_left_out;
        return Check::warning(
            NAME,
            format!("{left_out} ids were not compared"),
            "the restore will tell",
        );
    }
    if found.taken.is_empty() {
        return Check::passed(NAME, format!("{} ids are free", tree.tasks.len()));
    }
    let own = found.taken.iter().any(|taken| taken.own);
    let sentence = few(found.taken.iter().map(|taken| match taken.own {
        true => format!("{} is crxfer's own", taken.id),
        false if taken.id == taken.pid => format!("{} is {}", taken.id, taken.comm),
        false => format!(
            "{} belongs to process {} ({})",
            taken.id, taken.pid, taken.comm
        ),
    }));
    let advice = if own {
        "start `crxfer recv` again where it gets other ids: in a new pid namespace write a high number \
         to /proc/sys/kernel/ns_last_pid first"
    } else {
        "end those processes, or receive in a pid namespace of its own (unshare --pid --fork --mount-proc)"
    };
    Check::failed(
        NAME,
        format!("in use on the destination: {sentence}"),
        advice,
    )
}

fn files(facts: &Facts, place: &Place, found: &Found) -> Check {
    const NAME: &str = "files";
    if facts.tree.own_mount_namespace {
        return Check::skipped(NAME, "the tree has its own mount namespace");
    }
    let pairs = facts.files.iter().zip(&found.files);
    let wrong = pairs.filter_map(|(file, here)| Some((file, difference(file, *here)?)));
    let (changing, fixed): (Vec<_>, Vec<_>) = wrong.partition(|(_, (_, changing))| *changing);
    let sentence = |list: &[(&File, (String, bool))]| {
        few(list
            .iter()
            .map(|(file, (why, _))| format!("{} {why}", file.path)))
    };
    let advice = "bring the same files to the destination";
    if !fixed.is_empty() && !place.restore_hook {
        let advice = format!("{advice}, at the latest by a hook before-restore");
        return Check::failed(NAME, sentence(&fixed), advice);
    }
    if !fixed.is_empty() {
        return Check::warning(
            NAME,
            sentence(&fixed),
            "the hook before-restore must bring them",
        );
    }
    if !changing.is_empty() {
        let advice = "CRIU compares the size with that at the freeze: copy it in hooks (after-freeze, \
                      before-restore), or keep it on shared storage";
        return Check::warning(NAME, sentence(&changing), advice);
    }
    if facts.files_left_out > 0 {
        let left_out = facts.files_left_out;
        return Check::warning(NAME, format!("{left_out} files were not compared"), advice);
    }
    Check::passed(NAME, format!("{} are the same", facts.files.len()))
}

/// How a file differs from the source's in what CRIU compares, and whether it may be right by then.
fn difference(file: &File, here: Option<(u64, u32)>) -> Option<(String, bool)> {
    let Some((size, mode)) = here else {
        return Some(("is missing".to_owned(), false));
    };
    if mode & KIND != file.mode & KIND {
        return Some(("is of another kind".to_owned(), false));
    }
    if file.mode & KIND == DIRECTORY {
        return None;
    }
    if mode != file.mode {
        let (theirs, ours) = (file.mode & 0o7777, mode & 0o7777);
        return Some((format!("has mode {ours:o}, not {theirs:o}"), false));
    }
    if size != file.size && !file.grows {
        return Some((format!("has {size} bytes, not {}", file.size), file.written));
    }
    None
}

fn addresses(facts: &Facts, place: &Place, found: &Found) -> Check {
    const NAME: &str = "addresses";
    if facts.tree.own_net_namespace {
        return Check::passed(NAME, "the tree brings its own network namespace");
    }
    let with = |wanted| {
        let pairs = facts.sockets.iter().zip(&found.bound);
        let mut list: Vec<_> = pairs
            .filter(|(_, binding)| **binding == wanted)
            .map(|(socket, _)| socket.address)
            .collect();
        list.dedup();
        list
    };
    let missing = with(Binding::NoAddress);
    if missing.is_empty() {
        let unknown = with(Binding::Unknown);
        if unknown.is_empty() {
            return Check::passed(NAME, "all can be bound");
        }
        return Check::warning(
            NAME,
            format!(
                "not known whether sockets can be bound to {}",
                few(unknown.iter())
            ),
            "link-local addresses and ip_nonlocal_bind hide it; the restore will tell",
        );
    }
    let sentence = format!("the destination does not have {}", few(missing.iter()));
    if place.address_hook {
        return Check::passed(
            NAME,
            format!("{sentence}; the hook address-prepare adds it"),
        );
    }
    Check::failed(
        NAME,
        sentence,
        "give the receiver hooks address-prepare and address-announce that move it with the workload, \
         or let the program listen on any address",
    )
}

fn ports(facts: &Facts, found: &Found) -> Check {
    const NAME: &str = "ports";
    let pairs = facts.sockets.iter().zip(&found.bound);
    let taken: Vec<&Socket> = pairs
        .filter(|(_, binding)| **binding == Binding::PortTaken)
        .map(|(socket, _)| socket)
        .collect();
    if taken.is_empty() {
        return Check::passed(NAME, "none is in use");
    }
    let sentence = few(taken
        .iter()
        .map(|socket| std::net::SocketAddr::new(socket.address, socket.port).to_string()));
    Check::guarded(
        NAME,
        facts.force,
        format!("something on the destination listens on {sentence}"),
        "end it before the tree is restored",
    )
}

fn few(items: impl Iterator<Item = impl ToString>) -> String {
    let mut words: Vec<_> = items.map(|item| item.to_string()).collect();
    let more = words.len().saturating_sub(NAMED);
    words.truncate(NAMED);
    if more > 0 {
        words.push(format!("{more} more"));
    }
    words.join(", ")
}

fn size(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests;
