//! The process tree of a dump: which tasks it has and whose memory must be there.

use std::collections::BTreeSet;

use crxfer_proto::criu;
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};

use super::error::ImageError;
use super::framing::magic;
use super::records::{decode_all, decode_one, records_of};

/// `task_state` of a zombie: it has no memory any more.
const TASK_DEAD: u32 = 2;
/// Field of `mm_entry` that holds the mappings.
const MM_VMAS: u32 = 14;
/// `vma_entry.status` of shared anonymous memory.
const VMA_SHARED_ANONYMOUS: u32 = 1 << 8;
/// `vma_entry.status` of mappings of which the content is found another way: System V segments
/// through `ipcns-shm`, asynchronous I/O rings not at all, memfds through `memfd.img`. (Since CRIU
/// 3.14 shared anonymous memory counts as a memfd too.)
const VMA_FOUND_ELSEWHERE: u32 = 1 << 10 | 1 << 13 | 1 << 14;

/// One task of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Process id inside the restored namespace.
    pub pid: u32,
    /// The thread ids that `pstree.img` states. For a zombie, CRIU 4.2.1 writes one id that means
    /// nothing: use [`Task::core_ids`].
    pub threads: Vec<u32>,
    /// Whether it was a zombie: no memory, no `mm-PID.img`, no pagemap.
    pub zombie: bool,
    /// Tasks with the same number share one address space.
    pub vm_id: Option<u32>,
    /// Command name, if the image holds one.
    pub comm: Option<String>,
}

impl Task {
    /// The ids of its `core-ID.img` files: one for each thread, the leader's included.
    pub fn core_ids(&self) -> impl Iterator<Item = u32> {
        let others: &[u32] = if self.zombie { &[] } else { &self.threads };
        let others = others.iter().copied().filter(|&thread| thread != self.pid);
        std::iter::once(self.pid).chain(others)
    }
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

/// Shared anonymous segments that a process maps. Mappings are decoded one at a time: as a list
/// they could take many times the memory of the file.
fn mapped_segments(bytes: &[u8], name: &str) -> Result<BTreeSet<u64>, ImageError> {
    let mut segments = BTreeSet::new();
    for record in records_of(bytes, name, magic::MM)? {
        let record = record?;
        let damaged = |error: prost::DecodeError| ImageError::BadRecord {
            file: name.to_owned(),
            offset: record.offset,
            what: error.to_string(),
        };
        let mut rest = record.message;
        while !rest.is_empty() {
            let (field, wire_type) = decode_key(&mut rest).map_err(damaged)?;
            if field != MM_VMAS || wire_type != WireType::LengthDelimited {
                skip_field(wire_type, field, &mut rest, DecodeContext::default())
                    .map_err(damaged)?;
                continue;
            }
            let mut vma = criu::VmaEntry::default();
            vma.merge_length_delimited(&mut rest).map_err(damaged)?;
            let status = vma.status.unwrap_or(0);
            if status & VMA_SHARED_ANONYMOUS != 0 && status & VMA_FOUND_ELSEWHERE == 0 {
                segments.extend(vma.shmid);
            }
        }
    }
    Ok(segments)
}

/// Segments of `memfd.img`; those of size 0 have no pagemap.
fn memfd_segments(bytes: &[u8]) -> Result<Vec<u64>, ImageError> {
    let inodes: Vec<criu::MemfdInodeEntry> = decode_all(bytes, "memfd.img", magic::MEMFD)?;
    let filled = inodes.iter().filter(|inode| inode.size.unwrap_or(0) > 0);
    Ok(filled
        .filter_map(|inode| inode.shmid.map(u64::from))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::framing::{Frame, Writer};
    use super::*;

    fn image(magic: u32, records: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Writer::new(Frame::V11, magic).finish();
        for record in records {
            bytes.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
            bytes.extend(*record);
        }
        bytes
    }

    fn parse(files: &[(&str, Vec<u8>)]) -> Result<Option<ProcessTree>, ImageError> {
        let files: BTreeMap<_, _> = files.iter().cloned().collect();
        ProcessTree::parse(|name| Ok(files.get(name).cloned()))
    }

    /// pstree entry: pid (field 1) and threads (field 5).
    fn process(pid: u8, threads: &[u8]) -> Vec<u8> {
        let threads = threads.iter().flat_map(|&thread| [0x28, thread]);
        [0x08, pid].into_iter().chain(threads).collect()
    }

    /// core entry with task_core_entry (field 3) of that state (field 1).
    fn core(state: u8) -> Vec<u8> {
        image(magic::CORE, &[&[0x1a, 2, 0x08, state]])
    }

    #[test]
    fn a_zombie_has_one_core_file_whatever_its_threads_say() {
        let pstree = image(magic::PSTREE, &[&process(1, &[1, 2]), &process(3, &[99])]);
        let files = [
            ("pstree.img", pstree),
            ("core-1.img", core(1)),
            ("core-3.img", core(2)),
        ];
        let tree = parse(&files).unwrap().unwrap();
        let zombies: Vec<_> = tree.tasks.iter().map(|task| task.zombie).collect();
        assert_eq!(zombies, [false, true]);
        let ids: Vec<Vec<_>> = tree
            .tasks
            .iter()
            .map(|task| task.core_ids().collect())
            .collect();
        assert_eq!(ids, [vec![1, 2], vec![3]]);
    }

    #[test]
    fn segments_come_from_memfds_with_content_and_old_shared_mappings() {
        // memfd entries: size (field 4) and shmid (field 5).
        let memfd = image(magic::MEMFD, &[&[0x20, 9, 0x28, 5], &[0x20, 0, 0x28, 6]]);
        // Mappings (field 14): shmid (field 4), status (field 7): shared anonymous; the same of a
        // System V segment; a memfd.
        let mappings = [
            &[0x72, 5, 0x20, 7, 0x38, 0x81, 0x02][..],
            &[0x72, 5, 0x20, 8, 0x38, 0x81, 0x0a],
            &[0x72, 6, 0x20, 9, 0x38, 0x81, 0x81, 0x01],
        ];
        let files = [
            ("pstree.img", image(magic::PSTREE, &[&process(1, &[1])])),
            ("mm-1.img", image(magic::MM, &[&mappings.concat()])),
            ("memfd.img", memfd),
        ];
        let tree = parse(&files).unwrap().unwrap();
        assert_eq!(tree.segments, BTreeSet::from([5, 7]));
    }

    #[test]
    fn damaged_trees_are_refused_and_a_missing_one_is_none() {
        assert_eq!(parse(&[]).unwrap(), None);
        for records in [&[][..], &[&[][..]], &[&[0x08, 1], &[0x08, 1]], &[&[0x08]]] {
            let files = [("pstree.img", image(magic::PSTREE, records))];
            assert!(parse(&files).is_err(), "{records:?}");
        }
        let pstree = image(magic::PSTREE, &[&process(1, &[1])]);
        let mm = image(magic::MM, &[&[0x72, 9, 0]]);
        assert!(parse(&[("pstree.img", pstree), ("mm-1.img", mm)]).is_err());
    }
}
