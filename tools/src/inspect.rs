//! `crxfer inspect`, `diff` and `flatten`: image directories of any origin.

use crxfer::image::{
    Chain, ChainOptions, Completeness, MemoryDiff, MemorySummary, PagemapName, ParentLinks, Summary,
};
use serde_json::{Value, json};

use crate::args::{DiffArgs, FlattenArgs, InspectArgs};
use crate::error::Failed;
use crate::output::{self, Align, Table};
use crate::size::{Bytes, grouped};

pub(crate) fn inspect(args: &InspectArgs) -> Result<(), Failed> {
    let chain = open_following(&args.dir, args.page_size)?;
    let summary = crxfer::image::inspect(&chain)?;
    if args.json {
        output::json(&summary_json(&summary))?;
    } else {
        print_summary(&summary)?;
    }
    match &summary.completeness {
        damaged @ Completeness::Damaged(_) => Err(Failed::Unsound(format!(
            "{}: {damaged}",
            args.dir.display()
        ))),
        _ => Ok(()),
    }
}

pub(crate) fn diff(args: &DiffArgs) -> Result<(), Failed> {
    let before = open_following(&args.before, args.page_size)?;
    let after = open_following(&args.after, args.page_size)?;
    let memory = crxfer::image::diff(&before, &after)?;
    let comm = |name| comm_of(&after, name).or_else(|| comm_of(&before, name));
    if args.json {
        let memory: Vec<_> = memory
            .iter()
            .map(|it| diff_json(it, comm(it.name)))
            .collect();
        return output::json(&json!({
            "before": args.before.to_string_lossy(),
            "after": args.after.to_string_lossy(),
            "page_size": after.page_size().bytes(),
            "memory": memory,
        }));
    }
    print_diff(&memory, comm)
}

pub(crate) fn flatten(args: &FlattenArgs) -> Result<(), Failed> {
    let chain = open_following(&args.dir, args.page_size)?;
    let done = crxfer::image::flatten(&chain, &args.out)?;
    output::line(&format!(
        "{}: {} files, {} pages, of which {} are zero",
        args.out.display(),
        grouped(done.files),
        grouped(done.pages),
        grouped(done.zero_pages)
    ))
}

/// Absolute parent links are right on the host that dumped, where these commands run.
fn open_following(
    path: &std::path::Path,
    page_size: Option<crxfer::page::PageSize>,
) -> Result<Chain, Failed> {
    let parent_links = ParentLinks::Any;
    Ok(Chain::open_with(
        &crxfer::store::locate(path)?,
        ChainOptions {
            page_size,
            parent_links,
        },
    )?)
}

/// What is wrong, one text each.
pub(crate) fn problems(completeness: &Completeness) -> Vec<String> {
    match completeness {
        Completeness::Damaged(problems) => problems.iter().map(ToString::to_string).collect(),
        Completeness::Opaque(reason) => vec![reason.clone()],
        _ => Vec::new(),
    }
}

fn summary_json(summary: &Summary) -> Value {
    let memory: Vec<_> = summary.memory.iter().map(memory_json).collect();
    let dump = summary.stats.as_ref().map(|stats| {
        json!({
            "freezing_us": stats.freezing_time,
            "frozen_us": stats.frozen_time,
            "memdump_us": stats.memdump_time,
            "memwrite_us": stats.memwrite_time,
            "pages_scanned": stats.pages_scanned,
            "pages_skipped_parent": stats.pages_skipped_parent,
            "pages_written": stats.pages_written,
            "pages_lazy": stats.pages_lazy,
        })
    });
    json!({
        "path": summary.path.to_string_lossy(),
        "completeness": {
            "state": summary.completeness.word(),
            "restorable": summary.completeness.is_restorable(),
            "problems": problems(&summary.completeness),
        },
        "levels": summary.levels,
        "parent": summary.parent,
        "page_size": summary.page_size.bytes(),
        "criu": summary.criu.to_string(),
        "files": summary.files,
        "bytes": summary.bytes,
        "allocated_bytes": summary.allocated,
        "dump": dump,
        "memory": memory,
    })
}

fn memory_json(memory: &MemorySummary) -> Value {
    json!({
        "pagemap": memory.name.to_string(),
        "comm": memory.comm,
        "runs": memory.runs,
        "pages": memory.pages,
        "present": memory.present,
        "from_parent": memory.from_parent,
        "left_at_source": memory.left_at_source,
        "zero": memory.zero,
        "duplicate": memory.duplicate,
    })
}

fn print_summary(summary: &Summary) -> Result<(), Failed> {
    let fact = |name: &str, value: String| output::line(&format!("{name:<14}{value}"));
    fact("directory", summary.path.display().to_string())?;
    fact("completeness", summary.completeness.to_string())?;
    for problem in problems(&summary.completeness).iter().skip(1) {
        fact("", problem.clone())?;
    }
    fact("written by", format!("CRIU {}", summary.criu))?;
    fact("page size", Bytes(summary.page_size.bytes()).to_string())?;
    if let Some(parent) = &summary.parent {
        fact(
            "parent",
            format!("{parent} ({} directories in the chain)", summary.levels),
        )?;
    }
    fact(
        "files",
        format!(
            "{}, {} ({} allocated)",
            grouped(summary.files),
            Bytes(summary.bytes),
            Bytes(summary.allocated)
        ),
    )?;
    if let Some(stats) = &summary.stats {
        let millis = |micros: u32| f64::from(micros) / 1000.0;
        fact(
            "dump",
            format!(
                "frozen {:.1} ms, {} pages scanned, {} left to the parent, {} written",
                millis(stats.frozen_time),
                grouped(stats.pages_scanned),
                grouped(stats.pages_skipped_parent),
                grouped(stats.pages_written)
            ),
        )?;
    }
    output::line("")?;
    print_memory(&summary.memory)
}

fn print_memory(memory: &[MemorySummary]) -> Result<(), Failed> {
    use Align::{Left, Right};
    let mut table = Table::new(
        &[Left, Left, Right, Right, Right, Right, Right, Right],
        &[
            "memory of",
            "",
            "runs",
            "pages",
            "here",
            "parent",
            "zero",
            "duplicate",
        ],
    );
    for it in memory {
        let mut row = vec![shown(it.name), it.comm.clone().unwrap_or_default()];
        row.extend(
            [
                it.runs,
                it.pages,
                it.present,
                it.from_parent,
                it.zero,
                it.duplicate,
            ]
            .map(grouped),
        );
        table.row(row);
    }
    if memory.len() > 1 {
        let total = |count: fn(&MemorySummary) -> u64| grouped(memory.iter().map(count).sum());
        table.row(vec![
            "all".to_owned(),
            String::new(),
            total(|it| it.runs),
            total(|it| it.pages),
            total(|it| it.present),
            total(|it| it.from_parent),
            total(|it| it.zero),
            total(|it| it.duplicate),
        ]);
    }
    table.print()
}

fn diff_json(diff: &MemoryDiff, comm: Option<String>) -> Value {
    json!({
        "pagemap": diff.name.to_string(),
        "comm": comm,
        "same": diff.same,
        "changed": diff.changed,
        "added": diff.added,
        "removed": diff.removed,
        "unknown": diff.unknown,
    })
}

fn print_diff(
    memory: &[MemoryDiff],
    comm: impl Fn(PagemapName) -> Option<String>,
) -> Result<(), Failed> {
    use Align::{Left, Right};
    let mut table = Table::new(
        &[Left, Left, Right, Right, Right, Right, Right],
        &[
            "memory of",
            "",
            "same",
            "changed",
            "added",
            "removed",
            "unknown",
        ],
    );
    let mut all = [0; 5];
    for it in memory {
        let counts = [it.same, it.changed, it.added, it.removed, it.unknown];
        for (sum, count) in all.iter_mut().zip(counts) {
            *sum += count;
        }
        let mut row = vec![shown(it.name), comm(it.name).unwrap_or_default()];
        row.extend(counts.map(grouped));
        table.row(row);
    }
    if memory.len() > 1 {
        let mut row = vec!["all".to_owned(), String::new()];
        row.extend(all.map(grouped));
        table.row(row);
    }
    table.print()
}

fn comm_of(chain: &Chain, name: PagemapName) -> Option<String> {
    let tree = chain.process_tree().ok().flatten()?;
    let task = tree
        .tasks
        .into_iter()
        .find(|task| PagemapName::Task(task.pid.into()) == name)?;
    task.comm
}

fn shown(name: PagemapName) -> String {
    match name {
        PagemapName::Task(pid) => format!("process {pid}"),
        PagemapName::Shmem(id) => format!("segment {id}"),
    }
}
