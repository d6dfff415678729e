//! Texts of /proc and of control groups. What cannot be understood is left out, never an error: a
//! check is worth less than the migration that it would stop.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The value behind `key:` in a file of such lines.
pub(super) fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value.trim())
}

/// A number behind `key:`, in bytes where it is stated in kB.
pub(super) fn number(text: &str, key: &str) -> Option<u64> {
    let value = field(text, key)?;
    let (digits, unit) = value.split_once(' ').unwrap_or((value, ""));
    let factor = if unit.trim() == "kB" { 1024 } else { 1 };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// The last number behind `key:`, of a list with one for each nested namespace.
pub(super) fn innermost(text: &str, key: &str) -> Option<u32> {
    field(text, key)?
        .split_whitespace()
        .next_back()?
        .parse()
        .ok()
}

/// Of a task that has begun to end, in the kernel's include/linux/sched.h.
const PF_EXITING: u64 = 4;

/// What /proc/PID/stat tells and /proc/PID/status does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) state: char,
    pub(crate) parent: u32,
    pub(crate) group: u32,
    pub(crate) session: u32,
    /// It ends: no code of its program runs in this thread any more.
    pub(crate) ending: bool,
    /// When it was started, in clock ticks since boot.
    pub(crate) started: u64,
}

impl Stat {
    /// That of process `pid`; `None` where there is none.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The name of the program, which comes first, may hold anything, parentheses too.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let mut words = rest.split_whitespace();
        let state = words.next()?.chars().next()?;
        // A group or session from outside the pid namespace is 0, or -1 on some kernels.
        let mut id = || {
            words
                .next()?
                .parse::<i64>()
                .ok()
                .map(|id| u32::try_from(id).unwrap_or(0))
        };
        let (parent, group, session) = (id()?, id()?, id()?);
        // Of 52 fields: flags are the ninth, the start time the 22nd.
        let flags: u64 = words.nth(2)?.parse().ok()?;
        let started = words.nth(12)?.parse().ok()?;
        Some(Self {
            state,
            parent,
            group,
            session,
            ending: flags & PF_EXITING != 0,
            started,
        })
    }
}

/// A mapping of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping<'a> {
    /// As in the name beneath map_files.
    pub(super) range: &'a str,
    /// Where the file is, or was.
    pub(super) path: &'a str,
    /// It was deleted.
    pub(super) deleted: bool,
}

/// Mappings of files among the lines of /proc/PID/maps.
pub(super) fn mappings(text: &str) -> impl Iterator<Item = Mapping<'_>> {
    text.lines().filter_map(|line| {
        let at = line.find('/')?;
        let range = line.split_whitespace().next()?;
        let (path, deleted) = without_mark(&line[at..]);
        Some(Mapping {
            range,
            path,
            deleted,
        })
    })
}

/// A path as the kernel shows it, without its mark of a deleted file.
pub(super) fn without_mark(path: &str) -> (&str, bool) {
    match path.strip_suffix(" (deleted)") {
        Some(path) => (path, true),
        None => (path, false),
    }
}

/// The flags of a descriptor, from its fdinfo.
pub(super) fn open_flags(fdinfo: &str) -> u32 {
    let value = field(fdinfo, "flags").unwrap_or_default();
    u32::from_str_radix(value, 8).unwrap_or(0)
}

/// A line of /proc/net/tcp and its kin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InetLine {
    pub(super) local: IpAddr,
    pub(super) port: u16,
    pub(super) state: u8,
    pub(super) inode: u64,
}

pub(super) const TCP_SYN_SENT: u8 = 2;
pub(super) const TCP_SYN_RECV: u8 = 3;
pub(super) const TCP_CLOSE: u8 = 7;
pub(super) const TCP_LISTEN: u8 = 10;

/// The sockets of /proc/net/{tcp,udp}{,6}.
pub(super) fn inet_lines(text: &str) -> impl Iterator<Item = InetLine> + '_ {
    text.lines().skip(1).filter_map(|line| {
        let mut words = line.split_whitespace();
        let (address, port) = words.nth(1)?.split_once(':')?;
        let state = words.nth(1)?;
        let inode = words.nth(5)?;
        Some(InetLine {
            local: hex_address(address)?,
            port: u16::from_str_radix(port, 16).ok()?,
            state: u8::from_str_radix(state, 16).ok()?,
            inode: inode.parse().ok()?,
        })
    })
}

// Words of 32 bits, each as this machine has it in memory. What IPv6 sockets have of IPv4 is IPv4.
fn hex_address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(text.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(index * 8)?);
            }
            Some(Ipv6Addr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

/// Features that every processor in /proc/cpuinfo has, ascending.
pub(super) fn cpu_features(cpuinfo: &str) -> Vec<String> {
    let mut common: Option<Vec<&str>> = None;
    for line in cpuinfo.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        if !matches!(key.trim(), "flags" | "Features") {
            continue;
        }
        let mut flags: Vec<_> = value.split_whitespace().collect();
        flags.sort_unstable();
        match &mut common {
            None => common = Some(flags),
            Some(common) => common.retain(|flag| flags.binary_search(flag).is_ok()),
        }
    }
    let mut common = common.unwrap_or_default();
    common.dedup();
    common.into_iter().map(str::to_owned).collect()
}

/// The first two numbers of a kernel's release.
pub(super) fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A line of /proc/PID/cgroup: controllers, and the path in their hierarchy.
pub(super) fn cgroups(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        Some((controllers, path))
    })
}

/// A limit of a memory cgroup in bytes; `None` where there is none.
pub(super) fn memory_limit(text: &str) -> Option<u64> {
    // Version 1 shows the largest number of pages, version 2 the word "max".
    text.trim().parse().ok().filter(|&limit| limit < 1 << 62)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_survives_any_program_name() {
        let stat = Stat::parse(
            "7 (a) b) c) S 1 7 6 0 -1 4194304 101 8 9 10 11 12 13 14 15 0 1 0 987654 1 2",
        )
        .expect("a stat");
        let expected = Stat {
            state: 'S',
            parent: 1,
            group: 7,
            session: 6,
            ending: false,
            started: 987_654,
        };
        assert_eq!(stat, expected);
        assert_eq!(
            Stat::parse("7 (a) R 1 -1 -1 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20")
                .map(|stat| stat.session),
            Some(0)
        );
        assert_eq!(Stat::parse("7 (a) S 1"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn status_has_numbers_and_lists() {
        let status = "Name:\tx\nNSpid:\t700\t4\nRssAnon:\t     112 kB\nSeccomp:\t2\n";
        assert_eq!(field(status, "Name"), Some("x"));
        assert_eq!(innermost(status, "NSpid"), Some(4));
        assert_eq!(number(status, "RssAnon"), Some(112 * 1024));
        assert_eq!(number(status, "Seccomp"), Some(2));
        assert_eq!(number(status, "VmSwap"), None);
        assert_eq!(number("a: 99999999999999999 kB", "a"), None);
    }

    #[test]
    fn mapped_files_are_found_among_the_mappings() {
        let maps = "55d0-55d1 r--p 00000000 fe:00 7 /usr/bin/a b\n\
            7f00-7f01 rw-p 00000000 00:00 0 \n\
            7f02-7f03 rw-s 00000000 00:01 9 /memfd:x (deleted)\n\
            7ffc-7ffd rw-p 00000000 00:00 0 [stack]\n";
        let found: Vec<_> = mappings(maps)
            .map(|m| (m.range, m.path, m.deleted))
            .collect();
        assert_eq!(
            found,
            [
                ("55d0-55d1", "/usr/bin/a b", false),
                ("7f02-7f03", "/memfd:x", true)
            ]
        );
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn sockets_are_read_from_both_families() {
        let tcp = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 070200C0:2BCB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1661 1 0\n broken\n";
        let expected = InetLine {
            local: [192, 0, 2, 7].into(),
            port: 11211,
            state: TCP_LISTEN,
            inode: 1661,
        };
        assert_eq!(inet_lines(tcp).collect::<Vec<_>>(), [expected]);
        let address = |text| hex_address(text).map(|address| address.to_string());
        assert_eq!(
            address("B80D0120000000000000000001000000").as_deref(),
            Some("2001:db8::1")
        );
        assert_eq!(
            address("0000000000000000FFFF0000070200C0").as_deref(),
            Some("192.0.2.7")
        );
        assert_eq!(address("07020"), None);
        assert_eq!(address("zzzzzzzz"), None);
    }

    #[test]
    fn a_feature_counts_when_all_processors_have_it() {
        let info = "processor : 0\nflags\t\t: b a c\n\nprocessor : 1\nflags\t\t: c a\n";
        assert_eq!(cpu_features(info), ["a", "c"]);
        assert_eq!(cpu_features("Features\t: fp asimd\n"), ["asimd", "fp"]);
        assert!(cpu_features("nothing").is_empty());
    }

    #[test]
    fn kernels_cgroups_limits_and_flags_are_read() {
        assert_eq!(kernel_version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(kernel_version("6.1.0-40-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("strange"), None);
        let groups: Vec<_> = cgroups("4:memory:/a:b\n0::/x.service\nbad\n").collect();
        assert_eq!(groups, [("memory", "/a:b"), ("", "/x.service")]);
        assert_eq!(memory_limit("max\n"), None);
        assert_eq!(memory_limit("9223372036854771712\n"), None);
        assert_eq!(memory_limit("1048576\n"), Some(1 << 20));
        assert_eq!(open_flags("pos:\t0\nflags:\t0102001\n"), 0o102_001);
        assert_eq!(open_flags("flags: 9"), 0);
    }
}
