//! `/proc/PID/maps`: what kind of memory lies where.

use std::collections::BTreeSet;
use std::ops::Range;

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) inode: u64,
    pub(super) shared: bool,
    /// It shows a segment that lives in memory only.
    pub(super) is_segment: bool,
    /// The kernel provides it (vdso and the like): CRIU takes care of it, and it is tiny.
    pub(super) is_kernel: bool,
}

impl Mapping {
    /// Whether pages of its own may lie here: all that is private.
    pub(super) fn holds_private_pages(&self) -> bool {
        !self.shared && !self.is_kernel
    }

    pub(super) fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Name in `map_files`.
    pub(super) fn file_name(&self) -> String {
        format!("map_files/{:x}-{:x}", self.start, self.end)
    }
}

/// The mappings of a `maps` file, ascending. Lines that are none are left out: the file may have
/// been cut.
pub(super) fn parse(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let shared = fields.next()?.as_bytes().get(3)? == &b's';
    let _offset = fields.next()?;
    let _device = fields.next()?;
    let inode = fields.next()?.parse().ok()?;
    let name = fields.next().unwrap_or("").trim_start();
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    (start < end).then_some(Mapping {
        start,
        end,
        inode,
        shared,
        is_segment: is_memfd(name) || (shared && is_shared_memory(name)),
        is_kernel: is_kernel(name),
    })
}

/// Where the mappings of an `smaps` file begin of which no page is in memory or swapped out.
pub(super) fn empty_ones(smaps: &str) -> BTreeSet<u64> {
    let mut empty = BTreeSet::new();
    let mut start = 0;
    for line in smaps.lines() {
        if let Some(mapping) = parse_line(line) {
            start = mapping.start;
            empty.insert(start);
        } else if let Some((name, amount)) = line.split_once(':') {
            let counts = matches!(name, "Rss" | "Swap" | "Private_Hugetlb" | "Shared_Hugetlb");
            if counts && amount.trim() != "0 kB" {
                empty.remove(&start);
            }
        }
    }
    empty
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

fn is_kernel(name: &str) -> bool {
    let names = [
        "[vdso]",
        "[vsyscall]",
        "[uprobes]",
        "[sigpage]",
        "[vectors]",
    ];
    names.contains(&name) || name.starts_with("[vvar")
}

/// Anonymous, of huge pages or not, or of System V.
fn is_shared_memory(name: &str) -> bool {
    let names = ["/dev/zero (deleted)", "/anon_hugepage (deleted)"];
    names.contains(&name) || (name.starts_with("/SYSV") && name.ends_with(" (deleted)"))
}

/// Whether a mapping or descriptor of that name is a memfd.
pub(super) fn is_memfd(name: &str) -> bool {
    name.starts_with("/memfd:") && name.ends_with(" (deleted)")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
55d0c8a00000-55d0c8a02000 r--p 00000000 fe:01 1234                       /usr/bin/a b
7f0000000000-7f0000001000 rw-p 00000000 00:00 0 
7f0000001000-7f0000002000 ---p 00000000 00:00 0                          [anon: guard]
7f0000002000-7f0000006000 rw-s 00001000 00:01 4792                       /dev/zero (deleted)
7f0000006000-7f0000007000 rw-s 00000000 00:01 5                          /memfd:x (deleted)
7f0000007000-7f0000008000 r--p 00000000 00:01 5                          /memfd:x (deleted)
7f0000008000-7f0000009000 rw-s 00000000 00:01 32769                      /SYSV0000002a (deleted)
7f0000009000-7f000000a000 rw-s 00000000 fe:01 99                         /var/db
7ffff7fc0000-7ffff7fc4000 r--p 00000000 00:00 0                          [vvar]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
garbage
7f00-7e00 rw-p 00000000 00:00 0
";

    #[test]
    fn segments_are_told_from_files_and_from_private_memory() {
        let maps = parse(TEXT);
        assert_eq!(maps.len(), 10);
        let segments: Vec<_> = maps
            .iter()
            .filter(|mapping| mapping.is_segment)
            .map(|mapping| (mapping.inode, mapping.shared))
            .collect();
        let expected = [(4792, true), (5, true), (5, false), (32769, true)];
        assert_eq!(segments, expected);
        assert_eq!(maps[0].range(), 0x55d0_c8a0_0000..0x55d0_c8a0_2000);
    }

    #[test]
    fn mappings_without_pages_are_known_by_smaps() {
        let entry = |start: u64, rss: u32, swap: u32, huge: u32| {
            format!(
                "{start:x}-{:x} rw-p 00000000 00:00 0 \nSize:  8 kB\nRss:  {rss} kB\n\
                 Private_Hugetlb: {huge} kB\nSwap:  {swap} kB\nSwapPss:  0 kB\nVmFlags: rd wr\n",
                start + 0x2000
            )
        };
        let text = [(0, 0, 0), (4, 0, 0), (0, 4, 0), (0, 0, 2048), (0, 0, 0)]
            .iter()
            .zip((0x10_0000..).step_by(0x10_000))
            .map(|(&(rss, swap, huge), start)| entry(start, rss, swap, huge))
            .collect::<String>();
        assert_eq!(empty_ones(&text), BTreeSet::from([0x10_0000, 0x14_0000]));
    }

    #[test]
    fn only_private_mappings_of_the_process_itself_hold_its_pages() {
        let private: Vec<_> = parse(TEXT)
            .iter()
            .map(Mapping::holds_private_pages)
            .collect();
        let expected = [
            true, true, true, false, false, true, false, false, false, false,
        ];
        assert_eq!(private, expected);
    }
}
