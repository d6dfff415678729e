//! `/proc/PID/maps`: what kind of memory lies where.

use std::ops::Range;

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Offset in the file or segment.
    pub(super) offset: u64,
    pub(super) inode: u64,
    pub(super) shared: bool,
    pub(super) kind: Kind,
}

/// What a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Memory of nobody else, or a file.
    Ordinary,
    /// Provided by the kernel: CRIU takes care of it, and it is tiny.
    Kernel,
    /// A segment that lives in memory only.
    Segment(SegmentKind),
}

/// Where a segment comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SegmentKind {
    /// Shared anonymous memory.
    Anonymous,
    Memfd,
    SysV,
}

impl Mapping {
    /// Whether pages of its own may lie here: all that is private.
    pub(super) fn holds_private_pages(&self) -> bool {
        !self.shared && self.kind != Kind::Kernel
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
    let offset = hexadecimal(fields.next()?)?;
    let _device = fields.next()?;
    let inode = fields.next()?.parse().ok()?;
    let name = fields.next().unwrap_or("").trim_start();
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    (start < end).then_some(Mapping {
        start,
        end,
        offset,
        inode,
        shared,
        kind: kind_of(name, shared),
    })
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

fn kind_of(name: &str, shared: bool) -> Kind {
    match name {
        "[vdso]" | "[vsyscall]" | "[uprobes]" | "[sigpage]" | "[vectors]" => Kind::Kernel,
        _ if name.starts_with("[vvar") => Kind::Kernel,
        _ if is_memfd(name) => Kind::Segment(SegmentKind::Memfd),
        _ if shared => segment_of(name).map_or(Kind::Ordinary, Kind::Segment),
        _ => Kind::Ordinary,
    }
}

fn segment_of(name: &str) -> Option<SegmentKind> {
    match name {
        "/dev/zero (deleted)" | "/anon_hugepage (deleted)" => Some(SegmentKind::Anonymous),
        _ if name.starts_with("/SYSV") && name.ends_with(" (deleted)") => Some(SegmentKind::SysV),
        _ => None,
    }
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
    fn each_mapping_has_its_kind() {
        let maps = parse(TEXT);
        let kinds: Vec<_> = maps.iter().map(|map| (map.shared, map.kind)).collect();
        assert_eq!(
            kinds,
            [
                (false, Kind::Ordinary),
                (false, Kind::Ordinary),
                (false, Kind::Ordinary),
                (true, Kind::Segment(SegmentKind::Anonymous)),
                (true, Kind::Segment(SegmentKind::Memfd)),
                (false, Kind::Segment(SegmentKind::Memfd)),
                (true, Kind::Segment(SegmentKind::SysV)),
                (true, Kind::Ordinary),
                (false, Kind::Kernel),
                (false, Kind::Kernel),
            ]
        );
        assert_eq!((maps[3].offset, maps[3].inode), (0x1000, 4792));
        assert_eq!(maps[0].range(), 0x55d0_c8a0_0000..0x55d0_c8a0_2000);
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
