//! The process tree of a dump: which tasks it has and whose memory must be there.

use std::collections::BTreeSet;

use crxfer_proto::criu;

use super::error::ImageError;
use super::framing::magic;
use super::records::{decode_all, decode_one};

/// `task_state` of a zombie: it has no memory any more.
const TASK_DEAD: u32 = 2;
/// `vma_entry.status` of shared anonymous memory.
const VMA_SHARED_ANONYMOUS: u32 = 1 << 8;
/// `vma_entry.status` of a System V segment; its content is found through `ipcns-shm`.
const VMA_SYSV: u32 = 1 << 10;

/// One task of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id inside the restored namespace.
    pub pid: u32,
    /// All thread ids, the leader's included; each has a `core-TID.img`.
    pub threads: Vec<u32>,
    /// Whether it was a zombie: no memory, no `mm-PID.img`, no pagemap.
    pub zombie: bool,
    /// Tasks with the same number share one address space.
    pub vm_id: Option<u32>,
    /// Command name, if the image holds one.
    pub comm: Option<String>,
}

/// What of a process tree decides about completeness.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessTree {
    /// The tasks, the root first.
    pub tasks: Vec<Task>,
    /// Ids of the shared segments that have a pagemap of their own.
    pub segments: BTreeSet<u64>,
}

impl ProcessTree {
    /// Parses the tree out of `pstree.img`, and what belongs to it.
    ///
    /// `read` gives the bytes of a file of the directory, `None` if it does not exist. Missing
    /// `core-*`, `ids-*`, `mm-*` and `memfd` files are no error here: completeness names them.
    /// `None` if there is no `pstree.img`.
    pub fn parse(
        mut read: impl FnMut(&str) -> Result<Option<Vec<u8>>, ImageError>,
    ) -> Result<Option<Self>, ImageError> {
        let Some(bytes) = read("pstree.img")? else {
            return Ok(None);
        };
        let entries: Vec<criu::PstreeEntry> = decode_all(&bytes, "pstree.img", magic::PSTREE)?;
        if entries.is_empty() {
            let what = "names no process";
            return Err(ImageError::BadCount {
                file: "pstree.img".to_owned(),
                what,
            });
        }
        let bad = |what| ImageError::BadCount {
            file: "pstree.img".to_owned(),
            what,
        };
        let (mut tree, mut pids) = (Self::default(), BTreeSet::new());
        for entry in entries {
            let pid = entry.pid.ok_or_else(|| bad("a process has no pid"))?;
            if !pids.insert(pid) {
                return Err(bad("a pid comes twice"));
            }
            tree.tasks.push(parse_task(pid, entry.threads, &mut read)?);
            let name = format!("mm-{pid}.img");
            if let Some(bytes) = read(&name)? {
                tree.segments.extend(mapped_segments(&bytes, &name)?);
            }
        }
        if let Some(bytes) = read("memfd.img")? {
            tree.segments.extend(memfd_segments(&bytes)?);
        }
        Ok(Some(tree))
    }
}

fn parse_task(
    pid: u32,
    threads: Vec<u32>,
    read: &mut impl FnMut(&str) -> Result<Option<Vec<u8>>, ImageError>,
) -> Result<Task, ImageError> {
    let mut task = Task {
        pid,
        threads,
        zombie: false,
        vm_id: None,
        comm: None,
    };
    let name = format!("core-{pid}.img");
    if let Some(bytes) = read(&name)? {
        let core: criu::CoreEntry = decode_one(&bytes, &name, magic::CORE)?;
        task.vm_id = core.ids.and_then(|ids| ids.vm_id);
        if let Some(tc) = core.tc {
            task.zombie = tc.task_state == Some(TASK_DEAD);
            task.comm = tc.comm;
        }
    }
    let name = format!("ids-{pid}.img");
    if let Some(bytes) = read(&name)? {
        let ids: criu::TaskKobjIdsEntry = decode_one(&bytes, &name, magic::IDS)?;
        task.vm_id = ids.vm_id.or(task.vm_id);
    }
    Ok(task)
}

fn mapped_segments(bytes: &[u8], name: &str) -> Result<Vec<u64>, ImageError> {
    let mm: criu::MmEntry = decode_one(bytes, name, magic::MM)?;
    let shared = mm.vmas.iter().filter(|vma| {
        let status = vma.status.unwrap_or(0);
        status & VMA_SHARED_ANONYMOUS != 0 && status & VMA_SYSV == 0
    });
    Ok(shared.filter_map(|vma| vma.shmid).collect())
}

/// Segments of `memfd.img`; those of size 0 have no pagemap.
fn memfd_segments(bytes: &[u8]) -> Result<Vec<u64>, ImageError> {
    let inodes: Vec<criu::MemfdInodeEntry> = decode_all(bytes, "memfd.img", magic::MEMFD)?;
    let filled = inodes.iter().filter(|inode| inode.size.unwrap_or(0) > 0);
    Ok(filled
        .filter_map(|inode| inode.shmid.map(u64::from))
        .collect())
}
